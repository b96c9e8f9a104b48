"""Commands about studies that are recorded: looking, stopping, mending, repeating, averaging and removing."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import click

from search.errors import RequestError, StudyError
from search.secrecy import redacted
from search.shown import cli_jobs, options
from search.shown.printing import print_json, told, watching


@click.command()
@click.argument("study", required=False)
@options.tracking_uri
@options.workspace
@options.as_json
def status(study: str | None, tracking_uri: str | None, workspace: str | None, as_json: bool) -> None:
    """Show how far STUDY is, or all studies of the workspace."""
    from search.shown.report import status_line
    from search.study import Study, names, workspace_folder

    if uri := elsewhere(tracking_uri, study, workspace):
        from search.service.elsewhere import status as read

        told_ = read(uri, study)
        if as_json:
            return print_json(told_[0] if study is not None else told_)
        return click.echo("\n".join(map(status_line, told_)) or f"no studies in {redacted(uri)}")
    folder = workspace_folder(workspace)
    wanted = [study] if study is not None else names(folder)
    found = []
    for name in wanted:
        try:
            found.append(Study(name, workspace).status())
        except RequestError as error:
            if study is not None:
                raise
            found.append({"study": name, "state": "UNREADABLE", "error": str(error)})  # and the others are shown
    if as_json:
        return print_json(found[0] if study is not None else found)
    for one in found:
        click.echo(f"{one['study']}: {one['error']}" if "error" in one else status_line(one))
    if not found:
        click.echo(f"no studies in {folder}; start one with `heldout launch SPACE`")


@click.command()
@click.argument("study", required=False)
@click.option("--html", metavar="FILE", help="Write one page with charts instead, for any browser.")
@options.tracking_uri
@options.workspace
@options.as_json
def report(
    study: str | None, html: str | None, tracking_uri: str | None, workspace: str | None, as_json: bool
) -> None:
    """Print what STUDY found, and what to believe of it."""
    if as_json and html is not None:
        raise RequestError("a report has one form: give one of --html and --json")
    from search.shown.report import lines
    from search.shown.report import report as make
    from search.study import Study

    if uri := elsewhere(tracking_uri, study, workspace):
        from search.service.elsewhere import read_page, read_report

        name = named(study)
        if html is not None:
            return click.echo(f"the report of {name} is in {read_page(uri, name, html)}")
        return told(read_report(uri, name), lines, as_json)
    found = Study(study, workspace)
    if html is not None:
        path = found.html(html)
        return click.echo(f"the report of {found.name} is in {path} ({path.stat().st_size / 1000:.0f} kB)")
    told(make(found), lines, as_json)


@click.command()
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@options.sending
@options.workspace
@options.as_json
def compare(first: str, second: str, cluster: str | None, detach: bool, workspace: str | None, as_json: bool) -> None:
    """Show studies A and B side by side.

    With a paired test of what they ship, where the same rows judged both.
    """
    cli_jobs.check_sending(cluster, detach)
    if cluster is not None:
        return cli_jobs.asked(click.get_current_context(), [first, second], cluster, detach, as_json)
    from search.shown.comparison import compare as run
    from search.shown.comparison import lines
    from search.study import Study

    found = run(Study(first, workspace), Study(second, workspace))
    told(found, lines, as_json)


@click.command()
@click.argument("study")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@click.option("--parquet", metavar="FILE", help="Write a Parquet file.")
@options.tracking_uri
@options.workspace
@options.as_json
def trials(
    study: str, as_csv: bool, parquet: str | None, tracking_uri: str | None, workspace: str | None, as_json: bool
) -> None:
    """List the trials of STUDY, also as a file for pandas or a spreadsheet."""
    if as_csv + as_json + (parquet is not None) > 1:
        raise RequestError("a table has one form: give one of --csv, --json and --parquet")
    from search.record import trial_table
    from search.study import Study

    if uri := elsewhere(tracking_uri, study, workspace):
        from search.service.elsewhere import read_trials

        frame = trial_table.dataframe(read_trials(uri, study))
    else:
        frame = Study(study, workspace).trials_dataframe()
    if parquet is not None:
        trial_table.write_parquet(frame, Path(parquet))
        click.echo(f"{len(frame)} trials written to {parquet}")
    elif as_csv:
        click.echo(frame.to_csv(index=False), nl=False)
    elif as_json:
        print_json(json.loads(frame.to_json(orient="records", date_format="iso")))
    else:
        from rich.console import Console

        console = Console()
        if not console.is_terminal:
            console.width = 10_000  # nobody's screen: cut nothing
        console.print(trial_table.shown(frame))


@click.command()
@click.argument("study")
@click.argument("trial", type=int)
@click.option("--csv", "as_csv", is_flag=True, help="Print its epochs as CSV, and nothing else.")
@options.tracking_uri
@options.workspace
@options.as_json
def show(study: str, trial: int, as_csv: bool, tracking_uri: str | None, workspace: str | None, as_json: bool) -> None:
    """Show one trial, and all that it printed."""
    if as_csv and as_json:
        raise RequestError("epochs have one form: give --csv or --json")
    from search.shown.report import trial_lines
    from search.study import Study

    if uri := elsewhere(tracking_uri, study, workspace):
        from search.service.elsewhere import read_trial

        found = read_trial(uri, study, trial)
    else:
        found = Study(study, workspace).show(trial)
    if as_csv:
        from search.record.trial_table import epochs

        return click.echo(epochs(found["reports"]).to_csv(index=False), nl=False)
    told(found, trial_lines, as_json)


@click.command()
@click.argument("study", required=False)
@click.option("--port", type=int, default=6006, show_default=True)
@options.workspace
def tensorboard(study: str | None, port: int, workspace: str | None) -> None:
    """Start TensorBoard on STUDY, for this machine only.

    It shows trials of a study that was launched with --tensorboard, also while it runs.
    """
    from search.study import Study
    from search.tracker.board import tensorboard as run

    found = Study(study, workspace)
    with run(found, port) as server:
        click.echo(f"TensorBoard shows study {found.name} at {server.url} (stop with Ctrl-C)")
        with contextlib.suppress(KeyboardInterrupt):
            server.wait()


@click.command()
@click.argument("study", metavar="STUDY|JOB")
@click.option("--now", is_flag=True, help="At once; trials that run begin anew on resume.")
@click.option("--cluster", metavar="URL", help="Stop a job on the Ray cluster with this dashboard, at once.")
@options.workspace
@options.as_json
def stop(study: str, now: bool, cluster: str | None, workspace: str | None, as_json: bool) -> None:
    """Ask a running STUDY to stop, its trials ended first.

    It can be resumed. Ctrl-C where it runs does the same, and a second Ctrl-C the same as --now.
    """
    from search.loop.stopping import stop as run

    if cluster is not None:
        return cli_jobs.stopped(cluster, study, as_json)
    found = run(study, now=now, workspace=workspace)
    if as_json:
        return print_json(found)
    when = "at once" if now else "when the trials that run have ended"
    click.echo(f"asked {found['driver']} to stop study {found['study']} {when}; `heldout resume {study}` goes on")


@click.command()
@click.argument("study")
@options.workspace
@options.as_json
def repair(study: str, workspace: str | None, as_json: bool) -> None:
    """Bring back what a damaged STUDY still has.

    Its journal is made whole again from all that can be read; damaged files are kept beside it.
    """
    from search.record.repairing import lines
    from search.record.repairing import repair as run

    found = run(study, workspace=workspace)
    told(found, lines, as_json)


@click.command()
@click.argument("study")
@click.argument("trial", type=int)
@options.workspace
@options.as_json
def reproduce(study: str, trial: int, workspace: str | None, as_json: bool) -> None:
    """Train one trial again, and compare.

    Nothing is recorded. Exits with 1 if the result is another one.
    """
    from search.reproduction import lines
    from search.reproduction import reproduce as run
    from search.study import Study

    with watching(None, as_json) as watcher:
        found = run(Study(study, workspace), trial, watcher=watcher)
    told(found, lines, as_json)
    click.get_current_context().exit(0 if found["reproduced"] else 1)


@click.command()
@click.argument("study")
@click.option("--size", type=int, default=5, show_default=True, help="Picks at most; a model may be picked twice.")
@click.option("--out", metavar="DIR", help="Write it to a new or empty folder, as one Keras model.")
@click.option(
    "--evaluate",
    type=click.Choice(["auto", "yes", "no"]),
    default="no",
    show_default=True,
    help="Open the test rows for it and the single winner, counted: auto only if no study has opened them.",
)
@options.sending
@click.option("--tracking-uri", metavar="URI", help="With --cluster and --out: its MLflow [MLFLOW_TRACKING_URI].")
@options.workspace
@options.as_json
def ensemble(
    study: str,
    size: int,
    out: str | None,
    evaluate: str,
    cluster: str | None,
    detach: bool,
    tracking_uri: str | None,
    workspace: str | None,
    as_json: bool,
) -> None:
    """Average models of STUDY, and say whether that wins.

    Models are picked by guard rows, and judged by guard rows that did not pick them and by a test, if asked for.
    """
    cli_jobs.check_sending(cluster, detach)
    if tracking_uri is not None and (cluster is None or out is None):
        raise RequestError("--tracking-uri is where --out is fetched from with --cluster; add both, or leave it out")
    if cluster is not None:
        context = click.get_current_context()
        return cli_jobs.ensembled(context, study, cluster, detach, as_json, out, tracking_uri)
    from search.ensembles.ensemble_words import lines
    from search.study import Study

    recorded = Study(study, workspace)  # before what takes a while to import
    from search.ensembles.ensembling import ensemble as run

    with watching(None, as_json) as watcher:
        found = run(recorded, size, out=out, evaluate=evaluate, watcher=watcher)
    told(found, lines, as_json)


@click.command()
@options.as_json
def ledger(as_json: bool) -> None:
    """Show what held-out rows have been used for.

    Of all studies in all workspaces: every opening of test rows, and how many trials guard rows have judged.
    """
    from search.guard.ledger import Ledger, lines

    found = Ledger().summary()
    told(found, lines, as_json)


@click.command()
@click.argument("study")
@click.option("--keep-runs", is_flag=True, help="Leave its runs in MLflow.")
@options.yes
@options.workspace
@options.as_json
def delete(study: str, keep_runs: bool, yes: bool, workspace: str | None, as_json: bool) -> None:
    """Delete STUDY with its models, rows and MLflow runs.

    The ledger keeps its openings. Rows that other studies use stay, and so do registered models.
    """
    from search.record import lifecycle

    lifecycle.see(study, workspace)  # before it is asked about
    runs = "" if keep_runs else ", its runs in MLflow included"
    options.sure(yes, f"delete study {study} for good{runs}?")
    found = lifecycle.delete(study, workspace=workspace, keep_runs=keep_runs)
    told(found, lifecycle.lines, as_json)


@click.command("gc")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@options.yes
@options.workspace
@options.as_json
def collect(dry_run: bool, yes: bool, workspace: str | None, as_json: bool) -> None:
    """Remove what nothing in the workspace needs.

    Half-deleted studies, rows without a study, temporary files, models that cannot win. Never the ledger.
    """
    from search.record import garbage

    found = garbage.gc(workspace, dry_run=True)
    if not dry_run and found["removed"]:
        if not (yes or as_json):
            told(found, lambda waste: garbage.lines(waste, True), False)
        options.sure(yes, "remove all that?")
        found = garbage.gc(workspace)
    told(found, lambda waste: garbage.lines(waste, dry_run), as_json)


def elsewhere(given: str | None, study: str | None, workspace: str | None) -> str | None:
    """Where a study is to be read from, if not from the workspace.

    That is where somebody says; or, for a study by name that the workspace does not have, the environment's server.

    Raises:
        RequestError: If somebody says both.
    """
    if given is not None and workspace is not None:
        raise RequestError("a study is read from one place: give one of --tracking-uri and --workspace")
    from search.study import Study
    from search.tracker.publishing import anchored

    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if given is not None or uri is None or study is None:
        return None if given is None else anchored(given)
    with contextlib.suppress(StudyError):
        Study(study, workspace)
        return None
    return anchored(uri)


def named(study: str | None) -> str:
    if study is None:
        raise RequestError("a study that ran elsewhere must be named; `heldout status --tracking-uri URI` lists them")
    return study


COMMANDS = (
    *(status, report, compare, trials, show, tensorboard, stop, repair, reproduce),
    *(ensemble, ledger, delete, collect),
)

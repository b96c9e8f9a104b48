"""The command `heldout`: the only file that prints or exits."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from search import options
from search.errors import HeldoutError, RequestError, StudyFailed

if TYPE_CHECKING:
    from search.trial import Trial

_DEBUG = "heldout.debug"


class _Commands(click.Group):
    """Turns our errors into one line and an exit code; tracebacks only with --debug."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except HeldoutError as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            click.echo(f"heldout: {error}", err=True)
            ctx.exit(2 if isinstance(error, RequestError) else 1)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            said = " ".join(str(error).split())[:300]
            click.echo(f"heldout: {type(error).__name__}: {said} (where: `heldout --debug …`)", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo(
                "heldout: stopped; `heldout status` shows what is recorded, `heldout resume STUDY` goes on",
                err=True,
            )
            ctx.exit(1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.version_option(package_name="heldout")
def main(debug: bool) -> None:
    """Hyperparameter search for Keras, with a test score to believe."""


@main.command()
@click.argument("space")
@options.search_options
@click.option("--study", help="The study's name [the space's name and a number].")
@click.option(
    "--evaluate",
    type=click.Choice(["auto", "yes", "no"]),
    default="auto",
    show_default=True,
    help="Open the sealed test rows at the end: auto only if no study has opened them.",
)
@options.final
@options.disk
@options.tags
@options.as_json
def launch(space: str, as_json: bool, **asked: Any) -> None:
    """Search a space and test what it finds.

    SPACE is a Python file, a dotted module, or the name of a shipped space.
    """
    from search.wiring import launch as run

    with _watching(_trainings(space=space, **asked), as_json) as watcher:
        study = run(space, watcher=watcher, **asked)
    _finished(study, as_json)


@main.command()
@click.argument("study")
@options.workspace
@options.as_json
def resume(study: str, workspace: str | None, as_json: bool) -> None:
    """Continue STUDY where it stopped."""
    from search.study import Study
    from search.wiring import resume as run

    stopped = Study(study, workspace)
    config = (stopped.meta("study") or {}).get("config")
    ended = [trial for trial in stopped.trials if trial.state.is_finished]
    with _watching(_trainings(**config) if config else None, as_json, ended) as watcher:
        found = run(study, workspace=workspace, watcher=watcher)
    _finished(found, as_json)


@main.command()
@click.argument("space")
@options.search_options
@options.as_json
def check(space: str, as_json: bool, **asked: Any) -> None:
    """Say what a launch would search, and its cost."""
    from search.rehearsal import check as run
    from search.report import check_lines

    with _watching(None, as_json) as watcher:
        found = run(space, watcher=watcher, **asked)
    if as_json:
        return _print_json(found)
    for line in check_lines(found):
        click.echo(line)


@main.command("try")
@click.argument("space")
@click.option("--params", default="{}", metavar="JSON", help="Values by name; the rest are the defaults.")
@click.option("--epochs", type=int, help="Epochs at most [the module's].")
@click.option("--seed", type=int, default=0, show_default=True, help="Of training.")
@options.as_json
def try_(space: str, params: str, epochs: int | None, seed: int, as_json: bool) -> None:
    """Run one trial here; nothing is recorded.

    Breakpoints work, and errors come as Python raises them.
    """
    from search.rehearsal import try_params

    try:
        values = json.loads(params)
    except ValueError as error:
        raise RequestError(
            f"""--params must be JSON such as '{{"units": 64}}', but {params!r} is not: {error}"""
        ) from None
    if not isinstance(values, dict):
        raise RequestError(f"--params must be a JSON object, but got {params!r}")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    found = try_params(space, values, epochs=epochs, seed=seed, say=None if as_json else click.echo)
    if as_json:
        return _print_json(found)
    click.echo(
        f"validation score {found['score']:.6g} at epoch {found['best_epoch']} of {found['epochs']}, "
        f"{found['size']} weights"
    )
    for key, value in found["params"].items():
        click.echo(f"    {key} = {value}")


@main.command()
@click.argument("study", required=False)
@options.workspace
@options.as_json
def status(study: str | None, workspace: str | None, as_json: bool) -> None:
    """Show how far STUDY is, or all studies of the workspace."""
    from search.report import status_line
    from search.study import Study, names, workspace_folder

    folder = workspace_folder(workspace)
    wanted = [study] if study is not None else names(folder)
    found = [Study(name, workspace).status() for name in wanted]
    if as_json:
        return _print_json(found[0] if study is not None else found)
    for one in found:
        click.echo(status_line(one))
    if not found:
        click.echo(f"no studies in {folder}; start one with `heldout launch SPACE`")


@main.command()
@click.argument("study", required=False)
@options.workspace
@options.as_json
def report(study: str | None, workspace: str | None, as_json: bool) -> None:
    """Print what STUDY found, and what to believe of it."""
    from search.report import lines
    from search.report import report as make
    from search.study import Study

    found = make(Study(study, workspace))
    if as_json:
        return _print_json(found)
    for line in lines(found):
        click.echo(line)


@main.command()
@click.argument("study")
@click.argument("trial", type=int)
@options.workspace
@options.as_json
def show(study: str, trial: int, workspace: str | None, as_json: bool) -> None:
    """Show one trial, and all that it printed."""
    from search.report import trial_lines
    from search.study import Study

    found = Study(study, workspace).show(trial)
    if as_json:
        return _print_json(found)
    for line in trial_lines(found):
        click.echo(line)


@main.command()
@click.argument("study", required=False)
@click.option("--out", required=True, metavar="DIR", help="A new or empty folder.")
@click.option("--trial", type=int, help="Number of the trial [the winner].")
@click.option("--final", type=click.Choice(["all"]), help="Refit it on every row first; no score applies then.")
@click.option("--format", "format_", type=click.Choice(["keras", "saved_model"]), default="keras", show_default=True)
@click.option("--register", metavar="NAME", help="Also put it in MLflow's registry, with the alias champion.")
@options.workspace
@options.as_json
def export(
    study: str | None,
    out: str,
    trial: int | None,
    final: str | None,
    format_: str,
    register: str | None,
    workspace: str | None,
    as_json: bool,
) -> None:
    """Write the best model to a folder.

    With it go its lineage, a model card, and the space's source.
    """
    from search.export import export as run
    from search.study import Study

    with _watching(None, as_json) as watcher:
        asked: dict[str, Any] = {"trial": trial, "final": final, "format": format_, "register": register}
        lineage = run(Study(study, workspace), out, watcher=watcher, **asked)
    if as_json:
        return _print_json(lineage)
    click.echo(f"trial {lineage['trial']} is in {out}: model.keras, lineage.json, MODEL_CARD.md, space.py")
    if final == "all":
        click.echo(f"    refitted on all {lineage['rows']} rows, test rows included, so no score applies to it")
    for tier, score in lineage.get("scores", {}).items():
        click.echo(f"    {tier} {lineage['objective'].removeprefix('val_')}: {score['score']:.6g}")
    if "registered" in lineage:
        click.echo(f"registered as {lineage['registered']['uri']} (version {lineage['registered']['version']})")


@main.command()
@click.argument("study")
@options.final
@options.workspace
@options.as_json
def evaluate(study: str, final: str | None, workspace: str | None, as_json: bool) -> None:
    """Open the sealed test rows; counted.

    Winner and baseline are scored. A selection that was tested before is answered from the record.
    """
    from search.study import Study

    found = Study(study, workspace)  # before what takes a while to import
    from search.evaluation import evaluate as run

    with _watching(None, as_json) as watcher:
        run(found, final=final, watcher=watcher)
    _finished(found, as_json)


@main.command()
@options.as_json
def ledger(as_json: bool) -> None:
    """Show what held-out rows have been used for.

    Of all studies in all workspaces: every opening of test rows, and how many trials guard rows have judged.
    """
    from search.ledger import Ledger, lines

    found = Ledger().summary()
    if as_json:
        return _print_json(found)
    for line in lines(found):
        click.echo(line)


@main.command()
@click.argument("study")
@click.option("--keep-runs", is_flag=True, help="Leave its runs in MLflow.")
@options.yes
@options.workspace
@options.as_json
def delete(study: str, keep_runs: bool, yes: bool, workspace: str | None, as_json: bool) -> None:
    """Delete STUDY with its models, rows and MLflow runs.

    The ledger keeps its openings. Rows that other studies use stay, and so do registered models.
    """
    from search import lifecycle

    runs = "" if keep_runs else ", its runs in MLflow included"
    options.sure(yes, f"delete study {study} for good{runs}?")
    found = lifecycle.delete(study, workspace=workspace, keep_runs=keep_runs)
    _told(found, lifecycle.lines(found), as_json)


@main.command("gc")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@options.yes
@options.workspace
@options.as_json
def collect(dry_run: bool, yes: bool, workspace: str | None, as_json: bool) -> None:
    """Remove what nothing in the workspace needs.

    Half-deleted studies, rows without a study, temporary files, models that cannot win. Never the ledger.
    """
    from search import garbage

    found = garbage.gc(workspace, dry_run=True)
    if not dry_run and found["removed"]:
        if not (yes or as_json):
            _told(found, garbage.lines(found, True), False)
        options.sure(yes, "remove all that?")
        found = garbage.gc(workspace)
    _told(found, garbage.lines(found, dry_run), as_json)


@main.command()
@click.option("--port", type=int, default=5000, show_default=True)
@options.workspace
def ui(port: int, workspace: str | None) -> None:
    """Start MLflow's UI on the workspace, on this machine only."""
    from search.study import names, workspace_folder
    from search.ui import serve

    folder = workspace_folder(workspace)
    click.echo("starting MLflow's server, which takes some seconds …")
    with serve(folder, port) as server:
        click.echo(f"MLflow shows the workspace at {server.url}/?workflowType=machine_learning (stop with Ctrl-C)")
        for name in names(folder)[-5:]:
            link = _compare_link(name, workspace, server.url)
            if link:
                click.echo(f"all trials of {name}: {link}")
        with contextlib.suppress(KeyboardInterrupt):
            server.wait()


# ── printing ─────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def _watching(planned: int | None, as_json: bool, earlier: Sequence[Trial] = ()) -> Iterator[Any]:
    """A live view on standard error, so that standard output carries the result alone."""
    from rich.console import Console

    from search.view import View

    if as_json:
        yield None
        return
    with View(Console(stderr=True), planned, earlier) as view:
        yield view


def _trainings(**config: Any) -> int:
    """Trainings of a whole study."""
    from search.study import StudyConfig

    known = StudyConfig(**config)
    return known.trials + known.confirmation().runs


def _told(found: Any, lines: Sequence[str], as_json: bool) -> None:
    """Print JSON, or the same in plain words."""
    if as_json:
        return _print_json(found)
    for line in lines:
        click.echo(line)


def _print_json(found: Any) -> None:
    click.echo(json.dumps(_strict(found), indent=2, default=str, allow_nan=False))


def _strict(found: Any) -> Any:
    """What JSON can hold: it has neither NaN nor infinities, which trials do report."""
    if isinstance(found, dict):
        return {key: _strict(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [_strict(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def _finished(study: Any, as_json: bool) -> None:
    from search.report import lines
    from search.report import report as make

    found = make(study)
    if as_json:
        _print_json(found)
    else:
        uri = str(found["tracking"]["uri"] or "")
        server = uri if uri.startswith("http") else "http://127.0.0.1:5000"
        link = _compare_link(study.name, str(study.workspace), server)
        if link:  # before the report, since it is longer than a screen is wide
            click.echo(f"all trials in MLflow{'' if server == uri else ' (after `heldout ui`)'}: {link}")
        for line in lines(found):
            click.echo(line)
        if found["best"] is not None:
            click.echo(f"export the model: heldout export {study.name} --out {study.name}-model")
    if found["best"] is None:
        raise StudyFailed(f"no trial of study {study.name!r} completed; `heldout show {study.name} 0` shows the first")


def _compare_link(name: str, workspace: str | None, base: str) -> str | None:
    from search import publishing
    from search.study import Study

    found = publishing.read(Study(name, workspace).folder)
    runs = [run for _, run in sorted(found.get("runs", {}).items(), key=lambda item: int(item[0]))]
    return publishing.compare_link(base, found["experiment_id"], runs) if runs else None


if __name__ == "__main__":
    sys.exit(main())

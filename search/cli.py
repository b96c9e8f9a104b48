"""The command `heldout`: the only file that prints or exits."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from typing import TYPE_CHECKING, Any

import click

from search import secrecy
from search.errors import HeldoutError, RequestError
from search.shown import cli_jobs, options
from search.shown.cli_recorded import COMMANDS, elsewhere, named
from search.shown.printing import compare_link, finished, print_json, told, watching

if TYPE_CHECKING:
    from search.study import StudyConfig


class _Commands(click.Group):
    """Turns our errors into one line and an exit code; tracebacks only with --debug."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except HeldoutError as error:
            _say_error(str(error), bool(ctx.params.get("debug")))
            ctx.exit(2 if isinstance(error, RequestError) else 1)
        except click.UsageError as error:  # click would take four lines
            command = error.ctx.command_path if error.ctx is not None else "heldout"
            _say_error(f"{error.format_message().rstrip('.')} (see `{command} --help`)", False)
            ctx.exit(2)
        except click.Abort:
            _say_error("nothing was done", False)
            ctx.exit(1)
        except (click.ClickException, click.exceptions.Exit, BrokenPipeError):
            raise
        except Exception as error:
            said = " ".join(secrecy.scrub(str(error)).split())[:300]
            _say_error(f"{type(error).__name__}: {said} (where: `heldout --debug …`)", bool(ctx.params.get("debug")))
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("heldout: stopped", err=True)
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
@options.prior
@options.final
@options.checkpoint_minutes
@options.tensorboard
@options.ray
@options.disk
@options.tags
@options.sending
@options.as_json
def launch(space: str, cluster: str | None, detach: bool, as_json: bool, **asked: Any) -> None:
    """Search a space and test what it finds.

    SPACE is a Python file, a dotted module, or the name of a shipped space.
    """
    from search.study import StudyConfig
    from search.tiers.validation import parse
    from search.wiring import launch as run

    config = StudyConfig(space=space, **asked)
    cli_jobs.check_sending(cluster, detach)
    if cluster is not None:
        return cli_jobs.launched(click.get_current_context(), space, cluster, detach, as_json)
    with watching(_trainings(config), as_json, step=parse(config.validation).step) as watcher:
        study = run(space, watcher=watcher, **asked)
    finished(study, as_json)


@main.command()
@click.argument("study")
@click.option("--trials", metavar="N|+N", help="Trials in all, or so many more [the plan's].")
@click.option("--accept-changes", is_flag=True, help="Go on with a space module that was changed.")
@click.option("--evaluate", type=click.Choice(["auto", "yes", "no"]), help="As for launch [as launched].")
@click.option("--max-disk", metavar="SIZE", help="As for launch [as launched].")
@options.ends
@options.ray
@options.sending
@options.workspace
@options.as_json
def resume(study: str, cluster: str | None, detach: bool, workspace: str | None, as_json: bool, **asked: Any) -> None:
    """Continue STUDY where it stopped, or extend it."""
    cli_jobs.check_sending(cluster, detach)
    if cluster is not None:
        return cli_jobs.asked(click.get_current_context(), [study], cluster, detach, as_json)
    from search.resuming import extended
    from search.resuming import resume as run
    from search.study import Study, config_of
    from search.tiers.validation import parse

    stopped, plan, step = Study(study, workspace), None, "epoch"
    with stopped.journal() as journal:
        if journal.get("study") is not None:
            config = extended(config_of(journal), asked["trials"])
            plan, step = _trainings(config), parse(config.validation).step
    ended = [trial for trial in stopped.trials if trial.state.is_finished]
    with watching(plan, as_json, ended, step) as watcher:
        found = run(study, workspace=workspace, watcher=watcher, **asked)
    finished(found, as_json)


@main.command()
@click.argument("name")
@click.option("--kind", type=click.Choice(["table", "images", "text", "series"]), default="table", show_default=True)
def init(name: str, kind: str) -> None:
    """Write NAME.py, a space to start from.

    It runs as it is, on data that ships with scikit-learn or is made up; the lines to replace are marked.
    """
    from search.definition.starting import KINDS
    from search.definition.starting import init as run

    file = run(name, kind)
    click.echo(f"wrote {file}, a space for {KINDS[kind]}; lines marked with YOURS are to be replaced")
    click.echo(f"    heldout check {file} --sanity")
    click.echo(f"    heldout launch {file}")


@main.command()
@click.argument("space")
@options.search_options
@click.option("--sanity", is_flag=True, help="Also see whether the default model can learn at all; fails with 1.")
@options.as_json
def check(space: str, as_json: bool, **asked: Any) -> None:
    """Say what a launch would search, and its cost."""
    from search.checks.findings import failed
    from search.rehearsal import check as run
    from search.shown.report import check_lines

    with watching(None, as_json) as watcher:
        found = run(space, watcher=watcher, **asked)
    told(found, check_lines, as_json)
    if found["sanity"] is not None and failed(found["sanity"]["findings"]):
        click.get_current_context().exit(1)


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
        return print_json(found)
    click.echo(
        f"validation score {found['score']:.6g} at epoch {found['best_epoch']} of {found['epochs']}, "
        f"{found['size']} weights"
    )
    for key, value in found["params"].items():
        click.echo(f"    {key} = {value}")


@main.command()
@click.argument("study", required=False)
@click.option("--out", required=True, metavar="DIR", help="A new or empty folder.")
@click.option("--trial", type=int, help="Number of the trial [the winner].")
@click.option("--final", type=click.Choice(["all"]), help="Refit it on every row first; no score applies then.")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["keras", "saved_model", "onnx", "litert"]),
    default="keras",
    show_default=True,
    help="A file to add to model.keras; onnx and litert need an extra.",
)
@click.option("--register", metavar="NAME", help="Also put it in MLflow's registry, with the alias champion.")
@options.tracking_uri
@options.workspace
@options.as_json
def export(
    study: str | None,
    out: str,
    trial: int | None,
    final: str | None,
    format_: str,
    register: str | None,
    tracking_uri: str | None,
    workspace: str | None,
    as_json: bool,
) -> None:
    """Write the best model to a folder.

    With it go its lineage, a model card, and the space's source.
    """
    from search.export import export as run
    from search.study import Study

    asked: dict[str, Any] = {"trial": trial, "final": final, "format": format_, "register": register}
    if uri := elsewhere(tracking_uri, study, workspace):
        from search.service.elsewhere import read_model

        if trial is not None or final is not None or format_ != "keras" or register is not None:
            raise RequestError(
                "of a study that ran elsewhere the model is copied that was published, so --trial, --final, --format "
                "and --register cannot apply; export it where it ran"
            )
        lineage = read_model(uri, named(study), out)
    else:
        with watching(None, as_json) as watcher:
            lineage = run(Study(study, workspace), out, watcher=watcher, **asked)
    if as_json:
        return print_json(lineage)
    files = [*{"model.keras": None} | lineage["checked"], "lineage.json", "MODEL_CARD.md", "space.py"]
    files += [lineage["architecture"]] if lineage["architecture"] else []
    click.echo(f"trial {lineage['trial']} is in {out}: {', '.join(files)}")
    for name, found in lineage["checked"].items():
        click.echo(
            f"    {name} predicts {found['rows']} rows as the model does, to {found['largest_difference']:.2g} "
            f"({lineage['tolerance']:g} is allowed)"
        )
    if final == "all":
        click.echo(f"    refitted on all {lineage['rows']} rows, test rows included, so no score applies to it")
    for tier, score in lineage.get("scores", {}).items():
        click.echo(f"    {tier} {lineage['objective'].removeprefix('val_')}: {score['score']:.6g}")
    if "registered" in lineage:
        click.echo(f"registered as {lineage['registered']['uri']} (version {lineage['registered']['version']})")


@main.command()
@click.argument("study")
@options.final
@options.sending
@options.workspace
@options.as_json
def evaluate(
    study: str, final: str | None, cluster: str | None, detach: bool, workspace: str | None, as_json: bool
) -> None:
    """Open the sealed test rows; counted.

    Winner and baseline are scored. A selection that was tested before is answered from the record.
    """
    cli_jobs.check_sending(cluster, detach)
    if cluster is not None:
        return cli_jobs.asked(click.get_current_context(), [study], cluster, detach, as_json)
    from search.study import Study

    found = Study(study, workspace)  # before what takes a while to import
    from search.guard.evaluation import evaluate as run

    with watching(None, as_json) as watcher:
        run(found, final=final, watcher=watcher)
    finished(found, as_json)


@main.command()
@click.option("--port", type=int, default=5000, show_default=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0 for every one.")
@options.workspace
def ui(port: int, host: str, workspace: str | None) -> None:
    """Start MLflow's UI on the workspace, for this machine only unless --host says otherwise."""
    from search.study import names, workspace_folder
    from search.tracker.serving import is_loopback
    from search.tracker.ui import serve

    folder = workspace_folder(workspace)
    click.echo("starting MLflow's server, which takes some seconds …")
    if not is_loopback(host):
        click.echo(f"whoever reaches {host} can read and delete every run: MLflow asks for no password", err=True)
    with serve(folder, port, host) as server:
        click.echo(f"MLflow shows the workspace at {server.url}/?workflowType=machine_learning (stop with Ctrl-C)")
        for name in names(folder)[-5:]:
            link = compare_link(name, workspace, server.url)
            if link:
                click.echo(f"all trials of {name}: {link}")
        with contextlib.suppress(KeyboardInterrupt):
            server.wait()


def _say_error(text: str, debug: bool) -> None:
    """One line for an error, after its traceback if that is wanted; neither shows a secret."""
    secrecy.learn_tracking(os.environ.get("MLFLOW_TRACKING_URI", ""))
    if debug:
        click.echo(secrecy.scrub(traceback.format_exc()), err=True, nl=False)
    click.echo(secrecy.scrub(f"heldout: {text}"), err=True)


def _trainings(config: StudyConfig) -> int:
    """Trainings of a whole study."""
    return config.trials + config.confirmation().runs


for _command in (*COMMANDS, *cli_jobs.COMMANDS):
    main.add_command(_command)

if __name__ == "__main__":
    sys.exit(main())

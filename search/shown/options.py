"""Options that several commands share."""

from __future__ import annotations

import sys
from typing import Any

import click

from search.errors import RequestError
from search.samplers import AUTO, SAMPLERS
from search.tiers.validation import HOLDOUT


def workspace(command: Any) -> Any:
    """Where studies lie."""
    return click.option(
        "--workspace",
        metavar="DIR",
        help="Folder for everything that is written [HELDOUT_WORKSPACE, ./heldout-workspace].",
    )(command)


def as_json(command: Any) -> Any:
    """For programs."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def ray(command: Any) -> Any:
    """Where trials run."""
    command = click.option(
        "--max-slots",
        type=int,
        metavar="N",
        help="Trials at a time on a cluster, at most [16; --workers if that is given; no limit with local].",
    )(command)
    return click.option(
        "--ray",
        metavar="ADDRESS",
        help="Run trials on a Ray cluster: HOST:PORT, auto, or local for a private one; for resume also none.",
    )(command)


def disk(command: Any) -> Any:
    """What a study may leave on disk."""
    command = click.option(
        "--max-disk", metavar="SIZE", help="Most that the study's folder may hold, such as 20G; beyond, fewer are kept."
    )(command)
    return click.option(
        "--keep",
        metavar="K",
        default="20",
        show_default=True,
        callback=_kept,
        help="Models of the search to keep, the best by validation score, or all.",
    )(command)


def _kept(_: Any, __: Any, given: str) -> int | None:
    if given == "all":
        return None
    if not given.isdecimal() or int(given) < 1:
        raise RequestError(f"--keep must be a whole number of at least 1, or all, but got {given!r}")
    return int(given)


def tracking_uri(command: Any) -> Any:
    """Where a study is read from that ran elsewhere."""
    return click.option(
        "--tracking-uri",
        metavar="URI",
        help="Read a study that ran elsewhere from this MLflow [MLFLOW_TRACKING_URI, if it is not in the workspace].",
    )(command)


def cluster(command: Any) -> Any:
    """Which cluster's jobs are meant."""
    return click.option("--cluster", required=True, metavar="URL", help="Ray's dashboard, such as http://head:8265.")(
        command
    )


def sending(command: Any) -> Any:
    """To run as a job on a cluster, driver and all."""
    command = click.option("--detach", is_flag=True, help="With --cluster: return once the job is queued.")(command)
    return click.option(
        "--cluster",
        metavar="URL",
        help="Run it as a job on the Ray cluster with this dashboard, its driver too, and follow it from here.",
    )(command)


def tags(command: Any) -> Any:
    """For MLflow."""
    return click.option(
        "--tag",
        "tags",
        multiple=True,
        metavar="K=V",
        callback=_tagged,
        help="A tag for every MLflow run; may be repeated.",
    )(command)


def _tagged(_: Any, __: Any, given: tuple[str, ...]) -> dict[str, str]:
    pairs = [tag.partition("=") for tag in given]
    wrong = [tag for tag, (key, mark, _) in zip(given, pairs, strict=True) if not key or not mark]
    if wrong:
        raise RequestError(f"--tag must be K=V, but got {wrong[0]!r}")
    return {key: value for key, _, value in pairs}


def yes(command: Any) -> Any:
    """For what cannot be taken back."""
    return click.option("--yes", is_flag=True, help="Do not ask.")(command)


def sure(said: bool, question: str) -> None:
    """Ask at the terminal, unless ``--yes`` was said; anything but yes ends the command."""
    if said:
        return
    if not sys.stdin.isatty():
        raise RequestError("this asks before it deletes, but there is no terminal to answer at; add --yes")
    click.confirm(question, abort=True, err=True)


def final(command: Any) -> Any:
    """What is tested."""
    return click.option(
        "--final",
        metavar="retrain",
        help="Refit winner and baseline on train, validation and guard rows before they are tested.",
    )(command)


def prior(command: Any) -> Any:
    """What is known before the search."""
    options = [
        click.option("--enqueue", metavar="FILE", help="Configurations to try first: JSON, JSON lines or CSV."),
        click.option(
            "--warm-start",
            multiple=True,
            metavar="STUDY",
            help="Try its best configurations first, and learn from its trials; may be repeated.",
        ),
        click.option("--warm-start-other-data", is_flag=True, help="Even if it had other rows or another split."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def checkpoint_minutes(command: Any) -> Any:
    """How long trials may be before one that runs again should not begin from zero."""
    return click.option(
        "--checkpoint-minutes",
        type=float,
        metavar="M",
        help="Save a running trial every M minutes; one that runs again continues from there [begins again].",
    )(command)


def tensorboard(command: Any) -> Any:
    """What trials write besides."""
    return click.option(
        "--tensorboard", is_flag=True, help="Also log trials for `heldout tensorboard`; needs the extra of that name."
    )(command)


def ends(command: Any) -> Any:
    """What ends a search before its number of trials; they may be extended on resume."""
    options = [
        click.option(
            "--timeout", type=float, metavar="SECONDS", help="Begin no trial once trials have run for so long."
        ),
        click.option(
            "--stop-after-stale",
            type=int,
            metavar="N",
            help="Nor after N trials in a row without a gain above one standard error.",
        ),
        click.option("--max-gpu-hours", type=float, metavar="H", help="Nor after so many hours of GPUs."),
        click.option("--target", type=float, metavar="SCORE", help="Nor once a validation score has reached it."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def search_options(command: Any) -> Any:
    """What `launch` and `check` search, and with what."""
    options = [
        click.option("--trials", type=int, default=30, show_default=True, help="Trials, the baseline included."),
        click.option(
            "--sampler",
            metavar="NAME",
            default=AUTO,
            show_default=True,
            help=f"How configurations are proposed: {', '.join(SAMPLERS)}; auto takes what measured best.",
        ),
        click.option(
            "--pruner",
            default="none",
            show_default=True,
            help="How weak trials are stopped early: asha gives many configurations a few epochs and the best ones "
            "many (coarse to fine), median stops what is worse than half of the others, none stops none.",
        ),
        click.option("--grace", type=int, metavar="N", help="Epochs before a trial may be stopped [a tenth]."),
        click.option("--workers", type=int, help="Trials at a time on CPUs [one per core]."),
        click.option("--gpus", metavar="auto|none|0,1", help="GPUs to use [auto]."),
        click.option("--trials-per-gpu", type=int, metavar="K", help="Trials that share a GPU."),
        click.option("--gpus-per-trial", type=int, metavar="G", help="GPUs that one trial gets."),
        click.option("--seed", type=int, default=0, show_default=True, help="Of proposals and training; moves no row."),
        click.option("--split-seed", type=int, default=0, show_default=True, help="Of the split of rows into tiers."),
        click.option(
            "--validation",
            metavar="PLAN",
            default=HOLDOUT,
            show_default=True,
            help="How a configuration is judged: holdout, kfold:5, repeated:3, or reshuffle (a split for every trial).",
        ),
        click.option("--epochs", type=int, help="Epochs of a trial at most [the module's]."),
        click.option("--trial-timeout", type=float, metavar="SECONDS", help="End a training that takes longer."),
        click.option(
            "--heartbeat",
            type=float,
            metavar="SECONDS",
            default=600.0,
            show_default=True,
            help="End a training that for so long says nothing and uses no CPU time; 0 for never.",
        ),
        click.option("--deterministic", is_flag=True, help="Train with operations alone that repeat to the bit."),
        click.option(
            "--confirm",
            type=int,
            metavar="K",
            help="Best configurations to train again before one is chosen, 0 for none [one in ten trials].",
        ),
        click.option(
            "--confirm-seeds",
            type=int,
            metavar="S",
            default=3,
            show_default=True,
            help="Trainings of each of them, and of the baseline.",
        ),
        click.option(
            "--env",
            multiple=True,
            metavar="NAME",
            help="A secret for trials: the variable NAME, or the file that NAME_FILE names; may be repeated.",
        ),
        click.option(
            "--start-method",
            type=click.Choice(["fork", "spawn"]),
            help="How trial processes start [fork on Linux].",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return workspace(ends(command))

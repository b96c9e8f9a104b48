"""What commands show: a live view on standard error, and a result on standard output, in words or as JSON."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from search.errors import StudyFailed, StudyStopped

if TYPE_CHECKING:
    from search.trial import Trial


@contextlib.contextmanager
def watching(
    planned: int | None, as_json: bool, earlier: Sequence[Trial] = (), step: str = "epoch"
) -> Iterator[Any]:
    """A live view on standard error, so that standard output carries the result alone."""
    from rich.console import Console

    from search.shown.view import View

    if as_json:
        yield None
        return
    with View(Console(stderr=True), planned, earlier, step) as view:
        yield view


def told(found: Any, lines: Callable[[Any], Sequence[str]], as_json: bool) -> None:
    """Print JSON, or the same in plain words, which ``lines`` makes of it."""
    if as_json:
        return print_json(found)
    for line in lines(found):
        click.echo(line)


def print_json(found: Any) -> None:
    """One JSON value."""
    click.echo(json.dumps(_strict(found), indent=2, default=str, allow_nan=False))


def _strict(found: Any) -> Any:
    """What JSON can hold: it has neither NaN nor infinities, which trials do report."""
    if isinstance(found, dict):
        return {key: _strict(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [_strict(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def finished(study: Any, as_json: bool) -> None:
    """The report of a study that was driven.

    Raises:
        StudyFailed: If it was stopped, or no trial completed.
    """
    from search.shown.report import lines
    from search.shown.report import report as make

    found = make(study)
    if as_json:
        print_json(found)
    else:
        uri = str(found["tracking"]["uri"] or "")
        server = uri if uri.startswith("http") else "http://127.0.0.1:5000"
        link = compare_link(study.name, str(study.workspace), server)
        if link:  # before the report, since it is longer than a screen is wide
            click.echo(f"all trials in MLflow{'' if server == uri else ' (after `heldout ui`)'}: {link}")
        for line in lines(found):
            click.echo(line)
        if found["best"] is not None:
            click.echo(f"export the model: heldout export {study.name} --out {study.name}-model")
    if study.state == "STOPPED":
        raise StudyStopped(f"study {study.name!r} was stopped; `heldout resume {study.name}` goes on")
    if found["best"] is None:
        raise StudyFailed(f"no trial of study {study.name!r} completed; `heldout show {study.name} 0` shows the first")


def compare_link(name: str, workspace: str | None, base: str) -> str | None:
    """Link to MLflow's chart of all trials of a study, if they are there."""
    from search.study import Study
    from search.tracker import publishing

    found = publishing.read(Study(name, workspace).folder)
    runs = [run for _, run in sorted(found.get("runs", {}).items(), key=lambda item: int(item[0]))]
    return publishing.compare_link(base, found["experiment_id"], runs) if runs else None

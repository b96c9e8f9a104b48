"""The live view of a running study, on a rich console: a table at a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from search.shown.report import number
from search.trial import Report, Trial, TrialState, best


class View:
    """A watcher that shows trials running with their epochs, the best so far, the baseline and the time left.

    Use as a context manager. At a terminal the view is redrawn in place; elsewhere each event is one line.

    Args:
        planned: Trainings in the plan, those that confirm included.
        earlier: Trials that had ended before, in a study that goes on.
        step: What trials report after: an epoch, a fold or a repeat.
    """

    def __init__(
        self, console: Console, planned: int | None, earlier: Sequence[Trial] = (), step: str = "epoch"
    ) -> None:
        self._console, self._planned, self._step = console, planned, step
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._running: dict[int, tuple[Trial, Report | None]] = {}
        self._ended, self._states = 0, Counter[TrialState]()
        self._best: Trial | None = None
        self._baseline: Trial | None = None
        for trial in earlier:
            self._count(trial)
        self._before, self._first = self._ended, math.inf  # and when the first trial of this run began
        self._notes: deque[str] = deque(maxlen=4)
        self._began = time.monotonic()
        self._drawn = 0.0

    def __enter__(self) -> View:
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.update("")
            self._live.__exit__(None, None, None)

    def started(self, trial: Trial) -> None:
        """A trial began."""
        self._running[trial.number] = (trial, None)
        self._draw()

    def epoch(self, report: Report) -> None:
        """A trial finished an epoch."""
        if report.trial in self._running:
            self._running[report.trial] = (self._running[report.trial][0], report)
        self._draw()

    def ended(self, trial: Trial) -> None:
        """A trial is over."""
        self._running.pop(trial.number, None)
        self._first = min(self._first, math.inf if trial.started is None else trial.started)
        self._count(trial)
        if self._live is None:
            self._console.print(self._line(trial), markup=False, highlight=False, soft_wrap=True)
        self._draw(force=True)

    def _count(self, trial: Trial) -> None:
        # Not kept and counted again each time: there may be a hundred thousand.
        self._ended += 1
        self._states[trial.state] += 1
        self._best = best([trial] if self._best is None else [self._best, trial])
        if trial.number == 0 and trial.state is TrialState.COMPLETE:
            self._baseline = trial

    def planned(self, trainings: int) -> None:
        """How many trainings there will be in all is known now."""
        self._planned = trainings

    def say(self, text: str) -> None:
        """Something that people should know."""
        self._notes.append(text)
        if self._live is None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._draw(force=True)

    def tick(self) -> None:
        """Time passed."""
        self._draw()

    def _line(self, trial: Trial) -> str:
        mark = "  best so far" if self._best is not None and self._best.number == trial.number else ""
        of = f"/{self._planned}" if self._planned else ""
        if trial.confirms is not None:
            mark = f"  confirms trial {trial.confirms}"
        if trial.state is TrialState.COMPLETE:
            said = f"{number(trial.score)} after {trial.epochs} epochs, {trial.seconds or 0:.1f} s{mark}"
        elif trial.state is TrialState.PRUNED:
            worth = "" if trial.score is None else f" at {number(trial.score)}"
            said = f"stopped early after {trial.epochs} {self._step}s{worth}, {trial.seconds or 0:.1f} s"
        else:
            said = f"{trial.state} ({trial.reason}: {trial.message})"
        return f"trial {trial.number} [{self._ended}{of}] {said}  {_params(trial.params)}"

    def _draw(self, force: bool = False) -> None:
        if self._live is not None and (force or time.monotonic() - self._drawn > 0.2):
            self._drawn = time.monotonic()
            self._live.update(self._table())

    def _table(self) -> Group:
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=bool(self._running))
        for title in ("trial", self._step, "now", "parameters"):
            table.add_column(title, no_wrap=title != "parameters", overflow="ellipsis")
        for trial, report in self._running.values():
            now = (
                ", ".join(f"{k} {number(v)}" for k, v in sorted(report.metrics.items()) if k.startswith("val_"))
                if report
                else ""
            )
            again = "" if trial.confirms is None else f" (again {trial.confirms})"
            table.add_row(
                f"{trial.number}{again}",
                str(report.step if report else ""),
                now,
                _params(trial.params) or "defaults",
            )
        return Group(table, Text(self._summary(), style="bold"), *(Text(note, style="dim") for note in self._notes))

    def _summary(self) -> str:
        failed, pruned = self._states[TrialState.FAILED], self._states[TrialState.PRUNED]
        of = f" of {self._planned}" if self._planned else ""
        parts = [f"{self._ended}{of} trainings ended"]
        parts += ([f"{pruned} stopped early"] if pruned else []) + ([f"{failed} failed"] if failed else [])
        if self._best is not None:
            parts.append(f"best {number(self._best.score)} (trial {self._best.number})")
        if self._baseline is not None:
            parts.append(f"baseline {number(self._baseline.score)}")
        left = self._seconds_left()
        return " · ".join([*parts, *([f"about {_span(left)} left"] if left is not None else [])])

    def _seconds_left(self) -> float | None:
        """From the pace of this run so far; None before three trials have ended."""
        here = self._ended - self._before
        if self._planned is None or here < 3 or self._first == math.inf:
            return None
        return (time.time() - self._first) / here * max(0, self._planned - self._ended)


def _params(params: Mapping[str, object]) -> str:
    return " ".join(f"{key}={number(value)}" for key, value in params.items())


def _span(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )

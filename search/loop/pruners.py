"""Pruners: which trials stop early. Pure functions of what trials have reported, so a resume needs nothing else.

A trial asks at *rungs*, numbers of epochs that are announced to it, and waits there for the answer. A value is that
of the objective on validation rows as Keras reports it, the best of the epochs up to the rung, since the best epoch's
weights are what a trial would keep; turned so that lower is better, and the worst there is where it is not a number.
A trial that is judged by several splits asks after each of them, and is compared by the mean of their values.
"""

from __future__ import annotations

import bisect
import difflib
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from search.errors import RequestError
from search.trial import Report, Trial

__all__ = ["PRUNERS", "Curve", "Folds", "Pruner", "Pruning", "get_pruner"]

ETA = 3
_STARTUP = 5  # trials that a median needs to mean anything


class Curve:
    """What one attempt of a trial has reported of the objective, epoch by epoch, turned so that lower is better."""

    def __init__(self, values: Iterable[float] = ()) -> None:
        self._best: list[float] = []
        self._sums: list[tuple[float, int]] = []  # of what was finite, and how many that were
        for value in values:
            self.add(len(self._best) + 1, value)

    def __len__(self) -> int:
        return len(self._best)

    def add(self, step: int, value: float) -> None:
        """The value of an epoch, counted from 1. Of two for one epoch the first stands."""
        while len(self._best) < step:
            new = value if len(self._best) == step - 1 and not math.isnan(value) else math.inf
            total, count = self._sums[-1] if self._sums else (0.0, 0)
            self._sums.append((total + new, count + 1) if math.isfinite(new) else (total, count))
            self._best.append(min(new, self._best[-1]) if self._best else new)

    def best(self, step: int) -> float:
        """The best value of the first ``step`` epochs, which must have been reported."""
        return self._best[step - 1]

    def mean(self, step: int) -> float:
        """The mean of the values of the first ``step`` epochs, as far as they are numbers."""
        total, count = self._sums[step - 1]
        return total / count if count else math.inf


class Folds(Curve):
    """The same of a trial that reports after each of its folds: what it is worth is the mean of those so far."""

    def best(self, step: int) -> float:
        """The mean of the values of the first ``step`` folds; the worst there is if one of them is not a number."""
        total, count = self._sums[step - 1]
        return total / count if count == step else math.inf


class Pruner(Protocol):
    """A pure function of its arguments."""

    def rungs(self, grace: int, most: int) -> tuple[int, ...]:
        """Numbers of epochs below ``most`` after which a trial asks; the first one is ``grace``."""
        ...

    def worth(self, curve: Curve, step: int) -> float:
        """What others are compared with of a trial that has reached the rung; lower is better."""
        ...

    def stops(self, own: Curve, others: Sequence[float], step: int) -> bool:
        """Whether a trial shall stop at a rung.

        Args:
            own: Its curve, which has reached the rung.
            others: What the other trials that have reached it are worth, whatever became of them, in rising order.
            step: The rung.
        """
        ...


class Off:
    """Every trial runs to its end."""

    def rungs(self, grace: int, most: int) -> tuple[int, ...]:
        """No trial asks."""
        return ()

    def worth(self, curve: Curve, step: int) -> float:
        """Nobody asks."""
        return 0.0

    def stops(self, own: Curve, others: Sequence[float], step: int) -> bool:
        """Never."""
        return False


class Asha:
    """Asynchronous successive halving, in its stopping variant.

    Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning". A trial goes on from a rung if it is in
    the best third of the values recorded there so far; while they are fewer than three, if none is better. Nobody
    waits for a rung to fill.
    """

    def rungs(self, grace: int, most: int) -> tuple[int, ...]:
        """The grace period, and three times as many epochs each time."""
        steps = (grace * ETA**k for k in itertools.count())
        return tuple(itertools.takewhile(lambda step: step < most, steps))

    def worth(self, curve: Curve, step: int) -> float:
        """Its best value so far."""
        return curve.best(step)

    def stops(self, own: Curve, others: Sequence[float], step: int) -> bool:
        """Whether too many others are better; those that are as good are not."""
        return bisect.bisect_left(others, own.best(step)) >= max(1, (len(others) + 1) // ETA)


class Median:
    """Vizier's median stopping rule (Golovin et al. 2017): a trial stops whose best value so far is worse than the
    median of the other trials' running means up to the same epoch. Five others have to have come so far."""

    def rungs(self, grace: int, most: int) -> tuple[int, ...]:
        """Each multiple of the grace period."""
        return tuple(range(grace, most, grace))

    def worth(self, curve: Curve, step: int) -> float:
        """The mean of its values so far."""
        return curve.mean(step)

    def stops(self, own: Curve, others: Sequence[float], step: int) -> bool:
        """Whether its best is worse than what half of the others were worth on average."""
        if len(others) < _STARTUP:
            return False
        middle = len(others) // 2  # they are in order already
        return own.best(step) > statistics.median(others[middle - 1 : middle + 1 + len(others) % 2])


PRUNERS: Mapping[str, type[Pruner]] = {"asha": Asha, "median": Median, "none": Off}


def get_pruner(name: str) -> Pruner:
    """The pruner of that name.

    Raises:
        RequestError: If there is none.
    """
    if name not in PRUNERS:
        near = difflib.get_close_matches(name.lower(), PRUNERS, n=1, cutoff=0)
        raise RequestError(
            f"the pruner must be one of {', '.join(PRUNERS)}, but got {name!r}; did you mean {near[0]!r}?"
        )
    return PRUNERS[name]()


def default_grace(epochs: int) -> int:
    """Epochs that every trial of a study gets, where nobody says how many: a tenth of what its trials have."""
    return max(1, round(epochs / 10))


class Pruning:
    """A pruner over one study's trials. Holds nothing that does not follow from the recorded reports.

    The baseline and trainings that confirm are never asked for, and only the search's trials are compared; each by
    its current attempt.

    Args:
        objective: The name by which Keras reports it.
        direction: ``"min"`` or ``"max"``.
        grace: Epochs that every trial gets.
        most: The most epochs that a trial may have; asked for once, when the first trial that may be pruned begins.
        curve: ``Folds`` where all this is counted in folds.
    """

    def __init__(
        self,
        pruner: Pruner,
        objective: str,
        direction: str,
        grace: int,
        most: Callable[[], int],
        curve: type[Curve] = Curve,
    ) -> None:
        self._pruner, self._objective = pruner, objective
        self._sign = 1.0 if direction == "min" else -1.0
        self._grace, self._most, self._curve = grace, most, curve
        self._curves: dict[int, tuple[int, Curve]] = {}  # trial number to its last attempt and what that reported
        self._reached: dict[int, list[float]] = {}  # what those are worth that reached a rung, once it is asked about

    @functools.cached_property
    def _rungs(self) -> tuple[int, ...]:
        return self._pruner.rungs(self._grace, self._most())

    def rungs(self, trial: Trial) -> tuple[int, ...]:
        """Where this trial asks, as far as it gets there: not at its last epoch or later."""
        return () if trial.number == 0 or trial.confirms is not None else self._rungs

    def recall(self, trials: Iterable[Trial], reports: Iterable[Report]) -> None:
        """Take in what was recorded before."""
        known = {trial.number: trial for trial in trials}
        for report in reports:
            self.heard(known[report.trial], report)

    def heard(self, trial: Trial, report: Report) -> None:
        """Take in a report, at once: what was decided is the same whether it is in the journal already or not yet."""
        if isinstance(self._pruner, Off) or trial.confirms is not None:
            return
        attempt, curve = self._curves.get(trial.number, (-1, self._curve()))
        if report.attempt > attempt:
            self._forget(curve)
            curve = self._curve()
        elif report.attempt < attempt:
            return
        value = report.metrics.get(self._objective)
        if value is None and not len(curve):
            return
        self._curves[trial.number] = report.attempt, curve
        before = len(curve)
        curve.add(report.step, math.nan if value is None else self._sign * value)
        for step, values in self._reached.items():
            if before < step <= len(curve):
                bisect.insort(values, self._pruner.worth(curve, step))

    def stops(self, trial: Trial, step: int) -> bool:
        """Whether the trial, which waits at this rung, shall stop. One that never reported the objective goes on."""
        _, own = self._curves.get(trial.number, (0, self._curve()))
        if step not in self.rungs(trial) or len(own) < step:
            return False
        if step not in self._reached:
            curves = (curve for _, curve in self._curves.values())
            self._reached[step] = sorted(self._pruner.worth(curve, step) for curve in curves if len(curve) >= step)
        values = self._reached[step]
        place = bisect.bisect_left(values, worth := self._pruner.worth(own, step))
        del values[place]  # its own, for as long as it takes
        try:
            return self._pruner.stops(own, values, step)
        finally:
            values.insert(place, worth)

    def _forget(self, curve: Curve) -> None:
        """An attempt that is followed by another is compared with none."""
        for step, values in self._reached.items():
            if step <= len(curve):
                del values[bisect.bisect_left(values, self._pruner.worth(curve, step))]

    def loss(self, trial: Trial, step: int) -> float | None:
        """The value that it was judged by at this rung; None if that is no finite number."""
        found = self._curves[trial.number][1].best(step)
        return found if math.isfinite(found) else None

"""When a search ends: pure functions of its history and the clock.

An end lets no further trial begin; those that run may finish, and confirmations and the test step follow as ever.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from search.trial import Trial, TrialState, searched

_SPENT = "spent"


@dataclass(frozen=True)
class Ends:
    """What ends a search, whichever comes first.

    Attributes:
        trials: Trials in all, the baseline included.
        timeout: Seconds in which at least one trial of the study ran, in all launches and resumes together.
        stale: Trials in a row without a gain, see ``stale``.
        gpu_hours: Of all trials, see ``gpu_hours``.
        target: A validation score, in the objective's own units.
    """

    trials: int
    timeout: float | None = None
    stale: int | None = None
    gpu_hours: float | None = None
    target: float | None = None

    def reached(self, history: Sequence[Trial], direction: str, now: float, since: float) -> str | None:
        """Which end is reached: ``complete`` for all trials, ``target``, ``stale``, ``timeout`` or ``gpu_hours``.

        Args:
            direction: ``"min"`` or ``"max"``.
            now: Seconds since the Unix epoch.
            since: When the driver of the trials that run began. A trial that an earlier one left running counts
                when it runs again.
        """
        found = searched(history)
        if len(found) >= self.trials:
            return "complete"
        if self.target is not None and any(_reaches(trial, self.target, direction) for trial in found):
            return "target"
        if self.stale is not None and stale(found) >= self.stale:
            return "stale"
        if self.timeout is not None and busy(history, now, since) >= self.timeout:
            return "timeout"
        if self.gpu_hours is not None and gpu_hours(history, now, since) >= self.gpu_hours:
            return "gpu_hours"
        return None

    def because(self, ended: str | None, done: int) -> str | None:
        """Why a search ended after so many trials, for people; None for one that has had all its trials."""
        why = {
            "target": f"a validation score reached --target {self.target}",
            "stale": f"no gain above one standard error for {self.stale} trials (--stop-after-stale)",
            "timeout": f"its trials ran for --timeout {self.timeout} s",
            "gpu_hours": f"its trials used --max-gpu-hours {self.gpu_hours}",
            "exhausted": "the space has no further configuration",
        }.get(ended or "")
        return None if why is None else f"stopped after {done} of {self.trials} trials: {why}"


def stale(trials: Iterable[Trial]) -> int:
    """Trials of a search in a row, up to its last one, without a gain.

    A gain is a validation score better by more than one standard error, its own, than the one that last was a gain.
    Where a metric has none, or nobody asked for it when the trial ran, every better score is. Pruned trials gain
    nothing; failed ones say nothing, and do not count, nor does any before the first that completes.
    """
    bar, count = math.inf, 0
    done = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    for trial in sorted(done, key=lambda trial: (trial.ended or 0.0, trial.number)):
        count += bar < math.inf
        if trial.state is TrialState.COMPLETE and trial.loss is not None and trial.loss < bar:
            bar, count = trial.loss - (trial.extra.get("error") or 0.0), 0
    return count


def busy(trials: Iterable[Trial], now: float = 0.0, since: float = math.inf) -> float:
    """Seconds in which at least one trial ran; a pause before a resume does not count.

    Args:
        now, since: As of ``Ends.reached``; without them only trials that have ended count.
    """
    total, until = 0.0, 0.0
    for begin, end, _ in sorted(_spans(trials, now, since)):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def gpu_hours(trials: Iterable[Trial], now: float, since: float) -> float:
    """Hours of all attempts of all trials, each times its share of a GPU, or the number of GPUs that it had."""
    return sum(gpus * (end - begin) / 3600 for begin, end, gpus in _spans(trials, now, since))


def spent(trial: Trial, now: float) -> dict[str, Any]:
    """What is kept in ``extra`` of a trial whose attempt is given up now: when each of its attempts ran, on how many
    GPUs. One that ended with its driver is not known."""
    ran = [] if trial.started is None else [[trial.started, now, trial.extra.get("gpus", 0)]]
    return {_SPENT: [*trial.extra.get(_SPENT, []), *ran]}


def _spans(trials: Iterable[Trial], now: float, since: float) -> list[tuple[float, float, float]]:
    found = []
    for trial in trials:
        found += [(begin, end, gpus) for begin, end, gpus in trial.extra.get(_SPENT, [])]
        gpus = float(trial.extra.get("gpus", 0))
        if trial.started is not None and trial.ended is not None:
            found.append((trial.started, trial.ended, gpus))
        elif trial.started is not None and trial.state is TrialState.RUNNING and trial.started >= since:
            found.append((trial.started, now, gpus))
    return found


def _reaches(trial: Trial, target: float, direction: str) -> bool:
    if trial.state is not TrialState.COMPLETE or trial.score is None:
        return False
    return trial.score >= target if direction == "max" else trial.score <= target

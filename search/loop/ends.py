"""When a search ends: pure functions of its history and the clock.

An end lets no further trial begin; those that run may finish, and confirmations and the test step follow as ever.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from search.record.trials import Trials
from search.trial import Trial, TrialState

_SPENT = "spent"
_Span = tuple[float, float]
_Use = tuple[float, float, float]  # begin, end, and GPUs


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
            history: Those that are queued count nothing.
            direction: ``"min"`` or ``"max"``.
            now: Seconds since the Unix epoch.
            since: When the driver of the trials that run began. A trial that an earlier one left running counts
                when it runs again.
        """
        known = Trials.of(history)
        ended, running = known.follower(_Ended), known.follower(_Running)
        if ended.searched + len(running.searched) >= self.trials:
            return "complete"
        if self.target is not None and ended.reaches(self.target, direction):
            return "target"
        if self.stale is not None and ended.stale() >= self.stale:
            return "stale"
        spans = [] if self.timeout is None and self.gpu_hours is None else running.spans(now, since)
        if self.timeout is not None and ended.busy(spans) >= self.timeout:
            return "timeout"
        if self.gpu_hours is not None and ended.gpu_hours + _gpu_hours(spans) >= self.gpu_hours:
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
    return Trials.of(list(trials)).follower(_Ended).stale()


def busy(trials: Iterable[Trial], now: float = 0.0, since: float = math.inf) -> float:
    """Seconds in which at least one trial ran; a pause before a resume does not count.

    Args:
        now, since: As of ``Ends.reached``; without them only trials that have ended count.
    """
    known = Trials.of(list(trials))
    return known.follower(_Ended).busy(known.follower(_Running).spans(now, since))


def gpu_hours(trials: Iterable[Trial], now: float, since: float) -> float:
    """Hours of all attempts of all trials, each times its share of a GPU, or the number of GPUs that it had."""
    known = Trials.of(list(trials))
    return known.follower(_Ended).gpu_hours + _gpu_hours(known.follower(_Running).spans(now, since))


def spent(trial: Trial, now: float) -> dict[str, Any]:
    """What is kept in ``extra`` of a trial whose attempt is given up now: when each of its attempts ran, on how many
    GPUs. One that ended with its driver is not known."""
    ran = [] if trial.started is None else [[trial.started, now, trial.extra.get("gpus", 0)]]
    return {_SPENT: [*trial.extra.get(_SPENT, []), *ran]}


def _earlier(trial: Trial) -> list[_Use]:
    return [(begin, end, gpus) for begin, end, gpus in trial.extra.get(_SPENT, [])]


def _gpus(trial: Trial) -> float:
    return float(trial.extra.get("gpus", 0))


def _gpu_hours(uses: Iterable[_Use]) -> float:
    return sum(gpus * (end - begin) / 3600 for begin, end, gpus in uses)


def _when(trial: Trial) -> tuple[float, int]:
    return trial.ended or 0.0, trial.number


def _join(spans: list[_Span], begin: float, end: float) -> None:
    """Adds a span of time to some that are in order and do not touch, as the result does not."""
    first = bisect.bisect_left(spans, begin, key=lambda span: span[1])
    last = bisect.bisect_right(spans, end, key=lambda span: span[0])
    if first < last:
        begin, end = min(begin, spans[first][0]), max(end, spans[last - 1][1])
    spans[first:last] = [(begin, end)]


class _Ended:
    """What the ends of a search count of the trials that have ended; see ``Follower``.

    Attributes:
        searched: Trials of the search; gpu_hours: of all trials.
    """

    def __init__(self) -> None:
        self.searched, self.gpu_hours = 0, 0.0
        self._lowest, self._highest = math.inf, -math.inf  # scores
        self._spans: list[_Span] = []  # in which any ran
        self._total = 0.0  # seconds of these
        self._done: list[Trial] = []  # of the search, by when they ended
        self._counted, self._bar, self._stale = 0, math.inf, 0  # how many of them, and what they come to

    def take(self, place: int, trial: Trial) -> None:
        """See ``Follower.take``."""
        if not trial.state.is_finished:
            return
        uses = _earlier(trial)
        if trial.started is not None and trial.ended is not None:
            uses.append((trial.started, trial.ended, _gpus(trial)))
        self.gpu_hours += _gpu_hours(uses)
        for begin, end, _ in uses:
            if begin < end:
                self._total += end - begin - self._covered(begin, end)
                _join(self._spans, begin, end)
        if trial.confirms is not None:
            return
        self.searched += 1
        if trial.state is TrialState.COMPLETE and trial.score is not None:
            self._lowest, self._highest = min(self._lowest, trial.score), max(self._highest, trial.score)
        if trial.state is not TrialState.FAILED:
            at = bisect.bisect_left(self._done, _when(trial), key=_when)
            self._done.insert(at, trial)
            if at < self._counted:  # the clock was put back
                self._counted, self._bar, self._stale = 0, math.inf, 0

    def reaches(self, target: float, direction: str) -> bool:
        """Whether the best score is as good as this."""
        return self._highest >= target if direction == "max" else self._lowest <= target

    def stale(self) -> int:
        """See the function."""
        for trial in self._done[self._counted :]:
            self._stale += self._bar < math.inf
            if trial.state is TrialState.COMPLETE and trial.loss is not None and trial.loss < self._bar:
                self._bar, self._stale = trial.loss - (trial.extra.get("error") or 0.0), 0
        self._counted = len(self._done)
        return self._stale

    def busy(self, running: Iterable[_Use]) -> float:
        """Seconds in which any trial ran, with these that have not ended."""
        total, until = self._total, -math.inf
        for begin, end, _ in sorted(running):
            begin = max(begin, until)
            if begin < end:
                total, until = total + end - begin - self._covered(begin, end), end
        return total

    def _covered(self, begin: float, end: float) -> float:
        first = bisect.bisect_left(self._spans, begin, key=lambda span: span[1])
        last = bisect.bisect_right(self._spans, end, key=lambda span: span[0])
        return sum(min(end, until) - max(begin, since) for since, until in self._spans[first:last])


class _Running:
    """The same of those that have not; see ``Follower``.

    Attributes:
        searched: Places of the search's, those that are queued left out.
    """

    def __init__(self) -> None:
        self.searched: set[int] = set()
        self._now: dict[int, tuple[float, float]] = {}  # by place, when it began, and its GPUs
        self._earlier: dict[int, list[_Use]] = {}  # attempts that were given up, of few

    def take(self, place: int, trial: Trial) -> None:
        """See ``Follower.take``."""
        self.searched.discard(place)
        self._now.pop(place, None)
        self._earlier.pop(place, None)
        if trial.state.is_finished:
            return
        if trial.confirms is None and not trial.is_queued:
            self.searched.add(place)
        if trial.state is TrialState.RUNNING and trial.started is not None:
            self._now[place] = trial.started, _gpus(trial)
        if earlier := _earlier(trial):
            self._earlier[place] = earlier

    def spans(self, now: float, since: float) -> list[_Use]:
        """When they ran, until now."""
        uses = [(began, now, gpus) for began, gpus in self._now.values() if began >= since]
        return [*uses, *(use for earlier in self._earlier.values() for use in earlier)]

"""Trials in order of their number, as they are now, and what is worked out of them step by step.

A study may have a hundred thousand trials, and whoever decides what comes next wants to know something of all of them
each time: how many have ended, which were best, what was tried. A follower keeps such an answer, and is told only what
has changed since it was asked last.
"""

from __future__ import annotations

import array
import bisect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, Self, TypeVar, overload

from search.trial import Trial


class Follower(Protocol):
    """Something that is worked out of trials; made without arguments."""

    def take(self, place: int, trial: Trial) -> None:
        """The trial at this place is there, or has changed. Each end is told once, as nothing changes after it."""


_F = TypeVar("_F", bound=Follower)


class Trials(Sequence[Trial]):
    """A sequence that grows, and whose trials that have not ended are replaced; good until its next change."""

    def __init__(self, trials: Sequence[Trial] = ()) -> None:
        self._trials = list(trials)
        self._changed = array.array("q", range(len(self._trials)))  # places, in order of the changes
        self._followers: dict[Callable[[], Any], tuple[Any, int]] = {}

    @classmethod
    def of(cls, trials: Sequence[Trial]) -> Self:
        """The trials themselves if they are such a sequence, else a new one."""
        return trials if isinstance(trials, cls) else cls(trials)

    def put(self, trial: Trial) -> None:
        """Adds a trial, or replaces the one of its number."""
        place = len(self._trials)
        if self._trials and trial.number <= self._trials[-1].number:
            place = bisect.bisect_left(self._trials, trial.number, key=lambda known: known.number)
            if self._trials[place].number != trial.number:  # in between, as no study that is whole has it
                trials = [*self._trials[:place], trial, *self._trials[place:]]
                return Trials.__init__(self, trials)
            self._trials[place] = trial
        else:
            self._trials.append(trial)
        self._changed.append(place)

    def follower(self, kind: Callable[[], _F]) -> _F:
        """The follower of this kind, which knows all trials as they are now."""
        found, read = self._followers.get(kind) or (kind(), 0)
        for place in dict.fromkeys(self._changed[read:]):
            found.take(place, self._trials[place])
        self._followers[kind] = found, len(self._changed)
        return found

    def __len__(self) -> int:
        return len(self._trials)

    @overload
    def __getitem__(self, place: int) -> Trial: ...
    @overload
    def __getitem__(self, place: slice) -> list[Trial]: ...
    def __getitem__(self, place: int | slice) -> Trial | list[Trial]:
        return self._trials[place]

    def __iter__(self) -> Iterator[Trial]:
        return iter(self._trials)

"""What a prefix of a study's events adds up to, and the judge of which event may come next.

Pure: no clock, no file. The journal asks it before it writes a row and again when it reads rows, so the
two cannot disagree about what is legal or what it means.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from search.definition.space import Space
from search.record.trials import Trials
from search.trial import TRANSITIONS, Trial, TrialState


@dataclass(frozen=True)
class Event:
    """One row of the event stream.

    Attributes:
        id: Its place in the stream, from 1; the history's length once it is included.
        at: Seconds since the Unix epoch.
        kind: "trial" (body: the trial's JSON), "asks" (body: {"asks": [..], "complete": bool, "params":
            {..} or None}; no asks if they teach the space nothing) or "space" (body: the space's JSON).
        trial: Number of the trial that it is about, or None.
    """

    id: int
    at: float
    kind: str
    trial: int | None
    body: Any


class History:
    """The trials and the space after ``length`` events.

    Attributes:
        all: The trials as they are now, and not as they were when this was read.
        search: Those of the search itself, likewise.
    """

    def __init__(self) -> None:
        self.length = 0
        self.all, self.search = Trials(), Trials()
        self._trials: dict[int, Trial] = {}
        self._ran: dict[int, int] = {}  # trial number to the last attempt that ran
        self._asked: dict[int, int] = {}  # and to the last one that said what it asked for
        self._frozen: tuple[Trial, ...] | None = ()
        self._space = Space.empty()
        self._unread: list[Event] = []  # about the space; folded in only when somebody wants it

    def get(self, number: int) -> Trial | None:
        """The trial of this number, if there is one."""
        return self._trials.get(number)

    def ran(self, number: int) -> int:
        """The last attempt of the trial that ran, -1 if none did."""
        return self._ran.get(number, -1)

    def has_asked(self, number: int) -> bool:
        """Whether the trial, in its last attempt, has said what it asked for."""
        return number in self._asked and self._asked[number] == self.ran(number)

    def trials(self) -> tuple[Trial, ...]:
        """All trials in number order, for keeping."""
        if self._frozen is None:
            self._frozen = tuple(self.all)
        return self._frozen

    def space(self) -> Space:
        """The space as known."""
        space = self._space
        for event in self._unread:
            if event.kind == "space":
                space = Space.from_json(event.body)
            else:
                space = space.grown(event.body["asks"], event.body["complete"])
        self._unread.clear()
        self._space = space
        return space

    def apply(self, event: Event) -> None:
        """Adds one event, or raises ValueError and stays as it was."""
        if event.id != self.length + 1:
            raise ValueError(f"event {self.length + 1} must come next, but got event {event.id}")
        if event.kind == "trial":
            self._move(Trial.from_json(event.body))
        elif event.kind == "asks":
            self._ask(event)
        elif event.kind == "space":
            self._unread.append(event)
        else:
            raise ValueError(f"an event is about a trial, asks or a space, but got {event.kind!r}")
        self.length = event.id

    def _ask(self, event: Event) -> None:
        if event.trial is not None:
            trial = self._trials.get(event.trial)
            if trial is None or trial.state is not TrialState.RUNNING:
                raise ValueError(
                    f"only a running trial can ask for parameters, but trial {event.trial} is "
                    f"{'unknown' if trial is None else trial.state}"
                )
            self._keep(dataclasses.replace(trial, params=event.body["params"]))
            self._asked[trial.number] = trial.attempt
        if event.body["asks"]:
            self._unread.append(event)

    def _move(self, trial: Trial) -> None:
        number, before = trial.number, self._trials.get(trial.number)
        if before is None:
            if number < 0 or trial.state.is_finished:
                raise ValueError(f"a trial starts WAITING or RUNNING, but trial {number} would be {trial.state}")
            if not 0 <= trial.history_length <= self.length:
                seen = trial.history_length
                raise ValueError(f"trial {number} can have seen {self.length} events, but claims {seen}")
        else:
            if trial.state not in TRANSITIONS[before.state]:
                raise ValueError(f"trial {number} cannot go from {before.state} to {trial.state}")
            for name in ("seed", "history_length", "memo", "confirms"):
                # By repr: a NaN in a memo is unequal to itself.
                if repr(getattr(trial, name)) != repr(getattr(before, name)):
                    raise ValueError(f"{name} of trial {number} was recorded and cannot change")
        ran = self.ran(number)
        if trial.state is TrialState.RUNNING and trial.attempt <= ran:
            raise ValueError(f"attempt {trial.attempt} of trial {number} has run; the next one is {ran + 1}")
        if before is not None and before.state is TrialState.RUNNING and trial.state.is_finished:
            if trial.attempt != ran:
                raise ValueError(f"trial {number} is in attempt {ran}, but attempt {trial.attempt} would end")
        if trial.state is TrialState.RUNNING:
            self._ran[number] = trial.attempt
        self._keep(trial)

    def _keep(self, trial: Trial) -> None:
        self._trials[trial.number] = trial
        self.all.put(trial)
        if trial.confirms is None:
            self.search.put(trial)
        self._frozen = None

"""Which trial of a study begins next: one that runs again, a new proposal, or, after the search, one that confirms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from search.definition.space import Space
from search.loop.ends import Ends
from search.loop.enqueueing import begun, unbegun
from search.loop.watcher import Watcher
from search.record.journal import Journal
from search.samplers import Sampler, proposal_seed, propose
from search.trial import Trial, searched, seed_for


class Agenda:
    """What is still to run. What has been handed out is in the journal, by the time that more is asked for.

    Args:
        ends: What ends the search.
        confirm: The trainings that shall follow the search, worked out from its ended trials alone; those that
            a study has already are not repeated.
        clock: Seconds since the Unix epoch.

    Attributes:
        confirming: Whether the search is over.
        ended: The end of the search that was reached, see ``Ends.reached``; None before, or if there was none.
    """

    def __init__(
        self,
        journal: Journal,
        sampler: Sampler,
        *,
        seed: int,
        ends: Ends,
        direction: str,
        confirm: Callable[[Sequence[Trial]], Sequence[Trial]],
        watcher: Watcher,
        clock: Callable[[], float],
    ) -> None:
        self._journal, self._sampler, self._seed = journal, sampler, seed
        self._ends, self._direction, self._confirm = ends, direction, confirm
        self._watcher, self._clock, self._since = watcher, clock, clock()
        self._requeued: list[Trial] = []
        self._queued: list[Trial] = []  # configurations to try first, which have not run yet
        self._planned: list[Trial] = []
        self._starved: int | None = None  # length of the journal when nothing new could be proposed
        self._exhausted = False
        self.confirming = False
        self.ended: str | None = None

    def recall(self) -> None:
        """A trial that was running when its driver ended runs again, with its parameters, seed and number."""
        # As they were proposed: the history has what they had asked for by then, which may be less.
        proposed = {event.trial: event.body["params"] for event in self._journal.events() if event.kind == "trial"}
        history = self._journal.history()
        queued = {trial.number for trial in unbegun(history)}
        for trial in history:
            if not trial.state.is_finished:
                line = self._queued if trial.number in queued else self._requeued
                line.append(dataclasses.replace(trial, params=proposed[trial.number]))

    def enqueued(self, trials: Sequence[Trial]) -> None:
        """These are to be tried before anything is proposed."""
        self._queued.extend(trials)

    def requeue(self, trial: Trial) -> None:
        """This trial runs again."""
        self._requeued.append(trial)

    @property
    def again(self) -> Trial | None:
        """The next one, if it runs again or is known otherwise."""
        return next(iter(self._requeued or ([] if self.confirming else self._queued)), None)

    @property
    def number(self) -> int:
        """The next one's number."""
        # Not the number of trials: a journal that was repaired may lack one in the middle.
        trials, again = self._journal.now.all, self.again
        return again.number if again is not None else trials[-1].number + 1 if trials else 0

    def has_more(self) -> bool:
        """Whether anything is still to run, as far as is known now."""
        if self._requeued or self._planned:
            return True
        searching = not self.confirming and (bool(self._queued) or not self._exhausted)
        return searching and self.end() is None

    def end(self) -> str | None:
        """The end of the search that is reached now, see ``Ends.reached``."""
        return self._ends.reached(self._journal.now.all, self._direction, self._clock(), self._since)

    def waits(self) -> bool:
        """Whether a running trial has to bring news before there is a next one."""
        return self.again is None and self._starved == self._journal.length

    def plan_confirmations(self) -> None:
        """The search is over, and confirming begins."""
        history = begun(self._journal.history())
        self.ended = self.end()
        if (why := self._ends.because(self.ended, len(searched(history)))) is not None:
            self._watcher.say(f"the search has {why}")
        known = {(trial.confirms, trial.seed) for trial in history}
        self._planned = [trial for trial in self._confirm(history) if (trial.confirms, trial.seed) not in known]
        self.confirming = True
        self._watcher.planned(len(history) + len(self._planned))

    def next(self, number: int, space: Space | None, idle: bool) -> Trial | None:
        """The next trial; None if there is none, or none yet.

        Args:
            number: As ``number`` says.
            space: What is known of it; only the baseline needs none.
            idle: Whether nothing runs, so that nothing new can become known.
        """
        if self._requeued:
            again = self._requeued.pop(0)
            return dataclasses.replace(again, attempt=again.attempt + 1, reason=None, message=None, epochs=0)
        if self._planned:
            return dataclasses.replace(self._planned.pop(0), number=number)
        if self._queued and not self.confirming:
            return self._queued.pop(0)
        trial = self._proposed(number, space)
        if trial is None and not idle:  # what runs may yet ask for more, in its fit for instance
            self._starved = self._journal.length
        elif trial is None:
            self._exhausted = True
            self._watcher.say(f"the space has no further configuration: it is exhausted after {number} trials")
        return trial

    def _proposed(self, number: int, space: Space | None) -> Trial | None:
        # Of the search alone: a study that is extended after its confirmations goes on as a longer one would have.
        search = self._journal.now.search
        place = len(search)
        seed = seed_for(self._seed, place)
        if number == 0:
            return Trial(0, seed=seed)
        assert space is not None
        length = self._journal.length
        proposal = propose(self._sampler, search, space, proposal_seed(self._seed, place))
        if proposal is None:
            return None
        return Trial(number, params=proposal.params, memo=proposal.memo, seed=seed, history_length=length)

"""Writing a search into its journal: reports in batches, a round in one commit, patience while the disk is full."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import TypeVar

from search.errors import DiskFull
from search.loop.surroundings import Surroundings
from search.loop.watcher import Watcher
from search.record.journal import Journal
from search.trial import Report

_EVERY = 0.5  # seconds between commits of epoch reports

_T = TypeVar("_T")


class Recording:
    """The driver's way to its journal. While the disk is full it waits, instead of losing what is known.

    Args:
        surroundings: Says whether the disk has room.
        watcher: Is told when the search pauses and when it goes on.
        wait: Lets a moment pass; raises if the search shall not wait any longer.
        clock: Seconds since the Unix epoch.
    """

    def __init__(
        self,
        journal: Journal,
        surroundings: Surroundings,
        watcher: Watcher,
        wait: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self._journal, self._surroundings, self._watcher = journal, surroundings, watcher
        self._wait, self._clock = wait, clock
        self._paused = False
        self._full_at = -math.inf  # when the disk was last seen to be full
        self._reports: list[Report] = []
        self._flushed = 0.0
        self._in_round = False
        self._told: list[Callable[[], object]] = []

    @contextlib.contextmanager
    def round(self) -> Iterator[None]:
        """Joins what is written inside into one commit, made at the end, also where an error ends it.

        By then the history has it in memory alone: what nobody may know or do before it is recorded has to be left
        to ``then``.
        """
        self._in_round = True
        try:
            with self._journal.gathering():
                yield
        except BaseException:
            self._in_round = False
            with contextlib.suppress(DiskFull):  # once, as there may be nobody who wants to wait
                self._settle()
            self._told = []
            raise
        self._in_round = False
        self.durably(self._settle)

    def then(self, tell: Callable[[], object]) -> None:
        """Do this once all that was written so far is recorded: at once, or at the end of the round."""
        self._told.append(tell)
        if not self._in_round:
            self._tell()

    def _settle(self) -> None:
        if self._journal.has_gathered:
            self._journal.commit(self._reports)
            self._reported()
        self._tell()

    def _tell(self) -> None:
        told, self._told = self._told, []
        for tell in told:
            tell()

    def _reported(self) -> None:
        self._reports = []  # not before: a commit that fails takes the reports back as well
        self._flushed = self._clock()

    def has_room(self) -> bool:
        """Whether the disk has room; says so when that changes."""
        why = self._surroundings.lacks_room()
        if why is not None:
            self._full_at = self._clock()
            self._pause(why)
        elif self._paused:
            self._paused = False
            self._watcher.say("the disk takes what is written again: going on")
        return why is None

    def was_full_since(self, at: float) -> bool:
        """Whether the disk was full at any time from ``at`` on, and may be to blame for what failed since."""
        return not self.has_room() or self._full_at >= at

    def durably(self, write: Callable[[], _T]) -> _T:
        """Write to the journal, trying again until the disk takes it.

        Args:
            write: Writes all or nothing each time, as ``Journal`` does.
        """
        while True:
            try:
                return write()
            except DiskFull as error:
                self._full_at = self._clock()
                self._pause(str(error))
                self._wait()

    def report(self, report: Report) -> None:
        """Keep a report for the next commit."""
        self._reports.append(report)

    def flush(self, force: bool = False) -> None:
        """Commit the reports, if it is time."""
        if self._reports and (force or self._clock() - self._flushed >= _EVERY):
            self.write(lambda: None)

    def write(self, write: Callable[[], _T]) -> _T:
        """What has been reported, and something more, in one commit; in a round, in the round's."""

        def all_or_nothing() -> _T:
            with self._journal.one_commit():
                if not self._in_round:
                    self._journal.report(self._reports)
                return write()

        done = self.durably(all_or_nothing)
        if not self._in_round:
            self._reported()
        return done

    def _pause(self, why: str) -> None:
        if not self._paused:
            self._paused = True
            self._watcher.say(f"paused: {why}; it goes on by itself once that is mended")

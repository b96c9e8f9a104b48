"""Who is told what happens in a study: a live view, or nobody."""

from __future__ import annotations

from typing import Protocol

from search.trial import Report, Trial


class Watcher(Protocol):
    """Is told what happens, for a live view; must return at once and never raise."""

    def started(self, trial: Trial) -> None:
        """A trial's process is on its way, and its beginning is recorded."""

    def epoch(self, report: Report) -> None:
        """A trial has finished an epoch."""

    def ended(self, trial: Trial) -> None:
        """A trial has ended for good, and that is recorded."""

    def planned(self, trainings: int) -> None:
        """How many trainings there will be in all, those that confirm included, is known now."""

    def say(self, text: str) -> None:
        """One line for people."""

    def tick(self) -> None:
        """Time passed; called several times a second."""


class Silent:
    """A watcher that shows nothing."""

    def started(self, trial: Trial) -> None: ...
    def epoch(self, report: Report) -> None: ...
    def ended(self, trial: Trial) -> None: ...
    def planned(self, trainings: int) -> None: ...
    def say(self, text: str) -> None: ...
    def tick(self) -> None: ...

"""Who is told what happens in a study: a live view, or nobody."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from search.trial import Report, Trial


class Watcher(Protocol):
    """Is told what happens, for a live view; must return at once and never raise."""

    def started(self, trial: Trial) -> None: ...
    def epoch(self, report: Report) -> None: ...
    def ended(self, trial: Trial) -> None: ...
    def say(self, text: str) -> None: ...
    def tick(self) -> None: ...


class Silent:
    """A watcher that shows nothing."""

    def started(self, trial: Trial) -> None: ...
    def epoch(self, report: Report) -> None: ...
    def ended(self, trial: Trial) -> None: ...
    def say(self, text: str) -> None: ...
    def tick(self) -> None: ...


class Tending:
    """A watcher that also looks after something at every tick."""

    def __init__(self, watcher: Watcher, tend: Callable[[], None]) -> None:
        self.started, self.epoch, self.ended, self.say = watcher.started, watcher.epoch, watcher.ended, watcher.say
        self._tick, self._tend = watcher.tick, tend

    def tick(self) -> None:
        """Some time has passed."""
        self._tend()
        self._tick()

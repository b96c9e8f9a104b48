"""What a search depends on beside its trials: requests to stop, room on the disk, housekeeping."""

from __future__ import annotations

from typing import Protocol

from search.trial import Trial

FINISH, NOW = "finish", "now"


class Surroundings(Protocol):
    """Asked by the driver in every round, so every answer must be cheap."""

    def stop(self) -> str | None:
        """``FINISH`` to let running trials end and begin no other, ``NOW`` to stop at once, or None."""

    def lacks_room(self) -> str | None:
        """Why nothing more can be written, in one line; None while there is room on the disk."""

    def ended(self, trial: Trial) -> None:
        """A trial has ended and is recorded; must not raise."""

    def tick(self) -> None:
        """Time passed; must not raise."""


class Calm:
    """Nobody asks to stop, there is room, and nothing needs to be kept in order."""

    def stop(self) -> str | None:
        """Nobody asks."""
        return None

    def lacks_room(self) -> str | None:
        """There is room."""
        return None

    def ended(self, trial: Trial) -> None: ...
    def tick(self) -> None: ...

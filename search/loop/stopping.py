"""Asking a study to stop: signals to its driver, and a file that another terminal leaves in its folder."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Self

from search.errors import StudyError
from search.loop.surroundings import FINISH, NOW
from search.record.lock import driver_of
from search.study import Study

_FILE = "stop"


def stop(study: str, *, now: bool = False, workspace: str | None = None) -> dict[str, Any]:
    """Ask the driver of a study to stop, from any process.

    Args:
        now: At once, so that running trials run again on resume; otherwise they may end first.

    Returns:
        ``study``, ``now``, and the ``driver`` that was asked.

    Raises:
        StudyError: If there is no such study or nobody drives it.
    """
    found = Study(study, workspace)
    driver = driver_of(found.folder)
    if driver is None:
        state = found.state.lower()
        raise StudyError(f"a study must be driven to be stopped, but nobody drives {found.name!r}: it is {state}")
    draft = found.folder / f"{_FILE}.{os.getpid()}.new"
    draft.write_text(NOW if now else FINISH)
    os.replace(draft, found.folder / _FILE)
    pid, host = driver.process, driver.host
    if now and host == os.uname().nodename and pid is not None:
        # It holds the lock, so the number is still its own. It need not be in its loop to be stopped this way.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGTERM)
    return {"study": found.name, "now": now, "driver": str(driver)}


class Stopping:
    """What a driver has been asked. A context manager that takes over SIGINT and SIGTERM in the main thread.

    Within ``gracefully`` the first Ctrl-C only asks to finish what runs; a second one, a Ctrl-C at any other time,
    and SIGTERM raise KeyboardInterrupt. Once that is raised further ones are ignored, so that the end is orderly.

    Args:
        folder: The study's.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / _FILE
        self._asked: str | None = None
        self._graceful = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._file.unlink(missing_ok=True)  # was meant for an earlier driver
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._signalled)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def gracefully(self) -> Iterator[None]:
        """While inside, the first Ctrl-C asks to finish."""
        self._graceful = True
        try:
            yield
        finally:
            self._graceful = False

    def asked(self) -> str | None:
        """``FINISH``, ``NOW`` or None."""
        if self._asked != NOW:
            with contextlib.suppress(OSError):  # mostly because there is none
                self._asked = NOW if self._file.read_text() == NOW else FINISH
        return self._asked

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if self._asked == NOW:
            return
        if number == signal.SIGINT and self._graceful and self._asked is None:
            self._asked = FINISH
            return
        self._asked = NOW
        raise KeyboardInterrupt

"""The lock of a study: one driver at a time, known by its process and machine, and waited for to its last process."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from search.errors import StudyError

LOCKS = ("lock", "processes.lock")  # files of a study's folder


@dataclass(frozen=True)
class DriverName:
    """Who drives a study: the process and its machine, as far as they are known."""

    process: int | None
    host: str | None

    def __str__(self) -> str:
        return "another process" if self.process is None else f"process {self.process} on {self.host}"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold the study for one driver; the lock dies with its process.

    Yields a descriptor for the processes that run trials to inherit: what is left of a killed driver holds it until it
    is gone, and the next driver waits for that, so that no device is given to two trials. Only the kernel's lock on
    the file says that there is a driver, never the name in it: a machine that is lost takes its locks along.

    Raises:
        StudyError: If another process drives the study.
    """
    import fcntl

    with (folder / "lock").open("a+") as file, (folder / "processes.lock").open("a") as processes:
        # More than once, because ``driver_of`` holds it for a moment to see whether anybody does.
        if not _acquired(file, tries=10, pause=0.02):
            raise StudyError(
                f"study {folder.name!r} is being driven already, by {_named(file)}; "
                f"`heldout stop {folder.name}` ends that")
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        if not _acquired(processes, tries=200, pause=0.05):
            raise StudyError(
                f"the processes of an earlier driver of study {folder.name!r} must have ended, but some still run; "
                "end them and try again"
            )
        try:
            yield processes.fileno()
        finally:
            fcntl.flock(processes, fcntl.LOCK_UN)


def _acquired(file: IO[str], tries: int, pause: float) -> bool:
    import fcntl

    for left in reversed(range(tries)):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            if left:
                time.sleep(pause)
    return False


def _named(file: IO[str]) -> DriverName:
    file.seek(0)
    found = re.fullmatch(r"process (\d+) on (.+)", file.read().strip())
    return DriverName(int(found[1]), found[2]) if found else DriverName(None, None)


def driver_of(folder: Path) -> DriverName | None:
    """The living process that drives the study, or None; leaves the lock file's text alone."""
    import fcntl

    try:
        with (folder / "lock").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return _named(file)
    except FileNotFoundError:
        pass
    return None

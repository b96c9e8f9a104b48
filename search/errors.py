"""The exception tree: what each error stops, and which exit code it becomes.

    HeldoutError
    ├── RequestError          the request cannot be carried out; nothing was started (exit 2)
    │   ├── SpaceError        the space module breaks its contract
    │   ├── DataError         the rows cannot be used as they are
    │   ├── StudyError        the study's name: taken, unknown, or not a name
    │   ├── DamagedError      the study's journal is torn, changed or gone; `heldout repair` brings back what there is
    │   └── TrackingError     the tracking server cannot be used
    ├── StudyFailed           the study started and could not go on (exit 1)
    │   ├── ExecutorError     the processes that run trials could not be had or were lost
    │   ├── DiskFull          the disk, full or read-only, takes no record; the driver waits and tries again
    │   └── StudyStopped      somebody asked it to stop at once; `heldout resume` goes on
    └── TrialFailed           this trial is over, the study goes on

A message says what must hold, what was got, and what to do, in one line.
"""

from __future__ import annotations


class HeldoutError(Exception):
    """Base of every error that Heldout raises on purpose."""


class RequestError(HeldoutError):
    """What was asked for cannot be done; nothing has been started or written."""


class SpaceError(RequestError):
    """The space module breaks its contract (see README, "The space module")."""


class DataError(RequestError):
    """The rows that ``load()`` returned cannot be split, sealed or stored."""


class StudyError(RequestError):
    """A study's name is taken, unknown, or not usable as a name."""


class DamagedError(RequestError):
    """A study's journal does not hold what was recorded; `heldout repair STUDY` brings back what its files have."""


class TrackingError(RequestError):
    """The tracking server cannot be reached or refuses us."""


class StudyFailed(HeldoutError):
    """The study started but could not be completed; what was recorded stays."""


class ExecutorError(StudyFailed):
    """Trial processes cannot be started, or the process they are forked from is gone."""


class DiskFull(StudyFailed):
    """The disk takes nothing at present, full or read-only as it is; nothing of the record was written."""


class StudyStopped(StudyFailed):
    """The study was asked to stop at once; what was recorded stays, and it can be resumed."""


class TrialFailed(HeldoutError):
    """One trial is over without a score; the study goes on.

    Args:
        reason: One of ``trial.FAIL_REASONS``.
        message: One line for people; a traceback, if any, is in the trial's log.
        chance: Whether another attempt may end otherwise. An exception that the module raised comes again; a
            process that died need not.
        on_host: Of an ``oom``: whether the machine's memory ran out, not a GPU's.
    """

    def __init__(self, reason: str, message: str, *, chance: bool = False, on_host: bool = False) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.chance = chance
        self.on_host = on_host


def request_error(name: str | None, message: str) -> RequestError:
    """The error that a job's ``failed`` message names; a SpaceError if it names none of ours."""
    kind = globals().get(name or "")
    if isinstance(kind, type) and issubclass(kind, RequestError):
        return kind(message)
    return SpaceError(message)

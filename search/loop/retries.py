"""Which failed attempts of a trial are followed by another: one table, by kind of failure."""

from __future__ import annotations

from search.errors import TrialFailed
from search.trial import FAIL_REASONS, Trial

# How many further attempts a failure of each kind is worth.
RETRIES = {
    "nan": 0,  # the same seed gives the same NaN
    "oom": 1,  # with nothing beside it; a model that does not fit then fits never
    "crash": 2,  # only where a process died: an exception of the module comes again (``TrialFailed.chance``)
    "timeout": 0,  # it would take as long again
    "lost": 2,  # the processes around it ended; those of a machine that was taken away are not counted
    "invalid": 0,  # the parameters are refused, whoever asks
}
assert set(RETRIES) == set(FAIL_REASONS)


def may_retry(trial: Trial, failure: TrialFailed) -> bool:
    """Whether the trial gets another attempt after this failure."""
    return failure.chance and trial.retries.get(failure.reason, 0) < RETRIES[failure.reason]


def counted(trial: Trial, reason: str) -> dict[str, int]:
    """The trial's count of retries, with one more for this reason."""
    return {**trial.retries, reason: trial.retries.get(reason, 0) + 1}

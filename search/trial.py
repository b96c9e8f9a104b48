"""Trial, its states, and the one table of legal transitions between them."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Value = bool | int | float | str
Params = Mapping[str, Value]

FAIL_REASONS = ("nan", "oom", "timeout", "crash", "invalid", "lost")


class TrialState(enum.StrEnum):
    """Where a trial is in its life."""

    WAITING = "WAITING"
    RUNNING = "RUNNING"
    COMPLETE = "COMPLETE"
    PRUNED = "PRUNED"
    FAILED = "FAILED"

    @property
    def is_finished(self) -> bool:
        """Whether no further event can reach a trial in this state."""
        return not TRANSITIONS[self]


TRANSITIONS: dict[TrialState, frozenset[TrialState]] = {
    TrialState.WAITING: frozenset({TrialState.RUNNING, TrialState.FAILED}),
    TrialState.RUNNING: frozenset({TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAILED, TrialState.WAITING}),
    TrialState.COMPLETE: frozenset(),
    TrialState.PRUNED: frozenset(),
    TrialState.FAILED: frozenset(),
}


@dataclass(frozen=True)
class Report:
    """What a trial said after one epoch.

    Attributes:
        trial: Number of the trial.
        attempt: 0 for the first run of the trial, 1 for its first retry, ….
        step: Epochs finished so far, from 1.
        at: Seconds since the Unix epoch.
        metrics: Keras' own logs of the epoch, by name.
    """

    trial: int
    attempt: int
    step: int
    at: float
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Trial:
    """One evaluated configuration. Immutable: an event makes a new one by ``moved``.

    Attributes:
        number: 0 is the baseline, the space's defaults.
        params: Parameter key to native Python value. Before the trial has built its model these
            are what was proposed; afterwards exactly what it asked for.
        history_length: Journal events that the proposal saw; it can be made again from them.
        retries: How many attempts ended for each reason and were followed by another.
        memo: JSON that the sampler wants back in the history.
        confirms: Number of the search trial whose configuration it trains again with a fresh seed;
            None for a trial of the search itself.
        text: Digest of the module text that it runs; None in records of older versions, for the one that the study
            was launched with.
        score: The scorer's value on validation rows, in the objective's own units. Of a pruned trial the value it was
            judged by, Keras' own: the best up to the epoch that it reached; None if that is no finite number.
        loss: ``score`` turned so that lower is better; None unless the trial is complete or pruned.
        epochs: Epochs finished; best_epoch: the one whose weights were kept (from 1).
        size: Number of weights in the model.
        extra: JSON for people and export (devices seen, what Keras reported, the model's declaration, its ``flops``);
            ``gpus``, how many it had, and ``error``, the standard error of ``score``, for the ends of a study that
            count with them.
    """

    number: int
    state: TrialState = TrialState.WAITING
    params: Params = field(default_factory=dict)
    seed: int = 0
    attempt: int = 0
    retries: Mapping[str, int] = field(default_factory=dict)
    history_length: int = 0
    memo: Any = None
    confirms: int | None = None
    text: str | None = None
    score: float | None = None
    loss: float | None = None
    reason: str | None = None
    message: str | None = None
    started: float | None = None
    ended: float | None = None
    epochs: int = 0
    best_epoch: int | None = None
    size: int | None = None
    slot: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.state is TrialState.COMPLETE and (self.loss is None or not math.isfinite(self.loss)):
            raise ValueError(f"a complete trial must have a finite loss, but trial {self.number} has {self.loss}")
        if self.state is TrialState.FAILED and self.reason not in FAIL_REASONS:
            raise ValueError(f"a failed trial needs a reason out of {FAIL_REASONS}, but got {self.reason!r}")

    @property
    def configuration(self) -> int:
        """Number of the search trial that has this configuration, which confirmations share."""
        return self.number if self.confirms is None else self.confirms

    @property
    def is_queued(self) -> bool:
        """Whether it waits and has never run: what is queued is no trial yet."""
        return self.state is TrialState.WAITING and self.started is None

    @property
    def seconds(self) -> float | None:
        """Wall-clock seconds from start to end, or None while either is missing."""
        return None if self.started is None or self.ended is None else self.ended - self.started

    def moved(self, state: TrialState, **changes: Any) -> Trial:
        """The same trial in another state.

        Raises:
            ValueError: If the table of transitions does not allow it.
        """
        if state not in TRANSITIONS[self.state]:
            raise ValueError(f"trial {self.number} cannot go from {self.state} to {state}")
        return dataclasses.replace(self, state=state, **changes)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that ``from_json`` turns back into an equal trial."""
        out = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        plain = {"params": dict(self.params), "extra": dict(self.extra), "retries": dict(self.retries)}
        return out | plain | {"state": self.state.value}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Trial:
        """The trial that ``to_json`` wrote."""
        return cls(**{**raw, "state": TrialState(raw["state"])})


def searched(trials: Iterable[Trial]) -> list[Trial]:
    """The trials of the search itself, without those that only confirm."""
    return [trial for trial in trials if trial.confirms is None]


def ranked(trials: Iterable[Trial]) -> list[Trial]:
    """The search's complete trials, lowest loss first; ties go to fewer weights, then to the lower number."""
    done = [trial for trial in searched(trials) if trial.state is TrialState.COMPLETE]
    return sorted(done, key=lambda t: (t.loss, t.size if t.size is not None else math.inf, t.number))


def best(trials: Iterable[Trial]) -> Trial | None:
    """The first of ``ranked``: the best validation score of the search."""
    return next(iter(ranked(trials)), None)


def seed_for(study_seed: int, number: int, purpose: str = "trial") -> int:
    """A seed below 2**31 that depends on nothing but the study's seed, the number and the purpose."""
    digest = hashlib.sha256(f"{study_seed}/{purpose}/{number}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1

"""One attempt of a trial while it runs: what its process has said, and what it comes to in the end."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Protocol

from search.definition.space import Space
from search.errors import TrialFailed
from search.executors import Event, Exited, Lost, Message, Slot
from search.loop.ends import spent
from search.loop.retries import counted
from search.processes.slots import Alone
from search.trial import Report, Trial, TrialState

_ENDLESS = 2**31  # no number of epochs
_EXTRA = ("weights", "reported", "devices", "declaration")  # of a result, kept as it is
_OF_A_RESULT = {"asks", "epochs", "best_epoch", "size", *_EXTRA}
_MOST_SCORINGS = 3  # of one trial, whose score job's process may die as any other


@dataclass(frozen=True)
class Verdict:
    """What the judge says of one finished trial's predictions.

    Attributes:
        score: On validation rows, in the objective's units; goes to the sampler.
        guard: On guard rows; goes to the journal's sealed table and nowhere else.
        evidence: JSON that is kept with the guard score: what the final choice needs of both tiers.
        error: Standard error of ``score``, where the judge was asked for it and there is one.
    """

    score: float
    guard: float | None
    evidence: Any = None
    error: float | None = None


class Judge(Protocol):
    """Scores the predictions that a trial left behind."""

    def judge(self, result: dict[str, Any]) -> Verdict | dict[str, Any]:
        """A verdict, or the payload of a ``score`` job whose result ``settle`` turns into one."""

    def settle(self, result: dict[str, Any]) -> Verdict:
        """The verdict of a ``score`` job's result."""


@dataclass
class Attempt:
    """One attempt in its slot.

    Attributes:
        trial: As the journal has it: RUNNING, with the parameters that were proposed.
        asks: What it has asked for so far; result, failure: how it says that it ended.
        scoring: Payload of its score job, if only Keras can compute the metric; settled: that job's verdict.
        deaths: Times that the score job ended without an answer.
        stopped: Whether it was told to stop early. However its process ends then, the trial is pruned.
        value: What it was judged by then, lower is better; None if that was no finite number.
    """

    trial: Trial
    slot: Slot
    asks: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, Any] | None = None
    failure: TrialFailed | None = None
    settled: Verdict | None = None
    scoring: dict[str, Any] = field(default_factory=dict)
    deaths: int = 0
    stopped: bool = False
    value: float | None = None

    @property
    def job(self) -> str:
        """Id of its job."""
        return job_id(self.trial)

    def reported(self, body: dict[str, Any], at: float) -> Report:
        """Take in the report of an epoch.

        Raises:
            KeyError, TypeError, ValueError: If it is none.
        """
        step, metrics = body["step"], body["metrics"]
        if type(step) is not int or not 0 < step < _ENDLESS:
            raise ValueError(f"step {step!r}")
        if type(metrics) is not dict or not all(type(value) in (int, float) for value in metrics.values()):
            raise ValueError(f"metrics {metrics!r}")
        report = Report(self.trial.number, self.trial.attempt, step, at, metrics)
        self.trial = dataclasses.replace(self.trial, epochs=report.step)
        return report

    def resulted(self, body: dict[str, Any], space: Space) -> None:
        """Take in its result; of one that was told to stop, only what it asked for.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: If it is none.
        """
        if missing := ({"asks"} if self.stopped else _OF_A_RESULT) - body.keys():
            raise ValueError(f"a result without {', '.join(sorted(missing))}")
        if not self.stopped and type(body["epochs"]) is not int:
            raise ValueError(f"epochs {body['epochs']!r}")
        for name in ("size", "flops"):
            if body.get(name) is not None and type(body[name]) is not int:
                raise ValueError(f"{name} {body[name]!r}")
        space.grown(body["asks"], complete=False).params_of(body["asks"])
        # Its seed says which rows validated it, where every trial has its own; that is not for the trial to say.
        self.result, self.asks = {**body, "seed": self.trial.seed}, body["asks"]

    def failed(self, body: dict[str, Any]) -> None:
        """Take in a failure that its process, or the executor in its place, tells of."""
        if self.failure is None:
            reason = body["reason"]
            chance = bool(body.get("died")) or reason == "oom"
            self.failure = TrialFailed(
                reason, body["message"], chance=chance, on_host=bool(body.get("on_host"))
            )

    def exited(self, event: Exited) -> None:
        """Take in the end of its process, which is a failure if it has not said a result."""
        if self.failure is not None or self.result is not None:
            return
        how = ended(event)
        if event.oom:
            message = f"the trial's process {how}: the machine ran out of memory"
            self.failure = TrialFailed("oom", message, chance=True, on_host=True)
        else:
            self.failure = TrialFailed("crash", f"the trial's process {how}", chance=True)

    def scored(self, event: Event, judge: Judge) -> None:
        """Take in an event of its score job: a verdict, a failure, or a death, of which the third is a failure."""
        if isinstance(event, Message) and event.body["type"] == "result":
            try:
                self.settled = judge.settle(event.body)
            except TrialFailed as failure:
                self.failure = failure
        elif isinstance(event, Message) and not event.body.get("died"):
            self.failure = TrialFailed("invalid", f"the metric could not be computed: {event.body['message']}")
        elif isinstance(event, Exited | Lost) and self.settled is None and self.failure is None:
            self.deaths += 1
            if self.deaths == _MOST_SCORINGS:
                how = "was lost" if isinstance(event, Lost) else ended(event)
                reason = "lost" if isinstance(event, Lost) else "crash"
                self.failure = TrialFailed(reason, f"the process that computes the metric {how}, three times")

    def waiting(self, failure: TrialFailed, is_counted: bool, now: float) -> Trial:
        """The trial as it waits for its next attempt, with the parameters that were proposed."""
        retries = counted(self.trial, failure.reason) if is_counted else self.trial.retries
        return self.trial.moved(
            TrialState.WAITING,
            retries=retries,
            reason=failure.reason,
            message=failure.message,
            extra={**self.trial.extra, **spent(self.trial, now)},
        )

    def finished(self, verdict: Verdict | None, params: dict[str, Any], direction: str, now: float) -> Trial:
        """The trial as it ended."""
        result = self.result or {}
        counted = {} if result.get("flops") is None else {"flops": result["flops"]}
        if self.stopped:
            score = self.value if direction == "min" or self.value is None else -self.value
            known = {"size": result.get("size"), "extra": {**self.trial.extra, **counted}}
            return self.trial.moved(TrialState.PRUNED, params=params, ended=now, score=score, loss=self.value, **known)
        if verdict is None:
            failure = self.failure or TrialFailed("crash", "the trial ended without a verdict")
            return self.trial.moved(
                TrialState.FAILED, params=params, ended=now, reason=failure.reason, message=failure.message
            )
        return self.trial.moved(
            TrialState.COMPLETE,
            params=params,
            ended=now,
            score=verdict.score,
            loss=verdict.score if direction == "min" else -verdict.score,
            epochs=result["epochs"],
            best_epoch=result["best_epoch"],
            size=result["size"],
            extra={
                **self.trial.extra,
                **{key: result[key] for key in _EXTRA},
                **counted,
                **({} if verdict.error is None else {"error": verdict.error}),
            },
        )


def job_id(trial: Trial) -> str:
    """Id of the job that an attempt of a trial is."""
    return f"trial-{trial.number}-{trial.attempt}"


def ended(event: Exited) -> str:
    """How a process ended, in words."""
    return f"was ended by signal {event.signal}" if event.signal else f"exited with {event.code} and no result"


def alone(trial: Trial, on_host: bool | None) -> Alone | None:
    """What a trial must not share in its next attempt.

    Args:
        on_host: Whether it was the machine's memory that ran out; None if that is not known any more.
    """
    if not trial.retries.get("oom"):
        return None
    return Alone.DEVICE if on_host is False else Alone.MACHINE

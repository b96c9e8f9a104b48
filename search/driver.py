"""The one search loop: proposals into slots, reports and results into the journal."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from search.errors import SpaceError, StudyFailed, TrialFailed, request_error
from search.executors import NO_GPU, Executor, Exited, Job, Lost, Message, Slot, Warned
from search.journal import Journal
from search.samplers import Proposal, Sampler, propose
from search.space import Space
from search.trial import Report, Trial, TrialState, searched, seed_for
from search.watcher import Silent, Watcher

MOST_FAILURES_IN_A_ROW = 10
_MOST_ATTEMPTS_AFTER_LOSS = 3
_REPORTS_EVERY = 0.5  # seconds between commits of epoch reports


@dataclass(frozen=True)
class Verdict:
    """What the judge says of one finished trial's predictions.

    Attributes:
        score: On validation rows, in the objective's units; goes to the sampler.
        guard: On guard rows; goes to the journal's sealed table and nowhere else.
        evidence: JSON that is kept with the guard score: what the final choice needs of both tiers.
    """

    score: float
    guard: float | None
    evidence: Any = None


class Judge(Protocol):
    """Scores the predictions that a trial left behind."""

    def judge(self, result: dict[str, Any]) -> Verdict | dict[str, Any]:
        """A verdict, or the payload of a ``score`` job whose result ``settle`` turns into one."""

    def settle(self, result: dict[str, Any]) -> Verdict:
        """The verdict of a ``score`` job's result."""


@dataclass
class _Running:
    trial: Trial
    slot: Slot
    asks: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, Any] | None = None
    failure: TrialFailed | None = None
    settled: Verdict | None = None
    scoring: dict[str, Any] = field(default_factory=dict)
    losses: int = 0  # of its score job


class Driver:
    """Runs one study's plan to its end.

    Args:
        trials: How many trials the search shall have in all.
        seed: The study's seed; every trial's and every proposal's seed derive from it.
        direction: ``"min"`` or ``"max"``.
        payload: Makes the payload of a trial's job from the trial and its proposal.
        discovery: Payload of the ``discover`` job, or None if the journal already has the space.
        on_preflight: Called once with the preflight's findings, before any other trial starts.
        confirm: The trainings that shall follow the search, worked out from its ended trials alone; those that
            a study has already are not repeated.
    """

    def __init__(
        self,
        *,
        trials: int,
        seed: int,
        direction: str,
        journal: Journal,
        sampler: Sampler,
        executor: Executor,
        judge: Judge,
        payload: Callable[[Trial, dict[str, Any] | None], dict[str, Any]],
        discovery: dict[str, Any] | None,
        on_preflight: Callable[[dict[str, Any]], None],
        confirm: Callable[[Sequence[Trial]], Sequence[Trial]] = lambda _: (),
        watcher: Watcher | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._trials, self._seed, self._direction = trials, seed, direction
        self._journal, self._sampler, self._executor, self._judge = journal, sampler, executor, judge
        self._payload, self._discovery, self._on_preflight = payload, discovery, on_preflight
        self._confirm, self._confirming = confirm, False
        self._watcher: Watcher = watcher or Silent()
        self._clock = clock
        self._space: Space | None = None if discovery is not None else journal.space()
        self._free: list[Slot] = list(executor.slots)
        self._running: dict[str, _Running] = {}
        self._requeued: list[Trial] = []
        self._planned: list[Trial] = []  # confirmations, which begin once the search has ended
        self._reports: list[Report] = []
        self._flushed = 0.0
        first = journal.history()[:1]
        self._checked = discovery is None or bool(first and first[0].state.is_finished)
        self._failures = 0
        self._exhausted = False
        self._starved: int | None = None  # length of the journal when nothing new could be proposed
        self._discoveries = 0
        self._found: dict[str, Any] | None = None  # what preflight said, until discovery has spoken too
        self._baseline_asks: list[dict[str, Any]] = []

    def run(self) -> str:
        """Run until the plan is done.

        Returns:
            ``"complete"`` when every trial of the plan has ended, ``"exhausted"`` when the space
            has no further configuration.

        Raises:
            RequestError: If preflight or discovery found the request wrong, before a second trial began.
            StudyFailed: If ten trials in a row failed, or trial processes cannot be had.
        """
        self._requeue_interrupted()
        self._discover()
        while True:
            self._fill()
            if not self._running and (self._space is not None or self._discovery is None) and not self._more():
                if self._confirming:
                    break
                self._plan_confirmations()
                continue
            for event in self._executor.poll(0.25):
                self._handle(event)
            self._flush()
            self._watcher.tick()
        self._flush(force=True)
        return "exhausted" if self._exhausted else "complete"

    # ── proposing ────────────────────────────────────────────────────────────────────────────

    def _requeue_interrupted(self) -> None:
        """A trial that was running when its driver ended runs again, with its parameters, seed and number."""
        for trial in self._journal.history():
            if not trial.state.is_finished:
                self._requeued.append(trial)

    def _more(self) -> bool:
        return bool(self._requeued or self._planned) or self._searching()

    def _searching(self) -> bool:
        return not self._exhausted and len(searched(self._journal.history())) < self._trials

    def _plan_confirmations(self) -> None:
        history = self._journal.history()
        known = {(trial.confirms, trial.seed) for trial in history}
        self._planned = [trial for trial in self._confirm(history) if (trial.confirms, trial.seed) not in known]
        self._confirming = True

    def _fill(self) -> None:
        while self._free and self._more():
            if not self._requeued and self._running and self._starved == self._journal.length:
                return
            number = self._requeued[0].number if self._requeued else len(self._journal.history())
            if number and (self._space is None or not self._checked):
                return  # only the baseline may run before preflight and discovery have spoken
            if self._requeued:
                waiting = self._requeued.pop(0)
                self._start(dataclasses.replace(waiting, attempt=waiting.attempt + 1))
                continue
            if self._planned:
                self._start(dataclasses.replace(self._planned.pop(0), number=number))
                continue
            trial = self._proposed(number)
            if trial is None and self._running:  # what runs may yet ask for more, in its fit for instance
                self._starved = self._journal.length
                return
            if trial is None:
                self._exhausted = True
                self._watcher.say(f"the space has no further configuration: it is exhausted after {number} trials")
                return
            self._start(trial)

    def _proposed(self, number: int) -> Trial | None:
        # Of the search alone: a study that is extended after its confirmations goes on as a longer one would have.
        place = len(searched(self._journal.history()))
        seed = seed_for(self._seed, place)
        if number == 0:
            return Trial(0, seed=seed)
        assert self._space is not None
        length = self._journal.length
        proposal = proposal_for(self._sampler, self._journal.history(), self._space, self._seed, place)
        if proposal is None:
            return None
        return Trial(number, params=proposal.params, memo=proposal.memo, seed=seed, history_length=length)

    def _start(self, trial: Trial) -> None:
        slot = self._free.pop(0)
        running = dataclasses.replace(trial, state=TrialState.RUNNING, started=self._clock(), slot=slot.index)
        self._journal.begin(running)
        proposal = self._space.proposal(trial.params) if self._space is not None and trial.number else None
        payload = self._payload(running, proposal)
        job = Job(f"trial-{trial.number}-{trial.attempt}", "trial", payload, log=payload.get("log"))
        self._running[job.id] = _Running(running, slot)
        self._executor.submit(job, slot)
        self._watcher.started(running)

    # ── events ───────────────────────────────────────────────────────────────────────────────

    def _handle(self, event: Any) -> None:
        if isinstance(event, Warned):
            self._watcher.say(event.text)
        elif event.job.startswith("discover"):
            self._discovered(event)
        elif event.job.startswith("score-"):
            self._scored(event)
        elif event.job in self._running:
            self._trial_event(self._running[event.job], event)

    def _discover(self) -> None:
        if self._discovery is not None:
            self._executor.submit(Job(f"discover-{self._discoveries}", "discover", self._discovery, env=NO_GPU), None)
            self._discoveries += 1

    def _discovered(self, event: Any) -> None:
        if isinstance(event, Message) and event.body["type"] == "result":
            self._journal.adopt(Space.from_json(event.body["space"]))
            if self._baseline_asks:
                # The baseline was sooner; what it asked for while training is not known to discovery.
                self._journal.grow(self._baseline_asks)
            self._space = self._journal.space()
            self._begin()
            if not event.body["complete"]:
                self._watcher.say(
                    "discovery reached its time limit; parameters found later join the search as trials ask for them"
                )
        elif isinstance(event, Message) and event.body["type"] == "failed":
            raise request_error(event.body.get("error"), event.body["message"])
        elif isinstance(event, Lost) and self._space is None and self._discoveries < _MOST_ATTEMPTS_AFTER_LOSS:
            self._discover()
        elif isinstance(event, Exited | Lost) and self._space is None:
            raise SpaceError(
                "the process that builds the space to discover its parameters ended without an answer; run "
                "`heldout check` with --debug"
            )

    def _trial_event(self, running: _Running, event: Any) -> None:
        if isinstance(event, Message):
            kind = event.body.get("type")
            if kind == "report":
                self._reported(running, event.body)
            elif kind == "asks":
                running.asks = event.body["asks"]
                grown = self._journal.grow(running.asks, running.trial.number, complete=False)
                if self._space is not None:
                    self._space = grown  # proposals see what the journal says, or they could not be made again
            elif kind == "preflight":
                self._checked, self._found = True, event.body
                self._begin()
            elif kind == "result":
                running.result, running.asks = event.body, event.body["asks"]
            elif kind == "failed":
                if not self._checked and running.trial.number == 0:
                    raise request_error(event.body.get("error"), event.body["message"])
                running.failure = TrialFailed(event.body["reason"], event.body["message"])
        elif isinstance(event, Lost):
            self._lost(running, event.job)
        elif isinstance(event, Exited):
            self._exited(running, event)

    def _begin(self) -> None:
        """Say that the request is sound, once preflight and discovery agree on it."""
        if self._found is not None and self._space is not None:
            self._on_preflight(self._found)
            self._found = None

    def _reported(self, running: _Running, body: dict[str, Any]) -> None:
        trial = running.trial
        report = Report(trial.number, trial.attempt, body["step"], self._clock(), body["metrics"])
        running.trial = dataclasses.replace(trial, epochs=report.step)
        self._reports.append(report)
        self._watcher.epoch(report)

    def _exited(self, running: _Running, event: Exited) -> None:
        if running.failure is None and running.result is None:
            how = f"was ended by signal {event.signal}" if event.signal else f"exited with {event.code} and no result"
            hint = "; the machine may have run out of memory" if event.signal == 9 else ""
            running.failure = TrialFailed("crash", f"the trial's process {how}{hint}")
            if not self._checked and running.trial.number == 0:
                raise SpaceError(
                    f"the default model's process {how} during preflight{hint}; run `heldout try` to see it"
                )
        if running.failure is not None:
            self._finish(running, None)
            return
        assert running.result is not None
        try:
            verdict = self._judge.judge(running.result)
        except TrialFailed as failure:
            running.failure, verdict = failure, None
        except Exception as error:  # of one trial: its model may lack the metric, or have another shape
            why = " ".join(str(error).split())[:300]
            running.failure, verdict = TrialFailed("invalid", f"it could not be scored: {why}"), None
        if isinstance(verdict, dict):
            running.scoring = verdict
            self._score(running)
        else:
            self._finish(running, verdict)

    def _score(self, running: _Running) -> None:
        job = Job(f"score-{running.trial.number}-{running.trial.attempt}", "score", running.scoring)
        self._executor.submit(job, running.slot)

    def _scored(self, event: Any) -> None:
        running = self._running[event.job.replace("score-", "trial-", 1)]
        if isinstance(event, Message) and event.body["type"] == "result":
            try:
                running.settled = self._judge.settle(event.body)
            except TrialFailed as failure:
                running.failure = failure
        elif isinstance(event, Message) and event.body["type"] == "failed":
            running.failure = TrialFailed("invalid", f"the metric could not be computed: {event.body['message']}")
        elif isinstance(event, Exited | Lost):
            if running.settled is None and running.failure is None:
                running.losses += isinstance(event, Lost)
                if isinstance(event, Lost) and running.losses < _MOST_ATTEMPTS_AFTER_LOSS:
                    return self._score(running)
                reason = "lost" if isinstance(event, Lost) else "crash"
                running.failure = TrialFailed(reason, "the process that computes the metric ended without an answer")
            self._finish(running, None if running.failure else running.settled)

    def _lost(self, running: _Running, job: str) -> None:
        if running.trial.attempt + 1 < _MOST_ATTEMPTS_AFTER_LOSS:
            del self._running[job]
            self._free.append(running.slot)
            self._requeued.append(running.trial)
            self._watcher.say(f"trial {running.trial.number} was lost with its process and runs again")
        else:
            running.failure = TrialFailed("lost", "the processes that ran it were lost three times")
            self._finish(running, None)

    def _finish(self, running: _Running, verdict: Verdict | None) -> None:
        trial = running.trial
        with self._journal.one_commit():  # no finished trial without its epochs or its guard score
            self._flush(force=True)
            params = self._grow(running)
            ended = self._ended(running, verdict, params)
            self._journal.finish(ended)
            if verdict is not None and verdict.guard is not None:
                self._journal.guard(trial.number, trial.attempt, verdict.guard, verdict.evidence)
        if verdict is not None:
            self._failures = 0
        elif trial.confirms is None:
            self._failures += ended.reason != "lost"
        del self._running[f"trial-{trial.number}-{trial.attempt}"]
        self._free.append(running.slot)
        self._free.sort(key=lambda slot: slot.index)
        self._watcher.ended(ended)
        if self._failures >= MOST_FAILURES_IN_A_ROW:
            raise StudyFailed(
                f"{MOST_FAILURES_IN_A_ROW} trials in a row failed, the last one ({ended.number}) with: "
                f"{ended.reason}: {ended.message}"
            )

    def _ended(self, running: _Running, verdict: Verdict | None, params: dict[str, Any]) -> Trial:
        trial, now = running.trial, self._clock()
        if verdict is None:
            failure = running.failure or TrialFailed("crash", "the trial ended without a verdict")
            return trial.moved(
                TrialState.FAILED, params=params, ended=now, reason=failure.reason, message=failure.message
            )
        result = running.result or {}
        return trial.moved(
            TrialState.COMPLETE,
            params=params,
            ended=now,
            score=verdict.score,
            loss=verdict.score if self._direction == "min" else -verdict.score,
            epochs=result["epochs"],
            best_epoch=result["best_epoch"],
            size=result["size"],
            extra={key: result[key] for key in ("weights", "reported", "devices", "declaration")},
        )

    def _grow(self, running: _Running) -> dict[str, Any]:
        """Record what the trial asked for; its parameters are exactly that."""
        if not running.asks:
            return dict(running.trial.params)
        whole = running.failure is None
        grown = self._journal.grow(running.asks, running.trial.number, complete=whole)
        if self._space is not None:
            self._space = grown
        elif whole:
            self._baseline_asks = running.asks
        return dict(grown.params_of(running.asks))

    def _flush(self, force: bool = False) -> None:
        if self._reports and (force or self._clock() - self._flushed >= _REPORTS_EVERY):
            self._journal.report(self._reports)
            self._reports = []
            self._flushed = self._clock()


def proposal_for(
    sampler: Sampler, history: Sequence[Trial], space: Space, study_seed: int, number: int
) -> Proposal | None:
    """The proposal for the search's trial ``number`` after ``history``, which anybody can so make again.

    Confirmations are no part of the search, so no sampler sees them.
    """
    return propose(sampler, searched(history), space, seed_for(study_seed, number, "proposal"))

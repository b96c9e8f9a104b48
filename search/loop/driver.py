"""The one search loop: proposals into slots, reports and results into the journal."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from search.definition.discovery import Discovery
from search.definition.space import Space
from search.errors import SpaceError, StudyFailed, StudyStopped, TrialFailed, request_error
from search.executors import Event, Executor, Exited, Job, Lost, Message, Slot, Warned, died
from search.loop.agenda import Agenda
from search.loop.attempt import Attempt, Judge, Verdict, alone, job_id
from search.loop.ends import Ends
from search.loop.enqueueing import unbegun
from search.loop.pruners import Pruning
from search.loop.recording import Recording
from search.loop.retries import may_retry
from search.loop.surroundings import NOW, Calm, Surroundings
from search.loop.watcher import Silent, Watcher
from search.processes.slots import Slots
from search.processes.supervision import Supervisor
from search.record.journal import Journal
from search.samplers import Sampler
from search.trial import Report, Trial, TrialState

MOST_FAILURES_IN_A_ROW = 10
_AT_ONCE = 8  # trials that begin in one commit, so that the first need not wait for the proposals of the last
_WAIT = 1.0  # seconds between tries to write to a full disk


class Driver:
    """Runs one study's plan to its end.

    Args:
        ends: What ends the search.
        seed: The study's seed; every trial's and every proposal's seed derive from it.
        direction: ``"min"`` or ``"max"``.
        payload: Makes the payload of a trial's job from the trial and its proposal.
        discovery: Payload of the ``discover`` job, or None if the journal already has the space.
        on_preflight: Called once with the preflight's findings, before any other trial starts.
        confirm: As of ``Agenda``.
        pruning: Says which trials stop early; None lets them all run to their end.
        text: Digest of the module text that trials run now; those that confirm run the text of what they confirm.
        supervisor: Says which jobs take too long; None lets them all take their time.
        surroundings: Says when to stop and when the disk is full.
    """

    def __init__(
        self,
        *,
        ends: Ends,
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
        pruning: Pruning | None = None,
        text: str | None = None,
        watcher: Watcher | None = None,
        supervisor: Supervisor | None = None,
        surroundings: Surroundings | None = None,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._direction, self._text, self._pruning = direction, text, pruning
        self._journal, self._executor, self._judge = journal, executor, judge
        self._payload, self._on_preflight = payload, on_preflight
        self._watcher: Watcher = watcher or Silent()
        self._agenda = Agenda(
            journal,
            sampler,
            seed=seed,
            ends=ends,
            direction=direction,
            confirm=confirm,
            watcher=self._watcher,
            clock=clock,
        )
        self._supervisor = supervisor or Supervisor(None, None, executor.cpu_seconds)
        self._discovery = Discovery(executor, self._supervisor, discovery)
        self._surroundings: Surroundings = surroundings or Calm()
        self._clock, self._sleep = clock, sleep
        self._recording = Recording(journal, self._surroundings, self._watcher, self._wait, clock)
        self._space: Space | None = None if discovery is not None else journal.space()
        self._seats = Slots(executor.slots)
        self._running: dict[str, Attempt] = {}
        self._begun: list[tuple[Job, Trial, Slot]] = []  # to be submitted once that is recorded
        self._hurries = False  # whether more could begin at once
        self._on_host: dict[int, bool] = {}  # of trials that ran out of memory: the machine's, or a GPU's
        first = journal.history()[:1]
        self._checked = discovery is None or bool(first and first[0].state.is_finished)
        self._failures = 0
        self._hopeless: StudyFailed | None = None
        self._stopping = False
        self._found: dict[str, Any] | None = None  # what preflight said, until discovery has spoken too
        self._held: tuple[Attempt, Verdict | None] | None = None  # the baseline's end, until the study has begun

    def run(self) -> str:
        """Run until the plan is done.

        Returns:
            Which end the search reached, as ``Ends.reached`` says it; ``"exhausted"`` when the space has no
            further configuration, ``"stopped"`` when it was asked to begin no more.

        Raises:
            RequestError: If preflight or discovery found the request wrong, before a second trial began.
            StudyFailed: If ten trials in a row failed, or trial processes cannot be had.
            StudyStopped: If it was asked to stop at once.
        """
        self._agenda.recall()
        if self._pruning is not None:
            self._pruning.recall(self._journal.history(), self._journal.reports())
        self._discovery.start()
        events: Sequence[Event] = ()
        while True:
            with self._recording.round():
                for event in events:
                    self._handle(event)
                events = ()
                if self._hopeless is not None:
                    raise self._hopeless
                self._end_overdue()
                self._heed_stop()
                self._executor.need(self._fill())
            self._submit()
            self._recording.flush()
            self._tick()
            if not self._running and self._discovery.is_over and not self._more():
                if self._agenda.confirming or self._stopping:
                    break
                self._agenda.plan_confirmations()
                continue
            events = self._executor.poll(0.0 if self._hurries else 0.25)
        self._recording.flush(force=True)
        return "stopped" if self._stopping else self._agenda.ended or "exhausted"

    def _heed_stop(self) -> None:
        asked = self._surroundings.stop()
        if asked == NOW or (asked is not None and not self._checked):
            raise StudyStopped("it was asked to stop at once; what had ended is recorded")
        if asked is not None and not self._stopping:
            self._stopping = True
            count = len(self._running)
            trials = f"{count} running trial{'' if count == 1 else 's'}"
            self._watcher.say(f"stopping: {trials} may end, no other begins (Ctrl-C again stops at once)")

    def _tick(self) -> None:
        self._watcher.tick()
        self._surroundings.tick()

    def _wait(self) -> None:
        """Let a moment pass in which nothing can be written, but a request to stop is heard."""
        self._heed_stop()
        self._sleep(_WAIT)
        self._supervisor.paused(_WAIT)
        self._tick()

    # ── beginning ──

    def _more(self) -> bool:
        return not self._stopping and self._agenda.has_more()

    def _fill(self) -> bool:
        """Let trials begin in free slots; whether more could if there were more of these."""
        self._hurries = False
        self._seats.offer(self._executor.slots)
        while self._more() and self._recording.has_room():
            self._hurries = len(self._begun) >= _AT_ONCE
            if self._hurries:
                return True
            if self._running and self._agenda.waits():
                return False
            number, again = self._agenda.number, self._agenda.again
            if number and (self._space is None or not self._checked):
                return True  # only the baseline may run before preflight and discovery have spoken
            slot = self._seats.take(alone(again, self._on_host.get(number)) if again else None)
            if slot is None:
                return True
            trial = self._agenda.next(number, self._space, idle=not self._running)
            if trial is None:
                self._seats.give_back(slot)
                return False
            self._start(trial, slot)
        return False

    def _start(self, trial: Trial, slot: Slot) -> None:
        text = self._text if trial.confirms is None else trial.text
        now = self._clock()
        extra = {**trial.extra, **({"gpus": gpus} if (gpus := self._seats.gpus(slot)) else {})}
        running = dataclasses.replace(
            trial, state=TrialState.RUNNING, started=now, slot=slot.index, text=text, extra=extra
        )
        self._recording.durably(lambda: self._journal.begin(running))
        proposal = self._space.proposal(trial.params) if self._space is not None and trial.number else None
        payload = self._recording.durably(lambda: self._payload(running, proposal))
        job = Job(job_id(running), "trial", payload, log=payload.get("log"))
        self._running[job.id] = Attempt(running, slot)
        self._begun.append((job, running, slot))

    def _submit(self) -> None:
        """Let the trials run whose beginning is recorded now."""
        while self._begun:
            job, trial, slot = self._begun.pop(0)
            self._executor.submit(job, slot)
            self._supervisor.began(job.id, timed=True)
            self._watcher.started(trial)

    # ── events ───────────────────────────────────────────────────────────────────────────────

    def _handle(self, event: Any) -> None:
        if isinstance(event, Warned):
            self._watcher.say(event.text)
            return
        if isinstance(event, Message):
            self._supervisor.heard(event.job)
        else:
            self._supervisor.ended(event.job)
        if event.job.startswith("discover"):
            if (found := self._discovery.take(event)) is not None:
                self._recording.durably(lambda: self._discovered(found))
                if self._held is not None:
                    held, self._held = self._held, None
                    self._finish(*held)
        elif event.job.startswith("score-"):
            self._scored(event)
        elif event.job in self._running:
            self._trial_event(self._running[event.job], event)

    def _end_overdue(self) -> None:
        for job, why in self._supervisor.overdue():
            self._executor.kill(job)
            if job.startswith("discover"):
                raise SpaceError(f"build(hp) must return, but while the space was discovered {why}")
            attempt = self._running.get(job.replace("score-", "trial-", 1))
            # What has said its result and only fails to exit is ended, and its result counts.
            if attempt is not None and (attempt.result is None or job.startswith("score-")):
                attempt.failure = attempt.failure or TrialFailed("timeout", why)

    def _discovered(self, found: dict[str, Any]) -> None:
        self._journal.adopt(Space.from_json(found["space"]))
        self._space = self._journal.space()
        self._begin()
        for note in found.get("notes", ()):
            self._watcher.say(note)
        if not found["complete"]:
            self._watcher.say(
                "discovery reached its time limit; parameters found later join the search as trials ask for them"
            )

    def _trial_event(self, attempt: Attempt, event: Any) -> None:
        if isinstance(event, Message):
            try:
                self._said(attempt, event.body)
            except (KeyError, TypeError, ValueError, AttributeError) as error:  # JSON, but not what a trial may say
                attempt.asks, attempt.result = [], None
                attempt.failed(died(event.job, f"it broke the protocol: {error!r}").body)
                self._executor.kill(event.job)
        elif attempt.stopped:  # and so it is pruned, however its process ended
            self._finish(attempt, None)
        elif isinstance(event, Lost) and attempt.failure is None and attempt.result is not None:
            self._judged(attempt)  # it had finished, and its files are whole
        elif isinstance(event, Lost):
            why = "the machine that ran it was taken away" if event.taken else "the processes around it were lost"
            attempt.failure = attempt.failure or TrialFailed("lost", why, chance=True)
            self._failed(attempt, is_counted=not event.taken)
        elif isinstance(event, Exited):
            attempt.exited(event)
            if attempt.failure is not None:
                self._failed(attempt)
            else:
                self._judged(attempt)

    def _said(self, attempt: Attempt, body: dict[str, Any]) -> None:
        kind = body.get("type")
        if kind == "report":
            report = attempt.reported(body, self._clock())
            self._recording.report(report)
            self._watcher.epoch(report)
            if self._pruning is not None:
                self._prune(self._pruning, attempt, report, waits=bool(body.get("waits")))
        elif kind == "asks":
            attempt.asks = body["asks"]
            number = attempt.trial.number
            grown = self._recording.durably(lambda: self._journal.grow(attempt.asks, number, complete=False))
            if self._space is not None:
                self._space = grown  # proposals see what the journal says, or they could not be made again
        elif kind == "preflight" and not self._checked:
            self._checked, self._found = True, body
            self._recording.durably(self._begin)
        elif kind == "result":
            attempt.resulted(body, self._space or Space.empty())
        elif kind == "failed":
            attempt.failed(body)
            if not self._checked and attempt.trial.number == 0 and attempt.failure and not attempt.failure.chance:
                raise request_error(body.get("error"), body["message"])

    def _prune(self, pruning: Pruning, attempt: Attempt, report: Report, waits: bool) -> None:
        """Take in a report, and answer the trial if it waits at a rung."""
        pruning.heard(attempt.trial, report)
        if waits:
            if not attempt.stopped and pruning.stops(attempt.trial, report.step):
                attempt.stopped, attempt.value = True, pruning.loss(attempt.trial, report.step)
            self._executor.send(attempt.job, {"stop": attempt.stopped})

    def _begin(self) -> None:
        """Say that the request is sound, once preflight and discovery agree on it."""
        if self._found is not None and self._space is not None:
            self._on_preflight(self._found)
            self._found = None
            self._agenda.enqueued(unbegun(self._journal.history()))

    def _failed(self, attempt: Attempt, is_counted: bool = True) -> None:
        """An attempt is over without a result: try again, or record that the trial failed."""
        failure = attempt.failure
        assert failure is not None
        if failure.reason != "timeout" and self._recording.was_full_since(attempt.trial.started or 0.0):
            self._requeue(attempt, TrialFailed("lost", f"the disk was full ({failure.message})"), is_counted=False)
        elif not is_counted or may_retry(attempt.trial, failure):
            self._requeue(attempt, failure, is_counted)
        elif not self._checked and attempt.trial.number == 0:
            raise SpaceError(
                f"the default model must train, but before that {failure.message}; run `heldout try` to see why"
            )
        else:
            self._finish(attempt, None)

    def _requeue(self, attempt: Attempt, failure: TrialFailed, is_counted: bool) -> None:
        waiting = attempt.waiting(failure, is_counted, self._clock())
        self._recording.write(lambda: self._journal.queue(waiting))
        self._leave(attempt)
        self._agenda.requeue(waiting)
        if failure.reason == "oom":
            self._on_host[waiting.number] = failure.on_host
        self._watcher.say(f"trial {waiting.number} runs again ({failure.reason}: {failure.message})")

    def _judged(self, attempt: Attempt) -> None:
        result = attempt.result
        assert result is not None
        try:
            verdict = self._recording.durably(lambda: self._judge.judge(result))
        except StudyFailed:  # of the disk or the driver, which is no fault of the trial
            raise
        except TrialFailed as failure:
            attempt.failure, verdict = failure, None
        except Exception as error:  # of one trial: its model may lack the metric, or have another shape
            why = " ".join(str(error).split())[:300]
            attempt.failure, verdict = TrialFailed("invalid", f"it could not be scored: {why}"), None
        if isinstance(verdict, dict):
            attempt.scoring = verdict
            self._score(attempt)
        else:
            self._finish(attempt, verdict)

    def _score(self, attempt: Attempt) -> None:
        job = Job(attempt.job.replace("trial-", "score-", 1), "score", attempt.scoring)
        self._executor.submit(job, attempt.slot)
        self._supervisor.began(job.id, timed=True)

    def _scored(self, event: Any) -> None:
        attempt = self._running[event.job.replace("score-", "trial-", 1)]
        attempt.scored(event, self._judge)
        if isinstance(event, Exited | Lost):
            if attempt.settled is None and attempt.failure is None:
                self._score(attempt)  # it died, as any process may
            else:
                self._finish(attempt, None if attempt.failure else attempt.settled)

    def _finish(self, attempt: Attempt, verdict: Verdict | None) -> None:
        if not self._discovery.is_over:
            self._held = attempt, verdict  # told only when it cannot be taken back: discovery may yet refuse the space
            return
        trial = self._recording.write(lambda: self._recorded(attempt, verdict))
        if trial.state is not TrialState.FAILED:
            self._failures = 0
        elif trial.confirms is None:
            self._failures += trial.reason != "lost"
        self._leave(attempt)
        self._recording.then(lambda: self._watcher.ended(trial))
        self._recording.then(lambda: self._surroundings.ended(trial))
        if self._failures >= MOST_FAILURES_IN_A_ROW:  # raised when what else is known is recorded
            self._hopeless = self._hopeless or StudyFailed(
                f"{MOST_FAILURES_IN_A_ROW} trials in a row failed, the last one ({trial.number}) with: "
                f"{trial.reason}: {trial.message}"
            )

    def _recorded(self, attempt: Attempt, verdict: Verdict | None) -> Trial:
        done = attempt.finished(verdict, self._grow(attempt), self._direction, self._clock())
        self._journal.finish(done)
        if verdict is not None and verdict.guard is not None:  # no finished trial without its guard score
            self._journal.guard(done.number, done.attempt, verdict.guard, verdict.evidence)
        return done

    def _leave(self, attempt: Attempt) -> None:
        """Its slot is free again."""
        del self._running[attempt.job]
        self._seats.give_back(attempt.slot)

    def _grow(self, attempt: Attempt) -> dict[str, Any]:
        """Record what the trial asked for; its parameters are exactly that, and of one that ended early what was
        proposed as well, or it would not be known for the configuration that it was."""
        if not attempt.asks:
            return dict(attempt.trial.params)
        whole = attempt.failure is None and not attempt.stopped
        grown = self._journal.grow(attempt.asks, attempt.trial.number, complete=whole)
        self._space = grown
        asked = dict(grown.params_of(attempt.asks))
        return asked if whole else {**attempt.trial.params, **asked}

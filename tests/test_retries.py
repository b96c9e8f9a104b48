"""Failures by kind: which are tried again, how often, under what record, and in which company."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from search.definition.domain import Domain
from search.definition.space import Parameter
from search.errors import DiskFull, SpaceError, StudyStopped
from search.executors import Event, Exited, Job, Lost, Message, Slot, died
from search.executors.inline import InlineExecutor
from search.loop.attempt import Verdict
from search.loop.retries import RETRIES
from search.loop.surroundings import FINISH, NOW, Calm
from search.loop.watcher import Silent
from search.record.journal import Journal
from search.samplers import get_sampler
from search.trial import Trial, TrialState
from tests.test_driver import RATE, UNITS, ReadingJudge, asks_for, driver, journal, result, study  # noqa: F401 (a fixture)

WHOLE = study(RATE, score=lambda p: 0.5)


class Scripted(InlineExecutor):
    """Replaces what attempts of trial 2 come to by the events of a script, attempt by attempt."""

    def __init__(self, script: list[list[Event]], slots: int = 1, number: int = 2) -> None:
        super().__init__(WHOLE, [Slot(n, 1) for n in range(slots)])
        self._script = {f"trial-{number}-{attempt}": events for attempt, events in enumerate(script)}

    def poll(self, timeout: float) -> list[Any]:
        events = []
        for event in super().poll(timeout):
            if event.job not in self._script:
                events.append(event)
            elif isinstance(event, Exited):
                events += self._script[event.job]
        return events


def failed(reason: str, attempt: int = 0, **more: Any) -> list[Event]:
    job = f"trial-2-{attempt}"
    body = {"type": "failed", "reason": reason, "message": "as it is", "error": None, **more}
    return [Message(job, body), Exited(job, 0, None, 1.0)]


def signalled(attempt: int, number: int = 9, oom: bool = False) -> list[Event]:
    return [Exited(f"trial-2-{attempt}", None, number, 1.0, oom)]


def lost(attempt: int, taken: bool = False) -> list[Event]:
    return [Lost(f"trial-2-{attempt}", taken)]


def run(journal: Journal, script: list[list[Event]], **changes: Any) -> Trial:  # noqa: F811
    driver(journal, None, trials=5, executor=Scripted(script), **changes).run()
    states = [t.state for t in journal.history()]
    assert len(states) == 5 and all(state.is_finished for state in states)
    return journal.history()[2]


@pytest.mark.parametrize(
    ("script", "state", "reason", "attempts", "retries"),
    [
        ([failed("nan")], TrialState.FAILED, "nan", 1, {}),
        ([failed("invalid")], TrialState.FAILED, "invalid", 1, {}),
        ([failed("crash")], TrialState.FAILED, "crash", 1, {}),  # an exception of the module
        ([failed("oom")], TrialState.COMPLETE, None, 2, {"oom": 1}),
        ([failed("oom"), failed("oom", 1)], TrialState.FAILED, "oom", 2, {"oom": 1}),
        ([signalled(0, oom=True)], TrialState.COMPLETE, None, 2, {"oom": 1}),
        ([signalled(0, 11)], TrialState.COMPLETE, None, 2, {"crash": 1}),
        ([signalled(0), signalled(1)], TrialState.COMPLETE, None, 3, {"crash": 2}),
        ([signalled(n) for n in range(3)], TrialState.FAILED, "crash", 3, {"crash": 2}),
        ([[Exited(f"trial-2-{n}", 0, None, 1.0)] for n in range(3)], TrialState.FAILED, "crash", 3, {"crash": 2}),
        ([[died("trial-2-0", "it wrote garbage"), *signalled(0)]], TrialState.COMPLETE, None, 2, {"crash": 1}),
        ([lost(0), lost(1)], TrialState.COMPLETE, None, 3, {"lost": 2}),
        ([lost(0), lost(1), lost(2)], TrialState.FAILED, "lost", 3, {"lost": 2}),
        ([lost(n, taken=True) for n in range(6)], TrialState.COMPLETE, None, 7, {}),
        ([signalled(0), failed("oom", 1), lost(2)], TrialState.COMPLETE, None, 4, {"crash": 1, "oom": 1, "lost": 1}),
    ],
)
def test_each_kind_has_its_policy(
    journal: Journal,  # noqa: F811
    script: list[list[Event]],
    state: TrialState,
    reason: str | None,
    attempts: int,
    retries: dict[str, int],
) -> None:
    trial = run(journal, script)
    assert (trial.state, trial.reason, trial.attempt + 1) == (state, reason, attempts)
    assert dict(trial.retries) == retries
    begun = [Trial.from_json(e.body) for e in journal.events() if e.kind == "trial" and e.trial == 2]
    assert len({(t.seed, t.history_length, str(t.params)) for t in begun if not t.state.is_finished}) == 1
    waited = [t.reason for t in begun if t.state is TrialState.WAITING]
    assert len(waited) == attempts - 1 and None not in waited


def test_a_result_whose_process_was_lost_afterwards_counts(journal: Journal) -> None:  # noqa: F811
    class Late(InlineExecutor):
        def poll(self, timeout: float) -> list[Any]:
            events = super().poll(timeout)
            return [Lost(e.job) if isinstance(e, Exited) and e.job == "trial-2-0" else e for e in events]

    driver(journal, None, trials=4, executor=Late(WHOLE)).run()
    assert [t.attempt for t in journal.history()] == [0, 0, 0, 0]


def test_retries_are_counted_across_drivers(journal: Journal) -> None:  # noqa: F811
    class Cut(Scripted):
        def submit(self, job: Job, slot: Slot | None) -> None:
            if job.id == "trial-2-2":
                raise KeyboardInterrupt
            super().submit(job, slot)

    script = [signalled(n) for n in range(9)]
    with pytest.raises(KeyboardInterrupt):
        driver(journal, None, trials=5, executor=Cut(script)).run()
    driver(journal, None, trials=5, executor=Scripted(script), discovery=None).run()
    trial = journal.history()[2]
    # Two retries for the crashes; the attempt that the driver took with it is nobody's fault.
    assert (trial.state, trial.reason, trial.attempt, dict(trial.retries)) == (
        TrialState.FAILED, "crash", 3, {"crash": 2},
    )  # fmt: skip


def test_the_baseline_may_crash_before_preflight_has_spoken(journal: Journal) -> None:  # noqa: F811
    crash = [[Exited(f"trial-0-{n}", None, 11, 1.0)] for n in range(3)]
    executor = Scripted(crash[:2], number=0)
    assert driver(journal, None, trials=3, executor=executor).run() == "complete"
    assert journal.history()[0].attempt == 2


def test_a_baseline_that_always_crashes_is_a_wrong_request(journal: Journal) -> None:  # noqa: F811
    crash = [[Exited(f"trial-0-{n}", None, 11, 1.0)] for n in range(3)]
    with pytest.raises(SpaceError, match="was ended by signal 11.*heldout try"):
        driver(journal, None, trials=3, executor=Scripted(crash, number=0)).run()


class Together(InlineExecutor):
    """Lets trials end one poll after all slots are full, and knows who ran beside whom."""

    def __init__(self, first: Callable[[str], list[Event] | None], slots: int = 3) -> None:
        super().__init__(WHOLE, [Slot(n, 1) for n in range(slots)])
        self._first, self._late, self.beside = first, [], {}

    def submit(self, job: Job, slot: Slot | None) -> None:
        super().submit(job, slot)
        running = [name for name, where in self._busy.items() if where is not None]
        for name in running:
            self.beside.setdefault(name, set()).update(set(running) - {name})

    def poll(self, timeout: float) -> list[Any]:
        out: list[Any] = []
        if self._late:
            event = self._late.pop(0)  # one end a poll
            self._busy.pop(event.job, None)
            out += self._first(event.job) or [event]
        events, self._events = list(self._events), type(self._events)()
        for event in events:
            scripted = self._first(event.job) is not None
            if isinstance(event, Exited) and not event.job.startswith("discover"):
                self._late.append(event)
            elif isinstance(event, Exited) or not scripted:
                if isinstance(event, Exited):
                    self._busy.pop(event.job, None)
                out.append(event)
        return out


def test_what_ran_out_of_memory_runs_again_with_nothing_beside_it(journal: Journal) -> None:  # noqa: F811
    def first(job: str) -> list[Event] | None:
        return [Exited(job, None, 9, 1.0, True)] if job == "trial-4-0" else None

    executor = Together(first)
    assert driver(journal, None, trials=12, executor=executor).run() == "complete"
    assert all(t.state is TrialState.COMPLETE for t in journal.history())
    assert executor.beside["trial-4-0"] and executor.beside["trial-4-1"] == set()
    assert any(executor.beside[f"trial-{n}-0"] for n in range(6, 12))  # afterwards together again


class Room(Calm):
    """Lacks room for so many questions."""

    def __init__(self, lacking: int) -> None:
        self.lacking = lacking

    def lacks_room(self) -> str | None:
        self.lacking -= 1
        return "only 3 MiB are free" if self.lacking >= 0 else None


def test_a_crash_that_is_told_when_there_is_room_again_is_still_the_disks(journal: Journal) -> None:  # noqa: F811
    room = Room(0)

    class Filling(Scripted):
        def poll(self, timeout: float) -> list[Any]:
            events = super().poll(timeout)
            # Full for one look of the driver while trial 2 runs; its process takes a while to die of it.
            if any(e.job == "trial-2-0" for e in events) and not self.held:
                self.held, room.lacking = events, 1
                return []
            events, self.held = [*self.held, *events], []
            return events

        held: list[Any] = []

    class Once(Filling):
        done = False

        def poll(self, timeout: float) -> list[Any]:
            if self.done:
                return Scripted.poll(self, timeout)
            events = super().poll(timeout)
            self.done = any(isinstance(e, Exited) and e.job == "trial-2-0" for e in events)
            return events

    executor = Once([signalled(0, 11)])
    driver(journal, None, trials=5, executor=executor, surroundings=room).run()
    trial = journal.history()[2]
    assert trial.state is TrialState.COMPLETE and trial.attempt == 1 and not trial.retries


class Listening(Silent):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def say(self, text: str) -> None:
        self.heard.append(text)


def test_a_full_disk_pauses_and_costs_no_retry(journal: Journal) -> None:  # noqa: F811
    room, watcher = Room(0), Listening()

    class Filling(Scripted):
        def poll(self, timeout: float) -> list[Any]:
            events = super().poll(timeout)
            if any(isinstance(e, Message) and e.body.get("message") == "as it is" for e in events):
                room.lacking = 4
            return events

    executor = Filling([failed("crash"), failed("crash", 1)])
    driver(journal, None, trials=5, executor=executor, surroundings=room, watcher=watcher).run()
    trial = journal.history()[2]
    assert trial.state is TrialState.COMPLETE and trial.attempt == 2 and not trial.retries
    told = [text for text in watcher.heard if "paused" in text or "going on" in text]
    assert told == ["paused: only 3 MiB are free; it goes on by itself once that is mended",
                    "the disk takes what is written again: going on"] * 2  # fmt: skip


def test_a_journal_on_a_full_disk_is_written_once_there_is_room(journal: Journal) -> None:  # noqa: F811
    real, failing, waited = journal.finish, [3], []

    def finish(trial: Trial) -> None:
        if trial.number == 2 and failing[0]:
            failing[0] -= 1
            raise DiskFull("the journal cannot be written")
        real(trial)

    journal.finish = finish  # type: ignore[method-assign]
    driver(journal, WHOLE, trials=5, sleep=waited.append).run()
    trials = journal.history()
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 5 and len(waited) == 3
    assert len(journal.reports()) == 10 and len(journal.guards()) == 5


def test_a_disk_that_is_full_at_the_commit_of_a_round_costs_nothing(journal: Journal) -> None:  # noqa: F811
    real, failing, waited = journal.commit, [0, 2, 0, 0, 3, 1, 0], []

    def commit(reports: Any = ()) -> None:
        if failing and failing[0]:
            failing[0] -= 1
            raise DiskFull("the journal cannot be written")
        del failing[:1]
        real(reports)

    journal.commit = commit  # type: ignore[method-assign]
    driver(journal, WHOLE, trials=5, sleep=waited.append).run()
    trials = journal.history()
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 5 and len(waited) == 6
    assert len(journal.reports()) == 10 and len(journal.guards()) == 5
    with Journal.open(journal.path, read_only=True) as reader:
        assert reader.history() == trials


class Asking(Calm):
    """Asks to stop once so many trials have ended."""

    def __init__(self, after: int, how: str) -> None:
        self.after, self.how = after, how

    def ended(self, trial: Any) -> None:
        self.after -= 1

    def stop(self) -> str | None:
        return self.how if self.after <= 0 else None


def test_asked_to_finish_it_lets_running_trials_end_and_can_go_on(journal: Journal) -> None:  # noqa: F811
    executor = Together(lambda job: None)
    assert driver(journal, None, trials=12, executor=executor, surroundings=Asking(4, FINISH)).run() == "stopped"
    trials = journal.history()
    assert 4 < len(trials) < 12 and all(t.state is TrialState.COMPLETE for t in trials)
    assert driver(journal, WHOLE, trials=12, discovery=None).run() == "complete"
    assert len(journal.history()) == 12


def test_asked_to_stop_now_it_stops_and_what_ran_runs_again(journal: Journal) -> None:  # noqa: F811
    executor = Together(lambda job: None)
    with pytest.raises(StudyStopped):
        driver(journal, None, trials=12, executor=executor, surroundings=Asking(4, NOW)).run()
    in_flight = [t.number for t in journal.history() if not t.state.is_finished]
    assert in_flight
    assert driver(journal, WHOLE, trials=12, discovery=None).run() == "complete"
    assert [t.attempt for t in journal.history()] == [int(n in in_flight) for n in range(12)]


def test_a_stop_is_heard_while_the_disk_is_full(journal: Journal) -> None:  # noqa: F811
    def finish(trial: Trial) -> None:
        raise DiskFull("the journal cannot be written")

    journal.finish = finish  # type: ignore[method-assign]
    asking = Asking(1, NOW)
    with pytest.raises(StudyStopped):
        driver(journal, WHOLE, surroundings=asking, sleep=lambda _: asking.ended(())).run()


def test_what_was_interrupted_before_it_had_asked_for_everything_keeps_its_proposal(journal: Journal) -> None:  # noqa: F811
    handed: dict[str, Any] = {}

    def late(job: dict[str, Any], send: Any) -> None:
        """Asks for the second parameter only in its training."""
        payload = job["payload"]
        if job["kind"] == "trial":
            handed[job["id"]] = payload["proposal"]
            asks = asks_for(payload["proposal"], RATE, UNITS)
            send({"type": "asks", "asks": asks[:1]})
            if payload["number"] == 2 and payload["attempt"] == 0:
                return
        study(RATE, UNITS, score=lambda p: 0.5)(job, send)

    class Cut(InlineExecutor):
        def poll(self, timeout: float) -> list[Any]:
            events = super().poll(timeout)
            if any(isinstance(e, Exited) and e.job == "trial-2-0" for e in events):
                self._events.extend(e for e in events if isinstance(e, Exited))
                return [e for e in events if not isinstance(e, Exited)]
            return events

    class Dying(Cut):
        polls = 0

        def poll(self, timeout: float) -> list[Any]:
            if "trial-2-0" in handed:
                self.polls += 1
                if self.polls > 1:
                    raise KeyboardInterrupt
            return super().poll(timeout)

    with pytest.raises(KeyboardInterrupt):
        driver(journal, None, trials=4, executor=Dying(late)).run()
    assert len(journal.history()[2].params) == 1  # what it had asked for by then
    driver(journal, late, trials=4, discovery=None).run()
    assert len(handed["trial-2-0"]) == 2 and handed["trial-2-1"] == handed["trial-2-0"]


def test_a_baseline_that_ran_out_of_memory_before_preflight_is_tried_once_more(journal: Journal) -> None:  # noqa: F811
    lacking = {"type": "failed", "reason": "oom", "message": "MemoryError", "error": None}
    once = [[Message("trial-0-0", lacking), Exited("trial-0-0", 0, None, 1.0)]]
    assert driver(journal, None, trials=3, executor=Scripted(once, number=0)).run() == "complete"
    assert dict(journal.history()[0].retries) == {"oom": 1}


def test_a_baseline_that_is_sooner_than_discovery_ends_when_the_study_has_begun(journal: Journal) -> None:  # noqa: F811
    ended: list[int] = []

    class Late(InlineExecutor):
        """Discovery takes longer than the first trial."""

        polls = 0

        def poll(self, timeout: float) -> list[Any]:
            self.polls += 1
            events = super().poll(timeout)
            if self.polls < 6:
                held = [e for e in events if e.job.startswith("discover")]
                self._events.extend(held)
                assert not ended and not journal.history()[0].state.is_finished
                return [e for e in events if e not in held]
            return events

    class Seeing(Silent):
        def ended(self, trial: Trial) -> None:
            ended.append(trial.number)

    began: list[Any] = []
    driver(journal, None, trials=3, executor=Late(WHOLE), watcher=Seeing(), on_preflight=began.append).run()
    assert ended == [0, 1, 2] and len(began) == 1


@pytest.mark.parametrize(
    "body",
    [{"type": "report", "step": 1}, {"type": "report"}, {"type": "asks"}, {"type": "asks", "asks": [{}]}]
    + [{"type": "result"}, {"type": "result", "asks": []}, {"type": "report", "step": 1, "metrics": [1]}]
    + [{"type": "report", "step": step, "metrics": {}} for step in (None, 0, True, 2**70)]
    + [{"type": "report", "step": 1, "metrics": {"loss": "x"}}]
    + [{**result([{}], 0.5)}, {**result([], 0.5), "epochs": "2"}, {**result([], 0.5), "asks": "x"}],
)
def test_a_trial_that_breaks_the_protocol_ends_alone(journal: Journal, body: dict[str, Any]) -> None:  # noqa: F811
    script = [[Message(f"trial-2-{n}", body), Exited(f"trial-2-{n}", 0, None, 1.0)] for n in range(3)]
    trial = run(journal, script)
    assert (trial.state, trial.reason) == (TrialState.FAILED, "crash")


def test_a_disk_that_is_full_while_it_is_judged_costs_the_trial_nothing(journal: Journal) -> None:  # noqa: F811
    full, waited = [3], []

    class Full(ReadingJudge):
        def judge(self, result: dict[str, Any]) -> Verdict:
            if full[0] and len(journal.history()) == 3:
                full[0] -= 1
                raise DiskFull("guard/0002.npy could not be written")
            return super().judge(result)

    driver(journal, WHOLE, trials=5, judge=Full(), sleep=waited.append).run()
    assert [t.state for t in journal.history()] == [TrialState.COMPLETE] * 5 and len(waited) == 3


def test_a_journal_that_lacks_a_trial_goes_on_with_the_next_number(journal: Journal) -> None:  # noqa: F811
    driver(journal, WHOLE, trials=3).run()
    lost = Trial(7, TrialState.RUNNING, seed=1, history_length=0)  # as after a repair: 3 to 6 are gone
    journal.begin(lost)
    driver(journal, WHOLE, trials=6, discovery=None).run()
    assert [t.number for t in journal.history()] == [0, 1, 2, 7, 8, 9]
    assert all(t.state is TrialState.COMPLETE for t in journal.history())


def test_the_table_has_every_reason() -> None:
    assert RETRIES == {"nan": 0, "oom": 1, "crash": 2, "timeout": 0, "lost": 2, "invalid": 0}


def test_a_trial_that_fails_before_it_has_asked_for_everything_is_known_for_what_was_proposed(journal: Journal) -> None:  # noqa: F811
    """Else a grid would propose the same configuration again, as often as it fails."""
    one, two = (Parameter(name, name, (), Domain("int", 1, 3, default=1)) for name in ("one", "two"))

    def body(job: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
        payload = job["payload"]
        if payload.get("number") and asks_for(payload["proposal"], one)[0]["value"] == 2:
            send({"type": "asks", "asks": asks_for(payload["proposal"], one)})
            send({"type": "failed", "reason": "invalid", "message": "no"})
            return
        study(one, two, score=lambda _: 0.5)(job, send)

    assert driver(journal, body, trials=20, sampler=get_sampler("grid")).run() == "exhausted"
    trials = journal.history()
    assert len({tuple(sorted(t.params.items())) for t in trials}) == len(trials) == 9
    assert [t.state for t in trials if t.params["one"] == 2] == [TrialState.FAILED] * 3

"""The search loop under any sequence of events: whatever comes, each trial ends once and the record is whole."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from search.executors import Exited, Job, Lost, Message, Slot, died
from search.guard.finalists import Confirmation, plan
from search.loop.retries import RETRIES
from search.loop.surroundings import FINISH, NOW
from search.processes.supervision import Supervisor
from search.record.journal import Journal
from search.trial import TRANSITIONS, Trial, TrialState, searched
from tests.test_driver import RATE, UNITS, driver, study

WHOLE = study(RATE, UNITS, score=lambda p: p["rate"] * p["units"])
TRIALS = 7
ENDS = st.sampled_from(
    ["result"] * 6
    + ["crash", "exit", "oom", "kernel", "nan", "invalid", "exception", "garbage"]
    + ["lost", "taken", "hang", "mute", "no score"]
)
# What happens to the driver between two polls.
FATES = st.sampled_from(["nothing"] * 12 + ["death", FINISH, NOW, "full"])


class Death(BaseException):
    """The driver's process is no more."""


class World:
    """An executor, a clock and surroundings in which everything may happen; outlives the drivers in it."""

    def __init__(self, data: st.DataObject, slots: int) -> None:
        self.data, self.now = data, 0.0
        self.slots = tuple(Slot(n, 1) for n in range(slots))
        self.fates = 12  # bounds how often a driver meets its end
        self.fate = "nothing"
        self.begun: list[str] = []
        self.restart()

    def restart(self) -> None:
        """A new driver: the old one's processes are gone with it."""
        self.jobs: dict[str, tuple[Job, Slot | None, str]] = {}
        self.events: deque[Any] = deque()
        self.fate = "nothing"

    # the executor

    def submit(self, job: Job, slot: Slot | None) -> None:
        taken = {other.index for _, other, _ in self.jobs.values() if other is not None}
        assert job.id not in self.jobs and (slot is None or slot.index not in taken)
        how = "result" if job.kind != "trial" else self.data.draw(ENDS)
        self.jobs[job.id] = (job, slot, how)
        if job.kind == "trial":
            self.begun.append(job.id)

    def poll(self, timeout: float) -> list[Any]:
        self.now += 1.0
        self.fate = self.data.draw(FATES) if self.fates else "nothing"
        self.fates -= self.fate != "nothing"
        if self.fate == "death":
            raise Death
        if self.jobs and not self.events:
            name = self.data.draw(st.sampled_from(sorted(self.jobs)))
            if self.jobs[name][2] != "hang":
                self.end(name)
        events, self.events = list(self.events), deque()
        return events

    def end(self, name: str) -> None:
        job, _, how = self.jobs.pop(name)
        said: list[dict[str, Any]] = []
        if how in ("result", "no score", "mute"):
            WHOLE({"kind": job.kind, "payload": dict(job.payload)}, said.append)
        if how == "mute":  # it ended well, and then its template died
            self.events += [*(Message(name, body) for body in said), Lost(name)]
            return
        if how == "no score":
            said[-1] = {**said[-1], "score": float("nan")}
        if how in ("oom", "nan", "invalid"):
            said = [{"type": "failed", "reason": how, "message": how, "error": None}]
        if how == "exception":
            said = [{"type": "failed", "reason": "crash", "message": how, "error": None}]
        self.events += [Message(name, body) for body in said]
        if how == "garbage":
            self.events.append(died(name, "it wrote garbage"))
        self.events.append({
            "crash": Exited(name, None, 11, 1.0),
            "exit": Exited(name, 0, None, 1.0),
            "kernel": Exited(name, None, 9, 1.0, True),
            "garbage": Exited(name, None, 9, 1.0),
            "lost": Lost(name),
            "taken": Lost(name, True),
            "killed": Exited(name, None, 15, 1.0),
        }.get(how, Exited(name, 0, None, 1.0)))  # fmt: skip

    def kill(self, name: str) -> None:
        if name in self.jobs:
            job, slot, _ = self.jobs[name]
            self.jobs[name] = (job, slot, "killed")
            self.end(name)

    def need(self, more: bool) -> None:
        """Slots stay."""

    def cpu_seconds(self, name: str) -> float | None:
        return 0.0

    # the surroundings

    def stop(self) -> str | None:
        return self.fate if self.fate in (FINISH, NOW) else None

    def lacks_room(self) -> str | None:
        return "it is full" if self.fate == "full" else None

    def ended(self, trial: Any) -> None: ...
    def tick(self) -> None: ...


def run(journal: Journal, world: World, first: bool) -> str:
    made = driver(
        journal,
        None,
        executor=world,
        trials=TRIALS,
        discovery={} if first else None,
        confirm=lambda history: plan(history, Confirmation(1, 2), 7),
        supervisor=Supervisor(None, 20.0, world.cpu_seconds, lambda: world.now),
        surroundings=world,
        clock=lambda: world.now,
        sleep=lambda _: None,
    )
    return made.run()


WIDE = settings(
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@settings(WIDE, max_examples=40)
@given(st.data(), st.integers(1, 3))
def test_whatever_happens_every_trial_of_the_plan_ends_once(
    tmp_path_factory: Any, data: st.DataObject, slots: int
) -> None:
    check(tmp_path_factory, data, slots)


@pytest.mark.faults
@pytest.mark.timeout(1200)
@settings(WIDE, max_examples=600)
@given(st.data(), st.integers(1, 3))
def test_the_same_six_hundred_times(tmp_path_factory: Any, data: st.DataObject, slots: int) -> None:
    check(tmp_path_factory, data, slots)


def check(tmp_path_factory: Any, data: st.DataObject, slots: int) -> None:
    from search.errors import SpaceError, StudyStopped

    path: Path = tmp_path_factory.mktemp("machine") / "journal.sqlite"
    world = World(data, slots)
    known: dict[int, Trial] = {}  # what was recorded as ended stays as it is
    ended = ""
    with Journal.create(path, {}) as journal:
        pass
    for _ in range(60):
        world.restart()
        with Journal.open(path) as journal:
            first = not any(event.kind == "space" for event in journal.events())
            try:
                ended = run(journal, world, first)
            except (Death, StudyStopped):
                ended = ""
            except SpaceError:  # the baseline never got through its preflight: no study began
                return
            memory = journal.history()
        with Journal.open(path, read_only=True) as reader:
            assert reader.history() == memory
            for trial in reader.history():
                if trial.number in known:
                    assert trial == known[trial.number]
                elif trial.state.is_finished:
                    known[trial.number] = trial
        if ended in ("complete", "exhausted"):
            break
    assert ended == "complete"

    with Journal.open(path, read_only=True) as reader:
        trials = reader.history()
        assert len(searched(trials)) == TRIALS and all(t.state.is_finished for t in trials)
        assert [t.number for t in trials] == list(range(len(trials)))
        complete = {t.number for t in trials if t.state is TrialState.COMPLETE}
        assert complete == {number for number, _ in reader.guards()}  # each once, and with its guard score
        states: dict[int, TrialState] = {}
        for event in reader.events():
            if event.kind != "trial":
                continue
            trial = Trial.from_json(event.body)
            if trial.number in states:
                assert trial.state in TRANSITIONS[states[trial.number]]
            states[trial.number] = trial.state
        for trial in trials:
            assert all(count <= RETRIES[reason] for reason, count in trial.retries.items())
            if trial.state is TrialState.FAILED and trial.reason and trial.message != "exception":
                assert trial.retries.get(trial.reason, 0) == RETRIES[trial.reason]
            steps = [r.step for r in reader.reports(trial.number) if r.attempt == trial.attempt]
            assert steps == sorted(set(steps))
            if trial.state is TrialState.COMPLETE:
                assert steps == [1, 2]
    assert len(world.begun) == len(set(world.begun))  # no attempt began twice

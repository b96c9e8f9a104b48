"""The journal: what it lets happen, what it remembers, who may read it when, and what its file survives."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from search.definition.space import Space
from search.errors import DiskFull, RequestError, StudyFailed
from search.record import journal_copy, journal_file
from search.record.journal import Journal
from search.trial import TRANSITIONS, Report, Trial, TrialState

ROOT = Path(__file__).resolve().parent.parent


def ask(name: str, value: int, high: int = 8) -> dict[str, Any]:
    """What a build asked for, as a trial's process sends it."""
    domain = {
        "kind": "int",
        "low": 1,
        "high": high,
        "step": 1,
        "sampling": "linear",
        "values": [],
        "default": 1,
    }
    return {"name": name, "conditions": [], "domain": domain, "value": value}


def running(number: int, attempt: int = 0, **fields: Any) -> Trial:
    return Trial(number, TrialState.RUNNING, attempt=attempt, **{"started": 1.0, "seed": number} | fields)


def complete(trial: Trial, loss: float = 0.5) -> Trial:
    return trial.moved(TrialState.COMPLETE, score=-loss, loss=loss, ended=2.0, epochs=3, best_epoch=2)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    with Journal.create(path, {"study": {"name": "digits"}}) as made:
        yield made


class TestStates:
    def test_a_trial_is_there_as_soon_as_begin_returns(self, journal: Journal, path: Path) -> None:
        journal.begin(running(0, params={"units": 3, "rate": 0.1, "bias": True, "act": "relu"}))
        with Journal.open(path, read_only=True) as reader:
            (trial,) = reader.history()
        assert trial.state is TrialState.RUNNING
        assert [type(value) for value in trial.params.values()] == [int, float, bool, str]

    def test_what_is_read_equals_what_was_written(self, journal: Journal, path: Path) -> None:
        trial = running(0, memo={"x": [1.5, math.inf, None]}, extra={"devices": ["GPU-1"], "pair": (1, 2)})
        journal.begin(trial)
        journal.finish(complete(trial, loss=0.1 + 0.2))
        with Journal.open(path) as again:
            assert again.history() == journal.history()
            (found,) = again.history()
        assert found.loss == 0.1 + 0.2
        assert found.extra["pair"] == [1, 2]  # JSON has no tuples, in memory either

    @pytest.mark.parametrize(
        ("act", "words"),
        [
            (lambda j: j.begin(Trial(1)), "must be RUNNING"),
            (lambda j: j.begin(running(-1)), "starts WAITING or RUNNING"),
            (lambda j: j.begin(running(0)), "cannot go from RUNNING to RUNNING"),
            (lambda j: j.begin(running(2, history_length=99)), "claims 99"),
            (lambda j: j.finish(running(0)), "must be COMPLETE, PRUNED or FAILED"),
            (lambda j: j.finish(complete(running(7))), "starts WAITING or RUNNING"),
            (lambda j: j.finish(complete(running(0, attempt=1))), "in attempt 0, but attempt 1 would end"),
            (lambda j: j.finish(complete(running(0, seed=5))), "seed of trial 0 was recorded"),
            (lambda j: j.finish(complete(running(0, memo=[1]))), "memo of trial 0 was recorded"),
            (lambda j: j.finish(complete(running(1))), "cannot go from COMPLETE to COMPLETE"),
            (lambda j: j.queue(Trial(1, seed=1)), "cannot go from COMPLETE to WAITING"),
            (lambda j: j.report([Report(0, 1, 1, 1.0, {})]), "never began"),
            (lambda j: j.report([Report(9, 0, 1, 1.0, {})]), "never began"),
            (lambda j: j.guard(0, 3, 0.5), "never began"),
            (lambda j: j.grow([ask("units", 2)], 1), "only a running trial can ask"),
            (lambda j: j.grow([ask("units", 2)], 9), "only a running trial can ask"),
        ],
    )
    def test_what_cannot_be_is_refused_and_leaves_no_trace(
        self, journal: Journal, path: Path, act: Callable[[Journal], None], words: str
    ) -> None:
        journal.begin(running(0))
        journal.begin(running(1))
        journal.finish(complete(running(1)))
        before, length = journal.history(), journal.length
        with pytest.raises(ValueError, match=words):
            act(journal)
        with Journal.open(path) as again:
            assert journal.history() == again.history() == before
            assert journal.length == again.length == length
            assert again.reports() == ()

    def test_a_value_that_is_no_json_is_refused_before_anything_is_written(self, journal: Journal) -> None:
        with pytest.raises(TypeError):
            journal.begin(running(0, memo={1, 2}))
        assert journal.history() == ()

    def test_a_lost_trial_runs_again_under_its_number(self, journal: Journal) -> None:
        first = running(0, params={"units": 2})
        journal.begin(first)
        journal.queue(first.moved(TrialState.WAITING, message="its process was lost"))
        with pytest.raises(ValueError, match="attempt 0 of trial 0 has run; the next one is 1"):
            journal.begin(first)
        journal.begin(running(0, attempt=1, params={"units": 2}))
        journal.finish(complete(running(0, attempt=1, params={"units": 2})))
        assert [trial.attempt for trial in journal.history()] == [1]

    def test_a_later_attempt_ends_one_that_was_never_heard_of_again(self, journal: Journal) -> None:
        journal.begin(running(0))
        journal.begin(running(0, attempt=1))
        states = [event.body["state"] for event in journal.events()]
        assert states == ["RUNNING", "WAITING", "RUNNING"]  # each step as the table of transitions has it

    def test_an_enqueued_trial_may_fail_without_running(self, journal: Journal) -> None:
        journal.queue(Trial(0))
        journal.finish(Trial(0).moved(TrialState.FAILED, reason="invalid"))
        assert journal.history()[0].reason == "invalid"

    def test_one_commit_is_all_or_nothing(self, journal: Journal, path: Path) -> None:
        journal.begin(running(0))
        with pytest.raises(RuntimeError), journal.one_commit():
            journal.report([Report(0, 0, 1, 1.0, {"loss": 1.0})])
            journal.finish(complete(running(0)))
            raise RuntimeError
        with Journal.open(path, read_only=True) as reader:
            assert reader.history() == journal.history() == (running(0),)
            assert reader.reports() == ()
            with journal.one_commit():
                journal.guard(0, 0, 0.25)
                journal.finish(complete(running(0)))
                assert reader.history() == (running(0),)
            assert reader.history() == journal.history() == (complete(running(0)),)


class TestReports:
    def test_they_come_back_in_order_and_where_one_left_off(self, journal: Journal) -> None:
        for number in (0, 1):
            journal.begin(running(number))
        journal.report([Report(0, 0, 1, 1.0, {"loss": 1.0}), Report(1, 0, 1, 1.5, {"loss": math.nan})])
        journal.report([Report(0, 0, 2, 2.0, {"loss": math.inf})])
        assert [(one.trial, one.step) for one in journal.reports()] == [(0, 1), (1, 1), (0, 2)]
        assert [(one.trial, one.step) for one in journal.reports(after=2)] == [(0, 2)]
        assert [one.step for one in journal.reports(trial=0)] == [1, 2]
        assert [one.step for one in journal.reports(trial=0, after=1)] == [2]
        assert math.isnan(journal.reports(trial=1)[0].metrics["loss"])
        assert journal.reports(trial=0)[1].metrics["loss"] == math.inf

    def test_the_first_of_two_for_one_step_stands(self, journal: Journal) -> None:
        journal.begin(running(0))
        journal.report([Report(0, 0, 1, 1.0, {"loss": 1.0})])
        journal.report([Report(0, 0, 1, 2.0, {"loss": 9.0}), Report(0, 0, 2, 2.0, {"loss": 0.5})])
        assert [one.metrics["loss"] for one in journal.reports()] == [1.0, 0.5]
        assert [one.metrics["loss"] for one in journal.reports(after=1)] == [0.5]

    def test_late_ones_are_kept_and_none_is_part_of_the_history(self, journal: Journal) -> None:
        journal.begin(running(0))
        journal.finish(complete(running(0)))
        length = journal.length
        journal.report([Report(0, 0, 4, 3.0, {"loss": 1.0})])
        assert journal.length == length
        assert len(journal.reports()) == 1


class TestSpace:
    def test_it_grows_by_what_trials_ask_for(self, journal: Journal, path: Path) -> None:
        found = Space.empty().grown([ask("units", 1)])
        journal.adopt(found)
        journal.begin(running(0))
        grown = journal.grow([ask("units", 2), ask("depth", 3)], 0)
        assert list(grown.parameters) == ["units", "depth"]
        assert journal.history()[0].params == {"units": 2, "depth": 3}
        with Journal.open(path) as again:
            assert again.space() == journal.space() == grown
            assert again.space(0) == Space.empty()
            assert again.space(1) == found
            assert again.history(2)[0].params == {}

    def test_what_teaches_nothing_is_recorded_once_per_attempt(self, journal: Journal) -> None:
        journal.adopt(Space.empty().grown([ask("units", 1)]))
        journal.begin(running(0, params={"units": 1}))
        space = journal.space()
        for _ in range(3):
            assert journal.grow([ask("units", 1)], 0) is space
        kinds = [event.kind for event in journal.events()]
        assert kinds == ["space", "trial", "asks"]
        assert journal.events(2)[0].body["asks"] == []
        journal.begin(running(0, attempt=1, params={"units": 1}))
        journal.grow([ask("units", 1)], 0)
        assert [event.kind for event in journal.events(3)] == ["trial", "trial", "asks"]


def test_guard_scores_are_no_part_of_any_history(journal: Journal, path: Path) -> None:
    secret = 0.7182818284
    journal.begin(running(0))
    journal.guard(0, 0, secret, {"losses": "guard.npy"})
    journal.finish(complete(running(0)))
    assert journal.guards() == {(0, 0): (secret, {"losses": "guard.npy"})}
    with pytest.raises(ValueError, match="has its guard score"):
        journal.guard(0, 0, 0.5)
    # Not only is it absent from the answers: history never so much as reads the table.
    asked: list[str] = []
    with Journal.open(path, read_only=True) as reader:
        reader._connection.set_trace_callback(asked.append)
        seen = json.dumps([trial.to_json() for trial in reader.history()])
        seen += json.dumps([event.body for event in reader.events()]) + repr(reader.reports())
    assert str(secret) not in seen
    assert asked and not any("guards" in query for query in asked)


def test_guard_scores_may_be_no_number(journal: Journal) -> None:
    journal.begin(running(0))
    journal.guard(0, 0, math.nan)
    assert math.isnan(journal.guards()[0, 0][0])


def test_meta_values_are_replaced_and_know_when(path: Path) -> None:
    now = [10.0]
    with Journal.create(path, {"study": {"tags": {"a": "b"}}}, clock=lambda: now[0]) as journal:
        assert journal.get("state") is None
        assert journal.get("state", "RUNNING") == "RUNNING"
        assert journal.put_at("state") is None
        now[0] = 11.5
        journal.put("state", "RUNNING")
        now[0] = 12.5
        journal.put("state", "COMPLETE")
        assert journal.get("state") == "COMPLETE"
        assert (journal.put_at("study"), journal.put_at("state")) == (10.0, 12.5)


class Life(RuleBasedStateMachine):
    """Whatever is asked of a journal, legal or not, in any order."""

    numbers = st.integers(-1, 3)
    attempts = st.integers(0, 2)

    @initialize()
    def start(self) -> None:
        self.folder = Path(os.environ["HELDOUT_TEST_FOLDER"])
        self.path = self.folder / "journal.sqlite"
        for old in self.folder.iterdir():
            old.unlink()
        self.journal = Journal.create(self.path, {})
        self.seen: list[tuple[Trial, ...]] = [()]
        self.spaces = [Space.empty()]
        self.reports: tuple[Report, ...] = ()

    def attempt(self, act: Callable[[], object]) -> None:
        """Does it or is refused; either way what was known before must still be."""
        length, before = self.journal.length, self.journal.history()
        try:
            act()
        except ValueError:
            assert (self.journal.length, self.journal.history()) == (length, before)
            return
        assert self.journal.length >= length
        for number in range(length + 1, self.journal.length + 1):
            self.seen.append(self.journal.history(number))
            self.spaces.append(self.journal.space(number))

    @rule(number=numbers, attempt=attempts, seed=st.integers(0, 1), seen=st.integers(0, 12))
    def begin(self, number: int, attempt: int, seed: int, seen: int) -> None:
        self.attempt(lambda: self.journal.begin(running(number, attempt, seed=seed, history_length=seen)))

    @rule(index=st.integers(0, 3), attempt=attempts, state=st.sampled_from(TrialState))
    def move(self, index: int, attempt: int, state: TrialState) -> None:
        known = self.journal.history()
        base = known[index] if index < len(known) else Trial(index)
        values = {"loss": 0.5, "score": 0.5, "reason": "crash", "attempt": attempt}
        trial = dataclasses.replace(base, state=state, **values)
        act = {TrialState.WAITING: self.journal.queue, TrialState.RUNNING: self.journal.begin}
        self.attempt(lambda: act.get(state, self.journal.finish)(trial))

    @rule(
        number=st.none() | numbers,
        names=st.lists(st.sampled_from("abc"), unique=True),
        value=st.integers(1, 8),
    )
    def grow(self, number: int | None, names: list[str], value: int) -> None:
        self.attempt(lambda: self.journal.grow([ask(name, value) for name in names], number))

    @rule(number=numbers, attempt=attempts, step=st.integers(1, 3))
    def report(self, number: int, attempt: int, step: int) -> None:
        self.attempt(lambda: self.journal.report([Report(number, attempt, step, 1.0, {"loss": 1.0})]))
        now = self.journal.reports()
        assert now[: len(self.reports)] == self.reports
        self.reports = now

    @rule(number=numbers, attempt=attempts)
    def guard(self, number: int, attempt: int) -> None:
        self.attempt(lambda: self.journal.guard(number, attempt, 0.5))

    @rule(key=st.sampled_from("ab"), value=st.integers(0, 2))
    def put(self, key: str, value: int) -> None:
        self.attempt(lambda: self.journal.put(key, value))
        assert self.journal.get(key) == value

    @rule(size=st.integers(0, 400))
    def tear(self, size: int) -> None:
        """Cuts off the end of the second record, as a killed process or a full disk does."""
        copy = journal_copy.beside(self.path)
        copy.write_bytes(copy.read_bytes()[: -size or None])
        self.journal.put("torn", size)

    @rule()
    def abandon(self) -> None:
        """A group of writes that is called off."""

        def act() -> None:
            with self.journal.one_commit():
                self.journal.put("a", "called off")
                self.journal.begin(running(len(self.journal.history())))
                raise ValueError

        self.attempt(act)

    @rule()
    def reopen(self) -> None:
        self.journal.close()
        self.journal = Journal.open(self.path)

    @invariant()
    def memory_and_file_agree(self) -> None:
        with Journal.open(self.path, read_only=True) as reader:
            assert reader.history() == self.journal.history() == self.seen[-1]
            assert reader.space() == self.journal.space() == self.spaces[-1]
            assert reader.length == self.journal.length == len(self.seen) - 1
            assert reader.reports() == self.reports

    @invariant()
    def the_second_record_agrees(self) -> None:
        copied, rows = journal_copy.read(self.path), journal_copy.load(self.journal._connection)
        assert copied is not None and copied.is_sound
        assert copied.rows == rows
        assert copied.last == copied.bound == journal_copy.length(rows)
        assert len(rows["events"]) == self.journal.length

    @invariant()
    def every_prefix_is_what_it_was(self) -> None:
        with Journal.open(self.path, read_only=True) as reader:
            for length in (*range(len(self.seen)), len(self.seen) // 2):
                assert reader.history(length) == self.seen[length]
                assert reader.space(length) == self.spaces[length]

    @invariant()
    def every_step_was_legal(self) -> None:
        for before, after in zip(self.seen, self.seen[1:], strict=False):
            states = {trial.number: trial.state for trial in before}
            assert [trial.number for trial in after] == sorted({trial.number for trial in after})
            assert set(states) <= {trial.number for trial in after}
            changed = [t for t in after if t not in before]
            assert len(changed) <= 1
            for trial in changed:
                if trial.number not in states:
                    assert not trial.state.is_finished
                elif trial.state is not states[trial.number]:
                    assert trial.state in TRANSITIONS[states[trial.number]]
                else:  # only what it asked for became known
                    assert trial.state is TrialState.RUNNING

    def teardown(self) -> None:
        if hasattr(self, "journal"):
            self.journal.close()


def test_no_sequence_of_events_leaves_an_illegal_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    monkeypatch.setenv("HELDOUT_TEST_FOLDER", str(tmp_path))
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    limits = settings(max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=checks)
    run_state_machine_as_test(Life, settings=limits)


class TestReaders:
    def test_one_reads_whole_states_while_another_process_writes(self, journal: Journal, path: Path) -> None:
        code = """
import sys
from pathlib import Path
from search.record.journal import Journal
seen = 0
with Journal.open(Path(sys.argv[1]), read_only=True) as journal:
    while journal.get("state") != "COMPLETE":
        trials = journal.history()
        # What one commit joined is seen together: whoever has ended has reported.
        ended = {trial.number for trial in trials if trial.state.is_finished}
        later = {one.trial for one in journal.reports()}
        assert ended <= later, (ended, later)
        assert [trial.number for trial in trials] == list(range(len(trials)))
        seen += 1
    assert len(journal.history()) == 150
print(seen)
"""
        reader = subprocess.Popen(
            [sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        try:
            for number in range(150):
                journal.begin(running(number))
                with journal.one_commit():
                    journal.report([Report(number, 0, 1, 1.0, {"loss": 1.0})])
                    journal.finish(complete(running(number)))
            journal.put("state", "COMPLETE")
            assert reader.wait(60) == 0
        finally:
            reader.kill()
            reader.wait()
            assert reader.stdout is not None
            reader.stdout.close()

    def test_a_reader_in_the_midst_of_a_read_holds_nobody_up(self, journal: Journal, path: Path) -> None:
        for number in range(5):
            journal.begin(running(number))
        with sqlite3.connect(path) as other:
            rows = other.execute("SELECT * FROM events")
            rows.fetchone()  # a read that is not over
            journal.begin(running(5))
            rows.close()
        other.close()

    def test_it_may_not_write(self, journal: Journal, path: Path) -> None:
        with Journal.open(path, read_only=True) as reader:
            for act in (lambda: reader.begin(running(0)), lambda: reader.put("a", 1)):
                with pytest.raises(ValueError, match="read-only"):
                    act()
        assert journal.history() == ()

    def test_it_reads_a_finished_study_in_a_folder_that_it_may_not_write(self, path: Path) -> None:
        with Journal.create(path, {"state": "COMPLETE"}) as journal:
            journal.begin(running(0))
        path.parent.chmod(0o555)
        try:
            with Journal.open(path, read_only=True) as reader:
                assert len(reader.history()) == 1
        finally:
            path.parent.chmod(0o755)

    def test_an_answer_costs_the_new_events_only(self, journal: Journal, path: Path) -> None:
        with Journal.open(path, read_only=True) as reader:
            journal.begin(running(0))
            first = reader.history()
            assert reader.history() is first
            journal.begin(running(1))
            assert reader.history()[0] is first[0]

    def test_another_thread_has_its_own(self, journal: Journal) -> None:
        caught: list[Exception] = []

        def use() -> None:
            try:
                journal.get("study")
            except Exception as error:
                caught.append(error)

        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
        assert isinstance(caught[0], sqlite3.ProgrammingError)


class TestFile:
    def test_every_commit_is_synced(self, journal: Journal) -> None:
        settings = {
            name: journal._connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("journal_mode", "synchronous")
        }
        assert settings == {"journal_mode": "wal", "synchronous": 2}

    def test_a_killed_writer_loses_nothing_that_it_had_been_told(self, path: Path) -> None:
        code = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
from test_journal import complete, running
from search.record.journal import Journal
journal = Journal.create(Path(sys.argv[1]), {})
for number in range(100_000):
    journal.begin(running(number))
    journal.finish(complete(running(number)))
    print(number, flush=True)
"""
        writer = subprocess.Popen(
            [sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        for line in writer.stdout:
            if int(line) == 40:
                writer.send_signal(signal.SIGKILL)
                break
        rest = [int(line) for line in writer.stdout if line.endswith("\n")]
        writer.stdout.close()
        writer.wait()
        told = max([40, *rest])
        with Journal.open(path) as journal:
            ended = [trial.number for trial in journal.history() if trial.state is TrialState.COMPLETE]
            assert ended[: told + 1] == list(range(told + 1))
            assert len(journal.history()) <= told + 3
            journal.begin(running(len(journal.history())))

    def test_creating_it_twice_is_refused(self, journal: Journal, path: Path) -> None:
        with pytest.raises(RequestError, match="must not have a journal"):
            Journal.create(path, {})
        assert journal.get("study") == {"name": "digits"}

    def test_creating_it_where_nobody_can_write_leaves_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(RequestError, match="must be writable"):
            Journal.create(tmp_path / "file" / "journal.sqlite", {})
        with pytest.raises(TypeError):
            Journal.create(tmp_path / "journal.sqlite", {"study": {1, 2}})
        assert [item.name for item in tmp_path.iterdir()] == ["file"]

    def test_one_that_is_not_there(self, path: Path) -> None:
        with pytest.raises(RequestError, match="there is no .*journal.sqlite"):
            Journal.open(path, read_only=True)
        assert not path.exists()

    @pytest.mark.parametrize("read_only", [True, False])
    @pytest.mark.parametrize("content", [b"", b"not SQLite at all, but long enough to be read" * 100])
    def test_one_that_is_something_else(self, path: Path, content: bytes, read_only: bool) -> None:
        path.write_bytes(content)
        with pytest.raises(RequestError, match="must be a (readable )?journal"):
            Journal.open(path, read_only=read_only)
        assert path.read_bytes() == content

    def test_one_of_a_newer_version(self, journal: Journal, path: Path) -> None:
        journal._connection.execute(f"PRAGMA user_version = {journal_file.SCHEMA_VERSION + 1}")
        for read_only in (True, False):
            with pytest.raises(RequestError, match="written by a newer Heldout .* upgrade heldout"):
                Journal.open(path, read_only=read_only)

    def test_one_with_an_event_that_cannot_be(self, journal: Journal, path: Path) -> None:
        journal.begin(running(0))
        text = json.dumps(complete(running(3)).to_json())
        journal._connection.execute("INSERT INTO events VALUES (2, 1.0, 'trial', 3, ?)", (text,))
        with pytest.raises(RequestError, match="must be a readable journal, but: a trial starts"):
            Journal.open(path, read_only=True)

    def test_a_page_overwritten_is_found_on_opening(self, path: Path) -> None:
        with Journal.create(path, {}) as journal:
            for number in range(60):
                journal.begin(running(number, extra={"text": "x" * 500}))
        content = bytearray(path.read_bytes())
        content[8192:12288] = os.urandom(4096)
        path.write_bytes(content)
        with pytest.raises(RequestError, match="must be a readable journal"):
            Journal.open(path)

    def test_two_writers_cannot_interleave(self, journal: Journal, path: Path) -> None:
        journal.begin(running(0))
        with Journal.open(path) as other:
            journal.begin(running(1))
            with pytest.raises(StudyFailed, match="no other driver runs this study"):
                other.begin(running(2))
        assert [trial.number for trial in journal.history()] == [0, 1]


def test_what_finds_no_room_says_so_and_can_be_written_later(journal: Journal, path: Path) -> None:
    journal.begin(running(0))
    # SQLite's own way to have no room left.
    pages = journal._connection.execute("PRAGMA page_count").fetchone()[0]
    journal._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(DiskFull, match="could not be written .*full") as caught:
        journal.finish(dataclasses.replace(complete(running(0)), extra={"text": "x" * 100_000}))
    assert "\n" not in str(caught.value)
    assert journal.history() == (running(0),)
    journal.finish(complete(running(0)))
    with Journal.open(path) as again:
        assert again.history() == (complete(running(0)),)


def test_a_new_file_is_whole_without_a_log(path: Path) -> None:
    """A log's way into the file, at closing, fails in silence where there is no room: so there must be none."""
    journal_file.make(path, {"meta": [("key", "1", 0.0, 1)]})
    assert path.read_bytes()[18:20] == b"\x01\x01"  # SQLite's mark of a rollback journal
    assert [file.name for file in path.parent.iterdir() if "-" in file.name or "new" in file.name] == []
    with Journal.open(path) as journal:
        assert journal._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert journal.get("key") == 1


class TestGathering:
    """Many writes in one commit, that histories show before the file has them."""

    def test_what_is_gathered_is_in_the_history_at_once_and_in_the_file_with_the_commit(
        self, journal: Journal, path: Path
    ) -> None:
        journal.begin(running(0))
        with journal.gathering():
            journal.finish(complete(running(0)))
            journal.guard(0, 0, 0.25)
            journal.begin(running(1))
            seen, length = journal.history(), journal.length
            assert journal.history(1) == (running(0),) and len(journal.events()) == length
            assert [event.id for event in journal.events(1)] == list(range(2, length + 1))
            with Journal.open(path, read_only=True) as reader:
                assert reader.history() == (running(0),) and reader.guards() == {}
        assert journal.has_gathered
        journal.commit([Report(1, 0, 1, 5.0, {"loss": 1.0})])
        assert not journal.has_gathered
        with Journal.open(path) as again:
            assert again.history() == seen == (complete(running(0)), running(1)) and again.length == length
            assert again.guards() == {(0, 0): (0.25, None)} and len(again.reports()) == 1
        copied = journal_copy.read(path)
        assert copied is not None and copied.is_sound and len(copied.rows["events"]) == length

    def test_a_later_write_takes_along_what_was_gathered(self, journal: Journal, path: Path) -> None:
        with journal.gathering():
            journal.begin(running(0))
            journal.put("state", "RUNNING")
            assert not journal.has_gathered
            journal.finish(complete(running(0)))
        journal.begin(running(1))
        with Journal.open(path, read_only=True) as reader:
            assert reader.history() == (complete(running(0)), running(1))

    def test_what_goes_wrong_inside_takes_back_its_own_writes_alone(self, journal: Journal) -> None:
        with journal.gathering():
            journal.begin(running(0))
            with pytest.raises(KeyboardInterrupt), journal.one_commit():
                journal.finish(complete(running(0)))
                raise KeyboardInterrupt
            assert journal.history() == (running(0),)
            with pytest.raises(ValueError, match="attempt 0 of trial 0 has run|cannot go from"):
                journal.begin(running(0))
            assert journal.history() == (running(0),)
            journal.guard(0, 0, 0.5)
            with pytest.raises(ValueError, match="already"):
                journal.guard(0, 0, 0.5)
        journal.commit()
        assert journal.history() == (running(0),) and journal.length == 1

    def test_a_full_disk_costs_nothing_that_was_gathered(self, journal: Journal, path: Path) -> None:
        journal.begin(running(0))
        pages = journal._connection.execute("PRAGMA page_count").fetchone()[0]
        with journal.gathering():
            journal.finish(dataclasses.replace(complete(running(0)), extra={"text": "x" * 100_000}))
            journal.begin(running(1))
        seen = journal.history()
        journal._connection.execute(f"PRAGMA max_page_count = {pages}")
        for _ in range(2):
            with pytest.raises(DiskFull):
                journal.commit()
            assert journal.history() == seen and journal.has_gathered
        with Journal.open(path, read_only=True) as reader:
            assert reader.history() == (running(0),)
        journal._connection.execute(f"PRAGMA max_page_count = {1 << 30}")
        journal.commit()
        with Journal.open(path) as again:
            assert again.history() == seen

    def test_nothing_is_gathered_in_a_journal_that_is_only_read(self, journal: Journal, path: Path) -> None:
        journal.begin(running(0))
        with Journal.open(path, read_only=True) as reader, reader.gathering():
            with pytest.raises(ValueError, match="read-only"):
                reader.finish(complete(running(0)))

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_an_interrupt_around_the_commit_neither_loses_nor_repeats_it(
        self, journal: Journal, path: Path, monkeypatch: pytest.MonkeyPatch, when: str
    ) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        with journal.gathering():
            journal.begin(running(0))
        with monkeypatch.context() as patch:
            patch.setattr(*((journal, "report") if when == "before" else (journal_copy, "_write")), interrupt)
            with pytest.raises(KeyboardInterrupt):
                journal.commit()
        assert journal.has_gathered == (when == "before") and journal.history() == (running(0),)
        journal.put("state", "STOPPED")
        with Journal.open(path) as again:
            assert again.history() == (running(0),) and again.length == 1 and again.get("state") == "STOPPED"

    def test_one_commit_that_is_made_now_has_all_or_nothing_also_of_what_is_put(self, journal: Journal) -> None:
        with journal.gathering():
            journal.begin(running(0))
            with pytest.raises(RuntimeError), journal.one_commit(now=True):
                journal.queue(Trial(1, state=TrialState.WAITING))
                journal.put("preflight", {})
                raise RuntimeError
            assert journal.history() == (running(0),) and journal.get("preflight") is None
            with journal.one_commit(now=True):
                journal.queue(Trial(1, state=TrialState.WAITING))
                journal.put("preflight", {})
            assert not journal.has_gathered and len(journal.history()) == 2 and journal.get("preflight") == {}

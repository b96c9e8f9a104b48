"""The journal's second record, its backup, and its upgrades: they agree with SQLite whatever happens."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from search.errors import DamagedError, RequestError
from search.record import journal_copy, journal_file
from search.record.journal import Journal
from search.trial import Report, TrialState
from tests.conftest import ROOT
from tests.test_journal import ask, complete, running


@pytest.fixture
def path(tmp_path: Path) -> Path:
    folder = tmp_path / "digits"
    folder.mkdir()
    return folder / "journal.sqlite"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    with Journal.create(path, {"study": {"name": "digits"}}) as made:
        yield made


def copied(path: Path) -> journal_copy.Content:
    found = journal_copy.read(path)
    assert found is not None
    return found


def agrees(journal: Journal) -> journal_copy.Content:
    """The copy, after checking that it is sound and has what SQLite has."""
    found = copied(journal.path)
    assert found.is_sound and found.rows == journal_copy.load(journal._connection)
    assert found.last == journal_copy.length(found.rows)
    return found


class TestCopy:
    def test_it_has_every_event_guard_score_and_put_but_no_report(self, journal: Journal, path: Path) -> None:
        journal.begin(running(0))
        journal.grow([ask("units", 2)], 0)
        journal.report([Report(0, 0, 1, 1.0, {"loss": 0.123456})])
        with journal.one_commit():
            journal.guard(0, 0, float("nan"))
            journal.finish(complete(running(0)))
        journal.put("state", "RUNNING")
        journal.put("state", "COMPLETE")
        assert agrees(journal).last == 7
        text = journal_copy.beside(path).read_text()
        assert [json.loads(line)["seq"] for line in text.splitlines()] == list(range(1, 8))
        assert "0.123456" not in text and "NaN" in text
        assert stat.S_IMODE(journal_copy.beside(path).stat().st_mode) == 0o600

    def test_one_commit_is_one_append_and_a_commit_of_reports_none(
        self, journal: Journal, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        journal.begin(running(0))
        appended: list[int] = []
        write = journal_copy._write

        def count(file: int, lines: Any) -> None:
            appended.append(len(lines))
            write(file, lines)

        monkeypatch.setattr(journal_copy, "_write", count)
        journal.report([Report(0, 0, 1, 1.0, {"loss": 1.0})])
        assert appended == []
        with journal.one_commit():
            journal.guard(0, 0, 0.5)
            journal.finish(complete(running(0)))
            journal.put("state", "COMPLETE")
        assert appended == [3]

    def test_what_is_called_off_is_in_neither(self, journal: Journal) -> None:
        with pytest.raises(RuntimeError), journal.one_commit():
            journal.begin(running(0))
            journal.put("state", "RUNNING")
            raise RuntimeError
        assert agrees(journal).last == 1
        journal.begin(running(0))
        assert agrees(journal).last == 2

    @pytest.mark.parametrize(
        "harm",
        [
            lambda file: file.unlink(),
            lambda file: file.write_bytes(b""),
            lambda file: file.write_bytes(file.read_bytes()[:-7]),
            lambda file: file.write_bytes(file.read_bytes()[:100]),
            lambda file: file.write_bytes(file.read_bytes().replace(b"RUNNING", b"WALKING", 1)),
            lambda file: file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[::2])),
            lambda file: file.write_bytes(b"\x00\xff not ours \n" * 20),
        ],
    )
    @pytest.mark.parametrize("is_open", [True, False])
    def test_a_torn_changed_or_missing_one_is_made_whole_from_sqlite(
        self, path: Path, harm: Callable[[Path], None], is_open: bool
    ) -> None:
        with Journal.create(path, {"study": 1}) as journal:
            for number in range(3):
                journal.begin(running(number))
            if is_open:  # as by somebody else while the driver runs: the next commit notices
                harm(journal_copy.beside(path))
                journal.put("state", "RUNNING")
                if not copied(path).is_sound:  # changed without a change of its size: the next opening notices
                    journal.close()
                    journal = Journal.open(path)
                agrees(journal)
                journal.close()
        if not is_open:
            harm(journal_copy.beside(path))
            with Journal.open(path, read_only=True) as reader:
                assert len(reader.history()) == 3
            with Journal.open(path) as again:
                agrees(again)

    @pytest.mark.parametrize("read_only", [True, False])
    def test_what_sqlite_lost_is_noticed_and_counted(self, path: Path, read_only: bool) -> None:
        with Journal.create(path, {"study": 1}) as journal:
            journal.begin(running(0))
            before = path.read_bytes(), path.with_name("journal.sqlite-wal").read_bytes()
            journal.begin(running(1))
            journal.finish(complete(running(0)))
            journal.guard(0, 0, 0.5)
            journal.put("state", "COMPLETE")
        path.write_bytes(before[0])
        path.with_name("journal.sqlite-wal").write_bytes(before[1])
        with pytest.raises(DamagedError, match="but 4 records are missing .* of 2 trials; run `heldout repair digits`"):
            Journal.open(path, read_only=read_only)
        assert path.with_name("journal.sqlite-wal").read_bytes() == before[1]  # a damaged journal is left as it is

    def test_a_torn_line_tells_of_a_record_that_sqlite_must_have(self, path: Path) -> None:
        with Journal.create(path, {"study": 1}) as journal:
            journal.begin(running(0))
            before = path.read_bytes(), path.with_name("journal.sqlite-wal").read_bytes()
            journal.begin(running(1))
        path.write_bytes(before[0])
        path.with_name("journal.sqlite-wal").write_bytes(before[1])
        copy = journal_copy.beside(path)
        copy.write_bytes(copy.read_bytes()[:-50])  # both lost the end of the last record
        with pytest.raises(DamagedError, match="1 records are missing"):
            Journal.open(path)

    def test_a_value_that_sqlite_has_otherwise_is_noticed(self, path: Path) -> None:
        with Journal.create(path, {"study": 1}) as journal:
            journal.begin(running(0))
            journal.finish(complete(running(0), loss=0.5))
        with sqlite3.connect(path) as other:
            other.execute("UPDATE events SET body = replace(body, '\"loss\":0.5', '\"loss\":0.4')")
        other.close()
        with pytest.raises(DamagedError, match="missing or changed, of 1 trial;"):
            Journal.open(path, read_only=True)

    @pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
    def test_trouble_with_it_fails_no_commit_and_is_made_good_at_the_next(
        self, journal: Journal, path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
    ) -> None:
        def fail(file: int, lines: Any) -> None:
            os.write(file, b"".join(lines)[:20])
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(journal_copy, "_write", fail)
            for number in range(2):
                if isinstance(error, OSError):
                    journal.begin(running(number))
                else:  # it is the driver's to hear of, and what SQLite took stays
                    with pytest.raises(KeyboardInterrupt):
                        journal.begin(running(number))
            with Journal.open(path, read_only=True) as reader:
                assert [trial.number for trial in reader.history()] == [0, 1]
        assert not copied(path).is_sound
        journal.report([Report(0, 0, 1, 1.0, {"loss": 1.0})])  # any commit will do
        agrees(journal)
        assert not list(path.parent.glob("*.new"))

    def test_readers_that_open_while_another_process_writes_find_no_fault(self, journal: Journal, path: Path) -> None:
        code = """
import sys
from pathlib import Path
from search.record.journal import Journal
opened = 0
while True:
    with Journal.open(Path(sys.argv[1]), read_only=True) as journal:
        opened += 1
        if journal.get("state") == "COMPLETE":
            break
print(opened)
"""
        command = [sys.executable, "-c", code, str(path)]
        reader = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            for number in range(200):
                journal.begin(running(number))
                with journal.one_commit():
                    journal.guard(number, 0, 0.5)
                    journal.finish(complete(running(number)))
                journal.put("progress", number)
            journal.put("state", "COMPLETE")
            assert reader.wait(60) == 0
        finally:
            reader.kill()
            reader.wait()
            assert reader.stdout is not None
            reader.stdout.close()


WRITER = """
import sys
from pathlib import Path
from search.record.journal import Journal
from search.trial import Report, Trial, TrialState
path = Path(sys.argv[1])
journal = Journal.open(path) if path.exists() else Journal.create(path, {"study": {}})
print("ready", flush=True)
for number in range(len(journal.history()), 100_000):
    trial = Trial(number, TrialState.RUNNING, started=1.0)
    journal.begin(trial)
    journal.put("running", number)
    with journal.one_commit():
        journal.report([Report(number, 0, 1, 1.0, {"loss": 1.0})])
        journal.guard(number, 0, 0.5)
        journal.finish(trial.moved(TrialState.COMPLETE, loss=0.5, score=0.5))
    print(number, flush=True)
"""


def kill_writers(path: Path, seeds: range) -> None:
    """Kills one writer after the other, each at a moment of its own, and opens what it left."""
    told = -1
    for seed in seeds:
        rng = random.Random(seed)
        lines, more = rng.randint(0, 15), rng.random() / 50
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        try:
            said = [writer.stdout.readline() for _ in range(lines + 1)]
            threading_wait(more)
        finally:
            writer.send_signal(signal.SIGKILL)
            said += writer.stdout.readlines()
            writer.stdout.close()
            writer.wait()
        assert said[0] == "ready\n", said
        told = max([told, *(int(line) for line in said[1:] if line.endswith("\n"))])
        seen = copied(path)
        with Journal.open(path) as journal:
            rows = journal_copy.load(journal._connection)
            behind = journal_copy.length(rows) - seen.last
            print(f"seed {seed}: killed after trial {told}; the copy was {behind} behind, sound: {seen.is_sound}")
            # SQLite has all that the copy has, and at most one commit more: a group of two here.
            assert 0 <= behind <= 2 and seen.bound <= journal_copy.length(rows)
            agrees(journal)
            ended = [trial.number for trial in journal.history() if trial.state is TrialState.COMPLETE]
            assert ended[: told + 1] == list(range(told + 1))
            assert {number for number, _ in journal.guards()} == set(ended)
            for trial in journal.history():
                if not trial.state.is_finished:  # as a resume would
                    journal.begin(running(trial.number, trial.attempt + 1, seed=0))
                    journal.guard(trial.number, trial.attempt + 1, 0.5)
                    journal.finish(complete(running(trial.number, trial.attempt + 1, seed=0)))


def threading_wait(seconds: float) -> None:
    """The moment of the kill is what is random here; nothing is waited for."""
    import threading

    threading.Event().wait(seconds)


def test_killed_writers_leave_a_copy_that_agrees(path: Path) -> None:
    kill_writers(path, range(4))


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_fifty_killed_writers_leave_a_copy_that_agrees(path: Path) -> None:
    kill_writers(path, range(100, 150))


# ── upgrades ─────────────────────────────────────────────────────────────────────────────────────

VERSION_1 = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL, at REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE events (
    id INTEGER PRIMARY KEY, at REAL NOT NULL, kind TEXT NOT NULL, trial INTEGER, body TEXT NOT NULL
);
CREATE TABLE reports (
    id INTEGER PRIMARY KEY, trial INTEGER NOT NULL, attempt INTEGER NOT NULL, step INTEGER NOT NULL,
    at REAL NOT NULL, metrics TEXT NOT NULL, UNIQUE (trial, attempt, step)
);
CREATE TABLE guards (
    trial INTEGER NOT NULL, attempt INTEGER NOT NULL, at REAL NOT NULL, body TEXT NOT NULL,
    PRIMARY KEY (trial, attempt)
) WITHOUT ROWID;
PRAGMA application_id = 0x48454C44;
PRAGMA user_version = 1;
"""


@pytest.fixture
def old(path: Path) -> Path:
    """A journal as the release before wrote it."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.executescript(VERSION_1)
    meta = [("study", '{"name":"digits"}', 1.0), ("state", '"RUNNING"', 5.0), ("prepared", "{}", 1.0)]
    connection.executemany("INSERT INTO meta VALUES (?, ?, ?)", meta)
    trial = running(0)
    for number, body in enumerate((trial, complete(trial), running(1)), 1):
        row = (number, float(number), "trial", body.number, json.dumps(body.to_json()))
        connection.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?)", row)
    connection.execute("INSERT INTO reports VALUES (1, 0, 0, 1, 1.5, '{\"loss\":1.0}')")
    connection.execute("INSERT INTO guards VALUES (0, 0, 2.0, '{\"value\":0.5,\"extra\":null}')")
    connection.close()
    return path


def schema(path: Path) -> tuple[int, list[Any]]:
    with sqlite3.connect(path) as connection:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        tables = (*journal_copy.COLUMNS, "reports")
        columns = [connection.execute(f"PRAGMA table_info({name})").fetchall() for name in tables]
    connection.close()
    return version, columns


class TestUpgrade:
    def test_a_journal_of_version_1_is_brought_up_to_date(self, old: Path, tmp_path: Path) -> None:
        with Journal.open(old) as journal:
            assert [trial.state for trial in journal.history()] == [TrialState.COMPLETE, TrialState.RUNNING]
            assert (journal.get("state"), journal.put_at("state"), len(journal.reports())) == ("RUNNING", 5.0, 1)
            assert journal.guards() == {(0, 0): (0.5, None)}
            journal.finish(complete(running(1)))
            journal.put("state", "COMPLETE")
            rows = agrees(journal).rows["meta"]
            assert {key: row[3] for key, row in rows.items()} == {"prepared": 1, "study": 2, "state": 4}
        Journal.create(tmp_path / "new.sqlite", {}).close()
        assert schema(old) == schema(tmp_path / "new.sqlite")
        assert schema(journal_file.backup_of(old))[0] == 1

    def test_it_is_read_as_it_is_by_who_only_reads(self, old: Path) -> None:
        before = old.read_bytes()
        with Journal.open(old, read_only=True) as journal:
            assert len(journal.history()) == 2 and journal.get("state") == "RUNNING"
        assert old.read_bytes() == before
        assert [file.name for file in old.parent.iterdir() if "-" not in file.name] == ["journal.sqlite"]

    def test_every_older_version_has_a_way_to_this_one(self) -> None:
        assert sorted(journal_file.MIGRATIONS) == list(range(1, journal_file.SCHEMA_VERSION))

    def test_a_version_to_come_is_reached_in_one_go(self, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        more = {2: ("CREATE TABLE notes (id INTEGER PRIMARY KEY)", "INSERT INTO notes VALUES (7)")}
        monkeypatch.setattr(journal_file, "MIGRATIONS", journal_file.MIGRATIONS | more)
        monkeypatch.setattr(journal_file, "SCHEMA_VERSION", 3)
        with Journal.open(old) as journal:
            assert journal._connection.execute("SELECT id FROM notes").fetchall() == [(7,)]
            assert agrees(journal).version == 3
        monkeypatch.undo()
        with pytest.raises(RequestError, match="journal schema 3, this one knows 2"):
            Journal.open(old, read_only=True)

    def test_one_that_fails_leaves_the_file_as_it_was(self, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        more = {2: ("DELETE FROM events", "ALTER TABLE reports RENAME TO epochs", "INSERT INTO nowhere VALUES (1)")}
        before = old.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(journal_file, "MIGRATIONS", journal_file.MIGRATIONS | more)
            patch.setattr(journal_file, "SCHEMA_VERSION", 3)
            with pytest.raises(RequestError, match="from journal schema 1 to 3, but: no such table: nowhere"):
                Journal.open(old)
        assert old.read_bytes() == before
        with Journal.open(old) as journal:
            assert len(journal.history()) == 2

    def test_there_is_no_upgrade_without_a_backup(self, old: Path) -> None:
        journal_file.backup_of(old).mkdir()
        before = old.read_bytes()
        with pytest.raises(RequestError, match="a backup must be written to .*journal.backup.sqlite"):
            Journal.open(old)
        assert old.read_bytes() == before


class TestBackup:
    def test_it_is_a_whole_journal_in_one_file(self, journal: Journal, path: Path) -> None:
        journal.begin(running(0))
        kept = journal_file.back_up(path)  # while the journal is open, its last commits in the log
        assert kept.name == "journal.backup.sqlite" and stat.S_IMODE(kept.stat().st_mode) == 0o600
        journal.finish(complete(running(0)))
        assert not [file for file in path.parent.iterdir() if file.name.startswith(f"{kept.name}-")]
        alone = path.parent / "elsewhere"
        alone.mkdir()
        with Journal.open(kept.rename(alone / "journal.sqlite"), read_only=True) as backup:
            assert backup.history() == (running(0),)

    @pytest.mark.parametrize("harm", ["journal.sqlite", "journal.sqlite-wal"])
    def test_a_torn_journal_does_not_take_a_good_backup_s_place(self, path: Path, harm: str) -> None:
        with Journal.create(path, {}) as journal:
            for number in range(30):
                journal.begin(running(number, extra={"text": "x" * 500}))
            before = journal_file.back_up(path).read_bytes()
            torn = {name: path.with_name(name).read_bytes() for name in ("journal.sqlite", "journal.sqlite-wal")}
        torn[harm] = torn[harm][: len(torn[harm]) // 2]
        for name, content in torn.items():
            path.with_name(name).write_bytes(content)
        with pytest.raises(DamagedError, match="run `heldout repair digits`"):
            journal_file.back_up(path)
        assert journal_file.backup_of(path).read_bytes() == before

    def test_it_tells_of_a_loss_where_the_second_record_is_gone(self, path: Path) -> None:
        with Journal.create(path, {}) as journal:
            journal.begin(running(0))
            journal._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            early = path.read_bytes()
            journal.begin(running(1))
            journal_file.back_up(path)
        path.write_bytes(early)
        journal_copy.beside(path).unlink()
        with pytest.raises(DamagedError, match="journal.backup.sqlite has, but 1 of its records"):
            Journal.open(path)

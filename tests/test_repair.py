"""Damaged journals: noticed in one line, or whole; and what `heldout repair` brings back of them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from search.definition.space import Space
from search.errors import DamagedError, HeldoutError, RequestError, StudyError
from search.record import journal_copy, journal_file, salvage
from search.record.journal import Journal
from search.record.lock import locked
from search.record.repairing import lines, repair
from search.study import Study, names
from search.tracker import publishing
from search.trial import Report, Trial, TrialState
from tests.conftest import ROOT, Heldout
from tests.test_journal import ask, complete, running
from tests.tiny import write_space

SQLITE, WAL = journal_file.NAME, f"{journal_file.NAME}-wal"
COPY, BACKUP = "journal.copy.jsonl", "journal.backup.sqlite"
TRACKING = publishing.STATE_FILE
TRIALS = 24


@dataclass(frozen=True)
class Truth:
    """What was recorded, and the folders that hold it: as a killed process leaves them, and closed."""

    folders: dict[str, Path]
    finished: tuple[Trial, ...]
    events: list[Any]
    guards: dict[Any, Any]
    meta: dict[str, Any]
    reports: int


def fill(journal: Journal, numbers: range) -> None:
    """A life as the driver records it: every kind of end, a retry, guard scores, meta values put again and again."""
    for number in numbers:
        trial = running(number, memo={"n": number}, history_length=journal.length, extra={"text": "x" * 300})
        journal.begin(trial)
        journal.grow([ask("units", 1 + number % 8), ask(f"depth_{number % 5}", 1)], number)
        if number % 7 == 3:
            trial = running(number, 1, memo=trial.memo, history_length=trial.history_length)
            journal.begin(trial)
        with journal.one_commit():
            journal.report([Report(number, trial.attempt, step, 1.0, {"loss": 1.0 / step}) for step in (1, 2, 3)])
            if number % 6 == 5:
                journal.finish(trial.moved(TrialState.FAILED, reason="crash", message="SIGSEGV", ended=2.0))
            else:
                journal.guard(number, trial.attempt, number / 100, {"losses": f"{number:04d}.npy"})
                journal.finish(complete(trial, loss=1.0 / (number + 1)))
        journal.put("state", "RUNNING")


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    root = tmp_path_factory.mktemp("studies")
    made = root / "made"
    made.mkdir()
    with Journal.create(made / SQLITE, {"study": {"name": "s", "config": {"space": "s", "trials": TRIALS}}}) as journal:
        journal.adopt(Space.empty().grown([ask("units", 1)]))
        fill(journal, range(10))
        journal_file.back_up(journal.path)
        journal._connection.execute("PRAGMA wal_checkpoint")
        fill(journal, range(10, TRIALS))
        journal.begin(running(TRIALS))
        (made / TRACKING).write_text(
            json.dumps({"experiment_id": "1", "runs": {"0": "a", "1": "b"}, "published": 9, "behind": 0, "error": None})
        )
        shutil.copytree(made, root / "killed", ignore=shutil.ignore_patterns("*-shm"))
        recorded = Truth(
            {"killed": root / "killed", "closed": root / "closed"},
            tuple(trial for trial in journal.history() if trial.state.is_finished),
            journal.events(),
            journal.guards(),
            {key: journal.get(key) for key in ("study", "state")},
            len(journal.reports()),
        )
    shutil.copytree(made, root / "closed")
    assert (root / "killed" / WAL).stat().st_size > 50_000 and not (root / "closed" / WAL).exists()
    assert len(recorded.finished) == TRIALS
    return recorded


@pytest.fixture
def study(truth: Truth, tmp_path: Path) -> Study:
    """A whole study in a workspace of its own."""
    return there(truth, "killed", tmp_path)


def there(truth: Truth, state: str, workspace: Path, name: str = "s") -> Study:
    folder = workspace / "studies" / name
    shutil.copytree(truth.folders[state], folder)
    return Study.at(folder)


def finished(study: Study) -> tuple[Trial, ...]:
    with Journal.open(study.folder / SQLITE) as journal:
        return tuple(trial for trial in journal.history() if trial.state.is_finished)


def is_all_there(study: Study, truth: Truth) -> None:
    """All but reports, which have no second record."""
    with Journal.open(study.folder / SQLITE) as journal:
        assert journal.events() == truth.events
        assert journal.guards() == truth.guards
        assert {key: journal.get(key) for key in truth.meta} == truth.meta
        copied = journal_copy.compare(journal.path, journal._connection)
        assert copied is not None and copied.is_sound


def files(folder: Path) -> dict[str, bytes]:
    """What lies in a study's folder, but for its lock and for what SQLite keeps for those who read."""
    content = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and "lock" not in path.name}
    return {name: text for name, text in content.items() if not name.endswith("-shm") and (name != WAL or text)}


# ── damage at random ─────────────────────────────────────────────────────────────────────────────


def cut(content: bytes, rng: random.Random) -> bytes | None:
    return content[: rng.randrange(len(content))]


def flip(content: bytes, rng: random.Random) -> bytes | None:
    out = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def blank(content: bytes, rng: random.Random) -> bytes | None:
    """A sector that was never written."""
    start = rng.randrange(len(content)) // 512 * 512
    return content[:start] + bytes(len(content[start : start + 512])) + content[start + 512 :]


def remove(content: bytes, rng: random.Random) -> bytes | None:
    return None


def harm(folder: Path, chosen: list[str], rng: random.Random) -> list[str]:
    done = []
    for name in chosen:
        path = folder / name
        how = rng.choice([cut, cut, cut, flip, flip, blank, remove])
        content = how(path.read_bytes(), rng)
        path.unlink() if content is None else path.write_bytes(content)
        done.append(f"{how.__name__} {name}")
    return done


def outcome(study: Study) -> HeldoutError | None:
    """How opening it for writing ends."""
    try:
        Journal.open(study.folder / SQLITE).close()
    except HeldoutError as error:
        assert "\n" not in str(error) and len(str(error)) < 400 and "number" not in str(error)
        return error
    return None


def survive(study: Study, truth: Truth, seed: int, several: bool) -> str:
    """Harms the study's files as the seed says, and checks that nothing is lost without a word."""
    rng = random.Random(seed)
    have = [name for name in (SQLITE, WAL, COPY, BACKUP, TRACKING) if (study.folder / name).exists()]
    chosen = rng.sample(have, rng.randint(2, 3)) if several else [have[seed % len(have)]]
    done = harm(study.folder, chosen, rng)
    print(f"seed {seed}: {', '.join(done)}", end="")
    # What is left in any file, for the cases in which some of it is nowhere.
    copied = journal_copy.read(study.folder / SQLITE) or journal_copy.Content()
    left = salvage.salvage(copied, [study.folder / SQLITE, study.folder / BACKUP])
    ended = [] if left is None else [
        Trial.from_json(json.loads(row[4]))
        for row in left.tables["events"].values()
        if row[2] == "trial" and TrialState(json.loads(row[4])["state"]).is_finished
    ]
    everything = not ({SQLITE, WAL} & set(chosen) and COPY in chosen)
    assert not everything or tuple(sorted(ended, key=lambda trial: trial.number)) == truth.finished
    publishing.read(study.folder)
    with contextlib.suppress(DamagedError), Journal.open(study.folder / SQLITE, read_only=True) as reader:
        seen = [trial for trial in reader.history() if trial.state.is_finished]
        assert all(trial in seen for trial in truth.finished) or not everything
    error = outcome(study)
    print(f" -> {'opens' if error is None else error}")
    if error is not None:
        if left is None:
            with pytest.raises(RequestError, match="none|neither"):
                repair(study)
            return "gone"
        repair(study)
    if everything:
        is_all_there(study, truth)
    has = finished(study)
    assert all(trial in has for trial in ended)
    assert all(trial in truth.finished for trial in has)
    return "opened" if error is None else "repaired"


def run(truth: Truth, folder: Path, seeds: range, several: bool = False) -> dict[str, int]:
    count: dict[str, int] = {}
    for seed in seeds:
        study = there(truth, "killed" if seed % 4 else "closed", folder / str(seed))
        how = survive(study, truth, seed, several)
        count[how] = count.get(how, 0) + 1
        shutil.rmtree(folder / str(seed))
    print(count)
    return count


def test_damage_to_one_file_is_noticed_or_does_no_harm(truth: Truth, tmp_path: Path) -> None:
    assert set(run(truth, tmp_path, range(10))) == {"opened", "repaired"}


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_two_hundred_cases_of_damage_lose_no_finished_trial(truth: Truth, tmp_path: Path) -> None:
    count = run(truth, tmp_path, range(1000, 1200))
    assert set(count) == {"opened", "repaired"} and min(count.values()) > 20


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_damage_to_several_files_at_once_costs_only_what_none_of_them_has(truth: Truth, tmp_path: Path) -> None:
    assert run(truth, tmp_path, range(2000, 2100), several=True)["repaired"] > 20


# ── repairing ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("state", ["killed", "closed"])
def test_a_healthy_journal_is_left_as_it_is(truth: Truth, tmp_path: Path, state: str) -> None:
    study = there(truth, state, tmp_path)
    before = files(study.folder)
    found = repair(study)
    assert found["healthy"] and found["kept"] == [] and found["missing"] == found["left_out"] == 0
    assert found["trials"] == {"complete": 20, "pruned": 0, "failed": 4, "in_flight": 1}
    assert (found["events"], found["guards"], found["reports"]) == (len(truth.events), 20, truth.reports)
    assert files(study.folder) == before
    assert lines(found)[0] == "s: the journal is whole; nothing is wrong with it"


def test_a_copy_that_is_behind_is_brought_up_to_date(study: Study, truth: Truth) -> None:
    (study.folder / COPY).unlink()
    found = repair(study)
    assert found["healthy"] and found["said"] == "its second record was torn or behind, and is whole again"
    assert repair(study)["said"] == "nothing is wrong with it"
    is_all_there(study, truth)


@pytest.mark.parametrize(("left", "has"), [([COPY], TRIALS), ([COPY, BACKUP], TRIALS), ([BACKUP], 10)])
def test_any_one_of_the_files_is_enough(study: Study, truth: Truth, left: list[str], has: int) -> None:
    for name in {SQLITE, WAL, COPY, BACKUP} - set(left):
        (study.folder / name).unlink()
    found = repair(study)
    assert not found["healthy"] and found["certain"] == (COPY in left)
    assert finished(study) == truth.finished[:has]
    if COPY in left:
        is_all_there(study, truth)
    assert repair(study)["healthy"]


def test_a_page_is_read_around(truth: Truth, tmp_path: Path) -> None:
    """Of SQLite's file alone, with a page of events overwritten: rows before and after it come back."""
    study = there(truth, "closed", tmp_path)
    for name in (COPY, BACKUP):
        (study.folder / name).unlink()
    content = bytearray((study.folder / SQLITE).read_bytes())
    page = content.index(b'"number":8') // 4096
    content[page * 4096 : (page + 1) * 4096] = b"\xff" * 4096
    (study.folder / SQLITE).write_bytes(content)
    found = repair(study)
    assert found["missing"] > 0 and not found["certain"]
    assert "nobody can tell whether more was recorded" in "\n".join(lines(found))
    has = [trial.number for trial in finished(study)]
    assert len(has) >= TRIALS - 5 and {0, TRIALS - 1} <= set(has)
    assert all(trial.loss == truth.finished[trial.number].loss for trial in finished(study))


@pytest.mark.parametrize("content", [b"", b"nothing of SQLite's" * 500, None])
def test_a_journal_that_is_empty_foreign_or_gone_is_made_anew(
    study: Study, truth: Truth, content: bytes | None
) -> None:
    (study.folder / SQLITE).unlink()
    if content is not None:
        (study.folder / SQLITE).write_bytes(content)
    with pytest.raises(DamagedError, match="run `heldout repair s`"):
        study.meta("study")
    found = repair(study)
    assert found["kept"] == [f"{SQLITE}.damaged"] * bool(content) + [f"{SQLITE}.damaged-wal"]
    is_all_there(study, truth)
    assert (study.folder / f"{SQLITE}.damaged-wal").stat().st_size > 50_000
    if content:
        assert (study.folder / f"{SQLITE}.damaged").read_bytes() == content


def test_another_database_in_its_place_is_kept_and_not_read(study: Study, truth: Truth) -> None:
    (study.folder / WAL).unlink()
    (study.folder / SQLITE).unlink()
    for expected in ("journal.sqlite.damaged", "journal.sqlite.damaged-2"):
        with sqlite3.connect(study.folder / SQLITE) as other:
            other.executescript("DROP TABLE IF EXISTS events; CREATE TABLE notes (text TEXT)")
            other.execute("PRAGMA application_id = 7")
        other.close()
        with pytest.raises(DamagedError, match="it is another SQLite file; run `heldout repair s`"):
            Journal.open(study.folder / SQLITE)
        assert repair(study)["kept"] == [expected]
        is_all_there(study, truth)


def test_nothing_to_salvage_is_one_line_and_changes_nothing(study: Study) -> None:
    for name in (SQLITE, WAL, COPY, BACKUP):
        (study.folder / name).write_bytes(b"\x00" * 5000)
    before = files(study.folder)
    with pytest.raises(RequestError, match="neither journal.sqlite nor .* has a record") as caught:
        repair(study)
    assert "\n" not in str(caught.value)
    assert files(study.folder) == before


def test_a_study_that_is_driven_is_not_repaired(study: Study) -> None:
    (study.folder / SQLITE).write_bytes(b"")
    with locked(study.folder), pytest.raises(StudyError, match="is being driven"):
        repair(study)


def test_a_journal_of_a_newer_version_is_not_touched(study: Study) -> None:
    with sqlite3.connect(study.folder / SQLITE) as connection:
        connection.execute("PRAGMA user_version = 9")
    connection.close()
    content = (study.folder / COPY).read_bytes()
    (study.folder / COPY).write_bytes(b"")  # which does not deny it
    before = files(study.folder)
    with pytest.raises(RequestError, match="written by a newer Heldout"):
        repair(study)
    assert files(study.folder) == before
    (study.folder / COPY).write_bytes(content)  # which knows that there was none
    assert "newer Heldout" in repair(study)["said"]


def test_what_is_not_the_files_fault_is_not_repaired(
    study: Study, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_file, "_BUSY_SECONDS", 0.1)
    before = files(study.folder)
    with contextlib.closing(sqlite3.connect(study.folder / SQLITE, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(RequestError, match="must be open to you, but: database is locked; see to its") as caught:
            repair(study)
        assert not isinstance(caught.value, DamagedError)
        assert files(study.folder) == before
        other.execute("ROLLBACK")
    is_all_there(study, truth)


def lose(study: Study, *numbers: int) -> None:
    """Takes events out of every file."""
    (study.folder / BACKUP).unlink()
    kept = [
        line
        for line in (study.folder / COPY).read_text().splitlines(keepends=True)
        if not (json.loads(line)["table"] == "events" and json.loads(line)["row"][0] in numbers)
    ]
    (study.folder / COPY).write_text("".join(kept))
    connection = sqlite3.connect(study.folder / SQLITE)
    connection.executemany("DELETE FROM events WHERE id = ?", [(number,) for number in numbers])
    connection.commit()
    connection.close()


def test_an_event_lost_in_all_files_costs_no_finished_trial(study: Study, truth: Truth) -> None:
    """Its number is filled; where it began a trial, by the beginning that the trial's end implies."""
    begun = {event.trial: event.id for event in reversed(truth.events) if event.kind == "trial"}
    ends = {event.trial: event.id for event in truth.events if event.kind == "trial"}
    lost = [begun[4], begun[4] + 1, begun[10] + 3, begun[12] + 1, ends[20]]  # trial 10 was begun again
    lose(study, *lost)
    with pytest.raises(DamagedError):
        Journal.open(study.folder / SQLITE)
    found = repair(study)
    assert (found["missing"], found["left_out"]) == (5, 0)
    has = {trial.number: trial for trial in finished(study)}
    assert set(has) == {trial.number for trial in truth.finished} - {20}
    assert all((trial.loss, trial.seed, trial.memo) == (has[n].loss, has[n].seed, has[n].memo) for n, trial in
               enumerate(truth.finished) if n != 20)
    with Journal.open(study.folder / SQLITE) as journal:
        assert journal.length == len(truth.events) and journal.guards() == truth.guards
        assert journal.history()[20].state is TrialState.RUNNING  # to be run again


def test_what_cannot_follow_is_left_out_and_said(study: Study, truth: Truth) -> None:
    """Without its beginning, and no lost event to put it in, a trial's end cannot be told from damage."""
    with sqlite3.connect(study.folder / SQLITE) as connection:
        row = (len(truth.events) + 1, 1.0, "trial", 99, json.dumps(complete(running(99)).to_json()))
        connection.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?)", row)
    connection.close()
    found = repair(study)
    assert (found["missing"], found["left_out"]) == (0, 1)
    assert finished(study) == truth.finished
    assert {f"{name}.damaged" for name in (SQLITE, COPY, BACKUP)} <= set(found["kept"])
    assert "1 were found and left out" in "\n".join(lines(found))


def test_a_complete_study_that_lost_a_record_can_be_resumed(study: Study) -> None:
    with Journal.open(study.folder / SQLITE) as journal:
        journal.put("state", "COMPLETE")
    lose(study, 12)
    assert repair(study)["missing"] == 1
    assert study.state == "STOPPED"


@pytest.mark.parametrize("moment", range(7))
def test_a_repair_that_is_killed_is_done_again(
    study: Study, truth: Truth, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rename and each removal is a moment at which a repair may end."""
    path = study.folder / SQLITE
    path.write_bytes(path.read_bytes()[:-9000])
    (study.folder / BACKUP).write_bytes(b"torn")
    left = iter(range(moment))

    def stopping(act: Callable[..., Any]) -> Callable[..., Any]:
        def stop(*arguments: Any, **more: Any) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return act(*arguments, **more)

        return stop

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopping(os.replace))
        with pytest.raises(KeyboardInterrupt):
            repair(study)
    repair(study)
    is_all_there(study, truth)
    assert repair(study)["healthy"]
    assert not [path.name for path in study.folder.iterdir() if ".new" in path.name or path.name.startswith(".")]


# ── the command line ─────────────────────────────────────────────────────────────────────────────


def test_status_shows_the_others_and_names_the_damaged_one(truth: Truth, tmp_path: Path, heldout: Heldout) -> None:
    for name in ("good", "torn", "gone"):
        there(truth, "killed", tmp_path, name)
    studies = tmp_path / "studies"
    (studies / "torn" / WAL).write_bytes((studies / "torn" / WAL).read_bytes()[:-60_000])
    (studies / "gone" / SQLITE).unlink()
    where = ("--workspace", str(tmp_path))
    assert sorted(names(tmp_path)) == ["gone", "good", "torn"]
    ran = heldout("status", *where)
    assert ran.returncode == 0 and ran.stderr == ""
    shown = {line.partition(":")[0]: line for line in ran.stdout.splitlines()}
    assert set(shown) == {"gone", "good", "torn"}
    assert "24 of 24 trials" in shown["good"]
    assert "records are missing" in shown["torn"] and "run `heldout repair torn`" in shown["torn"]
    assert "is not there; run `heldout repair gone`" in shown["gone"]
    alone = heldout("status", "torn", *where)
    assert alone.returncode == 2 and len(alone.stderr.splitlines()) == 1

    ran = heldout("repair", "torn", *where)
    assert ran.returncode == 0, ran.stderr
    assert "20 trials complete, 0 pruned, 4 failed and 1 in flight" in ran.stdout
    assert "journal.sqlite.damaged" in ran.stdout
    found = json.loads(heldout("repair", "gone", "--json", *where).stdout)
    assert found["trials"]["complete"] == 20 and not found["healthy"]
    states = {one["study"]: one["state"] for one in json.loads(heldout("status", "--json", *where).stdout)}
    assert states == dict.fromkeys(("gone", "good", "torn"), "STOPPED")


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_study_that_was_killed_and_torn_is_repaired_and_resumed(tmp_path: Path, heldout: Heldout) -> None:
    where = ("--workspace", str(tmp_path / "ws"))
    options = ["--trials", "8", "--epochs", "2", "--evaluate", "no", "--confirm", "0", "--workers", "1", "--study", "s"]
    command = [sys.executable, "-m", "search.cli", "launch", write_space(tmp_path), *options, *where]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    study = Study.at(tmp_path / "ws" / "studies" / "s")
    driver = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        done: list[Trial] = []
        while len(done) < 3 and driver.poll() is None:
            threading.Event().wait(0.1)
            with contextlib.suppress(HeldoutError):
                done = [trial for trial in study.trials if trial.state.is_finished]
    finally:
        driver.kill()
        driver.wait()
    done = [trial for trial in study.trials if trial.state.is_finished]
    assert 3 <= len(done) < 8
    with (study.folder / "tracking.lock").open() as file:  # the tracker catches up, and then lets go of the journal
        fcntl.flock(file, fcntl.LOCK_EX)
    log = study.folder / WAL
    log.write_bytes(log.read_bytes()[: log.stat().st_size // 3])
    for command in (["resume", "s"], ["report", "s"], ["status", "s"]):
        refused = heldout(*command, *where)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
        assert "run `heldout repair s`" in refused.stderr
    repaired = json.loads(heldout("repair", "s", "--json", *where).stdout)
    assert repaired["missing"] == repaired["left_out"] == 0
    assert [trial for trial in study.trials if trial.state.is_finished] == done
    resumed = heldout("resume", "s", "--json", *where)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["trials"]["complete"] == 8
    assert [trial for trial in study.trials if trial in done] == done

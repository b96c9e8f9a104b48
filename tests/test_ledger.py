"""The ledger: nothing is lost, nothing is forgotten, and a broken chain opens nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from search.data import Dataset, SealedRows, prepare
from search.errors import RequestError
from search.ledger import Ledger, default_path
from search.rows import fingerprint

ROWS = np.random.default_rng(0).integers(0, 2**63, 1000, dtype=np.uint64)


def enter(ledger, rows=ROWS, frozen="f", **more):
    return ledger.append({"fingerprint": fingerprint(rows), "frozen": frozen, **more}, rows)


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "deep" / "ledger.jsonl")


def test_openings_count_across_ledger_objects(ledger):
    assert ledger.openings(ROWS, fingerprint(ROWS)) == 0 and not ledger.path.exists()
    assert enter(ledger, study="a", models={"winner": "x"}, alpha=0.05) == 1
    assert enter(Ledger(ledger.path), frozen="g") == 2
    assert Ledger(ledger.path).openings(ROWS, fingerprint(ROWS)) == 2
    first = ledger.entries()[0]
    assert (first["number"], first["opening"], first["study"], first["models"]) == (
        1,
        1,
        "a",
        {"winner": "x"},
    )
    assert ledger.verify() == 2


def test_other_rows_have_their_own_count(ledger):
    enter(ledger)
    assert enter(ledger, ROWS[::-1] ^ np.uint64(1), "g") == 1


@pytest.mark.parametrize(("shared", "openings"), [(1000, 1), (999, 1), (200, 1), (199, 0), (0, 0)])
def test_an_overlap_of_a_fifth_inherits_the_openings(ledger, shared, openings):
    enter(ledger)
    fresh = np.random.default_rng(1).integers(0, 2**63, 1000, dtype=np.uint64)
    mixed = np.concatenate([ROWS[:shared], fresh[shared:]])
    assert ledger.openings(mixed, fingerprint(mixed)) == openings


def test_a_part_of_a_used_test_set_is_used(ledger):
    enter(ledger)
    assert ledger.openings(ROWS[:50], fingerprint(ROWS[:50])) == 1


def test_counts_are_handed_on_through_overlaps(ledger):
    enter(ledger)
    enter(ledger)
    grown = np.concatenate([ROWS[:500], ROWS[:500] ^ np.uint64(1)])
    assert enter(ledger, grown) == 3
    assert enter(ledger, grown[500:]) == 4  # shares no row with the first, but inherits through the second


def test_reordered_rows_are_the_same_rows(ledger, tmp_path):
    rng = np.random.default_rng(0)
    x, y, order = rng.normal(size=(300, 3)), rng.integers(0, 2, 300), rng.permutation(300)
    manifests = [prepare(Dataset(x[at], y[at]), tmp_path, 0, False) for at in (np.arange(300), order)]
    assert manifests[0]["digest"] != manifests[1]["digest"]
    first, second = (SealedRows(tmp_path / "sealed" / m["digest"]).row_hashes() for m in manifests)
    assert manifests[0]["fingerprint"] == manifests[1]["fingerprint"] == fingerprint(second)
    ledger.append({"fingerprint": manifests[0]["fingerprint"], "frozen": "f"}, first)
    assert ledger.openings(second, manifests[1]["fingerprint"]) == 1


def test_a_recorded_answer_is_found_by_what_was_frozen(ledger):
    assert ledger.find("f") is None
    number = enter(ledger)
    assert ledger.find("f") is None  # a crash between entry and result: it counts, and has no answer
    assert ledger.openings(ROWS, fingerprint(ROWS)) == 1
    result = {"winner": {"score": 0.9, "interval": [0.88, None]}, "verdicts": ["é"]}
    ledger.record_result(number, "f", result)
    assert ledger.find("f") == result and ledger.find("g") is None
    assert ledger.openings(ROWS, fingerprint(ROWS)) == 1  # a result is no opening
    with pytest.raises(ValueError, match="no opening 2"):
        ledger.record_result(2, "f", result)


def test_a_crash_after_the_entry_counts_as_an_opening(ledger):
    script = (
        "import sys, os, numpy as np; from pathlib import Path; from search.ledger import Ledger\n"
        "rows, entry = np.arange(9, dtype=np.uint64), {'fingerprint': 'x', 'frozen': 'f'}\n"
        "Ledger(Path(sys.argv[1])).append(entry, rows)\n"
        "os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(ledger.path)], check=False).returncode == -9
    assert ledger.openings(np.arange(9, dtype=np.uint64), "x") == 1
    assert ledger.append({"fingerprint": "x", "frozen": "f"}, np.arange(9, dtype=np.uint64)) == 2


def test_an_announced_opening_is_refused_when_another_study_was_faster(ledger):
    enter(ledger, frozen="other")
    before = ledger.path.read_bytes()
    with pytest.raises(RequestError, match="another study has opened them"):
        ledger.append({"fingerprint": fingerprint(ROWS), "frozen": "f"}, ROWS, expected=1)
    assert ledger.path.read_bytes() == before
    assert ledger.append({"fingerprint": fingerprint(ROWS), "frozen": "f"}, ROWS, expected=2) == 2


def _append_many(path: Path, barrier, name: str) -> None:
    barrier.wait()
    for turn in range(20):
        enter(Ledger(path), frozen=f"{name}-{turn}")


def test_processes_that_append_at_once_lose_nothing(ledger):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    processes = [context.Process(target=_append_many, args=(ledger.path, barrier, n)) for n in "abc"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    entries = ledger.entries()
    assert [entry["opening"] for entry in entries] == list(range(1, 61))
    assert {entry["frozen"] for entry in entries} == {
        f"{name}-{turn}" for name in "abc" for turn in range(20)
    }


def _change_a_word(lines):
    return [lines[0].replace("first", "worst"), *lines[1:]]


def _rehash(lines):
    import hashlib

    line = json.loads(lines[0])
    del line["hash"]
    line["frozen"] = "worst"
    digest = hashlib.sha256(json.dumps(line, sort_keys=True).encode()).hexdigest()
    return [json.dumps(line | {"hash": digest}), *lines[1:]]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (_change_a_word, 1),
        (_rehash, 2),
        (lambda lines: lines[1:], 1),
        (lambda lines: [lines[0], lines[2]], 2),
        (lambda lines: [lines[1], lines[0], lines[2]], 1),
        (lambda lines: [*lines[:2], lines[2][:-20]], 3),
        (lambda lines: [*lines, "{}"], 4),
        (lambda lines: [*lines, "[1]"], 4),
        (lambda lines: [lines[0], "", *lines[1:]], 2),
    ],
)
def test_a_broken_chain_refuses_everything_and_says_what_to_do(ledger, change, line):
    for frozen in ("first", "second", "third"):
        enter(ledger, frozen=frozen)
    broken = "\n".join(change(ledger.path.read_text().splitlines())) + "\n"
    ledger.path.write_text(broken)
    for ask in (
        ledger.verify,
        lambda: ledger.find("first"),
        lambda: ledger.openings(ROWS, fingerprint(ROWS)),
        lambda: enter(ledger),
        lambda: ledger.record_result(1, "first", {}),
    ):
        with pytest.raises(RequestError, match=f"but line {line} .*backup.*HELDOUT_LEDGER") as caught:
            ask()
        assert "\n" not in str(caught.value)
    assert ledger.path.read_text() == broken


def test_a_line_that_was_never_finished_is_not_passed_over(ledger):
    enter(ledger)
    ledger.path.write_bytes(ledger.path.read_bytes()[:-1])
    with pytest.raises(RequestError, match="line 1 was changed or cut short"):
        ledger.verify()


def test_lost_or_changed_row_files_are_a_broken_chain(ledger):
    enter(ledger)
    (file,) = Path(f"{ledger.path}.rows").iterdir()
    kept = file.read_bytes()
    np.save(file, ROWS[:-1])
    with pytest.raises(RequestError, match="line 1 names rows .* was changed"):
        ledger.verify()
    file.unlink()
    with pytest.raises(RequestError, match="cannot be read"):
        ledger.openings(ROWS, "another")
    file.write_bytes(kept)
    assert ledger.verify() == 1


def test_a_full_disk_enters_nothing(ledger):
    """A limit on file size stands in for the disk; it lets a part of the line through first."""
    for turn in range(3):
        enter(ledger, frozen=str(turn))
    before = ledger.path.read_bytes()
    script = (
        "import resource, sys, numpy as np; from pathlib import Path\n"
        "from search.errors import RequestError; from search.ledger import Ledger\n"
        "limit = int(sys.argv[2]); resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "rows, entry = np.arange(9, dtype=np.uint64), {'fingerprint': 'x', 'frozen': 'f'}\n"
        "try: Ledger(Path(sys.argv[1])).append(entry, rows)\n"
        "except RequestError as error: print(error)"
    )
    command = [sys.executable, "-c", script, str(ledger.path), str(len(before) + 50)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "nothing was opened" in done.stdout
    assert ledger.path.read_bytes() == before
    assert ledger.verify() == 3 and enter(ledger) == 4


def test_an_interrupt_while_writing_enters_nothing(ledger, monkeypatch):
    enter(ledger)
    before = ledger.path.read_bytes()

    def interrupted(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("search.ledger.os.fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            enter(ledger, frozen="g")
    assert ledger.path.read_bytes() == before


def test_a_ledger_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "ledger.jsonl", tmp_path):
        with pytest.raises(RequestError, match="HELDOUT_LEDGER") as caught:
            enter(Ledger(path))
        assert "\n" not in str(caught.value)


def test_entries_leave_the_chain_to_the_ledger(ledger):
    with pytest.raises(ValueError, match="opening"):
        ledger.append({"fingerprint": "x", "frozen": "f", "opening": 7}, ROWS)


def test_the_environment_moves_the_ledger(tmp_path, monkeypatch):
    monkeypatch.setenv("HELDOUT_LEDGER", str(tmp_path / "mine.jsonl"))
    enter(Ledger())
    assert (tmp_path / "mine.jsonl").exists()
    assert os.stat(tmp_path / "mine.jsonl").st_mode & 0o077 == 0
    monkeypatch.delenv("HELDOUT_LEDGER")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert default_path().name == "ledger.jsonl" and default_path().parent.name == "heldout"

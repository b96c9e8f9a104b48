"""The ledger: nothing is lost, nothing is forgotten, and a broken chain opens nothing."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from search.cli import main
from search.errors import DataError, RequestError
from search.guard.ledger import GuardUse, Ledger, default_path, lines
from search.tiers import split
from search.tiers.data import Dataset, SealedRows, prepare
from search.tiers.rows import fingerprint, id_hashes, row_hashes

ROWS = np.random.default_rng(0).integers(0, 2**63, 1000, dtype=np.uint64)


def enter(ledger, rows=ROWS, frozen="f", **more):
    return ledger.append({"fingerprint": fingerprint(rows), "frozen": frozen, **more}, rows)


def judge(ledger, study_id, trials, rows=ROWS, **more):
    ledger.record_guard(
        {
            "study_id": study_id,
            "study": f"study-{study_id}",
            "fingerprint": fingerprint(rows),
            "trials": trials,
            **more,
        },
        rows,
    )


def guard_use(ledger, study_id, rows=ROWS):
    return ledger.guard_use(rows, fingerprint(rows), study_id)


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "deep" / "ledger.jsonl")


def test_openings_count_across_ledger_objects(ledger):
    assert ledger.openings(ROWS, fingerprint(ROWS)) == 0 and not ledger.entries()
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
        "import sys, os, numpy as np; from search.guard.ledger import Ledger\n"
        "rows, entry = np.arange(9, dtype=np.uint64), {'fingerprint': 'x', 'frozen': 'f'}\n"
        "Ledger(sys.argv[1]).append(entry, rows)\n"
        "os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(ledger.path)], check=False).returncode == -9
    assert ledger.openings(np.arange(9, dtype=np.uint64), "x") == 1
    assert ledger.append({"fingerprint": "x", "frozen": "f"}, np.arange(9, dtype=np.uint64)) == 2


def test_an_announced_opening_is_refused_when_another_study_was_faster(ledger):
    enter(ledger, frozen="other")
    before = ledger.entries()
    with pytest.raises(RequestError, match="another study has opened them"):
        ledger.append({"fingerprint": fingerprint(ROWS), "frozen": "f"}, ROWS, expected=1)
    assert ledger.entries() == before
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
    assert {entry["frozen"] for entry in entries} == {f"{name}-{turn}" for name in "abc" for turn in range(20)}


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
        lambda: judge(ledger, "a", 3),
        lambda: guard_use(ledger, "a"),
        lambda: ledger.changed("spaces/a.py", ROWS, fingerprint(ROWS)),
        ledger.summary,
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
        "from search.errors import RequestError; from search.guard.ledger import Ledger\n"
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


@pytest.mark.parametrize("failing", ["write", "fsync"])
@pytest.mark.parametrize("what", ["opening", "guard", "result"])
def test_a_disk_that_fills_up_mid_line_leaves_the_file_whole(ledger, monkeypatch, failing, what):
    enter(ledger)
    before, write = ledger.path.read_bytes(), os.write

    def full(file, *content):
        if content and os.fstat(file).st_size == len(before):
            return write(file, content[0][:40])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    ask, said = {
        "opening": (lambda: enter(ledger, frozen="g"), "nothing was opened"),
        "guard": (lambda: judge(ledger, "a", 3), "nothing was entered"),
        # The seal is open by then, which the message must not deny.
        "result": (lambda: ledger.record_result(1, "f", {}), "opening 1 counts but its result was not kept"),
    }[what]
    with monkeypatch.context() as patch:
        patch.setattr(f"search.guard.chain.os.{failing}", full)
        with pytest.raises(RequestError, match=f"No space left on device; {said}, so make room"):
            ask()
    assert ledger.path.read_bytes() == before
    ask()
    assert ledger.verify() == 2


def test_a_full_disk_keeps_no_half_of_the_row_hashes(ledger, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("search.guard.chain.os.fsync", full)
        with pytest.raises(RequestError, match="nothing was opened"):
            enter(ledger)
    assert ledger.path.read_bytes() == b"" and os.listdir(f"{ledger.path}.rows") == []
    assert ledger.verify() == 0 and enter(ledger) == 1


def test_an_interrupt_while_writing_enters_nothing(ledger, monkeypatch):
    enter(ledger)
    before = ledger.path.read_bytes()

    def interrupted(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("search.guard.chain.os.fsync", interrupted)
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
    for reserved in ("opening", "prior", "rows", "hash"):
        with pytest.raises(ValueError, match=f"has \\['{reserved}'\\]"):
            ledger.append({"fingerprint": "x", "frozen": "f", reserved: 7}, ROWS)
        with pytest.raises(ValueError, match=reserved):
            ledger.record_guard({"study_id": "a", "fingerprint": "x", "trials": 3, reserved: 7}, ROWS)


def test_a_line_that_would_break_later_questions_is_refused(ledger):
    with pytest.raises(ValueError, match="no frozen"):
        ledger.append({"fingerprint": "x"}, ROWS)
    with pytest.raises(ValueError, match="no study_id, trials"):
        ledger.record_guard({"fingerprint": "x"}, ROWS)
    assert ledger.entries() == ()


def test_the_environment_moves_the_ledger(tmp_path, monkeypatch):
    monkeypatch.setenv("HELDOUT_LEDGER", str(tmp_path / "mine.jsonl"))
    enter(Ledger())
    assert (tmp_path / "mine.jsonl").exists()
    assert os.stat(tmp_path / "mine.jsonl").st_mode & 0o077 == 0
    monkeypatch.delenv("HELDOUT_LEDGER")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert default_path().name == "ledger.jsonl" and default_path().parent.name == "heldout"


def _append_once(path: Path, barrier, name: str) -> None:
    barrier.wait()
    enter(Ledger(path), frozen=name)


def test_two_processes_that_open_at_once_get_numbers_one_and_two(ledger):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    processes = [context.Process(target=_append_once, args=(ledger.path, barrier, name)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [(e["number"], e["opening"]) for e in ledger.entries()] == [(1, 1), (2, 2)]
    assert {e["frozen"] for e in ledger.entries()} == {"a", "b"} and ledger.verify() == 2


# ── openings from before the ledger, and what an opening may spend ───────────────────────────────


def test_openings_from_before_the_ledger_count(ledger):
    mark = fingerprint(ROWS)
    assert ledger.openings(ROWS, mark, prior=2) == 2
    assert ledger.append({"fingerprint": mark, "frozen": "f"}, ROWS, prior=2) == 3
    assert ledger.openings(ROWS, mark, prior=2) == ledger.openings(ROWS, mark) == 3
    assert ledger.append({"fingerprint": mark, "frozen": "g"}, ROWS, prior=2) == 4
    assert enter(ledger, frozen="h") == 5  # no longer saying so does not take them back
    assert ledger.append({"fingerprint": mark, "frozen": "i"}, ROWS, prior=9, expected=13) == 13
    assert [entry["prior"] for entry in ledger.entries()] == [2, 2, 0, 9]


def test_alpha_is_that_of_the_number_entered(ledger):
    spent = [0.0304, 0.0076]
    for frozen in "fg":
        ledger.append({"fingerprint": "x", "frozen": frozen}, ROWS, alpha=lambda number: spent[number - 1])
    assert [entry["alpha"] for entry in ledger.entries()] == spent
    with pytest.raises(IndexError):
        ledger.append({"fingerprint": "x", "frozen": "h"}, ROWS, alpha=lambda number: spent[number - 1])
    assert ledger.verify() == 2


# ── guard rows ───────────────────────────────────────────────────────────────────────────────────


def test_guard_rows_are_in_use_by_other_studies(ledger):
    assert guard_use(ledger, "a") == GuardUse(0, 0)
    judge(ledger, "a", 30)
    judge(ledger, "b", 12)
    assert guard_use(ledger, "a") == GuardUse(1, 12)
    assert guard_use(Ledger(ledger.path), "new") == GuardUse(2, 42)
    assert ledger.openings(ROWS, fingerprint(ROWS)) == 0  # judging by guard rows opens no test rows
    enter(ledger)
    assert guard_use(ledger, "new") == GuardUse(2, 42)  # and the other way round
    assert ledger.verify() == 3


def test_a_study_that_records_again_replaces_its_count(ledger):
    for trials in (30, 40, 40):
        judge(ledger, "a", trials)
    assert guard_use(ledger, "b") == GuardUse(1, 40)
    judge(ledger, "a", 10, ROWS ^ np.uint64(1))  # other rows: what these have judged stays judged
    assert guard_use(ledger, "b") == GuardUse(1, 40)
    assert guard_use(ledger, "b", ROWS ^ np.uint64(1)) == GuardUse(1, 10)


@pytest.mark.parametrize(("shared", "studies"), [(100, 1), (99, 1), (20, 1), (19, 0), (0, 0)])
def test_guard_rows_that_share_a_fifth_are_in_use(ledger, shared, studies):
    judge(ledger, "a", 5, ROWS[:100])
    mixed = np.random.default_rng(1).permutation(np.concatenate([ROWS[:shared], ROWS[500 : 600 - shared]]))
    assert guard_use(ledger, "b", mixed) == GuardUse(studies, 5 * studies)


def test_only_the_owner_may_read_row_hashes(ledger):
    judge(ledger, "a", 5)
    assert os.stat(f"{ledger.path}.rows").st_mode & 0o077 == 0


# ── the same data in another form ────────────────────────────────────────────────────────────────


def test_earlier_openings_by_a_module_whose_rows_have_changed_are_found(ledger):
    mine, other = "spaces/mine.py", ROWS ^ np.uint64(1)
    enter(ledger, frozen="old")  # an entry of an older version names no module
    enter(ledger, frozen="a", space=mine)
    enter(ledger, frozen="b", space="spaces/other.py")
    assert ledger.changed(mine, ROWS, fingerprint(ROWS)) == []
    assert ledger.changed(mine, other, fingerprint(other)) == [2]
    grown = np.concatenate([ROWS, other])
    assert ledger.changed(mine, grown, fingerprint(grown)) == []
    enter(ledger, other, "c", space=mine)
    assert ledger.changed(mine, other, fingerprint(other)) == [2]
    assert ledger.changed(mine, other ^ np.uint64(2), "x") == [2, 1]


def some_rows(n=400, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 3)), rng.integers(0, 2, n), np.array([f"case-{seed}-{k}" for k in range(n)])


def hashes_of(workspace, manifest, tier="test"):
    return SealedRows(workspace / "sealed" / manifest["digest"]).row_hashes(tier)


def test_rows_with_ids_are_known_again_when_rescaled(ledger, tmp_path):
    x, y, ids = some_rows()
    order = np.random.default_rng(1).permutation(len(x))[:-1]
    first = prepare(Dataset(x, y, ids=ids), tmp_path, 0, False)
    again = prepare(Dataset(2.54 * x[order], y[order], ids=ids[order]), tmp_path, 0, False)
    assert (first["identity"], again["identity"]) == ("ids", "ids")
    ledger.append({"fingerprint": first["fingerprint"], "frozen": "f"}, hashes_of(tmp_path, first))
    assert ledger.openings(hashes_of(tmp_path, again), again["fingerprint"]) == 1
    same = prepare(Dataset(2.54 * x, y, ids=ids), tmp_path, 0, False)
    for key in ("fingerprint", "guard_fingerprint"):
        assert same[key] == first[key]
    without = [prepare(Dataset(scale * x, y), tmp_path, 0, False) for scale in (1, 2.54)]
    assert without[0]["identity"] == "values" and without[0]["fingerprint"] != without[1]["fingerprint"]


def test_guard_and_test_rows_have_hashes_of_their_own(tmp_path):
    x, y, ids = some_rows()
    for dataset, known in ((Dataset(x, y, ids=ids), id_hashes(ids)), (Dataset(x, y), row_hashes([x, y]))):
        manifest = prepare(dataset, tmp_path, 0, False)
        guard, test = (hashes_of(tmp_path, manifest, tier) for tier in ("guard", "test"))
        assert (len(guard), len(test)) == (manifest["tiers"]["guard"], manifest["tiers"]["test"])
        assert np.isin(guard, known).all() and np.isin(test, known).all() and not np.isin(guard, test).any()
        assert (manifest["guard_fingerprint"], manifest["fingerprint"]) == (fingerprint(guard), fingerprint(test))
    with pytest.raises(ValueError, match="'train' was asked for"):
        hashes_of(tmp_path, manifest, "train")


@pytest.mark.parametrize(
    "ids",
    [
        np.arange(400),
        np.arange(1, 401, dtype=np.uint16),
        np.random.default_rng(0).permutation(400),
        np.arange(400.0),
        np.arange(400).astype(str),
    ],
    ids=["from-0", "from-1", "shuffled", "floats", "text"],
)
def test_running_numbers_do_not_name_rows(ledger, tmp_path, ids):
    """Two unrelated data sets have them both, and must not pass for one."""
    manifests = []
    for seed in (0, 1):
        x, y, _ = some_rows(seed=seed)
        manifests.append(prepare(Dataset(x, y, ids=ids), tmp_path, 0, False))
    assert [m["identity"] for m in manifests] == ["values", "values"]
    assert all("running numbers" in m["warnings"][-1] and "database" in m["warnings"][-1] for m in manifests)
    first, second = (hashes_of(tmp_path, m) for m in manifests)
    ledger.append({"fingerprint": manifests[0]["fingerprint"], "frozen": "f"}, first)
    assert ledger.openings(second, manifests[1]["fingerprint"]) == 0


@pytest.mark.parametrize(
    "ids",
    [np.arange(400) + 2, np.r_[np.arange(399), 400], np.arange(400) * 10, np.arange(400) / 2, some_rows()[2]],
    ids=["from-2", "a-gap", "tens", "halves", "names"],
)
def test_other_ids_name_rows(tmp_path, ids):
    x, y, _ = some_rows()
    manifest = prepare(Dataset(x, y, ids=ids), tmp_path, 0, False)
    assert manifest["identity"] == "ids" and not any("running" in warning for warning in manifest["warnings"])
    assert set(hashes_of(tmp_path, manifest).tolist()) <= set(id_hashes(ids).tolist())


@pytest.mark.parametrize("first", [0, 300], ids=["each-file", "one-file-cut"])
def test_running_numbers_of_supplied_tiers_do_not_name_rows(tmp_path, first):
    x, y, _ = some_rows()
    test = Dataset(x[300:], y[300:], ids=np.arange(first, first + 100))
    manifest = prepare(Dataset(x[:300], y[:300], ids=np.arange(300), test=test), tmp_path, 0, False)
    assert manifest["identity"] == "values" and "running numbers" in manifest["warnings"][-1]


@pytest.mark.parametrize(("first", "identity"), [(0, "values"), (5, "ids")])
def test_what_rows_are_known_by_moves_none_of_them(tmp_path, first, identity):
    x, y, _ = some_rows()
    ids = np.arange(400) + first
    manifest = prepare(Dataset(x, y, ids=ids), tmp_path, 0, False)
    assert manifest["identity"] == identity
    tiers = split.assign(row_hashes([x]), split.labels_of(y).codes, 0, split.sizes(400), ids=ids)
    known = id_hashes(ids) if identity == "ids" else row_hashes([x, y])
    assert hashes_of(tmp_path, manifest).tolist() == np.sort(known[tiers == split.TEST]).tolist()


def test_an_id_is_never_the_hash_of_a_value():
    numbers = np.arange(300)
    assert not np.isin(id_hashes(numbers), row_hashes([numbers])).any()
    words = numbers.astype(str)
    assert (id_hashes(words) == id_hashes(numbers)).all() and not np.isin(id_hashes(words), row_hashes([words])).any()


# ── Dataset.prior_openings ───────────────────────────────────────────────────────────────────────


def test_prior_openings_are_told_and_move_no_row(tmp_path):
    x, y, _ = some_rows()
    manifests = [prepare(Dataset(x, y, prior_openings=prior), tmp_path, 0, False) for prior in (0, 3, np.int64(1))]
    assert [m.pop("prior_openings") for m in manifests] == [0, 3, 1]
    assert manifests[0] == manifests[1] == manifests[2]
    assert len(os.listdir(tmp_path / "rows")) == len(os.listdir(tmp_path / "sealed")) == 1
    assert json.loads(json.dumps(prepare(Dataset(x, y), tmp_path, 0, False)))["prior_openings"] == 0


@pytest.mark.parametrize("prior", [-1, 1.0, True, "2", None])
def test_prior_openings_must_be_a_whole_number(tmp_path, prior):
    x, y, _ = some_rows()
    with pytest.raises(DataError, match="prior_openings must be a whole number of at least 0, but got"):
        prepare(Dataset(x, y, prior_openings=prior), tmp_path, 0, False)
    assert list(tmp_path.iterdir()) == []


def test_prior_openings_are_not_passed_over_in_the_test_rows(tmp_path):
    x, y, _ = some_rows()
    test = Dataset(x[300:], y[300:], prior_openings=1)
    with pytest.raises(DataError, match="in that of test; move it there"):
        prepare(Dataset(x[:300], y[:300], test=test), tmp_path, 0, False)


# ── an older ledger, and any ledger ──────────────────────────────────────────────────────────────

OLD = """\
{"number": 1, "previous": "0000000000000000000000000000000000000000000000000000000000000000", "kind": "opening", "opening": 1, "rows": "f5c4cb24f4c9b43e624e0a83cb11934f932dbd5db24eee67fed696354ac88a61", "study": "digits_mlp-1", "fingerprint": "abc", "frozen": "f", "alpha": 0.05, "hash": "95c9e26810fd9ba96a28aae2a0c26fb6cf70d7c524dfc0d6646f263393e27dd8"}
{"number": 2, "previous": "95c9e26810fd9ba96a28aae2a0c26fb6cf70d7c524dfc0d6646f263393e27dd8", "kind": "result", "opening": 1, "frozen": "f", "result": {"score": 0.9}, "hash": "247542a2415d473393812fb508ea31167516afffbd0ad1c1c45e905be3060aa4"}
"""  # noqa: E501 (as the first version wrote it)


def test_a_ledger_of_the_first_version_is_read(ledger):
    ledger.path.parent.mkdir()
    ledger.path.write_text(OLD)
    rows = np.arange(20, dtype=np.uint64)
    Path(f"{ledger.path}.rows").mkdir()
    np.save(Path(f"{ledger.path}.rows") / f"{fingerprint(rows)}.npy", rows)
    assert ledger.verify() == 2 and ledger.find("f") == {"score": 0.9}
    assert ledger.openings(rows, "abc") == 1 and guard_use(ledger, "a", rows) == GuardUse(0, 0)
    assert ledger.changed("spaces/digits_mlp.py", ROWS, "x") == []
    assert ledger.append({"fingerprint": "abc", "frozen": "g", "space": "s.py"}, rows, prior=1) == 3
    assert [line.split() for line in lines(ledger.summary())][2:] == [
        ["time", "study", "opening", "rows", "alpha", "fingerprint", "result"],
        ["-", "digits_mlp-1", "1", "20", "0.0500", "abc", "recorded"],
        ["-", "-", "3", "20", "-", "abc", "none"],
    ]


POOL = np.random.default_rng(3).integers(0, 2**63, 20, dtype=np.uint64)
PARTS = st.sets(st.integers(0, 19), min_size=1).map(sorted)
EVENTS = st.one_of(
    st.tuples(st.just("opening"), PARTS, st.integers(0, 3)),
    st.tuples(st.just("guard"), PARTS, st.tuples(st.sampled_from("abc"), st.integers(0, 50))),
    st.tuples(st.just("result"), PARTS, st.none()),
)


@settings(max_examples=40, deadline=None)
@given(events=st.lists(EVENTS, min_size=1, max_size=10), probe=PARTS)
def test_numbers_never_decrease_and_the_chain_holds(tmp_path_factory, events, probe):
    """Against a plain model: the openings and guard uses as lists, gone through row by row."""
    ledger = Ledger(tmp_path_factory.mktemp("any") / "ledger.jsonl")
    opened: list[tuple[set[int], int]] = []
    judged: list[tuple[set[int], str, int]] = []
    seen = written = 0

    def same(part, others):
        return len(set(part) & others) * 5 >= len(part)

    for kind, part, value in events:
        rows = np.random.default_rng(written).permutation(POOL[part])
        before = [number for others, number in opened if same(part, others)]
        if kind == "opening":
            number = ledger.append({"fingerprint": fingerprint(rows), "frozen": "f"}, rows, prior=value)
            assert number == max([len(before) + value, *before]) + 1
            assert number > max(before, default=0)
            opened.append((set(part), number))
        elif kind == "guard":
            judge(ledger, *value, rows=rows)
            judged.append((set(part), *value))
        elif opened:
            ledger.record_result(opened[-1][1], "f", {"score": written})
            assert ledger.find("f") == {"score": written}
        else:
            continue
        written += 1
        assert ledger.verify() == written == len({entry["hash"] for entry in ledger.entries()})
        count = ledger.openings(POOL[probe], fingerprint(POOL[probe]))
        assert count >= seen
        seen = count
        last = {study: trials for others, study, trials in judged if study != "a" and same(probe, others)}
        assert guard_use(ledger, "a", POOL[probe]) == GuardUse(len(last), sum(last.values()))
    if written:
        ledger.path.write_bytes(ledger.path.read_bytes().replace(b'"number": 1,', b'"number": 2,', 1))
        with pytest.raises(RequestError, match="line 1 was changed"):
            ledger.verify()


# ── heldout ledger ───────────────────────────────────────────────────────────────────────────────


def shown(*options):
    return CliRunner().invoke(main, ["ledger", *options])


def test_the_command_shows_what_was_used():
    ledger = Ledger()
    digest = fingerprint(ROWS)
    enter(ledger, frozen="f", study="digits-1", time=1.7e9, alpha=0.03040)
    ledger.record_result(1, "f", {"score": 0.9})
    enter(ledger, frozen="g", study="digits-10", time=1.7e9)
    for trials in (30, 40):
        judge(ledger, "a", trials, ROWS[:7], time=1.7e9)
    judge(ledger, "b", 5, ROWS[:7])
    found = json.loads(shown("--json").output)
    assert found == ledger.summary()
    assert found["lines"] == 6 and found["path"] == str(ledger.path)
    opening = {"time": 1.7e9, "study": "digits-1", "fingerprint": digest, "rows": 1000}
    assert found["openings"] == [
        opening | {"opening": 1, "alpha": 0.0304, "result": True},
        opening | {"study": "digits-10", "opening": 2, "alpha": None, "result": False},
    ]
    assert [(one["study"], one["trials"], one["rows"]) for one in found["guard"]] == [
        ("study-a", 40, 7),
        ("study-b", 5, 7),
    ]
    done = shown()
    assert done.exit_code == 0
    first, heading, *table = done.output.splitlines()
    assert first == f"the ledger {ledger.path}: 6 lines, chain unbroken" and heading == "openings of test rows:"
    assert table[1].startswith("    2023-11-") and table[1].split()[2:] == [
        *("digits-1", "1", "1000", "0.0304", digest[:12], "recorded")
    ]
    starts = [line.index(word) for line, word in zip(table, ("fingerprint", digest[:12], digest[:12]), strict=False)]
    assert len(set(starts)) == 1  # columns are aligned
    assert [line.split()[-4:-1] for line in table[-2:]] == [["study-a", "40", "7"], ["study-b", "5", "7"]]


def test_the_command_says_that_an_empty_ledger_is_empty():
    done = shown()
    assert done.exit_code == 0 and not Ledger().path.exists()
    assert done.output == f"the ledger {Ledger().path} is empty: no test rows have been opened\n"
    assert json.loads(shown("--json").output) == {"path": str(Ledger().path), "lines": 0, "openings": [], "guard": []}


def test_the_command_refuses_a_broken_chain():
    ledger = Ledger()
    enter(ledger)
    ledger.path.write_text(ledger.path.read_text().replace('"frozen": "f"', '"frozen": "g"'))
    done = shown()
    assert done.exit_code == 2 and "line 1 was changed" in done.output and done.output.count("\n") == 1
    import search

    assert search.Ledger is Ledger

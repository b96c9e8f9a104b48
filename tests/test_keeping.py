"""Which models are kept, that the others go, and that what is left is a study like any other."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.cli import main
from search.errors import DiskFull, RequestError
from search.loop import keeping
from search.record import places
from search.record.journal import Journal
from search.study import Study, StudyConfig
from search.trial import Trial, TrialState, ranked
from tests.conftest import Heldout, run_heldout
from tests.test_end_to_end import Done
from tests.tiny import write_space

FILES = ("log.txt", places.WEIGHTS, "validation_0.npy", "guard_0.npy", ".model-17.weights.h5", "checkpoint.keras")


def ended(number: int, loss: float | None, confirms: int | None = None, size: int | None = 10) -> Trial:
    if loss is None:
        return Trial(number, TrialState.FAILED, reason="nan", confirms=confirms)
    return Trial(number, TrialState.COMPLETE, loss=loss, score=loss, confirms=confirms, size=size)


def left(folder: Path, number: int) -> set[str]:
    return {path.name for path in places.trial(folder, number).iterdir()}


class Disk:
    """A study's folder with the files that trials leave."""

    def __init__(self, folder: Path, **config: Any) -> None:
        self.folder = folder
        (folder / "guard").mkdir(parents=True)
        self.journal = Journal.create(folder / "journal.sqlite", {"study": {"config": config}})

    def write(self, number: int, size: int = 1000) -> None:
        places.trial(self.folder, number).mkdir(parents=True)
        for name in FILES:
            (places.trial(self.folder, number) / name).write_bytes(b"x" * (size if name == places.WEIGHTS else 1))
        places.guard_parts(self.folder, number).write_bytes(b"g")
        if number % 2:  # as with --tensorboard
            places.events(self.folder, number).mkdir(parents=True)
            (places.events(self.folder, number) / "events.out").write_bytes(b"e" * 500)

    def run(self, trial: Trial, size: int = 1000) -> None:
        begun = Trial(trial.number, TrialState.RUNNING, confirms=trial.confirms)
        self.journal.begin(begun)
        self.write(trial.number, size)
        self.journal.finish(trial)

    def models(self) -> set[int]:
        return {int(path.parent.name) for path in (self.folder / "trials").glob(f"*/{places.WEIGHTS}")}

    def parts(self) -> set[int]:
        return {int(path.stem) for path in (self.folder / "guard").iterdir()}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path / "studies" / "s", keep=2)
    yield made
    made.journal.close()


HISTORIES = st.lists(
    st.tuples(st.none() | st.integers(0, 5).map(float), st.none() | st.integers(0, 3), st.booleans()), max_size=25
).map(
    lambda found: [
        ended(n, loss, 0 if confirms and n > 5 else None, size) for n, (loss, size, confirms) in enumerate(found)
    ]
)


@given(HISTORIES, st.none() | st.integers(1, 8))
def test_the_best_by_validation_every_confirmation_and_the_baseline_are_kept(
    history: list[Trial], keep: int | None
) -> None:
    found = keeping.kept(history, keep)
    done = {trial.number for trial in history if trial.state is TrialState.COMPLETE}
    assert found <= done
    assert {t.number for t in ranked(history)[:keep]} <= found
    assert {t.number for t in history if t.number in done and t.configuration == 0} <= found
    if keep is not None:
        assert sum(history[n].confirms is None for n in found) <= keep + 1
    assert keeping.kept(history, None) == done


@given(HISTORIES, st.integers(1, 6))
def test_what_was_deleted_is_never_wanted_later(history: list[Trial], keep: int) -> None:
    gone: set[int] = set()
    for length in range(1, len(history) + 1):
        found = keeping.kept(history[:length], keep)
        assert not found & gone
        gone |= {t.number for t in history[:length]} - found


@settings(max_examples=8, deadline=None)
@given(history=HISTORIES, keep=st.none() | st.integers(1, 4), restart=st.integers(0, 25))
def test_one_by_one_leaves_what_all_at_once_leaves(
    tmp_path_factory: pytest.TempPathFactory, history: list[Trial], keep: int | None, restart: int
) -> None:
    study = Disk(tmp_path_factory.mktemp("one") / "s", keep=keep)
    keeper = keeping.Keeper(study.folder, study.journal)
    for trial in history:
        if trial.number == restart:
            keeper = keeping.Keeper(study.folder, study.journal)
        study.run(trial)
        keeper.ended(trial)
    study.journal.close()
    assert study.models() == study.parts() == keeping.kept(history, keep)
    for trial in history:
        stays = {"log.txt"} | ({*FILES[:4]} if trial.number in study.models() else set())
        assert left(study.folder, trial.number) == stays


def test_a_tidying_that_is_cut_short_anywhere_is_finished_by_the_next(disk: Disk) -> None:
    history = [ended(n, float(n)) for n in range(5)]
    for trial in history:
        disk.write(trial.number)
    disk.write(5)
    running = [*history, Trial(5, TrialState.RUNNING)]
    real = os.unlink
    wanted = 3 * 6 + 2 * 2  # files of three deleted trials, and what two kept ones left half-written

    class Killed(BaseException):
        pass

    def unlink_and_die(path: Any, *rest: Any, **named: Any) -> None:
        real(path, *rest, **named)
        raise Killed

    for _ in range(wanted):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "unlink", unlink_and_die)
            with pytest.raises(Killed):
                keeping.tidy(disk.folder, running, 2)
    assert keeping.tidy(disk.folder, running, 2) == 0
    assert disk.models() == {0, 1, 5} and left(disk.folder, 5) == set(FILES)
    assert left(disk.folder, 3) == {"log.txt"}


def test_deleting_never_raises(disk: Disk) -> None:
    keeping.tidy(disk.folder, [ended(7, 1.0), ended(8, None)], 1)  # whose folders are not there
    disk.write(1)
    disk.write(0)
    place = places.trial(disk.folder, 1)
    (place / "made by the module").mkdir()
    (place / "made by the module" / "events").write_text("x")
    keeping.tidy(disk.folder, [ended(0, 0.0), ended(1, 1.0)], 1)
    assert left(disk.folder, 1) == {"log.txt"} and disk.models() == {0}


def test_the_limit_is_the_recorded_one_and_older_studies_have_none(disk: Disk) -> None:
    assert keeping.limit(disk.journal) == 2
    disk.journal.put("keep", 1)
    assert keeping.limit(disk.journal) == 1
    disk.journal.put("keep", 3)
    assert keeping.limit(disk.journal) == 2
    disk.journal.put("study", {"config": {}})
    disk.journal.put("keep", None)
    assert keeping.limit(disk.journal) is None


class TestMaxDisk:
    def run(self, study: Disk, keeper: keeping.Keeper, losses: list[float], size: int = 50_000) -> list[bool]:
        fits = []
        for number, loss in enumerate(losses, start=len(study.journal.history())):
            trial = ended(number, loss)
            study.run(trial, size)
            keeper.ended(trial)
            fits.append(keeper.fits())
        return fits

    def test_the_running_total_is_what_a_walk_finds(self, tmp_path: Path) -> None:
        from search.record import disk as room

        study = Disk(tmp_path / "s", keep=3)
        keeper = keeping.Keeper(study.folder, study.journal, most=10**9)
        self.run(study, keeper, [3.0, 2.0, 5.0, 1.0, 4.0])
        failed = ended(5, None)
        study.run(failed)
        keeper.ended(failed)
        assert keeper.total == room.size(study.folder)
        study.journal.begin(Trial(6, TrialState.RUNNING))
        study.write(6)
        again = keeping.Keeper(study.folder, study.journal, most=10**9)
        assert again.total == room.size(study.folder) - room.size(places.trial(study.folder, 6))
        study.journal.close()

    def test_fewer_are_kept_recorded_before_they_go_and_the_best_stay(self, tmp_path: Path) -> None:
        study = Disk(tmp_path / "s", keep=None)
        keeper = keeping.Keeper(study.folder, study.journal, most=350_000)  # of which 0.1 MB are the journal's
        said: list[str] = []
        fits = self.run(study, keeper, [5.0, 4.0, 3.0, 2.0, 1.0, 6.0, 0.5])
        assert all(fits) and keeper.total <= 350_000
        number = study.journal.get("keep")
        assert number == keeper.keep == keeping.limit(study.journal) and 1 <= number < 6
        assert study.models() == keeping.kept(study.journal.history(), number) and {0, 6} <= study.models()
        assert keeper.fits(said.append) and said == []
        self.run(study, keeper, [0.1], size=120_000)
        assert study.models() == keeping.kept(study.journal.history(), keeping.limit(study.journal))
        again = keeping.Keeper(study.folder, study.journal, most=350_000)
        assert (again.keep, again.total) == (keeper.keep, keeper.total)
        study.journal.close()

    def test_a_limit_that_could_not_be_recorded_deletes_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        study = Disk(tmp_path / "s", keep=None)
        keeper = keeping.Keeper(study.folder, study.journal, most=350_000)

        def full(key: str, value: object) -> None:
            raise DiskFull("the journal cannot be written")

        with monkeypatch.context() as patched:
            patched.setattr(study.journal, "put", full)
            with pytest.raises(DiskFull):
                self.run(study, keeper, [5.0, 4.0, 3.0, 2.0, 1.0, 6.0, 0.5])
        self.run(study, keeper, [0.1], size=1000)
        assert study.models() == keeping.kept(study.journal.history(), keeping.limit(study.journal))
        study.journal.close()

    def test_a_model_that_was_chosen_stays_when_better_ones_come(self, tmp_path: Path) -> None:
        """Until the longer study has chosen anew, the recorded winner can be exported."""
        study = Disk(tmp_path / "s", keep=2)
        keeper = keeping.Keeper(study.folder, study.journal)
        self.run(study, keeper, [3.0, 2.0])
        study.journal.put("selection", {"winner": {"trial": 1}, "baseline": {"trial": 0}})
        again = keeping.Keeper(study.folder, study.journal)
        self.run(study, again, [1.0, 0.5, 0.4])
        assert study.models() == {0, 1, 3, 4}
        study.journal.close()

    def test_when_the_best_alone_is_too_much_it_says_so(self, tmp_path: Path) -> None:
        study = Disk(tmp_path / "s", keep=5)
        keeper = keeping.Keeper(study.folder, study.journal, most=150_000)
        said: list[str] = []
        assert self.run(study, keeper, [2.0, 1.0], size=200_000) == [False, False]
        assert study.models() == {0, 1} and study.journal.get("keep") == 1 and not keeper.fits(said.append)
        study.journal.close()


def test_what_cannot_be_kept_is_refused() -> None:
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(RequestError, match="--keep must be"):
            StudyConfig("s", keep=wrong)  # type: ignore[arg-type]
    for wrong in ("", "much", "-1G", "0"):
        with pytest.raises(RequestError, match="--max-disk must be"):
            StudyConfig("s", max_disk=wrong)
    assert StudyConfig("s", keep=None).to_json()["keep"] is None and StudyConfig("s", max_disk="20G").keep == 20
    (option,) = [one for one in main.commands["launch"].params if one.name == "keep"]
    assert option.default == str(keeping.KEEP)


# ── a study through the command line ─────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("few")
    workspace, ledger = folder / "ws", str(folder / "ledger.jsonl")
    plan = ("--trials", "7", "--keep", "2", "--confirm", "1", "--confirm-seeds", "2", "--workers", "2", "--seed", "1")
    where = ("--workspace", str(workspace), "--study", "s", "--json")
    ran = run_heldout("launch", write_space(folder), *plan, *where, HELDOUT_LEDGER=ledger)
    assert ran.returncode == 0, ran.stderr
    return Done(json.loads(ran.stdout), workspace, ledger, Study("s", workspace))


@pytest.mark.study
def test_a_study_with_keep_2_is_chosen_tested_and_exported_from_what_it_kept(
    few: Done, tmp_path: Path, heldout: Heldout
) -> None:
    trials, folder = few.study.trials, few.study.folder
    wanted = keeping.kept(trials, 2)
    assert {t.number for t in trials if places.weights(folder, t.number).exists()} == wanted
    assert few.report["winner"]["trial"] in wanted and few.report["test"]["opening"] == 1
    assert sum(n < 7 for n in wanted) <= 3 and all(t.number in wanted for t in trials if t.confirms is not None)
    assert all((places.trial(folder, t.number) / "log.txt").exists() for t in trials)
    where = ("--workspace", str(few.workspace))
    assert f", {len(wanted)} models kept" in heldout("status", *where).stdout

    ran = heldout("export", "s", *where, "--out", str(tmp_path / "winner"), "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["scores"]["test"]["score"] == few.report["test"]["winner"]
    again = heldout("evaluate", "s", *where, "--json", HELDOUT_LEDGER=few.ledger)
    assert again.returncode == 0 and json.loads(again.stdout)["test"] == few.report["test"]


@pytest.mark.study
def test_a_model_that_was_not_kept_is_said_and_refused_in_one_line(few: Done, tmp_path: Path, heldout: Heldout) -> None:
    where = ("--workspace", str(few.workspace))
    number = next(t.number for t in few.study.trials if t.number not in keeping.kept(few.study.trials, 2))
    ran = heldout("export", "s", "--trial", str(number), *where, "--out", str(tmp_path / "gone"))
    assert ran.returncode == 2 and f"the model of trial {number} must be on disk" in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1 and not (tmp_path / "gone").exists()
    assert "its model was not kept" in heldout("show", "s", str(number), *where).stdout
    assert "its model is kept" in heldout("show", "s", str(few.report["winner"]["trial"]), *where).stdout

"""Journal, ledger and workspace written by the previous release open in this one, in another place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from search.guard.ledger import Ledger
from search.study import Study
from tests.conftest import Heldout, run_heldout
from tests.previous import Previous, unpack


@pytest.fixture(scope="module")
def previous(tmp_path_factory: pytest.TempPathFactory) -> Previous:
    return unpack(tmp_path_factory.mktemp("previous"))


def told(previous: Previous, *arguments: str) -> Any:
    where = ("--workspace", str(previous.workspace)) if arguments[0] != "ledger" else ()
    ran = run_heldout(*arguments, *where, "--json", HELDOUT_LEDGER=str(previous.ledger))
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_the_place_that_its_journals_name_is_not_there(previous: Previous) -> None:
    recorded = Study("complete", previous.workspace).meta("prepared")["rows"]
    assert recorded.startswith("/tmp/heldout-previous/") and not Path(recorded).exists()


def test_status_report_show_and_ledger_read_it(previous: Previous) -> None:
    states = {one["study"]: (one["state"], one["trials"]["complete"]) for one in told(previous, "status")}
    assert states == {"complete": ("COMPLETE", 4), "interrupted": ("STOPPED", 4)}
    report = told(previous, "report", "complete")
    assert report["winner"]["trial"] == 3 and report["test"]["winner"] == pytest.approx(0.95)
    assert report["picture"] == str(previous.workspace / "studies" / "complete" / "guard.png")
    shown = told(previous, "show", "complete", "2")
    assert shown["state"] == "COMPLETE" and len(shown["reports"]) == 2
    found = told(previous, "ledger")
    assert json.dumps(found).count("complete") and len(Ledger(previous.ledger).entries()) == 3


@pytest.mark.study
def test_its_winner_and_any_trial_of_it_export(previous: Previous, tmp_path: Path) -> None:
    lineage = told(previous, "export", "complete", "--out", str(tmp_path / "winner"))
    assert lineage["scores"]["test"]["score"] == pytest.approx(0.95) and lineage["trial"] == 3
    lineage = told(previous, "export", "complete", "--trial", "2", "--out", str(tmp_path / "two"))
    assert lineage["scores"]["validation"]["score"] == pytest.approx(0.9)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_its_recorded_answer_is_given_again_and_the_interrupted_study_goes_on(tmp_path: Path, heldout: Heldout) -> None:
    previous = unpack(tmp_path)
    before = previous.ledger.read_text()
    again = told(previous, "evaluate", "complete")
    assert again["test"]["opening"] == 1 and previous.ledger.read_text() == before

    resumed = told(previous, "resume", "interrupted")
    assert resumed["state"] == "COMPLETE" and resumed["trials"]["complete"] == 6
    assert resumed["test"] is None and "opened once before" in resumed["sealed"]
    study = Study("interrupted", previous.workspace)
    assert [t.number for t in study.trials if t.confirms is None] == list(range(6)) and study.trials[4].attempt == 1
    assert study.meta("selection")["confirmation"]["seeds"] == 2
    assert resumed["tracking"]["uri"] == f"sqlite:///{previous.workspace}/mlflow.db"

    opened = told(previous, "evaluate", "interrupted")
    assert opened["test"]["opening"] == 2 and "REUSED_TEST_SET" in opened["verdicts"]
    assert not Path("/tmp/heldout-previous").exists()

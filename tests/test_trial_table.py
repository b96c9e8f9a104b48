"""Trials as a table: on the terminal, as CSV, JSON and Parquet."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pandas
import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from search.cli import main
from search.errors import RequestError
from search.record.journal import Journal
from search.record.trial_table import dataframe, epochs, shown, write_parquet
from search.study import Study
from search.trial import Report, Trial, TrialState
from tests.test_warm_start import earlier

DONE: dict[str, Any] = {"score": 0.5, "loss": -0.5, "epochs": 3, "best_epoch": 2, "size": 9}
TRIALS = [
    Trial(0, TrialState.COMPLETE, {"units": 8}, started=10.0, ended=12.5, **DONE),
    Trial(1, TrialState.FAILED, {"units": 4, "kind": "a"}, reason="nan", message="it, became\nNaN", seed=7),
    Trial(2, TrialState.RUNNING, {"kind": 3}, started=20.0, confirms=0),
]


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    earlier(tmp_path)
    return tmp_path


def run(workspace: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["trials", *arguments, "--workspace", str(workspace)])


def test_whole_numbers_stay_whole_and_what_is_not_known_is_missing() -> None:
    frame = dataframe(TRIALS)
    assert list(frame["number"]) == [0, 1, 2] and list(frame["state"]) == ["COMPLETE", "FAILED", "RUNNING"]
    assert frame["params.units"].dtype == "Int64" and frame["best_epoch"].dtype == "Int64"
    assert frame["seconds"][0] == 2.5 and frame["score"].isna().tolist() == [False, True, True]
    assert frame["started"][0] == pandas.Timestamp(10, unit="s", tz="UTC") and pandas.isna(frame["ended"][2])
    assert pandas.isna(frame["params.units"][2]) and frame["confirms"][2] == 0


def test_a_study_without_trials_has_a_table_without_rows() -> None:
    frame = dataframe([])
    assert len(frame) == 0 and {"number", "state", "score"} <= set(frame)


def test_parquet_brings_back_the_table(tmp_path: Path) -> None:
    frame = dataframe(TRIALS)
    write_parquet(frame, tmp_path / "trials.parquet")
    back = pandas.read_parquet(tmp_path / "trials.parquet")
    assert list(back) == list(frame) and back["params.units"].tolist()[:2] == [8, 4]
    assert back["params.kind"].tolist()[1:] == ["a", "3"]  # of several types, so all are text
    with pytest.raises(RequestError, match="--parquet must name a file that can be written.*non-existent directory"):
        write_parquet(frame, tmp_path / "nowhere" / "trials.parquet")


def test_the_command_prints_the_same_in_every_form(workspace: Path) -> None:
    ran = run(workspace, "old", "--csv")
    frame = pandas.read_csv(io.StringIO(ran.output))
    assert ran.exit_code == 0 and len(frame) == 12 and frame["number"].tolist() == list(range(12))
    records = json.loads(run(workspace, "old", "--json").output)
    assert [one["score"] for one in records] == pytest.approx(frame["score"].tolist())
    assert [one["params.units"] for one in records] == frame["params.units"].tolist()
    lines = run(workspace, "old").output.splitlines()
    assert len(lines) == 13 and lines[0].split() == ["number", "state", "score", "epochs", "seconds", "rate", "units"]
    assert lines[3].split()[:2] == ["2", "COMPLETE"]
    path = workspace / "trials.parquet"
    assert "12 trials written" in run(workspace, "old", "--parquet", str(path)).output and path.exists()


def test_what_is_no_screen_gets_one_whole_line_a_trial(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = [Trial(0, TrialState.COMPLETE, {f"parameter_{n}": n / 7 for n in range(12)}, **DONE)]
    monkeypatch.setattr(Study, "trials_dataframe", lambda _: dataframe(many))
    lines = run(workspace, "old").output.splitlines()
    assert len(lines) == 2 and "parameter_11" in lines[0] and lines[1].split()[:2] == ["0", "COMPLETE"]


def test_a_narrow_screen_folds_and_cuts_nothing() -> None:
    many = [Trial(0, TrialState.COMPLETE, {f"parameter_{n}": n / 7 for n in range(12)}, started=1.0, ended=2.0, **DONE)]
    for width in (10_000, 60):
        console = Console(width=width, file=io.StringIO())
        console.print(shown(dataframe(many)))
        text = console.file.getvalue()
        assert "COMPLETE" in text and "…" not in text


def test_no_score_on_guard_rows_is_in_it(workspace: Path) -> None:
    assert "guard" not in run(workspace, "old", "--csv").output


@pytest.mark.parametrize(
    ("arguments", "why"), [(("old", "--csv", "--json"), "one form"), (("nope",), "no study called 'nope'")]
)
def test_wrong_input_is_one_line(workspace: Path, arguments: tuple[str, ...], why: str) -> None:
    ran = run(workspace, *arguments)
    assert ran.exit_code == 2 and why in ran.output and ran.output.count("\n") == 1


def test_the_epochs_of_a_trial_are_a_row_each_and_whole(tmp_path: Path) -> None:
    study = earlier(tmp_path, config={"space": "cells.py"})
    metrics = {"loss": 0.123456789012345, "learning_rate": 0.1}
    with Journal.open(study.folder / "journal.sqlite") as journal:
        before = len(journal.reports(trial=0))
        journal.report([Report(0, 0, step, 5.0, metrics) for step in (91, 92)])

    def show(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["show", "old", "0", *arguments, "--workspace", str(tmp_path)])

    frame = pandas.read_csv(io.StringIO(show("--csv").stdout))
    assert len(frame) == before + 2 and list(frame)[:2] == ["attempt", "epoch"]
    wanted = [{"attempt": 0, "epoch": step, **metrics} for step in (91, 92)]
    assert frame.tail(2)[list(wanted[0])].to_dict("records") == wanted
    assert list(epochs([])) == ["attempt", "epoch"]
    ran = show("--csv", "--json")
    assert ran.exit_code == 2 and "give --csv or --json" in ran.stderr

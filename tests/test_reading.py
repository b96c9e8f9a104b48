"""Trials read back from MLflow: the same table and the same epochs as where the study ran."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pandas
import pytest
from click.testing import CliRunner, Result

from search.cli import main
from search.errors import StudyError, TrackingError
from search.record.trial_table import dataframe
from search.service import elsewhere
from search.shown.report import show
from search.study import Study
from search.tracker import runs
from search.trial import TrialState
from tests.conftest import run_heldout
from tests.tiny import write_space

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what MLflow's libraries warn of at import is not ours to mend
    from mlflow import MlflowClient

    from search.tracker import reading

from tests.test_tracking import empty_store, launch, sqlite_uri, workspace  # noqa: F401 (fixtures)
from tests.tracked import Driver, Tracked

pytestmark = pytest.mark.filterwarnings("ignore:::(mlflow|sqlalchemy|alembic|google|pydantic)")

ODD = {"depth": "3", "flag": "True", "big": "1e3", "whole": 1.0, "units~2": 4, "odd key!": 0.1, "trial": 7, "a": ""}


@pytest.fixture
def driver(launch: Any) -> Driver:  # noqa: F811
    return launch(workspace_id="w", name="digits-0", config={"space": "cells.py", "trials": 40})


@pytest.fixture
def tracked(driver: Driver, sqlite_uri: str, workspace: Path) -> Tracked:  # noqa: F811
    return Tracked(driver, MlflowClient(tracking_uri=sqlite_uri), workspace, False)


def every_kind(driver: Driver) -> None:
    """Trials in every state, with parameters that MLflow's texts and names alone would not give back."""
    driver.run(0, 0.8125)
    odd = driver.begin(1, **ODD)
    driver.epoch(odd, 1, loss=math.inf, val_loss=math.nan)
    driver.epoch(odd, 2, loss=0.1, val_loss=0.3)
    driver.complete(odd, 0.1 + 0.2, 2)
    driver.fail(driver.begin(2, units=3), "nan", "it, became\nNaN")
    first = driver.begin(3, units=4)
    driver.epoch(first, 1)
    waits = first.moved(TrialState.WAITING, reason="oom", message="no memory", retries={"oom": 1}, epochs=1)
    driver.journal.queue(waits)
    again = waits.moved(
        TrialState.RUNNING, attempt=1, reason=None, message=None, started=driver.tick() + 1 / 3, epochs=0
    )
    driver.journal.begin(again)
    driver.epoch(again, 1)
    stopped = dataclasses.replace(again, number=4, attempt=0, retries={}, started=driver.tick())
    driver.journal.begin(stopped)
    driver.journal.finish(stopped.moved(TrialState.PRUNED, ended=driver.tick() + 1e-6))
    confirms = dataclasses.replace(stopped, number=5, confirms=0, started=driver.tick(), extra={"flops": 12345678901})
    driver.journal.begin(confirms)
    driver.complete(confirms, 0.75, 3)
    lost = driver.begin(6, units=5)
    driver.epoch(lost, 1)
    driver.journal.queue(lost.moved(TrialState.WAITING, reason="lost", message="its node is gone", epochs=1))


def test_trials_are_those_of_the_journal_type_by_type(driver: Driver, tracked: Tracked) -> None:
    every_kind(driver)
    tracked.publisher.publish()
    theirs, ours = reading.trials(tracked.client, tracked.parent), driver.journal.history()
    assert {type(trial.params[key]) for trial in theirs for key in trial.params} == {int, float, str, bool}
    assert [dict(trial.params) for trial in theirs] == [dict(trial.params) for trial in ours]
    assert [trial.retries for trial in theirs] == [trial.retries for trial in ours]
    assert [trial.loss for trial in theirs] == [trial.loss for trial in ours]
    pandas.testing.assert_frame_equal(dataframe(theirs), dataframe(ours))


def test_a_trial_has_its_epochs_also_while_it_runs(driver: Driver, tracked: Tracked, workspace: Path) -> None:  # noqa: F811
    every_kind(driver)
    tracked.publisher.publish()
    tracked.publisher._flush((3, 1))  # as after half a minute
    unknown = {"memo", "slot", "kept", "log", "extra", "step", "text"}
    for number in (0, 1, 3, 5):
        here = show(Study("digits-0", workspace), number)
        there = reading.shown(tracked.client, tracked.parent, number)
        assert there is not None
        assert {key for key in here if repr(here[key]) != repr(there.get(key))} - {"reports"} <= unknown, number
        assert len(there["reports"]) == len(here["reports"])
        for one, other in zip(there["reports"], here["reports"], strict=True):
            assert (one["attempt"], one["step"]) == (other["attempt"], other["step"])
            assert one["metrics"] == pytest.approx(other["metrics"], nan_ok=True, abs=0)
    assert reading.shown(tracked.client, tracked.parent, 99) is None


def test_a_trial_that_was_cut_off_runs_as_the_journal_has_it(driver: Driver, tracked: Tracked) -> None:
    driver.run(0, 0.5)
    driver.begin(1)
    tracked.end("STOPPED")
    assert tracked.children[1, 0].data.tags[runs.STATE] == runs.INTERRUPTED
    theirs = reading.trials(tracked.client, tracked.parent)
    pandas.testing.assert_frame_equal(dataframe(theirs), dataframe(driver.journal.history()))


def test_an_end_that_is_half_written_is_no_end(driver: Driver, tracked: Tracked) -> None:
    driver.begin(0)
    tracked.publisher.publish()
    tracked.client.set_tag(tracked.children[0, 0].info.run_id, runs.STATE, "COMPLETE")
    (trial,) = reading.trials(tracked.client, tracked.parent)
    assert (trial.state, trial.score, trial.ended) == (TrialState.RUNNING, None, None)


def test_texts_alone_are_read_as_they_were_written(driver: Driver, tracked: Tracked) -> None:
    """Of runs that an older version wrote, or of parameters that are too long for the record."""
    driver.run(0, 0.5)
    words = {"seven": "007", "size": "1e3", "no": "nan", "kind": "relu", "depth": -3, "rate": 1e-05, "bias": False}
    driver.complete(driver.begin(1, **words), 0.5, 1)
    driver.complete(driver.begin(2, text="x" * 9000, units=2), 0.5, 1)
    tracked.publisher.publish()
    for key in ((0, 0), (1, 0)):
        tracked.client.delete_tag(tracked.children[key].info.run_id, runs.RECORD)
    first, second, third = reading.trials(tracked.client, tracked.parent)
    assert first.params == {"units": 32, "rate": 0.001, "bias": True, "act": "relu"}
    assert type(first.params["bias"]) is bool and second.params == words
    assert third.params["units"] == 2 and set(third.params["text"]) == {"x"}
    assert third.started == driver.journal.history()[2].started


def run(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


def test_the_command_reads_a_study_that_is_not_here(
    driver: Driver,
    tracked: Tracked,
    sqlite_uri: str,  # noqa: F811
    workspace: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    every_kind(driver)
    tracked.publisher.publish()
    here, there = ("--workspace", str(workspace)), ("--tracking-uri", sqlite_uri)
    told = run("trials", "digits-0", "--csv", *there)
    assert told.exit_code == 0 and told.output == run("trials", "digits-0", "--csv", *here).output
    lines, own = (run("show", "digits-0", "1", *where).output.splitlines() for where in (there, here))
    assert lines[:-1] == [line for line in own if not line.startswith("its model")]
    assert lines[-1] == "what it printed, and whether its model is kept, is known where it ran"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_uri)
    epochs = run("show", "digits-0", "3", "--csv")
    assert epochs.exit_code == 0 and epochs.output.splitlines()[0].startswith("attempt,epoch,loss,")
    for words, why in (
        (("show", "digits-0", "99"), "has no trial 99 in sqlite"),
        (("show", "nobodys", "0"), "no study called 'nobodys'"),
        (("trials", "nobodys"), "no study called 'nobodys'"),
        (("trials", "../x"), "must be letters"),
        (("trials", "digits-0", *here, *there), "give one of --tracking-uri and --workspace"),
    ):
        ran = run(*words)
        assert ran.exit_code == 2 and why in ran.output and ran.output.count("\n") == 1, ran.output


@pytest.mark.study
@pytest.mark.timeout(900)
def test_a_real_study_and_its_ensemble_are_read_from_mlflow_as_they_are(tmp_path: Path) -> None:
    home, uri = tmp_path / "ws", f"sqlite:///{tmp_path / 'ws' / 'mlflow.db'}"
    asked = ["--trials", "3", "--workers", "1", "--sampler", "random", "--confirm", "0", "--evaluate", "no"]

    def made(*words: str) -> str:
        ran = run_heldout(*words, "--workspace", str(home))
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    def both(*words: str) -> tuple[str, str]:
        here, there = run(*words, "--workspace", str(home)), run(*words, "--tracking-uri", uri)
        assert (here.exit_code, there.exit_code) == (0, 0), here.output + there.output
        return here.stdout, there.stdout

    made("launch", write_space(tmp_path), "--study", "real", *asked, "--keep", "all")
    for words in (("trials", "real", "--csv"), ("trials", "real", "--json"), ("show", "real", "1", "--csv")):
        here, there = both(*words)
        assert here == there, words
    own, read = (json.loads(text) for text in both("show", "real", "1", "--json"))
    assert {key for key in own if own[key] != read[key]} <= {"memo", "slot", "kept", "log", "extra"}

    with pytest.raises(StudyError, match="must have published its ensemble of size 3"):
        elsewhere.read_ensemble(uri, "real", 3, tmp_path / "none")
    made("ensemble", "real", "--size", "3")
    stored = json.loads(made("publish", "real", "--json"))["files"]
    assert {"report.json", "model/model.keras", "ensemble-3/model.keras"} <= set(stored)
    files = elsewhere.read_ensemble(uri, "real", 3, tmp_path / "first")
    assert files == ["MODEL_CARD.md", "lineage.json", "model.keras", "space.py"]
    (frozen,) = (home / "studies" / "real" / "frozen").glob("ensemble-3-*.keras")
    assert digest(tmp_path / "first" / "model.keras") == digest(frozen)
    # Another size, published later, has a place of its own.
    made("ensemble", "real", "--size", "2")
    made("publish", "real")
    for size in (2, 3):
        elsewhere.read_ensemble(uri, "real", size, tmp_path / f"again-{size}")
    assert digest(tmp_path / "again-3" / "model.keras") == digest(frozen)
    (torn,) = home.glob("artifacts/**/ensemble-3/model.keras")
    torn.write_bytes(torn.read_bytes()[:-1])
    with pytest.raises(TrackingError, match=r"model\.keras is not what was published"):
        elsewhere.read_ensemble(uri, "real", 3, tmp_path / "torn")
    assert not (tmp_path / "torn").exists()


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

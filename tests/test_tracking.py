"""Publishing to MLflow: one contract, held against a SQLite file and a real server, and its process."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from search.errors import TrackingError
from search.record.journal import Journal
from search.tracker import publishing, runs, tracking, ui
from search.trial import TrialState

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what MLflow's libraries warn of at import is not ours to mend
    from mlflow import MlflowClient
    from mlflow.entities import ViewType
    from mlflow.exceptions import MlflowException

    from search.tracker import publisher
    from search.tracker.publisher import Publisher

from tests.tracked import Counting, Driver, Tracked, free_port, study, until

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:::(mlflow|sqlalchemy|alembic|google|pydantic)")
# Far more than anything here takes, even on a busy machine: it bounds a failure, not a success.
PATIENCE = 60.0


# ---- stores


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file as MLflow makes it, which takes seconds: made once and copied."""
    file = tmp_path_factory.mktemp("empty") / "mlflow.db"
    tracking.connect(f"sqlite:///{file}")
    return file


@pytest.fixture(scope="module")
def server(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    workspace = tmp_path_factory.mktemp("server")
    shutil.copy(empty_store, workspace)
    with ui.serve(workspace, free_port()) as running:
        yield running.url


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    folder = tmp_path / "a work space"  # artifact locations are URIs
    folder.mkdir()
    return folder


@pytest.fixture(params=["sqlite", "server"])
def uri(request: pytest.FixtureRequest, workspace: Path, empty_store: Path) -> str:
    if request.param == "server":
        return str(request.getfixturevalue("server"))
    shutil.copy(empty_store, workspace)
    return publishing.default_uri(workspace)


@pytest.fixture
def sqlite_uri(workspace: Path, empty_store: Path) -> str:
    shutil.copy(empty_store, workspace)
    return publishing.default_uri(workspace)


@pytest.fixture
def client(uri: str, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    for name, value in publishing.TRACKER_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    return MlflowClient(tracking_uri=uri)


# ---- studies


Open = Callable[..., Driver]


@pytest.fixture
def launch(workspace: Path) -> Iterator[Open]:
    made: list[Driver] = []

    def build(state: str | None = "RUNNING", **changes: Any) -> Driver:
        folder = workspace / "studies" / f"digits-{len(made)}"
        folder.mkdir(parents=True)
        meta = {"study": study(workspace, **changes)} | ({"state": state} if state else {})
        made.append(Driver(folder, Journal.create(folder / "journal.sqlite", meta)))
        return made[-1]

    yield build
    for driver in made:
        driver.journal.close()


@pytest.fixture
def driver(launch: Open) -> Driver:
    return launch()


@pytest.fixture
def tracked(driver: Driver, client: MlflowClient, workspace: Path, uri: str) -> Tracked:
    return Tracked(driver, client, workspace, uri.startswith("http"))


# ---- what every store must show


class TestPublished:
    def test_a_study_with_its_trials(
        self, driver: Driver, tracked: Tracked, uri: str, workspace: Path
    ) -> None:
        for number, score in enumerate([0.8, 0.7, 0.9]):
            driver.run(number, score)
        driver.journal.put(
            "evaluation", {"winner": {"score": 0.88, "interval": [0.85, 0.91]}, "opening": 1, "fresh": True}
        )
        tracked.end()

        parent = tracked.parent
        assert parent.info.status == "FINISHED"
        assert parent.info.run_name == "digits"
        assert parent.data.params == {
            "objective": "val_accuracy",
            "direction": "max",
            "trials": "40",
            "sampler": "tpe",
            "seed": "0",
            "nested.deep": "True",
            "data.digest": "d" * 64,
            "data.rows": "1797",
            "data.tiers.train": "1078",
        }
        assert tracked.series(parent, "best_so_far") == [(1, 0.8), (2, 0.8), (3, 0.9)]
        assert (
            parent.data.metrics.items()
            >= {
                "score": 0.9,
                "test.winner.score": 0.88,
                "test.winner.interval_low": 0.85,
                "test.winner.interval_high": 0.91,
                "test.opening": 1.0,
            }.items()
        )
        assert (
            parent.data.tags.items()
            >= {
                "heldout.state": "COMPLETE",
                "heldout.best_trial": "2",
                "heldout.space_digest": "5" * 64,
                "heldout.data_digest": "d" * 64,
                "heldout.version.keras": "3.15.1",
                "team": "vision",
                "odd key_": "kept",
                "mlflow.user": "ada",
                "mlflow.source.name": "spaces/digits_mlp.py",
            }.items()
        )
        assert "val_accuracy" in parent.data.tags["mlflow.note.content"]
        found = tracked.client.download_artifacts(parent.info.run_id, "space/digits_mlp.py", str(workspace))
        assert Path(found).read_text() == 'objective = "val_accuracy"\n'
        if not uri.startswith("http"):
            assert tracked.experiment.artifact_location.startswith((workspace / "artifacts").as_uri())
            assert list((workspace / "artifacts").rglob("digits_mlp.py"))

        child = tracked.children[1, 0]
        assert child.info.status == "FINISHED"
        assert child.info.run_name == "trial 1 · digits"
        assert child.info.end_time - child.info.start_time == 4000
        assert child.data.params == {
            "trial": "1", "units": "33", "rate": "0.001", "bias": "True", "act": "relu"
        }  # fmt: skip
        assert (
            child.data.tags.items()
            >= {
                "mlflow.parentRunId": parent.info.run_id,
                "heldout.state": "COMPLETE",
                "heldout.seed": "7",
                "heldout.baseline": "false",
                "team": "vision",
                "mlflow.user": "ada",
            }.items()
        )
        assert tracked.series(child, "val_loss") == [(1, 1.1), (2, 0.55), (3, 1.1 / 3)]
        assert tracked.series(child, "val_accuracy") == [(1, 0.5), (2, 0.75), (3, 1 - 0.5 / 3)]
        assert child.data.metrics == {
            "loss": 1 / 3, "val_loss": 1.1 / 3, "val_accuracy": 1 - 0.5 / 3, "score": 0.7,
            "seconds": 4.0, "epochs": 3.0, "best_epoch": 2.0, "weights": 1000.0,
        }  # fmt: skip

        told = tracked.publisher.summary()
        assert told["run_id"] == parent.info.run_id
        assert told["runs"] == {str(key[0]): run.info.run_id for key, run in tracked.children.items()}
        assert (told["published"], told["behind"]) == (driver.journal.length, 0)

    def test_how_trials_and_studies_end(self, driver: Driver, tracked: Tracked) -> None:
        driver.fail(driver.begin(0), "nan", "the loss is not a number after epoch 2")
        driver.journal.finish(driver.begin(1).moved(TrialState.PRUNED, ended=driver.tick(), epochs=1))
        lost = driver.begin(2)
        driver.epoch(lost, 1)
        driver.journal.queue(lost.moved(TrialState.WAITING, message="its process was lost"))
        driver.run(2, 0.6, attempt=1)
        driver.begin(3)
        tracked.end("STOPPED")
        children = tracked.children
        assert {key: run.info.status for key, run in children.items()} == {
            (0, 0): "FAILED", (1, 0): "FINISHED", (2, 0): "KILLED", (2, 1): "FINISHED", (3, 0): "KILLED"
        }  # fmt: skip
        states = [run.data.tags[runs.STATE] for run in children.values()]
        assert states == ["FAILED", "PRUNED", "WAITING", "COMPLETE", "INTERRUPTED"]
        assert children[0, 0].data.tags["heldout.reason"] == "nan"
        assert children[0, 0].data.tags["heldout.message"] == "the loss is not a number after epoch 2"
        assert children[2, 1].info.run_name == "trial 2 · attempt 2 · digits"
        assert tracked.publisher.summary()["runs"]["2"] == children[2, 1].info.run_id
        assert tracked.series(children[2, 0], "loss") == [(1, 1.0)]
        assert tracked.parent.info.status == "KILLED"
        assert tracked.series(tracked.parent, "best_so_far") == [(3, 0.6)]

    def test_what_is_no_finite_number_is_marked(self, driver: Driver, tracked: Tracked) -> None:
        trial = driver.begin(0)
        driver.epoch(trial, 1, loss=math.inf, val_loss=math.nan, val_accuracy=0.5)
        driver.fail(trial, "nan", "gone")
        driver.run(1, 0.5)
        tracked.end()
        run = tracked.children[0, 0]
        assert run.data.tags[runs.NON_FINITE] == "loss@1=inf, val_loss@1=nan"
        assert [math.isnan(value) for _, value in tracked.series(run, "loss")] == [True]
        assert runs.NON_FINITE not in tracked.children[1, 0].data.tags

    def test_names_that_mlflow_would_refuse(self, driver: Driver, tracked: Tracked) -> None:
        names = ["units~2", "lr (log)", "../up", "a//b", "trial", "ünits", ".", "x" * 300, "a:b", "a_b"]
        trial = driver.begin(0, **{name: place for place, name in enumerate(names)})
        driver.epoch(trial, 1, **{"val_acc@5": 0.5, "score": 0.25})
        driver.complete(trial, 0.5, 1)
        tracked.end()
        run = tracked.children[0, 0]
        assert sorted(run.data.params.values(), key=int) == sorted(map(str, [0, *range(len(names))]), key=int)
        assert run.data.params["units.2"] == "0"
        assert run.data.params["trial"] == "0" and run.data.params["trial.2"] == "4"
        assert run.data.metrics["val_acc_5"] == 0.5
        assert (run.data.metrics["score"], run.data.metrics["score.2"]) == (0.5, 0.25)

    def test_more_than_one_batch_holds(self, driver: Driver, tracked: Tracked) -> None:
        trial = driver.begin(0, **{f"p{number}": number for number in range(130)})
        for step in range(1, 301):
            driver.epoch(trial, step)
        driver.complete(trial, 0.5, 300)
        tracked.end()
        run = tracked.children[0, 0]
        assert len(run.data.params) == 131
        assert len(tracked.series(run, "loss")) == 300

    def test_a_trial_is_seen_while_it_runs(
        self, driver: Driver, tracked: Tracked, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trial = driver.begin(0, units=1)
        driver.epoch(trial, 1)
        tracked.publisher.publish()
        (run,) = tracked.children.values()
        assert run.info.status == "RUNNING"
        assert run.data.metrics == run.data.params == {}  # the first half minute is not over
        monkeypatch.setattr(publisher, "_FLUSH_SECONDS", 0.0)
        tracked.publisher.publish()
        assert tracked.children[0, 0].data.metrics["loss"] == 1.0
        assert tracked.children[0, 0].data.params == {}  # only proposed: params cannot be corrected
        domain = {
            "kind": "int",
            "low": 1,
            "high": 8,
            "step": 1,
            "sampling": "linear",
            "values": [],
            "default": 1,
        }
        driver.journal.grow([{"name": "units", "conditions": [], "domain": domain, "value": 2}], 0)
        driver.epoch(trial, 2)
        tracked.publisher.publish()
        run = tracked.children[0, 0]
        assert run.data.params == {"trial": "0", "units": "2"}
        assert tracked.series(run, "loss") == [(1, 1.0), (2, 0.5)]
        driver.complete(dataclasses.replace(trial, params={"units": 2}), 0.5, 2)
        tracked.end()
        assert tracked.series(tracked.children[0, 0], "loss") == [(1, 1.0), (2, 0.5)]

    def test_a_killed_driver_is_seen_and_a_resumed_one_goes_on(
        self, driver: Driver, tracked: Tracked
    ) -> None:
        driver.run(0, 0.5)
        trial = driver.begin(1)
        driver.epoch(trial, 1)
        tracked.publisher.publish()
        tracked.publisher.end()  # the journal still says RUNNING
        assert tracked.parent.info.status == "KILLED"
        assert tracked.parent.data.tags[runs.STATE] == "INTERRUPTED"
        assert tracked.children[1, 0].info.status == "KILLED"
        assert tracked.series(tracked.children[1, 0], "loss") == [(1, 1.0)]

        resumed = tracked.again()
        driver.run(1, 0.6, attempt=1)
        resumed.publish()
        assert tracked.parent.info.status == "RUNNING"
        assert tracked.parent.data.tags[runs.STATE] == "RUNNING"
        tracked.end()
        assert [run.info.status for run in tracked.children.values()] == ["FINISHED", "KILLED", "FINISHED"]
        assert tracked.parent.info.status == "FINISHED"

    def test_an_evaluation_that_comes_later(self, driver: Driver, tracked: Tracked) -> None:
        driver.run(0, 0.5)
        tracked.end()
        driver.journal.put("evaluation", {"winner": {"score": 0.25}})
        tracked.again().end()
        assert tracked.parent.data.metrics["test.winner.score"] == 0.25
        assert tracked.parent.info.status == "FINISHED"
        assert len(tracked.runs) == 2

    def test_starting_again_at_every_step_changes_nothing(self, driver: Driver, tracked: Tracked) -> None:
        def step() -> None:
            tracked.again().publish()

        step()
        for number in range(3):
            trial = driver.begin(number)
            step()
            driver.epoch(trial, 1)
            step()
            driver.epoch(trial, 2)
            if number == 1:
                step()
                driver.fail(trial, "crash", "signal 11")
            else:
                driver.complete(trial, 0.5, 2)
            step()
        for _ in range(2):
            tracked.end()
            tracked.again()
        for run in tracked.children.values():
            assert tracked.series(run, "loss") == [(1, 1.0), (2, 0.5)]
        assert [run.info.status for run in tracked.children.values()] == ["FINISHED", "FAILED", "FINISHED"]
        assert tracked.series(tracked.parent, "best_so_far") == [(1, 0.5), (2, 0.5), (3, 0.5)]

    def test_two_studies_may_make_the_experiment_at_once(
        self, launch: Open, client: MlflowClient, workspace: Path, uri: str
    ) -> None:
        space = {"name": f"both-{os.urandom(4).hex()}", "path": "x.py", "digest": "0", "source": "x"}
        both = [Tracked(launch(space=space), client, workspace, uri.startswith("http")) for _ in range(2)]
        for one in both:
            one.again(MlflowClient(tracking_uri=uri))
        gate = threading.Barrier(2)
        errors: list[Exception] = []

        def publish(one: Tracked) -> None:
            # SQLite connections belong to threads, so the thread has a journal of its own.
            with Journal.open(one.driver.journal.path, read_only=True) as journal:
                one.publisher = Publisher(one.publisher._client, journal, one._root)
                gate.wait()
                try:
                    one.publisher.publish()
                except Exception as error:
                    errors.append(error)

        threads = [threading.Thread(target=publish, args=(one,)) for one in both]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert both[0].parent.info.experiment_id == both[1].parent.info.experiment_id


class TestTrouble:
    """What users and networks do to a tracker."""

    def test_calls_are_few(self, driver: Driver, tracked: Tracked) -> None:
        counted = Counting(tracked.client)
        tracked.again(counted)
        tracked.publisher.publish()
        counted.calls.clear()
        for number in range(5):
            driver.run(number, 0.5, epochs=20)
        tracked.publisher.publish()
        assert counted.calls == ["create_run", "log_batch", "set_terminated"] * 5
        counted.calls.clear()
        tracked.publisher.publish()
        assert counted.calls == []

    def test_an_answer_that_is_lost_makes_no_run_twice(self, driver: Driver, tracked: Tracked) -> None:
        broken = Counting(tracked.client)
        tracked.again(broken)
        failures = 0
        driver.run(0, 0.4)
        driver.run(1, 0.5)
        for name in ("create_run", "create_run", "log_batch", "set_terminated", "create_experiment"):
            broken.lose_answer_of = name
            try:
                tracked.publisher.publish()
            except OSError:
                failures += 1
                tracked.publisher.lost_step()
        driver.begin(2)
        broken.lose_answer_of = "create_run"
        with pytest.raises(OSError, match="lost"):
            tracked.publisher.publish()
        tracked.publisher.lost_step()
        assert tracked.publisher.summary()["behind"] >= 1
        tracked.end("STOPPED")
        assert failures >= 3
        assert list(tracked.children) == [(0, 0), (1, 0), (2, 0)]
        assert tracked.publisher.summary()["behind"] == 0

    def test_a_run_made_twice_is_made_one(self, driver: Driver, tracked: Tracked) -> None:
        trial = driver.begin(0)
        tracked.publisher.publish()
        mine = tracked.children[0, 0]
        tags = {key: value for key, value in mine.data.tags.items() if key.startswith("heldout")}
        tracked.client.create_run(tracked.experiment.experiment_id, tags=tags)
        tracked.publisher.lost_step()
        driver.complete(trial, 0.5, 0)
        tracked.end()
        assert tracked.children[0, 0].info.run_id == mine.info.run_id

    def test_one_trial_that_is_refused_stops_no_other(
        self, driver: Driver, tracked: Tracked, caplog: pytest.LogCaptureFixture
    ) -> None:
        refusing = Counting(tracked.client)
        refusing.refuse = lambda params: any(p.key == "units" and p.value == "33" for p in params)
        tracked.again(refusing)
        for number in range(3):
            driver.run(number, 0.5)
        for _ in range(2):
            with pytest.raises(MlflowException):
                tracked.publisher.publish()
            tracked.publisher.lost_step()
        tracked.publisher.publish()
        tracked.end()
        assert "refuses trial 1, attempt 0, so it is left out" in caplog.text
        assert [run.info.status for key, run in tracked.children.items() if key[0] != 1] == ["FINISHED"] * 2

    def test_what_a_user_deletes_stays_deleted(self, driver: Driver, tracked: Tracked) -> None:
        driver.run(0, 0.5)
        trial = driver.begin(1)
        tracked.publisher.publish()
        for key in ((0, 0), (1, 0)):
            tracked.client.delete_run(tracked.children[key].info.run_id)
        driver.epoch(trial, 1)
        driver.complete(trial, 0.6, 1)
        driver.run(2, 0.7)
        with pytest.raises(MlflowException):
            tracked.publisher.publish()
        tracked.publisher.lost_step()
        tracked.end()
        tracked.again().end()
        assert list(tracked.children) == [(2, 0)]

    def test_a_deleted_experiment_comes_back_with_a_new_study(
        self, driver: Driver, tracked: Tracked, launch: Open, workspace: Path, uri: str
    ) -> None:
        driver.run(0, 0.5)
        tracked.end()
        tracked.client.delete_experiment(tracked.experiment.experiment_id)
        later = Tracked(
            launch(space=tracked.meta["space"]), tracked.client, workspace, uri.startswith("http")
        )
        later.publisher.publish()
        assert later.experiment.lifecycle_stage == "active"

    def test_a_store_that_lost_everything_gets_it_again(
        self, driver: Driver, sqlite_uri: str, workspace: Path
    ) -> None:
        tracked = Tracked(driver, MlflowClient(tracking_uri=sqlite_uri), workspace, False)
        driver.run(0, 0.5)
        trial = driver.begin(1)
        driver.epoch(trial, 1)
        tracked.publisher.publish()
        with contextlib.closing(sqlite3.connect(workspace / "mlflow.db")) as database:
            for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
                database.execute(f"DELETE FROM {table}")
            database.commit()
        driver.run(2, 0.6)
        driver.complete(trial, 0.7, 1)
        with pytest.raises(MlflowException):
            tracked.publisher.publish()
        tracked.publisher.lost_step()
        tracked.end()
        assert list(tracked.children) == [(0, 0), (1, 0), (2, 0)]
        assert tracked.series(tracked.children[1, 0], "loss") == [(1, 1.0)]
        assert tracked.series(tracked.parent, "best_so_far") == [(1, 0.5), (2, 0.6), (3, 0.7)]

    def test_a_server_that_takes_no_artifacts_from_us(
        self, driver: Driver, tracked: Tracked, caplog: pytest.LogCaptureFixture
    ) -> None:
        closed = Counting(tracked.client)
        closed.no_artifacts = True
        tracked.again(closed)
        driver.run(0, 0.5)
        for _ in range(3):
            try:
                tracked.publisher.publish()
            except PermissionError:
                tracked.publisher.lost_step()
        tracked.end()
        assert "could not be stored as an artifact" in caplog.text
        assert list(tracked.children) == [(0, 0)]


# ---- the process


class TestProcess:
    def test_it_follows_a_study_to_its_end(self, launch: Open, sqlite_uri: str, workspace: Path) -> None:
        driver = launch(state=None)
        with publishing.start(driver.folder, sqlite_uri) as tracker:
            assert tracker.ready(PATIENCE)
            assert publishing.read(driver.folder) == {}  # it may yet be called off
            driver.journal.put("state", "RUNNING")
            driver.run(0, 0.5)
            told = until(lambda: publishing.read(driver.folder).get("runs"))
            assert list(told) == ["0"]
            driver.run(1, 0.6)
            driver.journal.put("state", "COMPLETE")
            assert tracker.finish(PATIENCE)
        tracked = Tracked(driver, MlflowClient(tracking_uri=sqlite_uri), workspace, False)
        assert [run.info.status for run in tracked.children.values()] == ["FINISHED"] * 2
        assert tracked.parent.info.status == "FINISHED"
        found = publishing.read(driver.folder)
        assert found["uri"] == sqlite_uri
        assert (found["behind"], found["error"]) == (0, None)
        assert found["experiment_id"] == tracked.experiment.experiment_id
        assert (driver.folder / publishing.LOG_FILE).read_text() == ""

    @pytest.mark.faults
    def test_it_makes_the_workspace_store_whole_or_not_at_all(
        self, launch: Open, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        driver = launch()
        uri = publishing.default_uri(workspace)
        for delay in (1.8, 2.6, 3.4):
            with publishing.start(driver.folder, uri) as tracker:
                time.sleep(delay)
                tracker._process.kill()
        driver.run(0, 0.5)
        driver.journal.put("state", "COMPLETE")
        with publishing.start(driver.folder, uri) as tracker:
            assert tracker.finish(PATIENCE)
        assert list(Tracked(driver, MlflowClient(tracking_uri=uri), workspace, False).children) == [(0, 0)]
        left = {path.name for path in workspace.iterdir() if not path.name.startswith("mlflow.db")}
        assert left == {"studies", "artifacts"}

    @pytest.mark.faults
    @pytest.mark.parametrize("delay", [0.5, 2.5, 3.0])
    def test_a_study_called_off_at_once_leaves_nothing(
        self, launch: Open, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, delay: float
    ) -> None:
        (tmp_path / "temporary").mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
        monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
        with publishing.start(launch(state=None).folder, publishing.default_uri(workspace)):
            time.sleep(delay)
        assert list((tmp_path / "temporary").iterdir()) == []
        # SQLite's own files stay beside a database whose writer was killed; the next one takes them up.
        names = {path.name.removesuffix("-wal").removesuffix("-shm") for path in workspace.iterdir()}
        assert names <= {"studies", "mlflow.db"}

    @pytest.mark.faults
    def test_nor_does_a_tracker_that_has_to_be_killed(
        self, launch: Open, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "temporary").mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
        monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
        with publishing.start(launch(state=None).folder, publishing.default_uri(workspace)) as tracker:
            until(lambda: any((tmp_path / "temporary").iterdir()))
            os.kill(tracker._process.pid, signal.SIGSTOP)  # deaf to all but SIGKILL
        assert list((tmp_path / "temporary").iterdir()) == []

    def test_a_study_that_never_began_leaves_no_run(self, launch: Open, sqlite_uri: str) -> None:
        driver = launch(state=None)
        with publishing.start(driver.folder, sqlite_uri) as tracker:
            assert tracker.finish(PATIENCE)
        client = MlflowClient(tracking_uri=sqlite_uri)
        assert [one.name for one in client.search_experiments(ViewType.ALL)] == ["Default"]

    @pytest.mark.faults
    def test_a_server_that_is_away(self, launch: Open, empty_store: Path, workspace: Path) -> None:
        driver = launch()
        driver.run(0, 0.5)
        port = free_port()
        uri = f"http://ada:s3cret@127.0.0.1:{port}"
        with publishing.start(driver.folder, uri) as tracker:
            assert not tracker.ready()  # nor does it wait
            told = until(lambda: publishing.read(driver.folder))
            assert told["behind"] == 2
            assert told["uri"] == f"http://127.0.0.1:{port}"
            with pytest.raises(TrackingError, match="must be usable, but"):
                tracker.ready(PATIENCE)
            driver.run(1, 0.6)
            driver.journal.put("state", "COMPLETE")
            assert not tracker.finish(3)
        assert publishing.read(driver.folder)["behind"] == 4
        log = (driver.folder / publishing.LOG_FILE).read_text()
        assert log.count("trying again") <= 2
        assert "s3cret" not in log + json.dumps(publishing.read(driver.folder))

        shutil.copy(empty_store, workspace)
        with ui.serve(workspace, port) as server, publishing.start(driver.folder, server.url) as tracker:
            assert tracker.finish(PATIENCE)
            tracked = Tracked(driver, MlflowClient(tracking_uri=server.url), workspace, True)
            assert list(tracked.children) == [(0, 0), (1, 0)]
        assert publishing.read(driver.folder)["behind"] == 0

    @pytest.mark.faults
    @pytest.mark.timeout(300)
    def test_killed_at_any_moment_it_has_each_trial_once(
        self, launch: Open, sqlite_uri: str, workspace: Path
    ) -> None:
        driver, draw = launch(), random.Random(7)
        number = 0
        for _ in range(8):
            with publishing.start(driver.folder, sqlite_uri) as tracker:
                tracker.ready(PATIENCE)
                quiet = time.monotonic() + draw.uniform(0.0, 1.0)
                while time.monotonic() < quiet:
                    driver.run(number, 0.5, epochs=5)
                    number += 1
                    time.sleep(0.02)
                tracker._process.kill()
        driver.journal.put("state", "COMPLETE")
        with publishing.start(driver.folder, sqlite_uri) as tracker:
            assert tracker.finish(PATIENCE)
        tracked = Tracked(driver, MlflowClient(tracking_uri=sqlite_uri), workspace, False)
        children = tracked.children
        assert list(children) == [(n, 0) for n in range(number)]
        for run in children.values():
            assert run.info.status == "FINISHED"
            assert len(tracked.series(run, "loss")) == 5
            assert len(run.data.params) == 5
        assert len(tracked.series(tracked.parent, "best_so_far")) == number

    @pytest.mark.faults
    def test_a_server_killed_and_restarted_in_mid_study(
        self, launch: Open, empty_store: Path, workspace: Path
    ) -> None:
        driver, port = launch(), free_port()
        shutil.copy(empty_store, workspace)
        server = ui.serve(workspace, port)
        try:
            with publishing.start(driver.folder, server.url) as tracker:
                driver.run(0, 0.5)
                until(lambda: publishing.read(driver.folder).get("published") == 2)
                os.killpg(server._process.pid, signal.SIGKILL)
                server.close()
                driver.run(1, 0.6)
                until(lambda: publishing.read(driver.folder).get("behind") == 2)
                server = ui.serve(workspace, port)
                until(lambda: publishing.read(driver.folder).get("behind") == 0)
                driver.run(2, 0.7)
                driver.journal.put("state", "COMPLETE")
                assert tracker.finish(PATIENCE)
            tracked = Tracked(driver, MlflowClient(tracking_uri=server.url), workspace, True)
            assert list(tracked.children) == [(0, 0), (1, 0), (2, 0)]
        finally:
            server.close()
        log = (driver.folder / publishing.LOG_FILE).read_text()
        assert "MLflow is back after" in log

    def test_it_ends_with_its_driver_and_marks_what_was_left(
        self, launch: Open, sqlite_uri: str, workspace: Path
    ) -> None:
        driver = launch()
        driver.run(0, 0.5)
        driver.begin(1)
        code = (
            "import sys, time; from pathlib import Path; from search.tracker import publishing;"
            "t = publishing.start(Path(sys.argv[1]), sys.argv[2]); print(t._process.pid, flush=True);"
            "t.ready(60); print('ready', flush=True); time.sleep(600)"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(driver.folder), sqlite_uri],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert process.stdout.readline() == "ready\n"
        process.kill()
        process.wait()
        process.stdout.close()
        until(lambda: not is_alive(pid))
        tracked = Tracked(driver, MlflowClient(tracking_uri=sqlite_uri), workspace, False)
        assert tracked.parent.info.status == "KILLED"
        assert [run.info.status for run in tracked.children.values()] == ["FINISHED", "KILLED"]

    def test_the_next_one_waits_for_the_last(self, launch: Open, sqlite_uri: str, workspace: Path) -> None:
        driver = launch()
        driver.run(0, 0.5)
        with publishing.start(driver.folder, sqlite_uri) as first:
            until(lambda: publishing.read(driver.folder).get("runs"))
            with publishing.start(driver.folder, sqlite_uri) as second:
                assert not second.ready(1.0)
                driver.journal.put("state", "COMPLETE")
                assert first.finish(PATIENCE)
                assert second.finish(PATIENCE)
        assert len(Tracked(driver, MlflowClient(tracking_uri=sqlite_uri), workspace, False).runs) == 2

    def test_no_credential_is_to_be_seen(self, launch: Open) -> None:
        driver = launch()
        uri = "postgresql://ada:p4ss/w0rd@127.0.0.1:1/mlflow?sslpassword=k3y"
        with publishing.start(driver.folder, uri) as tracker:
            line = Path(f"/proc/{tracker._process.pid}/cmdline")
            if line.exists():
                assert b"w0rd" not in line.read_bytes()
            with pytest.raises(TrackingError) as caught:
                tracker.ready(PATIENCE)
        told = str(caught.value) + "".join(
            path.read_text() for path in driver.folder.iterdir() if path.name.startswith("tracking")
        )
        assert "w0rd" not in told and "k3y" not in told and "ada" not in told
        assert "\n" not in str(caught.value)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"

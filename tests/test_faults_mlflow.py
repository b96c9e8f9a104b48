"""MLflow away, slow, locked or restarted, and trackers that are killed: the study goes on, each trial is there once."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from search.record.journal import Journal
from search.study import Study
from search.tracker import publishing, runs, tracking, ui
from search.trial import TrialState

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what MLflow's libraries warn of at import is not ours to mend
    from mlflow import MlflowClient

from tests.conftest import ROOT, Heldout
from tests.proxy import proxy
from tests.tiny import write_space
from tests.tracked import PATIENCE, Driver, Tracked, free_port, study, until

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:::(mlflow|sqlalchemy|alembic|google|pydantic)"),
]
# Far more than anything here takes, even on a busy machine: it bounds a failure, not a success.
TRIALS = 6
PLAN = ("--trials", str(TRIALS), "--workers", "1", "--evaluate", "no", "--confirm", "0", "--study", "s")
# Trials hold at an epoch's beginning for as long as a file is there.
HOLDING = """
import os, time


class Holding(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        while os.path.exists(os.environ["HOLD"]):
            time.sleep(0.02)


def callbacks(hp):
    return [Holding()]
"""


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file as MLflow makes it, which takes seconds: made once and copied."""
    file = tmp_path_factory.mktemp("empty") / "mlflow.db"
    tracking.connect(f"sqlite:///{file}")
    return file


@pytest.fixture
def workspace(tmp_path: Path, empty_store: Path) -> Path:
    (tmp_path / "ws").mkdir()
    shutil.copy(empty_store, tmp_path / "ws")
    return tmp_path / "ws"


@pytest.fixture
def store(tmp_path: Path, empty_store: Path) -> Path:
    """A server's folder."""
    (tmp_path / "store").mkdir()
    shutil.copy(empty_store, tmp_path / "store")
    return tmp_path / "store"


# ---- studies through the command line


class Launched:
    """A study that `heldout launch` runs."""

    def __init__(self, tmp_path: Path, workspace: Path, **environment: str) -> None:
        self.hold = tmp_path / "hold"
        self.environment = {"HOLD": str(self.hold), **environment}
        space = write_space(tmp_path, "holding", rest=HOLDING)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "search.cli", "launch", space, *PLAN, "--workspace", str(workspace)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **self.environment},
        )
        self.told: list[str] = []
        self.folder = workspace / "studies" / "s"
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.told.append(line)

    def ended(self) -> int:
        """Trials that have ended so far."""
        return sum(bool(re.match(r"trial \d+ \[", line)) for line in self.told)

    def reach(self, trials: int) -> None:
        """Wait until so many trials have ended."""
        until(lambda: self.ended() >= trials or self.process.poll() is not None)
        assert self.ended() >= trials, "".join(self.told)

    def complete(self) -> None:
        """Wait for the study's end."""
        code = self.process.wait(PATIENCE * 2)
        self._reader.join(PATIENCE)
        assert code == 0, "".join(self.told)

    @property
    def tracker(self) -> int:
        """Process number of its tracker, which is a child of its own."""

        def found() -> int | None:
            for entry in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                    if parent == self.process.pid and b"search.tracker.tracking" in (entry / "cmdline").read_bytes():
                        return int(entry.name)
            return None

        return int(until(found))

    def power_cut(self) -> None:
        """End driver and tracker with neither having a moment for a last word."""
        self.process.send_signal(signal.SIGSTOP)  # or it would start another tracker
        os.kill(self.tracker, signal.SIGKILL)
        self.process.kill()
        self.process.wait(PATIENCE)

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        assert self.process.stderr is not None
        self.process.stderr.close()


def in_mlflow(workspace: Path, uri: str) -> Tracked:
    """What MLflow has of the study, to be read through ``Tracked``."""
    folder = workspace / "studies" / "s"
    reader = Driver(folder, Journal.open(folder / "journal.sqlite", read_only=True))
    found = Tracked.__new__(Tracked)
    found.driver, found.client, found.meta = reader, MlflowClient(tracking_uri=uri), reader.journal.get("study")
    return found


def assert_whole(workspace: Path, uri: str, attempts: dict[int, int] | None = None) -> None:
    """MLflow has every trial of the journal once, ended as it did, with every epoch of its last attempt."""
    tracked = in_mlflow(workspace, uri)
    trials = Study("s", workspace).trials
    assert len(trials) == TRIALS and all(trial.state is TrialState.COMPLETE for trial in trials)
    children = tracked.children  # checks that none is there twice
    expected = [(n, attempt) for n in range(TRIALS) for attempt in range((attempts or {}).get(n, 0) + 1)]
    assert list(children) == expected
    for trial in trials:
        run = children[trial.number, trial.attempt]
        assert run.info.status == "FINISHED"
        assert run.data.metrics["score"] == trial.score
        assert run.data.params["rate"] == str(trial.params["rate"])
        assert [step for step, _ in tracked.series(run, "val_accuracy")] == list(range(1, trial.epochs + 1))
        for earlier in range(trial.attempt):
            assert children[trial.number, earlier].info.status == "KILLED"
    assert tracked.parent.info.status == "FINISHED"
    assert [step for step, _ in tracked.series(tracked.parent, "best_so_far")] == list(range(1, TRIALS + 1))
    told = publishing.read(workspace / "studies" / "s")
    assert (told["behind"], told["error"]) == (0, None)
    tracked.driver.journal.close()


def test_a_server_killed_and_restarted_during_a_study(tmp_path: Path, workspace: Path, store: Path) -> None:
    port = free_port()
    server = ui.serve(store, port)
    try:
        with Launched(tmp_path, workspace, MLFLOW_TRACKING_URI=server.url) as launched:
            launched.reach(2)
            os.killpg(server._process.pid, signal.SIGKILL)
            server.close()
            before = launched.ended()
            launched.reach(before + 1)  # goes on without it
            until(lambda: publishing.read(launched.folder).get("error"))
            server = ui.serve(store, port)
            launched.complete()
        assert_whole(workspace, server.url)
    finally:
        server.close()


def test_a_slow_server(tmp_path: Path, workspace: Path, store: Path) -> None:
    with ui.serve(store, free_port()) as server, proxy(server.url) as slow:
        with Launched(tmp_path, workspace, MLFLOW_TRACKING_URI=f"http://{slow.address}") as launched:
            launched.reach(1)
            slow.delay = 15.0  # each request; a trial needs three
            launched.reach(TRIALS)
            published = publishing.read(launched.folder).get("published", 0)
            with Journal.open(launched.folder / "journal.sqlite", read_only=True) as journal:
                assert published < journal.length, "the study waited for MLflow"
            slow.delay = 0.5
            launched.complete()
        assert_whole(workspace, server.url)


def test_a_tracking_database_that_another_process_locks_for_30_s(tmp_path: Path, workspace: Path) -> None:
    code = (
        "import sqlite3, sys\n"
        "connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=60)\n"
        "connection.execute('BEGIN EXCLUSIVE')\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with Launched(tmp_path, workspace) as launched:
        launched.reach(1)
        command = [sys.executable, "-c", code, str(workspace / "mlflow.db")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, text=True, **pipes) as other:  # type: ignore[call-overload]
            assert other.stdout.readline() == "locked\n"
            ends = time.monotonic() + 30.0
            before = launched.ended()
            launched.reach(min(before + 2, TRIALS))
            assert time.monotonic() < ends, "the study waited for MLflow"
            time.sleep(max(0.0, ends - time.monotonic()))  # what is tested is a time
            other.communicate()
        launched.complete()
    assert_whole(workspace, publishing.default_uri(workspace))


def test_a_tracker_killed_during_a_study_is_started_again(tmp_path: Path, workspace: Path) -> None:
    with Launched(tmp_path, workspace) as launched:
        killed = set()
        for trials in (1, 3):
            launched.reach(trials)
            killed.add(tracker := launched.tracker)
            os.kill(tracker, signal.SIGKILL)
        launched.complete()
    assert len(killed) == 2
    assert_whole(workspace, publishing.default_uri(workspace))


def test_zombies_of_a_power_cut_are_closed_on_resume(tmp_path: Path, workspace: Path, heldout: Heldout) -> None:
    uri = publishing.default_uri(workspace)
    with Launched(tmp_path, workspace) as launched:
        launched.reach(1)
        launched.hold.touch()
        until(lambda: Study("s", workspace).trials[-1].state is TrialState.RUNNING)
        number = Study("s", workspace).trials[-1].number
        until(lambda: str(number) in publishing.read(launched.folder).get("runs", {}))
        launched.power_cut()
    zombies = in_mlflow(workspace, uri)
    assert zombies.parent.info.status == "RUNNING"
    assert zombies.children[number, 0].info.status == "RUNNING"
    launched.hold.unlink()

    resumed = heldout("resume", "s", "--workspace", str(workspace), **launched.environment)
    assert resumed.returncode == 0, resumed.stderr
    assert_whole(workspace, uri, attempts={number: 1})
    assert zombies.children[number, 0].data.tags[runs.STATE] == "WAITING"
    zombies.driver.journal.close()


def test_resume_goes_on_while_the_server_is_away(
    tmp_path: Path, workspace: Path, store: Path, heldout: Heldout
) -> None:
    port = free_port()
    with ui.serve(store, port) as server, Launched(tmp_path, workspace, MLFLOW_TRACKING_URI=server.url) as launched:
        launched.reach(2)
        launched.hold.touch()
        until(lambda: Study("s", workspace).trials[-1].state is TrialState.RUNNING)
        number = Study("s", workspace).trials[-1].number
        launched.power_cut()
    launched.hold.unlink()
    resumed = heldout("resume", "s", "--workspace", str(workspace), timeout=PATIENCE * 3, **launched.environment)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stderr.count("must answer, but") == 1 and "going on without it" in resumed.stderr
    assert "MLflow has not caught up yet" in resumed.stderr
    with ui.serve(store, port) as server:
        with publishing.start(launched.folder, server.url) as tracker:
            assert tracker.finish(PATIENCE)
        assert_whole(workspace, server.url, attempts={number: 1})


# ---- the tracker alone


@pytest.fixture
def driver(workspace: Path) -> Iterator[Driver]:
    folder = workspace / "studies" / "digits"
    folder.mkdir(parents=True)
    journal = Journal.create(folder / "journal.sqlite", {"study": study(workspace), "state": "RUNNING"})
    yield Driver(folder, journal)
    journal.close()


def published(driver: Driver, workspace: Path, trials: int) -> None:
    driver.journal.put("state", "COMPLETE")
    tracked = Tracked(driver, MlflowClient(tracking_uri=publishing.default_uri(workspace)), workspace, False)
    assert [(key, run.info.status) for key, run in tracked.children.items()] == [
        ((number, 0), "FINISHED") for number in range(trials)
    ]
    for run in tracked.children.values():
        assert len(tracked.series(run, "loss")) == 3


def test_a_dead_tracker_comes_back_with_a_growing_pause(driver: Driver, workspace: Path) -> None:
    with publishing.start(driver.folder, publishing.default_uri(workspace)) as tracker:
        tracker.tend()
        first = tracker._process.pid
        pauses = []
        for number in range(3):
            tracker._process.kill()
            tracker._process.wait()
            died = time.monotonic()
            driver.run(number, 0.5)
            before = tracker._process.pid
            until(lambda: tracker.tend() or tracker._process.pid != before)  # noqa: B023
            pauses.append(time.monotonic() - died)
        assert pauses[0] >= 0.9 and pauses[1] >= 1.9 and pauses[2] >= 3.9
        assert tracker._process.pid != first
        until(lambda: publishing.read(driver.folder).get("published") == driver.journal.length)
        driver.journal.put("state", "COMPLETE")
        assert tracker.finish(PATIENCE)
    published(driver, workspace, 3)


def test_finish_lets_a_dead_tracker_catch_up(driver: Driver, workspace: Path) -> None:
    with publishing.start(driver.folder, publishing.default_uri(workspace)) as tracker:
        driver.run(0, 0.5)
        tracker._process.kill()
        tracker._process.wait()
        driver.run(1, 0.6)
        driver.journal.put("state", "COMPLETE")
        assert tracker.finish(PATIENCE)
    published(driver, workspace, 2)


def test_a_tracker_that_dies_while_it_finishes(driver: Driver, workspace: Path) -> None:
    uri = publishing.default_uri(workspace)
    other = sqlite3.connect(workspace / "mlflow.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")

    def kill() -> None:
        until(lambda: tracker._process.stdin.closed)  # it has been told to finish, and cannot write
        tracker._process.kill()
        other.execute("ROLLBACK")

    with publishing.start(driver.folder, uri) as tracker:
        assert tracker.ready(PATIENCE)
        driver.run(0, 0.5)
        driver.journal.put("state", "COMPLETE")
        thread = threading.Thread(target=kill)
        thread.start()
        assert tracker.finish(PATIENCE)
        thread.join()
    other.close()
    published(driver, workspace, 1)


def test_a_tracker_that_cannot_be_started_is_tried_again(
    driver: Driver, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refusals = subprocess.Popen, 2

    def scarce(*arguments: Any, **named: Any) -> Any:
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise OSError(12, "Cannot allocate memory")
        return real(*arguments, **named)

    with publishing.start(driver.folder, publishing.default_uri(workspace)) as tracker:
        tracker._process.kill()
        dead = tracker._process
        dead.wait()
        monkeypatch.setattr(subprocess, "Popen", scarce)
        until(lambda: tracker.tend() or tracker._process is not dead)
        assert refusals == 0
        driver.run(0, 0.5)
        driver.journal.put("state", "COMPLETE")
        assert tracker.finish(PATIENCE)
    published(driver, workspace, 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full, which Linux has")
def test_a_full_disk_does_not_end_the_tracker(driver: Driver, workspace: Path, store: Path) -> None:
    port = free_port()
    (driver.folder / publishing.LOG_FILE).symlink_to("/dev/full")
    draft = driver.folder / f"{publishing.STATE_FILE}.new"
    draft.symlink_to("/dev/full")
    driver.run(0, 0.5)
    with publishing.start(driver.folder, f"http://127.0.0.1:{port}") as tracker:
        pid = tracker._process.pid
        until(lambda: not draft.is_symlink())  # it has tried to say that the server is away, and cleared up
        assert publishing.read(driver.folder) == {} and tracker._process.poll() is None
        with ui.serve(store, port) as server:
            until(lambda: publishing.read(driver.folder).get("behind") == 0)
            driver.run(1, 0.6)
            driver.journal.put("state", "COMPLETE")
            assert tracker.finish(PATIENCE) and tracker._process.pid == pid
            children = Tracked(driver, MlflowClient(tracking_uri=server.url), workspace, True).children
            assert list(children) == [(0, 0), (1, 0)]
    assert json.loads((driver.folder / publishing.STATE_FILE).read_text())["error"] is None


def test_a_torn_status_file_is_written_anew(driver: Driver, workspace: Path) -> None:
    (driver.folder / publishing.STATE_FILE).write_text('{"behind": 1')
    driver.run(0, 0.5)
    driver.journal.put("state", "COMPLETE")
    assert publishing.read(driver.folder) == {}
    with publishing.start(driver.folder, publishing.default_uri(workspace)) as tracker:
        assert tracker.finish(PATIENCE)
    assert publishing.read(driver.folder)["behind"] == 0
    published(driver, workspace, 1)

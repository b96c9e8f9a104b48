"""Deleting studies and collecting garbage, in a workspace with a real MLflow store beside its journals."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from search.errors import RequestError, StudyError, TrackingError
from search.guard.ledger import Ledger
from search.record import garbage, lifecycle, places
from search.record.journal import Journal
from search.record.lock import locked
from search.record.repairing import repair
from search.study import Study, names, workspace_id
from search.tracker import publishing, runs, tracking, ui
from search.trial import Trial, TrialState
from tests.conftest import ROOT, Heldout
from tests.tiny import write_space

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what MLflow's libraries warn of at import is not ours to mend
    from mlflow import MlflowClient
    from mlflow.entities import ViewType

    from search.tracker.publisher import Publisher

from tests.tracked import Driver, free_port, study

pytestmark = pytest.mark.filterwarnings("ignore:::(mlflow|sqlalchemy|alembic|google|pydantic)")
SPACE = "cells"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's file, which takes seconds to make: made once and copied."""
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    tracking.connect(f"sqlite:///{file}")
    return file


class Workspace:
    """Studies in their journals, published, with rows and trials' files."""

    def __init__(self, root: Path, store: Path | None = None, uri: str | None = None) -> None:
        self.root = root
        (root / "studies").mkdir(parents=True)
        if store is not None:
            shutil.copy(store, root / "mlflow.db")
        self.uri = uri or publishing.default_uri(root)
        self.client = MlflowClient(self.uri)

    def add(self, name: str, digest: str, **changes: Any) -> str:
        """A complete study of three trials on these rows; its id."""
        folder = self.root / "studies" / name
        folder.mkdir()
        own = {"name": name, "tracking_uri": self.uri, "workspace_id": workspace_id(self.root)}
        meta = study(self.root) | own | changes
        meta["space"] = meta["space"] | {"name": SPACE}
        prepared: dict[str, Any] = {"preprocess": None}
        for kind in ("rows", "sealed"):
            place = self.root / kind / digest
            prepared[kind] = str(place)
            place.mkdir(parents=True, exist_ok=True)
            (place / "manifest.json").write_text("{}")
            (place / "x_0.npy").write_bytes(b"x" * 5000)
        known = {"study": meta, "prepared": prepared, "state": "RUNNING"}
        with Journal.create(folder / "journal.sqlite", known) as journal:
            driver = Driver(folder, journal)
            for number, score in enumerate((0.5, 0.7, 0.6)):
                driver.run(number, score)
                place = places.trial(folder, number)
                place.mkdir(parents=True)
                (place / "log.txt").write_text("it printed this")
                (place / places.WEIGHTS).write_bytes(b"w" * 2000)
            journal.put("state", "COMPLETE")
            own = None if self.uri.startswith("http") else self.root / "artifacts"
            Publisher(self.client, Journal.open(journal.path, read_only=True), own).end()
        return str(meta["study_id"])

    def runs(self, study_id: str) -> dict[str, str]:
        """Run to lifecycle stage of all that MLflow has of a study."""
        found = self.client.search_runs(
            [self.client.get_experiment_by_name(SPACE).experiment_id],
            f"tags.`{runs.STUDY_ID}` = '{study_id}'",
            ViewType.ALL,
        )
        return {run.info.run_id: run.info.lifecycle_stage for run in found}

    def files(self) -> set[str]:
        found = (path for path in self.root.rglob("*") if path.is_file() and not path.name.startswith("mlflow.db"))
        found = (path for path in found if path != self.root / "id")  # the workspace's own
        return {str(path.relative_to(self.root)) for path in found}

    def artifacts(self) -> set[str]:
        """Runs that have artifacts on this disk."""
        return {path.name for path in (self.root / "artifacts" / SPACE).iterdir()}


@pytest.fixture
def workspace(tmp_path: Path, store: Path) -> Workspace:
    return Workspace(tmp_path / "a work space", store)


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    """With an opening, which must be there afterwards byte by byte."""
    import numpy as np

    made = Ledger()
    made.append({"fingerprint": "f", "frozen": "g", "study": "one"}, np.arange(9, dtype=np.uint64))
    before = made.path.read_bytes()
    yield made
    assert made.path.read_bytes() == before and made.verify() == 1


def aged(path: Path, seconds: float = 3600.0) -> Path:
    then = time.time() - seconds
    os.utime(path, (then, then))
    return path


# ── delete ───────────────────────────────────────────────────────────────────────────────────────


def test_a_study_goes_with_its_runs_and_artifacts_and_others_stay_as_they_are(
    workspace: Workspace, ledger: Ledger
) -> None:
    mine, other = workspace.add("one", "aaa"), workspace.add("two", "aaa")
    theirs, kept = workspace.runs(other), workspace.artifacts()
    assert len(workspace.runs(mine)) == 4 and len(theirs) == 4 and len(kept) == 2

    found = lifecycle.delete("one", workspace=workspace.root)
    assert (found["study"], found["rows"]) == ("one", False) and found["bytes"] > 6000
    assert found["mlflow"] == {"marked": 0, "artifacts_left": 0, "versions": []} | {
        key: found["mlflow"][key] for key in ("runs", "bytes")
    }
    assert found["mlflow"]["runs"] == 4 and found["mlflow"]["bytes"] > 0
    assert workspace.runs(mine) == {} and workspace.runs(other) == theirs
    assert workspace.artifacts() < kept and len(workspace.artifacts()) == 1
    assert names(workspace.root) == ["two"] and not (workspace.root / "studies" / "one").exists()
    assert (workspace.root / "rows" / "aaa" / "x_0.npy").exists() and not (workspace.root / "deleting").exists()

    assert lifecycle.delete("two", workspace=workspace.root)["rows"]
    assert workspace.runs(other) == {} and workspace.files() == set()
    assert any("the ledger keeps" in line for line in lifecycle.lines(found))


def test_params_metrics_and_tags_are_gone_from_the_store(workspace: Workspace) -> None:
    import sqlite3
    from contextlib import closing

    workspace.add("one", "aaa")
    lifecycle.delete("one", workspace=workspace.root)
    with closing(sqlite3.connect(workspace.root / "mlflow.db")) as connection:
        for table in ("runs", "params", "metrics", "latest_metrics", "tags"):
            assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,), table


def test_a_study_that_is_driven_or_not_there_is_refused(workspace: Workspace) -> None:
    workspace.add("one", "aaa")
    before = workspace.files()
    with locked(workspace.root / "studies" / "one"):
        with pytest.raises(StudyError, match="is being driven already"):
            lifecycle.delete("one", workspace=workspace.root)
    locks = {"studies/one/lock", "studies/one/processes.lock"}
    assert workspace.files() == before | locks and names(workspace.root) == ["one"]
    with pytest.raises(StudyError, match="no study called 'none'"):
        lifecycle.delete("none", workspace=workspace.root)
    with pytest.raises(StudyError, match="a study's name must be"):
        lifecycle.delete("../one", workspace=workspace.root)


def test_with_mlflow_away_nothing_is_deleted_unless_its_runs_may_stay(tmp_path: Path, store: Path) -> None:
    workspace = Workspace(tmp_path / "ws", store)
    workspace.add("one", "aaa")
    away = f"http://127.0.0.1:{free_port()}"
    with Journal.open(workspace.root / "studies" / "one" / "journal.sqlite") as journal:
        journal.put("study", journal.get("study") | {"tracking_uri": away})
    with pytest.raises(TrackingError, match="nothing was deleted: .*must answer.*--keep-runs"):
        lifecycle.delete("one", workspace=workspace.root)
    assert names(workspace.root) == ["one"]
    found = lifecycle.delete("one", workspace=workspace.root, keep_runs=True)
    assert found["mlflow"] is None and {path.split("/")[0] for path in workspace.files()} == {"artifacts", "keep-runs"}
    assert garbage.gc(workspace.root)["removed"] == []  # nor is it garbage then


def test_credentials_that_are_not_recorded_are_asked_for(workspace: Workspace) -> None:
    workspace.add("one", "aaa", tracking_secret=True)
    with Journal.open(workspace.root / "studies" / "one" / "journal.sqlite") as journal:
        journal.put("study", journal.get("study") | {"tracking_uri": "http://127.0.0.1:9"})
    with pytest.raises(TrackingError, match="set MLFLOW_TRACKING_URI to"):
        lifecycle.delete("one", workspace=workspace.root)
    assert names(workspace.root) == ["one"]


def test_a_damaged_journal_is_said_and_its_study_can_still_go(workspace: Workspace) -> None:
    workspace.add("one", "aaa")
    (workspace.root / "studies" / "one" / "journal.sqlite").write_bytes(b"not a journal" * 100)
    with pytest.raises(RequestError, match="must be a readable journal|must be a journal"):
        lifecycle.delete("one", workspace=workspace.root)
    lifecycle.delete("one", workspace=workspace.root, keep_runs=True)
    assert not (workspace.root / "studies" / "one").exists()


def test_registered_versions_and_the_files_they_read_are_left_alone_and_said(workspace: Workspace) -> None:
    mine = workspace.add("one", "aaa")
    parent = next(run for run in workspace.runs(mine) if run in workspace.artifacts())
    workspace.client.create_registered_model("digits")
    source = f"{workspace.client.get_run(parent).info.artifact_uri}/space"
    workspace.client.create_model_version("digits", source, run_id=parent)
    found = lifecycle.delete("one", workspace=workspace.root)
    assert found["mlflow"]["versions"] == ["digits 1"] and workspace.runs(mine) == {}
    assert workspace.artifacts() == {parent}
    assert workspace.client.get_model_version("digits", "1").source == source
    assert any("registered models are left alone: digits 1" in line for line in lifecycle.lines(found))


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["runs", "rows", "files", "journal"])
def test_what_a_kill_cut_short_is_no_study_any_more_and_a_second_delete_finishes_it(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    mine, other = workspace.add("one", "aaa"), workspace.add("two", "bbb")
    theirs = workspace.runs(other)
    removed = lifecycle.remove

    def kill(*_: Any) -> Any:
        raise Killed

    def remove(path: Path) -> None:
        if moment == "journal" and path.name.startswith("one."):
            (path / "lock").unlink(missing_ok=True)
            raise Killed
        removed(path)
        if moment == "files" and path.name == "trials":
            raise Killed

    with monkeypatch.context() as patch:
        if moment == "runs":
            patch.setattr(publishing, "call", kill)
        elif moment == "rows":
            patch.setattr(lifecycle, "discard", kill)
        else:
            patch.setattr(lifecycle, "remove", remove)
        with pytest.raises(Killed):
            lifecycle.delete("one", workspace=workspace.root)
    assert names(workspace.root) == ["two"]
    (half,) = lifecycle.halves(workspace.root)
    assert half.name == f"one.{mine[:8]}"

    third = workspace.add("one", "ccc")  # the name is free, and this one is not meant by gc
    assert garbage.gc(workspace.root)["left"] == []
    assert names(workspace.root) == ["two", "one"] and workspace.runs(mine) == {}
    assert workspace.runs(other) == theirs and len(workspace.runs(third)) == 4
    assert not (workspace.root / "rows" / "aaa").exists() and not (workspace.root / "deleting").exists()


def test_a_second_delete_finishes_the_first(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = workspace.add("one", "aaa")

    def kill(*_: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(publishing, "call", kill)
        lifecycle.delete("one", workspace=workspace.root)
    found = lifecycle.delete("one", workspace=workspace.root)
    assert found["mlflow"]["runs"] == 4 and workspace.runs(mine) == {} and workspace.files() == set()


@pytest.mark.slow
def test_on_a_server_runs_are_marked_and_other_peoples_are_not_touched(tmp_path: Path, store: Path) -> None:
    served = tmp_path / "server"
    served.mkdir()
    shutil.copy(store, served)
    with ui.serve(served, free_port()) as server:
        workspace = Workspace(tmp_path / "ws", uri=server.url)
        mine, other = workspace.add("one", "aaa"), workspace.add("two", "aaa")
        theirs = workspace.runs(other)
        before = {path for path in served.rglob("*") if path.is_file() and "mlflow.db" not in path.name}
        assert len(before) == 2
        found = lifecycle.delete("one", workspace=workspace.root)
        assert (found["mlflow"]["runs"], found["mlflow"]["marked"], found["mlflow"]["artifacts_left"]) == (4, 4, 0)
        assert set(workspace.runs(mine).values()) == {"deleted"} and workspace.runs(other) == theirs
        assert len([path for path in before if path.exists()]) == 1
        assert any("`mlflow gc` there" in line for line in lifecycle.lines(found))
        shutil.rmtree(workspace.root / "studies" / "two")
        assert all("MLflow" not in one["what"] for one in garbage.gc(workspace.root)["removed"])
        assert workspace.runs(other) == theirs


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_delete_killed_at_any_moment_is_finished_by_the_next(tmp_path: Path, store: Path) -> None:
    moments, cut = random.Random(7), 0
    for round_ in range(8):
        workspace = Workspace(tmp_path / f"ws{round_}", store)
        mine, other = workspace.add("one", "aaa"), workspace.add("two", "bbb")
        theirs = workspace.runs(other)
        command = [sys.executable, "-m", "search.cli", "delete", "one", "--yes", "--workspace", str(workspace.root)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
        try:
            process.wait(moments.uniform(0.1, 6.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            cut += 1
        process.communicate()
        if (workspace.root / "studies" / "one").exists() or lifecycle.halves(workspace.root):
            lifecycle.delete("one", workspace=workspace.root)
        assert workspace.runs(mine) == {} and workspace.runs(other) == theirs and names(workspace.root) == ["two"]
        assert not (workspace.root / "rows" / "aaa").exists() and not (workspace.root / "deleting").exists()
    assert cut


# ── gc ───────────────────────────────────────────────────────────────────────────────────────────


def kinds(found: dict[str, Any]) -> list[str]:
    return sorted(one["what"] for one in found["removed"])


def test_nothing_is_found_where_everything_is_needed(workspace: Workspace, ledger: Ledger) -> None:
    workspace.add("one", "aaa")
    for kind in ("rows", "sealed"):
        aged(workspace.root / kind / "aaa")
    before = workspace.files()
    found = garbage.gc(workspace.root)
    assert found == {"removed": [], "bytes": 0, "left": []} and workspace.files() == before
    assert garbage.lines(found, False) == ["there is nothing to remove"]
    assert garbage.gc(workspace.root / "nowhere") == {"removed": [], "bytes": 0, "left": []}


def test_what_nothing_needs_goes_and_a_dry_run_only_says_so(workspace: Workspace, ledger: Ledger) -> None:
    root = workspace.root
    stays, gone = workspace.add("stays", "aaa"), workspace.add("gone", "bbb")
    theirs, before = workspace.runs(stays), workspace.files()
    shutil.rmtree(root / "studies" / "gone")  # as one did before there was `heldout delete`
    (root / "studies" / "never").mkdir()
    (root / "studies" / "never" / "template.log").write_text("x" * 10)
    for name in (".tmp-abc", ".refit-abc"):
        (root / "sealed" / name).mkdir()
        (root / "sealed" / name / "y_0.npy").write_bytes(b"y" * 100)
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    for draft in (root / f"mlflow.db.{dead.stdout.strip()}.new", root / f"mlflow.db.{os.getpid()}.new"):
        draft.write_text("half")
        aged(draft)
    for path in ("rows/bbb", "sealed/bbb", "sealed/.tmp-abc", "sealed/.refit-abc", "studies/never"):
        aged(root / path)

    planned = garbage.gc(root, dry_run=True)
    wanted = [
        *("MLflow runs of a study that is gone", "rows without a study", "sealed rows without a study"),
        *("study that never began", *["temporary of a process that is gone"] * 3),
    ]
    assert kinds(planned) == wanted and planned["left"] == []
    assert (root / "rows" / "bbb").exists() and len(workspace.runs(gone)) == 4

    found = garbage.gc(root)
    assert found == planned and found["bytes"] > 10_000
    assert workspace.runs(gone) == {} and workspace.runs(stays) == theirs
    assert workspace.files() - {f"mlflow.db.{os.getpid()}.new"} == {
        path for path in before if not path.startswith(("studies/gone", "rows/bbb", "sealed/bbb", "artifacts"))
    } | {path for path in before if path.startswith("artifacts") and path.split("/")[2] in theirs}
    assert (root / f"mlflow.db.{os.getpid()}.new").exists()
    assert garbage.gc(root)["removed"] == []
    assert "would be freed" in garbage.lines(planned, True)[-1] and " freed" in garbage.lines(found, False)[-1]


def test_runs_of_another_workspace_in_this_store_are_not_touched(workspace: Workspace, tmp_path: Path) -> None:
    workspace.add("ours", "aaa")
    theirs = Workspace(tmp_path / "theirs", uri=workspace.uri).add("other", "aaa")
    found = garbage.gc(workspace.root)
    assert not any("runs" in kind for kind in kinds(found)) and len(workspace.runs(theirs)) == 4


def test_a_study_whose_journal_is_lost_but_can_be_repaired_is_no_waste(workspace: Workspace) -> None:
    """As a repair that was killed leaves it: the second record has everything."""
    study_id = workspace.add("one", "aaa")
    folder = workspace.root / "studies" / "one"
    for path in folder.glob("journal.sqlite*"):
        path.unlink()
    for path in (folder, workspace.root / "rows" / "aaa", workspace.root / "sealed" / "aaa"):
        aged(path)
    before = workspace.files()
    assert garbage.gc(workspace.root)["removed"] == []
    assert workspace.files() == before and len(workspace.runs(study_id)) == 4
    workspace.add("two", "aaa")
    assert not lifecycle.delete("two", workspace=workspace.root)["rows"]  # the first may need them
    assert repair("one", workspace=workspace.root)["trials"]["complete"] == 3


def test_files_of_the_user_that_look_like_drafts_stay(workspace: Workspace) -> None:
    workspace.add("one", "aaa")
    mine = [workspace.root / name for name in ("results.2024-11.csv", "data.v1-99999.npy", "notes.new")]
    for path in mine:
        path.write_text("mine")
        aged(path)
    assert garbage.gc(workspace.root)["removed"] == [] and all(path.exists() for path in mine)


def test_rows_that_a_launch_takes_up_meanwhile_stay(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    for digest in ("aaa", "bbb"):
        for kind in ("rows", "sealed"):
            (workspace.root / kind / digest).mkdir(parents=True)
            aged(workspace.root / kind / digest)
    discard, launched = lifecycle.discard, []

    def slow(root: Path, path: Path) -> int:
        if not launched:
            launched.append(workspace.add("new", "bbb"))  # while the first rows are removed
        return discard(root, path)

    monkeypatch.setattr(lifecycle, "discard", slow)
    found = garbage.gc(workspace.root)
    assert (workspace.root / "rows" / "bbb").exists() and not (workspace.root / "rows" / "aaa").exists()
    assert any("a study has begun to use it" in why for why in found["left"])


def test_what_is_young_driven_or_in_use_is_let_alone(workspace: Workspace) -> None:
    root = workspace.root
    (root / "studies" / "young").mkdir()
    (root / "rows" / "new").mkdir(parents=True)
    (root / "rows" / ".tmp-young").mkdir()
    used = root / "rows" / ".refit-used"
    used.mkdir()
    (used / "y.npy").write_bytes(b"y")
    driven = root / "studies" / "driven"
    driven.mkdir()
    with locked(driven), (used / "y.npy").open():
        for path in (used, driven):
            aged(path)
        assert garbage.gc(root)["removed"] == []
    if sys.platform == "linux":
        assert kinds(garbage.gc(root)) == ["study that never began", "temporary of a process that is gone"]


def test_rows_stay_while_a_study_is_starting_or_cannot_be_read(workspace: Workspace) -> None:
    root = workspace.root
    gone = workspace.add("gone", "bbb")
    shutil.rmtree(root / "studies" / "gone")
    for kind in ("rows", "sealed"):
        aged(root / kind / "bbb")
    (root / "studies" / "starting").mkdir()
    with locked(root / "studies" / "starting"):
        found = garbage.gc(root, dry_run=True)
        assert kinds(found) == ["MLflow runs of a study that is gone"]
        assert all("a study is starting" in why for why in found["left"]) and len(found["left"]) == 2
    (root / "studies" / "starting" / "journal.sqlite").write_text("no journal" * 1000)
    found = garbage.gc(root)
    assert found["removed"] == [] and len(found["left"]) == 3 and len(workspace.runs(gone)) == 4
    assert any(why.startswith("MLflow runs") for why in found["left"])


def test_models_that_cannot_win_go_but_never_the_winners(workspace: Workspace) -> None:
    workspace.add("all", "aaa")  # of a release that kept everything
    workspace.add("two", "aaa", config={"trials": 3, "keep": 1})
    folder = workspace.root / "studies" / "two"
    with Journal.open(folder / "journal.sqlite") as journal:
        journal.put("selection", {"winner": {"trial": 2}, "baseline": {"trial": 0}})
    with Journal.open(workspace.root / "studies" / "all" / "journal.sqlite") as journal:
        journal.begin(Trial(3, TrialState.RUNNING))
    assert garbage.gc(workspace.root)["removed"] == []
    with Journal.open(folder / "journal.sqlite") as journal:
        journal.put("selection", {"winner": {"trial": 1}, "baseline": {"trial": 0}})
    with locked(folder):
        assert garbage.gc(workspace.root)["removed"] == []
    (found,) = garbage.gc(workspace.root)["removed"]
    assert (found["what"], found["bytes"]) == ("models that cannot win", 2000)
    assert [places.weights(folder, n).exists() for n in range(3)] == [True, True, False]
    assert (places.trial(folder, 2) / "log.txt").exists()


# ── the command line ─────────────────────────────────────────────────────────────────────────────


def test_the_commands_ask_first_and_refuse_where_nobody_can_answer(workspace: Workspace, heldout: Heldout) -> None:
    workspace.add("one", "aaa")
    where = ("--workspace", str(workspace.root))
    shutil.copytree(workspace.root / "rows" / "aaa", workspace.root / "rows" / "zzz")
    aged(workspace.root / "rows" / "zzz")
    before = workspace.files()
    for command in (("delete", "one"), ("gc",), ("gc", "--json")):
        ran = heldout(*command, *where)
        assert ran.returncode == 2 and "there is no terminal to answer at; add --yes" in ran.stderr
        assert workspace.files() == before
    planned = json.loads(heldout("gc", "--dry-run", "--json", *where).stdout)
    assert kinds(planned) == ["rows without a study"] and workspace.files() == before
    assert "would be freed" in heldout("gc", "--dry-run", *where).stdout
    done = json.loads(heldout("gc", "--yes", "--json", *where).stdout)
    assert done == planned and not (workspace.root / "rows" / "zzz").exists()


def answered(reply: str, *arguments: str) -> tuple[int, str]:
    """Run the command with a terminal that types this; its exit code and what it printed."""
    ours, theirs = os.openpty()
    try:
        os.write(ours, reply.encode())
        ran = subprocess.run(
            [sys.executable, "-m", "search.cli", *arguments],
            stdin=theirs,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    finally:
        os.close(ours)
        os.close(theirs)
    return ran.returncode, ran.stdout + ran.stderr


def test_the_answer_at_the_terminal_decides(workspace: Workspace) -> None:
    mine = workspace.add("one", "aaa")
    where = ("--workspace", str(workspace.root))
    code, said = answered("\n", "delete", "one", *where)
    assert code == 1 and "delete study one for good" in said and names(workspace.root) == ["one"]
    code, said = answered("y\n", "delete", "one", *where)
    assert code == 0 and "deleted one: " in said and "MLflow: 4 runs removed" in said
    assert workspace.runs(mine) == {} and workspace.files() == set()


@pytest.mark.slow
def test_a_real_study_is_launched_deleted_and_launched_again(tmp_path: Path, heldout: Heldout) -> None:
    space, root = write_space(tmp_path), tmp_path / "ws"
    where = ("--workspace", str(root))
    plan = ("launch", space, "--study", "s", "--trials", "2", "--workers", "1", "--json", *where)
    first = heldout(*plan)
    assert first.returncode == 0 and json.loads(first.stdout)["test"]["opening"] == 1, first.stderr
    deleted = heldout("delete", "s", "--yes", "--json", *where)
    assert deleted.returncode == 0, deleted.stderr
    assert json.loads(deleted.stdout)["mlflow"]["runs"] == 3 and json.loads(deleted.stdout)["rows"]
    left = [path for kind in ("rows", "sealed", "studies", "artifacts") for path in (root / kind).rglob("*")]
    assert not any(path.is_file() for path in left)
    assert heldout("status", *where).stdout.startswith("no studies in")
    again = heldout(*plan)
    assert again.returncode == 0, again.stderr
    report = json.loads(again.stdout)
    assert report["test"] is None and "opened once before" in report["sealed"]  # the ledger knows
    assert Study("s", root).state == "COMPLETE"

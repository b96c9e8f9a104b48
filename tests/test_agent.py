"""An agent without Ray: what it answers, what travels to it and back, and that nothing outlives it."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from search.cluster import mirror
from search.cluster.agent import Agent, source_digest
from search.cluster.connecting import Share
from search.cluster.sources import Sources
from search.definition.problem import Problem
from search.executors import Slot
from tests.conftest import ROOT
from tests.test_executors import HERE, PATIENCE, alive, gone

BODIES = Problem("bodies", str(HERE / "bodies.py"), (HERE / "bodies.py").read_text())

Begin = Callable[..., tuple[Agent, dict[str, Any]]]


def setup(sources: Sources, **changes: Any) -> dict[str, Any]:
    share = {**dataclasses.asdict(Share("node-1", 2, 0, 2, 1)), "gpus": False}
    how = {"required": (), "entry": "bodies:main", "path": [str(HERE)]}
    known = {"source": source_digest(), "session": f"test{os.getpid()}", "share": share, "environ": {}, "executor": how}
    return sources.setup() | known | changes


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    """Makes agents whose references are the things themselves."""
    made: list[Agent] = []

    def build(
        apart: bool = False, secrets: dict[str, str] | None = None, **changes: Any
    ) -> tuple[Agent, dict[str, Any]]:
        made.append(Agent(fetch=lambda part: part))
        sources = Sources(lambda part: part, tmp_path, tmp_path, BODIES, apart)
        return made[-1], made[-1].begin(setup(sources, **changes), secrets or {})

    yield build
    for agent in made:
        agent.close()


def order(name: str, kind: str = "echo", **changes: Any) -> dict[str, Any]:
    slot = Slot(0, 1).to_json()
    known = {"run": name, "kind": kind, "payload": {}, "log": None, "env": {}, "slot": slot}
    return known | {"inputs": [], "outputs": [], "cache": None} | changes


def until(agent: Agent, what: str, first: int = 1) -> tuple[list[tuple[dict[str, Any], bytes | None]], int]:
    """Answers up to the first that has this key, and the number of the next question."""
    found: list[tuple[dict[str, Any], bytes | None]] = []
    over = time.monotonic() + PATIENCE
    while not any(what in body for body, _ in found):
        assert time.monotonic() < over, found
        found += agent.poll(first, 1.0)
        first += 1
    return found, first


def test_an_agent_runs_a_job_and_tells_its_end_last(begin: Begin) -> None:
    agent, said = begin()
    assert said["sees"] and said["module"] and [slot["threads"] for slot in said["slots"]] == [1, 1]
    assert agent.order(1, [order("a", payload={"body": "✓"})]) == 1
    answers, _ = until(agent, "exited")
    bodies = [body for body, _ in answers]
    assert {"begun": "a"} in bodies and {"message": "a", "body": {"type": "result", "body": "✓"}} in bodies
    assert bodies[-1]["exited"] == "a" and bodies[-1]["known"]["code"] == 0


def test_what_was_lost_on_its_way_is_told_again_and_heard_once(begin: Begin) -> None:
    agent, _ = begin()
    for _ in range(2):
        assert agent.order(1, [order("a", payload={"body": 1})]) == 1
    answers, number = until(agent, "exited")
    assert agent.poll(number - 1, 0.0) == agent.poll(number - 1, 0.0)
    assert agent.poll(number, 0.3) == []  # the second order of the same number started nothing
    assert agent.order(3, [order("c")]) == 1  # the one before it has not come


def test_another_heldout_is_refused_in_one_line(begin: Begin) -> None:
    _, said = begin(source="0" * 64)
    assert "another version of heldout" in said["error"] and "\n" not in said["error"]


def test_a_cpu_share_hides_gpus_and_has_the_drivers_settings(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # Ray's, of the whole share
    agent, said = begin(environ={"KERAS_BACKEND": "jax"}, secrets={"PASS": "very-secret"})
    names = ["CUDA_VISIBLE_DEVICES", "KERAS_BACKEND", "OMP_NUM_THREADS", "PASS"]
    agent.order(1, [order("a", "about", payload={"names": names}, slot=said["slots"][1])])
    (told,) = [body["body"] for body, _ in until(agent, "exited")[0] if "message" in body]
    assert told["env"] == {
        "CUDA_VISIBLE_DEVICES": "-1", "KERAS_BACKEND": "jax", "OMP_NUM_THREADS": "1", "PASS": "***PASS***"
    }  # fmt: skip


def test_a_job_is_killed_even_before_its_files_are_there(begin: Begin, tmp_path: Path) -> None:
    agent, _ = begin()
    agent.order(1, [order("a", "sleeps"), {"kill": "a"}])
    assert until(agent, "exited")[0][-1][0]["known"]["signal"] in (signal.SIGTERM, signal.SIGKILL)


# ── files ────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_said_to_a_job_whose_files_are_on_their_way_reaches_it(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Agent._stage

    def late(agent: Agent, order: dict[str, Any]) -> None:
        time.sleep(1.0)
        stage(agent, order)

    monkeypatch.setattr(Agent, "_stage", late)
    agent, _ = begin()
    agent.order(1, [order("a", "dialogue"), {"send": "a", "body": {"question": 4}}])
    answers, _ = until(agent, "message")
    assert [body["body"] for body, _ in answers if "message" in body] == [{"answer": 8}]


def there_and_back(agent: Agent, sources: Sources, folder: Path, number: int, kind: str) -> list[dict[str, Any]]:
    """Run a body in a trial's folder that travels; what was told, its files taken in."""
    inputs = sources.inputs({"folder": str(folder)}, sees=False, module=False)
    mine = [name for name, _, _ in inputs[-1]["files"]]
    log = str(folder / "log.txt")
    agent.order(number, [order(str(number), kind, payload={"folder": str(folder)}, log=log, inputs=inputs,
                               outputs=[str(folder)])])  # fmt: skip
    answers, _ = until(agent, "exited", agent._told[0] + 1)
    for body, data in answers:
        if "file" in body:
            mirror.receive(Path(body["root"]), body["name"], body["offset"], data or b"", body["changed"])
        elif "names" in body:
            mirror.forget(Path(body["root"]), set(mine) - set(body["all"]))
    return [body for body, _ in answers]


def test_files_of_a_trial_travel_there_and_back_before_its_result_is_told(begin: Begin, tmp_path: Path) -> None:
    agent, said = begin(apart=True)
    assert not said["sees"] and not said["module"]
    sources = Sources(lambda part: part, tmp_path, tmp_path, BODIES, apart=True)
    folder = tmp_path / "trials" / "0003"
    folder.mkdir(parents=True)
    (folder / "checkpoint").write_bytes(b"from before")
    (folder / "log.txt").write_text("before\n")
    agent.order(1, [{"send": "nobody", "body": {}}])
    told = there_and_back(agent, sources, folder, 2, "leaves")
    result = next(number for number, body in enumerate(told) if body.get("body", {}).get("type") == "result")
    assert {body["name"] for body in told[:result] if "file" in body} == {"weights", "deep/er/part", "empty"}
    # It was told of its files by their names here, and ran elsewhere.
    assert told[result]["body"]["path"] == str(folder / "weights")
    assert told[result]["body"]["found"] == ["checkpoint", "log.txt"]
    assert (folder / "weights").read_bytes() == b"w" * 100_000 and (folder / "deep/er/part").read_text() == "p"
    assert (folder / "empty").read_bytes() == b"" and not (folder / "checkpoint").exists()
    assert (folder / "log.txt").read_text() == "before\nhello\n"
    assert not (folder / "link").exists()  # what it points to is not the trial's
    assert not Path(f"{agent._home}{folder}").exists()


def test_a_large_file_comes_in_parts(begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "CHUNK", 1000)
    agent, _ = begin(apart=True)
    sources = Sources(lambda part: part, tmp_path, tmp_path, BODIES, apart=True)
    folder = tmp_path / "trials" / "0001"
    folder.mkdir(parents=True)
    (folder / "checkpoint").write_bytes(os.urandom(5500))
    told = there_and_back(agent, sources, folder, 1, "leaves")
    assert sum(body.get("name") == "weights" for body in told) == 100
    assert (folder / "weights").read_bytes() == b"w" * 100_000


def test_files_that_trials_read_are_written_once_for_all_agents_of_a_node(begin: Begin, tmp_path: Path) -> None:
    rows = tmp_path / "rows" / "d"
    (rows / "x_0").mkdir(parents=True)
    (rows / "y_0.npy").write_bytes(b"labels")
    (rows / "x_0" / "000000001.png").write_bytes(b"picture")
    specs = Sources(lambda part: part, tmp_path, tmp_path, BODIES, apart=True).inputs(
        {"rows": str(rows), "folder": str(tmp_path)}, sees=False, module=False
    )
    first, second = begin(apart=True)[0], begin(apart=True)[0]
    for agent in (first, second):
        agent.order(1, [order("a", payload={"body": str(rows / "y_0.npy")}, inputs=specs)])
        told = [body for body, _ in until(agent, "exited")[0]]
        assert {"message": "a", "body": {"type": "result", "body": str(rows / "y_0.npy")}} in told
        specs = [spec | {"parts": []} for spec in specs if not spec["own"]]  # the second finds them there
    assert first._home == second._home
    placed = Path(f"{first._home}{rows}")
    assert (placed / "y_0.npy").read_bytes() == b"labels" and (placed / "x_0/000000001.png").read_bytes() == b"picture"
    assert (placed / "y_0.npy").stat().st_mtime_ns == (rows / "y_0.npy").stat().st_mtime_ns  # as stamps have it
    first.close()
    assert placed.exists()
    second.close()
    assert not first._home.exists()


def test_files_that_cannot_be_brought_fail_the_job_and_nothing_else(begin: Begin, tmp_path: Path) -> None:
    agent, _ = begin(apart=True)
    spec = {"root": str(tmp_path / "x"), "files": [["a", 5, 0]], "digests": None, "own": False, "apart": True}
    spec["parts"] = []
    agent.order(1, [order("a", inputs=[spec]), order("b", payload={"body": 1}, slot=Slot(1, 1).to_json())])
    told = [body for body, _ in until(agent, "exited")[0]]
    (failed,) = [body["body"] for body in told if body.get("message") == "a"]
    assert failed["reason"] == "crash" and "could not be brought" in failed["message"]
    assert any(body.get("exited") == "b" for body in told) or until(agent, "exited", agent._told[0] + 1)


@pytest.mark.parametrize("name", ["../up", "/etc/passwd", "a/../../b", "", "a\0b"])
def test_names_that_lead_out_of_a_folder_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must lie below"):
        mirror.receive(tmp_path / "trial", name, 0, b"", 0)
    assert not (tmp_path / "up").exists() and not (tmp_path / "b").exists()


def test_the_longest_root_decides_and_names_lead_back() -> None:
    roots = {"/a": "/home1", "/a/ws": ""}
    payload = {"x": ["/a/m.py", "/a/ws/rows/1", "/ab", "text /a/m.py", 3, None]}
    assert mirror.there(payload, roots) == {"x": ["/home1/a/m.py", "/a/ws/rows/1", "/ab", "text /a/m.py", 3, None]}
    assert mirror.back({"m": "File /home1/a/m.py, line 3"}, "/home1") == {"m": "File /a/m.py, line 3"}


def test_homes_that_nobody_holds_are_swept(tmp_path: Path) -> None:
    for name in ("dead", "alive"):
        (tmp_path / f"heldout-node-{name}").mkdir()
        (tmp_path / f"heldout-node-{name}.lock").touch()
    with mirror.held(tmp_path / "heldout-node-alive.lock"):
        mirror.sweep(tmp_path, "heldout-node-own")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heldout-node-alive", "heldout-node-alive.lock"]


# ── its death ────────────────────────────────────────────────────────────────────────────────────

ALONE = """
import sys, time
from tests.test_agent import *
agent = Agent(fetch=lambda part: part)
sources = Sources(lambda part: part, Path(sys.argv[1]), Path(sys.argv[1]), BODIES)
agent.begin(setup(sources), {})
agent.order(1, [order("a", "breeds"), order("b", "spins", slot=Slot(1, 1).to_json())])
told, number = [], 1
while sum("message" in body for body in told) < 2:
    told += [body for body, _ in agent.poll(number, 5.0)]
    number += 1
print(*[pid for body in told if "message" in body for pid in body["body"]["pids"]], flush=True)
time.sleep(300)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_trial_outlives_a_killed_agent(tmp_path: Path) -> None:
    agent = subprocess.Popen(
        [sys.executable, "-c", ALONE, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )
    assert agent.stdout is not None
    with agent, agent.stdout:
        pids = [int(word) for word in agent.stdout.readline().split()]
        assert len(pids) == 4 and all(alive(pid) for pid in pids)
        agent.kill()
        agent.wait()
        assert gone(pids, 2.0)

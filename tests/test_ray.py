"""A study on Ray: what is refused before it begins, how nodes are divided, and that it is the study it is locally."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from search.cli import main
from search.cluster import connecting, ray_executor
from search.cluster.calls import AgentCalls
from search.cluster.connecting import MOST_SLOTS, Division, Share, connected, divided
from search.cluster.sources import Sources
from search.errors import ExecutorError, RequestError
from search.executors import Exited, Job, Lost, Message, Slot
from search.processes.devices import Gpu, granted
from search.processes.slots import Alone, Slots
from search.study import Study, StudyConfig
from search.trial import TrialState
from search.wiring import launch
from tests.on_ray import on_ray
from tests.test_executors import PATIENCE, collect, first_message, gone
from tests.tiny import PARTS, write_space


def node(name: str, cpus: float, gpus: float = 0) -> dict[str, Any]:
    return {"NodeID": name, "Alive": True, "Resources": {"CPU": cpus, "GPU": gpus}}


# ── refused before anything is begun ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize("address", ["ray://head:10001", "http://head:8265", "head", "head:port", "somewhere"])
def test_an_address_must_be_one_of_a_cluster(address: str) -> None:
    with pytest.raises(RequestError, match="must be local, auto or HOST:PORT") as caught, connected(address, None):
        pass
    assert "\n" not in str(caught.value)


def test_where_nothing_listens_is_said_within_seconds() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        began = time.monotonic()
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(RequestError, match="does not answer"), connected(address, None):
            pass
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("says", [b"HTTP/1.0 400 Bad request\r\n\r\n", b"SSH-2.0-x\r\n", b"", None])
def test_what_listens_and_is_no_ray_is_told_in_one_line_within_seconds(says: bytes | None) -> None:
    """Another server, one that hangs up, and one that says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:

        def serve() -> None:
            other, _ = server.accept()
            with other:
                other.recv(3)
                if says is None:
                    other.recv(1 << 16), other.recv(1)  # until the other side has had enough
                else:
                    other.sendall(says)

        serving = pool.submit(serve)
        address, began = f"127.0.0.1:{server.getsockname()[1]}", time.monotonic()
        told = f"what listens at {address} is none"
        with pytest.raises(RequestError, match=told) as caught, connected(address, None):
            pass
        assert "\n" not in str(caught.value) and time.monotonic() - began < 15
        serving.result(10)


def test_what_is_a_ray_is_reached(private_ray: Any) -> None:
    connecting._reach(private_ray.get_runtime_context().gcs_address)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"pip install 'heldout\[ray\]'"), connected("local", None):
        pass


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("Version mismatch: The cluster was started with: Ray: 2.50", "Ray and Python must be the same here"),
        ("RPC error: InvalidAuthToken: missing or incorrect", "RAY_AUTH_TOKEN_PATH"),
        ("Could not find any running Ray instance.", "run this on one of its nodes"),
        ("Failed: Traceback (most recent call last): File x", "there is none (Failed to connect Failed); run this"),
    ],
)
def test_what_ray_says_becomes_one_line(said: str, told: str) -> None:
    error = ConnectionError("Failed to connect")
    error.__cause__ = RuntimeError(f"{said}\n  traceback\n")
    text = connecting._told("head:6379", error)
    assert told in text and "\n" not in text and len(text) < 500 and "Traceback" not in text


def test_a_refused_launch_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="does not answer"):
        launch(write_space(tmp_path), ray="127.0.0.1:9", workspace=str(tmp_path / "ws"))
    assert not list((tmp_path / "ws" / "studies").iterdir())


def test_none_ends_what_was_asked_for_before() -> None:
    assert StudyConfig(space="s", ray="none").ray is None and StudyConfig(space="s", ray="local").ray == "local"


# ── nodes and slots ──────────────────────────────────────────────────────────────────────────────


def test_without_a_number_each_cpu_is_a_slot_and_agents_are_small() -> None:
    nodes = [node("a", 20), node("b", 2), node("head", 0)]
    division = divided(StudyConfig(space="s", ray="local"), nodes)
    shares = division.shares(nodes, [])
    assert [(s.node, s.slots, s.cpus, s.threads) for s in shares] == [
        ("a", 8, 8, 1), ("a", 8, 8, 1), ("a", 4, 4, 1), ("b", 2, 2, 1)
    ]  # fmt: skip
    assert division.shares(nodes, shares) == []
    assert division.shares([*nodes, node("new", 1)], shares) == [Share("new", 1, 0, 1, 1)]
    assert division.shares(nodes, shares[1:]) == [Share("a", 8, 0, 8, 1)]  # whose agent has died


def test_so_many_workers_share_all_cpus_and_never_one_that_two_nodes_have() -> None:
    nodes = [node("a", 4), node("b", 3)]
    division = divided(StudyConfig(space="s", workers=3), nodes)
    assert division.threads == 2  # of 7 CPUs, but two slots do not fit b
    assert sum(share.slots for share in division.shares(nodes, [])) == 3
    assert divided(StudyConfig(space="s", workers=1), [node("a", 4)]).shares([node("a", 4)], []) == [
        Share("a", 4, 0, 1, 4)
    ]
    more = divided(StudyConfig(space="s", workers=9), nodes)  # two wait for another node
    assert sum(share.slots for share in more.shares(nodes, [])) == 7


def test_gpus_have_an_agent_each() -> None:
    nodes = [node("a", 8, 4), node("b", 2, 1), node("c", 8)]
    each = divided(StudyConfig(space="s"), nodes).shares(nodes, [])
    assert each == [*[Share("a", 2, 1, 1, 2)] * 4, Share("b", 2, 1, 1, 2)]
    pairs = divided(StudyConfig(space="s", gpus_per_trial=2), nodes).shares(nodes, [])
    assert [(s.node, s.gpus, s.slots) for s in pairs] == [("a", 2, 1), ("a", 2, 1)]
    shared = divided(StudyConfig(space="s", trials_per_gpu=2), nodes).shares(nodes, [])
    assert {(s.gpus, s.slots, s.threads) for s in shared} == {(1, 2, 1)}
    assert not any(s.gpus for s in divided(StudyConfig(space="s", gpus="none"), nodes).shares(nodes, []))


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"gpus": "0,1"}, "Ray chooses the GPUs"),
        ({"trials_per_gpu": 2}, "needs GPUs, but the trials on this cluster have none"),
        ({"max_gpu_hours": 1.0}, "needs GPUs"),
        ({"workers": 2, "gpus": "auto"}, "--workers counts CPU slots"),
    ],
)
def test_what_the_cluster_cannot_give_is_refused(asked: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError, match=told):
        divided(StudyConfig(space="s", **asked), [node("a", 4)])


def test_more_gpus_for_a_trial_than_a_node_has_are_refused() -> None:
    with pytest.raises(RequestError, match="at most 2"):
        divided(StudyConfig(space="s", gpus_per_trial=3), [node("a", 4, 2), node("b", 4, 1)])


def test_a_study_that_names_no_number_leaves_others_their_share() -> None:
    many = [node("a", 64, 8), node("b", 64, 8), node("c", 64, 8)]
    gpus = divided(StudyConfig(space="s", ray="head:6379"), many)
    assert sum(share.slots for share in gpus.shares(many, [])) == MOST_SLOTS == 16
    cpus = divided(StudyConfig(space="s", ray="head:6379", gpus="none"), many)
    assert sum(share.slots for share in cpus.shares(many, [])) == 16
    assert divided(StudyConfig(space="s", ray="local"), [node("a", 64)]).most is None
    assert divided(StudyConfig(space="s", ray="head:6379", workers=40), many).most == 40
    assert divided(StudyConfig(space="s", ray="head:6379", workers=40, max_slots=30), many).most == 30
    asked = divided(StudyConfig(space="s", ray="head:6379", max_slots=20), many)
    assert sum(share.slots for share in asked.shares(many, [])) == 20
    assert "at most [16;" in CliRunner().invoke(main, ["launch", "--help"]).output


def test_a_gpu_is_shared_by_all_of_its_trials_or_not_taken() -> None:
    nodes = [node("a", 8, 4)]
    division = divided(StudyConfig(space="s", ray="head:6379", trials_per_gpu=3, max_slots=7), nodes)
    assert [share.slots for share in division.shares(nodes, [])] == [3, 3]
    with pytest.raises(RequestError, match=r"--max-slots must be at least --trials-per-gpu \(3\), but got 2"):
        divided(StudyConfig(space="s", ray="head:6379", trials_per_gpu=3, max_slots=2), nodes)


def test_what_others_have_is_not_waited_for_while_there_is_room_elsewhere() -> None:
    nodes = [node("a", 8, 4), node("b", 8, 4), node("c", 8, 4)]
    division = Division(1, 4, gpus=1)
    free: dict[str, tuple[float, float]] = {"a": (8, 0), "b": (3.5, 4)}
    first = division.shares(nodes, [], free)  # b has CPUs for one of its GPUs alone, and nothing is known of c
    assert first == [Share("b", 2, 1, 1, 2)]
    assert [share.node for share in division.shares(nodes, first)] == ["a"] * 3
    half = Division(2, 6).shares(nodes, [], {"a": (5.0, 0), "b": (1.0, 0), "c": (8.0, 0)})
    assert [(share.node, share.slots, share.cpus) for share in half] == [("a", 2, 4), ("c", 4, 8)]


def test_a_limit_of_slots_without_a_cluster_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="--max-slots 3 is for a cluster, but none is given; add --ray"):
        launch(write_space(tmp_path), max_slots=3, workspace=str(tmp_path / "ws"))


def test_gpus_that_ray_grants_are_named_by_uuid_where_there_is_one() -> None:
    real = [Gpu(f"GPU-{n}", n, "x", 1000) for n in range(4)]
    (slot,) = granted(["2", "3"], 1, 4, "here", lambda: real)
    assert slot.gpus == ("GPU-2", "GPU-3") and slot.env["CUDA_VISIBLE_DEVICES"] == "GPU-2,GPU-3" and slot.threads == 4
    first, second = granted(["1"], 2, 1, "here", lambda: real)
    assert first.memory_mib == second.memory_mib == 450 and first.gpus == second.gpus
    (fake,) = granted(["1"], 1, 1, "here", list)
    assert fake.gpus == ("here:1",) and fake.env["CUDA_VISIBLE_DEVICES"] == "1"


def test_slots_may_come_and_go() -> None:
    here, there = Slot(0, 1, machine="a"), Slot(1, 1, machine="b")
    slots = Slots([])
    assert slots.take() is None and slots.take(Alone.MACHINE) is None
    slots.offer([here, there])
    assert slots.take() == here
    slots.offer([there])  # its node is gone while a trial is in it
    assert slots.take() == there and slots.take() is None
    slots.give_back(here)
    assert slots.take() is None
    slots.offer([here, there])
    assert slots.take() == here


def test_alone_on_its_machine_leaves_other_machines_alone() -> None:
    slots = Slots([Slot(0, 1, machine="a"), Slot(1, 1, machine="a"), Slot(2, 1, machine="b")])
    alone = slots.take(Alone.MACHINE)
    assert alone is not None and alone.index == 0
    other = slots.take()
    assert other is not None and other.index == 2 and slots.take() is None


# ── agents on a real Ray ─────────────────────────────────────────────────────────────────────────


def agent_pid(ray: Any, executor: Any) -> int:
    agent = executor._agents[0]
    assert agent.said is not None
    return int(agent.said["pid"])


def test_a_killed_agent_loses_its_jobs_leaves_nothing_and_is_placed_again(private_ray: Any, tmp_path: Path) -> None:
    with on_ray(private_ray, tmp_path, slots=2) as executor:
        executor.submit(Job("a", "breeds"), None)
        pids = first_message(executor)["pids"]
        os.kill(agent_pid(private_ray, executor), signal.SIGKILL)
        assert gone(pids, 2.0)
        assert collect(executor, "a")[-1] == Lost("a", taken=False)  # its machine is still there
        assert executor.slots == ()
        assert executor.wait(PATIENCE)
        executor.submit(Job("b", "echo", {"body": 1}), None)
        assert Message("b", {"type": "result", "body": 1}) in collect(executor, "b")


def test_idle_agents_are_given_back_and_placed_again_when_they_are_needed(
    private_ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_executor, "_IDLE", 1.0)
    monkeypatch.setattr(ray_executor, "_LOOK", 0.2)
    monkeypatch.setattr(connecting, "_SLOTS", 1)  # an agent for each

    def until(slots: int, cpus: float) -> None:
        over = time.monotonic() + PATIENCE
        while len(executor.slots) != slots or private_ray.available_resources().get("CPU", 0.0) != cpus:
            assert time.monotonic() < over, (executor.slots, private_ray.available_resources())
            assert executor.poll(0.2) == []

    every = private_ray.cluster_resources()["CPU"]
    with on_ray(private_ray, tmp_path, slots=3) as executor:
        until(3, every - 3)
        executor.submit(Job("a", "dialogue"), executor.slots[1])
        executor.need(False)
        until(1, every - 1)  # that which runs a trial stays
        executor.need(True)
        until(3, every - 3)
        executor.send("a", {"question": 4})
        assert first_message(executor, "a") == {"answer": 8}
        executor.kill("a")
        collect(executor, "a")
        executor.need(False)
        until(0, every)
        executor.need(True)
        assert executor.wait(PATIENCE)
        executor.submit(Job("b", "echo", {"body": 1}), None)
        assert Message("b", {"type": "result", "body": 1}) in collect(executor, "b")


def test_files_and_words_cross_to_a_node_that_sees_nothing_of_ours(private_ray: Any, tmp_path: Path) -> None:
    folder = tmp_path / "trials" / "0000"
    folder.mkdir(parents=True)
    with on_ray(private_ray, tmp_path, apart=True, secrets={"PASS": "open-sesame"}) as executor:
        executor.submit(Job("a", "leaves", {"folder": str(folder)}, log=str(folder / "log.txt")), None)
        events = collect(executor, "a")
        (said,) = [event.body for event in events if isinstance(event, Message)]
        assert said["path"] == str(folder / "weights") and isinstance(events[-1], Exited) and events[-1].code == 0
        assert (folder / "weights").stat().st_size == 100_000 and (folder / "log.txt").read_text() == "hello\n"
        executor.submit(Job("b", "leak", {"name": "PASS"}, log=str(folder / "log.txt")), None)
        events = collect(executor, "b")
        assert "***PASS***" in str(events) and "open-sesame" not in str(events)
        executor.submit(Job("c", "dialogue"), None)
        executor.send("c", {"question": 4})
        assert first_message(executor, "c") == {"answer": 8}
        executor.kill("c")
        assert isinstance(collect(executor, "c")[-1], Exited)
    logs = Path(private_ray._private.worker._global_node.get_logs_dir_path())
    assert not any(b"open-sesame" in file.read_bytes() for file in logs.rglob("*") if file.is_file())


def test_rows_that_are_files_are_not_sent_to_a_node_that_does_not_see_them(private_ray: Any, tmp_path: Path) -> None:
    rows = tmp_path / "rows" / "d"
    rows.mkdir(parents=True)
    (rows / "manifest.json").write_text(json.dumps({"x": {"files": [{"suffix": ".png"}]}}))
    with on_ray(private_ray, tmp_path, apart=True) as executor:
        executor.submit(Job("a", "echo", {"rows": str(rows), "body": 1}), None)
        assert Lost("a", taken=True) in executor.poll(0.0)
        with pytest.raises(ExecutorError, match="does not see .*: rows that are files need a workspace on storage"):
            executor.poll(0.0)


def test_a_node_that_cannot_import_keras_is_said_and_ends_the_wait(private_ray: Any, tmp_path: Path) -> None:
    with pytest.raises(ExecutorError, match="no node of the cluster can run trials.*no_such_module"):  # noqa: SIM117
        with on_ray(private_ray, tmp_path, required=("no_such_module",)) as executor:
            until = time.monotonic() + PATIENCE
            while time.monotonic() < until:
                executor.poll(1.0)


# ── whole studies ────────────────────────────────────────────────────────────────────────────────

CHEAP: dict[str, Any] = {"trials": 4, "workers": 1, "sampler": "random", "confirm": 0, "evaluate": "no", "study": "s"}


def seen(study: Study) -> list[Any]:
    return [(t.number, t.state, dict(t.params), t.score, t.size, t.seed, t.attempt) for t in study.trials]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_study_on_ray_is_the_study_that_it_is_locally_and_no_sealed_label_leaves(
    private_ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same seed, one slot and as many threads; on nodes that see our files and on nodes that do not."""
    monkeypatch.setenv("HELDOUT_ROWS_IN_MEMORY", "64M")
    (tmp_path / "helper.py").write_text("WIDTH = 8\n")
    imports = PARTS["imports"] + "\nfrom helper import WIDTH\n\nassert WIDTH == 8"
    fit = "def preprocess(train):\n    n = keras.layers.Normalization()\n    n.adapt(train.x)\n"
    fit += "    return keras.Sequential([keras.Input((4,)), n])"
    space = write_space(tmp_path, imports=imports, rest=fit)
    threads = int(sum(n["Resources"].get("CPU", 0) for n in private_ray.nodes()))
    monkeypatch.setattr("search.processes.devices.cpus", lambda: threads)
    local = launch(space, **CHEAP, workspace=str(tmp_path / "local"))
    assert all(t.state is TrialState.COMPLETE for t in local.trials)

    on_sight = launch(space, **CHEAP, ray="local", workspace=str(tmp_path / "sight"))
    assert seen(on_sight) == seen(local)

    stored: list[bytes] = []
    ordered: list[str] = []
    real_order = AgentCalls.order

    def order(agent: AgentCalls, body: dict[str, Any]) -> None:
        ordered.append(repr(body))
        real_order(agent, body)

    class Recording(Sources):
        def __init__(self, put: Any, *rest: Any) -> None:
            super().__init__(lambda part: (stored.append(part), put(part))[1], *rest, apart=True)

    monkeypatch.setattr(AgentCalls, "order", order)
    monkeypatch.setattr("search.cluster.sources.Sources", Recording)
    apart = launch(space, **CHEAP, ray="local", workspace=str(tmp_path / "apart"))
    assert seen(apart) == seen(local)
    prepared = apart.meta("prepared")
    sent = b"".join(stored)
    for name in ("guard_y_0", "test_y_0", "test_x_0"):
        sealed = np.load(Path(prepared["sealed"]) / f"{name}.npy", allow_pickle=False)
        assert len(sealed) >= 20 and sealed.tobytes() not in sent
    assert np.load(Path(prepared["rows"]) / "y_0.npy", allow_pickle=False).tobytes() in sent
    assert ordered and not any(prepared["sealed"] in body for body in ordered)
    for number in range(4):  # what a trial leaves is where it would be
        here = {f.name for f in (local.folder / "trials" / f"{number:04d}").iterdir()}
        assert {f.name for f in (apart.folder / "trials" / f"{number:04d}").iterdir()} == here



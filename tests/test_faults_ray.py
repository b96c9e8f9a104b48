"""Faults on a simulated cluster, three nodes and GPUs that are none: nodes, agents and drivers killed, a slow network.

Run with ``pytest -m faults``. The nodes are processes of this machine, so they see the driver's files; where it matters
they are treated as if they did not.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from search.cluster import ray_executor
from search.cluster.connecting import Division, connected
from search.executors import Exited, Job, Lost, Message
from search.record.journal import Journal
from search.study import Study
from search.trial import TrialState
from tests.conftest import ROOT
from tests.on_ray import Anywhere, on_ray
from tests.test_executors import alive, collect, gone
from tests.test_faults import CHEAP, SLOW, Driven, children
from tests.tiny import write_space

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

GPUS = Division(1, gpus=1)
MARK = "HELDOUT_TEST_CLUSTER"


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head without CPUs, and two nodes with two CPUs and two GPUs each."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # each session would make a token of its own
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    os.environ[MARK] = uuid.uuid4().hex  # which its processes inherit
    from ray.cluster_utils import Cluster

    with warnings.catch_warnings():
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **_ports()})
        for _ in range(2):
            made.add_node(num_cpus=2, num_gpus=2, **_ports())
        yield made
        warnings.simplefilter("ignore", ResourceWarning)  # Ray lets go of its processes while they end
        made.shutdown()
        gc.collect()


def _ports() -> dict[str, int]:
    """Ports for a node's helpers: one that must find its own has half a minute for it, too little on a busy machine."""
    names = ("metrics_agent_port", "runtime_env_agent_port", "dashboard_agent_listen_port")
    with contextlib.ExitStack() as stack:
        free = [stack.enter_context(socket.socket()) for _ in names]
        for one in free:
            one.bind(("", 0))
        return dict(zip(names, (one.getsockname()[1] for one in free), strict=True))


@contextlib.contextmanager
def executor_on(cluster: Any, folder: Path, division: Division = GPUS, **options: Any) -> Iterator[Anywhere]:
    with connected(cluster.address, None) as ray, on_ray(ray, folder, division=division, **options) as executor:
        yield executor


def until(executor: Anywhere, slots: int, within: float = 240.0) -> None:
    """Wait until there are so many slots; nothing else is going on."""
    over = time.monotonic() + within
    while len(executor.slots) != slots:
        assert time.monotonic() < over, executor.slots
        executor.poll(1.0)


def node_of(cluster: Any, executor: Anywhere, job: str) -> Any:
    """The node whose agent runs a job."""
    (agent,) = [agent for agent in executor._agents if job in agent.running]
    (node,) = [node for node in cluster.worker_nodes if node.node_id == agent.share.node]
    return node


def test_devices_are_pinned_and_cpu_trials_see_no_gpu(cluster: Any, tmp_path: Path) -> None:
    with executor_on(cluster, tmp_path) as executor:
        until(executor, 4)
        names = ["CUDA_VISIBLE_DEVICES"]
        for slot in executor.slots:
            executor.submit(Job(f"on-{slot.index}", "about", {"names": names}), slot)
        events = collect(executor, *(f"on-{slot.index}" for slot in executor.slots))
        seen = {event.job: event.body["env"]["CUDA_VISIBLE_DEVICES"] for event in events if isinstance(event, Message)}
        by_node: dict[str, set[str]] = {}
        for slot in executor.slots:
            by_node.setdefault(slot.machine, set()).add(seen[f"on-{slot.index}"])
            assert slot.gpus == (f"{slot.machine}:{seen[f'on-{slot.index}']}",)
        assert list(by_node.values()) == [{"0", "1"}, {"0", "1"}]
    with executor_on(cluster, tmp_path, Division(1, 4)) as executor:
        until(executor, 4)
        executor.submit(Job("a", "about", {"names": names}), executor.slots[-1])
        (told,) = [event.body for event in collect(executor, "a") if isinstance(event, Message)]
        assert told["env"] == {"CUDA_VISIBLE_DEVICES": "-1"}


def test_a_killed_node_loses_what_it_ran_and_a_new_one_is_used(cluster: Any, tmp_path: Path) -> None:
    with executor_on(cluster, tmp_path) as executor:
        until(executor, 4)
        for slot in executor.slots:
            executor.submit(Job(f"on-{slot.index}", "dialogue"), slot)
        doomed = node_of(cluster, executor, "on-0")
        there = {job for agent in executor._agents if agent.share.node == doomed.node_id for job in agent.running}
        cluster.remove_node(doomed, allow_graceful=False)
        events = collect(executor, *there, patience=240.0)
        assert {event for event in events if isinstance(event, Lost)} == {Lost(job, taken=True) for job in there}
        assert len(executor.slots) == 2
        rest = {f"on-{slot.index}" for slot in executor.slots}
        for job in rest:  # the others go on
            executor.send(job, {"stop": True})
        assert all(isinstance(event, Exited) for event in collect(executor, *rest))
        cluster.add_node(num_cpus=2, num_gpus=2, **_ports())
        until(executor, 4)


def test_a_killed_agent_costs_what_it_ran(cluster: Any, tmp_path: Path) -> None:
    with executor_on(cluster, tmp_path) as executor:
        until(executor, 4)
        executor.submit(Job("a", "breeds"), executor.slots[0])
        executor.submit(Job("b", "dialogue"), executor.slots[-1])
        (message,) = [event for event in executor.poll(60.0) if isinstance(event, Message)]
        agent = next(agent for agent in executor._agents if "a" in agent.running)
        assert agent.said is not None
        os.kill(agent.said["pid"], signal.SIGKILL)
        assert gone(message.body["pids"], 2.0)
        assert collect(executor, "a", patience=120.0)[-1] == Lost("a", taken=False)
        executor.send("b", {"stop": True})
        assert isinstance(collect(executor, "b")[-1], Exited)
        until(executor, 4)


def test_a_study_goes_where_others_leave_room(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two studies on four GPUs: what one has is not waited for while another node has room."""
    monkeypatch.setattr(ray_executor, "_IDLE", 2.0)
    with connected(cluster.address, None) as ray:
        for name in "ab":
            (tmp_path / name).mkdir()
        with on_ray(ray, tmp_path / "a", division=Division(1, 2, gpus=1)) as first:
            until(first, 2)
            (taken,) = {slot.machine for slot in first.slots}  # both on one node
            with on_ray(ray, tmp_path / "b", division=Division(1, 3, gpus=1)) as second:
                until(second, 2)
                assert taken not in {slot.machine for slot in second.slots}
                assert len(second._agents) == 3, "the third one waits"
                cluster.add_node(num_cpus=2, num_gpus=2, **_ports())
                until(second, 3)  # and does not wait for a node where there is none
                first.need(False)
                until(first, 0)
                executed = ray.available_resources()["GPU"]
                assert executed == 3.0, executed


def test_a_slow_network_delays_and_breaks_nothing(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each answer of an agent comes half a second late, and files are large."""
    from search.cluster.calls import Answers

    real = Answers.bring

    def late(answers: Answers, agent: Any, what: str, reference: Any) -> None:
        class Late:
            def future(self) -> Any:
                time.sleep(0.1 if what == "order" else 0.5)
                return reference.future()

        real(answers, agent, what, Late())

    monkeypatch.setattr(Answers, "bring", late)
    folder = tmp_path / "trials" / "0000"
    folder.mkdir(parents=True)
    (folder / "checkpoint").write_bytes(os.urandom(80 << 20))
    with executor_on(cluster, tmp_path, apart=True) as executor:
        until(executor, 4)
        executor.submit(Job("a", "leaves", {"folder": str(folder)}, log=str(folder / "log.txt")), None)
        executor.submit(Job("b", "chatter", {"count": 300, "size": 1000}), None)
        events = collect(executor, "a", "b", patience=240.0)
        numbers = [event.body["number"] for event in events if isinstance(event, Message) and event.job == "b"]
        assert numbers == list(range(300))
        assert (folder / "weights").stat().st_size == 100_000 and not (folder / "checkpoint").exists()


# A driver on a node of the cluster that treats it as if nodes saw none of its files.
APART = """
import functools, sys
from search.cluster import sources
sources.Sources = functools.partial(sources.Sources, apart=True)
from search.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize("apart", [False, True])
def test_a_driver_killed_on_the_head_leaves_nothing_and_is_resumed(cluster: Any, tmp_path: Path, apart: bool) -> None:
    space, workspace = write_space(tmp_path, **SLOW), tmp_path / "ws"
    where = ("--workspace", str(workspace), "--ray", cluster.address)
    start = ("launch", space, "--trials", "8", "--gpus", "none", "--workers", "2", "--study", "s", *CHEAP, *where)
    command = [sys.executable, "-c", APART] if apart else [sys.executable, "-m", "search.cli"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    driver = subprocess.Popen([*command, *start], env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert driver.stderr is not None
    with driver, driver.stderr:
        for line in driver.stderr:
            if line.startswith("trial 2 "):
                break
        mine = [pid for pid in _agents() for pid in (pid, *children(pid))]
        assert mine
        driver.kill()
        driver.wait()
        assert gone(mine, 20.0), "an agent outlived its driver"
    before = {trial.number: trial for trial in Study("s", workspace).trials if trial.state.is_finished}
    with Driven("resume", "s", *where) as again:
        again.complete(within=900)
    trials = Study("s", workspace).trials
    assert [(t.number, t.state) for t in trials] == [(n, TrialState.COMPLETE) for n in range(8)]
    assert all(trials[number] == trial for number, trial in before.items())
    assert not any(t.retries for t in trials)


def _agents() -> list[int]:
    """Processes of this cluster's agents, by the name that Ray gives them."""
    found, mark = [], f"{MARK}={os.environ[MARK]}".encode()
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                called, environ = (Path(entry.path, name).read_bytes() for name in ("cmdline", "environ"))
                if called.startswith(b"ray::Agent") and mark in environ.split(b"\0") and alive(int(entry.name)):
                    found.append(int(entry.name))
    return found


def test_a_study_outlives_a_node_and_runs_its_trials_again(cluster: Any, tmp_path: Path) -> None:
    space, workspace = write_space(tmp_path, **SLOW), tmp_path / "ws"
    where = ("--workspace", str(workspace), "--ray", cluster.address)
    with Driven("launch", space, "--trials", "8", "--gpus", "none", "--study", "s", *CHEAP, *where) as driver:
        driver.until("trial 1 ", within=600)
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        driver.complete(within=900)
    trials = Study("s", workspace).trials
    assert [(t.number, t.state) for t in trials] == [(n, TrialState.COMPLETE) for n in range(8)]
    assert not any(t.retries for t in trials)  # a machine that is taken away is nobody's fault
    again = sum(t.attempt for t in trials)
    assert 0 <= again <= 2  # at most what it was running
    with Journal.open(workspace / "studies" / "s" / "journal.sqlite", read_only=True) as journal:
        assert len({report.trial for report in journal.reports()}) == 8

"""How machines (made up, mostly) are divided into slots, and how a trial is kept within its own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from search.errors import RequestError
from search.executors import Slot
from search.processes import devices
from search.processes.devices import Gpu, nvml, slots

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Eight CPUs and nothing inherited."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(devices, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def gpus(count: int) -> Callable[[], list[Gpu]]:
    return lambda: [Gpu(f"GPU-{index}{index}-x", index, "H100", 80_000) for index in range(count)]


def uuids(found: tuple[Slot, ...]) -> list[tuple[str, ...]]:
    return [slot.gpus for slot in found]


# CPU slots


def test_without_gpus_every_cpu_is_a_slot() -> None:
    found = slots(discover=gpus(0))
    assert [slot.index for slot in found] == list(range(8))
    assert {slot.threads for slot in found} == {1}


@pytest.mark.parametrize(("workers", "threads"), [(1, 8), (2, 4), (3, 2), (8, 1), (20, 1)])
def test_threads_are_divided_among_workers(workers: int, threads: int) -> None:
    found = slots(workers, discover=gpus(2))
    assert len(found) == workers and {slot.threads for slot in found} == {threads}


def test_cpu_slots_hide_every_gpu() -> None:
    for found in (
        slots(2, discover=gpus(2)),
        slots(gpus="none", discover=gpus(2)),
        slots(2, "none", discover=gpus(2)),
    ):
        assert {slot.env["CUDA_VISIBLE_DEVICES"] for slot in found} == {"-1"}
        assert {slot.gpus for slot in found} == {()}


@pytest.mark.parametrize(("text", "count"), [("200000 100000", 2), ("150000 100000", 2), ("1000 100000", 1)])
def test_a_containers_quota_counts(text: str, count: int, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert len(slots(discover=gpus(0))) == count


def test_no_quota_is_no_limit(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("max 100000")
    assert len(slots(discover=gpus(0))) == 8


# GPU slots


@pytest.mark.parametrize("asked", [None, "auto"])
def test_every_visible_gpu_is_a_slot_pinned_by_uuid(asked: str | None) -> None:
    found = slots(gpus=asked, discover=gpus(2))
    assert uuids(found) == [("GPU-00-x",), ("GPU-11-x",)]
    assert [slot.env["CUDA_VISIBLE_DEVICES"] for slot in found] == ["GPU-00-x", "GPU-11-x"]
    assert [(slot.threads, slot.memory_share, slot.memory_mib) for slot in found] == [(4, None, None)] * 2
    assert found[0].env["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in found[0].env


def test_sharing_a_gpu_divides_its_memory_and_spreads_first() -> None:
    found = slots(trials_per_gpu=2, discover=gpus(2))
    assert uuids(found) == [("GPU-00-x",), ("GPU-11-x",)] * 2
    assert {slot.memory_share for slot in found} == {0.5}
    assert {slot.memory_mib for slot in found} == {36_000}
    assert {slot.env["XLA_PYTHON_CLIENT_MEM_FRACTION"] for slot in found} == {"0.450"}
    assert {slot.threads for slot in found} == {2}


def test_several_gpus_for_a_trial_are_its_own() -> None:
    found = slots(gpus_per_trial=2, discover=gpus(5))
    assert uuids(found) == [("GPU-00-x", "GPU-11-x"), ("GPU-22-x", "GPU-33-x")]
    assert found[1].env["CUDA_VISIBLE_DEVICES"] == "GPU-22-x,GPU-33-x"


def test_users_choose_by_position_or_uuid() -> None:
    assert uuids(slots(gpus="2,0", discover=gpus(3))) == [("GPU-22-x",), ("GPU-00-x",)]
    assert uuids(slots(gpus=" GPU-11-x ", discover=gpus(3))) == [("GPU-11-x",)]


@pytest.mark.parametrize(
    ("inherited", "left"),
    [
        ("", []),
        ("-1", []),
        ("2,0", [2, 0]),
        ("1,7,0", [1]),
        ("1,-1,0", [1]),
        ("GPU-22-x,GPU-00-x", [2, 0]),
        ("GPU-2", [2]),
        ("GPU-,1", []),
        ("1,1", [1]),
        ("NoDevFiles", []),
    ],
)
def test_only_inherited_devices_are_used(inherited: str, left: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", inherited)
    expected: list[tuple[str, ...]] = [(f"GPU-{n}{n}-x",) for n in left] if left else [()] * 8
    assert uuids(slots(discover=gpus(3))) == expected


def test_users_indices_count_among_the_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,1")
    assert uuids(slots(gpus="0", discover=gpus(3))) == [("GPU-22-x",)]
    with pytest.raises(RequestError, match="numbers out of 0, 1, but got '2'"):
        slots(gpus="2", discover=gpus(3))
    with pytest.raises(RequestError, match="GPU-00-x"):
        slots(gpus="GPU-00-x", discover=gpus(3))


def test_mig_devices_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-aaa,MIG-bbb")
    found = slots(trials_per_gpu=2, discover=gpus(1))
    assert uuids(found) == [("MIG-aaa",), ("MIG-bbb",)] * 2
    assert found[0].memory_share == 0.5 and found[0].memory_mib is None
    with pytest.raises(RequestError, match="MIG"):
        slots(gpus_per_trial=2, discover=gpus(1))


@pytest.mark.parametrize(
    ("arguments", "present", "words"),
    [
        ({"workers": 2, "gpus": "0,1"}, 2, "--workers .* --gpus 0,1"),
        ({"workers": 2, "gpus": "auto"}, 2, "--workers .* --gpus auto"),
        ({"workers": 2, "trials_per_gpu": 2}, 2, "--workers .* --trials-per-gpu"),
        ({"workers": 2, "gpus_per_trial": 2}, 2, "--workers .* --gpus-per-trial"),
        ({"trials_per_gpu": 2, "gpus_per_trial": 2}, 2, "exclude each other"),
        ({"gpus": "none", "trials_per_gpu": 2}, 2, "--trials-per-gpu .* --gpus none"),
        ({"trials_per_gpu": 2}, 0, "--trials-per-gpu needs a GPU"),
        ({"gpus": "auto", "gpus_per_trial": 1}, 0, "--gpus-per-trial needs a GPU"),
        ({"gpus_per_trial": 3}, 2, "at most 2, .* but got 3"),
        ({"gpus": "0,1", "gpus_per_trial": 3}, 4, "at most 2, .* but got 3"),
        ({"gpus": "0,2"}, 2, "out of 0, 1, but got '2'"),
        ({"gpus": "all"}, 2, "auto, none, or numbers out of 0, 1, but got 'all'"),
        ({"gpus": "-1"}, 2, "but got '-1'"),
        ({"gpus": ""}, 2, "but got ''"),
        ({"gpus": "0,0"}, 2, "once, but got 0,0"),
        ({"gpus": "0"}, 0, "none is visible"),
        ({"workers": 0}, 0, "--workers must be at least 1, but got 0"),
        ({"trials_per_gpu": 0}, 2, "--trials-per-gpu must be at least 1"),
        ({"gpus_per_trial": -1}, 2, "--gpus-per-trial must be at least 1"),
    ],
)
def test_contradictions_are_one_line(arguments: dict[str, Any], present: int, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        slots(**arguments, discover=gpus(present))
    assert "\n" not in str(caught.value)


# Discovery


class FakeNvml(types.ModuleType):
    """As much of pynvml as is used: one whole GPU, one divided in two, one that has fallen off the bus."""

    class NVMLError(Exception):
        pass

    def __init__(self, installed: bool = True) -> None:
        super().__init__("pynvml")
        self.installed = installed
        self.open = 0

    def nvmlInit(self) -> None:
        if not self.installed:
            raise self.NVMLError("NVML Shared Library Not Found")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return 3

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        if index == 1:
            raise self.NVMLError("GPU is lost")
        return f"GPU-{index}"

    def nvmlDeviceGetMigMode(self, handle: str) -> list[int]:
        if handle == "GPU-0":
            raise self.NVMLError("Not Supported")
        return [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: str) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: str, number: int) -> str:
        if number not in (0, 4):
            raise self.NVMLError("Not Found")
        return f"MIG-{number}"

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return handle

    def nvmlDeviceGetName(self, handle: str) -> str:
        return "A100"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        if handle == "MIG-4":
            raise self.NVMLError("Not Supported")
        return types.SimpleNamespace(total=40_000 << 20)


def test_nvml_lists_whole_and_divided_gpus_and_leaves_out_a_lost_one(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert nvml() == [
        Gpu("GPU-0", 0, "A100", 40_000),
        Gpu("MIG-0", 2, "A100", 40_000),
        Gpu("MIG-4", 2, "A100", None),
    ]
    assert fake.open == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    assert uuids(slots(discover=nvml)) == [("MIG-0",), ("MIG-4",)]


def test_without_a_driver_or_its_library_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(installed=False))
    assert nvml() == []
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml() == []


# In the trial


class Calls:
    """Records what is called on it, by its dotted name."""

    def __init__(self, calls: list[Any], name: str = "", gpus: int = 2) -> None:
        self._calls, self._name, self._gpus = calls, name, gpus

    def __getattr__(self, name: str) -> Calls:
        return Calls(self._calls, f"{self._name}.{name}".lstrip("."), self._gpus)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if self._name == "config.list_physical_devices":
            return [f"gpu{number}" for number in range(self._gpus)]
        if self._name == "cuda.device_count":
            return self._gpus
        if self._name == "config.LogicalDeviceConfiguration":
            return named
        self._calls.append((self._name.rpartition(".")[2], *arguments))


def test_tensorflow_grows_first_and_is_limited_then() -> None:
    calls: list[Any] = []
    shared = Slot(0, 3, {}, ("GPU-0", "GPU-1"), 0.5, 36_000).to_json()
    devices._apply_tensorflow(Calls(calls), shared)
    assert calls[:2] == [("set_intra_op_parallelism_threads", 3), ("set_inter_op_parallelism_threads", 3)]
    assert calls[2:] == [
        ("set_memory_growth", "gpu0", True),
        ("set_logical_device_configuration", "gpu0", [{"memory_limit": 36_000}]),
        ("set_memory_growth", "gpu1", True),
        ("set_logical_device_configuration", "gpu1", [{"memory_limit": 36_000}]),
    ]
    calls.clear()
    devices._apply_tensorflow(Calls(calls), Slot(0, 3, {}, ("GPU-0",)).to_json())
    assert {call[0] for call in calls[2:]} == {"set_memory_growth"}


def test_torch_is_held_to_its_fraction() -> None:
    calls: list[Any] = []
    devices._apply_torch(Calls(calls), Slot(0, 2, {}, ("GPU-0", "GPU-1"), 0.5).to_json())
    fraction = "set_per_process_memory_fraction"
    assert calls == [("set_num_threads", 2), (fraction, 0.45, 0), (fraction, 0.45, 1)]


def test_tensorflow_itself_takes_its_threads_and_sees_what_the_slot_shows() -> None:
    slot = slots(4, discover=gpus(0))[0]
    program = (
        "import json, tensorflow as tf\n"
        "from search.processes import devices\n"
        f"devices.apply({slot.to_json()!r})\n"
        "tf.constant(1.0)\n"
        "t = tf.config.threading\n"
        "print(t.get_intra_op_parallelism_threads(), t.get_inter_op_parallelism_threads())\n"
        "print(json.dumps(devices.seen()))\n"
    )
    env = {**os.environ, **slot.env, "KERAS_BACKEND": "tensorflow", "PYTHONPATH": str(ROOT)}
    answer = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines() == ["2 2", '[{"kind": "CPU", "name": "/physical_device:CPU:0"}]']


# The benchmark of sharing


@pytest.mark.parametrize(("gpu", "said"), [("0", "needs GPUs, but none is visible"), ("none", "must name one GPU")])
def test_the_benchmark_of_sharing_refuses_a_machine_without_a_gpu(gpu: str, said: str) -> None:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "benchmarks" / "gpu.py"), "--gpu", gpu]
    ran = subprocess.run(command, env=env, capture_output=True, text=True)
    assert ran.returncode == 2 and said in ran.stderr.splitlines()[-1]
    assert ran.stdout == ""


def test_the_benchmark_of_sharing_reads_a_gpu_while_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    import gpu  # type: ignore[import-not-found]

    busy, read = iter([0, 0, 40, 80, 60]), threading.Event()

    class Fake(FakeNvml):
        def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
            return uuid

        def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
            found = next(busy, None)
            if found is None:
                read.set()
                raise self.NVMLError("Not Supported")
            return types.SimpleNamespace(gpu=found)

        def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
            return types.SimpleNamespace(used=3 << 30)

    fake = Fake()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(gpu, "_BETWEEN", 0.001)
    watch = gpu.Watch("GPU-0")
    with watch:
        assert read.wait(60)
    assert watch.seen() == ["60", "3.0"] and fake.open == 0

"""What a study will cost: counted from one trial, and compared with what the machine has."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from search.checks import cost
from search.executors import Slot
from search.guard.finalists import Confirmation
from search.loop.keeping import KEEP
from search.processes import devices, usage
from search.record import disk
from tests.conftest import Heldout
from tests.tiny import write_space

MIB = 1 << 20
SEEN = {"memory": (300 * MIB, 400 * MIB), "gpu_memory": None, "weights_bytes": 50 * MIB, "predicted_bytes": 40}
TIERS = {"train": 600, "validation": 100, "guard": 100, "test": 200}


def of(folder: Path, slots: int = 2, trials: int = 30, **seen: Any) -> dict[str, Any]:
    again = Confirmation(3, 3)
    places = [Slot(number, 1) for number in range(slots)]
    return cost.of_study(SEEN | seen, TIERS, trials, again, 20, places, 3600.0, [folder, folder])


def test_memory_is_that_of_every_slot_and_what_they_share_once(tmp_path: Path) -> None:
    found = of(tmp_path, slots=4)
    assert found["memory"] == (400 + 4 * 300) * MIB and found["memory_per_slot"] == 300 * MIB


def test_disk_is_that_of_the_models_that_are_kept(tmp_path: Path) -> None:
    few, many = of(tmp_path, trials=10), of(tmp_path, trials=1000)
    assert few["models"] == 10 + 12 + 1 and many["models"] == KEEP + 12 + 1
    assert many["models"] * 50 * MIB < many["disk"] < 1.2 * (many["models"] + 2) * 50 * MIB + 1000 * 64 * 1024


@pytest.mark.parametrize(
    ("changes", "cause", "fix"),
    [
        ({"memory": (1 << 50, 0)}, "the machine has", "--workers 1"),
        ({"weights_bytes": 1 << 55}, "the disk has", "--keep K or --max-disk SIZE"),
    ],
)
def test_what_the_machine_has_not_fails_with_what_to_change(
    tmp_path: Path, changes: dict[str, Any], cause: str, fix: str
) -> None:
    assert cost.judged(of(tmp_path), 2)["passed"] is True
    one = cost.judged(of(tmp_path, **changes), 2)
    assert one["passed"] is False and cause in one["cause"] and fix in one["fix"]


def test_the_shown_cost_has_time_memory_and_disk(tmp_path: Path) -> None:
    says = cost.judged(of(tmp_path), 2)["says"]
    assert says.startswith("about 60.0 minutes, 1000.0 MB of memory (300.0 MB for each of 2 slots, 400.0 MB shared), ")
    assert "of disk for 33 models and the record" in says
    unknown = cost.judged(of(tmp_path, memory=None, gpu_memory=MIB), 2)["says"]
    assert "memory (" not in unknown and "1.0 MB of a GPU for each trial" in unknown


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the system does not say")
def test_memory_of_a_forked_process_counts_what_it_had_for_itself_at_its_largest() -> None:
    held = bytearray(os.urandom(1)) * (64 * MIB)  # shared with the child
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        before = usage.memory()
        own = b"x" * (32 * MIB)
        del own  # what it has had counts
        os.write(sender, json.dumps([before, usage.memory()]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    (own_before, shared), (own_after, _) = json.loads(os.read(receiver, 10_000))
    assert shared >= len(held) and own_before < 16 * MIB
    assert 30 * MIB < own_after - own_before < 40 * MIB


@pytest.mark.parametrize(
    ("backend", "module"),
    [
        (
            "tensorflow",
            SimpleNamespace(
                config=SimpleNamespace(
                    list_logical_devices=lambda kind: [kind],
                    experimental=SimpleNamespace(get_memory_info=lambda name: {"GPU:0": {"peak": 7 * MIB}}[name]),
                )
            ),
        ),
        (
            "jax",
            SimpleNamespace(devices=lambda: [SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 7 * MIB})]),
        ),
        (
            "torch",
            SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True, max_memory_allocated=lambda: 7 * MIB)),
        ),
    ],
)
def test_memory_of_a_gpu_is_what_the_backend_says(monkeypatch: pytest.MonkeyPatch, backend: str, module: Any) -> None:
    """In the words of each backend; none of them has a GPU here."""
    keras = SimpleNamespace(config=SimpleNamespace(backend=lambda: backend))
    monkeypatch.setattr(importlib, "import_module", {"keras": keras, backend: module}.__getitem__)
    assert devices.gpu_memory() == 7 * MIB


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_study_takes_about_the_disk_that_was_told(tmp_path: Path, heldout: Heldout) -> None:
    build = (
        "def build(hp):\n"
        "    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(hp.Int('units', 60000, 60009))])\n"
        "    model.add(keras.layers.Dense(2, activation='softmax'))\n"
        "    model.compile('adam', 'sparse_categorical_crossentropy', metrics=['accuracy'])\n"
        "    return model"
    )
    space, where = write_space(tmp_path, "wide", build=build), ("--workspace", str(tmp_path / "ws"), "--trials", "4")
    told = json.loads(heldout("check", space, "--sanity", "--json", *where).stdout)["sanity"]["cost"]
    assert heldout("launch", space, *where, "--confirm", "0", "--json").returncode == 0
    took = disk.size(tmp_path / "ws" / "studies" / "wide-1")
    assert 0.5 * took < told["disk"] < 2 * took

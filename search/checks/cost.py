"""What a study will cost: time, memory and disk, from what one trial of its default model took."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from search.checks.findings import Finding, finding
from search.executors import Slot
from search.guard.finalists import Confirmation
from search.loop.keeping import KEEP
from search.processes import usage
from search.record import disk

# Beside models and predictions, as seen in studies of one to a hundred epochs: journal, its copy, and MLflow's tables.
_STUDY_BYTES = 1 << 20
_TRIAL_BYTES = 24 << 10
_EPOCH_BYTES = 1 << 10
_FILE_BYTES = 64 << 10  # of a model's file, beside its weights


def measured(model: Any, folder: Path) -> dict[str, Any]:
    """What a trial that has trained for some epochs has taken, in its own process.

    Returns:
        ``memory`` (see ``usage.memory``), ``gpu_memory`` in bytes or None, ``weights_bytes`` of the file that a trial
        leaves, and ``predicted_bytes`` of one row's predictions.
    """
    import keras

    from search.harness import training
    from search.processes import devices
    from search.scorer import declaration

    weights = folder / "check.weights.h5"
    training.save(model, weights)
    known = declaration.ends(model)
    shapes = [] if known is None else [tensor.shape[1:] for tensor in keras.tree.flatten(known[1])]
    return {
        "memory": usage.memory(),
        "gpu_memory": devices.gpu_memory(),
        "weights_bytes": weights.stat().st_size,
        "predicted_bytes": 4 * sum(math.prod(size or 1 for size in shape) for shape in shapes),
    }


def of_study(
    seen: Mapping[str, Any],
    tiers: Mapping[str, int],
    trials: int,
    again: Confirmation,
    epochs: int,
    slots: Sequence[Slot],
    seconds: float,
    rows: Sequence[Path],
) -> dict[str, Any]:
    """The cost of a plan, were all trials like the default model.

    Args:
        seen: What ``measured`` found.
        tiers: Rows by tier.
        again: Trainings that confirm.
        seconds: The estimate of the whole study's time; it is passed on.
        rows: Folders of the stored rows, which are there already.

    Returns:
        ``seconds``, ``memory_per_slot``, ``memory_shared`` and ``memory`` of all slots together (bytes, None where
        the system does not say), ``memory_there``, ``gpu_memory`` of one trial, ``disk``, ``disk_free``, ``rows`` and
        ``models`` (how many are kept).
    """
    own, shared = seen["memory"] or (None, None)
    models = min(trials, KEEP) + again.runs + 1
    each = seen["weights_bytes"] + (tiers["validation"] + tiers["guard"]) * (seen["predicted_bytes"] + 16)
    tested = 2 * (seen["weights_bytes"] + _FILE_BYTES + tiers["test"] * seen["predicted_bytes"])
    record = _STUDY_BYTES + (trials + again.runs) * (_TRIAL_BYTES + epochs * _EPOCH_BYTES)
    return {
        "seconds": seconds,
        "memory_per_slot": own,
        "memory_shared": shared,
        "memory": None if own is None else shared + len(slots) * own,
        "memory_there": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu_memory": seen["gpu_memory"],
        "gpu_memory_there": next((slot.memory_mib << 20 for slot in slots if slot.memory_mib), None),
        "models": models,
        "disk": models * each + tested + record,
        "disk_free": disk.free(rows[0]),
        "rows": sum(disk.size(folder) for folder in rows),
    }


def judged(cost: Mapping[str, Any], slots: int) -> Finding:
    """The finding ``cost``: whether the machine has what the study will take."""
    parts = [f"about {_time(cost['seconds'])}"]
    if cost["memory"] is not None:
        parts.append(
            f"{disk.shown(cost['memory'])} of memory ({disk.shown(cost['memory_per_slot'])} for each of {slots} "
            f"slot{'' if slots == 1 else 's'}, {disk.shown(cost['memory_shared'])} shared)"
        )
    if cost["gpu_memory"] is not None:
        parts.append(f"{disk.shown(cost['gpu_memory'])} of a GPU for each trial")
    parts.append(f"{disk.shown(cost['disk'])} of disk for {cost['models']} models and the record")
    parts.append(f"{disk.shown(cost['rows'])} for rows, which are stored")
    why: tuple[str, str] | None = None
    if cost["memory"] is not None and cost["memory"] > 0.9 * cost["memory_there"]:
        room = 0.9 * cost["memory_there"] - cost["memory_shared"]
        fewer = max(1, int(room // max(1, cost["memory_per_slot"])))
        why = (f"the machine has {disk.shown(cost['memory_there'])}", f"run fewer at a time: --workers {fewer}")
    elif cost["gpu_memory"] and cost["gpu_memory_there"] and cost["gpu_memory"] > cost["gpu_memory_there"]:
        why = (f"a trial's share of a GPU is {disk.shown(cost['gpu_memory_there'])}", "take fewer --trials-per-gpu")
    elif cost["disk"] > cost["disk_free"]:
        why = (
            f"the disk has {disk.shown(cost['disk_free'])} free",
            "keep fewer models (launch with --keep K or --max-disk SIZE), or give another --workspace",
        )
    return finding("cost", why is None, ", ".join(parts), why)


def _time(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"

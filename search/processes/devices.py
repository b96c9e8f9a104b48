"""Which CPUs and GPUs trials run on: dividing them into slots, and keeping a trial within its own.

The driver divides (``slots``), the trial's process obeys (``apply``) and records (``seen``). A GPU is named
by its UUID, because an index means something else in every process that hides devices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search.errors import RequestError
from search.executors import MEMORY_FRACTION, NO_GPU, Slot

VISIBLE = "CUDA_VISIBLE_DEVICES"
# Of a shared GPU's memory: CUDA's own context and kernels take some in every process, outside of every limit.
_USABLE = 0.9
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class Gpu:
    """A GPU, or a part of one (MIG).

    Attributes:
        uuid: "GPU-…" or "MIG-…".
        index: NVML's, in the order of ``nvidia-smi``; the parts of a GPU share it. None if not known.
        name: The product's name.
        memory_mib: Its size, None if not known.
    """

    uuid: str
    index: int | None = None
    name: str = ""
    memory_mib: int | None = None


def nvml() -> list[Gpu]:
    """The NVIDIA GPUs of this machine; none where there is no driver."""
    try:
        pynvml = importlib.import_module("pynvml")
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            # A GPU that has fallen off the bus answers with an error; the others are still good.
            with contextlib.suppress(pynvml.NVMLError):
                whole = pynvml.nvmlDeviceGetHandleByIndex(index)
                found += [_gpu(pynvml, handle, index) for handle in _parts(pynvml, whole) or [whole]]
        return found
    except pynvml.NVMLError:
        return []
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _gpu(pynvml: Any, handle: Any, index: int) -> Gpu:
    memory = None
    # Not to be had on GPUs that share the machine's memory.
    with contextlib.suppress(pynvml.NVMLError):
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle).total >> 20
    return Gpu(pynvml.nvmlDeviceGetUUID(handle), index, pynvml.nvmlDeviceGetName(handle), memory)


def _parts(pynvml: Any, whole: Any) -> list[Any]:
    """Handles of a GPU's MIG devices; none if it is not divided."""
    try:
        if not pynvml.nvmlDeviceGetMigMode(whole)[0]:
            return []
    except pynvml.NVMLError:  # Most GPUs cannot be divided, and say so with an error.
        return []
    parts = []
    for number in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(whole)):
        with contextlib.suppress(pynvml.NVMLError):  # Not every place is taken.
            parts.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(whole, number))
    return parts


def slots(
    workers: int | None = None,
    gpus: str | None = None,
    trials_per_gpu: int | None = None,
    gpus_per_trial: int | None = None,
    discover: Callable[[], Sequence[Gpu]] = nvml,
) -> tuple[Slot, ...]:
    """Divide this machine into places for trials.

    Args:
        workers: Number of CPU slots; all CPUs that this process may use, if neither this nor a GPU is given.
        gpus: "auto" (all that are visible; CPU slots if there are none), "none", or positions or UUIDs among
            the visible ones, such as "0,1". Without it, "auto" unless ``workers`` is given.
        trials_per_gpu: Slots on each GPU, which share its memory.
        gpus_per_trial: GPUs of each slot.
        discover: Lists the GPUs of the machine.

    Raises:
        RequestError: If the arguments contradict each other or the machine.
    """
    asked = contradictions(workers, gpus, trials_per_gpu, gpus_per_trial)
    devices: list[Gpu] = []
    if workers is None and gpus != "none":
        devices = _visible(discover(), os.environ.get(VISIBLE))
        if gpus not in (None, "auto"):
            devices = _chosen(devices, gpus)
    if not devices:
        if asked:
            raise RequestError(f"{asked[0]} needs a GPU, but none is visible: leave it out, or see nvidia-smi")
        count = cpus() if workers is None else workers
        return tuple(Slot(index, max(1, cpus() // count), NO_GPU) for index in range(count))
    if gpus_per_trial is not None:
        return _joined(devices, gpus_per_trial)
    return _shared(devices, trials_per_gpu or 1)


def _joined(devices: Sequence[Gpu], each: int) -> tuple[Slot, ...]:
    if each > len(devices):
        raise RequestError(f"--gpus-per-trial must be at most {len(devices)}, the GPUs there are, but got {each}")
    if each > 1 and any(gpu.uuid.startswith("MIG-") for gpu in devices):
        raise RequestError(f"--gpus-per-trial must be 1 with MIG devices, of which CUDA uses one, but got {each}")
    groups = [devices[start : start + each] for start in range(0, len(devices) - each + 1, each)]
    return tuple(_gpu_slot(index, group, 1, cpus() // len(groups)) for index, group in enumerate(groups))


def _shared(devices: Sequence[Gpu], sharing: int) -> tuple[Slot, ...]:
    # Round by round, so that the first trials of a short study spread over all GPUs.
    places = [gpu for _ in range(sharing) for gpu in devices]
    return tuple(_gpu_slot(index, [gpu], sharing, cpus() // len(places)) for index, gpu in enumerate(places))


def contradictions(
    workers: int | None, gpus: str | None, trials_per_gpu: int | None, gpus_per_trial: int | None
) -> list[str]:
    """See that the arguments of ``slots`` go together; returns those that need a GPU.

    Raises:
        RequestError: If they do not.
    """
    sharing = {"--trials-per-gpu": trials_per_gpu, "--gpus-per-trial": gpus_per_trial}
    for flag, value in {"--workers": workers, **sharing}.items():
        if value is not None and value < 1:
            raise RequestError(f"{flag} must be at least 1, but got {value}")
    asked = [flag for flag, value in sharing.items() if value is not None]
    if len(asked) == 2:
        raise RequestError("--trials-per-gpu and --gpus-per-trial exclude each other, but got both: leave one out")
    if workers is not None and gpus not in (None, "none"):
        raise RequestError(f"--workers counts CPU slots, but got it with --gpus {gpus}: leave one of them out")
    if workers is not None and asked:
        raise RequestError(f"--workers counts CPU slots, but got it with {asked[0]}: leave one of them out")
    if gpus == "none" and asked:
        raise RequestError(f"{asked[0]} needs GPUs, but got it with --gpus none: leave one of them out")
    return asked


def granted(
    ids: Sequence[str], sharing: int, threads: int, where: str, discover: Callable[[], Sequence[Gpu]] = nvml
) -> tuple[Slot, ...]:
    """Slots on GPUs that somebody else has assigned to this process: several on a single one, or one on all of them.

    Args:
        ids: As ``CUDA_VISIBLE_DEVICES`` names them.
        sharing: Slots on a single GPU.
        threads: CPU threads of each slot.
        where: Names this machine among others, for GPUs that the driver library does not know and so has no UUID of.
    """
    found = _visible(discover(), ",".join(ids))
    known = found if len(found) == len(ids) else [Gpu(word) for word in ids]
    slots = [_gpu_slot(index, known, sharing, threads) for index in range(sharing)]
    if known is found:
        return tuple(slots)
    return tuple(dataclasses.replace(slot, gpus=tuple(f"{where}:{word}" for word in ids)) for slot in slots)


def _gpu_slot(index: int, devices: Sequence[Gpu], sharing: int, threads: int) -> Slot:
    uuids = tuple(gpu.uuid for gpu in devices)
    env = {VISIBLE: ",".join(uuids), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    limit = None
    if sharing > 1:
        env[MEMORY_FRACTION] = f"{_USABLE / sharing:.3f}"
        sizes = [gpu.memory_mib for gpu in devices if gpu.memory_mib is not None]
        limit = int(min(sizes) * _USABLE / sharing) if sizes else None
    share = 1 / sharing if sharing > 1 else None
    return Slot(index, max(1, threads), env, uuids, share, limit)


def _visible(found: Sequence[Gpu], inherited: str | None) -> list[Gpu]:
    """The GPUs that an inherited ``CUDA_VISIBLE_DEVICES`` leaves, in its order.

    As CUDA does, stop at the first entry that names nothing. Indices are read in the order of nvidia-smi
    (``CUDA_DEVICE_ORDER=PCI_BUS_ID``): CUDA's own default, fastest first, is known to CUDA alone.
    """
    if inherited is None or not found:
        return list(found)
    left: list[Gpu] = []
    for word in (part.strip() for part in inherited.split(",")):
        if word.isdecimal():
            named = [gpu for gpu in found if gpu.index == int(word)]
        else:
            # CUDA takes the beginning of a UUID, if no other begins so.
            named = [gpu for gpu in found if word and gpu.uuid.startswith(word)]
            if word.startswith("MIG-") and not named:
                named = [Gpu(word)]
            elif len(named) > 1:
                named = []
        if not named:
            break
        left += [gpu for gpu in named if gpu not in left]
    return left


def _chosen(visible: Sequence[Gpu], words: str | None) -> list[Gpu]:
    """The GPUs that the user names, by position among the visible ones or by UUID."""
    names = {str(position): gpu for position, gpu in enumerate(visible)} | {gpu.uuid: gpu for gpu in visible}
    chosen = []
    for word in (part.strip() for part in (words or "").split(",")):
        if not visible:
            raise RequestError(f"--gpus {words} needs GPUs, but none is visible: use --workers, or see nvidia-smi")
        if word not in names:
            there = ", ".join(str(position) for position in range(len(visible)))
            raise RequestError(f"--gpus takes auto, none, or numbers out of {there}, but got {word!r}")
        if names[word] in chosen:
            raise RequestError(f"--gpus must name each GPU once, but got {words}: use --trials-per-gpu to share one")
        chosen.append(names[word])
    return chosen


def cpus() -> int:
    """CPUs that this process may use: not those that its affinity or its container keeps from it."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = _QUOTA.read_text().split()
        count = min(count, max(1, math.ceil(int(quota) / int(period))))
    return count


def apply(slot: Mapping[str, Any]) -> None:
    """Keep this process within its slot. In the trial's process, before the module is executed.

    The environment has already hidden other slots' GPUs, and told JAX its share.

    Args:
        slot: What ``Slot.to_json`` made.
    """
    keras = importlib.import_module("keras")
    backend = keras.config.backend()
    # A library that is not the backend (tf.data under JAX) would take all of the GPU's memory just the same.
    if backend == "tensorflow" or "tensorflow" in sys.modules:
        _apply_tensorflow(importlib.import_module("tensorflow"), slot)
    if backend == "torch" or "torch" in sys.modules:
        _apply_torch(importlib.import_module("torch"), slot)


def _apply_tensorflow(tf: Any, slot: Mapping[str, Any]) -> None:
    tf.config.threading.set_intra_op_parallelism_threads(slot["threads"])
    tf.config.threading.set_inter_op_parallelism_threads(slot["threads"])
    if not slot["gpus"]:
        return
    for gpu in tf.config.list_physical_devices("GPU"):
        # In this order: with a limit in place, TensorFlow refuses to turn growth on.
        tf.config.experimental.set_memory_growth(gpu, True)
        if slot["memory_mib"] is not None:
            limit = tf.config.LogicalDeviceConfiguration(memory_limit=slot["memory_mib"])
            tf.config.set_logical_device_configuration(gpu, [limit])


def _apply_torch(torch: Any, slot: Mapping[str, Any]) -> None:
    torch.set_num_threads(slot["threads"])
    if slot["gpus"] and slot["memory_share"] is not None:
        for number in range(torch.cuda.device_count()):
            torch.cuda.set_per_process_memory_fraction(slot["memory_share"] * _USABLE, number)


def be_deterministic() -> None:
    """Let the backend use only operations that give the same numbers every time. Before a model is built.

    An operation that has no such variant fails then. On CPUs little changes; on GPUs training gets slower.
    """
    keras = importlib.import_module("keras")
    backend = keras.config.backend()
    if backend == "tensorflow":
        tf = importlib.import_module("tensorflow")
        keras.utils.set_random_seed(0)  # random operations without any seed are refused from here on
        tf.config.experimental.enable_op_determinism()
    elif backend == "jax":
        # Read when JAX first uses a device, which an import alone does not.
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
    elif backend == "torch":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch = importlib.import_module("torch")
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)


def seen() -> list[dict[str, str]]:
    """The devices that Keras' backend sees in this process, for the trial's record.

    Returns:
        One object per device: "kind" ("CPU", "GPU"), the backend's "name", and for a GPU its "uuid".
    """
    backend = importlib.import_module("keras").config.backend()
    if backend == "tensorflow":
        tf = importlib.import_module("tensorflow")
        devices = [(device.device_type, device.name) for device in tf.config.list_physical_devices()]
    elif backend == "jax":
        jax = importlib.import_module("jax")
        devices = [(device.platform.upper(), str(device)) for device in jax.devices()]
    elif backend == "torch":
        torch = importlib.import_module("torch")
        numbers = range(torch.cuda.device_count())
        devices = [("CPU", "cpu"), *(("GPU", torch.cuda.get_device_name(number)) for number in numbers)]
    else:
        devices = [("CPU", backend)]
    uuids = iter(os.environ.get(VISIBLE, "").split(","))
    out = []
    for kind, name in devices:
        record = {"kind": kind, "name": name}
        if kind == "GPU":
            record["uuid"] = next(uuids, "")
        out.append(record)
    return out


def gpu_memory() -> int | None:
    """The most bytes of one GPU that Keras' backend has had in use in this process; None without a GPU."""
    backend = importlib.import_module("keras").config.backend()
    if backend == "tensorflow":
        tf = importlib.import_module("tensorflow")
        if tf.config.list_logical_devices("GPU"):
            return int(tf.config.experimental.get_memory_info("GPU:0")["peak"])
    elif backend == "jax":
        found = importlib.import_module("jax").devices()[0].memory_stats() or {}
        return found.get("peak_bytes_in_use")
    elif backend == "torch":
        torch = importlib.import_module("torch")
        if torch.cuda.is_available():
            return int(torch.cuda.max_memory_allocated())
    return None

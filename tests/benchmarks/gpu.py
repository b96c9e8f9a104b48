"""Trials per hour on one GPU that several trials share, and how busy the GPU is. Needs a GPU.

    python tests/benchmarks/gpu.py --sharing 1 2 4 8

The same random search runs once for each number of trials that share the GPU, with the first one's trials as the
measure. `KERAS_BACKEND` chooses the backend. Utilisation and memory are NVML's, of the whole GPU, twice a second
while trials ran: if others use it, they are in the numbers.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import tempfile
import threading
from pathlib import Path
from typing import Any

import measure

from search.errors import RequestError
from search.processes import devices
from search.study import Study
from search.trial import TrialState

_BETWEEN = 0.5


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--space", type=Path, default=measure.ROOT / "spaces" / "digits_cnn.py")
    parser.add_argument("--sharing", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--gpu", default="0", help="position or UUID of one GPU")
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        (slot,) = devices.slots(gpus=args.gpu)
    except RequestError as error:
        parser.error(str(error))
    except ValueError:
        parser.error(f"--gpu must name one GPU, but got {args.gpu}")
    notes = {"space": args.space.name, "trials": args.trials, "epochs": args.epochs, "seed": args.seed}
    measure.setting(notes | {"GPU": slot.gpus[0], "cores of the machine": measure.cores()})
    rows, first = [], None
    for sharing in args.sharing:
        watch = Watch(slot.gpus[0])
        with tempfile.TemporaryDirectory() as folder, watch:
            hours, failed = search(sharing, args, Path(folder))
        rate = args.trials / hours
        first = first or rate
        rows.append([str(sharing), f"{rate:.0f}", f"{rate / first:.2f}", str(failed), *watch.seen()])
    headings = (
        "trials on\nthe GPU",
        "trials\nper hour",
        "times the\nfirst",
        "failed",
        "GPU busy %,\nmedian",
        "memory GiB,\npeak",
    )
    measure.show("One GPU, shared", headings, rows)


def search(sharing: int, args: argparse.Namespace, scratch: Path) -> tuple[float, int]:
    """Hours from the first trial's start to the last one's end, and how many failed."""
    command = [*measure.HELDOUT, "launch", str(args.space), "--study", "gpu", "--sampler", "random"]
    command += ["--trials", str(args.trials), "--epochs", str(args.epochs), "--seed", str(args.seed)]
    command += ["--evaluate", "no", "--confirm", "0", "--gpus", args.gpu, "--trials-per-gpu", str(sharing)]
    measure.run(command, scratch)
    trials = Study("gpu", scratch / "workspace").trials
    failed = sum(trial.state is TrialState.FAILED for trial in trials)
    return (max(trial.ended for trial in trials) - min(trial.started for trial in trials)) / 3600, failed


class Watch:
    """Reads how busy a GPU is, in a thread of its own, until the block ends."""

    def __init__(self, uuid: str) -> None:
        self._nvml: Any = importlib.import_module("pynvml")
        self._nvml.nvmlInit()
        self._handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._busy: list[int] = []
        self._used: list[int] = []

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._nvml.nvmlShutdown()

    def _read(self) -> None:
        while not self._over.wait(_BETWEEN):
            try:  # parts of a GPU (MIG) do not say
                self._busy.append(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu)
                self._used.append(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
            except self._nvml.NVMLError:
                return

    def seen(self) -> list[str]:
        """Median utilisation, leaving out the start-up before the GPU was used, and peak memory, for the table."""
        began = next((at for at, busy in enumerate(self._busy) if busy), None)
        if began is None:
            return ["not told", "not told" if not self._used else f"{max(self._used) / 2**30:.1f}"]
        return [f"{statistics.median(self._busy[began:]):.0f}", f"{max(self._used) / 2**30:.1f}"]


if __name__ == "__main__":
    main()

"""How soon things happen: the first epoch of a study, a trial's harness, and the commands that only look.

python tests/benchmarks/startup.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import measure

from search.executors import Exited, Job, Message, Slot
from search.executors.local import LocalExecutor
from search.processes.channel import Channel
from search.record.journal import Journal


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--trials", type=int, default=50, help="processes to start for the harness's latency")
    args = parser.parse_args()
    measure.setting({"repeats": args.repeats, "space": measure.SPACE.name})
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        imports, first = [], []
        measure.run([sys.executable, "-c", "import keras"], folder)  # page cache and bytecode
        for repeat in range(args.repeats):  # alternating, so that a busy minute hits both
            imports.append(measure.run([sys.executable, "-c", "import keras"], folder).seconds)
            first.append(first_epoch(folder, f"startup-{repeat}"))
        ratios = [one / other for one, other in zip(first, imports, strict=True)]
        ready = [1000 * seconds for seconds in harness(args.trials, folder)]
        looks = {
            command: [measure.run([*measure.HELDOUT, command], folder).seconds for _ in range(args.repeats)]
            for command in ("--help", "status")
        }
    tail = statistics.quantiles(ready, n=20)[-1]
    rows = [
        ["python -c 'import keras'", f"{measure.spread(imports)} s", ""],
        ["first epoch of a study", f"{measure.spread(first)} s", ""],
        ["… as a multiple of the import", measure.spread(ratios), "1.5"],
        ["a trial's harness ready", f"{measure.spread(ready, 1)} ms", "50 ms"],
        ["… 95th percentile", f"{tail:.1f} ms", ""],
        ["heldout --help", f"{measure.spread(looks['--help'])} s", "0.5 s"],
        ["heldout status", f"{measure.spread(looks['status'])} s", "0.5 s"],
    ]
    measure.show("Median (range)", ("", "measured", "goal"), rows)


def first_epoch(folder: Path, study: str) -> float:
    """Seconds from before `heldout launch` exists until its driver hears of the baseline's first epoch."""
    command = [*measure.HELDOUT, "launch", str(measure.SPACE), "--trials", "1", "--epochs", "2"]
    done = measure.run([*command, "--evaluate", "no", "--study", study], folder)
    path = folder / "workspace" / "studies" / study / "journal.sqlite"
    with Journal.open(path, read_only=True) as journal:
        return min(report.at for report in journal.reports(trial=0)) - done.began


def harness(trials: int, folder: Path) -> list[float]:
    """Seconds from submitting a job to its first message, with the template warm; one at a time."""
    slot = Slot(0, 1)
    executor = LocalExecutor(
        (slot,),
        preload=["search.harness.training", "search.harness.worker"],
        path=[str(Path(__file__).parent)],
        entry="startup:answer",
        log=folder / "template.log",
    )
    seconds = []
    with executor:
        for number in range(trials + 1):
            asked = time.perf_counter()
            executor.submit(Job(f"job-{number}", "answer"), slot)
            seconds.append(answered(executor) - asked)
    return seconds[1:]  # the first one waited for the template's imports


def answered(executor: LocalExecutor) -> float:
    """The moment of the next message; returns once its process is gone too."""
    moment = None
    while True:
        for event in executor.poll(5.0):
            if isinstance(event, Message) and moment is None:
                moment = time.perf_counter()
            elif isinstance(event, Exited):
                if moment is None:
                    raise RuntimeError(f"the job must answer, but its process ended: {event}")
                return moment


def answer(job: dict[str, object], channel: Channel) -> None:
    """Runs in the trial's process: the harness is ready as soon as it could do anything at all."""
    channel.send({"type": "result"})


if __name__ == "__main__":
    main()

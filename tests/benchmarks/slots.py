"""How busy slots are kept: time inside training ÷ time that slots existed, with 256 simulated slots and two real ones.

    python tests/benchmarks/slots.py
    python tests/benchmarks/slots.py --seeds --space digits_cnn

Simulated: the driver, its journal and its sampler are real, and so is the clock. The trials are not: each takes 0.5 to
5 s of doing nothing, asks for its parameters, reports five epochs and says its result, as a process would. Slots exist
from the moment that the search may fill them, which is when its baseline has ended, until the last trial begins: how
long the tail of a search is depends on its number of trials, and on nothing that a driver does.

Real: a shipped space on this machine, over the same time; inside training is from Keras' `on_train_begin` to its
`on_train_end`. The rest is the fork, the model, predictions, scores and the weights on disk.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import measure
from driver_cost import SPACE, Opinion

from search.definition.space import Space
from search.executors import Event, Exited, Job, Message, Slot
from search.loop.driver import Driver
from search.loop.ends import Ends
from search.record.journal import Journal
from search.samplers import get_sampler
from search.study import Study

SHORTEST, LONGEST, EPOCHS = 0.5, 5.0, 5
GOAL, REAL_GOAL = 95, 90
REAL = 30  # trials of the real search

# A space that also notes when its trainings begin and end.
WATCHED = """
import time

import keras

from spaces.{space} import *


class Span(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        self.began = time.time()

    def on_train_end(self, logs=None):
        with open({log!r}, "a") as file:
            file.write(f"{{self.began}} {{time.time()}}\\n")


def callbacks(hp):
    return [Span()]
"""


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--sampler", default="random")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="of simulated searches")
    parser.add_argument("--space", default="digits_cnn", help="of the real search")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    measure.setting({"slots": args.slots, "trials": args.trials, "sampler": args.sampler, "seeds": args.seeds})
    if args.seeds:
        simulated(args)
    with tempfile.TemporaryDirectory() as scratch:
        share = real(args.space, args.workers, Path(scratch))
    print(f"{args.space}, {args.workers} workers: {100 * share:.1f} % inside fit (the goal is {REAL_GOAL})")


def simulated(args: argparse.Namespace) -> None:
    """Measure simulated slots, and print the table."""
    shares, cpu, rate = [], [], []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as scratch:
            world = run(args, seed, Path(scratch))
        shares.append(100 * world.share())
        cpu.append(1000 * world.cpu / args.trials)
        rate.append(args.trials / (world.last - world.opened))
        print(f"seed {seed}: {shares[-1]:.1f} % busy, {cpu[-1]:.1f} ms of CPU a trial, {rate[-1]:.0f} trials a second")
    row = [str(args.slots), measure.spread(shares, 1), f"{GOAL}", measure.spread(cpu, 1), measure.spread(rate, 0)]
    headings = ("slots", "busy, %", "goal", "driver's CPU, ms a trial", "trials a second")
    measure.show(f"{args.slots} simulated slots, trials of {SHORTEST} to {LONGEST} s", headings, [row])
    ideal = args.slots / statistics.fmean((SHORTEST, LONGEST))
    print(f"slots that are always busy would take {ideal:.0f} trials a second")


def real(space: str, workers: int, scratch: Path) -> float:
    """Of real slots' time, that inside fit, from the end of the baseline to the beginning of the last trial."""
    module, log = scratch / "watched.py", scratch / "spans"
    module.write_text(WATCHED.format(space=space, log=str(log)))
    command = [*measure.HELDOUT, "launch", str(module), "--study", "s", "--trials", str(REAL), "--sampler", "random"]
    command += ["--workers", str(workers), "--confirm", "0", "--evaluate", "no"]
    measure.run(command, scratch)
    trials = Study("s", scratch / "workspace").trials
    begin, end = trials[0].ended, max(trial.started for trial in trials)
    spans = [tuple(map(float, line.split())) for line in log.read_text().splitlines()]
    return inside(spans, begin, end) / (workers * (end - begin))


def inside(spans: Iterable[tuple[float, ...]], begin: float, end: float) -> float:
    """Seconds of all spans that lie between two moments."""
    return sum(max(0.0, min(until, end) - max(since, begin)) for since, until in spans)


class World:
    """An executor whose jobs only take their time, in seconds at least and at most."""

    def __init__(self, slots: int, seed: int, takes: tuple[float, float] = (SHORTEST, LONGEST)) -> None:
        self.slots, self._takes = tuple(Slot(index, 1) for index in range(slots)), takes
        self._dice = random.Random(seed)
        self._due: list[tuple[float, int, Event]] = []
        self._count = itertools.count()
        self.spans: list[tuple[float, float]] = []
        self.opened = self.last = self.cpu = 0.0  # when the search could fill its slots, and began its last trial

    def share(self) -> float:
        """Of the slots' time, that in which they trained."""
        begin, end = self.opened, self.last
        return inside(self.spans, begin, end) / (len(self.slots) * (end - begin))

    def start(self) -> None:
        """Nothing needs to get ready."""

    def submit(self, job: Job, slot: Slot | None) -> None:
        """The job's messages and its end, when their time has come."""
        now = time.monotonic()
        proposal = job.payload.get("proposal") or {}
        asks = [
            {**one.to_json(), "value": proposal.get(one.identity, one.domain.default)} for one in SPACE
        ]
        if job.kind == "discover":
            self._say(now, job, {"type": "result", "space": Space.empty().grown(asks).to_json(), "complete": True})
            return self._end(now, job)
        takes = self._dice.uniform(*self._takes)
        if job.payload["trial"] == 0:
            self._say(now, job, {"type": "preflight", "asks": asks})
            self.opened = now + takes
        self.last = max(self.last, now)
        self.spans.append((now, now + takes))
        self._say(now, job, {"type": "asks", "asks": asks})
        loss = self._dice.random()
        for step in range(1, EPOCHS + 1):
            body = {"type": "report", "step": step, "of": EPOCHS, "metrics": {"loss": loss, "val_loss": loss / step}}
            self._say(now + takes * step / EPOCHS, job, body)
        done = {"asks": asks, "epochs": EPOCHS, "best_epoch": EPOCHS, "size": 1000, "weights": "none"}
        done |= {"made_up": loss, "reported": {}, "devices": [], "declaration": {}}
        self._say(now + takes, job, {"type": "result", **done})
        self._end(now + takes, job)

    def _say(self, at: float, job: Job, body: dict[str, Any]) -> None:
        heapq.heappush(self._due, (at, next(self._count), Message(job.id, body)))

    def _end(self, at: float, job: Job) -> None:
        heapq.heappush(self._due, (at, next(self._count), Exited(job.id, 0, None, 0.0)))

    def poll(self, timeout: float) -> list[Event]:
        """What is due by now, waiting for something to be."""
        until = time.monotonic() + timeout
        if self._due:
            until = min(until, self._due[0][0])
        if (left := until - time.monotonic()) > 0:
            time.sleep(left)
        events = []
        while self._due and self._due[0][0] <= time.monotonic():
            events.append(heapq.heappop(self._due)[2])
        return events

    def need(self, more: bool) -> None:
        """Nothing: slots stay."""

    def send(self, job_id: str, body: Mapping[str, Any]) -> None:
        """No job listens."""

    def kill(self, job_id: str) -> None:
        """No job hangs."""

    def cpu_seconds(self, job_id: str) -> float | None:
        """Not known."""
        return None

    def has_begun(self, job_id: str) -> bool:
        """At once."""
        return True

    def close(self) -> None:
        """There is nothing to end."""

    def __enter__(self) -> World:
        return self

    def __exit__(self, *error: object) -> None: ...


def run(args: argparse.Namespace, seed: int, folder: Path) -> World:
    """One search over simulated slots."""
    world = World(args.slots, seed)
    with Journal.create(folder / "journal.sqlite", {}) as journal:
        driver = Driver(
            ends=Ends(args.trials),
            seed=seed,
            direction="min",
            journal=journal,
            sampler=get_sampler(args.sampler),
            executor=world,
            judge=Opinion(),
            payload=lambda trial, proposal: {"proposal": proposal or {}, "trial": trial.number},
            discovery={},
            on_preflight=lambda findings: None,
        )
        before = sum(os.times()[:2])
        ended = driver.run()
        world.cpu = sum(os.times()[:2]) - before
        if ended != "complete" or len(journal.history()) != args.trials:
            raise RuntimeError(f"the search must be complete, but it is {ended} with {len(journal.history())} trials")
    return world


if __name__ == "__main__":
    main()

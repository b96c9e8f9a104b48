"""What each of the changes to Hyperopt's TPE buys: regret on HPOBench's tables with one of them taken back at a time.

    pip install -e '.[test,benchmarks]' && python tests/benchmarks/tpe_ablation.py

Tables, regret, `--out` and the rest are those of `quality.py`.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path
from typing import Any

import measure
import quality

VARIANTS: dict[str, dict[str, Any]] = {
    "tpe": {},
    "each parameter on its own": {"joint": False},
    "Hyperopt's number of good trials": {"good": None},
    "Hyperopt's widths": {"narrow": 1.0},
    "a start of 20 trials": {"startup": 20},
    "all four": {"joint": False, "good": None, "narrow": 1.0, "startup": 20},
}
STOCK = "hyperopt"


def one(variant: str, data_set: str, seed: int, trials: int, slots: int, noisy: bool) -> dict[str, Any]:
    """One search by a variant, as `quality.one` is one by a sampler."""
    from search.samplers.hyperopt import HyperoptSampler
    from search.samplers.tpe import TPESampler

    sampler = HyperoptSampler() if variant == STOCK else TPESampler(**VARIANTS[variant])
    table = quality.problem(data_set)
    run = quality.Run(table, seed, noisy)
    seconds = quality.ours(sampler, table, run, trials, seed, slots)
    key = {"sampler": variant, "data_set": data_set, "seed": seed, "trials": trials, "slots": slots, "noisy": noisy}
    return {**key, "regrets": run.regrets, "seconds": statistics.median(seconds[-max(1, trials // 5) :])}


def main() -> None:
    """Measure what is missing, and print the table."""
    names = [*VARIANTS, STOCK]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=names, choices=names)
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--noisy", action="store_true")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=Path("tpe_ablation.jsonl"))
    args = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"  # the processes of the pool read it
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    measure.setting({"data sets": quality.DATA_SETS, "seeds": seeds, "trials": args.trials, "noisy": args.noisy})
    wanted = [
        (variant, data_set, seed, args.trials, 1, args.noisy)
        for seed in seeds
        for variant in args.variants
        for data_set in quality.DATA_SETS
    ]
    quality.compare(wanted, args.out, args.processes, one)
    kept = [row for row in quality.read(args.out) if quality.key_of(row) in set(wanted)]
    quality.show(kept, args.variants, [after for after in quality.SHOWN if after <= args.trials])


if __name__ == "__main__":
    main()

"""Whether an ensemble of a study beats its single winner on test rows, on a shipped space.

    python tests/benchmarks/ensemble.py --seeds 10

Every seed splits and searches anew, with default settings and the test rows sealed; then `heldout ensemble` picks by
guard rows and opens the test rows once, for the ensemble and the single winner. Each study has a ledger of its own, so
each opening is a first one. The last lines pool the paired differences. Studies of other splits share rows, so their
spread says what another split would bring, and not what other rows would.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
from scipy import stats

WAYS = ("ensemble", "average", "nelder_mead", "single")


def main() -> None:
    """Measure, and print a line per study and the means."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--size", type=int, default=5)
    parser.add_argument("--space", default="digits_mlp")
    args = parser.parse_args()
    measure.setting({"space": args.space, "trials": args.trials, "size": args.size, "seeds": f"0 to {args.seeds - 1}"})
    found = []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as scratch:
            found.append(one(seed, args, Path(scratch)))
        print(line(seed, found[-1]), flush=True)
    show(found)


def one(seed: int, args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """What `heldout ensemble` says of one study."""
    options = ["--trials", str(args.trials), "--seed", str(seed), "--split-seed", str(seed), "--workers", "1"]
    measure.run([*measure.HELDOUT, "launch", args.space, *options, "--study", "s", "--evaluate", "no"], scratch)
    asked = ["ensemble", "s", "--size", str(args.size), "--evaluate", "yes", "--json"]
    found: dict[str, Any] = json.loads(measure.run([*measure.HELDOUT, *asked], scratch).stdout)
    return found


def line(seed: int, found: dict[str, Any]) -> str:
    """One study."""
    test, judged = found["test"], found["cross_fitted"]["scores"]
    low, high = test["difference"]["interval"]
    return (
        f"seed {seed}: test {test['ensemble']['score']:.4f} against {test['winner']['score']:.4f} of the winner, gain "
        f"{test['difference']['gain']:+.4f} ({low:+.4f} to {high:+.4f}); {len(found['members'])} members; cross-fitted "
        + ", ".join(f"{way} {judged[way]:.4f}" for way in WAYS)
    )


def show(found: Sequence[dict[str, Any]]) -> None:
    """Means over studies, with intervals of the mean by Student's t."""
    gains = [one["test"]["difference"]["gain"] for one in found]
    shown = sum(one["test"]["beats_single"] for one in found)
    wins = f"{sum(g > 0 for g in gains)} / {sum(g == 0 for g in gains)} / {sum(g < 0 for g in gains)}"
    print(f"gain over the winner on test rows: {interval(gains)}; better / same / worse {wins}, shown in {shown}")
    for way in WAYS[:-1]:
        cross = [one["cross_fitted"]["gains"][way]["gain"] for one in found]
        print(f"gain of {way} over a single model, cross-fitted on guard rows: {interval(cross)}")


def interval(values: Sequence[float]) -> str:
    """The mean and its 95 % interval."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:+.4f}"
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.4f} ({mean - half:+.4f} to {mean + half:+.4f})"


if __name__ == "__main__":
    main()

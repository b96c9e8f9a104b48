"""What practice says of Keras models, tried on digits: BatchNormalization in deep stacks, separable convolutions.

    python tests/benchmarks/practice.py --log practice.jsonl

Each seed is one study per question, with a split of its own. The configurations in question are enqueued, all else is
the space's default. Nothing is chosen among them, and no training saw a guard label or was stopped by one, so guard
scores are fair. Differences are between trials of one study, which had the same rows. Their intervals are Student's
t with the variance of Nadeau and Bengio (2003): splits of the same digits overlap, and the ordinary one would be too
narrow.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import numpy as np
from pruning import keep, read
from scipy import stats

from search.study import Study

SIGMOID = {"activation": "sigmoid", "layers": 10}
BLOCKS = {"blocks": 2, "batch_norm": "before", "head": "average", "learning_rate": 3e-3}


@dataclass(frozen=True)
class Question:
    """Configurations of one space, in the order of the table; the first is what the others are compared with."""

    space: str
    models: Mapping[str, Mapping[str, Any]]


QUESTIONS = {
    "Ten sigmoid layers of 64": Question(
        "digits_deep",
        {
            "no BatchNormalization": SIGMOID | {"batch_norm": "none"},
            "none, a third of the learning rate": SIGMOID | {"batch_norm": "none", "learning_rate": 3e-4},
            "none, ten times the learning rate": SIGMOID | {"batch_norm": "none", "learning_rate": 1e-2},
            "before the activation": SIGMOID | {"batch_norm": "before"},
            "after the activation": SIGMOID | {"batch_norm": "after"},
        },
    ),
    "Two convolutional blocks": Question(
        "digits_cnn",
        {
            "plain, 16 and 32 filters": BLOCKS | {"convolution": "plain", "filters": 16},
            "plain, 8 and 16": BLOCKS | {"convolution": "plain", "filters": 8},
            "separable, 16 and 32": BLOCKS | {"convolution": "separable", "filters": 16},
            "separable, 32 and 64": BLOCKS | {"convolution": "separable", "filters": 32},
        },
    ),
}


def main() -> None:
    """Measure, and print one table per question."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--epochs", type=int, help="of a trial at most; the space's own by default")
    parser.add_argument("--log", type=Path, help="file of JSON lines that runs are kept in, and not made again from")
    args = parser.parse_args()
    measure.setting({"seeds": args.seeds, "epochs": args.epochs or "the spaces'"})
    known = read(args.log)
    for title, question in QUESTIONS.items():
        found = []
        for seed in args.seeds:
            key = [question.space, dict(question.models), seed, args.epochs]
            if (run := known.get(json.dumps(key))) is None:
                run = study(question, seed, args.epochs)
                keep(args.log, key, run)
            found.append(run)
            print(f"{title}, seed {seed}: {run}", file=sys.stderr, flush=True)
        table(title, question, found)


def study(question: Question, seed: int, epochs: int | None) -> dict[str, Any]:
    """One study of the question's configurations: what each came to, and the rows of its tiers."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        (scratch / "models.json").write_text(json.dumps(list(question.models.values())))
        command = [*measure.HELDOUT, "launch", str(measure.ROOT / "spaces" / f"{question.space}.py"), "--study", "s"]
        command += ["--enqueue", "models.json", "--trials", str(1 + len(question.models)), "--confirm", "0"]
        command += ["--seed", str(seed), "--split-seed", str(seed), "--workers", "1", "--evaluate", "no"]
        command += ["--epochs", str(epochs)] if epochs else []
        measure.run(command, scratch)
        with Study("s", scratch / "workspace").journal() as journal:
            guards = {number: score for (number, _), (score, _) in journal.guards().items()}
            tiers = journal.get("prepared")["manifest"]["tiers"]
            trials = journal.history()[1:]  # without the baseline
    found: dict[str, Any] = {"tiers": {name: tiers[name] for name in ("train", "guard")}}
    for (label, wanted), trial in zip(question.models.items(), trials, strict=True):
        if wanted.items() - trial.params.items():
            raise RuntimeError(f"trial {trial.number} must have {dict(wanted)}, but had {dict(trial.params)}")
        found[label] = {
            "guard": guards[trial.number],
            "size": trial.size,
            "epochs": trial.epochs,
            "seconds": trial.seconds,
        }
    return found


def table(title: str, question: Question, found: Sequence[Mapping[str, Any]]) -> None:
    """Means and ranges over seeds, and differences to the first model."""
    rows, first = [], next(iter(question.models))
    for label in question.models:
        runs = [one[label] for one in found]
        gains = [one[label]["guard"] - one[first]["guard"] for one in found]
        scores = [run["guard"] for run in runs]
        rows.append(
            [
                label,
                f"{statistics.fmean(scores):.4f} ({min(scores):.3f} to {max(scores):.3f})",
                "" if label == first else interval(gains, found[0]["tiers"]),
                f"{runs[0]['size']:,}",
                f"{statistics.median(run['epochs'] for run in runs):.0f}",
                f"{statistics.median(run['seconds'] for run in runs):.1f}",
            ]
        )
    headings = ("", "accuracy on guard rows", "difference, 95 %", "weights", "epochs", "seconds")
    measure.show(f"{title}: {len(found)} seeds, means and ranges; medians of epochs and seconds", headings, rows)


def interval(gains: Sequence[float], tiers: Mapping[str, int]) -> str:
    """The mean over random splits and its 95 % interval, for a share of rows that were held out.

    Nadeau and Bengio, Inference for the Generalization Error, Machine Learning 52, 2003: the variance of such a mean
    is (1/J + n₂/n₁) times that of single differences, with n₁ train rows and n₂ held-out rows in each of J splits.
    """
    mean, splits = statistics.fmean(gains), len(gains)
    if splits < 2:
        return f"{mean:+.4f}"
    spread = float(np.std(gains, ddof=1)) * (1 / splits + tiers["guard"] / tiers["train"]) ** 0.5
    half = float(stats.t.ppf(0.975, splits - 1)) * spread
    return f"{mean:+.4f} ({mean - half:+.4f} to {mean + half:+.4f})"


if __name__ == "__main__":
    main()

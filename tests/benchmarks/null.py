"""A study on labels that nobody can predict: what each number of the report says of nothing.

    python tests/benchmarks/null.py --seeds 3

2,000 rows of noise with random labels, through the real pipeline: 60 trials by TPE, confirmation, corrected estimate,
test. The truth is 0.5, whatever is shipped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import measure

MODULE = """
import keras
import numpy as np

from search import Dataset

objective = "val_accuracy"
epochs = 5


def load():
    rng = np.random.default_rng({seed})
    return Dataset(rng.normal(size=({rows}, 20)).astype("float32"), rng.integers(0, 2, {rows}))


def build(hp):
    model = keras.Sequential([keras.Input((20,))])
    for i in range(hp.Int("layers", 1, 3)):
        model.add(keras.layers.Dense(hp.Int(f"units_{{i}}", 8, 128, sampling="log", default=32), activation="relu"))
    model.add(keras.layers.Dropout(hp.Float("dropout", 0.0, 0.5)))
    model.add(keras.layers.Dense(1, activation="sigmoid"))
    hp.Choice("batch_size", [32, 64, 128])
    rate = hp.Float("learning_rate", 1e-4, 3e-2, sampling="log", default=1e-3)
    model.compile(keras.optimizers.Adam(rate), "binary_crossentropy", metrics=["accuracy"])
    return model
"""


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--rows", type=int, default=2000)
    args = parser.parse_args()
    measure.setting({"trials": args.trials, "rows": args.rows, "seeds": f"0 to {args.seeds - 1}"})
    found = []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as scratch:
            found.append(study(seed, args.trials, args.rows, Path(scratch)))
    rows = [
        [
            str(seed),
            f"{one['best']['validation']:.3f}",
            f"{one['corrected']['estimate']:.3f} ({_between(one['corrected']['interval'])})",
            f"{one['test']['winner']:.3f} ({_between(one['test']['interval'])})",
            ", ".join(one["verdicts"]),
        ]
        for seed, one in enumerate(found)
    ]
    headings = ("seed", "best validation", "corrected, 95 %", "test, 97 %", "verdicts")
    measure.show("Accuracy where the truth is 0.500", headings, rows)
    for name, values in (
        ("best validation", [one["best"]["validation"] for one in found]),
        ("corrected", [one["corrected"]["estimate"] for one in found]),
        ("test", [one["test"]["winner"] for one in found]),
    ):
        print(f"{name}: mean {statistics.mean(values):.3f}, {measure.spread(values, 3)}")


def study(seed: int, trials: int, rows: int, scratch: Path) -> dict[str, Any]:
    """The report of one study."""
    module = scratch / "noise.py"
    module.write_text(MODULE.format(seed=seed, rows=rows))
    command = [*measure.HELDOUT, "launch", str(module), "--trials", str(trials), "--seed", str(seed), "--json"]
    found: dict[str, Any] = json.loads(measure.run(command, scratch).stdout)
    return found


def _between(interval: list[float]) -> str:
    return f"{interval[0]:.3f} to {interval[1]:.3f}"


if __name__ == "__main__":
    main()

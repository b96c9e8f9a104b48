"""The metric that only Keras knows: what its value is, and what has no part in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search.definition.problem import SpaceModule, find
from search.scorer import custom_metric
from tests.tiny import write_space

BUILD = """
def mine(y_true, y_pred):
    return keras.ops.mean(keras.ops.abs(y_true - y_pred), axis=-1)


def build(hp):
    x = keras.Input((4,))
    ends = [keras.layers.Dense(1, name=name, kernel_regularizer=keras.regularizers.L2(1.0))(x) for name in NAMES]
    model = keras.Model(x, ends[0] if len(ends) == 1 else ends)
    model.compile("adam", [mine] * len(ends) if len(ends) > 1 else mine)
    return model
"""


def scored(tmp_path: Path, objective: str, names: list[str], off: list[float]) -> float:
    """The value of predictions that are wrong by ``off``, output by output."""
    space = write_space(tmp_path, objective=f'objective = "{objective}"\nNAMES = {names}', build=BUILD)
    files: dict[str, Any] = {"predictions": [], "labels": {"kind": "tuple" if len(names) > 1 else "array"}}
    files["labels"] |= {"names": names, "paths": []}
    for name, wrong in zip(names, off, strict=True):
        for kind, value in (("labels", 0.0), ("predictions", wrong)):
            path = str(tmp_path / f"{kind}-{name}.npy")
            np.save(path, np.full((10, 1), value, "float32"))
            (files["labels"]["paths"] if kind == "labels" else files["predictions"]).append(path)
    payload = {"objective": objective, "sets": {"validation": files}}
    return float(custom_metric.score(payload, SpaceModule(find(space)))["values"]["validation"])


def test_penalties_on_the_default_models_weights_are_no_part_of_a_score(tmp_path: Path) -> None:
    assert scored(tmp_path, "val_loss", ["out"], [0.25]) == pytest.approx(0.25, abs=1e-6)


def test_the_loss_of_one_output_is_its_own(tmp_path: Path) -> None:
    assert scored(tmp_path, "val_b_loss", ["a", "b"], [0.5, 0.25]) == pytest.approx(0.25, abs=1e-6)


def test_a_metric_keeps_its_name_in_a_process_that_has_built_a_model(tmp_path: Path) -> None:
    first, second = (scored(tmp_path, "val_loss", ["out"], [0.5]) for _ in range(2))
    assert first == second == pytest.approx(0.5, abs=1e-6)

"""The spaces we ship: they build and train with their defaults and with whatever their domains allow."""

from __future__ import annotations

import importlib.util
import json
import math
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import keras
import keras_tuner
import numpy as np
import pytest

from search import Dataset
from tests.conftest import Heldout

FOLDER = Path(__file__).resolve().parent.parent / "spaces"
ROWS = 32  # enough for a step


@pytest.fixture(params=sorted(path.stem for path in FOLDER.glob("*.py")), scope="module")
def space(request: pytest.FixtureRequest) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"shipped_{request.param}", FOLDER / f"{request.param}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows(space: ModuleType) -> Dataset:
    dataset = space.load()
    assert isinstance(dataset, Dataset)
    return dataset


def configured(space: ModuleType, seed: int | None) -> tuple[Any, Any]:
    """A built model and its hyperparameters: the defaults, or a draw from every domain that is reached."""
    rng = random.Random(seed)
    hp = keras_tuner.HyperParameters()
    drawn: set[str] = set()
    while True:  # a new value may open parameters that no earlier build asked for
        model = space.build(hp)
        new = [] if seed is None else [asked for asked in hp.space if asked.name not in drawn]
        if not new:
            return model, hp
        for asked in new:
            hp.values[asked.name] = asked.random_sample(rng.randrange(2**31))
            drawn.add(asked.name)


def first(part: Any) -> Any:
    """The first rows of all arrays of x or y."""
    return keras.tree.map_structure(lambda leaf: leaf[:ROWS], part)


def features(space: ModuleType, rows: Dataset) -> Any:
    """The first rows, as the model takes them."""
    if not hasattr(space, "preprocess"):
        return first(rows.x)
    prepare = space.preprocess(rows)
    assert isinstance(prepare, keras.Model)
    return np.asarray(prepare(rows.x[:ROWS]))


def test_rows_are_whole(rows: Dataset) -> None:
    leaves = keras.tree.flatten((rows.x, rows.y))
    (count,) = {len(leaf) for leaf in leaves}
    assert count > 400 and all(np.isfinite(leaf).all() for leaf in leaves)
    assert {leaf.dtype.name for leaf in keras.tree.flatten(rows.x)} <= {"float32", "int32"}


@pytest.mark.parametrize("seed", [None, 1, 2], ids=["defaults", "draw1", "draw2"])
def test_a_step_of_training(space: ModuleType, rows: Dataset, seed: int | None) -> None:
    keras.utils.set_random_seed(0)
    model, hp = configured(space, seed)
    x, y = features(space, rows), first(rows.y)
    logs = model.train_on_batch(x, y, return_dict=True)
    assert all(np.isfinite(value) for value in logs.values()), (hp.values, logs)
    assert space.objective.removeprefix("val_") in logs
    assert all(np.isfinite(leaf).all() for leaf in keras.tree.flatten(model.predict_on_batch(x)))
    assert "batch_size" in hp


def test_preprocessing_centres_what_it_was_given(space: ModuleType, rows: Dataset) -> None:
    if not hasattr(space, "preprocess"):
        return
    some = Dataset(rows.x[:200], rows.y[:200])
    columns = np.asarray(space.preprocess(some)(some.x))
    # Float32 and the layer's own epsilon: a mean of 200 values is good to about 1e-5.
    np.testing.assert_allclose(columns.mean(axis=0), 0.0, atol=1e-4)
    np.testing.assert_allclose(columns.std(axis=0), 1.0, atol=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_three_trials_from_the_command_line(name: str, tmp_path: Path, heldout: Heldout) -> None:
    where = ["--workspace", str(tmp_path / "ws")]
    options = ["--trials", "3", "--epochs", "2", "--confirm", "0", "--study", "s", "--json"]
    ran = heldout("launch", name, *options, *where)
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert report["trials"] == {"complete": 3, "pruned": 0, "failed": 0}
    assert math.isfinite(report["test"]["winner"]) and report["verdicts"]

"""The spaces we ship: they build and train with their defaults and with whatever their domains allow."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import keras
import keras_tuner
import numpy as np
import pytest

from search import Dataset

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


def features(space: ModuleType, rows: Dataset) -> Any:
    """The first rows, as the model takes them."""
    if not hasattr(space, "preprocess"):
        return rows.x[:ROWS]
    prepare = space.preprocess(rows)
    assert isinstance(prepare, keras.Model)
    return np.asarray(prepare(rows.x[:ROWS]))


def test_rows_are_whole(rows: Dataset) -> None:
    assert len(rows.x) == len(rows.y) > 400
    assert rows.x.dtype == np.float32 and np.isfinite(rows.x).all() and np.isfinite(rows.y).all()


@pytest.mark.parametrize("seed", [None, 1, 2, 3], ids=["defaults", "draw1", "draw2", "draw3"])
def test_a_step_of_training(space: ModuleType, rows: Dataset, seed: int | None) -> None:
    keras.utils.set_random_seed(0)
    model, hp = configured(space, seed)
    x, y = features(space, rows), rows.y[:ROWS]
    logs = model.train_on_batch(x, y, return_dict=True)
    assert all(np.isfinite(value) for value in logs.values()), (hp.values, logs)
    assert space.objective.removeprefix("val_") in logs
    assert np.isfinite(model.predict_on_batch(x)).all()
    assert "batch_size" in hp


def test_preprocessing_centres_what_it_was_given(space: ModuleType, rows: Dataset) -> None:
    if not hasattr(space, "preprocess"):
        return
    some = Dataset(rows.x[:200], rows.y[:200])
    columns = np.asarray(space.preprocess(some)(some.x))
    # Float32 and the layer's own epsilon: a mean of 200 values is good to about 1e-5.
    np.testing.assert_allclose(columns.mean(axis=0), 0.0, atol=1e-4)
    np.testing.assert_allclose(columns.std(axis=0), 1.0, atol=1e-3)

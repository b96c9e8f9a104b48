"""The spaces we ship: they build and train with their defaults and with whatever their domains allow."""

from __future__ import annotations

import importlib.util
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import keras
import keras_tuner
import numpy as np
import pytest

from search import Dataset
from search.definition.tracing import TracingHyperParameters, discover
from tests.conftest import Heldout

FOLDER = Path(__file__).resolve().parent.parent / "spaces"
ROWS = 32  # enough for a step


def shipped(name: str) -> ModuleType:
    """A module of ours, executed."""
    spec = importlib.util.spec_from_file_location(f"shipped_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=sorted(path.stem for path in FOLDER.glob("*.py")), scope="module")
def space(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HELDOUT_CACHE", str(tmp_path_factory.mktemp("cache")))
        module = shipped(request.param)
        if hasattr(module, "prepare"):
            module.prepare()
        yield module


@pytest.fixture(scope="module")
def rows(space: ModuleType) -> Dataset:
    dataset = space.load()
    assert isinstance(dataset, Dataset)
    if hasattr(space, "decode"):
        dataset = Dataset(np.stack([space.decode(path) for path in dataset.x]), dataset.y)
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
    assert {leaf.dtype.name for leaf in keras.tree.flatten(rows.x)} <= {"float32", "int32", "uint8"}


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


# ── what a module's page in the README says that it shows ──


def built(name: str, **params: Any) -> Any:
    """The model of one of our spaces with these values and the defaults of all others."""
    keras.utils.set_random_seed(0)
    hp = TracingHyperParameters(default=True, named=params)
    model = shipped(name).build(hp)
    assert params.items() <= hp.values.items()
    return model


def test_images_are_augmented_in_training_only() -> None:
    model = built("digits_blocks", augment=True, flip=True)
    kinds = {type(layer).__name__ for layer in model.layers}
    assert {"RandomFlip", "RandomTranslation", "RandomRotation", "RandomZoom"} <= kinds
    last = [layer for layer in model.layers if layer.name.startswith("random_")][-1]
    images = keras.Model(model.inputs[0], last.output)
    x = shipped("digits_blocks").load().x[:8]
    np.testing.assert_allclose(np.asarray(images(x, training=False)), x / 16, rtol=1e-6)
    one, other = (np.asarray(images(x, training=True)) for _ in range(2))
    assert not np.allclose(one, x / 16, atol=0.01) and not np.allclose(one, other, atol=0.01)


def test_selu_keeps_the_spread_of_ten_layers_which_sigmoid_loses() -> None:
    x = shipped("digits_deep").load().x[:200]

    def spread(**params: Any) -> float:
        """Between rows, of the last hidden layer's outputs before any training."""
        model = built("digits_deep", **params)
        hidden = keras.Model(model.inputs[0], model.layers[-2].output)
        return float(np.asarray(hidden(x)).std(axis=0).mean())

    assert 0.5 < spread(activation="selu") < 1.5
    assert spread(activation="sigmoid", batch_norm="none") < 1e-3
    model = built("digits_deep", activation="selu", dropout=0.2)
    dense = [layer for layer in model.layers if isinstance(layer, keras.layers.Dense)]
    assert all(type(layer.kernel_initializer).__name__ == "LecunNormal" for layer in dense[:-1])
    kinds = {type(layer).__name__ for layer in model.layers}
    assert "AlphaDropout" in kinds and not kinds & {"Dropout", "BatchNormalization"}


def test_blocks_add_their_input_as_it_is_or_projected() -> None:
    model = built("digits_blocks", block="residual", blocks=2)
    assert sum(isinstance(layer, keras.layers.Add) for layer in model.layers) == 2
    (projection,) = [layer for layer in model.layers if getattr(layer, "kernel_size", None) == (1, 1)]
    assert projection.strides == (2, 2)


def rates(schedule: str, epochs: int, **params: Any) -> list[float]:
    """The learning rate in each epoch of a training that does not improve."""
    space = shipped("rare_digit")
    named = {"schedule": schedule, "epochs": epochs, "optimizer": "sgd", "sgd_rate": 0.1, **params}
    hp = TracingHyperParameters(default=True, named=named)
    model = space.build(hp)
    seen: list[float] = []
    callbacks = keras.callbacks.CallbackList(space.callbacks(hp), model=model)
    callbacks.on_train_begin()
    for epoch in range(epochs):
        callbacks.on_epoch_begin(epoch)
        seen.append(float(model.optimizer.learning_rate))
        callbacks.on_epoch_end(epoch, {"val_loss": 1.0})
    return seen


def test_learning_rates_follow_their_schedules() -> None:
    assert rates("constant", 20) == pytest.approx([0.1] * 20)
    assert rates("exponential", 20, decay=0.9) == pytest.approx([0.1 * 0.9**epoch for epoch in range(20)], rel=1e-4)
    cosine = rates("cosine", 20)
    assert cosine[:10] == pytest.approx([0.05 * (1 + math.cos(math.pi * at / 20)) for at in range(10)], rel=0.01)
    assert cosine == sorted(cosine, reverse=True) and cosine[-1] < 0.001
    plateau = rates("plateau", 20)
    assert plateau[:4] == pytest.approx([0.1] * 4) and plateau[-1] == pytest.approx(0.1 / 2**6, rel=0.5)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_step_of_training_with_every_choice(space: ModuleType, rows: Dataset) -> None:
    """One value changed at a time: every choice and flag, and places from end to end of every range."""
    x, y = features(space, rows), first(rows.y)
    failed = []

    def step(hp: Any) -> None:
        model = space.build(hp)
        for part in ("callbacks", "class_weight"):
            getattr(space, part, lambda hp: None)(hp)
        model.run_eagerly = True  # to trace a graph for one batch would take longer
        logs = model.train_on_batch(x, y, return_dict=True)
        if not all(np.isfinite(value) for value in logs.values()):
            failed.append((dict(hp.values), logs))

    def noted(hp: Any) -> None:
        try:
            step(hp)
        except Exception as error:  # of which discovery says nothing
            failed.append((dict(hp.values), error))
            raise

    _, is_complete = discover(noted, 500.0)
    assert is_complete and not failed


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

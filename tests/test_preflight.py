"""Preflight: where Keras' value of the objective is another than the scorer's, and objectives that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from search.errors import SpaceError
from search.harness import preflight
from search.scorer.scoring import disagreement_line
from search.shown.report import check_lines
from tests.test_training import Running


def model(last: str, compiled: str, before: str = "") -> str:
    """Source of a build() with one output layer."""
    return (
        "def build(hp):\n"
        f"    model = keras.Sequential([keras.Input((4,)), {before}{last}])\n"
        f"    model.compile('adam', {compiled})\n"
        "    return model"
    )


def found(folder: Path, objective: str, build: str, **parts: str) -> dict[str, Any] | None:
    running = Running(folder, "checked", objective=objective, build=build, **parts)
    disagreement: dict[str, Any] | None = json.loads(json.dumps(preflight.run(running)["disagreement"]))
    return disagreement


BATCH = "keras.layers.BatchNormalization(), keras.layers.Dropout(0.5), "
SOFTMAX, SIGMOID = "keras.layers.Dense(2, activation='softmax')", "keras.layers.Dense(1, activation='sigmoid')"


@pytest.mark.parametrize(
    ("objective", "build"),
    [
        ("val_loss", model(SOFTMAX, "'sparse_categorical_crossentropy'", BATCH)),
        ("val_accuracy", model(SOFTMAX, "'sparse_categorical_crossentropy', metrics=['accuracy']", BATCH)),
        ("val_loss", model("keras.layers.Dense(1)", "keras.losses.BinaryCrossentropy(from_logits=True)")),
        ("val_f1_score", model(SIGMOID, "'binary_crossentropy', metrics=[keras.metrics.F1Score(threshold=0.5)]")),
        # Penalties are part of no metric.
        (
            "val_mse",
            model("keras.layers.Dense(1, kernel_regularizer='l2')", "'mae', metrics=['mse']"),
        ),
    ],
)
def test_plain_models_agree(tmp_path: Path, objective: str, build: str) -> None:
    load = (
        "def load():\n"
        "    x = np.random.default_rng(0).normal(size=(200, 4)).astype('float32')\n"
        "    return Dataset(x, (x[:, :1] > 0).astype('float32'))"
    )
    assert found(tmp_path, objective, build, load=load) is None


def test_a_metric_that_only_keras_knows_is_not_compared(tmp_path: Path) -> None:
    rest = "def own(y, p):\n    return keras.ops.mean(p) + 5.0"
    build = model(SOFTMAX, "'sparse_categorical_crossentropy', metrics=[own]")
    assert found(tmp_path, "val_own", build, rest=rest) is None


@pytest.mark.parametrize(
    ("layer", "before"),
    [
        ("keras.layers.Dense(2, activation='softmax', kernel_regularizer=keras.regularizers.L2(0.5))", ""),
        (SOFTMAX, "keras.layers.ActivityRegularization(l2=0.1), "),
    ],
)
def test_penalties_explain_what_they_add_to_the_loss(tmp_path: Path, layer: str, before: str) -> None:
    running = Running(
        tmp_path, "penalties", objective="val_loss", build=model(layer, "'sparse_categorical_crossentropy'", before)
    )
    disagreement = preflight.run(running)["disagreement"]
    assert disagreement["objective"] == "val_loss"
    assert disagreement["why"] == "because Keras adds the penalties on weights and activations"
    assert disagreement["keras"] - disagreement["scorer"] > 0.01


def test_a_loss_that_penalties_explain_in_part_says_so(tmp_path: Path) -> None:
    """The penalty is there, but the rest of the difference comes from nowhere that preflight knows."""
    running = Running(tmp_path, "in_part", objective="val_loss")
    layer = keras.layers.Dense(2, activation="softmax", kernel_regularizer="l2")
    running.model = keras.Sequential([keras.Input((4,)), layer])
    running.model.compile("adam", "sparse_categorical_crossentropy", loss_weights=[3.0])
    running.model.get_compile_config = lambda: {"loss": "sparse_categorical_crossentropy"}
    why = preflight.run(running)["disagreement"]["why"]
    assert why == "because Keras adds the penalties on weights and activations and for a reason that is not known"


@pytest.mark.parametrize(
    ("objective", "build", "why"),
    [
        (
            "val_loss",
            model(SIGMOID, "keras.losses.BinaryCrossentropy(label_smoothing=0.3)"),
            "because Keras smooths the labels",
        ),
        (
            "val_loss",
            model("keras.layers.Dense(1)", "keras.losses.MeanSquaredError(reduction='sum')"),
            "because Keras adds the rows of a batch up, of which the scorer takes the mean",
        ),
        (
            "val_accuracy",
            model(
                "keras.layers.Dense(1, bias_initializer=keras.initializers.Constant(0.25), kernel_initializer='zeros')",
                "keras.losses.BinaryCrossentropy(from_logits=True), metrics=['accuracy']",
            ),
            "because Keras applies its threshold to logits, which it takes for probabilities",
        ),
        (
            "val_bce",
            model("keras.layers.Dense(1)", "keras.losses.BinaryCrossentropy(from_logits=True), metrics=['bce']"),
            "because Keras takes the logits for probabilities",
        ),
        (
            "val_auc",
            model(SIGMOID, "'binary_crossentropy', metrics=[keras.metrics.AUC(num_thresholds=3, name='auc')]"),
            "because Keras reads the area off 3 thresholds, while the scorer ranks the rows",
        ),
        (
            "val_loss",
            model(SIGMOID, "'binary_crossentropy'").replace("keras.Sequential", "Own"),
            "because the model has a test_step or compute_loss of its own",
        ),
    ],
)
def test_the_reason_is_given_where_one_is_known(tmp_path: Path, objective: str, build: str, why: str) -> None:
    load = (
        "def load():\n"
        "    x = np.random.default_rng(0).normal(size=(200, 4)).astype('float32')\n"
        "    return Dataset(x, (x[:, :1] > 0.5).astype('float32'))"
    )
    rest = (
        "class Own(keras.Sequential):\n"
        "    def compute_loss(self, *args, **kwargs):\n"
        "        return 2.0 * super().compute_loss(*args, **kwargs)"
    )
    disagreement = found(tmp_path, objective, build, load=load, rest=rest)
    assert disagreement is not None and disagreement["why"] == why


def test_the_line_has_both_numbers_the_reason_and_which_of_them_drives_what() -> None:
    assert disagreement_line({"disagreement": None}) is disagreement_line({}) is None
    differing = {"objective": "val_loss", "keras": 1.25, "scorer": 0.75, "why": "because of this"}
    assert disagreement_line({"disagreement": differing}) == (
        "val_loss on one batch is 1.25 by Keras and 0.75 by the scorer, because of this; trials are compared, and "
        "the winner chosen, by the scorer's value, while the epoch within a trial is chosen by Keras'"
    )


def test_check_tells_a_disagreement_once() -> None:
    told = {
        "name": "tiny", "objective": "val_loss", "direction": "min", "size": 10, "complete": True, "space": {},
        "notes": [], "sanity": None, "openings": 0,
        "data": {"rows": 4, "tiers": {"train": 4}, "warnings": []}, "reported": ["val_loss"], "shows": None,
        "trials": 1, "epochs": 1, "slots": 1, "epoch_seconds": 1.0, "estimate_seconds": 1.0,
        "confirmation": {"runs": 0, "finalists": 0, "seeds": 0},
    }  # fmt: skip
    agreed = check_lines(told | {"disagreement": None})
    differing = {"objective": "val_loss", "keras": 2.0, "scorer": 1.0, "why": "for a reason that is not known"}
    lines = check_lines(told | {"disagreement": differing})
    assert [line for line in lines if line not in agreed] == [f"note: {disagreement_line({'disagreement': differing})}"]


@pytest.mark.parametrize("name", ["accuracy", "loss"])
def test_a_value_on_train_rows_is_refused_with_what_to_write(tmp_path: Path, name: str) -> None:
    running = Running(tmp_path, "on_train", objective=name)
    with pytest.raises(SpaceError) as caught:
        preflight.run(running)
    assert f'{name!r} is the value on train rows; write `objective = "val_{name}"`' in str(caught.value)


@pytest.mark.parametrize("metric", ["keras.metrics.AUC(name='auc')", "keras.metrics.AUC(name='auc', curve='PR')"])
def test_a_batch_of_one_class_is_no_reason_to_refuse_a_ranking_metric(tmp_path: Path, metric: str) -> None:
    """With rare positives most batches have none; the score is taken over all validation rows."""
    load = (
        "def load():\n"
        "    x = np.random.default_rng(0).normal(size=(1000, 4)).astype('float32')\n"
        "    return Dataset(x, (np.arange(1000) % 50 == 49).astype('float32'))"
    )
    running = Running(
        tmp_path, "rare", objective="val_auc", load=load, build=model(SIGMOID, f"'bce', metrics=[{metric}]")
    )
    assert not np.any(running.rows.labels("train", np.arange(32)))
    assert preflight.run(running)["disagreement"] is None

"""Sanity before search: sound models pass, and each mistake is told from the others by its likely cause."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from search.checks import diagnosis, sanity
from search.checks.findings import failed, lines
from tests.conftest import Heldout
from tests.test_training import Running
from tests.tiny import PARTS, write_space

SPARSE = "'sparse_categorical_crossentropy', metrics=['accuracy']"
HIDDEN, SOFTMAX = "keras.layers.Dense(32, 'relu'), ", "keras.layers.Dense(2, 'softmax')"


def build(layers: str, compiled: str, more: str = "") -> str:
    return (
        f"def build(hp):\n    model = keras.Sequential([keras.Input((4,)), {layers}])\n{more}"
        f"    model.compile({compiled})\n    return model"
    )


def values(of: str) -> dict[str, str]:
    """Rows whose label is a value."""
    return {
        "objective": 'objective = "val_mse"',
        "load": PARTS["load"].replace("(x[:, 0] + x[:, 1] > 0).astype('int64')", of),
    }


def found(folder: Path, **parts: str) -> dict[str, dict[str, Any]]:
    """Findings by the name of their check, as they come through JSON."""
    keras.utils.clear_session()
    running = Running(folder, "subject", **parts)
    return {one["check"]: one for one in json.loads(json.dumps(sanity.run(running)))}


def test_a_sound_model_passes_whatever_it_does_in_training_only(tmp_path: Path) -> None:
    """Dropout, noise and BatchNormalization, whose averages lag, keep no model from learning by heart."""
    layers = (
        "keras.layers.GaussianNoise(0.5), keras.layers.Dense(64), keras.layers.BatchNormalization(), "
        f"keras.layers.Activation('relu'), keras.layers.Dropout(0.7), {SOFTMAX}"
    )
    all_ = found(tmp_path, build=build(layers, f"keras.optimizers.Adam(1e-2), {SPARSE}"))
    assert [(name, one["passed"]) for name, one in all_.items()] == [
        ("last layer", True),
        ("initial loss", True),
        ("32 rows", True),
    ], all_
    assert "ln 2 = 0.6931" in all_["initial loss"]["says"] and not failed(list(all_.values()))


def test_a_sound_regression_passes(tmp_path: Path) -> None:
    model = build(f"{HIDDEN}keras.layers.Dense(1)", "'adam', 'mse'")
    all_ = found(tmp_path, **values("x[:, 0] - x[:, 1]"), build=model)
    assert all(one["passed"] for one in all_.values()), all_
    assert "the variance of the target" in all_["initial loss"]["says"]


WRONG: dict[str, tuple[str, dict[str, str], str, str]] = {
    "softmax twice": (
        "32 rows",
        {
            "build": build(
                HIDDEN + SOFTMAX,
                "'adam', keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=['accuracy']",
            )
        },
        "ends in softmax, and its loss, told from_logits=True, applies one more",
        "leave out from_logits=True",
    ),
    "no softmax": (
        "last layer",
        {"build": build(f"{HIDDEN}keras.layers.Dense(2)", f"'adam', {SPARSE}")},
        "ends in linear, but its loss takes it for probabilities",
        "activation='softmax'",
    ),
    "unscaled": (
        "initial loss",
        {
            "load": PARTS["load"].replace("return Dataset(x,", "return Dataset(x * 300 + 1000,"),
            "build": build(HIDDEN + SOFTMAX, f"'adam', {SPARSE}"),
        },
        "scaled to mean 0 and variance 1, the same model passes",
        "Normalization layer adapted on train.x",
    ),
    "too fast": (
        "32 rows",
        values("x[:, 0] - x[:, 1]")
        | {"build": build(f"{HIDDEN}keras.layers.Dense(1)", "keras.optimizers.SGD(30.0), 'mse'")},
        "the learning rate of SGD, 30, is too large",
        "downwards",
    ),
    "too slow": (
        "32 rows",
        {"build": build(HIDDEN + SOFTMAX, f"keras.optimizers.SGD(1e-6), {SPARSE}")},
        "the learning rate of SGD, 1e-06, is too small",
        "upwards",
    ),
    "frozen": (
        "32 rows",
        {"build": build(HIDDEN + SOFTMAX, f"'adam', {SPARSE}", "    model.trainable = False\n")},
        "no weight of the model is trainable",
        "trainable=True",
    ),
    "dead": (
        "32 rows",
        {
            "build": build(
                "keras.layers.Dense(32, 'relu', bias_initializer=keras.initializers.Constant(-50.0)), " + SOFTMAX,
                f"'adam', {SPARSE}",
            )
        },
        "(dead ReLUs)",
        "he_normal",
    ),
    "penalty": (
        "32 rows",
        {
            "build": build(
                "keras.layers.Dense(32, 'relu', kernel_regularizer=keras.regularizers.L2(10.0)), " + SOFTMAX,
                f"'adam', {SPARSE}",
            )
        },
        "penalties on weights and activations add",
        "kernel_regularizer",
    ),
    "offset": (
        "initial loss",
        values("x[:, 0] * 5 + 1000") | {"build": build(f"{HIDDEN}keras.layers.Dense(1)", "'adam', 'mse'")},
        "the target has mean 1000",
        "Rescaling(",
    ),
    "range": (
        "last layer",
        values("x[:, 0] * 5") | {"build": build(f"{HIDDEN}keras.layers.Dense(1, 'sigmoid')", "'adam', 'mse'")},
        "ends in sigmoid, so it is never outside 0 to 1, but its target goes from",
        "leave out the activation of the last layer",
    ),
    "linear": (
        "32 rows",
        {
            "load": PARTS["load"].replace("x[:, 0] + x[:, 1] > 0", "x[:, 0] * x[:, 1] > 0"),
            "build": build(SOFTMAX, f"'adam', {SPARSE}"),
        },
        "the default model has 10 weights in 1 layer",
        "nothing is wrong",
    ),
    "one class": (
        "initial loss",
        {
            "load": PARTS["load"].replace("(x[:, 0] + x[:, 1] > 0)", "np.zeros(200)"),
            "build": build(HIDDEN + SOFTMAX, f"'adam', {SPARSE}"),
        },
        "all labels that were looked at are the same",
        "load()",
    ),
}


SLOW = {"linear", "one class"}  # every change is tried, and none helps


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in sorted(WRONG)]
)
@pytest.mark.filterwarnings("ignore:.*received `from_logits=True`")
def test_each_mistake_is_found_and_told_by_its_cause(tmp_path: Path, case: str) -> None:
    check, parts, cause, fix = WRONG[case]
    one = found(tmp_path, **parts)[check]
    assert one["passed"] is False, one
    assert cause in one["cause"] and fix in one["fix"], one


@pytest.mark.slow
def test_gradients_that_vanish(tmp_path: Path) -> None:
    layers = f"*[keras.layers.Dense(32, 'sigmoid') for _ in range(12)], {SOFTMAX}"
    one = found(tmp_path, build=build(layers, f"'adam', {SPARSE}"))["32 rows"]
    assert one["passed"] is False and "12 layers of sigmoid" in one["cause"] and "BatchNormalization" in one["fix"]


def test_a_loss_that_only_keras_knows_is_not_judged(tmp_path: Path) -> None:
    own = "def own(y, p):\n    return keras.ops.mean((keras.ops.cast(y, 'float32') - p[:, 0]) ** 2)"
    all_ = found(tmp_path, build=build(HIDDEN + SOFTMAX, "'adam', own, metrics=['accuracy']"), rest=own)
    assert {name: one["passed"] for name, one in all_.items()} == dict.fromkeys(all_), all_
    assert "only Keras knows" in all_["initial loss"]["says"] and "it goes from" in all_["32 rows"]["says"]


def test_the_rows_to_be_learned_are_of_every_class_and_none_comes_twice(tmp_path: Path) -> None:
    load = (
        "def load():\n"
        "    rng = np.random.default_rng(0)\n"
        "    x = rng.normal(size=(2000, 4)).astype('float32')\n"
        "    x[:1000] = x[rng.integers(0, 40, 1000)]\n"
        "    return Dataset(x, np.arange(2000) % 20 == 0)"
    )
    model = build("keras.layers.Dense(1, 'sigmoid')", "'adam', 'binary_crossentropy', metrics=['accuracy']")
    x, y = sanity._Subject(Running(tmp_path, "rare", load=load, build=model))._few()
    assert len(np.unique(x, axis=0)) == len(x) == 32
    assert 8 <= y.sum() <= 24


def test_what_a_model_ends_in_is_read_through_what_only_passes_on() -> None:
    x = keras.Input((4,))
    inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Softmax()])
    out = keras.layers.Reshape((1, 3))(keras.layers.Activation("linear", dtype="float32")(inner(x)))
    assert diagnosis.last_layers(keras.Model(x, out)) == ["softmax"]
    assert diagnosis.last_layers(keras.Model(x, keras.ops.sigmoid(keras.layers.Dense(1)(x)))) == ["sigmoid"]
    assert diagnosis.last_layers(keras.Model(x, [keras.layers.Dense(1, "relu")(x), x])) == ["relu", None]


def test_findings_in_words() -> None:
    shown = lines([
        {"check": "initial loss", "passed": True, "says": "2.3", "cause": None, "fix": None},
        {"check": "32 rows", "passed": False, "says": "stuck", "cause": "frozen", "fix": "thaw"},
        {"check": "last layer", "passed": None, "says": "hidden", "cause": None, "fix": None},
    ])  # fmt: skip
    assert [line.split() for line in shown[1:3]] == [
        ["ok", "initial", "loss:", "2.3"],
        ["FAILED", "32", "rows:", "stuck"],
    ]
    assert shown[3].strip() == "likely cause: frozen" and shown[4].strip() == "change: thaw"
    assert shown[5].split()[:2] == ["not", "checked"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command_says_it_all_and_records_nothing(tmp_path: Path, heldout: Heldout) -> None:
    where = ("--workspace", str(tmp_path / "ws"), "--trials", "10")
    good = heldout("check", write_space(tmp_path, "good"), "--sanity", "--json", *where)
    told = json.loads(good.stdout)["sanity"]
    assert good.returncode == 0, good.stdout + good.stderr
    names = ["last layer", "initial loss", "32 rows", "preprocessing", "cost"]
    assert [one["check"] for one in told["findings"]] == names and all(one["passed"] for one in told["findings"])
    assert told["cost"]["seconds"] > 0 and told["cost"]["disk"] > 0 and told["cost"]["memory_per_slot"] > 1 << 20

    wrong = write_space(tmp_path, "wrong", build=WRONG["frozen"][1]["build"])
    bad = heldout("check", wrong, "--sanity", *where)
    assert bad.returncode == 1 and "FAILED" in bad.stdout and "no weight of the model is trainable" in bad.stdout
    assert "Traceback" not in bad.stderr
    assert list((tmp_path / "ws" / "studies").iterdir()) == [] and not (tmp_path / "ws" / "mlflow.db").exists()

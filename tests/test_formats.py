"""Files that a model is exported as: each is run, and must predict what the model does."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.errors import RequestError
from search.exports import formats
from search.harness import training, worker
from tests.test_training import Running

# A layer of each kind that export has gone wrong with: one that Keras exports as in training (augmentation), one with
# statistics, one with a state, and weights that must be exact.
PICTURES = (
    "def load():\n"
    "    rng = np.random.default_rng(0)\n"
    "    return Dataset(rng.normal(size=(200, 6, 6, 1)).astype('float32'), np.arange(200) % 2)"
)
AUGMENTED = (
    "def build(hp):\n"
    "    model = keras.Sequential([keras.Input((6, 6, 1)), keras.layers.RandomFlip(),\n"
    "                              keras.layers.RandomRotation(0.5),\n"
    "                              keras.layers.Conv2D(3, 3), keras.layers.BatchNormalization(),\n"
    "                              keras.layers.Flatten(), keras.layers.Dropout(0.5), keras.layers.Dense(2)])\n"
    "    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)\n"
    "    model.compile('adam', loss, metrics=['accuracy'])\n"
    "    return model"
)
# Names whose order is not that of the inputs, float64 rows for a float32 model, one column for a flat array.
SEVERAL = {
    "load": (
        "def load():\n"
        "    rng = np.random.default_rng(0)\n"
        "    x = {'wide': rng.normal(size=(200, 3)), 'deep': rng.normal(size=200), 'kind': rng.integers(0, 5, 200)}\n"
        "    return Dataset(x, {'b': rng.normal(size=200), 'a': rng.normal(size=200)})"
    ),
    "build": (
        "def build(hp):\n"
        "    wide, deep = keras.Input((3,), name='wide'), keras.Input((1,), name='deep')\n"
        "    kind = keras.Input((1,), name='kind', dtype='int64')\n"
        "    known = keras.layers.Flatten()(keras.layers.Embedding(5, 2)(kind))\n"
        "    joined = keras.layers.Concatenate()([wide, deep, known])\n"
        "    out = {'b': keras.layers.Dense(1, name='b')(joined), 'a': keras.layers.Dense(1, name='a')(deep)}\n"
        "    model = keras.Model({'wide': wide, 'deep': deep, 'kind': kind}, out)\n"
        "    model.compile('adam', {'b': 'mse', 'a': 'mse'})\n"
        "    return model"
    ),
    "objective": "objective = 'val_loss'\nepochs = 2",
}
TEXTS = {
    "load": (
        "def load():\n"
        "    x = np.array([f'{word} film {n}' for n in range(100) for word in ('good', 'bad')])\n"
        "    return Dataset(x, np.arange(200) % 2)"
    ),
    "build": (
        "def build(hp):\n"
        "    words = keras.layers.TextVectorization(vocabulary=['good', 'bad'], output_sequence_length=3)\n"
        "    model = keras.Sequential([keras.Input((), dtype='string'), words, keras.layers.Embedding(4, 2),\n"
        "                              keras.layers.Flatten(), keras.layers.Dense(2, activation='softmax')])\n"
        "    model.compile('adam', 'sparse_categorical_crossentropy', metrics=['accuracy'])\n"
        "    return model"
    ),
}


def converted(folder: Path, format: str, **parts: str) -> dict[str, Any]:
    """What the job says of a model that was written and then converted; its ``.keras`` file is ``m.keras``."""
    folder.mkdir(exist_ok=True)
    running = Running(folder, "space", **parts)
    training.save(training.compose(running.model, None, running.rows.manifest["x"]), folder / "m.keras")
    asked = {"problem": running.module.problem.to_json(), "custom": [], "rows": str(running.rows.path)}
    asked |= {"path": str(folder / "m.keras"), "format": format, "out": str(folder / formats.FILES[format])}
    found: dict[str, Any] = worker.convert(asked, lambda body: None)["checked"]
    return found


@pytest.mark.parametrize("format", ["saved_model", "onnx", "litert"])
def test_a_file_predicts_what_the_model_predicts(tmp_path: Path, format: str) -> None:
    found = converted(tmp_path, format)
    assert found["rows"] == formats.ROWS and 0 <= found["largest_difference"] <= formats.TOLERANCE


@pytest.mark.parametrize("format", ["saved_model", "onnx", "litert"])
@pytest.mark.slow
def test_augmentation_is_off_in_every_file(tmp_path: Path, format: str) -> None:
    found = converted(tmp_path, format, load=PICTURES, build=AUGMENTED)
    assert found["largest_difference"] <= formats.TOLERANCE


def test_augmentation_is_off_in_a_saved_model_though_keras_leaves_it_on(tmp_path: Path) -> None:
    assert converted(tmp_path, "saved_model", load=PICTURES, build=AUGMENTED)["rows"] == formats.ROWS
    # What there is to take care of: as Keras writes it, each call turns the picture another way.
    keras.models.load_model(tmp_path / "m.keras").export(str(tmp_path / "plain"), verbose=False)
    model = keras.models.load_model(tmp_path / "m.keras")
    rows = np.random.default_rng(0).normal(size=(32, 6, 6, 1)).astype("float32")
    with pytest.raises(RequestError, match="plain must predict what the model predicts, but on 32 rows it is off by"):
        got = formats.predict(model, tmp_path / "plain", "saved_model", rows)
        formats.checked(training.predict(model, rows), got, "plain")


@pytest.mark.slow
@pytest.mark.parametrize("format", ["saved_model", "onnx", "litert"])
def test_several_inputs_and_outputs_keep_their_names_apart(tmp_path: Path, format: str) -> None:
    assert converted(tmp_path, format, **SEVERAL)["largest_difference"] <= formats.TOLERANCE


@pytest.mark.slow
def test_text_is_for_tensorflow_alone_and_says_so(tmp_path: Path) -> None:
    assert converted(tmp_path, "saved_model", **TEXTS)["largest_difference"] == 0.0
    with pytest.raises(RequestError, match="must be one that (runs as onnx|Keras can write as onnx)"):
        converted(tmp_path / "again", "onnx", **TEXTS)


CUSTOM = (
    "@keras.saving.register_keras_serializable('forgetful')\n"
    "class Scale(keras.layers.Layer):\n"
    "    def __init__(self, by=1.0, **kwargs):\n"
    "        super().__init__(**kwargs)\n"
    "        self.by = by\n\n"
    "    def call(self, x):\n"
    "        return self.by * x\n\n"
    "    def get_config(self):\n"
    "        return super().get_config()\n\n\n"  # without `by`, which is not in the file then
    "def build(hp):\n"
    "    model = keras.Sequential([keras.Input((4,)), Scale(3.0), keras.layers.Dense(2, activation='softmax')])\n"
    "    model.compile('adam', 'sparse_categorical_crossentropy', metrics=['accuracy'])\n"
    "    return model"
)


def test_a_keras_file_that_forgets_a_setting_is_refused(tmp_path: Path) -> None:
    running = Running(tmp_path, "forgetful", build=CUSTOM)
    path = tmp_path / "model.keras"
    composed = training.compose(running.model, None, running.rows.manifest["x"])
    training.save(composed, path)
    with pytest.raises(RequestError, match="model.keras must predict what the model predicts, but on 32 rows"):
        formats.read_again(composed, path, running.rows)


FLOATS = st.floats(-1e3, 1e3, width=32)


@given(st.lists(FLOATS, min_size=1, max_size=8), FLOATS, st.integers(0, 7))
def test_a_difference_is_allowed_up_to_the_tolerance_and_not_beyond(values: list[float], off: float, at: int) -> None:
    one = np.array(values, dtype=np.float32)
    other = one.astype(np.float64)
    other[at % len(one)] += off
    allowed = abs(off) <= formats.TOLERANCE * max(1.0, abs(float(one[at % len(one)])))
    if abs(abs(off) / max(1.0, abs(float(one[at % len(one)]))) - formats.TOLERANCE) < 1e-9:
        return  # on the border, where rounding decides
    if allowed:
        assert formats.checked([one], [other], "f")["rows"] == len(one)
    else:
        with pytest.raises(RequestError, match="f must predict what the model predicts"):
            formats.checked([one], [other], "f")


def test_nan_is_nothing_but_nan() -> None:
    nan, one = np.array([[np.nan, 1.0]]), np.array([[1.0, 1.0]])
    assert formats.checked([nan], [nan.copy()], "f") == {"rows": 1, "largest_difference": 0.0}
    for pair in ((nan, one), (one, nan), (one, np.array([[np.inf, 1.0]]))):
        with pytest.raises(RequestError, match="off by up to inf"):
            formats.checked([pair[0]], [pair[1]], "f")


def test_other_outputs_are_no_predictions_of_the_model() -> None:
    with pytest.raises(RequestError, match=r"must predict arrays of shapes \[\(2, 3\)\].*but predicts \[\(2, 1\)\]"):
        formats.checked([np.zeros((2, 3))], [np.zeros((2, 1))], "f")


def test_what_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else real(name))
    with pytest.raises(RequestError, match=r"needs onnxruntime, which must be .*: pip install 'heldout\[onnx\]'"):
        formats.check_installed("onnx")
    formats.check_installed("keras")
    with pytest.raises(RequestError, match="--format must be one of keras, saved_model, onnx, litert, but got 'h5'"):
        formats.check_installed("h5")


def test_every_format_is_offered_on_the_command_line() -> None:
    from search.cli import main

    (option,) = [one for one in main.commands["export"].params if one.name == "format_"]
    assert list(option.type.choices) == list(formats.FILES)  # type: ignore[attr-defined]

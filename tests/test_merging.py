"""The merged model: plain Keras loads it, it takes what its members take, and says what ``blending`` says they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from search.ensembles import blending, merging
from search.ensembles.blending import SIGMOID, SOFTMAX, VALUES
from search.errors import RequestError
from search.harness import training

WEIGHTS = (0.6, 0.4)


def written(models: list[keras.Model], folder: Path, read: list[list[str]]) -> list[dict[str, Any]]:
    """Members as the worker is given them."""
    members = []
    for number, (model, scales) in enumerate(zip(models, read, strict=True)):
        path = folder / f"{number}.keras"
        model.save(path)
        members.append({"trial": number, "path": str(path), "weight": WEIGHTS[number], "read": scales})
    return members


def loaded(members: list[dict[str, Any]], scales: list[str], folder: Path) -> keras.Model:
    model = merging.merged(members, scales)
    training.save(model, folder / "ensemble.keras")
    return keras.models.load_model(folder / "ensemble.keras", compile=False)


def dense(units: int, activation: str | None = None, seed: int = 0, width: int = 3) -> keras.Model:
    start = keras.initializers.RandomNormal(stddev=2.0, seed=seed)
    layer = keras.layers.Dense(units, activation, kernel_initializer=start, name="last")
    return keras.Sequential([keras.Input((width,), name="x"), layer])


@pytest.mark.parametrize(
    ("activations", "read", "wanted"),
    [
        ((None, None), (VALUES, VALUES), VALUES),
        (("softmax", "softmax"), (VALUES, VALUES), VALUES),
        ((None, None), (SOFTMAX, SOFTMAX), SOFTMAX),
        ((None, "softmax"), (SOFTMAX, VALUES), VALUES),
        ((None, "softmax"), (SOFTMAX, VALUES), SOFTMAX),
        ((None, None), (SIGMOID, SIGMOID), SIGMOID),
        ((None, "sigmoid"), (SIGMOID, VALUES), SIGMOID),
        (("sigmoid", None), (VALUES, SIGMOID), VALUES),
    ],
)
def test_a_merged_model_says_what_the_blend_says(
    tmp_path: Path, activations: tuple[Any, ...], read: tuple[str, ...], wanted: str
) -> None:
    models = [dense(4, activation, seed) for seed, activation in enumerate(activations)]
    x = np.random.default_rng(0).normal(size=(20, 3)).astype("float32")
    found = loaded(written(models, tmp_path, [[scale] for scale in read]), [wanted], tmp_path)
    outputs = [model.predict(x, verbose=0) for model in models]
    expected = blending.average(outputs, np.array(WEIGHTS), read, wanted)
    assert found.predict(x, verbose=0) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert found.input_shape == models[0].input_shape and found.output_shape == models[0].output_shape
    assert found.output_names == ["last"] and [given.name for given in found.inputs] == ["x"]


def wide(seed: int, as_dict: bool) -> keras.Model:
    """Two inputs by name, two outputs; an output is called as an input is."""
    start = keras.initializers.RandomNormal(seed=seed)
    given = {"codes": keras.Input((2,), dtype="int32", name="codes"), "sizes": keras.Input((3,), name="sizes")}
    codes = keras.layers.Flatten()(keras.layers.Embedding(5, 2, embeddings_initializer=start)(given["codes"]))
    together = keras.layers.Concatenate()([codes, given["sizes"]])
    sold = keras.layers.Dense(1, None, kernel_initializer=start, name="sold")(together)
    price = keras.layers.Dense(1, kernel_initializer=start, name="price")(together)
    return keras.Model(given, {"sold": sold, "sizes": price} if as_dict else [sold, price])


@pytest.mark.parametrize("as_dict", [True, False])
def test_several_inputs_and_outputs_keep_their_names_and_their_structure(tmp_path: Path, as_dict: bool) -> None:
    models = [wide(seed, as_dict) for seed in (0, 1)]
    rng = np.random.default_rng(0)
    x = {"codes": rng.integers(0, 5, (9, 2)), "sizes": rng.normal(size=(9, 3)).astype("float32")}
    scales = [VALUES, SIGMOID] if as_dict else [SIGMOID, VALUES]  # of "sizes" and "sold", by their names' order
    found = loaded(written(models, tmp_path, [scales] * 2), scales, tmp_path).predict(x, verbose=0)
    outputs = [training.predict(model, x) for model in models]
    got = [found["sizes"], found["sold"]] if as_dict else list(found)
    assert isinstance(found, dict) == as_dict
    for at, scale in enumerate(scales):
        expected = blending.average([out[at] for out in outputs], np.array(WEIGHTS), [scale] * 2, scale)
        assert got[at] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_one_model_alone_is_itself(tmp_path: Path) -> None:
    model, x = dense(2), np.ones((3, 3), "float32")
    (member,) = written([model], tmp_path, [[VALUES]])
    found = loaded([member | {"weight": 1.0}], [VALUES], tmp_path)
    assert found.predict(x, verbose=0) == pytest.approx(model.predict(x, verbose=0))


def test_members_with_other_inputs_are_refused_by_their_trials(tmp_path: Path) -> None:
    members = written([dense(2), dense(2, width=4)], tmp_path, [[VALUES]] * 2)
    with pytest.raises(RequestError, match="inputs and outputs in common, but trial 1 has .*4.* and trial 0 has"):
        merging.merged(members, [VALUES])

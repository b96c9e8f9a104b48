"""Backbones in discovery: how often they are made, and that what is asked for is the same as without sparing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from search.definition import backbones, tracing
from search.definition.problem import find
from search.definition.space import Space
from search.harness.worker import discover
from tests.tiny import write_space

MADE: list[str] = []


@keras.saving.register_keras_serializable("test_backbones")
class Counted(keras.layers.Dense):
    """Tells when it is made, and when it is given weights."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        MADE.append("made")
        super().__init__(*args, **kwargs)

    def load_own_variables(self, store: Any) -> None:
        MADE.append("read")
        super().load_own_variables(store)


@pytest.fixture
def saved(tmp_path: Path) -> str:
    inputs = keras.Input((4,))
    model = keras.Model(inputs, Counted(3)(keras.layers.Dense(5)(inputs)))
    model.save(tmp_path / "backbone.keras")
    model.save_weights(tmp_path / "backbone.weights.h5")
    MADE.clear()
    return str(tmp_path / "backbone.keras")


def head(hp: Any, backbone: Any) -> keras.Model:
    """Eleven builds: one by the defaults, and one for each other value that is worth it."""
    x = backbone.output
    if hp.Boolean("hidden"):
        x = keras.layers.Dense(hp.Choice("units", [4, 8, 16]))(x)
    rate = hp.Choice("rate", [0.1, 0.2, 0.3])
    x = keras.layers.Dropout(rate)(x)
    backbone.trainable = hp.Boolean("tuned")
    hp.Int("batch_size", 8, 48, step=8)
    return keras.Model(backbone.input, keras.layers.Dense(hp.Int("out", 2, 4))(x))


def found(build: Callable[[Any], Any]) -> tuple[set[str], int]:
    """The parameters that discovery finds, and how often it built."""
    builds = []
    space, complete = tracing.discover(lambda hp: (builds.append(1), build(hp))[1], 60.0)
    assert complete
    return set(Space.from_json(space).parameters), len(builds)


def test_a_saved_backbone_is_read_once_however_often_the_space_is_built(saved: str) -> None:
    def build(hp: Any) -> keras.Model:
        return head(hp, keras.models.load_model(saved))

    plain, builds = found(build)
    assert builds > 10 and MADE.count("made") == MADE.count("read") == builds
    MADE.clear()
    with backbones.made_once() as memory:
        assert found(backbones.building(build, memory)) == (plain, builds)
    assert MADE == ["made", "read"] and memory.used == builds - 1


def test_a_model_that_a_build_changes_is_made_anew_for_the_next(saved: str) -> None:
    depths: list[int] = []
    stacked = saved.replace("backbone", "stack")
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2)]).save(stacked)

    def build(hp: Any) -> keras.Model:
        model = keras.models.load_model(stacked)
        depths.append(len(model.layers))
        model.pop()
        model.add(keras.layers.Dense(hp.Int("units", 2, 5)))
        model.add(keras.layers.Dense(hp.Int("more", 2, 5)))
        return model

    with backbones.made_once() as memory:
        assert found(backbones.building(build, memory))[0] == {"units", "more"}
    assert set(depths) == {2}


def test_a_build_that_fails_on_a_model_it_had_before_gets_a_new_one(saved: str) -> None:
    def build(hp: Any) -> keras.Model:
        backbone = keras.models.load_model(saved)
        if getattr(backbone, "is_used", False):
            raise ValueError("it has been here before")
        backbone.is_used = True
        return head(hp, backbone)

    plain, builds = found(lambda hp: head(hp, keras.models.load_model(saved)))
    MADE.clear()
    with backbones.made_once() as memory:
        parameters, tried = found(backbones.building(build, memory))
    assert (parameters, tried) == (plain, builds)
    assert MADE.count("made") == builds


def test_an_error_of_the_module_is_its_own(saved: str) -> None:
    def build(hp: Any) -> keras.Model:
        keras.models.load_model(saved)
        raise ValueError("mine")

    with backbones.made_once() as memory, pytest.raises(ValueError, match="mine"):
        found(backbones.building(build, memory))
    assert MADE.count("made") == 1


def test_models_of_keras_applications_are_made_once_for_each_set_of_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def MobileNet(**kwargs: Any) -> keras.Model:
        calls.append(kwargs)
        inputs = keras.Input((4,))
        return keras.Model(inputs, keras.layers.Dense(3)(inputs))

    monkeypatch.setattr(keras.applications, "MobileNet", MobileNet)

    def build(hp: Any) -> keras.Model:
        width = hp.Choice("width", [0.5, 1.0])
        return head(hp, keras.applications.MobileNet(alpha=width, weights=None, input_shape=[4]))

    _, builds = found(build)
    assert len(calls) == builds
    calls.clear()
    with backbones.made_once() as memory:
        found(backbones.building(build, memory))
        given = keras.Input((4,))
        for _ in range(2):  # a tensor is another one each time
            keras.applications.MobileNet(input_tensor=given)
    assert [call.get("alpha") for call in calls] == [0.5, 1.0, None, None]
    assert keras.applications.MobileNet is MobileNet


def test_weights_are_not_read_and_all_is_as_before_afterwards(saved: str) -> None:
    before = keras.Model.load_weights, keras.models.load_model, keras.saving.load_model
    inputs = keras.Input((4,))
    model = keras.Model(inputs, Counted(3)(keras.layers.Dense(5)(inputs)))
    weights = model.get_weights()
    with backbones.made_once():
        model.load_weights(saved.replace(".keras", ".weights.h5"))
        assert all(np.array_equal(a, b) for a, b in zip(weights, model.get_weights(), strict=True))
        assert keras.models.load_model(saved) is keras.models.load_model(saved)
    assert before == (keras.Model.load_weights, keras.models.load_model, keras.saving.load_model)
    model.load_weights(saved.replace(".keras", ".weights.h5"))
    assert not np.array_equal(weights[0], model.get_weights()[0])


def test_the_discover_job_spares_what_the_module_imported_by_name(saved: str, tmp_path: Path) -> None:
    space = write_space(
        tmp_path,
        "spared",
        imports="import keras\nfrom keras.models import load_model\n\nimport tests.test_backbones as counted\n"
        "from search import Dataset",
        build=f"def build(hp):\n    return counted.head(hp, load_model({saved!r}))",
    )
    MADE.clear()
    result = discover({"problem": find(space).to_json(), "seconds": 60.0}, lambda body: None)
    assert result["complete"] and {"units", "out"} <= set(Space.from_json(result["space"]).parameters)
    assert MADE == ["made", "read"]

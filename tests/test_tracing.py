"""Tests of the hp that space modules are handed, against KerasTuner's own behaviour."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from typing import Any

import keras_tuner
import numpy as np
import pytest

from search.definition.space import Space
from search.definition.tracing import TracingHyperParameters, discover
from search.errors import SpaceError

Build = Callable[[Any], Any]


def found(build: Build, seconds: float = 30.0) -> Space:
    raw, complete = discover(build, seconds)
    assert complete
    return Space.from_json(json.loads(json.dumps(raw)))


def defaults(build: Build) -> TracingHyperParameters:
    hp = TracingHyperParameters(None, 0, default=True)
    build(hp)
    return hp


def first(asks: list[Any]) -> dict[str, Any]:
    return dict(asks[0])


def test_it_is_a_kerastuner_object_that_starts_empty() -> None:
    hp = TracingHyperParameters({"anything": 3}, 0)
    assert isinstance(hp, keras_tuner.HyperParameters)
    assert hp.values == {} and hp.space == [] and hp.asks == []


def everything(hp: Any) -> list[Any]:
    return [
        hp.Int("a", 6, 13, step=3),
        hp.Int("b", 2, 32, step=2, sampling="log", default=8),
        hp.Int("c", 1, 1000, sampling="log"),
        hp.Float("d", 0.001, 10, step=10, sampling="log"),
        hp.Float("e", 0, 1),
        hp.Float("f", 1e-4, 1e-1, sampling="reverse_log", default=1e-2),
        hp.Choice("g", ["x", "y"]),
        hp.Choice("h", [1, 2], default=2),
        hp.Choice("i", [True, False]),
        hp.Choice("j", [0.5, 1.5], ordered=False),
        hp.Boolean("k"),
        hp.Boolean("l", default=True),
        hp.Fixed("m", "fixed"),
        hp.Int("n", 5, 5),
    ]


def test_the_defaults_are_kerastuners() -> None:
    stock = keras_tuner.HyperParameters()
    expected = everything(stock)
    hp = TracingHyperParameters(None, 0, default=True)
    values = everything(hp)
    assert values == expected
    assert hp.values == stock.values
    assert [type(value) for value in values] == [type(value) for value in expected]
    assert [ask["name"] for ask in hp.asks] == list("abcdefghijklmn")


def test_drawn_values_are_some_that_kerastuner_would_draw() -> None:
    stock = keras_tuner.HyperParameters()
    everything(stock)
    for seed in range(30):
        hp = TracingHyperParameters(None, seed)
        everything(hp)
        for declared in stock.space:
            value = hp.values[declared.name]
            assert type(value) in (bool, int, float, str)
            if getattr(declared, "step", None) is not None or isinstance(declared.default, bool | str):
                assert any(value == pytest.approx(other) for other in declared.values)
            elif hasattr(declared, "min_value"):
                assert declared.min_value <= value <= declared.max_value


def test_numpy_arguments_give_python_values() -> None:
    hp = TracingHyperParameters(None, 0, default=True)
    values = [
        hp.Int("a", np.int64(1), np.int64(9), default=np.int64(3)),
        hp.Float("b", np.float32(0.5), np.float32(1.5), default=np.float64(0.75)),
        hp.Choice("c", [np.float64(0.5), np.float64(1.5)]),
        hp.Choice("d", list(np.array(["x", "y"]))),
        hp.Fixed("e", np.float64(2.5)),
    ]
    assert [type(value) for value in values] == [int, float, float, str, float]
    assert json.loads(json.dumps(hp.asks)) == hp.asks


# What stock KerasTuner does with values filled in beforehand, and we do not.


def test_an_impossible_proposal_is_not_used() -> None:
    stock = keras_tuner.HyperParameters()
    stock.values = {"units": 9999, "fixed": 1}
    assert (stock.Int("units", 32, 256), stock.Fixed("fixed", 7)) == (9999, 1)

    def build(hp: Any) -> Any:
        return hp.Int("units", 32, 256), hp.Fixed("fixed", 7)

    identities = [parameter.identity for parameter in found(build).declared]
    hp = TracingHyperParameters(dict(zip(identities, (9999, 1), strict=True)), 0)
    units, fixed = build(hp)
    assert 32 <= units <= 256 and fixed == 7


def test_each_branch_has_a_width_of_its_own() -> None:
    def build(hp: Any) -> int:
        if hp.Choice("kind", ["mlp", "cnn"]) == "mlp":
            return int(hp.Int("width", 8, 64))
        return int(hp.Int("width", 128, 512))

    space = found(build)
    assert list(space.parameters) == ["kind", "width", "width~2"]
    params = {"kind": "cnn", "width": 8, "width~2": 300}
    hp = TracingHyperParameters(space.proposal(params), 0)
    assert build(hp) == 300 and hp.values == {"kind": "cnn", "width": 300}
    hp = TracingHyperParameters(space.proposal({"kind": "cnn", "width": 8}), 0)
    assert 128 <= build(hp) <= 512


def test_a_missing_value_is_drawn_by_seed_and_identity() -> None:
    def build(hp: Any, names: str) -> dict[str, float]:
        return {name: hp.Float(name, 0, 1) for name in names}

    drawn = build(TracingHyperParameters(None, 0), "abc")
    assert build(TracingHyperParameters(None, 0), "cba") == drawn
    assert build(TracingHyperParameters(None, 1), "abc") != drawn
    assert len(set(drawn.values())) == 3


def test_an_ask_repeated_gets_the_same_value_and_is_logged_once() -> None:
    hp = TracingHyperParameters(None, 5)
    assert hp.Float("rate", 0, 1) == hp.Float("rate", 0, 1) == hp.get("rate") == hp["rate"]
    assert len(hp.asks) == len(hp.space) == 1


def test_values_are_known_exactly_for_what_was_asked() -> None:
    hp = TracingHyperParameters(None, 0, default=True)
    assert "kind" not in hp
    with pytest.raises(KeyError, match="does not exist"):
        hp.get("kind")
    hp.Choice("kind", ["a", "b"])
    assert hp.Int("units", 1, 9, parent_name="kind", parent_values=["b"]) is None
    assert "kind" in hp and "units" not in hp
    with pytest.raises(ValueError, match="inactive"):
        hp.get("units")
    assert [(ask["name"], ask["value"]) for ask in hp.asks] == [("kind", "a"), ("units", None)]


def test_scopes_are_kerastuners() -> None:
    def build(hp: Any) -> None:
        with hp.name_scope("head"):
            kind = hp.Choice("kind", ["mlp", "cnn"])
            with hp.conditional_scope("kind", ["mlp"]):
                if kind == "mlp":
                    hp.Int("units", 8, 64)
            with hp.conditional_scope("kind", ["cnn"]):
                if kind == "cnn":
                    hp.Int("units", 128, 512)
                    hp.Boolean("separable")
        hp.Boolean("wide", parent_name="head/kind", parent_values="cnn")

    stock = keras_tuner.HyperParameters()
    build(stock)
    hp = defaults(build)
    assert hp.values == stock.values == {"head/kind": "mlp", "head/units": 8}
    assert len(hp.active_scopes) == len(stock.active_scopes)
    space = found(build)
    assert list(space.parameters) == ["head/kind", "head/units", "wide", "head/units~2", "head/separable"]
    assert space.active({"head/kind": "mlp"}) == ("head/kind", "head/units")
    assert space.active({"head/kind": "cnn"}) == ("head/kind", "head/units~2", "head/separable", "wide")


def test_one_name_under_two_conditions_that_both_hold() -> None:
    def build(hp: Any) -> list[Any]:
        for name in "ab":
            hp.Boolean(name, default=True)
        return [hp.Int("units", 1, 10**6, parent_name=name, parent_values=[True]) for name in "ab"]

    space = found(build)
    hp = TracingHyperParameters(space.proposal({"a": True, "b": True, "units": 3, "units~2": 4}), 0)
    assert build(hp) == [3, 4]
    assert space.params_of(hp.asks) == {"a": True, "b": True, "units": 3, "units~2": 4}


def test_merge_copy_and_config_work() -> None:
    hp = TracingHyperParameters(None, 0, default=True)
    other = keras_tuner.HyperParameters()
    other.Int("units", 1, 9, default=4)
    hp.merge(other)
    assert hp.get("units") == 4
    assert hp.copy().values == hp.get_config()["values"] == {"units": 4}


# Refusals name the line.


def here(line: str) -> str:
    """Where this file has the only code line that ends in ``# line``."""
    with open(__file__, encoding="utf-8") as source:
        numbers = [number for number, text in enumerate(source, 1) if text.rstrip().endswith(f"# {line}")]
    return f"{__file__}:{numbers[0]}"


def outside(hp: Any) -> Any:
    return hp.Int("units", 32, 256, default=9999)  # outside


def off_step(hp: Any) -> Any:
    return hp.Int("units", 32, 256, step=32, default=33)  # off_step


def no_choice(hp: Any) -> Any:
    return hp.Choice("kind", ["a", "b"], default="c")  # no_choice


def mixed(hp: Any) -> Any:
    return hp.Choice("kind", [1, "a"])  # mixed


def backwards(hp: Any) -> Any:
    return hp.Float("rate", 1, 0)  # backwards


def no_parent(hp: Any) -> Any:
    return hp.Int("units", 1, 2, parent_name="kind", parent_values=[1])  # no_parent


@pytest.mark.parametrize("build", [outside, off_step, no_choice, mixed, backwards, no_parent])
def test_an_impossible_declaration_names_its_line(build: Build) -> None:
    for attempt in (lambda: discover(build, 5), lambda: build(TracingHyperParameters(None, 0))):
        with pytest.raises(SpaceError) as caught:
            attempt()
        assert here(build.__name__) in str(caught.value) and "\n" not in str(caught.value)


def test_a_refusal_is_still_the_error_that_kerastuner_raises() -> None:
    for build, error in ((mixed, TypeError), (no_choice, ValueError), (backwards, ValueError)):
        with pytest.raises(error):
            build(keras_tuner.HyperParameters())
        with pytest.raises(error):
            build(TracingHyperParameters(None, 0))


def test_one_name_declared_two_ways_names_both_lines() -> None:
    hp = TracingHyperParameters(None, 0)
    hp.Int("units", 1, 9)  # one way
    with pytest.raises(SpaceError) as caught:
        hp.Int("units", 1, 10)  # another way
    assert here("one way") in str(caught.value) and here("another way") in str(caught.value)


# Discovery.


def loops(hp: Any) -> None:
    for layer in range(hp.Int("layers", 1, 4)):
        hp.Int(f"units_{layer}", 16, 256, step=16)
        if hp.Boolean(f"drop_{layer}"):
            hp.Float(f"rate_{layer}", 0.1, 0.5)
    if hp.Choice("optimizer", ["adam", "sgd"]) == "sgd":
        hp.Float("momentum", 0, 0.9)
    if hp.Float("decay", 0, 0.1) > 0:
        hp.Int("decay_steps", 10, 100)
    hp.Float("learning_rate", 1e-4, 1e-1, sampling="log")


def test_discovery_foresees_what_any_proposal_is_asked_for() -> None:
    space = found(loops)
    for seed in range(200):
        params = space.sample(random.Random(seed))
        hp = TracingHyperParameters(space.proposal(params), seed)
        loops(hp)
        assert space.params_of(hp.asks) == params
        assert space.grown(hp.asks) is space


def test_discovery_starts_from_the_defaults_and_builds_each_configuration_once() -> None:
    built = []

    def build(hp: Any) -> None:
        loops(hp)
        built.append(dict(hp.values))

    found(build)
    assert built[0] == defaults(loops).values
    assert len({json.dumps(values, sort_keys=True) for values in built}) == len(built)


def test_discovery_stops_in_time_and_says_so() -> None:
    def slow(hp: Any) -> None:
        hp.Choice("a", list(range(50)))
        time.sleep(0.05)

    started = time.monotonic()
    raw, complete = discover(slow, 0.2)
    assert not complete and time.monotonic() - started < 2
    assert list(Space.from_json(raw).parameters) == ["a"]
    assert not discover(slow, 0.0)[1]


def test_a_configuration_that_cannot_be_built_does_not_stop_discovery() -> None:
    def fragile(hp: Any) -> None:
        if hp.Boolean("broken"):
            raise RuntimeError("no such model")
        if hp.Boolean("deep"):
            hp.Int("depth", 2, 4)

    assert list(found(fragile).parameters) == ["broken", "deep", "depth"]


def test_defaults_that_cannot_be_built_are_the_users_error() -> None:
    def broken(hp: Any) -> None:
        hp.Boolean("a")
        raise RuntimeError("no such model")

    with pytest.raises(RuntimeError, match="no such model"):
        discover(broken, 5)


def test_a_wide_range_is_not_built_value_by_value() -> None:
    built = []

    def wide(hp: Any) -> None:
        built.append(hp.Int("units", 1, 10**6))

    found(wide)
    assert built[0] == 1 and max(built) == 10**6 and len(built) < 10


def test_a_space_grows_when_training_asks_for_more() -> None:
    def trained(hp: Any) -> None:
        loops(hp)
        hp.Choice("batch_size", [32, 64])  # in fit(), as KerasTuner's users do

    space = found(loops)
    hp = TracingHyperParameters(space.proposal(space.defaults()), 3)
    trained(hp)
    grown = space.grown(hp.asks)
    assert grown is not space and list(grown.parameters) == [*space.parameters, "batch_size"]
    for seed in range(50):
        params = grown.sample(random.Random(seed))
        hp = TracingHyperParameters(grown.proposal(params), seed)
        trained(hp)
        assert "batch_size" in params and grown.params_of(hp.asks) == params


def test_a_hypermodel_of_kerastuner_is_traced() -> None:
    class Model(keras_tuner.HyperModel):  # type: ignore[misc]
        def build(self, hp: Any) -> Any:
            return hp.Int("units", 1, 3)

        def fit(self, hp: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
            return hp.Choice("batch_size", [8, 16])

    model = Model()
    assert list(found(model.build).parameters) == ["units"]
    hp = defaults(model.build)
    model.fit(hp, None)
    assert hp.values == {"units": 1, "batch_size": 8}

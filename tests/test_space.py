"""Tests of domains, spaces and the trace tree."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.definition.domain import Domain
from search.definition.space import Parameter, Space
from search.trial import Value

SCALES = ("linear", "log", "reverse_log")


@st.composite
def domains(draw: st.DrawFn) -> Domain:
    """Any domain, with steps or without."""
    kind = draw(st.sampled_from(["int", "float", "choice", "boolean", "fixed"]))
    if kind == "boolean":
        return Domain("boolean", default=draw(st.sampled_from([None, False, True])))
    if kind == "fixed":
        return Domain("fixed", values=(draw(st.sampled_from([True, 3, 0.5, "relu"])),))
    if kind == "choice":
        sort = draw(st.sampled_from([st.integers(), st.text(max_size=3), st.floats(-1e9, 1e9)]))
        values = draw(st.lists(sort, min_size=1, max_size=12, unique=True))
        return Domain("choice", values=tuple(values), default=draw(st.sampled_from([None, *values])))
    scale = draw(st.sampled_from(SCALES))
    linear = scale == "linear"
    if kind == "int":
        low = draw(st.integers(-(10**6) if linear else 1, 10**6))
        high = low + draw(st.integers(0, 10**6))
        step = draw(st.none() | st.integers(1 if linear else 2, 10**4))
    else:
        low = draw(st.floats(-1e6, 1e6) if linear else st.floats(1e-9, 1e6))
        high = low + draw(st.floats(0, 1e6)) if linear else low * draw(st.floats(1, 1e6))
        least = max((high - low) / 10**4, 1e-6 * max(abs(low), abs(high)), 1e-9)
        step = draw(st.none() | (st.floats(least, 2e6) if linear else st.floats(1.01, 1e3)))
    return Domain(kind, low, high, step, scale)


@settings(deadline=None)
@given(domains(), st.floats(0, 1))
def test_a_value_comes_back_from_its_unit(domain: Domain, unit: float) -> None:
    value = domain.value(unit)
    assert type(value) in (bool, int, float, str)
    assert domain.contains(value)
    assert 0 <= domain.unit(value) <= 1
    again = domain.value(domain.unit(value))
    if domain.count is None:
        assert not isinstance(value, str) and not isinstance(again, str)
        # A reverse_log scale subtracts two large numbers near its low end.
        assert again == pytest.approx(value, rel=1e-9, abs=1e-9 * abs(float(domain.high or 0)))
    else:
        assert again == value and type(again) is type(value)


@settings(deadline=None)
@given(domains())
def test_both_ends_are_exact(domain: Domain) -> None:
    first, last = domain.value(0.0), domain.value(1.0)
    assert domain.contains(first) and domain.contains(last)
    if domain.is_numeric:
        assert domain.low is not None and domain.high is not None
        if domain.sampling != "reverse_log" or domain.step is None:
            assert first == domain.low
        if domain.sampling == "reverse_log" or domain.step is None:
            assert last == domain.high
        assert not domain.contains(domain.low - 1) and not domain.contains(domain.high + 1)


@settings(deadline=None)
@given(domains())
def test_discrete_values_have_equal_mass_ends_included(domain: Domain) -> None:
    if domain.count is None or not 1 < domain.count <= 300 or (domain.kind == "int" and domain.step is None):
        return
    for index in range(domain.count):
        edges = [(index + 0.001) / domain.count, (index + 0.999) / domain.count]
        assert len({domain.value(edge) for edge in edges}) == 1
    assert len({domain.value((i + 0.5) / domain.count) for i in range(domain.count)}) == domain.count


def test_an_int_without_a_step_gives_each_value_its_share_of_the_log_scale() -> None:
    domain = Domain("int", 1, 8, sampling="log")
    draws = 20_000
    counts = [0] * 9
    rng = random.Random(0)
    for _ in range(draws):
        counts[int(domain.sample(rng))] += 1
    for value in range(1, 9):
        share = math.log((value + 1) / value) / math.log(9)
        # Five standard deviations of a binomial count.
        assert abs(counts[value] - draws * share) < 5 * math.sqrt(draws * share * (1 - share))


@pytest.mark.parametrize(
    ("domain", "values"),
    [
        (Domain("int", 6, 12), [6, 7, 8, 9, 10, 11, 12]),
        (Domain("int", 6, 13, 3), [6, 9, 12]),
        (Domain("int", 10, 100, 50), [10, 60]),
        (Domain("int", 2, 32, 2, "log"), [2, 4, 8, 16, 32]),
        (Domain("int", 2, 33, 2, "reverse_log"), [3, 19, 27, 31, 33]),
        (Domain("float", 0, 1, 0.2), [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (Domain("float", 0, 0.5, 0.1), [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]),
        (Domain("float", 0, 1, 1 / 3), [0.0, 1 / 3, 0.6666666666666666, 1.0]),
        (Domain("float", 0.001, 10, 10, "log"), [0.001, 0.01, 0.1, 1.0, 10.0]),
        (Domain("float", 3e-4, 3e-2, 10, "log"), [0.0003, 0.003, 0.03]),
        (Domain("boolean"), [False, True]),
        (Domain("choice", values=("a", "b", "a")), ["a", "b"]),
        (Domain("int", 5, 5), [5]),
        (Domain("float", 0.5, 0.5), [0.5]),
        (Domain("float", 0.5, 0.6, 5), [0.5]),
    ],
)
def test_the_values_are_those_that_kerastuner_documents(domain: Domain, values: list[Value]) -> None:
    assert domain.count == len(values)
    assert [domain.value((i + 0.5) / len(values)) for i in range(len(values))] == pytest.approx(values, abs=0)
    assert sorted(domain.near(values[-1]), key=values.index) == values


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("step", [None, 1, 7])
def test_a_range_of_a_million_is_searched_to_its_ends(scale: str, step: int | None) -> None:
    if scale != "linear" and step == 1:
        step = None
    domain = Domain("int", 1, 10**6, step, scale)
    assert domain.value(0.0 if scale != "reverse_log" else 1.0) == (1 if scale != "reverse_log" else 10**6)
    values = [domain.value(i / 997) for i in range(998)]
    assert values == sorted(values, key=lambda v: float(v))
    for value in values:
        assert domain.value(domain.unit(value)) == value


@settings(deadline=None)
@given(domains())
def test_json_brings_back_an_equal_domain(domain: Domain) -> None:
    raw = json.loads(json.dumps(domain.to_json(), allow_nan=False))
    again = Domain.from_json(raw)
    assert again == domain and again.to_json() == domain.to_json()
    assert type(again.default) is type(domain.default)


@pytest.mark.parametrize(
    ("domain", "value"),
    [
        (Domain("int", 32, 256), 9999),
        (Domain("int", 32, 256), 33.0),
        (Domain("int", 0, 1), True),
        (Domain("int", 32, 256, 32), 33),
        (Domain("float", 0, 1), math.nan),
        (Domain("float", 0, 1), "0.5"),
        (Domain("float", 0, 1, 0.1), 0.15),
        (Domain("boolean"), 1),
        (Domain("choice", values=(1, 2)), True),
        (Domain("choice", values=("a",)), None),
        (Domain("fixed", values=(3,)), 4),
    ],
)
def test_what_is_not_a_value_is_not_taken_for_one(domain: Domain, value: Any) -> None:
    assert domain.match(value) is None
    with pytest.raises(ValueError, match="must be one of"):
        domain.unit(value)


def test_a_whole_number_counts_as_a_float() -> None:
    found = Domain("float", 0, 2).match(1)
    assert found == 1.0 and type(found) is float


@pytest.mark.parametrize(
    "raw",
    [
        {"kind": "int", "low": 3, "high": 1},
        {"kind": "int", "low": 1, "high": 9, "default": 10},
        {"kind": "int", "low": 1, "high": 9, "step": 2, "default": 4},
        {"kind": "float", "low": 0, "high": 1, "step": 0},
        {"kind": "float", "low": 0, "high": 1, "sampling": "log"},
        {"kind": "float", "low": 0, "high": math.inf},
        {"kind": "float", "low": 1, "high": 2, "step": 1, "sampling": "log"},
        {"kind": "choice", "values": ()},
        {"kind": "choice", "values": (math.nan,)},
        {"kind": "choice", "values": ("a",), "default": "b"},
        {"kind": "list", "values": (1,)},
    ],
)
def test_an_impossible_domain_is_refused(raw: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Domain(**raw)


def test_a_default_that_means_a_step_is_that_step() -> None:
    assert Domain("float", 0, 1, 0.1, default=3 * 0.1).default == 0.3


# Spaces. `Build` stands in for a user's build: a plain program over an `hp`-like function.

Domains = Mapping[str, Domain]
Ask = Callable[..., Any]
Build = Callable[[Ask], None]


def run(build: Build, params: Mapping[str, Any], space: Space) -> list[dict[str, Any]]:
    """The asks of one build: values by key of the space where it has them, else defaults."""
    asks: list[dict[str, Any]] = []
    keys = {parameter.identity: key for key, parameter in space.parameters.items()}
    values: dict[str, Value] = {}

    def ask(name: str, domain: Domain, conditions: tuple[Any, ...] = ()) -> Any:
        parameter = Parameter(name, name, conditions, domain)
        value = None
        if parameter.is_active(values):
            value = params.get(keys.get(parameter.identity, ""), domain.default)
            assert value is not None
            values[name] = value
        asks.append({**parameter.to_json(), "value": value})
        return value

    build(ask)
    return asks


def discovered(build: Build) -> Space:
    """What varying one discrete value at a time finds (as tracing.discover does, without Keras)."""
    space = Space.empty()
    waiting: list[dict[str, Value]] = [{}]
    varied: set[str] = set()
    while waiting:
        params = waiting.pop(0)
        asks = run(build, params, space)
        space = space.grown(asks, complete=False)
        given = space.params_of(asks)
        for key in given:
            domain = space.parameters[key].domain
            if key not in varied and domain.count is not None and domain.count < 20:
                varied.add(key)
                waiting += [{**given, key: value} for value in domain.near(given[key])][1:]
    return space


SWITCH = Domain("boolean")
WIDTH = Domain("int", 8, 64, 8)
RATE = Domain("float", 1e-4, 1e-1, sampling="log")


def layers(ask: Ask) -> None:
    for layer in range(ask("layers", Domain("int", 1, 4))):
        ask(f"units_{layer}", WIDTH)
        if ask(f"drop_{layer}", SWITCH):
            ask(f"rate_{layer}", RATE)
    if ask("optimizer", Domain("choice", values=("adam", "sgd", "rmsprop"))) == "sgd":
        ask("momentum", Domain("float", 0, 0.9, 0.3))
    ask("learning_rate", RATE)


def branches(ask: Ask) -> None:
    kind = ask("kind", Domain("choice", values=("mlp", "cnn", "linear")))
    if kind == "mlp":
        ask("width", Domain("int", 8, 64))
    elif kind == "cnn":
        ask("width", Domain("int", 128, 512))
        ask("separable", SWITCH)


def scopes(ask: Ask) -> None:
    ask("kind", Domain("choice", values=("a", "b")))
    ask("units", Domain("int", 1, 3), (("kind", ("a",)),))
    if ask("deep", SWITCH, (("kind", ("b",)),)):
        ask("depth", Domain("int", 2, 3), (("kind", ("b",)), ("deep", (True,))))
    ask("last", SWITCH)


def swapped(ask: Ask) -> None:
    for name in ("first", "second") if ask("forwards", SWITCH) else ("second", "first"):
        ask(name, SWITCH)


BUILDS = {build.__name__: build for build in (layers, branches, scopes, swapped)}


@pytest.mark.parametrize("name", BUILDS)
def test_discovery_tells_what_any_configuration_asks_for(name: str) -> None:
    build = BUILDS[name]
    space = discovered(build)
    for seed in range(300):
        sampled = space.sample(random.Random(seed))
        asked = space.params_of(run(build, sampled, space))
        assert asked == sampled
        everything = {key: parameter.draw(seed) for key, parameter in space.parameters.items()}
        asked = space.params_of(run(build, everything, space))
        assert space.active(everything) == tuple(asked)
        assert space.restricted(everything) == asked
        assert space.signature(everything) == space.signature(asked)
        assert space.grown(run(build, everything, space)) is space


def interaction(ask: Ask) -> None:
    switches = [ask(name, SWITCH) for name in "abc"]
    if switches[0] and switches[1]:
        ask("deep", SWITCH)
    if switches[1] != switches[2]:
        ask("mixed", Domain("choice", values=(1, 2, 3)))


def exhaust(build: Build, space: Space) -> tuple[Space, list[dict[str, Value]]]:
    """Run trials proposed by ``unseen`` until it gives up, growing the space as the driver does."""
    done: list[dict[str, Value]] = []
    while (params := space.unseen({space.signature(one) for one in done})) is not None:
        asks = run(build, params, space)
        space = space.grown(asks)
        done.append(space.params_of(asks))
        assert len(done) < 200
    return space, done


def test_growth_learns_branches_that_two_values_decide_together() -> None:
    space = discovered(interaction)
    assert "deep" not in space.parameters
    space, done = exhaust(interaction, space)
    expected = 0
    for a, b, c in product((False, True), repeat=3):
        expected += (2 if a and b else 1) * (3 if b != c else 1)
    assert len({space.signature(params) for params in done}) == expected
    # A branch not foreseen can end in a configuration that was tried before; each teaches, so they are few.
    assert len(done) <= expected + 5
    for a, b, c in product((False, True), repeat=3):
        asked = space.params_of(run(interaction, {"a": a, "b": b, "c": c}, space))
        assert space.active(asked) == tuple(asked)


@pytest.mark.parametrize("name", ["scopes", "swapped"])
def test_a_finite_space_is_listed_and_exhausted(name: str) -> None:
    build = BUILDS[name]
    space = discovered(build)
    leaves = list(space.leaves())
    assert leaves[0] == space.defaults()
    signatures = {space.signature(leaf) for leaf in leaves}
    assert len(signatures) == len(leaves) == {"scopes": 3 * 2 + 3 * 2, "swapped": 8}[name]
    assert all(space.params_of(run(build, leaf, space)) == leaf for leaf in leaves)
    assert space.unseen(signatures) is None
    missing = space.signature(leaves[-1])
    found = space.unseen(signatures - {missing})
    assert found is not None and space.signature(found) == missing


def test_a_continuous_space_cannot_be_listed_and_is_never_exhausted() -> None:
    space = discovered(layers)
    with pytest.raises(ValueError, match="finite"):
        list(space.leaves())
    seen: set[Any] = set()
    for _ in range(50):
        params = space.unseen(seen)
        assert params is not None and space.signature(params) not in seen
        seen.add(space.signature(params))


def test_unseen_stays_near_to_what_was_wanted() -> None:
    space = Space.empty().grown(run(lambda ask: [ask(n, Domain("int", 0, 10**6)) for n in "ab"], {}, Space()))
    like = {"a": 77, "b": 500_000}
    assert space.unseen({space.signature(like)}, like=like) == {"a": 77, "b": 500_001}


def test_duplicates_are_told_by_active_parameters_only() -> None:
    space = discovered(branches)
    one = {"kind": "linear", "width": 9, "separable": True}
    assert space.signature(one) == space.signature({"kind": "linear"})
    assert space.signature({"kind": "mlp", "width": 9}) != space.signature({"kind": "mlp", "width": 10})


def test_one_name_with_two_domains_is_two_parameters() -> None:
    space = discovered(branches)
    assert list(space.parameters) == ["kind", "width", "width~2", "separable"]
    handed = space.proposal({"kind": "cnn", "width~2": 200})
    assert handed == {
        space.parameters["kind"].identity: "cnn",
        space.parameters["width~2"].identity: 200,
    }


def test_keys_are_unique_whatever_the_names() -> None:
    def awkward(ask: Ask) -> None:
        ask("a~2", SWITCH)
        ask("a", WIDTH)
        ask("a", RATE, (("a~2", (False,)),))

    assert list(discovered(awkward).parameters) == ["a~2", "a", "a~3"]


def test_what_training_asks_for_joins_the_build_of_every_shape() -> None:
    def trained(ask: Ask) -> None:
        layers(ask)
        ask("batch_size", Domain("choice", values=(32, 64)))

    space = discovered(layers)
    before = space
    for seed in range(3):
        space = space.grown(run(trained, space.sample(random.Random(seed)), space))
    assert space is not before
    for seed in range(100):
        params = {key: parameter.draw(seed) for key, parameter in space.parameters.items()}
        assert space.active(params) == tuple(space.params_of(run(trained, params, space)))


def test_what_every_configuration_has() -> None:
    def trained(ask: Ask) -> None:
        layers(ask)
        if ask("batch_size", Domain("choice", values=(32, 64))) == 64:
            ask("warm_up", SWITCH)

    space = discovered(layers)
    build = ["layers", "units_0", "drop_0", "optimizer", "learning_rate"]
    assert [p.key for p in space.always] == build
    for size in (32, 64):
        space = space.grown(run(trained, {"batch_size": size}, space))
        for seed in range(3):
            space = space.grown(run(trained, {**space.sample(random.Random(seed)), "batch_size": size}, space))
    assert {p.key for p in space.always} == {*build, "batch_size"}
    assert [p.key for p in discovered(scopes).always] == ["kind", "last"]
    assert Space.empty().always == ()


def test_the_asks_of_a_build_give_way_to_those_of_the_whole_trial() -> None:
    build = run(lambda ask: ask("a", SWITCH), {}, Space())
    whole = [*build, *run(lambda ask: ask("batch_size", WIDTH), {}, Space())]
    space = Space.empty().grown(build).grown(whole)
    assert space.active({}) == ("a", "batch_size")
    assert space.grown(build) is space
    assert len(space.traces) == 1


def test_a_build_that_is_not_deterministic_does_no_harm() -> None:
    rng = random.Random(0)

    def moody(ask: Ask) -> None:
        ask("a", SWITCH)
        for name in rng.sample("bcd", 2):
            ask(name, SWITCH)

    space = Space.empty()
    for _ in range(250):
        space = space.grown(run(moody, space.sample(rng), space))
    assert set(space.sample(rng)) <= set("abcd")
    assert len(space.to_json()["traces"]) <= 200


@pytest.mark.parametrize("name", BUILDS)
def test_json_brings_back_an_equal_space(name: str) -> None:
    space = discovered(BUILDS[name])
    again = Space.from_json(json.loads(json.dumps(space.to_json(), allow_nan=False)))
    assert again == space and again.digest == space.digest
    assert list(again.parameters) == list(space.parameters)
    assert again.sample(random.Random(3)) == space.sample(random.Random(3))


def test_the_digest_is_of_parameters_not_of_traces() -> None:
    space = discovered(interaction)
    assert Space(space.declared, space.traces[:1]).digest == space.digest
    assert discovered(branches).digest != space.digest


@settings(max_examples=30, deadline=None)
@given(st.integers(), st.permutations(list(discovered(layers).declared)))
def test_a_draw_depends_on_seed_and_identity_only(seed: int, order: list[Parameter]) -> None:
    drawn = {parameter.key: parameter.draw(seed) for parameter in order}
    assert drawn == {p.key: p.draw(seed) for p in discovered(layers).declared}


def test_seeds_differ_zero_included() -> None:
    drawn = {RATE.sample(random.Random(seed)) for seed in range(5)}
    rate = Parameter("r", "r", (), RATE)
    assert len(drawn) == 5 and len({rate.draw(seed) for seed in (-1, 0, 1)}) == 3


def test_an_empty_space_has_one_configuration() -> None:
    space = Space.empty()
    assert space.defaults() == {} and list(space.leaves()) == [{}]
    assert space.unseen({space.signature({})}) is None

"""What holds for every sampler in any space, after any history, for any seed."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from search.definition.domain import Domain
from search.definition.space import Parameter, Space
from search.errors import RequestError
from search.samplers import SAMPLERS, check_space, get_sampler, proposal_for
from search.trial import Trial, TrialState, Value

STATES = tuple(TrialState)
WIDE = Domain("int", 0, 10**6)


def marked(name: str) -> Any:
    """The sampler's name, with what it takes to test it."""
    if name.startswith("optuna") and not all(map(importlib.util.find_spec, ("optuna", "cmaes"))):
        return pytest.param(name, marks=pytest.mark.skip("needs `pip install 'heldout[optuna]'`"))
    if name == "optuna-gp" and importlib.util.find_spec("torch") is None:
        return pytest.param(name, marks=pytest.mark.skip("needs torch, which is too large to install for this"))
    slow = [] if name in ("random", "tpe") else [pytest.mark.slow, pytest.mark.timeout(900)]
    return pytest.param(name, marks=slow)


@st.composite
def numbers(draw: st.DrawFn) -> Domain:
    kind = draw(st.sampled_from(("int", "float")))
    sampling = draw(st.sampled_from(("linear", "log", "reverse_log")))
    low = draw(st.integers(1 if sampling != "linear" else -(10**6), 10**6))
    high = low + draw(st.sampled_from((0, 1, 2, 9, 100, 10**6)))
    steps = {"linear": (None, 1, 3), "log": (None, 2, 10), "reverse_log": (None, 2)}[sampling]
    return Domain(kind, low, high, draw(st.sampled_from(steps)), sampling)


@st.composite
def choices(draw: st.DrawFn) -> Domain:
    values = draw(st.sampled_from(((1, 2, 3, 4), ("a", "b", "c"), (0.1, 0.2), ("only",))))
    return Domain("choice", values=values, ordered=draw(st.booleans()))


DOMAINS = st.one_of(
    numbers(),
    choices(),
    st.just(Domain("boolean")),
    st.just(Domain("fixed", values=(3,))),
    st.just(WIDE),
)


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    """Some parameters, and some that are asked for only where a flag or a number of layers says so."""
    always = draw(st.lists(DOMAINS, max_size=4))
    flagged = draw(st.lists(DOMAINS, max_size=2))
    layers = draw(st.lists(DOMAINS, max_size=3))

    def build(ask: Callable[[str, Domain], Any]) -> None:
        for number, domain in enumerate(always):
            ask(f"always_{number}", domain)
        if flagged and ask("flag", Domain("boolean")):
            for number, domain in enumerate(flagged):
                ask(f"flagged_{number}", domain)
        if layers:
            for number in range(ask("layers", Domain("int", 1, len(layers)))):
                ask(f"layer_{number}", layers[number])

    space = Space.empty()
    for flag in (False, True):
        for count in range(1, len(layers) + 1) or [0]:
            asks: list[dict[str, Any]] = []

            def ask(name: str, domain: Domain, asks: Any = asks, given: Any = (flag, count)) -> Any:
                value = dict(zip(("flag", "layers"), given, strict=True)).get(name, domain.default)
                asks.append({**Parameter(name, name, (), domain).to_json(), "value": value})
                return value

            build(ask)
            space = space.grown(asks)
    return space


@st.composite
def histories(draw: st.DrawFn, space: Space) -> list[Trial]:
    """Random configurations of one fate or of many, with losses that are all the same, tied, or far apart."""
    count = draw(st.sampled_from((0, 3, 12, 30)))
    states = draw(st.sampled_from((STATES, (TrialState.COMPLETE,), (TrialState.FAILED,), (TrialState.PRUNED,))))
    losses = draw(st.sampled_from(((0.0,), (1.0, 2.0), (-1e300, 0.0, 1e300), tuple(range(50)))))
    rng = random.Random(draw(st.integers(0, 3)))
    history = []
    for number in range(count):
        state = rng.choice(states)
        scored = state in (TrialState.COMPLETE, TrialState.PRUNED)
        loss = float(rng.choice(losses)) if scored else None
        reason = "nan" if state is TrialState.FAILED else None
        params: dict[str, Value] = space.sample(rng)
        epochs = rng.randrange(10)
        history.append(Trial(number, state, params, loss=loss, reason=reason, epochs=epochs))
    return history


@pytest.mark.parametrize("name", [marked(name) for name in sorted(SAMPLERS)])
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(data=st.data(), seed=st.sampled_from((0, 1, 2**31 - 1)))
def test_a_proposal_is_valid_new_and_made_again_alike(name: str, data: st.DataObject, seed: int) -> None:
    space = data.draw(spaces())
    history = data.draw(histories(space))
    sampler = get_sampler(name)
    try:
        check_space(sampler, space)
    except RequestError:
        assume(False)
    proposal = proposal_for(sampler, history, space, seed, len(history))
    seen = {space.signature(trial.params) for trial in history}
    if proposal is None:
        assert space.unseen(seen) is None
        return
    assert space.active(proposal.params) == tuple(proposal.params)
    for key, value in proposal.params.items():
        assert type(value) in (bool, int, float, str)
        match = space.parameters[key].domain.match(value)
        assert type(match) is type(value) and match == value
    assert space.signature(proposal.params) not in seen
    assert json.loads(json.dumps(proposal.memo, allow_nan=False)) == proposal.memo
    read = Space.from_json(space.to_json())
    again = proposal_for(get_sampler(name), [Trial.from_json(t.to_json()) for t in history], read, seed, len(history))
    assert again == proposal

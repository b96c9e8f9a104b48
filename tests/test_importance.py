"""Importance of hyperparameters, and what is suggested to search next, on histories whose truth is known."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from search.definition.domain import Domain
from search.definition.space import Parameter, Space
from search.pages.importance import FEWEST, Importances, importances
from search.pages.suggestions import suggestions
from search.trial import Trial, TrialState

KIND = Parameter("kind", "kind", (), Domain("choice", values=("a", "b", "c")))
RATE = Parameter("rate", "rate", (), Domain("float", 1e-4, 1e-1, sampling="log", default=1e-2))
UNITS = Parameter("units", "units", (), Domain("int", 16, 256, default=64))
LAYERS = Parameter("layers", "layers", (), Domain("int", 1, 3, default=1))
DEEP = Parameter("deep", "deep", (("layers", (3,)),), Domain("float", 0.0, 1.0, default=0.5))


def space_of(*parameters: Parameter) -> Space:
    return Space(parameters)


def tried(
    loss: Callable[[dict[str, Any]], float], *parameters: Parameter, trials: int = 40, noise: float = 0.0, seed: int = 0
) -> list[Trial]:
    """A random search in which a configuration's loss is known."""
    rng, found = random.Random(seed), []
    for number in range(trials):
        params: dict[str, Any] = {}
        for parameter in parameters:
            if parameter.is_active(params):
                params[parameter.key] = parameter.domain.sample(rng)
        value = loss(params) + noise * rng.gauss(0, 1)
        done = {"score": -value, "loss": value, "epochs": 5, "best_epoch": 3, "size": 9, "ended": float(number)}
        found.append(Trial(number, TrialState.COMPLETE, params, **done))
    return found


def shown(found: Importances) -> list[str]:
    return [one.key for one in found.parameters if one.is_shown]


def test_the_parameter_that_matters_is_found_and_no_other() -> None:
    trials = tried(lambda p: abs(math.log10(p["rate"]) + 2), KIND, RATE, UNITS, LAYERS, noise=0.1)
    found = importances(trials, space_of(KIND, RATE, UNITS, LAYERS))
    assert found.why is None and shown(found) == ["rate"]
    first, explained = found.parameters[0], found.explained
    assert first.low < first.share < first.high and first.share > 0.3 and first.trials == 40
    assert explained is not None and explained[0] > 0.5


def test_a_choice_without_an_order_is_found_as_well() -> None:
    worth = {"a": 0.0, "b": 3.0, "c": 0.5}
    trials = tried(lambda p: worth[p["kind"]], KIND, RATE, UNITS, noise=0.5)
    assert shown(importances(trials, space_of(KIND, RATE, UNITS))) == ["kind"]


@pytest.mark.parametrize("seed", range(4))
def test_on_noise_nothing_is_shown_and_it_says_so(seed: int) -> None:
    trials = tried(lambda p: 0.0, KIND, RATE, UNITS, LAYERS, noise=1.0, seed=seed)
    found = importances(trials, space_of(KIND, RATE, UNITS, LAYERS))
    assert not shown(found) and found.why is not None


def test_a_conditional_parameter_counts_among_the_trials_that_had_it() -> None:
    """What having it is worth goes to its parent: here three layers are bad, whatever is in the third."""
    parameters = (LAYERS, DEEP, RATE)
    having = importances(tried(lambda p: p["layers"] == 3, *parameters, trials=60, noise=0.2), space_of(*parameters))
    assert shown(having) == ["layers"]
    value = tried(lambda p: p.get("deep", 0.5) * 4, *parameters, trials=60, noise=0.1)
    within = importances(value, space_of(*parameters))
    deep = next(one for one in within.parameters if one.key == "deep")
    assert deep.is_shown and deep.trials == sum("deep" in t.params for t in value) < 30


def test_pruned_trials_count_and_failed_ones_do_not() -> None:
    trials = tried(lambda p: p["units"], UNITS, RATE, trials=16)
    pruned = [
        Trial(t.number, TrialState.PRUNED, t.params, score=t.score, loss=t.loss) if t.number % 2 else t for t in trials
    ]
    failed = [Trial(20 + k, TrialState.FAILED, {"units": 16 + k, "rate": 0.01}, reason="nan") for k in range(5)]
    again = [Trial(40 + k, TrialState.COMPLETE, {"units": 20}, confirms=1, score=0.0, loss=0.0) for k in range(3)]
    found = importances([*pruned, *failed, *again], space_of(UNITS, RATE))
    assert found.trials == 16 and shown(found)[0] == "units"


def test_it_is_the_same_each_time() -> None:
    trials = tried(lambda p: p["units"], UNITS, RATE, trials=20, noise=20.0)
    assert importances(trials, space_of(UNITS, RATE)) == importances(trials, space_of(UNITS, RATE))


def alike(**params: Any) -> list[Trial]:
    """Trials with one configuration and twelve scores."""
    return [Trial(k, TrialState.COMPLETE, params, score=k, loss=k) for k in range(12)]


@pytest.mark.parametrize(
    "trials, why",
    [
        ([], "0 trials have a score"),
        (tried(lambda p: p["units"], UNITS, trials=FEWEST - 1), f"{FEWEST - 1} trials have a score"),
        (tried(lambda p: 1.0, UNITS), "all trials have the same score"),
        (alike(units=16), "no parameter had several values"),
        (alike(units="not a number of units"), "no parameter had several values"),
        (alike(), "no parameter had several values"),
    ],
)
def test_where_there_is_nothing_to_learn_it_says_why(trials: list[Trial], why: str) -> None:
    found = importances(trials, space_of(UNITS))
    assert not found.parameters and why in str(found.why)


# What to search next.


def said(trials: list[Trial], *parameters: Parameter, epochs: int | None = None) -> str:
    space = space_of(*parameters)
    nothing = Importances((), None, len(trials), why="not asked for")
    return "\n".join(f"{one.do} {one.why}" for one in suggestions(trials, space, nothing, "mine", epochs))


def test_best_values_at_a_bound_are_worth_going_beyond() -> None:
    trials = tried(lambda p: -p["units"], UNITS, RATE)
    assert "Let units go above 256." in said(trials, UNITS, RATE)
    assert "Let units go below 16." in said(tried(lambda p: p["units"], UNITS, RATE), UNITS, RATE)
    assert "units" not in said(tried(lambda p: abs(p["units"] - 130), UNITS, RATE), UNITS, RATE)


def test_an_end_at_zero_and_a_choice_without_an_order_are_no_bounds() -> None:
    share = Parameter("share", "share", (), Domain("float", 0.0, 0.5, default=0.0))
    worth = {"a": 0.0, "b": 1.0, "c": 2.0}
    found = said(tried(lambda p: p["share"] + worth[p["kind"]], share, KIND), share, KIND)
    assert "share" not in found and "kind" not in found


def test_winners_that_improve_at_their_last_epoch_are_worth_more_epochs() -> None:
    import dataclasses

    trials = tried(lambda p: p["units"], UNITS)
    late = [dataclasses.replace(t, best_epoch=5) for t in trials]
    assert "Train for longer than 5 epochs" in said(late, UNITS, epochs=5)
    assert "Train for longer" not in said(late, UNITS, epochs=9)  # they stopped by themselves
    assert "Train for longer" not in said(trials, UNITS, epochs=5)


def test_a_search_that_still_gains_is_worth_going_on_with_and_one_that_does_not_is_not() -> None:
    gaining = [Trial(k, TrialState.COMPLETE, {}, score=k, loss=-k, ended=float(k)) for k in range(20)]
    assert "heldout resume mine --trials +10" in said(gaining)
    done = [Trial(k, TrialState.COMPLETE, {}, score=-k, loss=k, ended=float(k)) for k in range(20)]
    assert "The last 19 of 20 trials brought no better" in said(done)
    assert said(gaining[:10]) == ""


def test_many_failures_are_worth_a_look() -> None:
    failed = [Trial(k, TrialState.FAILED, {}, reason="oom", message="too large") for k in range(4)]
    assert "heldout show mine 0" in said(failed) and "4 of 4 trials failed" in said(failed)


def test_what_shows_no_effect_may_be_fixed() -> None:
    trials = tried(lambda p: abs(math.log10(p["rate"]) + 2), RATE, UNITS, noise=0.1)
    space = space_of(RATE, UNITS)
    found = suggestions(trials, space, importances(trials, space), "mine")
    assert any(one.do == "Fix units, and spend the trials on rate." for one in found)

"""Moving over: spaces of Hyperopt, and functions written for Optuna's trial, run as they are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from hyperopt import hp as h
from hyperopt.pyll.stochastic import sample

from search import OptunaTrial
from search.definition.moving import hyperopt_params, is_of_hyperopt
from search.definition.space import Space
from search.definition.tracing import TracingHyperParameters, discover
from search.errors import SpaceError
from tests.conftest import Heldout
from tests.tiny import write_space

SPACE = {
    "rate": h.loguniform("rate", math.log(1e-4), math.log(1e-1)),
    "dropout": h.uniform("dropout", 0.1, 0.5),
    "units": h.quniform("units", 16, 128, 16),
    "width": h.qloguniform("width", math.log(8), math.log(256), 8),
    "layers": 1 + h.randint("layers", 3),
    "seed": h.randint("seed", 5, 9),
    "depth": h.uniformint("depth", 2, 6),
    "noise": h.normal("noise", 1.0, 0.5),
    "scale": h.lognormal("scale", 0.0, 1.0),
    "coarse": h.qnormal("coarse", 10.0, 2.0, 1),
    "activation": h.choice("activation", ["relu", "tanh"]),
    "norm": h.choice("norm", [None, "batch"]),
    "rare": h.pchoice("rare", [(0.9, "often"), (0.1, "seldom")]),
    "head": h.choice("head", [{"kind": "flat"}, {"kind": "dense", "units": h.quniform("head_units", 8, 64, 8)}]),
    "pair": [h.uniform("left", 0, 1), 7],
}


def drawn(seed: int) -> tuple[Any, TracingHyperParameters]:
    hp = TracingHyperParameters(seed=seed)
    return hyperopt_params(SPACE, hp), hp


def test_params_are_such_as_hyperopt_would_give() -> None:
    theirs = [sample(SPACE, np.random.default_rng(seed)) for seed in range(200)]
    ours = [drawn(seed)[0] for seed in range(200)]
    for one in ours:
        assert one.keys() == theirs[0].keys() and one["pair"][1] == 7
        assert {key: type(value) for key, value in one.items() if key not in ("head", "norm")} == {
            key: type(value) if not isinstance(value, np.generic) else type(value.item())
            for key, value in theirs[0].items()
            if key not in ("head", "norm")
        }
    for key in ("activation", "rare", "norm", "layers", "seed", "depth", "units"):
        assert {one[key] for one in ours} <= {one[key] for one in theirs}, key
        assert len({one[key] for one in ours}) > 1
    for key in ("rate", "dropout", "width", "noise", "scale", "coarse"):
        known = [one[key] for one in theirs]
        spread = max(known) - min(known)
        assert all(min(known) - spread <= one[key] <= max(known) + spread for one in ours), key
    assert all(one["units"] % 16 == 0 and one["width"] % 8 == 0 for one in ours)


def test_what_a_choice_leads_to_is_asked_for_only_there() -> None:
    for seed in range(20):
        params, hp = drawn(seed)
        names = {ask["name"] for ask in hp.asks}
        assert ("head_units" in names) == (params["head"]["kind"] == "dense")


def test_the_space_is_discovered_and_the_baseline_is_the_middle() -> None:
    found, is_complete = discover(lambda hp: hyperopt_params(SPACE, hp), 20.0)
    assert is_complete
    assert "head_units" in Space.from_json(found).parameters
    params = hyperopt_params(SPACE, TracingHyperParameters(default=True))
    assert params["rate"] == pytest.approx(math.sqrt(1e-5)) and params["dropout"] == pytest.approx(0.3)
    assert (params["units"], params["activation"], params["norm"]) == (64.0, "relu", None)


def test_only_what_has_a_parameter_of_hyperopt_is_a_space() -> None:
    assert is_of_hyperopt(SPACE) and is_of_hyperopt(h.uniform("x", 0, 1))
    assert not is_of_hyperopt({"units": [16, 32]}) and not is_of_hyperopt("space")


def test_choices_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(SpaceError, match="the choices of 'x' must differ"):
        hyperopt_params(h.choice("x", [1, "1"]), TracingHyperParameters())


def objective(trial: Any) -> dict[str, Any]:
    """As people write it for Optuna."""
    found = {
        "rate": trial.suggest_float("rate", 1e-5, 1e-1, log=True),
        "dropout": trial.suggest_float("dropout", 0.0, 0.5, step=0.1),
        "units": trial.suggest_int("units", 16, 512, log=True),
        "layers": trial.suggest_int("layers", 1, 3),
        "even": trial.suggest_int("even", 2, 8, step=2),
        "kind": trial.suggest_categorical("kind", ["a", "b"]),
        "odd": trial.suggest_categorical("odd", [None, 3, "x"]),
        "flag": trial.suggest_categorical("flag", [True, False]),
    }
    if found["kind"] == "b":
        found["more"] = trial.suggest_float("more", -1, 1)
    trial.report(0.5, 1)
    assert not trial.should_prune() and trial.params == found
    return found


def test_a_function_for_optunas_trial_sees_values_that_optuna_gives_too() -> None:
    distributions: dict[str, Any] = {}
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        trial = study.ask()
        objective(trial)
        distributions |= trial.distributions
    for seed in range(50):
        ours = objective(OptunaTrial(TracingHyperParameters(seed=seed)))
        for name, value in ours.items():
            distribution = distributions[name]
            assert distribution._contains(distribution.to_internal_repr(value)), (name, value)
    assert objective(OptunaTrial(TracingHyperParameters(default=True)))["units"] == round(math.sqrt(16 * 512))


FOR_HYPEROPT = (
    "space = {'units': hp.quniform('units', 2, 16, 2), 'rate': hp.loguniform('rate', -7, -2)}\n\n\n"
    "def build(params):\n"
    "    units = int(params['units'])\n"
    "    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(units), keras.layers.Dense(2)])\n"
    "    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)\n"
    "    model.compile(keras.optimizers.Adam(params['rate']), loss, metrics=['accuracy'])\n"
    "    return model"
)
FOR_OPTUNA = (
    "def build(hp):\n"
    "    trial = OptunaTrial(hp)\n"
    "    units = trial.suggest_int('units', 2, 16, log=True)\n"
    "    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(units), keras.layers.Dense(2)])\n"
    "    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)\n"
    "    rate = trial.suggest_float('rate', 1e-4, 1e-1, log=True)\n"
    "    model.compile(keras.optimizers.Adam(rate), loss, metrics=['accuracy'])\n"
    "    return model"
)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("build", "imports"),
    [(FOR_HYPEROPT, "from hyperopt import hp\n\nfrom search import Dataset"),
     (FOR_OPTUNA, "from search import Dataset, OptunaTrial")],
)  # fmt: skip
def test_a_study_of_such_a_module(build: str, imports: str, tmp_path: Path, heldout: Heldout) -> None:
    space = write_space(tmp_path, build=build, imports=f"import keras\nimport numpy as np\n{imports}")
    options = ["--trials", "4", "--epochs", "1", "--confirm", "0", "--study", "s", "--json"]
    ran = heldout("launch", space, *options, "--workspace", str(tmp_path / "ws"))
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert report["trials"]["complete"] == 4 and set(report["best"]["params"]) == {"units", "rate"}

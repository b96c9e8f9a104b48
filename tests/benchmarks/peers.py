"""What Heldout is timed against, each in a process of its own: KerasTuner, Optuna, Ray Tune with HyperOptSearch.

Every peer trains as its guide shows it: `fit` on arrays, with the batch size of the configuration. The rows are read
as heldout stored them, so no peer pays for loading or splitting. A plan that lists trials has them replayed; one that
does not is a search by the peer's own sampler, with the best epoch of each trial kept.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import numpy as np


def main() -> None:
    """Run one plan (a file of JSON) and print what came out, as JSON."""
    plan = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps((score if plan["peer"] == "score" else PEERS[plan["peer"]])(plan)))


def module() -> Any:
    """The space module."""
    spec = importlib.util.spec_from_file_location("space", measure.SPACE)
    assert spec is not None and spec.loader is not None
    space = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(space)
    return space


def tiers(plan: dict[str, Any]) -> tuple[Any, Any]:
    """Train and validation rows."""
    from search.tiers.data import OpenRows

    rows = OpenRows(Path(plan["rows"]))
    train, validation = ((rows.features(tier), rows.labels(tier)) for tier in ("train", "validation"))
    return train, validation


def hyperparameters(values: dict[str, Any]) -> Any:
    """KerasTuner's, with values in place."""
    import keras_tuner

    hp = keras_tuner.HyperParameters()
    hp.values = dict(values)
    return hp


def score(plan: dict[str, Any]) -> dict[str, Any]:
    """Test accuracy of models, as {"params", "weights"} each. Run when all clocks have stopped."""
    from search.tiers.data import SealedRows

    sealed, space, out = SealedRows(Path(plan["sealed"])), module(), []
    for one in plan["models"]:
        model = space.build(hyperparameters(one["params"]))
        model.load_weights(one["weights"])
        predicted = model.predict(sealed.features(), verbose=0, batch_size=512)
        out.append(float((predicted.argmax(axis=1) == sealed.labels("test")).mean()))
    return {"scores": out}


def train_one(plan: dict[str, Any], space: Any, rows: Any, params: dict[str, Any], epochs: int) -> Any:
    """One trial in this process, in the manner of both guides; its best validation score, and the model."""
    import keras

    keras.backend.clear_session()
    model = space.build(hyperparameters(params))
    best = keras.callbacks.EarlyStopping(
        monitor=space.objective, mode="max", patience=epochs, restore_best_weights=True
    )
    kept = [] if plan["trials"] else [best]
    train, validation = rows
    history = model.fit(
        *train,
        validation_data=validation,
        epochs=epochs,
        batch_size=params["batch_size"],
        callbacks=kept,
        verbose=0,
    )
    return max(history.history[space.objective]), model


def kerastuner(plan: dict[str, Any]) -> dict[str, Any]:
    """KerasTuner's loop, in this process: its RandomSearch, or the plan's trials in its place.

    To replay, the oracle hands out the plan's values where RandomSearch would draw them, which costs less than drawing.
    """
    import keras_tuner
    from keras_tuner.engine.trial import TrialStatus

    space, (train, validation), planned = module(), tiers(plan), plan["trials"]
    waiting = iter(planned or ())

    class Replay(keras_tuner.Oracle):  # type: ignore[misc]
        def populate_space(self, trial_id: str) -> dict[str, Any]:
            trial = next(waiting, None)
            if trial is None:
                return {"status": TrialStatus.STOPPED, "values": None}
            return {"status": TrialStatus.RUNNING, "values": dict(trial["params"])}

    class Model(keras_tuner.HyperModel):  # type: ignore[misc]
        def build(self, hp: Any) -> Any:
            return space.build(hp)

        def fit(self, hp: Any, model: Any, *data: Any, **options: Any) -> Any:
            return model.fit(*data, batch_size=hp.get("batch_size"), **options)

    class Tuner(keras_tuner.Tuner):  # type: ignore[misc]
        def run_trial(self, trial: Any, *data: Any, **options: Any) -> Any:
            one = planned[int(trial.trial_id)]
            asked = {key: trial.hyperparameters.values[key] for key in one["params"]}
            assert asked == one["params"], f"{one} must be replayed, but KerasTuner asked for {asked}"
            return super().run_trial(trial, *data, **options | {"epochs": one["epochs"]})

    with tempfile.TemporaryDirectory() as folder:
        goal = keras_tuner.Objective(space.objective, "max")
        where = {"hypermodel": Model(), "directory": folder, "project_name": "peer"}
        if planned:
            tuner: Any = Tuner(oracle=Replay(objective=goal, max_trials=len(planned)), **where)
        else:
            where |= {"objective": goal, "max_trials": plan["count"], "seed": plan["seed"]}
            tuner = keras_tuner.RandomSearch(**where)
        clock = time.perf_counter()
        tuner.search(*train, validation_data=validation, verbose=0, epochs=plan["epochs"])
        done = {"search": time.perf_counter() - clock, "ended": time.time()}
        trials = tuner.oracle.get_best_trials(plan["count"])
        if not planned:
            tuner.load_model(trials[0]).save_weights(plan["weights"])
            done["params"] = dict(trials[0].hyperparameters.values)
    assert not planned or len(trials) == plan["count"], f"only {len(trials)} of {plan['count']} were replayed"
    return done | {"best": trials[0].score}


def optuna(plan: dict[str, Any]) -> dict[str, Any]:
    """Optuna's loop, in this process: its TPE, or the plan's trials in its place."""
    import optuna as library

    library.logging.set_verbosity(library.logging.WARNING)
    space, rows, planned = module(), tiers(plan), plan["trials"]
    best: dict[str, Any] = {"value": -1.0}

    def objective(trial: Any) -> float:
        params = planned[trial.number]["params"] if planned else flat(Suggesting(trial))
        epochs = planned[trial.number]["epochs"] if planned else plan["epochs"]
        value, model = train_one(plan, space, rows, params, epochs)
        if value > best["value"]:
            best.update(value=value, params=params, weights=model.get_weights())
        return float(value)

    study = library.create_study(direction="maximize", sampler=library.samplers.TPESampler(seed=plan["seed"]))
    clock = time.perf_counter()
    study.optimize(objective, n_trials=plan["count"])
    done = {"search": time.perf_counter() - clock, "ended": time.time(), "best": best["value"]}
    if not planned:
        model = space.build(hyperparameters(best["params"]))
        model.set_weights(best["weights"])
        model.save_weights(plan["weights"])
        done["params"] = best["params"]
    return done


class Suggesting:
    """Optuna's declarations under the names that `flat` uses."""

    def __init__(self, trial: Any) -> None:
        self._trial = trial

    def choice(self, name: str, values: list[Any]) -> Any:
        return self._trial.suggest_categorical(name, values)

    def whole(self, name: str, low: int, high: int) -> int:
        return int(self._trial.suggest_int(name, low, high))

    def stepped(self, name: str, low: float, high: float, step: float) -> float:
        return float(self._trial.suggest_float(name, low, high, step=step))

    def log(self, name: str, low: float, high: float) -> float:
        return float(self._trial.suggest_float(name, low, high, log=True))


def flat(ask: Any) -> dict[str, Any]:
    """The space of digits_mlp in another library's words; widths are powers of two, so their exponents are asked."""
    params: dict[str, Any] = {
        "batch_norm": ask.choice("batch_norm", ["none", "before", "after"]),
        "activation": ask.choice("activation", ["relu", "gelu", "tanh"]),
        "dropout": ask.stepped("dropout", 0.0, 0.5, 0.1),
        "layers": ask.whole("layers", 1, 3),
    }
    for i in range(3 if isinstance(ask, Tuned) else params["layers"]):
        exponent = ask.whole(f"units_{i}", 4, 8)
        params[f"units_{i}"] = exponent if isinstance(ask, Tuned) else 2**exponent
    params["batch_size"] = ask.choice("batch_size", [16, 32, 64, 128])
    params["learning_rate"] = ask.log("learning_rate", 1e-4, 3e-2)
    return params


class Tuned:
    """The same for Ray Tune, whose space must be known before the first trial, without conditions."""

    def __init__(self) -> None:
        from ray import tune

        self._tune = tune

    def choice(self, name: str, values: list[Any]) -> Any:
        return self._tune.choice(values)

    def whole(self, name: str, low: int, high: int) -> Any:
        return self._tune.randint(low, high + 1)

    def stepped(self, name: str, low: float, high: float, step: float) -> Any:
        return self._tune.quniform(low, high, step)

    def log(self, name: str, low: float, high: float) -> Any:
        return self._tune.loguniform(low, high)


def ray(plan: dict[str, Any]) -> dict[str, Any]:
    """Ray Tune with HyperOptSearch, one core a trial. To replay, the search has the plan's numbers as first points."""
    import ray as library
    from ray import tune
    from ray.tune.search.hyperopt import HyperOptSearch

    planned, count = plan["trials"], plan["count"]
    cores = measure.cores()
    with tempfile.TemporaryDirectory() as folder:
        # In the workers, this file is imported by name.
        env = {"env_vars": {"PYTHONPATH": f"{Path(__file__).parent}:{measure.ROOT}", "OMP_NUM_THREADS": "1"}}
        library.init(num_cpus=cores, include_dashboard=False, log_to_driver=False, runtime_env=env)
        points = [{"number": number} for number in range(count)] if planned else None
        search = HyperOptSearch(metric="score", mode="max", points_to_evaluate=points, random_state_seed=plan["seed"])
        settings = tune.TuneConfig(
            metric="score", mode="max", search_alg=search, num_samples=count, max_concurrent_trials=cores
        )
        keep = tune.RunConfig(storage_path=folder, verbose=0)
        chosen: dict[str, Any] = {"number": tune.randint(0, count)} if planned else flat(Tuned())
        clock = time.perf_counter()
        results = tune.Tuner(
            tune.with_resources(tune.with_parameters(in_ray, plan=plan, folder=folder), {"cpu": 1}),
            param_space=chosen,
            tune_config=settings,
            run_config=keep,
        ).fit()
        done = {"search": time.perf_counter() - clock, "ended": time.time()}
        assert not results.errors, results.errors[0]
        best = results.get_best_result()
        if not planned:
            Path(best.metrics["weights"]).replace(plan["weights"])
            done["params"] = unflat(best.config)
        scores = [result.metrics["score"] for result in results]
        library.shutdown()
    assert len(scores) == count, f"only {len(scores)} of {count} ran"
    return done | {"best": best.metrics["score"]}


def in_ray(config: dict[str, Any], plan: dict[str, Any], folder: str) -> None:
    """One trial in a worker of Ray's."""
    from ray import tune

    planned = plan["trials"][config["number"]] if plan["trials"] else None
    params = planned["params"] if planned else unflat(config)
    epochs = planned["epochs"] if planned else plan["epochs"]
    value, model = train_one(plan, module(), tiers(plan), params, epochs)
    said: dict[str, Any] = {"score": float(value)}
    if not planned:
        said["weights"] = str(Path(folder) / f"{np.random.default_rng().integers(1 << 62)}.weights.h5")
        model.save_weights(said["weights"])
    tune.report(said)


def unflat(config: dict[str, Any]) -> dict[str, Any]:
    """Ray's configuration in the words of the space."""
    return config | {f"units_{i}": 2 ** int(config[f"units_{i}"]) for i in range(3)}


PEERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "kerastuner": kerastuner,
    "optuna": optuna,
    "ray": ray,
}


if __name__ == "__main__":
    main()

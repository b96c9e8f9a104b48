"""The harness inside a trial-side process: one job in, messages out, nothing kept."""

from __future__ import annotations

import functools
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from search.definition.problem import Problem, SpaceModule, first_line
from search.definition.space import Parameter
from search.errors import HeldoutError, SpaceError, TrialFailed
from search.harness import failing
from search.harness.rungs import Channel, Stopped, asking

JobResult = dict[str, Any]


def main(job: dict[str, Any], channel: Channel) -> None:
    """Run one job and say how it ended; the last message is a ``result`` or a ``failed``.

    ``failed`` carries the reason for a trial, one line for people, and, when the request itself was
    wrong, the name of the class in ``errors``.
    """
    try:
        rungs = job["payload"].get("rungs")
        send = asking(channel, rungs) if rungs else channel.send
        result = JOBS[job["kind"]]({**job["payload"], "slot": job.get("slot")}, send)
    except BaseException as error:
        if not isinstance(error, failing.Told):  # whoever told has printed it
            traceback.print_exc()
        channel.send(failing.told(error, bool((job.get("slot") or {}).get("gpus"))))
    else:
        channel.send({"type": "result", **result})


def discover(payload: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> JobResult:
    """Find the parameters of a space by building it under a time cap."""
    from search.definition import backbones, tracing

    notes: list[str] = []
    try:
        with backbones.made_once() as memory:
            module = SpaceModule(Problem(**payload["problem"]))
            build = backbones.building(module.build, memory)
            space, complete = tracing.discover(build, payload["seconds"], notes.append)
    except HeldoutError:
        raise
    except Exception as error:
        raise SpaceError(
            f"{module.line(error)}: build(hp) with the defaults raised {type(error).__name__}: {first_line(error)}"
        ) from error
    return {"space": space, "complete": complete, "notes": notes}


def load(payload: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> JobResult:
    """Make the rows ready; see ``loading.load``."""
    from search.harness import loading

    return loading.load(payload, send)


class _Trial:
    """One job's module, hyperparameters, rows and model, built once."""

    def __init__(self, payload: dict[str, Any]) -> None:
        import keras

        from search.definition import assets
        from search.definition.tracing import TracingHyperParameters
        from search.harness import mended, training
        from search.processes import devices
        from search.tiers import folds
        from search.tiers.data import OpenRows

        if payload.get("slot"):
            devices.apply(payload["slot"])
        if payload.get("deterministic"):
            devices.be_deterministic()
        self.payload = payload
        assets.check(payload.get("assets"))
        mended.mend()
        self.module = SpaceModule(Problem(**payload["problem"]))
        self.hp = TracingHyperParameters(
            payload.get("proposal"), payload["seed"], payload.get("default", False), payload.get("named")
        )
        self.rows = OpenRows(Path(payload["rows"]), self.module.decode)
        if payload.get("part"):
            self.rows = folds.of_part(self.rows, payload["part"])
        keras.utils.set_random_seed(payload["seed"])
        self.preprocess = (
            keras.models.load_model(payload["preprocess"], compile=False) if payload.get("preprocess") else None
        )
        self.model = training.build(self.module, self.hp)
        if payload.get("part") and self.preprocess is None and self.module.preprocess is not None:
            self.preprocess = self.preprocessing()  # of a split that no other trial has

    def preprocessing(self) -> Any:
        """The module's preprocessing, fitted on the rows that this trial trains on; written to its folder as well."""
        import keras

        from search.harness import preprocessing

        path = Path(self.payload["folder"]) / preprocessing.NAME
        preprocessing.fit(self.module, self.rows, path, self.payload["budget"])
        return keras.models.load_model(path, compile=False)

    def fit(self, epochs: int | None, send: Callable[[dict[str, Any]], None], keep_last: bool = False) -> Any:
        """Train the model; see ``training.fit``."""
        from search.harness import training

        known = {name: self.payload[name] for name in ("objective", "direction", "budget", "seed")}
        if (minutes := self.payload.get("checkpoint_minutes")) is not None:
            known["checkpoint"] = Path(self.payload["folder"]), minutes
        known["events"] = Path(self.payload["events"]) if self.payload.get("events") else None
        given = (self.module, self.model, self.hp, self.rows, self.preprocess)
        return training.fit(*given, epochs=epochs, send=send, keep_last=keep_last, **known)

    def composed(self) -> Any:
        """One model from raw rows to predictions."""
        from search.harness import training

        return training.compose(self.model, self.preprocess, self.rows.manifest["x"])

    def written(self, path: Path) -> dict[str, Any]:
        """Write the model, preprocessing included, as one file; what is known of it."""
        from search.exports import formats
        from search.harness import preflight, training

        composed = self.composed()
        training.save(composed, path)
        preflight.refuse_secrets(path, self.module.problem.path)
        checked = formats.read_again(composed, path, self.rows)
        return {**self.described(), "custom": list(preflight.custom_objects(path)), "checked": checked}

    def described(self) -> dict[str, Any]:
        """What the driver and the scorer need to know of the model."""
        from search.scorer import declaration

        return {"asks": self.hp.asks, "declaration": declaration.declare(self.model), **self.counted()}

    def counted(self) -> dict[str, int | None]:
        """How large the model is: its weights, and the operations of one row; None where that is not known."""
        from search.harness import flops

        built = self.model.built
        return {"size": int(self.model.count_params()) if built else None, "flops": flops.count(self.model)}


def trial(payload: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> JobResult:
    """Build, fit, and predict validation and guard features with the chosen weights.

    One that was told to stop predicts nothing and leaves nothing; its result is ``asks`` and ``stopped`` alone.
    """
    if payload.get("folds"):
        from search.harness import folding

        return folding.run(payload, send)
    from search.harness import checkpoints, preflight, training
    from search.processes import devices

    folder = Path(payload["folder"])
    running: _Trial | None = None
    try:
        running = _Trial(payload)
        preflight.refuse_lambda_layers(running.model, running.module.problem.path)
        reporting = _telling(running.hp, payload.get("proposal") or {}, send)
        if payload.get("preflight"):
            send({"type": "preflight", **preflight.run(running), **running.described()})
        fitted = running.fit(payload.get("epochs"), reporting, keep_last=payload.get("keep_last", False))
        given = (running.model, running.rows, running.preprocess)
        tiers = tuple(payload.get("tiers", ("validation", "guard")))
        paths = predictions(*given, tiers, folder, payload["budget"])
        weights = folder / "model.weights.h5"
        if payload.get("weights", True):
            training.save(running.model, weights)
            preflight.refuse_secrets(weights, running.module.problem.path)
    except Stopped:
        checkpoints.remove(folder)
        return {"stopped": True} | ({"asks": []} if running is None else {"asks": running.hp.asks, **running.counted()})
    except BaseException as error:
        # What it asked for is part of the record of a failed trial too.
        if running is not None:
            send({"type": "asks", "asks": running.hp.asks})
        if isinstance(error, TrialFailed):  # of its own: to go on from before that would lead there again
            checkpoints.remove(folder)
        raise
    checkpoints.remove(folder)
    return {
        **running.described(),
        "predictions": paths,
        "weights": str(weights) if payload.get("weights", True) else None,
        "epochs": fitted.epochs,
        "best_epoch": fitted.best_epoch,
        "reported": dict(fitted.reported),
        "devices": devices.seen(),
    }


def _telling(
    hp: Any, proposal: dict[str, Any], send: Callable[[dict[str, Any]], None]
) -> Callable[[dict[str, Any]], None]:
    """``send`` that says what was asked for when that is news, so that it shows while the trial runs.

    Not before ``fit`` could ask for what is left of the proposal: until then the proposal stands, or another
    trial would be given the same batch size meanwhile.
    """
    told = 0

    def tell() -> None:
        nonlocal told
        if len(asks := hp.asks) > told:
            told = len(asks)
            send({"type": "asks", "asks": asks})

    def asked() -> None:  # by a fit that may hang afterwards, and then it is good to know with what
        if proposal.keys() <= {Parameter.from_json(ask).identity for ask in hp.asks}:
            tell()

    asked()
    hp.on_ask = asked

    def reporting(body: dict[str, Any]) -> None:
        tell()
        send(body)

    return reporting


def predictions(
    model: Any, rows: Any, preprocess: Any, tiers: tuple[str, ...], folder: Path, budget: int
) -> dict[str, list[str]]:
    """Predict tiers with one model and write one ``.npy`` (rows, ...) per tier and output; the paths by tier.

    Args:
        budget: Bytes of rows that may be in memory at a time; a larger tier is predicted part by part.
    """
    from search.harness import feeding, predicting

    paths = {}
    for tier in tiers:
        count = rows.size(tier) if rows.nbytes(tier) > budget else None
        take = functools.partial(feeding.joined, rows, tier, preprocess)
        paths[tier] = predicting.save(model, take, count, folder, tier)
    return paths


def check(payload: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> JobResult:
    """Preflight alone, and what a trial takes of time (with ``measured``, of memory and disk too), for ``check``."""
    from search.checks import cost
    from search.harness import preflight

    running = _Trial(payload)
    found = preflight.run(running)
    started = time.monotonic()
    epochs: list[float] = []
    running.fit(2, lambda body: epochs.append(time.monotonic() - started))
    first = epochs[0] if epochs else time.monotonic() - started
    return {
        **found,
        **running.described(),
        **(cost.measured(running.model, Path(payload["folder"])) if payload.get("measured") else {}),
        "epoch_seconds": epochs[-1] - first if len(epochs) > 1 else first,
    }


def sanity(payload: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> JobResult:
    """What the default model must be able to do before a search is worth while; see ``sanity.run``."""
    from search.checks import sanity as checks

    return {"findings": checks.run(_Trial(payload))}


def withhold(payload: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> JobResult:
    """Whether preprocessing learns from train rows alone; see ``withholding.run``."""
    from search.checks import withholding

    module = SpaceModule(Problem(**payload["problem"]))
    return {"findings": [withholding.run(module, Path(payload["rows"]), Path(payload["sealed"]))]}


def export(payload: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> JobResult:
    """Rebuild a trial's model around its weights and write it as one file, preprocessing included."""
    import numpy as np

    from search.harness import feeding

    running = _Trial(payload)
    if not running.model.built:  # as one without an Input is until it sees rows
        running.model(feeding.as_fed(feeding.joined(running.rows, "train", running.preprocess, np.arange(1))))
    running.model.load_weights(payload["weights"])
    return running.written(Path(payload["out"]))


def refit(payload: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> JobResult:
    """Train a trial's configuration anew on a merged copy of rows, and write it as one file; see ``final.refit``."""
    running = _Trial(payload | {"preprocess": None})
    if running.module.preprocess is not None:
        running.preprocess = running.preprocessing()
    fitted = running.fit(payload["epochs"], send, keep_last=True)
    return {
        **running.written(Path(payload["out"])),
        "epochs": fitted.epochs or payload["epochs"],  # a module's own fit may report none
        "rows": running.rows.size("train"),
    }


def merge(payload: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> JobResult:
    """Write one model around several exported files, which averages what they say; see ``merging.merged``."""
    from search.ensembles import merging
    from search.harness import preflight, training

    _get_ready(payload, payload["custom"])
    out = Path(payload["out"])
    model = merging.merged(payload["members"], payload["written"])
    training.save(model, out)
    preflight.refuse_secrets(out, Problem(**payload["problem"]).path)
    return {"size": int(model.count_params()), "custom": list(preflight.custom_objects(out))}


def _get_ready(payload: dict[str, Any], custom: Any) -> None:
    """Before a model file is read: on the slot's devices, and with the module's custom layers if it has some."""
    from search.processes import devices

    if payload.get("slot"):
        devices.apply(payload["slot"])
    if custom:
        SpaceModule(Problem(**payload["problem"]))


def convert(payload: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> JobResult:
    """Write an exported file in another format beside it, and see that it predicts the same."""
    from search.exports import formats
    from search.tiers.data import OpenRows

    _get_ready(payload, payload["custom"])
    decode = SpaceModule(Problem(**payload["problem"])).decode if payload.get("decoded") else None
    paths = Path(payload["path"]), Path(payload["out"])
    return {"checked": formats.convert(*paths, payload["format"], OpenRows(Path(payload["rows"]), decode))}


def draw(payload: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> JobResult:
    """Draw the architecture of a trial's model, preprocessing included."""
    from search.harness import architecture

    return {"drawing": architecture.draw(_Trial(payload).composed(), Path(payload["folder"]))}


def predict(payload: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> JobResult:
    """Predict with exported files; the space module runs only for its custom layers, or to decode files."""
    import keras
    import numpy as np

    from search.harness import feeding, predicting, training
    from search.processes import devices
    from search.tiers.data import OpenRows
    from search.tiers.store import open_structure

    if payload.get("slot"):
        devices.apply(payload["slot"])
    given = payload["features"] or OpenRows(Path(payload["rows"])).feature_files(payload["tier"])
    decode = None
    if payload["custom"] or given.get("files"):
        decode = SpaceModule(Problem(**payload["problem"])).decode
    rows = open_structure(given, decode)
    x = rows[:] if rows.nbytes <= payload["budget"] else None

    def take(at: Any = None) -> Any:
        return rows[at] if x is None else feeding.as_fed(x)

    out: dict[str, list[str]] = {}
    for name, path in payload["models"].items():
        model, stem = keras.models.load_model(path, compile=False), f"{name}_{payload['tier']}"
        out[name] = predicting.save(model, take, len(rows) if x is None else None, Path(payload["folder"]), stem)
    return {"predictions": out, "batch_size": training.predict_batch(rows[np.arange(1)] if x is None else x)}


def score(payload: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> JobResult:
    """Score predictions by a metric that only the compiled model knows; given sealed labels, it trains nothing."""
    from search.processes import devices
    from search.scorer import custom_metric

    if payload.get("slot"):
        devices.apply(payload["slot"])
    return custom_metric.score(payload, SpaceModule(Problem(**payload["problem"])))


def register(payload: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> JobResult:
    """Put an exported file in MLflow's registry."""
    from search.tracker import registry

    _get_ready(payload, payload["lineage"]["custom_objects"])
    path, lineage = Path(payload["path"]), payload["lineage"]
    uri = os.environ["MLFLOW_TRACKING_URI"]  # with credentials, so not in the payload
    return {"registered": registry.register_model(path, payload["name"], uri, lineage)}


JOBS: dict[str, Callable[[dict[str, Any], Callable[[dict[str, Any]], None]], JobResult]] = {
    "load": load,
    "discover": discover,
    "trial": trial,
    "check": check,
    "sanity": sanity,
    "withhold": withhold,
    "export": export,
    "refit": refit,
    "merge": merge,
    "convert": convert,
    "draw": draw,
    "predict": predict,
    "score": score,
    "register": register,
}

"""One batch through fit, predict, score and a dry-run export, before the first epoch is paid for."""

from __future__ import annotations

import inspect
import json
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

from search import feeding, scoring, training
from search.declaration import declare
from search.errors import HeldoutError, RequestError, SpaceError
from search.problem import first_line


def run(running: Any) -> dict[str, Any]:
    """Check that a trial can do all it will have to do, then leave its model as if nothing had happened.

    Args:
        running: The worker's trial: module, hyperparameters, rows, preprocessing and built model.

    Returns:
        ``reported`` (the objectives the model reports), ``objective_kind`` and ``custom`` (registered
        custom objects that a reader of the exported file must import first).

    Raises:
        SpaceError: With the line to change.
    """
    module, model, rows = running.module, running.model, running.rows
    path = module.problem.path
    count = min(
        int(running.hp.values.get("batch_size", training.DEFAULT_BATCH)),
        rows.size("train"),
        rows.size("validation"),
    )
    index = np.arange(count)
    x = feeding.as_fed(feeding.joined(rows, "train", running.preprocess, index))
    y = rows.labels("train", index)
    keep, eagerly = _snapshot(model, x), model.run_eagerly
    try:
        try:
            model.run_eagerly = True  # tracing a graph for one batch would cost more than the batch
            model.train_on_batch(x, y)
            reported = [f"val_{name}" for name in model.test_on_batch(x, y, return_dict=True)]
            predicted = model.predict_on_batch(x)
        except (HeldoutError, MemoryError):
            raise
        except Exception as error:
            raise SpaceError(
                f"{path}: one batch of {count} rows did not go through the default model: "
                f"{type(error).__name__}: {first_line(error)}"
            ) from error
        _check_objective(running.payload["objective"], reported, path)
        metric = _check_score(running, predicted, y)
        custom = _check_export(running)
    finally:
        model.run_eagerly = eagerly
        _restore(model, keep)
    return {"reported": reported, "objective_kind": metric.kind, "custom": custom}


def _snapshot(model: keras.Model, x: Any) -> list[np.ndarray]:
    if not model.built:
        model(x)
    model.optimizer.build(model.trainable_variables)
    return [np.array(v) for v in (*model.variables, *model.optimizer.variables)]


def _restore(model: keras.Model, keep: list[np.ndarray]) -> None:
    variables = (*model.variables, *model.optimizer.variables)
    for variable, value in zip(variables, keep, strict=True):
        variable.assign(value)
    model.reset_metrics()
    training.forget_functions(model)


def _check_objective(objective: str, reported: list[str], path: str) -> None:
    if objective not in reported:
        raise SpaceError(
            f"{path}: the objective must be something the model reports, but {objective!r} is not; "
            f"it reports {', '.join(sorted(reported))}: change `objective` or add the metric to "
            "model.compile(metrics=[...])"
        )


def _check_score(running: Any, predicted: Any, y: Any) -> scoring.Metric:
    declaration = declare(running.model)
    metric = scoring.resolve(running.payload["objective"], declaration)
    if metric.kind != "custom":
        names = [output["name"] for output in declaration["outputs"]]
        scoring.score(metric, declaration, scoring.in_order(predicted, names), scoring.in_order(y, names))
    return metric


def _check_export(running: Any) -> list[dict[str, str]]:
    """Write the composed model to a scratch file and see whether plain Keras could read it."""
    with tempfile.TemporaryDirectory(prefix="heldout-preflight-") as folder:
        file = Path(folder) / "model.keras"
        try:
            composed = training.compose(running.model, running.preprocess, running.rows.manifest["x"])
            training.save(composed, file)
            custom = list(custom_objects(file))
            for item in custom:
                _refuse_unregistered(item, running.module)
            keras.models.load_model(file, compile=False)
        except RequestError:
            raise
        except Exception as error:
            raise SpaceError(
                f"{running.module.problem.path}: the model could be trained but not exported: {type(error).__name__}: "
                f"{first_line(error)} (a custom layer needs get_config(); a Lambda needs a registered layer "
                "in its place)"
            ) from error
    return custom


def _refuse_unregistered(item: dict[str, str], module: Any) -> None:
    if item["registered"]:
        return
    kind = getattr(sys.modules.get(item["module"]), item["class"], None)
    line = module.problem.path
    try:
        line = f"{inspect.getsourcefile(kind)}:{inspect.getsourcelines(kind)[1]}" if kind is not None else line
    except (OSError, TypeError):
        pass
    raise SpaceError(
        f"{line}: an exported model could not be loaded again because Keras does not know the custom layer "
        f"{item['class']}; "
        f'add the line `@keras.saving.register_keras_serializable("{module.problem.name}")` above `class '
        f"{item['class']}`"
    )


def custom_objects(path: Path) -> Iterator[dict[str, str]]:
    """The custom classes that a ``.keras`` file refers to: ``class``, ``module``, and ``registered`` (empty if not)."""
    with zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read("config.json"))
    seen = set()
    for node in _objects(config):
        module, name = node.get("module") or "", node["class_name"]
        registered = node.get("registered_name") or ""
        ours = module and not module.startswith("keras") and module not in ("builtins", "numpy")
        if (ours or ">" in registered) and (module, name) not in seen:
            seen.add((module, name))
            yield {"class": name, "module": module, "registered": registered if ">" in registered else ""}


def _objects(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        if isinstance(node.get("class_name"), str) and "config" in node:
            yield node
        for part in node.values():
            yield from _objects(part)
    elif isinstance(node, list):
        for part in node:
            yield from _objects(part)

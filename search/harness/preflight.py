"""One batch through fit, predict, score and a dry-run export, before the first epoch is paid for."""

from __future__ import annotations

import inspect
import json
import math
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

from search import secrecy
from search.checks import encoding
from search.definition import lines
from search.definition.problem import first_line
from search.errors import HeldoutError, RequestError, SpaceError, TrialFailed
from search.harness import feeding, training
from search.scorer import metrics, scoring
from search.scorer.declaration import declare

_PENALTIES = "because Keras adds the penalties on weights and activations"
_UNKNOWN = "for a reason that is not known"
_LABEL_BYTES = 64 << 20  # of train labels that are looked at


def run(running: Any) -> dict[str, Any]:
    """Check that a trial can do all it will have to do, then leave its model as if nothing had happened.

    Args:
        running: The worker's trial: module, hyperparameters, rows, preprocessing and built model.

    Returns:
        ``reported`` (the objectives the model reports), ``objective_kind``, ``custom`` (registered
        custom objects that a reader of the exported file must import first) and ``disagreement``: None, or
        where Keras' value of the objective is another than the scorer's (see ``scoring.disagreement_line``).

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
            _check_encoding(running, x)
            model.train_on_batch(x, y)
            model.reset_metrics()  # not every version of Keras does so itself, and they hold the training batch
            logs = {f"val_{name}": value for name, value in model.test_on_batch(x, y, return_dict=True).items()}
            penalties = float(sum(float(keras.ops.sum(loss)) for loss in model.losses))
            predicted = model.predict_on_batch(x)
        except (HeldoutError, MemoryError):
            raise
        except Exception as error:
            raise SpaceError(
                f"{running.module.line(error)}: one batch of {count} rows did not go through the default model: "
                f"{type(error).__name__}: {first_line(error)}"
            ) from error
        reported, objective = list(logs), running.payload["objective"]
        _check_objective(objective, reported, path)
        metric, score = _check_score(running, predicted, y)
        disagreement = _disagreement(running, metric, logs[objective], score, penalties)
        custom = _check_export(running)
    finally:
        model.run_eagerly = eagerly
        _restore(model, keep)
    return {"reported": reported, "objective_kind": metric.kind, "custom": custom, "disagreement": disagreement}


def _check_encoding(running: Any, x: Any) -> None:
    """Labels of as many train rows as there is room for, since one batch need not have the odd one."""
    model, rows, declaration = running.model, running.rows, declare(running.model)
    if _has_own(model, "train_step", "compute_loss"):
        return  # which need not be about these labels
    names = [output["name"] for output in declaration["outputs"]]
    predicted = scoring.in_order(model.predict_on_batch(x), names)
    each = sum(part.nbytes for part in keras.tree.flatten(rows.labels("train", np.arange(1))))
    most = max(1, _LABEL_BYTES // max(1, each))
    index = np.unique(np.linspace(0, rows.size("train") - 1, most).astype(np.int64))
    where = lines.of_call(running.module.problem, "compile")
    try:
        labels = scoring.in_order(rows.labels("train", index), names)
    except TrialFailed as failure:
        raise SpaceError(f"{where}: {failure.message}") from failure
    encoding.check(declaration, [part.shape[1:] for part in predicted], labels, where)


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
    if f"val_{objective}" in reported:
        raise SpaceError(
            f"{path}: the objective must be measured on validation rows, but {objective!r} is the value on train "
            f'rows; write `objective = "val_{objective}"`'
        )
    if objective not in reported:
        raise SpaceError(
            f"{path}: the objective must be something the model reports, but {objective!r} is not; "
            f"it reports {', '.join(sorted(reported))}: change `objective` or add the metric to "
            "model.compile(metrics=[...])"
        )


def _check_score(running: Any, predicted: Any, y: Any) -> tuple[scoring.Metric, float | None]:
    """The objective as the scorer knows it, and its value on the batch; None if that has none."""
    declaration = declare(running.model)
    metric = scoring.resolve(running.payload["objective"], declaration)
    if metric.is_custom:
        return metric, None
    names = [output["name"] for output in declaration["outputs"]]
    labels = scoring.in_order(y, names)
    if metric.kind in metrics.RANKS and metric.output is not None:
        column = labels[metric.output].reshape(len(labels[metric.output]), -1)
        if (column == column[0]).all(axis=0).any():
            return metric, None  # one batch may be of one class, where all rows are not
    return metric, scoring.score(metric, declaration, scoring.in_order(predicted, names), labels).value


def _disagreement(
    running: Any, metric: scoring.Metric, logged: Any, score: float | None, penalties: float
) -> dict[str, Any] | None:
    if score is None or np.ndim(logged) or not math.isfinite(logged):
        return None
    keras_value = float(logged)
    if _agree(keras_value, score):
        return None
    reasons = list(_reasons(running.model, metric, penalties))
    if metric.kind == "loss" and reasons == [_PENALTIES] and not _agree(keras_value - penalties, score):
        reasons.append(_UNKNOWN)
    why = " and ".join(reasons or [_UNKNOWN])
    return {"objective": running.payload["objective"], "keras": keras_value, "scorer": score, "why": why}


def _has_own(model: keras.Model, *methods: str) -> bool:
    return any(getattr(type(model), method) is not getattr(keras.Model, method) for method in methods)


def _agree(one: float, other: float) -> bool:
    """Whether two values are the same but for rounding, of float32 in one of them."""
    return math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-6)


def _reasons(model: keras.Model, metric: scoring.Metric, penalties: float) -> Iterator[str]:
    """What is known of a model that can set Keras' value of a metric apart from the scorer's."""
    outputs = declare(model)["outputs"]
    mine = outputs if metric.output is None else [outputs[metric.output]]
    if _has_own(model, "test_step", "compute_loss"):
        yield "because the model has a test_step or compute_loss of its own"
    if metric.kind == "loss":
        if penalties and metric.output is None:
            yield _PENALTIES
        if any(output["label_smoothing"] for output in mine):
            yield "because Keras smooths the labels"
        if any(output["config"].get("reduction") == "sum" for output in mine):
            yield "because Keras adds the rows of a batch up, of which the scorer takes the mean"
        return
    if metric.config.get("label_smoothing"):
        yield "because Keras smooths the labels"
    if mine[0]["from_logits"] and "from_logits" not in metric.config:
        yield (
            "because Keras applies its threshold to logits, which it takes for probabilities"
            if metric.kind in metrics.PROPORTIONS | metrics.RATIOS
            else "because Keras takes the logits for probabilities"
        )
    if metric.kind in metrics.RANKS:
        count = metric.config.get("num_thresholds", 200)
        yield f"because Keras reads the area off {count} thresholds, while the scorer ranks the rows"


def _check_export(running: Any) -> list[dict[str, str]]:
    """Write the composed model to a scratch file and see whether plain Keras could read it."""
    with tempfile.TemporaryDirectory(prefix="heldout-preflight-") as folder:
        file = Path(folder) / "model.keras"
        try:
            composed = training.compose(running.model, running.preprocess, running.rows.manifest["x"])
            training.save(composed, file)
            refuse_lambdas(file, running.module.problem.path)
            refuse_secrets(file, running.module.problem.path)
            custom = list(custom_objects(file))
            for item in custom:
                _refuse_unregistered(item, running.module)
            keras.models.load_model(file, compile=False)
        except RequestError:
            raise
        except Exception as error:
            raise SpaceError(
                f"{running.module.problem.path}: the model could be trained but not exported: {type(error).__name__}: "
                f"{first_line(error)} (a custom layer needs get_config())"
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


def refuse_lambdas(file: Path, where: str) -> None:
    """Refuse a ``.keras`` file with a Python lambda in it, which is code that nobody should run from a file.

    Raises:
        SpaceError: With the layer's name and what to use instead.
    """
    for node in _objects(_config(file)):
        inside = node["config"].get("function") if isinstance(node["config"], dict) else None
        if isinstance(inside, dict) and inside.get("class_name") == "__lambda__":
            raise _no_lambda(where, node["config"].get("name"), node["class_name"])


def refuse_lambda_layers(model: keras.Model, where: str) -> None:
    """The same of a model, so that one which could not be exported is not trained and chosen.

    Raises:
        SpaceError: As of ``refuse_lambdas``.
    """
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.Lambda) and getattr(layer.function, "__name__", "") == "<lambda>":
            raise _no_lambda(where, layer.name, "Lambda")


def _no_lambda(where: str, name: str, kind: str) -> SpaceError:
    return SpaceError(
        f"{where}: the layer {name!r} is a {kind} around Python code, and Keras loads no code from a file; use one of "
        "Keras' own layers, keras.ops, or a layer of your own with @keras.saving.register_keras_serializable()"
    )


def refuse_secrets(file: Path, where: str) -> None:
    """Refuse, and remove, a file of weights or a model that has the value of a ``--env`` variable in it.

    Raises:
        SpaceError: With the variable's name.
    """
    if (held := secrecy.held_by(file)) is not None:
        file.unlink()
        raise SpaceError(f"{where}: a model must have no secret in it, but {held} is in a name or setting of a layer")


def custom_objects(path: Path) -> Iterator[dict[str, str]]:
    """The custom classes that a ``.keras`` file refers to: ``class``, ``module``, and ``registered`` (empty if not)."""
    seen = set()
    for node in _objects(_config(path)):
        module, name = node.get("module") or "", node["class_name"]
        registered = node.get("registered_name") or ""
        ours = module and not module.startswith("keras") and module not in ("builtins", "numpy")
        if (ours or ">" in registered) and (module, name) not in seen:
            seen.add((module, name))
            yield {"class": name, "module": module, "registered": registered if ">" in registered else ""}


def _config(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("config.json"))


def _objects(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        if isinstance(node.get("class_name"), str) and "config" in node:
            yield node
        for part in node.values():
            yield from _objects(part)
    elif isinstance(node, list):
        for part in node:
            yield from _objects(part)

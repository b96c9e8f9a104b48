"""The one scorer: predictions and labels of any tier to a score, by what the model declares of itself.

Keras' logged values are not scores: ``val_loss`` holds weight penalties and label smoothing, and
thresholds on logits are wrong. A metric that is not known here has kind "custom"; its value comes
from the Keras object, in a process of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from search.errors import SpaceError, TrialFailed
from search.scorer import metrics
from search.scorer.metrics import Array, Floats

# Reported names and the direction in which they get better; compared without underscores and case.
_MAX = """
    accuracy acc binary_accuracy categorical_accuracy sparse_categorical_accuracy top_k_categorical_accuracy
    sparse_top_k_categorical_accuracy top_k_accuracy balanced_accuracy auc roc_auc pr_auc average_precision
    precision recall f1 f1_score fbeta_score r2 r2_score mcc matthews_corrcoef cosine_similarity iou mean_iou
    binary_iou one_hot_iou one_hot_mean_iou true_positives true_negatives sensitivity_at_specificity
    specificity_at_sensitivity precision_at_recall recall_at_precision pearson_correlation
    concordance_correlation
""".split()
_MIN = """
    loss mean_squared_error mse root_mean_squared_error rmse mean_absolute_error mae
    mean_absolute_percentage_error mape mean_squared_logarithmic_error msle crossentropy ce
    binary_crossentropy bce categorical_crossentropy sparse_categorical_crossentropy
    binary_focal_crossentropy categorical_focal_crossentropy huber huber_loss log_cosh log_cosh_error
    poisson kl_divergence kld hinge squared_hinge categorical_hinge log_loss false_positives false_negatives
    error_rate
""".split()
_DIRECTIONS = {name.replace("_", ""): "max" for name in _MAX} | {name.replace("_", ""): "min" for name in _MIN}
_TURNING = frozenset({"neg", "negative", "minus", "inverse", "inv", "one"})

# How Keras and people spell the scorer's kinds.
_SPELLINGS = {
    "accuracy": ("acc",),
    "auc": ("roc_auc",),
    "average_precision": ("pr_auc",),
    "mean_squared_error": ("mse",),
    "mean_absolute_error": ("mae",),
    "mean_absolute_percentage_error": ("mape",),
    "mean_squared_logarithmic_error": ("msle",),
    "root_mean_squared_error": ("rmse",),
    "crossentropy": ("ce",),
    "binary_crossentropy": ("bce",),
    "kl_divergence": ("kld",),
    "log_cosh": ("log_cosh_error",),
    "f1_score": ("f1",),
    "r2_score": ("r2",),
    "mcc": ("matthews_corrcoef",),
}
_NAMES = {spelling.replace("_", ""): kind for kind in metrics.KINDS for spelling in (kind, *_SPELLINGS.get(kind, ()))}

# Losses whose settings change their value: trusted only where the declaration gives the settings.
_WITH_SETTINGS = frozenset({"huber", "cosine_similarity"})

# What ``metrics`` reads of a kind's settings, and what it takes where they are not given. ``from_logits`` says how to
# read predictions, but matters here for crossentropies: only probabilities are clipped, so they are no further off
# than 16, and logits are.
_READ: dict[str, dict[str, Any]] = {
    "crossentropy": {"from_logits": False},
    "binary_crossentropy": {"from_logits": False},
    "categorical_crossentropy": {"from_logits": False},
    "sparse_categorical_crossentropy": {"from_logits": False},
    "accuracy": {"threshold": 0.5},
    "binary_accuracy": {"threshold": 0.5},
    "top_k_categorical_accuracy": {"k": 5},
    "sparse_top_k_categorical_accuracy": {"k": 5},
    "auc": {"multi_label": False},
    "average_precision": {"multi_label": False},
    "precision": {"thresholds": 0.5, "class_id": None},
    "recall": {"thresholds": 0.5, "class_id": None},
    "f1_score": {"average": None, "threshold": None},
    "r2_score": {"class_aggregation": "uniform_average"},
    "huber": {"delta": 1.0},
}
# Settings of what only Keras can compute that are no part of a score: names, and how training treats rows and labels.
_NOT_READ = frozenset({"name", "dtype", "label_smoothing", "reduction"})


@dataclass(frozen=True)
class Metric:
    """A metric as the scorer computes it.

    Attributes:
        kind: The scorer's name for it, "loss" for the whole model's or one output's loss, or "custom".
        output: Position of the output it looks at; None for all.
        config: The Keras metric's own settings.
    """

    kind: str
    output: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_custom(self) -> bool:
        """Whether only the Keras object can compute it."""
        return self.kind == "custom"


@dataclass(frozen=True, eq=False)
class Score:
    """A metric on a set of rows.

    Attributes:
        metric: What was computed.
        value: In the metric's own units.
        losses: Per example, lower is better, shape (rows,); squared errors for RMSE. None for metrics
            that are no mean over examples.
        parts: What each example contributes (see ``metrics``), shape (rows, columns).
    """

    metric: Metric
    value: float
    losses: Floats | None
    parts: Floats


def direction_for(objective: str, explicit: str | None = None) -> str:
    """ "min" or "max", whichever way ``objective`` gets better.

    Args:
        objective: A reported name such as "val_accuracy" or "val_OUTPUT_accuracy".
        explicit: The module's own ``direction``; it wins.

    Raises:
        SpaceError: If the name is unknown and no direction is given.
    """
    if explicit is not None:
        if explicit not in ("min", "max"):
            raise SpaceError(
                f'direction must be "min" or "max", but got {explicit!r}; change `direction` in the module'
            )
        return explicit
    words = objective.removeprefix("val_").split("_")
    if words[-1].isdigit() and len(words) > 1:
        words.pop()  # Keras numbers a metric that is built twice
    for start in range(len(words)):
        way = _DIRECTIONS.get("".join(words[start:]).lower())
        if way and not _TURNING.intersection(word.lower() for word in words[:start]):
            return way
    raise SpaceError(
        f"it must be known whether a higher {objective} is better, but that name is not in the table; "
        'add `direction = "max"` or `direction = "min"` to the module'
    )


def resolve(objective: str, declaration: Mapping[str, Any]) -> Metric:
    """The metric that ``objective`` names in a model.

    Args:
        objective: A name that Keras reports on validation rows, such as "val_accuracy".
        declaration: ``outputs`` (``name``, ``loss``, ``from_logits``, ``weight``, …) in the order of
            predictions, and ``metrics`` (``output``, ``name``, ``kind``, ``config``).

    Raises:
        SpaceError: If the model does not report it, listing what it does report.
    """
    reported = _reported(declaration)
    if objective not in reported:
        raise SpaceError(
            f"the objective must be a value that the model reports on validation, but {objective!r} is not; "
            f"it reports {', '.join(reported)}: change `objective` or add it to model.compile(metrics=[...])"
        )
    return reported[objective]


def _reported(declaration: Mapping[str, Any]) -> dict[str, Metric]:
    return _reported_losses(declaration) | _reported_metrics(declaration)


def _reported_losses(declaration: Mapping[str, Any]) -> dict[str, Metric]:
    outputs = declaration["outputs"]
    kinds = [loss_kind(output) for output in outputs]
    found = {"val_loss": Metric("loss" if all(kinds) else "custom")}
    for at, (output, kind) in enumerate(zip(outputs, kinds, strict=True)):
        if len(outputs) > 1:
            found[f"val_{output['name']}_loss"] = Metric("loss" if kind else "custom", at)
    return found


def _reported_metrics(declaration: Mapping[str, Any]) -> dict[str, Metric]:
    names = [output["name"] for output in declaration["outputs"]]
    several = len(names) > 1
    found = {}
    for metric in declaration["metrics"]:
        of, name = metric.get("output"), metric["name"]
        number = names.index(of) if of in names else None if several else 0
        if several and of is not None and not name.startswith(f"{of}_"):
            name = f"{of}_{name}"
        config = dict(metric.get("config") or {})
        found[f"val_{name}"] = Metric(_metric_kind(metric["kind"], config, number), number, config)
    return found


def meaning(objective: str, declaration: Mapping[str, Any]) -> dict[str, Any]:
    """What a score by ``objective`` depends on besides predictions and labels; compare scores where it is equal.

    Args:
        objective: As for ``resolve``; ``declaration`` as well.

    Returns:
        JSON by words for people, the most telling first: what is computed, of which output, and the settings that
        the scorer reads; for losses, of every output. A metric that only Keras knows means what it declares.

    Raises:
        SpaceError: As ``resolve``.
    """
    metric, outputs = resolve(objective, declaration), declaration["outputs"]
    if objective in _reported_metrics(declaration):
        config = dict(metric.config)
        if metric.output is not None and not metric.is_custom:
            config.setdefault("from_logits", bool(outputs[metric.output].get("from_logits")))
        return {"metric": metric.kind, "output": metric.output, **_settings(metric.kind, config)}
    found: dict[str, Any] = {}
    for number in range(len(outputs)) if metric.output is None else [metric.output]:
        output, kind = outputs[number], loss_kind(outputs[number])
        config = dict(output.get("config") or {}) | {"from_logits": bool(output.get("from_logits"))}
        known: dict[str, Any] = {"loss": kind or output.get("loss") or config.get("name")}
        if metric.output is None:
            known["weight"] = float(output.get("weight", 1.0))
        known |= _settings(kind or "custom", config)
        place = "" if len(outputs) == 1 else f" of output {number}"
        found |= {f"{name}{place}": value for name, value in known.items()}
    return found | {"output": metric.output, "computed by": "Keras" if metric.is_custom else "the scorer"}


def _settings(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a metric or loss that its value depends on."""
    if kind == "custom":
        return {name: value for name, value in config.items() if name not in _NOT_READ}
    return {name: config.get(name, usual) for name, usual in _READ.get(kind, {}).items()}


def _canonical(name: str) -> str | None:
    """The scorer's name for a Keras metric or loss, however it is spelled; None if it has none."""
    return _NAMES.get(name.replace("_", "").lower())


def loss_kind(output: Mapping[str, Any]) -> str | None:
    """The scorer's name for the loss of a declared output; None if only Keras knows it."""
    kind = _canonical(output["loss"]) if output.get("loss") else None
    if kind not in metrics.LOSSES or kind in _WITH_SETTINGS and "config" not in output:
        return None
    return kind


def _metric_kind(kind: str, config: Mapping[str, Any], output: int | None) -> str:
    """The scorer's kind, or "custom" where a setting asks for what it does not compute."""
    known = _canonical(kind)
    thresholds = config.get("thresholds")
    if (
        known is None
        or output is None
        or config.get("num_regressors")
        or isinstance(thresholds, list | tuple)
        or config.get("axis", -1) != -1
        or config.get("ignore_class") is not None
        or (known in ("precision", "recall") and config.get("top_k") is not None)
        # The class keras.metrics.Accuracy compares for equality; the string "accuracy" is what is known here.
        or (known == "accuracy" and "dtype" in config)
    ):
        return "custom"
    return "average_precision" if known == "auc" and config.get("curve") == "PR" else known


def score(metric: Metric, declaration: Mapping[str, Any], predictions: Any, labels: Any) -> Score:
    """Score predictions against labels; the same function for validation, guard and test rows.

    Args:
        metric: From ``resolve``; not a custom one.
        predictions: One array of shape (rows, ...), or a list of them in the order of the outputs.
        labels: Likewise, as ``load()`` gave them.

    Returns:
        The score. Sample weights, weight penalties and label smoothing play no part in it.

    Raises:
        TrialFailed: ``invalid`` if rows or shapes do not match, ``nan`` if a prediction is not finite.
    """
    parts = parts_of(metric, declaration, predictions, labels)
    mean = metric.kind not in metrics.RANKS and metric.kind not in metrics.RATIOS
    return Score(metric, _finite(value_of(metric, parts)), parts[:, 0] if mean else None, parts)


def parts_of(metric: Metric, declaration: Mapping[str, Any], predictions: Any, labels: Any) -> Floats:
    """What each row contributes to a score (see ``metrics``), shape (rows, columns).

    Args and errors are those of ``score``; parts may be there where the score has no value, see ``value_of``.
    """
    if metric.is_custom:
        raise ValueError("a custom metric is computed by its Keras object, in a scoring process, not by score()")
    outputs = declaration["outputs"]
    predicted, truth = _listed(predictions, outputs), _listed(labels, outputs)
    wanted = range(len(outputs)) if metric.output is None else [metric.output]
    for number in wanted:
        _check(outputs[number], predicted[number], truth[number])
    if metric.kind == "loss":
        total = np.zeros((len(predicted[0]), 1))
        for number in wanted:
            weight = 1.0 if metric.output is not None else float(outputs[number].get("weight", 1.0))
            total += weight * _loss(outputs[number], predicted[number], truth[number])
        return total
    (number,) = wanted
    logits = bool(outputs[number].get("from_logits"))
    return _parts(metric.kind, metric.config, truth[number], predicted[number], logits)


def value_of(metric: Metric, parts: Array) -> float:
    """The metric's value from parts of any rows, shape (rows, columns).

    Raises:
        TrialFailed: ``invalid`` where it has none, such as AUC over rows of one class.
    """
    if metric.kind in metrics.RANKS:
        return metrics.rank_value(metric.kind, metric.config, parts)
    return float(metrics.combine(metric.kind, metric.config, parts.mean(axis=0)))


def disagreement_line(found: Mapping[str, Any]) -> str | None:
    """What preflight found of a value that Keras and the scorer see differently, in plain words; None if they agree.

    Args:
        found: Preflight's message, or the answer of ``check``. Its ``disagreement`` is None or has ``objective``,
            ``keras`` and ``scorer`` (the two values on one batch) and ``why``.
    """
    differing = found.get("disagreement")
    if differing is None:
        return None
    return (
        f"{differing['objective']} on one batch is {differing['keras']:.5g} by Keras and {differing['scorer']:.5g} by "
        f"the scorer, {differing['why']}; trials are compared, and the winner chosen, by the scorer's value, while the "
        "epoch within a trial is chosen by Keras'"
    )


def in_order(structure: Any, names: Sequence[str]) -> list[Array]:
    """One array (rows, ...) per output: a dict by the outputs' names, a list or tuple as it comes, an array as one.

    Raises:
        TrialFailed: ``invalid`` if a dict lacks an output.
    """
    if isinstance(structure, dict):
        if missing := [name for name in names if name not in structure]:
            raise TrialFailed(
                "invalid",
                f"labels must be named like the outputs {', '.join(names)}, but there are only "
                f"{', '.join(structure)}, without {missing[0]}; rename them in load()",
            )
        return [np.asarray(structure[name]) for name in names]
    return [np.asarray(part) for part in (structure if isinstance(structure, list | tuple) else [structure])]


def _finite(value: float) -> float:
    if not np.isfinite(value):
        raise TrialFailed("nan", f"the score must be finite, but it is {value}; try a lower learning rate")
    return value


def _loss(output: Mapping[str, Any], predicted: Array, labels: Array) -> Floats:
    kind = loss_kind(output)
    assert kind is not None, "resolve() calls a loss that is not known here custom"
    return _parts(kind, output.get("config") or {}, labels, predicted, bool(output.get("from_logits")))


def _parts(kind: str, config: Mapping[str, Any], labels: Array, predicted: Array, logits: bool) -> Floats:
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is told by _finite
        return metrics.parts(kind, config, labels, predicted.astype(np.float64), logits)


def _listed(values: Any, outputs: Sequence[Mapping[str, Any]]) -> list[Array]:
    listed = [np.asarray(v) for v in values] if isinstance(values, list | tuple) else [np.asarray(values)]
    if len(listed) != len(outputs):
        raise TrialFailed(
            "invalid",
            f"there must be one array for each of {len(outputs)} outputs, but there are {len(listed)}",
        )
    return listed


def _check(output: Mapping[str, Any], predicted: Array, labels: Array) -> None:
    name = output["name"]
    if predicted.ndim == 0 or len(predicted) != len(labels):
        rows = 0 if predicted.ndim == 0 else len(predicted)
        raise TrialFailed("invalid", f"{name} must have one prediction per row, but has {rows} for {len(labels)} rows")
    if not np.isfinite(predicted).all():
        bad = int((~np.isfinite(predicted.reshape(len(predicted), -1)).all(axis=1)).sum())
        raise TrialFailed(
            "nan",
            f"predictions must be finite, but {name} has {bad} bad rows of {len(predicted)}; try a lower learning rate",
        )

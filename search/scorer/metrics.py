"""What one example contributes to each metric, and how contributions add up to its value.

A metric is a matrix of parts, one row per example: one column for means, counts per class for F1, sums of
squares for R². Its value is a function of the columns' means, so that resampled and weighted rows are
scored without predictions. AUC and average precision depend on ranks: their parts are labels and scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.errors import TrialFailed

Array = NDArray[Any]
Floats = NDArray[np.float64]
Codes = NDArray[np.int64]
Config = Mapping[str, Any]

EPSILON = 1e-7

PROPORTIONS = frozenset(
    {
        "accuracy",
        "binary_accuracy",
        "categorical_accuracy",
        "sparse_categorical_accuracy",
        "top_k_categorical_accuracy",
        "sparse_top_k_categorical_accuracy",
    }
)
RANKS = frozenset({"auc", "average_precision"})
RATIOS = frozenset({"r2_score", "precision", "recall", "f1_score", "mcc", "balanced_accuracy"})
ROOTS = frozenset({"root_mean_squared_error"})


def higher_is_better(kind: str) -> bool:
    """Whether a larger value of a metric is a better one."""
    return kind in PROPORTIONS | RANKS | RATIOS or kind == "cosine_similarity"


def parts(kind: str, config: Config, labels: Array, predicted: Array, logits: bool) -> Floats:
    """Each example's contribution.

    Args:
        kind: One of the names below.
        config: The Keras metric's own settings.
        labels: Shape (rows, ...), as ``load()`` gave them.
        predicted: Shape (rows, ...), float64 and finite.
        logits: Whether ``predicted`` comes before the sigmoid or softmax.

    Returns:
        Shape (rows, columns).

    Raises:
        TrialFailed: ``invalid`` if labels and predictions do not go together.
    """
    logits = bool(config.get("from_logits", logits))
    if predicted.ndim == 1:
        predicted = predicted[:, None]
    if kind in PROPORTIONS:
        return _column(1.0 - _hits(kind, config, labels, predicted, logits))
    if kind in RANKS:
        y, p = _like(labels, predicted), predicted
        return np.concatenate([y.reshape(len(y), -1), p.reshape(len(p), -1)], axis=1).astype(np.float64)
    if kind in RATIOS:
        return _RATIO_PARTS[kind](config, labels, predicted, logits)
    if kind in ROOTS:
        kind = "mean_squared_error"
    if kind in _CROSSENTROPIES:
        return _column(_crossentropy(kind, labels, predicted, logits))
    return _column(_ELEMENTWISE[kind](_like(labels, predicted).astype(np.float64), predicted, config))


def combine(kind: str, config: Config, means: Array) -> Any:
    """The metric's value, from the means of its parts over rows (any leading axes stay); a loss is a mean.

    Args:
        means: Shape (..., columns).

    Returns:
        Shape (...).
    """
    if kind in PROPORTIONS:
        return 1.0 - means[..., 0]
    if kind in ROOTS:
        return np.sqrt(means[..., 0])
    if kind in RATIOS:
        return _RATIO_VALUES[kind](config, means)
    return -means[..., 0] if kind == "cosine_similarity" else means[..., 0]


def rank_value(kind: str, config: Config, rows: Array) -> float:
    """AUC or average precision of rows of parts, shape (rows, 2 x outputs): labels, then scores.

    Raises:
        TrialFailed: ``invalid`` if only one class is among the rows.
    """
    width = rows.shape[1] // 2
    labels, scores = rows[:, :width] > 0.5, rows[:, width:]
    if not config.get("multi_label"):
        labels, scores = labels.reshape(-1, 1), scores.reshape(-1, 1)
    if (labels == labels[0]).all(axis=0).any():
        raise TrialFailed("invalid", f"{kind} needs rows of two classes, but there is one among {len(rows)} rows")
    value = _auc if kind == "auc" else _average_precision
    return float(np.mean([value(labels[:, k], scores[:, k]) for k in range(labels.shape[1])]))


def _auc(labels: Array, scores: Array) -> float:
    """The Mann-Whitney form, which is 20 times as fast as tracing the curve: bootstraps need thousands."""
    from scipy.stats import rankdata

    positives = int(labels.sum())
    above = float(rankdata(scores)[labels].sum()) - positives * (positives + 1) / 2
    return above / (positives * (len(labels) - positives))


def _average_precision(labels: Array, scores: Array) -> float:
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(labels, scores))


def _column(values: Array) -> Floats:
    """The mean over all axes but the first, as one column."""
    column: Floats = values.reshape(len(values), -1).mean(axis=1, dtype=np.float64)
    return column[:, None]


def _like(labels: Array, predicted: Array) -> Array:
    """Labels in the shape of the predictions; only axes of length 1 may differ."""
    ours, theirs = labels.shape[1:], predicted.shape[1:]
    if [d for d in ours if d != 1] != [d for d in theirs if d != 1]:
        raise TrialFailed(
            "invalid",
            f"predictions must have the labels' shape {ours} per row, but have {theirs}; "
            "change the last layer or the labels in load()",
        )
    return labels.reshape(predicted.shape)


def _is_sparse(labels: Array, predicted: Array) -> bool:
    """Keras' own rule for telling class numbers from one-hot rows."""
    return predicted.shape[-1] > 1 and (labels.ndim < predicted.ndim or labels.shape[-1] == 1)


def _numbers(labels: Array, predicted: Array) -> Codes:
    """Class numbers, from class numbers or one-hot rows, in the shape of predictions less the last axis."""
    classes = predicted.shape[-1]
    if not _is_sparse(labels, predicted):
        hot: Codes = _like(labels, predicted).argmax(axis=-1)
        return hot
    if labels.size != predicted.size // classes:
        raise TrialFailed(
            "invalid",
            f"there must be one label per prediction, but labels are {labels.shape} and predictions "
            f"{predicted.shape}; change the last layer or the labels in load()",
        )
    numbers: Codes = labels.reshape(predicted.shape[:-1]).astype(np.int64)
    low, high = int(numbers.min()), int(numbers.max())
    if low < 0 or high >= classes:
        raise TrialFailed(
            "invalid",
            f"class numbers must be 0 to {classes - 1} for {classes} outputs, but go from {low} to {high}; "
            "number the classes from 0, or give the last layer more units",
        )
    return numbers


def _threshold(config: Config, logits: bool) -> float:
    """The border between no and yes: 0 on logits, unless the user set another than Keras' 0.5."""
    given = config.get("threshold", config.get("thresholds"))
    value = 0.5 if given is None else float(given)
    return 0.0 if logits and value == 0.5 else value


def _hits(kind: str, config: Config, labels: Array, predicted: Array, logits: bool) -> Array:
    if kind == "accuracy" and predicted.shape[-1] == 1 or kind == "binary_accuracy":
        return np.equal(predicted > _threshold(config, logits), _like(labels, predicted))
    # Top-k and plain accuracy take class numbers and one-hot rows alike, as the labels' shape tells.
    numbers = _numbers(labels, predicted)
    if "top_k" in kind:
        own = np.take_along_axis(predicted, numbers[..., None], axis=-1)
        above: Codes = (predicted > own).sum(axis=-1)
        hits: Array = np.less(above, int(config.get("k", 5)))
    else:
        hits = np.equal(predicted.argmax(axis=-1), numbers)
    return hits


_CROSSENTROPIES = frozenset(
    {"crossentropy", "binary_crossentropy", "categorical_crossentropy", "sparse_categorical_crossentropy"}
)


def _crossentropy(kind: str, labels: Array, predicted: Floats, logits: bool) -> Floats:
    """Natural-log loss; probabilities are clipped as Keras clips them, logits are not."""
    loss: Floats
    if kind == "binary_crossentropy" or kind == "crossentropy" and predicted.shape[-1] == 1:
        y = _like(labels, predicted).astype(np.float64)
        if logits:
            loss = np.logaddexp(0.0, predicted) - y * predicted
        else:
            p = np.clip(predicted, EPSILON, 1 - EPSILON)
            loss = -(y * np.log(p) + (1 - y) * np.log1p(-p))
        return loss
    if logits:
        shifted = predicted - predicted.max(axis=-1, keepdims=True)
        logs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    else:
        total = predicted.sum(axis=-1, keepdims=True)
        logs = np.log(np.clip(predicted / np.where(total == 0, 1.0, total), EPSILON, 1 - EPSILON))
    if _is_sparse(labels, predicted):
        loss = -np.take_along_axis(logs, _numbers(labels, predicted)[..., None], axis=-1)[..., 0]
    else:
        loss = -(_like(labels, predicted) * logs).sum(axis=-1)
    return loss


def _huber(y: Floats, p: Floats, config: Config) -> Floats:
    delta, error = float(config.get("delta", 1.0)), np.abs(p - y)
    loss: Floats = np.where(error <= delta, 0.5 * error**2, delta * error - 0.5 * delta**2)
    return loss


def _unit(vectors: Floats) -> Floats:
    unit: Floats = vectors / np.sqrt(np.maximum((vectors**2).sum(axis=-1, keepdims=True), EPSILON**2))
    return unit


def _signs(y: Floats) -> Floats:
    """Labels as -1 and 1, as the hinge losses want them."""
    return 2 * y - 1 if np.isin(y, (0, 1)).all() else y


def _divergence(y: Floats, p: Floats, _: Config) -> Floats:
    y, p = np.clip(y, EPSILON, 1), np.clip(p, EPSILON, 1)
    loss: Floats = (y * np.log(y / p)).sum(axis=-1)
    return loss


# Losses of (labels, predictions, config), both of one shape; axes after the first are averaged.
_ELEMENTWISE: dict[str, Callable[[Array, Array, Config], Array]] = {
    "mean_squared_error": lambda y, p, _: (p - y) ** 2,
    "mean_absolute_error": lambda y, p, _: np.abs(p - y),
    "mean_absolute_percentage_error": lambda y, p, _: 100 * np.abs((y - p) / np.maximum(np.abs(y), EPSILON)),
    "mean_squared_logarithmic_error": lambda y, p, _: (
        (np.log1p(np.maximum(p, EPSILON)) - np.log1p(np.maximum(y, EPSILON))) ** 2
    ),
    "huber": _huber,
    "log_cosh": lambda y, p, _: np.logaddexp(p - y, y - p) - np.log(2),
    "poisson": lambda y, p, _: p - y * np.log(p + EPSILON),
    "kl_divergence": _divergence,
    "hinge": lambda y, p, _: np.maximum(1 - _signs(y) * p, 0),
    "squared_hinge": lambda y, p, _: np.maximum(1 - _signs(y) * p, 0) ** 2,
    "categorical_hinge": lambda y, p, _: np.maximum(((1 - y) * p).max(axis=-1) - (y * p).sum(axis=-1) + 1, 0),
    "cosine_similarity": lambda y, p, _: -(_unit(y) * _unit(p)).sum(axis=-1),
}


def _yes_no(config: Config, labels: Array, predicted: Array, logits: bool) -> tuple[Array, Array]:
    """Truth and guess per row and column, for precision and recall: every column is a question of its own."""
    truth = _like(labels, predicted) > 0.5
    guess = predicted > _threshold(config, logits)
    if config.get("class_id") is not None:
        at = int(config["class_id"])
        truth, guess = truth[..., at], guess[..., at]
    return truth.reshape(len(truth), -1), guess.reshape(len(guess), -1)


def _precision_parts(config: Config, labels: Array, predicted: Array, logits: bool) -> Floats:
    truth, guess = _yes_no(config, labels, predicted, logits)
    return np.stack([(truth & guess).sum(1), guess.sum(1), truth.sum(1)], axis=1).astype(np.float64)


def _one_hot(config: Config, labels: Array, predicted: Array, logits: bool, several: bool) -> tuple[Array, Array]:
    """Truth and guess per row and class, shape (rows, classes); two classes for one column if ``several``."""
    if predicted.ndim != 2:
        raise TrialFailed("invalid", f"one prediction per example is needed, but a row has shape {predicted.shape[1:]}")
    classes = predicted.shape[1]
    if classes == 1:
        truth = _like(labels, predicted) > 0.5
        guess = predicted > _threshold(config, logits)
        return (np.hstack([~truth, truth]), np.hstack([~guess, guess])) if several else (truth, guess)
    if config.get("threshold") is not None:
        return _like(labels, predicted) > 0.5, predicted > _threshold(config, logits)
    rows = np.eye(classes, dtype=bool)
    sparse = _is_sparse(labels, predicted)
    truth = rows[_numbers(labels, predicted)] if sparse else _like(labels, predicted) > 0.5
    return truth, rows[predicted.argmax(axis=1)]


def _f1_parts(config: Config, labels: Array, predicted: Array, logits: bool) -> Floats:
    truth, guess = _one_hot(config, labels, predicted, logits, several=False)
    return np.hstack([truth & guess, guess, truth]).astype(np.float64)


def _class_parts(config: Config, labels: Array, predicted: Array, logits: bool) -> Floats:
    truth, guess = _one_hot({}, labels, predicted, logits, several=True)
    return np.hstack([truth & guess, guess, truth]).astype(np.float64)


def _r2_parts(config: Config, labels: Array, predicted: Array, logits: bool) -> Floats:
    y = _like(labels, predicted).reshape(len(labels), -1).astype(np.float64)
    error = (predicted.reshape(len(labels), -1) - y) ** 2
    # No shift by the mean, though it would save digits: parts of two tiers are added up.
    return np.hstack([error, y, y**2])


_RATIO_PARTS: dict[str, Callable[[Config, Array, Array, bool], Floats]] = {
    "precision": _precision_parts,
    "recall": _precision_parts,
    "f1_score": _f1_parts,
    "mcc": _class_parts,
    "balanced_accuracy": _class_parts,
    "r2_score": _r2_parts,
}


def _ratio(above: Array, below: Array) -> Array:
    """0 where there is nothing to divide by, as Keras and scikit-learn have it."""
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def _thirds(means: Array) -> tuple[Array, Array, Array]:
    k = means.shape[-1] // 3
    return means[..., :k], means[..., k : 2 * k], means[..., 2 * k :]


def _f1_value(config: Config, means: Array) -> Array:
    both, guess, truth = _thirds(means)
    average = config.get("average")
    if average == "micro":
        both, guess, truth = (part.sum(axis=-1, keepdims=True) for part in (both, guess, truth))
    each = _ratio(2 * both, guess + truth)
    if average == "weighted":
        return _ratio((each * truth).sum(axis=-1), truth.sum(axis=-1))
    value: Array = each.mean(axis=-1)
    return value


def _mcc_value(_: Config, means: Array) -> Array:
    both, guess, truth = _thirds(means)
    above = both.sum(axis=-1) - (guess * truth).sum(axis=-1)
    spread = (1 - (guess**2).sum(axis=-1)) * (1 - (truth**2).sum(axis=-1))
    # Rounding leaves a spread of 1e-17 where all rows are of one class.
    return _ratio(above, np.sqrt(np.where(spread > 1e-15, spread, 0.0)))


def _balanced_value(_: Config, means: Array) -> Array:
    both, _guess, truth = _thirds(means)
    return _ratio(_ratio(both, truth).sum(axis=-1), (truth > 0).sum(axis=-1).astype(np.float64))


def has_spread(means: Array) -> Array:
    """Whether labels vary, from the means of R²'s parts; rounding leaves some spread where they do not.

    Returns:
        Shape (..., outputs).
    """
    _, mean, square = _thirds(means)
    varies: Array = np.greater(square - mean**2, 1e-12 * square)
    return varies


def _r2_value(config: Config, means: Array) -> Array:
    error, mean, square = _thirds(means)
    spread = np.where(has_spread(means), square - mean**2, 0.0)
    each = np.where(spread > 0, 1 - _ratio(error, spread), np.where(error > 0, 0.0, 1.0))
    if config.get("class_aggregation") == "variance_weighted_average":
        return _ratio((each * spread).sum(axis=-1), spread.sum(axis=-1))
    value: Array = each.mean(axis=-1)
    return value


_RATIO_VALUES: dict[str, Callable[[Config, Array], Array]] = {
    "precision": lambda _, m: _ratio(m[..., 0], m[..., 1]),
    "recall": lambda _, m: _ratio(m[..., 0], m[..., 2]),
    "f1_score": _f1_value,
    "mcc": _mcc_value,
    "balanced_accuracy": _balanced_value,
    "r2_score": _r2_value,
}

LOSSES = frozenset({*_CROSSENTROPIES, *_ELEMENTWISE})
KINDS = PROPORTIONS | RANKS | RATIOS | ROOTS | LOSSES

"""What a loss is by chance alone: of a model that knows how labels are distributed, and nothing of the rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from search.scorer import metrics
from search.scorer.metrics import Array, Floats

_MOST_COLUMNS = 64  # of labels, each of which is searched for its best constant
_MOST_ROWS = 10_000


@dataclass(frozen=True)
class Chance:
    """What is known of a loss without looking at a row.

    Attributes:
        informed: The loss of the best constant prediction, such as the entropy of the labels or their variance.
        fresh: The loss of a model with no preference, such as ln C for C classes; never below ``informed``.
        perfect: The least that the loss can be on these labels.
        allowed: The most that a sound model may start at: first weights are random, and so are its first outputs.
        why: ``informed`` and ``fresh`` in words and numbers.
    """

    informed: float
    fresh: float
    perfect: float
    allowed: float
    why: str


def of(kind: str, config: Mapping[str, Any], labels: Array, shape: tuple[int, ...]) -> Chance | None:
    """Chance by one output's loss; None where no constant says it, as with cosine similarity.

    Args:
        kind: The scorer's name of the loss; config: its settings.
        labels: Of train rows, as ``load()`` gave them, shape (rows, ...).
        shape: Of the output's predictions for one row.
    """
    if len(labels) > _MOST_ROWS:
        labels = labels[np.linspace(0, len(labels) - 1, _MOST_ROWS).astype(np.int64)]
    units = shape[-1] if shape else 1
    if kind == "crossentropy":
        kind = "binary_crossentropy" if units == 1 else "categorical_crossentropy"
    if kind in ("categorical_crossentropy", "sparse_categorical_crossentropy"):
        return _classes(labels, units)
    if kind == "binary_crossentropy":
        return _yes_and_no(labels)
    if kind in ("hinge", "squared_hinge"):
        return _signs(kind, labels)
    if kind in ("categorical_hinge", "cosine_similarity", "kl_divergence"):
        return None
    return _values(kind, config, labels)


def together(parts: list[tuple[float, Chance]]) -> Chance:
    """Chance by a weighted sum of losses."""
    if len(parts) == 1 and parts[0][0] == 1.0:
        return parts[0][1]

    def total(name: str) -> float:
        return sum(weight * float(getattr(part, name)) for weight, part in parts)

    why = " + ".join(f"{weight:g} · ({part.why})" for weight, part in parts)
    return Chance(total("informed"), total("fresh"), total("perfect"), total("allowed"), why)


def _classes(labels: Array, units: int) -> Chance:
    """Class numbers, or rows of shares that sum to 1: H(labels) to ln C."""
    if labels.ndim > 1 and labels.shape[-1] == units and units > 1:
        rows = labels.reshape(-1, units).astype(np.float64)
        shares, perfect = rows.mean(axis=0), float(np.mean(_entropy(rows)))
    else:
        shares, perfect = np.bincount(labels.reshape(-1).astype(np.int64), minlength=units) / labels.size, 0.0
    informed, fresh = float(_entropy(shares)), math.log(units)
    said = f"ln {units} = {fresh:.4g}"
    if informed < 0.98 * fresh:
        said += f", or {informed:.4g}, the entropy of the labels, once it knows how often each is"
    # Logits of a standard deviation of 1.4, as Glorot's first weights make them from inputs of 1, add 1 at most.
    return Chance(informed, fresh, perfect, fresh + 1.0, said)


def _yes_and_no(labels: Array) -> Chance:
    columns = labels.reshape(len(labels), -1).astype(np.float64)
    shares, fresh = columns.mean(axis=0), math.log(2)
    informed = float(np.mean(_entropy(np.stack([shares, 1 - shares], axis=-1))))
    perfect = float(np.mean(_entropy(np.stack([columns, 1 - columns], axis=-1))))
    said = f"ln 2 = {fresh:.4g}"
    if informed < 0.98 * fresh:
        said += f", or {informed:.4g}, the entropy of the labels, once it knows how often each is"
    return Chance(informed, fresh, perfect, fresh + 0.7, said)


def _signs(kind: str, labels: Array) -> Chance:
    y = labels.astype(np.float64)
    share = float((y > 0).mean())
    informed = 2 * min(share, 1 - share) if kind == "hinge" else 4 * share * (1 - share)
    return Chance(informed, 1.0, 0.0, 3.0, "1, the loss of an output of 0")


def _values(kind: str, config: Mapping[str, Any], labels: Array) -> Chance | None:
    """The best constant for each column. One output of a loss of values: variance for MSE, and so on."""
    y = labels.reshape(len(labels), -1).astype(np.float64)

    def loss(predicted: Floats, at: Array = y) -> float:
        with np.errstate(all="ignore"):
            return float(metrics.parts(kind, config, at, predicted, False).mean())

    if kind == "mean_squared_error":
        best, said = y.mean(axis=0), "the variance of the target"
    elif kind == "mean_absolute_error":
        best, said = np.median(y, axis=0), "the target's mean distance from its median"
    elif y.shape[1] > _MOST_COLUMNS:
        return None
    else:
        from scipy.optimize import minimize_scalar

        def best_of(column: Floats) -> float:
            low, high = float(column.min()), float(column.max())
            if low == high:
                return low
            at = column[:, None]
            found = minimize_scalar(lambda c: loss(np.full_like(at, c), at), bounds=(low, high), method="bounded")
            return float(found.x)

        best, said = np.array([best_of(column) for column in y.T]), "what the best constant prediction gives"
    informed, perfect = loss(np.broadcast_to(best, y.shape)), loss(y)
    # First outputs have up to twice the variance of the inputs, and a target that is scaled has 1: three in all.
    times = {"mean_squared_error": 4.0, "mean_absolute_error": 2.0}.get(kind, 3.0)
    allowed = perfect + times * (informed - perfect)
    return Chance(informed, informed, perfect, allowed, f"{informed:.4g}, {said}")


def _entropy(shares: Floats) -> Floats:
    """Of shares along the last axis, in nats."""
    p = np.clip(shares, 0.0, 1.0)
    out: Floats = -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1)
    return out

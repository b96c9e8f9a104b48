"""AUC and average precision of weighted rows, for many weightings of one model's rows at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from search.scorer.metrics import Array, Floats


def weighted(kind: str, config: Mapping[str, Any], rows: Array, weights: Floats) -> Floats:
    """What ``metrics.rank_value`` says of rows that are repeated as often as their weights.

    Args:
        kind: "auc" or "average_precision".
        rows: Parts, shape (rows, 2 x outputs): labels, then scores.
        weights: Shape (rows, weightings).

    Returns:
        Shape (weightings,); nan where all the weight is on one class.
    """
    width = rows.shape[1] // 2
    labels, scores = rows[:, :width] > 0.5, rows[:, width:]
    value = _auc if kind == "auc" else _average_precision
    if not config.get("multi_label"):
        if width > 1:
            weights = np.repeat(weights, width, axis=0)
        return value(labels.ravel(), scores.ravel(), weights)
    each = [value(labels[:, k], scores[:, k], weights) for k in range(width)]
    mean: Floats = np.mean(each, axis=0)
    return mean


def _auc(labels: Array, scores: Array, weights: Floats) -> Floats:
    """The share of pairs in which the positive row has the higher score; a tie is half a pair."""
    order = np.argsort(scores[~labels])
    negatives = scores[~labels][order]
    below = _running(weights[~labels][order])
    positive, at = weights[labels], scores[labels]
    beaten = below[np.searchsorted(negatives, at, "left")] + below[np.searchsorted(negatives, at, "right")]
    pairs = positive.sum(axis=0) * below[-1]
    return _over(np.einsum("ij,ij->j", positive, beaten) / 2, pairs)


def _average_precision(labels: Array, scores: Array, weights: Floats) -> Floats:
    """Precision at each positive row's score, averaged over positive rows."""
    order = np.argsort(-scores)
    ranked, positive = -scores[order], weights[labels]
    # How many rows have at least the score of each positive one; ties come in together.
    reach = np.searchsorted(ranked, -scores[labels], "right")
    rows = _running(weights[order])
    right = _running(weights[order] * labels[order, None])
    precision = np.divide(right[reach], rows[reach], out=np.zeros_like(positive), where=rows[reach] > 0)
    value = _over(np.einsum("ij,ij->j", positive, precision), right[-1])
    value[right[-1] == rows[-1]] = np.nan
    return value


def _running(weights: Floats) -> Floats:
    """Sums of the first 0, 1, 2, … rows."""
    sums = np.zeros((len(weights) + 1, weights.shape[1]))
    np.cumsum(weights, axis=0, out=sums[1:])
    return sums


def _over(above: Floats, below: Floats) -> Floats:
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)

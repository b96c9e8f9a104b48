"""Bounded metrics with few errors: whether there are few, and the exact interval of what their value rests on.

Resampling and the jackknife show no more errors than there are, and none where there are none.
"""

from __future__ import annotations

import numpy as np

from search.guard.intervals import FEW_ERRORS, Interval, share_interval
from search.scorer import metrics
from search.scorer.metrics import Array, Codes
from search.scorer.scoring import Metric, Score


def is_few(score: Score, units: Codes | None) -> bool:
    """Whether fewer than 10 of the rows that a bounded metric rests on are wrong, or right; of a unit it counts one.

    Args:
        units: Number of each row's group or block, shape (rows,); None where rows are independent.
    """
    if bounds(score.metric) is None:
        return False
    _, wrong, right = _rows(score)
    return min(_count(wrong, units), _count(right, units)) < FEW_ERRORS


def exact_interval(score: Score, units: Codes | None, level: float) -> Interval | None:
    """Clopper-Pearson over the effective count of rows that a bounded metric rests on; None for other metrics.

    Those are all rows for accuracies, what it divides by for precision and recall, and the rarest class for AUC,
    average precision, F1 (by truth or guess), MCC and balanced accuracy. Without errors a unit counts as one row,
    since rows of a unit may be wrong together; errors that are spread over units make it count as more.

    Args:
        units: As for ``is_few``.
    """
    limits = bounds(score.metric)
    if limits is None:
        return None
    rows, wrong, _ = _rows(score)
    count = 0.0
    if rows.any():
        size = float(rows.sum()) / _count(rows, units)
        # Wrong rows per unit that has any, as if one more unit were all wrong.
        together = (float(wrong.sum()) + size) / (_count(wrong, units) + 1)
        count = float(rows.sum()) / together
        if wrong.any() and _is_over_classes(score.metric):
            _, _, truth = np.split(score.parts, 3, axis=1)
            count *= int((truth > 0).any(axis=0).sum())  # classes as sure as the rarest at least, averaged
    low, high = limits
    share = min(max((score.value - low) / (high - low), 0.0), 1.0)
    least, most = (low + (high - low) * end for end in share_interval(share, count, level))
    return Interval(least, most, f"Clopper-Pearson over an effective count of {count:.3g}", level)


def bounds(metric: Metric) -> tuple[float, float] | None:
    """The least and the most that a metric can be; None if it has no two ends."""
    if metric.kind == "mcc":
        return -1.0, 1.0
    bounded = metrics.PROPORTIONS | metrics.RANKS | metrics.RATIOS - {"r2_score"}
    return (0.0, 1.0) if metric.kind in bounded else None


def _rows(score: Score) -> tuple[Array, Array, Array]:
    """Which rows the metric rests on, which of these have an error, and which a success."""
    asked, wrong, right = _asked(score)
    sizes = asked.sum(axis=0)
    rarest = int(np.where(sizes > 0, sizes, len(asked) + 1).argmin())
    return asked[:, rarest], wrong[:, rarest], right[:, rarest]


def _asked(score: Score) -> tuple[Array, Array, Array]:
    """The same three for each class that there is, shape (rows, classes)."""
    kind, parts = score.metric.kind, score.parts
    if kind in metrics.RANKS:
        labels, scores = np.split(parts, 2, axis=1)
        positive = labels > 0.5
        least, most = (np.where(positive, scores, end) for end in (np.inf, -np.inf))
        below, above = (np.where(positive, end, scores) for end in (np.inf, -np.inf))
        # An error is a row that some row of the other class beats or ties with, a success one that beats some.
        beaten = np.where(positive, scores <= above.max(axis=0), scores >= least.min(axis=0))
        beats = np.where(positive, scores > below.min(axis=0), scores < most.max(axis=0))
        sides = np.hstack([positive, ~positive])
        return sides, sides & np.tile(beaten, 2), sides & np.tile(beats, 2)
    if kind in metrics.PROPORTIONS:
        asked, got = np.ones((len(parts), 1)), 1 - parts[:, :1]
    else:
        both, guess, truth = np.split(parts, 3, axis=1)
        asked, got = {"precision": guess, "f1_score": np.maximum(guess, truth)}.get(kind, truth), both
        if score.metric.config.get("average") in ("micro", "weighted"):
            asked, got = (matrix.sum(axis=1, keepdims=True) for matrix in (truth, both))
    return np.greater(asked, 0), np.greater(asked, got), np.greater(got, 0)


def _is_over_classes(metric: Metric) -> bool:
    return metric.kind in ("f1_score", "mcc", "balanced_accuracy") and metric.config.get("average") not in (
        "micro",
        "weighted",
    )


def _count(rows: Array, units: Codes | None) -> int:
    """How many rows, or units that have one of these rows."""
    return int(rows.sum()) if units is None else len(np.unique(units[rows]))

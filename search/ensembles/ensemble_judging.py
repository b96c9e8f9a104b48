"""What an ensemble is worth by guard rows that did not choose its weights, and how alike its members are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from search.ensembles import blending
from search.ensembles.blending import Blend
from search.errors import TrialFailed
from search.guard import statistics
from search.guard.candidates import Candidate, Pool, parts_of
from search.guard.evaluation import compared
from search.scorer import scoring
from search.scorer.metrics import PROPORTIONS, RANKS, RATIOS, Codes, Floats
from search.scorer.scoring import Metric, Score

_ALPHA = 0.05  # of the intervals


def alike(blend: Blend, trials: Sequence[int], weights: Floats) -> dict[str, Any]:
    """How alike the members are: correlations of their errors by row, or of what they predict for rank metrics."""
    at = np.flatnonzero(weights)
    kind = blend.metric.kind
    columns = []
    for one in np.eye(len(weights))[at]:
        if kind in RANKS | RATIOS:
            columns.append(np.concatenate([out.ravel() for out in blend.outputs(one, blend.metric.output)]))
        else:
            columns.append(blend.parts(one)[:, 0])
    return {
        "of": "predictions" if kind in RANKS | RATIOS else "errors" if kind in PROPORTIONS else "losses",
        "trials": [trials[int(k)] for k in at],
        "table": blending.correlations(columns),
    }


def judged(
    blend: Blend, pool: Pool, tiers: Mapping[str, int], size: int, spread: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What each way to find weights, and the rule that chooses a single model, is worth by rows it did not look at.

    Args:
        pool: What the single winner is chosen from.
        spread: Dependence of guard rows, ``groups`` and ``ordered``.

    Returns:
        None if guard rows cannot be divided, as where all are one group.
    """
    rows, count = tiers["guard"], blend.count
    units = statistics.units_of(rows, **spread)
    if units is None and spread["groups"] is not None:
        return None  # one group
    folds = blending.folds(rows, units, ordered=spread["groups"] is None and spread["ordered"])
    if folds.max() == 0:
        return None
    first = min(size, count)

    def padded(weights: Floats) -> Floats:
        return np.concatenate([weights, np.zeros(count - len(weights))])

    def simplex(at: Codes) -> Floats:
        some = blend.on(at)
        return padded(blending.nelder_mead(lambda weights: some.loss(padded(weights)), first))

    def single(at: Codes) -> Candidate:
        weights = np.zeros((rows, 1))
        weights[at] = 1
        return pool.runs[int(pool.first_best(pool.scores(pool.runs, tiers["validation"], weights))[0])]

    ways: dict[str, tuple[Callable[[Codes], Any], Callable[[Any], Floats]]] = {
        "ensemble": (lambda at: blending.greedy(blend.on(at).loss, count, size), blend.parts),
        "average": (lambda _: padded(np.full(first, 1 / first)), blend.parts),
        "nelder_mead": (simplex, blend.parts),
        "single": (single, lambda run: np.asarray(parts_of(run), np.float64)),
    }
    parts = {name: blending.cross_fitted(folds, fit, judge) for name, (fit, judge) in ways.items()}
    scores = {name: _score(blend.metric, part, folds) for name, part in parts.items()}
    gains: dict[str, Any] = {}
    for name in ("ensemble", "average", "nelder_mead"):
        gains[name] = None
        if blend.metric.kind not in RANKS and np.isfinite([scores[name].value, scores["single"].value]).all():
            gains[name] = compared(scores[name], scores["single"], _ALPHA, spread)
    return {
        "folds": int(folds.max()) + 1,
        "rows": rows,
        "level": 1 - _ALPHA,
        "scores": {name: score.value if np.isfinite(score.value) else None for name, score in scores.items()},
        "gains": gains,
    }


def _score(metric: Metric, parts: Floats, folds: Codes) -> Score:
    """Over all rows; for rank metrics the mean over folds, since models of two folds do not rank rows alike."""

    def value(some: Floats) -> float:
        try:
            return scoring.value_of(metric, some)
        except TrialFailed:
            return math.nan

    if metric.kind in RANKS:
        sizes, of_fold = np.bincount(folds), [value(parts[folds == fold]) for fold in range(folds.max() + 1)]
        known = np.isfinite(of_fold)
        mean = float(np.average(np.array(of_fold)[known], weights=sizes[known])) if known.any() else math.nan
        return Score(metric, mean, None, parts)
    return Score(metric, value(parts), None if metric.kind in RATIOS else parts[:, 0], parts)

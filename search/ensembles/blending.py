"""Blends: predictions of several models averaged by weights, three ways to find these, and how to judge them fairly.

What is averaged is what a score is made of: probabilities where a model says probabilities or logits, values where it
says values. A blend of models that say logits says logits again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from search.errors import RequestError, TrialFailed
from search.scorer import scoring
from search.scorer.metrics import EPSILON, Array, Codes, Floats
from search.scorer.scoring import Metric

VALUES, SOFTMAX, SIGMOID = "values", "softmax", "sigmoid"
FOLDS = 5
_ROUNDING = 1e-12
_EVALUATIONS = 100  # of a loss per model, before Nelder-Mead has to stop

Loss = Callable[[Floats], float]


def scales(declaration: Mapping[str, Any], metric: Metric) -> list[str]:
    """How each output of a model is to be read: as values, or as logits before a softmax or a sigmoid.

    Raises:
        RequestError: For logits of which neither loss nor metric says what makes probabilities of them.
    """
    found = []
    for number, output in enumerate(declaration["outputs"]):
        names, logits = [str(output.get("loss"))], bool(output.get("from_logits"))
        if metric.output == number:
            names, logits = [*names, metric.kind], bool(metric.config.get("from_logits", logits))
        kinds = [SIGMOID if "binary" in name else SOFTMAX for name in names if "crossentropy" in name]
        if logits and not kinds:
            raise RequestError(
                f"to average logits, the loss must say what makes probabilities of them, but the loss of "
                f"{output['name']} is none of Keras' crossentropies; end the model in a softmax or a sigmoid"
            )
        found.append(kinds[0] if logits else VALUES)
    return found


def average(arrays: Sequence[Array], weights: Floats, read: Sequence[str], written: str) -> Floats:
    """One output of several models, averaged.

    Args:
        arrays: Of each model, shape (rows, ...).
        weights: One per model, 0 or more; their sum is 1.
        read: How each array is to be read, see ``scales``.
        written: How the average is to be read.
    """
    used = [(array, scale, w) for array, scale, w in zip(arrays, read, weights, strict=True) if w > 0]
    if written == VALUES:
        return np.asarray(sum(w * _probabilities(array, scale) for array, scale, w in used), np.float64)
    from scipy.special import logsumexp

    share = np.array([w for *_, w in used])

    def log_mean(is_yes: bool) -> Floats:
        logs = np.stack([_log_probabilities(array, scale, is_yes) for array, scale, _ in used], axis=-1)
        return np.asarray(logsumexp(logs, axis=-1, b=share))

    return log_mean(True) if written == SOFTMAX else log_mean(True) - log_mean(False)


def _probabilities(array: Array, scale: str) -> Floats:
    from scipy import special

    known = {VALUES: lambda z: z, SOFTMAX: lambda z: special.softmax(z, axis=-1), SIGMOID: special.expit}
    return np.asarray(known[scale](np.asarray(array, np.float64)))


def _log_probabilities(array: Array, scale: str, is_yes: bool) -> Floats:
    """Of yes or, for a sigmoid, of no."""
    from scipy import special

    array = np.asarray(array, np.float64)
    if scale == SOFTMAX:
        return np.asarray(special.log_softmax(array, axis=-1))
    if scale == SIGMOID:
        return np.asarray(special.log_expit(array if is_yes else -array))
    clipped = np.clip(array, EPSILON, 1 - EPSILON)
    return np.asarray(np.log(clipped if is_yes else 1 - clipped))


class Blend:
    """Models on the rows of one tier, and what any weighting of them is worth there.

    Args:
        metric: Not one that only Keras can compute.
        direction: "min" or "max", whichever way it gets better.
        declaration: What a blend declares of itself.
        predictions: Per model and output, shape (rows, ...).
        read: Per model, see ``scales``.
        labels: Per output.
    """

    def __init__(
        self,
        metric: Metric,
        direction: str,
        declaration: Mapping[str, Any],
        predictions: Sequence[Sequence[Array]],
        read: Sequence[Sequence[str]],
        labels: Sequence[Array],
    ) -> None:
        self.metric, self.count = metric, len(predictions)
        self._direction, self._declaration, self._labels = direction, declaration, labels
        self._predictions, self._read, self._written = predictions, read, scales(declaration, metric)

    def on(self, rows: Codes) -> Blend:
        """The same models on some of the rows; nothing of the others is in it."""
        predictions = [[array[rows] for array in one] for one in self._predictions]
        labels = [array[rows] for array in self._labels]
        return Blend(self.metric, self._direction, self._declaration, predictions, self._read, labels)

    def outputs(self, weights: Floats, only: int | None = None) -> list[Floats]:
        """Per output, shape (rows, ...); those besides ``only``, if that is given, are not averaged and of no use."""
        return [
            average([one[at] for one in self._predictions], weights, [one[at] for one in self._read], written)
            if only in (None, at)
            else self._predictions[0][at]
            for at, written in enumerate(self._written)
        ]

    def parts(self, weights: Floats) -> Floats:
        """What each row contributes to the score (see ``metrics.parts``), shape (rows, columns)."""
        outputs = self.outputs(weights, self.metric.output)
        return scoring.parts_of(self.metric, self._declaration, outputs, self._labels)

    def loss(self, weights: Floats) -> float:
        """The metric of a weighting, turned so that less is better; infinite where it has no value."""
        try:
            value = scoring.value_of(self.metric, self.parts(weights))
        except TrialFailed:  # such as an AUC over rows of one class
            return math.inf
        return (-value if self._direction == "max" else value) if math.isfinite(value) else math.inf


def greedy(loss: Loss, count: int, size: int) -> Floats:
    """Weights by greedy selection with replacement, multiples of 1 / picks.

    Caruana, Niculescu-Mizil, Crew, Ksikes 2004, "Ensemble selection from libraries of models": begin with the best
    model, add again and again the one that makes the average best, and keep the best average on the way. So on these
    rows no single model is better. Ties go to the model picked least often so far, then to the first; of equally good
    averages the one of more models is kept, as it varies less.

    Args:
        loss: Of weights.
        count: How many models there are, the preferred ones first.
        size: How many picks at most.

    Returns:
        Shape (count,); their sum is 1.
    """
    picks, best, least = np.zeros(count), np.zeros(count), math.inf
    for step in range(1, size + 1):
        tried = np.array([loss((picks + one) / step) for one in np.eye(count)])
        now = float(tried.min())
        tied = np.flatnonzero(tried <= now + _margin(now))
        picks[tied[np.argmin(picks[tied])]] += 1
        if step == 1 or now <= least + _margin(least):
            best, least = picks / step, min(now, least)
    return best


def _margin(value: float) -> float:
    return _ROUNDING * abs(value) if math.isfinite(value) else 0.0


def nelder_mead(loss: Loss, count: int) -> Floats:
    """Weights by Nelder and Mead's simplex search from equal ones; equal ones if it finds none that are better.

    Args:
        loss: Of weights; need not be smooth.
        count: How many models there are.

    Returns:
        Shape (count,), each 0 or more; their sum is 1.
    """
    from scipy import optimize

    even = np.full(count, 1 / count)

    def weights(raw: Floats) -> Floats:
        total = np.abs(raw).sum()
        return np.abs(raw) / total if total > 0 else even

    found = optimize.minimize(
        lambda raw: loss(weights(raw)),
        even,
        method="Nelder-Mead",
        options={
            # Far enough apart for losses that are the same in steps, such as shares of rows.
            "initial_simplex": np.vstack([even, even + np.eye(count) / 2]),
            "maxfev": _EVALUATIONS * count,
            "xatol": 1e-3,
            "fatol": 1e-9,
        },
    )
    return weights(found.x) if found.fun < loss(even) else even


def folds(rows: int, units: Codes | None, ordered: bool, count: int = FOLDS, seed: int = 0) -> Codes:
    """Which fold each row belongs to, from 0; rows of one unit are in one fold, and folds are about equally large.

    Args:
        units: Number of each row's group or block (see ``statistics.units_of``); None where rows are independent.
        ordered: Units come in order of time; each fold is a stretch of it then.
    """
    units = np.arange(rows) if units is None else units
    sizes = np.bincount(units)
    count = min(count, len(sizes))
    of_unit = np.zeros(len(sizes), dtype=np.int64)
    if ordered:
        of_unit = np.arange(len(sizes)) * count // len(sizes)
        return np.asarray(of_unit[units])
    filled = np.zeros(count)
    order = np.random.default_rng(seed).permutation(len(sizes))
    for unit in order[np.argsort(-sizes[order], kind="stable")]:  # large ones first, each to the emptiest fold
        of_unit[unit] = filled.argmin()
        filled[of_unit[unit]] += sizes[unit]
    return np.asarray(of_unit[units])


def cross_fitted(fold_of: Codes, fit: Callable[[Codes], Any], judge: Callable[[Any], Floats]) -> Floats:
    """What each row contributes to a score by what was fitted without it and its fold.

    Args:
        fold_of: See ``folds``; two folds or more.
        fit: From the numbers of the rows that it may look at.
        judge: From what was fitted to what each row contributes, shape (rows, columns).

    Returns:
        Shape (rows, columns).
    """
    out: Floats | None = None
    for fold in np.unique(fold_of):
        held = fold_of == fold
        parts = judge(fit(np.flatnonzero(~held)))
        out = np.empty_like(parts, dtype=np.float64) if out is None else out
        out[held] = parts[held]
    assert out is not None, "there are rows"
    return out


def correlations(columns: Sequence[Floats]) -> list[list[float | None]]:
    """Of each pair of columns, such as two models' errors by row; None where one of them does not vary."""
    spread = [float(np.ptp(column)) > 0 for column in columns]
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.atleast_2d(np.corrcoef(np.stack(columns)))
    return [
        [float(found[a, b]) if spread[a] and spread[b] else None for b in range(len(columns))]
        for a in range(len(columns))
    ]

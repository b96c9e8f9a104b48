"""Intervals: how far a test score, or a winner's gain over the baseline, could lie from the truth.

What SciPy has is SciPy's; DeLong, Newcombe and the mid-p are written out because no well-kept library
has them. Every function takes its confidence level, since later openings of a test set need wider ones.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from search import metrics
from search.errors import TrialFailed
from search.metrics import Array, Floats
from search.scoring import Metric, Score, value_of

_FEW_ERRORS = 10
_CLOSED_FORM_ROWS = 50_000
_BATCH = 200
_BATCH_VALUES = 200_000  # of single values: what stays in the processor's cache is twice as fast
_RANK_DRAWS = 1_000

Codes = NDArray[np.int64]


@dataclass(frozen=True)
class Interval:
    """A confidence interval in the metric's own units; ``method`` says in words how it was made."""

    low: float
    high: float
    method: str
    level: float


@dataclass(frozen=True)
class Difference:
    """Winner against baseline on the same rows, turned so that positive is an improvement.

    Attributes:
        estimate: The gain.
        low, high: Its confidence interval.
        p: Two-sided p-value against no gain (McNemar mid-p, DeLong), None where there is no such test.
    """

    estimate: float
    low: float
    high: float
    method: str
    level: float
    p: float | None


def test_interval(
    score: Score, *, level: float = 0.95, groups: Array | None = None, ordered: bool = False, seed: int = 0
) -> Interval:
    """The confidence interval of one model's score.

    Proportions: Wilson, or Clopper-Pearson with fewer than 10 errors or successes. AUC: DeLong. All
    else: BCa bootstrap, above 50,000 rows the closed form.

    Args:
        groups: One value per row; whole groups are resampled then.
        ordered: Rows come in order of time; blocks of neighbours are resampled then.
        seed: Of the bootstrap; the same seed gives the same interval.
    """
    units = _units(len(score.parts), groups, ordered)
    found = _interval(score, units, level, seed)
    return found if units is not None or groups is None else dataclasses.replace(found, method=_alone(found.method))


def _interval(score: Score, units: Codes | None, level: float, seed: int) -> Interval:
    if units is None and _is_yes_no(score):
        n = len(score.parts)
        return proportion_interval(n - round(float(score.parts[:, 0].sum())), n, level=level)
    if score.metric.kind in metrics.RANKS:
        if units is None and _suits_delong(score):
            return _auc_interval(score.parts[:, 0] > 0.5, score.parts[:, 1], level)
        values = _drawn(lambda at: value_of(score.metric, score.parts[at]), len(score.parts), units, seed)
        low, high = np.quantile(values, _tails(level))
        return Interval(float(low), float(high), f"percentile bootstrap{_of(units)}", level)

    def value(means: Array) -> Any:
        return metrics.combine(_kind(score.metric), score.metric.config, means)

    return _resampled(score.parts, value, units, level, seed)


def standard_error(score: Score, *, groups: Array | None = None, ordered: bool = False) -> float:
    """The standard error of one model's score, in the metric's own units.

    Functions of means: the jackknife, which is s/√n for a mean. AUC of one output: DeLong. Other rank metrics, and
    all of them on groups: the bootstrap's standard deviation. Where that is 0, as with all rows right, it is the half
    width of ``test_interval`` over its z; 0 is left where that is a point too, as for constant losses.

    Args:
        groups, ordered: As for ``test_interval``.
    """
    units = _units(len(score.parts), groups, ordered)
    metric, error = score.metric, 0.0
    if metric.kind not in metrics.RANKS:
        error = _totals(score.parts, lambda m: metrics.combine(_kind(metric), metric.config, m), units).error
    elif units is None and _suits_delong(score):
        variance = float(delong(score.parts[:, 0] > 0.5, score.parts[None, :, 1])[1][0, 0])
        error = math.sqrt(variance) if variance > 1e-15 else 0.0
    else:
        error = float(_drawn(lambda at: value_of(metric, score.parts[at]), len(score.parts), units, 0).std())
    if error > 0:
        return error
    found = _interval(score, units, 0.95, 0)
    return (found.high - found.low) / 2 / _z(0.95)


def paired_difference(
    winner: Score,
    baseline: Score,
    *,
    level: float = 0.95,
    groups: Array | None = None,
    ordered: bool = False,
    seed: int = 0,
) -> Difference:
    """The gain of a winner over a baseline that was scored on the same rows.

    AUC: paired DeLong. All else: paired BCa bootstrap, with McNemar's mid-p for proportions.

    Args:
        groups, ordered, seed: As for ``test_interval``.

    Raises:
        ValueError: If the two were scored by different metrics or on different numbers of rows.
    """
    if winner.metric != baseline.metric or len(winner.parts) != len(baseline.parts):
        raise ValueError(
            f"a pair must be scored by one metric on the same rows, but got {winner.metric.kind} on "
            f"{len(winner.parts)} and {baseline.metric.kind} on {len(baseline.parts)} rows"
        )
    units = _units(len(winner.parts), groups, ordered)
    found = _difference(winner, baseline, units, level, seed)
    return found if units is not None or groups is None else dataclasses.replace(found, method=_alone(found.method))


def _difference(winner: Score, baseline: Score, units: Codes | None, level: float, seed: int) -> Difference:
    metric = winner.metric
    kind, config, sign = _kind(metric), metric.config, 1.0 if metrics.higher_is_better(metric.kind) else -1.0
    estimate = sign * (winner.value - baseline.value)
    if kind in metrics.RANKS:
        if units is None and _suits_delong(winner):
            return _auc_difference(winner.parts, baseline.parts, level)
        values = _drawn(
            lambda at: value_of(metric, winner.parts[at]) - value_of(metric, baseline.parts[at]),
            len(winner.parts),
            units,
            seed,
        )
        low, high = np.quantile(values, _tails(level))
        return Difference(estimate, float(low), float(high), f"paired percentile bootstrap{_of(units)}", level, None)
    width = winner.parts.shape[1]

    def gain(means: Array) -> Any:
        ours, theirs = means[..., :width], means[..., width:]
        return sign * (metrics.combine(kind, config, ours) - metrics.combine(kind, config, theirs))

    if winner.losses is not None and baseline.losses is not None and kind not in metrics.ROOTS:
        fewer = (baseline.losses - winner.losses)[:, None]  # the same gain from one column, which is faster
        found = _resampled(fewer, lambda means: means[..., 0], units, level, seed)
    else:
        found = _resampled(np.hstack([winner.parts, baseline.parts]), gain, units, level, seed)
    p = None
    if units is None and _is_yes_no(winner) and _is_yes_no(baseline):
        won = (winner.parts[:, 0] < baseline.parts[:, 0]).sum()
        lost = (winner.parts[:, 0] > baseline.parts[:, 0]).sum()
        p = mcnemar(int(won), int(lost)).mid_p
    return Difference(estimate, found.low, found.high, f"paired {found.method}", level, p)


def proportion_interval(successes: int, rows: int, *, level: float = 0.95, method: str | None = None) -> Interval:
    """A proportion's interval: "wilson", or "exact" (Clopper-Pearson) with few errors or few successes.

    Args:
        method: One of the two, to override the choice.
    """
    if method is None:
        method = "exact" if min(successes, rows - successes) < _FEW_ERRORS else "wilson"
    found = stats.binomtest(successes, rows).proportion_ci(confidence_level=level, method=method)
    return Interval(
        float(found.low), float(found.high), {"exact": "Clopper-Pearson", "wilson": "Wilson"}[method], level
    )


def newcombe(successes: int, rows: int, other_successes: int, other_rows: int, *, level: float = 0.95) -> Difference:
    """First proportion less the second, on different rows.

    Newcombe 1998, "Interval estimation for the difference between independent proportions", method 10.
    """
    p, q = successes / rows, other_successes / other_rows
    a = proportion_interval(successes, rows, level=level, method="wilson")
    b = proportion_interval(other_successes, other_rows, level=level, method="wilson")
    low = p - q - math.hypot(p - a.low, b.high - q)
    high = p - q + math.hypot(a.high - p, q - b.low)
    return Difference(p - q, low, high, "Newcombe", level, None)


@dataclass(frozen=True)
class McNemar:
    """Two-sided p-values: ``exact``, and ``mid_p``, which is not conservative."""

    exact: float
    mid_p: float


def mcnemar(won: int, lost: int) -> McNemar:
    """Whether two models that disagree on ``won + lost`` rows are right equally often on them.

    Fagerland, Lydersen, Laake 2013, "The McNemar test for binary matched-pairs data".
    """
    if won == lost:
        return McNemar(1.0, 1.0)
    fewer = min(won, lost)
    exact = float(stats.binomtest(fewer, won + lost).pvalue)
    return McNemar(exact, exact - float(stats.binom.pmf(fewer, won + lost, 0.5)))


def delong(labels: Array, scores: Array) -> tuple[Floats, Floats]:
    """AUCs of several scores of the same rows, and the covariance of these AUCs.

    Sun and Xu 2014, "Fast implementation of DeLong's algorithm".

    Args:
        labels: Shape (rows,), true for positives; at least two rows of each class.
        scores: Shape (models, rows).

    Returns:
        Shapes (models,) and (models, models).
    """
    positive, negative = scores[:, labels], scores[:, ~labels]
    m, n = positive.shape[1], negative.shape[1]
    together = stats.rankdata(np.concatenate([positive, negative], axis=1), axis=1)
    aucs = (together[:, :m].sum(axis=1) / m - (m + 1) / 2) / n
    over_negatives = (together[:, :m] - stats.rankdata(positive, axis=1)) / n
    over_positives = 1 - (together[:, m:] - stats.rankdata(negative, axis=1)) / m
    covariance = np.cov(over_negatives) / m + np.cov(over_positives) / n
    return aucs, np.atleast_2d(covariance)


def _auc_interval(labels: Array, scores: Array, level: float) -> Interval:
    (auc,), ((variance,),) = delong(labels, scores[None])
    if variance > 1e-15:
        low, high = auc + np.array([-1, 1]) * _z(level) * math.sqrt(variance)
        return Interval(max(0.0, float(low)), min(1.0, float(high)), "DeLong", level)
    if 0 < auc < 1:
        return Interval(float(auc), float(auc), "constant scores", level)
    # A perfect ranking has no variance to show, yet it is perfect on so many disjoint pairs only.
    pairs = int(min(labels.sum(), (~labels).sum()))
    exact = proportion_interval(round(auc * pairs), pairs, level=level, method="exact")
    return Interval(exact.low, exact.high, "Clopper-Pearson over disjoint pairs", level)


def _auc_difference(ours: Array, theirs: Array, level: float) -> Difference:
    labels = ours[:, 0] > 0.5
    aucs, covariance = delong(labels, np.stack([ours[:, 1], theirs[:, 1]]))
    gain = float(aucs[0] - aucs[1])
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    if not variance > 1e-15:
        return Difference(gain, gain, gain, "paired DeLong", level, 1.0 if gain == 0 else None)
    error = math.sqrt(variance)
    half = _z(level) * error
    p = float(2 * stats.norm.sf(abs(gain) / error))
    return Difference(gain, gain - half, gain + half, "paired DeLong", level, p)


def _kind(metric: Metric) -> str:
    """A loss is a mean like any other."""
    return "mean_squared_error" if metric.kind == "loss" else metric.kind


def _suits_delong(score: Score) -> bool:
    """Whether it is the AUC of one output with two rows of each class, fewer show no variance."""
    if score.metric.kind != "auc" or score.parts.shape[1] != 2:
        return False
    return int(np.bincount(score.parts[:, 0] > 0.5, minlength=2).min()) > 1


def _is_yes_no(score: Score) -> bool:
    column = score.parts[:, 0]
    return score.metric.kind in metrics.PROPORTIONS and bool(((column == 0) | (column == 1)).all())


def _z(level: float) -> float:
    return float(stats.norm.ppf(0.5 + level / 2))


def _tails(level: float) -> tuple[float, float]:
    return 0.5 - level / 2, 0.5 + level / 2


def _units(rows: int, groups: Array | None, ordered: bool) -> Codes | None:
    """What is resampled: number of the group or block of each row, or None for single rows.

    One group shows nothing of how groups vary, so its rows count singly and the method says so.
    """
    if groups is not None:
        units = np.unique(groups, return_inverse=True)[1].astype(np.int64)
    elif ordered:
        units = np.arange(rows) // math.ceil(rows ** (1 / 3))
    else:
        return None
    return units if units.max() > 0 else None


def _alone(method: str) -> str:
    return f"{method}, too narrow: all rows are one group"


def _of(units: Codes | None) -> str:
    return "" if units is None else f" of {int(units.max()) + 1} groups of rows"


def _drawn(value: Callable[[Array], float], rows: int, units: Codes | None, seed: int) -> Floats:
    """Values on resampled rows or units; draws in which the metric has no value are drawn again."""
    rng = np.random.default_rng(seed)
    members = None
    if units is not None:
        order = np.argsort(units, kind="stable")
        members = np.split(order, np.flatnonzero(np.diff(units[order])) + 1)
    values: list[float] = []
    for _ in range(20 * _RANK_DRAWS):
        if members is None:
            at = rng.integers(0, rows, rows)
        else:
            at = np.concatenate([members[k] for k in rng.integers(0, len(members), len(members))])
        try:
            values.append(value(at))
        except TrialFailed:
            continue
        if len(values) == _RANK_DRAWS:
            break
    return np.array(values or [value(np.arange(rows))])


@dataclass(frozen=True)
class _Totals:
    """Sums of parts and rows per row or unit, shape (units, columns + 1), and what follows from them."""

    sums: Floats
    of: Callable[[Array], Floats]  # the value of any totals
    whole: float
    error: float  # the jackknife's; 0 for constant data


def _totals(parts: Floats, value: Callable[[Array], Any], units: Codes | None) -> _Totals:
    sums = np.hstack([parts, np.ones((len(parts), 1))])
    if units is not None:
        sums = np.stack([np.bincount(units, weights=column) for column in sums.T], axis=1)

    def of(totals: Array) -> Floats:
        return np.asarray(value(totals[..., :-1] / totals[..., -1:]), dtype=np.float64)

    whole, n = float(of(sums.sum(axis=0))), len(sums)
    without = of(sums.sum(axis=0) - sums) if n > 1 else np.array([whole])
    if np.ptp(without) <= 1e-12 * max(1.0, abs(whole)):
        return _Totals(sums, of, whole, 0.0)
    error = math.sqrt((n - 1) / n * float(((without - without.mean()) ** 2).sum()))
    return _Totals(sums, of, whole, error)


def _resampled(parts: Floats, value: Callable[[Array], Any], units: Codes | None, level: float, seed: int) -> Interval:
    """BCa interval of ``value(means of parts)``, over rows or units; closed form for many."""
    totals = _totals(parts, value, units)
    sums, of, whole, n = totals.sums, totals.of, totals.whole, len(totals.sums)
    if totals.error == 0:
        return Interval(whole, whole, "constant data", level)
    if n > _CLOSED_FORM_ROWS:
        half = _z(level) * totals.error
        return Interval(whole - half, whole + half, f"closed form{_of(units)}", level)

    def of_numbers(drawn: Array, axis: int = -1) -> Floats:
        at = np.moveaxis(drawn, axis, -1)
        flat = at.reshape(-1, at.shape[-1])
        rows = len(flat)
        counts = np.bincount((flat + n * np.arange(rows)[:, None]).ravel(), minlength=rows * n)
        return of(counts.reshape(rows, n).astype(np.float64) @ sums).reshape(at.shape[:-1])

    def of_values(drawn: Array, axis: int = -1) -> Floats:
        return np.asarray(value(drawn.mean(axis=axis)[..., None]), dtype=np.float64)

    single = units is None and parts.shape[1] == 1

    with warnings.catch_warnings():
        # Degenerate draws give nan, which is dealt with below.
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap(
            (parts[:, 0],) if single else (np.arange(n),),
            of_values if single else of_numbers,
            method="BCa",
            batch=max(8, min(_BATCH, _BATCH_VALUES // n)) if single else _BATCH,
            confidence_level=level,
            vectorized=True,
            rng=np.random.default_rng(seed),
        )
    low, high = (float(end) for end in found.confidence_interval)
    if math.isfinite(low) and math.isfinite(high):
        return Interval(low, high, f"BCa bootstrap{_of(units)}", level)
    low, high = (float(end) for end in np.nanquantile(found.bootstrap_distribution, _tails(level)))
    return Interval(low, high, f"percentile bootstrap{_of(units)}", level)

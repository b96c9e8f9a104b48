"""How far a score could lie from the truth, or a winner's gain over the baseline, on rows of any dependence.

Formulas come from ``intervals``, resampling from here. Every function takes its confidence level, since later
openings of a test set need wider intervals.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from search.guard.few_errors import bounds, exact_interval, is_few
from search.guard.intervals import (
    Difference,
    Interval,
    auc_difference,
    auc_error,
    auc_interval,
    matched_interval,
    mcnemar,
    proportion_interval,
    tails,
    z,
)
from search.scorer import metrics
from search.scorer.metrics import Array, Codes, Floats
from search.scorer.ranks import weighted
from search.scorer.scoring import Score

_CLOSED_FORM_ROWS = 50_000
_BATCH = 200
_BATCH_VALUES = 200_000  # of single values: what stays in the processor's cache is twice as fast
_RANK_VALUES = 1_000_000
_DRAWS = 9_999
_RANK_DRAWS = 1_000
_DRAWS_PER_TAIL = 20  # beyond each end of an interval, or the end is what one lucky draw was
_MOST_DRAWS = 20  # times as many as at the first opening


def test_interval(
    score: Score, *, level: float = 0.95, groups: Array | None = None, ordered: bool = False, seed: int = 0
) -> Interval:
    """The confidence interval of one model's score.

    Proportions: Wilson, or Clopper-Pearson with fewer than 10 errors or successes. AUC: DeLong. All
    else: BCa bootstrap, above 50,000 rows the closed form; not narrower than Clopper-Pearson where a
    bounded metric shows too little spread to be believed.

    Args:
        groups: Shape (rows,), equal within a group; whole groups are resampled then.
        ordered: Rows come in order of time; blocks of neighbours are resampled then.
        seed: Of the bootstrap; the same seed gives the same interval.
    """
    units = units_of(len(score.parts), groups, ordered)
    found = _interval(score, units, level, seed)
    return found if units is not None or groups is None else dataclasses.replace(found, method=alone(found.method))


def _interval(score: Score, units: Codes | None, level: float, seed: int) -> Interval:
    if units is None and _is_yes_no(score):
        n = len(score.parts)
        return proportion_interval(n - round(float(score.parts[:, 0].sum())), n, level=level)
    if score.metric.kind not in metrics.RANKS:

        def value(means: Array) -> Any:
            return metrics.combine(score.metric.kind, score.metric.config, means)

        found = _resampled(score.parts, value, units, level, seed)
    elif units is None and _suits_delong(score):
        found = auc_interval(score.parts[:, 0] > 0.5, score.parts[:, 1], level)
    else:
        draws = _drawn(lambda weights: _ranked(score, weights), len(score.parts), units, level, seed)
        found = _percentiles(draws, score.value, units, level)
    limits, exact = bounds(score.metric), exact_interval(score, units, level)
    if limits is None or exact is None:
        return found
    if found.low == found.high:
        return exact
    low, high, method = max(limits[0], found.low), min(limits[1], found.high), found.method
    if is_few(score, units):
        low, high = min(low, exact.low), max(high, exact.high)
        method = f"{method}, not narrower than {exact.method}"
    return Interval(low, high, method, level)


def standard_error(score: Score, *, groups: Array | None = None, ordered: bool = False) -> float:
    """The standard error of one model's score, in the metric's own units.

    Functions of means: the jackknife, which is s/√n for a mean. AUC of one output: DeLong. Other rank metrics, and
    all of them on groups: the bootstrap's standard deviation. Of a bounded metric it is at least the half width of
    ``exact_interval`` over its z with few errors, or where it would be 0: neither shows how many there could be.

    Args:
        groups, ordered: As for ``test_interval``.
    """
    units = units_of(len(score.parts), groups, ordered)
    metric = score.metric
    if metric.kind not in metrics.RANKS:
        error = _totals(score.parts, lambda m: metrics.combine(metric.kind, metric.config, m), units).error
    elif units is None and _suits_delong(score):
        error = auc_error(score.parts[:, 0] > 0.5, score.parts[:, 1])
    else:
        error = float(_drawn(lambda weights: _ranked(score, weights), len(score.parts), units, 0.95, 0).std())
    exact = exact_interval(score, units, 0.95)
    if exact is None or (error > 0 and not is_few(score, units)):
        return error
    return max(error, (exact.high - exact.low) / 2 / z(0.95))


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
    units = units_of(len(winner.parts), groups, ordered)
    found = _difference(winner, baseline, units, level, seed)
    return found if units is not None or groups is None else dataclasses.replace(found, method=alone(found.method))


def _difference(winner: Score, baseline: Score, units: Codes | None, level: float, seed: int) -> Difference:
    metric = winner.metric
    kind, config, sign = metric.kind, metric.config, 1.0 if metrics.higher_is_better(metric.kind) else -1.0
    estimate = float(sign * (winner.value - baseline.value))
    if kind in metrics.RANKS:
        if units is None and _suits_delong(winner):
            return auc_difference(winner.parts[:, 0] > 0.5, winner.parts[:, 1], baseline.parts[:, 1], level)

        def gains(weights: Floats) -> Floats:
            return _ranked(winner, weights) - _ranked(baseline, weights)

        found = _percentiles(_drawn(gains, len(winner.parts), units, level, seed), estimate, units, level)
        return Difference(estimate, found.low, found.high, f"paired {found.method}", level, None)
    width = winner.parts.shape[1]

    def gain(means: Array) -> Any:
        ours, theirs = means[..., :width], means[..., width:]
        return sign * (metrics.combine(kind, config, ours) - metrics.combine(kind, config, theirs))

    if winner.losses is not None and baseline.losses is not None and kind not in metrics.ROOTS:
        fewer = (baseline.losses - winner.losses)[:, None]  # the same gain from one column, which is faster
        found = _resampled(fewer, lambda means: means[..., 0], units, level, seed)
    else:
        found = _resampled(np.hstack([winner.parts, baseline.parts]), gain, units, level, seed)
    if units is None and _is_yes_no(winner) and _is_yes_no(baseline):
        won = int((winner.parts[:, 0] < baseline.parts[:, 0]).sum())
        lost = int((winner.parts[:, 0] > baseline.parts[:, 0]).sum())
        matched, p = matched_interval(won, lost, len(winner.parts), level), mcnemar(won, lost).mid_p
        # The mid-p decides on which side of 0 an end lies. It takes the number of discordant rows as given: where
        # most of them were won, that number is what is uncertain, and the bootstrap reaches further.
        low = min(matched.low, found.low) if matched.low <= 0 or found.low > 0 else matched.low
        high = max(matched.high, found.high) if matched.high >= 0 or found.high < 0 else matched.high
        return Difference(estimate, low, high, matched.method, level, p)
    return Difference(estimate, found.low, found.high, f"paired {found.method}", level, None)


def _suits_delong(score: Score) -> bool:
    """Whether it is the AUC of one output with two rows of each class, fewer show no variance."""
    if score.metric.kind != "auc" or score.parts.shape[1] != 2:
        return False
    return int(np.bincount(score.parts[:, 0] > 0.5, minlength=2).min()) > 1


def _is_yes_no(score: Score) -> bool:
    column = score.parts[:, 0]
    return score.metric.kind in metrics.PROPORTIONS and bool(((column == 0) | (column == 1)).all())


def units_of(rows: int, groups: Array | None, ordered: bool) -> Codes | None:
    """What is resampled: number of the group or block of each row, shape (rows,), or None for single rows.

    One group shows nothing of how groups vary, so its rows count singly and the method says so.
    """
    if groups is not None:
        units = np.unique(groups, return_inverse=True)[1].astype(np.int64)
    elif ordered:
        units = np.arange(rows) // math.ceil(rows ** (1 / 3))
    else:
        return None
    return units if units.max() > 0 else None


def alone(method: str) -> str:
    """The method's words where groups say nothing, because there is one."""
    return f"{method}, too narrow: all rows are one group"


def _of(units: Codes | None) -> str:
    return "" if units is None else f" of {int(units.max()) + 1} groups of rows"


def _draws(fewest: int, level: float) -> int:
    """How many resamples an interval of this level needs."""
    return min(_MOST_DRAWS * fewest, max(fewest, math.ceil(2 * _DRAWS_PER_TAIL / (1 - level))))


def _at_least_normal(
    low: float, high: float, value: float, error: float, draws: int, level: float
) -> tuple[float, float]:
    """An interval's ends; where draws are too few for its level, no nearer than normal theory has them."""
    if draws * (1 - level) >= 2 * _DRAWS_PER_TAIL - 1e-6:
        return low, high
    return min(low, value - z(level) * error), max(high, value + z(level) * error)


def _percentiles(draws: Floats, value: float, units: Codes | None, level: float) -> Interval:
    low, high = (float(end) for end in np.quantile(draws, tails(level)))
    low, high = _at_least_normal(low, high, value, float(draws.std()), len(draws), level)
    return Interval(low, high, f"percentile bootstrap{_of(units)}", level)


def _ranked(score: Score, weights: Floats) -> Floats:
    return weighted(score.metric.kind, score.metric.config, score.parts, weights)


def _drawn(value: Callable[[Floats], Floats], rows: int, units: Codes | None, level: float, seed: int) -> Floats:
    """Values of resampled rows or units; draws in which the metric has no value are drawn again.

    Args:
        value: From how often each row was drawn, shape (rows, draws), to shape (draws,), nan where it has none.
    """
    rng = np.random.default_rng(seed)
    wanted, count = _draws(_RANK_DRAWS, level), rows if units is None else int(units.max()) + 1
    at_once, found, tried = max(1, min(wanted, _RANK_VALUES // rows)), np.empty(0), 0
    while len(found) < wanted and tried < 20 * wanted:
        drawn = rng.integers(0, count, (at_once, count)) + count * np.arange(at_once)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=at_once * count).reshape(at_once, count).T
        values = value((counts if units is None else counts[units]).astype(np.float64))
        found, tried = np.append(found, values[np.isfinite(values)]), tried + at_once
    return found[:wanted] if len(found) else value(np.ones((rows, 1)))


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
        half = z(level) * totals.error
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
    draws = _draws(_DRAWS, level)
    with warnings.catch_warnings():
        # Degenerate draws give nan, which is dealt with below.
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap(
            (parts[:, 0],) if single else (np.arange(n),),
            of_values if single else of_numbers,
            n_resamples=draws,
            method="BCa",
            batch=max(8, min(_BATCH, _BATCH_VALUES // n)) if single else _BATCH,
            confidence_level=level,
            vectorized=True,
            rng=np.random.default_rng(seed),
        )
    low, high = (float(end) for end in found.confidence_interval)
    method = "BCa"
    if not (math.isfinite(low) and math.isfinite(high)):
        low, high = (float(end) for end in np.nanquantile(found.bootstrap_distribution, tails(level)))
        method = "percentile"
    low, high = _at_least_normal(low, high, whole, totals.error, draws, level)
    return Interval(low, high, f"{method} bootstrap{_of(units)}", level)

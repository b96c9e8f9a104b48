"""Intervals and tests that a formula gives: of proportions, of pairs of them, and of AUCs.

DeLong, Newcombe and the mid-p are written out because no well-kept library has them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from search.scorer.metrics import Array, Floats

FEW_ERRORS = 10


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


@dataclass(frozen=True)
class McNemar:
    """Two-sided p-values: ``exact``, and ``mid_p``, which is not conservative."""

    exact: float
    mid_p: float


def z(level: float) -> float:
    """How many standard errors a two-sided interval of this level reaches."""
    return float(stats.norm.ppf(0.5 + level / 2))


def tails(level: float) -> tuple[float, float]:
    """The two quantiles between which this share lies."""
    return 0.5 - level / 2, 0.5 + level / 2


def proportion_interval(successes: int, rows: int, *, level: float = 0.95, method: str | None = None) -> Interval:
    """A proportion's interval: "wilson", or "exact" (Clopper-Pearson) with few errors or few successes.

    Args:
        method: One of the two, to override the choice.
    """
    if method is None:
        method = "exact" if min(successes, rows - successes) < FEW_ERRORS else "wilson"
    found = stats.binomtest(successes, rows).proportion_ci(confidence_level=level, method=method)
    return Interval(
        float(found.low), float(found.high), {"exact": "Clopper-Pearson", "wilson": "Wilson"}[method], level
    )


def share_interval(share: float, count: float, level: float) -> tuple[float, float]:
    """Clopper-Pearson where successes and rows need not be whole, as with an effective count.

    Korn and Graubard 1998, "Confidence intervals for proportions with small expected number of positive counts
    estimated from survey data".
    """
    right, wrong = share * count, (1 - share) * count
    lower, upper = tails(level)
    low = float(stats.beta.ppf(lower, right, wrong + 1)) if right > 1e-9 else 0.0
    high = float(stats.beta.ppf(upper, right + 1, wrong)) if wrong > 1e-9 else 1.0
    return low, high


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


def mcnemar(won: int, lost: int) -> McNemar:
    """Whether two models that disagree on ``won + lost`` rows are right equally often on them.

    Fagerland, Lydersen, Laake 2013, "The McNemar test for binary matched-pairs data".
    """
    if won == lost:
        return McNemar(1.0, 1.0)
    fewer = min(won, lost)
    exact = float(stats.binomtest(fewer, won + lost).pvalue)
    return McNemar(exact, exact - float(stats.binom.pmf(fewer, won + lost, 0.5)))


def matched_interval(won: int, lost: int, rows: int, level: float) -> Interval:
    """The difference of two proportions on the same rows, given how many rows are discordant.

    The share won of discordant rows is between the shares whose mid-p test is passed, so that the interval excludes
    0 exactly when ``mcnemar``'s mid-p does. Without discordant rows it reaches to the Clopper-Pearson bound of their
    share on both sides.
    """
    discordant = won + lost
    method = f"exact mid-p of {discordant} discordant rows"
    if discordant == 0:
        most = share_interval(0.0, rows, level)[1]
        return Interval(-most, most, method, level)
    low, high = 2 * _least_share(won, lost, level) - 1, 1 - 2 * _least_share(lost, won, level)
    return Interval(low * discordant / rows, high * discordant / rows, method, level)


def _least_share(won: int, lost: int, level: float) -> float:
    """The smallest share won of discordant rows that the mid-p test at this level passes."""
    if won == 0:
        return 0.0

    def excess(share: float) -> float:
        at_least = stats.binom.sf(won, won + lost, share) + stats.binom.pmf(won, won + lost, share) / 2
        return float(at_least) - tails(level)[0]

    return float(optimize.brentq(excess, 0.0, 1.0, xtol=1e-14))


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


def auc_error(labels: Array, scores: Array) -> float:
    """The standard error of one AUC; 0 where its variance is no more than rounding. Both of shape (rows,)."""
    variance = float(delong(labels, scores[None])[1][0, 0])
    return math.sqrt(variance) if variance > 1e-15 else 0.0


def auc_interval(labels: Array, scores: Array, level: float) -> Interval:
    """DeLong's, cut at 0 and 1; a point where the ranking shows no variance. Arguments as for ``auc_error``."""
    auc, half = float(delong(labels, scores[None])[0][0]), z(level) * auc_error(labels, scores)
    return Interval(max(0.0, auc - half), min(1.0, auc + half), "DeLong", level)


def auc_difference(labels: Array, ours: Array, theirs: Array, level: float) -> Difference:
    """First AUC less the second, of scores of the same rows, all of shape (rows,); a point where they vary in none."""
    aucs, covariance = delong(labels, np.stack([ours, theirs]))
    gain = float(aucs[0] - aucs[1])
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    if not variance > 1e-15:
        return Difference(gain, gain, gain, "paired DeLong", level, 1.0 if gain == 0 else None)
    error = math.sqrt(variance)
    p = float(2 * stats.norm.sf(abs(gain) / error))
    return Difference(gain, gain - z(level) * error, gain + z(level) * error, "paired DeLong", level, p)

"""The rule that chooses the winner, and its bootstrap-corrected estimate.

A rule that looks at guard rows flatters what it chooses. The bootstrap repeats that very rule on resampled guard
rows and scores what it chose on the rows left out, which it did not look at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from search.guard.candidates import Candidate, Pool, parts_of
from search.guard.few_errors import exact_interval, is_few
from search.guard.intervals import tails
from search.guard.statistics import alone, units_of
from search.scorer.metrics import Array, Codes, Floats
from search.scorer.scoring import Metric, Score

_TOO_RARE = "too few guard rows of a class to resample, so it is not corrected"


@dataclass(frozen=True)
class Choice:
    """What is shipped.

    Attributes:
        configuration: The winner's.
        trial: The winner.
        pooled: Trial to its score over validation and guard rows together.
        means: Configuration to the mean pooled score over its fresh runs, over its only run if there is none.
        best: Configuration to the trial that it would ship: its best run by the rule that chose the winner.
    """

    configuration: int
    trial: int
    pooled: dict[int, float]
    means: dict[int, float]
    best: dict[int, int]


@dataclass(frozen=True)
class Gain:
    """A gain over the baseline, turned so that positive is better, with its interval."""

    gain: float
    low: float
    high: float


@dataclass(frozen=True)
class Corrected:
    """What the chosen model is worth on rows that neither trained nor chose it.

    Attributes:
        estimate: In the metric's units.
        low, high: Its interval; None where nothing could be resampled.
        method: In words.
        wins: Configuration to the share of resamples that it won; empty if nothing was resampled.
        configuration_gain: The winner's configuration over the baseline's, each the mean over its fresh runs.
        shipped_gain: The winner over the run that the baseline would ship.
    """

    estimate: float
    low: float | None
    high: float | None
    level: float
    method: str
    wins: dict[int, float]
    configuration_gain: Gain | None
    shipped_gain: Gain | None


def choose(
    metric: Metric, direction: str, candidates: Sequence[Candidate], validation_rows: float, guard_rows: int
) -> Choice:
    """The model to ship: of all that were trained, by the search or to confirm, the one with the best pooled score.

    A model's pooled score is its score over validation and guard rows together; for metrics that are no function of
    sums over rows (ranks, custom ones), and where trials have validation rows of their own or several times the same,
    the mean of its two scores, weighted by rows. Ties go to fewer weights, then to the lower configuration, then to
    the lower trial.

    Scores on rows of their own have independent noise, which the comparison cannot take out; so neither these rows nor
    these scores are paired there. The weighted mean is unbiased for each model alone, and its noise is least for it
    where a row says as much as any other; guard rows, which all models share, are compared pairwise as ever.

    Seeds change what a model is worth, not only what it seems to be worth, so a lucky model is worth keeping.
    Choosing a configuration by the mean of its fresh runs, and then one of these, shipped worse models than this rule
    in simulated searches at any amount of luck, and often worse ones than the best validation score
    (``tests/benchmarks/guard.py``).

    Args:
        direction: "min" or "max", whichever way the metric gets better.
        validation_rows: To how many rows a validation score amounts (``folds.write``).
        candidates: In any order. Those whose numbers are not finite cannot win and are left out.

    Raises:
        StudyFailed: If no candidate is left.
    """
    pool = Pool(metric, direction, candidates)
    pooled = pool.scores(pool.runs, validation_rows, np.ones((guard_rows, 1)))
    winner = pool.runs[int(pool.first_best(pooled)[0])]
    return Choice(
        configuration=winner.configuration,
        trial=winner.trial,
        pooled={run.trial: float(score) for run, score in zip(pool.runs, pooled[:, 0], strict=True)},
        means={number: float(pooled[at, 0].mean()) for number, at in pool.fresh.items()},
        best={number: pool.runs[at[int(pool.first_best(pooled[at])[0])]].trial for number, at in pool.members.items()},
    )


def noise_floor(
    metric: Metric, direction: str, candidates: Sequence[Candidate], validation_rows: float, guard_rows: int
) -> float | None:
    """How far two trainings of one configuration differ: the standard deviation of pooled scores within configurations.

    Of fresh runs, since the search's own was picked for its luck.

    Returns:
        In the metric's units; None if no configuration has two fresh runs.
    """
    pool = Pool(metric, direction, candidates)
    pooled = pool.scores(pool.runs, validation_rows, np.ones((guard_rows, 1)))[:, 0]
    squares = sum(float(((pooled[at] - pooled[at].mean()) ** 2).sum()) for at in pool.fresh.values())
    freedom = sum(len(at) - 1 for at in pool.fresh.values())
    return float(np.sqrt(squares / freedom)) if freedom else None


def corrected(
    metric: Metric,
    direction: str,
    candidates: Sequence[Candidate],
    validation_rows: float,
    guard_rows: int,
    *,
    baseline: int | None = None,
    groups: Array | None = None,
    ordered: bool = False,
    repeats: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Corrected:
    """The bootstrap-corrected estimate of what ``choose`` ships.

    Tsamardinos, Greasidou, Borboudakis 2018, "Bootstrapping the out-of-sample predictions for efficient and accurate
    cross-validation", with ``choose`` as the rule that is repeated. What was searched and which finalists were trained
    again followed from validation scores alone, which no resampling of guard rows changes: repeating this rule repeats
    all that guard rows decide.

    It speaks for models that were not fitted to guard rows. Its interval is wider than its level says: what is left
    out of a resample is a third of the rows. Resamples in which the metric has no value, or which lack a class that
    guard rows have, are left out.

    Args:
        baseline: Number of the configuration that gains are measured against. Gains over it are 0 if it is chosen.
        groups: One value per guard row; whole groups are resampled then.
        ordered: Guard rows come in order of time; blocks of neighbours are resampled then.
        repeats: Resamples; fewer, down to 200, for rank metrics of many rows and candidates.
        seed: The same seed gives the same result.

    Returns:
        The estimate. ``method`` says if it is not corrected, as where fewer than half of the resamples are left: then
        it is the chosen model's plain guard score.

    Raises:
        StudyFailed: If no candidate has finite numbers.
    """
    pool = Pool(metric, direction, candidates)
    choice = choose(metric, direction, pool.runs, validation_rows, guard_rows)
    chosen = next(run for run in pool.runs if run.trial == choice.trial)
    if metric.is_custom:
        return _plain(chosen, level, "only Keras can compute this metric, so it is not corrected")
    units = units_of(guard_rows, groups, ordered)
    repeats = pool.affordable(repeats)
    # Per resample: the winner, its configuration's mean, and the same two of the baseline.
    found = np.full((4, repeats), np.nan)
    winners = np.full(repeats, -1)
    base = pool.members.get(-1 if baseline is None else baseline)
    start = 0
    for weights in pool.draws(guard_rows, units, repeats, seed):
        block = slice(start, start := start + weights.shape[1])
        pooled = pool.scores(pool.runs, validation_rows, weights)
        out = (weights == 0).astype(np.float64)
        winners[block] = pool.first_best(pooled)
        for winner in np.unique(winners[block]):
            at = np.flatnonzero(winners[block] == winner)
            found[0, block.start + at] = pool.scores([pool.runs[winner]], 0, out[:, at])[0]
            found[1, block.start + at] = pool.mean(pool.runs[winner].configuration, out[:, at])
        if base is not None and baseline is not None:
            values = pool.scores([pool.runs[k] for k in base], 0, out)
            found[2, block] = values[pool.first_best(pooled[base]), np.arange(values.shape[1])]
            found[3, block] = pool.mean(baseline, out)
        found[:, block][:, np.isnan(pooled).any(axis=0)] = np.nan
    kept = np.isfinite(found[0])
    if 2 * kept.sum() < repeats:
        rare = "too few guard rows to resample" if not kept.any() else _TOO_RARE
        return _plain(chosen, level, rare)
    found, winners = found[:, kept], winners[kept]
    rows = "guard rows" if units is None else f"{int(units.max()) + 1} groups of guard rows"
    method = f"bootstrap bias-corrected over {len(winners)} resamples of {rows}"
    shares = {number: float(np.isin(winners, at).mean()) for number, at in pool.members.items()}
    shipped_gain = configuration_gain = None
    if base is not None:
        sign = 0.0 if choice.configuration == baseline else pool.sign
        shipped_gain, configuration_gain = (_gain(sign * (found[k] - found[k + 2]), level) for k in (0, 1))
    score = Score(metric, chosen.guard, None, np.asarray(parts_of(chosen), np.float64))
    low, high = _ends(score, found[0], units, level)
    return Corrected(
        estimate=float(found[0].mean()),
        low=low,
        high=high,
        level=level,
        method=alone(method) if units is None and groups is not None else method,
        wins=shares,
        configuration_gain=configuration_gain,
        shipped_gain=shipped_gain,
    )


def _plain(chosen: Candidate, level: float, why: str) -> Corrected:
    return Corrected(chosen.guard, None, None, level, f"none: {why}", {}, None, None)


def _ends(plain: Score, values: Floats, units: Codes | None, level: float) -> tuple[float, float]:
    """The interval of resampled values; with few errors it reaches as far as the plain score's exact one.

    Rows left out that hold no error say nothing of how many errors there are: without any in all guard rows, every
    resample says 100 %.
    """
    low, high = (float(end) for end in np.quantile(values, tails(level)))
    if low == high or is_few(plain, units):
        exact = exact_interval(plain, units, level)
        if exact is not None:
            return min(low, exact.low), max(high, exact.high)
    return low, high


def _gain(values: Floats, level: float) -> Gain | None:
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = np.quantile(values, tails(level))
    return Gain(float(values.mean()), float(low), float(high))

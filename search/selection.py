"""The rule that chooses the winner, and its bootstrap-corrected estimate.

A rule that looks at guard rows flatters what it chooses. The bootstrap repeats that very rule on resampled guard
rows and scores what it chose on the rows left out, which it did not look at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from search import metrics
from search.errors import StudyFailed
from search.metrics import Array, Codes, Floats
from search.ranks import weighted
from search.scoring import Metric
from search.statistics import _alone, _kind, _tails, _units

_VALUES = 4_000_000  # float64 values held at once: 32 MB
_RANK_VALUES = 2_000_000_000  # row weights that rank metrics may look at in all, about 15 s
_RANK_REPEATS = 200
_ROUNDING = 1e-12


@dataclass(frozen=True, eq=False)
class Candidate:
    """One trained model that could be shipped.

    Attributes:
        trial: Number of the trial that trained it.
        configuration: Number of the search trial whose configuration it has; its own number without confirmation.
        size: Its weights, for ties; None counts as infinitely many.
        score: On validation rows, in the metric's units.
        guard: On guard rows.
        parts: What each guard row contributes (see ``metrics.parts``), shape (guard rows, columns), of any float
            type, a memory map if it likes; None for a metric that only Keras can compute.
        validation: Sums of parts over validation rows, shape (columns,); None for rank metrics and custom ones.
    """

    trial: int
    configuration: int
    size: int | None
    score: float
    guard: float
    parts: Array | None
    validation: Floats | None


@dataclass(frozen=True)
class Choice:
    """What is shipped.

    Attributes:
        configuration: The winner's.
        trial: The winner.
        pooled: Trial to its score over validation and guard rows together.
        means: Configuration to the mean pooled score over its fresh runs, over its only run if there is none.
    """

    configuration: int
    trial: int
    pooled: dict[int, float]
    means: dict[int, float]


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
    metric: Metric, direction: str, candidates: Sequence[Candidate], validation_rows: int, guard_rows: int
) -> Choice:
    """The model to ship: of all that were trained, by the search or to confirm, the one with the best pooled score.

    A model's pooled score is its score over validation and guard rows together; for metrics that are no function of
    sums over rows (ranks, custom ones), the mean of its two scores, weighted by rows. Ties go to fewer weights, then
    to the lower configuration, then to the lower trial.

    Seeds change what a model is worth, not only what it seems to be worth, so a lucky model is worth keeping.
    Choosing a configuration by the mean of its fresh runs, and then one of these, shipped worse models than this rule
    in simulated searches at any amount of luck, and often worse ones than the best validation score
    (``tests/benchmarks/guard.py``).

    Args:
        direction: "min" or "max", whichever way the metric gets better.
        candidates: In any order. Those whose numbers are not finite cannot win and are left out.

    Raises:
        StudyFailed: If no candidate is left.
    """
    pool = _Pool(metric, direction, candidates)
    pooled = pool.scores(pool.runs, validation_rows, np.ones((guard_rows, 1)))
    winner = pool.runs[int(pool.first_best(pooled)[0])]
    return Choice(
        configuration=winner.configuration,
        trial=winner.trial,
        pooled={run.trial: float(score) for run, score in zip(pool.runs, pooled[:, 0], strict=True)},
        means={number: float(pooled[at, 0].mean()) for number, at in pool.fresh.items()},
    )


def noise_floor(
    metric: Metric, direction: str, candidates: Sequence[Candidate], validation_rows: int, guard_rows: int
) -> float | None:
    """How far two trainings of one configuration differ: the standard deviation of pooled scores within configurations.

    Of fresh runs, since the search's own was picked for its luck.

    Returns:
        In the metric's units; None if no configuration has two fresh runs.
    """
    pool = _Pool(metric, direction, candidates)
    pooled = pool.scores(pool.runs, validation_rows, np.ones((guard_rows, 1)))[:, 0]
    squares = sum(float(((pooled[at] - pooled[at].mean()) ** 2).sum()) for at in pool.fresh.values())
    freedom = sum(len(at) - 1 for at in pool.fresh.values())
    return float(np.sqrt(squares / freedom)) if freedom else None


def corrected(
    metric: Metric,
    direction: str,
    candidates: Sequence[Candidate],
    validation_rows: int,
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
    out of a resample is a third of the rows.

    Args:
        baseline: Number of the configuration that gains are measured against. Gains over it are 0 if it is chosen.
        groups: One value per guard row; whole groups are resampled then.
        ordered: Guard rows come in order of time; blocks of neighbours are resampled then.
        repeats: Resamples; fewer, down to 200, for rank metrics of many rows and candidates.
        seed: The same seed gives the same result.

    Returns:
        The estimate; resamples in which the metric has no value are left out. ``method`` says if it is not corrected:
        then it is the chosen model's plain guard score.

    Raises:
        StudyFailed: If no candidate has finite numbers.
    """
    pool = _Pool(metric, direction, candidates)
    choice = choose(metric, direction, pool.runs, validation_rows, guard_rows)
    plain = next(run.guard for run in pool.runs if run.trial == choice.trial)
    if metric.is_custom:
        why = "none: only Keras can compute this metric, so it is not corrected"
        return Corrected(plain, None, None, level, why, {}, None, None)
    units = _units(guard_rows, groups, ordered)
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
    if not kept.any():
        why = "none: too few guard rows to resample"
        return Corrected(plain, None, None, level, why, {}, None, None)
    found, winners = found[:, kept], winners[kept]
    rows = "guard rows" if units is None else f"{int(units.max()) + 1} groups of guard rows"
    method = f"bootstrap bias-corrected over {len(winners)} resamples of {rows}"
    shares = {number: float(np.isin(winners, at).mean()) for number, at in pool.members.items()}
    shipped_gain = configuration_gain = None
    if base is not None:
        sign = 0.0 if choice.configuration == baseline else pool.sign
        shipped_gain, configuration_gain = (_gain(sign * (found[k] - found[k + 2]), level) for k in (0, 1))
    low, high = np.quantile(found[0], _tails(level))
    return Corrected(
        estimate=float(found[0].mean()),
        low=float(low),
        high=float(high),
        level=level,
        method=_alone(method) if units is None and groups is not None else method,
        wins=shares,
        configuration_gain=configuration_gain,
        shipped_gain=shipped_gain,
    )


def _gain(values: Floats, level: float) -> Gain:
    low, high = np.quantile(values, _tails(level))
    return Gain(float(values.mean()), float(low), float(high))


class _Pool:
    """The candidates that can win, scored for many weightings of guard rows at once.

    Attributes:
        runs: In the order that breaks ties.
        members: Configuration to the positions of its runs.
        fresh: The same of its fresh runs, or of its only run where there is none.
    """

    def __init__(self, metric: Metric, direction: str, candidates: Sequence[Candidate]) -> None:
        self._kind, self._config, self._ranks = _kind(metric), metric.config, metric.kind in metrics.RANKS
        self._custom = metric.is_custom
        self.sign = 1.0 if direction == "max" else -1.0
        self.runs = sorted((run for run in candidates if _is_finite(run)), key=_in_order)
        if not self.runs:
            raise StudyFailed(
                f"a winner needs finite scores on validation and guard rows, but none of {len(candidates)} models has "
                "them; try a lower learning rate"
            )
        configurations = np.array([run.configuration for run in self.runs])
        self.members: dict[int, Codes] = {
            int(number): np.flatnonzero(configurations == number) for number in np.unique(configurations)
        }
        own = np.array([run.configuration == run.trial for run in self.runs])
        self.fresh = {number: at[~own[at]] if (~own[at]).any() else at for number, at in self.members.items()}

    def mean(self, configuration: int, weights: Floats) -> Floats:
        """A configuration's mean over its fresh runs on weighted guard rows, shape (weightings,)."""
        runs = [self.runs[k] for k in self.fresh[configuration]]
        found: Floats = self.scores(runs, 0, weights).mean(axis=0)
        return found

    def first_best(self, scores: Floats) -> Codes:
        """In each column the first row that no other beats by more than rounding."""
        oriented = self.sign * scores
        best = oriented.max(axis=0)
        first: Codes = (oriented >= best - _ROUNDING * np.abs(best)).argmax(axis=0)
        return first

    def scores(self, runs: Sequence[Candidate], validation_rows: int, weights: Floats) -> Floats:
        """Scores over validation rows and weighted guard rows; over guard rows alone if ``validation_rows`` is 0.

        Args:
            weights: Shape (guard rows, weightings).

        Returns:
            Shape (runs, weightings); nan where the metric has no value.
        """
        totals = validation_rows + weights.sum(axis=0)
        if self._ranks or self._custom:
            guard = np.stack([self._rank_values(run, weights) for run in runs])
            score = np.array([run.score for run in runs])[:, None] if validation_rows else 0.0
            with np.errstate(invalid="ignore"):
                tiers: Floats = (validation_rows * score + weights.sum(axis=0) * guard) / totals
            return tiers
        columns = _parts(runs[0]).shape[1]
        at_once = max(1, _VALUES // (columns * max(weights.shape)))
        found = [
            self._means_values(runs[start : start + at_once], validation_rows, weights)
            for start in range(0, len(runs), at_once)
        ]
        together: Floats = np.concatenate(found)
        together[:, totals == 0] = np.nan
        return together

    def _means_values(self, runs: Sequence[Candidate], validation_rows: int, weights: Floats) -> Floats:
        parts = np.stack([_parts(run).T for run in runs], dtype=np.float64)  # float64, so that ties are ties
        count, columns, rows = parts.shape
        sums = (parts.reshape(count * columns, rows) @ weights).reshape(count, columns, -1)
        if validation_rows:
            sums += np.stack([_sums(run) for run in runs])[:, :, None]
        means = sums / np.maximum(validation_rows + weights.sum(axis=0), 1)
        means = np.moveaxis(means, 1, -1)
        values: Floats = metrics.combine(self._kind, self._config, means)
        if not validation_rows:
            values[_lacks_a_class(self._kind, means)] = np.nan
        return values

    def _rank_values(self, run: Candidate, weights: Floats) -> Floats:
        if self._custom:
            return np.full(weights.shape[1], run.guard)
        return weighted(self._kind, self._config, _parts(run), weights)

    def affordable(self, repeats: int) -> int:
        """Fewer repeats where a rank metric would take minutes."""
        if not self._ranks:
            return repeats
        entries = len(self.runs) * _parts(self.runs[0]).size // 2
        return min(repeats, max(_RANK_REPEATS, _RANK_VALUES // max(entries, 1)))

    def draws(self, rows: int, units: Codes | None, repeats: int, seed: int) -> Iterator[Floats]:
        """How often each guard row is drawn, in blocks of shape (rows, some repeats).

        For rank metrics of one output positives and negatives are drawn apart, so that neither run out.
        """
        rng = np.random.default_rng(seed)
        strata = [np.arange(rows)]
        parts = _parts(self.runs[0])
        if self._ranks and parts.shape[1] == 2:
            strata = [np.flatnonzero(side) for side in (parts[:, 0] > 0.5, parts[:, 0] <= 0.5) if side.any()]
        width = parts.shape[1] // 2 if self._ranks else 1
        at_once = max(1, _VALUES // (rows * width))
        for start in range(0, repeats, at_once):
            count = min(at_once, repeats - start)
            weights = np.empty((rows, count))
            if units is None:
                for stratum in strata:
                    weights[stratum] = _multinomial(rng, len(stratum), count)
            else:
                weights[:] = _multinomial(rng, int(units.max()) + 1, count)[units]
            yield weights


def _multinomial(rng: np.random.Generator, count: int, repeats: int) -> Codes:
    """How often each of ``count`` is drawn in as many draws with replacement, shape (count, repeats)."""
    return rng.multinomial(count, np.full(count, 1 / count), size=repeats).T


def _lacks_a_class(kind: str, means: Floats) -> Array:
    """Where a ratio is 0 by convention for want of rows, which says nothing about the model."""
    truth = means[..., -(means.shape[-1] // 3) :]
    if kind in ("precision", "recall", "f1_score"):
        lacks: Array = truth.sum(axis=-1) == 0
    else:
        lacks = (truth.max(axis=-1) == 1) & (kind == "mcc")
    return lacks


def _parts(run: Candidate) -> Array:
    assert run.parts is not None, "only a custom metric has no parts"
    return run.parts


def _sums(run: Candidate) -> Floats:
    assert run.validation is not None, "a metric of sums over rows comes with its sums over validation rows"
    return run.validation


def _is_finite(run: Candidate) -> bool:
    numbers = [run.score, run.guard, *([] if run.validation is None else run.validation)]
    return bool(np.isfinite(numbers).all() and (run.parts is None or np.isfinite(run.parts).all()))


def _in_order(run: Candidate) -> tuple[float, int, int]:
    return (float("inf") if run.size is None else run.size, run.configuration, run.trial)

"""Trained models that could be shipped, and their scores on many weightings of guard rows at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from search.errors import StudyFailed
from search.scorer import metrics
from search.scorer.metrics import Array, Codes, Config, Floats
from search.scorer.ranks import weighted
from search.scorer.scoring import Metric

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
        validation: Sums of parts over validation rows, shape (columns,); None for rank metrics and custom ones, and
            where trials are validated by rows of their own, which are not pooled row by row.
    """

    trial: int
    configuration: int
    size: int | None
    score: float
    guard: float
    parts: Array | None
    validation: Floats | None


class Pool:
    """The candidates that can win, scored for many weightings of guard rows at once.

    Attributes:
        runs: In the order that breaks ties.
        members: Configuration to the positions of its runs.
        fresh: The same of its fresh runs, or of its only run where there is none.
    """

    def __init__(self, metric: Metric, direction: str, candidates: Sequence[Candidate]) -> None:
        self._kind, self._config, self._ranks = metric.kind, metric.config, metric.kind in metrics.RANKS
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
        """In each column of scores, shape (runs, weightings), the first run that none beats by more than rounding."""
        oriented = self.sign * scores
        best = oriented.max(axis=0)
        first: Codes = (oriented >= best - _ROUNDING * np.abs(best)).argmax(axis=0)
        return first

    def scores(self, runs: Sequence[Candidate], validation_rows: float, weights: Floats) -> Floats:
        """Scores over validation rows and weighted guard rows; over guard rows alone if ``validation_rows`` is 0.

        Where there are no sums over validation rows, the mean of the two scores, weighted by rows.

        Args:
            validation_rows: To how many rows the validation score amounts.
            weights: Shape (guard rows, weightings).

        Returns:
            Shape (runs, weightings); nan where the metric has no value.
        """
        totals = validation_rows + weights.sum(axis=0)
        if self._ranks or self._custom:
            guard = np.stack([self._rank_values(run, weights) for run in runs])
            return self._joined(runs, validation_rows, weights, guard)
        if validation_rows and any(run.validation is None for run in runs):
            return self._joined(runs, validation_rows, weights, self.scores(runs, 0, weights))
        columns = parts_of(runs[0]).shape[1]
        at_once = max(1, _VALUES // (columns * max(weights.shape)))
        found = [
            self._mean_values(runs[start : start + at_once], validation_rows, weights)
            for start in range(0, len(runs), at_once)
        ]
        together: Floats = np.concatenate(found)
        together[:, totals == 0] = np.nan
        return together

    @staticmethod
    def _joined(runs: Sequence[Candidate], validation_rows: float, weights: Floats, guard: Floats) -> Floats:
        """Each run's own validation score and its scores on weighted guard rows, shape (runs, weightings), as one."""
        score = np.array([run.score for run in runs])[:, None] if validation_rows else 0.0
        with np.errstate(invalid="ignore"):
            tiers: Floats = (validation_rows * score + weights.sum(axis=0) * guard) / (
                validation_rows + weights.sum(axis=0)
            )
        return tiers

    def _mean_values(self, runs: Sequence[Candidate], validation_rows: float, weights: Floats) -> Floats:
        parts = np.stack([parts_of(run).T for run in runs], dtype=np.float64)  # float64, so that ties are ties
        count, columns, rows = parts.shape
        sums = (parts.reshape(count * columns, rows) @ weights).reshape(count, columns, -1)
        if validation_rows:
            sums += np.stack([_sums(run) for run in runs])[:, :, None]
        means = sums / np.maximum(validation_rows + weights.sum(axis=0), 1)
        means = np.moveaxis(means, 1, -1)
        values: Floats = metrics.combine(self._kind, self._config, means)
        if not validation_rows:
            values[_lacks_a_class(self._kind, self._config, means, parts.mean(axis=2)[:, None])] = np.nan
        return values

    def _rank_values(self, run: Candidate, weights: Floats) -> Floats:
        if self._custom:
            return np.full(weights.shape[1], run.guard)
        return weighted(self._kind, self._config, parts_of(run), weights)

    def affordable(self, repeats: int) -> int:
        """Fewer repeats where a rank metric would take minutes."""
        if not self._ranks:
            return repeats
        entries = len(self.runs) * parts_of(self.runs[0]).size // 2
        return min(repeats, max(_RANK_REPEATS, _RANK_VALUES // max(entries, 1)))

    def draws(self, rows: int, units: Codes | None, repeats: int, seed: int) -> Iterator[Floats]:
        """How often each guard row is drawn, in blocks of shape (rows, some repeats).

        For rank metrics of one output positives and negatives are drawn apart, so that neither run out.
        """
        rng = np.random.default_rng(seed)
        strata = [np.arange(rows)]
        parts = parts_of(self.runs[0])
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


def _lacks_a_class(kind: str, config: Config, means: Floats, whole: Floats) -> Array:
    """Where a ratio is what it is for want of rows, which says nothing about the model.

    Args:
        means: Of rows left out, shape (runs, weightings, columns).
        whole: Of all guard rows, shape (runs, 1, columns).
    """
    if kind not in metrics.RATIOS:
        return np.zeros(means.shape[:-1], dtype=bool)
    if kind == "r2_score":
        return np.asarray((~metrics.has_spread(means) & metrics.has_spread(whole)).any(axis=-1))
    _, guess, truth = np.split(means, 3, axis=-1)
    _, whole_guess, whole_truth = np.split(whole, 3, axis=-1)
    if kind == "mcc":
        return np.asarray((truth == 1).any(axis=-1))
    if kind == "precision":  # of few guesses, those with a true row out of bag would be the better ones
        lacks = np.logical_and(guess == 0, whole_guess > 0)
    elif config.get("average") in ("micro", "weighted"):
        lacks = np.equal(truth.sum(axis=-1, keepdims=True), 0)
    else:
        lacks = np.logical_and(truth == 0, (whole_truth > 0) | (whole_truth.sum(axis=-1, keepdims=True) == 0))
    return np.asarray(lacks.any(axis=-1))


def parts_of(run: Candidate) -> Array:
    """Its parts, shape (guard rows, columns), where the metric has any."""
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

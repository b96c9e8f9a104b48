"""Verdicts: what a test score says about gap and gain, by name, and the smallest of both that it could show."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from search.scorer import metrics

TOTAL = 0.05  # share of false alarms that all openings of a test set may raise together
GAP_Z = 2.58  # chance alone reaches it once in a hundred times
POWER = 0.8

MEANING = {
    "NO_GAP_SHOWN": "corrected estimate and test score agree, as far as these rows can tell",
    "UNEXPLAINED_GAP": "the test score is worse than the estimate by more than chance",
    "POSSIBLE_DRIFT": "the test score is worse by more than chance, and test rows are the latest",
    "SPLIT_MISMATCH": "the test score is better than the estimate by more than chance",
    "NO_GAIN_SHOWN": "these rows do not show that the winner is better than the baseline",
    "REUSED_TEST_SET": "these test rows had been opened before",
    "NO_INTERVAL_FOR_THIS_METRIC": "only Keras can compute this metric",
}

_NORMAL = NormalDist()


@dataclass(frozen=True)
class Gap:
    """How much worse a test score is than what was expected of it.

    Attributes:
        gap: In the metric's own units; positive is worse on test, for losses too.
        z: The gap in standard errors.
        smallest: The smallest gap that these rows show in four of five cases where it is there.
    """

    gap: float
    z: float
    smallest: float


@dataclass(frozen=True)
class Planned:
    """The smallest gain and gap that a first opening shows in four of five cases where they are there.

    Attributes:
        gain: Winner over baseline, in ``unit``; None if these rows are too few to show any.
        gap: Corrected estimate against test score, in ``unit``.
        unit: What 1 means, as words that follow a number; "" for the metric's own units.
        assumed: What is assumed about models that do not exist yet.
    """

    gain: float | None
    gap: float
    unit: str
    assumed: str


def alpha(opening: int, total: float = TOTAL) -> float:
    """The share of ``total`` that an opening may spend on false alarms: all openings together stay below it.

    Raises:
        ValueError: If ``opening`` is not 1 or more.
    """
    if opening < 1:
        raise ValueError(f"openings are counted from 1, but got {opening}")
    return total * 6 / (math.pi**2 * opening**2)


def gap(estimate: float, test: float, guard_error: float, test_error: float, direction: str) -> Gap | None:
    """The gap between the corrected estimate and the test score.

    Args:
        estimate: From guard rows.
        guard_error, test_error: Standard errors of the two, which come from different rows.
        direction: "min" or "max", whichever way the metric gets better.

    Returns:
        None if neither has an error, as with losses that are all the same: then nothing says which gaps are chance.
    """
    worse = test - estimate if direction == "min" else estimate - test
    error = math.hypot(guard_error, test_error)
    return Gap(worse, worse / error, _seen(GAP_Z, error)) if error > 0 else None


def smallest_gain(error: float, alpha: float) -> float:
    """The smallest gain that a paired test at level ``alpha`` shows in four of five cases where it is there.

    Args:
        error: Standard error of the paired difference.
    """
    return _seen(_NORMAL.inv_cdf(1 - alpha / 2), error)


def judge(
    *,
    gap: Gap | None,
    ordered: bool,
    gain: tuple[float, float] | None,
    is_baseline: bool,
    opening: int,
    custom: bool,
) -> list[str]:
    """The names of what a test says, always in this order.

    Args:
        gap: None if there is no corrected estimate with an interval, or no standard error.
        ordered: Rows come in order of time, so that test rows are the newest.
        gain: The paired interval of winner over baseline, positive is better; None if there is none.
        is_baseline: The winner is the baseline.
        opening: The how-manieth opening of these rows.
        custom: Only the Keras object can compute the metric.
    """
    found = []
    if gap is not None:
        if gap.z >= GAP_Z:
            found.append("POSSIBLE_DRIFT" if ordered else "UNEXPLAINED_GAP")
        else:
            found.append("SPLIT_MISMATCH" if gap.z <= -GAP_Z else "NO_GAP_SHOWN")
    if is_baseline or (gain is not None and gain[0] <= 0):
        found.append("NO_GAIN_SHOWN")
    if opening >= 2:
        found.append("REUSED_TEST_SET")
    if custom:
        found.append("NO_INTERVAL_FOR_THIS_METRIC")
    return found


def planned(objective_kind: str, guard_rows: int, test_rows: int, opening: int = 1) -> Planned | None:
    """What an opening could show, before any model exists.

    Args:
        objective_kind: A kind of ``scoring.Metric``.
        opening: The how-manieth of these test rows it would be.

    Returns:
        None for metrics whose spread cannot be guessed beforehand.
    """
    kind, unequal = objective_kind, math.sqrt(1 / guard_rows + 1 / test_rows)
    if kind in metrics.PROPORTIONS:
        right, apart = 0.9, 0.1
        gain = smallest_gain(math.sqrt(apart / test_rows), alpha(opening))
        return Planned(
            gain=gain if gain <= apart else None,  # two models cannot differ by more than they disagree
            gap=_seen(GAP_Z, math.sqrt(right * (1 - right)) * unequal),
            unit="points",
            assumed="the winner is right on 90 % of rows, and winner and baseline disagree on 10 % of them",
        )
    if kind in metrics.ROOTS:
        # By the delta method, with errors that are normal: se(RMSE) = RMSE / √(2 n).
        return Planned(
            gain=smallest_gain(1 / math.sqrt(2 * test_rows), alpha(opening)),
            gap=_seen(GAP_Z, unequal / math.sqrt(2)),
            unit="times the RMSE itself",
            assumed="errors are normal, and the squared errors of winner and baseline correlate at 0.5",
        )
    if kind in metrics.LOSSES | {"loss"}:
        return Planned(
            gain=smallest_gain(1 / math.sqrt(test_rows), alpha(opening)),
            gap=_seen(GAP_Z, unequal),
            unit="standard deviations of one row's loss",
            assumed="the losses of winner and baseline on a row correlate at 0.5",
        )
    if kind == "auc":
        test_error, guard_error = _auc_error(0.9, test_rows), _auc_error(0.9, guard_rows)
        return Planned(
            gain=smallest_gain(test_error, alpha(opening)),
            gap=_seen(GAP_Z, math.hypot(guard_error, test_error)),
            unit="",
            assumed="the AUC is 0.9, the two classes are equally large, and the AUCs of winner and baseline correlate "
            "at 0.5",
        )
    return None


def planned_line(planned: Planned) -> str:
    """What the test could show, in one line for people."""

    def amount(value: float) -> str:
        if planned.unit == "points":
            return f"{100 * value:.1f} points"
        return f"{value:.2g} {planned.unit}".rstrip()

    gap = f"a gap between corrected estimate and test score from {amount(planned.gap)} on"
    if planned.gain is None:
        return f"there are too few test rows to show any gain; {gap} would show in 4 of 5 cases (if {planned.assumed})"
    return (
        f"a gain over the baseline from {amount(planned.gain)} on and {gap} would show in 4 of 5 cases "
        f"(if {planned.assumed})"
    )


def _seen(threshold: float, error: float) -> float:
    """What lies ``threshold`` standard errors from nothing with the probability `POWER`."""
    return (threshold + _NORMAL.inv_cdf(POWER)) * error


def _auc_error(auc: float, rows: int) -> float:
    """Standard error of an AUC with classes of equal size.

    Hanley and McNeil 1982, "The meaning and use of the area under a receiver operating characteristic (ROC) curve".
    """
    each = max(1.0, rows / 2)
    one, other = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    return math.sqrt((auc * (1 - auc) + (each - 1) * (one + other - 2 * auc**2)) / each**2)

"""Verdicts: the levels of openings, the size of gaps and gains that rows can show, and which names they get."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.guard import verdicts
from search.guard.intervals import delong
from search.guard.statistics import standard_error
from search.guard.statistics import test_interval as interval_of
from search.guard.verdicts import Gap
from search.scorer.scoring import Score, resolve, score

RNG = np.random.default_rng(0)


def scored(kind: str, predictions: Any, labels: Any, loss: str = "mse", **config: Any) -> Score:
    declaration = {
        "outputs": [{"name": "out", "loss": loss, "from_logits": False, "weight": 1.0, "shape": [None, 1]}],
        "metrics": [{"output": "out", "name": "m", "kind": kind, "config": config}],
    }
    return score(resolve("val_m", declaration), declaration, np.asarray(predictions), np.asarray(labels))


def right(hits: Any) -> Score:
    hits = np.asarray(hits, dtype=float)
    return scored("accuracy", hits[:, None], np.ones(len(hits)), "binary_crossentropy")


# Standard errors


def test_the_error_of_a_mean_is_the_textbooks() -> None:
    errors = RNG.normal(size=400)
    one = scored("mse", errors[:, None], np.zeros(400))
    assert standard_error(one) == pytest.approx((errors**2).std(ddof=1) / 20)
    assert standard_error(right(np.arange(100) < 90)) == pytest.approx(math.sqrt(0.09 / 99))


def test_the_error_of_an_rmse_follows_the_delta_method() -> None:
    errors = RNG.normal(size=(2000, 1))
    rmse = scored("rmse", errors, np.zeros(2000))
    assert standard_error(rmse) == pytest.approx((errors**2).std() / math.sqrt(2000) / 2 / rmse.value, rel=0.01)


@pytest.mark.parametrize("kind", ["f1_score", "mcc", "balanced_accuracy", "r2_score", "precision", "auc"])
def test_the_error_is_the_spread_over_fresh_rows(kind: str) -> None:
    """Of a jackknife or DeLong error of 500 rows, against the spread of 300 draws (known to 4 %)."""
    rng = np.random.default_rng(1)

    def drawn() -> Score:
        labels = rng.integers(0, 2, 500).astype(float)
        guess = np.clip(0.5 + 0.25 * (labels - 0.5) + rng.normal(0, 0.3, 500), 0, 1)
        return scored(kind, guess[:, None], labels[:, None], "binary_crossentropy")

    draws = [drawn() for _ in range(300)]
    errors = [standard_error(one) for one in draws[:20]]
    assert np.median(errors) == pytest.approx(np.std([one.value for one in draws]), rel=0.15)


def test_the_error_of_an_auc_is_delongs_and_of_other_ranks_the_bootstraps() -> None:
    rng = np.random.default_rng(3)

    def drawn(**config: str) -> Score:
        labels = rng.integers(0, 2, 100)
        return scored("auc", (labels + rng.normal(size=100))[:, None], labels[:, None], **config)

    auc = drawn()
    _, covariance = delong(auc.parts[:, 0] > 0, auc.parts[None, :, 1])
    assert standard_error(auc) == pytest.approx(math.sqrt(covariance[0, 0]))
    # Groups of one row each are bootstrapped, which agrees with DeLong but for chance and small samples.
    assert standard_error(auc, groups=np.arange(100)) == pytest.approx(standard_error(auc), rel=0.1)
    fresh = np.std([drawn(curve="PR").value for _ in range(200)])  # known to 5 %
    assert standard_error(drawn(curve="PR")) == pytest.approx(fresh, rel=0.4)


def test_rows_of_a_group_count_together() -> None:
    errors = np.repeat(RNG.normal(size=40), 10)
    one = scored("mse", errors[:, None], np.zeros(400))
    apart, together = standard_error(one), standard_error(one, groups=np.repeat(np.arange(40), 10))
    assert together == pytest.approx((errors[::10] ** 2).std(ddof=1) / math.sqrt(40))
    assert together > 3 * apart and standard_error(one, ordered=True) > apart
    assert standard_error(one, groups=np.zeros(400)) == pytest.approx(apart)


def test_no_error_is_0_but_of_constant_losses() -> None:
    perfect = right(np.ones(100))
    found = interval_of(perfect)
    assert standard_error(perfect) == pytest.approx((found.high - found.low) / 2 / 1.959964) and found.low < 0.97
    labels = np.repeat([0, 1], 20)
    assert standard_error(scored("auc", labels[:, None] * 1.0, labels[:, None])) > 0.02
    assert standard_error(right([1])) > 0.1
    assert standard_error(scored("mse", np.full((50, 1), 0.1), np.zeros(50))) == 0
    assert standard_error(scored("mse", [[1.5]], [0.0])) == 0


# Numbers


def test_levels_of_the_first_openings() -> None:
    assert [verdicts.alpha(i) for i in (1, 2, 3)] == pytest.approx([0.030396, 0.007599, 0.003377], abs=5e-7)
    assert verdicts.alpha(2, total=0.1) == pytest.approx(2 * verdicts.alpha(2))
    with pytest.raises(ValueError, match="counted from 1, but got 0"):
        verdicts.alpha(0)


@given(st.integers(1, 2000), st.floats(0.001, 0.5))
def test_all_openings_together_stay_within_the_total(openings: int, total: float) -> None:
    spent = sum(verdicts.alpha(i, total) for i in range(1, openings + 1))
    # What is left is total · 6/π² · Σ 1/i² over the later ones, which lies between these two.
    assert total * 6 / math.pi**2 / (openings + 1) <= total - spent + 1e-12 <= total * 6 / math.pi**2 / openings + 1e-11


def test_a_gap_is_positive_when_test_is_worse() -> None:
    higher = verdicts.gap(0.95, 0.91, 0.02, 0.015, "max")
    assert (higher.gap, higher.z) == pytest.approx((0.04, 1.6))
    lower = verdicts.gap(0.91, 0.95, 0.02, 0.015, "min")
    assert (lower.gap, lower.z, lower.smallest) == pytest.approx((higher.gap, higher.z, higher.smallest))
    assert verdicts.gap(0.91, 0.95, 0.02, 0.015, "max").z == pytest.approx(-1.6)


def test_without_any_error_no_gap_is_known() -> None:
    for test in (0.4, 0.5, 0.6):
        assert verdicts.gap(0.5, test, 0, 0, "max") is None
    one = verdicts.gap(0.5, 0.4, 0.05, 0, "max")
    assert one is not None and one.z == pytest.approx(2)


def test_the_smallest_gap_is_shown_in_four_of_five_cases() -> None:
    error = 0.02
    smallest = verdicts.gap(0.5, 0.5, error * 0.6, error * 0.8, "max").smallest
    seen = RNG.normal(smallest, error, 20_000) / error >= verdicts.GAP_Z
    assert smallest == pytest.approx((2.58 + 0.841621) * error)
    assert seen.mean() == pytest.approx(0.8, abs=0.012)  # four standard deviations


def test_the_smallest_gain_is_shown_in_four_of_five_cases() -> None:
    assert verdicts.smallest_gain(0.01, 0.05) == pytest.approx(0.01 * (1.959964 + 0.841621))
    level = verdicts.alpha(1)
    gain = verdicts.smallest_gain(0.01, level)
    half = -0.01 * verdicts._NORMAL.inv_cdf(level / 2)
    assert (RNG.normal(gain, 0.01, 20_000) - half > 0).mean() == pytest.approx(0.8, abs=0.012)


# Names

SAYS = dict(gap=Gap(0.01, 0.5, 0.03), ordered=False, gain=(0.01, 0.02), is_baseline=False, opening=1, custom=False)


@pytest.mark.parametrize(
    "changed, names",
    [
        ({}, ["NO_GAP_SHOWN"]),
        ({"gap": Gap(0.1, 2.5799, 0.1)}, ["NO_GAP_SHOWN"]),
        ({"gap": Gap(0.1, 2.58, 0.1)}, ["UNEXPLAINED_GAP"]),
        ({"gap": Gap(0.1, 2.58, 0.1), "ordered": True}, ["POSSIBLE_DRIFT"]),
        ({"gap": Gap(-0.1, -2.5799, 0.1)}, ["NO_GAP_SHOWN"]),
        ({"gap": Gap(-0.1, -2.58, 0.1)}, ["SPLIT_MISMATCH"]),
        ({"gap": Gap(-0.1, -2.58, 0.1), "ordered": True}, ["SPLIT_MISMATCH"]),
        ({"gap": None}, []),
        ({"gain": None}, ["NO_GAP_SHOWN"]),
        ({"gain": (0.0, 0.02)}, ["NO_GAP_SHOWN", "NO_GAIN_SHOWN"]),
        ({"gain": (-0.01, 0.02)}, ["NO_GAP_SHOWN", "NO_GAIN_SHOWN"]),
        ({"gain": (-0.03, -0.01)}, ["NO_GAP_SHOWN", "NO_GAIN_SHOWN"]),
        ({"gain": None, "is_baseline": True}, ["NO_GAP_SHOWN", "NO_GAIN_SHOWN"]),
        ({"opening": 2}, ["NO_GAP_SHOWN", "REUSED_TEST_SET"]),
        ({"gap": None, "gain": None, "custom": True}, ["NO_INTERVAL_FOR_THIS_METRIC"]),
        (
            {"gap": None, "gain": (0, 0), "opening": 3, "custom": True},
            ["NO_GAIN_SHOWN", "REUSED_TEST_SET", "NO_INTERVAL_FOR_THIS_METRIC"],
        ),
    ],
)
def test_names(changed: dict[str, Any], names: list[str]) -> None:
    assert verdicts.judge(**(SAYS | changed)) == names


def test_180_guard_and_359_test_rows_show_nothing_of_gaps_up_to_4_points() -> None:
    def judged(estimate: float, test: float) -> list[str]:
        errors = (math.sqrt(p * (1 - p) / n) for p, n in ((estimate, 180), (test, 359)))
        return verdicts.judge(**(SAYS | {"gap": verdicts.gap(estimate, test, *errors, "max")}))

    for percent in range(80, 99):
        assert judged(percent / 100, percent / 100 - 0.04) == ["NO_GAP_SHOWN"]
    assert judged(0.98, 0.93) == ["UNEXPLAINED_GAP"]  # five points are seen, where few are wrong


# Plans


def test_a_plan_for_accuracy_with_180_guard_and_359_test_rows() -> None:
    planned = verdicts.planned("sparse_categorical_accuracy", 180, 359)
    assert planned is not None and planned.gain is not None
    assert planned.gap == pytest.approx(3.421621 * 0.3 * math.sqrt(1 / 180 + 1 / 359))
    assert planned.gain == pytest.approx(3.0062 * math.sqrt(0.1 / 359), rel=1e-3)
    line = verdicts.planned_line(planned)
    assert "a gain over the baseline from 5.0 points on" in line and "from 9.4 points on" in line
    assert "right on 90 % of rows" in line and "disagree on 10 %" in line


def test_a_plan_does_not_promise_a_gain_above_the_disagreement() -> None:
    planned = verdicts.planned("accuracy", 10, 20)
    assert planned is not None and planned.gain is None
    assert "too few test rows to show any gain" in verdicts.planned_line(planned)


def test_plans_for_losses_are_in_standard_deviations_of_a_rows_loss() -> None:
    for kind in ("loss", "mean_squared_error", "binary_crossentropy", "mean_absolute_error"):
        planned = verdicts.planned(kind, 100, 400)
        assert planned is not None and planned.gap == pytest.approx(3.421621 * math.sqrt(0.0125))
        assert "standard deviations of one row's loss" in verdicts.planned_line(planned)


def test_the_plan_for_rmse_holds_for_normal_errors() -> None:
    """On 400 fresh rows each: the spread of the gap (2 % known) and of the gain of losses that correlate at 0.5."""
    planned = verdicts.planned("root_mean_squared_error", 400, 400)
    assert planned is not None and planned.gain is not None
    rng = np.random.default_rng(2)
    shared, own, other = rng.normal(size=(3, 2000, 400))
    r = math.sqrt(0.5)  # squares of normals that correlate at √0.5 correlate at 0.5
    ours = np.sqrt((shared**2).mean(axis=1))
    theirs = np.sqrt(((r * shared + math.sqrt(1 - r**2) * own) ** 2).mean(axis=1))
    fresh = np.sqrt((other**2).mean(axis=1))
    assert planned.gain == pytest.approx(3.0062 * (ours - theirs).std(), rel=0.08)
    assert planned.gap == pytest.approx(3.421621 * (ours - fresh).std(), rel=0.08)


def test_the_plan_for_auc_is_hanleys_and_mcneils() -> None:
    planned = verdicts.planned("auc", 100, 100)
    assert planned is not None and planned.gain is not None
    # It is exact for scores that decay exponentially: an AUC of .9 has scales of 9 and 1. 4000 draws, known to 1 %.
    above = RNG.exponential(9, (4000, 50, 1)) > RNG.exponential(1, (4000, 1, 50))
    assert above.mean() == pytest.approx(0.9, abs=0.003)
    assert planned.gap == pytest.approx(3.421621 * math.sqrt(2) * above.mean(axis=(1, 2)).std(), rel=0.05)
    assert planned.gain == pytest.approx(3.0062 / 3.421621 / math.sqrt(2) * planned.gap, rel=1e-3)
    assert verdicts.planned_line(planned).count(" from 0.") == 2


def test_other_metrics_have_no_plan() -> None:
    for kind in ("f1_score", "r2_score", "average_precision", "custom"):
        assert verdicts.planned(kind, 100, 100) is None


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_more_rows_show_more(guard: int, test: int) -> None:
    for kind, (more_guard, more_test) in itertools.product(("accuracy", "loss", "auc"), ((1, 0), (0, 1))):
        fewer, more = verdicts.planned(kind, guard, test), verdicts.planned(kind, guard + more_guard, test + more_test)
        assert fewer is not None and more is not None
        assert more.gap <= fewer.gap and math.isfinite(more.gap)
        assert fewer.gain is None or (more.gain is not None and more.gain <= fewer.gain)

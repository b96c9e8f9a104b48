"""Intervals: numbers from the literature, coverage where it can be simulated fast, and no nan."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from search.guard.intervals import delong, matched_interval, mcnemar, newcombe, proportion_interval, share_interval, z
from search.guard.statistics import paired_difference, standard_error, test_interval
from search.guard.verdicts import GAP_Z, alpha, gap
from search.scorer.scoring import Metric, Score, resolve, score, value_of

test_interval.__test__ = False  # a function of ours, not one of pytest's

RNG = np.random.default_rng(0)


def scored(kind, predictions, labels, loss="mse", **config):
    declaration = {
        "outputs": [{"name": "out", "loss": loss, "from_logits": False, "weight": 1.0, "shape": [None, 1]}],
        "metrics": [{"output": "out", "name": "m", "kind": kind, "config": config}],
    }
    return score(resolve("val_m", declaration), declaration, np.asarray(predictions), np.asarray(labels))


def right(hits):
    """An accuracy score with these hits (1) and errors (0)."""
    hits = np.asarray(hits, dtype=float)
    return scored("accuracy", hits[:, None], np.ones(len(hits)), "binary_crossentropy")


def share(successes, n):
    return right(np.arange(n) < successes)


def squared(errors):
    return scored("mse", np.asarray(errors)[:, None], np.zeros(len(errors)))


def test_wilson_and_exact_of_900_in_1000():
    wilson, exact = (proportion_interval(900, 1000, method=method) for method in ("wilson", "exact"))
    assert (wilson.low, wilson.high) == pytest.approx((0.87985, 0.91709), abs=5e-6)
    assert (exact.low, exact.high) == pytest.approx((0.87971, 0.91789), abs=5e-6)


def test_newcombe_of_943_less_918_in_1000():
    found = newcombe(943, 1000, 918, 1000)
    assert (found.estimate, found.low, found.high) == pytest.approx((0.0250, 0.00266, 0.04759), abs=5e-6)
    mirrored = newcombe(918, 1000, 943, 1000)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))


def test_mcnemar_of_15_against_30():
    assert mcnemar(15, 30).exact == pytest.approx(0.035698, abs=5e-7)
    assert mcnemar(15, 30).mid_p == pytest.approx(0.025896, abs=5e-7)
    assert mcnemar(30, 15) == mcnemar(15, 30)
    assert mcnemar(7, 7).mid_p == mcnemar(0, 0).mid_p == 1.0


def test_proportions_are_wilson_and_exact_with_under_ten_errors():
    assert test_interval(share(900, 1000)) == proportion_interval(900, 1000)
    assert test_interval(share(990, 1000)).method == "Wilson"
    assert test_interval(share(991, 1000)).method == "Clopper-Pearson"
    assert test_interval(share(9, 1000)).method == "Clopper-Pearson"
    perfect = test_interval(share(1000, 1000))
    assert perfect.high == 1.0 and 0.99 < perfect.low < 1.0


def test_a_higher_level_is_a_wider_interval():
    errors = RNG.normal(size=300)
    labels = RNG.integers(0, 2, 300)
    for one in (share(250, 300), squared(errors), scored("auc", errors[:, None] + labels[:, None], labels)):
        narrow, wide = test_interval(one), test_interval(one, level=1 - 0.05 * 6 / math.pi**2)
        assert wide.low < narrow.low < one.value < narrow.high < wide.high
        assert (narrow.level, wide.level) == (0.95, pytest.approx(0.9696, abs=1e-4))


@pytest.mark.parametrize("kind", ["mse", "rmse", "r2_score", "mae"])
def test_losses_have_a_bootstrap_interval_around_the_closed_form(kind):
    labels = RNG.normal(size=(400, 1))
    one = scored(kind, labels + RNG.normal(size=(400, 1)), labels)
    found = test_interval(one)
    assert found.method == "BCa bootstrap" and found.low < one.value < found.high
    if kind in ("mse", "mae"):
        half = 1.96 * one.losses.std(ddof=1) / 20
        # Normal and bootstrap ends of a mean of 400 skewed values differ by a tenth of the width.
        assert (found.low, found.high) == pytest.approx((one.value - half, one.value + half), abs=half / 5)
    if kind == "rmse":
        plain = test_interval(squared(np.sqrt(one.losses)))
        assert (found.low**2, found.high**2) == pytest.approx((plain.low, plain.high), rel=0.01)


def test_many_rows_use_the_closed_form():
    one = squared(RNG.normal(size=50_001))
    found = test_interval(one)
    half = 1.959964 * one.losses.std(ddof=1) / math.sqrt(50_001)
    assert found.method == "closed form"
    assert (found.low, found.high) == pytest.approx((one.value - half, one.value + half), rel=1e-6)


@pytest.mark.parametrize(
    "one",
    [
        squared(np.full(50, 2.0)),
        squared(np.zeros(50)),
        squared([1.5]),
        share(50, 50),
        share(0, 50),
        share(1, 1),
        scored("rmse", np.ones((50, 1)), np.zeros(50)),
        scored("r2_score", np.ones((50, 1)), np.arange(50.0)),
        scored("f1_score", np.ones((50, 1)), np.ones(50)),
        scored("mcc", np.zeros((50, 1)), np.arange(50) % 2),
        scored("auc", np.zeros((50, 1)), np.arange(50) % 2),
        scored("auc", (np.arange(50) % 2)[:, None], np.arange(50) % 2),
        scored("auc", np.arange(3.0)[:, None], np.array([0, 1, 0])),
        squared(np.append(np.zeros(49), 1e9)),
    ],
)
def test_degenerate_rows_give_numbers(one):
    found = test_interval(one)
    assert math.isfinite(found.low) and math.isfinite(found.high)
    assert found.low <= one.value + 1e-9 and one.value - 1e-9 <= found.high
    same = paired_difference(one, one)
    assert same.estimate == 0.0 and same.low == -same.high and same.p in (None, 1.0)
    # Only of yes and no is it known how often two models that never disagreed may do so.
    assert (same.high > 0) == (one.metric.kind == "accuracy")


def test_constant_losses_say_so():
    assert test_interval(squared(np.full(50, 2.0))).method == "constant data"


def test_a_perfect_ranking_is_not_certain():
    labels = np.arange(40) % 2
    found = test_interval(scored("auc", labels[:, None], labels))
    assert found.high == 1.0 and found.low == pytest.approx(0.025 ** (1 / 20))  # 20 disjoint pairs, all right


def counted(kind, truth, guess, **config):
    """A score of counts, from one truth and one guess per row and class."""
    truth, guess = np.asarray(truth, dtype=float), np.asarray(guess, dtype=float)
    parts = np.hstack([truth * guess, guess, truth])
    metric = Metric(kind, 0, config)
    return Score(metric, value_of(metric, parts), None, parts)


CLASSES = np.repeat([0, 1, 2], [4, 20, 36])
FIRST = (CLASSES == 0)[:, None]
PERFECT = {
    "accuracy of groups": (share(60, 60), {"groups": np.arange(60) // 3}, 20, 1),
    "accuracy in time": (share(60, 60), {"ordered": True}, 15, 1),
    "precision": (counted("precision", FIRST, FIRST), {}, 4, 1),
    "recall": (counted("recall", FIRST, FIRST), {}, 4, 1),
    "recall of groups": (counted("recall", FIRST, FIRST), {"groups": np.arange(60) // 2}, 2, 1),
    "f1": (counted("f1_score", FIRST, FIRST), {}, 4, 1),
    "micro f1": (counted("f1_score", np.eye(3)[CLASSES], np.eye(3)[CLASSES], average="micro"), {}, 60, 1),
    "macro f1": (counted("f1_score", np.eye(3)[CLASSES], np.eye(3)[CLASSES], average="macro"), {}, 4, 1),
    "balanced accuracy": (counted("balanced_accuracy", np.eye(3)[CLASSES], np.eye(3)[CLASSES]), {}, 4, 1),
    "mcc": (counted("mcc", np.eye(3)[CLASSES], np.eye(3)[CLASSES]), {}, 4, 2),
    "auc of groups": (scored("auc", FIRST * 1.0, FIRST), {"groups": np.arange(60) // 2}, 2, 1),
    "average precision": (scored("auc", FIRST * 1.0, FIRST, curve="PR"), {}, 4, 1),
}


@pytest.mark.parametrize("name", PERFECT)
def test_a_perfect_score_is_as_sure_as_the_rows_it_rests_on(name):
    one, rows, count, span = PERFECT[name]
    found = test_interval(one, **rows)
    low = 1 - span * (1 - 0.025 ** (1 / count))  # Clopper-Pearson, all of ``count`` right
    assert (one.value, found.low, found.high) == pytest.approx((1, low, 1))
    assert found.method == f"Clopper-Pearson over an effective count of {count}"
    assert standard_error(one, **rows) == pytest.approx((1 - low) / 2 / 1.959964)


def test_errors_that_come_alone_make_the_rows_of_a_group_count_for_more():
    groups = np.arange(100) // 10
    together, apart = right(np.arange(100) >= 10), right(np.arange(100) % 20 > 1)
    assert together.value == apart.value
    errors = [standard_error(one, groups=groups) for one in (together, apart)]
    assert errors[0] > 1.5 * errors[1]
    # 10 wrong rows and one more group of 10, over the 1 group with an error and that one: each counts as 10 rows.
    assert test_interval(together, groups=groups).method.endswith("an effective count of 10")


def test_constant_scores_of_a_bounded_metric_are_not_certain():
    half = test_interval(scored("auc", np.zeros((50, 1)), np.arange(50) % 2))
    assert half.low < 0.35 and half.high > 0.65
    assert standard_error(counted("balanced_accuracy", np.eye(2)[np.arange(50) % 2], np.eye(2)[[0] * 50])) > 0.05


def nearly_perfect(kind, rng, rows):
    """A score that is .97 in truth, or an AUC of .98, and how its rows depend on each other."""
    if kind == "auc":
        labels = rng.random(rows) < 0.3
        return scored("auc", (3 * labels + rng.normal(size=rows))[:, None], labels), {}
    if kind == "precision":
        guess = rng.random((rows, 1)) < 0.3
        return counted("precision", guess & (rng.random((rows, 1)) < 0.97), guess), {}
    return right(rng.random(rows) < 0.97), {"ordered": kind == "accuracy in time"}


@pytest.mark.parametrize("kind", ["accuracy", "accuracy in time", "precision", "auc"])
def test_few_errors_raise_few_false_alarms(kind):
    """With a true rate of 3 %, 12 or more of 150 would be seen once in 500 times. It was 15 % for two of these."""
    rng = np.random.default_rng(5)
    false = 0
    for _ in range(150):
        (guard, how), (test, _) = nearly_perfect(kind, rng, 60), nearly_perfect(kind, rng, 1000)
        found = gap(guard.value, test.value, standard_error(guard, **how), standard_error(test, **how), "max")
        false += abs(found.z) >= GAP_Z
    assert false < 12


@given(st.integers(0, 60), st.integers(1, 60), st.floats(0.5, 0.9999))
def test_an_effective_count_of_whole_rows_is_clopper_pearsons(successes, rows, level):
    successes = min(successes, rows)
    exact = proportion_interval(successes, rows, level=level, method="exact")
    assert share_interval(successes / rows, rows, level) == pytest.approx((exact.low, exact.high), abs=1e-9)


def test_delong_is_the_definition():
    """Against placement values, the O(n²) form in the paper of DeLong, DeLong and Clarke-Pearson."""
    labels = RNG.integers(0, 2, 90).astype(bool)
    scores = np.round(RNG.normal(size=(2, 90)) + labels, 1)  # rounded, so that there are ties
    aucs, covariance = delong(labels, scores)
    psi = [(s[labels][:, None] > s[~labels]) + 0.5 * (s[labels][:, None] == s[~labels]) for s in scores]
    assert aucs == pytest.approx([roc_auc_score(labels, s) for s in scores])
    m, n = labels.sum(), (~labels).sum()
    expected = np.cov([p.mean(1) for p in psi]) / m + np.cov([p.mean(0) for p in psi]) / n
    assert covariance == pytest.approx(expected)


def test_delong_covers():
    """400 draws; the share covered has a standard error of 1.1 points, so 4.5 of them are allowed."""
    truth = 0.7602  # P(N(1, 1) > N(0, 1)) = Φ(1/√2)
    labels = np.arange(160) % 2
    covered = 0
    for _ in range(400):
        found = test_interval(scored("auc", (RNG.normal(size=160) + labels)[:, None], labels))
        covered += found.low < truth < found.high
    assert 0.90 < covered / 400 <= 1.0


def test_gain_is_positive_when_the_winner_is_better_whatever_the_metric():
    noise = RNG.normal(size=300)
    labels = np.arange(300) % 2
    better, worse = squared(noise), squared(noise * 1.5)
    assert paired_difference(better, worse).low > 0
    assert paired_difference(worse, better).high < 0
    good, bad = share(280, 300), share(200, 300)
    found = paired_difference(good, bad)
    assert found.estimate == pytest.approx(80 / 300)
    assert found.low > 0 and found.p == pytest.approx(mcnemar(80, 0).mid_p)
    strong, weak = (scored("auc", (noise + k * labels)[:, None], labels) for k in (2, 0.2))
    found = paired_difference(strong, weak)
    assert found.low > 0 and found.p < 0.01 and found.method == "paired DeLong"
    close, far = (scored("rmse", (noise * k)[:, None], np.zeros(300)) for k in (1, 2))
    assert paired_difference(close, far).low > 0
    fit, flat = (scored("r2_score", (labels + noise * k)[:, None], labels) for k in (0.1, 1))
    assert paired_difference(fit, flat).low > 0


def pair(won, lost, rows=359):
    """Two models of which each is right where the other is wrong on so many rows."""
    at = np.arange(rows)
    return right(at >= lost), right((at < lost) | (at >= lost + won))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 40), st.integers(0, 40), st.sampled_from([alpha(i) for i in (1, 2, 5, 12)]))
def test_the_interval_of_a_gain_is_on_one_side_of_0_when_the_mid_p_is_small(won, lost, chance):
    found = paired_difference(*pair(won, lost), level=1 - chance)
    assert (found.low > 0 or found.high < 0) == (mcnemar(won, lost).mid_p <= chance)
    assert found.low <= found.estimate == pytest.approx((won - lost) / 359) and found.estimate <= found.high
    assert found.method == f"exact mid-p of {won + lost} discordant rows"
    mirrored = matched_interval(lost, won, 359, 1 - chance)
    assert matched_interval(won, lost, 359, 1 - chance).low == pytest.approx(-mirrored.high)


def test_a_gain_is_shown_by_chance_no_oftener_than_its_level_says():
    """Exact, over all ways in which binomially many rows can be discordant; BCa had .021 to .0235."""
    nominal = alpha(1) / 2
    shown = {
        (won, lost): matched_interval(won, lost, 359, 1 - alpha(1)).low > 0 for won in range(25) for lost in range(won)
    }
    for mean in (4, 6, 8, 10):
        chance = sum(
            stats.binom.pmf(won + lost, 359, mean / 359) * stats.binom.pmf(won, won + lost, 0.5)
            for (won, lost), seen in shown.items()
            if seen
        )
        assert chance < nominal


def test_many_discordant_rows_have_the_bootstraps_interval():
    for won, lost in ((120, 80), (80, 0), (150, 150)):
        ours, theirs = pair(won, lost, 1000)
        fewer = (theirs.losses - ours.losses)[:, None]
        spread = fewer.std() / math.sqrt(1000)
        found = paired_difference(ours, theirs)
        ends = (found.estimate - 1.96 * spread, found.estimate + 1.96 * spread)
        assert (found.low, found.high) == pytest.approx(ends, abs=0.2 * spread)


def test_models_that_never_disagree_may_do_so_on_other_rows():
    found = paired_difference(share(300, 359), share(300, 359))
    most = 1 - 0.025 ** (1 / 359)
    assert (found.estimate, found.low, found.high, found.p) == pytest.approx((0, -most, most, 1))


def test_pairing_narrows_the_difference():
    hits = RNG.random(1000) < 0.9
    other = hits & (RNG.random(1000) < 0.99)
    paired = paired_difference(right(hits), right(other))
    unpaired = newcombe(int(hits.sum()), 1000, int(other.sum()), 1000)
    assert paired.low > 0 > unpaired.low
    assert paired.high - paired.low < (unpaired.high - unpaired.low) / 2


def test_pairs_must_be_alike():
    with pytest.raises(ValueError, match="same rows"):
        paired_difference(share(1, 5), share(1, 6))
    with pytest.raises(ValueError, match="one metric"):
        paired_difference(share(1, 5), squared(np.ones(5)))


def test_groups_widen_what_rows_would_promise():
    groups = np.repeat(np.arange(30), 10)
    hits = np.repeat(RNG.random(30) < 0.7, 10)  # ten copies of thirty answers
    rows, grouped = test_interval(right(hits)), test_interval(right(hits), groups=groups)
    assert grouped.method == "BCa bootstrap of 30 groups of rows"
    assert (grouped.high - grouped.low) / (rows.high - rows.low) == pytest.approx(math.sqrt(10), rel=0.25)
    labels = np.arange(300) % 2
    auc = scored("auc", (labels + np.repeat(RNG.normal(size=30), 10))[:, None], labels)
    assert test_interval(auc, groups=groups).method.startswith("percentile bootstrap of 30 groups of rows")
    assert paired_difference(auc, auc, groups=groups).high == 0.0


def test_a_single_group_is_said_to_be_one():
    """By then the seal is open, so there must be an answer."""
    one = share(250, 300)
    for found in (
        test_interval(one, groups=np.zeros(300)),
        paired_difference(one, one, groups=np.zeros(300)),
    ):
        assert found.method.endswith("too narrow: all rows are one group")
    assert test_interval(one, groups=np.zeros(300)).low == test_interval(one).low


def test_ordered_rows_are_resampled_in_blocks():
    drift = np.cumsum(RNG.normal(size=512))
    plain, blocks = test_interval(squared(drift)), test_interval(squared(drift), ordered=True)
    assert blocks.method == "BCa bootstrap of 64 groups of rows"
    assert blocks.high - blocks.low > 1.5 * (plain.high - plain.low)


def test_average_precision_and_several_labels_have_intervals():
    labels = RNG.integers(0, 2, (120, 3))
    for config in ({"curve": "PR"}, {"multi_label": True}, {}):
        one = scored("auc", labels + RNG.normal(size=(120, 3)), labels, **config)
        found = test_interval(one)
        assert found.method == "percentile bootstrap" and found.low < one.value < found.high


def later(kind, rows=90):
    """A score of moderate errors, for intervals that no formula has."""
    rng = np.random.default_rng(6)
    labels = rng.random((rows, 1)) < 0.5
    if kind == "mse":
        return squared(rng.exponential(size=rows))
    if kind == "f1_score":
        return counted(kind, labels, labels ^ (rng.random((rows, 1)) < 0.3))
    return scored("auc", labels + rng.normal(size=(rows, 1)), labels, curve="PR")


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("kind", ["mse", "f1_score", "average_precision"])
def test_every_later_opening_has_a_wider_interval(kind, grouped):
    one, groups = later(kind), np.arange(90) // 3 if grouped else None
    found = [test_interval(one, level=1 - alpha(opening), groups=groups) for opening in (1, 5, 12, 20)]
    for sooner, latter in itertools.pairwise(found):
        assert latter.low < sooner.low and sooner.high < latter.high
    # As much wider as normal ends would be: with too few draws the ends stay at the furthest draw.
    wider = (found[-1].high - found[-1].low) / (found[0].high - found[0].low)
    assert wider > 0.98 * z(1 - alpha(20)) / z(1 - alpha(1))


def test_the_same_seed_gives_the_same_interval():
    one = squared(RNG.normal(size=100))
    assert test_interval(one) == test_interval(one)
    assert test_interval(one, seed=1) != test_interval(one)

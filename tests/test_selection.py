"""The rule that chooses the winner and its corrected estimate: null searches, every metric, and a slow reference."""

from __future__ import annotations

import dataclasses
import math
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st

from search.errors import StudyFailed
from search.guard.candidates import Candidate
from search.guard.few_errors import exact_interval, is_few
from search.guard.intervals import proportion_interval
from search.guard.selection import choose, corrected, noise_floor
from search.guard.statistics import standard_error, test_interval
from search.guard.verdicts import gap, judge
from search.scorer import metrics, ranks
from search.scorer.scoring import Metric, Score, value_of

test_interval.__test__ = False  # a function of ours, not one of pytest's

ACCURACY, MSE = Metric("accuracy"), Metric("mean_squared_error")


def candidate(metric, trial, labels, predicted, validation_rows, *, configuration=None, size=None):
    """A model whose first predictions are of validation rows and whose others are of guard rows."""
    kind = "mean_squared_error" if metric.kind == "loss" else metric.kind
    predicted = np.asarray(predicted, dtype=float)
    parts = metrics.parts(kind, metric.config, labels, predicted, logits=False)
    seen, sealed = parts[:validation_rows], parts[validation_rows:]
    scored = dataclasses.replace(metric, kind=kind)
    return Candidate(
        trial=trial,
        configuration=trial if configuration is None else configuration,
        size=size,
        score=value_of(scored, seen) if validation_rows else 0.0,
        guard=value_of(scored, sealed),
        parts=sealed,
        validation=None if kind in metrics.RANKS else seen.sum(axis=0),
    )


def hits(trial, validation, guard, *, configuration=None, size=None):
    """A model that is right (1) or wrong (0) on these rows."""
    every = np.concatenate([validation, guard])
    right = candidate(ACCURACY, trial, np.ones(len(every)), every[:, None], len(validation))
    return dataclasses.replace(right, configuration=trial if configuration is None else configuration, size=size)


def losses(trial, validation, guard, **changes):
    """A model with these squared errors."""
    every = np.sqrt(np.concatenate([validation, guard]))
    made = candidate(MSE, trial, np.zeros(len(every)), every[:, None], len(validation))
    return dataclasses.replace(made, **changes)


# Searches without signal


def test_random_labels_are_worth_a_half():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 1000)
    pool = [candidate(ACCURACY, k, labels, rng.random((1000, 1)), 0) for k in range(500)]
    choice = choose(ACCURACY, "max", pool, 0, 1000)
    assert choice.pooled[choice.trial] > 0.535
    found = corrected(ACCURACY, "max", pool, 0, 1000, repeats=300)
    assert found.estimate == pytest.approx(0.5, abs=0.03)  # sd over seeds .008
    assert found.low < 0.5 < found.high
    assert found.method == "bootstrap bias-corrected over 300 resamples of guard rows"


def test_random_scores_have_an_auc_of_a_half():
    rng = np.random.default_rng(1)
    metric, labels = Metric("auc"), rng.random(1000) < 0.3
    pool = [candidate(metric, k, labels, rng.random((1000, 1)), 0) for k in range(200)]
    choice = choose(metric, "max", pool, 0, 1000)
    assert choice.pooled[choice.trial] > 0.535
    assert corrected(metric, "max", pool, 0, 1000, repeats=100).estimate == pytest.approx(0.5, abs=0.045)


def test_random_probabilities_have_the_log_loss_of_random_probabilities():
    rng = np.random.default_rng(2)
    metric, labels = Metric("binary_crossentropy"), rng.integers(0, 2, 1000)
    pool = [candidate(metric, k, labels, 1 / (1 + np.exp(-rng.normal(size=(1000, 1)))), 0) for k in range(500)]
    choice = choose(metric, "min", pool, 0, 1000)
    assert choice.pooled[choice.trial] < 0.785
    assert corrected(metric, "min", pool, 0, 1000, repeats=300).estimate == pytest.approx(0.806, abs=0.03)


def test_random_predictions_have_the_error_of_random_predictions():
    rng = np.random.default_rng(3)
    labels = rng.normal(size=1000)
    pool = [candidate(MSE, k, labels, 0.3 * rng.normal(size=(1000, 1)), 0) for k in range(500)]
    choice = choose(MSE, "min", pool, 0, 1000)
    mean = np.mean(list(choice.pooled.values()))
    assert choice.pooled[choice.trial] < mean - 0.03
    assert corrected(MSE, "min", pool, 0, 1000, repeats=300).estimate == pytest.approx(mean, abs=0.035)


def adaptive_search(seed, trials=300, rows=500, features=30):
    """A search of linear rules that draws near the best ones so far, on labels that nothing predicts."""
    rng = np.random.default_rng(seed)
    x, labels = rng.normal(size=(2 * rows, features)), rng.integers(0, 2, 2 * rows)
    rules, pool = [], []
    for k in range(trials):
        rule = rng.normal(size=features) / math.sqrt(features)
        if k >= 20:
            best = np.argsort([-one.score for one in pool])[:10]
            rule = 0.5 * rule + np.mean([rules[j] for j in best], axis=0)
        rules.append(rule / np.linalg.norm(rule))
        pool.append(candidate(ACCURACY, k, labels, (x @ rules[-1] > 0)[:, None], rows))
    return max(one.score for one in pool), corrected(ACCURACY, "max", pool, rows, rows, repeats=200)


def test_an_adaptive_search_bends_its_best_score_and_not_the_corrected_one():
    raw, found = zip(*(adaptive_search(seed) for seed in range(20)), strict=True)
    assert np.mean(raw) > 0.54
    # Single estimates have a sd of about .02, their mean over 20 seeds one of .005.
    assert np.mean([one.estimate for one in found]) == pytest.approx(0.5, abs=0.015)


@pytest.mark.parametrize("copies", [1, 20])
def test_nothing_to_choose_from_is_nothing_to_correct(copies):
    rng = np.random.default_rng(4)
    errors = rng.exponential(size=400)
    pool = [losses(k, errors[:100], errors[100:]) for k in range(copies)]
    found = corrected(MSE, "min", pool, 100, 300)
    # Out of bag are 110 rows; the mean over 1000 resamples has a sd of about .076/sqrt(1000).
    assert found.estimate == pytest.approx(errors[100:].mean(), abs=0.012)
    assert found.wins == {0: 1.0} | {k: 0.0 for k in range(1, copies)}


def test_a_vote_fitted_on_the_guard_rows_fools_the_estimate_but_not_the_test():
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 2, 1500)
    guesses = rng.integers(0, 2, (1000, 1500))
    scored = guesses[:, :1000] == labels[:1000]
    votes = np.where(scored.mean(axis=1)[:, None] > 0.5, guesses, 1 - guesses).mean(axis=0)
    pool = [candidate(ACCURACY, k, labels[:1000], p[:1000, None], 500) for k, p in enumerate([*guesses[:50], votes])]
    found = corrected(ACCURACY, "max", pool, 500, 500)
    assert found.estimate > 0.7 and found.wins[50] == 1.0
    score = fresh_score(labels[1000:], votes[1000:])
    fresh = test_interval(score)
    assert fresh.low < 0.5 < fresh.high
    guard_error = standard_error(fresh_score(labels[500:1000], votes[500:1000]))
    seen = gap(found.estimate, score.value, guard_error, standard_error(score), "max")
    said = judge(gap=seen, ordered=False, gain=None, is_baseline=False, opening=1, custom=False)
    assert said == ["UNEXPLAINED_GAP"]


def fresh_score(labels, predicted):
    parts = metrics.parts("accuracy", {}, labels, predicted[:, None].astype(float), logits=False)
    return Score(ACCURACY, value_of(ACCURACY, parts), parts[:, 0], parts)


# Every metric


def binary(rng, rows):
    labels = rng.integers(0, 2, rows)
    return labels, np.round(np.clip(0.5 * labels + rng.random(rows) * 0.6, 0.01, 0.99), 2)[:, None]


def classes(rng, rows):
    labels = rng.integers(0, 3, rows)
    p = rng.random((rows, 3)) + np.eye(3)[labels] * 0.5
    return labels, p / p.sum(axis=1, keepdims=True)


def hot(rng, rows):
    labels, p = classes(rng, rows)
    return np.eye(3)[labels], p


def numbers(rng, rows):
    labels = 50 + rng.normal(size=rows)
    return labels, (labels + 0.5 * rng.normal(size=rows))[:, None]


def flat(p):
    return p[:, 0] > 0.5


EVERY = {
    "accuracy": ("accuracy", {}, binary, lambda y, p: sk.accuracy_score(y, flat(p))),
    "binary": ("binary_accuracy", {}, binary, lambda y, p: sk.accuracy_score(y, flat(p))),
    "categorical": ("categorical_accuracy", {}, hot, lambda y, p: sk.accuracy_score(y.argmax(1), p.argmax(1))),
    "sparse": ("sparse_categorical_accuracy", {}, classes, lambda y, p: sk.accuracy_score(y, p.argmax(1))),
    "balanced": ("balanced_accuracy", {}, classes, lambda y, p: sk.balanced_accuracy_score(y, p.argmax(1))),
    "log-loss": ("binary_crossentropy", {}, binary, lambda y, p: sk.log_loss(y, p[:, 0])),
    "log-loss of classes": ("sparse_categorical_crossentropy", {}, classes, lambda y, p: sk.log_loss(y, p)),
    "loss": ("loss", {}, numbers, lambda y, p: sk.mean_squared_error(y, p)),
    "mse": ("mean_squared_error", {}, numbers, lambda y, p: sk.mean_squared_error(y, p)),
    "rmse": ("root_mean_squared_error", {}, numbers, lambda y, p: sk.root_mean_squared_error(y, p)),
    "mae": ("mean_absolute_error", {}, numbers, lambda y, p: sk.mean_absolute_error(y, p)),
    "r2": ("r2_score", {}, numbers, lambda y, p: sk.r2_score(y, p)),
    "precision": ("precision", {}, binary, lambda y, p: sk.precision_score(y, flat(p))),
    "recall": ("recall", {}, binary, lambda y, p: sk.recall_score(y, flat(p))),
    "f1": ("f1_score", {"threshold": 0.5}, binary, lambda y, p: sk.f1_score(y, flat(p))),
    "f1 macro": ("f1_score", {"average": "macro"}, hot, lambda y, p: macro(y, p)),
    "mcc": ("mcc", {}, classes, lambda y, p: sk.matthews_corrcoef(y, p.argmax(1))),
    "auc": ("auc", {}, binary, sk.roc_auc_score),
    "auc of classes": ("auc", {}, hot, lambda y, p: sk.roc_auc_score(y.ravel(), p.ravel())),
    "auc of labels": ("auc", {"multi_label": True}, hot, sk.roc_auc_score),
    "average precision": ("average_precision", {}, binary, lambda y, p: sk.average_precision_score(y, p[:, 0])),
}


def macro(labels, predicted):
    return sk.f1_score(labels.argmax(1), predicted.argmax(1), average="macro")


def of_every(name, models=6, rows=120, validation_rows=50, seed=6):
    kind, config, make, expected = EVERY[name]
    metric, direction = Metric(kind, 0, config), "max" if metrics.higher_is_better(kind) else "min"
    rng = np.random.default_rng(seed)
    labels, _ = make(rng, rows)
    made = [labels]
    for _ in range(models):
        _, guess = make(rng, rows)
        _, own = make(np.random.default_rng(seed), rows)  # the same labels come with it, so these predict them
        made.append(own + 0.3 * (guess - guess.mean(axis=0)) if make is numbers else 0.7 * own + 0.3 * guess)
    pool = [candidate(metric, k, labels, p, validation_rows) for k, p in enumerate(made[1:])]
    return metric, direction, labels, made[1:], pool, expected


@pytest.mark.parametrize("name", EVERY)
def test_the_pooled_score_is_the_score_of_all_rows(name):
    metric, direction, labels, predicted, pool, expected = of_every(name)
    choice = choose(metric, direction, pool, 50, 70)
    for one, p in zip(pool, predicted, strict=True):
        if metric.kind in metrics.RANKS:
            whole = (50 * expected(labels[:50], p[:50]) + 70 * expected(labels[50:], p[50:])) / 120
        else:
            whole = expected(labels, p)
        assert choice.pooled[one.trial] == pytest.approx(whole)
    best = max(choice.pooled.values()) if direction == "max" else min(choice.pooled.values())
    assert choice.pooled[choice.trial] == best


@pytest.mark.parametrize("name", EVERY)
def test_the_bootstrap_is_what_a_loop_over_resamples_says(name):
    metric, direction, labels, predicted, pool, expected = of_every(name, models=3)
    other = 0 if choose(metric, direction, pool, 50, 70).configuration else 1
    found = corrected(metric, direction, pool, 50, 70, baseline=other, repeats=12, seed=3)
    sign = 1 if direction == "max" else -1
    estimates, gains = [], []
    for weights in drawn(3, 12, labels[50:] if metric.kind in metrics.RANKS and labels.ndim == 1 else np.zeros(70)):
        again, out = 50 + np.repeat(np.arange(70), weights), 50 + np.flatnonzero(weights == 0)
        pooled = []
        for p in predicted:
            if metric.kind in metrics.RANKS:
                tiers = 50 * expected(labels[:50], p[:50]) + 70 * expected(labels[again], p[again])
                pooled.append(tiers / 120)
            else:
                at = np.concatenate([np.arange(50), again])
                pooled.append(expected(labels[at], p[at]))
        best = int(np.argmax(sign * np.array(pooled)))
        estimates.append(expected(labels[out], predicted[best][out]))
        gains.append(sign * (estimates[-1] - expected(labels[out], predicted[other][out])))
    assert found.estimate == pytest.approx(np.mean(estimates))
    low, high = np.quantile(estimates, [0.025, 0.975])
    plain = guard_score(metric, pool[choose(metric, direction, pool, 50, 70).trial])
    if is_few(plain, None):
        exact = exact_interval(plain, None, 0.95)
        low, high = min(low, exact.low), max(high, exact.high)
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.shipped_gain.gain == pytest.approx(np.mean(gains))
    assert found.configuration_gain == found.shipped_gain  # of one run each


def guard_score(metric, run):
    return Score(metric, run.guard, None, run.parts)


def drawn(seed, repeats, strata):
    """The same draws as the bootstrap's: class by class for rank metrics of one output."""
    rng = np.random.default_rng(seed)
    weights = np.empty((repeats, len(strata)), dtype=int)
    for value in sorted(set(strata), reverse=True):
        members = np.flatnonzero(strata == value)
        weights[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=repeats)
    return weights


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.tuples(st.booleans(), st.integers(0, 6), st.integers(0, 3)), min_size=2, max_size=25),
    kind=st.sampled_from(["auc", "average_precision"]),
)
def test_weighted_ranks_are_scikit_learns(rows, kind):
    labels, scores, weights = (np.array(column) for column in zip(*rows, strict=True))
    parts = np.stack([labels, scores], axis=1).astype(np.float32)
    (found,) = ranks.weighted(kind, {}, parts, weights[:, None].astype(float))
    if not 0 < weights[labels].sum() < weights.sum():
        assert math.isnan(found)
        return
    expected = {"auc": sk.roc_auc_score, "average_precision": sk.average_precision_score}[kind]
    assert found == pytest.approx(expected(labels, scores, sample_weight=weights))


# The rule


def test_the_best_of_all_models_is_shipped_and_configurations_are_compared_by_their_fresh_runs():
    rows = np.zeros(10)
    pool = [
        losses(1, rows + 0.5, rows + 2.0, configuration=1),  # the search's own run: no part of its mean
        losses(10, rows + 1.0, rows + 1.0, configuration=1),
        losses(11, rows + 9.0, rows + 9.0, configuration=1),
        losses(2, rows + 1.4, rows + 4.0, configuration=2),
        losses(12, rows + 3.0, rows + 3.0, configuration=2),
        losses(13, rows + 2.0, rows + 2.0, configuration=2),
    ]
    choice = choose(MSE, "min", pool, 10, 10)
    assert (choice.configuration, choice.trial) == (1, 10)
    assert choice.means == pytest.approx({1: 5.0, 2: 2.5})
    assert noise_floor(MSE, "min", pool, 10, 10) == pytest.approx(math.sqrt((32 + 0.5) / 2))
    found = corrected(MSE, "min", pool, 10, 10, baseline=2)
    assert found.estimate == pytest.approx(1.0) and found.wins == {1: 1.0, 2: 0.0}
    assert found.shipped_gain.gain == pytest.approx(1.0)
    assert found.configuration_gain.gain == pytest.approx(-2.5)
    assert (found.configuration_gain.low, found.configuration_gain.high) == pytest.approx((-2.5, -2.5))


def test_the_searchs_own_run_may_be_shipped():
    rows = np.zeros(10)
    pool = [losses(1, rows + 0.5, rows + 1.0, configuration=1)]
    pool += [losses(k, rows + 2.0, rows + 2.0, configuration=1) for k in (10, 11)]
    choice = choose(MSE, "min", pool, 10, 10)
    assert (choice.configuration, choice.trial, choice.means) == (1, 1, pytest.approx({1: 2.0}))
    assert corrected(MSE, "min", pool, 10, 10).estimate == pytest.approx(1.0)


def test_validation_and_guard_rows_count_alike():
    pool = [losses(0, np.zeros(30), np.full(10, 2.0)), losses(1, np.ones(30), np.zeros(10))]
    choice = choose(MSE, "min", pool, 30, 10)
    assert choice.trial == 0 and choice.pooled == pytest.approx({0: 0.5, 1: 0.75})


def test_ties_go_to_fewer_weights_then_to_the_lower_number():
    right = np.ones(8)

    def winner(*sizes):
        pool = [hits(k, right, right, size=size) for k, size in enumerate(sizes)]
        return choose(ACCURACY, "max", pool[::-1], 8, 8).trial

    assert winner(30, 20, 20) == 1
    assert winner(None, 20, 30) == 1
    assert winner(None, None) == 0


def test_hits_in_another_order_are_a_tie():
    rng = np.random.default_rng(7)
    first = (rng.random(301) < 0.7).astype(float)
    pool = [hits(k, rng.permutation(first), rng.permutation(first), size=100 - k) for k in range(40)]
    assert choose(ACCURACY, "max", pool, 301, 301).trial == 39
    runs = [0.1, 0.4, 0.7]
    assert np.mean(runs) != np.mean(runs[::-1]), "equal but for rounding"
    for sizes in ((9, 8), (8, 9)):
        swapped = [
            Candidate(k, k // 3, sizes[k // 3], loss, loss, np.array([[loss]]), np.array([loss]))
            for k, loss in enumerate([*runs, *runs[::-1]])
        ]
        assert choose(MSE, "min", swapped, 1, 1).configuration == sizes.index(8)


def test_runs_that_tie_ship_the_lower_trial():
    pool = [hits(k, np.ones(4), np.ones(4), configuration=0) for k in (7, 5, 6)]
    assert choose(ACCURACY, "max", pool, 4, 4).trial == 5


def test_every_configuration_has_its_best_run_by_the_same_rule():
    rng = np.random.default_rng(7)
    first = (rng.random(301) < 0.7).astype(float)
    pool = [  # trial 3 differs from 4 by rounding alone, and 4 has fewer weights
        hits(3, rng.permutation(first), rng.permutation(first), configuration=0, size=9),
        hits(4, rng.permutation(first), rng.permutation(first), configuration=0, size=8),
        hits(5, np.zeros(301), first, configuration=0),
        hits(6, np.ones(301), first, configuration=1),
    ]
    choice = choose(ACCURACY, "max", pool, 301, 301)
    assert choice.best == {0: 4, 1: 6} and choice.trial == choice.best[choice.configuration]


@pytest.mark.parametrize("where", ["parts", "validation", "score", "guard"])
def test_numbers_that_are_not_finite_cannot_win(where):
    rng = np.random.default_rng(8)
    pool = [losses(k, *rng.exponential(size=(2, 50))) for k in range(3)]
    broken = losses(9, np.zeros(50), np.zeros(50))
    bad = getattr(broken, where) * np.ones(1)
    bad[..., -1] = np.inf
    broken = dataclasses.replace(broken, **{where: bad if where in ("parts", "validation") else math.nan})
    with_it, without = (corrected(MSE, "min", some, 50, 50, repeats=50) for some in ([*pool, broken], pool))
    assert with_it == without and 9 not in with_it.wins
    with pytest.raises(StudyFailed, match="none of 1 models"):
        choose(MSE, "min", [broken], 50, 50)


def test_the_noise_floor_is_the_spread_within_configurations():
    pool = [losses(k, [e], [e], configuration=k // 3 - 9) for k, e in enumerate([1.0, 2.0, 3.0, 11.0, 11.0, 14.0])]
    # Variances of 1 and 3 with two degrees of freedom each.
    assert noise_floor(MSE, "min", pool, 1, 1) == pytest.approx(math.sqrt(2))
    assert noise_floor(MSE, "min", [losses(k, [k], [k]) for k in range(3)], 1, 1) is None


# The bootstrap


def noisy(seed, configurations=4, runs=3, rows=80):
    rng = np.random.default_rng(seed)
    quality = rng.uniform(0.6, 0.8, configurations)
    return [
        hits(10 + k, *(rng.random((2, rows)) < quality[k // runs]).astype(float), configuration=k // runs)
        for k in range(configurations * runs)
    ]


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**31), shuffle=st.randoms(use_true_random=False))
def test_the_order_of_candidates_changes_nothing(seed, shuffle):
    pool = noisy(seed % 1000)
    found = corrected(ACCURACY, "max", pool, 80, 80, baseline=1, repeats=60, seed=seed)
    choice = choose(ACCURACY, "max", pool, 80, 80)
    shuffle.shuffle(pool)
    assert corrected(ACCURACY, "max", pool, 80, 80, baseline=1, repeats=60, seed=seed) == found
    assert choose(ACCURACY, "max", pool, 80, 80) == choice
    assert sum(found.wins.values()) == pytest.approx(1.0) and set(found.wins) == {0, 1, 2, 3}
    assert found.low <= found.estimate <= found.high


def test_the_seed_decides_and_seed_0_counts():
    pool = noisy(9)
    one, again, other = (corrected(ACCURACY, "max", pool, 80, 80, repeats=100, seed=seed) for seed in (0, 0, 1))
    assert one == again and one != other


def test_blocks_of_any_size_give_the_same(monkeypatch):
    pool = noisy(10)
    whole = corrected(ACCURACY, "max", pool, 80, 80, baseline=0, repeats=100)
    monkeypatch.setattr("search.guard.candidates._VALUES", 80 * 7)
    parted = corrected(ACCURACY, "max", pool, 80, 80, baseline=0, repeats=100)
    assert parted.wins == whole.wins and parted.estimate == pytest.approx(whole.estimate)


def test_gains_are_turned_so_that_positive_is_better():
    rng = np.random.default_rng(11)
    low, high = (rng.exponential(scale, size=(2, 200)) for scale in (0.5, 1.0))
    pool = [losses(0, *high), losses(1, *low)]
    found = corrected(MSE, "min", pool, 200, 200, baseline=0)
    assert found.shipped_gain.gain == pytest.approx(high[1].mean() - low[1].mean(), abs=0.02)
    assert found.shipped_gain.low > 0
    nothing = corrected(MSE, "min", pool, 200, 200, baseline=1)
    assert dataclasses.astuple(nothing.shipped_gain) == dataclasses.astuple(nothing.configuration_gain) == (0, 0, 0)
    assert corrected(MSE, "min", pool, 200, 200).shipped_gain is None
    assert corrected(MSE, "min", pool, 200, 200, baseline=5).shipped_gain is None


def test_groups_of_like_rows_make_the_interval_wider():
    rng = np.random.default_rng(12)
    groups = np.repeat(np.arange(40), 10)
    pool = [losses(k, np.ones(10), np.repeat(rng.exponential(size=40), 10)) for k in range(5)]
    plain = corrected(MSE, "min", pool, 10, 400)
    grouped = corrected(MSE, "min", pool, 10, 400, groups=groups)
    assert grouped.high - grouped.low > 2 * (plain.high - plain.low)  # sqrt(10) = 3.2 times in theory
    assert "40 groups of guard rows" in grouped.method
    blocks = corrected(MSE, "min", pool, 10, 400, ordered=True)
    assert blocks.high - blocks.low > 1.5 * (plain.high - plain.low)
    assert "50 groups of guard rows" in blocks.method


def test_a_metric_of_kerass_own_is_not_corrected():
    metric = Metric("custom")
    pool = [Candidate(k, k, 10, 0.5 + k / 10, 0.9 - k / 4, None, None) for k in range(3)]
    choice = choose(metric, "max", pool, 30, 10)
    assert choice.pooled == pytest.approx({0: 0.6, 1: 0.6125, 2: 0.625}) and choice.trial == 2
    found = corrected(metric, "max", pool, 30, 10, baseline=0)
    assert (found.estimate, found.low, found.high, found.wins) == (pytest.approx(0.4), None, None, {})
    assert found.method == "none: only Keras can compute this metric, so it is not corrected"
    assert found.configuration_gain is None and found.shipped_gain is None


def test_what_cannot_be_resampled_says_so():
    one = corrected(MSE, "min", [losses(0, [1.0, 2.0], [3.0])], 2, 1, baseline=0)
    assert (one.estimate, one.low, one.high) == (pytest.approx(3.0), None, None)
    assert one.method == "none: too few guard rows to resample" and one.shipped_gain is None
    constant = corrected(MSE, "min", [losses(k, np.ones(5), np.ones(5)) for k in (0, 1)], 5, 5, baseline=1)
    assert (constant.estimate, constant.low, constant.high) == pytest.approx((1.0, 1.0, 1.0))
    together = corrected(MSE, "min", [losses(0, np.ones(5), np.arange(50.0))], 5, 50, groups=np.zeros(50))
    assert together.method.endswith("too narrow: all rows are one group") and together.low < together.high


def test_few_rows_of_a_class_give_a_value_all_the_same():
    rng = np.random.default_rng(13)
    labels = np.zeros(60, dtype=int)
    labels[[0, 1, 2, 20, 22, 24, 26, 28, 30]] = 1
    for metric in (Metric("auc"), Metric("average_precision"), Metric("recall"), Metric("mcc")):
        predicted = [labels[:, None] * 0.8 + 0.1 + 0.01 * rng.random((60, 1)) for _ in range(3)]
        pool = [candidate(metric, k, labels, p, 20) for k, p in enumerate(predicted)]
        found = corrected(metric, "max", pool, 20, 40, groups=np.arange(40) // 2, baseline=0)
        # Resamples without a positive row left out say nothing; as 0 they would lower the estimate.
        assert found.estimate == found.high == pytest.approx(1.0)
        # No errors do not mean that there are none: six groups with a positive row are all there is to go by.
        span = 2 if metric.kind == "mcc" else 1
        assert found.low == pytest.approx(1 - span * (1 - 0.025 ** (1 / 6)))


def by_class(metric, sizes, share, rng):
    """A model that is right on this share of rows of each class, and guesses among all on the others."""
    tiers = []
    for _ in range(2):
        labels = np.repeat(np.arange(len(sizes)), sizes)
        guess = np.where(rng.random(len(labels)) < share, labels, rng.integers(0, len(sizes), len(labels)))
        tiers.append(metrics.parts(metric.kind, metric.config, labels, np.eye(len(sizes))[guess], logits=False))
    seen, sealed = tiers
    return Candidate(0, 0, None, value_of(metric, seen), value_of(metric, sealed), sealed, seen.sum(axis=0))


@pytest.mark.parametrize("metric", [Metric("balanced_accuracy"), Metric("f1_score", 0, {"average": "macro"})])
def test_resamples_without_a_rare_class_are_left_out(metric):
    """One model has nothing to correct; as 0, two classes of 2 rows took 12 points off a macro F1."""
    rng, apart = np.random.default_rng(15), []
    for _ in range(12):
        one = by_class(metric, [89, 87, 5, 5], 0.9, rng)
        found = corrected(metric, "max", [one], 186, 186, repeats=300)
        assert found.low < found.estimate < found.high
        apart.append(found.estimate - one.guard)
    # A mean of 300 resamples has a sd of .006; F1 is no mean, so that fewer rows of a class move it by .004 as well.
    assert np.mean(apart) == pytest.approx(0, abs=0.008)
    one = by_class(metric, [89, 87, 2, 2], 0.9, rng)
    found = corrected(metric, "max", [one], 180, 180, repeats=300, baseline=0)
    assert (found.estimate, found.low, found.high, found.wins) == (one.guard, None, None, {})
    assert found.method == "none: too few guard rows of a class to resample, so it is not corrected"


def test_resamples_without_a_guess_say_nothing_of_precision():
    metric, rng, apart = Metric("precision"), np.random.default_rng(16), []
    for _ in range(20):
        guess = np.arange(150) % 50 < 2
        labels = guess & (rng.random(150) < 0.5) | (np.arange(150) % 50 > 45)
        one = candidate(metric, 0, labels.astype(int), guess[:, None], 50)
        found = corrected(metric, "max", [one], 50, 100, repeats=300)
        apart.append(found.estimate - one.guard)
    assert np.mean(apart) == pytest.approx(0, abs=0.02)  # of 4 guesses; 12 to 20 % of resamples have none


def test_groups_of_one_label_each_do_not_blow_up_r2():
    """Out of bag is often a single group, where labels do not vary; it was -1.7e14 for a model of .88."""
    rng = np.random.default_rng(1)
    metric, groups = Metric("r2_score"), np.repeat(np.arange(6), 9)
    labels = 3 * np.repeat(rng.normal(size=26), 9)
    pool = [candidate(metric, k, labels, (labels + 0.3 * rng.normal(size=234))[:, None], 180) for k in range(3)]
    found = corrected(metric, "max", pool, 180, 54, groups=groups)
    assert abs(found.estimate) < 100 and "over 1000 resamples" not in found.method
    same = np.array([[9.0, 0.1, 0.1**2 * (1 + 1e-13)]])  # means of errors, labels and squares, with rounding
    assert metrics.combine("r2_score", {}, same) == 0.0


def few_wrong(wrong, rows=180):
    return [hits(0, np.ones(rows), (np.arange(rows) >= wrong).astype(float))]


@pytest.mark.parametrize("wrong", [0, 1, 9])
def test_few_errors_do_not_make_the_estimate_certain(wrong):
    found = corrected(ACCURACY, "max", few_wrong(wrong), 180, 180)
    exact = proportion_interval(180 - wrong, 180, method="exact")
    assert found.low <= exact.low + 1e-12 and exact.high - 1e-12 <= found.high
    if not wrong:
        assert (found.estimate, found.low, found.high) == pytest.approx((1.0, 0.025 ** (1 / 180), 1.0))


def test_ten_errors_are_left_to_the_bootstrap():
    pool = few_wrong(10)
    found = corrected(ACCURACY, "max", pool, 180, 180, repeats=300)
    values = []
    for weights in drawn(0, 300, np.zeros(180)):
        values.append(1 - pool[0].parts[weights == 0].mean())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))


def test_few_groups_without_errors_are_not_certain_either():
    found = corrected(ACCURACY, "max", few_wrong(0), 180, 180, groups=np.arange(180) // 12)
    assert (found.low, found.high) == pytest.approx((0.025 ** (1 / 15), 1.0))


def test_a_lone_positive_row_is_never_left_out():
    labels = np.array([0, 1] * 5 + [1] + [0] * 9)
    pool = [candidate(Metric("auc"), 0, labels, np.linspace(0, 1, 20)[:, None], 10)]
    found = corrected(Metric("auc"), "max", pool, 10, 10, baseline=0)
    assert found.low is None and "too few" in found.method and found.estimate == 0.0


def test_rank_metrics_of_many_rows_are_resampled_less_and_say_so(monkeypatch):
    monkeypatch.setattr("search.guard.candidates._RANK_VALUES", 6 * 70 * 250)
    metric, direction, *_, pool, _ = of_every("auc")
    assert "over 250 resamples" in corrected(metric, direction, pool, 50, 70).method
    monkeypatch.setattr("search.guard.candidates._RANK_VALUES", 1)
    assert "over 200 resamples" in corrected(metric, direction, pool, 50, 70).method
    assert "over 60 resamples" in corrected(metric, direction, pool, 50, 70, repeats=60).method


def test_a_thousand_candidates_on_ten_thousand_rows_take_seconds(tmp_path):
    rng = np.random.default_rng(14)
    kept = np.lib.format.open_memmap(tmp_path / "parts.npy", "w+", np.float32, (1000, 10_000, 1))
    kept[...] = rng.random(kept.shape) < 0.1
    pool = [Candidate(k, k, None, 0.9, 0.9, parts, np.array([1000.0])) for k, parts in enumerate(kept)]
    tracemalloc.start()
    try:
        began = time.perf_counter()
        found = corrected(ACCURACY, "max", pool, 10_000, 10_000, baseline=0)
        seconds, (_, peak) = time.perf_counter() - began, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.estimate == pytest.approx(0.9, abs=0.01)
    assert seconds < 20, "about 1.5 s on one quiet core"
    assert peak < 500e6


def test_a_model_of_which_something_is_missing_cannot_be_chosen(tmp_path: Path) -> None:
    """As after a power cut or a repair: better another model than a study that cannot be concluded."""
    from search.guard import winner
    from search.record import places
    from search.trial import Trial

    trial, parts = Trial(3), np.zeros((5, 1), dtype=np.float32)
    weights, guard = places.weights(tmp_path, 3), places.guard_parts(tmp_path, 3)
    weights.parent.mkdir(parents=True)
    guard.parent.mkdir()
    evidence = {"validation": [0.0]}
    assert not winner._is_whole(tmp_path, trial, evidence)
    weights.write_bytes(b"w")
    assert winner._is_whole(tmp_path, trial, None) and not winner._is_whole(tmp_path, trial, evidence)
    np.save(guard, parts)
    assert winner._is_whole(tmp_path, trial, evidence)
    guard.write_bytes(guard.read_bytes()[:-4])
    assert not winner._is_whole(tmp_path, trial, evidence)

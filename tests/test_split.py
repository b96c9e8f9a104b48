"""The split belongs to the data: who decides it, what it keeps together, how little it moves."""

from __future__ import annotations

import numpy as np
import pytest

from search.errors import DataError
from search.tiers import split
from search.tiers.rows import row_hashes
from search.tiers.split import GUARD, TEST, TRAIN, VALIDATION


def deal(n, classes=None, seed=0, values=None, rng=0, **given):
    """Tiers of ``n`` random rows; labels are ``classes`` equal classes or given values."""
    x = np.random.default_rng(rng).normal(size=(n, 3))
    y = values if values is not None else np.arange(n) % (classes or 2)
    return split.assign(row_hashes([x]), split.labels_of(y).codes, seed, split.sizes(n), **given)


def counts(tiers):
    return np.bincount(tiers, minlength=4).tolist()


@pytest.mark.parametrize(
    ("rows", "test", "guard", "validation"),
    [(1797, 359, 180, 179), (442, 88, 44, 44), (12_500, 2500, 500, 2000), (1_000_000, 10_000, 2000, 8000)],
)
def test_sizes_follow_the_table(rows, test, guard, validation):
    assert split.sizes(rows) == {TEST: test, GUARD: guard, VALIDATION: validation}


def test_tiers_that_the_user_gave_take_no_rows_and_guard_keeps_its_size():
    assert split.sizes(1000, test=False) == {TEST: 0, GUARD: 100, VALIDATION: 100}
    assert split.sizes(1000, validation=False, test=False) == {TEST: 0, GUARD: 100, VALIDATION: 0}


@pytest.mark.parametrize("classes", [1, 2, 3, 10, 37])
def test_totals_are_exact_and_classes_even(classes):
    tiers = deal(1797, classes)
    assert counts(tiers) == [1079, 179, 180, 359]
    for tier in range(4):
        per_class = np.bincount(np.arange(1797)[tiers == tier] % classes, minlength=classes)
        # Classes differ by one row in size, and each tier's rounding adds at most one more.
        assert per_class.max() - per_class.min() <= 2


def test_values_are_stratified_by_quantile():
    values = np.random.default_rng(1).lognormal(size=2000)
    tiers = deal(2000, values=values)
    assert counts(tiers) == [1200, 200, 200, 400]
    edges = np.quantile(values, np.arange(1, 10) / 10)
    for tier in (TEST, GUARD, VALIDATION):
        assert np.ptp(np.bincount(np.searchsorted(edges, values[tiers == tier]), minlength=10)) <= 1


def test_only_the_split_seed_and_the_rows_decide():
    assert (deal(500) == deal(500)).all()
    assert (deal(500, seed=1) != deal(500)).any()
    order = np.random.default_rng(3).permutation(500)
    x = np.random.default_rng(0).normal(size=(500, 3))
    y = np.arange(500) % 2
    shuffled = split.assign(row_hashes([x[order]]), y[order], 0, split.sizes(500))
    assert (shuffled == deal(500)[order]).all()


@pytest.mark.parametrize("kind", ["classes", "values"])
def test_ten_percent_more_rows_move_few_old_ones(kind):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(2200, 4))
    y = rng.integers(0, 5, 2200) if kind == "classes" else rng.normal(size=2200)

    def tiers(n):
        return split.assign(row_hashes([x[:n]]), split.labels_of(y[:n]).codes, 0, split.sizes(n))

    moved = (tiers(2000) != tiers(2200)[:2000]).mean()
    # A border of each of 5 (10) strata moves by the luck of the new ranks: some rows each, not 34 %,
    # which is what a new random split would move.
    assert moved < 0.05


def test_changed_features_keep_their_tier_when_ids_are_given():
    ids = np.array([f"row-{k}" for k in range(300)])
    assert (deal(300, ids=ids, rng=0) == deal(300, ids=ids, rng=1)).all()
    assert (deal(300, ids=ids, rng=0) == deal(300, ids=ids.astype("<U40"), rng=1)).all()


def test_equal_features_stay_together():
    x = np.repeat(np.random.default_rng(0).normal(size=(400, 2)), 2, axis=0)
    tiers = split.assign(row_hashes([x]), np.arange(800) % 2, 0, split.sizes(800))
    assert (tiers[::2] == tiers[1::2]).all()
    assert np.abs(np.array(counts(tiers)) - [480, 80, 80, 160]).max() <= 4


def test_groups_and_duplicates_link_into_one_unit():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 2))
    groups = np.arange(600) // 4
    x[4] = x[3]  # ties groups 0 and 1 together
    tiers = split.assign(row_hashes([x]), rng.integers(0, 2, 600), 0, split.sizes(600), groups=groups)
    assert len(set(tiers[:8])) == 1
    assert all(len(set(tiers[groups == g])) == 1 for g in range(150))
    assert np.abs(np.array(counts(tiers)) - [360, 60, 60, 120]).max() <= 8


def test_a_few_large_groups_still_fill_every_tier():
    groups = np.arange(500) // 100
    tiers = deal(500, 10, groups=groups)
    assert sorted(counts(tiers)) == [100, 100, 100, 200]
    assert all(len(set(tiers[groups == g])) == 1 for g in range(5))
    with pytest.raises(DataError, match="only 3 sets for 4 tiers"):
        deal(300, groups=np.arange(300) // 100)


def test_groups_of_one_class_each_are_spread_over_tiers():
    groups = np.arange(900) // 30
    tiers = deal(900, values=(groups % 3).astype(np.int64), groups=groups)
    assert min(counts(tiers)) >= 60


def test_time_orders_the_tiers_and_equal_times_stay_together():
    time = np.random.default_rng(0).integers(0, 150, 1000)
    tiers = deal(1000, time=time)
    for earlier, later in ((TRAIN, VALIDATION), (VALIDATION, GUARD), (GUARD, TEST)):
        assert time[tiers == earlier].max() < time[tiers == later].min()
    assert np.abs(np.array(counts(tiers)) - [600, 100, 100, 200]).max() <= 15


def test_time_with_groups_cuts_only_between_groups():
    time = np.arange(1000)
    groups = (time + 5) // 10
    tiers = deal(1000, time=time, groups=groups)
    assert all(len(set(tiers[groups == g])) == 1 for g in np.unique(groups))
    assert (np.diff(np.array([0, 1, 2, 3])[tiers]) >= 0).all()
    with pytest.raises(DataError, match="time cannot be cut"):
        deal(1000, time=time, groups=time % 7)


def test_too_few_rows_are_refused():
    with pytest.raises(DataError, match="only 3"):
        deal(3)
    assert counts(deal(4)) == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("labels", "task", "classes"),
    [
        (np.array([3, 5, 3, 5] * 5), "classes", [3, 5]),
        (np.array([True, False] * 4), "classes", [False, True]),
        (np.array([[0], [1]] * 5), "classes", [0, 1]),
        (np.array([0.0, 1.0] * 5), "classes", [0.0, 1.0]),
        (np.eye(3, dtype=np.float32)[[0, 1, 2, 1] * 3], "classes", [0, 1, 2]),
        (np.arange(20), "values", None),
        (np.array([0.0, 1.0, 2.0] * 5), "values", None),
        (np.array([[1, 1, 0], [0, 1, 0]] * 5), "values", None),
        (np.random.default_rng(0).normal(size=(20, 3)), "values", None),
        (np.zeros((20, 4, 4), dtype=np.int64), "values", None),
    ],
)
def test_labels_are_told_apart(labels, task, classes):
    found = split.labels_of(labels)
    assert (found.task, found.classes) == (task, classes)
    assert found.codes.shape == (len(labels),)

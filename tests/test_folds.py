"""Folds: every row validated once, groups together, time in order, guard and test in none, the same by the seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as some

from search.errors import DataError, RequestError
from search.tiers import data, folds, split, validation
from search.tiers.data import Dataset, OpenRows
from search.tiers.rows import row_hashes
from search.tiers.split import Units


def plan(words: str) -> validation.Validation:
    return validation.parse(words)


@some.composite
def unordered(draw: some.DrawFn) -> Units:
    """Rows with classes or values, with groups or without."""
    rng = np.random.default_rng(draw(some.integers(0, 2**32 - 1)))
    count = draw(some.integers(40, 300))
    x = rng.normal(size=(count, 2))
    x[1::7] = x[::7][: len(x[1::7])]  # some rows are there twice
    groups = rng.integers(0, count // draw(some.integers(2, 4)), count) if draw(some.booleans()) else None
    labels = split.labels_of(rng.integers(0, 2, count) if draw(some.booleans()) else rng.normal(size=count))
    return Units(*split.together(row_hashes([x]), groups, None), labels.codes, None, False)


@some.composite
def ordered(draw: some.DrawFn) -> Units:
    """Rows in order of time, of which some share a moment, some of them in groups that last a while."""
    rng = np.random.default_rng(draw(some.integers(0, 2**32 - 1)))
    count = draw(some.integers(60, 300))
    time = np.sort(rng.integers(0, 3 * count, count))
    groups = np.arange(count) // draw(some.integers(1, 5)) if draw(some.booleans()) else None
    unit = split.blocks(time, groups)
    return Units(unit, np.arange(count, dtype=np.uint64), np.zeros(count, np.int64), None, True)


@settings(deadline=None)
@given(units=unordered(), count=some.integers(2, 8), seed=some.integers(0, 1000))
def test_in_kfold_every_row_validates_exactly_once_and_units_stay_together(units: Units, count: int, seed: int) -> None:
    assume(units.unit.max() + 1 >= count)
    parts = folds.divided(plan(f"kfold:{count}"), units, 0, seed)
    rows = len(units.unit)
    assert len(parts) == count
    assert np.array_equal(np.sort(np.concatenate([part.validation for part in parts])), np.arange(rows))
    for part in parts:
        assert np.array_equal(np.sort(np.concatenate(part)), np.arange(rows))
        assert not np.intersect1d(units.unit[part.train], units.unit[part.validation]).size
        assert len(part.train) and len(part.validation)
    again = folds.divided(plan(f"kfold:{count}"), units, 0, seed)
    for one, other in zip(parts, again, strict=True):
        assert np.array_equal(one.train, other.train) and np.array_equal(one.validation, other.validation)


@settings(deadline=None)
@given(units=ordered(), count=some.integers(2, 6), seed=some.integers(0, 1000))
def test_folds_of_rows_in_time_train_on_all_that_came_before_and_on_nothing_else(
    units: Units, count: int, seed: int
) -> None:
    assume(units.unit.max() >= count)
    parts = folds.divided(plan(f"kfold:{count}"), units, 0, seed)
    rows = len(units.unit)
    for part, after in zip(parts, [*parts[1:], None], strict=True):
        assert np.array_equal(part.train, np.arange(len(part.train)))
        assert units.unit[part.train].max() < units.unit[part.validation].min()
        assert part.validation[-1] + 1 == (rows if after is None else after.validation[0])
    validated = np.concatenate([part.validation for part in parts])
    assert np.array_equal(validated, np.arange(parts[0].validation[0], rows))


@settings(deadline=None)
@given(units=some.one_of(unordered(), ordered()), seed=some.integers(0, 1000), trial=some.integers(0, 2**31 - 1))
def test_a_drawn_split_parts_no_unit_and_follows_from_its_seeds(units: Units, seed: int, trial: int) -> None:
    assume(units.unit.max() >= 4)
    part, again = folds.drawn(units, 12, seed, trial), folds.drawn(units, 12, seed, trial)
    assert np.array_equal(part.train, again.train) and np.array_equal(part.validation, again.validation)
    assert not np.intersect1d(units.unit[part.train], units.unit[part.validation]).size
    assert len(part.train) and len(part.validation)
    if units.ordered:
        assert units.unit[part.train].max() < units.unit[part.validation].min()
        assert len(part.train) >= len(units.unit) / 2 or len(np.unique(units.unit)) < 6
    else:
        assert np.array_equal(np.sort(np.concatenate(part)), np.arange(len(units.unit)))


def rows_of(classes: int, count: int) -> Units:
    x = np.random.default_rng(0).normal(size=(count, 2))
    labels = split.labels_of(np.arange(count) % classes)
    return Units(*split.together(row_hashes([x]), None, None), labels.codes, labels.classes, False)


def test_folds_have_their_share_of_every_class_and_are_of_one_size() -> None:
    units = rows_of(7, 503)
    parts = folds.divided(plan("kfold:5"), units, 0, 0)
    counts = np.array([np.bincount(units.strata[part.validation], minlength=7) for part in parts])
    assert np.ptp(counts, axis=0).max() <= 1 and np.ptp(counts.sum(axis=1)) <= 1


def test_splits_that_are_drawn_keep_size_and_classes_and_differ_by_every_seed() -> None:
    units = rows_of(2, 400)
    drawn = [folds.drawn(units, 60, 0, seed).validation for seed in range(4)]
    drawn += [folds.drawn(units, 60, 1, 0).validation]
    drawn += [part.validation for part in folds.divided(plan("repeated:3"), units, 60, 0)]
    for at, one in enumerate(drawn):
        assert np.bincount(units.strata[one]).tolist() == [30, 30]
        assert all(len(np.intersect1d(one, other)) < 40 for other in drawn[at + 1 :])


def test_a_class_that_a_fold_would_have_to_do_without_is_refused() -> None:
    strata = np.array([0] * 50 + [1] * 3)
    groups = np.array([*range(50), 50, 50, 50])  # all of class 1 in one group
    unit, keys = split.together(np.arange(53, dtype=np.uint64), groups, None)
    units = Units(unit, keys, strata, ["common", 7], False)
    with pytest.raises(DataError, match=r"class 7 is not in those of fold \d of kfold:5"):
        folds.divided(plan("kfold:5"), units, 0, 0)


def test_too_few_units_are_refused_by_their_number() -> None:
    unit = np.repeat(np.arange(4), 20)
    units = Units(unit, unit.astype(np.uint64), np.zeros(80, np.int64), None, False)
    with pytest.raises(DataError, match="kfold:5 needs 5 sets of rows that may part, but .* only 4"):
        folds.divided(plan("kfold:5"), units, 0, 0)
    ordered_units = Units(unit, unit.astype(np.uint64), np.zeros(80, np.int64), None, True)
    with pytest.raises(DataError, match="into 5 blocks, but groups and equal times allow 4"):
        folds.divided(plan("kfold:4"), ordered_units, 0, 0)
    one = Units(np.zeros(80, np.int64), unit.astype(np.uint64), np.zeros(80, np.int64), None, True)
    with pytest.raises(DataError, match="there are 0 such places"):
        folds.drawn(one, 10, 0, 0)


# ── of stored rows ───────────────────────────────────────────────────────────────────────────────


def stored(folder: Path, words: str, **columns: Any) -> tuple[dict[str, Any], OpenRows]:
    """400 rows, each known by its first feature, stored in tiers and divided."""
    rng = np.random.default_rng(0)
    x = np.concatenate([np.arange(400)[:, None], rng.normal(size=(400, 2))], axis=1).astype("float32")
    dataset = Dataset(x, (np.arange(400) % 2).astype("int64"), **columns)
    manifest = data.prepare(dataset, folder, 0, False)
    units = data.labelled(dataset, 0)
    found = folds.write(plan(words), units, manifest, folder / "folds")
    return json.loads(json.dumps(found)), OpenRows(folder / "rows" / manifest["digest"])


@pytest.mark.parametrize("words", ["kfold:4", "repeated:3", "reshuffle"])
@pytest.mark.parametrize("columns", [{}, {"groups": np.arange(400) // 3}, {"time": np.arange(400)[::-1]}])
def test_guard_and_test_rows_are_in_no_split_and_groups_in_one_part(
    tmp_path: Path, words: str, columns: dict[str, Any]
) -> None:
    found, rows = stored(tmp_path, words, **columns)
    manifest = rows.manifest
    here = set(rows.features("train")[:, 0]) | set(rows.features("validation")[:, 0])
    away = set(rows.features("guard")[:, 0])
    sealed = data.SealedRows(tmp_path / "sealed" / manifest["digest"])
    away |= set(sealed.features()[:, 0])
    assert len(here) == rows.labelled and not here & away
    for number in range(plan(words).count):
        part = folds.of_part(rows, {"folds": found, "seed": 5, "number": number})
        train, held = part.features("train")[:, 0], part.features("validation")[:, 0]
        assert set(train) <= here and set(held) <= here and not set(train) & set(held)
        assert np.array_equal(part.features("guard"), rows.features("guard"))
        if "groups" in columns:
            assert not set(train // 3) & set(held // 3)
        if "time" in columns:  # the latest rows have the lowest numbers
            assert train.min() > held.max()
    whole = folds.of_part(rows, {"folds": found, "seed": 5, "number": validation.REFIT})
    assert set(whole.features("train")[:, 0]) == here and whole.size("train") == len(here)
    assert not set(whole.features("train")[:, 0]) & away


def test_what_is_recorded_counts_rows_and_what_a_score_amounts_to(tmp_path: Path) -> None:
    (tmp_path / "k").mkdir()
    (tmp_path / "r").mkdir()
    kfold, rows = stored(tmp_path / "k", "kfold:4")
    assert kfold["rows"] == kfold["weight"] == rows.labelled == sum(kfold["validation"])
    repeated, _ = stored(tmp_path / "r", "repeated:3")
    quota = rows.size("validation")
    assert repeated["validation"] == [quota] * 3
    assert quota < repeated["weight"] <= repeated["rows"] < 3 * quota


def test_an_index_file_per_split_is_all_that_is_stored(tmp_path: Path) -> None:
    found, rows = stored(tmp_path, "kfold:4")
    files = sorted(path.name for path in Path(found["folder"]).iterdir())
    assert files == [f"{name}_{k}.npy" for name in ("train", "validation") for k in range(4)]
    assert sum(len(np.load(Path(found["folder"]) / name, allow_pickle=False)) for name in files) == 4 * rows.labelled


def test_rows_that_were_stored_before_are_divided_in_the_same_way(tmp_path: Path) -> None:
    first, rows = stored(tmp_path, "kfold:4")
    before = [part.validation for part in folds.parts(first, 0)]
    again, _ = stored(tmp_path, "kfold:4")
    assert all(np.array_equal(a, b.validation) for a, b in zip(before, folds.parts(again, 0), strict=True))
    labels = rows.labels_at(before[0])
    part = folds.of_part(rows, {"folds": first, "seed": 0, "number": 0})
    assert np.array_equal(labels, part.labels("validation"))
    assert np.array_equal(labels, part.features("validation")[:, 0].astype("int64") % 2)


def test_rows_that_the_user_gave_to_validate_are_not_divided_anew(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(300, 2))
    y = np.arange(300) % 2
    dataset = Dataset(x[:200], y[:200], validation=(x[200:], y[200:]))
    manifest = data.prepare(dataset, tmp_path, 0, False)
    with pytest.raises(DataError, match="load.. says by validation= which rows validate"):
        folds.write(plan("kfold:3"), data.labelled(dataset, 0), manifest, tmp_path / "folds")


# ── the words ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("words", "trainings", "step"),
    [("holdout", 1, "epoch"), ("reshuffle", 1, "epoch"), ("kfold:5", 6, "fold"), ("repeated:3", 4, "repeat")],
)
def test_a_plan_by_its_words(words: str, trainings: int, step: str) -> None:
    found = plan(words)
    assert (str(found), found.trainings, found.step) == (words, trainings, step)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("kfold", "must be given 2 to 100, such as kfold:5"),
        ("kfold:1", "must be given 2 to 100"),
        ("kfold:-3", "must be given 2 to 100"),
        ("repeated:1000", "must be given 2 to 100"),
        ("holdout:3", "takes no number"),
        ("k-fold:5", "did you mean 'kfold'"),
        ("", "must be holdout, kfold:5"),
    ],
)
def test_words_that_name_no_plan_are_refused(words: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        plan(words)

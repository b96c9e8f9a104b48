"""Leakage checks: what is refused, what is told, and what is left alone because it is ordinary."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn import datasets as sklearn_data

from search.definition.problem import find
from search.errors import DataError
from search.harness import worker
from search.tiers import leakage, split
from search.tiers.data import Dataset, prepare
from search.tiers.rows import read, row_hashes
from search.tiers.split import TEST, TRAIN
from tests.tiny import write_space

ORDINARY = {
    "digits": sklearn_data.load_digits,
    "breast_cancer": sklearn_data.load_breast_cancer,
    "iris": sklearn_data.load_iris,
    "wine": sklearn_data.load_wine,
    "diabetes": lambda return_X_y: sklearn_data.load_diabetes(return_X_y=return_X_y, scaled=False),
}


def split_of(x: Any, y: np.ndarray, seed: int = 0) -> tuple[Any, np.ndarray, np.ndarray]:
    rows = read(Dataset(x, y))
    hashes = row_hashes(rows.x)
    return rows, split.assign(hashes, split.labels_of(rows.y[0]).codes, seed, split.sizes(len(rows))), hashes


def near(x: Any, y: np.ndarray) -> tuple[set[tuple[int, int]], np.ndarray]:
    """Pairs found in different tiers, lower position first; and the tiers."""
    rows, tiers, hashes = split_of(x, y)
    found = zip(*(part.tolist() for part in leakage.near_duplicates(rows, tiers, hashes)), strict=True)
    return {(min(pair), max(pair)) for pair in found}, tiers


def told(workspace: Path, dataset: Dataset, allow_nan: bool = False) -> list[str]:
    """Warnings but those on the number of rows."""
    warnings = prepare(dataset, workspace, 0, allow_nan)["warnings"]
    return [line for line in warnings if not line.startswith("only ")]


def table(n: int = 600, width: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.lognormal(size=(n, width)) * 10.0 ** np.arange(width), rng.integers(0, 2, n)


@pytest.mark.parametrize("name", ORDINARY)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ordinary_data_raise_no_suspicion(tmp_path: Path, name: str, dtype: str) -> None:
    x, y = ORDINARY[name](return_X_y=True)
    assert told(tmp_path, Dataset(x.astype(dtype), y)) == []


def test_close_neighbours_by_chance_are_no_copies() -> None:
    """Few columns, small whole numbers, heavy tails, windows of a series: rows are close, but not by copying."""
    rng = np.random.default_rng(0)
    n = 3000
    walk, angle = np.cumsum(rng.normal(size=n + 20)), rng.random(n)
    tables = {
        "one column": rng.normal(size=(n, 1)),
        "three columns": rng.normal(size=(n, 3)),
        "small whole numbers": rng.integers(1, 6, size=(n, 6)).astype(float),
        "flags": (rng.random((n, 40)) < 0.1).astype(np.float32),
        "heavy tails": rng.standard_cauchy(size=(n, 6)),
        "windows": np.stack([walk[k : k + n] for k in range(20)], axis=1),
        "a curve": np.stack([angle, angle**2, np.sin(6 * angle), np.cos(9 * angle)], axis=1),
        "mostly zero": np.where(rng.random((n, 200)) < 0.01, rng.random((n, 200)), 0.0),
    }
    y = rng.integers(0, 2, n)
    assert {name: pairs for name, x in tables.items() if (pairs := near(x, y)[0])} == {}


def test_few_rows_on_a_curve_are_seldom_taken_for_copies() -> None:
    """Each step of rounding keeps a tenth of their pairs, so that one stays at times: 0.6 % of tables are told."""
    rng, fired = np.random.default_rng(3), 0
    for _ in range(100):
        n = int(rng.integers(60, 1500))
        x = np.sin(rng.random((n, 1)) @ rng.normal(size=(1, 6)) * 3 + rng.normal(size=6))
        fired += bool(near(x, rng.integers(0, 2, n))[0])
    assert fired <= 5  # 0 or 1 with other seeds; 8 to 16 if a pair need not stay twice


@pytest.mark.parametrize("name", ["digits", "breast_cancer", "diabetes"])
@pytest.mark.parametrize(("noise", "share"), [(0.0, 1.0), (1e-5, 1.0), (1e-4, 0.9), (1e-3, 0.4)])
def test_noised_and_re_encoded_copies_in_another_tier_are_found(name: str, noise: float, share: float) -> None:
    """Noise is in standard deviations of each column. At 0.001 a copy crosses a border of both grids at times."""
    x, y = ORDINARY[name](return_X_y=True)
    rng, n = np.random.default_rng(1), len(x)
    copied = np.arange(0, n, 10)
    copies = x[copied] + noise * x.std(axis=0) * rng.normal(size=x[copied].shape)
    if not noise:
        copies = (x[copied] * 1.000001).astype(np.float32).astype(np.float64)
    found, tiers = near(np.concatenate([x, copies]), np.concatenate([y, y[copied]]))
    wanted = {(int(a), n + k) for k, a in enumerate(copied) if tiers[a] != tiers[n + k]}
    assert len(wanted) > 20
    assert found <= wanted, "rows that are no copies"
    assert len(found) >= share * len(wanted)


def test_near_duplicates_are_named_with_their_tiers_and_what_to_do(tmp_path: Path) -> None:
    x, y = table()
    noisy = x[[5, 9]] * (1 + 1e-6)
    (line,) = told(
        tmp_path, Dataset(x[:400], y[:400], test=(np.concatenate([x[400:], noisy]), np.append(y[400:], y[[5, 9]])))
    )
    assert line.startswith("4 rows are nearly the same as a row in another tier (x[5] in ")
    assert "and test[200]; x[9] in " in line and "test[201])" in line
    assert "`groups` or `ids`" in line


def test_near_duplicates_that_share_a_group_or_a_tier_are_not_told(tmp_path: Path) -> None:
    x, y = table(300)
    both = np.concatenate([x, x * (1 + 1e-6)])
    (line,) = told(tmp_path / "apart", Dataset(both, np.tile(y, 2)))
    assert "nearly the same" in line
    assert told(tmp_path / "tied", Dataset(both, np.tile(y, 2), groups=np.tile(np.arange(300), 2))) == []
    assert told(tmp_path / "named", Dataset(both, np.tile(y, 2), ids=np.tile(np.arange(300) * 7, 2))) == []


def test_whole_numbers_and_text_beside_the_floats_must_be_equal_and_nan_is_a_value() -> None:
    x, y = table(300)
    both, labels = np.concatenate([x, x * (1 + 1e-6)]), np.tile(y, 2)
    assert near({"a": both, "word": np.tile(np.array(["a", "b", "c"]), 200)}, labels)[0]
    assert not near({"a": both, "word": np.repeat(np.array(["first", "second"]), 300)}, labels)[0]
    holes = both.copy()
    holes[:, 0] = np.nan
    assert near(holes, labels)[0]
    holes[:300, 0] = 0.0  # the column's mean: a missing value is not that either
    holes[:10, 0] = np.arange(10) - 4.5
    assert not near(holes, labels)[0]


def test_numbers_at_the_end_of_their_range_are_taken_as_they_come(tmp_path: Path) -> None:
    x, y = table(300)
    x[::7, 0], x[::11, 1], x[:, 2], x[5, 3] = 1e308, -1e308, np.inf, np.nan
    both = np.concatenate([x, x * (1 + 1e-6)])
    with np.errstate(over="ignore"):
        (line,) = told(tmp_path, Dataset(both, np.tile(y, 2)), allow_nan=True)
    assert "nearly the same" in line


def test_equal_rows_form_one_unit_and_are_an_error_across_tiers_that_the_user_gave(tmp_path: Path) -> None:
    x, y = table()
    doubled = np.concatenate([x, x[:100]])
    _, tiers, _ = split_of(doubled, np.append(y, y[:100]))
    assert (tiers[600:] == tiers[:100]).all()
    assert told(tmp_path, Dataset(doubled, np.append(y, y[:100]))) == []
    with pytest.raises(DataError, match=r"2 rows \(0, 1\) of test have the same features .* or give all rows as x"):
        prepare(Dataset(x, y, test=(np.concatenate([x[:2], x[2:] + 1]), y)), tmp_path, 0, False)


def test_validation_of_the_users_must_be_later_than_train(tmp_path: Path) -> None:
    x, y = table(700)
    time = np.arange(700)

    def with_times(of_validation: np.ndarray) -> Dataset:
        held = Dataset(x[600:], y[600:], time=of_validation)
        return Dataset(x[:600], y[:600], time=time[:600], validation=held)

    manifest = prepare(with_times(time[600:]), tmp_path, 0, False)
    assert manifest["ordered"] and manifest["supplied"] == ["validation"]
    early = time[600:].copy()
    early[[4, 7]] = 3, 5
    with pytest.raises(DataError, match=r"later than all train rows when time is given, but 2 rows \(4, 7\)"):
        prepare(with_times(early), tmp_path, 0, False)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_our_own_split_parts_no_group_no_equal_rows_and_mixes_no_times(data: st.DataObject) -> None:
    n = data.draw(st.integers(30, 200), label="rows")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="values"))
    values = rng.integers(0, data.draw(st.sampled_from([40, 10**6]), label="distinct"), n)
    kinds = data.draw(st.sampled_from(["groups", "time", "both", "neither"]), label="kinds")
    groups = rng.integers(0, data.draw(st.integers(6, n)), n) if kinds in ("groups", "both") else None
    time = rng.integers(0, data.draw(st.integers(6, 3 * n)), n) if kinds in ("time", "both") else None
    if kinds == "both":
        assert groups is not None and time is not None
        time = groups * 1000 + rng.integers(0, 900, n)  # a group's rows follow each other, or no cut would part none
    try:
        tiers = split.assign(
            row_hashes([values[:, None]]), rng.integers(0, 3, n), data.draw(st.integers(0, 5)), split.sizes(n),
            groups=groups, time=time,
        )  # fmt: skip
    except DataError:
        assume(False)
    for column in (groups, values if time is None else None):
        if column is not None:
            assert all(len(set(tiers[column == value].tolist())) == 1 for value in np.unique(column))
    if time is not None:
        for earlier, later in combinations(range(TRAIN, TEST + 1), 2):
            assert time[tiers == earlier].max() < time[tiers == later].min()


def scaled(x: np.ndarray, by: np.ndarray, how: str) -> np.ndarray:
    """Columns scaled with statistics of the rows ``by``."""
    if how == "min-max":
        return (x - by.min(axis=0)) / (by.max(axis=0) - by.min(axis=0))
    if how == "-1 to 1":
        return 2 * scaled(x, by, "min-max") - 1
    centred = x - by.mean(axis=0)
    if how == "norm":
        return centred / np.linalg.norm(by - by.mean(axis=0), axis=0)
    return centred / by.std(axis=0, ddof=1 if how == "pandas" else 0)


@pytest.mark.parametrize("how", ["standard", "pandas", "norm", "min-max", "-1 to 1"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_columns_scaled_with_all_rows_are_told_and_those_scaled_with_train_are_not(how: str, dtype: str) -> None:
    x, y = sklearn_data.load_wine(return_X_y=True)
    _, tiers, _ = split_of(x, y)
    train = tiers == TRAIN
    columns, looked_at = leakage.scaled_columns(read(Dataset(scaled(x, x, how).astype(dtype), y)), train)
    assert columns >= looked_at - 1 > 5
    assert leakage.scaled_columns(read(Dataset(scaled(x, x[train], how).astype(dtype), y)), train) == (0, looked_at)


def test_diabetes_as_scikit_learn_scales_it_is_told(tmp_path: Path) -> None:
    """It comes with every column scaled by all 442 rows; ``spaces/diabetes.py`` asks for it unscaled."""
    x, y = sklearn_data.load_diabetes(return_X_y=True)
    (line,) = told(tmp_path, Dataset(x, y))
    assert line.startswith("9 columns of x look scaled with statistics of all rows, test rows included; scale in")


def test_numbers_that_only_look_standard_are_not_scaled() -> None:
    rng = np.random.default_rng(0)
    for n, width in ((200, 2), (5_000, 4), (200_000, 3)):
        train = rng.random(n) < 0.6
        uniform = rng.random((n, width))
        for x in (rng.normal(size=(n, width)), uniform, np.round(uniform, 2)):
            assert leakage.scaled_columns(read(Dataset(x, np.arange(n) % 2)), train)[0] == 0


def test_a_million_uniform_numbers_come_close_to_the_ends_but_do_not_reach_them() -> None:
    rng = np.random.default_rng(9)  # one of the third of seeds with two columns or more within 1e-6 of 0 and 1
    x, train = rng.random((1_000_000, 4)), rng.random(1_000_000) < 0.6
    assert ((x.min(axis=0) < 1e-6) & (x.max(axis=0) > 1 - 1e-6)).sum() >= 2
    assert leakage.scaled_columns(read(Dataset(x, np.arange(len(x)) % 2)), train) == (0, 4)


@pytest.mark.parametrize("how", ["standard", "min-max"])
def test_columns_scaled_with_train_are_left_alone_where_the_other_rows_change_little(how: str) -> None:
    """A handful of rows outside train moves no mean by a thousandth, and need not reach the ends of a column."""
    x, _ = table(20_000)
    train = np.arange(len(x)) >= 10
    x[:10] = x[10:20] * 0.99 + x[20:30] * 0.01
    y = np.arange(len(x)) % 2
    assert leakage.scaled_columns(read(Dataset(scaled(x, x[train], how), y)), train) == (0, 6)
    assert leakage.scaled_columns(read(Dataset(scaled(x, x, "standard"), y)), train) == (6, 6)


def test_the_same_warnings_come_when_the_rows_are_found_stored(tmp_path: Path) -> None:
    x, y = table(300)
    dataset = Dataset(scaled(np.concatenate([x, x * (1 + 1e-6)]), x, "standard"), np.tile(y, 2))
    first = told(tmp_path, dataset)
    assert first and told(tmp_path, dataset) == first


def test_a_mean_over_more_than_train_is_told_from_one_over_train_or_a_part_of_it() -> None:
    rng = np.random.default_rng(0)
    sizes = {"train": 600, "validation": 100, "guard": 100, "test": 200}
    tiers = {name: rng.normal(50, 3, size=(size, 4)).astype(np.float32) for name, size in sizes.items()}

    def behind(rows: np.ndarray) -> list[str]:
        return leakage.tiers_behind(rows.mean(axis=0)[None], tiers.items())

    everything = np.concatenate(list(tiers.values()))
    assert behind(everything) == list(sizes)
    assert behind(np.concatenate([tiers["train"], tiers["guard"]])) == ["train", "guard"]
    assert behind(tiers["train"]) == behind(tiers["train"][::2]) == behind(tiers["test"]) == []
    assert leakage.tiers_behind(np.full((1, 4), 50.0), tiers.items()) == []
    same = {"train": tiers["train"], "test": tiers["train"]}  # over both it is the mean of train, rounded otherwise
    assert leakage.tiers_behind(tiers["train"].mean(axis=0)[None], same.items()) == []
    one = everything.mean(keepdims=True)
    assert leakage.tiers_behind(one, tiers.items()) == list(sizes)


PREPROCESS = (
    "ROWS = np.random.default_rng(0).normal(size=(200, 4)).astype('float32')\n\n\n"
    "def preprocess(train):\n"
    "    layer = keras.layers.Normalization(name='centre')\n"
    "    layer.adapt({rows})\n"
    "    {model}"
)
MODELS = (
    "return keras.Sequential([keras.Input((4,)), layer])",
    "x = keras.Input((4,))\n    return keras.Model(x, keras.layers.Rescaling(2.0)(layer(x)))",
)


def load_job(folder: Path, **parts: str) -> dict[str, Any]:
    folder.mkdir()
    problem = find(write_space(folder, **parts))
    payload = {"problem": problem.to_json(), "workspace": str(folder), "folder": str(folder), "split_seed": 0}
    payload["budget"] = 1 << 30
    return worker.load(payload, lambda body: None)


@pytest.mark.parametrize("model", MODELS)
def test_a_normalization_adapted_on_more_than_train_is_refused_by_name(tmp_path: Path, model: str) -> None:
    found = load_job(tmp_path / "train", rest=PREPROCESS.format(rows="train.x", model=model))
    assert Path(found["preprocess"]).exists()
    with pytest.raises(DataError) as caught:
        load_job(tmp_path / "all", rest=PREPROCESS.format(rows="ROWS", model=model))
    message = str(caught.value)
    assert "its layer 'centre' has the mean of train, validation, guard and test rows together" in message
    assert message.endswith("adapt it on train.x") and "\n" not in message
    assert not (tmp_path / "all" / "preprocess.keras").exists()


def test_inputs_of_a_preprocessing_model_are_matched_by_name(tmp_path: Path) -> None:
    load = (
        "def load():\n"
        "    return Dataset({'a': ROWS[:, :2], 'b': ROWS[:, 2:], 'c': np.arange(200)}, (ROWS[:, 0] > 0).astype(int))"
    )
    model = (
        "a, b = keras.Input((2,), name='a'), keras.Input((2,), name='b')\n"
        "    c = keras.Input((1,), name='c')\n"
        "    return keras.Model([b, a, c], [layer(b), a, c])"
    )
    for name, rows in (("train", "train.x['b']"), ("all", "ROWS[:, 2:]")):
        rest = PREPROCESS.format(rows=rows, model=model)
        if name == "train":
            load_job(tmp_path / name, load=load, rest=rest)
        else:
            with pytest.raises(DataError, match="layer 'centre'"):
                load_job(tmp_path / name, load=load, rest=rest)

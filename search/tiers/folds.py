"""Folds: which train and validation rows train a configuration and which validate it, as index files of a study.

    STUDY/folds/train_0.npy, validation_0.npy, …    of a plan whose splits all trials share
    STUDY/folds/unit.npy, keys.npy, strata.npy      of one that draws a split for every trial

They hold positions in the stored pool, so no row is stored twice. Guard and test rows are in none of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from search.errors import DataError
from search.tiers import split
from search.tiers.rows import Array, hashed
from search.tiers.split import GUARD, TEST, TRAIN, VALIDATION, Units
from search.tiers.store import OpenRows
from search.tiers.validation import REFIT, Validation, parse


class Part(NamedTuple):
    """Positions of the rows that train and of those that validate, int64, ascending."""

    train: Array
    validation: Array


# ── dividing ─────────────────────────────────────────────────────────────────────────────────────


def divided(plan: Validation, units: Units, rows: int, split_seed: int) -> list[Part]:
    """The splits of a plan that all trials share.

    In ``kfold`` every row validates once, and each fold has its share of every class or bin; rows ordered in time are
    cut into one block more than there are folds, and each block but the first validates what the blocks before it
    train. In ``repeated`` each split is drawn anew, as ``drawn`` does it.

    Args:
        rows: Validation rows of one split of ``repeated``.

    Raises:
        DataError: If there are too few rows that may part, or the train rows of a split lack a class.
    """
    salt = f"{split_seed}/{plan}"
    if plan.kind == "kfold":
        parts = _chained(units, plan) if units.ordered else _folds(units, plan, salt)
    elif units.ordered:
        parts = [_window(units, rows, salt, number) for number in range(plan.count)]
    else:
        parts = [_redealt(units, rows, f"{salt}/{number}") for number in range(plan.count)]
    if units.classes is not None:
        _check_classes(plan, units, parts)
    return parts


def drawn(units: Units, rows: int, split_seed: int, seed: int) -> Part:
    """The split of one trial in ``reshuffle``: of the stored split's size, stratified like it, by the trial's seed.

    Rows ordered in time: a window of that size, beginning in the second half; the rows before it train. (The "repeated
    holdout" of Cerqueira, Torgo and Mozetič 2020, "Evaluating time series forecasting models".)
    """
    salt = f"{split_seed}/reshuffle/{seed}"
    return _window(units, rows, salt, 0) if units.ordered else _redealt(units, rows, salt)


def _folds(units: Units, plan: Validation, salt: str) -> list[Part]:
    """Units, the largest first, each to the fold with the fewest rows of its stratum, then with the fewest rows."""
    rank, size, stratum = split.ordered_units(units.unit, units.keys, units.strata, salt)
    if len(size) < plan.count:
        raise DataError(
            f"--validation {plan} needs {plan.count} sets of rows that may part, but rows that stay together form only "
            f"{len(size)}; give fewer folds, or finer groups"
        )
    sizes, strata = size.tolist(), stratum.tolist()
    has = [[0] * plan.count for _ in range(max(strata) + 1)]
    total = [0] * plan.count
    fold = np.empty(len(sizes), dtype=np.int64)
    for unit in np.lexsort((rank, -size)).tolist():
        mine = has[strata[unit]]
        to = min(range(plan.count), key=lambda k: (mine[k], total[k]))
        mine[to] += sizes[unit]
        total[to] += sizes[unit]
        fold[unit] = to
    of_row = fold[units.unit]
    return [Part(np.flatnonzero(of_row != k), np.flatnonzero(of_row == k)) for k in range(plan.count)]


def _chained(units: Units, plan: Validation) -> list[Part]:
    """Blocks of about equal size in order of time; each but the first validates, trained on all that came before."""
    before = _borders(units)
    count, rows = plan.count, len(units.unit)
    if len(before) < count:
        raise DataError(
            f"--validation {plan} cuts rows in order of time into {count + 1} blocks, but groups and equal times allow "
            f"{len(before) + 1}; give fewer folds, or finer times"
        )
    cuts, at = [], -1
    for fold in range(1, count + 1):
        nearest = int(np.abs(before - rows * fold / (count + 1)).argmin())
        at = min(max(nearest, at + 1), len(before) - 1 - (count - fold))
        cuts.append(int(before[at]))
    ends = [*cuts[1:], rows]
    return [Part(np.arange(cut), np.arange(cut, end)) for cut, end in zip(cuts, ends, strict=True)]


def _window(units: Units, rows: int, salt: str, number: int) -> Part:
    """A window of so many rows, and all rows before it; ``number`` tells windows of one salt apart."""
    before, count = _borders(units), len(units.unit)
    could = before[(before >= count / 2) & (before <= count - rows)]
    if not len(could) and len(before):
        could = before[[np.abs(before - (count - rows)).argmin()]]
    if len(could) <= number:
        raise DataError(
            f"splits of rows in order of time begin where no group and no moment is cut, but there are {len(could)} "
            f"such places in their second half, and {number + 1} are needed; give finer times, or --validation holdout"
        )
    order = np.argsort(hashed(could.tolist(), lambda place: f"{salt}/{place}".encode()), kind="stable")
    begin = int(could[order[number]])
    ends = [*before[before >= begin + rows].tolist(), count]
    return Part(np.arange(begin), np.arange(begin, ends[0]))


def _borders(units: Units) -> Array:
    """How many rows come before each place where rows in order of time can be cut."""
    return cast(Array, np.cumsum(np.bincount(units.unit))[:-1])


def _redealt(units: Units, rows: int, salt: str) -> Part:
    quotas = {TEST: 0, GUARD: 0, VALIDATION: rows}
    tiers = split.deal(units.unit, units.keys, units.strata, salt, quotas)
    return Part(np.flatnonzero(tiers == TRAIN), np.flatnonzero(tiers == VALIDATION))


def _check_classes(plan: Validation, units: Units, parts: Sequence[Part]) -> None:
    assert units.classes is not None
    there = np.unique(units.strata)
    for number, part in enumerate(parts):
        lacking = np.setdiff1d(there, units.strata[part.train])
        if len(lacking):
            raise DataError(
                f"every class must be among the train rows of every {plan.step}, but class "
                f"{units.classes[lacking[0]]!r} is not in those of {plan.step} {number + 1} of {plan}; give fewer, add "
                "rows of it, or leave it out"
            )


# ── on disk ──────────────────────────────────────────────────────────────────────────────────────


def write(plan: Validation, units: Units, manifest: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Write a study's index files; what is recorded of the plan.

    Args:
        manifest: Of the rows, see ``data.prepare``.
        folder: Gets the files; those of an earlier try are replaced.

    Returns:
        JSON: ``plan``; ``folder``; ``split_seed``, ``quota`` and ``ordered``, by which splits are drawn; ``train`` and
        ``validation``, rows of each split; ``rows``, how many different rows validate a trial; ``weight``, to how many
        rows its score amounts: where rows validate several times, (Σc)²/Σc² of the times c (Kish 1965), so that the
        same rows again add nothing.

    Raises:
        DataError: If the rows cannot be divided so, or which of them validate is decided already.
    """
    if "validation" in manifest["supplied"]:
        raise DataError(
            f"--validation {plan} divides train and validation rows anew, but load() says by validation= which rows "
            "validate; leave out one of the two"
        )
    quota, seed = int(manifest["tiers"]["validation"]), int(manifest["split_seed"])
    folder.mkdir(exist_ok=True)
    if plan.is_repeated:
        parts = divided(plan, units, quota, seed)
        for number, part in enumerate(parts):
            _save(folder / f"train_{number}.npy", part.train)
            _save(folder / f"validation_{number}.npy", part.validation)
    else:
        parts = [drawn(units, quota, seed, 0)]
        for name in ("unit", "keys", "strata"):
            _save(folder / f"{name}.npy", getattr(units, name))
    times = np.bincount(np.concatenate([part.validation for part in parts]))
    return {
        "plan": str(plan),
        "folder": str(folder),
        "split_seed": seed,
        "quota": quota,
        "ordered": units.ordered,
        "train": [len(part.train) for part in parts],
        "validation": [len(part.validation) for part in parts],
        "rows": int((times > 0).sum()),
        "weight": float(times.sum() ** 2 / (times**2).sum()),
    }


def parts(found: Mapping[str, Any], seed: int) -> list[Part]:
    """The splits that the trial with this seed trains on.

    Args:
        found: What ``write`` returned.
    """
    return [_part(found, seed, number) for number in range(parse(found["plan"]).count)]


def _part(found: Mapping[str, Any], seed: int, number: int) -> Part:
    folder = Path(found["folder"])
    if parse(found["plan"]).is_repeated:
        return Part(_load(folder / f"train_{number}.npy"), _load(folder / f"validation_{number}.npy"))
    unit, keys, strata = (_load(folder / f"{name}.npy") for name in ("unit", "keys", "strata"))
    units = Units(unit, keys, strata, None, found["ordered"])
    return drawn(units, found["quota"], found["split_seed"], seed)


def of_part(rows: OpenRows, part: Mapping[str, Any]) -> OpenRows:
    """The rows of one training.

    Args:
        part: ``folds``, what ``write`` returned; ``seed``, the trial's; ``number`` of the split, or ``REFIT`` for all
            of train and validation. The stored validation rows keep their name then and are trained on as well.
    """
    if part["number"] == REFIT:
        return rows.divided(np.arange(rows.labelled), rows.index("validation"))
    return rows.divided(*_part(part["folds"], part["seed"], part["number"]))


def _load(path: Path) -> Array:
    return cast(Array, np.load(path, allow_pickle=False))


def _save(path: Path, values: Array) -> None:
    temporary = path.with_name(f".{path.name}")
    with temporary.open("wb") as file:
        np.save(file, values, allow_pickle=False)
    os.replace(temporary, path)

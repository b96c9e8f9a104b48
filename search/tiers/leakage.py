"""Leakage checks before the first trial: what ties the tiers to each other, and what was learned from more than train.

What is certain is refused; what only looks like leakage becomes a warning, with how many rows and which.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.errors import DataError
from search.tiers.files import Files
from search.tiers.rows import Array, Hashes, Rows, row_hashes
from search.tiers.split import GUARD, TEST, TIERS, TRAIN, VALIDATION, Tiers

Floats = NDArray[np.float64]

_NAMED_ROWS = 5
_NAMED_PAIRS = 3
_PART_BYTES = 16 << 20

# Near duplicates: a row becomes a few random sums of its columns, each in units of the column's spread. Unlike
# the columns one by one, a sum hardly notices noise that is independent between them.
_SUMS = 8
_FEWEST_COLUMNS = 4  # rows of fewer numbers have close neighbours by chance
_SPREAD_VALUES = 4_000_000
_SPREAD_ROWS = 10_000
# A hundredth of the spread is three digits over a column's range. Where that joins rows that are no copies, finer.
_STEPS = (1e-2, 1e-3, 1e-4, 1e-5)
_MISSING = 100.0  # what stands for NaN, in spreads: far from every value

# Scaled columns: of so many values at most, and only those that could be measurements.
_MOST_COLUMNS = 200
_MOST_VALUES = 20_000_000
_LEAST_DISTINCT = 50
_DISTINCT_AMONG = 5_000
_NEAR = 1e-3


def check_supplied(rows: Rows, given: Tiers, x_hashes: Hashes) -> None:
    """Refuse rows, groups or times that tie a tier the user gave to the other rows.

    Args:
        given: Tier that the user gave each row, -1 for none.

    Raises:
        DataError: With how many rows and which, counted within the tier.
    """
    numbers = _numbers(given)
    for code in (VALIDATION, GUARD, TEST):
        mine, others = given == code, given != code
        if not mine.any():
            continue
        name = TIERS[code]
        twice = mine & np.isin(x_hashes, x_hashes[others])
        if twice.any():
            raise DataError(
                f"no row may be in two tiers, but {_counted(numbers[twice])} of {name} have the same features as "
                f"rows outside it; leave them out of {name} or out of the rest, or give all rows as x, where "
                "equal rows are kept together"
            )
        if rows.groups is not None and (shared := mine & np.isin(rows.groups, rows.groups[others])).any():
            raise DataError(
                f"no group may be in two tiers, but {_counted(numbers[shared])} of {name} belong to groups "
                "that go on outside it; keep each group whole"
            )
        if code == TEST and rows.time is not None and (early := mine & (rows.time <= rows.time[others].max())).any():
            raise DataError(
                f"test rows must be later than all others when time is given, but {_counted(numbers[early])} "
                "of test are not; leave them out, or leave out `time`"
            )


def check_times(rows: Rows, given: Tiers, tiers: Tiers) -> None:
    """Refuse validation or guard rows of the user's that are not later than train; our own split orders its tiers.

    Raises:
        DataError: With how many rows and which, counted within the tier.
    """
    for code in (VALIDATION, GUARD):
        mine = given == code
        if rows.time is None or not mine.any():
            continue
        early = mine & (rows.time <= rows.time[tiers == TRAIN].max())
        if early.any():
            raise DataError(
                f"{TIERS[code]} rows must be later than all train rows when time is given, but "
                f"{_counted(_numbers(given)[early])} of {TIERS[code]} are not; leave them out, or leave out `time`"
            )


def suspicions(rows: Rows, given: Tiers, tiers: Tiers, x_hashes: Hashes, hashes: Hashes) -> list[str]:
    """Warnings, one line each, about rows that may carry what they should not from one tier to another.

    Args:
        given: Tier that the user gave each row, -1 for none.
        tiers: Tier of each row.
        x_hashes: Hash of each row's features; hashes: of its features and labels.
    """
    out = []
    pairs = np.unique(np.stack([x_hashes, hashes]), axis=1)[0]
    features, labels = np.unique(pairs, return_counts=True)
    odd = np.isin(x_hashes, features[labels > 1])
    if odd.any():
        which = _counted(np.flatnonzero(odd))
        out.append(f"{which} have the same features as another row but a different label")
    if rows.time is not None:
        # Repeated readings are normal in time series, so they are told rather than refused.
        early = np.isin(x_hashes[tiers != TRAIN], x_hashes[tiers == TRAIN])
        if early.any():
            out.append(f"{int(early.sum())} rows outside train have the same features as a row in train")
    alike, partner = near_duplicates(rows, tiers, x_hashes)
    if len(alike):
        numbers, later = _numbers(given), tiers[alike] > tiers[partner]
        shown = zip(partner[later][:_NAMED_PAIRS], alike[later][:_NAMED_PAIRS], strict=True)
        named = "; ".join(" and ".join(_place(at, given, tiers, numbers) for at in pair) for pair in shown)
        out.append(
            f"{len(alike)} rows are nearly the same as a row in another tier ({named}"
            f"{'; …' if later.sum() > _NAMED_PAIRS else ''}): if they are copies, give them the same value in "
            "`groups` or `ids`, or leave them out"
        )
    again, pair = re_encoded(rows, tiers, x_hashes)
    if again:
        out.append(
            f"{again} rows decode to the same as a row in another tier from other files ({' and '.join(pair)}): "
            "if they are copies, give them the same value in `groups` or `ids`, or leave one out"
        )
    scaled, looked_at = scaled_columns(rows, tiers == TRAIN)
    if scaled:
        which = f"{scaled} columns" if scaled == looked_at else f"{scaled} of {looked_at} columns"
        out.append(
            f"{which} of x look scaled with statistics of all rows, test rows included; scale in "
            "preprocess(train) instead, which sees train rows only"
        )
    return out


def _numbers(given: Tiers) -> Array:
    """Position of each row in what the user gave: in x, in validation, in guard or in test."""
    return np.concatenate([np.arange((given == code).sum()) for code in (-1, VALIDATION, GUARD, TEST)])


def _counted(numbers: Array) -> str:
    """How many rows and which, such as "7 rows (3, 5, 8, 9, 11, …)"."""
    shown = ", ".join(str(int(number)) for number in numbers[:_NAMED_ROWS])
    more = ", …" if len(numbers) > _NAMED_ROWS else ""
    return f"{len(numbers)} row{'' if len(numbers) == 1 else 's'} ({shown}{more})"


def _place(at: int, given: Tiers, tiers: Tiers, numbers: Array) -> str:
    """Where the user finds a row, such as "x[3] in guard" or "test[7]"."""
    tier = TIERS[tiers[at]]
    return f"x[{numbers[at]}] in {tier}" if given[at] < 0 else f"{tier}[{numbers[at]}]"


def re_encoded(rows: Rows, tiers: Tiers, x_hashes: Hashes) -> tuple[int, list[str]]:
    """How many rows outside train decode to what a file with other bytes in another tier does, and a pair of files."""
    files = [leaf for leaf in rows.x if isinstance(leaf, Files)]
    if not files:
        return 0, []
    rest = [leaf for leaf in rows.x if not isinstance(leaf, Files)]
    columns = [leaf.decoded for leaf in files if leaf.decoded is not None]
    columns += [row_hashes(rest)] if rest else []
    same = np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)[1].reshape(-1)
    order = np.lexsort((tiers, same))
    first = np.full(int(same.max()) + 1, -1)
    first[same[order][::-1]] = order[::-1]  # the row of each kind that is nearest to train
    partner = first[same]
    found = np.flatnonzero((tiers > tiers[partner]) & (x_hashes != x_hashes[partner]))
    return len(found), [files[0].paths[row] for row in (partner[found[0]], found[0])] if len(found) else []


def near_duplicates(rows: Rows, tiers: Tiers, x_hashes: Hashes) -> tuple[Array, Array]:
    """Rows that nearly equal a row in another tier, as re-encoded or slightly noised copies do.

    Float columns count in units of their spread (their standard deviation), all else must be equal. Rows are
    close if random sums over all their columns, rounded to a step, are the same. Most copies are found whose
    noise is a thousandth of the spread. Where rows are close by chance, the number of such pairs falls with the
    step, while that of copies stays: so the step is made finer until it keeps a third of the pairs, or leaves none.

    Equal rows do not count: they are one unit of the split, or refused, or told of elsewhere.

    Returns:
        Positions of the rows in order, and for each the position of such a row in another tier; both of shape (found,).
    """
    position = np.sort(np.unique(x_hashes, return_index=True)[1])
    nothing = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    sums = _sums(rows, position)
    if sums is None:
        return nothing
    exact = [leaf for leaf in rows.x if isinstance(leaf, Files) or leaf.dtype.kind != "f"]
    rest = row_hashes(exact)[position] if exact else np.zeros(len(position), dtype=np.uint64)
    coarse, fell = _pairs(_cells(sums, 10 * _STEPS[0], rest)), np.inf
    for step in _STEPS:
        pairs = _pairs(_cells(sums, step, rest))
        if pairs == 0:
            return nothing
        # Of rows along a curve a tenth stays at each step, and one pair may stay once by luck: not twice.
        if coarse <= 3 * pairs and not 3 < fell < 30:
            break
        coarse, fell = pairs, coarse / pairs
    else:
        return nothing
    tier, partner = tiers[position], np.full(len(position), -1)
    for shift in (0.0, 0.5):  # copies on both sides of a border of one grid are well inside a cell of the other
        cell = np.unique(_cells(sums, step, rest, shift), return_inverse=True)[1]
        order = np.lexsort((tier, cell))  # within a cell: train first, test last
        ends = np.cumsum(np.bincount(cell))
        first, last = order[ends - np.bincount(cell)][cell], order[ends - 1][cell]
        mixed = tier[first] < tier[last]
        partner[mixed] = np.where(tier > tier[first], first, last)[mixed]
    found = np.flatnonzero(partner >= 0)
    return position[found], position[partner[found]]


def _sums(rows: Rows, position: Array) -> Floats | None:
    """Random sums over the float columns of some rows, shape (rows, _SUMS); None if there are too few columns."""
    rng = np.random.default_rng(0)
    total, columns = np.zeros((len(position), _SUMS)), 0
    for leaf in rows.x:
        if isinstance(leaf, Files) or leaf.dtype.kind != "f":
            continue
        flat = leaf.reshape(len(leaf), -1)
        center, spread = _spreads(flat)
        columns += int((spread > 0).sum())
        factors = rng.normal(size=(flat.shape[1], _SUMS)) * (spread > 0)[:, None]
        spread[spread == 0] = 1.0
        step = max(1, _PART_BYTES // (8 * flat.shape[1]))
        for start in range(0, len(position), step):
            with np.errstate(over="ignore", invalid="ignore"):
                part = (flat[position[start : start + step]].astype(np.float64) - center) / spread
                total[start : start + step] += np.nan_to_num(part, nan=_MISSING, posinf=1e9, neginf=-1e9) @ factors
    return np.nan_to_num(total / np.sqrt(columns)) if columns >= _FEWEST_COLUMNS else None


def _spreads(flat: Array) -> tuple[Floats, Floats]:
    """Mean and standard deviation of columns over a sample of rows, without NaN and infinities."""
    rows = min(len(flat), _SPREAD_ROWS, max(100, _SPREAD_VALUES // flat.shape[1]))
    at, width = np.linspace(0, len(flat) - 1, rows).astype(np.int64), flat.shape[1]
    mean, spread = np.empty(width), np.empty(width)
    step = max(1, _PART_BYTES // (8 * rows))
    for start in range(0, width, step):
        part = slice(start, start + step)
        sample = flat[at, part].astype(np.float64)
        finite = np.isfinite(sample)
        count = np.maximum(finite.sum(axis=0), 1)
        with np.errstate(over="ignore", invalid="ignore"):
            mean[part] = np.where(finite, sample, 0.0).sum(axis=0) / count
            spread[part] = np.sqrt((np.where(finite, sample - mean[part], 0.0) ** 2).sum(axis=0) / count)
    return mean, spread


def _cells(sums: Floats, step: float, rest: Hashes, shift: float = 0.0) -> Hashes:
    """One number for each row, the same for rows whose rounded sums and ``rest`` are the same."""
    cells = np.clip(np.floor(sums / step + shift), -(2.0**62), 2.0**62).astype(np.int64).view(np.uint64)
    odd = np.random.default_rng(1).integers(2**63, size=sums.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    out: Hashes = (cells * odd).sum(axis=1, dtype=np.uint64) ^ rest
    return out


def _pairs(cells: Hashes) -> int:
    counts = np.unique(cells, return_counts=True)[1].astype(np.int64)
    return int((counts * (counts - 1) // 2).sum())


def scaled_columns(rows: Rows, train: NDArray[np.bool_]) -> tuple[int, int]:
    """How many float columns look scaled with statistics of all rows, and how many were looked at.

    Standardised: mean 0 and standard deviation or norm 1 over all rows, within 0.001, while the means over train
    are ten times as far off; columns that merely come from N(0, 1) are about as far off on either. Min-max: exactly
    0 (or -1) to 1, each end reached by one or two rows, and in half of these columns one end by none of train.

    Args:
        train: Which rows are in train, shape (rows,).

    Returns:
        The columns found, 0 unless they are two at least and half of those looked at; and the columns looked at,
        which are those with more than 50 values.
    """
    looked_at, off, unreached = 0, [], []
    for column in _columns(rows):
        finite = np.isfinite(column)
        values = column[finite].astype(np.float64)
        if len(np.unique(values[:: max(1, len(values) // _DISTINCT_AMONG)])) <= _LEAST_DISTINCT:
            continue
        looked_at += 1
        own = values[train[finite]]
        with np.errstate(over="ignore", invalid="ignore"):
            n, mean, std = len(values), float(values.mean()), float(values.std())
        sizes = (std, std * np.sqrt(n / (n - 1)), std * np.sqrt(n))
        if len(own) and abs(mean) <= _NEAR * std and any(abs(size - 1) <= _NEAR for size in sizes):
            off.append((abs(mean), abs(float(own.mean()))))
        if _is_ranged(values):
            unreached.append(not len(own) or own.min() > values.min() or own.max() < values.max())
    found = 0
    if off:
        over_all, over_train = np.median(np.array(off), axis=0)
        # Where train was scaled by itself it is the other way round.
        found = len(off) if over_train > 10 * over_all else 0
    if 2 * sum(unreached) >= len(unreached):
        found = max(found, len(unreached))
    return (found if found >= 2 and 2 * found >= looked_at else 0), looked_at


def _columns(rows: Rows) -> Iterator[Array]:
    """Float columns, evenly spaced over all of them where there are many."""
    arrays = [leaf for leaf in rows.x if not isinstance(leaf, Files)]
    flat = [leaf.reshape(len(rows), -1) for leaf in arrays if leaf.dtype.kind == "f"]
    width = sum(leaf.shape[1] for leaf in flat)
    wanted = np.arange(width)
    if width > (most := max(2, min(_MOST_COLUMNS, _MOST_VALUES // len(rows)))):
        wanted = np.linspace(0, width - 1, most).astype(np.int64)
    start = 0
    for leaf in flat:
        here = wanted[(wanted >= start) & (wanted < start + leaf.shape[1])] - start
        yield from leaf[:, here].T
        start += leaf.shape[1]


def _is_ranged(values: Floats) -> bool:
    """Whether values go exactly from 0 or -1 to 1, each end reached by one or two rows, as a maximum is."""
    near = min(1e-6, 0.01 / len(values))  # rounding of float32; a million uniform numbers come within 1e-6
    low, high = values.min(), values.max()
    exact = abs(high - 1) <= near and min(abs(low), abs(low + 1)) <= near
    return bool(exact and (values <= low + near).sum() <= 2 and (values >= high - near).sum() <= 2)


def check_learned(model: Any, rows: Any, sealed: Any, path: str) -> None:
    """Refuse a ``Normalization`` directly on an input of ``preprocess(train)`` whose mean is that of more rows.

    Args:
        model: What ``preprocess(train)`` returned, with symbolic inputs.
        rows: The ``OpenRows``; sealed: the ``SealedRows`` beside them, since most often it is all rows that were used.
        path: Of the space module, for the message.

    Raises:
        DataError: Naming the layer.
    """
    import keras

    names, pool = rows.manifest["x"]["names"], rows.pool()
    # Keras hands a dict to inputs by their names, all else in order.
    ordered = [tensor.name for tensor in model.inputs] if rows.manifest["x"]["kind"] == "dict" else names
    inputs = model.input if isinstance(model.input, dict) else dict(zip(ordered, model.inputs, strict=False))
    for layer in model.layers:
        if not isinstance(layer, keras.layers.Normalization) or layer.compute_dtype not in ("float32", "float64"):
            continue
        name = next((name for name, tensor in inputs.items() if tensor is layer.input), None)
        if name not in names:
            continue
        at = names.index(name)
        if isinstance(pool[at], Files):  # whose test rows are decoded in the test step alone
            continue
        test = np.load(sealed.feature_files()["paths"][at], mmap_mode="r", allow_pickle=False)
        tiers = ((tier, test if tier == "test" else pool[at][rows.index(tier)]) for tier in TIERS)
        behind = tiers_behind(np.asarray(layer.mean), tiers)
        if behind:
            raise DataError(
                f"{path}: preprocess(train) must learn from the rows it is handed and no others, but its layer "
                f"{layer.name!r} has the mean of {', '.join(behind[:-1])} and {behind[-1]} rows together; adapt it "
                "on train.x"
            )


def tiers_behind(learned: Array, leaves: Iterable[tuple[str, Array]]) -> list[str]:
    """The tiers over whose rows together a mean was taken, if they are more than train.

    Args:
        learned: The mean, with an axis of length 1 wherever it was taken over one, rows first.
        leaves: Tier and features, train first; each is used once, so that they need not be in memory together.

    Returns:
        Names of tiers, train first; empty if it is the mean of train, or of nothing known here.
    """
    over = tuple(axis for axis, size in enumerate(learned.shape) if size == 1)
    means: dict[str, Floats] = {}
    counts: dict[str, int] = {}
    spread: Array = np.zeros(1)
    with np.errstate(over="ignore", invalid="ignore"):
        for tier, leaf in leaves:
            leaf = leaf.reshape(len(leaf), 1) if leaf.ndim == 1 else leaf
            if leaf.ndim != learned.ndim or 0 not in over:
                return []
            if not means:
                spread = leaf[:_SPREAD_ROWS].std(axis=over, dtype=np.float64, keepdims=True)
            means[tier], counts[tier] = leaf.mean(axis=over, dtype=np.float64, keepdims=True), len(leaf)
        train, *others = means
        if means[train].shape != learned.shape:
            return []
        # NumPy adds float32 up row by row, so the rounding of a mean grows with the rows.
        rounding = np.sqrt(sum(counts.values())) * np.finfo(np.float32).eps * np.abs(means[train])
        near = 1e-5 * spread + 4 * rounding
        if not (np.abs(learned - means[train]) > 10 * near).any():
            return []
        for more in range(len(others), 0, -1):
            for some in combinations(others, more):
                names = [train, *some]
                mean = sum(counts[name] * means[name] for name in names) / sum(counts[name] for name in names)
                if (np.abs(learned - mean) <= near).all():
                    return names
    return []

"""The deterministic split: which tier a row belongs to, decided by the data and the split seed alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from search.errors import DataError
from search.tiers.rows import Array, Hashes, hashed, value_hashes

TIERS = ("train", "validation", "guard", "test")
TRAIN, VALIDATION, GUARD, TEST = range(4)

Tiers = NDArray[np.int8]
Codes = NDArray[np.int64]

_DEALT = (TEST, GUARD, VALIDATION)
_MOST_TEST_ROWS = 10_000
_SMALL_GUARD = 500
_BINS = 10
# Fewer units than this cannot fill a tier of 10 % on their own.
_LEAST_UNITS = 10


@dataclass(frozen=True, eq=False)
class Labels:
    """What the first output's labels are.

    Attributes:
        task: "classes" or "values".
        classes: The class values in order, or None.
        codes: Position of each row's class in ``classes``, or its quantile bin.
    """

    task: str
    classes: list[bool | int | float] | None
    codes: Codes


@dataclass(frozen=True, eq=False)
class Units:
    """Rows that stay together, and what divides them.

    Attributes:
        unit: Number of each row's unit, from 0; where rows are ordered, units follow each other in time.
        keys: Hash of what each row is known by.
        strata: Class or bin of each row, from 0.
        classes: The class values in order, or None.
        ordered: Whether rows come in order of time.
    """

    unit: Codes
    keys: Hashes
    strata: Codes
    classes: list[bool | int | float] | None
    ordered: bool


def labels_of(y: Array) -> Labels:
    """Tell classes from values: integers, booleans, 0/1 floats and one-hot rows are classes.

    An integer column of which more than a quarter of the rows differ holds values.

    Args:
        y: The first output's labels, shape (rows, ...).
    """
    n = len(y)
    flat = y.reshape(n, -1)
    if flat.shape[1] == 1:
        column = flat[:, 0]
        values, codes = np.unique(column, return_inverse=True)
        if column.dtype.kind == "f":
            named = bool(np.isin(values, (0.0, 1.0)).all())
        else:
            named = len(values) <= max(2, n / 4)
        if named:
            return Labels("classes", values.tolist(), codes.astype(np.int64))
        return Labels("values", None, _bins(column))
    if y.ndim == 2 and bool(((flat == 0) | (flat == 1)).all()) and bool((flat.sum(axis=1) == 1).all()):
        return Labels("classes", list(range(flat.shape[1])), np.argmax(flat, axis=1).astype(np.int64))
    return Labels("values", None, _bins(flat.mean(axis=1)))


def _bins(values: Array) -> Codes:
    edges = np.unique(np.quantile(values, np.arange(1, _BINS) / _BINS))
    return np.searchsorted(edges, values, side="right").astype(np.int64)


def sizes(rows: int, *, validation: bool = True, test: bool = True, guard: bool = True) -> dict[int, int]:
    """Rows wanted in test, guard and validation, out of ``rows`` that the user has not placed.

    Test is 20 % but at most 10,000 rows; what is held out for selection is the same, a fifth of it
    guard, or half of it while a fifth would be under 500 rows.

    Args:
        validation: False if the user supplies validation rows; test, guard: likewise.
    """
    held = max(1, min(round(rows * 0.2), _MOST_TEST_ROWS))
    guarding = round(held * 0.2)
    if guarding < _SMALL_GUARD:
        guarding = max(1, round(held * 0.5))
    return {
        TEST: held if test else 0,
        GUARD: guarding if guard else 0,
        VALIDATION: max(1, held - guarding) if validation else 0,
    }


def assign(
    x_hashes: Hashes,
    strata: Codes,
    split_seed: int,
    quotas: dict[int, int],
    *,
    groups: Array | None = None,
    time: Array | None = None,
    ids: Array | None = None,
) -> Tiers:
    """The tier of every row.

    Rows that share a group, an id or all their features stay together. Within each stratum these
    units are ordered by a hash of their identity and dealt to test, guard, validation and train in
    that order, so that more data move only the rows next to a border. With ``time``, the
    tiers follow each other in time instead and equal times stay together.

    Args:
        x_hashes: Hash of each row's features; its identity where neither groups nor ids are given.
        strata: Class or bin of each row, from 0.
        quotas: Rows wanted per tier (see ``sizes``); the rest is train.

    Raises:
        DataError: If there are too few units to give each tier one.
    """
    n = len(x_hashes)
    if n <= sum(quotas.values()):
        raise DataError(f"every tier must have rows, but there are only {n} to divide; give at least 4, better 500")
    if time is not None:
        return _by_time(time, groups, quotas)
    return deal(*together(x_hashes, groups, ids), strata, str(split_seed), quotas)


def together(x_hashes: Hashes, groups: Array | None, ids: Array | None) -> tuple[Codes, Hashes]:
    """For each row the number of the unit that it stays in, and a hash of what it is known by."""
    keys = value_hashes(groups) if groups is not None else value_hashes(ids) if ids is not None else x_hashes
    return _units(x_hashes, groups, ids), keys


def deal(unit: Codes, keys: Hashes, strata: Codes, salt: str, quotas: dict[int, int]) -> Tiers:
    """The tier of every row, by ``together`` of the rows and a salt for the hashes that order the units."""
    rank, size, stratum = ordered_units(unit, keys, strata, salt)
    tiers = _deal_strata(rank, size, _coarsened(stratum, size), quotas)
    if any(quotas[tier] and not (tiers == tier).any() for tier in (*_DEALT,)) or not (tiers == TRAIN).any():
        tiers = _deal_strata(rank, size, np.zeros_like(stratum), quotas, fill=True)
    return tiers[unit]


def ordered_units(unit: Codes, keys: Hashes, strata: Codes, salt: str) -> tuple[Hashes, Codes, Codes]:
    """Of each unit its rank by a salted hash of what it is known by, its rows, and its most common stratum."""
    return _least(unit, _ranks(keys, salt)), np.bincount(unit), _majority(unit, strata)


def _ranks(keys: Hashes, salt: str) -> Hashes:
    seed = f"{salt}/".encode()
    values, inverse = np.unique(keys, return_inverse=True)
    ranks = hashed(values.tolist(), lambda key: seed + key.to_bytes(8, "little"))
    return ranks[inverse]


def _units(x_hashes: Hashes, groups: Array | None, ids: Array | None) -> Codes:
    """Number of the connected component of each row, over equal features, groups and ids."""
    n = len(x_hashes)
    links = [np.unique(x_hashes, return_inverse=True)[1]]
    links += [np.unique(column, return_inverse=True)[1] for column in (groups, ids) if column is not None]
    if len(links) == 1:
        return links[0].astype(np.int64)
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rows, nodes, total = [], [], n
    for codes in links:
        rows.append(np.arange(n))
        nodes.append(codes + total)
        total += int(codes.max()) + 1
    ends = (np.concatenate(rows), np.concatenate(nodes))
    graph = coo_array((np.ones(len(ends[0]), dtype=np.int8), ends), shape=(total, total))
    component = connected_components(graph, directed=False)[1][:n]
    return np.unique(component, return_inverse=True)[1].astype(np.int64)


def _least(unit: Codes, ranks: Hashes) -> Hashes:
    out = np.full(int(unit.max()) + 1, np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(out, unit, ranks)
    return out


def _majority(unit: Codes, strata: Codes) -> Codes:
    """The most common stratum of each unit, the lower one on a tie."""
    width = int(strata.max()) + 1
    pairs, counts = np.unique(unit * width + strata, return_counts=True)
    order = np.lexsort((-pairs, counts, pairs // width))  # within a unit: the winner comes last
    owner = pairs[order] // width
    last = np.append(np.flatnonzero(np.diff(owner)), len(owner) - 1)
    winner: Codes = pairs[order][last] % width
    return winner


def _coarsened(stratum: Codes, size: Codes) -> Codes:
    """Strata with too few units, of several rows each, to be divided are put together."""
    units, rows = np.bincount(stratum), np.bincount(stratum, weights=size)
    small = (units < _LEAST_UNITS) & (rows > units)
    return np.where(small[stratum], len(units), stratum)


def _deal_strata(rank: Hashes, size: Codes, stratum: Codes, quotas: dict[int, int], fill: bool = False) -> Tiers:
    """Tier of each unit, dealt by rank within each stratum; largest remainders keep the totals exact."""
    names, stratum = np.unique(stratum, return_inverse=True)
    left = np.bincount(stratum, weights=size).astype(np.int64)
    shares = []
    for tier in _DEALT:
        shares.append(_apportioned(left, quotas[tier]))
        left = left - shares[-1]
    order = np.lexsort((rank, stratum))
    tiers = np.empty(len(rank), dtype=np.int8)
    ends = np.cumsum(np.bincount(stratum))
    for number, end in enumerate(ends):
        mine = order[(ends[number - 1] if number else 0) : end]
        mine_quotas = {tier: int(share[number]) for tier, share in zip(_DEALT, shares, strict=True)}
        tiers[mine] = _deal(size[mine], mine_quotas, fill)
    return tiers


def _apportioned(left: Codes, quota: int) -> Codes:
    """``quota`` rows over strata in proportion to the rows they have left (Hamilton's method)."""
    exact = left * (quota / left.sum())
    whole: Codes = np.floor(exact).astype(np.int64)
    short = quota - int(whole.sum())
    whole[np.argsort(whole - exact, kind="stable")[:short]] += 1
    return whole


def _deal(size: Codes, quotas: dict[int, int], fill: bool) -> Tiers:
    """Tiers of units in their order: test first, train last; a unit goes where its middle row falls.

    Args:
        fill: Give every tier with a quota one unit at least.
    """
    middle = np.cumsum(size) - size / 2
    cuts = np.searchsorted(middle, np.cumsum([quotas[tier] for tier in _DEALT]), side="left")
    if fill:
        wanted = [int(quotas[tier] > 0) for tier in _DEALT]
        if len(size) < sum(wanted) + 1:
            raise DataError(
                f"every tier must have rows, but rows that stay together form only {len(size)} sets for "
                f"{sum(wanted) + 1} tiers; give finer groups or times, or drop repeated rows"
            )
        start = 0
        for k, least in enumerate(wanted):
            after = sum(wanted[k + 1 :]) + 1
            cuts[k] = start = min(max(int(cuts[k]), start + least), len(size) - after)
    tiers = np.full(len(size), TRAIN, dtype=np.int8)
    start = 0
    for tier, cut in zip(_DEALT, cuts, strict=True):
        tiers[start:cut] = tier
        start = max(start, int(cut))
    return tiers


def blocks(time: Array, groups: Array | None) -> Codes:
    """The block of each row, numbered in order of time; rows of one time, and groups that overlap, share a block."""
    moment = np.unique(time, return_inverse=True)[1].astype(np.int64)
    block = moment
    if groups is not None:
        # A group covers the time from its first to its last row; cuts go where no group is open.
        _, group = np.unique(groups, return_inverse=True)
        first = np.full(int(group.max()) + 1, len(time), dtype=np.int64)
        last = np.full(len(first), -1, dtype=np.int64)
        np.minimum.at(first, group, moment)
        np.maximum.at(last, group, moment)
        covered = np.zeros(int(moment.max()) + 2, dtype=np.int64)
        np.add.at(covered, first, 1)
        np.add.at(covered, last, -1)
        gaps = np.cumsum(covered)[: int(moment.max())] == 0  # whether a cut after this moment parts no group
        block = np.append(0, np.cumsum(gaps))[moment]
    return block


def _by_time(time: Array, groups: Array | None, quotas: dict[int, int]) -> Tiers:
    """Cut the rows in order of time, latest to test; groups that overlap in time stay together too."""
    block = blocks(time, groups)
    latest_first = int(block.max()) - block
    try:
        return _deal(np.bincount(latest_first), quotas, fill=True)[latest_first]
    except DataError as error:
        raise DataError(f"time cannot be cut into tiers: {error}") from error

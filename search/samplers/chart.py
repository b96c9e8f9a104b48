"""Chart of a space: its configurations as rows of numbers, and these as features of a kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from search.definition.space import Parameter, Space
from search.trial import Params, Value

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

_MANY = 256  # a range with more values than this counts as continuous until a value is taken from it
_FEW = 16  # values that a scan along one axis tries all
_STEPS = np.array([-0.25, -0.1, -0.04, -0.015, -0.005, 0.005, 0.015, 0.04, 0.1, 0.25])  # that it tries of others
_MIDDLE, _ABSENT = 0.5, 0.5  # where an inactive parameter stands, and how far from there to the side


class Axis:
    """Where a parameter's values lie: on [0, 1] along its scale, or at 0, 1, 2, … if they have no order.

    Attributes:
        levels: All places, ascending; None if there are too many.
    """

    def __init__(self, parameter: Parameter) -> None:
        domain = parameter.domain
        self.key, self._domain = parameter.key, domain
        # Two values are one step apart, whether ordered or not.
        self._unordered = bool(domain.values) and not domain.ordered and len(domain.values) > 2
        self.levels: Array | None = None
        if self._unordered:
            self.levels = np.arange(float(len(domain.values)))
        elif domain.count is not None and domain.count <= _MANY:
            self.levels = np.array([domain.unit(value) for value in domain.near(domain.value(0.0))])

    def place(self, value: Value | None) -> float:
        """Of a value; NaN if it is none of the domain's."""
        found = self._domain.match(value)
        if found is None:
            return math.nan
        return float(self._domain.values.index(found)) if self._unordered else self._domain.unit(found)

    def value(self, place: float) -> Value:
        """The value at a place."""
        return self._domain.values[int(place)] if self._unordered else self._domain.value(float(place))

    def snapped(self, units: Array) -> Array:
        """The places that [0, 1] is divided among: one for each unit, in the same shape."""
        if self.levels is None:
            return units
        if self._unordered:
            return np.asarray(self.levels[np.minimum((units * len(self.levels)).astype(int), len(self.levels) - 1)])
        return self.levels[np.searchsorted((self.levels[1:] + self.levels[:-1]) / 2, units)]

    def others(self, place: float) -> Array:
        """Places to move to, shape (moves,): all if they are few or unordered, else some near and some far."""
        if self.levels is not None and (self._unordered or len(self.levels) <= _FEW):
            return np.asarray(self.levels[self.levels != place])
        steps = np.asarray(np.clip(place + _STEPS, 0.0, 1.0))
        if self.levels is None:
            return steps
        here = int(np.searchsorted(self.levels, place - 1e-9))
        beside = self.levels[[n for n in (here - 2, here - 1, here + 1, here + 2) if 0 <= n < len(self.levels)]]
        return np.unique(np.concatenate([beside, self.snapped(steps)]))

    def features(self, places: Array) -> Array:
        """Columns in which equally different values are equally far apart.

        Unordered values are one-hot and at distance 1. An inactive one lies beside the middle of the active ones.

        Args:
            places: Shape (rows,); NaN where the parameter is inactive.

        Returns:
            Shape (rows, width).
        """
        if self._unordered:
            return np.asarray((places[:, None] == self.levels) / math.sqrt(2))
        absent = np.isnan(places)
        return np.stack([np.where(absent, _MIDDLE, places), np.where(absent, _ABSENT, 0.0)], axis=1)

    @property
    def width(self) -> int:
        """How many features there are."""
        return len(self._domain.values) if self._unordered else 2


class Chart:
    """Rows of places, shape (rows, axes).

    A full row has a place on every axis; ``masked`` makes it NaN where the configuration has no such parameter.

    Attributes:
        axes: Parameters that have more than one value.
        groups: By feature, the number of its axis.
    """

    def __init__(self, space: Space) -> None:
        self._space = space
        self.axes = [Axis(parameter) for parameter in space.declared if parameter.domain.count != 1]
        self._columns = {axis.key: number for number, axis in enumerate(self.axes)}
        widths = [axis.width for axis in self.axes]
        self.groups = np.repeat(np.arange(len(self.axes)), widths)
        self.first = np.cumsum([0, *widths])[:-1]
        self._questions = [(self._columns[key], bound) for key, bound in space.questions if key in self._columns]
        self._masks: dict[tuple[object, ...], Mask] = {}

    def rows(self, configurations: Sequence[Params]) -> Array:
        """Masked rows of what was tried, a row each: NaN also for a value that the space has outgrown."""
        placed = [[axis.place(params.get(axis.key)) for axis in self.axes] for params in configurations]
        return np.array(placed, dtype=float).reshape(len(configurations), len(self.axes))

    def params(self, row: Array) -> dict[str, Value]:
        """The configuration of one full row, shape (axes,), without what is inactive."""

        def choose(parameter: Parameter) -> Value:
            column = self._columns.get(parameter.key)
            return parameter.domain.value(0.0) if column is None else self.axes[column].value(row[column])

        return self._space.walk(choose)

    def masked(self, rows: Array) -> Array:
        """Full rows with NaN where an axis is inactive; one walk of the space for each kind of them."""
        out = rows.copy()
        answers = [self._answers(column, rows[:, column], bound) for column, bound in self._questions]
        members: dict[tuple[object, ...], list[int]] = {}
        for number, kind in enumerate(zip(*answers, strict=True) if answers else [()] * len(rows)):
            members.setdefault(kind, []).append(number)
        for kind, numbers in members.items():
            if kind not in self._masks:
                active = self.params(rows[numbers[0]])
                self._masks[kind] = np.array([axis.key not in active for axis in self.axes])
            out[np.array(numbers)[:, None], np.flatnonzero(self._masks[kind])] = math.nan
        return out

    def _answers(self, column: int, places: Array, bound: float | None) -> list[object]:
        values = [self.axes[column].value(place) for place in places]
        return [v if bound is None or isinstance(v, str | bool) else v <= bound for v in values]

    def features(self, placed: Array) -> Array:
        """Of masked rows, for the kernel; shape (rows, features)."""
        return np.concatenate([axis.features(placed[:, n]) for n, axis in enumerate(self.axes)], axis=1)

    def spread(self, count: int, seed: int) -> Array:
        """Full rows of a scrambled Sobol sequence; ``count`` a power of 2."""
        units = stats.qmc.Sobol(len(self.axes), rng=np.random.default_rng(seed)).random(count)
        return np.stack([axis.snapped(units[:, n]) for n, axis in enumerate(self.axes)], axis=1)

    def moves(self, row: Array) -> Array:
        """Full rows that differ from this one, shape (axes,), along one active axis; itself comes first."""
        active = ~np.isnan(self.masked(row[None])[0])
        out = [row[None]]
        for column in np.flatnonzero(active):
            places = self.axes[column].others(row[column])
            moved = np.repeat(row[None], len(places), axis=0)
            moved[:, column] = places
            out.append(moved)
        return np.concatenate(out)


def marks(placed: Array) -> list[bytes]:
    """Equal exactly for masked rows of the same configuration."""
    return [row.tobytes() for row in np.round(placed, 9)]

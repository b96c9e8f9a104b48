"""Domain: the values one parameter can take, and the scale on which they are equally likely.

The meaning is KerasTuner's (``Int`` includes its maximum, the step of a log scale multiplies), with one
repair: the last step is not lost to rounding (``Float(0, 1, step=0.1)`` has 1.0, and 0.3 is 0.3).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

from search.trial import Value

KINDS = ("int", "float", "choice", "boolean", "fixed")
SAMPLINGS = ("linear", "log", "reverse_log")

_SLACK = 1e-8  # KerasTuner's own tolerance when it counts steps
_DIGITS = ".14g"  # 3e-4 * 10 is 0.0029999999999999996; nobody means that


@dataclass(frozen=True)
class Domain:
    """What a parameter's values may be.

    Attributes:
        kind: One of ``KINDS``.
        low: Smallest value of an int or float, included; high: the largest that is allowed, included when the
            steps reach it.
        step: Distance of neighbours, or on a log scale their ratio; None for every value in between.
        sampling: One of ``SAMPLINGS``: the scale of an int or float.
        values: All values of a choice, boolean or fixed parameter, without repeats.
        ordered: Whether neighbours in ``values`` resemble each other.
        default: The baseline's value; the first one if not given.

    Raises:
        ValueError: If there is no such domain, or the default is not one of its values.
    """

    kind: str
    low: int | float | None = None
    high: int | float | None = None
    step: int | float | None = None
    sampling: str = "linear"
    values: tuple[Value, ...] = ()
    ordered: bool = False
    default: Value | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"the kind of a domain must be one of {KINDS}, but got {self.kind!r}")
        if self.kind in ("int", "float"):
            self._check_range()
        else:
            self._check_values()
        object.__setattr__(self, "default", self._checked_default())

    def _check_range(self) -> None:
        number = int if self.kind == "int" else float
        for name in ("low", "high", "step"):
            raw = getattr(self, name)
            if raw is not None:
                if not math.isfinite(raw):
                    raise ValueError(f"{name} must be finite, but got {raw}")
                object.__setattr__(self, name, number(raw))
        low, high = self._bounds
        if self.sampling not in SAMPLINGS:
            raise ValueError(f"sampling must be one of {SAMPLINGS}, but got {self.sampling!r}")
        if not low <= high or not math.isfinite(high - low):
            raise ValueError(f"low <= high with a finite distance must hold, but got {low} and {high}")
        if self.sampling != "linear" and low <= 0:
            raise ValueError(f"a {self.sampling} scale needs low > 0, but got {low}")
        if self.kind == "int" and self.sampling == "linear" and self.step is None:
            object.__setattr__(self, "step", 1)
        least = 0 if self.sampling == "linear" else 1
        if self.step is not None and self.step <= least:
            raise ValueError(f"a step must be above {least} on a {self.sampling} scale, but got {self.step}")

    def _check_values(self) -> None:
        values = (False, True) if self.kind == "boolean" else tuple(dict.fromkeys(self.values))
        if not values or (self.kind == "fixed" and len(values) != 1):
            raise ValueError(f"a {self.kind} parameter needs a value to take, but got {self.values}")
        for value in values:
            if not isinstance(value, bool | int | float | str):
                raise ValueError(f"a value must be a bool, int, float or str, but got {value!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"a value must be finite, but got {value}")
        object.__setattr__(self, "values", values)

    def _checked_default(self) -> Value:
        given = self.default
        if given is None:
            return self._at(0)
        if self.is_numeric and not isinstance(given, str) and math.isfinite(given):
            low, high = self._bounds
            if self.kind == "int" and given == int(given):
                given = int(given)
            elif self.kind == "float" and self.step is not None and low <= given <= high:
                # 3 * 0.1 is meant to be the step at 0.3.
                step = self._at(self._nearest(given))
                given = step if math.isclose(given, float(step), rel_tol=1e-9) else given
        found = self.match(given)
        if found is None:
            raise ValueError(f"the default must be one of {self}, but is {given!r}")
        return found

    def __str__(self) -> str:
        if not self.is_numeric:
            return "{" + ", ".join(map(repr, self.values)) + "}"
        times = "" if self._linear else "×"
        step = "" if self.step is None or self.step == 1 else f" in steps of {times}{self.step}"
        scale = "" if self._linear else f" on a {self.sampling} scale"
        return f"{self.kind} {self.low}..{self.high}{step}{scale}"

    @property
    def is_numeric(self) -> bool:
        """Whether it is an int or a float range."""
        return self.kind in ("int", "float")

    @property
    def _linear(self) -> bool:
        return self.sampling == "linear"

    @property
    def _bounds(self) -> tuple[int | float, int | float]:
        if self.low is None or self.high is None:
            raise ValueError(f"a domain of kind {self.kind!r} needs low and high")
        return self.low, self.high

    @cached_property
    def _exact(self) -> tuple[Fraction, Fraction]:
        """Low end and step as the decimals that were written, not as their nearest binary numbers."""
        return Fraction(str(self.low)), Fraction(str(self.step))

    @cached_property
    def _units(self) -> dict[tuple[type, Value], float]:
        return {}  # samplers place the whole history anew for every proposal

    @cached_property
    def count(self) -> int | None:
        """How many distinct values there are; None for a continuous range."""
        if self.values:
            return len(self.values)
        low, high = self._bounds
        if low == high:
            return 1
        if self.step is None:
            return int(high) - int(low) + 1 if self.kind == "int" else None
        if self._linear:
            start, stride = self._exact
            steps = (Fraction(str(high)) - start) / stride
            return int(steps if self.kind == "int" else steps + Fraction(_SLACK)) + 1
        return int(math.log(high / low) / math.log(self.step) + _SLACK) + 1

    def _at(self, index: int) -> Value:
        """The value at ``index`` of a discrete domain, ascending; the lowest of a continuous one at 0."""
        if self.values:
            return self.values[index]
        low, high = self._bounds
        if self.step is None:
            return low + index
        top = (self.count or 1) - 1
        if self._linear:
            if self.kind == "int":
                return low + index * self.step
            start, stride = self._exact
            value = float(start + index * stride)
        else:
            power = low * self.step ** (index if self.sampling == "log" else top - index)
            value = power if self.sampling == "log" else high + low - power
        if self.kind == "int":
            return int(value)
        for end, at in ((low, 0), (high, top)):
            if index == at and math.isclose(value, end, rel_tol=1e-7):
                return end
        return value if self._linear else float(format(value, _DIGITS))

    def _nearest(self, value: float) -> int:
        """Index of the step nearest to a number within the bounds."""
        low, high = self._bounds
        if self.step is None:
            place = value - low
        elif self._linear:
            place = (value - low) / self.step
        elif self.sampling == "log":
            place = math.log(value / low) / math.log(self.step)
        else:
            place = (self.count or 1) - 1 - math.log((high + low - value) / low) / math.log(self.step)
        return min(max(round(place), 0), (self.count or 1) - 1)

    def _index(self, value: Value) -> int | None:
        """Where a discrete domain has this value, or None."""
        if self.values:
            return next((i for i, v in enumerate(self.values) if type(v) is type(value) and v == value), None)
        low, high = self._bounds
        if isinstance(value, str) or not low <= value <= high:
            return None
        if (
            isinstance(value, int)
            and self.kind == "int"
            and isinstance(self.step, int | None)
            and (self._linear or self.step is None)
        ):
            place, rest = divmod(value - int(low), self.step or 1)  # exact, however wide the range
            return None if rest else place
        index = self._nearest(value)
        return index if self._at(index) == value else None

    def match(self, value: object) -> Value | None:
        """The value of this domain that ``value`` is, as a native Python object; None if it is none of them.

        A whole number given for a float counts as that float; True never counts as 1.
        """
        if not isinstance(value, bool | int | float | str):
            return None
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if self.kind == "float" or (self.values and isinstance(self.values[0], float)):
            if isinstance(value, bool | str):
                return None
            try:
                value = float(value)
            except OverflowError:  # a whole number that no float is
                return None
        elif self.kind == "int" and type(value) is not int:
            return None
        if self.count is None:
            low, high = self._bounds
            return value if not isinstance(value, str) and low <= value <= high else None
        index = self._index(value)
        return None if index is None else self._at(index)

    def contains(self, value: object) -> bool:
        """Whether ``value`` is one of the values."""
        return self.match(value) is not None

    def unit(self, value: Value) -> float:
        """Where ``value`` lies in [0, 1] on the domain's scale: in the middle of a discrete value's share.

        Raises:
            ValueError: If it is not one of the values.
        """
        known = (type(value), value)
        if known not in self._units:
            self._units[known] = self._unit(value)
        return self._units[known]

    def _unit(self, value: Value) -> float:
        found = self.match(value)
        if found is None:
            raise ValueError(f"the value must be one of {self}, but is {value!r}")
        if self.count == 1:
            return 0.5
        if self.is_numeric and self.step is None and not isinstance(found, str):
            return self._place(found + 0.5 if self.kind == "int" else found)
        return ((self._index(found) or 0) + 0.5) / (self.count or 1)

    def value(self, unit: float) -> Value:
        """The value at ``unit`` in [0, 1]: 0 is exactly the first and 1 exactly the last one."""
        unit = min(max(unit, 0.0), 1.0)
        if self.count == 1:
            return self._at(0)
        if self.is_numeric and self.step is None:
            low, high = self._bounds
            if unit in (0.0, 1.0):
                return high if unit else low
            scaled = self._scaled(unit)
            return min(max(math.floor(scaled) if self.kind == "int" else scaled, low), high)
        count = self.count or 1
        return self._at(min(int(unit * count), count - 1))

    @property
    def _edges(self) -> tuple[float, float]:
        low, high = self._bounds
        return low, high + (self.kind == "int")  # an int owns [v, v + 1), so the last one needs its share too

    def _scaled(self, unit: float) -> float:
        low, high = self._edges
        if self._linear:
            return low * (1 - unit) + high * unit
        start, width = math.log(low), math.log(high) - math.log(low)
        if self.sampling == "log":
            return math.exp(start + width * unit)
        return high + low - math.exp(start + width * (1 - unit))

    def _place(self, value: float) -> float:
        low, high = self._edges
        if self._linear:
            place = (value - low) / (high - low)
        else:
            start, width = math.log(low), math.log(high) - math.log(low)
            if self.sampling == "log":
                place = (math.log(value) - start) / width
            else:
                place = 1 - (math.log(high + low - value) - start) / width
        return min(max(place, 0.0), 1.0)

    def sample(self, rng: random.Random) -> Value:
        """A draw from the prior: uniform on the domain's scale."""
        return self.value(rng.random())

    def near(self, value: Value) -> Iterator[Value]:
        """Every value once, ``value`` first and then outwards; without end if the range is continuous."""
        count = self.count
        if count is None:
            yield value
            # 1/2, 1/4, 3/4, 1/8, …: distinct, and evenly spread however many are taken.
            for level in range(1, 53):
                for odd in range(1, 2**level, 2):
                    found = self.value(odd / 2**level)
                    if found != value:
                        yield found
            return
        start = self._index(value) or 0
        yield self._at(start)
        for distance in range(1, max(start, count - 1 - start) + 1):
            for index in (start + distance, start - distance):
                if 0 <= index < count:
                    yield self._at(index)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that ``from_json`` turns back into an equal domain."""
        shape: dict[str, Any]
        if self.is_numeric:
            shape = {"low": self.low, "high": self.high, "step": self.step, "sampling": self.sampling}
        else:
            shape = {"values": list(self.values), "ordered": self.ordered}
        return {"kind": self.kind, **shape, "default": self.default}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Domain:
        """The domain that ``to_json`` wrote."""
        return cls(**{**raw, "values": tuple(raw.get("values", ()))})

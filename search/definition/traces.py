"""The trace tree: learns from recorded builds which parameter is asked for next.

A build is a deterministic program of the values it has been given, and asks for each parameter once. So the
parameter asked last says where in the program we are, and the next one is a function of the values so far.
For every such place the tree learns that function from all recorded builds that passed it, as a small
decision tree: consistent with what was seen, and right about the unseen wherever the evidence suffices.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from search.trial import Value

Asked = Mapping[int, Value | None]

_END = -1  # nothing more is asked for
_LATER = -2  # what follows the build: nothing, or parameters that only training asks for
_FEW = 16  # values that a parameter may have to be believed to decide a branch
_LEVELS = 3  # nested branches whose rejoining is foreseen


@dataclass(frozen=True)
class Trace:
    """What one build asked for.

    Attributes:
        asked: Numbers of parameters, in order, each once.
        values: What each one got; None where a condition did not hold.
        complete: Whether training was traced too; a trace of discovery's ends with the build and cannot
            tell whether more follows.
    """

    asked: tuple[int, ...]
    values: tuple[Value | None, ...]
    complete: bool

    def extends(self, other: Trace) -> bool:
        """Whether it is the same build traced further."""
        length = len(other.asked)
        return length < len(self.asked) and self.asked[:length] == other.asked and self.values[:length] == other.values

    def to_json(self) -> dict[str, Any]:
        """A JSON object that ``from_json`` turns back into an equal trace."""
        return {"asked": list(self.asked), "values": list(self.values), "complete": self.complete}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Trace:
        """The trace that ``to_json`` wrote."""
        return cls(tuple(raw["asked"]), tuple(raw["values"]), raw["complete"])


class TraceTree:
    """Predicts the order of asks.

    Args:
        traces: The evidence.
        sizes: By parameter number, how many values it has (infinity if continuous).
    """

    def __init__(self, traces: Sequence[Trace], sizes: Sequence[float]) -> None:
        self._sizes = sizes
        self._built = {number for trace in traces if not trace.complete for number in trace.asked}
        self._passing: dict[int | None, list[_Place]] = {}
        for trace in traces:
            for position in range(len(trace.asked) + 1):
                place = _Place(trace, position)
                self._passing.setdefault(place.asked_last(), []).append(place)
        self._decisions: dict[int | None, tuple[_Node, _Node | None]] = {}

    def next(self, asked: Asked) -> int | None:
        """Number of the parameter asked for after these (in order), or None at the end."""
        last = next(reversed(list(asked)), None)
        if last not in self._passing:
            return None
        build, later = self._decision(last)
        found = build.label(asked)
        if found == _LATER:
            found = _END if later is None else later.label(asked)
        # A mistaken prediction must not go round in circles: nothing is asked for twice.
        return None if found == _END or found in asked else found

    def questions(self) -> set[tuple[int, float | None]]:
        """All that decides what is asked for: number of a parameter, and the bound its values are parted at.

        Without a bound each value is a case of its own.
        """
        found: set[tuple[int, float | None]] = set()
        for last in self._passing:
            for node in self._decision(last):
                if node is not None:
                    found |= node.questions()
        return found

    def _decision(self, last: int | None) -> tuple[_Node, _Node | None]:
        if last not in self._decisions:
            self._decisions[last] = self._decide(self._evidence(last, _LEVELS))
        return self._decisions[last]

    def _evidence(self, last: int | None, levels: int) -> list[_Place]:
        """What is known of the place after ``last``: what was seen there, and where it was passed by.

        In ``if ask(a): ask(b)`` the builds with b go on as those without it do. They are taken to, whatever
        decides the rest, where one of each kind has been seen to go on alike.
        """
        out = list(self._passing[last])
        if levels:
            following = {place.following() for place in out}
            for before in dict.fromkeys(place.asked_last(1) for place in out if place.position):
                others = [p for p in self._evidence(before, levels - 1) if p.following() != last]
                if following & {place.following() for place in others}:
                    out += others
        return list(dict.fromkeys(out))

    def _decide(self, places: Sequence[_Place]) -> tuple[_Node, _Node | None]:
        """Where the build goes from here, and separately where a traced training goes.

        Two questions, because the traces of discovery know the answer to the first one only.
        """
        during: list[_Example] = []
        after: list[_Example] = []
        certain = len({place.following() for place in places}) == 1
        for place in places:
            known = {} if certain else place.known()
            number = place.following()
            during.append((known, number if number in self._built else _LATER))
            if number not in self._built and place.trace.complete:
                after.append((known, number))
        return self._learned(during), self._learned(after) if after else None

    def _learned(self, examples: Sequence[_Example]) -> _Node:
        labels = Counter(label for _, label in examples)
        common = max(labels, key=lambda label: (labels[label], label))
        if len(labels) == 1:
            return _Node(common)
        question = self._question(examples)
        if question is None:
            return _Node(common)  # equal values, different asks: the build depends on something else
        number, bound = question
        parts: dict[object, list[_Example]] = {}
        for known, label in examples:
            parts.setdefault(_bucket(known.get(number), bound), []).append((known, label))
        branches = {bucket: self._learned(part) for bucket, part in parts.items()}
        largest = max(parts, key=lambda bucket: len(parts[bucket]))
        return _Node(common, number, bound, branches, branches[largest])

    def _question(self, examples: Sequence[_Example]) -> tuple[int, float | None] | None:
        """The parameter, and where its values are parted, that best tells the labels apart.

        First a parameter none of whose values was seen with two unrelated labels: one with few values before
        one with many (programs branch on kinds and flags, hardly on widths), then the one asked last (the
        branch follows its condition). Failing that, the purest split.
        """
        best: tuple[tuple[bool, bool, float, float], int, float | None] | None = None
        order = {number: place for known, _ in examples for place, number in enumerate(known)}
        for number, place in order.items():
            wide = self._sizes[number] > _FEW
            exact = _tally(examples, number, None)
            for bound in _bounds(exact):
                buckets = _tally(examples, number, bound)
                if len(buckets) > 1:
                    mixed = not _separates(buckets if wide else exact)
                    impurity = _impurity(buckets)
                    first, second = (impurity, -place) if mixed else (-place, impurity)
                    rank = (mixed, wide, first, second)
                    if best is None or rank < best[0]:
                        best = (rank, number, bound)
        return None if best is None else best[1:]


@dataclass(frozen=True, eq=False)
class _Place:
    """A position in a trace: just before its ask of that number, or at its end."""

    trace: Trace
    position: int

    def asked_last(self, back: int = 0) -> int | None:
        at = self.position - 1 - back
        return self.trace.asked[at] if at >= 0 else None

    def following(self) -> int:
        return self.trace.asked[self.position] if self.position < len(self.trace.asked) else _END

    def known(self) -> dict[int, Value | None]:
        """The values that were known here."""
        pairs = zip(self.trace.asked, self.trace.values, strict=True)
        return dict(itertools.islice(pairs, self.position))


_Example = tuple[Asked, int]  # values that were known, and what followed


class _Node:
    """A question about one value, or an answer."""

    def __init__(
        self,
        answer: int,
        number: int | None = None,
        bound: float | None = None,
        branches: Mapping[object, _Node] | None = None,
        otherwise: _Node | None = None,
    ) -> None:
        self._answer, self._number, self._bound = answer, number, bound
        self._branches, self._otherwise = branches or {}, otherwise

    def questions(self) -> set[tuple[int, float | None]]:
        if self._number is None:
            return set()
        return {(self._number, self._bound)}.union(*(branch.questions() for branch in self._branches.values()))

    def label(self, asked: Asked) -> int:
        if self._number is None or self._otherwise is None:
            return self._answer
        branch = self._branches.get(_bucket(asked.get(self._number), self._bound), self._otherwise)
        return branch.label(asked)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _bounds(values: Iterable[object]) -> list[float | None]:
    """Where values can be parted: halfway between neighbouring numbers, or (None) each from each.

    Nothing is halfway to zero: ``if dropout > 0`` is what programs ask.
    """
    numbers = sorted(value for value in values if isinstance(value, int | float) and _is_number(value))
    if len(numbers) < 2:
        return [None]
    return [(low + high) / 2 if low else 0.0 for low, high in zip(numbers, numbers[1:], strict=False)]


def _bucket(value: Value | None, bound: float | None) -> object:
    """What a question tells apart: values, or below and above a bound (and not asked for at all)."""
    if bound is None or not isinstance(value, int | float) or isinstance(value, bool):
        return value
    return value <= bound


_Tally = dict[object, Counter[int]]


def _tally(examples: Iterable[_Example], number: int, bound: float | None) -> _Tally:
    buckets: _Tally = {}
    for known, label in examples:
        buckets.setdefault(_bucket(known.get(number), bound), Counter())[label] += 1
    return buckets


def _separates(buckets: _Tally) -> bool:
    """Whether the labels fall into two sets or more that share no bucket."""
    groups: list[set[int]] = []
    for labels in buckets.values():
        joined = set(labels).union(*(group for group in groups if group & labels.keys()))
        groups = [*(group for group in groups if not group & labels.keys()), joined]
    return len(groups) > 1


def _impurity(buckets: _Tally) -> float:
    """Gini impurity, weighted by examples: 0 when every bucket has one label."""
    sizes = [(sum(labels.values()), labels.values()) for labels in buckets.values()]
    return sum(size - sum(n * n for n in counts) / size for size, counts in sizes)

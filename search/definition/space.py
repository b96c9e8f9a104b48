"""Space: the parameters discovered so far, and which of them a configuration makes active."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any

from search.definition.domain import Domain
from search.definition.traces import Trace, TraceTree
from search.trial import Params, Value

__all__ = ["Ask", "Conditions", "Domain", "Parameter", "Signature", "Space"]

Ask = Mapping[str, Any]
Conditions = tuple[tuple[str, tuple[Value, ...]], ...]
Signature = tuple[tuple[str, Value], ...]

_TRACES = 200  # of each sort: far beyond what branches need, and learning from them stays in milliseconds
_SIGNATURES = 2_000  # that are remembered: they are large, and quickly worked out again


@dataclass(frozen=True)
class Parameter:
    """One declaration of a hyperparameter.

    Attributes:
        key: What it is called in a trial's params: its name, or "name~2", "name~3", … for further
            declarations of the same name under other conditions or with another domain.
        name: KerasTuner's name, scopes included.
        conditions: (parent's name, values) pairs that must all hold for it to be active.
        domain: Its values.
    """

    key: str
    name: str
    conditions: Conditions
    domain: Domain

    @cached_property
    def identity(self) -> str:
        """Name, conditions and domain as canonical JSON: equal exactly for the same declaration."""
        parts = [self.name, self.conditions, self.domain.to_json()]
        return json.dumps(parts, sort_keys=True, separators=(",", ":"))

    def draw(self, seed: int) -> Value:
        """A draw from the prior that depends on seed and identity only, not on what was drawn before."""
        return self.domain.sample(random.Random(f"{seed}/{self.identity}"))

    def is_active(self, values: Mapping[str, Value]) -> bool:
        """Whether its conditions hold, given values by name."""
        return all(name in values and values[name] in allowed for name, allowed in self.conditions)

    def to_json(self) -> dict[str, Any]:
        """Everything but the key, which follows from the order of declarations."""
        conditions = [[name, list(values)] for name, values in self.conditions]
        return {"name": self.name, "conditions": conditions, "domain": self.domain.to_json()}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], taken: AbstractSet[str] = frozenset()) -> Parameter:
        """The parameter of an ask (or of ``to_json``), under the first free key."""
        name, number = str(raw["name"]), 2
        key = name
        while key in taken:
            key, number = f"{name}~{number}", number + 1
        known = _read(json.dumps([name, raw["conditions"], raw["domain"]]))
        return known if key == name else dataclasses.replace(known, key=key)


@lru_cache(maxsize=10_000)  # every trial tells of the same ones again
def _read(text: str) -> Parameter:
    name, conditions, domain = json.loads(text)
    held = tuple((str(parent), tuple(values)) for parent, values in conditions)
    return Parameter(name, name, held, Domain.from_json(domain))


@dataclass(frozen=True)
class Space:
    """An immutable value: what is known of a define-by-run search space.

    Attributes:
        declared: Parameters in the order in which they were first asked for.
        traces: The recorded builds that tell which of them a configuration asks for.
    """

    declared: tuple[Parameter, ...] = ()
    traces: tuple[Trace, ...] = ()

    @classmethod
    def empty(cls) -> Space:
        """A space of which nothing is known."""
        return cls()

    @cached_property
    def parameters(self) -> Mapping[str, Parameter]:
        """Parameters by key, in order of first ask."""
        return MappingProxyType({parameter.key: parameter for parameter in self.declared})

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {parameter.identity: number for number, parameter in enumerate(self.declared)}

    @cached_property
    def _signatures(self) -> dict[frozenset[tuple[str, Value]], Signature]:
        return {}  # the same one is asked for a few times, as it is proposed and as it runs

    @cached_property
    def _last(self) -> list[tuple[Sequence[Ask], list[int | None]]]:
        return []  # see ``_placed``

    @cached_property
    def _is_full(self) -> bool:
        return sum(not trace.complete for trace in self.traces) >= _TRACES

    @cached_property
    def _tree(self) -> TraceTree:
        counts = (parameter.domain.count for parameter in self.declared)
        return TraceTree(self.traces, [math.inf if count is None else count for count in counts])

    def grown(self, asks: Sequence[Ask], complete: bool = True) -> Space:
        """The space after a build asked for these, in this order; itself if that teaches nothing.

        Args:
            asks: Of a build that returned; one that raised does not tell what it would have asked next.
            complete: False if training was not traced to its end, so that more might have followed.
        """
        declared, numbers = self.declared, self._numbers
        asked: dict[int, Value | None] = {}
        for ask, place in zip(asks, self._placed(asks), strict=True):
            if place is None:
                parameter = Parameter.from_json(ask, {known.key for known in declared})
                if parameter.identity not in numbers:
                    numbers = {**numbers, parameter.identity: len(declared)}
                    declared = (*declared, parameter)
                place = numbers[parameter.identity]
            asked.setdefault(place, ask["value"])
        trace = Trace(tuple(asked), tuple(asked.values()), complete)
        if len(declared) == len(self.declared) and not self._is_news(trace):
            return self
        kept = [old for old in self.traces if not (old.complete and trace.extends(old))]
        same = [old for old in kept if old.complete == complete]
        if len(same) >= _TRACES:
            kept.remove(same[0])
        return Space(declared, (*kept, trace))

    def succeeded_by(self, other: Space) -> Space:
        """The space of a changed module: what ``other`` builds, with our parameters still known by their keys.

        So configurations recorded before keep their meaning, and no new one asks for what is gone.
        """
        declared = list(self.declared)
        numbers = dict(self._numbers)
        for parameter in other.declared:
            if parameter.identity not in numbers:
                numbers[parameter.identity] = len(declared)
                declared.append(Parameter.from_json(parameter.to_json(), {known.key for known in declared}))
        places = [numbers[parameter.identity] for parameter in other.declared]
        traces = (
            dataclasses.replace(trace, asked=tuple(places[number] for number in trace.asked)) for trace in other.traces
        )
        return Space(tuple(declared), tuple(traces))

    def _is_news(self, trace: Trace) -> bool:
        if not trace.complete:
            # All of discovery is kept: what changing a value did *not* do is evidence too.
            return not self._is_full and trace not in self.traces
        if any(old.extends(trace) for old in self.traces if old.complete):
            return False
        given = dict(zip(trace.asked, trace.values, strict=True))
        asked: dict[int, Value | None] = {}
        while (number := self._tree.next(asked)) is not None:
            asked[number] = given.get(number)
        return tuple(asked) != trace.asked

    def params_of(self, asks: Sequence[Ask]) -> dict[str, Value]:
        """Key to value of what was asked for and active.

        Raises:
            KeyError: If the space has not grown by these asks.
        """
        params: dict[str, Value] = {}
        for ask, place in zip(asks, self._placed(asks), strict=True):
            if ask["value"] is not None:
                if place is None:
                    raise KeyError(ask["name"])
                params[self.declared[place].key] = ask["value"]
        return params

    def _placed(self, asks: Sequence[Ask]) -> list[int | None]:
        """The number of the parameter of each ask; None for one that is new."""
        # The same asks come several times on end: to be checked, to grow the space, and for the trial's parameters.
        if not self._last or self._last[0][0] is not asks or len(self._last[0][1]) != len(asks):
            found = [self._numbers.get(Parameter.from_json(ask).identity) for ask in asks]
            self._last[:] = [(asks, found)]
        return self._last[0][1]

    def _advance(self, asked: dict[int, Value | None]) -> int | None:
        """Number of the next active parameter; passes over inactive ones, noting them in ``asked``."""
        values = {self.declared[n].name: value for n, value in asked.items() if value is not None}
        while (number := self._tree.next(asked)) is not None:
            if self.declared[number].is_active(values):
                return number
            asked[number] = None
        return None

    def _keyed(self, asked: Mapping[int, Value | None]) -> dict[str, Value]:
        return {self.declared[n].key: value for n, value in asked.items() if value is not None}

    def walk(self, choose: Callable[[Parameter], Value]) -> dict[str, Value]:
        """A configuration, made by choosing a value for each parameter as a build would ask for it."""
        asked: dict[int, Value | None] = {}
        while (number := self._advance(asked)) is not None:
            asked[number] = choose(self.declared[number])
        return self._keyed(asked)

    def active(self, params: Params) -> tuple[str, ...]:
        """Keys of what a build with these values would ask for, in order.

        ``params`` may have too many values, or too few: a default stands in for a missing or invalid one.
        """

        def value(parameter: Parameter) -> Value:
            given = parameter.domain.match(params.get(parameter.key))
            return _default(parameter) if given is None else given

        return tuple(self.walk(value))

    @cached_property
    def questions(self) -> tuple[tuple[str, float | None], ...]:
        """All that ``active`` depends on: keys, and the bound at which a key's values are parted, if there is one.

        Configurations that answer these alike have the same active parameters.
        """
        parents = {name for parameter in self.declared for name, _ in parameter.conditions}
        found = {(n, None) for n, parameter in enumerate(self.declared) if parameter.name in parents}
        asked = sorted(found | self._tree.questions(), key=repr)
        return tuple((self.declared[number].key, bound) for number, bound in asked)

    def restricted(self, params: Params) -> dict[str, Value]:
        """Only the active ones, in the order they are asked for."""
        return {key: params[key] for key in self.active(params) if key in params}

    def signature(self, params: Params) -> Signature:
        """Hashable and equal for configurations that build the same model."""
        given = frozenset(params.items())
        if given not in self._signatures:
            if len(self._signatures) == _SIGNATURES:
                self._signatures.clear()
            self._signatures[given] = tuple(sorted(self.restricted(params).items()))
        return self._signatures[given]

    @cached_property
    def always(self) -> tuple[Parameter, ...]:
        """Parameters that every recorded build gave a value, in order of first ask."""
        given = [
            ({n for n, value in zip(trace.asked, trace.values, strict=True) if value is not None}, trace.complete)
            for trace in self.traces
        ]
        built = {number for asked, complete in given if not complete for number in asked}
        # A trace that ends with the build says nothing about what training asks for.
        kept = (
            number
            for number in range(len(self.declared))
            if all(number in asked or not (complete or number in built) for asked, complete in given)
        )
        return tuple(self.declared[number] for number in kept)

    def sample(self, rng: random.Random) -> dict[str, Value]:
        """A configuration from the prior: active parameters only."""
        return self.walk(lambda parameter: parameter.domain.sample(rng))

    def defaults(self) -> dict[str, Value]:
        """The baseline's configuration."""
        return self.walk(_default)

    def leaves(self) -> Iterator[dict[str, Value]]:
        """Every configuration of a finite space, lazily, the defaults first.

        Raises:
            ValueError: While iterating, at the first continuous parameter.
        """
        return self._configurations({}, {}, finite=True)

    def unseen(self, seen: Container[Signature], like: Params | None = None) -> dict[str, Value] | None:
        """A configuration whose signature is not in ``seen``, near to ``like``; None if all are."""
        for params in self._configurations({}, like or {}, finite=False):
            if self.signature(params) not in seen:
                return params
        return None

    def _configurations(
        self, asked: Mapping[int, Value | None], like: Params, finite: bool
    ) -> Iterator[dict[str, Value]]:
        so_far = dict(asked)
        number = self._advance(so_far)
        if number is None:
            yield self._keyed(so_far)
            return
        parameter = self.declared[number]
        if finite and parameter.domain.count is None:
            raise ValueError(f"a space to list must be finite, but {parameter.key!r} is {parameter.domain}")
        first = parameter.domain.match(like.get(parameter.key))
        for value in parameter.domain.near(_default(parameter) if first is None else first):
            yield from self._configurations({**so_far, number: value}, like, finite)

    def proposal(self, params: Params) -> dict[str, Value]:
        """Identity to value: what a trial process is handed."""
        known = self.parameters
        return {known[key].identity: value for key, value in params.items() if key in known}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the parameters, traces left out."""
        raw = json.dumps([parameter.to_json() for parameter in self.declared], sort_keys=True)
        return hashlib.sha256(raw.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """A JSON object that ``from_json`` turns back into an equal space."""
        return {
            "parameters": [parameter.to_json() for parameter in self.declared],
            "traces": [trace.to_json() for trace in self.traces],
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Space:
        """The space that ``to_json`` wrote."""
        declared: list[Parameter] = []
        for item in raw["parameters"]:
            declared.append(Parameter.from_json(item, {known.key for known in declared}))
        return cls(tuple(declared), tuple(map(Trace.from_json, raw["traces"])))


def _default(parameter: Parameter) -> Value:
    default = parameter.domain.default
    return parameter.domain.value(0.0) if default is None else default

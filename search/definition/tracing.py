"""Tracing: the ``hp`` that a space's code is handed, which records every ask and checks every value it gives.

KerasTuner's own object returns whatever was filled in beforehand: 9999 for ``Int(32, 256)``, another value
for a ``Fixed``, the width that belongs to the other branch. This one starts empty, keeps the proposal aside,
and installs a value only where a declaration asks for it and allows it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras_tuner
from keras_tuner.engine import hyperparameters as kt

from search.definition.space import Ask, Domain, Parameter, Space
from search.errors import SpaceError
from search.trial import Value

_SEARCH = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_NOT_THE_USERS = (
    _SEARCH + os.sep,
    os.path.dirname(os.path.abspath(str(keras_tuner.__file__))) + os.sep,
    str(contextlib.__file__),  # around every conditional_scope
)
_MANY = 16  # a range with more values than this is discovered at five places only


class DeclarationTypeError(SpaceError, TypeError):
    """A declaration that KerasTuner refuses with a TypeError, such as a ``Choice`` that mixes types."""


class DeclarationValueError(SpaceError, ValueError):
    """A declaration that KerasTuner refuses with a ValueError, or that has an impossible default."""


def _users_line() -> str:
    """File and line of the innermost call that is neither ours nor KerasTuner's."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _declares(method: Callable[..., Any]) -> Callable[..., Any]:
    """KerasTuner's method, with refusals that name the line to change."""

    @functools.wraps(method)
    def declare(self: TracingHyperParameters, name: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, name, *args, **kwargs)
        except SpaceError:
            raise
        except (TypeError, ValueError) as error:
            kind = DeclarationTypeError if isinstance(error, TypeError) else DeclarationValueError
            raise kind(f"hyperparameter {name!r}: {error}; change it at {_users_line()}") from error

    return declare


@dataclass(frozen=True)
class Scope:
    """One entry into a ``conditional_scope``.

    Attributes:
        line: File and line; text: as it is written; parent, values: its condition.
        known: What ``hp`` had given until then, by name.
    """

    line: str
    text: str
    parent: str
    values: tuple[Any, ...]
    known: Mapping[str, Any]

    @property
    def holds(self) -> bool:
        """Whether what is declared in it is active."""
        return self.known.get(self.parent) in self.values


def hiding(builds: Sequence[TracingHyperParameters]) -> list[str]:
    """Scopes that hide what they declare, one line each: those inside the very ``if`` that they stand for.

    Such a scope is entered only while its condition holds. It counts where a build that entered it has a twin that
    differs in nothing but the parent's value, and did not.
    """
    entered: dict[str, list[Scope]] = {}
    for scope in (scope for build in builds for scope in build.scopes):
        entered.setdefault(scope.line, []).append(scope)
    out = []
    for line, scopes in entered.items():
        first = scopes[0]
        others = [build for build in builds if all(scope.line != line for scope in build.scopes)]
        without = [build.values for build in others if first.parent in build.values]
        if all(scope.holds for scope in scopes) and any(
            values[first.parent] not in scope.values
            and all(values.get(name) == value for name, value in scope.known.items() if name != scope.parent)
            for scope in scopes
            for values in without
        ):
            out.append(
                f"{line}: {first.text} is inside the `if` that it stands for, so what it declares is hidden from "
                f"whoever builds with another {first.parent!r} alone, as KerasTuner does; put the `if` inside the "
                "scope, or leave the scope out, since a plain `if` is enough here"
            )
    return out


def domain_of(hyperparameter: Any) -> Domain:
    """The domain that one of KerasTuner's five classes describes.

    Raises:
        ValueError: If it has no values or an impossible default.
        TypeError: If it is of another class.
    """
    hp = hyperparameter
    if isinstance(hp, kt.Int | kt.Float):
        kind = "int" if isinstance(hp, kt.Int) else "float"
        # Not hp.default: that is min_value if none was given, which a reverse_log grid need not contain.
        return Domain(kind, hp.min_value, hp.max_value, hp.step, hp.sampling, default=_native(hp._default))
    if isinstance(hp, kt.Choice):
        values = tuple(_native(value) for value in hp.values)
        return Domain("choice", values=values, ordered=bool(hp.ordered), default=_native(hp.default))
    if isinstance(hp, kt.Boolean):
        return Domain("boolean", default=bool(hp.default))
    if isinstance(hp, kt.Fixed):
        return Domain("fixed", values=(_native(hp.value),))
    raise TypeError(f"it must be an Int, Float, Choice, Boolean or Fixed, but is a {type(hp).__name__}")


def _native(value: Any) -> Any:
    """A NumPy scalar as the Python value it stands for; anything else unchanged."""
    return value.item() if hasattr(value, "item") else value


class TracingHyperParameters(keras_tuner.HyperParameters):
    """KerasTuner's ``HyperParameters`` that hands out one proposal and logs what is asked for.

    Two declarations of one name under different conditions, or in different branches, are two parameters
    with values of their own; ``hp.values`` and ``hp.get(name)`` have the one that was asked for last.

    Args:
        proposal: Values by identity (``Space.proposal``); those that their declarations forbid are not used.
        seed: Seeds the draw from the prior for a parameter without a usable proposal. None counts as 0.
        default: Give the default instead of that draw. Trial 0 is made this way.
        named: Values by plain name, as a person writes them (``heldout try``).
    """

    def __init__(
        self,
        proposal: Mapping[str, Any] | None = None,
        seed: int | None = None,
        default: bool = False,
        named: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._proposal = dict(proposal or {})
        self._named = dict(named or {})
        self._seed = 0 if seed is None else seed
        self._use_default = default
        self._asks: dict[str, dict[str, Any]] = {}
        self.on_ask: Callable[[], None] = lambda: None  # called after each new value
        self._first: dict[tuple[str, Any], tuple[Parameter, str]] = {}
        self.scopes: list[Scope] = []

    @property
    def asks(self) -> list[Ask]:
        """What was asked for, in order, each declaration once; value None where conditions do not hold."""
        return [dict(ask) for ask in self._asks.values()]

    def conditional_scope(self, parent_name: str, parent_values: Any) -> contextlib.AbstractContextManager[None]:
        """KerasTuner's scope, with refusals that name the line to change, and a note of where it was entered.

        Raises:
            SpaceError: If there is no such parent yet, or none of the values can be its own.
        """
        line, name = _users_line(), self._get_name(parent_name)
        values = tuple(parent_values) if isinstance(parent_values, list | tuple) else (parent_values,)
        parents = [domain_of(parent) for parent in self._hps.get(name, [])]
        scope = f"conditional_scope({name!r}, {[_native(value) for value in values]!r})"
        if not parents:
            raise SpaceError(
                f"{line}: {scope} needs the hyperparameter {name!r}, but it has not been declared yet; declare it above"
            )
        if all(parent.match(_native(value)) is None for parent in parents for value in values):
            raise SpaceError(
                f"{line}: {scope} can never hold, since {name!r} is {' or '.join(map(str, parents))}, so what is "
                "declared in it would never be searched; correct the values"
            )
        self.scopes.append(Scope(line, scope, name, values, dict(self.values)))
        entered: contextlib.AbstractContextManager[None] = super().conditional_scope(parent_name, parent_values)
        return entered

    def explain(self, error: Exception) -> None:
        """Note on an error that speaks of None which parameter may be it: the last that was declared without being
        active."""
        if "None" not in str(error):
            return
        for name, conditions in reversed(self._first):
            parameter, line = self._first[name, conditions]
            if self._asks[parameter.identity]["value"] is None:
                parent, values = conditions[-1]
                error.add_note(
                    f"{name!r}, declared at {line}, is None while {parent!r} is not {' or '.join(map(repr, values))}, "
                    f"as its conditional_scope says; use it under an `if` on {parent!r} inside the scope"
                )
                return

    Choice = _declares(keras_tuner.HyperParameters.Choice)
    Int = _declares(keras_tuner.HyperParameters.Int)
    Float = _declares(keras_tuner.HyperParameters.Float)
    Boolean = _declares(keras_tuner.HyperParameters.Boolean)
    Fixed = _declares(keras_tuner.HyperParameters.Fixed)

    def _retrieve(self, hp: Any) -> Value | None:
        """Where all five declarations of KerasTuner arrive."""
        conditions = tuple((str(c.name), tuple(_native(v) for v in c.values)) for c in hp.conditions)
        parameter = Parameter(hp.name, hp.name, conditions, domain_of(hp))
        first, line = self._first.get((hp.name, conditions), (None, ""))
        if first is None:
            self._validate_name(hp.name)
            self._first[hp.name, conditions] = (parameter, _users_line())
            copied = hp.__class__.from_config(hp.get_config())  # its conditions are a list that changes later
            self._hps[hp.name].append(copied)
            self._space.append(copied)
            self._asks[parameter.identity] = {**parameter.to_json(), "value": None}
        elif first.identity != parameter.identity:
            raise SpaceError(
                f"hyperparameter {hp.name!r} must be declared the same way each time, but is {first.domain} "
                f"(default {first.domain.default!r}) at {line} and {parameter.domain} "
                f"(default {parameter.domain.default!r}) at {_users_line()}; rename one of them"
            )
        ask = self._asks[parameter.identity]
        if not self.is_active(hp):
            return None
        is_new = ask["value"] is None
        if is_new:
            ask["value"] = self._chosen(parameter)
        self.values[hp.name] = ask["value"]
        if is_new:
            self.on_ask()
        value: Value = ask["value"]
        return value

    def _register(self, hyperparameter: Any, overwrite: bool = False) -> Value | None:
        """``merge`` arrives here; a value that is there already came from the proposal, so it stays."""
        return self._retrieve(hyperparameter)

    def _chosen(self, parameter: Parameter) -> Value:
        given = self._proposal.get(parameter.identity, self._named.get(parameter.name))
        proposed = parameter.domain.match(given)
        if proposed is not None:
            return proposed
        default = parameter.domain.default
        return default if self._use_default and default is not None else parameter.draw(self._seed)


def discover(
    build: Callable[[Any], Any], seconds: float, say: Callable[[str], None] = lambda _: None
) -> tuple[dict[str, Any], bool]:
    """Find parameters before the first trial, by building with one value changed at a time.

    The defaults come first. A parameter seen for the first time is then varied in the build that revealed it,
    those with the fewest values first: kinds and flags decide what else is asked for more often than widths.

    Args:
        build: Called with an ``hp``; what it returns is dropped.
        seconds: No further build is started after this long.
        say: Is given one line for each scope that hides what it declares.

    Returns:
        The space as JSON, and whether everything planned was built in time.

    Raises:
        SpaceError: For a declaration that cannot be.
        Exception: Whatever ``build`` raises for the defaults. For other values it is a trial that would fail,
            which says nothing against the space.
    """
    deadline = time.monotonic() + seconds
    space = Space.empty()
    varied: set[str] = set()
    waiting: list[tuple[int, dict[str, Value]]] = [(0, {})]
    built: list[TracingHyperParameters] = []
    while waiting and not (varied and time.monotonic() >= deadline):
        waiting.sort(key=lambda item: item[0])  # stable: equals stay in the order they were found
        _, proposal = waiting.pop(0)
        hp = TracingHyperParameters(proposal, default=True)
        try:
            build(hp)
        except SpaceError:
            raise
        except Exception as error:
            if not proposal:
                hp.explain(error)
                raise
            continue
        built.append(hp)
        space = space.grown(hp.asks, complete=False)
        given = {identity: ask["value"] for identity, ask in hp._asks.items() if ask["value"] is not None}
        for identity, ask in hp._asks.items():
            if identity in given and identity not in varied:
                varied.add(identity)
                others = _others(Domain.from_json(ask["domain"]))
                waiting += [(len(others), {**given, identity: value}) for value in others]
    for line in hiding(built):
        say(line)
    return space.to_json(), not waiting


def _others(domain: Domain) -> list[Value]:
    """Values worth building: all but the default, or where there are many the ends and some between."""
    if domain.count is not None and domain.count <= _MANY:
        found = [domain.value((index + 0.5) / domain.count) for index in range(domain.count)]
    else:
        found = [domain.value(unit) for unit in (0.0, 0.25, 0.5, 0.75, 1.0)]
    return [value for value in dict.fromkeys(found) if value != domain.default]

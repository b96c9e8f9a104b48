"""For people who move over: Hyperopt's spaces and Optuna's trials, declared through ``hp``.

Neither has defaults, which the baseline is made of: the middle of a range stands in, and the first of several choices.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from search.errors import SpaceError

_T = TypeVar("_T")

_WIDE = 3  # standard deviations of a normal distribution to each side, beyond which there are no values here


class OptunaTrial:
    """What a ``build(trial)`` written for Optuna needs of its trial.

    ``suggest_float``, ``suggest_int`` and ``suggest_categorical`` declare parameters of this library's space. In a
    space module: ``def build(hp): return my_build(OptunaTrial(hp))``.

    Args:
        hp: What ``build(hp)``, ``fit(hp, ...)`` or ``callbacks(hp)`` was given.
    """

    def __init__(self, hp: Any) -> None:
        self._hp = hp
        self._params: dict[str, Any] = {}

    @property
    def params(self) -> dict[str, Any]:
        """What has been suggested so far, by name."""
        return dict(self._params)

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """A float from ``low`` to ``high``, on a logarithmic scale if asked for."""
        return self._kept(name, float(_ranged(self._hp.Float, name, float(low), float(high), step, log)))

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """A whole number from ``low`` to ``high``, both included."""
        return self._kept(name, int(_ranged(self._hp.Int, name, int(low), int(high), None if log else step, log)))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """One of the choices, which have no order."""
        return self._kept(name, choices[_place(self._hp, name, list(choices))])

    def report(self, value: float, step: int) -> None:
        """Nothing: every epoch of a trial is reported anyway."""

    def should_prune(self) -> bool:
        """False: ``--pruner`` stops a trial by itself."""
        return False

    def _kept(self, name: str, value: _T) -> _T:
        self._params[name] = value
        return value


def is_of_hyperopt(space: Any) -> bool:
    """Whether there is a parameter of Hyperopt in it; there is none where nobody has imported Hyperopt."""
    if "hyperopt" not in sys.modules:
        return False
    from hyperopt.pyll import as_apply, dfs

    return any(node.name == "hyperopt_param" for node in dfs(as_apply(space)))


def hyperopt_params(space: Any, hp: Any) -> Any:
    """The params that a ``build(params)`` written for Hyperopt is given, of a space made of ``hyperopt.hp``.

    Every distribution becomes a parameter of its label, and is asked for only where a choice leads to it. Normal
    distributions end three standard deviations from their mean and are even between; what a ``pchoice`` prefers is
    not heeded.

    Raises:
        SpaceError: For a distribution that is none of Hyperopt's.
    """
    from hyperopt.pyll import as_apply

    return _value(as_apply(space), hp)


def _value(node: Any, hp: Any) -> Any:
    from hyperopt.pyll.base import Literal, scope

    if isinstance(node, Literal):
        return node.obj
    if node.name == "hyperopt_param":
        label, distribution = node.pos_args
        return _declared(label.obj, distribution, hp)
    if node.name == "switch" and getattr(node.pos_args[0], "name", "") == "hyperopt_param":
        which, *options = node.pos_args
        label = which.pos_args[0].obj
        literal = [option.obj for option in options if isinstance(option, Literal)]
        known: list[Any] = literal if len(literal) == len(options) else list(range(len(options)))
        return _value(options[_place(hp, label, known)], hp)
    named = {name: _value(argument, hp) for name, argument in node.named_args}
    if node.name == "dict":
        return named
    given = [_value(argument, hp) for argument in node.pos_args]
    if node.name == "pos_args":
        return tuple(given)
    return scope._impls[node.name](*given, **named)


def _declared(label: str, distribution: Any, hp: Any) -> Any:
    """The parameter for one of Hyperopt's distributions, and its value as Hyperopt would give it."""
    kind = distribution.name.removeprefix("q")
    if kind not in _ARGUMENTS:
        raise SpaceError(
            f"hyperparameter {label!r} must be of a distribution of hyperopt.hp, but is of {distribution.name!r}"
        )
    arguments = dict(zip((*_ARGUMENTS[kind], "q"), distribution.pos_args, strict=False))
    found = {name: node.obj for name, node in (arguments | dict(distribution.named_args)).items()}
    step = found.get("q")
    if kind == "randint":
        low, high = (0, found["low"]) if found.get("high") is None else (found["low"], found["high"])
        return _ranged(hp.Int, label, int(low), int(high) - 1, 1, False)
    if kind == "uniformint":
        return _ranged(hp.Int, label, int(found["low"]), int(found["high"]), 1, False)
    if kind in ("normal", "lognormal"):
        middle, wide = float(found["mu"]), _WIDE * float(found["sigma"])
        found |= {"low": middle - wide, "high": middle + wide}
    low, high = float(found["low"]), float(found["high"])
    if kind in ("loguniform", "lognormal"):
        value = _ranged(hp.Float, label, math.exp(low), math.exp(high), None, True)
    elif step is not None and all(float(part).is_integer() for part in (low, high, step)):
        low, high = math.ceil(low / step) * step, math.floor(high / step) * step
        return float(_ranged(hp.Int, label, int(low), int(high), int(step), False))
    else:
        value = _ranged(hp.Float, label, low, high, None, False)
    return value if step is None else round(value / step) * step


_ARGUMENTS = {
    "uniform": ("low", "high"),
    "loguniform": ("low", "high"),
    "uniformint": ("low", "high"),
    "randint": ("low", "high"),
    "normal": ("mu", "sigma"),
    "lognormal": ("mu", "sigma"),
}


def _ranged(declare: Callable[..., Any], name: str, low: Any, high: Any, step: Any, log: bool) -> Any:
    """A numeric parameter whose default is the middle of its range."""
    if log:
        middle = math.sqrt(low * high) if low > 0 else low
        default = round(middle) if isinstance(low, int) else middle
        return declare(name, low, high, sampling="log", default=min(max(default, low), high))
    if step is None:
        return declare(name, low, high, default=(low + high) / 2)
    return declare(name, low, high, step=step, default=low + step * int((high - low) / step / 2))


def _place(hp: Any, name: str, choices: list[Any]) -> int:
    """Which of the choices is taken. Of several types, they are told apart by how they are written."""
    kinds = {type(choice) for choice in choices}
    plain = len(kinds) == 1 and kinds <= {str, int, float, bool}
    known = choices if plain else [str(choice) for choice in choices]
    if len(set(known)) < len(known):
        raise SpaceError(f"the choices of {name!r} must differ, but are {choices!r}; leave out what is there twice")
    return known.index(hp.Choice(name, known, ordered=False))

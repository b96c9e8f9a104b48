"""Backbones in discovery: made once however often a space is built, and without reading their weights again."""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras

_PLAIN = (str, int, float, bool, type(None), Path)
_LOADERS = (("keras.models", "load_model"), ("keras.saving", "load_model"))


class Memory:
    """What was made so far, by function and arguments.

    Attributes:
        used: How often something was handed out again.
    """

    def __init__(self) -> None:
        self.used = 0
        self._made: dict[str, tuple[Any, int]] = {}

    def clear(self) -> None:
        """Forget everything, so that it is made anew."""
        self._made.clear()

    def once(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, which makes a model for the same plain arguments once.

        A model that got or lost layers since is made anew: those who build on it must find it as it was.
        """

        @functools.wraps(function)
        def make(*args: Any, **kwargs: Any) -> Any:
            if not all(_is_plain(value) for value in (*args, *kwargs.values())):
                return function(*args, **kwargs)
            key = repr((function.__module__, function.__qualname__, args, sorted(kwargs.items())))
            known = self._made.get(key)
            if known is not None and _layers(known[0]) == known[1]:
                self.used += 1
                return known[0]
            found = function(*args, **kwargs)
            self._made[key] = found, _layers(found)
            return found

        return make


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(one) for one in value)
    return isinstance(value, _PLAIN)


def _layers(model: Any) -> int:
    return len(getattr(model, "layers", ()))


@contextlib.contextmanager
def made_once() -> Iterator[Memory]:
    """Let ``load_model`` and the models of ``keras.applications`` be made once each, and ``load_weights`` do nothing.

    For discovery alone, which drops what it builds: what is asked for depends on no weight. To be entered before the
    space module is executed, which may import these functions by name.
    """
    memory = Memory()
    homes = [(sys.modules[home], name) for home, name in _LOADERS]
    applications = [keras.applications, *_submodules(keras.applications)]
    homes += [(home, name) for home in applications for name, part in vars(home).items() if _makes_a_model(name, part)]
    before = [(home, name, getattr(home, name)) for home, name in homes]
    load_weights = keras.Model.load_weights
    try:
        for home, name, function in before:
            setattr(home, name, memory.once(function))
        keras.Model.load_weights = lambda self, *args, **kwargs: None
        yield memory
    finally:
        for home, name, function in before:
            setattr(home, name, function)
        keras.Model.load_weights = load_weights


def _submodules(package: types.ModuleType) -> list[types.ModuleType]:
    return [part for part in vars(package).values() if isinstance(part, types.ModuleType)]


def _makes_a_model(name: str, part: Any) -> bool:
    return isinstance(part, types.FunctionType) and name[:1].isupper()


def building(build: Callable[[Any], Any], memory: Memory) -> Callable[[Any], Any]:
    """``build`` for discovery: one that fails on what was handed out again is tried once more with all of it new."""

    def again(hp: Any) -> Any:
        used = memory.used
        try:
            return build(hp)
        except Exception:
            if memory.used == used:
                raise
            memory.clear()
            return build(hp)

    return again

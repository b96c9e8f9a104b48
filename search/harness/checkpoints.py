"""Checkpoints of a long trial: what a later attempt needs to go on as if it had never been interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras.src.backend.common import global_state
from keras.src.random import seed_generator

from search.definition.problem import first_line

NAME = "checkpoint.npz"
_FORMAT = 1
# Keras gives these to every callback anew.
_GIVEN = frozenset({"model", "_model", "params", "_params"})
_PLAIN = (type(None), bool, int, float, str)


def say(line: str) -> None:
    """One line for the trial's log."""
    sys.stderr.write(f"{line}\n")


def remove(folder: Path) -> None:
    """Remove a trial's checkpoint, and what a process that was killed while it wrote one has left."""
    with contextlib.suppress(OSError):
        for path in (folder / NAME, *_unfinished(folder)):
            path.unlink(missing_ok=True)


def _unfinished(folder: Path) -> list[Path]:
    return list(folder.glob(f".{Path(NAME).stem}-*.npz"))


class Checkpoints(keras.callbacks.Callback):
    """Saves at the end of an epoch when it is time, and continues from what an earlier attempt saved.

    It must be the last callback: it sees the others' new state at an epoch's end, and gives them their old one
    after they have reset themselves. What is kept: the model's variables, those of seed generators included, the
    optimizer's, plain values and arrays among the callbacks' attributes, and the states of Keras', NumPy's and
    Python's random numbers. Whatever happens to a checkpoint, the trial goes on.

    Args:
        folder: The trial's, which gets ``NAME``.
        minutes: Between two checkpoints, at least.
        callbacks: The others, in their order.
        identity: JSON that tells this training from any other; asked for when training begins.
        restored: Called after the callbacks have their state again.
        clock: In seconds.

    Attributes:
        epoch: Epochs that were finished before training began; 0 until it has begun.
    """

    def __init__(
        self,
        folder: Path,
        minutes: float,
        callbacks: Sequence[Any],
        identity: Callable[[], Any],
        restored: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self.epoch = 0
        self._folder, self._seconds, self._others = folder, 60.0 * minutes, list(callbacks)
        self._identity, self._restored, self._clock = identity, restored, clock
        self._known: Any = None
        self._begun = 0
        self._last = 0.0

    def on_train_begin(self, logs: Any = None) -> None:
        """Continue from a checkpoint, if there is one that fits."""
        self._begun += 1
        if self._begun > 1:
            self.epoch = 0
            if self._begun == 2:
                remove(self._folder)
                say("no checkpoints from here on: this trial trains more than once with the callbacks it was given")
            return
        for left in _unfinished(self._folder):
            with contextlib.suppress(OSError):
                left.unlink()
        self._known = [_FORMAT, self._identity(), keras.backend.backend(), _kinds(self.model)]
        if (self._folder / NAME).exists():
            try:
                self.epoch = self._continue(*_read(self._folder / NAME))
            except Exception as error:  # torn, or of another training: there is nothing that it could not be
                remove(self._folder)
                say(f"the checkpoint is not used, and training starts from zero: {_told(error)}")
            else:
                # Keras' own way to begin later, of which it asks after this: no matter who calls `fit`, and how.
                self.model._initial_epoch = self.epoch
                self._restored()
                say(f"continued from the checkpoint after epoch {self.epoch}")
        self._last = self._clock()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Let no later ``fit`` of this model start where this one did."""
        self.model._initial_epoch = None

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Save, when it is time."""
        # Training that is about to stop must not be continued, and nothing says so to a later attempt.
        if self._begun > 1 or self.model.stop_training or self._clock() - self._last < self._seconds:
            return
        try:
            self._save(epoch + 1)
        except Exception as error:  # a full disk, above all; or a state of a kind that cannot be kept
            say(f"no checkpoint after epoch {epoch + 1}: {_told(error)}; the trial goes on without")
        self._last = self._clock()

    def on_train_end(self, logs: Any = None) -> None:
        """As at an epoch's beginning, which there was none of after the last epoch's checkpoint."""
        self.model._initial_epoch = None

    def _save(self, epoch: int) -> None:
        arrays: dict[str, np.ndarray] = {}
        meta = {
            "known": self._known,
            "epoch": epoch,
            "build": _kept(self.model.get_build_config(), arrays),
            "unseeded": _unseeded() is not None,
            "variables": [_packed(_array(variable), arrays) for variable in _variables(self.model)],
            "callbacks": [[_name(callback), _state(callback, arrays)] for callback in self._others],
            "random": _packed([random.getstate(), np.random.get_state()], arrays),
        }
        arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
        temporary = self._folder / f".{Path(NAME).stem}-{os.getpid()}.npz"
        try:
            with temporary.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]  # one of its keywords is no array
            os.replace(temporary, self._folder / NAME)
        finally:
            temporary.unlink(missing_ok=True)

    def _continue(self, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> int:
        """Put everything in place, once it is known to fit; the number of epochs that were finished."""
        if meta["known"] != json.loads(json.dumps(self._known)):
            raise ValueError("it is of another module, other parameters, another seed, optimizer or number of epochs")
        if [name for name, _ in meta["callbacks"]] != [_name(callback) for callback in self._others]:
            raise ValueError("it has other callbacks")
        states = [_unpacked(state, arrays) for _, state in meta["callbacks"]]
        values = [_unpacked(value, arrays) for value in meta["variables"]]
        pythons, numpys = _unpacked(meta["random"], arrays)
        if not self.model.built:  # as one without an Input is until it sees rows
            self.model.build_from_config(_unpacked(meta["build"], arrays))
        if self.model.optimizer is not None and not self.model.optimizer.built:
            self.model.optimizer.build(self.model.trainable_variables)
        variables = _variables(self.model, meta["unseeded"])
        if [value.shape for value in values] != [tuple(variable.shape) for variable in variables]:
            raise ValueError("its variables are not those of this model and its optimizer")
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
        for callback, state in zip(self._others, states, strict=True):
            for name, value in state.items():
                setattr(callback, name, value)
        random.setstate(pythons)
        np.random.set_state(numpys)
        return int(meta["epoch"])


def _told(error: Exception) -> str:
    return f"{first_line(error)} ({type(error).__name__})"


def _name(callback: Any) -> str:
    return f"{type(callback).__module__}.{type(callback).__qualname__}"


def _optimizers(model: keras.Model) -> list[Any]:
    """The model's optimizer, and those that a training step of its own has beside it."""
    found = [getattr(model, "optimizer", None), *vars(model).values()]
    return list({id(one): one for one in found if isinstance(one, keras.optimizers.Optimizer)}.values())


def _kinds(model: keras.Model) -> list[str]:
    return [type(model).__name__, *(type(one).__name__ for one in _optimizers(model))]


def _variables(model: keras.Model, unseeded: bool = False) -> list[Any]:
    """Everything that training changes, in an order that is the same in every process.

    Args:
        unseeded: Make the generator behind random numbers without a seed, if nobody has asked for any yet.
    """
    found = [*model.variables, *(variable for one in _optimizers(model) for variable in one.variables)]
    generator = seed_generator.global_seed_generator() if unseeded else _unseeded()
    return found if generator is None else [*found, generator.state]


def _unseeded() -> Any:
    """The generator that ``keras.random`` uses where no seed is given; None while nobody has asked for any."""
    return global_state.get_global_attribute(seed_generator.GLOBAL_SEED_GENERATOR)


def _array(variable: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(variable))


def _state(callback: Any, arrays: dict[str, np.ndarray]) -> Any:
    """The attributes that can be kept; functions, models, open files and the like stay what they are."""
    kept: dict[str, Any] = {}
    for name, value in vars(callback).items():
        # Keras turns the sign of this one when it first looks at the direction, in every process anew.
        if name in _GIVEN or (name == "min_delta" and hasattr(callback, "monitor_op")):
            continue
        if (packed := _kept(value, arrays)) is not None or value is None:
            kept[name] = packed
    return {"dict": [[name, value] for name, value in kept.items()]}


def _kept(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """As ``_packed``, but None for what cannot be kept."""
    mine: dict[str, np.ndarray] = {}
    try:
        packed = _packed(value, mine, len(arrays))
    except (TypeError, ValueError, RecursionError):
        return None
    arrays.update(mine)
    return packed


def _packed(value: Any, arrays: dict[str, np.ndarray], first: int = 0) -> Any:
    """JSON for a plain value, an array or a collection of such; arrays are put aside.

    Args:
        first: Number of the first array.

    Raises:
        TypeError: For anything else.
    """
    if type(value) in _PLAIN:
        return value
    if type(value) in (list, tuple):
        return {type(value).__name__: [_packed(part, arrays, first) for part in value]}
    if type(value) is dict and all(type(key) in _PLAIN for key in value):
        return {"dict": [[key, _packed(part, arrays, first)] for key, part in value.items()]}
    if not isinstance(value, np.ndarray | np.generic) or value.dtype.hasobject or value.dtype.names:
        raise TypeError(f"a {type(value).__name__} cannot be kept")
    name, odd = f"a{first + len(arrays)}", value.dtype.kind == "V"
    # NumPy would write bfloat16 and its like as bytes without a meaning.
    arrays[name] = np.asarray(value, dtype=np.float32 if odd else None)
    return {"array": [name, value.dtype.name if odd else None, isinstance(value, np.generic)]}


def _unpacked(packed: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """What ``_packed`` was given."""
    if not isinstance(packed, dict):
        return packed
    ((kind, parts),) = packed.items()
    if kind == "array":
        name, dtype, scalar = parts
        array = arrays[name] if dtype is None else arrays[name].astype(dtype)
        return array[()] if scalar else array
    if kind == "dict":
        return {key: _unpacked(part, arrays) for key, part in parts}
    return {"list": list, "tuple": tuple}[kind](_unpacked(part, arrays) for part in parts)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    # Opened here, because NumPy leaves one open that it cannot read.
    with path.open("rb") as whole, np.load(whole, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return json.loads(arrays.pop("meta").tobytes()), arrays

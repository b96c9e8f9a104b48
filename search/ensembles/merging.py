"""One Keras model out of several: the same inputs go to each of them, and their outputs are averaged by weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from search.ensembles.blending import SIGMOID, SOFTMAX, VALUES
from search.errors import RequestError
from search.scorer.declaration import ends
from search.scorer.metrics import EPSILON


def merged(members: Sequence[Mapping[str, Any]], written: Sequence[str]) -> keras.Model:
    """A model of Keras' own parts around its members, with the inputs and outputs of the first one.

    ``blending.average`` says what it computes.

    Args:
        members: Each has ``path`` (a ``.keras`` file, preprocessing included), ``trial``, ``weight`` (above 0; their
            sum is 1), and ``read`` (how each output is to be read).
        written: How each output of the merged model is to be read.

    Raises:
        RequestError: If the members do not take the same inputs and give outputs of the same structure.
    """
    loaded = [keras.models.load_model(one["path"], compile=False) for one in members]
    takes, gives = ends(loaded[0])  # type: ignore[misc]  # files of ours are functional models, see training.compose
    given = keras.tree.map_structure(_input, takes)
    said: list[list[Any]] = []
    names: list[str | None] = []
    for one, model in zip(members, loaded, strict=True):
        own = ends(model)
        if _shapes(own) != _shapes((takes, gives)):
            raise RequestError(
                f"the models of an ensemble must have inputs and outputs in common, but trial {one['trial']} has "
                f"{_shapes(own)} and trial {members[0]['trial']} has {_shapes((takes, gives))}"
            )
        # Under a name of its own, since members may be called alike.
        named = keras.Model(*own, name=f"trial_{one['trial']}")  # type: ignore[misc]
        said.append(_in_order(named(given)))
        names = names or _names(named, gives)
    weights = [float(one["weight"]) for one in members]
    averaged = []
    for at, (name, scale) in enumerate(zip(names, written, strict=True)):
        mean = _average([out[at] for out in said], weights, [one["read"][at] for one in members], scale)
        averaged.append(keras.layers.Identity(name=name, dtype="float32")(mean))
    out: Any = averaged[0]
    if isinstance(gives, dict):
        out = dict(zip(sorted(gives), averaged, strict=True))
    elif isinstance(gives, list | tuple):
        out = averaged
    return keras.Model(given, out, name="ensemble")


def _average(outputs: Sequence[Any], weights: Sequence[float], read: Sequence[str], written: str) -> Any:
    """The symbolic twin of ``blending.average``; in logarithms where logits are wanted, so that none is infinite."""
    if written == VALUES:
        shares = [
            keras.layers.Rescaling(weight, dtype="float32")(_probabilities(out, scale))
            for out, weight, scale in zip(outputs, weights, read, strict=True)
        ]
        return keras.layers.Add(dtype="float32")(shares) if len(shares) > 1 else shares[0]

    def log_mean(is_yes: bool) -> Any:
        logs = [
            _log_probabilities(out, scale, is_yes) + math.log(weight)
            for out, weight, scale in zip(outputs, weights, read, strict=True)
        ]
        return keras.ops.logsumexp(keras.ops.stack(logs, axis=-1), axis=-1)

    return log_mean(True) if written == SOFTMAX else log_mean(True) - log_mean(False)


def _probabilities(out: Any, scale: str) -> Any:
    return out if scale == VALUES else keras.layers.Activation(scale, dtype="float32")(out)


def _log_probabilities(out: Any, scale: str, is_yes: bool) -> Any:
    out = keras.ops.cast(out, "float32")
    if scale == SOFTMAX:
        return keras.ops.log_softmax(out, axis=-1)
    if scale == SIGMOID:
        return keras.ops.log_sigmoid(out if is_yes else -out)
    clipped = keras.ops.clip(out, EPSILON, 1 - EPSILON)
    return keras.ops.log(clipped if is_yes else 1 - clipped)


def _input(tensor: Any) -> Any:
    return keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=tensor.name)


def _in_order(out: Any) -> list[Any]:
    """As ``declaration.output_names`` has them."""
    if isinstance(out, dict):
        return [out[name] for name in sorted(out)]
    return list(out) if isinstance(out, list | tuple) else [out]


def _names(model: keras.Model, gives: Any) -> list[str | None]:
    """Of the layers that give the outputs, where each has its own; keys of a dict are names already."""
    names: list[str | None] = list(model.output_names)
    return [None] * len(names) if isinstance(gives, dict) or len(set(names)) < len(names) else names


def _shapes(known: Any) -> Any:
    """What two models must have alike: shapes of inputs and outputs in their structure, with its keys."""
    return keras.tree.map_structure(lambda tensor: tuple(tensor.shape), known)

"""Likely causes of a model that does not learn, read from its layers, its labels and what they compute.

A cause is a pair: what is wrong, and what to change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from search.scorer import declaration, scoring
from search.scorer.metrics import Array

Cause = tuple[str, str]

_CLASSES = frozenset({"categorical_crossentropy", "sparse_categorical_crossentropy"})
_PROBABILITIES = frozenset({"softmax", "sigmoid"})
_RANGES = {"softmax": (0.0, 1.0), "sigmoid": (0.0, 1.0), "tanh": (-1.0, 1.0), "relu": (0.0, np.inf)}
_SATURATING = frozenset({"sigmoid", "tanh", "hard_sigmoid"})
_MANY_SATURATING = 4
_LARGE = 20.0  # of features: beyond, first weights make outputs that are far from those of scaled inputs
_LOOK_UP = frozenset({"Embedding", "IntegerLookup", "CategoryEncoding", "Hashing", "Discretization"})
_PASSES_ON = frozenset({"Reshape", "Flatten", "Dropout", "Identity"})


def last_layers(model: keras.Model) -> list[str | None]:
    """The activation that each output ends in, such as "softmax" or "linear"; None where the model does not tell."""
    known = declaration.ends(model)
    if known is None:
        return [None] * len(declaration.output_names(model))
    return [_ends_in(tensor) for tensor in keras.tree.flatten(known[1])]


def _ends_in(tensor: Any) -> str | None:
    made_by: Any = getattr(getattr(tensor, "_keras_history", None), "operation", None)
    if isinstance(made_by, keras.Model):
        known = declaration.ends(made_by)
        inner = [] if known is None else keras.tree.flatten(known[1])
        return _ends_in(inner[0]) if len(inner) == 1 else None
    name = activation(made_by)
    if isinstance(made_by, keras.layers.Rescaling):
        return "linear" if _ends_in(made_by.input) == "linear" else None
    passes = type(made_by).__name__ in _PASSES_ON or (isinstance(made_by, keras.layers.Activation) and name == "linear")
    if passes and hasattr(made_by, "input") and not isinstance(made_by.input, list | dict):
        return _ends_in(made_by.input)
    return name


def activation(layer: Any) -> str | None:
    """The activation of a layer or operation, by name; None if it has none that is known."""
    kind = type(layer).__name__.lower()
    if kind in _RANGES:  # layers such as Softmax, and keras.ops
        return kind
    return getattr(getattr(layer, "activation", None), "__name__", None)


def of_outputs(
    outputs: Sequence[Mapping[str, Any]], ends: Sequence[str | None], labels: Sequence[Array]
) -> Cause | None:
    """Why a last layer does not go with its loss.

    Args:
        outputs: As declared; ends: from ``last_layers``.
        labels: Of train rows, one array for each output.
    """
    for output, end, y in zip(outputs, ends, labels, strict=True):
        kind = scoring.loss_kind(output)
        if end is None or kind is None:
            continue
        layer = f"the output {output['name']!r}" if len(outputs) > 1 else "the last layer"
        found = _of_output(layer, output, kind, end, y)
        if found is not None:
            return found
    return None


def _of_output(layer: str, output: Mapping[str, Any], kind: str, end: str, y: Array) -> Cause | None:
    wanted = "softmax" if kind in _CLASSES else "sigmoid"
    if kind in _CLASSES or kind == "binary_crossentropy":
        if output["from_logits"] and end in _PROBABILITIES:
            return (
                f"{layer} ends in {end}, and its loss, told from_logits=True, applies one more",
                f"leave out from_logits=True, or the activation {end}",
            )
        if not output["from_logits"] and end not in _PROBABILITIES and end not in ("hard_sigmoid", "log_softmax"):
            return (
                f"{layer} ends in {end}, but its loss takes it for probabilities",
                f"give it activation={wanted!r}, or the loss from_logits=True",
            )
        if kind == "binary_crossentropy" and end == "softmax" and (output.get("shape") or [None])[-1] == 1:
            return f"{layer} is the softmax of a single unit, which is always 1", "give it activation='sigmoid'"
        return None
    low, high = _RANGES.get(end, (-np.inf, np.inf))
    if y.min() < low or y.max() > high:
        return (
            f"{layer} ends in {end}, so it is never {'below 0' if end == 'relu' else f'outside {low:g} to {high:g}'}, "
            f"but its target goes from {float(y.min()):.4g} to {float(y.max()):.4g}",
            "leave out the activation of the last layer, or scale the target in load()",
        )
    return None


def frozen(model: keras.Model) -> Cause | None:
    """Layers that cannot learn."""
    total = sum(int(np.prod(v.shape)) for v in model.weights)
    can = sum(int(np.prod(v.shape)) for v in model.trainable_weights)
    if can == 0:
        return (
            "no weight of the model is trainable" if total else "the model has no weights",
            "set trainable=True on the layers that shall learn, before compile",
        )
    if can < 0.05 * total:
        return (
            f"only {can} of {total} weights are trainable",
            "let more layers learn (trainable=True before compile), if these few cannot do it",
        )
    return None


def dead(model: keras.Model, x: Any) -> Cause | None:
    """A layer whose units are zero on every row, so that no gradient goes through."""
    known = declaration.ends(model)
    made = [layer for layer in layers_of(model) if activation(layer) == "relu" and _is_of(layer, model)]
    if known is None or not made:
        return None
    outputs = keras.Model(known[0], [layer.output for layer in made])(x, training=False)
    for layer, values in zip(made, outputs if isinstance(outputs, list) else [outputs], strict=True):
        if not np.any(keras.ops.convert_to_numpy(values)):
            return (
                f"every unit of the layer {layer.name!r} is 0 on all of these rows (dead ReLUs), so nothing before it "
                "learns",
                "take a lower learning rate, kernel_initializer='he_normal', scaled inputs, or LeakyReLU",
            )
    return None


def _is_of(layer: Any, model: keras.Model) -> bool:
    """Whether the layer is called once, by the model itself: one of a model inside it has other inputs."""
    return any(layer is one for one in model.layers) and len(getattr(layer, "_inbound_nodes", ())) == 1


def vanishing(model: keras.Model) -> Cause | None:
    """Many layers of sigmoid or tanh with nothing that keeps their gradients up."""
    layers = list(layers_of(model))
    kinds = [name for layer in layers if (name := activation(layer)) in _SATURATING]
    if len(kinds) <= _MANY_SATURATING or any("Normalization" in type(layer).__name__ for layer in layers):
        return None
    return (
        f"{len(kinds)} layers of {kinds[0]} follow each other, and gradients vanish on the way through them",
        "take relu with kernel_initializer='he_normal', or BatchNormalization before each activation",
    )


def constant(predicted: Sequence[Array]) -> Cause | None:
    """Predictions that are the same for every row."""
    if all(np.allclose(part, part[:1], rtol=1e-4, atol=1e-6) for part in predicted):
        return (
            "the model predicts the same for every row, so what it is fed does not reach its output",
            "look for an activation or a layer that is stuck (softmax over one unit, dead ReLUs, constant features)",
        )
    return None


def penalised(model: keras.Model, chance: float) -> Cause | None:
    """Penalties on weights that outweigh the loss."""
    penalty = float(sum(float(keras.ops.sum(one)) for one in model.losses))
    if penalty > 0.5 * chance:
        return (
            f"penalties on weights and activations add {penalty:.4g} to the loss, of {chance:.4g} by chance",
            "take a smaller factor of kernel_regularizer or activity_regularizer",
        )
    return None


def small(model: keras.Model, rows: int) -> Cause | None:
    """Fewer weights than it takes to tell the rows apart."""
    count = sum(int(np.prod(v.shape)) for v in model.trainable_weights)
    hidden = [layer for layer in layers_of(model) if layer.trainable_weights]
    if count < 4 * rows or len(hidden) <= 1:
        return (
            f"the default model has {count} weights in {len(hidden)} layer{'' if len(hidden) == 1 else 's'}, which "
            f"need not be enough to memorise {rows} rows",
            "if it is meant to be so small, nothing is wrong; otherwise give it a hidden layer, or more units",
        )
    return None


def offset(labels: Sequence[Array], kinds: Sequence[str | None]) -> Cause | None:
    """A target whose mean is far from 0, or whose scale is far from 1, where a fresh model's outputs are.

    Args:
        labels: Per output an array (rows, ...); kinds: its loss, None where that is the module's own.
    """
    for y, kind in zip(labels, kinds, strict=True):
        if kind is None or "crossentropy" in kind or "hinge" in kind:
            continue
        mean, std = float(y.mean()), float(y.std())
        if abs(mean) > std or not 0.05 < std < 20:
            return (
                f"the target has mean {mean:.4g} and standard deviation {std:.4g}, but a fresh model's outputs are "
                "around 0, within about 1",
                f"end the model with keras.layers.Rescaling({std:.3g}, offset={mean:.3g}), or scale y in load()",
            )
    return None


def unscaled(x: Any) -> str | None:
    """The range of features that are large, in words; None if they are not."""
    parts = [part for part in keras.tree.flatten(x) if part.dtype.kind in "fiu"]
    low, high = min((float(p.min()) for p in parts), default=0.0), max((float(p.max()) for p in parts), default=0.0)
    return f"features go from {low:.4g} to {high:.4g}" if max(-low, high) > _LARGE else None


def scaled(x: Any, by: Any, model: keras.Model) -> Any:
    """Features with mean 0 and variance 1 in each column, by the statistics of ``by``.

    Text stays, and so do integers where the model has a layer that looks them up.
    """
    looks_up = any(type(layer).__name__ in _LOOK_UP for layer in layers_of(model))

    def one(part: Array, of: Array) -> Array:
        if part.dtype.kind not in ("f" if looks_up else "fiu"):
            return part
        flat = of.reshape(-1, of.shape[-1]).astype(np.float64) if of.ndim > 1 else of.astype(np.float64)
        std = flat.std(axis=0)
        out: Array = ((part - flat.mean(axis=0)) / np.where(std > 0, std, 1.0)).astype(np.float32)
        return out

    return keras.tree.map_structure(one, x, by)


def layers_of(model: Any) -> Iterator[Any]:
    """All layers, those inside of models and wrappers included."""
    yield from model._flatten_layers(include_self=False, recursive=True)

"""Whether labels, outputs and losses go together: which encoding of labels each loss wants.

Keras takes many a wrong pair without a word: it stretches one column over three, computes a binary cross-entropy of
the labels 1 and 2, and on a GPU a class number beyond the last unit becomes NaN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from search.errors import SpaceError
from search.scorer import scoring
from search.scorer.metrics import Array

_NOT_NEGATIVE = frozenset({"poisson", "mean_squared_logarithmic_error", "kl_divergence"})
_SIGNS = frozenset({"hinge", "squared_hinge"})


def check(
    declaration: Mapping[str, Any], shapes: Sequence[tuple[int, ...]], labels: Sequence[Array], where: str
) -> None:
    """Refuse labels that are not what the loss of their output takes them for.

    Args:
        declaration: Of the model, see ``declaration.declare``; losses that are not known here are not looked at.
        shapes: Of each output's predictions for one row, such as ``(10,)``.
        labels: One array of shape (rows, ...) for each output.
        where: Of the line to change, for the message.

    Raises:
        SpaceError: With what the loss wants, what there is, and what to change.
    """
    outputs = declaration["outputs"]
    if len(labels) != len(outputs):
        raise SpaceError(
            f"{where}: there must be labels for each output, but the model has {len(outputs)} "
            f"({', '.join(output['name'] for output in outputs)}) and y has {len(labels)}; change y in load()"
        )
    for output, shape, y in zip(outputs, shapes, labels, strict=True):
        loss = str(output.get("loss") or "")
        kind = scoring.loss_kind({**output, "loss": loss.replace("_focal", "")})
        if kind is None or not y.size or "ignore_class" in (output.get("config") or {}):
            continue
        of = f" of output {output['name']!r}" if len(outputs) > 1 else ""
        wrong = _wrong(kind, shape, y.astype(np.int8) if y.dtype.kind == "b" else y)
        if wrong is not None:
            raise SpaceError(f"{where}: the loss {loss}{of} wants {wrong}")


def _wrong(kind: str, shape: tuple[int, ...], y: Array) -> str | None:
    """What the loss wants, what it got, and what to do; None if they go together."""
    own = y.shape[1:]
    if kind == "sparse_categorical_crossentropy":
        return _wrong_numbers(shape, y)
    if kind == "categorical_crossentropy":
        return _wrong_rows_of_ones(shape, y)
    if kind in ("crossentropy", "cosine_similarity"):
        return None
    if _squeezed(own) != _squeezed(shape):
        return _wrong_shape(kind, shape, y)
    if kind == "binary_crossentropy":
        return _wrong_yes_and_no(y)
    if kind in _NOT_NEGATIVE and y.min() < 0:
        return f"labels of at least 0, but y has {_shown(y.min())}; shift them in load(), or take the loss mse or mae"
    if kind in _SIGNS and not (np.isin(y, (0, 1)).all() or np.isin(y, (-1, 1)).all()):
        return f"labels of -1 and 1, or of 0 and 1, but y has {_values(y)}; number the two classes so in load()"
    return None


def _wrong_numbers(shape: tuple[int, ...], y: Array) -> str | None:
    own, units = y.shape[1:], shape[-1] if shape else 1
    wants = f"one whole number a row, 0 to {max(units - 1, 1)}"
    if units > 1 and own == shape and _are_rows_of_ones(y):
        return (
            f"{wants}, but y has rows of {units} zeros and ones (one-hot); take the loss categorical_crossentropy, or "
            "y.argmax(axis=-1) in load()"
        )
    if _squeezed(own) != _squeezed(shape[:-1]):
        return (
            f"{wants}, but y has the shape {own} a row where the output has {shape}; change the last layer, or the "
            "labels in load()"
        )
    if (y != np.round(y)).any():
        return (
            f"{wants}, but y has values such as {_shown(y[y != np.round(y)].flat[0])}; for values rather than classes "
            "take the loss mse or mae, with one unit and no activation in the last layer"
        )
    low, high = int(y.min()), int(y.max())
    if units == 1:
        two = ", or the loss binary_crossentropy with 'sigmoid'" if (low, high) == (0, 1) else ""
        return (
            f"one output for each class, but the last layer has a single unit, whose softmax is always 1; give it "
            f"{high + 1} units and 'softmax'{two}"
        )
    if low == 1 and high == units:
        return f"class numbers from 0 to {units - 1}, but y has 1 to {units}; write y - 1 in load()"
    if low < 0 or high >= units:
        more = f"give the last layer {high + 1} units" if low >= 0 else "number the classes from 0 in load()"
        if high >= units and low >= 0 and len(np.unique(y)) <= units:
            more = "number the classes from 0 in load(), as np.unique(y, return_inverse=True)[1] does"
        return f"class numbers from 0 to {units - 1} for {units} units, but y has {low} to {high}; {more}"
    return None


def _wrong_rows_of_ones(shape: tuple[int, ...], y: Array) -> str | None:
    own, units = y.shape[1:], shape[-1] if shape else 1
    if units == 1:
        return (
            "one output for each class, but the last layer has a single unit, with which it is always 0; take the "
            "loss binary_crossentropy with one unit and 'sigmoid', or a unit for each class and 'softmax'"
        )
    if _squeezed(own) == _squeezed(shape[:-1]):
        return (
            f"one-hot rows of {units} zeros and ones, but y has one number a row ({_values(y)}); take the loss "
            f"sparse_categorical_crossentropy, or keras.utils.to_categorical(y, {units}) in load()"
        )
    if own != shape:
        return (
            f"rows as long as the last layer, but y has the shape {own} a row where the output has {shape}; give the "
            f"last layer {own[-1]} units"
        )
    if y.min() < 0 or y.max() > 1:
        return f"rows of zeros and ones, but y goes from {_shown(y.min())} to {_shown(y.max())}; change y in load()"
    return None


def _wrong_yes_and_no(y: Array) -> str | None:
    low, high = y.min(), y.max()
    if low >= 0 and high <= 1:
        return None
    kinds, column = np.unique(y), y.size == len(y)
    if len(kinds) == 2:
        turned = "(y + 1) / 2" if (low, high) == (-1, 1) else f"y - {_shown(low)}" if high - low == 1 else "y == "
        turned += _shown(high) if turned == "y == " else ""
        return f"labels of 0 and 1, but y has {_shown(low)} and {_shown(high)}; write {turned} in load()"
    if column and (y == np.round(y)).all() and low >= 0:
        return (
            f"labels of 0 and 1, but y has {len(kinds)} classes ({_values(y)}); take the loss "
            f"sparse_categorical_crossentropy, with {int(high) + 1} units and 'softmax' in the last layer"
        )
    return (
        f"labels from 0 to 1, but y goes from {_shown(low)} to {_shown(high)}; for values take the loss mse or mae, "
        "with no activation in the last layer"
    )


def _wrong_shape(kind: str, shape: tuple[int, ...], y: Array) -> str:
    own = y.shape[1:]
    got = f"predictions in the shape of the labels, but y has {own or 'one number'} a row where the output has {shape}"
    if len(_squeezed(shape)) > len(_squeezed(own)):
        if len(shape) > max(1, len(own)):
            return f"{got}; leave out return_sequences=True of the last recurrent layer, or add Flatten or pooling"
        if kind == "binary_crossentropy":
            return (
                f"{got}; give the last layer one unit and 'sigmoid', or, for {shape[-1]} classes, take the loss "
                "sparse_categorical_crossentropy with 'softmax'"
            )
        return f"{got}; give the last layer one unit"
    if len(shape) <= 1 and len(own) == 1:
        return f"{got}; give the last layer {own[0]} unit{'' if own[0] == 1 else 's'}"
    return f"{got}; change the last layer, or the labels in load()"


def _squeezed(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape if size != 1]


def _are_rows_of_ones(y: Array) -> bool:
    return bool(((y >= 0) & (y <= 1)).all() and np.allclose(y.sum(axis=-1), 1))


def _values(y: Array) -> str:
    kinds = np.unique(y)
    return ", ".join(map(_shown, kinds[:4])) + (f", … {_shown(kinds[-1])}" if len(kinds) > 4 else "")


def _shown(value: Any) -> str:
    return f"{float(value):.4g}"

"""How many floating-point operations a model's prediction of one row takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras

Shape = tuple[int | None, ...]
"""Of a tensor, the number of rows first."""

_BY_ELEMENT = (
    keras.layers.BatchNormalization,
    keras.layers.Embedding,
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
    keras.layers.Normalization,
    keras.layers.PReLU,
    keras.layers.RMSNormalization,
    keras.layers.UnitNormalization,
)
"""Layers with weights that multiply no matrix."""

_OPERATIONS = ("keras.src.ops.nn", "keras.src.ops.numpy", "keras.src.ops.core")
_CONTRACTING = (
    *("attention", "conv", "correlate", "cross", "dot", "einsum", "inner", "kron", "matmul", "outer"),
    *("cond", "ctc", "loop", "map", "scan", "switch", "vectorize"),  # run what they are given, or loop
)


class _Unknown(Exception):
    """A layer whose operations are not known."""


def count(model: keras.Model) -> int | None:
    """Floating-point operations of one row through the model, two for each multiply-add.

    Counted from the layers' shapes, without running anything: what multiplies by a matrix or a kernel, and attention's
    products. As usual, what goes element by element is left out (biases, activations, normalization, pooling), and so
    is ``preprocess``.

    Returns:
        None where it would be a guess: for a subclassed model, a layer or operation that is not known, such as one
        of the user's own, and rows of no fixed length.
    """
    try:
        return sum(_of_call(*call) for call in _calls(model))
    except Exception:  # besides what is unknown: a layer of the user's own, asked for its settings or shapes
        return None


def _calls(model: Any) -> Iterator[tuple[Any, list[Shape]]]:
    """Each use of a layer, which may be one of several, with the shapes that it is given."""
    if not model.built or not type(model).call.__module__.startswith("keras."):
        raise _Unknown
    if isinstance(model, keras.Sequential):
        shape = tuple(model.inputs[0].shape)
        for layer in model.layers:
            yield layer, [shape]
            shape = tuple(layer.compute_output_shape(shape))
        return
    known = {operation.name: operation for operation in model.operations}
    for layer in model.get_config()["layers"]:  # the one public account of a layer's uses
        for use in layer["inbound_nodes"]:
            yield known[layer["name"]], list(_shapes([use["args"], use["kwargs"]]))


def _shapes(serialized: Any) -> Iterator[Shape]:
    if isinstance(serialized, dict):
        if serialized.get("class_name") == "__keras_tensor__":
            yield tuple(serialized["config"]["shape"])
            return
        serialized = list(serialized.values())
    if isinstance(serialized, list | tuple):
        for part in serialized:
            yield from _shapes(part)


def _of_call(layer: Any, shapes: list[Shape]) -> int:
    if isinstance(layer, keras.Model):
        return sum(_of_call(*call) for call in _calls(layer))
    module = type(layer).__module__
    if not isinstance(layer, keras.layers.Layer):
        known = module in _OPERATIONS and not any(word in type(layer).__name__.lower() for word in _CONTRACTING)
        return 0 if known else _unknown()
    rule = _RULES.get(type(layer))
    if rule is not None:
        return rule(layer, shapes)
    plain = module.startswith("keras.") and not isinstance(layer, keras.layers.Lambda | keras.layers.Wrapper)
    if plain and (not layer.weights or isinstance(layer, _BY_ELEMENT)):
        return 0
    return _unknown()


def _unknown() -> int:
    raise _Unknown


def _product(sizes: Sequence[int | None]) -> int:
    """Of a shape's sizes; of none it is 1."""
    if None in sizes:
        raise _Unknown
    return math.prod(size for size in sizes if size is not None)


def _dense(layer: Any, shapes: list[Shape]) -> int:
    return 2 * _product(shapes[0][1:]) * int(layer.units)


def _einsum(layer: Any, shapes: list[Shape]) -> int:
    """A multiply-add for each way to choose all indices of the equation, but for that of the rows."""
    data, kernel = layer.equation.split("->")[0].replace(" ", "").split(",")
    head, _, tail = data.partition("...")
    shape = shapes[0]
    sizes = dict(zip(head, shape, strict=False)) | dict(zip(reversed(tail), reversed(shape), strict=False))
    rest = list(shape[len(head) : len(shape) - len(tail)])
    if head:
        del sizes[head[0]]
    else:
        del rest[0]
    sizes |= dict(zip(kernel, layer.kernel.shape, strict=True))
    return 2 * _product([*sizes.values(), *rest])


def _spatial(layer: Any, shape: Sequence[int | None]) -> int:
    """Places of a convolution's map."""
    return _product(shape[1:-1] if layer.data_format == "channels_last" else shape[2:])


def _convolution(layer: Any, shapes: list[Shape]) -> int:
    return 2 * _spatial(layer, layer.compute_output_shape(shapes[0])) * _product(layer.kernel.shape)


def _separable(layer: Any, shapes: list[Shape]) -> int:
    kernels = _product(layer.depthwise_kernel.shape) + _product(layer.pointwise_kernel.shape)
    return 2 * _spatial(layer, layer.compute_output_shape(shapes[0])) * kernels


def _transposed(layer: Any, shapes: list[Shape]) -> int:
    return 2 * _spatial(layer, shapes[0]) * _product(layer.kernel.shape)


def _recurrent(layer: Any, shapes: list[Shape]) -> int:
    kernels = _product(layer.cell.kernel.shape) + _product(layer.cell.recurrent_kernel.shape)
    return 2 * _product(shapes[0][1:2]) * kernels


def _both_ways(layer: Any, shapes: list[Shape]) -> int:
    return _of_call(layer.forward_layer, shapes) + _of_call(layer.backward_layer, shapes)


def _each_step(layer: Any, shapes: list[Shape]) -> int:
    batch, steps, *rest = shapes[0]
    return _product([steps]) * _of_call(layer.layer, [(batch, *rest)])


def _dot(layer: Any, shapes: list[Shape]) -> int:
    axes = layer.axes if isinstance(layer.axes, list | tuple) else (layer.axes, layer.axes)
    one, other = _product(shapes[0][1:]), _product(shapes[1][1:])
    return 2 * one * other // _product([shapes[0][axes[0]]])


def _attention(layer: Any, shapes: list[Shape]) -> int:
    query, value, *key = shapes
    asked, there = _product(query[1:-1]), _product(value[1:-1])
    width = _product([(key[0] if key else value)[-1]])
    return 2 * asked * there * (width + _product([value[-1]]))


def _heads(layer: Any, shapes: list[Shape]) -> int:
    asked, there = _product(shapes[0][1:-1]), _product(shapes[1][1:-1])
    dense = layer.query_dense, layer.output_dense, layer.key_dense, layer.value_dense
    kernels = [_product(one.kernel.shape) for one in dense]
    products = layer.num_heads * asked * there * (layer.key_dim + (layer.value_dim or layer.key_dim))
    return 2 * (asked * sum(kernels[:2]) + there * sum(kernels[2:]) + int(products))


_RULES: dict[type, Callable[[Any, list[Shape]], int]] = {
    keras.layers.Dense: _dense,
    keras.layers.EinsumDense: _einsum,
    keras.layers.Conv1D: _convolution,
    keras.layers.Conv2D: _convolution,
    keras.layers.Conv3D: _convolution,
    keras.layers.DepthwiseConv1D: _convolution,
    keras.layers.DepthwiseConv2D: _convolution,
    keras.layers.SeparableConv1D: _separable,
    keras.layers.SeparableConv2D: _separable,
    keras.layers.Conv1DTranspose: _transposed,
    keras.layers.Conv2DTranspose: _transposed,
    keras.layers.Conv3DTranspose: _transposed,
    keras.layers.SimpleRNN: _recurrent,
    keras.layers.LSTM: _recurrent,
    keras.layers.GRU: _recurrent,
    keras.layers.Bidirectional: _both_ways,
    keras.layers.TimeDistributed: _each_step,
    keras.layers.Dot: _dot,
    keras.layers.Attention: _attention,
    keras.layers.MultiHeadAttention: _heads,
}

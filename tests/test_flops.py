"""Floating-point operations of a row, against counts by hand."""

from __future__ import annotations

import keras
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

from search.harness import flops


def functional(shape: tuple[int | None, ...], *chain: keras.layers.Layer) -> keras.Model:
    start = out = keras.Input(shape)
    for layer in chain:
        out = layer(out)
    return keras.Model(start, out)


# 2 for each multiply-add: places × kernel.
COUNTED = [
    ((4,), [layers.Dense(8, activation="relu"), layers.Dense(2)], 2 * (4 * 8 + 8 * 2)),
    ((5, 4), [layers.Dense(8)], 2 * 5 * 4 * 8),
    ((4,), [layers.BatchNormalization(), layers.Dropout(0.5), layers.Activation("selu")], 0),
    ((8, 8, 3), [layers.Conv2D(4, 3), layers.MaxPooling2D()], 2 * 6 * 6 * 3 * 3 * 3 * 4),
    ((8, 8, 4), [layers.Conv2D(4, 3, strides=2, padding="same", groups=2)], 2 * 4 * 4 * 3 * 3 * 2 * 4),
    ((8, 8, 3), [layers.SeparableConv2D(4, 3, padding="same")], 2 * 64 * (3 * 3 * 3 + 3 * 4)),
    ((8, 8, 3), [layers.DepthwiseConv2D(3, depth_multiplier=2)], 2 * 36 * 3 * 3 * 3 * 2),
    ((4, 4, 3), [layers.Conv2DTranspose(5, 2, strides=2)], 2 * 16 * 2 * 2 * 5 * 3),
    ((6, 3), [layers.LSTM(4)], 2 * 6 * 4 * (3 * 4 + 4 * 4)),
    ((6, 3), [layers.Bidirectional(layers.GRU(4))], 2 * 2 * 6 * 3 * (3 * 4 + 4 * 4)),
    ((6, 3), [layers.TimeDistributed(layers.Dense(2))], 2 * 6 * 3 * 2),
    ((7,), [layers.Embedding(9, 5), layers.GlobalAveragePooling1D(), layers.Dense(2)], 2 * 5 * 2),
    ((6, 3), [layers.EinsumDense("abc,cd->abd", output_shape=(None, 4))], 2 * 6 * 3 * 4),
    ((6, 5, 3), [layers.EinsumDense("...c,cd->...d", output_shape=4)], 2 * 6 * 5 * 3 * 4),
]


@pytest.mark.parametrize(("shape", "chain", "expected"), COUNTED)
def test_as_by_hand(shape: tuple[int, ...], chain: list[keras.layers.Layer], expected: int) -> None:
    assert flops.count(functional(shape, *chain)) == expected
    assert flops.count(keras.Sequential([keras.Input(shape), *chain])) == expected  # the same layers, in a row


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=5))
def test_dense_layers_of_any_width(widths: list[int]) -> None:
    model = functional((widths[0],), *map(layers.Dense, widths[1:]))
    assert flops.count(model) == 2 * sum(a * b for a, b in zip(widths, widths[1:], strict=False))


def test_a_layer_counts_as_often_as_it_is_used_and_a_nested_model_with_its_layers() -> None:
    shared, inner = layers.Dense(8), functional((8,), layers.Dense(3))
    one, other = keras.Input((4,)), keras.Input((4,))
    out = layers.Add()([inner(shared(one)), inner(shared(other))])
    assert flops.count(keras.Model([one, other], out)) == 2 * 2 * (4 * 8 + 8 * 3)


def test_attention_by_its_projections_and_products() -> None:
    start = keras.Input((6, 8))
    model = keras.Model(start, layers.MultiHeadAttention(2, 4)(start, start))
    projections = 4 * 6 * 8 * 8  # query, key, value and output, each 8 to 2 heads of 4
    assert flops.count(model) == 2 * (projections + 2 * 2 * 6 * 6 * 4)
    model = keras.Model(start, layers.Attention()([start, start]))
    assert flops.count(model) == 2 * 6 * 6 * (8 + 8)
    model = keras.Model(start, layers.Dot(axes=(2, 2))([start, start]))
    assert flops.count(model) == 2 * 6 * 6 * 8


class Own(keras.layers.Layer):
    def call(self, x: object) -> object:
        return keras.ops.matmul(x, keras.ops.transpose(x))


class Deep(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.one = layers.Dense(3)

    def call(self, x: object) -> object:
        return self.one(x)


def test_what_is_not_known_is_not_guessed() -> None:
    assert flops.count(functional((4,), Own())) is None
    deep = Deep()
    deep(keras.ops.ones((1, 4)))
    assert flops.count(deep) is None
    start = keras.Input((4,))
    assert flops.count(keras.Model(start, keras.ops.matmul(start, keras.ops.ones((4, 2))))) is None
    assert flops.count(keras.Model(start, keras.ops.relu(start) + 1)) == 0
    assert flops.count(functional((None, 3), layers.LSTM(4))) is None  # of no fixed length
    assert flops.count(functional((6, 6, 2), layers.ConvLSTM1D(3, 2))) is None
    assert flops.count(keras.Sequential([layers.Dense(3)])) is None  # not built

"""Labels against losses and outputs: what Keras would take without a word is refused, with what the loss wants."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from search.checks.encoding import check
from search.errors import SpaceError

FIVE = np.arange(60) % 5
HOT = np.eye(5)[FIVE]


def declared(*losses: str, **config: Any) -> dict[str, Any]:
    outputs = [{"name": f"out{k}", "loss": loss, "config": config} for k, loss in enumerate(losses)]
    return {"outputs": outputs, "metrics": []}


@pytest.mark.parametrize(
    ("loss", "shape", "y"),
    [
        ("sparse_categorical_crossentropy", (5,), FIVE),
        ("sparse_categorical_crossentropy", (5,), FIVE[:, None].astype("float32")),
        ("sparse_categorical_crossentropy", (7,), FIVE),
        ("sparse_categorical_crossentropy", (4, 6, 5), FIVE[:48].reshape(2, 4, 6)),
        ("categorical_crossentropy", (5,), HOT),
        ("categorical_crossentropy", (5,), HOT * 0.8 + 0.04),
        ("binary_crossentropy", (1,), FIVE % 2),
        ("binary_crossentropy", (1,), FIVE % 2 == 1),
        ("binary_crossentropy", (5,), HOT),
        ("mse", (1,), FIVE),
        ("mse", (5,), HOT),
        ("mae", (8, 1), np.ones((60, 8))),
        ("hinge", (1,), FIVE % 2),
        ("hinge", (1,), FIVE % 2 * 2 - 1),
        ("poisson", (1,), FIVE),
        ("a_loss_of_your_own", (3,), FIVE),
    ],
)
def test_what_goes_together_passes(loss: str, shape: tuple[int, ...], y: np.ndarray) -> None:
    check(declared(loss), [shape], [y], "here")


@pytest.mark.parametrize(
    ("loss", "shape", "y", "wants", "fix"),
    [
        ("sparse_categorical_crossentropy", (5,), FIVE + 1, "class numbers from 0 to 4, but y has 1 to 5", "y - 1"),
        ("sparse_categorical_crossentropy", (3,), FIVE, "0 to 2 for 3 units, but y has 0 to 4", "5 units"),
        ("sparse_categorical_crossentropy", (5,), FIVE * 10, "y has 0 to 40", "return_inverse=True"),
        ("sparse_categorical_crossentropy", (5,), FIVE - 2, "y has -2 to 2", "number the classes from 0"),
        ("sparse_categorical_crossentropy", (1,), FIVE, "one output for each class", "give it 5 units"),
        ("sparse_categorical_crossentropy", (1,), FIVE % 2, "one output for each class", "binary_crossentropy"),
        ("sparse_categorical_crossentropy", (5,), HOT, "one-hot", "categorical_crossentropy, or y.argmax"),
        ("sparse_categorical_crossentropy", (5,), FIVE + 0.5, "values such as 0.5", "mse or mae"),
        ("sparse_categorical_crossentropy", (8, 5), FIVE, "shape () a row where the output has (8, 5)", "last layer"),
        ("categorical_crossentropy", (5,), FIVE, "one-hot rows of 5", "sparse_categorical_crossentropy"),
        ("categorical_crossentropy", (1,), FIVE % 2, "always 0", "binary_crossentropy with one unit and 'sigmoid'"),
        ("categorical_crossentropy", (4,), HOT, "(5,) a row where the output has (4,)", "last layer 5 units"),
        ("categorical_crossentropy", (5,), HOT * 3, "y goes from 0 to 3", "load()"),
        ("binary_crossentropy", (1,), FIVE % 2 + 1, "labels of 0 and 1, but y has 1 and 2", "write y - 1"),
        ("binary_crossentropy", (1,), FIVE % 2 * 2 - 1, "y has -1 and 1", "(y + 1) / 2"),
        ("binary_crossentropy", (1,), FIVE % 2 * 7, "y has 0 and 7", "write y == 7"),
        ("binary_crossentropy", (1,), FIVE, "y has 5 classes (0, 1, 2, 3, … 4)", "5 units and 'softmax'"),
        ("binary_crossentropy", (1,), FIVE - 1.5, "y goes from -1.5 to 2.5", "mse or mae"),
        ("binary_crossentropy", (2,), FIVE % 2, "one number a row where the output has (2,)", "one unit and 'sigmoid'"),
        ("binary_focal_crossentropy", (1,), FIVE % 2 + 1, "labels of 0 and 1", "write y - 1"),
        ("mse", (3,), FIVE, "one number a row where the output has (3,)", "give the last layer one unit"),
        ("mse", (1,), HOT, "(5,) a row where the output has (1,)", "give the last layer 5 units"),
        ("mse", (8, 1), FIVE, "one number a row where the output has (8, 1)", "return_sequences=True"),
        ("poisson", (1,), FIVE - 1, "labels of at least 0, but y has -1", "mse or mae"),
        ("hinge", (1,), FIVE, "labels of -1 and 1, or of 0 and 1", "load()"),
    ],
)
def test_what_does_not_is_refused_with_what_the_loss_wants_and_what_to_do(
    loss: str, shape: tuple[int, ...], y: np.ndarray, wants: str, fix: str
) -> None:
    with pytest.raises(SpaceError) as caught:
        check(declared(loss), [shape], [y], "module.py:12")
    said = str(caught.value)
    assert said.startswith(f"module.py:12: the loss {loss} wants ") and wants in said and fix in said, said
    assert "\n" not in said


def test_with_several_outputs_the_one_is_named_and_each_needs_labels() -> None:
    with pytest.raises(SpaceError, match="the loss mse of output 'out1' wants"):
        check(declared("binary_crossentropy", "mse"), [(1,), (2,)], [FIVE % 2, FIVE], "here")
    with pytest.raises(SpaceError, match=r"the model has 2 \(out0, out1\) and y has 1"):
        check(declared("mse", "mse"), [(1,), (1,)], [FIVE], "here")


def test_a_class_that_is_left_out_is_no_wrong_label() -> None:
    check(declared("sparse_categorical_crossentropy", ignore_class=-1), [(5,)], [FIVE - 1], "here")

"""One compiled call per epoch: the model's own train step over rows in memory, gathered by a permutation.

Feeding a small model batch by batch costs more than its arithmetic. Here Keras' ``fit`` runs as always, with its
callbacks, metrics and early stopping, but its data is a permutation per epoch and its training function loops over
the batches inside one graph. Rows come in the same order as in the ordinary path, so the numbers agree with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

_BATCH_HOOKS = (
    "on_train_batch_begin",
    "on_train_batch_end",
    "on_test_batch_begin",
    "on_test_batch_end",
    "on_batch_begin",
    "on_batch_end",
)


def watches_batches(callback: Any) -> bool:
    """Whether a callback wants to see single batches."""
    base = keras.callbacks.Callback
    return any(getattr(type(callback), hook) is not getattr(base, hook) for hook in _BATCH_HOOKS)


def usable(model: keras.Model, callbacks: Sequence[Any]) -> bool:
    """Whether an epoch of this model may run as one call.

    Not on other backends than TensorFlow, under a distribution strategy, or when a callback sees single batches. A
    module's own callback class might evaluate the model on rows of its own, so it keeps the ordinary path as well.
    """
    if keras.backend.backend() != "tensorflow" or model.run_eagerly:
        return False
    import tensorflow as tf

    known = ("keras.", "search.")
    return not tf.distribute.has_strategy() and not any(
        watches_batches(callback) or not type(callback).__module__.startswith(known) for callback in callbacks
    )


def orders(count: int, seed: int | None) -> Any:
    """The order of rows, epoch after epoch, without end: shuffled by (seed, epoch), or as stored."""
    import tensorflow as tf

    rows = tf.range(count, dtype=tf.int64)

    def order(epoch: Any) -> Any:
        if seed is None:
            return rows
        return tf.random.experimental.stateless_shuffle(rows, tf.stack([tf.constant(seed, tf.int64), epoch]))

    return tf.data.Dataset.counter().map(order)


def fit(
    model: keras.Model,
    train: Sequence[Any],
    validation: Sequence[Any],
    *,
    batch: int,
    large: int,
    seed: int,
    **options: Any,
) -> None:
    """``model.fit`` on rows in memory.

    Args:
        train: ``(x, y)`` or ``(x, y, sample_weight)``, structures of arrays with the rows first.
        validation: ``(x, y)``.
        batch: Rows per training step; large: rows per validation step.
        seed: Of the order of rows.
        **options: For Keras' ``fit``: epochs, callbacks.
    """
    import tensorflow as tf

    _build(model, train)
    model.train_function = _function(model.train_step, train, batch, model.jit_compile)
    model.test_function = _function(model.test_step, validation, large, model.jit_compile)
    every = tf.data.Dataset.from_tensors(np.arange(_count(validation), dtype=np.int64))
    try:
        model.fit(
            orders(_count(train), seed), validation_data=every, steps_per_epoch=1, shuffle=False, verbose=0, **options
        )
    finally:
        model.train_function = model.test_function = None


def _count(data: Sequence[Any]) -> int:
    return len(keras.tree.flatten(data)[0])


def _build(model: keras.Model, data: Sequence[Any]) -> None:
    """Make every variable that training needs.

    ``fit`` would make them from its data, which is a permutation here; and variables that appear while a function is
    traced make TensorFlow trace it twice.
    """
    row = keras.tree.map_structure(lambda part: part[:1], tuple(data))
    predicted = model(row[0], training=False)
    model.compute_loss(*row[:2], predicted)
    model.compute_metrics(*row[:2], predicted)
    model.reset_metrics()
    model.optimizer.build(model.trainable_variables)


def _function(
    step: Callable[[Any], Mapping[str, Any]], data: Sequence[Any], batch: int, jit_compile: bool
) -> Callable[[Any], Any]:
    """What Keras calls with an iterator: takes one order of rows from it and runs a step for each batch of it."""
    import tensorflow as tf

    held = keras.tree.map_structure(tf.constant, tuple(data))
    of_rows = [tf.TensorSpec([None], tf.int64)]

    def one(at: Any) -> Any:
        return step(keras.tree.map_structure(lambda part: tf.gather(part, at), held))

    # A function of its own, so that the step is traced once for the loop and for the last batch.
    batch_step = tf.function(one, input_signature=of_rows, jit_compile=jit_compile, autograph=False)

    def epoch(order: Any) -> Any:
        last = (tf.size(order) - 1) // batch

        def body(number: Any) -> Any:
            batch_step(order[number * batch : (number + 1) * batch])
            return number + 1

        tf.while_loop(lambda number: number < last, body, [tf.constant(0)], parallel_iterations=1)
        return batch_step(order[last * batch :])

    run = tf.function(epoch, input_signature=of_rows, autograph=False)
    return lambda iterator: run(next(iterator))

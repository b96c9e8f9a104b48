"""One compiled call per epoch: the model's own train step over rows in memory, gathered by a permutation.

Feeding a small model batch by batch costs more than its arithmetic. Here Keras' ``fit`` runs as always, with its
callbacks, metrics and early stopping, but its data is a permutation per epoch and its training function loops over
the batches inside one graph. Rows come in the same order as in the ordinary path, so the numbers agree with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from search.declaration import ends

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


def order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of rows in an epoch, counted from 0: int64 of shape (count,), the same on every path and backend."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def fit(
    model: keras.Model,
    train: Sequence[Any],
    validation: Sequence[Any],
    *,
    batch: int,
    large: int,
    seed: int,
    first: Callable[[], int] = lambda: 0,
    **options: Any,
) -> None:
    """``model.fit`` on rows in memory.

    Args:
        train: ``(x, y)`` or ``(x, y, sample_weight)``, structures of arrays with the rows first.
        validation: ``(x, y)``.
        batch: Rows per training step; large: rows per validation step.
        seed: Of the order of rows; first: number of the first epoch, known when training has begun.
        **options: For Keras' ``fit``: epochs, callbacks.
    """
    import tensorflow as tf

    _build(model, train)
    count, last = _count(train), np.arange(_count(validation))
    passed = itertools.count()
    model.train_function = _function(
        model.train_step, train, batch, model.jit_compile, lambda: order(count, seed, first() + next(passed))
    )
    model.test_function = _function(model.test_step, validation, large, model.jit_compile, lambda: last)
    # Keras asks its data for one step an epoch; the rows themselves are in the functions.
    step = tf.data.Dataset.from_tensors(0)
    # TensorFlow rewrites a graph for 0.1 to 0.2 s before it runs. No epoch of four models on a CPU, dense or
    # convolutional, of 14 to 450 ms, was slower without.
    plain = not tf.config.list_physical_devices("GPU")
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": plain})
    try:
        model.fit(step, validation_data=step, shuffle=False, verbose=0, **options)
    finally:
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": False})
        model.train_function = model.test_function = None


def _count(data: Sequence[Any]) -> int:
    return len(keras.tree.flatten(data)[0])


def _build(model: keras.Model, data: Sequence[Any]) -> None:
    """Make every variable that training needs.

    ``fit`` would make them from its data, which is a permutation here; and variables that appear while a function is
    traced make TensorFlow trace it twice. Loss and metrics go through a graph that is thrown away: the first run of
    each operation outside of a graph costs a millisecond, and there are dozens.
    """
    import tensorflow as tf

    x, *rest = keras.tree.map_structure(lambda part: part[:1], tuple(data))
    known = ends(model)
    outputs = known[1] if known is not None else None
    if known is None or any(None in part.shape[1:] for part in keras.tree.flatten(outputs)):
        outputs = model(x, training=False)
    with tf.__internal__.FuncGraph("build").as_default():
        predicted = keras.tree.map_structure(lambda part: tf.zeros((1, *part.shape[1:]), part.dtype), outputs)
        model.compute_loss(x, rest[0], predicted)
        model.compute_metrics(x, rest[0], predicted)
    model.optimizer.build(model.trainable_variables)


def _function(
    step: Callable[[Any], Mapping[str, Any]],
    data: Sequence[Any],
    batch: int,
    jit_compile: bool,
    rows: Callable[[], np.ndarray],
) -> Callable[[Any], Any]:
    """What Keras calls once an epoch: runs a step for each batch of the rows, in the order that ``rows`` gives."""
    import tensorflow as tf

    held = keras.tree.map_structure(tf.constant, tuple(data))
    of_rows = [tf.TensorSpec([None], tf.int64)]

    def one(at: Any) -> Any:
        return step(keras.tree.map_structure(lambda part: tf.gather(part, at), held))

    # A function of its own, so that what it returns is known before the loop that carries it.
    batch_step = tf.function(one, input_signature=of_rows, jit_compile=jit_compile, autograph=False)
    if _count(data) <= batch:
        return lambda iterator: batch_step(rows())  # the iterator has nothing to tell

    def epoch(order: Any) -> Any:
        steps = (tf.size(order) - 1) // batch + 1

        def body(number: Any, _: Any) -> Any:  # the last slice ends with the rows
            return number + 1, batch_step(order[number * batch : (number + 1) * batch])

        returned = batch_step.get_concrete_function().structured_outputs
        nothing = tf.nest.map_structure(lambda part: tf.zeros([size or 0 for size in part.shape], part.dtype), returned)
        invariants = [tf.TensorShape([]), tf.nest.map_structure(lambda part: part.shape, returned)]
        start = [tf.constant(0), nothing]
        return tf.while_loop(lambda number, _: number < steps, body, start, invariants, parallel_iterations=1)[1]

    run = tf.function(epoch, input_signature=of_rows, autograph=False)
    return lambda iterator: run(rows())

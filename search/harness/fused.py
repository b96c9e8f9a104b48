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

from search.scorer.declaration import ends

_BATCH_HOOKS = (
    "on_train_batch_begin",
    "on_train_batch_end",
    "on_test_batch_begin",
    "on_test_batch_end",
    "on_batch_begin",
    "on_batch_end",
)
_OF_THE_TRAINER = ("fit", "evaluate", "make_train_function", "make_test_function")


def watches_batches(callback: Any) -> bool:
    """Whether a callback wants to see single batches: by a method of its class, or, a LambdaCallback, of its own."""
    hooks = ((getattr(callback, name, None), getattr(keras.callbacks.Callback, name)) for name in _BATCH_HOOKS)
    return any(getattr(own, "__func__", own) is not hook for own, hook in hooks)


def usable(model: keras.Model, callbacks: Sequence[Any]) -> bool:
    """Whether an epoch of this model may run as one call.

    Not on other backends than TensorFlow, under a distribution strategy, when a callback sees single batches, or for
    a model that changes how Keras goes through its data.
    """
    if keras.backend.backend() != "tensorflow" or model.run_eagerly:
        return False
    import tensorflow as tf

    as_in_keras = all(getattr(type(model), name) is getattr(keras.Model, name) for name in _OF_THE_TRAINER)
    return as_in_keras and not tf.distribute.has_strategy() and not any(map(watches_batches, callbacks))


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
    epochs: int,
    callbacks: Sequence[Any],
    first: Callable[[], int] = lambda: 0,
) -> None:
    """``model.fit`` on rows in memory.

    Args:
        train: ``(x, y)`` or ``(x, y, sample_weight)``, structures of arrays with the rows first.
        validation: ``(x, y)``.
        batch: Rows per training step; large: rows per validation step.
        seed: Of the order of rows; first: number of the first epoch, known when training has begun.
    """
    import tensorflow as tf

    _build(model, train)
    count, last = _count(train), np.arange(_count(validation))
    passed = itertools.count()
    # Keras asks its data for one step an epoch; the rows themselves are in the functions.
    step = tf.data.Dataset.from_tensors(0)
    jit = model.jit_compile
    trained = _function(model.train_step, train, batch, jit, lambda: order(count, seed, first() + next(passed)))
    tested = _function(model.test_step, validation, large, jit, lambda: last)
    model.train_function = _or_ordinary(model, "train_function", trained, step.element_spec)
    model.test_function = _or_ordinary(model, "test_function", tested, step.element_spec)
    callbacks = keras.callbacks.CallbackList(
        callbacks, add_history=True, epochs=epochs, steps=-(-count // batch), model=model
    )
    # TensorFlow rewrites a graph for 0.1 to 0.2 s before it runs. No epoch of four models on a CPU, dense or
    # convolutional, of 14 to 450 ms, was slower without.
    plain = not tf.config.list_physical_devices("GPU")
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": plain})
    try:
        model.fit(step, validation_data=step, epochs=epochs, callbacks=callbacks, shuffle=False, verbose=0)
    finally:
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": False})
        model.train_function = model.test_function = None


def _or_ordinary(model: keras.Model, name: str, whole: Callable[[], Any], step: Any) -> Callable[[Any], Any]:
    """Keras' function of that name for an epoch in one call; for other data, of a callback that evaluates, its own."""
    made: list[Callable[[Any], Any]] = []

    def call(iterator: Any) -> Any:
        if iterator.element_spec == step:
            return whole()
        if not made:
            getattr(model, f"make_{name}")(force=True)
            made.append(getattr(model, name))
            setattr(model, name, call)
        return made[0](iterator)

    return call


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
) -> Callable[[], Any]:
    """One epoch: runs a step for each batch of the rows, in the order that ``rows`` gives."""
    import tensorflow as tf

    held = keras.tree.map_structure(tf.constant, tuple(data))
    of_rows = [tf.TensorSpec([None], tf.int64)]

    def one(at: Any) -> Any:
        return step(keras.tree.map_structure(lambda part: tf.gather(part, at), held))

    # A function of its own, so that what it returns is known before the loop that carries it.
    batch_step = tf.function(one, input_signature=of_rows, jit_compile=jit_compile, autograph=False)
    if _count(data) <= batch:
        return lambda: batch_step(rows())

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
    return lambda: run(rows())

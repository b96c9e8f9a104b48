"""Feeding rows to Keras: in-memory gathers for small data, gathers from the memory map for large."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np

from search.data import OpenRows
from search.fused import order


def joined(rows: OpenRows, tier: str, preprocess: keras.Model | None, index: np.ndarray | None = None) -> Any:
    """Features of a tier in memory, preprocessed, in the structure that ``load()`` gave."""
    features = rows.features(tier, index)
    if preprocess is None:
        return features
    return preprocess.predict(as_fed(features), verbose=0, batch_size=1024)


def as_fed(features: Any) -> Any:
    """Strings as backend tensors, since Keras does not take NumPy's unicode arrays; all else as it is."""

    def one(array: np.ndarray) -> Any:
        if array.dtype.kind != "U":
            return array
        import tensorflow as tf

        return tf.constant(array)

    return keras.tree.map_structure(one, features)


def batches(
    rows: OpenRows,
    tier: str,
    preprocess: keras.Model | None,
    *,
    batch: int,
    budget: int,
    seed: int | None = None,
) -> Any:
    """Batches of ``(x, y)`` or ``(x, y, weight)`` for ``fit``; shuffled anew every epoch when a seed is given.

    Rows are copied into the process only when they take at most ``budget`` bytes. The order depends
    on the seed alone.

    Returns:
        A ``tf.data.Dataset`` on the TensorFlow backend, which goes on without end when it is shuffled; a
        ``keras.utils.PyDataset`` on the others.
    """
    features = joined(rows, tier, preprocess) if rows.nbytes(tier) <= budget else None
    if not _has_tf_data():
        return _Gathered(rows, tier, preprocess, features, batch, seed)
    return _tf_batches(rows, tier, preprocess, features, batch, seed)


def _has_tf_data() -> bool:
    return bool(keras.backend.backend() == "tensorflow")


def targets(rows: OpenRows, tier: str) -> tuple[Any, ...]:
    """What follows x in a batch: ``(y,)``, or ``(y, weight)`` for train rows that have weights."""
    weights = rows.weights() if tier == "train" else None
    return (rows.labels(tier),) if weights is None else (rows.labels(tier), weights)


def _tf_batches(rows: OpenRows, tier: str, preprocess: Any, features: Any, batch: int, seed: int | None) -> Any:
    import tensorflow as tf

    labels, count = targets(rows, tier), rows.size(tier)
    with tf.device("/CPU:0"):
        held = keras.tree.map_structure(tf.constant, labels if features is None else (features, *labels))

    def gather(at: Any) -> Any:
        return keras.tree.map_structure(lambda part: tf.gather(part, at), held)

    def gather_mapped(at: Any) -> Any:
        like = keras.tree.flatten(rows.features(tier, np.zeros(1, dtype=np.int64)))
        kinds = [tf.as_dtype(part.dtype) for part in like]
        parts = tf.numpy_function(lambda i: keras.tree.flatten(rows.features(tier, i)), [at], kinds, stateful=False)
        for part, shape in zip(parts, like, strict=True):
            part.set_shape((None, *shape.shape[1:]))
        x = keras.tree.pack_sequence_as(rows.features(tier, np.zeros(1, dtype=np.int64)), parts)
        return (x if preprocess is None else preprocess(x), *gather(at))

    # Batches of indices, one gather a batch: per-row pipelines cost more than a small model's step.
    if seed is None:
        index = tf.data.Dataset.range(count).batch(batch)
    else:
        # Without end, an epoch's order after the other; `fit` is told how many batches make an epoch.
        index = tf.data.Dataset.counter().flat_map(
            lambda epoch: tf.data.Dataset.from_tensor_slices(
                tf.ensure_shape(
                    tf.numpy_function(lambda e: order(count, seed, int(e)), [epoch], tf.int64, stateful=False), [count]
                )
            ).batch(batch)
        )
    return index.map(gather if features is not None else gather_mapped).prefetch(2)


class _Gathered(keras.utils.PyDataset):
    """The same rows for backends without ``tf.data``."""

    def __init__(
        self,
        rows: OpenRows,
        tier: str,
        preprocess: Any,
        features: Any,
        batch: int,
        seed: int | None,
    ) -> None:
        super().__init__()
        self._rows, self._tier, self._preprocess, self._batch = rows, tier, preprocess, batch
        self._features, self._labels = features, targets(rows, tier)
        self._seed, self._epoch = seed, 0
        self._order = np.arange(rows.size(tier)) if seed is None else order(rows.size(tier), seed, 0)

    def __len__(self) -> int:
        return math.ceil(len(self._order) / self._batch)

    def __getitem__(self, number: int) -> Any:
        at = self._order[number * self._batch : (number + 1) * self._batch]
        if self._features is not None:
            x = keras.tree.map_structure(lambda part: part[at], self._features)
        else:
            x = joined(self._rows, self._tier, self._preprocess, at)
        return (x, *keras.tree.map_structure(lambda part: part[at], self._labels))

    def on_epoch_end(self) -> None:
        """Shuffle for the next epoch."""
        if self._seed is not None:
            self._epoch += 1
            self._order = order(len(self._order), self._seed, self._epoch)

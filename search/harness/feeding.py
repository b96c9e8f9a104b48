"""Feeding rows to Keras: in-memory gathers for small data, gathers from the memory map for large."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np

from search.errors import SpaceError
from search.harness.fused import order
from search.tiers.data import Dataset, OpenRows

_LOOKED_AT = 64 << 20  # bytes of rows in memory where all are gone through


class Weighted(OpenRows):
    """Open rows whose weights in training follow from their classes, as by ``class_weight`` of Keras' ``fit``.

    Args:
        rows: Those that are fed.
        wanted: Weight by class; a class that is not in it weighs 1.
        where: The module, for its errors.

    Raises:
        SpaceError: If the rows have weights already, or several labels each.
    """

    def __init__(self, rows: OpenRows, wanted: Mapping[int, float], where: str) -> None:
        super().__init__(rows.path, rows.decode)
        self._index = {tier: rows.index(tier) for tier in self._index}  # which may be those of a fold
        if super().weights(np.arange(0)) is not None:
            raise SpaceError(f"{where}: rows have weights by sample_weight or by class_weight, but got both: drop one")
        if self._leaf_count("y") != 1:
            raise SpaceError(f"{where}: class_weight needs one y, but there are {self._leaf_count('y')}")
        self._wanted = wanted

    def weights(self, rows: np.ndarray | None = None, tier: str = "train") -> np.ndarray | None:
        """Of each row by its class, which is the label or, in a row of zeros and a one, its place."""
        labels = keras.tree.flatten(self.labels(tier, rows))[0]
        if labels.ndim > 1:
            labels = labels.argmax(axis=1) if labels.shape[1] > 1 else labels[:, 0]
        found = np.ones(len(labels), dtype=np.float32)
        for kind, weight in self._wanted.items():
            found[np.round(labels) == kind] = weight
        return found


def joined(rows: OpenRows, tier: str, preprocess: keras.Model | None, index: np.ndarray | None = None) -> Any:
    """Features of a tier in memory, preprocessed, in the structure that ``load()`` gave: arrays (rows, ...).

    Args:
        index: Places (n,) within the tier of the rows wanted, counted from 0; None for all of them.
    """
    features = rows.features(tier, index)
    if preprocess is None:
        return features
    return preprocess.predict(as_fed(features), verbose=0, batch_size=1024)


def parts(rows: OpenRows, tier: str, preprocess: keras.Model | None) -> Iterator[np.ndarray]:
    """The same leaf by leaf and some rows at a time, for what must look at all of them."""
    step = max(1, _LOOKED_AT // max(1, rows.nbytes(tier) // rows.size(tier)))
    for start in range(0, rows.size(tier), step):
        at = np.arange(start, min(start + step, rows.size(tier)))
        yield from keras.tree.flatten(joined(rows, tier, preprocess, at))


def for_preprocess(rows: OpenRows, budget: int) -> Dataset:
    """The train rows for the module's ``preprocess(train)``.

    Where they take more than ``budget`` bytes, ``x`` is mapped, or, if rows are files, a ``tf.data.Dataset`` of
    batches; layers adapt to that as well.
    """
    if rows.nbytes("train") <= budget:
        return rows.dataset("train")
    if "files" not in rows.manifest["x"]:
        return Dataset(rows.mapped("train"), rows.labels("train"), sample_weight=rows.weights())
    import tensorflow as tf

    like = keras.tree.map_structure(lambda part: part[:0], rows.features("train", np.arange(1)))
    specs = keras.tree.map_structure(lambda part: tf.TensorSpec((None, *part.shape[1:]), part.dtype), like)
    count, step = rows.size("train"), max(1, min(256, _LOOKED_AT // (rows.nbytes("train") // rows.size("train"))))

    def batches_of_x() -> Iterator[Any]:
        for start in range(0, count, step):
            yield rows.features("train", np.arange(start, min(start + step, count)))

    x = tf.data.Dataset.from_generator(batches_of_x, output_signature=specs)
    return Dataset(x.prefetch(1), rows.labels("train"), sample_weight=rows.weights())


def as_fed(features: Any) -> Any:
    """Features that a model can be called with, of the same shapes.

    Keras does not take NumPy's unicode arrays, and no call with tensors and arrays side by side. So where there are
    strings, every leaf becomes a tensor; else all stay as they are.
    """
    if all(array.dtype.kind != "U" for array in keras.tree.flatten(features)):
        return features
    import tensorflow as tf

    return keras.tree.map_structure(tf.constant, features)


def batches(
    rows: OpenRows,
    tier: str,
    preprocess: keras.Model | None,
    *,
    batch: int,
    budget: int,
    seed: int | None = None,
    first: Callable[[], int] = lambda: 0,
    endless: bool = True,
) -> Any:
    """Batches of ``(x, y)`` or ``(x, y, weight)`` for ``fit``; shuffled anew every epoch when a seed is given.

    Rows are copied into the process only when they take at most ``budget`` bytes. The order depends
    on the seed and the epoch alone.

    Args:
        first: Number of the first epoch, known when training has begun.
        endless: Whether shuffled batches go on from epoch to epoch, which spares a pipeline its start; only for
            those who tell ``fit`` how many make an epoch. Otherwise each pass over them is an epoch.

    Returns:
        A ``tf.data.Dataset`` on the TensorFlow backend; a ``keras.utils.PyDataset``, which is never endless, on
        the others.
    """
    features = joined(rows, tier, preprocess) if rows.nbytes(tier) <= budget else None
    if not _has_tf_data():
        return _Gathered(rows, tier, preprocess, features, batch, seed, first)
    return _tf_batches(rows, tier, preprocess, features, batch, seed, first, endless)


def _has_tf_data() -> bool:
    return bool(keras.backend.backend() == "tensorflow")


def targets(rows: OpenRows, tier: str) -> tuple[Any, ...]:
    """What follows x in a batch: ``(y,)``, or ``(y, weight)`` for train rows that have weights."""
    weights = rows.weights() if tier == "train" else None
    return (rows.labels(tier),) if weights is None else (rows.labels(tier), weights)


def _tf_batches(
    rows: OpenRows,
    tier: str,
    preprocess: Any,
    features: Any,
    batch: int,
    seed: int | None,
    first: Callable[[], int],
    endless: bool,
) -> Any:
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
        passes = itertools.count()

        def of_epoch(number: Any) -> np.ndarray:
            # Called when an epoch begins, by when a continued trial knows which one is its first.
            return order(count, seed, first() + (int(number) if endless else next(passes)))

        def shuffled(number: Any) -> Any:
            at = tf.ensure_shape(tf.numpy_function(of_epoch, [number], tf.int64), [count])
            return tf.data.Dataset.from_tensor_slices(at).batch(batch)

        index = (tf.data.Dataset.counter() if endless else tf.data.Dataset.range(1)).flat_map(shuffled)
        if not endless:
            index = index.apply(tf.data.experimental.assert_cardinality(math.ceil(count / batch)))
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
        first: Callable[[], int],
    ) -> None:
        super().__init__()
        self._rows, self._tier, self._preprocess, self._batch = rows, tier, preprocess, batch
        self._features, self._labels = features, targets(rows, tier)
        self._seed, self._epoch, self._first = seed, 0, first
        self._count, self._orders = rows.size(tier), (-1, np.arange(rows.size(tier)))

    def __len__(self) -> int:
        return math.ceil(self._count / self._batch)

    def _order(self) -> np.ndarray:
        """The rows of this epoch in their order, made when the first of them is asked for."""
        known, at = self._orders
        if self._seed is not None and known != (epoch := self._first() + self._epoch):
            at = order(self._count, self._seed, epoch)
            self._orders = (epoch, at)
        return at

    def __getitem__(self, number: int) -> Any:
        at = self._order()[number * self._batch : (number + 1) * self._batch]
        if self._features is not None:
            x = keras.tree.map_structure(lambda part: part[at], self._features)
        else:
            x = joined(self._rows, self._tier, self._preprocess, at)
        return (x, *keras.tree.map_structure(lambda part: part[at], self._labels))

    def on_epoch_end(self) -> None:
        """Shuffle for the next epoch."""
        self._epoch += 1

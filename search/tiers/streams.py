"""Rows that come in batches from functions of the module: read through twice, and spooled to disk as they come.

Afterwards they are arrays like any others, mapped from the disk: no trial calls such a function, the split and the
seal are as ever, and what a second pass would bring is known before the first trial instead of in the midst of one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from search.errors import DataError, HeldoutError
from search.tiers.rows import Array, Dataset, Hashes, Structure, row_hashes

_AGAIN = "it is called twice, and must open its source anew each time"


@dataclasses.dataclass
class _Batch:
    structure: Structure
    x: list[Array]
    y: Any
    weight: Any


class Spool:
    """Takes the rows of a Dataset's functions, tier by tier, into one file for each leaf of x.

    Args:
        parent: Gets a temporary folder, which goes when the spool is closed.
    """

    def __init__(self, parent: Path) -> None:
        self._parent, self._folder = parent, parent
        self._files: list[IO[bytes]] = []
        self._structure: Structure | None = None
        self._like: list[Array] = []
        self._count = 0
        self.parts = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            for file in self._files:
                file.close()  # which writes what is left, and so may fail as any other write
        finally:
            if self._folder != self._parent:
                shutil.rmtree(self._folder, ignore_errors=True)

    def taken(self, dataset: Dataset, tier: str) -> Dataset:
        """The Dataset with mapped arrays in place of what its function gives; as it is if it has none.

        Args:
            tier: "validation", "guard", "test", or "" for the rows that are yet to be divided.

        Raises:
            DataError: If the function gives no batches, others on the second pass, or labels where none may be.
            OSError: If they cannot be written.
        """
        name = f"{tier}.x" if tier else "x"
        if not callable(dataset.x):
            if hasattr(dataset.x, "element_spec") or _is_py_dataset(dataset.x):
                raise DataError(
                    f"{name} must be arrays, paths or a function, but is a {type(dataset.x).__name__}; give the "
                    "function that makes it, such as `x=lambda: dataset`"
                )
            return dataset
        labelled = dataset.y is None
        if labelled and tier in ("guard", "test"):
            raise DataError(
                f"{name} is a function, so the labels of {tier} must be given beside it as arrays, which are sealed: "
                f"{tier}=({getattr(dataset.x, '__name__', 'function')}, labels)"
            )
        start, seen, labels, weights = self._count, [], [], []
        for batch in _batches(dataset.x, name, labelled):
            seen.append(self._put(batch, name))
            labels.append(batch.y)
            weights.append(batch.weight)
        if not any(map(len, seen)):
            raise DataError(f"{name} must give rows, but {_called(dataset.x)} gave none")
        hashes = np.concatenate(seen)
        self._count += len(hashes)
        self.parts += 1
        self._see_it_repeats(dataset.x, name, labelled, hashes)
        known: dict[str, Any] = {"x": self._mapped(start, len(hashes))}
        if labelled:
            known["y"] = _stacked(labels, f"{tier}.y" if tier else "y")
            if any(weight is not None for weight in weights):
                known["sample_weight"] = _stacked(weights, f"{tier}.sample_weight" if tier else "sample_weight")
        return dataclasses.replace(dataset, **known)

    def whole(self) -> tuple[Array, ...] | None:
        """The leaves of all rows that were taken, in one; None if none were."""
        return tuple(self._leaves(0, self._count)) if self._count else None

    def _put(self, batch: _Batch, name: str) -> Hashes:
        """Write a batch of x; hashes of its rows."""
        if self._structure is None:
            self._parent.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix=".tmp-", dir=self._parent))
            self._structure, self._like = batch.structure, [leaf[:0].copy() for leaf in batch.x]
            self._files = [(self._folder / f"{k}.raw").open("wb") for k in range(len(batch.x))]
        leaves = self._fitting(batch, name)
        for file, leaf in zip(self._files, leaves, strict=True):
            file.write(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
        return _hashes(leaves, batch)

    def _fitting(self, batch: _Batch, name: str) -> list[Array]:
        """The leaves of a batch, of the kind that the first one had."""
        assert self._structure is not None
        if batch.structure != self._structure:
            raise DataError(
                f"every batch of {name} must have the inputs {', '.join(self._structure.names)}, but one has "
                f"{', '.join(batch.structure.names)}"
            )
        for leaf, like in zip(batch.x, self._like, strict=True):
            if leaf.shape[1:] != like.shape[1:] or not np.can_cast(leaf.dtype, like.dtype, "same_kind"):
                raise DataError(
                    f"every batch of {name} must have rows of one shape and dtype, but there are {like.dtype} of shape "
                    f"{like.shape[1:]} and {leaf.dtype} of shape {leaf.shape[1:]}"
                )
        return [leaf.astype(like.dtype, copy=False) for leaf, like in zip(batch.x, self._like, strict=True)]

    def _see_it_repeats(self, function: Callable[[], Any], name: str, labelled: bool, hashes: Hashes) -> None:
        """Read a second time and compare, without keeping anything.

        Raises:
            DataError: If there are more rows or fewer, or others.
        """
        count, alike = 0, True
        for batch in _batches(function, name, labelled):
            again = _hashes(self._fitting(batch, name), batch)
            alike = alike and np.array_equal(again, hashes[count : count + len(again)])
            count += len(again)
        if count != len(hashes):
            raise DataError(
                f"{name} must give the same rows on every pass, but {_called(function)} gave {len(hashes)} rows on the "
                f"first and {count} on the second; {_AGAIN}"
            )
        if not alike:
            raise DataError(
                f"{name} must give the same rows in the same order on every pass, but {_called(function)} did not; "
                "drop shuffle(), as training rows are shuffled anyway, and put random augmentation into the model"
            )

    def _mapped(self, start: int, count: int) -> Any:
        assert self._structure is not None
        return self._structure.packed(self._leaves(start, count))

    def _leaves(self, start: int, count: int) -> list[Array]:
        out: list[Array] = []
        for file, like in zip(self._files, self._like, strict=True):
            file.flush()
            width = int(np.prod(like.shape[1:], dtype=np.int64)) * like.dtype.itemsize
            shape = (count, *like.shape[1:])
            out.append(np.memmap(file.name, like.dtype, "r", start * width, shape))
        return out


def _batches(function: Callable[[], Any], name: str, labelled: bool) -> Iterator[_Batch]:
    """What one call of a function gives.

    Raises:
        DataError: If it raises, or gives something else than batches of numbers.
    """
    try:
        for batch in _raw(function(), name):
            yield _checked(batch, name, labelled)
    except (HeldoutError, MemoryError):
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise DataError(
            f"{name} must give batches, but {_called(function)} raised {type(error).__name__}: "
            f"{lines[0][:300] if lines else 'no message'}"
        ) from error


def _raw(made: Any, name: str) -> Iterator[Any]:
    endless = DataError(f"{name} must end after one pass over its rows, but goes on for ever; drop repeat()")
    if hasattr(made, "as_numpy_iterator"):
        if int(made.cardinality()) == -1:  # tf.data.INFINITE_CARDINALITY
            raise endless
        yield from made.as_numpy_iterator()
    elif _is_py_dataset(made):
        if made.num_batches is None:
            raise endless
        for number in range(made.num_batches):
            yield made[number]
    else:
        raise DataError(
            f"{name} must be a function that returns a tf.data.Dataset or a keras.utils.PyDataset, but it returned "
            f"{type(made).__name__}"
        )


def _checked(batch: Any, name: str, labelled: bool) -> _Batch:
    parts = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    if labelled and len(parts) not in (2, 3):
        raise DataError(
            f"{name} must give batches (x, y) or (x, y, sample_weight), but gave {_shown(batch)}; or give y= beside it"
        )
    if not labelled and len(parts) != 1:
        raise DataError(
            f"{name} must give features only, as y is given beside it, but gave {_shown(batch)}; give several inputs "
            "as a dict"
        )
    x = parts[0]
    if isinstance(x, dict):
        structure, leaves = Structure("dict", tuple(x)), list(x.values())
    elif isinstance(x, tuple | list):
        structure, leaves = Structure("tuple", tuple(f"x_{k}" for k in range(len(x)))), list(x)
    else:
        structure, leaves = Structure("array", ("x",)), [x]
    arrays = [np.asarray(leaf) for leaf in leaves]
    for array in arrays:
        if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
            raise DataError(f"{name} must give numbers of one shape, but gave {array.dtype}; encode text beforehand")
    counted = [*arrays, *(np.asarray(part) for part in _flat(parts[1:]))]
    if len({part.shape[:1] for part in counted}) != 1 or not counted[0].ndim:
        shapes = ", ".join(str(part.shape) for part in counted)
        raise DataError(f"{name} must give batches with one row per example, but gave shapes {shapes}; add .batch(256)")
    return _Batch(structure, arrays, parts[1] if labelled else None, parts[2] if len(parts) == 3 else None)


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        for part in value:
            yield from _flat(part)
    elif value is not None:
        yield value


def _hashes(leaves: list[Array], batch: _Batch) -> Hashes:
    return row_hashes([*leaves, *(np.asarray(part) for part in _flat((batch.y, batch.weight)))])


def _stacked(parts: list[Any], name: str) -> Any:
    """Labels or weights of all batches as arrays, in their structure."""
    first = parts[0]
    with contextlib.suppress(ValueError, TypeError, KeyError, IndexError):
        if isinstance(first, dict):
            return {key: np.concatenate([part[key] for part in parts]) for key in first}
        if isinstance(first, tuple | list):
            return tuple(np.concatenate([part[k] for part in parts]) for k in range(len(first)))
        return np.concatenate([np.asarray(part) for part in parts])
    raise DataError(f"{name} must be of one form and shape in every batch; check the function")


def _is_py_dataset(made: Any) -> bool:
    keras = sys.modules.get("keras")
    return keras is not None and isinstance(made, keras.utils.PyDataset)


def _called(function: Callable[[], Any]) -> str:
    return f"{getattr(function, '__name__', type(function).__name__)}()".replace("<lambda>()", "its lambda")


def _shown(batch: Any) -> str:
    if isinstance(batch, tuple | list):
        return f"{len(batch)} parts"
    return type(batch).__name__

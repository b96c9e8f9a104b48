"""Rows as ``load()`` returned them: the Dataset, its conversion to plain arrays, the identity of a row."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.errors import DataError
from search.tiers.files import Decode, Files

Array = NDArray[Any]
Hashes = NDArray[np.uint64]

_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True, eq=False)
class Dataset:
    """Every labelled row of a problem; the service splits, seals and shares them.

    Attributes:
        x: Features: one array of shape (rows, ...), or a dict or tuple of such arrays. Paths of files, one per row,
            for which the module has ``decode(path)``. Or a function that returns a ``tf.data.Dataset`` or a
            ``keras.utils.PyDataset`` of batches ``(x, y)`` or ``(x, y, sample_weight)``, and of batches ``x`` where
            ``y`` is given.
        y: Labels, in the same forms as ``x``; arrays, or None where batches bring them.
        groups: One value per row; rows with the same value never part (a patient, a site).
        time: One sortable value per row; given, tiers follow each other in time.
        sample_weight: One weight per row, for training only; no score is weighted.
        ids: One value per row that names it for good, so that it keeps its tier, and test rows their openings, when
            features change.
        validation: Rows to validate on, as a ``Dataset`` or ``(x, y)``; taken as given.
        test: Rows to test on, as a ``Dataset`` or ``(x, y)``; taken as given.
        prior_openings: How many times the test rows were used before the ledger knew them: by hand, with another
            tool, or in another form. It moves no row.
        guard: Rows to guard on, as a ``Dataset`` or ``(x, y)``; taken as given.
    """

    x: Any
    y: Any = None
    groups: Any = None
    time: Any = None
    sample_weight: Any = None
    ids: Any = None
    validation: Any = None
    test: Any = None
    prior_openings: int = 0
    guard: Any = None


@dataclass(frozen=True)
class Structure:
    """How leaves fit together: ``kind`` is "array", "dict" or "tuple", ``names`` has one entry per leaf."""

    kind: str
    names: tuple[str, ...]

    def packed(self, leaves: Sequence[Array]) -> Any:
        """The leaves in the structure that ``load()`` gave."""
        if self.kind == "dict":
            return dict(zip(self.names, leaves, strict=True))
        return tuple(leaves) if self.kind == "tuple" else leaves[0]


@dataclass(frozen=True, eq=False)
class Rows:
    """Checked rows: plain arrays of equal length.

    Attributes:
        x, y: Leaves of shape (rows, ...), native byte order, bool, integer, float or (x only) unicode or files.
        groups, time, ids: One value per row, or None.
        weight: float32 per row, or None.
    """

    x_structure: Structure
    x: tuple[Array | Files, ...]
    y_structure: Structure
    y: tuple[Array, ...]
    groups: Array | None
    time: Array | None
    ids: Array | None
    weight: Array | None

    def __len__(self) -> int:
        return len(self.x[0])


def read(dataset: Dataset, where: str = "", decode: Decode | None = None) -> Rows:
    """Convert a Dataset to plain arrays, and paths to files.

    Args:
        where: Prefix for names in messages, such as "test.".
        decode: The module's, if it has one: text in x are paths then.

    Raises:
        DataError: Unequal lengths, no rows, scalars, or values that are no array of numbers or text.
    """
    x_structure, x = _leaves(dataset.x, f"{where}x", lambda value, name: _features(value, name, decode))
    y_structure, y = _leaves(dataset.y, f"{where}y", _array)
    n = len(x[0])
    named = [*zip(_leaf_names(f"{where}x", x_structure), x, strict=True)]
    named += zip(_leaf_names(f"{where}y", y_structure), y, strict=True)
    for name, leaf in named:
        if len(leaf) != n:
            raise DataError(
                "x and y must have the same number of rows, "
                f"but {named[0][0]} has {n} and {name} has {len(leaf)}; check load()"
            )
    for name, leaf in zip(_leaf_names(f"{where}y", y_structure), y, strict=True):
        if leaf.dtype.kind == "U":
            raise DataError(
                f"labels must be numbers, but {name} holds text such as {str(leaf.flat[0])!r}; "
                "encode it with numpy.unique(labels, return_inverse=True)"
            )
        if not all_finite(leaf):
            bad = int((~np.isfinite(leaf.reshape(n, -1)).all(axis=1)).sum())
            raise DataError(
                f"labels must be finite, but {name} has NaN or infinity in {bad} of {n} rows; leave them out"
            )
    weight = _column(dataset.sample_weight, f"{where}sample_weight", n)
    if weight is not None:
        if weight.dtype.kind == "U" or (weight < 0).any():
            raise DataError(f"{where}sample_weight must be numbers of at least 0; check load()")
        weight = weight.astype(np.float32)
    return Rows(
        x_structure,
        x,
        y_structure,
        y,
        _column(dataset.groups, f"{where}groups", n),
        _column(dataset.time, f"{where}time", n),
        _column(dataset.ids, f"{where}ids", n),
        weight,
    )


def joined(parts: Sequence[Rows], names: Sequence[str], x: tuple[Array, ...] | None = None) -> Rows:
    """Several sets of rows as one, in order; the first says how the others must look.

    Columns that only some parts have are filled: weights with 1, others are dropped.

    Args:
        x: The leaves of all parts in one, where they are known so already.

    Raises:
        DataError: If a part has other inputs, outputs, shapes or kinds of numbers than the first.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    for part, name in zip(parts[1:], names[1:], strict=True):
        for side, ours, theirs in (
            ("x", (first.x_structure, first.x), (part.x_structure, part.x)),
            ("y", (first.y_structure, first.y), (part.y_structure, part.y)),
        ):
            _check_alike(f"{name}.{side}", side, ours, theirs)
    columns: dict[str, Array | None] = {}
    for column in ("groups", "time", "ids"):
        values = [getattr(part, column) for part in parts]
        columns[column] = None if any(value is None for value in values) else np.concatenate(values)
    weight = None
    if any(part.weight is not None for part in parts):
        ones = [np.ones(len(p), np.float32) if p.weight is None else p.weight for p in parts]
        weight = np.concatenate(ones)
    leaves = x or tuple(_stacked([p.x[k] for p in parts]) for k in range(len(first.x)))
    y = tuple(_stacked([p.y[k] for p in parts]) for k in range(len(first.y)))
    return Rows(first.x_structure, leaves, first.y_structure, y, weight=weight, **columns)


def _check_alike(name: str, side: str, ours: tuple[Structure, Any], theirs: tuple[Structure, Any]) -> None:
    if ours[0] != theirs[0]:
        raise DataError(
            f"{name} must have the same inputs and outputs as {side} ({', '.join(ours[0].names)}), "
            f"but has {', '.join(theirs[0].names)}; check load()"
        )
    for leaf_name, a, b in zip(_leaf_names(name, ours[0]), ours[1], theirs[1], strict=True):
        if isinstance(a, Files) != isinstance(b, Files):
            raise DataError(f"{leaf_name} and {side} must both hold paths, or neither; check load()")
        if isinstance(a, Files):
            continue  # not decoded yet
        if a.shape[1:] != b.shape[1:]:
            raise DataError(
                f"{leaf_name} must have rows of shape {a.shape[1:]} as {side} has, but has {b.shape[1:]}; check load()"
            )
        if (a.dtype.kind == "U") != (b.dtype.kind == "U") or not np.can_cast(b.dtype, a.dtype, "same_kind"):
            raise DataError(f"{leaf_name} must be {a.dtype} as {side} is, but is {b.dtype}; convert it in load()")


def _stacked(leaves: list[Any]) -> Any:
    if isinstance(leaves[0], Files):
        return leaves[0].joined(*leaves[1:])
    text = leaves[0].dtype.kind == "U"
    dtype = np.result_type(*leaves) if text else leaves[0].dtype
    return np.concatenate(leaves, dtype=dtype, casting="same_kind")


def all_finite(leaf: Array | Files) -> bool:
    """Whether no value is NaN or infinite, in an array of any shape or in what all files hold."""
    if isinstance(leaf, Files):
        return leaf.finite
    if leaf.dtype.kind != "f":
        return True
    return all(bool(np.isfinite(block).all()) for block in _blocks(leaf))


def _blocks(leaf: Array) -> Iterator[Array]:
    """Parts of a leaf that are small enough for a temporary copy."""
    step = max(1, _CHUNK_BYTES // max(1, leaf.nbytes // len(leaf)))
    for start in range(0, len(leaf), step):
        yield leaf[start : start + step]


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype") or hasattr(value, "to_numpy")


def _leaves(value: Any, name: str, leaf: Callable[[Any, str], Any]) -> tuple[Structure, tuple[Any, ...]]:
    """What a value is made of, each part by ``leaf``."""
    if value is None:
        raise DataError(f"{name} must be arrays, but is None; return Dataset(x, y) from load()")
    if isinstance(value, dict):
        if not value or not all(isinstance(key, str) for key in value):
            raise DataError(f"{name} must be a dict with the names of the model's inputs, but has {list(value)!r}")
        structure = Structure("dict", tuple(value))
        return structure, tuple(leaf(v, f"{name}[{k!r}]") for k, v in value.items())
    if isinstance(value, list | tuple) and value and all(_is_array(v) and np.ndim(v) for v in value):
        structure = Structure("tuple", tuple(f"{name.rpartition('.')[2]}_{k}" for k in range(len(value))))
        return structure, tuple(leaf(v, f"{name}[{k}]") for k, v in enumerate(value))
    return Structure("array", (name.rpartition(".")[2],)), (leaf(value, name),)


def _features(value: Any, name: str, decode: Decode | None) -> Array | Files:
    """One leaf of x: files where it holds paths, and else an array."""
    column = value.to_numpy() if hasattr(value, "to_numpy") else value
    if isinstance(column, list | tuple) or (isinstance(column, np.ndarray) and column.dtype.kind in "OU"):
        if len(column) and all(isinstance(one, os.PathLike) for one in column) and decode is None:
            raise DataError(
                f"{name} holds paths, so the module must say what a row is: add `def decode(path):`, which returns an "
                "array"
            )
        if decode is not None and len(column) and all(isinstance(one, str | os.PathLike) for one in column):
            return Files.given([os.fspath(one) for one in column], decode, name)
    return _array(value, name)


def _leaf_names(name: str, structure: Structure) -> list[str]:
    if structure.kind == "array":
        return [name]
    if structure.kind == "dict":
        return [f"{name}[{key!r}]" for key in structure.names]
    return [f"{name}[{k}]" for k in range(len(structure.names))]


def _array(value: Any, name: str) -> Array:
    """One plain array with at least one row."""
    try:
        array = value.to_numpy() if hasattr(value, "to_numpy") else np.asarray(value)
    except ValueError as error:
        raise DataError(
            f"{name} must have rows of one shape, but they differ ({error}); pad or cut them in load()"
        ) from error
    if array.ndim == 0:
        raise DataError(
            f"{name} must be an array with one entry per row, but got a single {type(value).__name__}; "
            "convert it to a NumPy array in load()"
        )
    if array.dtype.kind in "OT":
        array = _from_objects(array, name)
    if array.dtype.kind == "S":
        try:
            array = np.char.decode(array, "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{name} must hold UTF-8 text, but has other bytes; convert it in load()") from error
    if array.dtype.kind not in "biufU" or array.dtype.itemsize > 8 and array.dtype.kind == "f":
        raise DataError(f"{name} must hold numbers or text, but holds {array.dtype}; convert it in load()")
    if array.size == 0:
        raise DataError(f"{name} must have rows and columns, but has shape {array.shape}; check load()")
    return np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False))


def _from_objects(array: Array, name: str) -> Array:
    """An object array as numbers or as text, since objects can be neither mapped nor stored safely."""
    values = array.tolist()
    flat = array.ravel().tolist()
    if all(isinstance(v, str) for v in flat):
        return np.array(values, dtype=np.str_)
    odd = next((v for v in flat if isinstance(v, str | dict | set | bytes)), None)
    try:
        if odd is not None:
            raise ValueError(f"it mixes in {odd!r}")
        plain = np.array(values)
        # None among numbers is how pandas and databases spell a missing value.
        return plain.astype(np.float64) if plain.dtype.kind == "O" else plain
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{name} must be all numbers of one shape or all text, but is an object array that is neither "
            f"({error}); convert it in load()"
        ) from error


def _column(value: Any, name: str, n: int) -> Array | None:
    """One value per row, comparable with each other, or None."""
    if value is None:
        return None
    column = value.to_numpy() if hasattr(value, "to_numpy") else np.asarray(value)
    if column.dtype.kind in "mM":
        if np.isnat(column).any():
            raise DataError(f"{name} must have a value in every row, but has NaT; leave those rows out")
        column = column.astype(f"{column.dtype.kind}8[ns]").astype(np.int64)
    else:
        column = _array(column, name)
    if column.shape == (n, 1):
        column = column[:, 0]
    if column.shape != (n,):
        raise DataError(f"{name} must have one value for each of {n} rows, but has shape {column.shape}; check load()")
    if not all_finite(column):
        raise DataError(f"{name} must have a value in every row, but has NaN; leave those rows out")
    return column


def row_hashes(leaves: Sequence[Array | Files]) -> Hashes:
    """A 64-bit hash of every row over all leaves: dtype, shape and bytes; of a file its bytes alone.

    Negative zeros count as zeros. Text counts by its characters, not by the width of its column, so
    that a longer word elsewhere does not change a row.

    Returns:
        Shape (rows,).
    """
    head = hashlib.blake2b(digest_size=8)
    for leaf in leaves:
        if isinstance(leaf, Files):
            head.update(b"file;")
            continue
        dtype = "text" if leaf.dtype.kind == "U" else leaf.dtype.str
        head.update(f"{dtype}{leaf.shape[1:]};".encode())
    streams = [_row_bytes(leaf) for leaf in leaves]
    out = np.empty(len(leaves[0]), dtype=np.uint64)
    for number, parts in enumerate(zip(*streams, strict=True)):
        one = head.copy()
        for part in parts:
            one.update(part)
        out[number] = int.from_bytes(one.digest(), "little")
    return out


def _row_bytes(leaf: Array | Files) -> Iterator[Any]:
    if isinstance(leaf, Files):
        assert leaf.contents is not None
        yield from leaf.contents
        return
    for block in _blocks(leaf):
        if block.dtype.kind == "U":
            yield from (repr(row).encode() for row in block.tolist())
            continue
        plain = block + block.dtype.type(0) if block.dtype.kind == "f" else block
        flat = np.ascontiguousarray(plain).reshape(-1).view(np.uint8).data
        width = len(flat) // len(block)
        yield from (flat[at : at + width] for at in range(0, len(flat), width))


def value_hashes(values: Array) -> Hashes:
    """A 64-bit hash of every value of a column (ids or groups), the same for any width of its dtype."""
    return hashed(values.tolist(), lambda value: repr(value).encode())


def hashed(items: Sequence[Any], encode: Callable[[Any], bytes]) -> Hashes:
    """A 64-bit BLAKE2b hash of each item's bytes, shape (items,)."""
    digests = (hashlib.blake2b(encode(item), digest_size=8).digest() for item in items)
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def id_hashes(ids: Array) -> Hashes:
    """A 64-bit hash of every id, shape (rows,); an id is the same written as a number or as text."""
    # What ``row_hashes`` hashes begins with a dtype, so an id never passes for the values of a row.
    return hashed(ids.tolist(), lambda value: f"id:{value}".encode())


def are_running_numbers(ids: Array) -> bool:
    """Whether ids count rows, from 0 or from 1 in any order: they name rows of one file only."""
    try:
        numbers = np.sort(ids.astype(np.float64))
    except ValueError:
        return False
    return any(np.array_equal(numbers, np.arange(first, first + len(ids))) for first in (0, 1))


def fingerprint(hashes: Hashes) -> str:
    """SHA-256 over the sorted row hashes: the same whatever the order of the rows."""
    return hashlib.sha256(np.sort(hashes).astype("<u8").tobytes()).hexdigest()

"""Whether ``preprocess(train)`` learns from train rows alone, found out by changing all the others.

It is handed nothing else, but it can call ``load()``, read the file again, or use an array of the module. So it is
fitted a second time while every array that the module holds, or that a Python function returns to it, has other values
in the rows of validation, guard and test. What comes out for the same rows must be the same then.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from search.checks.findings import Finding, finding
from search.tiers.data import OpenRows, SealedRows
from search.tiers.rows import Array, Dataset, read, row_hashes

_CHECK = "preprocessing"
_PROBED = 512  # rows that both are applied to
_DEPTH = 3  # of containers that are looked into
_MOST_PARTS = 16
_MOST_VALUES = 50_000_000  # of features whose statistics are taken
_FEWEST = 2  # rows that make an array of rows


def run(module: Any, home: Path, sealed_home: Path) -> Finding:
    """Fit the module's preprocessing as it is, and again with the other rows changed.

    Args:
        module: The executed space module; its arrays are changed, so use it for nothing else afterwards.
        home: Where ``OpenRows`` are; sealed_home: where the ``SealedRows`` beside them are. Labels are not read.

    Returns:
        The finding ``preprocessing``.
    """
    rows, sealed = OpenRows(home, module.decode), SealedRows(sealed_home)
    if "files" in rows.manifest["x"]:
        return finding(_CHECK, None, "rows are files, which are not changed to see what it learns from")
    if (constant := _of_all_rows(module, rows, sealed)) is not None:
        cause = ("it was computed before the split", "compute it in preprocess(train), from train.x")
        return finding(_CHECK, False, constant, cause)
    if module.preprocess is None:
        return finding(_CHECK, True, "there is none: the module has no preprocess(train)")
    probe = [rows.features(tier, np.arange(min(_PROBED, rows.size(tier)))) for tier in ("train", "validation")]
    once, again = _outputs(module, rows, probe), _outputs(module, rows, probe)
    if not _alike(once, again):
        says = "preprocess(train) gives something else each time it is fitted on the same rows, so nothing can be told"
        return finding(_CHECK, None, says)
    loaded = module.load()
    if callable(loaded.x):
        return finding(_CHECK, None, "rows come from a function, so they are not changed to see what it learns from")
    others = _Others(rows, sealed, loaded)
    others.change(module.namespace)
    with others.changed_where_returned(os.path.dirname(module.problem.path) + os.sep):
        without = _outputs(module, rows, probe)
    if _alike(once, without):
        says = "fitted again with other values in the rows of validation, guard and test, it is the same"
        return finding(_CHECK, True, says)
    return finding(
        _CHECK,
        False,
        "fitted again with other values in the rows of validation, guard and test, it does something else to the same "
        "rows",
        (
            f"preprocess(train) learns from rows that it was not handed ({others.where})",
            "compute every statistic from `train`, its argument, alone",
        ),
    )


def _outputs(module: Any, rows: Any, probe: list[Any]) -> list[Array]:
    """What freshly fitted preprocessing makes of some rows."""
    import keras

    from search.harness import feeding

    keras.utils.set_random_seed(0)
    with module.blaming("preprocess(train)"):
        model = module.preprocess(rows.dataset("train"))
    found = [model.predict(feeding.as_fed(x), verbose=0, batch_size=1024) for x in probe]
    return [np.asarray(part) for part in keras.tree.flatten(found)]


def _alike(one: list[Array], other: list[Array]) -> bool:
    def same(a: Array, b: Array) -> bool:
        if a.shape != b.shape or a.dtype.kind not in "fiub":
            return bool(np.array_equal(a, b))
        return bool(np.allclose(a.astype(np.float64), b.astype(np.float64), rtol=1e-5, atol=1e-7, equal_nan=True))

    return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))


def _of_all_rows(module: Any, rows: Any, sealed: Any) -> str | None:
    """Which number of the module's is a statistic of all rows: taken when the module was executed, it does not change
    when it is fitted again. Whole numbers, which may be the known ends of a scale, are left out."""
    held = {}
    for name, value in module.namespace.items():
        if isinstance(value, np.ndarray | np.floating | float) and np.asarray(value).dtype.kind == "f":
            held[name] = np.squeeze(np.asarray(value, dtype=np.float64))
    held = {name: value for name, value in held.items() if not np.array_equal(value, np.round(value))}
    for leaf, test in zip(rows.pool(), _test_leaves(sealed), strict=True):
        if leaf.dtype.kind not in "fiu" or not held or leaf.size + test.size > _MOST_VALUES:
            continue
        everything = np.concatenate([leaf, test]).astype(np.float64)
        train = np.asarray(leaf[rows.index("train")], dtype=np.float64)
        for axis in sorted({(0,), tuple(range(leaf.ndim)), tuple(range(max(1, leaf.ndim - 1)))}):
            shape = tuple(size for at, size in enumerate(leaf.shape) if at not in axis and size != 1)
            if all(value.shape != shape for value in held.values()):
                continue
            for what, statistic in _STATISTICS.items():
                of_all, of_train = np.squeeze(statistic(everything, axis)), np.squeeze(statistic(train, axis))
                for name, value in held.items():
                    if value.shape != of_all.shape or np.allclose(of_all, of_train, rtol=1e-4):
                        continue
                    if np.allclose(value, of_all, rtol=1e-5, atol=0, equal_nan=True):
                        return f"the module's {name} is the {what} of all rows, test rows included, not of train rows"
    return None


def _test_leaves(sealed: Any) -> list[Array]:
    return [np.load(path, mmap_mode="r", allow_pickle=False) for path in sealed.feature_files()["paths"]]


_STATISTICS: dict[str, Callable[[Any, Any], Any]] = {
    "mean": lambda a, axis: a.mean(axis=axis),
    "standard deviation": lambda a, axis: a.std(axis=axis),
    "variance": lambda a, axis: a.var(axis=axis),
    "minimum": lambda a, axis: a.min(axis=axis),
    "maximum": lambda a, axis: a.max(axis=axis),
    "median": lambda a, axis: np.median(a, axis=axis),
}


class _Others:
    """The rows outside train, and changing them wherever they are found.

    They are known by their features, and in arrays as long as all rows of ``load()`` by their place.

    Attributes:
        where: Where they were found first, in words; what a function returned counts for more than what is there.
    """

    def __init__(self, rows: Any, sealed: Any, loaded: Any) -> None:
        self.where = "where is not known"
        self._leaves = []
        for leaf, test in zip(rows.pool(), _test_leaves(sealed), strict=True):
            known = row_hashes([_flat(leaf[rows.index("train")])])
            held = [leaf[rows.index("validation")], leaf[rows.index("guard")], np.asarray(test)]
            others = np.concatenate([row_hashes([_flat(part)]) for part in held])
            self._leaves.append((leaf.dtype, int(np.prod(leaf.shape[1:])), np.setdiff1d(others, known)))
        self._done: dict[int, Any] = {}
        first = read(loaded).x[0]
        self._in_order = self._by_features(first) if isinstance(first, np.ndarray) else None

    def change(self, namespace: Mapping[str, Any]) -> None:
        """Change such rows in everything that the module holds by name."""
        for name, value in reversed(list(namespace.items())):
            if not name.startswith("__") and self._changed(value):
                self.where = f"in the module's {name}"

    @contextlib.contextmanager
    def changed_where_returned(self, folder: str) -> Iterator[None]:
        """Change such rows in whatever a Python function returns meanwhile to the module, before that sees it.

        Args:
            folder: Of the module. What libraries return to each other is left alone.
        """

        def watch(frame: Any, event: str, value: Any) -> None:
            if event != "return" or value is None or isinstance(value, int | float | str | bytes):
                return
            caller = frame.f_back.f_code.co_filename if frame.f_back is not None else ""
            if not caller.startswith(folder) or "site-packages" in caller:
                return
            sys.setprofile(None)  # what is done to it calls functions as well
            try:
                name = frame.f_code.co_name
                if self._changed(value) and not name.startswith("_"):
                    returned.append(f"returned by {name}()")
            finally:
                sys.setprofile(watch)

        returned: list[str] = []
        sys.setprofile(watch)
        try:
            yield
        finally:
            sys.setprofile(None)
            self.where = next(iter(returned), self.where)

    def _changed(self, value: Any) -> bool:
        """Whether such rows were found in it, which then have other values; what is beside them goes along."""
        parts = [part for part in _parts(value, _DEPTH) if id(part) not in self._done]
        found = False
        for part in parts:
            at = self._places(part)
            if at is None or id(part) in self._done:
                continue
            for one in parts:
                if len(one) == len(part) and id(one) not in self._done and _spoil(one, at):
                    self._done[id(one)] = one  # held, so that no other gets its id
                    found = True
        return found

    def _places(self, part: Any) -> Array | None:
        """Which rows of an array or a frame are rows outside train; None if none is."""
        if self._in_order is not None and len(part) == len(self._in_order):
            return self._in_order
        return self._by_features(part) if isinstance(part, np.ndarray) else None

    def _by_features(self, array: Array) -> Array | None:
        for dtype, width, others in self._leaves:
            if array.size == len(array) * width and (array.dtype.kind in "biuf") == (dtype.kind in "biuf"):
                at = np.isin(row_hashes([_flat(array).astype(dtype)]), others)
                if at.any():
                    return at
        return None


def _parts(value: Any, depth: int) -> Iterator[Any]:
    """Arrays and frames of several rows in a value, and in the containers that functions return them in."""
    if isinstance(value, np.ndarray):
        if value.ndim and len(value) >= _FEWEST and value.dtype.kind in "biufUO":
            yield value
    elif type(value).__module__.partition(".")[0] == "pandas" and hasattr(value, "isetitem"):
        if len(value) >= _FEWEST:
            yield value
    elif depth:
        if isinstance(value, Dataset):
            value = (value.x, value.y, value.validation, value.test)
        elif isinstance(value, Mapping):
            value = tuple(value.values())
        if isinstance(value, tuple | list) and len(value) <= _MOST_PARTS:
            for part in value:
                yield from _parts(part, depth - 1)


def _flat(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(len(array), -1)


def _spoil(part: Any, at: Array) -> bool:
    """Put other values into some rows: far away, and text that occurs nowhere. Whether that could be done."""
    if not isinstance(part, np.ndarray):
        for number in range(part.shape[1]):
            column = np.array(part.iloc[:, number])
            if _spoil(column, at):
                part.isetitem(number, column)
        return True
    try:
        part.flags.writeable = True
    except ValueError:  # it is mapped from a file, or belongs to somebody else
        return False
    kind = part.dtype.kind
    if kind == "f":
        part[at] = part[at] * 3 + 1 + np.nanmax(np.abs(part))
    elif kind in "iu" and part.dtype.itemsize == 1:
        part[at] = np.iinfo(part.dtype).max - part[at]
    elif kind in "iu":
        part[at] = part[at] * 3 + 1 + np.abs(part).max()
    elif kind == "b":
        part[at] = ~part[at]
    else:
        part[at] = "\u2205"
    return True

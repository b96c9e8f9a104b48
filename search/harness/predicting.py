"""Predictions of a tier as files: at once where its rows fit into memory, streamed batch by batch where they don't."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import keras
import numpy as np

from search.errors import TrialFailed
from search.harness import training
from search.harness.feeding import as_fed
from search.scorer.scoring import in_order


def save(model: keras.Model, take: Callable[..., Any], count: int | None, folder: Path, stem: str) -> list[str]:
    """Predict rows and write one ``.npy`` per output, each whole or absent; the paths in order.

    Args:
        take: Gives features: of all rows, or of those whose numbers it is called with.
        count: How many rows there are, if they are too large to be in memory together.

    Raises:
        TrialFailed: ``invalid`` if the model returns another number of rows than it was given.
    """
    if count is None:
        return training.save_arrays(training.predict(model, take()), folder, stem)
    if keras.backend.backend() != "torch":
        model.steps_per_execution = 1
    training.forget_functions(model)
    batch = training.predict_batch(take(np.arange(1)))
    files: list[_Growing] = []
    try:
        for start in range(0, count, batch):
            at = np.arange(start, min(start + batch, count))
            out = model.predict_on_batch(as_fed(take(at)))
            arrays = [np.asarray(part) for part in in_order(out, sorted(out) if isinstance(out, dict) else [])]
            if not files:
                files = [_Growing(folder, f"{stem}_{k}", count, part) for k, part in enumerate(arrays)]
            for file, part in zip(files, arrays, strict=True):
                file.add(part)
        return [file.finished() for file in files]
    finally:
        for file in files:
            file.close()


class _Growing:
    """A ``.npy`` of which the number of rows is known beforehand, under a temporary name until it has them all."""

    def __init__(self, folder: Path, stem: str, count: int, like: np.ndarray) -> None:
        self._path, self._temporary = folder / f"{stem}.npy", folder / f".{stem}-{os.getpid()}.npy"
        self._count, self._like, self._rows = count, like, 0
        self._file: IO[bytes] = self._temporary.open("wb")
        header = {"descr": np.lib.format.dtype_to_descr(like.dtype), "fortran_order": False}
        np.lib.format.write_array_header_2_0(self._file, header | {"shape": (count, *like.shape[1:])})

    def add(self, rows: np.ndarray) -> None:
        if rows.shape[1:] != self._like.shape[1:]:
            raise TrialFailed(
                "invalid", f"every batch must be predicted alike, but {self._like.shape[1:]} and {rows.shape[1:]} came"
            )
        np.ascontiguousarray(rows, dtype=self._like.dtype).tofile(self._file)
        self._rows += len(rows)

    def finished(self) -> str:
        if self._rows != self._count:
            raise TrialFailed(
                "invalid",
                f"the model must return one row per example, but returned {self._rows} rows for {self._count}",
            )
        self._file.close()
        os.replace(self._temporary, self._path)
        return str(self._path)

    def close(self) -> None:
        """Remove what is not finished."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

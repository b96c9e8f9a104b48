"""Rows that are files: what they are known by, their neutral names in the workspace, and how they are decoded."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.errors import DataError

Decode = Callable[[str], Any]

_STAMPS = "stamps.npy"
_CONTENTS = "contents.npy"
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Numbered(Sequence[str]):
    """Paths of stored files, which are named by their row number alone."""

    folder: Path
    size: int
    suffix: str

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < self.size:
            raise IndexError(number)
        # A thousand in a folder: file systems and people get slow with more.
        return str(self.folder / f"{number // 1000:06d}" / f"{number:09d}{self.suffix}")


@dataclass(frozen=True, eq=False)
class Files:
    """A leaf of x whose rows are files; indexed by rows, it decodes them, as an array of shape (rows, ...).

    A row is known by the bytes of its file: neither its name nor what ``decode`` makes of it moves it to another tier.

    Attributes:
        paths: One per row.
        decode: The module's ``decode(path)``; None where labels alone are of interest.
        shape, dtype: Of all rows decoded; of no meaning before ``checked``.
        contents: BLAKE2b of each file, uint8 of shape (rows, 16); None of stored ones that were put together anew.
        decoded: A hash of each decoded row, uint64; None of stored ones.
        finite: Whether no decoded value is NaN or infinite.
        stamps: Size and time of change of each stored file, int64 of shape (rows, 2).
    """

    paths: Sequence[str]
    decode: Decode | None
    shape: tuple[int, ...] = ()
    dtype: np.dtype[Any] = np.dtype(np.uint8)
    contents: NDArray[np.uint8] | None = None
    decoded: NDArray[np.uint64] | None = None
    finite: bool = True
    stamps: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows decoded."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def suffix(self) -> str:
        """The end of the files' names if it is one for all; "" otherwise, since then it could tell their classes."""
        if isinstance(self.paths, Numbered):
            return self.paths.suffix
        found = {Path(path).suffix for path in self.paths}
        return found.pop() if len(found) == 1 else ""

    def __getitem__(self, rows: Any) -> NDArray[Any]:
        if self.decode is None:
            raise DataError("rows that are files need the module's decode(path) to be read")
        numbers = np.arange(len(self))[rows]
        out = np.empty((len(numbers), *self.shape[1:]), dtype=self.dtype)
        for at, number in enumerate(numbers.tolist()):
            path = self.paths[number]
            if not self._is_as_stored(number, path):
                raise DataError(f"a file of the rows must stay as it was stored, but {path} was changed; launch again")
            value = np.asarray(self.decode(path))
            if value.shape != self.shape[1:] or value.dtype != self.dtype:
                raise DataError(
                    f"decode(path) must return the same for a file each time, but returned {value.dtype} of shape "
                    f"{value.shape} for {path}, which was {self.dtype} of shape {self.shape[1:]}"
                )
            out[at] = value
        return out

    def _is_as_stored(self, number: int, path: str) -> bool:
        """By its size and time of change, or, if it was written again meanwhile, as by ``load()``, by what is in it."""
        if self.stamps is None or _stamp(path) == tuple(self.stamps[number].tolist()):
            return True
        if self.contents is None:
            return False
        try:
            return bool(digest(path).digest() == self.contents[number].tobytes())
        except OSError:
            return False

    # ── as the user gave them ────────────────────────────────────────────────────────────────────

    @classmethod
    def given(cls, paths: Sequence[str], decode: Decode, name: str) -> Files:
        """Files by their paths, read once to know them by their contents.

        Raises:
            DataError: If one is missing, is no file or cannot be read.
        """
        paths = [os.path.abspath(path) for path in paths]
        contents = np.empty((len(paths), 16), dtype=np.uint8)
        for at, path in enumerate(paths):
            try:
                contents[at] = np.frombuffer(digest(path).digest(), dtype=np.uint8)
            except OSError as error:
                raise DataError(
                    f"{name} must hold paths of files, as the module has decode(path), but {path} cannot be read "
                    f"({error.strerror or error}); check the paths in load()"
                ) from error
        return cls(paths, decode, (len(paths),), contents=contents)

    @classmethod
    def chained(cls, parts: Sequence[Files]) -> Files:
        """Stored files of several folders, in order, to be placed in another one."""
        paths = [path for part in parts for path in part.paths]
        return cls(paths, None, (len(paths), *parts[0].shape[1:]), parts[0].dtype)

    def joined(self, *others: Files) -> Files:
        """These files and others, in order."""
        contents = [part.contents for part in (self, *others) if part.contents is not None]
        paths = [path for part in (self, *others) for path in part.paths]
        return dataclasses.replace(self, paths=paths, shape=(len(paths),), contents=np.concatenate(contents))

    def checked(self, where: str) -> Files:
        """Decode every file once, under a neutral name as a trial will, and see that the rows fit together.

        Args:
            where: The module, for messages.

        Raises:
            DataError: Naming the file.
        """
        decoded = np.empty(len(self), dtype=np.uint64)
        first, finite = np.empty(0), True
        with tempfile.TemporaryDirectory(prefix="heldout-decode-") as scratch:
            neutral = Numbered(Path(scratch), len(self), self.suffix)
            for at, path in enumerate(self.paths):
                value = self._decoded(neutral[at], path, where)
                if at == 0:
                    first = value
                if (value.shape, value.dtype) != (first.shape, first.dtype):
                    raise DataError(
                        f"{where}: decode(path) must return rows of one shape and dtype, but returned {first.dtype} of "
                        f"shape {first.shape} for {self.paths[0]} and {value.dtype} of shape {value.shape} for {path}; "
                        "resize, pad or convert in decode"
                    )
                finite = finite and (value.dtype.kind != "f" or bool(np.isfinite(value).all()))
                plain = np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
                decoded[at] = int.from_bytes(hashlib.blake2b(plain, digest_size=8).digest(), "little")
        shape = (len(self), *first.shape)
        return dataclasses.replace(self, shape=shape, dtype=first.dtype, decoded=decoded, finite=finite)

    def _decoded(self, neutral: str, path: str, where: str) -> NDArray[Any]:
        assert self.decode is not None
        Path(neutral).parent.mkdir(exist_ok=True)
        os.symlink(path, neutral)
        try:
            value = np.asarray(self.decode(neutral))
        except MemoryError:
            raise
        except Exception as error:
            traceback.print_exc()
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            told = lines[0][:300].replace(neutral, os.path.basename(neutral)) if lines else "no message"
            raise DataError(
                f"{where}: decode(path) must take every file, but raised {type(error).__name__} for {path}: {told} "
                f"(it is given a neutral name, such as {os.path.basename(neutral)}: mend the file or decode, or leave "
                "the file out)"
            ) from error
        finally:
            os.unlink(neutral)
        if value.dtype.kind not in "biuf" or value.dtype.itemsize > 8 or value.size == 0:
            raise DataError(
                f"{where}: decode(path) must return one array of numbers, but returned {value.dtype} of shape "
                f"{value.shape} for {path}"
            )
        return value

    # ── in the workspace ─────────────────────────────────────────────────────────────────────────

    def order(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows by their contents: in a list that was made class by class, a row's number would tell its class."""
        assert self.contents is not None
        keys = self.contents[rows, :8].copy().view(">u8")[:, 0]
        return rows[np.argsort(keys, kind="stable")]

    def place(self, folder: Path, rows: NDArray[np.int64], own: int, mode: int = 0o644) -> None:
        """Put files into a folder under neutral names.

        As hard links where the disk allows it, so that large data are there once; the last ``own`` as copies, which
        have nothing in common with the file that is named after its class, not even the time of its last change.

        Raises:
            OSError: The disk is full or the folder cannot be written.
        """
        named = Numbered(folder, len(rows), self.suffix)
        stamps = np.empty((len(rows), 2), dtype=np.int64)
        folder.mkdir(exist_ok=True)
        for at, row in enumerate(rows.tolist()):
            to = named[at]
            if at % 1000 == 0:
                os.mkdir(os.path.dirname(to))
            source = os.path.realpath(self.paths[row])
            if at < len(rows) - own:
                with contextlib.suppress(OSError):  # another disk, or a file that is not ours
                    os.link(source, to)
            if not os.path.exists(to):
                shutil.copyfile(source, to)
                os.chmod(to, mode)
            stamps[at] = _stamp(to)
        with open(folder / _STAMPS, "wb") as file:
            np.save(file, stamps, allow_pickle=False)
        if self.contents is not None:
            with open(folder / _CONTENTS, "wb") as file:
                np.save(file, self.contents[rows], allow_pickle=False)

    @classmethod
    def stored(cls, folder: Path, spec: dict[str, Any], decode: Decode | None) -> Files:
        """Files as ``place`` left them; ``spec``: see ``spec``."""
        stamps = np.load(folder / _STAMPS, mmap_mode="r", allow_pickle=False)
        paths = Numbered(folder, len(stamps), spec["suffix"])
        shape, known = (len(stamps), *spec["shape"]), folder / _CONTENTS
        contents = np.load(known, mmap_mode="r", allow_pickle=False) if known.exists() else None
        return cls(paths, decode, shape, np.dtype(spec["dtype"]), contents=contents, stamps=stamps)

    def spec(self) -> dict[str, Any]:
        """What is to be known of stored files, JSON: ``suffix`` of their names; ``shape`` and ``dtype`` of a row."""
        return {"suffix": self.suffix, "shape": list(self.shape[1:]), "dtype": str(self.dtype)}


def digest(path: str | os.PathLike[str]) -> Any:
    """A BLAKE2b object of 16 bytes that has read the file.

    Raises:
        OSError: If it cannot be read, or is a folder.
    """
    out = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while part := file.read(_READ_BYTES):
            out.update(part)
    return out


def _stamp(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns

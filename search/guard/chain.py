"""The hash-chained file: lines of JSON that are appended whole or not at all, with sets of row hashes beside it.

Each line holds the hash of the line before it, so no line can be changed, dropped or moved unseen. Rows lie
in ``FILE.rows/DIGEST.npy`` under the digest that a line names. What the lines mean is the ledger's.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from search.errors import RequestError

Hashes = NDArray[np.uint64]
Line = dict[str, Any]

_GENESIS = "0" * 64


class Chain:
    """The file at ``path``; any number of processes may use it at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows = path.with_name(f"{path.name}.rows")
        self.shown = str(path)

    def lines(self) -> tuple[Line, ...]:
        """All lines in order, checked; none if there is no file.

        Raises:
            RequestError: If the chain is broken or the file cannot be read.
        """
        try:
            with open(self.path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH)
                return self._read(file.read())
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise self._unusable(error) from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[tuple[int, tuple[Line, ...]]]:
        """The file, locked for this process alone, and its checked lines; for ``add``.

        Raises:
            RequestError: As ``lines``.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError as error:
            raise self._unusable(error) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file, self._read(self.path.read_bytes())
        finally:
            os.close(file)

    def add(self, file: int, lines: tuple[Line, ...], body: Mapping[str, Any], undone: str) -> None:
        """Append one line, whole and on disk, or not at all.

        Args:
            file, lines: What ``locked`` gave.
            body: JSON; ``number``, ``previous`` and ``hash`` are put around it.
            undone: What to say has not been done if it fails.

        Raises:
            RequestError: If the disk is full or the file cannot be written; it is as before then.
        """
        left = memoryview(following(lines, body).encode() + b"\n")
        size = os.fstat(file).st_size
        try:
            while left:
                left = left[os.write(file, left) :]
            os.fsync(file)
        except BaseException as error:
            os.ftruncate(file, size)
            if isinstance(error, OSError):
                raise self._unusable(error, undone) from error
            raise

    def keep_rows(self, hashes: Hashes, undone: str) -> str:
        """Write row hashes, sorted, beside the file; the digest that a line must name them by.

        Raises:
            RequestError: As ``add``.
        """
        hashes = np.sort(hashes).astype("<u8")
        digest = digest_of(hashes)
        path = self._rows / f"{digest}.npy"
        temporary = self._rows / f".{digest}-{os.getpid()}.npy"
        try:
            # Features of guard rows are open, so their hashes would let anyone who reads them try out labels.
            self._rows.mkdir(exist_ok=True, mode=0o700)
            if not path.exists():
                with open(temporary, "wb") as file:
                    np.save(file, hashes, allow_pickle=False)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
        except OSError as error:
            raise self._unusable(error, undone) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        return digest

    def rows(self, line: Line) -> Hashes:
        """The row hashes that a line names under ``rows``, sorted.

        Raises:
            RequestError: If they are gone or were changed.
        """
        path = self._rows / f"{line['rows']}.npy"
        try:
            hashes = cast(Hashes, np.load(path, allow_pickle=False))
        except (OSError, ValueError) as error:
            raise self._broken(line["number"], f"names rows in {path}, which cannot be read") from error
        if digest_of(hashes) != line["rows"]:
            raise self._broken(line["number"], f"names rows in {path}, which was changed")
        return hashes

    def _read(self, content: bytes) -> tuple[Line, ...]:
        *whole, tail = content.split(b"\n")
        return checked([*whole, tail] if tail else whole, len(whole), self._broken)

    def _broken(self, number: int, what: str) -> RequestError:
        return RequestError(
            f"the ledger {self.path} must be an unbroken chain, but line {number} {what}; restore it from "
            "a backup, or set HELDOUT_LEDGER to a new file and say that earlier openings are not counted"
        )

    def _unusable(self, error: OSError, undone: str = "nothing was opened") -> RequestError:
        return RequestError(
            f"test openings must be recorded in {self.path}, but {error.strerror or error}; {undone}, so make "
            "room or give access there, or set HELDOUT_LEDGER to a file that can be written"
        )


def following(lines: Sequence[Line], body: Mapping[str, Any]) -> str:
    """The text of the line that comes after these: ``number``, ``previous`` and ``hash`` around ``body``."""
    line = {"number": len(lines) + 1, "previous": lines[-1]["hash"] if lines else _GENESIS, **body}
    line = json.loads(json.dumps(line))
    return json.dumps(line | {"hash": _hash(line)})


def checked(
    texts: Sequence[bytes | str], whole: int, broken: Callable[[int, str], RequestError]
) -> tuple[Line, ...]:
    """The lines that these texts are, in order.

    Args:
        whole: How many of them are known to be written to their end.
        broken: Makes the error for a line that was changed or does not follow.
    """
    lines: list[Line] = []
    previous = _GENESIS
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            claimed = line.pop("hash")
            sound = claimed == _hash(line) and line["number"] == number and number <= whole
        except (ValueError, KeyError, TypeError, AttributeError):
            sound = False
        if not sound:
            raise broken(number, "was changed or cut short")
        if line["previous"] != previous:
            raise broken(number, "does not follow from the line before it")
        previous = claimed
        lines.append(line | {"hash": claimed})
    return tuple(lines)


def digest_of(hashes: Hashes) -> str:
    """The name of a sorted set of row hashes."""
    return hashlib.sha256(hashes.astype("<u8").tobytes()).hexdigest()


def _hash(line: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(line, sort_keys=True).encode()).hexdigest()

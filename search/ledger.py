"""The record of test openings: one hash-chained, append-only file per user, whatever the workspace.

Each line is a JSON object that holds the hash of the line before it. An ``opening`` line is on disk before
the seal is touched, so a crash after it counts as an opening; a ``result`` line follows with what was
found. Hashes of the rows that were opened lie beside the file, so that rows are known again when
they come in another order, or with some of them dropped or added. It keeps honest people honest:
whoever can write the file can also write another one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from search.errors import RequestError

Hashes = NDArray[np.uint64]

SAME_ROWS = 0.2  # share of rows opened before from which a test set is not a new one

_GENESIS = "0" * 64
_OURS = frozenset({"kind", "number", "previous", "hash", "opening", "rows"})


class Ledger:
    """The ledger at ``path``, by default ``HELDOUT_LEDGER`` or a file in the user's data folder.

    Any number of processes may use it at once.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = default_path() if path is None else Path(path)
        self._rows = self.path.with_name(f"{self.path.name}.rows")

    def entries(self) -> tuple[dict[str, Any], ...]:
        """All lines in order, after checking the chain.

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

    def verify(self) -> int:
        """Check the chain and the rows beside it; the number of lines.

        Raises:
            RequestError: If a line or a row file is missing or was changed, saying which and what to do.
        """
        entries = self.entries()
        for entry in entries:
            if entry["kind"] == "opening":
                self._opened(entry)
        return len(entries)

    def openings(self, row_hashes: Hashes, fingerprint: str) -> int:
        """How many times these test rows have been opened, in any study.

        Rows inherit the openings of every test set that shares a fifth of them or more.

        Args:
            row_hashes: One per test row; fingerprint: of these rows.
        """
        return self._count(self.entries(), row_hashes, fingerprint)

    def append(self, entry: Mapping[str, Any], row_hashes: Hashes, *, expected: int | None = None) -> int:
        """Enter an opening, on disk when this returns; open the seal only then.

        Args:
            entry: JSON with at least ``fingerprint`` and ``frozen`` (the hash of the frozen selection).
            row_hashes: One per test row.
            expected: The opening the caller has announced, to be refused if another study was faster.

        Returns:
            The how-manieth opening of these rows this is, from 1.

        Raises:
            RequestError: If the chain is broken, the disk is full, or it is not the expected opening.
                Nothing has been entered then.
        """
        if clash := _OURS & set(entry):
            raise ValueError(f"an entry must leave {', '.join(sorted(_OURS))} to the ledger, but has {sorted(clash)}")
        with self._locked() as (file, entries):
            number = self._count(entries, row_hashes, entry["fingerprint"]) + 1
            if expected is not None and number != expected:
                raise RequestError(
                    f"this must be opening {expected} of these test rows, but another study has opened them "
                    f"meanwhile and it would be opening {number}; run the evaluation again to have it counted"
                )
            rows = self._keep(np.sort(row_hashes).astype("<u8"))
            self._chain(file, entries, {"kind": "opening", "opening": number, "rows": rows, **entry})
        return number

    def record_result(self, opening: int, frozen: str, result: Mapping[str, Any]) -> None:
        """Keep what an opening has shown, so that asking again opens nothing.

        Args:
            opening: What ``append`` returned; frozen: the hash in that entry.
            result: JSON.
        """
        with self._locked() as (file, entries):
            if not any(e["kind"] == "opening" and e["opening"] == opening and e["frozen"] == frozen for e in entries):
                raise ValueError(f"a result must belong to an opening, but there is no opening {opening} of {frozen}")
            self._chain(file, entries, {"kind": "result", "opening": opening, "frozen": frozen, "result": result})

    def find(self, frozen: str) -> dict[str, Any] | None:
        """The recorded result of a frozen selection, or None if none was recorded."""
        found = [e["result"] for e in self.entries() if e["kind"] == "result" and e["frozen"] == frozen]
        return found[-1] if found else None

    def _count(self, entries: tuple[dict[str, Any], ...], row_hashes: Hashes, fingerprint: str) -> int:
        before = []
        shares: dict[str, float] = {}
        for entry in entries:
            if entry["kind"] != "opening":
                continue
            if entry["rows"] not in shares:
                shares[entry["rows"]] = float(np.isin(row_hashes, self._opened(entry)).mean())
            if entry["fingerprint"] == fingerprint or shares[entry["rows"]] >= SAME_ROWS:
                before.append(int(entry["opening"]))
        # A test set that grew out of a used one has that one's count, even where the first rows are gone.
        return max([len(before), *before])

    def _opened(self, entry: Mapping[str, Any]) -> Hashes:
        path = self._rows / f"{entry['rows']}.npy"
        try:
            hashes = cast(Hashes, np.load(path, allow_pickle=False))
        except (OSError, ValueError) as error:
            raise self._broken(entry["number"], f"names rows in {path}, which cannot be read") from error
        if _digest(hashes) != entry["rows"]:
            raise self._broken(entry["number"], f"names rows in {path}, which was changed")
        return hashes

    def _keep(self, hashes: Hashes) -> str:
        """Write row hashes beside the ledger under their digest."""
        digest = _digest(hashes)
        path = self._rows / f"{digest}.npy"
        temporary = self._rows / f".{digest}-{os.getpid()}.npy"
        try:
            self._rows.mkdir(exist_ok=True)
            if not path.exists():
                with open(temporary, "wb") as file:
                    np.save(file, hashes, allow_pickle=False)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
        except OSError as error:
            raise self._unusable(error) from error
        finally:
            temporary.unlink(missing_ok=True)
        return digest

    @contextlib.contextmanager
    def _locked(self) -> Iterator[tuple[int, tuple[dict[str, Any], ...]]]:
        """The file, locked for this process alone, and its checked lines."""
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

    def _chain(self, file: int, entries: tuple[dict[str, Any], ...], body: Mapping[str, Any]) -> None:
        """Append one line, whole and on disk, or not at all."""
        line = {"number": len(entries) + 1, "previous": entries[-1]["hash"] if entries else _GENESIS, **body}
        line = json.loads(json.dumps(line))
        left = memoryview(json.dumps(line | {"hash": _hash(line)}).encode() + b"\n")
        size = os.fstat(file).st_size
        try:
            while left:
                left = left[os.write(file, left) :]
            os.fsync(file)
        except BaseException as error:
            os.ftruncate(file, size)
            if isinstance(error, OSError):
                raise self._unusable(error) from error
            raise

    def _read(self, content: bytes) -> tuple[dict[str, Any], ...]:
        entries: list[dict[str, Any]] = []
        previous = _GENESIS
        *lines, tail = content.split(b"\n")
        for number, raw in enumerate([*lines, tail] if tail else lines, start=1):
            try:
                line = json.loads(raw)
                claimed = line.pop("hash")
                sound = claimed == _hash(line) and line["number"] == number and number <= len(lines)
            except (ValueError, KeyError, TypeError, AttributeError):
                sound = False
            if not sound:
                raise self._broken(number, "was changed or cut short")
            if line["previous"] != previous:
                raise self._broken(number, "does not follow from the line before it")
            previous = claimed
            entries.append(line | {"hash": claimed})
        return tuple(entries)

    def _broken(self, number: int, what: str) -> RequestError:
        return RequestError(
            f"the ledger {self.path} must be an unbroken chain, but line {number} {what}; restore it from "
            "a backup, or set HELDOUT_LEDGER to a new file and say that earlier openings are not counted"
        )

    def _unusable(self, error: OSError) -> RequestError:
        return RequestError(
            f"test openings must be recorded in {self.path}, but {error.strerror or error}; nothing was "
            "opened, so make room or give access there, or set HELDOUT_LEDGER to a file that can be written"
        )


def default_path() -> Path:
    """``HELDOUT_LEDGER``, or ``ledger.jsonl`` in the user's data folder."""
    given = os.environ.get("HELDOUT_LEDGER")
    if given:
        return Path(given).expanduser()
    import platformdirs

    return Path(platformdirs.user_data_dir("heldout")) / "ledger.jsonl"


def _hash(line: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(line, sort_keys=True).encode()).hexdigest()


def _digest(hashes: Hashes) -> str:
    return hashlib.sha256(hashes.astype("<u8").tobytes()).hexdigest()

"""The second record of a journal: a file of lines beside it, by which a loss is noticed and made good.

SQLite loses committed transactions without a word when its log (``-wal``) is cut short or changed, and has no
checksums of what its pages say. So each row of ``events`` and ``guards`` and each put of ``meta`` is a line here
too, appended and synced once per commit, after SQLite's own: SQLite always has at least what this file has. If
it has less, something was lost. ``reports`` are not copied: they are many, and no result depends on them.

A line is ``{"v":2,"seq":7,"table":"events","row":[…],"sum":"…"}``. ``v`` is the schema of the journal, ``sum`` a
checksum of all that comes before it. ``seq`` counts events, guard scores and puts of meta together, without gaps;
SQLite's own count follows from its rows (``length``). A copy that was made anew has no superseded meta values
and starts at a higher number.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from search.errors import DamagedError, RequestError

COLUMNS = {
    "meta": "key, value, at, put",
    "events": "id, at, kind, trial, body",
    "guards": "trial, attempt, at, body",
}
_MARK = b',"sum":"'

Row = tuple[Any, ...]
Rows = dict[str, dict[Any, Row]]  # by table, then by what names a row in it


def beside(path: Path) -> Path:
    """Where the second record of this journal is: ``journal.copy.jsonl`` for ``journal.sqlite``."""
    return path.with_suffix(".copy.jsonl")


def key(table: str, row: Row) -> Any:
    """What names a row in its table."""
    return row[:2] if table == "guards" else row[0]


def length(rows: Rows) -> int:
    """How many records there have been, superseded meta values included."""
    puts = max((row[3] for row in rows["meta"].values()), default=0)
    return int(max(rows["events"], default=0) + len(rows["guards"]) + puts)


def load(connection: sqlite3.Connection) -> Rows:
    """All rows of SQLite's that are copied, as of one moment."""
    connection.execute("BEGIN")
    try:
        found = {table: connection.execute(select(connection, table)).fetchall() for table in COLUMNS}
    finally:
        connection.execute("ROLLBACK")
    return {table: {key(table, row): row for row in found[table]} for table in COLUMNS}


def select(connection: sqlite3.Connection, table: str) -> str:
    """The query for a table's rows as they are copied."""
    if table == "meta" and not any(row[1] == "put" for row in connection.execute("PRAGMA table_info(meta)")):
        # Version 1 did not count puts.
        return "SELECT key, value, at, row_number() OVER (ORDER BY at, key) FROM meta"
    return f"SELECT {COLUMNS[table]} FROM {table}"


@dataclass
class Content:
    """What a copy says.

    Attributes:
        rows: Of its sound lines; the last put of each meta key.
        last: ``seq`` of the last sound line, 0 without one.
        bound: Records that SQLite must have, at least: what follows the last sound line was one too.
        is_sound: Whether there is no line that is cut short, changed or left out.
        version: Schema of the journal when the last sound line was written.
    """

    rows: Rows = field(default_factory=lambda: {table: {} for table in COLUMNS})
    last: int = 0
    bound: int = 0
    is_sound: bool = True
    version: int | None = None


def read(path: Path) -> Content | None:
    """The copy of the journal at ``path``, None if there is none.

    Raises:
        RequestError: If the file is there and cannot be read.
    """
    try:
        *whole, tail = beside(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RequestError(f"{beside(path)} must be open to you, but: {error.strerror}; see to it") from error
    found = Content()
    for number, raw in enumerate([*whole, tail] if tail else whole):
        line = _parsed(raw) if number < len(whole) else None
        if line is None:
            found.is_sound, found.bound = False, found.last + 1
            continue
        if found.version is not None and line["seq"] != found.last + 1:
            found.is_sound = False
        found.version, found.last = line["v"], max(found.last, line["seq"])
        found.bound = found.last
        if line["table"] in COLUMNS:
            row = tuple(line["row"])
            found.rows[line["table"]][key(line["table"], row)] = row
    return found


def compare(path: Path, connection: sqlite3.Connection) -> Content | None:
    """The copy, read before SQLite's rows so that a writer at work disturbs nothing; None if there is none.

    Raises:
        DamagedError: If SQLite lacks something that the copy has, or has it otherwise.
        RequestError: If the copy cannot be read.
    """
    copied = read(path)
    if copied is None:
        return None
    rows = load(connection)
    lacking = [(table, row) for table in COLUMNS for row in copied.rows[table].values() if not _has(rows, table, row)]
    missing = max(len(lacking), copied.bound - length(rows))
    if missing > 0:
        trials = {row[3] if table == "events" else row[0] for table, row in lacking if table != "meta"} - {None}
        raise DamagedError(
            f"{path} must have all that {beside(path).name} has, but {missing} records are missing or changed, of "
            f"{len(trials) or 'no'} trial{'s' * (len(trials) != 1)}; run `heldout repair {path.parent.name}`"
        )
    copied.is_sound = copied.is_sound and copied.last == length(rows)
    return copied


def _has(rows: Rows, table: str, row: Row) -> bool:
    known = rows[table].get(key(table, row))
    return known == row or (table == "meta" and known is not None and known[3] > row[3])


class Copy:
    """The copy of a journal that is open for writing; brought up to date when made.

    Args:
        path: The journal's.
        connection: To the journal; asked for all rows when the copy has to be written anew.
        version: The journal's schema.

    Raises:
        DamagedError: As ``compare``.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, version: int) -> None:
        self.path = beside(path)
        self._connection = connection
        self._version = version
        self._file = -1
        self._size = 0
        self._seq = -1  # of the last line; below 0 while SQLite may have records that the file lacks
        copied = compare(path, connection)
        with contextlib.suppress(OSError, sqlite3.Error):
            if copied is not None and copied.is_sound and copied.version in (version, None):
                self._reopen(copied.last)
            else:
                self._write_anew()

    @contextlib.contextmanager
    def following(self, records: Sequence[tuple[str, Row]]) -> Iterator[None]:
        """Surrounds SQLite's commit of these records (table and row), and then adds them.

        A disk that is full, or any other trouble with this file, must not fail what SQLite has taken: the file
        is then behind, and written anew from SQLite at the next commit or opening.
        """
        if not records and self._seq >= 0:
            yield
            return
        seq, self._seq = self._seq, -1
        yield
        with contextlib.suppress(OSError, sqlite3.Error):
            if seq < 0 or not self._is_as_left():
                self._write_anew()
                return
            lines = [_line(self._version, seq + i, *record) for i, record in enumerate(records, 1)]
            _write(self._file, lines)
            self._size += sum(map(len, lines))
            self._seq = seq + len(lines)

    def close(self) -> None:
        """Gives the file back; closing twice does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _is_as_left(self) -> bool:
        """Whether nobody else has written, moved or removed the file."""
        try:
            ours, there = os.fstat(self._file), os.stat(self.path)
        except OSError:
            return False
        return (ours.st_ino, ours.st_size) == (there.st_ino, self._size)

    def _write_anew(self) -> None:
        self._reopen(write(self.path, lambda: load(self._connection), self._version))

    def _reopen(self, seq: int) -> None:
        self.close()
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        self._size = os.fstat(self._file).st_size
        self._seq = seq


def write(path: Path, rows: Callable[[], Rows], version: int) -> int:
    """Writes a whole copy, which appears complete or not at all, and returns its last ``seq``.

    Args:
        path: The copy's own.
        rows: Is asked once the file could be made: where nothing can be written there is no need to read.
    """
    draft = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)  # guard scores are in it
        try:
            known = rows()
            _write(file, _lines(known, version))
        finally:
            os.close(file)
        os.replace(draft, path)
        sync(path.parent)
        return length(known)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def sync(folder: Path) -> None:
    """Makes a rename in the folder last."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _lines(rows: Rows, version: int) -> Iterator[bytes]:
    meta = sorted(rows["meta"].values(), key=lambda row: int(row[3]))
    records = [("meta", row) for row in meta]
    records += [(table, rows[table][name]) for table in ("events", "guards") for name in sorted(rows[table])]
    start = length(rows) - len(records) + 1
    return (_line(version, seq, *record) for seq, record in enumerate(records, start))


def _line(version: int, seq: int, table: str, row: Row) -> bytes:
    said = {"v": version, "seq": seq, "table": table, "row": row}
    head = json.dumps(said, separators=(",", ":"))[:-1].encode()
    return head + _MARK + _sum(head) + b'"}\n'


def _parsed(raw: bytes) -> dict[str, Any] | None:
    head, mark, tail = raw.rpartition(_MARK)
    if not mark or tail != _sum(head) + b'"}':
        return None
    line: dict[str, Any] = json.loads(head + b"}")
    return line


def _sum(head: bytes) -> bytes:
    return hashlib.blake2b(head, digest_size=8).hexdigest().encode()


def _write(file: int, lines: Iterable[bytes]) -> None:
    content = memoryview(b"".join(lines))
    while content:
        content = content[os.write(file, content) :]
    os.fsync(file)

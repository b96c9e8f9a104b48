"""The journal's SQLite file: its tables and settings, making it whole, opening and checking it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from search.errors import RequestError

SCHEMA_VERSION = 1
_APPLICATION_ID = 0x48454C44  # "HELD": tells our file from any other SQLite file, also to `file`

_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL, at REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE events (
    id INTEGER PRIMARY KEY, at REAL NOT NULL, kind TEXT NOT NULL, trial INTEGER, body TEXT NOT NULL
);
CREATE TABLE reports (
    id INTEGER PRIMARY KEY, trial INTEGER NOT NULL, attempt INTEGER NOT NULL, step INTEGER NOT NULL,
    at REAL NOT NULL, metrics TEXT NOT NULL, UNIQUE (trial, attempt, step)
);
CREATE TABLE guards (
    trial INTEGER NOT NULL, attempt INTEGER NOT NULL, at REAL NOT NULL, body TEXT NOT NULL,
    PRIMARY KEY (trial, attempt)
) WITHOUT ROWID;
"""

_PRAGMAS = (
    # Readers (status, the tracker, a second terminal) never wait for the driver, nor it for them.
    "PRAGMA journal_mode = WAL",
    # In WAL mode NORMAL syncs at checkpoints only: a power cut would lose trials already told to
    # the sampler. FULL syncs the log at every commit, about a millisecond against a trial's seconds.
    "PRAGMA synchronous = FULL",
)
# Seconds to wait for a lock: another command may be putting a meta value, or a copy being taken.
_BUSY_SECONDS = 30.0
# Bytes under which a failed write is put down to a full disk.
_LEAST_ROOM = 1 << 20


def make(path: Path, meta: Mapping[str, str], at: float) -> None:
    """Makes a new file with these meta rows; it appears complete or not at all.

    Raises:
        RequestError: If there is a file already, or none can be written there.
    """
    if path.exists():
        raise RequestError(f"a new study must not have a journal, but {path} exists; choose another name")
    draft = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        with contextlib.closing(sqlite3.connect(draft, isolation_level=None)) as connection:
            for pragma in _PRAGMAS:
                connection.execute(pragma)
            connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            connection.executescript(_TABLES)
            rows = [(key, value, at) for key, value in meta.items()]
            connection.execute("BEGIN")
            connection.executemany("INSERT INTO meta VALUES (?, ?, ?)", rows)
            connection.execute("COMMIT")
        os.replace(draft, path)
    except (sqlite3.Error, OSError) as error:
        raise RequestError(f"{path} must be writable, but: {error}; choose another workspace") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def connect(path: Path, read_only: bool) -> sqlite3.Connection:
    """A connection in autocommit mode to a checked file.

    Raises:
        RequestError: If there is no file, it is damaged or not a journal, or a newer version wrote it.
    """
    if not path.is_file():
        raise RequestError(f"a study must have a journal, but there is no {path}; check name and workspace")
    try:
        connection = _connect(path, read_only)
    except sqlite3.Error as error:
        raise damaged(path, error) from error
    try:
        _check(connection, path, read_only)
    except sqlite3.Error as error:
        connection.close()
        raise damaged(path, error) from error
    except BaseException:
        connection.close()
        raise
    return connection


def dumps(value: Any) -> str:
    """JSON in Python's dialect: NaN and the infinities are what trials do report."""
    return json.dumps(value, separators=(",", ":"))


def damaged(path: Path, error: Exception) -> RequestError:
    """The error for a file that cannot be read as a journal."""
    if isinstance(error, sqlite3.OperationalError):  # the file may be as good as ever
        return RequestError(f"{path} must be open to you, but: {error}; see to its permissions, disk and locks")
    return RequestError(f"{path} must be a readable journal, but: {error}; restore it from a copy")


def is_full(path: Path, error: sqlite3.Error) -> bool:
    """Whether a write failed because the disk is full, which SQLite also reports as a mere I/O error."""
    primary = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if primary == sqlite3.SQLITE_FULL:
        return True
    return primary == sqlite3.SQLITE_IOERR and shutil.disk_usage(path.parent).free < _LEAST_ROOM


def _connect(path: Path, read_only: bool) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rw'}"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=_BUSY_SECONDS)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError:
        connection.close()
        # In a folder that we may not write to, SQLite cannot make the WAL index that even readers
        # share. With no log beside it the file is all there is and nobody writes it: read it as such.
        if not read_only or os.access(path.parent, os.W_OK) or path.with_name(f"{path.name}-wal").exists():
            raise
        return sqlite3.connect(f"{uri}&immutable=1", uri=True, isolation_level=None)
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _check(connection: sqlite3.Connection, path: Path, read_only: bool) -> None:
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if application != _APPLICATION_ID:
        raise RequestError(f"{path} must be a journal of Heldout, but it is another SQLite file")
    if version > SCHEMA_VERSION:
        raise RequestError(
            f"{path} was written by a newer Heldout (journal schema {version}, this one knows "
            f"{SCHEMA_VERSION}); upgrade heldout"
        )
    if read_only:
        return
    for pragma in _PRAGMAS:
        connection.execute(pragma)
    # Reads every page, milliseconds for a study: better here than at the first write.
    found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        raise sqlite3.DatabaseError(found)

"""The journal's SQLite file: its tables and settings; making, checking, opening, upgrading and backing it up."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from search.errors import DamagedError, RequestError
from search.record import journal_copy

NAME = "journal.sqlite"
SCHEMA_VERSION = 2
_APPLICATION_ID = 0x48454C44  # "HELD": tells our file from any other SQLite file, also to `file`

_TABLES = """
CREATE TABLE meta (
    key TEXT PRIMARY KEY, value TEXT NOT NULL, at REAL NOT NULL, put INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
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

# From each older version to the next one, statement by statement, all in one transaction.
MIGRATIONS: dict[int, tuple[str, ...]] = {
    # Puts are numbered, so that the second record can tell which value of a key came last. And the bodies of
    # trials may have fields that version 1 does not know: it must refuse the file rather than stumble over them.
    1: (
        "ALTER TABLE meta ADD COLUMN put INTEGER NOT NULL DEFAULT 0",
        "UPDATE meta SET put = (SELECT count(*) FROM meta AS other WHERE (other.at, other.key) <= (meta.at, meta.key))",
    ),
}

_PRAGMAS = (
    # Readers (status, the tracker, a second terminal) never wait for the driver, nor it for them.
    "PRAGMA journal_mode = WAL",
    # In WAL mode NORMAL syncs at checkpoints only: a power cut would lose trials already told to
    # the sampler. FULL syncs the log at every commit, about a millisecond against a trial's seconds.
    "PRAGMA synchronous = FULL",
)
# What SQLite cannot do for reasons outside the file, which may be as good as ever.
_NOT_THE_FILE = {
    *(sqlite3.SQLITE_PERM, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR),
    *(sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_NOMEM),
}
# Seconds to wait for a lock: another command may be putting a meta value, or a copy being taken.
_BUSY_SECONDS = 30.0
# Bytes under which a failed write is put down to a full disk.
_LEAST_ROOM = 1 << 20


def holds_study(folder: Path) -> bool:
    """Whether a study is recorded in the folder, be it in a file that alone is left of it."""
    path = folder / NAME
    return any(file.exists() for file in (path, journal_copy.beside(path), backup_of(path)))


def backup_of(path: Path) -> Path:
    """Where ``back_up`` puts its copy: ``journal.backup.sqlite`` for ``journal.sqlite``."""
    return path.with_suffix(".backup.sqlite")


def make(path: Path, rows: Mapping[str, Iterable[journal_copy.Row]], anew: bool = True) -> None:
    """Makes a file with these rows by table; it appears complete or not at all.

    Args:
        anew: For a new study, which must have no journal yet; False writes over what is there.

    Raises:
        RequestError: If there is a journal already, or none can be written there.
    """
    there = [file for file in (path, journal_copy.beside(path)) if file.exists()]
    if anew and there:
        raise RequestError(f"a new study must not have a journal, but {there[0]} exists; choose another name")
    draft = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        with contextlib.closing(sqlite3.connect(draft, isolation_level=None)) as connection:
            # With a rollback journal, so that COMMIT means that the file itself has it: a log's way into the file,
            # at closing, fails in silence on a full disk. Opened for writing, it turns to WAL.
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            connection.executescript(_TABLES)
            connection.execute("BEGIN")
            for table, values in rows.items():
                for row in values:
                    connection.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", row)
            connection.execute("COMMIT")
        os.replace(draft, path)
        journal_copy.sync(path.parent)
    except (sqlite3.Error, OSError) as error:
        raise RequestError(f"{path} must be writable, but: {error}; see to its disk and permissions") from error
    finally:
        for suffix in ("", "-journal"):
            with contextlib.suppress(OSError):
                os.unlink(f"{draft}{suffix}")


def connect(path: Path, read_only: bool) -> sqlite3.Connection:
    """A connection in autocommit mode to a checked file, brought to this version if it is for writing.

    Raises:
        RequestError: If there is no file, it is not a journal, cannot be opened, or a newer version wrote it.
        DamagedError: If it is torn or changed, or lacks what the second record has.
    """
    connection, version = _checked(path, thoroughly=not read_only)
    if read_only:
        return connection
    # Only now: SQLite empties the log of a file that it closes, which a damaged one may still need.
    connection.close()
    try:
        connection = _connect(path, read_only=False)
    except sqlite3.Error as error:
        raise damaged(path, error) from error
    try:
        for pragma in _PRAGMAS:
            connection.execute(pragma)
        if version < SCHEMA_VERSION:
            _migrate(connection, path, version)
    except sqlite3.Error as error:
        connection.close()
        raise damaged(path, error) from error
    except BaseException:
        connection.close()
        raise
    return connection


def check(path: Path) -> None:
    """Looks at every page, and at the second record.

    Raises:
        RequestError: As ``connect``.
    """
    _checked(path, thoroughly=True)[0].close()


def is_sound(path: Path) -> bool:
    """Whether a file is a journal of this version or an older one, whatever it lacks."""
    if not path.is_file():
        return False
    try:
        with contextlib.closing(_connect(path, read_only=True)) as connection:
            _check(connection, path, thoroughly=True)
    except (sqlite3.Error, RequestError):
        return False
    return True


def back_up(path: Path) -> Path:
    """Copies the journal, as of one moment, to a file beside it, and returns its path.

    For who holds the study's lock: half-written files of others are taken away.
    An earlier backup stays unless the journal passes every check: a good backup is not replaced by a torn file.

    Raises:
        RequestError: As ``connect``, or if no copy can be written.
    """
    source, _ = _checked(path, thoroughly=True)
    kept = backup_of(path)
    for left in path.parent.glob(f"{path.stem}.*.new*"):  # by a process that was killed while it wrote a file
        with contextlib.suppress(OSError):
            left.unlink()
    draft = kept.with_name(f"{kept.name}.{os.getpid()}.new")
    try:
        os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))  # guard scores are in it
        with contextlib.closing(sqlite3.connect(draft, isolation_level=None)) as target:
            source.backup(target)
            target.execute("PRAGMA journal_mode = DELETE")  # one file, with no log beside it
        with draft.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(draft, kept)
        journal_copy.sync(path.parent)
    except (sqlite3.Error, OSError) as error:
        raise RequestError(f"a backup must be written to {kept}, but: {error}; make room there") from error
    finally:
        source.close()
        with contextlib.suppress(OSError):
            draft.unlink()
    return kept


def dumps(value: Any) -> str:
    """JSON in Python's dialect: NaN and the infinities are what trials do report."""
    return json.dumps(value, separators=(",", ":"))


def damaged(path: Path, error: Exception) -> RequestError:
    """The error for a file that cannot be read as a journal."""
    code = getattr(error, "sqlite_errorcode", None)
    if code is not None and code & 0xFF in _NOT_THE_FILE and code != sqlite3.SQLITE_IOERR_SHORT_READ:
        return RequestError(f"{path} must be open to you, but: {error}; see to its permissions, disk and locks")
    # What a row says is nobody's to read here: it may be a guard score.
    what = " ".join(str(error).split()).partition(" with text")[0][:200]
    return DamagedError(f"{path} must be a readable journal, but: {what}; run `heldout repair {path.parent.name}`")


def is_full(path: Path, error: sqlite3.Error) -> bool:
    """Whether a write failed because the disk takes nothing at present, full or read-only as it is."""
    primary = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if primary == sqlite3.SQLITE_FULL:
        return True
    if primary in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
        return not os.access(path.parent, os.W_OK)
    # A full disk SQLite also reports as a mere I/O error.
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


def _checked(path: Path, thoroughly: bool) -> tuple[sqlite3.Connection, int]:
    """A connection for reading, and the file's version."""
    if not path.is_file() or not path.stat().st_size:  # SQLite would take an empty one for a new one, and drop its log
        what = "is empty" if path.is_file() else "is not there"
        if path.is_file() or holds_study(path.parent):
            raise DamagedError(f"{path} must be a journal, but {what}; run `heldout repair {path.parent.name}`")
        raise RequestError(f"a study must have a journal, but there is no {path}; check name and workspace")
    try:
        connection = _connect(path, read_only=True)
    except sqlite3.Error as error:
        raise damaged(path, error) from error
    try:
        version = _check(connection, path, thoroughly)
        # It is its owner's alone: whoever else may read the journal reads it as it is.
        readable = thoroughly or os.access(journal_copy.beside(path), os.R_OK)
        copied = journal_copy.compare(path, connection) if readable else None
        if copied is not None and copied.version is not None and copied.version > version:
            raise DamagedError(
                f"{path} must have the journal schema of its second record, {copied.version}, but has {version}; "
                f"run `heldout repair {path.parent.name}`"
            )
        if thoroughly:
            _check_backup(connection, path)
        return connection, version
    except sqlite3.Error as error:
        connection.close()
        raise damaged(path, error) from error
    except BaseException:
        connection.close()
        raise


def _check(connection: sqlite3.Connection, path: Path, thoroughly: bool) -> int:
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    otherwise = f"run `heldout repair {path.parent.name}`"
    if application != _APPLICATION_ID:
        raise DamagedError(f"{path} must be a journal of Heldout, but it is another SQLite file; {otherwise}")
    if version > SCHEMA_VERSION:
        raise RequestError(
            f"{path} was written by a newer Heldout (journal schema {version}, this one knows "
            f"{SCHEMA_VERSION}); upgrade heldout, or, if there is no newer one, {otherwise}"
        )
    if not all(older in MIGRATIONS for older in range(version, SCHEMA_VERSION)):
        raise DamagedError(f"{path} must have a journal schema of 1 or more, but has {version}; {otherwise}")
    if thoroughly:
        # Reads every page, milliseconds for a study: better here than at the first write.
        found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise sqlite3.DatabaseError(found)
    return version


def _check_backup(connection: sqlite3.Connection, path: Path) -> None:
    """Without a second record to compare with, the last backup at least tells of a loss before it was made."""
    backup = backup_of(path)
    if not is_sound(backup):
        return
    try:
        with contextlib.closing(_connect(backup, read_only=True)) as other:
            had = journal_copy.length(journal_copy.load(other))
    except (sqlite3.Error, TypeError):
        return  # the backup is what is damaged
    missing = had - journal_copy.length(journal_copy.load(connection))
    if missing > 0:
        raise DamagedError(
            f"{path} must have all that {backup.name} has, but {missing} of its records are missing; run "
            f"`heldout repair {path.parent.name}`"
        )


def _migrate(connection: sqlite3.Connection, path: Path, version: int) -> None:
    kept = back_up(path)
    connection.execute("BEGIN IMMEDIATE")
    try:
        for older in range(version, SCHEMA_VERSION):
            for statement in MIGRATIONS[older]:
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        connection.execute("COMMIT")
    except sqlite3.Error as error:
        with contextlib.suppress(sqlite3.Error):
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        raise RequestError(
            f"{path} must be brought from journal schema {version} to {SCHEMA_VERSION}, but: {error}; it is as it "
            f"was, and so is the copy in {kept.name}: see that the disk has room, and try again"
        ) from error

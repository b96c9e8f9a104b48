"""The hash-chained ledger in PostgreSQL, for machines without a common disk: a table of lines, one of row hashes.

It keeps what ``search.guard.chain`` promises of a file. One advisory lock serialises those who append, a line is
committed before ``add`` returns, and the tables refuse to change or lose a row, short of what their owner can do.
docker/ledger.sql makes them beforehand, so that who appends is not their owner.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from search import secrecy
from search.errors import RequestError
from search.guard.chain import Hashes, Line, checked, digest_of, following

_SCHEMES = ("postgresql://", "postgres://")
_LOCK = 0x68656C646F7574  # "heldout": the same for all who append to a ledger of this database
_SECONDS = 10
_FREE_SECONDS = 60  # that others have to let go of it: what is done with it takes moments
# A machine that is lost says nothing at its end: what it held is free, and what it was asked is given up, after 30 s.
_ALIVE = {"keepalives_idle": 15, "keepalives_interval": 5, "keepalives_count": 3}
NAMES = ("heldout_ledger", "heldout_ledger_rows")
TABLES = """
CREATE TABLE IF NOT EXISTS heldout_ledger (number bigint PRIMARY KEY, line text NOT NULL);
CREATE TABLE IF NOT EXISTS heldout_ledger_rows (digest text PRIMARY KEY, hashes bytea NOT NULL);
CREATE OR REPLACE FUNCTION heldout_ledger_stays() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'a ledger is only added to'; END $$;
"""
STAYS = """
CREATE OR REPLACE TRIGGER heldout_stays BEFORE UPDATE OR DELETE OR TRUNCATE ON {}
    FOR EACH STATEMENT EXECUTE FUNCTION heldout_ledger_stays();
"""


def address(given: Path | str) -> str | None:
    """The address of a database, if this is one."""
    return str(given) if isinstance(given, str) and given.startswith(_SCHEMES) else None


class DatabaseChain:
    """The ledger of one database; any number of processes and machines may use it at once.

    Args:
        uri: ``postgresql://USER@HOST/DATABASE``. The password may be in it, in ``PGPASSWORD``, or in libpq's own file.
    """

    def __init__(self, uri: str) -> None:
        secrecy.learn_tracking(uri)
        self._uri = uri
        self.shown = secrecy.redacted(uri)
        self._held: Any = None  # the connection that has the lock

    def lines(self) -> tuple[Line, ...]:
        """All lines in order, checked; none if there is no ledger.

        Raises:
            RequestError: If the chain is broken or the database cannot be used.
        """
        with self._connected("nothing was opened") as connection:
            return self._lines(connection)

    @contextlib.contextmanager
    def locked(self) -> Iterator[tuple[int, tuple[Line, ...]]]:
        """The ledger, locked for this process alone, and its checked lines; for ``add``. It is made if need be.

        Raises:
            RequestError: As ``lines``.
        """
        with self._connected("nothing was opened") as connection:
            self._lock(connection)
            if not self._is_there(connection):
                with connection.transaction():
                    connection.execute(TABLES)
                    for table in NAMES:
                        connection.execute(STAYS.format(table))
            self._held = connection
            try:
                yield 0, self._lines(connection)
            finally:
                self._held = None

    def add(self, file: int, lines: tuple[Line, ...], body: Mapping[str, Any], undone: str) -> None:
        """Append one line, committed when this returns, or not at all.

        Raises:
            RequestError: If the database refuses. One that is lost at this very moment may have the line all the
                same; it counts then.
        """
        with self._saying(undone):
            text = following(lines, body)
            self._held.execute("INSERT INTO heldout_ledger VALUES (%s, %s)", [len(lines) + 1, text])

    def keep_rows(self, hashes: Hashes, undone: str) -> str:
        """Store row hashes, sorted; the digest that a line must name them by.

        Raises:
            RequestError: As ``add``.
        """
        hashes = np.sort(hashes).astype("<u8")
        digest, file = digest_of(hashes), io.BytesIO()
        np.save(file, hashes, allow_pickle=False)
        with self._saying(undone):
            self._held.execute(
                "INSERT INTO heldout_ledger_rows VALUES (%s, %s) ON CONFLICT DO NOTHING", [digest, file.getvalue()]
            )
        return digest

    def rows(self, line: Line) -> Hashes:
        """The row hashes that a line names under ``rows``, sorted.

        Raises:
            RequestError: If they are gone or were changed.
        """
        ask = "SELECT hashes FROM heldout_ledger_rows WHERE digest = %s"
        with contextlib.ExitStack() as stack:
            connection = self._held or stack.enter_context(self._connected("nothing was opened"))
            with self._saying("nothing was opened"):
                found = connection.execute(ask, [line["rows"]]).fetchone()
        if found is None:
            raise self._broken(line["number"], "names rows that are gone")
        try:
            hashes = cast(Hashes, np.load(io.BytesIO(found[0]), allow_pickle=False))
        except ValueError as error:
            raise self._broken(line["number"], "names rows that cannot be read") from error
        if digest_of(hashes) != line["rows"]:
            raise self._broken(line["number"], "names rows that were changed")
        return hashes

    def _lines(self, connection: Any) -> tuple[Line, ...]:
        with self._saying("nothing was opened"):
            if not self._is_there(connection):
                return ()
            found = connection.execute("SELECT line FROM heldout_ledger ORDER BY number").fetchall()
        return checked([text for (text,) in found], len(found), self._broken)

    def _lock(self, connection: Any) -> None:
        """Wait for the lock, which is held until the connection closes, on either side."""
        import psycopg

        for name, value in _ALIVE.items():
            connection.execute(f"SET tcp_{name} = {value}")
        connection.execute(f"SET lock_timeout = '{_FREE_SECONDS}s'")
        try:
            connection.execute("SELECT pg_advisory_lock(%s)", [_LOCK])
        except psycopg.errors.LockNotAvailable:
            raise RequestError(
                f"the ledger {self.shown} must be free within {_FREE_SECONDS} s, but another process has held it all "
                "the time; nothing was opened, so end that process and try again"
            ) from None

    def _is_there(self, connection: Any) -> bool:
        found = connection.execute("SELECT to_regclass('heldout_ledger_rows')").fetchone()
        return found is not None and found[0] is not None

    @contextlib.contextmanager
    def _connected(self, undone: str) -> Iterator[Any]:
        try:
            import psycopg
        except ImportError as error:
            raise RequestError(
                f"a ledger in PostgreSQL needs its driver, but {error}; `pip install 'heldout[service]'` brings it"
            ) from None
        with self._saying(undone):
            connection = psycopg.connect(self._uri, autocommit=True, connect_timeout=_SECONDS, **_ALIVE)
        with contextlib.closing(connection), self._saying(undone):
            yield connection

    @contextlib.contextmanager
    def _saying(self, undone: str) -> Iterator[None]:
        import psycopg

        try:
            yield
        except psycopg.Error as error:
            said = " ".join(secrecy.scrub(str(error)).split())[:300]
            raise RequestError(
                f"test openings must be recorded in {self.shown}, but: {said}; {undone}, so give access there, or set "
                "HELDOUT_LEDGER to another place"
            ) from None

    def _broken(self, number: int, what: str) -> RequestError:
        return RequestError(
            f"the ledger {self.shown} must be an unbroken chain, but line {number} {what}; restore the database from a "
            "backup, or set HELDOUT_LEDGER to a new one and say that earlier openings are not counted"
        )

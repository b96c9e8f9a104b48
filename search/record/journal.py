"""The durable record of one study: a SQLite file that only ever grows.

Two streams and two side tables::

    events    what changes the history: the space found, what trials asked for, trials moving
              between states. A *history length* is a number of events, and ``history(length)`` is
              what was known then, to the letter, for ever.
    reports   what trials said after their epochs. Never part of the history.
    guards    scores on guard rows, which no sampler may see: ``history`` does not read this table.
    meta      small JSON values by key; the only rows that are ever replaced.

Each write is a commit, synced twice; many share one in ``one_commit``, or by ``gathering`` and ``commit``. One
process writes (the study's lock sees to that), any number read, while it writes. State is checked before a row is
written, by the same function that replays the rows, so a journal opened again is what the writer held in memory. An
object belongs to the thread that made it. Tables and settings of the file are in ``journal_file``. All but the reports
goes to a second record as well, which ``journal_copy`` owns: by it a loss is noticed on opening.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from search.definition.space import Ask, Space
from search.errors import DiskFull, StudyFailed
from search.record import journal_copy, journal_file
from search.record.history import Event, History
from search.record.journal_file import dumps
from search.trial import Report, Trial, TrialState


class Journal:
    """The record of one study. Made by ``create`` and ``open``; a context manager that closes it."""

    def __init__(self, path: Path, connection: sqlite3.Connection, read_only: bool, clock: Callable[[], float]) -> None:
        self.path, self.read_only = path, read_only
        self._connection = connection
        self._copy: journal_copy.Copy | None = None
        self._records: list[tuple[str, journal_copy.Row]] = []  # of the commit that is being made
        self._clock = clock
        self._now = History()
        self._then = History()  # follows questions about the past, which tend to come in order
        self._grouped = self._gathers = False
        self._gathered: list[tuple[str, journal_copy.Row]] = []  # in memory already, and not yet in the file

    @classmethod
    def create(cls, path: Path, meta: Mapping[str, Any], clock: Callable[[], float] = time.time) -> Journal:
        """A new journal with these meta values; the file appears complete or not at all.

        Raises:
            RequestError: If there is a file already, or none can be written there.
        """
        at = clock()
        rows = [(key, dumps(value), at, number) for number, (key, value) in enumerate(meta.items(), 1)]
        journal_file.make(path, {"meta": rows})
        return cls.open(path, clock=clock)

    @classmethod
    def open(cls, path: Path, read_only: bool = False, clock: Callable[[], float] = time.time) -> Journal:
        """An existing journal; read-only opens work while another process writes.

        Raises:
            RequestError: If there is no journal, it cannot be opened, or a newer version wrote it.
            DamagedError: If it is torn or changed, or lacks what was recorded.
        """
        journal = cls(path, journal_file.connect(path, read_only), read_only, clock)
        try:
            journal._refresh()
            if not read_only:
                journal._copy = journal_copy.Copy(path, journal._connection, journal_file.SCHEMA_VERSION)
        except BaseException:
            journal.close()
            raise
        return journal

    def close(self) -> None:
        """Gives the file back; closing twice does nothing."""
        self._connection.close()
        if self._copy is not None:
            self._copy.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- meta

    def get(self, key: str, default: Any = None) -> Any:
        """The JSON value put under this key last."""
        row = self._rows("SELECT value FROM meta WHERE key = ?", (key,))
        return self._loaded(row[0][0]) if row else default

    def put_at(self, key: str) -> float | None:
        """When the key's value was put, in seconds since the Unix epoch."""
        row = self._rows("SELECT at FROM meta WHERE key = ?", (key,))
        return float(row[0][0]) if row else None

    def put(self, key: str, value: Any) -> None:
        """Stores a JSON value under a key, in place of any other; committed on return."""
        text = dumps(value)
        with contextlib.nullcontext() if self._grouped else self._commit():
            last = self._connection.execute("SELECT max(put) FROM meta").fetchone()[0] or 0
            self._write("INSERT OR REPLACE INTO", "meta", (key, text, self._clock(), last + 1))

    # ---- writing

    @contextlib.contextmanager
    def one_commit(self, now: bool = False) -> Iterator[None]:
        """Joins the writes inside into one commit: all of them are recorded, or none.

        While gathering it is a later one, except ``now``, which writes that put meta values as well need.

        Raises:
            DiskFull: If there is no room for it; the same writes can be tried again later.
            StudyFailed: If the file cannot be written.
        """
        if self._grouped:
            try:
                yield
            except sqlite3.Error:
                self._forget()
                raise
            return
        if now or not self._gathers:
            with self._commit():
                yield
            return
        before = len(self._gathered)
        try:
            yield
        except BaseException:
            del self._gathered[before:]
            self._forget()
            raise

    @contextlib.contextmanager
    def gathering(self) -> Iterator[None]:
        """Keeps the events and guard scores that are written inside in memory, until ``commit`` or a later write.

        Histories show them at once, and the file does not, so nothing may be done outside by their word before the
        commit; a disk that is full costs none of them. A meta value that is put inside takes them along.
        """
        self._gathers = True
        try:
            yield
        finally:
            self._gathers = False

    @property
    def has_gathered(self) -> bool:
        """Whether the file lacks something."""
        return bool(self._gathered)

    def commit(self, reports: Sequence[Report] = ()) -> None:
        """Writes what was gathered, and these reports, in one commit.

        Raises:
            DiskFull, StudyFailed: As ``one_commit``; what was gathered is kept then, and can be tried again.
        """
        with self._commit():
            self.report(reports)

    @contextlib.contextmanager
    def _commit(self) -> Iterator[None]:
        if self.read_only:
            raise ValueError(f"{self.path} was opened read-only")
        ending = False
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            self._grouped = True
            for table, row in self._gathered:
                self._write("INSERT INTO", table, row)
            yield
            assert self._copy is not None
            ending = True
            with self._copy.following(self._records):
                self._connection.execute("COMMIT")
            self._gathered = []
        except BaseException as error:
            self._forget()
            if ending and not self._connection.in_transaction and not isinstance(error, sqlite3.Error):
                self._gathered = []  # an interrupt that came after the commit
            with contextlib.suppress(sqlite3.Error):
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                if journal_file.is_full(self.path, error):
                    raise DiskFull(f"{self.path} could not be written ({error})") from error
                raise StudyFailed(
                    f"the journal must take every trial, but {self.path} could not be written ({error}); "
                    "see that its disk has room, can be written to, and that no other driver runs this study"
                ) from error
            raise
        finally:
            self._grouped = False
            self._records = []

    def adopt(self, space: Space) -> None:
        """Records the space that counts from here on (what discovery found)."""
        self._append("space", None, space.to_json())

    def grow(self, asks: Sequence[Ask], trial_number: int | None = None, complete: bool = True) -> Space:
        """Records what a trial asked for, if that says anything new, and returns the space as it is then.

        From here on ``history`` shows as the trial's params exactly what it asked for, and MLflow gets
        them while it runs: what was only proposed may yet change.

        Args:
            asks: Everything that the trial has asked for so far, in order; not only the latest.
            trial_number: The running trial, or None for asks outside any trial.
            complete: As for ``Space.grown``.

        Raises:
            ValueError: If the trial is not running.
        """
        before = self.space()
        after = before.grown(asks, complete)
        news = after is not before
        if trial_number is None:
            if news:
                self._append("asks", None, {"asks": list(asks), "complete": complete, "params": None})
            return self.space()
        params, known = after.params_of(asks), self._now.get(trial_number)
        if news or known is None or params != known.params or not self._now.has_asked(trial_number):
            body = {"asks": list(asks) if news else [], "complete": complete, "params": params}
            self._append("asks", trial_number, body)
        return self.space()

    def begin(self, trial: Trial) -> None:
        """Records that a new or waiting trial runs; committed on return, so call it before submitting.

        A later attempt of a trial that the record shows running ends the earlier one: its process, or
        the driver itself, was lost.

        Raises:
            ValueError: If the trial is not RUNNING, was begun before in this attempt, or is over.
        """
        known = self.now.get(trial.number)
        with self.one_commit():
            if known is not None and known.state is TrialState.RUNNING and trial.attempt > known.attempt:
                self.queue(known.moved(TrialState.WAITING))
            self._record(trial, trial.state is TrialState.RUNNING, "RUNNING")

    def queue(self, trial: Trial) -> None:
        """Records that a trial waits: a new one that was enqueued, or one that is to run again."""
        self._record(trial, trial.state is TrialState.WAITING, "WAITING")

    def finish(self, trial: Trial) -> None:
        """Records how a trial ended; committed on return, so call it before telling anybody.

        Raises:
            ValueError: If the trial is not in a final state, or was not running in this attempt.
        """
        self._record(trial, trial.state.is_finished, "COMPLETE, PRUNED or FAILED")

    def report(self, reports: Sequence[Report]) -> None:
        """Records reports in one commit. Of two for the same trial, attempt and step the first stands.

        Late ones, of an attempt that is over, are facts too and are kept.

        Raises:
            ValueError: If one is of an attempt that never began; then none is recorded.
        """
        if not reports:
            return
        for one in reports:
            if not 0 <= one.attempt <= self.now.ran(one.trial):
                raise ValueError(f"trial {one.trial} reported in attempt {one.attempt}, which never began")
        rows = [(one.trial, one.attempt, one.step, one.at, dumps(dict(one.metrics))) for one in reports]
        with self.one_commit():
            # Ids stay without gaps (nothing is deleted): `reports(after=…)` counts on it.
            self._connection.executemany(
                "INSERT INTO reports (trial, attempt, step, at, metrics) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT (trial, attempt, step) DO NOTHING",
                rows,
            )

    def guard(self, number: int, attempt: int, value: float, extra: Any = None) -> None:
        """Records a trial's score on guard rows, where no history shows it.

        Raises:
            ValueError: If the attempt never began or has its guard score.
        """
        if not 0 <= attempt <= self.now.ran(number):
            raise ValueError(f"trial {number} has a guard score of attempt {attempt}, which never began")
        known = self._rows("SELECT 1 FROM guards WHERE trial = ? AND attempt = ?", (number, attempt))
        if known or any(table == "guards" and row[:2] == (number, attempt) for table, row in self._gathered):
            raise ValueError(f"trial {number} has its guard score of attempt {attempt} already")
        # As JSON, because SQLite turns a NaN into a NULL.
        self._add("guards", (number, attempt, self._clock(), dumps({"value": value, "extra": extra})))

    # ---- reading

    @property
    def length(self) -> int:
        """Number of events so far."""
        return self.now.length

    @property
    def now(self) -> History:
        """What all events add up to, alive: good until the next one, and another object after a write that failed."""
        self._refresh()
        return self._now

    def history(self, length: int | None = None) -> tuple[Trial, ...]:
        """All trials in number order, as they were after the first ``length`` events (default: now)."""
        return self._state(length).trials()

    def space(self, length: int | None = None) -> Space:
        """The space as it was after the first ``length`` events (default: now)."""
        return self._state(length).space()

    def events(self, after: int = 0, upto: int | None = None) -> list[Event]:
        """Events with ``after < id <= upto``, in order."""
        most = 2**62 if upto is None else upto
        rows = self._rows(
            "SELECT id, at, kind, trial, body FROM events WHERE id > ? AND id <= ? ORDER BY id", (after, most)
        )
        last = rows[-1][0] if rows else after  # while they are being committed, they are in both
        rows += [row for table, row in self._gathered if table == "events" and last < row[0] <= most]
        return [Event(row[0], row[1], row[2], row[3], self._loaded(row[4])) for row in rows]

    def reports(self, trial: int | None = None, after: int = 0) -> tuple[Report, ...]:
        """Reports in the order they were recorded, of one trial or of all.

        Args:
            trial: Only reports of this trial, all its attempts.
            after: Leave out this many: those that the same call returned before.
        """
        columns = "SELECT trial, attempt, step, at, metrics FROM reports"
        if trial is None:
            rows = self._rows(f"{columns} WHERE id > ? ORDER BY id", (after,))
        else:
            rows = self._rows(f"{columns} WHERE trial = ? ORDER BY id LIMIT -1 OFFSET ?", (trial, after))
        return tuple(Report(row[0], row[1], row[2], row[3], self._loaded(row[4])) for row in rows)

    def guards(self) -> dict[tuple[int, int], tuple[float, Any]]:
        """(trial number, attempt) to the score on guard rows and what was kept with it.

        For the evaluation after the selection is frozen; nothing that proposes, prunes or shows
        progress may call this.
        """
        bodies = {row[:2]: self._loaded(row[2]) for row in self._rows("SELECT trial, attempt, body FROM guards")}
        return {key: (body["value"], body["extra"]) for key, body in bodies.items()}

    # ---- inside

    def _record(self, trial: Trial, fits: bool, wanted: str) -> None:
        if not fits:
            raise ValueError(f"the trial must be {wanted}, but trial {trial.number} is {trial.state}")
        self._append("trial", trial.number, trial.to_json())

    def _append(self, kind: str, trial: int | None, body: Any) -> None:
        text = dumps(body)
        # What goes into memory is what a reader will get, after a round through JSON.
        event = Event(self.now.length + 1, self._clock(), kind, trial, json.loads(text))
        self._now.apply(event)
        # The id is ours to say: if another driver wrote meanwhile this fails instead of interleaving.
        self._add("events", (event.id, event.at, kind, trial, text))

    def _add(self, table: str, row: journal_copy.Row) -> None:
        if self._gathers and not self._grouped:
            if self.read_only:
                raise ValueError(f"{self.path} was opened read-only")
            self._gathered.append((table, row))
            return
        with self.one_commit():
            self._write("INSERT INTO", table, row)

    def _write(self, insert: str, table: str, row: journal_copy.Row) -> None:
        self._connection.execute(f"{insert} {table} VALUES ({', '.join('?' * len(row))})", row)
        self._records.append((table, row))

    def _state(self, length: int | None) -> History:
        self._refresh()
        if length is None or length == self._now.length:
            return self._now
        if not 0 <= length < self._now.length:
            raise ValueError(f"the history has {self._now.length} events, but {length} were asked for")
        if length < self._then.length:
            self._then = History()
        self._replay(self._then, self.events(self._then.length, length))
        return self._then

    def _forget(self) -> None:
        # What was applied in memory was not recorded: file and ``_gathered`` are read again when needed.
        self._now, self._then = History(), History()

    def _refresh(self) -> None:
        # A writer is alone, so its memory is current unless a failed commit emptied it.
        if self.read_only or self._now.length == 0:
            self._replay(self._now, self.events(self._now.length))

    def _replay(self, state: History, events: Iterable[Event]) -> None:
        try:
            for event in events:
                state.apply(event)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise journal_file.damaged(self.path, error) from error

    def _loaded(self, text: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, TypeError) as error:
            raise journal_file.damaged(self.path, error) from error

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        try:
            return self._connection.execute(query, values).fetchall()
        except sqlite3.ProgrammingError:
            raise  # closed, or used from another thread: our mistake, not the file's
        except sqlite3.DatabaseError as error:
            raise journal_file.damaged(self.path, error) from error

"""What can still be read of a journal's files, joined into rows that follow from each other.

SQLite's files are read row by row past their damage, the second record line by line. Of two forms of one row the second
record's counts, because its lines have checksums. An event that is lost leaves its number to a filler: nothing, or,
where a later event needs it, the start of the trial that this one ends. So an event lost in all files costs no trial
that any of them has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search.definition.space import Space
from search.record import journal_copy, journal_file
from search.record.history import Event, History
from search.record.journal_copy import Row
from search.trial import Trial, TrialState

Tables = dict[str, dict[Any, Row]]

SCRATCH = ".repair-"  # how folders for copies of damaged files begin
_REPORTS = "id, trial, attempt, step, at, metrics"
_ORDERS = {"meta": ("key",), "events": ("id",), "guards": ("trial", "attempt"), "reports": ("id",)}
_KINDS: dict[str, tuple[type, ...]] = {
    "meta": (str, str, float, int),
    "events": (int, float, str, object, str),
    "guards": (int, int, float, str),
    "reports": (int, int, int, int, float, str),
}
_JSON = {"meta": 1, "events": 4, "guards": 3, "reports": 5}  # the column that holds it
_FAR = 4096  # rows that are asked for one by one where nothing says how far a table goes


@dataclass
class Salvaged:
    """Rows for a new journal.

    Attributes:
        tables: By table and by what names a row in it; whole and in order.
        missing: Records that are known of, and are in none of the files.
        left_out: Events and guard scores that were found, and cannot follow from what else was.
    """

    tables: Tables
    missing: int
    left_out: int


def salvage(copied: journal_copy.Content, files: Iterable[Path]) -> Salvaged | None:
    """What the second record and these SQLite files give together, None if that is nothing.

    Args:
        copied: The second record, as far as it could be read.
        files: Of two forms of a row the first file's counts.
    """
    sources = [{**copied.rows, "reports": {}}, *(read(file) for file in files)]
    found: dict[str, dict[Any, list[Row]]] = {table: {} for table in _KINDS}
    for source in sources:
        for table, rows in source.items():
            for name, row in rows.items():
                forms = found[table].setdefault(name, [])
                if row not in forms:
                    forms.append(row)
    if not found["meta"] and not found["events"]:
        return None
    most = 2 * len(found["events"]) + _FAR  # beyond that a number is damage itself
    events = {number: forms for number, forms in found["events"].items() if 1 <= number <= most}
    tables: Tables = {"meta": _last_puts(found["meta"])}
    history, tables["events"], left_out = _chained(events)
    tables["guards"] = {name: forms[0] for name, forms in found["guards"].items() if _ran(history, *name)}
    left_out += len(found["guards"]) - len(tables["guards"])
    steps: dict[Any, Row] = {}
    for _, row in sorted((number, form) for number, forms in found["reports"].items() for form in forms):
        if _ran(history, row[1], row[2]):
            steps.setdefault(row[1:4], row)
    tables["reports"] = {number: (number, *row[1:]) for number, row in enumerate(steps.values(), 1)}
    holes = len(tables["events"]) - len(events)
    known = journal_copy.length(tables | {"guards": dict.fromkeys(found["guards"], ())})
    missing = holes + max(0, copied.bound - known)
    return Salvaged(tables, missing, left_out)


# ── reading ──────────────────────────────────────────────────────────────────────────────────────


def read(path: Path) -> Tables:
    """The rows that a SQLite file and its log give, however damaged; the files themselves are not opened."""
    found: Tables = {table: {} for table in _KINDS}
    if not path.is_file() or not path.stat().st_size:
        return found
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=path.parent) as scratch:
        copy = Path(scratch) / path.name
        for suffix in ("", "-wal"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(f"{path}{suffix}", f"{copy}{suffix}")
        with contextlib.closing(sqlite3.connect(copy, isolation_level=None)) as connection:
            # Our JSON is ASCII: whatever is not is damage, and is noticed by this mark.
            connection.text_factory = lambda raw: raw.decode("ascii", "replace")
            for table in _KINDS:
                for row in _rows(connection, table):
                    if _is_whole(table, row):
                        found[table].setdefault(journal_copy.key(table, row), row)
    return found


def _rows(connection: sqlite3.Connection, table: str) -> Iterator[Row]:
    """From the beginning until damage, from the end until damage, and one by one in between."""
    query, order = _query(connection, table), _ORDERS[table]
    seen: set[Any] = set()
    ends: list[Any] = []
    for direction in ("", " DESC"):
        end = None
        with contextlib.suppress(sqlite3.Error, OverflowError):
            for row in connection.execute(f"{query} ORDER BY {', '.join(name + direction for name in order)}"):
                name = journal_copy.key(table, row)
                if name in seen:
                    break
                seen.add(name)
                end = name
                yield row
            else:
                if not direction:
                    return  # no damage on the way
        ends.append(end)
    if order != ("id",):
        return
    low = ends[0] if isinstance(ends[0], int) else 0
    high = ends[1] if isinstance(ends[1], int) else low + _FAR
    for number in range(low + 1, min(high, low + 64 * _FAR)):
        with contextlib.suppress(sqlite3.Error):
            yield from connection.execute(f"{query} WHERE id = ?", (number,)).fetchall()


def _query(connection: sqlite3.Connection, table: str) -> str:
    if table == "reports":
        return f"SELECT {_REPORTS} FROM reports"
    columns = journal_copy.COLUMNS[table]
    with contextlib.suppress(sqlite3.Error):
        if table == "meta" and not any(row[1] == "put" for row in connection.execute("PRAGMA table_info(meta)")):
            columns = "key, value, at, 0"  # as version 1 had it
    return f"SELECT {columns} FROM {table}"


def _is_whole(table: str, row: Row) -> bool:
    if not all(isinstance(value, kind) for value, kind in zip(row, _KINDS[table], strict=True)):
        return False
    if any(isinstance(value, str) and "\ufffd" in value for value in row):
        return False
    try:
        body = json.loads(row[_JSON[table]])
    except ValueError:
        return False
    if table == "guards":
        return isinstance(body, dict) and {"value", "extra"} <= set(body)
    return isinstance(body, dict) or table == "meta"


# ── joining ──────────────────────────────────────────────────────────────────────────────────────


def _last_puts(found: dict[Any, list[Row]]) -> dict[Any, Row]:
    last = [max(forms, key=lambda row: (row[3], row[2] if not row[3] else 0)) for forms in found.values()]
    if any(not row[3] for row in last):  # of version 1, which did not count them
        last.sort(key=lambda row: (row[3], row[2], row[0]))
        last = [(*row[:3], number) for number, row in enumerate(last, 1)]
    return {row[0]: row for row in last}


def _ran(history: History, trial: int, attempt: int) -> bool:
    return 0 <= attempt <= history.ran(trial)


def _chained(found: dict[int, list[Row]]) -> tuple[History, dict[Any, Row], int]:
    """The history, its rows without gaps, and how many of those found could not be used."""
    fillers: dict[int, Row] = {}
    while True:
        history, rows, left_out = History(), {}, 0
        free: list[int] = []
        for number in range(1, max(found, default=0) + 1):
            forms = [fillers[number]] if number in fillers else found.get(number, [])
            row = next((form for form in forms if _applies(history, form)), None)
            if row is None:
                if number not in fillers:
                    needed = _needed(history, forms[0], found) if forms else []
                    if needed and len(needed) <= len(free):
                        for slot, trial in zip(free[-len(needed) :], needed, strict=True):
                            fillers[slot] = _row(slot, trial, forms[0][1])
                        break  # and from the start again
                    free.append(number)
                    left_out += bool(forms)
                row = next(form for form in _nothings(number, forms) if _applies(history, form))
            rows[number] = row
        else:
            return history, rows, left_out


def _applies(history: History, row: Row) -> bool:
    """Applies an event if it can follow."""
    try:
        event = Event(row[0], row[1], row[2], row[3], json.loads(row[4]))
        if event.kind == "space":
            Space.from_json(event.body)
        elif event.kind == "asks":
            history.space().grown(event.body["asks"], event.body["complete"])
        history.apply(event)
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return True


def _needed(history: History, row: Row, found: dict[int, list[Row]]) -> list[Trial]:
    """The lost moves of a trial without which this event of its cannot follow."""
    # What a trial asked for does not tell its seed and attempt; its next move does.
    moves = [row] if row[2] == "trial" else [forms[0] for number, forms in sorted(found.items()) if number > row[0]]
    try:
        move = next(form for form in moves if form[2] == "trial" and form[3] == row[3])
        after = Trial.from_json(json.loads(move[4]))
    except (StopIteration, ValueError, KeyError, TypeError, AttributeError):
        return []
    before = history.get(after.number)
    blank: dict[str, Any] = dict.fromkeys(("score", "loss", "reason", "message", "ended", "best_epoch", "size"))
    began = dataclasses.replace(after, state=TrialState.RUNNING, **blank, epochs=0, extra={})
    if before is None or before.state is TrialState.WAITING:
        return [began]
    if before.state is TrialState.RUNNING and after.attempt > before.attempt:
        again = row[2] == "trial" and after.state is TrialState.RUNNING
        return [before.moved(TrialState.WAITING), *([] if again else [began])]
    return []


def _row(number: int, trial: Trial, at: float) -> Row:
    return number, at, "trial", trial.number, journal_file.dumps(trial.to_json())


def _nothings(number: int, forms: list[Row]) -> Iterator[Row]:
    """Events that change nothing, but for parameters that an event without its trial asked for."""
    asks: dict[str, Any] = {"asks": [], "complete": False, "params": None}
    at = forms[0][1] if forms else 0.0
    if forms and forms[0][2] == "asks":
        yield number, at, "asks", None, journal_file.dumps(asks | json.loads(forms[0][4]) | {"params": None})
    yield number, at, "asks", None, journal_file.dumps(asks)

"""Making a damaged journal whole again, under the study's lock, and saying what was salvaged.

What the files give is ``salvage``'s. The new journal is complete before an old file is touched, and at every moment
what was salvaged is in a file that the next repair reads. Damaged files are kept under other names, so that nothing is
lost that somebody might still read.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from search.errors import DamagedError, RequestError
from search.record import journal_copy, journal_file
from search.record.journal import Journal
from search.record.lock import locked
from search.record.salvage import SCRATCH, Salvaged, salvage
from search.study import Study
from search.trial import TrialState

DRAFT = "journal.repaired.sqlite"


def repair(study: str | Study, *, workspace: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Bring back whatever the files of a study's journal still have.

    A healthy journal is left as it is. The files of a damaged one are kept beside the new one.

    Returns:
        ``study``; ``healthy``, as it was found; ``said``, what was wrong; ``trials``, how many are ``complete``,
        ``pruned``, ``failed`` and ``in_flight``; how many ``events``, ``reports`` and ``guards`` there are;
        ``missing``, how many records are known of and lost; ``left_out``, how many were found that cannot follow
        from what else was; ``strays``, trials that have a folder and no record; ``certain``, whether there was a
        second record to tell that by; ``kept``, the names that the old files have now.

    Raises:
        StudyError: If there is no such study, or a process drives it.
        RequestError: If nothing can be salvaged, a newer version wrote the journal, or there is no room for a new one.
    """
    found = study if isinstance(study, Study) else Study(study, workspace)
    path = found.folder / journal_file.NAME
    with locked(found.folder):
        for left in found.folder.glob(f"{SCRATCH}*"):  # of a repair that was killed
            shutil.rmtree(left, ignore_errors=True)
        wrong = _wrong(path)
        kept: list[str] = []
        missing = left_out = 0
        certain = journal_copy.beside(path).exists()
        if wrong is not None:
            salvaged = _salvaged(found.folder)
            missing, left_out = salvaged.missing, salvaged.left_out
            kept = _put_in_place(path, salvaged)
        changes = wrong is not None or not _has_whole_copy(path)
        # Opened for writing, it brings its second record up to date.
        with Journal.open(path, read_only=not changes) as journal:
            counts = _counts(journal)
            strays = _strays(found.folder, journal)
        if wrong is not None:
            with contextlib.suppress(RequestError):  # without room for a new one the old one stays
                journal_file.back_up(path)
    more = {"missing": missing, "left_out": left_out, "certain": wrong is None or certain, "kept": kept}
    more |= {"strays": strays}
    behind = "its second record was torn or behind, and is whole again"
    said = wrong or (behind if changes else "nothing is wrong with it")
    return {"study": found.name, "healthy": wrong is None, "said": said} | counts | more


def lines(found: Mapping[str, Any]) -> list[str]:
    """What a repair found and did, in plain words."""
    trials = found["trials"]
    has = (
        f"it has {trials['complete']} trials complete, {trials['pruned']} pruned, {trials['failed']} failed and "
        f"{trials['in_flight']} in flight; {found['events']} events, {found['reports']} reports and "
        f"{found['guards']} guard scores"
    )
    if found["healthy"]:
        return [f"{found['study']}: the journal is whole; {found['said']}", has]
    is_whole = not (found["missing"] or found["left_out"] or found["strays"])
    how = "is whole again" if is_whole else "can be used again, but is not whole"
    wrong = found["said"].partition("; run `heldout repair")[0]
    out = [f"{found['study']}: the journal was damaged, and {how}", f"what was wrong: {wrong}", has]
    if found["missing"]:
        out.append(f"known of and lost: {found['missing']} record{'' if found['missing'] == 1 else 's'} at least")
    if found["strays"]:
        numbers = ", ".join(map(str, found["strays"]))
        out.append(f"no record is left of trials that have a folder: {numbers}; `heldout resume` trains others instead")
    if found["left_out"]:
        out.append(f"{found['left_out']} were found and left out, since they cannot follow from what else was found")
    if not found["certain"]:
        out.append("its second record was gone, so nobody can tell whether more was recorded at the end")
    elif is_whole:
        out.append("nothing is missing but, perhaps, reports of epochs, which have no second record")
    return [*out, f"the files as they were found: {', '.join(found['kept'])}"] if found["kept"] else out


def _strays(folder: Path, journal: Journal) -> list[int]:
    """Trials that have a folder and no record."""
    known = {trial.number for trial in journal.history()}
    found = [path.name for path in (folder / "trials").glob("[0-9]*")]
    return sorted({int(name) for name in found if name.isdecimal()} - known)


def _wrong(path: Path) -> str | None:
    """Why the journal needs repair, or None; what is not the files' fault, such as permissions, is raised."""
    try:
        journal_file.check(path)
        with Journal.open(path, read_only=True) as journal:
            journal.space()
            _counts(journal)
        with contextlib.closing(journal_file.connect(path, read_only=True)) as connection:
            for row in journal_copy.load(connection)["meta"].values():
                json.loads(row[1])
    except DamagedError as error:
        return str(error)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    except RequestError as error:
        # A schema of the future is damage where our own second record denies it.
        copied = journal_copy.read(path)
        if "newer Heldout" in str(error) and copied is not None and copied.version == journal_file.SCHEMA_VERSION:
            return str(error)
        raise
    return None


def _has_whole_copy(path: Path) -> bool:
    with contextlib.closing(journal_file.connect(path, read_only=True)) as connection:
        copied = journal_copy.compare(path, connection)
    return copied is not None and copied.is_sound


def _counts(journal: Journal) -> dict[str, Any]:
    states = [trial.state for trial in journal.history()]
    return {
        "trials": {
            "complete": states.count(TrialState.COMPLETE),
            "pruned": states.count(TrialState.PRUNED),
            "failed": states.count(TrialState.FAILED),
            "in_flight": sum(not state.is_finished for state in states),
        },
        "events": journal.length,
        "reports": len(journal.reports()),
        "guards": len(journal.guards()),
    }


def _salvaged(folder: Path) -> Salvaged:
    path = folder / journal_file.NAME
    copied = journal_copy.read(path) or journal_copy.Content()
    if copied.version is not None and copied.version > journal_file.SCHEMA_VERSION:
        raise RequestError(f"{journal_copy.beside(path)} was written by a newer Heldout; upgrade heldout first")
    backup = journal_file.backup_of(path)
    try:
        found = salvage(copied, (path, path.with_name(DRAFT), backup))
    except OSError as error:
        raise _no_room(folder, error) from error
    if found is None:
        raise RequestError(
            f"something must be left of study {folder.name!r}, but neither {path.name} nor "
            f"{journal_copy.beside(path).name} nor {backup.name} has a record that can be read; put back a copy of "
            f"yours, or `heldout delete {folder.name} --keep-runs`"
        )
    state = found.tables["meta"].get("state")
    if (found.missing or found.left_out) and state is not None and state[1] == '"COMPLETE"':
        # What was lost may have been a trial, so there is something to resume.
        puts = max(row[3] for row in found.tables["meta"].values())
        found.tables["meta"]["state"] = ("state", '"STOPPED"', time.time(), puts + 1)
    return found


def _put_in_place(path: Path, salvaged: Salvaged) -> list[str]:
    """Replaces journal and second record, and returns the names that damaged ones have now."""
    draft, copy, backup = path.with_name(DRAFT), journal_copy.beside(path), journal_file.backup_of(path)
    is_partial = bool(salvaged.missing or salvaged.left_out)
    copied = journal_copy.read(path)
    try:
        journal_file.make(draft, {table: rows.values() for table, rows in salvaged.tables.items()}, anew=False)
        kept = []
        if copied is not None and (is_partial or not copied.is_sound):
            kept += _set_aside(copy)
        journal_copy.write(copy, lambda: salvaged.tables, journal_file.SCHEMA_VERSION)
        if is_partial or not journal_file.is_sound(backup):
            kept += _set_aside(backup)
        kept = _set_aside(path) + kept
        os.replace(draft, path)
        journal_copy.sync(path.parent)
    except OSError as error:
        raise _no_room(path.parent, error) from error
    return kept


def _set_aside(path: Path) -> list[str]:
    """Gives a file, and SQLite's log beside it, other names, and returns these; what is empty is removed."""
    number = 1
    while any(Path(f"{path}.damaged{_mark(number)}{log}").exists() for log in ("", "-wal")):
        number += 1
    names = []
    for log in ("", "-wal", "-shm"):  # a log of another file SQLite would play into the new one
        old, other = Path(f"{path}{log}"), Path(f"{path}.damaged{_mark(number)}{log}")
        if not old.exists():
            continue
        if log == "-shm" or not old.stat().st_size:
            old.unlink()
        else:
            os.replace(old, other)
            names.append(other.name)
    return names


def _mark(number: int) -> str:
    return f"-{number}" if number > 1 else ""


def _no_room(folder: Path, error: OSError) -> RequestError:
    return RequestError(f"repairing must be able to write to {folder}, but: {error.strerror or error}; make room there")

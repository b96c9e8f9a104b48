"""Making a new study's folder, taking over one that was left before its study began, and taking it back."""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path

from search.errors import RequestError, StudyError
from search.record import journal_file
from search.record.journal import Journal
from search.record.lock import LOCKS
from search.study import Study, check_name


def reserve(workspace: Path, name: str | None, space: str) -> Path:
    """Make the new study's folder, which takes its name; what a launch left that was killed early is taken over.

    Raises:
        StudyError: If the given name is taken.
    """
    studies = workspace / "studies"
    if name is not None:
        folder = studies / check_name(name)
        try:
            folder.mkdir()
        except FileExistsError:
            if not never_began(folder):
                raise _taken(folder) from None
        return folder
    base = re.sub(r"[^A-Za-z0-9._-]|\.(?=\.)", "_", space).lstrip("._-")[:90] or "study"
    number = 1
    while True:
        try:
            (studies / f"{base}-{number}").mkdir()
            return studies / f"{base}-{number}"
        except FileExistsError:
            number += 1


def never_began(folder: Path) -> bool:
    """Whether all that a folder holds was left by a launch before its study began (or is being made by one now)."""
    if folder.is_symlink():
        return False
    if not journal_file.holds_study(folder):
        return (folder / "lock").exists() or not any(folder.iterdir())
    try:
        with Journal.open(folder / "journal.sqlite", read_only=True) as journal:
            return journal.get("study") is None or journal.get("state") is None
    except RequestError:
        return False  # damaged is not unneeded


def _taken(folder: Path) -> StudyError:
    name, began = folder.name, False
    with contextlib.suppress(RequestError):
        began = Study.at(folder).meta("state") is not None
    way = f"continue it with `heldout resume {name}`" if began else f"remove it by `heldout delete {name}`"
    return StudyError(f"there is a study called {name!r} already; {way}, or choose another --study")


def clear(folder: Path) -> None:
    """Empty a folder of ``reserve`` but for its locks; for who holds them.

    Raises:
        StudyError: If a study has begun in it meanwhile.
    """
    if not never_began(folder):
        raise _taken(folder)
    for left in folder.iterdir():
        if left.name not in LOCKS:
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def release(folder: Path) -> None:
    """Take back ``reserve``: nothing half-written stays of a study that never began."""
    shutil.rmtree(folder, ignore_errors=True)

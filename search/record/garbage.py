"""What a workspace holds that nothing needs, and removing it; never a line of the ledger."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from search.errors import RequestError
from search.loop import keeping
from search.record import disk, journal_file, lifecycle
from search.record.journal import Journal
from search.record.lock import driver_of, locked
from search.record.reserving import never_began
from search.study import workspace_folder, workspace_id
from search.tracker import publishing

_YOUNG = 600.0  # seconds in which what looks like nobody's may be somebody's who is just starting
_STALE = 86_400.0  # where nothing tells whether a process is still at it
_OF_PROCESS = re.compile(r".+\.(\d+)\.new(?:-\w+)?|\..+-(\d+)\.\w+(?:\.h5)?")


@dataclass(frozen=True)
class Waste:
    """One thing that nothing needs: what it is, where, how many bytes, and how it goes."""

    what: str
    path: str
    bytes: int
    remove: Callable[[], Any]


def gc(workspace: str | os.PathLike[str] | None = None, *, dry_run: bool = False) -> dict[str, Any]:
    """Remove what nothing needs from a workspace.

    That is: half-deleted studies; studies that never began; stored rows that no study uses; temporary files of
    processes that are gone; models that ``--keep`` would not keep; and, in the workspace's own MLflow store, runs of
    studies that are gone. A server's runs are left alone, but for those of a half-deleted study. So is a study that is
    being driven.

    Args:
        dry_run: Say it and remove nothing.

    Returns:
        ``removed`` (``what``, ``path``, ``bytes`` of each), ``bytes`` in all, and ``left``, which could not be removed
        and why.
    """
    root = workspace_folder(workspace)
    removed: list[dict[str, Any]] = []
    left: list[str] = []
    for find in (_halves, _never_began, _rows, _temporary, _models, _runs):
        for waste in list(find(root, left)):
            try:
                if not dry_run:
                    waste.remove()
            except (RequestError, OSError) as error:
                left.append(f"{waste.what} {waste.path}: {error}")
            else:
                removed.append({"what": waste.what, "path": waste.path, "bytes": waste.bytes})
    return {"removed": removed, "bytes": sum(one["bytes"] for one in removed), "left": left}


def lines(found: dict[str, Any], dry_run: bool) -> list[str]:
    """What ``gc`` found, in plain words."""
    out = [f"{one['what']}: {one['path']} ({disk.shown(one['bytes'])})" for one in found["removed"]]
    out += [f"left: {why}" for why in found["left"]]
    if not found["removed"]:
        return [*out, "there is nothing to remove"]
    return [*out, f"{disk.shown(found['bytes'])} {'would be freed' if dry_run else 'freed'}; the ledger is as it was"]


def _halves(root: Path, _: list[str]) -> Iterator[Waste]:
    for place in lifecycle.halves(root):
        is_study = (place / "journal.sqlite").exists()
        what = "half-deleted study" if is_study else "half-deleted folder"
        yield Waste(what, str(place), disk.size(place), partial(lifecycle.finish, place))


def _never_began(root: Path, _: list[str]) -> Iterator[Waste]:
    for folder in lifecycle.folders(root):
        if _is_dead(folder):
            drop = partial(_drop, root, folder)
            yield Waste("study that never began", str(folder), disk.size(folder), drop)


def _is_dead(folder: Path) -> bool:
    """Whether a study's folder was left before its study began."""
    is_left = never_began(folder) if journal_file.holds_study(folder) else True
    return is_left and driver_of(folder) is None and _age(folder) > _YOUNG


def _drop(root: Path, folder: Path) -> None:
    with locked(folder):
        lifecycle.discard(root, folder)


def _rows(root: Path, left: list[str]) -> Iterator[Waste]:
    dead = frozenset(folder for folder in lifecycle.folders(root) if _is_dead(folder))
    needed = lifecycle.used(root, but=dead)
    for kind in ("rows", "sealed"):
        for path in _entries(root / kind):
            if path.name.startswith(".") or not path.is_dir() or _age(path) <= _YOUNG:
                continue
            if needed is None:
                left.append(f"rows {path}: a study is starting, or has a journal that cannot be read")
            elif path.name not in needed:
                what = "rows without a study" if kind == "rows" else "sealed rows without a study"
                yield Waste(what, str(path), disk.size(path), partial(_discard_rows, root, path, dead))


def _discard_rows(root: Path, path: Path, dead: frozenset[Path]) -> None:
    # Asked again at the last moment: removing others takes a while, in which a launch may have found these.
    needed = lifecycle.used(root, but=dead)
    if needed is None or path.name in needed:
        raise RequestError("a study has begun to use it")
    lifecycle.discard(root, path)


def _temporary(root: Path, _: list[str]) -> Iterator[Waste]:
    for kind in ("rows", "sealed"):
        for path in _entries(root / kind):
            if path.name.startswith((".tmp-", ".refit-")) and not _in_use(path):
                yield _temp(path)
    for folder in (root, *lifecycle.folders(root)):
        inside = [folder] if folder == root else [folder, folder / "guard", folder / "frozen"]
        for path in (path for place in inside for path in _entries(place)):
            found = _OF_PROCESS.fullmatch(path.name)
            if found and path.is_file() and _age(path) > _YOUNG and not _runs_here(int(found[1] or found[2])):
                yield _temp(path)


def _temp(path: Path) -> Waste:
    return Waste("temporary of a process that is gone", str(path), disk.size(path), partial(lifecycle.remove, path))


def _models(root: Path, _: list[str]) -> Iterator[Waste]:
    for folder in lifecycle.folders(root):
        if driver_of(folder):
            continue  # its driver does it
        try:
            with Journal.open(folder / "journal.sqlite", read_only=True) as journal:
                history, limit = journal.history(), keeping.limit(journal)
                chosen = keeping.chosen(journal)
        except RequestError:
            continue
        winners = keeping.kept(history, limit) | chosen
        ended = [trial.number for trial in history if trial.state.is_finished]
        size = sum(keeping.clear(folder, number, number in winners, dry_run=True) for number in ended)
        if size:
            drop = partial(_tidy, folder, history, limit, chosen)
            yield Waste("models that cannot win", str(folder / "trials"), size, drop)


def _tidy(folder: Path, history: Any, limit: int | None, chosen: set[int]) -> None:
    with locked(folder):
        keeping.tidy(folder, history, limit, chosen)


def _runs(root: Path, left: list[str]) -> Iterator[Waste]:
    """Runs of ours in the workspace's own store whose study is gone."""
    held = _held(root)  # before the studies are read: a run has its study in a journal first
    known = lifecycle.kept_runs(root)
    for folder in (*lifecycle.folders(root), *lifecycle.halves(root)):
        if not held or not journal_file.holds_study(folder):
            continue
        try:
            with Journal.open(folder / "journal.sqlite", read_only=True) as journal:
                known.add(str((journal.get("study") or {}).get("study_id")))
        except RequestError as error:
            left.append(f"MLflow runs, since any might be those of {folder.name}: {error}")
            return
    gone = {study: size for study, size in held.items() if study not in known}
    if gone:
        asked = {"studies": sorted(gone), "workspace": str(root)}
        what = f"MLflow runs of {'a study that is' if len(gone) == 1 else f'{len(gone)} studies that are'} gone"
        drop = partial(publishing.call, "search.tracker.removing", publishing.default_uri(root), asked)
        yield Waste(what, str(root / "mlflow.db"), sum(gone.values()), drop)


def _held(root: Path) -> dict[str, int]:
    """Ids of this workspace's studies that have runs in its own store, with the bytes of their artifacts.

    Another workspace may publish here, and its runs are not ours to remove: a study's run says whose it is. Read with
    SQL, since importing MLflow takes seconds and mostly there is nothing to remove.
    """
    file, found = root / "mlflow.db", dict[str, int]()
    if not file.exists():
        return found
    query = (
        "SELECT tags.value, runs.artifact_uri FROM tags JOIN runs ON runs.run_uuid = tags.run_uuid "
        "WHERE tags.key = 'heldout.study_id' AND tags.value IN ("
        "SELECT study.value FROM tags AS study JOIN tags AS owner ON owner.run_uuid = study.run_uuid "
        "WHERE study.key = 'heldout.study_id' AND owner.key = 'heldout.workspace' AND owner.value = ?)"
    )
    with contextlib.suppress(sqlite3.Error):
        with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as store:
            for study, uri in store.execute(query, (workspace_id(root),)):
                local = str(uri).startswith("file:")
                place = Path(urllib.parse.unquote(urllib.parse.urlsplit(str(uri)).path))
                found[study] = found.get(study, 0) + (disk.size(place) if local else 0)
    return found


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _age(path: Path) -> float:
    """Seconds since it changed last; none for what is gone."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _in_use(path: Path) -> bool:
    """Whether a process may still be at a temporary folder, which does not say whose it is."""
    if _age(path) <= _YOUNG:
        return True
    if sys.platform != "linux":
        return _age(path) <= _STALE
    wanted = str(path)
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # another user's, or gone
            if wanted in (process / "maps").read_text(errors="replace"):
                return True
            for entry in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(entry).startswith(wanted):
                        return True
    return False


def _runs_here(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True

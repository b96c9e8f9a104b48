"""Deleting a study: its folder, the rows that no other study needs, and its runs in MLflow; never the ledger's lines.

The folder is first moved to ``WORKSPACE/deleting``, where nothing takes it for a study, and its journal goes last: what
is cut short there is finished by the next ``heldout delete`` or ``heldout gc``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from search.errors import RequestError, StudyError, TrackingError
from search.record import disk, journal_file, places
from search.record.journal import Journal
from search.record.lock import driver_of, locked
from search.study import Study, check_name, workspace_folder
from search.tracker import publishing

DELETING = "deleting"
# In a study's folder: what was asked for must outlive a kill. In the workspace: ids of studies whose runs were to stay.
_KEEP_RUNS = "keep-runs"
_TRACKER_SECONDS = 75.0  # its grace after a driver's death, and some


def delete(study: str, *, workspace: str | os.PathLike[str] | None = None, keep_runs: bool = False) -> dict[str, Any]:
    """Delete a study, or finish deleting it; the ledger's lines of it stay, because its openings have happened.

    Args:
        study: Its name.
        keep_runs: Leave its runs in MLflow, as where the server is gone for good.

    Returns:
        ``study``, ``bytes`` freed on this disk, ``rows`` (whether stored rows went too), and ``mlflow``: None, or what
        ``removing.remove`` says.

    Raises:
        StudyError: If there is no such study, or it is being driven.
        TrackingError: If MLflow cannot be reached; then nothing is deleted, so that no run is left without a record.
    """
    root, name = workspace_folder(workspace), check_name(study)
    folder = root / "studies" / name
    found = _halves_of(root, name)
    see(study, workspace)
    done = [finish(place, keep_runs) for place in found]
    if folder.is_dir():
        with locked(folder):
            _published(folder)
            record = _check(folder, keep_runs)
            if keep_runs:
                (folder / _KEEP_RUNS).touch()
                _keep_runs(root, record)
            place = root / DELETING / f"{name}.{str(record.get('study_id') or os.getpid())[:8]}"
            place.parent.mkdir(exist_ok=True)
            os.rename(folder, place)
            done.append(_finish(place, keep_runs))
    mlflow = [one["mlflow"] for one in done if one["mlflow"] is not None]
    return {
        "study": name,
        "bytes": sum(one["bytes"] for one in done),
        "rows": any(one["rows"] for one in done),
        "mlflow": mlflow[-1] if mlflow else None,
    }


def see(study: str, workspace: str | os.PathLike[str] | None = None) -> None:
    """See that there is such a study, whole or half-deleted.

    Raises:
        StudyError: If not; says which there are.
    """
    root, name = workspace_folder(workspace), check_name(study)
    if not (root / "studies" / name).is_dir() and not _halves_of(root, name):
        Study(name, workspace)


def _halves_of(root: Path, name: str) -> list[Path]:
    return [place for place in halves(root) if place.name.rpartition(".")[0] == name]


def kept_runs(root: Path) -> set[str]:
    """Ids of deleted studies whose runs were to stay in MLflow."""
    file = root / _KEEP_RUNS
    return set(file.read_text().split()) if file.exists() else set()


def _keep_runs(root: Path, record: dict[str, Any]) -> None:
    if record:
        with (root / _KEEP_RUNS).open("a") as file:
            file.write(f"{record['study_id']}\n")


def halves(root: Path) -> list[Path]:
    """Half-deleted studies of a workspace."""
    place = root / DELETING
    return sorted(path for path in place.iterdir() if path.is_dir()) if place.is_dir() else []


def finish(place: Path, keep_runs: bool = False) -> dict[str, Any]:
    """Finish deleting what ``halves`` names.

    Raises:
        StudyError: If another process is at it.
        TrackingError: As ``delete``.
    """
    with locked(place):
        return _finish(place, keep_runs)


def _finish(place: Path, keep_runs: bool) -> dict[str, Any]:
    root = place.parent.parent
    record, digest, mlflow = read(place, "study") or {}, digest_of(place), None
    if record and not (keep_runs or (place / _KEEP_RUNS).exists()):
        asked = {"studies": [record["study_id"]], "workspace": str(root)}
        mlflow = publishing.call("search.tracker.removing", publishing.uri_of(places.study(record, root)), asked)
    freed = disk.size(place)
    needed = used(root)
    rows = digest is not None and needed is not None and digest not in needed
    if rows:
        freed += sum(discard(root, root / kind / str(digest)) for kind in ("rows", "sealed"))
    for path in place.iterdir():
        if not path.name.startswith("journal.sqlite"):
            remove(path)
    for path in sorted(place.glob("journal.sqlite-*")):
        remove(path)
    remove(place)
    with contextlib.suppress(OSError):  # not empty
        place.parent.rmdir()
    return {"bytes": freed, "rows": rows, "mlflow": mlflow}


def used(root: Path, but: frozenset[Path] = frozenset()) -> set[str] | None:
    """Digests of stored rows that studies need; None if that is not known, as while one is starting.

    Args:
        but: Folders that count as no study.
    """
    found = set()
    for folder in folders(root):
        if folder in but:
            continue
        digest = digest_of(folder)
        if digest is not None:
            found.add(digest)
        elif driver_of(folder) or journal_file.holds_study(folder):
            return None  # about to store rows, or a journal that cannot be read
    return found


def folders(root: Path) -> list[Path]:
    """Folders of the workspace's studies, also of those that never began."""
    place = root / "studies"
    return sorted(path for path in place.iterdir() if path.is_dir()) if place.is_dir() else []


def digest_of(folder: Path) -> str | None:
    """Digest of the rows that a study uses, as far as its journal tells."""
    prepared = read(folder, "prepared")
    return None if prepared is None else Path(prepared["rows"]).name


def read(folder: Path, key: str) -> Any:
    """A meta value of a study's journal; None if there is none, or no journal that can be read."""
    try:
        with Journal.open(folder / "journal.sqlite", read_only=True) as journal:
            return journal.get(key)
    except RequestError:
        return None


def discard(root: Path, path: Path) -> int:
    """Remove a folder that others could take for a whole one while it goes: under another name. Bytes freed."""
    if not path.exists():
        return 0
    size, place = disk.size(path), root / DELETING / f"{path.parent.name}-{path.name}.{os.getpid()}"
    place.parent.mkdir(exist_ok=True)
    os.rename(path, place)
    remove(place)
    return size


def remove(path: Path) -> None:
    """Remove a file or a folder; what is gone already is gone."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _check(folder: Path, keep_runs: bool) -> dict[str, Any]:
    """The study's record, once it is sure that its runs can be removed."""
    record: dict[str, Any] = {}
    try:
        if journal_file.holds_study(folder):
            with Journal.open(folder / "journal.sqlite", read_only=True) as journal:
                record = journal.get("study") or {}
        if record and not keep_runs:
            uri = publishing.uri_of(places.study(record, folder.parent.parent))
            publishing.check_uri(uri)
            if not uri.startswith(("http", "sqlite")):  # a database server answers to its driver alone
                publishing.call("search.tracker.removing", uri, {"studies": [], "workspace": str(folder.parent.parent)})
    except TrackingError as error:
        raise TrackingError(f"nothing was deleted: {error}; or leave its MLflow runs with --keep-runs") from None
    except RequestError as error:
        if not keep_runs:  # a damaged journal, which cannot say where its runs are
            raise RequestError(f"{error}; or delete it as it is and leave its MLflow runs, with --keep-runs") from None
    return record


def _published(folder: Path) -> None:
    """Wait for the tracker of a driver that was killed, which may still be creating runs."""
    deadline = time.monotonic() + _TRACKER_SECONDS
    while not _is_free(folder / "tracking.lock"):
        if time.monotonic() > deadline:
            raise StudyError(f"study {folder.name!r} must not be written to MLflow meanwhile, but it is; try again")
        time.sleep(0.2)


def _is_free(lock: Path) -> bool:
    import fcntl

    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True


def lines(found: dict[str, Any]) -> list[str]:
    """What ``delete`` did, in plain words."""
    out = [f"deleted {found['study']}: {disk.shown(found['bytes'])}{', its stored rows too' if found['rows'] else ''}"]
    return [*out, *mlflow_lines(found["mlflow"]), "the ledger keeps its openings"]


def mlflow_lines(found: dict[str, Any] | None) -> Iterator[str]:
    """What was removed from MLflow, in plain words."""
    if found is None:
        return
    yield f"MLflow: {found['runs']} runs removed"
    if found["marked"]:
        yield "    the server keeps them marked as deleted; `mlflow gc` there frees the rest"
    if found["artifacts_left"]:
        yield f"    artifacts of {found['artifacts_left']} runs could not be removed"
    if found["versions"]:
        yield f"    registered models are left alone: {', '.join(found['versions'])}"

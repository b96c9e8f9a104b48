"""Where a study's files lie: by its folder and their names, so that a workspace can be moved whole.

A record has the paths of the day it was written. Readers ask here, where only the names in them count::

    WORKSPACE/rows/DIGEST, sealed/DIGEST, mlflow.db, artifacts/
    WORKSPACE/studies/NAME/journal.sqlite, preprocess.keras, folds/
                           trials/0017/, guard/0017.npy, frozen/, texts/DIGEST/preprocess.keras, tensorboard/0017/
"""

from __future__ import annotations

import contextlib
import sqlite3
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from search.record.journal import Journal
from search.tracker import publishing

WEIGHTS = "model.weights.h5"
LOG = "log.txt"
TEXTS = "texts"
EVENTS = "tensorboard"
_ARTIFACT_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)


def trial(folder: Path, number: int) -> Path:
    """The folder of one trial of the study in ``folder``."""
    return folder / "trials" / f"{number:04d}"


def weights(folder: Path, number: int) -> Path:
    """A trial's weights, if they are kept."""
    return trial(folder, number) / WEIGHTS


def preprocess(folder: Path, number: int) -> Path:
    """The preprocessing of a trial that has a split of its own, if it is kept."""
    return trial(folder, number) / "preprocess.keras"


def events(folder: Path, number: int) -> Path:
    """What a trial logs for TensorBoard, where that was asked for; not in its own folder, whose files come and go."""
    return folder / EVENTS / f"{number:04d}"


def guard_parts(folder: Path, number: int) -> Path:
    """What each guard row adds to a trial's score, if that is kept."""
    return folder / "guard" / f"{number:04d}.npy"


def prepared(journal: Journal) -> dict[str, Any]:
    """The journal's ``prepared``, with ``rows``, ``sealed``, ``preprocess`` and the folds where they are now."""
    found: dict[str, Any] = journal.get("prepared")
    return found | located(found, journal.path.parent.absolute())


def located(found: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """``rows``, ``sealed``, ``preprocess`` and folds of the study in ``folder``, from their recorded paths."""
    workspace, fitted, validation = folder.parent.parent, found.get("preprocess"), found.get("validation")

    def here(path: str) -> str:
        *_, above, text, name = Path(path).parts
        return str(folder / above / text / name if above == TEXTS else folder / name)

    return {
        "rows": str(workspace / "rows" / Path(found["rows"]).name),
        "sealed": str(workspace / "sealed" / Path(found["sealed"]).name),
        "preprocess": None if fitted is None else here(fitted),
        "validation": None if validation is None else validation | {"folder": here(validation["folder"])},
    }


def frozen(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A frozen selection as recorded, with its models' files where they are now."""
    here = {
        role: model | {"path": str(folder / "frozen" / Path(model["path"]).name)}
        for role, model in record["models"].items()
    }
    return {**record, "models": here}


def study(record: Mapping[str, Any], workspace: Path) -> dict[str, Any]:
    """The journal's ``study``, with the workspace's own MLflow store where that is now."""
    found, root = dict(record), record.get("artifact_root")
    if root is None:
        return found
    if found.get("tracking_uri") == publishing.default_uri(Path(root).parent):
        found["tracking_uri"] = publishing.default_uri(workspace)
    return found | {"artifact_root": str(workspace / "artifacts")}


def rebase_artifacts(workspace: Path) -> None:
    """Let the workspace's own MLflow store find its artifacts here, after the workspace was moved.

    MLflow records absolute addresses and has no call that changes them; what was not the workspace's stays.

    Raises:
        sqlite3.Error: If the store cannot be read or written.
    """
    file, root = workspace / "mlflow.db", (workspace / "artifacts").as_uri()
    if not file.exists():
        return
    with contextlib.closing(sqlite3.connect(file, timeout=30.0)) as connection, connection:
        rows = connection.execute("SELECT artifact_location FROM experiments").fetchall()
        known = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        for (location,) in rows:
            old, _, name = str(location).rpartition("/")
            if not old.startswith("file://") or not old.endswith("/artifacts") or old == root:
                continue
            if not (workspace / "artifacts" / urllib.parse.unquote(name)).is_dir():
                continue  # of another workspace that publishes here
            for table, column in _ARTIFACT_COLUMNS:
                if table in known:
                    connection.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                        f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                        (f"{root}/{name}", len(location) + 1, location, len(location) + 1, f"{location}/"),
                    )

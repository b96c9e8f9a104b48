"""Where a study's files lie, whatever its record says."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from search.record import places
from search.record.journal import Journal
from search.tracker import publishing, tracking

OLD = Path("/nowhere/before")


def study(root: Path) -> dict[str, Any]:
    return {"tracking_uri": publishing.default_uri(root), "artifact_root": str(root / "artifacts"), "name": "s"}


def test_rows_and_preprocessing_are_found_by_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "studies" / "s"
    folder.mkdir(parents=True)
    prepared = {
        "rows": str(OLD / "rows" / "abc"),
        "sealed": str(OLD / "sealed" / "abc"),
        "preprocess": str(OLD / "studies" / "old-name" / "preprocess.keras"),
        "objective": "val_loss",
    }
    with Journal.create(folder / "journal.sqlite", {"prepared": prepared}) as journal:
        found = places.prepared(journal)
        assert journal.get("prepared") == prepared
    assert found == prepared | {
        "rows": str(tmp_path / "rows" / "abc"),
        "sealed": str(tmp_path / "sealed" / "abc"),
        "preprocess": str(folder / "preprocess.keras"),
        "validation": None,
    }
    assert places.located(prepared | {"preprocess": None}, folder)["preprocess"] is None
    for was, now in (("old-name/folds", "folds"), ("old-name/texts/0123/folds", "texts/0123/folds")):
        kfold = {"plan": "kfold:5", "folder": str(OLD / "studies" / was)}
        moved = places.located(prepared | {"validation": kfold}, folder)["validation"]
        assert moved == kfold | {"folder": str(folder / now)}


def test_frozen_files_are_those_of_the_studys_folder(tmp_path: Path) -> None:
    record = {"digest": "d", "models": {"winner": {"trial": 3, "path": str(OLD / "studies/s/frozen/trial-0003.keras")}}}
    found = places.frozen(record, tmp_path)
    assert found["models"]["winner"] == {"trial": 3, "path": str(tmp_path / "frozen" / "trial-0003.keras")}
    assert found["digest"] == "d" and record["models"]["winner"]["path"].startswith("/nowhere")


def test_the_workspaces_own_store_moves_with_it_and_another_stays(tmp_path: Path) -> None:
    assert places.study(study(OLD), tmp_path) == study(tmp_path)
    elsewhere = study(OLD) | {"tracking_uri": "http://127.0.0.1:5000"}
    assert places.study(elsewhere, tmp_path)["tracking_uri"] == "http://127.0.0.1:5000"
    assert places.study({"tracking_uri": "elsewhere"}, tmp_path) == {"tracking_uri": "elsewhere"}


@pytest.mark.filterwarnings("ignore:::(mlflow|sqlalchemy|alembic|google|pydantic)")
def test_mlflows_addresses_of_artifacts_follow_the_workspace(tmp_path: Path) -> None:
    old, new = tmp_path / "an old place", tmp_path / "a new place"
    client = tracking.connect(publishing.default_uri(old))
    ours = client.create_experiment("cells", (old / "artifacts" / "cells").as_uri())
    foreign = client.create_experiment("theirs", "file:///srv/other/artifacts/theirs")
    run = client.create_run(ours).info.run_id
    theirs = client.create_run(foreign).info
    client.log_text(run, "kept", "note.txt")
    assert (old / "artifacts" / "cells" / run / "artifacts" / "note.txt").exists()
    shutil.move(old, new)

    places.rebase_artifacts(new)
    places.rebase_artifacts(new)
    client = tracking.connect(publishing.default_uri(new))
    assert client.get_run(run).info.artifact_uri == (new / "artifacts" / "cells" / run / "artifacts").as_uri()
    later = client.create_run(ours).info.run_id
    client.log_text(later, "more", "note.txt")
    assert (new / "artifacts" / "cells" / later / "artifacts" / "note.txt").exists()
    assert client.get_experiment(ours).artifact_location == (new / "artifacts" / "cells").as_uri()
    assert client.get_run(theirs.run_id).info.artifact_uri == theirs.artifact_uri
    assert not old.exists()
    with closing(sqlite3.connect(new / "mlflow.db")) as connection:
        assert connection.execute("PRAGMA quick_check").fetchone() == ("ok",)

"""Puts a study's report and models with its run in MLflow, and reads studies from there: a process of its own.

Run as ``python -m search.tracker.storing`` by ``publishing.call``: JSON in, JSON out, the address in the environment.
What is read was written by whoever can write to the server: names of files are checked, and digests tell a torn copy.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from mlflow import MlflowClient, set_tracking_uri
from mlflow.entities import Run, ViewType

from search.tracker import asking, reading, runs, tracking

_MANIFEST = "published.json"
_PAGE = "report/report.html"


def store(client: MlflowClient, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Upload a folder to the run of a study; the list of its files goes last, so that it never names what is not there.

    Args:
        asked: ``study_id``, ``folder``, and ``place``, what it is stored under; other places stay as they are.
    """
    found = _parents(client, f"tags.`{runs.STUDY_ID}` = '{asked['study_id']}'")
    if not found:
        return {"error": "the run of the study is not in MLflow; has the tracker caught up? see `heldout status`"}
    folder, run = Path(asked["folder"]), found[0].info.run_id
    files = {path.relative_to(folder).as_posix(): _digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    client.log_artifacts(run, str(folder), asked["place"])
    with tempfile.TemporaryDirectory(prefix="heldout-store-") as scratch:
        manifest = Path(scratch) / _MANIFEST
        manifest.write_text(json.dumps(files, indent=2))
        client.log_artifact(run, str(manifest), asked["place"])
    return {"run_id": run, "files": list(files)}


def states(client: MlflowClient, asked: Mapping[str, Any]) -> dict[str, Any]:
    """How far the study called ``study`` is, or every study if that is None, as far as MLflow has been told."""
    return {"studies": [_state(client, run) for run in reversed(_named(client, asked["study"]))]}


def trials(client: MlflowClient, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The ``trials`` of ``study`` as JSON; None where there is no such study."""
    found = _named(client, asked["study"])
    return {"trials": [trial.to_json() for trial in reading.trials(client, found[0])] if found else None}


def trial(client: MlflowClient, asked: Mapping[str, Any]) -> dict[str, Any]:
    """One ``trial`` of ``study`` by its ``number``, or None; and the ``plan`` by which the study validates."""
    found = _named(client, asked["study"])
    if not found:
        return {"trial": None}
    shown = reading.shown(client, found[0], asked["number"])
    return {"trial": shown, "plan": found[0].data.params.get("validation", "holdout")}


def fetch(client: MlflowClient, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Copy what was stored of ``study`` to the folder ``out``.

    Args:
        asked: ``study``; ``place``, as for ``store``, or ``"page"`` for the report's page, which every study has that
            has ended; ``below``, the part of it that is wanted, such as ``model/``, or "" for all; and ``out``.

    Returns:
        ``files``, or None where nothing was published.
    """
    found = _named(client, asked["study"])
    if not found:
        return {"files": None}
    run, out = found[0].info.run_id, Path(asked["out"])
    with tempfile.TemporaryDirectory(prefix="heldout-fetch-") as scratch:
        if asked["place"] == "page":
            if not _is_there(client, run, _PAGE):
                return {"files": None}
            shutil.copyfile(client.download_artifacts(run, _PAGE, scratch), out / Path(_PAGE).name)
            return {"files": [Path(_PAGE).name]}
        place = asked["place"]
        if not _is_there(client, run, f"{place}/{_MANIFEST}"):
            return {"files": None}
        listed = json.loads(Path(client.download_artifacts(run, f"{place}/{_MANIFEST}", scratch)).read_bytes())
        wanted = {name: digest for name, digest in listed.items() if name.startswith(asked["below"])}
        for name, digest in wanted.items():
            pure = PurePosixPath(name)
            if pure.is_absolute() or ".." in pure.parts or "\\" in name:
                raise ValueError(f"{name!r} must be a file below the study's own folder")
            path = Path(client.download_artifacts(run, f"{place}/{name}", scratch))
            if _digest(path) != digest:
                raise ValueError(f"{name} is not what was published; publish the study again")
            to = out / pure.relative_to(asked["below"].rstrip("/")) if asked["below"].endswith("/") else out / name
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, to)
    return {"files": sorted(wanted)}


def _is_there(client: MlflowClient, run: str, path: str) -> bool:
    return any(one.path == path for one in client.list_artifacts(run, str(PurePosixPath(path).parent)))


def _named(client: MlflowClient, study: str | None) -> list[Run]:
    """The runs of studies of that name, or of all, the newest first; trials have no workspace of their own."""
    wanted = f"tags.`{runs.WORKSPACE}` LIKE '%'"
    return _parents(client, wanted if study is None else f"{wanted} and tags.`heldout.study` = '{study}'")


def _parents(client: MlflowClient, wanted: str) -> list[Run]:
    found = [run for run in asking.runs(client, wanted, ViewType.ACTIVE_ONLY) if runs.TRIAL not in run.data.tags]
    return sorted(found, key=lambda run: -run.info.start_time)


def _state(client: MlflowClient, parent: Run) -> dict[str, Any]:
    """A study in the keys of ``Study.status``, as far as its runs tell."""
    tags, params, run = parent.data.tags, parent.data.params, parent.info
    last = {number: one for (number, _), one in reading.attempts(client, parent).items()}
    own = {number: one for number, one in last.items() if runs.CONFIRMS not in one.data.tags}
    ended = [one.data.tags.get(runs.STATE) for one in own.values()]
    scores = {
        number: one.data.metrics["score"]
        for number, one in last.items()
        if one.data.tags.get(runs.STATE) == "COMPLETE" and "score" in one.data.metrics
    }
    pick = max if params.get("direction") == "max" else min
    best = pick(scores, key=lambda number: scores[number]) if scores else None
    plan, planned = params.get("validation", "holdout"), params.get("trials")
    return {
        "study": tags["heldout.study"],
        "study_id": tags[runs.STUDY_ID],
        "state": tags.get(runs.STATE, "RUNNING"),
        "objective": params.get("objective"),
        "direction": params.get("direction"),
        "sampler": params.get("sampler"),
        "validation": None if plan == "holdout" else {"plan": plan},
        "trials": {state: ended.count(state.upper()) for state in ("complete", "pruned", "failed")},
        "running": sorted(number for number, one in last.items() if one.data.tags.get(runs.STATE) == "RUNNING"),
        "planned": None if planned is None else int(planned),
        "confirmed": sum(runs.CONFIRMS in one.data.tags and one.info.status != "RUNNING" for one in last.values()),
        "best": None if best is None else {"trial": best, "validation": scores[best]},
        "tracking": {"experiment_id": run.experiment_id, "run_id": run.run_id},
    }


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def act(uri: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Do what is asked: what one of the functions above is called."""
    set_tracking_uri(uri)  # artifacts behind a server are found by it
    file = tracking.sqlite_file(uri)
    if file is not None and not file.exists():  # nothing is made by looking
        raise FileNotFoundError(f"{file} must be MLflow's file, but is not there")
    known = {"store": store, "states": states, "trials": trials, "trial": trial, "fetch": fetch}
    return known[asked["do"]](tracking.connect(uri), asked)


if __name__ == "__main__":
    os._exit(asking.answer(act))

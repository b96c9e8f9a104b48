"""Removes studies' runs and their artifacts from MLflow: a process of its own, since MLflow is slow to import.

Run as ``python -m search.tracker.removing`` by ``publishing.call``: JSON in, JSON out, the address in the environment.
Runs are found by our tags, artifacts go before their run, and so what was cut short is found again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient, set_tracking_uri
from mlflow.entities import Run, ViewType
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from search.record import disk, places
from search.tracker import asking, publishing, runs, tracking

_SERVERS = ("http://", "https://")


def remove(uri: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Remove every run of the studies asked for.

    In a database runs go for good, with params, metrics and tags. A server only marks them as deleted; what that
    leaves, its own ``mlflow gc`` removes. Registered model versions are left alone, and so are their files.

    Args:
        asked: ``studies``, ids; ``workspace``, whose own store this may be.

    Returns:
        ``runs`` and ``bytes`` removed (bytes of local files alone), ``marked`` (runs that a server keeps marked as
        deleted), ``artifacts_left`` (runs whose artifacts could not be removed) and ``versions`` left alone.
    """
    workspace = Path(asked["workspace"])
    if uri == publishing.default_uri(workspace):
        places.rebase_artifacts(workspace)
    set_tracking_uri(uri)  # artifacts behind a server are found by it
    client = tracking.connect(uri)
    found = {run.info.run_id: run for study in asked["studies"] for run in _runs_of(client, study)}
    versions = list(_versions(client, set(found)))
    # An older way of logging a model put it among the run's own artifacts, where its versions still read it.
    needed = {version.run_id for version in versions if not str(version.source).startswith("models:/")}
    out: dict[str, Any] = {"runs": 0, "bytes": 0, "marked": 0, "artifacts_left": 0}
    out["versions"] = sorted(f"{version.name} {version.version}" for version in versions)
    forget = None if uri.startswith(_SERVERS) else getattr(client._tracking_client.store, "_hard_delete_run", None)
    for number, run in found.items():
        if run.info.lifecycle_stage != "active" and forget is None:
            continue  # marked already
        try:
            out["bytes"] += 0 if number in needed else _remove_artifacts(run)
        except Exception:  # whatever its store raises: the run itself can go
            out["artifacts_left"] += 1
        try:
            (forget or client.delete_run)(number)
        except MlflowException as error:
            # The process of a `delete` that was killed may still be at it beside us.
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        out["marked"] += forget is None
        out["runs"] += 1
    return out


def _runs_of(client: MlflowClient, study_id: str) -> Iterator[Run]:
    return asking.runs(client, f"tags.`{runs.STUDY_ID}` = '{study_id}'", ViewType.ALL)


def _versions(client: MlflowClient, ours: set[str]) -> Iterator[Any]:
    """Registered model versions that come of these runs; none where there is no registry."""
    with contextlib.suppress(Exception):
        for version in asking.pages(lambda token: client.search_model_versions(max_results=1000, page_token=token)):
            if version.run_id in ours:
                yield version


def _remove_artifacts(run: Run) -> int:
    """Remove a run's artifacts; bytes of files on this machine."""
    uri, number = str(run.info.artifact_uri), run.info.run_id
    if number not in uri.split("/"):
        raise ValueError(f"{uri} is not the run's own")
    if not uri.startswith("file:"):
        get_artifact_repository(uri).delete_artifacts()
        return 0
    place = Path(urllib.parse.unquote(urllib.parse.urlsplit(uri).path))
    place = place.parent if place.parent.name == number else place
    size = disk.size(place)
    shutil.rmtree(place, ignore_errors=True)
    if place.exists():
        raise OSError(f"{place} could not be removed")
    return size


if __name__ == "__main__":
    os._exit(asking.answer(remove))

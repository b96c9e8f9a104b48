"""MLflow's model registry: one exported file as a version that carries the alias ``champion``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from search.definition.problem import first_line
from search.errors import TrackingError

ALIAS = "champion"


def register_model(path: Path, name: str, tracking_uri: str, lineage: Mapping[str, Any]) -> dict[str, Any]:
    """Log an exported ``.keras`` file on its study's run and register it.

    Returns:
        ``name``, ``version``, ``alias`` and ``uri`` (``models:/NAME@champion``).

    Raises:
        TrackingError: If MLflow refuses.
    """
    import keras
    import mlflow
    import mlflow.tensorflow

    mlflow.set_tracking_uri(tracking_uri)
    client = mlflow.MlflowClient()
    try:
        run, experiment = _run_of(client, lineage)
        # Without it the model would be put into MLflow's default experiment, whose files lie in the working folder.
        mlflow.set_experiment(experiment_id=experiment)
        model = keras.models.load_model(path, compile=False)
        # Named requirements: letting MLflow infer them runs the model in another process for seconds.
        needs = [
            f"{package}=={lineage['versions'][package]}"
            for package in ("keras", "tensorflow")
            if package in lineage["versions"]
        ]
        logged = mlflow.tensorflow.log_model(
            model, name="model", run_id=run, registered_model_name=name, pip_requirements=needs
        )
        version = str(logged.registered_model_version)
        client.set_registered_model_alias(name, ALIAS, version)
    except Exception as error:
        raise TrackingError(
            f"the model could not be registered as {name!r}: {type(error).__name__}: {first_line(error)}"
        ) from error
    return {"name": name, "version": version, "alias": ALIAS, "uri": f"models:/{name}@{ALIAS}"}


def _run_of(client: Any, lineage: Mapping[str, Any]) -> tuple[str, str]:
    """The MLflow run of the exported trial, and its experiment."""
    wanted = f"tags.`heldout.study_id` = '{lineage['study_id']}' and tags.`heldout.trial` = '{lineage['trial']}'"
    experiment = client.get_experiment_by_name(lineage["space"]["name"])
    found = client.search_runs([experiment.experiment_id], wanted) if experiment is not None else []
    if not found:
        raise TrackingError(
            f"the run of trial {lineage['trial']} is not in MLflow; has the tracker caught up? see `heldout status`"
        )
    return str(found[0].info.run_id), str(experiment.experiment_id)

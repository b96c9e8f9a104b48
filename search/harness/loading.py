"""The job before all trials: the module is executed, its rows are stored and sealed, its preprocessing is fitted."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from search.definition import assets
from search.definition.problem import Problem, SpaceModule
from search.errors import SpaceError
from search.tiers import data, folds
from search.tiers.validation import HOLDOUT, parse


def load(payload: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Execute the module, store and seal its rows, fit its preprocessing on the train rows."""
    module = SpaceModule(Problem(**payload["problem"]))
    made = assets.made(module)
    dataset = module.load()
    if not isinstance(dataset, data.Dataset):
        raise SpaceError(
            f"{module.problem.path}: load() must return a search.Dataset, but returned "
            f"{type(dataset).__name__}; return Dataset(x, y)"
        )
    plan, found = parse(payload.get("validation") or HOLDOUT), None
    if plan.kind != HOLDOUT:
        data.check_dividable(dataset, str(plan))
    workspace = Path(payload["workspace"])
    manifest = data.prepare(
        dataset,
        workspace,
        payload["split_seed"],
        allow_nan=module.allow_nan or module.preprocess is not None,
        decode=module.decode,
        where=module.problem.path,
    )
    rows = workspace / "rows" / manifest["digest"]
    if plan.kind != HOLDOUT:
        units = data.labelled(dataset, payload["split_seed"], module.decode)
        found = folds.write(plan, units, manifest, Path(payload["folder"]) / "folds")
    sealed, preprocess = data.SealedRows(workspace / "sealed" / manifest["digest"]), None
    if module.preprocess is not None:
        from search.harness import preprocessing

        opened, folder = data.OpenRows(rows, module.decode), Path(payload["folder"])
        preprocess = preprocessing.shared(module, opened, found, folder, sealed, payload["budget"])
    return {
        "manifest": manifest,
        "validation": found,
        "rows": str(rows),
        "sealed": str(sealed.path),
        "preprocess": None if preprocess is None else str(preprocess),
        "assets": made,
        "objective": module.objective,
        "direction": module.direction,
        "epochs": module.epochs,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of Heldout and of what trains, samples and records with it, as installed here."""
    found = {}
    for name in (
        "heldout",
        "keras",
        "tensorflow",
        "jax",
        "torch",
        "keras-tuner",
        "hyperopt",
        "mlflow",
        "numpy",
    ):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found

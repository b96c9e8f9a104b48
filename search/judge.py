"""Scores what a trial left behind: predictions against validation labels and sealed guard labels."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from search import scoring
from search.data import OpenRows, SealedRows
from search.driver import Verdict
from search.errors import TrialFailed


class RowJudge:
    """The service's judge; lives in the driver's process and hands labels to no trial.

    Args:
        rows: Folder of the open rows; ``sealed``: folder of the sealed ones.
        objective: What the study searches for, such as ``val_accuracy``.
        problem: The space module as JSON, for a metric that only Keras knows.
    """

    def __init__(self, rows: Path, sealed: Path, objective: str, problem: dict[str, str]) -> None:
        self._open, self._sealed = OpenRows(rows), SealedRows(sealed)
        self._objective, self._problem = objective, problem
        self._labels = {"validation": self._open.labels("validation"), "guard": self._sealed.labels("guard")}

    def judge(self, result: dict[str, Any]) -> Verdict | dict[str, Any]:
        """Score validation and guard predictions with the same function.

        Returns:
            The verdict, or the payload of a ``score`` job when only Keras can compute the metric.

        Raises:
            TrialFailed: ``nan`` for predictions that are not finite, ``invalid`` for a wrong number of rows.
        """
        metric = scoring.resolve(self._objective, result["declaration"])
        if metric.kind == "custom":
            return {"problem": self._problem, "objective": self._objective, "sets": self.sets(result)}
        validation = self.score("validation", metric, result)
        guard = self.score("guard", metric, result)
        losses = None
        if guard.losses is not None:
            path = Path(result["predictions"]["guard"][0]).with_name("guard_losses.npy")
            temporary = path.with_name(f".guard_losses-{os.getpid()}.npy")
            np.save(temporary, guard.losses.astype(np.float32), allow_pickle=False)
            os.replace(temporary, path)
            losses = str(path)
        return Verdict(validation.value, guard.value, losses)

    def score(self, tier: str, metric: scoring.Metric, result: dict[str, Any]) -> scoring.Score:
        """The scorer's word on one tier's predictions."""
        predictions = [np.load(path, allow_pickle=False) for path in result["predictions"][tier]]
        names = [output["name"] for output in result["declaration"]["outputs"]]
        return scoring.score(metric, result["declaration"], predictions, scoring.in_order(self._labels[tier], names))

    def settle(self, result: dict[str, Any]) -> Verdict:
        """The verdict of a ``score`` job."""
        values = result["values"]
        if not np.isfinite(values["validation"]):
            raise TrialFailed("nan", f"the metric is {values['validation']} on the validation rows")
        return Verdict(float(values["validation"]), float(values["guard"]))

    def sets(self, result: dict[str, Any]) -> dict[str, Any]:
        """Predictions and labels as paths, for a ``score`` job."""
        labels = {
            "validation": self._open.label_files("validation"),
            "guard": self._sealed.label_files("guard"),
        }
        return {tier: {"predictions": result["predictions"][tier], "labels": labels[tier]} for tier in labels}

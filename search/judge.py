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
from search.metrics import RANKS, Array


class RowJudge:
    """The service's judge; lives in the driver's process and hands labels to no trial.

    Args:
        rows: Folder of the open rows; ``sealed``: folder of the sealed ones.
        objective: What the study searches for, such as ``val_accuracy``.
        problem: The space module as JSON, for a metric that only Keras knows.
        keep: Folder for what each guard row contributes to the score, which tells of its label: closed to
            others, and no trial's. None keeps nothing.
    """

    def __init__(
        self, rows: Path, sealed: Path, objective: str, problem: dict[str, str], keep: Path | None = None
    ) -> None:
        self._open, self._sealed = OpenRows(rows), SealedRows(sealed)
        self._objective, self._problem, self._keep = objective, problem, keep
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
        both = self.score(("validation", "guard"), metric, result).parts
        validation, guard = both[: self._open.size("validation")], both[self._open.size("validation") :]
        evidence = None
        if self._keep is not None:
            sums = None if metric.kind in RANKS else validation.sum(axis=0).tolist()
            # The spread of labels is a difference of squares, for which single precision is too coarse.
            kept = guard if metric.kind == "r2_score" else guard.astype(np.float32)
            path = self._written(kept, Path(result["predictions"]["guard"][0]).parent.name)
            evidence = {"parts": str(path), "validation": sums}
        return Verdict(scoring.value_of(metric, validation), scoring.value_of(metric, guard), evidence)

    def _written(self, parts: Array, name: str) -> Path:
        assert self._keep is not None
        self._keep.mkdir(mode=0o700, exist_ok=True)
        path = self._keep / f"{name}.npy"
        temporary = self._keep / f".{name}-{os.getpid()}.npy"
        np.save(temporary, parts, allow_pickle=False)
        temporary.chmod(0o600)
        os.replace(temporary, path)
        return path

    def score(self, tier: str | tuple[str, ...], metric: scoring.Metric, result: dict[str, Any]) -> scoring.Score:
        """The scorer's word on one tier's predictions, or on several tiers' together."""
        tiers = (tier,) if isinstance(tier, str) else tier
        names = [output["name"] for output in result["declaration"]["outputs"]]
        predicted = [[np.load(path, allow_pickle=False) for path in result["predictions"][name]] for name in tiers]
        labels = [scoring.in_order(self._labels[name], names) for name in tiers]
        joined = [[np.concatenate(parts) for parts in zip(*sets, strict=True)] for sets in (predicted, labels)]
        return scoring.score(metric, result["declaration"], *joined)

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

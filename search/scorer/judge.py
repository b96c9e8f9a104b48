"""Scores what a trial left behind: predictions against validation labels and sealed guard labels."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from search.errors import DataError, TrialFailed
from search.loop.attempt import Verdict
from search.record import disk
from search.scorer import scoring
from search.scorer.metrics import RANKS, Array
from search.tiers import folds
from search.tiers import validation as plans
from search.tiers.data import OpenRows, SealedRows


class RowJudge:
    """The service's judge; lives in the driver's process and hands labels to no trial.

    Args:
        rows: Folder of the open rows; ``sealed``: folder of the sealed ones.
        objective: What the study searches for, such as ``val_accuracy``.
        problem: The space module as JSON, for a metric that only Keras knows.
        keep: Folder for what each guard row contributes to the score, which tells of its label: closed to
            others, and no trial's. None keeps nothing.
        baseline: Gives what the baseline's model declares of itself; None, as while that is not known, compares
            nothing.
        errors: Whether verdicts have the standard error of the validation score.
        validation: Of a plan other than the stored split, what ``folds.write`` returned.
    """

    def __init__(
        self,
        rows: Path,
        sealed: Path,
        objective: str,
        problem: dict[str, str],
        keep: Path | None = None,
        baseline: Callable[[], Mapping[str, Any] | None] = lambda: None,
        errors: bool = False,
        validation: Mapping[str, Any] | None = None,
    ) -> None:
        self._open, self._sealed = OpenRows(rows), SealedRows(sealed)
        self._objective, self._problem, self._keep, self._baseline = objective, problem, keep, baseline
        self._errors, self._folds = errors, validation
        self._labels = {"validation": self._open.labels("validation"), "guard": self._sealed.labels("guard")}

    def judge(self, result: dict[str, Any]) -> Verdict | dict[str, Any]:
        """Score validation and guard predictions with the same function.

        Of a trial that trained on several splits the score is that of all its out-of-fold predictions together; if
        splits overlap, the mean of their scores. Sums over validation rows are kept where trials have the same rows:
        scores on rows of their own are not pooled row by row.

        Guard labels do not decide whether a trial failed, since its state reaches the sampler: where the metric has
        no value on guard rows, the guard score is NaN.

        Returns:
            The verdict, or the payload of a ``score`` job when only Keras can compute the metric.

        Raises:
            DiskFull: If there is no room for what is kept; judging again is possible.
            TrialFailed: ``nan`` for validation predictions that are not finite, ``invalid`` for a wrong number of
                rows, a metric without a value on validation rows, or another metric than the baseline's.
        """
        metric = scoring.resolve(self._objective, result["declaration"])
        if (baseline := self._baseline()) is not None:
            _check_same(self._objective, result["declaration"], baseline)
        if metric.kind == "custom":
            return {"problem": self._problem, "objective": self._objective, "sets": self.sets(result)}
        scores = self.validation(metric, result)
        value, parts = self._on_guard(metric, result)
        evidence = None
        if self._keep is not None and parts is not None:
            shared = self._folds is None or self._folds["plan"].startswith("kfold")
            sums = scores[0].parts.sum(axis=0).tolist() if shared and metric.kind not in RANKS else None
            # The spread of labels is a difference of squares, for which single precision is too coarse.
            with np.errstate(over="ignore"):
                kept = parts if metric.kind == "r2_score" else parts.astype(np.float32)
            path = self._written(kept, Path(result["predictions"]["guard"][0]).parent.name)
            evidence = {"parts": str(path), "validation": sums}
        score = float(np.mean([one.value for one in scores]))
        return Verdict(score, value, evidence, self._error(scores) if self._errors else None)

    def _error(self, scores: Sequence[scoring.Score]) -> float | None:
        """Of the mean of these scores, which amounts to the rows that the plan says (``folds.write``)."""
        from search.guard import statistics  # takes a while to import, and most studies end without it

        ordered = self._open.manifest["ordered"]
        error = float(np.mean([statistics.standard_error(one, ordered=ordered) for one in scores]))
        if len(scores) > 1 and self._folds is not None:
            error *= float(np.sqrt(np.mean(self._folds["validation"]) / self._folds["weight"]))
        return error if np.isfinite(error) else None

    def validation(self, metric: scoring.Metric, result: dict[str, Any]) -> list[scoring.Score]:
        """The scorer's word on validation predictions: one score, or one for each of several splits that overlap.

        Raises:
            TrialFailed: As ``scoring.score``.
        """
        if self._folds is None:
            return [self.score("validation", metric, result)]
        files, places = self._by_split(result)
        names = [output["name"] for output in result["declaration"]["outputs"]]
        predicted = [[np.load(path, allow_pickle=False) for path in paths] for paths in files]
        if self._folds["plan"].startswith("kfold"):
            predicted = [[np.concatenate(parts) for parts in zip(*predicted, strict=True)]]
            places = [np.concatenate(places)]
        labels = [scoring.in_order(self._open.labels_at(place), names) for place in places]
        return [
            scoring.score(metric, result["declaration"], *both) for both in zip(predicted, labels, strict=True)
        ]

    def _by_split(self, result: dict[str, Any]) -> tuple[list[list[str]], list[Array]]:
        """Of each split the files of predictions and the positions of its validation rows."""
        assert self._folds is not None
        found = [part.validation for part in folds.parts(self._folds, result["seed"])]
        paths = result["predictions"]["validation"]
        files = paths if plans.parse(self._folds["plan"]).is_repeated else [paths]
        if len(files) != len(found):
            raise TrialFailed("invalid", f"predictions must be of {len(found)} splits, but are of {len(files)}")
        return files, found

    def _on_guard(self, metric: scoring.Metric, result: dict[str, Any]) -> tuple[float, Array | None]:
        """The score on guard rows and what each contributes; NaN and None as far as there is none."""
        parts = None
        predicted, labels = self._sets("guard", result)
        try:
            parts = scoring.parts_of(metric, result["declaration"], predicted, labels)
            return scoring.value_of(metric, parts), parts
        except Exception:  # whatever it is that these labels do: a trial is not to fail by them
            return float("nan"), parts

    def _written(self, parts: Array, name: str) -> Path:
        assert self._keep is not None
        self._keep.mkdir(mode=0o700, exist_ok=True)
        path = self._keep / f"{name}.npy"
        temporary = self._keep / f".{name}-{os.getpid()}.npy"
        try:
            with temporary.open("wb") as file:
                np.save(file, parts, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())  # the journal is going to say that it is there
            temporary.chmod(0o600)
            os.replace(temporary, path)
        except OSError as error:
            raise disk.failure(path, error) from error
        return path

    def score(self, tier: str, metric: scoring.Metric, result: dict[str, Any]) -> scoring.Score:
        """The scorer's word on one tier's predictions.

        Raises:
            TrialFailed: As ``scoring.score``; on guard rows, too, which ``judge`` alone forgives.
        """
        return scoring.score(metric, result["declaration"], *self._sets(tier, result))

    def _sets(self, tier: str, result: dict[str, Any]) -> tuple[list[Array], list[Array]]:
        names = [output["name"] for output in result["declaration"]["outputs"]]
        predicted = [np.load(path, allow_pickle=False) for path in result["predictions"][tier]]
        return predicted, scoring.in_order(self._labels[tier], names)

    def settle(self, result: dict[str, Any]) -> Verdict:
        """The verdict of a ``score`` job, in which a guard score that could not be computed is NaN."""
        values = result["values"]
        value = float(np.mean([values[name] for name in values if name != "guard"]))
        if not np.isfinite(value):
            raise TrialFailed("nan", f"the metric is {value} on the validation rows")
        return Verdict(value, float(values["guard"]))

    def sets(self, result: dict[str, Any]) -> dict[str, Any]:
        """Predictions and labels as paths, for a ``score`` job; each name but "guard" is one of validation rows."""
        if self._folds is not None:
            return self._sets_of_splits(result)
        return {tier: self.set_of(tier, result["predictions"][tier]) for tier in ("validation", "guard")}

    def set_of(self, tier: str, predictions: list[str]) -> dict[str, Any]:
        """Predictions and labels of one tier as paths."""
        rows = self._open if tier == "validation" else self._sealed
        return {"predictions": predictions, "labels": rows.label_files(tier)}


    def _sets_of_splits(self, result: dict[str, Any]) -> dict[str, Any]:
        """The same by index files beside the predictions, which are written here."""
        files, at = self._by_split(result)
        folder = Path(result["predictions"]["guard"][0]).parent
        if self._folds is not None and self._folds["plan"].startswith("kfold"):
            joined = [[np.load(path, allow_pickle=False) for path in paths] for paths in zip(*files, strict=True)]
            files = [[self._saved(folder / f"of_folds_{k}.npy", np.concatenate(all_)) for k, all_ in enumerate(joined)]]
            at = [np.concatenate(at)]
        sets = {"guard": self.set_of("guard", result["predictions"]["guard"])}
        for number, (paths, place) in enumerate(zip(files, at, strict=True)):
            index = self._saved(folder / f"of_split_{number}.npy", place)
            labels = self._open.label_files("validation") | {"index": index}
            sets[f"validation {number}"] = {"predictions": paths, "labels": labels}
        return sets

    def _saved(self, path: Path, values: Array) -> str:
        try:
            np.save(path, values, allow_pickle=False)
        except OSError as error:
            raise disk.failure(path, error) from error
        return str(path)


def check_tiers(rows: Path, sealed: Path, objective: str, declaration: Mapping[str, Any]) -> None:
    """See that the objective has a value on validation, guard and test rows, before a search is paid for.

    Rank metrics have none where all labels are alike. Sealed test labels are read for this; nothing is predicted or
    scored, so the test rows stay unopened.

    Args:
        rows: Folder of the open rows; ``sealed``: folder of the sealed ones.
        declaration: What the baseline's model declares of itself.

    Raises:
        DataError: If a tier lacks one of the two classes in a column.
    """
    metric = scoring.resolve(objective, declaration)
    if metric.kind not in RANKS or metric.output is None:
        return
    closed, opened = SealedRows(sealed), OpenRows(rows)
    labels = {
        "train": opened.labels("train"),
        "validation": opened.labels("validation"),
        "guard": closed.labels("guard"),
        "test": closed.labels("test"),
    }
    names = [output["name"] for output in declaration["outputs"]]
    positives = {}
    for tier, structure in labels.items():
        of_output = scoring.in_order(structure, names)[metric.output]
        is_positive = of_output.reshape(len(of_output), -1) > 0.5  # as metrics.rank_value has it
        positives[tier] = is_positive if metric.config.get("multi_label") else is_positive.reshape(-1, 1)
    for at in range(positives["train"].shape[1]):
        for kind in (1, 0):
            counts = {tier: int((found[:, at] == bool(kind)).sum()) for tier, found in positives.items()}
            lacking = [tier for tier in ("validation", "guard", "test") if not counts[tier]]
            if lacking:
                column = f" in column {at} of the labels" if positives["train"].shape[1] > 1 else ""
                spread = ", ".join(f"{count} in {tier}" for tier, count in counts.items())
                raise DataError(
                    f"{objective} has a value only where rows of both classes are, but {' and '.join(lacking)} "
                    f"{'has' if len(lacking) == 1 else 'have'} none of class {kind}{column} (there are {spread}); add "
                    "rows of that class, choose another objective, or give groups= or your own validation= and "
                    "test= in load()"
                )


def _check_same(objective: str, declaration: Mapping[str, Any], baseline: Mapping[str, Any]) -> None:
    """See that a trial's objective is the baseline's in all that the scorer reads.

    Raises:
        TrialFailed: ``invalid`` if not; a smaller score would mean nothing.
    """
    mine, theirs = scoring.meaning(objective, declaration), scoring.meaning(objective, baseline)
    for name in {**mine, **theirs}:
        if mine.get(name) != theirs.get(name):
            raise TrialFailed(
                "invalid",
                f"its {name} is {mine.get(name)} and the baseline's is {theirs.get(name)}, so its {objective} cannot "
                "be compared; use a metric that means the same for every trial as `objective`",
            )

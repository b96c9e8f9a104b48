"""Export: one model file that plain Keras loads, its lineage, and a short model card."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from search import jobs, publishing, scoring
from search.driver import Silent, Watcher
from search.errors import RequestError, StudyError
from search.evaluation import build_file, intact, predict_file
from search.executors import Executor, Job
from search.journal import Journal
from search.judge import RowJudge
from search.problem import Problem
from search.report import number
from search.study import Study
from search.trial import Trial, TrialState, best

FORMATS = ("keras", "saved_model")


def export(
    study: Study,
    out: str | os.PathLike[str],
    *,
    trial: int | None = None,
    format: str = "keras",
    register: str | None = None,
    watcher: Watcher | None = None,
) -> dict[str, Any]:
    """Write a trial's model to a folder: ``model.keras``, ``lineage.json``, ``MODEL_CARD.md`` and the space's source.

    Every score in it is computed from the exported file. A test score is there only for a model that
    was frozen and tested; exporting opens no seal.

    Args:
        out: A new or empty folder.
        trial: Number of the trial; None for the best, or the tested winner once there is one.
        format: ``"keras"``, or ``"saved_model"`` to add TensorFlow's format beside it.
        register: Name in MLflow's registry; the new version gets the alias ``champion``.

    Returns:
        The lineage.

    Raises:
        RequestError: If the folder has files in it, the trial has no model, or the format is unknown.
    """
    if format not in FORMATS:
        raise RequestError(f"--format must be one of {', '.join(FORMATS)}, but got {format!r}")
    folder = Path(out).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RequestError(f"--out must be a new or empty folder, but {folder} is not; choose another")
    watcher = watcher or Silent()
    with study.journal() as journal:
        chosen = _chosen(study, journal, trial)
        prepared = journal.get("prepared")
        uri = publishing.uri_of(journal.get("study")) if register is not None else ""
        with _beside(folder) as scratch:
            with jobs.start_executor(jobs.one_slot(), Problem(**prepared["problem"]), Path(scratch), None) as executor:
                lineage = _written(study, journal, executor, watcher, chosen, Path(scratch) / "out", format)
                if register is not None:
                    watcher.say(f"registering {register}")
                    asked = {"problem": prepared["problem"], "path": str(Path(scratch) / "out" / "model.keras")}
                    asked |= {"name": register, "uri": uri, "lineage": lineage}
                    job = Job("register", "register", asked, env=publishing.MLFLOW_ENVIRONMENT)
                    done = jobs.call(executor, job, watcher, executor.slots[0])
                    lineage["registered"] = done["registered"]
                    _write_json(Path(scratch) / "out" / "lineage.json", lineage)
            if folder.exists():
                folder.rmdir()
            os.replace(Path(scratch) / "out", folder)
    return lineage


def _beside(folder: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder to write in that can be moved into place."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=".heldout-export-", dir=folder.parent)
    except OSError as error:
        raise RequestError(f"--out must be in a folder that can be written, but {folder}: {error.strerror}") from None


def _chosen(study: Study, journal: Journal, number: int | None) -> Trial:
    trials = journal.history()
    if number is None:
        frozen = journal.get("frozen")
        tested = (journal.get("evaluation") or {}).get("opened") and frozen is not None
        found = trials[frozen["models"]["winner"]["trial"]] if tested else best(trials)
        if found is None:
            raise StudyError(f"no trial of study {study.name!r} has completed, so there is no model to export")
        return found
    known = {t.number: t for t in trials}
    if number not in known:
        raise StudyError(f"study {study.name!r} has no trial {number}; its trials are 0 to {max(known, default=0)}")
    if known[number].state is not TrialState.COMPLETE:
        raise StudyError(f"trial {number} is {known[number].state}, so it has no model; export a complete one")
    return known[number]


def _written(
    study: Study, journal: Journal, executor: Executor, watcher: Watcher, trial: Trial, out: Path, format: str
) -> dict[str, Any]:
    out.mkdir()
    prepared, meta = journal.get("prepared"), journal.get("study")
    frozen = {item["trial"]: item for item in intact(journal.get("frozen") or {"models": {}})["models"].values()}
    path = out / "model.keras"
    saved = out / "saved_model" if format == "saved_model" else None
    if trial.number in frozen and saved is None:
        shutil.copyfile(frozen[trial.number]["path"], path)
        built = frozen[trial.number]
    else:
        watcher.say(f"building the model of trial {trial.number}")
        built = build_file(journal, executor, watcher, trial, path, saved)
        if trial.number in frozen:  # the tested file itself, not one rebuilt beside the other format
            shutil.copyfile(frozen[trial.number]["path"], path)
    for left in out.glob("*.log"):
        left.unlink()
    lineage = {
        "study": study.name,
        "study_id": meta["study_id"],
        "trial": trial.number,
        "params": dict(trial.params),
        "seed": trial.seed,
        "epochs": trial.epochs,
        "best_epoch": trial.best_epoch,
        "weights": built["size"],
        "space": {key: meta["space"][key] for key in ("name", "digest")},
        "data": meta["data"],
        "versions": meta["versions"],
        "custom_objects": built["custom"],
        "objective": meta["objective"],
        **_scores(journal, executor, watcher, prepared, built | {"path": str(path)}, trial.number),
        "exported": datetime.now(UTC).isoformat(timespec="seconds"),
        "format": format,
    }
    (out / "space.py").write_text(meta["space"]["source"])
    _write_json(out / "lineage.json", lineage)
    (out / "MODEL_CARD.md").write_text(card(lineage))
    return lineage


def _scores(
    journal: Journal,
    executor: Executor,
    watcher: Watcher,
    prepared: dict[str, Any],
    model: dict[str, Any],
    number: int,
) -> dict[str, Any]:
    """``scores`` of the exported file by tier (test: from its one opening), and the ``batch_size`` they "
    "were made with."""
    meta = journal.get("study")
    judge = RowJudge(Path(prepared["rows"]), Path(prepared["sealed"]), meta["objective"], prepared["problem"])
    metric = scoring.resolve(meta["objective"], model["declaration"])
    scores: dict[str, Any] = {}
    files: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory(prefix="heldout-score-") as scratch:
        for tier in ("validation", "guard"):
            found = predict_file(executor, watcher, prepared, {"model": model}, tier, Path(scratch))
            result = {"predictions": {tier: found["predictions"]["model"]}, "declaration": model["declaration"]}
            if metric.kind != "custom":
                scores[tier] = {"score": judge.score(tier, metric, result).value}
            files[tier] = found["predictions"]["model"]
        if metric.kind == "custom":
            asked = {
                "problem": prepared["problem"],
                "objective": meta["objective"],
                "sets": judge.sets({"predictions": files}),
            }
            job = Job("score-export", "score", asked)
            values = jobs.call(executor, job, watcher, executor.slots[0])["values"]
            scores = {tier: {"score": values[tier]} for tier in ("validation", "guard")}
    evaluation = journal.get("evaluation") or {}
    for role in ("winner", "baseline"):
        tested = evaluation.get(role) if evaluation.get("opened") else None
        if tested and tested["trial"] == number:
            scores["test"] = {key: tested[key] for key in ("score", "interval", "method")} | {
                "level": evaluation["level"],
                "opening": evaluation["opening"],
                "rows": evaluation["rows"],
            }
    return {"scores": scores, "batch_size": found["batch_size"]}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def card(lineage: Mapping[str, Any]) -> str:
    """A short model card in Markdown."""
    objective = str(lineage["objective"]).removeprefix("val_")
    scores = lineage["scores"]
    tested = scores.get("test")
    rows = ["| rows | " + objective + " |", "|---|---|"]
    rows += [
        f"| {tier} | {number(scores[tier]['score'])} |" for tier in ("validation", "guard", "test") if tier in scores
    ]
    if tested is None:
        believe = (
            "This model was not tested on held-out rows. Its validation score helped to choose it, so it flatters."
        )
    elif tested["interval"] is None:
        believe = (
            f"Believe the test score, {number(tested['score'])}: no choice was made by those rows. It has no interval."
        )
    else:
        low, high = (number(end) for end in tested["interval"])
        believe = (
            f"Believe the test score: {number(tested['score'])}, {tested['level']:.0%} interval {low} to {high}, on "
            f"{tested['rows']} rows that no choice was made by (opening {tested['opening']} of these rows). "
            "The validation score helped to choose the model, so it flatters."
        )
    custom = lineage["custom_objects"]
    first = "import space  # registers " + ", ".join(c["class"] for c in custom) + "\n" if custom else ""
    return "\n".join(
        [
            f"# {lineage['space']['name']}: trial {lineage['trial']} of study {lineage['study']}",
            "",
            believe,
            "",
            *rows,
            "",
            "## Use",
            "",
            "```python",
            f"import keras\n{first}",
            'model = keras.models.load_model("model.keras")',
            f"predictions = model.predict(x, batch_size={lineage['batch_size']})  # x: raw features, "
            "preprocessing is inside",
            "```",
            "",
            "## What it is",
            "",
            *(f"- `{key}` = {number(value)}" for key, value in lineage["params"].items()),
            f"- {lineage['weights']} weights, epoch {lineage['best_epoch']} of {lineage['epochs']}, seed "
            f"{lineage['seed']}",
            f"- space digest `{lineage['space']['digest'][:16]}`, data digest `{lineage['data']['digest'][:16]}`",
            f"- versions: {', '.join(f'{name} {version}' for name, version in lineage['versions'].items())}",
            "",
        ]
    )

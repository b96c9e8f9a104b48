"""Export: one model file that plain Keras loads, on request another format beside it, its lineage and its card."""

from __future__ import annotations

import ast
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from search.definition import assets
from search.definition.problem import Problem
from search.errors import RequestError, StudyError
from search.executors import Executor, Job
from search.exports import formats
from search.exports.card import card
from search.guard import final as refits
from search.guard.freezing import build_file, draw, gone, intact, predict_file
from search.loop.watcher import Silent, Watcher
from search.processes import jobs
from search.record import places
from search.record.journal import Journal
from search.scorer import scoring
from search.scorer.judge import RowJudge
from search.study import Study, check_name
from search.tracker import publishing
from search.trial import Trial, TrialState, best, searched

FINALS = (None, "all")


def export(
    study: Study,
    out: str | os.PathLike[str],
    *,
    trial: int | None = None,
    final: str | None = None,
    format: str = "keras",
    register: str | None = None,
    watcher: Watcher | None = None,
) -> dict[str, Any]:
    """Write a trial's model to a folder: ``model.keras``, its drawing, lineage and card, and the space's source.

    Every score in it is computed from the exported file. A test score is there only for a model that
    was frozen and tested; exporting makes none, so it counts as no opening. Each model file is read again after it was
    written and must predict what the model did.

    Args:
        out: A new or empty folder.
        trial: Number of a trial, whose model is exported as the search made it; None for the winner, which is the
            refitted model in a study that was launched with ``final="retrain"``.
        final: ``"all"`` trains the configuration anew on every row, test rows included. No score applies to that
            model, and lineage and card have none for it.
        format: ``"keras"``; or ``"saved_model"``, ``"onnx"`` or ``"litert"``, to add that one beside it.
        register: Name in MLflow's registry; the new version gets the alias ``champion``.

    Returns:
        The lineage.

    Raises:
        RequestError: If the folder has files in it, the trial has no model, the format is unknown, needs what is not
            installed or cannot hold this model, or every row is asked for before the study is complete.
    """
    if final not in FINALS:
        raise RequestError(f"--final must be all, but got {final!r}; `heldout launch` has --final retrain")
    if final == "all" and study.state != "COMPLETE":
        raise StudyError(
            f"only a complete study can be refitted on its sealed rows, but {study.name!r} is {study.state}; "
            f"`heldout resume {study.name}` first"
        )
    if register is not None:
        check_name(register, "a model's name")
    formats.check_installed(format)
    folder = new_folder(out)
    watcher = watcher or Silent()
    with study.journal() as journal:
        chosen = _chosen(study, journal, trial)
        if trial is not None and final is None and not _has_model(journal, trial):
            raise RequestError(gone(trial))
        uri = ""
        if register is not None:
            uri = publishing.uri_of(places.study(journal.get("study"), study.workspace))
        with beside(folder) as scratch:
            prepared = jobs.prepared_for(journal, chosen)
            made = Path(scratch) / "out"
            made.mkdir()
            env = jobs.secrets_of(journal)
            starting = (jobs.one_slot(), Problem(**prepared["problem"]), Path(scratch), None, env)
            with jobs.start_executor(*starting) as executor:
                model = _built(journal, executor, watcher, chosen, made / "model.keras", final, trial is not None)
                lineage = _written(study, journal, executor, watcher, chosen, model, format)
                if register is not None:
                    watcher.say(f"registering {register}")
                    asked = {"problem": prepared["problem"], "path": str(made / "model.keras")}
                    asked |= {"name": register, "lineage": lineage}
                    job = Job("register", "register", asked, env=publishing.credentials(uri))
                    done = jobs.call(executor, job, watcher, executor.slots[0])
                    lineage["registered"] = done["registered"]
                    _write_json(made / "lineage.json", lineage)
            if folder.exists():
                folder.rmdir()
            os.replace(made, folder)
    return lineage


def new_folder(out: str | os.PathLike[str]) -> Path:
    """Where something is to be exported.

    Raises:
        RequestError: If there is something already.
    """
    folder = Path(out).expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RequestError(f"--out must be a new or empty folder, but {folder} is not; choose another")
    return folder


def beside(folder: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder to write in that can be moved into place."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=".heldout-export-", dir=folder.parent)
    except OSError as error:
        raise RequestError(f"--out must be in a folder that can be written, but {folder}: {error.strerror}") from None


def _chosen(study: Study, journal: Journal, number: int | None) -> Trial:
    """The trial asked for; else the tested winner, else the selected one, else the best."""
    trials = journal.history()
    known = {t.number: t for t in trials}
    if number is None:
        tested = (journal.get("evaluation") or {}).get("opened")
        picked = journal.get("frozen")["models"] if tested else journal.get("selection") or {}
        winner = picked.get("winner")
        found = best(trials) if winner is None else known[winner["trial"]]
        if found is None:
            raise StudyError(f"no trial of study {study.name!r} has completed, so there is no model to export")
        return found
    if number not in known:
        raise StudyError(f"study {study.name!r} has no trial {number}; its trials are 0 to {max(known, default=0)}")
    if known[number].state is not TrialState.COMPLETE:
        raise StudyError(f"trial {number} is {known[number].state}, so it has no model; export a complete one")
    return known[number]


def _has_model(journal: Journal, number: int) -> bool:
    """Whether a complete trial's weights are there, or a frozen file of the same model is."""
    models = (journal.get("frozen") or {"models": {}})["models"].values()
    frozen = any(item["trial"] == number and not item.get("final") for item in models)
    return frozen or places.weights(journal.path.parent, number).exists()


def _built(
    journal: Journal,
    executor: Executor,
    watcher: Watcher,
    trial: Trial,
    path: Path,
    final: str | None,
    by_number: bool,
) -> dict[str, Any]:
    """Write the trial's model to ``path``: refitted on every row, the frozen file, or rebuilt around its weights.

    Args:
        by_number: The trial was asked for by its number, so a frozen refit of it is not meant.

    Returns:
        What is known of the file: ``path``, ``declaration``, ``custom``, ``size``; ``tested``, its test score or
        None; and of a refit ``final``, ``epochs`` and ``rows``. One on every row has instead of ``tested`` the
        scores of the model that the search made, ``before``.
    """
    record = journal.get("frozen") or {"models": {}}
    frozen = intact(places.frozen(record, journal.path.parent))["models"]
    mine = {role: item for role, item in frozen.items() if item["trial"] == trial.number}
    roles = [role for role, item in mine.items() if not (by_number and item.get("final"))]
    tested = _tested(journal, roles[0]) if roles else None
    if final == "all":
        epochs = refits.epochs_for(refits.runs(journal.history(), trial))
        count = sum(journal.get("prepared")["manifest"]["tiers"].values())
        watcher.say(
            f"refitting trial {trial.number} on all {count} rows for {epochs} epochs; the test rows are trained on "
            "too, so they cannot test this model, and this is no opening of them"
        )
        built = refits.refit(journal, executor, watcher, trial, path, tiers=refits.ALL, epochs=epochs)
        before: dict[str, Any] = {"validation": {"score": trial.score}}
        before |= _corrected(journal, trial)
        before |= {} if tested is None else {"test": tested}
        return built | {"path": str(path), "final": "all", "before": before}
    if roles:
        known: dict[str, Any] = mine[roles[0]]
        shutil.copyfile(known["path"], path)
        return known | {"path": str(path), "tested": tested}
    watcher.say(f"building the model of trial {trial.number}")
    return build_file(journal, executor, watcher, trial, path) | {"path": str(path), "tested": None}


def _corrected(journal: Journal, trial: Trial) -> dict[str, Any]:
    """``guard`` of the winner, with the corrected estimate, and of the baseline; of nobody else, and of none before."""
    selection = journal.get("selection") or {}
    for role in ("winner", "baseline"):
        found = selection.get(role)
        if found is not None and found["trial"] == trial.number and found.get("guard") is not None:
            corrected = selection.get("corrected") if role == "winner" else None
            kept = {key: corrected[key] for key in ("estimate", "interval", "level", "scope")} if corrected else None
            return {"guard": {"score": found["guard"], "corrected": kept}}
    return {}


def _tested(journal: Journal, role: str) -> dict[str, Any] | None:
    """The test score of a frozen model from its one opening, or None if there was none."""
    evaluation, frozen = journal.get("evaluation") or {}, journal.get("frozen")["models"][role]
    found = evaluation.get(role) if evaluation.get("opened") else None
    refitted = frozen.get("final")
    if found is None or (found["trial"], evaluation.get("final")) != (frozen["trial"], refitted):
        return None
    return (
        {key: found[key] for key in ("score", "interval", "method")}
        | {key: evaluation[key] for key in ("level", "opening", "rows")}
        | ({} if refitted is None else {"final": refitted})
    )


def _written(
    study: Study,
    journal: Journal,
    executor: Executor,
    watcher: Watcher,
    trial: Trial,
    model: dict[str, Any],
    format: str,
) -> dict[str, Any]:
    """Write everything that goes with the model file; the lineage."""
    prepared, meta = jobs.prepared_for(journal, trial), journal.get("study")
    problem = Problem(**prepared["problem"])
    out = Path(model["path"]).parent
    checked = {"model.keras": model["checked"]} if model.get("checked") else {}
    if format != "keras":  # from the file itself, so that both are one model
        watcher.say(f"writing the model as {format}")
        name = formats.FILES[format]
        asked = {"problem": prepared["problem"], "path": model["path"], "custom": model["custom"]}
        asked |= {"format": format, "out": str(out / name), "rows": prepared["rows"]}
        asked["decoded"] = "files" in prepared["manifest"]["x"]
        job = Job("convert", "convert", asked, log=str(out / "convert.log"))
        checked[name] = jobs.call(executor, job, watcher, executor.slots[0])["checked"]
    architecture = draw(journal, executor, watcher, trial, out)
    for left in out.glob("*.log"):
        left.unlink()
    shipped = assets.ship(prepared.get("assets"), study.folder, out)
    final = model.get("final")
    trained = {"final": final, "epochs": model["epochs"], "rows": model["rows"]} if final else None
    lineage = {
        "study": study.name,
        "study_id": meta["study_id"],
        "trial": trial.number,
        "params": dict(trial.params),
        "seed": trial.seed,
        **(trained or {"epochs": trial.epochs, "best_epoch": trial.best_epoch}),
        "weights": model["size"],
        "flops": model.get("flops"),
        "space": {"name": problem.name, "digest": problem.digest},
        "data": meta["data"],
        "versions": meta["versions"],
        "custom_objects": model["custom"],
        "assets": shipped,
        "decoded": "files" in prepared["manifest"]["x"],
        "about": _about(problem.source),
        "objective": meta["objective"],
        "direction": prepared["direction"],
        "searched": _searched(journal),
        "against_baseline": _against_baseline(journal, trial, model),
        "inputs": _inputs(prepared["manifest"]["x"]),
        "outputs": [
            {key: output[key] for key in ("name", "from_logits")} | {"shape": output["shape"][1:]}
            for output in model["declaration"]["outputs"]
        ],
        "architecture": architecture,
        "checked": checked,
        "tolerance": formats.TOLERANCE,
        **_scores(journal, executor, watcher, prepared, trial, model),
        "exported": datetime.now(UTC).isoformat(timespec="seconds"),
        "format": format,
    }
    (out / "space.py").write_text(problem.source)
    _write_json(out / "lineage.json", lineage)
    (out / "MODEL_CARD.md").write_text(card(lineage))
    return lineage


def _about(source: str) -> str:
    """The first paragraph of the module's docstring, on one line."""
    return " ".join((ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0].split())


def _searched(journal: Journal) -> dict[str, Any]:
    """What the study tried: how many trials ended how, its sampler, and for each parameter its values and default."""
    trials = journal.history()
    ended = [trial.state for trial in searched(trials)]
    states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAILED)
    known = journal.space().parameters
    return {
        "trials": {state.value.lower(): ended.count(state) for state in states},
        "confirmations": sum(trial.confirms is not None for trial in trials),
        "sampler": (journal.get("study").get("config") or {}).get("sampler"),
        "parameters": {key: [str(one.domain), one.domain.default] for key, one in known.items()},
    }


def _against_baseline(journal: Journal, trial: Trial, model: dict[str, Any]) -> dict[str, Any] | None:
    """What the test step said of this model, if it is the winner that was tested."""
    evaluation = journal.get("evaluation") or {}
    if model.get("tested") is None or evaluation["winner"]["trial"] != trial.number:
        return None
    baseline = evaluation.get("baseline")
    score = None if baseline is None else baseline["score"]
    return {"score": score, "gain": evaluation.get("difference"), "verdicts": evaluation.get("verdicts", [])}


def _inputs(spec: Mapping[str, Any]) -> list[list[Any]]:
    """Name, shape of one row, and type of what goes in."""
    given = zip(spec["names"], spec["shapes"], spec["dtypes"], strict=True)
    return [[name, shape[1:], "text" if dtype.startswith("<U") else dtype] for name, shape, dtype in given]


def _scores(
    journal: Journal,
    executor: Executor,
    watcher: Watcher,
    prepared: dict[str, Any],
    trial: Trial,
    model: dict[str, Any],
) -> dict[str, Any]:
    """The scores of the exported file by tier, and the ``batch_size`` that they were made with.

    Guard rows speak for the winner and the baseline alone: with everybody's scores one could choose by them.
    ``scores`` has no tier that the model was trained on. Where the trial was judged by another plan than the stored
    split, its recorded validation score stands in, with that plan and its label. A model that was trained on every row
    has no ``scores``; the scores of the search's model are under ``refitted_from`` then.
    """
    meta, seen, plan = journal.get("study"), _corrected(journal, trial), prepared["validation"]
    judge = RowJudge(Path(prepared["rows"]), Path(prepared["sealed"]), meta["objective"], prepared["problem"])
    metric = scoring.resolve(meta["objective"], model["declaration"])
    scores: dict[str, Any] = {}
    files: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory(prefix="heldout-score-") as scratch:
        for tier in ("validation", "guard") if plan is None else ("guard",):
            found = predict_file(executor, watcher, prepared, {"model": model}, tier, Path(scratch))
            if model.get("final"):  # seen to load and predict in another process; a score would mean nothing
                break
            result = {"predictions": {tier: found["predictions"]["model"]}, "declaration": model["declaration"]}
            if not metric.is_custom and (tier != "guard" or seen):
                scores[tier] = {"score": judge.score(tier, metric, result).value}
            files[tier] = found["predictions"]["model"]
        if metric.is_custom and files:
            asked = {
                "problem": prepared["problem"],
                "objective": meta["objective"],
                "sets": {tier: judge.set_of(tier, paths) for tier, paths in files.items()},
            }
            job = Job("score-export", "score", asked)
            values = jobs.call(executor, job, watcher, executor.slots[0])["values"]
            scores = {tier: {"score": values[tier]} for tier in values if tier != "guard" or seen}
    if plan is not None and not model.get("final"):
        scores = {"validation": {"score": trial.score, "plan": plan["plan"], "label": "optimistic"}} | scores
    if "guard" in scores:
        scores["guard"] = seen["guard"] | scores["guard"]
    if model.get("final") == "all":
        return {"refitted_from": {"scores": model["before"]}, "batch_size": found["batch_size"]}
    if model["tested"] is not None:
        scores["test"] = model["tested"]
    return {"scores": scores, "batch_size": found["batch_size"]}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")

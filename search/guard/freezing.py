"""Freezing: the models that will be tested and exported, written as files, and one hash over all that was decided."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from search.errors import RequestError
from search.executors import Executor, Job
from search.guard import final as refitting
from search.guard import verdicts
from search.harness.architecture import DRAWINGS
from search.loop.watcher import Watcher
from search.processes import jobs
from search.record import places
from search.record.journal import Journal
from search.trial import Trial


def freeze(
    folder: Path, journal: Journal, executor: Executor, watcher: Watcher, final: str | None = None
) -> dict[str, Any]:
    """Write winner and baseline as the files that will be tested and exported, and hash them.

    Args:
        final: ``"retrain"`` refits both on train, validation and guard rows.

    Returns:
        ``models`` (role to trial, path, sha256, declaration, custom), ``objective``, ``analysis``, and
        ``digest`` over all of it.
    """
    prepared, selection = places.prepared(journal), journal.get("selection")
    chosen = {role: selection[role]["trial"] for role in ("winner", "baseline") if selection[role] is not None}
    freezes: dict[str, Any] = journal.get("freezes") or {}
    known = freezes.get(final or "as trained")
    if known is not None and chosen == {role: model["trial"] for role, model in known["models"].items()}:
        journal.put("frozen", known)
        return intact(places.frozen(known, folder))
    place = folder / "frozen"
    place.mkdir(mode=0o700, exist_ok=True)  # a refitted model has learned sealed labels
    written: dict[int, dict[str, Any]] = {}
    for number in dict.fromkeys(chosen.values()):
        written[number] = _written(journal, executor, watcher, place, number, final)
    frozen = {
        "models": {role: written[number] for role, number in chosen.items()},
        "objective": prepared["objective"],
        "fingerprint": prepared["manifest"]["fingerprint"],
        "selection": hashlib.sha256(json.dumps(selection, sort_keys=True).encode()).hexdigest(),
        "final": final,
        "analysis": {"alpha": verdicts.TOTAL, "of opening i": "alpha 6 / (pi i)^2", "comparison": "paired"},
    }
    frozen["digest"] = hashlib.sha256(json.dumps(frozen, sort_keys=True).encode()).hexdigest()
    with journal.one_commit():
        journal.put("freezes", freezes | {final or "as trained": frozen})
        journal.put("frozen", frozen)
    return frozen


def _written(
    journal: Journal, executor: Executor, watcher: Watcher, place: Path, number: int, final: str | None
) -> dict[str, Any]:
    """One model's file, and what is known of it."""
    known = {trial.number: trial for trial in journal.history()}
    if final is None:
        path = place / f"trial-{number:04d}.keras"
        built = build_file(journal, executor, watcher, known[number], path)
    else:
        path = place / f"trial-{number:04d}-{final}.keras"
        runs = refitting.runs(journal.history(), known[number])
        watcher.say(f"training the configuration of trial {number} again on train, validation and guard rows")
        epochs = refitting.epochs_for(runs)
        built = refitting.refit(journal, executor, watcher, known[number], path, tiers=refitting.RETRAIN, epochs=epochs)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"trial": number, "path": str(path), "sha256": digest, "final": final} | built


def by_text(journal: Journal, models: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Models grouped by the module text that they were trained from, each group with its ``prepared``.

    In one process one text can be executed, and a custom layer may be another one in another text.
    """
    known = {trial.number: trial for trial in journal.history()}
    groups: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for role, item in models.items():
        prepared = jobs.prepared_for(journal, known[item["trial"]])
        groups.setdefault(prepared["problem"]["source"], (prepared, {}))[1][role] = item
    return list(groups.values())


def intact(frozen: dict[str, Any]) -> dict[str, Any]:
    """The frozen selection, if its files are still those that were frozen.

    Raises:
        RequestError: Otherwise.
    """
    for item in frozen["models"].values():
        path = Path(item["path"])
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != item["sha256"]:
            raise RequestError(
                f"the frozen model {path} is missing or was changed after it was frozen; restore it from a copy"
            )
    return frozen


def build_file(
    journal: Journal, executor: Executor, watcher: Watcher, trial: Trial, path: Path
) -> dict[str, Any]:
    """Write one trial's model, preprocessing included, as a ``.keras`` file.

    Returns:
        ``declaration``, ``custom``, ``size`` and ``flops`` of the model, and how the file was ``checked``.

    Raises:
        RequestError: If its weights were not kept, or the recorded parameters no longer build the recorded model.
    """
    weights = places.weights(journal.path.parent, trial.number)
    if not weights.exists():
        raise RequestError(gone(trial.number))
    space = journal.space()
    payload = _of_trial(journal, trial, path.parent) | {"weights": str(weights), "out": str(path)}
    job = Job(f"export-{trial.number}", "export", payload, log=str(path.parent / "export.log"))
    built = jobs.call(executor, job, watcher, slot=executor.slots[0])
    refitting.check_parameters(space, trial, built["asks"])
    return {key: built[key] for key in ("declaration", "custom", "size", "flops", "checked")}


def draw(journal: Journal, executor: Executor, watcher: Watcher, trial: Trial, folder: Path) -> str | None:
    """Draw the architecture of a trial's model in a folder; see ``architecture.draw``.

    Returns:
        The file's name; None, said to the watcher, if it could not be drawn.
    """
    log = folder / "draw.log"
    job = Job(f"draw-{trial.number}", "draw", _of_trial(journal, trial, folder), log=str(log))
    try:
        drawn = jobs.call(executor, job, watcher, slot=executor.slots[0])["drawing"]
        log.unlink(missing_ok=True)
        return drawn if drawn in DRAWINGS else None
    except RequestError as error:  # a drawing must not cost a model
        watcher.say(f"the architecture of trial {trial.number} could not be drawn: {error}")
        return None


def _of_trial(journal: Journal, trial: Trial, folder: Path) -> dict[str, Any]:
    """What a job needs to build a trial's model."""
    proposal = journal.space().proposal(trial.params)
    prepared = jobs.prepared_for(journal, trial)
    return jobs.base_payload(prepared, folder) | {"seed": trial.seed, "proposal": proposal}


def gone(number: int) -> str:
    """Why a complete trial has no model, and what to do."""
    return (
        f"the model of trial {number} must be on disk, but it was not kept, as others had better validation scores "
        "(`--keep`); take the winner or one that `heldout show` calls kept, or launch with --keep all to keep every one"
    )


def predict_file(
    executor: Executor,
    watcher: Watcher,
    prepared: dict[str, Any],
    models: dict[str, Any],
    tier: str,
    folder: Path,
    features: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Predict one tier with written model files in a process of its own.

    Returns:
        ``predictions`` (model name to paths of ``.npy``, one per output) and ``batch_size``.
    """
    payload = {
        "problem": prepared["problem"],
        "custom": any(item["custom"] for item in models.values()),
        "models": {name: item["path"] for name, item in models.items()},
        "tier": tier,
        "rows": prepared["rows"],
        "features": features,
        "budget": jobs.budget(),
        "folder": str(folder),
    }
    job = Job(f"predict-{tier}", "predict", payload, log=str(folder / "predict.log"))
    return jobs.call(executor, job, watcher, slot=executor.slots[0])

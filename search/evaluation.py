"""The held-out test step: freeze the selection, enter the opening in the ledger, then open the seal once."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from search import jobs, scoring, statistics
from search.data import SealedRows
from search.driver import Silent, Watcher
from search.errors import RequestError, StudyError
from search.executors import Executor, Job
from search.journal import Journal
from search.ledger import Ledger
from search.problem import Problem
from search.study import Study, locked
from search.trial import Trial, TrialState, best

LEVEL = 0.95


def evaluate(study: Study, *, watcher: Watcher | None = None) -> dict[str, Any]:
    """Open the sealed test rows for a study's winner and baseline, counted; see README, "The test step".

    The same frozen selection is answered from the ledger's record and opens nothing.

    Raises:
        StudyError: If the study is not complete.
        RequestError: If the ledger's chain is broken.
    """
    if study.state != "COMPLETE":
        raise StudyError(
            f"only a complete study can be evaluated, but {study.name!r} is {study.state}; `heldout resume "
            f"{study.name}` first"
        )
    watcher = watcher or Silent()
    problem = Problem(**study.meta("prepared")["problem"])
    with locked(study.folder):
        journal = Journal.open(study.folder / "journal.sqlite")
        try:
            slots = jobs.one_slot()
            with jobs.start_executor(slots, problem, study.folder, None) as executor:
                found = open_test(study.folder, journal, executor, watcher, again=True)
            jobs.publish(study.folder, journal, watcher)
        finally:
            journal.close()
    return found


def open_test(folder: Path, journal: Journal, executor: Executor, watcher: Watcher, *, again: bool) -> dict[str, Any]:
    """Freeze winner and baseline, and score both on the test rows if those may be opened.

    Args:
        again: Open rows that were opened before; False leaves them sealed and says so.

    Returns:
        What is put in the journal under ``evaluation``: ``opened``, and either ``why`` not, or
        ``opening`` (the how-manieth of these rows), ``winner``, ``baseline``, ``difference``, ``gap``, ``verdicts``.
    """
    prepared = journal.get("prepared")
    winner = best(journal.history())
    if winner is None:
        return _record(
            journal,
            {"opened": False, "why": "no trial completed, so there is nothing to test", "openings": None},
        )
    watcher.say("freezing the selection")
    frozen = freeze(folder, journal, executor, watcher, winner)
    sealed = SealedRows(Path(prepared["sealed"]))
    ledger = Ledger()
    ledger.verify()
    recorded = ledger.find(frozen["digest"])
    if recorded is not None:
        watcher.say("this selection was tested before: its recorded answer stands, and nothing was opened")
        return _record(journal, recorded)
    earlier = ledger.openings(sealed.row_hashes(), prepared["manifest"]["fingerprint"])
    if earlier and not again:
        return _record(journal, {"opened": False, "why": _used(earlier, folder.name), "openings": earlier})
    entry = {
        "study": folder.name,
        "study_id": journal.get("study")["study_id"],
        "fingerprint": prepared["manifest"]["fingerprint"],
        "frozen": frozen["digest"],
        "models": {role: item["sha256"] for role, item in frozen["models"].items()},
        "alpha": round(1 - LEVEL, 6),
        "purpose": "winner against baseline",
        "time": time.time(),
    }
    # A first opening must still be the first when it is entered: another study may be opening the same rows.
    number = ledger.append(entry, sealed.row_hashes(), expected=None if again else 1)
    watcher.say(f"opening the sealed test rows (opening {number} of these rows)")
    result = _scored(folder, prepared, frozen, sealed, executor, watcher) | {
        "opened": True,
        "opening": number,
    }
    if number > 1:
        result["verdicts"].append("REUSED_TEST_SET")
    ledger.record_result(number, frozen["digest"], result)
    return _record(journal, result)


def _used(earlier: int, study: str) -> str:
    times = "once" if earlier == 1 else f"{earlier} times"
    return (
        f"these test rows have been opened {times} before, so they stay sealed; "
        f"`heldout evaluate {study}` opens them again, counted, and a test set used again flatters"
    )


def _record(journal: Journal, found: dict[str, Any]) -> dict[str, Any]:
    journal.put("evaluation", found)
    return found


def freeze(folder: Path, journal: Journal, executor: Executor, watcher: Watcher, winner: Trial) -> dict[str, Any]:
    """Write winner and baseline as the files that will be tested and exported, and hash them.

    Returns:
        ``models`` (role to trial, path, sha256, declaration, custom), ``objective``, ``analysis``, and
        ``digest`` over all of it.
    """
    known: dict[str, Any] | None = journal.get("frozen")
    if known is not None and known["models"]["winner"]["trial"] == winner.number:
        return intact(known)
    baseline = next((t for t in journal.history() if t.number == 0 and t.state is TrialState.COMPLETE), None)
    place = folder / "frozen"
    place.mkdir(exist_ok=True)
    models: dict[str, Any] = {}
    for role, trial in (("winner", winner), ("baseline", baseline)):
        if trial is not None and role == "baseline" and trial.number == winner.number:
            models[role] = models["winner"]
        elif trial is not None:
            path = place / f"trial-{trial.number:04d}.keras"
            built = build_file(journal, executor, watcher, trial, path)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            models[role] = {"trial": trial.number, "path": str(path), "sha256": digest} | built
    frozen = {
        "models": models,
        "objective": journal.get("prepared")["objective"],
        "fingerprint": journal.get("prepared")["manifest"]["fingerprint"],
        "analysis": {"level": LEVEL, "comparison": "paired"},
    }
    frozen["digest"] = hashlib.sha256(json.dumps(frozen, sort_keys=True).encode()).hexdigest()
    journal.put("frozen", frozen)
    return frozen


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
    journal: Journal,
    executor: Executor,
    watcher: Watcher,
    trial: Trial,
    path: Path,
    saved_model: Path | None = None,
) -> dict[str, Any]:
    """Write one trial's model, preprocessing included, as a ``.keras`` file.

    Raises:
        RequestError: If the recorded parameters no longer build the recorded model.
    """
    prepared, space = journal.get("prepared"), journal.space()
    payload = jobs.base_payload(prepared, path.parent) | {
        "seed": trial.seed,
        "proposal": space.proposal(trial.params),
        "weights": trial.extra["weights"],
        "out": str(path),
        "saved_model": None if saved_model is None else str(saved_model),
    }
    job = Job(f"export-{trial.number}", "export", payload, log=str(path.parent / "export.log"))
    built = jobs.call(executor, job, watcher, slot=executor.slots[0])
    asked = space.grown(built["asks"]).params_of(built["asks"])
    # What only fit or callbacks asked for, such as a batch size, is not asked for when a model is only built.
    if asked != {key: trial.params.get(key) for key in asked}:
        raise RequestError(
            f"trial {trial.number} had the parameters {dict(trial.params)}, but its space now asks for {asked}"
        )
    return {"declaration": built["declaration"], "custom": built["custom"], "size": built["size"]}


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
        "folder": str(folder),
    }
    job = Job(f"predict-{tier}", "predict", payload, log=str(folder / "predict.log"))
    return jobs.call(executor, job, watcher, slot=executor.slots[0])


def _scored(
    folder: Path,
    prepared: dict[str, Any],
    frozen: dict[str, Any],
    sealed: SealedRows,
    executor: Executor,
    watcher: Watcher,
) -> dict[str, Any]:
    """Score and compare the frozen models on the test rows."""
    declaration = frozen["models"]["winner"]["declaration"]
    metric = scoring.resolve(frozen["objective"], declaration)
    files = predict_file(
        executor, watcher, prepared, frozen["models"], "test", folder / "frozen", sealed.feature_files("test")
    )["predictions"]
    if metric.kind == "custom":
        return _custom_scored(prepared, frozen, files, sealed, executor, watcher)
    labels, groups, ordered = sealed.labels("test"), sealed.groups("test"), prepared["manifest"]["ordered"]
    inputs = {}
    out: dict[str, Any] = {
        "objective": frozen["objective"],
        "rows": prepared["manifest"]["tiers"]["test"],
        "level": LEVEL,
        "verdicts": [],
    }
    for role, item in frozen["models"].items():
        metric = scoring.resolve(frozen["objective"], item["declaration"])
        predictions = [np.load(path, allow_pickle=False) for path in files[role]]
        names = [output["name"] for output in item["declaration"]["outputs"]]
        inputs[role] = scoring.score(metric, item["declaration"], predictions, scoring.in_order(labels, names))
        interval = statistics.test_interval(inputs[role], level=LEVEL, groups=groups, ordered=ordered)
        out[role] = {
            "trial": item["trial"],
            "score": inputs[role].value,
            "interval": [interval.low, interval.high],
            "method": interval.method,
        }
    out.setdefault("baseline", None)
    if "baseline" in inputs and frozen["models"]["baseline"]["trial"] != frozen["models"]["winner"]["trial"]:
        pair = (inputs["winner"], inputs["baseline"])
        difference = statistics.paired_difference(*pair, level=LEVEL, groups=groups, ordered=ordered)
        out["difference"] = {
            "gain": difference.estimate,
            "interval": [difference.low, difference.high],
            "method": difference.method,
            "p": difference.p,
        }
        out["beats_baseline"] = bool(difference.low > 0)
    else:
        out["difference"] = None
        out["beats_baseline"] = False if "baseline" in inputs else None
    if out["beats_baseline"] is False:
        out["verdicts"].append("NO_GAIN_SHOWN")
    return out


def _custom_scored(
    prepared: dict[str, Any],
    frozen: dict[str, Any],
    files: dict[str, list[str]],
    sealed: SealedRows,
    executor: Executor,
    watcher: Watcher,
) -> dict[str, Any]:
    """Scores of a metric that only Keras can compute; it has no interval here, and says so."""
    labels = sealed.label_files("test")
    payload = {
        "problem": prepared["problem"],
        "objective": frozen["objective"],
        "sets": {role: {"predictions": files[role], "labels": labels} for role in frozen["models"]},
    }
    values = jobs.call(executor, Job("score-test", "score", payload), watcher, executor.slots[0])["values"]
    out: dict[str, Any] = {
        "objective": frozen["objective"],
        "rows": prepared["manifest"]["tiers"]["test"],
        "level": None,
    }
    for role, item in frozen["models"].items():
        out[role] = {
            "trial": item["trial"],
            "score": values[role],
            "interval": None,
            "method": "none: the metric is the module's own",
        }
    return (
        out
        | {"difference": None, "beats_baseline": None, "verdicts": ["NO_INTERVAL_FOR_THIS_METRIC"]}
        | ({} if "baseline" in out else {"baseline": None})
    )

"""Ensembles: trained models of a study averaged into one, judged by rows that did not choose its weights."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from search.definition.problem import Problem
from search.ensembles import blending, ensemble_export, ensemble_judging, ensemble_words
from search.ensembles.blending import Blend
from search.errors import RequestError, StudyError
from search.executors import Executor, Job
from search.export import beside, new_folder
from search.guard import verdicts, winner
from search.guard.candidates import Candidate, Pool
from search.guard.evaluation import compared, opened, predicted, tested
from search.guard.freezing import build_file, by_text, freeze, intact, predict_file
from search.loop.watcher import Silent, Watcher
from search.processes import jobs
from search.record import places
from search.record.journal import Journal
from search.record.lock import locked
from search.scorer import scoring
from search.scorer.metrics import Floats
from search.scorer.scoring import Metric
from search.study import Study
from search.tiers.data import SealedRows
from search.trial import Trial

SIZE = 5
EVALUATE = ("auto", "yes", "no")
_MOST = 20  # models to pick from, as many as a study keeps
_CLOSE = 1e-4  # what single precision leaves between a file and the numbers it was made from


def ensemble(
    study: Study,
    size: int = SIZE,
    *,
    out: str | os.PathLike[str] | None = None,
    evaluate: str = "no",
    watcher: Watcher | None = None,
) -> dict[str, Any]:
    """Average trained models of a study into one that does best on guard rows; see README, "Ensembles".

    Asking again for the same size uses what was recorded, until the study has chosen another winner.

    Args:
        size: Picks at most; a model may be picked more than once.
        out: A new or empty folder for the ensemble as one Keras file, its lineage and its card; None writes none.
        evaluate: ``"yes"`` opens the test rows for the ensemble and the single winner, counted; ``"auto"`` only if
            nobody has opened them; ``"no"`` leaves them sealed. The same ensemble is answered from the record.

    Returns:
        JSON: ``members`` (``trial``, ``weight``, ``validation``), ``correlations``, ``cross_fitted`` (scores on guard
        rows, each by weights that were fitted without it), and ``test``, None until it was evaluated.

    Raises:
        StudyError: If the study is not complete.
        RequestError: If fewer than two models are kept, the metric has no score by row, the models have no inputs or
            outputs in common, or the written file predicts something else than its members together.
    """
    check(size, evaluate)
    if study.state != "COMPLETE":
        raise StudyError(
            f"only a complete study can be made an ensemble of, but {study.name!r} is {study.state}; `heldout resume "
            f"{study.name}` first"
        )
    folder = None if out is None else new_folder(out)
    watcher = watcher or Silent()
    with locked(study.folder):
        journal = Journal.open(study.folder / "journal.sqlite")
        try:
            record = _recorded(journal, size)
            choice = _choice(study.folder, journal) if record is None else None
            problem, env = Problem(**journal.get("prepared")["problem"]), jobs.secrets_of(journal)
            with jobs.start_executor(jobs.one_slot(), problem, study.folder, None, env) as executor:
                if choice is not None:
                    record = _made(study.folder, journal, executor, watcher, choice, size)
                assert record is not None, "recorded or made"
                if evaluate != "no":
                    _open(study.folder, journal, executor, watcher, record, again=evaluate == "yes")
                if folder is not None:
                    _export(study, journal, executor, watcher, record, folder)
        finally:
            journal.close()
    return ensemble_words.public(record) | {"study": study.name, "out": None if folder is None else str(folder)}


def check(size: int, evaluate: str) -> None:
    """See that an ensemble can be meant, whatever the study.

    Raises:
        RequestError: Otherwise.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 2:
        raise RequestError(f"--size must be a whole number of at least 2, but got {size!r}")
    if evaluate not in EVALUATE:
        raise RequestError(f"--evaluate must be one of {', '.join(EVALUATE)}, but got {evaluate!r}")


def _recorded(journal: Journal, size: int) -> dict[str, Any] | None:
    """The ensemble of this size, if it is still of what the study has chosen from, and its file the same."""
    record: dict[str, Any] | None = (journal.get("ensembles") or {}).get(str(size))
    if record is None or record["events"] != (journal.get("selection") or {}).get("events"):
        return None
    found = places.frozen({"models": {"ensemble": record["model"]}}, journal.path.parent)
    _record(journal, record)  # the last one asked for is what a report tells of
    return record | {"model": intact(found)["models"]["ensemble"]}


def _record(journal: Journal, record: dict[str, Any]) -> None:
    known = dict(journal.get("ensembles") or {})
    before = list(known.items())
    known.pop(str(record["size"]), None)
    known[str(record["size"])] = record
    if list(known.items()) != before:
        journal.put("ensembles", known)


@dataclass(frozen=True)
class _Choice:
    """What an ensemble can be made of.

    Attributes:
        declaration: The single winner's, and so the ensemble's.
        metric: The objective.
        there: Every model that the single winner was chosen from.
        models: Trials to pick from, the best by validation first.
    """

    declaration: Mapping[str, Any]
    metric: Metric
    there: Sequence[Candidate]
    models: Sequence[Trial]


def _choice(folder: Path, journal: Journal) -> _Choice:
    """See what there is to pick from, before anything is started.

    Raises:
        RequestError: If that is not enough, or cannot be scored here.
    """
    prepared, selection = places.prepared(journal), journal.get("selection")
    history = {trial.number: trial for trial in journal.history()}
    if not selection or not selection["winner"]:
        raise StudyError(f"no trial of study {folder.name!r} has completed, so there is no model to average")
    declaration = history[selection["winner"]["trial"]].extra["declaration"]
    metric = scoring.resolve(prepared["objective"], declaration)
    if metric.is_custom:
        raise RequestError(
            f"an ensemble is chosen by scores of many weightings, but only Keras can compute {prepared['objective']}; "
            "search for a metric that Heldout computes itself"
        )
    there = winner.contenders(folder, journal, metric)
    models = _candidates([history[one.trial] for one in there], declaration)
    if len(models) < 2:
        raise RequestError(
            f"an ensemble needs two trained models with the same outputs, but study {folder.name!r} has kept "
            f"{len(models)}; launch one with more --trials, and with --keep K or --keep all to keep their models"
        )
    return _Choice(declaration, metric, there, models)


def _made(
    folder: Path, journal: Journal, executor: Executor, watcher: Watcher, choice: _Choice, size: int
) -> dict[str, Any]:
    """Predict, fit, judge, write and record one."""
    prepared, selection = places.prepared(journal), journal.get("selection")
    declaration, metric, chosen = choice.declaration, choice.metric, choice.models
    with tempfile.TemporaryDirectory(prefix="heldout-ensemble-") as scratch:
        models = _files(journal, executor, watcher, chosen, Path(scratch))
        predictions: dict[str, list[str]] = {}
        watcher.say(f"predicting guard rows with {len(chosen)} models")
        for own, group in by_text(journal, models):
            found = predict_file(executor, watcher, own, group, "guard", Path(scratch))
            predictions |= found["predictions"]
        arrays = [[np.load(path, allow_pickle=False) for path in predictions[name]] for name in models]
        sealed = SealedRows(Path(prepared["sealed"]))
        names = [output["name"] for output in declaration["outputs"]]
        blend = Blend(
            metric,
            prepared["direction"],
            declaration,
            arrays,
            [blending.scales(trial.extra["declaration"], metric) for trial in chosen],
            scoring.in_order(sealed.labels("guard"), names),
        )
        watcher.say("fitting weights to guard rows")
        weights = blending.greedy(blend.loss, blend.count, size)
        spread = {"groups": sealed.groups("guard"), "ordered": prepared["manifest"]["ordered"]}
        pool = Pool(metric, prepared["direction"], choice.there)
        record: dict[str, Any] = {
            "events": selection["events"],
            "size": size,
            "objective": prepared["objective"],
            "direction": prepared["direction"],
            "candidates": len(chosen),
            "winner": selection["winner"]["trial"],
            "members": [
                {"trial": trial.number, "weight": float(weight), "validation": trial.score}
                for trial, weight in zip(chosen, weights, strict=True)
                if weight > 0
            ],
            "correlations": ensemble_judging.alike(blend, [trial.number for trial in chosen], weights),
            "cross_fitted": ensemble_judging.judged(blend, pool, prepared["manifest"]["tiers"], size, spread),
            "test": None,
        }
        kept = [weight > 0 for weight in weights]
        used = [item for item, is_kept in zip(models.values(), kept, strict=True) if is_kept]
        record["model"] = _written(folder, journal, executor, watcher, record, used, declaration, metric)
        _check_file(journal, executor, watcher, record, blend.outputs(weights), Path(scratch))
    _record(journal, record)
    return record


def _candidates(trials: Sequence[Trial], declaration: Mapping[str, Any]) -> list[Trial]:
    """Models to pick from, by validation score alone: no guard label decides which weights are fitted.

    Args:
        declaration: Models with other outputs than these cannot be averaged with it, and are left out.
    """
    alike = [trial for trial in trials if _form(trial.extra["declaration"]) == _form(declaration)]
    size = {trial.number: math.inf if trial.size is None else trial.size for trial in alike}
    return sorted(alike, key=lambda trial: (trial.loss, size[trial.number], trial.number))[:_MOST]


def _form(declaration: Mapping[str, Any]) -> list[Any]:
    outputs = declaration["outputs"]
    # The name of a single output follows from the number of layers before it.
    return [(output["name"] if len(outputs) > 1 else None, output["shape"][1:]) for output in outputs]


def _files(
    journal: Journal, executor: Executor, watcher: Watcher, trials: Sequence[Trial], folder: Path
) -> dict[str, dict[str, Any]]:
    """Each trial's model as a file, from the checkpoint that was kept."""
    models = {}
    for trial in trials:
        watcher.say(f"building the model of trial {trial.number}")
        path = folder / f"{trial.number:04d}.keras"
        built = build_file(journal, executor, watcher, trial, path)
        models[str(trial.number)] = built | {"trial": trial.number, "path": str(path)}
    return models


def _written(
    folder: Path,
    journal: Journal,
    executor: Executor,
    watcher: Watcher,
    record: Mapping[str, Any],
    models: Sequence[Mapping[str, Any]],
    declaration: Mapping[str, Any],
    metric: Metric,
) -> dict[str, Any]:
    """The ensemble as one file among the frozen ones, and what is known of it."""
    groups = by_text(journal, {str(item["trial"]): dict(item) for item in models})
    custom = any(item["custom"] for item in models)
    if custom and len(groups) > 1:
        raise RequestError(
            "an ensemble with custom layers must be of one text of the space module, but its members were trained "
            f"with {len(groups)}; `heldout export --trial N` exports each of them"
        )
    place = folder / "frozen"
    place.mkdir(mode=0o700, exist_ok=True)  # its weights have learned sealed labels
    for stale in place.glob(f"ensemble-{record['size']}-*.keras"):  # of what the study had chosen from before
        stale.unlink()
    path = place / f"ensemble-{record['size']}-{record['events']}.keras"
    known = {trial.number: trial for trial in journal.history()}
    members = [
        {
            "trial": one["trial"],
            "weight": one["weight"],
            "path": item["path"],
            "read": blending.scales(known[one["trial"]].extra["declaration"], metric),
        }
        for one, item in zip(record["members"], models, strict=True)
    ]
    payload = {
        "problem": groups[0][0]["problem"],
        "custom": custom,
        "members": members,
        "written": blending.scales(declaration, metric),
        "out": str(path),
    }
    watcher.say(f"writing {len(members)} models as one")
    done = jobs.call(executor, Job("merge", "merge", payload), watcher, executor.slots[0])
    return {
        "trial": members[0]["trial"],  # whose module text it needs
        "path": str(path),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "declaration": dict(declaration),
        "custom": done["custom"],
        "size": done["size"],
    }


def _check_file(
    journal: Journal,
    executor: Executor,
    watcher: Watcher,
    record: Mapping[str, Any],
    wanted: Sequence[Floats],
    scratch: Path,
) -> None:
    """See that the file, loaded in another process, says of guard rows what its members said together.

    Raises:
        RequestError: Otherwise; the file is removed.
    """
    ((own, group),) = by_text(journal, {"ensemble": record["model"]})
    found = predict_file(executor, watcher, own, group, "guard", scratch)["predictions"]["ensemble"]
    got = [np.load(path, allow_pickle=False) for path in found]
    pairs = list(zip(got, wanted, strict=True))
    if all(a.shape == b.shape and np.allclose(a, b, rtol=_CLOSE, atol=_CLOSE / 10) for a, b in pairs):
        return
    Path(record["model"]["path"]).unlink()
    far = max(float(np.abs(a - b).max()) if a.shape == b.shape else math.inf for a, b in pairs)
    raise RequestError(
        f"the written ensemble must predict what its members do together, but differs by up to {far:.3g}; is a layer "
        "of theirs at random in prediction as well?"
    )


def _open(
    folder: Path, journal: Journal, executor: Executor, watcher: Watcher, record: dict[str, Any], *, again: bool
) -> None:
    """Test the ensemble and the single winner, as ``evaluation.open_test`` does with winner and baseline."""
    if [one["trial"] for one in record["members"]] == [record["winner"]]:
        why = "the ensemble is the single winner alone, so there is nothing to compare and no row was opened"
        record["test"] = {"opened": False, "why": why, "openings": None}
        return _record(journal, record)
    prepared = places.prepared(journal)
    watcher.say("freezing the ensemble and the single winner")
    final = (journal.get("frozen") or journal.get("study")["config"])["final"]
    single = places.frozen(freeze(folder, journal, executor, watcher, final), folder)["models"]["winner"]
    frozen: dict[str, Any] = {
        "objective": prepared["objective"],
        "fingerprint": prepared["manifest"]["fingerprint"],
        "members": record["members"],
        "hashes": {"ensemble": record["model"]["sha256"], "winner": single["sha256"]},
        "final": final,
        "analysis": {"alpha": verdicts.TOTAL, "of opening i": "alpha 6 / (pi i)^2", "comparison": "paired"},
    }
    frozen["digest"] = hashlib.sha256(json.dumps(frozen, sort_keys=True).encode()).hexdigest()
    record["frozen"] = dict(frozen)
    _record(journal, record)  # the hashes, before the seal is touched
    frozen["models"] = {"ensemble": record["model"], "winner": single}

    def score(sealed: SealedRows, opening: int) -> dict[str, Any]:
        alpha = verdicts.alpha(opening)
        files = predicted(folder, journal, executor, watcher, frozen["models"], sealed)
        inputs, out, rows = tested(prepared, frozen, files, sealed, alpha)
        difference = compared(inputs["ensemble"], inputs["winner"], alpha, rows)
        return {
            "opened": True,
            "opening": opening,
            "alpha": alpha,
            "level": 1 - alpha,
            "rows": prepared["manifest"]["tiers"]["test"],
            "final": final,
            **out,
            "difference": difference,
            "beats_single": bool(difference["interval"][0] > 0),
        }

    by = f"heldout ensemble {folder.name} --size {record['size']} --evaluate yes"
    asked_for: dict[str, Any] = {"purpose": "ensemble against winner", "by": by, "again": again}
    record["test"] = opened(folder, journal, executor, watcher, frozen, score, **asked_for)
    _record(journal, record)


def _export(
    study: Study, journal: Journal, executor: Executor, watcher: Watcher, record: Mapping[str, Any], folder: Path
) -> None:
    """The file with its lineage and card, seen to load and predict where it lies."""
    with beside(folder) as scratch:
        made = Path(scratch) / "out"
        made.mkdir()
        path = made / "model.keras"
        shutil.copyfile(record["model"]["path"], path)
        ((own, group),) = by_text(journal, {"ensemble": record["model"] | {"path": str(path)}})
        found = predict_file(executor, watcher, own, group, "validation", Path(scratch))
        ensemble_export.write(study, journal, record, own, made, found["batch_size"])
        if folder.exists():
            folder.rmdir()
        os.replace(made, folder)

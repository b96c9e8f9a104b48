"""The held-out test step: freeze the selection, enter the opening in the ledger, then open the seal once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from search.definition.problem import Problem
from search.errors import RequestError, StudyError
from search.executors import Executor, Job
from search.guard import intervals, statistics, verdicts, winner
from search.guard.freezing import by_text, draw, freeze, predict_file
from search.guard.ledger import Ledger, times
from search.loop.watcher import Silent, Watcher
from search.pages import page
from search.processes import jobs
from search.record import places
from search.record.journal import Journal
from search.record.lock import locked
from search.scorer import scoring
from search.shown import picture
from search.shown.report import PICTURE, report
from search.study import Study, StudyConfig
from search.tiers.data import SealedRows
from search.tracker import publishing
from search.trial import Trial, best, searched


def evaluate(study: Study, *, final: str | None = None, watcher: Watcher | None = None) -> dict[str, Any]:
    """Open the sealed test rows for a study's winner and baseline, counted; see README, "The test step".

    The same frozen selection is answered from the ledger's record and opens nothing.

    Args:
        final: ``"retrain"`` refits winner and baseline on train, validation and guard rows first.

    Raises:
        StudyError: If the study is not complete.
        RequestError: If the ledger's chain is broken.
    """
    if study.state != "COMPLETE":
        raise StudyError(
            f"only a complete study can be evaluated, but {study.name!r} is {study.state}; `heldout resume "
            f"{study.name}` first"
        )
    StudyConfig(study.name, final=final)  # checks it
    watcher = watcher or Silent()
    problem = Problem(**study.meta("prepared")["problem"])
    meta = places.study(study.meta("study"), study.workspace)
    publishing.check_uri(publishing.uri_of(meta))  # before rows are opened that it could not show
    with locked(study.folder):
        journal = Journal.open(study.folder / "journal.sqlite")
        try:
            slots, env = jobs.one_slot(), jobs.secrets_of(journal)
            with jobs.start_executor(slots, problem, study.folder, None, env) as executor:
                # Asking again means the same models again, and so the recorded answer.
                asked = journal.get("frozen") or journal.get("study")["config"]
                conclude(study.folder, journal, executor, watcher, opening="yes", final=final or asked["final"])
            page.keep(study.folder, watcher)
            jobs.publish(study.folder, journal, watcher)
            found: dict[str, Any] = journal.get("evaluation")
        finally:
            journal.close()
    return found


def conclude(
    folder: Path, journal: Journal, executor: Executor, watcher: Watcher, *, opening: str, final: str | None
) -> None:
    """End a study: choose the winner, test it if those rows may be opened, and say what to believe.

    Puts ``selection`` (see ``winner.select``), ``evaluation`` (see ``open_test``) and ``summary`` in the journal.

    Args:
        opening: ``"auto"`` opens rows that nobody has opened, ``"yes"`` others too, ``"no"`` none.
        final: ``"retrain"`` or None.
    """
    if best(journal.history()) is None:
        journal.put("evaluation", {"opened": False, "why": "no trial completed, so there is nothing to test"})
        return
    if (journal.get("selection") or {}).get("events") != journal.length:
        watcher.say("choosing the winner by validation and guard rows")
        with journal.one_commit():
            journal.put("selection", winner.select(folder, journal))
            journal.put("evaluation", {})
    if opening != "no":
        open_test(folder, journal, executor, watcher, again=opening == "yes", final=final)
        try:
            _draw(folder, journal)
        except Exception as error:  # a picture must not cost a study its answer
            watcher.say(f"the picture could not be drawn: {error}")
    found = report(Study.at(folder))
    summary = {"believe": found["believe"], "picture": found["picture"]}
    _record(journal, "summary", summary | {"architecture": _drawn(folder, journal, executor, watcher)})


def _drawn(folder: Path, journal: Journal, executor: Executor, watcher: Watcher) -> dict[str, Any] | None:
    """The drawing of the winner's architecture, by trial and file; made anew only for another winner."""
    number = journal.get("selection")["winner"]["trial"]
    known: dict[str, Any] | None = (journal.get("summary") or {}).get("architecture")
    if known is not None and known["trial"] == number and (folder / known["file"]).exists():
        return known
    (trial,) = [trial for trial in journal.history() if trial.number == number]
    file = draw(journal, executor, watcher, trial, folder)
    return None if file is None else {"trial": number, "file": file}


def open_test(
    folder: Path, journal: Journal, executor: Executor, watcher: Watcher, *, again: bool, final: str | None
) -> dict[str, Any]:
    """Freeze winner and baseline, and score both on the test rows if those may be opened.

    Args:
        again: Open rows that were opened before; False leaves them sealed and says so.

    Returns:
        What is put in the journal under ``evaluation``: ``opened``, and either ``why`` not, or
        ``opening`` (the how-manieth of these rows), ``alpha``, ``winner``, ``baseline``, ``difference``, ``gap``,
        ``verdicts``.
    """
    prepared, selection = places.prepared(journal), journal.get("selection")
    watcher.say("freezing the selection")
    frozen = freeze(folder, journal, executor, watcher, final)

    def score(sealed: SealedRows, opening: int) -> dict[str, Any]:
        return _scored(folder, journal, prepared, frozen, selection, sealed, executor, watcher, opening)

    by = f"heldout evaluate {folder.name}"
    asked: dict[str, Any] = {"purpose": "winner against baseline", "by": by, "again": again}
    return _record(journal, "evaluation", opened(folder, journal, executor, watcher, frozen, score, **asked))


def opened(
    folder: Path,
    journal: Journal,
    executor: Executor,
    watcher: Watcher,
    frozen: Mapping[str, Any],
    score: Callable[[SealedRows, int], dict[str, Any]],
    *,
    purpose: str,
    by: str,
    again: bool,
) -> dict[str, Any]:
    """What the test rows say of frozen models: entered in the ledger first, or answered from its record.

    Args:
        frozen: ``models`` and ``digest``, as of ``freezing.freeze``.
        score: From the sealed rows and the number of the opening to what is kept as its result.
        purpose: What the opening is for, for the ledger.
        by: The command that opens rows again.
        again: Open rows that were opened before; False leaves them sealed and says so.

    Returns:
        What ``score`` returned, now or when the same frozen models were tested; or ``opened`` False and ``why``.
    """
    prepared = places.prepared(journal)
    sealed, fingerprint = SealedRows(Path(prepared["sealed"])), prepared["manifest"]["fingerprint"]
    hashes, prior = sealed.row_hashes(), prepared["manifest"]["prior_openings"]
    ledger = Ledger()
    ledger.verify()
    recorded = ledger.find(frozen["digest"])
    if recorded is not None:
        watcher.say("this selection was tested before: its recorded answer stands, and nothing was opened")
        return recorded
    earlier = ledger.openings(hashes, fingerprint, prior=prior)
    if earlier and not again:
        return {"opened": False, "why": _used(earlier, prior, by), "openings": earlier}
    space = prepared["problem"]["path"]
    if not earlier and (changed := ledger.changed(space, hashes, fingerprint)):
        watcher.say(
            f"{space} opened other test rows before ({len(changed)} openings); if these are the same rows rescaled or "
            "re-encoded, say so: give ids= in load(), or prior_openings="
        )
    entry = {
        "study": folder.name,
        "study_id": journal.get("study")["study_id"],
        "space": space,
        "fingerprint": fingerprint,
        "frozen": frozen["digest"],
        "models": {role: item["sha256"] for role, item in frozen["models"].items()},
        "purpose": purpose,
        "time": time.time(),
    }
    for own, group in by_text(journal, frozen["models"]):  # a model that cannot be loaded costs no opening
        predict_file(executor, watcher, own, group, "validation", folder / "frozen")
    # A first opening must still be the first when it is entered: another study may be opening the same rows.
    number = ledger.append(entry, hashes, expected=None if again else 1, prior=prior, alpha=verdicts.alpha)
    watcher.say(f"opening the sealed test rows (opening {number} of these rows)")
    try:
        result = score(sealed, number)
    except RequestError as error:
        raise RequestError(f"opening {number} of these test rows is entered and counts, but {error}") from None
    ledger.record_result(number, frozen["digest"], result)
    return result


def _draw(folder: Path, journal: Journal) -> None:
    """The picture of the study; with guard scores in it, so only after the freeze."""
    guards = {number: score for (number, _), (score, _) in sorted(journal.guards().items())}
    series = []
    leader: Trial | None = None
    for trial in searched(journal.history()):
        leader = best([trial] if leader is None else [leader, trial]) or leader
        if leader is not None and leader.score is not None:
            guard = guards.get(leader.number, math.nan)
            series.append((trial.number, leader.score, guard if math.isfinite(guard) else None))
    picture.draw(folder / PICTURE, report(Study.at(folder)), series)


def _used(earlier: int, prior: int, by: str) -> str:
    how_often = times(earlier) + (f" (of these {prior} by the prior_openings of load())" if prior else "")
    return (
        f"these test rows have been opened {how_often} before, so they stay sealed; "
        f"`{by}` opens them again, counted, and a test set used again flatters"
    )


def _record(journal: Journal, key: str, found: dict[str, Any]) -> dict[str, Any]:
    if journal.get(key) != found:  # or MLflow would be told again what it has, under a new time
        journal.put(key, found)
    return found


def _scored(
    folder: Path,
    journal: Journal,
    prepared: dict[str, Any],
    frozen: dict[str, Any],
    selection: dict[str, Any],
    sealed: SealedRows,
    executor: Executor,
    watcher: Watcher,
    opening: int,
) -> dict[str, Any]:
    """Score and compare the frozen models on the test rows."""
    models, manifest = frozen["models"], prepared["manifest"]
    alpha = verdicts.alpha(opening)
    metric = scoring.resolve(frozen["objective"], models["winner"]["declaration"])
    files = predicted(folder, journal, executor, watcher, models, sealed)
    out: dict[str, Any] = {
        "opened": True,
        "opening": opening,
        "alpha": alpha,
        "level": None if metric.is_custom else 1 - alpha,
        "objective": frozen["objective"],
        "rows": manifest["tiers"]["test"],
        "final": frozen["final"],
        "baseline": None,
        "difference": None,
        "beats_baseline": None,
        "gap": None,
    }
    is_baseline = "baseline" in models and models["baseline"]["trial"] == models["winner"]["trial"]
    if metric.is_custom:
        out |= _by_keras(journal, frozen, files, sealed, executor, watcher)
    else:
        out |= _with_intervals(prepared, frozen, selection, files, sealed, alpha)
    if is_baseline:
        out["beats_baseline"] = False
    interval = out["difference"] and tuple(out["difference"]["interval"])
    gap = None if out["gap"] is None else verdicts.Gap(**out["gap"])
    out["verdicts"] = verdicts.judge(
        gap=gap,
        ordered=manifest["ordered"],
        gain=interval,
        is_baseline=is_baseline,
        opening=opening,
        custom=metric.is_custom,
    )
    return out


def _with_intervals(
    prepared: dict[str, Any],
    frozen: dict[str, Any],
    selection: dict[str, Any],
    files: dict[str, list[str]],
    sealed: SealedRows,
    alpha: float,
) -> dict[str, Any]:
    inputs, out, rows = tested(prepared, frozen, files, sealed, alpha)
    corrected = selection["corrected"]
    known = corrected is not None and corrected["interval"] is not None
    if known and frozen["final"] is None:  # a refitted model is another one
        errors = (selection["winner"]["guard_error"], statistics.standard_error(inputs["winner"], **rows))
        found = verdicts.gap(corrected["estimate"], inputs["winner"].value, *errors, prepared["direction"])
        out["gap"] = None if found is None else {"gap": found.gap, "z": found.z, "smallest": found.smallest}
    if "baseline" in inputs and out["baseline"]["trial"] != out["winner"]["trial"]:
        out["difference"] = compared(inputs["winner"], inputs["baseline"], alpha, rows)
        out["beats_baseline"] = bool(out["difference"]["interval"][0] > 0)
    return out


def predicted(
    folder: Path, journal: Journal, executor: Executor, watcher: Watcher, models: dict[str, Any], sealed: SealedRows
) -> dict[str, list[str]]:
    """Predictions of the test rows by role, one ``.npy`` per output; to be called when the opening is entered."""
    files: dict[str, list[str]] = {}
    features = sealed.feature_files("test")
    for own, group in by_text(journal, models):
        files |= predict_file(executor, watcher, own, group, "test", folder / "frozen", features)["predictions"]
    return files


def tested(
    prepared: Mapping[str, Any],
    frozen: Mapping[str, Any],
    files: Mapping[str, list[str]],
    sealed: SealedRows,
    alpha: float,
) -> tuple[dict[str, scoring.Score], dict[str, Any], dict[str, Any]]:
    """Scores of frozen models on the test rows, by role.

    Args:
        files: Predictions by role, one ``.npy`` per output.

    Returns:
        The scores; the same as JSON with intervals; and what the rows' dependence is, for ``statistics``.
    """
    labels = sealed.labels("test")
    rows: dict[str, Any] = {"groups": sealed.groups("test"), "ordered": prepared["manifest"]["ordered"]}
    inputs: dict[str, scoring.Score] = {}
    out: dict[str, Any] = {}
    for role, item in frozen["models"].items():
        metric = scoring.resolve(frozen["objective"], item["declaration"])
        predictions = [np.load(path, allow_pickle=False) for path in files[role]]
        names = [output["name"] for output in item["declaration"]["outputs"]]
        inputs[role] = scoring.score(metric, item["declaration"], predictions, scoring.in_order(labels, names))
        interval = statistics.test_interval(inputs[role], level=1 - alpha, **rows)
        out[role] = {
            "trial": item["trial"],
            "score": inputs[role].value,
            "interval": [interval.low, interval.high],
            "method": interval.method,
        }
    return inputs, out, rows


def compared(ours: scoring.Score, theirs: scoring.Score, alpha: float, rows: Mapping[str, Any]) -> dict[str, Any]:
    """The paired difference of two scores as JSON, turned so that positive is a gain, and the smallest that would show.

    Args:
        rows: What the rows' dependence is, see ``tested``.
    """
    level = 1 - alpha
    difference = statistics.paired_difference(ours, theirs, level=level, **rows)
    # Half the interval over its z; asymmetric ones give their mean.
    error = (difference.high - difference.low) / (2 * intervals.z(level))
    return {
        "gain": difference.estimate,
        "interval": [difference.low, difference.high],
        "method": difference.method,
        "p": difference.p,
        "smallest": verdicts.smallest_gain(error, alpha) if error else None,
    }


def _by_keras(
    journal: Journal,
    frozen: dict[str, Any],
    files: dict[str, list[str]],
    sealed: SealedRows,
    executor: Executor,
    watcher: Watcher,
) -> dict[str, Any]:
    """Scores of a metric that only Keras can compute; it has no interval here, and says so."""
    labels = sealed.label_files("test")
    values: dict[str, float] = {}
    for own, group in by_text(journal, frozen["models"]):
        payload = {
            "problem": own["problem"],
            "objective": frozen["objective"],
            "sets": {role: {"predictions": files[role], "labels": labels} for role in group},
        }
        values |= jobs.call(executor, Job("score-test", "score", payload), watcher, executor.slots[0])["values"]
    method = "none: only Keras can compute this metric"
    return {
        role: {"trial": item["trial"], "score": values[role], "interval": None, "method": method}
        for role, item in frozen["models"].items()
    }

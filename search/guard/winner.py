"""The final choice of a study: which trained model is shipped, and what its guard rows say of that choice."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from search.errors import RequestError
from search.guard import selection, statistics
from search.guard.candidates import Candidate
from search.guard.ledger import Ledger
from search.harness import folding
from search.loop import keeping
from search.record import places
from search.record.journal import Journal
from search.scorer import scoring
from search.scorer.judge import RowJudge
from search.scorer.metrics import RANKS, RATIOS
from search.scorer.scoring import Metric, Score
from search.tiers.data import SealedRows
from search.tiers.validation import parse
from search.trial import Trial, TrialState, best

LEVEL = 0.95


def select(folder: Path, journal: Journal) -> dict[str, Any] | None:
    """Choose the model to ship by validation and guard rows together; None if no trial completed.

    Until here guard scores were only recorded: which configurations were tried, and which were trained
    again, would be the same with any other guard labels.

    Returns:
        JSON: ``events`` (length of the journal that it follows from), ``winner`` and ``baseline`` (``trial``,
        ``configuration``, scores and intervals on validation and guard rows), ``corrected``, ``noise_floor``,
        ``gains``, ``confirmation``.
    """
    history, prepared = journal.history(), places.prepared(journal)
    leader = best(history)
    if leader is None:
        return None
    metric = scoring.resolve(prepared["objective"], leader.extra["declaration"])
    done = [trial for trial in history if trial.state is TrialState.COMPLETE]
    candidates = contenders(folder, journal, metric)
    sealed = SealedRows(Path(prepared["sealed"]))
    spread: dict[str, Any] = {"groups": sealed.groups("guard"), "ordered": prepared["manifest"]["ordered"]}
    plan = prepared["validation"]
    judge = RowJudge(
        Path(prepared["rows"]), sealed.path, prepared["objective"], prepared["problem"], validation=plan
    )
    known = {trial.number: trial for trial in done}
    tested = {candidate.trial: candidate for candidate in candidates}

    def described(number: int | None) -> dict[str, Any] | None:
        if number is None or number not in known:
            return None
        trial, candidate = known[number], tested.get(number)
        return {
            "trial": number,
            "configuration": trial.configuration,
            "validation": trial.score,
            "validation_interval": _validation_interval(folder, prepared, judge, trial, metric),
            "guard": None if candidate is None else candidate.guard,
            **_guard_spread(candidate, metric, spread),
        }

    out: dict[str, Any] = {
        "events": journal.length,
        "winner": described(leader.number),
        "baseline": described(0),
        "corrected": None,
        "noise_floor": None,
        "gains": {"configuration": None, "shipped": None},
        "confirmation": None,
    }
    if not candidates:  # no metric on these guard rows, such as an AUC of one class: validation alone has to choose
        return out
    tiers = prepared["manifest"]["tiers"]
    rows = tiers["validation"] if plan is None else plan["weight"]
    asked = (metric, prepared["direction"], candidates, rows, tiers["guard"])
    choice = selection.choose(*asked)
    baseline = choice.best.get(0)
    found = selection.corrected(*asked, baseline=None if baseline is None else 0, **spread)
    return out | {
        "winner": described(choice.trial),
        "baseline": described(0 if baseline is None else baseline),
        "corrected": {
            "estimate": found.estimate,
            "interval": None if found.low is None else [found.low, found.high],
            "level": found.level,
            "method": found.method,
            "scope": _scope(journal, sealed, prepared["manifest"], len({number for number, _ in journal.guards()})),
        },
        "noise_floor": selection.noise_floor(*asked),
        "gains": {"configuration": _gain(found.configuration_gain), "shipped": _gain(found.shipped_gain)},
        "confirmation": _confirmation(history, choice, found.wins),
    }


def contenders(folder: Path, journal: Journal, metric: Metric) -> list[Candidate]:
    """The models that can be shipped, with what they are judged by."""
    history = journal.history()
    guards = {number: found for (number, _), found in sorted(journal.guards().items())}  # the last attempt's
    # What was deleted went by validation scores alone, so this choice is still all that guard rows decide.
    there = keeping.kept(history, keeping.limit(journal))
    done = [trial for trial in history if trial.state is TrialState.COMPLETE]
    able = [trial for trial in done if trial.number in guards and trial.number in there]
    able = [trial for trial in able if _is_whole(folder, trial, guards[trial.number][1])]
    found = [_candidate(folder, trial, metric, *guards[trial.number]) for trial in able]
    return [candidate for candidate in found if np.isfinite(candidate.guard)]


def _is_whole(folder: Path, trial: Trial, evidence: Mapping[str, Any] | None) -> bool:
    """Whether what is left of a trial after a crash or a repair suffices to choose and to ship it."""
    if not places.weights(folder, trial.number).exists():
        return False
    try:
        if evidence is not None:
            np.load(places.guard_parts(folder, trial.number), mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return False
    return True


def _candidate(
    folder: Path, trial: Trial, metric: Metric, guard: float, evidence: Mapping[str, Any] | None
) -> Candidate:
    assert trial.score is not None
    path = places.guard_parts(folder, trial.number)
    parts = None if evidence is None else np.load(path, mmap_mode="r", allow_pickle=False)
    sums = None if evidence is None or evidence["validation"] is None else np.array(evidence["validation"])
    return Candidate(trial.number, trial.configuration, trial.size, trial.score, guard, parts, sums)


def _validation_interval(
    folder: Path, prepared: Mapping[str, Any], judge: RowJudge, trial: Trial, metric: Metric
) -> list[float] | None:
    """How far the score would lie from the truth by chance alone, had the rows not helped to choose.

    None where it is the mean of scores on splits that overlap.
    """
    manifest, plan = prepared["manifest"], prepared["validation"]
    if metric.is_custom or manifest["grouped"]:
        return None
    place, outputs = places.trial(folder, trial.number), len(trial.extra["declaration"]["outputs"])
    splits = [place]
    if plan is not None and parse(plan["plan"]).is_repeated:
        splits = [folding.folder_of(place, number) for number in range(len(plan["validation"]))]
    files = [[str(split / f"validation_{k}.npy") for k in range(outputs)] for split in splits]
    if not all(Path(file).exists() for paths in files for file in paths):
        return None
    result = {"predictions": {"validation": files if splits != [place] else files[0]}, "seed": trial.seed}
    scores = judge.validation(metric, result | {"declaration": trial.extra["declaration"]})
    if len(scores) > 1:
        return None
    interval = statistics.test_interval(scores[0], level=LEVEL, ordered=manifest["ordered"])
    return [interval.low, interval.high]


def _guard_spread(candidate: Candidate | None, metric: Metric, rows: dict[str, Any]) -> dict[str, Any]:
    if candidate is None or candidate.parts is None:
        return {"guard_interval": None, "guard_error": None}
    parts = np.asarray(candidate.parts, dtype=np.float64)
    mean = metric.kind not in RANKS and metric.kind not in RATIOS
    score = Score(metric, candidate.guard, parts[:, 0] if mean else None, parts)
    interval = statistics.test_interval(score, level=LEVEL, **rows)
    return {
        "guard_interval": [interval.low, interval.high],
        "guard_error": statistics.standard_error(score, **rows),
    }


def _gain(gain: selection.Gain | None) -> dict[str, Any] | None:
    return None if gain is None else {"gain": gain.gain, "interval": [gain.low, gain.high]}


def _confirmation(
    history: Sequence[Trial], choice: selection.Choice, wins: Mapping[int, float]
) -> dict[str, Any] | None:
    runs = [t for t in history if t.confirms is not None]
    if not runs:
        return None
    seconds = sum(t.seconds or 0.0 for t in runs)
    numbers = sorted({t.confirms for t in runs if t.confirms is not None})
    finalists: list[dict[str, Any]] = []
    for number in numbers:
        mine = [t for t in runs if t.confirms == number]
        failed = sum(t.state is not TrialState.COMPLETE for t in mine)
        finalists.append(
            {
                "configuration": number,
                "trials": [t.number for t in mine],
                "failed": failed,
                "score": choice.means.get(number) if failed < len(mine) else None,
                "wins": wins.get(number, 0.0) if wins else None,
            }
        )
    return {
        "seeds": max(len(one["trials"]) for one in finalists),
        "finalists": finalists,
        "seconds": seconds,
        "share": seconds / max(sum(t.seconds or 0.0 for t in history), 1e-9),
    }


def _scope(journal: Journal, sealed: SealedRows, manifest: Mapping[str, Any], trials: int) -> str:
    """Enter in the ledger that these guard rows have judged this study; who else was judged by them, in words."""
    study, fingerprint, hashes = journal.get("study"), manifest["guard_fingerprint"], sealed.row_hashes("guard")
    entry = {"study": study["name"], "study_id": study["study_id"], "fingerprint": fingerprint}
    try:
        ledger = Ledger()
        use = ledger.guard_use(hashes, fingerprint, study["study_id"])
        ledger.record_guard(entry | {"trials": trials, "time": time.time()}, hashes)
    except RequestError:
        return "this study only: whether others were judged by these guard rows is not known, as the ledger failed"
    if not use.studies:
        return "this study"
    others = "another study" if use.studies == 1 else f"{use.studies} other studies"
    return f"this study only: {others} with {use.trials} trials had been judged by these guard rows"

"""The final choice of a study: which trained model is shipped, and what its guard rows say of that choice."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from search import scoring, selection, statistics
from search.data import SealedRows
from search.errors import RequestError
from search.journal import Journal
from search.judge import RowJudge
from search.ledger import Ledger
from search.metrics import PROPORTIONS, RANKS, RATIOS, Array
from search.scoring import Metric, Score
from search.selection import Candidate
from search.trial import Trial, TrialState, best, searched

LEVEL = 0.95


def select(folder: Path, journal: Journal) -> dict[str, Any] | None:
    """Choose the model to ship by validation and guard rows together; None if no trial completed.

    Until here guard scores were only recorded: which configurations were tried, and which were trained
    again, would be the same with any other guard labels.

    Returns:
        JSON: ``winner`` and ``baseline`` (``trial``, ``configuration``, scores and intervals on validation and guard
        rows), ``corrected``, ``noise_floor``, ``gains``, ``confirmation``.
    """
    history, prepared = journal.history(), journal.get("prepared")
    if best(history) is None:
        return None
    guards = {number: found for (number, _), found in sorted(journal.guards().items())}  # the last attempt's
    pool = [trial for trial in history if trial.state is TrialState.COMPLETE]
    confirmed = any(trial.confirms is not None for trial in history)
    metric = scoring.resolve(prepared["objective"], pool[0].extra["declaration"])
    candidates = [_candidate(trial, metric, *guards[trial.number]) for trial in pool]
    tiers, ordered = prepared["manifest"]["tiers"], prepared["manifest"]["ordered"]
    asked = (metric, prepared["direction"], candidates, tiers["validation"], tiers["guard"])
    choice = selection.choose(*asked)
    sealed = SealedRows(Path(prepared["sealed"]))
    groups = sealed.groups("guard")
    baseline = _baseline(candidates, choice, prepared["direction"])
    found = selection.corrected(
        *asked, baseline=None if baseline is None else 0, groups=groups, ordered=ordered
    )
    known = {trial.number: trial for trial in history}

    def described(number: int) -> dict[str, Any]:
        trial = known[number]
        candidate = _candidate(trial, metric, *guards[number])
        return {
            "trial": number,
            "configuration": candidate.configuration,
            "validation": trial.score,
            "validation_interval": _validation_interval(folder, prepared, trial, metric),
            "guard": candidate.guard,
            **_guard_spread(candidate, metric, groups, ordered),
        }

    return {
        "winner": described(choice.trial),
        "baseline": None if baseline is None else described(baseline),
        "proportion": metric.kind in PROPORTIONS,
        "corrected": {
            "estimate": found.estimate,
            "interval": None if found.low is None else [found.low, found.high],
            "level": found.level,
            "method": found.method,
            "scope": _scope(journal, sealed, prepared["manifest"], len(searched(history))),
        },
        "noise_floor": selection.noise_floor(*asked),
        "gains": {"configuration": _gain(found.configuration_gain), "shipped": _gain(found.shipped_gain)},
        "confirmation": _confirmation(history, choice, found.wins) if confirmed else None,
    }


def _candidate(trial: Trial, metric: Metric, guard: float, evidence: Mapping[str, Any] | None) -> Candidate:
    assert trial.score is not None
    parts = None if evidence is None else np.load(evidence["parts"], mmap_mode="r", allow_pickle=False)
    sums = None if evidence is None or evidence["validation"] is None else np.array(evidence["validation"])
    configuration = trial.number if trial.confirms is None else trial.confirms
    return Candidate(trial.number, configuration, trial.size, trial.score, guard, parts, sums)


def _baseline(candidates: Sequence[Candidate], choice: selection.Choice, direction: str) -> int | None:
    """The baseline's model: the best of its runs by the winner's own rule."""
    sign = 1 if direction == "min" else -1
    runs = [c.trial for c in candidates if c.configuration == 0 and c.trial in choice.pooled]
    return min(runs, key=lambda number: (sign * choice.pooled[number], number), default=None)


def _validation_interval(folder: Path, prepared: dict[str, Any], trial: Trial, metric: Metric) -> list[float] | None:
    """How far the score would lie from the truth by chance alone, had the rows not helped to choose."""
    if metric.is_custom or prepared["manifest"]["grouped"]:
        return None
    judge = RowJudge(Path(prepared["rows"]), Path(prepared["sealed"]), prepared["objective"], prepared["problem"])
    place, outputs = folder / "trials" / f"{trial.number:04d}", len(trial.extra["declaration"]["outputs"])
    files = [str(place / f"validation_{k}.npy") for k in range(outputs)]
    result = {"predictions": {"validation": files}, "declaration": trial.extra["declaration"]}
    score = judge.score("validation", metric, result)
    interval = statistics.test_interval(score, level=LEVEL, ordered=prepared["manifest"]["ordered"])
    return [interval.low, interval.high]


def _guard_spread(candidate: Candidate, metric: Metric, groups: Array | None, ordered: bool) -> dict[str, Any]:
    if candidate.parts is None:
        return {"guard_interval": None, "guard_error": None}
    parts = np.asarray(candidate.parts, dtype=np.float64)
    mean = metric.kind not in RANKS and metric.kind not in RATIOS
    score = Score(metric, candidate.guard, parts[:, 0] if mean else None, parts)
    interval = statistics.test_interval(score, level=LEVEL, groups=groups, ordered=ordered)
    error = statistics.standard_error(score, groups=groups, ordered=ordered)
    return {"guard_interval": [interval.low, interval.high], "guard_error": error}


def _gain(gain: selection.Gain | None) -> dict[str, Any] | None:
    return None if gain is None else {"gain": gain.gain, "interval": [gain.low, gain.high]}


def _confirmation(history: Sequence[Trial], choice: selection.Choice, wins: Mapping[int, float]) -> dict[str, Any]:
    runs = [t for t in history if t.confirms is not None]
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
    except RequestError as error:
        return f"this study only, since earlier use of these guard rows is not known: {error}"
    if not use.studies:
        return "this study"
    others = "another study" if use.studies == 1 else f"{use.studies} other studies"
    return f"this study only: {others} with {use.trials} trials had been judged by these guard rows"

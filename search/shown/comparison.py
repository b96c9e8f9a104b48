"""Two studies side by side, with a paired test of what they ship where they were judged by the same rows."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from search.errors import StudyFailed
from search.guard import belief, statistics
from search.guard.candidates import Candidate, Pool
from search.guard.intervals import tails
from search.guard.statistics import units_of
from search.guard.winner import contenders
from search.record import places
from search.scorer import scoring
from search.scorer.metrics import Array
from search.scorer.scoring import Metric, Score
from search.shown.report import number, report
from search.study import Study
from search.tiers.data import SealedRows
from search.trial import best

LEVEL = 0.95
_WIDTH = 110


class _NotPaired(Exception):
    """Why two studies cannot be compared row by row."""


def compare(first: Study, second: Study) -> dict[str, Any]:
    """Two studies side by side.

    Returns:
        JSON: ``studies``, the two reports; ``guard`` and ``test``, each the ``gain`` of what the second study ships
        over what the first one ships (positive is better) with its ``interval``, ``level``, ``rows``, ``method`` and
        whether a difference is ``shown``, or ``why`` there is none.

    On guard rows both choices are repeated on each resample and what they chose is scored on the rows left out (see
    ``selection.corrected``), so neither study gains from having looked at more models. Test rows are compared only if
    both studies have opened them, by the predictions made then: it opens nothing, and has the later opening's level.
    """
    found = [report(first), report(second)]
    try:
        metric = _shared(first, second)
    except _NotPaired as why:
        return {"studies": found, "guard": {"why": str(why)}, "test": {"why": str(why)}}
    out: dict[str, Any] = {"studies": found}
    for tier, test in (("guard", _on_guard), ("test", _on_test)):
        try:
            out[tier] = test(first, second, metric)
        except _NotPaired as why:
            out[tier] = {"why": str(why)}
    return out


def _shared(first: Study, second: Study) -> Metric:
    """The metric of both, if they were scored by the same one on the same rows."""
    ours, theirs = first.meta("study"), second.meta("study")
    for study, meta in ((first, ours), (second, theirs)):
        if meta is None or best(study.trials) is None:
            raise _NotPaired(f"no trial of {study.name} has completed")
    for key in ("objective", "direction"):
        if ours[key] != theirs[key]:
            raise _NotPaired(f"{first.name} has the {key} {ours[key]} and {second.name} {theirs[key]}")
    if ours["data"]["digest"] != theirs["data"]["digest"]:
        raise _NotPaired(
            f"{first.name} and {second.name} have other rows or another split, so no row of one stands beside its like "
            "in the other"
        )
    metrics = []
    for study in (first, second):
        leader = best(study.trials)
        assert leader is not None
        metrics.append(scoring.resolve(ours["objective"], leader.extra["declaration"]))
    if metrics[0] != metrics[1]:
        raise _NotPaired(f"the models of {first.name} and {second.name} compute {ours['objective']} in other ways")
    if metrics[0].is_custom:
        raise _NotPaired(f"only Keras can compute {ours['objective']}, and it has no value for each row")
    return metrics[0]


def _on_guard(first: Study, second: Study, metric: Metric) -> dict[str, Any]:
    pools = []
    for study in (first, second):
        if study.meta("selection") is None:
            raise _NotPaired(f"{study.name} has not chosen a winner yet, which it does when its search ends")
        with study.journal() as journal:
            pools.append(contenders(study.folder, journal, metric))
            prepared = places.prepared(journal)
        if not pools[-1]:
            raise _NotPaired(f"{study.name} has no model left with scores on guard rows")
    sealed, manifest = SealedRows(Path(prepared["sealed"])), prepared["manifest"]
    gains = resampled(
        metric,
        first.direction,
        pools[0],
        pools[1],
        manifest["tiers"]["validation"],
        manifest["tiers"]["guard"],
        groups=sealed.groups("guard"),
        ordered=manifest["ordered"],
    )
    if gains is None:
        raise _NotPaired("there are too few guard rows to resample")
    low, high = (float(end) for end in np.quantile(gains, tails(LEVEL)))
    return _difference(
        float(gains.mean()), low, high, LEVEL, manifest["tiers"]["guard"], "bootstrap, both choices repeated"
    )


def resampled(
    metric: Metric,
    direction: str,
    ours: Sequence[Candidate],
    theirs: Sequence[Candidate],
    validation_rows: int,
    guard_rows: int,
    *,
    groups: Array | None = None,
    ordered: bool = False,
    repeats: int = 1000,
    seed: int = 0,
) -> Any:
    """How much better the second pool's choice is than the first one's on rows left out, resample by resample.

    Returns:
        Gains, positive where the second is better; None if fewer than half of the resamples have one.
    """
    try:
        pools = [Pool(metric, direction, candidates) for candidates in (ours, theirs)]
    except StudyFailed as error:
        raise _NotPaired(str(error)) from None
    repeats = min(pool.affordable(repeats) for pool in pools)
    gains: list[Any] = []
    for weights in pools[0].draws(guard_rows, units_of(guard_rows, groups, ordered), repeats, seed):
        out = (weights == 0).astype(np.float64)
        worth = []
        for pool in pools:
            chosen = pool.first_best(pool.scores(pool.runs, validation_rows, weights))
            values = np.full(weights.shape[1], math.nan)
            for k in np.unique(chosen):
                at = np.flatnonzero(chosen == k)
                values[at] = pool.scores([pool.runs[k]], 0, out[:, at])[0]
            worth.append(values)
        gains.append(pools[0].sign * (worth[1] - worth[0]))
    found = np.concatenate(gains)
    kept = found[np.isfinite(found)]
    return kept if 2 * len(kept) >= repeats else None


def _on_test(first: Study, second: Study, metric: Metric) -> dict[str, Any]:
    scores, alphas = [], []
    for study in (first, second):
        evaluation = study.meta("evaluation") or {}
        if not evaluation.get("opened"):
            raise _NotPaired(f"{study.name} has not opened the test rows")
        with study.journal() as journal:
            prepared, frozen = places.prepared(journal), journal.get("frozen")
        sealed = SealedRows(Path(prepared["sealed"]))
        scores.append(_tested(study, frozen, evaluation, sealed))
        alphas.append(float(evaluation["alpha"]))
    rows: dict[str, Any] = {"groups": sealed.groups("test"), "ordered": prepared["manifest"]["ordered"]}
    level = 1 - min(alphas)
    found = statistics.paired_difference(scores[1], scores[0], level=level, **rows)
    return _difference(found.estimate, found.low, found.high, level, evaluation["rows"], found.method)


def _tested(study: Study, frozen: Mapping[str, Any], evaluation: Mapping[str, Any], sealed: SealedRows) -> Score:
    """The winner's score on test rows, by the predictions that were made when they were opened."""
    declaration = frozen["models"]["winner"]["declaration"]
    metric = scoring.resolve(frozen["objective"], declaration)
    names = [output["name"] for output in declaration["outputs"]]
    files = [study.folder / "frozen" / f"winner_test_{k}.npy" for k in range(len(names))]
    gone = _NotPaired(f"the predictions that {study.name} was tested by are not there any more")
    try:
        predictions = [np.load(file, allow_pickle=False) for file in files]
    except (OSError, ValueError):
        raise gone from None
    labels = scoring.in_order(sealed.labels("test"), names)
    if any(len(one) != evaluation["rows"] for one in predictions):
        raise gone
    score = scoring.score(metric, declaration, predictions, labels)
    if not math.isclose(score.value, evaluation["winner"]["score"], rel_tol=1e-9, abs_tol=1e-12):
        raise gone  # they are another winner's, from before the study was extended
    return score


def _difference(gain: float, low: float, high: float, level: float, rows: int, method: str) -> dict[str, Any]:
    shown = low > 0 or high < 0
    return {"gain": gain, "interval": [low, high], "level": level, "rows": rows, "method": method, "shown": shown}


def lines(found: Mapping[str, Any]) -> list[str]:
    """The comparison in plain words, the most important last."""
    first, second = found["studies"]
    out = [f"{title:26}{ours:34}{theirs}".rstrip() for title, ours, theirs in _rows(first, second)]
    for tier in ("guard", "test"):
        out += textwrap.wrap(_said(found[tier], tier, first, second), _WIDTH)
    return out


def _rows(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Title, and what each study has there."""

    def both(title: str, of: Any) -> tuple[str, str, str]:
        return title, of(first), of(second)

    rows = [
        both("", lambda one: one["study"]),
        both("state", lambda one: str(one["state"]).lower()),
        both("objective", lambda one: f"{one['objective']} ({one['direction']})"),
        both("sampler", lambda one: str(one["sampler"])),
        both("trials", lambda one: ", ".join(f"{n} {state}" for state, n in one["trials"].items() if n) or "none"),
        both("seconds", lambda one: f"{one['seconds']:.0f}"),
        both("rows", lambda one: str((one["data"] or {}).get("digest"))[:12]),
        both("best validation score", lambda one: _score(one["best"], "validation")),
        both("guard, corrected", lambda one: _with_interval(one["corrected"], "estimate", "interval")),
        both("test", lambda one: _with_interval(one["test"], "winner", "interval")),
    ]
    params = [(one["winner"] or one["best"] or {}).get("params", {}) for one in (first, second)]
    for key in dict.fromkeys([*params[0], *params[1]]):
        ours, theirs = (number(found[key]) if key in found else "-" for found in params)
        rows.append((f"  {key}"[:25], ours, theirs))
    return rows


def _score(role: Mapping[str, Any] | None, key: str) -> str:
    return "none" if role is None else f"{number(role[key])} (trial {role['trial']})"


def _with_interval(found: Mapping[str, Any] | None, key: str, interval: str) -> str:
    if found is None:
        return "none"
    between = found[interval]
    return number(found[key]) + ("" if between is None else f" ({number(between[0])} to {number(between[1])})")


def _said(found: Mapping[str, Any], tier: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    if "why" in found:
        return f"no paired test on {tier} rows: {found['why']}"
    low, high = found["interval"]
    better = "better" if found["gain"] >= 0 else "worse"
    amount = f"{abs(found['gain']):.4g} {better}" if found["gain"] else "no better"
    verdict = "a difference is shown" if found["shown"] else "no difference is shown"
    corrected = ", corrected for both choices" if tier == "guard" else ""
    warning = "; to choose between them by this would make test rows part of the search" if tier == "test" else ""
    return (
        f"on the same {found['rows']} {tier} rows, what {second['study']} ships is {amount} than what {first['study']} "
        f"ships ({belief.level(found['level'])} interval {low:+.4g} to {high:+.4g}, positive is better{corrected}): "
        f"{verdict}{warning}"
    )

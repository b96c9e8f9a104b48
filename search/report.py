"""The report: a study in one JSON object, and the same in plain words."""

from __future__ import annotations

from typing import Any

from search import publishing
from search.study import Study
from search.trial import Trial, TrialState, best


def report(study: Study) -> dict[str, Any]:
    """A study in one JSON object.

    Returns:
        ``study``, ``state``, ``objective``, ``direction``, ``trials`` (counts), ``baseline`` and ``best``
        (``trial``, ``params``, ``validation``), ``test`` (``winner``, ``baseline``, ``interval``, ``opening``, …;
        None while sealed, with ``sealed`` saying why), ``verdicts``, ``tracking``, ``seconds``.
    """
    with study.journal() as journal:
        trials = journal.history()
        meta = journal.get("study") or {}
        evaluation = journal.get("evaluation") or {}
        ended = journal.get("ended")
    winner = best(trials)
    count = {state: sum(t.state is state for t in trials) for state in TrialState}
    failures: dict[str, int] = {}
    for trial in trials:
        if trial.state is TrialState.FAILED and trial.reason:
            failures[trial.reason] = failures.get(trial.reason, 0) + 1
    times = [t.started for t in trials if t.started] + [t.ended for t in trials if t.ended]
    tracking = publishing.read(study.folder)
    return {
        "study": study.name,
        "state": study.state,
        "ended": ended,
        "objective": meta.get("objective"),
        "direction": meta.get("direction"),
        "sampler": meta.get("config", {}).get("sampler"),
        "trials": {
            "complete": count[TrialState.COMPLETE],
            "pruned": count[TrialState.PRUNED],
            "failed": count[TrialState.FAILED],
        },
        "failures": failures,
        "baseline": _described(trials[0] if trials and trials[0].state is TrialState.COMPLETE else None),
        "best": _described(winner),
        "test": _test(evaluation, winner, str(meta.get("direction"))),
        "sealed": None if evaluation.get("opened") else evaluation.get("why"),
        "verdicts": evaluation.get("verdicts", []),
        "data": meta.get("data"),
        "tracking": {key: tracking.get(key) for key in ("uri", "experiment_id", "run_id")},
        "seconds": max(times) - min(times) if times else 0.0,
    }


def _described(trial: Trial | None) -> dict[str, Any] | None:
    return None if trial is None else {"trial": trial.number, "params": dict(trial.params), "validation": trial.score}


def _test(evaluation: dict[str, Any], winner: Trial | None, direction: str) -> dict[str, Any] | None:
    if not evaluation.get("opened"):
        return None
    tested, baseline = evaluation["winner"], evaluation.get("baseline")
    gap = None
    if winner is not None and winner.number == tested["trial"] and winner.score is not None:
        gap = winner.score - tested["score"] if direction == "max" else tested["score"] - winner.score
    return {
        "winner": tested["score"],
        "baseline": baseline["score"] if baseline else None,
        "interval": tested["interval"],
        "baseline_interval": baseline["interval"] if baseline else None,
        "opening": evaluation["opening"],
        "trial": tested["trial"],
        "rows": evaluation["rows"],
        "level": evaluation["level"],
        "method": tested["method"],
        "gain": evaluation["difference"],
        "beats_baseline": evaluation["beats_baseline"],
        "gap": gap,
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The report in plain words, the most important last."""
    name, objective = found["study"], str(found["objective"]).removeprefix("val_")
    counts = found["trials"]
    head = f"study {name}: {counts['complete']} trials complete, {counts['pruned']} pruned, {counts['failed']} failed"
    out = [f"{head}, in {found['seconds']:.0f} s ({str(found['state']).lower()})"]
    if found["failures"]:
        out.append("failures: " + ", ".join(f"{count} {reason}" for reason, count in found["failures"].items()))
    if found["best"] is None:
        return [*out, "no trial has completed yet"]
    best_, base = found["best"], found["baseline"]
    out.append(f"best: trial {best_['trial']}, validation {objective} {number(best_['validation'])}")
    out += [f"    {key} = {number(value)}" for key, value in best_["params"].items()]
    if base is not None:
        out.append(f"baseline (the space's defaults): validation {objective} {number(base['validation'])}")
    return out + _test_lines(found, objective)


def _test_lines(found: dict[str, Any], objective: str) -> list[str]:
    test = found["test"]
    if test is None:
        return [f"test: {found['sealed'] or 'still sealed'}"]
    out = []
    between = "" if test["interval"] is None else f", {test['level']:.0%} interval {_interval(test['interval'])}"
    out.append(
        f"test {objective} of the winner: {number(test['winner'])}{between} ({test['rows']} rows, opening "
        f"{test['opening']})"
    )
    if test["baseline"] is not None:
        out.append(f"test {objective} of the baseline: {number(test['baseline'])}")
    if test["gap"] is not None:
        out.append(
            f"validation flattered the winner by {number(test['gap'])} against test"
            if test["gap"] > 0
            else f"test is no worse than validation ({number(-test['gap'])} better)"
        )
    if test["gain"] is not None:
        gain = test["gain"]
        shown = "the winner beats the baseline" if test["beats_baseline"] else "no gain over the baseline is shown"
        out.append(
            f"{shown}: better by {number(gain['gain'])} on the same rows, {test['level']:.0%} interval "
            f"{_interval(gain['interval'])}"
        )
    elif test["baseline"] is not None and test["trial"] == found["baseline"]["trial"]:
        out.append("the winner is the baseline: no configuration did better on validation")
    if "REUSED_TEST_SET" in found["verdicts"]:
        out.append(
            f"these test rows have been used {test['opening']} times: the score flatters; use fresh rows "
            "for a final word"
        )
    return out


def _interval(pair: list[float]) -> str:
    return f"{number(pair[0])} to {number(pair[1])}"


def number(value: Any) -> str:
    """A number for people: four significant digits, integers and words as they are."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)

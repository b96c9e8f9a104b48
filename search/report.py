"""The report: a study in one JSON object, and the same in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from search import publishing
from search.domain import Domain
from search.errors import StudyError
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
        "seconds": _busy(trials),
    }


def _busy(trials: Sequence[Trial]) -> float:
    """Seconds in which at least one trial ran; a pause before a resume does not count."""
    total, until = 0.0, 0.0
    for begin, end in sorted((t.started, t.ended) for t in trials if t.started is not None and t.ended is not None):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


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
    if base is None:
        out.append("the baseline (trial 0, the space's defaults) has not completed, so there is none to compare with")
    else:
        out.append(f"baseline (the space's defaults): validation {objective} {number(base['validation'])}")
    return out + _test_lines(found, objective)


def _test_lines(found: dict[str, Any], objective: str) -> list[str]:
    test = found["test"]
    if test is None:
        name = found["study"]
        return [f"test: {found['sealed'] or f'the rows are still sealed; `heldout evaluate {name}` opens them'}"]
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


def check_lines(found: dict[str, Any]) -> list[str]:
    """What `heldout check` found, in plain words."""
    data = found["data"]
    tiers = ", ".join(f"{name} {count}" for name, count in data["tiers"].items())
    return [
        f"{found['name']}: {found['objective']} ({found['direction']}), {found['size']} weights in the default model",
        f"rows: {data['rows']} ({tiers}); labels of guard and test are sealed",
        *(f"note: {warning}" for warning in data["warnings"]),
        "parameters:" if found["complete"] else "parameters found within the time limit (more may follow):",
        *(f"    {key}: {_domain(domain)}" for key, domain in found["space"].items()),
        f"the model reports: {', '.join(found['reported'])}",
        f"plan: {found['trials']} trials of up to {found['epochs']} epochs on {found['slots']} slots, "
        f"{number(found['epoch_seconds'])} s an epoch: about {found['estimate_seconds'] / 60:.1f} minutes",
    ]


def _domain(raw: dict[str, Any]) -> str:
    known = Domain.from_json({key: value for key, value in raw.items() if key != "conditions"})
    return f"{known}, default {known.default}"


def status(study: Study) -> dict[str, Any]:
    """The report, with ``planned`` trials and the numbers of those ``running``."""
    planned = study.meta("study", {"config": {"trials": None}})["config"]["trials"]
    running = [trial.number for trial in study.trials if not trial.state.is_finished]
    return report(study) | {"planned": planned, "running": running}


def status_line(found: dict[str, Any]) -> str:
    """How far a study is, in one line."""
    best_, failed, done = found["best"], found["trials"]["failed"], sum(found["trials"].values())
    parts = [f"{found['study']}: {found['state'].lower()}, {done} of {found['planned']} trials"]
    parts += [f", {failed} failed"] if failed else []
    if found["running"] and found["state"] == "RUNNING":
        parts.append(f", running {', '.join(map(str, found['running']))}")
    shown = "none yet" if best_ is None else f"{number(best_['validation'])} (trial {best_['trial']})"
    return "".join(parts) + f"; best {found['objective']} {shown}"


def show(study: Study, number: int) -> dict[str, Any]:
    """One trial with its ``reports`` (epoch by epoch) and its ``log`` (what it printed, tracebacks included).

    Raises:
        StudyError: If the study has no such trial.
    """
    trial = {t.number: t for t in study.trials}.get(number)
    if trial is None:
        raise StudyError(f"study {study.name!r} has no trial {number}; it has {len(study.trials)}, from 0")
    with study.journal() as journal:
        reports = journal.reports(trial=number)
    log = study.folder / "trials" / f"{number:04d}" / "log.txt"
    return trial.to_json() | {
        "reports": [{"attempt": r.attempt, "step": r.step, "metrics": dict(r.metrics)} for r in reports],
        "log": log.read_text(errors="replace") if log.exists() else "",
    }


def trial_lines(found: dict[str, Any]) -> list[str]:
    """One trial in plain words: what it was, its epochs, and its output."""
    score = "" if found["score"] is None else f", validation score {found['score']:.6g}"
    out = [f"trial {found['number']}: {found['state']}{score}, seed {found['seed']}, attempt {found['attempt']}"]
    if found["reason"]:
        out.append(f"{found['reason']}: {found['message']}")
    out += [f"    {key} = {value}" for key, value in found["params"].items()]
    for one in found["reports"]:
        if one["attempt"] == found["attempt"]:
            metrics = ", ".join(f"{name} {value:.4g}" for name, value in one["metrics"].items())
            out.append(f"epoch {one['step']}: {metrics}")
    return [*out, "it printed:", found["log"].rstrip()] if found["log"].strip() else out


def _interval(pair: list[float]) -> str:
    return f"{number(pair[0])} to {number(pair[1])}"


def number(value: Any) -> str:
    """A number for people: four significant digits, integers and words as they are."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)

"""The report: a study in one JSON object, and the same in plain words."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any

from search.checks import findings
from search.definition.domain import Domain
from search.ensembles import ensemble_words
from search.errors import StudyError
from search.guard import belief, verdicts
from search.guard.ledger import times
from search.loop import ends, keeping
from search.loop.enqueueing import begun
from search.loop.enqueueing import source as enqueued_from
from search.record import places
from search.record.journal import Journal
from search.scorer import metrics, scoring
from search.scorer.scoring import disagreement_line
from search.study import Study, StudyConfig, config_of, state_of
from search.tiers.validation import described, named, parse
from search.tracker import publishing
from search.trial import Trial, TrialState, best, searched

PICTURE = "guard.png"
_WIDTH = 110


def report(study: Study) -> dict[str, Any]:
    """A study in one JSON object; its keys are listed in README, "The report"."""
    with study.journal() as journal:
        return _report(study, journal)


def _report(study: Study, journal: Journal) -> dict[str, Any]:
    trials = journal.history()
    meta = journal.get("study") or {}
    selection = journal.get("selection") or {}
    evaluation = journal.get("evaluation") or {}
    preflight, summary = journal.get("preflight"), journal.get("summary") or {}
    ensemble = ensemble_words.latest(journal.get("ensembles"), selection)
    ended, plan = journal.get("ended"), config_of(journal) if meta else None
    judged = (journal.get("prepared") or {}).get("validation")
    count = {state: sum(t.state is state for t in searched(trials)) for state in TrialState}
    failures = Counter(trial.reason for trial in trials if trial.state is TrialState.FAILED)
    retries: Counter[str] = sum((Counter(trial.retries) for trial in trials), Counter())
    tracking = publishing.read(study.folder)
    picture = study.folder / PICTURE
    found = {
        "study": study.name,
        "state": state_of(journal),
        "ended": ended,
        "because": _because(plan, ended, len(searched(begun(trials)))),
        "objective": meta.get("objective"),
        "direction": meta.get("direction"),
        "proportion": _is_proportion(str(meta.get("objective")), preflight),
        "sampler": meta.get("config", {}).get("sampler"),
        "warm_start": meta.get("warm_start") or [],
        "validation": _judged(judged, selection.get("winner"), best(trials)),
        "trials": {
            "complete": count[TrialState.COMPLETE],
            "pruned": count[TrialState.PRUNED],
            "failed": count[TrialState.FAILED],
        },
        "failures": dict(failures),
        "retries": dict(retries),
        "best": _described(best(trials)),
        "winner": _chosen(trials, selection.get("winner")),
        "baseline": _chosen(trials, selection.get("baseline"))
        or _described(next((t for t in trials if t.number == 0 and t.state is TrialState.COMPLETE), None)),
        "corrected": selection.get("corrected"),
        "noise_floor": selection.get("noise_floor"),
        "gains": selection.get("gains"),
        "confirmation": selection.get("confirmation"),
        "test": _test(evaluation),
        "sealed": None if evaluation.get("opened") else evaluation.get("why"),
        "verdicts": evaluation.get("verdicts", []),
        "final": evaluation.get("final"),
        "ensemble": ensemble,
        "picture": str(picture) if picture.exists() else None,
        "architecture": _drawing(study, summary.get("architecture")),
        "data": meta.get("data"),
        "tracking": {key: tracking.get(key) for key in ("uri", "experiment_id", "run_id")},
        "seconds": ends.busy(trials),
    }
    return found | {"believe": belief.paragraph(found)}


def _drawing(study: Study, drawn: dict[str, Any] | None) -> str | None:
    path = None if drawn is None else study.folder / drawn["file"]
    return str(path) if path is not None and path.exists() else None


def _because(plan: StudyConfig | None, ended: str | None, trials: int) -> str | None:
    """Why the search has ended before all its trials, in words."""
    return None if plan is None else plan.ends.because(ended, trials)


def _is_proportion(objective: str, preflight: dict[str, Any] | None) -> bool:
    return preflight is not None and scoring.resolve(objective, preflight["declaration"]).kind in metrics.PROPORTIONS


def _judged(
    found: dict[str, Any] | None, winner: dict[str, Any] | None, leader: Trial | None
) -> dict[str, Any] | None:
    """The plan by which configurations are judged, and what that alone says of the winner, or of the best so far.

    Never corrected: an adaptive search has searched these rows, however often they were divided anew.
    """
    if found is None:
        return None
    kept = {key: found[key] for key in ("plan", "rows", "weight", "train", "validation", "ordered")}
    score = winner["validation"] if winner else leader.score if leader else None
    interval = winner["validation_interval"] if winner else None
    return kept | {"estimate": score, "interval": interval, "label": "optimistic", "said": described(found)}


def _described(trial: Trial | None) -> dict[str, Any] | None:
    return None if trial is None else {"trial": trial.number, "params": dict(trial.params), "validation": trial.score}


def _chosen(trials: Sequence[Trial], found: dict[str, Any] | None) -> dict[str, Any] | None:
    params = {trial.number: dict(trial.params) for trial in trials}
    return None if found is None else found | {"params": params.get(found["trial"], {})}


def _test(evaluation: dict[str, Any]) -> dict[str, Any] | None:
    if not evaluation.get("opened"):
        return None
    tested, baseline = evaluation["winner"], evaluation["baseline"]
    return {
        "winner": tested["score"],
        "baseline": baseline["score"] if baseline else None,
        "interval": tested["interval"],
        "baseline_interval": baseline["interval"] if baseline else None,
        "opening": evaluation["opening"],
        "alpha": evaluation["alpha"],
        "level": evaluation["level"],
        "trial": tested["trial"],
        "rows": evaluation["rows"],
        "method": tested["method"],
        "gain": evaluation["difference"],
        "beats_baseline": evaluation["beats_baseline"],
        "gap": evaluation["gap"],
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The report in plain words, the most important last."""
    name, objective = found["study"], str(found["objective"]).removeprefix("val_")
    counts = found["trials"]
    head = f"study {name}: {counts['complete']} trials complete, {counts['pruned']} pruned, {counts['failed']} failed"
    out = [f"{head}, in {found['seconds']:.0f} s ({str(found['state']).lower()})"]
    out += [found["because"]] if found["because"] else []
    if found["failures"]:
        out.append("failures: " + _counted(found["failures"]))
    if found["retries"]:
        out.append("attempts that failed and were followed by another: " + _counted(found["retries"]))
    out += [_warm_start(one) for one in found["warm_start"]]
    out += [f"validation by {found['validation']['said']}"] if found.get("validation") else []
    if found["best"] is None:
        return [*out, "no trial has completed yet"]
    shipped = found["winner"] or found["best"]
    out.append(f"best validation {objective}: {number(found['best']['validation'])} (trial {found['best']['trial']})")
    out += _confirmed(found, objective)
    own = shipped.get("configuration", shipped["trial"])
    again = "" if own == shipped["trial"] else f", trained again as trial {shipped['trial']}"
    out.append(f"{'winner' if found['winner'] else 'best'}: the configuration of trial {own}{again}")
    out += [f"    {key} = {number(value)}" for key, value in shipped["params"].items()]
    base = found["baseline"]
    if base is None:
        out.append("the baseline (trial 0, the space's defaults) has not completed, so there is none to compare with")
    elif base["trial"]:
        out.append(f"baseline: the configuration of trial 0 (the space's defaults), again as trial {base['trial']}")
    out += _table(found, objective)
    out += ensemble_words.brief(found["ensemble"], name) if found["ensemble"] else []
    if found["picture"]:
        out.append(f"picture: {found['picture']}")
    if found["architecture"]:
        out.append(f"the winner's layers: {found['architecture']}")
    out += [f"verdict: {name} ({verdicts.MEANING[name]})" for name in found["verdicts"]]
    return [*out, *textwrap.wrap(found["believe"], _WIDTH)]


def _warm_start(one: dict[str, Any]) -> str:
    head = f"warm start from study {one['study']} ({one['trials']} configurations)"
    if not one["other_data"]:
        return f"{head}: the same rows and split"
    return f"{head}: other rows or another split, so the search carries knowledge of rows that may be test rows here"


def _counted(kinds: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in kinds.items())


def _confirmed(found: dict[str, Any], objective: str) -> list[str]:
    confirmation = found["confirmation"]
    if confirmation is None:
        return []
    runs = sum(len(one["trials"]) for one in confirmation["finalists"])
    out = [
        f"confirmed by {runs} trainings with fresh seeds ({confirmation['share']:.0%} of all training time); mean "
        f"{objective} on validation and guard rows, and how often each would win:"
    ]
    better = -1 if found["direction"] == "max" else 1
    finalists = sorted(
        confirmation["finalists"], key=lambda one: (-(one["wins"] or 0), better * (one["score"] or -better * math.inf))
    )
    for one in finalists:
        wins = "" if one["wins"] is None else f", wins {one['wins']:.0%}"
        failed = f", {one['failed']} failed" if one["failed"] else ""
        score = "no score" if one["score"] is None else number(one["score"])
        name = " (baseline)" if one["configuration"] == 0 else ""
        out.append(f"    trial {one['configuration']}{name}: {score}{wins}{failed}")
    rest = 1 - sum(one["wins"] or 0 for one in finalists)
    if finalists[0]["wins"] is not None and rest >= 0.005:
        out.append(f"    models of other trials, trained once: win {rest:.0%}")
    return out


def _table(found: dict[str, Any], objective: str) -> list[str]:
    """Scores of winner and baseline on the rows that they were not trained on."""
    winner, baseline, corrected, test = found["winner"], found["baseline"], found["corrected"], found["test"]
    if winner is None:
        return []
    tiers = (found["data"] or {}).get("tiers") or {}
    level = "" if test is None or test["level"] is None else f" ({belief.level(test['level'])} interval)"
    plan = found.get("validation")
    rows: list[tuple[str, Any, Any, Any, Any]] = [
        (
            f"validation, {tiers.get('validation')} rows" if plan is None else f"{named(plan)} (optimistic)",
            winner["validation"],
            None,
            (baseline or {}).get("validation"),
            None,
        ),
        (f"guard, {tiers.get('guard')} rows", winner["guard"], None, (baseline or {}).get("guard"), None),
    ]
    if corrected is not None and corrected["interval"] is not None:
        title = f"guard, corrected ({belief.level(corrected['level'])} interval)"
        rows.append((title, corrected["estimate"], corrected["interval"], None, None))
    if test is not None:
        title = f"test, {test['rows']} rows{level}"
        rows.append((title, test["winner"], test["interval"], test["baseline"], test["baseline_interval"]))
    out = [f"{objective:38}{'winner':30}baseline"]
    for title, ours, between, theirs, their_between in rows:
        shown = [_with_interval(ours, between), "" if theirs is None else _with_interval(theirs, their_between)]
        out.append(f"{title:38}{shown[0]:30}{shown[1]}".rstrip())
    if test is None:
        name = found["study"]
        out.append(f"test: {found['sealed'] or f'the rows are still sealed; `heldout evaluate {name}` opens them'}")
    elif test["gain"] is not None:
        gain = test["gain"]
        out.append(
            f"gain over the baseline on test rows: {number(gain['gain'])}, {belief.level(test['level'])} interval "
            f"{_interval(gain['interval'])} (opening {test['opening']} of these rows)"
        )
    return out


def _with_interval(value: Any, between: list[float] | None) -> str:
    return ("unknown" if value is None else number(value)) + ("" if between is None else f" ({_interval(between)})")


def check_lines(found: dict[str, Any]) -> list[str]:
    """What `heldout check` found, in plain words."""
    data = found["data"]
    tiers = ", ".join(f"{name} {count}" for name, count in data["tiers"].items())
    return [
        f"{found['name']}: {found['objective']} ({found['direction']}), {found['size']} weights in the default model",
        f"rows: {data['rows']} ({tiers}); labels of guard and test are sealed",
        *([] if found.get("validation") is None else [f"validation by {described(found['validation'])}"]),
        *(f"note: {warning}" for warning in data["warnings"]),
        "parameters:" if found["complete"] else "parameters found within the time limit (more may follow):",
        *(f"    {key}: {_domain(domain)}" for key, domain in found["space"].items()),
        *(f"note: {note}" for note in found["notes"]),
        f"the model reports: {', '.join(found['reported'])}",
        *([] if (line := disagreement_line(found)) is None else [f"note: {line}"]),
        *_opened(found["openings"]),
        *([] if found["shows"] is None else [verdicts.planned_line(verdicts.Planned(**found["shows"]))]),
        f"plan: {found['trials']} trials{_again(found['confirmation'])} of {_trainings(found)}up to "
        f"{found['epochs']} epochs on {found['slots']} slots, {number(found['epoch_seconds'])} s an epoch: about "
        f"{found['estimate_seconds'] / 60:.1f} minutes",
        *([] if found["sanity"] is None else findings.lines(found["sanity"]["findings"])),
    ]


def _opened(openings: int) -> list[str]:
    if not openings:
        return []
    told = f"these test rows have been opened {times(openings)} before"
    return [f"note: {told}: a launch leaves them sealed (--evaluate auto)"]


def _trainings(found: dict[str, Any]) -> str:
    count = 1 if found.get("validation") is None else parse(found["validation"]["plan"]).trainings
    return "" if count == 1 else f"{count} trainings of "


def _again(confirmation: dict[str, int]) -> str:
    if not confirmation["runs"]:
        return ""
    best_ = "the best one" if confirmation["finalists"] == 1 else f"the best {confirmation['finalists']}"
    return f", then {confirmation['runs']} trainings to confirm {best_} and the baseline,"


def _domain(raw: dict[str, Any]) -> str:
    known = Domain.from_json({key: value for key, value in raw.items() if key != "conditions"})
    return f"{known}, default {known.default}"


def status(study: Study) -> dict[str, Any]:
    """The report, with ``planned`` trials, the numbers of those ``running``, how many have ``confirmed``, and how many
    models are ``kept`` and ``deleted``."""
    with study.journal() as journal:  # once: it takes ten seconds to read a hundred thousand trials
        planned = (journal.get("plan") or (journal.get("study") or {}).get("config") or {}).get("trials")
        trials, found = journal.history(), _report(study, journal)
        kept = len(keeping.kept(trials, keeping.limit(journal)))
    deleted = len(keeping.kept(trials, None)) - kept
    running = [trial.number for trial in trials if not (trial.state.is_finished or trial.is_queued)]
    confirmed = sum(trial.confirms is not None and trial.state.is_finished for trial in trials)
    more = {"planned": planned, "running": running, "confirmed": confirmed, "kept": kept, "deleted": deleted}
    return found | more


def status_line(found: dict[str, Any]) -> str:
    """How far a study is, in one line."""
    if found["planned"] is None:
        return f"{found['study']}: {found['state'].lower()}, nothing recorded yet"
    best_, failed, done = found["best"], found["trials"]["failed"], sum(found["trials"].values())
    parts = [f"{found['study']}: {found['state'].lower()}, {done} of {found['planned']} trials"]
    parts += [f", {found['trials']['pruned']} pruned"] if found["trials"]["pruned"] else []
    parts += [f", {failed} failed"] if failed else []
    parts += [f", sampler {found['sampler']}"]
    parts += [f", validation {found['validation']['plan']}"] if found.get("validation") else []
    parts += [f", warm start from {one['study']}{' (other data)' * one['other_data']}" for one in found["warm_start"]]
    parts += [f", {found['confirmed']} confirming trainings"] if found["confirmed"] else []
    parts += [f", {found['kept']} models kept"] if found["deleted"] else []
    if found["running"] and found["state"] == "RUNNING":
        plural = "" if len(found["running"]) == 1 else "s"
        parts.append(f", now at trial{plural} {', '.join(map(str, found['running']))}")
    parts += [f", {found['because']}"] if found["because"] else []
    shown = "none yet" if best_ is None else f"{number(best_['validation'])} (trial {best_['trial']})"
    return "".join(parts) + f"; best {found['objective']} {shown}"


def show(study: Study, number: int) -> dict[str, Any]:
    """One trial with its ``reports`` (by epoch, fold or repeat, as ``step`` says), whether its model is ``kept``, and
    its ``log`` (what it printed, tracebacks included).

    Raises:
        StudyError: If the study has no such trial.
    """
    trial = {t.number: t for t in study.trials}.get(number)
    if trial is None:
        raise StudyError(f"study {study.name!r} has no trial {number}; it has {len(study.trials)}, from 0")
    with study.journal() as journal:
        reports, is_planned = journal.reports(trial=number), journal.get("study") is not None
        step = parse(config_of(journal).validation).step if is_planned else "epoch"
    log = places.trial(study.folder, number) / places.LOG
    return trial.to_json() | {
        "reports": [{"attempt": r.attempt, "step": r.step, "metrics": dict(r.metrics)} for r in reports],
        "step": step,
        "enqueued": enqueued_from(trial),
        "kept": trial.state is TrialState.COMPLETE and places.weights(study.folder, number).exists(),
        "log": log.read_text(errors="replace") if log.exists() else "",
    }


def trial_lines(found: dict[str, Any]) -> list[str]:
    """One trial in plain words: what it was, its epochs, and its output."""
    score = "" if found["score"] is None else f", validation score {found['score']:.6g}"
    out = [f"trial {found['number']}: {found['state']}{score}, seed {found['seed']}, attempt {found['attempt']}"]
    if found["confirms"] is not None:
        out.append(f"trains the configuration of trial {found['confirms']} again, with a seed of its own")
    if found["enqueued"]:
        out.append(f"enqueued: {found['enqueued']}")
    if found["reason"]:
        out.append(f"{found['reason']}: {found['message']}")
    if found["state"] == TrialState.PRUNED:
        count, step = found["epochs"], found["step"]
        what = "best" if step == "epoch" else "mean"
        steps = step if count == 1 and step != "epoch" else f"{step}s"
        out.append(f"stopped early by the pruner, after {count} {steps}; the score is Keras' {what} until then")
    if found["state"] == TrialState.COMPLETE and found["kept"] is not None:
        out.append("its model is kept" if found["kept"] else "its model was not kept: others scored better (--keep)")
    if found["size"] is not None:
        flops = found["extra"].get("flops")
        out.append(f"{found['size']} weights" + ("" if flops is None else f", {flops} floating-point operations a row"))
    out += [f"    {key} = {value}" for key, value in found["params"].items()]
    for one in found["reports"]:
        if one["attempt"] == found["attempt"]:
            metrics = ", ".join(f"{name} {value:.4g}" for name, value in one["metrics"].items())
            out.append(f"{found['step']} {one['step']}: {metrics}")
    if found["log"] is None:
        return [*out, "what it printed, and whether its model is kept, is known where it ran"]
    return [*out, "it printed:", found["log"].rstrip()] if found["log"].strip() else out


def _interval(pair: list[float]) -> str:
    return f"{number(pair[0])} to {number(pair[1])}"


def number(value: Any) -> str:
    """A number for people: four significant digits, integers and words as they are."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)

"""The reproduction: one trial is trained again from its record, and what comes out is compared with it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from search.definition.problem import Problem
from search.errors import DataError, RequestError, StudyError, TrialFailed
from search.executors import Executor, Job, Slot
from search.harness import loading
from search.loop.attempt import Verdict
from search.loop.pruners import Curve, Folds, Pruning, get_pruner
from search.loop.watcher import Silent, Watcher
from search.processes import devices, jobs
from search.record.journal import Journal
from search.scorer.judge import RowJudge
from search.shown.report import number
from search.study import Study, StudyConfig
from search.trial import Report, Trial, TrialState

# Reasons that tell of the machine at that moment, and little of the training.
_OF_THE_MACHINE = frozenset({"oom", "timeout", "lost"})

Found = dict[str, Any]


@dataclasses.dataclass
class _Record:
    """What the journal says of one trial."""

    trial: Trial
    reports: dict[int, Mapping[str, float]]
    proposal: dict[str, Any] | None
    config: StudyConfig
    prepared: dict[str, Any]
    baseline: Mapping[str, Any] | None
    noise_floor: float | None
    versions: Mapping[str, str]


def reproduce(study: Study, trial: int, *, watcher: Watcher | None = None) -> Found:
    """Train one ended trial again and compare; the study, which may be running, is only read.

    The training has the trial's module text, parameters, seed and epochs, in a slot like the one that it ran in as
    far as this machine has it, and a scratch folder. Validation rows are scored by the judge of the study; nothing of
    guard or test rows is told, and journal, ledger and MLflow are left as they are.

    Returns:
        ``study``, ``trial``; ``outcome`` (``exact``, ``same_score``, ``within_noise``, ``differs``; ``failed_again``,
        ``failed_otherwise``, ``failed_now``, ``succeeded_now``), ``reproduced`` (whether that counts as the same
        result) and ``said``, the same in words; ``then`` and ``now``, each with ``state``, ``score``, ``epochs``,
        ``best_epoch``, ``reason`` and ``message``; ``difference`` of the scores; ``reports``, the largest
        ``difference`` of a reported metric, with its ``metric``, ``epoch``, and how many ``epochs`` both have;
        ``weights``, whether they are equal to the bit, None if they are not both there; ``noise_floor``;
        ``versions`` that differ, by name; ``why``, what may explain a difference.

    Raises:
        StudyError: If the study has no such trial, or it has not ended.
        DataError: If the study's rows are gone.
    """
    watcher = watcher or Silent()
    with study.journal() as journal:
        record = _record(study, journal, trial)
    with tempfile.TemporaryDirectory(prefix="heldout-reproduce-") as scratch:
        folder, slot = Path(scratch), _slot(record)
        problem = Problem(**record.prepared["problem"])
        with jobs.start_executor((slot,), problem, folder, record.config.start_method, record.config.env) as executor:
            watcher.say(f"training trial {trial} of {study.name} again")
            now, reports, result = _trained(executor, watcher, record, folder)
        then = _told(record.trial)
        equal = _same_weights(record.trial.extra.get("weights"), result.get("weights"))
    found = {
        "study": study.name,
        "trial": trial,
        "then": then,
        "now": now,
        "difference": None if None in (then["score"], now["score"]) else now["score"] - then["score"],
        "reports": _compared(record.reports, reports),
        "weights": equal,
        "noise_floor": record.noise_floor,
        "versions": _changed(record.versions, loading.versions()),
    }
    outcome, said = _outcome(found, len(record.reports) == len(reports))
    kept = ("exact", "same_score", "within_noise", "failed_again")
    why = [] if outcome in ("exact", "failed_again") else _why(found, record, result)
    return found | {"outcome": outcome, "reproduced": outcome in kept, "said": said, "why": why}


def _record(study: Study, journal: Journal, wanted: int) -> _Record:
    trials, meta = {trial.number: trial for trial in journal.history()}, journal.get("study")
    if wanted not in trials:
        raise StudyError(f"study {study.name!r} has no trial {wanted}; it has {len(trials)}, from 0")
    trial = trials[wanted]
    if not trial.state.is_finished:
        raise StudyError(f"only a trial that has ended can be reproduced, but trial {wanted} is {trial.state}")
    begun = [
        event.body["params"]
        for event in journal.events()
        if event.kind == "trial" and event.trial == wanted and event.body["state"] == TrialState.RUNNING.value
    ]
    # One that failed may not have come to ask for all that was proposed.
    params = {**begun[-1], **trial.params}
    return _Record(
        trial,
        {one.step: one.metrics for one in journal.reports(trial=wanted) if one.attempt == trial.attempt},
        journal.space().proposal(params) if wanted else None,
        StudyConfig(**meta["config"]),
        jobs.prepared_for(journal, trial),
        (journal.get("preflight") or {}).get("declaration"),
        (journal.get("selection") or {}).get("noise_floor"),
        meta["versions"],
    )


def _slot(record: _Record) -> Slot:
    """The trial's slot, as this machine divides into slots when it is asked as it was then."""
    config = record.config
    try:
        slots = devices.slots(config.workers, config.gpus, config.trials_per_gpu, config.gpus_per_trial)
    except RequestError:  # GPUs that are not here
        slots = jobs.one_slot()
    return dataclasses.replace(slots[(record.trial.slot or 0) % len(slots)], index=0)


def _trained(
    executor: Executor, watcher: Watcher, record: _Record, folder: Path
) -> tuple[Found, dict[int, Mapping[str, float]], dict[str, Any]]:
    """The trial's job and its score: how it ended, what it reported by epoch, and its result."""
    trial, prepared = record.trial, record.prepared
    payload = jobs.base_payload(prepared, folder) | {
        "epochs": record.config.epochs,
        "seed": trial.seed,
        "proposal": record.proposal,
        "default": trial.number == 0,
        "deterministic": record.config.deterministic,
        **jobs.split_of(prepared, trial.seed),
    }
    asked = prepared["objective"], prepared["direction"], trial.epochs
    curve = Folds if "folds" in payload else Curve
    pruning = Pruning(get_pruner("asha"), *asked, lambda: trial.epochs + 1, curve)
    if trial.state is TrialState.PRUNED:  # and so it is stopped at the same epoch again
        payload["rungs"] = pruning.rungs(trial)
    reports: dict[int, Mapping[str, float]] = {}
    failed: dict[str, Any] = {}

    def heard(body: dict[str, Any]) -> None:
        if body["type"] == "report":
            reports[body["step"]] = body["metrics"]
            pruning.heard(trial, Report(trial.number, trial.attempt, body["step"], 0.0, body["metrics"]))
        if body.get("waits"):
            executor.send(job.id, {"stop": True})
        elif body["type"] == "failed":
            failed.update(body)

    def ended(state: TrialState, **known: Any) -> Found:
        names = ("score", "epochs", "best_epoch", "reason", "message")
        return {"state": state.value} | dict.fromkeys(names) | {"epochs": len(reports)} | known

    job = Job(f"reproduce-{trial.number}", "trial", payload, log=str(folder / "log.txt"))
    patience = jobs.supervisor(record.config, executor)
    try:
        result = jobs.call(executor, job, watcher, executor.slots[0], hear=heard, supervisor=patience)
    except TrialFailed as failure:  # it hangs, or takes longer than the study allows
        return ended(TrialState.FAILED, reason=failure.reason, message=failure.message), reports, {}
    except DataError:  # rows that are gone, of which the training says nothing
        raise
    except RequestError as error:
        reason, message = failed.get("reason", "crash"), failed.get("message", str(error))
        return ended(TrialState.FAILED, reason=reason, message=message), reports, {}
    if result.get("stopped"):
        loss = pruning.loss(trial, trial.epochs)
        score = loss if loss is None or prepared["direction"] == "min" else -loss
        return ended(TrialState.PRUNED, score=score), reports, {}
    try:
        score = _score(executor, watcher, record, result)
    except TrialFailed as failure:
        return ended(TrialState.FAILED, reason=failure.reason, message=failure.message), reports, result
    except Exception as error:  # as the driver has it: the model may lack the metric, or have another shape
        why = f"it could not be scored: {' '.join(str(error).split())[:300]}"
        return ended(TrialState.FAILED, reason="invalid", message=why), reports, result
    known = {key: result[key] for key in ("epochs", "best_epoch")}
    return ended(TrialState.COMPLETE, score=score, **known), reports, result


def _score(executor: Executor, watcher: Watcher, record: _Record, result: dict[str, Any]) -> float:
    """On validation rows; what the judge says of guard rows ends here."""
    prepared = record.prepared
    rows = Path(prepared["rows"]), Path(prepared["sealed"])
    asked = prepared["objective"], prepared["problem"]
    judge = RowJudge(*rows, *asked, baseline=lambda: record.baseline, validation=prepared["validation"])
    verdict = judge.judge({**result, "seed": record.trial.seed})
    if not isinstance(verdict, Verdict):
        job = Job("reproduce-score", "score", verdict)
        verdict = judge.settle(jobs.call(executor, job, watcher, executor.slots[0]))
    return verdict.score


def _told(trial: Trial) -> Found:
    names = ("score", "epochs", "best_epoch", "reason", "message")
    return {"state": trial.state.value} | {name: getattr(trial, name) for name in names}


def _compared(then: Mapping[int, Mapping[str, float]], now: Mapping[int, Mapping[str, float]]) -> Found:
    """The largest difference of a metric that both reported of an epoch; its names are None if there is none."""
    both = sorted(then.keys() & now.keys())
    found: Found = {"difference": 0.0 if both else None, "metric": None, "epoch": None, "epochs": len(both)}
    for step in both:
        for name in then[step].keys() & now[step].keys():
            one, other = then[step][name], now[step][name]
            # NaN and infinities are what some trials report, and equal to themselves here.
            alike = one == other or (math.isnan(one) and math.isnan(other))
            apart = 0.0 if alike else abs(one - other)
            apart = math.inf if math.isnan(apart) else apart
            if apart > found["difference"]:
                found |= {"difference": apart, "metric": name, "epoch": step}
    return found


def _same_weights(then: str | None, now: str | None) -> bool | None:
    """Whether two files of weights hold the same bits; None if one of them is not there (any more)."""
    if then is None or now is None:
        return None
    import h5py

    def arrays(file: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        file.visititems(lambda name, part: found.update({name: part}) if isinstance(part, h5py.Dataset) else None)
        return found

    with contextlib.suppress(OSError), h5py.File(then, "r") as one, h5py.File(now, "r") as other:
        old, new = arrays(one), arrays(other)
        return old.keys() == new.keys() and all(
            old[name].dtype == new[name].dtype and old[name][()].tobytes() == new[name][()].tobytes() for name in old
        )
    return None


def _changed(then: Mapping[str, str], now: Mapping[str, str]) -> Found:
    return {
        name: {"then": then.get(name), "now": now.get(name)}
        for name in sorted({**then, **now})
        if then.get(name) != now.get(name)
    }


def _outcome(found: Found, same_count: bool) -> tuple[str, str]:
    then, now, floor = found["then"], found["now"], found["noise_floor"]
    if TrialState.FAILED.value in (then["state"], now["state"]):
        return _of_failures(then, now)
    same_epochs = same_count and all(then[key] == now[key] for key in ("epochs", "best_epoch"))
    # Of two that were stopped early at a value that is no number, neither has a score.
    apart = abs(found["difference"]) if found["difference"] is not None else 0.0 if then == now else math.inf
    if apart == 0:
        if same_epochs and found["reports"]["difference"] in (None, 0.0) and found["weights"] is not False:
            return "exact", "reproduced exactly"
        return "same_score", "the score is the same, though the training is not the same to the bit"
    if floor is not None and apart <= floor:
        return "within_noise", f"differs by {number(apart)}, within the noise floor of {number(floor)}"
    beyond = "" if floor is None else f", beyond the noise floor of {number(floor)}"
    return "differs", f"differs by {number(apart)}{beyond}"


def _of_failures(then: Found, now: Found) -> tuple[str, str]:
    if then["state"] != TrialState.FAILED.value:
        return "failed_now", f"it completed then and fails now: {now['reason']}: {now['message']}"
    if now["state"] != TrialState.FAILED.value:
        return "succeeded_now", f"it failed then ({then['reason']}) and completes now"
    if then["reason"] == now["reason"]:
        return "failed_again", f"fails again with the same reason: {now['reason']}: {now['message']}"
    return "failed_otherwise", f"fails again, but with {now['reason']} where it was {then['reason']}: {now['message']}"


def _why(found: Found, record: _Record, result: Mapping[str, Any]) -> list[str]:
    """What is known that can set two trainings from one record apart."""
    out = []
    if found["versions"]:
        changes = (f"{name} {one['then']} then, {one['now']} now" for name, one in found["versions"].items())
        out.append(f"other versions: {'; '.join(changes)}")
    then, now = _gpus(record.trial.extra), _gpus(result)
    if (then or now) and not record.config.deterministic:
        out.append("a GPU without --deterministic, where some operations add up in another order every time")
    if result and then != now:
        out.append(f"other devices: {', '.join(then) or 'CPUs'} then, {', '.join(now) or 'CPUs'} now")
    if found["then"]["reason"] in _OF_THE_MACHINE:
        out.append(f"a failure by {found['then']['reason']}, which tells more of the machine then than of the training")
    if not out:
        out.append(
            "something that is not recorded: files that the module reads or imports, random numbers that it takes "
            "from elsewhere, another kind of CPU or number of threads"
        )
    return out


def _gpus(known: Mapping[str, Any]) -> list[str]:
    return [device["name"] for device in known.get("devices") or () if device["kind"] == "GPU"]


def lines(found: Found) -> list[str]:
    """The comparison in plain words, the most important last."""
    then, now, reports = found["then"], found["now"], found["reports"]
    title = f"trial {found['trial']} of study {found['study']}"
    out = [f"{title:38}{'then':30}now"]
    for name in ("state", "score", "epochs", "best_epoch", "reason"):
        if (then[name], now[name]) != (None, None):
            shown = ["" if one[name] is None else _exactly(one[name]) for one in (then, now)]
            out.append(f"{name.replace('_', ' '):38}{shown[0]:30}{shown[1]}".rstrip())
    out += [f"{name:38}{one['then']!s:30}{one['now']}" for name, one in found["versions"].items()]
    if reports["epochs"]:
        where = "" if reports["metric"] is None else f" ({reports['metric']} of epoch {reports['epoch']})"
        out.append(
            f"largest difference of a reported metric over {reports['epochs']} epochs: "
            f"{number(reports['difference'])}{where}"
        )
    told = {True: "equal to the bit", False: "not equal to the bit", None: "not compared, as both are not there"}
    out.append(f"weights: {told[found['weights']]}")
    out += [f"it may be {line}" for line in found["why"]]
    return [*out, found["said"]]


def _exactly(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, float) else str(value)

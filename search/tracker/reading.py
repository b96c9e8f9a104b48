"""A study's trials as MLflow has them, put back into what ``runs`` made the runs of: trials and their reports.

Each attempt has a run of its own, and a trial is as its last attempt is. What was written by others is only read: a
value that cannot be meant raises.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run, ViewType

from search.tracker import asking, runs
from search.tracker.runs import Key
from search.trial import Params, Report, Trial, TrialState, Value


def attempts(client: MlflowClient, parent: Run) -> dict[Key, Run]:
    """The runs of a study's attempts, by trial and attempt."""
    own_tag = f"tags.`{runs.STUDY_ID}` = '{parent.data.tags[runs.STUDY_ID]}'"
    found: dict[Key, Run] = {}
    for run in asking.runs(client, own_tag, ViewType.ACTIVE_ONLY, [parent.info.experiment_id]):
        if runs.TRIAL in run.data.tags:
            found[int(run.data.tags[runs.TRIAL]), int(run.data.tags[runs.ATTEMPT])] = run
    return dict(sorted(found.items()))


def trials(client: MlflowClient, parent: Run) -> list[Trial]:
    """A study's trials by number, as far as MLflow was told: those that are queued have no run yet."""
    found = attempts(client, parent)
    last = {number: run for (number, _), run in found.items()}
    direction = parent.data.params.get("direction", "min")
    return [_trial(run, direction) for run in last.values()]


def shown(client: MlflowClient, parent: Run, number: int) -> dict[str, Any] | None:
    """One trial with its reports, in the keys of ``report.show``; None if there is no such trial.

    What only its own workspace has is None: ``memo``, ``slot``, ``kept`` and ``log``.
    """
    found = {attempt: run for (one, attempt), run in attempts(client, parent).items() if one == number}
    if not found:
        return None
    *earlier, last = found.values()
    trial = _trial(last, parent.data.params.get("direction", "min"))
    if not trial.retries:  # of a run without a record of its own
        reasons = Counter(run.data.tags["heldout.reason"] for run in earlier if "heldout.reason" in run.data.tags)
        trial = dataclasses.replace(trial, retries=dict(reasons))
    reports = [one for attempt, run in found.items() for one in _reports(client, number, attempt, run)]
    return trial.to_json() | {
        "reports": [{"attempt": r.attempt, "step": r.step, "metrics": dict(r.metrics)} for r in reports],
        "enqueued": last.data.tags.get("heldout.enqueued"),
        "kept": None,
        "log": None,
    }


def _trial(run: Run, direction: str) -> Trial:
    tags, metrics = run.data.tags, run.data.metrics
    state, score = tags.get(runs.STATE), metrics.get("score")
    # An attempt that was cut off runs as far as the journal knows; and a long end is written in several requests.
    if state == runs.INTERRUPTED or (state == TrialState.COMPLETE and score is None):
        state = TrialState.RUNNING.value
    record = _record(run)
    is_over = TrialState(state).is_finished
    ended = record.get("ended", _seconds(run.info.end_time)) if is_over else None
    flops, confirms = metrics.get("flops"), tags.get(runs.CONFIRMS)
    return Trial(
        int(tags[runs.TRIAL]),
        TrialState(state),
        record["params"] if "params" in record else _params(run),
        seed=int(tags["heldout.seed"]),
        attempt=int(tags[runs.ATTEMPT]),
        retries=record.get("retries", {}),
        history_length=int(tags.get("heldout.history_length", 0)),
        confirms=None if confirms is None else int(confirms),
        text=tags.get("heldout.space_digest"),
        score=score,
        loss=None if score is None else -score if direction == "max" else score,
        reason=tags.get("heldout.reason"),
        message=tags.get("heldout.message"),
        started=record.get("started", _seconds(run.info.start_time)),
        ended=ended,
        epochs=int(metrics.get("epochs", 0)),
        best_epoch=_whole(metrics.get("best_epoch")),
        size=_whole(metrics.get("weights")),
        extra={} if flops is None else {"flops": int(flops)},
    )


def _record(run: Run) -> dict[str, Any]:
    """What the run's own record has of its trial; nothing where an older version wrote it, or it was too long."""
    try:
        found = json.loads(run.data.tags.get(runs.RECORD, "{}"))
    except ValueError:  # cut short by the server
        return {}
    return found if isinstance(found, dict) else {}


def _params(run: Run) -> Params:
    """Parameters from their texts alone: under MLflow's names, in their order, and a text that reads as a number is
    one."""
    return {name: _value(text) for name, text in sorted(run.data.params.items()) if name != "trial"}


def _value(text: str) -> Value:
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        if math.isfinite(value) and str(value) == text:  # as we write it: "007", "1e3" and "nan" are words
            return value
    return text


def _reports(client: MlflowClient, number: int, attempt: int, run: Run) -> list[Report]:
    """What Keras reported epoch by epoch; names are MLflow's, losses before what validation rows say."""
    odd = _non_finite(run.data.tags.get(runs.NON_FINITE, ""))
    found: dict[int, dict[str, float]] = {}
    at: dict[int, float] = {}
    for name in sorted(set(run.data.metrics) - set(runs.FINAL), key=lambda name: (name.startswith("val_"), name)):
        for point in client.get_metric_history(run.info.run_id, name):
            value = odd.get((name, point.step), point.value) if math.isnan(point.value) else point.value
            found.setdefault(point.step, {})[name] = value
            at[point.step] = point.timestamp / 1000
    return [Report(number, attempt, step, at[step], metrics) for step, metrics in sorted(found.items())]


def _non_finite(text: str) -> dict[tuple[str, int], float]:
    """What ``runs.non_finite`` named: MLflow itself has infinities as NaN."""
    found = {}
    for one in text.partition(" and ")[0].split(", "):
        key, _, rest = one.partition("@")
        step, mark, value = rest.partition("=")
        if mark and step.isdecimal():
            found[key, int(step)] = float(value)
    return found


def _seconds(millis: int | None) -> float | None:
    return None if millis is None else millis / 1000


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)

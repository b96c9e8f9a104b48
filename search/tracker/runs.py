"""What MLflow shall show of a study: its runs, their tags, params and points, worked out from the journal.

Pure values, so that a run worked out again, after a restart, is the same run.
"""

from __future__ import annotations

import dataclasses
import json
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from search.loop.enqueueing import source
from search.record.history import Event
from search.trial import Report, Trial, TrialState, best

Key = tuple[int, int]
"""(trial number, attempt): what has a run of its own, because a run's params cannot change."""

STUDY_ID, TRIAL, ATTEMPT, STATE = "heldout.study_id", "heldout.trial", "heldout.attempt", "heldout.state"
CONFIRMS = "heldout.confirms"
WORKSPACE = "heldout.workspace"
RECORD = "heldout.record"
"""What MLflow's own form of a trial loses, as JSON: types, names and order of params, times below a millisecond."""
NON_FINITE = "heldout.non_finite"
INTERRUPTED = "INTERRUPTED"
"""State tag of a run whose driver ended before it did; a resumed study may yet go on with it."""

TRIAL_STATUS = {
    TrialState.WAITING: "KILLED",  # this attempt was given up, another follows
    TrialState.RUNNING: "RUNNING",
    TrialState.COMPLETE: "FINISHED",
    TrialState.PRUNED: "FINISHED",  # as it should; KILLED has a red cross in MLflow's list, as if it had broken
    TrialState.FAILED: "FAILED",
}
FINAL = ("score", "seconds", "epochs", "best_epoch", "weights", "flops")
"""Names of the values that an attempt ends with; all others are Keras', epoch by epoch."""

_MOST_TAG = 8000  # characters that MLflow keeps of a tag
STUDY_STATUS = {"RUNNING": "RUNNING", "COMPLETE": "FINISHED", "FAILED": "FAILED", "STOPPED": "KILLED"}


@dataclass(frozen=True)
class Point:
    """One value of one series, at a time in milliseconds since the Unix epoch."""

    key: str
    value: float
    at: int
    step: int


class Names:
    """MLflow's names for ours: it allows few characters, and no name that is a path in disguise.

    Args:
        taken: Names already in use for something else.
    """

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = set(taken)
        self._known: dict[str, str] = {}

    def of(self, name: str) -> str:
        """The same for the same name; different for different ones."""
        if name not in self._known:
            clean = re.sub(r"[^/\w.\- ]", "_", name.replace("~", "."))[:240]
            clean = posixpath.normpath(clean).lstrip("/.") or "_"
            unique, number = clean, 2
            while unique in self._taken:
                unique, number = f"{clean}.{number}", number + 1
            self._taken.add(unique)
            self._known[name] = unique
        return self._known[name]


@dataclass
class Story:
    """The journal's events folded into attempts and the best-so-far series.

    Attributes:
        length: Events folded so far.
        attempts: Each attempt's trial as it stands; WAITING there means that it was given up.
        built: Attempts that have said what they asked for, so that their params are final.
        series: Best score after each finished trial of the search, with the number of these as step.
        params: MLflow's names of parameters; given out in the order of events, so always the same.
    """

    length: int = 0
    attempts: dict[Key, Trial] = field(default_factory=dict)
    built: set[Key] = field(default_factory=set)
    series: list[Point] = field(default_factory=list)
    params: Names = field(default_factory=lambda: Names({"trial"}))
    _ran: dict[int, int] = field(default_factory=dict)
    _finished: int = 0
    _champion: Trial | None = None

    @property
    def champion(self) -> Trial | None:
        """The complete trial with the lowest loss so far."""
        return self._champion

    def take(self, event: Event) -> Key | None:
        """Folds one event; returns the attempt that it changed, if any."""
        self.length = event.id
        key = None
        if event.kind == "asks" and event.trial is not None:
            key = (event.trial, self._ran[event.trial])
            self.built.add(key)
            self.attempts[key] = dataclasses.replace(self.attempts[key], params=event.body["params"])
        elif event.kind == "trial":
            key = self._move(Trial.from_json(event.body), event.at)
        for name in self.attempts[key].params if key is not None else ():
            self.params.of(name)
        return key

    def _move(self, trial: Trial, at: float) -> Key | None:
        if trial.state is TrialState.WAITING:
            if trial.number not in self._ran:
                return None  # enqueued and never run: no run yet
            key = (trial.number, self._ran[trial.number])
            if self.attempts[key].state is TrialState.RUNNING:
                ended = dataclasses.replace(
                    self.attempts[key], ended=at, reason=trial.reason, message=trial.message, epochs=trial.epochs
                )
                self.attempts[key] = ended.moved(TrialState.WAITING)
            return key
        key = (trial.number, trial.attempt)
        self.attempts[key] = trial
        self._ran[trial.number] = trial.attempt
        if trial.state.is_finished and trial.confirms is None:
            self._finished += 1
            self._champion = best([self._champion, trial] if self._champion is not None else [trial])
            if self._champion is not None and self._champion.score is not None:
                when = millis(trial.ended if trial.ended is not None else at)
                self.series.append(Point("best_so_far", self._champion.score, when, self._finished))
        return key


def millis(at: float) -> int:
    """MLflow's clock: whole milliseconds."""
    return round(at * 1000)


def optional_millis(at: float | None) -> int | None:
    """The same, where a time may be missing."""
    return None if at is None else millis(at)


def is_over(trial: Trial) -> bool:
    """Whether nothing further can come of this attempt."""
    return trial.state is not TrialState.RUNNING


def trial_tags(study: Mapping[str, Any], key: Key, trial: Trial, parent: str) -> dict[str, str]:
    """Tags a trial's run is created with; by the first four it is found again."""
    return {
        STUDY_ID: study["study_id"],
        TRIAL: str(key[0]),
        ATTEMPT: str(key[1]),
        STATE: TrialState.RUNNING.value,
        "mlflow.parentRunId": parent,
        # The number first: MLflow's table cuts long names, and a run stands under its study anyway.
        "mlflow.runName": _run_name(study, key, trial),
        **({} if trial.confirms is None else {CONFIRMS: str(trial.confirms)}),
        "heldout.seed": str(trial.seed),
        "heldout.history_length": str(trial.history_length),
        "heldout.baseline": str(key[0] == 0).lower(),
        **({} if (asked := source(trial)) is None else {"heldout.enqueued": asked}),
        **_common_tags(study),
        **({} if trial.text is None else {"heldout.space_digest": trial.text}),
        **record_tag(trial),
    }


def _run_name(study: Mapping[str, Any], key: Key, trial: Trial) -> str:
    again = "" if trial.confirms is None else f" · confirms {trial.confirms}"
    return f"trial {key[0]}{again}" + (f" · attempt {key[1] + 1}" if key[1] else "") + f" · {study['name']}"


def trial_params(story: Story, trial: Trial) -> dict[str, str]:
    """Params of a trial's run; the number among them because a chart's axis cannot be a tag."""
    named = {story.params.of(name): str(value) for name, value in trial.params.items()}
    return {"trial": str(trial.number), **named}


def record_tag(trial: Trial) -> dict[str, str]:
    """The tag from which the trial is read as it was; without params where they are too long for a tag."""
    kept = {"started": trial.started, "ended": trial.ended, "retries": dict(trial.retries)}
    text = json.dumps(kept | {"params": dict(trial.params)}, separators=(",", ":"))
    return {RECORD: text if len(text) <= _MOST_TAG else json.dumps(kept)}


def end_tags(trial: Trial) -> dict[str, str]:
    """Tags that an attempt which is over ends with."""
    tags = {STATE: trial.state.value, "heldout.reason": trial.reason, "heldout.message": trial.message}
    return {key: value for key, value in tags.items() if value} | record_tag(trial)


def metric_names(objective: str) -> Names:
    """Names of series: the objective keeps its own, and what we add is not Keras' to use."""
    names = Names(FINAL)
    names.of(objective)
    return names


def end_points(trial: Trial, last: Point | None) -> list[Point]:
    """Final values of an attempt; ``score`` is the scorer's, of the weights that were kept.

    The objective's own name keeps Keras' epochs alone, so that its curve is a learning curve.
    """
    step = max(trial.epochs, last.step if last else 0)
    at = max(millis(trial.ended or trial.started or 0.0), last.at + 1 if last else 0)
    final = (trial.score, trial.seconds, trial.epochs, trial.best_epoch, trial.size, trial.extra.get("flops"))
    found = dict(zip(FINAL, final, strict=True))
    return [Point(key, float(value), at, step) for key, value in found.items() if value is not None]


def report_points(report: Report, names: Names) -> list[Point]:
    """One epoch's values."""
    at = millis(report.at)
    return [Point(names.of(name), float(value), at, report.step) for name, value in report.metrics.items()]


def non_finite(points: Iterable[Point]) -> str:
    """Names points that are not finite numbers, for a tag."""
    found = [f"{point.key}@{point.step}={point.value}" for point in points]
    more = f" and {len(found) - 20} more" if len(found) > 20 else ""
    return ", ".join(found[:20]) + more


def study_tags(study: Mapping[str, Any]) -> dict[str, str]:
    """Tags the study's run is created with; it has no trial, and so is found again."""
    known = study.get("workspace_id")
    return {
        STUDY_ID: study["study_id"],
        **({} if known is None else {WORKSPACE: known}),
        STATE: "RUNNING",
        "mlflow.runName": study["name"],
        "mlflow.note.content": note(study, None),
        **_common_tags(study),
    }


def study_params(study: Mapping[str, Any]) -> dict[str, str]:
    """Params of the study's run: what was asked for, and on which rows."""
    names = Names()
    asked = {"objective": study["objective"], "direction": study["direction"], **study["config"]}
    flat = {**dict(_flat(asked)), **dict(_flat({"data": study.get("data") or {}}))}
    return {names.of(key): str(value) for key, value in flat.items() if value is not None}


def evaluation_points(evaluation: Mapping[str, Any], at: float) -> list[Point]:
    """Every number of the test step, under ``test.…``."""
    names = Names()
    numbers = {
        key: float(value)
        for key, value in _flat({"test": evaluation})
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    return [Point(names.of(key), value, millis(at), 0) for key, value in numbers.items()]


def selection_points(selection: Mapping[str, Any], at: float) -> list[Point]:
    """What guard rows say: the corrected estimate, the noise floor, gains, and the chosen models' scores."""
    kept = {key: selection.get(key) for key in ("corrected", "gains")}
    for role in ("winner", "baseline"):
        kept[role] = {key: (selection.get(role) or {}).get(key) for key in ("validation", "guard")}
    flat = [*_flat({"noise_floor": selection.get("noise_floor"), **{k: v or {} for k, v in kept.items()}})]
    return [Point(key, float(value), millis(at), 0) for key, value in flat if isinstance(value, int | float)]


def conclusion_tags(selection: Mapping[str, Any], evaluation: Mapping[str, Any]) -> dict[str, str]:
    """Tags of a study that has ended: its verdicts, and the trial that is shipped."""
    tags = {"heldout.verdicts": ", ".join(evaluation.get("verdicts") or [])}
    if selection:
        tags["heldout.winner"] = str(selection["winner"]["trial"])
        tags["heldout.scope"] = (selection["corrected"] or {}).get("scope", "")
    return {key: value for key, value in tags.items() if value}


def note(study: Mapping[str, Any], believe: str | None) -> str:
    """A few lines of Markdown for the head of the study's page: what to believe first, once that is known."""
    better = "higher" if study["direction"] == "max" else "lower"
    lines = [
        f"### {study['name']}",
        f"Search of `{study['space']['name']}` for `{study['objective']}` ({better} is better). "
        "Trial 0 is the baseline. `score` is measured on validation rows.",
    ]
    if believe is not None:
        lines.insert(1, believe)
        lines.append(
            "`corrected.` is estimated from guard rows, `test.` was measured on rows that no trial has seen."
        )
    return "\n\n".join(lines)


def _common_tags(study: Mapping[str, Any]) -> dict[str, str]:
    names = Names()
    return {
        **{names.of(key): str(value) for key, value in (study.get("tags") or {}).items()},
        **{f"heldout.version.{key}": str(value) for key, value in (study.get("versions") or {}).items()},
        "heldout.study": study["name"],
        "heldout.space_digest": str(study["space"].get("digest")),
        "heldout.data_digest": str((study.get("data") or {}).get("digest")),
        **_warm_start_tags(study),
        "mlflow.user": str(study.get("user") or "unknown"),
        "mlflow.source.name": str(study["space"].get("path") or study["space"]["name"]),
        "mlflow.source.type": "LOCAL",
    }


def _warm_start_tags(study: Mapping[str, Any]) -> dict[str, str]:
    earlier = study.get("warm_start") or []
    if not earlier:
        return {}
    other_data = any(one["other_data"] for one in earlier)
    return {
        "heldout.warm_start": ", ".join(one["study"] for one in earlier),
        "heldout.warm_start_other_data": str(other_data).lower(),
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested objects under dotted names; an interval's ends as ``_low`` and ``_high``."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        elif isinstance(value, list | tuple) and len(value) == 2 and name.endswith("interval"):
            yield from ((f"{name}_low", value[0]), (f"{name}_high", value[1]))
        else:
            yield name, value

"""Publishing one study to MLflow: which runs there are, what they lack, and writing that in batches.

Every run is found by its tags before one is created, and every value carries the journal's own time, so
publishing again what was published changes nothing.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Experiment, Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException

from search.record.journal import Journal
from search.tracker import publishing, runs
from search.tracker.runs import Key, Point, Story

_FLUSH_SECONDS = 30.0
_SERIES_SECONDS = 5.0
_STRIKES = 3
# MLflow's limits of one batch are 1000 points, 100 params and 100 tags, 1000 in all.
_POINTS, _PAIRS = 800, 100
# The server understood and says no: trying the same again will not help.
_REFUSALS = {"INVALID_PARAMETER_VALUE", "INVALID_STATE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST"}

_log = logging.getLogger("heldout.tracking")


@dataclass
class _Published:
    """What MLflow has of one run.

    Attributes:
        closed: Its end is there, or somebody deleted it: nothing more to publish.
        status: MLflow's status of it; state: our tag.
        params: Names of the params that it has.
    """

    run_id: str
    status: str = "RUNNING"
    state: str | None = None
    closed: bool = False
    params: set[str] = field(default_factory=set)
    flushed: float = field(default_factory=time.monotonic)


class Publisher:
    """Publishes one study. Any method may raise whatever MLflow raises; the same call again continues.

    Args:
        client: MLflow's, connected.
        journal: The study's, with its ``study`` and ``state`` put.
        artifact_root: Folder for artifacts, or None for the server's own place.
    """

    def __init__(self, client: MlflowClient, journal: Journal, artifact_root: Path | None) -> None:
        self._client, self._journal, self._artifact_root = client, journal, artifact_root
        self._study: dict[str, Any] = journal.get("study")
        self._story = Story()
        self._names = runs.metric_names(self._study["objective"])
        self._objective = self._names.of(self._study["objective"])
        self._experiment_id = ""
        self._parent: _Published | None = None
        self._runs: dict[Key, _Published] = {}
        self._points: dict[Key, list[Point]] = {}
        self._read = 0  # reports taken from the journal
        self._open: dict[Key, int] = {}  # attempts to publish something of, and the first event of it
        self._strikes: dict[Key, int] = {}
        self._odd: dict[str, dict[tuple[str, int], Point]] = {}  # per run, points that are no finite number
        self._series_sent = 0
        self._series_at = 0.0
        self._tries: dict[str, int] = {}  # of storing artifacts
        self._in_step = False  # what we believe that MLflow has is what it has
        self._unsure = False  # a request's outcome was not seen, so a run may exist twice

    def summary(self) -> dict[str, Any]:
        """What ``publishing.read`` shows, but for address and error."""
        last: dict[int, str] = {}
        for (number, _), run in sorted(self._runs.items()):
            last[number] = run.run_id or last.get(number, "")
        published = min(self._open.values(), default=self._story.length + 1) - 1
        return {
            "experiment_id": self._experiment_id or None,
            "run_id": self._parent.run_id if self._parent else None,
            "status": self._parent.status if self._parent else None,
            "runs": {str(number): run_id for number, run_id in last.items() if run_id},
            "published": published,
            "behind": max(self._story.length, self._journal.length) - published,
        }

    def publish(self) -> None:
        """Brings MLflow up to the journal, but for what may wait for a fuller batch."""
        self._take()
        self._get_in_step()
        for key in list(self._open):
            self._attempt(key, self._write_attempt)
        now = time.monotonic()
        for key, points in list(self._points.items()):  # of what runs, and not of all that ever ran
            run = self._runs.get(key)
            if points and run is not None and not run.closed and now - run.flushed >= _FLUSH_SECONDS:
                self._attempt(key, self._flush)
        if now - self._series_at >= _SERIES_SECONDS:
            self._series()

    def end(self) -> None:
        """Publishes the rest, and the study's end."""
        self._take()
        if self._unsure:
            self._in_step = False
        self._get_in_step()
        for key in list(self._open):
            self._attempt(key, self._write_attempt)
        for key, trial in self._story.attempts.items():
            if not runs.is_over(trial) and self._runs[key].status == "RUNNING":
                self._attempt(key, self._interrupt)
        self._series()
        self._end_parent()
        if self._unsure:
            # Requests that were lost from sight have had time to arrive: look once more.
            self._unsure = False
            self._find_runs()
            self._open = {key: at for key, at in self._open.items() if runs.is_over(self._story.attempts[key])}
            for key in list(self._open):
                self._attempt(key, self._write_attempt)

    def lost_step(self) -> None:
        """A request failed: what it did is unknown, so look before the next."""
        self._in_step, self._unsure = False, True

    # ---- reading the journal

    def _take(self) -> None:
        # Events first: an attempt that is over by then has all its reports in what is read next.
        for event in self._journal.events(self._story.length):
            key = self._story.take(event)
            if key is not None and not self._is_closed(key):
                self._open.setdefault(key, event.id)
        reports = self._journal.reports(after=self._read)
        self._read += len(reports)
        for report in reports:
            key = (report.trial, report.attempt)
            if not self._is_closed(key):
                self._points.setdefault(key, []).extend(runs.report_points(report, self._names))

    def _is_closed(self, key: Key) -> bool:
        run = self._runs.get(key)
        return run is not None and run.closed

    # ---- finding what is there

    def _get_in_step(self) -> None:
        if self._in_step:
            return
        self._experiment_id = self._experiment().experiment_id
        self._find_runs()
        if self._parent is None:
            self._parent = self._create(runs.study_tags(self._study), self._journal.put_at("study"))
        if not self._parent.closed:
            if not self._parent.params:
                params = runs.study_params(self._study)
                self._send(self._parent.run_id, params=params)
                self._parent.params = set(params)
            if self._parent.status != "RUNNING" and self._journal.get("state") == "RUNNING":
                self._reopen(self._parent)
            self._put_source(self._parent)
        self._in_step = True

    def _experiment(self) -> Experiment:
        name = self._study["space"]["name"]
        found, refused = self._client.get_experiment_by_name(name), None
        if found is None:
            root = self._artifact_root
            location = None if root is None else (root / runs.Names().of(name)).as_uri()
            try:
                self._client.create_experiment(name, location)
            except MlflowException as error:
                refused = error  # unless another study of this space was first
            found = self._client.get_experiment_by_name(name)
        if found is None:
            raise refused or MlflowException(f"experiment {name!r} is not there after creating it")
        if found.lifecycle_stage != "active":
            _log.info("experiment %r was deleted in MLflow; restoring it for this study", name)
            self._client.restore_experiment(found.experiment_id)
        return found

    def _find_runs(self) -> None:
        """Reads which runs of this study MLflow has; removes what a lost answer made twice."""
        found: dict[Key | None, list[Run]] = {}
        wanted, token = f"tags.`{runs.STUDY_ID}` = '{self._study['study_id']}'", None
        while True:
            page = self._client.search_runs([self._experiment_id], wanted, ViewType.ALL, 1000, page_token=token)
            for run in page:
                tags = run.data.tags
                key = (int(tags[runs.TRIAL]), int(tags[runs.ATTEMPT])) if runs.TRIAL in tags else None
                found.setdefault(key, []).append(run)
            token = page.token
            if not token:
                break
        had = {run.run_id for run in (*self._runs.values(), self._parent) if run is not None and run.run_id}
        known = {key: self._one_of(copies, had) for key, copies in found.items()}
        self._parent = known.pop(None, None)
        self._runs = {key: run for key, run in known.items() if key is not None}
        if had - {run.run_id for run in (*self._runs.values(), self._parent) if run is not None}:
            # MLflow has lost runs that it had: say everything again, which what it kept takes as said.
            self._points.clear()
            self._read, self._series_sent, self._tries = 0, 0, {}
            self._take()
        for key, trial in self._story.attempts.items():
            run = self._runs.get(key)
            if run is not None:
                over = runs.is_over(trial) and run.state == trial.state.value and run.status != "RUNNING"
                run.closed = run.closed or over
            if self._is_closed(key):
                self._open.pop(key, None)
                self._points.pop(key, None)
            elif run is None or run.status != "RUNNING" or runs.is_over(trial):
                self._open.setdefault(key, self._story.length)

    def _one_of(self, copies: list[Run], had: set[str]) -> _Published:
        """The copy that we wrote to, else the one with most in it; a deleted one if there is no other."""

        def rank(run: Run) -> tuple[bool, bool, int, str]:
            data, run_id = run.data, run.info.run_id
            active = run.info.lifecycle_stage == "active"
            return active, run_id in had, len(data.metrics) + len(data.params), run_id

        first, *rest = sorted(copies, key=rank, reverse=True)
        for run in rest:
            if run.info.lifecycle_stage == "active":
                self._client.delete_run(run.info.run_id)
        return _Published(
            first.info.run_id,
            status=first.info.status,
            state=first.data.tags.get(runs.STATE),
            closed=first.info.lifecycle_stage != "active",
            params=set(first.data.params),
        )

    # ---- writing

    def _attempt(self, key: Key, publish: Callable[[Key], None]) -> None:
        """Publishes something of one attempt; gives the attempt up if MLflow refuses it for good."""
        try:
            publish(key)
        except MlflowException as error:
            self._strikes[key] = self._strikes.get(key, 0) + 1
            if error.error_code not in _REFUSALS or self._strikes[key] < _STRIKES:
                raise
            _log.error("MLflow refuses trial %d, attempt %d, so it is left out: %s", *key, error)
            self._runs.setdefault(key, _Published("")).closed = True
        self._open.pop(key, None)
        if self._is_closed(key):
            self._points.pop(key, None)

    def _write_attempt(self, key: Key) -> None:
        trial, run = self._story.attempts[key], self._runs.get(key)
        assert self._parent is not None
        if run is None:
            tags = runs.trial_tags(self._study, key, trial, self._parent.run_id)
            run = self._runs[key] = self._create(tags, trial.started)
        if run.closed:
            return
        if not runs.is_over(trial):
            if run.status != "RUNNING":
                self._reopen(run)
            return
        points = self._points.get(key, [])
        last = max(points, key=lambda point: (point.step, point.at), default=None)
        points = points + runs.end_points(trial, last)
        self._send(run.run_id, points, self._new_params(key, run), runs.end_tags(trial))
        self._client.set_terminated(run.run_id, runs.TRIAL_STATUS[trial.state], runs.optional_millis(trial.ended))
        run.closed = True

    def _flush(self, key: Key) -> None:
        """Sends the epochs of a running trial so far, and its params once they cannot change."""
        run, points = self._runs[key], self._points.get(key, [])
        params = self._new_params(key, run) if key in self._story.built else {}
        self._send(run.run_id, points, params, runs.record_tag(self._story.attempts[key]) if params else None)
        run.params |= set(params)
        run.flushed = time.monotonic()
        self._points[key] = []

    def _interrupt(self, key: Key) -> None:
        """Ends the run of a trial that was running when its driver ended."""
        run = self._runs[key]
        if run.closed:
            return
        self._flush(key)
        self._send(run.run_id, tags={runs.STATE: runs.INTERRUPTED})
        self._client.set_terminated(run.run_id, "KILLED")
        run.status = "KILLED"

    def _new_params(self, key: Key, run: _Published) -> dict[str, str]:
        params = runs.trial_params(self._story, self._story.attempts[key])
        return {name: value for name, value in params.items() if name not in run.params}

    def _series(self) -> None:
        assert self._parent is not None
        points = self._story.series[self._series_sent :]
        if points and not self._parent.closed:
            self._send(self._parent.run_id, points)
        self._series_sent += len(points)
        self._series_at = time.monotonic()

    def _end_parent(self) -> None:
        assert self._parent is not None
        if self._parent.closed:
            return
        state = self._journal.get("state")
        evaluation, selection = self._journal.get("evaluation") or {}, self._journal.get("selection") or {}
        summary = self._journal.get("summary") or {}
        points = runs.evaluation_points(evaluation, self._journal.put_at("evaluation") or 0.0)
        points += runs.selection_points(selection, self._journal.put_at("selection") or 0.0)
        tags = {
            # Ended without a word: the driver was killed.
            runs.STATE: runs.INTERRUPTED if state == "RUNNING" else state,
            "mlflow.note.content": runs.note(self._study, summary.get("believe")),
            **runs.conclusion_tags(selection, evaluation),
        }
        champion = self._story.champion
        if champion is not None:
            points += runs.end_points(champion, None)[:1]
            tags["heldout.best_trial"] = str(champion.number)
        status = "KILLED" if state == "RUNNING" else runs.STUDY_STATUS[state]
        self._send(self._parent.run_id, points, tags=tags)
        if summary.get("picture"):
            run_id, picture = self._parent.run_id, self._journal.path.parent / Path(summary["picture"]).name
            self._store("picture", lambda: self._client.log_artifact(run_id, str(picture), "report"))
        page = self._journal.path.parent / publishing.PAGE
        if state in ("COMPLETE", "FAILED") and page.exists():
            parent = self._parent.run_id
            self._store("page", lambda: self._client.log_artifact(parent, str(page), "report"))
        if summary.get("architecture"):
            self._put_architecture(self._parent.run_id, summary["architecture"])
        self._client.set_terminated(self._parent.run_id, status, runs.optional_millis(self._journal.put_at("state")))
        self._parent.status = status

    def _put_architecture(self, run_id: str, drawn: Mapping[str, Any]) -> None:
        """Stores the drawing of the winner's architecture; each winner's, should a longer search find another."""
        file = self._journal.path.parent / Path(drawn["file"]).name
        what = f"architecture of trial {drawn['trial']}"
        self._store(what, lambda: self._client.log_artifact(run_id, str(file), "model"))

    def _put_source(self, parent: _Published) -> None:
        """Stores the space's source."""
        source = self._study["space"].get("source")
        if source is not None and not parent.closed:
            name = Path(self._study["space"].get("path") or "space.py").name
            self._store("source", lambda: self._client.log_text(parent.run_id, source, f"space/{name}"))

    def _store(self, what: str, put: Callable[[], Any]) -> None:
        """Stores an artifact once; a server whose artifact store is not for us keeps the rest."""
        if self._tries.get(what, 0) >= _STRIKES:
            return
        self._tries[what] = self._tries.get(what, 0) + 1
        try:
            put()
        except Exception as error:
            if self._tries[what] < _STRIKES:
                raise
            _log.error("the %s could not be stored as an artifact: %s", what, error)
        else:
            self._tries[what] = _STRIKES

    def _create(self, tags: Mapping[str, str], started: float | None) -> _Published:
        run = self._client.create_run(self._experiment_id, start_time=runs.optional_millis(started), tags=dict(tags))
        return _Published(run.info.run_id)

    def _reopen(self, run: _Published) -> None:
        self._client.update_run(run.run_id, status="RUNNING")
        self._send(run.run_id, tags={runs.STATE: "RUNNING"})
        run.status = "RUNNING"

    def _send(
        self,
        run_id: str,
        points: Sequence[Point] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """One batch, or as many as MLflow's limits make of it."""
        odd = self._odd.setdefault(run_id, {})
        odd.update({(p.key, p.step): p for p in points if not math.isfinite(p.value)})
        if odd:
            tags = {**(tags or {}), runs.NON_FINITE: runs.non_finite(odd.values())}
        # MLflow would store an infinity as 1.8e308, which ruins every chart; the tag tells what it was.
        metrics = [Metric(p.key, math.nan if math.isinf(p.value) else p.value, p.at, p.step) for p in points]
        pairs = [Param(name, value) for name, value in (params or {}).items()]
        marks = [RunTag(name, value) for name, value in (tags or {}).items()]
        while metrics or pairs or marks:
            self._client.log_batch(run_id, metrics[:_POINTS], pairs[:_PAIRS], marks[:_PAIRS])
            metrics, pairs, marks = metrics[_POINTS:], pairs[_PAIRS:], marks[_PAIRS:]

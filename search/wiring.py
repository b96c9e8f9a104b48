"""Wires a study together: executor, journal, tracker, driver, evaluation."""

from __future__ import annotations

import getpass
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from search import devices, disk, finalists, jobs, keeping, places, publishing
from search.driver import Driver
from search.errors import ExecutorError, RequestError, StudyError, TrialFailed
from search.executors.local import LocalExecutor, start_method
from search.journal import Journal
from search.problem import Problem, find
from search.samplers import get_sampler
from search.study import Study, StudyConfig, locked, make_workspace, release, reserve, workspace_folder
from search.trial import Trial, searched
from search.watcher import Silent, Watcher


def launch(space: str, *, watcher: Watcher | None = None, **options: Any) -> Study:
    """Run a search to its end and return its study.

    Args:
        space: Path, dotted name, or short name of the space module.
        watcher: Is told what happens; None shows nothing.
        **options: The fields of ``StudyConfig``.

    Raises:
        RequestError: If the request is wrong; nothing is left behind then.
        StudyFailed: If the study began and could not be completed; what was recorded stays.
    """
    config = StudyConfig(space=space, **options)
    from search.ledger import Ledger, times

    watcher = watcher or Silent()
    problem = find(config.space)
    get_sampler(config.sampler)
    start_method(config.start_method)
    slots = devices.slots(config.workers, config.gpus, config.trials_per_gpu, config.gpus_per_trial)
    workspace = workspace_folder(config.workspace)
    asked = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    uri = publishing.anchored(asked) if asked else publishing.default_uri(workspace)
    disk.check(workspace)
    make_workspace(workspace)
    publishing.check_uri(uri)
    folder = reserve(workspace, config.study, problem.name)
    began = False
    try:
        with locked(folder), jobs.start_executor(slots, problem, folder, config.start_method) as executor:
            watcher.say("loading the rows and building the default model")
            Ledger().ready()  # before anything is paid for that could not be recorded
            journal = Journal.create(folder / "journal.sqlite", {})
            try:
                with publishing.start(folder, uri) as tracker:
                    prepared = jobs.prepare(executor, problem, workspace, folder, config.split_seed, watcher)
                    if (earlier := jobs.openings(prepared)) and config.evaluate == "auto":
                        watcher.say(
                            f"these test rows have been opened {times(earlier)} before: this study will leave "
                            "them sealed, unless it is launched with --evaluate yes"
                        )
                    journal.put("prepared", prepared)
                    journal.put("study", _study_meta(folder.name, config, problem, prepared, uri, workspace))
                    discovery = {"problem": problem.to_json(), "seconds": jobs.DISCOVERY_SECONDS}

                    def begin(preflight: dict[str, Any]) -> None:
                        from search import scoring
                        from search.judge import check_tiers

                        nonlocal began
                        rows = Path(prepared["rows"]), Path(prepared["sealed"])
                        check_tiers(*rows, prepared["objective"], preflight["declaration"])
                        tracker.ready()
                        if line := scoring.disagreement_line(preflight):
                            watcher.say(line)
                        kept = ("reported", "custom", "declaration", "size", "disagreement")
                        journal.put("preflight", {key: preflight.get(key) for key in kept})
                        journal.put("state", "RUNNING")
                        began = True

                    _drive(folder, journal, executor, watcher, tracker, discovery, begin)
            finally:
                journal.close()
    except BaseException as error:
        if not began:
            release(folder)
        if isinstance(error, ExecutorError) and not began:
            raise RequestError(str(error)) from None
        raise
    return Study.at(folder)


def resume(study: str, *, workspace: str | None = None, watcher: Watcher | None = None) -> Study:
    """Continue a study that was stopped: same plan, same space, trials in flight run again.

    Raises:
        StudyError: If there is no such study, it is being driven, or it is complete.
        StudyFailed: As for ``launch``.
    """
    found = Study(study, workspace)
    watcher = watcher or Silent()
    meta = found.meta("study")
    if meta is None or found.meta("state") is None:
        raise StudyError(
            f"study {found.name!r} never began, so there is nothing to resume; `heldout delete {found.name}` and "
            "launch it again"
        )
    if found.state == "COMPLETE":
        raise StudyError(f"study {found.name!r} is complete; see it with `heldout report {found.name}`")
    config = StudyConfig(**meta["config"])
    problem = Problem(**found.meta("prepared")["problem"])
    slots = devices.slots(config.workers, config.gpus, config.trials_per_gpu, config.gpus_per_trial)
    uri = publishing.uri_of(places.study(meta, found.workspace))
    publishing.check_uri(uri)
    disk.check(found.folder)
    with locked(found.folder), jobs.start_executor(slots, problem, found.folder, config.start_method) as executor:
        journal = Journal.open(found.folder / "journal.sqlite")
        try:
            journal.put("state", "RUNNING")
            discovery = None
            if not any(event.kind == "space" for event in journal.events()):
                discovery = {"problem": problem.to_json(), "seconds": jobs.DISCOVERY_SECONDS}
            with publishing.start(found.folder, uri) as tracker:
                _drive(found.folder, journal, executor, watcher, tracker, discovery, lambda _: None)
        finally:
            journal.close()
    return Study(found.name, found.workspace)


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # as in a container that runs under a number nobody has a name for
        return None


def _study_meta(
    name: str, config: StudyConfig, problem: Problem, prepared: dict[str, Any], uri: str, workspace: Path
) -> dict[str, Any]:
    return {
        "name": name,
        "study_id": uuid.uuid4().hex,
        "space": problem.to_json() | {"digest": problem.digest},
        "objective": prepared["objective"],
        "direction": prepared["direction"],
        "config": config.to_json() | {"tracking_uri": None},
        "user": _user(),
        "tags": dict(config.tags),
        "versions": prepared["versions"],
        "tracking_uri": publishing.redacted(uri),
        "tracking_secret": publishing.redacted(uri) != uri,
        "artifact_root": str(workspace / "artifacts"),
        "data": {key: prepared["manifest"][key] for key in ("digest", "fingerprint", "rows", "tiers")},
    }


class _Tidying:
    """A watcher that deletes what cannot win any more when a trial has ended."""

    def __init__(self, watcher: Watcher, keeper: keeping.Keeper) -> None:
        self._keeper, self._ended = keeper, watcher.ended
        self.started, self.epoch, self.say, self.tick = watcher.started, watcher.epoch, watcher.say, watcher.tick

    def ended(self, trial: Trial) -> None:
        self._ended(trial)
        self._keeper.ended(trial)
        self._keeper.fits(self.say)


def _drive(
    folder: Path,
    journal: Journal,
    executor: LocalExecutor,
    watcher: Watcher,
    tracker: publishing.Tracker,
    discovery: dict[str, Any] | None,
    on_preflight: Any,
) -> None:
    from search.judge import RowJudge

    meta, prepared = journal.get("study"), places.prepared(journal)
    config = StudyConfig(**meta["config"])
    judge = RowJudge(
        Path(prepared["rows"]),
        Path(prepared["sealed"]),
        prepared["objective"],
        prepared["problem"],
        keep=folder / "guard",
        baseline=lambda: (journal.get("preflight") or {}).get("declaration"),
    )

    def payload(trial: Trial, proposal: dict[str, Any] | None) -> dict[str, Any]:
        place = places.trial(folder, trial.number)
        place.mkdir(parents=True, exist_ok=True)
        return jobs.base_payload(prepared, place) | {
            "epochs": config.epochs,
            "seed": trial.seed,
            "proposal": proposal,
            "default": trial.number == 0,
            "preflight": trial.number == 0 and discovery is not None,
            "log": str(place / "log.txt"),
        }

    def confirm(history: Sequence[Trial]) -> list[Trial]:
        asked = config.confirmation(len(searched(history)))
        planned = finalists.plan(history, asked, config.seed)
        if planned:
            again = {trial.confirms for trial in planned}
            others = sorted(number for number in again if number is not None)
            watcher.say(
                f"confirming: {asked.seeds} more trainings each of trials {', '.join(map(str, others))}, the best by "
                "validation score and the baseline"
            )
        return planned

    state = "FAILED"
    try:
        most = None if config.max_disk is None else disk.parse_size(config.max_disk)
        keeper = keeping.Keeper(folder, journal, most)
        driver = Driver(
            trials=config.trials,
            seed=config.seed,
            direction=prepared["direction"],
            journal=journal,
            sampler=get_sampler(config.sampler),
            executor=executor,
            judge=judge,
            payload=payload,
            discovery=discovery,
            on_preflight=on_preflight,
            confirm=confirm,
            watcher=_Tidying(watcher, keeper),
        )
        journal.put("ended", driver.run())
        from search import evaluation  # its statistics take a while to import, and nothing before it needs them

        try:
            evaluation.conclude(folder, journal, executor, watcher, opening=config.evaluate, final=config.final)
        except (RequestError, TrialFailed) as error:
            # The search itself is complete, and `heldout evaluate` can be tried again.
            if not (journal.get("evaluation") or {}).get("opened"):
                journal.put("evaluation", {"opened": False, "why": str(error), "openings": None})
            watcher.say(str(error))
        state = "COMPLETE"
    except KeyboardInterrupt:
        state = "STOPPED"
        raise
    finally:
        if journal.get("state") is not None:
            journal.put("state", state)
            if not tracker.finish():
                watcher.say(jobs.BEHIND)

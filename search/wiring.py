"""Launching a study: executor, journal, tracker, driver and evaluation, wired together."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from search import secrecy
from search.cluster.launching import spread
from search.definition import assets
from search.definition.problem import Problem, find
from search.errors import DiskFull, ExecutorError, RequestError, StudyStopped, TrialFailed
from search.executors import Executor
from search.executors.local import LocalExecutor, start_method
from search.guard import finalists
from search.loop import enqueueing, keeping, warm_start
from search.loop.driver import Driver
from search.loop.pruners import get_pruner
from search.loop.stopping import Stopping
from search.loop.surroundings import FINISH, Calm
from search.loop.watcher import Silent, Watcher
from search.processes import jobs
from search.record import disk, places
from search.record.journal import Journal
from search.record.lock import locked
from search.record.reserving import clear, release, reserve
from search.samplers import check_space, get_sampler
from search.study import Study, StudyConfig, config_of, make_workspace, workspace_folder, workspace_id
from search.tracker import board, publishing
from search.trial import Trial, searched

_STOP_SECONDS = 5.0


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
    secrecy.absent(secrecy.resolve(config.env), json.dumps(config.to_json(), ensure_ascii=False), "a launch")
    from search.guard.ledger import Ledger, times

    watcher = watcher or Silent()
    if config.max_slots is not None and config.ray is None:
        raise RequestError(
            f"--max-slots {config.max_slots} is for a cluster, but none is given; add --ray, or use --workers"
        )
    problem = find(config.space)
    chosen = get_sampler(config.sampler)
    asked_first = enqueueing.read(config.enqueue)
    enqueueing.check_room(config.trials, asked_first, config.enqueue)
    get_pruner(config.pruner)
    if config.tensorboard:
        board.check_installed()
    start_method(config.start_method)
    slots = jobs.slots(config)
    workspace = workspace_folder(config.workspace)
    earlier_studies = warm_start.studies(config, workspace)
    asked = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    uri = publishing.anchored(asked) if asked else publishing.default_uri(workspace)
    disk.check(workspace)
    make_workspace(workspace)
    publishing.check_uri(uri)
    folder = reserve(workspace, config.study, problem.name)
    began = mine = False
    try:
        with contextlib.ExitStack() as held_open:
            hold = held_open.enter_context(locked(folder))
            clear(folder)
            mine = True
            stopping = held_open.enter_context(Stopping(folder))
            here = held_open.enter_context(
                jobs.start_executor(slots, problem, folder, config.start_method, config.env, (hold,))
            )
            executor = held_open.enter_context(spread(here, config, problem, folder, watcher))
            if held := [name for name in secrecy.withheld(os.environ) if name in problem.source]:
                watcher.say(
                    f"{', '.join(held)} may be secrets, so trials are not given them; --env {held[0]} hands one over"
                )
            watcher.say(f"loading the rows and building the default model (sampler {config.sampler})")
            Ledger().ready()  # before anything is paid for that could not be recorded
            journal = Journal.create(folder / "journal.sqlite", {})
            try:
                with publishing.start(folder, uri) as tracker:
                    asked_rows = (workspace, folder, config.split_seed, watcher, config.validation)
                    prepared = jobs.prepare(here, problem, *asked_rows)
                    if (earlier := jobs.openings(prepared)) and config.evaluate == "auto":
                        watcher.say(
                            f"these test rows have been opened {times(earlier)} before: this study will leave "
                            "them sealed, unless it is launched with --evaluate yes"
                        )
                    assets.keep(prepared["assets"], folder)
                    digest = prepared["manifest"]["digest"]
                    learned = warm_start.record(earlier_studies, digest, config.warm_start_other_data)
                    journal.put("prepared", prepared)
                    if learned:
                        journal.put("warm_start", learned)
                    meta = _study_meta(folder.name, config, problem, prepared, uri, workspace)
                    journal.put("study", meta | {"warm_start": warm_start.brief(learned)})
                    discovery = {"problem": problem.to_json(), "seconds": jobs.DISCOVERY_SECONDS}

                    def begin(preflight: dict[str, Any]) -> None:
                        from search.scorer import scoring
                        from search.scorer.judge import check_tiers

                        nonlocal began
                        rows = Path(prepared["rows"]), Path(prepared["sealed"])
                        check_tiers(*rows, prepared["objective"], preflight["declaration"])
                        tracker.ready()
                        if line := scoring.disagreement_line(preflight):
                            watcher.say(line)
                        space = journal.space()
                        check_space(chosen, space)
                        room = config.trials - 1 - len(asked_first)
                        wishes = [*asked_first, *warm_start.wishes(learned, space, room)]
                        kept = ("reported", "custom", "declaration", "size", "disagreement")
                        with journal.one_commit(now=True):
                            enqueueing.queue(journal, wishes, config.seed, watcher.say)
                            journal.put("preflight", {key: preflight.get(key) for key in kept})
                            journal.put("state", "RUNNING")
                        began = True

                    drive(folder, journal, executor, here, watcher, tracker, stopping, discovery, begin)
            finally:
                journal.close()
    except BaseException as error:
        if mine and not began:
            release(folder)
        if isinstance(error, ExecutorError) and not began:
            raise RequestError(str(error)) from None
        if isinstance(error, StudyStopped) and not began:
            raise StudyStopped("stopped before the study began; nothing of it is kept") from None
        raise
    return Study.at(folder)


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
        "tracking_uri": secrecy.redacted(uri),
        "tracking_secret": secrecy.redacted(uri) != uri,
        "artifact_root": str(workspace / "artifacts"),
        "workspace_id": workspace_id(workspace),
        "data": {key: prepared["manifest"][key] for key in ("digest", "fingerprint", "rows", "tiers")},
    }


def drive(
    folder: Path,
    journal: Journal,
    executor: Executor,
    here: LocalExecutor,
    watcher: Watcher,
    tracker: publishing.Tracker,
    stopping: Stopping,
    discovery: dict[str, Any] | None,
    on_preflight: Callable[[dict[str, Any]], None],
) -> None:
    """Search, confirm and evaluate as the journal's record of the study says, to the end or until it is stopped.

    Args:
        executor: Runs the trials; here: what is shown sealed rows or labels, on this machine.

    Raises:
        StudyStopped: If it was stopped at once; asked to let running trials end first, it returns.
        StudyFailed: If it could not go on.
    """
    from search.scorer.judge import RowJudge

    prepared, config = places.prepared(journal), config_of(journal)
    judge = RowJudge(
        Path(prepared["rows"]),
        Path(prepared["sealed"]),
        prepared["objective"],
        prepared["problem"],
        keep=folder / "guard",
        baseline=lambda: (journal.get("preflight") or {}).get("declaration"),
        errors=config.stop_after_stale is not None,
        validation=prepared["validation"],
    )
    pruning = jobs.pruning(config, prepared, journal)

    def payload(trial: Trial, proposal: dict[str, Any] | None) -> dict[str, Any]:
        place = places.trial(folder, trial.number)
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk.failure(place, error) from error
        ready = jobs.prepared_for(journal, trial)
        return jobs.base_payload(ready, place, len(here.slots)) | {
            **jobs.split_of(ready, trial.seed),
            "epochs": config.epochs,
            "seed": trial.seed,
            "proposal": proposal,
            "default": trial.number == 0 or enqueueing.source(trial) is not None,
            "preflight": trial.number == 0 and discovery is not None,
            "log": str(place / "log.txt"),
            "deterministic": config.deterministic,
            "checkpoint_minutes": config.checkpoint_minutes,
            "events": str(places.events(folder, trial.number)) if config.tensorboard else None,
            "rungs": pruning.rungs(trial),
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
            ends=config.ends,
            seed=config.seed,
            direction=prepared["direction"],
            journal=journal,
            sampler=warm_start.sampler(journal, config),
            executor=executor,
            judge=judge,
            payload=payload,
            discovery=discovery,
            on_preflight=on_preflight,
            confirm=confirm,
            pruning=pruning,
            text=Problem(**prepared["problem"]).digest,
            watcher=watcher,
            supervisor=jobs.supervisor(config, executor),
            surroundings=_House(folder, stopping, tracker, keeper, watcher),
        )
        with stopping.gracefully():
            ended = driver.run()
        if executor is not here:
            executor.close()  # others can use its nodes while this one machine tests
        journal.put("ended", ended)
        if ended == "stopped":
            state = "STOPPED"
            return
        from search.guard import evaluation  # its statistics take a while to import, and nothing before it needs them

        try:
            evaluation.conclude(folder, journal, here, watcher, opening=config.evaluate, final=config.final)
        except (RequestError, TrialFailed) as error:
            # The search itself is complete, and `heldout evaluate` can be tried again.
            if not (journal.get("evaluation") or {}).get("opened"):
                journal.put("evaluation", {"opened": False, "why": str(error), "openings": None})
            watcher.say(str(error))
        state = "COMPLETE"
    except (KeyboardInterrupt, StudyStopped):
        state = "STOPPED"
        raise StudyStopped(f"study {folder.name!r} was stopped; `heldout resume {folder.name}` goes on") from None
    finally:
        if journal.get("state") is not None:
            journal.put("state", state)
            if state != "STOPPED":
                from search.pages import page

                page.keep(folder, watcher)
            # Who stopped it waits at the terminal; what MLflow lacks then, it gets on resume.
            patience = {"timeout": _STOP_SECONDS} if state == "STOPPED" else {}
            if not tracker.finish(**patience):
                watcher.say(jobs.BEHIND)


class _House(Calm):
    """The surroundings of a study in a workspace."""

    def __init__(
        self, folder: Path, stopping: Stopping, tracker: publishing.Tracker, keeper: keeping.Keeper, watcher: Watcher
    ) -> None:
        self._folder, self._stopping, self._tracker = folder, stopping, tracker
        self._keeper, self._watcher = keeper, watcher
        self._overfull = False

    def stop(self) -> str | None:
        """As it was asked by a signal or from another terminal; and when it may hold no more."""
        return self._stopping.asked() or (FINISH if self._overfull else None)

    def lacks_room(self) -> str | None:
        """When less is free than must stay free."""
        return disk.lack(self._folder)

    def ended(self, trial: Trial) -> None:
        """What cannot win any more is deleted."""
        self._keeper.ended(trial)
        with contextlib.suppress(DiskFull):  # how many are kept is recorded first; the next trial tries again
            if not self._overfull and not self._keeper.fits(self._watcher.say):
                self._overfull = True
                self._watcher.say(
                    "the study's folder is at --max-disk with only what must be kept in it, so the search ends here; "
                    f"`heldout resume {self._folder.name} --max-disk SIZE` goes on with a larger limit"
                )

    def tick(self) -> None:
        """A tracker that died is started again."""
        self._tracker.tend()

"""Jobs around the trials: starting the executor for a space, running one job to its result, and their payloads."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from search import secrecy
from search.definition import assets
from search.definition.problem import DEFAULT_EPOCHS, Problem
from search.errors import RequestError, SpaceError, TrialFailed, request_error
from search.executors import NO_GPU, Executor, Exited, Job, Lost, Message, Slot, Warned
from search.executors.local import LocalExecutor
from search.harness import folding
from search.loop.pruners import Folds, Pruning, default_grace, get_pruner
from search.loop.watcher import Watcher
from search.processes import devices
from search.processes.supervision import Supervisor
from search.record import disk, places
from search.record.journal import Journal
from search.study import StudyConfig
from search.tiers import validation
from search.tracker import publishing
from search.trial import Trial

DISCOVERY_SECONDS = 20.0
BEHIND = "MLflow has not caught up yet; `heldout resume` or `evaluate` lets it, and the journal has everything"


def start_executor(
    slots: tuple[Slot, ...],
    problem: Problem,
    folder: Path,
    start_method: str | None,
    env: Sequence[str] = (),
    hold: Sequence[int] = (),
) -> LocalExecutor:
    """The local executor for one space, its template starting in the background.

    Args:
        folder: Gets the template's log.
        hold: As of ``LocalExecutor``.
        env: Names of the variables that are secrets of the space; see ``secrecy.resolve``.

    Raises:
        RequestError: If one of them is not to be had, or is in what will be recorded.
    """
    secrets = secrecy.resolve(env)
    secrecy.absent(secrets, problem.source, f"the space module {problem.path}")
    secrecy.absent(secrets, f"{problem.path} {folder}", "a path that is recorded")
    # A driver that was killed has left them as they were.
    for log in (folder / "template.log", *folder.glob("trials/*/log.txt")):
        secrecy.scrub_file(log)
    executor = LocalExecutor(
        slots,
        **processes(problem, start_method),
        log=folder / "template.log",
        template_threads=slots[0].threads,
        hold=hold,
        secrets=secrets,
    )
    executor.start()
    return executor


def processes(problem: Problem, start_method: str | None) -> dict[str, Any]:
    """How the processes for one space are made, as arguments of ``LocalExecutor``."""
    own = ["search.harness.training", "search.harness.worker", "search.harness.preflight"]
    path = [str(Path(problem.path).parent), os.getcwd()]
    return {"start_method": start_method, "preload": [*own, *problem.imports()], "path": path}


def supervisor(config: StudyConfig, executor: Executor) -> Supervisor:
    """Watches over jobs as the study was asked to."""
    patience = (config.trial_timeout, config.heartbeat or None)
    return Supervisor(*patience, executor.cpu_seconds, has_begun=executor.has_begun)


def pruning(config: StudyConfig, prepared: dict[str, Any], journal: Journal) -> Pruning:
    """Which trials stop early, as the study was asked to.

    Rungs must be the same for every trial of a study, and after a resume. So they follow from the plan and from the
    space as discovery found it, whatever number of epochs is found later; the baseline needs none.
    """
    epochs = config.epochs or prepared["epochs"] or DEFAULT_EPOCHS
    plan = validation.parse(config.validation)
    if plan.is_repeated:  # asks after a fold, and is judged by the mean of its folds
        asked = get_pruner(config.pruner), prepared["objective"], prepared["direction"]
        return Pruning(*asked, config.grace or 1, lambda: plan.count, Folds)

    def most() -> int:
        found = [event.id for event in journal.events() if event.kind == "space"]
        known = journal.space(found[-1]).parameters.values() if found and not config.epochs else ()
        return int(max([epochs, *(one.domain.high or 0 for one in known if one.name == "epochs")]))

    grace = config.grace or default_grace(epochs)
    return Pruning(get_pruner(config.pruner), prepared["objective"], prepared["direction"], grace, most)


def check_ends(config: StudyConfig, slots: Sequence[Slot]) -> None:
    """See that what shall end the search can be counted.

    Raises:
        RequestError: If hours of GPUs cannot, for want of one.
    """
    if config.max_gpu_hours is not None and not any(slot.gpus for slot in slots):
        raise RequestError(
            f"--max-gpu-hours {config.max_gpu_hours:g} counts GPUs, but trials here have none; use --timeout SECONDS"
        )


def slots(config: StudyConfig) -> tuple[Slot, ...]:
    """This machine's places for jobs; of a study on a cluster, one for those that stay here.

    Raises:
        RequestError: If what was asked for cannot be had, see ``devices.slots`` and ``check_ends``.
    """
    if config.ray is not None:
        found = devices.slots(None, config.gpus, None, None)
        return found[:1] if found[0].gpus else one_slot()
    found = devices.slots(config.workers, config.gpus, config.trials_per_gpu, config.gpus_per_trial)
    check_ends(config, found)
    return found


def one_slot() -> tuple[Slot, ...]:
    """A single CPU slot with all threads, for evaluation and export."""
    return devices.slots(1, "none", None, None)


def secrets_of(journal: Journal) -> tuple[str, ...]:
    """Names of the variables that the study's processes need; none in a study of an earlier release."""
    return tuple((journal.get("study").get("config") or {}).get("env") or ())


def publish(folder: Path, journal: Journal, watcher: Watcher) -> None:
    """Let MLflow catch up with what was put in the journal after the study's end."""
    study = places.study(journal.get("study"), folder.parent.parent)
    with publishing.start(folder, publishing.uri_of(study)) as tracker:
        if not tracker.finish():
            watcher.say(BEHIND)


def call(
    executor: Executor,
    job: Job,
    watcher: Watcher,
    slot: Slot | None = None,
    hear: Callable[[dict[str, Any]], None] = lambda _: None,
    supervisor: Supervisor | None = None,
) -> dict[str, Any]:
    """Run one job that is not a trial of the search and return its result.

    Args:
        hear: Is given every message of the job.
        supervisor: Says when it takes too long; None gives it all the time it takes.

    Raises:
        RequestError: The job's own, by its class, or SpaceError if its process died.
        TrialFailed: ``timeout``, if the supervisor says so.
    """
    executor.submit(job, slot)
    if supervisor is not None:
        supervisor.began(job.id, timed=True)
    result: dict[str, Any] | None = None
    lost = 0
    while True:
        for event in executor.poll(0.25):
            if isinstance(event, Warned):
                watcher.say(event.text)
            elif event.job != job.id:
                continue
            if isinstance(event, Message):
                hear(event.body)
                if supervisor is not None:
                    supervisor.heard(job.id)
            if isinstance(event, Message) and event.body["type"] == "failed":
                raise request_error(event.body.get("error"), event.body["message"])
            elif isinstance(event, Message) and event.body["type"] == "result":
                result = event.body
            elif isinstance(event, Lost) and result is None and (lost := lost + 1) < 3:
                job = dataclasses.replace(job, id=f"{job.id}-again")
                executor.submit(job, slot)
            elif isinstance(event, Exited | Lost):
                if result is None:
                    how = f"signal {event.signal}" if isinstance(event, Exited) and event.signal else "no answer"
                    raise SpaceError(f"the process for `{job.kind}` ended with {how}; it may have run out of memory")
                return result
        for _, why in supervisor.overdue() if supervisor is not None else ():
            executor.kill(job.id)
            raise TrialFailed("timeout", why)
        watcher.tick()


def prepare(
    executor: Executor,
    problem: Problem,
    workspace: Path,
    folder: Path,
    split_seed: int,
    watcher: Watcher,
    plan: str = validation.HOLDOUT,
) -> dict[str, Any]:
    """Load, split, seal and store the rows in a process of their own; see ``load_payload`` for the folders.

    Args:
        plan: Of validation; its index files go into ``folder``.
    """
    asked = load_payload(problem, workspace, folder, split_seed) | {"validation": plan}
    loaded = call(executor, Job("load", "load", asked, env=NO_GPU), watcher)
    prepared = completed(loaded, problem)
    for warning in prepared["manifest"]["warnings"]:
        watcher.say(warning)
    return prepared


def load_payload(problem: Problem, workspace: Path, folder: Path, split_seed: int) -> dict[str, Any]:
    """Of the ``load`` job: rows go into the workspace, where studies share them, preprocessing into ``folder``."""
    where = {"workspace": str(workspace), "folder": str(folder)}
    return where | {"problem": problem.to_json(), "split_seed": split_seed, "budget": budget()}


def completed(loaded: dict[str, Any], problem: Problem) -> dict[str, Any]:
    """What later jobs need to know of the loaded rows and the module's settings."""
    from search.scorer import scoring

    direction = scoring.direction_for(loaded["objective"], loaded["direction"])
    return {k: v for k, v in loaded.items() if k != "type"} | {"problem": problem.to_json(), "direction": direction}


def prepared_for(journal: Journal, trial: Trial) -> dict[str, Any]:
    """The journal's ``prepared``, with the module text and the preprocessing that this trial ran with.

    They differ between trials only in a study that was resumed with ``--accept-changes``.
    """
    prepared = places.prepared(journal)
    assets.restore(prepared.get("assets"), journal.path.parent)
    texts: dict[str, dict[str, Any]] | None = journal.get("texts")
    found = prepared if texts is None else _of_text(journal, prepared, texts, trial)
    own = places.preprocess(journal.path.parent, trial.number)
    return found | ({"preprocess": str(own)} if found["preprocess"] is None and own.exists() else {})


def _of_text(
    journal: Journal, prepared: dict[str, Any], texts: dict[str, dict[str, Any]], trial: Trial
) -> dict[str, Any]:
    found = prepared | texts[trial.text or journal.get("study")["space"]["digest"]]
    return found | places.located(found, journal.path.parent.absolute())


def split_of(prepared: dict[str, Any], seed: int) -> dict[str, Any]:
    """What the job of a trial with this seed is told of its splits; nothing where it is judged by the stored one."""
    found = prepared.get("validation")
    if found is None:
        return {}
    if validation.parse(found["plan"]).is_repeated:
        return {"folds": found}
    return {"part": {"folds": found, "seed": seed, "number": 0}}


def first_split(prepared: dict[str, Any]) -> dict[str, Any]:
    """The same for a job of one training that is no trial."""
    found = prepared.get("validation")
    if found is None:
        return {}
    own = prepared["preprocess"] and folding.preprocess_of(Path(found["folder"]), 0)
    return {"part": {"folds": found, "seed": 0, "number": 0}, "preprocess": own and str(own)}


def openings(prepared: dict[str, Any]) -> int:
    """How often the test rows have been opened so far, by any study."""
    from search.guard.ledger import Ledger
    from search.tiers.data import SealedRows

    manifest = prepared["manifest"]
    hashes = SealedRows(Path(prepared["sealed"])).row_hashes()
    return Ledger().openings(hashes, manifest["fingerprint"], prior=manifest["prior_openings"])


def base_payload(prepared: dict[str, Any], folder: Path, slots: int = 1) -> dict[str, Any]:
    """What every job that builds a model is handed; nothing in it leads to a sealed label.

    Args:
        slots: How many such jobs run at a time.
    """
    return {
        "problem": prepared["problem"],
        "rows": prepared["rows"],
        "preprocess": prepared["preprocess"],
        "assets": prepared.get("assets"),
        "objective": prepared["objective"],
        "direction": prepared["direction"],
        "budget": budget(slots),
        "folder": str(folder),
    }


def budget(slots: int = 1) -> int:
    """Bytes of rows that one slot may copy: an eighth of the machine's memory, shared by its cores or more slots.

    By cores where there are fewer slots, so that a trial trains in the same way whatever else runs. The variable
    ``HELDOUT_ROWS_IN_MEMORY`` sets it, as in ``64M``.
    """
    if given := os.environ.get("HELDOUT_ROWS_IN_MEMORY"):
        return disk.parse_size(given, "HELDOUT_ROWS_IN_MEMORY")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(memory // 8 // max(slots, os.cpu_count() or 1))

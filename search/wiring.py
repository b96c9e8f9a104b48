"""Wires a study together: executor, journal, tracker, driver, evaluation; and `check` and `try`."""

from __future__ import annotations

import getpass
import os
import tempfile
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from search import devices, publishing
from search import errors as error_classes
from search.driver import Driver, Silent, Watcher
from search.errors import ExecutorError, RequestError, SpaceError, StudyError
from search.executors import Executor, Exited, Job, Lost, Message, Slot, Warned
from search.executors.local import LocalExecutor
from search.journal import Journal
from search.problem import Problem, find
from search.samplers import get_sampler
from search.study import Study, StudyConfig, locked, make_workspace, release, reserve, workspace_folder
from search.trial import Trial, seed_for

DISCOVERY_SECONDS = 20.0
_BEHIND = "MLflow has not caught up yet; `heldout resume` or `evaluate` lets it, and the journal has everything"


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
    watcher = watcher or Silent()
    problem = find(config.space)
    get_sampler(config.sampler)
    slots = devices.slots(config.workers, config.gpus, config.trials_per_gpu, config.gpus_per_trial)
    workspace = workspace_folder(config.workspace)
    uri = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or publishing.default_uri(workspace)
    make_workspace(workspace)
    publishing.check_uri(uri)
    folder = reserve(workspace, config.study, problem.name)
    began = False
    try:
        with locked(folder), start_executor(slots, problem, folder, config.start_method) as executor:
            journal = Journal.create(folder / "journal.sqlite", {})
            try:
                with publishing.start(folder, uri) as tracker:
                    prepared = _prepare(executor, problem, workspace, config.split_seed, watcher)
                    journal.put("prepared", prepared)
                    journal.put("study", _study_meta(folder.name, config, problem, prepared, uri, workspace))
                    discovery = {"problem": problem.to_json(), "seconds": DISCOVERY_SECONDS}

                    def begin(preflight: dict[str, Any]) -> None:
                        nonlocal began
                        tracker.ready()
                        journal.put(
                            "preflight",
                            {key: preflight[key] for key in ("reported", "custom", "declaration", "size")},
                        )
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
    return Study(folder.name, workspace)


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
            f"study {found.name!r} never began, so there is nothing to resume; remove {found.folder} and "
            "launch it again"
        )
    if found.state == "COMPLETE":
        raise StudyError(f"study {found.name!r} is complete; see it with `heldout report {found.name}`")
    config = StudyConfig(**meta["config"])
    problem = Problem(**found.meta("prepared")["problem"])
    slots = devices.slots(config.workers, config.gpus, config.trials_per_gpu, config.gpus_per_trial)
    uri = publishing.uri_of(meta)
    publishing.check_uri(uri)
    with locked(found.folder), start_executor(slots, problem, found.folder, config.start_method) as executor:
        journal = Journal.open(found.folder / "journal.sqlite")
        try:
            journal.put("state", "RUNNING")
            discovery = None
            if not any(event.kind == "space" for event in journal.events()):
                discovery = {"problem": problem.to_json(), "seconds": DISCOVERY_SECONDS}
            with publishing.start(found.folder, uri) as tracker:
                _drive(found.folder, journal, executor, watcher, tracker, discovery, lambda _: None)
        finally:
            journal.close()
    return Study(found.name, found.workspace)


def check(space: str, *, watcher: Watcher | None = None, **options: Any) -> dict[str, Any]:
    """Say what would be searched, on which rows, and at what cost; starts no study.

    Returns:
        ``space`` (parameters with their domains), ``complete`` (whether discovery finished),
        ``configurations`` (None: without end), ``data`` (the manifest of the rows), ``objective``,
        ``direction``, ``reported``, ``size``, ``epochs``, ``epoch_seconds`` and ``estimate_seconds`` of the plan.

    Raises:
        RequestError: As ``launch`` would.
    """
    from search import scoring
    from search.space import Space

    config = StudyConfig(space=space, **options)
    watcher = watcher or Silent()
    problem = find(config.space)
    get_sampler(config.sampler)
    slots = devices.slots(config.workers, config.gpus, config.trials_per_gpu, config.gpus_per_trial)
    workspace = workspace_folder(config.workspace)
    make_workspace(workspace)
    with tempfile.TemporaryDirectory(prefix="heldout-check-") as scratch:
        with start_executor(slots, problem, Path(scratch), config.start_method) as executor:
            prepared = _prepare(executor, problem, workspace, config.split_seed, watcher)
            asked = {"problem": problem.to_json(), "seconds": DISCOVERY_SECONDS}
            found = call(executor, Job("discover", "discover", asked), watcher)
            payload = base_payload(prepared, Path(scratch)) | {
                "epochs": config.epochs,
                "seed": 0,
                "default": True,
            }
            seen = call(executor, Job("check", "check", payload), watcher, slot=executor.slots[0])
    discovered = Space.from_json(found["space"])
    epochs = config.epochs or discovered.defaults().get("epochs") or prepared["epochs"] or 30
    seconds = seen["first_epoch_seconds"] + (int(epochs) - 1) * seen["epoch_seconds"]
    return {
        "name": problem.name,
        "space": {key: p.domain.to_json() | {"conditions": p.conditions} for key, p in discovered.parameters.items()},
        "complete": found["complete"],
        "data": prepared["manifest"],
        "objective": prepared["objective"],
        "direction": scoring.direction_for(prepared["objective"], prepared["direction"]),
        "reported": seen["reported"],
        "size": seen["size"],
        "epochs": int(epochs),
        "epoch_seconds": seen["epoch_seconds"],
        "trials": config.trials,
        "slots": len(slots),
        "estimate_seconds": config.trials * seconds / len(slots),
    }


def try_params(
    space: str,
    params: Mapping[str, Any],
    *,
    epochs: int | None = None,
    seed: int = 0,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run one trial in this very process, recording nothing; exceptions of the module come through as they are.

    Args:
        params: Values by name; the rest are the defaults.
        say: Is given one line per epoch.

    Returns:
        ``params``, ``score``, ``epochs``, ``best_epoch`` and ``size``.
    """
    from search import worker
    from search.judge import RowJudge
    from search.space import Space

    StudyConfig(space=space, epochs=epochs, seed=seed)  # checks them
    problem = find(space)
    with tempfile.TemporaryDirectory(prefix="heldout-try-") as scratch:
        prepared = _completed(worker.load(_load_payload(problem, Path(scratch), 0), _unheard), problem)
        payload = base_payload(prepared, Path(scratch)) | {"epochs": epochs, "seed": seed_for(seed, 0)}
        payload |= {"named": dict(params), "default": True, "slot": one_slot()[0].to_json()}
        result = worker.trial(payload, lambda body: _say_epoch(body, say))
        known = Space.empty().grown(result["asks"])
        asked = known.params_of(result["asks"])
        for name, value in params.items():
            if name not in asked:
                raise SpaceError(f"{space} does not ask for {name!r} with these values; it asks for {', '.join(asked)}")
            if asked[name] != value:
                raise SpaceError(f"{name} must be in {known.parameters[name].domain}, but got {value!r}")
        judge = RowJudge(Path(prepared["rows"]), Path(prepared["sealed"]), prepared["objective"], problem.to_json())
        verdict = judge.judge(result)
        if isinstance(verdict, dict):
            verdict = judge.settle(worker.score(verdict, _unheard))
    return {"params": dict(asked), "score": verdict.score} | {k: result[k] for k in ("epochs", "best_epoch", "size")}


def _unheard(_: dict[str, Any]) -> None:
    """These jobs send nothing but their result."""


def _say_epoch(body: dict[str, Any], say: Callable[[str], None] | None) -> None:
    if say is not None and body["type"] == "report":
        say(f"epoch {body['step']}: " + ", ".join(f"{name} {value:.4g}" for name, value in body["metrics"].items()))


# ── the parts ────────────────────────────────────────────────────────────────────────────────────


def start_executor(slots: tuple[Slot, ...], problem: Problem, folder: Path, start_method: str | None) -> LocalExecutor:
    """The local executor for one space, its template starting in the background."""
    executor = LocalExecutor(
        slots,
        start_method=start_method,
        preload=["search.training", "search.worker", "search.preflight", *problem.imports()],
        path=[str(Path(problem.path).parent), os.getcwd()],
        log=folder / "template.log",
        template_threads=slots[0].threads,
    )
    executor.start()
    return executor


def one_slot() -> tuple[Slot, ...]:
    """A single CPU slot with all threads, for evaluation and export."""
    return devices.slots(1, "none", None, None)


def publish(folder: Path, journal: Journal, watcher: Watcher) -> None:
    """Let MLflow catch up with what was put in the journal after the study's end."""
    with publishing.start(folder, publishing.uri_of(journal.get("study"))) as tracker:
        if not tracker.finish():
            watcher.say(_BEHIND)


def call(executor: Executor, job: Job, watcher: Watcher, slot: Slot | None = None) -> dict[str, Any]:
    """Run one job that is not a trial and return its result.

    Raises:
        RequestError: The job's own, by its class, or SpaceError if its process died.
    """
    executor.submit(job, slot)
    result: dict[str, Any] | None = None
    while True:
        for event in executor.poll(0.25):
            if isinstance(event, Warned):
                watcher.say(event.text)
            elif event.job != job.id:
                continue
            elif isinstance(event, Message) and event.body["type"] == "failed":
                kind = getattr(error_classes, event.body.get("error") or "", SpaceError)
                raise kind(event.body["message"])
            elif isinstance(event, Message) and event.body["type"] == "result":
                result = event.body
            elif isinstance(event, Exited | Lost):
                if result is None:
                    how = f"signal {event.signal}" if isinstance(event, Exited) and event.signal else "no answer"
                    raise SpaceError(f"the process for `{job.kind}` ended with {how}; it may have run out of memory")
                return result
        watcher.tick()


def _prepare(
    executor: Executor, problem: Problem, workspace: Path, split_seed: int, watcher: Watcher
) -> dict[str, Any]:
    """Load, split, seal and store the rows in a process of their own."""
    loaded = call(executor, Job("load", "load", _load_payload(problem, workspace, split_seed)), watcher)
    prepared = _completed(loaded, problem)
    for warning in prepared["manifest"]["warnings"]:
        watcher.say(warning)
    return prepared


def _load_payload(problem: Problem, workspace: Path, split_seed: int) -> dict[str, Any]:
    return {"problem": problem.to_json(), "workspace": str(workspace), "split_seed": split_seed}


def _completed(loaded: dict[str, Any], problem: Problem) -> dict[str, Any]:
    from search import scoring

    direction = scoring.direction_for(loaded["objective"], loaded["direction"])
    return {k: v for k, v in loaded.items() if k != "type"} | {
        "problem": problem.to_json(),
        "direction": direction,
    }


def base_payload(prepared: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What every job that builds a model is handed; nothing in it leads to a sealed label."""
    return {
        "problem": prepared["problem"],
        "rows": prepared["rows"],
        "preprocess": prepared["preprocess"],
        "objective": prepared["objective"],
        "direction": prepared["direction"],
        "budget": _budget(),
        "folder": str(folder),
    }


def _budget() -> int:
    """Bytes of rows that one slot may copy: an eighth of the machine's memory, shared by its cores."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(memory // 8 // (os.cpu_count() or 1))


def _study_meta(
    name: str, config: StudyConfig, problem: Problem, prepared: dict[str, Any], uri: str, workspace: Path
) -> dict[str, Any]:
    return {
        "name": name,
        "study_id": uuid.uuid4().hex,
        "space": {
            "name": problem.name,
            "path": problem.path,
            "digest": problem.digest,
            "source": problem.source,
        },
        "objective": prepared["objective"],
        "direction": prepared["direction"],
        "config": config.to_json() | {"tracking_uri": None},
        "user": getpass.getuser(),
        "tags": dict(config.tags),
        "versions": prepared["versions"],
        "tracking_uri": publishing.redacted(uri),
        "tracking_secret": publishing.redacted(uri) != uri,
        "artifact_root": str(workspace / "artifacts"),
        "data": {key: prepared["manifest"][key] for key in ("digest", "fingerprint", "rows", "tiers")},
    }


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

    meta, prepared = journal.get("study"), journal.get("prepared")
    config = StudyConfig(**meta["config"])
    judge = RowJudge(Path(prepared["rows"]), Path(prepared["sealed"]), prepared["objective"], prepared["problem"])

    def payload(trial: Trial, proposal: dict[str, Any] | None) -> dict[str, Any]:
        place = folder / "trials" / f"{trial.number:04d}"
        place.mkdir(parents=True, exist_ok=True)
        return base_payload(prepared, place) | {
            "epochs": config.epochs,
            "seed": trial.seed,
            "proposal": proposal,
            "default": trial.number == 0,
            "preflight": trial.number == 0 and discovery is not None,
            "log": str(place / "log.txt"),
        }

    state = "FAILED"
    try:
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
            watcher=watcher,
        )
        journal.put("ended", driver.run())
        if config.evaluate != "no":
            from search import evaluation

            try:
                evaluation.open_test(folder, journal, executor, watcher, again=config.evaluate == "yes")
            except RequestError as error:  # the search itself is complete, and `heldout evaluate` can be tried again
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
                watcher.say(_BEHIND)

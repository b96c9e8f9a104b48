"""Resuming a study: the same plan or a longer one, and the same module, or a changed one that was agreed to."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import math
import re
from pathlib import Path
from typing import Any

from search.cluster.launching import spread
from search.definition import assets
from search.definition.problem import Problem, find
from search.definition.space import Space
from search.errors import DataError, RequestError, StudyError
from search.executors import NO_GPU, Executor, Job
from search.guard.ledger import times
from search.loop.enqueueing import begun, unbegun
from search.loop.stopping import Stopping
from search.loop.watcher import Silent, Watcher
from search.processes import jobs
from search.record import disk, journal_file, places
from search.record.journal import Journal
from search.record.lock import locked
from search.samplers import get_sampler
from search.study import Study, StudyConfig, config_of
from search.tracker import board, publishing
from search.trial import searched
from search.wiring import drive

_MOST_LINES = 40  # of a difference that is shown


def resume(
    study: str,
    *,
    trials: str | int | None = None,
    evaluate: str | None = None,
    max_disk: str | None = None,
    timeout: float | None = None,
    stop_after_stale: int | None = None,
    max_gpu_hours: float | None = None,
    target: float | None = None,
    accept_changes: bool = False,
    ray: str | None = None,
    max_slots: int | None = None,
    workspace: str | None = None,
    watcher: Watcher | None = None,
) -> Study:
    """Continue a study where it stopped, or extend it; trials that were in flight run again as they were.

    Args:
        trials: A new number of trials in all, or ``"+40"`` for so many more; None keeps the plan.
        evaluate: A new word on the test rows, as in ``StudyConfig``; None keeps the recorded one.
        max_disk, timeout, stop_after_stale, max_gpu_hours, target: New limits, as in ``StudyConfig``.
        accept_changes: Go on with the space module as it is now, if it was changed.
        ray: Another cluster, as in ``StudyConfig``, or ``"none"`` for this machine alone; max_slots: of it.

    Raises:
        StudyError: If there is no such study, it is being driven, it is complete, or its module has changed.
        StudyFailed: As for ``launch``.
    """
    found = Study(study, workspace)
    watcher = watcher or Silent()
    meta = found.meta("study")
    if meta is None or found.meta("state") is None:
        raise StudyError(
            f"study {found.name!r} never began, so there is nothing to resume; launch it again under its name"
        )
    with found.journal() as journal:
        before = config_of(journal)
    given: dict[str, Any] = {"evaluate": evaluate, "max_disk": max_disk, "timeout": timeout, "target": target}
    given |= {"stop_after_stale": stop_after_stale, "max_gpu_hours": max_gpu_hours, "ray": ray}
    given["max_slots"] = max_slots
    asked = dataclasses.replace(before, **{key: value for key, value in given.items() if value is not None})
    get_sampler(asked.sampler)  # it may need a package that is not here
    if asked.tensorboard:
        board.check_installed()
    recorded = Problem(**found.meta("prepared")["problem"])
    problem = _current(recorded, accept_changes, found.name, watcher)
    is_changed = problem.digest != recorded.digest or _assets_changed(found, accept_changes)
    slots = jobs.slots(asked)
    uri = publishing.uri_of(places.study(meta, found.workspace))
    disk.check(found.folder)
    if (away := publishing.check_uri(uri, must_answer=False)) is not None:
        watcher.say(f"{away}; going on without it, and MLflow gets everything once it is back")
    with locked(found.folder) as hold, Stopping(found.folder) as stopping, contextlib.ExitStack() as stack:
        journal_file.back_up(found.folder / "journal.sqlite")
        journal = stack.enter_context(Journal.open(found.folder / "journal.sqlite"))
        plan = _plan(found.name, journal, asked, trials)
        if found.meta("state") == "COMPLETE" and plan.ends == before.ends:
            shown = publishing.read(found.folder)
            # Not what it says to be behind by: a tracker that was still starting has not said anything since.
            if shown.get("status") != "FINISHED" or shown.get("published", 0) < journal.length:
                watcher.say("the study is complete; MLflow catches up")
                jobs.publish(found.folder, journal, watcher)
                return Study(found.name, found.workspace)
            raise StudyError(
                f"study {found.name!r} is complete; see it with `heldout report {found.name}`, or extend it with "
                f"`heldout resume {found.name} --trials +N`"
            )
        if found.meta("state") == "COMPLETE":
            _see_it_goes_on(found.name, journal, plan)
        with (
            jobs.start_executor(slots, problem, found.folder, plan.start_method, plan.env, (hold,)) as here,
            spread(here, plan, problem, found.folder, watcher) as executor,
        ):
            if is_changed:
                _adopt(journal, here, found, recorded, problem, plan, watcher)
            with journal.one_commit():
                if plan != before:
                    journal.put("plan", {key: getattr(plan, key) for key in ("trials", *given)})
                journal.put("ended", None)
                journal.put("state", "RUNNING")
            _say_what_is_left(journal, plan, watcher)
            discovery = None
            if not any(event.kind == "space" for event in journal.events()):
                discovery = {"problem": problem.to_json(), "seconds": jobs.DISCOVERY_SECONDS}
            with publishing.start(found.folder, uri) as tracker:
                drive(found.folder, journal, executor, here, watcher, tracker, stopping, discovery, lambda _: None)
    return Study(found.name, found.workspace)


def extended(config: StudyConfig, trials: str | int | None) -> StudyConfig:
    """The configuration with so many trials in all, or with ``"+N"`` more; as it is for None.

    Raises:
        RequestError: If that is no number.
    """
    if trials is None:
        return config
    given = re.fullmatch(r"(\+?)([1-9]\d*)", str(trials).strip())
    if given is None:
        raise RequestError(f"--trials must be a number of trials in all, or +N for N more, but got {trials!r}")
    wanted = int(given[2]) + (config.trials if given[1] else 0)
    return dataclasses.replace(config, trials=wanted)


def _plan(name: str, journal: Journal, config: StudyConfig, trials: str | int | None) -> StudyConfig:
    """The configuration with the new number of trials.

    Raises:
        RequestError: As ``extended``, or if they are fewer than the study has.
    """
    plan, has = extended(config, trials), len(searched(journal.history()))
    if trials is not None and plan.trials < has:
        raise RequestError(
            f"--trials must be at least {has}, the trials that study {name!r} has, but got {plan.trials}"
        )
    return plan


def _see_it_goes_on(name: str, journal: Journal, plan: StudyConfig) -> None:
    """See that a complete study's search goes on by its new plan.

    Raises:
        StudyError: If another of its ends is reached all the same.
    """
    history = begun(journal.history())
    end = plan.ends.reached(history, journal.get("study")["direction"], 0.0, math.inf)
    if end is not None:
        why = plan.ends.because(end, len(searched(history))) or "had all its trials (--trials)"
        raise StudyError(f"study {name!r} would begin no further trial, as it has {why}; extend that as well")


def _say_what_is_left(journal: Journal, plan: StudyConfig, watcher: Watcher) -> None:
    history = journal.history()
    queued = unbegun(history)
    again = [trial.number for trial in history if not trial.state.is_finished and trial not in queued]
    more = plan.trials - len(searched(history)) + len(queued)
    parts = [f"trial{'s' if len(again) > 1 else ''} {', '.join(map(str, again))} run again"] if again else []
    parts += [f"{more} of {plan.trials} trials are still to come"] if more > 0 else []
    if parts:
        watcher.say(f"resuming: {'; '.join(parts)}")
    if more > 0 and (opened := jobs.openings(places.prepared(journal))):
        then = (
            "its new winner will be tested as the next opening"
            if plan.evaluate == "yes"
            else "they stay sealed to the extended study until `heldout evaluate` opens them once more"
        )
        watcher.say(
            f"these test rows have been opened {times(opened)} so far, by any study: testing what follows costs "
            f"another opening, with a wider interval; {then}"
        )


# ── a changed module ─────────────────────────────────────────────────────────────────────────────


def _current(recorded: Problem, accept: bool, name: str, watcher: Watcher) -> Problem:
    """The module to go on with: as recorded, unless it was changed and the change is accepted.

    Raises:
        StudyError: If it was changed and that is not accepted; shows the difference.
    """
    if not Path(recorded.path).is_file():
        watcher.say(f"there is no {recorded.path} any more: going on with the text that the study has recorded")
        return recorded
    try:
        now = find(recorded.path)
    except RequestError as error:
        raise StudyError(f"the space module must be as it was or valid, but {error}; mend it, or restore it") from None
    if _meaning(now) == _meaning(recorded):  # a comment is no change
        return recorded
    if accept:
        return now
    lines = difflib.unified_diff(
        recorded.source.splitlines(), now.source.splitlines(), "as the study has it", "as it is now", n=1, lineterm=""
    )
    shown = list(lines)
    cut = [f"… and {len(shown) - _MOST_LINES} lines more"] if len(shown) > _MOST_LINES else []
    raise StudyError(
        f"the space module of study {name!r} must be unchanged, but {recorded.path} differs; restore it, launch a new "
        "study, or go on with the changed one by --accept-changes:\n" + "\n".join([*shown[:_MOST_LINES], *cut])
    )


def _assets_changed(study: Study, accept: bool) -> bool:
    """Whether assets of the study are other ones now, and that is accepted.

    Raises:
        StudyError: If that is not accepted.
    """
    found = assets.changed(study.meta("prepared").get("assets"))
    if found and not accept:
        raise StudyError(
            f"the assets of study {study.name!r} must be unchanged, but {', '.join(found)} was changed; put back the "
            f"copy in {study.folder / assets.COPIES}, launch a new study, or go on with what is there by "
            "--accept-changes"
        )
    return bool(found)


def _meaning(problem: Problem) -> str:
    tree = ast.parse(problem.source)
    for node in ast.walk(tree):  # a docstring is no change either
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.dump(tree)


def _adopt(
    journal: Journal,
    executor: Executor,
    study: Study,
    recorded: Problem,
    problem: Problem,
    plan: StudyConfig,
    watcher: Watcher,
) -> None:
    """Make a changed module the study's, after trying it: rows as they were, a space, a model that trains.

    Trials that have ended keep the text that they ran, for exports and refits of their models.

    Raises:
        RequestError: If the module does not work, or its rows, objective or direction are not the study's.
    """
    what = "the space module" if problem.digest != recorded.digest else "an asset of the space module"
    watcher.say(f"{what} has changed: loading its rows and building its default model")
    old = places.prepared(journal)
    place = study.folder / places.TEXTS / problem.digest[:12]
    place.mkdir(parents=True, exist_ok=True)
    rows = study.workspace, place, plan.split_seed, watcher, plan.validation
    new = jobs.prepare(executor, problem, *rows)
    for what, then, now in (
        ("rows", old["manifest"]["digest"], new["manifest"]["digest"]),
        ("objective", old["objective"], new["objective"]),
        ("direction", old["direction"], new["direction"]),
    ):
        if then != now:
            raise DataError(
                f"a study keeps its {what}, but the changed module has other {what} ({now[:40]} in place of "
                f"{then[:40]}); launch a new study for it"
            )
    asked = {"problem": problem.to_json(), "seconds": jobs.DISCOVERY_SECONDS}
    found = jobs.call(executor, Job("discover", "discover", asked, env=NO_GPU), watcher)
    payload = jobs.base_payload(new, place) | {"epochs": 1, "seed": plan.seed, "default": True}
    payload |= jobs.first_split(new)
    jobs.call(executor, Job("check", "check", payload), watcher, slot=executor.slots[0])
    kept = ("problem", "preprocess", "validation")
    texts = journal.get("texts") or {journal.get("study")["space"]["digest"]: {key: old[key] for key in kept}}
    texts.setdefault(recorded.digest, {key: old[key] for key in kept})
    # A text that was taken back before keeps its preprocessing, since models were trained on it.
    new |= texts.setdefault(problem.digest, {key: new[key] for key in kept})
    assets.keep(new["assets"], study.folder)
    with journal.one_commit():
        journal.adopt(journal.space().succeeded_by(Space.from_json(found["space"])))
        journal.put("texts", texts)
        journal.put("prepared", new)

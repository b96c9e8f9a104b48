"""Rehearsals: `check` and `try`, which do what a study would do and record nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from search.checks import cost
from search.definition.problem import DEFAULT_EPOCHS, find
from search.definition.space import Ask, Space
from search.errors import SpaceError
from search.executors import NO_GPU, Executor, Job
from search.guard import verdicts
from search.loop.pruners import get_pruner
from search.loop.watcher import Silent, Watcher
from search.processes import devices, jobs
from search.samplers import check_space, get_sampler
from search.scorer.judge import check_tiers
from search.study import StudyConfig, make_workspace, workspace_folder
from search.tiers.validation import parse
from search.trial import Value, seed_for


def check(space: str, *, sanity: bool = False, watcher: Watcher | None = None, **options: Any) -> dict[str, Any]:
    """Say what would be searched, on which rows, and at what cost; starts no study.

    Args:
        sanity: Also see whether the default model can do what it must (see ``checks/sanity.py`` and
            ``checks/withholding.py``).

    Returns:
        ``space`` (parameters with their domains), ``complete`` (whether discovery finished), ``notes`` (on how it
        is declared), ``data`` (the manifest of the rows), ``objective``, ``direction``, ``reported``,
        ``disagreement`` (see ``scoring.disagreement_line``), ``size``, ``trials``, ``validation`` (the plan, see
        ``folds.write``, or None), ``confirmation`` (trainings after them), ``slots``, ``epochs``, ``epoch_seconds`` of
        the default model, ``estimate_seconds`` of the plan, were all trainings like it, ``openings`` (of the test rows
        so far), ``shows`` (the smallest gain and gap that the next one could show), and ``sanity``: None, or its
        ``findings`` and the ``cost`` (see ``cost.of_study``).

    Raises:
        RequestError: As ``launch`` would.
    """

    began = time.monotonic()
    config = StudyConfig(space=space, **options)
    watcher = watcher or Silent()
    problem = find(config.space)
    chosen = get_sampler(config.sampler)
    get_pruner(config.pruner)
    slots = devices.slots(config.workers, config.gpus, config.trials_per_gpu, config.gpus_per_trial)
    jobs.check_ends(config, slots)
    workspace = workspace_folder(config.workspace)
    make_workspace(workspace)
    with tempfile.TemporaryDirectory(prefix="heldout-check-") as scratch:
        starting = (slots, problem, Path(scratch), config.start_method, config.env)
        with jobs.start_executor(*starting) as executor:
            # Not to the watcher: the answer has the warnings, in its manifest.
            rows = workspace, Path(scratch), config.split_seed, Silent(), config.validation
            prepared = jobs.prepare(executor, problem, *rows)
            asked = {"problem": problem.to_json(), "seconds": jobs.DISCOVERY_SECONDS}
            found = jobs.call(executor, Job("discover", "discover", asked, env=NO_GPU), watcher)
            discovered = Space.from_json(found["space"])
            check_space(chosen, discovered)
            payload = jobs.base_payload(prepared, Path(scratch)) | {
                "epochs": config.epochs,
                "seed": 0,
                "default": True,
                "deterministic": config.deterministic,
                **jobs.first_split(prepared),
                "measured": sanity,
            }
            ready = time.monotonic()
            seen = jobs.call(executor, Job("check", "check", payload), watcher, slot=executor.slots[0])
            trial = time.monotonic() - ready  # a process, a model, preflight in place of prediction, two epochs
            findings = _findings(executor, payload, prepared, watcher) if sanity else []
    check_tiers(Path(prepared["rows"]), Path(prepared["sealed"]), prepared["objective"], seen["declaration"])
    epochs = config.epochs or discovered.defaults().get("epochs") or prepared["epochs"] or DEFAULT_EPOCHS
    again, tiers = config.confirmation(), prepared["manifest"]["tiers"]
    opened = jobs.openings(prepared)
    planned = verdicts.planned(seen["objective_kind"], tiers["guard"], tiers["test"], opened + 1)
    seconds = (trial + (int(epochs) - 2) * seen["epoch_seconds"]) * parse(config.validation).trainings
    total = ready - began + (config.trials + again.runs) * max(seconds, 0.0) / len(slots)
    looked_at = None
    if sanity:
        stored = [Path(prepared["rows"]), Path(prepared["sealed"])]
        costs = cost.of_study(seen, tiers, config.trials, again, int(epochs), slots, total, stored)
        looked_at = {"findings": [*findings, cost.judged(costs, len(slots))], "cost": costs}
    return {
        "name": problem.name,
        "space": {key: p.domain.to_json() | {"conditions": p.conditions} for key, p in discovered.parameters.items()},
        "complete": found["complete"],
        "notes": found["notes"],
        "data": prepared["manifest"],
        "objective": prepared["objective"],
        "direction": prepared["direction"],
        "reported": seen["reported"],
        "disagreement": seen["disagreement"],
        "size": seen["size"],
        "epochs": int(epochs),
        "epoch_seconds": seen["epoch_seconds"],
        "trials": config.trials,
        "validation": prepared["validation"],
        "openings": opened,
        "shows": None if planned is None else dataclasses.asdict(planned),
        "confirmation": {"finalists": again.finalists, "seeds": again.seeds, "runs": again.runs},
        "slots": len(slots),
        "estimate_seconds": total,
        "sanity": looked_at,
    }


def _findings(
    executor: Executor, payload: dict[str, Any], prepared: dict[str, Any], watcher: Watcher
) -> list[dict[str, Any]]:
    """What the sanity checks found, each job in a process of its own."""
    watcher.say("looking at the default model: its first loss, and whether it can learn a few rows by heart")
    learning = jobs.call(executor, Job("sanity", "sanity", payload), watcher, slot=executor.slots[0])
    watcher.say("fitting the preprocessing again with other rows changed")
    asked = {name: prepared[name] for name in ("problem", "rows", "sealed")}
    fitting = jobs.call(executor, Job("withhold", "withhold", asked, env=NO_GPU), watcher)
    return [*learning["findings"], *fitting["findings"]]


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
    from search.harness import worker
    from search.scorer.judge import RowJudge

    StudyConfig(space=space, epochs=epochs, seed=seed)  # checks them
    problem = find(space)
    sys.path.append(os.getcwd())  # as in a trial's process
    with contextlib.suppress(RuntimeError):  # too late in a notebook that has used TensorFlow before
        devices.apply(jobs.one_slot()[0].to_json())
    with tempfile.TemporaryDirectory(prefix="heldout-try-") as scratch:
        asked = jobs.load_payload(problem, Path(scratch), Path(scratch), 0)
        prepared = jobs.completed(worker.load(asked, _unheard), problem)
        payload = jobs.base_payload(prepared, Path(scratch)) | {"epochs": epochs, "seed": seed_for(seed, 0)}
        payload |= {"named": dict(params), "default": True}

        def heard(body: dict[str, Any]) -> None:
            if body["type"] == "asks":  # a wrong value is said before it is trained without
                _checked(params, body["asks"])
            elif body["type"] == "report" and say is not None:
                metrics = ", ".join(f"{name} {value:.4g}" for name, value in body["metrics"].items())
                say(f"epoch {body['step']}: {metrics}")

        result = worker.trial(payload, heard)
        known = _checked(params, result["asks"])
        for name in params:
            if name not in known:
                raise SpaceError(f"{space} does not ask for {name!r} with these values; it asks for {', '.join(known)}")
        judge = RowJudge(Path(prepared["rows"]), Path(prepared["sealed"]), prepared["objective"], problem.to_json())
        verdict = judge.judge(result)
        if isinstance(verdict, dict):
            verdict = judge.settle(worker.score(verdict, _unheard))
    return {"params": known, "score": verdict.score} | {k: result[k] for k in ("epochs", "best_epoch", "size")}


def _unheard(_: dict[str, Any]) -> None:
    """These jobs send nothing but their result."""


def _checked(params: Mapping[str, Any], asks: Sequence[Ask]) -> dict[str, Value]:
    """What was asked for, if every given value was installed.

    Raises:
        SpaceError: If a value is outside its domain, so that another stood in for it.
    """
    known = Space.empty().grown(asks)
    asked = known.params_of(asks)
    for name, value in params.items():
        if name in asked and asked[name] != value:
            raise SpaceError(f"{name} must be in {known.parameters[name].domain}, but got {value!r}")
    return asked

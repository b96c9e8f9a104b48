"""The refit: a configuration that was selected is trained once more, on rows that the search had to do without."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from search.definition.space import Ask, Space
from search.errors import DataError, RequestError
from search.executors import Executor, Job
from search.loop.watcher import Watcher
from search.processes import jobs
from search.record.journal import Journal
from search.tiers import store
from search.trial import Trial, TrialState

RETRAIN = ("train", "validation", "guard")
ALL = (*RETRAIN, "test")


def runs(trials: Sequence[Trial], trial: Trial) -> list[Trial]:
    """The complete trainings of one trial's configuration: the search's own, and those that confirm it."""
    return [t for t in trials if t.configuration == trial.configuration and t.state is TrialState.COMPLETE]


def epochs_for(trials: Sequence[Trial]) -> int:
    """How many epochs a refit trains: the median, rounded up, of the best epochs of these runs.

    Without validation rows nothing can choose the epoch of a refit, so the number that the validation rows chose
    before is kept. An epoch over more rows has more steps, which is left so. A run whose best epoch is not known
    counts with all its epochs.

    Args:
        trials: Complete trainings of one configuration, see ``runs``.

    Raises:
        RequestError: If no run reported an epoch.
    """
    found = [trial.best_epoch or trial.epochs for trial in trials]
    counts = [count for count in found if count]
    if not counts:
        raise RequestError(
            "a refit trains as many epochs as its trial did, but that reported none; "
            "let the module's fit hand `callbacks` to model.fit, and launch the study again"
        )
    return math.ceil(statistics.median(counts))


def refit(
    journal: Journal,
    executor: Executor,
    watcher: Watcher,
    trial: Trial,
    path: Path,
    *,
    tiers: tuple[str, ...],
    epochs: int,
) -> dict[str, Any]:
    """Train a trial's configuration anew on the rows of ``tiers``, and write it as one ``.keras`` file.

    The one training that is ever given sealed labels; to be called only when the selection is frozen, since a
    choice that came after it could not be tested any more. It runs in a process of its own, with the trial's seed, on
    a copy of the rows that lies among the sealed ones and is removed afterwards. Preprocessing is fitted anew and is
    part of the file. The last epoch's weights are kept: the old validation rows are trained on, so early stopping and
    checkpoints, also the module's own, are left out.

    Args:
        path: The file to write; its folder gets the log.
        tiers: ``RETRAIN`` or ``ALL``.
        epochs: See ``epochs_for``.

    Returns:
        What ``freezing.build_file`` does, and ``epochs`` and ``rows`` trained.

    Raises:
        DataError: If the copy of the rows cannot be made.
        RequestError: If the training fails, or the recorded parameters no longer build the recorded model.
    """
    prepared, space = jobs.prepared_for(journal, trial), journal.space()
    home, sealed = Path(prepared["rows"]), Path(prepared["sealed"])
    # Not in the study's folder: if this process is killed, the labels stay where labels are sealed.
    with tempfile.TemporaryDirectory(prefix=".refit-", dir=sealed.parent) as scratch:
        try:
            store.merged(home, sealed, tiers, Path(scratch))
        except OSError as error:
            raise DataError(
                f"a refit copies its rows to {sealed.parent}, but {error.strerror or error}; make room there"
            ) from error
        payload = jobs.base_payload(prepared, Path(scratch)) | {
            "rows": scratch,
            "seed": trial.seed,
            "proposal": space.proposal(trial.params),
            "epochs": epochs,
            "deterministic": (journal.get("study").get("config") or {}).get("deterministic", False),
            "out": str(path),
        }
        job = Job(f"refit-{trial.number}", "refit", payload, log=str(path.parent / "refit.log"))
        built = jobs.call(executor, job, watcher, slot=executor.slots[0])
    check_parameters(space, trial, built["asks"])
    return {key: built[key] for key in ("declaration", "custom", "size", "flops", "checked", "epochs", "rows")}


def check_parameters(space: Space, trial: Trial, asks: Sequence[Ask]) -> None:
    """See that a model built again asked for what its trial had.

    What only ``fit`` or ``callbacks`` asked for, such as a batch size, may be missing.

    Raises:
        RequestError: Otherwise.
    """
    asked: Mapping[str, Any] = space.grown(asks).params_of(asks)
    if asked != {key: trial.params.get(key) for key in asked}:
        raise RequestError(
            f"trial {trial.number} had the parameters {dict(trial.params)}, but its space now asks for {asked}"
        )

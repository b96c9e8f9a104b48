"""StudyConfig, parsed and checked once; naming, opening, listing and locking studies."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search import secrecy
from search.definition.space import Space
from search.errors import RequestError, StudyError
from search.guard.finalists import SEEDS, Confirmation, confirmation
from search.loop.ends import Ends
from search.loop.keeping import KEEP
from search.record import disk, journal_file
from search.record.journal import Journal
from search.record.lock import driver_of
from search.samplers import AUTO, default_for
from search.tiers.validation import HOLDOUT, parse
from search.trial import Trial, best

if TYPE_CHECKING:
    import pandas

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class StudyConfig:
    """What was asked for, with every value checked.

    Attributes:
        space: Path, dotted name, or short name of the space module.
        trials: Trials in all, the baseline included.
        sampler: Name in ``samplers.SAMPLERS``; ``"auto"`` becomes the one that measured best for so many trials.
        enqueue: File of configurations to try first, or None.
        warm_start: Names of studies whose best configurations are tried first, and whose history samplers learn from.
        warm_start_other_data: Allows studies of other rows, or of another split; marks this study for it.
        pruner: Name in ``pruners.PRUNERS``.
        grace: Epochs that every trial gets before the pruner may stop it; None for a tenth of what trials have.
        timeout: Seconds of trials running, in all launches and resumes, after which no further one begins; or None.
        stop_after_stale: The same after so many trials in a row without a gain above one standard error, or None.
        max_gpu_hours: The same after so many hours of GPUs, or None.
        target: The same once a validation score has reached it, or None.
        workers: CPU slots, or None for one per core.
        gpus: ``"auto"``, ``"none"``, or device numbers such as ``"0,1"``.
        trials_per_gpu: Trials that share one GPU.
        gpus_per_trial: GPUs that one trial gets.
        ray: Runs trials on a Ray cluster: ``"local"`` for a private one, ``"auto"`` or ``"HOST:PORT"``; else None.
        max_slots: Trials at a time on that cluster at most; None for ``connecting.MOST_SLOTS`` where others use it too.
        seed: Of proposals and trainings; never moves a row between tiers.
        split_seed: Of the split of rows into tiers.
        validation: How a configuration is judged, see ``validation.parse``: by the stored split (``"holdout"``), by
            folds (``"kfold:5"``), by several splits (``"repeated:3"``) or by one of its own (``"reshuffle"``).
        study: The study's name, or None for the space's name and a number.
        epochs: Overrides the module's number of epochs.
        trial_timeout: Seconds that a training may take, or None.
        heartbeat: Seconds without a word and without CPU time after which a training counts as hung; 0 for never.
        deterministic: Trains with the backend's deterministic operations alone.
        checkpoint_minutes: Between checkpoints that a trial which runs again continues from; None makes none.
        tensorboard: Trials also write logs that ``heldout tensorboard`` shows.
        confirm: Configurations that are trained again after the search, 0 for none; None for one in ten trials,
            ten at most, while that is no more than a third of all trainings.
        confirm_seeds: Trainings of each of them and of the baseline.
        final: ``"retrain"`` refits winner and baseline on train, validation and guard rows before they are tested.
        evaluate: ``"auto"`` opens test rows that no study has opened, ``"yes"`` opens them again,
            ``"no"`` leaves them sealed.
        start_method: ``"fork"`` or ``"spawn"``, or None for what the platform has.
        env: Names of the variables that trials get and nothing shows: secrets. Their values are recorded nowhere.
        keep: How many of the search's models are kept on disk, the best by validation score; None for all. The
            winner is chosen among these, the baseline's and the confirming ones.
        max_disk: The most that the study's folder may hold, such as ``"20G"``, or None.
        tags: Put on every MLflow run of the study.
        workspace: The one folder that everything is written under.
        tracking_uri: MLflow's, or None for the workspace's own SQLite file.

    Raises:
        RequestError: If a value cannot be meant.
    """

    space: str
    trials: int = 30
    sampler: str = AUTO
    enqueue: str | None = None
    warm_start: Sequence[str] = ()
    warm_start_other_data: bool = False
    pruner: str = "none"
    grace: int | None = None
    timeout: float | None = None
    stop_after_stale: int | None = None
    max_gpu_hours: float | None = None
    target: float | None = None
    workers: int | None = None
    gpus: str | None = None
    trials_per_gpu: int | None = None
    gpus_per_trial: int | None = None
    ray: str | None = None
    max_slots: int | None = None
    seed: int = 0
    split_seed: int = 0
    validation: str = HOLDOUT
    study: str | None = None
    epochs: int | None = None
    trial_timeout: float | None = None
    heartbeat: float = 600.0
    deterministic: bool = False
    checkpoint_minutes: float | None = None
    tensorboard: bool = False
    confirm: int | None = None
    confirm_seeds: int = SEEDS
    final: str | None = None
    evaluate: str = "auto"
    start_method: str | None = None
    env: Sequence[str] = ()
    keep: int | None = KEEP
    max_disk: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    workspace: str | None = None
    tracking_uri: str | None = None

    def __post_init__(self) -> None:
        whole = ("trials", "epochs", "workers", "trials_per_gpu", "gpus_per_trial", "confirm_seeds", "keep", "grace")
        for name in (*whole, "stop_after_stale", "max_slots"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise RequestError(f"{_flag(name)} must be a whole number of at least 1, but got {value!r}")
        for name in ("seed", "split_seed", "confirm"):
            value = getattr(self, name)
            if name == "confirm" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise RequestError(f"{_flag(name)} must be a whole number of at least 0, but got {value!r}")
        for name in ("timeout", "max_gpu_hours"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise RequestError(f"{_flag(name)} must be a number above 0, but got {value!r}")
        if self.target is not None and not math.isfinite(self.target):
            raise RequestError(f"--target must be a score, a finite number, but got {self.target!r}")
        if self.grace is not None and self.pruner == "none":
            raise RequestError(f"--grace {self.grace} is for a pruner, but there is none; add --pruner asha")
        if self.trial_timeout is not None and not self.trial_timeout > 0:
            raise RequestError(f"--trial-timeout must be seconds above 0, but got {self.trial_timeout!r}")
        if not self.heartbeat >= 0:
            raise RequestError(f"--heartbeat must be seconds, 0 for never, but got {self.heartbeat!r}")
        for name, allowed in (
            ("evaluate", ("auto", "yes", "no")),
            ("start_method", (None, "fork", "spawn")),
        ):
            if getattr(self, name) not in allowed:
                words = ", ".join(str(word) for word in allowed if word)
                raise RequestError(f"{_flag(name)} must be one of {words}, but got {getattr(self, name)!r}")
        minutes = self.checkpoint_minutes
        # Written so that NaN is refused as well.
        if minutes is not None and (isinstance(minutes, bool) or not 0 < minutes < math.inf):
            raise RequestError(f"--checkpoint-minutes must be a number above 0, but got {minutes!r}")
        for name in ("deterministic", "tensorboard"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{_flag(name)} must be true or false, but got {getattr(self, name)!r}")
        if self.final not in (None, "retrain"):
            raise RequestError(
                f"--final must be retrain, but got {self.final!r}; a model trained on every row is written by "
                "`heldout export STUDY --out DIR --final all`, since nothing is left to test it"
            )
        if self.ray == "none":  # which ends what was asked for before
            object.__setattr__(self, "ray", None)
        if self.sampler == AUTO:
            object.__setattr__(self, "sampler", default_for(self.trials))
        if self.enqueue is not None:
            object.__setattr__(self, "enqueue", os.fspath(self.enqueue))
        given = (self.warm_start,) if isinstance(self.warm_start, str) else tuple(dict.fromkeys(self.warm_start))
        object.__setattr__(self, "warm_start", given)
        if self.warm_start_other_data and not given:
            raise RequestError("--warm-start-other-data goes with --warm-start STUDY, but there is none; leave it out")
        object.__setattr__(self, "env", secrecy.check_variables(self.env))
        if self.max_disk is not None and disk.parse_size(self.max_disk, "--max-disk") <= 0:
            raise RequestError(f"--max-disk must be above 0, but got {self.max_disk!r}")
        object.__setattr__(self, "validation", str(parse(self.validation)))
        if self.study is not None:
            check_name(self.study)

    def confirmation(self, trials: int | None = None) -> Confirmation:
        """How a search of so many trials is confirmed; of the planned number by default."""
        return confirmation(self.trials if trials is None else trials, self.confirm, self.confirm_seeds)

    @property
    def ends(self) -> Ends:
        """What ends the search."""
        return Ends(self.trials, self.timeout, self.stop_after_stale, self.max_gpu_hours, self.target)

    def to_json(self) -> dict[str, Any]:
        """A JSON object for journal and MLflow."""
        lists = {"env": list(self.env), "warm_start": list(self.warm_start)}
        return dataclasses.asdict(self) | {"tags": dict(self.tags)} | lists


def config_of(journal: Journal) -> StudyConfig:
    """What was asked for at launch, with what resumes have changed since (the journal's ``plan``)."""
    launched = journal.get("study")["config"]
    return StudyConfig(**{"keep": None} | launched | (journal.get("plan") or {}))  # once, all models were kept


def state_of(journal: Journal) -> str:
    """The state of the study whose journal this is; see ``Study.state``."""
    state = str(journal.get("state") or "RUNNING")
    return "STOPPED" if state == "RUNNING" and driver_of(journal.path.parent) is None else state


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_name(name: str, what: str = "a study's name") -> str:
    """``name``, if it can name a study and its folder, or a registered model.

    Raises:
        StudyError: Otherwise.
    """
    if not _NAME.fullmatch(name) or ".." in name:
        raise StudyError(
            f"{what} must be letters, digits, '.', '_' and '-', starting with a letter or digit, but got {name!r}"
        )
    return name


def workspace_folder(given: str | os.PathLike[str] | None = None) -> Path:
    """The workspace: as given, else ``HELDOUT_WORKSPACE``, else ``./heldout-workspace``; absolute, "
    "perhaps not there yet."""
    return Path(given or os.environ.get("HELDOUT_WORKSPACE") or "heldout-workspace").expanduser().absolute()


def make_workspace(folder: Path) -> None:
    """Create the workspace if need be.

    Raises:
        RequestError: If it cannot be written.
    """
    try:
        (folder / "studies").mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK) and os.access(folder / "studies", os.W_OK)
    except OSError as error:
        raise RequestError(
            f"the workspace {folder} cannot be created: {error.strerror}; choose another with --workspace"
        ) from None
    if not writable:
        raise RequestError(f"the workspace {folder} must be writable, but it is not; choose another with --workspace")


def workspace_id(folder: Path) -> str:
    """A name of the workspace that it keeps when it is moved; by it MLflow's runs are known as the workspace's own."""
    file, draft = folder / "id", folder / f"id.{os.getpid()}.new"
    if not file.exists():
        draft.write_text(uuid.uuid4().hex)
        with contextlib.suppress(FileExistsError):  # another launch was first
            os.link(draft, file)
        draft.unlink()
    return file.read_text().strip()


def names(workspace: str | os.PathLike[str] | None = None) -> list[str]:
    """Names of the workspace's studies, the newest last; for the workspace see ``workspace_folder``."""
    folders = (workspace_folder(workspace) / "studies").glob("*/")
    found = [folder for folder in folders if journal_file.holds_study(folder) and not folder.is_symlink()]
    return [folder.name for folder in sorted(found, key=lambda folder: (_began(folder), folder.name))]


def _began(folder: Path) -> float:
    """When the study was launched: its folder's own times change with every file."""
    try:
        with Journal.open(folder / "journal.sqlite", read_only=True) as journal:
            return journal.put_at("study") or math.inf
    except RequestError:
        return math.inf  # a damaged one is said when it is asked for, and hides no other


class Study:
    """One study, read from its journal.

    Args:
        name: The study's name; None for the workspace's only or newest study.
        workspace: The workspace; see ``workspace_folder``.

    Raises:
        StudyError: If there is no such study.
    """

    def __init__(self, name: str | None = None, workspace: str | os.PathLike[str] | None = None) -> None:
        folder = workspace_folder(workspace)
        if name is None:
            have = names(folder)
            if not have:
                raise StudyError(f"there is no study in {folder}; start one with `heldout launch SPACE`")
            name = have[-1]
        elif not journal_file.holds_study(folder / "studies" / check_name(name)):
            have = names(folder)
            listed = f"it has {', '.join(have)}" if have else "it has none"
            raise StudyError(f"there is no study called {name!r} in {folder}; {listed}")
        if (folder / "studies" / name).is_symlink():
            raise StudyError(
                f"study {name!r} must lie in its workspace, but {folder / 'studies' / name} is a link; move the whole "
                "workspace instead"
            )
        self.name = name
        self.workspace = folder
        self.folder = folder / "studies" / name

    @classmethod
    def at(cls, folder: Path) -> Study:
        """The study in a folder that is known to hold one, whatever else lies in the workspace."""
        study = cls.__new__(cls)
        study.name, study.workspace, study.folder = folder.name, folder.parent.parent, folder
        return study

    def __repr__(self) -> str:
        return f"Study({self.name!r}, workspace={str(self.workspace)!r})"

    @contextlib.contextmanager
    def journal(self) -> Iterator[Journal]:
        """The study's journal, for reading."""
        journal = Journal.open(self.folder / "journal.sqlite", read_only=True)
        try:
            yield journal
        finally:
            journal.close()

    def meta(self, key: str, default: Any = None) -> Any:
        """One of the journal's meta values: ``study``, ``state``, ``prepared``, ``evaluation``, …."""
        with self.journal() as journal:
            found = journal.get(key)
        return default if found is None else found

    @property
    def state(self) -> str:
        """``RUNNING``, ``COMPLETE``, ``FAILED``, or ``STOPPED`` (which includes a driver that died)."""
        with self.journal() as journal:
            return state_of(journal)

    @property
    def objective(self) -> str:
        """The validation metric searched for."""
        return str(self.meta("study")["objective"])

    @property
    def direction(self) -> str:
        """``"min"`` or ``"max"``."""
        return str(self.meta("study")["direction"])

    @property
    def trials(self) -> tuple[Trial, ...]:
        """All trials so far, by number."""
        with self.journal() as journal:
            return journal.history()

    @property
    def best_trial(self) -> Trial | None:
        """The complete trial with the best validation score, or None."""
        return best(self.trials)

    @property
    def space(self) -> Space:
        """The space as far as it is known."""
        with self.journal() as journal:
            return journal.space()

    def trials_dataframe(self) -> pandas.DataFrame:
        """One row per trial, with ``params.NAME`` columns; see ``search.record.trial_table.dataframe``."""
        from search.record.trial_table import dataframe

        return dataframe(self.trials)

    def report(self) -> dict[str, Any]:
        """The study in one JSON object (see README, "The report")."""
        from search.shown.report import report

        return report(self)

    def html(self, out: str | os.PathLike[str]) -> Path:
        """Write the report as one HTML page with its charts; see README, "The report"."""
        from search.pages.page import write

        return write(self, out)

    def status(self) -> dict[str, Any]:
        """The report, with ``planned`` trials and the numbers of those ``running``."""
        from search.shown.report import status

        return status(self)

    def show(self, number: int) -> dict[str, Any]:
        """One trial with its ``reports`` (epoch by epoch) and its ``log`` (all that it printed)."""
        from search.shown.report import show

        return show(self, number)

    def export(self, out: str | os.PathLike[str], **options: Any) -> dict[str, Any]:
        """Write the best model, or ``trial=N``, to a folder; see ``search.export``."""
        from search.export import export

        return export(self, out, **options)

    def evaluate(self, **options: Any) -> dict[str, Any]:
        """Open the sealed test rows for winner and baseline; see ``search.evaluate``."""
        from search.guard.evaluation import evaluate

        return evaluate(self, **options)

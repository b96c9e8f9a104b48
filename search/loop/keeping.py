"""Which trials' models are kept while a study runs, and deleting the others.

What is deleted follows from validation scores alone. A model that guard labels had sent away, or kept, would
make the final choice repeat what they said.
"""

from __future__ import annotations

import contextlib
import heapq
import math
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from search.record import disk, journal_copy, places
from search.record.journal import Journal
from search.trial import Trial, TrialState, ranked

KEEP = 20  # finalists are ten at most; twice as many leaves the final choice what it would have had
_LOGS = (".txt", ".log")


def limit(journal: Journal) -> int | None:
    """How many of the search's models the study keeps; None for all, as in studies from before there was a limit."""
    asked: int | None = ((journal.get("study") or {}).get("config") or {}).get("keep")
    lowered: int | None = journal.get("keep")  # by ``--max-disk``, while it ran
    return asked if lowered is None else lowered if asked is None else min(asked, lowered)


def kept(history: Iterable[Trial], keep: int | None) -> set[int]:
    """Numbers of the complete trials whose models are kept, and that can win.

    Args:
        keep: How many of the search's trials, the best by validation score; None for all. Every confirming run and
            every run of the baseline's configuration is kept besides.
    """
    done = [trial for trial in history if trial.state is TrialState.COMPLETE]
    always = {trial.number for trial in done if trial.confirms is not None or trial.configuration == 0}
    return always | {trial.number for trial in ranked(done)[:keep]}


def chosen(journal: Journal) -> set[int]:
    """Trials that the study has named as winner or baseline so far: their models can be asked for at any time."""
    found: set[int] = set()
    for roles in (journal.get("selection"), (journal.get("frozen") or {}).get("models")):
        found |= {roles[role]["trial"] for role in ("winner", "baseline") if roles and roles.get(role)}
    return found


def tidy(folder: Path, history: Iterable[Trial], keep: int | None, also: Iterable[int] = ()) -> int:
    """Delete the models of ended trials that are not kept, and what ended trials left half-written.

    May be killed at any moment and called again; never raises. Logs stay.

    Args:
        also: Trials whose models are kept whatever their score.

    Returns:
        Bytes that were freed.
    """
    trials = list(history)
    winners = kept(trials, keep) | set(also)
    return sum(clear(folder, trial.number, trial.number in winners) for trial in trials if trial.state.is_finished)


def clear(folder: Path, number: int, keeps: bool, dry_run: bool = False) -> int:
    """Delete what an ended trial need not have any more; bytes that were freed.

    Args:
        keeps: Its model, its predictions and what guard rows say of it stay.
        dry_run: Delete nothing.
    """
    waste: list[Path] = [] if keeps else [places.guard_parts(folder, number)]
    with contextlib.suppress(OSError), os.scandir(places.trial(folder, number)) as entries:
        for entry in entries:
            left = entry.name.startswith((".", "checkpoint"))
            if left or not (keeps or entry.name.endswith(_LOGS)):
                waste.append(Path(entry.path))
    freed = 0
    for path in waste:
        size = disk.size(path)
        with contextlib.suppress(OSError):
            if dry_run:
                pass
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            freed += size
    return freed


class Keeper:
    """Keeps a running study's folder as small as its plan asks, trial by trial; never raises for the disk.

    Costs one pass over all trials when it is made, and after that the files of one or two trials at a time.

    Args:
        folder: The study's.
        journal: The study's, for writing.
        most: Bytes that the folder may hold, or None.
    """

    def __init__(self, folder: Path, journal: Journal, most: int | None = None) -> None:
        self._folder, self._journal, self._most = folder, journal, most
        self._keep = limit(journal)
        self._heap: list[tuple[float, float, int]] = []  # of the search's kept trials, the worst one first
        history = journal.history()
        self._chosen = chosen(journal)
        tidy(folder, history, self._keep, self._chosen)
        self._book = self._booked()
        running = sum(_held(folder, t.number) for t in history if not t.state.is_finished)
        self._rest = (disk.size(folder) if most is not None else 0) - running - self._book
        for trial in ranked(history)[: self._keep]:
            heapq.heappush(self._heap, _last_first(trial))

    @property
    def total(self) -> int:
        """Bytes that the folder holds, without trials that are running; counted only where there is a limit."""
        return self._rest + self._book

    @property
    def keep(self) -> int | None:
        """How many of the search's models are kept at present."""
        return self._keep

    def ended(self, trial: Trial) -> None:
        """Take note of a trial whose end is in the journal, and delete what cannot win any more."""
        if self._most is not None:
            self._rest += _held(self._folder, trial.number)
            self._rest += disk.size(places.guard_parts(self._folder, trial.number))
            self._book = self._booked()
        complete = trial.state is TrialState.COMPLETE
        self._rest -= clear(self._folder, trial.number, complete)
        if complete and trial.confirms is None:
            heapq.heappush(self._heap, _last_first(trial))
            if self._keep is not None and len(self._heap) > self._keep:
                self._drop()

    def fits(self, say: Callable[[str], Any] = lambda _: None) -> bool:
        """Whether the folder is within its limit, by keeping fewer models where that is what it takes.

        The baseline's, the best one's and confirming ones stay in any case: if they alone are too much, it is False,
        and the search has to end. How many are kept is in the journal before any file is gone, since the final
        choice is made among kept models alone.

        Args:
            say: Is told when fewer are kept from here on.
        """
        if self._most is None:
            return True
        self._book = self._booked()
        if self.total <= self._most:
            return True
        before = self._keep
        while self.total > self._most and len(self._heap) > 1:
            fewer = len(self._heap) - 1
            self._journal.put("keep", fewer)  # first: what the record calls kept must be there
            self._keep = fewer
            self._drop()
        self._book = self._booked()
        if self._keep != before:
            say(
                f"the study's folder has reached --max-disk {disk.shown(self._most)}: only the {self._keep} best "
                "models by validation score are kept from here on"
            )
        return self.total <= self._most

    def _drop(self) -> None:
        number = -heapq.heappop(self._heap)[2]
        if number and number not in self._chosen:  # the baseline's is kept whatever its score
            self._rest -= clear(self._folder, number, False)

    def _booked(self) -> int:
        if self._most is None:
            return 0
        record = self._folder / "journal.sqlite"
        files = [record.with_name(record.name + end) for end in ("", "-wal", "-shm")]
        return sum(map(disk.size, [*files, journal_copy.beside(record)]))


def _held(folder: Path, number: int) -> int:
    """Bytes that a trial's own process has written."""
    return disk.size(places.trial(folder, number)) + disk.size(places.events(folder, number))


def _last_first(trial: Trial) -> tuple[float, float, int]:
    """Sorts opposite to ``ranked``."""
    assert trial.loss is not None
    return (-trial.loss, -(math.inf if trial.size is None else trial.size), -trial.number)

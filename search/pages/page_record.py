"""What the report's page reads of a study, once, and its words for intervals and times."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from search import secrecy
from search.definition.space import Space
from search.errors import RequestError
from search.loop.enqueueing import begun
from search.pages import panels
from search.pages.importance import Importances, importances
from search.pages.panels import Clock, Numbers
from search.shown.report import report
from search.study import Study, StudyConfig, config_of
from search.trial import Report, Trial


@dataclass(frozen=True)
class Read:
    """A study as the page shows it."""

    found: Mapping[str, Any]
    trials: tuple[Trial, ...]
    reports: tuple[Report, ...]
    space: Space
    config: StudyConfig | None
    study: Mapping[str, Any]
    numbers: Numbers
    clock: Clock
    importances: Importances

    @property
    def chosen(self) -> Mapping[str, Any] | None:
        """The winner, or what is best so far."""
        role: Mapping[str, Any] | None = self.found["winner"] or self.found["best"]
        return role

    @property
    def winner(self) -> int | None:
        """The trial of the search that has its configuration."""
        role = self.chosen
        return None if role is None else int(role.get("configuration", role["trial"]))

    @property
    def metric(self) -> str:
        """Its name for people."""
        return str(self.found["objective"]).removeprefix("val_").replace("_", " ")


def read(study: Study) -> Read:
    """Reads a study, and looks which of its parameters mattered."""
    found = report(study)
    with study.journal() as journal:
        trials, reports, space = tuple(begun(journal.history())), journal.reports(), journal.space()
        meta = journal.get("study") or {}
        config = config_of(journal) if meta else None
    secrecy.learn_tracking(os.environ.get("MLFLOW_TRACKING_URI", ""))
    for name in config.env if config is not None else ():
        with contextlib.suppress(RequestError):  # then nothing on this machine knows what it was
            secrecy.resolve([name])
    numbers = Numbers(bool(found["proportion"]))
    return Read(found, trials, reports, space, config, meta, numbers, Clock.of(trials), importances(trials, space))


def span(interval: Sequence[float], numbers: Numbers) -> str:
    """An interval in words."""
    return f"{numbers(interval[0]).removesuffix(' %')} to {numbers(interval[1])}"


def lasting(seconds: float) -> str:
    """How long something took, in words."""
    unit, name = panels.seconds(seconds)
    return f"{seconds / unit:.3g} {name}"

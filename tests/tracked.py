"""What tests of MLflow share: a writer of journals, what MLflow has of one, and a client that fails."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from search.record.journal import Journal
from search.tracker import runs
from search.trial import Report, Trial, TrialState

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what MLflow's libraries warn of at import is not ours to mend
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.exceptions import MlflowException

    from search.tracker.publisher import Publisher


PATIENCE = 120.0  # seconds, on a busy machine


def until(condition: Callable[[], Any]) -> Any:
    """The first true value of the condition."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def study(workspace: Path, **changes: Any) -> dict[str, Any]:
    """The meta value that a driver puts."""
    return {
        "name": "digits",
        "study_id": os.urandom(8).hex(),
        "space": {
            # One experiment for each test, as the server is shared.
            "name": f"space-{os.urandom(4).hex()}",
            "path": "spaces/digits_mlp.py",
            "digest": "5" * 64,
            "source": 'objective = "val_accuracy"\n',
        },
        "objective": "val_accuracy",
        "direction": "max",
        "config": {"trials": 40, "sampler": "tpe", "seed": 0, "study": None, "nested": {"deep": True}},
        "user": "ada",
        "tags": {"team": "vision", "odd key!": "kept"},
        "versions": {"keras": "3.15.1"},
        "tracking_uri": "elsewhere",
        "artifact_root": str(workspace / "artifacts"),
        "data": {"digest": "d" * 64, "rows": 1797, "tiers": {"train": 1078}},
    } | changes


@dataclasses.dataclass
class Driver:
    """Writes a journal as the search loop does."""

    folder: Path
    journal: Journal
    clock: float = 1_700_000_000.0

    def tick(self) -> float:
        self.clock += 1.0
        return self.clock

    def begin(self, number: int, attempt: int = 0, **params: Any) -> Trial:
        params = params or {"units": 32 + number, "rate": 0.001, "bias": True, "act": "relu"}
        trial = Trial(
            number, TrialState.RUNNING, params, seed=7, attempt=attempt, started=self.tick(), history_length=0
        )
        self.journal.begin(trial)
        return trial

    def epoch(self, trial: Trial, step: int, **metrics: float) -> None:
        metrics = metrics or {"loss": 1 / step, "val_loss": 1.1 / step, "val_accuracy": 1 - 0.5 / step}
        self.journal.report([Report(trial.number, trial.attempt, step, self.tick(), metrics)])

    def complete(self, trial: Trial, score: float, epochs: int) -> None:
        done = {"epochs": epochs, "best_epoch": max(1, epochs - 1), "size": 1000}
        self.journal.finish(
            trial.moved(TrialState.COMPLETE, score=score, loss=-score, ended=self.tick(), **done)
        )

    def fail(self, trial: Trial, reason: str, message: str) -> None:
        self.journal.finish(trial.moved(TrialState.FAILED, reason=reason, message=message, ended=self.tick()))

    def run(self, number: int, score: float, epochs: int = 3, attempt: int = 0) -> None:
        trial = self.begin(number, attempt)
        for step in range(1, epochs + 1):
            self.epoch(trial, step)
        self.complete(trial, score, epochs)


class Tracked:
    """A publisher of a study, and what MLflow has of it."""

    def __init__(self, driver: Driver, client: Any, workspace: Path, server: bool) -> None:
        self.driver, self.client = driver, client
        self._root = None if server else workspace / "artifacts"
        self.meta = driver.journal.get("study")
        self.again()

    def again(self, client: Any = None) -> Publisher:
        """Another publisher, as after a restart."""
        reader = Journal.open(self.driver.journal.path, read_only=True)
        self.publisher = Publisher(client or self.client, reader, self._root)
        return self.publisher

    def end(self, state: str = "COMPLETE") -> None:
        self.driver.journal.put("state", state)
        self.publisher.end()

    @property
    def experiment(self) -> Any:
        return self.client.get_experiment_by_name(self.meta["space"]["name"])

    @property
    def runs(self) -> list[Run]:
        return list(
            self.client.search_runs(
                [self.experiment.experiment_id],
                f"tags.`heldout.study_id` = '{self.meta['study_id']}'",
                max_results=1000,
            )
        )

    @property
    def parent(self) -> Run:
        (run,) = [run for run in self.runs if runs.TRIAL not in run.data.tags]
        return run

    @property
    def children(self) -> dict[tuple[int, int], Run]:
        found = [run for run in self.runs if runs.TRIAL in run.data.tags]
        keyed = {(int(r.data.tags[runs.TRIAL]), int(r.data.tags[runs.ATTEMPT])): r for r in found}
        assert len(keyed) == len(found), "a trial is there twice"
        return dict(sorted(keyed.items()))

    def series(self, run: Run, key: str) -> list[tuple[int, float]]:
        history = self.client.get_metric_history(run.info.run_id, key)
        return [(point.step, point.value) for point in sorted(history, key=lambda p: (p.step, p.timestamp))]


class Counting:
    """A client that counts what is written, and fails as told."""

    WRITES = ("create_experiment", "create_run", "log_batch", "set_terminated", "update_run", "delete_run")

    def __init__(self, client: MlflowClient) -> None:
        self._client = client
        self.calls: list[str] = []
        self.lose_answer_of: str | None = None
        self.refuse: Callable[[list[Any]], bool] = lambda params: False
        self.no_artifacts = False

    def log_text(self, *arguments: Any) -> None:
        if self.no_artifacts:
            raise PermissionError("/srv/mlartifacts")
        self._client.log_text(*arguments)

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._client, name)
        if name not in self.WRITES:
            return real

        def call(*arguments: Any, **named: Any) -> Any:
            self.calls.append(name)
            if name == "log_batch" and self.refuse(arguments[2]):
                raise MlflowException.invalid_parameter_value("no such thing here")
            answer = real(*arguments, **named)
            if name == self.lose_answer_of:
                self.lose_answer_of = None
                raise ConnectionError("the answer was lost")
            return answer

        return call

"""What a trial's process says of its end: every way in which memory runs out is called by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from search.definition.problem import find
from search.errors import SpaceError, TrialFailed
from search.harness import worker
from search.processes import jobs
from tests.tiny import write_space


class ResourceExhaustedError(Exception):
    """As TensorFlow's."""


class OutOfMemoryError(RuntimeError):
    """As torch's."""


class XlaRuntimeError(RuntimeError):
    """As JAX's."""


class Heard:
    def __init__(self) -> None:
        self.said: list[dict[str, Any]] = []

    def send(self, body: dict[str, Any]) -> None:
        self.said.append(body)


def told(monkeypatch: pytest.MonkeyPatch, error: BaseException, gpus: bool = False) -> dict[str, Any]:
    def job(payload: dict[str, Any], send: Any) -> dict[str, Any]:
        raise error

    monkeypatch.setitem(worker.JOBS, "trial", job)
    channel = Heard()
    slot = {"gpus": ["GPU-0"] if gpus else []}
    worker.main({"id": "a", "kind": "trial", "payload": {}, "slot": slot}, channel)
    (body,) = channel.said
    return body


@pytest.mark.parametrize(
    ("error", "on_host", "on_host_of_a_cpu_slot"),
    [
        (MemoryError("no more"), True, True),
        (ResourceExhaustedError("OOM when allocating tensor"), False, True),
        (OutOfMemoryError("CUDA out of memory"), False, True),
        (XlaRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"), False, True),
    ],
)
def test_memory_that_runs_out_is_told_as_such_and_whose_it_was(
    monkeypatch: pytest.MonkeyPatch, error: Exception, on_host: bool, on_host_of_a_cpu_slot: bool
) -> None:
    for gpus, expected in ((True, on_host), (False, on_host_of_a_cpu_slot)):
        body = told(monkeypatch, error, gpus)
        assert (body["type"], body["reason"], body["on_host"]) == ("failed", "oom", expected)
        assert type(error).__name__ in body["message"]


def test_memory_that_runs_out_in_build_is_no_refusal_of_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    failure = TrialFailed("invalid", "space.py:3: build(hp) raised ResourceExhaustedError: OOM")
    failure.__cause__ = ResourceExhaustedError("OOM when allocating tensor")
    assert told(monkeypatch, failure)["reason"] == "oom"


@pytest.mark.parametrize(
    ("error", "reason", "name"),
    [
        (TrialFailed("nan", "the loss is NaN"), "nan", None),
        (SpaceError("space.py: build(hp) must return a model"), "invalid", "SpaceError"),
        (XlaRuntimeError("INTERNAL: something else"), "crash", None),
        (ZeroDivisionError("division by zero"), "crash", None),
    ],
)
def test_other_ends_keep_their_reason(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str, name: str | None
) -> None:
    body = told(monkeypatch, error)
    assert (body["reason"], body["error"]) == (reason, name)


CODED = """
def build(hp):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8)])
    if hp.Boolean("coded"):
        model.add(keras.layers.Lambda(lambda x: 2 * x, name="doubling"))
    model.add(keras.layers.Dense(2))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    return model
"""


def test_a_model_that_no_file_can_hold_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    """The preflight sees the default alone, and a winner that cannot be exported is no use."""
    problem = find(write_space(tmp_path, build=CODED))
    loaded = worker.load(jobs.load_payload(problem, tmp_path, tmp_path, 0), lambda body: None)
    payload = jobs.base_payload(jobs.completed(loaded, problem), tmp_path) | {"epochs": 1, "seed": 0}
    said: list[dict[str, Any]] = []
    with pytest.raises(SpaceError, match="the layer 'doubling' is a Lambda around Python code, and Keras loads no"):
        worker.trial(payload | {"named": {"coded": True}}, said.append)
    assert [body["type"] for body in said] == ["asks"] and said[0]["asks"][0]["value"] is True
    assert worker.trial(payload | {"named": {"coded": False}}, said.append)["epochs"] == 1

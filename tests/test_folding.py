"""A trial of several trainings: real processes one after the other, with a training that says what it was told."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from search.definition.problem import Problem
from search.harness import failing, folding, worker
from search.harness.rungs import Stopped
from search.tiers.validation import REFIT

Send = Callable[[dict[str, Any]], None]
REMEMBERED: list[int] = []  # by a training, as a module may


def trained(payload: dict[str, Any], send: Send) -> dict[str, Any]:
    """In place of a training: writes down that it ran, and with what."""
    number = payload["part"]["number"]
    told = {"number": number, "pid": os.getpid(), "remembered": len(REMEMBERED), "epochs": payload.get("epochs")}
    told |= {"preprocess": payload["preprocess"], "folder": payload["folder"], "keep_last": payload.get("keep_last")}
    with open(payload["diary"], "a") as file:
        file.write(json.dumps(told) + "\n")
    REMEMBERED.append(1)
    send({"type": "asks", "asks": [{"name": "units", "value": 4}]})
    if payload["preflight"]:
        send({"type": "preflight", "asks": []})
    for step in (1, 2):
        send({"type": "report", "step": step, "of": 2, "metrics": {"val": 0.5}})
    if (how := payload["fails"].get(str(number))) == "raises":
        raise ValueError("of the module")
    elif how == "exits":
        os._exit(3)
    elif how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    predicted = Path(payload["folder"]) / f"{payload['tiers'][0]}_0.npy"
    predicted.write_bytes(b"")
    best = None if number == REFIT else 2 + int(number)
    return {
        "asks": [{"name": "units", "value": 4}],
        "predictions": {payload["tiers"][0]: [str(predicted)]},
        "weights": "w" if payload.get("weights", True) else None,
        "epochs": payload["epochs"] if number == REFIT else 9,
        "best_epoch": best,
        "reported": {} if number == REFIT else {"val": 0.1 * int(number), "loss": 1.0},
        "declaration": {"of": number},
        "size": 7,
        "devices": [],
    }


class Trial:
    """A trial's payload, and what its process says to the driver."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder, self.said = folder, []
        (folder / "folds").mkdir(exist_ok=True)
        self.payload: dict[str, Any] = {
            "problem": Problem("tiny", "/nowhere/tiny.py", "").to_json(),
            "folds": {"plan": "kfold:3", "folder": str(folder / "folds")},
            "preprocess": "whole.keras",
            "folder": str(folder),
            "seed": 5,
            "proposal": {"units": 4},
            "epochs": None,
            "preflight": True,
            "rungs": (1, 2),
            "diary": str(folder / "diary.jsonl"),
            "fails": {},
        } | changes

    said: list[dict[str, Any]]

    def run(self) -> dict[str, Any]:
        return folding.run(self.payload, self.said.append)

    def diary(self) -> list[dict[str, Any]]:
        path = self.folder / "diary.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def kinds(self) -> list[str]:
        return [body["type"] for body in self.said]


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(worker.JOBS, "trial", trained)


def test_each_training_is_a_process_of_its_own_and_the_last_one_is_the_refit(tmp_path: Path) -> None:
    trial = Trial(tmp_path)
    result = trial.run()
    ran = trial.diary()
    assert [one["number"] for one in ran] == [0, 1, 2, REFIT]
    assert len({one["pid"] for one in ran}) == 4 and os.getpid() not in {one["pid"] for one in ran}
    assert [one["remembered"] for one in ran] == [0] * 4 and REMEMBERED == []
    assert [one["epochs"] for one in ran] == [None, None, None, 3]  # the median of 2, 3 and 4
    assert [one["keep_last"] for one in ran] == [None, None, None, True]
    own = [str(tmp_path / "folds" / f"preprocess_{k}.keras") for k in range(3)]
    assert [one["preprocess"] for one in ran] == [*own, "whole.keras"]
    folders = [*(tmp_path / f"fold_{k}" for k in range(3)), tmp_path]
    assert [one["folder"] for one in ran] == [str(folder) for folder in folders]
    assert result["predictions"] == {
        "validation": [[str(folder / "validation_0.npy")] for folder in folders[:3]],
        "guard": [str(tmp_path / "guard_0.npy")],
    }
    assert (result["epochs"], result["best_epoch"], result["weights"]) == (3, 3, "w")
    assert result["reported"] == pytest.approx({"val": 0.1, "loss": 1.0})
    assert result["declaration"] == {"of": REFIT}


def test_the_driver_hears_asks_and_preflight_once_and_a_report_for_each_fold(tmp_path: Path) -> None:
    trial = Trial(tmp_path)
    trial.run()
    assert trial.kinds() == ["asks", "preflight", "report", "report", "report"]
    reports = trial.said[2:]
    assert [(one["step"], one["of"], one["metrics"]["val"]) for one in reports] == [
        (1, 3, 0.0), (2, 3, 0.1), (3, 3, 0.2)
    ]  # fmt: skip


def test_a_trial_that_is_told_to_stop_after_a_fold_trains_no_other(tmp_path: Path) -> None:
    trial = Trial(tmp_path, checkpoint_minutes=1.0)

    def send(body: dict[str, Any]) -> None:
        if body["type"] == "report" and body["step"] == 2:
            raise Stopped

    assert folding.run(trial.payload, send) == {"asks": [{"name": "units", "value": 4}], "stopped": True}
    assert [one["number"] for one in trial.diary()] == [0, 1]
    assert not list(tmp_path.rglob("checkpoint*"))


@pytest.mark.parametrize("number", ["1", REFIT])
def test_an_error_of_one_training_is_told_as_it_was(tmp_path: Path, number: str) -> None:
    with pytest.raises(failing.Told) as raised:
        Trial(tmp_path, fails={number: "raises"}).run()
    body = failing.told(raised.value, False)
    assert (body["reason"], body["message"]) == ("crash", "ValueError: of the module") and "died" not in body


def test_a_training_that_exits_without_a_word_may_be_tried_again(tmp_path: Path) -> None:
    with pytest.raises(failing.Told) as raised:
        Trial(tmp_path, fails={"1": "exits"}).run()
    assert raised.value.body["died"] and "exited with 3" in raised.value.body["message"]


def test_the_signal_that_ends_a_training_ends_the_trial(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            Trial(tmp_path, fails={"1": "killed"}).run()
        finally:
            os._exit(0)
    until = time.monotonic() + 30
    ended, status = 0, 0
    while not ended and time.monotonic() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        time.sleep(0.01)
    assert ended and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert [one["number"] for one in Trial(tmp_path).diary()] == [0, 1]


def again(folder: Path, **changes: Any) -> tuple[list[Any], Trial]:
    """The numbers that a second attempt trains, after one that failed in its third fold."""
    with pytest.raises(failing.Told):
        Trial(folder, fails={"2": "exits"}, preflight=False, checkpoint_minutes=1.0).run()
    trial = Trial(folder, **({"preflight": False, "checkpoint_minutes": 1.0} | changes))
    trial.run()
    return [one["number"] for one in trial.diary()[3:]], trial


def test_an_attempt_with_checkpoints_goes_on_after_the_folds_that_had_ended(tmp_path: Path) -> None:
    ran, trial = again(tmp_path)
    assert ran == [2, REFIT]
    assert trial.kinds() == ["asks", "report", "report", "report"]  # the record of the attempt is whole
    assert not list(tmp_path.rglob("*checkpoint*"))


@pytest.mark.parametrize(
    "changes", [{"checkpoint_minutes": None}, {"seed": 6}, {"proposal": {"units": 5}}, {"preflight": True}]
)
def test_folds_of_another_training_are_not_taken_over(tmp_path: Path, changes: dict[str, Any]) -> None:
    ran, _ = again(tmp_path, **changes)
    assert ran == ([0, 2, REFIT] if "preflight" in changes else [0, 1, 2, REFIT])


def test_a_torn_record_of_a_fold_is_not_used(tmp_path: Path) -> None:
    with pytest.raises(failing.Told):
        Trial(tmp_path, fails={"2": "exits"}, preflight=False, checkpoint_minutes=1.0).run()
    kept = sorted(tmp_path.rglob(folding.DONE))
    kept[0].write_text(kept[0].read_text()[:40])
    (tmp_path / "fold_1" / "validation_0.npy").unlink()
    trial = Trial(tmp_path, preflight=False, checkpoint_minutes=1.0)
    trial.run()
    assert [one["number"] for one in trial.diary()[3:]] == [0, 1, 2, REFIT]

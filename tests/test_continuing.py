"""A study whose driver is killed in the middle of a long trial: after `heldout resume` the trial goes on.

While it still runs, one of its ended trials is reproduced.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from search.study import Study
from search.trial import TrialState
from tests.conftest import ROOT, Heldout
from tests.tiny import PARTS, write_space

KILLED_IN = 5
# Waits to be killed, with the driver, in one epoch of the second trial's first attempt.
WAITS = (
    "class Waits(keras.callbacks.Callback):\n"
    "    def __init__(self, hp):\n"
    "        super().__init__()\n"
    "        self.layers = hp.get('layers'), hp.get('rate')\n"
    "    def on_epoch_begin(self, epoch, logs=None):\n"
    "        marker = os.environ.get('MARKER')\n"
    f"        if marker and epoch == {KILLED_IN} and self.layers != (1, 1e-2) and not os.path.exists(marker):\n"
    "            open(marker, 'w').close()\n"
    "            time.sleep(500)\n\n\n"
    "def callbacks(hp):\n"
    "    return [Waits(hp), keras.callbacks.ReduceLROnPlateau(monitor='val_loss', patience=1)]"
)


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_trial_goes_on_after_its_driver_was_killed_and_the_study_equals_an_uninterrupted_one(
    tmp_path: Path, heldout: Heldout
) -> None:
    space = write_space(tmp_path, rest=WAITS, imports="import os\nimport time\n" + PARTS["imports"])
    marker = tmp_path / "waiting"
    options = ["--trials", "3", "--epochs", "9", "--workers", "1", "--confirm", "0", "--evaluate", "no"]
    options += ["--checkpoint-minutes", "1e-9", "--workspace", str(tmp_path / "ws")]
    whole = heldout("launch", space, *options, "--study", "whole")
    assert whole.returncode == 0, whole.stderr

    command = [sys.executable, "-m", "search.cli", "launch", space, *options, "--study", "cut"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MARKER": str(marker)}
    with (tmp_path / "driver.log").open("wb") as log:
        driver = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            until = time.monotonic() + 200
            while not marker.exists() and driver.poll() is None and time.monotonic() < until:
                time.sleep(0.05)
            ended = heldout("reproduce", "cut", "0", "--workspace", str(tmp_path / "ws"))
            assert Study("cut", tmp_path / "ws").state == "RUNNING"
        finally:
            driver.kill()
            driver.wait()
    assert marker.exists(), (tmp_path / "driver.log").read_text()
    assert ended.returncode == 0 and "reproduced exactly" in ended.stdout, ended.stderr
    cut, reference = Study("cut", tmp_path / "ws"), Study("whole", tmp_path / "ws")
    assert [trial.state for trial in cut.trials] == [TrialState.COMPLETE, TrialState.RUNNING]
    assert (cut.folder / "trials" / "0001" / "checkpoint.npz").exists()

    resumed = heldout("resume", "cut", "--workspace", str(tmp_path / "ws"), MARKER=str(marker))
    assert resumed.returncode == 0, resumed.stderr
    assert f"continued from the checkpoint after epoch {KILLED_IN}" in cut.show(1)["log"]
    for ours, theirs in zip(cut.trials, reference.trials, strict=True):
        for name in ("params", "seed", "score", "epochs", "best_epoch", "state"):
            assert getattr(ours, name) == getattr(theirs, name), (ours.number, name)
        assert _reports(cut, ours.number) == _reports(reference, ours.number)
    assert cut.trials[1].attempt == 1
    assert not list(cut.folder.glob("trials/*/checkpoint.npz"))


def _reports(study: Study, number: int) -> list[dict[str, float]]:
    """What the last attempt of a trial said, epoch by epoch."""
    found = study.show(number)
    mine = [report for report in found["reports"] if report["attempt"] == found["attempt"]]
    assert [report["step"] for report in mine] == list(range(1, found["epochs"] + 1))
    return [report["metrics"] for report in mine]

"""Stopping and going on by the command line: signals, another terminal, the lock, longer plans, changed modules."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from search.errors import StudyError
from search.record.journal import Journal
from search.record.lock import driver_of, locked
from search.study import Study
from search.trial import TrialState
from tests.conftest import ROOT, Heldout
from tests.tiny import PARTS, write_space

# Trials take a second or more, so that there is a time in which they run.
SLOW = {
    "imports": PARTS["imports"] + "\nimport time",
    "rest": (
        "class Slow(keras.callbacks.Callback):\n"
        "    def on_epoch_end(self, epoch, logs=None):\n"
        "        time.sleep(0.6)\n\n\n"
        "def callbacks(hp):\n"
        "    return [Slow()]"
    ),
}
CHEAP = ("--evaluate", "no", "--confirm", "0", "--workers", "1")

pytestmark = pytest.mark.timeout(600)  # several studies in a row, by the command line


class Launched:
    """A driver in a process of its own, whose lines are read as they come."""

    def __init__(self, folder: Path, command: str, *arguments: str) -> None:
        self.workspace = folder / "ws"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "search.cli", command, *arguments, "--workspace", str(self.workspace)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
        )
        self.lines: list[str] = []

    def until(self, beginning: str) -> str:
        """Reads lines of standard error up to one that begins so."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            if line.startswith(beginning):
                return line
        raise AssertionError(f"no line began with {beginning!r}: {self.lines}")

    def ended(self) -> tuple[int, str]:
        """Exit code and standard output, after the end."""
        out, err = self.process.communicate(timeout=120)
        self.lines += err.splitlines()
        return self.process.returncode, out

    @property
    def study(self) -> Study:
        return Study("s", self.workspace)

    def running(self) -> list[int]:
        return [t.number for t in self.study.trials if t.state is TrialState.RUNNING]

    def until_running(self) -> list[int]:
        until = time.monotonic() + 60
        while not (found := self.running()):
            assert time.monotonic() < until
            time.sleep(0.02)
        return found


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Any]:
    made: list[Launched] = []

    def launch(command: str, *arguments: str) -> Launched:
        made.append(Launched(tmp_path, command, *arguments))
        return made[-1]

    yield launch
    for one in made:
        with contextlib.suppress(ProcessLookupError):
            one.process.kill()
        one.process.communicate()


def resumed(one: Launched, heldout: Heldout, *more: str) -> list[Any]:
    """The trials of the study once it is complete."""
    ran = heldout("resume", "s", *more, "--workspace", str(one.workspace), "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["state"] == "COMPLETE"
    return list(one.study.trials)


@pytest.mark.study
def test_one_interrupt_lets_trials_end_and_prints_the_report_so_far(
    tmp_path: Path, launched: Any, heldout: Heldout
) -> None:
    one = launched("launch", write_space(tmp_path, **SLOW), "--trials", "5", "--study", "s", *CHEAP)
    one.until("trial 0 ")
    one.until_running()
    one.process.send_signal(signal.SIGINT)
    code, out = one.ended()
    assert code == 1 and "trials complete" in out and "best validation accuracy" in out
    assert "stopping: 1 running trial may end, no other begins (Ctrl-C again stops at once)" in one.lines
    assert one.lines[-1] == "heldout: study 's' was stopped; `heldout resume s` goes on"
    assert one.study.state == "STOPPED"
    trials = one.study.trials
    assert 2 <= len(trials) < 5 and all(t.state is TrialState.COMPLETE for t in trials)
    assert len(resumed(one, heldout)) == 5


TERMINATED = pytest.param("terminated", marks=pytest.mark.slow)


@pytest.mark.study
@pytest.mark.parametrize("how", ["interrupted twice", TERMINATED, "stopped now"])
def test_stopped_at_once_what_ran_runs_again_on_resume(
    how: str, tmp_path: Path, launched: Any, heldout: Heldout
) -> None:
    one = launched("launch", write_space(tmp_path, **SLOW), "--trials", "4", "--study", "s", *CHEAP)
    one.until("trial 0 ")
    (number,) = one.until_running()
    if how == "interrupted twice":
        one.process.send_signal(signal.SIGINT)
        one.until("stopping: ")
        one.process.send_signal(signal.SIGINT)
    elif how == "terminated":
        one.process.send_signal(signal.SIGTERM)
    else:
        ran = heldout("stop", "s", "--now", "--workspace", str(one.workspace))
        assert ran.returncode == 0 and f"process {one.process.pid} on " in ran.stdout, ran.stderr
    code, _ = one.ended()
    assert code == 1
    assert one.lines[-1] == "heldout: study 's' was stopped; `heldout resume s` goes on"
    assert one.study.state == "STOPPED" and not (one.study.folder / "stop").exists()
    cut = one.study.trials[number]
    assert cut.state is TrialState.RUNNING
    trials = resumed(one, heldout)
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 4
    with Journal.open(one.study.folder / "journal.backup.sqlite", read_only=True) as backup:
        assert backup.history()[number] == cut  # as it was when the study was taken up again
    again = trials[number]
    assert (again.attempt, again.seed, again.params, dict(again.retries)) == (1, cut.seed, cut.params, {})


@pytest.mark.study
def test_stopped_from_another_terminal_its_trials_end_first(tmp_path: Path, launched: Any, heldout: Heldout) -> None:
    one = launched("launch", write_space(tmp_path, **SLOW), "--trials", "5", "--study", "s", *CHEAP)
    one.until("trial 0 ")
    ran = heldout("stop", "s", "--workspace", str(one.workspace), "--json")
    assert json.loads(ran.stdout)["now"] is False
    code, _ = one.ended()
    assert code == 1 and one.study.state == "STOPPED" and not one.running()
    assert not (one.study.folder / "stop").exists()

    nobody = heldout("stop", "s", "--workspace", str(one.workspace))
    assert nobody.returncode == 2 and "nobody drives 's': it is stopped" in nobody.stderr


def test_an_interrupt_before_the_study_began_leaves_nothing(tmp_path: Path, launched: Any) -> None:
    one = launched("launch", write_space(tmp_path, **SLOW), "--trials", "5", "--study", "s", *CHEAP)
    one.until("loading the rows")
    one.process.send_signal(signal.SIGINT)
    code, _ = one.ended()
    assert code == 1 and "Traceback" not in "\n".join(one.lines)
    assert list((one.workspace / "studies").iterdir()) == []


@pytest.mark.slow
def test_a_second_driver_is_told_who_the_first_is(tmp_path: Path, launched: Any, heldout: Heldout) -> None:
    one = launched("launch", write_space(tmp_path, **SLOW), "--trials", "4", "--study", "s", *CHEAP)
    one.until("trial 0 ")
    second = heldout("resume", "s", "--workspace", str(one.workspace))
    who = f"process {one.process.pid} on {os.uname().nodename}"
    assert second.returncode == 2 and f"being driven already, by {who}; `heldout stop s`" in second.stderr
    assert one.ended()[0] == 0


def test_the_lock_dies_with_its_process_and_is_known_by_name(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from search.record.lock import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert str(driver_of(tmp_path)) == f"process {holder.pid} on {os.uname().nodename}"
        with pytest.raises(StudyError, match=f"process {holder.pid} on "), locked(tmp_path):
            pass
        holder.kill()
        holder.wait()
    assert driver_of(tmp_path) is None
    with locked(tmp_path):
        assert str(driver_of(tmp_path)) == f"process {os.getpid()} on {os.uname().nodename}"


def test_the_name_in_a_lock_that_nobody_holds_keeps_nobody_out(tmp_path: Path) -> None:
    # As a head leaves it that was lost: process 1 there is another one here.
    (tmp_path / "lock").write_text("process 1 on a-head-that-was-lost")
    assert driver_of(tmp_path) is None
    with locked(tmp_path):
        assert str(driver_of(tmp_path)) == f"process {os.getpid()} on {os.uname().nodename}"
    # And as one has it that is still there, seen from another machine with the same volume.
    code = (
        "import sys, time; from pathlib import Path; from search.record.lock import locked\n"
        "with locked(Path(sys.argv[1])):\n"
        "    Path(sys.argv[1], 'lock').write_text('process 1 on another-head')\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
            with pytest.raises(StudyError, match="driven already, by process 1 on another-head"), locked(tmp_path):
                pass
        finally:
            holder.kill()


def test_a_look_at_the_lock_never_refuses_a_driver(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from search.record.lock import driver_of\n"
        "while True: driver_of(Path(sys.argv[1]))"
    )
    (tmp_path / "lock").touch()
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as looker:
        try:
            until = time.monotonic() + 2
            while time.monotonic() < until:
                with locked(tmp_path):
                    pass
        finally:
            looker.kill()


def test_a_driver_waits_for_the_last_process_of_the_one_before(tmp_path: Path) -> None:
    with locked(tmp_path) as hold:
        left = subprocess.Popen(["sleep", "1"], pass_fds=(hold,))
        inherited = os.dup(hold)
        os.set_inheritable(inherited, False)
    # An orderly end gives the lock back whoever has inherited it.
    with locked(tmp_path):
        pass
    left.kill()
    left.wait()
    os.close(inherited)

    code = (
        "import os, subprocess, sys; from pathlib import Path; from search.record.lock import locked\n"
        "with locked(Path(sys.argv[1])) as hold:\n"
        "    subprocess.Popen(['sleep', '2'], pass_fds=(hold,), stdout=subprocess.DEVNULL)\n"
        "    os.kill(os.getpid(), 9)"
    )
    began = time.monotonic()
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert killed.returncode == -signal.SIGKILL
    assert driver_of(tmp_path) is None  # the driver is gone, what it left is not
    with locked(tmp_path):
        assert time.monotonic() - began >= 2.0


# ── longer plans ─────────────────────────────────────────────────────────────────────────────────


def launched_study(tmp_path: Path, heldout: Heldout, name: str, *options: str) -> dict[str, Any]:
    space = write_space(tmp_path)
    where = ("--workspace", str(tmp_path / "ws"), "--study", name, "--workers", "1", "--json")
    ran = heldout("launch", space, *options, *where)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


@pytest.mark.slow
def test_an_extended_study_is_what_a_longer_one_would_have_been(tmp_path: Path, heldout: Heldout) -> None:
    cheap = ("--confirm", "0", "--evaluate", "no")
    launched_study(tmp_path, heldout, "long", "--trials", "7", *cheap)
    launched_study(tmp_path, heldout, "short", "--trials", "3", *cheap)
    where = ("--workspace", str(tmp_path / "ws"))
    ran = heldout("resume", "short", "--trials", "+4", *where)
    assert ran.returncode == 0 and "4 of 7 trials are still to come" in ran.stderr, ran.stderr
    assert "opening" not in ran.stderr
    long, short = (Study(name, tmp_path / "ws").trials for name in ("long", "short"))
    assert [(t.params, t.seed, t.score) for t in short] == [(t.params, t.seed, t.score) for t in long]

    done = heldout("resume", "short", *where)
    assert done.returncode == 2 and "is complete" in done.stderr and "--trials +N" in done.stderr
    said = tmp_path / "ws" / "studies" / "short" / "tracking.json"
    whole = json.loads(said.read_text())
    # What a killed driver's tracker said before the last one, killed as well, had said anything.
    said.write_text(json.dumps(whole | {"status": "KILLED", "published": 5, "behind": 0}))
    late = heldout("resume", "short", *where)
    assert late.returncode == 0 and "MLflow catches up" in late.stderr
    assert json.loads(said.read_text()) == whole
    assert heldout("resume", "short", *where).returncode == 2
    fewer = heldout("resume", "short", "--trials", "5", *where)
    assert fewer.returncode == 2 and "at least 7" in fewer.stderr
    for wrong in ("0", "+0", "many", "-3"):
        assert heldout("resume", "short", f"--trials={wrong}", *where).returncode == 2


@pytest.mark.slow
def test_an_extension_after_the_test_costs_the_next_opening_and_says_so(tmp_path: Path, heldout: Heldout) -> None:
    found = launched_study(tmp_path, heldout, "s", "--trials", "3", "--confirm", "0")
    assert found["test"]["opening"] == 1
    where = ("--workspace", str(tmp_path / "ws"))
    ran = heldout("resume", "s", "--trials", "+1", *where)
    assert ran.returncode == 0, ran.stderr
    assert "costs another opening, with a wider interval; they stay sealed" in ran.stderr
    report = Study("s", tmp_path / "ws").report()
    assert report["test"] is None and "opened once before" in report["sealed"]

    ran = heldout("resume", "s", "--trials", "+1", "--evaluate", "yes", *where)
    assert ran.returncode == 0, ran.stderr
    again = Study("s", tmp_path / "ws").report()
    assert again["test"]["opening"] == 2 and "REUSED_TEST_SET" in again["verdicts"]
    assert again["test"]["level"] > found["test"]["level"]


# ── a changed module ─────────────────────────────────────────────────────────────────────────────


def interrupted(tmp_path: Path, launched: Any) -> Launched:
    one: Launched = launched("launch", write_space(tmp_path, **SLOW), "--trials", "4", "--study", "s", *CHEAP)
    one.until("trial 1 ")
    one.process.kill()
    one.process.wait()
    return one


@pytest.mark.study
def test_a_changed_module_is_refused_with_the_difference(tmp_path: Path, launched: Any, heldout: Heldout) -> None:
    one = interrupted(tmp_path, launched)
    write_space(tmp_path, **SLOW, build=PARTS["build"].replace("2, 16", "2, 32"))
    ran = heldout("resume", "s", "--workspace", str(one.workspace))
    assert ran.returncode == 2 and "--accept-changes" in ran.stderr
    assert re.search(r"^-.*2, 16", ran.stderr, re.M) and re.search(r"^\+.*2, 32", ran.stderr, re.M)
    assert one.study.state == "STOPPED"

    path = Path(write_space(tmp_path, **SLOW))
    path.write_text("# a comment is no change\n" + path.read_text())
    assert len(resumed(one, heldout)) == 4


@pytest.mark.slow
def test_a_module_that_is_gone_goes_on_as_recorded(tmp_path: Path, launched: Any, heldout: Heldout) -> None:
    one = interrupted(tmp_path, launched)
    (tmp_path / "tiny.py").unlink()
    assert len(resumed(one, heldout)) == 4


@pytest.mark.slow
def test_an_accepted_change_holds_for_what_follows_and_old_models_keep_their_text(
    tmp_path: Path, launched: Any, heldout: Heldout
) -> None:
    one = interrupted(tmp_path, launched)
    before = one.study.trials
    # Another name for the width, so that the old models could not be built by the new text.
    write_space(tmp_path, **SLOW, build=PARTS["build"].replace("f'units_{i}', 2, 16", "f'width_{i}', 3, 5"))
    trials = resumed(one, heldout, "--accept-changes")
    ended = [t.number for t in before if t.state is TrialState.COMPLETE]
    assert len(trials) == 4 and {0, 1} <= set(ended)
    texts = {t.text for t in trials}
    assert len(texts) == 2
    for trial in trials:
        names = {key.split("_")[0] for key in trial.params} - {"layers", "rate"}
        assert names == ({"units"} if trial.number in ended else {"width"})
    for number in (1, 3):
        out = tmp_path / f"out-{number}"
        ran = heldout("export", "s", "--trial", str(number), "--out", str(out), "--workspace", str(one.workspace))
        assert ran.returncode == 0, ran.stderr
        assert ("width_" in (out / "space.py").read_text()) == (number == 3)
        lineage = json.loads((out / "lineage.json").read_text())
        assert lineage["scores"]["validation"]["score"] == pytest.approx(trials[number].score)
    # And a further change is measured against the accepted text.
    again = heldout("resume", "s", "--trials", "+1", "--workspace", str(one.workspace))
    assert again.returncode == 0, again.stderr


@pytest.mark.slow
def test_a_change_of_the_rows_is_a_new_study(tmp_path: Path, launched: Any, heldout: Heldout) -> None:
    one = interrupted(tmp_path, launched)
    write_space(tmp_path, **SLOW, load=PARTS["load"].replace("size=(200", "size=(210"))
    ran = heldout("resume", "s", "--accept-changes", "--workspace", str(one.workspace))
    assert ran.returncode == 2 and "a study keeps its rows" in ran.stderr
    write_space(tmp_path, **SLOW, build="def build(hp):\n    return keras.Sequential([keras.Input((4,))])")
    ran = heldout("resume", "s", "--accept-changes", "--workspace", str(one.workspace))
    assert ran.returncode == 2 and "compile" in ran.stderr
    assert one.study.state == "STOPPED"
    write_space(tmp_path, **SLOW)
    assert len(resumed(one, heldout)) == 4


@pytest.mark.slow
def test_a_study_that_may_hold_no_more_ends_its_search_and_goes_on_with_a_larger_limit(
    tmp_path: Path, heldout: Heldout
) -> None:
    wide = PARTS["build"].replace("2, 16", "4000, 4100").replace("hp.Int('layers', 1, 2)", "1")  # 0.1 MB each
    space = write_space(tmp_path, build=wide)
    where = ("--workspace", str(tmp_path / "ws"))
    plan = ("launch", space, "--trials", "14", "--study", "s", *CHEAP, "--max-disk", "900K", *where)
    ran = heldout(*plan)
    study = Study("s", tmp_path / "ws")
    ended = len(study.trials)
    assert ran.returncode == 1 and 1 < ended < 14, ran.stderr
    assert "has reached --max-disk 900.0 KB: only the" in ran.stderr and "so the search ends here" in ran.stderr
    assert study.state == "STOPPED" and all(t.state is TrialState.COMPLETE for t in study.trials)
    left = [path.parent.name for path in study.folder.glob("trials/*/model.weights.h5")]
    assert "0000" in left and len(left) <= 2  # the baseline's, and the best
    ran = heldout("resume", "s", "--max-disk", "100M", *where)
    assert ran.returncode == 0, ran.stderr
    assert len(study.trials) == 14


LAYER = """
@keras.saving.register_keras_serializable("tiny")
class Turn(keras.layers.Layer):
    def call(self, x):
        return x * FACTOR
"""


@pytest.mark.slow
def test_a_model_is_tested_by_the_text_that_it_was_trained_from(
    tmp_path: Path, launched: Any, heldout: Heldout
) -> None:
    """A custom layer that means something else in the changed module must not change what old models predict."""
    build = PARTS["build"].replace(
        "    model.add(keras.layers.Dense(2, activation='softmax'))\n",
        "    model.add(keras.layers.Dense(2, activation='softmax'))\n    model.add(Turn())\n",
    )
    build = build.replace("hp.Int('layers', 1, 2)", "1").replace("default=1e-2", "default=5e-2")
    parts = {"build": build, "objective": 'objective = "val_accuracy"\nepochs = 8'}
    with_layer = {**SLOW, **parts}
    imports, rest = SLOW["imports"], SLOW["rest"]
    write_space(tmp_path, **(with_layer | {"imports": imports + LAYER.replace("FACTOR", "1.0"), "rest": rest}))
    one: Launched = launched(
        "launch", str(tmp_path / "tiny.py"), "--trials", "3", "--study", "s", "--confirm", "0", "--workers", "1"
    )
    one.until("trial 1 ")
    one.process.kill()
    one.process.wait()
    # Trained with it, a model learns to be right as well; loaded with it, an old one is wrong wherever it was right.
    write_space(tmp_path, **(with_layer | {"imports": imports + LAYER.replace("FACTOR", "-1.0"), "rest": rest}))
    ran = heldout("resume", "s", "--accept-changes", "--workspace", str(one.workspace), "--json")
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["baseline"]["trial"] == 0 and found["test"]["opening"] == 1
    assert abs(found["test"]["baseline"] - found["baseline"]["validation"]) < 0.35
    assert found["baseline"]["validation"] > 0.7

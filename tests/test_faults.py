"""Faults put into real studies: killed drivers, trials and templates, odd trials, full and read-only disks.

Run with ``pytest -m faults``. Moments are random; each test prints its seed, and ``HELDOUT_FAULT_SEED`` sets it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from search.executors import Slot
from search.executors.local import LocalExecutor
from search.loop.surroundings import Calm
from search.record.journal import Journal
from search.study import Study
from search.trial import Trial, TrialState
from tests.conftest import ROOT, run_heldout
from tests.test_driver import driver
from tests.test_executors import alive, gone
from tests.tiny import PARTS, write_space

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

# Epochs take a while, so that most moments fall into a trial.
SLOW = {
    "imports": PARTS["imports"] + "\nimport os, signal, subprocess, sys, time",
    "rest": (
        "class Slow(keras.callbacks.Callback):\n"
        "    def on_epoch_end(self, epoch, logs=None):\n"
        "        time.sleep(0.15)\n\n\n"
        "def callbacks(hp):\n"
        "    return [Slow()]"
    ),
}
CHEAP = ("--evaluate", "no", "--confirm", "0")


def dice(name: str) -> random.Random:
    seed = os.environ.get("HELDOUT_FAULT_SEED") or str(time.time_ns())
    print(f"HELDOUT_FAULT_SEED={seed}")
    return random.Random(f"{name}/{seed}")


class Driven:
    """A driver in a process of its own, with what it has printed so far."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "search.cli", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            cwd=ROOT,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())

    def __enter__(self) -> Driven:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        self._reader.join(10)
        assert self.process.stderr is not None
        self.process.stderr.close()

    def has_said(self, text: str) -> bool:
        return any(text in line for line in list(self.lines))

    def until(self, text: str, within: float = 240.0) -> None:
        until = time.monotonic() + within
        while not self.has_said(text):
            assert self.process.poll() is None and time.monotonic() < until, (text, self.lines)
            time.sleep(0.05)

    def complete(self, within: float = 600.0) -> None:
        assert self.process.wait(within) == 0, self.lines

    def reported(self) -> dict[int, float]:
        """Trials that it has said are complete, with their scores as printed."""
        found = (re.match(r"trial (\d+) \[\d+/\d+\] ([\d.e+-]+) after", line) for line in list(self.lines))
        return {int(match[1]): float(match[2]) for match in found if match}


def children(pid: int) -> list[int]:
    """Processes whose parent is this one."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            with contextlib.suppress(OSError, IndexError):
                fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == pid and fields[0] not in "ZX":
                    found.append(int(entry.name))
    return found


def template_of(driver: int) -> int | None:
    """The process that a driver's trials are forked from."""
    for pid in children(driver):
        with contextlib.suppress(OSError):
            if b"search.processes.template" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
    return None


def trials_of(driver: int) -> list[int]:
    template = template_of(driver)
    return [] if template is None else children(template)


def mlflow_runs(workspace: Path) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{workspace / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments, max_results=5000))


def check_mlflow(workspace: Path, trials: dict[str, tuple[Trial, ...]]) -> None:
    """Each attempt of each trial is there once, each complete trial is FINISHED once, and nothing is left RUNNING."""
    attempts: Counter[tuple[str, str, str]] = Counter()
    finished: Counter[tuple[str, str]] = Counter()
    studies: Counter[str] = Counter()
    for run in mlflow_runs(workspace):
        tags = run.data.tags
        assert run.info.status != "RUNNING", tags
        if "heldout.trial" not in tags:
            studies[tags["heldout.study"]] += 1
            continue
        attempts[tags["heldout.study"], tags["heldout.trial"], tags["heldout.attempt"]] += 1
        if run.info.status == "FINISHED":
            finished[tags["heldout.study"], tags["heldout.trial"]] += 1
            assert "score" in run.data.metrics
    assert set(studies.values()) == {1} and set(studies) == set(trials)
    assert set(attempts.values()) == {1}
    expected = {(s, str(t.number)) for s, all_ in trials.items() for t in all_ if t.state is TrialState.COMPLETE}
    assert finished == dict.fromkeys(expected, 1)


# ── killed ───────────────────────────────────────────────────────────────────────────────────────


def test_a_driver_killed_at_fifty_random_moments_loses_nothing(tmp_path: Path) -> None:
    """And none of its trials survives it by two seconds."""
    rng, workspace, kills, plan = dice("driver"), tmp_path / "ws", 0, 12
    where = ("--workspace", str(workspace))
    space = write_space(tmp_path, **SLOW)
    done: dict[str, tuple[Trial, ...]] = {}
    known: dict[str, dict[int, Trial]] = {}
    while kills < 50:
        name = f"s{len(done)}"
        mine = known.setdefault(name, {})
        while True:
            began = (workspace / "studies" / name / "journal.sqlite").exists() and Study(name, workspace).meta("state")
            if began == "COMPLETE":  # killed when all was done: MLflow may lack something, or has got it meanwhile
                ran = run_heldout("resume", name, *where)
                assert ran.returncode == 0 or "is complete" in ran.stderr, ran.stderr
                break
            start = ("resume", name) if began else ("launch", space, "--trials", str(plan), "--study", name, *CHEAP)
            with Driven(*start, *where) as driver:
                # Half of the moments lie in the start, half in the search.
                delay = rng.uniform(0.0, 8.0)
                if rng.random() < 0.5:
                    while driver.process.poll() is None and not any(line.startswith("trial ") for line in driver.lines):
                        time.sleep(0.02)
                    delay = rng.uniform(0.0, 3.0)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    driver.process.wait(delay)
                if driver.process.poll() is not None:
                    assert driver.process.returncode == 0, driver.lines
                    break
                template = template_of(driver.process.pid)
                left = [pid for pid in [template, *trials_of(driver.process.pid)] if pid is not None]
                driver.process.kill()
                driver.process.wait()
                kills += 1
                assert gone(left, 2.0), "a trial outlived its driver"
            said = driver.reported()
            if not (workspace / "studies" / name / "journal.sqlite").exists():
                assert not said
                continue
            study = Study(name, workspace)
            if study.meta("state") is None:
                assert not said  # it never began; the next launch takes its name over
                continue
            trials = {t.number: t for t in study.trials}
            for number, score in said.items():
                assert trials[number].state is TrialState.COMPLETE and f"{trials[number].score:.4g}" == f"{score:.4g}"
            for number, trial in mine.items():
                assert trials[number] == trial
            mine |= {number: trial for number, trial in trials.items() if trial.state.is_finished}
        trials = Study(name, workspace).trials
        assert [t.number for t in trials] == list(range(plan))
        assert all(t.state is TrialState.COMPLETE for t in trials)
        assert all(trials[number] == trial for number, trial in mine.items())
        assert not any(t.retries for t in trials)  # nobody blames a trial for its driver
        done[name] = trials
        print(f"{name}: complete after {kills} kills in all; attempts {[t.attempt for t in trials]}")
    check_mlflow(workspace, done)


def test_trials_killed_at_fifty_random_moments_are_retried_and_the_totals_are_exact(tmp_path: Path) -> None:
    rng, workspace, plan, killed = dice("trials"), tmp_path / "ws", 60, 0
    space = write_space(tmp_path, **SLOW, objective='objective = "val_accuracy"\nepochs = 6')
    arguments = ("launch", space, "--trials", str(plan), "--study", "s", "--workers", "2", *CHEAP)
    with Driven(*arguments, "--workspace", str(workspace)) as driver:
        driver.until("trial 0 ")
        while killed < 50 and driver.process.poll() is None:
            time.sleep(rng.uniform(0.4, 2.4))  # not so often that ten trials in a row fail
            running = trials_of(driver.process.pid)
            if running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rng.choice(running), signal.SIGKILL)
                    killed += 1
        driver.complete()
    trials = Study("s", workspace).trials
    assert [t.number for t in trials] == list(range(plan))
    assert all(t.state in (TrialState.COMPLETE, TrialState.FAILED) for t in trials)
    for trial in trials:
        assert trial.state is TrialState.COMPLETE or (trial.reason, dict(trial.retries)) == ("crash", {"crash": 2})
        assert trial.attempt == sum(trial.retries.values())
    print(f"{killed} kills, {sum(t.attempt for t in trials)} retries, "
          f"{sum(t.state is TrialState.FAILED for t in trials)} of {plan} trials failed")  # fmt: skip
    check_mlflow(workspace, {"s": trials})


def test_a_killed_template_costs_the_trials_in_flight_one_attempt(tmp_path: Path) -> None:
    rng, workspace, plan, killed = dice("template"), tmp_path / "ws", 12, 0
    space = write_space(tmp_path, **SLOW, objective='objective = "val_accuracy"\nepochs = 4')
    arguments = ("launch", space, "--trials", str(plan), "--study", "s", "--workers", "2", *CHEAP)
    with Driven(*arguments, "--workspace", str(workspace)) as driver:
        driver.until("trial 0 ")
        while killed < 4 and driver.process.poll() is None:
            ended = len(driver.reported())
            template, running = template_of(driver.process.pid), trials_of(driver.process.pid)
            if template is not None and running:
                os.kill(template, signal.SIGKILL)
                killed += 1
                assert gone(running, 2.0), "a trial outlived its template"
            # A death counts against the study only as long as no job ends in between.
            until = time.monotonic() + 60
            while len(driver.reported()) == ended and driver.process.poll() is None and time.monotonic() < until:
                time.sleep(0.05)
            time.sleep(rng.uniform(0.0, 1.0))
        driver.complete()
    trials = Study("s", workspace).trials
    assert killed == 4 and [t.number for t in trials] == list(range(plan))
    assert {reason for t in trials for reason in t.retries} == {"lost"}
    for trial in trials:  # one that ran at three of the deaths has used up its attempts
        assert trial.state is TrialState.COMPLETE or (trial.reason, trial.attempt) == ("lost", 2)
        assert trial.attempt == trial.retries.get("lost", 0)
    assert 1 <= sum(t.retries.get("lost", 0) for t in trials) <= 8  # two slots, four deaths


def test_a_thousand_trials_that_do_nothing_leave_nothing(tmp_path: Path) -> None:
    """Exact totals; no descriptor, process or memory more after a thousand trials than after two hundred."""
    executor = LocalExecutor(
        [Slot(n, 1) for n in range(4)],
        log=tmp_path / "template.log",
        path=[str(Path(__file__).parent)],
        entry="idle:main",
        required=("numpy",),
        preload=("idle",),
    )
    seen: list[tuple[int, int, int, float, float]] = []

    class Counting(Calm):
        ended_trials = 0

        def ended(self, trial: Trial) -> None:
            self.ended_trials += 1
            if self.ended_trials in (200, 1000):
                template = executor.template_pid or 0
                gc.collect()
                seen.append((
                    len(os.listdir("/proc/self/fd")), len(os.listdir(f"/proc/{template}/fd")), len(children(template)),
                    resident(os.getpid()), resident(template),
                ))  # fmt: skip

    with Journal.create(tmp_path / "journal.sqlite", {}) as journal, executor:
        made = driver(journal, None, executor=executor, trials=1000, surroundings=Counting())
        assert made.run() == "complete"
        trials = journal.history()
        assert [t.number for t in trials] == list(range(1000))
        assert all(t.state is TrialState.COMPLETE and t.attempt == 0 for t in trials)
        assert len(journal.reports()) == 1000 and len(journal.guards()) == 1000
    (fds, template_fds, running, memory, template_memory), after = seen
    print(f"descriptors {fds} -> {after[0]}, of the template {template_fds} -> {after[1]}")
    print(f"processes {running} -> {after[2]}")
    print(f"MiB {memory:.1f} -> {after[3]:.1f}, of the template {template_memory:.1f} -> {after[4]:.1f}")
    # A few of each come and go with the trials that run at that moment.
    assert after[0] <= fds + 8 and after[1] <= template_fds + 4 and after[2] <= 4
    # The driver has the history of 800 more trials in memory.
    assert after[3] <= memory + 8 and after[4] <= template_memory + 2


def resident(pid: int) -> float:
    """MiB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


# ── trials that misbehave ────────────────────────────────────────────────────────────────────────

ODD = """
def sockets():
    for fd in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                yield int(fd)
        except OSError:
            pass


class Bomb:
    def __reduce__(self):
        return (os.system, (f"touch {MARKER}",))


def fit(hp, model, *args, **kwargs):
    how = hp.Choice("how", HOWS)
    if how == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "memory":
        # Limited to a little more than it has, it allocates until it is refused.
        resource.setrlimit(resource.RLIMIT_AS, (own_size() + (256 << 20), resource.RLIM_INFINITY))
        hoard = []
        while True:
            hoard.append(np.ones(1 << 20))
    if how == "sleep":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(3600)
    if how == "grandchild":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
        with open(PIDS, "a") as file:
            file.write(f"{child.pid}\\n")
    if how in ("garbage", "pickle"):
        for fd in sockets():
            os.write(fd, b"GET / HTTP/1.1\\r\\n\\r\\n" * 100 if how == "garbage" else pickle.dumps(Bomb()))
        time.sleep(3600)
    if how == "silent exit":
        os._exit(0)
    done = model.fit(*args, **kwargs)
    if how in ("nan", "inf"):
        weights = model.get_weights()
        model.set_weights([np.full_like(w, np.nan if how == "nan" else np.inf) for w in weights])
    return done


def own_size():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
"""


def test_trials_that_misbehave_end_by_their_kind_and_leave_nothing(tmp_path: Path) -> None:
    hows = ["well", "segfault", "memory", "sleep", "grandchild", "garbage", "pickle", "silent exit", "nan", "inf"]
    marker, pids = tmp_path / "exploded", tmp_path / "pids"
    head = f"HOWS = {hows!r}\nMARKER = {str(marker)!r}\nPIDS = {str(pids)!r}\n"
    imports = PARTS["imports"] + "\nimport os, pickle, resource, signal, subprocess, sys, time"
    build = PARTS["build"].replace("hp.Int('layers', 1, 2)", "1").replace("hp.Int(f'units_{i}', 2, 16)", "8")
    build = build.replace("hp.Float('rate', 1e-3, 1e-1, sampling='log', default=1e-2)", "1e-2")
    space = write_space(tmp_path, imports=imports, rest=head + ODD, build=build)
    workspace = tmp_path / "ws"
    ran = run_heldout(
        "launch", space, "--trials", "30", "--sampler", "random", "--workers", "2", "--heartbeat", "5", "--study", "s",
        *CHEAP, "--workspace", str(workspace), "--json", timeout=900,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    trials = Study("s", workspace).trials
    found = {t.params["how"]: (t.state.value, t.reason, dict(t.retries)) for t in trials}
    assert len(trials) == len(hows) and report["ended"] == "exhausted"
    crashed = ("FAILED", "crash", {"crash": 2})
    assert found == {
        "well": ("COMPLETE", None, {}),
        "segfault": crashed,
        "memory": ("FAILED", "oom", {"oom": 1}),
        "sleep": ("FAILED", "timeout", {}),
        "grandchild": ("COMPLETE", None, {}),
        "garbage": crashed,
        "pickle": crashed,
        "silent exit": crashed,
        "nan": ("FAILED", "nan", {}),
        "inf": ("FAILED", "nan", {}),
    }
    assert report["failures"] == {"crash": 4, "oom": 1, "timeout": 1, "nan": 2}
    assert report["retries"] == {"crash": 8, "oom": 1}
    assert not marker.exists(), "what a trial sent was unpickled"
    assert not any(alive(int(pid)) for pid in pids.read_text().split())
    check_mlflow(workspace, {"s": trials})


# ── disks ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own that can be filled up and made read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48m", "none", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small disk needs the right to mount one: {mounted.stderr.strip()}")
    yield folder
    while os.path.ismount(folder):  # a test may have mounted over it
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Leave not a byte of room."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * (1 << 16))
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x")
    return filler


def test_a_full_disk_pauses_the_study_and_costs_nothing(tmp_path: Path, small_disk: Path) -> None:
    space, workspace, plan = write_space(tmp_path, **SLOW), small_disk / "ws", 14
    where = ("--workspace", str(workspace))
    arguments = ("launch", space, "--trials", str(plan), "--study", "s", "--workers", "2", *CHEAP, *where)
    with Driven(*arguments, HELDOUT_MIN_FREE="4M") as driver:
        for round_ in range(3):
            driver.until(f"trial {2 + 3 * round_} ")
            filler = fill(small_disk)
            until = time.monotonic() + 120
            while sum(line.startswith("paused") for line in list(driver.lines)) <= round_:
                assert time.monotonic() < until and driver.process.poll() is None, driver.lines
                time.sleep(0.05)
            time.sleep(2.0)
            seen = len(driver.reported())
            shown = run_heldout("status", "s", *where)
            assert shown.returncode == 0, shown.stderr
            filler.unlink()
            until = time.monotonic() + 120
            while len(driver.reported()) <= seen and driver.process.poll() is None:
                assert time.monotonic() < until, driver.lines
                time.sleep(0.05)
        driver.complete()
    trials = Study("s", workspace).trials
    assert [(t.number, t.state, dict(t.retries)) for t in trials] == [(n, TrialState.COMPLETE, {}) for n in range(plan)]
    for trial in trials:
        assert len([r for r in _reports(workspace, trial.number) if r.attempt == trial.attempt]) == 2
    check_mlflow(workspace, {"s": trials})


def _reports(workspace: Path, number: int) -> tuple[Any, ...]:
    with Journal.open(workspace / "studies" / "s" / "journal.sqlite", read_only=True) as journal:
        return journal.reports(number)


def test_a_launch_on_a_disk_without_room_is_refused(tmp_path: Path, small_disk: Path) -> None:
    fill(small_disk)
    ran = run_heldout("launch", write_space(tmp_path), "--workspace", str(small_disk / "ws"), HELDOUT_MIN_FREE="4M")
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
    assert len([line for line in ran.stderr.splitlines() if line.startswith("heldout: ")]) == 1


def test_a_workspace_made_read_only_pauses_the_study_and_costs_nothing(tmp_path: Path, small_disk: Path) -> None:
    space, workspace = write_space(tmp_path, **SLOW), small_disk / "ws"
    where = ("--workspace", str(workspace))
    with Driven("launch", space, "--trials", "8", "--study", "s", *CHEAP, *where, HELDOUT_MIN_FREE="4M") as driver:
        driver.until("trial 2 ")
        # Over the place itself, so that it counts for every file that is opened from now on.
        subprocess.run(["mount", "--bind", str(small_disk), str(small_disk)], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", str(small_disk)], check=True)
        assert subprocess.run(["touch", str(small_disk / "x")], capture_output=True).returncode != 0
        driver.until("it goes on by itself")  # driver or tracker, whoever has something to write
        time.sleep(3.0)
        assert driver.process.poll() is None, driver.lines
        subprocess.run(["mount", "-o", "remount,rw,bind", str(small_disk)], check=True)
        driver.complete()
    trials = Study("s", workspace).trials
    assert [(t.number, t.state, dict(t.retries)) for t in trials] == [(n, TrialState.COMPLETE, {}) for n in range(8)]
    check_mlflow(workspace, {"s": trials})

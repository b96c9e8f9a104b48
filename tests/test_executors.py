"""The contract of executors, held against every one of them, and the safety of the process-based ones.

Bodies run from ``bodies.py``. Except where Keras is the point, the template imports nothing, so that a test
takes milliseconds; what is tested of processes, sockets and signals is the same.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from search.errors import ExecutorError, RequestError
from search.executors import Event, Executor, Exited, Job, Lost, Message, Slot, Warned
from search.executors.inline import InlineExecutor
from search.executors.local import LocalExecutor, start_method
from search.processes import template
from search.processes.channel import MAX_FRAME, ChannelError, Link, Receiver, encode

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
METHODS = ("fork", "spawn")
# Far more than anything here takes, even on a busy machine: it bounds a failure, not a success.
PATIENCE = 60.0
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

Make = Callable[..., LocalExecutor]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes started executors, and ends them with the test."""
    made: list[LocalExecutor] = []

    def build(
        method: str | None = "fork", slots: Sequence[Slot] = (Slot(0, 1),), **options: Any
    ) -> LocalExecutor:
        options = {"required": (), "entry": "bodies:main", "path": [str(HERE)]} | options
        made.append(LocalExecutor(slots, start_method=method, log=tmp_path / "template.log", **options))
        made[-1].start()
        return made[-1]

    yield build
    for executor in made:
        executor.close()


@pytest.fixture(params=METHODS)
def local(request: pytest.FixtureRequest, make: Make) -> LocalExecutor:
    return make(request.param)


def collect(executor: Executor, *ids: str, patience: float = PATIENCE) -> list[Event]:
    """Events until each of these jobs has ended."""
    events: list[Event] = []
    until = time.monotonic() + patience
    while not set(ids) <= {event.job for event in events if isinstance(event, (Exited, Lost))}:
        assert time.monotonic() < until, f"{ids} did not end; got {events}"
        events += executor.poll(0.5)
    return events


def first_message(executor: Executor, job: str = "a") -> dict[str, Any]:
    """The next message of a job that goes on; events that came along with it are dropped."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        for event in executor.poll(0.5):
            if isinstance(event, Message) and event.job == job:
                return event.body
            assert not isinstance(event, (Exited, Lost)), event
    raise AssertionError("no message came")


def run(executor: Executor, kind: str, id: str = "a", **payload: Any) -> tuple[list[dict[str, Any]], Exited]:
    """Run one body to its end: its messages, and how it exited."""
    executor.submit(Job(id, kind, payload), None)
    events = collect(executor, id)
    last = events[-1]
    assert isinstance(last, Exited), events
    return [event.body for event in events if isinstance(event, Message)], last


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def gone(pids: Sequence[int], within: float) -> bool:
    until = time.monotonic() + within
    while any(alive(pid) for pid in pids):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


# The contract


def inline(job: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
    if job["kind"] == "echo":
        send({"type": "result", "body": job["payload"]["body"]})
    elif job["kind"] == "chatter":
        for number in range(job["payload"]["count"]):
            send({"number": number, "filling": "x" * job["payload"]["size"]})
    elif job["kind"] == "raises":
        raise RuntimeError("out of the body")


@pytest.fixture(scope="module")
def ray_executor(private_ray: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Executor]]:
    """Gives the same executor on Ray to every test, or another one after a test has closed it."""
    from tests.on_ray import Anywhere, on_ray

    with contextlib.ExitStack() as stack:
        made: list[Anywhere] = []

        def living() -> Executor:
            if not made or made[-1].is_closed:
                made.append(stack.enter_context(on_ray(private_ray, tmp_path_factory.mktemp("ray"))))
            return made[-1]

        yield living


@pytest.fixture(params=(*METHODS, "inline", "ray"))
def executor(request: pytest.FixtureRequest, make: Make) -> Iterator[Executor]:
    if request.param == "inline":
        with InlineExecutor(inline) as executor:
            yield executor
    elif request.param == "ray":
        yield request.getfixturevalue("ray_executor")()
    else:
        yield make(request.param)


def test_a_job_sends_its_messages_and_exits(executor: Executor) -> None:
    body = {"text": "✓ \u0000", "number": 1.5, "none": None, "nested": [{"a": [1, True]}]}
    messages, exited = run(executor, "echo", body=body)
    assert messages == [{"type": "result", "body": body}]
    assert (exited.job, exited.code, exited.signal) == ("a", 0, None)
    assert 0 <= exited.seconds < PATIENCE


def test_all_messages_come_in_order_before_the_exit(executor: Executor) -> None:
    messages, exited = run(executor, "chatter", count=500, size=2000)
    assert [message["number"] for message in messages] == list(range(500))
    assert exited.code == 0


def test_a_job_that_says_nothing_just_exits(executor: Executor) -> None:
    messages, exited = run(executor, "nothing")
    assert messages == [] and exited.code == 0


def test_an_exception_exits_with_1_and_is_in_the_log(executor: Executor, tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    executor.submit(Job("a", "raises", {}, log=str(log)), None)
    assert collect(executor, "a")[-1].code == 1  # type: ignore[union-attr]
    assert "RuntimeError: out of the body" in log.read_text()


def test_slots_and_ids_are_free_again_after_the_exit_and_not_before(executor: Executor) -> None:
    slot = executor.slots[0]
    executor.submit(Job("a", "nothing"), slot)
    with pytest.raises(ValueError):
        executor.submit(Job("b", "nothing"), slot)
    with pytest.raises(ValueError):
        executor.submit(Job("a", "nothing"), None)
    collect(executor, "a")
    executor.submit(Job("a", "nothing"), slot)
    collect(executor, "a")


def test_strangers_are_ignored_and_closing_twice_is_fine(executor: Executor) -> None:
    executor.send("nobody", {"a": 1})
    executor.kill("nobody")
    assert executor.poll(0.0) == []
    executor.close()
    executor.close()


def test_what_json_cannot_hold_is_refused_in_the_driver(executor: Executor) -> None:
    with pytest.raises(TypeError):
        executor.submit(Job("a", "echo", {"body": object()}), None)


# How a job process is set up


@linux
def test_a_job_leads_its_own_session_with_clean_signals_and_descriptors(local: LocalExecutor) -> None:
    for id in ("a", "b"):  # At once, so that one could inherit what belongs to the other.
        local.submit(Job(id, "about", {"names": []}), None)
    events = collect(local, "a", "b")
    for about in (event.body for event in events if isinstance(event, Message)):
        assert about["pid"] == about["group"] == about["session"]
        assert about["parent"] == local.template_pid
        assert about["interrupt_ignored"] and about["terminate_default"] and about["blocked"] == []
        assert about["stdin"] == os.devnull
        assert len(about["sockets"]) == 1
        assert about["path"][0] == str(HERE)


def test_the_environment_is_the_drivers_then_the_jobs_then_the_slots(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    for method in METHODS:
        monkeypatch.setenv("OUTER", "driver")
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
        slot = Slot(0, 1, {"CUDA_VISIBLE_DEVICES": "-1", "WHOSE": "slot"})
        executor = make(method, [slot], template_threads=2, backend="jax")
        names = ["OUTER", "WHOSE", "MINE", "CUDA_VISIBLE_DEVICES", "KERAS_BACKEND"]
        names += ["OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "TF_CPP_MIN_LOG_LEVEL"]
        executor.submit(Job("a", "about", {"names": names}, env={"MINE": "job", "WHOSE": "job"}), slot)
        values = ["driver", "slot", "job", "-1", "jax", "3", "2", "3"]
        assert first_message(executor)["env"] == dict(zip(names, values, strict=True))
        executor.close()


def test_output_is_appended_to_the_log_of_the_job(local: LocalExecutor, tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    log.write_text("before\n")
    local.submit(Job("a", "prints", log=str(log)), None)
    collect(local, "a")
    assert log.read_text().splitlines() == [
        "before",
        "to stdout: ✓ \\udcff",
        "to stderr",
        "to the descriptor",
    ]


def test_a_log_that_cannot_be_opened_is_a_warning(local: LocalExecutor, tmp_path: Path) -> None:
    local.submit(Job("a", "prints", log=str(tmp_path / "missing" / "job.log")), None)
    warned, exited = collect(local, "a")
    assert isinstance(warned, Warned) and "job a" in warned.text and "\n" not in warned.text
    assert isinstance(exited, Exited) and exited.code == 0


def test_the_driver_and_a_job_talk_both_ways(local: LocalExecutor) -> None:
    local.submit(Job("a", "dialogue"), None)
    for question in (1, "x" * 300_000, [2]):
        local.send("a", {"question": question})
        assert first_message(local) == {"answer": question * 2}
    local.send("a", {"stop": True})
    assert collect(local, "a")[-1].code == 0  # type: ignore[union-attr]


def test_receive_gives_up_after_its_timeout(local: LocalExecutor) -> None:
    messages, _ = run(local, "silence")
    assert messages == [{"received": None}]


def test_payloads_larger_than_any_socket_buffer_arrive(local: LocalExecutor) -> None:
    messages, _ = run(local, "echo", body="x" * 5_000_000)
    assert len(messages[0]["body"]) == 5_000_000


def test_a_payload_over_the_limit_is_refused_and_leaves_nothing(local: LocalExecutor) -> None:
    with pytest.raises(ChannelError, match="must fit"):
        local.submit(Job("a", "echo", {"body": "x" * MAX_FRAME}), None)
    assert run(local, "nothing")[1].code == 0


@pytest.mark.parametrize(("code", "status"), [(None, 0), (0, 0), (3, 3), ("words", 1)])
def test_a_body_may_exit(make: Make, code: Any, status: int) -> None:
    assert run(make(), "exits", code=code)[1].code == status


def test_a_signal_that_ends_a_job_is_told(local: LocalExecutor, tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    local.submit(Job("a", "aborts", log=str(log)), None)
    events = collect(local, "a")
    assert events[0] == Message("a", {"before": True})
    assert isinstance(events[-1], Exited) and (events[-1].code, events[-1].signal) == (None, signal.SIGSEGV)
    assert "Fatal Python error: Segmentation fault" in log.read_text()


def test_an_entry_that_cannot_be_imported_exits_with_1(make: Make, tmp_path: Path) -> None:
    executor = make(entry="nowhere:main")
    executor.submit(Job("a", "x", log=str(tmp_path / "job.log")), None)
    assert collect(executor, "a")[-1].code == 1  # type: ignore[union-attr]
    assert "No module named 'nowhere'" in (tmp_path / "job.log").read_text()


# Jobs that misbehave


@pytest.mark.parametrize(
    "what", ["pickle", "text", "huge", "list", "deep", "broken", "bytes", "empty", "flood"]
)
def test_garbage_fails_the_job_and_nothing_else(make: Make, what: str) -> None:
    executor = make()
    executor.submit(Job("bystander", "dialogue"), None)
    messages, exited = run(executor, "writes", what=what)
    assert messages[0] == {"before": True}
    assert [message.get("reason") for message in messages[1:]] == ["crash"]
    assert "\n" not in messages[1]["message"] and len(messages[1]["message"]) < 500
    assert exited.signal in (signal.SIGTERM, signal.SIGKILL)
    executor.send("bystander", {"question": 2})
    assert first_message(executor, "bystander") == {"answer": 4}


@linux
def test_kill_ends_a_job_and_its_children_even_if_it_ignores_sigterm(local: LocalExecutor) -> None:
    for kind, number in (("stubborn", signal.SIGKILL), ("spins", signal.SIGTERM), ("breeds", signal.SIGTERM)):
        local.submit(Job("a", kind), None)
        pids = first_message(local)["pids"]
        began = time.monotonic()
        local.kill("a")
        exited = collect(local, "a")[-1]
        assert isinstance(exited, Exited) and exited.signal == number
        assert time.monotonic() - began < 5
        assert gone(pids, 2.0)


def test_a_job_killed_before_it_could_start_still_ends(make: Make) -> None:
    for method in METHODS:
        executor = make(method)
        executor.submit(Job("a", "sleeps"), None)
        executor.kill("a")
        assert isinstance(collect(executor, "a")[-1], Exited)


@linux
def test_what_a_job_leaves_behind_dies_with_it(local: LocalExecutor) -> None:
    messages, exited = run(local, "breeds", end=True)
    assert exited.code == 0
    assert gone(messages[0]["pids"], 2.0)


def test_without_waitid_the_dead_are_reaped_and_what_they_left_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As on macOS before Python 3.13.
    monkeypatch.delattr(os, "waitid", raising=False)
    read, write = os.pipe()
    process = subprocess.Popen(["sh", "-c", "sleep 300 & echo $!"], stdout=write, start_new_session=True)
    os.close(write)
    with open(read) as pipe:
        lingerer = int(pipe.readline())
        job = template._Running(process.pid, 0.0, process)
        while (status := template._ended(job)) is None:
            time.sleep(0.01)
        assert status == 0 and process.returncode == 0
        assert pipe.read() == ""  # The lingerer held the other end.
    assert sys.platform != "linux" or gone([lingerer], 2.0)


# The death of the driver and of the template


@linux
@pytest.mark.parametrize("method", METHODS)
def test_no_trial_outlives_a_killed_driver(method: str, tmp_path: Path) -> None:
    driver = subprocess.Popen(
        [sys.executable, str(HERE / "bodies.py"), method, str(tmp_path / "log")],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert driver.stdout is not None
    with driver, driver.stdout:
        pids = [int(word) for word in driver.stdout.readline().split()]
        assert len(pids) == 6 and all(alive(pid) for pid in pids)
        driver.kill()
        driver.wait()
        assert gone(pids, 2.0), (tmp_path / "log").read_text()


@linux
def test_no_trial_outlives_a_killed_template_and_each_is_told_lost(local: LocalExecutor) -> None:
    kinds = ("sleeps", "spins", "breeds")
    for kind in kinds:
        local.submit(Job(kind, kind), None)
    pids: list[int] = []
    while len(pids) < 5:
        pids += [pid for event in local.poll(1.0) if isinstance(event, Message) for pid in event.body["pids"]]
    before = local.template_pid
    assert before is not None
    os.kill(before, signal.SIGKILL)
    began = time.monotonic()
    events = collect(local, *kinds)
    assert {event.job for event in events if isinstance(event, Lost)} == set(kinds)
    assert not [event for event in events if isinstance(event, Exited)]
    assert gone(pids, 2.0 - (time.monotonic() - began))
    assert run(local, "echo", body=1)[0] == [{"type": "result", "body": 1}]
    assert local.template_pid != before


@linux
def test_messages_sent_before_the_template_died_are_not_lost(make: Make) -> None:
    executor = make()
    executor.submit(Job("a", "breeds"), None)
    time.sleep(1.0)  # Not polled, so that its message waits in the socket.
    assert executor.template_pid is not None
    os.kill(executor.template_pid, signal.SIGKILL)
    events = collect(executor, "a")
    assert isinstance(events[0], Message) and isinstance(events[-1], Lost)


def test_a_template_that_keeps_dying_is_given_up(make: Make) -> None:
    executor = make()
    with pytest.raises(ExecutorError, match="4 times in a row.*-9.*template.log"):  # noqa: PT012
        for number in range(10):
            executor.submit(Job(f"{number}", "sleeps"), None)
            assert executor.template_pid is not None
            os.kill(executor.template_pid, signal.SIGKILL)
            assert collect(executor, f"{number}")[-1] == Lost(f"{number}")
    with pytest.raises(ExecutorError):
        executor.poll(0.0)


@linux
def test_closing_ends_every_process_at_once(local: LocalExecutor) -> None:
    local.submit(Job("a", "breeds"), None)
    pids = [*first_message(local)["pids"], local.template_pid]
    local.close()
    assert gone(pids, 2.0)
    with pytest.raises(ExecutorError, match="start"):
        local.submit(Job("b", "nothing"), None)


@linux
def test_closing_does_not_wait_for_imports(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    executor = make(preload=["slow_to_import"])
    executor.submit(Job("a", "nothing"), None)
    executor.poll(0.2)
    pid = executor.template_pid
    began = time.monotonic()
    executor.close()
    assert pid is not None and gone([pid], 0.0) and time.monotonic() - began < 5


def test_an_executor_started_off_the_main_thread_outlives_that_thread(make: Make) -> None:
    made: list[LocalExecutor] = []
    thread = threading.Thread(target=lambda: made.append(make()))
    thread.start()
    thread.join()
    assert run(made[0], "nothing")[1].code == 0


# What the template imports


def test_a_required_module_that_is_missing_stops_with_the_import_error(make: Make) -> None:
    for method in METHODS:
        executor = make(method, required=["json", "no_such_module"])
        executor.submit(Job("a", "nothing"), None)
        with pytest.raises(
            ExecutorError, match="ModuleNotFoundError: No module named 'no_such_module'"
        ) as caught:
            while not executor.poll(0.5):  # Not lost: it never began.
                pass
        assert "\n" not in str(caught.value)


def test_a_preload_that_fails_is_a_warning(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "breaks_on_import.py").write_text("raise ValueError('first line\\nsecond line')")
    (tmp_path / "exits_on_import.py").write_text("raise SystemExit(4)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    executor = make(preload=["breaks_on_import", "exits_on_import", "colorsys"])
    executor.submit(Job("a", "about", {"names": []}), None)
    first, second, message, exited = collect(executor, "a")
    assert (
        isinstance(first, Warned)
        and "breaks_on_import" in first.text
        and "ValueError: first line)" in first.text
    )
    assert isinstance(second, Warned) and "exits_on_import" in second.text
    assert isinstance(message, Message) and "colorsys" in message.body["modules"]
    assert isinstance(exited, Exited) and exited.code == 0


def test_a_preload_that_kills_the_template_is_left_out(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dies_on_import.py").write_text("import os\nos._exit(5)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    executor = make(preload=["dies_on_import"])
    executor.submit(Job("a", "nothing"), None)
    warned, lost = collect(executor, "a")
    assert isinstance(warned, Warned) and "dies_on_import" in warned.text and lost == Lost("a")
    assert run(executor, "nothing")[1].code == 0


def test_folders_of_the_user_are_not_on_the_templates_path(make: Make, tmp_path: Path) -> None:
    (tmp_path / "users_own.py").write_text("raise AssertionError")
    executor = make(preload=["users_own"], path=[str(tmp_path), str(HERE)])
    executor.submit(Job("a", "nothing"), None)
    warned, _ = collect(executor, "a")
    assert isinstance(warned, Warned) and "No module named 'users_own'" in warned.text


def test_an_import_that_starts_a_runtime_turns_fork_into_spawn(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As torch looks once CUDA runs; TensorFlow itself is tested below.
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("")
    (tmp_path / "torch" / "cuda.py").write_text("_initialized = True")
    (tmp_path / "eager_import.py").write_text("import torch.cuda")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    executor = make(preload=["eager_import", "colorsys"])
    executor.submit(Job("a", "about", {"names": []}), None)
    warned, message, _ = collect(executor, "a")
    assert isinstance(warned, Warned) and "eager_import starts CUDA" in warned.text
    assert isinstance(message, Message) and "colorsys" not in message.body["modules"]
    assert executor.start_method == "spawn"


def test_start_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    for platform, default in (("linux", "fork"), ("darwin", "spawn")):
        monkeypatch.setattr(sys, "platform", platform)
        assert start_method() == default and start_method("spawn") == "spawn"
    with pytest.raises(RequestError, match="fork or spawn, but got 'thread'"):
        start_method("thread")
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(RequestError, match="WSL2"):
        start_method("spawn")


# Nothing grows


def resident(pid: int) -> int:
    """Resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def children(pid: int) -> int:
    return len(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


@linux
def test_two_hundred_trials_leave_nothing_behind(make: Make, tmp_path: Path) -> None:
    executor = make(slots=[Slot(0, 1), Slot(1, 1)])
    template = executor.template_pid
    assert template is not None

    def trials(names: range) -> list[int]:
        for number in names:
            slot = executor.slots[number % 2]
            log = str(tmp_path / "job.log")
            executor.submit(Job(str(number), "echo", {"body": "x" * 1000}, log=log), slot)
            if number % 2:
                collect(executor, str(number - 1), str(number))
        processes = (os.getpid(), template)
        return [measure(pid) for measure in (open_files, children, resident) for pid in processes]

    before, after = trials(range(20)), trials(range(20, 220))
    assert after[:4] == before[:4]
    for small, large in zip(before[4:], after[4:], strict=True):
        assert large - small < 10 * 2**20


# Keras itself


@linux
@pytest.mark.timeout(300)
def test_forked_from_keras_trials_are_ready_at_once_and_can_train(make: Make) -> None:
    executor = make(required=("numpy", "keras", "keras_tuner"), backend="tensorflow", template_threads=2)
    assert run(executor, "nothing")[1].code == 0  # Once the template has imported.
    assert executor.start_method == "fork"
    took = []
    for number in range(20):
        asked = time.monotonic()
        messages, _ = run(executor, "ready", str(number))
        took.append(messages[0]["at"] - asked)
    # On an idle machine the median is under 20 ms; the bound leaves room for a busy one.
    assert sorted(took)[10] < 0.5, took
    messages, exited = run(executor, "trains")
    assert exited.code == 0 and messages[0]["loss"] >= 0


@linux
@pytest.mark.timeout(300)
def test_a_module_that_runs_tensorflow_when_imported_is_noticed(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs_tensorflow.py").write_text("import tensorflow\ntensorflow.constant(1.0)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    executor = make(preload=["runs_tensorflow"], backend="tensorflow")
    messages, exited = run(executor, "nothing")
    assert messages == [] and exited.code == 0
    assert executor.start_method == "spawn"


# The wire


@pytest.mark.parametrize("cut", [1, 3, 7, 1000])
def test_messages_survive_any_cut(cut: int) -> None:
    bodies: list[dict[str, Any]] = [{"a": 1}, {}, {"text": "\udcff✓" * 50}, {"nested": [None, 1e308]}]
    raw = b"".join(encode(body) for body in bodies)
    receiver, got = Receiver(), []
    for start in range(0, len(raw), cut):
        receiver.feed(raw[start : start + cut])
        got += list(receiver.messages())
    bodies[2] = {"text": "?✓" * 50}  # Half a surrogate pair is no character.
    assert got == bodies


def test_good_messages_before_garbage_are_kept() -> None:
    receiver = Receiver()
    receiver.feed(encode({"a": 1}) + b"\xff" * 20)
    messages = receiver.messages()
    assert next(messages) == {"a": 1}
    with pytest.raises(ChannelError):
        next(messages)


@linux
def test_descriptors_that_a_job_sends_are_closed_unseen() -> None:
    ours, theirs = socket.socketpair()
    link = Link(ours)
    before = open_files(os.getpid())
    with theirs:
        for _ in range(10):
            socket.send_fds(theirs, [encode({"a": 1})], [theirs.fileno()])
        assert len(list(link.read())) == 10
    assert not link.fds and open_files(os.getpid()) == before - 1
    link.close()

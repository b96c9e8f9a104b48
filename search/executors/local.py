"""Runs jobs on this machine, each in a fresh process forked (or spawned) by the template."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from search import secrecy
from search.errors import ExecutorError, RequestError
from search.executors import Event, Exited, Job, Lost, Message, Slot, Warned, died, task
from search.processes.channel import ChannelError, Link, wait
from search.processes.template import command
from search.processes.usage import cpu_seconds, oom_kills

REQUIRED = ("numpy", "keras", "keras_tuner")
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
# Deaths of the template in a row, with no job ended in between, after which it is not started again.
_DEATHS = 4
# How long the template may import, and how long after that a killed job may still be there: else it hangs itself.
_IMPORTING, _KILLING = 600.0, 30.0
# How long a killed job may take to let go of its socket, and with it of its device.
_LETTING_GO = 2.0


def start_method(asked: str | None = None) -> str:
    """The start method to use: what was asked for, else what is safe on this system.

    Raises:
        RequestError: On native Windows, or for a name that is no start method.
    """
    if sys.platform == "win32":
        raise RequestError("trials need Linux, WSL2 or macOS, but this is native Windows: use heldout in WSL2")
    if asked is None:
        # After a fork, macOS' own libraries abort.
        return "spawn" if sys.platform == "darwin" else "fork"
    if asked not in ("fork", "spawn"):
        raise RequestError(f"the start method must be fork or spawn, but got {asked!r}")
    return asked


@dataclass
class _Running:
    link: Link
    slot: Slot | None
    ooms: int | None  # of the whole machine, when it began
    log: str | None = None
    pid: int | None = None
    killed: float | None = None
    # Set when the template died: how long to wait for the process to be gone.
    lost_by: float | None = None


class LocalExecutor:
    """Keeps the executor protocol with processes of this machine.

    Args:
        slots: Places for trials.
        start_method: "fork", "spawn", or None for the system's default.
        preload: Third-party modules that the template imports ahead of the trials, if it can.
        path: Folders put in front of ``sys.path`` in job processes only, never in the template.
        backend: Keras' backend; None leaves it to Keras' own configuration.
        entry: "module:function", called with the job and its ``search.processes.channel.Channel`` in every job process.
        log: File that the template's own output is appended to.
        template_threads: Threads of the numerical libraries that the template loads, for its trials too.
        required: Modules without which no trial can run.
        hold: Descriptors that every process inherits, such as a lock that is held until the last of them has ended.
        secrets: Variables for every job, whose values are kept out of messages and logs.
        lasting: Whether the thread that uses it lives as long as this process; None asks if it is the main thread.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        *,
        log: Path,
        start_method: str | None = None,
        preload: Sequence[str] = (),
        path: Sequence[str] = (),
        backend: str | None = None,
        entry: str = "search.harness.worker:main",
        template_threads: int = 1,
        required: Sequence[str] = REQUIRED,
        hold: Sequence[int] = (),
        secrets: Mapping[str, str] | None = None,
        lasting: bool | None = None,
    ) -> None:
        self._lasting = lasting
        self._slots = tuple(slots)
        self._method = _start_method(start_method)
        self._preload = tuple(preload)
        self._required = tuple(required)
        self._hold = tuple(hold)
        self._path = list(path)
        self._entry = entry
        self._log = log
        self._environment = _environment(backend, template_threads, any(slot.gpus for slot in self._slots))
        self._environment |= secrets or {}
        self._environment[secrecy.NAMES] = ",".join(secrets or {})
        self._logs = {str(log)}
        self._control: Link | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._running: dict[str, _Running] = {}
        self._events: deque[Event] = deque()
        self._failure: ExecutorError | None = None
        self._fatal: str | None = None
        self._ready = False
        self._deaths = 0
        self._launched = 0.0

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The places for trials."""
        return self._slots

    @property
    def start_method(self) -> str:
        """How processes are started; can turn from fork to spawn once the template is ready."""
        return self._method

    @property
    def template_pid(self) -> int | None:
        """Process number of the template, None before ``start`` and after ``close``."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the template, without waiting for its imports; jobs can be submitted at once."""
        if self._process is None:
            self._launch()

    def submit(self, job: Job, slot: Slot | None) -> None:
        """Run a job; see the protocol.

        Raises:
            ExecutorError: If the template cannot be had.
            ValueError: If the slot is taken or a job of that id is running.
        """
        if self._failure is not None:
            raise self._failure
        if self._control is None:
            raise ExecutorError("an executor must be started before it gets jobs, but this is not: call start()")
        if job.id in self._running:
            raise ValueError(f"the id of a job must be its own, but {job.id!r} is running")
        if slot is not None and any(
            other.slot is not None and other.slot.index == slot.index for other in self._running.values()
        ):
            raise ValueError(f"a slot must be free to be given a job, but slot {slot.index} is taken")
        ours, theirs = socket.socketpair()
        link = Link(ours)
        fd = theirs.detach()
        try:
            link.queue({"entry": self._entry, "path": self._path, "job": task(job, slot)})
        except BaseException:
            link.close()
            os.close(fd)
            raise
        self._running[job.id] = _Running(link, slot, oom_kills(), job.log)
        if job.log is not None:
            self._logs.add(job.log)
        env = {**job.env, **(slot.env if slot else {})}
        self._control.queue({"run": job.id, "log": job.log, "env": env}, (fd,))

    def poll(self, timeout: float, also: int | None = None) -> list[Event]:
        """What has happened; see the protocol.

        Args:
            timeout: Seconds.
            also: A descriptor that ends the wait when it can be read.

        Raises:
            ExecutorError: If the template cannot be had; it says what the import error said.
        """
        until = time.monotonic() + timeout
        self._pump(0.0)
        while not self._events and not self._is_over and (left := until - time.monotonic()) > 0:
            self._pump(left, also)
            if also is not None and select.select([also], [], [], 0)[0]:
                break
        events = list(self._events)
        self._events.clear()
        if self._failure is not None and not self._running and not events:
            raise self._failure
        return events

    def need(self, more: bool) -> None:
        """Nothing: its slots are this machine's and stay."""

    def send(self, job_id: str, body: Mapping[str, Any]) -> None:
        """Send a message to a job; nothing happens if it is gone."""
        if job_id in self._running:
            self._running[job_id].link.queue(body)

    def kill(self, job_id: str) -> None:
        """End a job with SIGTERM and, a second later, SIGKILL, process group and all; ``Exited`` follows."""
        if job_id in self._running and self._control is not None:
            self._control.queue({"kill": job_id})
            job = self._running[job_id]
            job.killed = job.killed or time.monotonic()

    def cpu_seconds(self, job_id: str) -> float | None:
        """CPU time that the job's processes have used so far; None before it was forked."""
        job = self._running.get(job_id)
        return None if job is None or job.pid is None else cpu_seconds(job.pid)

    def has_begun(self, job_id: str) -> bool:
        """Whether the job was forked, for which the template must have imported everything."""
        job = self._running.get(job_id)
        return job is None or job.pid is not None

    def close(self) -> None:
        """End the template and every job, at once. Their events are dropped."""
        self._end_template()
        self._drop_jobs()
        self._events.clear()
        for log in self._logs:  # once more: something may have lingered
            secrecy.scrub_file(log)

    def _drop_jobs(self) -> None:
        for job in self._running.values():
            job.link.close()
        self._running.clear()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _is_over(self) -> bool:
        """Whether nothing will happen any more."""
        return self._failure is not None and not self._running

    def _launch(self) -> None:
        ours, theirs = socket.socketpair()
        # The death signal is tied to the thread that starts the process, not to the whole driver: only the
        # main thread lives as long as the driver. From another one, the end of the socket has to do.
        lasting = threading.current_thread() is threading.main_thread() if self._lasting is None else self._lasting
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with theirs, open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                command("template", theirs.fileno(), os.getpid() if lasting else 0),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(theirs.fileno(), *self._hold),
                start_new_session=True,
                env=self._environment,
            )
        self._ready, self._launched = False, time.monotonic()
        self._control = Link(ours)
        setup = {"setup": self._method, "required": self._required, "preload": self._preload, "hold": self._hold}
        self._control.queue(setup)

    def _pump(self, timeout: float, also: int | None = None) -> None:
        """Wait for news once and take them in."""
        links = {job.link: name for name, job in self._running.items()}
        deadlines = [job.lost_by for job in self._running.values() if job.lost_by is not None]
        timeout = min([timeout, *(at - time.monotonic() for at in deadlines)])
        control = self._control
        for link in wait([*links, *([control] if control else [])], timeout, also):
            link.flush()
            # An "exited" read a moment ago may have ended the job of a link further on in the list.
            if link is control:
                self._listen_to_template(control)
            elif links[link] in self._running:
                self._listen_to_job(links[link])
        self._end_hanging_template()
        for name, job in list(self._running.items()):
            if job.lost_by is not None and (job.link.eof or time.monotonic() >= job.lost_by):
                self._end(name, Lost(name))

    def _end_hanging_template(self) -> None:
        """A template that does not answer is as good as dead; its end is noticed as any other."""
        now, process = time.monotonic(), self._process
        asked = [job.killed for job in self._running.values() if job.killed is not None and job.lost_by is None]
        hangs = any(now - at > _KILLING for at in asked) if self._ready else now - self._launched > _IMPORTING
        if hangs and process is not None and process.poll() is None:
            self._events.append(Warned("the process that trials are forked from does not answer; it is started again"))
            process.kill()
            self._launched = now  # said once

    def _listen_to_job(self, name: str) -> None:
        job = self._running[name]
        try:
            for body in job.link.read():
                self._events.append(Message(name, secrecy.scrubbed(body)))
        except (ChannelError, RecursionError) as error:
            self._events.append(died(name, f"the trial's process broke its channel: {error}"))
            # With its socket closed the process kills itself; if it cannot, the template does.
            job.link.close()
            self.kill(name)

    def _listen_to_template(self, control: Link) -> None:
        try:
            for body in control.read():
                self._on_template(body)
        except (ChannelError, KeyError, TypeError) as error:
            self._events.append(Warned(f"the template process sent something else than messages: {error}"))
            control.close()
        if control.eof:
            self._on_template_death()

    def _on_template(self, body: Mapping[str, Any]) -> None:
        if "warned" in body:
            self._events.append(Warned(secrecy.scrub(body["warned"])))
        elif "fatal" in body:
            self._fatal = secrecy.scrub(body["fatal"])
        elif "ready" in body:
            self._ready = True
            self._method = body["ready"]
        elif "forked" in body:
            self._running[body["forked"]].pid = body["pid"]
        elif "refused" in body:
            name = body["refused"]
            self._events.append(died(name, f"a process for it could not be started: {body['error']}"))
            self._end(name, Exited(name, 1, None, 0.0))
        elif "exited" in body:
            name = body["exited"]
            job = self._running[name]
            # All that it sent is in the socket by now. Not until the end of the stream: something that it
            # started in a session of its own may hold the socket open.
            for _ in range(128):
                if job.link.eof or not wait([job.link], 0.0):
                    break
                self._listen_to_job(name)
            self._deaths = 0
            oom = body["signal"] == signal.SIGKILL and job.ooms is not None and (oom_kills() or 0) > job.ooms
            self._end(name, Exited(name, body["code"], body["signal"], body["seconds"], oom))

    def _end(self, name: str, event: Event) -> None:
        job = self._running.pop(name)
        job.link.close()
        if job.log is not None:  # C code and processes that it started print past what keeps secrets out of prints
            secrecy.scrub_file(job.log)
        self._events.append(event)

    def _on_template_death(self) -> None:
        status = self._end_template()
        if self._fatal is not None:
            # No job has begun. Told one by one that they are lost, they would hide what is wrong.
            self._failure = ExecutorError(
                f"trials need Keras, but it cannot be imported: {self._fatal} (see {self._log})"
            )
            self._drop_jobs()
            return
        for job in self._running.values():
            if job.lost_by is None:
                job.lost_by = time.monotonic() + _LETTING_GO
                job.link.hang_up()
        self._deaths += 1
        if self._deaths >= _DEATHS:
            self._failure = ExecutorError(
                f"the process that trials are forked from must stay alive, but it ended {self._deaths} times "
                f"in a row, last with status {status}: see {self._log}"
            )
        else:
            if not self._ready and self._preload and self._method == "fork":
                names = ", ".join(self._preload)
                self._events.append(Warned(f"importing ahead of the trials ended the process, so without: {names}"))
                self._preload = ()
            self._launch()

    def _end_template(self) -> int | None:
        """End the template, and every job group in case it could not; returns its exit status."""
        if self._control is None or self._process is None:
            return None
        process = self._process
        self._control.close()
        self._control = self._process = None
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            status = process.wait(5.0)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        if status != 0:
            # A group whose leader is reaped keeps its number for as long as it has members, so this reaches
            # what a job left behind, and nobody if it left nothing.
            for job in self._running.values():
                if job.pid is not None and job.lost_by is None:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.killpg(job.pid, signal.SIGKILL)
        return status


# ``start_method`` is also the name of an argument.
_start_method = start_method


def _environment(backend: str | None, threads: int, has_gpus: bool) -> dict[str, str]:
    """The template's environment: the driver's but for what looks secret, with defaults for what is not set."""
    defaults = dict.fromkeys(_THREAD_VARIABLES, str(threads))
    # Sets of strings in the user's code iterate alike in every trial and every run.
    # Without a GPU, TensorFlow's errors are about the GPU that it does not find.
    defaults |= {"TF_CPP_MIN_LOG_LEVEL": "2" if has_gpus else "3", "PYTHONHASHSEED": "0"}
    chosen = {} if backend is None else {"KERAS_BACKEND": backend}
    return {**defaults, **secrecy.inherited(os.environ), **chosen}

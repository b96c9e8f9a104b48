"""The process that trials are forked from, and the harness that every trial process runs in.

The template imports Keras once and executes nothing else: what runs in it (an optimizer, a layer, a tf.data
pipeline) would leave threads and locks that a forked trial hangs on. It speaks JSON with the driver over one
socket; every trial speaks to the driver on a socket of its own, which the template passes on and never reads.

    driver -> template   {"setup": method, "required": [..], "preload": [..], "hold": [..]}    once
                         {"run": id, "log": path | null, "env": {..}} + descriptor    {"kill": id}
    template -> driver   {"ready": method}   {"warned": text}   {"fatal": text}
                         {"forked": id, "pid"}   {"refused": id, "error"}
                         {"exited": id, "code", "signal", "seconds"}

Started with "spawn", it imports nothing and starts a fresh interpreter for every trial; all else is the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import importlib.util
import io
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from search import secrecy
from search.processes.channel import Channel, ChannelError, Link, wait

# Between asking a job to end (SIGTERM) and making it (SIGKILL).
KILL_GRACE = 1.0
_PR_SET_PDEATHSIG = 1
# Objects that a trial makes between two collections. Building and tracing make hundreds of thousands that stay, and
# Python's own 700 would have them searched for garbage again and again.
_COLLECT_AFTER = 100_000
_SIGNALS = (signal.SIGTERM, signal.SIGCHLD, signal.SIGINT)
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None

# -P and a path of our own: with -m, the folder that the user is in would come before every library.
_BOOT = (
    "import sys; root = sys.argv[1]; root in sys.path or sys.path.insert(0, root); "
    "from search.processes.template import main; main(sys.argv[2:])"
)


def command(role: str, fd: int, parent: int) -> list[str]:
    """The command that starts a process of this file.

    Args:
        role: "template" or "trial".
        fd: Inherited socket.
        parent: Process to die with; 0 for none.
    """
    root = str(Path(__file__).resolve().parent.parent.parent)
    return [sys.executable, "-P", "-c", _BOOT, root, role, str(fd), str(parent)]


def main(arguments: Sequence[str]) -> NoReturn:
    """Entry of both kinds of process."""
    role, fd, parent = arguments[0], int(arguments[1]), int(arguments[2])
    secrecy.adopt()
    if role == "trial":
        run_trial(fd, parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if parent:
        die_with(parent, signal.SIGTERM)
    code = 1
    try:
        code = Template(Link(socket.socket(fileno=fd), take_fds=True)).serve()
    except BaseException:
        traceback.print_exc()
    finally:
        _flush()
        # TensorFlow's exit handlers have nothing to clean up here, and have been seen to hang.
        os._exit(code)


def die_with(parent: int, number: signal.Signals) -> None:
    """Be sent ``number`` when the thread that started this process ends, however it ends. Linux only."""
    if _LIBC is None:
        return
    _LIBC.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(number), 0, 0, 0)
    if os.getppid() != parent:  # It died before the request was in place.
        os._exit(1)


# The trial's side


def run_trial(fd: int, template: int) -> NoReturn:
    """Run one job in this process, which leads a session of its own, and exit with it.

    The first message on the socket says what to run; the entry gets the job and the ``Channel``.
    """
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        die_with(template, signal.SIGKILL)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
        faulthandler.enable()
        sys.argv[:] = ["heldout-trial"]
        gc.set_threshold(_COLLECT_AFTER, 10, 10)
        channel = Channel(socket.socket(fileno=fd))
        order = channel.receive()
        assert order is not None  # receive() without a timeout waits.
        sys.path[:0] = order["path"]
        module, _, function = order["entry"].partition(":")
        getattr(importlib.import_module(module), function)(order["job"], channel)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        _flush()
        # Not sys.exit: threads that the user's code left running must not keep the slot.
        os._exit(code & 0xFF)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


# The template's side


@dataclass
class _Running:
    pid: int
    began: float
    # Kept, because a Popen that is dropped reaps its process behind our back.
    process: subprocess.Popen[bytes] | None = None
    kill_at: float | None = None

    def signal(self, number: signal.Signals) -> None:
        """Signal the whole group. Only before the process is reaped, while its number cannot be another's."""
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:  # Forked a moment ago and without a session of its own yet.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)
        except PermissionError:  # macOS, for a group of which only the dead leader is left.
            pass


class Template:
    """Starts, watches and ends job processes for the driver at the other end of ``control``."""

    def __init__(self, control: Link) -> None:
        self._control = control
        self._method = "fork"
        self._hold: tuple[int, ...] = ()  # descriptors that trials inherit from us
        self._running: dict[str, _Running] = {}
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._woken.setblocking(False)

    def serve(self) -> int:
        """Work until the driver is gone or SIGTERM comes; returns the exit status."""
        orders = self._orders()
        setup = next(orders, None)
        if setup is None:
            return 0
        try:
            self._hold = tuple(setup["hold"])
            self._prepare(setup["setup"], setup["required"], setup["preload"])
        except _Unusable as error:
            self._tell({"fatal": str(error)})
            while self._control.wants_room and wait([self._control], 5.0):
                self._control.flush()
            return 1
        # From here on there can be trials, and a signal must end them first. Until here its default ends us.
        signal.signal(signal.SIGTERM, _noticed)
        signal.signal(signal.SIGCHLD, _noticed)
        signal.set_wakeup_fd(self._woken.fileno(), warn_on_full_buffer=False)
        self._tell({"ready": self._method})
        for order in orders:
            if "run" in order:
                self._start(order["run"], order["log"], order["env"])
            elif "kill" in order and order["kill"] in self._running:
                job = self._running[order["kill"]]
                job.signal(signal.SIGTERM)
                job.kill_at = job.kill_at or time.monotonic() + KILL_GRACE
        self._end_all()
        return 0

    def _tell(self, body: Mapping[str, Any]) -> None:
        self._control.queue(body)

    def _warn(self, text: str) -> None:
        self._tell({"warned": text})

    def _orders(self) -> Iterator[dict[str, Any]]:
        """The driver's messages; between them, looks after the processes. Ends when the work does."""
        while not self._control.eof:
            deadlines = [job.kill_at for job in self._running.values() if job.kill_at is not None]
            patience = min([60.0, *(at - time.monotonic() for at in deadlines)])
            wait([self._control], patience, self._wake.fileno())
            self._control.flush()
            with contextlib.suppress(BlockingIOError):
                if signal.SIGTERM in self._wake.recv(4096):
                    return
            self._reap()
            for job in self._running.values():
                if job.kill_at is not None and time.monotonic() >= job.kill_at:
                    job.signal(signal.SIGKILL)
                    job.kill_at = time.monotonic() + KILL_GRACE
            try:
                yield from self._control.read()
            except ChannelError:
                return

    def _prepare(self, method: str, required: Sequence[str], preload: Sequence[str]) -> None:
        self._method = method
        if method == "spawn":
            for name in required:
                if importlib.util.find_spec(name) is None:
                    raise _Unusable(f"ModuleNotFoundError: No module named {name!r}")
            return
        gc.disable()
        for name in dict.fromkeys((*required, *preload)):
            try:
                importlib.import_module(name)
            except (Exception, SystemExit) as error:
                traceback.print_exc()
                line = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
                if name in required:
                    raise _Unusable(line) from None
                self._warn(f"{name} could not be imported ahead of the trials ({line}); each trial will try")
            if self._method == "fork" and (started := _started()):
                self._method = "spawn"
                self._warn(
                    f"importing {name} starts {started}, which would hang a forked trial: "
                    "every trial gets a fresh interpreter instead, which takes seconds"
                )
        # Out of the collector's sight, so that a trial's collections do not copy the template's pages.
        gc.collect()
        gc.freeze()
        gc.enable()

    def _start(self, name: str, log: str | None, env: Mapping[str, str]) -> None:
        fd = self._control.fds.popleft()
        began = time.monotonic()
        try:
            out = self._open_log(name, log)
            try:
                # A signal between fork and the trial's own handlers would be taken for one to the template.
                signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
                if self._method == "fork":
                    self._running[name] = _Running(self._fork(fd, out, env), began)
                else:
                    process = self._spawn(fd, out, env)
                    self._running[name] = _Running(process.pid, began, process)
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
                os.close(out)
        except OSError as error:
            self._tell({"refused": name, "error": str(error)})
        else:
            self._tell({"forked": name, "pid": self._running[name].pid})
        finally:
            os.close(fd)

    def _open_log(self, name: str, log: str | None) -> int:
        if log is not None:
            try:
                return os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            except OSError as error:
                self._warn(f"what job {name} prints is lost: its log cannot be opened ({error})")
        return os.open(os.devnull, os.O_WRONLY)

    def _fork(self, fd: int, out: int, env: Mapping[str, str]) -> int:
        _flush()
        template = os.getpid()
        with warnings.catch_warnings():
            # Python and JAX warn of threads; the ones that imports leave behind have been seen to do no harm.
            warnings.simplefilter("ignore")
            pid = os.fork()
        if pid:
            return pid
        try:
            os.setsid()
            signal.set_wakeup_fd(-1)
            self._wake.close()
            self._woken.close()
            self._control.close()
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, 0)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.close(null)
            os.close(out)
            os.environ.update(env)
            run_trial(fd, template)
        finally:
            os._exit(1)

    def _spawn(self, fd: int, out: int, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command("trial", fd, os.getpid()),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            pass_fds=(fd, *self._hold),
            start_new_session=True,
            env={**os.environ, **env},
        )

    def _reap(self) -> None:
        for name, job in list(self._running.items()):
            status = _ended(job)
            if status is None:
                continue
            del self._running[name]
            code = os.waitstatus_to_exitcode(status)
            self._tell({
                "exited": name,
                "code": code if code >= 0 else None,
                "signal": -code if code < 0 else None,
                "seconds": time.monotonic() - job.began,
            })  # fmt: skip

    def _end_all(self) -> None:
        for job in self._running.values():
            job.signal(signal.SIGKILL)
        deadline = time.monotonic() + 2.0
        while self._running and time.monotonic() < deadline:
            self._reap()
            time.sleep(0.005)


class _Unusable(Exception):
    """What every trial needs cannot be imported; the message is the import error's last line."""


def _noticed(number: int, frame: object) -> None:
    """A handler that does nothing: the wakeup descriptor tells the loop."""


def _ended(job: _Running) -> int | None:
    """Reap the process if it has ended, after killing what it left in its group."""
    if hasattr(os, "waitid"):
        # Look before reaping: while the dead process is not reaped, no stranger can get its number.
        if os.waitid(os.P_PID, job.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return None
        job.signal(signal.SIGKILL)
        _, status = os.waitpid(job.pid, 0)
    else:
        pid, status = os.waitpid(job.pid, os.WNOHANG)
        if pid == 0:
            return None
        with contextlib.suppress(OSError):
            os.killpg(job.pid, signal.SIGKILL)
    if job.process is not None:
        job.process.returncode = os.waitstatus_to_exitcode(status)
    return status


def _started() -> str | None:
    """What an import has set running that does not survive a fork, if anything."""
    context = getattr(sys.modules.get("tensorflow.python.eager.context"), "_context", None)
    if getattr(context, "_context_handle", None) is not None:
        return "TensorFlow"
    if getattr(sys.modules.get("torch.cuda"), "_initialized", False):
        return "CUDA in torch"
    if getattr(sys.modules.get("jax._src.xla_bridge"), "_backends", None):
        return "JAX"
    return None

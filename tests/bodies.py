"""What the executor's tests run in job processes: bodies that behave, and bodies that do not."""

from __future__ import annotations

import ctypes
import itertools
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from search.executors import Job
from search.executors.local import LocalExecutor
from search.processes.channel import Channel

HERE = Path(__file__).resolve().parent
# Survives its parent's end, but not a signal to its process group.
LINGERER = [sys.executable, "-c", "import time; time.sleep(300)"]


def main(job: dict[str, Any], channel: Channel) -> None:
    """Run the body that the job's kind names, with its payload as arguments."""
    BODIES[job["kind"]](channel, **job["payload"])


def nothing(channel: Channel) -> None:
    """End at once, without a result."""


def ready(channel: Channel) -> None:
    channel.send({"type": "result", "at": time.monotonic()})


def echo(channel: Channel, body: Any = None) -> None:
    channel.send({"type": "result", "body": body})


def leak(channel: Channel, name: str) -> None:
    """Let a variable's value out by every door."""
    value = os.environ[name]
    print("printed", value)
    os.write(1, f"from C {value}\n".encode())
    code = "import os, sys; os.write(2, f'child {os.environ[sys.argv[1]]}\\n'.encode())"
    subprocess.run([sys.executable, "-c", code, name], check=True)
    channel.send({"type": "result", "value": value, "length": len(value)})


def about(channel: Channel, names: list[str]) -> None:
    """Say how this process was set up."""
    channel.send({
        "type": "result",
        "pid": os.getpid(),
        "group": os.getpgrp(),
        "session": os.getsid(0),
        "parent": os.getppid(),
        "interrupt_ignored": signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
        "terminate_default": signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "stdin": os.readlink("/proc/self/fd/0"),
        "sockets": [fd for fd in os.listdir("/proc/self/fd") if _target(fd).startswith("socket:")],
        "env": {name: os.environ.get(name) for name in names},
        "path": sys.path,
        "modules": sorted(sys.modules),
    })  # fmt: skip


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:  # The listing's own descriptor.
        return ""


def prints(channel: Channel) -> None:
    print("to stdout: \u2713 \udcff")
    print("to stderr", file=sys.stderr)
    os.write(1, b"to the descriptor\n")


def dialogue(channel: Channel) -> None:
    while (message := channel.receive(30.0)) is not None and "stop" not in message:
        channel.send({"answer": message["question"] * 2})


def chatter(channel: Channel, count: int, size: int) -> None:
    for number in range(count):
        channel.send({"number": number, "filling": "x" * size})


def silence(channel: Channel) -> None:
    """Ask for a message that never comes."""
    channel.send({"received": channel.receive(0.05)})


def raises(channel: Channel) -> None:
    raise RuntimeError("out of the body")


def exits(channel: Channel, code: Any) -> None:
    sys.exit(code)


def aborts(channel: Channel) -> None:
    channel.send({"before": True})
    os.kill(os.getpid(), signal.SIGSEGV)


def writes(channel: Channel, what: str) -> None:
    """Write something that is no message on the socket, after one that is, and try to live on."""
    channel.send({"before": True})
    raw = {
        "pickle": pickle.dumps(_Bomb()),
        "text": b"GET / HTTP/1.1\r\n\r\n",
        "huge": struct.pack("!I", 0xFFFFFFF0) + b"x" * 100,
        "list": _frame(b"[1, 2]"),
        "deep": _frame(b"[" * 100_000),
        "broken": _frame(b'{"type": "resu'),
        "bytes": _frame(b"\xff\xfe\x00"),
        "empty": _frame(b""),
        "flood": os.urandom(1 << 22),
    }[what]
    channel._sock.sendall(raw)
    time.sleep(300)


def _frame(text: bytes) -> bytes:
    return struct.pack("!I", len(text)) + text


class _Bomb:
    """Ends whoever unpickles it."""

    def __reduce__(self) -> Any:
        return (os._exit, (99,))


def stubborn(channel: Channel) -> None:
    """Ignore SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel.send({"pids": [os.getpid()]})
    time.sleep(300)


def sleeps(channel: Channel) -> None:
    """Sleep in C, holding the interpreter's lock, so that no thread of this process can do anything."""
    channel.send({"pids": [os.getpid()]})
    ctypes.PyDLL(None).sleep(300)


def spins(channel: Channel) -> None:
    """Spin in C, holding the lock. (Ended by the tests within seconds.)"""
    channel.send({"pids": [os.getpid()]})
    sum(itertools.repeat(0))


def breeds(channel: Channel, end: bool = False) -> None:
    """Start a process that outlives this one, and hold the lock, or end."""
    child = subprocess.Popen(LINGERER)
    forked = os.fork()
    if forked == 0:
        time.sleep(300)
        os._exit(0)
    channel.send({"pids": [os.getpid(), child.pid, forked]})
    if not end:
        ctypes.PyDLL(None).sleep(300)


def leaves(channel: Channel, folder: str) -> None:
    """Leave files of several kinds in a folder, and take away what was there."""
    place = Path(folder)
    found = sorted(path.name for path in place.iterdir())
    (place / "checkpoint").unlink(missing_ok=True)
    print("hello")
    (place / "weights").write_bytes(b"w" * 100_000)
    (place / "deep" / "er").mkdir(parents=True)
    (place / "deep" / "er" / "part").write_text("p")
    (place / "empty").touch()
    (place / "link").symlink_to("/etc/hostname")
    channel.send({"type": "result", "path": str(place / "weights"), "found": found, "is_here": __file__})


def trains(channel: Channel) -> None:
    """Fit a small Keras model with two threads: what a broken fork hangs in."""
    import keras
    import numpy
    import tensorflow

    tensorflow.config.threading.set_intra_op_parallelism_threads(2)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dropout(0.1), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(), "mse")
    history = model.fit(numpy.ones((64, 4)), numpy.ones((64, 1)), epochs=2, verbose=0)
    channel.send({"type": "result", "loss": history.history["loss"][-1]})


BODIES = {
    body.__name__: body
    for body in (
        nothing, ready, echo, leak, about, prints, dialogue, chatter, silence, raises, exits, aborts, writes,
        stubborn, sleeps, spins, breeds, leaves, trains,
    )
}  # fmt: skip


def drive(method: str, log: str) -> None:
    """A driver to be killed: starts jobs that hang in C, prints what runs, and waits for its end."""
    executor = LocalExecutor(
        (), log=Path(log), start_method=method, path=[str(HERE)], entry="bodies:main", required=()
    )
    executor.start()
    for kind in ("sleeps", "spins", "breeds"):
        executor.submit(Job(kind, kind), None)
    pids: list[int] = [executor.template_pid or 0]
    said = 0
    while said < 3:
        for event in executor.poll(10.0):
            pids += event.body["pids"]  # type: ignore[union-attr]
            said += 1
    print(*pids, flush=True)
    while True:
        executor.poll(60.0)


if __name__ == "__main__":
    drive(*sys.argv[1:])

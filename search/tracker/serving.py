"""Servers of other programs, started for as long as we run: MLflow's, TensorBoard's."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from search.errors import RequestError

HOST = "127.0.0.1"
_NO_HOST = "--host must be an address of this machine, but got {!r}; leave it out for 127.0.0.1"
_READY_SECONDS = 120.0
_STOP_SECONDS = 5.0
_PR_SET_PDEATHSIG = 1


class Server:
    """A running server. A context manager that stops it.

    Attributes:
        url: Where to browse.
    """

    def __init__(self, process: subprocess.Popen[bytes], url: str) -> None:
        self.url = url
        self._process = process

    def wait(self) -> None:
        """Returns when the server has ended by itself."""
        self._process.wait()

    def close(self) -> None:
        """Stops the server and what it started."""
        # It leads a process group of its own: some commands, such as MLflow's, start the server as their child.
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def start(command: Sequence[str], environment: Mapping[str, str], what: str, *, health: str, url: str) -> Server:
    """Starts a server, and returns when it answers.

    Args:
        what: It is, for errors.
        health: Where it answers 200 once it is ready.
        url: Where to browse.

    Raises:
        RequestError: If it cannot start, or does not answer.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
            preexec_fn=_follow_parent(),
        )
        server = Server(process, url)
        try:
            _await(process, what, health, lambda: _last_line(log))
        except BaseException:
            server.close()
            raise
    return server


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def in_url(host: str) -> str:
    """The address as URLs write it."""
    return f"[{host}]" if ":" in host else host


def check_free(host: str, port: int) -> None:
    """See that a server can listen there.

    Raises:
        RequestError: If the port is taken, or the address is none of this machine.
    """
    if not 0 < port < 65536:
        raise RequestError(f"--port must be a number from 1 to 65535, but got {port}")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise RequestError(_NO_HOST.format(host)) from None
    with socket.socket(family, kind) as probe:
        # As the server will: a connection of a server that has just ended does not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address[0], port, *address[2:]))
        except (OSError, OverflowError) as error:
            if getattr(error, "errno", None) == errno.EADDRNOTAVAIL:
                raise RequestError(_NO_HOST.format(host)) from None
            raise RequestError(f"port {port} must be free, but: {error}; choose another with --port") from None


def _await(process: subprocess.Popen[bytes], what: str, health: str, said: Callable[[], str]) -> None:
    # Not by the environment's proxy: it is this machine that we ask.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RequestError(f"{what} must start, but it ended with {process.returncode}: {said()}")
        with contextlib.suppress(OSError), opener.open(health, timeout=2) as answer:
            if answer.status == 200:
                return
        time.sleep(0.2)
    raise RequestError(f"{what} must answer within {_READY_SECONDS:.0f} s, but it did not: {said()}")


def _last_line(log: Any) -> str:
    log.seek(0)
    lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "it said nothing"


def _follow_parent() -> Callable[[], None] | None:
    """Makes the child be sent SIGTERM when its parent dies, which commands such as MLflow's pass on."""
    if sys.platform != "linux":
        return None
    # Looked up here: between fork and exec nothing may be loaded.
    prctl = ctypes.CDLL(None).prctl

    def follow() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

    return follow

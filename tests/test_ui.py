"""MLflow's server on a workspace: that it answers, to whom, and that it ends with us."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click.testing
import pytest

from search.cli import main
from search.errors import RequestError
from search.tracker import publishing, ui

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 60.0
MAKE_RUNS = """
import sys, pathlib
from mlflow import MlflowClient
client = MlflowClient(tracking_uri=sys.argv[1])
experiment = client.create_experiment("digits_mlp")
for _ in range(2):
    client.create_run(experiment)
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ui") / "a work space"
    folder.mkdir()
    environment = {**os.environ, **publishing.MLFLOW_ENVIRONMENT}
    command = [sys.executable, "-c", MAKE_RUNS, publishing.default_uri(folder)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return folder


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server(workspace: Path) -> Iterator[ui.Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = int(probe.getsockname()[1])
    with ui.serve(workspace, free) as running:
        yield running


def ask(url: str, **headers: str) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, headers=headers), timeout=PATIENCE) as answer:
        return json.load(answer)


def post(url: str, **headers: str) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, b'{"max_results": 1}', {"Content-Type": "application/json", **headers})
    with opener.open(request, timeout=PATIENCE) as answer:
        return json.load(answer)


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_it_shows_the_workspace(server: ui.Server) -> None:
    found = ask(f"{server.url}/api/2.0/mlflow/experiments/get-by-name?experiment_name=digits_mlp")
    assert found["experiment"]["name"] == "digits_mlp"
    with urllib.request.urlopen(server.url, timeout=PATIENCE) as page:
        assert b"<title>MLflow</title>" in page.read()


def test_it_is_for_this_machine_only(server: ui.Server) -> None:
    port = int(server.url.rpartition(":")[2])
    if (table := Path("/proc/net/tcp")).exists():
        wanted = f":{port:04X}"
        rows = [line.split() for line in table.read_text().splitlines()[1:]]
        listening = {row[1] for row in rows if row[1].endswith(wanted) and row[3] == "0A"}
        assert listening == {f"0100007F{wanted}"}
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(f"{server.url}/api/2.0/mlflow/experiments/search?max_results=1", Host="evil.example")
    with refused.value as answer:
        assert answer.code == 403


@pytest.mark.study
def test_it_answers_by_the_name_of_the_host_it_was_given_and_by_no_other(workspace: Path, port: int) -> None:
    # All of 127.0.0.0/8 is this machine, and MLflow takes only the first of it for such by itself.
    with ui.serve(workspace, port, "127.0.0.2") as server:
        assert server.url == f"http://127.0.0.2:{port}"
        asked = f"{server.url}/api/2.0/mlflow/experiments/search"
        for name in ("127.0.0.2", f"127.0.0.2:{port}", socket.gethostname(), f"{socket.gethostname()}:8080"):
            assert ask(f"{asked}?max_results=1", Host=name)["experiments"]
            assert post(asked, Host=name, Origin=f"http://{name}")["experiments"]
        for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
            with pytest.raises(urllib.error.HTTPError) as refused:
                post(asked, **headers)
            with refused.value as answer:
                assert answer.code == 403
    assert not is_open(port)


@pytest.mark.parametrize("host", ["no such host", "192.0.2.7", ""])
def test_a_host_that_is_not_ours(workspace: Path, port: int, host: str) -> None:
    with pytest.raises(RequestError, match="--host must be an address of this machine, but got"):
        ui.serve(workspace, port, host)


HOSTS = [("127.0.0.1", False), ("localhost", False), ("::1", False), ("0.0.0.0", True), ("::", True)]


@pytest.mark.parametrize(("host", "warned"), HOSTS)
def test_the_command_warns_where_others_can_reach_it(
    workspace: Path, host: str, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def serve(*arguments: Any) -> Any:
        asked.append(arguments)
        raise RequestError("seen")

    monkeypatch.setattr(ui, "serve", serve)
    ran = click.testing.CliRunner().invoke(main, ["ui", "--host", host, "--workspace", str(workspace)])
    assert asked == [(workspace, 5000, host)]
    assert ("can read and delete every run" in ran.stderr) == warned


def test_a_port_that_is_taken(server: ui.Server, workspace: Path) -> None:
    port = int(server.url.rpartition(":")[2])
    with pytest.raises(RequestError, match=rf"port {port} must be free, but: .*; choose another with --port"):
        ui.serve(workspace, port)
    assert is_open(port)


def test_a_port_that_is_none(workspace: Path) -> None:
    with pytest.raises(RequestError, match="--port must be a number from 1 to 65535, but got 99999"):
        ui.serve(workspace, 99999)


def test_a_workspace_without_runs(tmp_path: Path, port: int) -> None:
    with pytest.raises(RequestError, match="must have runs to show, but .* `heldout launch SPACE`"):
        ui.serve(tmp_path, port)
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_mlflow_cannot_read(tmp_path: Path, port: int) -> None:
    (tmp_path / "mlflow.db").write_text("not a database, and long enough for its header to be read" * 20)
    with pytest.raises(RequestError, match="MLflow's server must start, but") as caught:
        ui.serve(tmp_path, port)
    assert "\n" not in str(caught.value)
    assert not is_open(port)


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "killed"])
def test_it_ends_with_us(workspace: Path, port: int, number: int) -> None:
    if number == signal.SIGKILL and sys.platform != "linux":
        pytest.skip("only Linux tells a child of its parent's death")
    code = (
        "import sys; from pathlib import Path; from search.tracker import ui\n"
        "with ui.serve(Path(sys.argv[1]), int(sys.argv[2])) as server:\n"
        "    print('ready', flush=True); server.wait()"
    )
    command = [sys.executable, "-c", code, str(workspace), str(port)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        assert is_open(port)
        process.send_signal(number)
        process.wait(PATIENCE)
        until(lambda: not is_open(port))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()

"""Sending studies to a cluster, as far as no cluster is needed: what is refused, and what is passed on."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import click
import pytest

from search.cli import main
from search.errors import RequestError, StudyStopped
from search.service import answering, following, submitting
from search.service.job_server import Cluster
from search.shown import cli_jobs
from tests.tiny import write_space

TOKEN = "a-token-of-these-tests"
CLUSTER = ["--cluster", "http://head:8265"]


class Server(HTTPServer):
    """Answers ``/api/version`` as a test says, and keeps the headers that it was sent."""

    status, body, seen = 200, b"{}", None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.seen = self.headers.get("Authorization")
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Answers) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without a token."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


# ---- reaching a cluster


@pytest.mark.parametrize(
    "address, why",
    [
        ("head:8265", "must be an address such as http://head:8265, but got 'head:8265'"),
        ("head", "must be an address"),
        ("ray://head:10001", "the port of Ray's dashboard, not that of its client"),
        ("http://head:port", "must be an address"),
        ("http://head:8265/?a=b", "must be an address"),
        ("http://me:sesame-open@head:8265", "takes no password"),
    ],
)
def test_what_is_no_address_is_told_without_asking_anybody(address: str, why: str) -> None:
    with pytest.raises(RequestError) as refused:
        Cluster(address)
    assert why in str(refused.value) and "sesame" not in str(refused.value)


def test_an_address_where_nobody_is(server: Server) -> None:
    with pytest.raises(RequestError, match="must answer, but: .*refused; start it, or correct --cluster"):
        Cluster("http://127.0.0.1:9")


@pytest.mark.parametrize(
    "status, body, why",
    [
        (404, b"", "must be the dashboard of a Ray cluster, but it answers 404"),
        (200, b"<html>", "but it answers something else"),
        (200, b"[]", "but it answers something else"),
        (200, b'{"ray_version": "1.13.0"}', "must run the Ray that is installed here, but it runs 1.13.0"),
    ],
)
def test_a_server_that_is_no_cluster_for_us(server: Server, status: int, body: bytes, why: str) -> None:
    if b"ray_version" in body:
        pytest.importorskip("ray")
    server.status, server.body = status, body
    with pytest.raises(RequestError, match=why):
        Cluster(server.url)


def test_a_token_is_taken_from_where_ray_takes_it_and_never_told(
    server: Server, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.status = 403
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("the-third-token\n")
    (home / "file").write_text("the-second-token\n")
    for name, value, expected in (
        ("HOME", str(home), "the-third-token"),
        ("RAY_AUTH_TOKEN_PATH", str(home / "file"), "the-second-token"),
        ("RAY_AUTH_TOKEN", "the-first-token", "the-first-token"),
    ):
        monkeypatch.setenv(name, value)
        with pytest.raises(RequestError, match="refuses our token; set RAY_AUTH_TOKEN") as refused:
            Cluster(server.url)
        assert server.seen == f"Bearer {expected}" and expected not in str(refused.value)


def test_a_cluster_that_asks_for_a_token_which_nobody_has(server: Server) -> None:
    server.status = 401
    with pytest.raises(RequestError, match="asks for a token, and there is none here"):
        Cluster(server.url)
    assert server.seen is None


@pytest.mark.parametrize(
    "text, why", [(None, "No such file"), ("", "is empty"), ("two words", "one word"), ("ü", "one word")]
)
def test_a_token_file_that_cannot_be_used(
    text: str | None, why: str, home: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is not None:
        (home / "token").write_text(text)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "token"))
    with pytest.raises(RequestError, match=why):
        Cluster(server.url)
    assert server.seen is None, "nothing may be asked"


# ---- what a cluster must have


class Here:
    """A cluster as far as ``check_fits`` asks for one."""

    address = "http://head:8265"


def fits(monkeypatch: pytest.MonkeyPatch, needs: tuple[str, ...] = (), **changes: Any) -> None:
    own = {"python": "{}.{}".format(*sys.version_info[:2]), "heldout": submitting._own_version(), "missing": []}
    monkeypatch.setattr(submitting, "_asked", lambda *_: own | changes)
    submitting.check_fits(Here(), needs)  # type: ignore[arg-type]


def test_a_cluster_as_we_are_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    fits(monkeypatch)


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"python": "3.8"}, "must run the Python that runs here, but it runs 3.8"),
        ({"heldout": "99.0"}, "must run the Heldout that is installed here, but it runs 99.0"),
        ({"missing": ["search"], "heldout": None}, "must have Heldout installed, but it has not"),
        ({"missing": ["torch", "xgboost"]}, "lacks torch, xgboost; install that in its image"),
    ],
)
def test_a_cluster_that_does_not_fit(changes: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match=why):
        fits(monkeypatch, **changes)


def test_the_head_answers_without_heldout_and_without_importing() -> None:
    text = Path(str(answering.__file__)).read_text()
    ran = subprocess.run(
        [sys.executable, "-I", "-S", "-c", text, "json", "nothing_like_it", "search"], capture_output=True, text=True
    )
    found = json.loads(ran.stdout)
    assert found["python"] == "{}.{}".format(*sys.version_info[:2])
    assert (found["heldout"], found["missing"]) == (None, ["nothing_like_it", "search"])


def test_what_is_too_large_for_ray_is_told_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = write_space(tmp_path, "big", rest="import kit")
    (tmp_path / "kit").mkdir()
    (tmp_path / "kit" / "__init__.py").write_text("")
    with (tmp_path / "kit" / "rows.npy").open("wb") as file:
        file.truncate(submitting.MOST_BYTES)
    with pytest.raises(RequestError, match=r"at most 100 MiB to be sent, but are 100 MiB, .*kit/rows\.npy the largest"):
        submitting.launch(Here(), space, (), study=None, user=None, files=())  # type: ignore[arg-type]


def test_the_limit_is_rays() -> None:
    constants = pytest.importorskip("ray._private.ray_constants")
    assert submitting.MOST_BYTES == constants.DASHBOARD_CLIENT_MAX_SIZE


# ---- what is passed on


class Recording:
    """A cluster whose client keeps what it was asked to run."""

    address = "http://head:8265"

    def __init__(self) -> None:
        self.client = self
        self.asked: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}
        self.listed: list[Info] = []

    def list_jobs(self) -> list[Info]:
        return self.listed

    def speaking(self, job: str | None = None) -> Any:
        import contextlib

        return contextlib.nullcontext()

    def submit_job(self, **asked: Any) -> str:
        self.asked = asked
        if "working_dir" in asked["runtime_env"]:
            folder = Path(asked["runtime_env"]["working_dir"])
            self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        return str(asked["submission_id"])


def asked(monkeypatch: pytest.MonkeyPatch, *words: str) -> Recording:
    """What the command with these words asks of a cluster that fits."""
    cluster = Recording()
    monkeypatch.setattr("search.service.job_server.Cluster", lambda _: cluster)
    monkeypatch.setattr(submitting, "check_fits", lambda *_: None)
    with main.make_context("heldout", [*words, "--cluster", cluster.address]) as context:
        main.invoke(context)
    return cluster


def sent(monkeypatch: pytest.MonkeyPatch, *words: str) -> Recording:
    """What `heldout launch` with these words asks of it."""
    return asked(monkeypatch, "launch", *words, "--detach")


def command_line(cluster: Recording) -> list[str]:
    (line,) = [part for part in cluster.asked["entrypoint"].split(" && ") if part.startswith("heldout launch")]
    return shlex.split(line)


def test_options_arrive_as_they_were_given_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "first.json").write_text("[]")
    space = write_space(tmp_path, "tiny")
    given = ["--trials", "7", "--keep", "all", "--tag", "a=b c", "--tag", "d=$HOME", "--deterministic", "--seed", "0"]
    cluster = sent(monkeypatch, space, *given, "--enqueue", str(tmp_path / "first.json"), "--study", "mine")
    words = command_line(cluster)
    assert words[:5] == ["heldout", "launch", "tiny.py", "--study", "mine"] and words[-2:] == ["--ray", "auto"]
    main.commands["launch"].make_context("launch", words[2:])  # it parses
    rest = words[5:-2]
    pairs = [("--trials", "7"), ("--keep", "all"), ("--tag", "a=b c"), ("--tag", "d=$HOME"), ("--seed", "0")]
    for pair in [*pairs, ("--enqueue", "first.json")]:
        assert any((one, two) == pair for one, two in zip(rest, rest[1:], strict=False)), pair
    assert "--deterministic" in rest and len(rest) == 13
    assert set(cluster.files) == {"tiny.py", "first.json"}
    assert cluster.asked["submission_id"] == "mine" and cluster.asked["metadata"]["study"] == "mine"


def test_every_option_of_a_launch_can_be_passed_on(tmp_path: Path) -> None:
    """Whatever is added to the command, its words come back from what click made of them."""
    launch = main.commands["launch"]
    (tmp_path / "x").write_text("[]")
    words: list[str] = []
    for parameter in launch.params:
        if isinstance(parameter, click.Option) and parameter.name not in cli_jobs.LOCAL | {"ray"}:
            value = {"tags": "a=b", "keep": "3", "enqueue": str(tmp_path / "x")}.get(str(parameter.name))
            if value is None and isinstance(parameter.type, click.Choice):
                value = str(parameter.type.choices[-1])
            words += [parameter.opts[0]] if parameter.is_flag else [parameter.opts[0], value or "1"]
    context = launch.make_context("launch", ["digits_mlp", *words])
    made = cli_jobs.arguments(context, cli_jobs.given(context))
    again = launch.make_context("launch", ["digits_mlp", *made])
    assert again.params == context.params


def test_names_that_are_made_up_do_not_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = write_space(tmp_path, "tiny")
    made = {sent(monkeypatch, space).asked["submission_id"] for _ in range(20)}
    assert len(made) == 20 and all(name.startswith("tiny-") for name in made)


STEPS = {
    "resume s --trials +2": "resume s --trials +2 && heldout publish s",
    "evaluate s --final retrain": "evaluate s --final retrain && heldout publish s",
    "ensemble s --size 3 --evaluate auto": "ensemble s --size 3 --evaluate auto && heldout publish s",
    "compare s t": "compare s t",
}


@pytest.mark.parametrize("words", STEPS)
def test_what_is_about_a_study_of_the_cluster_runs_there_and_is_published(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_jobs, "followed", lambda *_: None)
    cluster = asked(monkeypatch, *words.split(), "--json")
    first, steps = cluster.asked["entrypoint"].split(" && ", 1)
    assert first == 'export HELDOUT_WORKSPACE="${HELDOUT_WORKSPACE:-$HOME/heldout-workspace}"'
    assert steps.replace(" --json", "") == f"heldout {STEPS[words]}" and steps.count(" --json") == 1
    assert not cluster.files
    does, job = words.split()[0], cluster.asked["submission_id"]
    assert job.startswith(f"s-{does}-") and len(job) == len(f"s-{does}-") + 6
    meta = cluster.asked["metadata"]
    assert (meta[submitting.MARK], meta["study"], meta["command"]) == (does, "s", words)
    assert f"`heldout {does} s" in capsys.readouterr().err


RESULT = '{\n  "a": [\n    {}\n  ],\n  "b": {\n    "c": null\n  }\n}\n'


@pytest.mark.parametrize("code, out", [(0, RESULT), (1, RESULT), (2, "")])
def test_json_is_the_result_alone_whatever_else_a_job_says(
    code: int, out: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = f"INFO job_manager.py -- setting up {{}}\n{{\nRunning entrypoint\n{out}storing the report\n[\n"

    def follow(_: Any, __: str, say: Any) -> int:
        for start in range(0, len(said), 10):
            say(said[start : start + 10])
        return code

    monkeypatch.setattr("search.service.following.follow", follow)
    with pytest.raises(click.exceptions.Exit) as ended:
        asked(monkeypatch, "evaluate", "s", "--json")
    told = capsys.readouterr()
    assert ended.value.exit_code == code and told.out == out and (said in told.err) == (code > 0)


def test_a_workspace_of_the_cluster_holds_for_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in (("launch", write_space(tmp_path, "tiny")), ("evaluate", "s")):
        cluster = asked(monkeypatch, *words, "--workspace", "/a b", "--detach")
        first, *rest = cluster.asked["entrypoint"].split(" && ")
        assert first == "export HELDOUT_WORKSPACE='/a b'" and not any("--workspace" in step for step in rest)
        with pytest.raises(click.exceptions.Exit):
            asked(monkeypatch, *words, "--workspace", "here", "--detach")


# ---- an ensemble's folder


def ensembled(monkeypatch: pytest.MonkeyPatch, code: int, out: Path) -> list[tuple[Any, ...]]:
    """What is fetched when the job has ended with this code."""
    fetched: list[tuple[Any, ...]] = []

    def fetch(*given: Any) -> list[str]:
        fetched.append(given)
        return ["model.keras"]

    monkeypatch.setattr("search.service.following.follow", lambda *_: code)
    monkeypatch.setattr("search.service.elsewhere.check_address", lambda _: None)
    monkeypatch.setattr("search.service.elsewhere.read_ensemble", fetch)
    with pytest.raises(click.exceptions.Exit) as ended:
        asked(monkeypatch, "ensemble", "s", "--size", "3", "--out", str(out), "--tracking-uri", "http://mlflow")
    assert ended.value.exit_code == code
    return fetched


def test_an_ensemble_is_fetched_once_its_job_has_succeeded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ensembled(monkeypatch, 0, tmp_path / "out") == [("http://mlflow", "s", 3, tmp_path / "out")]
    assert capsys.readouterr().out == f"it is in {tmp_path / 'out'}: model.keras\n"
    assert ensembled(monkeypatch, 1, tmp_path / "out") == []


MLFLOW = ["--tracking-uri", "http://127.0.0.1:9"]


@pytest.mark.parametrize(
    "words, why",
    [
        (["--detach"], "--detach goes with --cluster"),
        (MLFLOW, "--tracking-uri is where --out is fetched from"),
        ([*CLUSTER, *MLFLOW], "--tracking-uri is where --out is fetched from"),
        ([*CLUSTER, "--out", "new"], "add --tracking-uri URI, or set MLFLOW_TRACKING_URI"),
        ([*CLUSTER, "--out", "new", "--detach"], "--detach does not wait for that; leave out one of them"),
        ([*CLUSTER, "--out", "full", *MLFLOW], "--out must be a new or empty folder"),
        ([*CLUSTER, "--out", "new", *MLFLOW], "http://127.0.0.1:9 must answer"),
        ([*CLUSTER, "--out", "full/file/new", *MLFLOW], "that can be written"),
        ([*CLUSTER, "--size", "1"], "--size must be a whole number of at least 2"),
        ([*CLUSTER, "--workspace", "here"], "--workspace must be a whole path there"),
    ],
)
def test_an_ensemble_that_cannot_be_sent_is_told_before_anybody_is_asked(
    words: list[str], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    cluster = Recording()
    monkeypatch.setattr("search.service.job_server.Cluster", lambda _: cluster)
    with pytest.raises(click.exceptions.Exit) as ended:
        with main.make_context("heldout", ["ensemble", "s", *words]) as context:
            main.invoke(context)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.exit_code == 2 and why in line and not cluster.asked
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "words, why",
    [
        (["evaluate", "s", "--detach"], "--detach goes with --cluster"),
        (["compare", "s", "t", "--detach"], "--detach goes with --cluster"),
        (["compare", "s", "../t", *CLUSTER], "a study's name must be letters"),
        (["evaluate", "s", "--cluster", "ray://head:10001"], "not that of its client"),
        (["evaluate", "s", "--cluster", "http://127.0.0.1:9"], "must answer, but: "),
    ],
)
def test_other_commands_that_cannot_be_sent(
    words: list[str], why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if words[-2:] == CLUSTER:
        monkeypatch.setattr("search.service.job_server.Cluster", lambda _: Here())
    with pytest.raises(click.exceptions.Exit) as ended:
        with main.make_context("heldout", words) as context:
            main.invoke(context)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.exit_code == 2 and why in line


@pytest.mark.parametrize(
    "words, why",
    [
        (["--detach"], "--detach goes with --cluster"),
        (["--ray", "auto", "--cluster", "http://head:8265"], "--ray cannot be given as well"),
        (["--enqueue", "nowhere.json", "--cluster", "http://head:8265"], "--enqueue must name a file"),
        (["--trials", "0", "--cluster", "http://head:8265"], "--trials must be a whole number"),
    ],
)
def test_what_cannot_be_sent_is_told_here(words: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(click.exceptions.Exit) as ended:
        with main.make_context("heldout", ["launch", "digits_mlp", *words]) as context:
            main.invoke(context)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.exit_code == 2 and why in line


# ---- what came of it


class Info:
    """What Ray says of a job."""

    start_time, end_time = 1_700_000_000_000, None

    def __init__(self, status: str, code: int | None = None, message: str = "", **metadata: str) -> None:
        self.status, self.driver_exit_code, self.message, self.metadata = status, code, message, metadata
        self.submission_id = f"{metadata.get('study')}-{metadata.get('heldout')}"


@pytest.mark.parametrize(
    "status, code, expected", [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", -9, 1), ("FAILED", 256, 1)]
)
def test_the_exit_code_of_a_job_is_handed_on(status: str, code: int, expected: int) -> None:
    assert following._outcome(Info(status, code), "s", Here()) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "metadata, goes_on",
    [
        ({"heldout": "launch", "study": "s"}, "`heldout resume s --cluster http://head:8265` goes on"),
        ({"heldout": "resume", "study": "s"}, "`heldout resume s --cluster http://head:8265` goes on"),
        (
            {"heldout": "ensemble", "study": "s", "command": "ensemble s --size 3"},
            "`heldout ensemble s --size 3 --cluster http://head:8265` begins anew",
        ),
    ],
)
def test_what_was_stopped_can_be_taken_up(metadata: dict[str, str], goes_on: str) -> None:
    with pytest.raises(StudyStopped) as stopped:
        following._outcome(Info("STOPPED", **metadata), "j", Here())  # type: ignore[arg-type]
    assert str(stopped.value) == f"job 'j' was stopped; {goes_on}"


def test_the_list_says_what_each_job_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = Recording()
    cluster.listed = [
        Info("RUNNING", heldout="evaluate", study="s", command="evaluate s --final retrain", user="ada"),
        Info("RUNNING", heldout="check"),
        Info("SUCCEEDED", heldout="launch", study="s", space="tiny"),
        Info("RUNNING", other="somebody's"),
    ]
    monkeypatch.setattr("search.service.job_server.Cluster", lambda _: cluster)
    with main.make_context("heldout", ["jobs", *CLUSTER]) as context:
        main.invoke(context)
    assert capsys.readouterr().out.splitlines() == [
        "s-evaluate: running, `evaluate s --final retrain` by ada, 2023-11-14T22:13:20+00:00",
        "s-launch: succeeded, a search of tiny by somebody, 2023-11-14T22:13:20+00:00",
    ]
    assert [one["does"] for one in following.jobs(cluster)] == ["evaluate", "launch"]  # type: ignore[arg-type]

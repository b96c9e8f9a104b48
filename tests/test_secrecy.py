"""Secrets: where they come from, what looks like one, and that no usual way of writing one gets past."""

from __future__ import annotations

import base64
import json
import os
import re
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search import secrecy
from search.errors import RequestError
from search.executors import Exited, Job, Message, Slot, Warned
from search.executors.local import LocalExecutor
from search.study import StudyConfig

SECRETS = st.text(st.characters(min_codepoint=32, exclude_categories=("Cs",)), min_size=6, max_size=40).filter(
    lambda text: len(text.strip()) >= 6
)
WRITTEN: dict[str, Callable[[str], str]] = {
    "plain": str,
    "repr": lambda text: repr(text)[1:-1],
    "ascii": lambda text: ascii(text)[1:-1],
    "json": lambda text: json.dumps(text)[1:-1],
    "url": lambda text: urllib.parse.quote(text, safe=""),
    "path": urllib.parse.quote,
    "form": urllib.parse.quote_plus,
    "lower": lambda text: re.sub(r"%..", lambda code: code[0].lower(), urllib.parse.quote(text)),
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "base64 of a url": lambda text: base64.urlsafe_b64encode(text.encode()).decode(),
}


def forget() -> None:
    secrecy._known.clear()
    secrecy._values.clear()
    secrecy._texts = None


# ---- where they come from


def test_a_variable_or_the_file_that_is_named_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "db").write_bytes(b"from a file\nof two lines\n")
    monkeypatch.setenv("PLAIN", "from the environment")
    monkeypatch.setenv("DB_FILE", str(tmp_path / "db"))
    monkeypatch.setenv("BOTH", "wins over its file")
    monkeypatch.setenv("BOTH_FILE", str(tmp_path / "db"))
    assert secrecy.resolve(["PLAIN", "DB", "BOTH"]) == {
        "PLAIN": "from the environment",
        "DB": "from a file\nof two lines",
        "BOTH": "wins over its file",
    }
    assert secrecy.scrub("x from a file\nof two lines, wins over its file") == "x ***DB***, ***BOTH***"
    assert secrecy.scrub("line two: of two lines") == "line two: ***DB***"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "the variable NAMED, .* must be set, or NAMED_FILE .*, but neither is; set one of them"),
        ({"NAMED": ""}, "but neither is; set one of them"),
        ({"NAMED_FILE": "/nowhere/to/be/found"}, "NAMED_FILE must name a file that can be read, but /nowhere.*No such"),
        ({"NAMED_FILE": "/"}, "must name a file that can be read, but /: Is a directory"),
        ({"NAMED": "abc"}, "must have at least 4 characters, .* but has 3; a variable that is no secret"),
        ({"NAMED": "  a  "}, "must have at least 4 characters"),
    ],
)
def test_a_secret_that_cannot_be_had(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RequestError, match=said) as caught:
        secrecy.resolve(["NAMED"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", ["NAME=s3cret", "", "with space", "9LIVES", "A-B", "ünits", "A\n"])
def test_what_is_no_name_is_refused_and_a_value_is_not_repeated(given: str) -> None:
    with pytest.raises(RequestError, match="--env must be the name of a variable") as caught:
        StudyConfig(space="s", env=[given])
    assert "s3cret" not in str(caught.value)


def test_a_study_records_names_and_no_values() -> None:
    config = StudyConfig(space="s", env=["B", "A", "B"])
    assert config.env == ("B", "A")
    assert StudyConfig(**json.loads(json.dumps(config.to_json()))) == config


def test_a_secret_in_what_is_recorded_is_refused() -> None:
    secrecy.absent({"KEY": "s3cr/et"}, "nothing here", "the module")
    for text in ("token = 's3cr/et'", "s3cr%2Fet", base64.b64encode(b"user:s3cr/et").decode()):
        with pytest.raises(RequestError, match='the module must not have the value of --env KEY .*os.environ."KEY"'):
            secrecy.absent({"KEY": "s3cr/et"}, text, "the module")


# ---- what looks like one


@pytest.mark.parametrize(
    "name",
    [
        *("GITHUB_TOKEN", "HF_TOKEN2", "token", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "my_Secret"),
        *("PGPASSWORD", "MYSQL_PASSWD", "GOOGLE_APPLICATION_CREDENTIALS", "WANDB_API_KEY", "OPENAI_APIKEY"),
        *("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "CLIENT_SECRETS_FILE"),
        *("DB_PASSWORD", "SSH_PRIVATE_KEY"),
    ],
)
def test_what_looks_secret_stays_with_the_driver(name: str) -> None:
    assert secrecy.inherited({name: "value", "PATH": "/bin"}) == {"PATH": "/bin"}
    assert secrecy.withheld({name: "value", "PATH": "/bin"}) == {name: "value"}


@pytest.mark.parametrize(
    "name", ["PATH", "HOME", "TOKENIZERS_PARALLELISM", "SECRETARY", "KEYBOARD", "XLA_FLAGS", "OMP_NUM_THREADS"]
)
def test_what_does_not_is_inherited(name: str) -> None:
    assert secrecy.inherited({name: "value"}) == {name: "value"}


def test_an_address_is_inherited_unless_it_has_credentials() -> None:
    assert secrecy.inherited({"MLFLOW_TRACKING_URI": "http://host:5000"})
    for uri in ("http://ada:pw@host", "postgresql://ada@host/db?password=x", "http://host?token=abc"):
        assert not secrecy.inherited({"MLFLOW_TRACKING_URI": uri}), uri


# ---- taking them out


@pytest.mark.parametrize("way", WRITTEN)
@given(secret=SECRETS, before=st.text(max_size=8), after=st.text(max_size=8))
def test_no_usual_way_of_writing_a_secret_gets_past(way: str, secret: str, before: str, after: str) -> None:
    forget()
    secrecy.learn({"***KEY***": secret})
    written = WRITTEN[way](secret)
    left = secrecy.scrub(before + written + after)
    assert "***KEY***" in left
    assert written not in left or written in before + "***KEY***" + after


@given(secret=SECRETS, before=st.binary(max_size=8), after=st.binary(max_size=8))
def test_base64_of_more_than_the_secret(secret: str, before: bytes, after: bytes) -> None:
    forget()
    secrecy.learn({"***KEY***": secret})
    assert "***KEY***" in secrecy.scrub(base64.b64encode(before + secret.encode() + after).decode())


JSON = st.recursive(
    st.none() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


@given(tree=JSON)
def test_a_message_without_secrets_comes_through_as_it_is(tree: Any) -> None:
    forget()
    secrecy.learn({"***KEY***": "correct horse battery staple"})
    assert repr(secrecy.scrubbed({"type": "result", "tree": tree})) == repr({"type": "result", "tree": tree})


def test_names_and_values_anywhere_in_a_message() -> None:
    secrecy.learn({"***KEY***": "s3cr3t-x"})
    body = {"type": "s3cr3t-x", "metrics": {"s3cr3t-x": 1.5}, "asks": [{"value": ["a", "b s3cr3t-x"]}]}
    assert secrecy.scrubbed(body) == {
        "type": "s3cr3t-x",  # of the protocol, not of the trial: an unknown one is ignored
        "metrics": {"***KEY***": 1.5},
        "asks": [{"value": ["a", "b ***KEY***"]}],
    }


def test_credentials_of_an_address_are_known_by_all_their_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t0ken-of-mlflow")
    secrecy.learn_tracking("postgresql://ada:p%40ssword@db/mlflow?sslpassword=k3y-in-query&sslmode=require")
    told = "p%40ssword p@ssword ada:p%40ssword k3y-in-query t0ken-of-mlflow require db/mlflow ada"
    assert secrecy.scrub(told) == "*** *** *** *** *** require db/mlflow ada"


class TestFiles:
    def test_a_secret_is_overwritten_where_it_stands(self, tmp_path: Path) -> None:
        secrecy.learn({"***KEY***": "s3cr3t-x"})
        log = tmp_path / "log.txt"
        log.write_bytes(b"a s3cr3t-x\n\xff\x00" + base64.b64encode(b"s3cr3t-x") + b" end")
        inode, size = log.stat().st_ino, log.stat().st_size
        secrecy.scrub_file(log)
        assert log.read_bytes() == b"a ********\n\xff\x00************ end"
        assert (log.stat().st_ino, log.stat().st_size) == (inode, size)

    def test_what_stands_in_a_files_place_does_no_harm(self, tmp_path: Path) -> None:
        secrecy.learn({"***KEY***": "s3cr3t-x"})
        (tmp_path / "theirs").write_text("s3cr3t-x")
        (tmp_path / "link").symlink_to(tmp_path / "theirs")
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "folder").mkdir()
        (tmp_path / "empty").touch()
        for name in ("link", "pipe", "folder", "empty", "missing"):
            secrecy.scrub_file(tmp_path / name)
        assert (tmp_path / "theirs").read_text() == "s3cr3t-x"

    def test_a_model_that_holds_one_is_known(self, tmp_path: Path) -> None:
        secrecy.learn({"***KEY***": "s3cr3t-x", "***SHORT***": "abcd"})
        (tmp_path / "model").write_bytes(b"\x00weights abcd\x00")
        assert secrecy.held_by(tmp_path / "model") is None
        (tmp_path / "model").write_bytes(b"\x00weights s3cr3t-x\x00")
        assert secrecy.held_by(tmp_path / "model") == "***KEY***"


# ---- in job processes


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_jobs_get_what_is_named_and_what_they_say_and_print_is_without_it(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTER_TOKEN", "not-for-trials")
    monkeypatch.setenv("OUTER_PLAIN", "for-everybody")
    secrets = {"KEY": "s3cr3t-of-the-job"}
    secrecy.learn({"***KEY***": secrets["KEY"]})
    log = tmp_path / "log.txt"
    executor = LocalExecutor(
        [Slot(0, 1)],
        start_method=method,
        log=tmp_path / "template.log",
        entry="tests.bodies:main",
        path=[str(Path(__file__).resolve().parent.parent)],
        required=(),
        secrets=secrets,
    )
    names = ["KEY", "OUTER_TOKEN", "OUTER_PLAIN", secrecy.NAMES]
    told: list[Any] = []
    with executor:
        executor.submit(Job("a", "about", {"names": names}), executor.slots[0])
        executor.submit(Job("b", "leak", {"name": "KEY"}, log=str(log)), None)
        while sum(isinstance(event, Exited) for event in told) < 2:
            told += executor.poll(5.0)
        # Before the executor is closed: it is done when the process is gone.
        assert "s3cr3t" not in log.read_text()
    (about,) = [event.body for event in told if isinstance(event, Message) and event.job == "a"]
    assert about["env"] == dict(zip(names, ["***KEY***", None, "for-everybody", "KEY"], strict=True))
    (leaked,) = [event.body for event in told if isinstance(event, Message) and event.job == "b"]
    assert leaked == {"type": "result", "value": "***KEY***", "length": len(secrets["KEY"])}
    assert log.read_text().splitlines() == ["printed ***KEY***", "from C *****************", "child *****************"]
    assert not any(isinstance(event, Warned) for event in told)

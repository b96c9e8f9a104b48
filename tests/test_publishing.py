"""Addresses of MLflow: which can be used, what of them may be shown, and links into its pages."""

from __future__ import annotations

import contextlib
import http.server
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from search import secrecy
from search.errors import TrackingError
from search.tracker import publishing

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://localhost:5000", "http://localhost:5000"),
        ("https://ada:pw@mlflow.example/base", "https://mlflow.example/base"),
        ("https://mlflow.example/team@home", "https://mlflow.example/team@home"),
        ("https://mlflow.example?token=x", "https://mlflow.example"),
        ("http://ada:p/w@mlflow.example", "http://mlflow.example"),
        ("postgresql+psycopg://ada:p@ss/w@db:5432/mlflow?password=x", "postgresql+psycopg://db:5432/mlflow"),
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db"),
        ("nonsense", "nonsense"),
    ],
)
def test_credentials_are_taken_out(uri: str, shown: str) -> None:
    assert secrecy.redacted(uri) == shown


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("mlruns", "must be one of sqlite, postgresql"),
        ("file:///tmp/mlruns", "must be one of sqlite, postgresql"),
        ("postgres://ada:secret@db/mlflow", "must be one of .* got 'postgres://db/mlflow'"),
        ("sqlite://", "must name a file"),
        ("sqlite:///:memory:", "must name a file"),
        ("http://127.0.0.1:{closed}", "must answer, but: .*refused"),
        ("http://ada:secret@127.0.0.1:{closed}", "the tracking server http://127.0.0.1:\\d+ must answer"),
        ("http://no such host", "must answer"),
        ("https://[::1", "must have an address that can be read$"),
        ("http://ada:se/secret@localhost", "http://localhost must have an address that can be read; in user and"),
        ("sqlite+pysqlcipher://:secret@/mlflow.db", "must name a file.* got 'sqlite.pysqlcipher:///mlflow.db'"),
        ("ada:secret@localhost", "must be one of .* got 'localhost'"),
        ("sqlite:///{folder}", "cannot be used"),
        ("sqlite:///{folder}/file/mlflow.db", "must be a folder that can be written"),
        ("sqlite:///{folder}/file", "cannot be used: file is not a database"),
    ],
)
def test_an_address_that_cannot_be_used_is_told_at_once(uri: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a database, and long enough for its header to be read" * 20)
    with pytest.raises(TrackingError, match=words) as caught:
        publishing.check_uri(uri.format(closed=1, folder=tmp_path))
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_addresses_that_can_be_used(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    with contextlib.closing(sqlite3.connect(file)) as database:
        database.execute("CREATE TABLE runs (id)")
    for uri in (
        f"sqlite:///{file}",
        publishing.default_uri(tmp_path / "new" / "workspace"),
        "postgresql://ada:pw@db.example/mlflow",
    ):
        publishing.check_uri(uri)
    assert list(tmp_path.iterdir()) == [file]


@contextlib.contextmanager
def answering(**statuses: int) -> Iterator[tuple[str, set[str | None]]]:
    """A web server that answers paths by their last word, and what credentials it was shown."""
    shown: set[str | None] = set()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802
            shown.add(self.headers["Authorization"])
            word = self.path.partition("?")[0].rpartition("/")[2]
            self.send_response(statuses.get(word, 404))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}", shown
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("statuses", "words"),
    [
        ({"health": 401, "search": 401}, "refuses us \\(401\\); set MLFLOW_TRACKING_USERNAME"),
        ({"health": 404}, "must be an MLflow server, but it answers 404"),
        ({"health": 500, "search": 500}, "must be an MLflow server, but it answers 500"),
    ],
)
def test_a_server_that_is_not_for_us(statuses: dict[str, int], words: str) -> None:
    with answering(**statuses) as (host, shown), pytest.raises(TrackingError, match=words):
        publishing.check_uri(f"http://ada:p%40w@{host}/base")
    assert shown == {"Basic YWRhOnBAdw=="}


@pytest.mark.parametrize("statuses", [{"health": 200}, {"health": 403, "search": 200}])
def test_a_server_that_is_for_us(statuses: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t0ken")
    with answering(**statuses) as (host, shown):
        publishing.check_uri(f"http://{host}/")
    assert shown == {"Bearer t0ken"}


def test_the_link_that_compares_all_trials() -> None:
    link = publishing.compare_link("http://127.0.0.1:5000/", "1", ["a1", "b2"])
    assert link == ("http://127.0.0.1:5000/#/compare-runs?runs=[%22a1%22,%22b2%22]&experiments=[%221%22]")


def test_the_drivers_side_does_not_import_mlflow() -> None:
    code = "import sys; from search.tracker import publishing, tracking, ui; print('mlflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    "content",
    [b"", b'{"uri": "sqlite:///x", "ru', b"[]", b"null", b'"text"', b"\xff\xfe"]
    + [b'{"runs": []}', b'{"runs": {"O": "a"}}', b'{"runs": {"0": "a"}}', b'{"runs": null}'],
)
def test_a_torn_state_is_as_good_as_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / publishing.STATE_FILE).write_bytes(content)
    assert publishing.read(tmp_path) == {}

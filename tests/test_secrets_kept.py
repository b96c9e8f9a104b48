"""Secrets planted in a study through the command line, and looked for in all that it leaves behind."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import sqlite3
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

from search.tracker import tracking, ui
from tests.conftest import ROOT, Heldout
from tests.proxy import proxy
from tests.tiny import write_space
from tests.tracked import free_port

PLANTED = "pl4nt/ed+sécret & more"
FILED = "filed-s3cret-0123456789"
PASSWORD = "p4ss%word-of-the/server"
UNNAMED = "unnamed-t0ken-abcdefgh"

# What a module may do with a secret, by mistake or while looking for one.
LEAK = """
import base64, hashlib, json, os, subprocess, sys, urllib.parse

KEY, FILED = os.environ["PLANTED"], os.environ["FILED"]
print("importing with", KEY, FILED)
with open(os.environ["SEEN"], "a") as seen:
    digests = [hashlib.sha256(os.fsencode(text)).hexdigest() for text in (KEY, FILED)]
    print(json.dumps({"environment": dict(os.environ), "digests": digests}), file=seen)


def tell():
    for text in (KEY, FILED):
        raw = text.encode()
        forms = [text, repr(text), json.dumps(text), urllib.parse.quote(text, safe=""), urllib.parse.quote_plus(text)]
        forms += [base64.b64encode(b"x" * n + raw).decode() for n in range(3)]
        print(*forms)
        sys.stderr.write("stderr " + text + "\\n")
        os.write(1, b"from C: " + raw + b" " + base64.b64encode(raw) + b"\\n")
        code = "import os, sys; os.write(2, os.environ[sys.argv[1]].encode())"
        subprocess.run([sys.executable, "-c", code, "PLANTED" if text is KEY else "FILED"], check=True)


def callbacks(hp):
    tell()
    hp.Choice("with", [KEY, FILED])
    how = hp.Choice("how", ["fine", "raise", "far"])
    if how == "raise":
        raise ValueError(f"cannot log in with {KEY} or {FILED}\\n{KEY}")
    if how == "far":
        raise ValueError("x" * 290 + KEY)
    return []
"""
BUILD = (
    "def build(hp):\n"
    "    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(hp.Int('units', 2, 3)),\n"
    "                              keras.layers.Dense(2, activation='softmax')])\n"
    "    named = keras.metrics.SparseCategoricalCrossentropy(name=KEY.replace('/', ' '))\n"
    "    model.compile('adam', 'sparse_categorical_crossentropy', metrics=['accuracy', named])\n"
    "    return model"
)


def forms(secret: str) -> set[bytes]:
    """How a secret may be written, worked out apart from the code under test."""
    raw = secret.encode()
    found = {raw, urllib.parse.quote(secret).encode(), urllib.parse.quote(secret, safe="").encode()}
    found |= {urllib.parse.quote_plus(secret).encode(), json.dumps(secret)[1:-1].encode()}
    for before in range(3):
        # The characters that do not depend on what stands before and after.
        found.add(base64.b64encode(b"\0" * before + raw)[4:-4])
    return found


def files(*folders: Path) -> Iterator[Path]:
    for folder in folders:
        yield from (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def tables(database: Path) -> str:
    """Every value of every table."""
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return "\n".join(repr(row) for name in names for row in connection.execute(f'SELECT * FROM "{name}"'))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_planted_secrets_are_nowhere(tmp_path: Path, heldout: Heldout) -> None:
    store, workspace, seen = tmp_path / "store", tmp_path / "ws", tmp_path / "seen.json"
    store.mkdir()
    tracking.connect(f"sqlite:///{store / 'mlflow.db'}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "filed").write_text(FILED + "\n")
    space = write_space(tmp_path, "leaking", build=BUILD, rest=LEAK)
    told: list[str] = []

    with ui.serve(store, free_port()) as server, proxy(server.url, user=f"ada:{PASSWORD}") as gate:
        secret = {
            "PLANTED": PLANTED,
            "FILED_FILE": str(tmp_path / "run" / "filed"),
            "OTHER_API_TOKEN": UNNAMED,
            "SEEN": str(seen),
        }
        by_address = {"MLFLOW_TRACKING_URI": f"http://ada:{urllib.parse.quote(PASSWORD, safe='')}@{gate.address}"}
        by_variable = {
            "MLFLOW_TRACKING_URI": f"http://{gate.address}",
            "MLFLOW_TRACKING_USERNAME": "ada",
            "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        }
        where = ("--workspace", str(workspace))
        plan = ("--trials", "7", "--workers", "1", "--sampler", "random", "--confirm", "0", "--env", "PLANTED")
        plan += ("--env", "FILED", *where)

        checked = heldout("--debug", "check", space, *plan, **secret, **by_address)
        assert checked.returncode == 0, checked.stderr
        told += [checked.stdout, checked.stderr]

        command = [sys.executable, "-m", "search.cli", "--debug", "launch", space, *plan, "--study", "s"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **secret, **by_address}
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT) as driver:
            assert driver.stderr is not None
            for line in driver.stderr:
                told.append(line)
                if line.startswith("trial 2 "):
                    break
            driver.kill()
            told.append(driver.stderr.read())

        def run(*words: str, code: int = 0, **variables: str) -> None:
            ran = heldout("--debug", *words, *where, **variables)
            assert ran.returncode == code, ran.stderr
            told.extend([ran.stdout, ran.stderr])

        run("resume", "s", code=2)  # with neither the secrets nor the password
        assert "--env PLANTED must find" in told[-1] or "set MLFLOW_TRACKING_URI" in told[-1]
        run("resume", "s", code=2, **secret, **by_variable | {"MLFLOW_TRACKING_PASSWORD": "wrong"})
        run("resume", "s", **secret, **by_variable)
        for number in range(7):
            run("show", "s", str(number))
        run("status")
        run("status", "s", "--json")
        run("report", "s")
        run("report", "s", "--json")
        out = str(tmp_path / "out")
        run("export", "s", "--out", out, "--register", "planted", **secret, **by_address)
        run("evaluate", "s", **secret, **by_address)
        for uri in (f"http://ada:{PASSWORD}@{gate.address}", f"postgres://ada:{PASSWORD}@h/x", f"ada:{PASSWORD}@h"):
            ran = heldout("--debug", "launch", space, *plan, **secret, MLFLOW_TRACKING_URI=uri)
            assert ran.returncode == 2, ran.stderr
            told += [ran.stdout, ran.stderr]
        assert gate.served > 20 and gate.refused

    processes = [json.loads(line) for line in seen.read_text().splitlines()]
    assert len(processes) > 10
    for found in processes:
        assert found["digests"] == [hashlib.sha256(text.encode()).hexdigest() for text in (PLANTED, FILED)]
        values = json.dumps([found["environment"], urllib.parse.unquote(str(found["environment"]))])
        assert "SEEN" in values and UNNAMED not in values and PASSWORD not in values

    trials = heldout("status", "s", *where, "--json")
    assert json.loads(trials.stdout)["trials"]["complete"] >= 1
    reasons = json.loads(trials.stdout)["failures"]
    assert sum(reasons.values()) >= 1, "none of the trials raised"
    log = (workspace / "studies" / "s" / "trials" / "0000" / "log.txt").read_text()
    assert "***PLANTED***" in log and "from C: ****" in log

    ledger = Path(os.environ["HELDOUT_LEDGER"])
    left = {path: path.read_bytes() for path in files(workspace, store, tmp_path / "out", ledger.parent)}
    assert ledger in left
    assert len(left) > 50
    left |= {path.with_suffix(".tables"): tables(path).encode() for path in left if path.suffix in (".sqlite", ".db")}
    left[Path("what was told")] = "\n".join(told).encode()
    assert b"cannot log in with" in left[store / "mlflow.tables"] + b"".join(map(str.encode, told))
    for secret_text in (PLANTED, FILED, PASSWORD, UNNAMED):
        for form in forms(secret_text):
            holders = [str(path) for path, content in left.items() if form in content]
            assert not holders, (secret_text, form, holders)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--env", "MISSING"], r"\(--env MISSING\), must be set, or MISSING_FILE"),
        (["--env", f"FILED={FILED}"], "--env must be the name of a variable, but got 'FILED='; leave the value out"),
        (["--env", "FILED", "--tag", f"login={FILED}"], "a launch must not have the value of --env FILED in it"),
        (["--env", "FILED", "--env", "WRITTEN"], "the space module .* must not have the value of --env WRITTEN in it"),
        (["--env", "PLACE"], "must not have the value of --env PLACE in it"),
    ],
)
def test_a_secret_that_would_be_recorded_is_refused_and_not_told(
    tmp_path: Path, heldout: Heldout, arguments: list[str], said: str
) -> None:
    space = write_space(tmp_path, "writing", rest=f"PASSWORD = {PASSWORD!r}")
    variables = {"FILED": FILED, "WRITTEN": PASSWORD, "PLACE": str(tmp_path)}
    ran = heldout("launch", space, *arguments, "--workspace", str(tmp_path / "ws"), **variables)
    assert ran.returncode == 2 and re.search(said, ran.stderr), ran.stderr
    assert len(ran.stderr.splitlines()) == 1 and not ran.stdout
    assert not any(form in ran.stderr.encode() for secret in (FILED, PASSWORD) for form in forms(secret))
    studies = tmp_path / "ws" / "studies"
    assert not studies.exists() or not list(studies.iterdir())


@pytest.mark.study
def test_a_model_that_holds_a_secret_is_refused(tmp_path: Path, heldout: Heldout) -> None:
    rest = "import os"
    build = (
        "def build(hp):\n"
        "    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, activation='softmax',\n"
        "                              name=os.environ['FILED'])])\n"
        "    model.compile('adam', 'sparse_categorical_crossentropy', metrics=['accuracy'])\n"
        "    return model"
    )
    space = write_space(tmp_path, "naming", build=build, rest=rest)
    where = ("--workspace", str(tmp_path / "ws"), "--trials", "1", "--env", "FILED")
    ran = heldout("launch", space, *where, FILED=FILED)
    assert ran.returncode == 2, ran.stderr
    assert "a model must have no secret in it, but ***FILED*** is in a name or setting of a layer" in ran.stderr
    assert not list((tmp_path / "ws" / "studies").iterdir())
    assert not [path for path in files(tmp_path / "ws") if FILED.encode() in path.read_bytes()]

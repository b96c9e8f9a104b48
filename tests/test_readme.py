"""The README is true: its commands parse, its examples run, its links lead somewhere, and it leaves no command out."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest

from search.cli import main
from tests.conftest import ROOT, run_heldout

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROSE = FENCED.sub("", TEXT)
INLINE = re.findall(r"`([^`\n]+)`", PROSE)


def blocks(language: str) -> list[str]:
    return [body for name, body in FENCED.findall(TEXT) if name == language]


def shell_lines() -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines() if line.strip()]


def heldout_commands() -> list[list[str]]:
    """Words after `heldout` of every command in the shell blocks, and of those quoted in the text."""
    found = []
    for line in shell_lines():
        for part in line.split(" && "):
            words = shlex.split(part)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words and words[0] == "heldout":
                found.append(words[1:])
    found += [shlex.split(text)[1:] for text in INLINE if text.startswith("heldout ")]
    return found


def section(title: str) -> str:
    """The text below a heading, up to the next heading of any level."""
    assert f"\n## {title}\n" in TEXT, f"README must have a section {title!r}"
    return HEADING.split(TEXT.split(f"\n## {title}\n", 1)[1])[0]


def anchors() -> set[str]:
    """Anchors of the headings as GitHub makes them."""
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in HEADING.findall(PROSE)}


# ── commands ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("words", heldout_commands(), ids=" ".join)
def test_every_command_parses(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Subcommand, options and arguments exist; nothing is executed."""
    group = click.Context(main, info_name="heldout")
    _, rest, _ = main.make_parser(group).parse_args(list(words))
    if not rest:  # `heldout --help`
        return
    command = main.get_command(group, rest[0])
    assert command is not None, f"there is no command {rest[0]!r}"
    if len(rest) == 1 and any(p.required for p in command.params):  # the command's name, as in "`heldout check`"
        return
    try:
        command.make_context(rest[0], rest[1:], parent=group)
    except click.exceptions.Exit as done:
        assert done.exit_code == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_is_in_the_readme_and_has_help(name: str) -> None:
    command = main.commands[name]
    assert command.help, f"heldout {name} must have help"
    assert any(words[:1] == [name] for words in heldout_commands()), f"README must show `heldout {name}`"


def test_every_option_is_in_the_readme() -> None:
    everywhere = set(re.findall(r"--[a-z][a-z-]+", TEXT))
    options = {
        (name, max(parameter.opts, key=len))
        for name, command in main.commands.items()
        for parameter in command.params
        if isinstance(parameter, click.Option)
    }
    assert not {f"heldout {name} {option}" for name, option in options if option not in everywhere}


def test_the_two_commands_come_first_and_ci_runs_the_second_word_for_word() -> None:
    launch, test = shell_lines()[:2]
    assert launch == "pip install -e . && heldout launch spaces/digits_mlp.py"
    assert test == "pip install -e '.[test]' && pytest"
    assert f'bash -c "{test}"' in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


# ── names, links, code ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)\s]+)\)", PROSE))))
def test_every_link_leads_somewhere(target: str) -> None:
    path, _, anchor = target.partition("#")
    if path.startswith(("http:", "https:")):
        return
    assert (ROOT / path).exists(), f"README links to {path}, which is not there"
    if anchor and not path:
        assert anchor in anchors(), f"README has no heading for #{anchor}"


def paths_named() -> Iterator[str]:
    """Files of the checkout that the text or a command names."""
    words = [word for line in shell_lines() for word in shlex.split(line)] + INLINE
    for word in words:
        if re.fullmatch(r"(\.ci|docker|spaces|tests)/[\w./*-]+|[\w-]+\.(txt|md|toml)", word):
            yield word


@pytest.mark.parametrize("path", sorted(set(paths_named()) - {"log.txt", "MODEL_CARD.md"}))
def test_every_file_that_is_named_is_there(path: str) -> None:
    assert list(ROOT.glob(path)), f"README names {path}, which is not there"


def test_every_test_that_a_promise_names_is_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", section("What happens when")))
    texts = [path.read_text() for path in (ROOT / "tests").glob("test_*.py")]
    there = {name for text in texts for name in re.findall(r"def (test_\w+)", text)}
    assert len(named) > 20 and named <= there, named - there


def test_the_code_refers_to_sections_that_exist() -> None:
    """Docstrings point readers to `README, "The report"` and the like."""
    wanted = {
        (path.name, title)
        for path in (ROOT / "search").rglob("*.py")
        for title in re.findall(r'README, "([^"]+)"', path.read_text(encoding="utf-8"))
    }
    assert wanted
    assert {title for _, title in wanted} <= set(HEADING.findall(PROSE)), wanted


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.strip().splitlines()[0][:40])
def test_every_python_example_compiles(block: str) -> None:
    compile(block, "README.md", "exec")


def test_the_python_functions_exist() -> None:
    import search
    from search.study import Study

    for name in re.findall(r"`search\.(\w+)", TEXT):
        assert name in search.__all__, f"README names search.{name}, which is not exported"
    for name in re.findall(r"`Study\.(\w+)", TEXT):
        assert hasattr(Study, name), f"README names Study.{name}, which is not there"


# ── examples that run ────────────────────────────────────────────────────────────────────────────


def example() -> str:
    """The space module of the README."""
    (found,) = [block for block in blocks("python") if {"load", "build", "preprocess"} <= _functions(block)]
    return found


def _functions(block: str) -> set[str]:
    return {node.name for node in ast.parse(block).body if isinstance(node, ast.FunctionDef)}


@dataclass
class Launched:
    """The README's example, launched through the command line."""

    report: dict[str, Any]
    workspace: Path


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    folder = tmp_path_factory.mktemp("readme")
    (folder / "cells.py").write_text(example(), encoding="utf-8")
    options = ["--trials", "3", "--epochs", "3", "--confirm", "1", "--confirm-seeds", "2", "--json"]
    options += ["--workspace", str(folder / "ws")]
    ran = run_heldout("launch", str(folder / "cells.py"), *options, HELDOUT_LEDGER=str(folder / "ledger.jsonl"))
    assert ran.returncode == 0, ran.stderr
    return Launched(json.loads(ran.stdout), folder / "ws")


def test_the_example_launches(launched: Launched) -> None:
    report = launched.report
    assert report["study"] == "cells-1" and report["state"] == "COMPLETE"
    assert report["trials"] == {"complete": 3, "pruned": 0, "failed": 0}
    assert report["test"]["opening"] == 1 and 0 <= report["test"]["winner"] <= 1
    assert set(report["baseline"]["params"]) >= {"layers", "units_0", "batch_size", "learning_rate"}


def test_the_keys_of_the_report_are_those_of_the_readme(launched: Launched) -> None:
    rows = [line.split("|")[1] for line in section("The report").splitlines() if line.startswith("| `")]
    listed = [key for row in rows for key in re.findall(r"`([\w.]+)`", row)]
    for key in listed:
        found: Any = launched.report
        for part in key.split("."):
            assert part in found, f"README lists {key}, but the report has {sorted(found)}"
            found = found[part]
    assert set(launched.report) == {key.split(".")[0] for key in listed}
    assert set(launched.report["test"]) == {key.split(".")[1] for key in listed if key.startswith("test.")}
    verdicts = {word for row in section("The test step").splitlines() for word in re.findall(r"`([A-Z_]{10,})`", row)}
    assert set(launched.report["verdicts"]) <= verdicts


def test_the_workspace_looks_as_the_readme_draws_it(launched: Launched) -> None:
    (drawing,) = [block for block in blocks("text") if block.startswith("heldout-workspace/")]
    assert all(name in drawing for name in ("mlflow.db", "rows/DIGEST/", "sealed/DIGEST/", "studies/NAME/"))
    study = launched.workspace / "studies" / "cells-1"
    for path in (launched.workspace / "mlflow.db", launched.workspace / "artifacts", *map(study.joinpath, _DRAWN)):
        assert path.exists(), f"README draws {path.name}, which a study does not write"
    (sealed,) = (launched.workspace / "sealed").iterdir()
    assert sealed.parent.stat().st_mode & 0o077 == 0


_DRAWN = ("journal.sqlite", "trials/0000/log.txt", "trials/0000/model.weights.h5", "guard/0000.npy", "frozen")
_DRAWN += ("guard.png", "report.html", "tracking.json")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_python_example_runs(tmp_path: Path) -> None:
    (code,) = [block for block in blocks("python") if "search.launch(" in block]
    (tmp_path / "spaces").symlink_to(ROOT / "spaces")
    script = tmp_path / "example.py"
    script.write_text(code.replace("trials=20", "trials=2, epochs=2"), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HELDOUT_WORKSPACE": str(tmp_path / "ws")}
    command = [sys.executable, str(script)]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "COMPLETE" in ran.stdout and (tmp_path / "digits-py-model" / "model.keras").exists()


DIGITS = """
objective = "val_accuracy"


def load():
    from sklearn.datasets import load_digits

    from search import Dataset

    bunch = load_digits()
    return Dataset(bunch.data.astype("float32"), bunch.target)
"""
IMAGES = """
objective = "val_accuracy"


def load():
    import numpy as np
    from sklearn.datasets import load_digits

    from search import Dataset

    bunch = load_digits()
    at = np.concatenate([np.flatnonzero(bunch.target == digit)[:24] for digit in range(10)])
    x = np.kron(bunch.images[at], np.ones((1, 4, 4)))[..., None].repeat(3, axis=-1)
    return Dataset(x.astype("float32") / 16, np.eye(10, dtype="float32")[bunch.target[at]])
"""
MOVES = FENCED.findall(TEXT.split("\n### Moving over\n", 1)[1].split("\n## ", 1)[0])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("code", [code for _, code in MOVES], ids=["kerastuner", "applications", "hyperopt", "optuna"])
def test_what_was_written_for_another_library_runs(code: str, tmp_path: Path) -> None:
    """Each example of "Moving over" with rows beside it, through the command line."""
    module = tmp_path / "moved.py"
    module.write_text(code + (IMAGES if "(32, 32, 3)" in code else DIGITS), encoding="utf-8")
    options = ["--trials", "2", "--epochs", "1", "--confirm", "0", "--json", "--workspace", str(tmp_path / "ws")]
    ran = run_heldout("launch", str(module), *options, timeout=600)
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert report["trials"]["complete"] == 2 and 0 <= report["test"]["winner"] <= 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_first_command_runs_on_a_machine_with_nothing_but_python(tmp_path: Path) -> None:
    """Word for word, with the default options, in an empty virtual environment."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    pins = str(ROOT / "constraints.txt")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment |= {
        "PATH": os.pathsep.join([str(home / "bin"), os.environ["PATH"]]),
        "PIP_CONSTRAINT": pins,
        "PIP_BUILD_CONSTRAINT": pins,
        "HELDOUT_WORKSPACE": str(tmp_path / "ws"),
    }
    ran = subprocess.run(
        ["bash", "-c", shell_lines()[0]], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1700
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    assert "study digits_mlp-1: 30 trials complete" in ran.stdout
    assert "test, 359 rows (97 % interval)" in ran.stdout and "Believe the test accuracy of" in ran.stdout

"""Wrong requests: one clear line, exit 2, and nothing half-written; and answers that come at once."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, Heldout
from tests.tiny import PARTS, write_space

CHEAP = "--evaluate no --trials 2 --epochs 1".split()


def refused(ran: subprocess.CompletedProcess[str], workspace: Path, *said: str) -> None:
    """One line on standard error that says all of this, exit code 2, and no trace of a study."""
    lines = [line for line in ran.stderr.splitlines() if line.startswith("heldout: ")]
    assert ran.returncode == 2, (ran.stdout, ran.stderr)
    assert len(lines) == 1 and all(text in lines[0] for text in said), ran.stderr
    assert "Traceback" not in ran.stderr + ran.stdout
    studies = workspace / "studies"
    assert not studies.exists() or list(studies.iterdir()) == []
    assert not (workspace / "mlflow.db").exists() or "run_uuid" not in _runs(workspace)


def _runs(workspace: Path) -> str:
    import sqlite3

    with sqlite3.connect(f"file:{workspace / 'mlflow.db'}?mode=ro", uri=True) as database:
        tables = {row[0] for row in database.execute("SELECT name FROM sqlite_master")}
        rows = database.execute("SELECT COUNT(*) FROM runs").fetchone()[0] if "runs" in tables else 0
    return "run_uuid" if rows else ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["spaces/digit_mlp.py"], ["no such file", "digits_mlp"]),
        (["digits_mlp", "--trials", "0"], ["--trials must be a whole number of at least 1, but got 0"]),
        (["digits_mlp", "--sampler", "tpee"], ["tpee", "tpe"]),
        (["digits_mlp", "--seed", "-1"], ["--seed must be"]),
        (["digits_mlp", "--study", "../escape"], ["a study's name must be"]),
        (["digits_mlp", "--tag", "novalue"], ["--tag must be K=V"]),
        (["digits_mlp", "--workers", "2", "--gpus", "0"], ["--workers", "--gpus"]),
        (["digits_mlp", "--trials-per-gpu", "2", "--gpus", "none"], ["--trials-per-gpu"]),
    ],
)
def test_a_wrong_request_is_refused_at_once(
    tmp_path: Path, heldout: Heldout, arguments: list[str], said: list[str]
) -> None:
    began = time.monotonic()
    ran = heldout("launch", *arguments, "--workspace", str(tmp_path / "ws"))
    refused(ran, tmp_path / "ws", *said)
    assert time.monotonic() - began < 10  # never the seconds that Keras takes to import, even on a busy machine


def load(body: str) -> dict[str, str]:
    return {"load": f"def load():\n    rng = np.random.default_rng(0)\n    x = rng.normal(size=(200, 4))\n    {body}"}


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (load("return Dataset(x, np.zeros(199, int))"), ["200", "199"]),
        (load("x[3, 1] = np.nan; return Dataset(x, np.arange(200) % 2)"), ["NaN"]),
        (load("return Dataset(x, np.r_[np.zeros(199, int), 1])"), ["class 1"]),
        (load("return x"), ["load() must return a search.Dataset, but returned ndarray"]),
        ({"objective": 'objective = "val_auc"'}, ["'val_auc'", "it reports val_accuracy, val_loss"]),
        ({"build": PARTS["build"].replace("    model.compile", "    len")}, ["build(hp)"]),
        (
            {"build": PARTS["build"].replace("'layers', 1, 2", "'layers', 1, 2, default=5")},
            ["layers", "5"],
        ),
        ({"objective": 'objective = "val_mystery"'}, ['direction = "max"']),
    ],
    ids=["lengths", "nan", "class", "no-dataset", "objective", "not-compiled", "default", "direction"],
)
def test_a_space_that_breaks_the_contract_is_refused_in_one_line(
    tmp_path: Path, heldout: Heldout, parts: dict[str, str], said: list[str]
) -> None:
    space = write_space(tmp_path, "broken", **parts)
    refused(heldout("launch", space, *CHEAP, "--workspace", str(tmp_path / "ws")), tmp_path / "ws", *said)


@pytest.mark.study
def test_a_taken_name_points_to_resume(tmp_path: Path, heldout: Heldout) -> None:
    space, where = write_space(tmp_path), ("--workspace", str(tmp_path / "ws"), "--study", "mine")
    assert heldout("launch", space, *CHEAP, *where).returncode == 0
    again = heldout("launch", space, *CHEAP, *where)
    assert again.returncode == 2 and "heldout resume mine" in again.stderr
    done = heldout("resume", "mine", *where[:2])
    assert done.returncode == 2 and "is complete" in done.stderr


def test_an_unreachable_tracking_server_is_refused(tmp_path: Path, heldout: Heldout) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{taken.getsockname()[1]}"
    space = write_space(tmp_path)
    ran = heldout("launch", space, "--workspace", str(tmp_path / "ws"), MLFLOW_TRACKING_URI=uri)
    refused(ran, tmp_path / "ws", uri)


def test_an_unwritable_workspace_is_refused(tmp_path: Path, heldout: Heldout) -> None:
    (tmp_path / "file").write_text("")
    ran = heldout("launch", "digits_mlp", "--workspace", str(tmp_path / "file" / "ws"))
    refused(ran, tmp_path / "elsewhere", "the workspace", "cannot be created")


@pytest.mark.parametrize("command", ["report", "show", "export", "evaluate", "resume", "status"])
def test_an_unknown_study_is_refused(tmp_path: Path, heldout: Heldout, command: str) -> None:
    extra = {"show": ["3"], "export": ["--out", str(tmp_path / "out")]}.get(command, [])
    ran = heldout(command, "nowhere", *extra, "--workspace", str(tmp_path))
    assert ran.returncode == 2 and "there is no study called 'nowhere'" in ran.stderr


@pytest.mark.study
def test_a_study_whose_trials_all_fail_exits_with_1_and_says_why(tmp_path: Path, heldout: Heldout) -> None:
    rest = "def callbacks(hp):\n    raise OSError('no licence for the solver')"
    ran = heldout("launch", write_space(tmp_path, rest=rest), "--trials", "30", "--workspace", str(tmp_path / "ws"))
    assert ran.returncode == 1
    assert "10 trials in a row failed" in ran.stderr and "no licence for the solver" in ran.stderr


def test_tracebacks_come_with_debug_only(tmp_path: Path, heldout: Heldout) -> None:
    ran = heldout("--debug", "launch", "nowhere.py", "--workspace", str(tmp_path))
    assert "Traceback" in ran.stderr


def test_help_imports_nothing_slow() -> None:
    program = (
        "import sys, click.testing, search.cli;"
        "ran = click.testing.CliRunner().invoke(search.cli.main, ['launch', '--help']);"
        "assert ran.exit_code == 0 and '--split-seed' in ran.output;"
        "slow = {'numpy', 'keras', 'tensorflow', 'mlflow', 'hyperopt', 'rich', 'scipy', 'sklearn'};"
        "sys.exit(sorted(slow & set(sys.modules)).__repr__() if slow & set(sys.modules) else 0)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A workspace with a study whose one trial reported a NaN."""
    from search.record.journal import Journal
    from search.trial import Report, Trial, TrialState

    folder = tmp_path / "ws" / "studies" / "s"
    folder.mkdir(parents=True)
    with Journal.create(folder / "journal.sqlite", {"state": "COMPLETE"}) as journal:
        journal.begin(Trial(0, TrialState.RUNNING))
        journal.report([Report(0, 0, 1, 1.0, {"loss": float("nan"), "val_loss": float("inf")})])
    return tmp_path / "ws"


def test_json_output_is_json_even_where_a_trial_reported_nan(recorded: Path, heldout: Heldout) -> None:
    ran = heldout("show", "s", "0", "--json", "--workspace", str(recorded))

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    found = json.loads(ran.stdout, parse_constant=refuse)
    assert found["reports"][0]["metrics"] == {"loss": None, "val_loss": None}


def test_a_traceback_is_shown_with_debug_alone_and_the_exit_code_stays(recorded: Path, heldout: Heldout) -> None:
    (recorded / "studies" / "s" / "tracking.json").mkdir()  # what nobody foresaw
    ran = heldout("report", "s", "--workspace", str(recorded))
    assert ran.returncode == 1 and "Traceback" not in ran.stderr
    assert len(ran.stderr.splitlines()) == 1 and ran.stderr.startswith("heldout: IsADirectoryError: ")
    assert "Traceback" in heldout("--debug", "report", "s", "--workspace", str(recorded)).stderr

    unknown = heldout("--debug", "report", "other", "--workspace", str(recorded))
    assert unknown.returncode == 2 and "Traceback" in unknown.stderr


def test_export_to_where_nothing_can_be_written_is_one_clear_line(recorded: Path, heldout: Heldout) -> None:
    from search.record.journal import Journal
    from search.trial import TrialState

    with Journal.open(recorded / "studies" / "s" / "journal.sqlite") as journal:
        journal.finish(journal.history()[0].moved(TrialState.COMPLETE, score=1.0, loss=1.0))
    (recorded / "file").write_text("")
    ran = heldout("export", "s", "--out", str(recorded / "file" / "best"), "--workspace", str(recorded))
    assert ran.returncode == 2 and "--out must be in a folder that can be written" in ran.stderr
    assert "Traceback" not in ran.stderr

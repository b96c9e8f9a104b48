"""A real study through the command line: searched, read back from MLflow, exported, and scored by plain Keras."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search.study import Study
from search.tiers.data import SealedRows
from search.tracker import serving
from search.tracker.publishing import MLFLOW_ENVIRONMENT
from tests.conftest import ROOT, Heldout, run_heldout
from tests.tiny import write_space

# Loads the model where neither heldout nor the space module can be imported, and predicts.
BARE = """
import sys
import numpy as np
import keras
assert not any(name == "search" or name.startswith("search.") for name in sys.modules)
model = keras.models.load_model(sys.argv[1])
np.save(sys.argv[3], model.predict(np.load(sys.argv[2]), batch_size=int(sys.argv[4]), verbose=0))
"""


@dataclass
class Done:
    """A study that ran once for all tests of this file."""

    report: dict[str, Any]
    workspace: Path
    ledger: str
    study: Study


def launched(folder: Path, *arguments: str) -> Done:
    workspace, ledger = folder / "workspace", str(folder / "ledger.jsonl")
    ran = run_heldout(
        "launch", *arguments, "--workspace", str(workspace), "--study", "s", "--json", HELDOUT_LEDGER=ledger
    )
    assert ran.returncode == 0, ran.stderr
    return Done(json.loads(ran.stdout), workspace, ledger, Study("s", workspace))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("digits")
    options = ("--trials", "6", "--epochs", "4", "--workers", "2", "--seed", "7", "--tag", "team=blue")
    return launched(folder, "spaces/digits_mlp.py", *options)


@pytest.fixture(scope="module")
def diabetes(tmp_path_factory: pytest.TempPathFactory) -> Done:
    return launched(tmp_path_factory.mktemp("diabetes"), "diabetes", "--trials", "3", "--epochs", "5")


def predicted(done: Done, out: Path, scratch: Path) -> np.ndarray:
    """Test predictions of the exported file, made by a bare process."""
    lineage = json.loads((out / "lineage.json").read_text())
    rows = SealedRows(Path(done.study.meta("prepared")["sealed"]))
    np.save(scratch / "x.npy", rows.features("test"))
    command = [sys.executable, "-I", "-c", BARE, str(out / "model.keras"), str(scratch / "x.npy")]
    subprocess.run([*command, str(scratch / "p.npy"), str(lineage["batch_size"])], check=True, cwd=scratch)
    return np.load(scratch / "p.npy")


def test_the_report_has_its_keys_and_the_counts_are_right(digits: Done) -> None:
    report = digits.report
    wanted = "study objective direction trials baseline best test verdicts tracking seconds"
    assert set(wanted.split()) <= set(report)
    assert report["trials"] == {"complete": 6, "pruned": 0, "failed": 0}
    assert report["objective"] == "val_accuracy" and report["direction"] == "max"
    assert set(report["best"]) == {"trial", "params", "validation"} < set(report["baseline"])
    assert {"winner", "baseline", "interval", "opening"} <= set(report["test"])
    assert report["test"]["opening"] == 1
    low, high = report["test"]["interval"]
    assert low <= report["test"]["winner"] <= high
    assert report["seconds"] > 0


def test_trial_zero_is_the_baseline_and_the_best_is_the_best(digits: Done) -> None:
    trials = digits.study.trials
    assert dict(trials[0].params) == dict(digits.study.space.defaults())
    assert digits.report["best"]["validation"] == max(t.score for t in trials if t.score is not None)
    frame = digits.study.trials_dataframe()
    assert list(frame["number"]) == list(range(6)) and "params.learning_rate" in frame


def test_mlflow_has_the_study_nested_with_native_params_and_epochs(digits: Done) -> None:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{digits.workspace}/mlflow.db")
    tracking = digits.report["tracking"]
    runs = client.search_runs([tracking["experiment_id"]])
    parent = client.get_run(tracking["run_id"])
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == tracking["run_id"]]
    assert len(children) == 6 and len(runs) == 7
    assert parent.info.status == "FINISHED" and {run.info.status for run in children} == {"FINISHED"}
    assert {run.data.params["trial"] for run in children} == {str(n) for n in range(6)}
    assert {run.data.tags["team"] for run in runs} == {"blue"}
    for run in children:
        trial = digits.study.trials[int(run.data.params["trial"])]
        assert run.data.params["learning_rate"] == str(trial.params["learning_rate"])
        steps = client.get_metric_history(run.info.run_id, "val_accuracy")
        assert [metric.step for metric in steps] == list(range(1, trial.epochs + 1))
    assert [a.path for a in client.list_artifacts(tracking["run_id"], "space")] == ["space/digits_mlp.py"]


@pytest.mark.study
def test_the_exported_model_gets_the_reported_test_accuracy_in_a_bare_process(
    digits: Done, tmp_path: Path, heldout: Heldout
) -> None:
    out = tmp_path / "best"
    ran = heldout("export", "s", "--workspace", str(digits.workspace), "--out", str(out))
    assert ran.returncode == 0, ran.stderr
    labels = SealedRows(Path(digits.study.meta("prepared")["sealed"])).labels("test")
    accuracy = float((predicted(digits, out, tmp_path).argmax(axis=1) == labels).mean())
    assert accuracy == digits.report["test"]["winner"]
    lineage = json.loads((out / "lineage.json").read_text())
    assert lineage["scores"]["test"]["score"] == accuracy
    assert lineage["scores"]["validation"]["score"] == pytest.approx(digits.report["best"]["validation"], abs=1e-6)
    assert lineage["params"] == digits.report["best"]["params"]
    card = (out / "MODEL_CARD.md").read_text()
    assert "Believe the test score" in card and f"batch_size={lineage['batch_size']}" in card
    assert "by 6 complete trials; sampler `gp`" in card and "| `learning_rate` | float " in card
    assert "- NO_G" in card and "goes in: float32, 64 a row" in card
    assert lineage["checked"]["model.keras"] == {"rows": 32, "largest_difference": 0.0}
    assert (out / lineage["architecture"]).stat().st_size > 0 and lineage["flops"] > 0
    assert "model.keras predicts 32 rows as the model does, to 0 (0.0001 is allowed)" in ran.stdout


def test_the_architecture_and_the_size_of_models_are_in_mlflow(digits: Done) -> None:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{digits.workspace}/mlflow.db")
    tracking = digits.report["tracking"]
    drawn = Path(digits.report["architecture"])
    assert drawn.parent == digits.study.folder and drawn.exists()
    assert [a.path for a in client.list_artifacts(tracking["run_id"], "model")] == [f"model/{drawn.name}"]
    for run in client.search_runs([tracking["experiment_id"]], "params.trial != ''"):
        trial = digits.study.trials[int(run.data.params["trial"])]
        found = run.data.metrics
        assert (found["weights"], found["flops"]) == (trial.size, trial.extra["flops"]) and found["flops"] > 0


@pytest.mark.study
def test_a_regression_with_preprocessing_exports_to_the_reported_loss(
    diabetes: Done, tmp_path: Path, heldout: Heldout
) -> None:
    out = tmp_path / "best"
    ran = heldout("export", "s", "--workspace", str(diabetes.workspace), "--out", str(out))
    assert ran.returncode == 0, ran.stderr
    labels = SealedRows(Path(diabetes.study.meta("prepared")["sealed"])).labels("test")
    mse = float(((predicted(diabetes, out, tmp_path).reshape(-1) - labels) ** 2).mean())
    assert mse == pytest.approx(diabetes.report["test"]["winner"], rel=1e-6)


@pytest.mark.study
def test_another_trial_exports_without_a_test_score(digits: Done, tmp_path: Path) -> None:
    tested = {digits.report["best"]["trial"], 0}
    number = next(t.number for t in digits.study.trials if t.number not in tested)
    lineage = digits.study.export(tmp_path / "other", trial=number, format="saved_model")
    assert "test" not in lineage["scores"] and lineage["trial"] == number
    assert (tmp_path / "other" / "saved_model" / "saved_model.pb").exists()
    assert "not tested" in (tmp_path / "other" / "MODEL_CARD.md").read_text()


def test_export_refuses_a_folder_with_files_in_it(digits: Done, tmp_path: Path, heldout: Heldout) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    ran = heldout("export", "s", "--workspace", str(digits.workspace), "--out", str(tmp_path))
    assert ran.returncode == 2 and "must be a new or empty folder" in ran.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.study
def test_the_registered_champion_loads_by_its_alias(digits: Done, tmp_path: Path, heldout: Heldout) -> None:
    out = tmp_path / "best"
    arguments = ("export", "s", "--workspace", str(digits.workspace), "--out", str(out), "--register", "digits")
    ran = heldout(*arguments)
    assert ran.returncode == 0, ran.stderr
    assert "models:/digits@champion" in ran.stdout
    load = (
        "import sys, mlflow, numpy as np; mlflow.set_tracking_uri(sys.argv[1]);"
        "model = mlflow.pyfunc.load_model('models:/digits@champion');"
        "print(np.asarray(model.predict(np.zeros((2, 64), 'float32'))).shape)"
    )
    uri = f"sqlite:///{digits.workspace}/mlflow.db"
    seen = subprocess.run([sys.executable, "-c", load, uri], capture_output=True, text=True, cwd=tmp_path)
    assert seen.stdout.strip().endswith("(2, 10)"), seen.stderr
    assert list((digits.workspace / "artifacts").rglob("MLmodel")) and not list(tmp_path.rglob("mlruns"))
    assert not (ROOT / "mlruns").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_registered_model_answers_the_same_over_http(
    digits: Done, tmp_path: Path, heldout: Heldout, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.tracked import free_port  # and with it MLflow

    monkeypatch.setattr(serving, "_READY_SECONDS", 500.0)  # it imports TensorFlow, on a busy machine

    out = tmp_path / "best"
    ran = heldout("export", "s", "--workspace", str(digits.workspace), "--out", str(out), "--register", "served")
    assert ran.returncode == 0, ran.stderr
    expected = predicted(digits, out, tmp_path)
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", "models:/served@champion"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    uri = f"sqlite:///{digits.workspace}/mlflow.db"
    environment = {**os.environ, **MLFLOW_ENVIRONMENT, "MLFLOW_TRACKING_URI": uri}
    url = f"http://127.0.0.1:{port}"
    with serving.start(command, environment, "the model's server", health=f"{url}/ping", url=url):
        body = json.dumps({"inputs": np.load(tmp_path / "x.npy").tolist()}).encode()
        request = urllib.request.Request(f"{url}/invocations", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            got = np.array(json.load(answer)["predictions"])
    assert got.shape == expected.shape and np.abs(got - expected).max() < 1e-5  # in batches of another size


@pytest.mark.study
def test_rows_opened_before_stay_sealed_and_evaluate_counts(digits: Done, heldout: Heldout) -> None:
    where = ("--workspace", str(digits.workspace))
    options = ("--trials", "2", "--epochs", "1", "--seed", "8", "--study", "again")
    ran = heldout("launch", "digits_mlp", *options, *where, "--json", HELDOUT_LEDGER=digits.ledger)
    report = json.loads(ran.stdout)
    assert ran.returncode == 0 and report["test"] is None
    assert "have been opened once before" in report["sealed"] and "heldout evaluate again" in report["sealed"]

    opened = heldout("evaluate", "again", *where, "--json", HELDOUT_LEDGER=digits.ledger)
    assert opened.returncode == 0, opened.stderr
    second = json.loads(opened.stdout)
    assert second["test"]["opening"] == 2 and "REUSED_TEST_SET" in second["verdicts"]

    replayed = heldout("evaluate", "again", *where, "--json", HELDOUT_LEDGER=digits.ledger)
    assert json.loads(replayed.stdout)["test"] == second["test"]


@pytest.mark.study
def test_show_prints_what_a_trial_printed_and_its_epochs(tmp_path: Path, heldout: Heldout) -> None:
    rest = "def callbacks(hp):\n    print('hello from the trial')\n    return []"
    space = write_space(tmp_path, "printing", rest=rest)
    where = ("--workspace", str(tmp_path / "ws"))
    assert heldout("launch", space, "--trials", "2", "--evaluate", "no", *where, "--study", "p").returncode == 0
    shown = heldout("show", "p", "1", *where)
    assert "hello from the trial" in shown.stdout and "epoch 2: " in shown.stdout
    status = heldout("status", *where)
    assert status.returncode == 0 and "p: complete, 2 of 2 trials" in status.stdout


@pytest.mark.study
def test_one_slot_and_one_seed_give_the_same_trials_and_scores(tmp_path: Path, heldout: Heldout) -> None:
    space = write_space(tmp_path)
    seen = []
    for name in ("one", "two"):
        where = ("--workspace", str(tmp_path / "ws"), "--study", name)
        ran = heldout("launch", space, "--trials", "5", "--workers", "1", "--seed", "0", "--evaluate", "no", *where)
        assert ran.returncode == 0, ran.stderr
        seen.append([(dict(t.params), t.score) for t in Study(name, tmp_path / "ws").trials])
    assert seen[0] == seen[1]
    assert len({str(params) for params, _ in seen[0]}) == 5


@pytest.mark.study
def test_another_seed_moves_no_row_and_shares_the_stored_copy(tmp_path: Path, heldout: Heldout) -> None:
    space = write_space(tmp_path)
    where = ("--workspace", str(tmp_path / "ws"), "--trials", "1", "--evaluate", "no")
    for seed in ("1", "2"):
        assert heldout("launch", space, "--seed", seed, *where).returncode == 0
    first, second = (Study(f"tiny-{n}", tmp_path / "ws").meta("prepared") for n in (1, 2))
    assert first["rows"] == second["rows"]
    assert len(list((tmp_path / "ws" / "rows").iterdir())) == 1


@pytest.mark.study
def test_a_custom_metric_is_scored_by_its_keras_object_in_its_own_process(tmp_path: Path, heldout: Heldout) -> None:
    build = (
        "def agreement(y_true, y_pred):\n"
        "    hit = keras.ops.equal(keras.ops.cast(y_true, 'int32'), keras.ops.argmax(y_pred, axis=-1))\n"
        "    return keras.ops.cast(hit, 'float32')\n\n\n"
        "def build(hp):\n"
        "    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(hp.Int('units', 2, 9)),\n"
        "                              keras.layers.Dense(2, activation='softmax')])\n"
        "    model.compile('adam', 'sparse_categorical_crossentropy', metrics=[agreement])\n"
        "    return model"
    )
    objective = 'objective = "val_agreement"\ndirection = "max"\nepochs = 2'
    space = write_space(tmp_path, "agreeing", build=build, objective=objective)
    ran = heldout("launch", space, "--trials", "3", "--workspace", str(tmp_path / "ws"), "--json")
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert report["trials"]["complete"] == 3
    assert 0 <= report["test"]["winner"] <= 1 and report["test"]["interval"] is None


@pytest.mark.study
def test_try_runs_one_trial_and_leaves_nothing(tmp_path: Path, heldout: Heldout) -> None:
    space = write_space(tmp_path)
    workspace = tmp_path / "ws"
    ran = heldout("try", space, "--params", '{"rate": 0.02, "layers": 2}', "--json", HELDOUT_WORKSPACE=str(workspace))
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["params"]["rate"] == 0.02 and found["params"]["layers"] == 2 and "units_1" in found["params"]
    assert not workspace.exists()
    wrong = heldout("try", space, "--params", '{"rate": 7}')
    assert wrong.returncode == 2 and "rate must be" in wrong.stderr


@pytest.mark.study
def test_check_says_what_would_be_searched_and_starts_nothing(tmp_path: Path, heldout: Heldout) -> None:
    space = write_space(tmp_path)
    ran = heldout("check", space, "--trials", "10", "--workspace", str(tmp_path / "ws"))
    assert ran.returncode == 0, ran.stderr
    assert "units_1: int 2..16" in ran.stdout and "layers: int 1..2" in ran.stdout
    assert "guard" in ran.stdout and "10 trials" in ran.stdout
    assert list((tmp_path / "ws" / "studies").iterdir()) == []


PRYING = """
import json, os, sys


def seen_here():
    fds = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    descriptors = [os.readlink(fd) for fd in fds if os.path.exists(fd)]
    mapped = open("/proc/self/maps").read()
    return json.dumps([sys.argv, dict(os.environ), descriptors, mapped])


class Prying(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        print("SEEN", seen_here())


def callbacks(hp):
    return [Prying()]
"""


@pytest.mark.study
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc, which Linux has")
def test_nothing_a_trial_is_handed_leads_to_a_sealed_label(tmp_path: Path, heldout: Heldout) -> None:
    space = write_space(tmp_path, "prying", rest=PRYING)
    where = ("--workspace", str(tmp_path / "ws"), "--study", "pry")
    assert heldout("launch", space, "--trials", "2", "--evaluate", "no", *where).returncode == 0
    study = Study("pry", tmp_path / "ws")
    sealed = study.meta("prepared")["sealed"]
    assert list(Path(sealed).glob("guard_y_*.npy")) and list(Path(sealed).glob("test_y_*.npy"))
    for number in (0, 1):
        log = (study.folder / "trials" / f"{number:04d}" / "log.txt").read_text()
        assert "SEEN" in log and str(tmp_path / "ws" / "rows") in log
        assert str(tmp_path / "ws" / "sealed") not in log and Path(sealed).parent.name + "/" not in log


@pytest.mark.slow
def test_spawned_trials_score_as_forked_ones(tmp_path: Path, heldout: Heldout) -> None:
    space = write_space(tmp_path)
    seen = []
    for method in ("fork", "spawn"):
        where = ("--workspace", str(tmp_path / "ws"), "--study", method, "--start-method", method)
        ran = heldout("launch", space, "--trials", "2", "--workers", "1", "--evaluate", "no", *where)
        assert ran.returncode == 0, ran.stderr
        seen.append([(dict(t.params), t.score) for t in Study(method, tmp_path / "ws").trials])
    assert seen[0] == seen[1]


@pytest.mark.study
def test_a_parameter_that_only_fit_asks_for_is_searched_tested_and_exported(tmp_path: Path, heldout: Heldout) -> None:
    # A HyperModel as KerasTuner's guides write it: the batch size in fit, no Input, labels of shape (rows, 1).
    build = (
        "import keras_tuner\n\n\nclass Hyper(keras_tuner.HyperModel):\n"
        "    def build(self, hp):\n"
        "        model = keras.Sequential([keras.layers.Dense(4), keras.layers.Dense(1)])\n"
        "        model.compile('adam', 'mse')\n"
        "        return model\n\n"
        "    def fit(self, hp, model, *args, **kwargs):\n"
        "        return model.fit(*args, batch_size=hp.Choice('batch_size', [8, 16, 32]), **kwargs)\n\n\n"
        "hypermodel = Hyper()"
    )
    load = (
        "def load():\n    x = np.random.default_rng(0).normal(size=(200, 4)).astype('float32')\n"
        "    return Dataset(x, x[:, :1] * 2)"
    )
    space = write_space(tmp_path, "hyper", build=build, load=load, objective='objective = "val_loss"\nepochs = 2')
    where = ("--workspace", str(tmp_path / "ws"))
    ran = heldout("launch", space, "--trials", "9", "--workers", "2", "--study", "h", "--json", *where)
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert report["trials"]["complete"] == 3 and report["ended"] == "exhausted"
    assert {t.params["batch_size"] for t in Study("h", tmp_path / "ws").trials} == {8, 16, 32}
    assert report["test"]["winner"] > 0, report["sealed"]
    out = heldout("export", "h", "--out", str(tmp_path / "best"), "--json", *where)
    assert out.returncode == 0, out.stderr
    assert json.loads(out.stdout)["scores"]["test"]["score"] == report["test"]["winner"]


@pytest.mark.study
def test_try_runs_a_space_with_preprocessing(heldout: Heldout) -> None:
    ran = heldout("try", "breast_cancer", "--epochs", "1", "--json")
    assert ran.returncode == 0, ran.stderr
    assert 0 < json.loads(ran.stdout)["score"] <= 1


@pytest.mark.slow
def test_a_study_whose_driver_was_killed_goes_on_to_what_it_would_have_been(tmp_path: Path, heldout: Heldout) -> None:
    space = write_space(tmp_path)
    where = ("--workspace", str(tmp_path / "ws"))
    plan = ("launch", space, "--trials", "6", "--workers", "1", "--evaluate", "no", *where)
    assert heldout(*plan, "--study", "whole").returncode == 0
    command = [sys.executable, "-m", "search.cli", *plan, "--study", "cut"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT) as driver:
        assert driver.stderr is not None
        assert any(line.startswith("trial 2 ") for line in driver.stderr)
        driver.kill()
    assert Study("cut", tmp_path / "ws").state == "STOPPED"

    resumed = heldout("resume", "cut", *where, "--json")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["state"] == "COMPLETE"
    whole, cut = ([(dict(t.params), t.score) for t in Study(n, tmp_path / "ws").trials] for n in ("whole", "cut"))
    assert cut == whole

"""The guard, through the command line: confirmation, the corrected estimate, the freeze, the verdicts, the ledger."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search.cli import _trainings
from search.guard.ledger import Ledger
from search.study import Study, StudyConfig
from search.trial import Trial, searched
from tests.conftest import Heldout, run_heldout
from tests.test_end_to_end import Done, launched
from tests.test_page import checked
from tests.tiny import write_space

LOAD = """
def load():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1500, 6)).astype("float32")
    return Dataset(x, (x[:, 0] + x[:, 1] * x[:, 2] + rng.normal(size=1500) > 0).astype("int64"))
"""
BUILD = """
def build(hp):
    model = keras.Sequential([keras.Input((6,))])
    model.add(keras.layers.Dense(hp.Int("units", 2, 64, sampling="log", default=4), activation="relu"))
    model.add(keras.layers.Dense(1, activation="sigmoid"))
    rate = hp.Float("rate", 1e-3, 1e-1, sampling="log", default=3e-3)
    model.compile(keras.optimizers.Adam(rate), "binary_crossentropy", metrics=["accuracy"])
    return model
"""
pytestmark = pytest.mark.study

PLAN = ("--trials", "5", "--confirm", "2", "--confirm-seeds", "2", "--seed", "3")


def mlflow_runs(done: Done) -> tuple[Any, list[Any], Any]:
    """MLflow's client, the trials' runs and the study's."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{done.workspace}/mlflow.db")
    tracking = done.report["tracking"]
    found = client.search_runs([tracking["experiment_id"]])
    return (
        client,
        [run for run in found if "mlflow.parentRunId" in run.data.tags],
        client.get_run(tracking["run_id"]),
    )


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("space")
    return Path(write_space(folder, "noisy", load=LOAD, build=BUILD))


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory, space: Path) -> Done:
    return launched(tmp_path_factory.mktemp("noisy"), str(space), *PLAN, "--workers", "2")


def test_finalists_and_the_baseline_are_trained_again_and_the_best_of_all_models_is_shipped(noisy: Done) -> None:
    trials, report = noisy.study.trials, noisy.report
    again = [t for t in trials if t.confirms is not None]
    leaders = sorted(searched(trials), key=lambda t: (t.loss, t.size, t.number))[:2]
    assert {t.confirms for t in again} == {0, *(t.number for t in leaders)} and len(searched(trials)) == 5
    assert len({t.seed for t in trials}) == len(trials)
    winner = trials[report["winner"]["trial"]]
    configuration = report["winner"]["configuration"]
    assert configuration == (winner.number if winner.confirms is None else winner.confirms)
    assert dict(winner.params) == dict(trials[configuration].params) == report["winner"]["params"]
    confirmation = report["confirmation"]
    assert confirmation["seeds"] == 2 and 0 < confirmation["share"] < 1
    assert 0 < sum(one["wins"] for one in confirmation["finalists"]) <= 1 + 1e-9
    tiers = noisy.study.meta("study")["data"]["tiers"]
    with noisy.study.journal() as journal:
        guards = {number: score for (number, _), (score, _) in journal.guards().items()}

    def pooled(trial: Trial) -> float:
        hits = tiers["validation"] * (trial.score or 0) + tiers["guard"] * guards[trial.number]
        return hits / (tiers["validation"] + tiers["guard"])

    assert pooled(winner) == pytest.approx(max(pooled(t) for t in trials))
    for one in confirmation["finalists"]:
        runs = [pooled(t) for t in again if t.confirms == one["configuration"]]
        assert one["score"] == pytest.approx(np.mean(runs), abs=1e-6)


def test_the_report_tells_the_three_numbers_and_what_to_believe(noisy: Done) -> None:
    report = noisy.report
    assert report["best"]["validation"] == max(t.score for t in searched(noisy.study.trials) if t.score is not None)
    low, high = report["corrected"]["interval"]
    assert low < report["corrected"]["estimate"] < high and report["corrected"]["scope"] == "this study"
    assert report["noise_floor"] > 0
    assert report["test"]["alpha"] == pytest.approx(0.030396, abs=1e-6) and report["test"]["opening"] == 1
    assert report["test"]["level"] == 1 - report["test"]["alpha"]
    assert report["test"]["gap"]["smallest"] > 0
    assert {"configuration", "shipped"} == set(report["gains"])
    assert f"{report['test']['winner'] * 100:.1f} %" in report["believe"]
    assert "97 % interval" in report["believe"]


def test_guard_evidence_is_closed_to_others_and_in_no_trials_folder(noisy: Done) -> None:
    place = noisy.study.folder / "guard"
    assert place.stat().st_mode & 0o777 == 0o700
    files = sorted(place.iterdir())
    assert len(files) == len(noisy.study.trials) and {f.stat().st_mode & 0o777 for f in files} == {0o600}
    assert not list((noisy.study.folder / "trials").rglob("*loss*"))


def test_mlflow_has_the_confirmations_the_conclusion_and_the_picture(noisy: Done, tmp_path: Path) -> None:
    client, children, parent = mlflow_runs(noisy)
    marked = {int(r.data.params["trial"]): r.data.tags.get("heldout.confirms") for r in children}
    assert marked == {t.number: None if t.confirms is None else str(t.confirms) for t in noisy.study.trials}
    report = noisy.report
    metrics = parent.data.metrics
    assert metrics["corrected.estimate"] == report["corrected"]["estimate"]
    assert metrics["corrected.interval_low"] == report["corrected"]["interval"][0]
    assert metrics["noise_floor"] == report["noise_floor"]
    assert metrics["test.alpha"] == report["test"]["alpha"] and metrics["test.opening"] == 1
    assert metrics["winner.guard"] == report["winner"]["guard"]
    assert parent.data.tags["heldout.verdicts"] == ", ".join(report["verdicts"])
    assert parent.data.tags["heldout.winner"] == str(report["winner"]["trial"])
    assert report["believe"] in parent.data.tags["mlflow.note.content"]
    assert len(client.get_metric_history(parent.info.run_id, "best_so_far")) == 5
    picture = Path(client.download_artifacts(parent.info.run_id, "report/guard.png", str(tmp_path)))
    assert picture.read_bytes() == Path(report["picture"]).read_bytes()
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page = Path(client.download_artifacts(parent.info.run_id, "report/report.html", str(tmp_path)))
    assert page.read_bytes() == (noisy.study.folder / "report.html").read_bytes()
    read = checked(page.read_text(encoding="utf-8"))
    assert report["believe"] in read.text and "Search of noisy for accuracy" in read.text
    assert set(report["verdicts"]) <= set(read.text.split()) and "How slots were used" in read.text


def test_the_terminal_shows_the_conclusion_last(noisy: Done, heldout: Heldout) -> None:
    shown = heldout("report", "s", "--workspace", str(noisy.workspace)).stdout
    words = " ".join(shown.split())
    assert " ".join(noisy.report["believe"].split()) in words
    assert all(f"verdict: {name} (" in shown for name in noisy.report["verdicts"])
    assert "guard, corrected (95 % interval)" in shown and "test, 300 rows (97 % interval)" in shown
    assert "confirmed by" in shown and "of all training time" in shown
    shown = heldout("status", "s", "--workspace", str(noisy.workspace)).stdout
    again = sum(t.confirms is not None for t in noisy.study.trials)
    assert f"5 of 5 trials, sampler gp, {again} confirming trainings" in shown


def test_the_ledger_lists_the_opening_and_the_use_of_guard_rows(noisy: Done, heldout: Heldout) -> None:
    entries = Ledger(Path(noisy.ledger)).entries()
    assert [e["kind"] for e in entries] == ["guard", "opening", "result"]
    assert entries[0]["trials"] == len(noisy.study.trials) and entries[1]["alpha"] == noisy.report["test"]["alpha"]
    frozen = noisy.study.meta("frozen")
    assert entries[1]["frozen"] == frozen["digest"] and len(frozen["selection"]) == 64
    ran = heldout("ledger", HELDOUT_LEDGER=noisy.ledger)
    assert ran.returncode == 0 and "chain unbroken" in ran.stdout


def test_the_export_is_the_winner(noisy: Done, heldout: Heldout, tmp_path: Path) -> None:
    ran = heldout("export", "s", "--out", str(tmp_path / "m"), "--workspace", str(noisy.workspace), "--json")
    lineage = json.loads(ran.stdout)
    assert lineage["trial"] == noisy.report["winner"]["trial"]
    assert lineage["scores"]["test"]["score"] == noisy.report["test"]["winner"]
    guard = lineage["scores"]["guard"]
    assert guard["score"] == pytest.approx(noisy.report["winner"]["guard"], abs=1e-6)
    assert guard["corrected"]["estimate"] == noisy.report["corrected"]["estimate"]
    assert "corrected for that it is" in (tmp_path / "m" / "MODEL_CARD.md").read_text()


def test_guard_rows_speak_for_no_other_model(noisy: Done, heldout: Heldout, tmp_path: Path) -> None:
    chosen = {noisy.report["winner"]["trial"], noisy.report["baseline"]["trial"]}
    other = next(t.number for t in noisy.study.trials if t.number not in chosen)
    options = ("--trial", str(other), "--workspace", str(noisy.workspace), "--json")
    lineage = json.loads(heldout("export", "s", "--out", str(tmp_path / "m"), *options).stdout)
    card = (tmp_path / "m" / "MODEL_CARD.md").read_text()
    assert set(lineage["scores"]) == {"validation"}
    # The card names every tier's number of rows; what it must not do is to score this model on guard rows.
    scored = [line for line in card.splitlines() if line.startswith("| validation ")]
    assert scored and not any(line.startswith("| guard ") for line in card.splitlines())
    assert "guard score" not in card and "corrected" not in card


def sequence(trials: tuple[Trial, ...]) -> list[Any]:
    return [(t.number, t.confirms, dict(t.params), t.seed, t.score, t.epochs, t.best_epoch) for t in trials]


def test_other_guard_labels_leave_the_sequence_of_trials_as_it_is(tmp_path: Path, space: Path) -> None:
    found = []
    for name in ("as they are", "permuted"):
        workspace, ledger = tmp_path / "workspace", str(tmp_path / "ledger.jsonl")
        options = (*PLAN, "--workers", "1", "--evaluate", "no", "--json", "--study", name[:2], "--sampler", "tpe")
        ran = run_heldout("launch", str(space), *options, "--workspace", str(workspace), HELDOUT_LEDGER=ledger)
        assert ran.returncode == 0, ran.stderr
        study = Study(name[:2], workspace)
        with study.journal() as journal:
            guards = [score for score, _ in journal.guards().values()]
        found.append((sequence(study.trials), guards, json.loads(ran.stdout)))
        sealed = Path(study.meta("prepared")["sealed"]) / "guard_y_0.npy"
        np.save(sealed, np.random.default_rng(1).permutation(np.load(sealed)))
    (first, guards, report), (second, others, again) = found
    assert first == second and guards != others
    assert report["corrected"]["scope"] == "this study"
    count = len(first)
    assert again["corrected"]["scope"].startswith(f"this study only: another study with {count} trials")
    assert report["test"] is None and "still sealed" not in str(report["sealed"]) and report["picture"] is None


def test_a_second_opening_has_a_wider_interval_and_says_so(noisy: Done, space: Path, tmp_path: Path) -> None:
    ledger = str(tmp_path / "ledger.jsonl")
    shutil.copy(noisy.ledger, ledger)
    shutil.copytree(f"{noisy.ledger}.rows", f"{ledger}.rows")
    options = ("--trials", "2", "--confirm", "0", "--evaluate", "yes", "--json", "--study", "second")
    ran = run_heldout(
        "launch", str(space), *options, "--workspace", str(tmp_path / "another"), HELDOUT_LEDGER=ledger
    )
    report = json.loads(ran.stdout)
    assert report["test"]["opening"] == 2 and report["test"]["alpha"] == pytest.approx(0.007599, abs=1e-6)
    assert "REUSED_TEST_SET" in report["verdicts"] and "used 2 times" in report["believe"]
    assert report["corrected"]["scope"].startswith("this study only: another study with ")
    assert report["noise_floor"] is None and report["confirmation"] is None
    entries = Ledger(Path(ledger)).entries()
    again = run_heldout("evaluate", "second", "--workspace", str(tmp_path / "another"), "--json", HELDOUT_LEDGER=ledger)
    repeated = json.loads(again.stdout)
    assert {k: v for k, v in repeated.items() if k != "tracking"} == {k: report[k] for k in report if k != "tracking"}
    assert Ledger(Path(ledger)).entries() == entries and sum(e["kind"] == "opening" for e in entries) == 2


@pytest.mark.slow
def test_refitted_models_are_tested_and_the_estimate_is_not_held_against_them(space: Path, tmp_path: Path) -> None:
    done = launched(tmp_path, str(space), "--trials", "3", "--evaluate", "no")
    assert done.report["test"] is None and done.report["corrected"] is not None
    ran = run_heldout(
        *("evaluate", "s", "--final", "retrain", "--json", "--workspace", str(done.workspace)),
        HELDOUT_LEDGER=done.ledger,
    )
    report = json.loads(ran.stdout)
    assert report["final"] == "retrain" and report["test"]["gap"] is None
    assert not {"NO_GAP_SHOWN", "UNEXPLAINED_GAP"} & set(report["verdicts"])
    frozen = done.study.meta("frozen")["models"]["winner"]
    assert frozen["rows"] == sum(done.study.meta("study")["data"]["tiers"][t] for t in ("train", "validation", "guard"))
    # Asking again means the same models: nothing is trained or opened a second time.
    again = run_heldout("evaluate", "s", "--json", "--workspace", str(done.workspace), HELDOUT_LEDGER=done.ledger)
    assert json.loads(again.stdout)["test"] == report["test"]
    assert [e["kind"] for e in Ledger(Path(done.ledger)).entries()] == ["guard", "opening", "result"]


def test_what_is_wrong_elsewhere_in_the_workspace_takes_no_answer_back(space: Path, tmp_path: Path) -> None:
    other = tmp_path / "workspace" / "studies" / "other"
    other.mkdir(parents=True)
    (other / "journal.sqlite").write_bytes(b"no journal" * 100)
    ledger = str(tmp_path / "ledger.jsonl")
    options = ("--trials", "2", "--study", "s", "--workspace", str(tmp_path / "workspace"))
    run_heldout("launch", str(space), *options, HELDOUT_LEDGER=ledger)
    study = Study.at(tmp_path / "workspace" / "studies" / "s")
    assert study.state == "COMPLETE" and study.meta("evaluation")["opened"] and study.meta("summary")["believe"]


def test_a_broken_ledger_is_told_before_anything_is_trained(noisy: Done, space: Path, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_text(Path(noisy.ledger).read_text().replace('"alpha"', '"Alpha"', 1))
    options = ("--trials", "2", "--study", "s", "--workspace", str(tmp_path / "workspace"))
    ran = run_heldout("launch", str(space), *options, HELDOUT_LEDGER=str(ledger))
    assert ran.returncode == 2 and "must be an unbroken chain" in ran.stderr and "trial 0" not in ran.stderr
    assert not (tmp_path / "workspace" / "studies" / "s").exists()


def test_rows_are_not_opened_for_a_tracking_server_that_is_away(space: Path, tmp_path: Path) -> None:
    done = launched(tmp_path, str(space), "--trials", "2", "--evaluate", "no")
    (done.workspace / "mlflow.db").rename(tmp_path / "elsewhere")
    (done.workspace / "mlflow.db").mkdir()
    options = ("--workspace", str(done.workspace))
    ran = run_heldout("evaluate", "s", *options, HELDOUT_LEDGER=done.ledger)
    assert ran.returncode == 2 and [e["kind"] for e in Ledger(Path(done.ledger)).entries()] == ["guard"]


ONE = """
def build(hp):
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1, activation="sigmoid")])
    model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    return model
"""


def test_a_winner_that_is_the_baseline_is_one_model_and_no_gain(tmp_path: Path) -> None:
    done = launched(tmp_path, write_space(tmp_path, "one", load=LOAD, build=ONE), "--trials", "3")
    report = done.report
    assert report["ended"] == "exhausted" and report["winner"]["trial"] == report["baseline"]["trial"] == 0
    assert report["test"]["gain"] is None and report["test"]["beats_baseline"] is False
    assert "NO_GAIN_SHOWN" in report["verdicts"]
    assert len({m["path"] for m in done.study.meta("frozen")["models"].values()}) == 1


NAN = """
def fit(hp, model, *args, **kwargs):
    model.set_weights([weights * float("nan") for weights in model.get_weights()])
"""


def test_where_no_trial_completes_nothing_is_opened(tmp_path: Path) -> None:
    space = write_space(tmp_path, "nan", load=LOAD, build=ONE, rest=NAN)
    ledger = str(tmp_path / "ledger.jsonl")
    options = ("--trials", "2", "--study", "s", "--workspace", str(tmp_path / "workspace"))
    ran = run_heldout("launch", space, *options, HELDOUT_LEDGER=ledger)
    assert ran.returncode == 1 and "no trial" in ran.stderr
    assert Ledger(Path(ledger)).entries() == ()


def test_check_counts_the_confirmation_and_says_what_the_rows_could_show(space: Path, tmp_path: Path) -> None:
    options = ("--trials", "30", "--workspace", str(tmp_path / "workspace"))
    found = json.loads(run_heldout("check", str(space), *options, "--json").stdout)
    assert found["confirmation"] == {"finalists": 3, "seeds": 3, "runs": 12} and found["openings"] == 0
    assert found["estimate_seconds"] >= 42 * (found["epochs"] - 2) * found["epoch_seconds"] / found["slots"]
    assert 0 < found["shows"]["gain"] < found["shows"]["gap"] < 0.2
    said = run_heldout("check", str(space), *options, "--confirm", "0").stdout
    assert "plan: 30 trials of up to" in said and "would show in 4 of 5 cases" in said


def test_the_time_left_counts_the_confirmation() -> None:
    assert _trainings(StudyConfig("s", trials=30)) == 42 and _trainings(StudyConfig("s", trials=30, confirm=0)) == 30
    assert _trainings(StudyConfig("s", trials=30, confirm=5, confirm_seeds=2)) == 42


KINDS = {  # name to what differs: objective, labels, the last layer, loss, metrics, columns of the Dataset, other lines
    "auc": (
        "val_auc",
        "yes",
        "1, activation='sigmoid'",
        "'binary_crossentropy'",
        "keras.metrics.AUC(name='auc')",
        "",
        "",
    ),
    "average precision": (
        "val_pr",
        "yes",
        "1, activation='sigmoid'",
        "'binary_crossentropy'",
        "keras.metrics.AUC(curve='PR', name='pr')",
        "",
        "direction = 'max'",
    ),
    "f1": (
        "val_f1_score",
        "yes.astype('float32')[:, None]",
        "1, activation='sigmoid'",
        "'binary_crossentropy'",
        "keras.metrics.F1Score(threshold=0.5)",
        "",
        "",
    ),
    "precision": (
        "val_precision",
        "yes",
        "1, activation='sigmoid'",
        "'binary_crossentropy'",
        "keras.metrics.Precision(name='precision')",
        "",
        "",
    ),
    "r2": ("val_r2_score", "signal", "1", "'mse'", "keras.metrics.R2Score()", "", ""),
    "rmse": ("val_rmse", "signal", "1", "'mse'", "keras.metrics.RootMeanSquaredError(name='rmse')", "", ""),
    "loss": ("val_loss", "yes", "1", "keras.losses.BinaryCrossentropy(from_logits=True)", "'accuracy'", "", ""),
    "groups": ("val_accuracy", "yes", "2", "SPARSE", "'accuracy'", ", groups=np.arange(900) // 3", ""),
    "time": ("val_accuracy", "yes", "2", "SPARSE", "'accuracy'", ", time=np.arange(900)", ""),
    "own": (
        "val_own",
        "signal",
        "1",
        "'mse'",
        "own",
        "",
        "direction = 'max'\n\ndef own(y, p):\n"
        "    return keras.ops.mean(keras.ops.cast(keras.ops.abs(y - p) < 1, 'float32'))",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_metric_and_of_rows_ends_in_a_report(name: str, tmp_path: Path) -> None:
    objective, labels, last, loss, metric, columns, lines = KINDS[name]
    loss = loss.replace("SPARSE", "keras.losses.SparseCategoricalCrossentropy(from_logits=True)")
    head = f"objective = {objective!r}\nepochs = 2\n{lines}"
    load = (
        "def load():\n    rng = np.random.default_rng(0)\n    x = rng.normal(size=(900, 6)).astype('float32')\n"
        "    signal = (x[:, 0] + x[:, 1] * x[:, 2] + rng.normal(size=900)).astype('float32')\n"
        f"    yes = (signal > 0).astype('int64')\n    return Dataset(x, {labels}{columns})"
    )
    build = BUILD.replace('1, activation="sigmoid"', last).replace('"binary_crossentropy"', loss)
    space = write_space(tmp_path, objective=head, load=load, build=build.replace('["accuracy"]', f"[{metric}]"))
    report = launched(tmp_path, space, "--trials", "3", "--confirm", "1", "--confirm-seeds", "2").report
    corrected, winner, test = report["corrected"], report["winner"], report["test"]
    assert test["opening"] == 1 and report["noise_floor"] >= 0 and Path(report["picture"]).exists()
    if name == "own":
        assert corrected["interval"] is None and "not corrected" in corrected["method"]
        assert corrected["estimate"] == winner["guard"]
        assert test["interval"] is None and "NO_INTERVAL_FOR_THIS_METRIC" in report["verdicts"]
    else:
        assert corrected["interval"][0] <= corrected["estimate"] <= corrected["interval"][1]
        assert winner["guard_interval"][0] <= winner["guard"] <= winner["guard_interval"][1]
        assert test["gap"] is not None and report["gains"]["shipped"] is not None
        kind = {"groups": "groups of guard rows", "time": "groups of guard rows"}.get(name, "resamples of guard rows")
        assert kind in corrected["method"]


@pytest.mark.slow
def test_a_search_on_random_labels_finds_nothing_and_says_so(tmp_path: Path) -> None:
    load = LOAD.replace("1500", "2000").replace(
        '(x[:, 0] + x[:, 1] * x[:, 2] + rng.normal(size=2000) > 0).astype("int64")', "rng.integers(0, 2, 2000)"
    )
    assert "rng.integers" in load
    space = write_space(tmp_path, "noise", load=load, build=BUILD)
    report = launched(tmp_path, space, "--trials", "60", "--workers", "2").report
    assert report["best"]["validation"] > 0.54
    assert report["corrected"]["interval"][0] <= 0.5 <= report["corrected"]["interval"][1]
    assert abs(report["corrected"]["estimate"] - 0.5) < abs(report["best"]["validation"] - 0.5)
    assert report["test"]["interval"][0] <= 0.5 <= report["test"]["interval"][1]
    assert "NO_GAIN_SHOWN" in report["verdicts"]

"""Ensembles of a real study: one file that plain Keras loads, openings counted and replayed, and what is said."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import search
from search.cli import main
from search.ensembles import blending, ensemble_words, ensembling
from search.ensembles.blending import Blend
from search.ensembles.ensemble_judging import alike, judged
from search.errors import RequestError, StudyError
from search.executors.inline import InlineExecutor
from search.guard import winner
from search.guard.candidates import Candidate, Pool
from search.guard.ledger import Ledger
from search.harness import worker
from search.processes import jobs
from search.record import places
from search.record.journal import Journal
from search.scorer import scoring
from search.scorer.judge import RowJudge
from search.study import Study, StudyConfig
from search.tiers.data import OpenRows, SealedRows
from search.trial import Trial, TrialState
from tests.conftest import run_heldout
from tests.test_end_to_end import BARE
from tests.test_final import Listening, Searched, in_this_process, unheard
from tests.tiny import write_space

# Logits, preprocessing that nobody could guess, and models of which none is right.
LOGITS = (
    "def build(hp):\n"
    "    model = keras.Sequential([keras.Input((4,))])\n"
    "    model.add(keras.layers.Dense(hp.Int('units', 2, 32, default=6), activation='tanh'))\n"
    "    model.add(keras.layers.Dense(2))\n"
    "    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)\n"
    "    model.compile(keras.optimizers.Adam(0.05), loss, metrics=['accuracy'])\n"
    "    return model"
)
HARD = (
    "def load():\n"
    "    x = np.random.default_rng(0).normal(size=(600, 4)).astype('float32')\n"
    "    return Dataset(x, (x[:, 0] * x[:, 1] + x[:, 2] > 0).astype('int64'))"
)
PREPROCESS = (
    "def preprocess(train):\n"
    "    return keras.Sequential([keras.Input((4,)), keras.layers.Rescaling(1 / 3, offset=0.1)])"
)
# A layer of the user's own, without which no file of these models can be loaded.
CUSTOM = (
    "@keras.saving.register_keras_serializable('tiny')\n"
    "class Same(keras.layers.Layer):\n"
    "    def call(self, x):\n"
    "        return x"
)
CALLED = "    model.add(Same())\n"
# A head by least squares on hidden units as they were drawn: no gradient, and every seed another model.
SOLVED = (
    "def fit(hp, model, x, y, **_):\n"
    "    first, _, head = model.layers\n"
    "    z = np.hstack([np.tanh(x @ np.array(first.weights[0].numpy())), np.ones((len(x), 1))])\n"
    "    found = np.linalg.lstsq(z, np.eye(2)[np.asarray(y)] * 4 - 2, rcond=None)[0]\n"
    "    head.set_weights([found[:-1], found[-1]])"
)
TRIALS = 5


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A complete study of five trials in its journal, its winner chosen and its test rows sealed."""
    folder = tmp_path_factory.mktemp("recorded")
    build = LOGITS.replace("    model.add(keras.layers.Dense(2))\n", f"{CALLED}    model.add(keras.layers.Dense(2))\n")
    done = Searched(folder, load=HARD, build=build, rest="\n\n\n".join((CUSTOM, PREPROCESS, SOLVED)))
    judge = RowJudge(
        done.rows.path, done.sealed.path, done.prepared["objective"], done.prepared["problem"], done.study / "guard"
    )
    meta = {
        "name": "s",
        "study_id": "0",
        "objective": done.prepared["objective"],
        "direction": "max",
        "config": StudyConfig(done.problem.path, keep=None, confirm=0).to_json(),
        "space": done.problem.to_json() | {"digest": done.problem.digest},
        "versions": done.prepared["versions"],
        "data": {"digest": done.prepared["manifest"]["digest"], "tiers": done.prepared["manifest"]["tiers"]},
    }
    with Journal.create(done.study / "journal.sqlite", {"study": meta, "prepared": done.prepared}) as journal:
        journal.adopt(done.known)
        for number in range(TRIALS):
            trial = Trial(number, TrialState.RUNNING, params=done.trial.params, seed=number)
            journal.begin(trial)
            place = places.trial(done.study, number)
            place.mkdir(parents=True)
            asked = {"seed": number, "epochs": 1, "proposal": done.known.proposal(trial.params)}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = worker.trial(jobs.base_payload(done.prepared, place) | asked, unheard)
            verdict: Any = judge.judge(result)
            known = {"score": verdict.score, "loss": -verdict.score, "size": result["size"], "best_epoch": 1}
            extra = {"declaration": result["declaration"]}
            journal.guard(number, 0, verdict.guard, verdict.evidence)
            journal.finish(trial.moved(TrialState.COMPLETE, extra=extra, **known))
        journal.put("selection", winner.select(done.study, journal))
        journal.put("state", "COMPLETE")
    return Study.at(done.study)


@pytest.fixture
def study(recorded: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """The same for one test to change, its jobs run in the test's own process."""
    monkeypatch.setattr(jobs, "start_executor", lambda *_: InlineExecutor(in_this_process))
    shutil.copytree(recorded.workspace, tmp_path / "ws")
    return Study("s", tmp_path / "ws")


def changed(study: Study, key: str, value: Any) -> None:
    with Journal.open(study.folder / "journal.sqlite") as journal:
        journal.put(key, value)


def guard_logits(study: Study, number: int) -> np.ndarray:
    """What a trial's own process had predicted when it was trained."""
    return np.load(places.trial(study.folder, number) / "guard_0.npy")


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def check_exported(study: Study, found: dict[str, Any], predicted: np.ndarray) -> None:
    """The file's logits are those of the members' mean probabilities, and no single model is better on guard rows."""
    mean = sum(one["weight"] * softmax(guard_logits(study, one["trial"])) for one in found["members"])
    assert softmax(predicted) == pytest.approx(mean, rel=1e-4, abs=1e-5)
    labels = SealedRows(places_of(study, "sealed")).labels("guard")
    right = [(guard_logits(study, number).argmax(axis=1) == labels).mean() for number in range(found["candidates"])]
    assert (predicted.argmax(axis=1) == labels).mean() >= max(right)


def places_of(study: Study, kind: str) -> Path:
    with study.journal() as journal:
        return Path(places.prepared(journal)[kind])


# ── made, exported, tested ───────────────────────────────────────────────────────────────────────


def test_an_ensemble_is_one_file_with_its_lineage_and_card(study: Study, tmp_path: Path) -> None:
    import keras

    out, watcher = tmp_path / "best", Listening()
    found = search.ensemble(study, 3, out=out, watcher=watcher)
    assert sum(one["weight"] for one in found["members"]) == pytest.approx(1)
    assert (found["size"], found["candidates"], found["test"]) == (3, TRIALS, None)
    assert sorted(path.name for path in out.iterdir()) == ["MODEL_CARD.md", "lineage.json", "model.keras", "space.py"]
    model = keras.models.load_model(out / "model.keras")
    check_exported(study, found, model.predict(OpenRows(places_of(study, "rows")).features("guard"), verbose=0))

    lineage = json.loads((out / "lineage.json").read_text())
    assert lineage["ensemble"]["members"][0]["params"] == {"units": 6} and lineage["weights"] == found["weights"]
    assert lineage["test"] is None and lineage["cross_fitted"] == found["cross_fitted"]
    card = (out / "MODEL_CARD.md").read_text()
    assert "import space  # registers Same" in card and lineage["custom_objects"][0]["registered"] == "tiny>Same"
    assert "no corrected estimate" in card and "guard, cross-fitted" in card and "| test |" not in card
    assert not Ledger().summary()["openings"]

    # Asked again, nothing is built or fitted anew; a model that was changed meanwhile is noticed.
    watcher.heard.clear()
    assert search.ensemble(study, 3, watcher=watcher)["members"] == found["members"] and watcher.heard == []
    (file,) = (study.folder / "frozen").glob("ensemble-3-*.keras")
    file.write_bytes(b"")
    with pytest.raises(RequestError, match="was changed after it was frozen"):
        search.ensemble(study, 3)


def test_the_test_rows_are_opened_once_counted_and_the_answer_is_repeated(study: Study, tmp_path: Path) -> None:
    watcher = Listening()
    first = search.ensemble(study, 3, evaluate="auto", watcher=watcher)["test"]
    assert first["opened"] and first["opening"] == 1 and first["rows"] == 120
    assert "opening the sealed test rows (opening 1 of these rows)" in watcher.heard
    low, high = first["difference"]["interval"]
    assert low <= first["difference"]["gain"] <= high and first["beats_single"] == (low > 0)
    assert first["difference"]["gain"] == pytest.approx(first["ensemble"]["score"] - first["winner"]["score"])
    (entry,) = [line for line in Ledger().entries() if line["kind"] == "opening"]
    assert entry["purpose"] == "ensemble against winner" and set(entry["models"]) == {"ensemble", "winner"}
    assert study.meta("ensembles")["3"]["frozen"]["digest"] == entry["frozen"]

    # The same frozen ensemble is answered from the record, another size is another model.
    watcher.heard.clear()
    assert search.ensemble(study, 3, evaluate="yes", watcher=watcher)["test"] == first
    assert any("nothing was opened" in said for said in watcher.heard) and len(Ledger().summary()["openings"]) == 1
    other = search.ensemble(study, 2, evaluate="auto")["test"]
    assert not other["opened"] and "`heldout ensemble s --size 2 --evaluate yes` opens them again" in other["why"]
    second = search.ensemble(study, 2, evaluate="yes", out=tmp_path / "two")
    assert second["test"]["opening"] == 2 and second["test"]["alpha"] < first["alpha"]
    card = (tmp_path / "two" / "MODEL_CARD.md").read_text()
    assert "| test |" in card and "of the single winner" in card and "had been used before" in card

    # What the study chose stays as it was, and its report tells of the ensemble, until it chooses anew.
    report = study.report()
    assert study.meta("evaluation") is None and report["test"] is None
    assert report["ensemble"]["size"] == 2 and report["ensemble"]["test"] == second["test"]
    ran = CliRunner().invoke(main, ["report", "s", "--workspace", str(study.workspace)])
    assert "ensemble of trials" in ran.output and "of the single winner (gain" in " ".join(ran.output.split())
    changed(study, "selection", study.meta("selection") | {"events": 99})
    assert study.report()["ensemble"] is None


def test_the_winner_alone_opens_nothing(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = study.meta("selection")["winner"]["trial"]

    def one(_: Any, count: int, size: int) -> np.ndarray:
        assert size == 4
        ranked = sorted(study.trials, key=lambda t: (t.loss, t.size, t.number))
        return np.array([float(trial.number == chosen) for trial in ranked])[:count]

    monkeypatch.setattr(blending, "greedy", one)
    test = search.ensemble(study, 4, evaluate="yes")["test"]
    assert not test["opened"] and "nothing to compare" in test["why"] and not Ledger().summary()["openings"]


def test_test_labels_that_changed_nothing_before_the_opening(study: Study) -> None:
    """What is picked depends on no test label: with others it is the same ensemble, to the last weight."""
    before = search.ensemble(study, 3)
    (path,) = places_of(study, "sealed").glob("test_y*.npy")
    labels = np.load(path, allow_pickle=False)
    path.chmod(0o600)
    np.save(path, 1 - labels, allow_pickle=False)
    changed(study, "ensembles", {})
    after = search.ensemble(study, 3)
    assert {key: after[key] for key in ("members", "cross_fitted")} == {
        key: before[key] for key in ("members", "cross_fitted")
    }


# ── refused ──────────────────────────────────────────────────────────────────────────────────────


def test_wrong_requests_are_one_line(study: Study, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, said in (
        (["s", "--size", "1"], "--size must be a whole number of at least 2, but got 1"),
        (["s", "--size", "many"], "is not a valid integer"),
        (["s", "--out", str(tmp_path / "full")], "--out must be a new or empty folder"),
        (["nobody"], "there is no study called 'nobody'"),
    ):
        ran = CliRunner().invoke(main, ["ensemble", *arguments, "--workspace", str(study.workspace)])
        assert ran.exit_code == 2 and said in ran.output and len(ran.output.splitlines()) == 1, ran.output
    with pytest.raises(RequestError, match="--evaluate must be one of auto, yes, no"):
        search.ensemble(study, evaluate="maybe")


def test_models_that_were_not_kept_and_studies_that_are_not_complete_are_refused(study: Study) -> None:
    for number in range(1, TRIALS):
        places.weights(study.folder, number).unlink()
    with pytest.raises(RequestError, match="needs two trained models .* has kept 1; .* --keep all"):
        search.ensemble(study)
    changed(study, "state", "STOPPED")
    with pytest.raises(StudyError, match="only a complete study .* `heldout resume s` first"):
        search.ensemble(study)


def test_a_metric_that_only_keras_can_compute_is_refused(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = scoring.resolve
    monkeypatch.setattr(scoring, "resolve", lambda *asked: replace(plain(*asked), kind="custom"))
    with pytest.raises(RequestError, match="only Keras can compute val_accuracy"):
        search.ensemble(study)


def test_custom_layers_of_two_texts_do_not_go_into_one_file(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ensembling.by_text

    def apart(journal: Any, models: dict[str, Any]) -> list[Any]:
        return [group for role, item in models.items() for group in plain(journal, {role: item})]

    monkeypatch.setattr(ensembling, "by_text", apart)
    monkeypatch.setattr(blending, "greedy", lambda _, count, size: np.eye(count)[:2].mean(axis=0))
    with pytest.raises(RequestError, match="must be of one text of the space module, but its members .* with 2"):
        search.ensemble(study, 4)


def test_a_file_that_says_something_else_than_its_members_is_no_ensemble(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = worker.JOBS["merge"]

    def wrong(payload: dict[str, Any], send: Any) -> dict[str, Any]:
        return plain(payload | {"members": payload["members"][:1]}, send)

    monkeypatch.setitem(worker.JOBS, "merge", wrong)
    with pytest.raises(RequestError, match="must predict what its members do together, but differs by up to"):
        search.ensemble(study, 4)
    assert not list((study.folder / "frozen").glob("*.keras")) and study.meta("ensembles") is None


# ── real processes ───────────────────────────────────────────────────────────────────────────────


@dataclass
class Done:
    """A workspace that the command line works in."""

    workspace: Path
    ledger: Path
    study: Study

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run_heldout(*arguments, "--workspace", str(self.workspace), HELDOUT_LEDGER=str(self.ledger))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_launch_ensemble_and_a_bare_process_that_loads_it(tmp_path: Path) -> None:
    done = Done(tmp_path / "ws", tmp_path / "ledger.jsonl", Study.at(tmp_path / "ws" / "studies" / "s"))
    space, out = write_space(tmp_path, load=HARD, build=LOGITS, rest=PREPROCESS), tmp_path / "best"
    options = ("--trials", "4", "--confirm", "0", "--workers", "1", "--evaluate", "no", "--study", "s")
    ran = done.run("launch", space, *options)
    assert ran.returncode == 0, ran.stderr
    ran = done.run("ensemble", "s", "--size", "3", "--out", str(out), "--evaluate", "yes", "--json")
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["test"]["opening"] == 1 and len(Ledger(done.ledger).summary()["openings"]) == 1

    np.save(tmp_path / "x.npy", OpenRows(places_of(done.study, "rows")).features("guard"))
    batch = json.loads((out / "lineage.json").read_text())["batch_size"]
    command = [sys.executable, "-I", "-c", BARE, str(out / "model.keras"), "x.npy", "p.npy", str(batch)]
    subprocess.run(command, check=True, cwd=tmp_path)
    check_exported(done.study, found, np.load(tmp_path / "p.npy"))


STRUCTURE = """
import sys
import keras
model = keras.models.load_model(sys.argv[1])
named = lambda part: sorted(part) if isinstance(part, dict) else keras.tree.map_structure(lambda t: list(t.shape), part)
print(named(model.input), named(model.output))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("space", "seed", "ends"),
    [
        ("wide_deep", 0, "['codes', 'measures'] ['price', 'sold']"),
        ("digit_pairs", 0, "['left', 'right'] [None, 1]"),
        ("diabetes", 0, "[None, 10] [None, 1]"),
        ("reviews", 2, "[None, 24] [None, 1]"),  # with seed 0 a single model is the best choice, and nothing is opened
    ],
)
def test_shipped_spaces_of_every_shape(space: str, seed: int, ends: str, tmp_path: Path) -> None:
    """Dicts, several outputs, regression with preprocessing, and text; the command itself compares the written file."""
    found = Done(tmp_path / "ws", tmp_path / "ledger.jsonl", Study.at(tmp_path / "ws" / "studies" / "s"))
    options = ("--trials", "4", "--epochs", "3", "--confirm", "0", "--evaluate", "no", "--study", "s")
    assert found.run("launch", space, "--seed", str(seed), *options).returncode == 0
    out = tmp_path / "out"
    ran = found.run("ensemble", "s", "--size", "3", "--out", str(out), "--evaluate", "auto")
    assert ran.returncode == 0, ran.stderr
    assert "The ensemble" in ran.stdout and "opening 1 of these rows" in ran.stdout
    command = [sys.executable, "-I", "-c", STRUCTURE, str(out / "model.keras")]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == ends


# ── judged ───────────────────────────────────────────────────────────────────────────────────────


def judging(kind: str, direction: str, outputs: int) -> tuple[Blend, Pool, dict[str, int]]:
    """Five models of 90 guard rows, of which later ones are better."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 90) if outputs else rng.normal(size=(90, 1))
    declaration = {
        "outputs": [{"name": "out", "loss": "mse" if not outputs else "binary_crossentropy", "from_logits": False}],
        "metrics": [{"output": "out", "name": kind, "kind": kind, "config": {}}],
    }
    metric = scoring.resolve(f"val_{kind}", declaration)
    truth = labels.reshape(-1, 1)
    arrays = [truth * 0.3 * (k + 1) + rng.normal(scale=0.5, size=(90, 1)) for k in range(5)]
    arrays = [np.clip(one, 0, 1) for one in arrays] if outputs else arrays
    blend = Blend(metric, direction, declaration, [[one] for one in arrays], [["values"]] * 5, [labels])
    runs = []
    for number, one in enumerate(np.eye(5)):
        parts = blend.parts(one)
        sums = None if kind == "auc" else parts.sum(axis=0)
        runs.append(Candidate(number, number, 10, 0.5, scoring.value_of(metric, parts), parts, sums))
    return blend, Pool(metric, direction, runs), {"guard": 90, "validation": 90}


@pytest.mark.parametrize(
    ("kind", "direction", "outputs"),
    [("accuracy", "max", 1), ("auc", "max", 1), ("root_mean_squared_error", "min", 0), ("r2_score", "max", 0)],
)
@pytest.mark.parametrize("spread", ["rows", "groups", "time"])
def test_every_kind_of_metric_is_judged_by_rows_that_fitted_nothing(
    kind: str, direction: str, outputs: int, spread: str
) -> None:
    blend, pool, tiers = judging(kind, direction, outputs)
    rows = {"groups": np.arange(90) // 6 if spread == "groups" else None, "ordered": spread == "time"}
    found = judged(blend, pool, tiers, 3, rows)
    assert found is not None and (found["folds"], found["rows"]) == (5, 90)
    assert set(found["scores"]) == {"ensemble", "average", "nelder_mead", "single"}
    sign = 1 if direction == "max" else -1
    for way, gain in found["gains"].items():
        if kind == "auc":  # models of two folds do not rank rows alike
            assert gain is None
            continue
        assert gain["gain"] == pytest.approx(sign * (found["scores"][way] - found["scores"]["single"]))
        assert gain["interval"][0] <= gain["gain"] <= gain["interval"][1]
    # A plain average has no weights to fit, so cross-fitting changes nothing but for ranks within folds.
    plain = blend.loss(np.array([1 / 3, 1 / 3, 1 / 3, 0, 0])) * -sign
    assert found["scores"]["average"] == pytest.approx(plain, abs=0.05 if kind == "auc" else 1e-9)


def test_guard_rows_of_one_group_judge_nothing_and_alike_models_correlate() -> None:
    blend, pool, tiers = judging("accuracy", "max", 1)
    assert judged(blend, pool, tiers, 3, {"groups": np.zeros(90), "ordered": False}) is None
    found = alike(blend, [10, 11, 12, 13, 14], np.array([0.5, 0, 0, 0.5, 0]))
    assert found["trials"] == [10, 13] and found["of"] == "errors"
    assert found["table"][0][0] == pytest.approx(1) and found["table"][0][1] == found["table"][1][0]


# ── words ────────────────────────────────────────────────────────────────────────────────────────


OF_TWO = {"objective": "val_accuracy", "size": 5, "winner": 3, "members": [{"trial": 3}, {"trial": 4}]}


def told(low: float, gain: float, high: float, opening: int = 1, final: str | None = None) -> str:
    difference = {"gain": gain, "interval": [low, high], "smallest": 0.02}
    test = {"opened": True, "opening": opening, "rows": 359, "level": 0.97, "final": final, "difference": difference}
    test |= {"ensemble": {"score": 0.9 + gain}, "winner": {"score": 0.9}, "beats_single": low > 0}
    return ensemble_words.conclusion({"test": test, **OF_TWO}, "s")


def test_what_a_test_showed_is_said_in_plain_words() -> None:
    won, lost, neither = told(0.01, 0.02, 0.03), told(-0.03, -0.02, -0.01), told(-0.01, 0.005, 0.02)
    assert won.startswith("The ensemble wins: on 359 test rows its accuracy is 0.92 against 0.9 of the single winner")
    assert lost.startswith("The ensemble loses") and lost.endswith("Use the single model.")
    assert neither.startswith("The ensemble does not win") and "a gain of 0.02 would show in 4 of 5 cases" in neither
    assert "use that" in neither and "used before" not in neither
    assert "trust this less" in told(0.01, 0.02, 0.03, opening=2) and "refitted" in told(0, 0, 0, final="retrain")


def test_an_ensemble_that_is_the_winner_alone_is_said_to_be_that() -> None:
    found = OF_TWO | {"members": [{"trial": 3}], "test": None}
    assert "does not win: it is the single winner, trial 3, alone" in ensemble_words.conclusion(found, "s")


def test_what_guard_rows_showed_is_called_cross_fitted_and_no_corrected_estimate() -> None:
    def said(*interval: float, gain: bool = True) -> str:
        judged = {"scores": {"ensemble": 0.91, "single": 0.9}, "gains": {"ensemble": None}}
        if gain:
            judged["gains"] = {"ensemble": {"gain": 0.01, "interval": list(interval)}}
        found = {"test": None, "cross_fitted": judged, **OF_TWO}
        return ensemble_words.conclusion(found, "s")

    assert "is not shown to be better than a single model: cross-fitted on guard rows" in said(-0.01, 0.02)
    assert "seems better" in said(0.001, 0.02) and "seems worse" in said(-0.2, -0.01)
    assert "is not known, as there is no interval" in said(gain=False)
    for text in (said(-0.01, 0.02), said(gain=False)):
        assert "no corrected estimate" in text and "only a test number speaks for it" in text
        assert "`heldout ensemble s --size 5 --evaluate yes` opens the test rows for it, counted" in text


def test_an_ensemble_of_another_choice_is_not_told() -> None:
    record = {"events": 7, "size": 5, "model": {"size": 10, "path": "p"}, "test": None}
    assert ensemble_words.latest({"5": record}, {"events": 7}) == {"size": 5, "test": None, "weights": 10}
    assert ensemble_words.latest({"5": record}, {"events": 8}) is None
    assert ensemble_words.latest(None, {}) is None

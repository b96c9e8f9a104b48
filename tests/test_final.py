"""The refit on more rows: what it trains on, for how long, what it leaves behind, and what its card says."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.definition.problem import find
from search.definition.space import Space
from search.definition.tracing import TracingHyperParameters
from search.errors import DataError, RequestError, SpaceError, StudyError
from search.executors.inline import InlineExecutor
from search.export import export
from search.guard import final
from search.harness import training, worker
from search.loop.watcher import Silent
from search.processes import jobs
from search.record import places
from search.record.journal import Journal
from search.scorer.judge import RowJudge
from search.study import Study
from search.tiers import store
from search.tiers.data import Dataset, OpenRows, SealedRows, prepare
from search.trial import Trial, TrialState
from tests.conftest import Heldout
from tests.test_end_to_end import BARE
from tests.tiny import write_space

PREPROCESS = (
    "def preprocess(train):\n"
    "    normalize = keras.layers.Normalization()\n"
    "    normalize.adapt(train.x)\n"
    "    return keras.Sequential([keras.Input((4,)), normalize])"
)


class Searched:
    """A study of one trial that has ended, made without a search; stands in for its journal."""

    def __init__(self, folder: Path, params: dict[str, Any] | None = None, **parts: str) -> None:
        self.problem = find(write_space(folder, **parts))
        self.study = folder / "ws" / "studies" / "s"
        self.study.mkdir(parents=True)
        self.path = self.study / "journal.sqlite"
        loaded = worker.load(jobs.load_payload(self.problem, folder / "ws", self.study, 0), unheard)
        self.prepared = jobs.completed(loaded, self.problem)
        self.rows = OpenRows(Path(self.prepared["rows"]))
        self.sealed = SealedRows(Path(self.prepared["sealed"]))
        hp = TracingHyperParameters(None, 0, True, params)
        module = worker.SpaceModule(self.problem)
        training.build(module, hp)
        self.known = Space.empty().grown(hp.asks)
        known = {"params": self.known.params_of(hp.asks), "seed": 5, "loss": 1.0, "score": 0.5}
        self.trial = Trial(0, TrialState.COMPLETE, epochs=4, best_epoch=3, **known)
        self.executor = InlineExecutor(in_this_process)

    def get(self, key: str) -> Any:
        return {"prepared": self.prepared, "study": {"config": {}}}.get(key)

    def space(self) -> Space:
        return self.known

    def refit(self, path: Path, tiers: tuple[str, ...] = final.ALL, epochs: int = 2, trial: Trial | None = None) -> Any:
        journal: Any = self
        return final.refit(journal, self.executor, Silent(), trial or self.trial, path, tiers=tiers, epochs=epochs)

    def all_x(self) -> np.ndarray:
        tiers = ("train", "validation", "guard")
        return np.concatenate([*(self.rows.features(tier) for tier in tiers), self.sealed.features("test")])

    def left(self) -> list[str]:
        """What a refit may have left among sealed rows."""
        return [path.name for path in self.sealed.path.parent.iterdir() if path.name != self.sealed.path.name]


def unheard(_: dict[str, Any]) -> None: ...


def in_this_process(order: dict[str, Any], send: Callable[[Any], None]) -> None:
    class Sending:
        def send(self, body: dict[str, Any]) -> None:
            send(body)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in a process of its own, which tells them in its log
        # The slot is for such a process as well: TensorFlow here has its threads already.
        worker.main(order | {"slot": None}, Sending())


# ── how long ─────────────────────────────────────────────────────────────────────────────────────


def run(number: int, best: int | None, epochs: int = 9, confirms: int | None = None, failed: bool = False) -> Trial:
    known = {"epochs": epochs, "best_epoch": best, "confirms": confirms}
    if failed:
        return Trial(number, TrialState.FAILED, reason="crash", **known)
    return Trial(number, TrialState.COMPLETE, loss=1.0, **known)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=9))
def test_a_refit_trains_the_median_of_the_best_epochs_rounded_up(best: list[int]) -> None:
    found = final.epochs_for([run(n, epoch) for n, epoch in enumerate(best)])
    assert found == math.ceil(np.median(best))


def test_a_run_without_a_best_epoch_counts_with_all_its_epochs_and_one_without_any_not_at_all() -> None:
    assert final.epochs_for([run(0, None, 7)]) == 7
    assert final.epochs_for([run(0, None, 0), run(1, 4), run(2, 6)]) == 5
    with pytest.raises(RequestError, match="hand `callbacks` to model.fit"):
        final.epochs_for([run(0, None, 0)])


def test_the_runs_of_a_configuration_are_its_search_trial_and_those_that_confirm_it() -> None:
    history = [run(0, 1), run(1, 2), run(2, 3, confirms=1), run(3, 3, confirms=0), run(4, 3, confirms=1, failed=True)]
    for one in (history[1], history[2]):
        assert [t.number for t in final.runs(history, one)] == [1, 2]


# ── which rows ───────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=8, deadline=None)
@given(
    count=st.integers(60, 200),
    weighted=st.booleans(),
    ordered=st.booleans(),
    several=st.booleans(),
    tiers=st.sampled_from([final.RETRAIN, final.ALL]),
)
def test_merged_rows_are_the_rows_of_the_tiers_each_with_its_own_label_and_weight(
    tmp_path_factory: pytest.TempPathFactory, count: int, weighted: bool, ordered: bool, several: bool, tiers: Any
) -> None:
    folder, rng = tmp_path_factory.mktemp("merged"), np.random.default_rng(count)
    x = rng.permutation(count * 3).reshape(count, 3).astype("float32")
    dataset = Dataset(
        {"a": x, "b": x[:, :1].astype(int).astype(str)} if several else x,
        x[:, 0] * 2,
        sample_weight=x[:, 0] * 3 if weighted else None,
        time=-x[:, 0] if ordered else None,
    )
    manifest = prepare(dataset, folder, 0, False)
    home, sealed = folder / "rows" / manifest["digest"], folder / "sealed" / manifest["digest"]
    copies = [folder / "one", folder / "two"]
    for copy in copies:
        copy.mkdir()
        store.merged(home, sealed, tiers, copy)
    before, rows = OpenRows(home), OpenRows(copies[0])

    features, labels, weights = rows.features("train"), rows.labels("train"), rows.weights()
    first = features["a"] if several else features
    assert len(first) == rows.size("train") == sum(manifest["tiers"][tier] for tier in tiers)
    assert rows.manifest["tiers"]["train"] == rows.size("train")
    assert len(np.unique(first[:, 0])) == len(first)
    if tiers == final.ALL:
        assert np.array_equal(np.sort(first[:, 0]), np.sort(x[:, 0]))
    assert np.array_equal(labels, first[:, 0] * 2)
    assert weights is None if not weighted else np.array_equal(weights, first[:, 0] * 3)
    if several:
        assert np.array_equal(features["b"][:, 0].astype("float32"), first[:, 0])
    if ordered:
        assert np.all(np.diff(first[:, 0]) < 0)
    assert np.array_equal(rows.labels("validation"), before.labels("validation"))
    assert rows.size("guard") == before.size("guard")

    files = {path.name: path.read_bytes() for path in copies[0].iterdir()}
    assert files == {path.name: path.read_bytes() for path in copies[1].iterdir()}
    assert {path.stat().st_mode & 0o777 for path in copies[0].iterdir()} == {0o600}


def test_no_other_tiers_can_be_merged(tmp_path: Path) -> None:
    manifest = prepare(Dataset(np.arange(80.0), np.arange(80.0)), tmp_path, 0, False)
    home, sealed = tmp_path / "rows" / manifest["digest"], tmp_path / "sealed" / manifest["digest"]
    with pytest.raises(ValueError, match="tiers must be"):
        store.merged(home, sealed, ("train", "test"), tmp_path)


# ── the training ─────────────────────────────────────────────────────────────────────────────────


def test_a_refit_is_fitted_on_every_row_and_leaves_no_copy_of_them(tmp_path: Path) -> None:
    done = Searched(tmp_path, {"rate": 0.02}, rest=PREPROCESS)
    for name, tiers in (("all", final.ALL), ("retrain", final.RETRAIN)):
        built = done.refit(tmp_path / f"{name}.keras", tiers)
        assert set(built) == {"declaration", "custom", "size", "flops", "checked", "epochs", "rows"}
        assert built["checked"]["largest_difference"] == 0
        assert built["rows"] == sum(done.prepared["manifest"]["tiers"][tier] for tier in tiers)
        assert built["epochs"] == 2
        rows = done.all_x()[: built["rows"]]
        model = keras.models.load_model(tmp_path / f"{name}.keras")
        (normalize,) = [layer for layer in model.get_layer("preprocess").layers if hasattr(layer, "adapt")]
        np.testing.assert_allclose(np.ravel(normalize.mean), rows.mean(axis=0), atol=1e-6)
    assert done.left() == []


def test_a_refit_is_the_same_twice_and_another_after_another_epoch(tmp_path: Path) -> None:
    done = Searched(tmp_path)
    weights = []
    for name, epochs in (("one", 1), ("two", 1), ("longer", 2)):
        done.refit(tmp_path / f"{name}.keras", epochs=epochs)
        weights.append(keras.models.load_model(tmp_path / f"{name}.keras").get_weights())
    assert all(np.array_equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(weights[0], weights[2], strict=True))


STOPPING = (
    "import pathlib\n\n\n"
    "def said(epoch, logs):\n"
    "    with pathlib.Path('epochs.txt').open('a') as file:\n"
    "        print(epoch, *logs, file=file)\n\n\n"
    "def callbacks(hp):\n"
    "    keep = keras.callbacks.ModelCheckpoint('never.keras', monitor='val_loss')\n"
    "    stop = keras.callbacks.EarlyStopping(monitor='val_loss', patience=0, min_delta=9, restore_best_weights=True)\n"
    "    return [keep, stop, keras.callbacks.LambdaCallback(on_epoch_end=said)]"
)


def test_callbacks_that_choose_an_epoch_are_left_out_and_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = Searched(tmp_path, rest=STOPPING)
    assert done.refit(tmp_path / "m.keras", epochs=5)["epochs"] == 5
    last = [line.split() for line in (tmp_path / "epochs.txt").read_text().splitlines()]
    assert [int(epoch) for epoch, *_ in last] == list(range(5)) and "val_loss" in last[0]
    assert not (tmp_path / "never.keras").exists()


OWN_FIT = (
    "import pathlib\n\n\n"
    "def fit(hp, model, x, y, validation_data, epochs, callbacks, sample_weight=None, **kwargs):\n"
    "    numbers = len(x['a']), len(validation_data[1]), epochs, int(sample_weight.sum())\n"
    "    pathlib.Path('fit.txt').write_text(' '.join(map(str, numbers)))\n"
    "    return model.fit(x, y, validation_data=validation_data, epochs=epochs, callbacks=callbacks, verbose=0,\n"
    "                     batch_size=hp.Choice('batch_size', [16, 64]))"
)
NAMED = {
    "objective": 'objective = "val_loss"\nepochs = 2',
    "load": (
        "def load():\n"
        "    x = np.random.default_rng(0).normal(size=(150, 3)).astype('float32')\n"
        "    return Dataset({'a': x, 'b': x[:, :2]}, x[:, 0], sample_weight=np.arange(150.0))"
    ),
    "build": (
        "def build(hp):\n"
        "    a, b = keras.Input((3,), name='a'), keras.Input((2,), name='b')\n"
        "    out = keras.layers.Dense(1)(keras.layers.Concatenate()([a, b]))\n"
        "    model = keras.Model({'a': a, 'b': b}, out)\n"
        "    model.compile('sgd', 'mse', metrics=['mae'])\n"
        "    return model"
    ),
}


def test_a_modules_own_fit_gets_the_rows_their_weights_and_the_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = Searched(tmp_path, rest=OWN_FIT, **NAMED)
    trial = Trial(0, TrialState.COMPLETE, loss=1.0, params={"batch_size": 64})
    built = done.refit(tmp_path / "m.keras", epochs=3, trial=trial)
    assert (built["rows"], built["epochs"]) == (150, 3)
    assert (tmp_path / "fit.txt").read_text() == f"150 {done.rows.size('validation')} 3 {sum(range(150))}"
    model = keras.models.load_model(tmp_path / "m.keras")
    assert model.predict({"a": np.zeros((2, 3)), "b": np.zeros((2, 2))}, verbose=0).shape == (2, 1)


def test_rows_stored_without_the_weights_of_sealed_tiers_are_refused(tmp_path: Path) -> None:
    done = Searched(tmp_path, **NAMED)
    (done.sealed.path / "guard_weight.npy").unlink()
    with pytest.raises(DataError, match="sample weights of all rows"):
        done.refit(tmp_path / "m.keras")
    assert done.left() == [] and not (tmp_path / "m.keras").exists()


def test_a_loss_that_is_no_number_ends_a_refit_and_leaves_no_copy(tmp_path: Path) -> None:
    nan = "def bad(y, p):\n    return keras.ops.sum(p, axis=-1) * float('nan')"
    build = (
        "def build(hp):\n    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])\n"
        "    model.compile('sgd', bad)\n    return model"
    )
    done = Searched(tmp_path, build=build, rest=nan)
    with pytest.raises(SpaceError, match="became NaN in epoch 1"):
        done.refit(tmp_path / "m.keras")
    assert done.left() == [] and not (tmp_path / "m.keras").exists()


def test_other_parameters_than_the_recorded_ones_are_refused(tmp_path: Path) -> None:
    done = Searched(tmp_path)
    trial = Trial(0, TrialState.COMPLETE, loss=1.0, params={"rate": 7.0})
    with pytest.raises(RequestError, match="its space now asks for"):
        done.refit(tmp_path / "m.keras", trial=trial)


# ── the export ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study in its journal: a baseline, and a winner with its confirming run, frozen but not tested."""
    folder = tmp_path_factory.mktemp("recorded")
    done = Searched(folder, {"rate": 0.1, "units_0": 16}, rest=PREPROCESS)
    payload = jobs.base_payload(done.prepared, done.study) | {"seed": 5, "epochs": 1}
    payload |= {"proposal": done.known.proposal(done.trial.params)}
    result = worker.trial(payload, unheard)
    sealed, objective = done.sealed.path, done.prepared["objective"]
    verdict: Any = RowJudge(done.rows.path, sealed, objective, done.prepared["problem"]).judge(result)
    meta = {
        "study_id": "0",
        "objective": objective,
        "space": done.problem.to_json() | {"digest": done.problem.digest},
        "versions": done.prepared["versions"],
        "data": {key: done.prepared["manifest"][key] for key in ("digest", "rows", "tiers")},
    }
    known = {"study": meta, "prepared": done.prepared, "state": "COMPLETE"}
    with Journal.create(done.study / "journal.sqlite", known) as journal:
        journal.adopt(done.known)
        for number, best, confirms in ((0, 1, None), (1, 2, None), (2, 5, 1)):
            trial = Trial(number, TrialState.RUNNING, params=done.trial.params, seed=number, confirms=confirms)
            journal.begin(trial)
            score = {"score": verdict.score + number, "loss": -verdict.score - number, "size": result["size"]}
            known = {"epochs": 6, "best_epoch": best}
            place = places.weights(done.study, number)
            place.parent.mkdir(parents=True)
            shutil.copyfile(result["weights"], place)
            journal.finish(trial.moved(TrialState.COMPLETE, **score, **known))
            journal.guard(number, 0, 0.25, None)
        journal.put("selection", {"winner": {"trial": 2, "configuration": 1, "guard": 0.25}})
    return Study("s", folder / "ws")


class Listening(Silent):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def say(self, text: str) -> None:
        self.heard.append(text)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> InlineExecutor:
    """Jobs run in the test's own process, which has Keras loaded."""
    executor = InlineExecutor(in_this_process)
    monkeypatch.setattr(jobs, "start_executor", lambda *_: executor)
    return executor


def test_final_all_exports_a_model_of_every_row_and_no_score_of_it(
    recorded: Study, tmp_path: Path, here: InlineExecutor
) -> None:
    out, watcher = tmp_path / "all", Listening()
    lineage = export(recorded, out, final="all", watcher=watcher)
    (said,) = watcher.heard
    assert "all 200 rows for 4 epochs" in said and "they cannot test this model, and this is no opening" in said
    assert json.loads((out / "lineage.json").read_text()) == lineage
    # The selected trial is a confirming run; its configuration's runs were best after 2 and 5 epochs.
    assert (lineage["final"], lineage["trial"], lineage["rows"], lineage["epochs"]) == ("all", 2, 200, 4)
    assert "scores" not in lineage and "best_epoch" not in lineage
    before = {"validation": {"score": recorded.trials[2].score}, "guard": {"score": 0.25, "corrected": None}}
    assert lineage["refitted_from"]["scores"] == before
    card = (out / "MODEL_CARD.md").read_text()
    assert "**No score applies to this model.** It was trained on all 200 rows, test rows included" in card
    assert "They describe another model" in card and "| guard | 0.25 |" in card
    assert "the last of 4 epochs on 200 rows" in card
    whole = {"MODEL_CARD.md", "lineage.json", "model.keras", "space.py", lineage["architecture"]}
    assert {path.name for path in out.iterdir()} == whole
    assert recorded.meta("evaluation") is None and not Path(os.environ["HELDOUT_LEDGER"]).exists()

    assert export(recorded, tmp_path / "first", final="all", trial=0)["epochs"] == 1


@pytest.mark.slow
def test_a_bare_process_loads_the_model_of_every_row(recorded: Study, tmp_path: Path, heldout: Heldout) -> None:
    out = tmp_path / "all"
    ran = heldout("export", "s", "--workspace", str(recorded.workspace), "--out", str(out), "--final", "all")
    assert ran.returncode == 0, ran.stderr
    assert "so they cannot test this model" in ran.stderr and "no score applies to it" in ran.stdout
    assert [path.name for path in (recorded.workspace / "sealed").iterdir() if path.name.startswith(".")] == []

    x = np.random.default_rng(0).normal(size=(200, 4)).astype("float32")  # as in tests/tiny.py
    np.save(tmp_path / "x.npy", x)
    batch = json.loads((out / "lineage.json").read_text())["batch_size"]
    command = [sys.executable, "-I", "-c", BARE, str(out / "model.keras"), "x.npy", "p.npy", str(batch)]
    subprocess.run(command, check=True, cwd=tmp_path)
    predicted = np.load(tmp_path / "p.npy").argmax(axis=1)
    assert (predicted == (x[:, 0] + x[:, 1] > 0)).mean() > 0.9


def test_a_retrained_winner_has_only_its_test_score_and_the_trial_itself_has_its_own(
    recorded: Study, tmp_path: Path, here: InlineExecutor
) -> None:
    path = recorded.folder / "frozen" / "retrained.keras"
    path.parent.mkdir()
    with recorded.journal() as journal:
        winner = journal.history()[2]
        built = final.refit(journal, here, Silent(), winner, path, tiers=final.RETRAIN, epochs=3)
    item = {"trial": 2, "path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "final": "retrain"}
    tested = {"trial": 2, "score": 0.75, "interval": [0.5, 0.9], "method": "Wilson"}
    evaluation = {"opened": True, "opening": 1, "level": 0.95, "rows": 40, "final": "retrain", "winner": tested}
    with Journal.open(recorded.folder / "journal.sqlite") as journal:
        journal.put("frozen", {"models": {"winner": item | built}})
        journal.put("evaluation", evaluation)

    lineage = export(recorded, tmp_path / "winner", format="saved_model")
    assert (tmp_path / "winner" / "model.keras").read_bytes() == path.read_bytes()
    assert (tmp_path / "winner" / "saved_model" / "saved_model.pb").exists()
    assert (lineage["final"], lineage["epochs"], lineage["rows"]) == ("retrain", 3, built["rows"])
    assert set(lineage["scores"]) == {"test"} and lineage["scores"]["test"]["score"] == 0.75
    card = (tmp_path / "winner" / "MODEL_CARD.md").read_text()
    assert "Only the test score speaks for this model: 0.75, 95% interval 0.5 to 0.9" in card
    assert "validation and guard among them" in card and "| validation |" not in card

    plain = export(recorded, tmp_path / "plain", trial=2)
    assert set(plain["scores"]) == {"validation", "guard"} and "final" not in plain
    assert "was not tested" in (tmp_path / "plain" / "MODEL_CARD.md").read_text()

    # A score of the model that was frozen before it was refitted is not the refitted one's.
    with Journal.open(recorded.folder / "journal.sqlite") as journal:
        journal.put("evaluation", evaluation | {"final": None})
    assert export(recorded, tmp_path / "untested")["scores"] == {}
    assert "so no score speaks for it" in (tmp_path / "untested" / "MODEL_CARD.md").read_text()


def test_every_row_is_for_a_complete_study_alone(recorded: Study, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="--final must be all"):
        export(recorded, tmp_path / "out", final="retrain")
    with Journal.open(recorded.folder / "journal.sqlite") as journal:
        journal.put("state", "STOPPED")
    try:
        with pytest.raises(StudyError, match="only a complete study"):
            export(recorded, tmp_path / "out", final="all")
    finally:
        with Journal.open(recorded.folder / "journal.sqlite") as journal:
            journal.put("state", "COMPLETE")
    assert not (tmp_path / "out").exists()

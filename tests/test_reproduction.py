"""Reproducing a trial from its record: what is compared, what is said, and what is left alone."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import search
from search import reproduction
from search.definition.problem import find
from search.errors import DataError, RequestError, StudyError
from search.executors import Exited, Job
from search.loop.watcher import Silent
from search.processes import devices, jobs
from search.record.journal import Journal
from search.study import Study, StudyConfig
from search.trial import TrialState, seed_for
from tests.conftest import Heldout, run_heldout
from tests.tiny import PARTS, write_space

# A metric that only Keras can compute, so that its scores come from a job of their own; and one width in three
# makes build fail.
CUSTOM = (
    "class Fair(keras.metrics.Metric):\n"
    "    def __init__(self, name='fair', **kwargs):\n"
    "        super().__init__(name=name, **kwargs)\n"
    "        self.hits = self.add_weight(initializer='zeros', name='hits')\n"
    "        self.rows = self.add_weight(initializer='zeros', name='rows')\n"
    "    def update_state(self, y_true, y_pred, sample_weight=None):\n"
    "        y_true = keras.ops.reshape(keras.ops.cast(y_true, 'int64'), (-1,))\n"
    "        hit = keras.ops.equal(y_true, keras.ops.cast(keras.ops.argmax(y_pred, axis=-1), 'int64'))\n"
    "        hit = keras.ops.cast(hit, 'float32')\n"
    "        self.hits.assign_add(keras.ops.sum(hit))\n"
    "        self.rows.assign_add(keras.ops.sum(keras.ops.ones_like(hit)))\n"
    "    def result(self):\n"
    "        return self.hits / self.rows\n\n\n"
    "def build(hp):\n"
    "    kind = hp.Choice('kind', ['plain', 'broken', 'wide'])\n"
    "    if kind == 'broken':\n"
    "        raise ValueError('this kind cannot be built')\n"
    "    model = keras.Sequential([keras.Input((4,)), keras.layers.Dropout(0.2),\n"
    "        keras.layers.Dense(8 if kind == 'plain' else 16, activation='relu'),\n"
    "        keras.layers.Dense(2, activation='softmax')])\n"
    "    model.compile('adam', 'sparse_categorical_crossentropy', metrics=[Fair()])\n"
    "    return model"
)
FIT = (
    "def fit(hp, model, x, y, **kwargs):\n"
    "    batch = hp.Choice('batch_size', [16, 32])  # asked for by fit alone\n"
    "    return model.fit(x, y, batch_size=batch, **kwargs)"
)


@dataclass
class Done:
    """A study for the tests of this file to look at."""

    study: Study
    space: Path
    ledger: Path

    def hashes(self) -> dict[str, str]:
        """Of everything that a reproduction must leave alone."""
        files = [*self.study.workspace.rglob("*"), self.ledger]
        # SQLite's shared memory is touched by readers.
        return {
            str(path): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
            if path.is_file() and not path.name.endswith(("-shm", "-wal"))
        }


def launched(folder: Path, *options: str, **parts: str) -> Done:
    space = write_space(folder, **parts)
    ledger = folder / "ledger.jsonl"
    asked = ["--workers", "1", "--workspace", str(folder / "ws"), "--study", "s", *options]
    ran = run_heldout("launch", space, *asked, "--evaluate", "no", HELDOUT_LEDGER=str(ledger))
    assert ran.returncode == 0, ran.stderr
    return Done(Study("s", folder / "ws"), Path(space), ledger)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("plain")
    options = ("--trials", "3", "--epochs", "3", "--confirm", "1", "--confirm-seeds", "2")
    return launched(folder, *options, rest=FIT)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_search_trial_and_a_confirming_one_are_reproduced_exactly_and_nothing_is_recorded(
    done: Done, heldout: Heldout
) -> None:
    before = done.hashes()
    # The study keeps the text that it was started with.
    done.space.write_text(done.space.read_text().replace("hp.Int('layers', 1, 2)", "hp.Int('layers', 3, 4)"))
    confirming = next(trial.number for trial in done.study.trials if trial.confirms not in (None, 0))
    for number in (0, 2, confirming):
        arguments = ("reproduce", "s", str(number), "--workspace", str(done.study.workspace), "--json")
        ran = heldout(*arguments, HELDOUT_LEDGER=str(done.ledger))
        assert ran.returncode == 0, ran.stdout + ran.stderr
        found = json.loads(ran.stdout)
        assert (found["outcome"], found["said"]) == ("exact", "reproduced exactly")
        assert found["difference"] == 0 and found["weights"] is True and found["versions"] == {}
        assert found["reports"] == {"difference": 0.0, "metric": None, "epoch": None, "epochs": 3}
        assert found["then"] == found["now"] and found["noise_floor"] is not None
        assert "guard" not in ran.stdout and "test" not in ran.stdout
    assert done.hashes() == before


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_is_no_longer_kept_is_said_and_words_are_plain(done: Done, heldout: Heldout, tmp_path: Path) -> None:
    workspace = tmp_path / "ws"
    shutil.copytree(done.study.workspace, workspace)
    kept = Study("s", workspace)
    with Journal.open(kept.folder / "journal.sqlite") as journal:
        journal.put("prepared", _moved(journal.get("prepared"), done.study.workspace, workspace))
    weights = done.study.trials[1].extra["weights"]
    os.rename(weights, f"{weights}.away")
    try:
        ran = heldout("reproduce", "s", "1", "--workspace", str(workspace))
    finally:
        os.rename(f"{weights}.away", weights)
    assert ran.returncode == 0, ran.stderr
    assert "weights: not compared" in ran.stdout and ran.stdout.splitlines()[-1] == "reproduced exactly"


def _moved(prepared: dict[str, Any], old: Path, new: Path) -> dict[str, Any]:
    return prepared | {key: prepared[key].replace(str(old), str(new)) for key in ("rows", "sealed")}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_record_of_something_else_gives_another_result_and_exit_code_1(
    done: Done, heldout: Heldout, tmp_path: Path
) -> None:
    """A record that does not hold: of another module text, and of other versions."""
    workspace = tmp_path / "ws"
    shutil.copytree(done.study.workspace, workspace)
    kept = Study("s", workspace)
    with Journal.open(kept.folder / "journal.sqlite") as journal:
        prepared = _moved(journal.get("prepared"), done.study.workspace, workspace)
        problem = prepared["problem"]
        less = problem["source"].replace("keras.optimizers.Adam(rate)", "keras.optimizers.SGD(rate / 1000)")
        journal.put("prepared", prepared | {"problem": problem | {"source": less}})
        meta = journal.get("study")
        journal.put("study", meta | {"versions": meta["versions"] | {"keras": "3.0.0"}})
        journal.put("selection", journal.get("selection") | {"noise_floor": 1e-6})
    ran = heldout("reproduce", "s", "2", "--workspace", str(workspace))
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "differs by" in ran.stdout and "beyond the noise floor of 1e-06" in ran.stdout
    assert "other versions: keras 3.0.0 then" in ran.stdout and "weights: not equal to the bit" in ran.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_failed_trials_and_custom_metrics_are_reproduced_as_well(tmp_path: Path, heldout: Heldout) -> None:
    options = ("--trials", "3", "--epochs", "2", "--confirm", "0", "--sampler", "random")
    done = launched(tmp_path, *options, objective='objective = "val_fair"\ndirection = "max"', build=CUSTOM)
    trials = done.study.trials
    assert {trial.state for trial in trials} == {TrialState.COMPLETE, TrialState.FAILED}
    for trial in trials:
        found = search.reproduce(done.study, trial.number)
        assert found["outcome"] == ("exact" if trial.state is TrialState.COMPLETE else "failed_again"), found
        assert found["now"]["score"] == trial.score and found["now"]["reason"] == trial.reason
    failed = next(trial for trial in trials if trial.state is TrialState.FAILED)
    ran = heldout("reproduce", "s", str(failed.number), "--workspace", str(done.study.workspace))
    assert ran.returncode == 0 and "fails again with the same reason: invalid" in ran.stdout
    with Journal.open(done.study.folder / "journal.sqlite") as journal:
        prepared = journal.get("prepared")
        mended = prepared["problem"]["source"].replace("raise ValueError('this kind cannot be built')", "pass")
        journal.put("prepared", prepared | {"problem": prepared["problem"] | {"source": mended}})
    found = search.reproduce(done.study, failed.number)
    assert (found["outcome"], found["reproduced"]) == ("succeeded_now", False)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_rows_that_are_gone_are_an_error_and_no_result(done: Done, tmp_path: Path) -> None:
    workspace = tmp_path / "ws"
    shutil.copytree(done.study.workspace, workspace)
    kept = Study("s", workspace)
    with Journal.open(kept.folder / "journal.sqlite") as journal:
        journal.put("prepared", _moved(journal.get("prepared"), done.study.workspace, workspace))
    shutil.rmtree(workspace / "rows")
    with pytest.raises(DataError, match="there must be stored rows"):
        search.reproduce(kept, 1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_only_trials_that_ended_can_be_reproduced(done: Done, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no trial 99; it has"):
        search.reproduce(done.study, 99)
    with done.study.journal() as journal:
        running = journal.history()[1].to_json() | {"state": "RUNNING"}

    class Running:
        def history(self) -> list[Any]:
            from search.trial import Trial

            return [Trial.from_json(running)]

        def get(self, key: str) -> None:
            return None

    with pytest.raises(StudyError, match="only a trial that has ended"):
        reproduction._record(done.study, Running(), 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("then", "now", "floor", "outcome"),
    [
        ({}, {}, None, "exact"),
        ({}, {"best_epoch": 2}, None, "same_score"),
        ({}, {"score": 0.91}, 0.02, "within_noise"),
        ({}, {"score": 0.91}, None, "differs"),
        ({}, {"score": 0.93}, 0.02, "differs"),
        ({}, {"state": "FAILED", "reason": "nan"}, None, "failed_now"),
        ({"state": "FAILED", "reason": "nan"}, {}, None, "succeeded_now"),
        ({"state": "FAILED", "reason": "nan"}, {"state": "FAILED", "reason": "nan"}, None, "failed_again"),
        ({"state": "FAILED", "reason": "lost"}, {"state": "FAILED", "reason": "nan"}, None, "failed_otherwise"),
    ],
)
def test_every_outcome_has_its_name(
    then: dict[str, Any], now: dict[str, Any], floor: float | None, outcome: str
) -> None:
    ended = {"state": "COMPLETE", "score": 0.9, "epochs": 3, "best_epoch": 3, "reason": None, "message": None}
    old, new = ended | then, ended | now
    found = {"then": old, "now": new, "difference": new["score"] - old["score"], "noise_floor": floor}
    found |= {"reports": {"difference": 0.0}, "weights": None}
    assert reproduction._outcome(found, True)[0] == outcome


def test_reports_are_compared_with_what_is_no_number() -> None:
    nan, inf = float("nan"), float("inf")
    same = {1: {"loss": nan, "top": inf}, 2: {"loss": 0.5}}
    assert reproduction._compared(same, dict(same))["difference"] == 0.0
    found = reproduction._compared(same, {1: {"loss": 0.5, "top": inf}, 2: {"loss": 0.4}})
    assert found == {"difference": inf, "metric": "loss", "epoch": 1, "epochs": 2}
    assert reproduction._compared(same, {})["difference"] is None


def test_weights_are_compared_by_their_bits(tmp_path: Path) -> None:
    for name, value in (("one", 0.0), ("same", 0.0), ("minus", -0.0)):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file.create_group("layers")["w"] = np.array([value, np.nan], dtype="float32")
    (tmp_path / "torn.h5").write_bytes(b"no such file")

    def equal(name: str) -> bool | None:
        return reproduction._same_weights(str(tmp_path / "one.h5"), str(tmp_path / f"{name}.h5"))

    assert (equal("same"), equal("minus"), equal("torn"), equal("absent")) == (True, False, None, None)


# ── seeds and determinism ────────────────────────────────────────────────────────────────────────

SEEDED = (
    "def build(hp):\n"
    "    from tensorflow.python.framework import config\n"
    "    print('deterministic', config.is_op_determinism_enabled())\n"
    "    print('draws', random.random(), np.random.random(), flush=True)\n"
    "    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, activation='softmax')])\n"
    "    print('weights', model.layers[0].kernel.numpy().sum(), flush=True)\n"
    "    model.compile('adam', 'sparse_categorical_crossentropy', metrics=['accuracy'])\n"
    "    return model"
)


def test_seeds_of_keras_numpy_and_python_come_from_study_seed_and_trial_number(tmp_path: Path) -> None:
    # Recorded studies count on these: another derivation would make other trials of the same study seed.
    assert [seed_for(0, 0), seed_for(0, 1), seed_for(1, 0)] == [1725501518, 1021735874, 864339161]
    problem = find(write_space(tmp_path, build=SEEDED, imports="import random\n" + PARTS["imports"]))
    with jobs.start_executor(devices.slots(1, "none"), problem, tmp_path, None) as executor:
        prepared = jobs.prepare(executor, problem, tmp_path / "ws", tmp_path, 0, Silent())

        def said(name: str, **asked: Any) -> dict[str, list[str]]:
            log = tmp_path / f"{name}.txt"
            payload = jobs.base_payload(prepared, tmp_path) | {"epochs": 1, "default": True} | asked
            executor.submit(Job(name, "trial", payload, log=str(log)), executor.slots[0])
            while not any(isinstance(event, Exited) for event in executor.poll(1.0)):
                pass
            return {line.split()[0]: line.split()[1:] for line in log.read_text().splitlines() if " " in line}

        one, again = said("one", seed=seed_for(5, 2)), said("again", seed=seed_for(5, 2), deterministic=True)
        other = said("other", seed=seed_for(5, 3))
    expected = [random.Random(seed_for(5, 2)).random(), np.random.RandomState(seed_for(5, 2)).random_sample()]
    assert [float(word) for word in one["draws"]] == expected
    assert one["draws"] == again["draws"] != other["draws"]
    assert one["weights"] == again["weights"] != other["weights"]
    assert (one["deterministic"], again["deterministic"]) == (["False"], ["True"])


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf"), True])
def test_minutes_between_checkpoints_are_checked(minutes: Any) -> None:
    with pytest.raises(RequestError, match="--checkpoint-minutes must be a number above 0"):
        StudyConfig(space="x", checkpoint_minutes=minutes)
    assert StudyConfig(space="x", checkpoint_minutes=0.5).checkpoint_minutes == 0.5

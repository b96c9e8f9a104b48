"""Rows that are larger than a trial may copy: training, predicting and preprocessing them, and what stays sealed."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from search import Study
from search.definition.problem import SpaceModule, find
from search.definition.tracing import TracingHyperParameters
from search.errors import RequestError, TrialFailed
from search.harness import feeding, predicting, training, worker
from search.processes import jobs
from search.tiers.data import OpenRows, SealedRows, prepare
from search.tiers.store import open_structure
from tests.conftest import ROOT, Heldout
from tests.tiny import write_space

FILES = {
    "imports": "import json, os, pathlib, sys\n\nimport keras\nimport numpy as np\n\nfrom search import Dataset",
    "load": (
        "FOLDER = pathlib.Path(__file__).parent / 'pictures'\n\n\n"
        "def load():\n"
        "    paths, y = [], []\n"
        "    for number in range(240):\n"
        "        kind = ('cat', 'dog')[number // 120]\n"
        "        path = FOLDER / kind / f'{kind}-{number}.npy'\n"
        "        path.parent.mkdir(parents=True, exist_ok=True)\n"
        "        x = np.random.default_rng(number).normal(size=4).astype('float32')\n"
        "        x[0] += number // 120 * 3\n"
        "        np.save(path, x, allow_pickle=False)\n"
        "        paths.append(path)\n"
        "        y.append(number // 120)\n"
        "    return Dataset(paths, np.array(y))\n\n\n"
        "def decode(path):\n"
        "    return np.load(path)"
    ),
}
STREAMS = {
    "imports": FILES["imports"],
    "load": (
        "class Batches(keras.utils.PyDataset):\n"
        "    def __init__(self, seed, labelled):\n"
        "        super().__init__()\n"
        "        self.seed, self.labelled = seed, labelled\n\n"
        "    def __len__(self):\n"
        "        return 4\n\n"
        "    def __getitem__(self, number):\n"
        "        x = np.random.default_rng((self.seed, number)).normal(size=(40, 4)).astype('float32')\n"
        "        return (x, labels(x)) if self.labelled else x\n\n\n"
        "def labels(x):\n"
        "    return (x[:, 0] > 0).astype('int64')\n\n\n"
        "def load():\n"
        "    def sealed(seed):\n"
        "        batches = Batches(seed, False)\n"
        "        y = np.concatenate([labels(batches[n]) for n in range(4)])\n"
        "        return (lambda: Batches(seed, False), y)\n\n"
        "    valid = Dataset(lambda: Batches(1, True))\n"
        "    return Dataset(lambda: Batches(0, True), validation=valid, guard=sealed(2), test=sealed(3))"
    ),
}


class Running:
    """A trial's parts, made without a process."""

    def __init__(self, folder: Path, name: str, **parts: str) -> None:
        self.module = SpaceModule(find(write_space(folder, name, **parts)))
        manifest = prepare(self.module.load(), folder / "ws", 0, False, self.module.decode, name)
        self.rows = OpenRows(folder / "ws" / "rows" / manifest["digest"], self.module.decode)
        self.sealed = SealedRows(folder / "ws" / "sealed" / manifest["digest"])
        self.hp = TracingHyperParameters(None, 3, True)
        keras.utils.set_random_seed(3)
        self.model = training.build(self.module, self.hp)

    def fit(self, budget: int) -> training.Fitted:
        asked: dict[str, Any] = {"objective": "val_accuracy", "direction": "max", "epochs": 3, "seed": 3}
        return training.fit(
            self.module, self.model, self.hp, self.rows, None, budget=budget, send=lambda body: None, **asked
        )

    def predict(self, folder: Path, budget: int) -> list[np.ndarray]:
        folder.mkdir()
        found = worker.predictions(self.model, self.rows, None, ("validation", "guard"), folder, budget)
        assert sorted(path.name for path in folder.iterdir()) == ["guard_0.npy", "validation_0.npy"]
        return [np.load(found[tier][0], allow_pickle=False) for tier in ("validation", "guard")]


@pytest.mark.parametrize("parts", [FILES, STREAMS], ids=["files", "streams"])
def test_rows_train_and_predict_alike_whether_in_memory_or_read_batch_by_batch(
    tmp_path: Path, parts: dict[str, str]
) -> None:
    held, read = Running(tmp_path, "held", **parts), Running(tmp_path, "read", **parts)
    held.fit(1 << 30)
    read.fit(0)
    for one, other in zip(held.model.get_weights(), read.model.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)  # float32, in one order of rows
    whole, streamed = held.predict(tmp_path / "a", 1 << 30), held.predict(tmp_path / "b", 0)
    for one, other, tier in zip(whole, streamed, ("validation", "guard"), strict=True):
        assert len(one) == held.rows.size(tier)
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("parts", [FILES, STREAMS], ids=["files", "streams"])
def test_predictions_are_in_the_order_of_the_labels(tmp_path: Path, parts: dict[str, str]) -> None:
    running = Running(tmp_path, "ordered", **parts)
    out = keras.layers.Lambda(lambda x: x[:, :1])
    model = keras.Sequential([keras.Input((4,)), out])
    found = worker.predictions(model, running.rows, None, ("validation", "guard"), tmp_path, 0)
    test = open_structure(running.sealed.feature_files(), running.module.decode)
    for tier in ("validation", "guard", "test"):
        first = test[:][:, 0] if tier == "test" else np.load(found[tier][0], allow_pickle=False)[:, 0]
        labels = running.rows.labels(tier) if tier == "validation" else running.sealed.labels(tier)
        assert np.corrcoef(first, labels)[0, 1] > 0.7


def test_a_model_that_loses_rows_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Lambda(lambda x: x[1:])])
    x = np.zeros((90, 4), "float32")
    with pytest.raises(TrialFailed, match="one row per example, but returned 89 rows for 90"):
        predicting.save(model, lambda at: x[at], 90, tmp_path, "guard")
    assert not list(tmp_path.iterdir())


def test_every_output_has_its_file(tmp_path: Path) -> None:
    inputs = keras.Input((4,))
    parts = {"b": keras.layers.Dense(1)(inputs), "a": keras.layers.Dense(2)(inputs)}
    model = keras.Model(inputs, parts)
    x = np.random.default_rng(0).normal(size=(3000, 4)).astype("float32")
    streamed = predicting.save(model, lambda at: x[at], 3000, tmp_path, "streamed")
    whole = training.predict(model, x)
    assert [np.load(path, allow_pickle=False).shape for path in streamed] == [part.shape for part in whole]
    for path, part in zip(streamed, whole, strict=True):
        np.testing.assert_allclose(np.load(path, allow_pickle=False), part, rtol=1e-5, atol=1e-6)


def test_preprocessing_adapts_to_batches_as_to_arrays(tmp_path: Path) -> None:
    running = Running(tmp_path, "adapting", **FILES)
    mapped = feeding.for_preprocess(Running(tmp_path, "mapping", **STREAMS).rows, 0).x
    assert isinstance(mapped, np.memmap) and mapped.shape == (160, 4) and not mapped.flags.writeable
    means = []
    for budget in (1 << 30, 0):
        train = feeding.for_preprocess(running.rows, budget)
        assert isinstance(train.x, np.ndarray) == bool(budget)
        layer = keras.layers.Normalization()
        layer.adapt(train.x)
        means.append(np.asarray(layer.mean))
    np.testing.assert_allclose(*means, rtol=1e-5)
    np.testing.assert_allclose(means[0][0], running.rows.features("train").mean(axis=0), rtol=1e-5)
    seen = list(feeding.parts(running.rows, "guard", None))
    assert (np.concatenate(seen) == running.rows.features("guard")).all()


def test_the_share_of_a_slot_shrinks_with_slots_beyond_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = os.cpu_count() or 1
    assert jobs.budget(1) == jobs.budget(cores) > 0
    assert jobs.budget(cores * 4) * 4 <= jobs.budget(cores)
    monkeypatch.setenv("HELDOUT_ROWS_IN_MEMORY", "2M")
    assert jobs.budget(64) == 2 << 20
    monkeypatch.setenv("HELDOUT_ROWS_IN_MEMORY", "some")
    with pytest.raises(RequestError, match="HELDOUT_ROWS_IN_MEMORY must be a size"):
        jobs.budget()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss in kilobytes")
def test_a_trial_of_large_rows_stays_within_bounds(tmp_path: Path) -> None:
    """A process trains and predicts on 300 MB of decoded files.

    With all rows in memory it grows by 240 MB for train rows, and as much again for TensorFlow's copy. What TensorFlow
    takes besides depends on its version, so the two are compared.
    """
    space = write_space(
        tmp_path,
        "large",
        imports="import pathlib\n\n" + FILES["imports"],
        load=(
            "def load():\n"
            "    folder = pathlib.Path(__file__).parent\n"
            "    for number in range(300):\n"
            "        np.save(folder / f'{number}.npy', np.array([number, number % 2]), allow_pickle=False)\n"
            "    return Dataset([folder / f'{n}.npy' for n in range(300)], np.arange(300) % 2)\n\n\n"
            "def decode(path):\n"
            "    number, kind = np.load(path)\n"
            "    x = np.random.default_rng(number).normal(size=262144).astype('float32')\n"
            "    x[:1000] += kind\n"
            "    return x"
        ),
        build=(
            "def build(hp):\n"
            "    model = keras.Sequential([keras.Input((262144,)), keras.layers.Dense(2, activation='softmax')])\n"
            "    model.compile('sgd', 'sparse_categorical_crossentropy', metrics=['accuracy'])\n"
            "    return model"
        ),
    )
    script = (
        "import resource, sys; from pathlib import Path; import numpy as np\n"
        "from search.definition import problem; from search.harness import worker; from search.processes import jobs\n"
        "found, folder = problem.find(sys.argv[1]), Path(sys.argv[2])\n"
        "asked = jobs.load_payload(found, folder, folder, 0) | {'budget': 0}\n"
        "prepared = jobs.completed(worker.load(asked, lambda body: None), found)\n"
        "most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10\n"
        "payload = jobs.base_payload(prepared, folder) | {'budget': int(sys.argv[3]), 'seed': 0, 'epochs': 2}\n"
        "before = most()\n"
        "result = worker.trial(payload, lambda body: None)\n"
        "print(len(np.load(result['predictions']['guard'][0])), most() - before)"
    )
    env, grown = {**os.environ, "PYTHONPATH": str(ROOT)}, []
    for budget in (0, 1 << 40):
        command = [sys.executable, "-c", script, space, str(tmp_path / "ws"), str(budget)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        assert done.returncode == 0, done.stderr
        rows, megabytes = map(int, done.stdout.split()[-2:])
        assert rows == 30
        grown.append(megabytes)
    assert grown[0] + 150 < grown[1], grown


PRYING = """
class Prying(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        fds = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        descriptors = [os.readlink(fd) for fd in fds if os.path.exists(fd)]
        handed, frame = [], sys._getframe()
        while frame is not None:  # whatever any caller was given, as text
            handed += [repr(value) for name, value in frame.f_locals.items() if name not in ("handed", "frame")]
            frame = frame.f_back
        mapped = open("/proc/self/maps").read()
        asked = [[path, os.path.realpath(path), os.stat(path).st_nlink] for path in ASKED]
        print("SEEN", json.dumps([sys.argv, dict(os.environ), descriptors, mapped, asked, handed]))


def callbacks(hp):
    return [Prying()]


ASKED = []
"""
PRYING_DECODE = FILES["load"].replace("    return np.load(path)", "    ASKED.append(path)\n    return np.load(path)")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc, which Linux has")
def test_no_path_that_a_trial_is_handed_leads_to_a_class(tmp_path: Path, heldout: Heldout) -> None:
    space = write_space(tmp_path, "prying", **{**FILES, "load": PRYING_DECODE, "rest": PRYING})
    where = ("--workspace", str(tmp_path / "ws"), "--study", "pry")
    small = {"HELDOUT_ROWS_IN_MEMORY": "1K"}
    ran = heldout("launch", space, "--trials", "2", "--confirm", "0", *where, **small)
    assert ran.returncode == 0, ran.stderr
    study = Study("pry", tmp_path / "ws")
    prepared = study.meta("prepared")
    for number in (0, 1):
        log = (study.folder / "trials" / f"{number:04d}" / "log.txt").read_text()
        (*_, last) = [line for line in log.splitlines() if line.startswith("SEEN")]
        seen = json.loads(last.removeprefix("SEEN "))
        told = json.dumps([part for part in seen if part != seen[5]] + [t for t in seen[5] if "def decode" not in t])
        assert "pictures" not in told and "cat-" not in told and "/dog" not in told
        assert str(tmp_path / "ws" / "sealed") not in log
        asked = [path for path, _, _ in seen[4]]
        assert asked and all(path.startswith(prepared["rows"]) and path.endswith(".npy") for path in asked)
        assert all(Path(path).stem.isdecimal() and real == path for path, real, _ in seen[4])
    guard = OpenRows(Path(prepared["rows"])).index("guard")
    names = OpenRows(Path(prepared["rows"])).pool()[0].paths
    assert all(os.stat(names[at]).st_nlink == 1 for at in guard)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [FILES, STREAMS], ids=["files", "streams"])
def test_a_study_of_large_rows_is_tested_exported_refitted_and_reproduced(
    tmp_path: Path, heldout: Heldout, parts: dict[str, str]
) -> None:
    run = functools.partial(heldout, HELDOUT_ROWS_IN_MEMORY="1K", timeout=600)
    where = ("--workspace", str(tmp_path / "ws"))
    space = write_space(tmp_path, "large", **parts)
    ran = run("launch", space, "--trials", "3", "--confirm", "0", "--study", "s", "--json", *where)
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert report["trials"]["complete"] == 3 and report["test"]["winner"] > 0.5
    out = run("export", "s", "--out", str(tmp_path / "best"), "--json", *where)
    assert out.returncode == 0, out.stderr
    scores = json.loads(out.stdout)["scores"]
    assert scores["test"]["score"] == report["test"]["winner"]
    card = (tmp_path / "best" / "MODEL_CARD.md").read_text()
    assert ("decode(path)" in card) == (parts is FILES)
    model = keras.models.load_model(tmp_path / "best" / "model.keras")
    assert model.predict(np.zeros((2, 4), "float32"), verbose=0).shape == (2, 2)
    every = run("export", "s", "--final", "all", "--out", str(tmp_path / "all"), *where)
    assert every.returncode == 0, every.stderr
    again = run("reproduce", "s", "1", *where)
    assert again.returncode == 0, again.stdout + again.stderr

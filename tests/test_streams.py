"""Rows that functions give in batches: read twice, spooled to disk, and from then on rows like any others."""

from __future__ import annotations

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from search.errors import DataError
from search.tiers.data import Dataset, OpenRows, SealedRows, prepare

TIERS = ("train", "validation", "guard", "test")


class Batches(keras.utils.PyDataset):
    """Batches of arrays, in Keras' own manner."""

    def __init__(self, *parts, batch=32):
        super().__init__()
        self.parts, self.batch = parts, batch

    def __len__(self):
        return -(-len(self.parts[0]) // self.batch)

    def __getitem__(self, number):
        at = slice(number * self.batch, (number + 1) * self.batch)
        found = tuple(part[at] for part in self.parts)
        return found if len(found) > 1 else found[0]


def problem(n=600, width=4, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, width)).astype("float32"), rng.integers(0, 3, n)


def as_tf(*parts, batch=32):
    return tf.data.Dataset.from_tensor_slices(parts if len(parts) > 1 else parts[0]).batch(batch)


def stored(workspace, dataset):
    manifest = prepare(dataset, workspace, 0, False)
    digest = manifest["digest"]
    return manifest, OpenRows(workspace / "rows" / digest), SealedRows(workspace / "sealed" / digest)


def refusal(dataset, workspace):
    with pytest.raises(DataError) as caught:
        prepare(dataset, workspace, 0, False)
    assert "\n" not in str(caught.value)
    assert not [path for path in workspace.rglob("*") if path.is_file() or path.name.startswith(".tmp")]
    return str(caught.value)


@pytest.mark.parametrize("kind", [as_tf, Batches])
def test_a_function_for_all_rows_is_as_good_as_their_arrays(tmp_path, kind):
    x, y = problem()
    by_arrays = prepare(Dataset(x, y), tmp_path, 0, False)
    assert prepare(Dataset(lambda: kind(x, y)), tmp_path, 0, False) == by_arrays
    assert prepare(Dataset(lambda: kind(x), y), tmp_path, 0, False) == by_arrays
    assert [path.name for path in (tmp_path / "rows").iterdir()] == [by_arrays["digest"]]


@pytest.mark.parametrize("kind", [as_tf, Batches])
def test_a_function_per_tier_is_taken_as_given(tmp_path, kind):
    parts = {tier: problem(200, seed=seed) for seed, tier in enumerate(TIERS)}
    x, y = parts["train"]
    own = Dataset(
        lambda: kind(x, y),
        validation=Dataset(lambda: kind(*parts["validation"])),
        guard=(lambda: kind(parts["guard"][0]), parts["guard"][1]),
        test=(lambda: kind(parts["test"][0]), parts["test"][1]),
    )
    manifest, rows, sealed = stored(tmp_path, own)
    assert manifest["tiers"] == dict.fromkeys(TIERS, 200)
    assert manifest["supplied"] == ["validation", "guard", "test"]
    for tier in TIERS:
        features = sealed.features("test") if tier == "test" else rows.features(tier)
        labels = rows.labels(tier) if tier in TIERS[:2] else sealed.labels(tier)
        assert (features == parts[tier][0]).all() and (labels == parts[tier][1]).all()
    arrays = {tier: parts[tier] for tier in TIERS[1:]}
    assert prepare(Dataset(x, y, **arrays), tmp_path, 0, False) == manifest


def test_structures_weights_and_groups_come_along(tmp_path):
    x, y = problem()
    weight = np.arange(600, dtype="float32")

    def batches():
        return tf.data.Dataset.from_tensor_slices(({"a": x, "b": x[:, :1]}, (y, x[:, 0]), weight)).batch(50)

    manifest, rows, _ = stored(tmp_path, Dataset(batches, groups=np.arange(600) // 2))
    assert manifest["x"]["names"] == ["a", "b"] and manifest["y"]["kind"] == "tuple" and manifest["grouped"]
    numbers = rows.weights().astype(int)
    assert (rows.features("train")["a"] == x[numbers]).all() and (rows.labels("train")[0] == y[numbers]).all()
    assert (rows.labels("train")[1] == x[numbers, 0]).all()


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(1, 599), max_size=8, unique=True))
def test_rows_keep_their_order_however_they_are_cut_into_batches(tmp_path_factory, cuts):
    x, y = problem()
    folder = tmp_path_factory.mktemp("cuts")
    edges = [0, *sorted(cuts), 600]

    class Cut(Batches):
        def __len__(self):
            return len(edges) - 1

        def __getitem__(self, number):
            return x[edges[number] : edges[number + 1]], y[edges[number] : edges[number + 1]]

    assert prepare(Dataset(lambda: Cut(x)), folder, 0, False) == prepare(Dataset(x, y), folder, 0, False)


def once(x, y):
    """A function whose source is used up after one pass."""
    source = iter(as_tf(x, y).as_numpy_iterator())
    like = as_tf(x, y).element_spec
    return lambda: tf.data.Dataset.from_generator(lambda: source, output_signature=like)


def fewer_and_fewer(x, y):
    passes = iter([600, 568])
    return lambda: as_tf(x, y).unbatch().take(next(passes)).batch(32)


def raising(x, y):
    raise KeyError("no such shard")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, y: Dataset(fewer_and_fewer(x, y)), ["600 rows on the first and 568 on the second", "anew"]),
        (lambda x, y: Dataset(once(x, y)), ["600 rows on the first and 0 on the second"]),
        (lambda x, y: Dataset(lambda: as_tf(x, y).shuffle(20)), ["same order", "drop shuffle()"]),
        (lambda x, y: Dataset(lambda: as_tf(x + np.random.normal(), y)), ["same rows", "augmentation into the model"]),
        (lambda x, y: Dataset(lambda: as_tf(x, y).repeat()), ["goes on for ever", "drop repeat()"]),
        (lambda x, y: Dataset(lambda: as_tf(x, y).take(0)), ["x must give rows", "gave none"]),
        (lambda x, y: Dataset(lambda: iter([(x, y)])), ["tf.data.Dataset or a keras.utils.PyDataset", "list_iterator"]),
        (lambda x, y: Dataset(lambda: raising(x, y)), ["KeyError", "no such shard"]),
        (lambda x, y: Dataset(as_tf(x, y)), ["give the function that makes it", "x=lambda: dataset"]),
        (lambda x, y: Dataset(Batches(x, y)), ["is a Batches", "x=lambda: dataset"]),
        (lambda x, y: Dataset(lambda: as_tf(x, y).unbatch()), ["one row per example", ".batch(256)"]),
        (lambda x, y: Dataset(lambda: as_tf(x)), ["(x, y) or (x, y, sample_weight)", "ndarray"]),
        (lambda x, y: Dataset(lambda: as_tf(x, y), y), ["features only", "2 parts"]),
        (lambda x, y: Dataset(lambda: as_tf(x), y[:-5]), ["x has 600", "y has 595"]),
        (lambda x, y: Dataset(lambda: as_tf(x.astype(str)), y), ["numbers of one shape", "encode text"]),
        (lambda x, y: Dataset(lambda: as_tf(x, y), test=Dataset(lambda: as_tf(x, y))), ["labels of test", "sealed"]),
        (lambda x, y: Dataset(lambda: as_tf(x, y), guard=(lambda: as_tf(x, y), y)), ["guard.x must give features"]),
        (lambda x, y: Dataset(lambda: as_tf(x, y), test=(x + 1, y)), ["must all be functions, or none"]),
        (lambda x, y: Dataset(lambda: as_tf(x, y), test=(lambda: as_tf(x[:, :3]), y)), ["one shape", "(4,)", "(3,)"]),
        (lambda x, y: Dataset(lambda: as_tf(x, y), test=(lambda: as_tf(x), y)), ["no row may be in two tiers"]),
        (lambda x, y: Dataset(lambda: as_tf(x, y), guard=(lambda: as_tf(x), y)), ["600 rows (0, 1, 2", "of guard"]),
    ],
)
def test_bad_functions_get_one_clear_line(tmp_path, change, words):
    message = refusal(change(*problem()), tmp_path)
    assert all(word in message for word in words), message


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    script = (
        "import resource, sys, pathlib, numpy as np, keras; from search.tiers import data\n"
        "from tests.test_streams import Batches\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n"
        "x = np.random.default_rng(0).normal(size=(5000, 4))\n"
        "rows = data.Dataset(lambda: Batches(x, np.arange(5000) % 2))\n"
        "try: data.prepare(rows, pathlib.Path(sys.argv[1]), 0, False)\n"
        "except data.DataError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "must be stored under" in done.stdout
    assert not [path for path in tmp_path.rglob("*") if path.name not in ("rows", "sealed")]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_bounded_by_a_batch(tmp_path):
    """480 MB pass through a process that never holds a fifth of them; mapped pages, which are the kernel's, aside."""
    script = (
        "import pathlib, re, sys, threading, time, numpy as np, keras; from search.tiers import data\n"
        "from tests.test_streams import Batches\n"
        "def held():\n"
        "    return int(re.search(r'RssAnon:\\s+(\\d+)', pathlib.Path('/proc/self/status').read_text())[1]) >> 10\n"
        "class Large(Batches):\n"
        "    def __len__(self): return 60\n"
        "    def __getitem__(self, n):\n"
        "        x = np.random.default_rng(n).normal(size=(20, 100_000)).astype('float32')\n"
        "        return x, np.arange(20) % 2\n"
        "most, before, over = [0], held(), threading.Event()\n"
        "def watch():\n"
        "    while not over.wait(0.01): most[0] = max(most[0], held())\n"
        "watcher = threading.Thread(target=watch); watcher.start()\n"
        "found = data.prepare(data.Dataset(lambda: Large(())), pathlib.Path(sys.argv[1]), 0, False)\n"
        "over.set(); watcher.join()\n"
        "print(found['rows'], most[0] - before)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    rows, grown = map(int, done.stdout.split())
    assert rows == 1200 and grown < 96, (rows, grown)

"""Stored rows: what is refused, what is kept, and that sealed labels are nowhere a trial can look."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pytest

from search.errors import DataError
from search.tiers import data
from search.tiers.data import Dataset, OpenRows, SealedError, SealedRows, load_structure, prepare

TIERS = ("train", "validation", "guard", "test")


def problem(n=600, width=4, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, width)), rng.integers(0, classes, n)


def stored(workspace, dataset, split_seed=0, allow_nan=False):
    manifest = prepare(dataset, workspace, split_seed, allow_nan)
    digest = manifest["digest"]
    return manifest, OpenRows(workspace / "rows" / digest), SealedRows(workspace / "sealed" / digest)


def refusal(dataset, workspace, allow_nan=False):
    """The message a Dataset is refused with; one line, and nothing on disk."""
    with pytest.raises(DataError) as caught:
        prepare(dataset, workspace, 0, allow_nan)
    assert "\n" not in str(caught.value)
    assert not list(workspace.rglob("*.npy"))
    return str(caught.value)


def test_every_row_is_in_exactly_one_tier_with_its_label(tmp_path):
    x, y = problem()
    manifest, rows, sealed = stored(tmp_path, Dataset(x, y))
    assert manifest["tiers"] == {"train": 360, "validation": 60, "guard": 60, "test": 120}
    label_of = {row.tobytes(): label for row, label in zip(x, y, strict=True)}
    seen = []
    for tier in TIERS:
        features = sealed.features("test") if tier == "test" else rows.features(tier)
        labels = rows.labels(tier) if tier in ("train", "validation") else sealed.labels(tier)
        assert len(features) == len(labels) == manifest["tiers"][tier]
        assert all(label_of[f.tobytes()] == label for f, label in zip(features, labels, strict=True))
        seen += [f.tobytes() for f in features]
    assert sorted(seen) == sorted(label_of)


def test_manifest_is_json_and_says_what_the_rows_are(tmp_path):
    x, y = problem()
    manifest, rows, _ = stored(tmp_path, Dataset(x.astype(np.float32), y))
    assert json.loads(json.dumps(manifest)) == manifest == rows.manifest | {"prior_openings": 0}
    assert manifest["x"] == {"kind": "array", "names": ["x"], "shapes": [[600, 4]], "dtypes": ["float32"]}
    assert (manifest["task"], manifest["classes"], manifest["has_nan"]) == ("classes", [0, 1, 2], False)
    assert [w.split(" (")[0] for w in manifest["warnings"]] == ["only 60 guard rows", "only 120 test rows"]


def test_same_rows_are_stored_once(tmp_path):
    x, y = problem()
    first = prepare(Dataset(x, y), tmp_path, 0, False)
    pool = tmp_path / "rows" / first["digest"] / "x_0.npy"
    before = pool.stat()
    assert prepare(Dataset(x.copy(), y.tolist()), tmp_path, 0, True) == first
    assert pool.stat() == before
    assert os.listdir(tmp_path / "rows") == [first["digest"]]


def test_digest_and_fingerprint_tell_what_changed(tmp_path):
    x, y = problem()
    base = prepare(Dataset(x, y), tmp_path, 0, False)
    order = np.random.default_rng(1).permutation(len(x))
    shuffled = prepare(Dataset(x[order], y[order]), tmp_path, 0, False)
    assert shuffled["fingerprint"] == base["fingerprint"]
    assert shuffled["digest"] != base["digest"]  # the order of rows is what trials are fed
    for other in (
        prepare(Dataset(x, y), tmp_path, 1, False),
        prepare(Dataset(x, (y + 1) % 3), tmp_path, 0, False),
        prepare(Dataset(x, y, sample_weight=np.ones(len(x))), tmp_path, 0, False),
    ):
        assert other["digest"] != base["digest"]


def test_no_sealed_value_is_in_what_trials_read(tmp_path):
    """Greps the bytes: each label and each test feature is a number found nowhere else."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(500, 3)), rng.normal(size=500)
    _, rows, sealed = stored(tmp_path, Dataset(x, y, groups=np.arange(500)))
    public = b"".join(path.read_bytes() for path in sorted(rows.path.iterdir()))
    assert all(value.tobytes() in public for value in rows.labels("train"))
    for tier in ("guard", "test"):
        assert not any(value.tobytes() in public for value in sealed.labels(tier))
    assert not any(value.tobytes() in public for value in sealed.features("test").ravel())
    assert all(value.tobytes() in public for value in rows.features("guard").ravel())
    assert not any(value.tobytes() in public for value in sealed.row_hashes())


def test_open_rows_offer_no_way_to_sealed_labels(tmp_path):
    _, rows, sealed = stored(tmp_path, Dataset(*problem()))
    for ask in (
        lambda: rows.labels("guard"),
        lambda: rows.labels("test"),
        lambda: rows.features("test"),
        lambda: rows.dataset("guard"),
        lambda: rows.label_files("guard"),
        lambda: rows.weights(tier="guard"),
    ):
        with pytest.raises(SealedError):
            ask()
    assert issubclass(SealedError, PermissionError)
    with pytest.raises(ValueError, match="OpenRows"):
        sealed.labels("train")


def test_sealed_files_are_the_owners_alone(tmp_path):
    _, rows, sealed = stored(tmp_path, Dataset(*problem()))
    assert sealed.path.parent.stat().st_mode & 0o777 == 0o700
    assert sealed.path.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in sealed.path.iterdir()} == {0o600}


def test_pool_is_mapped_read_only_and_gathered_as_copies(tmp_path):
    x, y = problem()
    _, rows, _ = stored(tmp_path, Dataset(x, y))
    (pool,) = rows.pool()
    assert isinstance(pool, np.memmap) and not pool.flags.writeable and len(pool) == 480
    some = rows.features("validation", np.array([5, 2]))
    assert (some == rows.features("validation")[[5, 2]]).all()
    some[:] = 0
    assert (rows.features("validation", np.array([5, 2])) != 0).all()
    assert (pool[rows.index("guard")] == rows.features("guard")).all()
    assert rows.nbytes("train") == rows.features("train").nbytes + rows.labels("train").nbytes
    assert rows.nbytes("guard") == rows.features("guard").nbytes


def test_structures_come_back_as_they_went(tmp_path):
    x, y = problem()
    text = np.array([f"word{k % 7}" for k in range(600)], dtype=object)
    dataset = Dataset({"a": x, "b": text}, (y, x[:, :1].astype(np.float32)), sample_weight=np.arange(600.0))
    manifest, rows, sealed = stored(tmp_path, dataset)
    assert manifest["x"] == {
        "kind": "dict",
        "names": ["a", "b"],
        "shapes": [[600, 4], [600]],
        "dtypes": ["float64", "<U5"],
    }
    features, labels = rows.features("train"), rows.labels("train")
    assert set(features) == {"a", "b"} and isinstance(labels, tuple)
    at = {row.tobytes(): k for k, row in enumerate(x)}
    numbers = np.array([at[row.tobytes()] for row in features["a"]])
    assert (features["b"] == text[numbers]).all() and (labels[0] == y[numbers]).all()
    assert (rows.weights() == numbers).all()
    assert (rows.weights(np.array([3, 1])) == numbers[[3, 1]]).all()
    train = rows.dataset("train")
    assert (train.sample_weight == numbers).all() and set(train.x) == {"a", "b"}
    assert [leaf.shape for leaf in sealed.labels("test")] == [(120,), (120, 1)]


def test_load_structure_reads_what_the_files_name(tmp_path):
    x, y = problem()
    _, rows, sealed = stored(tmp_path, Dataset({"a": x}, y))
    named = json.loads(
        json.dumps([rows.label_files("validation"), sealed.label_files("guard"), sealed.feature_files()])
    )
    assert (load_structure(named[0]) == rows.labels("validation")).all()
    assert (load_structure(named[1]) == sealed.labels("guard")).all()
    assert (load_structure(named[2])["a"] == sealed.features("test")["a"]).all()


def test_pandas_is_taken_as_numpy(tmp_path):
    pd = pytest.importorskip("pandas")
    x, y = problem()
    frame = pd.DataFrame(x).assign(flag=x[:, 0] > 0)  # mixed columns become an object array
    _, rows, _ = stored(tmp_path, Dataset(frame, pd.Series(y)))
    assert rows.features("train").shape == (360, 5) and rows.features("train").dtype == np.float64


def test_group_codes_are_kept_for_sealed_tiers(tmp_path):
    x, y = problem()
    manifest, _, sealed = stored(tmp_path, Dataset(x, y, groups=[f"g{k // 3}" for k in range(600)]))
    assert manifest["grouped"]
    for tier in ("guard", "test"):
        assert len(sealed.groups(tier)) == manifest["tiers"][tier]
    assert not set(sealed.groups("guard")) & set(sealed.groups("test"))


def test_rows_ordered_by_time_are_stored_in_that_order(tmp_path):
    x, y = problem()
    time = np.random.default_rng(0).permutation(600)
    x[:, 0] = time
    manifest, rows, sealed = stored(tmp_path, Dataset(x, y, time=time.astype("datetime64[D]")))
    assert manifest["ordered"]
    joined = np.concatenate([rows.features(t)[:, 0] for t in TIERS[:3]] + [sealed.features("test")[:, 0]])
    assert (joined == np.arange(600)).all()


def test_the_users_own_tiers_are_taken_as_given(tmp_path):
    x, y = problem(700)
    own = Dataset(x[:500], y[:500], validation=(x[500:600], y[500:600]), test=Dataset(x[600:], y[600:]))
    manifest, rows, sealed = stored(tmp_path, own)
    assert manifest["tiers"] == {"train": 450, "validation": 100, "guard": 50, "test": 100}
    assert manifest["supplied"] == ["validation", "test"]
    assert (rows.features("validation") == x[500:600]).all()
    assert (sealed.features("test") == x[600:]).all() and (sealed.labels("test") == y[600:]).all()


def test_guard_rows_of_the_users_are_taken_as_given(tmp_path):
    x, y = problem(700)
    own = Dataset(x[:500], y[:500], guard=(x[500:600], y[500:600]), test=(x[600:], y[600:]))
    manifest, rows, sealed = stored(tmp_path, own)
    assert manifest["tiers"] == {"train": 450, "validation": 50, "guard": 100, "test": 100}
    assert manifest["supplied"] == ["guard", "test"]
    assert (rows.features("guard") == x[500:600]).all() and (sealed.labels("guard") == y[500:600]).all()
    guard = x[500:600].copy()
    guard[4] = x[3]
    twice = Dataset(x[:500], y[:500], guard=(guard, y[500:600]))
    assert "1 row (4) of guard" in refusal(twice, tmp_path / "other")
    early = Dataset(x[:500], y[:500], time=np.arange(500), guard=Dataset(x[500:], y[500:], time=np.arange(200)))
    assert "guard rows must be later than all train rows" in refusal(early, tmp_path / "other")


def test_rows_of_the_users_tiers_that_are_elsewhere_too_are_an_error(tmp_path):
    x, y = problem(700)
    test = x[600:].copy()
    test[[3, 5]] = x[[10, 20]]
    message = refusal(Dataset(x[:600], y[:600], test=(test, y[600:])), tmp_path)
    assert "2 rows (3, 5) of test" in message
    groups = np.arange(700) // 2
    test = Dataset(x[600:], y[600:], groups=groups[600:] - 1)
    shared = refusal(Dataset(x[:600], y[:600], groups=groups[:600], test=test), tmp_path)
    assert "no group may be in two tiers, but 2 rows (0, 1)" in shared
    test = Dataset(x[600:], y[600:], time=np.arange(599, 699))
    late = Dataset(x[:600], y[:600], time=np.arange(600), test=test)
    assert "1 row (0) of test" in refusal(late, tmp_path)
    assert "rows of shape (4,)" in refusal(Dataset(x[:600], y[:600], test=(x[600:, :3], y[600:])), tmp_path)
    assert "test must be a pair" in refusal(Dataset(x, y, test=[1, 2, 3]), tmp_path)


def _nan(x):
    x = x.copy()
    x[3, 1] = np.nan
    return x


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, y: Dataset(x, y[:-1]), ["x has 600", "y has 599"]),
        (lambda x, y: Dataset({"a": x, "b": x[:5]}, y), ["x['a'] has 600", "x['b'] has 5"]),
        (lambda x, y: Dataset(_nan(x), y), ["x has NaN", "allow_nan = True"]),
        (lambda x, y: Dataset(x, _nan(x)[:, 1]), ["y has NaN", "1 of 600 rows"]),
        (
            lambda x, y: Dataset(x, np.array(["cat", "dog"])[y % 2]),
            ["'", "numpy.unique(labels, return_inverse=True)"],
        ),
        (lambda x, y: Dataset(x, np.array(["a", "b"], dtype=object)[y % 2]), ["return_inverse=True"]),
        (lambda x, y: Dataset(x, np.where(np.arange(600) < 7, 9, y)), ["class 9 with 7 rows", "in guard"]),
        (lambda x, y: Dataset(np.array([1, "a", None] * 200, dtype=object), y), ["x must be all numbers"]),
        (lambda x, y: Dataset(np.array([[1], [1, 2]] * 300, dtype=object), y), ["x must be all numbers"]),
        (lambda x, y: Dataset([[1], [1, 2]] * 300, y), ["rows of one shape"]),
        (lambda x, y: Dataset(x[:0], y[:0]), ["x must have rows"]),
        (lambda x, y: Dataset(3.0, y), ["x must be an array", "float"]),
        (lambda x, y: Dataset(x, object()), ["y must be an array", "object"]),
        (lambda x, y: Dataset(None, y), ["x must be arrays, but is None"]),
        (lambda x, y: Dataset(x * 1j, y), ["complex128"]),
        (lambda x, y: Dataset(x, y, groups=np.arange(5)), ["groups", "600"]),
        (lambda x, y: Dataset(x, y, time=_nan(x)[:, 1]), ["time", "NaN"]),
        (lambda x, y: Dataset(x, y, sample_weight=-np.ones(600)), ["sample_weight"]),
    ],
)
def test_bad_rows_get_one_clear_line(tmp_path, change, words):
    message = refusal(change(*problem()), tmp_path)
    assert all(word in message for word in words), message


def test_object_arrays_of_numbers_are_converted_and_missing_ones_count_as_nan(tmp_path):
    x, y = problem()
    manifest, rows, _ = stored(tmp_path, Dataset(x.astype(object), y))
    assert rows.features("train").dtype == np.float64
    holes = x.astype(object)
    holes[2, 2] = None
    assert "NaN" in refusal(Dataset(holes, y), tmp_path / "other")
    assert prepare(Dataset(holes, y), tmp_path, 0, True)["has_nan"]


def test_warnings_count_contradictions(tmp_path):
    x, y = problem()
    x[1], y[0], y[1] = x[0], 0, 1
    x[3], y[2], y[3] = x[2], 2, 2  # the same row twice is no contradiction
    manifest, _, _ = stored(tmp_path, Dataset(x, y))
    assert "2 rows (0, 1) have the same features as another row but a different label" in manifest["warnings"]


def test_an_unwritable_workspace_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="rows must be stored under .*--workspace"):
        prepare(Dataset(*problem()), tmp_path / "file", 0, False)


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    """A limit on file size stands in for the disk: the write fails in the middle of a file."""
    script = (
        "import resource, sys, pathlib, numpy as np; from search.tiers import data\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n"
        "x = np.random.default_rng(0).normal(size=(5000, 4))\n"
        "try: data.prepare(data.Dataset(x, np.arange(5000) % 2), pathlib.Path(sys.argv[1]), 0, False)\n"
        "except data.DataError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "must be stored under" in done.stdout
    assert [path for path in tmp_path.rglob("*") if path.name not in ("rows", "sealed")] == []


def _prepare_at_once(barrier, workspace, seed):
    barrier.wait()
    prepare(Dataset(*problem(20_000, 20, seed=seed)), workspace, 0, False)


def test_processes_that_store_the_same_rows_at_once_agree(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    processes = [context.Process(target=_prepare_at_once, args=(barrier, tmp_path, 0)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    (folder,) = (tmp_path / "rows").iterdir()
    (secret,) = (tmp_path / "sealed").iterdir()
    x, _ = problem(20_000, 20)
    found = [OpenRows(folder).features(t) for t in TIERS[:3]] + [SealedRows(secret).features()]
    assert sorted(r.tobytes() for r in np.concatenate(found)) == sorted(r.tobytes() for r in x)


def test_sealed_rows_lost_are_stored_again(tmp_path):
    x, y = problem()
    manifest, rows, sealed = stored(tmp_path, Dataset(x, y))
    labels = sealed.labels("test")
    sealed.path.rename(tmp_path / "moved")
    _, _, again = stored(tmp_path, Dataset(x, y))
    assert (again.labels("test") == labels).all()


def test_missing_rows_are_named(tmp_path):
    with pytest.raises(DataError, match="heldout launch"):
        OpenRows(tmp_path)


def test_the_module_offers_exactly_its_names():
    names = ["Dataset", "OpenRows", "SealedError", "SealedRows", "check_dividable", "labelled"]
    names += ["load_structure", "prepare"]
    assert data.__all__ == names

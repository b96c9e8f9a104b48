"""Rows that are files: what they are known by, what trials are handed of them, and what is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.errors import DataError
from search.tiers import store
from search.tiers.data import Dataset, OpenRows, SealedRows, prepare
from search.tiers.files import Files
from search.tiers.store import open_structure

CLASSES = ("cat", "dog", "horse")
ROWS = 300


def decode(path):
    """The array in a file, as float32."""
    return np.load(path).astype("float32")


def picture(number, kind, shape=(4, 3)):
    """A picture that is like no other, and whose corner says its class."""
    out = np.random.default_rng(number).integers(0, 200, shape).astype("uint8")
    out.flat[:3] = number % 251, number // 251, kind
    return out


def written(folder, rows=ROWS, suffix=".npy"):
    """Files in folders named after their classes, class by class; paths and labels."""
    paths, labels = [], []
    for kind, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(rows // len(CLASSES)):
            path = folder / name / f"{name}-{number:03d}{suffix}"
            with path.open("wb") as file:
                np.save(file, picture(len(paths), kind), allow_pickle=False)
            paths.append(path)
            labels.append(kind)
    return paths, np.array(labels)


def stored(workspace, dataset, split_seed=0, of=decode):
    manifest = prepare(dataset, workspace, split_seed, False, of, "space.py")
    digest = manifest["digest"]
    return manifest, OpenRows(workspace / "rows" / digest, of), SealedRows(workspace / "sealed" / digest)


def refusal(dataset, workspace, of=decode, allow_nan=False):
    with pytest.raises(DataError) as caught:
        prepare(dataset, workspace, 0, allow_nan, of, "space.py")
    assert "\n" not in str(caught.value)
    assert not list(workspace.rglob("*.npy")) and not list(workspace.rglob(".tmp*"))
    return str(caught.value)


def tier(rows, sealed, name):
    """Features and labels of a tier, by whoever has them."""
    if name == "test":
        return open_structure(sealed.feature_files(), decode)[:], sealed.labels("test")
    return rows.features(name), rows.labels(name) if name in ("train", "validation") else sealed.labels(name)


def test_every_file_is_in_one_tier_with_its_label(tmp_path):
    paths, y = written(tmp_path / "data")
    manifest, rows, sealed = stored(tmp_path / "ws", Dataset(paths, y))
    assert manifest["tiers"] == {"train": 180, "validation": 30, "guard": 30, "test": 60}
    assert manifest["x"]["shapes"] == [[ROWS, 4, 3]] and manifest["x"]["dtypes"] == ["float32"]
    assert manifest["x"]["files"] == [{"suffix": ".npy", "shape": [4, 3], "dtype": "float32"}]
    numbers = []
    for name in store.TIERS:
        features, labels = tier(rows, sealed, name)
        assert len(features) == len(labels) == manifest["tiers"][name]
        found = (features[:, 0, 0] + 251 * features[:, 0, 1]).astype(int)
        assert (labels == y[found]).all() and (features[:, 0, 2] == labels).all()
        assert all((row == picture(n, y[n])).all() for row, n in zip(features, found, strict=True))
        numbers += found.tolist()
    assert sorted(numbers) == list(range(ROWS))


def test_names_and_places_of_stored_files_say_nothing_of_their_class(tmp_path):
    paths, y = written(tmp_path / "data")
    manifest, rows, sealed = stored(tmp_path / "ws", Dataset(paths, y))
    for folder in (rows.path, sealed.path):
        names = [str(path.relative_to(folder)) for path in folder.rglob("*")]
        assert any(name.endswith("000000000.npy") for name in names)
        assert not any(kind in name for name in names for kind in CLASSES)
        assert not any(path.is_symlink() for path in folder.rglob("*"))  # which could be followed back
        assert not any(kind.encode() in path.read_bytes() for path in folder.glob("*.*") for kind in CLASSES)
    given = {(os.stat(path).st_dev, os.stat(path).st_ino) for path in paths}
    times = {os.stat(path).st_mtime_ns for path in paths}
    files, index = rows.pool()[0].paths, rows.index("guard")
    for path in [files[at] for at in index] + list((sealed.path / "test_x_0").rglob("0*.npy")):
        found = os.stat(path)
        assert (found.st_dev, found.st_ino) not in given and found.st_nlink == 1
        assert found.st_mtime_ns not in times
    # In the order of the list, the first third of guard rows would be cats. A run of 10 equal ones by chance: 3^-9.
    runs = "".join(map(str, sealed.labels("guard")))
    assert runs != "".join(sorted(runs)) and not any(str(kind) * 10 in runs for kind in range(3))


def test_large_data_are_there_once(tmp_path):
    paths, y = written(tmp_path / "data")
    _, rows, _ = stored(tmp_path / "ws", Dataset(paths, y))
    given = {os.stat(path).st_ino for path in paths}
    files = rows.pool()[0].paths
    for name in ("train", "validation"):
        assert all(os.stat(files[at]).st_ino in given for at in rows.index(name))


def test_files_on_another_disk_are_copied(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    paths, y = written(tmp_path / "data")
    _, rows, sealed = stored(tmp_path / "ws", Dataset(paths, y))
    shutil.rmtree(tmp_path / "data")
    for name in store.TIERS:
        features, labels = tier(rows, sealed, name)
        assert (features[:, 0, 2] == labels).all()


def test_a_file_is_known_by_its_bytes_alone(tmp_path):
    """Other names, another order and another decode move no row and are no new test rows."""
    paths, y = written(tmp_path / "data")
    first, rows, sealed = stored(tmp_path / "ws", Dataset(paths, y))
    other = []
    for number, path in enumerate(paths):
        other.append(tmp_path / f"renamed-{number}.bin")
        shutil.copyfile(path, other[-1])
    order = np.random.default_rng(0).permutation(ROWS)
    moved = prepare(Dataset([str(other[at]) for at in order], y[order]), tmp_path / "ws", 0, False, decode)
    assert moved["fingerprint"] == first["fingerprint"]
    assert moved["guard_fingerprint"] == first["guard_fingerprint"]
    halved = stored(tmp_path / "ws", Dataset(paths, y), of=lambda path: decode(path)[:2])
    assert halved[0]["fingerprint"] == first["fingerprint"] and halved[0]["digest"] != first["digest"]
    assert (halved[1].features("validation") == rows.features("validation")[:, :2]).all()
    assert prepare(Dataset(paths, y), tmp_path / "ws", 0, False, decode) == first


@settings(max_examples=25, deadline=None)
@given(copies=st.lists(st.tuples(st.integers(0, 59), st.integers(0, 59)), max_size=20), seed=st.integers(0, 99))
def test_duplicates_under_other_names_stay_in_one_tier(tmp_path_factory, copies, seed):
    folder = tmp_path_factory.mktemp("copies")
    paths = []
    for number in range(60):
        paths.append(folder / f"{number}.npy")
        np.save(paths[-1], picture(number, number % 2), allow_pickle=False)
    for source, to in copies:
        paths[to].write_bytes(paths[source].read_bytes())
    y = np.array([decode(path).flat[2] for path in paths]).astype(int)
    try:
        _, rows, sealed = stored(folder / "ws", Dataset(paths, y), split_seed=seed)
    except DataError as error:  # copies may leave a class or a tier with too little
        assert "every class" in str(error) or "every tier" in str(error)
        return
    seen = {}
    for name in store.TIERS:
        for row in tier(rows, sealed, name)[0]:
            assert seen.setdefault(row.tobytes(), name) == name


def test_a_test_file_that_is_elsewhere_under_another_name_is_refused(tmp_path):
    paths, y = written(tmp_path / "data")
    twin = tmp_path / "innocent.npy"
    shutil.copyfile(paths[7], twin)
    own = Dataset(paths[:240], y[:240], test=([*paths[240:], twin], [*y[240:], y[7]]))
    assert "1 row (60) of test" in refusal(own, tmp_path / "ws")


def test_re_encoded_copies_in_other_tiers_are_told(tmp_path):
    paths, y = written(tmp_path / "data")
    with open(tmp_path / "again.npy", "wb") as file:  # the same picture, in a file of other bytes
        np.lib.format.write_array(file, np.load(paths[0]), version=(2, 0))
    order = np.random.default_rng(0).permutation(np.arange(1, ROWS))
    rest, mine = [0, *order[:239]], order[239:]
    test = [*(paths[at] for at in mine), tmp_path / "again.npy"]
    own = Dataset([paths[at] for at in rest], y[rest], test=(test, [*y[mine], 0]))
    manifest = prepare(own, tmp_path / "ws", 0, False, decode)
    (told,) = [line for line in manifest["warnings"] if "decode to the same" in line]
    assert told.startswith("1 rows") and "cat-000.npy" in told and "again.npy" in told


def test_files_and_arrays_go_together(tmp_path):
    paths, y = written(tmp_path / "data")
    ages = np.arange(ROWS, dtype="float32")[:, None]
    manifest, rows, sealed = stored(tmp_path / "ws", Dataset({"picture": paths, "age": ages}, y))
    assert [spec is not None for spec in manifest["x"]["files"]] == [True, False]
    for name in ("train", "guard"):
        found = rows.features(name)
        assert (found["picture"][:, 0, 0] + 251 * found["picture"][:, 0, 1] == found["age"][:, 0]).all()
    test = open_structure(sealed.feature_files(), decode)[np.array([5, 2])]
    assert (test["picture"][:, 0, 0] + 251 * test["picture"][:, 0, 1] == test["age"][:, 0]).all()


def test_groups_times_and_weights_go_with_their_files(tmp_path):
    paths, y = written(tmp_path / "data")
    time = np.random.default_rng(0).permutation(ROWS)
    _, rows, sealed = stored(tmp_path / "ws", Dataset(paths, y, time=time, sample_weight=time))
    features = rows.features("train")
    numbers = (features[:, 0, 0] + 251 * features[:, 0, 1]).astype(int)
    assert (rows.weights() == time[numbers]).all() and (np.diff(time[numbers]) > 0).all()
    test = tier(rows, sealed, "test")[0]
    assert (time[(test[:, 0, 0] + 251 * test[:, 0, 1]).astype(int)] >= ROWS - 60).all()


def test_all_rows_are_merged_for_a_refit(tmp_path):
    paths, y = written(tmp_path / "data")
    _, rows, sealed = stored(tmp_path / "ws", Dataset(paths, y))
    folder = tmp_path / "ws" / "sealed" / ".refit"
    folder.mkdir()
    store.merged(rows.path, sealed.path, store.TIERS, folder)
    merged = OpenRows(folder, decode)
    features, labels = merged.features("train"), merged.labels("train")
    assert len(features) == ROWS and (features[:, 0, 2] == labels).all()
    assert sorted(row.tobytes() for row in features) == sorted(decode(path).tobytes() for path in paths)


def test_a_suffix_that_could_tell_the_class_is_left_out(tmp_path):
    paths, y = written(tmp_path / "data")
    for at, path in enumerate(paths[:100]):
        paths[at] = path.rename(path.with_suffix(".cat"))
    manifest, rows, _ = stored(tmp_path / "ws", Dataset(paths, y))
    assert manifest["x"]["files"][0]["suffix"] == ""
    assert all("." not in Path(path).name for path in rows.pool()[0].paths)
    assert (rows.features("guard", np.arange(3)).shape) == (3, 4, 3)


def test_a_file_that_was_changed_after_it_was_stored_is_noticed(tmp_path):
    paths, y = written(tmp_path / "data")
    _, rows, sealed = stored(tmp_path / "ws", Dataset(paths, y))
    for path in paths:
        np.save(path, np.zeros((4, 3), "uint8"), allow_pickle=False)
    with pytest.raises(DataError, match=r"was changed; launch again"):
        rows.features("train")
    assert (rows.features("guard")[:, 0, 2] == sealed.labels("guard")).all()


def test_a_file_that_is_written_again_as_it_was_is_the_same_row(tmp_path):
    """A module may make its files in ``load()``, which the next study of it calls again."""
    paths, y = written(tmp_path / "data")
    _, rows, _ = stored(tmp_path / "ws", Dataset(paths, y))
    before = rows.features("train")
    for path in paths:
        text = path.read_bytes()
        path.write_bytes(text)
        os.utime(path, ns=(0, 0))
    assert (rows.features("train") == before).all()


def test_labels_can_be_read_without_decoding(tmp_path):
    paths, y = written(tmp_path / "data")
    _, rows, _ = stored(tmp_path / "ws", Dataset(paths, y))
    closed = OpenRows(rows.path)
    assert (closed.labels("train") == rows.labels("train")).all()
    assert closed.nbytes("guard") == 30 * 12 * 4
    with pytest.raises(DataError, match="need the module's decode"):
        closed.features("guard")


def _first_of_another_shape(path):
    found = decode(path)
    return found[:2] if found.flat[0] == 7 else found


def _raises_on_one(path):
    if decode(path).flat[0] == 9:
        raise ValueError("truncated\nin the middle")
    return decode(path)


def _by_its_folder(path):
    return np.full(3, CLASSES.index(Path(path).parent.name), "float32")


@pytest.mark.parametrize(
    ("change", "of", "words"),
    [
        (lambda p, y: Dataset([*p[:-1], p[-1].with_name("gone")], y), decode, ["gone cannot be read", "No such"]),
        (lambda p, y: Dataset([*p[:-1], p[-1].parent], y), decode, ["horse cannot be read", "directory"]),
        (lambda p, y: Dataset(p, y), _first_of_another_shape, ["one shape", "(4, 3)", "(2, 3)", "cat-007", "resize"]),
        (lambda p, y: Dataset(p, y), _raises_on_one, ["ValueError", "cat-009.npy", "truncated", "mend the file"]),
        (lambda p, y: Dataset(p, y), _by_its_folder, ["ValueError", "cat-000.npy", "a neutral name"]),
        (lambda p, y: Dataset(p, y), lambda path: None, ["one array of numbers", "cat-000.npy"]),
        (lambda p, y: Dataset(p, y), lambda path: "text", ["one array of numbers"]),
        (lambda p, y: Dataset(p, y), None, ["x holds paths", "def decode(path)"]),
        (lambda p, y: Dataset(p, y[:-1]), decode, ["x has 300", "y has 299"]),
        (lambda p, y: Dataset(p, p), decode, ["y must"]),
        (lambda p, y: Dataset(p, y, test=(np.zeros((60, 4, 3)), y[:60])), decode, ["both hold paths"]),
        (lambda p, y: Dataset(p, y), lambda path: decode(path) * np.nan, ["x must be finite", "x has NaN"]),
    ],
)
def test_bad_files_get_one_clear_line(tmp_path, change, of, words):
    message = refusal(change(*written(tmp_path / "data")), tmp_path / "ws", of)
    assert all(word in message for word in words), message


def test_memory_stays_bounded_by_one_file_at_a_time(tmp_path):
    """400 files that decode to 1 MB each are split, sealed and stored by a process that never has 100 MB of them."""
    y = np.arange(400) % 2
    paths = []
    for number in range(400):
        paths.append(tmp_path / f"{number}.npy")
        np.save(paths[-1], np.array([number, y[number]]), allow_pickle=False)
    script = (
        "import sys, pathlib, resource, numpy as np\n"
        "from search.tiers import data, store\n"
        "def decode(path):\n"
        "    number, kind = np.load(path)\n"
        "    out = np.random.default_rng(number).normal(size=262144).astype('float32')\n"
        "    out[0] = kind\n"
        "    return out\n"
        "paths = [sys.argv[1] + f'/{n}.npy' for n in range(400)]\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "ws = pathlib.Path(sys.argv[1]) / 'ws'\n"
        "found = data.prepare(data.Dataset(paths, np.arange(400) % 2), ws, 0, False, decode)\n"
        "rows = data.OpenRows(ws / 'rows' / found['digest'], decode)\n"
        "labels = rows.labels('train')\n"
        "for at in range(rows.size('train')):\n"
        "    assert rows.features('train', np.array([at]))[0, 0] == labels[at]\n"
        "print(rows.nbytes('train'), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    whole, grown = map(int, done.stdout.split())
    unit = 1024 if sys.platform == "linux" else 1
    assert whole > 240 << 20 and grown * unit < 100 << 20, (whole, grown)


def test_a_leaf_of_files_is_indexed_as_an_array(tmp_path):
    paths, _ = written(tmp_path / "data")
    leaf = Files.given([str(path) for path in paths], decode, "x").checked("space.py")
    assert (len(leaf), leaf.shape, leaf.dtype, leaf.nbytes) == (ROWS, (ROWS, 4, 3), np.float32, ROWS * 48)
    assert (leaf[np.array([5, 0, 5])] == np.stack([decode(paths[at]) for at in (5, 0, 5)])).all()
    assert leaf[:2].shape == (2, 4, 3) and leaf[np.arange(0)].shape == (0, 4, 3)

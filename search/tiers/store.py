"""Rows on disk: one memory-mapped pool that trials read, sealed files that only the service reads.

    WORKSPACE/rows/DIGEST/     features of train, validation and guard, labels of train and validation
    WORKSPACE/sealed/DIGEST/   (0700) guard labels, test features and labels, and the groups, weights and hashes of both

Where rows are files, a folder of them under neutral names is in place of an ``.npy`` of features.

Both are written once, under a digest of everything that shaped them, and never changed.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from search.errors import DataError, HeldoutError
from search.tiers.files import Decode, Files
from search.tiers.rows import Array, Dataset, Hashes, Rows, Structure
from search.tiers.split import GUARD, TEST, TIERS, TRAIN, VALIDATION, Tiers

_HASHES = {GUARD: "guard_hashes", TEST: "row_hashes"}


class SealedError(HeldoutError, PermissionError):
    """Labels of guard or test rows, or test features, were asked of the rows that trials read."""


def write(rows: Rows, tiers: Tiers, identities: Hashes, manifest: Mapping[str, Any], home: Path, sealed: Path) -> None:
    """Write both folders under temporary names, then move them into place, the sealed one first.

    Args:
        tiers: Tier of each row, see ``split.TIERS``.
        identities: What the ledger knows each row by; those of guard and test rows are kept, sorted.

    Raises:
        OSError: The disk is full or the folder cannot be written; both folders are as before then.
    """
    index = order(rows, tiers)
    pool = np.concatenate([index[TRAIN], index[VALIDATION], index[GUARD]])
    named = pool[: len(pool) - len(index[GUARD])]
    (home.parent).mkdir(parents=True, exist_ok=True)
    (sealed.parent).mkdir(parents=True, exist_ok=True, mode=0o700)
    os.chmod(sealed.parent, 0o700)
    secret = Path(tempfile.mkdtemp(prefix=".tmp-", dir=sealed.parent))
    public = Path(tempfile.mkdtemp(prefix=".tmp-", dir=home.parent))
    try:
        for k, leaf in enumerate(rows.x):
            if isinstance(leaf, Files):
                leaf.place(secret / f"test_x_{k}", index[TEST], len(index[TEST]), 0o600)
                leaf.place(public / f"x_{k}", pool, len(index[GUARD]))
                continue
            _save(secret / f"test_x_{k}.npy", leaf, index[TEST], 0o600)
            _save(public / f"x_{k}.npy", leaf, pool)
        for k, leaf in enumerate(rows.y):
            _save(secret / f"test_y_{k}.npy", leaf, index[TEST], 0o600)
            _save(secret / f"guard_y_{k}.npy", leaf, index[GUARD], 0o600)
            _save(public / f"y_{k}.npy", leaf, named)
        if rows.groups is not None:
            codes = np.unique(rows.groups, return_inverse=True)[1].astype(np.int64)
            for number in (GUARD, TEST):
                _save(secret / f"{TIERS[number]}_groups.npy", codes, index[number], 0o600)
        if rows.weight is not None:
            _save(public / "weight.npy", rows.weight, named)
            for number in (GUARD, TEST):
                _save(secret / f"{TIERS[number]}_weight.npy", rows.weight, index[number], 0o600)
        for number, name in _HASHES.items():
            _save(secret / f"{name}.npy", np.sort(identities[index[number]]), np.arange(len(index[number])), 0o600)
        start = 0
        for number in (TRAIN, VALIDATION, GUARD):
            at = np.arange(start, start := start + len(index[number]), dtype=np.int64)
            _save(public / f"{TIERS[number]}.npy", at, np.arange(len(at)))
        for folder, mode in ((secret, 0o600), (public, 0o644)):
            with _created(folder / "manifest.json", mode) as file:
                file.write(json.dumps(manifest, indent=1).encode())
        public.chmod(0o755)
        _move(secret, sealed)
        _move(public, home)
    finally:
        shutil.rmtree(secret, ignore_errors=True)
        shutil.rmtree(public, ignore_errors=True)


def order(rows: Rows, tiers: Tiers) -> dict[int, Array]:
    """Positions of each tier's rows, in the order in which they are stored."""
    index: dict[int, Array] = {number: np.flatnonzero(tiers == number) for number in range(len(TIERS))}
    if rows.time is not None:
        index = {number: at[np.argsort(rows.time[at], kind="stable")] for number, at in index.items()}
    elif files := [leaf for leaf in rows.x if isinstance(leaf, Files)]:
        index = {number: files[0].order(at) for number, at in index.items()}
    return index


def merged(home: Path, sealed: Path, tiers: Sequence[str], folder: Path) -> None:
    """Write into ``folder`` what ``OpenRows`` reads, with the rows of all these tiers as its train rows.

    Rows come tier after tier, each tier in its stored order. The old validation rows keep their name as well; they
    are trained on like the others. Sealed labels are in the copy, so ``folder`` must be the owner's alone, no
    trial's, and removed after use.

    Args:
        home: The folder ``WORKSPACE/rows/DIGEST``; sealed: ``WORKSPACE/sealed/DIGEST``.
        tiers: The first three of ``split.TIERS``, or all four.

    Raises:
        DataError: If there are weights, but an older version stored the rows and kept none for sealed tiers.
        OSError: The disk is full or the folder cannot be written.
    """
    if tuple(tiers) not in (TIERS[:TEST], TIERS):
        raise ValueError(f"tiers must be {TIERS[:TEST]} or {TIERS}, but got {tuple(tiers)}")
    rows = _Stored(home)
    added = [tier for tier in tiers if tier in ("guard", "test")]

    def save(name: str, *sources: Path) -> None:
        leaves = [cast(Array, np.load(source, mmap_mode="r", allow_pickle=False)) for source in sources]
        _write(folder / f"{name}.npy", leaves, [np.arange(len(leaf)) for leaf in leaves], 0o600)

    for k in range(rows._leaf_count("x")):
        if (spec := rows.spec_of(k)) is not None:
            parts = [home / f"x_{k}", *(sealed / f"{tier}_x_{k}" for tier in added if tier == "test")]
            files = [Files.stored(part, spec, None) for part in parts]
            Files.chained(files).place(folder / f"x_{k}", np.arange(sum(map(len, files))), 0)
            continue
        save(f"x_{k}", home / f"x_{k}.npy", *(sealed / f"{tier}_x_{k}.npy" for tier in added if tier == "test"))
    for k in range(rows._leaf_count("y")):
        save(f"y_{k}", home / f"y_{k}.npy", *(sealed / f"{tier}_y_{k}.npy" for tier in added))
    if (home / "weight.npy").exists():
        weights = [sealed / f"{tier}_weight.npy" for tier in added]
        if not all(path.exists() for path in weights):
            raise DataError(
                f"a refit needs the sample weights of all rows, but an earlier version stored {home} without those "
                "of guard and test rows; launch the study again"
            )
        save("weight", home / "weight.npy", *weights)
    for tier in ("validation", "guard"):
        save(tier, home / f"{tier}.npy")
    count = sum(int(rows.manifest["tiers"][tier]) for tier in tiers)
    _save(folder / "train.npy", np.arange(count, dtype=np.int64), np.arange(count), 0o600)
    manifest = rows.manifest | {"tiers": rows.manifest["tiers"] | {"train": count}}
    with _created(folder / "manifest.json", 0o600) as file:
        file.write(json.dumps(manifest, indent=1).encode())


def _move(folder: Path, to: Path) -> None:
    try:
        os.replace(folder, to)
    except OSError:
        # Another process stored the same digest meanwhile: its files are equal to ours.
        if not (to / "manifest.json").exists():
            raise


def _created(path: Path, mode: int) -> IO[bytes]:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb")


def _save(path: Path, leaf: Array, at: Array, mode: int = 0o644) -> None:
    """Write ``leaf[at]`` as ``.npy``."""
    _write(path, [leaf], [at], mode)


def _write(path: Path, leaves: Sequence[Array], at: Sequence[Array], mode: int) -> None:
    """Write rows of several leaves of one kind as one ``.npy``, by parts, so that they are never in memory twice.

    Not through a memory map: a full disk would kill the process there instead of raising.
    """
    first = leaves[0]
    shape = (sum(len(rows) for rows in at), *first.shape[1:])
    header = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False, "shape": shape}
    step = max(1, (16 << 20) // max(1, first[:1].nbytes))
    with _created(path, mode) as file:
        np.lib.format.write_array_header_2_0(file, header)
        for leaf, rows in zip(leaves, at, strict=True):
            for start in range(0, len(rows), step):
                file.write(np.ascontiguousarray(leaf[rows[start : start + step]]).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


class _Stored:
    def __init__(self, path: Path, decode: Decode | None = None) -> None:
        self.path, self.decode = Path(path), decode
        try:
            self.manifest: dict[str, Any] = json.loads((self.path / "manifest.json").read_text())
        except FileNotFoundError as error:
            raise DataError(
                f"there must be stored rows in {self.path}, but there are none; `heldout launch` stores them"
            ) from error

    def _map(self, name: str) -> Array:
        return cast(Array, np.load(self.path / f"{name}.npy", mmap_mode="r", allow_pickle=False))

    def spec_of(self, leaf: int) -> dict[str, Any] | None:
        """``Files.spec`` of a leaf of x whose rows are files; None of an array."""
        files = self.manifest["x"].get("files")
        return None if files is None else cast(dict[str, Any] | None, files[leaf])

    def _structure(self, side: str) -> Structure:
        spec = self.manifest[side]
        return Structure(spec["kind"], tuple(spec["names"]))

    def _files(self, side: str, stem: str, index: str | None = None) -> dict[str, Any]:
        structure = self._structure(side)
        paths = [str(self.path / f"{stem}_{k}.npy") for k in range(len(structure.names))]
        named: dict[str, Any] = {} if index is None else {"index": str(self.path / f"{index}.npy")}
        if side == "x" and "files" in self.manifest["x"]:
            named["files"] = self.manifest["x"]["files"]
        return {"kind": structure.kind, "names": list(structure.names), "paths": paths, **named}

    def _leaf_count(self, side: str) -> int:
        return len(self.manifest[side]["names"])


class OpenRows(_Stored):
    """What trials read: features of train, validation and guard rows, labels of the first two.

    Row numbers in arguments count within the tier. Rows ordered by time come in that order.

    Args:
        path: The folder ``WORKSPACE/rows/DIGEST``.
        decode: The module's ``decode(path)``, without which rows that are files cannot be read.
    """

    def __init__(self, path: Path, decode: Decode | None = None) -> None:
        super().__init__(path, decode)
        self._index = {name: self._map(name) for name in TIERS[:TEST]}
        named = ((self.path / f"x_{k}.npy", self.spec_of(k)) for k in range(self._leaf_count("x")))
        self._x = tuple(_leaf(path, spec, decode) for path, spec in named)
        self._y = tuple(self._map(f"y_{k}") for k in range(self._leaf_count("y")))

    def size(self, tier: str) -> int:
        """Number of rows in train, validation or guard."""
        return len(self.index(tier))

    def index(self, tier: str) -> Array:
        """Positions of a tier's rows in ``pool()``, int64."""
        if tier not in self._index:
            raise SealedError(
                f"rows of {', '.join(self._index)} are open, but {tier!r} was asked for; test rows are sealed"
            )
        return self._index[tier]

    def divided(self, train: Array, validation: Array) -> OpenRows:
        """The same stored rows, with others of the first ``labelled`` ones as train and validation rows.

        Args:
            train, validation: Positions in ``pool()``, int64.
        """
        out = copy.copy(self)
        out._index = {**self._index, "train": train, "validation": validation}
        return out

    @property
    def labelled(self) -> int:
        """Rows whose labels are open, which come first in ``pool()``: those of train and validation."""
        return len(self._y[0])

    def pool(self) -> tuple[Array | Files, ...]:
        """Feature leaves of train, validation and guard rows, memory-mapped and read-only, or files."""
        return self._x

    def features(self, tier: str, rows: Array | None = None) -> Any:
        """Copies of a tier's features, or of ``rows`` of it, in the structure of x."""
        at = self._at(tier, rows)
        return self._structure("x").packed([leaf[at] for leaf in self._x])

    def mapped(self, tier: str) -> Any:
        """A tier's features without a copy, read-only, where its rows lie together; else as ``features``."""
        index = self.index(tier)
        if not np.array_equal(index, np.arange(index[0], index[0] + len(index))):
            return self.features(tier)
        return self._structure("x").packed([leaf[index[0] : index[0] + len(index)] for leaf in self._x])

    def labels(self, tier: str, rows: Array | None = None) -> Any:
        """Copies of the labels of train or validation rows, in the structure of y.

        Raises:
            SealedError: For guard and test, whose labels are not here.
        """
        self._check_open(tier)
        at = self._at(tier, rows)
        return self._structure("y").packed([leaf[at] for leaf in self._y])

    def labels_at(self, places: Array) -> Any:
        """Copies of the labels of the ``labelled`` rows at these positions of the pool, in the structure of y."""
        return self._structure("y").packed([np.asarray(leaf[places]) for leaf in self._y])

    def weights(self, rows: Array | None = None, tier: str = "train") -> Array | None:
        """Sample weights (n,), float32, or None if the Dataset has none.

        Args:
            rows: Places (n,) within the tier, counted from 0; None for all of them.
        """
        self._check_open(tier)
        at = self._at(tier, rows)
        return self._map("weight")[at] if (self.path / "weight.npy").exists() else None

    def dataset(self, tier: str = "train") -> Dataset:
        """A tier as a Dataset, for the module's own ``preprocess(train)``."""
        return Dataset(self.features(tier), self.labels(tier), sample_weight=self.weights(tier=tier))

    def nbytes(self, tier: str) -> int:
        """Bytes that a tier's features, and labels where they are open, take when copied."""
        leaves = self._x if tier == "guard" else (*self._x, *self._y)
        return int(self.size(tier) * sum(leaf.nbytes // len(leaf) for leaf in leaves))

    def feature_files(self, tier: str) -> dict[str, Any]:
        """Features of train, validation or guard as paths, JSON, for ``open_structure``."""
        self.index(tier)
        return self._files("x", "x", tier)

    def label_files(self, tier: str) -> dict[str, Any]:
        """Train or validation labels as paths, JSON, for ``load_structure``."""
        self._check_open(tier)
        return self._files("y", "y", tier)

    def _check_open(self, tier: str) -> None:
        if tier not in ("train", "validation"):
            raise SealedError(
                f"labels of train and validation are open, but {tier!r} was asked for; the others are sealed"
            )

    def _at(self, tier: str, rows: Array | None) -> Array:
        index = self.index(tier)
        return index[:] if rows is None else index[rows]


class SealedRows(_Stored):
    """What only the service reads: guard and test labels, test features. Keep it out of trial processes.

    Args:
        path: The folder ``WORKSPACE/sealed/DIGEST``.
    """

    def size(self, tier: str) -> int:
        """Number of rows in a tier."""
        return int(self.manifest["tiers"][tier])

    def labels(self, tier: str) -> Any:
        """Labels of "guard" or "test", in the structure of y."""
        return load_structure(self.label_files(tier))

    def features(self, tier: str = "test") -> Any:
        """Features of "test", in the structure of x; those of guard are open (``OpenRows``)."""
        return load_structure(self.feature_files(tier))

    def groups(self, tier: str) -> Array | None:
        """A number per row of "guard" or "test", equal within a group; None without groups."""
        path = self.path / f"{tier}_groups.npy"
        return np.array(self._map(f"{tier}_groups")) if path.exists() else None

    def row_hashes(self, tier: str = "test") -> Hashes:
        """Sorted 64-bit hashes that the ledger knows the rows of "guard" or "test" by."""
        self._check_sealed(tier)
        return np.array(self._map(_HASHES[TIERS.index(tier)]))

    def label_files(self, tier: str) -> dict[str, Any]:
        """Guard or test labels as paths, JSON, for ``load_structure``."""
        self._check_sealed(tier)
        return self._files("y", f"{tier}_y")

    def feature_files(self, tier: str = "test") -> dict[str, Any]:
        """Test features as paths, JSON, for ``open_structure``."""
        if tier != "test":
            raise ValueError(f"sealed features are those of test, but {tier!r} was asked for; use OpenRows")
        return self._files("x", f"{tier}_x")

    def _check_sealed(self, tier: str) -> None:
        if tier not in ("guard", "test"):
            raise ValueError(f"rows of guard and test are sealed, but {tier!r} was asked for; use OpenRows")


@dataclass(frozen=True)
class Tier:
    """Rows of one tier where they lie: ``rows[at]`` has copies of some of them, in the structure of x or y."""

    structure: Structure
    leaves: tuple[Array | Files, ...]
    index: Array | None

    def __len__(self) -> int:
        return len(self.leaves[0] if self.index is None else self.index)

    def __getitem__(self, rows: Any) -> Any:
        at = rows if self.index is None else self.index[rows]
        return self.structure.packed([np.array(leaf[at]) for leaf in self.leaves])

    @property
    def nbytes(self) -> int:
        """Bytes of all its rows when they are copied."""
        return len(self) * sum(leaf.nbytes // len(leaf) for leaf in self.leaves)


def _leaf(path: Path, spec: dict[str, Any] | None, decode: Decode | None) -> Any:
    """A mapped ``.npy``, or, with a spec, the files in the folder that is in its place."""
    if spec is not None:
        return Files.stored(path.with_suffix(""), spec, decode)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def open_structure(files: Mapping[str, Any], decode: Decode | None = None) -> Tier:
    """What ``label_files`` or ``feature_files`` named; ``decode``: the module's, for rows that are files."""
    index = np.load(files["index"], allow_pickle=False) if "index" in files else None
    specs = files.get("files") or [None] * len(files["paths"])
    leaves = (_leaf(Path(path), spec, decode) for path, spec in zip(files["paths"], specs, strict=True))
    return Tier(Structure(files["kind"], tuple(files["names"])), tuple(leaves), index)


def load_structure(files: Mapping[str, Any]) -> Any:
    """Arrays in memory from what ``label_files`` or ``feature_files`` named, in the structure of x or y."""
    return open_structure(files)[:]

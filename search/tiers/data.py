"""From what ``load()`` returned to stored tiers: leakage checks, the split, the manifest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np

from search.errors import DataError
from search.tiers import leakage, split, store
from search.tiers.files import Decode, Files
from search.tiers.rows import (
    Array,
    Dataset,
    Hashes,
    Rows,
    Structure,
    all_finite,
    are_running_numbers,
    fingerprint,
    id_hashes,
    joined,
    read,
    row_hashes,
    value_hashes,
)
from search.tiers.split import GUARD, TEST, TIERS, TRAIN, VALIDATION, Tiers, Units
from search.tiers.store import OpenRows, SealedError, SealedRows, load_structure
from search.tiers.streams import Spool

__all__ = [
    "Dataset",
    "OpenRows",
    "SealedError",
    "SealedRows",
    "check_dividable",
    "labelled",
    "load_structure",
    "prepare",
]

# Part of the digest: raise it when the split or the files change, so that old copies are not taken for new.
_VERSION = 2
_FEW_GUARD = 500
_FEW_TEST = 1_000
_LEAST_PER_CLASS = 2


def prepare(
    dataset: Dataset,
    workspace: Path,
    split_seed: int,
    allow_nan: bool,
    decode: Decode | None = None,
    where: str = "the module",
) -> dict[str, Any]:
    """Check, split, seal and store rows; the same rows again are found stored and left as they are.

    Args:
        split_seed: Decides, with the rows themselves, which tier a row belongs to.
        allow_nan: Accept NaN and infinities in x.
        decode: The module's ``decode(path)``, which makes x of files.
        where: The module, for messages.

    Returns:
        The manifest, JSON: ``digest``, ``fingerprint`` (of the test rows), ``guard_fingerprint``, ``identity``
        ("ids" or "values": what rows are known again by), ``prior_openings``, ``rows``, ``tiers`` (name to rows),
        ``x`` and ``y`` (``kind``, ``names``, ``shapes`` with the number of rows first, ``dtypes``; where leaves of x
        are files also ``files``, what ``Files.spec`` has of each, or None), ``task``
        ("classes" or "values"), ``classes``, ``warnings``, ``has_nan``, ``grouped``, ``ordered``, ``supplied``
        (tiers that the user gave).

    Raises:
        DataError: If the rows cannot be used; nothing has been written then.
    """
    # What is said now, which need not be what was said when the rows were stored.
    said = {"prior_openings": _prior_openings(dataset)}
    try:
        with Spool(workspace / "rows") as spool:
            rows, given, names = _gathered(dataset, decode, spool)
            x = tuple(leaf.checked(where) if isinstance(leaf, Files) else leaf for leaf in rows.x)
            rows = dataclasses.replace(rows, x=x)
            return _stored(rows, given, names, workspace, split_seed, allow_nan) | said
    except OSError as error:
        raise DataError(
            f"rows must be stored under {workspace}, but {error.strerror or error}; "
            "make room there or give another --workspace"
        ) from error


def _stored(
    rows: Rows, given: Tiers, names: list[str], workspace: Path, split_seed: int, allow_nan: bool
) -> dict[str, Any]:
    """Divide and store rows, unless they are there; the manifest."""
    has_nan = not all(all_finite(leaf) for leaf in rows.x)
    if has_nan and not allow_nan:
        leaves = zip(rows.x_structure.names, rows.x, strict=True)
        bad = ", ".join(name for name, leaf in leaves if not all_finite(leaf))
        raise DataError(
            f"x must be finite, but {bad} has NaN or infinite values; fill them in, "
            "let preprocess(train) remove them, or set `allow_nan = True` in the module"
        )
    x_hashes, hashes = row_hashes(rows.x), row_hashes((*rows.x, *rows.y))
    digest = _digest(rows, hashes, given, split_seed)
    home, sealed = workspace / "rows" / digest, workspace / "sealed" / digest
    if (home / "manifest.json").exists() and sealed.exists():
        return cast(dict[str, Any], json.loads((home / "manifest.json").read_text()))

    leakage.check_supplied(rows, given, x_hashes)
    labels, tiers = _dealt(rows, given, names, x_hashes, split_seed)
    leakage.check_times(rows, given, tiers)
    if labels.classes is not None:
        _check_classes(labels.classes, labels.codes, tiers)
    known_by, identities, doubts = _known_by(rows, hashes, given)
    manifest = {
        "version": _VERSION,
        "digest": digest,
        "fingerprint": fingerprint(identities[tiers == TEST]),
        "guard_fingerprint": fingerprint(identities[tiers == GUARD]),
        "identity": known_by,
        "split_seed": split_seed,
        "rows": len(rows),
        "tiers": {name: int((tiers == number).sum()) for number, name in enumerate(TIERS)},
        "x": _spec(rows.x_structure, rows.x),
        "y": _spec(rows.y_structure, rows.y),
        "task": labels.task,
        "classes": labels.classes,
        "warnings": [*_warnings(tiers), *leakage.suspicions(rows, given, tiers, x_hashes, hashes), *doubts],
        "has_nan": has_nan,
        "grouped": rows.groups is not None,
        "ordered": rows.time is not None,
        "supplied": names,
    }
    store.write(rows, tiers, identities, manifest, home, sealed)
    return manifest


def _dealt(
    rows: Rows, given: Tiers, names: list[str], x_hashes: Hashes, split_seed: int
) -> tuple[split.Labels, Tiers]:
    """What the labels are, and the tier of every row."""
    labels = split.labels_of(rows.y[0])
    free = given < 0
    tiers = given.copy()
    tiers[free] = split.assign(
        x_hashes[free],
        labels.codes[free],
        split_seed,
        split.sizes(int(free.sum()), **{tier: tier not in names for tier in TIERS[1:]}),
        **{name: None if value is None else value[free] for name, value in _identity(rows).items()},
    )
    return labels, tiers


def check_dividable(dataset: Dataset, plan: str) -> None:
    """Refuse rows that functions give under a plan of several splits: they go by once, and lie as they came.

    Raises:
        DataError: If any x is a function.
    """
    tiers = [getattr(dataset, name) for name in TIERS[1:]]
    if any(callable(getattr(part, "x", part[0] if isinstance(part, tuple) else None)) for part in (dataset, *tiers)):
        raise DataError(
            f"--validation {plan} needs rows as arrays or paths, but x is a function; give paths and decode(path), "
            "or leave --validation at holdout"
        )


def labelled(dataset: Dataset, split_seed: int, decode: Decode | None = None) -> Units:
    """What divides train and validation rows further: their units and strata, in the order of the stored pool.

    Args:
        dataset: What ``prepare`` was given and accepted; ``split_seed`` and ``decode`` as well.
    """
    rows, given, names = _gathered(dataset, decode, Spool(Path()))
    x_hashes = row_hashes(rows.x)
    labels, tiers = _dealt(rows, given, names, x_hashes, split_seed)
    index = store.order(rows, tiers)
    at = np.concatenate([index[TRAIN], index[VALIDATION]])
    groups, ids = (None if column is None else column[at] for column in (rows.groups, rows.ids))
    unit, keys = split.together(x_hashes[at], groups, ids)
    if rows.time is not None:
        unit = split.blocks(rows.time[at], groups)
    return Units(unit, keys, labels.codes[at], labels.classes, rows.time is not None)


def _gathered(dataset: Dataset, decode: Decode | None, spool: Spool) -> tuple[Rows, Tiers, list[str]]:
    """All rows as one, the tier that the user gave each (-1: none), and the names of the tiers given."""
    parts, names, codes = [read(spool.taken(dataset, ""), decode=decode)], ["x"], [-1]
    for name, code in (("validation", VALIDATION), ("guard", GUARD), ("test", TEST)):
        if (given := getattr(dataset, name)) is None:
            continue
        if isinstance(given, tuple) and len(given) == 2:
            given = Dataset(*given)
        if not isinstance(given, Dataset) or any(getattr(given, tier) is not None for tier in TIERS[1:]):
            raise DataError(
                f"{name} must be a pair (x, y) or a Dataset without tiers of its own, "
                f"but got {type(given).__name__}; check load()"
            )
        if _prior_openings(given):
            raise DataError(f"prior_openings must be in the outer Dataset, but is in that of {name}; move it there")
        parts.append(read(spool.taken(given, name), f"{name}.", decode))
        names.append(name)
        codes.append(code)
    if spool.parts not in (0, len(parts)):
        raise DataError(f"the x of {', '.join(names)} must all be functions, or none of them; check load()")
    rows = joined(parts, names, spool.whole())
    return rows, np.repeat(np.array(codes, dtype=np.int8), [len(part) for part in parts]), names[1:]


def _prior_openings(dataset: Dataset) -> int:
    prior = dataset.prior_openings
    if isinstance(prior, bool) or not isinstance(prior, int | np.integer) or prior < 0:
        raise DataError(
            f"prior_openings must be a whole number of at least 0, but got {prior!r}; "
            "give how many times the test rows were used before"
        )
    return int(prior)


def _known_by(rows: Rows, hashes: Hashes, given: Tiers) -> tuple[str, Hashes, list[str]]:
    """What the ledger knows rows by: "ids" or "values", their hashes, and a warning where ids cannot serve."""
    if rows.ids is None:
        return "values", hashes, []
    parts = [rows.ids[given == code] for code in np.unique(given)]
    # Two unrelated data sets would both have the rows 0, 1, 2, …, and pass for one.
    if are_running_numbers(rows.ids) or all(are_running_numbers(part) for part in parts):
        doubt = (
            "ids are the running numbers of the rows, which name rows of one file only, so rows are known again by "
            "their values instead; give ids that stay with a row, such as keys of a database or names of files"
        )
        return "values", hashes, [doubt]
    return "ids", id_hashes(rows.ids), []


def _identity(rows: Rows) -> dict[str, Array | None]:
    return {"groups": rows.groups, "time": rows.time, "ids": rows.ids}


def _digest(rows: Rows, hashes: Hashes, given: Tiers, split_seed: int) -> str:
    """SHA-256 over whatever decides the stored files."""
    specs = f"{_spec(rows.x_structure, rows.x)}/{_spec(rows.y_structure, rows.y)}"
    out = hashlib.sha256(f"{_VERSION}/{split_seed}/{specs}".encode())
    out.update(hashes.astype("<u8").tobytes())
    out.update(given.tobytes())
    for name, column in {**_identity(rows), "weight": rows.weight}.items():
        out.update(f"/{name}".encode())
        if column is not None:
            out.update(value_hashes(column).astype("<u8").tobytes())
    return out.hexdigest()


def _spec(structure: Structure, leaves: Iterable[Array | Files]) -> dict[str, Any]:
    leaves = list(leaves)
    files = [leaf.spec() if isinstance(leaf, Files) else None for leaf in leaves]
    return {
        "kind": structure.kind,
        "names": list(structure.names),
        "shapes": [list(leaf.shape) for leaf in leaves],
        "dtypes": [str(leaf.dtype) for leaf in leaves],
        **({"files": files} if any(files) else {}),
    }


def _check_classes(classes: list[Any], codes: Array, tiers: Tiers) -> None:
    counts = np.zeros((len(classes), len(TIERS)), dtype=np.int64)
    np.add.at(counts, (codes, tiers), 1)
    for value, row in zip(classes, counts, strict=True):
        if row.sum() and row.min() < _LEAST_PER_CLASS:
            where = ", ".join(f"{count} in {tier}" for count, tier in zip(row, TIERS, strict=True))
            raise DataError(
                f"every class must have at least {_LEAST_PER_CLASS} rows in every tier, but class {value!r} "
                f"with {row.sum()} rows has {where}; add rows of it, merge it with another, or leave it out"
            )


def _warnings(tiers: Tiers) -> list[str]:
    guard, test = int((tiers == GUARD).sum()), int((tiers == TEST).sum())
    out = []
    if guard < _FEW_GUARD:
        out.append(f"only {guard} guard rows (under {_FEW_GUARD}): estimates from them are coarse")
    if test < _FEW_TEST:
        out.append(f"only {test} test rows (under {_FEW_TEST}): the test score comes with a wide interval")
    return out

"""The module's own preprocessing, fitted on the train rows of one split, or of each that all trials share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from search.checks import transformers
from search.definition import lines
from search.definition.problem import SpaceModule
from search.errors import DataError, SpaceError
from search.harness import feeding, folding, preflight, training
from search.scorer import declaration
from search.tiers import folds, leakage
from search.tiers.data import OpenRows, SealedRows
from search.tiers.validation import REFIT, parse

NAME = "preprocess.keras"


def shared(
    module: SpaceModule,
    rows: OpenRows,
    found: Mapping[str, Any] | None,
    folder: Path,
    sealed: SealedRows,
    budget: int,
) -> Path | None:
    """Fit what all trials use, once for each split; the file of the one that belongs to the model that is shipped.

    Args:
        found: Of the plan, see ``folds.write``; None for the stored split.
        folder: The study's, or that of one text of its module.
        budget: Bytes of rows that may be copied into this process.

    Returns:
        None if every trial has a split, and so a preprocessing, of its own.
    """
    path = None
    for path, of in _splits(rows, found, folder):
        fit(module, of, path, budget, sealed)
    return path


def _splits(rows: OpenRows, found: Mapping[str, Any] | None, folder: Path) -> Iterator[tuple[Path, OpenRows]]:
    if found is None:
        yield folder / NAME, rows
    elif (plan := parse(found["plan"])).is_repeated:
        part = {"folds": found, "seed": 0}
        for number in range(plan.count):
            path = folding.preprocess_of(Path(found["folder"]), number)
            yield path, folds.of_part(rows, part | {"number": number})
        yield folder / NAME, folds.of_part(rows, part | {"number": REFIT})


def fit(module: SpaceModule, rows: OpenRows, path: Path, budget: int, sealed: SealedRows | None = None) -> None:
    """Fit on the train rows, and write the model.

    Args:
        budget: Bytes of rows that may be copied into this process; see ``feeding.for_preprocess``.
        sealed: Given, the model is looked at for statistics of more than the train rows.

    Raises:
        SpaceError: If it is no Keras model, or cannot be shipped.
        DataError: If it leaves NaN that the module does not allow, or has learned from other rows.
    """
    keras.utils.set_random_seed(0)
    assert module.preprocess is not None
    with module.blaming("preprocess(train)"):
        model = module.preprocess(feeding.for_preprocess(rows, budget))
    if not isinstance(model, keras.Model):
        raise SpaceError(f"{lines.of_return(module.problem, 'preprocess')}: {transformers.refusal(model)}")
    known = declaration.ends(model)
    if known is not None:  # a name of its own, since every unnamed model is called "sequential"
        model = keras.Model(*known, name="preprocess")
        if sealed is not None:
            leakage.check_learned(model, rows, sealed, module.problem.path)
    if rows.manifest["has_nan"] and not module.allow_nan:
        for tier in ("train", "validation", "guard"):
            for part in feeding.parts(rows, tier, model):
                if np.issubdtype(part.dtype, np.floating) and np.isnan(part).any():
                    raise DataError(
                        f"x has NaN and preprocess(train) leaves some in the {tier} rows; let it remove them, "
                        f"or set `allow_nan = True` in {module.problem.path} if the model copes with NaN"
                    )
    training.save(model, path)
    preflight.refuse_lambdas(path, module.problem.path)
    preflight.refuse_secrets(path, module.problem.path)

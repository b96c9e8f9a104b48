"""How a configuration is judged: which plans there are, and the words for them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from search.errors import RequestError

HOLDOUT = "holdout"
KINDS = (HOLDOUT, "kfold", "repeated", "reshuffle")
_COUNTED = ("kfold", "repeated")
_MOST = 100
REFIT = "refit"  # in place of a split's number: the training on all open rows


@dataclass(frozen=True)
class Validation:
    """A plan of which open rows (train and validation) train a configuration, and which validate it.

    Attributes:
        kind: ``"holdout"``, the stored split; ``"kfold"``, every open row validated once; ``"repeated"``, several
            splits that all trials share; ``"reshuffle"``, a split of its own for every trial.
        count: Splits that one trial trains on.
    """

    kind: str
    count: int = 1

    @property
    def is_repeated(self) -> bool:
        """Whether a trial trains once for each of several splits, and then once more on all open rows."""
        return self.kind in _COUNTED

    @property
    def trainings(self) -> int:
        """Trainings of one trial."""
        return self.count + 1 if self.is_repeated else 1

    @property
    def step(self) -> str:
        """What a trial reports after: an epoch, a fold or a repeat."""
        return {"kfold": "fold", "repeated": "repeat"}.get(self.kind, "epoch")

    def __str__(self) -> str:
        return f"{self.kind}:{self.count}" if self.is_repeated else self.kind


def described(found: Mapping[str, Any]) -> str:
    """A recorded plan in words; see ``folds.write``."""
    plan, rows = parse(found["plan"]), found["rows"]
    once = "validates once" if not found["ordered"] else "but the earliest validates once, after training on all before"
    of = {
        "kfold": f"each of {rows + (found['train'][0] if found['ordered'] else 0)} train and validation rows {once}",
        "repeated": f"the same {plan.count} splits of train and validation rows for every trial, {rows} rows validate",
        "reshuffle": "a split of train and validation rows of its own for every trial",
    }[plan.kind]
    after = ", then a refit on all of them" if plan.is_repeated else ""
    return f"{plan}: {of}{after}; guard and test rows stay apart"


def named(found: Mapping[str, Any]) -> str:
    """What a validation score is the score of, for the head of a table."""
    kind, count = parse(found["plan"]).kind, found["rows"]
    of = {"kfold": "out of fold", "repeated": f"mean of {len(found['train'])} repeats", "reshuffle": "own split"}[kind]
    return f"{of}, {count} rows"


def parse(given: str) -> Validation:
    """The plan that ``holdout``, ``kfold:5``, ``repeated:3`` or ``reshuffle`` names.

    Raises:
        RequestError: If it names none.
    """
    kind, mark, count = str(given).partition(":")
    if kind not in KINDS:
        near = difflib.get_close_matches(kind.lower(), KINDS, n=1, cutoff=0)
        raise RequestError(
            f"--validation must be holdout, kfold:5, repeated:3 or reshuffle (or another number), but got {given!r}; "
            f"did you mean {near[0]!r}?"
        )
    if kind not in _COUNTED:
        if mark:
            raise RequestError(f"--validation {kind} takes no number, but got {given!r}; write {kind}")
        return Validation(kind)
    if not re.fullmatch(r"[1-9]\d*", count) or not 2 <= int(count) <= _MOST:
        raise RequestError(f"--validation {kind} must be given 2 to {_MOST}, such as {kind}:5, but got {given!r}")
    return Validation(kind, int(count))

"""The record of what held-out rows were used for: one file per user, whatever the study or the workspace.

Four things matter. An ``opening`` line is on disk before the seal of the test rows is touched, so a crash after
it counts as an opening; a ``result`` line follows with what was found. A ``guard`` line says how many trials of a
study have been judged by which guard rows. And rows are known again, by their hashes, when they come in
another order, or with some of them dropped or added. It keeps honest people honest: whoever can write
the file can also write another one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from search.errors import RequestError
from search.guard import database_chain
from search.guard.chain import Chain, Hashes, Line
from search.guard.database_chain import DatabaseChain

SAME_ROWS = 0.2  # share of rows used before from which a set of rows is not a new one

_OURS = frozenset({"kind", "number", "previous", "hash", "opening", "prior", "rows"})


@dataclass(frozen=True)
class GuardUse:
    """What guard rows were used for by other studies: how many, and how many trials they judged in all."""

    studies: int
    trials: int


class Ledger:
    """The ledger at ``path``, by default ``HELDOUT_LEDGER`` or a file in the user's data folder.

    ``postgresql://…`` is one that several machines share, as those of a cluster do.
    Any number of processes may use it at once. Every method raises RequestError if the chain is broken or the
    file cannot be used. Rows are the same rows if their fingerprint is, or if a fifth of them or more is.
    """

    def __init__(self, path: Path | str | None = None) -> None:
        given = default_path() if path is None else path
        if database := database_chain.address(given):
            self._chain: Chain | DatabaseChain = DatabaseChain(database)
            self.path: Path | str = database
        else:
            self.path = Path(given)
            self._chain = Chain(self.path)

    def entries(self) -> tuple[Line, ...]:
        """All lines in order, after checking the chain."""
        return self._chain.lines()

    def ready(self) -> None:
        """See that openings can be recorded, and that the chain is whole."""
        with self._chain.locked():
            pass
        self.verify()

    def verify(self) -> int:
        """Check the chain and the rows beside it; the number of lines."""
        return len(self._checked()[0])

    def openings(self, row_hashes: Hashes, fingerprint: str, prior: int = 0) -> int:
        """How many times these test rows have been opened, in any study.

        Args:
            row_hashes: One per test row; fingerprint: of these rows.
            prior: Openings from before the ledger knew them (``Dataset.prior_openings``).
        """
        return self._count(self.entries(), row_hashes, fingerprint, prior)

    def append(
        self,
        entry: Mapping[str, Any],
        row_hashes: Hashes,
        *,
        prior: int = 0,
        alpha: Callable[[int], float] | None = None,
        expected: int | None = None,
    ) -> int:
        """Enter an opening, on disk when this returns; open the seal only then.

        Args:
            entry: JSON with at least ``fingerprint`` and ``frozen`` (the hash of the frozen selection).
            row_hashes: One per test row.
            prior: As in ``openings``.
            alpha: From the number of the opening to its share of the error rate, kept as ``alpha``.
            expected: The opening the caller has announced, to be refused if another study was faster.

        Returns:
            The how-manieth opening of these rows this is, from 1.

        Raises:
            RequestError: If the chain is broken, the disk is full, or it is not the expected opening.
                Nothing has been entered then.
        """
        _check(entry, "fingerprint", "frozen")
        with self._chain.locked() as (file, lines):
            number = self._count(lines, row_hashes, entry["fingerprint"], prior) + 1
            if expected is not None and number != expected:
                raise RequestError(
                    f"this must be opening {expected} of these test rows, but another study has opened them "
                    f"meanwhile and it would be opening {number}; run the evaluation again to have it counted"
                )
            body = {"kind": "opening", "opening": number, "prior": prior, **entry}
            if alpha is not None:
                body["alpha"] = alpha(number)
            body["rows"] = self._chain.keep_rows(row_hashes, "nothing was opened")
            self._chain.add(file, lines, body, "nothing was opened")
        return number

    def record_result(self, opening: int, frozen: str, result: Mapping[str, Any]) -> None:
        """Keep what an opening has shown, so that asking again opens nothing.

        Args:
            opening: What ``append`` returned; frozen: the hash in that entry.
            result: JSON.
        """
        with self._chain.locked() as (file, lines):
            if not any(_answers({"opening": opening, "frozen": frozen}, line) for line in lines):
                raise ValueError(f"a result must belong to an opening, but there is no opening {opening} of {frozen}")
            body = {"kind": "result", "opening": opening, "frozen": frozen, "result": result}
            self._chain.add(file, lines, body, f"opening {opening} counts but its result was not kept")

    def find(self, frozen: str) -> dict[str, Any] | None:
        """The recorded result of a frozen selection, or None if none was recorded."""
        found = [line["result"] for line in self.entries() if line["kind"] == "result" and line["frozen"] == frozen]
        return found[-1] if found else None

    def changed(self, space: str, row_hashes: Hashes, fingerprint: str) -> list[int]:
        """Numbers of the earlier openings by this module that do not count for these test rows.

        They may be openings of the same data, rescaled or with other labels, which no hash can tell.

        Args:
            space: The module's path, as in the ``space`` of its entries; those without one are left out.
        """
        lines = self.entries()
        counted = {line["number"] for line in self._same(lines, "opening", row_hashes, fingerprint)}
        mine = (line for line in lines if line["kind"] == "opening" and line.get("space") == space)
        return [int(line["opening"]) for line in mine if line["number"] not in counted]

    def record_guard(self, entry: Mapping[str, Any], row_hashes: Hashes) -> None:
        """Enter how many trials guard rows have judged in a study; its last count of these rows holds.

        Args:
            entry: JSON with at least ``study_id``, ``fingerprint`` (of the guard rows) and ``trials``.
            row_hashes: One per guard row.
        """
        _check(entry, "study_id", "fingerprint", "trials")
        with self._chain.locked() as (file, lines):
            rows = self._chain.keep_rows(row_hashes, "nothing was entered")
            self._chain.add(file, lines, {"kind": "guard", **entry, "rows": rows}, "nothing was entered")

    def guard_use(self, row_hashes: Hashes, fingerprint: str, study_id: str) -> GuardUse:
        """What these guard rows were used for by other studies than ``study_id``.

        Args:
            row_hashes: One per guard row; fingerprint: of these rows.
        """
        same = self._same(self.entries(), "guard", row_hashes, fingerprint)
        trials = {line["study_id"]: int(line["trials"]) for line in same if line["study_id"] != study_id}
        return GuardUse(len(trials), sum(trials.values()))

    def summary(self) -> dict[str, Any]:
        """What the ledger holds, after checking all of it.

        Returns:
            JSON: ``path`` (or the database's address), ``lines`` (their number), ``openings`` and ``guard`` (lists,
            oldest first, of ``time``, ``study``, ``rows``, ``fingerprint``, and ``opening``, ``alpha``, ``result``
            (whether one was recorded) or ``trials``). Of a study's guard lines only those that hold. What an older
            version did not record is None.
        """
        lines, rows = self._checked()
        results = [line for line in lines if line["kind"] == "result"]
        openings, guard = [], {}
        for line in lines:
            shown = {key: line.get(key) for key in ("time", "study", "fingerprint")}
            if line["kind"] == "opening":
                answered = any(_answers(result, line) for result in results)
                shown |= {"opening": line["opening"], "alpha": line.get("alpha"), "result": answered}
                openings.append(shown | {"rows": rows[line["rows"]]})
            elif line["kind"] == "guard":
                # The last line of a study counts, in the place of its first.
                guard[line["study_id"], line["rows"]] = shown | {"trials": line["trials"], "rows": rows[line["rows"]]}
        return {"path": self._chain.shown, "lines": len(lines), "openings": openings, "guard": list(guard.values())}

    def _checked(self) -> tuple[tuple[Line, ...], dict[str, int]]:
        """All lines, and the number of rows in each set that they name, after reading every set."""
        lines = self.entries()
        named = {line["rows"]: line for line in reversed(lines) if "rows" in line}
        return lines, {digest: len(self._chain.rows(line)) for digest, line in named.items()}

    def _count(self, lines: Sequence[Line], row_hashes: Hashes, fingerprint: str, prior: int) -> int:
        before = [int(line["opening"]) for line in self._same(lines, "opening", row_hashes, fingerprint)]
        # A test set that grew out of a used one has that one's count, even where the first rows are gone.
        return max([len(before) + prior, *before])

    def _same(self, lines: Iterable[Line], kind: str, row_hashes: Hashes, fingerprint: str) -> list[Line]:
        """The lines of this kind whose rows are these."""
        shares: dict[str, float] = {}
        same = []
        for line in lines:
            if line["kind"] != kind:
                continue
            if line["rows"] not in shares:
                shares[line["rows"]] = float(np.isin(row_hashes, self._chain.rows(line)).mean())
            if line["fingerprint"] == fingerprint or shares[line["rows"]] >= SAME_ROWS:
                same.append(line)
        return same


def times(openings: int) -> str:
    """How often, in words."""
    return "once" if openings == 1 else f"{openings} times"


def default_path() -> Path | str:
    """``HELDOUT_LEDGER``, a file or a database's address, or ``ledger.jsonl`` in the user's data folder."""
    given = os.environ.get("HELDOUT_LEDGER")
    if given:
        return given if database_chain.address(given) else Path(given).expanduser()
    import platformdirs

    return Path(platformdirs.user_data_dir("heldout")) / "ledger.jsonl"


def lines(found: Mapping[str, Any]) -> list[str]:
    """A summary for people: a line on the file, then aligned columns."""
    count, openings, guard = found["lines"], found["openings"], found["guard"]
    if not count:
        return [f"the ledger {found['path']} is empty: no test rows have been opened"]
    out = [f"the ledger {found['path']}: {count} line{'' if count == 1 else 's'}, chain unbroken"]
    if openings:
        out += ["openings of test rows:", *_aligned(openings, "opening", "rows", "alpha", "fingerprint", "result")]
    if guard:
        out += ["trials judged by guard rows:", *_aligned(guard, "trials", "rows", "fingerprint")]
    return out


def _aligned(found: Sequence[Mapping[str, Any]], *columns: str) -> list[str]:
    names = ("time", "study", *columns)
    table = [names, *(tuple(_SHOWN.get(name, str)(one[name]) for name in names) for one in found)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [("    " + "  ".join(map(str.ljust, row, widths))).rstrip() for row in table]


_SHOWN: dict[str, Callable[[Any], str]] = {
    "time": lambda at: "-" if at is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(at)),
    "study": lambda name: name or "-",
    "alpha": lambda share: "-" if share is None else f"{share:.4f}",
    "fingerprint": lambda digest: str(digest[:12]),
    "result": lambda recorded: "recorded" if recorded else "none",
}


def _answers(result: Mapping[str, Any], line: Line) -> bool:
    """Whether a line is the opening that a result belongs to."""
    return line["kind"] == "opening" and all(line[key] == result[key] for key in ("opening", "frozen"))


def _check(entry: Mapping[str, Any], *needed: str) -> None:
    # A line without these would make every later question fail, and a line cannot be taken back.
    if missing := set(needed) - set(entry):
        raise ValueError(f"an entry must have {', '.join(needed)}, but has no {', '.join(sorted(missing))}")
    if clash := _OURS & set(entry):
        raise ValueError(f"an entry must leave {', '.join(sorted(_OURS))} to the ledger, but has {sorted(clash)}")

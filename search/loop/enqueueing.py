"""Configurations that are tried first: read from a file, fitted to the space, and queued as waiting trials."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search.definition.space import Parameter, Space
from search.errors import RequestError
from search.record.journal import Journal
from search.trial import Trial, Value, seed_for

_MARK = "enqueued"  # in the memo of a queued trial: where its configuration is from


@dataclass(frozen=True)
class Wish:
    """A configuration that somebody wants tried.

    Attributes:
        params: Values by key or plain name; parameters that are left out take their defaults.
        source: Where it is from, for people.
        as_text: Whether values are text that has yet to be read, as a table has them.
    """

    params: Mapping[str, Any]
    source: str
    as_text: bool = False


@dataclass(frozen=True)
class Fitted:
    """A wish in the terms of a space.

    Attributes:
        params: A whole configuration.
        defaulted: Keys of parameters that took their defaults; unused: names that it does not make active.
    """

    params: Mapping[str, Value]
    defaulted: tuple[str, ...]
    unused: tuple[str, ...]


def read(path: str | None) -> list[Wish]:
    """The configurations of a file: a JSON list of objects, one object, an object a line, or CSV with a header.

    Raises:
        RequestError: If the file cannot be read as any of them.
    """
    if path is None:
        return []
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise RequestError(f"--enqueue must name a file of configurations, but {path} cannot be read: {why}") from None
    name = Path(path).name
    as_text = name.lower().endswith(".csv")
    found = _rows(path, text) if as_text else _objects(path, text)
    if not found:
        raise RequestError(f"--enqueue must name a file of configurations, but {path} has none")
    for number, one in enumerate(found, 1):
        if not isinstance(one, dict):
            raise RequestError(f"{path}, entry {number} must be a JSON object of names and values, but is {one!r}")
    return [Wish(one, f"{name}, entry {number}", as_text) for number, one in enumerate(found, 1)]


def _objects(path: str, text: str) -> list[Any]:
    try:
        found = _loaded(path, text)
    except (ValueError, RecursionError) as whole:
        try:
            return [_loaded(path, line) for line in text.splitlines() if line.strip()]
        except (ValueError, RecursionError):
            raise RequestError(
                f"--enqueue must name a JSON list of objects, an object a line, or a .csv file, but {path} is none of "
                f"these: {whole}"
            ) from None
    return found if isinstance(found, list) else [found]


def _loaded(path: str, text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _check_once(path, [name for name, _ in pairs])
        return dict(pairs)

    return json.loads(text, object_pairs_hook=once)


def _check_once(path: str, names: Sequence[str]) -> None:
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise RequestError(f"{path} must give each parameter one value, but names {twice[0]!r} twice; leave one out")


def _rows(path: str, text: str) -> list[Any]:
    try:
        header, *rows = list(csv.reader(text.splitlines(), skipinitialspace=True)) or [[]]
    except csv.Error as error:
        raise RequestError(f"--enqueue must name a table with a header, but {path} cannot be read: {error}") from None
    _check_once(path, [name.strip() for name in header])
    found = []
    for number, row in enumerate((row for row in rows if row), 1):
        if len(row) != len(header):
            raise RequestError(
                f"{path}, entry {number} must have {len(header)} fields, as the header has, but has {len(row)}"
            )
        found.append({name.strip(): cell.strip() for name, cell in zip(header, row, strict=True) if cell.strip()})
    return found


def check_room(trials: int, wishes: Sequence[Wish], path: str | None) -> None:
    """See that the plan has a trial for each wish, beside the baseline.

    Raises:
        RequestError: If it has not.
    """
    if len(wishes) > trials - 1:
        raise RequestError(
            f"--trials must be at least {len(wishes) + 1}, for the baseline and the {len(wishes)} configurations of "
            f"{path}, but got {trials}"
        )


def fitted(wish: Wish, space: Space) -> Fitted:
    """The wish as a configuration of the space.

    Raises:
        RequestError: If it has a name or a value that the space does not.
    """
    used: set[str] = set()
    defaulted: list[str] = []

    def choose(parameter: Parameter) -> Value:
        name = parameter.key if parameter.key in wish.params else parameter.name
        if name not in wish.params:
            defaulted.append(parameter.key)
            default = parameter.domain.default
            return parameter.domain.value(0.0) if default is None else default
        value = _match(parameter, wish.params[name], wish.as_text)
        if value is None:
            raise _refused(wish, name, [parameter])
        used.add(name)
        return value

    params = space.walk(choose)
    for name, value in wish.params.items():
        meant = [p for p in space.declared if name in (p.key, p.name)]
        if not meant:
            near = difflib.get_close_matches(name, space.parameters, n=1)
            maybe = f" (did you mean {near[0]!r}?)" if near else ""
            raise RequestError(
                f"{wish.source}: {name!r} must be a parameter of the space{maybe}, which has "
                f"{', '.join(space.parameters)}; what is only asked for in fit or callbacks cannot be enqueued"
            )
        if name not in used and all(_match(p, value, wish.as_text) is None for p in meant):
            raise _refused(wish, name, meant)
    return Fitted(params, tuple(defaulted), tuple(name for name in wish.params if name not in used))


def _match(parameter: Parameter, value: Any, as_text: bool) -> Value | None:
    found = parameter.domain.match(value)
    if found is not None or not as_text:
        return found
    if value.lower() in ("true", "false"):
        return parameter.domain.match(value.lower() == "true")
    for reading in (int, float, _whole):
        with contextlib.suppress(ValueError):
            if (found := parameter.domain.match(reading(value))) is not None:
                return found
    return None


def _whole(text: str) -> int:
    """A whole number as it is written in a column with gaps, such as 64.0."""
    number = float(text)
    if not number.is_integer():
        raise ValueError(text)
    return int(number)


def _refused(wish: Wish, name: str, meant: Sequence[Parameter]) -> RequestError:
    domains = " or ".join(str(parameter.domain) for parameter in meant)
    return RequestError(
        f"{wish.source}: {name} must be in {domains}, but got {wish.params[name]!r}; change it, or leave it out for "
        "the default"
    )


def queue(journal: Journal, wishes: Sequence[Wish], seed: int, say: Callable[[str], None]) -> None:
    """Record each wish as a waiting trial, once the space is known and the baseline has begun.

    A configuration that is the baseline's, or an earlier wish's, is said and left out.

    Raises:
        RequestError: If one does not fit the space; then none is recorded.
    """
    space, history = journal.space(), journal.history()
    seen = {space.signature(space.defaults()): "the baseline"}
    trials: list[Trial] = []
    defaulted: dict[str, None] = {}
    for wish in wishes:
        found = fitted(wish, space)
        signature = space.signature(found.params)
        if signature in seen:
            say(f"{wish.source} is the same configuration as {seen[signature]}, so it is not tried again")
            continue
        seen[signature] = wish.source
        if found.unused:
            say(f"{wish.source}: {', '.join(found.unused)} not used, since its other values do not make it active")
        defaulted |= dict.fromkeys(found.defaulted)
        number = history[-1].number + 1 + len(trials)
        memo = {_MARK: wish.source}
        waits = Trial(number, params=found.params, seed=seed_for(seed, number), memo=memo)
        trials.append(dataclasses.replace(waits, history_length=journal.length))
    with journal.one_commit():
        for trial in trials:
            journal.queue(trial)
    if trials:
        rest = f"; where they leave out {', '.join(defaulted)}, the default stands in" if defaulted else ""
        say(f"{len(trials)} configuration{'s' if len(trials) > 1 else ''} enqueued, to be tried first{rest}")


def source(trial: Trial) -> str | None:
    """Where a queued trial's configuration is from; None for any other trial."""
    return str(trial.memo[_MARK]) if isinstance(trial.memo, dict) and _MARK in trial.memo else None


def unbegun(trials: Sequence[Trial]) -> list[Trial]:
    """Queued trials that have never run."""
    return [trial for trial in trials if trial.is_queued]


def begun(trials: Sequence[Trial]) -> list[Trial]:
    """All others: what is queued is no trial yet."""
    return [trial for trial in trials if not trial.is_queued]

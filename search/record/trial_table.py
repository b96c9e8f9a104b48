"""A study's trials as a table, one row each: for pandas, spreadsheets and the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from search.errors import RequestError
from search.trial import Trial

if TYPE_CHECKING:
    import pandas
    from rich.table import Table

_SHOWN = ("number", "state", "score", "epochs", "seconds")  # at a terminal, besides the parameters
_PARAMS = "params."


def dataframe(trials: Iterable[Trial]) -> pandas.DataFrame:
    """One row per trial.

    Columns: ``number``, ``state``, ``score`` (on validation rows), ``seconds`` (of its last attempt), ``epochs``,
    ``best_epoch``, ``size`` (weights of its model), ``flops`` (floating-point operations of one row),
    ``confirms``, ``attempt``, ``seed``, ``started``, ``ended`` (UTC), ``reason`` and ``message``
    of a failure, and ``params.NAME`` for each parameter, missing where a trial did not ask for it. Scores on guard rows
    are not in it: they choose the winner, once.
    """
    import pandas

    rows = [_row(trial) for trial in trials]
    names = dict.fromkeys(name for row in rows or [_row(Trial(0))] for name in row)
    frame = pandas.DataFrame({name: _column([row.get(name) for row in rows]) for name in names})
    for name in ("started", "ended"):
        frame[name] = pandas.to_datetime(frame[name].astype("float64"), unit="s", utc=True)
    return frame


def _column(values: Sequence[Any]) -> Any:
    """Whole numbers and truths stay what they are in a column that has gaps."""
    import pandas

    kinds = {type(value) for value in values if value is not None}
    if kinds == {int} and all(value is None or abs(value) < 2**63 for value in values):
        return pandas.array(values, dtype="Int64")
    return pandas.array(values, dtype="boolean") if kinds == {bool} else pandas.Series(values)


def _row(trial: Trial) -> dict[str, Any]:
    return {
        "number": trial.number,
        "state": trial.state.value,
        "score": trial.score,
        "seconds": trial.seconds,
        "epochs": trial.epochs,
        "best_epoch": trial.best_epoch,
        "size": trial.size,
        "flops": trial.extra.get("flops"),
        "confirms": trial.confirms,
        "attempt": trial.attempt,
        "seed": trial.seed,
        "started": trial.started,
        "ended": trial.ended,
        "reason": trial.reason,
        "message": trial.message,
        **{_PARAMS + key: value for key, value in trial.params.items()},
    }


def epochs(reports: Sequence[Mapping[str, Any]]) -> pandas.DataFrame:
    """One row per epoch of a trial, of all its attempts: ``attempt``, ``epoch`` (from 1), and what Keras reported.

    Args:
        reports: Of ``report.show``: each with ``attempt``, ``step`` and ``metrics`` by name.
    """
    import pandas

    rows = [{"attempt": one["attempt"], "epoch": one["step"], **one["metrics"]} for one in reports]
    return pandas.DataFrame(rows, columns=None if rows else ["attempt", "epoch"])


def write_parquet(frame: pandas.DataFrame, path: Path) -> None:
    """Write the table to a Parquet file; a parameter whose values have several types becomes text.

    Raises:
        RequestError: If the file cannot be written.
    """
    mixed = [name for name in frame if frame[name].dtype == object and frame[name].dropna().map(type).nunique() > 1]
    whole = frame.assign(**{name: frame[name].map(str, na_action="ignore") for name in mixed})
    try:
        whole.to_parquet(path, index=False)
    except OSError as error:
        why = error.strerror or error  # pandas raises some with a message alone
        raise RequestError(f"--parquet must name a file that can be written, but {path}: {why}") from None


def shown(frame: pandas.DataFrame) -> Table:
    """The table for a terminal."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    names = [*_SHOWN, *(name for name in frame if name.startswith(_PARAMS))]
    for name in names:
        justify: Literal["left", "right"] = "left" if name == "state" else "right"
        table.add_column(name.removeprefix(_PARAMS), justify=justify, no_wrap=name in _SHOWN, overflow="fold")
    for row in frame[names].itertuples(index=False):
        table.add_row(*map(_cell, row))
    return table


def _cell(value: Any) -> str:
    import pandas

    if pandas.isna(value):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)

"""Gaussian-process sampler: models the losses over the space, and proposes where most improvement is expected."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

from search.samplers import Proposal
from search.samplers.gaussian_process import Posterior, fit, improvement_slopes, log_improvement
from search.space import Parameter, Space
from search.trial import Trial, TrialState, Value

import os, json
X = json.loads(os.environ.get("GPX", "{}"))

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

_STARTUP = X.get("startup", 10)
_CANDIDATES = X.get("candidates", 1024)
_POINTS = 300
_STARTS = X.get("local", 6)
_ROUNDS = 30
_FEW = 16
_MANY = 256
_STEPS = (-0.25, -0.1, -0.04, -0.015, -0.005, 0.005, 0.015, 0.04, 0.1, 0.25)


class _Axis:
    """Where a parameter's values lie: at units of its scale, or one-hot if they have no order."""

    def __init__(self, parameter: Parameter) -> None:
        domain = parameter.domain
        self.key, self.domain = parameter.key, domain
        self.unordered = bool(domain.values) and not domain.ordered and len(domain.values) > 2
        self.levels: Array | None = None
        if self.unordered:
            self.levels = np.arange(float(len(domain.values)))
        elif domain.count is not None and domain.count <= _MANY:
            self.levels = np.array([domain.unit(value) for value in domain.near(domain.value(0.0))])

    def place(self, value: Value | None) -> float:
        found = self.domain.match(value)
        if found is None:
            return math.nan
        return float(self.domain.values.index(found)) if self.unordered else self.domain.unit(found)

    def value(self, place: float) -> Value:
        return self.domain.values[int(place)] if self.unordered else self.domain.value(float(place))

    def snapped(self, units: Array) -> Array:
        """Places of draws from [0, 1]."""
        if self.levels is None:
            return units
        if self.unordered or self.domain.values or self.domain.step is not None:
            return self.levels[np.minimum((units * len(self.levels)).astype(int), len(self.levels) - 1)]
        return self.levels[np.searchsorted((self.levels[1:] + self.levels[:-1]) / 2, units)]

    def features(self, places: Array) -> Array:
        active = ~np.isnan(places)
        if self.unordered:
            return np.asarray((places[:, None] == self.levels) / math.sqrt(2))
        return np.stack([np.where(active, places, 0.5), np.where(active, 0.0, X.get("inactive", 0.5))], axis=1)

    @property
    def width(self) -> int:
        return len(self.domain.values) if self.unordered else 2


class _Chart:
    """Configurations of a space as rows of places, one column an axis; NaN where an axis is inactive."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.axes = [_Axis(parameter) for parameter in space.declared if parameter.domain.count != 1]
        self._columns = {axis.key: number for number, axis in enumerate(self.axes)}
        self.groups = np.repeat(np.arange(len(self.axes)), [axis.width for axis in self.axes])
        self._masks: dict[tuple[Any, ...], Mask] = {}

    def row(self, trial: Trial) -> Array:
        return np.array([axis.place(trial.params.get(axis.key)) for axis in self.axes])

    def params(self, row: Array) -> dict[str, Value]:
        def choose(parameter: Parameter) -> Value:
            column = self._columns.get(parameter.key)
            return parameter.domain.value(0.0) if column is None else self.axes[column].value(row[column])

        return self.space.walk(choose)

    def masked(self, rows: Array) -> Array:
        """The same with NaN where an axis is inactive."""
        out = rows.copy()
        questions = [(self._columns[key], bound) for key, bound in self.space.questions if key in self._columns]
        answers = [self._answers(column, rows[:, column], bound) for column, bound in questions]
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for number, kind in enumerate(zip(*answers, strict=True) if answers else [()] * len(rows)):
            kinds.setdefault(kind, []).append(number)
        for kind, members in kinds.items():
            if kind not in self._masks:
                active = self.params(rows[members[0]])
                self._masks[kind] = np.array([axis.key not in active for axis in self.axes])
            out[np.ix_(members, np.flatnonzero(self._masks[kind]))] = math.nan
        return out

    def _answers(self, column: int, places: Array, bound: float | None) -> list[Any]:
        axis = self.axes[column]
        values = [axis.value(place) for place in places]
        return values if bound is None else [v if isinstance(v, str | bool) else v <= bound for v in values]

    def features(self, placed: Array) -> Array:
        return np.concatenate([axis.features(placed[:, n]) for n, axis in enumerate(self.axes)], axis=1)

    def spread(self, count: int, seed: int) -> Array:
        """Quasi-random rows."""
        sobol = stats.qmc.Sobol(len(self.axes), rng=np.random.default_rng(seed))
        units = sobol.random(count)
        return np.stack([axis.snapped(units[:, n]) for n, axis in enumerate(self.axes)], axis=1)


def _marks(placed: Array) -> list[bytes]:
    return [row.tobytes() for row in np.round(placed, 9)]


def _targets(losses: Array, warp: str) -> Array:
    """Losses made fit for a Gaussian process, standardised."""
    y = losses / max(1.0, float(np.abs(losses).max()))
    if warp == "none":
        pass
    elif warp == "rank":
        y = special.ndtri((stats.rankdata(y) - 0.5) / len(y))
    elif warp in ("winsor", "winsorlog"):
        med, best = np.median(y), y.min()
        cap = med + X.get("cap", 2.0) * (med - best)
        y = np.minimum(y, cap)
        if warp == "winsorlog":
            y = np.log(y - best + X.get("logeps", 0.1) * (med - best) + 1e-300)
    elif warp in ("half", "halflog"):
        y = _half(y)
        if warp == "halflog":
            y = (y - y.min()) / max(np.ptp(y), 1e-300)
            y = np.log(y + X.get("logeps", 0.1))
    elif warp == "yj":
        lo = np.median(y) - y.min()
        y = (y - np.median(y)) / max(lo, 1e-300)
        y = np.minimum(y, 20)
        y = stats.yeojohnson(y)[0]
    deviation = y.std()
    return (y - y.mean()) / deviation if deviation > 1e-12 else np.zeros_like(y)


def _half(y: Array) -> Array:
    """Values above the median at the half-normal quantiles of their ranks, on the scale of those below."""
    median = np.median(y)
    good = y <= median
    scale = math.sqrt(float(((y[good] - median) ** 2).mean()))
    ranks = stats.rankdata(y, method="average") / (len(y) + 1)
    return np.where(good, y, median + scale * special.ndtri(np.maximum(ranks, 0.5)))


class GPSampler:
    """Expected improvement under a Gaussian process (Jones et al., 1998)."""

    name = "gp"

    def ask(self, history: Sequence[Trial], space: Space, seed: int) -> Proposal:
        """Propose one configuration; see ``Sampler.ask``."""
        with _one_thread():
            return Proposal(_ask(history, space, seed % 2**63))


def _one_thread() -> Any:
    return _controller().limit(limits=1, user_api="blas")


@functools.cache
def _controller() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def _ask(history: Sequence[Trial], space: Space, seed: int) -> dict[str, Value]:
    chart = _Chart(space)
    if not chart.axes:
        return space.defaults()
    rng = np.random.default_rng(seed)
    finished = [trial for trial in history if trial.state.is_finished]
    complete = [trial for trial in finished if trial.state is TrialState.COMPLETE]
    tried = np.array([chart.row(trial) for trial in history]).reshape(len(history), len(chart.axes))
    seen = set(_marks(tried))
    if len(finished) < _STARTUP or not complete:
        return chart.params(_first(chart, tried, seen, rng))
    observed = [n for n, trial in enumerate(history) if trial.state is TrialState.COMPLETE]
    losses = np.array([history[n].loss for n in observed])
    targets = _targets(losses, X.get("warp", "none"))
    rows = tried[observed]
    features = chart.features(rows)
    variances = np.ones(len(rows))
    scales = fit(features, chart.groups, targets, variances)
    posterior = Posterior(features, chart.groups, targets, variances, scales)
    best = float(targets.min()) if X.get("incumbent", "mean") == "min" else float(posterior.mean(features).min())
    pending = [n for n, trial in enumerate(history) if not trial.state.is_finished]
    if pending:
        waiting = chart.features(tried[pending])
        mu = posterior.mean(waiting)
        if X.get("liar") == "max":
            mu = np.maximum(mu, targets.max())
        elif X.get("liar") == "med":
            mu = np.maximum(mu, np.median(targets))
        posterior = Posterior(
            np.concatenate([features, waiting]),
            chart.groups,
            np.concatenate([targets, mu]),
            np.ones(len(features) + len(waiting)),
            scales,
        )
        if X.get("incumbent", "mean") != "min":
            best = float(posterior.mean(features).min())
    return chart.params(_search(chart, posterior, best, rows[np.argsort(targets, kind="stable")], seen, rng))


def _first(chart: _Chart, tried: Array, seen: set[bytes], rng: np.random.Generator) -> Array:
    rows = chart.spread(64, int(rng.integers(2**32)))
    placed = chart.masked(rows)
    if not len(tried) or X.get("first", "maximin") == "random":
        return rows[0]
    if X.get("first") == "pairs":
        a, b = chart.features(placed), chart.features(tried)
        d = (a[:, None, :] - b) ** 2 + 0.01
        crit = -(1 / np.prod(d[:, :, ::2], axis=2)).sum(axis=1)
        return rows[np.argmax(crit)]
    a, b = chart.features(placed), chart.features(tried)
    return rows[np.argmax(((a[:, None, :] - b) ** 2).sum(axis=2).min(axis=1))]


def _search(
    chart: _Chart, posterior: Posterior, best: float, ranked: Array, seen: set[bytes], rng: np.random.Generator
) -> Array:
    """The row of highest acquisition among those that are new."""

    def score(rows: Array) -> Array:
        placed = chart.masked(rows)
        new = np.array([mark not in seen for mark in _marks(placed)])
        out = np.full(len(rows), -math.inf)
        if new.any():
            mean, deviation = posterior.predict(chart.features(placed[new]))
            out[new] = log_improvement(mean, deviation, best)
        return out

    rows = chart.spread(_CANDIDATES, int(rng.integers(2**32)))
    near = np.repeat(ranked[:5], 32, axis=0)
    fresh = rows[rng.integers(len(rows), size=len(near))]
    near = np.where(np.isnan(near) | (rng.random(near.shape) < 0.3), fresh, near)
    rows = np.concatenate([near, rows])
    values = score(rows)
    order = np.argsort(-values, kind="stable")
    starts = rows[order[:_STARTS]]
    scores = values[order[:_STARTS]]
    top = np.where(np.isnan(ranked[:2]), rows[: len(ranked[:2])], ranked[:2])
    starts, scores = np.concatenate([starts, top]), np.concatenate([scores, np.full(len(top), -math.inf)])
    live = np.ones(len(starts), bool)
    for _ in range(_ROUNDS):
        moves = [_moves(chart, start) for start in starts[live]]
        values = score(np.concatenate(moves))
        parts = np.split(values, np.cumsum([len(part) for part in moves])[:-1])
        for number, part, options in zip(np.flatnonzero(live), parts, moves, strict=True):
            pick = int(np.argmax(part))
            live[number] = part[pick] > scores[number] + 1e-6
            if live[number]:
                starts[number], scores[number] = options[pick], part[pick]
        if not live.any():
            break
    return starts[np.argmax(scores)]


def _moves(chart: _Chart, row: Array) -> Array:
    """Rows that differ in one active axis."""
    out = []
    active = ~np.isnan(chart.masked(row[None])[0])
    for column, axis in enumerate(chart.axes):
        if not active[column]:
            continue
        if axis.levels is not None and (axis.unordered or len(axis.levels) <= _FEW):
            values = axis.levels[axis.levels != row[column]]
        else:
            values = axis.snapped(np.clip(row[column] + np.array(_STEPS), 0, 1))
        moved = np.repeat(row[None], len(values), axis=0)
        moved[:, column] = values
        out.append(moved)
    return np.concatenate(out)

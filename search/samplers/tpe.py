"""TPE: Hyperopt's Parzen estimators over whole configurations, split into good and bad where a parameter is active.

Hyperopt scores each parameter on its own, and its trials are good or bad once for all of them. Here a trial is one
kernel over all parameters that it shares with the configuration being made, so that what goes together stays
together; and parameters that the same trials have are chosen by those trials alone, given what is chosen already.
Widths and the weights of old trials are Hyperopt's. Every kernel ends where its domain ends, and gives a value of a
discrete domain the mass of that value's share.
"""

from __future__ import annotations

import bisect
import contextlib
import heapq
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from search.definition.space import Parameter, Space
from search.record.trials import Trials
from search.samplers import Proposal
from search.trial import Trial, TrialState, Value

_STARTUP = 10  # finished trials before the history beats the prior
_LEAST = 10  # the same for a parameter that only some trials have
_GOOD = 0.2  # share of the trials that count as good; Hyperopt's square-root rule leaves one or two of fifty
_NARROW = 0.5  # of Hyperopt's widths, which were made for one parameter at a time
_FLOOR = 0.3  # of a discrete value's share: the least width
_CANDIDATES = 24  # as Hyperopt draws
_BEST, _NEWEST = 100, 400  # trials of a longer history that are looked at
_MOST_CELLS = 10_000  # beyond them a discrete domain is as good as continuous
_UNORDERED = ("choice", "boolean")


class TPESampler:
    """Tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011), multivariate as by Falkner et al., ICML 2018.

    Args:
        joint: False scores each parameter on its own, as Hyperopt does; for comparison.
        good: Share of good trials; None for Hyperopt's rule.
        narrow: Factor of Hyperopt's widths.
        candidates: How many configurations are drawn from the good trials' density, to take the best of.
        startup: Finished trials before the history is looked at.
    """

    name = "tpe"

    def __init__(
        self,
        *,
        joint: bool = True,
        good: float | None = _GOOD,
        narrow: float = _NARROW,
        candidates: int = _CANDIDATES,
        startup: int = _STARTUP,
    ) -> None:
        self._joint, self._good, self._narrow = joint, good, narrow
        self._candidates, self._startup = candidates, startup

    def ask(self, history: Sequence[Trial], space: Space, seed: int) -> Proposal:
        """Propose one configuration; see ``Sampler.ask``.

        Pending trials stand in as the worst ones, which keeps simultaneous proposals apart.
        """
        finished = (True for trial in history if trial.state.is_finished)  # looks no further than it needs to
        if sum(itertools.islice(finished, self._startup)) < self._startup or not any(
            trial.state is TrialState.COMPLETE for trial in history
        ):
            return Proposal(space.sample(random.Random(seed)))
        rng = np.random.default_rng(seed)
        chosen: dict[str, Value] = {}
        open_ = [parameter for parameter in space.declared if parameter.domain.count != 1]
        seen = Seen(history, open_)
        groups = {parameter.key: seen.having(parameter) for parameter in open_}

        def choose(parameter: Parameter) -> Value:
            if parameter.key not in chosen:
                trials = groups.get(parameter.key, ())
                if len(trials) < _LEAST:
                    return parameter.draw(seed)
                group = [other for other in open_ if groups[other.key] == trials]
                given = [other for other in open_ if other.key in chosen and set(groups[other.key]) >= set(trials)]
                for part in [group] if self._joint else [[other] for other in group]:
                    chosen.update(self._chosen(part, given if self._joint else [], trials, seen, chosen, rng))
            return chosen[parameter.key]

        return Proposal(space.walk(choose))

    def _chosen(
        self,
        group: Sequence[Parameter],
        given: Sequence[Parameter],
        trials: Sequence[int],
        seen: Seen,
        chosen: dict[str, Value],
        rng: np.random.Generator,
    ) -> dict[str, Value]:
        """The best of the candidates for parameters that the same trials have.

        Args:
            given: Parameters that have their values already, and that all these trials have too.
        """
        from hyperopt.tpe import linear_forgetting_weights

        count = sum(seen.history[trial].state.is_finished for trial in trials)
        most = math.ceil(_rule(count) if self._good is None else self._good * count)
        sound = sum(seen.history[trial].state is not TrialState.FAILED for trial in trials)
        by_rank = sorted(trials, key=seen.ranks.__getitem__)
        split = min(max(1, most), sound, len(trials) - 1)  # where all failed, the prior alone is good
        good, bad = sorted(by_rank[:split]), sorted(by_rank[split:])  # oldest first
        above = _Density([*group, *given], seen, good, np.ones(len(good)), self._narrow)
        below = _Density([*group, *given], seen, bad, linear_forgetting_weights(len(bad), 25), self._narrow)
        fixed = [_place(parameter, chosen[parameter.key]) for parameter in given]
        drawn = above.draw(len(group), fixed, self._candidates, rng)
        whole = {parameter.key for parameter in (*group, *given)}
        tried = {
            tuple(seen.history[trial].params[parameter.key] for parameter in (*group, *given))
            for trial in trials
            if seen.keys[trial] == whole and seen.history[trial].number >= 0
        }
        values = [tuple(_value(parameter, at) for parameter, at in zip(group, row, strict=True)) for row in drawn]
        rest = tuple(chosen[parameter.key] for parameter in given)
        fresh = [found for found in dict.fromkeys(values) if (*found, *rest) not in tried] or values
        places = np.array([[*map(_place, group, found), *fixed] for found in fresh])
        score = above.log(places) - below.log(places)
        best = fresh[int(np.argmax(score))]
        return {parameter.key: value for parameter, value in zip(group, best, strict=True)}


def _rule(count: int) -> float:
    """Hyperopt's number of good trials."""
    return min(0.25 * math.sqrt(count), 25.0)


class Seen:
    """The trials that are looked at: all of a short history, the best and the newest of a long one.

    Attributes:
        history: In order of their number.
        keys: Of the parameters that each has; those of one value alone are left out.
        ranks: As ``ranks`` says.
    """

    def __init__(self, history: Sequence[Trial], open_: Sequence[Parameter]) -> None:
        self.history = history
        if len(history) > _BEST + _NEWEST:
            newest = len(history) - _NEWEST
            kept = sorted(index for index in best_places(history) if index < newest)
            self.history = [*(history[index] for index in kept), *history[newest:]]
        known = {parameter.key for parameter in open_}
        self.keys = [trial.params.keys() & known for trial in self.history]
        self.ranks = ranks(self.history)
        self.places: dict[str, dict[int, float]] = {}

    def having(self, parameter: Parameter) -> tuple[int, ...]:
        """Indices of the trials that have a value for it."""
        places = self.places[parameter.key] = {}
        for index, trial in enumerate(self.history):
            if parameter.key in trial.params:
                with contextlib.suppress(ValueError):  # a value from before the declaration changed
                    places[index] = _place(parameter, trial.params[parameter.key])
        return tuple(places)


class _Leaders:
    """The best of the trials that have a loss; see ``Follower``."""

    def __init__(self) -> None:
        self.best: list[tuple[tuple[int, int, float], int]] = []

    def take(self, place: int, trial: Trial) -> None:
        """See ``Follower.take``."""
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
            bisect.insort(self.best, (badness(trial), place))
            del self.best[_BEST:]


def best_places(history: Sequence[Trial]) -> list[int]:
    """Indices of the ``_BEST`` trials by ``ranks``, the best first."""
    found = Trials.of(history).follower(_Leaders).best
    if len(found) < _BEST:  # the earliest of those without a loss follow
        found = heapq.nsmallest(_BEST, zip(map(badness, history), range(len(history)), strict=True))
    return [place for _, place in found]


def ranks(history: Sequence[Trial]) -> list[int]:
    """By index, 0 for the best: complete trials by loss, then pruned ones by how far they came and by loss, then
    failed and pending ones. Of equal ones the earlier is the better."""
    places = [0] * len(history)
    ordered = sorted(range(len(history)), key=lambda index: (*badness(history[index]), index))
    for rank, index in enumerate(ordered):
        places[index] = rank
    return places


def badness(trial: Trial) -> tuple[int, int, float]:
    """By which trials are ordered, the best first; see ``ranks``."""
    loss = math.inf if trial.loss is None else trial.loss
    if trial.state is TrialState.COMPLETE:
        return 0, 0, loss
    if trial.state is TrialState.PRUNED:
        return 1, -trial.epochs, loss
    return 2, 0, math.inf


def _is_unordered(parameter: Parameter) -> bool:
    return parameter.domain.kind in _UNORDERED and not parameter.domain.ordered


def _place(parameter: Parameter, value: Value) -> float:
    """Where a value lies in [0, 1], or its index where values have no order."""
    if not _is_unordered(parameter):
        return parameter.domain.unit(value)
    found = parameter.domain.match(value)
    if found is None:
        raise ValueError(f"the value must be one of {parameter.domain}, but is {value!r}")
    return float(parameter.domain.values.index(found))


def _value(parameter: Parameter, place: float) -> Value:
    return parameter.domain.values[int(place)] if _is_unordered(parameter) else parameter.domain.value(float(place))


@dataclass(frozen=True)
class _Axis:
    """One parameter's kernels.

    Attributes:
        centres: Of shape (trials,).
        widths: The same shape; of an unordered parameter, the chance of another value than the trial's.
        cells: Number of equal shares of a discrete domain, 0 for a continuous one; choices: of unordered values, or 0.
    """

    centres: Any
    widths: Any
    cells: int
    choices: int

    def density(self, at: Any) -> Any:
        """Of shape (places, trials), the uniform prior being 1."""
        from scipy.special import ndtr

        if self.choices:
            same = at[:, None] == self.centres[None, :]
            return np.where(same, 1 - self.widths, 0) * self.choices + self.widths
        z = (at[:, None] - self.centres) / self.widths
        within = ndtr((1 - self.centres) / self.widths) - ndtr(-self.centres / self.widths)
        if self.cells:
            half = 0.5 / self.cells / self.widths
            mass = ndtr(z + half) - ndtr(z - half)
            return mass * self.cells / within
        return np.exp(-0.5 * z * z) / (math.sqrt(2 * math.pi) * self.widths * within)

    def draw(self, trial: int, rng: np.random.Generator) -> float:
        """A place from the kernel of one trial."""
        from scipy.special import ndtr, ndtri

        centre, width = self.centres[trial], self.widths[trial]
        if self.choices:
            return float(rng.integers(self.choices)) if rng.random() < width else float(centre)
        low, high = ndtr(-centre / width), ndtr((1 - centre) / width)
        return float(np.clip(centre + width * ndtri(rng.uniform(low, high)), 0.0, 1.0))

    def any(self, rng: np.random.Generator) -> float:
        """A place from the prior."""
        return float(rng.integers(self.choices)) if self.choices else float(rng.random())


class _Density:
    """A mixture of one kernel for each trial, a product over parameters, and of the prior with the weight of one."""

    def __init__(
        self, parameters: Sequence[Parameter], seen: Seen, trials: Sequence[int], weights: Any, narrow: float
    ) -> None:
        self._weights = np.append(weights, 1.0)
        self._axes = [axis_of(parameter, seen, trials, narrow) for parameter in parameters]

    def log(self, places: Any) -> Any:
        """Logarithm at places of shape (candidates, parameters), up to a constant that all densities share."""
        kernels = self._kernels(places, range(len(self._axes)))
        return np.log(kernels @ self._weights / self._weights.sum() + 1e-300)

    def _kernels(self, places: Any, axes: Sequence[int]) -> Any:
        out = np.ones((len(places), len(self._weights)))
        for column, axis in enumerate(axes):
            out[:, :-1] *= self._axes[axis].density(places[:, column])
        return out

    def draw(self, free: int, fixed: Sequence[float], count: int, rng: np.random.Generator) -> list[list[float]]:
        """Places of the first ``free`` parameters, given those of the others."""
        weights = self._weights
        if fixed:
            weights = weights * self._kernels(np.array([fixed]), range(free, len(self._axes)))[0]
        picked = rng.choice(len(weights), size=count, p=weights / weights.sum())
        prior = len(weights) - 1
        return [
            [axis.any(rng) if trial == prior else axis.draw(trial, rng) for axis in self._axes[:free]]
            for trial in picked
        ]


def axis_of(parameter: Parameter, seen: Seen, trials: Sequence[int], narrow: float) -> _Axis:
    """The kernels over one parameter, one around the value of each of ``trials``, which all have the parameter.

    Args:
        narrow: Times as wide as Hyperopt would make them.
    """
    places = seen.places[parameter.key]
    centres = np.array([places[trial] for trial in trials])
    domain, count = parameter.domain, parameter.domain.count
    if _is_unordered(parameter):
        choices = len(domain.values)
        return _Axis(centres, np.full(len(trials), choices / (choices + len(trials))), 0, choices)
    # A logarithmic scale without steps has shares of unequal width, and no cells.
    equal = bool(domain.values) or domain.sampling == "linear" or domain.step is not None
    cells = count if count is not None and count <= _MOST_CELLS and equal else 0
    widths = np.maximum(narrow * _widths(centres), _FLOOR / cells if cells else 1e-4)
    return _Axis(centres, widths, cells, 0)


def _widths(centres: Any) -> Any:
    """Hyperopt's, in the order of the centres: the larger distance to a neighbour, the prior's centre being one."""
    from hyperopt.tpe import adaptive_parzen_normal

    if not len(centres):
        return np.empty(0)
    _, _, sigmas = adaptive_parzen_normal(centres, 1.0, 0.5, 1.0)
    order = np.argsort(centres)
    prior = int(np.searchsorted(centres[order], 0.5)) if len(centres) != 1 else int(centres[0] <= 0.5)
    widths = np.empty(len(centres))
    widths[order] = np.delete(sigmas, prior)
    return widths

"""Which hyperparameters mattered: permutation importance on a forest, of trials that the forest was not fitted to.

Cross-fitted: each trial's rank is predicted by forests that have not seen it, once as it is and once with the values of
one parameter taken from other trials. By how much the second is worse says how much that parameter matters, trial by
trial, and the spread over trials says how far that can be trusted. (Breiman 2001, "Random forests", 10; of the error
on fresh data as in Fisher, Rudin and Dominici 2019, "All models are wrong, but many are useful"; the forest is that of
Geurts, Ernst and Wehenkel 2006, "Extremely randomized trees", which is fitted in half the time.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from search.definition.space import Parameter, Space
from search.trial import Trial, TrialState, Value, searched

LEVEL = 0.95
FEWEST = 10  # trials of which anything is said; and trials that had a parameter
_MOST = 2000  # evenly taken from more, which costs seconds and tells no more
_FOLDS, _TREES, _DRAWS = 5, 40, 12
_ROUNDS, _FEW = 3, 240  # how often folds are drawn, at most; once from so many trials on


@dataclass(frozen=True)
class Importance:
    """How much one parameter mattered.

    Attributes:
        key: The parameter's.
        share: Of the variation in rank between trials, the part that goes with its values, alone or together with
            others; these parts may add up to more than one.
        low, high: Its interval; all parameters' together hold at ``LEVEL``.
        trials: How many had it.
    """

    key: str
    share: float
    low: float
    high: float
    trials: int

    @property
    def is_shown(self) -> bool:
        """Whether it is more than chance."""
        return self.low > 0


@dataclass(frozen=True)
class Importances:
    """What can be said of all parameters.

    Attributes:
        parameters: The largest first; empty where nothing is shown.
        explained: Share of the variation in rank that the forest predicts of trials it has not seen, with its
            interval; None where there was nothing to fit.
        trials: How many were looked at.
        silent: Parameters that nothing is said of: constant, or had by too few trials.
        why: Why nothing is shown, in words; None where something is.
    """

    parameters: tuple[Importance, ...]
    explained: tuple[float, float, float] | None
    trials: int
    silent: tuple[str, ...] = ()
    why: str | None = None


def importances(trials: Sequence[Trial], space: Space, seed: int = 0) -> Importances:
    """How much each parameter of a search mattered for the rank of its trials.

    Pruned trials count with the score that they were stopped at; failed ones do not count. Ranks, so that a few trials
    that diverged do not decide alone. A conditional parameter's values are exchanged among the trials that had it, so
    what having it is worth goes to the parameters that decide whether it is there.
    """
    scored = [trial for trial in searched(trials) if trial.loss is not None and trial.state.is_finished]
    scored = [trial for trial in scored if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    if len(scored) < FEWEST:
        why = f"{len(scored)} trials have a score, and {FEWEST} are the fewest of which anything could be said"
        return Importances((), None, len(scored), why=why)
    scored = scored[:: -(-len(scored) // _MOST)]
    keys = [key for key in space.parameters if any(key in trial.params for trial in scored)]
    columns = {key: _columns(space.parameters[key], scored) for key in keys}
    varied = {key: found for key, found in columns.items() if found is not None}
    silent = tuple(key for key in keys if key not in varied)
    if not varied:
        why = "no parameter had several values in enough trials"
        return Importances((), None, len(scored), silent, why)
    explained, parameters = _crossfitted(varied, [float(trial.loss or 0.0) for trial in scored], seed)
    if explained is None:
        return Importances((), None, len(scored), silent, "all trials have the same score")
    if explained[1] <= 0:
        why = "a forest that is fitted to some of the trials predicts the others no better than their mean does"
        return Importances((), explained, len(scored), silent, why)
    largest = sorted(parameters, key=lambda one: -one.share)
    if not any(one.is_shown for one in largest):
        why = "together the parameters predict the rank of trials, but of none alone can it be told from chance"
        return Importances(tuple(largest), explained, len(scored), silent, why)
    return Importances(tuple(largest), explained, len(scored), silent)


@dataclass(frozen=True)
class _Column:
    """One parameter as the forest sees it: ``values`` of shape [trials, width], and which trials had it."""

    values: Any
    had: Any


def _columns(parameter: Parameter, trials: Sequence[Trial]) -> _Column | None:
    """Numbers for what has an order, one column per value for what has none; None where nothing can be learned."""
    import numpy as np

    domain = parameter.domain
    given: list[Value | None] = [domain.match(trial.params.get(parameter.key)) for trial in trials]
    had = np.array([value is not None for value in given])
    different = {value for value in given if value is not None}
    if len(different) < 2 or had.sum() < FEWEST:
        return None
    if domain.is_numeric or domain.ordered:
        # Where it was not asked for it says nothing: the middle, which no other parameter's effect can hide in.
        values = np.array([[0.5 if value is None else domain.unit(value)] for value in given])
    else:
        places = {value: place for place, value in enumerate(sorted(different, key=str))}
        values = np.zeros((len(given), len(places)))
        for row, value in enumerate(given):
            if value is not None:
                values[row, places[value]] = 1.0
    return _Column(values, had)


def _crossfitted(
    columns: dict[str, _Column], losses: Sequence[float], seed: int
) -> tuple[tuple[float, float, float] | None, list[Importance]]:
    """What the forest explains in all, and what goes with each parameter."""
    import numpy as np
    from scipy.stats import rankdata
    from sklearn.ensemble import ExtraTreesRegressor
    from sklearn.model_selection import KFold

    ranks = rankdata(losses) / len(losses)
    spread = float(ranks.var())
    if spread == 0:
        return None, []
    inputs = np.hstack([column.values for column in columns.values()])
    ends = np.cumsum([column.values.shape[1] for column in columns.values()])
    places = {key: slice(end - columns[key].values.shape[1], end) for key, end in zip(columns, ends, strict=True)}
    rng = np.random.default_rng(seed)
    rounds = min(_ROUNDS, max(1, _FEW // len(losses)))
    saved = np.zeros(len(losses))
    lost = {key: np.zeros(len(losses)) for key in columns}
    for turn in range(rounds):
        for fitted, left in KFold(_FOLDS, shuffle=True, random_state=seed + turn).split(inputs):
            state = int(rng.integers(2**31))
            forest = ExtraTreesRegressor(_TREES, min_samples_leaf=2, max_features=0.7, random_state=state)
            forest.fit(inputs[fitted], ranks[fitted])
            error = (ranks[left] - forest.predict(inputs[left])) ** 2
            saved[left] += (ranks[left] - ranks[fitted].mean()) ** 2 - error
            asked, changed = [], []  # of all parameters at once: a call costs as much as a thousand rows
            for key, column in columns.items():
                rows = left[column.had[left]]
                other = np.repeat(inputs[rows][None], _DRAWS, axis=0)
                other[:, :, places[key]] = column.values[rng.choice(np.flatnonzero(column.had), other.shape[:2])]
                asked.append((key, rows, column.had[left]))
                changed.append(other.reshape(-1, inputs.shape[1]))
            guesses = np.split(forest.predict(np.vstack(changed)), np.cumsum([len(rows) for rows in changed])[:-1])
            for (key, rows, had), guess in zip(asked, guesses, strict=True):
                lost[key][rows] += ((ranks[rows] - guess.reshape(_DRAWS, -1)) ** 2).mean(axis=0) - error[had]
    # Twice, since an exchange adds the variation of what is put in to that of what is taken out.
    found = {key: _mean(values / (rounds * 2 * spread), len(columns)) for key, values in lost.items()}
    return _mean(saved / (rounds * spread), 1), [
        Importance(key, *interval, int(columns[key].had.sum())) for key, interval in found.items()
    ]


def _mean(values: Any, together: int) -> tuple[float, float, float]:
    """A mean over trials with its t interval, of so many that shall hold together."""
    import numpy as np
    from scipy.stats import t

    mean, count = float(values.mean()), len(values)
    wide = float(t.ppf(1 - (1 - LEVEL) / (2 * together), count - 1) * values.std(ddof=1) / np.sqrt(count))
    return mean, mean - wide, mean + wide

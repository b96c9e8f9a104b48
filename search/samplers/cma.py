"""CMA-ES, with Optuna's settings and the package ``cmaes`` that Optuna uses for it.

Optuna keeps the state of its sampler as a pickle; here it follows from the memos. Each has the trial's place
as it was drawn, its generation, and the trials whose results ended the one before. Telling the algorithm
the same places and ranks again brings it to the same state, to the bit.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from search.definition.space import Parameter, Space
from search.samplers import Proposal
from search.samplers.optuna import needs
from search.samplers.tpe import badness
from search.trial import Trial, TrialState, Value

_SIGMA = 1 / 6  # of the unit cube, as Optuna begins
_RESAMPLINGS = 10  # per dimension, of places outside the cube, before they are moved to its border


class CMAESSampler:
    """Covariance matrix adaptation (Hansen 2016) over the numbers that every configuration has.

    What is no number, or not always asked for, is drawn from the prior. Memo: ``keys`` (of the dimensions),
    ``generation``, ``told`` (numbers of the trials that ended the generation before) and ``place``.
    """

    name = "optuna-cmaes"

    def __init__(self) -> None:
        needs(self.name, "optuna", "cmaes")

    def ask(self, history: Sequence[Trial], space: Space, seed: int) -> Proposal:
        """Propose one configuration; see ``Sampler.ask``."""
        import numpy as np

        dimensions = [parameter for parameter in space.always if _is_scaled(parameter)]
        if not dimensions:
            return Proposal(space.sample(random.Random(seed)))
        keys = [parameter.key for parameter in dimensions]
        ours = [t for t in history if isinstance(t.memo, dict) and t.memo.get("keys") == keys]
        optimizer = _fresh(len(keys))
        numbered = {trial.number: trial for trial in ours}
        generations = {trial.memo["generation"]: trial.memo["told"] for trial in ours}
        told: list[int] = []
        current = max(generations, default=0)
        for generation in range(1, current + 1):
            told = generations.get(generation, [])
            known = [numbered[number] for number in told if number in numbered]
            if known:  # a journal that was repaired may lack some, for which the worst stands in
                lost = optimizer.population_size - len(known)
                _tell(optimizer, [*known, *[max(known, key=badness)] * lost], dimensions)
        ended = [t for t in ours if t.memo["generation"] == current and t.state.is_finished]
        if len(ended) >= optimizer.population_size and any(t.state is TrialState.COMPLETE for t in ended):
            # Without a complete trial there is no better and worse yet, and the generation goes on.
            ended = sorted(ended, key=badness)[: optimizer.population_size]
            told = [trial.number for trial in ended]
            current += 1
            _tell(optimizer, ended, dimensions)
        optimizer.reseed_rng(seed % 2**32)
        place = [float(x) for x in np.clip(optimizer.ask(), 0.0, 1.0)]
        at = dict(zip(keys, place, strict=True))

        def choose(parameter: Parameter) -> Value:
            return parameter.domain.value(at[parameter.key]) if parameter.key in at else parameter.draw(seed)

        memo = {"keys": keys, "generation": current, "told": told, "place": place}
        return Proposal(space.walk(choose), memo)


def _is_scaled(parameter: Parameter) -> bool:
    """Whether it has a scale to move on; the places of unordered choices mean nothing."""
    domain = parameter.domain
    return domain.count != 1 and (domain.is_numeric or domain.ordered)


def _fresh(dimensions: int) -> Any:
    import numpy as np
    from cmaes import CMA

    bounds = np.tile([0.0, 1.0], (dimensions, 1))
    most = _RESAMPLINGS * dimensions
    return CMA(mean=np.full(dimensions, 0.5), sigma=_SIGMA, bounds=bounds, n_max_resampling=most, seed=0)


def _tell(optimizer: Any, trials: Sequence[Trial], dimensions: Sequence[Parameter]) -> None:
    """One generation's results: their ranks, which are all that the algorithm looks at."""
    import numpy as np

    best_first = sorted(trials, key=badness)
    optimizer.tell([(np.array(_place(t, dimensions)), float(rank)) for rank, t in enumerate(best_first)])


def _place(trial: Trial, dimensions: Sequence[Parameter]) -> list[float]:
    """Where it was drawn; where its value is, if it was given another one than was drawn."""
    found = []
    for parameter, drawn in zip(dimensions, trial.memo["place"], strict=True):
        value = trial.params.get(parameter.key)
        if value is None or value == parameter.domain.value(drawn) or not parameter.domain.contains(value):
            found.append(drawn)
        else:
            found.append(parameter.domain.unit(value))
    return found

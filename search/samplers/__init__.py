"""Samplers: the protocol, the table of names, and asking again for what has been tried already."""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from search.definition.space import Signature, Space
from search.errors import RequestError
from search.record.trials import Trials
from search.trial import Params, Trial, Value, searched, seed_for

__all__ = [
    *("AUTO", "SAMPLERS", "Proposal", "Sampler"),
    *("check_space", "default_for", "get_sampler", "proposal_for", "proposal_seed", "propose"),
]

AUTO = "auto"
_ASKS = 20


@dataclass(frozen=True)
class Proposal:
    """What to try next.

    Attributes:
        params: Key to native Python value: the parameters that are expected to be active.
        memo: JSON that is journaled with the trial and comes back in the history.
    """

    params: Mapping[str, Value]
    memo: Any = None


class Sampler(Protocol):
    """A pure function of its arguments: keeps nothing between calls, so any proposal can be made again."""

    name: str

    def ask(self, history: Sequence[Trial], space: Space, seed: int) -> Proposal:
        """Propose one configuration.

        Args:
            history: All trials in order of their number, running ones too. Those below 0 are of another study, which
                this one was told to learn from; their configurations have not been tried here.
            space: What is known of the space now.
            seed: Any int; equal arguments give equal proposals.
        """
        ...


# Where each one is defined, so that naming them imports none of them.
SAMPLERS: Mapping[str, tuple[str, str]] = {
    "random": ("search.samplers.random", "RandomSampler"),
    "tpe": ("search.samplers.tpe", "TPESampler"),
    "gp": ("search.samplers.gp", "GPSampler"),
    "hyperopt": ("search.samplers.hyperopt", "HyperoptSampler"),
    "anneal": ("search.samplers.hyperopt", "AnnealSampler"),
    "grid": ("search.samplers.grid", "GridSampler"),
    "kt-bayesian": ("search.samplers.kerastuner", "BayesianOracleSampler"),
    "optuna-tpe": ("search.samplers.optuna", "OptunaTPESampler"),
    "optuna-gp": ("search.samplers.optuna", "OptunaGPSampler"),
    "optuna-cmaes": ("search.samplers.cma", "CMAESSampler"),
    "optuna-nsga2": ("search.samplers.optuna", "OptunaNSGA2Sampler"),
}

# The default: what measured best for so many trials at most, and beyond them all the last.
_BEST: Sequence[tuple[float, str]] = ((300, "gp"), (math.inf, "tpe"))


def default_for(trials: int) -> str:
    """Name of the sampler that a search of so many trials gets if none is asked for."""
    return next(name for most, name in _BEST if trials <= most and name in SAMPLERS)


def get_sampler(name: str) -> Sampler:
    """The sampler of that name.

    Raises:
        RequestError: If there is none.
    """
    if name not in SAMPLERS:
        near = difflib.get_close_matches(name.lower(), SAMPLERS, n=1, cutoff=0)
        raise RequestError(
            f"the sampler must be {AUTO} or one of {', '.join(SAMPLERS)}, but got {name!r}; did you mean {near[0]!r}?"
        )
    module, cls = SAMPLERS[name]
    sampler: Sampler = getattr(importlib.import_module(module), cls)()
    return sampler


def check_space(sampler: Sampler, space: Space) -> None:
    """See that a sampler can search the space.

    Raises:
        RequestError: If it cannot; says what to change.
    """
    check = getattr(sampler, "check", None)  # few have one
    if check is not None:
        check(space)


def propose(sampler: Sampler, history: Sequence[Trial], space: Space, seed: int) -> Proposal | None:
    """Ask for a configuration that no trial of the history has, whatever became of that trial.

    Configurations are the same if they agree in their active parameters. A sampler that insists on one is
    overruled with the nearest configuration that is new.

    Returns:
        The proposal, or None if the space is finite and every configuration in it has been tried.
    """
    seen = Trials.of(history).follower(Tried).under(space)
    proposal = sampler.ask(history, space, seed)
    if space.signature(proposal.params) not in seen:
        return proposal
    untried = space.unseen(seen, like=proposal.params)
    if untried is None:
        return None
    for attempt in range(1, _ASKS + 1):
        proposal = sampler.ask(history, space, seed_for(seed, attempt, "again"))
        if space.signature(proposal.params) not in seen:
            return proposal
    return Proposal(untried, proposal.memo)


class Tried:
    """The configurations that a search has tried, by the hashes of their signatures; see ``Follower``.

    The signatures themselves would take most of a driver's memory; one is worked out again where a hash is found.
    """

    def __init__(self) -> None:
        self._params: list[Params | None] = []
        self._hashes: list[int | None] = []
        self._places: dict[int, tuple[int, ...]] = {}  # by hash
        self._space: Space | None = None

    def take(self, place: int, trial: Trial) -> None:
        """See ``Follower.take``. Trials below 0 were tried elsewhere."""
        known = self._params[place] if place < len(self._params) else None
        if trial.number < 0 or known == trial.params:
            return
        missing = place + 1 - len(self._params)
        self._params += [None] * missing
        self._hashes += [None] * missing
        self._params[place] = trial.params
        self._drop(place)
        self._note(place, trial.params)

    def under(self, space: Space) -> Self:
        """The same, by what makes configurations equal in this space."""
        if space is not self._space:  # which few trials change
            self._space = space
            self._places.clear()
            for place, params in enumerate(self._params):
                if params is not None:
                    self._note(place, params)
        return self

    def __contains__(self, signature: object) -> bool:
        places = self._places.get(hash(signature), ())
        return any(self._signature(self._params[place]) == signature for place in places)

    def _signature(self, params: Params | None) -> Signature | None:
        return None if self._space is None or params is None else self._space.signature(params)

    def _note(self, place: int, params: Params) -> None:
        if self._space is None:
            return
        found = self._hashes[place] = hash(self._space.signature(params))
        self._places[found] = (*self._places.get(found, ()), place)

    def _drop(self, place: int) -> None:
        if (known := self._hashes[place]) is not None:
            self._places[known] = tuple(other for other in self._places[known] if other != place)


def proposal_for(
    sampler: Sampler, history: Sequence[Trial], space: Space, study_seed: int, number: int
) -> Proposal | None:
    """The proposal for the search's trial ``number`` after ``history``, which anybody can so make again.

    Confirmations are no part of the search, so no sampler sees them.
    """
    return propose(sampler, searched(history), space, proposal_seed(study_seed, number))


def proposal_seed(study_seed: int, number: int) -> int:
    """The seed of the proposal for the search's trial ``number``."""
    return seed_for(study_seed, number, "proposal")

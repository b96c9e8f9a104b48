"""Grid search: every configuration of a finite space once, the defaults first."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from search.definition.domain import Domain
from search.definition.space import Space
from search.errors import RequestError
from search.samplers import Proposal
from search.trial import Trial


class GridSampler:
    """Takes the leaves of the space in order, passing over those that have been tried."""

    name = "grid"

    def check(self, space: Space) -> None:
        """See that the space can be listed.

        Raises:
            RequestError: If a parameter is continuous.
        """
        for parameter in space.declared:
            if parameter.domain.count is None:
                raise RequestError(
                    f"the sampler grid needs a finite number of values for every parameter, but {parameter.key!r} is "
                    f"{parameter.domain}; give it a step= or make it a Choice, or use another --sampler"
                )

    def ask(self, history: Sequence[Trial], space: Space, seed: int) -> Proposal:
        """Propose one configuration; see ``Sampler.ask``. The seed does not matter.

        A continuous parameter that joins the space later, when training asks for it, is held at its default.
        """
        tried = {space.signature(trial.params) for trial in history if trial.number >= 0}
        listed = _finite(space)
        for params in listed.leaves():
            if tuple(sorted(params.items())) not in tried:
                return Proposal(params)
        return Proposal(space.defaults())  # tried as well, by which `propose` sees that nothing is left


def _finite(space: Space) -> Space:
    """The space, with continuous parameters held at their defaults."""
    if all(parameter.domain.count is not None for parameter in space.declared):
        return space
    declared = []
    for parameter in space.declared:
        domain = parameter.domain
        if domain.count is None:
            default = domain.value(0.0) if domain.default is None else domain.default
            parameter = dataclasses.replace(parameter, domain=Domain("fixed", values=(default,)))
        declared.append(parameter)
    return Space(tuple(declared), space.traces)

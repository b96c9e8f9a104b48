"""Random search: every proposal a fresh draw from the prior."""

from __future__ import annotations

import random
from collections.abc import Sequence

from search.definition.space import Space
from search.samplers import Proposal
from search.trial import Trial


class RandomSampler:
    """Draws each parameter uniformly on its own scale, whatever the history."""

    name = "random"

    def ask(self, history: Sequence[Trial], space: Space, seed: int) -> Proposal:
        """Propose one configuration; see ``Sampler.ask``."""
        return Proposal(space.sample(random.Random(seed)))

"""Which configurations are trained again after the search, how often, and with which seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from search.trial import Trial, ranked, seed_for

SEEDS = 3
_MOST = 10
_ONE_IN = 10
_LEAST_SEARCH = 2  # trials of the search per confirming run: a third of all trainings at most


@dataclass(frozen=True)
class Confirmation:
    """How the end of a search is confirmed.

    Attributes:
        finalists: Configurations with the best validation scores; 0 confirms nothing.
        seeds: Trainings of each finalist and of the baseline, with fresh seeds.
    """

    finalists: int
    seeds: int

    @property
    def runs(self) -> int:
        """Trainings in all, if the baseline is none of the finalists."""
        return (self.finalists + 1) * self.seeds if self.finalists else 0


def confirmation(trials: int, finalists: int | None, seeds: int) -> Confirmation:
    """The confirmation of a search of ``trials``.

    Args:
        finalists: As asked for, or None for one in ten trials, ten at most, and no more than keeps confirming at a
            third of all trainings.
    """
    if finalists is None:
        finalists = min(_MOST, trials // _ONE_IN, max(0, trials // (_LEAST_SEARCH * seeds) - 1))
    return Confirmation(min(finalists, trials), seeds)


def plan(history: Sequence[Trial], asked: Confirmation, study_seed: int) -> list[Trial]:
    """The confirming trials, in the order in which they run; numbers are given when they start.

    Finalists are picked by validation score alone: the labels of guard rows decide which model is
    shipped, and never what is trained. Runs go round by round, so that a study that is cut short has
    whole rounds. The baseline is trained as often, because a winner must beat it on equal terms.
    """
    leaders = ranked(history)
    chosen = leaders[: asked.finalists]
    if not chosen:
        return []
    chosen += [trial for trial in leaders if trial.number == 0 and trial not in chosen]
    return [
        Trial(
            number=-1,
            confirms=trial.number,
            params=trial.params,
            text=trial.text,
            seed=seed_for(study_seed, trial.number, f"confirm/{round_}"),
        )
        for round_ in range(asked.seeds)
        for trial in chosen
    ]

"""What would be worth searching next, by what the trials of a study show: rules, each with its evidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from search.definition.space import Parameter, Space
from search.pages.importance import Importances
from search.trial import Trial, TrialState, ranked, searched

_BEST = 5  # trials that are looked at
_EDGE = 0.1  # of a parameter's scale, next to an end of it
_LATE = 0.75  # of the trials; a search that gained after that had not levelled off
_OFTEN = 0.2  # share of failed trials that is worth a word


@dataclass(frozen=True)
class Suggestion:
    """What to do, and why."""

    do: str
    why: str


def suggestions(
    trials: Sequence[Trial],
    space: Space,
    importances: Importances,
    study: str,
    epochs: int | None = None,
    by_epoch: bool = True,
) -> list[Suggestion]:
    """What to search next, the most telling first; may be nothing.

    Args:
        epochs: The most epochs that a trial may have, where that is known; else what the longest trial had.
        by_epoch: Trials choose among epochs; a refit after folds has as many as these chose, and so ends at its best.
    """
    found = searched(trials)
    best = ranked(found)[:_BEST]
    out: list[Suggestion | None] = []
    if len(best) >= 3:
        out += [_at_bound(parameter, best) for parameter in space.parameters.values()]
        out.append(_still_improving(best, epochs or max(t.epochs for t in found)) if by_epoch else None)
        out.append(_more_trials(found, study))
        out.append(_without_effect(importances, space))
    out.append(_failing(found, study))
    return [one for one in out if one is not None]


def _at_bound(parameter: Parameter, best: Sequence[Trial]) -> Suggestion | None:
    """Whether the best trial and most of the next have values next to one end of the range.

    An end at 0 is left alone: nothing lies below it for most of what people search. A choice without an order has no
    ends.
    """
    domain = parameter.domain
    if not (domain.is_numeric or domain.ordered) or (domain.count or 3) < 3:
        return None
    values: list[Any] = [t.params[parameter.key] for t in best if domain.contains(t.params.get(parameter.key))]
    if len(values) < 3 or parameter.key not in best[0].params:
        return None
    for end, where, further in ((0.0, "lower", "below"), (1.0, "upper", "above")):
        last = domain.value(end)
        near = [value for value in values if value == last or abs(domain.unit(value) - end) <= _EDGE]
        if values[0] in near and 2 * len(near) > len(values) and (last != 0 or end):
            shown = f"{last:.4g}" if isinstance(last, float) else str(last)
            return Suggestion(
                f"Let {parameter.key} go {further} {shown}.",
                f"{len(near)} of the best {len(values)} trials that have it, the best one included, lie at the {where} "
                "end of its range, so the best value may lie beyond.",
            )
    return None


def _still_improving(best: Sequence[Trial], epochs: int) -> Suggestion | None:
    """Whether the best trials had their best epoch at the very end, where training was cut off."""
    cut = [t for t in best if t.epochs >= epochs and t.best_epoch == t.epochs]
    if epochs < 1 or best[0] not in cut or 2 * len(cut) <= len(best):
        return None
    return Suggestion(
        f"Train for longer than {epochs} epoch{'s' if epochs > 1 else ''} (`epochs` in the module, or `--epochs`).",
        f"{len(cut)} of the best {len(best)} trials, the best one included, were still improving at their last epoch.",
    )


def _more_trials(found: Sequence[Trial], study: str) -> Suggestion | None:
    """Whether the search was still gaining when it ended."""
    done = sorted((t for t in found if t.state.is_finished), key=lambda t: (t.ended or 0.0, t.number))
    if len(done) < 20:
        return None
    at = done.index(ranked(done)[0]) + 1
    if at > _LATE * len(done):
        return Suggestion(
            f"Go on with the search: `heldout resume {study} --trials +{len(done) // 2}`.",
            f"The best trial was number {at} of {len(done)} to end, so the search was still gaining.",
        )
    if 2 * at <= len(done):
        return Suggestion(
            "Change the space rather than add trials.",
            f"The last {len(done) - at} of {len(done)} trials brought no better validation score.",
        )
    return None


def _without_effect(importances: Importances, space: Space) -> Suggestion | None:
    """Parameters whose values made no difference that shows, next to some that did."""
    shown = [one.key for one in importances.parameters if one.is_shown]
    idle = [one.key for one in importances.parameters if not one.is_shown and one.trials == importances.trials]
    if not shown or not idle or importances.trials < 30:
        return None
    return Suggestion(
        f"Fix {_listed(idle)}, and spend the trials on {_listed(shown)}.",
        "Over the values that were tried, no effect on the rank of trials is shown; that there is none is not proven.",
    )


def _failing(found: Sequence[Trial], study: str) -> Suggestion | None:
    """Many failures of one kind."""
    failed = [t for t in found if t.state is TrialState.FAILED]
    ended = sum(t.state.is_finished for t in found)
    if not failed or len(failed) < _OFTEN * ended:
        return None
    return Suggestion(
        f"Look at why trials fail: `heldout show {study} {failed[0].number}`.",
        f"{len(failed)} of {ended} trials failed, and nothing was learned from them.",
    )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

"""Warm starts: what earlier studies learned, recorded at launch, for the queue and for samplers that can use it.

Only validation scores are carried over. The winner of an earlier study was chosen by guard rows too, which judge
this study as well, so it is not asked which one that was.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from search.definition.space import Parameter, Space
from search.errors import DataError, StudyError
from search.loop.enqueueing import Wish
from search.record.journal import Journal
from search.samplers import Proposal, Sampler, check_space, get_sampler
from search.study import Study, StudyConfig
from search.tiers.validation import HOLDOUT
from search.trial import Params, Trial, TrialState, Value

FIRST = 3  # configurations of each study that are tried first
_MOST = 1000  # configurations of each study that samplers learn from

_STEEPEST = 3.0  # a line that is steeper than the spreads of both studies say by this factor is drawn by noise
_LARGEST = 1e100

_Known = tuple[int, dict[str, Value], float]  # number, configuration, loss


def studies(config: StudyConfig, workspace: Path) -> list[Study]:
    """The studies to start from.

    Raises:
        StudyError: If there is no such study, or none of its trials has completed.
    """
    found = [Study(name, workspace) for name in config.warm_start]
    for study in found:
        if not any(trial.state is TrialState.COMPLETE for trial in study.trials):
            raise StudyError(
                f"a study to warm-start from must have a complete trial, but {study.name!r} has none; leave it out"
            )
    return found


def record(found: Sequence[Study], digest: str, is_allowed: bool) -> list[dict[str, Any]]:
    """What the studies learned, as JSON that is journaled: they may go on, or be deleted.

    Args:
        digest: Of the rows and their split, here.
        is_allowed: Whether studies of other rows or another split are asked for.

    Raises:
        DataError: If there is one that is not.
    """
    out = []
    for study in found:
        meta = study.meta("study")
        # What an earlier warm start brought in is in its trials now.
        inherited = any(earlier["other_data"] for earlier in meta.get("warm_start") or ())
        other_data = inherited or meta["data"]["digest"] != digest
        if other_data and not is_allowed:
            what = "it was itself warm-started from others" if inherited else "it has others"
            raise DataError(
                f"study {study.name!r} must have this study's rows in the same split, but {what}, so what it learned "
                "may come from rows that are test rows here; leave it out, or add --warm-start-other-data, which marks "
                "the study for it"
            )
        with study.journal() as journal:
            trials, space = journal.history(), journal.space()
        out.append(
            {
                "study": study.name,
                "study_id": meta["study_id"],
                "objective": meta["objective"],
                "direction": meta["direction"],
                "validation": meta["config"].get("validation", HOLDOUT),
                "other_data": other_data,
                "names": {key: p.name for key, p in space.parameters.items() if key != p.name},
                "trials": _learned(trials),
            }
        )
    return out


def _learned(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Each configuration with the mean loss of all its trainings, the best first; of very many, every so manieth."""
    losses: dict[int, list[float]] = {}
    for trial in trials:
        if trial.state is TrialState.COMPLETE and trial.loss is not None:
            losses.setdefault(trial.configuration, []).append(trial.loss)
    params = {trial.number: dict(trial.params) for trial in trials}
    found = [
        {"number": number, "params": params[number], "loss": math.fsum(one) / len(one)}
        for number, one in losses.items()
        if number in params
    ]
    found.sort(key=lambda one: (one["loss"], one["number"]))
    return found if len(found) <= _MOST else [found[i * len(found) // _MOST] for i in range(_MOST)]


def brief(recorded: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same without the trials, for the study's own description."""
    kept = ("study", "study_id", "objective", "other_data")
    return [{key: one[key] for key in kept} | {"trials": len(one["trials"])} for one in recorded]


def wishes(recorded: Sequence[Mapping[str, Any]], space: Space, room: int) -> list[Wish]:
    """The best configurations of each study, to be tried first.

    Those that the space has as they were come before those of which a value had to be left out.

    Args:
        room: How many at most.
    """
    out: list[Wish] = []
    seen = {space.signature(space.defaults())}
    for one in recorded:
        carried = [(trial["number"], *_carried(trial["params"], one["names"], space)) for trial in one["trials"]]
        count = 0
        for number, params, is_whole, unasked in sorted(carried, key=lambda found: not found[2]):
            if count == FIRST or len(out) == room:
                break
            if (signature := space.signature(params)) not in seen:
                seen.add(signature)
                count += 1
                cut = "" if is_whole else ", but for values that are out of bounds"
                cut += f", without {', '.join(unasked)}, not asked for here yet" if unasked else ""
                out.append(Wish(params, f"trial {number} of {one['study']}{cut}"))
    return out


def _carried(params: Params, names: Mapping[str, str], space: Space) -> tuple[dict[str, Value], bool, list[str]]:
    """A configuration of another space in this one, matched by name.

    Returns:
        The configuration, whether no value was out of bounds, and the names that nothing in this space has.
    """
    known = {key: value for key, value in params.items() if key not in names}
    for key, name in names.items():
        if key in params:
            known.setdefault(name, params[key])
    is_whole = True

    def choose(parameter: Parameter) -> Value:
        nonlocal is_whole
        found = parameter.domain.match(known.get(parameter.name))
        if found is not None:
            return found
        is_whole = is_whole and parameter.name not in known
        default = parameter.domain.default
        return parameter.domain.value(0.0) if default is None else default

    unasked = sorted(known.keys() - {parameter.name for parameter in space.declared})
    return space.walk(choose), is_whole, unasked


class Informed:
    """A sampler whose history begins with that of other studies, under negative numbers.

    Losses of another objective, of other rows, or by another plan of validation are put on this study's scale by the
    line through what the configurations scored that both have, which the baseline and those tried first see to. Where
    they disagree the line is flat, and says nothing.
    """

    def __init__(
        self,
        sampler: Sampler,
        recorded: Sequence[Mapping[str, Any]],
        objective: str,
        direction: str,
        validation: str = HOLDOUT,
    ) -> None:
        self.name = sampler.name
        self._sampler, self._recorded = sampler, recorded
        self._measure = (objective, direction, validation)
        self._fitted: tuple[Space, list[list[_Known]]] | None = None

    def check(self, space: Space) -> None:
        """As the sampler."""
        check_space(self._sampler, space)

    def ask(self, history: Sequence[Trial], space: Space, seed: int) -> Proposal:
        """Propose one configuration; see ``Sampler.ask``."""
        return self._sampler.ask([*self.prior(history, space), *history], space, seed)

    def prior(self, history: Sequence[Trial], space: Space) -> list[Trial]:
        """What this space has of the other studies, as complete trials, whose numbers stay as the space grows."""
        if self._fitted is None or self._fitted[0] is not space:  # much work, and the space seldom changes
            self._fitted = space, self._in(space)
        found: list[_Known] = []
        for one, trials in zip(self._recorded, self._fitted[1], strict=True):
            measure = one["objective"], one["direction"], one.get("validation", HOLDOUT)
            same = not one["other_data"] and measure == self._measure
            found += trials if same else _rescaled(trials, history, space)
        return [Trial(number, TrialState.COMPLETE, params, loss=loss) for number, params, loss in found]

    def _in(self, space: Space) -> list[list[_Known]]:
        number = -sum(len(one["trials"]) for one in self._recorded)
        out: list[list[_Known]] = []
        for one in self._recorded:
            out.append([])
            for trial in one["trials"]:
                params, is_whole, _ = _carried(trial["params"], one["names"], space)
                if is_whole:
                    out[-1].append((number, params, trial["loss"]))
                number += 1
        return out


def _rescaled(theirs: Sequence[_Known], history: Sequence[Trial], space: Space) -> list[_Known]:
    """The losses of another study, on the scale of this one."""
    near = [(number, params, _near(loss)) for number, params, loss in theirs]
    own = [
        (space.signature(trial.params), _near(trial.loss))
        for trial in history
        if trial.state is TrialState.COMPLETE and trial.loss is not None
    ]
    there = {space.signature(params): loss for _, params, loss in near}
    both = [(there[signature], loss) for signature, loss in own if signature in there]
    if not both:
        return [] if own else near  # two scales in one history would say that all of one are better
    before, now = [a for a, _ in both], [b for _, b in both]
    wide = statistics.pstdev(loss for _, loss in own), statistics.pstdev(loss for _, _, loss in near)
    most = _STEEPEST * wide[0] / wide[1] if all(wide) else 1.0
    line = statistics.linear_regression(before, now).slope if len(set(before)) > 1 else most
    slope = min(max(line, 0.0), most)
    middle = statistics.fmean(before), statistics.fmean(now)
    return [(number, params, middle[1] + (loss - middle[0]) * slope) for number, params, loss in near]


def _near(loss: float) -> float:
    """Small enough to be reckoned with."""
    return min(max(loss, -_LARGEST), _LARGEST)


def sampler(journal: Journal, config: StudyConfig) -> Sampler:
    """The study's sampler, with what it was given to learn from."""
    chosen, recorded = get_sampler(config.sampler), journal.get("warm_start")
    if not recorded:
        return chosen
    meta = journal.get("study")
    return Informed(chosen, recorded, meta["objective"], meta["direction"], config.validation)

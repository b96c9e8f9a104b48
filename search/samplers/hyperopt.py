"""Hyperopt as it comes: its TPE, for comparison with ours, and simulated annealing.

All parameters are in one flat space and one call; a trial that lacks one has no value there. Losses are handed over
as ranks, which is all that Hyperopt looks at: no infinity and no NaN is dropped or ignored. Discrete values that have
an order are integers to Hyperopt, and continuous ones places in [0, 1] on their scale.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Mapping, Sequence
from typing import Any

from search.definition.space import Parameter, Space
from search.samplers import Proposal
from search.samplers.tpe import ranks
from search.trial import Trial, TrialState, Value

_STARTUP = 20  # Hyperopt's own number of random trials, of finished ones
_MOST_STEPS = 1000  # more ordered values than that are a scale
_SCALE = 0  # in place of a number of values
Shape = tuple[str, int]


class HyperoptSampler:
    """Hyperopt's TPE with its own defaults (Bergstra et al., NeurIPS 2011)."""

    name = "hyperopt"

    def ask(self, history: Sequence[Trial], space: Space, seed: int) -> Proposal:
        """Propose one configuration; see ``Sampler.ask``. Pending trials stand in as the worst ones."""
        from hyperopt import tpe

        return _ask(functools.partial(tpe.suggest, n_startup_jobs=0, verbose=False), history, space, seed)


class AnnealSampler:
    """Hyperopt's simulated annealing: a good trial's values, changed less and less."""

    name = "anneal"

    def ask(self, history: Sequence[Trial], space: Space, seed: int) -> Proposal:
        """Propose one configuration; see ``Sampler.ask``. Pending trials stand in as the worst ones."""
        from hyperopt import anneal

        return _ask(anneal.suggest, history, space, seed)


def _ask(suggest: Any, history: Sequence[Trial], space: Space, seed: int) -> Proposal:
    finished = sum(trial.state.is_finished for trial in history)
    if finished < _STARTUP or not any(trial.state is TrialState.COMPLETE for trial in history):
        return Proposal(space.sample(random.Random(seed)))
    searched = [parameter for parameter in space.declared if parameter.domain.count != 1]
    found = _suggested(suggest, searched, history, seed) if searched else {}
    return Proposal(space.walk(lambda parameter: found.get(parameter.key, parameter.domain.value(0.0))))


def _suggested(
    suggest: Any, searched: Sequence[Parameter], history: Sequence[Trial], seed: int
) -> Mapping[str, Value]:
    from hyperopt import JOB_STATE_DONE, STATUS_OK, Trials

    place = ranks(history)
    documents = []
    for tid, trial in enumerate(history):
        values: dict[str, list[int | float]] = {f"p{number}": [] for number in range(len(searched))}
        for number, parameter in enumerate(searched):
            if parameter.key in trial.params:
                with contextlib.suppress(ValueError):  # a value from before the declaration changed
                    values[f"p{number}"] = [_encoded(parameter, trial.params[parameter.key])]
        idxs = {label: [tid] * len(found) for label, found in values.items()}
        documents.append(
            {
                "tid": tid,
                "state": JOB_STATE_DONE,
                "result": {"status": STATUS_OK, "loss": float(place[tid])},
                "misc": {"tid": tid, "cmd": None, "workdir": None, "idxs": idxs, "vals": values},
                **dict.fromkeys(("spec", "owner", "book_time", "refresh_time", "exp_key")),
                "version": 0,
            }
        )
    observed = Trials()
    observed._insert_trial_docs(documents)  # the checked way copies every document twice
    observed.refresh()
    domain = _hyperopt_domain(tuple(map(_shape, searched)))
    (found,) = suggest([len(history)], domain, observed, seed % 2**32)
    chosen = found["misc"]["vals"]
    return {parameter.key: _decoded(parameter, chosen[f"p{n}"][0]) for n, parameter in enumerate(searched)}


def _shape(parameter: Parameter) -> Shape:
    """What it is to Hyperopt: unordered values, ordered ones, or a scale."""
    domain, count = parameter.domain, parameter.domain.count
    if domain.kind in ("choice", "boolean") and not domain.ordered:
        return "unordered", len(domain.values)
    equal = bool(domain.values) or domain.sampling == "linear" or domain.step is not None
    return ("ordered", count) if count is not None and count <= _MOST_STEPS and equal else ("scale", _SCALE)


@functools.lru_cache(maxsize=64)
def _hyperopt_domain(shapes: tuple[Shape, ...]) -> Any:
    """Hyperopt's compiled space; milliseconds to make, and the same for every call of a study."""
    from hyperopt import hp
    from hyperopt.base import Domain

    makers: dict[str, Any] = {
        "unordered": lambda label, count: hp.randint(label, count),
        "ordered": lambda label, count: hp.uniformint(label, 0, count - 1),
        "scale": lambda label, _: hp.uniform(label, 0.0, 1.0),
    }
    space = {f"p{number}": makers[kind](f"p{number}", count) for number, (kind, count) in enumerate(shapes)}
    return Domain(lambda point: 0.0, space)


def _encoded(parameter: Parameter, value: Value) -> int | float:
    kind, count = _shape(parameter)
    if kind == "unordered":
        found = parameter.domain.match(value)
        if found is None:
            raise ValueError(f"the value must be one of {parameter.domain}, but is {value!r}")
        return parameter.domain.values.index(found)
    place = parameter.domain.unit(value)
    return int(place * count) if kind == "ordered" else place


def _decoded(parameter: Parameter, point: Any) -> Value:
    kind, count = _shape(parameter)
    if kind == "unordered":
        return parameter.domain.values[int(point)]
    return parameter.domain.value((int(point) + 0.5) / count if kind == "ordered" else float(point))

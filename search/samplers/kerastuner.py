"""KerasTuner's Bayesian oracle, for those who move over: rebuilt from the history for every proposal.

It sees a flat space of places in [0, 1], since its own conditions cannot say what plain Python code asks for;
what a configuration lacks stands at its default there, as KerasTuner does it too. Importing KerasTuner takes
seconds, and TensorFlow's memory, in the driver's process: once.
"""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Sequence

from search.definition.space import Parameter, Space
from search.samplers import Proposal
from search.trial import Trial, TrialState, Value

_LARGEST = 1e150  # beyond, sums of squares overflow
_PRIOR = 100  # trials of other studies; its cost grows with the cube of their number


class BayesianOracleSampler:
    """A Gaussian process with the lower confidence bound, as ``keras_tuner.BayesianOptimization`` has it."""

    name = "kt-bayesian"

    def ask(self, history: Sequence[Trial], space: Space, seed: int) -> Proposal:
        """Propose one configuration; see ``Sampler.ask``.

        Trials that failed or were pruned are failures to the oracle, which skips them. An infinite loss
        would count as 0 there, which looks excellent, so it is a failure as well.
        """
        searched = [parameter for parameter in space.declared if parameter.domain.count != 1]
        complete = [t for t in history if _loss(t) is not None]
        if not searched or len(complete) < max(3 * len(searched), 3):  # the oracle's own rule, without its import
            return Proposal(space.sample(random.Random(seed)))
        elsewhere = [t for t in complete if t.number < 0]
        ours = [t for t in history if t.number >= 0 and (_loss(t) is not None or not t.state.is_finished)]
        place = _suggested([*elsewhere[:: -(-len(elsewhere) // _PRIOR) or 1], *ours], searched, seed)

        def choose(parameter: Parameter) -> Value:
            return parameter.domain.value(place.get(parameter.key, 0.0))

        return Proposal(space.walk(choose))


def _suggested(history: Sequence[Trial], searched: Sequence[Parameter], seed: int) -> dict[str, float]:
    """What the oracle would try next, as places of the searched parameters."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # or TensorFlow talks into the terminal
    import keras_tuner
    from keras_tuner.engine.trial import Trial as TheirTrial
    from keras_tuner.engine.trial import TrialStatus
    from keras_tuner.oracles import BayesianOptimizationOracle

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its kernel's length scale reaches a bound now and then
        flat = keras_tuner.HyperParameters()
        defaults = {p.key: p.domain.unit(_default(p)) for p in searched}
        for key, default in defaults.items():
            flat.Float(key, 0.0, 1.0, default=default)
        oracle = BayesianOptimizationOracle(
            objective=keras_tuner.Objective("loss", "min"),
            max_trials=None,
            # 0 would be taken for none, and drawn anew.
            seed=seed % 2**31 + 1,
            hyperparameters=flat,
        )
        for trial in history:
            values = defaults | {p.key: p.domain.unit(v) for p in searched if (v := _known(trial, p)) is not None}
            theirs = TheirTrial(flat.copy(), str(trial.number))
            theirs.hyperparameters.values = values
            oracle.trials[theirs.trial_id] = theirs
            if (loss := _loss(trial)) is None:
                oracle.ongoing_trials[theirs.trial_id] = theirs
            else:
                theirs.status, theirs.score = TrialStatus.COMPLETED, loss
        if oracle.ongoing_trials:
            # It guesses what these will come to by the fit of its last proposal, which this one has not seen.
            done = [theirs for name, theirs in oracle.trials.items() if name not in oracle.ongoing_trials]
            places = [[theirs.hyperparameters.values[key] for key in defaults] for theirs in done]
            oracle.gpr.fit(places, [theirs.score for theirs in done])
        found: dict[str, float] = oracle.populate_space("next")["values"]
    return {key: float(place) for key, place in found.items()}


def _loss(trial: Trial) -> float | None:
    """The loss of a complete trial, within what squares can hold."""
    if trial.state is not TrialState.COMPLETE or trial.loss is None:
        return None
    return max(-_LARGEST, min(trial.loss, _LARGEST))


def _known(trial: Trial, parameter: Parameter) -> Value | None:
    """The trial's value, unless the parameter has outgrown it."""
    return parameter.domain.match(trial.params.get(parameter.key))


def _default(parameter: Parameter) -> Value:
    default = parameter.domain.default
    return parameter.domain.value(0.0) if default is None else default

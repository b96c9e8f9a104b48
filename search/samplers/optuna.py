"""Optuna's TPE, Gaussian-process and genetic samplers, each asked by a study that is rebuilt from the history.

They come with ``pip install 'heldout[optuna]'``. Nothing of Optuna's is stored: the genetic sampler's
generations and parents, which the values of parameters do not tell, are in the memo as plain numbers.
Trials that failed count as complete with the worst loss, so that all three avoid them; Optuna by itself forgets
them. So do pruned ones, but to TPE, which knows what to make of the step that they reached. A parameter that a
configuration may lack is drawn on its own.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from search.definition.space import Parameter, Space
from search.errors import RequestError
from search.samplers import Proposal
from search.trial import Trial, TrialState, Value

_CHOICES = ("choice", "boolean")
_LARGEST = 1e150  # beyond, sums of squares overflow
_GENERATION, _PARENTS = "NSGAIISampler:generation", "NSGAIISampler:parent:"


def needs(sampler: str, *modules: str) -> None:
    """Check that the packages of a sampler are installed.

    Raises:
        RequestError: If one is not.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            also = " and `pip install torch`" if "torch" in modules else ""
            raise RequestError(
                f"the sampler {sampler} needs the package {module}, which is not installed; "
                f"`pip install 'heldout[optuna]'`{also}, or choose another with --sampler"
            )


class OptunaTPESampler:
    """Optuna's TPE, which scores the parameters that all trials have jointly."""

    name = "optuna-tpe"
    _needs: tuple[str, ...] = ("optuna",)
    _takes_pruned = True

    def __init__(self) -> None:
        needs(self.name, *self._needs)

    def ask(self, history: Sequence[Trial], space: Space, seed: int) -> Proposal:
        """Propose one configuration; see ``Sampler.ask``."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)  # a study that is remade each time announces itself
        storage = optuna.storages.InMemoryStorage()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            study = optuna.create_study(storage=storage, sampler=self._sampler(optuna, seed % 2**32))
            number = storage.get_study_id_from_name(study.study_name)
            domains = {p.key: _distribution(optuna, p) for p in space.declared if p.domain.count != 1}
            self._recall(study, storage, number, history)
            for trial in self._frozen(optuna, history, space, domains):
                storage.create_new_trial(number, template_trial=trial)
            asked = study.ask()

            def choose(parameter: Parameter) -> Value:
                if parameter.domain.count == 1:
                    return parameter.domain.value(0.0)
                return _decoded(parameter, _asked(optuna, asked, parameter.key, domains[parameter.key]))

            params = space.walk(choose)
            return Proposal(params, self._memo(storage, number, history))

    def _sampler(self, optuna: Any, seed: int) -> Any:
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)

    def _recall(self, study: Any, storage: Any, number: int, history: Sequence[Trial]) -> None:
        """Restore what a study of Optuna's keeps beside its trials."""

    def _memo(self, storage: Any, number: int, history: Sequence[Trial]) -> Any:
        """What of it has to be kept for the trial that was asked for."""
        return None

    def _attributes(self, trial: Trial) -> dict[str, Any]:
        """What Optuna keeps beside a trial's parameters."""
        return {}

    def _frozen(
        self, optuna: Any, history: Sequence[Trial], space: Space, domains: Mapping[str, Any]
    ) -> list[Any]:
        """The history as Optuna's trials, in the same order."""
        states = optuna.trial.TrialState
        losses = [max(-_LARGEST, min(t.loss, _LARGEST)) for t in history if _has_loss(t) and t.loss is not None]
        frozen = []
        for trial in history:
            params = {}
            for key, value in trial.params.items():
                if key in domains and space.parameters[key].domain.contains(value):
                    params[key] = _encoded(space.parameters[key], value)
            state, loss, steps = states.COMPLETE, None, {}
            if _has_loss(trial) and trial.loss is not None:
                loss = max(-_LARGEST, min(trial.loss, _LARGEST))
            elif trial.state is TrialState.PRUNED and self._takes_pruned:
                state = states.PRUNED
                if trial.loss is not None and trial.epochs:
                    steps = {trial.epochs: trial.loss}
            elif trial.state.is_finished and losses:
                loss = max(losses)
            else:
                state = states.FAIL if trial.state.is_finished else states.RUNNING
            frozen.append(
                optuna.trial.create_trial(
                    state=state,
                    value=loss,
                    params=params,
                    distributions={key: domains[key] for key in params},
                    system_attrs=self._attributes(trial),
                    intermediate_values=steps,
                )
            )
        return frozen


class OptunaGPSampler(OptunaTPESampler):
    """Optuna's Gaussian process, which needs torch."""

    name = "optuna-gp"
    _needs = ("optuna", "torch")
    _takes_pruned = False

    def _sampler(self, optuna: Any, seed: int) -> Any:
        return optuna.samplers.GPSampler(seed=seed)


class OptunaNSGA2Sampler(OptunaTPESampler):
    """Optuna's genetic sampler. Memo: ``generation``, and ``parents`` (trials that it descends from)."""

    name = "optuna-nsga2"
    _takes_pruned = False

    def _sampler(self, optuna: Any, seed: int) -> Any:
        return optuna.samplers.NSGAIISampler(seed=seed)

    def _attributes(self, trial: Trial) -> dict[str, Any]:
        if trial.number < 0:  # of another study: the first generation
            return {_GENERATION: 0}
        memo = _own(trial)
        return {} if memo is None else {_GENERATION: memo["generation"]}

    def _recall(self, study: Any, storage: Any, number: int, history: Sequence[Trial]) -> None:
        ids = {trial.number: index for index, trial in enumerate(history)}  # as the storage will number them
        parents = {memo["generation"]: memo["parents"] for trial in history if (memo := _own(trial)) is not None}
        for generation, numbers in parents.items():
            if generation:
                found = [ids[one] for one in numbers if one in ids]
                storage.set_study_system_attr(number, f"{_PARENTS}{generation}", found)

    def _memo(self, storage: Any, number: int, history: Sequence[Trial]) -> Any:
        generation = storage.get_all_trials(number)[-1].system_attrs.get(_GENERATION, 0)
        ids = storage.get_study_system_attrs(number).get(f"{_PARENTS}{generation}", [])
        return {"generation": generation, "parents": [history[one].number for one in ids]}


def _own(trial: Trial) -> dict[str, Any] | None:
    """The memo that the genetic sampler gave a trial."""
    memo = trial.memo
    return memo if isinstance(memo, dict) and memo.keys() == {"generation", "parents"} else None


def _has_loss(trial: Trial) -> bool:
    return trial.state is TrialState.COMPLETE and trial.loss is not None


def _distribution(optuna: Any, parameter: Parameter) -> Any:
    """Optuna's domain that a parameter is searched on.

    Discrete values are searched by their place, since Optuna rounds steps and has none on a log scale.
    """
    distributions, domain = optuna.distributions, parameter.domain
    if domain.kind in _CHOICES and not domain.ordered:
        return distributions.CategoricalDistribution(list(range(len(domain.values))))
    if domain.is_numeric and domain.step is None:
        if domain.sampling == "reverse_log":
            return distributions.FloatDistribution(0.0, 1.0)
        kind = distributions.IntDistribution if domain.kind == "int" else distributions.FloatDistribution
        return kind(domain.low, domain.high, log=domain.sampling == "log")
    return distributions.IntDistribution(0, (domain.count or 1) - 1)


def _asked(optuna: Any, trial: Any, key: str, domain: Any) -> Any:
    """Optuna's value for a parameter of the trial that it was asked for."""
    distributions = optuna.distributions
    if isinstance(domain, distributions.CategoricalDistribution):
        return trial.suggest_categorical(key, domain.choices)
    if isinstance(domain, distributions.IntDistribution):
        return trial.suggest_int(key, domain.low, domain.high, log=domain.log)
    return trial.suggest_float(key, domain.low, domain.high, log=domain.log)


def _encoded(parameter: Parameter, value: Value) -> Any:
    domain = parameter.domain
    if domain.kind in _CHOICES and not domain.ordered:
        return domain.values.index(value)
    if domain.is_numeric and domain.step is None:
        return domain.unit(value) if domain.sampling == "reverse_log" else value
    count = domain.count or 1
    return min(int(domain.unit(value) * count), count - 1)


def _decoded(parameter: Parameter, point: Any) -> Value:
    domain = parameter.domain
    if domain.kind in _CHOICES and not domain.ordered:
        return domain.values[int(point)]
    if domain.is_numeric and domain.step is None:
        if domain.sampling == "reverse_log":
            return domain.value(float(point))
        return int(point) if domain.kind == "int" else float(point)
    return domain.value((int(point) + 0.5) / (domain.count or 1))

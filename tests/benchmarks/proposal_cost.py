"""What a proposal costs: every sampler that is installed, and Optuna's TPE as its guide shows it, by length of history.

    pip install -e '.[benchmarks]' && python tests/benchmarks/proposal_cost.py

The space has twelve parameters, of which a configuration has eight to ten. The history is random; one trial in twelve
has failed, one was pruned, and the last four still run. Asking includes the look for what was tried already, as in a
search. Each of the asks of a row sees one trial more than the one before. The first is made as after a resume, with a
space that knows nothing of the history yet: its time is left out of the median and shown for itself.

Time is that of the process on all its cores (CPU time), which other programs disturb less than the wall clock. Samplers
that need more than `--patience` seconds for a proposal are not asked again with a longer history.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import measure

from search.definition.domain import Domain
from search.definition.space import Parameter, Space
from search.errors import RequestError
from search.record.trials import Trials
from search.samplers import SAMPLERS, check_space, get_sampler, proposal_seed, propose
from search.trial import Trial, TrialState, Value

PEER = "optuna.tpe (Optuna itself)"
Ask = Callable[[str, Domain], Any]


def build(ask: Ask) -> None:
    """A network of one of two kinds, and how it is trained."""
    ask("rate", Domain("float", 1e-5, 1e-1, sampling="log"))
    ask("decay", Domain("float", 1e-6, 1e-2, sampling="log"))
    if ask("kind", Domain("choice", values=("mlp", "cnn"))) == "mlp":
        for layer in range(ask("layers", Domain("int", 1, 3))):
            ask(f"units_{layer}", Domain("int", 16, 1024, sampling="log"))
    else:
        ask("filters", Domain("int", 8, 128, 8))
        ask("kernel", Domain("choice", values=(3, 5, 7), ordered=True))
    ask("dropout", Domain("float", 0.0, 0.5, 0.05))
    ask("activation", Domain("choice", values=("relu", "gelu", "tanh")))
    ask("batch", Domain("choice", values=(16, 32, 64, 128), ordered=True))


def traced(given: dict[str, Value]) -> list[dict[str, Any]]:
    """What a build with these values asks for."""
    asks = []

    def ask(name: str, domain: Domain) -> Any:
        value = given.get(name, domain.default)
        asks.append({**Parameter(name, name, (), domain).to_json(), "value": value})
        return value

    build(ask)
    return asks


def known_space() -> Space:
    """The space, as some trials of each kind reveal it."""
    space = Space.empty()
    for kind in ("mlp", "cnn"):
        for layers in (1, 2, 3):
            space = space.grown(traced({"kind": kind, "layers": layers}))
    return space


def loss_of(params: dict[str, Value]) -> float:
    """Something that each parameter has an effect on."""
    return sum(abs(hash(value) % 1000 / 1000 - 0.3) for value in params.values() if not isinstance(value, str))


def history_of(space: Space, count: int) -> list[Trial]:
    """So many random trials."""
    trials = []
    for number in range(count):
        params = space.sample(random.Random(number))
        trial = Trial(number, TrialState.RUNNING, params, epochs=10)
        if number < count - 4:
            loss = loss_of(params)
            if number % 12 == 5:
                trial = trial.moved(TrialState.FAILED, reason="nan")
            elif number % 12 == 9:
                trial = trial.moved(TrialState.PRUNED, loss=loss, epochs=3)
            else:
                trial = trial.moved(TrialState.COMPLETE, score=-loss, loss=loss)
        trials.append(trial)
    return trials


def ours(name: str, history: Sequence[Trial], asks: int) -> list[float]:
    """Seconds of each proposal, the first one being the first of its process."""
    sampler, space = get_sampler(name), Space.from_json(known_space().to_json())
    check_space(sampler, space)
    seconds, seen = [], Trials(history[:-asks])  # which grows, as the driver's does
    for trial in history[-asks:]:
        seen.put(trial)
        clock = time.process_time()
        propose(sampler, seen, space, proposal_seed(0, len(seen)))
        seconds.append(time.process_time() - clock)
    return seconds


def peer(history: Sequence[Trial], asks: int) -> list[float]:
    """Optuna's TPE on the same configurations, told and asked in its own words."""
    import optuna
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    def distribution(domain: Domain) -> Any:
        if domain.values:
            return CategoricalDistribution(domain.values)
        of = FloatDistribution if domain.kind == "float" else IntDistribution
        logarithmic = domain.sampling == "log"
        step = {} if domain.step is None or logarithmic else {"step": domain.step}
        return of(domain.low, domain.high, log=logarithmic, **step)

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    states = {TrialState.COMPLETE: optuna.trial.TrialState.COMPLETE}
    domains = {parameter.key: distribution(parameter.domain) for parameter in known_space().declared}
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    study.add_trials(
        [
            optuna.trial.create_trial(
                state=states.get(trial.state, optuna.trial.TrialState.FAIL),
                params=dict(trial.params),
                distributions={key: domains[key] for key in trial.params},
                value=trial.loss if trial.state in states else None,
            )
            for trial in history
        ]
    )
    seconds = []
    for number in range(asks):
        clock = time.process_time()
        trial = study.ask()

        def suggest(name: str, domain: Domain, trial: Any = trial) -> Any:
            return trial._suggest(name, domains[name])

        build(suggest)
        seconds.append(time.process_time() - clock)
        study.tell(trial, float(number))
    return seconds


def main() -> None:
    """Measure, and print the table."""
    have = [PEER] if importlib.util.find_spec("optuna") else []
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samplers", nargs="+", default=[*SAMPLERS, *have], metavar="NAME")
    parser.add_argument("--lengths", type=int, nargs="+", default=[100, 1000, 10_000], help="of the history")
    parser.add_argument("--asks", type=int, default=11)
    parser.add_argument("--patience", type=float, default=1.0)
    args = parser.parse_args()
    measure.setting({"lengths": args.lengths, "asks of each": args.asks})
    space = known_space()
    histories = [history_of(space, length) for length in args.lengths]
    rows = []
    for name in args.samplers:
        row: list[str] = [name]
        for history in histories:
            try:
                seconds = peer(history, args.asks) if name == PEER else ours(name, history, args.asks)
            except RequestError as error:
                row += [str(error)]
                break
            milliseconds = [value * 1000 for value in seconds]
            row += [measure.spread(milliseconds[1:], 1), f"{milliseconds[0]:.0f}"]
            if statistics.median(seconds) > args.patience:
                break
        rows.append(row)
        print(" | ".join(row), flush=True)
    headings = [part for length in args.lengths for part in (f"after {length}", "the first")]
    full = [row + [""] * (1 + len(headings) - len(row)) for row in rows]
    measure.show("Milliseconds of CPU for a proposal: median (range), and the first", ["sampler", *headings], full)


if __name__ == "__main__":
    main()

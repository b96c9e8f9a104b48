"""How far the guard's numbers can be believed: simulated searches whose models' true scores are known exactly.

A model is right on a row, or has an error there, by a Gaussian latent of the row and the model: part of it is how
hard the row is for all models, the rest is the row's features along the model's direction. Its true score follows
from its quality alone, whatever its direction: a search that fits directions to validation rows gains flattery only.

    python tests/benchmarks/guard.py [searches]
"""

from __future__ import annotations

import math
import resource
import sys
import time
from dataclasses import dataclass

import measure
import numpy as np
from scipy import stats

from search.guard.candidates import Candidate
from search.guard.selection import Choice, choose, corrected
from search.guard.statistics import test_interval
from search.guard.verdicts import alpha
from search.scorer.scoring import Metric, Score

TRIALS, FINALISTS, SEEDS = 100, 10, 3
KEPT = 20  # models of the search that are not deleted before the choice, as by `--keep`
VALIDATION, GUARD, TEST = 1000, 1000, 1000
FEATURES, SHARED = 20, 0.5
LUCK = 0.05  # of a seed, as a standard deviation of quality: 0.6 points of accuracy, 5 % of the mean squared error
LUCKS = (0.02, 0.05, 0.1, 0.2)
TEST_SETS = 800
REPEATS = 500
BASELINE = np.array([0.7, 0.7])  # hyperparameters of the default configuration; the best are 0
METRICS = {"classification": Metric("accuracy"), "regression": Metric("mean_squared_error")}
LEVELS = {"5 %": 0.95, "3.04 %": 1 - alpha(1)}


@dataclass(frozen=True)
class Model:
    """A trained model: hyperparameters, the direction its errors take, and its true quality."""

    at: np.ndarray
    direction: np.ndarray
    quality: float  # probit of accuracy, or logarithm of the mean squared error

    def truth(self, task: str) -> float:
        """Its exact score."""
        return float(stats.norm.cdf(self.quality)) if task == "classification" else math.exp(self.quality)

    def losses(self, task: str, rows: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """Its loss on each row: 0 or 1, or the squared error."""
        hard, features = rows
        latent = math.sqrt(SHARED) * hard + math.sqrt(1 - SHARED) * (features @ self.direction)
        if task == "classification":
            return (self.quality + latent <= 0).astype(float)
        return math.exp(self.quality) * latent**2


def drawn(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows: how hard each is, and its features."""
    return rng.normal(size=count), rng.normal(size=(count, FEATURES))


def trained(rng: np.random.Generator, task: str, at: np.ndarray, towards: np.ndarray, spread: float) -> Model:
    """Train a configuration: seeds move both the direction of its errors and its quality."""
    direction = towards + 0.1 * rng.normal(size=FEATURES)
    distance, luck = float((at**2).sum()), spread * rng.normal()
    quality = 1.45 - 0.25 * distance + luck if task == "classification" else math.log(0.2) + 0.5 * distance + luck
    return Model(at, direction / np.linalg.norm(direction), quality)


def searched(rng: np.random.Generator, task: str, adaptive: bool, validation: tuple, luck: float) -> list[Model]:
    """A search; an adaptive one draws near its best five by validation score, hyperparameters and directions alike."""
    models: list[Model] = []
    scores: list[float] = []
    for number in range(TRIALS):
        at, towards = rng.uniform(-1, 1, 2), rng.normal(size=FEATURES) / math.sqrt(FEATURES)
        if number == 0:
            at = BASELINE
        elif adaptive and number >= 20:
            best = [models[k] for k in np.argsort(scores)[:5]]
            at = np.mean([model.at for model in best], axis=0) + 0.2 * rng.normal(size=2)
            towards = np.mean([model.direction for model in best], axis=0) + 0.5 * towards
        models.append(trained(rng, task, at, towards, luck))
        scores.append(float(models[-1].losses(task, validation).mean()))
    return models


def candidate(task: str, model: Model, trial: int, configuration: int, validation: tuple, guard: tuple) -> Candidate:
    """What the study would know of a model."""
    seen, sealed = model.losses(task, validation), model.losses(task, guard)
    scores = [1 - v.mean() if task == "classification" else v.mean() for v in (seen, sealed)]
    return Candidate(trial, configuration, None, *map(float, scores), sealed[:, None], np.array([seen.sum()]))


def by_means(choice: Choice, fresh: list[Candidate], direction: str) -> int:
    """The rule that was rejected: the best configuration by the mean of its fresh runs, and the best of these."""
    sign = 1 if direction == "max" else -1
    means = {number: choice.means[number] for number in {run.configuration for run in fresh}}
    chosen = max(means, key=lambda number: sign * means[number])
    runs = [run.trial for run in fresh if run.configuration == chosen]
    return max(runs, key=lambda trial: sign * choice.pooled[trial])


@dataclass(frozen=True)
class Study:
    """What a study ends with: all models, its best validation score, the candidates of both ways to end, its truths."""

    models: list[Model]
    raw: float
    pools: dict[str, list[Candidate]]
    choices: dict[str, Choice]
    truths: dict[str, float]


def studied(task: str, adaptive: bool, seed: int, luck: float = LUCK) -> Study:
    """Search, confirm and choose; "plain" is the rule over trials, "confirmed" over fresh runs of finalists as well.

    "kept" is that without the models of the search that `--keep` deletes.
    """
    rng = np.random.default_rng(seed)
    metric, direction = METRICS[task], "max" if task == "classification" else "min"
    validation, guard = drawn(rng, VALIDATION), drawn(rng, GUARD)
    models = searched(rng, task, adaptive, validation, luck)
    pool = [candidate(task, model, k, k, validation, guard) for k, model in enumerate(models)]
    ranked = sorted(pool, key=lambda one: one.score, reverse=direction == "max")
    fresh = []
    for configuration in dict.fromkeys([0, *(one.trial for one in ranked[:FINALISTS])]):
        model = models[configuration]
        for _ in range(SEEDS):
            models.append(trained(rng, task, model.at, model.direction, luck))
            fresh.append(candidate(task, models[-1], len(models) - 1, configuration, validation, guard))
    kept = [one for one in pool if one.trial == 0 or one in ranked[:KEPT]]
    pools = {"plain": pool, "confirmed": pool + fresh, "kept": kept + fresh}
    choices = {name: choose(metric, direction, some, VALIDATION, GUARD) for name, some in pools.items()}
    shipped = {"best": ranked[0].trial} | {name: choice.trial for name, choice in choices.items()}
    shipped["means"] = by_means(choices["confirmed"], fresh, direction)
    truths = {name: models[trial].truth(task) for name, trial in shipped.items()}
    return Study(models, ranked[0].score, pools, choices, truths)


def told(task: str, adaptive: bool, seed: int) -> dict[str, float]:
    """A study's truths, and its estimates minus the truths they stand for."""
    metric, direction = METRICS[task], "max" if task == "classification" else "min"
    study = studied(task, adaptive, seed)
    found = dict(study.truths)
    for name, pool in study.pools.items():
        said = corrected(metric, direction, pool, VALIDATION, GUARD, baseline=0, repeats=REPEATS, seed=seed)
        truth, won = study.truths[name], study.choices[name].configuration
        found[f"{name} raw"] = study.raw - truth
        found[f"{name} bias"] = said.estimate - truth
        found[f"{name} covered"] = said.low <= truth <= said.high
        found[f"{name} width"] = said.high - said.low
        ours, base = (np.mean([study.models[k].truth(task) for k in fresh_runs(pool, number)]) for number in (won, 0))
        gain = float(ours - base) * (1 if direction == "max" else -1)
        found[f"{name} gain bias"] = said.configuration_gain.gain - gain
        found[f"{name} gain covered"] = said.configuration_gain.low <= gain <= said.configuration_gain.high
    return found


def fresh_runs(pool: list[Candidate], configuration: int) -> list[int]:
    """Trials of a configuration's fresh runs, or of its only run."""
    runs = [run.trial for run in pool if run.configuration == configuration]
    return [trial for trial in runs if trial != configuration] or runs


def tested(task: str) -> list[str]:
    """How often the test interval of a good model covers its truth, over fresh test sets."""
    rng = np.random.default_rng(0)
    model, covered = trained(rng, task, np.zeros(2), np.ones(FEATURES), 0.0), {name: [] for name in LEVELS}
    for seed in range(TEST_SETS):
        losses = model.losses(task, drawn(rng, TEST))
        value = float(1 - losses.mean() if task == "classification" else losses.mean())
        for name, level in LEVELS.items():
            interval = test_interval(Score(METRICS[task], value, losses, losses[:, None]), level=level, seed=seed)
            covered[name].append(interval.low <= model.truth(task) <= interval.high)
    return [f"{task}, {interval.method}", *(share(np.array(covered[name], dtype=float)) for name in LEVELS)]


def mean(values: np.ndarray) -> str:
    """A mean in points and its standard error."""
    return f"{100 * values.mean():+.2f} ± {100 * values.std(ddof=1) / math.sqrt(len(values)):.2f}"


def share(values: np.ndarray) -> str:
    """A share in percent and its standard error."""
    p = values.mean()
    return f"{100 * p:.1f} ± {100 * math.sqrt(p * (1 - p) / len(values)):.1f}"


def budget() -> None:
    """Time and memory of 10,000 guard rows by 1,000 candidates."""
    rng = np.random.default_rng(0)
    parts = (rng.random((1000, 10_000, 1)) < 0.1).astype(np.float32)
    candidates = [Candidate(k, k, None, 0.9, 0.9, part, np.array([1000.0])) for k, part in enumerate(parts)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    clock = time.perf_counter()
    corrected(METRICS["classification"], "max", candidates, 10_000, 10_000, baseline=0)
    seconds = time.perf_counter() - clock
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000
    print(f"10,000 guard rows x 1,000 candidates x 1,000 resamples: {seconds:.2f} s, {extra:.0f} MB more at the peak")


def main() -> None:
    """Print the tables."""
    searches = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    budget()
    measure.setting(
        {
            "searches per cell": f"{searches}, seeds 0 to {searches - 1}",
            "each": f"{TRIALS} trials, {VALIDATION} validation and {GUARD} guard rows, {REPEATS} resamples",
            "confirmation": f"{FINALISTS} finalists and the baseline, {SEEDS} seeds each",
            "kept": f"the same, but of the search's models only the {KEPT} best by validation score, and the baseline",
            "units": "points of accuracy; of mean squared error where labels have variance 1, so points of R² too",
            "±": "one standard error of a mean or share",
        }
    )
    clock = time.perf_counter()
    estimates, gains = [], []
    for task in METRICS:
        for adaptive in (False, True):
            runs = [told(task, adaptive, seed) for seed in range(searches)]
            of = {key: np.array([run[key] for run in runs], dtype=float) for key in runs[0]}
            for name in ("plain", "confirmed", "kept"):
                row = f"{task[:7]}., {'adaptive' if adaptive else 'fixed'}, {name}"
                width = measure.spread(list(100 * of[f"{name} width"]))
                raw, bias, covered = of[f"{name} raw"], of[f"{name} bias"], of[f"{name} covered"]
                estimates.append([row, mean(raw), mean(bias), share(covered), width])
                gains.append([row, mean(of[f"{name} gain bias"]), share(of[f"{name} gain covered"])])
    measure.show(
        "Against the true score of the model shipped",
        ["search", "raw best", "corrected", "interval covers, %", "width: median (range)"],
        estimates,
    )
    measure.show("Gain of the configuration over the baseline's", ["search", "bias", "interval covers, %"], gains)
    ships = []
    for task in METRICS:
        for adaptive in (False, True):
            for luck in LUCKS:
                truths = [studied(task, adaptive, seed, luck).truths for seed in range(searches)]
                of = {key: np.array([one[key] for one in truths]) for key in truths[0]}
                sign = -1 if task == "regression" else 1
                better = [mean(sign * (of[rule] - of["best"])) for rule in ("plain", "confirmed", "kept", "means")]
                name = f"{task[:7]}., {'adaptive' if adaptive else 'fixed'}, seeds {luck:g}"
                ships.append([name, f"{100 * of['best'].mean():.2f}", *better])
    measure.show(
        "True score shipped, and how much better than the best validation score's model others are",
        ["search, luck of seeds", "best val.", "no confirmation", "confirmed", "kept", "by means of fresh runs"],
        ships,
    )
    rows = [tested(task) for task in METRICS]
    measure.show(f"Test interval covers, %, {TEST_SETS} test sets of {TEST} rows", ["", *LEVELS], rows)
    print(f"{time.perf_counter() - clock:.0f} s")


if __name__ == "__main__":
    main()

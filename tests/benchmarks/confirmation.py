"""Whether confirming ships better models than taking the best validation score, on shipped spaces.

    python tests/benchmarks/confirmation.py --seeds 10

For every seed half of a space's rows are kept apart, by a permutation of that seed, and a study with default
settings searches the other half. Then models of this one study are scored on the rows kept apart: the trial with
the best validation score ("argmax"), the trial with the best score on validation and guard rows together (what
`--confirm 0` ships), the model that the study chose, and the one that the rule we rejected would have chosen: the
best fresh run of the configuration whose fresh runs are best on average. All differences are paired by study.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import measure
import numpy as np

from search.definition.problem import Problem
from search.guard import selection
from search.guard.freezing import build_file, predict_file
from search.guard.winner import contenders
from search.loop.watcher import Silent
from search.processes.jobs import one_slot, start_executor
from search.record.journal import Journal
from search.scorer import scoring
from search.study import Study
from search.tiers.data import SealedRows
from search.trial import TrialState, best

SPACES = ("digits_mlp", "breast_cancer", "diabetes")

MODULE = """
import numpy as np

from search import Dataset
from spaces import {space} as shipped
from spaces.{space} import *


def load():
    whole = shipped.load()
    order = np.random.default_rng({seed}).permutation(len(whole.y))
    kept, used = order[: len(order) // 2], order[len(order) // 2 :]
    return Dataset(whole.x[used], whole.y[used], test=(whole.x[kept], whole.y[kept]))
"""


def main() -> None:
    """Measure, and print one table per space."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--epochs", type=int, help="at most; the space's own if left out")
    parser.add_argument("--spaces", nargs="+", default=list(SPACES))
    args = parser.parse_args()
    measure.setting({"trials": args.trials, "seeds": f"0 to {args.seeds - 1}", "epochs": args.epochs or "the space's"})
    for space in args.spaces:
        found = []
        for seed in range(args.seeds):
            with tempfile.TemporaryDirectory() as scratch:
                found.append(one(space, seed, args, Path(scratch)))
            print(space, seed, found[-1], flush=True)
        show(space, found)


def one(space: str, seed: int, args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """One study, and the scores of its models on the rows kept apart."""
    module = scratch / f"{space}.py"
    module.write_text(MODULE.format(space=space, seed=seed))
    options = ["--trials", str(args.trials), "--seed", str(seed), "--study", "s", "--evaluate", "no", "--json"]
    options += ["--keep", "all"]  # every model may be what one of the rules would ship
    options += ["--epochs", str(args.epochs)] if args.epochs else []
    measure.run([*measure.HELDOUT, "launch", str(module), *options], scratch)
    study = Study("s", scratch / "workspace")
    with study.journal() as journal:
        chosen = models(journal)
        scores = apart(study, journal, chosen, scratch)
        sign = 1 if study.direction == "max" else -1
        runs = journal.get("selection")["confirmation"]
    return {name: sign * value for name, value in scores.items()} | {
        "validation": sign * study.best_trial.score,
        "corrected": sign * study.meta("selection")["corrected"]["estimate"],
        "share": runs["share"] if runs else 0.0,
    }


def models(journal: Journal) -> dict[str, int]:
    """Trial numbers of the models."""
    prepared, history = journal.get("prepared"), journal.history()
    complete = next(trial for trial in history if trial.state is TrialState.COMPLETE)
    metric = scoring.resolve(prepared["objective"], complete.extra["declaration"])
    candidates = contenders(journal.path.parent, journal, metric)
    tiers = prepared["manifest"]["tiers"]

    def chosen(some: list[selection.Candidate]) -> selection.Choice:
        return selection.choose(metric, prepared["direction"], some, tiers["validation"], tiers["guard"])

    fresh = [run for run in candidates if run.trial != run.configuration]
    sign = 1 if prepared["direction"] == "max" else -1
    means = chosen(fresh).means
    steady = max(means, key=lambda number: sign * means[number])
    leader = best(history)
    assert leader is not None
    return {
        "argmax": leader.number,
        "no confirmation": chosen([run for run in candidates if run.trial == run.configuration]).trial,
        "shipped": journal.get("selection")["winner"]["trial"],
        "by means": chosen([run for run in fresh if run.configuration == steady]).trial,
    }


def apart(study: Study, journal: Journal, chosen: dict[str, int], scratch: Path) -> dict[str, float]:
    """Scores on the test rows; a benchmark may open them as often as it likes."""
    prepared, history = journal.get("prepared"), journal.history()
    sealed = SealedRows(Path(prepared["sealed"]))
    with start_executor(one_slot(), Problem(**prepared["problem"]), scratch, None) as executor:
        built = {}
        for number in set(chosen.values()):
            path = scratch / f"{number}.keras"
            built[str(number)] = build_file(journal, executor, Silent(), history[number], path) | {"path": str(path)}
        features = sealed.feature_files("test")
        files = predict_file(executor, Silent(), prepared, built, "test", scratch, features)["predictions"]
    scores = {}
    for name, number in chosen.items():
        declaration = built[str(number)]["declaration"]
        metric = scoring.resolve(prepared["objective"], declaration)
        predictions = [np.load(path) for path in files[str(number)]]
        names = [output["name"] for output in declaration["outputs"]]
        labels = scoring.in_order(sealed.labels("test"), names)
        scores[name] = scoring.score(metric, declaration, predictions, labels).value
    return scores


def show(space: str, found: list[dict[str, Any]]) -> None:
    """Means, and paired differences with their standard errors; losses are negated, so higher is better."""
    rows = []
    for name in ("validation", "corrected", "argmax", "no confirmation", "by means", "shipped"):
        values = [one[name] for one in found]
        gains = [one[name] - one["argmax"] for one in found]
        error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
        wins = f"{sum(g > 0 for g in gains)} / {sum(g == 0 for g in gains)} / {sum(g < 0 for g in gains)}"
        rows.append(
            [name, f"{statistics.mean(values):.4f}", f"{statistics.mean(gains):+.4f} ± {error:.4f}"]
            + [f"{statistics.median(gains):+.4f}", wins]
        )
    headings = ("", "mean score", "against argmax, mean ± s.e.", "median", "better / same / worse")
    measure.show(f"{space}: {len(found)} studies, scores on rows kept apart (losses negated)", headings, rows)
    print(f"confirming took {statistics.mean(one['share'] for one in found):.0%} of the training time\n")


if __name__ == "__main__":
    main()

"""Wall-clock time of a search: heldout against KerasTuner in one process, on the same configurations.

    pip install -e '.[benchmarks]' && python tests/benchmarks/throughput.py

For every seed, `heldout launch` runs its random search; then a process of its own imports Keras and
KerasTuner and trains exactly those configurations, for exactly as many epochs, on exactly those rows.
KerasTuner's side reads the rows as heldout stored them, so it pays neither for loading nor for splitting.
"Whole" is from before the process exists until it is gone; "search" is the trials alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, help="heldout's; its default if left out")
    parser.add_argument("--replay", type=Path, help=argparse.SUPPRESS)  # the KerasTuner process
    args = parser.parse_args()
    if args.replay:
        print(json.dumps(replay(json.loads(args.replay.read_text()))))
        return
    notes = {"space": measure.SPACE.name, "trials": args.trials, "epochs": args.epochs, "seeds": args.seeds}
    measure.setting(notes | {"workers": args.workers or "default"})
    rows, ratios = [], []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as scratch:
            ours, theirs = pair(seed, args, Path(scratch))
        ratios.append((theirs["whole"] / ours["whole"], theirs["search"] / ours["search"]))
        rows.append([str(seed), *columns(ours, theirs, *ratios[-1])])
    whole, search = ([one[index] for one in ratios] for index in (0, 1))
    headings = ("seed", "heldout\nwhole s", "KerasTuner\nwhole s", "ratio\nwhole", "heldout\nsearch s")
    headings += ("KerasTuner\nsearch s", "ratio\nsearch", "best val.\nheldout", "best val.\nKerasTuner")
    measure.show("The same configurations, epochs and rows", headings, rows)
    print(f"whole process: {measure.spread(whole)} times as fast (the goal is 4)")
    print(f"search alone:  {measure.spread(search)} times as fast")


def columns(ours: dict[str, Any], theirs: dict[str, Any], whole: float, search: float) -> list[str]:
    """One row of the table, after the seed."""
    times = (ours["whole"], theirs["whole"], whole, ours["search"], theirs["search"], search)
    return [*(f"{value:.1f}" for value in times), f"{ours['best']:.4f}", f"{theirs['best']:.4f}"]


def pair(seed: int, args: argparse.Namespace, scratch: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both sides for one seed: seconds as a whole process, seconds of search, best validation score."""
    command = [*measure.HELDOUT, "launch", str(measure.SPACE), "--study", "speed", "--sampler", "random"]
    command += ["--trials", str(args.trials), "--epochs", str(args.epochs), "--seed", str(seed)]
    command += ["--evaluate", "no"] + (["--workers", str(args.workers)] if args.workers else [])
    done = measure.run(command, scratch)
    ours, plan = read_back(scratch / "workspace" / "studies" / "speed")
    if len(plan["trials"]) != args.trials:
        raise RuntimeError(f"all {args.trials} trials must complete, but {len(plan['trials'])} did")
    file = scratch / "plan.json"
    file.write_text(json.dumps(plan))
    replayed = measure.run([sys.executable, __file__, "--replay", str(file)], scratch)
    theirs = json.loads(replayed.stdout.splitlines()[-1])
    return ours | {"whole": done.seconds}, theirs | {"whole": replayed.seconds}


def read_back(study: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What heldout took and found, and what KerasTuner is to repeat, both from the study's journal."""
    from search.journal import Journal
    from search.trial import TrialState

    with Journal.open(study / "journal.sqlite", read_only=True) as journal:
        rows = journal.get("prepared")["rows"]
        done = [trial for trial in journal.history() if trial.state is TrialState.COMPLETE]
    search = max(trial.ended for trial in done) - min(trial.started for trial in done)
    trials = [{"params": dict(trial.params), "epochs": trial.epochs} for trial in done]
    return {"search": search, "best": max(trial.score for trial in done)}, {"rows": rows, "trials": trials}


def replay(plan: dict[str, Any]) -> dict[str, Any]:
    """KerasTuner's own loop over the plan, in this process.

    The oracle hands out the plan's values where RandomSearch would draw them, which costs less than drawing.
    Everything else is KerasTuner as its guide shows it: `fit` on arrays, `hp`'s batch size, checkpoints on.
    """
    import keras_tuner
    from keras_tuner.engine.trial import TrialStatus

    spec = importlib.util.spec_from_file_location("space", measure.SPACE)
    assert spec is not None and spec.loader is not None
    space = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(space)
    from search.data import OpenRows

    rows = OpenRows(Path(plan["rows"]))
    train, validation = ((rows.features(tier), rows.labels(tier)) for tier in ("train", "validation"))
    waiting = iter(plan["trials"])

    class Replay(keras_tuner.Oracle):  # type: ignore[misc]
        def populate_space(self, trial_id: str) -> dict[str, Any]:
            trial = next(waiting, None)
            if trial is None:
                return {"status": TrialStatus.STOPPED, "values": None}
            return {"status": TrialStatus.RUNNING, "values": dict(trial["params"])}

    class Model(keras_tuner.HyperModel):  # type: ignore[misc]
        def build(self, hp: Any) -> Any:
            return space.build(hp)

        def fit(self, hp: Any, model: Any, *data: Any, **options: Any) -> Any:
            return model.fit(*data, batch_size=hp.get("batch_size"), **options)

    class Tuner(keras_tuner.Tuner):  # type: ignore[misc]
        def run_trial(self, trial: Any, *data: Any, **options: Any) -> Any:
            planned = plan["trials"][int(trial.trial_id)]
            asked = {key: trial.hyperparameters.values[key] for key in planned["params"]}
            assert asked == planned["params"], f"{planned} must be replayed, but KerasTuner asked for {asked}"
            return super().run_trial(trial, *data, epochs=planned["epochs"], **options)

    with tempfile.TemporaryDirectory() as folder:
        goal = keras_tuner.Objective(space.objective, "max")
        oracle = Replay(objective=goal, max_trials=len(plan["trials"]))
        tuner = Tuner(oracle=oracle, hypermodel=Model(), directory=folder, project_name="replay")
        clock = time.perf_counter()
        tuner.search(*train, validation_data=validation, verbose=0)
        seconds = time.perf_counter() - clock
        scores = [trial.score for trial in oracle.get_best_trials(len(plan["trials"]))]
    assert len(scores) == len(plan["trials"]), f"only {len(scores)} of {len(plan['trials'])} were replayed"
    return {"search": seconds, "best": max(scores), "median": statistics.median(scores)}


if __name__ == "__main__":
    main()

"""Wall-clock time of a search: heldout against KerasTuner, Optuna and Ray Tune, on the same machine.

    pip install -e '.[benchmarks]' && python tests/benchmarks/throughput.py

Two questions, `--parts` chooses. **same**: for every seed, `heldout launch` runs its random search, and each peer then
trains exactly those configurations, for exactly as many epochs, on exactly those rows. "Whole" is from before the
process exists until it is gone; "search" is the trials alone. **sooner**: each peer searches 60 trials of 30 epochs by
its own sampler (KerasTuner: RandomSearch), and its best model by validation score is scored on test rows. Heldout
searches with its default sampler and ASHA; its clock runs from before its process exists until a trial has ended whose
model is the best so far by validation score *and* whose test score is the peer's or better. Nobody is told a test
score before all clocks have stopped. The answer for single seeds depends on luck, so it is also given for the means
over seeds: how soon heldout's mean test score reached the peer's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import measure

PEERS = ("kerastuner", "optuna", "ray")
GOALS = {"same": 8, "sooner": 15}


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(GOALS), default=list(GOALS))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--epochs", type=int, help="10 for `same`, 30 for `sooner`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, help="heldout's; its default if left out")
    parser.add_argument("--longer", type=int, default=2, help="times as many trials for heldout in `sooner`, at most")
    parser.add_argument("--sampler", default="auto", help="heldout's in `sooner`")
    parser.add_argument("--pruner", default="asha", help="heldout's in `sooner`")
    args = parser.parse_args()
    notes = {"space": measure.SPACE.name, "trials": args.trials, "seeds": args.seeds, "peers": args.peers}
    measure.setting(notes | {"workers": args.workers or "default"})
    for part in args.parts:
        args.of_trial = args.epochs or {"same": 10, "sooner": 30}[part]
        {"same": same, "sooner": sooner}[part](args)


def launch(seed: int, args: argparse.Namespace, scratch: Path, trials: int, *options: str) -> tuple[measure.Run, Path]:
    """Run heldout's search as its users do, without confirmation and test step; its run and its study's folder."""
    command = [*measure.HELDOUT, "launch", str(measure.SPACE), "--study", "speed", "--trials", str(trials)]
    command += ["--epochs", str(args.of_trial), "--seed", str(seed), "--evaluate", "no", "--confirm", "0", *options]
    command += ["--workers", str(args.workers)] if args.workers else []
    return measure.run(command, scratch), scratch / "workspace" / "studies" / "speed"


def ask(peer: str, plan: Mapping[str, Any], scratch: Path) -> tuple[measure.Run, dict[str, Any]]:
    """Let a peer carry out a plan in a process of its own; see peers.py."""
    file = scratch / f"{peer}.json"
    file.write_text(json.dumps({**plan, "peer": peer}))
    done = measure.run([sys.executable, str(Path(__file__).with_name("peers.py")), str(file)], scratch)
    return done, json.loads(done.stdout.splitlines()[-1])


# ── the same configurations ──


def same(args: argparse.Namespace) -> None:
    """Trials per hour."""
    rows, ratios = [], {peer: [] for peer in args.peers}
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            run, study = launch(seed, args, scratch, args.trials, "--sampler", "random", "--pruner", "none")
            ours, plan = read_back(study, args.of_trial, seed)
            if plan["count"] != args.trials:
                raise RuntimeError(f"all {args.trials} trials must complete, but {plan['count']} did")
            rows.append([str(seed), "heldout", f"{run.seconds:.1f}", "", f"{ours['search']:.1f}", "", best(ours)])
            for peer in args.peers:
                done, theirs = ask(peer, plan, scratch)
                whole, search = done.seconds / run.seconds, theirs["search"] / ours["search"]
                ratios[peer].append((whole, search))
                times = [f"{done.seconds:.1f}", f"{whole:.1f}", f"{theirs['search']:.1f}", f"{search:.1f}"]
                rows.append(["", peer, *times, best(theirs)])
                print(rows[-1], file=sys.stderr, flush=True)
    headings = ("seed", "", "whole s", "× heldout's", "search s", "× heldout's", "best validation")
    title = f"The same {args.trials} configurations, {args.of_trial} epochs at most, the same rows"
    measure.show(title, headings, rows)
    for peer, found in ratios.items():
        whole, search = ([one[index] for one in found] for index in (0, 1))
        goal = f" (the goal is {GOALS['same']})"
        print(f"against {peer}: {measure.spread(whole)} times as fast{goal}; search alone {measure.spread(search)}")


def best(found: Mapping[str, Any]) -> str:
    """The best validation score, for the table."""
    return f"{found['best']:.4f}"


def read_back(study: Path, epochs: int, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What heldout took and found, and what a peer is to repeat, both from the study's journal."""
    from search.record.journal import Journal
    from search.trial import TrialState

    with Journal.open(study / "journal.sqlite", read_only=True) as journal:
        prepared = journal.get("prepared")
        ended = [trial for trial in journal.history() if trial.state is TrialState.COMPLETE]
    search = max(trial.ended for trial in ended) - min(trial.started for trial in ended)
    trials = [{"params": dict(trial.params), "epochs": trial.epochs} for trial in ended]
    plan = {"rows": prepared["rows"], "sealed": prepared["sealed"], "trials": trials, "count": len(trials)}
    models = [
        {"number": trial.number, "params": dict(trial.params), "score": trial.score, "ended": trial.ended}
        for trial in sorted(ended, key=lambda trial: trial.ended)
    ]
    ours = {"search": search, "best": max(trial.score for trial in ended), "models": models}
    return ours, plan | {"epochs": epochs, "seed": seed}


# ── the same test score ──


def sooner(args: argparse.Namespace) -> None:
    """How soon a model as good as the peer's was there."""
    curves: list[list[tuple[float, float]]] = []
    theirs: dict[str, list[tuple[float, float]]] = {peer: [] for peer in args.peers}
    rows = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            options = ("--sampler", args.sampler, "--pruner", args.pruner, "--keep", "all")
            run, study = launch(seed, args, scratch, args.trials * args.longer, *options)
            ours, plan = read_back(study, args.of_trial, seed)
            plan |= {"trials": None, "count": args.trials, "weights": str(scratch / "peer.weights.h5")}
            curves.append(curve(ours["models"], plan, study, run.began, scratch))
            for peer in args.peers:
                done, found = ask(peer, plan, scratch)
                model = {"params": found["params"], "weights": plan["weights"]}
                (score,) = ask("score", plan | {"models": [model]}, scratch)[1]["scores"]
                theirs[peer].append((found["ended"] - done.began, score))
                rows.append([str(seed), peer, *compared(*theirs[peer][-1], curves[-1])])
                print(rows[-1], file=sys.stderr, flush=True)
    headings = ("seed", "", "peer's s", "peer's test score", "heldout's s to reach it", "times sooner")
    title = f"{args.trials} trials of {args.of_trial} epochs by the peer's own sampler, against heldout's search"
    measure.show(title, headings, rows)
    mean = means(curves)
    for peer, found in theirs.items():
        seconds, score = (statistics.fmean(one[index] for one in found) for index in (0, 1))
        _, _, reached, times = compared(seconds, score, mean)
        print(
            f"against {peer}, means over {len(curves)} seeds: {score:.4f} after {seconds:.1f} s; heldout's mean is "
            f"there after {reached} s, {times} times sooner (the goal is {GOALS['sooner']})"
        )


def curve(
    models: Sequence[Mapping[str, Any]], plan: Mapping[str, Any], study: Path, began: float, scratch: Path
) -> list[tuple[float, float]]:
    """Seconds since the launch, and the test score of the best model by validation score from then on."""
    from search.record import places

    leaders: list[Mapping[str, Any]] = []
    for model in models:
        if not leaders or model["score"] > leaders[-1]["score"]:
            leaders.append(model)
    asked = [{"params": one["params"], "weights": str(places.weights(study, one["number"]))} for one in leaders]
    scores = ask("score", {**plan, "models": asked}, scratch)[1]["scores"]
    return [(one["ended"] - began, score) for one, score in zip(leaders, scores, strict=True)]


def compared(seconds: float, score: float, ours: Sequence[tuple[float, float]]) -> list[str]:
    """A peer's time and score, when heldout's curve reaches that score, and the ratio of the times."""
    reached = next((at for at, value in ours if value >= score), None)
    times = ["never", f"under {seconds / ours[-1][0]:.1f}"] if reached is None else None
    return [f"{seconds:.1f}", f"{score:.4f}", *(times or [f"{reached:.1f}", f"{seconds / reached:.1f}"])]


def means(curves: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The mean of curves that each hold their value until the next point, from where all have begun."""
    moments = sorted(at for one in curves for at, _ in one)
    began = max(one[0][0] for one in curves)

    def value(one: Sequence[tuple[float, float]], moment: float) -> float:
        return [score for at, score in one if at <= moment][-1]

    return [(at, statistics.fmean(value(one, at) for one in curves)) for at in moments if at >= began]


if __name__ == "__main__":
    main()

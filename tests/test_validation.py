"""Plans of validation: how trials are judged by folds, by repeats and by splits of their own, in real studies."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search.errors import TrialFailed
from search.guard.candidates import Candidate
from search.guard.selection import choose, corrected
from search.guard.winner import select
from search.loop import pruners
from search.loop.attempt import Verdict
from search.processes import jobs
from search.record.journal import Journal
from search.scorer.judge import RowJudge
from search.scorer.metrics import parts
from search.scorer.scoring import Metric
from search.shown import report
from search.study import Study, StudyConfig
from search.tiers import data, folds, validation
from search.tiers.data import Dataset, OpenRows, SealedRows
from search.trial import Report, Trial, TrialState
from tests.conftest import ROOT, Heldout, run_heldout
from tests.tiny import PARTS, write_space

DECLARATION = {
    "outputs": [{"name": "out", "loss": "mse", "from_logits": False, "weight": 1.0, "shape": [None, 1], "config": {}}],
    "metrics": [
        {"output": "out", "name": "mse", "kind": "mean_squared_error", "config": {}},
        {"output": "out", "name": "rmse", "kind": "root_mean_squared_error", "config": {}},
        {"output": "out", "name": "own", "kind": "mine", "config": {}},
    ],
}


# ── the judge ────────────────────────────────────────────────────────────────────────────────────


class Judged:
    """Rows of a regression, divided by a plan, and what a trial leaves behind that predicts noise."""

    def __init__(self, folder: Path, words: str, objective: str = "val_mse", seed: int = 3) -> None:
        rng = np.random.default_rng(0)
        dataset = Dataset(rng.normal(size=(300, 2)), rng.normal(size=300))
        manifest = data.prepare(dataset, folder, 0, False)
        found = folds.write(validation.parse(words), data.labelled(dataset, 0), manifest, folder / "folds")
        digest = manifest["digest"]
        self.rows, sealed = OpenRows(folder / "rows" / digest), folder / "sealed" / digest
        self.judge = RowJudge(self.rows.path, sealed, objective, {}, folder / "guard", errors=True, validation=found)
        self.splits, self.found = folds.parts(found, seed), found
        place = folder / "trials" / "0007"
        place.mkdir(parents=True)
        self.predicted = [rng.normal(size=(len(part.validation), 1)) for part in self.splits]
        files = [str(place / f"{number}.npy") for number in range(len(self.splits))]
        guard = str(place / "guard_0.npy")
        for path, values in zip(files, self.predicted, strict=True):
            np.save(path, values)
        np.save(guard, rng.normal(size=(SealedRows(sealed).size("guard"), 1)))
        paths: list[Any] = [[path] for path in files]
        of_validation = paths if validation.parse(words).is_repeated else paths[0]
        self.result = {
            "declaration": DECLARATION,
            "predictions": {"validation": of_validation, "guard": [guard]},
            "seed": seed,
        }

    def errors(self) -> list[np.ndarray]:
        """Squared errors of each split."""
        labels = [self.rows.labels_at(part.validation) for part in self.splits]
        return [(truth - guess[:, 0]) ** 2 for truth, guess in zip(labels, self.predicted, strict=True)]

    def verdict(self) -> Verdict:
        found = self.judge.judge(self.result)
        assert isinstance(found, Verdict)
        return found


@pytest.mark.parametrize("objective", ["val_mse", "val_rmse"])
def test_the_score_of_folds_is_that_of_all_predictions_out_of_fold_together(tmp_path: Path, objective: str) -> None:
    judged = Judged(tmp_path, "kfold:4", objective)
    mean, verdict = float(np.concatenate(judged.errors()).mean()), judged.verdict()
    assert verdict.score == pytest.approx(mean if objective == "val_mse" else np.sqrt(mean))
    # What the final choice pools with guard rows: the sums over every open row.
    assert verdict.evidence["validation"] == pytest.approx([mean * judged.rows.labelled])
    assert judged.found["weight"] == judged.rows.labelled


@pytest.mark.parametrize("objective", ["val_mse", "val_rmse"])
def test_the_score_of_repeats_is_their_mean_and_is_not_pooled_row_by_row(tmp_path: Path, objective: str) -> None:
    judged = Judged(tmp_path, "repeated:3", objective)
    means = [float(one.mean()) for one in judged.errors()]
    verdict = judged.verdict()
    assert verdict.score == pytest.approx(np.mean(means if objective == "val_mse" else np.sqrt(means)))
    assert verdict.evidence["validation"] is None
    alone = np.mean([one.std(ddof=1) / np.sqrt(len(one)) for one in judged.errors()])
    if objective == "val_mse":  # three splits that overlap a little amount to almost three times the rows
        assert verdict.error is not None and alone / 2 < verdict.error < alone


def test_a_trial_with_a_split_of_its_own_is_scored_by_its_own_rows(tmp_path: Path) -> None:
    judged = Judged(tmp_path, "reshuffle")
    verdict = judged.verdict()
    assert verdict.score == pytest.approx(judged.errors()[0].mean())
    assert verdict.evidence["validation"] is None
    other = judged.judge.judge(judged.result | {"seed": 4})
    assert isinstance(other, Verdict) and other.score != verdict.score and other.guard == verdict.guard


@pytest.mark.parametrize("words", ["kfold:4", "repeated:3", "reshuffle"])
def test_a_metric_that_only_keras_knows_gets_the_same_rows_by_index_files(tmp_path: Path, words: str) -> None:
    judged = Judged(tmp_path, words, "val_own")
    asked = judged.judge.judge(judged.result)
    assert isinstance(asked, dict)
    sets = asked["sets"]
    assert len(sets) == 1 + (3 if words == "repeated:3" else 1) and "guard" in sets
    labels = [data.load_structure(one["labels"]) for name, one in sets.items() if name != "guard"]
    predicted = [np.load(one["predictions"][0]) for name, one in sets.items() if name != "guard"]
    wanted = [judged.rows.labels_at(part.validation) for part in judged.splits]
    if words == "kfold:4":
        wanted, judged.predicted = [np.concatenate(wanted)], [np.concatenate(judged.predicted)]
    assert all(np.array_equal(a, b) for a, b in zip(labels, wanted, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(predicted, judged.predicted, strict=True))
    values = {name: float(at) for at, name in enumerate(sets)}
    settled = judged.judge.settle({"values": values})
    assert settled.score == np.mean([value for name, value in values.items() if name != "guard"])
    assert settled.guard == values["guard"]
    with pytest.raises(TrialFailed, match="the metric is nan"):
        judged.judge.settle({"values": values | {name: np.nan for name in values if name != "guard"}})


def test_predictions_of_too_few_splits_are_no_result(tmp_path: Path) -> None:
    judged = Judged(tmp_path, "kfold:4")
    judged.result["predictions"]["validation"].pop()  # type: ignore[index]
    with pytest.raises(TrialFailed, match="of 4 splits, but are of 3"):
        judged.judge.judge(judged.result)


# ── the choice ───────────────────────────────────────────────────────────────────────────────────

ACCURACY = Metric("accuracy")


def own(trial: int, score: float, right: np.ndarray) -> Candidate:
    """A model with a validation score on rows of its own, and its hits on the guard rows that all share."""
    made = parts("accuracy", {}, np.ones(len(right)), right[:, None].astype(float), False)
    return Candidate(trial, trial, None, score, float(right.mean()), made, None)


def test_scores_on_rows_of_their_own_count_by_their_rows_beside_the_guard_rows() -> None:
    a = own(0, 0.9, np.array([1, 1, 0, 0]))
    b = own(1, 0.6, np.array([1, 1, 1, 1]))
    found = choose(ACCURACY, "max", [a, b], 12.5, 4)
    assert found.pooled == pytest.approx({0: (12.5 * 0.9 + 4 * 0.5) / 16.5, 1: (12.5 * 0.6 + 4) / 16.5})
    assert found.trial == 0 and choose(ACCURACY, "max", [a, b], 1, 4).trial == 1


def search(rng: np.random.Generator, trials: int = 100, rows: int = 180, guard: int = 180) -> tuple[Any, ...]:
    """Models whose truth is known, each validated on rows of its own; errors on guard rows go together."""
    from scipy.stats import norm

    truth = np.clip(rng.normal(0.8, 0.02, trials), 0.5, 0.97)
    scores = rng.binomial(rows, truth) / rows
    shared, alone = rng.normal(size=(1, guard)), rng.normal(size=(trials, guard))
    right = np.sqrt(0.5) * shared + np.sqrt(0.5) * alone < norm.ppf(truth)[:, None]
    kept = np.argsort(-scores)[:20]
    return truth, [own(int(k), float(scores[k]), right[k]) for k in kept], int(np.argmax(scores))


def test_with_splits_of_their_own_the_rule_ships_better_models_and_the_estimate_is_not_bent() -> None:
    """The best score of a hundred, each on a draw of rows of its own, flatters by several points here."""
    gains, flattered, gaps = [], [], []
    for seed in range(60):
        truth, pool, best = search(np.random.default_rng(seed))
        found = choose(ACCURACY, "max", pool, 180, 180)
        gains.append(truth[found.trial] - truth[best])
        estimate = corrected(ACCURACY, "max", pool, 180, 180, repeats=200)
        gaps.append(estimate.estimate - truth[found.trial])
        flattered.append(max(one.score for one in pool) - truth[best])
    # Standard errors over 60 searches: 0.3 points of the gain, 0.4 of the gap.
    assert np.mean(gains) > 0.003 and np.mean(flattered) > 0.04 and abs(np.mean(gaps)) < 0.012


# ── what is recorded ─────────────────────────────────────────────────────────────────────────────


class Recorded:
    """A study whose trials predicted noise around the truth, the less of it the higher their number."""

    def __init__(self, workspace: Path, words: str, trials: int = 4) -> None:
        rng, plan = np.random.default_rng(0), validation.parse(words)
        x, y = rng.normal(size=(300, 2)), rng.normal(size=300)
        self.folder = workspace / "studies" / "s"
        self.folder.mkdir(parents=True)
        dataset = Dataset(x, y)
        manifest = data.prepare(dataset, workspace, 0, False)
        found = folds.write(plan, data.labelled(dataset, 0), manifest, self.folder / "folds")
        rows, sealed = workspace / "rows" / manifest["digest"], workspace / "sealed" / manifest["digest"]
        judge = RowJudge(rows, sealed, "val_mse", {}, self.folder / "guard", validation=found)
        prepared = {"manifest": manifest, "rows": str(rows), "sealed": str(sealed), "preprocess": None}
        prepared |= {"validation": found, "objective": "val_mse", "direction": "min", "problem": {}}
        config = StudyConfig("s", trials=trials, validation=words).to_json()
        about = {"name": "s", "study_id": "s1", "config": config, "objective": "val_mse", "direction": "min"}
        about |= {"data": {key: manifest[key] for key in ("digest", "fingerprint", "rows", "tiers")}}
        self.found, self.sizes, self.verdicts = found, manifest["tiers"], []
        opened, guard = OpenRows(rows), SealedRows(sealed).labels("guard")
        with Journal.create(self.folder / "journal.sqlite", {"prepared": prepared, "study": about}) as journal:
            for number in range(trials):
                place = self.folder / "trials" / f"{number:04}"
                noise = 1.0 - 0.2 * number
                files: list[Any] = []
                for at, part in enumerate(folds.parts(found, 100 + number)):
                    split = place / f"fold_{at}" if plan.is_repeated else place
                    split.mkdir(parents=True)
                    truth = opened.labels_at(part.validation)[:, None]
                    np.save(split / "validation_0.npy", truth + noise * rng.normal(size=truth.shape))
                    files.append([str(split / "validation_0.npy")])
                np.save(place / "guard_0.npy", guard[:, None] + noise * rng.normal(size=(len(guard), 1)))
                (place / "model.weights.h5").touch()
                predictions = {"validation": files if plan.is_repeated else files[0]}
                predictions["guard"] = [str(place / "guard_0.npy")]
                told = {"declaration": DECLARATION, "predictions": predictions, "seed": 100 + number}
                verdict = judge.judge(told)
                assert isinstance(verdict, Verdict)
                began = Trial(number, TrialState.RUNNING, {"units": number}, seed=100 + number, started=1.0)
                journal.begin(began)
                ended = {"score": verdict.score, "loss": verdict.score, "ended": 2.0, "epochs": 1, "size": 1}
                journal.finish(began.moved(TrialState.COMPLETE, extra={"declaration": DECLARATION}, **ended))
                journal.guard(number, 0, verdict.guard or 0.0, verdict.evidence)
                self.verdicts.append(verdict)
            self.selection = select(self.folder, journal)
            journal.put("selection", self.selection)
            journal.put("state", "COMPLETE")

    def pooled(self) -> list[float]:
        """Each trial's score by validation and guard rows."""
        weight, guard = self.found["weight"], self.sizes["guard"]
        return [(weight * one.score + guard * (one.guard or 0.0)) / (weight + guard) for one in self.verdicts]


@pytest.mark.parametrize("words", ["kfold:4", "repeated:3", "reshuffle"])
def test_the_winner_of_a_plan_is_the_best_by_its_validation_score_and_guard_rows(tmp_path: Path, words: str) -> None:
    done = Recorded(tmp_path, words)
    pooled, found = done.pooled(), done.selection
    assert found is not None
    assert found["winner"]["trial"] == int(np.argmin(pooled)) == 3 and found["baseline"]["trial"] == 0
    assert found["winner"]["validation"] == done.verdicts[3].score
    assert (found["winner"]["validation_interval"] is None) == (words == "repeated:3")
    low, high = found["corrected"]["interval"]
    assert low < found["corrected"]["estimate"] < high and "guard rows" in found["corrected"]["method"]
    assert found["gains"]["shipped"]["gain"] > 0


@pytest.mark.parametrize(
    ("words", "head"),
    [
        ("kfold:4", "out of fold, 210 rows (optimistic)"),
        ("repeated:3", "mean of 3 repeats,"),
        ("reshuffle", "own split, 30 rows (optimistic)"),
    ],
)
def test_a_report_calls_what_validation_alone_says_optimistic(tmp_path: Path, words: str, head: str) -> None:
    Recorded(tmp_path, words)
    found = report.report(Study("s", tmp_path))
    judged = found["validation"]
    assert (judged["plan"], judged["label"], judged["estimate"]) == (words, "optimistic", found["winner"]["validation"])
    shown = "\n".join(report.lines(found))
    assert head in shown and "(optimistic)" in shown and f"validation by {words}: " in shown
    assert "is optimistic: the search chose by the rows behind it" in found["believe"]
    assert "corrected for the choice" in found["believe"]
    assert f", validation {words}" in report.status_line(report.status(Study("s", tmp_path)))


def test_where_guard_rows_say_nothing_folds_alone_correct_nothing(tmp_path: Path) -> None:
    done = Recorded(tmp_path, "kfold:4")
    shutil.rmtree(done.folder / "guard")
    with Journal.open(done.folder / "journal.sqlite") as journal:
        found = select(done.folder, journal)
        journal.put("selection", found)
    assert found is not None and found["corrected"] is None
    said = report.report(Study("s", tmp_path))
    assert said["corrected"] is None and said["validation"]["label"] == "optimistic"
    assert "there is no estimate that corrects for that" in said["believe"]


# ── the pruner ───────────────────────────────────────────────────────────────────────────────────


def test_folds_are_compared_by_the_mean_so_far_and_one_that_is_no_number_is_the_worst() -> None:
    curve = pruners.Folds([0.4, 0.2, 0.6])
    assert [curve.best(step) for step in (1, 2, 3)] == pytest.approx([0.4, 0.3, 0.4])
    assert pruners.Folds([0.4, float("nan"), 0.2]).best(3) == float("inf")


def test_a_pruner_may_stop_after_any_fold_but_the_last_and_grace_counts_folds(tmp_path: Path) -> None:
    prepared = {"objective": "val", "direction": "max", "epochs": 50}
    with Journal.create(tmp_path / "journal.sqlite", {}) as journal:

        def rungs(**options: Any) -> tuple[int, ...]:
            return jobs.pruning(StudyConfig("s", **options), prepared, journal).rungs(Trial(1))

        assert rungs(pruner="median", validation="kfold:5") == (1, 2, 3, 4)
        assert rungs(pruner="asha", validation="kfold:5") == (1, 3)
        assert rungs(pruner="asha", validation="repeated:3", grace=2) == (2,)
        assert rungs(pruner="asha", validation="reshuffle") == (5, 15, 45)
        pruning = jobs.pruning(StudyConfig("s", pruner="asha", validation="kfold:5"), prepared, journal)
    for number, values in ((1, (0.9, 0.7)), (2, (0.8, 0.9)), (3, (0.8, 0.8))):
        for step, value in enumerate(values, start=1):
            pruning.heard(Trial(number), Report(number, 0, step, 0.0, {"val": value}))
    assert pruning.loss(Trial(1), 2) == pytest.approx(-0.8) and pruning.stops(Trial(3), 1)


# ── real studies ─────────────────────────────────────────────────────────────────────────────────

# The metric has no name of its own, so a second build in one process would report it under another one; and what the
# module remembers between calls must not reach the next fold.
SPACE = {
    "imports": PARTS["imports"] + "\nimport json\nimport os\n\nHERE = os.path.dirname(os.path.abspath(__file__))",
    "objective": 'objective = "val_sparse_categorical_accuracy"\nepochs = 3\nremembered = []',
    "preprocess": (
        "def preprocess(train):\n"
        "    with open(os.path.join(HERE, 'preprocessed.jsonl'), 'a') as file:\n"
        "        seen = {'rows': len(train.x), 'sum': float(train.x.astype('float64').sum())}\n"
        "        file.write(json.dumps(seen) + '\\n')\n"
        "    normalize = keras.layers.Normalization()\n"
        "    normalize.adapt(train.x)\n"
        "    return keras.Sequential([keras.Input((4,)), normalize])"
    ),
    "build": (
        "def build(hp):\n"
        "    model = keras.Sequential([keras.Input((4,))])\n"
        "    model.add(keras.layers.Dense(hp.Int('units', 2, 16, default=4), activation='relu'))\n"
        "    model.add(keras.layers.Dense(2, activation='softmax'))\n"
        "    rate = hp.Float('rate', 1e-3, 1e-1, sampling='log', default=1e-2)\n"
        "    metrics = [keras.metrics.SparseCategoricalAccuracy()]\n"
        "    model.compile(keras.optimizers.Adam(rate), 'sparse_categorical_crossentropy', metrics=metrics)\n"
        "    return model"
    ),
    "rest": (
        "def fit(hp, model, *args, **kwargs):\n"
        "    assert not remembered, 'what an earlier fold left'\n"
        "    remembered.append(1)\n"
        "    with open(os.path.join(HERE, 'fitted.txt'), 'a') as file:\n"
        "        file.write(f'{os.getpid()} {len(args[0])}\\n')\n"
        "    return model.fit(*args, **kwargs)"
    ),
}
PLAN = ("--trials", "3", "--sampler", "random", "--workers", "1", "--evaluate", "no")


@dataclasses.dataclass
class Done:
    folder: Path
    study: Study
    report: dict[str, Any]
    said: str

    def lines(self, name: str) -> list[str]:
        return (self.folder / name).read_text().splitlines()


def launched(folder: Path, words: str, *options: str, **parts: str) -> Done:
    space = write_space(folder, **(SPACE | parts))
    asked = ("--validation", words, "--study", "s", "--workspace", str(folder / "ws"), "--json")
    ran = run_heldout("launch", space, *PLAN, *asked, *options, timeout=900)
    assert ran.returncode == 0, ran.stderr
    return Done(folder, Study("s", folder / "ws"), json.loads(ran.stdout), ran.stderr)


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Any:
    before = os.environ.get("HELDOUT_LEDGER")
    os.environ["HELDOUT_LEDGER"] = str(tmp_path_factory.mktemp("user") / "ledger.jsonl")
    yield
    os.environ.pop("HELDOUT_LEDGER")
    if before is not None:
        os.environ["HELDOUT_LEDGER"] = before


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory, ledger: None) -> Done:
    return launched(tmp_path_factory.mktemp("folded"), "kfold:3", "--confirm", "1", "--confirm-seeds", "1")


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory: pytest.TempPathFactory, ledger: None) -> Done:
    return launched(tmp_path_factory.mktemp("shuffled"), "reshuffle", "--confirm", "1", "--confirm-seeds", "2")


def rows_of(done: Done) -> tuple[OpenRows, dict[str, Any]]:
    prepared = done.study.meta("prepared")
    return OpenRows(Path(prepared["rows"])), prepared["validation"]


def hits(files: list[Path], labels: np.ndarray) -> float:
    predicted = np.concatenate([np.load(path, allow_pickle=False) for path in files])
    return float((predicted.argmax(axis=1) == labels).mean())


@pytest.mark.study
@pytest.mark.timeout(1800)
def test_every_fold_trains_in_a_process_of_its_own_and_the_score_is_out_of_fold(folded: Done) -> None:
    rows, found = rows_of(folded)
    splits = folds.parts(found, 0)
    assert folded.report["trials"] == {"complete": 3, "pruned": 0, "failed": 0}
    trials = folded.study.trials
    assert len(trials) == 5 and all(trial.state is TrialState.COMPLETE for trial in trials)
    labels = rows.labels_at(np.concatenate([part.validation for part in splits]))
    for trial in trials:
        place = folded.study.folder / "trials" / f"{trial.number:04}"
        files = [place / f"fold_{k}" / "validation_0.npy" for k in range(3)]
        if place.joinpath("model.weights.h5").exists():
            assert trial.score == pytest.approx(hits(files, labels))
        reports = folded.study.show(trial.number)["reports"]
        assert [one["step"] for one in reports] == [1, 2, 3]
        assert all("val_sparse_categorical_accuracy" in one["metrics"] for one in reports)
        assert 1 <= trial.epochs <= 3 and trial.best_epoch == trial.epochs
    fitted = [line.split() for line in folded.lines("fitted.txt")]
    assert len({pid for pid, _ in fitted}) == len(fitted) == 5 * 4
    sizes = [*(len(part.train) for part in splits), rows.labelled]
    assert [int(count) for _, count in fitted] == sizes * 5


@pytest.mark.study
@pytest.mark.timeout(1800)
def test_preprocessing_learns_from_each_folds_train_rows_alone(folded: Done) -> None:
    rows, found = rows_of(folded)
    pool = rows.pool()[0].astype("float64")
    seen = [json.loads(line) for line in folded.lines("preprocessed.jsonl")]
    parts = [part.train for part in folds.parts(found, 0)] + [np.arange(rows.labelled)]
    assert [one["rows"] for one in seen] == [len(part) for part in parts]
    assert [one["sum"] for one in seen] == pytest.approx([pool[part].sum() for part in parts])


@pytest.mark.study
@pytest.mark.timeout(1800)
def test_what_folds_alone_say_is_optimistic_and_what_guard_rows_say_is_corrected(
    folded: Done, heldout: Heldout
) -> None:
    report = folded.report
    judged, winner = report["validation"], report["winner"]
    assert judged["label"] == "optimistic" and judged["plan"] == "kfold:3"
    assert judged["estimate"] == winner["validation"] and judged["interval"][0] < judged["estimate"]
    assert judged["rows"] == judged["weight"] == 140
    guards = report["corrected"]
    assert guards["method"].startswith("bootstrap bias-corrected over") and "guard rows" in guards["method"]
    assert "is optimistic: the search chose by the rows behind it" in report["believe"]
    options = ("--workspace", str(folded.folder / "ws"))
    shown = heldout("report", "s", *options).stdout
    assert "out of fold, 140 rows (optimistic)" in shown and "guard, corrected" in shown
    assert "validation by kfold:3: each of 140 train and validation rows validates once" in shown
    assert ", validation kfold:3" in heldout("status", "s", *options).stdout
    assert "\nfold 3: " in heldout("show", "s", "1", *options).stdout
    with folded.study.journal() as journal:
        assert journal.get("study")["config"]["validation"] == "kfold:3"


@pytest.mark.study
@pytest.mark.timeout(1800)
def test_the_model_that_predicted_the_guard_rows_is_the_one_that_is_exported(
    folded: Done, heldout: Heldout, tmp_path: Path
) -> None:
    options = ("--workspace", str(folded.folder / "ws"), "--json")
    lineage = json.loads(heldout("export", "s", "--out", str(tmp_path / "m"), *options).stdout)
    winner = folded.report["winner"]
    assert lineage["trial"] == winner["trial"]
    assert lineage["scores"]["guard"]["score"] == pytest.approx(winner["guard"])
    assert lineage["scores"]["validation"] == {
        "score": winner["validation"], "plan": "kfold:3", "label": "optimistic"
    }  # fmt: skip
    card = (tmp_path / "m" / "MODEL_CARD.md").read_text()
    assert "| validation (kfold:3, optimistic) |" in card and "so it is optimistic" in card


@pytest.mark.study
@pytest.mark.timeout(1800)
def test_a_trial_of_folds_is_reproduced_to_the_bit(folded: Done, heldout: Heldout) -> None:
    kept = folded.report["winner"]["trial"]
    ran = heldout("reproduce", "s", str(kept), "--workspace", str(folded.folder / "ws"))
    assert ran.returncode == 0 and "reproduced exactly" in ran.stdout, ran.stdout + ran.stderr


def sequence(study: Study) -> list[Any]:
    found = [(t.number, t.confirms, dict(t.params), t.seed, t.score, t.epochs, t.best_epoch) for t in study.trials]
    return sorted(found, key=lambda one: one[0])


def killed(folder: Path, words: str, when: Callable[[], bool], *options: str) -> None:
    """A launch whose driver is killed at a moment, and its resume."""
    asked = ("--validation", words, "--study", "s", "--workspace", str(folder / "ws"), "--confirm", "1")
    command = [sys.executable, "-m", "search.cli", "launch", str(folder / "tiny.py"), *PLAN, *asked, *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    driver = subprocess.Popen(
        [*command, "--confirm-seeds", "1"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment
    )
    try:
        until = time.monotonic() + 300
        while not when():
            assert driver.poll() is None and time.monotonic() < until
            time.sleep(0.01)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    ran = run_heldout("resume", "s", "--workspace", str(folder / "ws"), timeout=900)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("checkpoints", [False, True], ids=["again", "from the folds that had ended"])
def test_a_study_of_folds_that_was_killed_ends_as_the_uninterrupted_one(
    folded: Done, tmp_path: Path, checkpoints: bool
) -> None:
    write_space(tmp_path, **SPACE)
    fold = tmp_path / "ws" / "studies" / "s" / "trials" / "0001" / "fold_1"
    options = ("--checkpoint-minutes", "10") if checkpoints else ()
    killed(tmp_path, "kfold:3", fold.exists, *options)
    study = Study("s", tmp_path / "ws")
    assert study.trials[1].attempt == 1
    assert sequence(study) == sequence(folded.study)
    fitted = (tmp_path / "fitted.txt").read_text().splitlines()
    assert len(fitted) <= 5 * 4 + (1 if checkpoints else 2)
    assert not list(study.folder.rglob("*checkpoint*"))


@pytest.mark.study
@pytest.mark.timeout(1800)
def test_every_trial_has_a_split_of_its_own_and_preprocessing_of_that_split(shuffled: Done, tmp_path: Path) -> None:
    rows, found = rows_of(shuffled)
    trials = shuffled.study.trials
    assert all(trial.state is TrialState.COMPLETE for trial in trials)
    again = {trial.confirms for trial in trials} - {None}  # the finalist, which may be the baseline
    assert 0 in again and len(trials) == 3 + 2 * len(again)
    pool, seen = rows.pool()[0].astype("float64"), [json.loads(line) for line in shuffled.lines("preprocessed.jsonl")]
    parts = [folds.parts(found, trial.seed)[0] for trial in trials]
    assert [one["sum"] for one in seen] == pytest.approx([pool[part.train].sum() for part in parts])
    assert len({part.validation.tobytes() for part in parts}) == len(trials)
    for trial, part in zip(trials, parts, strict=True):
        place = shuffled.study.folder / "trials" / f"{trial.number:04}"
        if (place / "model.weights.h5").exists():
            assert trial.score == pytest.approx(hits([place / "validation_0.npy"], rows.labels_at(part.validation)))
            assert (place / "preprocess.keras").exists()
    with shuffled.study.journal() as journal:
        evidence = [found for _, found in journal.guards().values()]
    assert all(one["validation"] is None for one in evidence)
    report = shuffled.report
    assert report["validation"]["label"] == "optimistic" and report["noise_floor"] is not None
    assert report["corrected"]["interval"][0] <= report["corrected"]["estimate"]


@pytest.mark.study
@pytest.mark.timeout(1800)
def test_a_reshuffled_trial_is_exported_with_its_own_preprocessing(
    shuffled: Done, heldout: Heldout, tmp_path: Path
) -> None:
    options = ("--workspace", str(shuffled.folder / "ws"), "--json")
    ran = heldout("export", "s", "--out", str(tmp_path / "m"), *options)
    lineage, winner = json.loads(ran.stdout), shuffled.report["winner"]
    assert lineage["scores"]["guard"]["score"] == pytest.approx(winner["guard"])
    assert lineage["scores"]["validation"]["plan"] == "reshuffle"
    again = heldout("reproduce", "s", str(winner["trial"]), *options[:2])
    assert "reproduced exactly" in again.stdout, again.stdout + again.stderr


@pytest.mark.study
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "words",
    [*(pytest.param(words, marks=pytest.mark.slow) for words in ("kfold:3", "repeated:2")), "reshuffle"],
)
def test_other_guard_labels_leave_every_trial_as_it_is(words: str, tmp_path: Path, ledger: None) -> None:
    first = launched(tmp_path, words, "--confirm", "0", "--sampler", "tpe")
    sealed = Path(first.study.meta("prepared")["sealed"]) / "guard_y_0.npy"
    labels = np.load(sealed, allow_pickle=False)
    np.save(sealed, 1 - labels)
    space = write_space(tmp_path, **SPACE)
    asked = ("--validation", words, "--study", "t", "--workspace", str(tmp_path / "ws"), "--confirm", "0")
    ran = run_heldout("launch", space, *PLAN, "--sampler", "tpe", *asked, timeout=900)
    assert ran.returncode == 0, ran.stderr
    second = Study("t", tmp_path / "ws")
    assert sequence(first.study) == sequence(second)
    guards = []
    for study in (first.study, second):
        with study.journal() as journal:
            guards.append([score for score, _ in journal.guards().values()])
    assert guards[0] == pytest.approx([1 - score for score in guards[1]])


# The rate decides how much a model learns: some trials learn nothing, and are stopped after a fold.
WEAK = {
    "build": SPACE["build"].replace("1e-3, 1e-1, sampling='log'", "1e-9, 1.0, sampling='log'"),
    "objective": SPACE["objective"].replace("epochs = 3", "epochs = 6"),
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_trial_is_stopped_after_a_fold_at_the_mean_of_its_folds(
    tmp_path: Path, heldout: Heldout, ledger: None
) -> None:
    assert WEAK["build"] != SPACE["build"] and WEAK["objective"] != SPACE["objective"]
    options = ("--trials", "10", "--pruner", "asha", "--confirm", "0")
    done = launched(tmp_path, "kfold:4", *options, **WEAK)
    weak = [trial for trial in done.study.trials if trial.state is TrialState.PRUNED]
    assert weak and done.report["trials"]["pruned"] == len(weak)
    for trial in weak:
        reports = done.study.show(trial.number)["reports"]
        assert trial.epochs in (1, 3) and [one["step"] for one in reports] == list(range(1, trial.epochs + 1))
        values = [one["metrics"]["val_sparse_categorical_accuracy"] for one in reports]
        assert trial.score == pytest.approx(np.mean(values))
        left = {path.name for path in (done.study.folder / "trials" / f"{trial.number:04}").iterdir()}
        assert left == {"log.txt"}
    where = ("--workspace", str(tmp_path / "ws"))
    assert "stopped early by the pruner, after 1 fold" in heldout("show", "s", str(weak[0].number), *where).stdout
    again = heldout("reproduce", "s", str(weak[0].number), *where)
    assert "reproduced exactly" in again.stdout, again.stdout + again.stderr


# The third training of trial 1 dies once, as any process may.
DYING = (
    "def fit(hp, model, *args, **kwargs):\n"
    "    marks = os.path.join(HERE, 'marks')\n"
    "    os.makedirs(marks, exist_ok=True)\n"
    "    number = len(os.listdir(marks))\n"
    "    open(os.path.join(marks, str(number)), 'w').close()\n"
    "    if number == 6:\n"
    "        os.kill(os.getpid(), 9)\n"
    "    return model.fit(*args, **kwargs)"
)
RAISING = (
    "def fit(hp, model, *args, **kwargs):\n"
    "    if hp.values['units'] != 4 and len(args[0]) == 140:\n"
    "        raise ValueError('the refit goes wrong')\n"
    "    return model.fit(*args, **kwargs)"
)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_fold_is_a_killed_trial_and_an_error_in_one_is_the_trials(tmp_path: Path, ledger: None) -> None:
    for name in ("dying", "raising"):
        (tmp_path / name).mkdir()
    done = launched(tmp_path / "dying", "kfold:3", "--confirm", "0", rest=DYING)
    assert [trial.attempt for trial in done.study.trials] == [0, 1, 0] and done.report["retries"] == {"crash": 1}
    done = launched(tmp_path / "raising", "kfold:3", "--confirm", "0", rest=RAISING)
    failed = [trial for trial in done.study.trials if trial.state is TrialState.FAILED]
    assert len(failed) == sum(trial.params["units"] != 4 for trial in done.study.trials) >= 1
    assert {trial.reason for trial in failed} == {"crash"}
    assert all("the refit goes wrong" in (trial.message or "") and trial.attempt == 0 for trial in failed)
    assert all(set(trial.params) == {"units", "rate"} for trial in failed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("column", ["time=np.arange(200)", "groups=np.arange(200) // 2", ""])
@pytest.mark.parametrize("words", ["kfold:3", "repeated:2", "reshuffle"])
def test_every_plan_ends_in_a_report_whatever_the_rows(
    words: str, column: str, tmp_path: Path, ledger: None
) -> None:
    load = PARTS["load"].replace("'int64'))", f"'int64'), {column})")
    method = () if column else ("--start-method", "spawn")
    done = launched(tmp_path, words, "--confirm", "1", "--confirm-seeds", "1", *method, load=load)
    report, (rows, found) = done.report, rows_of(done)
    assert report["trials"] == {"complete": 3, "pruned": 0, "failed": 0} and report["noise_floor"] is None
    assert report["validation"]["plan"] == words and report["validation"]["label"] == "optimistic"
    assert report["corrected"]["interval"][0] <= report["corrected"]["estimate"] <= report["corrected"]["interval"][1]
    assert rows.manifest["ordered"] == ("time" in column) and found["ordered"] == ("time" in column)
    if words == "kfold:3":  # of rows in time, the earliest block validates nothing
        assert (found["rows"] < rows.labelled) == ("time" in column)


@pytest.mark.timeout(1800)
def test_check_says_how_trials_are_judged_and_counts_their_trainings(tmp_path: Path, heldout: Heldout) -> None:
    space, where = write_space(tmp_path, **SPACE), ("--workspace", str(tmp_path / "ws"))
    said = heldout("check", space, "--validation", "repeated:2", *where)
    assert said.returncode == 0, said.stderr
    assert "validation by repeated:2: the same 2 splits of train and validation rows for every trial" in said.stdout
    assert "of 3 trainings of up to 3 epochs" in said.stdout


@pytest.mark.parametrize(
    ("words", "load", "line"),
    [
        ("kfold:1", PARTS["load"], "--validation kfold must be given 2 to 100"),
        (
            "kfold:3",
            PARTS["load"].replace("'int64'))", "'int64'), validation=(x[:20], (x[:20, 0] > 0).astype('int64')))")
            .replace("Dataset(x, (x[:, 0] + x[:, 1]", "Dataset(x[20:], (x[20:, 0] + x[20:, 1]"),
            "load() says by validation= which rows validate",
        ),
    ],
)  # fmt: skip
def test_a_plan_that_cannot_be_is_refused_in_one_line_and_leaves_nothing(
    words: str, load: str, line: str, tmp_path: Path, heldout: Heldout
) -> None:
    space = write_space(tmp_path, load=load)
    ran = heldout("launch", space, "--validation", words, "--workspace", str(tmp_path / "ws"))
    assert ran.returncode == 2 and line in ran.stderr and "Traceback" not in ran.stderr, ran.stderr
    assert not list((tmp_path / "ws" / "studies").glob("*")) if (tmp_path / "ws").exists() else True

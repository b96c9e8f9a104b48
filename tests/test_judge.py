"""What the judge says of trials: which may be compared, what guard labels may not decide, which rows will not do."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import search
from search.definition.problem import SpaceModule, find
from search.definition.space import Domain, Parameter, Space
from search.errors import DataError, TrialFailed
from search.executors import Slot
from search.executors.inline import InlineExecutor
from search.guard.ledger import Ledger
from search.loop.attempt import Verdict
from search.loop.driver import Driver
from search.loop.ends import Ends
from search.record.journal import Journal
from search.samplers import get_sampler
from search.scorer import custom_metric, metrics, scoring
from search.scorer.judge import RowJudge, check_tiers
from search.tiers.data import Dataset, OpenRows, SealedRows, prepare
from search.trial import TrialState
from tests.tiny import write_space

RNG = np.random.default_rng(0)
ROWS = 400


class Stored:
    """Rows of these labels in a workspace, and a judge of them."""

    def __init__(self, folder: Path, y: Any, objective: str, declaration: dict[str, Any]) -> None:
        x = np.random.default_rng(1).normal(size=(ROWS, 3)).astype("float32")
        digest = prepare(Dataset(x, y), folder / "ws", 0, False)["digest"]
        self.folder, self.objective, self.declaration = folder, objective, declaration
        self.rows, self.sealed = folder / "ws" / "rows" / digest, folder / "ws" / "sealed" / digest

    def judge(self, baseline: Mapping[str, Any] | None = None) -> RowJudge:
        keep = self.folder / "guard"
        return RowJudge(self.rows, self.sealed, self.objective, {}, keep, baseline=lambda: baseline)

    def result(self, declaration: dict[str, Any] | None = None, number: int = 0) -> dict[str, Any]:
        """What a trial leaves behind that predicts noise."""
        declaration = declaration or self.declaration
        place, paths = self.folder / f"{number:04d}", {}
        place.mkdir(exist_ok=True)
        noise = np.random.default_rng(number)
        for tier in ("validation", "guard"):
            rows = OpenRows(self.rows).size(tier)
            paths[tier] = [str(place / f"{tier}_{k}.npy") for k in range(len(declaration["outputs"]))]
            for path, output in zip(paths[tier], declaration["outputs"], strict=True):
                np.save(path, noise.uniform(0.1, 0.9, size=(rows, output["shape"][1])).astype("float32"))
        return {"declaration": declaration, "predictions": paths}

    def relabel(self, tier: str, value: Any) -> None:
        """Other sealed labels in the place of a tier's."""
        for path in self.sealed.glob(f"{tier}_y_*.npy"):
            labels = np.load(path)
            labels[:] = value
            path.chmod(0o600)
            np.save(path, labels)


def output(loss: str | None, name: str = "out", width: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "loss": loss,
        "from_logits": False,
        "weight": 1.0,
        "shape": [None, width],
        "config": {},
    } | more


def declared(*outputs: dict[str, Any], **named: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    listed = [{"output": "out", "name": name, "kind": kind, "config": config} for name, (kind, config) in named.items()]
    return {"outputs": list(outputs), "metrics": listed}


VALUES = RNG.normal(size=ROWS).astype("float32")
CLASSES = (RNG.random(ROWS) > 0.5).astype("float32")


# ── which trials may be compared ─────────────────────────────────────────────────────────────────

MSE = declared(output("mse"))
LOGITS = {"from_logits": True, "config": {"from_logits": True}}
PAIR = declared(output("mse", "a"), output("mae", "b"))
OWN = declared(output(None, config={"name": "own"}))
FOCAL = "binary_focal_crossentropy"


@pytest.mark.parametrize(
    ("objective", "baseline", "other", "words"),
    [
        (
            "val_loss",
            MSE,
            declared(output("mae")),
            "its loss is mean_absolute_error and the baseline's is mean_squared",
        ),
        ("val_loss", MSE, OWN, "its loss is own and the baseline's is mean_squared_error"),
        ("val_loss", declared(output(FOCAL)), declared(output("bce")), f"baseline's is {FOCAL}"),
        ("val_loss", OWN, declared(output(None, config={"name": "other"})), "its loss is other .* is own"),
        (
            "val_loss",
            declared(output("huber")),
            declared(output("huber", config={"delta": 2.0})),
            "its delta is 2.0 and the baseline's is 1.0",
        ),
        ("val_loss", declared(output("bce")), declared(output("bce", **LOGITS)), "its from_logits is True"),
        ("val_loss", MSE, declared(output("mse", weight=0.5)), "its weight is 0.5"),
        (
            "val_loss",
            PAIR,
            declared(output("mse", "a"), output("mae", "b", weight=0.5)),
            "its weight of output 1 is 0.5 and the baseline's is 1.0",
        ),
        ("val_b_loss", PAIR, declared(output("mse", "a"), output("mse", "b")), "its loss of output 1 is mean_sq"),
        ("val_own", declared(output("mse"), own=("mae", {})), declared(output("mse"), own=("mse", {})), "its metric"),
        (
            "val_top",
            declared(output("mse"), top=("TopKCategoricalAccuracy", {"k": 5})),
            declared(output("mse"), top=("TopKCategoricalAccuracy", {"k": 3})),
            "its k is 3 and the baseline's is 5",
        ),
        (
            "val_area",
            declared(output("mse"), area=("AUC", {"curve": "ROC"})),
            declared(output("mse"), area=("AUC", {"curve": "PR"})),
            "its metric is average_precision and the baseline's is auc",
        ),
    ],
)
def test_a_trial_of_another_quantity_than_the_baselines_is_not_compared(
    tmp_path: Path, objective: str, baseline: dict[str, Any], other: dict[str, Any], words: str
) -> None:
    y = VALUES if len(baseline["outputs"]) == 1 else {"a": VALUES, "b": VALUES}
    stored = Stored(tmp_path, y, objective, baseline)
    assert stored.judge(baseline).judge(stored.result())
    with pytest.raises(TrialFailed, match=words) as caught:
        stored.judge(baseline).judge(stored.result(other))
    assert caught.value.reason == "invalid" and "\n" not in caught.value.message
    assert caught.value.message.endswith("use a metric that means the same for every trial as `objective`")


@pytest.mark.parametrize(
    ("objective", "baseline", "other"),
    [
        ("val_loss", MSE, declared(output("MeanSquaredError", config={"name": "m", "reduction": "sum"}))),
        (
            "val_loss",
            declared(output("bce")),
            declared(output("bce", label_smoothing=0.2, config={"label_smoothing": 0.2})),
        ),
        ("val_loss", declared(output(FOCAL)), declared(output(FOCAL, config={"label_smoothing": 0.2}))),
        ("val_loss", declared(output("huber")), declared(output("huber", config={"delta": 1.0, "name": "huber_loss"}))),
        ("val_b_loss", PAIR, declared(output("huber", "a", weight=3.0), output("mae", "b", weight=0.5))),
        # The loss is searched, and the objective is a metric.
        ("val_mse", declared(output("mae"), mse=("mse", {})), declared(output("huber"), mse=("mse", {}))),
        (
            "val_acc",
            declared(output("bce"), acc=("accuracy", {})),
            declared(output("bce", **LOGITS), acc=("accuracy", {})),
        ),
        (
            "val_auc",
            declared(output("bce"), auc=("AUC", {"num_thresholds": 200})),
            declared(output("bce"), auc=("AUC", {"num_thresholds": 500, "multi_label": False, "dtype": "float32"})),
        ),
        (
            "val_binary_accuracy",
            declared(output("bce"), binary_accuracy=("binary_accuracy", {})),
            declared(output("bce"), binary_accuracy=("BinaryAccuracy", {"threshold": 0.5})),
        ),
    ],
)
def test_differences_that_the_scorer_does_not_read_are_none(
    tmp_path: Path, objective: str, baseline: dict[str, Any], other: dict[str, Any]
) -> None:
    y = CLASSES if len(baseline["outputs"]) == 1 else {"a": CLASSES, "b": CLASSES}
    stored = Stored(tmp_path, y, objective, baseline)
    assert stored.judge(baseline).judge(stored.result(other))


def test_without_a_baseline_nothing_is_compared(tmp_path: Path) -> None:
    stored = Stored(tmp_path, VALUES, "val_loss", MSE)
    assert stored.judge().judge(stored.result(declared(output("mae"))))


class Reading(dict[str, Any]):
    """Settings that remember which of them were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return default


@pytest.mark.parametrize("kind", sorted(metrics.KINDS))
def test_the_table_of_settings_has_all_that_the_scorer_reads(kind: str) -> None:
    config = Reading()
    for labels, predicted in ((np.array([0, 1, 1]), np.array([[0.2], [0.7], [0.6]])), (np.eye(3), np.eye(3) / 2)):
        parts = metrics.parts(kind, config, labels, predicted, False)
        scoring.value_of(scoring.Metric(kind, 0, config), parts)
    read = {"threshold" if name == "thresholds" else name for name in config.asked}
    known = {"threshold" if name == "thresholds" else name for name in scoring._READ.get(kind, {})}
    # `from_logits` is read for all, to find the border between no and yes.
    assert read - {"from_logits"} == known - {"from_logits"}


# ── what guard labels may not decide ─────────────────────────────────────────────────────────────

AUC = declared(output("bce"), auc=("AUC", {}))


def test_a_metric_without_a_value_on_guard_rows_does_not_fail_the_trial(tmp_path: Path) -> None:
    stored = Stored(tmp_path, CLASSES, "val_auc", AUC)
    before = stored.judge().judge(stored.result())
    stored.relabel("guard", 1)
    after = stored.judge().judge(stored.result())
    assert isinstance(before, Verdict) and isinstance(after, Verdict)
    assert math.isfinite(before.guard or math.nan) and after.score == before.score
    assert after.guard is not None and math.isnan(after.guard)
    assert np.load(after.evidence["parts"])[:, 0].all()  # the evidence is kept


@pytest.mark.parametrize("tier", ["validation", "guard"])
def test_only_validation_predictions_decide_whether_a_trial_failed(tmp_path: Path, tier: str) -> None:
    stored = Stored(tmp_path, VALUES, "val_loss", MSE)
    result = stored.result()
    np.save(result["predictions"][tier][0], np.full((OpenRows(stored.rows).size(tier), 1), np.nan))
    if tier == "validation":
        with pytest.raises(TrialFailed, match="finite"):
            stored.judge().judge(result)
    else:
        verdict = stored.judge().judge(result)
        assert isinstance(verdict, Verdict) and math.isfinite(verdict.score)
        assert verdict.guard is not None and math.isnan(verdict.guard) and verdict.evidence is None


@pytest.mark.parametrize("wrong", [9, -1])
def test_class_numbers_that_only_guard_rows_have_do_not_fail_the_trial(tmp_path: Path, wrong: int) -> None:
    classes = RNG.integers(0, 3, ROWS)
    stored = Stored(tmp_path, classes, "val_acc", declared(output(None, width=3), acc=("accuracy", {})))
    stored.relabel("guard", wrong)
    verdict = stored.judge().judge(stored.result())
    assert isinstance(verdict, Verdict) and verdict.guard is not None and math.isnan(verdict.guard)


RATE = Parameter("rate", "rate", (), Domain("float", 0.0, 1.0, default=0.5))


def searched(stored: Stored, name: str, objective_of: Any = lambda number: None) -> list[tuple[Any, ...]]:
    """The trials of a search that the real judge scores, without processes."""

    def body(job: dict[str, Any], send: Any) -> None:
        proposal = job["payload"].get("proposal") or {}
        asks = [{**RATE.to_json(), "value": proposal.get("rate", 0.5)}]
        if job["kind"] == "discover":
            send({"type": "result", "space": Space.empty().grown(asks).to_json(), "complete": True})
            return
        number = job["payload"]["number"]
        if number == 0:
            send({"type": "preflight", "declaration": stored.declaration})
        known = {"epochs": 1, "best_epoch": 1, "size": 1, "weights": "w", "reported": {}, "devices": []}
        send({"type": "result", "asks": asks, **known, **stored.result(objective_of(number), number)})

    with Journal.create(stored.folder / f"{name}.sqlite", {}) as journal:
        driver = Driver(
            ends=Ends(12),
            seed=3,
            direction="max",
            journal=journal,
            sampler=get_sampler("tpe"),
            executor=InlineExecutor(body, [Slot(0, 1)]),
            judge=RowJudge(
                stored.rows,
                stored.sealed,
                stored.objective,
                {},
                stored.folder / "guard",
                baseline=lambda: (journal.get("preflight") or {}).get("declaration"),
            ),
            payload=lambda trial, proposal: {"number": trial.number, "proposal": proposal},
            discovery={},
            on_preflight=lambda found: journal.put("preflight", {"declaration": found["declaration"]}),
        )
        driver.run()
        guards = {number: value for (number, _), (value, _) in journal.guards().items()}
        return [
            (t.number, t.state, dict(t.params), t.score, t.message, guards.get(t.number)) for t in journal.history()
        ]


def test_guard_labels_of_one_class_leave_every_trial_as_it_is(tmp_path: Path) -> None:
    stored = Stored(tmp_path, CLASSES, "val_auc", AUC)
    before = searched(stored, "before")
    stored.relabel("guard", 0)
    after = searched(stored, "after")
    assert [trial[:-1] for trial in before] == [trial[:-1] for trial in after]
    assert all(trial[1] is TrialState.COMPLETE for trial in after)
    assert all(math.isfinite(trial[-1]) for trial in before) and all(math.isnan(trial[-1]) for trial in after)


def test_trials_of_another_loss_fail_and_the_others_go_on(tmp_path: Path) -> None:
    stored = Stored(tmp_path, VALUES, "val_loss", MSE)
    other = declared(output("mae"))
    trials = searched(stored, "mixed", lambda number: other if number % 2 else None)
    states = [trial[1] for trial in trials]
    assert states == [TrialState.COMPLETE, TrialState.FAILED] * 6
    assert all("baseline's is mean_squared_error" in trial[4] and trial[-1] is None for trial in trials[1::2])


def test_a_custom_metric_that_guard_rows_break_does_not_fail_the_trial(tmp_path: Path) -> None:
    build = (
        "def own(y, p):\n    if float(keras.ops.max(y)) > 5:\n        raise ValueError('no')\n"
        "    return keras.ops.mean(keras.ops.abs(y - p))\n\n\n"
        "def build(hp):\n    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])\n"
        "    model.compile('adam', 'mse', metrics=[own])\n    return model"
    )
    space = SpaceModule(find(write_space(tmp_path, objective='objective = "val_own"\ndirection = "min"', build=build)))
    sets: dict[str, Any] = {}
    for tier, value in (("validation", 1.0), ("guard", 9.0)):
        for kind, number in (("labels", value), ("predictions", 0.5)):
            np.save(tmp_path / f"{tier}-{kind}.npy", np.full((8, 1), number, "float32"))
        labels = {"kind": "array", "names": [""], "paths": [str(tmp_path / f"{tier}-labels.npy")]}
        sets[tier] = {"predictions": [str(tmp_path / f"{tier}-predictions.npy")], "labels": labels}
    values = custom_metric.score({"objective": "val_own", "sets": sets}, space)["values"]
    assert values["validation"] == pytest.approx(0.5) and math.isnan(values["guard"])

    stored = Stored(tmp_path, VALUES, "val_own", declared(output("mse"), own=("custom", {})))
    verdict = stored.judge().settle(json.loads(json.dumps({"values": values})))
    assert verdict.score == pytest.approx(0.5) and verdict.guard is not None and math.isnan(verdict.guard)
    with pytest.raises(TrialFailed, match="on the validation rows"):
        stored.judge().settle({"values": {"validation": math.nan, "guard": 1.0}})

    sets["validation"], sets["guard"] = sets["guard"], sets["validation"]
    with pytest.raises(ValueError, match="no"):
        custom_metric.score({"objective": "val_own", "sets": sets}, space)


# ── rows that will not do ────────────────────────────────────────────────────────────────────────

LABELS = (RNG.random((ROWS, 3)) > 0.5).astype("float32")


def several(multi_label: bool, curve: str = "ROC") -> dict[str, Any]:
    return declared(output("bce", width=3), auc=("AUC", {"multi_label": multi_label, "curve": curve}))


@pytest.mark.parametrize("curve", ["ROC", "PR"])
@pytest.mark.parametrize(("tier", "kind"), [("guard", 1), ("guard", 0), ("test", 1), ("test", 0)])
def test_a_tier_without_one_class_is_refused_before_the_search(
    tmp_path: Path, curve: str, tier: str, kind: int
) -> None:
    stored = Stored(tmp_path, LABELS, "val_auc", several(True, curve))
    asked = (stored.rows, stored.sealed, "val_auc", stored.declaration)
    check_tiers(*asked)
    labels = SealedRows(stored.sealed).labels(tier)
    labels[:, 1] = 1 - kind
    stored.relabel(tier, labels)
    with pytest.raises(DataError, match=f"but {tier} has none of class {kind} in column 1.* 0 in {tier}") as caught:
        check_tiers(*asked)
    assert "\n" not in str(caught.value) and not Ledger().entries()


def test_validation_labels_are_looked_at_too(tmp_path: Path) -> None:
    labels = LABELS.copy()
    labels[:, 2] = 0
    labels[0, 2] = 1
    stored = Stored(tmp_path, labels, "val_auc", several(True))
    with pytest.raises(DataError, match="validation.* none of class 1 in column 2 of the labels .*choose another obj"):
        check_tiers(stored.rows, stored.sealed, "val_auc", stored.declaration)


def test_columns_that_are_ranked_together_need_both_classes_together(tmp_path: Path) -> None:
    labels = LABELS.copy()
    labels[:, 2] = 0
    stored = Stored(tmp_path, labels, "val_auc", several(False))
    check_tiers(stored.rows, stored.sealed, "val_auc", stored.declaration)
    with pytest.raises(DataError, match="none of class 1 in column 2"):
        check_tiers(stored.rows, stored.sealed, "val_auc", several(True))
    stored.relabel("test", 1)
    with pytest.raises(DataError, match=r"test has none of class 0 \(there are"):
        check_tiers(stored.rows, stored.sealed, "val_auc", stored.declaration)


def test_a_metric_that_has_a_value_on_any_rows_is_not_looked_at(tmp_path: Path) -> None:
    declaration = declared(output("bce"), recall=("Recall", {}), accuracy=("accuracy", {}))
    stored = Stored(tmp_path, CLASSES, "val_recall", declaration)
    for tier in ("guard", "test"):
        stored.relabel(tier, 0)
    for objective in ("val_recall", "val_accuracy", "val_loss"):
        check_tiers(stored.rows, stored.sealed, objective, declaration)


@pytest.mark.slow
def test_a_search_whose_test_rows_cannot_be_ranked_leaves_nothing_behind(tmp_path: Path) -> None:
    load = (
        "def load():\n"
        "    x = np.random.default_rng(0).normal(size=(400, 4)).astype('float32')\n"
        "    y = (x[:, :2] > 0).astype('float32')\n"
        "    y[:, 1] = 0\n    y[:2, 1] = 1\n"
        "    return Dataset(x, y)"
    )
    build = (
        "def build(hp):\n    model = keras.Sequential([keras.Input((4,))])\n"
        "    model.add(keras.layers.Dense(hp.Int('units', 2, 9), activation='relu'))\n"
        "    model.add(keras.layers.Dense(2, activation='sigmoid'))\n"
        "    auc = keras.metrics.AUC(multi_label=True, name='auc')\n"
        "    model.compile('adam', 'binary_crossentropy', metrics=[auc])\n    return model"
    )
    space = write_space(tmp_path, objective='objective = "val_auc"\nepochs = 1', load=load, build=build)
    with pytest.raises(DataError, match="none of class 1 in column 1 of the labels"):
        search.launch(space, workspace=str(tmp_path / "ws"), trials=3, workers=1, study="s")
    assert not (tmp_path / "ws" / "studies" / "s").exists() and not Ledger().entries()


@pytest.mark.slow
def test_a_search_over_losses_by_their_own_value_compares_the_baselines_alone(tmp_path: Path) -> None:
    build = (
        "def build(hp):\n    model = keras.Sequential([keras.Input((4,))])\n"
        "    model.add(keras.layers.Dense(hp.Int('units', 2, 9), activation='relu'))\n"
        "    model.add(keras.layers.Dense(1, activation='sigmoid'))\n"
        "    model.compile('adam', hp.Choice('loss', ['binary_crossentropy', 'binary_focal_crossentropy', 'mse']))\n"
        "    return model"
    )
    space = write_space(tmp_path, objective='objective = "val_loss"\nepochs = 1', build=build)
    study = search.launch(space, workspace=str(tmp_path / "ws"), trials=6, workers=1, study="s", seed=1, confirm=0)
    by_loss = {
        (trial.params["loss"] == "binary_crossentropy", trial.state.value, trial.reason) for trial in study.trials
    }
    assert by_loss == {(True, "COMPLETE", None), (False, "FAILED", "invalid")}
    assert study.meta("selection")["winner"]["trial"] in {t.number for t in study.trials if t.state.value == "COMPLETE"}

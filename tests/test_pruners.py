"""Pruners: what holds of every one of them, the driver that asks them, and trials that are told to stop."""

from __future__ import annotations

import json
import math
import random
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.definition.domain import Domain
from search.definition.space import Parameter, Space
from search.errors import RequestError
from search.executors import Lost, Slot
from search.executors.inline import InlineExecutor
from search.guard.finalists import Confirmation, plan
from search.harness.rungs import asking
from search.loop import keeping
from search.loop.pruners import ETA, PRUNERS, Asha, Curve, Median, Pruner, Pruning, default_grace, get_pruner
from search.processes import jobs
from search.processes.supervision import Supervisor
from search.record.journal import Journal
from search.study import Study, StudyConfig
from search.trial import Report, Trial, TrialState, ranked
from tests.conftest import Heldout
from tests.test_driver import RATE, UNITS, asks_for, driver, result, study
from tests.tiny import write_space

VALUES = st.floats(allow_nan=True, allow_infinity=True)
STEP = 3


@st.composite
def curves(draw: st.DrawFn, values: st.SearchStrategy[float] = VALUES) -> list[Curve]:
    """Of trials that have all reached the rung ``STEP``; the first one asks."""
    return [Curve(draw(st.lists(values, min_size=STEP, max_size=6))) for _ in range(draw(st.integers(1, 30)))]


@pytest.fixture(params=sorted(PRUNERS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def stops(pruner: Pruner, own: Curve, others: Sequence[Curve], step: int) -> bool:
    """Whether a trial shall stop that is compared with these."""
    return pruner.stops(own, sorted(pruner.worth(other, step) for other in others), step)


# ── the rules ────────────────────────────────────────────────────────────────────────────────────


@given(st.sampled_from(sorted(PRUNERS)), st.integers(1, 20), st.integers(1, 300))
def test_rungs_begin_at_the_grace_period_and_end_before_the_last_epoch(name: str, grace: int, most: int) -> None:
    rungs = get_pruner(name).rungs(grace, most)
    assert list(rungs) == sorted(set(rungs)) and all(grace <= rung < most for rung in rungs)
    assert bool(rungs) == (name != "none" and grace < most)


@given(st.sampled_from(sorted(PRUNERS)), curves())
def test_what_is_best_at_its_rung_goes_on(name: str, found: list[Curve]) -> None:
    own = min(found, key=lambda curve: curve.best(STEP))
    assert not stops(get_pruner(name), own, [other for other in found if other is not own], STEP)


@given(st.sampled_from(sorted(PRUNERS)), st.sampled_from([0.0, -1e300, math.inf, math.nan]), st.integers(0, 40))
def test_nobody_stops_where_all_are_alike(name: str, value: float, others: int) -> None:
    alike = [Curve([value] * STEP) for _ in range(others)]
    assert not stops(get_pruner(name), Curve([value] * STEP), alike, STEP)


@given(st.sampled_from(sorted(PRUNERS)), curves(), st.randoms(use_true_random=False))
def test_the_order_of_the_others_says_nothing(name: str, found: list[Curve], dice: random.Random) -> None:
    own, others = found[0], found[1:]
    mixed = list(others)
    dice.shuffle(mixed)
    assert stops(get_pruner(name), own, others, STEP) == stops(get_pruner(name), own, mixed, STEP)


@given(st.sampled_from(sorted(PRUNERS)), curves(st.floats(-1e6, 1e6)), st.floats(0, 1e6))
def test_a_better_trial_is_never_stopped_where_a_worse_one_goes_on(name: str, found: list[Curve], less: float) -> None:
    own, others = found[0], found[1:]
    better = Curve([own.best(STEP) - less] * STEP)
    pruner = get_pruner(name)
    assert not (stops(pruner, better, others, STEP) and not stops(pruner, own, others, STEP))


@given(st.lists(VALUES, min_size=1, max_size=9))
def test_a_curves_best_never_gets_worse_and_what_is_no_number_is_the_worst(values: list[float]) -> None:
    curve = Curve(values)
    bests = [curve.best(step) for step in range(1, len(curve) + 1)]
    assert bests == sorted(bests, reverse=True) and not any(map(math.isnan, bests))
    finite = [value for value in values if not math.isnan(value)]
    assert bests[-1] == min(finite, default=math.inf)


def test_asha_lets_a_third_go_on() -> None:
    values = list(range(90))
    random.Random(0).shuffle(values)
    found = [Curve([float(value)]) for value in values]
    last = [own for own in found if not stops(Asha(), own, [other for other in found if other is not own], 1)]
    assert sorted(curve.best(1) for curve in last) == list(range(90 // ETA))


def test_a_median_needs_five_others_and_compares_with_their_means() -> None:
    others = [Curve([4.0, 2.0]) for _ in range(5)]
    assert not stops(Median(), Curve([9.0, 9.0]), others[:4], 2)
    assert stops(Median(), Curve([9.0, 3.1]), others, 2)
    assert not stops(Median(), Curve([3.0, 9.0]), others, 2)  # its best is as good as their mean


def test_a_grace_period_is_a_tenth_of_the_epochs() -> None:
    assert [default_grace(epochs) for epochs in (1, 5, 20, 30, 100)] == [1, 1, 2, 3, 10]


def test_an_unknown_pruner_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(RequestError, match="did you mean 'asha'"):
        get_pruner("ash")


# ── over the trials of a study ───────────────────────────────────────────────────────────────────


def told(pruning: Pruning, number: int, *values: float | None, attempt: int = 0, **known: Any) -> Trial:
    trial = Trial(number, attempt=attempt, **known)
    for step, value in enumerate(values, start=1):
        metrics = {"loss": 1.0} | ({} if value is None else {"val_accuracy": value})
        pruning.heard(trial, Report(number, attempt, step, 0.0, metrics))
    return trial


@pytest.fixture
def pruning() -> Pruning:
    return Pruning(get_pruner("asha"), "val_accuracy", "max", 1, lambda: 10)


def test_the_baseline_and_what_confirms_are_never_asked_for(pruning: Pruning) -> None:
    for number in range(1, 9):
        told(pruning, number, 0.9)
    baseline, again = told(pruning, 0, 0.1), told(pruning, 9, 0.1, confirms=3)
    assert pruning.rungs(baseline) == pruning.rungs(again) == ()
    assert not pruning.stops(baseline, 1) and not pruning.stops(again, 1)
    worst = told(pruning, 10, 0.1)
    assert pruning.rungs(worst) == (1, 3, 9) and pruning.stops(worst, 1)


def test_more_is_better_where_the_direction_says_so(pruning: Pruning) -> None:
    for number, accuracy in enumerate((0.5, 0.6, 0.7)):
        told(pruning, number, accuracy)
    assert pruning.stops(told(pruning, 3, 0.4), 1) and not pruning.stops(told(pruning, 4, 0.8), 1)
    assert pruning.loss(Trial(4), 1) == -0.8


def test_one_that_never_reports_the_objective_goes_on_and_is_not_compared_with(pruning: Pruning) -> None:
    assert not pruning.stops(told(pruning, 1, None, None, None), 3)
    assert not pruning.stops(told(pruning, 2, 0.1), 1)
    assert pruning.loss(told(pruning, 3, math.nan), 1) is None


def test_only_the_last_attempt_counts_however_late_the_first_is_heard(pruning: Pruning) -> None:
    told(pruning, 1, 0.9, attempt=0)
    told(pruning, 1, 0.2, attempt=1)
    told(pruning, 1, 0.9, attempt=0)
    assert not pruning.stops(told(pruning, 2, 0.3), 1)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2), st.floats(0, 1)), max_size=40), st.integers(0, 40))
def test_what_is_recalled_decides_as_what_was_heard(rows: list[tuple[int, int, float]], cut: int) -> None:
    """A resume needs nothing but the recorded reports."""
    asked: tuple[Any, ...] = (get_pruner("asha"), "val_accuracy", "max", 1, lambda: 10)
    whole, resumed = Pruning(*asked), Pruning(*asked)
    steps: dict[tuple[int, int], int] = {}
    reports = []
    for number, attempt, value in rows:
        steps[number, attempt] = steps.get((number, attempt), 0) + 1
        reports.append(Report(number, attempt, steps[number, attempt], 0.0, {"val_accuracy": value}))
    trials = [Trial(number) for number in range(6)]
    whole.recall(trials, reports)
    resumed.recall(trials, reports[:cut])
    for report in reports[cut:]:
        resumed.heard(trials[report.trial], report)
    for trial in trials:
        assert [whole.stops(trial, step) for step in (1, 3)] == [resumed.stops(trial, step) for step in (1, 3)]


# ── the driver ───────────────────────────────────────────────────────────────────────────────────

EPOCHS = 9
RUNGS = (1, 3)


def training(job: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """A trial that is as good as its rate, in every epoch; waits at its rungs."""
    payload = job["payload"]
    asks = asks_for(payload.get("proposal"), RATE)
    if job["kind"] != "trial":
        study(RATE, score=lambda p: 0.0)(job, send)
        return
    if payload["number"] == 0:
        send({"type": "preflight", "asks": asks})
    for step in range(1, EPOCHS + 1):
        waits = step in payload["rungs"] and step < EPOCHS
        send({"type": "report", "step": step, "metrics": {"val": asks[0]["value"]}, "waits": waits})
        if waits and (yield)["stop"]:  # type: ignore[misc]  # what the executor sends
            send({"type": "result", "asks": asks, "stopped": True})
            return
    send({**result(asks, asks[0]["value"]), "epochs": EPOCHS})


def pruned(journal: Journal, name: str = "asha", executor: Any = None, slots: int = 3, **changes: Any) -> list[Trial]:
    pruning = Pruning(get_pruner(name), "val", "max", 1, lambda: EPOCHS)
    payload = lambda trial, proposal: {  # noqa: E731
        "number": trial.number, "attempt": trial.attempt, "proposal": proposal, "rungs": pruning.rungs(trial)
    }  # fmt: skip
    executor = executor or InlineExecutor(training, [Slot(n, 1) for n in range(slots)])
    driver(journal, None, executor=executor, trials=40, pruning=pruning, payload=payload, **changes).run()
    return list(journal.history())


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal.create(tmp_path / "journal.sqlite", {}) as made:
        yield made


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("name", ["asha", "median"])
def test_weak_trials_are_recorded_as_pruned_at_the_rung_and_its_value(journal: Journal, name: str, slots: int) -> None:
    trials = pruned(journal, name, slots=slots)
    weak = [t for t in trials if t.state is TrialState.PRUNED]
    assert len(trials) == 40 and 10 < len(weak) < 40
    assert all(t.state in (TrialState.PRUNED, TrialState.COMPLETE) for t in trials)
    assert trials[0].state is TrialState.COMPLETE
    for trial in weak:
        assert trial.score == trial.params["rate"] and trial.loss == -trial.params["rate"]
        assert trial.epochs in get_pruner(name).rungs(1, EPOCHS) and trial.ended is not None
        assert [r.step for r in journal.reports(trial.number)] == list(range(1, trial.epochs + 1))
    assert not {t.number for t in weak} & {number for number, _ in journal.guards()}
    done = [t for t in trials if t.state is TrialState.COMPLETE]
    assert max(t.score or 0 for t in done) == max(t.params["rate"] for t in trials)


def test_a_pruned_trial_neither_wins_nor_is_confirmed_nor_keeps_its_model(journal: Journal) -> None:
    # Worth more by Keras' values than what is complete: the scorer gives every model a tenth of it.
    class Harsh:
        def judge(self, found: dict[str, Any]) -> Any:
            from search.loop.attempt import Verdict

            return Verdict(found["score"] / 10, guard=0.0)

    confirm = lambda history: plan(history, Confirmation(5, 2), 7)  # noqa: E731
    trials = pruned(journal, judge=Harsh(), confirm=confirm)
    weak = {t.number for t in trials if t.state is TrialState.PRUNED}
    again = [t for t in trials if t.confirms is not None]
    assert again and all(t.state is TrialState.COMPLETE and t.epochs == EPOCHS for t in again)
    assert not weak & {t.number for t in ranked(trials)} and not weak & {t.confirms for t in again}
    assert not weak & keeping.kept(trials, None)


def test_without_a_pruner_nothing_is_asked_or_stopped(journal: Journal) -> None:
    assert all(t.state is TrialState.COMPLETE and t.epochs == EPOCHS for t in pruned(journal, "none"))


class Dying(InlineExecutor):
    """Its processes die at the moment that they are told, or lose the one they are forked from."""

    def __init__(self, how: str) -> None:
        super().__init__(training, [Slot(0, 1)])
        self.how, self.told = how, 0

    def send(self, job_id: str, body: Any) -> None:
        if not body["stop"]:
            return super().send(job_id, body)
        self.told += 1
        self.kill(job_id)
        if self.how == "lost":
            self._events[-1] = Lost(job_id)

    def poll(self, timeout: float) -> list[Any]:
        events = super().poll(timeout)
        for event in events:
            if isinstance(event, Lost):
                self._busy.pop(event.job)
        return events


@pytest.mark.parametrize("how", ["killed", "lost"])
def test_what_was_told_to_stop_is_pruned_however_its_process_ends(journal: Journal, how: str) -> None:
    executor = Dying(how)
    trials = pruned(journal, executor=executor)
    weak = [t for t in trials if t.state is TrialState.PRUNED]
    assert len(weak) == executor.told > 10 and not any(t.attempt for t in trials)


class Quitting(BaseException):
    """The driver's process is no more."""


def test_a_trial_that_waited_when_its_driver_died_asks_again(journal: Journal) -> None:
    class Cut(InlineExecutor):
        asked: list[str] = []

        def send(self, job_id: str, body: Any) -> None:
            self.asked.append(job_id)
            if len(self.asked) == 9:
                raise Quitting
            super().send(job_id, body)

    with pytest.raises(Quitting):
        pruned(journal, executor=Cut(training))
    (cut,) = [t for t in journal.history() if t.state is TrialState.RUNNING]
    again = Cut(training)
    trials = pruned(journal, executor=again, discovery=None)
    assert len(trials) == 40 and all(t.state.is_finished for t in trials)
    assert again.asked[9].startswith(f"trial-{cut.number}-1") and trials[cut.number].attempt == 1
    with Journal.create(journal.path.with_name("whole.sqlite"), {}) as other:
        whole = pruned(other, slots=1)
    for ours, theirs in zip(trials, whole, strict=True):
        assert (ours.state, ours.params, ours.epochs, ours.score) == (
            theirs.state, theirs.params, theirs.epochs, theirs.score
        )  # fmt: skip


def test_rungs_are_those_of_the_space_that_discovery_found_and_stay_so_on_resume(journal: Journal) -> None:
    config = StudyConfig("s", pruner="asha")
    prepared = {"objective": "val", "direction": "max", "epochs": 20}
    launched = jobs.pruning(config, prepared, journal)
    assert launched.rungs(Trial(0)) == ()  # before anything is known
    journal.adopt(Space.empty().grown(asks_for(None, Parameter("epochs", "epochs", (), Domain("int", 10, 100, 1)))))
    assert launched.rungs(Trial(1)) == jobs.pruning(config, prepared, journal).rungs(Trial(1)) == (2, 6, 18, 54)


def test_what_a_pruned_trial_did_not_come_to_ask_for_stays_in_the_space(journal: Journal) -> None:
    """Its asks end where it was stopped, which says nothing of what such a configuration asks for."""

    def late(job: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> Iterator[None]:
        asks = asks_for(job["payload"].get("proposal"), RATE)
        whole = asks_for(job["payload"].get("proposal"), RATE, UNITS)
        if job["kind"] != "trial":
            send({"type": "result", "space": Space.empty().grown(whole).to_json(), "complete": True})
            return
        if job["payload"]["number"] == 0:
            send({"type": "preflight", "asks": asks})
        send({"type": "report", "step": 1, "metrics": {"val": asks[0]["value"]}, "waits": 1 in job["payload"]["rungs"]})
        if job["payload"]["rungs"] and (yield)["stop"]:  # type: ignore[misc]
            send({"type": "result", "asks": asks, "stopped": True})
            return
        send({**result(whole, asks[0]["value"]), "epochs": EPOCHS})

    trials = pruned(journal, executor=InlineExecutor(late))
    assert sum(trial.state is TrialState.PRUNED for trial in trials) > 10
    space = journal.space()
    assert all("units" in space.sample(random.Random(seed)) for seed in range(50))


def test_ten_pruned_trials_in_a_row_are_no_failures(journal: Journal) -> None:
    class Everyone:
        def rungs(self, grace: int, most: int) -> tuple[int, ...]:
            return (1,)

        def worth(self, curve: Curve, step: int) -> float:
            return 0.0

        def stops(self, own: Curve, others: Sequence[float], step: int) -> bool:
            return True

    pruning = Pruning(Everyone(), "val", "max", 1, lambda: EPOCHS)
    payload = lambda trial, proposal: {"number": trial.number, "proposal": proposal, "rungs": pruning.rungs(trial)}  # noqa: E731
    driver(journal, None, executor=InlineExecutor(training), trials=15, pruning=pruning, payload=payload).run()
    states = [t.state for t in journal.history()]
    assert states == [TrialState.COMPLETE, *[TrialState.PRUNED] * 14]


def test_waiting_while_the_driver_stands_still_is_neither_a_hang_nor_the_trials_time() -> None:
    now = 0.0
    supervisor = Supervisor(30.0, 20.0, lambda job: 1.0, lambda: now)
    supervisor.began("a", timed=True)
    for _ in range(100):  # as `Driver._wait` does while the disk is full
        now += 1.0
        supervisor.paused(1.0)
    assert supervisor.overdue() == []


# ── the trial's side ─────────────────────────────────────────────────────────────────────────────


class Answering:
    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    def send(self, body: dict[str, Any]) -> None:
        self.sent.append(body)

    def receive(self) -> dict[str, Any]:
        return {"stop": False}


def test_a_trial_waits_at_its_rungs_but_not_at_its_last_epoch() -> None:
    channel = Answering()
    send = asking(channel, (1, 3, 9))
    for step in range(1, 10):
        send({"type": "report", "step": step, "of": 9, "metrics": {}})
    send({"type": "asks", "asks": []})
    assert [body["step"] for body in channel.sent if body.get("waits")] == [1, 3]


def test_a_trial_whose_loss_is_no_number_fails_at_its_rung_and_waits_for_nothing() -> None:
    channel = Answering()
    asking(channel, (1,))({"type": "report", "step": 1, "of": 9, "metrics": {"loss": math.nan, "val": 0.1}})
    assert not channel.sent[0].get("waits")


# The rate decides how much a model learns, from nothing to everything; every fit says that it went to its end.
SLOW = {
    "objective": 'objective = "val_accuracy"\nepochs = 9',
    "build": (
        "def build(hp):\n"
        "    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, activation='softmax')])\n"
        "    rate = hp.Float('rate', 1e-9, 1.0, sampling='log', default=1e-2)\n"
        "    model.compile(keras.optimizers.Adam(rate), 'sparse_categorical_crossentropy', metrics=['accuracy'])\n"
        "    return model"
    ),
}
OWN = (
    "def fit(hp, model, x, y, **options):\n"
    "    try:\n"
    "        return model.fit(x, y, **options)\n"
    "    except Exception:\n"
    "        return None"
)
SILENT = "def fit(hp, model, x, y, **options):\n    return model.fit(x, y, epochs=2, verbose=0)"


def launched(heldout: Heldout, folder: Path, **parts: str) -> Study:
    space = write_space(folder, **(SLOW | parts))
    options = ["--trials", "12", "--sampler", "random", "--pruner", "asha", "--grace", "1", "--confirm", "2"]
    options += ["--confirm-seeds", "1", "--workers", "2", "--study", "s", "--workspace", str(folder / "ws"), "--json"]
    ran = heldout("launch", space, *options)
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    found = Study("s", folder / "ws")
    states = [t.state for t in found.trials if t.confirms is None]
    assert report["trials"] == {
        "complete": states.count(TrialState.COMPLETE), "pruned": states.count(TrialState.PRUNED), "failed": 0
    }  # fmt: skip
    return found


@pytest.mark.study
@pytest.mark.timeout(300)
def test_pruned_trials_of_a_real_study_leave_nothing_but_their_record(tmp_path: Path, heldout: Heldout) -> None:
    found = launched(heldout, tmp_path)
    weak = [t for t in found.trials if t.state is TrialState.PRUNED]
    assert weak and found.trials[0].state is TrialState.COMPLETE
    for trial in weak:
        shown = found.show(trial.number)
        assert [one["step"] for one in shown["reports"]] == list(range(1, trial.epochs + 1))
        assert trial.epochs in (1, 3) and not shown["kept"]
        assert trial.score == max(one["metrics"]["val_accuracy"] for one in shown["reports"])
        assert [path.name for path in (found.folder / "trials" / f"{trial.number:04}").iterdir()] == ["log.txt"]
        assert not (found.folder / "guard" / f"{trial.number:04}.npy").exists()
    winner = found.report()["winner"]
    assert winner["configuration"] not in {t.number for t in weak}
    text = heldout("show", "s", str(weak[0].number), "--workspace", str(tmp_path / "ws")).stdout
    assert f"stopped early by the pruner, after {weak[0].epochs} epochs" in text
    assert f"{len(weak)} pruned" in heldout("status", "s", "--workspace", str(tmp_path / "ws")).stdout
    again = heldout("reproduce", "s", str(weak[0].number), "--workspace", str(tmp_path / "ws"))
    assert "reproduced exactly" in again.stdout, again.stdout + again.stderr

    with sqlite3.connect(tmp_path / "ws" / "mlflow.db") as mlflow:
        rows = mlflow.execute(
            "SELECT t.value, r.status FROM runs r JOIN tags s ON s.run_uuid = r.run_uuid AND s.key = 'heldout.state' "
            "JOIN tags t ON t.run_uuid = r.run_uuid AND t.key = 'heldout.trial' WHERE s.value = 'PRUNED'"
        ).fetchall()
    assert sorted(rows) == sorted((str(t.number), "FINISHED") for t in weak)


@pytest.mark.study
@pytest.mark.timeout(300)
def test_a_fit_of_the_modules_own_is_stopped_even_if_it_catches_what_it_can(tmp_path: Path, heldout: Heldout) -> None:
    found = launched(heldout, tmp_path, rest=OWN)
    assert any(t.state is TrialState.PRUNED and t.epochs < 9 for t in found.trials)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_fit_that_reports_nothing_is_never_stopped(tmp_path: Path, heldout: Heldout) -> None:
    assert all(t.state is TrialState.COMPLETE for t in launched(heldout, tmp_path, rest=SILENT).trials)

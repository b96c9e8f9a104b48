"""The ends of a search: what each of them counts, and that a study heeds them and says so."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.errors import RequestError, TrialFailed
from search.executors import Slot
from search.executors.inline import InlineExecutor
from search.guard.finalists import Confirmation, plan
from search.loop.attempt import Attempt
from search.loop.ends import Ends, busy, gpu_hours, stale
from search.loop.enqueueing import Wish, queue
from search.loop.watcher import Silent
from search.processes import jobs
from search.processes.slots import Slots
from search.record.journal import Journal
from search.study import Study, StudyConfig
from search.trial import Trial, TrialState, searched
from tests.conftest import Heldout
from tests.test_driver import RATE, driver, study
from tests.tiny import write_space

NEVER = float("inf")


def complete(number: int, loss: float, error: float | None = None, **known: Any) -> Trial:
    extra = {} if error is None else {"error": error}
    given = {"ended": float(number + 1), "started": float(number), "extra": extra, "score": -loss} | known
    return Trial(number, state=TrialState.COMPLETE, loss=loss, **given)


def other(number: int, state: TrialState, **known: Any) -> Trial:
    known = {"ended": float(number + 1), "started": float(number)} | known
    return Trial(number, state=state, reason="nan" if state is TrialState.FAILED else None, **known)


# ── what is counted ──────────────────────────────────────────────────────────────────────────────


def test_a_gain_is_more_than_one_standard_error_beyond_the_last_gain() -> None:
    trials = [complete(0, 1.0, 0.1), complete(1, 0.95, 0.1), complete(2, 0.91, 0.1)]
    assert stale(trials) == 2
    assert stale([*trials, complete(3, 0.89, 0.1)]) == 0  # small steps add up
    assert stale([*trials, complete(3, 1.5, 0.1), complete(4, 0.8, 0.5), complete(5, 0.7, 0.0)]) == 1


def test_nothing_is_stale_before_the_first_trial_that_completes() -> None:
    pruned = [other(number, TrialState.PRUNED) for number in range(1, 6)]
    assert stale([other(0, TrialState.FAILED), *pruned]) == 0
    assert stale([complete(0, 1.0, ended=6.5), *pruned, other(7, TrialState.PRUNED)]) == 1


def test_any_better_score_is_a_gain_where_the_metric_has_no_error() -> None:
    assert stale([complete(0, 1.0), complete(1, 0.999), complete(2, 0.999)]) == 1


def test_pruned_trials_gain_nothing_and_failed_or_running_ones_say_nothing() -> None:
    trials = [complete(0, 1.0), other(1, TrialState.PRUNED, loss=0.1), other(2, TrialState.FAILED)]
    assert stale([*trials, other(3, TrialState.RUNNING, ended=None), other(4, TrialState.PRUNED)]) == 2


def test_trials_count_in_the_order_in_which_they_ended() -> None:
    first, second = complete(0, 1.0, ended=9.0), complete(1, 2.0, ended=3.0)
    assert stale([first, second]) == 0
    assert stale([first, dataclasses.replace(second, ended=10.0)]) == 1


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), st.floats(0, 10))
def test_staleness_never_exceeds_what_followed_the_best_and_a_constant_is_stale(
    losses: list[float], error: float
) -> None:
    trials = [complete(number, loss, error) for number, loss in enumerate(losses)]
    assert 0 <= stale(trials) < len(trials)
    assert stale([complete(number, 5.0, error) for number in range(7)]) == 6


def test_time_counts_while_anything_runs_and_not_between_two_launches() -> None:
    trials = [complete(0, 1.0, started=0.0, ended=10.0), complete(1, 1.0, started=5.0, ended=15.0)]
    trials.append(complete(2, 1.0, started=100.0, ended=101.0))
    assert busy(trials) == 16.0
    running = other(3, TrialState.RUNNING, started=200.0, ended=None)
    assert busy([*trials, running], now=204.0, since=150.0) == 20.0
    assert busy([*trials, running], now=904.0, since=900.0) == 16.0, "it ran under a driver that is no more"


def test_gpu_hours_count_the_share_of_every_trial() -> None:
    whole = complete(0, 1.0, started=0.0, ended=3600.0, extra={"gpus": 2.0})
    half = other(1, TrialState.FAILED, started=0.0, ended=7200.0, extra={"gpus": 0.5})
    running = other(2, TrialState.RUNNING, started=7200.0, ended=None, extra={"gpus": 1.0})
    assert gpu_hours([whole, half, complete(3, 1.0)], 0.0, NEVER) == 3.0
    assert gpu_hours([whole, half, running], 7200.0 + 1800.0, 0.0) == 3.5


def test_attempts_that_were_given_up_count_too() -> None:
    first = Attempt(other(1, TrialState.RUNNING, started=0.0, ended=None, extra={"gpus": 2.0}), Slot(0, 1))
    waiting = first.waiting(TrialFailed("crash", "it died"), True, now=1800.0)
    assert busy([waiting], 9e9, 0.0) == 1800.0 and gpu_hours([waiting], 9e9, 0.0) == 1.0
    extra = {**waiting.extra, "gpus": 1.0}
    again = dataclasses.replace(waiting, state=TrialState.RUNNING, attempt=1, started=3600.0, extra=extra)
    assert busy([again], 7200.0, 0.0) == 5400.0 and gpu_hours([again], 7200.0, 0.0) == 2.0
    third = Attempt(again, Slot(0, 1)).waiting(TrialFailed("crash", "it died"), True, now=7200.0)
    assert busy([third], 9e9, 0.0) == 5400.0 and gpu_hours([third], 9e9, 0.0) == 2.0


def test_a_slots_share_of_a_gpu() -> None:
    shared = Slots([Slot(n, 1, gpus=("a",), memory_share=0.3) for n in range(3)])
    assert shared.gpus(Slot(0, 1, gpus=("a",), memory_share=0.3)) == pytest.approx(1 / 3)
    assert shared.gpus(Slot(0, 1, gpus=("a",), memory_share=0.3).whole()) == 1.0
    assert Slots([Slot(0, 1, gpus=("a", "b"))]).gpus(Slot(0, 1, gpus=("a", "b"))) == 2.0
    assert Slots([Slot(0, 1)]).gpus(Slot(0, 1)) == 0.0


@pytest.mark.parametrize(
    ("ends", "reached"),
    [
        (Ends(9), None),
        (Ends(4), "complete"),
        (Ends(9, target=-0.5), "target"),
        (Ends(9, target=-0.4), None),
        (Ends(9, stale=2), "stale"),
        (Ends(9, stale=3), None),
        (Ends(9, timeout=4.0), "timeout"),
        (Ends(9, timeout=4.5), None),
        (Ends(9, gpu_hours=0.001), None),
    ],
)
def test_each_end(ends: Ends, reached: str | None) -> None:
    trials = [complete(0, 1.0), complete(1, 0.5), complete(2, 0.7), other(3, TrialState.PRUNED, loss=0.1, score=-0.1)]
    assert ends.reached(trials, "max", 4.0, 0.0) == reached
    assert (ends.because(reached, 4) is None) == (reached in (None, "complete"))


def test_a_target_of_a_loss_is_reached_from_above() -> None:
    trials = [complete(0, 0.5, score=0.5)]
    assert Ends(9, target=0.5).reached(trials, "min", 0.0, NEVER) == "target"
    assert Ends(9, target=0.4).reached(trials, "min", 0.0, NEVER) is None


@pytest.mark.parametrize(
    "wrong",
    [{"timeout": 0.0}, {"timeout": float("nan")}, {"stop_after_stale": 0}, {"max_gpu_hours": -1.0},
     {"target": float("inf")}, {"grace": 3}, {"grace": 0, "pruner": "asha"}],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=f"--{next(iter(wrong)).replace('_', '-')}"):
        StudyConfig("s", **wrong)


def test_gpu_hours_without_a_gpu_are_refused() -> None:
    with pytest.raises(RequestError, match="--max-gpu-hours 2 counts GPUs.*use --timeout"):
        jobs.check_ends(StudyConfig("s", max_gpu_hours=2.0), [Slot(0, 1)])
    jobs.check_ends(StudyConfig("s", max_gpu_hours=2.0), [Slot(0, 1, gpus=("a",))])


# ── the driver ───────────────────────────────────────────────────────────────────────────────────


class Listening(Silent):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def say(self, text: str) -> None:
        self.heard.append(text)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal.create(tmp_path / "journal.sqlite", {}) as made:
        yield made


def test_a_search_that_ends_early_is_confirmed_all_the_same(journal: Journal) -> None:
    watcher = Listening()
    made = driver(
        journal,
        study(RATE, score=lambda p: 0.5),
        ends=Ends(60, stale=5),
        confirm=lambda history: plan(history, Confirmation(1, 2), 7),
        watcher=watcher,
    )
    assert made.run() == "stale"
    trials = journal.history()
    assert len(searched(trials)) == 6 and len(trials) == 6 + 2
    assert [text for text in watcher.heard if "stopped after 6 of 60 trials: no gain" in text]


def test_what_runs_at_the_end_may_finish(journal: Journal) -> None:
    now = 0.0

    class Timed(InlineExecutor):
        def poll(self, timeout: float) -> list[Any]:
            nonlocal now
            now += 10.0
            return super().poll(timeout)

    slots = [Slot(n, 1) for n in range(3)]
    made = driver(
        journal,
        None,
        executor=Timed(study(RATE, score=lambda p: p["rate"]), slots),
        ends=Ends(60, timeout=35.0),
        clock=lambda: now,
    )
    assert made.run() == "timeout"
    trials = journal.history()
    assert 3 < len(trials) < 20 and all(t.state is TrialState.COMPLETE for t in trials)
    assert max(t.started or 0.0 for t in trials) < 35.0 + 10.0


def test_a_resumed_search_has_what_is_left_of_its_time(journal: Journal) -> None:
    now = 1000.0

    class Timed(InlineExecutor):
        def poll(self, timeout: float) -> list[Any]:
            nonlocal now
            now += 1.0
            return super().poll(timeout)

    body = study(RATE, score=lambda p: p["rate"])
    driver(journal, None, executor=Timed(body), ends=Ends(5), clock=lambda: now).run()
    used = busy(journal.history())
    now += 5000.0
    assert driver(journal, None, executor=Timed(body), discovery=None, ends=Ends(60, timeout=used + 3.0),
                  clock=lambda: now).run() == "timeout"  # fmt: skip
    assert used + 3.0 <= busy(journal.history()) <= used + 5.0


def test_an_end_that_is_reached_while_it_confirms_is_not_the_searchs(journal: Journal) -> None:
    now = 1000.0

    class Timed(InlineExecutor):
        def poll(self, timeout: float) -> list[Any]:
            nonlocal now
            now += 100.0 if any(trial.confirms is not None for trial in journal.history()) else 0.1
            return super().poll(timeout)

    made = driver(
        journal,
        None,
        executor=Timed(study(RATE, score=lambda p: p["rate"])),
        ends=Ends(9, timeout=200.0, stale=50),
        confirm=lambda history: plan(history, Confirmation(3, 2), 7),
        clock=lambda: now,
    )
    assert made.run() == "complete" and busy(journal.history()) > 200.0


def test_what_was_queued_and_never_ran_is_no_trial_of_the_search(journal: Journal) -> None:
    heard: list[str] = []
    asked: list[int] = []

    class Listening(Silent):
        def say(self, text: str) -> None:
            heard.append(text)

    def confirm(history: Sequence[Trial]) -> list[Trial]:
        asked.append(len(history))
        return []

    def begin(_: dict[str, Any]) -> None:
        wishes = [Wish({"rate": rate}, "the test") for rate in (0.2, 0.3, 0.4)]
        queue(journal, wishes, 7, heard.append)

    body = study(RATE, score=lambda p: p["rate"])
    made = driver(journal, body, ends=Ends(50, target=0.05), watcher=Listening(), confirm=confirm, on_preflight=begin)
    assert made.run() == "target" and len(journal.history()) == 4
    assert asked == [1] and any("stopped after 1 of 50 trials" in text for text in heard)


# ── a study ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.study
@pytest.mark.timeout(300)
def test_a_study_that_reached_its_target_says_so_and_goes_on_with_a_larger_one_alone(
    tmp_path: Path, heldout: Heldout
) -> None:
    space, where = write_space(tmp_path), ["--workspace", str(tmp_path / "ws")]
    options = ["--trials", "30", "--sampler", "random", "--epochs", "1", "--confirm", "0", "--evaluate", "no"]
    ran = heldout("launch", space, *options, "--target", "0.01", "--study", "s", "--workers", "1", *where)
    assert ran.returncode == 0, ran.stderr
    because = "stopped after 1 of 30 trials: a validation score reached --target 0.01"
    assert because in ran.stdout and f"the search has {because}" in ran.stderr
    assert because in heldout("status", "s", *where).stdout
    report = json.loads(heldout("report", "s", "--json", *where).stdout)
    assert (report["ended"], report["because"], report["state"]) == ("target", because, "COMPLETE")

    more = heldout("resume", "s", "--trials", "+5", *where)
    assert more.returncode == 2 and "would begin no further trial" in more.stderr
    assert heldout("resume", "s", *where).returncode == 2
    ran = heldout("resume", "s", "--target", "1.1", "--stop-after-stale", "2", *where)
    assert ran.returncode == 0, ran.stderr
    trials = Study("s", tmp_path / "ws").trials
    assert "no gain above one standard error for 2 trials" in ran.stdout
    assert stale(trials) >= 2 and len(trials) < 30
    assert all(t.extra["error"] > 0 for t in trials[1:] if t.state is TrialState.COMPLETE)

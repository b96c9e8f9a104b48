"""What a decision costs does not grow with the study: steps of Python are counted, since seconds depend on the machine.

A step is a line that is executed, each round of a loop or of a comprehension being one more. The limits are far below
the number of trials or slots that are there, and far above what was counted.
"""

from __future__ import annotations

import io
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from rich.console import Console

from search.definition.domain import Domain
from search.definition.space import Parameter, Space
from search.executors import Slot
from search.loop.ends import Ends, busy, gpu_hours, stale
from search.loop.pruners import Pruning, get_pruner
from search.processes.slots import Slots
from search.record.journal import Journal
from search.record.trials import Trials
from search.samplers import get_sampler, propose
from search.shown.view import View
from search.study import Study
from search.trial import Report, Trial, TrialState, best, searched
from tests.test_driver import RATE, UNITS, driver, journal, study  # noqa: F401

MANY = 2000
NEVER = 10**12
EVERY_END = Ends(NEVER, timeout=NEVER, stale=NEVER, gpu_hours=NEVER, target=-NEVER)


def steps(work: Callable[[], Any]) -> int:
    """How many steps a call takes, those of all that it calls included."""
    count = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def space_of(*parameters: Parameter) -> Space:
    return Space.empty().grown([{**p.to_json(), "value": p.domain.default} for p in parameters])


def trial_of(number: int, space: Space, state: TrialState = TrialState.COMPLETE) -> Trial:
    params, at = space.sample(random.Random(number)), float(number)
    known = {"started": at, "params": params, "extra": {"gpus": 1}}
    if state is TrialState.RUNNING:
        return Trial(number, state, **known)
    loss = random.Random(-number).random()
    return Trial(number, state, score=loss, loss=loss, ended=at + 3, epochs=number % 7, **known)


def test_a_slot_is_found_without_looking_at_all_of_them() -> None:
    seats = Slots([Slot(n, 1) for n in range(MANY)])
    for _ in range(MANY // 2):
        seats.take()
    assert steps(seats.take) < 20
    shared = Slots([Slot(n, 1, gpus=(str(n // 2),), memory_share=0.5) for n in range(MANY)])
    assert steps(lambda: shared.gpus(Slot(0, 1, gpus=("0",), memory_share=0.5))) < 20


@pytest.mark.parametrize("name", ["asha", "median"])
def test_a_trial_at_a_rung_is_not_compared_with_each_other_one(name: str) -> None:
    pruning = Pruning(get_pruner(name), "val_loss", "min", 1, lambda: 9)

    def asks(number: int) -> bool:
        trial = Trial(number, TrialState.RUNNING)
        pruning.heard(trial, Report(number, 0, 1, 0.0, {"val_loss": random.Random(number).random()}))
        return pruning.stops(trial, 1)

    for number in range(1, MANY):
        asks(number)
    assert steps(lambda: asks(MANY)) < 200


def test_an_attempt_that_is_followed_by_another_is_compared_with_none() -> None:
    pruning = Pruning(get_pruner("asha"), "val_loss", "min", 1, lambda: 9)
    heard = lambda number, attempt, value: pruning.heard(  # noqa: E731
        Trial(number, TrialState.RUNNING, attempt=attempt), Report(number, attempt, 1, 0.0, {"val_loss": value})
    )
    for number in range(1, 4):
        heard(number, 0, 0.5)
    assert not pruning.stops(Trial(1), 1)
    heard(2, 1, 0.1)  # twice as good the second time
    heard(3, 1, 0.2)
    assert pruning.stops(Trial(1), 1) and not pruning.stops(Trial(2), 1)


def test_the_live_view_does_not_count_all_trials_again() -> None:
    space, out = space_of(RATE, UNITS), io.StringIO()
    plain, live = View(Console(file=out), MANY), View(Console(file=out, force_terminal=True), MANY)
    trials = [trial_of(number, space) for number in range(MANY)]
    for trial in trials[:-1]:
        plain._count(trial)
        live._count(trial)
    assert steps(lambda: plain._line(trials[-1])) < 100
    assert steps(live._summary) < 100
    winner = best(trials[:-1])
    assert winner is not None and f"(trial {winner.number})" in live._summary() and "1999 of 2000" in live._summary()


def test_what_ends_a_search_is_counted_as_trials_end() -> None:
    space = space_of(RATE, UNITS)
    trials = Trials([trial_of(number, space) for number in range(MANY)])
    EVERY_END.reached(trials, "min", MANY, 0.0)
    trials.put(trial_of(MANY, space, TrialState.RUNNING))
    trials.put(trial_of(MANY, space))
    assert steps(lambda: EVERY_END.reached(trials, "min", MANY, 0.0)) < 150


def test_what_ends_a_search_is_the_same_step_by_step_and_at_once() -> None:
    """Trials that end in any order, run again, overlap, confirm, and a clock that is put back."""
    space, dice, growing = space_of(RATE, UNITS), random.Random(3), Trials()
    known: dict[int, Trial] = {}
    for step in range(300):
        number, at = dice.randrange(step + 1), float(dice.randrange(50))
        before = known.get(number)
        if before is not None and before.state.is_finished:
            continue
        state = TrialState.RUNNING if before is None else dice.choice([*TrialState][1:4])
        extra = {"gpus": dice.choice([0, 0.5, 2]), "spent": [[at, at + 1.0, 1]] * dice.randrange(2)}
        known[number] = Trial(
            number,
            state,
            params=space.sample(dice),
            confirms=0 if number % 5 == 4 else None,
            started=at,
            ended=None if state is TrialState.RUNNING else at + dice.randrange(9),
            loss=None if state is TrialState.RUNNING else float(dice.randrange(9)),
            score=1.0,
            extra=extra,
        )
        growing.put(known[number])
        whole = [known[number] for number in sorted(known)]
        assert list(growing) == whole
        for ends in (Ends(20), Ends(NEVER, target=0.5), Ends(NEVER, stale=4), Ends(NEVER, timeout=40.0)):
            assert ends.reached(growing, "min", 60.0, 0.0) == ends.reached(whole, "min", 60.0, 0.0)
        spans = [
            (t.started, 60.0 if t.ended is None else t.ended, t.extra["gpus"]) for t in whole if t.started is not None
        ] + [tuple(span) for t in whole for span in t.extra["spent"]]
        assert busy(whole, 60.0, 0.0) == sum(any(a <= s < b for a, b, _ in spans) for s in range(60))
        assert gpu_hours(whole, 60.0, 0.0) == pytest.approx(sum(gpus * (b - a) / 3600 for a, b, gpus in spans))
        assert stale(whole) == _stale(searched(whole))


def _stale(trials: Sequence[Trial]) -> int:
    done = sorted((t for t in trials if t.state.is_finished), key=lambda t: (t.ended, t.number))
    bar, count = float("inf"), 0
    for trial in done:
        count += bar < float("inf")
        if trial.state is TrialState.COMPLETE and trial.loss is not None and trial.loss < bar:
            bar, count = trial.loss, 0
    return count


@pytest.mark.parametrize("name", ["random", "tpe"])
def test_a_proposal_does_not_look_at_the_whole_history(name: str) -> None:
    space, sampler = space_of(RATE, UNITS), get_sampler(name)
    found = []
    for count in (MANY // 2, MANY):
        trials = Trials([trial_of(number, space) for number in range(count)])
        propose(sampler, trials, space, 1)
        trials.put(trial_of(count, space, TrialState.RUNNING))
        trials.put(trial_of(count, space))
        found.append(steps(lambda trials=trials: propose(sampler, trials, space, 2)))  # type: ignore[misc]
    assert found[1] < 1.2 * found[0]


@pytest.mark.parametrize("name", ["random", "tpe"])
def test_proposals_are_the_same_from_a_sequence_that_grows_and_from_one_that_is_whole(name: str) -> None:
    """Of a space of 60 configurations, so that most proposals are duplicates and the last one is None."""
    units = Parameter("units", "units", (), Domain("int", 1, 20, 1, default=4))
    kind = Parameter("kind", "kind", (), Domain("choice", values=("a", "b", "c"), default="a"))
    space, growing, dice = space_of(units, kind), Trials(), random.Random(5)
    for number in range(61):
        seed = dice.randrange(5)
        proposal = propose(get_sampler(name), growing, space, seed)
        assert proposal == propose(get_sampler(name), list(growing), space, seed)
        if proposal is None:
            break
        growing.put(Trial(number, TrialState.RUNNING, params=proposal.params))
        if dice.random() < 0.7:
            growing.put(Trial(number, TrialState.COMPLETE, params=proposal.params, loss=dice.random(), score=0.0))
    assert proposal is None and number == 60


def test_the_journal_is_read_once_to_say_how_far_a_study_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "studies" / "s"
    folder.mkdir(parents=True)
    config = {"space": "s.py", "trials": 3}
    meta = {"objective": "val_loss", "direction": "min", "config": config, "data": {"tiers": {}}}
    with Journal.create(folder / "journal.sqlite", {"study": meta, "state": "RUNNING"}) as made:
        made.begin(Trial(0, TrialState.RUNNING, started=1.0))
    opened = []
    once = Journal.open
    monkeypatch.setattr(Journal, "open", lambda *args, **named: opened.append(args) or once(*args, **named))
    found = Study("s", tmp_path).status()
    assert (found["state"], found["running"], found["planned"], len(opened)) == ("STOPPED", [0], 3, 1)


def test_a_trial_of_a_long_search_costs_the_driver_what_one_of_a_short_search_did(journal: Journal) -> None:  # noqa: F811
    class Counting(View):
        at: list[int] = []

        def ended(self, trial: Trial) -> None:
            super().ended(trial)
            self.at.append(count)

    count = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    made = driver(
        journal,
        study(RATE, UNITS, score=lambda p: p["rate"]),
        trials=120,
        ends=Ends(120, timeout=NEVER, stale=NEVER, gpu_hours=NEVER, target=NEVER),
        watcher=Counting(Console(file=io.StringIO()), 120),
        pruning=Pruning(get_pruner("asha"), "loss", "min", 1, lambda: 2),
    )
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        assert made.run() == "complete"
    finally:
        sys.settrace(before)
    each = [later - earlier for earlier, later in zip(Counting.at, Counting.at[1:], strict=False)]
    assert statistics.median(each[-30:]) < 1.1 * statistics.median(each[20:50])

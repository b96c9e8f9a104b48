"""Which configurations are trained again, and how often."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.errors import RequestError
from search.guard.finalists import Confirmation, confirmation, plan
from search.study import StudyConfig
from search.trial import Trial, TrialState, best, ranked, searched


def trial(number: int, loss: float | None, *, size: int = 10, confirms: int | None = None) -> Trial:
    state = TrialState.COMPLETE if loss is not None else TrialState.FAILED
    reason = None if loss is not None else "nan"
    return Trial(number, state, {"units": number}, confirms=confirms, loss=loss, score=loss, size=size, reason=reason)


@pytest.mark.parametrize(
    ("trials", "finalists"), [(1, 0), (9, 0), (11, 0), (12, 1), (20, 2), (30, 3), (60, 6), (100, 10), (1000, 10)]
)
def test_one_in_ten_trials_is_a_finalist_by_default(trials: int, finalists: int) -> None:
    assert confirmation(trials, None, 3).finalists == finalists


@given(st.integers(1, 5000), st.integers(1, 20))
def test_confirming_by_default_is_at_most_a_third_of_all_trainings(trials: int, seeds: int) -> None:
    runs = confirmation(trials, None, seeds).runs
    assert runs <= (trials + runs) / 3


def test_what_was_asked_for_is_done_up_to_the_trials_there_are() -> None:
    assert confirmation(8, 5, 2) == Confirmation(5, 2) and confirmation(8, 5, 2).runs == 12
    assert confirmation(3, 5, 2).finalists == 3
    assert confirmation(50, 0, 3).runs == 0


def test_finalists_come_by_validation_and_the_baseline_with_them_round_by_round() -> None:
    history = [trial(0, 0.9), trial(1, 0.2), trial(2, None), trial(3, 0.1), trial(4, 0.5)]
    planned = plan(history, Confirmation(2, 3), study_seed=7)
    assert [t.confirms for t in planned] == [3, 1, 0] * 3
    assert [dict(t.params) for t in planned[:3]] == [{"units": 3}, {"units": 1}, {"units": 0}]
    assert len({t.seed for t in planned}) == 9


def test_a_baseline_among_the_finalists_is_trained_no_oftener_and_a_failed_one_not_at_all() -> None:
    assert [t.confirms for t in plan([trial(0, 0.1), trial(1, 0.2)], Confirmation(2, 1), 7)] == [0, 1]
    assert [t.confirms for t in plan([trial(0, None), trial(1, 0.2)], Confirmation(2, 1), 7)] == [1]
    assert plan([trial(0, 0.1)], Confirmation(0, 3), 7) == [] and plan([], Confirmation(3, 3), 7) == []


def test_the_plan_is_the_same_after_some_of_it_has_run() -> None:
    history = [trial(0, 0.9), trial(1, 0.2), trial(2, 0.1)]
    planned = plan(history, Confirmation(1, 2), 7)
    assert plan([*history, trial(3, 0.01, confirms=2)], Confirmation(1, 2), 7) == planned


def test_no_confirmation_is_the_best_trial_and_ties_go_to_fewer_weights() -> None:
    history = [trial(0, 0.2, size=9), trial(1, 0.2, size=8), trial(2, 0.2, size=8), trial(3, 0.01, confirms=2)]
    assert [t.number for t in ranked(history)] == [1, 2, 0]
    assert best(history) == history[1] and searched(history) == history[:3]


@pytest.mark.parametrize("options", [{"confirm": -1}, {"confirm": True}, {"confirm_seeds": 0}, {"final": "all"}])
def test_numbers_that_cannot_be_meant_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(RequestError, match="--"):
        StudyConfig("space", **options)  # type: ignore[arg-type]

"""The paragraph to believe: it names the numbers, tells every case apart, and reads as prose."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.guard.belief import paragraph
from search.guard.verdicts import alpha

ACCURACY: dict[str, Any] = {
    "study": "digits-1",
    "state": "COMPLETE",
    "objective": "val_accuracy",
    "direction": "max",
    "proportion": True,
    "trials": {"complete": 30, "pruned": 0, "failed": 1},
    "best": {"trial": 12, "params": {}, "validation": 0.981},
    "winner": {"trial": 34, "configuration": 12, "params": {}, "validation": 0.975, "guard": 0.97},
    "baseline": {"trial": 40, "params": {}, "validation": 0.945, "guard": 0.95},
    "corrected": {"estimate": 0.969, "interval": [0.955, 0.982], "level": 0.95, "method": "m", "scope": "this study"},
    "noise_floor": 0.004,
    "gains": {"configuration": None, "shipped": {"gain": 0.01, "interval": [-0.004, 0.02]}},
    "confirmation": None,
    "test": {
        "winner": 0.964,
        "interval": [0.939, 0.98],
        "baseline": 0.941,
        "baseline_interval": [0.91, 0.962],
        "opening": 1,
        "alpha": alpha(1),
        "level": 1 - alpha(1),
        "rows": 359,
        "gain": {"gain": 0.023, "interval": [0.0041, 0.042], "p": 0.01, "smallest": 0.018},
        "beats_baseline": True,
        "gap": {"gap": 0.005, "z": 0.4, "smallest": 0.031},
        "trial": 34,
    },
    "sealed": None,
    "verdicts": ["NO_GAP_SHOWN"],
    "final": None,
}
SEALED: dict[str, Any] = {"test": None, "verdicts": []}
LOSS: dict[str, Any] = {
    "objective": "val_mean_squared_error",
    "direction": "min",
    "proportion": False,
    "best": {"validation": 0.20123},
    "corrected": {"estimate": 0.2252, "interval": [0.19, 0.27]},
    "noise_floor": 0.0123,
    "test": {
        "winner": 0.23114,
        "interval": [0.2, 0.27],
        "baseline": 0.42,
        "gain": {"gain": 0.18886, "interval": [0.12, 0.26], "smallest": 0.07},
        "gap": {"gap": 0.00594, "z": 0.2, "smallest": 0.08},
    },
}
CUSTOM: dict[str, Any] = {
    "objective": "val_my_score",
    "proportion": False,
    "corrected": {"interval": None, "method": "none: only Keras can compute this metric, so it is not corrected"},
    "gains": {"configuration": None, "shipped": None},
    "test": {"interval": None, "level": None, "gain": None, "beats_baseline": None, "gap": None},
    "verdicts": ["NO_INTERVAL_FOR_THIS_METRIC"],
}
NOTHING: dict[str, Any] = dict.fromkeys(
    ("best", "winner", "baseline", "corrected", "noise_floor", "test", "confirmation")
) | {"trials": {"complete": 0, "pruned": 0, "failed": 3}, "state": "FAILED", "verdicts": []}


def report(*changes: dict[str, Any]) -> dict[str, Any]:
    """The accuracy report with changes, which may go one level deep."""
    found = copy.deepcopy(ACCURACY)
    for change in changes:
        for key, value in change.items():
            deep = isinstance(value, dict) and isinstance(found.get(key), dict)
            found[key] = found[key] | value if deep else value
    return found


def test_all_parts_of_an_accuracy() -> None:
    said = paragraph(report())
    assert said.startswith("Believe the test accuracy of 96.4 %, from 359 rows that nothing in this study had used")
    assert "between 93.9 and 98.0 % (a 97 % interval because this is opening 1;" in said
    assert "best validation accuracy of the search, 98.1 % (trial 12), tends to flatter" in said
    assert "guard rows, whose labels the search never saw, the winner is worth 96.9 %, corrected for the choice" in said
    assert "(95 % interval 95.5 to 98.2 %), so luck made it look about 1.2 points better" in said
    assert "0.5 points worse than that estimate, which chance explains: no gap is shown" in said
    assert "only one of about 3.1 points or more" in said
    assert "default configuration, 94.1 % on the same rows) is shown: 2.3 points, plausibly 0.4 to 4.2 points" in said
    assert "these rows show one of 1.8 points or more" in said
    assert "Two trainings of one configuration differ by about 0.4 points; a gain below that is noise." in said
    assert said.endswith("a gain below that is noise.")


def test_all_parts_of_a_loss() -> None:
    said = paragraph(report(LOSS))
    assert "test mean squared error (lower is better) of 0.2311, from" in said
    assert "search, 0.2012 (trial 12), tends to flatter" in said and "luck made it look about 0.02397 better" in said
    assert "0.00594 worse than that estimate" in said and "0.1889, plausibly 0.12 to 0.26" in said
    assert "%" not in said.replace("97 % interval", "").replace("95 % interval", "") and "points" not in said


@pytest.mark.parametrize("change", [{}, LOSS | {"test": None}], ids=["accuracy", "loss"])
def test_a_sealed_test(change: dict[str, Any]) -> None:
    said = paragraph(report(change, SEALED))
    assert said.startswith(
        "There is no test score yet: the test rows are still sealed, and `heldout evaluate digits-1`"
    )
    assert "until a test, believe that estimate" in said and "Believe the test" not in said
    assert "the winner is" in said and "on guard rows" in said and "is shown on guard rows" in said


def test_why_the_test_is_sealed_is_said_once_and_as_a_sentence() -> None:
    said = paragraph(report(SEALED, {"sealed": "these test rows have been opened once before"}))
    assert "There is no test score yet: these test rows have been opened once before. The best" in said


def test_a_gain_on_guard_rows_is_shown_or_not() -> None:
    gains = {"configuration": None, "shipped": {"gain": 0.02, "interval": [0.01, 0.03]}}
    assert "is shown on guard rows: 2.0 points, plausibly 1.0 to 3.0 points." in paragraph(
        report(SEALED, {"gains": gains})
    )
    said = paragraph(report(SEALED))
    assert "No gain" in said and "anything from 0.4 points worse to 2.0 points better is plausible" in said
    none = {"configuration": None, "shipped": None}
    assert "is not known without a test" in paragraph(report(SEALED, {"gains": none}))


def test_a_metric_that_is_not_corrected() -> None:
    said = paragraph(report(CUSTOM))
    assert "this metric has no interval here" in said and "scored 0.969, which is neither corrected" in said
    assert "the winner is 0.023 better, which may be chance, as there is no interval" in said
    assert "is shown" not in said and "None" not in said
    assert "no estimate that corrects for that" in paragraph(report(CUSTOM, {"corrected": None}))


def test_the_winner_is_the_baseline() -> None:
    same = {"winner": {"trial": 40}, "test": {"gain": None, "beats_baseline": False}}
    for said in (paragraph(report(same)), paragraph(report(same, SEALED))):
        assert "The winner is the baseline (the space's default configuration) itself" in said
        assert "no gain is shown" in said


def test_the_baseline_did_not_complete() -> None:
    gone = {"baseline": None, "test": {"baseline": None, "gain": None, "beats_baseline": None}}
    assert "The baseline (the space's default configuration) did not complete" in paragraph(report(gone))


def test_a_gain_that_is_not_shown() -> None:
    gain = {"gain": 0.006, "interval": [-0.01, 0.022], "smallest": 0.018}
    said = paragraph(report({"test": {"gain": gain, "beats_baseline": False}}))
    assert "No gain over the baseline" in said and "the winner is 0.6 points better, and anything from" in said
    assert "1.0 points worse to 2.2 points better" in said
    none = {"gain": 0.0, "interval": [0.0, 0.0], "smallest": 0.0}
    assert "the winner is no better (" in paragraph(report({"test": {"gain": none, "beats_baseline": False}}))


def test_a_gain_below_the_noise_is_called_noise() -> None:
    assert "a gain below that is noise." in paragraph(report())
    assert "a gain below that is noise, as this one is." in paragraph(report({"noise_floor": 0.03}))
    assert "was not measured" in paragraph(report({"noise_floor": None}))


@pytest.mark.parametrize("opening", range(1, 8))
def test_a_test_set_used_again(opening: int) -> None:
    said = paragraph(report({"test": {"opening": opening, "level": 1 - alpha(opening)}}))
    assert f"interval because this is opening {opening};" in said and "(a 100 %" not in said
    assert (f"This test set has been used {opening} times" in said) == (opening >= 2)
    assert ("fresh rows" in said) == (opening >= 5)
    assert said.startswith("Believe") == (opening == 1) and ("had used before" in said) == (opening == 1)


def test_later_openings_have_other_levels() -> None:
    levels = [re.findall(r"a (\S+) % interval because", paragraph(report({"test": {"level": 1 - alpha(i)}})))[0]
              for i in (1, 2, 3, 10)]  # fmt: skip
    assert levels == ["97", "99.2", "99.7", "99.97"]


WORSE = {"gap": {"gap": 0.059, "z": 3.3, "smallest": 0.05}}
BETTER = {"gap": {"gap": -0.029, "z": -2.9, "smallest": 0.03}}


@pytest.mark.parametrize(
    "test, verdict, begins, says",
    [
        (WORSE, "UNEXPLAINED_GAP", "Believe", "5.9 points worse than that estimate, more than chance explains"),
        (WORSE, "UNEXPLAINED_GAP", "Believe", "do not use the estimate"),
        (WORSE, "POSSIBLE_DRIFT", "Believe", "the data may have changed over time"),
        (BETTER, "SPLIT_MISMATCH", "The test", "2.9 points better than that estimate, more than chance explains"),
        (BETTER, "SPLIT_MISMATCH", "The test", "check how the rows were split"),
    ],
)
def test_gaps_that_chance_does_not_explain(test: dict[str, Any], verdict: str, begins: str, says: str) -> None:
    said = paragraph(report({"test": test, "verdicts": [verdict]}))
    assert said.startswith(begins) and says in said and "no gap is shown" not in said


def test_a_gap_of_nothing() -> None:
    said = paragraph(report({"test": {"gap": {"gap": 0.0, "z": 0.0, "smallest": 0.03}}}))
    assert "The test score equals that estimate: no gap is shown" in said


def test_a_refitted_winner_has_the_test_score_alone() -> None:
    said = paragraph(report({"final": "retrain", "test": {"gap": None}, "verdicts": []}))
    assert "only a test score speaks for the model that is shipped" in said
    assert "believe that estimate" not in paragraph(report(SEALED, {"final": "retrain"}))


def test_guard_rows_that_judged_other_studies() -> None:
    scope = "this study only: 2 other studies with 60 trials have been judged by these guard rows"
    said = paragraph(report({"corrected": {"scope": scope}}))
    assert said.endswith("this study only: 2 other studies with 60 trials have been judged by these guard rows, and it "
                         "cannot correct for those.")  # fmt: skip


def test_one_trial_was_not_chosen() -> None:
    said = paragraph(report({"trials": {"complete": 1, "pruned": 0, "failed": 2}}))
    assert "comes from its only trial" in said and "luck" not in said and "flatter" not in said


def test_a_search_that_did_not_flatter() -> None:
    assert "luck" not in paragraph(report({"best": {"validation": 0.96}}))
    assert "luck" not in paragraph(report(LOSS, {"best": {"validation": 0.3}}))


def test_few_guard_rows_are_said_to_be_few() -> None:
    few = paragraph(report({"data": {"tiers": {"guard": 180}}}))
    assert "on 180 guard rows, whose labels the search never saw, too few to be exact, the winner is worth" in few
    assert "too few" not in paragraph(report({"data": {"tiers": {"guard": 1000}}}))


def test_nothing_completed() -> None:
    said = paragraph(report(NOTHING))
    assert said.startswith("No trial of digits-1 completed") and "3 failed; `heldout show digits-1 0`" in said
    assert "completed yet" in paragraph(report(NOTHING, {"state": "RUNNING"}))


def test_a_study_that_still_runs() -> None:
    running = {"state": "RUNNING", "winner": None, "corrected": None, "noise_floor": None}
    said = paragraph(report(SEALED, running))
    assert "the study is running" in said and "no winner has been chosen yet" in said


def test_no_share_below_all_reads_as_all() -> None:
    said = paragraph(report({"test": {"winner": 0.99996, "interval": [0.9997, 1.0]}, "best": {"validation": 1.0}}))
    assert "accuracy of 99.996 %" in said and "between 99.97 and 100.0 %" in said and "search, 100.0 % (" in said


MIXED: tuple[dict[str, Any], ...] = (
    LOSS,
    CUSTOM,
    {"noise_floor": None},
    {"corrected": None, "test": {"gap": None}},
    {"baseline": None, "test": {"baseline": None, "gain": None, "beats_baseline": None}},
    {"winner": {"trial": 40}, "test": {"gain": None, "beats_baseline": False}},
    {"final": "retrain"},
    SEALED,
    {"state": "STOPPED", "winner": None, "corrected": None, "noise_floor": None, "test": None},
    NOTHING,
)
GAPS = ["NO_GAP_SHOWN", "UNEXPLAINED_GAP", "POSSIBLE_DRIFT", "SPLIT_MISMATCH"]


@given(st.sets(st.integers(0, len(MIXED) - 1), max_size=4), st.integers(1, 6), st.sampled_from(GAPS))
def test_every_mixture_reads_as_prose(chosen: set[int], opening: int, verdict: str) -> None:
    found = report({"test": {"opening": opening}}, *(MIXED[at] for at in sorted(chosen)), {"verdicts": [verdict]})
    if found["corrected"] is None and found["test"] is not None:
        found["test"]["gap"] = None
    said = paragraph(found)
    assert "\n" not in said and "  " not in said and said.endswith(".")
    assert not re.search(r"None|nan|inf\b|\.\.|\( | \)|\d{7}|-\d", said.replace("digits-1", ""))
    sentences = re.split(r"(?<=[a-z)])\. ", said)
    assert len(sentences) <= 8 and all(sentence[0].isupper() for sentence in sentences)

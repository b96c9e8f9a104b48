"""Two studies side by side: what is shown, what a paired test sees and does not, and when there is none."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import search
from search.cli import main
from search.scorer.scoring import Metric
from search.shown.comparison import compare, lines, resampled
from search.study import Study
from search.trial import Trial, TrialState
from tests.test_page import opened, some, write
from tests.test_selection import ACCURACY, MSE, candidate, hits, losses
from tests.tiny import write_space

ROWS = 400


def noise(count: int, seed: int, chance: float = 0.5) -> list[Any]:
    """Models that are right by chance alone, on validation rows and on guard rows."""
    rng = np.random.default_rng(seed)
    right = rng.random((count, 2, ROWS)) < chance
    return [hits(k, *right[k]) for k in range(count)]


def gains(ours: Any, theirs: Any, metric: Metric = ACCURACY, direction: str = "max") -> Any:
    return resampled(metric, direction, ours, theirs, ROWS, ROWS, repeats=300)


def test_a_study_gains_nothing_from_having_looked_at_more_models() -> None:
    """The best of 200 looks better by 2 points of standard error; what it is worth is the same."""
    found = [gains(noise(3, seed), noise(200, 100 + seed)).mean() for seed in range(12)]
    plain = [max(m.guard for m in noise(200, 100 + seed)) - max(m.guard for m in noise(3, seed)) for seed in range(12)]
    assert np.mean(plain) > 0.03
    assert abs(np.mean(found)) < 3 * 0.035 / np.sqrt(12)  # a difference of two accuracies of 400 rows has sd .035


def test_a_study_that_ships_a_better_model_is_seen() -> None:
    found = gains(noise(5, 0, 0.6), noise(5, 1, 0.8))
    assert np.quantile(found, 0.025) > 0 and 0.1 < found.mean() < 0.3
    assert np.quantile(gains(noise(5, 1, 0.8), noise(5, 0, 0.6)), 0.975) < 0


def test_the_same_models_differ_by_nothing() -> None:
    assert set(gains(noise(4, 0), noise(4, 0))) == {0.0}


def test_pairs_are_rows_so_what_both_miss_does_not_count() -> None:
    """The same hard rows for both: the difference is known far better than either score."""
    rng = np.random.default_rng(0)
    right = rng.random((2, ROWS)) < 0.7
    better = right.copy()
    better[:, np.flatnonzero(~right[1])[:8]] = True
    found = gains([hits(0, *right)], [hits(0, *better)])
    assert found.mean() == pytest.approx(8 / ROWS, abs=0.004) and np.quantile(found, 0.025) > 0


def test_a_lower_loss_is_the_better_one() -> None:
    rng = np.random.default_rng(0)
    high, low = rng.random((2, ROWS)) + 1, rng.random((2, ROWS))
    assert gains([losses(0, *high)], [losses(0, *low)], MSE, "min").mean() == pytest.approx(1.0, abs=0.1)


def test_a_rank_metric_is_paired_as_well() -> None:
    rng = np.random.default_rng(0)
    auc, labels = Metric("auc"), rng.random(2 * ROWS) < 0.4
    good, bad = (candidate(auc, 0, labels, labels + wide * rng.normal(size=2 * ROWS), ROWS) for wide in (0.5, 3.0))
    assert np.quantile(gains([bad], [good], auc), 0.025) > 0.1


# When there is none, it says why.


def complete(score: float, **extra: Any) -> list[Trial]:
    return [Trial(0, TrialState.COMPLETE, {"units": 16}, score=score, loss=-score, epochs=1, extra=extra)]


MODEL: dict[str, Any] = {"declaration": opened(0)["preflight"]["declaration"]}


@pytest.mark.parametrize(
    "trials, changes, why",
    [
        ([], {}, "no trial of b has completed"),
        (complete(0.9, **MODEL), {"objective": "val_loss"}, "a has the objective val_accuracy and b val_loss"),
        (complete(0.9, **MODEL), {"direction": "min"}, "a has the direction max and b min"),
        (complete(0.9, **MODEL), {"digest": "other"}, "a and b have other rows or another split"),
        (
            complete(0.9, declaration={"outputs": [{"name": "o", "loss": None}], "metrics": [
                {"output": 0, "name": "accuracy", "kind": "accuracy", "config": {"threshold": 0.9}}]}),
            {},
            "compute val_accuracy in other ways",
        ),
        (complete(0.9, **MODEL), {}, "a has not chosen a winner yet"),
    ],
)  # fmt: skip
def test_without_common_rows_there_is_no_test(
    tmp_path: Path, trials: list[Trial], changes: dict[str, Any], why: str
) -> None:
    write(tmp_path, complete(0.8, **MODEL), name="a", digest="here")
    write(tmp_path, trials, name="b", **{"digest": "here", **changes})
    found = compare(Study("a", tmp_path), Study("b", tmp_path))
    assert why in found["guard"]["why"] and found["test"].get("why")
    told = lines(found)
    assert any(line.startswith("no paired test on guard rows: ") for line in told)
    assert told[0].split() == ["a", "b"]


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_command_shows_both_and_refuses_what_is_not_there(tmp_path: Path) -> None:
    for name, count in (("a", 6), ("b", 9)):
        write(tmp_path, [dataclasses.replace(trial, extra=MODEL) for trial in some(count)], name=name)
    shown = run("compare", "a", "b", "--workspace", tmp_path)
    assert shown.exit_code == 0 and "best validation score" in shown.output and "  rate" in shown.output
    found = json.loads(run("compare", "a", "b", "--json", "--workspace", tmp_path).output)
    assert [one["study"] for one in found["studies"]] == ["a", "b"] and set(found) == {"studies", "guard", "test"}
    gone = run("compare", "a", "c", "--workspace", tmp_path)
    assert gone.exit_code == 2 and gone.output.startswith("heldout: there is no study called 'c'")
    assert run("compare", "a").exit_code == 2


# Two real studies of the same rows.


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Study, Study]]:
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HELDOUT_LEDGER", str(folder / "ledger.jsonl"))
        space, asked = write_space(folder), {"workspace": str(folder / "ws"), "epochs": 1, "workers": 1, "confirm": 0}
        first = search.launch(space, study="first", trials=2, evaluate="yes", **asked)
        second = search.launch(space, study="second", trials=3, seed=1, evaluate="no", **asked)
        yield first, second


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_real_studies_are_paired_on_guard_rows_and_once_both_are_tested_on_test_rows(
    studies: tuple[Study, Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = studies
    # Tests have ledgers of their own; these studies must have the one of their fixture, or both would open first.
    monkeypatch.setenv("HELDOUT_LEDGER", str(first.workspace.parent / "ledger.jsonl"))
    found = search.compare(first, second)
    guard = found["guard"]
    assert guard["rows"] == first.report()["data"]["tiers"]["guard"] and guard["level"] == 0.95
    assert guard["interval"][0] <= guard["gain"] <= guard["interval"][1]
    assert found["test"]["why"] == "second has not opened the test rows"
    second.evaluate()
    test = search.compare(first, second)["test"]
    tested = [study.report()["test"] for study in studies]
    assert test["gain"] == pytest.approx(tested[1]["winner"] - tested[0]["winner"])
    assert test["level"] == tested[1]["level"] > tested[0]["level"] and tested[1]["opening"] == 2
    np.save(second.folder / "frozen" / "winner_test_0.npy", np.zeros((tested[1]["rows"], 2)))
    assert "are not there any more" in search.compare(first, second)["test"]["why"]
    assert any("guard rows, what second ships" in line for line in lines(search.compare(first, second)))

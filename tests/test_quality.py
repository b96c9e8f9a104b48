"""The benchmark of proposals: its regret is right, and runs that are there are not repeated."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parent / "benchmarks"


@pytest.fixture(scope="module")
def quality() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        spec = importlib.util.spec_from_file_location("quality", FOLDER / "quality.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "quality", module)
        spec.loader.exec_module(module)
        return module


def test_regret_is_zero_at_the_best_configuration_and_one_at_the_median(quality: ModuleType) -> None:
    table = quality.Problem("car")
    means = sorted(sum(row) / len(row) for row in table.values.values())
    assert len(means) == 30_000 and table.sizes["depth"] == 3
    assert table.regret(means[0]) == pytest.approx(0) and table.regret(table.median) == 1
    run = quality.Run(table, seed=0, noisy=False)
    order = sorted(table.values, key=lambda key: sum(table.values[key]))
    for levels in (order[200], order[29_000], order[0]):
        run(levels)
    assert run.regrets[0] == run.regrets[1] >= run.regrets[2] == pytest.approx(0)


def test_a_noisy_run_is_judged_by_what_its_choice_is_worth(quality: ModuleType) -> None:
    table = quality.Problem("kc1")
    run = quality.Run(table, seed=3, noisy=True)
    keys = list(table.values)[:400]
    seen = [run(key) for key in keys]
    chosen = keys[seen.index(min(seen))]
    assert run.regrets[-1] == table.regret(sum(table.values[chosen]) / 5)
    assert seen[0] in table.values[keys[0]]


@pytest.mark.parametrize("slots", [1, 8])
def test_a_search_has_as_many_trials_whatever_its_slots(quality: ModuleType, slots: int) -> None:
    row = quality.one("random", "car", 5, 30, slots, False)
    again = quality.one("random", "car", 5, 30, slots, False)
    assert len(row["regrets"]) == 30 and row | {"seconds": 0} == again | {"seconds": 0}
    assert row["regrets"] == sorted(row["regrets"], reverse=True)


def test_peers_run(quality: ModuleType) -> None:
    assert len(quality.one("hyperopt.fmin", "car", 0, 5, 1, False)["regrets"]) == 5


def test_runs_that_are_there_are_not_repeated(
    quality: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs.jsonl"
    rows: list[dict[str, Any]] = [
        {"sampler": "random", "data_set": data_set, "seed": seed, "trials": 2, "slots": 1, "noisy": False}
        | {"regrets": [0.5, 0.1 * seed], "seconds": 0.001}
        for seed in (1, 3)
        for data_set in ("car", "kc1")
    ]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def never(*key: Any) -> dict[str, Any]:
        raise AssertionError(f"{key} was there")

    quality.compare([quality.key_of(row) for row in rows], out, 1, never)
    assert quality.read(out) == rows
    mean, error = quality.regrets(rows, 2)
    assert (mean, error) == (pytest.approx(0.2), pytest.approx(0.1))
    quality.show(rows, ["random"], [2])
    assert "0.2000 ± 0.1000" in capsys.readouterr().out

"""Configurations that are tried first: read, fitted to the space, queued, and run in order whatever happens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from search.definition.domain import Domain
from search.definition.space import Space
from search.errors import RequestError
from search.executors import Slot
from search.executors.inline import InlineExecutor
from search.loop.enqueueing import Wish, check_room, fitted, queue, read, source, unbegun
from search.record.journal import Journal
from search.study import Study
from search.trial import Trial, TrialState
from tests.conftest import ROOT, Heldout
from tests.test_driver import RATE, UNITS, Body, driver, study
from tests.test_samplers import conditional, space_of
from tests.tiny import write_space

SPACE = space_of(conditional, {"layers": 2}, {"layers": 3}, {"kind": "cnn"}, {"kind": "cnn", "pool": True})
ONE = {"kind": "cnn", "filters": 16, "rate": 1e-3}


# Reading.


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps([ONE, {"layers": 3}])),
        ("a.jsonl", f"{json.dumps(ONE)}\n\n{json.dumps({'layers': 3})}\n"),
        ("a.json", f"\ufeff{json.dumps(ONE)}\n{json.dumps({'layers': 3})}"),
        ("a.csv", "kind, filters, rate, layers\ncnn,16,0.001,\n,,,3\n"),
    ],
)
def test_a_file_is_a_list_lines_of_objects_or_a_table(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    wishes = read(str(tmp_path / name))
    assert [wish.source for wish in wishes] == [f"{name}, entry 1", f"{name}, entry 2"]
    found = [fitted(wish, SPACE).params for wish in wishes]
    assert found[0] == {"kind": "cnn", "filters": 16, "pool": False, "rate": 1e-3}
    assert found[1] == {"kind": "mlp", "layers": 3, "units_0": 8, "units_1": 8, "units_2": 8, "rate": 1e-4}


def test_one_object_is_one_configuration(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps(ONE, indent=2))
    assert [dict(wish.params) for wish in read(str(tmp_path / "one.json"))] == [ONE]
    assert read(None) == []


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("a.json", "{kind: cnn}", "a.json is none of these: "),
        ("a.json", "[]", "a.json has none"),
        ("a.csv", "kind,rate\n", "a.csv has none"),
        ("a.csv", "", "a.csv has none"),
        ("a.json", '[{"rate": 0.1}, 3]', "a.json, entry 2 must be a JSON object of names and values, but is 3"),
        ("a.csv", "rate,rate\n1,2\n", "names 'rate' twice"),
        ("a.json", '{"rate": 1, "rate": 2}', "names 'rate' twice"),
        ("a.csv", f"rate\n{'9' * 200_000}\n", "cannot be read: field larger"),
        ("a.json", "[" * 100_000, "is none of these"),
        ("a.csv", "kind,rate\ncnn\n", "a.csv, entry 1 must have 2 fields, as the header has, but has 1"),
    ],
)
def test_what_is_no_list_of_configurations_is_one_line(tmp_path: Path, name: str, text: str, why: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(RequestError) as caught:
        read(str(tmp_path / name))
    assert why in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="none.json cannot be read: No such file"):
        read(str(tmp_path / "none.json"))
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RequestError, match="it is no UTF-8 text"):
        read(str(tmp_path / "bytes.json"))


def test_the_plan_must_have_room() -> None:
    check_room(3, [Wish({}, "a")] * 2, "a.json")
    with pytest.raises(RequestError, match="--trials must be at least 4, for the baseline and the 3 configurations of"):
        check_room(3, [Wish({}, "a")] * 3, "a.json")


# Fitting.


@pytest.mark.parametrize(
    ("params", "why"),
    [
        ({"rate": 1.0}, "entry 7: rate must be in float 0.0001..0.1 on a log scale, but got 1.0"),
        ({"layers": "two"}, "entry 7: layers must be in int 1..3, but got 'two'"),
        ({"layers": 2.0}, "entry 7: layers must be in int 1..3, but got 2.0"),
        ({"kind": None}, "entry 7: kind must be in {'mlp', 'cnn'}, but got None"),
        ({"rte": 0.1}, "entry 7: 'rte' must be a parameter of the space (did you mean 'rate'?), which has kind, "),
        ({"filters": 9}, "entry 7: filters must be in int 8..64 in steps of 8, but got 9"),  # though it is not active
        ({"rate": 10**400}, "entry 7: rate must be in float 0.0001..0.1 on a log scale, but got 1000"),
        ({"rate": float("nan")}, "entry 7: rate must be in float 0.0001..0.1 on a log scale, but got nan"),
    ],
)
def test_a_name_or_value_that_the_space_lacks_is_refused(params: dict[str, Any], why: str) -> None:
    with pytest.raises(RequestError) as caught:
        fitted(Wish(params, "a.json, entry 7"), SPACE)
    assert why in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_left_out_takes_its_default_and_what_is_not_active_is_reported() -> None:
    found = fitted(Wish({"filters": 16, "layers": 2}, "a"), SPACE)
    assert found.params == {"kind": "mlp", "layers": 2, "units_0": 8, "units_1": 8, "rate": 1e-4}
    assert found.defaulted == ("kind", "units_0", "units_1", "rate")
    assert found.unused == ("filters",)


def test_declarations_of_one_name_are_told_apart_by_key_or_by_what_is_active() -> None:
    def build(ask: Any) -> None:
        if ask("wide", Domain("boolean")):
            ask("units", Domain("int", 256, 512))
        else:
            ask("units", Domain("int", 8, 64))

    space = space_of(build, {"wide": True})
    assert set(space.parameters) == {"wide", "units", "units~2"}
    assert fitted(Wish({"wide": True, "units~2": 300}, "a"), space).params == {"wide": True, "units~2": 300}
    assert fitted(Wish({"wide": True, "units": 300}, "a"), space).params == {"wide": True, "units~2": 300}
    assert fitted(Wish({"units": 16}, "a"), space).params == {"wide": False, "units": 16}
    with pytest.raises(RequestError, match="units must be in int 256..512, but got 16"):
        fitted(Wish({"wide": True, "units": 16}, "a"), space)


def test_text_of_a_table_is_read_as_what_the_parameter_takes() -> None:
    def build(ask: Any) -> None:
        ask("flag", Domain("boolean"))
        ask("code", Domain("choice", values=("16", "32")))
        ask("size", Domain("choice", values=(16, 32)))
        ask("rate", Domain("float", 0, 1))

    given = {"flag": "True", "code": "32", "size": "32", "rate": "1e-1"}
    assert fitted(Wish(given, "a", as_text=True), space_of(build)).params == {
        "flag": True,
        "code": "32",
        "size": 32,
        "rate": 0.1,
    }
    given = {"flag": "false", "code": "16", "size": "32.0", "rate": ".5"}  # as spreadsheets and pandas write them
    assert list(fitted(Wish(given, "a", as_text=True), space_of(build)).params.values()) == [False, "16", 32, 0.5]
    wide = space_of(lambda ask: ask("n", Domain("int", 0, 2**62)))
    exact = str(10**17 + 1)  # no float is this number
    assert fitted(Wish({"n": exact}, "a", as_text=True), wide).params == {"n": 10**17 + 1}
    with pytest.raises(RequestError, match="size must be in {16, 32}, but got '32.5'"):
        fitted(Wish({"size": "32.5"}, "a", as_text=True), space_of(build))
    with pytest.raises(RequestError, match="size must be in {16, 32}, but got '32'"):
        fitted(Wish({"size": "32"}, "a"), space_of(build))


# Running.


def wished(*params: dict[str, Any]) -> list[Wish]:
    return [Wish(one, f"a.json, entry {number}") for number, one in enumerate(params, 1)]


def enqueueing(journal: Journal, wishes: list[Wish], said: list[str] | None = None) -> Callable[[Any], None]:
    return lambda found: queue(journal, wishes, 7, (said if said is not None else []).append)


@pytest.fixture
def body() -> Body:
    return study(RATE, UNITS, score=lambda p: p["rate"] * p["units"])


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_enqueued_configurations_come_first_and_count(tmp_path: Path, body: Body, slots: int, sampler: str) -> None:
    from search.samplers import get_sampler, proposal_for

    said: list[str] = []
    wishes = wished({"units": 9, "rate": 0.5}, {"units": 4}, {"units": 9, "rate": 0.5}, {"rate": 1e-3})
    with Journal.create(tmp_path / "j.sqlite", {}) as journal:
        chosen = get_sampler(sampler)
        begin = enqueueing(journal, wishes, said)
        assert driver(journal, body, trials=30, slots=slots, sampler=chosen, on_preflight=begin).run() == "complete"
        trials = journal.history()
        assert [t.number for t in trials] == list(range(30))
        assert [dict(t.params) for t in trials[:3]] == [
            {"rate": 0.1, "units": 4},
            {"rate": 0.5, "units": 9},
            {"rate": 1e-3, "units": 4},
        ]
        assert [source(t) for t in trials[:4]] == [None, "a.json, entry 1", "a.json, entry 4", None]
        assert {(t.state, t.attempt) for t in trials} == {(TrialState.COMPLETE, 0)}
        assert len({t.seed for t in trials}) == 30
        for trial in trials[3:]:
            history, space = journal.history(trial.history_length), journal.space(trial.history_length)
            again = proposal_for(chosen, history, space, 7, trial.number)
            assert again is not None and dict(again.params) == dict(trial.params)
    assert said == [
        "a.json, entry 2 is the same configuration as the baseline, so it is not tried again",
        "a.json, entry 3 is the same configuration as a.json, entry 1, so it is not tried again",
        "2 configurations enqueued, to be tried first; where they leave out units, the default stands in",
    ]


class Dies(Exception):
    """The driver's end, at a moment of the test's choosing."""


@pytest.mark.parametrize("ended", [1, 2, 4])
def test_what_was_enqueued_outlives_the_driver(tmp_path: Path, body: Body, ended: int) -> None:
    wishes = wished({"units": 9}, {"units": 8}, {"units": 7})
    with Journal.create(tmp_path / "whole.sqlite", {}) as whole:
        driver(whole, body, trials=8, on_preflight=enqueueing(whole, wishes)).run()
        expected = [(t.number, dict(t.params), t.seed, t.score, t.attempt) for t in whole.history()]

    class Dying(InlineExecutor):
        def submit(self, job: Any, slot: Slot | None) -> None:
            if job.kind == "trial" and job.payload["number"] == ended:
                raise Dies
            super().submit(job, slot)

    with Journal.create(tmp_path / "cut.sqlite", {}) as cut:
        begin = enqueueing(cut, wishes)
        with pytest.raises(Dies):
            driver(cut, body, trials=8, executor=Dying(body, [Slot(0, 1)]), on_preflight=begin).run()
        waiting = [t.number for t in unbegun(cut.history())]
        assert waiting == list(range(ended + 1, 4))
    with Journal.open(tmp_path / "cut.sqlite") as cut:
        driver(cut, body, trials=8, discovery=None).run()
        found = [(t.number, dict(t.params), t.seed, t.score, t.attempt) for t in cut.history()]
    # The one that had begun ran again, which is its second attempt.
    assert found == [(*one[:4], one[4] + (one[0] == ended)) for one in expected]


def test_a_configuration_that_does_not_fit_stops_before_a_second_trial(tmp_path: Path, body: Body) -> None:
    wishes = wished({"units": 9}, {"units": 99})
    with Journal.create(tmp_path / "j.sqlite", {}) as journal:
        with pytest.raises(RequestError, match="a.json, entry 2: units must be in int 1..9, but got 99"):
            driver(journal, body, on_preflight=enqueueing(journal, wishes)).run()
        assert [t.number for t in journal.history()] == [0]


def test_a_baseline_that_runs_again_meanwhile_is_not_enqueued_twice(tmp_path: Path) -> None:
    with Journal.create(tmp_path / "j.sqlite", {}) as journal:
        journal.adopt(Space.empty())
        begun = Trial(0, TrialState.RUNNING, started=1.0)
        journal.begin(begun)
        journal.queue(begun.moved(TrialState.WAITING))
        queue(journal, [], 7, print)
        assert unbegun(journal.history()) == []


# The command.


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_enqueued_configurations_survive_a_killed_driver(tmp_path: Path, heldout: Heldout) -> None:
    space = write_space(tmp_path)
    file = tmp_path / "first.json"
    file.write_text(json.dumps([{"layers": 2}, {"rate": 0.001}, {"layers": 2, "rate": 0.003}]))
    where = ("--workspace", str(tmp_path / "ws"))
    plan = ("launch", space, "--trials", "6", "--workers", "1", "--evaluate", "no", "--enqueue", str(file), *where)
    command = [sys.executable, "-m", "search.cli", *plan, "--study", "cut"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT) as process:
        assert process.stderr is not None
        assert any(line.startswith("trial 1 ") for line in process.stderr)
        process.kill()
    file.unlink()  # the study has it
    resumed = heldout("resume", "cut", *where, "--json")
    assert resumed.returncode == 0, resumed.stderr
    trials = Study("cut", tmp_path / "ws").trials
    assert [source(t) for t in trials] == [None, *(f"first.json, entry {n}" for n in (1, 2, 3)), None, None]
    assert [(t.params["layers"], t.params["rate"]) for t in trials[1:4]] == [(2, 1e-2), (1, 1e-3), (2, 3e-3)]
    assert "enqueued: first.json, entry 2" in heldout("show", "cut", "2", *where).stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_file_that_does_not_fit_leaves_no_study_behind(tmp_path: Path, heldout: Heldout) -> None:
    space = write_space(tmp_path)
    (tmp_path / "first.csv").write_text("layers,rate\n2,0.001\n2,7\n")
    where = ("--workspace", str(tmp_path / "ws"))
    ran = heldout("launch", space, "--trials", "6", "--enqueue", str(tmp_path / "first.csv"), *where)
    assert ran.returncode == 2
    assert "first.csv, entry 2: rate must be in float" in ran.stderr
    assert not list((tmp_path / "ws" / "studies").iterdir())

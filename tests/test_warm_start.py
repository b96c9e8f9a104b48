"""Starting from what earlier studies learned: what is carried over, in which terms, and what marks the study for it."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from search.definition.domain import Domain
from search.definition.space import Parameter, Space
from search.errors import DataError, RequestError, StudyError
from search.guard.belief import paragraph
from search.loop import warm_start
from search.loop.enqueueing import queue, source
from search.record.journal import Journal
from search.samplers import Proposal, get_sampler, proposal_for
from search.shown.report import lines, status_line
from search.study import Study, StudyConfig
from search.tracker.runs import study_tags
from search.trial import Trial, TrialState
from tests.conftest import Heldout
from tests.test_driver import RATE, UNITS, driver, study
from tests.test_samplers import flat, space_of
from tests.tiny import PARTS, write_space

MOMENTUM = Parameter("momentum", "momentum", (), Domain("float", 0, 1, default=0.9))
NARROW = Parameter("rate", "rate", (), Domain("float", 0.01, 0.2, sampling="log", default=0.02))


def score(params: dict[str, Any]) -> float:
    return float(params["units"]) - 10 * abs(float(params["rate"]) - 0.05)


def meta(name: str, digest: str = "here", **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "study_id": f"id of {name}",
        "objective": "val_accuracy",
        "direction": "max",
        "data": {"digest": digest},
        "config": {"sampler": "tpe"},
        "space": {"name": "tiny"},
    } | changes


def earlier(workspace: Path, name: str = "old", trials: int = 12, digest: str = "here", **changes: Any) -> Study:
    """A study that has run, with a record and without processes."""
    folder = workspace / "studies" / name
    folder.mkdir(parents=True)
    with Journal.create(folder / "journal.sqlite", {"study": meta(name, digest, **changes)}) as journal:
        driver(journal, study(RATE, UNITS, score=score), trials=trials).run()
        journal.put("state", "COMPLETE")
    return Study(name, workspace)


def learned(*found: Study, digest: str = "here", is_allowed: bool = False) -> list[dict[str, Any]]:
    kept = warm_start.record(found, digest, is_allowed)
    return list(json.loads(json.dumps(kept)))  # as the journal gives it back


def space_with(*parameters: Parameter) -> Space:
    return Space.empty().grown([{**p.to_json(), "value": p.domain.default} for p in parameters])


HERE = space_with(RATE, UNITS)


# What is recorded.


def test_the_record_has_every_configuration_the_best_first(tmp_path: Path) -> None:
    old = earlier(tmp_path)
    (one,) = learned(old)
    losses = {t.number: t.loss for t in old.trials}
    assert [trial["loss"] for trial in one["trials"]] == sorted(losses.values())
    assert all(losses[trial["number"]] == trial["loss"] for trial in one["trials"])
    assert warm_start.brief([one]) == [
        {
            "study": "old",
            "study_id": "id of old",
            "objective": "val_accuracy",
            "other_data": False,
            "trials": 12,
        }
    ]


def test_a_configuration_that_was_trained_again_counts_with_its_mean() -> None:
    done = [Trial(n, TrialState.COMPLETE, {"units": n}, loss=float(n)) for n in range(3)]
    again = [Trial(3 + n, TrialState.COMPLETE, {"units": 0}, loss=3.0, confirms=0) for n in range(2)]
    failed = Trial(5, TrialState.FAILED, {"units": 9}, reason="crash")
    found = warm_start._learned([*done, *again, failed])
    assert [(one["number"], one["loss"]) for one in found] == [(1, 1.0), (0, 2.0), (2, 2.0)]


def test_very_many_configurations_are_thinned_evenly() -> None:
    trials = [Trial(n, TrialState.COMPLETE, {"units": n}, loss=float(n)) for n in range(5000)]
    found = warm_start._learned(trials)
    assert len(found) == 1000
    assert [one["loss"] for one in found[:2]] == [0.0, 5.0] and found[-1]["loss"] == 4995.0


def test_a_study_must_exist_and_have_a_complete_trial(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="there is no study called 'none'"):
        warm_start.studies(StudyConfig(space="s", warm_start=["none"]), tmp_path)
    folder = tmp_path / "studies" / "empty"
    folder.mkdir(parents=True)
    Journal.create(folder / "journal.sqlite", {"study": meta("empty")}).close()
    with pytest.raises(StudyError, match="must have a complete trial, but 'empty' has none"):
        warm_start.studies(StudyConfig(space="s", warm_start="empty"), tmp_path)
    with pytest.raises(RequestError, match="--warm-start-other-data goes with --warm-start STUDY"):
        StudyConfig(space="s", warm_start_other_data=True)


# Other data.


def test_other_rows_are_refused_unless_asked_for_and_marked_then(tmp_path: Path) -> None:
    old = earlier(tmp_path, digest="elsewhere")
    with pytest.raises(DataError) as caught:
        learned(old)
    assert "study 'old' must have this study's rows in the same split" in str(caught.value)
    assert "--warm-start-other-data" in str(caught.value) and "\n" not in str(caught.value)
    (one,) = learned(old, is_allowed=True)
    assert one["other_data"] is True


def test_what_a_study_has_from_other_rows_stays_marked_in_those_that_follow(tmp_path: Path) -> None:
    tainted = [{"study": "first", "other_data": True, "trials": 9}]
    old = earlier(tmp_path, warm_start=tainted)
    with pytest.raises(DataError, match="it was itself warm-started from others"):
        learned(old)
    (one,) = learned(old, is_allowed=True)
    assert one["other_data"] is True


def told(other_data: bool) -> dict[str, Any]:
    return {
        "study": "new",
        "state": "COMPLETE",
        "planned": 9,
        "trials": {"complete": 9, "pruned": 0, "failed": 0},
        "confirmed": 0,
        "deleted": 0,
        "kept": 9,
        "running": [],
        "sampler": "tpe",
        "objective": "val_accuracy",
        "best": None,
        "failures": {},
        "retries": {},
        "seconds": 1.0,
        "because": None,
        "warm_start": [{"study": "old", "other_data": other_data, "trials": 12}],
    }


def test_report_status_and_mlflow_say_where_it_started_from() -> None:
    said = "\n".join(lines(told(True)))
    assert "warm start from study old (12 configurations): other rows or another split" in said
    assert "rows that may be test rows here" in said
    assert "the same rows and split" in "\n".join(lines(told(False)))
    assert ", sampler tpe, warm start from old (other data)" in status_line(told(True))
    assert "warm start from old;" in status_line(told(False))
    tags = study_tags(meta("new", warm_start=told(True)["warm_start"], tags={}, versions={}))
    assert tags["heldout.warm_start"] == "old" and tags["heldout.warm_start_other_data"] == "true"
    assert "heldout.warm_start" not in study_tags(meta("new"))


def test_a_test_score_after_a_warm_start_from_other_rows_is_not_vouched_for() -> None:
    found: dict[str, Any] = {
        **{"study": "new", "state": "COMPLETE", "objective": "val_mse", "direction": "min", "proportion": False},
        **{"best": {"trial": 1, "validation": 1.0}, "winner": None, "baseline": None, "corrected": None},
        **{"noise_floor": None, "gains": None, "confirmation": None, "sealed": None, "verdicts": [], "final": None},
        "trials": {"complete": 9, "pruned": 0, "failed": 0},
        "data": {"tiers": {"validation": 20, "guard": 20}},
        "test": {"winner": 2.0, "opening": 1, "rows": 40, "interval": None, "gain": None, "gap": None, "level": None},
    }
    assert paragraph({**found, "warm_start": []}).startswith("Believe the test mse (lower is better) of 2")
    marked = paragraph({**found, "warm_start": told(True)["warm_start"]})
    assert marked.startswith("The test mse (lower is better) is 2") and "by which all scores may flatter" in marked


# What is tried first.


def test_the_best_three_of_each_study_come_first(tmp_path: Path) -> None:
    old, older = earlier(tmp_path), earlier(tmp_path, "older", trials=8)
    recorded = learned(old, older)
    found = warm_start.wishes(recorded, HERE, room=20)
    assert [wish.source.split(" of ")[1] for wish in found] == ["old"] * 3 + ["older"] * 3
    best = [one for one in recorded[0]["trials"] if one["params"] != HERE.defaults()][:3]
    assert [dict(wish.params) for wish in found[:3]] == [one["params"] for one in best]
    assert len({HERE.signature(wish.params) for wish in found}) == 6  # distinct, though one seed ran both
    assert len(warm_start.wishes(recorded, HERE, room=4)) == 4
    assert warm_start.wishes(recorded, HERE, room=0) == []


def test_values_out_of_bounds_are_dropped_and_new_parameters_take_their_defaults(tmp_path: Path) -> None:
    space = space_with(NARROW, UNITS, MOMENTUM)
    recorded = learned(earlier(tmp_path, trials=20))
    found = warm_start.wishes(recorded, space, room=20)
    for wish in found:
        assert wish.params["momentum"] == 0.9 and 0.01 <= wish.params["rate"] <= 0.2
        assert "out of bounds" not in wish.source  # those that fit as they were come first
    few = [{**recorded[0], "trials": [{"number": 4, "params": {"rate": 0.5, "units": 9}, "loss": 0.0}]}]
    (cut,) = warm_start.wishes(few, space, room=20)
    assert dict(cut.params) == {"rate": 0.02, "units": 9, "momentum": 0.9}
    assert cut.source == "trial 4 of old, but for values that are out of bounds"


def test_declarations_are_matched_by_name_whatever_their_key() -> None:
    def build(ask: Any) -> None:
        if ask("wide", Domain("boolean")):
            ask("units", Domain("int", 256, 512))
        else:
            ask("units", Domain("int", 8, 64))

    there, here = space_of(build, {"wide": True}), flat(wide=Domain("boolean"), units=Domain("int", 8, 512))
    names = {key: p.name for key, p in there.parameters.items() if key != p.name}
    assert names == {"units~2": "units"}
    assert warm_start._carried({"wide": True, "units~2": 300}, names, here) == ({"wide": True, "units": 300}, True, [])
    back = warm_start._carried({"wide": True, "units": 300}, {}, there)
    assert back == ({"wide": True, "units~2": 300}, True, [])
    assert warm_start._carried({"wide": True, "units": 9}, {}, there) == ({"wide": True, "units~2": 256}, False, [])
    assert warm_start._carried({"wide": True, "batch": 9}, {}, there)[2] == ["batch"]


# What samplers see.


class Seeing:
    """Keeps the history that it was shown."""

    name = "seeing"

    def __init__(self) -> None:
        self.seen: list[Trial] = []

    def ask(self, history: Sequence[Trial], space: Space, seed: int) -> Proposal:
        self.seen = list(history)
        return Proposal(space.sample(random.Random(seed)))


def informed(recorded: Sequence[Any], objective: str = "val_accuracy") -> tuple[warm_start.Informed, Seeing]:
    seeing = Seeing()
    return warm_start.Informed(seeing, recorded, objective, "max"), seeing


def test_the_history_begins_with_the_other_studies(tmp_path: Path) -> None:
    recorded = learned(earlier(tmp_path))
    sampler, seeing = informed(recorded)
    own = [Trial(0, TrialState.COMPLETE, HERE.defaults(), loss=-1.0), Trial(1, TrialState.RUNNING, {"units": 3})]
    assert proposal_for(sampler, own, HERE, 7, 2) is not None
    assert [t.number for t in seeing.seen] == [*range(-12, 0), 0, 1]
    assert [(dict(t.params), t.loss) for t in seeing.seen[:12]] == [
        (one["params"], one["loss"]) for one in recorded[0]["trials"]
    ]
    # Those that the space lacks now are passed over, and the others keep their numbers.
    sampler.ask(own, space_with(NARROW, UNITS), 0)
    kept = {t.number for t in seeing.seen if t.number < 0}
    assert kept == {n - 12 for n, one in enumerate(recorded[0]["trials"]) if 0.01 <= one["params"]["rate"] <= 0.2}


def test_a_configuration_of_another_study_may_be_tried_here() -> None:
    space = flat(a=Domain("int", 1, 2))
    recorded = [{"study": "old", "objective": "val_accuracy", "direction": "max", "other_data": False, "names": {}}]
    recorded[0]["trials"] = [{"number": n, "params": {"a": n}, "loss": 0.0} for n in (1, 2)]
    sampler, _ = informed(recorded)
    found = proposal_for(sampler, [Trial(0, TrialState.COMPLETE, {"a": 1}, loss=1.0)], space, 7, 1)
    assert found is not None and found.params == {"a": 2}


def test_losses_of_another_measure_are_put_on_this_studys_scale(tmp_path: Path) -> None:
    recorded = learned(earlier(tmp_path, digest="elsewhere"), is_allowed=True)
    sampler, seeing = informed(recorded)
    theirs = {n - 12: one["loss"] for n, one in enumerate(recorded[0]["trials"])}
    # Here every loss is a tenth of what it was there, and 100 more.
    both = [recorded[0]["trials"][place] for place in (0, 3, 11)]
    own = [Trial(n, TrialState.COMPLETE, t["params"], loss=100 + t["loss"] / 10) for n, t in enumerate(both)]
    sampler.ask(own, HERE, 0)
    assert {t.number: t.loss for t in seeing.seen[:12]} == pytest.approx(
        {number: 100 + loss / 10 for number, loss in theirs.items()}
    )
    other = Trial(3, TrialState.COMPLETE, {"rate": 0.0123, "units": 3}, loss=100.0)
    sampler.ask([other], HERE, 0)  # nothing says what their scale is worth on this one
    assert seeing.seen == [other]
    against = [Trial(n, TrialState.COMPLETE, t["params"], loss=100 - t["loss"]) for n, t in enumerate(both)]
    sampler.ask(against, HERE, 0)  # what is good there is bad here
    assert len({t.loss for t in seeing.seen[:12]}) == 1
    # Two that are almost alike say little of how steep the line is.
    recorded[0]["trials"][1]["loss"] = recorded[0]["trials"][0]["loss"] + 1e-9
    near = [Trial(n, TrialState.COMPLETE, recorded[0]["trials"][n]["params"], loss=float(n)) for n in (0, 1)]
    sampler, seeing = informed(recorded)
    sampler.ask(near, HERE, 0)
    assert max(abs(t.loss or 0.0) for t in seeing.seen[:12]) < 20
    recorded[0]["trials"][11]["loss"] = 1.7e308
    sampler, seeing = informed(recorded)
    sampler.ask(near, HERE, 0)
    assert all(math.isfinite(t.loss or 0.0) for t in seeing.seen)
    sampler, seeing = informed(learned(earlier(tmp_path / "again", digest="elsewhere"), is_allowed=True))
    sampler.ask(own[:1], HERE, 0)  # one is enough to shift by
    best = seeing.seen[0].loss
    assert best == pytest.approx(own[0].loss)
    sampler.ask([], HERE, 0)
    assert seeing.seen[0].loss == recorded[0]["trials"][0]["loss"]


def test_a_study_with_another_objective_counts_as_another_measure(tmp_path: Path) -> None:
    recorded = learned(earlier(tmp_path))
    sampler, seeing = informed(recorded, objective="val_auc")
    own = [Trial(0, TrialState.COMPLETE, recorded[0]["trials"][0]["params"], loss=5.0)]
    sampler.ask(own, HERE, 0)
    assert seeing.seen[0].loss == pytest.approx(5.0)


@pytest.mark.parametrize("name", ["tpe", "random"])
def test_every_proposal_can_be_made_again_from_the_journal_alone(tmp_path: Path, name: str) -> None:
    recorded = learned(earlier(tmp_path, trials=25))
    config = StudyConfig(space="s", sampler=name)
    with Journal.create(tmp_path / "new.sqlite", {"study": meta("new"), "warm_start": recorded}) as journal:
        chosen = warm_start.sampler(journal, config)
        begin: Callable[[Any], None] = lambda _: queue(  # noqa: E731
            journal, warm_start.wishes(recorded, journal.space(), 9), 7, lambda _: None
        )
        body = study(RATE, UNITS, score=score)
        driver(journal, body, trials=10, slots=2, sampler=chosen, on_preflight=begin).run()
    with Journal.open(tmp_path / "new.sqlite", read_only=True) as journal:
        again = warm_start.sampler(journal, config)
        trials = journal.history()
        assert [source(t) is not None for t in trials] == [False, True, True, True, *[False] * 6]
        for trial in trials[4:]:
            history, space = journal.history(trial.history_length), journal.space(trial.history_length)
            found = proposal_for(again, history, space, 7, trial.number)
            assert found is not None and dict(found.params) == dict(trial.params)
        if name == "tpe":  # it learns from them at once, where it would begin at random
            alone = proposal_for(get_sampler(name), history, space, 7, trial.number)
            assert alone != found


def test_prior_knowledge_makes_proposals_better() -> None:
    space = flat(**{f"x{number}": Domain("float", 0, 1) for number in range(3)})

    def loss(params: Any) -> float:
        return sum((float(x) - 0.8) ** 2 for x in params.values())

    draws = [space.sample(random.Random(n)) for n in range(60)]
    recorded = [{"study": "old", "objective": "val_accuracy", "direction": "max", "other_data": True, "names": {}}]
    recorded[0]["trials"] = [{"number": n, "params": p, "loss": 1000 * loss(p)} for n, p in enumerate(draws)]
    own = [Trial(0, TrialState.COMPLETE, draws[0], loss=loss(draws[0]))]
    own += [Trial(1, TrialState.COMPLETE, draws[1], loss=loss(draws[1]))]
    means = []
    for sampler in (warm_start.Informed(get_sampler("tpe"), recorded, "val_accuracy", "max"), get_sampler("tpe")):
        means.append(sum(loss(sampler.ask(own, space, seed).params) for seed in range(20)) / 20)
    assert means[0] < means[1] / 2


# The command.


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_study_starts_from_another_one_and_other_rows_are_marked(tmp_path: Path, heldout: Heldout) -> None:
    space = write_space(tmp_path)
    other = write_space(tmp_path, "other", load=PARTS["load"].replace("default_rng(0)", "default_rng(1)"))
    options = ("--trials", "5", "--workers", "2", "--evaluate", "no", "--workspace", str(tmp_path / "ws"))
    assert heldout("launch", space, "--study", "old", *options).returncode == 0
    warm = heldout("launch", space, "--study", "new", "--warm-start", "old", *options, "--json")
    assert warm.returncode == 0, warm.stderr
    found = json.loads(warm.stdout)
    assert [(one["study"], one["other_data"], one["trials"]) for one in found["warm_start"]] == [("old", False, 5)]
    old, new = Study("old", tmp_path / "ws"), Study("new", tmp_path / "ws")
    assert [source(t) is not None for t in new.trials] == [False, True, True, True, False]
    assert dict(new.trials[1].params) in [dict(t.params) for t in old.trials]

    refused = heldout("launch", other, "--study", "far", "--warm-start", "old", *options)
    assert refused.returncode == 2 and "--warm-start-other-data" in refused.stderr
    assert not (tmp_path / "ws" / "studies" / "far").exists()
    far = heldout("launch", other, "--study", "far", "--warm-start", "old", "--warm-start-other-data", *options)
    assert far.returncode == 0, far.stderr
    assert "other rows or another split" in far.stdout
    assert "warm start from old (other data)" in heldout("status", "far", "--workspace", str(tmp_path / "ws")).stdout

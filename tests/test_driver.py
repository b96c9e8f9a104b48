"""The search loop, over an executor without processes, a real journal and a judge that reads the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from search.definition.space import Domain, Parameter, Space
from search.errors import SpaceError, StudyFailed, TrialFailed
from search.executors import Exited, Job, Lost, Message, Slot
from search.executors.inline import InlineExecutor
from search.guard.finalists import Confirmation, plan
from search.loop.attempt import Verdict
from search.loop.driver import MOST_FAILURES_IN_A_ROW, Driver
from search.loop.ends import Ends
from search.loop.watcher import Silent
from search.processes.jobs import call
from search.record.journal import Journal
from search.samplers import get_sampler, proposal_for
from search.trial import Trial, TrialState, searched, seed_for

RATE = Parameter("rate", "rate", (), Domain("float", 1e-4, 1.0, sampling="log", default=0.1))
UNITS = Parameter("units", "units", (), Domain("int", 1, 9, 1, default=4))
LATE = Parameter("late", "late", (), Domain("boolean", default=False))

Body = Callable[[dict[str, Any], Callable[[dict[str, Any]], None]], None]


def asks_for(proposal: dict[str, Any] | None, *parameters: Parameter) -> list[dict[str, Any]]:
    """What a build would log: the proposed value, else the default."""
    given = proposal or {}
    return [{**p.to_json(), "value": given.get(p.identity, p.domain.default)} for p in parameters]


def result(asks: list[dict[str, Any]], score: float) -> dict[str, Any]:
    return {
        "type": "result",
        "asks": asks,
        "score": score,
        "epochs": 2,
        "best_epoch": 1,
        "size": 10,
        "weights": "w",
        "reported": {},
        "devices": [],
        "declaration": {},
    }


def study(*parameters: Parameter, score: Callable[[dict[str, Any]], float]) -> Body:
    """Jobs of a space with these parameters, where a trial's score is a function of its values."""

    def body(job: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
        payload = job["payload"]
        asks = asks_for(payload.get("proposal"), *parameters)
        if job["kind"] == "discover":
            send({"type": "result", "space": Space.empty().grown(asks).to_json(), "complete": True})
            return
        if payload["number"] == 0:
            send({"type": "preflight", "asks": asks})
        for step in (1, 2):
            send({"type": "report", "step": step, "metrics": {"loss": 1.0 / step}})
        send(result(asks, score({ask["name"]: ask["value"] for ask in asks})))

    return body


class ReadingJudge:
    """Takes the score from the result, and keeps the guard score apart."""

    def judge(self, result: dict[str, Any]) -> Verdict:
        if result["score"] != result["score"]:
            raise TrialFailed("nan", "the score is NaN")
        return Verdict(result["score"], guard=-result["score"])

    def settle(self, result: dict[str, Any]) -> Verdict:
        raise AssertionError("no metric of this study is custom")


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    made = Journal.create(tmp_path / "journal.sqlite", {})
    yield made
    made.close()


def driver(journal: Journal, body: Body | Any, *, trials: int = 12, slots: int = 1, **changes: Any) -> Driver:
    executor = changes.pop("executor", None) or InlineExecutor(body, [Slot(n, 1) for n in range(slots)])
    settings: dict[str, Any] = {
        "ends": Ends(trials),
        "seed": 7,
        "direction": "max",
        "journal": journal,
        "sampler": get_sampler("random"),
        "executor": executor,
        "judge": ReadingJudge(),
        "payload": lambda trial, proposal: {"number": trial.number, "attempt": trial.attempt, "proposal": proposal},
        "discovery": {},
        "on_preflight": lambda found: None,
    }
    return Driver(**(settings | changes))


def test_every_trial_of_the_plan_is_recorded_with_its_score(journal: Journal) -> None:
    ended = driver(journal, study(RATE, UNITS, score=lambda p: p["units"] / 10)).run()

    trials = journal.history()
    assert ended == "complete"
    assert [t.number for t in trials] == list(range(12))
    assert all(t.state is TrialState.COMPLETE and t.score == t.params["units"] / 10 for t in trials)
    assert all(t.loss == -t.score for t in trials if t.score is not None)
    assert len(journal.reports()) == 24


def test_trial_zero_is_the_defaults(journal: Journal) -> None:
    driver(journal, study(RATE, UNITS, score=lambda p: 0.5), trials=1).run()
    assert dict(journal.history()[0].params) == {"rate": 0.1, "units": 4}


def test_guard_scores_stay_out_of_the_history(journal: Journal) -> None:
    driver(journal, study(RATE, score=lambda p: p["rate"]), trials=4).run()
    assert sorted(number for number, _ in journal.guards()) == [0, 1, 2, 3]
    assert all(t.score is not None and t.score > 0 for t in journal.history())


def test_the_same_seed_gives_the_same_trials(tmp_path: Path) -> None:
    seen = []
    for run in range(2):
        with Journal.create(tmp_path / f"{run}.sqlite", {}) as journal:
            driver(journal, study(RATE, UNITS, score=lambda p: p["rate"]), sampler=get_sampler("tpe")).run()
            seen.append([(dict(t.params), t.score, t.seed) for t in journal.history()])
    assert seen[0] == seen[1]


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_every_proposal_can_be_made_again_from_the_history_it_saw(journal: Journal, slots: int, sampler: str) -> None:
    chosen = get_sampler(sampler)
    body = study(RATE, UNITS, score=lambda p: p["rate"] * p["units"])
    driver(journal, body, trials=30, slots=slots, sampler=chosen).run()

    for trial in journal.history()[1:]:
        history, space = journal.history(trial.history_length), journal.space(trial.history_length)
        again = proposal_for(chosen, history, space, 7, trial.number)
        assert again is not None and dict(again.params) == dict(trial.params)


def test_proposals_made_while_a_trial_brings_news_of_the_space_can_be_made_again(journal: Journal) -> None:
    class Chatty(InlineExecutor):
        """Hands out what a trial asks for at once, and its end only a poll later, as a process would."""

        kept: list[Any] = []

        def poll(self, timeout: float) -> list[Any]:
            said, self.kept = self.kept, []
            for event in super().poll(timeout):
                early = isinstance(event, Message) and event.body["type"] in ("asks", "preflight")
                (said if early or event.job.startswith("discover") else self.kept).append(event)
            return said

    def body(job: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
        if job["kind"] == "discover":
            asks = asks_for(None, RATE)
            send({"type": "result", "space": Space.empty().grown(asks, complete=False).to_json(), "complete": True})
            return
        proposal = job["payload"]["proposal"]
        high = asks_for(proposal, RATE)[0]["value"] > 0.01
        asks = asks_for(proposal, RATE, *((LATE, UNITS) if high else ()))
        send({"type": "asks", "asks": asks})
        if job["payload"]["number"] == 0:
            send({"type": "preflight", "asks": asks})
        send(result(asks, asks[0]["value"]))

    sampler = get_sampler("random")
    driver(journal, body, trials=25, executor=Chatty(body, [Slot(n, 1) for n in range(3)])).run()
    for trial in journal.history()[1:]:
        history, space = journal.history(trial.history_length), journal.space(trial.history_length)
        again = proposal_for(sampler, history, space, 7, trial.number)
        # By now the trial has said what it asked for; of what was proposed, nothing may have changed.
        assert again is not None
        assert {key: again.params.get(key) for key in trial.params if key in again.params} == {
            key: value for key, value in trial.params.items() if key in again.params
        }


def test_an_exhausted_space_ends_the_study_and_says_so(journal: Journal) -> None:
    class Listening(Silent):
        heard: list[str] = []

        def say(self, text: str) -> None:
            self.heard.append(text)

    ended = driver(journal, study(UNITS, score=lambda p: 1.0), trials=50, watcher=Listening()).run()
    assert ended == "exhausted"
    assert sorted(t.params["units"] for t in journal.history()) == list(range(1, 10))
    assert any("exhausted" in text for text in Listening.heard)


def test_a_parameter_that_a_trial_asks_for_later_joins_the_search(journal: Journal) -> None:
    def body(job: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
        payload = job["payload"]
        if job["kind"] == "discover":
            asks = asks_for(None, RATE)
            send({"type": "result", "space": Space.empty().grown(asks, complete=False).to_json(), "complete": True})
            return
        asks = asks_for(payload["proposal"], RATE, LATE)  # fit asks for one that build did not
        if payload["number"] == 0:
            send({"type": "preflight", "asks": asks[:1]})
        send(result(asks, 0.5))

    driver(journal, body, trials=15).run()
    assert list(journal.space().parameters) == ["rate", "late"]
    assert {t.params["late"] for t in journal.history()} == {False, True}


def test_a_failed_trial_is_recorded_and_the_study_goes_on(journal: Journal) -> None:
    def body(job: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
        if job["payload"].get("number") in (3, 5):
            send({"type": "asks", "asks": asks_for(job["payload"]["proposal"], RATE)})
            send({"type": "failed", "reason": "oom", "message": "out of memory", "error": None})
        else:
            study(RATE, score=lambda p: 0.5)(job, send)

    assert driver(journal, body, trials=8).run() == "complete"
    failed = [t for t in journal.history() if t.state is TrialState.FAILED]
    assert [(t.number, t.reason, t.message) for t in failed] == [(n, "oom", "out of memory") for n in (3, 5)]
    assert all("rate" in t.params for t in failed)


def test_a_score_that_is_no_number_fails_the_trial_only(journal: Journal) -> None:
    body = study(RATE, score=lambda p: float("nan") if p["rate"] > 0.2 else 0.5)
    driver(journal, body, trials=20).run()
    reasons = {t.reason for t in journal.history() if t.state is TrialState.FAILED}
    assert reasons == {"nan"}


def test_ten_failures_in_a_row_end_the_study_and_say_why(journal: Journal) -> None:
    def body(job: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
        if job["payload"].get("number"):
            send({"type": "failed", "reason": "invalid", "message": "negative width", "error": None})
        else:
            study(RATE, score=lambda p: 0.5)(job, send)

    with pytest.raises(StudyFailed, match=r"10 trials in a row failed.*invalid: negative width"):
        driver(journal, body, trials=40).run()
    assert len(journal.history()) == 1 + MOST_FAILURES_IN_A_ROW


def test_a_process_that_ends_without_a_word_is_a_crash(journal: Journal) -> None:
    def body(job: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
        if job["payload"].get("number") != 2:
            study(RATE, score=lambda p: 0.5)(job, send)

    driver(journal, body, trials=4).run()
    trial = journal.history()[2]
    assert (trial.state, trial.reason) == (TrialState.FAILED, "crash")
    assert "no result" in str(trial.message)


def test_a_wrong_request_found_by_preflight_stops_before_a_second_trial(journal: Journal) -> None:
    def body(job: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
        if job["kind"] == "trial":
            send({"type": "failed", "reason": "invalid", "message": "no such objective", "error": "SpaceError"})
        else:
            study(RATE, score=lambda p: 0.5)(job, send)

    with pytest.raises(SpaceError, match="no such objective"):
        driver(journal, body).run()
    assert len(journal.history()) == 1


def test_a_trial_lost_with_its_process_runs_again_with_its_number_seed_and_parameters(journal: Journal) -> None:
    class Losing(InlineExecutor):
        """Loses the first attempt of trial 2, as when the template is killed."""

        def poll(self, timeout: float) -> list[Any]:
            events = super().poll(timeout)
            lost = [e for e in events if isinstance(e, Exited) and e.job == "trial-2-0"]
            kept = [e for e in events if not (isinstance(e, Message | Exited) and e.job == "trial-2-0")]
            return kept + [Lost(event.job) for event in lost]

    executor = Losing(study(RATE, score=lambda p: p["rate"]))
    driver(journal, None, trials=5, executor=executor).run()
    trials = journal.history()
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 5
    assert [t.attempt for t in trials] == [0, 0, 1, 0, 0]
    begun = [Trial.from_json(e.body) for e in journal.events() if e.kind == "trial" and e.trial == 2]
    assert len({(t.seed, t.history_length) for t in begun}) == 1


def test_what_was_running_when_the_driver_ended_runs_again(tmp_path: Path) -> None:
    body = study(RATE, score=lambda p: p["rate"])
    with Journal.create(tmp_path / "whole.sqlite", {}) as whole:
        driver(whole, body, trials=9).run()
        expected = [(dict(t.params), t.score) for t in whole.history()]

    with Journal.create(tmp_path / "cut.sqlite", {}) as cut:
        driver(cut, body, trials=4).run()
        proposal = proposal_for(get_sampler("random"), cut.history(), cut.space(), 7, 4)
        assert proposal is not None
        running = Trial(4, TrialState.RUNNING, proposal.params, seed_for(7, 4), history_length=cut.length)
        cut.begin(running)
        driver(cut, body, trials=9, discovery=None).run()
        assert [(dict(t.params), t.score) for t in cut.history()] == expected



def test_an_executor_is_told_whether_more_slots_would_be_used(journal: Journal) -> None:
    told: list[tuple[int, bool]] = []

    class Told(InlineExecutor):
        def need(self, more: bool) -> None:
            told.append((len(journal.history()), more))

    executor = Told(study(RATE, score=lambda p: p["rate"]), [Slot(n, 1) for n in range(2)])
    driver(journal, None, trials=6, executor=executor).run()
    assert told[0] == (1, True), "others wait for the baseline alone"
    assert all(more for begun, more in told if 1 < begun < 6)
    assert told[-1] == (6, False)


class Held(InlineExecutor):
    """Keeps the end of some jobs to itself for a while, and loses others."""

    def __init__(self, body: Body, *, slots: int = 1, late: tuple[str, ...] = (), lost: tuple[str, ...] = ()) -> None:
        super().__init__(body, [Slot(n, 1) for n in range(slots)])
        self._late, self._lost, self._waiting, self._polls = late, set(lost), [], 0

    def poll(self, timeout: float) -> list[Any]:
        self._polls += 1
        events = [*super().poll(timeout), *self._waiting]
        self._waiting = []
        for event in list(events):
            if event.job in self._lost and not isinstance(event, Lost):
                events.remove(event)
                if isinstance(event, Exited):
                    self._lost.remove(event.job)
                    events.append(Lost(event.job))
            elif event.job in self._late and self._polls < 5:
                if isinstance(event, Exited) or event.body["type"] in ("result", "failed"):
                    events.remove(event)
                    self._waiting.append(event)
        return events


def test_a_space_is_not_exhausted_while_a_running_trial_may_ask_for_more(journal: Journal) -> None:
    def body(job: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
        payload = job["payload"]
        if job["kind"] == "discover":  # build asks for nothing, fit for everything
            send({"type": "result", "space": Space.empty().grown([], complete=False).to_json(), "complete": True})
            return
        if payload["number"] == 0:
            send({"type": "preflight", "asks": []})
        send(result(asks_for(payload["proposal"], UNITS), 0.5))

    executor = Held(body, slots=2, late=("trial-0-0",))
    assert driver(journal, None, trials=6, executor=executor).run() == "complete"
    assert len({t.params["units"] for t in journal.history()}) == 6


@pytest.mark.parametrize("error", [SpaceError("it does not report val_auc"), ValueError("shapes (3,) and (2,)")])
def test_a_trial_that_cannot_be_scored_fails_alone(journal: Journal, error: Exception) -> None:
    class Refusing(ReadingJudge):
        def judge(self, result: dict[str, Any]) -> Verdict:
            if result["score"] > 0.2:
                raise error
            return super().judge(result)

    driver(journal, study(RATE, score=lambda p: p["rate"]), trials=20, judge=Refusing()).run()
    failed = [t for t in journal.history() if t.state is TrialState.FAILED]
    assert failed and {t.reason for t in failed} == {"invalid"}
    assert all(str(error) in str(t.message) for t in failed)


def test_a_lost_discovery_runs_again(journal: Journal) -> None:
    executor = Held(study(RATE, score=lambda p: 0.5), lost=("discover-0", "discover-1"))
    assert driver(journal, None, trials=3, executor=executor).run() == "complete"


def test_nothing_begins_before_discovery_has_agreed(journal: Journal) -> None:
    began: list[dict[str, Any]] = []

    def body(job: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
        if job["kind"] == "discover":
            send({"type": "failed", "reason": "invalid", "message": "another branch is wrong", "error": "SpaceError"})
        else:
            study(RATE, score=lambda p: 0.5)(job, send)

    executor = Held(body, slots=2, late=("discover-0",))
    with pytest.raises(SpaceError, match="another branch"):
        driver(journal, None, executor=executor, on_preflight=began.append).run()
    assert not began


@pytest.mark.parametrize(("times", "state"), [(2, TrialState.COMPLETE), (3, TrialState.FAILED)])
def test_a_lost_score_job_runs_again_and_is_no_failure_of_the_trial(
    journal: Journal, times: int, state: TrialState
) -> None:
    class Custom(ReadingJudge):
        def judge(self, result: dict[str, Any]) -> Any:
            return {"score": result["score"]}

        def settle(self, result: dict[str, Any]) -> Verdict:
            return Verdict(result["score"], None)

    def body(job: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
        if job["kind"] == "score":
            send({"type": "result", "score": job["payload"]["score"]})
        else:
            study(RATE, score=lambda p: p["rate"])(job, send)

    class Losing(Held):
        def poll(self, timeout: float) -> list[Any]:
            events = super().poll(timeout)
            self.left -= any(isinstance(event, Lost) for event in events)
            self._lost = {"score-1-0"} if self.left else set()
            return events

        left = times

    executor = Losing(body, lost=("score-1-0",))
    driver(journal, None, trials=4, executor=executor, judge=Custom()).run()
    trial = journal.history()[1]
    assert (trial.state, trial.reason) == (state, None if state is TrialState.COMPLETE else "lost")


def test_a_job_that_is_lost_before_it_began_is_asked_for_again() -> None:
    def body(job: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
        send({"type": "result", "rows": 7})

    asked = Job("load", "load", {})
    assert call(Held(body, lost=("load", "load-again")), asked, Silent())["rows"] == 7
    with pytest.raises(SpaceError, match="ended with no answer"):
        call(Held(body, lost=("load", "load-again", "load-again-again")), asked, Silent())


# ── confirmation ─────────────────────────────────────────────────────────────────────────────────


def again(history: Any) -> list[Trial]:
    return plan(history, Confirmation(2, 2), 7)


def test_finalists_and_baseline_are_trained_again_with_fresh_seeds_and_their_own_parameters(journal: Journal) -> None:
    driver(journal, study(RATE, UNITS, score=lambda p: p["rate"]), slots=3, confirm=again).run()
    trials = journal.history()
    runs = trials[12:]
    leaders = sorted(trials[:12], key=lambda t: -t.params["rate"])[:2]
    assert [t.number for t in trials] == list(range(18)) and len(searched(trials)) == 12
    assert [t.confirms for t in runs] == [leaders[0].number, leaders[1].number, 0] * 2
    assert all(t.state is TrialState.COMPLETE and dict(t.params) == dict(trials[t.confirms].params) for t in runs)
    assert len({t.seed for t in trials}) == 18


def test_no_sampler_sees_a_confirmation_and_an_extended_study_goes_on_like_a_longer_one(tmp_path: Path) -> None:
    body, found = study(RATE, UNITS, score=lambda p: p["rate"] * p["units"]), []
    for name, lengths in (("whole", [30]), ("extended", [22, 30])):
        with Journal.create(tmp_path / f"{name}.sqlite", {}) as journal:
            for number, trials in enumerate(lengths):
                discovery = {"discovery": {} if number == 0 else None}
                changes = {"sampler": get_sampler("tpe"), "confirm": again, **discovery}
                driver(journal, body, trials=trials, **changes).run()
            found.append([(dict(t.params), t.seed) for t in searched(journal.history())])
            assert len(journal.history()) > len(found[-1]) == 30
    assert found[0] == found[1]


def test_a_study_interrupted_while_it_confirms_goes_on_with_what_is_missing(journal: Journal) -> None:
    class Interrupted(InlineExecutor):
        def submit(self, job: Job, slot: Slot | None) -> None:
            if job.payload.get("number") == 15:
                raise KeyboardInterrupt
            super().submit(job, slot)

    body = study(RATE, UNITS, score=lambda p: p["rate"])
    with pytest.raises(KeyboardInterrupt):
        driver(journal, body, executor=Interrupted(body), confirm=again).run()
    planned = again(journal.history())
    driver(journal, body, discovery=None, confirm=again).run()
    runs = journal.history()[12:]
    assert [(t.confirms, t.seed) for t in runs] == [(t.confirms, t.seed) for t in planned]
    assert all(t.state is TrialState.COMPLETE for t in runs) and runs[3].attempt == 1


def test_failing_confirmations_do_not_fail_a_study_whose_search_is_complete(journal: Journal) -> None:
    whole = study(RATE, score=lambda p: p["rate"])

    def body(job: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
        if job["payload"].get("number", 0) >= 12:
            raise RuntimeError("no second time")
        whole(job, send)

    many = {"confirm": lambda history: plan(history, Confirmation(6, 2), 7)}
    assert driver(journal, body, **many).run() == "complete"
    assert all(t.state is TrialState.FAILED for t in journal.history()[12:])


def test_other_guard_scores_leave_every_training_as_it_is(tmp_path: Path) -> None:
    class OtherGuard(ReadingJudge):
        def judge(self, result: dict[str, Any]) -> Verdict:
            return Verdict(result["score"], guard=hash(result["score"]) % 97 / 97)

    seen = []
    for name, judge in (("one", ReadingJudge()), ("other", OtherGuard())):
        with Journal.create(tmp_path / f"{name}.sqlite", {}) as journal:
            body = study(RATE, UNITS, score=lambda p: p["rate"] * p["units"])
            driver(journal, body, trials=24, sampler=get_sampler("tpe"), judge=judge, confirm=again).run()
            seen.append([(t.number, t.confirms, dict(t.params), t.seed, t.score) for t in journal.history()])
            assert len(set(journal.guards().values())) > 1
    assert seen[0] == seen[1] and len(seen[0]) == 30


def test_no_trial_starts_and_nobody_is_told_of_its_end_before_that_is_in_the_file(journal: Journal) -> None:
    """As another process would see it, though many trials share a commit."""
    seen: list[int] = []
    reader = Journal.open(journal.path, read_only=True)

    class Looking(InlineExecutor):
        def submit(self, job: Job, slot: Slot | None) -> None:
            if job.kind == "trial":
                states = {t.number: (t.state, t.attempt) for t in reader.history()}
                assert states[job.payload["number"]] == (TrialState.RUNNING, job.payload["attempt"])
                seen.append(job.payload["number"])
            super().submit(job, slot)

    class Told(Silent):
        def ended(self, trial: Trial) -> None:
            assert reader.history()[trial.number] == trial and (trial.number, 0) in reader.guards()

    slots = [Slot(n, 1) for n in range(20)]
    body = study(RATE, UNITS, score=lambda p: p["rate"])
    driver(journal, None, trials=60, executor=Looking(body, slots), watcher=Told()).run()
    assert seen == list(range(60))
    reader.close()


def test_trials_that_begin_and_end_together_share_a_commit(journal: Journal) -> None:
    commits = []
    journal._connection.set_trace_callback(lambda text: commits.append(text) if text == "COMMIT" else None)
    body = study(RATE, UNITS, score=lambda p: p["rate"])
    driver(journal, None, trials=200, executor=InlineExecutor(body, [Slot(n, 1) for n in range(50)])).run()
    assert len(commits) < 200 / 2  # where each of them took three


def test_what_had_ended_is_recorded_when_the_search_is_given_up(journal: Journal) -> None:
    class Quits(Silent):
        def epoch(self, report: Any) -> None:
            if report.trial == 7:
                raise KeyboardInterrupt

    slots = [Slot(n, 1) for n in range(10)]
    body = study(RATE, score=lambda p: p["rate"])
    with pytest.raises(KeyboardInterrupt):
        driver(journal, None, executor=InlineExecutor(body, slots), watcher=Quits()).run()
    with Journal.open(journal.path, read_only=True) as reader:
        trials = reader.history()
    assert [t.state for t in trials[:7]] == [TrialState.COMPLETE] * 7
    assert all(t.state is TrialState.RUNNING for t in trials[7:])

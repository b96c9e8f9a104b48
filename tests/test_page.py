"""The report's page: whole, harmless and readable, whatever a study holds and however it ended."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import math
import random
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from search import secrecy
from search.cli import main
from search.definition.domain import Domain
from search.definition.space import Parameter, Space
from search.errors import RequestError
from search.loop.watcher import Silent
from search.pages import page, panels, svg
from search.pages.parameter_panels import ticks_of
from search.pages.svg import Scale, cut, linear_ticks, log_ticks, safe
from search.record.journal import Journal
from search.study import Study
from search.trial import Report, Trial, TrialState
from tests.test_importance import DEEP, KIND, LAYERS, RATE, UNITS
from tests.test_warm_start import meta

PARAMETERS = (KIND, RATE, UNITS, LAYERS, DEEP)
TIERS = {"train": 100, "validation": 50, "guard": 50, "test": 60}


def write(
    workspace: Path,
    trials: Sequence[Trial],
    name: str = "mine",
    space: Sequence[Parameter] = PARAMETERS,
    about: dict[str, str] | None = None,
    state: str = "COMPLETE",
    puts: dict[str, Any] | None = None,
    **changes: Any,
) -> Study:
    """A recorded study with these trials, each with a learning curve."""
    folder = workspace / "studies" / name
    folder.mkdir(parents=True)
    digest = changes.pop("digest", "d" * 64)
    known = meta(name, data={"digest": digest, "rows": 260, "tiers": TIERS}, **changes)
    known["space"] = about or known["space"]
    known["config"] = {"space": "tiny", "sampler": "tpe", "trials": max(1, len(trials)), **changes.get("config", {})}
    with Journal.create(folder / "journal.sqlite", {"study": known}) as journal:
        journal.adopt(Space(tuple(space)))
        for trial in trials:
            at = 1000.0 + 10 * trial.number if trial.started is None else trial.started
            begun = dataclasses.replace(
                trial, state=TrialState.RUNNING, score=None, loss=None, reason=None, message=None, started=at
            )
            journal.begin(dataclasses.replace(begun, ended=None))
            curve = [1 - 0.9 / (step + 1) for step in range(trial.epochs)]
            steps = [(step + 1, at + step, {"val_accuracy": value}) for step, value in enumerate(curve)]
            journal.report([Report(trial.number, 0, *step) for step in steps])
            if trial.state is not TrialState.RUNNING:
                ended = at + 5 if trial.ended is None else trial.ended
                journal.finish(dataclasses.replace(trial, started=at, ended=ended))
        for key, value in (puts or {}).items():
            journal.put(key, value)
        journal.put("state", state)
    return Study(name, workspace)


def some(count: int = 24, seed: int = 0) -> list[Trial]:
    """Complete, pruned and failed trials of a search with two slots."""
    rng, found = random.Random(seed), []
    for number in range(count):
        params: dict[str, Any] = {}
        for parameter in PARAMETERS:
            if parameter.is_active(params):
                params[parameter.key] = parameter.domain.sample(rng)
        score = 0.95 - 0.1 * abs(math.log10(params["rate"]) + 2) + 0.01 * rng.random()
        done: dict[str, Any] = {"score": score, "loss": -score, "slot": number % 2, "size": 100, "params": params}
        if number % 7 == 5:
            failed = {"reason": "nan", "message": "the loss is nan", "slot": number % 2, "params": params}
            found.append(Trial(number, TrialState.FAILED, **failed))
        elif number % 3 == 2:
            found.append(Trial(number, TrialState.PRUNED, epochs=2, **done))
        else:
            found.append(Trial(number, TrialState.COMPLETE, epochs=6, best_epoch=4, **done))
    return found


def opened(winner: int) -> dict[str, Any]:
    """What the journal has of a study that was tested."""

    def role(trial: int, score: float) -> dict[str, Any]:
        spread = {"validation_interval": [score - 0.05, score + 0.03], "guard_interval": [score - 0.06, score + 0.02]}
        return {"trial": trial, "configuration": trial, "validation": score, "guard": score - 0.01, **spread}

    corrected = {
        "estimate": 0.93,
        "interval": [0.88, 0.96],
        "level": 0.95,
        "method": "bootstrap",
        "scope": "this study",
    }
    gain = {"gain": 0.04, "interval": [0.01, 0.07], "method": "paired", "p": 0.01, "smallest": 0.03}
    return {
        "selection": {
            "winner": role(winner, 0.95),
            "baseline": role(0, 0.9),
            "corrected": corrected,
            "noise_floor": 0.01,
            "gains": {"configuration": None, "shipped": None},
            "confirmation": {
                "seeds": 2,
                "share": 0.2,
                "finalists": [{"configuration": winner, "trials": [30, 31], "failed": 0, "score": 0.94, "wins": 0.7}],
            },
        },
        "evaluation": {
            **{"opened": True, "opening": 1, "alpha": 0.03, "level": 0.97, "rows": 60, "final": None},
            "winner": {"trial": winner, "score": 0.92, "interval": [0.85, 0.96], "method": "Wilson"},
            "baseline": {"trial": 0, "score": 0.88, "interval": [0.8, 0.93], "method": "Wilson"},
            **{"difference": gain, "beats_baseline": True, "gap": {"gap": 0.01, "z": 0.3, "smallest": 0.08}},
            "verdicts": ["NO_GAP_SHOWN"],
        },
        "preflight": {"declaration": {"outputs": [{"name": "o", "loss": None}], "metrics": [ACCURACY]}},
    }


ACCURACY = {"output": 0, "name": "accuracy", "kind": "accuracy", "config": {}}


class Read(html.parser.HTMLParser):
    """What a browser would make of a page; fails where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.said: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.said.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.said).split())

    @property
    def headings(self) -> list[str]:
        return [attrs["id"] or "" for tag, attrs in self.tags if tag == "section" and "id" in attrs]


def checked(text: str) -> Read:
    """The page, if it is whole: tags match, charts are XML without a number that is none, and nothing can run."""
    read = Read(text)
    charts = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    for chart in charts:
        ElementTree.fromstring(chart)
        assert not re.search(
            r'="[^"]*\b(nan|inf|None)\b[^"]*"', re.sub(r"<title>.*?</title>|aria-label=\S*", "", chart)
        )
    names = {tag for tag, _ in read.tags}
    assert not names & {"script", "iframe", "object", "embed", "link", "img", "form", "base", "foreignobject"}
    for tag, attrs in read.tags:
        for name, value in attrs.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in ("src", "href") or (tag == "a" and str(value).startswith("#"))
    ids = [attrs["id"] for _, attrs in read.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {f"#{name}" for name in ids} >= {str(attrs["href"]) for tag, attrs in read.tags if tag == "a"}
    assert len(text) < 400_000
    return read


def test_a_tested_study_says_the_verdict_first_and_has_every_section(tmp_path: Path) -> None:
    trials = some()
    winner = max((t for t in trials if t.state is TrialState.COMPLETE), key=lambda t: t.score or 0.0).number
    read = checked(page.page(write(tmp_path, trials, puts=opened(winner))))
    sections = ["numbers", "winner", "search", "parameters", "next", "failures", "time", "trials", "made"]
    assert read.headings == sections
    first = read.text.index("What to believe")
    assert first < read.text.index("Three numbers")
    assert (
        "Test accuracy 92.0 %, plausibly 85.0 to 96.0 %; a gain over the default configuration is shown." in read.text
    )
    assert "NO_GAP_SHOWN" in read.text and "Believe the test accuracy of 92.0 %" in read.text
    for number in ("95.0 %", "93.0 %", "92.0 %", "88.0 to 96.0 % (95 % interval)", "85.0 to 96.0 % (97 % interval)"):
        assert number in read.text
    assert "Two trainings of one configuration differ by about 1 points." in read.text
    assert "the loss is nan" in read.text and "3 trained" not in read.text
    assert "2 slots, busy" in read.text and "rate" in read.text and "Log scale" in read.text
    assert re.search(r"In \d+ of 24 trials: where layers is 3", read.text)


def test_folds_are_no_epochs_and_their_score_is_optimistic(tmp_path: Path) -> None:
    plan = {"plan": "kfold:6", "rows": 150, "weight": 150, "train": [125] * 6, "validation": [25] * 6, "ordered": False}
    trials = [dataclasses.replace(trial, best_epoch=trial.epochs) for trial in some()]
    puts = opened(0) | {"prepared": {"validation": plan}}
    text = checked(page.page(write(tmp_path, trials, puts=puts))).text
    assert "Validation, kfold:6" in text and "Out of fold, 150 rows" in text and "so it is optimistic" in text
    assert "Scores fold by fold" in text and "6 folds" in text and "Learning curves" not in text
    assert "Train for longer" not in text  # a refit has as many epochs as its folds chose


def test_without_a_test_step_it_says_so(tmp_path: Path) -> None:
    read = checked(page.page(write(tmp_path, some())))
    assert "Not tested yet; the best validation score" in read.text and "sealed" in read.text
    assert "There is no test score yet" in read.text and "numbers" in read.headings


def test_without_a_complete_trial_there_is_no_number_to_believe(tmp_path: Path) -> None:
    failed = [Trial(k, TrialState.FAILED, {"units": 16}, reason="oom", message="too large") for k in range(3)]
    read = checked(page.page(write(tmp_path, failed, state="FAILED")))
    assert "No trial has completed, so there is no number to believe." in read.text
    assert "numbers" not in read.headings and "failures" in read.headings and "too large" in read.text
    assert "heldout show mine 0" in read.text


def test_pruned_trials_alone_are_no_number_either(tmp_path: Path) -> None:
    pruned = [dataclasses.replace(t, state=TrialState.PRUNED, best_epoch=None) for t in some(4) if t.score is not None]
    read = checked(page.page(write(tmp_path, pruned)))
    assert "No trial has completed, so there is no number to believe." in read.text


def test_a_single_trial(tmp_path: Path) -> None:
    read = checked(page.page(write(tmp_path, some(1))))
    assert "comes from its only trial" in read.text and "1 trials have a score" in read.text
    assert "No trial failed" in read.text


def test_nothing_yet(tmp_path: Path) -> None:
    read = checked(page.page(write(tmp_path, [], state="RUNNING")))
    assert "There is no number" in read.text or "no number to believe" in read.text


def test_parameters_that_never_change_are_named_and_not_drawn(tmp_path: Path) -> None:
    trials = [Trial(k, TrialState.COMPLETE, {"units": 16}, score=0.9 + k / 1000, loss=-k) for k in range(12)]
    read = checked(page.page(write(tmp_path, trials)))
    assert "Not varied: units." in read.text and "Importance: nothing shown." in read.text
    assert "Slices" not in read.text


def test_a_running_trial_and_a_pause_before_a_resume(tmp_path: Path) -> None:
    trials = some(6)
    late = dataclasses.replace(trials[-2], number=6, started=90_000.0, ended=90_010.0)
    running = Trial(7, TrialState.RUNNING, {"units": 20}, started=90_005.0)
    text = page.page(write(tmp_path, [*trials, late, running], state="RUNNING"))
    read = checked(text)
    crosses = re.findall(r'class="bad m"[^>]*><title>([^<]*)', text)
    assert crosses and all(
        said.startswith(("trial 5: nan", "trial 5, ")) for said in crosses
    )  # what runs has not failed
    assert "1 pause in which nothing ran left out." in read.text and "in 40 seconds" in read.text


HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "]]></svg><b>",
    "a\u202eb\x00c\udcff",
    "`code` and &amp; &lt;",
    "n" * 300,
)


def test_names_values_and_messages_cannot_become_markup(tmp_path: Path) -> None:
    parameters = [
        Parameter(name, name, (), Domain("choice", values=HOSTILE)) for name in HOSTILE if "\udcff" not in name
    ]
    rng = random.Random(0)
    trials = []
    for number in range(14):
        params = {p.key: rng.choice([v for v in HOSTILE if "\udcff" not in v]) for p in parameters}
        if number % 4 == 3:
            bad = {"reason": "invalid", "message": HOSTILE[number % 3] + HOSTILE[5]}
            trials.append(Trial(number, TrialState.FAILED, params, **bad))
        else:
            trials.append(Trial(number, TrialState.COMPLETE, params, score=0.5 + number / 99, loss=-number, epochs=2))
    versions = {HOSTILE[0]: HOSTILE[1]}
    space = {"name": HOSTILE[1], "digest": HOSTILE[2]}
    text = page.page(write(tmp_path, trials, space=parameters, versions=versions, about=space))
    read = checked(text)
    assert HOSTILE[0] in read.text and '"><img src=x onerror=alert(1)>' in read.text  # as text
    assert "<script" not in text and "<img" not in text and "\x00" not in text and "\u202e" not in text


@given(st.text())
def test_any_text_is_safe(text: str) -> None:
    shown = safe(text)
    shown.encode("utf-8")
    element = ElementTree.fromstring(f"<a b='{shown}'>{shown}</a>")
    assert not list(element)
    assert not set("<>\"'") & set(shown) and 1 <= len(cut(text, 9)) <= 9


def test_secrets_that_are_known_are_not_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "s3cr&t<key>"
    monkeypatch.setenv("API_KEY", secret)
    failed = Trial(0, TrialState.FAILED, {"units": 16}, reason="invalid", message=f"refused {secret}")
    study = write(tmp_path, [failed], state="FAILED", config={"env": ["API_KEY"]})
    read = checked(page.page(study))
    assert secret not in read.text and "***API_KEY***" in read.text


def test_a_secret_that_is_not_set_here_is_no_reason_to_refuse(tmp_path: Path) -> None:
    checked(page.page(write(tmp_path, some(2), config={"env": ["GONE_KEY"]})))
    assert secrecy.scrub("left alone") == "left alone"


# Writing it.


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_command_writes_a_file_and_python_the_same(tmp_path: Path) -> None:
    study = write(tmp_path, some())
    done = run("report", "mine", "--html", tmp_path / "a.html", "--workspace", tmp_path)
    assert done.exit_code == 0 and f"the report of mine is in {tmp_path / 'a.html'}" in done.output
    assert study.html(tmp_path / "b.html") == tmp_path / "b.html"

    def told(name: str) -> str:
        return re.sub("<footer>.*</footer>", "", (tmp_path / name).read_text(encoding="utf-8"))

    assert told("a.html") == told("b.html")
    checked((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html", "studies"]


@pytest.mark.parametrize("where", ["", ".", "none/a.html"])
def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path, where: str) -> None:
    write(tmp_path, some(3))
    done = run("report", "mine", "--html", tmp_path / where, "--workspace", tmp_path)
    assert done.exit_code == 2 and done.output.startswith("heldout: --html must name a file that can be written, but")
    assert len(done.output.splitlines()) == 1
    with pytest.raises(RequestError):
        Study("mine", tmp_path).html(tmp_path / where)


def test_a_report_has_one_form(tmp_path: Path) -> None:
    write(tmp_path, some(3))
    done = run("report", "mine", "--html", "a.html", "--json", "--workspace", tmp_path)
    assert done.exit_code == 2 and "give one of --html and --json" in done.output
    assert json.loads(run("report", "mine", "--json", "--workspace", tmp_path).output)["study"] == "mine"


def test_a_page_that_cannot_be_made_costs_the_study_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class Told(Silent):
        def say(self, text: str) -> None:
            said.append(text)

    study = write(tmp_path, some())
    monkeypatch.setattr(page, "page", lambda _: 1 / 0)
    page.keep(study.folder, Told())
    assert said == ["the report's page could not be written: division by zero"]


# Scales.

NUMBERS = st.floats(allow_nan=False, allow_infinity=False, width=64)


@given(NUMBERS, NUMBERS, NUMBERS)
def test_a_scale_keeps_any_number_on_the_chart(low: float, high: float, value: float) -> None:
    low, high = min(low, high), max(low, high)
    scale = Scale(low, high, 300.0, 10.0)
    assert 10.0 <= scale.at(value) <= 300.0
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 12 and all(math.isfinite(tick) for tick in ticks)


@given(st.floats(1e-300, 1e300), st.floats(1.0001, 1e12))
def test_a_log_scale_has_some_round_numbers(low: float, ratio: float) -> None:
    high = min(low * ratio, 1e305)
    ticks = log_ticks(low, high)
    assert 1 <= len(ticks) <= 6 and all(low * 0.999 <= tick <= high * 1.001 for tick in ticks)
    assert 0.0 <= Scale(low, high, 0.0, 9.0, log=True).at(low * 2) <= 9.0


def test_round_numbers_are_round() -> None:
    assert linear_ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert linear_ticks(0.93, 0.99) == [0.94, 0.96, 0.98]
    assert log_ticks(1e-4, 3e-2) == [1e-4, 1e-3, 1e-2] and log_ticks(16, 256) == [20, 50, 100, 200]
    assert svg.n(3.0) == "3" and svg.n(3.14) == "3.1"


@pytest.mark.parametrize(
    "domain, ticks",
    [
        (RATE.domain, [1e-4, 1e-3, 1e-2, 1e-1]),
        (Domain("int", 16, 256, step=2, sampling="log", default=16), [16, 32, 64, 128, 256]),
        (Domain("float", 0.0, 0.5, step=0.1, default=0.0), [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]),
        (KIND.domain, ["a", "b", "c"]),
        (Domain("boolean", values=(False, True)), [False, True]),
        (Domain("int", 1, 1000, default=1), [200, 400, 600, 800, 1000]),
    ],
)
def test_a_parameters_axis_has_its_own_values(domain: Domain, ticks: list[Any]) -> None:
    assert ticks_of(domain, 6) == ticks


def test_of_many_trials_the_best_are_drawn() -> None:
    trials = [Trial(k, TrialState.COMPLETE, score=k, loss=-k) for k in range(1000)]
    drawn = panels.thinned(trials, 100)
    assert len(drawn) == 100 and {t.number for t in drawn} >= set(range(975, 1000))
    assert [t.number for t in drawn] == sorted(t.number for t in drawn)

"""What an ensemble is and what it is worth, in plain words."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from search.guard import belief

_WIDTH = 110
_WAYS = {
    "ensemble": "the ensemble: greedy selection",
    "average": "plain average of the {size} best by validation",
    "nelder_mead": "Nelder-Mead weights of these",
    "single": "a single model, by the study's rule",
}


def public(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader is told of an ensemble, as JSON: all but its file and hashes."""
    return {key: value for key, value in record.items() if key not in ("events", "model", "frozen")} | {
        "weights": record["model"]["size"]
    }


def latest(known: Mapping[str, Any] | None, selection: Mapping[str, Any]) -> dict[str, Any] | None:
    """The ensemble that was asked for last, if it is of what the study has chosen from.

    Args:
        known: The journal's ``ensembles``; ``selection``: its ``selection``.
    """
    last = list((known or {}).values())[-1:]
    return public(last[0]) if last and last[0]["events"] == selection.get("events") else None


def brief(found: Mapping[str, Any], study: str) -> list[str]:
    """An ensemble in a report: what it is made of, and how it compares."""
    made = ", ".join(f"{one['trial']} ({one['weight']:.2g})" for one in found["members"])
    return [f"ensemble of trials {made}", *(f"    {line}" for line in _wrapped(conclusion(found, study), _WIDTH - 4))]


def lines(found: Mapping[str, Any]) -> list[str]:
    """An ensemble in plain words, the most important last."""
    name, study, members = _metric(found), found["study"], found["members"]
    many = f"{len(members)} models" if len(members) > 1 else "one model"
    out = [f"ensemble of study {study}: {many} out of {found['candidates']}, picked {found['size']} times at most"]
    out += [
        f"    trial {one['trial']}: weight {one['weight']:.3g}, validation {name} {_number(one['validation'])}"
        for one in members
    ]
    if len(members) > 1:
        out += _table(found["correlations"])
    judged = found["cross_fitted"]
    if judged is None:
        out.append("guard rows cannot be divided, so nothing is known of it without a test")
    else:
        level = belief.level(judged["level"])
        out.append(
            f"{name} on {judged['rows']} guard rows by what was fitted without them ({judged['folds']} folds), and "
            f"gain over the single model ({level}):"
        )
        for way, words in _WAYS.items():
            gain = judged["gains"].get(way)
            shown = f"{words.format(size=min(found['size'], found['candidates'])):46}{_number(judged['scores'][way]):8}"
            out.append(f"    {shown}{'' if gain is None else _gain(gain)}".rstrip())
    out += _wrapped(conclusion(found, study), _WIDTH)
    if found.get("out"):
        out.append(f"it is in {found['out']}: model.keras, lineage.json, MODEL_CARD.md, space.py")
    return out


def conclusion(found: Mapping[str, Any], study: str) -> str:
    """Whether it is better than the single winner, and by what that is known."""
    test, name, members = found["test"], _metric(found), found["members"]
    if len(members) == 1 and members[0]["trial"] == found["winner"]:
        return (
            f"The ensemble does not win: it is the single winner, trial {found['winner']}, alone, since no average did "
            "better on guard rows."
        )
    if test is None or not test["opened"]:
        how = f"`heldout ensemble {study} --size {found['size']} --evaluate yes` opens the test rows for it, counted"
        why = f"{how if test is None else test['why']}."
        return (
            f"{_by_guard(found)} It has no corrected estimate, since its weights were fitted to guard rows: only a "
            f"test number speaks for it. {why[0].upper() if why[0].isalpha() else why[0]}{why[1:]}"
        )
    ours, theirs = (_number(test[role]["score"]) for role in ("ensemble", "winner"))
    gain = test["difference"]
    refitted = ", which was refitted on more rows" if test["final"] else ""
    compared = (
        f"on {test['rows']} test rows its {name} is {ours} against {theirs} of the single winner{refitted} "
        f"(gain {_gain(gain)}, a {belief.level(test['level'])} interval; opening {test['opening']} of these rows)"
    )
    if test["beats_single"]:
        said = f"The ensemble wins: {compared}."
    elif gain["interval"][1] < 0:
        said = f"The ensemble loses: {compared}. Use the single model."
    else:
        least = gain["smallest"]
        shown = "" if least is None else f"; a gain of {_number(least)} would show in 4 of 5 cases"
        said = (
            f"The ensemble does not win: {compared}. Nothing shows that it is better{shown}. The single model is as "
            "good as these rows can tell" + (", and smaller, so use that." if len(members) > 1 else ".")
        )
    if test["opening"] > 1:
        said += " These test rows had been used before, so trust this less than a first look."
    return said


def _by_guard(found: Mapping[str, Any]) -> str:
    judged = found["cross_fitted"]
    if judged is None or None in (judged["scores"]["ensemble"], judged["scores"]["single"]):
        return "Nothing says whether the ensemble is better than the single winner."
    ours, theirs = (_number(judged["scores"][way]) for way in ("ensemble", "single"))
    scores = f"cross-fitted on guard rows, its {_metric(found)} is {ours} against {theirs} of a single model"
    gain = judged["gains"]["ensemble"]
    if gain is None:
        return f"Whether the ensemble is better is not known, as there is no interval: {scores}."
    low, high = gain["interval"]
    head = "seems better" if low > 0 else "seems worse" if high < 0 else "is not shown to be better"
    return f"The ensemble {head} than a single model: {scores} (gain {_gain(gain)})."


def _table(found: Mapping[str, Any]) -> list[str]:
    """Correlations as a lower triangle."""
    out = [f"how alike they are: correlation of their {found['of']} on guard rows"]
    out.append(f"    {'trial':>8}" + "".join(f"{trial:>8}" for trial in found["trials"]))
    for at, (trial, row) in enumerate(zip(found["trials"], found["table"], strict=True)):
        shown = ["-" if value is None else f"{value:.2f}" for value in row[: at + 1]]
        out.append(f"    {trial:>8}" + "".join(f"{value:>8}" for value in shown))
    return out


def _gain(gain: Mapping[str, Any]) -> str:
    low, high = gain["interval"]
    return f"{_number(gain['gain'])}, {_number(low)} to {_number(high)}"


def _metric(found: Mapping[str, Any]) -> str:
    return str(found["objective"]).removeprefix("val_").replace("_", " ")


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False)

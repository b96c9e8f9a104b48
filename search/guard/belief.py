"""What to believe: one paragraph for people on the numbers of a report, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Found = Mapping[str, Any]

_FEW_GUARD = 500
_TOO_OFTEN = 5  # uses of a test set from which on fresh rows are due
_BASELINE = "the baseline (the space's default configuration)"


@dataclass(frozen=True)
class _Words:
    """Numbers in words: shares of rows in percent and points, all else with four significant digits."""

    shares: bool

    def score(self, value: float) -> str:
        return f"{_percent(value)} %" if self.shares else f"{value:.4g}"

    def span(self, ends: Sequence[float], to: str = "to") -> str:
        low, high = ends
        return f"{_percent(low)} {to} {_percent(high)} %" if self.shares else f"{low:.4g} {to} {high:.4g}"

    def apart(self, difference: float) -> str:
        if not self.shares:
            return f"{abs(difference):.4g}"
        points = abs(100 * difference)
        return f"{points:.1f} points" if points >= 0.1 or points < 1e-9 else f"{points:.1g} points"

    def against(self, gain: float) -> str:
        return "no better" if gain == 0 else f"{self.apart(gain)} {'better' if gain > 0 else 'worse'}"


def paragraph(found: Found) -> str:
    """What a report's reader should believe and why, in one paragraph.

    Args:
        found: The report; see ``report.report``.
    """
    if found["best"] is None:
        return _nothing(found)
    words, test = _Words(bool(found["proportion"])), found["test"]
    sentences = [_tested(found, words), _carried(found), _reused(test), _estimated(found, words)]
    if test is not None and test["gap"] is not None:
        sentences.append(_gap(test["gap"], found["verdicts"], words))
    if found["final"] == "retrain" and found["winner"] is not None:
        sentences.append(
            "The winner was then trained anew on train, validation and guard rows together, so only a test score "
            "speaks for the model that is shipped; validation and guard scores describe the model before that."
        )
    sentences += [_gain(found, words), _noise(found, words), _scope(found)]
    return " ".join(sentence for sentence in sentences if sentence)


def _carriers(found: Found) -> list[str]:
    """Studies of other rows, or of another split, that the search was warm-started from."""
    return [one["study"] for one in found.get("warm_start") or () if one["other_data"]]


def _carried(found: Found) -> str:
    names = _carriers(found)
    if not names:
        return ""
    return (
        f"The search was warm-started from {', '.join(names)}, with other rows or another split: it carries knowledge "
        "of rows that may be test rows here, by which all scores may flatter."
    )


def _nothing(found: Found) -> str:
    failed, state = found["trials"]["failed"], found["state"]
    if state == "RUNNING":
        return f"No trial of {found['study']} has completed yet, so there is no number to believe."
    why = "" if not failed else f" ({failed} failed; `heldout show {found['study']} 0` says how the first one ended)"
    return f"No trial of {found['study']} completed, so there is no number to believe and nothing to test{why}."


def _tested(found: Found, words: _Words) -> str:
    test, name = found["test"], _metric(found)
    if test is None:
        return f"There is no test score yet: {_why_sealed(found)}."
    # A first look at rows that fit the rest is the best evidence there is; of any other say only what it is.
    trusted = test["opening"] == 1 and "SPLIT_MISMATCH" not in found["verdicts"] and not _carriers(found)
    score = words.score(test["winner"])
    head = f"Believe the test {name} of {score}" if trusted else f"The test {name} is {score}"
    rows = f"{test['rows']} rows" + (" that nothing in this study had used before" if test["opening"] == 1 else "")
    if test["interval"] is None:
        return f"{head}, from {rows}; how far chance could move it is not known, as this metric has no interval here."
    why = f"because this is opening {test['opening']}; each further opening gets a wider one"
    return (
        f"{head}, from {rows}; the true value plausibly lies between {words.span(test['interval'], 'and')} (a "
        f"{level(test['level'])} interval {why})."
    )


def _why_sealed(found: Found) -> str:
    if found["sealed"]:
        return str(found["sealed"]).rstrip(".")
    if found["state"] != "COMPLETE":
        return f"the study is {found['state'].lower()}, and its test rows stay sealed until it is complete"
    return f"the test rows are still sealed, and `heldout evaluate {found['study']}` opens them"


def _reused(test: Found | None) -> str:
    if test is None or test["opening"] < 2:
        return ""
    said = f"This test set has been used {test['opening']} times"
    if test["opening"] >= _TOO_OFTEN:
        return f"{said}, which is too often for a final word: test on fresh rows before you rely on it."
    return (
        f"{said}, and whatever was chosen after an earlier look flatters this score, so trust it less than a first one."
    )


def _estimated(found: Found, words: _Words) -> str:
    best, corrected, winner = found["best"]["validation"], found["corrected"], found["winner"]
    only = found["trials"]["complete"] + found["trials"]["pruned"] == 1
    plan = found.get("validation")
    kind = "validation" if plan is None or not plan["plan"].startswith("kfold") else "out-of-fold"
    name = f"{kind} {_metric(found) if found['test'] is None else _name(found)}"
    said = f"The best {name} of the search, {words.score(best)} (trial {found['best']['trial']}), "
    if plan is not None and not only:
        said += f"is optimistic: the search chose by the rows behind it, however they were divided ({plan['plan']})"
    else:
        said += "comes from its only trial" if only else "tends to flatter, because the search chose by it"
    if corrected is None:
        if winner is None:
            return f"{said}, and no winner has been chosen yet."
        return f"{said}, and there is no estimate that corrects for that."
    rows = ((found.get("data") or {}).get("tiers") or {}).get("guard")
    few = " too few to be exact," if rows is not None and rows < _FEW_GUARD else ""
    guard = f"on {'' if rows is None else f'{rows} '}guard rows, whose labels the search never saw,"
    estimate = words.score(corrected["estimate"])
    if corrected["interval"] is None:
        return (
            f"{said}; {guard} the winner scored {estimate}, which is neither corrected for the choice nor given an "
            f"interval ({str(corrected['method']).removeprefix('none: ')})."
        )
    flattery = best - corrected["estimate"] if found["direction"] == "max" else corrected["estimate"] - best
    luck = f", so luck made it look about {words.apart(flattery)} better" if flattery > 0 and not only else ""
    until = "" if found["test"] is not None or found["final"] == "retrain" else "; until a test, believe that estimate"
    return (
        f"{said}; {guard}{few} the winner is worth {estimate}{'' if only else ', corrected for the choice'} "
        f"({level(corrected['level'])} interval {words.span(corrected['interval'])}){luck}{until}."
    )


def _gap(gap: Found, verdicts: Sequence[str], words: _Words) -> str:
    far = f"The test score is {words.apart(gap['gap'])}"
    rare = "than chance explains (which goes so far in less than 1 of 100 tests)"
    if "UNEXPLAINED_GAP" in verdicts:
        return (
            f"{far} worse than that estimate, more {rare}: do not use the estimate, and look for test rows of another "
            "kind, for leakage, and for choices that were made on validation or guard rows."
        )
    if "POSSIBLE_DRIFT" in verdicts:
        return (
            f"{far} worse than that estimate, more {rare}: as the test rows are the latest ones, the data may have "
            "changed over time, so expect still later rows to do worse yet."
        )
    if "SPLIT_MISMATCH" in verdicts:
        return (
            f"{far} better than that estimate, more {rare}: the test rows seem easier than the guard rows, so check "
            "how the rows were split before you believe either."
        )
    agrees = "equals that estimate"
    if gap["gap"] != 0:
        agrees = f"is {words.against(-gap['gap'])} than that estimate, which chance explains"
    return (
        f"The test score {agrees}: no gap is shown, though only one of about {words.apart(gap['smallest'])} or more "
        "would show on these rows in 4 of 5 cases."
    )


def _gain(found: Found, words: _Words) -> str:
    winner, baseline, test = found["winner"], found["baseline"], found["test"]
    if winner is None:
        return ""
    if baseline is None:
        return f"{_sentence(_BASELINE)} did not complete, so nothing says whether the search gained anything."
    if winner["trial"] == baseline["trial"]:
        return f"The winner is {_BASELINE} itself: the search found nothing better, so no gain is shown."
    if test is None:
        gains = found["gains"] or {}
        gain = gains.get("shipped") or gains.get("configuration")
        if gain is None:
            return f"Whether the winner beats {_BASELINE} is not known without a test."
        return _gain_words(gain, gain["interval"][0] > 0, None, " on guard rows", _BASELINE, words)
    if test["baseline"] is None:
        return f"{_sentence(_BASELINE)} was not tested, so no gain is shown."
    against = f"the baseline (the space's default configuration, {words.score(test['baseline'])} on the same rows)"
    if test["gain"] is not None:
        gain = test["gain"]
        return _gain_words(gain, bool(test["beats_baseline"]), gain["smallest"], "", against, words)
    gain = test["winner"] - test["baseline"] if found["direction"] == "max" else test["baseline"] - test["winner"]
    return f"Against {against} the winner is {words.against(gain)}, which may be chance, as there is no interval."


def _gain_words(gain: Found, shown: bool, smallest: float | None, where: str, against: str, words: _Words) -> str:
    """Whether a gain is shown, how large it plausibly is, and how large one would have been shown."""
    low, high = gain["interval"]
    case = "" if smallest is None else f" (these rows show one of {words.apart(smallest)} or more in 4 of 5 cases)"
    if shown:
        said = f"A gain over {against} is shown{where}: {words.apart(gain['gain'])}, plausibly"
        return f"{said} {words.apart(low).removesuffix(' points')} to {words.apart(high)}{case}."
    said = f"No gain over {against} is shown{where}: the winner is {words.against(gain['gain'])}"
    if low < high:
        said += f", and anything from {words.against(low)} to {words.against(high)} is plausible"
    return f"{said}{case}."


def _noise(found: Found, words: _Words) -> str:
    floor, gain = found["noise_floor"], (found["test"] or {}).get("gain")
    if floor is not None:
        below = ", as this one is" if gain is not None and 0 < gain["gain"] < floor else ""
        apart = words.apart(floor)
        return f"Two trainings of one configuration differ by about {apart}; a gain below that is noise{below}."
    if found["winner"] is None:
        return ""
    return "How much two trainings of one configuration differ was not measured, so a small gain may be noise."


def _scope(found: Found) -> str:
    _, _, others = (found["corrected"] or {}).get("scope", "").partition(":")
    if others.strip():
        return f"The estimate speaks for this study only:{others}, and it cannot correct for those."
    return ""


def _metric(found: Found) -> str:
    return _name(found) + (" (lower is better)" if found["direction"] == "min" else "")


def _name(found: Found) -> str:
    return str(found["objective"]).removeprefix("val_").replace("_", " ")


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:]


def _percent(share: float) -> str:
    """In percent with one digit, or as many more as keep what is not certain from reading 0 or 100."""
    digits = 1
    while 0 < share < 1 and float(f"{100 * share:.{digits}f}") in (0.0, 100.0) and digits < 6:
        digits += 1
    return f"{100 * share:.{digits}f}"


def level(share: float) -> str:
    """A confidence level in percent, such as "97 %"."""
    digits = 3
    while share < 1 and f"{100 * share:.{digits}g}" == "100" and digits < 6:
        digits += 1
    return f"{100 * share:.{digits}g} %"

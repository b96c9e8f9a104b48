"""The sections of the report's page, each as HTML; one that has nothing to say is empty."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from search.definition.space import Parameter
from search.guard import belief
from search.pages import panels, parameter_panels
from search.pages.importance import Importances
from search.pages.markup import MARKS, coded, figure, legend
from search.pages.page_record import Read, span
from search.pages.suggestions import suggestions
from search.pages.svg import cut, safe
from search.tiers.validation import named, parse
from search.trial import Trial, TrialState, searched

_MOST_ROWS = 300  # of the table of trials
_MOST_SLICES = 24
_LONGEST = 300  # letters of a message

_REASONS = {
    "nan": "the loss or the score was not a number",
    "oom": "memory ran out",
    "crash": "the process died, or the module raised an error",
    "timeout": "it took too long, or hung",
    "lost": "the processes around it died",
    "invalid": "`build` refused the parameters, or the result could not be scored",
}


def three(read: Read) -> str:
    """The three numbers that tell the story, beside each other."""
    found, role, numbers = read.found, read.chosen, read.numbers
    if role is None:
        return ""
    tiers = (found["data"] or {}).get("tiers") or {}
    corrected, test = found["corrected"], found["test"]

    def rows(tier: str) -> str:
        return f"{tiers[tier]} {tier} rows" if tier in tiers else f"{tier} rows"

    plan, chance = found.get("validation"), "The interval is of chance alone."
    if plan is None:
        name, seen = "Validation", f"On {rows('validation')}, by which the search chose, so it flatters. {chance}"
    else:
        name = f"Validation, {plan['plan']}"
        seen = f"{named(plan).capitalize()}, by which the search chose, so it is optimistic. {chance}"
    cards = [_card(name, numbers(role["validation"]), role.get("validation_interval"), 0.95, seen, read)]
    if corrected is None:
        cards.append(_card("Guard, corrected", "not yet", None, None, "Estimated once the search has ended.", read))
    else:
        is_corrected = corrected["interval"] is not None
        why = (
            f"On {rows('guard')}, whose labels no trial has seen, corrected for having chosen the winner by them."
            if is_corrected
            else f"On {rows('guard')}; {str(corrected['method']).removeprefix('none: ')}."
        )
        name = "Guard, corrected" if is_corrected else "Guard"
        cards.append(_card(name, numbers(corrected["estimate"]), corrected["interval"], corrected["level"], why, read))
    if test is None:
        again = "`heldout evaluate` opens them" if found["state"] == "COMPLETE" else "they stay so until it is complete"
        why = found["sealed"] or f"The rows are still sealed; {again}."
        cards.append(_card("Test", "sealed", None, None, str(why), read))
    else:
        why = f"On {test['rows']} rows kept sealed until the winner was frozen; opening {test['opening']} of them."
        cards.append(_card("Test", numbers(test["winner"]), test["interval"], test["level"], why, read))
    return f'<div class="cards">{"".join(cards)}</div>'


def _card(name: str, value: str, interval: Sequence[float] | None, level: float | None, why: str, read: Read) -> str:
    between = ""
    if interval is not None and level is not None:
        between = f"{span(interval, read.numbers)} ({belief.level(level)} interval)"
    return (
        f'<div class="card"><h3>{safe(name)}</h3><div class="value">{safe(value)}</div>'
        f'<div class="interval">{safe(between)}</div><p class="note">{coded(why)}</p></div>'
    )


def winner(read: Read) -> str:
    """What is shipped beside the space's defaults."""
    found, numbers, role, base = read.found, read.numbers, read.chosen, read.found["baseline"]
    if role is None:
        return ""
    known = {trial.number: trial for trial in read.trials}
    roles = [role] if base is None or base["trial"] == role["trial"] else [role, base]
    test = found["test"]
    rows: list[tuple[str, list[str], bool]] = []

    def add(name: str, values: Iterable[Any], differs: bool = False) -> None:
        said = ["–" if value is None else str(value) for value in values]
        if any(value != "–" for value in said):
            rows.append((name, said, differs))

    def score(value: Any) -> str | None:
        return None if value is None else numbers(value)

    add("configuration of trial", [one.get("configuration", one["trial"]) for one in roles])
    add(
        "trained again as",
        [one["trial"] if one["trial"] != one.get("configuration", one["trial"]) else None for one in roles],
    )
    add("validation", [score(one.get("validation")) for one in roles])
    add("guard, as measured", [score(one.get("guard")) for one in roles])
    add("test", [score((test or {}).get(of)) for of in ("winner", "baseline")[: len(roles)]])
    trained = [known.get(one["trial"]) for one in roles]
    add("weights", [None if t is None or t.size is None else f"{t.size:,}" for t in trained])
    add("epochs", [None if t is None else t.epochs for t in trained])
    add("epoch whose weights were kept", [None if t is None else t.best_epoch for t in trained])
    add("seconds of training", [None if t is None or t.seconds is None else f"{t.seconds:.1f}" for t in trained])
    for key in dict.fromkeys(key for one in roles for key in one["params"]):
        values = [one["params"].get(key) for one in roles]
        shown = [None if value is None else parameter_panels.written(value) for value in values]
        add(key, shown, len(values) > 1 and values[0] != values[1])
    heads = ["Winner" if found["winner"] is not None else "Best so far", "Baseline"][: len(roles)]
    head = "".join(f'<th scope="col" class="n">{safe(title)}</th>' for title in heads)
    body = "".join(
        f'<tr{" class=differs" if differs else ""}><th scope="row">{safe(cut(name, 60))}</th>'
        + "".join(f'<td class="n">{safe(cut(value, 60))}</td>' for value in values)
        + "</tr>"
        for name, values, differs in rows
    )
    said = "Values that differ are bold." if len(roles) > 1 else _lonely(base)
    table = f"<table><caption>{said}</caption><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>"
    is_corrected = found["corrected"] is not None and found["corrected"]["interval"] is not None
    said = "The winner's score on guard rows is the corrected one." if is_corrected else ""
    chart = figure("Scores with their intervals", panels.scores(found, numbers), said)
    return f'<div class="grid"><div class="scroll">{table}</div>{chart}{_confirmation(read)}</div>'


def _lonely(base: Any) -> str:
    if base is None:
        return "The baseline (trial 0, the space's defaults) has not completed."
    return "The winner is the baseline itself: the space's defaults."


def _confirmation(read: Read) -> str:
    confirmation = read.found["confirmation"]
    if confirmation is None:
        return ""
    rows = []
    for one in sorted(confirmation["finalists"], key=lambda one: -(one["wins"] or 0.0)):
        name = f"trial {one['configuration']}" + (" (baseline)" if one["configuration"] == 0 else "")
        wins = "–" if one["wins"] is None else f"{one['wins']:.0%}"
        mean = "–" if one["score"] is None else read.numbers(one["score"])
        cells = "".join(f'<td class="n">{safe(cell)}</td>' for cell in (mean, len(one["trials"]) - one["failed"], wins))
        rows.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    said = (
        f"Trained again with fresh seeds, in {confirmation['share']:.0%} of all training time: mean score on "
        f"validation and guard rows together, and how often each would win were other rows drawn. {_noise(read)}"
    )
    return (
        f'<div><h3>Confirmation</h3><div class="scroll"><table><caption>{said}</caption><thead><tr>'
        '<th scope="col">configuration of</th><th scope="col" class="n">mean</th><th scope="col" class="n">trainings'
        f'</th><th scope="col" class="n">wins</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div></div>'
    )


def _noise(read: Read) -> str:
    floor = read.found["noise_floor"]
    if floor is None:
        return ""
    apart = f"{100 * floor:.2g} points" if read.numbers.share else f"{floor:.3g}"
    return f"Two trainings of one configuration differ by about {apart}."


def search(read: Read) -> str:
    """Best so far against trials and against seconds, and learning curves."""
    asked = (read.trials, read.found, read.numbers, read.winner)
    by_trial, by_time = panels.progress(*asked), panels.progress(*asked, read.clock)
    marks = legend("win", "base", "ok", "cut", "bad", "far")
    pauses = len(read.clock.pauses)
    left_out = f" {pauses} pause{'s' if pauses > 1 else ''} in which nothing ran left out." if pauses else ""
    thin = len(searched(read.trials)) > panels.MOST_DOTS
    fewer = f" Drawn are {panels.MOST_DOTS} trials: the best, and evenly some of the others." if thin else ""
    winner = None if read.chosen is None else int(read.chosen["trial"])
    is_other = read.found["winner"] is not None and read.winner != read.found["best"]["trial"]
    aside = " The winner was chosen by guard rows as well, and is another one." if is_other else ""
    step = _step(read)
    kept = " A mark is the epoch whose weights were kept." if step == "epoch" else ""
    curves = panels.curves(read.trials, read.reports, read.found, read.numbers, winner, step)
    figures = [
        figure(
            "Best so far, over trials",
            by_trial,
            f"Each mark is a trial's score on validation rows; the line is the best so far.{aside}{fewer}",
            marks,
        ),
        figure("Best so far, over time", by_time, f"The same, when each trial ended.{left_out}"),
        figure(
            "Learning curves" if step == "epoch" else f"Scores {step} by {step}",
            curves,
            f"{read.found['objective']} as Keras reported it, {step} by {step}.{kept} Pruned trials end in a ring "
            "where they were stopped.",
            legend("win line", "ok line", "base line", "cut line"),
        ),
    ]
    shown = "".join(figure for figure in figures if figure)
    return f'<div class="grid">{shown}</div>' if shown else "<p>No trial has completed yet.</p>"


def _step(read: Read) -> str:
    """What trials report after: an epoch, a fold or a repeat."""
    plan = read.found.get("validation")
    return "epoch" if plan is None else parse(plan["plan"]).step


def parameters(read: Read) -> str:
    """Importance of each hyperparameter, parallel coordinates, and slices."""
    found, tried = read.importances, [t for t in searched(read.trials) if t.state.is_finished]
    known = read.space.parameters
    order = [one.key for one in found.parameters]
    order += [key for key in known if key not in order and any(key in t.params for t in tried)]
    if not order:
        return ""
    varied = [key for key in order if len({t.params[key] for t in tried if key in t.params}) > 1]
    asked = (read.found, read.numbers, read.winner)
    lines = parameter_panels.parallel(tried, [known[key] for key in varied[:_MOST_SLICES]], *asked)
    figures = [
        figure("Importance", parameter_panels.importance(found), _explained(found)),
        figure(
            "Parallel coordinates",
            lines,
            "One line per trial with a score, through its values down to its score; axes have the space's own scales.",
            legend("win line", "base line", "good line", "rest line"),
        ),
    ]
    said = "" if found.parameters else f"<p>Importance: nothing shown. {safe(_because(found))}</p>\n"
    alike = [key for key in order if key not in varied]
    constant = f'<p class="note">Not varied: {safe(", ".join(alike))}.</p>' if alike else ""
    slices = "".join(_slice(known[key], tried, read) for key in varied[:_MOST_SLICES])
    spread = '<p class="note">Trials that share a value lie side by side.</p>'
    left = len(varied) - _MOST_SLICES
    more = f'<p class="note">{left} more parameters are in `heldout trials --csv`.</p>' if left > 0 else ""
    above = "".join(figure for figure in figures if figure)
    return (
        f'{said}<div class="grid">{above}</div>\n{constant}'
        + (
            f"<h3 style='margin:28px 0 10px'>Slices: score over each parameter</h3>{legend(*MARKS)}{spread}"
            if slices
            else ""
        )
        + f'<div class="grid" style="margin-top:14px">{slices}</div>{more}'
    )


def _explained(found: Importances) -> str:
    if found.explained is None:
        return ""
    share, low, high = found.explained
    head = "" if found.why is None else f"Nothing shown: {found.why}. "
    silent = f" Not looked at, as they were constant or rare: {', '.join(found.silent)}." if found.silent else ""
    return (
        f"{head}How much worse a random forest predicts the rank of trials it has not seen once a parameter's values "
        f"are exchanged, of {found.trials} trials; a conditional parameter's among those that had it. Lines are 95 % "
        f"intervals for all bars together. The forest explains {max(share, 0.0):.0%} of the differences in rank "
        f"({max(low, 0.0):.0%} to {min(high, 1.0):.0%}). It speaks of the values that this search tried.{silent}"
    )


def _because(found: Importances) -> str:
    why = found.why or "No parameter was varied"
    return f"{why[0].upper()}{why[1:]}."


def _slice(parameter: Parameter, tried: Sequence[Trial], read: Read) -> str:
    chart = parameter_panels.slice_of(parameter, tried, read.found, read.numbers, read.winner)
    had = sum(parameter.key in t.params for t in tried)
    said = [] if had == len(tried) else [f"In {had} of {len(tried)} trials"]
    said += [f"{name} is {_any_of(values)}" for name, values in parameter.conditions]
    scale = {"log": "log scale", "reverse_log": "reversed log scale"}.get(parameter.domain.sampling, "")
    note = (": where ".join([said[0], " and ".join(said[1:])]) if len(said) > 1 else "".join(said)).strip()
    return figure(parameter.key, chart, ". ".join(part for part in (note, scale.capitalize()) if part))


def _any_of(values: Sequence[Any]) -> str:
    return " or ".join(map(str, values))


def suggested(read: Read) -> str:
    """What would be worth searching next."""
    if read.chosen is None and not read.found["failures"]:
        return ""
    epochs = None if read.config is None else read.config.epochs
    of = (read.trials, read.space, read.importances, str(read.found["study"]))
    found = suggestions(*of, epochs, by_epoch=_step(read) == "epoch")
    if not found:
        return (
            "<p>Nothing stands out: the best values lie inside their ranges, and the best trials had stopped improving "
            "before their last epoch.</p>"
        )
    items = "".join(f"<li><b>{coded(one.do)}</b> {coded(one.why)}</li>" for one in found)
    return f'<ol class="next">{items}</ol>'


def failures(read: Read) -> str:
    """Failed trials by kind, with a message each, and attempts that were followed by another."""
    failed = [t for t in read.trials if t.state is TrialState.FAILED]
    retries = read.found["retries"]
    again = ", ".join(f"{count} {reason}" for reason, count in retries.items())
    tried = f"<p>Attempts that failed and were followed by another: {safe(again)}.</p>" if retries else ""
    if not failed:
        return f"<p>No trial failed.</p>{tried}" if read.trials else ""
    rows = []
    for reason, count in Counter(t.reason for t in failed).most_common():
        mine = [t for t in failed if t.reason == reason]
        numbers = ", ".join(str(t.number) for t in mine[:12]) + (" …" if len(mine) > 12 else "")
        rows.append(
            f'<tr><th scope="row"><code>{safe(reason)}</code></th><td class="n">{count}</td>'
            f"<td>{coded(_REASONS.get(str(reason), ''))}</td><td>{safe(numbers)}</td>"
            f"<td>{safe(cut(mine[0].message or '', _LONGEST))}</td></tr>"
        )
    heads = "".join(
        f'<th scope="col"{" class=n" if name == "how many" else ""}>{name}</th>'
        for name in ("kind", "how many", "meaning", "trials", "the first one's message")
    )
    return (
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>{tried}'
    )


def slots(read: Read) -> str:
    """Which slot trained which trial when."""
    chart = panels.slots(read.trials, read.clock)
    if not chart:
        return ""
    ran = [t for t in read.trials if t.started is not None and t.ended is not None]
    busy = panels.share_busy(ran, read.clock)
    count = len({t.slot for t in ran})
    said = f"{count} slot{'s' if count > 1 else ''}, busy {busy:.0%} of the time."
    said += " Dashed: a pause in which nothing ran is left out." if read.clock.pauses else ""
    colours = legend("ok busy", "cut busy", "bad busy", "again busy")
    return f'<div class="grid">{figure("Slots over time", chart, said, colours)}</div>'


def table(read: Read) -> str:
    """Every trial, behind a fold."""
    if not read.trials:
        return ""
    keys = list(dict.fromkeys(key for t in read.trials for key in t.params))
    heads = ["trial", "state", read.metric, "epochs", "seconds", *keys]
    rows = []
    for t in read.trials[:_MOST_ROWS]:
        state = t.state.lower() + (f" ({t.reason})" if t.reason else "")
        state += f", trains {t.confirms} again" if t.confirms is not None else ""
        cells = [str(t.number), state, "" if t.score is None else read.numbers(t.score), str(t.epochs)]
        cells.append("" if t.seconds is None else f"{t.seconds:.1f}")
        cells += [cut(parameter_panels.written(t.params[key]), 40) if key in t.params else "" for key in keys]
        rows.append("<tr>" + "".join(f"<td>{safe(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f'<th scope="col">{safe(cut(name, 40))}</th>' for name in heads)
    left = len(read.trials) - _MOST_ROWS
    more = f"<p>{left} more are in `heldout trials --csv`.</p>" if left > 0 else ""
    return (
        f"<details><summary>{len(read.trials)} trainings, with their parameters</summary><div class='scroll'><table>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{more}</details>"
    )


def made(read: Read) -> str:
    """What it takes to know what this was: rows, settings, versions."""
    config, data, study = read.config, read.found["data"] or {}, read.study
    facts: list[tuple[str, str]] = []
    if data:
        tiers = ", ".join(f"{name} {count}" for name, count in (data.get("tiers") or {}).items())
        facts += [("rows", f"{data.get('rows')} ({tiers})"), ("digest of the rows", str(data.get("digest")))]
    if config is not None:
        facts += [("sampler, pruner", f"{config.sampler}, {config.pruner}"), ("seed", str(config.seed))]
        facts += [("trials asked for", str(config.trials))]
    versions = ", ".join(f"{name} {version}" for name, version in (study.get("versions") or {}).items())
    facts += [("versions", versions)] if versions else []
    facts += [("digest of the space", str((study.get("space") or {}).get("digest")))]
    corrected = read.found["corrected"]
    if corrected is not None:
        facts += [("corrected estimate", f"{corrected['method']}; of {corrected['scope']}")]
    if read.found["test"] is not None:
        facts += [("test interval", str(read.found["test"]["method"]))]
    for one in read.found["warm_start"]:
        facts.append(("warm start from", f"{one['study']}{', with other rows' if one['other_data'] else ''}"))
    items = "".join(f"<dt>{safe(name)}</dt><dd>{safe(value)}</dd>" for name, value in facts)
    return f"<dl>{items}</dl>"

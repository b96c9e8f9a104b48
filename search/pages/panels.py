"""Charts of how a search went, as inline SVG: scores, progress, learning curves, and slots over time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from search.pages import svg
from search.trial import Report, Trial, TrialState, best, searched

Found = Mapping[str, Any]

MOST_DOTS = 400
"""Trials that a chart draws; of more, the best and evenly some of the others."""

PAUSE_SECONDS = 60.0
"""A time of at least so long in which nothing ran is left out of charts over time."""

_BOTTOM = 40  # for numbers and title of the lower axis
_LOG_FROM = 50  # the ratio of scores from which on an axis is logarithmic
_MOST_PRUNED = 60
_BEST = 5


@dataclass(frozen=True)
class Numbers:
    """How scores are written: shares of rows in percent, all else with four significant digits."""

    share: bool

    def __call__(self, value: float) -> str:
        return f"{100 * value:.1f} %" if self.share else f"{value:.4g}"

    def tick(self, value: float) -> str:
        """On an axis, as short as may be."""
        return f"{100 * value:.4g} %" if self.share else f"{value:.4g}"


def kind_of(trial: Trial, winner: int | None) -> str:
    """Its mark; see ``svg.mark``."""
    if trial.number == winner:
        return "win"
    if trial.number == 0 and trial.state is TrialState.COMPLETE:
        return "base"
    return {TrialState.COMPLETE: "ok", TrialState.PRUNED: "cut"}.get(trial.state, "bad")


def thinned(trials: Sequence[Trial], most: int = MOST_DOTS) -> list[Trial]:
    """The trials, or of too many the best quarter of those drawn, and evenly some of the others; by number."""
    if len(trials) <= most:
        return list(trials)
    order = sorted(trials, key=lambda t: (math.inf if t.loss is None else t.loss, t.number))
    first, rest = order[: most // 4], sorted(order[most // 4 :], key=lambda t: t.number)
    step = len(rest) / (most - len(first))
    return sorted([*first, *(rest[int(k * step)] for k in range(most - len(first)))], key=lambda t: t.number)


def trial_scale(trials: Sequence[Trial], direction: str, start: float, end: float, share: bool) -> svg.Scale:
    """An axis for the scores of these trials: of those that completed, unless there are few; the baseline is wanted."""
    scored = [t for t in trials if t.score is not None]
    done = [t for t in scored if t.state is TrialState.COMPLETE]
    values = [t.score or 0.0 for t in (done if len(done) > 2 else scored)]
    return score_scale(values, direction, start, end, share, [t.score or 0.0 for t in done if t.number == 0])


def score_scale(
    values: Iterable[float], direction: str, start: float, end: float, share: bool, wanted: Sequence[float] = ()
) -> svg.Scale:
    """An axis for scores: where a tenth of them would squeeze the others, it ends before these.

    Args:
        wanted: Those that should be on it if there is room.
    """
    known = sorted(value for value in values if math.isfinite(value))
    if not known:
        return svg.Scale(0.0, 1.0, start, end)
    low, high = known[0], known[-1]
    if len(known) > 4:
        held = known[len(known) // 10 :] if direction == "max" else known[: len(known) - len(known) // 10]
        if held[-1] / 2 - held[0] / 2 < 0.6 * (high / 2 - low / 2):
            low, high = held[0], held[-1]
            room = 2 * (high - low)
            low = min([low, *(value for value in wanted if value >= low - room)])
            high = max([high, *(value for value in wanted if value <= high + room)])
    if low > 0 and high / low > _LOG_FROM:
        return svg.Scale(low / 1.1, high * 1.1, start, end, log=True)
    wide = max(0.06 * (high - low), ((0.02 if share else abs(high) * 0.02 or 1.0) - (high - low)) / 2)
    if not math.isfinite(high - low):
        wide = 0.0
    low, high = low - wide, high + wide
    return svg.Scale(max(low, 0.0) if share else low, min(high, 1.0) if share else high, start, end)


def scores(found: Found, numbers: Numbers) -> str:
    """Winner and baseline on each tier, with their intervals."""
    rows = score_rows(found)
    if not rows:
        return ""
    ends = [end for row in rows for end in (row[2], *(row[3] or ()))]
    height = 30 + 26 * len(rows)
    left = 118.0
    low, high = min(ends), max(ends)
    wide = max((high - low) * 0.08, ((0.02 if numbers.share else abs(high) * 0.02 or 1.0) - (high - low)) / 2)
    x = svg.Scale(low - wide, high + wide, left, svg.WIDTH - 58.0)
    bottom = height - 22.0
    out = [svg.line(x.start, bottom, x.end, bottom, "axis")]
    for tick in x.ticks(3):
        if not numbers.share or -1e-9 <= tick <= 1 + 1e-9:
            out.append(svg.line(x.at(tick), 4, x.at(tick), bottom, "grid"))
            out += svg.numbers_below(x, bottom, [tick], numbers.tick)
    for place, (tier, of, value, interval) in enumerate(rows):
        y, kind = 16 + 26.0 * place, "base" if of == "baseline" else "win"
        out.append(svg.text(0, y + 4, f"{tier}, {of}"))
        if interval is not None:
            out.append(svg.line(x.at(interval[0]), y, x.at(interval[1]), y, f"{kind} span"))
        out.append(svg.mark(kind, x.at(value), y, f"{of}, {tier}: {numbers(value)}"))
        out.append(svg.text(svg.WIDTH - 52, y + 4, numbers(value), "strong"))
    said = "; ".join(f"{of} on {tier} rows {numbers(value)}" for tier, of, value, _ in rows)
    return svg.chart(height, f"Scores with intervals: {said}", "".join(out))


def score_rows(found: Found) -> list[tuple[str, str, float, Sequence[float] | None]]:
    """What is known of winner and baseline: tier, whose, score, interval."""
    winner, baseline, corrected, test = (found[key] for key in ("winner", "baseline", "corrected", "test"))
    ours = "winner" if winner is not None else "best"
    winner = winner or found["best"]
    if baseline is not None and winner is not None and baseline["trial"] == winner["trial"]:
        baseline = None
    is_corrected = corrected is not None and corrected["interval"] is not None
    rows: list[tuple[str, str, Any, Any]] = []
    for tier in ("validation", "guard"):
        for of, role in ((ours, winner), ("baseline", baseline)):
            if role is not None:
                rows.append((tier, of, role.get(tier), role.get(f"{tier}_interval")))
        if tier == "guard" and is_corrected and winner is not None:
            at = next(k for k, row in enumerate(rows) if row[:2] == ("guard", ours))
            rows[at] = ("guard", ours, corrected["estimate"], corrected["interval"])
    if test is not None:
        rows.append(("test", ours, test["winner"], test["interval"]))
        if baseline is not None:
            rows.append(("test", "baseline", test["baseline"], test["baseline_interval"]))
    return [row for row in rows if row[2] is not None and math.isfinite(row[2])]


@dataclass(frozen=True)
class Clock:
    """Seconds since the first trial began, with pauses left out.

    Attributes:
        spans: When at least one trial ran, as pairs of times, in order; short gaps are part of a span.
    """

    spans: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, trials: Iterable[Trial]) -> Clock:
        """The clock of these trials."""
        spans: list[tuple[float, float]] = []
        for begin, end in sorted((t.started, t.ended) for t in trials if t.started and t.ended is not None):
            if spans and begin - spans[-1][1] < PAUSE_SECONDS:
                spans[-1] = (spans[-1][0], max(spans[-1][1], end))
            else:
                spans.append((begin, max(begin, end)))
        return cls(tuple(spans))

    @property
    def total(self) -> float:
        """Seconds in all."""
        return sum(end - begin for begin, end in self.spans)

    @property
    def pauses(self) -> list[float]:
        """Where on the clock something was left out."""
        return [self.at(begin) for begin, _ in self.spans[1:]]

    def at(self, time: float) -> float:
        """Seconds on the clock at a time since the Unix epoch."""
        return sum(min(max(time - begin, 0.0), end - begin) for begin, end in self.spans)


def seconds(total: float) -> tuple[float, str]:
    """In what a time of this length is counted: how many seconds it has, and its name."""
    return (1.0, "seconds") if total < 300 else (60.0, "minutes") if total < 3 * 3600 else (3600.0, "hours")


def progress(
    trials: Sequence[Trial], found: Found, numbers: Numbers, winner: int | None, clock: Clock | None = None
) -> str:
    """Every trial's score and the best so far, over the number of trials or over time.

    Args:
        clock: For one over time; None for one over trials.
    """
    ended = [t for t in searched(trials) if t.state.is_finished]
    if clock is not None:
        ended = sorted((t for t in ended if t.ended is not None), key=lambda t: t.ended or 0.0)
    scored = [t for t in ended if t.score is not None]
    if not any(t.state is TrialState.COMPLETE for t in scored):
        return ""
    unit, named = seconds(clock.total) if clock is not None else (1.0, "trials")
    at: Callable[[Trial], float] = (
        (lambda t: float(t.number)) if clock is None else (lambda t: clock.at(t.ended or 0.0) / unit)
    )
    height = 220.0
    y = trial_scale(scored, found["direction"], height - _BOTTOM, 10, numbers.share)
    left = svg.left_of([numbers.tick(tick) for tick in y.ticks()])
    last = max(at(t) for t in ended)
    x = svg.Scale(0, max(last, 1e-9), left, svg.WIDTH - 8.0)
    title = "trial" if clock is None else f"{named} since the start"
    names = "{:.4g}".format if clock is not None else _whole
    out = [svg.grid(y, x.start, x.end, numbers.tick), svg.lower(x, y.start, names, title)]
    for trial in thinned(ended):
        said = f"trial {trial.number}: " + (numbers(trial.score) if trial.score is not None else str(trial.reason))
        if trial.score is None:
            out.append(svg.mark("bad", x.at(at(trial)), y.start, said))
        else:
            kind = kind_of(trial, winner) if y.holds(trial.score) else "far"
            out.append(svg.mark(kind, x.at(at(trial)), y.at(trial.score), said))
    steps: list[tuple[float, float]] = []
    leader: Trial | None = None
    for trial in ended:
        leader = best([trial] if leader is None else [leader, trial]) or leader
        if leader is not None and leader.score is not None:
            place = x.at(at(trial)), y.at(leader.score)
            steps += [(place[0], steps[-1][1]), place] if steps and steps[-1][1] != place[1] else [place]
    out.append(svg.path(_corners(steps), "best"))
    final = "" if leader is None or leader.score is None else f"{numbers(leader.score)} in trial {leader.number}"
    over = "trials" if clock is None else f"{last:.3g} {named}"
    return svg.chart(height, f"Best validation score so far over {over}: {final} at the end", "".join(out))


def _corners(steps: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A line of steps without the points that are on the way between two others."""
    return [
        point
        for k, point in enumerate(steps)
        if k in (0, len(steps) - 1) or not steps[k - 1][1] == point[1] == steps[k + 1][1]
    ]


def curves(
    trials: Sequence[Trial],
    reports: Iterable[Report],
    found: Found,
    numbers: Numbers,
    winner: int | None,
    step: str = "epoch",
) -> str:
    """What Keras reported of the objective step by step: the winner, the next best, the baseline, and the pruned.

    Args:
        step: What is reported after, "epoch", "fold" or "repeat".
    """
    series: dict[int, dict[int, float]] = {}
    known = {trial.number: trial for trial in trials}
    for report in reports:
        value = report.metrics.get(str(found["objective"]))
        trial = known.get(report.trial)
        if trial is not None and report.attempt == trial.attempt and value is not None and math.isfinite(value):
            series.setdefault(report.trial, {})[report.step] = value
    shown = _shown_curves(trials, series, winner)
    if not shown:
        return ""
    height = 220.0
    # Pruned ones begin low: the scale is that of those which were not.
    kept = [number for kind, number in shown if kind != "cut"] or [number for _, number in shown]
    values = [value for number in kept for at, value in series[number].items() if at > 1 or len(series[number]) < 3]
    y = score_scale(values, found["direction"], height - _BOTTOM, 10, numbers.share and _is_share(values))
    left = svg.left_of([numbers.tick(tick) for tick in y.ticks()])
    most = max(max(series[number]) for _, number in shown)
    x = svg.Scale(1, max(most, 2), left, svg.WIDTH - 8.0)
    out = [svg.grid(y, x.start, x.end, numbers.tick), svg.lower(x, y.start, _whole, step)]
    for kind, number in shown:
        points = sorted(series[number].items())
        trial = known[number]
        said = f"trial {number}, {len(points)} {step}s" + ("" if trial.score is None else f": {numbers(trial.score)}")
        places = [(x.at(number), y.at(value)) for number, value in points]
        if len(places) > 1:
            out.append(svg.path(places, f"curve {kind}", said))
        if kind == "cut" or len(places) == 1:
            out.append(svg.mark(kind, *places[-1], said))
        elif step == "epoch" and trial.best_epoch in series[number]:
            out.append(svg.mark(kind, x.at(trial.best_epoch), y.at(series[number][trial.best_epoch]), f"kept: {said}"))
    count = sum(kind == "cut" for kind, _ in shown)
    label = f"Learning curves of the best {sum(kind in ('win', 'ok') for kind, _ in shown)} trials"
    return svg.chart(height, label + (f" and {count} pruned ones" if count else ""), "".join(out))


def _shown_curves(trials: Sequence[Trial], series: Mapping[int, Any], winner: int | None) -> list[tuple[str, int]]:
    """Which curves are drawn, as what: the most important last, on top."""
    ranks = [t for t in searched(trials) if t.state is TrialState.COMPLETE and t.number in series]
    ranks.sort(key=lambda t: (t.loss, t.number))
    pruned = [t for t in searched(trials) if t.state is TrialState.PRUNED and t.number in series]
    top = [("ok", t.number) for t in ranks[:_BEST] if t.number not in (0, winner)]
    out = [("cut", t.number) for t in thinned(pruned, _MOST_PRUNED)] + top[::-1]
    out += [("base", 0)] if 0 in series and winner != 0 else []
    return out + ([("win", winner)] if winner is not None and winner in series else [])


def _is_share(values: Iterable[float]) -> bool:
    return all(0 <= value <= 1 for value in values)


def _whole(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else ""


def slots(trials: Sequence[Trial], clock: Clock) -> str:
    """Which slot ran which trial when."""
    ran = [t for t in trials if t.started is not None and t.ended is not None]
    if not ran or clock.total <= 0:
        return ""
    names = sorted({t.slot for t in ran}, key=lambda slot: (slot is None, slot or 0))
    row = max(3.0, min(22.0, 220 / len(names)))
    height = 12 + row * len(names) + _BOTTOM
    unit, named = seconds(clock.total)
    x = svg.Scale(0, clock.total / unit, 44, svg.WIDTH - 8.0)
    bottom = height - _BOTTOM
    out = [svg.lower(x, bottom, title=f"{named} since the start")]
    for place, name in enumerate(names):
        if row >= 11 or place in (0, len(names) - 1):
            label = "slot ?" if name is None else f"slot {name}"
            out.append(svg.text(39, 8 + row * (place + 0.5) + 4, label, "tick", "end"))
    for trial in ran:
        begin, end = (x.at(clock.at(time or 0.0) / unit) for time in (trial.started, trial.ended))
        again = "" if trial.confirms is None else f", trains trial {trial.confirms} again"
        said = f"trial {trial.number}: {trial.state.lower()} after {trial.seconds or 0.0:.1f} s{again}"
        y = 8 + row * names.index(trial.slot)
        kind = "again" if trial.confirms is not None and trial.state is TrialState.COMPLETE else kind_of(trial, None)
        kind = "ok" if kind == "base" else kind
        out.append(svg.bar(begin, y + row * 0.08, end - begin, row * 0.84, f"{kind} busy", said))
    for pause in clock.pauses:
        out.append(svg.line(x.at(pause / unit), 4, x.at(pause / unit), bottom, "pause"))
    label = f"{len(names)} slots over {clock.total / unit:.3g} {named}, busy {share_busy(ran, clock):.0%} of it"
    return svg.chart(height, label, "".join(out))


def share_busy(trials: Sequence[Trial], clock: Clock) -> float:
    """The part of all slots' time, pauses left out, in which they trained."""
    names = {t.slot for t in trials if t.started is not None and t.ended is not None}
    ran = sum(t.seconds or 0.0 for t in trials)
    return min(1.0, ran / (clock.total * len(names))) if names and clock.total > 0 else 0.0

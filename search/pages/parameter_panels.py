"""Charts of a search's hyperparameters, as inline SVG: importance, parallel coordinates, and slices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from search.definition.domain import Domain
from search.definition.space import Parameter
from search.pages import svg
from search.pages.importance import Importances
from search.pages.panels import Found, Numbers, kind_of, thinned, trial_scale
from search.trial import Trial, TrialState, Value

_MOST_LINES = 200
_ROW = 46.0
_ABSENT = 14.0  # where a line passes an axis that its trial did not have


def importance(found: Importances) -> str:
    """Bars with their intervals."""
    if not found.parameters:
        return ""
    height = 34.0 * len(found.parameters) + 36
    bottom = height - 34
    most = max(0.05, min(1.0, max(one.high for one in found.parameters)))
    x = svg.Scale(0.0, most, 1, svg.WIDTH - 12.0)
    out = []
    for tick in x.ticks(4):
        out.append(svg.line(x.at(tick), 2, x.at(tick), bottom, "grid"))
    out += svg.numbers_below(x, bottom, x.ticks(4), "{:.0%}".format if most > 0.1 else "{:.3g}".format)
    out.append(svg.text(x.start, bottom + 30, "of the differences in rank go with its values", "tick"))
    for place, one in enumerate(found.parameters):
        y = 34.0 * place
        name = svg.cut(one.key, svg.letters(svg.WIDTH - 90))
        out.append(svg.text(1, y + 13, name, "strong" if one.is_shown else "tick"))
        share = f"{max(one.share, 0.0):.0%}" if one.is_shown else "not shown"
        out.append(svg.text(svg.WIDTH, y + 13, share, "strong" if one.is_shown else "tick", "end"))
        said = f"{one.key}: {one.share:.1%}, between {one.low:.1%} and {one.high:.1%}, in {one.trials} trials"
        style = "ok bar" if one.is_shown else "cut bar"
        out.append(svg.bar(x.start, y + 18, x.at(max(0.0, one.share)) - x.start, 9, style, said))
        out.append(svg.line(x.at(one.low), y + 22.5, x.at(one.high), y + 22.5, "whisker"))
    shown = [f"{one.key} {one.share:.0%}" for one in found.parameters if one.is_shown]
    return svg.chart(height, f"Importance of hyperparameters: {', '.join(shown) or 'none is shown'}", "".join(out))


def scale_of(domain: Domain, start: float, end: float) -> Callable[[Value], float | None]:
    """Where on an axis a value of this domain lies, on the domain's own scale: a log scale where the space has one."""

    def at(value: Value) -> float | None:
        return start + domain.unit(value) * (end - start) if domain.contains(value) else None

    return at


def ticks_of(domain: Domain, most: int) -> list[Value]:
    """Values to write below the axis of a domain."""
    if domain.count is not None and domain.count <= most:
        return [domain.value((k + 0.5) / domain.count) for k in range(domain.count)]
    if not domain.is_numeric or domain.low is None or domain.high is None:
        steps = max(2, min(most, domain.count or 2))
        return list(dict.fromkeys(domain.value(k / (steps - 1)) for k in range(steps)))
    if domain.sampling == "linear":
        raw: list[float] = svg.linear_ticks(domain.low, domain.high, most)
    elif domain.sampling == "log":
        raw = [domain.low, *svg.log_ticks(domain.low, domain.high, most), domain.high]
    else:
        raw = [float(domain.value(k / (most - 1))) for k in range(most)]
    nearest = [_nearest(domain, value) for value in raw]
    return sorted({value for value in nearest if value is not None})


def _nearest(domain: Domain, value: float) -> float | None:
    """The domain's own value at a round number, which steps may pass by."""
    asked = int(value) if domain.kind == "int" and value == int(value) else value
    match = domain.match(asked)
    if match is not None:
        return float(match) if domain.kind == "float" else int(match)
    low, high = domain.low or 0, domain.high or 0
    if not low <= value <= high:
        return None
    linear = (value - low) / (high - low) if high > low else 0.0
    logarithmic = domain.sampling == "log" and low > 0
    found = domain.value(math.log(value / low) / math.log(high / low) if logarithmic else linear)
    return None if isinstance(found, str) else found


def written(value: Value) -> str:
    """A value, short."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _numbers(at: Callable[[Value], float | None], y: float, domain: Domain, room: float) -> list[str]:
    """Strokes and values below a parameter's axis; the ends first, and no value on another."""
    out: list[str] = []
    taken: list[tuple[float, float]] = []
    found = ticks_of(domain, 6)
    for value in sorted(found, key=lambda value: value not in (found[0], found[-1])):
        place = at(value)
        if place is None:
            continue
        said = svg.cut(written(value), svg.letters(room / max(1, min(len(found), 3))))
        half = len(said) * 3.05
        middle = min(max(place, half), svg.WIDTH - half)
        out.append(svg.line(place, y, place, y + 3, "axis"))
        if all(middle + half + 4 < low or middle - half - 4 > high for low, high in taken):
            out.append(svg.text(middle, y + 14, said, "tick halo", "middle"))
            taken.append((middle - half, middle + half))
    return out


def parallel(
    trials: Sequence[Trial], parameters: Sequence[Parameter], found: Found, numbers: Numbers, winner: int | None
) -> str:
    """One line per trial, from axis to axis: parameters from above, and below them the score.

    The axes lie one above the other, so that a long name has room. A line passes at the left where its trial did not
    have the parameter.
    """
    scored = [t for t in trials if t.score is not None and t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    if len(scored) < 2 or not parameters:
        return ""
    drawn = thinned(scored, _MOST_LINES)
    height = _ROW * (len(parameters) + 1) + 8
    some_lack = any(parameter.key not in trial.params for parameter in parameters for trial in drawn)
    start = _ABSENT + 22 if some_lack else 4.0
    end = svg.WIDTH - 6.0
    goal = trial_scale(scored, found["direction"], start, end, numbers.share)
    ways = [scale_of(parameter.domain, start, end) for parameter in parameters]
    lines, top = [], _top(drawn)
    for trial in sorted(drawn, key=lambda t: (t.number == winner, t.number in top, -(t.loss or 0.0))):
        points = []
        for place, (parameter, at) in enumerate(zip(parameters, ways, strict=True)):
            where = at(trial.params[parameter.key]) if parameter.key in trial.params else None
            points.append((_ABSENT if where is None else where, _ROW * place + 24))
        points.append((goal.at(trial.score or 0.0), _ROW * len(parameters) + 24))
        kind = kind_of(trial, winner)
        style = kind if kind in ("win", "base") else "good" if trial.number in top else "rest"
        lines.append(svg.path(points, f"way {style}", f"trial {trial.number}: {numbers(trial.score or 0.0)}"))
    out = []
    for place, (parameter, at) in enumerate(zip(parameters, ways, strict=True)):
        y = _ROW * place + 24
        out += _axis(svg.cut(parameter.key, svg.letters(svg.WIDTH)), y, start, end)
        out += _numbers(at, y, parameter.domain, end - start)
        if any(parameter.key not in trial.params for trial in drawn):
            out.append(svg.text(_ABSENT, y + 14, "none", "tick", "middle"))
            out.append(svg.line(_ABSENT - 8, y, _ABSENT + 8, y, "axis"))
    y = _ROW * len(parameters) + 24
    out += _axis(str(found["objective"]), y, start, end)
    out += svg.numbers_below(goal, y, goal.ticks(4), numbers.tick)
    label = f"Parallel coordinates of {len(drawn)} trials over {len(parameters)} hyperparameters and the score"
    return svg.chart(height, label, "".join(lines + out))


def _axis(name: str, y: float, start: float, end: float) -> list[str]:
    return [svg.line(start, y, end, y, "axis"), svg.text(0, y - 8, name, "strong halo")]


def _top(trials: Sequence[Trial]) -> set[int]:
    """The best tenth, three at least."""
    done = sorted((t for t in trials if t.state is TrialState.COMPLETE), key=lambda t: (t.loss, t.number))
    return {t.number for t in done[: max(3, len(trials) // 10)]}


def slice_of(parameter: Parameter, trials: Sequence[Trial], found: Found, numbers: Numbers, winner: int | None) -> str:
    """Scores of the trials that had a parameter, over its values."""
    had = [t for t in thinned(trials) if parameter.domain.contains(t.params.get(parameter.key))]
    scored = [t for t in had if t.score is not None]
    if not scored:
        return ""
    height = 172.0
    y = trial_scale(trials, found["direction"], height - 26, 8, numbers.share)
    left = svg.left_of([numbers.tick(tick) for tick in y.ticks(4)])
    at = scale_of(parameter.domain, left + 8, svg.WIDTH - 10.0)
    out = [svg.grid(y, left, svg.WIDTH - 2.0, numbers.tick), svg.line(left, y.start, svg.WIDTH - 2, y.start, "axis")]
    out += _numbers(at, y.start, parameter.domain, svg.WIDTH - left)
    few = parameter.domain.count is not None and parameter.domain.count <= 8
    wide = (svg.WIDTH - left) / (parameter.domain.count or 1) * 0.3 if few else 0.0
    for trial in sorted(had, key=lambda t: (t.number == winner, t.loss is not None, -(t.loss or 0.0))):
        value = trial.params[parameter.key]
        # Side by side where many share a value: by the golden ratio, so that neighbours lie apart.
        place = (at(value) or 0.0) + wide * 2 * (trial.number * 0.618034 % 1 - 0.5)
        said = f"trial {trial.number}, {written(value)}: "
        if trial.score is None:
            out.append(svg.mark("bad", place, y.start - 5, said + str(trial.reason)))
        else:
            kind = kind_of(trial, winner) if y.holds(trial.score) else "far"
            out.append(svg.mark(kind, place, y.at(trial.score), said + numbers(trial.score)))
    return svg.chart(height, f"Scores over {parameter.key}, {len(scored)} trials", "".join(out))

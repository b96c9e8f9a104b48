"""The picture of a study: what winner and baseline score on each tier, and how the search got there."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

Found = Mapping[str, Any]

# Okabe and Ito's colours, which people with any kind of colour blindness tell apart.
_WINNER, _BASELINE, _VALIDATION, _GUARD = "#0072B2", "#D55E00", "#000000", "#009E73"
_DPI = 100
_LOG_FROM = 50  # the ratio of scores from which on a linear axis shows the largest only
_LEAST_POINTS = 0.02


@dataclass(frozen=True)
class _Dot:
    """One score: of whom, on which line of the panel, and its interval if it has one."""

    of: str
    line: float
    value: float
    interval: Sequence[float] | None


def draw(path: Path, found: Found, series: Sequence[tuple[int, float, float | None]]) -> None:
    """Write the picture of a study as a PNG of 1200 x 520 pixels, whole or not at all.

    Args:
        path: Replaced if it exists; its folder must exist.
        found: The report; see ``report.report``.
        series: For each completed trial its number, the best validation score up to it, and the guard score of the
            trial that has that one; in the order of the trials.
    """
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        figure(found, series).savefig(temporary, format="png", dpi=_DPI)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def figure(found: Found, series: Sequence[tuple[int, float, float | None]]) -> Figure:
    """What ``draw`` writes, of its own and known to nobody else: no display, no state that threads share."""
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1, wspace=0.03)
    made = Figure(figsize=(12, 5.2), dpi=_DPI, layout=layout)
    FigureCanvasAgg(made)
    title = f"{found['study']}: {_name(found)} ({'lower' if found['direction'] == 'min' else 'higher'} is better)"
    made.suptitle(title, fontsize=15 if len(title) < 90 else 10, parse_math=False)
    left, right = made.subplots(1, 2)
    _scores(left, found)
    _history(right, found, series)
    return made


def _scores(axes: Axes, found: Found) -> None:
    """Dots with their intervals: one line per tier, the baseline below the winner."""
    tiers, dots = _dots(found)
    axes.set_title(f"Scores, with intervals{_levels(found)}", fontsize=13)
    if not dots:
        _empty(axes, "no scores yet")
        return
    for of, colour, marker in (("winner", _WINNER, "o"), ("baseline", _BASELINE, "s")):
        own = [dot for dot in dots if dot.of == of]
        for dot in own:
            if dot.interval is not None:
                axes.plot(dot.interval, [dot.line] * 2, color=colour, linewidth=3, solid_capstyle="butt", alpha=0.6)
            # Above its dot: no other dot or bar comes there, wherever the scores lie.
            axes.annotate(
                _number(dot.value, found),
                (dot.value, dot.line),
                xytext=(0, 9),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=13,
                color=colour,
            )
        if own:
            at = [dot.value for dot in own], [dot.line for dot in own]
            axes.plot(*at, marker, color=colour, markersize=9, label=of, zorder=3)
    axes.set_yticks(range(len(tiers)), tiers, fontsize=13)
    axes.set_ylim(len(tiers) - 0.4, -0.75)
    _scale(axes, "x", [end for dot in dots for end in (dot.value, *(dot.interval or ()))], found, margin=0.18)
    axes.set_xlabel(_name(found), fontsize=13, parse_math=False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False, fontsize=13)
    _plain(axes, "x")


def _levels(found: Found) -> str:
    """Which interval is which, where there are any."""
    test = found["test"] or {}
    level = f"; test {100 * test['level']:.3g} %" if test.get("level") else ""
    return f" (95 %{level})" if found["corrected"] is not None else ""


def _dots(found: Found) -> tuple[list[str], list[_Dot]]:
    """The names of the tiers that have scores, from the top down, and the scores."""
    winner, corrected, test = found["winner"], found["corrected"], found["test"]
    baseline = found["baseline"]
    if winner is not None and baseline is not None and baseline["trial"] == winner["trial"]:
        baseline = None
    tiers: list[str] = []
    dots: list[_Dot] = []

    def add(name: str, *scores: tuple[str, float | None, Sequence[float] | None]) -> None:
        shown = [score for score in scores if score[1] is not None]
        if shown:
            tiers.append(name)
        for of, value, interval in shown:
            if value is not None:
                apart = 0.22 if of == "baseline" else -0.16
                dots.append(_Dot(of, len(tiers) - 1 + apart, value, interval))

    def of(role: Found | None, key: str) -> tuple[float | None, Sequence[float] | None]:
        return (None, None) if role is None else (role.get(key), role.get(f"{key}_interval"))

    rows = (found.get("data") or {}).get("tiers") or {}

    def named(tier: str, more: str = "") -> str:
        return f"{tier}{more}" + (f"\n{rows[tier]} rows" if tier in rows else "")

    add(named("validation"), ("winner", *of(winner, "validation")), ("baseline", *of(baseline, "validation")))
    if corrected is not None and corrected["interval"] is not None:
        guard, name = (corrected["estimate"], corrected["interval"]), named("guard", "\n(winner: corrected)")
    else:
        guard, name = of(winner, "guard"), named("guard")
    add(name, ("winner", *guard), ("baseline", *of(baseline, "guard")))
    if test is not None:
        theirs = (None, None) if baseline is None else (test["baseline"], test["baseline_interval"])
        add(named("test"), ("winner", test["winner"], test["interval"]), ("baseline", *theirs))
    return tiers, dots


def _history(axes: Axes, found: Found, series: Sequence[tuple[int, float, float | None]]) -> None:
    """The best validation score so far, and the guard score of the trial that has it."""
    axes.set_title("Best trial so far: what the search saw, and did not", fontsize=13)
    axes.set_xlabel("trial", fontsize=13)
    if not series:
        _empty(axes, "no completed trials yet")
        return
    numbers = [number for number, _, _ in series]
    validation = [score for _, score, _ in series]
    guard = [math.nan if score is None else score for _, _, score in series]
    known = [value for value in guard if not math.isnan(value)]
    drawn = [("validation", validation, _VALIDATION, "-", "o")]
    if known:
        drawn.append(("guard, looked at afterwards", guard, _GUARD, "--", "D"))
    for name, values, colour, dashes, marker in drawn:
        axes.step(numbers, values, dashes, where="post", color=colour, linewidth=2.5)
        axes.plot(numbers[-1:], values[-1:], marker, color=colour, markersize=8)
        # The legend shows dash and marker together, which the line and its last point have apart.
        axes.plot([], [], dashes, marker=marker, color=colour, linewidth=2.5, markersize=8, label=name)
    _scale(axes, "y", validation + known, found, margin=0.08)
    last = [(values[-1], colour) for _, values, colour, *_ in drawn if not math.isnan(values[-1])]
    for (value, colour), shift in zip(last, _apart(axes, [value for value, _ in last]), strict=True):
        axes.annotate(
            _number(value, found),
            (numbers[-1], value),
            xytext=(10, shift),
            textcoords="offset points",
            va="center",
            fontsize=13,
            color=colour,
            annotation_clip=False,
        )
    span = max(1, numbers[-1] - numbers[0])
    axes.set_xlim(numbers[0] - 0.03 * span, numbers[-1] + 0.17 * span)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.set_ylabel(_name(found), fontsize=13, parse_math=False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False, fontsize=13)
    _plain(axes, "y")


def _apart(axes: Axes, values: Sequence[float]) -> list[float]:
    """Shifts in points that keep labels beside a panel's values from covering each other."""
    if len(values) < 2:
        return [0.0] * len(values)
    made: Any = axes.figure  # of which matplotlib thinks that it may be a part of one
    made.draw_without_rendering()
    at = [axes.transData.transform((0, value))[1] * 72 / _DPI for value in values]
    lacking = max(0.0, 17 - abs(at[0] - at[1])) / 2
    return [lacking, -lacking] if at[0] >= at[1] else [-lacking, lacking]


def _scale(axes: Axes, which: str, values: Sequence[float], found: Found, margin: float) -> None:
    """An axis around these values, logarithmic where they span magnitudes, its ticks as the numbers are written."""
    low, high = min(values), max(values)
    axis, limits = (axes.xaxis, axes.set_xlim) if which == "x" else (axes.yaxis, axes.set_ylim)
    if low > 0 and high / low > _LOG_FROM:
        (axes.set_xscale if which == "x" else axes.set_yscale)("log")
        wide = (high / low) ** margin
        limits(low / wide, high * wide)
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        return
    # Never so narrow that ticks read alike, or that a difference nobody cares for fills the panel.
    least = _LEAST_POINTS if found["proportion"] else abs(high) * 0.02 or 1.0
    wide = max((high - low) * margin, (least - (high - low)) / 2)
    limits(low - wide, high + wide)
    # Side by side there is room for four numbers as long as 1.234e+05.
    axis.set_major_locator(MaxNLocator(nbins=3 if which == "x" and not found["proportion"] else 5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, bool(found["proportion"]))))


def _tick(value: float, proportion: bool) -> str:
    if not proportion:
        return f"{value:.4g}"
    return f"{100 * value:.4g} %" if -1e-9 <= value <= 1 + 1e-9 else ""


def _plain(axes: Axes, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=13, length=0 if grid == "x" else 3, axis="y")
    axes.tick_params(labelsize=13, axis="x")
    axes.grid(axis="x" if grid == "x" else "y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)


def _empty(axes: Axes, why: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", fontsize=13)


def _number(value: float, found: Found) -> str:
    return f"{100 * value:.1f} %" if found["proportion"] else f"{value:.4g}"


def _name(found: Found) -> str:
    return str(found["objective"]).removeprefix("val_").replace("_", " ")

"""SVG as text: scales, axes and marks, sized for a phone's width and coloured by the page's style sheet.

Every text goes through ``safe``: names, values and messages come from users and may hold anything.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from search import secrecy

WIDTH = 360
"""Units of every chart: about a phone's pixels, so that text is as large there as it says."""

_LETTER = 6.1  # width of a letter of 11 units, roughly
_LEFT_MOST = 96
# What XML cannot hold, and marks that turn the direction of the text around them.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff]")


def safe(text: object) -> str:
    """Any text, fit for HTML, its attributes and SVG; secrets that are known here are not in it."""
    plain = secrecy.scrub(str(text)).encode("utf-8", "replace").decode()
    return html.escape(_FORBIDDEN.sub("\ufffd", plain))


def cut(text: object, most: int) -> str:
    """The text, or as much of it as so many letters hold."""
    plain = " ".join(str(text).split()) or "(empty)"
    return plain if len(plain) <= most else plain[: max(1, most - 1)] + "…"


def letters(width: float) -> int:
    """How many letters fit."""
    return max(1, int(width / _LETTER))


@dataclass(frozen=True)
class Scale:
    """Where numbers lie: ``low`` at ``start`` and ``high`` at ``end``; what is beyond lies at the end."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The place of a number."""
        low, high, value = (math.log(v) if self.log else v / 2 for v in (self.low, self.high, self._held(value)))
        share = 0.5 if low == high else (value - low) / (high - low)  # halves: a difference cannot overflow
        return self.start + share * (self.end - self.start)

    def holds(self, value: float) -> bool:
        """Whether it is on the scale and not beyond."""
        return self._held(value) == value

    def _held(self, value: float) -> float:
        return min(max(value, self.low), self.high)

    def ticks(self, most: int = 5) -> list[float]:
        """Round numbers on the scale."""
        return log_ticks(self.low, self.high, most) if self.log else linear_ticks(self.low, self.high, most)


def linear_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most so many round numbers between two, ends included; the ends where there are none."""
    span = high - low
    if not 0 < span < math.inf:
        return [low] if low == high else [low, high]
    raw = span / most
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(f * size for f in (1, 2, 2.5, 5, 10) if f * size >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    found = [float(f"{k * step:.12g}") for k in range(first, last + 1)]
    return found if len(found) > 1 else [low, high]


def log_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Powers of ten between two numbers above zero; within less than two of them, also twice and five times these."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    powers = range(first, last + 1)
    within = [(p, f) for p in powers for f in (1, 2, 5)]
    inside = [float(f"{f}e{p}") for p, f in within if low * (1 - 1e-9) <= f * 10.0**p <= high * (1 + 1e-9)]
    tens = [value for value in inside if f"{value:e}".startswith("1.0")]
    found = tens if len(tens) > 2 else inside
    found = found[:: max(1, math.ceil(len(found) / most))]
    return found if len(found) > 1 else [low, high]


def n(value: float) -> str:
    """A coordinate."""
    return f"{value:.1f}".removesuffix(".0")


def text(x: float, y: float, said: object, style: str = "", anchor: str = "start") -> str:
    """One line of text, with its baseline at ``y``."""
    kind = f' class="{style}"' if style else ""
    at = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{n(x)}" y="{n(y)}"{kind}{at}>{safe(said)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    """A straight line."""
    return f'<line class="{style}" x1="{n(x1)}" y1="{n(y1)}" x2="{n(x2)}" y2="{n(y2)}"/>'


def path(points: Sequence[tuple[float, float]], style: str, title: str = "") -> str:
    """Straight lines from point to point."""
    where = " ".join(f"{n(x)},{n(y)}" for x, y in points)
    return f'<polyline class="{style}" points="{where}">{_title(title)}</polyline>'


def bar(x: float, y: float, width: float, height: float, style: str, title: str = "") -> str:
    """A rectangle."""
    place = f'x="{n(x)}" y="{n(y)}" width="{max(width, 0.6):.2f}" height="{n(height)}"'
    return f'<rect class="{style}" {place}>{_title(title)}</rect>'


def mark(kind: str, x: float, y: float, title: str = "") -> str:
    """A trial: its kind by shape as well as by colour.

    Args:
        kind: ``ok`` a dot, ``cut`` a ring, ``bad`` a cross, ``base`` a square, ``win`` a large dot, ``far`` a triangle
            for what lies beyond the axis.
    """
    told = _title(title)
    if kind == "base":
        return f'<rect class="base m" x="{n(x - 4)}" y="{n(y - 4)}" width="8" height="8">{told}</rect>'
    if kind == "bad":
        shape = f"M{n(x - 3)} {n(y - 3)}l6 6m0-6l-6 6"
        return f'<path class="bad m" d="{shape}">{told}</path>'
    if kind == "far":
        return f'<path class="cut m" d="M{n(x - 3)} {n(y - 3)}h6l-3 5z">{told}</path>'
    radius = {"win": 5, "ok": 3}.get(kind, 2.6)
    return f'<circle class="{kind} m" cx="{n(x)}" cy="{n(y)}" r="{radius}">{told}</circle>'


def _title(said: str) -> str:
    return f"<title>{safe(said)}</title>" if said else ""


def left_of(labels: Sequence[str]) -> float:
    """Room that labels at the left of a chart need."""
    return min(_LEFT_MOST, max((len(label) for label in labels), default=0) * _LETTER + 10)


def grid(y: Scale, left: float, right: float, labels: Callable[[float], str]) -> str:
    """The upright axis of a chart: a line across for each of its round numbers, which stand at the left."""
    out = []
    for tick in y.ticks():
        out.append(line(left, y.at(tick), right, y.at(tick), "grid"))
        out.append(text(left - 5, y.at(tick) + 4, labels(tick), "tick", "end"))
    return "".join(out)


def lower(x: Scale, y: float, names: Callable[[float], str] = "{:.4g}".format, title: str = "") -> str:
    """The axis below a chart, with its numbers and what it shows."""
    out = [line(x.start, y, x.end, y, "axis"), *numbers_below(x, y, x.ticks(), names)]
    if title:
        out.append(text((x.start + x.end) / 2, y + 30, title, "tick", "middle"))
    return "".join(out)


def numbers_below(x: Scale, y: float, ticks: Sequence[float], names: Callable[[float], str]) -> list[str]:
    """Short strokes with numbers below an axis; a number that would touch the one before is left out.

    Args:
        names: How they are written; "" for a number that has no place there.
    """
    out, until = [], -math.inf
    for tick in ticks:
        said, place = names(tick), x.at(tick)
        if not said:
            continue
        half = len(said) * _LETTER / 2
        middle = min(max(place, half), WIDTH - half)
        out.append(line(place, y, place, y + 3, "axis"))
        if middle - half > until + 4:
            out.append(text(middle, y + 15, said, "tick", "middle"))
            until = middle + half
    return out


def chart(height: float, label: str, body: str) -> str:
    """The whole chart.

    Args:
        label: What a reader who cannot see it is told.
    """
    return (
        f'<svg viewBox="0 0 {WIDTH} {n(height)}" role="img" aria-label="{safe(label)}" '
        f'xmlns="http://www.w3.org/2000/svg">{body}</svg>'
    )

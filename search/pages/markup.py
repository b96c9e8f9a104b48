"""Pieces of the report's page: a chart with its title, what its marks mean, code within text."""

from __future__ import annotations

from search.pages import svg
from search.pages.svg import safe

MARKS = ("win", "base", "ok", "cut", "bad", "far")
_SAID = {
    "win": "winner",
    "base": "baseline (defaults)",
    "ok": "complete",
    "cut": "pruned",
    "bad": "failed",
    "far": "beyond the axis",
    "again": "trained again to confirm",
    "good": "best tenth",
    "rest": "others",
}


def legend(*kinds: str) -> str:
    """What marks, lines and colours mean.

    Args:
        kinds: Of marks (see ``svg.mark``), or of what is drawn otherwise: "win line", "ok busy".
    """
    items = []
    for kind in kinds:
        name, _, what = kind.partition(" ")
        if what == "line":
            style = f"way {name}" if name in ("good", "rest") else f"curve {name}"
            drawn = svg.path([(0, 6), (26, 6)], style)
        elif what == "busy":
            drawn = svg.bar(4, 0, 18, 12, f"{name} busy")
        else:
            drawn = svg.mark(name, 13, 6)
        said = "next best" if kind == "ok line" else _SAID[name]
        items.append(f'<li><svg viewBox="0 0 26 12" aria-hidden="true">{drawn}</svg>{said}</li>')
    return f'<ul class="key">{"".join(items)}</ul>'


def figure(title: str, chart: str, caption: str, key: str = "") -> str:
    """A chart with its title and what it shows; nothing without a chart."""
    if not chart:
        return ""
    return f"<figure><h3>{safe(title)}</h3>\n{chart}\n{key}<figcaption>{safe(caption)}</figcaption></figure>\n"


def coded(said: str) -> str:
    """Escaped, with what stands between backticks as code."""
    pieces = said.split("`")
    if len(pieces) % 2 == 0:  # somebody's name has one
        return safe(said)
    return "".join(f"<code>{safe(piece)}</code>" if k % 2 else safe(piece) for k, piece in enumerate(pieces))

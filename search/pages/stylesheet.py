"""How the report's page looks: light and dark, wide and narrow, on a screen and on paper."""

from __future__ import annotations

# Okabe and Ito's colours, which people with any kind of colour blindness tell apart, darkened or lightened until text
# of that colour has a contrast of 4.5 with what lies behind it. What they say is said by shape or in words as well.
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --paper: #ffffff; --panel: #f6f7f9; --edge: #d5dae0;
  --grid: #e3e7eb; --win: #0067a5; --base: #b3470a; --ok: #0f7a5a; --cut: #717a84; --bad: #b3261e; --busy: #7fbfa9; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #a9b1ba; --paper: #14171a; --panel: #1e2226;
  --edge: #3a4047; --grid: #2b3036; --win: #62b8f2; --base: #f59a5b; --ok: #4cc9a0; --cut: #8e98a3; --bad: #ff8a80;
  --busy: #2f7f66; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main, header, footer { max-width: 1160px; margin: 0 auto; padding: 0 16px; }
header { padding-top: 28px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 40px 0 12px; padding-top: 12px; border-top: 1px solid var(--edge); }
h3 { font-size: 1rem; margin: 0 0 6px; overflow-wrap: anywhere; }
p { margin: 0 0 10px; max-width: 74ch; }
a { color: var(--win); }
code { font: .92em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.soft, figcaption, .note { color: var(--soft); font-size: .9rem; }
nav { margin: 14px 0 0; font-size: .9rem; display: flex; flex-wrap: wrap; gap: 4px 14px; }
.verdict { background: var(--panel); border-left: 5px solid var(--win); border-radius: 4px; padding: 16px 18px 8px;
  margin: 20px 0 0; }
.verdict h2 { border: 0; margin: 0 0 8px; padding: 0; font-size: 1rem; color: var(--soft); }
.verdict .head { font-size: 1.3rem; line-height: 1.35; font-weight: 600; }
.verdict ul { list-style: none; margin: 0 0 12px; padding: 0; }
.verdict li { margin: 0 0 6px; }
.verdict li b { font: 600 .82rem ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  border: 1px solid var(--soft); border-radius: 3px; padding: 1px 6px; margin-right: 6px; }
.cards, .grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); }
.grid { gap: 26px 22px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 326px), 1fr)); }
.card { border: 1px solid var(--edge); border-radius: 6px; padding: 14px 16px 6px; }
.card .value { font-size: 1.9rem; font-weight: 650; line-height: 1.2; font-variant-numeric: tabular-nums; }
.card .interval { font-size: .95rem; margin-bottom: 8px; font-variant-numeric: tabular-nums; }
figure { margin: 0; min-width: 0; break-inside: avoid; }
figcaption { margin-top: 4px; }
svg { display: block; width: 100%; max-width: 520px; height: auto; overflow: visible; }
svg text { font-size: 11px; fill: var(--ink); font-family: inherit; }
svg .tick { fill: var(--soft); }
svg .strong { font-weight: 600; }
svg .halo { paint-order: stroke; stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round; }
svg .grid { stroke: var(--grid); }
svg .axis { stroke: var(--soft); }
svg .whisker { stroke: var(--ink); stroke-width: 1.5; }
svg .pause { stroke: var(--ink); stroke-dasharray: 3 3; }
svg polyline { fill: none; stroke-linejoin: round; }
svg .win { --c: var(--win); } svg .base { --c: var(--base); } svg .ok { --c: var(--ok); }
svg .cut { --c: var(--cut); } svg .bad { --c: var(--bad); } svg .again { --c: var(--win); }
svg .m { fill: var(--c); stroke: var(--c); }
svg circle.win { stroke: var(--paper); stroke-width: 1.5; } svg circle.ok { fill-opacity: .75; stroke: none; }
svg circle.cut { fill: var(--paper); stroke-width: 1.2; } svg path.bad { fill: none; stroke-width: 1.8; }
svg .span { stroke: var(--c); stroke-width: 4; opacity: .45; }
svg .best { stroke: var(--win); stroke-width: 2; }
svg .curve { stroke: var(--c); stroke-width: 1.6; } svg .curve.win { stroke-width: 2.6; }
svg .curve.base { stroke-dasharray: 6 3; stroke-width: 2; } svg .curve.cut { stroke-width: 1; opacity: .45; }
svg .bar { fill: var(--c); } svg .cut.bar { opacity: .55; }
svg .busy { fill: var(--busy); } svg .cut.busy { fill: var(--cut); } svg .bad.busy { fill: var(--bad); }
svg .again.busy { fill: var(--win); }
svg .way { stroke: var(--cut); stroke-width: 1; opacity: .3; } svg .way.good { stroke: var(--ok); opacity: .9; }
svg .way.base { stroke: var(--base); stroke-width: 2; stroke-dasharray: 6 3; opacity: 1; }
svg .way.win { stroke: var(--win); stroke-width: 2.6; opacity: 1; }
svg .way:hover, svg .curve:hover { stroke-width: 4; opacity: 1; }
.key { list-style: none; margin: 4px 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: .85rem;
  color: var(--soft); }
.key svg { display: inline-block; width: 26px; height: 12px; vertical-align: -1px; margin-right: 4px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); font-size: .9rem; padding-bottom: 6px; }
th, td { text-align: left; vertical-align: top; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--edge); }
th { font-weight: 600; } thead th { color: var(--soft); } td.n, th.n { text-align: right; }
td.n { white-space: nowrap; }
td, th { overflow-wrap: break-word; max-width: 44ch; } tbody th { font-weight: 400; overflow-wrap: anywhere; }
.grid > * { min-width: 0; }
.differs th, .differs td { font-weight: 650; }
details { margin: 14px 0; } summary { cursor: pointer; color: var(--win); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; font-size: .92rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
ol.next { padding-left: 1.3em; max-width: 74ch; } ol.next li { margin-bottom: 8px; }
footer { margin-top: 40px; padding-bottom: 40px; color: var(--soft); font-size: .85rem; }
@media (max-width: 480px) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 6px; }
  th, td { padding-right: 10px; } }
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #444; --paper: #fff; --panel: #fff; --edge: #bbb; --grid: #ddd;
    --win: #0067a5; --base: #b3470a; --ok: #0f7a5a; --cut: #717a84; --bad: #b3261e; --busy: #7fbfa9; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  @page { margin: 14mm; }
  body { font-size: 10.5pt; } nav, details { display: none; }
  main, header, footer { max-width: none; padding: 0; } h2 { break-after: avoid; margin-top: 22px; }
  .grid { grid-template-columns: 1fr 1fr; } .cards { grid-template-columns: 1fr 1fr 1fr; }
  .card, .verdict, tr { break-inside: avoid; } svg .cut.curve { opacity: .6; }
}
"""

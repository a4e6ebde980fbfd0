"""One self-contained page of a report: its data inside, no network, opened from a file."""

import html
import json
from collections.abc import Mapping
from typing import Any

from megagate.analysis.lr.page_script import SCRIPT

_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1a1a1a; --soft: #5a5a5a; --line: #d9d9d9;
  --c0: #000000; --c1: #0072b2; --c2: #d55e00; --c3: #009e73; --c4: #b8558f; --c5: #b57d00; --c6: #2f8fc4; }
:root[data-theme=dark] { --paper: #16181c; --ink: #ececec; --soft: #a8adb5; --line: #3a3e46;
  --c0: #f2f2f2; --c1: #56a8f0; --c2: #ff8a3d; --c3: #2fd6a4; --c4: #e79fc6; --c5: #f0c04a; --c6: #a8d8f5; }
body { margin: 0 auto; max-width: 1100px; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin: 1.6rem 0 .2rem; }
small, .soft { color: var(--soft); }
header { display: flex; justify-content: space-between; align-items: baseline; gap: 1rem; }
nav { position: sticky; top: 0; background: var(--paper); padding: .4rem 0; display: flex; flex-wrap: wrap; gap: .5rem; z-index: 1; }
button { font: inherit; color: var(--ink); background: none; border: 1px solid var(--line);
  border-radius: 6px; padding: .15rem .6rem; cursor: pointer; }
button[aria-pressed=false] { opacity: .4; text-decoration: line-through; }
section svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font-size: 12px; }
.grid { stroke: var(--line); } .zero { stroke: var(--soft); } .bar { stroke: var(--soft); stroke-dasharray: 5 4; }
.tip { position: fixed; pointer-events: none; background: var(--paper); color: var(--ink); border: 1px solid var(--soft);
  border-radius: 6px; padding: .3rem .55rem; white-space: pre; font-size: 13px; z-index: 2; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
td, th { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
td { white-space: pre; }
td:first-child, th:first-child { text-align: left; }
.supported { font-weight: 600; } .contradicted { font-weight: 600; }
dt { font-weight: 600; } dd { margin: 0 0 .5rem; color: var(--soft); }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'">
<title>{title}</title><style>{style}</style></head><body>
<header><h1>{title}</h1><button id="theme" type="button">light / dark</button></header>
<noscript>The curves need JavaScript; the same numbers are in table.md beside this page.</noscript>
<main id="report"></main><div class="tip" id="tip" hidden></div>
<script id="data" type="application/json">{data}</script><script>{script}</script></body></html>
"""


def page_of(report: Mapping[str, Any]) -> str:
    """The page of what `report.report_of` gives. Names may hold anything: they enter as JSON without `<`, and are written as text."""
    name = html.escape(str(report["facts"]["name"]))
    shown = {key: value for key, value in report.items() if key != "runs"}  # the statistics hold what the curves show
    data = json.dumps(shown, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return _PAGE.format(title=f"Learning-rate stability: {name}", style=_STYLE, data=data, script=SCRIPT)

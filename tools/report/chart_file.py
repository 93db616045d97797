"""Charts as one SVG file, for readers that have no page around them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from html import escape
from importlib.resources import files

from bitlower.ir.charts import BarChart, Chart, LineChart
from bitlower.tools.report.drawings import drawing
from bitlower.tools.report.svg import COLORS, HEIGHT, LEFT, WIDTH

_TITLE, _LINE = 24, 16
"""Height of a title, and of a line of the legend."""


def chart_file(charts: Iterable[Chart]) -> str:
    """Lines and bars below each other, with titles and legends; empty without any, for maps are tables."""
    top, parts = 0, []
    for place, chart in enumerate(charts):
        if not isinstance(chart, LineChart | BarChart):
            continue
        names, svg = drawing(f"chart-{place}", chart)
        parts.append(f'<text x="{LEFT}" y="{top + _TITLE - 8}" font-weight="bold">{escape(chart.title)}</text>')
        top += _TITLE
        for index, name in enumerate(names):
            mark = f'<rect class="bar" x="{LEFT}" y="{top}" width="10" height="10"/>'
            text = f'<text x="{LEFT + 16}" y="{top + 9}">{escape(name)}</text>'
            parts.append(f'<g class="s{index % COLORS}">{mark}{text}</g>')
            top += _LINE
        parts.append(svg.replace("<svg ", f'<svg y="{top}" width="{WIDTH}" height="{HEIGHT}" ', 1))
        top += HEIGHT
    if not parts:
        return ""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{top}" viewBox="0 0 {WIDTH} {top}">'
    return f"{head}<style>{_style()}</style>{chr(10).join(parts)}</svg>\n"


@cache
def _style() -> str:
    """The page's style of charts in its light colours; not every viewer knows variables."""
    text = files("bitlower.tools.report").joinpath("templates/charts.css").read_text(encoding="utf-8")
    light, _, rest = text.partition("@media")
    colors = dict(re.findall(r"(--[\w-]+): (#\w+);", light))
    rules = rest.partition("\n}\n")[2]
    used = "\n".join(rule for rule in rules.splitlines() if "color-mix" not in rule)
    return re.sub(r"var\((--[\w-]+)\)", lambda match: colors[match[1]], used)

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from bitlower.ir.charts import BarChart, LineChart, MapChart
from bitlower.tools.report.chart_file import chart_file

SVG = "{http://www.w3.org/2000/svg}"
LINES = LineChart("Losses <all>", "step", "loss", {"training": ((0, 2.0), (1, 1.0)), "held out": ((0, 3.0), (1, None))})
BARS = BarChart("Drift", "share", ("a", "b", "c"), {"first": (0.1, None, 0.3)})
MAP = MapChart("Map", ("r",), ("c",), ((1.0,),))


@pytest.fixture(scope="module")
def root() -> ElementTree.Element:
    return ElementTree.fromstring(chart_file([LINES, MAP, BARS]))


def test_charts_stand_below_each_other(root: ElementTree.Element) -> None:
    inner = root.findall(f"{SVG}svg")
    assert [one.findtext(f"{SVG}title") for one in inner] == ["Losses <all>", "Drift"]  # a map is a table
    tops = [(float(one.get("y", "")), float(one.get("height", ""))) for one in inner]
    assert tops[1][0] >= sum(tops[0])
    assert float(root.get("height", "")) == sum(tops[1])
    assert len(inner[0].findall(f".//{SVG}circle")) == 3  # the point that is None has none
    assert len(inner[1].findall(f".//{SVG}rect")) == 2
    ids = [part.get("id") for part in root.iter() if part.get("id")]
    assert len(ids) == len(set(ids))


def test_titles_and_legends_are_text(root: ElementTree.Element) -> None:
    texts = [part.text for part in root.iter(f"{SVG}text")]
    for text in ("Losses <all>", "training", "held out", "Drift", "first", "step", "loss", "share"):
        assert text in texts


def test_colors_are_plain(root: ElementTree.Element) -> None:
    style = root.findtext(f"{SVG}style") or ""
    assert "var(" not in style
    assert ".s0 { color: #1f6fb4; }" in style
    assert ".line" in style


def test_nothing_to_draw_is_no_file() -> None:
    assert chart_file([]) == chart_file([MAP]) == ""

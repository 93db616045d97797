"""Two small artifacts with all that a report shows, made once."""

from __future__ import annotations

from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bitlower.passes._machinery.registry import PASSES
from bitlower.tools.recipes.recipe import load_recipe
from bitlower.tools.runs.flow import RunOptions, run_recipe

WORDS = (
    "the", "cat", "dog", "bird", "house", "tree", "river", "sings", "runs", "sleeps", "near", "under", "over", "red",
    "old", "quick",
)  # fmt: skip
PLUGIN = '''
"""A pass of somebody else's that leaves a chart of each kind."""

from collections.abc import Iterable
from dataclasses import dataclass

from bitlower import Contract, Pass, Program, Record
from bitlower.ir.charts import BarChart, Chart, LineChart, MapChart


@dataclass(frozen=True)
class ToyReport(Record):
    """Numbers that nobody else has."""

    def summary(self) -> str:
        """What came out."""
        return "three toy charts"

    def charts(self) -> Iterable[Chart]:
        """One of each kind."""
        yield LineChart("Toy lines", "toy step", "toy loss", {"toy curve": ((0.0, 4.25), (1.0, 2.125), (2.0, None))})
        yield BarChart("Toy bars", "toy unit", ("first", "second"), {"toy bar": (1.5, None)})
        yield MapChart("Toy map", ("north", "south"), ("east", "west"), ((7.25, None), (0.5, 0.125)))


@dataclass(frozen=True)
class Toy(Pass):
    """Leave a report with charts."""

    name = "toy"
    contract = Contract.ANALYSIS

    def run(self, program: Program, context) -> bool:
        """Leave it."""
        context.put(ToyReport())
        return False
'''
RECIPE = """
model: {{path: {model}}}
calibration: {{data: texts.txt, samples: 32}}
plugins: [toy.py]
passes:
  - clean
  - analyze-outliers
  - toy
  - quantize: {{scheme: {scheme}}}
  - calibrate: {{activations: {ranges}}}
  - analyze-sensitivity: {{by: [role, both], batches: 1}}
  - lower-integer
export: [onnx-qdq]
{more}
"""
VOID = {"meta", "link", "br", "hr", "img", "input", "wbr"}


@dataclass(frozen=True)
class Artifacts:
    """A plain artifact, another one with a report, the folder of the model, and what the last run said at its end."""

    plain: Path
    other: Path
    model: Path
    said: tuple[object, ...]


@pytest.fixture(scope="session")
def artifacts(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """The tiny encoder with 8 bits, and with 4-bit weights and all values in 8 bits; not to be written to."""
    folder, loose = tmp_path_factory.mktemp("reports"), dict(PASSES.loose)
    (folder / "toy.py").write_text(PLUGIN)
    lines = (" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 8)) for i in range(1, 41))
    (folder / "texts.txt").write_text("\n".join(lines) + "\n")
    for name, scheme, ranges, more in (
        ("plain", "W8A8", "minmax", ""),
        ("other", "W4A8-full", "mse-golden", "report: true"),
    ):
        text = RECIPE.format(model=bert, scheme=scheme, ranges=ranges, more=more)
        (folder / f"{name}.yaml").write_text(text)
        summary = run_recipe(load_recipe(folder / f"{name}.yaml"), folder / name, RunOptions(cache=None))
    PASSES.loose = loose  # other tests know nothing of the plugin
    return Artifacts(folder / "plain", folder / "other", bert, summary.text())


class Page(HTMLParser):
    """A page as its tables by caption and the text of its parts by id; wrong nesting is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.parts: dict[str, str] = {}
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self._rows: list[list[str]] = []
        self._caption, self._part = "", ""
        self.feed(text)
        self.close()
        assert not self.open, f"never ended: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.attributes.append((tag, named))
        if named.get("id"):
            self.ids.append(str(named["id"]))
        if tag == "a" and named.get("href"):
            self.links.append(str(named["href"]))
        if tag == "section":
            self._part = str(named["id"])
        if tag == "table":
            self._rows, self._caption = [], ""
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th"):
            self._rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> ends nothing"
        assert self.open.pop() == tag, f"</{tag}> ends something else"
        if tag == "table":
            self.tables[self._caption.strip()] = self._rows
        if tag == "section":
            self._part = ""

    def handle_data(self, data: str) -> None:
        if "caption" in self.open:
            self._caption += data
        elif {"td", "th"} & {*self.open}:
            self._rows[-1][-1] += data
        if self._part:
            self.parts[self._part] = self.parts.get(self._part, "") + data


@pytest.fixture(scope="session")
def page_of() -> type[Page]:
    """``page_of(text)``: a page, read."""
    return Page

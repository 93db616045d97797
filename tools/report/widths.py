"""Part 4: the bits of every tensor, layer by role, with the reason for each width."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bitlower.tools.explain import FLOAT_BITS
from bitlower.tools.report.blocks import Block, Chapter, DataTable, Field, Prose, plain_table
from bitlower.tools.report.charts import chart_blocks
from bitlower.tools.report.contents import Material
from bitlower.tools.report.naming import OTHER, ladder, layer_name, place_of, stacks_of

ABOUT = (
    "The bits that every tensor of a module got; a stronger colour is fewer. `8 + float` are two tensors, such as what "
    "a linear reads and what it writes. Hover over a cell, or look into the table below, for the reason: the scheme's "
    "rule, a budget, or why a tensor stays float."
)
WIDEST = 16
"""Bits of the cells with the weakest colour."""


@dataclass(frozen=True)
class Width:
    """One tensor: its name, module path and role, its bits (None: float), why, and how to change that."""

    tensor: str
    path: str
    role: str
    bits: int | None
    reason: str
    change: str = ""

    @property
    def is_weight(self) -> bool:
        """Whether it is a parameter, and not a value."""
        return "weight" in self.role or "table" in self.role


def widths_chapter(material: Material) -> Chapter:
    """A map of weights and one of values, all reasons, and what analyses say about groups of tensors."""
    widths = list(widths_of(material))
    title = "Bits, layer by role"
    if not widths:
        return Chapter("widths", title, ABOUT, (), "Nothing is quantized in this artifact.")
    blocks: list[Block] = []
    for what, chosen in (
        ("Weights", [width for width in widths if width.is_weight]),
        ("Values between layers", [width for width in widths if not width.is_weight]),
    ):
        if any(width.bits is not None for width in chosen):
            blocks += _map(what, chosen)
    rows = [(w.tensor, w.path, w.role, "float" if w.bits is None else w.bits, w.reason, w.change) for w in widths]
    columns = ("tensor", "module", "role", "bits", "why", "how to change it")
    blocks.append(plain_table("Why every tensor has its bits", columns, rows, folded=True))
    blocks += chart_blocks(material, "sensitivity")
    return Chapter("widths", title, ABOUT, tuple(blocks))


def widths_of(material: Material) -> Iterator[Width]:
    """Every tensor that could be quantized, in execution order, and those that passes quantized beside these."""
    explained = {row.tensor for row in material.explanations}
    for row in material.explanations:
        bits = None if row.bits == FLOAT_BITS else row.bits
        yield Width(row.tensor, row.path, row.role, bits, "; ".join(row.reasons), "; ".join(row.change))
    for entry in material.manifest.tensors:
        if entry["tensor"] not in explained:
            bits = int(entry["spec"]["num_bits"])
            yield Width(entry["tensor"], entry["path"], entry["role"], bits, "no report of a placement has it")


def _map(what: str, widths: Sequence[Width]) -> Iterator[Block]:
    """A table of layers and roles; roles that are float in every layer are named below it."""
    places = [place_of(width.path) for width in widths]
    stacks = stacks_of(places)
    cells: dict[tuple[str, str], list[Width]] = {}
    for place, width in zip(places, widths, strict=True):
        name = layer_name(place, stacks)
        column = place.role if place.layer is not None else OTHER
        cells.setdefault((place.role if name == OTHER else name, column), []).append(width)
    rows, columns = ladder([name for name, _ in cells]), ladder([column for _, column in cells])
    floating = [
        column for column in columns if all(w.bits is None for key in cells if key[1] == column for w in cells[key])
    ]
    columns = [column for column in columns if column not in floating]
    body = []
    for name in rows:
        if not any((name, column) in cells for column in columns):
            continue
        fields = [Field(name)]
        for column in columns:
            fields.append(_cell(cells.get((name, column), [])))
        body.append(tuple(fields))
    yield DataTable(f"{what}: bits, or float", ("layer", *columns), tuple(body), is_map=True)
    if floating:
        yield Prose(f"{', '.join(floating)}.", strong="Float in every layer:")


def _cell(widths: Sequence[Width]) -> Field:
    if not widths:
        return Field("")
    bits = sorted({width.bits for width in widths if width.bits is not None})
    floats = any(width.bits is None for width in widths)
    text = " + ".join([*map(str, bits), *(["float"] if floats else [])])
    note = "; ".join(dict.fromkeys(f"{w.tensor}: {w.bits or 'float'}, {w.reason}" for w in widths))
    heat = max(0.08, 1 - bits[0] / WIDEST) if bits else None
    return Field(text, note=note, heat=heat)

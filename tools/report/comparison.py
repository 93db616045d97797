"""Part 11: two runs side by side: the lines of their recipes that differ, and the figures that moved."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

from bitlower.tools.render import format_bytes
from bitlower.tools.report.blocks import Block, Chapter, DataTable, Field, Prose, number, plain_table
from bitlower.tools.report.contents import Material
from bitlower.tools.report.depth import last_measured
from bitlower.tools.report.ledger import GOOD, MEASURES

ABOUT = "What is written differently in the two recipes, and which figures it moved."
_LAYERS = 12
"""Rows of layers: those that moved most."""


@dataclass(frozen=True)
class Compared:
    """A number of a run; less (-1) or more (1) is ``better``, or neither (0); a ``size`` is in bytes."""

    name: str
    value: float | None
    better: int
    shown: str
    size: bool = False


def comparison_chapter(material: Material, other: Material | None) -> Chapter:
    """The differences, or how to see some."""
    title = "Comparison of two runs"
    if other is None:
        missing = "One artifact was given: `bitlower report DIR DIR2` compares two."
        return Chapter("comparison", title, ABOUT, (), missing)
    names = _names(material, other)
    blocks: list[Block] = [
        _recipes(material, other, names),
        _figures(material, other, names),
        *_specs(material, other, names),
    ]
    blocks += [*_layers(material, other, names), *_kernels(material, other, names)]
    return Chapter("comparison", title, ABOUT, tuple(blocks))


def _kernels(material: Material, other: Material, names: tuple[str, str]) -> Iterator[Block]:
    """What each kind of kernel takes in both, where they were run for it."""
    first, second = ({time.kernel: time.microseconds for time in one.kernels} for one in (material, other))
    if first or second:
        rows = [(kernel, first.get(kernel), second.get(kernel)) for kernel in dict.fromkeys((*first, *second))]
        rows.append(("all together", sum(first.values()), sum(second.values())))
        yield plain_table("Time of kernels in one run (µs)", ("kernel", *names), rows)


def _names(material: Material, other: Material) -> tuple[str, str]:
    same = material.name == other.name
    return (f"{material.name} (1)", f"{other.name} (2)") if same else (material.name, other.name)


def _recipes(material: Material, other: Material, names: tuple[str, str]) -> Block:
    if not material.recipe or not other.recipe:
        blind = names[0] if not material.recipe else names[1]
        return Prose(f"{blind} has no recipe.yaml: it was made in Python from objects in memory.")
    lines = difflib.ndiff(material.recipe.splitlines(), other.recipe.splitlines())
    changed = [(line[0], line[2:]) for line in lines if line[:2] in ("- ", "+ ")]
    if not changed:
        return Prose("The recipes are equal; what differs comes from versions, data or the machine.")
    rows = [(names[0] if sign == "-" else names[1], Field(line.strip())) for sign, line in changed]
    return plain_table("Lines of the recipes that differ", ("in", "line"), rows)


def figures_of(material: Material) -> Iterator[Compared]:
    """The numbers of a run that can be compared: those of its verdict, its size, and losses of all outputs."""
    for figure in material.verdict.figures if material.verdict else ():
        better = 1 if figure.meaning.least is not None else -1 if figure.meaning.most is not None else 0
        yield Compared(figure.name.replace("_", " "), figure.value, better, figure.text)
    judged, manifest = material.verdict.output if material.verdict else "", material.manifest
    yield Compared("size of the artifact", float(manifest.bytes), -1, format_bytes(manifest.bytes), True)
    yield Compared("quantized tensors", float(len(manifest.tensors)), 0, str(len(manifest.tensors)))
    for output, losses in (material.ledger.rows[-1].outputs if material.ledger.rows else {}).items():
        for measure, label in MEASURES.items() if output != judged else ():
            if measure in losses:
                value = losses[measure]
                yield Compared(f"{label} of {output}", value, GOOD.get(measure, -1), number(value))


def _figures(material: Material, other: Material, names: tuple[str, str]) -> DataTable:
    left, right = ({figure.name: figure for figure in figures_of(one)} for one in (material, other))
    rows = []
    for name in dict.fromkeys([*left, *right]):
        a, b = left.get(name), right.get(name)
        change, verdict = "", ""
        if a and b and a.value is not None and b.value is not None:
            delta = b.value - a.value
            grown = f"{'+' if delta > 0 else '-'}{format_bytes(abs(delta))}" if a.size else f"{delta:+.4g}"
            change = grown if delta else "equal"
            verdict = ("better" if delta * a.better > 0 else "worse") if delta and a.better else ""
        rows.append(
            (
                Field(name),
                Field(a.shown if a else "–", numeric=True),
                Field(b.shown if b else "–", numeric=True),
                Field(change, numeric=True),
                Field(verdict),
            )
        )
    return DataTable("Figures of both", ("figure", *names, "change", "is"), tuple(rows))


def _specs(material: Material, other: Material, names: tuple[str, str]) -> Iterator[Block]:
    """Tensors that have other bits."""
    sides = [
        {
            (row["tensor"], row["role"]): f"{row['spec']['type']}{row['spec']['num_bits']} {row['spec']['strategy']}"
            for row in one.manifest.tensors
        }
        for one in (material, other)
    ]
    rows = [
        (tensor, role, sides[0].get((tensor, role), "float"), sides[1].get((tensor, role), "float"))
        for tensor, role in dict.fromkeys([*sides[0], *sides[1]])
        if sides[0].get((tensor, role)) != sides[1].get((tensor, role))
    ]
    if rows:
        yield plain_table(
            f"{len(rows)} tensors are quantized differently", ("tensor", "role", *names), rows, folded=True
        )
    else:
        yield Prose("The same tensors are quantized, in the same bits.")


def _layers(material: Material, other: Material, names: tuple[str, str]) -> Iterator[Block]:
    """The layers whose noise moved most."""
    left, right = (last_measured(one) for one in (material, other))
    if left is None or right is None:
        return
    before = {layer.node: layer for layer in left.layers}
    changes = []
    for layer in right.layers:
        first = before.get(layer.node)
        if first is not None and first.sqnr_db is not None and layer.sqnr_db is not None and layer.path == first.path:
            changes.append((layer.path or layer.node, first.sqnr_db, layer.sqnr_db, layer.sqnr_db - first.sqnr_db))
    changes.sort(key=lambda row: -abs(row[3]))
    if changes and changes[0][3]:
        columns = ("layer", *names, "change (dB)")
        yield plain_table("Layers whose signal over noise moved most, in dB", columns, changes[:_LAYERS])

"""Part 3: the error from the first layer to the last, by role; where it breaks first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from bitlower.tools.report.blocks import Block, Chapter, DataTable, Fact, FactList, Field, Picture, number
from bitlower.tools.report.contents import LayerLoss, LedgerRow, Material
from bitlower.tools.report.naming import OTHER, Place, ladder, layer_name, place_of, stacks_of
from bitlower.tools.report.svg import Plot, Series, axis_of, legend, lines, picture, rule

NOISY = 20.0
"""dB below which a layer is called noisy: noise of a tenth of the signal."""
CLEAN = 40.0
"""dB of noise of a hundredth of the signal; cells of the table are not coloured from there on."""
ABOUT = (
    "Signal over noise of every linear and residual sum on held-out data, against the float model: 20 dB is noise of a "
    "tenth of the signal, 40 dB of a hundredth. Errors add up from layer to layer, so a slow fall is usual; a sudden "
    "one shows which layer breaks. A dot leads to the tensor's page."
)


def depth_chapter(material: Material, pages: Mapping[str, str]) -> Chapter:
    """The lines by role, the same as a table, and the layers that matter.

    Args:
        material: the artifact.
        pages: ids of tensor pages by module path.
    """
    row = last_measured(material)
    title = "Error by depth"
    if row is None:
        missing = "The ledger has no layers: without held-out data (a section `evaluation`) nothing is compared."
        return Chapter("depth", title, ABOUT, (), missing)
    layers = [layer for layer in row.layers if layer.sqnr_db is not None]
    if not layers:
        return Chapter("depth", title, ABOUT, (), "No layer has any noise: the outputs are those of the float model.")
    blocks: list[Block] = [FactList(tuple(_facts(layers, pages))), _picture(row, pages), _table(row, pages)]
    return Chapter("depth", title, ABOUT, tuple(blocks))


def last_measured(material: Material) -> LedgerRow | None:
    """The last row of the ledger that knows of layers."""
    return next((row for row in reversed(material.ledger.rows) if row.layers), None)


def layer_role(layer: LayerLoss, residual: bool) -> Place:
    """Where a layer stands; residual sums have a role of their own beside the linear of the same path."""
    place = place_of(layer.path or layer.node)
    return Place(place.stack, place.layer, f"{place.role} + residual") if residual else place


def places_of(layers: Sequence[LayerLoss]) -> list[Place]:
    """The place of every layer: nodes of one path are told apart by what computes them."""
    return [layer_role(layer, layer.node.startswith("add_")) for layer in layers]


def _facts(layers: Sequence[LayerLoss], pages: Mapping[str, str]) -> list[Fact]:
    def named(layer: LayerLoss) -> str:
        return layer.path or layer.node

    worst = min(layers, key=_decibels)
    noisy = next((layer for layer in layers if _decibels(layer) < NOISY), None)
    drops = [(_decibels(before) - _decibels(after), after) for before, after in pairwise(layers)]
    facts = [Fact("Noisiest", f"{_decibels(worst):.1f} dB", named(worst), _state(_decibels(worst)))]
    if noisy is not None:
        facts.append(Fact(f"First below {NOISY:g} dB", f"{_decibels(noisy):.1f} dB", named(noisy), "bad"))
    else:
        facts.append(Fact(f"First below {NOISY:g} dB", "none", f"every layer has {NOISY:g} dB or more", "good"))
    if drops:
        fall, place = max(drops, key=lambda drop: drop[0])
        facts.append(Fact("Steepest fall", f"{fall:.1f} dB", f"at {named(place)}, from the layer before it"))
    return facts


def _decibels(layer: LayerLoss) -> float:
    return float(layer.sqnr_db or 0.0)


def _state(decibels: float) -> str:
    return "good" if decibels >= NOISY else "bad"


def _picture(row: LedgerRow, pages: Mapping[str, str]) -> Picture:
    places = places_of(row.layers)
    numbered = [(p, layer) for p, layer in zip(places, row.layers, strict=True) if p.layer is not None]
    by_depth = bool(numbered) and stacks_of(places) == 1
    shown = numbered if by_depth else list(zip(places, row.layers, strict=True))
    roles = dict.fromkeys(place.role if by_depth else "all layers" for place, _ in shown)
    series = []
    for role in roles:
        points, links = [], []
        for i, (place, layer) in enumerate(shown):
            if not by_depth or place.role == role:
                said = f"{layer.path or layer.node}: {number(layer.sqnr_db)} dB"
                points.append((float(place.layer or 0) if by_depth else float(i), layer.sqnr_db, said))
                links.append(pages.get(layer.path, ""))
        series.append(Series(role, points, links))
    values = [layer.sqnr_db for _, layer in shown if layer.sqnr_db is not None]
    across = axis_of([x for one in series for x, _, _ in one.points], "layer" if by_depth else "in order of execution")
    plot = Plot(across, axis_of([*values, NOISY], "signal over noise (dB)"), 320)
    body = plot.frame() + rule(plot, NOISY, f"{NOISY:g} dB", upright=False) + lines(plot, series)
    title = f"Signal over noise by depth, after {row.step.partition('{')[0]}"
    about = f"{len(values)} layers from {min(values):.1f} to {max(values):.1f} dB"
    table = DataTable(
        f"{title}, in order of execution",
        ("layer", "node", "dB"),
        tuple(
            (
                Field(v.path, pages.get(v.path, "")),
                Field(v.node),
                Field(number(v.sqnr_db), numeric=True, sort=v.sqnr_db),
            )
            for v in row.layers
        ),
        folded=True,
    )
    head = legend([one.name for one in series]) if len(series) > 1 else ""
    return Picture(head + picture("depth-lines", title, about, body, 320), title, table)


def _table(row: LedgerRow, pages: Mapping[str, str]) -> DataTable:
    """A row a layer, a column a role: the darker, the noisier."""
    places = places_of(row.layers)
    stacks = stacks_of(places)
    cells: dict[tuple[str, str], LayerLoss] = {}
    for place, layer in zip(places, row.layers, strict=True):
        name = layer_name(place, stacks) if place.layer is not None else place.role
        cells[name, place.role if place.layer is not None else OTHER] = layer
    rows = ladder([name for name, _ in cells])
    columns = ladder([role for _, role in cells])
    body = []
    for name in rows:
        fields = [Field(name)]
        for column in columns:
            fields.append(_cell(cells.get((name, column)), pages))
        body.append(tuple(fields))
    caption = "Signal over noise in dB, layer by role; the stronger the colour, the noisier"
    return DataTable(caption, ("layer", *columns), tuple(body), is_map=True)


def _cell(layer: LayerLoss | None, pages: Mapping[str, str]) -> Field:
    if layer is None:
        return Field("", numeric=True)
    value = layer.sqnr_db
    heat = None if value is None else min(max((CLEAN - float(value)) / CLEAN, 0.0), 1.0)
    text = "–" if value is None else f"{value:.1f}"
    return Field(text, pages.get(layer.path, ""), layer.path or layer.node, heat, True, value)

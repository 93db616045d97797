"""Part 6: which channels of the residual stream are large, in which layer, before the passes and after them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from bitlower.tools.report.blocks import Block, Chapter, DataTable, Field, Picture, Prose, plain_table
from bitlower.tools.report.charts import chart_blocks, who_draws
from bitlower.tools.report.contents import ChannelMap, Material
from bitlower.tools.report.svg import BOTTOM, LEFT, RIGHT, TOP, WIDTH, picture, short

ABOUT = (
    "The largest value of every channel of the residual stream on held-out data, one row a residual sum, from the "
    "first layer to the last. A vertical stripe is a channel that is large in many layers: one scale for the whole "
    "tensor then has few steps for all others. The second map is of the program that was exported; rotation and "
    "permutation change it, scale migration changes what linears read and not these sums."
)
ROW = 14
"""Height of a row of a map."""
LEVELS = 8
"""Steps of colour; the lightest begins at a 64th of the largest value, since levels go by its root."""


def outliers_chapter(material: Material) -> Chapter:
    """Both maps, the largest channels, and what analyses say."""
    title = "Outliers: channel by layer"
    maps = material.tensors.channels if material.tensors else ()
    charts = list(chart_blocks(material, "outliers"))
    blocks: list[Block] = []
    if maps:
        most = max(max(*one.before, *one.after) for one in maps)
        blocks.append(_picture("outliers-before", "Before: the float model", maps, lambda one: one.before, most))
        blocks.append(
            _picture("outliers-after", "After: the program that was exported", maps, lambda one: one.after, most)
        )
        blocks.append(_largest(maps))
    if charts:
        blocks += charts
    else:
        blocks.append(Prose(f"Tokens and heads that make outliers are not shown: {who_draws(material, 'outliers')}"))
    if not maps and not charts:
        missing = (
            "No residual sum was looked at: the model has none, there were no held-out data (a section `evaluation` "
            "gives some), or the artifact is of an older version. Of the float model's outliers: "
            f"{who_draws(material, 'outliers')}"
        )
        return Chapter("outliers", title, ABOUT, (), missing)
    return Chapter("outliers", title, ABOUT, tuple(blocks))


def _picture(
    key: str, title: str, maps: Sequence[ChannelMap], side: Callable[[ChannelMap], Sequence[float]], most: float
) -> Picture:
    height = TOP + ROW * len(maps) + BOTTOM
    columns = max(len(side(one)) for one in maps)
    width = (WIDTH - LEFT - RIGHT) / columns
    parts, rows = [], []
    for index, one in enumerate(maps):
        y = TOP + index * ROW
        per = -(-one.width // len(side(one)))
        for place, value in enumerate(side(one)):
            share = (value / most) ** 0.5 if most else 0.0
            level = int(LEVELS * share)
            if level:
                ends = (
                    f"channel {place}"
                    if per == 1
                    else f"channels {place * per} to {min((place + 1) * per, one.width) - 1}"
                )
                parts.append(
                    f'<rect class="h{level}" x="{LEFT + place * width:.1f}" y="{y}" width="{width + 0.2:.1f}" '
                    f'height="{ROW - 1}"><title>{escape(one.path)}, {ends}: {short(value)}</title></rect>'
                )
        if not index % max(1, len(maps) // 12):
            parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + ROW - 3}" text-anchor="end">{index}</text>')
        rows.append((one.path, one.node, max(side(one)), per * max(range(len(side(one))), key=side(one).__getitem__)))
    bottom = TOP + ROW * len(maps)
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text class="tick" x="{LEFT}" y="{bottom + 16}">0</text>')
    parts.append(
        f'<text class="tick" x="{WIDTH - RIGHT}" y="{bottom + 16}" text-anchor="end">{maps[0].width - 1}</text>'
        f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{bottom + 32}" text-anchor="middle">channel</text>'
        f'<text class="label" transform="translate(13 {(TOP + bottom) / 2:.1f}) rotate(-90)" text-anchor="middle">'
        "residual sum</text>"
    )
    table = plain_table(
        f"{title}: the largest value of each residual sum",
        ("module", "node", "largest value", "in channels from"),
        rows,
        folded=True,
    )
    about = f"{len(maps)} residual sums of {maps[0].width} channels; the largest value is {short(most)}"
    return Picture(
        picture(key, title, about, "".join(parts), height), f"{title}; the strongest colour is {short(most)}", table
    )


def _largest(maps: Sequence[ChannelMap]) -> DataTable:
    rows = []
    for one in maps:
        named = ", ".join(f"{index}: {short(before)} → {short(after)}" for index, before, after in one.largest)
        rows.append((Field(one.path), Field(one.node), Field(named)))
    return DataTable(
        "The places with the largest values, before → after; passes that reorder or rotate channels put others there",
        ("module", "node", "place: value"),
        tuple(rows),
        True,
    )

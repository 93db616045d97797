"""Part 5: a page for every quantized tensor: its histogram, its channels, its clipping and its codes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from bitlower.tools.report.blocks import (
    Block,
    Chapter,
    DataTable,
    Fact,
    FactList,
    Field,
    Heading,
    Picture,
    Prose,
    SideBySide,
    number,
    plain_table,
)
from bitlower.tools.report.contents import Channels, Material, Number, Spread, TensorRow, TokenSizes
from bitlower.tools.report.svg import Axis, Plot, axis_of, box, outline, picture, rule, short

ABOUT = (
    "What each quantizer rounds, on held-out data: the histogram with the ends of the quantizer's range, the ranges of "
    "channels sorted from narrow to wide, the norms of tokens, the stored scales, and how many codes are used. Values "
    "beyond the ends are clipped. Few codes in use, or channels or tokens of very different size under one scale, are "
    "where bits are lost."
)
HEIGHT, HALF = 220, 470
"""Of the pictures of a page, two of which stand side by side."""
CLIPPED = 0.01
"""Share of clipped values from which on it is marked."""
POOR = 20.0
"""Signal over noise of the rounding itself, in dB, below which it is marked."""
_CELL = 22
"""Characters of a cell of a table in the page, about."""
_GROUPS = 8
"""Groups with a colour of their own."""


def tensor_pages(material: Material) -> dict[str, str]:
    """Ids of pages by the path of the module; of several tensors of one module the first, weights before values."""
    pages: dict[str, str] = {}
    if material.tensors is not None:
        rows = list(enumerate(material.tensors.tensors))
        for index, row in sorted(rows, key=lambda item: "." not in item[1].tensor):
            pages.setdefault(row.path, page_id(index))
    return pages


def page_id(index: int) -> str:
    """The id of the page of the tensor at ``index``."""
    return f"tensor-{index}"


def tensor_chapter(material: Material, room: int) -> Chapter:
    """The table of all tensors, and pages as far as there is room.

    Args:
        material: the artifact.
        room: characters that pages may take together; the noisiest tensors come first.
    """
    title = "Tensors"
    tensors = material.tensors.tensors if material.tensors else ()
    if not tensors:
        missing = (
            "This artifact has no reports/tensors.json: it was written by an older version, or no pass made integers "
            "of the program. Run its recipe again."
        )
        return Chapter("tensors", title, ABOUT, (), missing)
    pages = dict(_pages(tensors, room))
    blocks: list[Block] = [_overview(tensors, pages)]
    if len(pages) < len(tensors):
        blocks.append(
            Prose(
                f"{len(pages)} of {len(tensors)} tensors have a page here, those that rounding hurts most; the figures "
                "of all stand in the table and in the data at the end of this file."
            )
        )
    for index in sorted(pages):
        blocks += pages[index]
    return Chapter("tensors", title, ABOUT, tuple(blocks))


def _pages(tensors: Sequence[TensorRow], room: int) -> Iterator[tuple[int, list[Block]]]:
    order = sorted(range(len(tensors)), key=lambda i: (tensors[i].sqnr_db is None, tensors[i].sqnr_db or 0.0, i))
    for index in order:
        page = list(_page(index, tensors[index]))
        room -= sum(_size(block) for block in page)
        if room < 0:
            return
        yield index, page


def _size(block: Block) -> int:
    """Characters of a block in the page, about."""
    if isinstance(block, SideBySide):
        return sum(len(one.svg) + _CELL * sum(map(len, one.table.rows)) for one in block.pictures)
    return 700


def _overview(tensors: Sequence[TensorRow], pages: Mapping[int, list[Block]]) -> DataTable:
    columns = ("tensor", "role", "spec", "rounding (dB)", "clipped", "codes used", "values", "range")
    rows = []
    for index, row in enumerate(tensors):
        ends = f"{short(row.low)} to {short(row.high)}" if row.low is not None and row.high is not None else "per token"
        rows.append(
            (
                Field(row.name, page_id(index) if index in pages else ""),
                Field(row.role),
                Field(row.spec),
                Field(_decibels(row), numeric=True, sort=row.sqnr_db),
                Field(f"{row.clipped:.2%}", numeric=True, sort=row.clipped),
                Field(_codes(row), numeric=True, sort=row.codes_used),
                Field(f"{number(row.minimum)} to {number(row.maximum)}", numeric=True, sort=_width(row)),
                Field(ends, numeric=True),
            )
        )
    return DataTable("Every quantized tensor", columns, tuple(rows))


def _width(row: TensorRow) -> float | None:
    """Greatest value less the least."""
    return row.maximum - row.minimum if row.maximum is not None and row.minimum is not None else None


def _decibels(row: TensorRow) -> str:
    return "–" if row.sqnr_db is None else f"{row.sqnr_db:.1f}"


def _codes(row: TensorRow) -> str:
    return "–" if row.codes_used is None else f"{row.codes_used:,} of {row.codes:,}"


def _page(index: int, row: TensorRow) -> Iterator[Block]:
    yield Heading(row.name, page_id(index), "tensors")
    poor = row.sqnr_db is not None and row.sqnr_db < POOR
    seen = f"{row.values:,} values" if row.share == 1 else f"{row.values:,} values, {row.share:.0%} of the rows"
    exact = "no value is rounded: a pass wrote values of the grid" if row.sqnr_db is None else "signal over noise"
    facts = [
        Fact("Grid", row.spec, seen),
        Fact("Rounding alone", f"{_decibels(row)} dB", exact, "bad" if poor else ""),
        Fact("Clipped", f"{row.clipped:.2%}", "of the values", "bad" if row.clipped > CLIPPED else ""),
        Fact("Codes used", _codes(row), "of the grid"),
    ]
    if row.rewritten is not None and row.rewritten.distance:
        other = f"of the codes are not the nearest to it: {row.rewritten.codes:.2%}"
        facts.append(Fact("Distance from the float weight", f"{row.rewritten.distance:.2%}", f"of its norm; {other}"))
    yield FactList(tuple(facts))
    pictures = [_histogram(index, row)] if row.histogram.counts else []
    if row.channels is not None and row.channels.count > 1:
        pictures.append(_channels(index, row, row.channels))
    if row.tokens is not None and row.tokens.count > 1:
        pictures.append(_tokens(index, row.name, row.tokens))
    if row.scales is not None:
        pictures.append(_scales(index, row.name, row.scales))
    if pictures:
        yield SideBySide(tuple(pictures))


def _histogram(index: int, row: TensorRow) -> Picture:
    """Counts upwards as their roots, so that tails are seen."""
    bins = row.histogram
    end = bins.start + bins.step * len(bins.counts)
    limits = [value for value in (row.low, row.high) if value is not None]
    across = axis_of([bins.start, end, *limits], "value")
    plot = Plot(across, Axis(0.0, 1.02, "√ share"), HEIGHT, HALF)
    most = max(bins.counts)
    body = plot.frame()
    if len(limits) == 2:
        body += box(plot, max(limits[0], across.low), min(limits[1], across.high), 0, 1.02, "", "inside-range")
    body += outline(plot, bins.start, bins.step, bins.counts, lambda count: (count / most) ** 0.5)
    for value in limits:
        body += rule(plot, value, short(value), css="clip")
    ends = f"range {short(limits[0])} to {short(limits[1])}" if len(limits) == 2 else "a range for each token"
    about = (
        f"{row.values:,} values from {number(row.minimum)} to {number(row.maximum)}; {ends}; {row.clipped:.2%} clipped"
    )
    caption = "Histogram, and the ends of the range" if limits else "Histogram"
    rows = [(bins.start + i * bins.step, count) for i, count in enumerate(bins.counts) if count]
    table = plain_table(f"Values of {row.name} by bins of {short(bins.step)}", ("from", "values"), rows, folded=True)
    return Picture(picture(f"histogram-{index}", f"Histogram of {row.name}", about, body, HEIGHT, HALF), caption, table)


def _channels(index: int, row: TensorRow, channels: Channels) -> Picture:
    plot = Plot(
        Axis(
            -0.5,
            len(channels.low) - 0.5,
            "channels" if len(channels.low) == channels.count else f"{len(channels.low)} of them",
        ),
        axis_of([*channels.low, *channels.high], "range"),
        HEIGHT,
        HALF,
    )
    parts = []
    marks: dict[int, list[str]] = {}
    for place, (low, high) in enumerate(zip(channels.low, channels.high, strict=True)):
        group = channels.group[place] if channels.group else 0
        x = f"{plot.x(place):.1f}"
        marks.setdefault(group % _GROUPS, []).append(f"M{x} {plot.y(low):.1f}V{plot.y(high):.1f}")
    for group, path in sorted(marks.items()):
        parts.append(f'<path class="fan s{group}" d="{"".join(path)}"/>')
    groups = len(set(channels.group))
    shared = f", in the colours of {groups} groups that share scales" if groups else ""
    title = f"{channels.count:,} channels, from narrow to wide{shared}"
    widest = channels.high[-1] - channels.low[-1]
    middle = channels.high[len(channels.high) // 2] - channels.low[len(channels.low) // 2]
    about = f"the widest is {widest / middle:.3g}× the median" if middle else "the median one is flat"
    columns = ("channel", "least", "greatest", *(("group",) if groups else ()))
    rows = [
        (Field(str(i)), low, high, *((channels.group[place],) if groups else ()))
        for place, (i, low, high) in enumerate(zip(channels.index, channels.low, channels.high, strict=True))
    ]
    table = plain_table(f"{title} of {row.name}", columns, rows, folded=True)
    body = plot.frame([]) + "".join(parts)
    return Picture(
        picture(f"channels-{index}", f"Channels of {row.name}", about, body, HEIGHT, HALF), f"{title}; {about}", table
    )


def _tokens(index: int, name: str, tokens: TokenSizes) -> Picture:
    """Few tokens far above the median are what a range of the whole tensor suffers from; a first one is a sink."""
    about = f"the largest is {_times(tokens.sorted)} the median"
    if tokens.first and (middle := _median(tokens.sorted)):
        about += f", the first of a text {(tokens.first[0] or 0.0) / middle:.3g}×"
    rows = [*_ranks(tokens), *((f"at place {place} of a text, mean", norm) for place, norm in enumerate(tokens.first))]
    return _sorted("tokens", index, name, "norms of tokens", about, tokens, rows)


def _scales(index: int, name: str, scales: Spread) -> Picture:
    return _sorted(
        "scales",
        index,
        name,
        "stored scales",
        f"the largest is {_times(scales.sorted)} the median",
        scales,
        _ranks(scales),
    )


def _sorted(
    kind: str, index: int, name: str, what: str, about: str, numbers: Spread, rows: list[tuple[str, Number]]
) -> Picture:
    """Numbers from small to great, on a logarithmic axis where all are above 0."""
    heights = [value for value in numbers.sorted if value is not None]
    up = axis_of(heights, what.partition(" ")[0], logarithmic=bool(heights) and min(heights) > 0)
    some = "sorted" if len(heights) == numbers.count else f"sorted, {len(heights)} of them"
    plot = Plot(Axis(-0.5, len(heights) - 0.5, some), up, HEIGHT, HALF)
    path = "L".join(f"{plot.x(place):.1f} {plot.y(value):.1f}" for place, value in enumerate(heights))
    body = plot.frame([]) + f'<g class="s0"><path class="line" d="M{path}"/></g>'
    title = f"{numbers.count:,} {what}, from small to great"
    table = plain_table(f"{title}, of {name}", ("rank", "value"), rows, folded=True)
    svg = picture(f"{kind}-{index}", f"{what.capitalize()} of {name}", about, body, HEIGHT, HALF)
    return Picture(svg, f"{title}; {about}", table)


def _ranks(numbers: Spread) -> list[tuple[str, Number]]:
    """The share of numbers below each, in percent, beside it."""
    last = max(len(numbers.sorted) - 1, 1)
    return [(f"{place / last:.0%}", value) for place, value in enumerate(numbers.sorted)]


def _median(values: Sequence[Number]) -> Number:
    return values[len(values) // 2]


def _times(values: Sequence[Number]) -> str:
    """The last of sorted numbers over the median."""
    middle, last = _median(values), values[-1]
    return f"{last / middle:.3g}×" if middle and last is not None else "far above"

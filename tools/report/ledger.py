"""Part 2: what each pass cost or gave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html import escape

from bitlower.tools.render import format_bytes
from bitlower.tools.report.blocks import Block, Chapter, DataTable, Field, Picture, Prose, number, plain_table
from bitlower.tools.report.contents import LedgerRow, Material, Stage
from bitlower.tools.report.svg import BOTTOM, Axis, Plot, axis_of, box, picture, short

MEASURES = {
    "kl_divergence": "KL divergence (nats)",
    "relative_error": "relative error",
    "cosine": "cosine",
    "top1_agreement": "top-1 agreement",
    "perplexity": "perplexity",
}
"""What the ledger measures of an output; the first that is there is drawn."""
GOOD = {"cosine": 1, "top1_agreement": 1}
"""Of which more is better; of the others less is."""
_BAR = 0.36
"""Half the width of a bar, of the distance to the next."""
_OUTPUTS = 2
"""Outputs that all stand in one table."""
_LETTERS = 15
"""Of a pass's name below its bar."""
ABOUT = (
    "Every pass that may change the numbers is measured against the float model on held-out data. A bar goes from the "
    "loss before the pass to the loss after it: up is what it cost, down is what it gave back."
)


def ledger_chapter(material: Material) -> Chapter:
    """The waterfall, all figures, and what the stages took."""
    rows = material.ledger.rows
    blocks: list[Block] = []
    if not rows:
        missing = "No lossy pass changed this program, so the ledger has no rows."
        return Chapter("ledger", "What each pass cost", ABOUT, tuple(_stages(material)), missing)
    if any(row.outputs for row in rows):
        blocks += [*_waterfall(rows)]
    else:
        blocks.append(
            Prose("There were no held-out data, so the ledger knows sizes alone: a section `evaluation` gives some.")
        )
    blocks += _tables(material)
    blocks += _stages(material)
    return Chapter("ledger", "What each pass cost", ABOUT, tuple(blocks))


def main_measure(rows: Sequence[LedgerRow]) -> tuple[str, str]:
    """The output and the measure that stand for the whole model: logits' KL divergence, or else the relative error."""
    outputs = next((row.outputs for row in rows if row.outputs), {})
    for measure in MEASURES:
        for output, losses in outputs.items():
            if losses.get(measure) is not None:
                return output, measure
    return "", ""


def loss_of(row: LedgerRow, output: str, measure: str) -> float | None:
    """One figure of a row."""
    return row.outputs.get(output, {}).get(measure)


def loss_steps(rows: Sequence[LedgerRow], output: str, measure: str) -> list[tuple[str, float, float]]:
    """Each pass that was measured, with the loss before and after it."""
    before, steps = 0.0, []
    for row in rows:
        after = loss_of(row, output, measure)
        if after is not None:
            steps.append((row.step, before, after))
            before = after
    return steps


def _waterfall(rows: Sequence[LedgerRow]) -> list[Block]:
    output, measure = main_measure(rows)
    if not measure:
        return []
    label, steps = MEASURES[measure], loss_steps(rows, output, measure)
    plot = Plot(Axis(-0.6, len(steps) - 0.4, ""), axis_of([0.0, *(s[2] for s in steps)], label, zero=True))
    body = plot.frame([(i, _named(step, len(steps))) for i, (step, _, _) in enumerate(steps)])
    for i, (step, low, high) in enumerate(steps):
        said = f"{step}: {label} {short(low)} → {short(high)}"
        body += box(plot, i - _BAR, i + _BAR, min(low, high), max(low, high), said, "cost" if high >= low else "gain")
        if i + 1 < len(steps):
            body += f'<path class="join" d="M{plot.x(i + _BAR):.1f} {plot.y(high):.1f}H{plot.x(i + 1 - _BAR):.1f}"/>'
        y = plot.y(max(low, high)) - 5
        body += f'<text class="value" x="{plot.x(i):.1f}" y="{y:.1f}" text-anchor="middle">{short(high)}</text>'
    title = f"{label} of {output} after each lossy pass"
    about = "; ".join(f"{_named(step, 1)} {short(high)}" for step, _, high in steps)
    table = plain_table(
        f"{title}, before and after",
        ("pass", "before", "after", "change"),
        [(step, low, high, high - low) for step, low, high in steps],
        folded=True,
    )
    return [Picture(picture("waterfall", title, about, body), title, table)]


def _named(step: str, count: int) -> str:
    """A pass's name without its parameters, as long as there is room."""
    name = step.partition("{")[0]
    room = max(_LETTERS, 100 // count)
    return name if len(name) <= room else f"{name[: room - 1]}…"


def _tables(material: Material) -> list[Block]:
    """The ledger; of many outputs the one that matters, and all of them behind their caption."""
    rows = material.ledger.rows
    main = main_measure(rows)[0]
    if max((len(row.outputs) for row in rows), default=0) <= _OUTPUTS:
        return [_table(material, "The ledger: every figure after every lossy pass", rows)]
    short_rows = [replace(row, outputs={main: row.outputs[main]} if main in row.outputs else {}) for row in rows]
    return [
        _table(material, f"The ledger: {main} after every lossy pass", short_rows),
        _table(material, "The same of all outputs", rows, folded=True),
    ]


def _table(material: Material, caption: str, rows: Sequence[LedgerRow], *, folded: bool = False) -> DataTable:
    measures = [m for m in MEASURES if any(m in losses for row in rows for losses in row.outputs.values())]
    columns = ("pass", "output", *(MEASURES[m] for m in measures), "size of all tensors", "seconds", "peak memory")
    stages = {stage.name: stage for stage in material.stages}
    body = [_row("the float model", "", [], material.ledger.reference.get("bytes", 0), None, measures)]
    for row in rows:
        stage = stages.get(row.step.partition("{")[0])
        for place, (output, losses) in enumerate((row.outputs or {"": {}}).items()):
            first = place == 0
            body.append(
                _row(row.step if first else "″", output, [losses.get(m) for m in measures], row.bytes, stage, measures)
            )
    return DataTable(caption, columns, tuple(body), folded)


def _row(
    step: str, output: str, losses: Sequence[float | None], size: int, stage: Stage | None, measures: Sequence[str]
) -> tuple[Field, ...]:
    figures = [Field(number(loss), numeric=True, sort=loss) for loss in losses] or [Field("", numeric=True)] * len(
        measures
    )
    seconds = Field(f"{stage.seconds:.1f}" if stage else "–", numeric=True, sort=stage.seconds if stage else None)
    peak = Field(format_bytes(stage.peak_bytes) if stage else "–", numeric=True)
    return Field(step), Field(output), *figures, Field(format_bytes(size), numeric=True, sort=size), seconds, peak


def _stages(material: Material) -> list[Block]:
    """What every stage took, lossy or not."""
    if not material.stages:
        return [
            Prose(
                "Artifacts hold no times, so that equal inputs give equal bytes; `report: true` in the recipe writes a "
                "report with them when the run ends.",
                strong="Seconds and memory are not recorded here.",
            )
        ]
    stages = material.stages
    most = max(stage.seconds for stage in stages) or 1.0
    height = TIMELINE_ROW * len(stages) + BOTTOM + 14
    across = axis_of([0.0, *(s.seconds for s in stages)], "seconds", zero=True)
    plot = Plot(across, Axis(-0.5, len(stages) - 0.5, ""), height)
    body = ""
    for i, stage in enumerate(stages):
        row = len(stages) - 1 - i
        said = f"{stage.name}: {stage.seconds:.2f} s, peak {format_bytes(stage.peak_bytes)}"
        body += box(plot, 0, stage.seconds, row - _BAR, row + _BAR, said, "bars")
        inside = stage.seconds > 0.6 * most
        x = plot.x(stage.seconds) + (-6 if inside else 6)
        css, anchor = ("value inside", "end") if inside else ("value", "start")
        text = f"{escape(stage.name)} {stage.seconds:.1f} s"
        body += f'<text class="{css}" x="{x:.1f}" y="{plot.y(row) + 4:.1f}" text-anchor="{anchor}">{text}</text>'
    table = plain_table(
        "Seconds and peak memory of every stage",
        ("stage", "seconds", "peak memory"),
        [(s.name, round(s.seconds, 2), format_bytes(s.peak_bytes)) for s in stages],
        folded=True,
    )
    title = "Seconds of every stage"
    return [Picture(picture("stages", title, f"{len(stages)} stages, {sum(s.seconds for s in stages):.1f} s", body,
                            height), title, table)]  # fmt: skip


TIMELINE_ROW = 24
"""Height of a stage's bar with its distance to the next."""

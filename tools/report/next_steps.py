"""Where the loss comes from, and what would change it: the end of the verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from bitlower.tools.report.blocks import DataTable, Field
from bitlower.tools.report.contents import Material
from bitlower.tools.report.depth import NOISY, last_measured
from bitlower.tools.report.ledger import MEASURES, loss_steps, main_measure
from bitlower.tools.report.svg import short

TENSORS = 3
"""Tensors that are named, those that rounding hurts most."""
COLUMNS = ("where", "what is seen", "what changes it")


def next_steps(material: Material, pages: Mapping[str, str]) -> DataTable | None:
    """What costs most, each with what to do about it; None where nothing was measured.

    Args:
        material: the artifact.
        pages: ids of tensor pages by module path.
    """
    rows = tuple((*_costliest_pass(material), *_noisiest_layer(material, pages), *_noisiest_tensors(material, pages)))
    return DataTable("Where the loss comes from, and what to try next", COLUMNS, rows) if rows else None


def _costliest_pass(material: Material) -> Iterator[tuple[Field, ...]]:
    output, measure = main_measure(material.ledger.rows)
    steps = loss_steps(material.ledger.rows, output, measure)
    step, low, high = max(steps, key=lambda step: step[2] - step[1], default=("", 0.0, 0.0))
    if high <= low:
        return
    seen = f"it costs most: {MEASURES[measure]} of {output} {short(low)} → {short(high)}"
    share = f"; it is {short(steps[-1][2])} in the end" if high != steps[-1][2] else ""
    name = step.partition("{")[0]
    yield (
        Field(step, "ledger"),
        Field(f"{seen}{share}"),
        Field(f"its parameters (`bitlower passes show {name}`), or a pass that prepares the model for it"),
    )


def _noisiest_layer(material: Material, pages: Mapping[str, str]) -> Iterator[tuple[Field, ...]]:
    row = last_measured(material)
    layers = [layer for layer in row.layers if layer.sqnr_db is not None] if row else []
    if not layers:
        return
    worst = min(layers, key=lambda layer: layer.sqnr_db or 0.0)
    named = worst.path or worst.node
    seen = f"the output with the most noise: {worst.sqnr_db:.1f} dB"
    if (worst.sqnr_db or 0.0) >= NOISY:
        advice = f"nothing is needed: {NOISY:g} dB is noise of a tenth of the signal"
    else:
        advice = f"more bits, or float: `--ignore {named}`, or `ignore: [{named}]` in the pass that places quantizers"
    yield Field(named, pages.get(worst.path, "depth")), Field(seen), Field(advice)


def _noisiest_tensors(material: Material, pages: Mapping[str, str]) -> Iterator[tuple[Field, ...]]:
    tensors = [row for row in (material.tensors.tensors if material.tensors else ()) if row.sqnr_db is not None]
    changes = {row.tensor: row.change for row in material.explanations}
    for row in sorted(tensors, key=lambda row: row.sqnr_db or 0.0)[:TENSORS]:
        seen = f"rounding alone leaves {row.sqnr_db:.1f} dB in {row.spec}"
        if row.clipped:
            seen += f"; {row.clipped:.2%} of its values are clipped"
        advice = (
            "; ".join(changes.get(row.tensor, ()))
            or f"more bits, or a finer granularity, for the role {row.role} in the scheme"
        )
        yield Field(row.name, pages.get(row.path, "tensors")), Field(seen), Field(advice)

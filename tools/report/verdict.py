"""Part 1: the run in one line, and the figures that matter with their meaning."""

from __future__ import annotations

from collections.abc import Iterator

from bitlower.tools.render import format_bytes
from bitlower.tools.report.blocks import Block, Chapter, Fact, Facts, Prose, number
from bitlower.tools.report.contents import Material
from bitlower.tools.report.ledger import MEASURES, loss_of, main_measure

ABOUT = "What was made, what it cost on held-out data, and whether what was written is what was computed."


def verdict_chapter(material: Material) -> Chapter:
    """The headline and the figures."""
    blocks: list[Block] = [Prose(headline(material), lead=True), Facts(tuple(_facts(material)))]
    return Chapter("verdict", "Verdict", ABOUT, tuple(blocks))


def headline(material: Material) -> str:
    """Model, widths, sizes and the loss in one sentence."""
    manifest = material.manifest
    ratio = manifest.float_bytes / manifest.bytes if manifest.bytes else 0.0
    text = (
        f"{material.model} in {_widths(material)}: {format_bytes(manifest.float_bytes)} of float tensors became an "
        f"artifact of {format_bytes(manifest.bytes)} ({ratio:.2f}× smaller)"
    )
    output, measure = main_measure(material.ledger.rows)
    if measure:
        loss = loss_of(material.ledger.rows[-1], output, measure)
        text += f", at a {MEASURES[measure]} of {number(loss)} in {output} on held-out data"
    return f"{text}."


def _widths(material: Material) -> str:
    """The bits of weights and of values: ``8-bit weights and 8-bit values``."""
    weights, values = set[int](), set[int]()
    for row in material.manifest.tensors:
        side = weights if "weight" in row["role"] or "table" in row["role"] else values
        side.add(int(row["spec"]["num_bits"]))
    parts = [
        f"{'/'.join(map(str, sorted(bits)))}-bit {what}"
        for bits, what in ((weights, "weights"), (values, "values"))
        if bits
    ]
    return " and ".join(parts) or "float"


def _facts(material: Material) -> Iterator[Fact]:
    manifest = material.manifest
    yield Fact("Size", format_bytes(manifest.bytes), f"from {format_bytes(manifest.float_bytes)} in float32")
    rows = material.ledger.rows
    for output, losses in (rows[-1].outputs if rows else {}).items():
        for measure, label in MEASURES.items():
            if losses.get(measure) is not None:
                yield Fact(label.capitalize() if label[0].islower() else label, number(losses[measure]), f"of {output}")
    kernels = material.verification.get("kernels")
    if isinstance(kernels, dict) and isinstance(kernels.get("found"), int) and isinstance(kernels.get("expected"), int):
        state = "good" if kernels["found"] >= kernels["expected"] else "bad"
        yield Fact(
            "Integer kernels", f"{kernels['found']} of {kernels['expected']}", "that run, of those expected", state
        )
    summary = material.verification.get("summary")
    if isinstance(summary, dict) and isinstance(summary.get("codes_equal_given_codes"), int | float):
        share = float(summary["codes_equal_given_codes"])
        yield Fact("Codes as computed", f"{share:.4%}", "each operator on the program's codes; 100% but for ties")
    if material.stages:
        yield Fact("Time", f"{sum(stage.seconds for stage in material.stages):.0f} s", "from the model to the artifact")

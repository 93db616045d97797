"""Part 1: the verdict in one line, and the figures that matter with their meaning and their normal range."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from bitlower.tools.render import format_bytes
from bitlower.tools.report.blocks import Block, Chapter, Fact, FactList, Prose
from bitlower.tools.report.contents import Material
from bitlower.tools.report.next_steps import next_steps
from bitlower.tools.verdict.verdict import Verdict

ABOUT = (
    "What was made, what it cost on held-out data, whether what was written is what was computed, and what to try next."
)


def verdict_chapter(material: Material, pages: Mapping[str, str]) -> Chapter:
    """The line, the figures, and what costs most.

    Args:
        material: the artifact.
        pages: ids of tensor pages by module path.
    """
    steps = next_steps(material, pages)
    further: tuple[Block, ...] = (steps,) if steps is not None else ()
    if material.verdict is None:
        missing = (
            "This artifact has no verdict.json: it was written by an older version, or by an export without a run. Run "
            "its recipe again."
        )
        return Chapter("verdict", "Verdict", ABOUT, further, missing)
    figures = FactList(tuple(_facts(material, material.verdict)))
    return Chapter("verdict", "Verdict", ABOUT, (Prose(f"{material.verdict.line}.", lead=True), figures, *further))


def _facts(material: Material, verdict: Verdict) -> Iterator[Fact]:
    if verdict.bytes:
        yield Fact("size", format_bytes(verdict.bytes), f"from {format_bytes(verdict.float_bytes)} in float32")
    for figure in verdict.figures:
        normal = f"; normal {figure.normal}" if figure.normal and figure.of is None else ""
        state = {None: "", True: "good", False: "bad"}[figure.is_normal]
        yield Fact(figure.name.replace("_", " "), figure.text, f"{figure.meaning.text}{normal}", state)
    if material.stages:
        seconds = sum(stage.seconds for stage in material.stages)
        yield Fact("time", f"{seconds:.0f} s", "from the model to the artifact")

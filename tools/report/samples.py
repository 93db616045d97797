"""Part 10: the held-out samples that came out worst, with the first token that differs."""

from __future__ import annotations

from bitlower.tools.report.blocks import Block, Chapter, DataTable, Field, Prose, number
from bitlower.tools.report.contents import Material, SampleRow
from bitlower.tools.runs.samples import SampleText

ABOUT = (
    "The held-out samples whose outputs lie farthest from the float model's, worst first. Of a model that writes, the "
    "first place at which another token becomes the likeliest, each model reading the same text before it."
)
_LETTERS = 160
"""Of a text: its last ones."""


def samples_chapter(material: Material) -> Chapter:
    """The table; with texts where the run that made them is just done."""
    title = "Worst samples"
    samples = material.tensors.samples if material.tensors else ()
    if not samples:
        missing = (
            "No sample was compared: there were no held-out data (a section `evaluation` gives some), no output has a "
            "row for each sample, or the artifact is of an older version."
        )
        return Chapter("samples", title, ABOUT, (), missing)
    texts = {text.sample: text for text in material.texts}
    logits = any(row.kl_divergence is not None for row in samples)
    written = logits and any(row.differs_at is not None for row in samples)
    columns = ["sample", "tokens", "relative error"]
    columns += ["KL divergence (nats)"] * logits + ["first differing token"] * written
    columns += ["text before it, float model \u2192 quantized" if written else "text"] * bool(texts)
    rows = [tuple(_fields(row, texts.get(row.sample), logits, written, bool(texts))) for row in samples]
    output = material.tensors.output if material.tensors else ""
    blocks: list[Block] = [DataTable(f"By {output}, the worst first", tuple(columns), tuple(rows))]
    if not texts:
        blocks.append(
            Prose(
                "Artifacts hold no texts of the data; `report: true` in the recipe writes a report that shows these "
                "when the run ends.",
                strong="Their texts are not recorded.",
            )
        )
    return Chapter("samples", title, ABOUT, tuple(blocks))


def _fields(row: SampleRow, text: SampleText | None, logits: bool, written: bool, texts: bool) -> list[Field]:
    fields = [
        Field(str(row.sample)),
        Field(f"{row.tokens:,}", numeric=True, sort=row.tokens),
        Field(number(row.relative_error), numeric=True, sort=row.relative_error),
    ]
    if logits:
        fields.append(Field(number(row.kl_divergence), numeric=True, sort=row.kl_divergence))
    if written:
        place = "none" if row.differs_at is None else f"{row.differs_at + 1:,}"
        fields.append(Field(place, numeric=True, sort=row.differs_at))
    if texts:
        fields.append(Field(_shown(text)))
    return fields


def _shown(text: SampleText | None) -> str:
    """The end of the text, and both tokens where they differ."""
    if text is None:
        return ""
    cut = text.text if len(text.text) <= _LETTERS else f"\u2026{text.text[-_LETTERS:]}"
    return f"{cut} \u27e8{text.expected} \u2192 {text.actual}\u27e9" if text.expected or text.actual else cut

"""Part 9: how what was written compares with the program, and which kernels run it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bitlower.tools.report.blocks import (
    Block,
    Chapter,
    DataTable,
    Fact,
    FactList,
    Field,
    as_field,
    number,
    plain_table,
)
from bitlower.tools.report.contents import Material
from bitlower.tools.report.kernel_strip import kernel_blocks

ABOUT = (
    "The artifact was read as its users will read it and compared with the program: the outputs, every code of every "
    "quantized tensor given the codes before it, and which kernels the runtime chose. Codes that differ without that "
    "condition are one step off where two runtimes round a tie otherwise; they add up with depth and are no fault."
)
MEANINGS = {
    "output_cosine": "of the outputs with the program's; 1 is equal",
    "output_relative_error": "the largest difference of an output, over its standard deviation",
    "codes_equal": "share of all codes that are equal, differences before them included",
    "codes_equal_least": "the same of the worst tensor",
    "codes_worst_difference": "steps between two codes at most, differences before them included",
    "codes_equal_given_codes": "share of equal codes where every operator reads the program's codes; 1 but for ties",
    "unseen_sizes": "sizes that the model had not been run at before",
}
"""What figures of a summary mean, for those that most backends have."""
_HIDDEN = ("selftest", "unseen")
"""Inputs and outputs that `bitlower verify` needs; nobody reads them."""
_FOLDED_ROWS = 12
"""Longer tables lie behind their captions."""


def checks_chapter(material: Material) -> Chapter:
    """The summary, the kernels, and every table of the record."""
    title, record = "Verification and kernels", material.verification
    if not record:
        return Chapter("checks", title, ABOUT, (), "This artifact has no verification.json: its backend wrote none.")
    blocks: list[Block] = []
    summary, kernels = record.get("summary"), record.get("kernels")
    facts = list(_kernel_facts(kernels)) if isinstance(kernels, Mapping) else []
    if isinstance(summary, Mapping):
        facts += [Fact(key.replace("_", " "), _shown(value), MEANINGS.get(key, "")) for key, value in summary.items()]
    if facts:
        blocks.append(FactList(tuple(facts)))
    blocks += kernel_blocks(material)
    if isinstance(kernels, Mapping):
        blocks += _kernels(kernels)
    if material.manifest.operators:
        blocks += _sections("operators", material.manifest.operators)
    rest = {k: v for k, v in record.items() if k not in ("summary", *_HIDDEN) and v not in ({}, [], None)}
    if isinstance(kernels, Mapping):
        rest.pop("kernels", None)
    for key, value in rest.items():
        if isinstance(value, Mapping | list):
            blocks += _sections(key, value)
    amounts = [
        (key.replace("_", " "), _shown(value)) for key, value in rest.items() if not isinstance(value, Mapping | list)
    ]
    if amounts:
        blocks.append(plain_table("What was compared, and how much", ("entry", "value"), amounts))
    return Chapter("checks", title, ABOUT, tuple(blocks))


def _kernel_facts(kernels: Mapping[str, Any]) -> Iterator[Fact]:
    """How many integer kernels run, of those expected."""
    expected, present = kernels.get("expected"), kernels.get("found")
    if isinstance(expected, int) and isinstance(present, int) and (expected or present):
        state = "good" if present >= expected else "bad"
        yield Fact("integer kernels", f"{present} of {expected}", "that run, of those expected", state)


def _kernels(kernels: Mapping[str, Any]) -> Iterator[Block]:
    """What the runtime computes in float though it has codes, and why; and all kernels that run."""
    missing = [str(name) for name in kernels.get("fell_back", ())]
    if missing:
        yield plain_table("Multiplications that run in float though their operands have codes", ("name",),
                          [(name,) for name in missing])  # fmt: skip
    reasons = kernels.get("float_reasons")
    if isinstance(reasons, Mapping) and reasons:
        yield plain_table("Why they run in float", ("why", "products"), [*reasons.items()])
    rows = [
        (kind, name, count)
        for kind, counts in kernels.items()
        if isinstance(counts, Mapping) and kind != "float_reasons"
        for name, count in counts.items()
        if isinstance(count, int)
    ]
    if rows:
        yield plain_table("Kernels that run", ("kind", "kernel", "how many"), rows)


def _sections(name: str, value: Any) -> Iterator[Block]:
    """A list of rows as a table, a mapping as one of names and values, a number as a line."""
    caption = name.replace("_", " ").capitalize()
    if isinstance(value, Mapping):
        plain = {key: entry for key, entry in value.items() if not isinstance(entry, Mapping | list)}
        if plain:
            yield plain_table(caption, ("entry", "value"), [(key, _shown(entry)) for key, entry in plain.items()])
        for key, entry in value.items():
            if isinstance(entry, Mapping | list) and entry:
                yield from _sections(f"{name}: {key}", entry)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        yield from _table(caption, [row for row in value if isinstance(row, Mapping)])


def _table(caption: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[DataTable]:
    if not rows:
        return
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if not _is_nested(rows, key)]
    first = [key for key in ("name", "path", "tensor", "kind", "role") if key in keys]
    columns = (*first, *(key for key in keys if key not in first))
    body = tuple(tuple(_field(row.get(key)) for key in columns) for row in rows)
    titles = tuple(column.replace("_", " ") for column in columns)
    folded = len(rows) > _FOLDED_ROWS
    yield DataTable(f"{caption}: {len(rows)} rows" if folded else caption, titles, body, folded)


def _is_nested(rows: Sequence[Mapping[str, Any]], key: str) -> bool:
    return any(isinstance(row.get(key), Mapping | list) for row in rows)


def _field(value: Any) -> Field:
    return as_field(value) if isinstance(value, int | float) and not isinstance(value, bool) else Field(_shown(value))


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value) if isinstance(value, int | float) else str(value)

"""Which tables get which bits: those that token ids index, and those of positions."""

from __future__ import annotations

import pytest

from bitlower.ir import Granularity, Grid, Program, QuantSpec, Scheme
from bitlower.passes import Context, PassManager
from bitlower.passes.quantizers.quantize import PlacementReport, Quantize


def quantize(program: Program, scheme: Scheme | str) -> tuple[Program, PlacementReport]:
    context = Context()
    made = scheme if isinstance(scheme, Scheme) else Scheme.parse(scheme)
    return PassManager([Quantize(made)]).run(program, context), context[PlacementReport]


@pytest.mark.parametrize("scheme", ["2-2-8", "4-8-8-static"])
def test_the_schemes_of_quantgpt(family, scheme: str) -> None:
    """A linear has one scale, the tied table one a row, once; positions and all that is no matrix stay float."""
    program, report = quantize(family("gpt2"), scheme)
    weight_bits, table_bits = scheme.split("-")[:2]
    static = scheme.endswith("static")
    specs = {row.tensor: row.spec for row in report.rows if row.role != "linear-input"}
    linears = [name for name in specs if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))]
    assert len(linears) == 2 * 4
    assert {specs[name] for name in linears} == {f"s{weight_bits} restricted per-tensor"}
    assert specs["transformer.wte.weight"] == f"s{table_bits} restricted per-channel(0)"
    assert [name for name, spec in specs.items() if not spec and name.endswith(".weight")] == [
        "transformer.wpe.weight",
        *(name for name in specs if ".ln_" in name and name.endswith(".weight")),
    ]
    reasons = {row.tensor: row.reason for row in report.rows}
    assert reasons["transformer.wpe.weight"] == "the scheme leaves position-table in float"
    tables = [quantizer for _, quantizer in program.quantizers() if quantizer.role == "embedding-table"]
    assert [quantizer.tensor for quantizer in tables] == ["transformer.wte.weight"]
    inputs = [quantizer.spec for _, quantizer in program.quantizers() if quantizer.role == "linear-input"]
    assert {spec.granularity.dynamic for spec in inputs} == {not static}
    assert len(inputs) == 2 * 4 + 1


def test_a_position_table_can_have_bits_of_its_own(bert) -> None:
    """Of BERT's tables, those of positions and of token types are indexed by no token ids."""
    four = QuantSpec(Grid(4), Granularity.per_channel(0))
    _, report = quantize(bert(layers=2)[1], Scheme(overrides=(("position-table", four),)))
    specs = {row.tensor.split(".")[-2]: row.spec for row in report.rows if row.role == "embedding-table"}
    assert specs == {
        "word_embeddings": "s8 per-channel(0)",
        "position_embeddings": "s4 per-channel(0)",
        "token_type_embeddings": "s4 per-channel(0)",
    }

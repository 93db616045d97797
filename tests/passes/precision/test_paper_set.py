"""The published set of quantizers with 16 bits: input, output and residual sum of feed-forward networks."""

from __future__ import annotations

from bitlower.frontends import load
from bitlower.ir import Program
from bitlower.passes import Context, PassManager, parse_pipeline
from bitlower.passes.precision._items import is_weight
from bitlower.passes.precision.assign_precision import PrecisionReport
from bitlower.passes.quantizers.quantize import PlacementReport

PAPER = "assign-precision{set=paper}"


def place(program: Program, scheme: str) -> Program:
    return PassManager(parse_pipeline(f"clean,quantize{{scheme={scheme}}}")).run(program, Context())


def bits(program: Program, *, weights: bool) -> list[int]:
    return [q.spec.grid.bits for node, q in program.quantizers() if is_weight(node) == weights]


def test_the_papers_set_on_bert_base(bert) -> None:
    """36 of the 161 activations: input, output and residual sum of each of 12 feed-forward networks."""
    context = Context()
    result = PassManager(parse_pipeline(PAPER)).run(place(bert(layers=12, labels=3)[1], "W8A8-full"), context)
    report = context[PrecisionReport]
    assert bits(result, weights=False).count(16) == 36
    assert len(bits(result, weights=False)) == 161
    assert set(bits(result, weights=True)) == {8}
    assert len(report.rows) == 36
    by_path = {(q.role, n.meta["path"]) for n, q in result.quantizers() if q.spec.grid.bits == 16}
    layer = "bert.encoder.layer.{}."
    places = (("norm", "attention.output.LayerNorm"), ("linear-output", "output.dense"), ("residual", "output"))
    assert by_path == {(role, layer.format(i) + path) for i in range(12) for role, path in places}
    assert "36 of 36" in report.summary()


def test_the_papers_set_where_only_linear_inputs_are_rounded(run) -> None:
    """Of a Llama, quantized at linear inputs: those of the feed-forward networks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    program = place(load(LlamaForCausalLM(config).eval(), task="text-generation"), "W8A8-e16")
    result = PassManager(parse_pipeline(PAPER)).run(program, Context())
    wide = [n for n, q in result.quantizers() if q.spec.grid.bits == 16]
    assert len(wide) == 2
    assert {user.meta["path"].split(".")[-1] for node in wide for user in node.users} == {"gate_proj", "up_proj"}


def test_the_placement_report_says_what_is_there_now(bert) -> None:
    context = Context()
    program = bert(layers=1, labels=3)[1]
    passes = parse_pipeline(f"clean,quantize{{scheme=W8A8-full}},{PAPER}")
    result = PassManager(passes).run(program, context)
    specs = {q.tensor: str(q.spec) for _, q in result.quantizers()}
    assert {row.tensor: row.spec for row in context[PlacementReport].rows if row.spec} == specs

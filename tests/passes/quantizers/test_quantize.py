"""The pass: open quantizers change nothing, levels, what it leaves in the context."""

from __future__ import annotations

import pytest
import torch

from bitlower.ir import BitlowerError, Level, Scheme, ops
from bitlower.ir.dataflow import linears
from bitlower.passes import Context, Contract, PassManager, check_levels
from bitlower.passes._machinery.pipeline import format_pipeline, parse_pipeline
from bitlower.passes.canonical.clean import Clean
from bitlower.passes.quantizers.quantize import PlacementReport, Quantize


@pytest.mark.parametrize(
    ("attention", "scheme"),
    [("sdpa", "W8A8"), ("sdpa", "W4A8-g16"), ("sdpa", "W8A8-peg4"), ("eager", "W8A8-full"), ("eager", "W8A8-tensor")],
)
def test_open_quantizers_leave_the_model_as_it_is(bert, batches, run, attention: str, scheme: str) -> None:
    """Bit for bit what transformers computes, padding and other shapes included."""
    model, program = bert(attention=attention)
    result = run(program, Quantize(Scheme.parse(scheme)))
    for batch in [*batches(1), *batches(1, rows=1, length=17, padding=0)]:
        with torch.no_grad():
            expected = model(**batch)["logits"]
        assert torch.equal(result(**batch)["logits"], expected)


def test_opened_attention_stays_within_float_rounding(bert, batches, run) -> None:
    model, program = bert(attention="sdpa")
    result = run(program, Quantize(Scheme.parse("W8A8-full")))
    (batch,) = batches(1)
    with torch.no_grad():
        torch.testing.assert_close(result(**batch)["logits"], model(**batch)["logits"], atol=1e-6, rtol=1e-5)


def test_per_token_quantizers_round_at_once(bert, batches, run) -> None:
    """They need no calibration; a token's numbers do not depend on the other tokens of the batch."""
    model, program = bert()
    result = run(program, Quantize(Scheme.parse("W16A8-token")))
    (batch,) = batches(1, rows=3, padding=0)
    logits = result(**batch)["logits"]
    with torch.no_grad():
        expected = model(**batch)["logits"]
    assert not torch.equal(logits, expected)
    torch.testing.assert_close(logits, expected, atol=0.05, rtol=0.0)
    single = {name: value[1:2] for name, value in batch.items()}
    torch.testing.assert_close(result(**single)["logits"], logits[1:2], atol=1e-5, rtol=0.0)


def test_the_program_passed_in_is_not_changed(bert, run) -> None:
    _, program = bert()
    before = program.digest()
    run(program, Quantize())
    assert program.digest() == before


def test_it_takes_float_or_simulated_and_gives_simulated(bert) -> None:
    _, program = bert()
    result = PassManager([Quantize()]).run(program, Context())
    assert (program.level, result.level) == (Level.FLOAT, Level.SIMULATED)
    assert Quantize.contract is Contract.LOSSY
    check_levels([Quantize(), Quantize()], Level.FLOAT)
    with pytest.raises(BitlowerError, match="here it is integer"):
        check_levels([Quantize()], Level.INTEGER)


def test_it_leaves_a_report(bert, run) -> None:
    _, program = bert()
    context = Context()
    result = run(program, Quantize(ignore=("classifier",)), context=context)
    rows = context[PlacementReport].rows
    quantized = {row.tensor for row in rows if row.spec}
    assert quantized == {quantizer.tensor for _, quantizer in result.quantizers()}
    assert all(bool(row.spec) != bool(row.reason) for row in rows)
    assert {row.tensor for row in rows if row.reason == "ignored by a pattern"} >= {"classifier.weight"}


def test_two_runs_give_equal_programs(bert, run) -> None:
    _, program = bert()
    first, second = (run(program, Quantize(Scheme.parse("W8A8-full"))) for _ in range(2))
    assert first.digest() == second.digest()


def test_a_failing_placement_says_which_tensor(bert, run) -> None:
    _, program = bert()
    with pytest.raises(BitlowerError, match=r"layer_norm \(linear-input\).*does not divide"):
        run(program, Quantize(Scheme.parse("W8A8-peg7")))


@pytest.mark.parametrize(
    "pass_", [Quantize(), Quantize(Scheme.parse("W4A16-g128"), ignore=("re:.*a",), targets=("b", "c"))]
)
def test_it_prints_as_pipeline_text(pass_: Quantize) -> None:
    assert parse_pipeline(format_pipeline([pass_])) == (pass_,)


def test_several_in_a_row_give_parts_of_the_model_different_schemes(bert, run) -> None:
    _, program = bert()
    first = Quantize(Scheme.parse("W8A16-g16"), targets=("re:.*(key|value)",))
    result = run(program, Clean(), first, Quantize(Scheme.parse("W4A16-g16"), ignore=("classifier",)))
    bits = {q.tensor: q.spec.grid.bits for _, q in result.quantizers() if q.role == "linear-weight"}
    assert len(bits) == 13
    for tensor, count in bits.items():
        assert count == (8 if "key" in tensor or "value" in tensor else 4), tensor
    readers = [node.all_input_nodes for node in linears(result.graph)]
    assert all(sum(n.target is ops.fake_quantize for n in inputs) <= 1 for inputs in readers)


def test_a_second_pass_that_finds_nothing_left_is_refused(bert, run) -> None:
    _, program = bert()
    once = run(program, Clean(), Quantize(Scheme.parse("W8A8-full")))
    with pytest.raises(BitlowerError, match="quantizes nothing"):
        run(once, Quantize(Scheme.parse("W8A8-full")))

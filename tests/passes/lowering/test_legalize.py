"""Linears that are cut along grouped inputs: against integer arithmetic in numpy, and inside small BERTs."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from bitlower.frontends import load
from bitlower.ir import BitlowerError, Program, Scheme, get_tensor, ops, set_tensor
from bitlower.ir.verifier import verify
from bitlower.passes import Context, Contract, Pass, PassManager, parse_pipeline
from bitlower.passes.lowering.legalize import Legalize, LegalizeReport
from bitlower.passes.lowering.lower_integer import LowerInteger
from bitlower.passes.quantizers.calibrate import Calibrate
from bitlower.passes.quantizers.quantize import PlacementReport, Quantize
from bitlower.passes.rounding.adaround import AdaroundReport
from bitlower.passes.rounding.correct_bias import CorrectBias
from bitlower.passes.rounding.gptq import GptqReport

aten = torch.ops.aten
MINMAX = Calibrate(activations="minmax", weights="minmax")


class Pooled(nn.Module):
    """A sum whose first row is read by a linear of its own, as poolers do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.pool = nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.tanh(x) * torch.logspace(-1, 1, 12)
        x = self.up(x) + x
        return self.up(x), self.pool(x[:, 0])


class Net(nn.Module):
    """A linear whose input is read by a sum too."""

    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.up, self.shared = nn.Linear(12, 12), shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(x) * torch.logspace(-1, 1, 12)
        return self.up(x) + x if self.shared else self.up(x)


def data() -> list[dict[str, torch.Tensor]]:
    return [{"x": torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(seed))} for seed in range(2)]


def calibrated(run, scheme: str = "W8A8-upeg3", shared: bool = False) -> Program:
    torch.manual_seed(0)
    program = load(Net(shared), example_inputs=data()[0])
    return run(program, Quantize(Scheme.parse(scheme)), MINMAX, context=Context(calibration=data()))


def targets(program: Program) -> list[object]:
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("scheme", ["W8A8-upeg3", "W8A8-peg4", "W8A8-peg4-tensor"])
def test_the_sum_of_integer_products_is_the_grouped_linear(run, scheme: str) -> None:
    """Σ_k s_k (q_k − z_k) W_int[:, k]ᵀ · s_w + b in float64, with the integers of the lowered program."""
    program = calibrated(run, scheme)
    lowered = run(program, Legalize(), LowerInteger())
    verify(lowered)
    x = data()[1]["x"]
    values = np.tanh(x.double().numpy()) * np.logspace(-1, 1, 12, dtype=np.float32)
    weight = [get_tensor(lowered.module, n).double().numpy() for n in ("up.weight_codes", "quantizers.up_weight.scale")]
    total, start = get_tensor(lowered.module, "up.bias").detach().double().numpy(), 0
    parts = lowered.graph.find_nodes(op="call_function", target=ops.quantize)
    for node in parts:
        scale, zero = (float(get_tensor(lowered.module, str(arg.target))) for arg in node.args[1:3])
        stop = start + node.meta["type"].shape[-1]
        codes = np.clip(np.rint(values[..., start:stop] / scale) + zero, 0, 255)
        total = total + scale * (codes - zero) @ (weight[0][:, start:stop] * weight[1]).T
        start = stop
    assert start == 12
    assert len(parts) == (3 if "upeg" in scheme else 4)
    np.testing.assert_allclose(lowered(x=x)["output"].detach().numpy(), total, atol=2e-5)
    np.testing.assert_allclose(
        lowered(x=x)["output"].detach().numpy(), program(x=x)["output"].detach().numpy(), atol=2e-5
    )


def test_the_weight_is_stored_once(run) -> None:
    before = calibrated(run)
    after = run(before, Legalize(), LowerInteger())
    names = [name for name, _ in after.tensors()]
    assert [name for name in names if "weight_codes" in name] == ["model/up.weight_codes"]
    assert after.size_bytes() <= run(before, LowerInteger()).size_bytes()


def test_a_sum_reads_the_slices_put_together(run) -> None:
    before = calibrated(run, "W8A8-upeg3-full", shared=True)
    after = run(before, Legalize())
    verify(after)
    assert {q.spec.granularity.kind for _, q in after.quantizers() if q.role != "linear-weight"} == {"tensor"}
    x = data()[0]["x"]
    torch.testing.assert_close(after(x=x)["output"], before(x=x)["output"], atol=2e-5, rtol=0)


def test_a_linear_behind_a_view_is_named(run) -> None:
    program = run(
        load(Pooled(), example_inputs=data()[0]), Quantize(Scheme.parse("W8A8-upeg3-full")), MINMAX,
        context=Context(calibration=data()),
    )  # fmt: skip
    context = Context()
    run(program, Legalize(), context=context)
    reasons = {row.tensor: row.reason for row in context[LegalizeReport].rows}
    assert [tensor for tensor, reason in reasons.items() if "a linear reads a view of it" in reason] == ["add"]


def test_values_that_no_linear_reads_keep_many_groups(run) -> None:
    program = calibrated(run, "W8A8-peg4-full", shared=True)
    context = Context()
    result = run(program, Legalize(), context=context)
    rows = {row.role: row for row in context[LegalizeReport].rows}
    assert rows["residual"].parts == 0
    assert "more operations than one scale an index" in rows["residual"].reason
    assert any(q.spec.granularity.kind == "embedding-group" for _, q in result.quantizers())
    few = run(calibrated(run, "W8A8-peg3-full", shared=True), Legalize(), context=context)
    assert {row.role: row for row in context[LegalizeReport].rows}["residual"].parts == 3
    assert any(node.target is aten.cat.default for node in few.graph.nodes)


def test_identical_groups_are_one_scale(run) -> None:
    program = calibrated(run, "W8A8-peg4")
    [node] = [n for n, q in program.quantizers() if q.role == "linear-input"]
    name = str(node.args[1].target)
    for target, value in ((name, 0.05), (str(node.args[2].target), 100.0)):
        set_tensor(program.module, target, torch.full((1, 1, 4), value))
    result = run(program, Legalize())
    verify(result)
    assert targets(result).count(aten.linear.default) == 1
    assert operator.getitem not in targets(result)
    assert all(q.spec.granularity.kind in ("tensor", "channel") for _, q in result.quantizers())
    x = data()[0]["x"]
    assert torch.equal(result(x=x)["output"], program(x=x)["output"])


def test_merging_gives_fewer_linears_and_more_error(run) -> None:
    program = calibrated(run, "W8A8-peg6")
    reference, x = load(program_net(), example_inputs=data()[0]), data()[0]["x"]
    expected = reference(x=x)["output"]
    errors, counts = [], []
    for merge in (1.0, 4.0, 1e6):
        result = run(program, Legalize(merge=merge))
        counts.append(targets(result).count(aten.linear.default))
        errors.append(float((result(x=x)["output"] - expected).square().mean().detach()))
    assert counts[0] == 6
    assert 1 < counts[1] < 6
    assert counts[2] == 1
    assert errors[0] < errors[1] < errors[2]
    assert Legalize(merge=4.0).contract is Contract.LOSSY
    assert Legalize().contract is Contract.EXACT is Legalize.contract


def program_net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.mark.parametrize(
    ("scheme", "options", "reason"),
    [
        ("W8A8-peg6", {"limit": 5}, "6 groups are more than 5"),
        ("W16A8-peg6", {}, "the weight is float"),
        ("W8A12-peg6", {}, "12 bits have no integer kernel"),
        ("W8A8-g4-peg6", {}, "the weight has scales along its input axis"),
    ],
)
def test_what_is_left_alone_is_said(run, scheme: str, options: dict[str, int], reason: str) -> None:
    program, context = calibrated(run, scheme), Context()
    assert not Legalize(**options).run(program, context)
    [row] = context[LegalizeReport].rows
    assert reason in row.reason
    assert (row.groups, row.parts, row.linears) == (6, 0, 0)


@dataclass(frozen=True)
class Rounded(Pass):
    """Leaves what passes that round weights report."""

    name: ClassVar[str] = "rounded"
    contract: ClassVar[Contract] = Contract.ANALYSIS

    def run(self, program: Program, context: Context) -> bool:
        context.put(GptqReport(()))
        context.put(AdaroundReport(()))
        return False


@pytest.mark.parametrize("later", [MINMAX, CorrectBias(), Legalize(), LowerInteger()], ids=lambda pass_: pass_.name)
def test_reports_on_rounding_outlive_the_passes_behind_it(later: Pass) -> None:
    program, context = load(Net(), example_inputs=data()[0]), Context(calibration=data())
    before = [] if later is MINMAX else [MINMAX]
    passes = [Quantize(Scheme.parse("W8A8-upeg3")), *before, Rounded(), later]
    PassManager(passes, verify=False).run(program, context)
    assert {PlacementReport, GptqReport, AdaroundReport} <= set(context.results)


def test_too_early_or_out_of_range(run) -> None:
    program = load(Net(), example_inputs=data()[0])
    placed = run(program, Quantize(Scheme.parse("W8A8-peg3")))
    with pytest.raises(BitlowerError, match="has no range; run `calibrate` before `legalize`"):
        Legalize().run(placed, Context())
    for options, words in (({"merge": 0.5}, "merge is 0.5"), ({"limit": 0}, "limit is 0")):
        with pytest.raises(BitlowerError, match=words):
            Legalize(**options).run(placed, Context())


@pytest.mark.parametrize("scheme", ["W8A8-upeg3", "W8A8-upeg3-full", "W8A8-peg4-full"])
def test_a_whole_encoder_stays_what_it_is(bert, batches, scheme: str) -> None:
    """The pipeline holds the pass to its contract on held-out batches."""
    _, program = bert()
    pipeline = f"clean,quantize{{scheme={scheme}}},calibrate{{activations=minmax}},legalize,lower-integer"
    context = Context(calibration=batches(2), evaluation=batches(2, seed=9))
    result = PassManager(parse_pipeline(pipeline)).run(program, context)
    kinds = {q.spec.granularity.kind for n, q in result.quantizers() if q.role == "linear-input"}
    assert kinds <= {"tensor"}
    assert targets(result).count(aten.linear.default) >= 2 * 14

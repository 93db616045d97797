"""Integers give the numbers of the simulation, bit for bit, for every scheme."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitlower.ir import BitlowerError, Level, Scheme, get_tensor, ops
from bitlower.ir.verifier import verify
from bitlower.passes import Context, Contract, check_levels
from bitlower.passes.canonical.clean import Clean
from bitlower.passes.lowering.lower_integer import LowerInteger
from bitlower.passes.quantizers.calibrate import Calibrate
from bitlower.passes.quantizers.quantize import Quantize

SCHEMES = [
    "W8A8",
    "W8A8-full",
    "W8A8-token",
    "W8A8-peg4",
    "W4A8-g16",
    "W8A8-tensor",
    "W8A8-asym",
    "W2A4-full",
    "W12A12-full",
]


def simulate(program, scheme: str, run, batches):
    passes = (Clean(), Quantize(Scheme.parse(scheme)), Calibrate(weights="minmax"))
    return run(program, *passes, context=Context(calibration=batches(2)))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_outputs_are_equal_bit_for_bit(bert, batches, run, scheme: str) -> None:
    _, program = bert()
    simulated = simulate(program, scheme, run, batches)
    integer = run(simulated, LowerInteger())
    verify(integer)
    assert integer.level is Level.INTEGER
    for batch in [*batches(1, seed=5), *batches(1, rows=1, length=17, padding=0)]:
        assert torch.equal(integer(**batch)["logits"], simulated(**batch)["logits"])
        assert not torch.equal(integer(**batch)["logits"], program(**batch)["logits"])


@pytest.mark.parametrize("scheme", ["W8A8-full", "W4A8-g16", "W8A8-asym", "W12A12-full", "W8A8-token"])
def test_codes_are_integers_of_the_grid(bert, batches, run, scheme: str) -> None:
    """Weights against numpy in float32; activations by their type and the bounds of their grid."""
    _, program = bert()
    simulated = simulate(program, scheme, run, batches)
    integer = run(simulated, LowerInteger())
    assert not integer.graph.find_nodes(op="call_function", target=ops.fake_quantize)
    weights = activations = 0
    for node, quantizer in integer.quantizers():
        grid = quantizer.spec.grid
        if node.target is ops.quantize:
            assert node.meta["type"].dtype == grid.dtype
            assert node.args[3:] == (grid.quant_min, grid.quant_max, str(grid.dtype).removeprefix("torch."))
            activations += 1
        elif node.args[0].op == "get_attr":
            assert node.args[0].target == f"{quantizer.tensor}_codes"
            codes, scale, zero = (get_tensor(integer.module, arg.target) for arg in node.args)
            assert codes.dtype == grid.dtype
            original = get_tensor(program.module, quantizer.tensor).detach().numpy()
            assert np.array_equal(codes.numpy(), expected_codes(original, scale, zero, grid))
            weights += 1
    assert weights == sum(q.tensor.endswith("weight") for _, q in simulated.quantizers())
    assert activations == sum(not q.tensor.endswith("weight") for _, q in simulated.quantizers())


def expected_codes(weight: np.ndarray, scale: torch.Tensor, zero: torch.Tensor, grid) -> np.ndarray:
    """Round half to even of the float32 quotient."""
    parts = [part.numpy() for part in (scale, zero)]
    for axis in range(weight.ndim if scale.dim() else 0):
        repeats = weight.shape[axis] // parts[0].shape[axis]
        parts = [np.repeat(part, repeats, axis) for part in parts]
    return np.clip(np.rint(weight / parts[0]) + parts[1], grid.quant_min, grid.quant_max)


def test_float_weights_are_gone(bert, batches, run) -> None:
    _, program = bert()
    simulated = simulate(program, "W8A8", run, batches)
    integer = run(simulated, LowerInteger())
    names = {name for name, _ in integer.tensors()}
    quantized = {f"model/{q.tensor}" for _, q in simulated.quantizers() if q.tensor.endswith("weight")}
    assert not names & quantized
    assert {f"{name}_codes" for name in quantized} <= names
    floats = sum(t.numel() * 4 for name, t in program.tensors() if name in quantized)
    scales = sum(t.numel() * 4 for name, t in simulated.tensors() if "/quantizers." in name)
    assert integer.size_bytes() == program.size_bytes() - floats + floats // 4 + scales


def test_a_weight_that_is_also_read_as_float_stays_beside_its_codes(run) -> None:
    from torch import nn

    from bitlower.frontends import load

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(ids))

    program = load(Tied(), example_inputs={"ids": torch.arange(6).reshape(2, 3)})
    simulated = run(program, Quantize(Scheme.parse("W8A8"), ignore=("head",)), Calibrate())
    integer = run(simulated, LowerInteger())
    ids = torch.tensor([[1, 5, 11]])
    assert torch.equal(integer(ids=ids)["output"], simulated(ids=ids)["output"])
    assert sum(name.endswith("_codes") for name, _ in integer.tensors()) == 1


def test_a_quantizer_without_a_range_is_an_error(bert, run) -> None:
    _, program = bert()
    with pytest.raises(BitlowerError, match=r"the quantizer of .* has no range; run `calibrate` first"):
        run(program, Quantize(), LowerInteger())


def test_levels_and_contract() -> None:
    check_levels([Quantize(), Calibrate(), LowerInteger()], Level.FLOAT)
    assert LowerInteger.contract is Contract.EXACT
    with pytest.raises(BitlowerError, match="takes a program at level simulated; here it is float"):
        check_levels([LowerInteger()], Level.FLOAT)


def test_a_program_without_quantizers_is_not_changed(bert) -> None:
    _, program = bert()
    assert LowerInteger().run(program.clone(), Context()) is False

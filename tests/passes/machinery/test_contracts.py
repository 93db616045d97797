"""How far outputs of an exact pass may be apart, against numpy in float64 on the whole tensor."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitlower.ir import CheckError, Program, Scheme, float_noise, get_tensor, set_tensor
from bitlower.ir.dataflow import linears
from bitlower.passes import Context
from bitlower.passes._machinery import contracts
from bitlower.passes._machinery.contracts import RTOL, check_exact, equal_between_roundings, excess
from bitlower.passes.quantizers.calibrate import Calibrate
from bitlower.passes.quantizers.quantize import Quantize


def by_numpy(expected: torch.Tensor, found: torch.Tensor) -> bool:
    a, b = (tensor.double().numpy() for tensor in (expected, found))
    return bool(np.abs(a - b).max() > RTOL * (a.std() if np.ptp(a) > 1e-11 * np.abs(a).max() else np.abs(a).max()))


@given(
    st.integers(1, 40),
    st.integers(1, 7),
    st.floats(-1e3, 1e3),
    st.one_of(st.just(0.0), st.floats(1e-3, 10)),
    st.floats(0, 3 * RTOL),
    st.integers(),
)
def test_the_tolerance_is_a_share_of_the_spread(
    count: int, part: int, mean: float, spread: float, error: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed % 2**31)
    expected = mean + spread * torch.randn(count, generator=generator, dtype=torch.float64)
    found = expected.clone()
    found[count // 2] += error * (spread or abs(mean))
    limit = RTOL * (float(expected.numpy().std()) if spread else abs(mean))
    if math.isclose(float((found - expected).abs().max()), limit, rel_tol=1e-6):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contracts, "_PART", part)
        assert bool(excess(expected, found)) == by_numpy(expected, found)


def test_what_is_not_finite_must_be_so_in_both() -> None:
    expected = torch.tensor([1.0, math.inf, 2.0])
    assert not excess(expected, expected.clone())
    assert excess(expected, torch.tensor([1.0, 3.0, 2.0])) == "NaN or Inf"
    assert excess(torch.ones(3), torch.tensor([1.0, 1.0, math.nan])) == "NaN or Inf"
    assert not excess(torch.zeros(0), torch.zeros(0))
    assert excess(torch.zeros(3), torch.full((3,), 1e-9))


def test_an_output_that_is_gone_is_named(tiny_program: Program) -> None:
    after = tiny_program.clone()
    after.outputs = after.outputs[:1]
    output = after.graph.output_node()
    output.args = (output.args[0][:1],)
    after.recompile()
    with pytest.raises(CheckError, match="'drop' says it is exact, but the output 'logits' is gone"):
        check_exact("drop", tiny_program, after, [{"x": torch.ones(2, 16)}])


def rounded(bert, batches, run) -> Program:
    """A BERT in which nearly every value is rounded, coarsely enough for outputs to move by a lot."""
    _, program = bert()
    passes = Quantize(Scheme.parse("W4A4-full")), Calibrate(weights="minmax", activations="minmax")
    return run(program, *passes, context=Context(calibration=batches(2)))


def changed(program: Program, kind: str) -> Program:
    """A copy with another linear: ``noise`` as float arithmetic makes it, a wrong ``bias``, or a wrong ``scale``.

    A fault can be hidden from the outputs by the rounding after it, but not from the values that are rounded.
    """
    result = program.clone()
    linear = linears(result.graph)[-1]
    weight, bias = linear.args[1], linear.args[2]
    name = str((weight.args[1] if kind == "scale" else bias).target)
    tensor = get_tensor(result.module, name).detach()
    factor = {"noise": 1 + 3e-6, "bias": 1.01, "scale": 1.5}[kind]
    set_tensor(result.module, name, torch.nn.Parameter(tensor * factor) if kind != "scale" else tensor * factor)
    return result


def test_codes_that_turn_over_are_no_difference(bert, batches, run) -> None:
    """Noise before a rounding, which outputs may show, is told from a fault, which they may hide."""
    program, data = rounded(bert, batches, run), batches(3, seed=5)
    for batch in data:
        assert equal_between_roundings(program, changed(program, "noise"), batch)
    check_exact("noise", program, changed(program, "noise"), data)
    for kind in ("bias", "scale"):
        assert not equal_between_roundings(program, changed(program, kind), data[0])
    with pytest.raises(CheckError, match="'scale' says it is exact"):
        check_exact("scale", program, changed(program, "scale"), data)


def test_values_that_nothing_rounds_yet_may_be_scaled(bert, batches, run) -> None:
    """Scale migration changes what uncalibrated quantizers will round; others round to codes that turn over."""
    _, program = bert()
    low, rest = Scheme.parse("W4A4-token"), Scheme.parse("W8A8")
    program, (batch,) = run(program, Quantize(low, targets=("re:.*intermediate.dense",)), Quantize(rest)), batches(1)
    after = changed(program, "noise")
    parts = {"attention.self.value.weight": 2.0, "attention.self.value.bias": 2.0, "attention.output.dense.weight": 0.5}
    for name, tensor in program.tensors():
        for part, factor in parts.items():
            if name.endswith(part):
                scaled = torch.nn.Parameter(tensor.detach() * factor)
                set_tensor(after.module, name.removeprefix("model/"), scaled)
    assert equal_between_roundings(program, after, batch)
    assert not equal_between_roundings(program, changed(after, "bias"), batch)


def test_a_program_without_quantizers_has_no_such_excuse(bert, batches) -> None:
    _, program = bert()
    assert not equal_between_roundings(program, program, batches(1)[0])


def test_float_noise_of_a_program_without_rounding_is_no_difference(tiny_program: Program, monkeypatch) -> None:
    """A bias that is off by more than the tolerance passes only where sums in another order do as much."""
    batch = {"x": torch.randn(4, 16, generator=torch.Generator().manual_seed(0))}
    after = tiny_program.clone()
    name = next(name.partition("/")[2] for name, _ in after.tensors() if name.endswith("head.bias"))
    bias = get_tensor(after.module, name).detach()
    set_tensor(after.module, name, torch.nn.Parameter(bias + 0.01))
    with pytest.raises(CheckError, match="the output 'logits' differs"):
        check_exact("shift", tiny_program, after, [batch])
    monkeypatch.setattr(float_noise, "ROUNDING", 0.05)
    check_exact("shift", tiny_program, after, [batch])

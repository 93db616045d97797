import numpy as np
import pytest
import torch

from bitlower.ir import BitlowerError, Scheme, get_tensor, set_tensor
from bitlower.passes import Context
from bitlower.passes.canonical.clean import Clean
from bitlower.passes.quantizers.quantize import Quantize
from bitlower.passes.rounding.rtn import Rtn


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_are_rounded_to_nearest_on_the_grid_from_end_to_end(bert, run, bits: int) -> None:
    _, program = bert()
    result = run(program, Clean(), Quantize(Scheme.parse(f"W{bits}A16-g16-asym")), Rtn())
    nodes = [n for n, q in result.quantizers() if q.role == "linear-weight"]
    assert len(nodes) == 14
    for node in nodes:
        weight, scale, zero = (get_tensor(result.module, str(a.target)) for a in node.args[:3])
        groups = weight.detach().double().numpy().reshape(weight.shape[0], -1, 16)
        low, high = np.minimum(groups.min(2), 0), np.maximum(groups.max(2), 0)
        np.testing.assert_allclose(scale.numpy(), (high - low) / (2**bits - 1), rtol=1e-6)
        np.testing.assert_array_equal(zero.numpy(), np.round(-low / scale.numpy()))


def test_least_squared_error_ranges_do_no_worse(bert, run) -> None:
    _, program = bert()
    placed = run(program, Clean(), Quantize(Scheme.parse("W3A16")))
    errors = []
    for ranges in ("minmax", "mse"):
        result, total = run(placed, Rtn(ranges=ranges)), 0.0
        for node, quantizer in result.quantizers():
            weight = get_tensor(result.module, quantizer.tensor).detach()
            scale = get_tensor(result.module, str(node.args[1].target))
            rounded = (weight / scale).round().clamp(*node.args[3:5]) * scale
            total += float((rounded - weight).square().sum())
        errors.append(total)
    assert errors[1] < 0.95 * errors[0]


def test_nothing_open_changes_nothing(bert, run) -> None:
    _, program = bert()
    result = run(program, Clean(), Quantize(Scheme.parse("W8A16")), Rtn())
    before = {name: tensor.clone() for name, tensor in result.tensors()}
    assert Rtn().run(result, Context()) is False
    assert all(torch.equal(tensor, before[name]) for name, tensor in result.tensors())


def test_a_weight_with_nan_is_named(bert, run) -> None:
    _, program = bert()
    placed = run(program, Clean(), Quantize(Scheme.parse("W8A16")))
    name = next(q.tensor for _, q in placed.quantizers() if q.role == "linear-weight")
    set_tensor(placed.module, name, torch.full_like(get_tensor(placed.module, name), torch.nan))
    with pytest.raises(BitlowerError, match=f"the weight {name} holds NaN or Inf"):
        run(placed, Rtn())

"""Learnable quantizers: what is learned, against float64 autograd; what stays equal; observed and frozen ranges.

Module-wise dynamic scaling has tests of its own.
"""

import math

import pytest
import torch

from bitlower.ir import BitlowerError, Granularity, Grid, QuantSpec
from bitlower.ir.learnable import FLOOR, LearnableQuantizer, RangeSettings
from bitlower.ir.quantization import numerics

S4, U8 = Grid(4), Grid(8, signed=False, symmetric=False)
SPECS = {
    "per tensor": QuantSpec(S4, Granularity.per_tensor()),
    "per channel": QuantSpec(S4, Granularity.per_channel(0)),
    "groups": QuantSpec(S4, Granularity.per_group(8)),
    "row groups": QuantSpec(S4, Granularity.row_group(2)),
    "asymmetric": QuantSpec(Grid(3, signed=False, symmetric=False), Granularity.per_group(8)),
}


def weight(seed=0, shape=(6, 24)):
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def quantizer(spec, settings=None, value=None, *, is_weight=True, **options):
    value = weight() if value is None else value
    scale, zero = spec.grid.qparams(*(0.6 * end for end in spec.granularity.range_of(value.detach())))
    return LearnableQuantizer(spec, scale, zero, settings or RangeSettings(**options), value if is_weight else None)


@pytest.mark.parametrize("parametrization", ["amax", "scale", "log", "pact"])
@pytest.mark.parametrize("name", SPECS)
def test_nothing_changes_before_it_learns(name, parametrization):
    value = weight()
    module = quantizer(SPECS[name], parametrization=parametrization)
    scale, zero = module.qparams(value)
    assert torch.equal(scale, module.scale)
    assert torch.equal(zero, module.zero_point)
    grid = SPECS[name].grid
    expected = numerics.fake(value.detach(), scale, zero, grid.quant_min, grid.quant_max)
    assert torch.equal(module(value), expected)


@pytest.mark.parametrize("parametrization", ["scale", "amax", "log"])
@pytest.mark.parametrize("name", SPECS)
def test_what_is_learned_moves_the_scale_as_it_says(name, parametrization):
    """The scale after a step, and the gradient by the chain rule from that of the scale."""
    spec, value, upstream = SPECS[name], weight(), torch.randn(6, 24)
    plain = quantizer(spec, parametrization="scale", gradient_scale="plain")
    (plain(value) * upstream).sum().backward()
    module = quantizer(spec, parametrization=parametrization, gradient_scale="plain")
    (module(value) * upstream).sum().backward()
    scale, span = plain.scale.double(), plain.span
    chain = {"scale": torch.ones_like(scale), "amax": torch.ones_like(scale) / span, "log": scale}[parametrization]
    expected = plain.range.grad.double() * chain
    torch.testing.assert_close(module.range.grad.double(), expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        module.range.add_(0.1)
    moved = {"scale": scale + 0.1, "amax": scale + 0.1 / span, "log": scale * math.exp(0.1)}[parametrization]
    torch.testing.assert_close(module.qparams(value)[0].double(), moved, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", SPECS)
def test_lsq_divides_by_the_root_of_the_elements_of_one_scale(name):
    spec, value, upstream = SPECS[name], weight(), torch.randn(6, 24)
    gradients = []
    for factor in ("plain", "lsq"):
        module = quantizer(spec, gradient_scale=factor)
        (module(value) * upstream).sum().backward()
        gradients.append(module.range.grad)
    elements = value.numel() / module.scale.numel()
    torch.testing.assert_close(gradients[1], gradients[0] / math.sqrt(elements * spec.grid.quant_max))


def test_zero_points_learn_inside_the_grid():
    spec = SPECS["asymmetric"]
    module = quantizer(spec)
    with torch.no_grad():
        module.zero.fill_(99.0)
    assert torch.equal(module.qparams()[1], torch.full_like(module.zero_point, spec.grid.quant_max))


def test_a_scale_never_reaches_zero_and_is_called_dead():
    module = quantizer(SPECS["per channel"])
    with torch.no_grad():
        module.range[2] = -1.0
    scale, _ = module.qparams()
    torch.testing.assert_close(scale[2], module.scale[2] * FLOOR)
    assert module.dead() == 1


def test_rows_of_a_table_are_rounded_as_the_whole_table_is():
    rows = torch.tensor([[5, 0, 3], [3, 3, 1]])
    for spec in SPECS.values():
        module, value = quantizer(spec), weight()
        assert torch.equal(module(value, rows), module(value)[rows])
        upstream = torch.randn(2, 3, 24)
        taken = torch.autograd.grad((module(value, rows, 3) * upstream).sum(), [value, module.range])
        whole = torch.autograd.grad((module(value)[rows] * upstream).sum(), [value, module.range])
        whole[0][3] = 0.0  # the padding row
        for mine, theirs in zip(taken, whole, strict=True):
            torch.testing.assert_close(mine * 1.0, theirs, rtol=1e-5, atol=1e-5)


def test_stored_scales_of_one_group_stay_equal():
    """Groups of 16 on 24 columns are stored in blocks of 8: two blocks are one group, the last is one by itself."""
    spec, value = QuantSpec(S4, Granularity.per_group(16)), weight()
    module = quantizer(spec, value=value)
    assert module.scale.shape == (6, 3)
    assert module.range.shape == (6, 2)
    (module(value) * torch.randn(6, 24)).sum().backward()
    with torch.no_grad():
        module.range.sub_(module.range.grad)
    scale, _ = module.qparams()
    assert torch.equal(scale[:, 0], scale[:, 1])
    assert not torch.equal(scale[:, 1], scale[:, 2])


def test_unequal_groups_of_an_activation_stay_groups():
    spec = QuantSpec(U8, Granularity.per_embedding_parts(3))
    scale = torch.tensor([0.1, 0.1, 0.4, 0.2, 0.2, 0.2]).reshape(1, 1, 6)
    module = LearnableQuantizer(spec, scale, torch.full_like(scale, 100.0), RangeSettings())
    assert module.range.shape == module.zero.shape == (1, 1, 3)
    with torch.no_grad():
        module.range.mul_(torch.tensor([1.0, 2.0, 3.0]))
    found = module.qparams()[0].reshape(-1)
    torch.testing.assert_close(found, torch.tensor([0.1, 0.1, 0.8, 0.6, 0.6, 0.6]))


def test_observed_ranges_are_averages_of_extremes_without_padding():
    spec, x = QuantSpec(U8, Granularity.per_tensor()), torch.randn(2, 3, 4)
    module = LearnableQuantizer(
        spec, torch.tensor(0.02), torch.tensor(100.0), RangeSettings(ranges="observed"), None, ("batch", "sequence", 4)
    )
    x[1, 2] = 1e6
    module.batch = {"input_ids": torch.zeros(2, 3), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    module(x)
    real = torch.cat([x[0], x[1, :2]])
    low, high = 0.9 * -100 * 0.02 + 0.1 * float(real.min()), 0.9 * 155 * 0.02 + 0.1 * float(real.max())
    assert float(module.scale) == pytest.approx((high - low) / 255, rel=1e-5)
    assert float(module.zero_point) == round(-low / float(module.scale))
    before = module.scale.clone()
    module.eval()
    module(10 * x)
    assert torch.equal(module.scale, before)


def test_laq_fits_the_scale_by_alternating_least_squares():
    value = weight()
    module = quantizer(SPECS["per tensor"], parametrization="laq")
    scale = float(module.scale)
    rounded = module(value)
    w = value.detach().double()
    for _ in range(10):
        codes = (w / scale).round().clamp(-8, 7)
        scale = float((codes * w).sum() / codes.square().sum())
    assert float(module.scale) == pytest.approx(scale, rel=1e-5)
    rounded.sum().backward()
    assert torch.equal(value.grad, torch.ones_like(value))
    assert not list(module.parameters())


def test_frozen_ranges_are_constants():
    value, module = weight(), quantizer(SPECS["groups"])
    with torch.no_grad():
        module.range.mul_(1.25)
    scale, _ = module.qparams()
    module.freeze()
    with torch.no_grad():
        module.range.mul_(2.0)
    assert torch.equal(module.qparams()[0], scale)
    module(value).sum().backward()
    assert module.range.grad is None
    copy = quantizer(SPECS["groups"])
    copy.load_state_dict(module.state_dict())
    assert torch.equal(copy.qparams()[0], scale)


def test_what_cannot_learn_is_refused():
    with pytest.raises(BitlowerError, match="module-wise scaling needs a symmetric grid"):
        quantizer(SPECS["asymmetric"], parametrization="gamma")

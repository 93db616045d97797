"""Gradients of fake quantization against float64 autograd through the definitions written out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitlower.ir.quantization import numerics
from bitlower.ir.quantization.rounding import Clipping, round_to_grid

SHAPE = (3, 4, 8)
LAYOUTS = [(), (1, 1, 1), (3, 1, 1), (1, 4, 1), (1, 1, 8), (1, 1, 2), (3, 2, 4), (3, 4, 8)]
LOW, HIGH = -3, 4


def case(layout, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SHAPE, generator=generator, dtype=torch.float64) * 2
    scale = torch.rand(layout, generator=generator, dtype=torch.float64) / 2 + 0.1
    zero = torch.randint(-2, 3, layout, generator=generator).double()
    weight = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    return x, scale, zero, weight


def spread(scale):
    if scale.dim() == 0:
        return scale.expand(SHAPE)
    for axis, size in enumerate(SHAPE):
        scale = scale.repeat_interleave(size // scale.shape[axis], axis)
    return scale


def straight_through(value):
    return value + (torch.round(value) - value).detach()


def clipped_first(x, scale, zero):
    """LSQ (Esser et al. 2020, eq. 1-3): clip in units of the scale, then round."""
    s, z = spread(scale), spread(straight_through(zero))
    return s * (straight_through(torch.clamp(x / s, LOW - z, HIGH - z)))


def rounded_first(x, scale, zero):
    """Bondarenko et al., official code: round, then clip the codes."""
    s, z = spread(scale), spread(straight_through(zero))
    return s * (torch.clamp(straight_through(x / s) + z, LOW, HIGH) - z)


def gradients(function, x, scale, zero, weight):
    leaves = [tensor.clone().requires_grad_() for tensor in (x, scale, zero)]
    value = function(*leaves)
    return value, torch.autograd.grad((value * weight).sum(), leaves)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(LAYOUTS), st.booleans(), st.integers(0, 99))
def test_gradients_are_those_of_the_definitions(layout, after, seed):
    arguments = case(layout, seed)
    definition = rounded_first if after else clipped_first
    expected_value, expected = gradients(definition, *arguments)
    clipping = Clipping(LOW, HIGH, after_rounding=after)
    value, found = gradients(lambda x, s, z: round_to_grid(x, s, z, clipping), *arguments)
    torch.testing.assert_close(value, expected_value, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_both_cases_occur_and_the_rules_differ_between_the_last_code_and_half_a_step_beyond(layout):
    arguments = case(layout)
    before = gradients(clipped_first, *arguments)[1][0] == 0
    after = gradients(rounded_first, *arguments)[1][0] == 0
    assert 0.05 < before.double().mean() < 0.95
    assert after.sum() < before.sum()


def test_the_forward_pass_is_that_of_numerics_bit_for_bit():
    x, scale, zero, _ = (tensor.float() for tensor in case((3, 1, 1)))
    expected = numerics.fake(x, scale, zero, LOW, HIGH)
    assert torch.equal(round_to_grid(x, scale, zero + 0.3, Clipping(LOW, HIGH)), expected)
    half = round_to_grid(x.bfloat16(), scale, zero, Clipping(LOW, HIGH))
    assert half.dtype is torch.bfloat16
    assert torch.equal(half, numerics.fake(x.bfloat16().float(), scale, zero, LOW, HIGH).bfloat16())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_all_passes_where_the_clipped_are_to_pass(layout):
    x, scale, zero, weight = case(layout)
    clipping = Clipping(LOW, HIGH, passes=True)
    _, (by_x, by_scale, _) = gradients(lambda *a: round_to_grid(*a, clipping), x, scale, zero, weight)
    assert torch.equal(by_x, weight)
    expected = gradients(clipped_first, x, scale, zero, weight)[1][1]
    torch.testing.assert_close(by_scale, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_pact_hears_of_clipped_values_alone(layout):
    """∂x̂/∂s is q − z outside and nothing inside: with α = s·quant_max that is PACT's ±1 (Choi et al. 2018, eq. 3)."""
    x, scale, zero, weight = case(layout)
    clipping = Clipping(LOW, HIGH, outside_only=True)
    _, (_, by_scale, _) = gradients(lambda *a: round_to_grid(*a, clipping), x, scale, zero, weight)
    s, z = spread(scale), spread(zero)
    terms = weight * torch.where(x / s + z >= HIGH, HIGH - z, torch.where(x / s + z <= LOW, LOW - z, 0.0))
    expected = numerics.sum_like_scale(terms, scale)
    torch.testing.assert_close(by_scale, expected, rtol=1e-9, atol=1e-9)


def test_what_needs_no_gradient_gets_none():
    x, scale, zero, weight = case((1, 1, 2))
    x.requires_grad_()
    (round_to_grid(x, scale, zero, Clipping(LOW, HIGH)) * weight).sum().backward()
    assert x.grad is not None
    assert scale.grad is None
    assert zero.grad is None

"""RMSNorm in the ways that models write it, against the formula in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from bitlower.frontends import load
from bitlower.ir import Program
from bitlower.ir.rewrite import apply_rules
from bitlower.passes import Context
from bitlower.passes.canonical._norm import RULES
from bitlower.passes.canonical.clean import Clean

aten = torch.ops.aten
WIDTH = 8
Form = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Norm(nn.Module):
    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(WIDTH, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._check(x.shape[-1] == WIDTH)
        return self.form(x, self.weight)


def trace(form: Form) -> Program:
    return load(Norm(form), example_inputs={"x": torch.randn(2, 3, WIDTH)})


def llama(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    kind = x.dtype
    x = x.to(torch.float32)
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)).to(kind)


def gemma(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    output = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    return (output * (1.0 + weight.float())).type_as(x)


def by_power(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.pow((x * x).mean(2, keepdim=True) + 1e-5, -0.5) * weight


def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.rsqrt(torch.square(x).mean(-1, keepdim=True) + 1e-5) * x


def nothing_added(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) * weight


def centred(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A layer normalization by hand, as Cohere has it."""
    x = x - x.mean(-1, keepdim=True)
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


@pytest.mark.parametrize(
    ("form", "factor", "epsilon"),
    [
        (llama, lambda w: w, 1e-5),
        (gemma, lambda w: 1 + w, 1e-5),
        (by_power, lambda w: w, 1e-5),
        (plain, lambda w: 1, 1e-5),
        (nothing_added, lambda w: w, 0.0),
        (centred, lambda w: w, 1e-5),
    ],
)
def test_every_spelling_becomes_one_operator(form: Form, factor: Callable, epsilon: float, run) -> None:
    program = trace(form)
    cleaned = run(program, Clean())
    (node,) = cleaned.graph.find_nodes(op="call_function", target=aten.rms_norm.default)
    assert node.args[1] == [WIDTH]
    assert node.args[3] == epsilon
    x = torch.randn(4, 5, WIDTH)
    y = x.double() - (x.double().mean(-1, keepdim=True) if form is centred else 0)
    weight = dict(program.module.named_parameters()).get("weight", torch.zeros(WIDTH)).double()
    expected = y / (y.square().mean(-1, keepdim=True) + epsilon).sqrt() * factor(weight)
    torch.testing.assert_close(cleaned(x=x)["output"].double(), expected.detach(), atol=1e-6, rtol=1e-5)
    left = {n.target for n in cleaned.graph.nodes if n.op == "call_function"}
    assert not left & {aten.rsqrt.default, aten.pow.Tensor_Scalar, aten.to.dtype}


def test_gemma_s_parameter_stays_as_the_model_stores_it(run) -> None:
    program = trace(gemma)
    cleaned = run(program, Clean())
    (node,) = cleaned.graph.find_nodes(op="call_function", target=aten.rms_norm.default)
    assert node.args[2].target is aten.add.Tensor
    assert torch.equal(cleaned.module.weight, program.module.weight)


def test_two_weights_over_one_normalization() -> None:
    """What a merge of equal computations leaves of two norms over one value."""

    def pair(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return y * weight, (weight + 1) * y

    program = trace(pair)
    before = program(x=torch.ones(1, 2, WIDTH) * 2)
    Clean().run(program, Context())
    program.recompile()
    assert len(program.graph.find_nodes(op="call_function", target=aten.rms_norm.default)) == 2
    after = program(x=torch.ones(1, 2, WIDTH) * 2)
    assert all(torch.allclose(after[name], value) for name, value in before.items())


def test_a_normalization_that_is_read_elsewhere_keeps_its_product() -> None:
    def both(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return y * weight, y

    program = trace(both)
    Clean().run(program, Context())
    program.recompile()
    (node,) = program.graph.find_nodes(op="call_function", target=aten.rms_norm.default)
    assert node.args[2] is None
    assert len(program.graph.find_nodes(op="call_function", target=aten.mul.Tensor)) == 1


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (lambda x, w: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True)), "the mean is not over the last axis alone"),
        (lambda x, w: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True)), "not taken of a mean that keeps its axis"),
        (lambda x, w: x * torch.rsqrt(x.abs().mean(-1, keepdim=True)), "the mean is not of squares"),
        (lambda x, w: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True)), "the mean is not of squares"),
        (lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + w[:1]), "added to the mean is no number"),
        (lambda x, w: w * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)), "is not multiplied with its reciprocal"),
        (lambda x, w: (s := torch.rsqrt(x.pow(2).mean(-1, keepdim=True))) * x + s, "is not multiplied with its"),
    ],
)
def test_what_is_no_rms_norm_says_why(form: Form, reason: str) -> None:
    program = trace(form)
    nodes = [n.target for n in program.graph.nodes]
    changed, (miss,) = apply_rules(RULES, program.module)
    assert not changed
    assert reason in miss.reason
    assert [n.target for n in program.graph.nodes] == nodes


def test_other_powers_are_not_looked_at() -> None:
    program = trace(lambda x, w: x.pow(2) + x.pow(0.5))
    assert apply_rules(RULES, program.module) == (False, [])


def test_the_new_node_has_the_place_of_the_old_one() -> None:
    program = trace(llama)
    (old,) = [n for n in program.graph.nodes if n.target is aten.mul.Tensor and n.meta["type"].rank == 3][1:]
    kind, source = old.meta["type"], old.meta["source"]
    Clean().run(program, Context())
    (node,) = program.graph.find_nodes(op="call_function", target=aten.rms_norm.default)
    assert (node.meta["type"], node.meta["source"]) == (kind, source)
    assert isinstance(node, fx.Node)

"""Fusions one by one on small modules: what they take, what they leave, and the reason that they give."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bitlower.frontends import load
from bitlower.ir import Level, Program, Scheme, kernels
from bitlower.ir.verifier import verify
from bitlower.passes import Context
from bitlower.passes.canonical.clean import Clean
from bitlower.passes.lowering._fuse_report import FuseReport
from bitlower.passes.lowering.fuse import Fuse
from bitlower.passes.lowering.lower_integer import LowerInteger
from bitlower.passes.quantizers.calibrate import Calibrate
from bitlower.passes.quantizers.quantize import Quantize

WIDTH = 8


class Block(nn.Module):
    """``body(self, x)`` over a few layers."""

    def __init__(self, body: Callable[[Block, torch.Tensor], torch.Tensor], bias: bool = True) -> None:
        super().__init__()
        self.body = body
        for name in ("a", "b", "c"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=bias))
        self.plain = nn.Linear(WIDTH, WIDTH, bias=not bias)
        self.norm, self.rms = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.table, self.other = nn.Embedding(12, WIDTH), nn.Embedding(12, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self, x)


def fused(
    module: nn.Module, example: torch.Tensor, scheme: str = "W8A8", ignore: tuple[str, ...] = ()
) -> tuple[Program, FuseReport]:
    """The module through all passes; checked against its integer form, bit for bit."""
    program, context = load(module.eval(), example_inputs={"x": example}), Context(calibration=[{"x": example}])
    for pass_ in (Clean(), Quantize(Scheme.parse(scheme), ignore=ignore), Calibrate(), LowerInteger()):
        pass_.run(program, context)
        program.level = pass_.ensures or program.level
        program.recompile()
    result = program.clone()
    Fuse().run(result, context)
    result.level = Fuse.ensures
    result.recompile()
    verify(result)
    for batch in (example, example[:1]):
        with torch.no_grad():
            assert torch.equal(result(x=batch)["output"], program(x=batch)["output"])
    return result, context[FuseReport]


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(3, 5, WIDTH)


def forms(program: Program) -> list[str]:
    """The kernels in order, with what they do: activation, residual, factor, merged layers, outputs."""
    found = []
    for node in program.graph.nodes:
        if kernels.is_kernel(node):
            said = kernels.arguments(node)
            named = [key for key in ("residual", "factor", "merged_n", "heads") if said.get(key)]
            parts = [said.get("activation"), *(key for key in named if not isinstance(said[key], float))]
            name = str(node.target).removeprefix("bitlower.fused_").removesuffix(".default")
            found.append(" ".join([name, *filter(None, parts), "->", said["outputs"]]))
    return found


def reasons(report: FuseReport) -> str:
    return "; ".join(miss.reason for miss in report.misses)


def test_activation_and_residual_go_into_the_linear(x) -> None:
    program, report = fused(Block(lambda m, x: m.b(nn.functional.gelu(m.a(x))) + x), x)
    assert forms(program) == ["linear gelu -> codes", "linear residual -> value"]
    assert [row.operator for row in report.remaining] == ["quantize"]  # of the model's own input
    assert report.remaining[0].reason == "given by the placeholder (%x), which is no kernel"


@pytest.mark.parametrize(
    ("function", "name"),
    [(torch.relu, "relu"), (torch.tanh, "tanh"), (torch.sigmoid, "sigmoid"), (nn.functional.silu, "silu")],
)
def test_every_activation(x, function, name: str) -> None:
    program, _ = fused(Block(lambda m, x: m.b(function(m.a(x)))), x)
    assert forms(program) == [f"linear {name} -> codes", "linear -> value"]


def test_an_activation_that_kernels_do_not_have_stays(x) -> None:
    program, report = fused(Block(lambda m, x: m.b(nn.functional.elu(m.a(x)))), x)
    assert forms(program) == ["linear -> value", "linear -> value"]
    assert any(row.reason.startswith("given by aten.elu") for row in report.remaining)


def test_a_value_that_is_read_twice_is_given_twice(x) -> None:
    """As float for the sum, as codes for the linear."""
    program, _ = fused(Block(lambda m, x: (y := torch.relu(m.a(x))) + m.b(y)), x)
    assert forms(program) == ["linear relu -> value codes", "linear residual -> value"]


def test_what_something_else_reads_before_the_activation_is_left(x) -> None:
    program, _ = fused(Block(lambda m, x: m.b(torch.relu(y := m.a(x))) * y.exp()), x)
    assert forms(program) == ["linear -> value", "pointwise relu -> codes", "linear -> value"]


def test_a_residual_of_another_shape_is_left(x) -> None:
    program, _ = fused(Block(lambda m, x: m.a(x) + x[:1]), x)
    assert forms(program) == ["linear -> value"]
    assert program.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)


def test_roundings_before_and_after_a_residual(x) -> None:
    program, report = fused(Block(lambda m, x: m.norm((y := torch.relu(m.c(x))) + m.a(y))), x, "W8A8-full")
    assert forms(program) == ["linear relu -> codes", "linear residual -> codes", "norm -> rounded"]
    linear = program.graph.find_nodes(op="call_function", target=kernels.fused_linear)[1]
    assert set(linear.meta["quantizers"]) == {"x", "weight", "rounded", "residual", "out"}
    assert not report.remaining


def test_gate_and_up_are_one_linear_and_their_product_one_kernel(x) -> None:
    program, _ = fused(Block(lambda m, x: m.c(nn.functional.silu(m.a(x)) * m.b(x))), x)
    assert forms(program) == ["linear merged_n -> value", "pointwise silu factor -> codes", "linear -> value"]
    [merged] = [node for node in program.graph.nodes if node.kwargs.get("merged_n")]
    assert merged.kwargs["merged_n"] == [WIDTH, WIDTH]


@pytest.mark.parametrize(
    ("body", "options", "reason"),
    [
        (lambda m, x: m.a(x) * m.plain(x), {}, "one has no bias"),
        (lambda m, x: m.a(x) * torch.relu(m.b(x)).exp(), {}, "goes into its own kernel"),
        (lambda m, x: m.a(x) * (m.b(x) + x).exp(), {}, "goes into its own kernel"),
        (lambda m, x: m.a(x) * m.b(x) * m.b(x.exp()), {}, "a weight is shared with another layer"),
        (lambda m, x: m.a(x) * m.b(x), {"ignore": ("re:b.weight",)}, "one has no codes of its own"),
    ],
)
def test_linears_that_do_not_agree_are_not_merged(x, body, options, reason: str) -> None:
    program, report = fused(Block(body), x, **options)
    assert not any("merged_n" in form for form in forms(program))
    assert reason in reasons(report)


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=2, max_size=4), st.booleans(), st.integers(0, 99),
    st.sampled_from(["W8A8", "W8A8-full", "W4A8-g8", "W8A8-tensor", "W4A8-asym", "W8A8-token", "W4A16"]),
)  # fmt: skip
def test_any_merge_keeps_the_numbers(sizes: list[int], bias: bool, seed: int, scheme: str) -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(16, size, bias=bias) for size in sizes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([part(x) for part in self.parts], -1)

    torch.manual_seed(seed)
    program, _ = fused(Parallel(), torch.randn(4, 16), scheme)
    [node] = [node for node in program.graph.nodes if kernels.is_kernel(node)]
    assert node.kwargs["merged_n"] == sizes


def test_norms_take_the_sum_before_them_and_give_it(x) -> None:
    program, _ = fused(Block(lambda m, x: m.a(m.rms(y := x.exp() + x.cos())) * y), x)
    assert forms(program) == ["norm residual -> sum codes", "linear -> value"]


def test_a_sum_that_is_read_before_the_norm_is_left(x) -> None:
    def body(m: Block, x: torch.Tensor) -> torch.Tensor:
        y = x.exp() + x.cos()
        z = y.sin()
        return m.a(m.norm(y)) * z

    program, report = fused(Block(body), x)
    assert forms(program) == ["norm -> codes", "linear -> value"]
    assert "something between reads it" in reasons(report)


def test_a_norm_over_several_axes_is_left(x) -> None:
    program, report = fused(Block(lambda m, x: m.a(nn.functional.layer_norm(x, [5, WIDTH]))), x)
    assert forms(program) == ["linear -> value"]
    assert "it is over several axes" in reasons(report)


def test_per_token_scales_come_from_kernels_that_hold_rows(x) -> None:
    body = lambda m, x: m.c(torch.relu(m.b(m.norm(m.a(x)))))  # noqa: E731
    program, report = fused(Block(body), x, "W8A8-token")
    assert forms(program)[1:] == [
        "norm -> codes scale zero_point",
        "linear -> value",
        "pointwise relu -> codes scale zero_point",
        "linear -> value",
    ]
    assert "relu is left to a kernel of its own: every token gets a scale" in reasons(report)


def test_sums_of_embeddings(x) -> None:
    ids = torch.randint(12, (3, 5))
    body = lambda m, x: m.a(m.norm(m.table(x) + m.other(x.remainder(4))))  # noqa: E731
    program, report = fused(Block(body), ids)
    assert forms(program) == ["embedding -> value", "norm -> codes", "linear -> value"]
    assert not report.remaining
    program, _ = fused(Block(body), ids, "W8A8-full")
    assert forms(program) == ["embedding -> codes", "norm -> codes", "linear -> rounded"]
    program, report = fused(Block(body), ids, ignore=("other",))
    assert forms(program) == ["embedding -> value", "norm residual -> codes", "linear -> value"]
    assert "its table is float" in reasons(report)


class Attention(nn.Module):
    """Explicit attention, with a step that differs."""

    def __init__(self, step: str) -> None:
        super().__init__()
        self.step = step
        for name in ("q", "k", "v", "o"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part(x).unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        keys = k if self.step == "turned" else k.transpose(-2, -1)
        keys = keys[..., :4, :] if self.step == "turned" else keys
        scores = q @ keys
        scores = scores / 3 if self.step == "divided" else scores * 0.5
        probs = scores.softmax(-1 if self.step != "axis" else 2)
        extra = probs.sum() if self.step == "read" else 0
        values = v[..., :4, :] if self.step == "turned" else v
        return self.o((probs @ values).transpose(1, 2).flatten(2)) + extra


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ("plain", ""),
        ("divided", ""),
        ("axis", "it is not over the last of four axes"),
        ("read", "its result is not used by one matmul alone"),
        ("turned", "the keys are not transposed on their last two axes"),
    ],
)
def test_explicit_attention(x, step: str, reason: str) -> None:
    program, report = fused(Attention(step), x, "W8A8-full")
    taken = [form for form in forms(program) if form.startswith("attention")]
    assert taken == ([] if reason else ["attention heads -> codes"])
    assert reason in reasons(report)
    left = [row for row in report.remaining if row.operator == "quantize" and "softmax" in row.reason]
    assert bool(left) == bool(reason)


def test_an_attention_operator_with_a_causal_mask(x) -> None:
    def body(m: Block, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part(x).unflatten(-1, (2, 4)).transpose(1, 2) for part in (m.a, m.b, m.c))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return m.plain(y.transpose(1, 2).flatten(2))

    program, _ = fused(Block(body), x)
    assert forms(program) == ["linear merged_n -> value", "attention heads -> codes", "linear -> value"]
    [attention] = program.graph.find_nodes(op="call_function", target=kernels.fused_attention)
    assert attention.kwargs["causal"] is True
    program, _ = fused(Block(body), x, "W8A8-token")
    assert forms(program) == [
        "linear merged_n -> value",
        "pointwise heads -> codes scale zero_point",
        "linear -> value",
    ]


def halves(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([-x[..., WIDTH // 2 :], x[..., : WIDTH // 2]], -1)


@pytest.mark.parametrize(
    ("turn", "matches"),
    [
        (lambda y, x: y * x.cos() + halves(y) * x.sin(), True),
        (lambda y, x: y * x.cos() + torch.cat([y[..., 4:], y[..., :4]], -1) * x.sin(), False),
        (lambda y, x: y * x.cos() + torch.cat([-y[..., :4], y[..., 4:]], -1) * x.sin(), False),
        (lambda y, x: y * x.cos() + halves(y.exp()) * x.sin(), False),
        (lambda y, x: y * x.cos() + torch.cat([-y[..., 2:], y[..., :2]], -1) * x.sin(), False),
        (lambda y, x: y * x.cos() + (z := halves(y)) * x.sin() + z, False),
    ],
)
def test_rotary_embeddings(x, turn, matches: bool) -> None:
    program, _ = fused(Block(lambda m, x: m.b(turn(m.a(x), x))), x)
    assert any(form.startswith("rotary") for form in forms(program)) == matches
    program, _ = fused(Block(lambda m, x: m.b(turn(torch.relu(m.a(x)), x))), x, "W8A8-full")
    if matches:
        assert forms(program) == ["linear relu -> codes", "rotary -> value", "linear -> rounded"]


def test_a_sum_that_no_other_kernel_takes_is_one_if_it_is_quantized(x) -> None:
    program, _ = fused(Block(lambda m, x: m.a(x.exp() + x.sin())), x)
    assert forms(program) == ["pointwise residual -> codes", "linear -> value"]
    program, _ = fused(Block(lambda m, x: m.a(x).exp() + x.sin()), x)
    assert forms(program) == ["linear -> value"]


def test_codes_go_through_views(x) -> None:
    body = lambda m, x: m.b(torch.relu(m.a(x)).transpose(0, 1)[:2].transpose(0, 1))  # noqa: E731
    program, report = fused(Block(body), x, "W8A8-full")
    assert forms(program) == ["linear relu -> codes", "linear -> rounded"]
    assert not report.remaining
    views = [node for node in program.graph.nodes if node.target is torch.ops.aten.slice.Tensor]
    assert any(node.meta["type"].dtype == torch.uint8 for node in views)


def test_a_program_without_quantizers_is_a_fused_one_too(x, run) -> None:
    program = load(Block(lambda m, x: x.exp() * 2), example_inputs={"x": x})
    program.level, context = Level.INTEGER, Context()
    result = run(program, Fuse(), context=context)
    assert forms(result) == []
    assert context[FuseReport].summary() == "0 kernels; quantize and dequantize left: 0"
    assert torch.equal(result(x=x)["output"], program(x=x)["output"])

"""Linear layers in all spellings become one; parameters are turned where all their readers agree."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from bitlower.frontends import load
from bitlower.ir import Program, TensorType, get_tensor, serialize
from bitlower.passes import Context
from bitlower.passes.canonical.clean import Clean, CleanReport

aten = torch.ops.aten
INNER, OUTER = 6, 4


class Module(nn.Module):
    """Holds ``stored`` ``[in, out]``, ``weight`` ``[out, in]`` and ``bias`` for ``function(self, x)``."""

    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function = function
        generator = torch.Generator().manual_seed(0)
        self.stored = nn.Parameter(torch.randn(INNER, OUTER, generator=generator))
        self.weight = nn.Parameter(torch.randn(OUTER, INNER, generator=generator))
        self.bias = nn.Parameter(torch.randn(OUTER, generator=generator))
        self.norm = nn.LayerNorm(INNER)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._check(x.shape[-1] == INNER)
        return self.function(self, x)


def clean(function: Callable, shape: tuple[int, ...] = (2, 3, INNER)) -> tuple[Program, Program, CleanReport]:
    """The program before and after, and what did not match; both give the same."""
    program = load(Module(function), example_inputs={"x": torch.randn(shape)})
    cleaned, context = program.clone(), Context()
    Clean().run(cleaned, context)
    cleaned.recompile()
    x = torch.randn([size + 1 for size in shape[:-1]] + [INNER])
    before, after = program(x=x), cleaned(x=x)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-6, rtol=1e-5)
    return program, cleaned, context[CleanReport]


def calls(program: Program) -> list[object]:
    return [node.target for node in program.graph.nodes if node.op == "call_function" and "type" in node.meta]


def conv1d(module: Module, x: torch.Tensor) -> torch.Tensor:
    """As transformers' Conv1D has it."""
    size = (*x.shape[:-1], OUTER)
    return torch.addmm(module.bias, x.view(-1, x.shape[-1]), module.stored).view(size)


@pytest.mark.parametrize(
    "function",
    [
        conv1d,
        lambda m, x: x @ m.stored,
        lambda m, x: nn.functional.linear(x, m.stored.t(), m.bias),
        lambda m, x: nn.functional.linear(x, m.stored.transpose(0, 1)),
        lambda m, x: x @ m.stored + torch.relu(x @ m.stored),
    ],
)
def test_a_matrix_that_lies_across_is_turned(function: Callable) -> None:
    program, cleaned, report = clean(function)
    assert {target for target in calls(cleaned) if target is not aten.relu.default} <= {
        aten.linear.default,
        aten.add.Tensor,
    }
    assert report.misses == ()
    assert cleaned.transposed == ("model/stored",)
    assert program.transposed == ()
    turned = get_tensor(cleaned.module, "stored")
    assert torch.equal(turned, get_tensor(program.module, "stored").t())
    assert turned.is_contiguous()
    assert isinstance(turned, nn.Parameter)
    for node in cleaned.graph.find_nodes(op="get_attr", target="stored"):
        assert node.meta["type"] == TensorType(torch.float32, (OUTER, INNER))
        assert all(user.target is aten.linear.default and user.args[1] is node for user in node.users)


def test_a_product_from_the_left_is_a_linear_over_the_turned_tokens() -> None:
    _, cleaned, _ = clean(lambda m, x: m.weight @ x.transpose(1, 2) + m.bias[:, None])
    linear = next(iter(cleaned.graph.find_nodes(op="call_function", target=aten.linear.default)))
    assert [str(x) for x in linear.all_input_nodes] == ["x", "weight"]
    assert linear.meta["type"].shape[-1] == OUTER
    assert aten.matmul.default not in calls(cleaned)


def test_a_product_from_the_left_over_other_axes_stays() -> None:
    _, cleaned, _ = clean(lambda m, x: m.weight @ x[..., None])
    assert aten.linear.default not in calls(cleaned)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x @ m.weight.t(),
        lambda m, x: x @ m.weight.permute(1, 0),
        lambda m, x: torch.addmm(m.bias, x.reshape(-1, INNER), m.weight.transpose(1, 0)).reshape(-1, x.shape[1], OUTER),
        lambda m, x: torch.mm(x.reshape(-1, INNER), m.weight.t()).view(x.shape[0], x.shape[1], OUTER),
        lambda m, x: nn.functional.linear(x, m.weight, m.bias),
    ],
)
def test_a_matrix_that_lies_right_stays(function: Callable) -> None:
    program, cleaned, _ = clean(function)
    assert calls(cleaned) == [aten.linear.default]
    assert get_tensor(cleaned.module, "weight") is get_tensor(program.module, "weight")
    assert cleaned.transposed == ()


def test_the_shared_tensor_is_not_written_to() -> None:
    program = load(Module(conv1d), example_inputs={"x": torch.randn(2, 3, INNER)})
    before = get_tensor(program.module, "stored")
    copy = before.detach().clone()
    Clean().run(program.clone(), Context())
    assert get_tensor(program.module, "stored") is before
    assert torch.equal(before, copy)


def test_the_note_survives_a_copy_and_the_disk(tmp_path) -> None:
    _, cleaned, _ = clean(conv1d)
    assert cleaned.clone().transposed == cleaned.transposed
    serialize.save(cleaned, tmp_path)
    assert serialize.load(tmp_path).transposed == cleaned.transposed
    before = cleaned.digest()
    cleaned.transposed = ()
    assert cleaned.digest() != before


def test_a_second_run_keeps_the_note() -> None:
    _, cleaned, _ = clean(conv1d)
    assert Clean().run(cleaned, Context()) is False
    assert cleaned.transposed == ("model/stored",)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: (x @ m.stored) @ m.stored.t(),
        lambda m, x: (x @ m.stored) @ m.stored[:, :].t() + x,
        lambda m, x: x @ m.stored + m.stored.sum(0),
        lambda m, x: torch.addmm(m.bias, x.view(-1, INNER), m.stored) + m.stored[0],
    ],
)
def test_a_matrix_with_another_reader_stays(function: Callable) -> None:
    program, cleaned, report = clean(function)
    assert cleaned.transposed == ()
    assert get_tensor(cleaned.module, "stored") is get_tensor(program.module, "stored")
    assert "stored is also read in the other orientation" in {miss.reason for miss in report.misses}


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, x: torch.addmm(m.bias, x.view(-1, INNER), m.stored, alpha=2), "it scales the product"),
        (lambda m, x: torch.addmm(m.stored[:1], x.view(-1, INNER), m.stored), "what it adds is no vector"),
    ],
)
def test_an_addmm_that_is_no_linear_says_why(function: Callable, reason: str) -> None:
    _, cleaned, report = clean(function)
    assert aten.addmm.default in calls(cleaned)
    assert any(reason in miss.reason for miss in report.misses)


def test_products_of_activations_are_not_looked_at() -> None:
    _, cleaned, report = clean(lambda m, x: x @ x.transpose(1, 2))
    assert aten.matmul.default in calls(cleaned)
    assert report.misses == ()


def opt(module: Module, x: torch.Tensor) -> torch.Tensor:
    """OPT's feed-forward: flattened before the norm, unflattened behind the residual sum."""
    flat = x.reshape(-1, INNER)
    hidden = nn.functional.linear(module.norm(flat), module.weight, module.bias)
    return (flat + nn.functional.linear(torch.relu(hidden) * 2, module.stored)).view(x.shape)


def test_flattened_tokens_are_laid_out_again() -> None:
    _, cleaned, _ = clean(opt)
    assert not {aten.view.default, aten.reshape.default} & set(calls(cleaned))
    assert all(n.meta["type"].rank == 3 for n in cleaned.graph.nodes if n.op == "call_function")


def test_a_view_moves_behind_what_is_token_wise_and_no_further() -> None:
    """The sum over all rows needs the flat view."""
    _, cleaned, _ = clean(lambda m, x: torch.relu(x.reshape(-1, INNER)).cumsum(0))
    assert calls(cleaned) == [aten.relu.default, aten.reshape.default, aten.cumsum.default]


def test_rows_in_different_orders_stay_flat() -> None:
    _, cleaned, report = clean(lambda m, x: x.reshape(-1, INNER) + x.transpose(0, 1).reshape(-1, INNER))
    assert calls(cleaned).count(aten.reshape.default) == 2
    assert [miss.reason for miss in report.misses] == ["its operands are not views of one layout"]


def test_a_norm_over_all_rows_stays_flat() -> None:
    module = Module(lambda m, x: nn.functional.layer_norm(x.reshape(6, INNER), (6, INNER)))
    program = load(module, example_inputs={"x": torch.randn(2, 3, INNER)})
    context = Context()
    Clean().run(program, context)
    assert [miss.reason for miss in context[CleanReport].misses] == ["it normalizes rows together"]


def test_views_ask_for_no_layout() -> None:
    """A view of what a rule has turned into a strided value must not fail."""
    _, cleaned, _ = clean(lambda m, x: (x.transpose(0, 1).clone() @ m.stored).view(-1, OUTER))
    assert aten.view.default not in calls(cleaned)

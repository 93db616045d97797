"""What clean removes, merges and folds; the numbers stay and a second run changes nothing."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from bitlower.frontends import load
from bitlower.ir import Program
from bitlower.passes import Context, Contract
from bitlower.passes.canonical.clean import Clean, CleanReport

aten = torch.ops.aten


def targets(program: Program) -> Counter[object]:
    return Counter(node.target for node in program.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bert_stays_what_it_is(bert, batches, run, attention: str) -> None:
    model, program = bert(attention=attention)
    cleaned = run(program, Clean())
    assert len(cleaned.graph.nodes) < len(program.graph.nodes)
    for batch in [*batches(2), *batches(1, rows=1, length=17, padding=0)]:
        with torch.no_grad():
            expected = model(**batch)["logits"]
        found = cleaned(**batch)["logits"]
        if attention == "sdpa":
            assert torch.equal(found, expected)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_both_forms_of_attention_end_as_one(bert, run) -> None:
    """The graphs differ in the mask's form and views alone."""
    counts = [targets(run(bert(attention=a)[1], Clean())) for a in ("sdpa", "eager")]
    for count in counts:
        assert count[aten.scaled_dot_product_attention.default] == 2
        assert count[aten.softmax.int] == count[aten.matmul.default] == 0
        assert (count[aten.linear.default], count[aten.layer_norm.default]) == (2 * 6 + 2, 5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_second_run_changes_nothing(bert, attention: str, run) -> None:
    _, program = bert(attention=attention)
    work = program.clone()
    assert Clean().run(work, Context()) is True
    work.recompile()
    before = work.digest()
    assert Clean().run(work, Context()) is False
    work.recompile()
    assert work.digest() == before


class Noise(nn.Module):
    """Every no-op that clean knows, beside its twin that does something."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.linear(x)
        same = (x.to(torch.float32).clone()[:, 0:].expand(-1, -1).view(x.shape).type_as(x) + 0) * 1 / 1.0 - 0
        return same, x * 2, x / 2, x.to(torch.float64), x[:, 1:], x[:, ::2], x[:-1], x.expand(2, -1, -1), x + 1


def test_no_ops_go_and_their_twins_stay(run) -> None:
    program = load(Noise(), example_inputs={"x": torch.randn(3, 4)})
    cleaned = run(program, Clean())
    inputs = {"x": torch.randn(5, 4)}
    before, after = program(**inputs), cleaned(**inputs)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert cleaned.graph.output_node().args[0][0].target is aten.linear.default
    count = targets(cleaned)
    assert count[aten.clone.default] == 0
    assert count[aten.add.Tensor] == count[aten.expand.default] == count[aten.mul.Tensor] == 1
    assert count[aten.div.Tensor] == 1
    assert not count[aten.reshape.default] + count[aten.view.default] + count[aten.type_as.default]
    assert count[aten.slice.Tensor] == 3


class Slices(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x[: x.shape[0]] * 2, x[:, :4] * 3, x[:, :3] * 4, x[: x.shape[0] - 1] * 5


def test_slices_that_cut_nothing_off_go(run) -> None:
    """Also where the end is the length itself, symbolic or not."""
    program = load(Slices(), example_inputs={"x": torch.randn(3, 4)})
    cleaned = run(program, Clean())
    assert targets(cleaned)[aten.slice.Tensor] == 2
    x = torch.randn(5, 4)
    assert all(torch.equal(cleaned(x=x)[name], value) for name, value in program(x=x).items())


class Repeats(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(4.0))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first, second = torch.sin(x * 2) + self.table, torch.sin(x * 2) + self.table
        return first @ second.transpose(0, 1), torch.sin(x * 2.0), torch.sin(x * 3), torch.cos(x * 2)


def test_equal_computations_are_done_once(run) -> None:
    """A factor of 2 and one of 2.0 are told apart: dtypes may hang on it."""
    program = load(Repeats(), example_inputs={"x": torch.randn(3, 4)})
    cleaned = run(program, Clean())
    before, after = (targets(p) for p in (program, cleaned))
    assert (before[aten.sin.default], after[aten.sin.default]) == (4, 3)
    assert (before[aten.mul.Tensor], after[aten.mul.Tensor]) == (5, 3)
    assert (before[aten.add.Tensor], after[aten.add.Tensor]) == (2, 1)
    x = torch.randn(5, 4)
    assert all(torch.equal(cleaned(x=x)[name], value) for name, value in program(x=x).items())


class Random(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.rand_like(x) - torch.rand_like(x)


def test_random_numbers_are_drawn_as_often_as_before(run) -> None:
    program = load(Random(), example_inputs={"x": torch.randn(3, 4)})
    cleaned = run(program, Clean())
    assert targets(cleaned)[aten.rand_like.default] == 2
    assert bool(cleaned(x=torch.randn(3, 4))["output"].any())


def test_a_clean_program_is_left_alone() -> None:
    program = load(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), example_inputs={"input": torch.randn(3, 4)})
    assert Clean().run(program, Context()) is False


def test_what_did_not_match_is_told() -> None:
    class Explicit(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ x.transpose(-1, -2)).softmax(-1) * x[..., :1]

    program, context = load(Explicit(), example_inputs={"x": torch.randn(3, 4, 5)}), Context()
    Clean().run(program, context)
    (miss,) = context[CleanReport].misses
    assert (miss.rule, miss.node, miss.reason) == ("attention", "softmax", "its result is not used by one matmul alone")


def test_it_promises_exact_numbers() -> None:
    assert Clean.contract is Contract.EXACT

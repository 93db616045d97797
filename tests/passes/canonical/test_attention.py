"""Opening and folding attention, against torch's own operator."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import fx, nn
from torch.nn.functional import scaled_dot_product_attention

from bitlower.frontends import load
from bitlower.ir import BitlowerError, Program, TensorType
from bitlower.ir.dataflow import ATTENTION, MATMUL, SOFTMAX, is_context, is_scores, value_root
from bitlower.passes.canonical._attention import fold_attention, fold_repeated_heads
from bitlower.passes.quantizers._expand_attention import expand_attention

aten = torch.ops.aten
Attend = Callable[..., torch.Tensor]


class Attention(nn.Module):
    """Calls ``function(q, k, v, mask)`` on queries of 8 channels."""

    def __init__(self, function: Attend) -> None:
        super().__init__()
        self.function = function

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        torch._check(q.shape[-1] == 8)
        return self.function(q, k, v, mask)


def example(mask: str, rank: int = 4) -> dict[str, torch.Tensor]:
    """Queries of 5 tokens, keys of 7, the last 2 keys of the second sequence padded."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"q": (2, 3, 5, 8), "k": (2, 3, 7, 8), "v": (2, 3, 7, 6)}
    inputs = {name: torch.randn(size[4 - rank :], generator=generator) for name, size in sizes.items()}
    keep = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    keep[1, :, :, 5:] = False
    masks = {"bool": keep, "float": torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)}
    return inputs | ({"mask": masks[mask]} if mask else {})


_traced: dict[object, Program] = {}


def trace(function: Attend, inputs: dict[str, torch.Tensor]) -> Program:
    key = (function, *((name, value.shape, value.dtype) for name, value in inputs.items()))
    if key not in _traced:
        _traced[key] = load(Attention(function), example_inputs=inputs)
    return _traced[key].clone()


@cache
def sdpa(**options: object) -> Attend:
    return lambda q, k, v, mask: scaled_dot_product_attention(q, k, v, mask, **options)


def explicit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores if mask is None else scores + mask
    return scores.softmax(-1) @ v


def find(program: Program, targets: frozenset[object]) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.target in targets]


def expand(program: Program) -> Program:
    result = program.clone()
    for node in find(result, ATTENTION):
        expand_attention(node)
    result.recompile()
    return result


def fold(program: Program) -> tuple[Program, list[fx.Node | str]]:
    result = program.clone()
    answers = [fold_attention(node) for node in find(result, SOFTMAX)]
    result.recompile()
    return result, answers


@pytest.mark.parametrize(
    ("mask", "scale", "rank"),
    [("", None, 4), ("", 0.25, 3), ("bool", None, 4), ("float", None, 4), ("float", 0.25, 4)],
)
def test_opened_attention_computes_the_same(mask: str, scale: float | None, rank: int) -> None:
    inputs = example(mask, rank)
    program = trace(sdpa(scale=scale), inputs)
    opened = expand(program)
    assert len(find(opened, MATMUL)) == 2
    assert not find(opened, ATTENTION)
    doubles = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    expected = sdpa(scale=scale)(doubles["q"], doubles["k"], doubles["v"], doubles.get("mask"))
    torch.testing.assert_close(opened(**inputs)["output"].double(), expected, atol=1e-6, rtol=1e-5)


def test_opened_attention_has_true_types_and_keeps_the_place() -> None:
    inputs = example("bool")
    program = trace(sdpa(), inputs)
    (node,) = find(program, ATTENTION)
    node.meta["path"] = "layer.0.attention"
    opened = expand(program)
    values: dict[fx.Node, torch.Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            values[n] = super().run_node(n)
            return values[n]

    Recorder(opened.module).run(*inputs.values())
    new = [n for n in opened.graph.nodes if n.meta.get("path") == "layer.0.attention"]
    assert len(new) == 7
    sizes: dict[object, int] = {}
    for n in new:
        assert n.meta["type"].dtype == values[n].dtype
        for name, size in zip(n.meta["type"].shape, values[n].shape, strict=True):
            assert sizes.setdefault(name, size) == size if isinstance(name, str) else name == size


@pytest.mark.parametrize("mask", ["bool", "float"])
def test_a_row_that_is_masked_throughout_gives_zeros_as_in_the_operator(mask: str) -> None:
    inputs = example(mask)
    inputs["mask"][0] = False if mask == "bool" else -math.inf
    program = trace(sdpa(), inputs)
    found, expected = expand(program)(**inputs)["output"], program(**inputs)["output"]
    assert torch.equal(found[0], torch.zeros(3, 5, 6))
    torch.testing.assert_close(found, expected)


def test_dropout_cannot_be_opened() -> None:
    program = trace(sdpa(dropout_p=0.5), example(""))
    with pytest.raises(BitlowerError, match=r"attention with dropout .*%scaled_dot_product_.*test_attention.py"):
        expand(program)


def test_a_symbolic_head_width_is_an_error() -> None:
    class Bare(nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return scaled_dot_product_attention(q, q, q)

    with pytest.raises(BitlowerError, match="symbolic width q_3 has no fixed scale"):
        expand(load(Bare(), example_inputs={"q": torch.randn(2, 3, 5, 8)}))


@pytest.mark.parametrize("rank", [3, 4])
def test_a_causal_attention_hides_later_keys(rank: int) -> None:
    """Five queries, seven keys: both are counted from the start, as in torch's own operator."""
    inputs = example("", rank)
    opened = expand(trace(sdpa(is_causal=True), inputs))
    doubles = {name: value.double() for name, value in inputs.items()}
    expected = sdpa(is_causal=True)(doubles["q"], doubles["k"], doubles["v"], None)
    torch.testing.assert_close(opened(**inputs)["output"].double(), expected, atol=1e-6, rtol=1e-5)
    first = inputs["v"].select(-2, 0)
    torch.testing.assert_close(opened(**inputs)["output"].select(-2, 0), first)


def grouped(groups: int, heads: int = 6) -> dict[str, torch.Tensor]:
    inputs = example("bool")
    generator = torch.Generator().manual_seed(1)
    inputs["q"] = torch.randn(2, heads, 5, 8, generator=generator)
    return inputs | {"k": torch.randn(2, groups, 7, 8, generator=generator), "v": torch.randn(2, groups, 7, 6)}


def trace_grouped(function: Attend, inputs: dict[str, torch.Tensor]) -> Program:
    """With numbers of heads and groups that are fixed, as a model's are."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        for tensor, name in ((q, "q"), (k, "k"), (v, "v")):
            torch._check(tensor.shape[1] == inputs[name].shape[1])
        return function(q, k, v, mask)

    return trace(attend, inputs)


def repeated(x: torch.Tensor, times: int) -> torch.Tensor:
    """As transformers does it."""
    batch, groups, length, width = x.shape
    return x[:, :, None].expand(batch, groups, times, length, width).reshape(batch, groups * times, length, width)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_grouped_queries_are_opened_with_repeated_keys(groups: int) -> None:
    inputs = grouped(groups)
    opened = expand(trace_grouped(sdpa(enable_gqa=True), inputs))
    keys, values = (repeated(inputs[name].double(), 6 // groups) for name in ("k", "v"))
    expected = scaled_dot_product_attention(inputs["q"].double(), keys, values, inputs["mask"])
    torch.testing.assert_close(opened(**inputs)["output"].double(), expected, atol=1e-6, rtol=1e-5)


def test_groups_that_do_not_divide_the_heads_are_an_error() -> None:
    program = trace_grouped(sdpa(enable_gqa=True), grouped(2))
    (node,) = find(program, ATTENTION)
    node.args[1].meta["type"] = TensorType(torch.float32, ("batch", 4, "keys", 8))
    with pytest.raises(BitlowerError, match="4 heads of keys do not fit 6 query heads"):
        expand_attention(node)


def fold_heads(program: Program) -> tuple[Program, list[fx.Node | str | None]]:
    result = program.clone()
    answers = [fold_repeated_heads(node) for node in find(result, ATTENTION)]
    result.recompile()
    return result, answers


@pytest.mark.parametrize("how", [repeated, lambda x, times: x.repeat_interleave(times, 1)])
def test_keys_are_read_unrepeated(how: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
    inputs = grouped(2)
    program = trace_grouped(lambda q, k, v, mask: scaled_dot_product_attention(q, how(k, 3), how(v, 3), mask), inputs)
    folded, (answer,) = fold_heads(program)
    assert isinstance(answer, fx.Node)
    (node,) = find(folded, ATTENTION)
    assert [value_root(value).op for value in node.args[:3]] == ["placeholder"] * 3
    assert [value.meta["type"].shape[1] for value in node.args[:3]] == [6, 2, 2]
    assert node.kwargs["enable_gqa"] is True
    assert torch.equal(folded(**inputs)["output"], program(**inputs)["output"])


def tiled(x: torch.Tensor, times: int) -> torch.Tensor:
    """The heads in another order: all of them, and all of them again."""
    batch, groups, length, width = x.shape
    return x[:, None].expand(batch, times, groups, length, width).reshape(batch, groups * times, length, width)


def test_keys_that_are_repeated_otherwise_stay() -> None:
    inputs = grouped(2)
    program = trace_grouped(lambda q, k, v, m: scaled_dot_product_attention(q, tiled(k, 3), tiled(v, 3), m), inputs)
    assert fold_heads(program)[1] == [None]
    program = trace_grouped(lambda q, k, v, m: scaled_dot_product_attention(q, repeated(k, 3), tiled(v, 3), m), inputs)
    assert fold_heads(program)[1] == ["only one of keys and values is repeated"]


@pytest.mark.parametrize("mask", ["", "float"])
def test_explicit_attention_folds_into_one_operator(mask: str) -> None:
    inputs = example(mask)
    program = trace(explicit, inputs)
    folded, answers = fold(program)
    assert [isinstance(a, fx.Node) for a in answers] == [True]
    assert len(find(folded, ATTENTION)) == 1
    assert not find(folded, MATMUL | SOFTMAX)
    torch.testing.assert_close(folded(**inputs)["output"], program(**inputs)["output"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mask", ["", "float"])
@pytest.mark.parametrize("scale", [None, 3.0])
def test_folding_undoes_opening(mask: str, scale: float | None) -> None:
    inputs = example(mask)
    program = trace(sdpa(scale=scale), inputs)
    folded, _ = fold(expand(program))
    (before,), (after,) = find(program, ATTENTION), find(folded, ATTENTION)
    assert [a.name for a in after.all_input_nodes] == [a.name for a in before.all_input_nodes]
    assert after.kwargs["scale"] == pytest.approx(scale or 8**-0.5)
    assert torch.equal(folded(**inputs)["output"], program(**inputs)["output"])


def test_opening_undoes_folding() -> None:
    """The scale is a product, as the model has it: the numbers agree to the bit."""
    inputs = example("float")
    program = trace(lambda q, k, v, mask: (q @ k.transpose(-1, -2) * 0.5 + mask).softmax(-1) @ v, inputs)
    again = expand(fold(program)[0])
    plain = {aten._safe_softmax.default: aten.softmax.int}
    assert [plain.get(n.target, n.target) for n in again.graph.nodes] == [n.target for n in program.graph.nodes]
    assert torch.equal(again(**inputs)["output"], program(**inputs)["output"])


def test_eager_bert_folds_once_a_layer(bert, batches) -> None:
    _, program = bert(attention="eager")
    folded, answers = fold(program)
    assert all(isinstance(a, fx.Node) for a in answers)
    assert len(find(folded, ATTENTION)) == 2
    (batch,) = batches(1)
    torch.testing.assert_close(folded(**batch)["logits"], program(**batch)["logits"], atol=1e-6, rtol=1e-5)


def returns_probabilities(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: object) -> tuple[torch.Tensor, ...]:
    probs = (q @ k.transpose(-1, -2)).softmax(-1)
    return probs @ v, probs


@pytest.mark.parametrize(
    ("function", "rank", "reason"),
    [
        (returns_probabilities, 4, "its result is not used by one matmul alone"),
        (lambda q, k, v, m: v.transpose(-1, -2) @ (q @ k.transpose(-1, -2)).softmax(-1).transpose(-1, -2), 4, "alone"),
        (lambda q, k, v, m: (q @ k.transpose(-1, -2)).softmax(-2) @ v, 4, "not over the last of four axes"),
        (lambda q, k, v, m: (q @ k.transpose(-1, -2)).softmax(-1) @ v, 3, "not over the last of four axes"),
        (lambda q, k, v, m: (q @ k.transpose(-1, -2)).tanh().softmax(-1) @ v, 4, "not one scaled and masked matmul"),
        (lambda q, k, v, m: (q @ k.relu()[:, :, :, :7]).softmax(-1) @ v[..., :7, :], 4, "not transposed"),
        (lambda q, k, v, m: (q @ k.transpose(-1, -2) + v[0, 0, :, 0]).softmax(-1) @ v, 4, "mask has not four axes"),
    ],
)
def test_what_does_not_fold_says_why(function: Attend, rank: int, reason: str) -> None:
    inputs = example("", rank)
    if "transposed" in reason:
        inputs["k"] = torch.randn(2, 3, 8, 7)
    program = trace(function, inputs)
    folded, (answer,) = fold(program)
    assert isinstance(answer, str)
    assert reason in answer
    assert [n.target for n in folded.graph.nodes] == [n.target for n in program.graph.nodes]


def test_scores_that_are_read_elsewhere_stay() -> None:
    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: object) -> tuple[torch.Tensor, ...]:
        scores = q @ k.transpose(-1, -2)
        return scores.softmax(-1) @ v, scores

    _, (answer,) = fold(trace(function, example("")))
    assert answer == "its scores are not one scaled and masked matmul"


@pytest.mark.parametrize("mask", ["", "float", "bool"])
def test_scores_and_context_are_told_apart(mask: str) -> None:
    opened = expand(trace(sdpa(), example(mask)))
    first, second = find(opened, MATMUL)
    assert (is_scores(first), is_context(first)) == (True, False)
    assert (is_scores(second), is_context(second)) == (False, True)
    (fused,) = find(trace(sdpa(), example(mask)), ATTENTION)
    assert (is_scores(fused), is_context(fused)) == (False, True)


def test_a_product_far_from_a_softmax_is_neither() -> None:
    program = trace(lambda q, k, v, m: (q @ k.transpose(-1, -2)).relu() @ v, example(""))
    assert [(is_scores(n), is_context(n)) for n in find(program, MATMUL)] == [(False, False)] * 2

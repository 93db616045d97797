"""What every node of a trace carries, and what a trace no longer holds."""

from __future__ import annotations

import re

import pytest
import torch
from torch import fx, nn

from bitlower.frontends import load
from bitlower.frontends._failure import explain_failure
from bitlower.frontends._trace import check_replay, evaluating
from bitlower.ir import BitlowerError, CheckError, Program
from bitlower.ir.observe import observe


@pytest.fixture(scope="module")
def program(saved) -> Program:
    return load(saved["classifier"])


@pytest.mark.parametrize("shape", [(1, 5), (3, 17)])
def test_types_are_the_shapes_and_dtypes_of_a_run(program, inputs, shape: tuple[int, int]) -> None:
    """Each symbolic dimension has one size all over the graph; products and sums of them are worked out."""
    sizes = dict(zip(("batch", "sequence"), shape, strict=True))
    checked = 0

    def compare(node: fx.Node, value: object, batch: object) -> None:
        nonlocal checked
        if isinstance(value, torch.Tensor):
            kind = node.meta["type"]
            expected = tuple(d if isinstance(d, int) else eval(d, {}, sizes) for d in kind.shape)
            assert (value.dtype, tuple(value.shape)) == (kind.dtype, expected), node
            checked += 1
        else:
            assert "type" not in node.meta

    observe(program, list(program.graph.nodes)[:-1], [inputs(*shape)], compare)
    assert checked > 80


def test_paths_are_modules_of_the_model(saved, program) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(saved["classifier"])
    modules = {name for name, _ in model.named_modules()}
    aten = torch.ops.aten
    weights = {aten.linear.default: 1, aten.layer_norm.default: 2, aten.embedding.default: 0}
    for node in program.graph.nodes:
        if node.op == "call_function" and "path" in node.meta:
            assert node.meta["path"] in modules
        if node.target in weights:
            assert node.args[weights[node.target]].target == f"{node.meta['path']}.weight"


def test_sources_are_lines_of_the_model(program) -> None:
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    sources = [n.meta["source"] for n in nodes if "source" in n.meta]
    assert len(sources) > 0.9 * len(nodes)
    assert all(re.match(r"[\w.]+\.py:\d+: \S", source) for source in sources)
    query = next(n for n in nodes if n.meta.get("path", "").endswith("layer.0.attention.self.query"))
    assert re.match(r"modeling_bert\.py:\d+: .*self\.query\(", query.meta["source"])


def test_nothing_but_plain_operators_is_left(program) -> None:
    assert {n.op for n in program.graph.nodes} == {"placeholder", "get_attr", "call_function", "output"}
    names = {str(n.target) for n in program.graph.nodes}
    assert not [name for name in names if "dropout" in name or "assert" in name or "guard" in name or "detach" in name]
    for node in program.graph.nodes:
        assert set(node.meta) <= {"type", "path", "source"}


def test_the_graph_takes_any_sequence_up_to_the_model_s_longest(program, inputs) -> None:
    assert program(**inputs(2, 24))["logits"].shape == (2, 3)


class Baked(nn.Module):
    """Gives another result than its trace at other shapes."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"output": x + 1}


def test_a_trace_that_computes_something_else_is_found() -> None:
    program = load(Baked(), example_inputs={"x": torch.randn(3, 4)})
    inputs = {"x": torch.randn(5, 4)}
    check_replay(program, {"output": inputs["x"] + 1}, inputs, "Baked")
    with pytest.raises(CheckError, match=r"the trace of Other gives another 'output' for x \[5, 4\]"):
        check_replay(program, {"output": inputs["x"] + 1.01}, inputs, "Other")


def test_nan_in_a_trace_is_found() -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"output": x * float("nan")}

    program = load(Broken(), example_inputs={"x": torch.randn(3, 4)})
    inputs = {"x": torch.randn(5, 4)}
    with pytest.raises(CheckError, match="gives another 'output'"):
        check_replay(program, {"output": inputs["x"] + 1}, inputs, "Broken")


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (ValueError("\n  first\nsecond"), r"^Model cannot be traced at test_trace\.py:\d+: .*: first$"),
        (KeyError(), r"^Model cannot be traced at test_trace\.py:\d+: .*: KeyError$"),
        (BitlowerError("as it is"), r"^as it is$"),
    ],
)
def test_failures_are_explained_in_one_line(failure: Exception, message: str) -> None:
    def fail() -> None:
        with explain_failure("Model"):
            raise failure

    with pytest.raises(BitlowerError, match=message):
        fail()


def test_evaluation_mode_ends_with_its_block_even_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[1].eval()
    modes: list[bool] = []

    def fail() -> None:
        with evaluating(model):
            modes.extend(module.training for module in model.modules())
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert not any(modes)
    assert [module.training for module in model.modules()] == [True, True, False, False]


def test_control_flow_operators_are_refused() -> None:
    class Cond(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, lambda v: v * 2, lambda v: v + 1, (x,))

    with pytest.raises(BitlowerError, match=r"the model calls cond.*, which is no plain operator"):
        load(Cond(), example_inputs={"x": torch.randn(3, 4)})

"""The text form read back: the same text, and the same numbers once the tensors are there."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import fx, nn

from bitlower.ir import BitlowerError, Level, Program, TensorType, ValueSpec
from bitlower.ir.parse import parse
from bitlower.ir.types import Length
from bitlower.ir.verifier import verify
from bitlower.passes import Context, PassManager, parse_pipeline

FAMILIES = ("bert", "llama", "gemma", "gpt2", "opt", "gpt-neox", "phi")
PIPELINES = (
    "quantize{scheme=W8A8-full},calibrate{activations=minmax}",
    "quantize{scheme=W8A8-token},calibrate,lower-integer",
    "quantize{scheme=W8A8},calibrate{activations=minmax},lower-integer,fuse",
    "quantize{scheme=W4A16-g16}",
)
Family = Callable[[str], Program]
Feed = Callable[..., dict[str, torch.Tensor]]


def check(program: Program, batch: dict[str, torch.Tensor]) -> None:
    tensors = {name.removeprefix("model/"): tensor.detach() for name, tensor in program.tensors()}
    read = parse(str(program), tensors)
    assert str(read) == str(program)
    verify(read)
    with torch.no_grad():
        found, expected = read(**batch), program(**batch)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert str(parse(str(program))).count("\n") == str(program).count("\n")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_read_back(name: str, family: Family, feed: Feed) -> None:
    check(family(name), feed(family(name)))


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_quantizers_and_kernels_are_read_back(name: str, pipeline: str, family: Family, feed: Feed) -> None:
    program, batch = family(name), feed(family(name))
    check(PassManager(parse_pipeline(pipeline)).run(program, Context([batch])), batch)


def test_what_is_no_value_of_a_tensor_is_read_too(exported: Program) -> None:
    exported = exported.clone()
    exported.lengths = {"sequence": Length(2, 64, 2), "batch": Length(), "past": Length(maximum=8)}
    read = parse(str(exported))
    assert (read.level, read.task, read.inputs, read.outputs) == (
        exported.level, exported.task, exported.inputs, exported.outputs,
    )  # fmt: skip
    assert read.lengths == exported.lengths


ARGUMENTS = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(1 << 63), (1 << 63) - 1), st.floats(allow_nan=False),
        st.text(max_size=8),
        st.sampled_from([torch.int64, torch.bfloat16, torch.strided, torch.preserve_format, torch.device("cpu")]),
        st.builds(slice, st.integers(0, 9), st.none(), st.integers(1, 3)),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)  # fmt: skip


@given(args=st.lists(ARGUMENTS, max_size=3), options=st.dictionaries(st.sampled_from(["a", "dim", "x_1"]), ARGUMENTS))
def test_arguments_of_every_kind(args: list[object], options: dict[str, object]) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    kind = TensorType(torch.float32, ("batch", 2))
    x.meta["type"] = kind
    call = graph.call_function(torch.ops.aten.relu.default, (x, *args), options)  # type: ignore[arg-type]
    graph.output((call,))
    spec = ValueSpec("x", kind)
    program = Program({"model": fx.GraphModule(nn.Module(), graph)}, Level.FLOAT, "", (spec,), (spec,))
    [node] = [n for n in parse(str(program)).graph.nodes if n.op == "call_function"]
    assert list(node.args[1:]) == args
    assert dict(node.kwargs) == options


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("program level=float", "program level=flat", "line 1: .*'flat' is not a valid Level"),
        ("program level", "programme level", "line 1: .*neither a program, a size, a graph"),
        ("= relu(", "= rellu(", "line 4: .*unknown operator 'rellu'"),
        ("(%x)", "(%y)", "line 4: .*'y'"),
        ("(%x)", "(@y)", "line 4: .*'y'"),
        ("(%x)", "(%x", r"line 4: .*',' is missing"),
        ("(%x)", "(matmul)", "line 4: .*matmul is no constant"),
        ("float32[batch, 2] = relu", "flot32[batch, 2] = relu", "line 4: .*flot32"),
        ("  return", "  retrn", "line 5: .*neither a tensor, a node, nor `return`"),
    ],
)
def test_a_line_that_is_wrong_is_named(old: str, new: str, message: str) -> None:
    text = (
        "program level=float task=\n# a comment\ngraph model(x: float32[batch, 2]) -> (y: float32[batch, 2]):\n"
        "  %y: float32[batch, 2] = relu(%x)\n  return (%y)\n"
    )
    parse(text)
    assert old in text
    with pytest.raises(BitlowerError, match=message):
        parse(text.replace(old, new, 1))


def test_a_text_without_a_program_is_refused() -> None:
    with pytest.raises(BitlowerError, match="a program begins with"):
        parse("")

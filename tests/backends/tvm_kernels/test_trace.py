"""What a library computes wrongly in one kernel is found; what rounding turns over is not taken for it.

A Program in PyTorch with something changed stands in for the library, so that nothing is compiled here.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import fx

from bitlower.backends.artifact.rounding import Rounding
from bitlower.backends.tvm_kernels.relax.precision import half_values
from bitlower.backends.tvm_kernels.verify.agreement import TURNED, Agreement
from bitlower.backends.tvm_kernels.verify.trace import KernelComparison, trace
from bitlower.frontends import load
from bitlower.ir import CheckError, Program, get_tensor, kernels, set_tensor
from bitlower.passes import Context, PassManager, parse_pipeline

SIZES = {"vocab_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}
tokens = runpy.run_path(str(Path(__file__).with_name("programs.py")))["tokens"]


@cache
def fused(name: str, scheme: str) -> Program:
    """A tiny random model, calibrated and fused."""
    torch.manual_seed(0)
    if name == "bert":
        config = transformers.BertConfig(**SIZES, max_position_embeddings=64)
        program = load(spread(transformers.BertModel(config)))
    else:
        config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=64)
        program = load(spread(transformers.LlamaForCausalLM(config)), task="text-generation")
    passes = parse_pipeline(f"clean,quantize{{scheme={scheme}}},calibrate{{weights=minmax}},lower-integer,fuse")
    return PassManager(passes).run(program, Context(calibration=[tokens(program, 3, 9, seed) for seed in (1, 2)]))


def spread(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.2 if parameter.dim() == 1 else 0.1) * torch.randn(parameter.shape)
    return model.eval()


def compare(program: Program, library: Program, batches: int = 2, activations: str = "float32") -> list[Agreement]:
    """What is found where ``library``, traced, stands in for the library of ``program``."""
    comparison = KernelComparison(program, activations)
    for seed in range(batches):
        batch = tokens(program, 3, 9, seed=seed + 5)
        with torch.no_grad():
            found = library(**batch) if activations == "float32" else in_halves(program, library, batch)
            comparison.run(program.arguments(batch), found)
    return list(comparison.agreements.values())


class Halves(fx.Interpreter):
    """A library in whose graph the values of some nodes, by name, are float16."""

    def __init__(self, module: fx.GraphModule, names: set[str]) -> None:
        super().__init__(module)
        self.names = names

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        narrow = n.name in self.names and isinstance(value, torch.Tensor)
        return value.half().float() if narrow or n.target is torch.ops.aten.embedding.default else value


def in_halves(program: Program, library: Program, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {node.name for node in half_values(program)}
    values = Halves(library.module, names).run(*library.arguments(batch), enable_io_processing=False)
    return {spec.name: value for spec, value in zip(library.outputs, values, strict=True)}


def problems(program: Program, library: Program, activations: str = "float32") -> list[str]:
    return [row.problem() for row in compare(program, library, activations=activations) if row.problem()]


CASES = [
    ("bert", "W8A8"),
    ("bert", "W8A8-full"),
    ("bert", "W8A8-token"),
    ("llama", "W4A16-g16"),
    ("llama", "W8A8-token"),
]


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_the_program_itself_has_no_faults(name: str, scheme: str) -> None:
    """Every code, and every value of a kernel that is no expression, is compared."""
    program = fused(name, scheme)
    traced = trace(program)
    assert [spec.name for spec in program.outputs] == [s.name for s in traced.outputs if not s.name.startswith("%")]
    rows = compare(program, traced)
    assert not any(row.problem() for row in rows)
    assert all(row.worst == row.excess == 0 and row.codes == row.equal for row in rows)
    read = {node for node in program.graph.nodes if kernels.is_kernel(node) and node.target is kernels.fused_linear}
    assert read <= {row.node for row in rows if row.compared}


Change = Callable[[fx.Node, fx.GraphModule], None]


def own(node: fx.Node, module: fx.GraphModule, argument: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Let a kernel read a changed copy of a stored tensor, which other kernels may read too."""
    found = kernels.arguments(node)[argument]
    set_tensor(module, f"changed.{argument}", change(get_tensor(module, found.target).detach().clone()))
    with module.graph.inserting_before(node):
        fresh = module.graph.get_attr(f"changed.{argument}")
    fresh.meta = dict(found.meta)
    names = [a.name for a in node.target._schema.arguments]
    position = names.index(argument)
    if position < len(node.args):
        node.args = (*node.args[:position], fresh, *node.args[position + 1 :])
    else:
        node.kwargs = {**node.kwargs, argument: fresh}


def scale_of_one_row(node: fx.Node, module: fx.GraphModule) -> None:
    def change(scale: torch.Tensor) -> torch.Tensor:
        scale[5] *= 1.02
        return scale

    own(node, module, "weight_scale", change)


def one_code(node: fx.Node, module: fx.GraphModule) -> None:
    def change(codes: torch.Tensor) -> torch.Tensor:
        codes[3, 7] += 1 if codes[3, 7] < 5 else -1
        return codes

    own(node, module, "weight", change)


def zero_point(node: fx.Node, module: fx.GraphModule) -> None:
    own(node, module, "x_zero_point", lambda zero: zero + 1)


def no_bias(node: fx.Node, module: fx.GraphModule) -> None:
    own(node, module, "bias", torch.zeros_like)


def output_zero_point(node: fx.Node, module: fx.GraphModule) -> None:
    own(node, module, "out_zero_point", lambda zero: zero - 1)


def residual_of_another_layer(node: fx.Node, module: fx.GraphModule) -> None:
    """The same value of the block before, where there is one, else another of its type."""
    wanted = kernels.arguments(node)["residual"]
    other = next(
        found
        for found in module.graph.nodes
        if found is not wanted and found.op == "call_function" and found.meta.get("type") == wanted.meta["type"]
    )
    node.replace_input_with(wanted, other)


def swapped_parts(node: fx.Node, module: fx.GraphModule) -> None:
    first, second = (kernels.read_outputs(node)[part, "codes"] for part in (0, 1))
    first.args, second.args = second.args, first.args


FAULTS = [
    ("bert", "W8A8", "fused_linear", "weight_scale", scale_of_one_row),
    ("bert", "W8A8", "fused_linear", "weight", one_code),
    ("bert", "W8A8", "fused_linear", "x_zero_point", zero_point),
    ("bert", "W8A8", "fused_linear", "bias", no_bias),
    ("bert", "W8A8", "fused_linear", "residual", residual_of_another_layer),
    ("bert", "W8A8", "fused_norm", "out_zero_point", output_zero_point),
    ("bert", "W8A8-full", "fused_linear", "weight_scale", scale_of_one_row),
    ("bert", "W8A8-full", "fused_linear", "x_zero_point", zero_point),
    ("bert", "W8A8-full", "fused_linear", "merged_n", swapped_parts),
    ("bert", "W8A8-full", "fused_attention", "out_zero_point", output_zero_point),
    ("bert", "W8A8-token", "fused_linear", "bias", no_bias),
    ("llama", "W4A16-g16", "fused_linear", "weight_scale", scale_of_one_row),
    ("llama", "W4A16-g16", "fused_linear", "weight", one_code),
    ("llama", "W8A8-token", "fused_linear", "weight_scale", scale_of_one_row),
]


@pytest.mark.parametrize(("name", "scheme", "kind", "argument", "change"), FAULTS)
def test_a_fault_in_one_kernel_is_found_there_and_nowhere_else(
    name: str, scheme: str, kind: str, argument: str, change: Change
) -> None:
    program = fused(name, scheme)
    library = trace(program)
    held = [n for n in library.graph.nodes if kernels.is_kernel(n) and kernels.kind(n) == kind]
    node = [n for n in held if kernels.arguments(n).get(argument) is not None][1]
    change(node, library.module)
    library.recompile()
    for activations in ("float32", "float16"):
        found = problems(program, library, activations)
        assert len(found) == 1
        assert found[0].startswith(f"%{node.name} ({kind} in ")


def test_a_value_of_another_shape_or_not_finite_is_refused() -> None:
    program = fused("bert", "W8A8")
    batch = tokens(program, 2, 4)
    with torch.no_grad():
        values = trace(program)(**batch)
    name = next(key for key, value in values.items() if key.startswith("%") and value.is_floating_point())
    for wrong in (values[name][:1], values[name] * torch.nan):
        with pytest.raises(CheckError, match=r"gives another shape, or numbers that are not finite"):
            KernelComparison(program).run(program.arguments(batch), values | {name: wrong})


def agreement(*, hidden: bool = False) -> Agreement:
    return Agreement(next(n for n in fused("bert", "W8A8").graph.nodes if kernels.is_kernel(n)), hidden)


@pytest.mark.parametrize(("x", "code", "right"), [(2.5, 3, True), (2.499, 3, True), (2.48, 3, False), (2.5, 4, False)])
def test_codes_at_ties_may_be_either(x: float, code: int, right: bool) -> None:
    """With 255 steps, float arithmetic explains 0.005 of one."""
    rounding = Rounding(torch.tensor([x, -1e6, 1e6]), torch.tensor(1.0), torch.tensor(0.0), -128, 127)
    row = agreement()
    row.add_codes([rounding], torch.tensor([code, -128, 127]))
    assert (not row.problem()) == right
    assert row.equal == 2 + (code == round(x))


def test_either_of_what_a_tie_before_it_makes_is_right() -> None:
    near, far = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 2.0, 3.5, 4.0])
    for given, right in ((near, True), (far, True), (torch.tensor([1.0, 2.0, 3.2, 4.0]), False)):
        row = agreement()
        row.add_value([near, far], given)
        assert (not row.problem()) == right


def test_roundings_that_nobody_sees_may_turn_over_little() -> None:
    value = torch.ones(10, 100)
    for count, right in ((TURNED * 1000 - 1, True), (TURNED * 1000 + 1, False)):
        given = value.clone()
        given.view(-1)[: int(count)] = 2
        row, strict = agreement(hidden=True), agreement()
        row.add_value([value], given)
        strict.add_value([value], given)
        assert (not row.problem()) == right
        assert "of what it gives is wrong; a value is 1 of its row off" in strict.problem()


def test_scales_that_are_chosen_are_compared() -> None:
    row = agreement()
    row.add_qparam("scale", torch.tensor([0.1]), torch.tensor([0.1001]))
    assert "a scale of a token is 0.001 off" in row.problem()
    row = agreement()
    row.add_qparam("zero_point", torch.tensor([3.0]), torch.tensor([4.0]))
    assert not row.problem()
    row.add_qparam("zero_point", torch.tensor([3.0]), torch.tensor([5.0]))
    assert "a zero point of a token is 2 off" in row.problem()

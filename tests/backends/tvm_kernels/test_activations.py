"""Which values of a program become float16, and that those which cannot are found before a library is written."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from torch import fx

pytest.importorskip("tvm", reason="the extra tvm is not installed")

from bitlower.backends.tvm_kernels import Target, TvmKernels, compile_program, export
from bitlower.backends.tvm_kernels.library.files import _signature
from bitlower.backends.tvm_kernels.relax.precision import activations_of, check_range, half_values, typed
from bitlower.backends.tvm_kernels.spec.target import TARGETS
from bitlower.backends.tvm_kernels.verify.trace import trace
from bitlower.ir import BitlowerError, Program, get_tensor, kernels, set_tensor

aten = torch.ops.aten
_HELPERS = runpy.run_path(str(Path(__file__).with_name("programs.py")))
fused, tokens = _HELPERS["fused"], _HELPERS["tokens"]
MODELS = [
    *((name, "W4A16-g16") for name in ("llama", "gpt2", "bert")),
    pytest.param("neox", "W4A16-g16", marks=pytest.mark.nightly),
    *((name, scheme) for name in ("llama", "bert") for scheme in ("W8A8", "W8A8-token")),
]
NORMS = {aten.rms_norm.default, aten.layer_norm.default, kernels.fused_norm}


def maker(node: fx.Node) -> fx.Node:
    """The operator that made the value of ``node``, through views of it."""
    while node.target in (aten.reshape.default, aten.transpose.int, aten.slice.Tensor):
        node = node.args[0]
    taken = kernels.output_of(node)
    return node if taken is None else taken[0]


def has_residual(node: fx.Node) -> bool:
    return kernels.is_kernel(node) and kernels.arguments(node).get("residual") is not None


@pytest.mark.parametrize(("model", "scheme"), MODELS)
def test_the_residual_stream_and_all_that_is_no_input_of_a_kernel_is_float32(model: str, scheme: str) -> None:
    program = fused(model, scheme, layers=1)
    found = half_values(program)
    for node in program.graph.nodes:
        made = maker(node)
        if has_residual(made) and made.target not in NORMS:
            assert node not in found
        if made.target in (aten.add.Tensor, aten.embedding.default, kernels.fused_embedding, aten.cos.default):
            assert node not in found
        if kernels.is_kernel(node):
            for name, value in kernels.arguments(node).items():
                if isinstance(value, fx.Node) and name not in ("x", "residual", "factor", "query", "key", "value"):
                    assert value not in found, name
                if name == "residual":
                    assert value not in found or maker(value).target in NORMS
    assert not {node for node in found if not node.meta.get("type", program.inputs[-1].type).is_float}


@pytest.mark.parametrize(("model", "scheme"), MODELS)
def test_what_linears_and_attention_read_is_float16(model: str, scheme: str) -> None:
    """But for inputs that are codes, and the output that a pooler reads."""
    program = fused(model, scheme, layers=1)
    found, outputs = half_values(program), program.graph.output_node().args[0]
    wanted = []
    for node in program.graph.nodes:
        if node.target in (kernels.fused_attention, aten.scaled_dot_product_attention.default):
            wanted += node.args[:3]
        if node.target is aten.linear.default or node.target is kernels.fused_linear:
            wanted.append(node.args[0])
    floats = [node for node in wanted if node.meta["type"].is_float and "select" not in node.name]
    assert len(floats) >= 3
    assert [node.name for node in floats if node not in found and node not in outputs] == []


def test_a_cache_is_float16_and_other_inputs_and_outputs_keep_their_types() -> None:
    program = fused("llama", "W4A16-g16", layers=1)
    made = typed(program, "float16")
    for spec, before in zip((*made.inputs, *made.outputs), (*program.inputs, *program.outputs), strict=True):
        cached = spec.name.startswith(("past_key_values", "present"))
        assert spec.type.dtype == (torch.float16 if cached else before.type.dtype)
        assert (spec.name, spec.type.shape) == (before.name, before.type.shape)
    assert typed(program, "float32").inputs == program.inputs
    library = compile_program(program, Target.CUDA)
    assert (library.inputs, library.outputs) == (made.inputs, made.outputs)
    written = _signature(library)["functions"]["main"]["inputs"]
    assert {spec["dtype"] for spec in written if spec["name"].startswith("past_key_values")} == {"float16"}


def test_reading_inner_values_changes_none() -> None:
    program = fused("gpt2", "W4A16-g16", layers=1)
    names = [{node.name for node in half_values(made)} for made in (program, trace(program))]
    assert names[0] == names[1]


def scaled(program: Program, factor: float) -> Program:
    """The program with a gain of its first norm that is larger."""
    made = program.clone()
    node = next(node for node in made.graph.nodes if node.target is aten.rms_norm.default)
    gain = node.args[2]
    set_tensor(made.module, "large", factor * get_tensor(made.module, gain.target).detach())
    gain.target = "large"
    return made


def test_what_float16_does_not_hold_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TvmKernels, "resolve", lambda self: Target.CUDA)
    program = fused("llama", "W4A16-g16", layers=1)
    batch = tokens(program, 2, 5)
    check_range(scaled(program, 1e3), [batch])
    with pytest.raises(BitlowerError, match=r"%rms_norm\w* in model\.layers\.0.* reaches .*e\+05, and float16 ends at"):
        export(scaled(program, 1e5), tmp_path, batches=[batch], target="cuda", unrun=True)
    assert not list(tmp_path.iterdir())


def test_the_option() -> None:
    assert [activations_of(target) for target in TARGETS.values()] == ["float32", "float32", "float16", "float32"]
    assert activations_of(Target.CUDA, "float32") == "float32"
    for target in ("host", "llvm"):
        with pytest.raises(
            BitlowerError, match=f"activations of float16 are for the target cuda; kernels for {target}"
        ):
            TvmKernels(target, activations="float16")
    with pytest.raises(BitlowerError, match="for the target cuda; kernels for opencl have none"):
        compile_program(fused("llama", "W4A16-g16", layers=1), Target.OPENCL, activations="float16")
    with pytest.raises(BitlowerError, match="activations is float61; it takes one of auto, float16, float32"):
        TvmKernels("cuda", activations="float61")

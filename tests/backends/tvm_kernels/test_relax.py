"""Whole fused programs as libraries for the CPU: the numbers are those of the program that PyTorch runs."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from torch import fx

pytest.importorskip("tvm", reason="the extra tvm is not installed")

from tvm import tirx

from bitlower.backends.artifact.resolved import resolved_tensors
from bitlower.backends.tvm_kernels.library.compile import compile_program
from bitlower.backends.tvm_kernels.relax.builder import Frame
from bitlower.backends.tvm_kernels.relax.pipeline import lowering
from bitlower.backends.tvm_kernels.relax.program import build_module, fuse_module
from bitlower.backends.tvm_kernels.spec.operators import OperatorLog
from bitlower.backends.tvm_kernels.spec.target import Target
from bitlower.backends.tvm_kernels.target import host_target, tvm_target
from bitlower.ir import BitlowerError, Level, ValueSpec, kernels

_HELPERS = runpy.run_path(str(Path(__file__).with_name("programs.py")))
TOLERANCE, fused, tokens, worst, next_step = (
    _HELPERS[name] for name in ("TOLERANCE", "fused", "tokens", "worst", "next_step")
)


@pytest.mark.parametrize(
    "scheme",
    [
        "W8A8-full",
        "W4A8-g16-upeg3",
        *(pytest.param(name, marks=pytest.mark.nightly) for name in ("W8A8", "W8A8-token")),
    ],
)
def test_an_encoder_gives_the_numbers_of_its_program(scheme: str) -> None:
    """One library for batches of any shape."""
    program = fused("bert", scheme)
    library = compile_program(program)
    for rows, length in ((2, 7), (1, 1), (4, 12)):
        assert worst(program, library, tokens(program, rows, length, seed=5)) < TOLERANCE


def test_every_function_is_compiled_as_free_of_aliases() -> None:
    """TVM goes by the mark of one function for all of a module: without it sums of kernels stay in memory."""
    device = tvm_target(host_target())
    module = lowering(host_target())(fuse_module(fused("bert", "W8A8"), host_target(), device))
    functions = {name.name_hint: f for name, f in module.functions_items() if isinstance(f, tirx.PrimFunc)}
    assert "shape_func" in functions
    assert [name for name, function in functions.items() if not function.attrs["tirx.noalias"]] == []


def test_groups_that_legalize_cut_are_one_product_again() -> None:
    program = fused("bert", "W8A8-peg4", "legalize,")
    assert any("columns" in node.kwargs for node in program.graph.nodes)
    assert worst(program, compile_program(program), tokens(program, 2, 7, seed=5)) < TOLERANCE


@pytest.mark.parametrize(
    ("model", "scheme"),
    [
        ("llama", "W4A16-g16"),
        ("gpt2", "W8A8-full"),
        ("neox", "W8A8-token"),
        *(pytest.param(model, "W8A8", marks=pytest.mark.nightly) for model in ("llama", "gemma")),
    ],
)
def test_a_decoder_reads_a_text_and_goes_on_from_its_cache(model: str, scheme: str) -> None:
    program = fused(model, scheme)
    library = compile_program(program)
    batch = tokens(program, 2, 5)
    assert worst(program, library, batch) < TOLERANCE
    assert worst(program, library, next_step(program, batch, library(**batch))) < TOLERANCE


@pytest.mark.parametrize(
    ("model", "scheme"), [("bert", "W8A8-full"), ("bert", "W8A8-token"), ("bert", "W12A12-full"), ("llama", "W8A8")]
)
def test_codes_between_kernels_are_equal(model: str, scheme: str) -> None:
    """Every kernel's codes become outputs: equal but for ties, which are one step apart.

    Of 12 bits there are no kernels but expressions alone.
    """
    program = fused(model, scheme).clone()
    codes = [node for node in program.graph.nodes if is_codes(node)]
    output = program.graph.output_node()
    output.args = (tuple(codes),)
    program.outputs = tuple(ValueSpec(node.name, node.meta["type"]) for node in codes)
    program.recompile()
    batch = tokens(program, 3, 9, seed=7)
    with torch.no_grad():
        expected, found = program(**batch), compile_program(program)(**batch)
    assert len(codes) >= 8
    pairs = [(expected[name].int(), found[name].int()) for name in expected]
    assert max(int((first - second).abs().max()) for first, second in pairs) <= 1
    unequal = sum(int((first != second).sum()) for first, second in pairs)
    assert unequal <= 1e-3 * sum(first.numel() for first, _ in pairs)


def is_codes(node: fx.Node) -> bool:
    taken = kernels.output_of(node)
    return taken is not None and taken[1].name == "codes"


def test_kernels_have_schedules_and_no_float_weights() -> None:
    """A linear of a layer is one function of its spec, and equal layers share it."""
    module = build_module(fused("bert", "W8A8"))
    families = [
        str(f.attrs["bitlower.family"]) for f in module.functions.values() if "bitlower.family" in (f.attrs or {})
    ]
    assert {family: families.count(family) for family in set(families)} == {
        "linear": 5,  # merged queries, keys and values; two with a residual; one with GELU; the pooler
        "norm": 2,  # with codes, and the last one without
        "attention": 1,
    }


def test_any_cpu_computes_the_same() -> None:
    program = fused("llama", "W4A16-g16")
    batch = tokens(program, 2, 5)
    assert worst(program, compile_program(program, Target.LLVM), batch) < TOLERANCE


def test_programs_that_cannot_be_built_are_refused() -> None:
    program = fused("bert", "W8A8").clone()
    program.level = Level.INTEGER
    with pytest.raises(BitlowerError, match="made of fused programs; this is integer; run the pass `fuse`"):
        build_module(program)
    program = fused("bert", "W8A8").clone()
    program.graphs["second"] = program.module
    with pytest.raises(BitlowerError, match="one graph, the program has model, second"):
        build_module(program)
    program = fused("bert", "W8A8").clone()
    norm = next(node for node in program.graph.nodes if node.target is torch.ops.aten.layer_norm.default)
    norm.target, norm.args = torch.ops.aten.erfinv.default, norm.args[:1]
    with pytest.raises(BitlowerError, match=r"%layer_norm_4 .*: there is no converter for aten\.erfinv\.default"):
        build_module(program)


def test_a_manifest_names_the_scales_that_kernels_hold() -> None:
    """As the program before fusion has them, but for merged layers."""
    before, after = (resolved_tensors(fused("bert", "W8A8-full", last=last)) for last in ("", ",fuse"))
    scales = {row["tensor"]: {key: row.get(key) for key in ("scale_shape", "scale", "zero_point")} for row in before}
    kept = [row for row in after if row["tensor"] in scales]
    assert len(kept) > 30
    assert all({key: row.get(key) for key in scales[row["tensor"]]} == scales[row["tensor"]] for row in kept)
    assert sum("query_key_value" in row["tensor"] for row in after if row not in kept) == 2


def test_dimensions_are_sums_and_products_of_names() -> None:
    frame = Frame(fused("bert", "W8A8").module, None, Target.LLVM, OperatorLog())
    assert frame.dim("past + sequence").a.same_as(frame.dim("past"))
    assert int(frame.dim(7)) == 7
    for text in ("max(a, b)", "a +", "a ** 2"):
        with pytest.raises(BitlowerError, match="no expression that a library can compute"):
            frame.dim(text)

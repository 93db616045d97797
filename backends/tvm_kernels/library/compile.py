"""A Program as a library in memory."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import tvm

from bitlower.backends.tvm_kernels.internals import compiling_cuda_by
from bitlower.backends.tvm_kernels.library.fatbin import compile_source
from bitlower.backends.tvm_kernels.library.library import Code, Library, StagedLibrary, staged_library
from bitlower.backends.tvm_kernels.relax.pipeline import lowering
from bitlower.backends.tvm_kernels.relax.precision import AUTO, activations_of, typed
from bitlower.backends.tvm_kernels.relax.program import fuse_module, open_sizes
from bitlower.backends.tvm_kernels.spec.functions import MAIN, functions_of
from bitlower.backends.tvm_kernels.spec.operators import OperatorLog
from bitlower.backends.tvm_kernels.spec.target import Target
from bitlower.backends.tvm_kernels.target import host_target, tvm_target
from bitlower.ir import Program


def compile_program(
    program: Program,
    target: Target | None = None,
    *,
    sizes: Mapping[str, int] | None = None,
    activations: str = AUTO,
) -> Library | StagedLibrary:
    """The Program as a library in memory.

    Args:
        program: at level fused or float, with one graph.
        target: whose code; None: the best CPU that this processor is.
        sizes: symbolic dimensions that are known already, by name. Where all are, a library for CUDA takes its
            launches as one graph.
        activations: the dtype of the floats that linears multiply and of what lies between kernels: ``float32``,
            ``float16`` (see :mod:`bitlower.backends.tvm_kernels.relax.precision`), or ``auto``, the second for CUDA
            alone.

    Raises:
        BitlowerError: see :func:`~bitlower.backends.tvm_kernels.relax.program.build_module`.
        CheckError: a function for a GPU has no schedule, or its code does not compile.
    """
    target = target or host_target()
    device = tvm_target(target)
    operators = OperatorLog()
    module = fuse_module(program, target, device, sizes, activations, operators)
    parts = functions_of(program)
    static = not any(open_sizes(module[name]) for name in parts)
    graphs = {"relax.backend.use_cuda_graph": target.graphs and static}
    compiler = compiling_cuda_by(compile_source) if target.kind == "cuda" else nullcontext()
    with tvm.transform.PassContext(opt_level=3, config=graphs), compiler:
        executable = tvm.compile(module, target=device, relax_pipeline=lowering(target))
    code, dtype = Code(executable, target, operators), activations_of(target, activations)
    kinds = {name: typed(part, dtype) for name, part in parts.items()}
    return Library(code, kinds[MAIN]) if MAIN in kinds else staged_library(code, program, kinds)

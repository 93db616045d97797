"""Write the verified library of a Program."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitlower.backends import _folder
from bitlower.backends._config import write_config
from bitlower.backends._manifest import write_manifest
from bitlower.backends.tvm_kernels._activations import AUTO, activations_of, check_range
from bitlower.backends.tvm_kernels._spec import HALF, Target
from bitlower.backends.tvm_kernels._tvm import check_pins, require_tvm
from bitlower.ir import Batch, BitlowerError, Level, Program, kernels, nearest

if TYPE_CHECKING:
    from bitlower.backends.tvm_kernels._verification import Verification

BACKEND = "tvm-kernels"
PACKAGES = ("torch", "transformers", "apache-tvm", "apache-tvm-ffi")
HOST = "host"
TARGETS = (HOST, str(Target.LLVM), str(Target.VNNI), str(Target.CUDA))


@dataclass(frozen=True)
class Options:
    """How a Program is compiled.

    Args:
        target: whose code: ``llvm`` for any CPU of this architecture, ``llvm-avx512-vnni`` for processors like this
            one, ``host``, the best of them that this processor runs, or ``cuda`` for NVIDIA GPUs.
        unrun: write a library for GPUs on a machine that has none: it is compared with nothing. Its self-test expects
            what the Program gives, so that ``verify`` compares where the GPU is.
        activations: ``float16`` or ``float32``, what linears of floats multiply and what lies between kernels (see
            :mod:`bitlower.backends.tvm_kernels._activations`), or ``auto``: float16 for ``cuda``, which alone has it.

    Raises:
        BitlowerError: an unknown target or dtype, or one that the target has no kernels for.
    """

    target: str = HOST
    unrun: bool = False
    activations: str = AUTO

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise BitlowerError(f"unknown target {self.target!r}", hint=nearest(str(self.target), TARGETS))
        if not isinstance(self.unrun, bool):
            raise BitlowerError(f"unrun is true or false, not {self.unrun!r}")
        if self.unrun and self.target != Target.CUDA:
            raise BitlowerError(f"a library for {self.target} is run where it is written", hint="leave out `unrun`")
        activations_of(self.target, self.activations)

    def resolve(self) -> Target:
        """The target that it stands for.

        Raises:
            BitlowerError: TVM is not installed, or this machine does not run such code, or does not compile it.
        """
        require_tvm()
        if self.target == Target.CUDA:
            self._check_cuda()
            return Target.CUDA
        from bitlower.backends.tvm_kernels._cpu_frame import host_target

        best = host_target()
        target = best if self.target == HOST else Target(self.target)
        if target not in (best, Target.LLVM):
            raise BitlowerError(
                f"this processor does not run {target}, and what was not run is not verified", hint=f"take {best}"
            )
        return target

    def _check_cuda(self) -> None:
        from bitlower.backends.tvm_kernels._cuda_library import require_nvcc
        from bitlower.backends.tvm_kernels._library import has_device

        require_nvcc()
        if not (self.unrun or has_device(Target.CUDA)):
            raise BitlowerError(
                "this machine has no GPU that TVM finds, and what was not run is not verified",
                hint="export where there is one, or say `unrun: true`, and `bitlower verify` where there is one",
            )


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Args:
        files: bytes by name.
        target: whose code it is.
        operators: how many kernels of each kind the Program has.
        verification: how the library compares with the Program; without kernels and outputs if it was not run.
    """

    files: dict[str, int]
    target: str
    operators: dict[str, int]
    verification: Verification

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        form = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return form | {"verification": self.verification.to_dict()}


def check_level(level: Level) -> None:
    """See that a program at ``level`` is made of kernels.

    Raises:
        BitlowerError: it is not; the hint says which pass is missing.
    """
    if level is not Level.FUSED:
        missing = "`fuse`" if level is Level.INTEGER else "`lower-integer` and `fuse`"
        raise BitlowerError(
            f"libraries are made of fused programs; this is {level}", hint=f"end the passes with {missing}"
        )


def check_host(
    *, target: str = Options.target, unrun: bool = Options.unrun, activations: str = Options.activations
) -> None:
    """See that this machine has what an export needs: TVM, compilers, a processor or GPU that runs the target.

    Raises:
        BitlowerError: it lacks one of them.
    """
    Options(target, unrun, activations).resolve()
    from tvm.support import cc

    if cc.get_cc() is None:
        raise BitlowerError("no C compiler is found, which links libraries", hint="install gcc or clang")


def check_program(
    program: Program,
    *,
    target: str = Options.target,
    unrun: bool = Options.unrun,
    activations: str = Options.activations,
) -> None:
    """See that every operator has a converter; for programs of any level, as far as their operators stay.

    Raises:
        BitlowerError: TVM is not installed, or one has none: it is named with its module.
    """
    require_tvm()
    from bitlower.backends.tvm_kernels._relax_aten import check_operator

    Options(target, unrun, activations)
    for node in program.graph.nodes:
        if node.op == "call_function":
            check_operator(node)


def export(
    program: Program,
    folder: Path,
    *,
    batches: Sequence[Batch],
    target: str = Options.target,
    unrun: bool = Options.unrun,
    activations: str = Options.activations,
    provenance: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Compile ``program`` into the existing ``folder`` and compare what lies there with it on ``batches``.

    Args:
        program: at level fused.
        folder: exists.
        batches: real inputs for the verification.
        target: see :class:`Options`.
        unrun: see :class:`Options`.
        activations: see :class:`Options`.
        provenance: for the manifest: seeds, hashes of data, and what else the caller knows; plain data.

    Raises:
        BitlowerError: TVM is not installed, an option is wrong, there is no batch, the program cannot be compiled, or
            float16 does not hold what it computes.
        CheckError: the library does not compute what the program does.
    """
    options = Options(target, unrun, activations)
    check_pins()
    check_level(program.level)
    resolved = options.resolve()
    from bitlower.backends.tvm_kernels._files import RESERVED, write_library
    from bitlower.backends.tvm_kernels._library import has_device
    from bitlower.backends.tvm_kernels._verify import BATCHES, expect, verify_export

    dtype = activations_of(resolved, activations)
    if dtype == HALF:
        check_range(program, batches[:BATCHES])
    files = [*write_library(program, folder, resolved, dtype), write_config(program, folder, BACKEND)]
    files += _folder.write_assets(program, folder, RESERVED)
    if has_device(resolved):
        verification = verify_export(program, folder, batches, target=resolved, activations=dtype)
    else:
        verification = expect(program, batches, target=resolved, activations=dtype)
    verification.write(folder)
    write_manifest(
        program,
        folder,
        backend=BACKEND,
        packages=PACKAGES,
        backend_options={"target": str(resolved), "activations": dtype},
        provenance=provenance,
    )
    kinds = Counter(kernels.kind(node) for node in program.graph.nodes if kernels.is_kernel(node))
    return ExportReport(_folder.sizes(folder, files), str(resolved), dict(sorted(kinds.items())), verification)

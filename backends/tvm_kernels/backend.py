"""Write the verified library of a Program."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from bitlower.backends.artifact import folder as artifact_folder
from bitlower.backends.artifact.card import Usage, write_card
from bitlower.backends.artifact.config import write_config
from bitlower.backends.artifact.manifest import check_artifact, write_manifest
from bitlower.backends.artifact.stages import part_batches, parts_of
from bitlower.backends.base import Backend, KernelTime
from bitlower.backends.sizes import weights_only
from bitlower.backends.tvm_kernels.library.library import Library, StagedLibrary, has_device
from bitlower.backends.tvm_kernels.pins import check_pins, require_tvm
from bitlower.backends.tvm_kernels.relax.precision import activations_of, check_range
from bitlower.backends.tvm_kernels.spec.base import HALF
from bitlower.backends.tvm_kernels.spec.sizes import LibrarySizes
from bitlower.backends.tvm_kernels.spec.target import Target, find_target
from bitlower.backends.tvm_kernels.verify.artifact import ArtifactReport, verify_artifact
from bitlower.backends.tvm_kernels.verify.timing import kernel_times
from bitlower.ir import Batch, BitlowerError, Level, Program

if TYPE_CHECKING:
    from bitlower.backends.tvm_kernels.verify.record import Verification

PACKAGES = ("torch", "transformers", "apache-tvm", "apache-tvm-ffi")
HOST = "host"
TargetName = Literal["host", "llvm", "llvm-avx512-vnni", "cuda"]
Activations = Literal["auto", "float16", "float32"]


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Args:
        files: bytes by name.
        target: whose code it is.
        operators: what became of the Program's operators: ``calls`` of kernels by family, the operators that were
            ``compiled`` as kernels, and those in ``float``, by reason.
        notes: why operators run in float, a line for each reason.
        verification: how the library compares with the Program; without kernels and outputs if it was not run.
    """

    files: dict[str, int]
    target: str
    operators: dict[str, Any]
    notes: tuple[str, ...]
    verification: Verification

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        form = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        form |= {"notes": list(self.notes), "verification": self.verification.to_dict()}
        return form | {"headline": self.verification.headline()}


@dataclass(frozen=True)
class TvmKernels(Backend):
    """Libraries of low-bit kernels that TVM generates, verified against the Program."""

    name: ClassVar[str] = "tvm-kernels"
    levels: ClassVar[frozenset[Level]] = frozenset({Level.FLOAT, Level.FUSED})
    target: TargetName = "host"
    """Whose code: ``llvm`` for any CPU of this architecture, ``llvm-avx512-vnni`` for CPUs with AVX512-VNNI, ``host``,
    the best of them that this processor runs, or ``cuda`` for NVIDIA GPUs."""
    unrun: bool = False
    """Write a library for GPUs on a machine that has none: it is compared with nothing. Its self-test expects what the
    Program returns, so that ``verify`` compares where the GPU is."""
    activations: Activations = "auto"
    """``float16`` or ``float32``, what linears of floats multiply and what lies between kernels (see
    :mod:`bitlower.backends.tvm_kernels.relax.precision`), or ``auto``: float16 for ``cuda``, which alone has it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unrun and self.target != "cuda":
            raise BitlowerError(f"a library for {self.target} is run where it is written", hint="leave out `unrun`")
        activations_of(self._known(), self.activations)

    def _known(self) -> Target:
        """The target, as far as it is known without a look at the processor."""
        return dataclasses.replace(Target.LLVM, name=HOST) if self.target == HOST else find_target(self.target)

    def resolve(self) -> Target:
        """The target that it stands for.

        Raises:
            BitlowerError: TVM is not installed, or this machine does not run such code, or does not compile it.
        """
        require_tvm()
        if self.target == "cuda":
            self._check_cuda()
            return Target.CUDA
        from bitlower.backends.tvm_kernels.target import host_target

        best = host_target()
        target = best if self.target == HOST else self._known()
        if target not in (best, Target.LLVM):
            raise BitlowerError(
                f"this processor does not run {target}, and what was not run is not verified", hint=f"take {best}"
            )
        return target

    def _check_cuda(self) -> None:
        from bitlower.backends.tvm_kernels.library.fatbin import require_nvcc

        require_nvcc()
        if not (self.unrun or has_device(Target.CUDA)):
            raise BitlowerError(
                "this machine has no GPU that TVM finds, and what was not run is not verified",
                hint="export where there is one, or say `unrun: true`, and `bitlower verify` where there is one",
            )

    def check_host(self) -> None:
        """See that this machine has what an export needs: TVM, compilers, a processor or GPU that runs the target.

        Raises:
            BitlowerError: it lacks one of them.
        """
        self.resolve()
        from tvm.support import cc

        if cc.get_cc() is None:
            raise BitlowerError("no C compiler is found, which links libraries", hint="install gcc or clang")

    def check_program(self, program: Program) -> None:
        """See that every operator has a converter; for programs of any level, as far as their operators stay.

        Raises:
            BitlowerError: TVM is not installed, or one has none: it is named with its module; or the program is an
                encoder-decoder that cannot be cut in two, or rounds the input of a convolution whose last axis varies.
        """
        require_tvm()
        parts_of(program)
        from bitlower.backends.tvm_kernels.relax.aten import check_operator

        for node in program.graph.nodes:
            if node.op == "call_function":
                check_operator(node)
        for node, quantizer in program.quantizers():
            width = node.meta["type"].shape[-1] if quantizer.role == "convolution-input" else 0
            if isinstance(width, str):
                raise BitlowerError(
                    f"kernels round rows of one width, and {quantizer.tensor}, the input of a convolution, has {width}",
                    hint="leave the convolution in float with `ignore`, or export it as onnx-qdq",
                )

    def export(
        self, program: Program, folder: Path, batches: Sequence[Batch], provenance: Mapping[str, Any] | None = None
    ) -> ExportReport:
        """Compile ``program`` into the existing ``folder`` and compare what is there with it on ``batches``.

        Raises:
            BitlowerError: TVM is not installed, there is no batch, the program cannot be compiled, or float16 does not
                hold what it computes.
            CheckError: the library does not compute what the program does.
        """
        check_pins()
        self.check_level(program.level)
        resolved = self.resolve()
        from bitlower.backends.tvm_kernels.library.files import RESERVED, write_library
        from bitlower.backends.tvm_kernels.verify.compare import BATCHES, expect, verify_export

        dtype = activations_of(resolved, self.activations)
        if dtype == HALF:
            parts = parts_of(program)
            by_stage = part_batches(parts, batches[:BATCHES])
            for stage, part in parts.items():
                check_range(part, by_stage[stage])
        written, code = write_library(program, folder, resolved, dtype)
        files = [*written, write_config(program, folder, self.name)]
        files += artifact_folder.write_assets(program, folder, RESERVED)
        if has_device(resolved):
            verification = verify_export(program, folder, batches, target=resolved, activations=dtype)
        else:
            verification = expect(program, batches, code, activations=dtype)
        verification.write(folder)
        options = {"target": str(resolved), "activations": dtype}
        files.append(write_card(program, folder, self.usage(program)))
        write_manifest(
            program,
            folder,
            backend=self.name,
            packages=PACKAGES,
            backend_options=options,
            provenance=provenance,
            operators=code.operators.to_dict(),
        )
        notes = code.operators.notes() if program.level is Level.FUSED else ()
        return ExportReport(
            artifact_folder.sizes(folder, files), str(resolved), code.operators.to_dict(), tuple(notes), verification
        )

    @classmethod
    def verify(cls, folder: Path) -> ArtifactReport:
        """Check the library in ``folder``; see :func:`~bitlower.backends.tvm_kernels.verify.artifact.verify_artifact`.

        Raises:
            BitlowerError: TVM is not installed, or the library is code for another processor.
            CheckError: a file is missing or changed, or the library does not compute what it did.
        """
        return verify_artifact(folder)

    @classmethod
    def load(cls, folder: Path) -> Library | StagedLibrary:
        """The library in ``folder``.

        Raises:
            BitlowerError: TVM is not installed, or the library is code for another processor.
            CheckError: a file is missing or changed.
        """
        require_tvm()
        from bitlower.backends.tvm_kernels.library.files import RESERVED, load_library

        check_artifact(folder, RESERVED)
        return load_library(folder)

    @classmethod
    def kernel_times(cls, folder: Path) -> tuple[KernelTime, ...]:
        """What each kernel takes; see :func:`~bitlower.backends.tvm_kernels.verify.timing.kernel_times`.

        Raises:
            BitlowerError: TVM is not installed, or the library is code for another processor or device.
            CheckError: a file is missing or damaged.
        """
        return kernel_times(folder)

    def usage(self, program: Program) -> Usage:
        """With bitlower, and TVM."""
        return dataclasses.replace(super().usage(program), needs="'bitlower[tvm]'", tags=("tvm",))

    def sizes(self, placed: Program) -> LibrarySizes:
        """Bytes of tensors in the library."""
        halves = activations_of(self._known(), self.activations) == HALF
        return LibrarySizes(weights_only(placed), halves)

"""``manifest.json``: what an artifact is made of and by what; and the check of an artifact against it.

An artifact is checked without the Program: every file has the size and the hash that the manifest says, onnxruntime
loads the model and runs as many integer kernels as at export, and on the inputs kept in ``verification.json`` the model
returns what it gave when it was compared with the Program.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitlower.backends.artifact import manifest as artifact_manifest
from bitlower.backends.artifact.json_files import rounded_figures
from bitlower.backends.artifact.report import CheckReport
from bitlower.backends.artifact.selftest import run_selftest
from bitlower.backends.onnx_qdq.runtime.session import read_model, runtime_versions
from bitlower.backends.onnx_qdq.verify.record import Verification
from bitlower.backends.onnx_qdq.verify.runtime_kernels import KernelReport, count_kernels, optimized_model
from bitlower.backends.onnx_qdq.verify.stages import StageSessions
from bitlower.backends.onnx_qdq.write.files import files_in
from bitlower.ir import CheckError, Program

BACKEND = "onnx-qdq"
PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "onnxruntime")


@dataclass(frozen=True, kw_only=True)
class ArtifactReport(CheckReport):
    """A sound artifact.

    Args:
        runtime: the runtime's version and provider here.
        recorded_runtime: those of the export.
        kernels: what the runtime runs here.
        selftest: the cosine of each output to the recorded one.
    """

    runtime: Mapping[str, str]
    recorded_runtime: Mapping[str, str]
    kernels: KernelReport
    selftest: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        form = super().to_dict() | {"kernels": self.kernels.to_dict(), "selftest": rounded_figures(self.selftest)}
        return form | {"headline": self.headline()}

    def headline(self) -> dict[str, Any]:
        """The runtime here, its kernels, and how its outputs agree with the recorded ones."""
        runtime = {"runtime": f"onnxruntime {self.runtime['onnxruntime']}"}
        return runtime | self.kernels.headline() | self.agreement(self.selftest)


def write_manifest(
    program: Program,
    folder: Path,
    *,
    backend_options: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write ``manifest.json`` about all files that lie in ``folder`` now.

    Args:
        program: what was exported.
        folder: the artifact's.
        backend_options: those of the export.
        provenance: seeds, hashes of data, and what else the caller knows; plain data.
    """
    artifact_manifest.write_manifest(
        program,
        folder,
        backend=BACKEND,
        packages=PACKAGES,
        backend_options=backend_options,
        provenance=provenance,
    )


def verify_artifact(folder: Path) -> ArtifactReport:
    """Check an artifact on the disk against what was recorded when it was written.

    Raises:
        BitlowerError: there is no such folder.
        CheckError: a file is missing or changed, the model does not load, or does not compute what it did.
    """
    names = files_in(folder).values()
    files = artifact_manifest.check_artifact(folder, names)
    recorded = Verification.read(folder)
    config = recorded.session_config
    with ExitStack() as stack:
        models = [stack.enter_context(optimized_model(folder / name, config)) for name in names]
        kernels = count_kernels(
            *(read_model(model.path).graph for model in models),
            expected=recorded.kernels.expected,
            expected_low_bit=recorded.kernels.expected_low_bit,
        )
    _check_kernels(kernels, recorded)
    sessions = [model.session for model in models]
    run = sessions[0].run if len(sessions) == 1 else StageSessions(*sessions).run
    return ArtifactReport(
        files=files.count,
        bytes=files.bytes,
        unlisted=files.unlisted,
        runtime=runtime_versions(),
        recorded_runtime=recorded.runtime,
        kernels=kernels,
        selftest=run_selftest(recorded.selftest, run),
        unseen=recorded.unseen.check(run),
        unseen_sizes=recorded.unseen.sizes,
    )


def _check_kernels(kernels: KernelReport, recorded: Verification) -> None:
    """The same runtime must choose the same kernels; another version may differ, and its report says so."""
    same = dict(recorded.runtime) == runtime_versions()
    if same and kernels.low_bit_weights != dict(recorded.kernels.low_bit_weights):
        raise CheckError(
            f"onnxruntime multiplies with the low-bit weights of the model otherwise than at export:"
            f" {dict(kernels.low_bit_weights) or 'in float'}",
            hint="another processor or session option changes what the runtime fuses",
        )
    if same and kernels.integer != dict(recorded.kernels.integer):
        raise CheckError(
            f"onnxruntime runs {kernels.found} integer kernels of the model, {recorded.kernels.found} at export",
            hint="another processor or session option changes what the runtime fuses",
        )

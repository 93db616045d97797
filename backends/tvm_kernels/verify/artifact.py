"""The check of a library on the disk, without its Program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitlower.backends.artifact import manifest as artifact_manifest
from bitlower.backends.artifact.json_files import rounded_figures
from bitlower.backends.artifact.report import CheckReport
from bitlower.backends.artifact.selftest import run_selftest
from bitlower.backends.tvm_kernels.pins import require_tvm
from bitlower.backends.tvm_kernels.verify.calls import compared_calls
from bitlower.backends.tvm_kernels.verify.record import Verification, calls_headline, runtime_words
from bitlower.ir import Batch


@dataclass(frozen=True, kw_only=True)
class ArtifactReport(CheckReport):
    """A sound library.

    Args:
        runtime: the target, and the processor and TVM's version of the export.
        calls: how often one run calls kernels of each family, ``expected`` and ``found``.
        selftest: the cosine of each output to the recorded one.
    """

    runtime: Mapping[str, str]
    calls: Mapping[str, Mapping[str, int]]
    selftest: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        headline = {
            "runtime": runtime_words(self.runtime),
            **calls_headline(self.calls),
            **self.agreement(self.selftest),
        }
        return super().to_dict() | {"selftest": rounded_figures(self.selftest), "headline": headline}


def verify_artifact(folder: Path) -> ArtifactReport:
    """Check a library on the disk against what was recorded when it was written.

    Raises:
        BitlowerError: TVM is not installed, there is no such folder, or the library is code for another processor.
        CheckError: a file is missing or changed, the library does not load, or returns something else than it did.
    """
    require_tvm()
    from bitlower.backends.tvm_kernels.library.files import RESERVED, load_library

    files = artifact_manifest.check_artifact(folder, RESERVED)
    recorded, library = Verification.read(folder), load_library(folder)

    def run(batch: Batch) -> dict[str, Any]:
        return {name: value.numpy() for name, value in library(**batch).items()}

    return ArtifactReport(
        files=files.count,
        bytes=files.bytes,
        unlisted=files.unlisted,
        runtime=dict(recorded.runtime),
        calls=compared_calls(library.code),
        selftest=run_selftest(recorded.selftest, run),
        unseen=recorded.unseen.check(run),
        unseen_sizes=recorded.unseen.sizes,
    )

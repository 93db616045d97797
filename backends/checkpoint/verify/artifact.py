"""The check of a checkpoint on the disk, without its Program."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bitlower.backends.artifact import manifest as artifact_manifest
from bitlower.backends.artifact.folder import CONFIG
from bitlower.backends.artifact.json_files import read_json
from bitlower.backends.artifact.record import FILE
from bitlower.backends.artifact.report import CheckReport
from bitlower.backends.checkpoint.format import find_format, known_formats
from bitlower.backends.checkpoint.skeleton import Skeleton
from bitlower.backends.checkpoint.verify.client import CLIENT, Client, obstacle
from bitlower.backends.checkpoint.verify.compare import Stored, check_weight
from bitlower.backends.checkpoint.verify.record import Verification
from bitlower.ir import CheckError, Level, Program


@dataclass(frozen=True, kw_only=True)
class ArtifactReport(CheckReport):
    """A sound checkpoint.

    Args:
        format: of the packed layers.
        layers: how many were unpacked; their codes, scales and zero points are those of the export.
        codes: how many these are.
        client: what loaded the folder and gave what was recorded at export, or ``not run`` and why.
    """

    format: str
    layers: int
    codes: int
    client: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        runtime = f"{CLIENT} {version(CLIENT)}" if self.client == CLIENT else ""
        return super().to_dict() | {
            "headline": {"runtime": runtime, "packed_layers": self.layers, **self.agreement({})}
        }


def verify_artifact(folder: Path) -> ArtifactReport:
    """Check a checkpoint on the disk against what was recorded when it was written.

    Every file has the hash that the manifest says, and each packed layer, unpacked as ``config.json`` says, has the
    codes, scales and zero points that were compared with the Program. Then transformers loads the folder, where what it
    needs is installed and the model is small enough, and returns what the Program gave.

    Raises:
        BitlowerError: there is no such folder.
        CheckError: a file is missing or changed, a layer does not unpack to what it was, or the client gives something
            else.
    """
    files = artifact_manifest.check_artifact(folder)
    recorded = Verification.read(folder)
    if recorded.format not in known_formats():
        raise CheckError(f"{FILE} in {folder} names the unknown format {recorded.format!r}")
    form, config = find_format(recorded.format), read_json(folder / CONFIG)
    stored = Stored(folder, form, config)
    expected = {row.path: row for row in recorded.layers}
    if set(stored.packed) != set(expected):
        path = min(set(stored.packed) ^ set(expected))
        raise CheckError(f"{path} is packed in the files or in {FILE}, but not in both")
    for path, packed in stored.packed.items():
        for part, digest in check_weight(path, packed, stored.layer(path)).items():
            if expected[path].digests.get(part) != digest:
                raise CheckError(f"the {part.replace('_', ' ')} of {path} are not those of the export")
    codes = sum(row.codes for row in recorded.layers)
    skeleton = Skeleton(
        Program({}, Level.INTEGER, artifact_manifest.read_manifest(folder).program.task, (), (), config)
    )
    reason = obstacle(skeleton, stored.readers)
    return ArtifactReport(
        files=files.count,
        bytes=files.bytes,
        unlisted=files.unlisted,
        format=recorded.format,
        layers=len(expected),
        codes=codes,
        client=reason or CLIENT,
        unseen={} if reason else Client(folder, skeleton).test(recorded.unseen),
        unseen_sizes=recorded.unseen.sizes,
    )

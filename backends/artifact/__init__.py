"""What every artifact's folder holds besides the model: for backends, those of third parties among them."""

from bitlower.backends.artifact.card import Usage, write_card
from bitlower.backends.artifact.config import write_config
from bitlower.backends.artifact.folder import RESERVED, shell, sizes, write_assets
from bitlower.backends.artifact.json_files import read_json, write_json
from bitlower.backends.artifact.manifest import FILE as MANIFEST
from bitlower.backends.artifact.manifest import (
    Manifest,
    add_files,
    check_artifact,
    is_artifact,
    list_files,
    read_manifest,
    write_manifest,
)
from bitlower.backends.artifact.record import FILE as VERIFICATION
from bitlower.backends.artifact.schema import parsed

__all__ = [
    "MANIFEST",
    "RESERVED",
    "VERIFICATION",
    "Manifest",
    "Usage",
    "add_files",
    "check_artifact",
    "is_artifact",
    "list_files",
    "parsed",
    "read_json",
    "read_manifest",
    "shell",
    "sizes",
    "write_assets",
    "write_card",
    "write_config",
    "write_json",
    "write_manifest",
]

"""What every artifact's folder holds besides the model: for backends, those of third parties among them."""

from bitlower.backends.artifact.card import Usage, write_card
from bitlower.backends.artifact.config import write_config
from bitlower.backends.artifact.folder import RESERVED, shell, sizes, write_assets
from bitlower.backends.artifact.json_files import write_json
from bitlower.backends.artifact.manifest import check_artifact, write_manifest

__all__ = [
    "RESERVED",
    "Usage",
    "check_artifact",
    "shell",
    "sizes",
    "write_assets",
    "write_card",
    "write_config",
    "write_json",
    "write_manifest",
]

"""What every artifact's folder holds besides the model: for backends, those of third parties among them."""

from bitlower.backends._config import write_config
from bitlower.backends._folder import RESERVED, shell, sizes, write_assets
from bitlower.backends._json import write_json
from bitlower.backends._manifest import check_artifact, write_manifest

__all__ = [
    "RESERVED",
    "check_artifact",
    "shell",
    "sizes",
    "write_assets",
    "write_config",
    "write_json",
    "write_manifest",
]

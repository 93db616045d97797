"""Check the types of the whole of bitlower: ``python tools/check_types.py``.

mypy knows no mapping of folders to packages, so the folders are linked as the subpackages they are installed as, into
``build/types/bitlower``, and mypy (strict, configured in pyproject.toml) runs there.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def link_packages(root: Path, folder: Path) -> None:
    """Make ``folder/bitlower`` what an install of the checkout ``root`` would be, out of symbolic links."""
    package_dir = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    top = folder / "bitlower"
    top.mkdir(parents=True, exist_ok=True)
    sources = {file.name: file for file in (root / "bitlower").iterdir() if file.suffix in (".py", ".typed")}
    sources |= {name.split(".")[1]: root / path for name, path in package_dir.items() if name.count(".") == 1}
    for link in top.iterdir():
        link.unlink()
    for name, source in sources.items():
        (top / name).symlink_to(source)


def main() -> int:
    """Link, run mypy, and return its exit code."""
    folder = ROOT / "build" / "types"
    link_packages(ROOT, folder)
    return subprocess.call([sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml"], cwd=folder)


if __name__ == "__main__":
    sys.exit(main())

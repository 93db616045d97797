"""Whether another checkout makes the same artifacts of the same recipes: file by file, byte by byte.

    python benchmarks/same_artifacts.py --before CHECKOUT [--recipes minilm-w8a8.yaml ...] [--text FILE]

Each recipe of this checkout's examples is run by both, each in processes of its own that import the checkout in their
folder; ``--text`` is the text that the recipes of SmolLM2 calibrate on. Of JSON files that differ, the keys that do are
told, without times, versions and what machines differ in. Rows are written to ``results/same_artifacts.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _common import show_table, write_result

ROOT = Path(__file__).parents[1]
COMMAND = "python benchmarks/same_artifacts.py --before CHECKOUT --text FILE"
RECIPES = ("minilm-w8a8.yaml", "smollm2-w4.yaml")
PASSING = ("seconds", "time", "version", "memory", "created", "sha256", "platform", "_bytes")
"""Keys whose values follow from the moment, the release or another file; each has one of these in its name."""
ALONE = "times, versions and the like"
"""What is said of a JSON file in which nothing else differs."""


def run(checkout: Path, recipe: str, folder: Path, text: Path | None) -> Path:
    """The artifact of a recipe, made by the code of ``checkout``."""
    shutil.copytree(ROOT / "examples", folder)
    if text:
        shutil.copy(text, folder / "wiki.valid.txt")
    start = [sys.executable, "-c", "from bitlower.tools.cli import command; command()"]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "BITLOWER_TRACES": ""}
    options = ["--quiet", "run", recipe, "--no-cache", "-o", "made"]
    subprocess.run([*start, *options], cwd=folder, env=environment, check=True)
    return folder / "made"


def files(folder: Path) -> dict[str, Path]:
    """All files of an artifact, by the path in it."""
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


def differing(before: Any, after: Any, place: str = "") -> Iterator[str]:
    """The keys at which two JSON documents differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}):
            if not any(word in key for word in PASSING):
                yield from differing(before.get(key), after.get(key), f"{place}.{key}" if place else key)
    elif before != after:
        yield place or "all"


def compare(before: Path, after: Path) -> str:
    """What differs between two files; empty if nothing does."""
    if before.read_bytes() == after.read_bytes():
        return ""
    if before.suffix != ".json":
        return "bytes"
    return ", ".join(differing(json.loads(before.read_text()), json.loads(after.read_text()))) or ALONE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="the other checkout")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--text", type=Path, help="the text that recipes of SmolLM2 calibrate on")
    arguments = parser.parse_args()
    rows = []
    for recipe in arguments.recipes:
        with tempfile.TemporaryDirectory() as temporary:
            sides = [
                files(run(root, recipe, Path(temporary) / name, arguments.text))
                for name, root in (("before", arguments.before.resolve()), ("after", ROOT))
            ]
            for name in sorted({*sides[0], *sides[1]}):
                paths = [side.get(name) for side in sides]
                what = compare(*paths) if all(paths) else "only after" if paths[1] else "only before"
                rows.append({"recipe": recipe, "file": name, "differs": what})
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=arguments.before, capture_output=True, text=True, check=True
    )
    write_result("same_artifacts", COMMAND, {"before": commit.stdout.strip(), "rows": rows})
    show_table(("recipe", "file", "differs"), [list(row.values()) for row in rows])


if __name__ == "__main__":
    main()

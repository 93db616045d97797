"""Whether another checkout makes the same artifacts of the same recipes: file by file, byte by byte.

    python benchmarks/same_artifacts.py --before CHECKOUT [--recipes minilm-w8a8.yaml ...] [--inputs NAME=PATH ...]

Each recipe of this checkout's examples is run by both, in processes of their own that import the checkout;
``--inputs`` are the files and folders that the recipes name and the examples do not hold. Training ends after
``--steps`` steps, ``lkd`` after as many iterations a block. Of JSON files that differ, the keys that do are told,
without times, versions and what machines differ in. Rows are written to ``results/same_artifacts.json``, which keeps
those of other recipes against the same commit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from _common import RESULTS, show_table, write_result

ROOT = Path(__file__).parents[1]
COMMAND = "python benchmarks/same_artifacts.py --before CHECKOUT --inputs NAME=PATH ..."
RECIPES = ("minilm-w8a8.yaml", "smollm2-w4.yaml")
PASSING = ("seconds", "time", "version", "memory", "created", "sha256", "platform", "_bytes")
"""Keys whose values follow from the moment, the release or another file; each has one of these in its name."""
ALONE = "times, versions and the like"
"""What is said of a JSON file in which nothing else differs."""


def run(checkout: Path, recipe: str, folder: Path, inputs: Sequence[Sequence[str]], steps: int) -> Path:
    """The artifact of a recipe, made by the code of ``checkout``."""
    shutil.copytree(ROOT / "examples", folder)
    for name, path in inputs:
        (folder / name).symlink_to(Path(path).resolve())
    shorten(folder / recipe, steps)
    start = [sys.executable, "-c", "from bitlower.tools.cli import command; command()"]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "BITLOWER_TRACES": ""}
    options = ["--quiet", "run", recipe, "--no-cache", "-o", "made"]
    subprocess.run([*start, *options], cwd=folder, env=environment, check=True)
    return folder / "made"


def shorten(recipe: Path, steps: int) -> None:
    """Let ``qat`` end after ``steps`` steps and ``lkd`` after so many iterations; other recipes stay as they are."""
    document = yaml.safe_load(recipe.read_text())
    trained = [pass_ for pass_ in document["passes"] if isinstance(pass_, dict) and {"qat", "lkd"} & {*pass_}]
    for pass_ in trained:
        for name, parameters in pass_.items():
            if name == "lkd":
                parameters["iterations"] = steps
            else:
                parameters.pop("epochs")
                parameters["steps"] = steps
    if trained:
        recipe.write_text(yaml.safe_dump(document, sort_keys=False))


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


def others(commit: str, recipes: Sequence[str]) -> list[dict[str, str]]:
    """The rows against ``commit`` that are known, without those of ``recipes``."""
    path = RESULTS / "same_artifacts.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    return [row for row in known.get("rows", []) if known["before"] == commit and row["recipe"] not in recipes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="the other checkout")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--inputs", nargs="+", default=[], type=lambda said: said.split("=", 1), metavar="NAME=PATH")
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=arguments.before, capture_output=True, text=True, check=True
    ).stdout.strip()
    rows = others(commit, arguments.recipes)
    for recipe in arguments.recipes:
        with tempfile.TemporaryDirectory() as temporary:
            sides = [
                files(run(root, recipe, Path(temporary) / name, arguments.inputs, arguments.steps))
                for name, root in (("before", arguments.before.resolve()), ("after", ROOT))
            ]
            for name in sorted({*sides[0], *sides[1]}):
                paths = [side.get(name) for side in sides]
                what = compare(*paths) if all(paths) else "only after" if paths[1] else "only before"
                rows.append({"recipe": recipe, "file": name, "differs": what})
        write_result("same_artifacts", COMMAND, {"before": commit, "rows": rows})
    show_table(("recipe", "file", "differs"), [list(row.values()) for row in rows])


if __name__ == "__main__":
    main()

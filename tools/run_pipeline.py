"""Run a recipe from a bare checkout, without installing: ``python tools/run_pipeline.py RECIPE -o DIR``."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:1] = [str(Path(__file__).resolve().parents[1])]

from bitlower.tools.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))

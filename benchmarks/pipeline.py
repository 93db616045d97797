"""Seconds a stage of the whole pipeline on all-MiniLM-L6-v2, against the fp32 export alone.

    python benchmarks/pipeline.py

Each side runs in a fresh process with an empty cache: the recipe ``examples/minilm-w8a8.yaml`` (trace, analyze,
quantize, smooth, calibrate on 128 texts of at most 64 tokens, lower, export, verify), and a script that loads, traces
and exports the float model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import MODEL, show_table, write_result

RECIPE = Path(__file__).parents[1] / "examples" / "minilm-w8a8.yaml"
FLOAT = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from latency import export_float
from transformers import AutoModel
from bitlower.frontends.locate import locate
tokens = torch.ones(2, 16, dtype=torch.int64)
batch = {"input_ids": tokens, "attention_mask": tokens, "token_type_ids": tokens * 0}
export_float(AutoModel.from_pretrained(locate(sys.argv[3])), batch, sys.argv[1])
"""


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        here = str(Path(__file__).parent)
        subprocess.run(
            [sys.executable, "-c", FLOAT, f"{folder}/fp32.onnx", here, MODEL], check=True, capture_output=True
        )
        export_seconds = time.perf_counter() - start
        start = time.perf_counter()
        command = [sys.executable, "-m", "bitlower.tools.cli", "--json", "run", str(RECIPE), "-o", f"{folder}/artifact"]
        output = subprocess.run([*command, "--no-cache"], check=True, capture_output=True, text=True).stdout
        total = time.perf_counter() - start
    summary = json.loads(output)
    limit = 3 * export_seconds + 60
    result = {"fp32_export_seconds": round(export_seconds, 1), "total_seconds": round(total, 1)}
    result |= {"limit_seconds": round(limit, 1), "stages": summary["stages"]}
    write_result("pipeline", "python benchmarks/pipeline.py", result)
    show_table(("stage", "seconds"), [(stage["name"], stage["seconds"]) for stage in summary["stages"]])
    print(f"whole process {total:.1f} s; fp32 export alone {export_seconds:.1f} s; 3 x that + 60 s is {limit:.1f} s")


if __name__ == "__main__":
    main()

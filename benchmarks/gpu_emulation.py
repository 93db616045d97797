"""Whole MiniLM with GPU schedules, run on the CPU, kernel by kernel against the Program. No speed.

    python benchmarks/gpu_emulation.py

W8A8, calibrated on a few sentences, as OpenCL (PoCL); W4A16-g32 with float16 between kernels, as CUDA source that g++
compiles, a thread being a fiber and a matrix instruction a loop. Texts of 8 and of 96 tokens, so that linears go by
warps and by tiles. Each kernel of the Program reads what the library's kernels gave before it, and what it returns is
compared: values by the largest error over the root mean square of a row (with float16 beyond 2⁻¹⁰ of themselves), codes
by how many are unequal and how far, in steps, the farthest value lies from the code that was taken beyond half a step.
Needs PoCL, g++, and the files of the tests that run device code.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from _common import MODEL, RESULTS, show_table, write_result

from bitlower.backends.tvm_kernels import Target, require_tvm
from bitlower.frontends import batches, load
from bitlower.passes import Context, PassManager, parse_pipeline

EMULATOR = Path(__file__).parents[1] / "tests" / "backends" / "tvm_kernels"
PASSES = "clean,quantize{{scheme={scheme}}},calibrate{{weights=minmax}},lower-integer,fuse"
RUNS = {"W8A8": (Target.OPENCL, "pocl", "float32"), "W4A16-g32": (Target.CUDA, "fibers", "float16")}
"""Scheme by scheme: the target, the file that runs its device code, and the floats between kernels."""
CALIBRATION = ["a cat sits on the mat", "the price of oil rose sharply", "two men play chess in the park"]
TEXTS = {8: "kernels for small numbers", 96: "a much longer text with many more words in it than the others have " * 8}


def measure(scheme: str) -> list[dict[str, Any]]:
    """A row for each text."""
    target, emulator, activations = RUNS[scheme]
    build = importlib.import_module(emulator).build
    from hosted import HostedLibrary

    from bitlower.backends.tvm_kernels.verify.trace import KernelComparison, trace

    program = load(MODEL)
    data = batches(program, CALIBRATION, max_length=32)
    program = PassManager(parse_pipeline(PASSES.format(scheme=scheme))).run(program, Context(calibration=data))
    start = time.perf_counter()
    library = HostedLibrary(trace(program), target, build, activations)
    compiled, rows = time.perf_counter() - start, []
    for length, text in TEXTS.items():
        [batch] = batches(program, [text], max_length=length)
        start = time.perf_counter()
        found = library(**batch)
        seconds, comparison = time.perf_counter() - start, KernelComparison(program, activations)
        with torch.no_grad():
            comparison.run(program.arguments(batch), found)
        kernels = list(comparison.agreements.values())
        rows.append(
            {
                "scheme": scheme, "activations": activations, "tokens": batch["input_ids"].shape[1],
                "kernels": len(kernels),
                "values": sum(k.values for k in kernels), "worst_value": max(k.worst for k in kernels),
                "codes": sum(k.codes for k in kernels), "unequal_codes": sum(k.codes - k.equal for k in kernels),
                "worst_code": max(k.excess for k in kernels), "wrong": sum(k.turned for k in kernels),
                "compile_s": round(compiled, 1), "run_s": round(seconds, 1),
            }
        )  # fmt: skip
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the figures as a table."""
    form = [{key: f"{value:.1e}" if key.startswith("worst") else value for key, value in row.items()} for row in rows]
    show_table(list(rows[0]), [list(row.values()) for row in form])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print the last results and run nothing")
    if parser.parse_args().show:
        show(json.loads((RESULTS / "gpu_emulation.json").read_text())["texts"])
        return
    require_tvm()
    sys.path.insert(0, str(EMULATOR))
    rows = [row for scheme in RUNS for row in measure(scheme)]
    write_result("gpu_emulation", "python benchmarks/gpu_emulation.py", {"texts": rows})
    show(rows)


if __name__ == "__main__":
    main()

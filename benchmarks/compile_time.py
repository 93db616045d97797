"""Seconds to compile whole models into libraries, for the CPU and for CUDA.

    python benchmarks/compile_time.py

MiniLM, fused; each target in a process of its own that has compiled nothing before. `library`: from the Program to code
in memory, for CUDA to its source; within it equal specs are one kernel. `again`: the same once more in that process.
`nvcc`: that source to machine code for sm_80 and sm_90 and to PTX (CUDA only; empty where nvcc is not installed).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from _common import MODEL, show_table, write_result

SCHEMES = {
    "W8A8": "clean,quantize{scheme=W8A8},calibrate,lower-integer,fuse",
    "W4A16-g64": "clean,quantize{scheme=W4A16-g64-e16},rtn,lower-integer,fuse",
}
TARGETS = ("host", "cuda")
SENTENCES = ("A man is playing a guitar.", "The committee will meet again on Thursday.")


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came out."""
    start = time.perf_counter()
    result = work()
    return round(time.perf_counter() - start, 2), result


def measure(scheme: str, name: str) -> dict[str, Any]:
    """A row of the table, in this process."""
    import bitlower
    from bitlower import Context, PassManager, parse_pipeline
    from bitlower.backends.tvm_kernels import Target, compile_program
    from bitlower.backends.tvm_kernels.library.fatbin import compile_source, device_module, require_nvcc
    from bitlower.ir import BitlowerError

    program = bitlower.load(MODEL)
    batches = bitlower.batches(program, SENTENCES)
    fused = PassManager(parse_pipeline(SCHEMES[scheme])).run(program, Context(batches))
    target = None if name == "host" else Target.CUDA
    first, library = timed(lambda: compile_program(fused, target))
    again, _ = timed(lambda: compile_program(fused, target))
    row: dict[str, Any] = {"scheme": scheme, "target": name, "library, s": first, "again, s": again, "nvcc, s": ""}
    if target is not None:
        source = str(device_module(library.code.executable).inspect_source())
        try:
            require_nvcc()
            row["nvcc, s"], _ = timed(lambda: compile_source(source))
        except BitlowerError:
            print("nvcc is not installed: its time is left out", file=sys.stderr)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    only = parser.parse_args().only
    if only:
        print(json.dumps(measure(*only)))
        return
    rows = []
    for scheme in SCHEMES:
        for target in TARGETS:
            command = [sys.executable, __file__, "--only", scheme, target]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    write_result("compile_time", "python benchmarks/compile_time.py", {"model": MODEL, "rows": rows})
    show_table(list(rows[0]), [list(row.values()) for row in rows])


if __name__ == "__main__":
    main()

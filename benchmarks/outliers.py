"""Perplexity of SmolLM2-135M with static 8-bit activations: what each way with outliers saves of it.

    python benchmarks/outliers.py --data DIR [--cases NAME ...] [--fresh]

Weights per channel in 8 bits, the input of every linear but the head and every residual sum in 8 bits, scales from 32
windows of 512 tokens of WikiText-2 valid. Perplexity over the first 12 windows of 512 tokens of test. ``16 bit`` is the
share of activation quantizers that have 16 bits. ``prefix``: constant keys and values of the model's first token and of
the newline before every sequence. Rows that are in the results file already are kept, unless
``--fresh``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from typing import Any

import torch
from _common import RESULTS, data_folder, show_table, write_result
from decoder_accuracy import LENGTH, MODEL, SAMPLES, WINDOW, open_bench

from bitlower import Context, PassManager, Program
from bitlower.frontends.tokenize import windows
from bitlower.ir import Scheme
from bitlower.ir.quantization.scheme import ACTIVATION_ROLES
from bitlower.passes import Pass, make_pass, parse_pipeline
from bitlower.tools.data.texts import split_windows
from bitlower.tools.evaluation.perplexity import perplexity

ROLES = ("linear-weight", "linear-input", "residual")
WINDOWS = 12
GROUPED = "calibrate{activations=minmax}"
WAYS = {
    "float": ("", ""),
    "per tensor": ("", "W8A8 | calibrate"),
    "MP-PTQ": ("", "W8A8 | assign-precision{set=paper},calibrate"),
    "smooth": ("", "W8A8 | smooth,calibrate"),
    "rotate": ("rotate", "W8A8 | calibrate"),
    "PEG-6": ("", f"W8A8-peg6 | {GROUPED}"),
    "PEG-6, permuted": ("peg-permute{groups=6}", f"W8A8-peg6 | {GROUPED}"),
    "6 unequal groups": ("", f"W8A8-upeg6 | {GROUPED}"),
    "6 unequal groups, permuted": ("peg-permute", f"W8A8-upeg6 | {GROUPED}"),
    "rotate, 6 unequal groups, permuted": ("rotate,peg-permute", f"W8A8-upeg6 | {GROUPED}"),
    "per token": ("", "W8A8-token | calibrate"),
}
PREFIX = "prefix-sinks{tokens=[1 198]}"
CASES = WAYS | {
    f"prefix, {name}": (f"{PREFIX},{before}" if before else PREFIX, rest) for name, (before, rest) in WAYS.items()
}
"""What stands before `quantize`, the scheme, and what stands after."""


def passes_of(name: str) -> tuple[Pass, ...]:
    """The pipeline of a case."""
    before, rest = CASES[name]
    if not rest:
        return parse_pipeline(before) if before else ()
    scheme, _, after = map(str.strip, rest.partition("|"))
    placed = dataclasses.replace(Scheme.parse(scheme), embeddings=None, roles=ROLES)
    return (
        *(parse_pipeline(before) if before else ()),
        make_pass("quantize", {"scheme": placed.to_dict()}),
        *parse_pipeline(after),
    )


def share(program: Program) -> float:
    """How many of the activation quantizers have more than 8 bits, in percent."""
    bits = [q.spec.grid.bits for _, q in program.quantizers() if q.role in ACTIVATION_ROLES]
    return 100 * sum(b > 8 for b in bits) / len(bits) if bits else 0.0


def measure(program: Program, name: str, context: Context, test: torch.Tensor) -> dict[str, Any]:
    """A row of the table."""
    start = time.perf_counter()
    made = PassManager(passes_of(name)).run(program, context)
    seconds = time.perf_counter() - start
    found = perplexity(made, test, window=WINDOW, windows=WINDOWS).perplexity
    return {"case": name, "ppl": round(found, 3), "share_16": round(share(made), 1), "seconds": round(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="the folder with the data sets (wikitext-2 in it); default: $BITLOWER_DATA")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--fresh", action="store_true", help="measure rows again that are in the results file")
    arguments = parser.parse_args()
    bench = open_bench(MODEL, data_folder(arguments.data) / "wikitext-2", 0, (WINDOWS,))
    rows, _ = split_windows(bench.calibration, LENGTH, SAMPLES, seed=0)
    path = RESULTS / "outliers.json"
    known = json.loads(path.read_text())["rows"] if path.is_file() and not arguments.fresh else []
    found = {row["case"]: row for row in known}
    for name in arguments.cases:
        if name not in found:
            found[name] = measure(bench.program, name, Context(windows(bench.program, rows)), bench.test)
            print(found[name], flush=True)
            ordered = [found[case] for case in CASES if case in found]
            write_result("outliers", "python benchmarks/outliers.py --data DIR", {"model": MODEL, "rows": ordered})
    keys = ("case", "ppl", "share_16", "seconds")
    show_table(keys, [[found[case][key] for key in keys] for case in CASES if case in found])


if __name__ == "__main__":
    main()

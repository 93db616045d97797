"""Ultra-low bits: all-MiniLM-L6-v2 in 4-bit weights and 2- to 4-bit tables, activations in 8, as ONNX in onnxruntime.

    python benchmarks/ultra_low.py --data DIR

Calibration: 256 sentences of STS-B train, every 22nd. Each artifact is exported, verified, and scored on STS-B dev in
onnxruntime; the file is ``model.onnx``, and ``smaller`` is how many times it goes into the float model's tensors.
``--cases`` measures only those whose label holds one of the given texts; the rows of others stay in the results file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import MODEL, RESULTS, data_folder, show_table, write_result
from accuracy import sentences, size

import bitlower
from bitlower.backends.onnx_qdq import export
from bitlower.ir import Batch, Program
from bitlower.passes import Context, PassManager, parse_pipeline
from bitlower.tools.evaluation.evaluate import evaluate

COUNT, STEP, LENGTH = 256, 22, 64
COLUMNS = ("label", "spearman", "pearson", "file_mb", "smaller", "integer_products", "seconds", "pipeline")


@dataclass(frozen=True)
class Case:
    """A row: the passes between ``clean`` and ``lower-integer``, and the opset."""

    label: str
    pipeline: str
    opset: int = 23


def tables(bits: int) -> str:
    """Tables first, by themselves, so that their grids are searched."""
    return f"quantize{{scheme=W16A16-e{bits}}},calibrate"


LEARN = "adaround{iterations=300 learning-rate=0.02}"
CASES = (
    Case("W8A8", "quantize{scheme=W8A8},calibrate"),
    Case("W4A8-e4, nearest", "quantize{scheme=W4A8-e4},calibrate"),
    Case("W4A8-e4, nearest, bias corrected", "quantize{scheme=W4A8-e4},calibrate,correct-bias"),
    Case(
        "W4A8-e4, nearest, bias corrected by the published mean",
        "quantize{scheme=W4A8-e4},calibrate,correct-bias{weighting=none}",
    ),
    Case("W4A8-e4, GPTQ", f"{tables(4)},quantize{{scheme=W4A8}},gptq,calibrate"),
    Case("W4A8-e3, nearest", "quantize{scheme=W4A8-e3},calibrate"),
    Case("W4A8-e3, GPTQ", f"{tables(3)},quantize{{scheme=W4A8}},gptq,calibrate"),
    Case("W4A8-e3, AdaRound", f"{tables(3)},quantize{{scheme=W4A8}},{LEARN},calibrate"),
    Case("W4A8-e2, GPTQ", f"{tables(2)},quantize{{scheme=W4A8}},gptq,calibrate", opset=25),
)


def measure(program: Program, batches: Sequence[Batch], case: Case, dev: Path) -> dict[str, Any]:
    """Run the passes, write the artifact, score it."""
    start = time.perf_counter()
    passes = parse_pipeline(f"{case.pipeline},lower-integer")
    made = PassManager(passes).run(program, Context(batches, batches[:4]))
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        kernels = export(made, folder, batches=batches[:2], opset=case.opset).verification.kernels
        metrics = evaluate(folder, "sts-b", dev).metrics
        file_bytes = size(folder)
    return {
        "label": case.label,
        "spearman": round(metrics["spearman"], 2),
        "pearson": round(metrics["pearson"], 2),
        "file_mb": round(file_bytes / 1e6, 2),
        "smaller": round(program.size_bytes() / file_bytes, 2),
        "integer_products": f"{kernels.found} of {kernels.expected}",
        "seconds": round(seconds, 1),
        "pipeline": case.pipeline,
        "opset": case.opset,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="the folder with the data sets (STS-B in it); default: $BITLOWER_DATA")
    parser.add_argument("--cases", nargs="+", help="only those whose label holds one of these")
    arguments = parser.parse_args()
    data = data_folder(arguments.data) / "STS-B"
    program = PassManager(parse_pipeline("clean")).run(bitlower.load(MODEL), Context())
    texts = sentences(data / "sts-train.tsv", COUNT, STEP)
    batches = bitlower.batches(program, texts, max_length=LENGTH, batch_size=16)
    path = RESULTS / "ultra_low.json"
    known = json.loads(path.read_text())["rows"] if arguments.cases and path.is_file() else []
    rows = {row["label"]: row for row in known} or {"float": float_row(program, data / "sts-dev.tsv")}
    for case in CASES:
        if not arguments.cases or any(text in case.label for text in arguments.cases):
            rows[case.label] = measure(program, batches, case, data / "sts-dev.tsv")
            print(rows[case.label], flush=True)
    kept = [rows[label] for label in ("float", *(case.label for case in CASES)) if label in rows]
    write_result("ultra_low", "python benchmarks/ultra_low.py --data DIR", {"rows": kept})
    show_table(COLUMNS, [[row[key] for key in COLUMNS] for row in kept])


def float_row(program: Program, dev: Path) -> dict[str, Any]:
    """The float model's line."""
    metrics = evaluate(program, "sts-b", dev).metrics
    return {
        "label": "float", "spearman": round(metrics["spearman"], 2), "pearson": round(metrics["pearson"], 2),
        "file_mb": round(program.size_bytes() / 1e6, 2), "smaller": 1.0, "integer_products": "", "seconds": 0.0,
        "pipeline": "", "opset": None,
    }  # fmt: skip


if __name__ == "__main__":
    main()

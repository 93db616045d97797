"""Latency and error of activations in embedding groups in onnxruntime, against int8 per tensor and fp32.

    python benchmarks/peg_latency.py --data DIR

all-MiniLM-L6-v2, batch 1 × 128 tokens. Every side is a pipeline; groups are cut by ``legalize`` into linears with one
scale a tensor, some of them with neighbouring groups merged. Timed in a process of its own without torch; in each
round all sides run one after the other, in alternating order, and the ratio of a side to int8 per tensor is taken
within the round: smallest, median and largest of the rounds' ratios. Errors are mean squared ones of the last hidden
state, over its variance, on sentences that no range has seen: of the Program against the float model, and of
onnxruntime against the Program.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _common import MODEL, data_folder, show_table, write_result

TOKENS = 128
BASE = "W8A8"
GROUPED = {
    "W8A8-peg6": ("W8A8-peg6", 1.0),
    "W8A8-upeg2": ("W8A8-upeg2", 1.0),
    "W8A8-upeg3": ("W8A8-upeg3", 1.0),
    "W8A8-upeg2, merge 2": ("W8A8-upeg2", 2.0),
    "W8A8-upeg3, merge 2": ("W8A8-upeg3", 2.0),
    "W8A8-upeg3, merge 3": ("W8A8-upeg3", 3.0),
}
FORM = "onnxruntime"
OUTPUT = "last_hidden_state"


def build(folder: Path, data: Path) -> dict[str, dict[str, Any]]:
    """Write every side below ``folder``; what is known of each without timing it."""
    import torch

    from bitlower.frontends import batches, load

    with open(data / "STS-B" / "sts-train.tsv", encoding="utf-8") as file:
        texts = [row[5] for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)][::44][:96]
    torch.manual_seed(0)
    model = load(MODEL)
    seen, held_out = (batches(model, part, max_length=TOKENS) for part in (texts[:64], texts[64:]))
    reference = _make(model, "clean", seen)
    facts = {"fp32": _write(reference, reference, folder / "fp32", held_out)}
    for side, (scheme, merge) in {BASE: (BASE, 1.0), **GROUPED}.items():
        steps = f"clean,quantize{{scheme={scheme}}},calibrate,legalize{{merge={merge}}},lower-integer"
        facts[side] = _write(_make(model, steps, seen), reference, folder / side, held_out)
    return facts


def _make(program: Any, pipeline: str, calibration: list[Any]) -> Any:
    from bitlower.passes import Context, PassManager, parse_pipeline

    return PassManager(parse_pipeline(pipeline)).run(program, Context(calibration=calibration))


def _write(program: Any, reference: Any, folder: Path, batches: list[Any]) -> dict[str, Any]:
    """Export, and compare on ``batches``: the Program with the float model, onnxruntime with the Program."""
    import onnxruntime
    import torch

    from bitlower.backends.onnx_qdq import export

    folder.mkdir()
    kernels = export(program, folder, batches=batches[:1], form=FORM).verification.kernels
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    errors: dict[str, list[float]] = {"program": [], "runtime": []}
    for batch in batches:
        with torch.no_grad():
            float_, ours = (p(**batch)[OUTPUT] for p in (reference, program))
        theirs = torch.from_numpy(session.run([OUTPUT], {k: v.numpy() for k, v in batch.items()})[0])
        keep = batch["attention_mask"].bool()
        for key, a, b in (("program", float_, ours), ("runtime", ours, theirs)):
            errors[key].append(float((a - b)[keep].square().mean() / a[keep].var()))
    means = {f"{key}_error": float(np.mean(values)) for key, values in errors.items()}
    counts = {"integer_kernels": kernels.found, "expected_kernels": kernels.expected}
    size = (folder / "model.onnx").stat().st_size
    return {**means, **counts, "float_kernels": sum(kernels.floating.values()), "bytes": size}


def measure(folder: Path, runs: int, threads: int) -> dict[str, list[float]]:
    """Milliseconds of each side in each round."""
    import onnxruntime

    sessions = {}
    for path in sorted(folder.iterdir()):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        sessions[path.name] = onnxruntime.InferenceSession(str(path / "model.onnx"), options, ["CPUExecutionProvider"])
    ids = np.random.default_rng(0).integers(1000, 30000, (1, TOKENS))
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    times: dict[str, list[float]] = {side: [] for side in sessions}
    for turn in range(-3, runs):
        for side in list(sessions)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            sessions[side].run(None, feed)
            if turn >= 0:
                times[side].append(1000 * (time.perf_counter() - start))
    return times


def summarize(facts: dict[str, dict[str, Any]], times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """A row for each side."""
    rows = []
    for side, known in facts.items():
        ratios = np.array(times[side]) / np.array(times[BASE])
        row = {"side": side, "median_ms": round(float(np.median(times[side])), 2)}
        row |= {f"x_{BASE}_{key}": round(float(f(ratios)), 3) for key, f in _STATISTICS.items()}
        rows.append(row | known)
    return rows


_STATISTICS = {"min": np.min, "median": np.median, "max": np.max}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="the folder with the data sets (STS-B in it); default: $BITLOWER_DATA")
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.runs, arguments.threads)))
        return
    with tempfile.TemporaryDirectory() as folder:
        facts = build(Path(folder), data_folder(arguments.data))
        command = [sys.executable, __file__, "--measure", folder, "--runs", str(arguments.runs)]
        command += ["--threads", str(arguments.threads)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = summarize(facts, json.loads(output.splitlines()[-1]))
    settings = {"runs": arguments.runs, "threads": arguments.threads, "form": FORM, "tokens": TOKENS}
    write_result("peg_latency", "python benchmarks/peg_latency.py --data DIR", {**settings, "rows": rows})
    show_table(list(rows[0]), [list(row.values()) for row in rows])


if __name__ == "__main__":
    main()

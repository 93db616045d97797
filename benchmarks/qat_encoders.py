"""Quantization-aware training of encoders: what it wins back of float accuracy, and what the files weigh.

    python benchmarks/qat_encoders.py TASK FOLDER [FOLDER ...] --data DIR [--cases NAME ...] [--steps N] [--seed S]
        [--rate X] [--opset N]

TASK is sst-2, mrpc or cola, FOLDER a model as ``finetune.py`` leaves it; or ``sts-b`` with ``package:NAME`` of a model
of sentence embeddings, which learns from its own sentences without labels. Each case is the GLUE metric (Spearman for
STS-B) on the development set, in percent, in process: float, after the passes without training, and after ``qat``;
``mb`` is the ONNX file, and ``smaller`` how many times it goes into the float model's tensors. Training rows are drawn
with the seed, 512 of them are held out to choose the best step by; ranges come from 128 others. Rows are written to
``results/qat_encoders.json`` as they come, with the curves; ``fresh`` ones replace those of the same case.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS, data_folder, show_table, write_result
from accuracy import size
from finetune import TASKS, Task

import bitlower
from bitlower import Context, PassManager, Program, parse_pipeline
from bitlower.backends.onnx_qdq import export
from bitlower.ir import Batch
from bitlower.passes import make_pass
from bitlower.passes.training._report import TrainReport
from bitlower.tools.data.texts import read_rows
from bitlower.tools.evaluation.evaluate import evaluate

HELD_OUT, CALIBRATION, BATCH = 512, 128, 32
EMBEDDINGS = Task("STS-B/sts-train.tsv", "STS-B/sts-dev.tsv", ("5", "6", "4"), "spearman", 1, 32, 64)
ALL_TASKS = {**TASKS, "sts-b": EMBEDDINGS}
RATES = {"weights": 2e-5, "embeddings": 2e-5, "norms": 2e-5, "biases": 2e-5, "scales": 2e-4, "zero-points": 1e-2}
LOW = {"weights": 1e-4, "embeddings": 1e-4, "norms": 1e-4, "biases": 1e-4, "scales": 5e-4, "zero-points": 1e-2}
TABLES = "quantize{scheme=W16A16-e2},calibrate"
CASES: dict[str, tuple[str, dict[str, float]]] = {
    "W8A8, full placement": ("quantize{scheme=W8A8-full},calibrate", RATES),
    "W4A8, tables of 2 bits": (f"{TABLES},quantize{{scheme=W4A8}},gptq,calibrate", LOW),
    "W2A8, tables of 2 bits": (f"{TABLES},quantize{{scheme=W2A8}},gptq,calibrate", LOW),
    "W4A4": ("quantize{scheme=W4A4-e4},gptq,calibrate", LOW),
}
"""Passes between ``clean`` and ``qat``, and the learning rates."""
COMMAND = "python benchmarks/qat_encoders.py TASK FOLDER --data DIR"


def batches(program: Program, task: Task, data: Path, seed: int, count: int) -> dict[str, list[Batch]]:
    """What to calibrate on, to train on and to hold out; ``count`` training rows at most, in random order."""
    rows = list(read_rows(data / task.train, task.columns))
    random.Random(seed).shuffle(rows)
    paired = len(task.columns) == 3
    if task is EMBEDDINGS:
        texts = [text for row in rows for text in row.values[:2]]
        chosen = [(text,) for text in dict.fromkeys(texts)]
    else:
        chosen = [tuple(row.values) for row in rows]

    def made(part: list[Any], size: int) -> list[Batch]:
        pairs = [values[1] for values in part] if paired and task is not EMBEDDINGS else None
        return bitlower.batches(
            program, [values[0] for values in part], pairs=pairs, max_length=task.tokens, batch_size=size
        )

    held_out, rest = chosen[:HELD_OUT], chosen[HELD_OUT:]
    return {
        "calibration": made(rest[:CALIBRATION], 8),
        "training": made(rest[CALIBRATION : CALIBRATION + count], BATCH),
        "held_out": made(held_out, 64),
    }


def score(program: Program, task: Task, data: Path) -> float:
    """The metric on the development set."""
    kind = "sts-b" if task is EMBEDDINGS else "classification"
    options = {} if task is EMBEDDINGS else {"columns": task.columns}
    found = evaluate(program, kind, data / task.dev, max_length=task.tokens, **options).metrics
    return float(found[task.metric])


def megabytes(program: Program, batch: Batch, opset: int) -> float:
    """The ONNX file of a program."""
    lowered = PassManager(parse_pipeline("lower-integer")).run(program, Context([batch]))
    with tempfile.TemporaryDirectory() as folder:
        export(lowered, Path(folder), batches=[batch], opset=opset)
        return size(Path(folder)) / 1e6


def measure(program: Program, task: Task, data: Path, case: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """A row of the results."""
    steps, seed = arguments.steps, arguments.seed
    pipeline, rates = CASES[case]
    rates = {group: rate if group == "zero-points" else rate * arguments.rate for group, rate in rates.items()}
    parts = batches(program, task, data, seed, steps * BATCH)
    context = Context(**parts, seed=seed)
    placed = PassManager(parse_pipeline(pipeline)).run(program, context)
    losses = ["hidden"] if task is EMBEDDINGS else ["logits", "hidden"]
    losses = [{"hidden": {"tokens": "unit-norm"}} if name == "hidden" else name for name in losses]
    qat = make_pass("qat", {"losses": losses, "learning-rate": rates, "steps": steps, "evaluate-every": 50})
    before, start = score(placed, task, data), time.perf_counter()
    trained = PassManager([qat]).run(placed, context)
    seconds = time.perf_counter() - start
    report = context[TrainReport]
    held_out = [round(point.held_out, 6) for point in report.curve if point.held_out is not None]
    after, weight = score(trained, task, data), megabytes(trained, parts["calibration"][0], arguments.opset)
    return {
        "before": round(before, 2), "after": round(after, 2), "mb": round(weight, 2),
        "smaller": round(program.size_bytes() / weight / 1e6, 2), "best_step": report.best_step,
        "seconds": round(seconds), "curve": held_out, "opset": arguments.opset,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=ALL_TASKS)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--data", help="the folder with the data sets; default: $BITLOWER_DATA")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=1, help="times the learning rates of the case")
    parser.add_argument("--opset", type=int, default=23, help="of the ONNX file; from 25 on 2-bit weights are 2 bits")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    data, task = data_folder(arguments.data), ALL_TASKS[arguments.task]
    path = RESULTS / "qat_encoders.json"
    for folder in arguments.folders:
        program = PassManager(parse_pipeline("clean")).run(bitlower.load(folder), Context())
        reference = round(score(program, task, data), 2)
        for case in arguments.cases:
            key = {"task": arguments.task, "model": Path(folder).name, "case": case}
            key |= {"seed": arguments.seed, "steps": arguments.steps, "rate": arguments.rate}
            row = key | {"float": reference} | measure(program, task, data, case, arguments)
            rows = json.loads(path.read_text())["rows"] if path.is_file() else []
            rows = [other for other in rows if not key.items() <= other.items()] + [row]
            write_result("qat_encoders", COMMAND, {"rows": rows})
            print(row, flush=True)
    columns = ("task", "model", "case", "float", "before", "after", "mb", "smaller", "steps", "best_step")
    show_table(columns, [[row[column] for column in columns] for row in json.loads(path.read_text())["rows"]])


if __name__ == "__main__":
    main()

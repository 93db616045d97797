"""Accuracy of fine-tuned classifiers with all their tensors quantized: what each way with outliers saves of it.

    python benchmarks/classifiers.py TASK FOLDER [FOLDER ...] --data DIR [--cases NAME ...] [--fresh]

    python benchmarks/classifiers.py --table

FOLDER is a model as ``finetune.py`` leaves it (TASK-SEED). Full placement: weights per channel, every activation of
Bondarenko et al. (2021), §3, static but for ``per token``. Ranges come from 128 texts of the training set. Numbers are
the task's GLUE metric on its development set, in percent, in process. ``W4A8`` is the placement of linears alone, with
word tables of so many bits. Rows that are in the results file already are kept, unless ``--fresh``. ``--table`` shows
what is there for all tasks: means and standard deviations over seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _common import RESULTS, data_folder, show_table, write_result
from finetune import TASKS, Task

import bitlower
from bitlower import Context, PassManager, Program, parse_pipeline
from bitlower.ir import Batch
from bitlower.ir.quantization.scheme import ACTIVATION_ROLES
from bitlower.tools.data.texts import read_rows
from bitlower.tools.evaluation.evaluate import evaluate

TEXTS = 128
WAYS = {
    "per tensor": "quantize{{scheme=W8A{bits}-full}},calibrate",
    "per tensor, min-max": "quantize{{scheme=W8A{bits}-full}},calibrate{{activations=minmax}}",
    "MP-PTQ": "quantize{{scheme=W8A{bits}-full}},assign-precision{{set=paper}},calibrate",
    "22 % at 16 bits, assigned": "quantize{{scheme=W8A{bits}-full}},assign-precision{{share-16=0.224}},calibrate",
    "PEG-6": "quantize{{scheme=W8A{bits}-peg6-full}},calibrate",
    "PEG-6, permuted": "peg-permute,quantize{{scheme=W8A{bits}-peg6-full}},calibrate",
    "6 unequal groups, permuted": "peg-permute,quantize{{scheme=W8A{bits}-upeg6-full}},calibrate",
    "per token": "quantize{{scheme=W8A{bits}-token-full}},calibrate",
}
ULTRA_LOW = "quantize{{scheme=W16A16-e{bits}}},calibrate,quantize{{scheme=W4A8}},gptq,calibrate"
CASES = {
    "float": "",
    **{f"A{bits}, {name}": way.format(bits=bits) for bits in (8, 6, 4) for name, way in WAYS.items()},
    **{f"W4A8, tables of {bits} bits": ULTRA_LOW.format(bits=bits) for bits in (4, 3, 2)},
}
"""Passes after `clean`."""


def calibration(program: Program, task: Task, data: Path) -> list[Batch]:
    """Texts from all over the training set."""
    rows = list(read_rows(data / task.train, task.columns))
    chosen = [row.values for row in rows[:: len(rows) // TEXTS]][:TEXTS]
    pairs = [values[1] for values in chosen] if len(task.columns) == 3 else None
    return bitlower.batches(program, [values[0] for values in chosen], pairs=pairs, max_length=task.tokens)


def measure(program: Program, batches: list[Batch], task: Task, data: Path, case: str) -> dict[str, Any]:
    """A case's metric, and how many of its activation quantizers have more than 8 bits."""
    made = PassManager(parse_pipeline(CASES[case]) if CASES[case] else ()).run(program, Context(batches))
    found = evaluate(made, "classification", data / task.dev, columns=task.columns, max_length=task.tokens).metrics
    bits = [q.spec.grid.bits for _, q in made.quantizers() if q.role in ACTIVATION_ROLES]
    wide = 100 * sum(b > 8 for b in bits) / len(bits) if bits else 0.0
    return {"case": case, task.metric: round(found[task.metric], 2), "share_16": round(wide, 1)}


def glue(rows: Sequence[dict[str, Any]]) -> None:
    """Cases down, tasks across: the mean over models, and their standard deviation where there are several."""
    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    lines = []
    for case in CASES:
        cells = [
            [row[TASKS[task].metric] for row in rows if (row["task"], row["case"]) == (task, case)] for task in tasks
        ]
        if any(cells):
            lines.append([case, *map(_cell, cells)])
    show_table(["case", *(f"{task}, {TASKS[task].metric}" for task in tasks)], lines)


def _cell(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else ""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} ({len(values)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=TASKS)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--table", action="store_true", help="show the results of all tasks and measure nothing")
    parser.add_argument("--data", help="the folder with the data sets; default: $BITLOWER_DATA")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--fresh", action="store_true", help="measure rows again that are in the results file")
    arguments = parser.parse_args()
    path = RESULTS / "classifiers.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    if arguments.table:
        glue(rows)
        return
    if not arguments.task or not arguments.folders:
        parser.error("name a task and at least one folder, or --table")
    data, task = data_folder(arguments.data), TASKS[arguments.task]
    for folder in arguments.folders:
        program = PassManager(parse_pipeline("clean")).run(bitlower.load(folder), Context())
        batches = calibration(program, task, data)
        for case in arguments.cases:
            key = {"task": arguments.task, "model": folder.name, "case": case}
            known = [row for row in rows if key.items() <= row.items()]
            if known and not arguments.fresh:
                continue
            row = key | measure(program, batches, task, data, case)
            rows = [other for other in rows if other not in known] + [row]
            write_result("classifiers", "python benchmarks/classifiers.py TASK FOLDER --data DIR", {"rows": rows})
            print(row, flush=True)
    names = [folder.name for folder in arguments.folders]
    shown = [row for row in rows if row["task"] == arguments.task and row["model"] in names]
    columns = ("model", "case", task.metric, "share_16")
    show_table(columns, [[row[column] for column in columns] for row in shown])


if __name__ == "__main__":
    main()

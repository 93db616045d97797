"""Quantization-aware training of SmolLM2-135M in few bits, from where GPTQ leaves it, on WikiText-2 valid alone.

    python benchmarks/qat_decoder.py --data DIR [--bits 2 3 4] [--steps N] [--seed S] [--rate R]

Weights in groups of 128, asymmetric, tables and head in float. Calibration of ``gptq``: 32 windows of 512 tokens of
valid. Training: one window of 512 tokens a step, drawn from valid without those that are held out; the loss is the KL
divergence of the next token from the float model's. Figures: perplexity on the first 12 windows of 512 of WikiText-2
test, and on as many of XSum's articles, which nothing here learns from, with the mean KL divergence from the float
model on both, in nats: before ``qat`` (``gptq`` alone) and after. Rows are written to ``results/qat_decoder.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from _common import RESULTS, data_folder, show_table, write_result
from _decoders import MODEL, TEXTS, judged, read_tokens

from bitlower import Context, PassManager, Program, load, parse_pipeline
from bitlower.frontends.tokenize import windows
from bitlower.passes import make_pass
from bitlower.passes.training._report import TrainReport
from bitlower.tools.data.texts import split_windows

LENGTH, WINDOWS, HELD_OUT, CALIBRATION = 512, 12, 4, 32
COMMAND = "python benchmarks/qat_decoder.py --data DIR"


def measure(program: Program, tokens: dict[str, torch.Tensor], bits: int, arguments: Any) -> dict[str, Any]:
    """A row of the results."""
    calibration, _ = split_windows(tokens["learned"], LENGTH, CALIBRATION, seed=arguments.seed)
    trained, held_out = split_windows(
        tokens["learned"], LENGTH, arguments.steps, held_out=HELD_OUT, seed=arguments.seed + 1
    )
    context = Context(
        windows(program, calibration), training=windows(program, trained), held_out=windows(program, held_out),
        seed=arguments.seed,
    )  # fmt: skip
    placed = PassManager(parse_pipeline(f"quantize{{scheme=W{bits}A16-g128-asym-e16}},gptq"), verify=False)
    solved = placed.run(program, context)
    before = judged(solved, program, tokens, LENGTH, WINDOWS)
    rate = arguments.rate
    rates = {"weights": rate, "embeddings": 0, "norms": rate, "biases": rate, "scales": 5 * rate, "zero-points": 1e-3}
    options = {"steps": len(trained), "evaluate-every": 25, "learning-rate": rates}
    start = time.perf_counter()
    learned = PassManager([make_pass("qat", options)], verify=False).run(solved, context)
    seconds, report = time.perf_counter() - start, context[TrainReport]
    after = judged(learned, program, tokens, LENGTH, WINDOWS)
    return {
        **{f"{key}_before": value for key, value in before.items()}, **after, "steps": report.steps,
        "best_step": report.best_step, "seconds": round(seconds), "tokens": trained.numel(),
        "curve": [round(point.held_out or 0.0, 5) for point in report.curve],
        "flipped": round(max(row.flipped or 0.0 for row in report.quantizers), 4),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="the folder with the data sets; default: $BITLOWER_DATA")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rate", type=float, default=1e-4, help="of weights; scales of ranges have five times it")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    path = RESULTS / "qat_decoder.json"
    program = PassManager(parse_pipeline("clean"), verify=False).run(load(MODEL), Context())
    tokens = read_tokens(program, data_folder(arguments.data))
    for bits in arguments.bits:
        key = {"bits": bits, "seed": arguments.seed, "steps": arguments.steps, "rate": arguments.rate}
        row = key | measure(program, tokens, bits, arguments)
        rows = json.loads(path.read_text())["rows"] if path.is_file() else []
        rows = [other for other in rows if not key.items() <= other.items()] + [row]
        write_result("qat_decoder", COMMAND, {"rows": rows})
        print(row, flush=True)
    figures = [f"{kind}_{name}" for name in TEXTS for kind in ("ppl", "kl")]
    columns = ["bits", "steps", *(column for name in figures for column in (f"{name}_before", name)), "seconds"]
    show_table(columns, [[row[column] for column in columns] for row in json.loads(path.read_text())["rows"]])


if __name__ == "__main__":
    main()

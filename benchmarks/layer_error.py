"""GPTQ against round-to-nearest, layer by layer, on true fp32 weights: every linear of all-MiniLM-L6-v2.

    python benchmarks/layer_error.py --data DIR

For 4, 3 and 2 bits, group size 128 and per channel: the error of each layer's output on its calibration inputs,
``E H Eᵀ`` with the plain second moment H, of the weights that the pass `gptq` returns over those of `rtn`. Inputs are
those of the float model for both sides. DIR holds the STS benchmark as ``STS-B/sts-train.tsv``.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Sequence

import torch
from _common import MODEL, data_folder, show_table, write_result

from bitlower import Program, load
from bitlower.frontends import batches
from bitlower.ir import Batch, get_tensor
from bitlower.ir.dataflow import linears, parameter_of
from bitlower.ir.observe import observe
from bitlower.ir.operators import LinearNode
from bitlower.passes import Context, PassManager, parse_pipeline


def moments(program: Program, inputs: Sequence[Batch]) -> dict[str, torch.Tensor]:
    """The second moment of the inputs of each linear, float64, by the weight's name; padding left out."""
    found: dict[str, torch.Tensor] = {}
    weights: dict[object, list[str]] = {}
    for node in linears(program.graph):
        parameter = parameter_of(LinearNode(node).weight)
        weights.setdefault(LinearNode(node).x, []).append(str(parameter.target) if parameter else "")

    def add(node: object, value: torch.Tensor, batch: Batch) -> None:
        x = value[batch["attention_mask"].bool()].double() if value.dim() == 3 else value.double()
        moment = x.T @ x
        for name in weights[node]:
            found[name] = found.get(name, 0) + moment

    observe(program, list(weights), inputs, add)  # type: ignore[arg-type]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the data sets (or BITLOWER_DATA)")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    arguments = parser.parse_args()
    with open(data_folder(arguments.data) / "STS-B" / "sts-train.tsv", encoding="utf-8") as file:
        texts = [row[5] for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)][::22][:256]
    program = load(MODEL)
    inputs = batches(program, texts, max_length=128, batch_size=16)
    program = PassManager(parse_pipeline("clean")).run(program, Context())
    hessians = moments(program, inputs)
    rows = []
    for bits in arguments.bits:
        for group in ("-g128", ""):
            sides = {}
            for rewrite in ("rtn", "gptq"):
                pipeline = f"quantize{{scheme=W{bits}A16{group}}},{rewrite},lower-integer"
                result = PassManager(parse_pipeline(pipeline)).run(program, Context(inputs))
                sides[rewrite] = errors(program, result, hessians)
            ratios = {name: sides["gptq"][name] / value for name, value in sides["rtn"].items()}
            worst = max(ratios, key=ratios.__getitem__)
            rows.append({
                "scheme": f"W{bits}A16{group}", "layers": len(ratios), "median": statistics.median(ratios.values()),
                "worst": ratios[worst], "worst_layer": worst, "ratios": ratios,
            })  # fmt: skip
    write_result("layer_error", "python benchmarks/layer_error.py --data DIR", {"rows": rows})
    shown = [[r["scheme"], r["layers"], f"{r['median']:.3f}", f"{r['worst']:.3f}", r["worst_layer"]] for r in rows]
    show_table(["scheme", "layers", "GPTQ / RTN, median", "worst", "of"], shown)


def errors(program: Program, result: Program, hessians: dict[str, torch.Tensor]) -> dict[str, float]:
    """``E H Eᵀ`` summed over rows, by weight."""
    found = {}
    for node, quantizer in result.quantizers():
        if quantizer.tensor in hessians:
            codes, scale, zero = (get_tensor(result.module, str(part.target)) for part in node.all_input_nodes)
            spread = codes.shape[1] // scale.shape[1]
            rounded = (codes.double() - zero.double().repeat_interleave(spread, 1)) * scale.repeat_interleave(spread, 1)
            error = rounded - get_tensor(program.module, quantizer.tensor).detach().double()
            found[quantizer.tensor] = float(((error @ hessians[quantizer.tensor]) * error).sum())
    return found


if __name__ == "__main__":
    main()

"""The sizes of GPT-2 small in the schemes of QuantGPT: counted, planned, and weighed as files.

    python benchmarks/quantgpt_sizes.py

The weights are random: sizes do not depend on them. ``counted`` is the paper's way (Tao et al. 2022, table 1): codes of
linears and of the token table, four bytes for every parameter else, no scales. ``planned`` is what ``bitlower plan``
foresees for the model file, ``file`` is its size. 2-bit linears need opset 25.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from _common import show_table, write_result
from transformers import GPT2Config, GPT2LMHeadModel

from bitlower.backends.onnx_qdq import OnnxQdq, export
from bitlower.frontends import load
from bitlower.ir import Batch, Program
from bitlower.passes import Context, PassManager, parse_pipeline
from bitlower.tools.planning.costs import Load
from bitlower.tools.planning.plan import make_plan

SCHEMES = ("2-2-8", "4-4-8", "8-8-8")
OPSET = 25


def counted(model: GPT2LMHeadModel, bits: int) -> float:
    """Bytes of codes of ``bits`` for every matrix but the positions, and of float32 for the rest."""
    total = 0.0
    for name, parameter in model.named_parameters():
        coded = parameter.dim() == 2 and "wpe" not in name
        total += parameter.numel() * (bits / 8 if coded else 4)
    return total


def prompt(program: Program) -> Batch:
    """Eight tokens, and no past."""
    sizes = {"batch": 1, "sequence": 8, "past": 0, "past + sequence": 8}
    return {
        spec.name: torch.zeros([sizes.get(size, size) if isinstance(size, str) else size for size in spec.type.shape])
        if spec.type.is_float
        else torch.ones([sizes[str(size)] for size in spec.type.shape], dtype=torch.int64)
        for spec in program.inputs
    }


def measure(program: Program, model: GPT2LMHeadModel, scheme: str) -> dict[str, object]:
    """The three sizes of one scheme, and how many times float32 is larger than the file."""
    passes = parse_pipeline(f"clean,quantize{{scheme={scheme}}},calibrate{{weights=minmax}},lower-integer")
    plan = make_plan(program, passes, Load(1, 8), [OnnxQdq(opset=OPSET)])
    lowered = PassManager(passes).run(program, Context())
    with tempfile.TemporaryDirectory() as folder:
        export(lowered, Path(folder), batches=[prompt(lowered)], opset=OPSET)
        size = sum(path.stat().st_size for path in Path(folder).glob("model.onnx*"))
    whole = 4 * sum(parameter.numel() for parameter in model.parameters())
    paper = counted(model, int(scheme[0]))
    return {
        "scheme": scheme,
        "float32_mib": round(whole / 2**20, 2),
        "counted_mib": round(paper / 2**20, 2),
        "counted_factor": round(whole / paper, 2),
        "planned_mib": round(plan.file_bytes / 2**20, 2),
        "file_mib": round(size / 2**20, 2),
        "file_factor": round(whole / size, 2),
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    program, rows = load(model, task="text-generation"), []
    for scheme in SCHEMES:
        rows.append(measure(program, model, scheme))
        print(rows[-1], flush=True)
    write_result("quantgpt_sizes", "python benchmarks/quantgpt_sizes.py", {"rows": rows})
    show_table(list(rows[0]), [list(row.values()) for row in rows])


if __name__ == "__main__":
    main()

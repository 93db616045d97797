"""The sizes of GPT-2 small and BART base in the schemes of QuantGPT: counted, planned, and weighed as files.

    python benchmarks/quantgpt_sizes.py [--models "BART base"]

The weights are random: sizes do not depend on them. An encoder-decoder is two files beside what they share.
``counted`` is the paper's way (Tao et al. 2022, table 1): codes of linears and of the token table, four bytes for every
parameter else, no scales. ``planned`` is what ``bitlower plan`` foresees for the model's files, ``file`` is their size.
2-bit linears need opset 25.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from _common import RESULTS, show_table, write_result
from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from bitlower.backends.onnx_qdq import OnnxQdq, export
from bitlower.frontends import load
from bitlower.ir import Batch, Program
from bitlower.passes import Context, PassManager, parse_pipeline
from bitlower.tools.planning.costs import Load
from bitlower.tools.planning.plan import make_plan

SCHEMES = ("2-2-8", "4-4-8", "8-8-8")
OPSET = 25
BASE = {"d_model": 768, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072, "encoder_layers": 6, "decoder_layers": 6}
MODELS: dict[str, tuple[str, Callable[[], PreTrainedModel]]] = {
    "GPT-2 small": ("text-generation", lambda: GPT2LMHeadModel(GPT2Config())),
    "BART base": (
        "text2text-generation",
        lambda: BartForConditionalGeneration(
            BartConfig(**BASE, encoder_attention_heads=12, decoder_attention_heads=12, vocab_size=50265)
        ),
    ),
}
"""The task of each model, and the model at the sizes of its paper."""
POSITIONS = ("wpe", "embed_positions")
"""Tables of positions, which stay float."""


def counted(model: PreTrainedModel, bits: int) -> float:
    """Bytes of codes of ``bits`` for every matrix but the positions, and of float32 for the rest."""
    total = 0.0
    for name, parameter in model.named_parameters():
        coded = parameter.dim() == 2 and not any(table in name for table in POSITIONS)
        total += parameter.numel() * (bits / 8 if coded else 4)
    return total


def prompt(program: Program) -> Batch:
    """Eight tokens on each side, and no past."""
    sizes = {"batch": 1, "encoder_sequence": 8, "sequence": 8, "past": 0, "past + sequence": 8}
    return {
        spec.name: torch.zeros([sizes.get(size, size) if isinstance(size, str) else size for size in spec.type.shape])
        if spec.type.is_float
        else torch.ones([sizes[str(size)] for size in spec.type.shape], dtype=torch.int64)
        for spec in program.inputs
    }


def measure(name: str, program: Program, model: PreTrainedModel, scheme: str) -> dict[str, object]:
    """The three sizes of one scheme, and how many times float32 is larger than the files."""
    passes = parse_pipeline(f"clean,quantize{{scheme={scheme}}},calibrate{{weights=minmax}},lower-integer")
    plan = make_plan(program, passes, Load(1, 8), [OnnxQdq(opset=OPSET)])
    lowered = PassManager(passes).run(program, Context())
    with tempfile.TemporaryDirectory() as folder:
        export(lowered, Path(folder), batches=[prompt(lowered)], opset=OPSET)
        size = sum(path.stat().st_size for path in Path(folder).glob("*.onnx*"))
    whole = 4 * sum(parameter.numel() for parameter in model.parameters())
    paper = counted(model, int(scheme[0]))
    return {
        "model": name,
        "scheme": scheme,
        "float32_mib": round(whole / 2**20, 2),
        "counted_mib": round(paper / 2**20, 2),
        "counted_factor": round(whole / paper, 2),
        "planned_mib": round(plan.file_bytes / 2**20, 2),
        "file_mib": round(size / 2**20, 2),
        "file_factor": round(whole / size, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS], help="others keep their rows")
    names = parser.parse_args().models
    path = RESULTS / "quantgpt_sizes.json"
    stored = json.loads(path.read_text())["rows"] if path.is_file() else []
    rows = [row for row in stored if row["model"] not in names]
    for name in names:
        torch.manual_seed(0)
        task, make = MODELS[name]
        model = make().eval()
        program = load(model, task=task)
        for scheme in SCHEMES:
            rows.append(measure(name, program, model, scheme))
            print(rows[-1], flush=True)
    write_result("quantgpt_sizes", "python benchmarks/quantgpt_sizes.py", {"rows": rows})
    show_table(list(rows[0]), [list(row.values()) for row in rows])


if __name__ == "__main__":
    main()

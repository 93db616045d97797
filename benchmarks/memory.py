"""Peak memory of passes that rewrite weights, on models larger than it: random Llamas in bf16, left in their files.

    python benchmarks/memory.py [--layers 2 6 22] [--samples 4] [--length 512] [--rewrite PASSES --name NAME]

Each model is written once to a temporary folder, in shards, then quantized to W4A16-g128 in a process of its own:
loaded, traced, placed, rewritten by GPTQ (or by ``--rewrite``), lowered to integers and written as a checkpoint. The
process's peak resident memory is what the kernel says (``ru_maxrss``). Memory must not grow with the number of blocks.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from _common import show_table, write_result
from safetensors.torch import save_file
from transformers import LlamaConfig

HIDDEN, FFN, HEADS, KV_HEADS, VOCABULARY = 2048, 5632, 32, 4, 32000


def write_model(folder: Path, layers: int) -> float:
    """A random Llama in bf16, a shard a block; returns its size in gigabytes."""
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=layers, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, vocab_size=VOCABULARY, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    width, shards = HIDDEN // HEADS * KV_HEADS, dict[str, str]()

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * 0.02).bfloat16()

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        shards.update(dict.fromkeys(tensors, name))

    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    save("table.safetensors", {"model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN)})
    save("head.safetensors", {"lm_head.weight": matrix(VOCABULARY, HIDDEN), "model.norm.weight": ones})
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (width, HIDDEN), "self_attn.v_proj": (width, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (FFN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN),
        "mlp.down_proj": (HIDDEN, FFN),
    }  # fmt: skip
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        block = {f"{prefix}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        norms = {f"{prefix}.{name}_layernorm.weight": ones.clone() for name in ("input", "post_attention")}
        save(f"layer-{layer:02d}.safetensors", block | norms)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9


def quantize(folder: Path, samples: int, length: int, output: Path, rewrite: str) -> None:
    """What the measured process does; it prints its own figures as JSON."""
    from bitlower import load
    from bitlower.backends import checkpoint
    from bitlower.passes import Context, PassManager, Timing, parse_pipeline

    generator = torch.Generator().manual_seed(1)
    batches = [
        {
            "input_ids": torch.randint(0, VOCABULARY, (1, length), generator=generator),
            "attention_mask": torch.ones(1, length, dtype=torch.int64),
            "position_ids": torch.arange(length)[None],
        }
        for _ in range(samples)
    ]
    seconds, start = {}, time.perf_counter()
    program = load(folder, mapped=True)
    seconds["load"] = time.perf_counter() - start
    timing = Timing(interval=0.1)
    passes = parse_pipeline(f"clean,quantize{{scheme=W4A16-g128-e16 ignore=[lm_head]}},{rewrite},lower-integer")
    program = PassManager(passes, (timing,)).run(program, Context(batches))
    seconds |= {row.name: row.seconds for row in timing.rows}
    start = time.perf_counter()
    output.mkdir()
    checkpoint.export(program, output, batches=batches[:1])
    seconds["checkpoint"] = time.perf_counter() - start
    print(json.dumps({
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "artifact_gigabytes": round(sum(p.stat().st_size for p in output.glob("*.safetensors")) / 1e9, 3),
        "peak_gigabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3),
    }))  # fmt: skip


def rewriting(seconds: dict[str, float]) -> float:
    """Those of the passes that rewrite weights."""
    around = {"load", "clean", "quantize", "lower-integer", "checkpoint"}
    return round(sum(value for name, value in seconds.items() if name not in around), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 6, 22])
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rewrite", default="gptq", help="the passes that rewrite weights")
    parser.add_argument("--name", default="memory", help="of the results file")
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.model:
        quantize(arguments.model, arguments.samples, arguments.length, arguments.output, arguments.rewrite)
        return
    rows = []
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            folder.mkdir()
            size = write_model(folder, layers)
            command = [sys.executable, __file__, "--model", str(folder), "--output", f"{scratch}/artifact"]
            command += ["--samples", str(arguments.samples), "--length", str(arguments.length)]
            command += ["--rewrite", arguments.rewrite]
            figures = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows.append({"layers": layers, "model_gigabytes": round(size, 3), **figures})
    settings = {"samples": arguments.samples, "length": arguments.length, "threads": torch.get_num_threads()}
    settings |= {"rewrite": arguments.rewrite}
    write_result(arguments.name, "python benchmarks/memory.py", {"settings": settings, "rows": rows})
    headers = ["layers", "bf16 model, GB", "artifact, GB", "peak memory, GB", "rewriting, s", "all, s"]
    show_table(
        headers,
        [
            [r["layers"], r["model_gigabytes"], r["artifact_gigabytes"], r["peak_gigabytes"], rewriting(r["seconds"]),
             round(sum(r["seconds"].values()), 1)]
            for r in rows
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()

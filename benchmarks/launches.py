"""Kernels that a block of a model starts on a GPU, and the bytes that they move, before fusion and after. By counting.

    python benchmarks/launches.py

A block of the shapes of BERT-base and of Llama-3.2-1B, with random weights: a model of two blocks less one of one, so
that what all blocks share (masks, rotary tables) is no part of it. Batch 1 with 128 tokens and no past; for the decoder
also one token with a past of 128.

Before: the Program at level integer, one launch an operator that computes: a linear, norm, attention, quantize,
dequantize, choice of scales, concatenation … Views (reshape, transpose, slice …) are none, and neither is the
dequantization of a weight: the linear is taken to read its codes. After: the device functions of the library for CUDA,
with float32 between them, as the Program has it, and with float16, as libraries for CUDA have it by themselves. The
bytes of a launch are those of its inputs and results by their types, each tensor once, whatever caches do.
"""

from __future__ import annotations

import argparse
import json
import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from _common import RESULTS, show_table, write_result
from torch import fx

from bitlower.backends.tvm_kernels import Target, require_tvm
from bitlower.frontends import load
from bitlower.ir import Program, TensorType, get_tensor, ops
from bitlower.passes import Context, PassManager, parse_pipeline

aten = torch.ops.aten
VIEWS = frozenset(
    {
        operator.getitem, aten.sym_size.int, aten.reshape.default, aten.view.default, aten.transpose.int,
        aten.permute.default, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim, aten.slice.Tensor,
        aten.select.int, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.alias.default,
        aten.contiguous.default, aten.clone.default, aten.dropout.default, aten.unflatten.int,
    }
)  # fmt: skip
MODELS = {
    "BERT-base": ("Bert", {"vocab_size": 128}),
    "Llama-3.2-1B": (
        "Llama",
        {
            "vocab_size": 128, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
            "num_key_value_heads": 8, "tie_word_embeddings": True,
        },
    ),
}  # fmt: skip
SCHEMES = ("W8A8", "W4A16-g128")
TOKENS = 128
SIZES = {
    "text": {"batch": 1, "sequence": TOKENS, "past": 0},
    "step": {"batch": 1, "sequence": 1, "past": TOKENS},
}


def make_model(name: str, layers: int) -> torch.nn.Module:
    """A random model of so many blocks."""
    kind, sizes = MODELS[name]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes, **ids, num_hidden_layers=layers)
    make = transformers.AutoModel if kind == "Bert" else transformers.AutoModelForCausalLM
    found: torch.nn.Module = make.from_config(config).eval()
    return found


def programs(name: str, scheme: str, layers: int) -> tuple[Program, Program]:
    """A random model at level integer, and at level fused."""
    program = load(make_model(name, layers), task=None if name.startswith("BERT") else "text-generation")
    batch = inputs(program, {"batch": 1, "sequence": 16, "past": 0})
    passes = parse_pipeline(f"clean,quantize{{scheme={scheme}}},calibrate{{weights=minmax}},lower-integer")
    integer = PassManager(passes).run(program, Context(calibration=[batch]))
    return integer, PassManager(parse_pipeline("fuse")).run(integer, Context())


def inputs(program: Program, sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """What a program of these sizes takes: any tokens, all of them kept, at places after the past."""
    found = {}
    for spec in program.inputs:
        shape = [_size(dim, sizes) for dim in spec.type.shape]
        if spec.type.dtype.is_floating_point:
            found[spec.name] = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        elif spec.name == "position_ids":
            found[spec.name] = torch.arange(sizes["past"], sizes["past"] + shape[1]).expand(shape).contiguous()
        else:
            found[spec.name] = torch.zeros(shape, dtype=spec.type.dtype) + int(spec.name != "token_type_ids")
    return found


def before(program: Program, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Operators of an integer Program that compute, and the bytes that they move."""
    nodes = [node for node in program.graph.nodes if node.op == "call_function" and _computes(node)]
    moved = 0
    for node in nodes:
        read = {source for argument in node.all_input_nodes for source in _sources(argument)}
        moved += sum(_bytes(program, tensor, sizes) for tensor in {*read, node})
    return len(nodes), moved


def _computes(node: fx.Node) -> bool:
    return node.target not in VIEWS and ("type" in node.meta or node.target is ops.choose_qparams) and not _stored(node)


def _stored(node: fx.Node) -> bool:
    """Whether ``node`` is the dequantization of a weight."""
    return node.target is ops.dequantize and all(source.op == "get_attr" for source in node.all_input_nodes)


def _sources(node: fx.Node) -> list[fx.Node]:
    """What is read where an operator reads ``node``: of a dequantized weight its codes and scales."""
    return node.all_input_nodes if _stored(node) else [node]


def _bytes(program: Program, node: fx.Node, sizes: Mapping[str, int]) -> int:
    if node.op == "get_attr":
        tensor = get_tensor(program.module, str(node.target))
        return tensor.numel() * _width(node, tensor.dtype)
    if node.target is ops.choose_qparams:
        kind = node.args[0].meta["type"]
        return 2 * 4 * math.prod(_size(dim, sizes) for dim in kind.shape[:-1])
    kind = node.meta.get("type")
    if not isinstance(kind, TensorType):
        return 0
    return math.prod(_size(dim, sizes) for dim in kind.shape) * kind.dtype.itemsize


def _width(node: fx.Node, dtype: torch.dtype) -> Any:
    """Bytes of an entry; codes of a weight take as many bits as their grid has."""
    for user in node.users:
        if user.target is ops.dequantize and user.args[0] is node:
            return user.meta["quantizer"].spec.grid.bits / 8
    return dtype.itemsize


def _size(dim: int | str, sizes: Mapping[str, int]) -> int:
    return dim if isinstance(dim, int) else sum(sizes[part.strip()] for part in dim.split("+"))


def after(program: Program, sizes: Mapping[str, int], activations: str = "auto") -> tuple[int, int, list[str]]:
    """Device functions of the library, the bytes that they move, and their names."""
    from bitlower.backends.tvm_kernels.inspect.launches import launches_of

    calls = launches_of(program, sizes, Target.CUDA, activations)
    names = [call.name for call in calls for _ in range(call.count)]
    return len(names), sum(call.read + call.written for call in calls), names


def block(name: str, scheme: str) -> list[dict[str, Any]]:
    """The figures of a block, a row for each of :data:`SIZES`."""
    one, two = (programs(name, scheme, layers) for layers in (1, 2))
    rows = []
    for what, sizes in SIZES.items():
        if what == "step" and name.startswith("BERT"):
            continue
        old = [x - y for x, y in zip(before(two[0], sizes), before(one[0], sizes), strict=True)]
        first, second = after(one[1], sizes), after(two[1], sizes)
        wide = [after(made, sizes, "float32") for made in (one[1], two[1])]
        assert wide[1][0] - wide[0][0] == second[0] - first[0], "casts are launches of their own"
        kernels = list(second[2])
        for kernel in first[2]:
            kernels.remove(kernel)
        moved = [int(old[1]), wide[1][1] - wide[0][1], second[1] - first[1]]
        rows.append(
            {
                "block": name, "scheme": scheme, "tokens": sizes["sequence"], "past": sizes["past"],
                "launches_before": old[0], "launches": second[0] - first[0], "bytes_before": moved[0],
                "bytes_float32": moved[1], "fewer_by_fusion": round(moved[0] / moved[1], 2), "bytes": moved[2],
                "fewer_bytes": round(moved[0] / moved[2], 2), "kernels": kernels,
            }
        )  # fmt: skip
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the figures as a table."""
    headers = ["block", "scheme", "tokens", "past", "launches, before", "after"]
    headers += ["MB moved, before", "after, float32", "ratio", "after, float16", "ratio"]
    keys = ("block", "scheme", "tokens", "past", "launches_before", "launches")
    figures = ("bytes_before", "bytes_float32", "fewer_by_fusion", "bytes", "fewer_bytes")
    text = [
        [
            *(row[key] for key in keys),
            *(f"{row[key] / 1e6:.2f}" if key.startswith("bytes") else row[key] for key in figures),
        ]
        for row in rows
    ]
    show_table(headers, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print the last results and count nothing")
    if parser.parse_args().show:
        show(json.loads((RESULTS / "launches.json").read_text())["blocks"])
        return
    require_tvm()
    rows = [row for name in MODELS for scheme in SCHEMES for row in block(name, scheme)]
    write_result("launches", "python benchmarks/launches.py", {"blocks": rows})
    show(rows)


if __name__ == "__main__":
    main()

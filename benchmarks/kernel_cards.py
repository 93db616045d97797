"""Kernel cards: what nvcc makes of the CUDA kernels for sm_80 and sm_90, and arithmetic on it. No GPU is needed.

    python benchmarks/kernel_cards.py

Read from the compiler and the machine code: instructions, registers, spills, shared memory. Calculated: occupancy (from
the limits of the architecture), the bytes that the kernel's own loads and stores come to against the least possible
(each operand once; caches are not counted), and the roofline time, the larger of least bytes / bandwidth and
operations / peak rate of the A100 (80 GB, SXM) and the H100 (SXM) by their data sheets. It is a bound, not a
measurement: no time of a GPU is claimed here.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tvm
from _common import RESULTS, show_table, write_result

from bitlower.backends.tvm_kernels import (
    ActivationSpec,
    GemmConfig,
    KernelSpec,
    LinearSpec,
    NormSpec,
    Target,
    arguments,
    device_source,
)
from bitlower.backends.tvm_kernels.inspect.sass import DeviceFunction, device_functions
from bitlower.backends.tvm_kernels.library.fatbin import device_module
from bitlower.backends.tvm_kernels.schedules.dispatch import lower_attention
from bitlower.backends.tvm_kernels.spec.attention import Attention
from bitlower.backends.tvm_kernels.target import tvm_target
from bitlower.ir import Granularity, Grid, QuantSpec

UINT8 = Grid(8, signed=False, symmetric=False)
STATIC, TOKEN = (QuantSpec(UINT8, g) for g in (Granularity.per_tensor(), Granularity.per_token()))
PEG = QuantSpec(UINT8, Granularity.per_embedding_group(6))
INT8 = QuantSpec(Grid(8), Granularity.per_channel(0))
SHOWN = ("IMMA", "HMMA", "IDP.4A", "FFMA", "LDSM", "SHFL", "I2F", "I2FP")


@dataclass(frozen=True)
class Device:
    """Limits of a streaming multiprocessor, and rates of the whole device.

    Args:
        name: of the product.
        shared: bytes of shared memory that blocks of a multiprocessor can have.
        bandwidth: bytes a second.
        rates: operations a second (a multiplication and an addition are two) by instruction.
    """

    name: str
    shared: int
    bandwidth: float
    rates: dict[str, float]


DEVICES = {
    "sm_80": Device("A100", 164 << 10, 2.039e12, {"IMMA": 624e12, "HMMA": 312e12, "IDP.4A": 78e12, "FFMA": 19.5e12}),
    "sm_90": Device("H100", 228 << 10, 3.35e12, {"IMMA": 1979e12, "HMMA": 989e12, "IDP.4A": 268e12, "FFMA": 67e12}),
}
"""Peak rates without sparsity; those of IDP.4A are four times those of FFMA."""
THREADS, REGISTERS, BLOCKS = 2048, 65536, 32
"""Of a multiprocessor of either architecture."""


def low_bit(bits: int) -> QuantSpec:
    return QuantSpec(Grid(bits, signed=False, symmetric=False), Granularity.per_group(128))


def cases() -> list[tuple[str, KernelSpec | Attention, int]]:
    """Name, spec and rows: an encoder layer of BERT-base at 128 tokens, and a Llama layer of 2048 channels."""
    base = LinearSpec(k=768, n=2304, weight=INT8, bias=True, target=Target.CUDA)
    up = replace(base, n=3072, x_quant=TOKEN, activation="gelu")
    half = replace(base, k=2048, n=2048, bias=False, dtype="float16")
    bytes_ = replace(half, dtype="float32", x_quant=TOKEN)
    norm = NormSpec(
        columns=768, kind="layer", epsilon=1e-12, residual=True, bias=True, output=TOKEN, target=Target.CUDA
    )
    rms = NormSpec(
        columns=2048, kind="rms", epsilon=1e-5, residual=True, keep_sum=True, output=TOKEN, target=Target.CUDA,
        dtype="float16",
    )  # fmt: skip
    gate = ActivationSpec(
        columns=5632, activation="silu", gate="halves", output=TOKEN, dtype="float16", target=Target.CUDA
    )
    heads = Attention(
        heads=12,
        kv_heads=12,
        head_dim=64,
        value_head_dim=64,
        factor=0.125,
        joined=True,
        output=UINT8,
        mask="bool",
        mask_broadcast=(True, True, True, False),
        places=((2304, 0), (2304, 768), (2304, 1536)),
    )
    codes = replace(heads, scored=UINT8, probs=UINT8, query="uint8", key="uint8", value="uint8")
    shared = replace(heads, heads=32, kv_heads=8, places=(None, None, None), output=None)
    halves = replace(shared, query="float16", key="float16", value="float16", result="float16")
    wide = replace(halves, head_dim=128, value_head_dim=128)
    down = replace(half, weight=low_bit(4), residual=True).holding({"residual": "float32", "values": "float32"})
    found: list[tuple[str, KernelSpec | Attention, int]] = [
        ("W8A8 q/k/v, static", replace(base, x_quant=STATIC), 128),
        ("W8A8 up, GELU", up, 128),
        ("W8A8 up, GELU, one row", up, 1),
        ("W8A8 down, residual", replace(base, k=3072, n=768, x_quant=TOKEN, residual=True), 128),
        ("W8A8 PEG, 6 groups", replace(base, x_quant=PEG), 128),
        ("W4A8, g128", replace(bytes_, weight=low_bit(4)), 128),
        ("W4A8, g128, one row", replace(bytes_, weight=low_bit(4)), 1),
        *((f"W{b}A16, g128", replace(half, weight=low_bit(b)), 128) for b in (4, 3, 2)),
        *((f"W{b}A16, g128, one row", replace(half, weight=low_bit(b)), 1) for b in (4, 3, 2)),
        ("W4A16, g128, residual float32", down, 128),
        ("LayerNorm, residual, round", norm, 128),
        ("RMSNorm, residual, round", rms, 128),
        ("SiLU, gate, round", gate, 128),
        ("attention, 12 heads", heads, 128),
        ("attention, codes", codes, 128),
        ("attention, 32 heads, 8 of keys", shared, 128),
        ("the same, float16", halves, 128),
        ("the same, of 128 columns", wide, 128),
    ]
    return found


def occupancy(function: DeviceFunction, threads: int) -> float:
    """The share of a multiprocessor's threads that blocks of this function can fill.

    Registers are given out to warps in units of 256, and a block takes 1 KiB of shared memory beside its own.
    """
    warps = -(-threads // 32)
    per_warp = -(-function.registers * 32 // 256) * 256
    limits = [BLOCKS, THREADS // threads, REGISTERS // (per_warp * warps)]
    limits.append(DEVICES[function.architecture].shared // (function.shared + 1024))
    return min(limits) * threads / THREADS


def traffic(spec: KernelSpec | Attention, rows: int, config: GemmConfig) -> tuple[int, int]:
    """Bytes of the kernel's own loads and stores of global memory, and the least possible."""
    if isinstance(spec, Attention):
        return _attention_traffic(spec, rows)
    least = moved = 0
    for argument in arguments(spec):
        size = math.prod(rows if n is None else n for n in argument.shape) * np.dtype(argument.dtype).itemsize
        least += size
        moved += size * _times(spec, argument.name, rows, config)
    return moved, least


def _attention_traffic(what: Attention, rows: int) -> tuple[int, int]:
    """A text of so many queries and keys: keys are read twice and values once by each block of 16 queries."""
    tiles = -(-rows * what.heads // what.kv_heads // 16)
    query = rows * what.heads * what.head_dim * np.dtype(what.query).itemsize
    key = rows * what.kv_heads * what.head_dim * np.dtype(what.key).itemsize
    value = rows * what.kv_heads * what.value_head_dim * np.dtype(what.value).itemsize
    result = rows * what.heads * what.value_head_dim * np.dtype(what.result_dtype).itemsize
    mask = rows * what.heads * rows
    return query + result + tiles * (2 * key + value) + 2 * mask, query + key + value + result + rows


def attention_source(what: Attention, architecture: str) -> str:
    """The CUDA source of an attention kernel."""
    module = tvm.IRModule({"attention": lower_attention(what, Target.CUDA)})
    executable = tvm.compile(module, target=tvm_target(Target.CUDA, architecture))
    return str(device_module(executable).inspect_source())


def _times(spec: KernelSpec, name: str, rows: int, config: GemmConfig) -> int:
    """How often a linear goes through an argument: tile by tile, or a warp a row and output."""
    if not isinstance(spec, LinearSpec):
        return 1
    few = rows < config.many_rows
    if name == "x":
        return spec.n if few else -(-spec.n // config.block_n)
    if name.startswith("weight"):
        return rows if few else -(-rows // config.block_m)
    return 1


def card(
    name: str, spec: KernelSpec | Attention, rows: int, architecture: str, config: GemmConfig = Target.CUDA.gemm
) -> dict[str, Any]:
    """All figures of a kernel."""
    if isinstance(spec, Attention):
        source = attention_source(spec, architecture)
    else:
        source = device_source(spec, architecture, config)
    functions = sorted(device_functions(source, architecture), key=lambda f: f.name)
    many = isinstance(spec, LinearSpec) and rows >= config.many_rows
    function = functions[1] if many else functions[0]
    threads = int(re.findall(rf"__launch_bounds__\((\d+)[\d, ]*\) {function.name}\(", source)[0])
    counts = dict(function.instructions)
    moved, least = traffic(spec, rows, config)
    device = DEVICES[architecture]
    unit = next((i for i in ("IMMA", "HMMA", "IDP.4A") if counts.get(i)), "FFMA")
    work = 2 * rows * spec.k * spec.n if isinstance(spec, LinearSpec) else 0
    if isinstance(spec, Attention):
        work = 2 * rows * rows * spec.heads * (2 * spec.head_dim + spec.value_head_dim)
    return {
        "kernel": name, "rows": rows, "architecture": architecture,
        "instructions": {i: counts[i] for i in SHOWN if counts.get(i)},
        "registers": function.registers, "spills": function.spills, "shared": function.shared, "threads": threads,
        "occupancy": round(occupancy(function, threads), 3), "bytes": moved, "least_bytes": least,
        "bytes_ratio": round(moved / least, 2), "device": device.name, "roofline_by": unit,
        "roofline_us": round(1e6 * max(least / device.bandwidth, work / device.rates[unit]), 3),
    }  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    """Print the cards as a table."""
    keys = [key for key in rows[0] if key not in ("bytes", "roofline_by")]
    text = [row | {"instructions": ", ".join(f"{k} {n}" for k, n in row["instructions"].items())} for row in rows]
    show_table(keys, [[row[key] for key in keys] for row in text])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print the last results and compile nothing")
    if parser.parse_args().show:
        show(json.loads((RESULTS / "kernel_cards.json").read_text())["cards"])
        return
    rows = [card(*case, architecture) for case in cases() for architecture in DEVICES]
    write_result("kernel_cards", "python benchmarks/kernel_cards.py", {"cards": rows})
    show(rows)


if __name__ == "__main__":
    main()

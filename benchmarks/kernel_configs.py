"""Configurations of linears side by side: times on this processor, and what nvcc makes of them for GPUs.

    python benchmarks/kernel_configs.py [--cpu] [--gpu]

A spec says what a kernel computes, a ``GemmConfig`` how. ``--cpu`` runs kernels of one spec in several configurations
in turn, in one process, on one thread: each figure is how many times faster a configuration is than its target's own.
``--gpu`` compiles them for sm_80 and sm_90: registers, spills, occupancy, and bytes moved over the least possible, as
``kernel_cards.py`` has them. What serves best is a row of ``backends/tvm_kernels/spec/target.py``.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import tvm_ffi
from _common import RESULTS, show_table, write_result
from kernel_cards import DEVICES, card, cases
from kernels import BLOCK, INT4, INT8, STATIC, TOKEN, Ours, Side, take_turns

from bitlower.backends.tvm_kernels import GemmConfig, Layout, LinearSpec, host_target, pack_linear
from bitlower.ir import QuantSpec

NAME = "kernel_configs"
OWN = host_target().gemm
CPU = {
    "own": OWN,
    "8 rows": replace(OWN, row_tiles=(1, 2, 4, 8)),
    "3 rows": replace(OWN, row_tiles=(1, 3)),
    "unpack from 16": replace(OWN, many_rows=16),
    "unpack from 64": replace(OWN, many_rows=64),
    "unpack from 256": replace(OWN, many_rows=256),
    "prefetch 2 KiB": replace(OWN, prefetch_bytes=2048),
    "prefetch 16 KiB": replace(OWN, prefetch_bytes=16384),
}
GPU = {
    "own": GemmConfig(many_rows=16),
    "128 x 64": GemmConfig(many_rows=16, block_m=128, warps_m=4),
    "64 x 128": GemmConfig(many_rows=16, block_n=128, warps_n=4),
    "64 x 64 x 64": GemmConfig(many_rows=16, block_k=64),
    "32 x 64": GemmConfig(many_rows=16, block_m=32, warps_m=1),
}
KERNELS: dict[str, tuple[QuantSpec, QuantSpec | None]] = {
    "W8A8": (INT8, STATIC), "W4, fp32 activations": (INT4, None), "W4A8": (INT4, TOKEN)
}  # fmt: skip
SHAPE, ROWS = (768, 3072), (1, 4, 16, 128)
CARDS = ("W8A8 q/k/v, static", "W8A8 PEG, 6 groups", "W4A8, g128", "W4A16, g128")


def sides(name: str, configs: dict[str, GemmConfig], rows: int) -> dict[str, Side]:
    """A kernel in each configuration, on the same arguments."""
    weight, activation = KERNELS[name]
    inputs, outputs = SHAPE
    random = np.random.default_rng(0)
    spec = LinearSpec(
        k=inputs, n=outputs, weight=weight, x_quant=activation, layout=Layout.PANELS, target=host_target()
    )
    groups = inputs // BLOCK if weight is INT4 else 1
    low, high, dtype = (0, 16, np.uint8) if weight is INT4 else (-127, 128, np.int8)
    codes = random.integers(low, high, (outputs, inputs)).astype(dtype)
    scale = random.random((outputs, groups), np.float32) / 64
    zero = np.full_like(scale, 8 if weight is INT4 else 0)
    packed = pack_linear(spec, codes, scale, zero)
    if activation is None:
        given = {"x": random.standard_normal((rows, inputs), np.float32)}
    else:
        count = rows if activation is TOKEN else 1
        given = {"x": random.integers(0, 256, (rows, inputs)).astype(np.uint8)}
        given |= {"x_scale": np.full(count, 0.02, np.float32), "x_zero": np.full(count, 128, np.float32)}
    return {label: Ours(spec, packed, config).side(rows, **given)[0] for label, config in configs.items()}


def on_cpu(seconds: float) -> list[dict[str, Any]]:
    """Ratios of median times; one thread."""
    tvm_ffi.get_global_func("runtime.config_threadpool")(1, 1)
    found = []
    for name in KERNELS:
        for rows in ROWS:
            times = take_turns(sides(name, CPU, rows), seconds)
            own = times["own"][0]
            row = {"kernel": name, "rows": rows, "us": round(1e6 * own, 1)}
            found.append(row | {label: round(own / times[label][0], 3) for label in CPU if label != "own"})
    return found


def on_gpu() -> list[dict[str, Any]]:
    """Cards of linears in each configuration."""
    found = []
    for name, spec, rows in cases():
        for label, config in GPU.items() if name in CARDS else ():
            for architecture in DEVICES:
                try:
                    row = card(name, spec, rows, architecture, config)
                except Exception as error:  # TVM raises many kinds: not every combination compiles
                    print(f"{name}, {label}, {architecture}: {str(error).splitlines()[-1]}", flush=True)
                    continue
                kept = (
                    "kernel",
                    "architecture",
                    "registers",
                    "spills",
                    "shared",
                    "threads",
                    "occupancy",
                    "bytes_ratio",
                )
                found.append({"config": label} | {key: row[key] for key in kept})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--seconds", type=float, default=3, help="for each kernel and number of rows")
    arguments = parser.parse_args()
    path = RESULTS / f"{NAME}.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    held = {key: results[key] for key in ("cpu", "gpu", "configs") if key in results}
    held["configs"] = {"cpu": {k: asdict(v) for k, v in CPU.items()}, "gpu": {k: asdict(v) for k, v in GPU.items()}}
    if arguments.cpu:
        held["cpu"] = {"target": str(host_target()), "rows": on_cpu(arguments.seconds)}
    if arguments.gpu:
        held["gpu"] = on_gpu()
    write_result(NAME, "python benchmarks/kernel_configs.py --cpu --gpu", held)
    for rows in (held.get("cpu", {}).get("rows", []), held.get("gpu", [])):
        if rows:
            show_table(list(rows[0]), [list(row.values()) for row in rows])


if __name__ == "__main__":
    main()

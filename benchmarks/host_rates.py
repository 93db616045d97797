"""The few numbers of this machine that `assign-precision` calculates time with: rates of products, and bandwidth.

    python benchmarks/host_rates.py [--threads 1] [--rows 128]

Rates are those of the kernels in `backends/tvm_kernels` (torch's float32 ``linear`` for W16A16) on a layer of 768 x
3072 weights, which stay in the caches; bandwidth is that of a sum over 256 MiB. Medians. The last line is the mapping
for ``target``, ready for a recipe; the kernels' benchmark says what to expect of other layers.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import kernels  # first: it sets what TVM reads from the environment
import numpy as np
import torch
import tvm_ffi
from _common import machine, write_result

from bitlower.backends.tvm_kernels import Layout, LinearSpec, host_target, pack_linear
from bitlower.ir import Granularity, Grid, QuantSpec
from bitlower.passes.precision._roofline import FLOAT, Roofline

INPUTS, OUTPUTS, GROUP = 768, 3072, 64
READ = 256 << 20
"""Bytes, more than caches hold."""


def seconds(side: Callable[[], Any], total: float) -> float:
    """The median time of a run."""
    return kernels.take_turns({"": side}, total)[""][0]


def weight_of(bits: int) -> QuantSpec:
    """Per channel in 8 bits, in groups with zero points below."""
    if bits == 8:
        return kernels.INT8
    return QuantSpec(Grid(bits, signed=False, symmetric=False), Granularity.per_group(GROUP))


def kernel(bits: int, integer: bool, rows: int) -> Callable[[], Any]:
    """Runs the kernel of a linear on ``rows`` rows."""
    random, weight = np.random.default_rng(0), weight_of(bits)
    spec = LinearSpec(
        k=INPUTS, n=OUTPUTS, weight=weight, x_quant=kernels.STATIC if integer else None,
        layout=Layout.PANELS, target=host_target(),
    )  # fmt: skip
    shape = (OUTPUTS, 1 if bits == 8 else INPUTS // GROUP)
    codes = random.integers(weight.grid.quant_min, weight.grid.quant_max + 1, (OUTPUTS, INPUTS))
    zero = np.zeros(shape, np.float32) if bits == 8 else random.integers(0, 1 << bits, shape).astype(np.float32)
    constants = pack_linear(
        spec, codes.astype(np.int8 if bits == 8 else np.uint8), np.full(shape, 0.01, np.float32), zero
    )
    if integer:
        constants |= {"x_scale": np.array([0.02], np.float32), "x_zero": np.array([128], np.float32)}
        x: Any = random.integers(0, 256, (rows, INPUTS)).astype(np.uint8)
    else:
        x = random.standard_normal((rows, INPUTS), np.float32)
    return kernels.Ours(spec, constants).side(rows, x=x)[0]


def measure(threads: int, rows: int, total: float) -> Roofline:
    """All numbers."""
    tvm_ffi.get_global_func("runtime.config_threadpool")(1, threads)
    torch.set_num_threads(threads)
    work, rates = 2.0 * rows * INPUTS * OUTPUTS, {}
    for integer in (True, False):
        for bits in (8, 4, 3, 2):
            rates[f"W{bits}A{8 if integer else 16}"] = work / seconds(kernel(bits, integer, rows), total)
    x, weight = torch.randn(rows, INPUTS), torch.randn(OUTPUTS, INPUTS)
    rates[FLOAT] = work / seconds(lambda: torch.nn.functional.linear(x, weight), total)
    words = torch.ones(READ // 4)
    bandwidth = READ / seconds(lambda: words.sum(), total)
    rounded = {product: float(f"{rate:.3g}") for product, rate in rates.items()}
    return Roofline("host", float(f"{bandwidth:.3g}"), 4, tuple(sorted(rounded.items())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each number")
    arguments = parser.parse_args()
    start = time.perf_counter()
    target = measure(arguments.threads, arguments.rows, arguments.seconds).to_dict()
    result = {"threads": arguments.threads, "rows": arguments.rows, "target": target}
    write_result("host_rates", "python benchmarks/host_rates.py", result)
    print(f"{machine()['processor']}, {arguments.threads} threads, {time.perf_counter() - start:.0f} s")
    print(f"target: {json.dumps(target)}")


if __name__ == "__main__":
    main()

"""Speed of the low-bit CPU kernels against onnxruntime's and torch's, layer by layer, one thread and two.

    python benchmarks/kernels.py

int8: codes in, float out, with dequantization and bias, against ``MatMulInteger`` with the same in its graph (which
onnxruntime fuses to one kernel), ``QLinearMatMul`` (codes out, no bias) and torch's float32 ``linear``. 4 bits in
blocks of 64 with zero points against ``MatMulNBits``: float32 activations at accuracy level 0; at level 4, which rounds
activations to int8 inside the kernel, ours is the time of a per-token quantizer and the integer kernel together.

Sides take turns in one process, in alternating order; onnxruntime and torch do not spin, TVM binds its second thread to
a core, as it does by itself. Each figure is a ratio of times, of the median and of the 10th percentile. ``x ort`` is
against the faster of onnxruntime's. One row: ``read`` is the rate at which the kernel goes through its weight, scales
and zero points, as a share of that of a loop that only adds as many bytes up: from the caches, where one layer runs
again and again, and from memory, where each run takes the next of copies of 192 MiB in all, as decoding does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["TVM_NUM_THREADS"] = "2"  # else OMP_NUM_THREADS is the most that TVM will use

import numpy as np
import onnx
import onnxruntime
import torch
import tvm
import tvm_ffi
from _common import RESULTS, show_table, write_result
from onnx import TensorProto, helper, numpy_helper
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from bitlower.backends.tvm_kernels import (
    ActivationSpec,
    GemmConfig,
    Layout,
    LinearSpec,
    arguments,
    compile_kernel,
    host_target,
    pack_linear,
    pack_vector,
)
from bitlower.ir import Granularity, Grid, QuantSpec

SHAPES = ((768, 3072), (3072, 768), (2048, 2048), (576, 1536))
ROWS = (1, 16, 128)
BLOCK = 64
CODES = Grid(8, signed=False, symmetric=False)
STATIC, TOKEN = (QuantSpec(CODES, g) for g in (Granularity.per_tensor(), Granularity.per_token()))
INT8 = QuantSpec(Grid(8), Granularity.per_channel(0))
INT4 = QuantSpec(Grid(4, signed=False, symmetric=False), Granularity.per_group(BLOCK))
COLD = 192 << 20
"""Bytes of copies of a layer: several times the last level of the caches."""
Side = Callable[[], Any]
Array = np.ndarray[Any, Any]


def session(
    nodes: list[onnx.NodeProto], kind: int, out: int, shape: tuple[int, int], threads: int, **held: Array
) -> Any:
    """A session of a graph with the input ``x`` [rows, inputs] and the output ``y`` [rows, outputs]."""
    inputs, outputs = shape
    graph = helper.make_graph(
        nodes, "layer", [helper.make_tensor_value_info("x", kind, ["rows", inputs])],
        [helper.make_tensor_value_info("y", out, ["rows", outputs])],
        [numpy_helper.from_array(array, name) for name, array in held.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def matmul_integer(shape: tuple[int, int], codes: Array, scale: Array, bias: Array, threads: int) -> Any:
    """``MatMulInteger``, its dequantization, and the bias; the scale holds that of the activation too."""
    nodes = [
        helper.make_node("MatMulInteger", ["x", "w", "xz"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["real", "s"], ["product"]),
        helper.make_node("Add", ["product", "b"], ["y"]),
    ]
    held = {"w": np.ascontiguousarray(codes.T), "s": scale, "b": bias, "xz": np.array(128, np.uint8)}
    return session(nodes, TensorProto.UINT8, TensorProto.FLOAT, shape, threads, **held)


def qlinear(shape: tuple[int, int], codes: Array, scale: Array, threads: int) -> Any:
    """``QLinearMatMul``."""
    names = ["x", "xs", "xz", "w", "s", "wz", "ys", "yz"]
    held = {"xs": np.array(0.02, np.float32), "xz": np.array(128, np.uint8), "w": np.ascontiguousarray(codes.T)}
    held |= {"s": scale, "wz": np.zeros(len(scale), np.int8), "ys": np.array(1, np.float32)}
    nodes = [helper.make_node("QLinearMatMul", names, ["y"])]
    return session(nodes, TensorProto.UINT8, TensorProto.UINT8, shape, threads, **held, yz=np.array(128, np.uint8))


def matmul_nbits(shape: tuple[int, int], codes: Array, scale: Array, zero: Array, level: int, threads: int) -> Any:
    """``MatMulNBits`` of 4 bits."""
    inputs, outputs = shape
    pairs = codes.reshape(outputs, inputs // BLOCK, BLOCK // 2, 2)
    held = {"w": pairs[..., 0] | pairs[..., 1] << 4, "s": scale.reshape(-1)}
    zeros = np.pad(zero.astype(np.uint8), ((0, 0), (0, zero.shape[1] % 2)))
    held["z"] = (zeros[:, ::2] | zeros[:, 1::2] << 4).reshape(-1)
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s", "z"], ["y"], domain="com.microsoft", K=inputs, N=outputs, bits=4,
        block_size=BLOCK, accuracy_level=level,
    )  # fmt: skip
    return session([node], TensorProto.FLOAT, TensorProto.FLOAT, shape, threads, **held)


class Ours:
    """A compiled kernel with its constant arguments.

    Args:
        spec: the kernel.
        constants: arguments by name; the rest is made for the rows that are asked for.
        config: of a linear; None: its target's.
    """

    def __init__(self, spec: Any, constants: dict[str, Array], config: GemmConfig | None = None) -> None:
        self.spec = spec
        compiled = compile_kernel(spec, config)
        self.function = compiled.executable[compiled.name]
        self.constants = {name: tvm.runtime.tensor(array) for name, array in constants.items()}

    def side(self, rows: int, **given: Any) -> tuple[Side, dict[str, Any]]:
        """What runs the kernel on ``given``, and all its buffers."""
        buffers = dict(self.constants)
        for argument in arguments(self.spec):
            shape = [rows if size is None else size for size in argument.shape]
            if argument.name in given:
                value = given[argument.name]
                buffers[argument.name] = tvm.runtime.tensor(value) if isinstance(value, np.ndarray) else value
            elif argument.name not in buffers:
                buffers[argument.name] = tvm.runtime.tensor(np.zeros(shape, argument.dtype))
        held = [buffers[argument.name] for argument in arguments(self.spec)]
        return (lambda: self.function(*held)), buffers

    @property
    def bytes(self) -> int:
        """Of all constants."""
        return sum(array.numpy().nbytes for array in self.constants.values())

    def cold(self, buffers: dict[str, Any]) -> Side:
        """What runs the kernel on ``buffers``, each time on another copy of the constants."""
        copies = []
        for _ in range(math.ceil(COLD / self.bytes)):
            own = {name: tvm.runtime.tensor(array.numpy()) for name, array in self.constants.items()}
            copies.append([(buffers | own)[argument.name] for argument in arguments(self.spec)])
        turn = itertools.cycle(copies)
        return lambda: self.function(*next(turn))


def reader(count: int) -> Any:
    """A function that adds ``count`` int32 words up in the same panels as the kernels, and nothing else."""
    with IRBuilder() as builder, T.prim_func():
        T.func_name("read")
        T.func_attr({"global_symbol": "read", "tirx.noalias": True})
        given, out = T.arg("given", T.handle()), T.arg("out", T.handle())
        parts = 16
        words = T.match_buffer(given, (parts, count // parts), "int32")
        totals = T.match_buffer(out, (parts, 64), "int32")
        lanes = [tvm.tirx.Ramp(at * 16, 1, 16) for at in range(4)]
        with T.parallel(0, parts) as part:
            held = T.alloc_buffer((64,), "int32", scope="local")
            for lane in lanes:
                T.buffer_store(held, tvm.tirx.const(0, "int32x16"), [lane])
            with T.serial(0, count // parts // 64) as at:
                for place, lane in enumerate(lanes):
                    T.buffer_store(held, held[lane] + words[part, tvm.tirx.Ramp(at * 64 + place * 16, 1, 16)], [lane])
            for lane in lanes:
                T.buffer_store(totals, held[lane], [part, lane])
    target = {"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()}
    return tvm.compile(tvm.IRModule({"read": builder.get()}), target=tvm.target.Target(target))["read"]


def read_sides(size: int) -> dict[str, Side]:
    """What reads about ``size`` bytes, the same each time, and those of another copy each time."""
    count = size // 4 // 1024 * 1024
    function = reader(count)
    out = tvm.runtime.tensor(np.zeros((16, 64), np.int32))
    copies = [tvm.runtime.tensor(np.ones((16, count // 16), np.int32)) for _ in range(math.ceil(COLD / size))]
    turn = itertools.cycle(copies)
    return {"read": lambda: function(copies[0], out), "read, memory": lambda: function(next(turn), out)}


def take_turns(sides: dict[str, Side], seconds: float) -> dict[str, tuple[float, float]]:
    """Median and 10th percentile of a run's time, the sides in turn for about ``seconds`` in all."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    end, turn = time.perf_counter() + seconds, -3
    while turn < 12 or time.perf_counter() < end:
        for side in list(sides)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            sides[side]()
            if turn >= 0:
                times[side].append(time.perf_counter() - start)
        turn += 1
    return {side: (float(np.median(t)), float(np.percentile(t, 10))) for side, t in times.items()}


def int8_sides(shape: tuple[int, int], threads: int) -> Callable[[int], tuple[dict[str, Side], int]]:
    """Sides for a number of rows, and the bytes of our constants."""
    inputs, outputs = shape
    random = np.random.default_rng(0)
    codes = random.integers(-127, 128, (outputs, inputs)).astype(np.int8)
    scale, bias = (random.random(outputs, np.float32) for _ in range(2))
    spec = LinearSpec(
        k=inputs, n=outputs, weight=INT8, x_quant=STATIC, bias=True, layout=Layout.PANELS,
        target=host_target(),
    )  # fmt: skip
    packed = pack_linear(spec, codes, scale[:, None], np.zeros((outputs, 1), np.float32))
    ranges = {"x_scale": np.array([0.02], np.float32), "x_zero": np.array([128], np.float32)}
    kernel = Ours(spec, packed | ranges | {"bias": pack_vector(spec, bias)})
    peers = [
        matmul_integer(shape, codes, scale * np.float32(0.02), bias, threads),
        qlinear(shape, codes, scale, threads),
    ]
    dense, vector = torch.from_numpy(codes * scale[:, None]), torch.from_numpy(bias)

    def make(rows: int) -> tuple[dict[str, Side], int]:
        x = random.integers(0, 256, (rows, inputs)).astype(np.uint8)
        real = torch.from_numpy((x.astype(np.float32) - 128) * np.float32(0.02))
        ours, buffers = kernel.side(rows, x=x)
        ours()
        agree(buffers["values"].numpy(), peers[0].run(None, {"x": x})[0], 1e-5)
        sides: dict[str, Side] = {"ours": ours, "torch": lambda: torch.nn.functional.linear(real, dense, vector)}
        for name, peer in zip(("MatMulInteger", "QLinearMatMul"), peers, strict=True):
            sides[name] = lambda peer=peer: peer.run(None, {"x": x})
        return sides | ({"ours, memory": kernel.cold(buffers)} if rows == 1 else {}), kernel.bytes

    return make


def int4_sides(shape: tuple[int, int], level: int, threads: int) -> Callable[[int], tuple[dict[str, Side], int]]:
    """Sides for a number of rows, and the bytes of our constants; ``level`` as that of ``MatMulNBits``."""
    inputs, outputs = shape
    random = np.random.default_rng(0)
    codes = random.integers(0, 16, (outputs, inputs)).astype(np.uint8)
    scale = (random.random((outputs, inputs // BLOCK), np.float32) + 0.5) / 64
    zero = random.integers(5, 11, scale.shape).astype(np.float32)
    integer = level == 4
    spec = LinearSpec(
        k=inputs, n=outputs, weight=INT4, x_quant=TOKEN if integer else None, layout=Layout.PANELS,
        target=host_target(),
    )  # fmt: skip
    packed = pack_linear(spec, codes, scale, zero)
    kernel = Ours(spec, packed)
    rounding = Ours(ActivationSpec(columns=inputs, output=TOKEN, target=host_target()), {})
    peer = matmul_nbits(shape, codes, scale, zero, level, threads)
    dense = torch.from_numpy((codes - np.repeat(zero, BLOCK, 1)) * np.repeat(scale, BLOCK, 1))

    def make(rows: int) -> tuple[dict[str, Side], int]:
        x = random.standard_normal((rows, inputs), np.float32)
        if integer:
            first, held = rounding.side(rows, x=x)
            second, buffers = kernel.side(rows, x=held["codes"], x_scale=held["out_scale"], x_zero=held["out_zero"])
            ours: Side = lambda: (first(), second())  # noqa: E731
        else:
            ours, buffers = kernel.side(rows, x=x)
        ours()
        agree(buffers["values"].numpy(), peer.run(None, {"x": x})[0], 0.03 if integer else 1e-5)
        real = torch.from_numpy(x)
        sides: dict[str, Side] = {"ours": ours, "torch": lambda: torch.nn.functional.linear(real, dense)}
        sides["MatMulNBits"] = lambda: peer.run(None, {"x": x})
        if rows == 1:
            cold = kernel.cold(buffers)
            sides["ours, memory"] = (lambda: (first(), cold())) if integer else cold
        return sides, kernel.bytes

    return make


def agree(ours: Array, theirs: Array, limit: float) -> None:
    """See that both sides compute the same, relative to the largest value."""
    error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    if not error < limit:
        raise SystemExit(f"the sides differ by {error:.1e}")


def measure(shapes: tuple[tuple[int, int], ...], threads: int, seconds: float) -> list[dict[str, Any]]:
    """A row for every kernel, shape and number of rows."""
    tvm_ffi.get_global_func("runtime.config_threadpool")(1, threads)
    torch.set_num_threads(threads)
    rows = []
    for shape in shapes:
        kinds = {"W8A8": int8_sides(shape, threads)}
        kinds |= {name: int4_sides(shape, level, threads) for name, level in (("W4, fp32 activations", 0), ("W4A8", 4))}
        for kind, make in kinds.items():
            for count in ROWS:
                sides, size = make(count)
                if count == 1:
                    sides |= read_sides(size)
                times = take_turns(sides, seconds)
                rows.append(
                    {"kernel": kind, "threads": threads, "rows": count, "K": shape[0], "N": shape[1]} | ratios(times)
                )
    return rows


def ratios(times: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """Our microseconds, and how many times faster we are than each other side."""
    ours = times["ours"]
    found: dict[str, Any] = {"us": round(1e6 * ours[0], 1)}
    peers = [side for side in times if side.startswith(("MatMul", "QLinear"))]
    for at, suffix in ((0, ""), (1, " p10")):
        found |= {f"x {side}{suffix}": round(times[side][at] / ours[at], 2) for side in [*peers, "torch"]}
        found[f"x ort{suffix}"] = round(min(times[side][at] for side in peers) / ours[at], 3)
        if "read" in times:
            found[f"read{suffix}"] = round(times["read"][at] / ours[at], 2)
            found[f"read, memory{suffix}"] = round(times["read, memory"][at] / times["ours, memory"][at], 2)
    return found


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric means over shapes and rows, and the worst."""
    found = []
    for kind, threads in dict.fromkeys((row["kernel"], row["threads"]) for row in rows):
        mine = [row for row in rows if (row["kernel"], row["threads"]) == (kind, threads)]
        entry: dict[str, Any] = {"kernel": kind, "threads": threads}
        for key in ("x ort", "x ort p10"):
            entry[f"{key}, mean"] = round(math.exp(sum(math.log(row[key]) for row in mine) / len(mine)), 3)
            entry[f"{key}, least"] = min(row[key] for row in mine)
        for key in ("read", "read, memory"):
            reads = [row[key] for row in mine if key in row]
            entry |= {f"{key}, least": min(reads), f"{key}, most": max(reads)}
        found.append(entry)
    return found


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    keys = ("kernel", "threads", "rows", "K", "N", "us", "x ort", "x ort p10", "x torch", "read", "read, memory")
    show_table(keys, [[row.get(key, "") for key in keys] for row in result["rows"]])
    print()
    show_table(tuple(result["summary"][0]), [list(row.values()) for row in result["summary"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.5, help="for each point")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--quick", action="store_true", help="the smallest shape only, and write no results")
    parser.add_argument("--show", action="store_true", help="print the last results and measure nothing")
    arguments_ = parser.parse_args()
    if arguments_.show:
        show(json.loads((RESULTS / "kernels.json").read_text()))
        return
    shapes = SHAPES[-1:] if arguments_.quick else SHAPES
    rows = [row for threads in arguments_.threads for row in measure(shapes, threads, arguments_.seconds)]
    result = {"seconds": arguments_.seconds, "rows": rows, "summary": summarize(rows)}
    if not arguments_.quick:
        write_result("kernels", "python benchmarks/kernels.py", result)
    show(result)


if __name__ == "__main__":
    main()

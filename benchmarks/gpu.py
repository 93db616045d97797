"""Times of a block on an NVIDIA GPU, beside its launches, against torch in float16. Needs the GPU, and nvcc.

    python benchmarks/gpu.py

The blocks, schemes and sizes of `launches.py`. Ours is the library for CUDA with all sizes known, so that launches are
taken as one CUDA graph; its activations that are not codes are float16, but for the residual stream. torch runs the
model of transformers in float16, as it comes. Both sides are timed on the device (CUDA events), in turns, a block being
a model of two blocks less one of one; figures are medians in microseconds. Without a GPU there is nothing to measure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from _common import RESULTS, show_table, write_result
from launches import MODELS, SCHEMES, SIZES, after, inputs, make_model, programs

from bitlower.backends.tvm_kernels import Target, compile_program, require_tvm
from bitlower.backends.tvm_kernels.library.fatbin import require_nvcc
from bitlower.frontends.decoder import cache_argument
from bitlower.ir import BitlowerError, Program

ROUNDS, RUNS = 15, 20
Side = Callable[[], float]
"""Runs a few times; the seconds of one run."""


def require_gpu() -> None:
    """See that there is a GPU, for TVM and for torch, and a compiler for it."""
    if not require_tvm().cuda().exist or not torch.cuda.is_available():
        raise SystemExit("this benchmark times an NVIDIA GPU: TVM (with libcudart.so.13) or torch finds none here")
    try:
        require_nvcc()
    except BitlowerError as error:
        raise SystemExit(str(error)) from None


def ours(program: Program, sizes: Mapping[str, int], target: Target, runs: int = RUNS) -> Side:
    """The library of a fused program."""
    import tvm
    from tvm import relax

    library = compile_program(
        program, target, sizes={name: size for name, size in sizes.items() if _has(program, name)}
    )
    machine = relax.VirtualMachine(library.code.executable, library.code.device)
    tensors = program.arguments(inputs(program, sizes))
    dtypes = [spec.type.dtype for spec in library.inputs]
    given = [
        tvm.runtime.tensor(tensor.to(dtype).contiguous().numpy(), library.code.device)
        for tensor, dtype in zip(tensors, dtypes, strict=True)
    ]
    machine["main"](*given)
    timer = machine.time_evaluator("main", library.code.device, number=runs, repeat=1)
    return lambda: float(timer(*given).mean)


def _has(program: Program, name: str) -> bool:
    return any(name == dim for spec in program.inputs for dim in spec.type.shape)


def theirs(
    model: Any, program: Program, sizes: Mapping[str, int], device: str, dtype: torch.dtype, runs: int = RUNS
) -> Side:
    """torch, with a cache that holds the past and is cut back to it after each run."""
    model = model.to(device, dtype)
    held = inputs(program, sizes)
    given: dict[str, Any] = {name: tensor.to(device) for name, tensor in held.items() if "past" not in name}
    past = [tensor.to(device, dtype) for name, tensor in held.items() if "past" in name]

    @torch.no_grad()
    def run() -> None:
        if past:
            cache = transformers.DynamicCache()
            for layer, (key, value) in enumerate(zip(past[::2], past[1::2], strict=True)):
                cache.update(key, value, layer)
            given[cache_argument(model)] = cache
        model(**given)

    return lambda: _seconds(run, device, runs)


def _seconds(run: Callable[[], None], device: str, runs: int) -> float:
    """The seconds of one run, between events of the device; by the clock where there are none."""
    run()
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(runs):
            run()
        return (time.perf_counter() - start) / runs
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(runs):
        run()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / 1e3 / runs


def in_turns(sides: Mapping[str, Side], rounds: int = ROUNDS) -> dict[str, float]:
    """The median of each side, all of them run in every round."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for at in range(rounds):
        for name in list(sides)[:: 1 if at % 2 else -1]:
            found[name].append(sides[name]())
    return {name: statistics.median(values) for name, values in found.items()}


def row(
    name: str, scheme: str, sizes: Mapping[str, int], target: Target, device: str, dtype: torch.dtype
) -> dict[str, Any]:
    """The figures of one block."""
    made = {layers: programs(name, scheme, layers)[1] for layers in (1, 2)}
    sides: dict[str, Side] = {}
    for layers, program in made.items():
        sides[f"ours {layers}"] = ours(program, sizes, target)
        sides[f"torch {layers}"] = theirs(make_model(name, layers), program, sizes, device, dtype)
    seconds = in_turns(sides)
    times = {side: 1e6 * (seconds[f"{side} 2"] - seconds[f"{side} 1"]) for side in ("ours", "torch")}
    counts = [after(made[layers], sizes)[0] for layers in (1, 2)]
    return {
        "block": name, "scheme": scheme, "tokens": sizes["sequence"], "past": sizes["past"],
        "launches": counts[1] - counts[0], "us": round(times["ours"], 1), "torch_us": round(times["torch"], 1),
        "x_torch": round(times["torch"] / times["ours"], 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print the last results and time nothing")
    if parser.parse_args().show:
        show(json.loads((RESULTS / "gpu.json").read_text())["blocks"])
        return
    require_gpu()
    rows = [
        row(name, scheme, sizes, Target.CUDA, "cuda", torch.float16)
        for name in MODELS
        for scheme in SCHEMES
        for what, sizes in SIZES.items()
        if what == "text" or not name.startswith("BERT")
    ]
    write_result("gpu", "python benchmarks/gpu.py", {"gpu": torch.cuda.get_device_name(), "blocks": rows})
    show(rows)


def show(rows: list[dict[str, Any]]) -> None:
    """Print the figures as a table."""
    show_table(list(rows[0]), [list(row.values()) for row in rows])


if __name__ == "__main__":
    main()

"""Speed of the GPTQ solver against a direct implementation of the published algorithm, on the same layers.

    python benchmarks/solver.py

4 bit, asymmetric, groups of 128, damping 0.01. Sides take turns within one run; figures are the least and the median of
the runs. `direct` is written after the published code: a loop over columns in blocks of 128, and three factorizations.
`bitlower, all options` is act-order with weighted-mse grids, one sweep of refinement with scales, and the guard.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _common import RESULTS, show_table, write_result

from bitlower.ir import Granularity, Grid
from bitlower.passes.rounding._gptq_factor import cholesky_, factorize
from bitlower.passes.rounding._gptq_solver import GptqOptions, solve
from bitlower.passes.rounding._hessian import Hessian

SHAPES = ((576, 1536), (768, 3072), (2048, 8192))
GRID = Grid(4, signed=False, symmetric=False)
GROUP = 128
OURS = {
    "bitlower": GptqOptions(guard=False),
    "bitlower, guard": GptqOptions(),
    "bitlower, act-order": GptqOptions(guard=False, order="full"),
    "bitlower, all options": GptqOptions(order="full", ranges="weighted-mse", refine=1, rescale=True),
}
Layer = tuple[torch.Tensor, torch.Tensor]


def direct(weight: torch.Tensor, hessian: torch.Tensor, damping: float = 0.01, block: int = 128) -> torch.Tensor:
    """Frantar et al. 2022 as published (min–max grids of each group from the current weight); the rounded weight."""
    weight, columns = weight.clone(), weight.shape[1]
    quantized = torch.zeros_like(weight)
    dead = hessian.diagonal() == 0
    hessian = hessian + torch.diag(dead.float())
    weight[:, dead] = 0
    hessian += damping * hessian.diagonal().mean() * torch.eye(columns)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        part = weight[:, start:stop].clone()
        rounded, errors = torch.zeros_like(part), torch.zeros_like(part)
        corner = upper[start:stop, start:stop]
        for i in range(stop - start):
            if (start + i) % GROUP == 0:
                ends = weight[:, start + i : start + i + GROUP].aminmax(dim=1)
                low, high = ends.min.clamp(max=0), ends.max.clamp(min=0)
                scale = (high - low) / GRID.quant_max
                zero = torch.round(-low / scale)
            column = part[:, i]
            codes = torch.clamp(torch.round(column / scale) + zero, 0, GRID.quant_max)
            rounded[:, i] = scale * (codes - zero)
            error = (column - rounded[:, i]) / corner[i, i]
            part[:, i:] -= error.unsqueeze(1).matmul(corner[i, i:].unsqueeze(0))
            errors[:, i] = error
        quantized[:, start:stop] = rounded
        weight[:, stop:] -= errors.matmul(upper[start:stop, stop:])
    return quantized


def layer(rows: int, columns: int) -> Layer:
    """A random weight and the Hessian of correlated inputs whose columns differ in size."""
    torch.manual_seed(rows + columns)
    inputs = torch.randn(2 * columns, columns) @ (torch.randn(columns, columns) / columns**0.5)
    inputs *= torch.rand(columns) + 0.1
    hessian = Hessian(columns)
    hessian.add(inputs)
    return torch.randn(rows, columns), hessian.matrix()


def error(weight: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor) -> float:
    """``tr(E H Eᵀ)``."""
    difference = weight - quantized
    return float(((difference @ hessian) * difference).sum(dtype=torch.float64))


def take_turns(sides: dict[str, Callable[[], Any]], runs: int) -> dict[str, list[float]]:
    """Seconds of each run of each side, in alternating order, after one run of each that is not counted."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(-1, runs):
        for side in list(sides)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            sides[side]()
            if turn >= 0:
                times[side].append(time.perf_counter() - start)
    return times


def ours(case: Layer, options: GptqOptions) -> torch.Tensor:
    weight, hessian = case
    return solve(weight, hessian, GRID, Granularity.per_group(GROUP), options).weight


def compare(shapes: Sequence[tuple[int, int]], runs: int) -> list[dict[str, Any]]:
    """Ours and the direct one on the shapes: seconds a million weights, and the layer's error against the direct's."""
    rows = []
    for shape in shapes:
        case = layer(*shape)
        sides: dict[str, Callable[[], torch.Tensor]] = {"direct": lambda case=case: direct(*case)}
        sides |= {name: (lambda case=case, o=options: ours(case, o)) for name, options in OURS.items()}
        errors = {side: error(case[0], run(), case[1]) for side, run in sides.items()}
        times = take_turns(sides, runs)
        millions = shape[0] * shape[1] / 1e6
        for side, seconds in times.items():
            rows.append(
                {"rows": shape[0], "columns": shape[1], "side": side}
                | {"s_per_million": round(min(seconds) / millions, 4)}
                | {"s_per_million_median": round(statistics.median(seconds) / millions, 4)}
                | {"x_direct": round(min(times["direct"]) / min(seconds), 2)}
                | {"x_direct_median": round(statistics.median(times["direct"]) / statistics.median(seconds), 2)}
                | {"error": round(errors[side] / errors["direct"], 4)}
            )
    return rows


def scaling(runs: int, quick: bool) -> list[dict[str, Any]]:
    """How our time grows: rows and columns doubled, the block halved; all else as in the first shape."""
    sizes = (256, 512, 1024) if quick else (256, 512, 1024, 2048, 4096)
    cases = [("rows", size, layer(size, 1536), GptqOptions(guard=False)) for size in sizes]
    cases += [("columns", size, layer(576, size), GptqOptions(guard=False)) for size in sizes]
    shared = layer(768, 1536)
    cases += [("block", b, shared, GptqOptions(guard=False, block=b)) for b in (8, 16, 32, 64, 128)]
    sides = {f"{what} {n}": (lambda case=case, o=o: ours(case, o)) for what, n, case, o in cases}
    times = take_turns(sides, runs)
    return [
        {"what": what, "value": n, "ms": round(1000 * min(times[f"{what} {n}"]), 1)}
        | {"us_per_weight_column": round(1e6 * min(times[f"{what} {n}"]) / case[0].shape[1], 1)}
        for what, n, case, _ in cases
    ]


def passed_on(upper: torch.Tensor, target: torch.Tensor, errors: torch.Tensor, low: int, high: int) -> None:
    """The products by which the solver passes errors on, without the rounding between them."""
    if high - low <= 32:
        return
    step = GROUP if high - low > GROUP else 32
    middle = low + max(1, (high - low) // step // 2) * step
    passed_on(upper, target, errors, middle, high)
    target[low:middle].addmm_(upper[low:middle, middle:high], errors[middle:high])
    passed_on(upper, target, errors, low, middle)


def rates(shapes: Sequence[tuple[int, int]], runs: int) -> list[dict[str, Any]]:
    """GFLOP/s of the parts, against a square product of matrices of 2048 measured in turn with them."""
    square = torch.randn(2048, 2048)
    rows = []
    for count, columns in shapes:
        weight, hessian = layer(count, columns)
        damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns)
        factor = factorize(hessian)
        errors, target = weight.T.contiguous() * 1e-3, weight.T.contiguous()
        buffer = torch.empty_like(damped)
        sides = {
            "product of 2048 x 2048": (lambda: square @ square, 2 * 2048**3),
            "copy for the factor": (lambda b=buffer, d=damped: b.copy_(d), 0),
            "Cholesky, ours (with copy)": (lambda b=buffer, d=damped: cholesky_(b.copy_(d)), columns**3 / 3),
            "Cholesky, LAPACK": (lambda d=damped: torch.linalg.cholesky(d), columns**3 / 3),
            "passing errors on": (
                lambda u=factor.upper, t=target, e=errors, n=columns: passed_on(u, t, e, 0, n),
                count * columns**2,
            ),
            "rank-128 updates, as published": (
                lambda u=factor.upper, w=weight, n=columns: [
                    w[:, k + 128 :].sub_(w[:, k : k + 128] @ u[k : k + 128, k + 128 :]) for k in range(0, n - 128, 128)
                ],
                count * columns**2,
            ),
        }
        times = take_turns({side: run for side, (run, _) in sides.items()}, runs)
        peak = sides["product of 2048 x 2048"][1] / min(times["product of 2048 x 2048"])
        for side, (_, flops) in sides.items():
            rate = flops / min(times[side])
            rows.append(
                {"rows": count, "columns": columns, "part": side, "ms": round(1000 * min(times[side]), 1)}
                | {"gflop_s": round(rate / 1e9, 1), "share": round(rate / peak, 3)}
            )
    return rows


TABLES = {
    "compare": (
        "rows",
        "columns",
        "side",
        "s_per_million",
        "s_per_million_median",
        "x_direct",
        "x_direct_median",
        "error",
    ),
    "scaling": ("what", "value", "ms", "us_per_weight_column"),
    "rates": ("rows", "columns", "part", "ms", "gflop_s", "share"),
}


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    for name, keys in TABLES.items():
        print(f"\n{name}\n")
        show_table(keys, [[row[key] for key in keys] for row in result[name]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="torch threads; default: all cores")
    parser.add_argument("--quick", action="store_true", help="the smaller shapes only, and write no results")
    parser.add_argument("--show", action="store_true", help="print the last results and measure nothing")
    arguments = parser.parse_args()
    if arguments.show:
        show(json.loads((RESULTS / "solver.json").read_text()))
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    shapes = SHAPES[:1] if arguments.quick else SHAPES
    result = {
        "runs": arguments.runs,
        "threads": torch.get_num_threads(),
        "compare": compare(shapes, arguments.runs),
        "scaling": scaling(arguments.runs, arguments.quick),
        "rates": rates(shapes, arguments.runs),
    }
    if not arguments.quick:
        write_result("solver", "python benchmarks/solver.py", result)
    show(result)


if __name__ == "__main__":
    main()

"""Parts of schedules and of the conversion by themselves: against what they say they are, mostly without compiling."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import fx

pytest.importorskip("tvm", reason="the extra tvm is not installed")

import tvm
from tvm import te, tirx

from bitlower.backends.tvm_kernels import Layout, LinearSpec, Target
from bitlower.backends.tvm_kernels.internals import sort_shape_functions
from bitlower.backends.tvm_kernels.relax.rowwise import _epsilon
from bitlower.backends.tvm_kernels.relax.views import heads_of
from bitlower.backends.tvm_kernels.schedules.cpu import vectors
from bitlower.backends.tvm_kernels.schedules.cpu.panel_float import block_size
from bitlower.backends.tvm_kernels.schedules.gpu.gemm_mma import has_matrix
from bitlower.backends.tvm_kernels.tir.expressions import qparams
from bitlower.ir import Granularity, Grid, QuantSpec, ScaleConvention, TensorType

aten = torch.ops.aten


@pytest.mark.parametrize("tiles", [(1,), (1, 2, 4), (1, 4, 6)])
@pytest.mark.parametrize("count", [0, 1, 3, 7, 23])
def test_every_row_is_computed_once(monkeypatch: pytest.MonkeyPatch, tiles: tuple[int, ...], count: int) -> None:
    extents: list[int] = []
    rows: Counter[int] = Counter()

    @contextmanager
    def serial(start: object, stop: object) -> Iterator[object]:
        extents.append(int(stop))
        yield tirx.const(0, "int64")

    def body(tile: int, first: object) -> None:
        rows.update(int(first) + block * tile + line for block in range(extents[-1]) for line in range(tile))

    monkeypatch.setattr(vectors, "T", SimpleNamespace(serial=serial))
    vectors.over_rows(tirx.const(count, "int64"), tiles, body)
    assert rows == Counter(range(count))


@pytest.mark.parametrize(("inputs", "group"), [(128, 32), (192, 64), (192, 96), (288, 96), (160, 80), (640, 160)])
def test_what_is_unfolded_at_a_time_lies_in_one_group_or_is_whole_groups(inputs: int, group: int) -> None:
    weight = QuantSpec(Grid(4), Granularity.per_group(group))
    spec = LinearSpec(k=inputs, n=16, weight=weight, layout=Layout.PANELS)
    size = block_size(spec)
    starts = range(0, inputs, size)
    assert all(len({i // group for i in range(s, s + size)}) == max(1, size // group) for s in starts)
    assert all(inputs % size == 0 and (s % group == 0 or size < group) for s in starts)


@pytest.mark.parametrize(("inputs", "target", "matrix"), [
    (64, Target.CUDA, True), (48, Target.CUDA, False), (64, Target.OPENCL, False)
])  # fmt: skip
def test_matrix_instructions_need_whole_fragments(inputs: int, target: Target, matrix: bool) -> None:
    int8 = QuantSpec(Grid(8), Granularity.per_channel(0))
    static = QuantSpec(Grid(8, signed=False, symmetric=False), Granularity.per_tensor())
    spec = LinearSpec(k=inputs, n=64, weight=int8, x_quant=static, target=target)
    assert has_matrix(spec, target.gemm) is matrix


@pytest.mark.parametrize("convention", ScaleConvention)
def test_ranges_become_scales_as_in_the_ir(convention: ScaleConvention) -> None:
    """Small ones too, where what a convention adds to the range is most of it."""
    grid = Grid(8, signed=convention is not ScaleConvention.OFFSET, convention=convention)
    low, high = np.array([-3e-6, 0, -0.5, 0], np.float32), np.array([1e-6, 2e-5, 0.25, 0], np.float32)
    a, b = (te.placeholder((4,), "float32", name=name) for name in "ab")
    scale = te.compute((4,), lambda i: qparams(a[i], b[i], grid)[0], name="scale")
    function = te.create_prim_func([a, b, scale]).with_attr("global_symbol", "qparams")
    kernel = tvm.compile(tvm.IRModule({"qparams": function}), target="llvm")
    given = [tvm.runtime.tensor(array) for array in (low, high, np.zeros(4, np.float32))]
    kernel["qparams"](*given)
    expected, _ = grid.qparams(torch.from_numpy(low), torch.from_numpy(high))
    np.testing.assert_allclose(given[2].numpy(), expected.numpy(), rtol=1e-6)


def test_a_norm_without_an_epsilon_has_that_of_torch() -> None:
    x = torch.tensor([3e-4, -1e-4, 2e-4, 5e-5], dtype=torch.float32)
    expected = torch.nn.functional.rms_norm(x, (4,), eps=None).double()
    x = x.double()
    torch.testing.assert_close(x * (x.square().mean() + _epsilon(None)).rsqrt(), expected, rtol=1e-6, atol=0)
    assert _epsilon(0.0) == 0


@pytest.mark.parametrize(("shape", "found"), [((2, 6, 2, 4), True), ((4, 3, 2, 4), False), ((1, 12, 2, 4), False)])
def test_heads_lie_in_place_only_where_rows_are_the_same(shape: tuple[int, ...], found: bool) -> None:
    graph, kinds = fx.Graph(), {}
    x = graph.placeholder("x")
    view = graph.call_function(aten.view.default, (x, list(shape)))
    heads = graph.call_function(aten.transpose.int, (view, 1, 2))
    swapped = (shape[0], shape[2], shape[1], shape[3])
    for node, size in ((x, (2, 6, 8)), (view, shape), (heads, swapped)):
        node.meta["type"] = TensorType(torch.float32, size)
        kinds[node] = size
    frame = SimpleNamespace(strips={}, value=lambda node: node)
    strip = heads_of(frame, heads)
    assert (strip is not None) is found
    assert strip is None or (strip.value, strip.columns, strip.start) == (x, 8, 0)


def test_dimensions_are_stored_in_the_order_of_their_places() -> None:
    """TVM's own order is that of a set of pointers: equal programs would give unequal code."""
    buffer = tirx.decl_buffer((3,), "int64", "shapes")
    stores = [tirx.BufferStore(buffer, tirx.const(10 + at, "int64"), [tirx.const(at, "int64")]) for at in (2, 0, 1)]
    functions = {name: tirx.PrimFunc([], tirx.SeqStmt(stores)) for name in ("shape_func", "other")}
    module = sort_shape_functions()(tvm.IRModule(functions))
    places = {
        name.name_hint: [int(store.indices[0]) for store in function.body.seq]
        for name, function in module.functions_items()
    }
    assert places == {"shape_func": [0, 1, 2], "other": [2, 0, 1]}

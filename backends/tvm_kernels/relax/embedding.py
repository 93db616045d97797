"""Embeddings in Relax."""

from __future__ import annotations

from typing import Any

from torch import fx
from tvm import relax, te, tirx

from bitlower.backends.tvm_kernels.relax.builder import Frame, constant, known
from bitlower.backends.tvm_kernels.relax.call import Call
from bitlower.backends.tvm_kernels.spec.linear import LinearSpec, table_spec
from bitlower.backends.tvm_kernels.spec.packing import pack_linear
from bitlower.backends.tvm_kernels.tir.expressions import codes, decoded
from bitlower.backends.tvm_kernels.tir.function import i64
from bitlower.backends.tvm_kernels.tir.weight import dequantized as entry
from bitlower.ir import Grid, kernels
from bitlower.ir.operators import EmbeddingNode


def convert_embedding(call: Call) -> list[Any]:
    """The results of a ``fused_embedding``: one kernel over all tables."""
    frame = call.frame
    shape = _ids_shape(call)
    specs, arrays, ids = list[LinearSpec](), list[Any](), list[Any]()
    for at, table in enumerate(call.arguments["tables"]):
        codes, scale, zero = (
            frame.tensor(node)
            for node in (table, call.arguments["table_scales"][at], call.arguments["table_zero_points"][at])
        )
        quantizer = call.node.meta["quantizers"][f"table_{at}"].spec
        spec = table_spec(codes.shape, quantizer)
        packed = pack_linear(spec, codes, scale, zero)
        specs.append(spec)
        arrays.append({name: constant(array) for name, array in packed.items()})
        place = frame.value(call.arguments["ids"][at])
        ids.append(frame.emit(relax.op.broadcast_to(place, relax.ShapeExpr(shape))))
    rounded = [
        [float(frame.tensor(node)) for node in pair]
        for pair in zip(call.arguments["rounded_scales"], call.arguments["rounded_zero_points"], strict=True)
    ]
    body = _embedding_body(specs, [list(array) for array in arrays], rounded, call.arguments.get("rounded_grid", ""))
    flat = [value for array in arrays for value in array.values()]
    return call.finished(frame.te(body, *ids, *flat, name="embedding"))


def _embedding_body(specs: list[LinearSpec], names: list[list[str]], rounded: list[list[float]], grid: str) -> Any:
    """The sum of entries of tables; the arguments are the ids of all tables, then the arrays of each."""

    def body(*inputs: Any) -> Any:
        ids, rest = inputs[: len(specs)], iter(inputs[len(specs) :])
        tables = [{name: next(rest) for name in parts} for parts in names]
        shape = (*ids[0].shape, i64(specs[0].k))

        def value(*index: Any) -> Any:
            *token, column = index
            total = None
            for at, (spec, table) in enumerate(zip(specs, tables, strict=True)):
                term = entry(spec, table, _row(ids[at][tuple(token)], spec.n), column)
                total = term if total is None else total + term
                if 0 < at <= len(rounded):
                    scale, zero = (tirx.const(part, "float32") for part in rounded[at - 1])
                    total = decoded(codes(total, scale, zero, Grid.parse(grid)), scale, zero)
            return total

        return te.compute(shape, value, name="embedding")

    return body


def convert_float_embedding(frame: Frame, node: fx.Node) -> Any:
    """Rows of a table of floats, which is stored as the weights of float linears are."""
    source, ids = EmbeddingNode(node).table, frame.value(EmbeddingNode(node).ids)
    stored = source.op == "get_attr"
    table = constant(frame.tensor(source).astype(frame.dtype)) if stored else frame.value(source)
    rows = known(source.meta["type"].shape[0])

    def body(table: Any, ids: Any) -> Any:
        shape = (*ids.shape, table.shape[1])

        def value(*index: Any) -> Any:
            return table[_row(ids[index[:-1]], rows), index[-1]].astype("float32")

        return te.compute(shape, value, name="embedding")

    return frame.te(body, table, ids, name="embedding")


def _row(index: Any, rows: int) -> Any:
    """The row of a table: the nearest one that there is, since other memory must not be read."""
    return tirx.max(tirx.min(index, tirx.const(rows - 1, index.dtype)), tirx.const(0, index.dtype))


def _ids_shape(call: Call) -> list[Any]:
    """The common shape of the ids: that of the result but for the last axis."""
    kind = kernels.outputs(call.node)[0].type
    return call.frame.shape(kind)[:-1]

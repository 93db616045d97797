"""What an attention kernel is, whoever computes it: shapes, masks, roundings, and the buffers that it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from bitlower.backends.tvm_kernels.spec.attention import OPERANDS, Attention
from bitlower.backends.tvm_kernels.spec.base import FLOATS
from bitlower.backends.tvm_kernels.tir.expressions import Expr, codes, const, decoded, spread, with_lanes
from bitlower.backends.tvm_kernels.tir.function import i64
from bitlower.ir import Grid

LEAST = -3.4028234663852886e38
"""The most negative float32: a score below it is masked, and has no share."""


class Operands:
    """The buffers of an attention, and what is read from them and written.

    A place is ``(batch, head, position)``; columns are indices, or vectors of them.

    Args:
        what: the attention.
        batch: how many there are.
        queries: how many of a head.
        keys: how many of a head.
    """

    def __init__(self, what: Attention, batch: Any, queries: Any, keys: Any) -> None:
        self.what = what
        shapes, dtypes = _shapes(what, batch, queries, keys)
        handles = {name: T.arg(name, T.handle()) for name in shapes}
        self.buffers = {
            name: T.match_buffer(handles[name], shapes[name], dtypes.get(name, "float32")) for name in shapes
        }

    def stored(self, name: str, place: tuple[Expr, ...], at: Expr) -> Any:
        """Query, key or value as it is stored."""
        merged = self.what.places[OPERANDS.index(name)]
        if merged is None:
            return self.buffers[name][(*place, at)]
        batch, head, position = place
        head_dim = self.what.value_head_dim if name == "value" else self.what.head_dim
        return self.buffers[name][batch, position, _from(i64(merged[1]) + head * i64(head_dim), at)]

    def real(self, name: str, place: tuple[Expr, ...], at: Expr) -> Any:
        """Query, key or value in float32."""
        stored = self.stored(name, place, at)
        if f"{name}_scale" in self.buffers:
            return decoded(stored, *self.scales(name, stored))
        return stored.astype(with_lanes("float32", stored))

    def scales(self, name: str, like: Expr) -> list[Any]:
        """Scale and zero point, on as many lanes as ``like`` has."""
        return [spread(self.buffers[f"{name}_{part}"][0], like) for part in ("scale", "zero")]

    def code(self, name: str, grid: Grid, value: Expr) -> Any:
        """The code of a score or a probability, int32."""
        scale, zero = self.scales(name, value)
        return codes(value, scale, zero, grid)

    def rounded(self, name: str, grid: Grid, value: Expr) -> Any:
        """The value of its code."""
        return decoded(T.Bind(self.code(name, grid, value)), *self.scales(name, value))

    def score(self, product: Expr, place: tuple[Expr, ...], key: Expr) -> Any:
        """The masked score of a product of query and key, or those of a vector of keys."""
        what = self.what
        if what.scored is not None:
            product = self.rounded("scores", what.scored, product)
        score = product * const(what.factor, product)
        gone = const(float("-inf"), product)
        if what.causal:
            score = tirx.Select(key <= spread(place[2], product), score, gone)
        if not what.mask:
            return score
        index = [i64(0) if one else at for one, at in zip(what.mask_broadcast, (*place, key), strict=True)]
        mask = self.buffers["mask"][tuple(index)]
        mask = spread(mask, product) if what.mask_broadcast[3] else mask
        return score + mask if what.mask == "float32" else tirx.Select(mask, score, gone)

    def store(self, value: Any, place: tuple[Expr, ...], at: Expr) -> None:
        """Write the result of a query, as codes if it is codes."""
        what, (batch, head, query) = self.what, place
        column = _from(head * i64(what.value_head_dim), at) if what.joined else at
        if what.output is not None:
            value = T.Bind(value)
            scale, zero = (
                self.scales("out", value)
                if what.scales == 1
                else [self.buffers[f"out_{part}"][column] for part in ("scale", "zero")]
            )
            value = codes(value, scale, zero, what.output)
        value = value.astype(with_lanes(what.result_dtype, value))
        index = [batch, query, column] if what.joined else [batch, head, query, column]
        T.buffer_store(self.buffers["result"], value, index)


def result_shape(what: Attention, batch: Any, queries: Any) -> list[Any]:
    """The shape of the result."""
    if what.joined:
        return [batch, queries, i64(what.heads * what.value_head_dim)]
    return [batch, i64(what.heads), queries, i64(what.value_head_dim)]


def _from(start: Expr, at: Expr) -> Any:
    """Columns counted from ``start``."""
    return tirx.Ramp(start + at.base, at.stride, at.lanes) if isinstance(at, tirx.Ramp) else start + at


def _shapes(what: Attention, batch: Any, queries: Any, keys: Any) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """Shapes of all buffers in order, and the dtypes of those that are not float32."""
    lengths = {"query": queries, "key": keys, "value": keys}
    heads = {"query": what.heads, "key": what.kv_heads, "value": what.kv_heads}
    dims = {"query": what.head_dim, "key": what.head_dim, "value": what.value_head_dim}
    shapes = {
        name: [batch, i64(heads[name]), lengths[name], i64(dims[name])]
        if merged is None
        else [batch, lengths[name], i64(merged[0])]
        for name, merged in zip(OPERANDS, what.places, strict=True)
    }
    dtypes = {name: str(getattr(what, name)) for name in OPERANDS} | {"result": what.result_dtype}
    rounded = [name for name in OPERANDS if dtypes[name] not in FLOATS]
    rounded += [name for name, grid in (("scores", what.scored), ("probs", what.probs)) if grid is not None]
    if what.mask:
        full = (batch, i64(what.heads), queries, keys)
        shapes["mask"] = [i64(1) if one else size for size, one in zip(full, what.mask_broadcast, strict=True)]
        dtypes["mask"] = what.mask
    for name in rounded:
        shapes |= {f"{name}_scale": [i64(1)], f"{name}_zero": [i64(1)]}
    if what.output is not None:
        shapes |= {"out_scale": [i64(what.scales)], "out_zero": [i64(what.scales)]}
    shapes["result"] = result_shape(what, batch, queries)
    return shapes, dtypes


def function(what: Attention, body: Callable[[Operands, Any, Any, Any], None]) -> Any:
    """The PrimFunc whose body is what ``body(operands, batch, queries, keys)`` emits.

    Its arguments are query, key, value, and the mask if there is one; scale and zero point, ``[1]``, of those of the
    first three that are codes, of scores and of probabilities if they are rounded; scales and zero points of the
    result if it is codes; the result.
    """
    batch, queries, keys = (tirx.Var(name, "int64") for name in ("batch", "queries", "keys"))
    with IRBuilder() as builder, T.prim_func():
        T.func_name("attention")
        T.func_attr({"tirx.noalias": True, "bitlower.family": "attention"})
        body(Operands(what, batch, queries, keys), batch, queries, keys)
    return builder.get()

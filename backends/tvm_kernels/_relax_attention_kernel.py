"""Attention on the CPU as one function: a query of a head is a task, and goes over all keys in vectors of its width.

Scores and probabilities of a query wait in scratch memory; the softmax is that of the whole row. Products are summed in
float32, of values that are dequantized as they are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from bitlower.backends.tvm_kernels._cpu_rows import VectorLanes
from bitlower.backends.tvm_kernels._expressions import Expr, codes, decoded, exp, with_lanes
from bitlower.backends.tvm_kernels._frame import i64
from bitlower.ir import Grid

LEAST = -3.4028234663852886e38
"""The most negative float32: what a masked score is where softmax is written out."""


@dataclass(frozen=True, kw_only=True)
class Attention:
    """What decides the code of an attention; batch, queries and keys are known at run time.

    Args:
        heads: of queries.
        groups: heads of keys and values; each serves ``heads / groups`` of the queries.
        width: of queries and keys.
        value_width: of values.
        factor: what scores are multiplied by.
        causal: mask keys that are later than the query, both counted from the start.
        explicit: a masked score is :data:`LEAST`; else it has no share, and a row without keys gives zeros.
        joined: the result is ``[batch, queries, heads · width]``.
        query: the dtype of the queries, ``float32`` or that of codes.
        key: the dtype of the keys.
        value: the dtype of the values.
        mask: the dtype of the mask, ``bool`` or ``float32``; empty: there is none.
        spread: which of the four axes of the mask have length 1.
        scored: the grid that scores are rounded to; None: they are not.
        probs: the grid that probabilities are rounded to.
        output: the grid of the result, whose codes are given; None: the value.
        scales: how many scales the result has: 1, or one a column.
    """

    heads: int
    groups: int
    width: int
    value_width: int
    factor: float
    causal: bool = False
    explicit: bool = False
    joined: bool = False
    query: str = "float32"
    key: str = "float32"
    value: str = "float32"
    mask: str = ""
    spread: tuple[bool, ...] = ()
    scored: Grid | None = None
    probs: Grid | None = None
    output: Grid | None = None
    scales: int = 1

    @property
    def result_dtype(self) -> str:
        """The dtype of the result."""
        return "float32" if self.output is None else str(self.output.dtype).removeprefix("torch.")

    def result_shape(self, batch: Any, queries: Any) -> list[Any]:
        """The shape of the result."""
        if self.joined:
            return [batch, queries, i64(self.heads * self.value_width)]
        return [batch, i64(self.heads), queries, i64(self.value_width)]


def attention(what: Attention) -> Any:
    """The PrimFunc.

    Its arguments are query, key, value, and the mask if there is one; scale and zero point, ``[1]``, of those of the
    first three that are codes, of scores and of probabilities if they are rounded; scales and zero points of the
    result if it is codes; the result.
    """
    batch, queries, keys = (tirx.Var(name, "int64") for name in ("batch", "queries", "keys"))
    with IRBuilder() as builder, T.prim_func():
        T.func_name("attention")
        T.func_attr({"tirx.noalias": True, "bitlower.family": "attention"})
        buffers = _buffers(what, batch, queries, keys)
        with T.parallel(i64(0), batch * i64(what.heads) * queries) as task:
            rest = task // queries
            place = (rest // i64(what.heads), rest % i64(what.heads), task % queries)
            _Query(what, buffers, place, keys).emit()
    return builder.get()


def _buffers(what: Attention, batch: Any, queries: Any, keys: Any) -> dict[str, Any]:
    shapes = {
        "query": [batch, i64(what.heads), queries, i64(what.width)],
        "key": [batch, i64(what.groups), keys, i64(what.width)],
        "value": [batch, i64(what.groups), keys, i64(what.value_width)],
    }
    dtypes = {name: getattr(what, name) for name in shapes} | {"result": what.result_dtype}
    rounded = [name for name, dtype in dtypes.items() if name in shapes and dtype != "float32"]
    rounded += [name for name, grid in (("scores", what.scored), ("probs", what.probs)) if grid is not None]
    if what.mask:
        full = (batch, i64(what.heads), queries, keys)
        shapes["mask"] = [i64(1) if one else size for size, one in zip(full, what.spread, strict=True)]
        dtypes["mask"] = what.mask
    for name in rounded:
        shapes |= {f"{name}_scale": [i64(1)], f"{name}_zero": [i64(1)]}
    if what.output is not None:
        shapes |= {"out_scale": [i64(what.scales)], "out_zero": [i64(what.scales)]}
    shapes["result"] = what.result_shape(batch, queries)
    handles = {name: T.arg(name, T.handle()) for name in shapes}
    return {name: T.match_buffer(handles[name], shapes[name], dtypes.get(name, "float32")) for name in shapes}


class _Query:
    """One query of one head."""

    def __init__(self, what: Attention, buffers: dict[str, Any], place: tuple[Expr, ...], keys: Any) -> None:
        self.what, self.buffers, self.place, self.keys = what, buffers, place, keys
        self.group = place[1] // i64(what.heads // what.groups)
        self.lanes = VectorLanes()

    def emit(self) -> None:
        """Scores, softmax, and the sum of values."""
        scores = T.alloc_buffer((self.keys,), "float32")
        query = T.alloc_buffer((self.what.width,), "float32")
        self.lanes.over(self.what.width, lambda at: T.buffer_store(query, self._read("query", self.place, at), [at]))
        highest = T.alloc_buffer((1,), "float32", scope="local")
        T.buffer_store(highest, tirx.const(LEAST, "float32"), [0])
        with T.serial(i64(0), self.keys) as key:
            self._score(scores, query, highest, key)
        total = T.alloc_buffer((1,), "float32", scope="local")
        T.buffer_store(total, tirx.const(0.0, "float32"), [0])
        with T.serial(i64(0), self.keys) as key:
            score = T.Bind(scores[key])
            share = tirx.Select(
                score < tirx.const(LEAST, "float32"), tirx.const(0.0, "float32"), exp(score - highest[0])
            )
            share = T.Bind(share)
            T.buffer_store(scores, share, [key])
            T.buffer_store(total, total[0] + share, [0])
        self._context(scores, total)

    def _read(self, name: str, place: tuple[Expr, ...], at: Expr) -> Any:
        stored = self.buffers[name][(*place, at)]
        if f"{name}_scale" not in self.buffers:
            return stored
        return decoded(stored, *self._scales(name, stored))

    def _scales(self, name: str, like: Expr) -> list[Any]:
        lanes = with_lanes("", like)[1:]
        held = [self.buffers[f"{name}_{part}"][0] for part in ("scale", "zero")]
        return [tirx.Broadcast(scale, int(lanes)) for scale in held] if lanes else held

    def _score(self, scores: Any, query: Any, highest: Any, key: Expr) -> None:
        place = (self.place[0], self.group, key)
        added = self.lanes.reduction(lambda a, b: a + b, 0.0)
        self.lanes.over(self.what.width, lambda at: added.add(query[at] * self._read("key", place, at)))
        score = added.result()
        if self.what.scored is not None:
            score = self._rounded("scores", self.what.scored, score)
        score = T.Bind(self._masked(score * tirx.const(self.what.factor, "float32"), key))
        T.buffer_store(scores, score, [key])
        T.buffer_store(highest, tirx.max(highest[0], score), [0])

    def _rounded(self, name: str, grid: Grid, value: Expr) -> Any:
        scale, zero = self._scales(name, value)
        return decoded(T.Bind(codes(value, scale, zero, grid)), scale, zero)

    def _masked(self, score: Any, key: Expr) -> Any:
        gone = tirx.const(LEAST, "float32") if self.what.explicit else tirx.const(float("-inf"), "float32")
        if self.what.causal:
            score = tirx.Select(key <= self.place[2], score, gone)
        if "mask" not in self.buffers:
            return score
        index = [i64(0) if one else at for one, at in zip(self.what.spread, (*self.place, key), strict=True)]
        mask = self.buffers["mask"][tuple(index)]
        return score + mask if self.what.mask == "float32" else tirx.Select(mask, score, gone)

    def _context(self, scores: Any, total: Any) -> None:
        zero = tirx.const(0.0, "float32")
        width = self.what.value_width
        held = T.alloc_buffer((width,), "float32")
        self.lanes.over(
            width, lambda at: T.buffer_store(held, zero.astype("float32") if _scalar(at) else _zeros(), [at])
        )
        with T.serial(i64(0), self.keys) as key:
            share = T.Bind(tirx.Select(total[0] > zero, scores[key] / total[0], zero))
            if self.what.probs is not None:
                share = T.Bind(self._rounded("probs", self.what.probs, share))
            place = (self.place[0], self.group, key)
            self.lanes.over(width, lambda at: self._accumulate(held, share, place, at))
        self.lanes.over(width, lambda at: self._store(held[at], at))

    def _accumulate(self, held: Any, share: Any, place: tuple[Expr, ...], at: Expr) -> None:
        value = self._read("value", place, at)
        T.buffer_store(held, held[at] + (share if _scalar(at) else tirx.Broadcast(share, 16)) * value, [at])

    def _store(self, value: Any, at: Expr) -> None:
        batch, head, query = self.place
        width = i64(self.what.value_width)
        start = head * width
        column = (
            at if not self.what.joined else start + at if _scalar(at) else tirx.Ramp(start + at.base, at.stride, 16)
        )
        if self.what.output is not None:
            value = self._code(T.Bind(value), column)
        T.buffer_store(
            self.buffers["result"], value, [batch, query, column] if self.what.joined else [batch, head, query, at]
        )

    def _code(self, value: Any, column: Expr) -> Any:
        assert self.what.output is not None
        if self.what.scales == 1:
            scale, zero = self._scales("out", value)
        else:
            scale, zero = (self.buffers[f"out_{part}"][column] for part in ("scale", "zero"))
        return codes(value, scale, zero, self.what.output).astype(with_lanes(self.what.result_dtype, value))


def _scalar(at: Expr) -> bool:
    return not isinstance(at, tirx.Ramp)


def _zeros() -> Any:
    return tirx.Broadcast(tirx.const(0.0, "float32"), 16)

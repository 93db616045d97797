"""Attention on the CPU as one function: few queries, as in decoding, one by one; many in tiles.

Each single query of a head is a task, and goes over all keys in vectors of its width. Scores and probabilities of a
query wait in scratch memory; the softmax is that of the whole row. Products are summed in float32, of values that are
dequantized as they are read.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from bitlower.backends.tvm_kernels.schedules.cpu import attention_tiles
from bitlower.backends.tvm_kernels.schedules.cpu.rowwise import VectorLanes
from bitlower.backends.tvm_kernels.spec.attention import Attention
from bitlower.backends.tvm_kernels.spec.target import AttentionConfig
from bitlower.backends.tvm_kernels.tir.attention import LEAST, Operands, function
from bitlower.backends.tvm_kernels.tir.expressions import Expr, exp
from bitlower.backends.tvm_kernels.tir.function import i64, when


def attention(what: Attention, config: AttentionConfig) -> Any:
    """The PrimFunc, with the arguments of :func:`~bitlower.backends.tvm_kernels.tir.attention.function`."""

    def body(operands: Operands, batch: Any, queries: Any, keys: Any) -> None:
        heads = i64(what.heads)

        def singly() -> None:
            with T.parallel(i64(0), batch * heads * queries) as task:
                rest = task // queries
                _Query(operands, (rest // heads, rest % heads, task % queries), keys).emit()

        def together() -> None:
            with T.parallel(i64(0), batch * heads) as task:
                attention_tiles.Head(operands, config, task // heads, task % heads, queries, keys).emit()

        if attention_tiles.fits(what):
            when(queries < i64(config.query_tiles[-1]), singly, together)
        else:
            singly()

    return function(what, body)


class _Query:
    """One query of one head."""

    def __init__(self, operands: Operands, place: tuple[Expr, ...], keys: Any) -> None:
        self.what, self.operands, self.place, self.keys = operands.what, operands, place, keys
        self.group = place[1] // i64(self.what.heads // self.what.kv_heads)
        self.lanes = VectorLanes()

    def emit(self) -> None:
        """Scores, softmax, and the sum of values."""
        scores = T.alloc_buffer((self.keys,), "float32")
        query = T.alloc_buffer((self.what.head_dim,), "float32")
        read = self.operands.real
        self.lanes.over(self.what.head_dim, lambda at: T.buffer_store(query, read("query", self.place, at), [at]))
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

    def _score(self, scores: Any, query: Any, highest: Any, key: Expr) -> None:
        place = (self.place[0], self.group, key)
        added = self.lanes.reduction(lambda a, b: a + b, 0.0)
        self.lanes.over(self.what.head_dim, lambda at: added.add(query[at] * self.operands.real("key", place, at)))
        score = T.Bind(self.operands.score(added.result(), self.place, key))
        T.buffer_store(scores, score, [key])
        T.buffer_store(highest, tirx.max(highest[0], score), [0])

    def _context(self, scores: Any, total: Any) -> None:
        zero = tirx.const(0.0, "float32")
        head_dim = self.what.value_head_dim
        sums = T.alloc_buffer((head_dim,), "float32")
        self.lanes.over(head_dim, lambda at: T.buffer_store(sums, zero if _scalar(at) else _zeros(), [at]))
        with T.serial(i64(0), self.keys) as key:
            share = T.Bind(tirx.Select(total[0] > zero, scores[key] / total[0], zero))
            if self.what.probs is not None:
                share = T.Bind(self.operands.rounded("probs", self.what.probs, share))
            place = (self.place[0], self.group, key)
            self.lanes.over(head_dim, lambda at: self._accumulate(sums, share, place, at))
        self.lanes.over(head_dim, lambda at: self.operands.store(sums[at], self.place, at))

    def _accumulate(self, sums: Any, share: Any, place: tuple[Expr, ...], at: Expr) -> None:
        value = self.operands.real("value", place, at)
        T.buffer_store(sums, sums[at] + (share if _scalar(at) else tirx.Broadcast(share, 16)) * value, [at])


def _scalar(at: Expr) -> bool:
    return not isinstance(at, tirx.Ramp)


def _zeros() -> Any:
    return tirx.Broadcast(tirx.const(0.0, "float32"), 16)

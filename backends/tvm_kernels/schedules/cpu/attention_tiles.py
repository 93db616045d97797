"""Attention on the CPU for many queries: a head is a task, keys lie across the lanes, queries go in register tiles.

Keys and values of the head are dequantized once, keys transposed, so that products of queries and keys need no sums
over lanes. The softmax is that of whole rows; products are summed in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from bitlower.backends.tvm_kernels.schedules.cpu.rowwise import VectorReduction
from bitlower.backends.tvm_kernels.schedules.cpu.vectors import LANES, fill, get, local, over_rows, put, ramp, splat
from bitlower.backends.tvm_kernels.spec.attention import Attention
from bitlower.backends.tvm_kernels.spec.target import AttentionConfig
from bitlower.backends.tvm_kernels.tir.attention import LEAST, Operands
from bitlower.backends.tvm_kernels.tir.expressions import Expr, const, exp, spread
from bitlower.backends.tvm_kernels.tir.function import i64


def fits(what: Attention) -> bool:
    """Whether values are whole vectors."""
    return what.value_head_dim % LANES == 0


class Head:
    """Emits all queries of one head.

    Args:
        operands: of the attention, which :func:`fits`.
        config: how many queries and vectors go together.
        batch: of the head.
        head: among those of the queries.
        queries: how many there are.
        keys: how many there are.
    """

    def __init__(
        self, operands: Operands, config: AttentionConfig, batch: Expr, head: Expr, queries: Any, keys: Any
    ) -> None:
        self.what, self.operands, self.config = operands.what, operands, config
        self.batch, self.head, self.queries, self.keys = batch, head, queries, keys
        step = LANES * config.key_vectors
        self.padded = (keys + i64(step - 1)) // i64(step) * i64(step)

    def emit(self) -> None:
        """The whole head."""
        what = self.what
        self.key = T.alloc_buffer((what.head_dim, self.padded), "float32")
        self.value = T.alloc_buffer((self.keys, what.value_head_dim), "float32")
        self._unfold()
        over_rows(self.queries, self.config.query_tiles, self._tile)

    def _unfold(self) -> None:
        """Keys, transposed, zero behind the last one; and values."""
        what, group = self.what, self.head // i64(self.what.heads // self.what.kv_heads)
        with T.serial(i64(0), self.keys) as key:
            place = (self.batch, group, key)
            with T.serial(i64(0), i64(what.head_dim)) as at:
                T.buffer_store(self.key, self.operands.real("key", place, at), [at, key])
            with T.serial(i64(0), i64(what.value_head_dim // LANES)) as part:
                at = ramp(part * i64(LANES))
                T.buffer_store(self.value, self.operands.real("value", place, at), [key, at])
        with T.serial(i64(0), i64(what.head_dim)) as at, T.serial(i64(0), self.padded - self.keys) as rest:
            T.buffer_store(self.key, tirx.const(0.0, "float32"), [at, self.keys + rest])

    def _tile(self, tile: int, first: Expr) -> None:
        """``tile`` queries from ``first`` on."""
        shares = T.alloc_buffer((tile, self.padded), "float32")
        self._products(tile, first, shares)
        for line in range(tile):
            self._softmax((self.batch, self.head, first + i64(line)), shares, line)
        vectors, each = self.what.value_head_dim // LANES, self.config.value_vectors
        for start in range(0, vectors, each):
            self._context(tile, first, shares, range(start, min(start + each, vectors)))

    def _products(self, tile: int, first: Expr, products: Any) -> None:
        """Products of queries and keys; what stands behind the last key is zero."""
        what, vectors = self.what, self.config.key_vectors
        count = tile * vectors
        query = T.alloc_buffer((tile, what.head_dim), "float32")
        for line in range(tile):
            place = (self.batch, self.head, first + i64(line))
            with T.serial(i64(0), i64(what.head_dim)) as at:
                T.buffer_store(query, self.operands.real("query", place, at), [i64(line), at])
        with T.serial(i64(0), self.padded // i64(LANES * vectors)) as block:
            start = block * i64(LANES * vectors)
            sums = local(count, "float32")
            fill(sums, "float32")
            with T.serial(i64(0), i64(what.head_dim)) as at:
                keys = [T.Bind(self.key[at, ramp(start + i64(part * LANES))]) for part in range(vectors)]
                for line in range(tile):
                    x = splat(query[i64(line), at])
                    for part, key in enumerate(keys):
                        index = line * vectors + part
                        put(sums, index, get(sums, index) + x * key)
            for line in range(tile):
                for part in range(vectors):
                    value = get(sums, line * vectors + part)
                    T.buffer_store(products, value, [i64(line), ramp(start + i64(part * LANES))])

    def _softmax(self, place: tuple[Expr, ...], scores: Any, line: int) -> None:
        """Turn the products of one query into rounded probabilities."""
        operands, what = self.operands, self.what
        highest = VectorReduction(tirx.max, LEAST)

        def mask(at: Expr) -> None:
            score = T.Bind(operands.score(scores[i64(line), at], place, at))
            T.buffer_store(scores, score, [i64(line), at])
            highest.add(score)

        self._over_keys(mask)
        most, total = highest.result(), VectorReduction(lambda a, b: a + b, 0.0)

        def share(at: Expr) -> None:
            score = scores[i64(line), at]
            part = exp(score - spread(most, score))
            part = T.Bind(tirx.Select(score < const(LEAST, score), const(0.0, score), part))
            T.buffer_store(scores, part, [i64(line), at])
            total.add(part)

        self._over_keys(share)
        whole = total.result()

        def divide(at: Expr) -> None:
            part = scores[i64(line), at]
            whole_here = spread(whole, part)
            part = T.Bind(tirx.Select(whole_here > const(0.0, part), part / whole_here, const(0.0, part)))
            if what.probs is not None:
                part = operands.rounded("probs", what.probs, part)
            T.buffer_store(scores, part, [i64(line), at])

        self._over_keys(divide)

    def _over_keys(self, body: Callable[[Expr], None]) -> None:
        """``body`` at every vector of keys, then at every key that is left."""
        with T.serial(i64(0), self.keys // i64(LANES)) as at:
            body(ramp(at * i64(LANES)))
        with T.serial(i64(0), self.keys % i64(LANES)) as at:
            body(self.keys // i64(LANES) * i64(LANES) + at)

    def _context(self, tile: int, first: Expr, shares: Any, parts: range) -> None:
        """Sums of values in some of their columns, which are written."""
        count = tile * len(parts)
        sums = local(count, "float32")
        fill(sums, "float32")
        with T.serial(i64(0), self.keys) as key:
            values = [T.Bind(self.value[key, ramp(i64(part * LANES))]) for part in parts]
            for line in range(tile):
                share = splat(shares[i64(line), key])
                for at, value in enumerate(values):
                    index = line * len(parts) + at
                    put(sums, index, get(sums, index) + share * value)
        for line in range(tile):
            place = (self.batch, self.head, first + i64(line))
            for at, part in enumerate(parts):
                self.operands.store(get(sums, line * len(parts) + at), place, ramp(i64(part * LANES)))

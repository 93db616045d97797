"""Attention on a GPU as one kernel: a block takes 16 queries or fewer that share keys, a warp up to four of them.

Keys and values go through shared memory, 32 at a time, one a lane; heads that share them lie in one block. Keys are
gone over twice: first for the maximum and the sum of each query, of which every lane keeps a part of its own, then for
the shares, which must be whole before they are rounded, and the sum of values. Products of codes with codes are
products of bytes with sums in int32; all else is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from bitlower.backends.tvm_kernels.schedules.gpu.threads import add_bytes, all_reduce, dot_bytes, sync
from bitlower.backends.tvm_kernels.spec.attention import OPERANDS, Attention
from bitlower.backends.tvm_kernels.spec.target import WARP, AttentionConfig, Target
from bitlower.backends.tvm_kernels.tir.attention import LEAST, Operands, function
from bitlower.backends.tvm_kernels.tir.expressions import Expr, exp
from bitlower.backends.tvm_kernels.tir.function import i64, when

_BLOCKS = "tirx.launch_bounds_min_blocks_per_sm"
"""Unless it is said, the assembler goes for many, and spills."""
_BYTES = ("int8", "uint8")
_SIGNS = -0x7F7F7F80
"""Turns four unsigned bytes into signed ones that are less by 128."""


def attention(what: Attention, target: Target, config: AttentionConfig) -> Any:
    """The PrimFunc, with the arguments of :func:`~bitlower.backends.tvm_kernels.tir.attention.function`."""

    def body(operands: Operands, batch: Any, queries: Any, keys: Any) -> None:
        rows = config.warps * _each(what, config)
        total = i64(what.heads // what.kv_heads) * queries
        with (
            T.launch_thread("blockIdx.x", (total + i64(rows - 1)) // i64(rows)) as block,
            T.launch_thread("blockIdx.y", what.kv_heads) as group,
            T.launch_thread("blockIdx.z", batch) as item,
            T.launch_thread("threadIdx.y", config.warps) as warp,
            T.launch_thread("threadIdx.x", WARP) as lane,
            T.attr(tirx.const(0, "int32"), _BLOCKS, tirx.const(_blocks(what, config), "int32")),
        ):
            place = (item.astype("int64"), group.astype("int64"))
            _Tile(operands, (target, config), (block, warp, lane), place, (queries, keys)).emit()

    return function(what, body)


def _blocks(what: Attention, config: AttentionConfig) -> int:
    wide = max(what.head_dim, what.value_head_dim) > config.chunk
    return config.blocks - wide  # of 4 warps: 168 registers a thread, or 128


def _each(what: Attention, config: AttentionConfig) -> int:
    """Queries of a warp: fewer where they are wide, so that registers and shared memory hold them."""
    size = max(what.head_dim, what.value_head_dim)
    return max(1, config.queries // (1 if size <= 128 else 2 if size <= 256 else 4))


class _Tile:
    """The queries of one block; those of one warp in ``places``."""

    def __init__(
        self, operands: Operands, how: tuple[Target, AttentionConfig], threads: tuple[Any, ...], place: Any, sizes: Any
    ) -> None:
        self.what, self.operands, self.place = operands.what, operands, place
        self.target, self.config = how
        block, self.warp, self.lane = threads
        self.queries, self.keys = sizes
        what, self.each = self.what, _each(operands.what, self.config)
        self.thread = T.Bind((self.warp * WARP + self.lane).astype("int64"))
        self.column = T.Bind(self.lane.astype("int64"))
        self.first = T.Bind(block.astype("int64") * i64(self.config.warps * self.each))
        self.own = [self.warp * tirx.const(self.each, "int32") + tirx.const(at, "int32") for at in range(self.each)]
        self.bytes_in = what.query in _BYTES and what.key in _BYTES and what.head_dim % 4 == 0
        self.bytes_out = what.probs is not None and what.probs.bits <= 8 and what.value in _BYTES
        self.words = what.head_dim // 4 if self.bytes_in else what.head_dim
        self.chunk = min(self.config.chunk, self.words)
        self.quad = 4 if self.words % 4 == 0 else 1
        self._allocate()

    def _allocate(self) -> None:
        """Shared memory: queries, a chunk of keys, a chunk of values, and the shares of a tile of keys."""
        rows, kind = self.config.warps * self.each, "int32" if self.bytes_in else "float32"
        self.pitch = self.chunk + (4 if self.quad == 4 else 1 - self.chunk % 2)
        self.query = T.alloc_buffer((rows * self.words,), kind, scope="shared")
        self.key = T.alloc_buffer((WARP * self.pitch,), kind, scope="shared")
        self.across = min(self.config.chunk, -(-self.what.value_head_dim // WARP) * WARP)
        lines = WARP // 4 if self.bytes_out else WARP
        self.value = T.alloc_buffer((lines * self.across,), "int32" if self.bytes_out else "float32", scope="shared")
        self.share = T.alloc_buffer((rows * WARP,), "int8" if self.bytes_out else "float32", scope="shared")
        self.head, self.position = (T.alloc_buffer((rows,), "int32", scope="shared") for _ in range(2))

    def _place(self) -> None:
        """Note head and position of each line of the block; those of the last query beyond the end."""
        times = tirx.const(self.what.heads // self.what.kv_heads, "int32")
        queries = self.queries.astype("int32")  # a division of 64 bits is a function
        row = T.Bind(tirx.min((self.first + self.thread).astype("int32"), times * queries - 1))

        def note() -> None:
            T.buffer_store(self.head, self.place[1].astype("int32") * times + row // queries, [self.thread])
            T.buffer_store(self.position, row % queries, [self.thread])

        when(self.thread < i64(self.config.warps * self.each), note)
        sync()

    def _query(self, line: Expr) -> tuple[Any, Any, Any]:
        """Batch, head and position of a line of the block."""
        return self.place[0], self.head[line].astype("int64"), self.position[line].astype("int64")

    def emit(self) -> None:
        """Queries to shared memory, the two passes over keys, and the result."""
        self._place()
        self._fill(self.query, self.words, self.config.warps * self.each, (0, self.words), "query", self._query)
        top, total = (_registers(self.each, "float32", value) for value in (LEAST, 0.0))
        self._over_keys(lambda key: self._gather(key, top, total))
        for at in range(self.each):
            self._join(at, top, total)
        sums = _Sums(self.each, -(-self.what.value_head_dim // WARP), self.bytes_out)
        self._over_keys(lambda key: self._add(key, top, total, sums))
        self._store(sums)

    def _over_keys(self, body: Callable[[Expr], None]) -> None:
        with T.serial(i64(0), (self.keys + i64(WARP - 1)) // i64(WARP)) as tile:
            body(T.Bind(tile * i64(WARP)))

    def _fill(
        self, shared: Any, pitch: int, lines: int, part: tuple[int, int], name: str, place: Callable[[Expr], Any]
    ) -> None:
        """Stage words or floats ``part[0] … part[1]`` of queries or keys; ``place`` says whose a line is."""
        begin, end = part
        wide = 1 if self.bytes_in else self._lanes(name)

        def one(line: Any, at: Any) -> None:
            row = place(line)
            column = (i64(begin) + at) * i64(4) if self.bytes_in else i64(begin) + at
            value = self._word(name, row, column) if self.bytes_in else self._floats(name, row, column, wide)
            T.buffer_store(shared, value, [_run(line * i64(pitch) + at, wide)])

        self._spread(lines, (end - begin) // wide, lambda line, at: one(line, at * i64(wide)))

    def _spread(self, lines: int, across: int, body: Callable[[Any, Any], None]) -> None:
        """``body(line, at)`` for all lines and places across, shared out among the threads of the block."""
        count, threads = lines * across, self.config.warps * WARP
        with T.serial(i64(0), i64(-(-count // threads))) as turn:
            place = T.Bind(turn * i64(threads) + self.thread)
            line, at = T.Bind(place // i64(across)), T.Bind(place % i64(across))
            if count % threads:
                when(place < i64(count), lambda: body(line, at))
            else:
                body(line, at)

    def _lanes(self, name: str) -> int:
        """How many neighbours are read at once: four where every row of them starts at a multiple of four."""
        merged = self.what.places[OPERANDS.index(name)] or (0, 0)
        head_dim = self.what.value_head_dim if name == "value" else self.what.head_dim
        return 4 if all(size % 4 == 0 for size in (head_dim, *merged)) else 1

    def _word(self, name: str, place: tuple[Any, ...], column: Expr) -> Any:
        """Four codes of a query or a key as signed bytes."""
        if self._lanes(name) == 4:
            word = tirx.reinterpret("int32", self.operands.stored(name, place, _run(column, 4)))
        else:
            word = _pack([self.operands.stored(name, place, column + i64(byte)) for byte in range(4)])
        return word ^ tirx.const(_SIGNS, "int32") if getattr(self.what, name) == "uint8" else word

    def _floats(self, name: str, place: tuple[Any, ...], column: Expr, lanes: int) -> Any:
        return self.operands.real(name, place, _run(column, lanes))

    def _key(self, first: Expr) -> Callable[[Expr], tuple[Any, ...]]:
        """Whose a line of keys or values is; the last one's beyond the end."""
        return lambda line: (*self.place, tirx.min(first + line, self.keys - i64(1)))

    def _scores(self, first: Expr) -> list[Any]:
        """The score of each query of the warp and the key of this lane; minus infinity beyond the end."""
        kind = "int32" if self.bytes_in else "float32"
        sums = _registers(self.each, kind, 0)
        ones = _registers(1, "int32", 0) if self.bytes_in else None
        for begin in range(0, self.words, self.chunk):
            end = min(begin + self.chunk, self.words)
            sync()
            self._fill(self.key, self.pitch, WARP, (begin, end), "key", self._key(first))
            sync()
            with T.serial(0, (end - begin) // self.quad) as step:
                self._multiply(begin, step * tirx.const(self.quad, "int32"), sums, ones)
        key = T.Bind(first + self.column)
        inside, near = key < self.keys, T.Bind(tirx.min(key, self.keys - i64(1)))
        scores = []
        for at, line in enumerate(self.own):
            place = self._query(line)
            product = self._product(at, sums[at], ones) if self.bytes_in else sums[at]
            score = self.operands.score(product, place, near)
            scores.append(T.Bind(tirx.Select(inside, score, tirx.const(float("-inf"), "float32"))))
        return scores

    def _multiply(self, begin: int, at: Expr, sums: Any, ones: Any) -> None:
        """Add the products of four words or floats (or of one)."""
        key = _local(self.key, self.lane * tirx.const(self.pitch, "int32") + at, self.quad)
        if ones is not None:
            for k in range(self.quad):
                T.buffer_store(ones, add_bytes(self.target, ones[0], key[k]), [0])
        for row, line in enumerate(self.own):
            query = _local(self.query, line * tirx.const(self.words, "int32") + (at + begin), self.quad)
            for k in range(self.quad):
                if self.bytes_in:
                    T.buffer_store(sums, dot_bytes(self.target, sums[row], query[k], key[k]), [row])
                else:
                    T.buffer_store(sums, sums[row] + query[k] * key[k], [row])

    def _product(self, at: int, total: Expr, ones: Any) -> Any:
        """``Σ (q − z)(k − z)``, dequantized: the sum of signed bytes less the shares of the zero points."""
        added = _registers(1, "int32", 0)
        with T.serial(0, self.words) as word:
            query = self.query[self.own[at] * tirx.const(self.words, "int32") + word]
            T.buffer_store(added, add_bytes(self.target, added[0], query), [0])
        zeros = [self._zero(name, getattr(self.what, name)) for name in ("query", "key")]
        exact = total - zeros[0] * ones[0] - zeros[1] * added[0]
        exact = exact + tirx.const(self.what.head_dim, "int32") * zeros[0] * zeros[1]
        scale = self._scale("query") * self._scale("key")
        return exact.astype("float32") * scale

    def _zero(self, name: str, dtype: str) -> Any:
        zero = self.operands.buffers[f"{name}_zero"][0].astype("int32")
        return zero - tirx.const(128 if dtype == "uint8" else 0, "int32")

    def _scale(self, name: str) -> Any:
        return self.operands.buffers[f"{name}_scale"][0]

    def _gather(self, first: Expr, top: Any, total: Any) -> None:
        """Take a tile of keys into this lane's maximum and sum of each query."""
        one = tirx.const(1.0, "float32")
        for at, score in enumerate(self._scores(first)):
            step = T.Bind(score - top[at])
            share = T.Bind(exp(tirx.min(step, tirx.const(0.0, "float32") - step)))
            larger = tirx.Select(step > tirx.const(0.0, "float32"), total[at] * share + one, total[at] + share)
            gone = score < tirx.const(LEAST, "float32")
            T.buffer_store(total, tirx.Select(gone, total[at], larger), [at])
            T.buffer_store(top, tirx.max(top[at], score), [at])

    def _join(self, at: int, top: Any, total: Any) -> None:
        """Maximum and sum of a query over all lanes, on every one of them."""
        highest = T.Bind(all_reduce(tirx.max, tirx.const(LEAST, "float32"), top[at], [self.lane]))
        part = total[at] * exp(top[at] - highest)
        zero = tirx.const(0.0, "float32")
        T.buffer_store(total, all_reduce(lambda a, b: a + b, zero, part, [self.lane]), [at])
        T.buffer_store(top, highest, [at])

    def _add(self, first: Expr, top: Any, total: Any, sums: _Sums) -> None:
        """Add the values of a tile of keys, each times its share."""
        zero = tirx.const(0.0, "float32")
        inside = first + self.column < self.keys
        for at, score in enumerate(self._scores(first)):
            gone = score < tirx.const(LEAST, "float32")
            share = tirx.Select(gone, zero, exp(score - top[at]))
            share = T.Bind(tirx.Select(total[at] > zero, share / total[at], zero))
            T.buffer_store(self.share, self._shared(share, inside, at, sums), [self._share_at(at)])
        for begin in range(0, self.what.value_head_dim, self.across):
            end = min(begin + self.across, self.what.value_head_dim)
            sync()
            if self.bytes_out:
                self._spread(WARP // 4, end - begin, partial(self._put_bytes, first, begin))
            else:
                self._put_floats(first, begin, end)
            sync()
            columns = range(begin // WARP, -(-end // WARP))
            with T.serial(0, WARP // 4) as four:
                self._accumulate(four, columns, begin // WARP, sums)

    def _share_at(self, at: int) -> Any:
        return self.own[at] * tirx.const(WARP, "int32") + self.lane

    def _shared(self, share: Any, inside: Expr, at: int, sums: _Sums) -> Any:
        """What other lanes read of a share: its value, or its code as a signed byte, which is 0 beyond the end."""
        grid = self.what.probs
        if grid is None:
            return share
        if not self.bytes_out:
            return self.operands.rounded("probs", grid, share)
        code = self.operands.code("probs", grid, share) - tirx.const(0 if grid.signed else 128, "int32")
        code = T.Bind(tirx.Select(inside, code, tirx.const(0, "int32")))
        T.buffer_store(sums.shares, sums.shares[at] + code, [at])
        return code.astype("int8")

    def _put_floats(self, first: Expr, begin: int, end: int) -> None:
        lanes = self._lanes("value")

        def one(line: Any, at: Any) -> None:
            value = self.operands.real("value", self._key(first)(line), _run(i64(begin) + at * i64(lanes), lanes))
            T.buffer_store(self.value, value, [_run(line * i64(self.across) + at * i64(lanes), lanes)])

        self._spread(WARP, (end - begin) // lanes, one)

    def _put_bytes(self, first: Expr, begin: int, line: Any, at: Any) -> None:
        """The codes of four keys in one column as a word; 0 beyond the end."""
        parts = []
        for byte in range(4):
            key = first + line * i64(4) + i64(byte)
            place = (*self.place, tirx.min(key, self.keys - i64(1)))
            code = self.operands.stored("value", place, i64(begin) + at).astype("int32")
            code = code - tirx.const(128 if self.what.value == "uint8" else 0, "int32")
            parts.append(tirx.Select(key < self.keys, code, tirx.const(0, "int32")))
        T.buffer_store(self.value, _pack(parts), [line * i64(self.across) + at])

    def _accumulate(self, four: Any, columns: range, start: int, sums: _Sums) -> None:
        """Add what four keys give to each query of the warp and column of the lane."""
        if self.bytes_out:
            words = T.decl_buffer(
                (self.config.warps * self.each * WARP // 4,), "int32", data=self.share.data, scope="shared"
            )
            shares = [T.Bind(words[line * (WARP // 4) + four]) for line in self.own]
            for column in columns:
                value = T.Bind(self.value[four * self.across + (column - start) * WARP + self.lane])
                T.buffer_store(sums.values, add_bytes(self.target, sums.values[column], value), [column])
                for row, share in enumerate(shares):
                    at = row * sums.columns + column
                    T.buffer_store(sums.totals, dot_bytes(self.target, sums.totals[at], share, value), [at])
            return
        shares = [_local(self.share, line * WARP + four * 4, 4) for line in self.own]
        for key in range(4):
            line = (four * 4 + key) * self.across + self.lane
            for column in columns:
                value = T.Bind(self.value[line + (column - start) * WARP])
                for row in range(self.each):
                    at = row * sums.columns + column
                    T.buffer_store(sums.totals, sums.totals[at] + shares[row][key] * value, [at])

    def _store(self, sums: _Sums) -> None:
        """Write the results of queries that exist, in columns that exist."""
        if self.bytes_out:
            shares = [
                T.Bind(all_reduce(lambda a, b: a + b, tirx.const(0, "int32"), sums.shares[at], [self.lane]))
                for at in range(self.each)
            ]
        count = i64(self.what.heads // self.what.kv_heads) * self.queries
        for row, line in enumerate(self.own):
            place = self._query(line)
            for column in range(sums.columns):
                value = sums.totals[row * sums.columns + column]
                if self.bytes_out:
                    value = self._dequantized(value, shares[row], sums.values[column])
                at = self.column + i64(column * WARP)
                inside = tirx.all(self.first + line.astype("int64") < count, at < i64(self.what.value_head_dim))
                when(inside, partial(self.operands.store, value, place, at))

    def _dequantized(self, total: Expr, shares: Expr, values: Expr) -> Any:
        """``Σ (p − z)(v − z)`` of signed bytes, float32."""
        grid = self.what.probs
        assert grid is not None
        left, right = self._zero("probs", "int8" if grid.signed else "uint8"), self._zero("value", self.what.value)
        exact = total - left * values - right * shares + self.keys.astype("int32") * left * right
        return exact.astype("float32") * (self._scale("probs") * self._scale("value"))


class _Sums:
    """Sums of a warp's queries in the registers of its lanes.

    Args:
        each: queries.
        columns: of a lane.
        exact: whether they are sums of products of bytes; then those of the bytes themselves are kept too.
    """

    def __init__(self, each: int, columns: int, exact: bool) -> None:
        self.columns = columns
        self.totals = _registers(each * columns, "int32" if exact else "float32", 0)
        if exact:
            self.shares, self.values = _registers(each, "int32", 0), _registers(columns, "int32", 0)


def _registers(count: int, dtype: str, value: float) -> Any:
    registers = T.alloc_buffer((count,), dtype, scope="local")
    for at in range(count):
        T.buffer_store(registers, tirx.const(value, dtype), [at])
    return registers


def _run(at: Expr, lanes: int) -> Any:
    """``lanes`` neighbours from ``at`` on."""
    return tirx.Ramp(at, tirx.const(1, str(at.ty.dtype)), lanes) if lanes > 1 else at


def _local(shared: Any, at: Expr, lanes: int) -> Any:
    """Neighbours in shared memory, read at once."""
    registers = T.alloc_buffer((lanes,), str(shared.dtype), scope="local")
    T.buffer_store(registers, shared[_run(at, lanes)], [tirx.Ramp(0, 1, lanes) if lanes > 1 else 0])
    return registers


def _pack(parts: list[Any]) -> Any:
    """Four bytes as a word."""
    mask = tirx.const(255, "int32")
    word = parts[0].astype("int32") & mask
    for byte, part in enumerate(parts[1:], 1):
        word = word | (part.astype("int32") & mask) << tirx.const(8 * byte, "int32")
    return word

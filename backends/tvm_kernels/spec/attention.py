"""What an attention kernel computes: shapes, masks, roundings, layouts."""

from __future__ import annotations

from dataclasses import dataclass

from bitlower.backends.tvm_kernels.spec.base import function_name
from bitlower.ir import Grid

OPERANDS = ("query", "key", "value")


@dataclass(frozen=True, kw_only=True)
class Attention:
    """What decides the code of an attention; batch, queries and keys are known at run time.

    Args:
        heads: of queries.
        kv_heads: of keys and values; each serves ``heads / kv_heads`` of the queries.
        head_dim: of queries and keys.
        value_head_dim: of values.
        factor: what scores are multiplied by.
        causal: mask keys that are later than the query, both counted from the start.
        joined: the result is ``[batch, queries, heads · value_head_dim]``.
        query: the dtype of the queries, ``float32``, ``float16`` or that of codes.
        key: the dtype of the keys.
        value: the dtype of the values.
        mask: the dtype of the mask, ``bool`` or ``float32``; empty: there is none.
        mask_broadcast: which of the four axes of the mask have length 1.
        scored: the grid that scores are rounded to; None: they are not.
        probs: the grid that probabilities are rounded to.
        output: the grid of the result, whose codes are given; None: the value.
        scales: how many scales the result has: 1, or one a column.
        result: the dtype of a result that is no codes.
        places: of query, key and value: where one lies in the rows of merged layers, ``(columns of a row, the first of
            its columns)``, head after head; None: its axes are batch, heads, length and head_dim.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_head_dim: int
    factor: float
    causal: bool = False
    joined: bool = False
    query: str = "float32"
    key: str = "float32"
    value: str = "float32"
    mask: str = ""
    mask_broadcast: tuple[bool, ...] = ()
    scored: Grid | None = None
    probs: Grid | None = None
    output: Grid | None = None
    scales: int = 1
    result: str = "float32"
    places: tuple[tuple[int, int] | None, ...] = (None, None, None)

    @property
    def result_dtype(self) -> str:
        """The dtype of the result."""
        return self.result if self.output is None else str(self.output.dtype).removeprefix("torch.")

    @property
    def name(self) -> str:
        """The function's name; see :func:`~bitlower.backends.tvm_kernels.spec.base.function_name`."""
        return function_name("attention", f"h{self.heads}kv{self.kv_heads}x{self.head_dim}_{self.query}", self)

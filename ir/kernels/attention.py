"""Attention as one kernel of a fused Program: products, mask, softmax, the joining of heads, and roundings in between.

See :mod:`bitlower.ir.kernels.references` for how kernel operators read values and what they give.
"""

from __future__ import annotations

import torch

from bitlower.ir.kernels.references import join_heads, like_outputs, output_tensors, read, rounded

aten = torch.ops.aten


@torch.library.custom_op("bitlower::fused_attention", mutates_args=())
def _fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    query_scale: torch.Tensor | None = None,
    query_zero_point: torch.Tensor | None = None,
    key_scale: torch.Tensor | None = None,
    key_zero_point: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
    value_zero_point: torch.Tensor | None = None,
    scores_scale: torch.Tensor | None = None,
    scores_zero_point: torch.Tensor | None = None,
    probs_scale: torch.Tensor | None = None,
    probs_zero_point: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
    out_zero_point: torch.Tensor | None = None,
    *,
    factor: float,
    causal: bool = False,
    explicit: bool = False,
    heads: bool = False,
    scores_grid: str = "",
    probs_grid: str = "",
    out_grid: str = "",
    outputs: str = "value",
) -> list[torch.Tensor]:
    """``softmax(factor · Q̂ K̂ᵀ + mask) V̂``, with scores and probabilities rounded where their grids are given.

    - ``query``: ``[batch, heads, queries, head_dim]``, float32 or codes.
    - ``key``: ``[batch, kv_heads, keys, head_dim]``, float32 or codes; each serves heads / kv_heads query heads.
    - ``value``: ``[batch, kv_heads, keys, head_dim]``, float32 or codes.
    - ``mask``: broadcasts to ``[batch, heads, queries, keys]``; bool, true where a key counts, or float32, added.
    - ``query_scale``: of the query, rank 0; so are all scales and zero points here but those of the result.
    - ``scores_scale``: of Q̂ K̂ᵀ; scores are rounded before they are multiplied by the factor.
    - ``probs_scale``: of the softmax.
    - ``out_scale``: of the result.
    - ``factor``: what the scores are multiplied by.
    - ``causal``: mask keys that are later than the query, both counted from the start (not with ``explicit``).
    - ``explicit``: compute step by step; else as torch's ``scaled_dot_product_attention`` does, which has no roundings
      inside.
    - ``heads``: the result is ``[batch, queries, heads · head_dim]`` instead of ``[batch, heads, queries, head_dim]``.
    - ``out_grid``: the grid of the result; ``scores_grid`` and ``probs_grid`` are those of scores and probabilities.
    - ``outputs``: what is given: ``value``, ``codes``, ``rounded``.
    """
    q = read(query, query_scale, query_zero_point)
    k = read(key, key_scale, key_zero_point)
    v = read(value, value_scale, value_zero_point)
    grouped = q.shape[1] != k.shape[1]
    if explicit:
        times = q.shape[1] // k.shape[1]
        k, v = (part.repeat_interleave(times, 1) if grouped else part for part in (k, v))
        scores = rounded(q @ k.transpose(-2, -1), scores_scale, scores_zero_point, scores_grid) * factor
        shares = aten._safe_softmax.default(_masked(scores, mask), -1)
        probs = rounded(shares, probs_scale, probs_zero_point, probs_grid)
        context = probs @ v
    else:
        attend = aten.scaled_dot_product_attention.default
        context = attend(q, k, v, mask, 0.0, causal, scale=factor, enable_gqa=grouped)
    return output_tensors(join_heads(context) if heads else context, outputs, out_scale, out_zero_point, out_grid)


def _masked(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None:
        return scores
    if mask.dtype != torch.bool:
        return scores + mask
    return scores.masked_fill(mask.logical_not(), -torch.inf)


@_fused_attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *tensors: torch.Tensor | None,
    heads: bool = False,
    out_grid: str = "",
    outputs: str = "value",
    **others: object,
) -> list[torch.Tensor]:
    batch, count, length, head_dim = *query.shape[:3], value.shape[3]
    shape = (batch, length, count * head_dim) if heads else (batch, count, length, head_dim)
    return like_outputs(query, shape, outputs, out_grid)


fused_attention = torch.ops.bitlower.fused_attention.default

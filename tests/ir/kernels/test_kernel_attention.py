"""The attention kernel against numpy in float64: both forms, masks, grouped keys, roundings inside, joined heads."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from bitlower.ir import Granularity
from bitlower.ir.kernels.attention import fused_attention

_CASES = runpy.run_path(str(Path(__file__).parents[1] / "kernel_cases.py"))
GRIDS, assert_codes, assert_values, codes, rounded = (
    _CASES[name] for name in ("GRIDS", "assert_codes", "assert_values", "codes", "rounded")
)
U8 = GRIDS["u8"]
HEADS, QUERIES, KEYS, WIDTH = 4, 3, 5, 8


def attend(q, k, v, factor, mask=None, scores=lambda s: s, probs=lambda p: p) -> np.ndarray:
    k, v = (np.repeat(part, q.shape[1] // part.shape[1], 1) for part in (k, v))
    s = scores(np.einsum("bhqw,bhkw->bhqk", q, k)) * factor
    if mask is not None:
        s = np.where(mask, s, -3.4e38) if mask.dtype == bool else s + mask
    e = np.exp(s - s.max(-1, keepdims=True))
    return np.einsum("bhqk,bhkw->bhqw", probs(e / e.sum(-1, keepdims=True)), v)


def operands(groups: int, as_codes: bool):
    arguments, values = {}, []
    shapes = {"query": (HEADS, QUERIES), "key": (groups, KEYS), "value": (groups, KEYS)}
    for index, (name, (count, length)) in enumerate(shapes.items()):
        x = torch.randn(2, count, length, WIDTH, generator=torch.Generator().manual_seed(index))
        found = codes(x, U8, Granularity.per_tensor())
        arguments |= found.named(name) if as_codes else {name: x}
        values.append(found.values() if as_codes else x.numpy().astype(np.float64))
    return arguments, values


def mask_of(kind: str) -> torch.Tensor | None:
    keep = torch.ones(2, 1, QUERIES, KEYS, dtype=torch.bool)
    keep[1, :, :, 3:] = False
    return {"none": None, "bool": keep, "float": torch.randn(2, 1, QUERIES, KEYS)}[kind]


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("groups", [HEADS, 2])
@pytest.mark.parametrize("kind", ["none", "bool", "float"])
@pytest.mark.parametrize("as_codes", [False, True])
def test_both_forms(explicit: bool, groups: int, kind: str, as_codes: bool) -> None:
    arguments, values = operands(groups, as_codes)
    mask = mask_of(kind)
    [found] = fused_attention(**arguments, mask=mask, factor=0.3, explicit=explicit)
    assert_values(found, attend(*values, 0.3, mask.numpy() if mask is not None else None))


def test_roundings_inside_and_joined_heads() -> None:
    arguments, values = operands(2, as_codes=True)
    mask = mask_of("bool")
    step, middle, small, none = (torch.tensor(v) for v in (0.1, 120.0, 1 / 255, 0.0))
    scale, zero = torch.tensor([[[0.01, 0.02]]]), torch.tensor([[[100.0, 140.0]]])
    value, taken = fused_attention(
        **arguments, mask=mask, factor=0.3, explicit=True, heads=True, scores_scale=step, scores_zero_point=middle,
        scores_grid="u8 asymmetric", probs_scale=small, probs_zero_point=none, probs_grid="u8 asymmetric",
        out_scale=scale, out_zero_point=zero, out_grid="u8 asymmetric", outputs="value codes",
    )  # fmt: skip
    context = attend(
        *values, 0.3, mask.numpy(),
        lambda s: rounded(s, step.numpy(), middle.numpy(), U8), lambda p: rounded(p, small.numpy(), none.numpy(), U8),
    )  # fmt: skip
    expected = np.moveaxis(context, 1, 2).reshape(2, QUERIES, HEADS * WIDTH)
    assert_values(value, expected)
    assert_codes(taken, expected, scale, zero, U8)


def test_a_causal_mask_counts_from_the_start() -> None:
    arguments, values = operands(HEADS, as_codes=False)
    keep = np.tril(np.ones((QUERIES, KEYS), bool))
    [found] = fused_attention(**arguments, factor=0.5, causal=True)
    assert_values(found, attend(*values, 0.5, keep))


@pytest.mark.parametrize("explicit", [False, True])
def test_groups_are_told_by_heads_where_there_are_as_many_keys(explicit: bool) -> None:
    arguments, values = operands(2, as_codes=False)
    few = {name: x if name == "query" else x[:, :, :HEADS] for name, x in arguments.items()}
    [found] = fused_attention(**few, factor=0.5, explicit=explicit)
    assert_values(found, attend(values[0], *(part[:, :, :HEADS] for part in values[1:]), 0.5))


@pytest.mark.parametrize("explicit", [False, True])
def test_a_row_that_is_masked_throughout_gives_zeros(explicit: bool) -> None:
    arguments, values = operands(HEADS, as_codes=False)
    mask = torch.ones(1, 1, QUERIES, KEYS, dtype=torch.bool)
    mask[:, :, 1] = False
    [found] = fused_attention(**arguments, mask=mask, factor=0.5, explicit=explicit)
    expected = attend(*values, 0.5)
    expected[:, :, 1] = 0
    assert_values(found, expected)


@pytest.mark.parametrize("heads", [False, True])
def test_shape_function(heads: bool) -> None:
    arguments, _ = operands(2, as_codes=True)
    options = {"factor": 0.3, "heads": heads, "out_scale": torch.tensor(0.1), "out_zero_point": torch.tensor(0.0)}
    first = tuple(arguments.pop(name) for name in ("query", "key", "value"))
    options |= {"out_grid": "u8 asymmetric", "outputs": "value codes rounded"}
    torch.library.opcheck(fused_attention, first, arguments | options, test_utils=("test_schema", "test_faketensor"))

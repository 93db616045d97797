"""Attention as one function, on the CPU and with GPU schedules, against float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm", reason="the extra tvm is not installed")

import tvm
import tvm_ffi

from bitlower.backends.tvm_kernels import Target, host_target
from bitlower.backends.tvm_kernels.schedules.dispatch import lower_attention
from bitlower.backends.tvm_kernels.spec.attention import OPERANDS, Attention
from bitlower.backends.tvm_kernels.spec.target import AttentionConfig
from bitlower.backends.tvm_kernels.target import tvm_target
from bitlower.ir import BitlowerError, Grid

UINT8 = Grid(8, signed=False, symmetric=False)
SCALES = {"query": (0.02, 120.0), "key": (0.03, 131.0), "value": (0.025, 128.0), "scores": (0.1103, 100.0)}
SCALES |= {"probs": (1 / 255, 3.0), "out": (0.013, 127.0)}
BATCH = 2
SIZES = {"small": (5, 7), "tiles": (19, 41), "step": (1, 70)}
"""Queries and keys."""
CASES = {
    "plain": Attention(heads=4, kv_heads=4, head_dim=16, value_head_dim=16, factor=0.25),
    "ragged-groups": Attention(heads=6, kv_heads=2, head_dim=20, value_head_dim=37, factor=0.2, joined=True),
    "mask": Attention(
        heads=2, kv_heads=1, head_dim=8, value_head_dim=8, factor=0.3, mask="bool",
        mask_broadcast=(False, True, False, False)
    ),
    "added": Attention(
        heads=2, kv_heads=2, head_dim=32, value_head_dim=16, factor=0.2, mask="float32",
        mask_broadcast=(True, True, False, False)
    ),
    "causal": Attention(heads=2, kv_heads=2, head_dim=16, value_head_dim=16, factor=0.25, causal=True),
    "codes": Attention(
        heads=4, kv_heads=2, head_dim=16, value_head_dim=32, factor=0.2, joined=True, query="uint8", key="uint8",
        value="uint8", output=UINT8, scales=128,
    ),
    "rounded": Attention(
        heads=2, kv_heads=2, head_dim=16, value_head_dim=16, factor=0.25, mask="bool",
        mask_broadcast=(False, True, True, False), scored=UINT8, probs=UINT8, output=UINT8,
    ),
    "places": Attention(
        heads=4, kv_heads=2, head_dim=16, value_head_dim=16, factor=0.25, joined=True, places=((96, 8), (96, 48), None)
    ),
    "bytes": Attention(
        heads=4, kv_heads=2, head_dim=72, value_head_dim=40, factor=0.25, joined=True, mask="bool",
        mask_broadcast=(False, True, True, False), scored=UINT8, probs=UINT8, output=UINT8,
        query="uint8", key="uint8", value="uint8", places=(None, (160, 16), (100, 20)),
    ),
    "halves": Attention(
        heads=6, kv_heads=2, head_dim=20, value_head_dim=40, factor=0.2, joined=True, query="float16", key="float16",
        value="float16", result="float16", places=(None, (96, 16), None),
    ),
    "wide": Attention(heads=2, kv_heads=1, head_dim=132, value_head_dim=160, factor=0.1, query="uint8"),
}  # fmt: skip


def rounding(value: np.ndarray, name: str) -> np.ndarray:
    scale, zero = SCALES[name]
    return (np.clip(np.rint(value / np.float32(scale)) + zero, 0, 255) - zero) * np.float64(np.float32(scale))


def real(what: Attention, given: dict[str, np.ndarray], name: str) -> np.ndarray:
    """An operand in float64 with four axes, as many heads as there are of queries."""
    stored, merged = given[name], what.places[OPERANDS.index(name)]
    heads, width = (
        (what.heads if name == "query" else what.kv_heads),
        what.value_head_dim if name == "value" else what.head_dim,
    )
    if merged is not None:
        part = stored[..., merged[1] : merged[1] + heads * width]
        stored = part.reshape(BATCH, -1, heads, width).swapaxes(1, 2)
    value = stored.astype(np.float64)
    if stored.dtype == np.uint8:
        value = (value - SCALES[name][1]) * np.float64(np.float32(SCALES[name][0]))
    return np.repeat(value, what.heads // heads, 1)


def reference(what: Attention, given: dict[str, np.ndarray]) -> np.ndarray:
    """Before the rounding of the result."""
    query, key, value = (real(what, given, name) for name in OPERANDS)
    scores = query @ key.swapaxes(2, 3)
    scores = (rounding(scores, "scores") if what.scored else scores) * what.factor
    gone = -np.inf
    if what.causal:
        scores = np.where(np.tri(*scores.shape[2:], dtype=bool), scores, gone)
    if what.mask:
        scores = np.where(given["mask"], scores, gone) if what.mask == "bool" else scores + given["mask"]
    top = scores.max(-1, keepdims=True)
    shares = np.exp(scores - np.where(np.isinf(top), 0, top))
    total = shares.sum(-1, keepdims=True)
    probs = np.divide(shares, total, out=np.zeros_like(shares), where=total > 0)
    result = (rounding(probs, "probs") if what.probs else probs) @ value
    return result.swapaxes(1, 2).reshape(BATCH, result.shape[2], -1) if what.joined else result


def operands(what: Attention, queries: int, keys: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    shapes = {
        "query": (BATCH, what.heads, queries, what.head_dim),
        "key": (BATCH, what.kv_heads, keys, what.head_dim),
        "value": (BATCH, what.kv_heads, keys, what.value_head_dim),
    }
    given = {}
    for (name, shape), merged in zip(shapes.items(), what.places, strict=True):
        dtype = getattr(what, name)
        shape = shape if merged is None else (BATCH, shape[2], merged[0])
        codes = dtype == "uint8"
        given[name] = random.integers(0, 256, shape, np.uint8) if codes else random.normal(size=shape).astype(dtype)
    if what.mask:
        full = (BATCH, what.heads, queries, keys)
        shape = tuple(1 if one else size for size, one in zip(full, what.mask_broadcast, strict=True))
        kept = random.random(shape) < 0.6
        if queries > 1:
            kept[0, 0, 0] = False  # a row without a key
        given["mask"] = kept if what.mask == "bool" else np.where(kept, random.normal(size=shape), -np.inf)
        given["mask"] = given["mask"].astype(what.mask)
    names = [name for name in shapes if getattr(what, name) == "uint8"]
    names += [name for name, grid in (("scores", what.scored), ("probs", what.probs)) if grid]
    for name in names:
        given |= {f"{name}_{at}": np.array([part], np.float32) for at, part in zip(count(), SCALES[name], strict=False)}
    if what.output:
        given |= {f"out_{at}": np.full(what.scales, part, np.float32) for at, part in enumerate(SCALES["out"])}
        given["out_0"] = given["out_0"] * np.linspace(1, 2, what.scales, dtype=np.float32)
    return given


def check(name: str, size: str, kernel: Callable[..., object]) -> None:
    """``kernel(operands…, result)`` gives what float64 gives; codes but for ties."""
    what = CASES[name]
    given = operands(what, *SIZES[size])
    wanted = reference(what, given)
    result = tvm.runtime.tensor(np.zeros(wanted.shape, what.result_dtype))
    kernel(*map(tvm.runtime.tensor, given.values()), result)
    found = result.numpy()
    if what.output is None:
        limit = 2.0**-11 if what.result == "float16" else 2e-6
        assert np.abs(found - wanted).max() < limit * np.abs(wanted).max()
        return
    ratio = wanted / given["out_0"].astype(np.float64) + SCALES["out"][1]
    near = np.abs(ratio - np.floor(ratio) - 0.5) < 1e-4
    assert ((found == np.clip(np.rint(ratio), 0, 255)) | near).all()
    assert near.mean() < 0.01
    assert len(np.unique(found)) > 20


@pytest.mark.parametrize("name", [name for name in CASES if name != "halves"])
def test_attention_is_that_of_float64(name: str) -> None:
    function = lower_attention(CASES[name], host_target())
    executable = tvm.compile(tvm.IRModule({"attention": function}), target=tvm_target(host_target()))
    check(name, "small", executable["attention"])


@pytest.mark.parametrize("name", ["ragged-groups", "added", "causal", "codes", "rounded", "places", "bytes", "wide"])
def test_attention_on_a_gpu(pocl: Any, name: str) -> None:
    """Whole tiles of queries and keys, ragged ones, and a single query."""
    kernel = pocl.kernel(lower_attention(CASES[name], Target.OPENCL), "attention")
    for size in ("tiles", "step"):
        if size == "tiles" or name != "causal":
            check(name, size, kernel)
            assert len(kernel.launches) == 1


@pytest.mark.parametrize("name", ["mask", "bytes", "halves"])
def test_attention_as_cuda_has_it(fibers: Any, name: str) -> None:
    """Sums over a warp by shuffles, products of bytes by ``__dp4a``, float16 operands."""
    check(name, "tiles", fibers.kernel(lower_attention(CASES[name], Target.CUDA), "attention"))


CONFIG = AttentionConfig(query_tiles=(1, 2, 3), key_vectors=3, value_vectors=1, warps=2, queries=2, chunk=32)


@pytest.mark.parametrize("name", ["places", "codes"])
def test_another_configuration_computes_the_same(pocl: Any, name: str) -> None:
    own, other = (lower_attention(CASES[name], host_target(), config) for config in (None, CONFIG))
    assert not tvm_ffi.structural_equal(own, other)
    executable = tvm.compile(tvm.IRModule({"attention": other}), target=tvm_target(host_target()))
    check(name, "small", executable["attention"])
    check(name, "tiles", pocl.kernel(lower_attention(CASES[name], Target.OPENCL, CONFIG), "attention"))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"query_tiles": (2, 4)}, r"query tiles \[2, 4\] must rise from 1"),
        ({"key_vectors": 0}, "one vector, warp and query at least"),
        ({"blocks": 1}, "two blocks"),
        ({"chunk": 48}, "a chunk of 48 is no multiple of the 32 lanes"),
    ],
)
def test_configurations_that_make_no_kernel_are_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(BitlowerError, match=reason):
        AttentionConfig(**fields)

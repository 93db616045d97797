"""A small input with what the runtime made of it, so that an artifact can be checked without the Program."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
from pydantic import Field

from bitlower.ir import Batch, CheckError
from bitlower.ir.diagnostics import shorten
from bitlower.ir.digits import rounded

Array = np.ndarray[Any, Any]
Run = Callable[[Batch], Mapping[str, Array]]
VALUES = 64
LEAST = 0.9
"""The least cosine of an output to the recorded one. The same runtime on the same processor gives 1; others round ties
otherwise, and quantized models make that visible; a processor whose integer kernels saturate gives far less."""
SIZE = 0.25
"""The largest difference of an output's root mean square to the recorded one, over that."""
_SPREAD = np.float32(0.5)
"""Log-mel spectrograms lie between -1 and 1.5, normalized pictures and sounds about as far from 0."""
_DRAWN = ("input_features", "input_values", "pixel_values")
"""Inputs of sound and pictures, as transformers names them."""
_SEED = 1
_WRITTEN = 4096
"""Entries of such an input up to which it is written down in a self-test."""
_MOST = 1 << 24
"""No dimension of an input or output of a self-test is as large."""
Dtype = Literal["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"]


@dataclass(frozen=True)
class Reference:
    """An output: its shape, its root mean square, and ``VALUES`` entries at even distances."""

    shape: tuple[Annotated[int, Field(ge=0, lt=_MOST)], ...]
    rms: Annotated[float, Field(ge=0)]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.values) != min(VALUES, math.prod(self.shape)):
            raise ValueError(f"{len(self.values)} values for the shape {list(self.shape)}")


@dataclass(frozen=True)
class Input:
    """An input: its dtype and its entries as nested lists; or a mapping.

    That has the ``shape`` of a tensor without any entries, or with a ``seed`` that of one that :func:`drawn` makes.
    """

    dtype: Dtype
    values: Any

    def __post_init__(self) -> None:
        try:
            self.tensor()
        except (ValueError, TypeError, KeyError, RuntimeError, OverflowError) as error:
            raise ValueError(f"its values make no {self.dtype} tensor: {error}") from None

    def tensor(self) -> torch.Tensor:
        """What it holds."""
        dtype = getattr(torch, self.dtype)
        if not isinstance(self.values, Mapping):
            return torch.tensor(self.values, dtype=dtype)
        sizes = [int(size) for size in self.values["shape"]]
        if "seed" in self.values and 0 < math.prod(sizes) < _MOST:
            return drawn(sizes, int(self.values["seed"])).to(dtype)
        if 0 not in sizes or not all(0 <= size < _MOST for size in sizes):
            raise ValueError(f"the shape {shorten(str(sizes))} is not that of a tensor without entries")
        return torch.zeros(sizes, dtype=dtype)


@dataclass(frozen=True)
class SelfTest:
    """Inputs (at most ``ROWS`` rows of ``LENGTH`` entries) and references by name; there are some of both.

    Args:
        inputs: what the model is run on.
        outputs: what the runtime gave when it was compared with the Program on these inputs too.
    """

    inputs: Annotated[Mapping[str, Input], Field(min_length=1)]
    outputs: Annotated[Mapping[str, Reference], Field(min_length=1)]

    def batch(self) -> dict[str, torch.Tensor]:
        """The inputs as tensors."""
        return {name: part.tensor() for name, part in self.inputs.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "inputs": {name: {"dtype": part.dtype, "values": part.values} for name, part in self.inputs.items()},
            "outputs": {
                name: {"shape": list(r.shape), "rms": rounded(r.rms), "values": [*map(rounded, r.values)]}
                for name, r in self.outputs.items()
            },
        }


def drawn(shape: Sequence[int], seed: int) -> torch.Tensor:
    """Values of an input that are too many to be written down: float32, from a normal distribution."""
    values = np.random.Generator(np.random.PCG64(seed)).standard_normal(tuple(shape), dtype=np.float32)
    return torch.from_numpy(_SPREAD * values)


def with_drawn(batch: Batch) -> dict[str, torch.Tensor]:
    """``batch`` with sound and pictures of very many values drawn anew: a self-test need not write them down."""
    return {name: drawn(t.shape, _SEED) if _is_large(name, t) else t for name, t in batch.items()}


def _is_large(name: str, tensor: torch.Tensor) -> bool:
    return name in _DRAWN and tensor.numel() > _WRITTEN


def make_selftest(batch: Batch, outputs: Mapping[str, Array]) -> SelfTest:
    """A self-test that expects ``outputs`` for ``batch``; of inputs that :func:`with_drawn` drew it has the seed."""
    dtypes = {name: cast(Dtype, str(tensor.dtype).removeprefix("torch.")) for name, tensor in batch.items()}
    inputs = {name: Input(dtypes[name], _plain(name, tensor)) for name, tensor in batch.items()}
    return SelfTest(inputs, {name: _reference(array) for name, array in outputs.items()})


def run_selftest(selftest: SelfTest, run: Run) -> dict[str, float]:
    """The cosine between each output's recorded entries and those that the model returns now.

    Raises:
        CheckError: the model does not run on the inputs, an output has no record, or it has another shape, another size
            or is something else.
    """
    try:
        results = run(selftest.batch())
    except CheckError:
        raise
    except Exception as error:  # the runtimes raise many kinds
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckError(f"the model does not run on the self-test's inputs: {line}") from None
    for name in results:
        if name not in selftest.outputs:
            raise CheckError(f"the self-test expects nothing of the output {name}")
    return {name: _agreement(name, expected, results.get(name)) for name, expected in selftest.outputs.items()}


def _agreement(name: str, expected: Reference, result: Array | None) -> float:
    """The cosine of an output to what was recorded."""
    if result is None:
        raise CheckError(f"the model gives no {name}, which the self-test expects")
    if result.shape != expected.shape:
        raise CheckError(f"the output {name} has the shape {list(result.shape)}, not {list(expected.shape)}")
    actual = _reference(result)
    a, b = np.array(actual.values), np.array(expected.values)
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float(a @ b) / size if size else float(np.array_equal(a, b))
    if not cosine >= LEAST:
        raise CheckError(f"the output {name} has the cosine {cosine:.3g} to what was recorded at export")
    if not abs(actual.rms - expected.rms) <= SIZE * expected.rms:
        raise CheckError(
            f"the output {name} has the root mean square {actual.rms:.3g}, {expected.rms:.3g} was recorded at export"
        )
    return cosine


def _plain(name: str, tensor: torch.Tensor) -> Any:
    shape = list(tensor.shape)
    if _is_large(name, tensor) and torch.equal(tensor, drawn(shape, _SEED)):
        return {"shape": shape, "seed": _SEED}
    return tensor.tolist() if tensor.numel() else {"shape": shape}


def _reference(array: Array) -> Reference:
    flat = array.astype(np.float64).ravel()
    places = np.linspace(0, flat.size - 1, min(VALUES, flat.size)).round().astype(int)
    rms = math.sqrt(float(np.mean(flat * flat))) if flat.size else 0.0
    return Reference(tuple(array.shape), rms, tuple(flat[places].tolist()))

"""A small input with what the runtime made of it, so that an artefact can be checked without the Program."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bitlower.backends._json import significant
from bitlower.ir import Batch, CheckError, Program

Array = np.ndarray[Any, Any]
Run = Callable[[Batch], Mapping[str, Array]]
ROWS = 2
LENGTH = 16
VALUES = 64
LEAST = 0.9
"""The least cosine of an output to the recorded one. The same runtime on the same processor gives 1; others round ties
otherwise, and quantized models make that visible; a processor whose integer kernels saturate gives far less."""


@dataclass(frozen=True)
class Reference:
    """An output: its shape, its root mean square, and ``VALUES`` entries at even distances."""

    shape: tuple[int, ...]
    rms: float
    values: tuple[float, ...]


@dataclass(frozen=True)
class SelfTest:
    """Inputs (at most ``ROWS`` rows of ``LENGTH`` entries) and references by name.

    Args:
        inputs: dtype and nested lists; of a tensor without entries (an empty cache), a mapping with its ``shape``.
        outputs: what the runtime gave when it was compared with the Program on these inputs too.
    """

    inputs: Mapping[str, tuple[str, Any]]
    outputs: Mapping[str, Reference]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the inverse of :meth:`from_dict`."""
        return {
            "inputs": {name: {"dtype": dtype, "values": values} for name, (dtype, values) in self.inputs.items()},
            "outputs": {
                name: {"shape": list(r.shape), "rms": significant(r.rms), "values": [*map(significant, r.values)]}
                for name, r in self.outputs.items()
            },
        }

    @classmethod
    def from_dict(cls, form: Mapping[str, Any]) -> SelfTest:
        """The self-test of plain data; a missing key is a KeyError."""
        return cls(
            {name: (str(part["dtype"]), part["values"]) for name, part in form["inputs"].items()},
            {
                name: Reference(tuple(part["shape"]), part["rms"], tuple(part["values"]))
                for name, part in form["outputs"].items()
            },
        )


def small_batch(program: Program, batch: Batch, rows: int = ROWS, length: int = LENGTH) -> Batch:
    """A part of ``batch``: symbolic dimensions are cut, the first to ``rows``, others to ``length``."""
    inputs = dict(zip((spec.name for spec in program.inputs), program.arguments(batch), strict=True))
    return {spec.name: _cut(inputs[spec.name], spec.type.shape, rows, length) for spec in program.inputs}


def make_selftest(batch: Batch, outputs: Mapping[str, Array]) -> SelfTest:
    """A self-test that expects ``outputs`` for ``batch``."""
    inputs = {name: (str(t.dtype).removeprefix("torch."), _plain(t)) for name, t in batch.items()}
    return SelfTest(inputs, {name: _reference(array) for name, array in outputs.items()})


def run_selftest(selftest: SelfTest, run: Run) -> dict[str, float]:
    """The cosine between each output's recorded entries and those that the model gives now.

    Raises:
        CheckError: the model does not run on the inputs, or an output has another shape or is something else.
    """
    try:
        batch = {name: _tensor(dtype, values) for name, (dtype, values) in selftest.inputs.items()}
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckError(f"the self-test's inputs are damaged: {error}") from None
    results = run(batch)
    cosines = {}
    for name, expected in selftest.outputs.items():
        if name not in results:
            raise CheckError(f"the model gives no {name}, which the self-test expects")
        found = results[name]
        if found.shape != expected.shape:
            raise CheckError(f"the output {name} has the shape {list(found.shape)}, not {list(expected.shape)}")
        a, b = np.array(_reference(found).values), np.array(expected.values)
        size = float(np.linalg.norm(a) * np.linalg.norm(b))
        cosines[name] = float(a @ b) / size if size else float(np.array_equal(a, b))
        if not cosines[name] >= LEAST:
            raise CheckError(f"the output {name} has the cosine {cosines[name]:.3g} to what was recorded at export")
    return cosines


def _plain(tensor: torch.Tensor) -> Any:
    return tensor.tolist() if tensor.numel() else {"shape": list(tensor.shape)}


def _tensor(dtype: str, values: Any) -> torch.Tensor:
    if isinstance(values, Mapping):
        return torch.zeros([int(size) for size in values["shape"]], dtype=getattr(torch, dtype))
    return torch.tensor(values, dtype=getattr(torch, dtype))


def _cut(tensor: torch.Tensor, shape: tuple[int | str, ...], rows: int, length: int) -> torch.Tensor:
    for axis, dim in enumerate(shape):
        if isinstance(dim, str):
            tensor = tensor.narrow(axis, 0, min(tensor.shape[axis], rows if axis == 0 else length))
    return tensor.contiguous()


def _reference(array: Array) -> Reference:
    flat = array.astype(np.float64).ravel()
    places = np.linspace(0, flat.size - 1, min(VALUES, flat.size)).round().astype(int)
    rms = math.sqrt(float(np.mean(flat * flat))) if flat.size else 0.0
    return Reference(tuple(array.shape), rms, tuple(flat[places].tolist()))

"""What a configuration promises, held against what the header of the weights says, before anything is built.

A configuration is a few numbers, and a wrong one asks for a model of any size. So its numbers are compared with the
shapes of the weights, and then the model is built without memory, under a bound on how many tensors it registers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules import module as registry

from bitlower.ir import BitlowerError, shorten

_UNBOUND = re.compile(
    r"position|theta|base|window|context|ctx|seq|seed|token|step|freq|max_|scal|param|flop|date|version", re.IGNORECASE
)
"""Names of numbers that are no sizes of anything stored."""
_LARGE = 1_000_000
"""A number up to this costs nothing, whatever it counts."""
_POSITIONS = 100_000
"""Positions up to which a configuration is taken at its word."""
_EPSILON = re.compile(r"eps(ilon)?(_|$)", re.IGNORECASE)
_POSITIVE = re.compile(r"theta|freq_base|rotary_emb_base|^rotary_base|^factor$", re.IGNORECASE)
_BUFFERS = 1 << 30
"""Entries of all tables that a model's code makes: 4 GB in float32."""
_HINT = "the configuration and the weights are of different models, or one of them is damaged"


@dataclass(frozen=True)
class Held:
    """What the files hold: the shapes of their tensors, and the numbers that these stand for, packed ones unpacked."""

    shapes: Mapping[str, tuple[int, ...]]
    numbers: int

    @property
    def largest(self) -> int:
        """The largest dimension."""
        return max((size for shape in self.shapes.values() for size in shape), default=0)

    @property
    def positions(self) -> int:
        """Rows of a stored table of positions; 0 if none is stored."""
        tables = [s for name, s in self.shapes.items() if "position" in name and name.endswith("weight")]
        return max((shape[0] for shape in tables if len(shape) == 2), default=0)


def check_numbers(form: Mapping[str, Any], contents: Held, where: str) -> None:
    """See that the numbers of a configuration make sense beside the weights.

    Args:
        form: the configuration as plain data.
        contents: what the files hold.
        where: the configuration's file, for messages.

    Raises:
        BitlowerError: a size beyond every dimension of the weights, or an epsilon, a rope base or a rope factor that is
            none; names the key.
    """
    for key, value in _numbers(form, ""):
        name = key.rpartition(".")[2]
        shown = f"{where}: {shorten(key)} is {shorten(str(value))}"
        if isinstance(value, float) and math.isnan(value):
            raise BitlowerError(shown, hint="every number of a configuration is one")
        if _EPSILON.search(name) and not 0 <= value < 1:
            raise BitlowerError(shown, hint="an epsilon is from 0 to below 1")
        if _POSITIVE.search(name) and not (0 < value < math.inf):
            raise BitlowerError(shown, hint="the base and the factor of rotary positions are finite and above 0")
        if isinstance(value, int) and not _UNBOUND.search(name) and value > max(_LARGE, contents.largest):
            raise BitlowerError(f"{shown}, and the largest dimension of the weights is {contents.largest}", hint=_HINT)
        if "position" in name and contents.positions and value > max(_POSITIONS, 2 * contents.positions):
            raise BitlowerError(f"{shown}, and the weights hold {contents.positions} positions", hint=_HINT)


def _numbers(form: Any, path: str) -> Iterator[tuple[str, int | float]]:
    if isinstance(form, Mapping):
        for key, value in form.items():
            yield from _numbers(value, f"{path}.{key}" if path else str(key))
    elif isinstance(form, int | float) and not isinstance(form, bool):
        yield path, form


def check_skeleton(make: Callable[[], torch.nn.Module], contents: Held, where: str) -> None:
    """Build a model without memory and see that it has about as many numbers as the files hold.

    Args:
        make: builds the model.
        contents: what the files hold.
        where: the configuration's file, for messages.

    Raises:
        BitlowerError: it registers far more tensors, or has far more numbers; else what ``make`` raises.
    """
    budget = _Budget(contents, where)
    handles = [
        registry.register_module_parameter_registration_hook(budget.take_parameter),
        registry.register_module_buffer_registration_hook(budget.take_buffer),
    ]
    try:
        with torch.device("meta"):
            make()
    finally:
        for handle in handles:
            handle.remove()


class _Budget:
    """What a model may register; the bounds leave room for heads that the files lack and for tensors that are split."""

    def __init__(self, contents: Held, where: str) -> None:
        self._contents, self._where = contents, where
        self._tensors = 8 * len(contents.shapes) + 1000
        self._numbers = 2 * contents.numbers + _LARGE
        self._buffers = _BUFFERS
        self._taken: dict[int, torch.Tensor] = {}

    def take_parameter(self, module: torch.nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        if tensor is None or id(tensor) in self._taken:  # tied weights are registered again
            return
        self._taken[id(tensor)] = tensor
        self._tensors -= 1
        self._numbers -= tensor.numel()
        if self._tensors < 0:
            raise self._refusal(f"more layers than the {len(self._contents.shapes)} tensors of the weights can fill")
        if self._numbers < 0:
            shape = list(tensor.shape)
            raise self._refusal(
                f"far more than the {self._contents.numbers} numbers that the weights hold: "
                f"at {type(module).__name__}.{name} of shape {shape}"
            )

    def take_buffer(self, module: torch.nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        self._buffers -= tensor.numel() if tensor is not None else 0
        if self._buffers < 0:
            raise self._refusal(f"a table {type(module).__name__}.{name} of more than {_BUFFERS} entries")

    def _refusal(self, what: str) -> BitlowerError:
        return BitlowerError(f"{self._where} asks for {what}", hint=_HINT)

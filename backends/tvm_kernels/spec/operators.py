"""What became of a Program's operators in a library: kernels, or floats operator by operator, and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from torch import fx

from bitlower.backends.tvm_kernels.spec.base import PREFIX
from bitlower.ir import kernels

_CALL = re.compile(rf"{PREFIX}([a-z]+)_")


NO_QUANTIZER = "no quantizer touches it"
"""Why linears and attentions between floats stay such."""


@dataclass
class OperatorLog:
    """How the operators of a Program are computed.

    Args:
        calls: how often kernels of each family are called by one run of all functions.
        compiled: how many kernel operators of the Program became kernels, by operator.
        floating: the operators that could be kernels and are computed in float, by reason.
    """

    calls: Counter[str] = field(default_factory=Counter)
    compiled: Counter[str] = field(default_factory=Counter)
    floating: dict[str, list[str]] = field(default_factory=dict)
    _refused: set[fx.Node] = field(default_factory=set, repr=False, compare=False)

    def call(self, name: str) -> None:
        """Note a call of the kernel called ``name``."""
        self.calls[family_of(name)] += 1

    def refuse(self, node: fx.Node, reason: str) -> None:
        """Note that a node is computed in float."""
        self.floating.setdefault(reason, []).append(where(node))
        self._refused.add(node)

    def convert(self, node: fx.Node) -> None:
        """Note that a kernel operator was converted: to a kernel, unless it was refused."""
        if node not in self._refused:
            self.compiled[kernels.kind(node)] += 1

    def notes(self) -> list[str]:
        """A line for each reason, which names one operator."""
        return [
            f"{names[0]} runs in float: {reason}"
            if len(names) == 1
            else f"{len(names)} operators run in float, the first of them {names[0]}: {reason}"
            for reason, names in self.floating.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the inverse of :meth:`from_dict`."""
        return {
            "calls": dict(sorted(self.calls.items())),
            "compiled": dict(sorted(self.compiled.items())),
            "float": {reason: list(names) for reason, names in sorted(self.floating.items())},
        }

    @classmethod
    def from_dict(cls, form: Mapping[str, Any]) -> Self:
        """The log of plain data."""
        return cls(Counter(form["calls"]), Counter(form["compiled"]), dict(form["float"]))


def where(node: fx.Node) -> str:
    """A node and its module, for people."""
    return f"%{node.name} in {node.meta['path']}" if node.meta.get("path") else f"%{node.name}"


def family_of(name: str) -> str:
    """What the kernel called ``name`` does, in a word."""
    match = _CALL.match(name)
    assert match is not None, f"{name} is no kernel's name"
    return match[1]


def families(names: Iterable[str]) -> Counter[str]:
    """How many of ``names`` are kernels, by family; other functions do not count."""
    return Counter(match[1] for match in map(_CALL.match, names) if match)

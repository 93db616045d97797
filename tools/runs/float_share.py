"""What of a Program's parameters stays in float: its share, by what reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from bitlower.ir import Program, get_tensor
from bitlower.ir.dataflow import CONVOLUTION, EMBEDDING, LINEAR, MATMUL, QUANTIZER, value_uses

aten = torch.ops.aten
_KINDS = (
    (EMBEDDING, "embedding tables"),
    (LINEAR | MATMUL, "linear layers"),
    (CONVOLUTION | {aten.convolution.default}, "convolutions"),
)
_CODES = (torch.int8, torch.uint8, torch.int16, torch.uint16)


@dataclass(frozen=True)
class FloatPart:
    """Parameters that stay in float.

    Args:
        kind: what reads them: embedding tables, linear layers, convolutions; vectors and others.
        share: their entries over those of all parameters.
        tensors: their names, the largest first.
    """

    kind: str
    share: float
    tensors: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"kind": self.kind, "share": round(self.share, 6), "tensors": list(self.tensors)}

    def __str__(self) -> str:
        more = f" and {len(self.tensors) - 1} more" if len(self.tensors) > 1 else ""
        return f"{self.kind} {self.share:.1%} ({self.tensors[0]}{more})"


def float_parts(program: Program) -> tuple[FloatPart, ...]:
    """The parameters of all graphs that no quantizer rounds and that are not stored as codes, largest share first."""
    sizes: dict[str, dict[str, int]] = {}
    seen, total = set[int](), 0
    for module in program.graphs.values():
        for node in module.graph.find_nodes(op="get_attr", sort=True):
            tensor = get_tensor(module, str(node.target))
            stored = tensor.dtype in _CODES
            if tensor.data_ptr() in seen or not (stored or isinstance(tensor, torch.nn.Parameter)):
                continue
            seen.add(tensor.data_ptr())
            total += tensor.numel()
            if not stored and not _is_rounded(node):
                sizes.setdefault(_kind(node), {})[str(node.target)] = tensor.numel()
    parts = [
        FloatPart(kind, sum(counts.values()) / total, tuple(sorted(counts, key=lambda name: (-counts[name], name))))
        for kind, counts in sizes.items()
    ]
    return tuple(sorted(parts, key=lambda part: (-part.share, part.kind)))


def _is_rounded(node: fx.Node) -> bool:
    return any(user.target in QUANTIZER for user in node.users)


def _kind(node: fx.Node) -> str:
    if node.meta["type"].rank > 1:
        readers = {user.target for _, user in value_uses(node)}
        for targets, kind in _KINDS:
            if readers & targets:
                return kind
    return "vectors and others"

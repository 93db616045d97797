"""Reading nodes and values of onnx-ir graphs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from bitlower.ir import BitlowerError

DOMAIN = "bitlower"


Array = npt.NDArray[np.generic]


def is_op(node: ir.Node | None, op_type: str, domain: str = "") -> bool:
    """Whether ``node`` is this operator."""
    return node is not None and node.op_type == op_type and node.domain == domain


def marker(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The operator of our own domain that computes ``value``, if it is one called ``op_type``."""
    node = value.producer() if value is not None else None
    return node if is_op(node, op_type, DOMAIN) else None


def source(node: ir.Node, position: int = 0) -> ir.Value:
    """An input that is there."""
    value = node.inputs[position]
    assert value is not None
    return value


def only_user(value: ir.Value) -> ir.Node | None:
    """The one node that reads ``value`` once, if there is no other and it is no output of the graph."""
    uses = list(value.uses())
    return uses[0][0] if len(uses) == 1 and not value.is_graph_output() else None


def dims(value: ir.Value) -> tuple[int | str | None, ...] | None:
    """The shape of ``value``, symbolic dimensions as names; None if it is not known."""
    if value.shape is None:
        return None
    return tuple(d if isinstance(d, int) else d.value for d in value.shape)


def spread(scale: Array, shape: Sequence[int | str | None]) -> Array:
    """``scale`` so that it broadcasts over a tensor of ``shape``: entries are repeated over their blocks.

    Raises:
        BitlowerError: a block lies along an axis of unknown size.
    """
    if scale.size == 1:
        return scale.reshape(())
    for axis, (count, extent) in enumerate(zip(scale.shape, shape, strict=True)):
        if count in (1, extent):
            continue
        if not isinstance(extent, int):
            raise BitlowerError(f"scales in {count} blocks along the dynamic axis {extent!r} have no form in ONNX")
        scale = np.repeat(scale, extent // count, axis)
    return scale

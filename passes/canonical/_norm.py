"""RMSNorm written out by hand, as transformers does it, becomes one ``rms_norm`` (Zhang and Sennrich 2019, eq. 4)."""

from __future__ import annotations

import torch
from torch import fx

from bitlower.ir.operators import argument, operand, value_operands
from bitlower.ir.rewrite import Rule, call_like, sole_user

aten = torch.ops.aten


def fold_rms_norm(module: fx.GraphModule, root: fx.Node) -> fx.Node | str | None:
    """Fold ``x · (mean(x²) + ε)^-½ · w`` around ``root``, the reciprocal square root, into ``rms_norm(x, [d], w, ε)``.

    The weight is whatever vector is multiplied with: a parameter, or ``1 + w`` as Gemma has it, which stays a sum, so
    that the parameter remains as the model stores it. Without a weight (or with something else after the
    normalization) the plain form is used.
    """
    if root.target is aten.pow.Tensor_Scalar and argument(root, "exponent") != -0.5:
        return None
    square_mean = _square_mean(operand(root, "self"))
    if isinstance(square_mean, str):
        return square_mean
    x, epsilon = square_mean
    normalized = sole_user(root)
    if normalized is None or normalized.target is not aten.mul.Tensor or set(normalized.args) != {x, root}:
        return "what the mean is taken of is not multiplied with its reciprocal square root alone"
    kind = normalized.meta["type"]
    width = kind.shape[-1]
    if kind != x.meta["type"] or not isinstance(width, int):
        return f"it makes {kind} out of {x.meta['type']}"
    weights = {user: _weight(user, normalized, width) for user in normalized.users}
    scaled = all(weights.values()) and bool(weights)
    result = root
    for node, weight in weights.items() if scaled else [(normalized, None)]:
        with node.graph.inserting_before(node):
            result = call_like(node, aten.rms_norm.default, (x, [width], weight, epsilon), kind)
        node.replace_all_uses_with(result)
    return result


def _square_mean(value: fx.Node) -> tuple[fx.Node, float] | str:
    """What ``mean(x²) + ε`` is taken of, and ε."""
    epsilon: object = 0.0
    if value.target is aten.add.Tensor:
        epsilon = argument(value, "other")
        value = operand(value, "self")
    if not isinstance(epsilon, int | float):
        return "what is added to the mean is no number"
    if value.target is not aten.mean.dim or not argument(value, "keepdim") or value.kwargs:
        return "it is not taken of a mean that keeps its axis"
    if argument(value, "dim") not in ([-1], [value.meta["type"].rank - 1]):
        return "the mean is not over the last axis alone"
    square = operand(value, "self")
    is_power = square.target is aten.pow.Tensor_Scalar and argument(square, "exponent") == 2
    is_product = square.target is aten.mul.Tensor and argument(square, "self") is argument(square, "other")
    if not (is_power or is_product or square.target is aten.square.default):
        return "the mean is not of squares"
    return operand(square, "self"), float(epsilon)


def _weight(node: fx.Node, normalized: fx.Node, width: int) -> fx.Node | None:
    """The vector that ``node`` multiplies ``normalized`` with; None if it does something else."""
    if node.target is not aten.mul.Tensor or node.meta["type"] != normalized.meta["type"]:
        return None
    others = [factor for factor in value_operands(node) if factor is not normalized]
    fits = len(others) == 1 and others[0].meta["type"].shape == (width,)
    return others[0] if fits else None


RULES = (Rule("rms-norm", frozenset({aten.rsqrt.default, aten.pow.Tensor_Scalar}), fold_rms_norm),)

"""The operators of ONNX files that have to do with codes: one table, which rewrites, notes and the verifier read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bitlower.ir import BitlowerError


@dataclass(frozen=True)
class Reading:
    """Which inputs of an operator are codes, their scale and their zero point.

    Args:
        codes: the number of the input.
        scale: of the input; None: the operator takes none.
        zero_point: of the input; None: the operator takes none.
    """

    codes: int
    scale: int | None = None
    zero_point: int | None = None


@dataclass(frozen=True, kw_only=True)
class CodeOperator:
    """What an operator does with codes.

    Args:
        name: the type of its nodes.
        passes_on: whether codes come out of it. ``view``: those of its first input at other places; ``join``: those of
            all inputs, beside each other; ``unfold``: those that lie in packed
            bytes, or with their highest bit turned; ``centre``: those of its first input, less
            their zero point; empty: none.
        commutes: a dequantization with one scale may follow a ``view`` as well as come before it.
        reads: where it computes with codes.
        writes: the inputs that are scale and zero point of the codes that it rounds to; None: it does not round.
        integer: it multiplies codes as integers.
        packed: it reads packed codes: ``matrix``, at its second input, or ``rows``, at its first one; empty: none.
    """

    name: str
    passes_on: Literal["", "view", "join", "unfold", "centre"] = ""
    commutes: bool = False
    reads: tuple[Reading, ...] = ()
    writes: tuple[int, int] | None = None
    integer: bool = False
    packed: Literal["", "matrix", "rows"] = ""


_VIEWS = ("Reshape", "Transpose", "Slice", "Unsqueeze", "Squeeze", "Flatten", "Expand", "Identity")
_BITS = ("BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor")
"""These take codes out of packed bytes, or turn their highest bit."""
_OPERATORS = {
    operator.name: operator
    for operator in (
        *(CodeOperator(name=name, passes_on="view", commutes=True) for name in _VIEWS),
        CodeOperator(name="Gather", passes_on="view", commutes=True, packed="rows"),
        CodeOperator(name="Cast", passes_on="view"),
        *(CodeOperator(name=name, passes_on="join") for name in ("Pad", "Concat")),
        *(CodeOperator(name=name, passes_on="unfold") for name in _BITS),
        CodeOperator(name="Sub", passes_on="centre", reads=(Reading(0, None, 1),)),
        CodeOperator(name="QuantizeLinear", writes=(1, 2)),
        CodeOperator(name="DequantizeLinear", reads=(Reading(0, 1, 2),)),
        CodeOperator(name="Mul", reads=(Reading(0, 1), Reading(1, 0))),
        CodeOperator(name="MatMulIntegerToFloat", reads=(Reading(0, 2, 4), Reading(1, 3, 5)), integer=True),
        CodeOperator(name="MatMulInteger", reads=(Reading(0), Reading(1, None, 3)), integer=True),
        CodeOperator(name="QLinearMatMul", reads=(Reading(0, 1, 2), Reading(3, 4, 5)), integer=True),
        CodeOperator(name="MatMulNBits", packed="matrix"),
        CodeOperator(name="GatherBlockQuantized", packed="rows"),
    )
}
_NOTHING = CodeOperator(name="")


def code_operator(name: str) -> CodeOperator:
    """What nodes of the type ``name`` do with codes: nothing if the table does not have it."""
    return _OPERATORS.get(name, _NOTHING)


def integer_operators() -> frozenset[str]:
    """The operators of files that multiply codes as integers."""
    return frozenset(operator.name for operator in _OPERATORS.values() if operator.integer)


def add_operator(operator: CodeOperator) -> None:
    """Put an operator into the table.

    Raises:
        BitlowerError: the table says something else of it.
    """
    if _OPERATORS.setdefault(operator.name, operator) != operator:
        raise BitlowerError(
            f"the operator {operator.name} is known already, and does something else with codes",
            hint="leave it out of the rule's `operators`",
        )

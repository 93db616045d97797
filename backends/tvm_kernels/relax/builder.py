"""What the conversion of a fused graph to Relax shares: symbolic dimensions, constants, and calls of kernels."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import tvm
import tvm_ffi
from torch import fx
from tvm import relax, tirx

from bitlower.backends.tvm_kernels.schedules.dispatch import lower
from bitlower.backends.tvm_kernels.spec.arguments import arguments
from bitlower.backends.tvm_kernels.spec.base import FLOATS, HALF, KernelSpec
from bitlower.backends.tvm_kernels.spec.operators import OperatorLog
from bitlower.backends.tvm_kernels.spec.target import Target
from bitlower.backends.tvm_kernels.tir.function import i64
from bitlower.ir import BitlowerError, TensorType, get_tensor
from bitlower.ir.types import Dim

Array = npt.NDArray[Any]
Value = Any
"""A Relax variable or constant, an expression of dimensions, or a list of the results of a kernel."""
_FLOATING = ("x", "residual", "gate", "bias", "weight", "sum", "values")
"""Arguments of kernels that may be floats of either kind."""
_INJECTIVE, _OPAQUE = 2, 8
"""What TVM may fuse: functions that move and change entries, and none."""
_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


class Frame:
    """One graph on its way to a Relax function.

    Args:
        module: the graph and its tensors.
        builder: of TVM, within a dataflow block.
        target: of the kernels.
        log: of all functions of the library.
        halves: the nodes whose values are float16; None: there are none, and linears of floats multiply float32.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        builder: Any,
        target: Target,
        log: OperatorLog,
        halves: frozenset[fx.Node] | None = None,
    ) -> None:
        self.module, self.builder, self.target, self.log = module, builder, target, log
        self.halves = halves or frozenset()
        self.dtype = "float32" if halves is None else HALF
        self.values: dict[fx.Node, Value] = {}
        self.strips: dict[fx.Node, Any] = {}
        self.joined: dict[fx.Node, Any] = {}
        self._symbols: dict[str, Any] = {}
        self._functions: dict[Hashable, Any] = {}

    def dim(self, size: Dim) -> Any:
        """A dimension as an expression; equal names are equal variables.

        Raises:
            BitlowerError: see :func:`dimension`.
        """
        return dimension(size, self._symbols)

    def shape(self, kind: TensorType) -> list[Any]:
        """The dimensions of a type."""
        return [self.dim(size) for size in kind.shape]

    def type_of(self, kind: TensorType) -> Any:
        """A type in Relax."""
        return relax.TensorType(self.shape(kind), dtype_name(kind))

    def kind_of(self, node: fx.Node) -> TensorType:
        """The type that the value of a node has here."""
        kind: TensorType = node.meta["type"]
        return kind.with_dtype(torch.float16) if node in self.halves else kind

    def value(self, argument: Any) -> Value:
        """What an argument of a node is here: nodes are looked up, also inside lists; all else stays."""
        if isinstance(argument, fx.Node):
            if argument not in self.values and argument.op == "get_attr":
                self.values[argument] = constant(self.tensor(argument))
            return self.values[argument]
        if isinstance(argument, list | tuple):
            return [self.value(item) for item in argument]
        return argument

    def tensor(self, node: fx.Node) -> Array:
        """The tensor that a ``get_attr`` names."""
        assert isinstance(node.target, str)
        array: Array = get_tensor(self.module, node.target).detach().numpy()
        return array

    def emit(self, expression: Any) -> Any:
        """A variable for an expression."""
        return self.builder.emit(expression)

    def te(self, function: Callable[..., Any], *inputs: Any, name: str, fuse: bool | None = None) -> Any:
        """A kernel made of ``te`` expressions; whether TVM may fuse it with others, or None: TVM finds out itself."""
        attributes = None if fuse is None else {"op_pattern": _INJECTIVE if fuse else _OPAQUE}
        return self.builder.emit_te(function, *inputs, primfunc_name_hint=name, primfunc_attrs=attributes)

    def reshape(self, value: Any, shape: list[Any]) -> Any:
        """The same entries in another shape."""
        return self.emit(relax.op.reshape(value, shape))

    def in_dtype(self, value: Any, dtype: str) -> Any:
        """``value`` in another dtype, if it has another."""
        return value if str(value.ty.dtype) == dtype else self.emit(relax.op.astype(value, dtype))

    def cast(self, value: Any, kind: TensorType) -> Any:
        """``value`` as of the type ``kind``: where TVM cannot tell that shapes are equal, it is checked at run time."""
        wanted = self.type_of(kind)
        same = tvm_ffi.structural_equal(value.ty, wanted)
        return value if same else self.builder.match_cast(value, wanted)

    def rows(self, value: Any, kind: TensorType) -> Any:
        """``[…, columns]`` as ``[rows, columns]``."""
        *outer, columns = self.shape(kind)
        return value if len(outer) == 1 else self.reshape(value, [product(outer), columns])

    def call(self, spec: KernelSpec, operands: Mapping[str, Any], m: Any, values: str = "float32") -> dict[str, Any]:
        """Call the kernel of ``spec`` on its arguments by name; its results by name, the float one of dtype ``values``.

        Float arguments come in the dtypes that they have; sums before a norm are float32.
        """
        if self.dtype == HALF:
            floats = [a for a in arguments(spec) if a.name in _FLOATING and a.dtype in FLOATS]
            dtypes = {a.name: "float32" if a.written else str(operands[a.name].ty.dtype) for a in floats}
            spec = spec.holding(dtypes | ({"values": values} if "values" in dtypes else {}))
        function = self.kernel(spec, spec.name, lambda: lower(spec))
        read = [operands[argument.name] for argument in arguments(spec) if not argument.written]
        written = [argument for argument in arguments(spec) if argument.written]
        types = [relax.TensorType([m if size is None else i64(size) for size in a.shape], a.dtype) for a in written]
        results = self.emit(relax.call_tir(function, read, out_ty=types if len(types) > 1 else types[0]))
        if len(written) == 1:
            return {written[0].name: results}
        return {a.name: self.emit(relax.TupleGetItem(results, at)) for at, a in enumerate(written)}

    def kernel(self, key: Hashable, name: str, make: Callable[[], Any]) -> Any:
        """The kernel that ``make`` returns, once for each key, for one more call; TVM does not fuse it with others.

        Functions of one name get numbers behind it: the symbol of each is that of its place in the module.
        """
        self.log.call(name)
        if key not in self._functions:
            made = make().with_attr("op_pattern", _OPAQUE).without_attr("global_symbol")
            self._functions[key] = self.builder.add_func(made, name)
        return self._functions[key]


def dimension(size: Dim, symbols: dict[str, Any]) -> Any:
    """A dimension as an expression of variables, which are put among ``symbols`` by name.

    Raises:
        BitlowerError: it is no sum, difference, product or whole quotient of names and numbers.
    """
    try:
        return _expression(ast.parse(str(size), mode="eval").body, symbols)
    except (SyntaxError, KeyError):
        raise BitlowerError(
            f"the dimension {size!r} is no expression that a library can compute", hint="export to another backend"
        ) from None


def _expression(tree: ast.expr, symbols: dict[str, Any]) -> Any:
    match tree:
        case ast.Constant(value=int(value)):
            return i64(value)
        case ast.Name(id=name):
            return symbols.setdefault(name, tirx.Var(name, "int64"))
        case ast.BinOp(left=left, op=op, right=right):
            return _OPERATORS[type(op)](_expression(left, symbols), _expression(right, symbols))
        case _:
            raise KeyError(tree)


def constant(array: Array) -> Any:
    """A constant of the library."""
    return relax.const(tvm.runtime.tensor(np.asarray(array, order="C")))


def product(sizes: list[Any]) -> Any:
    """The product of dimensions."""
    total = i64(1)
    for size in sizes:
        total = total * size
    return total


def dtype_name(kind: TensorType) -> str:
    """The dtype as TVM calls it."""
    return str(kind.dtype).removeprefix("torch.")


def columns_of(kind: TensorType) -> int:
    """The length of the last axis, which kernels know."""
    return known(kind.shape[-1])


def known(size: int | str) -> int:
    """A size that is no symbol."""
    assert isinstance(size, int), f"a dimension of a kernel is the symbolic {size}"
    return size

"""What rewrites stand on: an editor of onnx-ir graphs, and rules that say why they do not match."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from bitlower.backends.onnx_qdq.graph.nodes import Array
from bitlower.ir import QuantSpec


class Editor:
    """A graph under rewriting. Tensors that rules make are held here and get their names when all is done.

    Args:
        model: with the low-bit operators whole.
        specs: of stored codes, by the codes' names.
        unsigned: whether codes of 8 bits that are multiplied with those of activations are stored unsigned.
    """

    def __init__(
        self, model: ir.Model, specs: Mapping[str, QuantSpec] | None = None, *, unsigned: bool = False
    ) -> None:
        self.model, self.unsigned = model, unsigned
        self.graph = model.graph
        self.specs = dict(specs or {})
        self.opset = int(model.opset_imports[""])
        self.wanted: dict[ir.Value, str] = {}
        self.split: set[str] = set()
        """The names of codes that are multiplied with float activations as integers of several digits."""
        self._made: dict[ir.Value, str] = {}
        self._by_name: dict[str, list[ir.Value]] = {}
        self._lazy: dict[tuple[str, str], ir.Value] = {}

    def constant(self, name: str, array: Array | np.generic) -> ir.Value:
        """A tensor; it will be called ``name`` unless an equal name was taken before."""
        data = np.asarray(array, order="C")
        for value in self._by_name.get(name, ()):
            if (
                isinstance(value.const_value, ir.Tensor)
                and np.array_equal(_numpy(value), data)
                and _numpy(value).dtype == data.dtype
            ):
                return value
        value = ir.Value(name=name, const_value=ir.tensor(data, name=name))
        value.dtype, value.shape = ir.DataType.from_numpy(data.dtype), ir.Shape(data.shape)
        self._made[value] = name
        self._by_name.setdefault(name, []).append(value)
        return value

    def lazy(
        self, name: str, layout: str, dtype: ir.DataType, shape: Sequence[int], make: Callable[[], Array]
    ) -> ir.Value:
        """A large tensor that ``make`` makes when the file is written; 4-bit and 2-bit ones as packed bytes.

        Asked for again with an equal name and ``layout``, it is the same tensor.
        """
        if (name, layout) not in self._lazy:
            tensor = ir.LazyTensor(lambda: _tensor(make(), dtype, shape), dtype, ir.Shape(shape), name=name)
            value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(shape), type=ir.TensorType(dtype))
            self._lazy[name, layout] = value
        value = self._lazy[name, layout]
        self._made[value] = name
        return value

    def made(self, name: str, layout: str) -> ir.Value | None:
        """The tensor that :meth:`lazy` gave before for ``name`` and ``layout``."""
        return self._lazy.get((name, layout))

    def array(self, value: ir.Value | None) -> Array | None:
        """The contents of a constant, None for what is computed."""
        if value is None or value.producer() is not None or value.const_value is None:
            return None
        return _numpy(value)

    def emit(
        self,
        before: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        *,
        domain: str = "",
        like: ir.Value | None = None,
        dtype: ir.DataType | None = None,
        **attributes: int | float | str | Sequence[int],
    ) -> ir.Value:
        """The result of a new node in front of ``before``, with the shape (and dtype, if not given) of ``like``."""
        [result] = self.emit_all(before, op_type, inputs, 1, domain=domain, **attributes)
        if like is not None:
            result.shape = like.shape
            dtype = dtype or like.dtype
        if dtype is not None:
            result.dtype = dtype
        return result

    def emit_all(
        self,
        before: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        count: int,
        *,
        domain: str = "",
        **attributes: int | float | str | Sequence[int],
    ) -> Sequence[ir.Value]:
        """All ``count`` results of a new node in front of ``before``."""
        node = ir.Node(domain, op_type, inputs, ir.convenience.convert_attributes(attributes), num_outputs=count)
        self.graph.insert_before(before, node)
        return node.outputs

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let all users of ``old`` (and the graph's outputs) read ``new``, which takes its name and type."""
        new.name, new.shape, new.type = old.name, old.shape, old.type
        old.name = None
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)

    def name(self, value: ir.Value, name: str) -> None:
        """``value`` will be called ``name`` in the file, whatever else bears that name now."""
        self.wanted[value] = name

    def sweep(self) -> None:
        """Remove nodes and tensors that nothing reads."""
        common.RemoveUnusedNodesPass()(self.model)
        self._made = {value: name for value, name in self._made.items() if value.uses() or value.is_graph_output()}
        self._by_name = {}
        for value, name in self._made.items():
            self._by_name.setdefault(name, []).append(value)

    def finish(self) -> None:
        """Register the tensors and give everything its final, unique name.

        Nodes are called after their operator and first output.
        """
        self.sweep()
        used = {value.name or "" for value in (*self.graph.inputs, *self.graph.outputs)} | set(self.wanted.values())
        for old in list(self.graph.initializers.values()):
            old.name = _unique(old.name or "tensor", used)
        for value, name in self._made.items():
            value.name = _unique(name, used)
            self.graph.register_initializer(value)
        for node in self.graph:
            for value in node.outputs:
                if value in self.wanted:
                    value.name = self.wanted[value]
                elif not value.is_graph_output():
                    value.name = _unique(value.name or node.op_type.lower(), used)
            node.name = f"{node.op_type}:{node.outputs[0].name}"


def _unique(name: str, used: set[str]) -> str:
    candidate, count = name, 1
    while candidate in used:
        candidate, count = f"{name}_{count}", count + 1
    used.add(candidate)
    return candidate


def _tensor(data: Array, dtype: ir.DataType, shape: Sequence[int]) -> ir.TensorProtocol:
    data = np.ascontiguousarray(data)
    if dtype.bitwidth < 8:
        return ir.PackedTensor(data, dtype, shape=shape)
    return ir.Tensor(data, dtype, shape=ir.Shape(shape))


def _numpy(value: ir.Value) -> Array:
    assert value.const_value is not None
    array: Array = value.const_value.numpy()
    return array

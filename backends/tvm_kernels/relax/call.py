"""Operands and results of a kernel node: what is codes, with which scales, and what the node must give."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import fx
from tvm import relax

from bitlower.backends.tvm_kernels.relax.builder import Array, Frame, constant, product
from bitlower.backends.tvm_kernels.relax.quantize import dequantized, quantized, token_rounded
from bitlower.backends.tvm_kernels.spec.base import HALF, KernelSpec, static_scales
from bitlower.ir import BitlowerError, Grid, QuantSpec, TensorType, kernels
from bitlower.ir.quantization import numerics


@dataclass(frozen=True)
class Call:
    """A kernel node and where it goes.

    Args:
        frame: of the function.
        node: one of :data:`bitlower.ir.kernels.KERNELS`.
    """

    frame: Frame
    node: fx.Node

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """Its arguments by name."""
        return kernels.arguments(self.node)

    @cached_property
    def names(self) -> list[str]:
        """What each part of it returns."""
        return str(self.arguments.get("outputs", "value")).split()

    @property
    def has_codes(self) -> bool:
        """Whether anything that it returns is rounded."""
        return any(name in self.names for name in ("codes", "rounded", "scale", "zero_point"))

    @property
    def keep(self) -> str:
        """Which floats a kernel with codes returns, in the words of the specs."""
        return "exact" if "value" in self.names else "rounded" if "rounded" in self.names else ""

    @property
    def dtype(self) -> str:
        """The dtype of the value that it returns."""
        read = kernels.read_outputs(self.node).items()
        return HALF if any(name == "value" and node in self.frame.halves for (_, name), node in read) else "float32"

    def refuse(self, reason: str) -> None:
        """Note that the node is computed in float."""
        self.frame.log.refuse(self.node, reason)

    def quantizer(self, name: str) -> QuantSpec | None:
        """That of an operand that is codes, or of a result that is rounded; None: it is float."""
        present = self.has_codes if name == "out" else self.arguments.get(f"{name}_scale") is not None
        return self.node.meta["quantizers"][name].spec if present else None

    def type_of(self, name: str) -> TensorType:
        """The type of an operand."""
        kind: TensorType = self.arguments[name].meta["type"]
        return kind

    def stored(self, name: str) -> Array | None:
        """A tensor of the graph's own, such as a scale; None if it is left out or computed."""
        node = self.arguments.get(name)
        return self.frame.tensor(node) if isinstance(node, fx.Node) and node.op == "get_attr" else None

    def static(self, name: str) -> tuple[Array, Array]:
        """The stored scale and zero point of ``name``.

        Raises:
            BitlowerError: they are computed when the program runs.
        """
        scale, zero = self.stored(f"{name}_scale"), self.stored(f"{name}_zero_point")
        if scale is None or zero is None:
            raise BitlowerError(f"%{self.node.name}: the scale of {name} is not stored")
        return scale, zero

    def floats(self, name: str) -> Array | None:
        """A stored operand in float32, dequantized if it is codes; None if it is left out."""
        stored = self.stored(name)
        if stored is None or self.quantizer(name) is None:
            return stored
        import torch

        parts = (torch.from_numpy(np.asarray(part)) for part in (stored, *self.static(name)))
        return numerics.values(*parts).numpy()

    def operand(self, name: str, argument: str, operands: dict[str, Any]) -> None:
        """Put an operand as rows, with its scales, among the arguments of a kernel under the name ``argument``."""
        kind = self.type_of(name)
        operands[argument] = self.frame.rows(self.frame.value(self.arguments[name]), kind)
        spec = self.quantizer(name)
        if spec is None:
            return
        for part, stem in (("scale", "scale"), ("zero_point", "zero")):
            operands[f"{argument}_{stem}"] = self.scale(f"{name}_{part}", spec, kind)

    def scale(self, name: str, spec: QuantSpec, kind: TensorType) -> Any:
        """A scale or zero point as a vector: one a row, or as many as a static quantizer of the columns has."""
        node = self.arguments[name]
        if spec.granularity.dynamic:
            return self.frame.reshape(self.frame.value(node), [product(self.frame.shape(kind)[:-1])])
        columns = kind.shape[-1]
        assert isinstance(columns, int), f"columns of the symbolic shape {kind}"
        return constant(self.vector(name, static_scales(spec, columns)))

    def vector(self, name: str, count: int) -> Array:
        """A stored scale or zero point with ``count`` entries.

        Raises:
            BitlowerError: it has others.
        """
        stored = self.stored(name)
        if stored is None or stored.size != count:
            raise BitlowerError(f"%{self.node.name}: {name} is not {count} stored numbers")
        return stored.reshape(-1)

    def out_scales(self, spec: QuantSpec, columns: int, operands: dict[str, Any], stem: str = "out") -> None:
        """Put the stored scales of a rounding among the arguments of a kernel."""
        if not spec.granularity.dynamic:
            for part, argument in (("scale", "scale"), ("zero_point", "zero")):
                operands[f"{stem}_{argument}"] = constant(self.vector(f"{stem}_{part}", static_scales(spec, columns)))

    def real(self, name: str) -> Any:
        """An operand in float32 and its own shape."""
        value = self.frame.value(self.arguments[name])
        if self.quantizer(name) is None:
            return self.frame.in_dtype(value, "float32")
        scales = [self.frame.value(self.arguments[f"{name}_{part}"]) for part in ("scale", "zero_point")]
        return dequantized(self.frame, value, *scales)

    def kernel(self, spec: KernelSpec, operands: dict[str, Any], m: Any) -> list[Any]:
        """Call a kernel of one part; what the node returns of its results."""
        return self.results(self.frame.call(spec, operands, m, self.dtype), 0)

    def results(self, results: dict[str, Any], part: int) -> list[Any]:
        """What the node returns of the results ``values``, ``codes``, ``out_scale`` … of one part, in its types."""
        by_name = {"sum": results.get("sum"), "codes": results.get("codes"), "value": results.get("values")}
        by_name |= {"scale": results.get("out_scale"), "zero_point": results.get("out_zero")}
        by_name["rounded"] = results.get("values") if self.keep == "rounded" else None
        wanted = [output for output in kernels.outputs(self.node) if output.part == part]
        shaped: dict[str, Any] = {}
        for output in wanted:
            if by_name[output.name] is not None:
                shaped[output.name] = self.frame.reshape(by_name[output.name], self.frame.shape(output.type))
        if "rounded" in self.names and "rounded" not in shaped:
            shaped["rounded"] = self._decoded(shaped, results, wanted[0].type, part)
        return [shaped[output.name] for output in wanted]

    def _decoded(self, shaped: dict[str, Any], results: dict[str, Any], kind: TensorType, part: int) -> Any:
        codes = shaped.get("codes")
        if codes is None:
            codes = self.frame.reshape(results["codes"], self.frame.shape(kind))
        return dequantized(self.frame, codes, *self._out_scales(results, kind, part))

    def _out_scales(self, results: dict[str, Any], kind: TensorType, part: int) -> list[Any]:
        if "out_scale" in results:
            shape = [*self.frame.shape(kind)[:-1], self.frame.dim(1)]
            return [self.frame.reshape(results[name], shape) for name in ("out_scale", "out_zero")]
        return [constant(self._part(stored, part)) for stored in self.static("out")]

    def _part(self, stored: Array, part: int) -> Array:
        """The scales of one of the merged layers."""
        sizes = self.arguments.get("merged_n")
        if not sizes or stored.ndim == 0 or stored.shape[-1] == 1:
            return stored
        start = sum(sizes[:part])
        return np.ascontiguousarray(stored[..., start : start + sizes[part]])

    def finished(self, value: Any, part: int = 0, total: Any = None) -> list[Any]:
        """What the node returns of the ``value`` of a part, rounded by expressions of their own."""
        results = {"value": self.frame.in_dtype(value, self.dtype), "sum": total}
        if self.has_codes:
            grid = Grid.parse(self.arguments["out_grid"])
            if self.stored("out_scale") is None:
                codes, scale, zero = token_rounded(self.frame, value, self._type(part), grid)
            else:
                scale, zero = (constant(self._part(stored, part)) for stored in self.static("out"))
                codes = quantized(self.frame, value, scale, zero, grid)
            results |= {"scale": scale, "zero_point": zero, "codes": codes}
            if "rounded" in self.names:
                results["rounded"] = dequantized(self.frame, results["codes"], scale, zero)
        return [results[name] for name in self.names]

    def _type(self, part: int) -> TensorType:
        """The type of the codes of a part."""
        outputs = kernels.outputs(self.node)
        return next(o.type for o in outputs if o.part == part and o.name not in ("scale", "zero_point"))

    def add(self, value: Any, name: str) -> Any:
        """``value`` plus an operand, if there is one."""
        if self.arguments.get(name) is None:
            return value
        return self.frame.emit(relax.op.add(value, self.real(name)))

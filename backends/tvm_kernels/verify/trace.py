"""All results of kernels as outputs: what a library is compared with its Program by, kernel by kernel.

Rounding turns a tiny difference of float arithmetic at a tie into a whole step, and later kernels carry it on, so that
two right implementations differ in the end. Here each kernel of the Program reads what the *library* gave before it,
and what it returns is compared with what the library gave: nothing is carried on.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from bitlower.backends.artifact.rounding import Rounding
from bitlower.backends.tvm_kernels.relax.precision import VIEWS, half_values
from bitlower.backends.tvm_kernels.spec.base import HALF
from bitlower.backends.tvm_kernels.verify.agreement import FLOAT16, FLOAT16_RESULT, FLOAT32, Agreement, Limits
from bitlower.ir import Grid, Program, ValueSpec, kernels, ops
from bitlower.ir.operators import argument, graph_results, operand, set_graph_results
from bitlower.ir.quantization import numerics

Tensors = Mapping[str, torch.Tensor]
QPARAMS = ("scale", "zero_point")
_EXPRESSIONS = (kernels.fused_embedding, kernels.fused_rotary)


def trace(program: Program) -> Program:
    """``program`` with all that its kernels give, and all that is rounded outside them, as further outputs.

    They are called ``%`` and the name of their node.
    """
    traced = program.clone()
    nodes = [node for node in traced.graph.nodes if _shown(node)]
    set_graph_results(traced.graph, [*graph_results(traced.graph), *nodes])
    traced.outputs = (*program.outputs, *(ValueSpec(_name(node), node.meta["type"]) for node in nodes))
    traced.recompile()
    return traced


def _shown(node: fx.Node) -> bool:
    """Whether the value of ``node`` is compared.

    Floats that are made by expressions are not: reading them could keep TVM from making one function of them and what
    follows, whose rounding errors are others. What follows is compared.
    """
    origin = kernels.output_of(node)
    if origin is None:
        return node.target is ops.quantize or _is_qparam(node)
    kernel, output = origin
    expression = kernel.target in _EXPRESSIONS and not kernels.arguments(kernel).get("rounded_scales")
    return not (expression and output.name == "value")


def _is_qparam(node: fx.Node) -> bool:
    """Whether ``node`` is a scale or zero point that is computed outside kernels."""
    return node.target is operator.getitem and operand(node, "source").target is ops.choose_qparams


def _name(node: fx.Node) -> str:
    return f"%{node.name}"


class KernelComparison:
    """Compares what kernels gave, batch by batch.

    Args:
        program: whose kernels they are.
        activations: of the library, ``float16`` or ``float32``.
    """

    def __init__(self, program: Program, activations: str = "float32") -> None:
        self._program = program
        self._halves = half_values(program) if activations == HALF else None
        self.agreements: dict[fx.Node, Agreement] = {}

    def run(self, arguments: list[torch.Tensor], theirs: Tensors) -> dict[str, torch.Tensor]:
        """Compare one run of a library of :func:`trace`; the Program's outputs, made of the library's values.

        Args:
            arguments: what was run, in the order of the Program's inputs.
            theirs: all outputs of the library.

        Raises:
            CheckError: a value has another shape than the Program's, or is not finite where that is.
        """
        runner = _Runner(self._program, theirs, self.agreements, self._halves)
        with torch.no_grad():
            results = runner.run(*arguments, enable_io_processing=False)
        return {spec.name: value for spec, value in zip(self._program.outputs, results, strict=True)}


class _Runner(fx.Interpreter):
    """Runs the Program; the library's values take the place of what kernels give.

    Other values are rounded where they are float16 in the library (``halves``), and so are tables of floats.
    """

    def __init__(
        self,
        program: Program,
        theirs: Tensors,
        agreements: dict[fx.Node, Agreement],
        halves: frozenset[fx.Node] | None,
    ) -> None:
        super().__init__(program.module, garbage_collect_values=True)
        self.extra_traceback = False
        self._theirs, self._agreements = theirs, agreements
        self._halves, self._narrow = halves or frozenset(), halves is not None

    def run_node(self, n: fx.Node) -> Any:
        """Compute ``n``, compare it if it is a kernel or rounds, and go on with the library's values."""
        if kernels.is_kernel(n):
            return self._kernel(n)
        value = super().run_node(n)
        if n.target is ops.quantize:
            operands: Any = self.map_nodes_to_values(n.args, n)
            *rounding, _ = operands
            self._agreement(n).add_codes([Rounding(*rounding)], self._theirs[_name(n)])
        elif _is_qparam(n):
            self._agreement(n).add_qparam(QPARAMS[argument(n, "index")], value, self._theirs[_name(n)])
        else:
            table = self._narrow and n.target is torch.ops.aten.embedding.default
            return _rounded(value) if table or n in self._halves else value
        return self._theirs[_name(n)].to(value.dtype)

    def _agreement(self, node: fx.Node, hidden: bool = False) -> Agreement:
        return self._agreements.setdefault(node, Agreement(node, hidden, self._limits(node)))

    def _limits(self, node: fx.Node) -> Limits:
        """What float arithmetic explains of ``node``."""
        if not self._narrow:
            return FLOAT32
        weights = node.target is kernels.fused_linear and kernels.arguments(node).get("x_scale") is None
        unseen = any(source in self._halves and not _is_seen(source) for source in node.all_input_nodes)
        return FLOAT16 if weights or unseen else FLOAT16_RESULT

    def _kernel(self, node: fx.Node) -> list[torch.Tensor]:
        """What the library gave of a kernel's results; what nobody reads is the Program's."""
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        call = _Call(node, kernels.bind(node, args, kwargs))
        read = kernels.read_outputs(node)
        theirs = {key: self._theirs[_name(getitem)] for key, getitem in read.items() if _shown(getitem)}
        agreement, results = self._agreement(node, call.rounds_unseen), list[torch.Tensor]()
        for part, (ours, values) in enumerate(zip(call.results(), call.values(agreement.limits.tie), strict=True)):
            compared = {name: theirs[part, name] for name in call.names if (part, name) in theirs}
            call.compare(part, ours, [ours["value"], *values], compared, agreement)
            for name in call.names:
                rounds = name not in compared and read.get((part, name)) in self._halves
                results.append(compared.get(name, _rounded(ours[name]) if rounds else ours[name]).to(ours[name].dtype))
        return results


def _is_seen(node: fx.Node) -> bool:
    """Whether the value of ``node`` is that of a kernel, which the library returns, or a view of one."""
    while node.target in VIEWS:
        node = node.all_input_nodes[0]
    return kernels.output_of(node) is not None and _shown(node)


def _rounded(value: Any) -> Any:
    """The nearest float16 values, in their own dtype; of a list those of all."""
    if isinstance(value, torch.Tensor):
        return value.half().to(value.dtype)
    return [_rounded(part) for part in value]


class _Call:
    """A kernel with the values that it reads.

    Args:
        node: the kernel.
        given: its arguments by name.
    """

    def __init__(self, node: fx.Node, arguments: dict[str, Any]) -> None:
        self._operator: Any = node.target
        self._arguments = arguments
        self.names = str(arguments.get("outputs", "value")).split()

    @property
    def rounds_unseen(self) -> bool:
        """Whether it rounds inside where :meth:`values` does not say what ties make of it."""
        return any(self._arguments.get(f"{name}_grid") for name in ("scores", "probs")) or bool(
            self._arguments.get("rounded_scales")
        )

    def results(self) -> list[dict[str, torch.Tensor]]:
        """What the Program's kernel returns, layer by layer where several are merged, and the value before rounding."""
        names = list(dict.fromkeys([*self.names, "value"]))
        tensors = self._operator(**self._arguments | {"outputs": " ".join(names)})
        return [dict(zip(names, tensors[at:], strict=False)) for at in range(0, len(tensors), len(names))]

    def values(self, tie: float) -> list[list[torch.Tensor]]:
        """What else the value of each layer may be, if products that are so near to ties are rounded the other way."""
        arguments = self._arguments
        if not arguments.get("rounded_grid") or arguments.get("rounded_scales") is not None:
            return [[] for _ in arguments.get("merged_n") or [0]]
        product = {
            name: value for name, value in arguments.items() if not name.startswith(("rounded", "residual", "out"))
        }
        grid, scale, zero = (
            Grid.parse(arguments["rounded_grid"]),
            arguments["rounded_scale"],
            arguments["rounded_zero_point"],
        )
        limits, rest = (grid.quant_min, grid.quant_max), arguments.get("residual")
        if rest is not None and arguments.get("residual_scale") is not None:
            rest = numerics.values(rest, arguments["residual_scale"], arguments["residual_zero_point"])
        others = []
        for value in self._operator(**product):
            steps = [sign * tie * (limits[1] - limits[0]) * scale for sign in (-1, 1)]
            rounded = [numerics.fake(value + step, scale, zero, *limits) for step in steps]
            others.append([part if rest is None else part + rest for part in rounded])
        return others

    def compare(
        self, part: int, ours: Tensors, values: list[torch.Tensor], theirs: Tensors, agreement: Agreement
    ) -> None:
        """Compare the results of a layer; ``values`` are what it may be before it is rounded."""
        roundings = list[Rounding]()
        if self._arguments.get("out_grid"):
            grid = Grid.parse(self._arguments["out_grid"])
            scale, zero = (self._scale(kind, part, theirs.get(kind, ours.get(kind))) for kind in QPARAMS)
            roundings = [Rounding(value, scale, zero, grid.quant_min, grid.quant_max) for value in values]
        for name, tensor in theirs.items():
            match name:
                case "value":
                    agreement.add_value(values, tensor)
                case "sum":
                    agreement.add_value([ours[name]], tensor)
                case "codes":
                    agreement.add_codes(roundings, tensor)
                case "rounded":
                    main = roundings[0]
                    codes = numerics.codes(tensor, main.scale, main.zero_point, main.quant_min, main.quant_max)
                    agreement.add_codes(roundings, codes)
                    agreement.add_value([numerics.values(codes, main.scale, main.zero_point)], tensor)
                case _:
                    agreement.add_qparam(name, ours[name], tensor)

    def _scale(self, kind: str, part: int, computed: torch.Tensor | None) -> torch.Tensor:
        """The stored scale or zero point of what a layer returns, or the computed one."""
        stored: torch.Tensor | None = self._arguments.get(f"out_{kind}")
        merged_n = self._arguments.get("merged_n")
        if stored is None:
            assert computed is not None
            return computed
        if not merged_n or stored.dim() == 0:
            return stored
        start = sum(merged_n[:part])
        return stored[..., start : start + merged_n[part]]

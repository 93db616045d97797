"""The runtime's codes against the Program's, for every quantized activation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import fx

from bitlower.backends.artifact.rounding import Rounding
from bitlower.backends.onnx_qdq.graph.structure import constant, quantizer_inputs
from bitlower.backends.onnx_qdq.runtime.session import (
    Array,
    Session,
    exposed,
    named_values,
    read_model,
    to_tensor,
    with_data_beside,
)
from bitlower.backends.onnx_qdq.verify.record import CodeError
from bitlower.backends.onnx_qdq.verify.tally import Tally
from bitlower.ir import Batch, CheckError, Program, Quantizer, get_tensor, ops
from bitlower.ir.batch_sizes import within
from bitlower.ir.float_noise import ROUNDING, values_given
from bitlower.ir.observe import observe
from bitlower.ir.operators import argument, graph_results
from bitlower.ir.quantization import numerics
from bitlower.ir.quantizer_node import QuantizerNode

SCALE = 1e-5
"""How far a scale that is computed at run time may be from the Program's, relatively."""
LARGEST_VALUES = 256 << 20
"""Bytes of float values and their codes that are read from the runtime at once, to round the values."""


class CodeComparison:
    """Compares codes batch by batch.

    Args:
        program: each of its quantizers is in the model.
        path: the model.
        optimized: what the runtime makes of it, in a folder for temporary files that lasts as long as the comparison.
        config: session configuration entries.
    """

    def __init__(self, program: Program, path: Path, optimized: Path, config: Mapping[str, str]) -> None:
        self._program = program
        self._nodes = list(program.graph.find_nodes(op="call_function", target=ops.quantize))
        path = with_data_beside(path, optimized.parent) if self._nodes else path
        values = named_values(read_model(path).graph) if self._nodes else {}
        self._sources = {node: quantizer_inputs(values[node.name]) for node in self._nodes}
        self.names = list(dict.fromkeys([*(n.name for n in self._nodes), *self._computed_parameters().values()]))
        floats = [source.x.name or "" for source in self._sources.values() if source is not None]
        self._session = self._open_deployed(optimized, config) or self._open(path, self.names, config)
        self._float_names = list(dict.fromkeys([*self.names, *floats]))
        self._float_session = self._open(path, self._float_names, config)
        read = {node for codes in self._nodes for node in (codes, QuantizerNode(codes).value)}
        self._exact_types = [node.meta["type"] for node in read]
        self._tallies = {node: Tally() for node in self._nodes}

    def _open_deployed(self, optimized: Path, config: Mapping[str, str]) -> Session | None:
        """Gives the codes that the kernels of the deployed model compute, fused ones too; None if some are not there.

        A further output of the model itself could keep the runtime from fusing what it belongs to.
        """
        known = named_values(read_model(optimized).graph) if self.names else {}
        if not self.names or not all(name in known for name in self.names):
            return None
        return Session(exposed(optimized, self.names), folder=optimized.parent, config=config, optimize=False)

    def _open(self, path: Path, names: list[str], config: Mapping[str, str]) -> Session | None:
        return Session(exposed(path, names), folder=path.parent, config=config) if names else None

    def _computed_parameters(self) -> dict[fx.Node, str]:
        """The model's names of scales and zero points that are computed at run time, by the Program's nodes."""
        names = {}
        for node, source in self._sources.items():
            if source is None:
                continue
            view = QuantizerNode(node)
            for ours, theirs in ((view.scale, source.scale), (view.zero_point, source.zero_point)):
                computed = ours.op != "get_attr" and constant(theirs) is None
                if computed and theirs is not None and theirs.name:
                    names[ours] = theirs.name
        return names

    def read(self, batch: Batch) -> tuple[dict[str, Array], dict[str, Array]]:
        """The codes that the runtime computes on ``batch``, with scales that it computes; and its outputs meanwhile."""
        assert self._session is not None  # where there are names, there is one
        values = self._session.run(batch)
        return {name: values[name] for name in self.names}, {s.name: values[s.name] for s in self._program.outputs}

    def rows(self) -> tuple[CodeError, ...]:
        """A row for each quantized value, in execution order."""
        rows = []
        for node, tally in self._tallies.items():
            quantizer: Quantizer = node.meta["quantizer"]
            rows.append(tally.row(node.name, quantizer, str(node.meta.get("path", ""))))
        return tuple(rows)

    def compare_alone(self, batch: Batch, runtime: Mapping[str, Array]) -> dict[str, torch.Tensor]:
        """Count codes equal to those of :meth:`read` when both compute on their own; the Program's outputs."""
        results = output_nodes(self._program)
        outputs: dict[fx.Node, torch.Tensor] = {}

        def look(node: fx.Node, value: torch.Tensor, batch: Batch) -> None:
            if node in self._tallies:
                self._tallies[node].add_alone(value, to_tensor(runtime[node.name]))
            if node in results.values():
                outputs[node] = value

        observe(self._program, {*self._nodes, *results.values()}, [batch], look)
        return {name: outputs[node] for name, node in results.items()}

    def compare_given_codes(self, batch: Batch, runtime: Mapping[str, Array]) -> dict[str, torch.Tensor]:
        """Run the Program with the runtime's codes; compare each with what the Program itself would have given.

        The Program's outputs, given those codes.

        Raises:
            CheckError: a scale that is computed at run time is not the Program's.
        """
        results = output_nodes(self._program)
        replacements = {node: to_tensor(runtime[name]) for node, name in self._computed_parameters().items()}
        replacements |= {node: to_tensor(runtime[node.name]) for node in self._nodes}
        last = {operand: node for node in self._nodes for operand in node.all_input_nodes}
        values: dict[fx.Node, torch.Tensor] = {}

        def look(node: fx.Node, value: torch.Tensor, batch: Batch) -> torch.Tensor | None:
            replacement = replacements[node].to(value.dtype) if node in replacements else None
            if node in self._tallies and replacement is not None:
                x, scale, zero = (values[argument] for argument in node.all_input_nodes)
                self._tallies[node].add_given(value, replacement, Rounding(x, scale, zero, *grid_limits(node)))
                for argument in node.all_input_nodes:
                    if last[argument] is node and argument not in results.values():
                        del values[argument]
            elif replacement is not None:
                replacement = replacement.expand_as(value)
                _check_parameter(node, value, replacement)
            if node in last or node in results.values():
                values[node] = value if replacement is None else replacement
            return replacement

        observe(self._program, {*replacements, *last, *results.values()}, [batch], look)
        return {name: values[node] for name, node in results.items()}

    def explain(self, batch: Batch, runtime: Mapping[str, Array]) -> None:
        """Measure what float arithmetic does to the values whose codes lie further off than ties do as a rule.

        Errors of a stream that no quantizer interrupts add up from layer to layer, as in an encoder of sound.
        """
        doubtful = [node for node, tally in self._tallies.items() if tally.excess > tally.tie]
        if not doubtful:
            return
        known = {node: to_tensor(runtime[name]) for node, name in self._computed_parameters().items()}
        known |= {node: to_tensor(runtime[node.name]) for node in self._nodes}
        read = {operand for node in doubtful for operand in node.all_input_nodes}
        plain, shaken = (
            values_given(self._program, batch, read, known, rounding=rounding) for rounding in (0.0, ROUNDING)
        )
        for node in doubtful:
            x, scale, zero = node.all_input_nodes
            ours, other = (Rounding(v[x], v[scale], v[zero], *grid_limits(node)) for v in (plain, shaken))
            self._tallies[node].add_noise(ours, other)

    def compare_exactly(self, batch: Batch) -> None:
        """Round the runtime's own float inputs and compare with its codes, on so much of a batch as fits at once."""
        if self._float_session is None:
            return
        part = within(self._program, batch, self._exact_types, LARGEST_VALUES)
        runtime = self._float_session.run(part, self._float_names)
        computed = self._computed_parameters()
        for node, source in self._sources.items():
            view = QuantizerNode(node)
            scale, zero = (self._parameter(part, runtime, computed) for part in (view.scale, view.zero_point))
            if source is not None and source.x.name and scale is not None and zero is not None:
                x = to_tensor(runtime[source.x.name])
                codes = numerics.codes(x, scale, zero, *grid_limits(node))
                self._tallies[node].add_exact(codes, to_tensor(runtime[node.name]))

    def _parameter(
        self, argument: fx.Node, runtime: Mapping[str, Array], computed: Mapping[fx.Node, str]
    ) -> torch.Tensor | None:
        if argument.op == "get_attr":
            return get_tensor(self._program.module, str(argument.target))
        if argument in computed:
            return to_tensor(runtime[computed[argument]])
        return self._fixed_zero(argument)

    def _fixed_zero(self, argument: fx.Node) -> torch.Tensor | None:
        """The zero point of a symmetric grid, which the model may leave out or hold as a constant."""
        for node, source in self._sources.items():
            if QuantizerNode(node).zero_point is argument and source is not None:
                value = constant(source.zero_point) if source.zero_point is not None else None
                return to_tensor(value).float() if value is not None else torch.zeros(())
        return None


def output_nodes(program: Program) -> dict[str, fx.Node]:
    """The nodes that give the outputs, by the outputs' names."""
    return {spec.name: node for spec, node in zip(program.outputs, graph_results(program.graph), strict=True)}


def grid_limits(node: fx.Node) -> tuple[int, int]:
    """The smallest and the largest code of a ``quantize`` node."""
    return argument(node, "quant_min"), argument(node, "quant_max")


def _check_parameter(node: fx.Node, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Scales agree but for float arithmetic; zero points, which are rounded, may be one apart at ties.

    Raises:
        CheckError: they do not.
    """
    off = (theirs - ours).abs() - SCALE * ours.abs()
    worst = off.max().item() if off.numel() else 0.0
    is_scale = argument(node, "index") == 0
    if not worst <= (0.0 if is_scale else 1.0):
        kind = "scale" if is_scale else "zero point"
        raise CheckError(f"the {kind} %{node.name} that the runtime computes is not the program's ({worst:.3g} off)")

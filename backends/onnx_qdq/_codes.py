"""The runtime's codes against the Program's, for every quantized activation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from bitlower.backends.onnx_qdq._session import Array, Session, exposed, named_values, read_model, to_tensor
from bitlower.backends.onnx_qdq._structure import QuantizerInputs, quantizer_inputs
from bitlower.backends.onnx_qdq._verification import CodeError
from bitlower.ir import Batch, CheckError, Program, Quantizer, numerics, ops
from bitlower.ir.observe import observe

SCALE = 1e-5
"""How far a scale that is computed at run time may be from the Program's, relatively."""


@dataclass(frozen=True)
class CodeRun:
    """One batch: the Program's outputs on its own and given the runtime's codes, and the runtime's with codes read."""

    own: dict[str, torch.Tensor]
    given_codes: dict[str, torch.Tensor]
    runtime: dict[str, Array]


@dataclass
class _Tally:
    """Sums over batches for one quantized value."""

    codes: int = 0
    equal: int = 0
    off_by_one: int = 0
    worst: int = 0
    given_equal: int = 0
    excess: float = 0.0
    exact: int = 0
    exact_codes: int = 0


class CodeComparison:
    """Compares codes batch by batch.

    Raises:
        CheckError: a quantizer of the program is not in the model.
    """

    def __init__(self, program: Program, path: Path, config: Mapping[str, str]) -> None:
        self._program = program
        self._nodes = list(program.graph.find_nodes(op="call_function", target=ops.quantize))
        values = named_values(read_model(path).graph)
        for node in self._nodes:
            if node.name not in values:
                raise CheckError(f"the model has no codes of {_describe(node)}: the quantizer was dropped")
        self._inputs = {node: quantizer_inputs(values[node.name]) for node in self._nodes}
        names = [node.name for node in self._nodes]
        dynamic = [name for pair in self._dynamic().values() for name in pair if name]
        self._session = self._open(path, [*names, *dynamic], config)
        floats = [source.x.name or "" for source in self._inputs.values() if source is not None]
        self._exact_session = self._open(path, [*names, *dynamic, *floats], config)
        self._tallies = {node: _Tally() for node in self._nodes}

    def _open(self, path: Path, names: list[str], config: Mapping[str, str]) -> Session | None:
        unique = list(dict.fromkeys(names))
        return Session(exposed(path, unique), folder=path.parent, config=config) if unique else None

    def _dynamic(self) -> dict[fx.Node, tuple[str, str]]:
        """The names of run-time scales and zero points in the model, by quantizer; empty where there is none."""
        found = {}
        for node, source in self._inputs.items():
            if isinstance(node.args[1], fx.Node) and node.args[1].op != "get_attr" and source is not None:
                zero = source.zero_point.name if source.zero_point is not None else ""
                found[node] = (source.scale.name or "", zero or "")
        return found

    def run(self, batch: Batch) -> CodeRun | None:
        """Compare one batch; None if the program quantizes no activation.

        Raises:
            CheckError: a scale that is computed at run time is not the Program's.
        """
        if self._session is None or self._exact_session is None:
            return None
        runtime = self._session.run(batch)
        codes = {node: to_tensor(runtime[node.name]) for node in self._nodes}
        own = self._run_program(batch, lambda node, value: self._add_own(node, value, codes))
        given = self._run_program(batch, _GivenCodes(self, codes, self._runtime_parameters(runtime)))
        self._add_exact(self._exact_session.run(batch))
        outputs = {spec.name: runtime[spec.name] for spec in self._program.outputs}
        return CodeRun(own, given, outputs)

    def rows(self) -> tuple[CodeError, ...]:
        """A row for each quantized value."""
        return tuple(self._row(node, tally) for node, tally in self._tallies.items())

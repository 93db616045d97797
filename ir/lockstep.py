"""Run a Program over all batches at once, node by node: each node on every batch before the next node.

Passes that change a layer and want later layers to see it (GPTQ, layer-wise distillation) need each layer's inputs from
already changed predecessors. A walk in lockstep returns them in a single forward run: a visitor is called when a node's
operands are known on all batches and its own weights have not been looked at yet. Memory holds the values that are
still needed, on disk what exceeds the budget, and the weights of one node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import fx

from bitlower.ir.dataflow import ancestors, constants
from bitlower.ir.diagnostics import describe
from bitlower.ir.fit import Batch
from bitlower.ir.observe import Track
from bitlower.ir.program import Program
from bitlower.ir.quantization.numerics import bfloat16_products
from bitlower.ir.storage import is_mapped, release, spill
from bitlower.ir.tensors import get_tensor

Read = Callable[[fx.Node], Iterator[tuple[torch.Tensor, Batch]]]
"""Gives the value of an operand on each batch, with the batch."""
Visit = Callable[[fx.Node, Read], None]


def walk(
    program: Program,
    nodes: Collection[fx.Node],
    batches: Sequence[Batch],
    visit: Visit,
    *,
    track: Track | None = None,
    label: str = "walking through the model",
    budget: int = 2 << 30,
    folder: Path | None = None,
    bfloat16: bool = False,
) -> None:
    """Call ``visit(node, read)`` for each of ``nodes``, in graph order, with its operands computed on all batches.

    What ``visit`` writes to tensors of the program counts from that node on: parameters, and what is computed from
    them alone, are evaluated when a node first needs them. Nothing is computed that no later visit depends on.

    Args:
        program: its graph ``model`` is run, without gradients.
        nodes: of that graph.
        batches: inputs by name.
        visit: ``read(operand)`` iterates over the batches; the values must not be written to.
        track: progress display, as in the pass context; it counts the visits.
        label: what the display says.
        budget: bytes of values that are held in memory; more go to temporary files.
        folder: for those files; the system's temporary folder if None.
        bfloat16: let matrix products on the way round their operands to bfloat16, which some CPUs do much faster.

    Raises:
        BitlowerError: a batch with missing or unknown inputs.
    """
    stops = set(nodes)
    visits = steps(program, stops, batches, budget=budget, folder=folder, bfloat16=bfloat16)
    order = [node for node in program.graph.nodes if node in stops]
    with torch.no_grad():
        for _, (node, read) in zip(track(order, label) if track else order, visits, strict=True):
            visit(node, read)


def steps(
    program: Program,
    nodes: Collection[fx.Node],
    batches: Sequence[Batch],
    *,
    budget: int = 2 << 30,
    folder: Path | None = None,
    bfloat16: bool = False,
) -> Iterator[tuple[fx.Node, Read]]:
    """What :func:`walk` visits, one by one: the walk goes on when the next is asked for.

    So several programs can be walked through side by side, a float one next to one that is being quantized.

    Raises:
        BitlowerError: a batch with missing or unknown inputs.
    """
    walker = _Walker(program, set(nodes), batches, budget, folder)
    for node in program.graph.nodes:
        if node in walker.stops:
            yield node, walker.read
            walker.visited(node)
        if node in walker.values_needed:
            with torch.no_grad(), bfloat16_products() if bfloat16 else nullcontext():
                walker.run(node)


class _Walker:
    """The values that are alive, on every batch."""

    def __init__(
        self, program: Program, stops: set[fx.Node], batches: Sequence[Batch], budget: int, folder: Path | None
    ) -> None:
        self.module, self.stops, self.batches = program.module, stops, batches
        self._budget, self._folder = budget, folder
        self._interpreter = fx.Interpreter(self.module)
        needed = ancestors(program.graph, stops)
        self._constant = constants(program.graph)
        self.values_needed = {n for n in needed if n.op != "placeholder" and n not in self._constant}
        self._readers = Counter(
            source for node in {*self.values_needed, *stops} for source in set(node.all_input_nodes)
        )
        for node in self.values_needed & stops:
            self._readers.update(set(node.all_input_nodes))
        self._values: dict[fx.Node, list[Any]] = {}
        placeholders = list(program.graph.find_nodes(op="placeholder"))
        for arguments in map(program.arguments, batches):
            for node, value in zip(placeholders, arguments, strict=True):
                self._values.setdefault(node, []).append(value)

    def read(self, node: fx.Node) -> Iterator[tuple[torch.Tensor, Batch]]:
        """The value of ``node`` on each batch."""
        if node in self._constant:
            with torch.no_grad():
                value = self._evaluate(node, {})
            yield from ((value, batch) for batch in self.batches)
            return
        for value, batch in zip(self._values[node], self.batches, strict=True):
            yield value, batch
            release(value)

    def visited(self, node: fx.Node) -> None:
        """The visit of ``node`` is over."""
        self._drop_operands(node)

    def run(self, node: fx.Node) -> None:
        """Compute ``node`` on every batch."""
        constants: dict[fx.Node, Any] = {}
        for source in node.all_input_nodes:
            if source in self._constant:
                self._evaluate(source, constants)
        memory, results = self._held(), []
        for index in range(len(self.batches)):
            known = {n: self._values[n][index] for n in node.all_input_nodes if n not in self._constant} | constants
            value = self._call(node, known)
            if isinstance(value, torch.Tensor) and not any(_shares(value, operand) for operand in known.values()):
                memory += value.untyped_storage().nbytes()
                value = spill(value, folder=self._folder) if memory > self._budget else value
            results.append(value)
            for operand in known.values():
                if isinstance(operand, torch.Tensor):
                    release(operand)
        self._values[node] = results
        self._release_parameters(node)
        self._drop_operands(node)

    def _held(self) -> int:
        """Bytes of all living values that are in memory, each storage once."""
        storages = {
            value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
            for values in self._values.values()
            for value in values
            if isinstance(value, torch.Tensor) and not is_mapped(value)
        }
        return sum(storages.values())

    def _evaluate(self, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        """The value of a node that depends on parameters alone."""
        if node not in known:
            for source in node.all_input_nodes:
                self._evaluate(source, known)
            known[node] = self._call(node, known)
        return known[node]

    def _call(self, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        self._interpreter.env = known
        try:
            return self._interpreter.run_node(node)
        except Exception as error:
            error.add_note(f"while running {describe(node)}")
            raise

    def _drop_operands(self, node: fx.Node) -> None:
        for source in set(node.all_input_nodes):
            self._readers[source] -= 1
            if not self._readers[source]:
                self._values.pop(source, None)

    def _release_parameters(self, node: fx.Node) -> None:
        pending = [source for source in node.all_input_nodes if source in self._constant]
        while pending:
            source = pending.pop()
            pending += source.all_input_nodes
            if source.op == "get_attr":
                release(get_tensor(self.module, str(source.target)))


def _shares(value: torch.Tensor, operand: Any) -> bool:
    """Whether ``value`` is a view of ``operand``."""
    return (
        isinstance(operand, torch.Tensor) and value.untyped_storage().data_ptr() == operand.untyped_storage().data_ptr()
    )

"""Run a Program over batches and hand values of chosen nodes to a callback, in bounded memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from bitlower.ir.dataflow import ancestors, constants
from bitlower.ir.diagnostics import BitlowerError, describe, nearest
from bitlower.ir.fit import Batch
from bitlower.ir.operators import graph_results
from bitlower.ir.program import Program
from bitlower.ir.storage import release

Callback = Callable[[fx.Node, Any, Batch], object]
Track = Callable[[Iterable[Any], str], Iterator[Any]]


def observe(
    program: Program,
    nodes: Collection[fx.Node | str],
    batches: Iterable[Batch],
    callback: Callback,
    *,
    track: Track | None = None,
    label: str = "running batches",
) -> None:
    """Run ``program`` on each batch and call ``callback(node, value, batch)`` for each of ``nodes``, in graph order.

    Nodes that depend on no input have their turn when they are first read, or at the end.

    Only what the nodes depend on is computed, without gradients, and a value is freed after its last use: the
    callback must copy what it keeps and must not write to the value.

    Args:
        program: its graph ``model`` is run.
        nodes: of that graph, themselves or by name.
        batches: inputs by name; read once, so a generator will do.
        callback: ``value`` is what the node returns: a tensor, a number or a tuple. What the callback returns, unless
            it is None, takes its place in the rest of the run.
        track: progress display, as in the pass context.
        label: what the display says.

    Raises:
        BitlowerError: an unknown node name, or a batch with missing or unknown inputs.
    """
    watched = _resolve(program.graph, nodes)
    if not watched:
        return
    runner = _Runner(program.module, watched)
    for batch in track(batches, label) if track else batches:
        values = runner.values(program.arguments(batch))
        seen = next(values, None)
        while seen:
            with torch.no_grad(), _noted(seen[0]):
                replacement = callback(*seen, batch)
            seen = None
            with contextlib.suppress(StopIteration):
                seen = values.send(replacement)


def stream(program: Program, nodes: Collection[fx.Node | str], batch: Batch) -> Iterator[tuple[fx.Node, Any]]:
    """What :func:`observe` shows on one batch, one by one: the run goes on when the next value is asked for.

    So two programs can be run side by side, and their values compared while few of them are held.

    Raises:
        BitlowerError: an unknown node name, or a batch with missing or unknown inputs.
    """
    yield from _Runner(program.module, _resolve(program.graph, nodes)).values(program.arguments(batch))


def run(program: Program, batch: Batch) -> dict[str, torch.Tensor]:
    """What ``program(**batch)`` returns, without gradients and in bounded memory.

    Raises:
        BitlowerError: an input is missing or unknown.
    """
    results = graph_results(program.graph)
    values: dict[fx.Node, torch.Tensor] = {}
    observe(program, set(results), [batch], lambda node, value, _: values.update({node: value}))
    outputs = {spec.name: values[node] for spec, node in zip(program.outputs, results, strict=True)}
    return program.cropped(outputs, batch)


def _resolve(graph: fx.Graph, nodes: Collection[fx.Node | str]) -> set[fx.Node]:
    known = {node.name: node for node in graph.nodes}
    for node in nodes:
        name = node if isinstance(node, str) else node.name
        if name not in known or (isinstance(node, fx.Node) and known[name] is not node):
            raise BitlowerError(f"the graph has no node %{name}", hint=nearest(name, known))
    return {known[node] if isinstance(node, str) else node for node in nodes}


def _cone(graph: fx.Graph, watched: Collection[fx.Node]) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """Copy what ``watched`` depends on and all placeholders; give the graph and the original of each of its nodes.

    What depends on no input stands right before its first reader: the floats behind the codes of a weight live only
    while they are multiplied with, wherever the graph has them.
    """
    needed, fixed = {*watched, *ancestors(graph, watched)}, constants(graph)
    cone, copies = fx.Graph(), dict[fx.Node, fx.Node]()

    def copy(node: fx.Node) -> None:
        for source in node.all_input_nodes:
            if source not in copies:
                copy(source)
        copies[node] = cone.node_copy(node, copies.__getitem__)

    for node in graph.nodes:
        if node.op == "placeholder" or (node in needed and node.op != "output" and node not in fixed):
            copy(node)
    for node in graph.nodes:
        if node in watched and node not in copies:
            copy(node)
    cone.output(())
    return cone, {new: node for node, new in copies.items()}


class _Runner(fx.Interpreter):
    """Runs the cone of the watched nodes; values that nobody reads later are dropped."""

    def __init__(self, module: fx.GraphModule, watched: Collection[fx.Node]) -> None:
        cone, originals = _cone(module.graph, watched)
        super().__init__(module, garbage_collect_values=True, graph=cone)
        self._watched: Mapping[fx.Node, fx.Node] = {c: n for c, n in originals.items() if n in watched}
        self._originals: Mapping[fx.Node, fx.Node] = originals

    def values(self, arguments: list[torch.Tensor]) -> Generator[tuple[fx.Node, Any], Any, None]:
        """Run once and give the watched nodes' values on the way; what is sent back, unless None, takes their place."""
        self.args_iter, self.env = iter(arguments), {}
        for node in self.graph.nodes:
            with torch.no_grad(), _noted(self._originals.get(node, node)):
                value = self.run_node(node)
            if node in self._watched:
                replacement = yield self._watched[node], value
                value = value if replacement is None else replacement
                del replacement
            for source in node.all_input_nodes:
                if source.op == "get_attr":
                    release(self.fetch_attr(str(source.target)))
            self.env[node] = value if node.users else None
            del value
            for read in self.user_to_last_uses.get(node, ()):
                del self.env[read]


@contextlib.contextmanager
def _noted(node: fx.Node) -> Iterator[None]:
    """Errors say at which node they came."""
    try:
        yield
    except Exception as error:
        error.add_note(f"while running {describe(node)}")
        raise

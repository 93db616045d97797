"""Run a Program over batches and hand values of chosen nodes to a callback, in bounded memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
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
REUSED_BYTES = 256 << 20
"""What a run over several batches holds of what it computes from parameters alone."""


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
    callback must copy what it keeps and must not write to the value. What is computed from parameters alone, such as
    rounded weights, is computed once for several batches, up to :data:`REUSED_BYTES` of it, as long as nobody writes to
    the parameters.

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
    several = isinstance(batches, Sized) and len(batches) > 1
    runner = _Runner(program.module, watched, REUSED_BYTES if several else 0)
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


_Mark = tuple[torch.Tensor, int]


@dataclass(frozen=True)
class _Step:
    """A node as it was when the run was planned: a callback may edit the graph.

    Args:
        attributes: the module's tensors whose memory can be given back after it, if they lie in files.
        dropped: what nobody reads after it.
        is_read: whether a later step reads its value.
        behind: if it is computed from the module's tensors alone, and of none that is watched, their names.
    """

    node: fx.Node
    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    attributes: tuple[str, ...]
    dropped: tuple[fx.Node, ...]
    is_read: bool
    behind: tuple[str, ...]


def _steps(graph: fx.Graph, watched: Collection[fx.Node]) -> list[_Step]:
    """All placeholders and what ``watched`` depends on, in the order in which it is run."""
    order = _order(graph, watched)
    last_reader = {source: node for node in order for source in node.all_input_nodes}
    dropped: dict[fx.Node, list[fx.Node]] = {}
    for source, node in last_reader.items():
        dropped.setdefault(node, []).append(source)
    attributes, behind = _attributes(order, _behind(order)), _behind(order, watched)
    return [
        _Step(
            node, node.op, node.target, node.args, node.kwargs, attributes.get(node, ()),
            tuple(dropped.get(node, ())), node in last_reader,
            behind.get(node, ()) if node.op == "call_function" else (),
        )
        for node in order
    ]  # fmt: skip


def _behind(order: Sequence[fx.Node], shown: Collection[fx.Node] = ()) -> dict[fx.Node, tuple[str, ...]]:
    """The module's tensors that a node is made of, for each that is made of nothing else, nor of those ``shown``."""
    behind: dict[fx.Node, tuple[str, ...]] = {}
    for node in order:
        sources = node.all_input_nodes
        if node in shown:
            continue
        if node.op == "get_attr":
            behind[node] = (str(node.target),)
        elif node.op == "call_function" and sources and all(source in behind for source in sources):
            behind[node] = tuple(dict.fromkeys(name for source in sources for name in behind[source]))
    return behind


def _attributes(order: Sequence[fx.Node], behind: Mapping[fx.Node, Sequence[str]]) -> dict[fx.Node, tuple[str, ...]]:
    """The tensors of the module that a step reads, or the last of all steps through views of them, such as slices."""
    last = {name: node for node in order for source in node.all_input_nodes for name in behind.get(source, ())}
    released: dict[fx.Node, dict[str, None]] = {}
    for node in order:
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                released.setdefault(node, {})[str(source.target)] = None
    for name, node in last.items():
        released.setdefault(node, {})[name] = None
    return {node: tuple(names) for node, names in released.items()}


def _order(graph: fx.Graph, watched: Collection[fx.Node]) -> list[fx.Node]:
    """The nodes of a run: what depends on no input stands right before its first reader.

    So the floats behind the codes of a weight live only while they are multiplied with, wherever the graph has them.
    """
    needed, fixed = {*watched, *ancestors(graph, watched)}, constants(graph)
    order = dict[fx.Node, None]()

    def add(node: fx.Node) -> None:
        for source in node.all_input_nodes:
            if source not in order:
                add(source)
        order[node] = None

    for node in graph.nodes:
        if node.op == "placeholder" or (node in needed and node.op != "output" and node not in fixed):
            add(node)
    for node in graph.nodes:
        if node in watched and node not in order:
            add(node)
    return list(order)


class _Runner(fx.Interpreter):
    """Runs what the watched nodes depend on; values that nobody reads later are dropped.

    Args:
        module: is run.
        watched: the nodes whose values are shown.
        reused: bytes of values that are held for the next run, of those that depend on parameters alone.
    """

    def __init__(self, module: fx.GraphModule, watched: Collection[fx.Node], reused: int = 0) -> None:
        super().__init__(module, garbage_collect_values=False)
        self._watched, self._steps = frozenset(watched), _steps(module.graph, watched)
        self._reuses, self._room = reused > 0, reused
        self._reused: dict[fx.Node, tuple[list[_Mark], torch.Tensor]] = {}

    def values(self, arguments: list[torch.Tensor]) -> Generator[tuple[fx.Node, Any], Any, None]:
        """Run once and give the watched nodes' values on the way; what is sent back, unless None, takes their place."""
        self.args_iter, self.env = iter(arguments), {}
        for step in self._steps:
            with torch.no_grad(), _noted(step.node):
                value = self._reusable(step) if step.behind and self._reuses else self._run(step)
            if step.node in self._watched:
                replacement = yield step.node, value
                value = value if replacement is None else replacement
                del replacement
            for target in step.attributes:
                release(self.fetch_attr(target))
            self.env[step.node] = value if step.is_read else None
            del value
            for source in step.dropped:
                del self.env[source]

    def _reusable(self, step: _Step) -> Any:
        """The value of a step that depends on parameters alone, from an earlier run if they are what they were."""
        marks = [_mark(self.fetch_attr(name)) for name in step.behind]
        earlier = self._reused.get(step.node)
        if earlier is not None and all(a is b and v == w for (a, v), (b, w) in zip(earlier[0], marks, strict=True)):
            return earlier[1]
        value = self._run(step)
        if earlier is not None:
            self._room += self._reused.pop(step.node)[1].nbytes
        if isinstance(value, torch.Tensor) and value.nbytes <= self._room and not self._is_view(value, step):
            self._room -= value.nbytes
            self._reused[step.node] = marks, value
        return value

    def _is_view(self, value: torch.Tensor, step: _Step) -> bool:
        """Whether ``value`` lies where an operand of its step does."""
        place = value.untyped_storage().data_ptr()
        operands = (self.env[source] for source in step.node.all_input_nodes)
        return any(isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() == place for x in operands)

    def _run(self, step: _Step) -> Any:
        args, kwargs = (fx.node.map_arg(part, self.env.__getitem__) for part in (step.args, step.kwargs))
        return getattr(self, step.op)(step.target, args, kwargs)


def _mark(tensor: torch.Tensor) -> _Mark:
    """What changes when ``tensor`` is replaced or written to."""
    return tensor, 0 if tensor.is_inference() else tensor._version


@contextlib.contextmanager
def _noted(node: fx.Node) -> Iterator[None]:
    """Errors say at which node they came."""
    try:
        yield
    except Exception as error:
        error.add_note(f"while running {describe(node)}")
        raise

"""Trials: the loss of a simulated Program with some of its quantizers off, or on other grids; many trials, shared work.

A trial differs from a *baseline* in a few quantizers. All trials are run in one walk through the baseline: where the
first value that a trial changes is due, the trial takes the baseline's living values and runs the rest by itself. So

- what comes before the change is computed once for all trials, and nothing but living values is held,
- what comes after it and does not depend on it is taken from the baseline too (keys and values, if a query changes),
- what depends on parameters alone (rounded weights) is computed once for all batches, not once a run,
- trials that set the same quantizers are one trial.

The same operators run on the same values as in a full run of each trial, so the losses are equal to the last bit.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from bitlower.ir import Batch, BitlowerError, Grid, Program, get_tensor
from bitlower.ir.observe import Track
from bitlower.ir.operators import graph_results
from bitlower.ir.quantization import numerics
from bitlower.ir.quantization.granularity import Granularity
from bitlower.ir.quantizer_node import QuantizerNode
from bitlower.ir.storage import is_mapped, release
from bitlower.passes.precision._measures import Measure, ReferenceOutputs, Sums

TRIALS = "it runs the model as often as there is something to try; the time is as without it"
"""What predictions of a run with trials say."""


class Switch(enum.Enum):
    """A quantizer as it stands in the program, or one that lets values through."""

    ON = "on"
    OFF = "off"


@dataclass(frozen=True, eq=False)
class Rounding:
    """A quantizer on another grid; scale and zero point are None where they are computed per token at run time.

    One that is not calibrated lets values through.
    """

    grid: Grid
    scale: torch.Tensor | None = None
    zero_point: torch.Tensor | None = None
    calibrated: bool = True

    @cached_property
    def _whole_zero(self) -> torch.Tensor | None:
        """The zero point as ``fake_quantize`` takes it."""
        return None if self.zero_point is None else torch.round(self.zero_point)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` on the grid, as ``fake_quantize`` computes it, without the detour through torch's dispatcher."""
        if not self.calibrated:
            return x
        scale, zero = self.scale, self._whole_zero
        if scale is None or zero is None:
            scale, zero = self.grid.qparams(*Granularity.per_token().range_of(x))
            zero = torch.round(zero)
        return numerics.fake(x, scale, zero, self.grid.quant_min, self.grid.quant_max)

    @classmethod
    def of(cls, program: Program, node: fx.Node) -> Rounding:
        """What the quantizer ``node`` of a simulated program does."""
        grid = node.meta["quantizer"].spec.grid
        view = QuantizerNode(node)
        return cls(grid, *view.range(program.module), view.is_calibrated) if view.is_static else cls(grid)


State = Switch | Rounding
Setting = Mapping[fx.Node, State]
"""Quantizer nodes and what they do; those that are left out do what the baseline says."""
Values = dict[fx.Node, Any]
_BUDGET = 2 << 30
"""Bytes of values that are held between trials."""


class Trials:
    """Runs trials of one program on fixed batches.

    Args:
        program: at level simulated.
        batches: inputs by name.
        measure: against the outputs with all quantizers off.
        budget: bytes of values that are held; batches are run in parts if they need more.
    """

    def __init__(self, program: Program, batches: Sequence[Batch], measure: Measure, *, budget: int = _BUDGET) -> None:
        if not batches:
            raise BitlowerError("trials need calibration data", hint="give calibration batches")
        self.program, self.batches, self.measure, self.budget = program, tuple(batches), measure, budget
        returned = graph_results(program.graph)
        results = {spec.name: node for spec, node in zip(program.outputs, returned, strict=True)}
        self.results: list[fx.Node] = [results[name] for name in measure.outputs]
        self.quantizers = [node for node, _ in program.quantizers()]
        self.runs = 0
        """Trials that were run, equal ones counted once."""
        self.plan = _Plan(program, self.results)
        self._references: dict[int, ReferenceOutputs] = {}

    @property
    def off(self) -> Setting:
        """All quantizers off: the reference."""
        return dict.fromkeys(self.quantizers, Switch.OFF)

    def run(
        self,
        settings: Sequence[Setting],
        *,
        baseline: Setting | None = None,
        track: Track | None = None,
        label: str = "trials",
    ) -> list[float]:
        """The loss of each of ``settings``, which say what differs from ``baseline``.

        What the baseline leaves out, or all if there is none, stands as in the program.
        """
        base = {node: (baseline or {}).get(node, Switch.ON) for node in self.quantizers}
        differing = [{n: s for n, s in setting.items() if s is not base[n]} for setting in settings]
        keys = [frozenset(setting.items()) for setting in differing]
        unique = dict(zip(keys, differing, strict=True))
        forks = {key: _Fork.of(self.plan, base, setting) for key, setting in unique.items()}
        order = sorted(unique, key=lambda key: forks[key].position)
        self.runs += len(order)
        parts: dict[frozenset[Any], list[Sums]] = {key: [] for key in order}
        chunks = list(self._chunks(base))
        steps = [(chunk, key) for chunk in chunks for key in order]
        walk: _Walk | None = None
        with torch.no_grad():
            for chunk, key in track(steps, label) if track else steps:
                if walk is None or walk.chunk is not chunk:
                    walk = self._start(chunk, base, keep=len(chunks) == 1)
                parts[key] += walk.run(forks[key])
        losses = {key: self.measure.total(sums) for key, sums in parts.items()}
        return [losses[key] for key in keys]

    def _chunks(self, base: Setting) -> Iterator[Sequence[int]]:
        """Numbers of batches whose values can be held at once."""
        bytes_ = self.plan.living_bytes(self.batches[0], base, self.measure) if len(self.batches) > 1 else 0
        step = max(1, self.budget // max(1, bytes_))
        for start in range(0, len(self.batches), step):
            yield range(start, min(start + step, len(self.batches)))

    def _start(self, chunk: Sequence[int], base: Setting, *, keep: bool) -> _Walk:
        if not keep:
            self._references.clear()
        for index in chunk:
            if index not in self._references:
                line = _Line(self.plan, self.batches[index], self.off, _Constants(self.plan, self.off, 0))
                line.advance(len(self.plan.nodes))
                outputs = [line.value(node) for node in self.results]
                self._references[index] = self.measure.reference(outputs, self.batches[index])
        constants = _Constants(self.plan, base, self.budget)
        lines = [_Line(self.plan, self.batches[index], base, constants) for index in chunk]
        return _Walk(self, chunk, lines, constants)

    def compare(self, index: int, actual: Sequence[torch.Tensor]) -> Sums:
        """Outputs on the batch ``index`` against the reference."""
        return self.measure.against(self._references[index], actual)


class _Plan:
    """What is known of a graph before anything runs."""

    def __init__(self, program: Program, results: Sequence[fx.Node]) -> None:
        self.program, self.module = program, program.module
        self.nodes = list(program.graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.placeholders = [node for node in self.nodes if node.op == "placeholder"]
        self.results = list(results)
        needed = set(results)
        for node in reversed(self.nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
        self.order = [node for node in self.nodes if node in needed and node.op != "output"]
        self.constant = set[fx.Node]()
        for node in self.order:
            if node.op == "get_attr" or (node.op == "call_function" and self.constant.issuperset(node.all_input_nodes)):
                self.constant.add(node)
        self.stored = {node: Rounding.of(program, node) for node, _ in program.quantizers()}
        self.last = {s: self.position[node] for node in self.order for s in node.all_input_nodes}
        self.last |= dict.fromkeys(results, len(self.nodes))

    def compute(self, node: fx.Node, state: State | None, value: Callable[[fx.Node], Any]) -> Any:
        """The value of ``node``, whose operands ``value`` finds; ``state`` is that of a quantizer."""
        if node.op == "get_attr":
            return get_tensor(self.module, str(node.target))
        if state is not None:
            x = value(QuantizerNode(node).value)
            rounding = state if isinstance(state, Rounding) else self.stored[node]
            result = x if state is Switch.OFF else rounding.apply(x)
            return result if result is not x or x.is_contiguous() else x.clone()
        args: Any = fx.map_arg(node.args, value)
        kwargs: Any = fx.map_arg(node.kwargs, value)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def operands(self, node: fx.Node, state: State | None) -> list[fx.Node]:
        """What ``node`` is computed from in that state."""
        return node.all_input_nodes if state is None else [QuantizerNode(node).value]

    def release(self, node: fx.Node) -> None:
        """Let go of mapped parameters that ``node`` has read."""
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                release(get_tensor(self.module, str(source.target)))

    def living_bytes(self, batch: Batch, base: Setting, measure: Measure) -> int:
        """The most bytes of values that are alive at a time in a run on ``batch``, and those of the reference."""
        line, most = _Line(self, batch, base, _Constants(self, base, 0)), 0
        with torch.no_grad():
            for node in self.order:
                if node not in self.constant:
                    line.advance(self.position[node] + 1)
                    most = max(most, _bytes(line.values.values()))
            return most + measure.reference([line.value(node) for node in self.results], batch).bytes


class _Constants:
    """Values of what depends on parameters alone, under one setting; held as far as ``budget`` bytes allow."""

    def __init__(self, plan: _Plan, states: Setting, budget: int) -> None:
        self._plan, self._states, self._left = plan, states, budget
        self._values: Values = {}

    def value(self, node: fx.Node) -> Any:
        """The value of ``node``."""
        if node in self._values:
            return self._values[node]
        result = self._plan.compute(node, self._states.get(node), self.value)
        self._plan.release(node)
        if node.op == "call_function":
            self.hold(node, result)
        return result

    def hold(self, node: fx.Node, result: Any) -> None:
        """Keep ``result`` if there is room."""
        size = _bytes([result])
        if size <= self._left:
            self._left -= size
            self._values[node] = result


class _Line:
    """The baseline on one batch: values that are alive at its position, and those that trials asked for ahead of it."""

    def __init__(self, plan: _Plan, batch: Batch, states: Setting, constants: _Constants) -> None:
        self._plan, self._states, self._constants = plan, states, constants
        self._position = 0
        arguments = plan.program.arguments(batch)
        self.values: Values = dict(zip(plan.placeholders, arguments, strict=True))

    def value(self, node: fx.Node) -> Any:
        """The value of ``node``, which must not lie behind the position and be dead."""
        if node in self._plan.constant:
            return self._constants.value(node)
        pending = [node]
        while pending:
            top = pending[-1]
            operands = self._plan.operands(top, self._states.get(top)) if top not in self.values else []
            missing = [n for n in operands if n not in self.values and n not in self._plan.constant]
            if missing:
                pending += missing
                continue
            pending.pop()
            if top not in self.values:
                self.values[top] = self._plan.compute(top, self._states.get(top), self._known)
                self._plan.release(top)
        return self.values[node]

    def _known(self, node: fx.Node) -> Any:
        return self._constants.value(node) if node in self._plan.constant else self.values[node]

    def advance(self, position: int) -> None:
        """Compute all that is alive at ``position`` and forget what is dead there."""
        plan = self._plan
        for place in range(self._position, min(position, len(plan.nodes))):
            node = plan.nodes[place]
            if node not in plan.last or node in plan.constant:
                continue
            if node.op == "call_function":
                self.value(node)
            for source in node.all_input_nodes:
                if plan.last[source] <= place:
                    self.values.pop(source, None)
        self._position = max(position, self._position)


@dataclass(frozen=True)
class _Fork:
    """A trial, ready to run.

    Args:
        states: of all quantizers.
        constants: nodes that change and depend on parameters alone, in order.
        nodes: the others that change, in order.
        position: of the first of these; behind the last node of the graph if there is none.
    """

    states: Setting
    constants: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    position: int

    @classmethod
    def of(cls, plan: _Plan, base: Setting, setting: Setting) -> _Fork:
        """The trial that changes ``setting`` in ``base``: what depends on it, and is needed for the results."""
        states = {**base, **setting}
        changed: set[fx.Node] = set()
        for node in plan.order:
            if node in setting or not changed.isdisjoint(plan.operands(node, states.get(node))):
                changed.add(node)
        needed = changed.intersection(plan.results)
        for node in reversed(plan.order):
            if node in needed:
                needed.update(changed.intersection(plan.operands(node, states.get(node))))
        nodes = tuple(node for node in plan.order if node in needed and node not in plan.constant)
        constants = tuple(node for node in plan.order if node in needed and node in plan.constant)
        return cls(states, constants, nodes, plan.position[nodes[0]] if nodes else len(plan.nodes))


class _Walk:
    """The baseline on a chunk of batches."""

    def __init__(self, trials: Trials, chunk: Sequence[int], lines: Sequence[_Line], constants: _Constants) -> None:
        self.chunk = chunk
        self._trials, self._plan, self._lines, self._constants = trials, trials.plan, lines, constants

    def run(self, fork: _Fork) -> list[Sums]:
        """Run one trial from the first value that it changes on, batch by batch."""
        own: Values = {}
        for node in fork.constants:
            own[node] = self._compute(node, fork, own, self._constants.value)
        sums = []
        for index, line in zip(self.chunk, self._lines, strict=True):
            line.advance(fork.position)
            sums.append(self._trials.compare(index, self._outputs(fork, own, line)))
        return sums

    def _outputs(self, fork: _Fork, own: Values, line: _Line) -> list[torch.Tensor]:
        plan, values = self._plan, dict(own)
        for node in fork.nodes:
            values[node] = self._compute(node, fork, values, line.value)
            for source in node.all_input_nodes:
                if source not in own and plan.last[source] <= plan.position[node]:
                    values.pop(source, None)
        return [values[node] if node in values else line.value(node) for node in plan.results]

    def _compute(self, node: fx.Node, fork: _Fork, values: Values, base: Callable[[fx.Node], Any]) -> Any:
        result = self._plan.compute(node, fork.states.get(node), lambda n: values[n] if n in values else base(n))
        self._plan.release(node)
        return result


def _bytes(values: Iterable[Any]) -> int:
    """Bytes of the tensors among ``values`` that lie in memory, each storage once."""
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for value in values
        if isinstance(value, torch.Tensor) and not is_mapped(value)
    }
    return sum(storages.values())

"""The repeated blocks of a simulated Program beside those of the float model, one by one.

Both are walked once: the float blocks run on what the float blocks before them give, the quantized ones on what the
quantized blocks before them give as they are by then. Only values between two blocks are held, on disk beyond a budget,
and those that several blocks read: a decoder's blocks get the encoder's output, which is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from bitlower.ir import Batch, BitlowerError, Program
from bitlower.ir.storage import release, spill
from bitlower.ir.subgraph import subgraph
from bitlower.passes.training._part import Part, parts


def pairs(program: Program, reference: Program, name: str) -> list[tuple[Part, Part]]:
    """The blocks of ``program`` with those of the float model, by order.

    Raises:
        BitlowerError: there are none, or they do not go together.
    """
    mine, theirs = parts(program), parts(reference)
    if not mine:
        raise BitlowerError(
            f"{name}: the model has no repeated blocks with an attention each", hint="use `adaround` or `gptq`"
        )
    if _types(mine) != _types(theirs):
        raise BitlowerError(
            f"{name}: the program has {len(mine)} blocks, and the float model {len(theirs)} or other ones",
            hint="run passes that change the graph before `quantize`",
        )
    return list(zip(mine, theirs, strict=True))


def _types(block_parts: Sequence[Part]) -> list[list[object]]:
    """The types of what leaves each block and of its context."""
    return [[node.meta.get("type") for node in (part.output, *part.context)] for part in block_parts]


@dataclass(frozen=True)
class BlockStep:
    """One block, and what goes in and should come out of it, a value for each batch.

    ``context`` are the values of the block's context, in its order, on each batch.
    """

    index: int
    part: Part
    inputs: list[torch.Tensor]
    context: tuple[list[torch.Tensor], ...]
    targets: list[torch.Tensor]

    def arguments(self, batch: Batch, index: int) -> tuple[Any, ...]:
        """What the block takes on ``batch``, the one at ``index``."""
        return (self.inputs[index], *(values[index] for values in self.context), *self.part.side_values(batch))


@dataclass
class Walk:
    """Both programs side by side, from block to block: each float block runs once on each batch.

    Iterating gives a :class:`BlockStep` for each block. What is written to the tensors of the program meanwhile counts
    from the next step on.

    Args:
        pairs: of blocks, quantized and float.
        batches: inputs by name.
        inputs: where the values come from that a block gets: the ``quantized`` blocks before it, or the ``float`` ones.
        memory: bytes of values that are held in memory; more go to files in ``folder``.
        folder: the system's temporary folder if None.
    """

    pairs: Sequence[tuple[Part, Part]]
    batches: Sequence[Batch]
    inputs: str = "quantized"
    memory: int = 2 << 30
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[BlockStep]:
        student, teacher = (_Side([pair[i] for pair in self.pairs], self) for i in (0, 1))
        quantized = self.inputs == "quantized"
        for index, (part, _) in enumerate(self.pairs):
            teacher.enter(index)
            if quantized:
                student.enter(index)
            inputs, context = (student if quantized else teacher).entering(index)
            targets = teacher.advance(index, keep=not quantized)
            yield BlockStep(index, part, inputs, context, targets)
            if quantized and index + 1 < len(self.pairs):
                student.advance(index, keep=False)


class _Side:
    """What one of both programs gives between two blocks, on every batch."""

    def __init__(self, parts: Sequence[Part], walk: Walk) -> None:
        self.parts, self.walk = parts, walk
        self.values: dict[fx.Node, list[torch.Tensor]] = {}

    def enter(self, index: int) -> None:
        """Compute what enters a block and is not there, and let go of what no later block reads."""
        part = self.parts[index]
        missing = [node for node in (part.source, *part.context) if node not in self.values]
        if missing:
            self.values |= self._computed(part.program, missing)
        read = {node for later in self.parts[index:] for node in (later.source, *later.context)}
        self.values = {node: values for node, values in self.values.items() if node in read}

    def _computed(self, program: Program, nodes: list[fx.Node]) -> dict[fx.Node, list[torch.Tensor]]:
        """The values of ``nodes``, from the program's inputs and from what is there."""
        present = list(self.values)
        placeholders = list(program.graph.find_nodes(op="placeholder"))
        module = subgraph(program.module, [*placeholders, *present], nodes)

        def run(index: int) -> list[torch.Tensor]:
            arguments = program.arguments(self.walk.batches[index])
            return list(module(*arguments, *(self.values[node][index] for node in present)))

        return dict(zip(nodes, _columns(self._run_batches(run)), strict=True))

    def entering(self, index: int) -> tuple[list[torch.Tensor], tuple[list[torch.Tensor], ...]]:
        """The values of a block's source and of its context."""
        part = self.parts[index]
        return self.values[part.source], tuple(self.values[node] for node in part.context)

    def advance(self, index: int, *, keep: bool) -> list[torch.Tensor]:
        """What leaves a block, for what enters; the latter is let go of on the way unless ``keep``."""
        part = self.parts[index]
        module, (values, context) = part.module(), self.entering(index)
        before = list(values) if keep else values

        def run(index: int) -> list[torch.Tensor]:
            value = before[index]
            sides = part.side_values(self.walk.batches[index])
            [result] = module(value, *(each[index] for each in context), *sides)
            release(value)
            before[index] = value.new_empty(0)
            return [result]

        [result] = _columns(self._run_batches(run))
        del self.values[part.source]
        self.values[part.output] = result
        part.release()
        return result

    def _run_batches(self, run: Callable[[int], list[torch.Tensor]]) -> list[list[torch.Tensor]]:
        """``run`` of each batch; inputs and targets of one block share the memory."""
        total_bytes, rows = 0, []
        for index in range(len(self.walk.batches)):
            with torch.no_grad():
                row = run(index)
            for place, value in enumerate(row):
                total_bytes += value.nbytes
                if total_bytes > self.walk.memory // 2:
                    row[place] = spill(value, folder=self.walk.folder)
            rows.append(row)
        return rows


def _columns(rows: Sequence[Sequence[torch.Tensor]]) -> list[list[torch.Tensor]]:
    """The values of each place, by batch."""
    return [list(column) for column in zip(*rows, strict=True)]

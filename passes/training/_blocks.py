"""The repeated blocks of a simulated Program beside those of the float model, one by one.

Both are walked once: the float blocks run on what the float blocks before them give, the quantized ones on what the
quantized blocks before them give as they are by then. Only values between two blocks are held, on disk beyond a budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

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
    if [part.output.meta.get("type") for part in mine] != [part.output.meta.get("type") for part in theirs]:
        raise BitlowerError(
            f"{name}: the program has {len(mine)} blocks, and the float model {len(theirs)} or other ones",
            hint="run passes that change the graph before `quantize`",
        )
    return list(zip(mine, theirs, strict=True))


@dataclass(frozen=True)
class BlockStep:
    """One block, and what goes in and should come out of it, a value for each batch."""

    index: int
    part: Part
    inputs: list[torch.Tensor]
    targets: list[torch.Tensor]


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
        (student, teacher), quantized = self.pairs[0], self.inputs == "quantized"
        targets = self._sources(teacher)
        inputs = self._sources(student) if quantized else targets
        for index, (student, teacher) in enumerate(self.pairs):
            targets = self._advance(teacher, targets, keep=not quantized)
            yield BlockStep(index, student, inputs, targets)
            last = index + 1 == len(self.pairs)
            inputs = targets if not quantized else inputs if last else self._advance(student, inputs, keep=False)

    def _sources(self, part: Part) -> list[torch.Tensor]:
        """What enters the first block."""
        placeholders = list(part.program.graph.find_nodes(op="placeholder"))
        module = subgraph(part.program.module, placeholders, [part.source])
        return self._run_batches(lambda index: module(*part.program.arguments(self.batches[index]))[0])

    def _advance(self, part: Part, values: list[torch.Tensor], *, keep: bool) -> list[torch.Tensor]:
        """What leaves a block, for what enters; the latter is let go of on the way unless ``keep``."""
        module, before = part.module(), list(values) if keep else values

        def run(index: int) -> torch.Tensor:
            value = before[index]
            result: torch.Tensor = module(value, *part.side_values(self.batches[index]))[0]
            release(value)
            before[index] = value.new_empty(0)
            return result

        result = self._run_batches(run)
        part.release()
        return result

    def _run_batches(self, run: Callable[[int], torch.Tensor]) -> list[torch.Tensor]:
        """``run`` of each batch; inputs and targets of one block share the memory."""
        total_bytes, values = 0, []
        for index in range(len(self.batches)):
            with torch.no_grad():
                value = run(index)
            total_bytes += value.nbytes
            values.append(spill(value, folder=self.folder) if total_bytes > self.memory // 2 else value)
        return values

"""What training takes: resident memory and operations, foreseen from the data and from what passes declare.

The formulas, with S the bytes of the float model's tensors::

    memory     = OWN_COPIES · S + the larger of: S + values of one batch, CHECKPOINT_COPIES · S
    operations = those of a forward pass a token · (STEP_RUNS · steps · tokens of a batch
                 + tokens that the teacher reads + evaluations · held-out tokens)

OWN_COPIES are the tensors that learn, their gradients, two moments of the optimizer and the best state; the S beside a
batch are the rounded weights, and CHECKPOINT_COPIES what goes into a file: tensors, moments, the best state. The values
of a batch are those of all nodes that compute, which the backward pass reads. A step is a forward pass, two for going
backward, and one for rounding and the optimizer (`python benchmarks/qat_step.py`). The teacher reads each
batch once, for what it gives is kept; how often held-out data are evaluated, passes say.

Passes that train one block after another have the copies and the values of one block, with B the bytes of its linears,
and hold three values between blocks for each token, of hidden channels each::

    memory     = (OWN_COPIES + 1) · B + values of one step in one block + the lesser of: memory, 12 · hidden · tokens
    operations = as above, with a step of `batch` sequences and its looks at the held-out share
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bitlower.ir import Batch, Program
from bitlower.ir.blocks import blocks
from bitlower.ir.dataflow import VIEWS
from bitlower.ir.operators import graph_results
from bitlower.passes import BlockSchedule
from bitlower.tools.data.batches import Data

OWN_COPIES, CHECKPOINT_COPIES = 5, 4
"""See the formulas above."""
STEP_RUNS = 4
"""See the formulas above."""
_LOGITS_AT_ONCE = 1 << 24
"""Entries of logits that training computes at a time."""


@dataclass(frozen=True)
class Lesson:
    """The data that passes train on.

    Args:
        batches: how many.
        rows: of the largest batch.
        length: of the longest sequence.
        tokens: of a batch on the mean, padding among them.
        held_out_tokens: of all held-out batches.
        bytes: of all batches.
    """

    batches: int
    rows: int
    length: int
    tokens: float
    held_out_tokens: int = 0
    bytes: int = 0

    @classmethod
    def of(cls, data: Data) -> Lesson | None:
        """Those of a run: the training data, else what it is calibrated on; None without either."""
        training, held_out = (data.training, data.held_out) if data.training else (data.calibration, data.evaluation)
        if not training:
            return None
        sizes = list(map(_size, training))
        tokens = sum(rows * length for rows, length in sizes)
        held_out_tokens = sum(rows * length for rows, length in map(_size, held_out))
        batch_bytes = sum(tensor.nbytes for batch in (*training, *held_out) for tensor in batch.values())
        rows, length = (max(numbers) for numbers in zip(*sizes, strict=True))
        return cls(len(sizes), rows, length, tokens / len(sizes), held_out_tokens, batch_bytes)

    def tokens_of(self, steps: int, evaluations: int) -> float:
        """Tokens of as many forward passes as ``steps`` and ``evaluations`` take, the teacher's among them."""
        teacher = min(steps, self.batches) * self.tokens + self.held_out_tokens
        return STEP_RUNS * steps * self.tokens + teacher + evaluations * self.held_out_tokens

    def memory(self, program: Program, placed: Program) -> int:
        """Bytes for training ``placed``, which is ``program`` with quantizers, besides the model."""
        size = program.size_bytes()
        return OWN_COPIES * size + max(size + self._values(placed), CHECKPOINT_COPIES * size) + self.bytes

    def block_tokens(self, schedule: BlockSchedule) -> float:
        """Tokens of as many forward passes of all blocks as the steps and evaluations of ``schedule`` take."""
        evaluated = schedule.held_out * self.batches * self.tokens
        return STEP_RUNS * schedule.iterations * self._step_tokens(schedule) + (1 + schedule.evaluations) * evaluated

    def block_memory(self, schedule: BlockSchedule, placed: Program, linears: int, hidden: int) -> int:
        """Bytes for training ``placed`` block by block, besides the model.

        Args:
            schedule: of the pass that does.
            placed: the program with quantizers.
            linears: the bytes of all its linear weights.
            hidden: the channels between two blocks.
        """
        count = max(1, len(blocks(placed.module)))
        values = (
            self._values(placed) * min(self._step_tokens(schedule), schedule.step_tokens) / (self.rows * self.length)
        )
        between = min(schedule.memory, 12 * hidden * self.batches * self.tokens)
        return int(((OWN_COPIES + 1) * linears + values) / count + between + self.bytes)

    def _step_tokens(self, schedule: BlockSchedule) -> float:
        return min(schedule.batch, self.batches * self.rows) * self.tokens / self.rows

    def _values(self, placed: Program) -> int:
        """Bytes of the values of a batch; of the logits of tokens no more are there than a chunk of them."""
        token_wise = {spec.name for spec in placed.outputs if spec.name == "logits" and spec.type.rank == 3}
        outputs = dict(zip(graph_results(placed.graph), (spec.name for spec in placed.outputs), strict=True))
        total = 0
        for node in placed.graph.nodes:
            kind = node.meta.get("type")
            if node.op != "call_function" or kind is None or not kind.is_float or node.target in VIEWS:
                continue
            if not any(isinstance(dim, str) for dim in kind.shape):  # of parameters alone
                continue
            count = math.prod(self._dim(dim) for dim in kind.shape)
            total += 4 * (min(count, _LOGITS_AT_ONCE) if outputs.get(node) in token_wise else count)
        return total

    def _dim(self, dim: int | str) -> int:
        if isinstance(dim, int):
            return dim
        return {"batch": self.rows, "past": 0}.get(dim, self.length)


def _size(batch: Batch) -> tuple[int, int]:
    """Rows and length of a batch."""
    tensor = next(tensor for name, tensor in batch.items() if name != "labels")
    return tensor.shape[0], tensor.shape[1] if tensor.dim() > 1 and not tensor.is_floating_point() else 1

"""What a run takes: resident memory and time, foreseen from a Program's sizes and the passes.

The formulas, with S the bytes of the float model's tensors (of those that lie in files, ``MAPPED_SHARE``)::

    peak memory = BASE_BYTES + S + S again if a pass rewrites weights + a byte for each code
                  + values of one batch + the largest of: what solvers or training hold,
                    both programs' outputs of an evaluation batch,
                    EXPORT_COPIES · S + FILE_COPIES · bytes of the model file for ONNX and libraries
    seconds     = FIXED_SECONDS + TRACE_SECONDS, unless the trace is in the cache
                  + nodes · (NODE_SECONDS + those of each export) + bytes of the float model · BYTE_SECONDS
                  + nodes with quantizers · batches that they run on · CALL_SECONDS
                  + operations of runs over data, of solvers and of checks / (matrix rate of this machine · EFFICIENCY)

What ``gptq`` and ``adaround`` hold and compute beside their runs they say themselves (``solver_bytes`` and
``solver_operations``). What training takes says :mod:`bitlower.tools.planning.training_costs`. Passes whose results are
in the cache take nothing. The constants were measured on encoders of 6 and 12 layers and a decoder of 30.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from bitlower.backends.base import Backend
from bitlower.ir import Level, Program, get_tensor
from bitlower.ir.dataflow import linears, parameter_of
from bitlower.ir.operators import LinearNode
from bitlower.ir.storage import is_mapped
from bitlower.ir.tasks import TEXT_GENERATION
from bitlower.passes import Contract, Pass, Workload, data_runs, training_evaluations, training_steps
from bitlower.tools.data.sources import HELD_OUT_TEXTS, HELD_OUT_WINDOWS, TEXTS, Amount
from bitlower.tools.planning.training_costs import Lesson

BASE_BYTES = 720_000_000
"""Measured, as the text above says."""
MAPPED_SHARE = 0.03
EXPORT_COPIES = 0.8
FILE_COPIES = 4
FIXED_SECONDS = 7.0
TRACE_SECONDS = 4.5
NODE_SECONDS = 0.0019
"""Seconds a node takes for loading and passes."""
BYTE_SECONDS = 20e-9
"""Seconds a byte of the float model: it is read, hashed, checked, kept in the cache, and compared with the runtime."""
CALL_SECONDS = 1.2e-4
"""Seconds a node takes on a batch besides its products."""
EFFICIENCY = 0.7
"""Share of the rate of large matrix products that a run of a program reaches."""
TEXT_FILL = 0.25
"""Share of the longest length that texts have on the mean."""


@dataclass(frozen=True)
class Load:
    """How much data a run reads.

    Args:
        samples: texts or windows.
        max_length: tokens of each, at most.
        batch_size: of them at a time.
        fill: tokens on the mean over ``max_length``.
        held_out: samples that the ledger and the checks run on.
    """

    samples: int
    max_length: int
    batch_size: int = 8
    fill: float = 1.0
    held_out: int = 0

    @property
    def tokens(self) -> int:
        """Of all samples together."""
        return int(self.samples * self.max_length * self.fill)

    @property
    def held_out_tokens(self) -> int:
        """Of all held-out samples together."""
        return int(self.held_out * self.max_length * self.fill)

    @property
    def batch_tokens(self) -> int:
        """Of one batch."""
        return int(self.batch_size * self.max_length * self.fill)

    @classmethod
    def of(cls, amount: Amount, program: Program) -> Load:
        """``amount`` for ``program``: windows of a decoder are full, texts are not."""
        length = amount.length(program)
        if program.task == TEXT_GENERATION:
            return cls(amount.samples or 0, length, amount.batch_size, held_out=HELD_OUT_WINDOWS)
        return cls(amount.samples or TEXTS, length, amount.batch_size, TEXT_FILL, HELD_OUT_TEXTS)


@dataclass(frozen=True)
class Costs:
    """A run of ``passes`` on ``program`` (``placed`` with quantizers), whose result is written as ``exports``.

    ``lesson`` is what passes train on; None: batches like those of ``data``. ``trace_cached`` says whether the trace of
    the model is in the cache, ``cached`` how many of the first passes are, ``file_bytes`` how large the first export's
    model file is.
    """

    program: Program
    placed: Program
    passes: Sequence[Pass]
    data: Load
    exports: Sequence[Backend]
    lesson: Lesson | None = None
    trace_cached: bool = False
    cached: int = 0
    file_bytes: int = 0

    @property
    def computed(self) -> Sequence[Pass]:
        """The passes whose results are not in the cache."""
        return self.passes[self.cached :]

    @property
    def runs(self) -> int:
        """How often passes run the program over all calibration data."""
        return sum(data_runs(pass_, self.placed) for pass_ in self.computed)

    def peak_bytes(self) -> int:
        """Of resident memory."""
        tensors = [tensor for _, tensor in self.program.tensors()]
        size = sum(t.nbytes * (MAPPED_SHARE if is_mapped(t) else 1) for t in tensors)
        full = self.program.size_bytes()
        rewritten = size if any(pass_.rewrites_weights for pass_ in self.computed) else 0
        codes = size / full * sum(map(torch.Tensor.numel, self._weights())) if self._lowers() else 0
        written = any(backend.copies_model for backend in self.exports)
        exported = EXPORT_COPIES * size + FILE_COPIES * self.file_bytes if written else 0
        most = max(self._held_bytes(), self._trained_bytes(), self._compared_bytes(), exported)
        return int(BASE_BYTES + size + rewritten + codes + self._value_bytes() + most)

    def seconds(self) -> float:
        """From start to end."""
        nodes = len(self.program.graph.nodes)
        exports = sum(backend.node_seconds for backend in self.exports)
        token = 2.0 * sum(rows * columns for rows, columns in self._shapes())
        work = token * (self.runs * self.data.tokens + self._checked_tokens() + self._trained_tokens())
        rate = _flop_rate() * EFFICIENCY
        fixed = FIXED_SECONDS + (0 if self.trace_cached else TRACE_SECONDS)
        read = self.program.size_bytes() * BYTE_SECONDS
        calls = len(self.placed.graph.nodes) * self._batches() * CALL_SECONDS
        return fixed + nodes * (NODE_SECONDS + exports) + read + calls + (work + self._solved()) / rate

    def _lowers(self) -> bool:
        return any(pass_.ensures is Level.INTEGER for pass_ in self.passes)

    def _checked_tokens(self) -> int:
        """Tokens that two programs run on: after exact passes one batch, after lossy ones and exports all held out."""
        one, all_ = self._checks()
        return 2 * (one * self.data.batch_tokens + all_ * self.data.held_out_tokens)

    def _checks(self) -> tuple[int, int]:
        """How often two programs run on one batch, and on all held-out data; a decoder's weights need no data."""
        if not any(data_runs(pass_, self.placed) for pass_ in self.passes) and self.program.task == TEXT_GENERATION:
            return 0, 0
        lossy = sum(pass_.contract is Contract.LOSSY for pass_ in self.computed)
        return sum(pass_.contract is Contract.EXACT for pass_ in self.computed), lossy + len(self.exports)

    def _batches(self) -> float:
        """Batches that programs run on."""
        one, all_ = self._checks()
        return (self.runs * self.data.samples + 2 * all_ * self.data.held_out) / self.data.batch_size + 2 * one

    @property
    def _taught(self) -> Lesson:
        """What passes train on: calibration data if nobody says."""
        batches, tokens = math.ceil(self.data.samples / self.data.batch_size), self.data.batch_tokens
        return self.lesson or Lesson(batches, self.data.batch_size, self.data.max_length, tokens)

    def _trained_tokens(self) -> float:
        lesson, tokens = self._taught, 0.0
        for pass_ in self.computed:
            if schedule := pass_.block_schedule():
                tokens += lesson.block_tokens(schedule)
            elif steps := training_steps(pass_, lesson.batches):
                tokens += lesson.tokens_of(steps, training_evaluations(pass_, lesson.batches))
        return tokens

    def _trained_bytes(self) -> int:
        lesson, peaks, linear = self._taught, [0], 4 * sum(rows * columns for rows, columns in self._shapes())
        for pass_ in self.computed:
            if schedule := pass_.block_schedule():
                peaks.append(lesson.block_memory(schedule, self.placed, linear, min(self._widths(), default=0)))
            elif training_steps(pass_, lesson.batches):
                peaks.append(lesson.memory(self.program, self.placed))
        return max(peaks)

    def _value_bytes(self) -> int:
        """Activations of one batch."""
        heads = int(self.program.config.get("num_attention_heads") or 1)
        return 4 * self.data.batch_tokens * (max(self._widths(), default=0) + self.data.max_length * heads)

    def _compared_bytes(self) -> int:
        """The outputs of two programs on one batch."""
        widths = [spec.type.shape[-1] for spec in self.program.outputs if spec.type.shape]
        return 8 * self.data.batch_tokens * max((w for w in widths if isinstance(w, int)), default=0)

    def _held_bytes(self) -> int:
        """What the passes hold besides the model, one after another."""
        return sum(pass_.solver_bytes(self._workload) for pass_ in self.computed)

    def _solved(self) -> float:
        """Floating-point operations of the passes besides their runs."""
        return sum(pass_.solver_operations(self._workload) for pass_ in self.computed)

    @property
    def _workload(self) -> Workload:
        return Workload(self.data.tokens, tuple(self._widths()), tuple(self._shapes()))

    def _widths(self) -> list[int]:
        """The widths of the activations that linears read, each activation once."""
        inputs = dict.fromkeys(LinearNode(node).x for node in linears(self.program.graph))
        return [int(node.meta["type"].shape[-1]) for node in inputs]

    def _shapes(self) -> list[tuple[int, int]]:
        return [(int(weight.shape[0]), int(weight.shape[1])) for weight in self._weights()]

    def _weights(self) -> list[torch.Tensor]:
        """The parameters of linears."""
        nodes: list[fx.Node | None] = [parameter_of(LinearNode(node).weight) for node in linears(self.program.graph)]
        tensors = [get_tensor(self.program.module, str(node.target)) for node in nodes if node is not None]
        return [tensor for tensor in tensors if tensor.dim() == 2]


def unforeseen(placed: Program, passes: Sequence[Pass], exports: Sequence[Backend]) -> Iterator[str]:
    """Why a run takes more memory and time than the formulas say, a line for each reason."""
    for pass_ in passes:
        yield from (f"{pass_.name}: {line}" for line in pass_.unforeseen(placed))
    for backend in exports:
        yield from (f"{backend.name}: {line}" for line in backend.unforeseen(placed))


def _flop_rate() -> float:
    """Floating-point operations a second of this machine, by multiplying matrices for a moment: the best of a few."""
    matrix, seconds = torch.ones(512, 512), []
    for _ in range(8):
        start = time.perf_counter()
        for _ in range(4):
            matrix @ matrix
        seconds.append(time.perf_counter() - start)
    return 4 * 2 * 512**3 / min(seconds)

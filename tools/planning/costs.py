"""What a run takes: resident memory and time, foreseen from a Program's sizes and the passes.

The formulas, with S the bytes of the float model's tensors (of those that lie in files, ``MAPPED_SHARE``)::

    peak memory = BASE_BYTES + S + S again if a pass rewrites weights + a byte for each code
                  + values of one batch + the largest of: what ``gptq``, ``adaround`` or training holds,
                    both programs' outputs of an evaluation batch,
                    EXPORT_COPIES · S + FILE_COPIES · bytes of the model file for ONNX and libraries
    seconds     = FIXED_SECONDS + TRACE_SECONDS, unless the trace is in the cache
                  + nodes · (NODE_SECONDS + those of each export) + bytes of the float model · BYTE_SECONDS
                  + nodes with quantizers · batches that they run on · CALL_SECONDS
                  + operations of runs over data, of solvers and of checks / (matrix rate of this machine · EFFICIENCY)

``gptq`` holds the activations between two layers for all calibration data, at most the memory that the pass may, and
three Hessians of the widest input; it computes a Hessian for each input of width c (2 c² a token), its factor (2 c³)
and error feedback (2 c² a row). ``adaround`` holds the activations of two walks, the float weights of linears, and
LAYER_COPIES of the largest layer with the tokens that it is learned on; it computes, for each step and weight, 4
operations for each token of the step (products forward and backward) and STEP_WORK (what is done weight by weight, in
the time of so many operations). What training takes says :mod:`bitlower.tools.planning.training_costs`. The constants
were measured on encoders of 6 and 12 layers and a decoder of 30.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from bitlower.ir import Granularity, Program, get_tensor
from bitlower.ir.dataflow import activation_operand, linears, parameter_of, weight_operand
from bitlower.ir.scheme import ACTIVATION_ROLES
from bitlower.ir.storage import is_mapped
from bitlower.ir.tasks import TEXT_GENERATION
from bitlower.passes import Contract, Pass
from bitlower.passes._machinery.declared import data_runs, training_steps
from bitlower.passes.lowering.legalize import Legalize
from bitlower.passes.rounding.adaround import Adaround
from bitlower.passes.rounding.gptq import Gptq
from bitlower.passes.training._block_training import BlockTraining
from bitlower.tools.data.sources import HELD_OUT_TEXTS, HELD_OUT_WINDOWS, TEXTS, Amount
from bitlower.tools.planning.training_costs import Lesson

BASE_BYTES = 720_000_000
MAPPED_SHARE = 0.03
EXPORT_COPIES = 0.8
FILE_COPIES = 4
LAYER_COPIES = 14
FIXED_SECONDS = 7.0
TRACE_SECONDS = 4.5
NODE_SECONDS = 0.0019
EXPORT_SECONDS = {"checkpoint": 0.001}
"""Seconds a node for loading and passes, and for each export; of other backends ``NODE_SECONDS``."""
BYTE_SECONDS = 20e-9
"""Seconds a byte of the float model: it is read, hashed, checked, kept in the cache, and compared with the runtime."""
CALL_SECONDS = 1.2e-4
"""Seconds a node takes on a batch besides its products."""
EFFICIENCY = 0.7
"""Share of the rate of large matrix products that a run of a program reaches."""
STEP_WORK = 1600.0
TEXT_FILL = 0.25
"""Share of the longest length that texts have on the mean."""
_REWRITING = ("adaround", "autoround", "gptq", "lkd", "peg-permute", "rotate", "smooth")
"""Passes that give weights other values, while the program before lives on."""


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


Exports = Sequence[tuple[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Costs:
    """A run of ``passes`` on ``program`` (``placed`` with quantizers), whose result is written as ``exports``.

    ``lesson`` is what passes train on; None: batches like those of ``data``. ``kept`` says whether the trace of the
    model is in the cache, ``file_bytes`` how large the first export's model file is.
    """

    program: Program
    placed: Program
    passes: Sequence[Pass]
    data: Load
    exports: Exports
    lesson: Lesson | None = None
    kept: bool = False
    file_bytes: int = 0

    @property
    def runs(self) -> int:
        """How often passes run the program over all calibration data."""
        return sum(data_runs(pass_, self.placed) for pass_ in self.passes)

    def peak_bytes(self) -> int:
        """Of resident memory."""
        tensors = [tensor for _, tensor in self.program.tensors()]
        size = sum(t.nbytes * (MAPPED_SHARE if is_mapped(t) else 1) for t in tensors)
        full = self.program.size_bytes()
        rewritten = size if any(pass_.name in _REWRITING for pass_ in self.passes) else 0
        codes = size / full * sum(map(torch.Tensor.numel, self._weights())) if self._lowers() else 0
        written = any(name not in EXPORT_SECONDS for name, _ in self.exports)
        exported = EXPORT_COPIES * size + FILE_COPIES * self.file_bytes if written else 0
        most = max(self._solver_bytes(), self._trained_bytes(), self._compared_bytes(), exported)
        return int(BASE_BYTES + size + rewritten + codes + self._value_bytes() + most)

    def seconds(self) -> float:
        """From start to end."""
        nodes = len(self.program.graph.nodes)
        exports = sum(EXPORT_SECONDS.get(name, NODE_SECONDS) for name, _ in self.exports)
        token = 2.0 * sum(rows * columns for rows, columns in self._shapes())
        work = token * (self.runs * self.data.tokens + self._checked_tokens() + self._trained_tokens())
        rate = _flop_rate() * EFFICIENCY
        fixed = FIXED_SECONDS + (0 if self.kept else TRACE_SECONDS)
        read = self.program.size_bytes() * BYTE_SECONDS
        calls = len(self.placed.graph.nodes) * self._batches() * CALL_SECONDS
        return fixed + nodes * (NODE_SECONDS + exports) + read + calls + (work + self._solver_work()) / rate

    def _lowers(self) -> bool:
        return any(pass_.name == "lower-integer" for pass_ in self.passes)

    def _checked_tokens(self) -> int:
        """Tokens that two programs run on: after exact passes one batch, after lossy ones and exports all held out."""
        one, all_ = self._checks()
        return 2 * (one * self.data.batch_tokens + all_ * self.data.held_out_tokens)

    def _checks(self) -> tuple[int, int]:
        """How often two programs run on one batch, and on all held-out data; a decoder's weights need no data."""
        if not self.runs and self.program.task == TEXT_GENERATION:
            return 0, 0
        lossy = sum(pass_.contract is Contract.LOSSY for pass_ in self.passes)
        return sum(pass_.contract is Contract.EXACT for pass_ in self.passes), lossy + len(self.exports)

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
        lesson, found = self._taught, 0.0
        for pass_ in self.passes:
            if isinstance(pass_, BlockTraining):
                found += lesson.block_tokens(pass_)
            elif steps := training_steps(pass_, lesson.batches):
                found += lesson.tokens_of(steps)
        return found

    def _trained_bytes(self) -> int:
        lesson, found, linear = self._taught, [0], 4 * sum(rows * columns for rows, columns in self._shapes())
        for pass_ in self.passes:
            if isinstance(pass_, BlockTraining):
                found.append(lesson.block_memory(pass_, self.placed, linear, min(self._widths(), default=0)))
            elif training_steps(pass_, lesson.batches):
                found.append(lesson.memory(self.program, self.placed))
        return max(found)

    def _value_bytes(self) -> int:
        """Activations of one batch."""
        heads = int(self.program.config.get("num_attention_heads") or 1)
        return 4 * self.data.batch_tokens * (max(self._widths(), default=0) + self.data.max_length * heads)

    def _compared_bytes(self) -> int:
        """The outputs of two programs on one batch."""
        widths = [spec.type.shape[-1] for spec in self.program.outputs if spec.type.shape]
        return 8 * self.data.batch_tokens * max((w for w in widths if isinstance(w, int)), default=0)

    def _solver_bytes(self) -> int:
        """What ``gptq`` or ``adaround`` holds besides the model; 0 without them."""
        widths, shapes, found = self._widths(), self._shapes(), 0
        for pass_ in self.passes if widths else ():
            if isinstance(pass_, Gptq | Adaround):
                walks = 1 if isinstance(pass_, Gptq) else 2
                found += min(pass_.memory, walks * self.data.tokens * (max(widths) + 2 * min(widths)) * 4)
            if isinstance(pass_, Gptq):
                found += 3 * max(widths) ** 2 * 4
            if isinstance(pass_, Adaround):
                tokens = min(pass_.tokens, self.data.tokens)
                layer = max(LAYER_COPIES * r * c + 3 * tokens * (r + c) for r, c in shapes)
                found += 4 * (sum(r * c for r, c in shapes) + layer)
        return int(found)

    def _solver_work(self) -> float:
        """Floating-point operations of ``gptq`` and ``adaround`` besides their runs."""
        work, shapes = 0.0, self._shapes()
        for pass_ in self.passes:
            if isinstance(pass_, Gptq):
                work += sum(2.0 * width**2 * (self.data.tokens + width) for width in self._widths())
                work += sum(2.0 * rows * columns**2 for rows, columns in shapes)
            if isinstance(pass_, Adaround):
                steps = pass_.iterations * (4.0 * pass_.batch + STEP_WORK)
                work += steps * sum(rows * columns for rows, columns in shapes)
        return work

    def _widths(self) -> list[int]:
        """The widths of the activations that linears read, each activation once."""
        inputs = dict.fromkeys(activation_operand(node) for node in linears(self.program.graph))
        return [int(node.meta["type"].shape[-1]) for node in inputs]

    def _shapes(self) -> list[tuple[int, int]]:
        return [(int(weight.shape[0]), int(weight.shape[1])) for weight in self._weights()]

    def _weights(self) -> list[torch.Tensor]:
        """The parameters of linears."""
        nodes: list[fx.Node | None] = [parameter_of(weight_operand(node)) for node in linears(self.program.graph)]
        found = [get_tensor(self.program.module, str(node.target)) for node in nodes if node is not None]
        return [tensor for tensor in found if tensor.dim() == 2]


def unforeseen(placed: Program, passes: Sequence[Pass], exports: Exports) -> Iterator[str]:
    """Why a run takes more memory and time than the formulas say, a line for each reason.

    Both are of ONNX exports: how many slices ``legalize`` makes depends on data, and the check of a decoder reads every
    rounded value of whole windows.
    """
    if not any(name == "onnx-qdq" for name, _ in exports):
        return
    rounded = {node: q.spec.granularity for node, q in placed.quantizers() if q.role in ACTIVATION_ROLES}
    cut = [_most_slices(rounded.get(activation_operand(node))) for node in linears(placed.graph)]
    if any(isinstance(pass_, Legalize) for pass_ in passes) and sum(cut) > len(cut):
        yield (
            f"legalize makes up to {sum(cut):,} products of {len(cut):,}, each a node to trace, to write and to check;"
            " memory and time are as without it"
        )
    if placed.task == TEXT_GENERATION and any(not granularity.dynamic for granularity in rounded.values()):
        yield "every rounded value of a decoder's windows is checked against the runtime's; that is not foreseen"


def _most_slices(granularity: Granularity | None) -> int:
    return granularity.size if granularity and granularity.kind in ("embedding-group", "embedding-parts") else 1


def _flop_rate() -> float:
    """Floating-point operations a second of this machine, by multiplying matrices for a moment: the best of a few."""
    matrix, seconds = torch.ones(512, 512), []
    for _ in range(8):
        start = time.perf_counter()
        for _ in range(4):
            matrix @ matrix
        seconds.append(time.perf_counter() - start)
    return 4 * 2 * 512**3 / min(seconds)

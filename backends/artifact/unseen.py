"""A batch of sizes that neither tracing nor the batches at hand have had: what was baked in by them shows there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from bitlower.backends.artifact.selftest import Run, SelfTest, run_selftest, with_drawn
from bitlower.backends.decoding import cached_steps
from bitlower.ir import Batch, BitlowerError, CheckError, Program
from bitlower.ir.batch_sizes import (
    keep_ends,
    small_batch,
    symbolic_sizes,
    wanted_size,
    with_small_outputs,
)
from bitlower.ir.tokens import BATCH, MASK, PICTURES, SAMPLES, is_past

_ROWS = (3, 4, 5, 7)
_LENGTHS = (7, 5, 9, 11, 13, 15, 17, 19, 23, 29)
"""Sizes to choose from, for numbers of rows and for others; no graph is traced with one of them."""
_SOUNDS = (5_003, 7_001, 9_011)
"""The same of samples of sound, of which convolutions make a frame of some hundred."""
NEW = "which tracing and calibration did not have"


@dataclass(frozen=True)
class Unseen:
    """What was run at sizes that neither tracing nor calibration had.

    Args:
        sizes: in words, ``batch 3, sequence 7``; or ``none: …`` and why there are no others.
        selftest: inputs of these sizes, and what came out; None where nothing was run.
    """

    sizes: str
    selftest: SelfTest | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"sizes": self.sizes, "selftest": self.selftest and self.selftest.to_dict()}

    def check(self, run: Run) -> dict[str, float]:
        """Run the self-test; the cosine of each output to the recorded one, nothing where there is no self-test.

        Raises:
            CheckError: see :func:`~bitlower.backends.artifact.selftest.run_selftest`; the sizes are named.
        """
        if self.selftest is None:
            return {}
        with at(self.sizes):
            return run_selftest(self.selftest, run)


class Seen:
    """The sizes that a Program's symbolic dimensions have had, and a batch of others.

    Args:
        program: what the batches are for.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._sizes: dict[str, set[int]] = defaultdict(set)
        self._last: Batch = {}

    def add(self, batch: Batch) -> None:
        """Note the sizes of a batch."""
        self._last = batch
        for name, size in symbolic_sizes(self._program, self._program.complete(batch)).items():
            self._sizes[name].add(size)

    def other(self) -> Batch | None:
        """Rows and tokens of the last batch, cut or repeated; each symbolic dimension has a size that is new.

        Sizes that the Program does not take are left out. None if no dimension can have a new one.
        """
        wanted: dict[str, int] = {}
        for name in self._sizes:
            for size in _SOUNDS if name == SAMPLES else _ROWS if name in (BATCH, PICTURES) else _LENGTHS:
                if size not in self._sizes[name] and self._takes({**wanted, name: size}, name):
                    wanted[name] = size
                    break
        return with_drawn(self._program.fitted(self._resized(wanted))) if wanted else None

    def describe(self, batch: Batch | None) -> str:
        """The sizes of the symbolic dimensions of a batch that :meth:`other` gave, in words."""
        if batch is None:
            names = ", ".join(sorted(self._sizes))
            return f"none: no other size of {names} is taken" if names else "none: all sizes are fixed"
        sizes = sorted(symbolic_sizes(self._program, batch).items())
        return ", ".join(f"{name} {size}{' as before' * (size in self._sizes[name])}" for name, size in sizes)

    def _takes(self, wanted: Mapping[str, int], name: str) -> bool:
        """Whether the Program takes these sizes, and pads ``name`` to none that was seen."""
        try:
            batch = self._program.complete(self._resized(wanted))
        except BitlowerError:
            return False
        return symbolic_sizes(self._program, batch).get(name) not in self._sizes[name]

    def _resized(self, wanted: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """The last batch in other sizes, of texts that are padded on the left the ends; a past is left out: empty."""
        batch, ends = {}, _pads_before(self._last)
        for spec in self._program.inputs:
            if is_past(spec) or spec.name not in self._last:
                continue
            tensor = self._last[spec.name]
            for axis, dim in enumerate(spec.type.shape):
                size = wanted_size(dim, wanted)
                if size is not None and tensor.shape[axis]:
                    first = tensor.shape[axis] - size if ends and axis else 0
                    tensor = tensor.index_select(axis, torch.arange(first, first + size) % tensor.shape[axis])
            batch[spec.name] = tensor
        keep_ends(self._program, batch, self._last)
        return batch


@contextmanager
def at(sizes: str) -> Iterator[None]:
    """Name ``sizes`` in what fails meanwhile.

    Raises:
        CheckError: a check failed, or the Program itself did.
    """
    try:
        yield
    except CheckError as error:
        raise CheckError(f"at {sizes}, {NEW}: {error.message}", hint=error.hint) from error
    except (RuntimeError, IndexError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckError(f"the program itself fails at {sizes}, {NEW}: {reason}") from error


def with_small_batch(
    program: Program, batches: Iterable[Batch], outputs: Callable[[Batch], Mapping[str, torch.Tensor]] | None = None
) -> Iterator[Batch]:
    """A part of the first batch, on which the self-test will run; that in steps; and then all, as far as outputs fit.

    Those whose outputs are too large are cut: :func:`~bitlower.ir.batch_sizes.with_small_outputs`.

    Args:
        program: what the batches are for.
        batches: inputs by name.
        outputs: returns the Program's outputs on a batch, for who has them already; None: it is run.
    """
    for count, batch in enumerate(batches):
        if count == 0:
            small = with_drawn(small_batch(program, batch))
            yield small
            yield from cached_steps(program, small, outputs)
        yield with_small_outputs(program, batch)


def _pads_before(batch: Batch) -> bool:
    """Whether more texts begin with padding than end with it."""
    mask = batch.get(MASK)
    return mask is not None and mask.dim() == 2 and bool(mask[:, 0].bool().sum() < mask[:, -1].bool().sum())

"""An encoder-decoder as it is deployed: its stages, batches for each, and both together against the whole Program.

Each stage is compared as any model is. The self-test is one of both: the decoder reads what the encoder gives, so that
no keys and values need be written down; features of sound, which are as many, are drawn from a seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from bitlower.backends.artifact.outputs import OutputComparison
from bitlower.backends.artifact.selftest import Run, SelfTest, make_selftest, with_drawn
from bitlower.backends.artifact.unseen import Seen, Unseen, at
from bitlower.ir import Batch, CheckError, Program
from bitlower.ir.batch_sizes import small_batch
from bitlower.ir.observe import run
from bitlower.ir.stages import (
    DECODER,
    ENCODER,
    decoder_batch,
    encoder_batch,
    is_encoder_decoder,
    split_at_states,
    split_stages,
)
from bitlower.ir.tokens import TARGET_MASK

WHOLE = ""
"""The name of the stage that a model in one piece is."""


def parts_of(program: Program, *, states: bool = False, at_states: bool = False) -> dict[str, Program]:
    """What an artifact of ``program`` is made of, by stage: itself as :data:`WHOLE`, or the encoder and the decoder.

    Args:
        program: what is exported.
        states: whether an encoder also returns what cross-attention reads.
        at_states: whether that is all that an encoder returns, and the decoder computes keys and values from it.

    Raises:
        BitlowerError: it is an encoder-decoder that cannot be cut in two.
    """
    if not is_encoder_decoder(program):
        return {WHOLE: program}
    return split_at_states(program) if at_states else split_stages(program, states=states)


def part_batches(parts: Mapping[str, Program], batches: Iterable[Batch]) -> dict[str, Iterator[Batch]]:
    """The batches of each part, by its stage; the decoder reads what the encoder's Program gives."""
    whole = list(batches)
    if ENCODER not in parts:
        return dict.fromkeys(parts, iter(whole))
    encoder = parts[ENCODER]
    return {
        ENCODER: (encoder_batch(batch) for batch in whole),
        DECODER: (decoder_batch(batch, run(encoder, encoder_batch(batch))) for batch in whole),
    }


def compare_together(program: Program, runtime: Run, batch: Batch, least: float) -> tuple[SelfTest, Unseen]:
    """Compare both stages, run one after the other, with the whole: on a small batch and at sizes that it has not.

    Args:
        program: the whole.
        runtime: what runs both stages, on a batch of the whole.
        batch: of the whole, a real one.
        least: cosine of each output with the program's.

    Raises:
        CheckError: both together do not compute what the program does.
    """
    small = with_drawn(small_batch(program, batch))
    seen = Seen(program)
    seen.add(small)
    other = seen.other()
    sizes = seen.describe(other)
    selftest = _selftest(program, runtime, small, least)
    if other is None:
        return selftest, Unseen(sizes)
    with at(sizes):
        return selftest, Unseen(sizes, _selftest(program, runtime, program.complete(other), least))


def _selftest(program: Program, runtime: Run, batch: Batch, least: float) -> SelfTest:
    whole = {**batch, TARGET_MASK: torch.ones_like(batch[TARGET_MASK])}
    outputs = runtime(whole)
    comparison = OutputComparison(program)
    comparison.add(run(program, whole), outputs)
    for row in comparison.rows():
        if not row.cosine >= least:
            raise CheckError(
                f"the encoder and the decoder together return {row.name} with the cosine {row.cosine:.6g} to the"
                " program's"
            )
    return make_selftest({name: value for name, value in batch.items() if name != TARGET_MASK}, outputs)

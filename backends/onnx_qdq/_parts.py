"""What an artifact is made of: one model, or the two stages of an encoder-decoder, each a file with a Program."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from bitlower.backends.onnx_qdq._folder import model_file
from bitlower.ir import Batch, Program
from bitlower.ir.observe import run
from bitlower.ir.stages import DECODER, ENCODER, decoder_batch, encoder_batch, is_encoder_decoder, split_stages


@dataclass(frozen=True)
class Part:
    """One file of an artifact.

    Args:
        stage: of an encoder-decoder; empty for a model in one piece.
        program: what the file computes.
    """

    stage: str
    program: Program

    @property
    def file(self) -> str:
        """Its name in the folder."""
        return model_file(self.stage)


def parts_of(program: Program) -> tuple[Part, ...]:
    """The parts of ``program``, in the order in which they run.

    Raises:
        BitlowerError: it is an encoder-decoder that cannot be cut in two.
    """
    if not is_encoder_decoder(program):
        return (Part("", program),)
    return tuple(Part(stage, part) for stage, part in split_stages(program).items())


def part_batches(parts: Iterable[Part], batches: Iterable[Batch]) -> dict[str, Iterator[Batch]]:
    """The batches of each part, by its stage; the decoder reads what the encoder's Program gives."""
    programs, given = {part.stage: part.program for part in parts}, list(batches)
    if ENCODER not in programs:
        return dict.fromkeys(programs, iter(given))
    encoder = programs[ENCODER]
    return {
        ENCODER: (encoder_batch(batch) for batch in given),
        DECODER: (decoder_batch(batch, run(encoder, encoder_batch(batch))) for batch in given),
    }

"""What models of connectionist temporal classification hear (wav2vec 2.0, HuBERT), decoded greedily."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bitlower.frontends.waveforms import own_frames, spoken, waveform_batches
from bitlower.ir import BitlowerError
from bitlower.ir.tasks import CTC
from bitlower.ir.tokens import MASK
from bitlower.tools.evaluation.runners import Runner, Track


def heard(runner: Runner, paths: Sequence[Path], *, batch_size: int, track: Track) -> Iterator[str]:
    """What is said in each file, greedily decoded.

    Files run one by one through a model without a mask, whose norms would hear the silence behind a shorter one.

    Args:
        runner: of a model for this task.
        paths: sound files.
        batch_size: of them in a batch.
        track: wraps the batches with a progress display.

    Raises:
        BitlowerError: the model is for another task, or a file is missing or no sound.
    """
    program = runner.program
    if program.task != CTC:
        raise BitlowerError(
            f"{program.source or 'the model'} hears sounds and writes nothing", hint="audio-classification measures it"
        )
    size = batch_size if MASK in (spec.name for spec in program.inputs) else 1
    for first in track(range(0, len(paths), size), "evaluating"):
        [batch] = waveform_batches(program, paths[first : first + size], batch_size=size)
        best = torch.from_numpy(runner.run(batch)["logits"].argmax(-1))
        for row, count in zip(best, own_frames(program, batch), strict=True):
            yield spoken(program, row[:count]).strip()

"""The verification of an encoder-decoder: each stage against its Program, then both together as they are deployed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from bitlower.backends.artifact.outputs import Array
from bitlower.backends.artifact.stages import compare_together
from bitlower.backends.onnx_qdq.runtime.session import Session
from bitlower.backends.onnx_qdq.verify.compare import OUTPUT_COSINE
from bitlower.backends.onnx_qdq.verify.record import Figures, Verification
from bitlower.backends.onnx_qdq.verify.runtime_kernels import joined
from bitlower.backends.onnx_qdq.write.files import files_in
from bitlower.ir import Batch, Program
from bitlower.ir.stages import DECODER, ENCODER, crossing, decoder_batch, encoder_batch, enters_cross
from bitlower.ir.tokens import TOKENS


def join_stages(
    program: Program, folder: Path, stages: Mapping[str, Figures], batch: Batch, config: Mapping[str, str]
) -> Verification:
    """The verification of the whole from the figures of its stages.

    Args:
        program: the whole.
        folder: the artifact's.
        stages: by name.
        batch: of the whole, a real one.
        config: session configuration entries.

    Raises:
        CheckError: both together do not compute what the program does.
    """
    files = files_in(folder)
    together = StageSessions(*(Session(folder / files[stage], config=config) for stage in (ENCODER, DECODER)))
    selftest, unseen = compare_together(program, together.run, batch, OUTPUT_COSINE)
    parts = list(stages.values())
    constants = sum((Counter(dict(part.constants)) for part in parts), Counter[str]())
    figures = replace(
        parts[-1],
        outputs=tuple(row for part in parts for row in part.outputs),
        quantized=tuple(row for part in parts for row in part.quantized),
        constants=dict(constants),
        exposing=max(part.exposing for part in parts),
        kernels=joined([part.kernels for part in parts]),
    )
    return Verification(**vars(figures), selftest=selftest, unseen=unseen)


class StageSessions:
    """An encoder and a decoder, run one after the other on a batch of the whole."""

    def __init__(self, encoder: Session, decoder: Session) -> None:
        self._encoder, self._decoder = encoder, decoder

    def run(self, batch: Batch) -> dict[str, Array]:
        """All outputs of the whole.

        Raises:
            CheckError: an input is missing, or a kernel fails.
        """
        cross = self._encoder.run(encoder_batch(batch))
        known = {name: torch.from_numpy(value) for name, value in cross.items()}
        feed = decoder_batch(batch, known)
        for name, (_, *sizes) in self._decoder.shapes.items():
            if enters_cross(name) and name not in feed:  # none of them is computed yet
                fixed = (size if isinstance(size, int) else 0 for size in sizes)
                feed[name] = torch.zeros(len(feed[TOKENS]), *fixed)
        return self._decoder.run(feed) | crossing(cross)

"""The verification of an encoder-decoder: each stage against its Program, then both together as they are deployed.

Each stage is compared as any model is. The self-test is one of both: the decoder reads what the encoder gives, so that
no keys and values need be written down; features of sound, which are as many, are drawn from a seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from bitlower.backends._outputs import Array, OutputComparison
from bitlower.backends._selftest import SelfTest, drawn, make_selftest
from bitlower.backends._unseen import Seen, Unseen
from bitlower.backends.onnx_qdq._folder import model_file
from bitlower.backends.onnx_qdq._kernels import joined
from bitlower.backends.onnx_qdq._session import Session
from bitlower.backends.onnx_qdq._verification import Verification
from bitlower.backends.onnx_qdq._verify import OUTPUT_COSINE
from bitlower.ir import Batch, CheckError, Program
from bitlower.ir.batch_sizes import small_batch
from bitlower.ir.observe import run
from bitlower.ir.stages import DECODER, ENCODER, decoder_batch, encoder_batch
from bitlower.ir.tokens import TARGET_MASK

_SEED = 1
_WRITTEN = 4096
"""Entries of an input of floats up to which it is written down in a self-test."""


def join_stages(
    program: Program, folder: Path, stages: Mapping[str, Verification], batch: Batch, config: Mapping[str, str]
) -> Verification:
    """One verification of the whole from those of its stages.

    Args:
        program: the whole.
        folder: the artifact's.
        stages: by name.
        batch: of the whole, a real one.
        config: session configuration entries.

    Raises:
        CheckError: both together do not compute what the program does.
    """
    together = StageSessions(*(Session(folder / model_file(stage), config=config) for stage in (ENCODER, DECODER)))
    small, seeds = _with_drawn_features(small_batch(program, batch))
    seen = Seen(program)
    seen.add(small)
    other = seen.other()
    sizes = seen.describe(other)
    selftest = _selftest(program, together, small, seeds)
    unseen = Unseen(sizes)
    if other is not None:
        unseen = Unseen(sizes, _selftest(program, together, *_with_drawn_features(program.complete(other))))
    parts = list(stages.values())
    constants = sum((Counter(dict(part.constants)) for part in parts), Counter[str]())
    return replace(
        parts[-1],
        outputs=tuple(row for part in parts for row in part.outputs),
        quantized=tuple(row for part in parts for row in part.quantized),
        constants=dict(constants),
        exposing=max(part.exposing for part in parts),
        kernels=joined([part.kernels for part in parts]),
        selftest=selftest,
        unseen=unseen,
    )


class StageSessions:
    """An encoder and a decoder, run one after the other on a batch of the whole."""

    def __init__(self, encoder: Session, decoder: Session) -> None:
        self._encoder, self._decoder = encoder, decoder

    def run(self, batch: Batch) -> dict[str, Array]:
        """All outputs.

        Raises:
            CheckError: an input is missing, or a kernel fails.
        """
        cross = self._encoder.run(encoder_batch(batch))
        known = {name: torch.from_numpy(value) for name, value in cross.items()}
        return self._decoder.run(decoder_batch(batch, known)) | cross


def _with_drawn_features(batch: Batch) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """``batch`` with inputs of very many floats drawn anew, and the seeds of these."""
    large = [name for name, value in batch.items() if value.is_floating_point() and value.numel() > _WRITTEN]
    seeds = dict.fromkeys(large, _SEED)
    return {**batch, **{name: drawn(batch[name].shape, _SEED) for name in large}}, seeds


def _selftest(program: Program, together: StageSessions, batch: Batch, seeds: Mapping[str, int]) -> SelfTest:
    whole = {**batch, TARGET_MASK: torch.ones_like(batch[TARGET_MASK])}
    outputs = together.run(whole)
    comparison = OutputComparison(program)
    comparison.add(run(program, whole), outputs)
    for row in comparison.rows():
        if not row.cosine >= OUTPUT_COSINE:
            raise CheckError(
                f"the encoder and the decoder together return {row.name} with the cosine {row.cosine:.6g} to the"
                " program's"
            )
    return make_selftest({name: value for name, value in batch.items() if name != TARGET_MASK}, outputs, seeds)

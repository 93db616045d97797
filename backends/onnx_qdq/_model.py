"""An ONNX artifact in onnxruntime, ready to run."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bitlower.backends import _manifest
from bitlower.backends._folder import shell
from bitlower.backends.onnx_qdq._folder import MODEL, model_file, stages_in
from bitlower.ir import Batch, BitlowerError, Program, TensorType, ValueSpec
from bitlower.ir.generation import greedy_target, stop_tokens, target_prompt
from bitlower.ir.stages import DECODER, ENCODER, decoder_batch, encoder_batch, whole_inputs

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, NodeArg


@dataclass(frozen=True)
class OnnxModel:
    """A session, and a program without graphs that says what it takes and returns."""

    session: InferenceSession
    program: Program

    @classmethod
    def open(cls, folder: Path) -> OnnxModel:
        """The model in ``folder``, computed as it is written: no accuracy is given up for speed.

        Raises:
            BitlowerError: onnxruntime cannot load it, or there is no configuration.
        """
        session = _session(folder / MODEL)
        return cls(session, _shell(folder, _specs(session.get_inputs()), _specs(session.get_outputs())))

    @property
    def inputs(self) -> tuple[ValueSpec, ...]:
        """What it takes."""
        return self.program.inputs

    @property
    def outputs(self) -> tuple[ValueSpec, ...]:
        """What it returns."""
        return self.program.outputs

    def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run it: inputs by name, outputs by name; a past that is left out is empty.

        Raises:
            BitlowerError: an input is missing or unknown.
        """
        return _run(self.session, self.program, inputs)


@dataclass(frozen=True)
class OnnxEncoderDecoder:
    """The sessions of an encoder and a decoder, and programs without graphs that say what they take.

    Args:
        encoder: reads the source.
        decoder: writes the target.
        program: what both together take and return.
        stages: the same of each alone.
    """

    encoder: InferenceSession
    decoder: InferenceSession
    program: Program
    stages: tuple[Program, Program]

    @classmethod
    def open(cls, folder: Path) -> OnnxEncoderDecoder:
        """The model in ``folder``, as :meth:`OnnxModel.open`.

        Raises:
            BitlowerError: onnxruntime cannot load it, or there is no configuration.
        """
        sessions = [_session(folder / model_file(stage)) for stage in (ENCODER, DECODER)]
        encoder, decoder = sessions
        first, second = (_shell(folder, _specs(s.get_inputs()), _specs(s.get_outputs())) for s in sessions)
        inputs, outputs = whole_inputs(first.inputs, second.inputs), (*second.outputs, *first.outputs)
        return cls(encoder, decoder, _shell(folder, inputs, outputs), (first, second))

    @property
    def inputs(self) -> tuple[ValueSpec, ...]:
        """What it takes: the source, the tokens of the target, and the past of the decoder."""
        return self.program.inputs

    @property
    def outputs(self) -> tuple[ValueSpec, ...]:
        """What it returns."""
        return self.program.outputs

    def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run both: inputs by name, outputs by name; a past that is left out is empty.

        Raises:
            BitlowerError: an input is missing or unknown.
        """
        batch = self.program.complete(inputs)
        cross = self.encode(**encoder_batch(batch))
        return self.decode(**decoder_batch(batch, cross)) | cross

    def encode(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The keys and values of cross-attention, from the source.

        Raises:
            BitlowerError: an input is missing or unknown.
        """
        return _run(self.encoder, self.stages[0], inputs)

    def decode(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The logits and the decoder's own keys and values; names are those of the decoder's file.

        A past that is left out is empty.

        Raises:
            BitlowerError: an input is missing or unknown.
        """
        return _run(self.decoder, self.stages[1], inputs)

    def generate(
        self,
        *,
        max_new_tokens: int = 64,
        start: torch.Tensor | None = None,
        stops: Collection[int] | None = None,
        pad: int | None = None,
        **source: torch.Tensor,
    ) -> torch.Tensor:
        """The most likely target of each source, token by token: ``[batch, start + new]`` int64.

        Args:
            max_new_tokens: at most so many follow the start, and no more than the model takes.
            start: what every target begins with, ``[batch, n]``; the model's ``decoder_start_token_id`` if left out.
            stops: tokens that end a target; the model's ``eos_token_id`` if left out.
            pad: what follows the end; the model's ``pad_token_id`` if left out.
            source: what the encoder reads, by name.

        Raises:
            BitlowerError: the model names no token that targets begin with, and none is given.
        """
        rows = len(self.stages[0].arguments(source)[0])
        if start is None:
            start = torch.tensor([target_prompt(self.program)] * rows, dtype=torch.int64)
        room = (self.program.context_length or max_new_tokens + start.shape[1]) - start.shape[1] + 1
        return greedy_target(
            lambda batch: self.encode(**batch),
            lambda batch: self.decode(**batch),
            source,
            start,
            stops=stop_tokens(self.program) if stops is None else stops,
            new_tokens=min(max_new_tokens, room),
            pad=pad if pad is not None else self.program.config.get("pad_token_id") or 0,
        )


def open_model(folder: Path) -> OnnxModel | OnnxEncoderDecoder:
    """The model in ``folder``, whichever of both it is.

    Raises:
        BitlowerError: onnxruntime cannot load it, or there is no configuration.
    """
    return OnnxModel.open(folder) if stages_in(folder) == ("",) else OnnxEncoderDecoder.open(folder)


def _session(path: Path) -> InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    try:
        return onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises many kinds
        raise BitlowerError(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from None


def _shell(folder: Path, inputs: tuple[ValueSpec, ...], outputs: tuple[ValueSpec, ...]) -> Program:
    program = shell(folder)
    program.inputs, program.outputs = inputs, outputs
    program.context_length, program.lengths = _manifest.context_length(folder), _manifest.lengths(folder)
    return program


def _run(session: InferenceSession, program: Program, inputs: Batch) -> dict[str, torch.Tensor]:
    """The outputs on ``inputs``, which are those that ``program`` takes."""
    names = [value.name for value in session.get_outputs()]
    values = zip((spec.name for spec in program.inputs), program.arguments(inputs), strict=True)
    found = session.run(names, {name: value.numpy() for name, value in values})
    return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}


def _specs(values: Iterable[NodeArg]) -> tuple[ValueSpec, ...]:
    return tuple(map(_value_spec, values))


def _value_spec(value: NodeArg) -> ValueSpec:
    """An input or output of an ONNX model; of the types only whole numbers and float32 matter here."""
    dtype = torch.int64 if value.type == "tensor(int64)" else torch.float32
    return ValueSpec(value.name, TensorType(dtype, tuple(size if size is not None else "" for size in value.shape)))

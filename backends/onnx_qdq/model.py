"""An ONNX artifact in onnxruntime, ready to run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bitlower.backends.artifact import manifest as artifact_manifest
from bitlower.backends.artifact.folder import shell
from bitlower.backends.onnx_qdq.write.files import MODEL, files_in
from bitlower.backends.onnx_qdq.write.optimum import OPTIMUM_BATCH
from bitlower.backends.running import GraphModel, StagedModel
from bitlower.ir import Batch, BitlowerError, Program, TensorType, ValueSpec
from bitlower.ir.stages import DECODER, ENCODER, is_cross, whole_inputs
from bitlower.ir.tokens import BATCH

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, NodeArg

ONNXRUNTIME = "onnxruntime"


@dataclass(frozen=True)
class OnnxModel(GraphModel):
    """A session, and a program without graphs that says what it takes and returns."""

    runtime = ONNXRUNTIME
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

    def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run it: inputs by name, outputs by name; a past that is left out is empty.

        Raises:
            BitlowerError: an input is missing or unknown.
        """
        return _run(self.session, self.program, inputs)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The same with outputs as ``OrtValue``, which may be inputs of the next run: a cache is not copied.

        Raises:
            BitlowerError: an input is missing or unknown.
        """
        from onnxruntime import OrtValue

        values = {
            spec.name: OrtValue.ortvalue_from_numpy(value.numpy()) if isinstance(value, torch.Tensor) else value
            for spec, value in zip(self.inputs, self.program.arguments(inputs), strict=True)
        }
        names = [spec.name for spec in self.outputs]
        return dict(zip(names, self.session.run_with_ort_values(names, values), strict=True))


@dataclass(frozen=True)
class OnnxEncoderDecoder(StagedModel):
    """The sessions of an encoder and a decoder, and programs without graphs that say what they take.

    Args:
        encoder: reads the source.
        decoder: writes the target.
        program: what both together take and return.
        stages: the same of each alone.
    """

    runtime = ONNXRUNTIME
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
        files = files_in(folder)
        sessions = [_session(folder / files[stage]) for stage in (ENCODER, DECODER)]
        encoder, decoder = sessions
        first, second = (_shell(folder, _specs(s.get_inputs()), _specs(s.get_outputs())) for s in sessions)
        inputs, outputs = (
            whole_inputs(first.inputs, second.inputs),
            (*second.outputs, *(spec for spec in first.outputs if is_cross(spec.name))),
        )
        return cls(encoder, decoder, _shell(folder, inputs, outputs), (first, second))

    def encode(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The keys and values of cross-attention, from the source; in the layout of optimum ``last_hidden_state``.

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


def open_model(folder: Path) -> OnnxModel | OnnxEncoderDecoder:
    """The model in ``folder``, whichever of both it is.

    Raises:
        BitlowerError: onnxruntime cannot load it, or there is no configuration.
    """
    return OnnxModel.open(folder) if "" in files_in(folder) else OnnxEncoderDecoder.open(folder)


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
    program.context_length, program.lengths = (
        artifact_manifest.context_length(folder),
        artifact_manifest.lengths(folder),
    )
    return program


def _run(session: InferenceSession, program: Program, inputs: Batch) -> dict[str, torch.Tensor]:
    """The outputs on ``inputs``, which are those that ``program`` takes."""
    names = [value.name for value in session.get_outputs()]
    values = zip((spec.name for spec in program.inputs), program.arguments(inputs), strict=True)
    arrays = session.run(names, {name: value.numpy() for name, value in values})
    return {name: torch.from_numpy(value) for name, value in zip(names, arrays, strict=True)}


def _specs(values: Iterable[NodeArg]) -> tuple[ValueSpec, ...]:
    return tuple(map(_value_spec, values))


def _value_spec(value: NodeArg) -> ValueSpec:
    """An input or output of an ONNX model; of the types only whole numbers and float32 matter here."""
    dtype = torch.int64 if value.type == "tensor(int64)" else torch.float32
    sizes = (BATCH if size == OPTIMUM_BATCH else "" if size is None else size for size in value.shape)
    return ValueSpec(value.name, TensorType(dtype, tuple(sizes)))

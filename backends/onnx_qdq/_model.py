"""An ONNX artifact in onnxruntime, ready to run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bitlower.backends import _manifest
from bitlower.backends._folder import shell
from bitlower.backends.onnx_qdq._folder import MODEL
from bitlower.ir import BitlowerError, Program, TensorType, ValueSpec

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
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        try:
            session = onnxruntime.InferenceSession(str(folder / MODEL), options, ["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises many kinds
            raise BitlowerError(f"{folder / MODEL} cannot be loaded: {str(error).splitlines()[0]}") from None
        program = shell(folder)
        program.inputs = tuple(map(_value_spec, session.get_inputs()))
        program.outputs = tuple(map(_value_spec, session.get_outputs()))
        program.context_length, program.lengths = _manifest.context_length(folder), _manifest.lengths(folder)
        return cls(session, program)

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
        names = [spec.name for spec in self.outputs]
        found = self.session.run(names, {n: v.numpy() for n, v in self.program.complete(inputs).items()})
        return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}


def _value_spec(value: NodeArg) -> ValueSpec:
    """An input or output of an ONNX model; of the types only whole numbers and float32 matter here."""
    dtype = torch.int64 if value.type == "tensor(int64)" else torch.float32
    return ValueSpec(value.name, TensorType(dtype, tuple(size if size is not None else "" for size in value.shape)))

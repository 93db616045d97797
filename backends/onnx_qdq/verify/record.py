"""What a verified export is: the figures of the comparison between a Program and its ONNX model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from bitlower.backends.artifact.json_files import rounded_figures
from bitlower.backends.artifact.outputs import OutputError
from bitlower.backends.artifact.record import Verified
from bitlower.backends.artifact.selftest import SelfTest
from bitlower.backends.artifact.unseen import Unseen
from bitlower.backends.onnx_qdq.verify.runtime_kernels import KernelReport
from bitlower.ir.digits import rounded


@dataclass(frozen=True)
class CodeError:
    """How the runtime's codes of one quantized value agree with the Program's; shares are of ``codes``.

    Args:
        name: of the Program's ``quantize`` node and of the ONNX value.
        tensor: the value that is quantized.
        role: of the quantizer.
        path: the module's.
        codes: how many were compared.
        equal: the share that is equal when both run on their own.
        off_by_one: the share one step apart.
        worst: the largest difference, in steps.
        given_codes: the share that is equal when the Program computes with the runtime's codes up to this value.
        excess: then, how far any value lies from the rounding interval of the runtime's code, in steps: 0 where codes
            are equal, and next to 0 at ties.
        tie: how much of that float arithmetic may explain: a part of the range, or where more is seen, a multiple of
            what linears that round otherwise do to the value.
        exact: the share that ``round_half_even(x / scale) + zero_point`` gives on the runtime's own input; None where
            the runtime has no such input.
    """

    name: str
    tensor: str
    role: str
    path: str
    codes: int
    equal: float
    off_by_one: float
    worst: int
    given_codes: float
    excess: float
    tie: float
    exact: float | None


@dataclass(frozen=True)
class Figures:
    """What was compared of a model, or of a stage of one; all of it held.

    Args:
        runtime: the runtime's version and provider.
        session_config: the session configuration entries that the model was run with.
        batches: how many were compared, the small one of the self-test among them.
        tokens: the entries of their first input.
        outputs: one row each.
        quantized: one row for each quantized activation, in execution order.
        constants: how many weight tensors and codes were compared; all were equal, and so were scales and zero points.
        exposing: the largest change of an output from reading the codes, which could keep the runtime from fusing; 0
            says that the codes are those of the model as it is deployed.
        kernels: what the runtime runs.
    """

    runtime: Mapping[str, str]
    session_config: Mapping[str, str]
    batches: int
    tokens: int
    outputs: tuple[OutputError, ...]
    quantized: tuple[CodeError, ...]
    constants: Mapping[str, int]
    exposing: float
    kernels: KernelReport


@dataclass(frozen=True)
class Verification(Figures, Verified):
    """A comparison that held, and what lets the artifact be checked without the Program.

    Args:
        selftest: inputs, and what came out.
        unseen: the sizes that neither tracing nor the batches had, and a self-test of them.
    """

    selftest: SelfTest
    unseen: Unseen

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, floats with six significant digits; the inverse of :meth:`from_dict`."""
        form = {field.name: getattr(self, field.name) for field in fields(self)}
        form["outputs"] = [rounded_figures(asdict(row)) for row in self.outputs]
        form["quantized"] = [rounded_figures(asdict(row)) for row in self.quantized]
        form["exposing"] = rounded(self.exposing)
        form["kernels"] = self.kernels.to_dict()
        form["selftest"], form["unseen"] = self.selftest.to_dict(), self.unseen.to_dict()
        form["summary"] = self.summary()
        for key in ("runtime", "session_config", "constants"):
            form[key] = dict(form[key])
        return form

    def headline(self) -> dict[str, Any]:
        """The runtime, the kernels that it runs of those expected, and how it agrees with the Program."""
        summary, kernels = self.summary(), self.kernels
        figures: dict[str, Any] = {"runtime": f"onnxruntime {self.runtime['onnxruntime']}"}
        figures |= kernels.headline()
        figures["runtime_cosine"] = summary["output_cosine"]
        if self.quantized:
            figures["codes_given_codes"] = summary["codes_equal_given_codes"]
        return figures

    def summary(self) -> dict[str, Any]:
        """The figures that people look at first: the worst over all outputs and over all quantized tensors."""
        figures: dict[str, Any] = {
            "output_relative_error": max((row.relative for row in self.outputs), default=0.0),
            "output_cosine": min((row.cosine for row in self.outputs), default=1.0),
            "unseen_sizes": self.unseen.sizes,
        }
        if self.quantized:
            total = sum(row.codes for row in self.quantized)
            figures["codes_equal"] = sum(row.equal * row.codes for row in self.quantized) / total
            figures["codes_equal_least"] = min(row.equal for row in self.quantized)
            figures["codes_worst_difference"] = max(row.worst for row in self.quantized)
            figures["codes_equal_given_codes"] = sum(row.given_codes * row.codes for row in self.quantized) / total
        return rounded_figures(figures)

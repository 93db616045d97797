"""Write the verified ONNX artefact of a Program."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from bitlower.backends._config import write_config
from bitlower.backends._folder import sizes
from bitlower.backends._level import check_level
from bitlower.backends.onnx_qdq._folder import MODEL, write_assets, write_model
from bitlower.backends.onnx_qdq._genai import write_genai_config
from bitlower.backends.onnx_qdq._kernels import LEVEL_ENTRY
from bitlower.backends.onnx_qdq._low_bit import FLOAT_ACTIVATIONS, ROUNDS_ACTIVATIONS
from bitlower.backends.onnx_qdq._lower import lower
from bitlower.backends.onnx_qdq._manifest import write_manifest
from bitlower.backends.onnx_qdq._products import SIGNS, Signs, chosen_signs
from bitlower.backends.onnx_qdq._rewrite_linear import Form
from bitlower.backends.onnx_qdq._rewrite_low_bit import LOW_BIT
from bitlower.backends.onnx_qdq._verification import Verification
from bitlower.backends.onnx_qdq._verify import verify_export
from bitlower.ir import Batch, BitlowerError, CheckError, Program, nearest

FORMS: tuple[Form, ...] = ("qdq", "onnxruntime")
OPSETS = (21, 25)
"""The first and the last opset that can be asked for: 21 brought 16-bit and blocked quantization."""


@dataclass(frozen=True)
class Options:
    """How a Program is written.

    Args:
        opset: of ONNX's own operators, 21 to 25; below 23 there is no Attention operator, and attention is written out.
        form: ``qdq`` is standard ONNX; ``onnxruntime`` also uses operators of the domain com.microsoft:
            MatMulIntegerToFloat, MatMulNBits, FusedMatMul.
        accuracy_level: how linears with low-bit weights and float activations are multiplied, in the words of
            com.microsoft.MatMulNBits. 1 computes in float32, which is what a scheme such as W4A16 says. 4 rounds the
            activations to 8 bits, in blocks, which costs accuracy and is faster a token; only at 4 have
            weights of 2 and of 5 to 8 bits kernels of their own. The form ``qdq`` only records it, as a session entry
            (see ``verification.json``): onnxruntime takes 4 if it is told nothing.
        external_data_threshold: tensors of more bytes in all go to a file of their own, for protobuf ends at 2 GB.
        weight_signs: how 8-bit codes of symmetric weights are stored that are multiplied with 8-bit activations.
            ``signed`` is fastest, and exact where the processor has integer dot products; x86 processors without them
            (AVX2, AVX512 before VNNI) clip sums of two products. ``unsigned`` is exact everywhere, and slower where
            there are such instructions. ``auto`` tries on the processor that exports, and records what it chose.

    Raises:
        BitlowerError: a value is out of range.
    """

    opset: int = 23
    form: Form = "qdq"
    accuracy_level: int = FLOAT_ACTIVATIONS
    external_data_threshold: int = 1_900_000_000
    weight_signs: Signs = "auto"

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise BitlowerError(f"unknown form {self.form!r}", hint=nearest(str(self.form), FORMS))
        if self.weight_signs not in SIGNS:
            raise BitlowerError(
                f"unknown weight_signs {self.weight_signs!r}", hint=nearest(str(self.weight_signs), SIGNS)
            )
        for name, value, low, high in (
            ("opset", self.opset, *OPSETS),
            ("accuracy_level", self.accuracy_level, 0, ROUNDS_ACTIVATIONS),
            ("external_data_threshold", self.external_data_threshold, 0, 1_900_000_000),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise BitlowerError(f"{name} is a whole number from {low} to {high}, not {value!r}")


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Args:
        files: bytes by name.
        opset: of ONNX's own operators.
        form: ``qdq`` or ``onnxruntime``.
        accuracy_level: of MatMulNBits.
        operators: how many nodes of each operator the model has.
        rules: by rewrite rule, how often it was applied and why it was not.
        verification: how the artefact compares with the Program.
        notes: what ``genai_config.json`` could not say of how the model generates, a line each.
    """

    files: dict[str, int]
    opset: int
    form: str
    accuracy_level: int
    operators: dict[str, int]
    rules: dict[str, dict[str, object]]
    verification: Verification
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "files": self.files,
            "opset": self.opset,
            "form": self.form,
            "accuracy_level": self.accuracy_level,
            "operators": self.operators,
            "rules": self.rules,
            "verification": self.verification.to_dict(),
            "notes": list(self.notes),
        }


def export(
    program: Program,
    folder: Path,
    *,
    batches: Sequence[Batch],
    opset: int = Options.opset,
    form: Form = Options.form,
    accuracy_level: int = Options.accuracy_level,
    external_data_threshold: int = Options.external_data_threshold,
    weight_signs: Signs = Options.weight_signs,
    provenance: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Write the artefact of ``program`` into the existing ``folder`` and verify it on ``batches``.

    Args:
        program: at level float or integer.
        folder: exists.
        batches: real inputs for the verification.
        opset: see :class:`Options`.
        form: see :class:`Options`.
        accuracy_level: see :class:`Options`.
        external_data_threshold: see :class:`Options`.
        weight_signs: see :class:`Options`.
        provenance: for the manifest: seeds, hashes of data, and what else the caller knows; plain data.

    Raises:
        BitlowerError: an option is wrong, or the program cannot be expressed in ONNX.
        CheckError: what was written does not compute what the program does.
    """
    options = Options(opset, form, accuracy_level, external_data_threshold, weight_signs)
    options = dataclasses.replace(options, weight_signs=chosen_signs(weight_signs))
    _check(program)
    model, log = lower(
        program, opset=opset, form=form, accuracy_level=accuracy_level, weight_signs=options.weight_signs
    )
    session_config = {}
    if form == "qdq" and log.applied[LOW_BIT]:
        session_config[LEVEL_ENTRY] = str(accuracy_level)
    files = [*write_model(model, folder, threshold=external_data_threshold), write_config(program, folder, "onnx")]
    program.release()
    described, notes = write_genai_config(program, folder, session_config)
    files += [*write_assets(program, folder), *described]
    _check_model(folder / MODEL)
    verification = verify_export(
        program,
        folder,
        batches,
        session_config=session_config,
        accuracy_level=accuracy_level,
        split=log.split,
    )
    verification.write(folder)
    write_manifest(program, folder, backend_options=dataclasses.asdict(options), provenance=provenance)
    return ExportReport(
        sizes(folder, files), opset, form, accuracy_level, operators(model), log.to_dict(), verification, notes
    )


def operators(model: ir.Model) -> dict[str, int]:
    """How many nodes of each operator there are; those of other domains with their domain."""
    names = (f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in model.graph)
    return dict(sorted(Counter(names).items()))


def _check(program: Program) -> None:
    check_level(program.level)
    if set(program.graphs) != {"model"}:
        raise BitlowerError(f"this backend exports one graph, the program has {', '.join(program.graphs)}")


def _check_model(path: Path) -> None:
    """Let ONNX's own checker read the file.

    Raises:
        CheckError: it is no valid ONNX.
    """
    try:
        onnx.checker.check_model(str(path), full_check=False)
    except onnx.checker.ValidationError as error:
        raise CheckError(f"{path.name} is not valid ONNX: {str(error).splitlines()[0]}") from error

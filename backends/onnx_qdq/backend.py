"""Write the verified ONNX artifact of a Program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import onnx
import onnx_ir as ir
from annotated_types import Interval

from bitlower.backends.artifact.card import Usage, write_card
from bitlower.backends.artifact.config import write_config
from bitlower.backends.artifact.folder import sizes
from bitlower.backends.artifact.stages import WHOLE, part_batches, parts_of
from bitlower.backends.base import Backend, KernelTime
from bitlower.backends.onnx_qdq.encoding.nbits import FLOAT_ACTIVATIONS, ROUNDS_ACTIVATIONS
from bitlower.backends.onnx_qdq.model import OnnxEncoderDecoder, OnnxModel, open_model
from bitlower.backends.onnx_qdq.rewrite.linear import Form
from bitlower.backends.onnx_qdq.rewrite.low_bit import LOW_BIT
from bitlower.backends.onnx_qdq.rewrite.pipeline import lower
from bitlower.backends.onnx_qdq.rewrite.rule import RuleLog
from bitlower.backends.onnx_qdq.runtime.products import Signs, chosen_signs
from bitlower.backends.onnx_qdq.sizes import OnnxSizes
from bitlower.backends.onnx_qdq.verify.artifact import ArtifactReport, verify_artifact, write_manifest
from bitlower.backends.onnx_qdq.verify.compare import compare_export, verify_export
from bitlower.backends.onnx_qdq.verify.record import Verification
from bitlower.backends.onnx_qdq.verify.runtime_kernels import LEVEL_ENTRY
from bitlower.backends.onnx_qdq.verify.stages import join_stages
from bitlower.backends.onnx_qdq.verify.timing import kernel_times
from bitlower.backends.onnx_qdq.write.annotate import annotate, annotations_of, write_overlays
from bitlower.backends.onnx_qdq.write.files import DATA, model_file, share_tensors, write_assets, write_model
from bitlower.backends.onnx_qdq.write.genai import write_genai_config, writes_speech
from bitlower.backends.onnx_qdq.write.optimum import OPTIMUM, OPTIMUM_DATA, Layout, misreadings, name_rows
from bitlower.backends.onnx_qdq.write.usage import usage_of
from bitlower.backends.sizes import weights_only
from bitlower.ir import Batch, BitlowerError, CheckError, Program, Scheme
from bitlower.ir.quantization.scheme import ACTIVATION_ROLES
from bitlower.ir.stages import is_encoder_decoder
from bitlower.ir.tasks import TEXT_GENERATION


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
        verification: how the artifact compares with the Program.
        notes: what ``genai_config.json`` could not say of how the model generates, and products of quantized operands
            that run in float, a line each.
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
            "headline": self.verification.headline(),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class OnnxQdq(Backend):
    """ONNX for onnxruntime: standard Q/DQ graphs that run on its integer kernels, verified against the Program."""

    name: ClassVar[str] = "onnx-qdq"
    opset: Annotated[int, Interval(ge=21, le=25)] = 23
    """Of ONNX's own operators: 21 brought 16-bit and blocked quantization; below 23 there is no Attention operator, and
    attention is written out; from 25 on there are types of 2 bits."""
    form: Form = "qdq"
    """``qdq`` is standard ONNX; ``onnxruntime`` also uses operators of the domain com.microsoft: MatMulIntegerToFloat,
    MatMulNBits, FusedMatMul."""
    accuracy_level: Annotated[int, Interval(ge=0, le=ROUNDS_ACTIVATIONS)] = FLOAT_ACTIVATIONS
    """How linears with low-bit weights and float activations are multiplied, in the words of com.microsoft.MatMulNBits.
    1 computes in float32, which is what a scheme such as W4A16 says. 4 rounds the activations to 8 bits, in blocks,
    which costs accuracy and is faster a token; only at 4 have weights of 2 and of 5 to 8 bits kernels of their own. The
    form ``qdq`` only records it, as a session entry (see ``verification.json``): onnxruntime takes 4 if it is told
    nothing."""
    external_data_threshold: Annotated[int, Interval(ge=0, le=1_900_000_000)] = 1_900_000_000
    """Tensors of more bytes in all go to a file of their own, for protobuf ends at 2 GB."""
    weight_signs: Signs = "auto"
    """How 8-bit codes of symmetric weights are stored that are multiplied with 8-bit activations. ``signed`` is
    fastest, and exact where the processor has integer dot products; x86 processors without them (AVX2, AVX512 before
    VNNI) clip sums of two products. ``unsigned`` is exact everywhere, and slower where there are such instructions.
    ``auto`` tries on the processor that exports, and records what it chose."""
    layout: Layout = "genai"
    """Of the two files of an encoder-decoder. ``genai``: ``decoder_model.onnx`` reads the keys and values of
    cross-attention, which the encoder computes once a source; onnxruntime-genai runs Whisper so. ``optimum``: the
    encoder returns ``last_hidden_state``, and ``decoder_model_merged.onnx`` computes keys and values in its first step;
    optimum and transformers.js read that. What both files read is stored in each."""
    annotate: bool = False
    """Note on nodes their module, bits and noise, and on values their scales, which Netron shows; and write files of
    node data for Model Explorer into ``overlays``. Weights and what the runtime fuses stay as they are."""

    @classmethod
    def suited_to(cls, scheme: Scheme) -> Mapping[str, Any]:
        """With float activations the form ``onnxruntime``: its MatMulNBits keeps codes packed in memory."""
        return {"form": "onnxruntime"} if scheme.activations is None else {}

    def export(
        self, program: Program, folder: Path, batches: Sequence[Batch], provenance: Mapping[str, Any] | None = None
    ) -> ExportReport:
        """Write the artifact of ``program`` into the existing ``folder`` and verify it on ``batches``.

        Raises:
            BitlowerError: the program cannot be expressed in ONNX.
            CheckError: what was written does not compute what the program does.
        """
        options = replace(self, weight_signs=chosen_signs(self.weight_signs))
        self.check_level(program.level)
        if set(program.graphs) != {"model"}:
            raise BitlowerError(f"this backend exports one graph, the program has {', '.join(program.graphs)}")
        optimum = self.layout == OPTIMUM and is_encoder_decoder(program)
        parts = parts_of(program, states=writes_speech(program), at_states=optimum)
        files, counts, log = options.write_parts(parts, folder)
        files.append(write_config(program, folder, "onnx"))
        program.release()
        config = {}
        if self.form == "qdq" and log.applied[LOW_BIT]:
            config[LEVEL_ENTRY] = str(self.accuracy_level)
        described, notes = ([], tuple(misreadings(program))) if optimum else write_genai_config(program, folder, config)
        files += [*write_assets(program, folder), *described]
        verification = options.verify_parts(program, parts, folder, batches, log.split, config)
        verification.write(folder)
        files.append(write_card(program, folder, self.usage(program)))
        write_manifest(program, folder, backend_options=asdict(options), provenance=provenance)
        return ExportReport(
            sizes(folder, files), self.opset, self.form, self.accuracy_level, dict(sorted(counts.items())),
            log.to_dict(), verification, (*notes, *verification.kernels.notes()),
        )  # fmt: skip

    def usage(self, program: Program) -> Usage:
        """With sentence-transformers, onnxruntime, or onnxruntime and bitlower where text is written."""
        return usage_of(program, self.layout)

    def write_parts(self, parts: Mapping[str, Program], folder: Path) -> tuple[list[str], Counter[str], RuleLog]:
        """Write the model of each part; the names of the files, the operators, and what the rules did.

        Raises:
            BitlowerError: a program has an operator that ONNX cannot express.
        """
        models, log, counts = [], RuleLog(), Counter[str]()
        for part in parts.values():
            model, rules = lower(
                part,
                opset=self.opset,
                form=self.form,
                accuracy_level=self.accuracy_level,
                weight_signs=self.weight_signs,
            )
            models.append(model)
            log.add(rules)
            counts += operators(model)
        names = []
        for stage, part, model in zip(parts, parts.values(), models, strict=True) if self.annotate else ():
            annotate(model, annotations_of(part, folder))
            names += write_overlays(model, folder, stage)
        optimum = self.layout == OPTIMUM and len(models) > 1
        files = names if optimum else [*names, *share_tensors(models, folder)]
        suffix = OPTIMUM_DATA if optimum else DATA
        for stage, model in zip(parts, models, strict=True):
            if optimum:
                name_rows(model)
            file = model_file(stage, self.layout)
            files += write_model(model, folder, threshold=self.external_data_threshold, name=file, suffix=suffix)
        return files, counts, log

    def verify_parts(
        self,
        program: Program,
        parts: Mapping[str, Program],
        folder: Path,
        batches: Sequence[Batch],
        split: Collection[str],
        config: Mapping[str, str],
    ) -> Verification:
        """Compare each file with its Program, and those of an encoder-decoder together.

        Raises:
            CheckError: a file is no valid ONNX, or does not compute what its Program does.
        """
        for stage in parts:
            _check_model(folder / model_file(stage, self.layout))
        options: dict[str, Any] = {"session_config": config, "accuracy_level": self.accuracy_level, "split": split}
        if WHOLE in parts:
            return verify_export(program, folder, batches, **options)
        by_stage = part_batches(parts, batches)
        figures = {
            stage: compare_export(part, folder, by_stage[stage], file=model_file(stage, self.layout), **options).figures
            for stage, part in parts.items()
        }
        return join_stages(program, folder, figures, batches[0], config)

    @classmethod
    def verify(cls, folder: Path) -> ArtifactReport:
        """Check the artifact in ``folder``; see :func:`~bitlower.backends.onnx_qdq.verify.artifact.verify_artifact`.

        Raises:
            CheckError: a file is missing or changed, or the model does not compute what it did.
        """
        return verify_artifact(folder)

    @classmethod
    def kernel_times(cls, folder: Path) -> tuple[KernelTime, ...]:
        """What each kind of kernel takes; see :func:`~bitlower.backends.onnx_qdq.verify.timing.kernel_times`.

        Raises:
            CheckError: a file is missing or damaged, or the model does not run.
        """
        return kernel_times(folder)

    @classmethod
    def load(cls, folder: Path) -> OnnxModel | OnnxEncoderDecoder:
        """The model in onnxruntime.

        Raises:
            BitlowerError: onnxruntime cannot load it.
        """
        return open_model(folder)

    def sizes(self, placed: Program) -> OnnxSizes:
        """Bytes of tensors in the file."""
        return OnnxSizes(self.opset, self.form, self.accuracy_level, weights_only(placed), self.layout == OPTIMUM)

    def unforeseen(self, placed: Program) -> Iterable[str]:
        """Of a decoder with static activations every rounded value of whole windows is compared."""
        static = [q for _, q in placed.quantizers() if q.role in ACTIVATION_ROLES and not q.spec.granularity.dynamic]
        if placed.task == TEXT_GENERATION and static:
            yield "every rounded value of a decoder's windows is checked against the runtime's; that is not foreseen"


def operators(model: ir.Model) -> Counter[str]:
    """How many nodes of each operator there are; those of other domains with their domain."""
    return Counter(f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in model.graph)


def _check_model(path: Path) -> None:
    """Let ONNX's own checker read the file.

    Raises:
        CheckError: it is no valid ONNX.
    """
    try:
        onnx.checker.check_model(str(path), full_check=False)
    except onnx.checker.ValidationError as error:
        raise CheckError(f"{path.name} is not valid ONNX: {str(error).splitlines()[0]}") from error

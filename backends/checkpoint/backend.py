"""Write the verified checkpoint of a Program."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge

from bitlower.backends.artifact import manifest as artifact_manifest
from bitlower.backends.artifact.card import Usage, write_card
from bitlower.backends.artifact.folder import CONFIG, sizes, write_assets
from bitlower.backends.artifact.json_files import read_json, write_json
from bitlower.backends.base import Backend
from bitlower.backends.checkpoint.container import Container, Entry
from bitlower.backends.checkpoint.contents import (
    SHARED,
    Contents,
    Float,
    check_experts,
    collect,
    is_symmetric,
    readers,
)
from bitlower.backends.checkpoint.format import Format, cast, find_format, known_formats, refusal
from bitlower.backends.checkpoint.sizes import CheckpointSizes
from bitlower.backends.checkpoint.skeleton import EMBEDDING, LINEAR, Skeleton
from bitlower.backends.checkpoint.verify.artifact import ArtifactReport, verify_artifact
from bitlower.backends.checkpoint.verify.compare import PACKAGES, Stored, verify_export
from bitlower.backends.checkpoint.verify.record import Verification
from bitlower.ir import Batch, BitlowerError, Program, QuantSpec, ops
from bitlower.ir.assets import GENERATION, MODULES
from bitlower.ir.folding import with_float_weights
from bitlower.ir.tasks import TASKS

if TYPE_CHECKING:
    FormatName = str
else:
    FormatName = Literal[known_formats()]
Dtype = Literal["float16", "bfloat16", "float32"]
_DTYPES: dict[str, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Args:
        files: bytes by name.
        format: of the packed layers.
        dtype: of scales and of what stays in float.
        packed: how many layers are packed.
        packed_bytes: of their tensors.
        float_bytes: of what stays in float.
        float_tables: quantized tables, heads and kernels of convolutions whose values are written in float, and why
            they have no codes.
        verification: how the artifact compares with the Program.
    """

    files: dict[str, int]
    format: str
    dtype: str
    packed: int
    packed_bytes: int
    float_bytes: int
    float_tables: dict[str, str]
    verification: Verification

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        form = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return form | {"verification": self.verification.to_dict(), "headline": self.verification.headline()}


@dataclass(frozen=True)
class Checkpoint(Backend):
    """Hugging Face folders with packed weights, for transformers, vLLM and GPTQModel, verified against the Program."""

    name: ClassVar[str] = "checkpoint"
    formats: ClassVar[Mapping[str, Mapping[str, Any]]] = {name: {"format": name} for name in known_formats()}
    holds_heads: ClassVar[bool] = False
    node_seconds: ClassVar[float] = 0.001
    copies_model: ClassVar[bool] = False
    format: FormatName = "compressed-tensors"
    """``compressed-tensors`` (its pack-quantized) or ``gptq-v2``."""
    dtype: Dtype = "float16"
    """Of what stays in float and of the scales (which are always float16 in ``gptq-v2``)."""
    max_shard_size: Annotated[int, Ge(1)] = 5_000_000_000
    """Files of at most so many bytes; a single tensor may be larger."""

    def export(
        self, program: Program, folder: Path, batches: Sequence[Batch], provenance: Mapping[str, Any] | None = None
    ) -> ExportReport:
        """Write the checkpoint of ``program`` into the existing ``folder`` and verify it on ``batches``.

        Args:
            program: of a Hugging Face model, at level float or integer, its weights alone quantized.
            folder: exists.
            batches: real inputs for the verification, which runs up to two of them.
            provenance: for the manifest: plain data.

        Raises:
            BitlowerError: the format cannot hold a layer, which is named; nothing is written.
            CheckError: what was written is not the program.
        """
        self.check_level(program.level)
        form, number = find_format(self.format), _DTYPES[self.dtype]
        skeleton = Skeleton(program)
        tables = dict(_float_tables(program, skeleton, form))
        program = with_float_weights(program, tables) if tables else program
        contents = collect(program, skeleton)
        check(contents, self.format)
        config = _config(program, skeleton, contents, self)
        packed = [entry for layer in contents.layers for entry in form.entries(layer, form.scale_dtype(number))]
        floats = [_entry(entry, number) for entry in contents.floats]
        files = form.container.write([*packed, *floats], folder, max_shard_size=self.max_shard_size)
        write_json(folder / CONFIG, config)
        files += [CONFIG, *_write_assets(program, folder, form.container)]
        stored = Stored(folder, form, read_json(folder / CONFIG))
        verification = verify_export(program, contents, skeleton, stored, batches, form=form, dtype=number)
        verification.write(folder)
        options = asdict(self)
        files.append(write_card(program, folder, self.usage(program)))
        artifact_manifest.write_manifest(
            program, folder, backend=self.name, packages=PACKAGES, backend_options=options, provenance=provenance
        )
        return ExportReport(
            files=sizes(folder, files),
            format=self.format,
            dtype=self.dtype,
            packed=len(contents.layers),
            packed_bytes=sum(entry.bytes for entry in packed),
            float_bytes=sum(entry.bytes for entry in floats),
            float_tables=tables,
            verification=verification,
        )

    @classmethod
    def verify(cls, folder: Path) -> ArtifactReport:
        """Check the artifact in ``folder``; see :func:`~bitlower.backends.checkpoint.verify.artifact.verify_artifact`.

        Raises:
            CheckError: a file is missing or changed, or the tensors are not those that were written.
        """
        return verify_artifact(folder)

    def usage(self, program: Program) -> Usage:
        """With transformers, or sentence-transformers, and what reads the format."""
        tags = (self.format,)
        readers = " ".join(name.replace("_", "-") for name in find_format(self.format).readers)
        if MODULES in program.assets:
            code = "from sentence_transformers import SentenceTransformer\n\nmodel = SentenceTransformer(folder)"
            return Usage("sentence-transformers", code, f"sentence-transformers {readers}", tags)
        name = TASKS[program.task].auto_class if program.task in TASKS else "AutoModel"
        code = f"from transformers import {name}\n\nmodel = {name}.from_pretrained(folder)"
        return Usage("transformers", code, f"transformers {readers}", tags)

    def sizes(self, placed: Program) -> CheckpointSizes:
        """Bytes of tensors in the files."""
        return CheckpointSizes(find_format(self.format), _DTYPES[self.dtype].itemsize)

    def supports(self, spec: QuantSpec, shape: Sequence[int], role: str) -> str:
        """Why a tensor cannot be held; tables that a format cannot hold and kernels are written in float."""
        if role in ("embedding-table", "convolution-weight"):
            return ""
        if role != "linear-weight" or len(shape) != 2:
            return "a checkpoint holds the weights of linear layers and embedding tables in few bits, nothing else"
        rows, columns = shape
        return refusal(find_format(self.format), spec, (rows, columns), LINEAR)

    def check_program(self, program: Program) -> None:
        """See that Hugging Face's model has every weight of ``program``.

        Raises:
            BitlowerError: it is of no such model, a weight is not of it, its files hold experts in one tensor, or a
                weight is read past its layer.
        """
        skeleton = Skeleton(program)
        check_experts(skeleton)
        _check_readers(program, skeleton, find_format(self.format))
        for name, tensor in program.tensors():
            target = name.removeprefix("model/")
            if isinstance(tensor, torch.nn.Parameter) and not skeleton.names_of(target):
                raise BitlowerError(
                    f"{target} is no weight of {skeleton.architecture}, so no checkpoint can hold it",
                    hint="export with the backend `onnx-qdq`",
                )


def _check_readers(program: Program, skeleton: Skeleton, form: Format) -> None:
    """Refuse few bits for a layer whose weight the module above multiplies with itself (the time steps of Mamba).

    Or draws anew before a checkpoint is loaded (the projection of features in wav2vec 2.0).
    """
    for node, quantizer in program.quantizers():
        layer = quantizer.tensor.removesuffix(".weight")
        above = layer.rpartition(".")[0]
        if skeleton.attention_around(quantizer.tensor):
            continue  # it is written in float
        if quantizer.role == "linear-weight" and above and above in readers(node):
            pattern = f'"re:.*[.]{above.rpartition(".")[2]}"'  # the module alone, and not the linears below it
            raise BitlowerError(
                f"{layer} is multiplied with by {above}, past its own layer: no client reads it in few bits there",
                hint=f"leave it in float, quantize{{ignore=[{pattern}]}}, or export with the backend `onnx-qdq`",
            )
        if quantizer.role == "linear-weight" and layer in skeleton.initialized and not form.unfolds:
            raise BitlowerError(
                f"{layer} is initialized by {skeleton.initialized[layer]} when transformers makes the model: it loads"
                " no checkpoint with few bits there",
                hint=f'leave it in float, quantize{{ignore=["re:.*[.]{layer.rpartition(".")[2]}"]}}, or export with the'
                " backend `onnx-qdq`",
            )


def _float_tables(program: Program, skeleton: Skeleton, form: Format) -> Iterator[tuple[str, str]]:
    """The quantized tables, heads and kernels that ``form`` cannot hold, by their parameters' names, and why."""
    linears = [quantizer.spec for _, quantizer in program.quantizers() if quantizer.role == "linear-weight"]
    zeros = form.one_way_with_zeros and not all(map(is_symmetric, linears))
    for node, quantizer in program.quantizers():
        if attention := skeleton.attention_around(quantizer.tensor):
            yield quantizer.tensor, f"{attention} is a MultiheadAttention, which multiplies with it past any layer"
        kernels = (len(skeleton.shapes.get(f"{path}.weight", ())) > 2 for path in readers(node))
        if quantizer.role == "convolution-weight" or any(kernels):
            yield quantizer.tensor, f"it is the kernel of a convolution in {skeleton.architecture}"
        if quantizer.role != "embedding-table" or node.target is not ops.dequantize:
            continue
        paths, (rows, columns) = readers(node), map(int, node.meta["type"].shape)
        kinds = [skeleton.kinds.get(path, EMBEDDING) for path in paths]
        reason = refusal(form, quantizer.spec, (rows, columns), kinds[0]) if len(paths) == 1 else SHARED
        if zeros and not reason and set(linears) != {quantizer.spec}:
            reason = "all layers are packed in one way where one has zero points"
        if reason:
            yield quantizer.tensor, reason


def check(contents: Contents, format: str) -> None:
    """See that ``format`` can hold every layer.

    Raises:
        BitlowerError: it cannot; the first layer that it cannot hold is named, and the reason.
    """
    for layer in contents.layers:
        reason = refusal(find_format(format), layer.spec, layer.shape, layer.kind)
        if reason:
            hint = "" if "the format" in reason else "choose another scheme, or leave the layer in float with `ignore`"
            raise BitlowerError(f"the format {format} cannot hold {layer.path}: {reason}", hint=hint)


def _entry(entry: Float, dtype: torch.dtype) -> Entry:
    value = entry.value()
    number = dtype if value.is_floating_point() else value.dtype

    return Entry(entry.name, number, tuple(value.shape), lambda: cast(entry.value(), number, entry.name))


def _config(program: Program, skeleton: Skeleton, contents: Contents, options: Checkpoint) -> dict[str, Any]:
    """``config.json``: the model's own, with its class, dtype, ties and what is quantized."""
    form = {key: value for key, value in program.config.items() if key not in ("torch_dtype", "quantization_config")}
    form |= {"architectures": [skeleton.architecture], "dtype": options.dtype}
    if contents.ties != skeleton.ties:
        form["tie_word_embeddings"] = False
    if contents.layers:
        how = form["quantization_config"] = find_format(options.format).config(contents.layers, skeleton)
        if MODULES in program.assets and len(how.get("config_groups", ())) == 1:
            how["dequantize"] = True  # sentence-transformers passes by the hook that would unpack at the first call
    return form


def _write_assets(program: Program, folder: Path, container: Container) -> Iterator[str]:
    """Write the tokenizer's files, and how to generate with a decoder that does not say; their names."""
    yield from write_assets(program, folder, container.files)
    if program.task == "text-generation" and GENERATION not in program.assets:
        tokens = {key: program.config[key] for key in _TOKENS if program.config.get(key) is not None}
        write_json(folder / GENERATION, {"_from_model_config": True, **tokens})
        yield GENERATION

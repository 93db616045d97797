"""Write the verified checkpoint of a Program."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from bitlower.backends import _manifest
from bitlower.backends._folder import CONFIG, sizes, write_assets
from bitlower.backends._json import read_json, write_json
from bitlower.backends.checkpoint._contents import (
    SHARED,
    Contents,
    Float,
    check_experts,
    collect,
    is_symmetric,
    readers,
)
from bitlower.backends.checkpoint._formats import FORMATS, refusal
from bitlower.backends.checkpoint._packed import Format, cast
from bitlower.backends.checkpoint._safetensors import INDEX, MODEL, Entry, write_tensors
from bitlower.backends.checkpoint._skeleton import EMBEDDING, LINEAR, Skeleton
from bitlower.backends.checkpoint._verification import Verification
from bitlower.backends.checkpoint._verify import PACKAGES, Stored, verify_export
from bitlower.ir import Batch, BitlowerError, Program, QuantSpec, nearest, ops
from bitlower.ir.assets import GENERATION, MODULES
from bitlower.ir.folding import with_float_weights

BACKEND = "checkpoint"
FormatName = Literal["compressed-tensors", "gptq-v2"]
Dtype = Literal["float16", "bfloat16", "float32"]
_DTYPES: dict[str, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


@dataclass(frozen=True)
class Options:
    """How a Program is written.

    Args:
        format: ``compressed-tensors`` (its pack-quantized) or ``gptq-v2``.
        dtype: of what stays in float and of the scales (which are always float16 in ``gptq-v2``).
        max_shard_size: files of at most so many bytes; a single tensor may be larger.

    Raises:
        BitlowerError: a value is out of range.
    """

    format: FormatName = "compressed-tensors"
    dtype: Dtype = "float16"
    max_shard_size: int = 5_000_000_000

    def __post_init__(self) -> None:
        for name, value, known in (("format", self.format, FORMATS), ("dtype", self.dtype, _DTYPES)):
            if value not in known:
                raise BitlowerError(f"unknown {name} {value!r}", hint=nearest(str(value), known))
        size = self.max_shard_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise BitlowerError(f"max_shard_size is a whole number of bytes from 1, not {size!r}")


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
        float_tables: quantized tables and heads whose values are written in float, and why they have no codes.
        verification: how the artefact compares with the Program.
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
        return form | {"verification": self.verification.to_dict()}


def export(
    program: Program,
    folder: Path,
    *,
    batches: Sequence[Batch],
    format: FormatName = Options.format,
    dtype: Dtype = Options.dtype,
    max_shard_size: int = Options.max_shard_size,
    provenance: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Write the checkpoint of ``program`` into the existing ``folder`` and verify it on ``batches``.

    Args:
        program: of a Hugging Face model, at level float or integer, its weights alone quantized.
        folder: exists.
        batches: real inputs for the verification, which runs up to two of them.
        format: see :class:`Options`.
        dtype: see :class:`Options`.
        max_shard_size: see :class:`Options`.
        provenance: for the manifest: seeds, hashes of data, and what else the caller knows; plain data.

    Raises:
        BitlowerError: an option is wrong, or the format cannot hold a layer, which is named; nothing is written.
        CheckError: what was written is not the program.
    """
    options = Options(format, dtype, max_shard_size)
    form, number = FORMATS[format], _DTYPES[dtype]
    skeleton = Skeleton(program)
    tables = dict(_float_tables(program, skeleton, form))
    program = with_float_weights(program, tables) if tables else program
    contents = collect(program, skeleton)
    check(contents, format)
    config = _config(program, skeleton, contents, options)
    packed = [entry for layer in contents.layers for entry in form.entries(layer, form.scale_dtype(number))]
    floats = [_entry(entry, number) for entry in contents.floats]
    files = write_tensors([*packed, *floats], folder, max_shard_size=max_shard_size)
    write_json(folder / CONFIG, config)
    files += [CONFIG, *_write_assets(program, folder)]
    stored = Stored(folder, form, read_json(folder / CONFIG))
    verification = verify_export(program, contents, skeleton, stored, batches, form=form, dtype=number)
    verification.write(folder)
    _manifest.write_manifest(
        program,
        folder,
        backend=BACKEND,
        packages=PACKAGES,
        backend_options=dataclasses.asdict(options),
        provenance=provenance,
    )
    return ExportReport(
        sizes(folder, files),
        format,
        dtype,
        len(contents.layers),
        sum(entry.bytes for entry in packed),
        sum(entry.bytes for entry in floats),
        tables,
        verification,
    )


def supports(spec: QuantSpec, shape: Sequence[int], role: str, **options: Any) -> str:
    """Why a tensor of ``role`` cannot be held with ``spec`` in a checkpoint; empty if it can.

    Args:
        spec: grid and granularity.
        shape: of a weight, [outputs, inputs]; activations have none here.
        role: see :data:`~bitlower.ir.scheme.WEIGHT_ROLES`; tables that a format cannot hold are written in float.
        options: see :class:`Options`.
    """
    if role == "embedding-table":
        return ""
    if role != "linear-weight" or len(shape) != 2:
        return "a checkpoint holds the weights of linear layers and embedding tables in few bits, nothing else"
    rows, columns = shape
    return refusal(FORMATS[Options(**options).format], spec, (rows, columns), LINEAR)


def _float_tables(program: Program, skeleton: Skeleton, form: Format) -> Iterator[tuple[str, str]]:
    """The quantized tables and heads that ``form`` cannot hold, by their parameters' names, and why."""
    linears = [quantizer.spec for _, quantizer in program.quantizers() if quantizer.role == "linear-weight"]
    zeros = form.one_way_with_zeros and not all(map(is_symmetric, linears))
    for node, quantizer in program.quantizers():
        if quantizer.role != "embedding-table" or node.target is not ops.dequantize:
            continue
        paths, (rows, columns) = readers(node), map(int, node.meta["type"].shape)
        kinds = [skeleton.kinds.get(path, EMBEDDING) for path in paths]
        reason = refusal(form, quantizer.spec, (rows, columns), kinds[0]) if len(paths) == 1 else SHARED
        if zeros and not reason and set(linears) != {quantizer.spec}:
            reason = "all layers are packed in one way where one has zero points"
        if reason:
            yield quantizer.tensor, reason


def check_program(program: Program, **options: Any) -> None:
    """See that Hugging Face's model has every weight of ``program``.

    Raises:
        BitlowerError: it is of no such model, a weight is not of it, or its files hold experts in one tensor.
    """
    skeleton = Skeleton(program)
    check_experts(skeleton)
    for name, tensor in program.tensors():
        target = name.removeprefix("model/")
        if isinstance(tensor, torch.nn.Parameter) and target not in skeleton.shapes:
            raise BitlowerError(
                f"{target} is no weight of {skeleton.architecture}, so no checkpoint can hold it",
                hint="export with the backend `onnx-qdq`",
            )


def check(contents: Contents, format: str) -> None:
    """See that ``format`` can hold every layer.

    Raises:
        BitlowerError: it cannot; the first layer that it cannot hold is named, and the reason.
    """
    for layer in contents.layers:
        reason = refusal(FORMATS[format], layer.spec, layer.shape, layer.kind)
        if reason:
            hint = "" if "the format" in reason else "choose another scheme, or leave the layer in float with `ignore`"
            raise BitlowerError(f"the format {format} cannot hold {layer.path}: {reason}", hint=hint)


def _entry(entry: Float, dtype: torch.dtype) -> Entry:
    value = entry.value()
    kept = dtype if value.is_floating_point() else value.dtype

    return Entry(entry.name, kept, tuple(value.shape), lambda: cast(entry.value(), kept, entry.name))


def _config(program: Program, skeleton: Skeleton, contents: Contents, options: Options) -> dict[str, Any]:
    """``config.json``: the model's own, with its class, dtype, ties and what is quantized."""
    form = {key: value for key, value in program.config.items() if key not in ("torch_dtype", "quantization_config")}
    form |= {"architectures": [skeleton.architecture], "dtype": options.dtype}
    if contents.ties != skeleton.ties:
        form["tie_word_embeddings"] = False
    if contents.layers:
        how = form["quantization_config"] = FORMATS[options.format].config(contents.layers, skeleton)
        if MODULES in program.assets and len(how.get("config_groups", ())) == 1:
            how["dequantize"] = True  # sentence-transformers passes by the hook that would unpack at the first call
    return form


def _write_assets(program: Program, folder: Path) -> Iterator[str]:
    """Write the tokenizer's files, and how to generate with a decoder that does not say; their names."""
    yield from write_assets(program, folder, (MODEL, INDEX))
    if program.task == "text-generation" and GENERATION not in program.assets:
        tokens = {key: program.config[key] for key in _TOKENS if program.config.get(key) is not None}
        write_json(folder / GENERATION, {"_from_model_config": True, **tokens})
        yield GENERATION

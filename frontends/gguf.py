"""GGUF files (llama.cpp's format): weights, configuration and tokenizer, as transformers reads them.

Quantized blocks are dequantized to float32 without loss. The file's own metadata make the configuration and the
tokenizer; nothing beside the file is read.
"""

from __future__ import annotations

import errno
import functools
import importlib.util
import io
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bitlower.frontends._beside import check_generation, check_tokens, plain_config
from bitlower.frontends._gguf_card import gguf_card
from bitlower.frontends._gguf_header import GgufArray, GgufHeader, NotGgufError, read_gguf_header
from bitlower.frontends._promises import Held, check_numbers, check_skeleton
from bitlower.frontends._tokenizer import from_files
from bitlower.frontends.huggingface import PreTrained
from bitlower.frontends.weights import is_large
from bitlower.ir import BitlowerError
from bitlower.ir.assets import read_assets
from bitlower.ir.files import reason
from bitlower.ir.model_card import CARD
from bitlower.ir.quiet import quiet
from bitlower.ir.scratch import scratch_folder
from bitlower.ir.storage import bound_heap, is_mapped, parts, settle, spill

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_TASK = "text-generation"
_NEEDS = ("gguf", "accelerate")


def load_gguf(path: Path, task: str | None = None, *, mapped: bool | None = None) -> PreTrained:
    """Load the causal language model in the file ``path``, in float32; its tokenizer files and a card are assets.

    Args:
        path: the file.
        task: text generation, if any.
        mapped: as for :func:`~bitlower.frontends.load`.

    Raises:
        BitlowerError: a package for reading such files is not installed, the file is damaged or of an architecture
            that transformers does not read, its tokenizer has tokens that its embedding has not, or the task is
            another than text generation.
    """
    if task not in (None, _TASK):
        raise BitlowerError(f"{path} holds a causal language model, which does no {task}", hint=f"the task is {_TASK}")
    for name in _NEEDS:
        if importlib.util.find_spec(name) is None:
            raise BitlowerError(
                f"reading {path.name} needs the package {name}", hint="install it: pip install bitlower[gguf]"
            )
    header, contents = _check_header(path)
    mapped = is_large(contents) if mapped is None else mapped
    try:
        with (
            quiet(),
            redirect_stderr(io.StringIO()),
            _read_once(path, header),
            _to_files(mapped),
        ):  # it draws a bar of its own
            model = _load_model(path, contents)
            assets = _tokenizer_files(path, model)
    except BitlowerError:
        raise
    except Exception as error:  # whatever its libraries raise on damaged files
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise BitlowerError(
            f"{path} cannot be read: {' '.join(str(error).split())[:300]}",
            hint="fetch the file again, or convert it to safetensors",
        ) from None
    if card := gguf_card(header):
        assets[CARD] = card
    _check_weights(path, model)
    _settle(model, mapped=mapped)
    tokenizer = from_files(tuple(sorted(assets.items())), json.dumps(plain_config(model)), str(path))
    notes = check_tokens(tokenizer, model, _TASK, str(path)) + check_generation(assets, model, str(path))
    return PreTrained(model, _TASK, assets, str(path), tuple(notes))


def _check_header(path: Path) -> tuple[GgufHeader, Held]:
    """Hold the header to the file, and its numbers to the tensors, before anything trusts them; what the file holds."""
    try:
        header = read_gguf_header(path)
    except OSError as error:
        raise BitlowerError(f"{path} cannot be opened: {reason(error)}") from None
    except NotGgufError:
        raise BitlowerError(f"{path} is no GGUF file", hint="fetch the file again") from None
    except ValueError as error:
        raise BitlowerError(f"{path} cannot be read: {error}", hint="fetch the file again") from None
    contents = Held(header.shapes, sum(map(math.prod, header.shapes.values())))
    check_numbers(header.values, contents, str(path))
    return header, contents


@contextmanager
def _read_once(path: Path, header: GgufHeader) -> Iterator[None]:
    """Parse the file and the table of names once: transformers does it for each use, and for each module of the model.

    The file is read as plain bytes: each slice of a numpy.memmap costs several times one of an array. Arrays of the
    header, vocabularies among them, are those of ``header``: their entries are plain values, which transformers, who
    asks for all of them three times, need not parse.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reading

    arrays = {array.place: array for array in header.arrays.values()}

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        @property
        def data(self) -> np.ndarray[Any, Any]:
            return self._bytes

        @data.setter
        def data(self, mapped: np.memmap[Any, Any]) -> None:
            self._bytes = mapped.view(np.ndarray)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
            if raw_type != gguf.GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)  # type: ignore[no-any-return]
            entries = _plain_entries(array := arrays[orig_offs])
            kinds = [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType(array.kind)]
            return array.size, entries, list(range(len(entries))), kinds if entries else kinds[:1]

    before = gguf.GGUFReader, gguf.get_tensor_name_map, reading._gguf_parse_value
    parse, reader = before[2], Reader(path)
    gguf.GGUFReader = lambda *args, **options: reader
    gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)
    reading._gguf_parse_value = lambda value, kinds: parse(value, kinds) if isinstance(value, np.ndarray) else value
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map, reading._gguf_parse_value = before


def _plain_entries(array: GgufArray) -> list[Any]:
    """The entries of an array as transformers makes them: numbers, texts decoded."""
    return [entry.decode() if isinstance(entry, bytes) else entry for entry in array.entries]


@contextmanager
def _to_files(wanted: bool) -> Iterator[None]:
    """Where ``wanted``, move each weight to a file before the next is dequantized; transformers holds all of them."""
    from transformers import modeling_gguf_pytorch_utils as reading

    if not wanted:
        yield
        return
    bound_heap()
    before = reading.TENSOR_PROCESSORS
    reading.TENSOR_PROCESSORS = _Spilling(before, reading.TensorProcessor)
    try:
        yield
    finally:
        reading.TENSOR_PROCESSORS = before


class _Spilling(dict[str, type[Any]]):
    """Processors of tensors by architecture, each of which first moves what was read before it."""

    def __init__(self, processors: Mapping[str, type[Any]], general: type[Any]) -> None:
        super().__init__({name: self._spilling(kind) for name, kind in processors.items()})
        self._general = self._spilling(general)

    def get(self, architecture: str, default: object = None) -> type[Any]:
        return super().get(architecture, self._general)

    @staticmethod
    def _spilling(kind: type[Any]) -> type[Any]:
        class Processor(kind):  # type: ignore[misc]
            def process(self, weights: np.ndarray[Any, Any], name: str, **options: Any) -> Any:
                _spill(options["parsed_parameters"]["tensors"])
                return super().process(weights, name, **options)

        return Processor


def _spill(tensors: dict[str, torch.Tensor]) -> None:
    """Move those that are in memory to files."""
    for name, tensor in tensors.items():
        if not is_mapped(tensor):
            tensors[name] = spill(tensor)


def _load_model(path: Path, contents: Held) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    place: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    config = AutoConfig.from_pretrained(path.parent, **place)
    check_skeleton(lambda: AutoModelForCausalLM.from_config(config), contents, str(path))
    model, info = AutoModelForCausalLM.from_pretrained(
        path.parent, config=config, dtype=torch.float32, output_loading_info=True, **place
    )
    lacking = sorted(info["missing_keys"])
    if lacking:
        raise ValueError(f"the weight {lacking[0]} is missing")
    model.config.architectures = [type(model).__name__]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def _tokenizer_files(path: Path, model: PreTrainedModel) -> dict[str, bytes]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, config=model.config, local_files_only=True
    )
    with scratch_folder() as folder:
        tokenizer.save_pretrained(folder)
        files = read_assets(folder)
    files["tokenizer_config.json"] = _portable(files["tokenizer_config.json"])
    if model.generation_config is not None:
        files["generation_config.json"] = model.generation_config.to_json_string().encode()
    return files


def _portable(settings: bytes) -> bytes:
    """The tokenizer's settings under the class name that other libraries know too, without how they were loaded."""
    form = json.loads(settings)
    form = {key: value for key, value in form.items() if key not in ("is_local", "local_files_only")}
    if form.get("tokenizer_class") == "TokenizersBackend":
        form["tokenizer_class"] = "PreTrainedTokenizerFast"
    return json.dumps(form, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def _check_weights(path: Path, model: PreTrainedModel) -> None:
    for name, tensor in model.named_parameters():
        if not all(bool(part.isfinite().all()) for part in parts(tensor)):
            raise BitlowerError(f"{path}: the weight {name!r} holds NaN or Inf", hint="fetch the file again")


def _settle(model: PreTrainedModel, *, mapped: bool) -> None:
    """Put the weights one by one where they are to lie, so that none is held twice for long."""
    for parameter in model.parameters():
        parameter.data = settle(parameter.data, mapped=mapped)

"""Weights of Hugging Face models: safetensors, whole or in shards, in memory or left in their files."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bitlower.frontends._promises import Held, check_numbers, check_skeleton
from bitlower.ir import BitlowerError, json_files
from bitlower.ir.files import reason
from bitlower.ir.quiet import quiet
from bitlower.ir.safetensors_header import read_header
from bitlower.ir.storage import bound_heap, map_safetensors, parts, spill

if TYPE_CHECKING:
    from transformers import PreTrainedModel


IN_MEMORY = 768 << 20
"""Bytes of weights in float32 that are held in memory; more are left in files and read when they are used."""


def is_large(contents: Held) -> bool:
    """Whether the weights of a file are more than :data:`IN_MEMORY`."""
    return 4 * sum(map(math.prod, contents.shapes.values())) > IN_MEMORY


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of a Hugging Face folder; infinite numbers are let through, some configurations hold them.

    Raises:
        BitlowerError: the file cannot be read, is not JSON, or asks for code of its own.
    """
    try:
        value = json_files.read_json(path, finite=False)
    except OSError as error:
        raise BitlowerError(f"{path} cannot be read: {reason(error)}") from None
    except ValueError as error:
        raise BitlowerError(f"{path} is not JSON: {error}") from None
    if "auto_map" in value:
        raise BitlowerError(
            f"{path} asks for remote code (`auto_map`), which is never run",
            hint="use an architecture that ships with transformers",
        )
    return value


def check_weights(folder: Path) -> None:
    """Open every safetensors file: a missing shard, a cut file or a number that is not finite is named here."""
    for path in _weight_files(folder):
        for name, tensor in map_safetensors(path).items():
            if tensor.is_floating_point() and not all(bool(part.isfinite().all()) for part in parts(tensor)):
                raise BitlowerError(f"{path}: the weight {name!r} holds NaN or Inf")


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(n, str) and Path(n).name == n for n in shards.values()):
            raise BitlowerError(f"{index} does not say which file holds which weight", hint="fetch the file again")
        names = sorted(set(shards.values()))
    for name in names:
        if not (folder / name).is_file():
            pickled = any(folder.glob("*.bin"))
            fix = "convert the pickled weights to safetensors" if pickled else "fetch the model again"
            raise BitlowerError(f"the weights {folder / name} are missing", hint=fix)
    return [folder / name for name in names]


def load_weights(folder: Path, task: str, auto_class: str, *, mapped: bool | None = None) -> PreTrainedModel:
    """The model in ``folder`` with float32 weights, checked.

    Args:
        folder: with ``config.json`` and safetensors.
        task: for messages.
        auto_class: the class of transformers that makes the model.
        mapped: leave the weights in files (those of half precision are widened into temporary ones); None: if they
            take more than :data:`IN_MEMORY` bytes in float32.

    Raises:
        BitlowerError: a file is missing or damaged, a weight is missing, has another shape or is not finite.
    """
    import transformers

    contents = _held(folder)
    check_numbers(read_json(folder / "config.json"), contents, f"{folder / 'config.json'}")
    loader = getattr(transformers, auto_class)
    if mapped is None:
        mapped = is_large(contents)
    try:
        with quiet():
            check_skeleton(lambda: _skeleton(folder, loader), contents, f"{folder / 'config.json'}")
            check_weights(folder)
            model, info = (_load_mapped if mapped else _load)(folder, loader)
    except BitlowerError:
        raise
    except Exception as error:  # whatever its libraries raise on a configuration that makes no model
        raise BitlowerError(f"{folder}: transformers cannot load this model: {summary(error)}") from None
    _check_loading(folder, task, info, model)
    return model


def _load(folder: Path, loader: Any) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    model, info = loader.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, local_files_only=True,
        output_loading_info=True, ignore_mismatched_sizes=True,
    )  # fmt: skip
    return model, info


def _load_mapped(folder: Path, loader: Any) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    bound_heap()
    with torch.device("meta"):
        skeleton = _skeleton(folder, loader)
    config, kind = skeleton.config, type(skeleton)
    weights = {
        name: spill(tensor, torch.float32) if _is_half(tensor) else tensor
        for path in _weight_files(folder)
        for name, tensor in map_safetensors(path).items()
    }
    model, info = kind.from_pretrained(
        None, config=config, state_dict=weights, dtype=torch.float32, output_loading_info=True,
        ignore_mismatched_sizes=True,
    )  # fmt: skip
    return model, info


def _skeleton(folder: Path, loader: Any) -> PreTrainedModel:
    """The model that the configuration describes, with weights of its own."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    model: PreTrainedModel = loader.from_config(config)
    return model


def _is_half(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype != torch.float32


def _held(folder: Path) -> Held:
    """What the headers of the files say, of integers as many numbers as they could pack in 2 bits each."""
    shapes: dict[str, tuple[int, ...]] = {}
    numbers = 0
    for path in _weight_files(folder):
        try:
            header = read_header(path)
        except (OSError, ValueError) as error:
            raise BitlowerError(f"{path} is damaged: {reason(error)}", hint="fetch the file again") from None
        shapes |= {name: tensor.shape for name, tensor in header.items()}
        for tensor in header.values():
            numbers += tensor.elements if "F" in tensor.dtype else 4 * (tensor.last - tensor.first)
    return Held(shapes, numbers)


def _check_loading(folder: Path, task: str, info: Mapping[str, Any], model: torch.nn.Module) -> None:
    """Every weight of the model came from the files, in its shape, and no further layer lies in them."""
    if info["mismatched_keys"]:
        name, stored, expected = min(info["mismatched_keys"])
        raise BitlowerError(
            f"{folder}: the weight {name!r} has the shape {list(stored)}, config.json asks for {list(expected)}"
        )
    if info["missing_keys"]:
        raise BitlowerError(
            f"{folder}: the weight {min(info['missing_keys'])!r} is missing", hint=f"is the task {task!r} right?"
        )
    names = set(model.state_dict())
    empty = {path for path, module in model.named_modules() if isinstance(module, torch.nn.ModuleList) and not module}
    layers = [
        name
        for name in info["unexpected_keys"]
        if re.sub(r"\.\d+\.", ".0.", name) in names or re.split(r"\.\d+\.", name, maxsplit=1)[0] in empty
    ]
    if layers:
        raise BitlowerError(f"{folder}: config.json describes fewer layers than the weights hold: {min(layers)!r}")


def model_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by each of their names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def summary(error: Exception) -> str:
    """The text of a foreign error, in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__

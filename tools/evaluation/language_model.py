"""One small interface to causal language models, whatever runs them: a Program, TVM, onnxruntime, or transformers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitlower.backends.artifact import shell
from bitlower.backends.base import Model
from bitlower.backends.running import GraphModel
from bitlower.frontends import load
from bitlower.frontends.context import stated_length
from bitlower.frontends.decoder import cache_argument, cache_of
from bitlower.ir import Batch, BitlowerError, Program
from bitlower.ir.decoder_step import Step, decoder_step, with_memory
from bitlower.ir.files import check_name, reason
from bitlower.ir.folding import with_float_weights
from bitlower.ir.json_files import read_json
from bitlower.ir.quiet import silent
from bitlower.tools.evaluation.artifacts import load_artifact

_READERS = {
    "compressed-tensors": "pip install compressed-tensors accelerate",
    "gptq": "pip install gptqmodel",
}


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with its cache; without one, what was read so far takes its place.

    Args:
        program: for its configuration, tokenizer and inputs; it has no graphs if something else computes.
        step: logits in float32 and the longer cache.
        runtime: what computes.
    """

    program: Program
    step: Step
    runtime: str


Source = Program | Model | LanguageModel | str | os.PathLike[str]


def language_model(model: Source) -> LanguageModel:
    """``model`` behind the interface: a Program, a library or its folder, another artifact's folder, or a float model.

    Raises:
        BitlowerError: it is no causal language model, what reads it is not installed, or an artifact is not as it was
            written.
    """
    if isinstance(model, LanguageModel):
        return model
    if isinstance(model, Program):
        return _of_program(model)
    if not isinstance(model, str | os.PathLike):
        return _of_model(model)
    folder = check_name(model)
    loaded = load_artifact(folder)
    if loaded is not None:
        return _of_model(loaded)
    if (folder / "config.json").is_file() and (method := quantization_of(folder)):
        return _of_checkpoint(folder, method)
    return _of_program(load(model))


def quantization_of(folder: Path) -> str:
    """The ``quant_method`` that the configuration in ``folder`` names; empty if there is none."""
    try:
        form = read_json(folder / "config.json", finite=False).get("quantization_config")
    except (OSError, ValueError) as error:
        raise BitlowerError(f"{folder} holds no readable config.json: {reason(error)}") from None
    return str(form.get("quant_method", "")) if isinstance(form, Mapping) else ""


def _of_program(program: Program) -> LanguageModel:
    run = with_float_weights(program)

    def without_gradients(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return run(**inputs)

    return LanguageModel(program, decoder_step(program, without_gradients), "Program")


def _of_model(model: Model) -> LanguageModel:
    if isinstance(model, GraphModel):
        return LanguageModel(model.program, model.step(), model.runtime)
    return LanguageModel(
        model.program, decoder_step(model.program, lambda inputs: model(**inputs)), type(model).__name__
    )


def _of_checkpoint(folder: Path, method: str) -> LanguageModel:
    """A quantized Hugging Face folder in transformers, in float32."""
    from transformers import AutoModelForCausalLM

    try:
        with silent():
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
            ).eval()
    except ImportError as error:
        hint = _READERS.get(method, f"it needs what reads {method!r}")
        raise BitlowerError(f"{folder} cannot be read by transformers: {_first_line(error)}", hint=hint) from None
    except Exception as error:  # whatever transformers and the method's library raise on what they cannot read
        raise BitlowerError(f"{folder} cannot be read by transformers: {_first_line(error)}") from None

    cached, argument = hasattr(model.config, "use_cache"), cache_argument(model)

    def step(feed: Batch, cache: Any) -> tuple[torch.Tensor, Any]:
        options = {argument: cache, "use_cache": True} if cached else {}
        with torch.no_grad(), silent():  # packed weights may be unfolded at the first run
            outputs = model(input_ids=feed["input_ids"], attention_mask=feed["attention_mask"], **options)
        return outputs.logits.float(), cache_of(outputs) if cached else None

    program = shell(folder)
    program.context_length = program.context_length or stated_length(model.config)
    return LanguageModel(program, with_memory(step, cached), "transformers")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

"""One small interface to causal language models, whatever runs them: a Program, TVM, onnxruntime, or transformers."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitlower.backends.artifact import shell
from bitlower.backends.base import Model
from bitlower.backends.decoding import has_cache
from bitlower.backends.onnx_qdq import OnnxModel
from bitlower.backends.tvm_kernels import Library
from bitlower.frontends import load
from bitlower.frontends.context import stated_length
from bitlower.frontends.decoder import cache_argument, cache_of
from bitlower.frontends.tokenize import positions
from bitlower.ir import Batch, BitlowerError, Program
from bitlower.ir.files import check_name, reason
from bitlower.ir.folding import with_float_weights
from bitlower.ir.json_files import read_json
from bitlower.ir.quiet import quiet
from bitlower.ir.stages import next_past
from bitlower.ir.tasks import TEXT_GENERATION
from bitlower.ir.tokens import MASK, SEQUENCE, TOKENS
from bitlower.tools.evaluation.artifacts import load_artifact

Step = Callable[[Batch, Any], tuple[torch.Tensor, Any]]
_READERS = {
    "compressed-tensors": "pip install compressed-tensors accelerate",
    "gptq": "pip install gptqmodel",
}


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with its cache; without one, what was read so far takes its place.

    Args:
        program: for its configuration, tokenizer and inputs; it has no graphs if something else computes.
        step: takes ``input_ids`` ``[batch, sequence]``, ``attention_mask`` ``[batch, past + sequence]`` and
            ``position_ids``, and a cache (None: empty); returns logits ``[batch, sequence, vocabulary]`` in float32 and
            the cache with the new tokens in it.
        runtime: what computes.
    """

    program: Program
    step: Step
    runtime: str

    @property
    def stops(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        stop = self.program.config.get("eos_token_id")
        return () if stop is None else tuple(stop) if isinstance(stop, list) else (int(stop),)


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
    return _of_inputs(program, with_float_weights(program), "Program")


def _of_inputs(program: Program, run: Callable[..., dict[str, torch.Tensor]], runtime: str) -> LanguageModel:
    """What takes its cache as inputs and returns it as outputs, by name."""
    _check(program)

    def step(feed: Batch, cache: Any) -> tuple[torch.Tensor, Any]:
        with torch.no_grad():
            outputs = run(**_step_inputs(program, feed), **(cache or {}))
        return outputs["logits"], next_past(outputs)

    return LanguageModel(program, _with_memory(step, has_cache(program)), runtime)


def _of_model(model: Model) -> LanguageModel:
    if isinstance(model, Library):
        return _of_library(model)
    if isinstance(model, OnnxModel):
        return _of_onnx(model)
    return _of_inputs(model.program, model, type(model).__name__)


def _of_library(library: Library) -> LanguageModel:
    """A library of kernels; the cache stays in its own memory from step to step."""
    program = library.program
    _check(program)

    def step(feed: Batch, cache: Any) -> tuple[torch.Tensor, Any]:
        results = library.run({**_step_inputs(program, feed), **(cache or {})})
        logits = torch.from_numpy(results["logits"].numpy())
        return logits, next_past(results)

    return LanguageModel(program, _with_memory(step, has_cache(program)), "TVM")


def _of_onnx(model: OnnxModel) -> LanguageModel:
    """The artifact in onnxruntime; the cache stays in its own memory from step to step."""
    from onnxruntime import OrtValue

    session, program = model.session, model.program
    _check(program)
    names = [spec.name for spec in program.outputs]

    def step(feed: Batch, cache: Any) -> tuple[torch.Tensor, Any]:
        inputs = program.complete(_step_inputs(program, feed))
        values = {n: OrtValue.ortvalue_from_numpy(t.numpy()) for n, t in inputs.items() if not (cache and n in cache)}
        results = dict(zip(names, session.run_with_ort_values(names, values | (cache or {})), strict=True))
        logits = torch.from_numpy(results["logits"].numpy())
        return logits, next_past(results)

    return LanguageModel(program, _with_memory(step, has_cache(program)), "onnxruntime")


def _of_checkpoint(folder: Path, method: str) -> LanguageModel:
    """A quantized Hugging Face folder in transformers, in float32."""
    from transformers import AutoModelForCausalLM

    try:
        with quiet(), redirect_stderr(io.StringIO()):  # the libraries draw bars of their own
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
        with torch.no_grad():
            outputs = model(input_ids=feed["input_ids"], attention_mask=feed["attention_mask"], **options)
        return outputs.logits.float(), cache_of(outputs) if cached else None

    program = shell(folder)
    program.context_length = program.context_length or stated_length(model.config)
    return LanguageModel(program, _with_memory(step, cached), "transformers")


def _with_memory(step: Step, cached: bool) -> Step:
    """``step`` itself; for a model without a cache, one whose cache is the tokens so far, which it runs all again."""
    if cached:
        return step

    def whole(feed: Batch, cache: Any) -> tuple[torch.Tensor, Any]:
        ids, mask = feed["input_ids"], feed["attention_mask"]
        tokens = ids if cache is None else torch.cat([cache, ids], dim=1)
        logits, _ = step({"input_ids": tokens, "attention_mask": mask, "position_ids": positions(mask)}, None)
        return logits[:, -ids.shape[1] :], tokens

    return whole


def _step_inputs(program: Program, feed: Batch) -> dict[str, torch.Tensor]:
    """What ``program`` takes of ``feed``; a mask of the step's own tokens where it takes no other."""
    inputs = {spec.name: feed[spec.name] for spec in program.inputs if spec.name in feed}
    for spec in program.inputs:
        if spec.name == MASK and spec.type.shape[1:] == (SEQUENCE,):
            inputs[MASK] = feed[MASK][:, -feed[TOKENS].shape[1] :]
    return inputs


def _check(program: Program) -> None:
    if "logits" not in [s.name for s in program.outputs] or "input_ids" not in [s.name for s in program.inputs]:
        raise BitlowerError(f"{program.source or 'the model'} is no causal language model", hint="is the task right?")
    if program.task and program.task != TEXT_GENERATION:
        raise BitlowerError(f"{program.source or 'the model'} is for {program.task}, not for {TEXT_GENERATION}")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

"""Hugging Face models, encoders and decoders: load from safetensors, trace through transformers' own exporter."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bitlower.frontends._beside import check_padding, collect, plain_config
from bitlower.frontends._context import context_length, stated_length
from bitlower.frontends._decoder import Signature
from bitlower.frontends._trace import check_replay, evaluating, explain_failure, releasing, to_program
from bitlower.frontends._weights import load_weights, quiet, read_json
from bitlower.ir import BitlowerError, Program, nearest, shorten

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TASKS = {
    "feature-extraction": "AutoModel",
    "text-classification": "AutoModelForSequenceClassification",
    "text-generation": "AutoModelForCausalLM",
}
_ARCHITECTURES = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForSequenceClassification": "text-classification",
    "Model": "feature-extraction",
}
_TRACE_SHAPE = (2, 10)
_REPLAY_SHAPE = (1, 7)
_DECODER_TRACE_SHAPE = {"batch": 2, "past": 5, "sequence": 3}
_DECODER_REPLAY_SHAPES = ({"batch": 1, "past": 0, "sequence": 6}, {"batch": 3, "past": 4, "sequence": 1})


@dataclass
class PreTrained:
    """A model in memory and what belongs to it."""

    model: PreTrainedModel
    task: str | None = None
    assets: dict[str, bytes] = field(default_factory=dict)
    source: str = ""
    notes: tuple[str, ...] = ()


def is_huggingface(model: torch.nn.Module) -> bool:
    """Whether ``model`` is one of transformers' models."""
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def load_folder(folder: Path, *, task: str | None = None, source: str = "", mapped: bool | None = None) -> Program:
    """Load and trace the model in ``folder``; ``mapped`` as for :func:`~bitlower.frontends.load`.

    Raises:
        BitlowerError: weights are missing, truncated or mis-shaped, the configuration asks for remote code, the task is
            unknown, the tokenizer has tokens that the model has not, or the model cannot be traced.
        CheckError: the tokenizer reads files that do not go along.
    """
    config = read_json(folder / "config.json")
    check_padding(config, source or str(folder))
    architectures = config.get("architectures")
    listed = architectures if isinstance(architectures, list) else []
    task = task or _task_of([shorten(name) for name in listed if isinstance(name, str)], f"{folder}: ")
    _check_task(task)
    model = load_weights(folder, task, TASKS[task], mapped=mapped)
    assets, notes = collect(folder, model, task, source or str(folder))
    return trace_model(PreTrained(model, task, assets, source or str(folder), tuple(notes)))


def trace_model(pretrained: PreTrained, *, example_inputs: Mapping[str, torch.Tensor] | None = None) -> Program:
    """Trace a Hugging Face model with dynamic batch and sequence, in float32; the model itself is left as it is.

    Raises:
        BitlowerError: the task is unknown, the model does not read token ids, or it cannot be traced.
        CheckError: its trace computes something else at another shape.
    """
    model = pretrained.model
    _check_task(pretrained.task)
    if example_inputs is None and model.main_input_name != "input_ids":
        raise BitlowerError(
            f"{type(model).__name__} reads {model.main_input_name}, not token ids", hint="pass `example_inputs`"
        )
    if any(tensor.is_floating_point() and tensor.dtype != torch.float32 for tensor in model.parameters()):
        model = copy.deepcopy(model).float()
    with evaluating(model):
        return _trace(model, pretrained, example_inputs)


def _trace(
    model: PreTrainedModel, pretrained: PreTrained, example_inputs: Mapping[str, torch.Tensor] | None
) -> Program:
    task = pretrained.task or _task_of([type(model).__name__], "")
    if task == "text-generation" and example_inputs is None:
        program = _trace_decoder(model)
    else:
        program = _trace_encoder(model, task, example_inputs)
    program.config = plain_config(model)
    program.assets = dict(pretrained.assets)
    program.notes = (*pretrained.notes, *program.notes)
    program.source = pretrained.source or type(model).__name__
    program.context_length = context_length(program, stated_length(model.config))
    return program


def _trace_encoder(model: PreTrainedModel, task: str, example_inputs: Mapping[str, torch.Tensor] | None) -> Program:
    inputs = dict(example_inputs) if example_inputs else _sample_inputs(model, _TRACE_SHAPE)
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence", max=_longest(model))
    shapes = {name: {0: batch, 1: sequence} if value.dim() > 1 else {0: batch} for name, value in inputs.items()}
    program = to_program(_export(model, inputs, shapes), task=task)
    if example_inputs is None:
        replay = _sample_inputs(model, _REPLAY_SHAPE)
        with torch.no_grad(), releasing(model):
            expected = model(**replay)
        check_replay(program, expected, replay, type(model).__name__)
    return program


def _trace_decoder(model: PreTrainedModel) -> Program:
    """A causal language model with its KV cache in the signature."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise BitlowerError(f"{type(model).__name__} has an encoder of its own, which is not supported")
    with explain_failure(type(model).__name__), releasing(model):
        signature = Signature.of(model)
    vocabulary = model.config.vocab_size
    sample = signature.sample(vocabulary, **_DECODER_TRACE_SHAPE)
    exported = _export(model, signature.arguments(sample), signature.dynamic_shapes())
    names = signature.outputs()
    program = to_program(exported, task="text-generation", inputs=signature.inputs(), outputs=names)
    for shape in _DECODER_REPLAY_SHAPES:
        replay = signature.sample(vocabulary, **shape)
        with torch.no_grad(), releasing(model):
            expected = signature.flatten(model(**signature.arguments(replay)))
        check_replay(program, expected, replay, type(model).__name__)
    return program


def _export(model: PreTrainedModel, inputs: dict[str, Any], shapes: dict[str, Any]) -> torch.export.ExportedProgram:
    from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter

    with quiet(), explain_failure(type(model).__name__):
        exported = DynamoExporter().export(model, inputs, config=DynamoConfig(dynamic_shapes=shapes))
    program: torch.export.ExportedProgram = exported.program
    return program


def _check_task(task: str | None) -> None:
    if task is not None and task not in TASKS:
        raise BitlowerError(f"unknown task {task!r}", hint=nearest(task, TASKS))


def _task_of(architectures: list[str], where: str) -> str:
    for architecture in architectures:
        for suffix, task in _ARCHITECTURES.items():
            if architecture.endswith(suffix):
                return task
    raise BitlowerError(
        f"{where}the architecture {', '.join(architectures) or '(none given)'} fits no task",
        hint=f"name one of {', '.join(TASKS)} as the task",
    )


def _sample_inputs(model: PreTrainedModel, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Token ids from a fixed generator, a mask with padding in it, token types where the model has them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, shape, generator=generator)
    mask = torch.ones(shape, dtype=torch.int64)
    mask[-1, -2:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if getattr(model.config, "type_vocab_size", 0) > 0:
        inputs["token_type_ids"] = torch.zeros(shape, dtype=torch.int64)
    return inputs


def _longest(model: PreTrainedModel) -> int | None:
    longest = getattr(model.config, "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > _TRACE_SHAPE[1] else None

"""Hugging Face models, encoders and decoders: load from safetensors, trace through transformers' own exporter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bitlower.frontends._beside import check_float, check_padding, collect, plain_config
from bitlower.frontends._encoder import export, plain_outputs, trace_encoder, trace_given
from bitlower.frontends._failure import explain_failure
from bitlower.frontends._layers import representatives, shortened
from bitlower.frontends._pictures import caption_inputs, picture_inputs
from bitlower.frontends._precision import in_float32
from bitlower.frontends._samples import EncoderInputs, text_inputs
from bitlower.frontends._sounds import sound_inputs
from bitlower.frontends._tasks import check_task, refuse_class, refuse_folder, refuse_texts_of_sound, task_of
from bitlower.frontends._trace import check_replay, evaluating, releasing, to_program
from bitlower.frontends.context import context_length, stated_length
from bitlower.frontends.decoder import Signature
from bitlower.frontends.encoder_decoder import EncoderDecoder
from bitlower.frontends.trace_cache import traced
from bitlower.frontends.weights import load_weights, read_json
from bitlower.ir import Length, Program, shorten
from bitlower.ir.quiet import quiet
from bitlower.ir.tasks import TASKS, TEXT_GENERATION, auto_class
from bitlower.ir.tokens import ENCODER_SEQUENCE, SEQUENCE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TRACE_SIZES = {"batch": 2, "past": 5, "sequence": 3, "encoder_sequence": 12}
_REPLAY_SIZES = (
    {"batch": 1, "past": 0, "sequence": 6, "encoder_sequence": 9},
    {"batch": 3, "past": 4, "sequence": 1, "encoder_sequence": 14},
)
_SCAN_TRACE = {"sequence": 37}
_SCAN_REPLAY = {"batch": 3, "past": 0, "sequence": 70}
"""Of models with states of a fixed size, which may scan the tokens in blocks: several blocks, and another number."""

_NO_MASKS = {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}
"""Sound is masked in training alone: a model with these settings has no vector for it, which no run reads."""


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


def read_folder(folder: Path, *, task: str | None = None, source: str = "", mapped: bool | None = None) -> PreTrained:
    """The model in ``folder`` and what belongs to it; ``mapped`` as for :func:`~bitlower.frontends.load`.

    Raises:
        BitlowerError: weights are missing, truncated or mis-shaped, the configuration asks for remote code, the task is
            unknown, or the tokenizer has tokens that the model has not.
        CheckError: the tokenizer reads files that do not go along.
    """
    config = read_json(folder / "config.json")
    check_float(config, source or str(folder))
    check_padding(config, source or str(folder))
    named = config.get("architectures")
    architectures = [shorten(name) for name in named if isinstance(name, str)] if isinstance(named, list) else []
    check_task(task)
    task = task or task_of(architectures, f"{folder}: ")
    refuse_texts_of_sound(architectures, task)
    kind = auto_class(task, architectures)
    refuse_folder(folder, kind, task)
    model = load_weights(folder, task, kind, mapped=mapped)
    assets, notes = collect(folder, model, task, source or str(folder))
    return PreTrained(model, task, assets, source or str(folder), tuple(notes))


def trace_few_layers(pretrained: PreTrained, traces: Path | None = None) -> Program:
    """The trace of a model with the first of its layers of each kind alone; of them all, where they do not repeat.

    Raises:
        BitlowerError, CheckError: as :func:`trace_model`.
    """
    layers = representatives(pretrained.model)
    if layers is None:
        return trace_model(pretrained, traces=traces)
    with shortened(pretrained.model, layers):
        program = trace_model(pretrained, traces=traces)
    program.notes += (f"{len(layers.traced)} of {len(layers.stands_for)} layers",)
    return program


def trace_model(
    pretrained: PreTrained, *, example_inputs: Mapping[str, torch.Tensor] | None = None, traces: Path | None = None
) -> Program:
    """Trace a Hugging Face model with dynamic batch and sequence, in float32; the model itself is left as it is.

    Raises:
        BitlowerError: the task is unknown, the model does not read token ids, or it cannot be traced.
        CheckError: its trace computes something else at another shape.
    """
    check_task(pretrained.task)
    if example_inputs is None:
        kind = type(pretrained.model)
        refuse_class(kind, pretrained.model.config, pretrained.task or task_of([kind.__name__], ""))
    model, note = in_float32(pretrained.model)
    with evaluating(model):
        program = _trace(model, pretrained, example_inputs, traces)
    program.notes += note
    return program


def _trace(
    model: PreTrainedModel,
    pretrained: PreTrained,
    example_inputs: Mapping[str, torch.Tensor] | None,
    traces: Path | None,
) -> Program:
    task = pretrained.task or task_of([type(model).__name__], "")
    generates = (task == TEXT_GENERATION or TASKS[task].sequence_to_sequence) and example_inputs is None
    with plain_outputs(model, keep_cache=generates) as changed:
        if generates:
            program = _trace_decoder(model, task, traces)
        elif example_inputs is None:
            program = trace_encoder(model, task, _inputs(model, task, pretrained.assets), traces)
        else:
            program = trace_given(model, task, example_inputs)
        program.config = plain_config(model) | (_NO_MASKS if TASKS[task].sounds else {})
    program.assets = dict(pretrained.assets)
    program.notes = (*pretrained.notes, *program.notes)
    program.source = pretrained.source or type(model).__name__
    program.context_length = _longest(program, model, SEQUENCE)
    if ENCODER_SEQUENCE in (dim for spec in program.inputs for dim in spec.type.shape):
        longest = _longest(program, model, ENCODER_SEQUENCE)
        if longest is not None:
            length = program.lengths.get(ENCODER_SEQUENCE, Length())
            program.lengths[ENCODER_SEQUENCE] = replace(length, maximum=longest)
    if changed:
        outputs = ", ".join(spec.name for spec in program.outputs if "." not in spec.name)
        program.notes += (f"the configuration sets {', '.join(changed)} otherwise: the model gives {outputs} here",)
    return program


def _inputs(model: PreTrainedModel, task: str, assets: Mapping[str, bytes]) -> EncoderInputs:
    """What a model reads that does its task in one run."""
    if TASKS[task].pictures:
        return picture_inputs(model, assets)
    if TASKS[task].sounds:
        return sound_inputs(model, assets)
    return caption_inputs(model, assets) if TASKS[task].captions else text_inputs(model)


def _longest(program: Program, model: PreTrainedModel, dim: str) -> int | None:
    """The most tokens along ``dim``, as the graph and what torch found allow it."""
    limits = [
        context_length(program, stated_length(model.config), dim),
        program.lengths.get(dim, Length()).longest,
    ]
    return min((tokens for tokens in limits if tokens is not None), default=None)


def _trace_decoder(model: PreTrainedModel, task: str, traces: Path | None) -> Program:
    """A model that generates token by token, with its KV cache in the signature."""
    kind = EncoderDecoder if TASKS[task].sequence_to_sequence else Signature
    with explain_failure(type(model).__name__), releasing(model):
        signature = kind.of(model)

    def trace() -> Program:
        with releasing(model):
            present = kind.of(model)  # which may lack layers
        sample = present.sample(model, _TRACE_SIZES | (_SCAN_TRACE if present.scans else {}))
        exported, notes = export(model, present.arguments(sample), present.dynamic_shapes())
        program = to_program(
            exported,
            task=task,
            inputs=present.inputs(),
            outputs=present.traced_outputs(),
            keep=set(present.outputs()).__contains__,
        )
        # the tokens of a step and those before have one limit together, which is the context's
        program.lengths = {name: value for name, value in program.lengths.items() if name == ENCODER_SEQUENCE}
        program.notes += notes
        return program

    def check(program: Program) -> None:
        for sizes in (*_REPLAY_SIZES, *((_SCAN_REPLAY,) if signature.scans else ())):
            replay = signature.sample(model, sizes)
            with torch.no_grad(), releasing(model), quiet():
                expected = signature.flatten(model(**signature.arguments(replay)))
            check_replay(program, expected, replay, type(model).__name__)

    program = traced(model, task, trace, check, traces)
    if not signature.caches:
        program.notes += (
            f"{type(model).__name__} has no KV cache: each new token costs a run over all before it, and ONNX comes"
            " without the description for onnxruntime-genai",
        )
    return program

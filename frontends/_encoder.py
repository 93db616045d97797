"""Encoders and heads of transformers: traced with whatever torch finds to vary, at a length that the model takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from bitlower.frontends._failure import explain_failure
from bitlower.frontends._patches import open_sizes
from bitlower.frontends._samples import EncoderInputs
from bitlower.frontends._trace import check_replay, releasing, to_program, unchanged
from bitlower.frontends.trace_cache import traced
from bitlower.ir import BitlowerError, Length, Program
from bitlower.ir.experts import experts_as_linears
from bitlower.ir.quiet import quiet
from bitlower.ir.tasks import TASKS
from bitlower.ir.tokens import SEQUENCE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROWS = 2
"""A batch of one would be taken for a constant."""
_FLAGS: dict[str, Any] = {
    "use_cache": False,
    "use_mems_eval": False,
    "output_hidden_states": False,
    "output_attentions": False,
    "return_dict": True,
}
"""What a configuration says about the outputs, as it must be for those of the task to come, and these alone."""
_CACHES = ("use_cache", "use_mems_eval")


@contextmanager
def plain_outputs(model: PreTrainedModel, *, keep_cache: bool = False) -> Iterator[tuple[str, ...]]:
    """Let ``model`` give the outputs of its task by name for a while; the flags that were otherwise, for a note.

    Args:
        model: left as it is.
        keep_cache: leave the cache of keys and values to the caller.
    """
    config, before = model.config, {}
    for flag, value in _FLAGS.items():
        if hasattr(config, flag) and getattr(config, flag) != value and not (keep_cache and flag in _CACHES):
            before[flag] = getattr(config, flag)
            setattr(config, flag, value)
    try:
        yield tuple(flag for flag in before if flag not in _CACHES)
    finally:
        for flag, value in before.items():
            setattr(config, flag, value)


class Traced(NamedTuple):
    """What torch traced, and what there is to say about how."""

    exported: torch.export.ExportedProgram
    notes: tuple[str, ...]


def export(model: PreTrainedModel, inputs: dict[str, Any], shapes: dict[str, Any]) -> Traced:
    """Trace ``model`` through transformers' own exporter.

    Raises:
        BitlowerError: it cannot be traced.
    """
    from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter

    linears = experts_as_linears(model)
    with quiet(), explain_failure(type(model).__name__), linears, unchanged(model), open_sizes() as notes:
        exported = DynamoExporter().export(model, inputs, config=DynamoConfig(dynamic_shapes=shapes))
    return Traced(exported.program, tuple(dict.fromkeys(notes)))


def trace_encoder(model: PreTrainedModel, task: str, inputs: EncoderInputs, traces: Path | None) -> Program:
    """A model that does its task in one run, as a Program; compared with the model at two batch sizes and lengths.

    Raises:
        BitlowerError: it cannot be traced, or computes with a fixed length.
        CheckError: its trace computes something else at another shape.
    """
    shapes = inputs.shapes

    def trace() -> Program:
        sample = inputs.draw(_ROWS, _length(model, inputs))
        auto = torch.export.Dim.AUTO
        dynamic = {
            name: {axis: auto for axis, dim in enumerate(dims) if isinstance(dim, str)} for name, dims in shapes.items()
        }
        exported, notes = export(model, sample, dynamic)
        program = to_program(exported, task=task, inputs=shapes, keep=_kept(exported, task))
        length = program.lengths.get(SEQUENCE, Length())
        if length.minimum == length.maximum:
            del program.lengths[SEQUENCE]  # the comparison says whether what torch took for equal matters
        program.notes += (*inputs.notes, *notes, *_shorter(program, model))
        return program

    def check(program: Program) -> None:
        for rows, length in inputs.replays:
            replay = inputs.draw(rows, _taken(program.lengths.get(SEQUENCE, Length()), length))
            with torch.no_grad(), releasing(model), unchanged(model):
                expected = model(**replay)
            check_replay(program, expected, replay, type(model).__name__)

    return traced(model, f"encoder for {task} of {dict(shapes)}", trace, check, traces)


def _shorter(program: Program, model: PreTrainedModel) -> tuple[str, ...]:
    """A note where the trace holds for fewer tokens than the configuration promises."""
    longest = program.lengths.get(SEQUENCE, Length()).longest
    promised = getattr(model.config, "max_position_embeddings", None)
    if longest is None or not isinstance(promised, int) or longest >= promised:
        return ()
    name = type(model).__name__
    return (f"{name} takes at most {longest} of its {promised} tokens here: longer texts it computes in another way",)


def trace_given(model: PreTrainedModel, task: str, example_inputs: Mapping[str, torch.Tensor]) -> Program:
    """A model on inputs of the caller's; names of dimensions come from what torch finds equal.

    Raises:
        BitlowerError: it cannot be traced.
    """
    inputs = dict(example_inputs)
    auto = torch.export.Dim.AUTO
    dynamic = {name: dict.fromkeys(range(value.dim()), auto) for name, value in inputs.items()}
    exported, notes = export(model, inputs, dynamic)
    program = to_program(exported, task=task, keep=_kept(exported, task))
    program.notes += notes
    return program


def _length(model: PreTrainedModel, inputs: EncoderInputs) -> int:
    """The first of the lengths that the model runs with."""
    failure: BitlowerError | None = None
    for length in inputs.lengths:
        try:
            with explain_failure(type(model).__name__), torch.no_grad(), releasing(model), unchanged(model):
                model(**inputs.draw(_ROWS, length))
            return length
        except BitlowerError as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _taken(length: Length, tokens: int) -> int:
    wanted = length.padded(tokens)
    return wanted if length.takes(wanted) else length.longest or tokens


def _kept(exported: torch.export.ExportedProgram, task: str) -> Any:
    """Which outputs are the task's: those that it names, if the model returns them; else all that have a name."""
    spec = exported.call_spec.out_spec
    keys = spec.context if spec is not None and isinstance(spec.context, list) else []
    wanted = [name for name in TASKS[task].outputs if name in keys]
    return set(wanted or keys).__contains__ if keys else lambda name: True

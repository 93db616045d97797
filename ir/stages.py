"""The two stages of an encoder-decoder: what reads the source once, and what writes the target token by token.

Passes see one graph, from the source and the target to the next token, so that statistics, permutations and losses
cross from one side to the other as within a side. What is deployed are two: the ``encoder`` ends with the keys and
values of every cross-attention, which are computed once a source and not once a token, and the ``decoder`` takes them
beside its own. Names are those of the ONNX ecosystem (``past_key_values.0.decoder.key``, ``….encoder.key``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import fx

from bitlower.ir._stage import StageGraph
from bitlower.ir.dataflow import QUANTIZER, VIEWS, ancestors
from bitlower.ir.diagnostics import BitlowerError
from bitlower.ir.fit import ValueSpec
from bitlower.ir.operators import graph_results
from bitlower.ir.program import Program
from bitlower.ir.tokens import (
    BATCH,
    ENCODER_PAST,
    MASK,
    PAST_NAME,
    PRESENT_NAME,
    SOURCE_MASK,
    TARGET,
    TARGET_MASK,
    TOKENS,
)
from bitlower.ir.types import TensorType

T = TypeVar("T")
ENCODER, DECODER = "encoder", "decoder"
OWN, CROSS = "decoder.", "encoder."
"""In the names of keys and values: whose they are."""
STATES = "encoder_hidden_states"
"""What every cross-attention reads, ``[batch, positions, width]``: an output of the encoder where it is asked for, and
an input of a decoder that computes the keys and values of cross-attention itself."""
HIDDEN = "last_hidden_state"
"""What an encoder returns for such a decoder."""
aten = torch.ops.aten
_RENAMED = {TARGET: TOKENS, MASK: SOURCE_MASK}
"""Inputs of the decoder, where its graph stands alone."""


def is_encoder_decoder(program: Program) -> bool:
    """Whether ``program`` reads a source and writes a target."""
    return any(spec.name == TARGET for spec in program.inputs)


def is_cross(name: str) -> bool:
    """Whether an output of an encoder-decoder is the keys or values of a cross-attention."""
    return name.startswith(PRESENT_NAME) and f".{CROSS}" in name


def enters_cross(name: str) -> bool:
    """Whether an input of the decoder is the keys or values of a cross-attention, the same at each step."""
    return name.startswith(PAST_NAME) and f".{CROSS}" in name


def encoder_batch(batch: Mapping[str, T]) -> dict[str, T]:
    """What the encoder takes of a batch of the whole."""
    return {name: value for name, value in batch.items() if not _is_of_target(name)}


def decoder_batch(batch: Mapping[str, T], cross: Mapping[str, T]) -> dict[str, T]:
    """What the decoder takes of a batch of the whole, and of ``cross``, the outputs of the encoder for it."""
    own = {_RENAMED.get(name, name): value for name, value in batch.items() if _is_read_by_decoder(name)}
    entering = {STATES if name == HIDDEN else _entering(name): value for name, value in cross.items() if name != STATES}
    return own | entering


def crossing(outputs: Mapping[str, T]) -> dict[str, T]:
    """What an encoder returned that is an output of the whole: keys and values of cross-attention."""
    return {name: value for name, value in outputs.items() if is_cross(name)}


def next_past(outputs: Mapping[str, T]) -> dict[str, T]:
    """What a decoder returned of its own keys, values and states, as the past of its next step."""
    return {_entering(name): value for name, value in outputs.items() if name.startswith(PRESENT_NAME)}


def whole_inputs(encoder: Iterable[ValueSpec], decoder: Iterable[ValueSpec]) -> tuple[ValueSpec, ...]:
    """The inputs of an encoder-decoder from those of its stages; the mask of the target is not among them."""
    names = {new: old for old, new in _RENAMED.items()}
    whole = {spec.name: spec for spec in encoder}
    for spec in decoder:
        name = names.get(spec.name, spec.name)
        if name != STATES and not enters_cross(name):
            whole.setdefault(name, replace(spec, name=name))
    return tuple(whole.values())


def split_stages(program: Program, *, states: bool = False) -> dict[str, Program]:
    """The ``encoder`` and the ``decoder`` of an encoder-decoder; tensors are shared with ``program``.

    The encoder takes the source and returns ``present.N.encoder.key`` and ``.value``. The decoder takes ``input_ids``
    (of the target), ``encoder_attention_mask`` where the source has a mask, ``past_key_values.N.decoder.key`` …, which
    are its own, and ``past_key_values.N.encoder.key`` …; it returns ``logits`` and its own keys and values.

    Args:
        program: whole.
        states: whether the encoder returns :data:`STATES` too: as cross-attention reads them, in few bits and in the
            order of channels that passes left.

    Raises:
        BitlowerError: it is none, or its decoder reads more of the source than keys, values and the mask.
    """
    if not is_encoder_decoder(program):
        raise BitlowerError(f"{program.source or 'the model'} is no encoder with a decoder")
    return {ENCODER: _encoder(program, states), DECODER: _decoder(program)}


def split_at_states(program: Program) -> dict[str, Program]:
    """The ``encoder`` and the ``decoder`` of an encoder-decoder, as clients of optimum's layout read them.

    The encoder returns :data:`HIDDEN`, the last values that all keys and values of cross-attention come from, before
    any of them is rounded. The decoder takes it as :data:`STATES`, and beside it ``past_key_values.N.encoder.key`` …
    ``[batch, heads, encoder_past, width]``: at first without positions, later with all. It computes the keys and values
    of those positions that it is not handed, and returns all of them beside its own; else it is that of
    :func:`split_stages`.

    Raises:
        BitlowerError: it is none, its decoder reads more of the source than keys, values and the mask, or keys and
            values come from no one value.
    """
    if not is_encoder_decoder(program):
        raise BitlowerError(f"{program.source or 'the model'} is no encoder with a decoder")
    cross = {spec: node for spec, node in _results(program) if is_cross(spec.name)}
    hidden = _source_states(program, list(cross.values()))
    sources = {_placeholder(program, spec): spec for spec in program.inputs if not _is_of_target(spec.name)}
    encoder = StageGraph(program, sources).program({ValueSpec(HIDDEN, hidden.meta["type"]): hidden})
    return {ENCODER: encoder, DECODER: _computing_decoder(program, hidden, cross)}


def _computing_decoder(program: Program, states: fx.Node, cross: Mapping[ValueSpec, fx.Node]) -> Program:
    """The decoder of :func:`split_at_states`, layer by layer its own keys and values before those of the source."""
    inputs = _inputs_of_decoder(program, past=False)
    inputs[states] = ValueSpec(STATES, states.meta["type"])
    cached = sorted(((s, n) for s, n in _results(program) if s.name.startswith(PRESENT_NAME)), key=_place_in_cache)
    past = {spec.name: _placeholder(program, spec) for spec in program.inputs if spec.name.startswith(PAST_NAME)}
    for spec, node in cached:
        name = _entering(spec.name)
        known = node if spec in cross else past[name]
        inputs[known] = ValueSpec(name, _handed(spec.type) if spec in cross else known.meta["type"])
    stage = StageGraph(program, inputs)
    stage.let_all_count(_named_placeholder(program, TARGET_MASK))
    stage.compute_rest(states, {node: stage.copies.pop(node) for node in cross.values()})
    logits = {spec: node for spec, node in _results(program) if not spec.name.startswith(PRESENT_NAME)}
    return stage.program(logits | dict(cached))


def _place_in_cache(result: tuple[ValueSpec, fx.Node]) -> tuple[int, bool]:
    """Of ``present.N.…``: the layer, and whether it is of the source, which come behind those of the target."""
    name = result[0].name
    return int(name.removeprefix(PRESENT_NAME).partition(".")[0]), is_cross(name)


def _handed(kind: TensorType) -> TensorType:
    """The type of keys and values ``[batch, heads, positions, width]`` of those positions that are known."""
    batch, heads, _, width = kind.shape
    return TensorType(kind.dtype, (batch, heads, ENCODER_PAST, width))


def _encoder(program: Program, states: bool) -> Program:
    results = {spec: node for spec, node in _results(program) if is_cross(spec.name)}
    if states:
        node = _states(program.graph, list(results.values()))
        results[ValueSpec(STATES, node.meta["type"])] = node
    inputs = {_placeholder(program, spec): spec for spec in program.inputs if not _is_of_target(spec.name)}
    return StageGraph(program, inputs).program(results)


def _inputs_of_decoder(program: Program, *, past: bool = True) -> dict[fx.Node, ValueSpec]:
    """What the decoder takes of what the whole does, the target first; if wanted, what earlier tokens left."""
    named = {spec.name: spec for spec in program.inputs}
    wanted = [name for name in named if _is_read_by_decoder(name) and (past or not name.startswith(PAST_NAME))]
    wanted.sort(key=lambda name: name != TARGET)
    return {_placeholder(program, named[n]): replace(named[n], name=_RENAMED.get(n, n)) for n in wanted}


def _decoder(program: Program) -> Program:
    results = {spec: node for spec, node in _results(program) if not is_cross(spec.name)}
    inputs = _inputs_of_decoder(program)
    crossing = {
        node: replace(spec, name=_entering(spec.name)) for spec, node in _results(program) if is_cross(spec.name)
    }
    stage = StageGraph(program, inputs | crossing)
    stage.let_all_count(_named_placeholder(program, TARGET_MASK))
    return stage.program(results)


def _states(graph: fx.Graph, cross: Sequence[fx.Node]) -> fx.Node:
    """The last value of rows of channels that all keys and values of cross-attention come from."""
    return _common_rows(graph, cross)[-1]


def _common_rows(graph: fx.Graph, cross: Sequence[fx.Node]) -> list[fx.Node]:
    """The values of rows of channels that all keys and values of cross-attention come from."""
    common = set[fx.Node].intersection(*(ancestors(graph, [node]) for node in cross))
    return [node for node in graph.nodes if node in common and _is_rows(node.meta.get("type"))]


def _source_states(program: Program, cross: Sequence[fx.Node]) -> fx.Node:
    """The last value of rows of channels that alone says all of the source, and is not rounded yet.

    Raises:
        BitlowerError: there is none.
    """
    for node in reversed(_common_rows(program.graph, cross)):
        if _rounded(node):
            continue
        if StageGraph(program, {node: ValueSpec(STATES, node.meta["type"])}).reads(cross):
            return node
    raise BitlowerError(
        f"the keys and values of cross-attention of {program.source or 'the model'} come from no one value",
        hint="let the encoder return keys and values: leave out `layout`",
    )


def _rounded(node: fx.Node) -> bool:
    """Whether a value is one that a quantizer gave, moved or not."""
    while node.target in VIEWS:
        node = node.all_input_nodes[0]
    return node.target in QUANTIZER


def _is_rows(kind: object) -> bool:
    """Whether a type is that of floats ``[batch, positions, width]``, and no scale of a position."""
    return (
        isinstance(kind, TensorType)
        and kind.is_float
        and kind.rank == 3
        and kind.shape[0] == BATCH
        and kind.shape[2] != 1
    )


def _results(program: Program) -> list[tuple[ValueSpec, fx.Node]]:
    return list(zip(program.outputs, graph_results(program.graph), strict=True))


def _entering(name: str) -> str:
    """What keys or values that come out are called where they go in."""
    return PAST_NAME + name.removeprefix(PRESENT_NAME)


def _is_of_target(name: str) -> bool:
    return name in (TARGET, TARGET_MASK) or name.startswith(PAST_NAME)


def _is_read_by_decoder(name: str) -> bool:
    return name in _RENAMED or name.startswith(PAST_NAME)


def _named_placeholder(program: Program, name: str) -> fx.Node:
    return _placeholder(program, next(spec for spec in program.inputs if spec.name == name))


def _placeholder(program: Program, spec: ValueSpec) -> fx.Node:
    nodes: list[fx.Node] = list(program.graph.find_nodes(op="placeholder"))
    return nodes[program.inputs.index(spec)]

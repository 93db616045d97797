"""The two stages of an encoder-decoder: what reads the source once, and what writes the target token by token.

Passes see one graph, from the source and the target to the next token, so that statistics, permutations and losses
cross from one side to the other as within a side. What is deployed are two: the ``encoder`` ends with the keys and
values of every cross-attention, which are computed once a source and not once a token, and the ``decoder`` takes them
beside its own. Names are those of the ONNX ecosystem (``past_key_values.0.decoder.key``, ``….encoder.key``).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import fx

from bitlower.ir.dataflow import ancestors
from bitlower.ir.diagnostics import BitlowerError, describe
from bitlower.ir.fit import ValueSpec
from bitlower.ir.operators import argument, graph_results, operand
from bitlower.ir.program import Program
from bitlower.ir.tensors import UncompiledModule
from bitlower.ir.tokens import BATCH, MASK, PAST_NAME, PRESENT_NAME, SOURCE_MASK, TARGET, TARGET_MASK, TOKENS
from bitlower.ir.types import TensorType

T = TypeVar("T")
ENCODER, DECODER = "encoder", "decoder"
OWN, CROSS = "decoder.", "encoder."
"""In the names of keys and values: whose they are."""
STATES = "encoder_hidden_states"
"""What every cross-attention reads, ``[batch, positions, width]``: an output of the encoder where it is asked for."""
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
    return own | {_entering(name): value for name, value in cross.items() if name != STATES}


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
        if not enters_cross(name):
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


def _encoder(program: Program, states: bool) -> Program:
    results = {spec: node for spec, node in _results(program) if is_cross(spec.name)}
    if states:
        node = _states(program.graph, list(results.values()))
        results[ValueSpec(STATES, node.meta["type"])] = node
    inputs = {_placeholder(program, spec): spec for spec in program.inputs if not _is_of_target(spec.name)}
    return _Stage(program, inputs).program(results)


def _decoder(program: Program) -> Program:
    named = {spec.name: spec for spec in program.inputs}
    results = {spec: node for spec, node in _results(program) if not is_cross(spec.name)}
    wanted = [name for name in named if _is_read_by_decoder(name)]
    wanted.sort(key=lambda name: name != TARGET)
    inputs = {_placeholder(program, named[n]): replace(named[n], name=_RENAMED.get(n, n)) for n in wanted}
    crossing = {
        node: replace(spec, name=_entering(spec.name)) for spec, node in _results(program) if is_cross(spec.name)
    }
    stage = _Stage(program, inputs | crossing)
    stage.let_all_count(_placeholder(program, named[TARGET_MASK]))
    return stage.program(results)


def _states(graph: fx.Graph, cross: Sequence[fx.Node]) -> fx.Node:
    """The last value of rows of channels that all keys and values of cross-attention come from."""
    common = set[fx.Node].intersection(*(ancestors(graph, [node]) for node in cross))
    rows: list[fx.Node] = [node for node in graph.nodes if node in common and _is_rows(node.meta.get("type"))]
    return rows[-1]


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


def _placeholder(program: Program, spec: ValueSpec) -> fx.Node:
    nodes: list[fx.Node] = list(program.graph.find_nodes(op="placeholder"))
    return nodes[program.inputs.index(spec)]


class _Stage:
    """A graph that takes the values of some nodes of ``program``, and computes others from them."""

    def __init__(self, program: Program, inputs: Mapping[fx.Node, ValueSpec]) -> None:
        self.source, self.specs = program, tuple(inputs.values())
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        self.sizes: dict[int | str, tuple[fx.Node, int]] = {}
        for node, spec in inputs.items():
            copy = self.copies[node] = self.graph.placeholder(spec.name.replace(".", "_"))
            copy.meta = {**node.meta, "type": spec.type}
            for axis, size in enumerate(spec.type.shape):
                self.sizes.setdefault(size, (copy, axis))

    def let_all_count(self, mask: fx.Node) -> None:
        """Put ones for ``mask`` ``[batch, past + sequence]``: a target ends with padding, which no token looks at."""
        batch, past, sequence = (self._size(name) for name in ("batch", "past", "sequence"))
        total = self.graph.call_function(operator.add, (past, sequence))
        ones = self.graph.call_function(aten.ones.default, ([batch, total],), {"dtype": mask.meta["type"].dtype})
        ones.meta = {"type": mask.meta["type"]}
        self.copies[mask] = ones

    def program(self, results: Mapping[ValueSpec, fx.Node]) -> Program:
        """The stage with these outputs.

        Raises:
            BitlowerError: they depend on an input that the stage does not have.
        """
        needed = self._needed(results.values())
        for node in self.source.graph.nodes:
            if node in needed:
                self._copy(node)
        self.graph.output(tuple(self.copies[node] for node in results.values()))
        source = self.source
        module = UncompiledModule(source.module, self.graph)
        stage = replace(source.clone(), graphs={"model": module}, inputs=self.specs, outputs=tuple(results))
        stage.recompile()
        return stage

    def _copy(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            raise BitlowerError(
                f"{self.source.source or 'the model'} cannot be cut into an encoder and a decoder: one of them reads "
                f"{describe(node)}, which is the other's"
            )
        self.copies[node] = self._read_size(node) or self.graph.node_copy(node, self.copies.__getitem__)

    def _needed(self, results: Iterable[fx.Node]) -> set[fx.Node]:
        """What must be copied for ``results``."""
        needed, frontier = set[fx.Node](), [node for node in results if node not in self.copies]
        while frontier:
            node = frontier.pop()
            if node not in needed:
                needed.add(node)
                read = [] if self._named_size(node) in self.sizes else node.all_input_nodes
                frontier += [source for source in read if source not in self.copies]
        return needed

    def _read_size(self, node: fx.Node) -> fx.Node | None:
        """The size that ``node`` asks for, asked of an input of the stage; None if it asks for none that they have."""
        size = self._named_size(node)
        return self._size(size) if size in self.sizes else None

    def _named_size(self, node: fx.Node) -> str | None:
        if node.target is not aten.sym_size.int:
            return None
        size = operand(node, "self").meta["type"].shape[argument(node, "dim")]
        return size if isinstance(size, str) else None

    def _size(self, name: str) -> fx.Node:
        return self.graph.call_function(aten.sym_size.int, self.sizes[name])

"""Give attention sinks a place of their own: the keys and values of a few tokens as constants before all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import fx

from bitlower.ir import BitlowerError, Level, Program, TensorType, set_tensor
from bitlower.ir.dataflow import ATTENTION, residual_sums
from bitlower.ir.observe import observe
from bitlower.ir.operators import AttentionNode
from bitlower.ir.rewrite import call_like
from bitlower.ir.tokens import PAST, is_past
from bitlower.passes._machinery.base import Context, Contract, Pass
from bitlower.passes._machinery.report import Record, counted

aten = torch.ops.aten


@dataclass(frozen=True)
class PrefixReport(Record):
    """What stands before every sequence.

    Args:
        tokens: their ids.
        attentions: how many attentions see them.
        before: the largest entry of any residual sum over the first calibration batch.
        after: the same with the prefix.
    """

    tokens: tuple[int, ...]
    attentions: int
    before: float
    after: float

    def summary(self) -> str:
        """The prefix and what it does."""
        tokens = ", ".join(map(str, self.tokens))
        return (
            f"tokens {tokens} stand before every sequence, in {counted(self.attentions, 'attention')}; "
            f"largest value of a residual sum {self.before:.4g} → {self.after:.4g}"
        )


@dataclass(frozen=True)
class PrefixSinks(Pass):
    """Put keys and values of ``tokens`` before those of every sequence, as constants (PrefixQuant, Chen et al. 2024).

    Causal language models let their first token become an attention sink: its activations are hundreds of times those
    of all others, at every layer, and own every static range (Xiao et al. 2024; Sun et al. 2024, "massive
    activations"). A sink that is there already makes the first real token an ordinary one. Nothing is computed for the
    prefix at run time: each attention reads that many keys and values more.

    The outputs are exactly those of the model on the prefix followed by the sequence. The cache (``past_key_values``,
    ``present``) and the attention mask keep their shapes and know nothing of it; positions are counted from behind it,
    so that the model takes that many tokens fewer.
    """

    name: ClassVar[str] = "prefix-sinks"
    requires: ClassVar[frozenset[Level]] = frozenset({Level.FLOAT})
    contract: ClassVar[Contract] = Contract.LOSSY
    tokens: tuple[Annotated[int, Ge(0)], ...] = ()
    """Ids of the prefix; the model's token for the beginning of a text if empty (for its end if it has none such)."""

    def run(self, program: Program, context: Context) -> bool:
        """Fold the prefix in and leave a :class:`PrefixReport`.

        Raises:
            BitlowerError: the program is no decoder with a cache and position ids, an attention has no explicit mask,
                or a token is not in the vocabulary.
        """
        tokens = self.tokens or _first_token(program)
        attentions = _attentions(program, tokens)
        before = _largest(program, context)
        cache = _cache_of(program, attentions, tokens)
        replaced: dict[fx.Node, fx.Node] = {}
        for node in attentions:
            view = AttentionNode(node)
            for name in ("key", "value", "mask"):
                value = view.operand(name)
                if value not in replaced:
                    mask = name == "mask"
                    longer = _widen(node, value, len(tokens)) if mask else _join(program, node, value, cache[value])
                    replaced[value] = longer
                view.set(name, replaced[value])
        _shift_positions(program, len(tokens))
        if program.context_length is not None:
            program.context_length -= len(tokens)
        program.recompile()
        context.put(PrefixReport(tokens, len(attentions), before, _largest(program, context)))
        return True


def _first_token(program: Program) -> tuple[int, ...]:
    for key in ("bos_token_id", "eos_token_id"):
        token = program.config.get(key)
        if isinstance(token, list) and token:
            token = token[0]
        if isinstance(token, int):
            return (token,)
    raise BitlowerError(
        "prefix-sinks: the model's configuration names no token for the beginning or the end of a text",
        hint="name the tokens: prefix-sinks{tokens=[1]}",
    )


def _attentions(program: Program, tokens: tuple[int, ...]) -> list[fx.Node]:
    """The attentions of a decoder that a prefix can be put before."""
    names = {spec.name for spec in program.inputs}
    if not {"input_ids", "attention_mask", "position_ids"} <= names or not any("past_key" in name for name in names):
        raise BitlowerError(
            "prefix-sinks works on language models with a KV cache and position ids among their inputs",
            hint="attention sinks are a matter of causal models; leave the pass out for others",
        )
    state = next((spec.name for spec in program.inputs if is_past(spec) and PAST not in spec.type.shape), None)
    if state is not None:
        raise BitlowerError(
            f"prefix-sinks puts keys and values before a text; the model's {state} would not have read the prefix",
            hint="leave the pass out: it is for models whose layers are all attention",
        )
    vocabulary = program.config.get("vocab_size")
    wrong = [token for token in tokens if token < 0 or (isinstance(vocabulary, int) and token >= vocabulary)]
    if wrong:
        raise BitlowerError(f"prefix-sinks: the vocabulary of {vocabulary} has no token {wrong[0]}")
    attentions = [node for node in program.graph.nodes if node.target in ATTENTION]
    for node in attentions:
        if AttentionNode(node).mask is None or AttentionNode(node).is_causal:
            path = node.meta.get("path", node.name)
            raise BitlowerError(f"prefix-sinks: the attention {path} has no explicit mask to widen")
    if not attentions:
        raise BitlowerError("prefix-sinks found no attention operator", hint="put it right after `clean`")
    return attentions


def _cache_of(program: Program, attentions: list[fx.Node], tokens: tuple[int, ...]) -> dict[fx.Node, torch.Tensor]:
    """What attentions read of ``tokens`` alone, ``[1, heads, tokens, d]``, by the node of the keys or values."""
    cache: dict[fx.Node, torch.Tensor] = {}
    ids = torch.tensor([tokens])
    positions = torch.arange(len(tokens))[None]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
    nodes = {value for node in map(AttentionNode, attentions) for value in (node.key, node.value)}
    observe(program, nodes, [batch], lambda node, value, _: cache.update({node: value.clone()}))
    return cache


def _join(program: Program, attention: fx.Node, value: fx.Node, prefix: torch.Tensor) -> fx.Node:
    """The prefix, as a constant that is the same for the whole batch, before ``value`` ``[batch, heads, keys, d]``."""
    target = f"prefix.{value.name}"
    set_tensor(program.module, target, prefix)
    kind: TensorType = value.meta["type"]
    count = prefix.shape[-2]
    with value.graph.inserting_after(value):
        size = call_like(attention, aten.sym_size.int, (value, 0), None)
    with attention.graph.inserting_before(attention):
        stored = attention.graph.get_attr(target)
        stored.meta["type"] = TensorType(prefix.dtype, tuple(prefix.shape))
        spread_type = TensorType(prefix.dtype, (kind.shape[0], *prefix.shape[1:]))
        spread = call_like(attention, aten.expand.default, (stored, [size, -1, -1, -1]), spread_type)
        shape = (*kind.shape[:-2], _longer(kind.shape[-2], count), kind.shape[-1])
        return call_like(attention, aten.cat.default, ([spread, value], -2), TensorType(kind.dtype, shape))


def _widen(attention: fx.Node, mask: fx.Node, count: int) -> fx.Node:
    """``mask`` with ``count`` columns before its own that let everything through."""
    kind: TensorType = mask.meta["type"]
    admit: Any = 0.0 if kind.is_float else True
    shape = (*kind.shape[:-1], _longer(kind.shape[-1], count))
    with attention.graph.inserting_before(attention):
        return call_like(
            attention, aten.constant_pad_nd.default, (mask, [count, 0], admit), TensorType(kind.dtype, shape)
        )


def _longer(size: int | str, count: int) -> int | str:
    return size + count if isinstance(size, int) else f"{size} + {count}"


def _shift_positions(program: Program, count: int) -> None:
    """Real tokens stand behind the prefix."""
    node = next(n for n in program.graph.find_nodes(op="placeholder") if n.target == "position_ids")
    with node.graph.inserting_after(node):
        shifted = node.graph.call_function(aten.add.Tensor, (node, count))
    shifted.meta = dict(node.meta)
    node.replace_all_uses_with(shifted, delete_user_cb=lambda user: user is not shifted)


def _largest(program: Program, context: Context) -> float:
    """The largest entry of any residual sum, over the first calibration batch."""
    magnitudes = [0.0]
    sums = residual_sums(program.graph)
    observe(program, sums, context.calibration[:1], lambda _, value, __: magnitudes.append(float(value.abs().max())))
    return max(magnitudes)

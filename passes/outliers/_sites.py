"""What of a graph ``analyze-outliers`` looks at, found from the flow of values; and which tokens are special."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from bitlower.ir import BitlowerError, Program, ops
from bitlower.ir.dataflow import (
    ATTENTION,
    MATMUL,
    NORM,
    QUANTIZER,
    SOFTMAX,
    VIEWS,
    linears,
    parameter_of,
    residual_sums,
    unrounded,
    value_root,
)
from bitlower.ir.json_files import parse_json
from bitlower.ir.operators import AttentionNode, BinaryNode, LinearNode
from bitlower.ir.quantizer_node import QuantizerNode, is_uncalibrated
from bitlower.ir.tokens import BATCH, ENCODER_SEQUENCE, MASK, SEQUENCE, TARGET, TOKENS

aten = torch.ops.aten
_CASTS = frozenset({aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default})
_SEPARATORS = ("[SEP]", "</s>")


@dataclass(frozen=True)
class AttentionSite:
    """One attention: the operator with query, key and mask, or the matmul of explicit probabilities and values."""

    node: fx.Node
    value: fx.Node
    probs: fx.Node | None = None
    query: fx.Node | None = None
    key: fx.Node | None = None
    mask: fx.Node | None = None
    causal: bool = False
    scale: float | None = None

    @property
    def operands(self) -> list[fx.Node]:
        """The nodes whose values are needed when ``node`` has run."""
        return [n for n in (self.value, self.probs, self.query, self.key, self.mask) if n is not None]


def tensor_roles(graph: fx.Graph) -> dict[fx.Node, tuple[str, ...]]:
    """The tensors to look at, in execution order, and what they are; values before they are rounded."""
    roles: dict[fx.Node, set[str]] = defaultdict(set)
    for node in linears(graph):
        roles[node].add("linear-output")
        roles[unrounded(LinearNode(node).x)].add("linear-input")
    for node in residual_sums(graph):
        roles[node].add("residual")
    for node in graph.nodes:
        if node.target in NORM or _is_rms_norm(node):
            roles[node].add("norm")
    return {node: tuple(sorted(roles[node])) for node in graph.nodes if node in roles}


def _is_rms_norm(node: fx.Node) -> bool:
    """A parameter times ``x · rsqrt(…)``: RMSNorm written out."""
    if node.target is not aten.mul.Tensor or len(node.all_input_nodes) != 2:
        return False
    for weight, normed in itertools.permutations(node.all_input_nodes):
        root = _before_casts(normed)
        if parameter_of(weight) is not None and root.target is aten.mul.Tensor:
            return any(_before_casts(n).target is aten.rsqrt.default for n in root.all_input_nodes)
    return False


def _before_casts(node: fx.Node) -> fx.Node:
    while node.target in VIEWS or node.target in QUANTIZER or node.target in _CASTS:
        node = node.all_input_nodes[0]
    return node


def attentions(graph: fx.Graph) -> list[AttentionSite]:
    """Every attention of ``[batch, heads, tokens, …]`` tensors, as one operator or written out."""
    sites = []
    for node in graph.nodes:
        if node.target in ATTENTION:
            sites.append(_operator(node))
        elif node.target in MATMUL and node.meta["type"].rank == 4:
            probs, value = BinaryNode(node).left, BinaryNode(node).right
            if value_root(probs).target in SOFTMAX:
                sites.append(AttentionSite(node, value, probs))
    return sites


def _operator(node: fx.Node) -> AttentionSite:
    call = AttentionNode(node)
    return AttentionSite(
        node, call.value, query=call.query, key=call.key, mask=call.mask, causal=call.is_causal, scale=call.scale
    )


def calibrated(program: Program) -> Iterator[fx.Node]:
    """The quantizers of a simulated program that have a stored range."""
    for node in program.graph.find_nodes(op="call_function", target=ops.fake_quantize):
        if QuantizerNode(node).is_static and not is_uncalibrated(node):
            yield node


def token_axes(program: Program) -> dict[str, tuple[Any, Any]]:
    """The names of the batch and the sequence dimension of the text; of a source and a target, of each.

    By the dimension that :mod:`bitlower.ir.tokens` knows the tokens by.
    """
    shapes = {spec.name: spec.type.shape for spec in program.inputs if spec.type.rank == 2}
    if TARGET in shapes:
        return {dim: (BATCH, dim) for dim in (SEQUENCE, ENCODER_SEQUENCE)}
    text = next((shapes[name] for name in shapes if name in (MASK, TOKENS)), (None, None))
    return {SEQUENCE: (text[0], text[1])}


def has_tokens(node: fx.Node, value: torch.Tensor, mask: torch.Tensor, batch: Any) -> bool:
    """Whether each vector of ``value`` is one token's: ``[batch, sequence, d]`` or ``[batch · sequence, d]``."""
    if value.shape[:-1].numel() != mask.numel():
        return False
    return value.dim() == 3 or (value.dim() == 2 and node.meta["type"].shape[0] != batch)


def not_padding(node: fx.Node, value: torch.Tensor, mask: torch.Tensor, axes: tuple[Any, Any]) -> torch.Tensor | None:
    """Which elements belong to tokens that are no padding, along every sequence axis; broadcasts over ``value``."""
    if value.dim() == 2 and has_tokens(node, value, mask, axes[0]):
        return mask.reshape(-1, 1)
    if node.op == "get_attr" or node.meta["type"].shape[:1] != axes[:1]:
        return None
    keep = None
    for axis, name in enumerate(node.meta["type"].shape):
        if name == axes[1] and axis > 0:
            along = mask.reshape([size if i in (0, axis) else 1 for i, size in enumerate(value.shape)])
            keep = along if keep is None else keep & along
    return keep


def separator(program: Program) -> int | None:
    """The id of the separator token, from the tokenizer or else the configuration."""
    names, special = vocabulary(program)
    stated = _asset(program, "special_tokens_map.json").get("sep_token")
    text = stated.get("content") if isinstance(stated, dict) else stated
    for wanted in (text, *_SEPARATORS):
        for token in sorted(special):
            if wanted and names.get(token) == wanted:
                return token
    number = program.config.get("sep_token_id")
    return number if isinstance(number, int) else None


def vocabulary(program: Program) -> tuple[dict[int, str], frozenset[int]]:
    """Token texts by id, and the special ones, from ``tokenizer.json``; empty where there is none."""
    form = _asset(program, "tokenizer.json")
    listed = form.get("model", {}).get("vocab", {})
    pairs = listed.items() if isinstance(listed, dict) else ((str(entry[0]), i) for i, entry in enumerate(listed))
    names = {int(number): str(text) for text, number in pairs}
    added = form.get("added_tokens", [])
    names |= {token["id"]: token["content"] for token in added}
    return names, frozenset(token["id"] for token in added if token.get("special"))


def _asset(program: Program, name: str) -> dict[str, Any]:
    try:
        form = parse_json(program.assets.get(name, b"{}"))
    except ValueError as error:
        raise BitlowerError(f"{program.source}: {name} is not JSON: {error}", hint="fetch the model again") from None
    return form if isinstance(form, dict) else {}

"""Mixtures of experts: each expert as linear layers of its own, all of them in one graph without branches.

transformers holds the weights of all experts of a layer in one tensor with three axes, and multiplies groups of tokens
with slices of it. Here every slice becomes the weight of a linear layer, ``experts.3.gate_up_proj`` and
``experts.3.down_proj``, and each expert computes

    y = Σₑ wₑ · expertₑ(rₑ · x)

with ``wₑ`` the routing weight of the token, 0 where the expert was not chosen, and ``rₑ`` 1 or 0 likewise. That is what
transformers computes, in the same order. Tokens that are not routed to an expert are rows of zeros for it: they add
nothing to its Hessian and nothing to its ranges.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DENSE = "bitlower-dense"
_MARKS = ("_apply_gate", "has_gate", "has_bias", "is_transposed", "num_experts", "down_proj")


@contextmanager
def experts_as_linears(model: PreTrainedModel) -> Iterator[int]:
    """Let the experts of ``model`` be linear layers for a while; returns how many layers have experts.

    The linears share the memory of the fused tensors. Afterwards the model has its own parameters and modules again;
    the linears can still be reached by the names that a trace gives them (``get_parameter``).
    """
    layers = _layers(model)
    before = [(m, dict(m._parameters), dict(m._modules), m.config._experts_implementation) for m in layers]
    try:
        unfuse_experts(model)
        yield len(layers)
    finally:
        for layer, parameters, modules, implementation in before:
            experts = {name: module for name, module in layer._modules.items() if name not in modules}
            layer._parameters, layer._modules = parameters, modules
            layer.__dict__.update(experts)
            layer.config._experts_implementation = implementation


def unfuse_experts(model: nn.Module) -> None:
    """Let the experts of ``model`` be linear layers for good."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(DENSE, _dense)
    for layer in _layers(model):
        _unfuse(layer)
        layer.config._experts_implementation = DENSE


def _layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if all(hasattr(module, mark) for mark in _MARKS)]


def _first(layer: Any) -> str:
    """The name of what a token meets first in an expert."""
    return "gate_up_proj" if layer.has_gate else "up_proj"


def _unfuse(layer: Any) -> None:
    """Put a module for each expert in the place of the fused tensors."""
    for expert in range(layer.num_experts):
        module = nn.Module()
        for name in (_first(layer), "down_proj"):
            bias = getattr(layer, f"{name}_bias")[expert] if layer.has_bias else None
            module.add_module(name, _linear(getattr(layer, name)[expert], bias, turned=layer.is_transposed))
        layer.__dict__.pop(str(expert), None)  # of an earlier trace
        layer.add_module(str(expert), module)
    for name in (_first(layer), "down_proj"):
        del layer._parameters[name]
        layer._parameters.pop(f"{name}_bias", None)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, *, turned: bool) -> nn.Linear:
    weight = (weight.T if turned else weight).detach()
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def _dense(
    layer: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """All experts on all tokens: ``[tokens, width]``, with the chosen experts and their weights ``[tokens, k]``."""
    total = torch.zeros_like(hidden_states)
    for expert in range(layer.num_experts):
        chosen = top_k_index == expert
        routed = hidden_states * chosen.any(dim=-1, keepdim=True).to(hidden_states.dtype)
        module = layer._modules[str(expert)]
        inner = getattr(module, _first(layer))(routed)
        inner = layer._apply_gate(inner) if layer.has_gate else layer.act_fn(inner)
        expert_output = module.down_proj(inner)
        if layer.has_post_expert_norm:
            expert_output = layer.post_expert_norm(expert_output)
        weight = (top_k_weights * chosen.to(top_k_weights.dtype)).sum(dim=-1, keepdim=True)
        total = total + expert_output * weight
    return total.to(hidden_states.dtype)

"""What a layer of a decoder carries from token to token: keys and values, and states of a fixed size.

State-space layers (Mamba: Gu and Dao, 2023), linear attention and short convolutions keep the last inputs of their
convolution (``conv``) and what they sum up over all tokens (``recurrent``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from bitlower.ir.tokens import BATCH

if TYPE_CHECKING:
    from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

CACHES = "transformers.cache_utils"
_KEYS = (("key", "keys"), ("value", "values"))
_STATES = (("conv", "conv_states"), ("recurrent", "recurrent_states"))
_TOKENS = None
"""Stands for the tokens among the sizes of a state."""


@dataclass(frozen=True)
class State:
    """One tensor of a layer's cache.

    Args:
        part: the last part of its name: ``key``, ``value``, ``conv`` or ``recurrent``.
        sizes: behind the batch; None stands for the tokens.
    """

    part: str
    sizes: tuple[int | None, ...]

    @property
    def grows(self) -> bool:
        """Whether it has an entry for each token."""
        return _TOKENS in self.sizes

    def shape(self, length: int | str) -> tuple[int | str, ...]:
        """The shape after so many tokens."""
        return (BATCH, *(length if size is None else size for size in self.sizes))


def states_of(layer: Any) -> tuple[State, ...]:
    """What a layer of a cache of transformers carries, in the order in which its tensors are traced."""
    return tuple(State(part, _sizes(part, tensor)) for part, tensor in _parts(layer))


def tensors_of_layer(layer: Any) -> list[torch.Tensor]:
    """The tensors of a layer's :func:`states_of`."""
    return [tensor for _, tensor in _parts(layer)]


def cache_layers(caches: Sequence[Sequence[State]], tensors: Sequence[torch.Tensor]) -> list[Any]:
    """Layers of a cache of transformers that hold ``tensors``, in the order of the states of all layers.

    States of a fixed size are copied: transformers writes into them.
    """
    remaining = iter(tensors)
    return [_layer({state.part: next(remaining) for state in states}) for states in caches]


def joined_state(original: Any, notes: list[str]) -> Any:
    """A convolution's state without writing into a tensor: the inputs so far and the new ones, as transformers has it.

    The state that is there is always used; before the first token it is zero, as what transformers pads with.
    """

    def update_conv_state(
        self: LinearAttentionLayer, conv_states: torch.Tensor, state_idx: int = 0, **options: Any
    ) -> torch.Tensor:
        before = self.conv_states[state_idx]
        assert before is not None, "a traced cache has all its states"
        joined = torch.cat([before, conv_states], dim=-1)
        self.conv_states[state_idx] = joined[..., -before.shape[-1] :]
        return joined

    return update_conv_state


def replaced_state(original: Any, notes: list[str]) -> Any:
    """A recurrent state that takes the place of the one before, which is not written into."""

    def update_recurrent_state(
        self: LinearAttentionLayer, recurrent_states: torch.Tensor, state_idx: int = 0, **options: Any
    ) -> torch.Tensor:
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states

    return update_recurrent_state


def _parts(layer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for part, attribute in _KEYS:
        if isinstance(tensor := getattr(layer, attribute, None), torch.Tensor):
            yield part, tensor
    for part, attribute in _STATES:
        for place, tensor in (getattr(layer, attribute, None) or {}).items():
            if isinstance(tensor, torch.Tensor):
                yield part + (str(place) if place else ""), tensor


def _sizes(part: str, tensor: torch.Tensor) -> tuple[int | None, ...]:
    sizes: list[int | None] = list(tensor.shape[1:])
    if part in dict(_KEYS):
        sizes[-2] = _TOKENS
    return tuple(sizes)


def _layer(tensors: dict[str, torch.Tensor]) -> CacheLayerMixin | LinearAttentionLayer:
    """A layer that holds the tensors of these parts, and has read tokens before."""
    from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

    keys = {part: tensor for part, tensor in tensors.items() if part in dict(_KEYS)}
    states = {part: tensor for part, tensor in tensors.items() if part not in keys}
    if not states:
        layer: Any = DynamicLayer()
    else:
        count = 1 + sum(part.startswith("conv") for part in states if part != "conv")
        layer = (LinearAttentionAndFullAttentionLayer if keys else LinearAttentionLayer)(number_of_states=count)
    if keys:
        layer.update(*keys.values())
    for part, tensor in states.items():
        name = part.rstrip("0123456789")
        place = int(part.removeprefix(name) or 0)
        getattr(layer, dict(_STATES)[name])[place] = tensor.clone()
        getattr(layer, f"is_{dict(_STATES)[name]}_initialized")[place] = True
        layer.has_previous_state[place] = True
        layer.dtype, layer.device = tensor.dtype, tensor.device
        if name == "conv":
            layer.conv_kernel_size[place] = tensor.shape[-1]
    return layer

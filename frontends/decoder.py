"""Causal language models: sample inputs with a KV cache, and the names of a decoder's inputs and outputs.

The names are those of the ONNX ecosystem: ``past_key_values.{layer}.key`` comes in, ``present.{layer}.key`` goes out.
The past and the tokens have lengths of their own, so one graph serves calibration (empty past), prefill and decoding.
Layers that are no attention carry states of a fixed size (``.conv``, ``.recurrent``), which are zero before the first
token; a model of such layers alone takes a mask of the step's own tokens.
A model without a cache takes ``input_ids`` and ``attention_mask`` and returns ``logits``; each run is over all tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from bitlower.frontends._samples import vocabulary
from bitlower.frontends._states import State, cache_layers, states_of, tensors_of_layer
from bitlower.frontends._tasks import state_refused
from bitlower.ir.quiet import quiet
from bitlower.ir.tokens import BATCH, PAST, PAST_NAME, PRESENT_NAME, SEQUENCE, TOTAL

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

_CACHES = ("cache", "past_key_values")
"""What transformers calls the cache, now and in earlier releases, among the arguments and among the results."""
_STATES = ("state", "mems")


@dataclass(frozen=True)
class Signature:
    """What a causal language model takes and returns.

    Args:
        takes_positions: whether ``position_ids`` are among its inputs.
        caches: of each layer, what it carries from token to token; none without a cache.
        argument: what the model's ``forward`` calls the cache.
    """

    takes_positions: bool
    caches: tuple[tuple[State, ...], ...]
    argument: str = _CACHES[0]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Signature:
        """Run one token through ``model`` and look at the cache that it returns.

        Raises:
            BitlowerError: it carries from token to token what is in no cache.
        """
        ids = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
        with torch.no_grad(), quiet():
            outputs = model(input_ids=ids, **({"use_cache": True} if hasattr(model.config, "use_cache") else {}))
        layers = getattr(cache_of(outputs), "layers", None) or []
        if any(outputs.get(name) is not None for name in _STATES):
            raise state_refused(type(model).__name__)
        caches = cache_states(layers, type(model).__name__)
        takes_positions = bool(caches) and "position_ids" in inspect.signature(model.forward).parameters
        return cls(takes_positions, caches, cache_argument(model))

    def inputs(self) -> dict[str, tuple[int | str, ...]]:
        """The inputs' shapes by name, in order."""
        total = TOTAL if self.grows else SEQUENCE
        shapes: dict[str, tuple[int | str, ...]] = {"input_ids": (BATCH, SEQUENCE), "attention_mask": (BATCH, total)}
        if self.takes_positions:
            shapes["position_ids"] = (BATCH, SEQUENCE)
        return shapes | self.cache_shapes(PAST_NAME, "", PAST)

    @property
    def grows(self) -> bool:
        """Whether some of what is carried has an entry for each token, as keys and values have."""
        return any(state.grows for states in self.caches for state in states)

    @property
    def scans(self) -> bool:
        """Whether some of what is carried has a fixed size."""
        return not all(state.grows for states in self.caches for state in states)

    def outputs(self) -> list[str]:
        """The outputs' names, in order."""
        return ["logits", *self.cache_shapes(PRESENT_NAME, "", TOTAL)]

    def traced_outputs(self) -> list[str]:
        """The names of all that the model returns, in order; those that are not among :meth:`outputs` are dropped."""
        return self.outputs()

    def cache_shapes(self, name: str, side: str, length: int | str) -> dict[str, tuple[int | str, ...]]:
        """What each layer carries after ``length`` tokens: ``name`` with ``0.key`` behind, and ``side`` between."""
        return {
            f"{name}{layer}.{side}{state.part}": state.shape(length)
            for layer, states in enumerate(self.caches)
            for state in states
        }

    def sample(self, model: PreTrainedModel, sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """Flat sample inputs from a fixed generator; the first row begins with padding if there is room.

        Without a cache the past is part of the sequence. States before the first token are zero.

        Args:
            model: whose tokens they are.
            sizes: of ``batch``, ``past`` and ``sequence``.
        """
        generator = torch.Generator().manual_seed(0)
        batch, past, sequence = sizes[BATCH], sizes[PAST], sizes[SEQUENCE]
        past, sequence = (past, sequence) if self.caches else (0, past + sequence)
        mask = torch.ones((batch, past + sequence), dtype=torch.int64)
        mask[0, : 2 if past + sequence > 3 else 0] = 0
        tensors = {
            "input_ids": torch.randint(0, vocabulary(model), (batch, sequence), generator=generator),
            "attention_mask": mask if self.grows else mask[:, past if self.caches else 0 :].contiguous(),
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, past:].contiguous(),
        }
        flat = tensors_of(self.inputs(), tensors, {BATCH: batch, PAST: past}, generator)
        carried = {name: value for name, value in flat.items() if name.startswith(PAST_NAME)}
        return flat if past else flat | {name: torch.zeros_like(value) for name, value in carried.items()}

    def arguments(self, flat: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """``flat`` as transformers' ``forward`` takes it: the cache in one object."""
        keywords: dict[str, Any] = {name: value for name, value in flat.items() if "." not in name}
        if not self.caches:
            return keywords
        return keywords | {self.argument: self._cache(flat), "use_cache": True}

    def _cache(self, flat: Mapping[str, torch.Tensor]) -> Cache:
        from transformers import DynamicCache

        cache = DynamicCache()
        cache.layers = cache_layers(self.caches, [t for name, t in flat.items() if name.startswith(PAST_NAME)])
        return cache

    def dynamic_shapes(self) -> dict[str, Any]:
        """The dimensions that vary, as ``torch.export`` takes them."""
        auto = torch.export.Dim.AUTO
        dynamic = {
            name: {axis: auto for axis, size in enumerate(shape) if isinstance(size, str)}
            for name, shape in self.inputs().items()
        }
        plain: dict[str, Any] = {name: axes for name, axes in dynamic.items() if "." not in name}
        if not self.caches:
            return plain
        return plain | {self.argument: [axes for name, axes in dynamic.items() if "." in name]}

    def flatten(self, outputs: Any) -> dict[str, torch.Tensor]:
        """What the model returns, by the names of :meth:`outputs`."""
        layers = self.layers_of(outputs)
        caches = [tensor for layer in layers for tensor in tensors_of_layer(layer)]
        return dict(zip(self.outputs(), [outputs.logits, *caches], strict=True))

    def layers_of(self, outputs: Any) -> list[Any]:
        """The layers of the cache of what the model returns."""
        return list(cache_of(outputs).layers) if self.caches else []


def tensors_of(
    shapes: Mapping[str, tuple[int | str, ...]],
    known: Mapping[str, torch.Tensor],
    sizes: Mapping[str, int],
    generator: torch.Generator,
) -> dict[str, torch.Tensor]:
    """Tensors of these names: those that are ``known``, others drawn from a normal distribution."""
    return {
        name: known[name]
        if name in known
        else torch.randn([sizes[d] if isinstance(d, str) else d for d in shape], generator=generator)
        for name, shape in shapes.items()
    }


def cache_states(layers: Sequence[Any], model: str) -> tuple[tuple[State, ...], ...]:
    """What each layer of a cache carries.

    Raises:
        BitlowerError: a layer of the cache of ``model`` holds something else.
    """
    states = tuple(map(states_of, layers))
    if not all(states):
        raise state_refused(model)
    return states


def cache_argument(model: torch.nn.Module) -> str:
    """What ``model.forward`` calls the cache of keys and values; the new name where it knows both."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in _CACHES if name in parameters), _CACHES[-1])


def cache_of(outputs: Mapping[str, Any]) -> Any:
    """The cache that a model of transformers returns, None without one."""
    return next((outputs[name] for name in _CACHES if outputs.get(name) is not None), None)

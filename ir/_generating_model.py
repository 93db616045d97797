"""A step behind the interface of transformers' models, so that transformers' own ``generate`` drives it.

Greedy search, beam search, sampling and all that changes scores are then transformers', token by token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from bitlower.ir.decoder_step import Step, reordered
from bitlower.ir.stages import decoder_batch
from bitlower.ir.tokens import MASK, TARGET, TOKENS, positions

_CACHES = ("cache", "past_key_values")
"""What transformers calls the cache, now and in earlier releases."""


@dataclass
class Memory:
    """The cache of a step, whatever it is, and how many tokens are in it."""

    values: Any = None
    tokens: int = 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let each row go on from the past of another; transformers calls this between two steps of beams."""
        self.values = reordered(self.values, beam_idx)


@dataclass
class StepOutput(ModelOutput):  # type: ignore[misc]
    """What transformers reads of a step: logits ``[batch, sequence, vocabulary]``, and the cache by both its names."""

    logits: torch.Tensor | None = None
    cache: Memory | None = None
    past_key_values: Memory | None = None


class GeneratingModel(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A model of transformers without weights, whose forward is a step.

    Args:
        step: of a decoder, or of the decoder behind an encoder.
        encoder_decoder: which of both.
        settings: how it generates.
    """

    def __init__(self, step: Step, encoder_decoder: bool, settings: GenerationConfig) -> None:
        super().__init__(PreTrainedConfig(is_encoder_decoder=encoder_decoder))
        self.step, self.generation_config = step, settings

    @property
    def device(self) -> torch.device:
        """Where tokens lie; the model has no weights to ask."""
        return torch.device("cpu")

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the cache is the step's own

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_outputs: Mapping[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What :meth:`forward` takes: of all tokens so far those that are not in the cache."""
        memory = next((kwargs[name] for name in _CACHES if kwargs.get(name) is not None), Memory())
        new = input_ids[:, memory.tokens :].contiguous()
        return {TOKENS: new, MASK: attention_mask, "encoder_outputs": encoder_outputs, "memory": memory}

    def forward(
        self,
        input_ids: torch.Tensor,
        memory: Memory,
        attention_mask: torch.Tensor | None = None,
        encoder_outputs: Mapping[str, torch.Tensor] | None = None,
        return_dict: bool = True,
    ) -> StepOutput:
        """One step; ``attention_mask`` is the source's behind an encoder, and else None where all ones."""
        total = memory.tokens + input_ids.shape[1]
        if encoder_outputs is not None:
            mask = {} if attention_mask is None else {MASK: attention_mask}
            feed = decoder_batch({TARGET: input_ids, **mask}, encoder_outputs)
        else:
            seen = torch.ones(len(input_ids), total, dtype=torch.int64) if attention_mask is None else attention_mask
            feed = {TOKENS: input_ids, MASK: seen, "position_ids": positions(seen)[:, memory.tokens :]}
        logits, memory.values = self.step(feed, memory.values)
        memory.tokens = total
        return StepOutput(logits, memory, memory)

"""Encoder-decoders: one graph from the source and the target so far to the next token, with the decoder's KV cache.

The graph is teacher-forced: it takes the source (``input_ids`` and ``attention_mask``, or ``input_features`` of sound),
the target's tokens (``decoder_input_ids``), which of these and of those before are no padding
(``decoder_attention_mask``), and the decoder's own keys and values. Keys and values of cross-attention are computed
from the source inside; :func:`bitlower.ir.stages.split_stages` cuts the graph there into the two that are deployed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from bitlower.frontends._samples import sample, vocabulary
from bitlower.frontends.decoder import Signature, cache_argument, cache_of, cache_states, tensors_of
from bitlower.ir.quiet import quiet
from bitlower.ir.stages import CROSS, OWN
from bitlower.ir.tokens import (
    BATCH,
    ENCODER_SEQUENCE,
    MASK,
    PAST,
    PAST_NAME,
    PRESENT_NAME,
    SEQUENCE,
    TARGET,
    TARGET_MASK,
    TOKENS,
    TOTAL,
)

if TYPE_CHECKING:
    from transformers import EncoderDecoderCache, PreTrainedModel

FEATURES = "input_features"
_SPREAD = 0.5
"""Of features that are drawn: log-mel spectrograms of Whisper lie between -1 and 1.5."""


@dataclass(frozen=True)
class EncoderDecoder(Signature):
    """What an encoder-decoder takes and returns.

    Args:
        source: shapes of what the encoder reads, by name.
    """

    source: tuple[tuple[str, tuple[int | str, ...]], ...] = ()

    @classmethod
    def of(cls, model: PreTrainedModel) -> EncoderDecoder:
        """Run one token through ``model`` and look at the cache that it returns.

        Raises:
            BitlowerError: it carries something else than keys and values from token to token.
        """
        source = _source(model)
        flat = _source_sample(model, source, 1, 1)
        ids = torch.zeros((1, 1), dtype=torch.int64)
        with torch.no_grad(), quiet():
            outputs = model(**flat, decoder_input_ids=ids, use_cache=True, **{cache_argument(model): _empty_cache()})
        layers = cache_of(outputs).self_attention_cache.layers
        return cls(False, cache_states(layers, type(model).__name__), cache_argument(model), source)

    def inputs(self) -> dict[str, tuple[int | str, ...]]:
        """The inputs' shapes by name, in order."""
        target: dict[str, tuple[int | str, ...]] = {TARGET: (BATCH, SEQUENCE), TARGET_MASK: (BATCH, TOTAL)}
        return dict(self.source) | target | self.cache_shapes(PAST_NAME, OWN, PAST)

    def outputs(self) -> list[str]:
        """The outputs' names: the decoder's own keys and values, then those of cross-attention."""
        own, cross = (self.cache_shapes(PRESENT_NAME, side, TOTAL) for side in (OWN, CROSS))
        return ["logits", *own, *cross]

    def traced_outputs(self) -> list[str]:
        """The names of all that the model returns: what the encoder gives comes last."""
        return [*self.outputs(), "encoder_last_hidden_state"]

    def sample(self, model: PreTrainedModel, sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """Flat sample inputs from a fixed generator; the last row of the target ends with padding if there is room.

        Args:
            model: whose tokens they are.
            sizes: of ``batch``, ``past``, ``sequence`` and ``encoder_sequence``.
        """
        generator = torch.Generator().manual_seed(0)
        batch, past, sequence = sizes[BATCH], sizes[PAST], sizes[SEQUENCE]
        mask = torch.ones((batch, past + sequence), dtype=torch.int64)
        mask[-1, -1:] = int(sequence < 2)
        known = _source_sample(model, self.source, batch, sizes[ENCODER_SEQUENCE])
        known[TARGET] = torch.randint(0, _target_tokens(model), (batch, sequence), generator=generator)
        known[TARGET_MASK] = mask
        return tensors_of(self.inputs(), known, {BATCH: batch, PAST: past}, generator)

    def _cache(self, flat: Mapping[str, torch.Tensor]) -> EncoderDecoderCache:
        cache = _empty_cache()
        cache.self_attention_cache = super()._cache(flat)
        return cache

    def layers_of(self, outputs: Any) -> list[Any]:
        """The layers of the decoder's own cache, then those of cross-attention."""
        cache = cache_of(outputs)
        return [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]


def _empty_cache() -> EncoderDecoderCache:
    """One whose layers appear as they are used: transformers makes as many for the decoder as the encoder has."""
    from transformers import DynamicCache, EncoderDecoderCache

    return EncoderDecoderCache(DynamicCache(), DynamicCache())


def _source(model: PreTrainedModel) -> tuple[tuple[str, tuple[int | str, ...]], ...]:
    """What the encoder reads: tokens, or so many frames of features as it has positions for."""
    text = (BATCH, ENCODER_SEQUENCE)
    if model.main_input_name != FEATURES:
        return (TOKENS, text), (MASK, text)
    config, encoder = model.config, model.get_encoder()
    frames = config.max_source_positions * encoder.conv1.stride[0] * encoder.conv2.stride[0]
    return ((FEATURES, (BATCH, config.num_mel_bins, frames)),)


def _source_sample(
    model: PreTrainedModel, source: tuple[tuple[str, tuple[int | str, ...]], ...], rows: int, length: int
) -> dict[str, torch.Tensor]:
    shapes = dict(source)
    if FEATURES not in shapes:
        return sample(model, shapes, rows, length)
    generator = torch.Generator().manual_seed(1)
    return {FEATURES: _SPREAD * torch.randn((rows, *map(int, shapes[FEATURES][1:])), generator=generator)}


def _target_tokens(model: PreTrainedModel) -> int:
    """How many token ids the decoder's table takes, which may be another than the encoder's."""
    table = getattr(model.get_decoder(), "embed_tokens", None)
    return int(getattr(table, "num_embeddings", 0)) or vocabulary(model)

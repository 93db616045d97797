"""Models in a runtime: what they have in common, whatever computes them."""

from __future__ import annotations

import abc
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from bitlower.ir import Program, ValueSpec
from bitlower.ir.decoder_step import Step, decoder_step
from bitlower.ir.generation import Decode, continue_prompts, write_targets
from bitlower.ir.stages import crossing, decoder_batch, encoder_batch

if TYPE_CHECKING:
    from transformers.generation import BaseStreamer


class RuntimeModel(abc.ABC):
    """A model in a runtime; its program says what it takes and returns, and may have no graphs."""

    program: Program
    runtime: ClassVar[str]
    """What computes."""

    @property
    def inputs(self) -> tuple[ValueSpec, ...]:
        """What it takes."""
        return self.program.inputs

    @property
    def outputs(self) -> tuple[ValueSpec, ...]:
        """What it returns."""
        return self.program.outputs

    @abc.abstractmethod
    def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run it: inputs by name, outputs by name; a past that is left out is empty.

        Raises:
            BitlowerError: an input is missing or unknown.
        """


class GraphModel(RuntimeModel):
    """A model of one graph; a causal language model generates text."""

    @abc.abstractmethod
    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """As calling it, with outputs as tensors of the runtime, which may be inputs of the next run.

        Raises:
            BitlowerError: an input is missing or unknown.
        """

    def step(self) -> Step:
        """One step of a causal language model; its cache stays in the runtime's memory.

        Raises:
            BitlowerError: it is no causal language model.
        """
        return decoder_step(self.program, self.run)

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        max_new_tokens: int = 64,
        stops: Collection[int] | None = None,
        pad: int | None = None,
        streamer: BaseStreamer | None = None,
        **settings: Any,
    ) -> torch.Tensor:
        """The prompts with what follows, ``[batch, prompt + new]`` int64; greedy, if the settings do not say otherwise.

        Arguments and errors are those of :func:`~bitlower.ir.generation.continue_prompts`.

        Raises:
            BitlowerError: it is no causal language model, or an argument does not fit.
        """
        return continue_prompts(
            self.program, self.step(), input_ids, attention_mask,
            max_new_tokens=max_new_tokens, stops=stops, pad=pad, streamer=streamer, **settings,
        )  # fmt: skip


class StagedModel(RuntimeModel):
    """An encoder with a decoder, each of them a graph."""

    def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run both: inputs by name, outputs by name; a past that is left out is empty.

        Raises:
            BitlowerError: an input is missing or unknown.
        """
        batch = self.program.complete(inputs)
        cross = self.encode(**encoder_batch(batch))
        return self.decode(**decoder_batch(batch, cross)) | crossing(cross)

    @abc.abstractmethod
    def encode(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The keys and values of cross-attention, from the source.

        Raises:
            BitlowerError: an input is missing or unknown.
        """

    @abc.abstractmethod
    def decode(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The logits and the decoder's own keys and values; names are those of the decoder alone.

        A past that is left out is empty.

        Raises:
            BitlowerError: an input is missing or unknown.
        """

    def decoding(self) -> Decode:
        """:meth:`decode` for the steps of one call of :meth:`generate`.

        What it returns may be tensors of the runtime, which it takes as the past of the next step.
        """
        return lambda batch: self.decode(**batch)

    def generate(
        self,
        *,
        max_new_tokens: int = 64,
        start: torch.Tensor | None = None,
        stops: Collection[int] | None = None,
        pad: int | None = None,
        **inputs: Any,
    ) -> torch.Tensor:
        """The target of each source, ``[batch, start + new]`` int64; greedy, if the settings do not say otherwise.

        Arguments and errors are those of :func:`~bitlower.ir.generation.write_targets`.

        Args:
            max_new_tokens: at most so many follow the start.
            start: what every target begins with, ``[batch, n]``.
            stops: tokens that end a target.
            pad: what follows the end.
            inputs: what the encoder reads, by name; beside it settings of transformers' ``GenerationConfig``.

        Raises:
            BitlowerError: an argument is missing, unknown or does not fit.
        """
        names = {spec.name for spec in self.inputs}
        return write_targets(
            self.program,
            lambda batch: self.encode(**batch),
            self.decoding(),
            {name: value for name, value in inputs.items() if name in names},
            max_new_tokens=max_new_tokens, start=start, stops=stops, pad=pad,
            **{name: value for name, value in inputs.items() if name not in names},
        )  # fmt: skip

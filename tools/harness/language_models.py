"""A language model for EleutherAI's lm-evaluation-harness, whatever runs it.

Texts become tokens, and long ones windows, as the harness's own class for transformers does it, so that figures compare
with those of others. Requests of equal length run together; none is padded, so that what a quantizer scales at run time
sees tokens of its own alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from bitlower.frontends.tokenize import decode, text_ends, text_ids, token_ids
from bitlower.ir import BitlowerError, CheckError
from bitlower.tools.evaluation.generation import generate
from bitlower.tools.evaluation.language_model import LanguageModel
from bitlower.tools.evaluation.runners import Track

CONTEXT = 2048
"""Tokens of a model that names no longest context, as the harness has it."""
_NEW_TOKENS = 256
"""Of a text that a task sets no limit for, as the harness has it."""
Row = tuple[int, ...]


class HarnessModel(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """A causal language model as the harness asks for it.

    Args:
        model: what runs.
        batch_size: requests of equal length that run together.
        track: wraps the runs with a progress display.

    Raises:
        BitlowerError: the tokenizer names no token that begins or ends a text.
    """

    def __init__(self, model: LanguageModel, *, batch_size: int, track: Track) -> None:
        super().__init__()
        self.model, self.size, self._track = model, batch_size, track
        begin, end = text_ends(model.program)
        if end is None:
            raise BitlowerError(
                f"the tokenizer of {model.program.source or 'the model'} names no token that ends a text",
                hint="name one as eos_token in tokenizer_config.json",
            )
        self._prefix, self._end = end if begin is None else begin, end

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._end

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        return self._prefix

    @property
    def max_length(self) -> int:
        """Tokens that the model takes at once."""
        return self.model.program.context_length or CONTEXT

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The tokens of ``string``, with what the tokenizer puts around it unless that is there or not wanted."""
        program = self.model.program
        begins = has_bos_prefix(string, decode(program, [self._prefix], special=True))
        bare = not string or add_special_tokens is False or (add_special_tokens is None and begins)
        ids: list[int] = (text_ids if bare else token_ids)(program, string).tolist()
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Of each continuation the log of its probability, and whether it is what the model would write greedily."""
        rows = [tuple((context + rest)[-(self.max_length + 1) :]) for _, context, rest in requests]
        wanted: dict[Row, list[int]] = {}
        for place, row in enumerate(rows):
            wanted.setdefault(row[:-1], []).append(place)  # continuations of one token share a run
        results = [(0.0, True)] * len(rows)
        for row, logits in self._runs(sorted(wanted, key=len, reverse=True)):
            for place in wanted[row]:
                tokens = torch.tensor(requests[place][2], dtype=torch.int64)[-len(logits) :]
                last = logits[len(logits) - len(tokens) :]
                chosen = last.log_softmax(-1).gather(1, tokens[:, None])
                results[place] = float(chosen.double().sum()), bool((last.argmax(-1) == tokens).all())
        return results

    def _runs(self, rows: Sequence[Row]) -> Iterator[tuple[Row, torch.Tensor]]:
        """Each row with its logits, ``[tokens, vocabulary]`` float32; rows come sorted by length."""
        parts: list[list[Row]] = []
        for row in rows:
            if not parts or len(parts[-1]) == self.size or len(parts[-1][0]) != len(row):
                parts.append([])
            parts[-1].append(row)
        for part in self._track(parts, "log-likelihoods"):
            ids = torch.tensor(part, dtype=torch.int64)
            places = torch.arange(ids.shape[1]).expand_as(ids)
            logits, _ = self.model.step(
                {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": places.contiguous()}, None
            )
            if bool(logits.isnan().any()):
                raise CheckError(f"the model gives NaN for {decode(self.model.program, part[0])[:60]!r}")
            yield from zip(part, logits.float(), strict=True)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text as a whole, in windows of what the model takes."""
        windows, owners = [], []
        for place, request in enumerate(requests):
            (text,) = request.args
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self._prefix, max_seq_len=self.max_length, context_len=1
            )
            mine = [(None, *make_disjoint_window(window)) for window in cut]
            windows += mine
            owners += [place] * len(mine)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each prompt, up to the first of the texts that end it."""
        return [self._write(*request.args) for request in self._track(requests, "writing")]

    def _write(self, prompt: str, settings: dict[str, Any]) -> str:
        options = dict(normalize_gen_kwargs(settings, _NEW_TOKENS))
        until, count = options.pop("until", None) or [], int(options.pop("max_gen_toks"))
        until = [until] if isinstance(until, str) else list(until)
        if count >= self.max_length:
            raise BitlowerError(
                f"a task asks for {count} tokens, and the model takes {self.max_length} with the prompt",
                hint="set max_gen_toks lower in the task",
            )
        ids = self.tok_encode(prompt)[-(self.max_length - count) :] or [self._prefix]
        if not options.get("do_sample"):
            options.pop("temperature", None)
        text = _Text(self, until)
        streamer = None if options.get("num_beams", 1) > 1 else text
        try:
            tokens = generate(self.model, torch.tensor([ids]), count, stops=[self._end], streamer=streamer, **options)[
                0, len(ids) :
            ].tolist()
        except _Ended:
            tokens = text.tokens
        written = self._text(tokens)
        return str(postprocess_generated_text(written, until, None))

    def _text(self, tokens: Sequence[int]) -> str:
        return decode(self.model.program, [token for token in tokens if token != self._end])


class _Ended(Exception):
    """A text that ends the writing was written."""


class _Text:
    """What is written so far; a streamer of transformers that ends the writing."""

    def __init__(self, owner: HarnessModel, until: Sequence[str]) -> None:
        self.owner, self.until = owner, [end for end in until if end]
        self.tokens: list[int] = []
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        """The prompt at first, then token after token.

        Raises:
            _Ended: the text holds one of those that end it.
        """
        if self._prompt:
            self._prompt = False
            return
        self.tokens += value.flatten().tolist()
        text = self.owner._text(self.tokens)
        if any(end in text for end in self.until):
            raise _Ended

    def end(self) -> None:
        """Nothing is left to be shown."""


def quiet_harness() -> None:
    """Keep what the harness says of defaults out of our output."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)

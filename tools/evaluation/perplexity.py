"""Perplexity of causal language models on a text, with all that its value depends on said beside it.

The protocol is that of Frantar et al. (GPTQ, 2022): the text is tokenized once as a whole and cut into windows of
``window`` tokens, ``stride`` apart; what remains at the end is dropped; each window is run by itself with an empty
cache, and its first token is not predicted. With ``stride = window`` (the default) windows do not overlap, each scores
``window - 1`` tokens, and the perplexity is the exponential of the mean of the windows' cross-entropies. With a smaller
stride every window but the first scores only its last ``stride`` tokens, so that no token counts twice, and the mean is
over tokens.

A model whose tokenizer puts a token such as ``<bos>`` in front of a text was trained to see it there, and each window
begins with it: it takes one place of the window, ``window - 1`` tokens of the text follow, all of which are predicted,
and that many is the default stride.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from bitlower.frontends.tokenize import check_length, lead_names, text_ids, window_lead
from bitlower.ir import BitlowerError, CheckError, Program
from bitlower.tools.data.texts import read_text
from bitlower.tools.evaluation.figures import Figures, exponential, ratio
from bitlower.tools.evaluation.generation import Sample, samples
from bitlower.tools.evaluation.intervals import Interval, cautions, intervals
from bitlower.tools.evaluation.language_model import LanguageModel, language_model

Track = Callable[[Iterable[Any], str], Iterator[Any]]


@dataclass(frozen=True)
class Perplexity:
    """What came out, and the variant.

    Args:
        perplexity: exp of the mean cross-entropy, in nats, of the tokens scored.
        windows: how many were run.
        window: tokens of each.
        stride: from the start of one to that of the next, in tokens of the text.
        tokens_scored: tokens that were predicted.
        tokens: of the whole text.
        lead: the tokens that each window begins with, before those of the text.
        figures: the perplexity as a function of the windows.
    """

    perplexity: float
    windows: int
    window: int
    stride: int
    tokens_scored: int
    tokens: int
    lead: tuple[int, ...] = ()
    figures: Figures | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class TextEvaluation:
    """A language model's evaluation: perplexity, if there was a text, and samples, if there were prompts.

    ``bos`` is the rule for what windows and prompts begin with, ``begins`` what that came to, as text. ``intervals``
    are those of the perplexity, over windows; ``cautions`` is what is to be said of them.
    """

    target: str
    runtime: str
    data: str | None
    joiner: str | None
    perplexity: Perplexity | None
    samples: tuple[Sample, ...] = ()
    bos: str = "auto"
    begins: str = ""
    intervals: dict[str, Interval] = field(default_factory=dict)
    cautions: tuple[str, ...] = ()

    @property
    def metrics(self) -> dict[str, float]:
        """The perplexity by its name, if there is one."""
        return {} if self.perplexity is None else {"perplexity": self.perplexity.perplexity}

    @property
    def figures(self) -> Figures | None:
        """The same as a function of the windows."""
        return None if self.perplexity is None else self.perplexity.figures

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        form: dict[str, Any] = {"target": self.target, "task": "text-generation", "runtime": self.runtime}
        form |= {"bos": self.bos, "begins": self.begins}
        if self.perplexity is not None:
            numbers = asdict(replace(self.perplexity, figures=None)) | {"lead": list(self.perplexity.lead)}
            del numbers["figures"]
            form |= {"data": self.data, "joiner": self.joiner, **numbers, "perplexity": round(numbers["perplexity"], 4)}
            ranges = {name: [round(end, 4) for end in ends] for name, ends in self.intervals.items()}
            form |= {"intervals": ranges, "notes": list(self.cautions)}
        return form | {"samples": [sample.to_dict() for sample in self.samples]}


def evaluate_text(
    target: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    *,
    joiner: str | None = None,
    window: int = 512,
    stride: int | None = None,
    windows: int | None = None,
    prompts: Sequence[str] = (),
    new_tokens: int = 64,
    bos: str = "auto",
    seed: int = 0,
    track: Track = lambda items, label: iter(items),
) -> TextEvaluation:
    """Perplexity of ``target`` on ``data``, and greedy samples from ``prompts``.

    Args:
        target: an artifact's folder (ONNX, checkpoint or library), or a float model as the frontends take it.
        data: a text file, or a table (``FILE:COLUMN``).
        joiner: see :func:`~bitlower.tools.data.texts.read_text`.
        window: tokens of a window.
        stride: from window to window; the window's tokens of the text if left out.
        windows: the first so many; all if left out.
        prompts: to continue.
        new_tokens: of each sample, at most.
        bos: what windows and prompts begin with; see :func:`~bitlower.frontends.tokenize.window_lead`.
        seed: of the resamples of windows that the interval comes from.
        track: wraps the windows with a progress display.

    Raises:
        BitlowerError: neither data nor prompts, or bad input.
        CheckError: the model gives NaN.
    """
    if data is None and not prompts:
        raise BitlowerError("there is nothing to evaluate on", hint="give --data for perplexity, or --prompt")
    text = None if data is None else read_text(data, joiner=joiner)
    model = language_model(target)
    result, lead = None, window_lead(model.program, bos)
    if text is not None:
        ids = text_ids(model.program, text)
        result = perplexity(model, ids, window=window, stride=stride, windows=windows, lead=lead, track=track)
    name, begins = None if data is None else os.fspath(data), lead_names(model.program, lead)
    continued = samples(model, prompts, new_tokens, bos=bos)
    measured = TextEvaluation(os.fspath(target), model.runtime, name, joiner, result, continued, bos, begins)
    if result is None or result.figures is None:
        return measured
    ranges = intervals(result.figures, seed=seed)
    return replace(measured, intervals=ranges, cautions=cautions(result.figures, ranges))


def perplexity(
    model: Program | LanguageModel,
    ids: torch.Tensor,
    *,
    window: int = 512,
    stride: int | None = None,
    windows: int | None = None,
    lead: Sequence[int] = (),
    track: Track = lambda items, label: iter(items),
) -> Perplexity:
    """Perplexity on the tokens ``ids`` (``[n]``), each window behind the tokens ``lead``; see the top of the module.

    Raises:
        BitlowerError: the numbers make no sense, or the text is too short for them.
        CheckError: the model gives NaN.
    """
    model, room = language_model(model), window - len(lead)
    check_length(model.program, window)
    stride = room if stride is None else stride
    starts = _starts(ids.numel(), room, stride, windows)
    first, predicted = torch.tensor(lead, dtype=torch.int64), room if lead else room - 1
    losses, scored = list[float](), list[int]()
    for start in track(starts, "perplexity"):
        part = torch.cat([first, ids[start : start + room]])
        fresh = predicted if start == 0 else min(stride, predicted)
        loss = _cross_entropy(model, part)[-fresh:].double().sum().item()
        if math.isnan(loss):
            raise CheckError(f"the model gives NaN for the window of tokens {start} to {start + room}")
        losses.append(loss)
        scored.append(fresh)
    mean = sum(losses) / sum(scored)
    value = math.exp(mean) if mean < 700 else math.inf
    read = repr((ids.tolist(), tuple(lead), starts, window))
    by_name = {"perplexity": exponential(ratio(losses, scored, scale=1.0))}
    figures = Figures(len(starts), "windows", by_name, hashlib.sha256(read.encode()).hexdigest())
    return Perplexity(value, len(starts), window, stride, sum(scored), ids.numel(), tuple(lead), figures)


def _starts(tokens: int, window: int, stride: int, windows: int | None) -> range:
    """The first token of each window, which takes ``window`` tokens of the text."""
    if not 1 <= stride <= window:
        raise BitlowerError(f"a stride of {stride} makes no sense", hint=f"take 1 to {window}, the window")
    starts = range(0, tokens - window + 1, stride)
    if not starts or (windows is not None and not 1 <= windows <= len(starts)):
        wanted = "a window" if windows is None else f"{windows} windows"
        raise BitlowerError(
            f"the text has {tokens} tokens, that is {len(starts)} windows of {window}; {wanted} cannot be had from it",
            hint="ask for fewer or shorter ones, or give a longer text",
        )
    return starts if windows is None else starts[:windows]


def _cross_entropy(model: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
    """``-log p`` of each token but the first, given those before it, ``[n - 1]``."""
    batch, ones = ids[None], torch.ones_like(ids)[None]
    feed = {"input_ids": batch, "attention_mask": ones, "position_ids": torch.arange(len(ids))[None]}
    logits, _ = model.step(feed, None)
    return cross_entropy(logits[0, :-1].float(), ids[1:], reduction="none")

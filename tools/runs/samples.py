"""How far outputs of held-out samples lie from the float model's, and where another token first becomes likeliest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from bitlower.frontends.tokenize import decode
from bitlower.ir import Batch, BitlowerError, Program
from bitlower.ir.digits import significant
from bitlower.ir.operators import graph_results
from bitlower.ir.tokens import BATCH, token_dim, token_ids, token_mask

WORST = 10
"""Samples that are kept."""
_ROWS = 1 << 20
"""Entries of logits that are float64 at a time."""


def judged_output(program: Program) -> tuple[str, int]:
    """The output that samples are judged by, and its place: logits, or else the first; an empty name if there is none.

    Its first dimension is the batch, its last a vector, with or without one of tokens between.
    """
    places = [
        (spec.name, place)
        for place, spec in enumerate(program.outputs)
        if spec.type.is_float and spec.type.rank in (2, 3) and spec.type.shape[0] == BATCH
    ]
    return next((one for one in places if "logits" in one[0]), places[0] if places else ("", 0))


def output_node(program: Program, place: int) -> fx.Node:
    """The node that computes the output at ``place``."""
    return graph_results(program.graph)[place]


@dataclass
class SampleLosses:
    """Rows for samples, in order of arrival.

    Args:
        name: of the output.
    """

    name: str
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, node: fx.Node, expected: torch.Tensor, actual: torch.Tensor, batch: Batch) -> None:
        """Take a batch of outputs, ``[batch, width]`` or ``[batch, tokens, width]``; padding does not count."""
        mask = token_mask(batch, token_dim(node.meta["type"].shape)) if expected.dim() == 3 else None
        for index, (rows, others) in enumerate(zip(expected, actual, strict=True)):
            rows, others = (part.reshape(-1, part.shape[-1]) for part in (rows, others))
            places = torch.arange(len(rows))
            if mask is not None and mask.shape == expected.shape[:2]:
                places = mask[index].nonzero().reshape(-1)
            self.rows.append({"sample": len(self.rows), "tokens": len(places), **self._loss(rows, others, places)})

    def _loss(self, rows: torch.Tensor, others: torch.Tensor, places: torch.Tensor) -> dict[str, Any]:
        signal = noise = divergence = 0.0
        first: int | None = None
        for part in torch.split(places, max(_ROWS // rows.shape[-1], 1)):
            a, b = rows[part].double(), others[part].double()
            signal, noise = signal + float(a.square().sum()), noise + float((b - a).square().sum())
            if "logits" in self.name:
                p, q = a.log_softmax(-1), b.log_softmax(-1)
                divergence += float((p.exp() * (p - q)).sum())
                differing = (a.argmax(-1) != b.argmax(-1)).nonzero().reshape(-1)
                if first is None and len(differing):
                    first = int(part[differing[0]])
        form: dict[str, Any] = {
            "relative_error": significant(math.sqrt(noise / signal) if signal else float(noise > 0))
        }
        if "logits" in self.name:
            form["kl_divergence"] = significant(max(divergence / max(len(places), 1), 0.0))
            form["differs_at"] = first
            if first is not None:
                form["expected"], form["actual"] = int(rows[first].argmax()), int(others[first].argmax())
        return form

    def worst(self) -> list[dict[str, Any]]:
        """The samples with the largest losses, the worst first."""
        key = "kl_divergence" if "logits" in self.name else "relative_error"
        return sorted(self.rows, key=lambda row: (-row[key], row["sample"]))[:WORST]


@dataclass(frozen=True)
class SampleText:
    """A sample in words.

    Args:
        sample: its number among the held-out ones.
        text: its tokens up to where another one becomes likeliest; all of them where none does.
        expected: the likeliest next token of the float model; empty where none differs.
        actual: that of the quantized model.
    """

    sample: int
    text: str
    expected: str = ""
    actual: str = ""


def sample_texts(
    program: Program, batches: Sequence[Batch], rows: Iterable[Mapping[str, Any]]
) -> tuple[SampleText, ...]:
    """The texts of ``rows``, as :meth:`SampleLosses.worst` has them; none where the model reads no text.

    Args:
        program: has the tokenizer.
        batches: the held-out ones, in the order in which they were run.
        rows: of samples.
    """
    samples = [(batch, index) for batch in batches for index in range(len(next(iter(batch.values()))))]
    texts = []
    for row in rows:
        batch, index = samples[row["sample"]]
        ids, mask = token_ids(batch), token_mask(batch)
        if ids is None:
            return ()
        own = ids[index] if mask is None else ids[index][mask[index]]
        place = row.get("differs_at")
        before = (
            int(place) + 1 - (0 if mask is None else int((~mask[index][: int(place)]).sum()))
            if place is not None
            else None
        )
        try:
            words = [decode(program, [row[key]]) if place is not None else "" for key in ("expected", "actual")]
            texts.append(SampleText(row["sample"], decode(program, own[:before].tolist()), *words))
        except BitlowerError:
            return ()
    return tuple(texts)

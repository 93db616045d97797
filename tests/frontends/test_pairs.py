"""Batches of sources and targets against transformers' own shifting, and targets that a model writes itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from transformers.models.bart.modeling_bart import shift_tokens_right
from transformers.models.mbart.modeling_mbart import shift_tokens_right as wrap_tokens_right

from bitlower.frontends import batches
from bitlower.frontends.pairs import pair_batches, shifted
from bitlower.ir import BitlowerError, Program
from bitlower.ir.assets import read_assets
from bitlower.ir.generation import program_stages, write_targets

SOURCES = ["the cat sings", "a small dog sleeps near the old river", "bird"]
TARGETS = ["cat", "dog sleeps near the river", "a bird"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, seq2seq: Any) -> Path:
    return seq2seq.save("bart", tmp_path_factory.mktemp("bart"))


@pytest.fixture(scope="module")
def program(folder: Path, seq2seq: Any) -> Program:
    return replace(seq2seq.traced("bart"), assets=read_assets(folder))


def test_targets_are_shifted_as_transformers_does(program: Program, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (batch,) = batches(program, SOURCES, pairs=TARGETS)
    read = tokenizer(SOURCES, padding=True, return_tensors="pt")
    labels = tokenizer(text_target=TARGETS, padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], read["input_ids"])
    assert torch.equal(batch["attention_mask"], read["attention_mask"])
    mask = labels["attention_mask"]
    expected = shift_tokens_right(labels["input_ids"].masked_fill(mask == 0, -100), 1, 2)
    assert torch.equal(batch["decoder_attention_mask"], mask)
    assert torch.equal(batch["decoder_input_ids"][mask.bool()], expected[mask.bool()])
    assert bool(torch.isfinite(program(**batch)["logits"]).all())


def test_without_a_start_token_the_last_one_comes_first(program: Program) -> None:
    without = replace(program, config={**program.config, "decoder_start_token_id": None}, assets={})
    assert shifted(without, [5, 6, 2, 9]) == wrap_tokens_right(torch.tensor([[5, 6, 2, 9]]), 1)[0].tolist()


def test_a_target_without_tokens_is_refused(program: Program) -> None:
    with pytest.raises(BitlowerError, match="a target has no token"):
        shifted(program, [])


def test_what_is_cut_is_counted(program: Program) -> None:
    pairs = pair_batches(program, SOURCES, TARGETS, max_length=5, batch_size=2)
    assert (pairs.cut_sources, pairs.cut_targets) == (1, 1)
    assert [batch["input_ids"].shape[1] for batch in pairs.batches] == [5, 2]
    assert [batch["decoder_input_ids"].shape[1] for batch in pairs.batches] == [5, 3]
    long = pair_batches(program, [" ".join(["cat"] * 40)], ["dog"], max_length=100, batch_size=1)
    assert (long.cut_sources, long.batches[0]["input_ids"].shape[1]) == (1, 24), "what the encoder takes"


def test_without_targets_the_model_writes_them(program: Program) -> None:
    (batch,) = batches(program, SOURCES, max_length=8)
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}
    start = torch.full((3, 1), 2)
    own = write_targets(program, *program_stages(program), source, start=start, stops=[2], max_new_tokens=8)
    counts = batch["decoder_attention_mask"].sum(1)
    for row, count in enumerate(counts):
        assert torch.equal(batch["decoder_input_ids"][row, :count], own[row, :count])


def test_a_model_that_names_no_start_cannot_write_targets(program: Program) -> None:
    config = {**program.config, "decoder_start_token_id": None}
    assets = {name: data for name, data in program.assets.items() if name != "generation_config.json"}
    with pytest.raises(BitlowerError, match="names no decoder_start_token_id, so that it cannot write targets"):
        batches(replace(program, config=config, assets=assets), SOURCES)

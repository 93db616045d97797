"""Batches of tokens against transformers' own tokenizer."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

from bitlower.frontends import batches, load
from bitlower.frontends.tokenize import random_windows
from bitlower.ir import BitlowerError, Program

TEXTS = ["the cat sings", "a small dog sleeps near the old river and never falls", "bird", "quick quick", "unheard of"]


@pytest.fixture(scope="module")
def program(saved) -> Program:
    return load(saved["encoder"])


@pytest.fixture(scope="module")
def tokenizer(saved):
    return AutoTokenizer.from_pretrained(saved["encoder"])


@pytest.mark.parametrize("size", [1, 2, 8])
def test_batches_are_those_of_the_tokenizer(program, tokenizer, size: int) -> None:
    found = batches(program, TEXTS, batch_size=size)
    assert [b["input_ids"].shape[0] for b in found] == [len(TEXTS[i : i + size]) for i in range(0, len(TEXTS), size)]
    for start, batch in zip(range(0, len(TEXTS), size), found, strict=True):
        expected = tokenizer(TEXTS[start : start + size], padding=True, return_tensors="pt", return_token_type_ids=True)
        assert list(batch) == ["input_ids", "attention_mask", "token_type_ids"]
        for name, value in batch.items():
            assert value.dtype == torch.int64
            assert value.is_contiguous()
            assert torch.equal(value, expected[name])


def test_batches_are_padded_to_their_own_longest_and_masked(program) -> None:
    first, second, _ = batches(program, TEXTS, batch_size=2)
    assert first["input_ids"].shape == (2, 13)
    assert second["input_ids"].shape == (2, 4)
    assert first["attention_mask"].sum(1).tolist() == [5, 13]
    assert bool((first["input_ids"][first["attention_mask"] == 0] == 0).all())


def test_they_run(program) -> None:
    for batch in batches(program, TEXTS, batch_size=3):
        assert bool(torch.isfinite(program(**batch)["last_hidden_state"]).all())


def test_pairs_have_two_kinds_of_tokens(program, tokenizer) -> None:
    (batch,) = batches(program, TEXTS[:2], pairs=["a bird", "the dog"])
    expected = tokenizer(
        TEXTS[:2], ["a bird", "the dog"], padding=True, return_tensors="pt", return_token_type_ids=True
    )
    assert all(torch.equal(batch[name], expected[name]) for name in batch)
    assert batch["token_type_ids"].max() == 1


def test_long_texts_are_cut(program) -> None:
    (batch,) = batches(program, TEXTS[1:2], max_length=6)
    assert batch["input_ids"].shape == (1, 6)
    assert batch["input_ids"][0, -1] == 3, "the separator stays"
    (pair,) = batches(program, TEXTS[1:2], pairs=TEXTS[1:2], max_length=9)
    assert pair["input_ids"].shape == (1, 9)


def test_texts_are_cut_to_what_model_and_tokenizer_can_take(program) -> None:
    long = [" ".join(["cat"] * 300)]
    (batch,) = batches(program, long)
    assert batch["input_ids"].shape == (1, 20), "the tokenizer's limit, below the model's"
    longer = program.clone()
    config = json.loads(program.assets["tokenizer_config.json"])
    longer.assets["tokenizer_config.json"] = json.dumps({**config, "model_max_length": 10**9}).encode()
    (batch,) = batches(longer, long)
    assert batch["input_ids"].shape == (1, 24), "the model's positions"
    assert longer(**batch)["last_hidden_state"].shape == (1, 24, 32)


def test_only_inputs_of_the_model_are_given(program) -> None:
    two = program.clone()
    two.inputs = two.inputs[:2]
    (batch,) = batches(two, ["a cat"])
    assert list(batch) == ["input_ids", "attention_mask"]


def test_empty_texts_are_sequences_too(program) -> None:
    (batch,) = batches(program, ["", "a cat"])
    assert batch["attention_mask"].sum(1).tolist() == [2, 4]


def test_no_text_is_an_error(program) -> None:
    with pytest.raises(BitlowerError, match="there is no text to tokenize"):
        batches(program, [])


def test_pairs_of_another_number_are_an_error(program) -> None:
    with pytest.raises(BitlowerError, match="there are 2 texts and 1 second sequences; give one for each"):
        batches(program, TEXTS[:2], pairs=["a"])


@pytest.mark.parametrize("numbers", [{"batch_size": 0}, {"max_length": 0}, {"max_length": -5}])
def test_numbers_that_make_no_sense_are_an_error(program, numbers: dict[str, int]) -> None:
    with pytest.raises(BitlowerError, match="make no sense; take 1 and 4 at least"):
        batches(program, ["a"], **numbers)


def test_a_program_without_a_tokenizer_is_an_error(program) -> None:
    bare = program.clone()
    bare.assets = {}
    with pytest.raises(BitlowerError, match=r"has no tokenizer files; put tokenizer\.json beside config\.json"):
        batches(bare, ["a"])


def test_a_damaged_tokenizer_is_an_error(program) -> None:
    bad = program.clone()
    bad.assets = {**bad.assets, "tokenizer.json": b"{", "vocab.txt": b"\xff\xfe"}
    with pytest.raises(BitlowerError, match=r"the tokenizer of .* cannot be loaded"):
        batches(bad, ["a"])


def test_the_vocabulary_alone_will_do(program, tokenizer) -> None:
    """Older models have vocab.txt and no more."""
    old = program.clone()
    words = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    old.assets = {"vocab.txt": ("\n".join(words) + "\n").encode()}
    (batch,) = batches(old, ["the cat sings"])
    assert torch.equal(batch["input_ids"], tokenizer(["the cat sings"], return_tensors="pt")["input_ids"])


def test_a_tokenizer_that_cannot_pad_is_an_error(program) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    bare = program.clone()
    tokens = Tokenizer(WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 20}
    bare.assets = {"tokenizer.json": tokens.to_str().encode(), "tokenizer_config.json": json.dumps(settings).encode()}
    with pytest.raises(BitlowerError, match=r"has no padding token; name one in tokenizer_config\.json"):
        batches(bare, ["a"])


def test_random_tokens_are_inputs_of_the_model_and_follow_the_seed(program) -> None:
    first, second = random_windows(program, seed=1), random_windows(program, seed=1)
    assert [tuple(batch["input_ids"].shape) for batch in first] == [(1, 24)] * 2  # as many as the model takes
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0]["input_ids"], random_windows(program, seed=2)[0]["input_ids"])
    assert set(program(**first[0])) == {spec.name for spec in program.outputs}
    with pytest.raises(BitlowerError, match="reads no token ids"):
        random_windows(replace(program, config={}))


@pytest.mark.parametrize("value", ["x", -5, 1.5, None, [], {}, [1], {"a": 1}, True])
def test_settings_of_other_types_work_or_are_an_error_that_names_the_tokenizer(program, value: object) -> None:
    keys = ("model_max_length", "pad_token", "padding_side", "model_input_names", "do_lower_case", "tokenizer_class")
    for key in keys:
        odd = program.clone()
        config = json.loads(program.assets["tokenizer_config.json"])
        odd.assets["tokenizer_config.json"] = json.dumps({**config, key: value}).encode()
        try:
            batches(odd, ["a cat"])
        except BitlowerError as error:
            message = str(error)
        else:
            message = "the tokenizer works"
        assert "tokenizer" in message
        assert "\n" not in message, key

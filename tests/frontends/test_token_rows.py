"""Rows of tokens that know where they come from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bitlower.frontends import load
from bitlower.frontends.token_rows import context_rows, first_token, padded_rows, word_rows
from bitlower.ir import BitlowerError, Program

CONTEXT = "the old cat sings near a river ,  and the small dog sleeps under a bird"


@pytest.fixture(scope="module")
def program(saved: dict[str, Path]) -> Program:
    return load(saved["encoder"])


def test_tokens_know_their_word(program: Program) -> None:
    (row,) = word_rows(program, [["the", "cats", "sings"]], max_length=20)
    assert row.origins == (None, 0, 1, 2, None)
    first, second, short = word_rows(program, [["the", "cat", "sings", "near"], ["dog"]], max_length=5)
    assert (first.origins, second.origins, short.origins) == ((None, 0, 1, 2, None), (None, 3, None), (None, 0, None))
    assert (first.text, second.text, short.text) == (0, 0, 1)


def test_tokens_of_a_context_know_their_characters(program: Program) -> None:
    rows = context_rows(program, "a dog", CONTEXT, text=3, max_length=13, where="a.jsonl, line 1")
    assert len(rows) > 2
    words = [[CONTEXT[slice(*span)] for span in row.origins if span] for row in rows]
    assert words[0] == CONTEXT.split()[:8]
    assert [words[0][-4:], words[1][-4:]] == [words[1][:4], words[2][:4]]  # half of a window is shared
    assert words[-1][-1] == "bird"
    assert {(row.text, row.types[:4], row.types[-1], first_token(program, row)) for row in rows} == {
        (3, (0,) * 4, 1, 0)
    }
    (row,) = context_rows(program, "a dog", "the cat", text=0, max_length=20, where="")
    assert [bool(span) for span in row.origins] == [False] * 4 + [True] * 2 + [False]


def test_a_question_that_leaves_no_room_is_named(program: Program) -> None:
    with pytest.raises(BitlowerError, match=r"a.jsonl, line 7: the question has 3 tokens, which leave no room .* in 7"):
        context_rows(program, "the old cat", CONTEXT, text=0, max_length=7, where="a.jsonl, line 7")


def test_padding_changes_nothing(program: Program) -> None:
    rows = word_rows(program, [["the", "cat", "sings", "near"], ["dog"], ["a", "bird"]], max_length=20)
    batches = padded_rows(program, rows, batch_size=2)
    assert [batch.places for batch in batches] == [(1, 2), (0,)]
    assert batches[0].inputs["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    together = program(**batches[0].inputs)["last_hidden_state"][0, :3]
    (alone,) = padded_rows(program, rows[1:2], batch_size=1)
    torch.testing.assert_close(together, program(**alone.inputs)["last_hidden_state"][0])


def test_a_byte_level_tokenizer_reads_words_as_in_running_text(program: Program, tmp_path: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaTokenizer

    trainer = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer.train_from_iterator(["the cat sings near the cat"] * 5, vocab_size=300, special_tokens=special)
    trainer.save_model(str(tmp_path))
    tokenizer = RobertaTokenizer.from_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path / "saved")
    files = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    bytewise = replace(program, assets=files, config={"model_type": "roberta", "vocab_size": 300})
    (row,) = word_rows(bytewise, [["the", "cat", "sings"]], max_length=20)
    assert list(row.ids) == tokenizer("the cat sings")["input_ids"]
    assert row.origins == (None, 0, 1, 2, None)


def test_a_tokenizer_must_say_where_its_tokens_stand(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: object) -> object:
        return type("Slow", (), {"is_fast": False})

    monkeypatch.setattr("bitlower.frontends.token_rows.tokenizer_of", slow)
    with pytest.raises(BitlowerError, match=r"does not say where in a text its tokens stand; put its tokenizer\.json"):
        word_rows(program, [["the"]], max_length=20)

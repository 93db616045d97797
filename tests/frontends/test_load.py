"""The door to the frontends: which one takes what, and what nobody takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from bitlower.frontends import load
from bitlower.ir import BitlowerError, Level


def test_a_folder_by_text_or_path(saved) -> None:
    by_text, by_path = load(str(saved["encoder"])), load(Path(saved["encoder"]))
    assert by_text.source == by_path.source == str(saved["encoder"])
    assert by_text.digest() == by_path.digest()
    assert by_text.level is Level.FLOAT


def test_a_transformers_model_in_memory_needs_no_inputs() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=24,
    )  # fmt: skip
    program = load(BertModel(config))
    assert (program.task, program.source) == ("feature-extraction", "BertModel")
    assert program.assets == {}
    with pytest.raises(BitlowerError, match="unknown task 'translation'"):
        load(BertModel(config), task="translation")


def test_any_module_with_example_inputs() -> None:
    program = load(nn.Linear(4, 2), example_inputs={"input": torch.randn(3, 4)})
    assert program.task == "custom"
    assert load(nn.Linear(4, 2), task="scoring", example_inputs={"input": torch.randn(3, 4)}).task == "scoring"


def test_a_module_without_example_inputs_is_an_error() -> None:
    with pytest.raises(BitlowerError, match="Linear needs example inputs to be traced; pass `example_inputs`"):
        load(nn.Linear(4, 2))


def test_a_folder_that_is_not_there_is_an_error(tmp_path) -> None:
    with pytest.raises(BitlowerError, match="no model folder at"):
        load(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("task", ["feature-extracton", "translation"])
def test_an_unknown_task_names_the_nearest(saved, task: str) -> None:
    with pytest.raises(BitlowerError, match=f"unknown task '{task}'") as error:
        load(saved["encoder"], task=task)
    assert "feature-extraction, fill-mask, image-classification" in error.value.hint
    assert ("did you mean 'feature-extraction'?" in error.value.hint) == (task == "feature-extracton")

"""What evaluations run models with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bitlower.frontends.token_rows import word_rows
from bitlower.ir import Batch, BitlowerError, CheckError, Program
from bitlower.tools.evaluation.runners import Runner, check_output, configuration, open_runner, run_rows

SENTENCES = [["the", "old", "cats"], ["rain"], ["a", "bird"]]


def test_rows_get_what_the_model_gives_for_them_alone(bert_program: Program) -> None:
    rows = word_rows(bert_program, SENTENCES, max_length=20)
    results = dict(run_rows(open_runner(bert_program), rows, 2, lambda items, label: iter(items)))
    assert sorted(results) == [0, 1, 2]
    for place, row in enumerate(rows):
        ids = torch.tensor([row.ids])
        alone = bert_program(input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=torch.zeros_like(ids))
        expected = alone["last_hidden_state"][0].detach().numpy()
        assert results[place]["last_hidden_state"] == pytest.approx(expected, abs=1e-5)


def test_nan_is_a_failed_check_but_not_in_padding(bert_program: Program) -> None:
    rows = word_rows(bert_program, SENTENCES[:2], max_length=20)

    def runner(line: int) -> Runner:
        def run(batch: Batch) -> dict[str, np.ndarray]:
            values = np.zeros((*batch["input_ids"].shape, 2), np.float32)
            values[line, -1] = np.nan
            return {"logits": values}

        return Runner(bert_program, run)

    def results(line: int) -> list[int]:
        return [place for place, _ in run_rows(runner(line), rows, 2, lambda items, label: iter(items))]

    assert results(0) == [1, 0]  # the last token of the shorter row is padding
    with pytest.raises(CheckError, match="the model gives NaN in logits, for text 1 of the data"):
        results(1)


def test_an_output_of_the_wrong_shape_is_refused(tiny_program: Program) -> None:
    runner = open_runner(tiny_program)
    check_output(runner, "a task", "logits", (None, 4))
    check_output(runner, "a task", "logits", ("batch", 4))
    for name, shape in (("logits", (None, 5)), ("logits", (None, None, 4)), ("scores", (None, 4))):
        with pytest.raises(BitlowerError, match=rf"a task needs {name} \[…, .*\], and the model gives hidden: float32"):
            check_output(runner, "a task", name, shape)


def test_a_configuration_is_read_without_the_model(bert: Path, bert_program: Program, tmp_path: Path) -> None:
    assert configuration(bert) == json.loads((bert / "config.json").read_text())
    assert configuration(bert_program) is bert_program.config
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BitlowerError, match=r"config\.json is not JSON"):
        configuration(tmp_path)

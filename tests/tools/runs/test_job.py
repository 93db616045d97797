"""What a run reads and what it holds."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bitlower.ir import Level, Program, batch_sizes
from bitlower.tools.data.batches import Data
from bitlower.tools.runs.flow import quantize
from bitlower.tools.runs.job import CUT, Job


@pytest.mark.parametrize(("limit", "length"), [(1 << 30, 40), (4 * (2 * 20 * 32 + 32), 20)])
def test_held_out_batches_are_cut_to_outputs_that_fit_and_others_are_not(
    bert_program: Program, limit: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two texts of 40 tokens; each token has an output of 32 values, and each text another."""
    monkeypatch.setattr(batch_sizes, "LARGEST_OUTPUTS", limit)
    ids = torch.arange(1, 81).reshape(2, 40)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    data = Job(lambda traces: bert_program, lambda program: Data([batch], [batch]), ()).read(bert_program)
    assert data.calibration[0] is batch
    assert {tuple(tensor.shape) for tensor in data.evaluation[0].values()} == {(2, length)}
    assert data.notes == ((CUT,) if length < 40 else ())


def float_programs() -> set[int]:
    """Those that are alive, by their addresses."""
    gc.collect()
    return {id(x) for x in gc.get_objects() if type(x) is Program and x.level is Level.FLOAT}


def test_the_float_program_is_gone_when_the_artifact_is_written(
    bert: Path, texts: Path, tmp_path: Path, backend: SimpleNamespace
) -> None:
    before, alive = float_programs(), []

    def export(self: Any, program: Program, folder: Path, batches: Any, provenance: Any = None) -> Any:
        alive.append(float_programs() - before)
        (folder / "manifest.json").write_text("{}")
        return backend.report()

    backend.replace(export=export)
    quantize(str(bert), calibration=str(texts), output=tmp_path / "out")
    assert alive == [set()]

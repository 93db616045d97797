"""Tables to train on, and the rows of batches, for the tests of training data."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitlower.ir import Program
from bitlower.tools.data.batches import Data
from bitlower.tools.data.sources import DataSource
from bitlower.tools.data.training import with_training
from bitlower.tools.recipes.recipe import Recipe

sentences = runpy.run_path(str(Path(__file__).with_name("conftest.py")))["sentences"]


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Path]:
    """``table(rows, name)`` writes a table with the header ``sentence, other, label``."""

    def write(rows: list[tuple[str, str, str]], name: str = "train.tsv") -> Path:
        lines = ["sentence\tother\tlabel", *("\t".join(row) for row in rows)]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return tmp_path / name

    return write


def rows(count: int = 50, seed: int = 0) -> list[tuple[str, str, str]]:
    """Different texts, a third of them of class 1, sorted by class."""
    first, second = sentences(count, seed), sentences(count, seed + 1000)
    return [(a, b, str(int(i >= 2 * count // 3))) for i, (a, b) in enumerate(zip(first, second, strict=True))]


def made(program: Program, training: dict[str, Any], *, decoder: bool = False, bos: str = "auto") -> Data:
    form = {"model": {"path": "x", "bos": bos}, "passes": ["clean"], "export": ["onnx-qdq"], "training": training}
    return with_training(DataSource(lambda program: Data()), Recipe.model_validate(form), decoder).batches(program)


def lines(batches: Any, *names: str) -> list[tuple[Any, ...]]:
    """The rows of all batches without their padding: tokens, and what else ``names`` says."""
    found = []
    for batch in batches:
        for place, mask in enumerate(batch["attention_mask"].bool()):
            ids = tuple(batch["input_ids"][place][mask].tolist())
            found.append((ids, *(batch[name][place].tolist() for name in names)))
    return found

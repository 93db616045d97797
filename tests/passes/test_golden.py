"""Each pass that changes a graph, before and after, in text: ``<family>/golden/<pass>.txt``.

A file has the step as pipeline text, the program before, and the program after, at most 50 lines in all;
docs/passes.md shows it. Values of tensors are small whole numbers that follow from their names, so that sums are exact
on every processor; scales are 1, 2, … where the text before has a range.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from bitlower.ir import Batch, Program, TensorType
from bitlower.ir.parse import Fill, parse
from bitlower.passes import Context, Contract, PassManager, known_passes, parse_pipeline

HERE = Path(__file__).parent
BEFORE, AFTER = "# before\n", "# after\n"
VALUES_ALONE = {
    "autoround": "it changes values of weights alone, and needs repeated blocks",
    "lkd": "it changes values of weights and ranges alone, and needs repeated blocks",
    "qat": "it changes values of weights and ranges alone",
    "prefix-sinks": "a decoder with a cache takes more than 50 lines",
    "peg-permute": "the order of stored channels alone changes; `scope: layer` adds gathers",
}
"""Passes whose work is not seen in the text."""
FILES = sorted(HERE.glob("*/golden/*.txt"))


def value(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Whole numbers from -3 to 3 that follow from ``name``."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    generator = torch.Generator().manual_seed(seed)
    low, high = (-3, 4) if dtype.is_floating_point else (0, 4)
    return torch.randint(low, high, shape, generator=generator).to(dtype)


def fill(text: str) -> Fill:
    """What the tensors of the program ``text`` hold."""

    def make(name: str, kind: TensorType) -> torch.Tensor:
        shape = tuple(int(size) for size in kind.shape)
        if name.endswith((".scale", ".zero_point")):
            readers = [line for line in text.splitlines() if f"@{name}," in line or f"@{name})" in line]
            calibrated = name.endswith(".scale") and not any(" uncalibrated" in line for line in readers)
            scales = torch.arange(1, torch.Size(shape).numel() + 1).reshape(shape)
            return (scales if calibrated else torch.zeros(shape)).to(kind.dtype)
        return value(name, shape, kind.dtype)

    return make


def batch(program: Program) -> Batch:
    """An input of two rows, of four tokens where there are tokens."""
    sizes = {"batch": 2, "sequence": 4}
    return {
        spec.name: value(
            spec.name, tuple(sizes[d] if isinstance(d, str) else d for d in spec.type.shape), spec.type.dtype
        )
        for spec in program.inputs
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_pass_does_what_its_file_shows(file: Path, request: pytest.FixtureRequest) -> None:
    content = file.read_text(encoding="utf-8")
    step, _, rest = content.partition(BEFORE)
    before, _, expected = rest.partition(AFTER)
    [pass_] = parse_pipeline(step.strip().removeprefix("# "))
    assert pass_.name == file.stem
    program = parse(before, fill(before))
    assert str(program) == before
    data = [batch(program)]
    after = str(PassManager([pass_]).run(program, Context(data, data)))
    if request.config.getoption("--update-golden"):
        file.write_text(f"{step}{BEFORE}{before}{AFTER}{after}", encoding="utf-8")
    else:
        assert after == expected
        assert after != before
    assert len(file.read_text().splitlines()) <= 50


def test_every_pass_that_changes_graphs_has_a_file() -> None:
    known = {name: cls for name, cls in known_passes().items() if cls.__module__.startswith("bitlower.passes.")}
    changing = {name for name, cls in known.items() if cls.contract is not Contract.ANALYSIS}
    assert {file.stem for file in FILES} == changing - set(VALUES_ALONE)
    for file in FILES:
        family = Path(known[file.stem].__module__.replace(".", "/")).parent.name
        assert file.parent.parent.name == family

"""The comparison of a runtime's outputs with the Program's, part by part, against numpy."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bitlower.backends.artifact import outputs as sums
from bitlower.backends.artifact.outputs import OutputComparison
from bitlower.ir import CheckError


@pytest.fixture
def comparison(monkeypatch: pytest.MonkeyPatch) -> OutputComparison:
    """Of one output, in parts that end within a row."""
    monkeypatch.setattr(sums, "_PART", 16)
    return OutputComparison(SimpleNamespace(outputs=[SimpleNamespace(name="logits")]))  # type: ignore[arg-type]


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    """The Program's values, and others near them."""
    generator = np.random.default_rng(0)
    ours = generator.normal(2, 1, (3, 7, 5)).astype(np.float32)
    return ours, ours + generator.normal(0, 1e-2, ours.shape).astype(np.float32)


def test_figures_are_numpys(comparison: OutputComparison, pair) -> None:
    ours, theirs = pair
    visible = np.random.default_rng(1).random((3, 7, 1)) < 0.6
    masks = {"logits": torch.from_numpy(visible)}
    comparison.add({"logits": torch.from_numpy(ours)}, {"logits": theirs}, masks)
    comparison.add_given_codes({"logits": torch.from_numpy(ours)}, {"logits": (ours + theirs) / 2}, masks)
    (row,) = comparison.rows()
    counts = np.broadcast_to(visible, ours.shape)
    a, b = (array.astype(np.float64)[counts] for array in pair)
    assert row.worst == pytest.approx(np.abs(a - b).max())
    assert row.mean == pytest.approx(np.abs(a - b).mean())
    assert row.relative == pytest.approx(np.abs(a - b).max() / a.std())
    assert row.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-12)
    assert row.given_codes == pytest.approx(row.relative / 2, rel=1e-4)


def test_what_is_infinite_in_both_does_not_count(comparison: OutputComparison, pair) -> None:
    ours, theirs = pair
    ours[0, 0], theirs[0, 0] = -np.inf, -np.inf
    comparison.add({"logits": torch.from_numpy(ours)}, {"logits": theirs})
    (row,) = comparison.rows()
    finite = np.isfinite(ours)
    assert row.mean == pytest.approx(np.abs(ours[finite].astype(np.float64) - theirs[finite]).mean())


def test_what_is_infinite_in_one_is_an_error(comparison: OutputComparison, pair) -> None:
    ours, theirs = pair
    theirs[2, 6, 4] = np.nan
    with pytest.raises(CheckError, match="the output logits is not finite where the program's is"):
        comparison.add({"logits": torch.from_numpy(ours)}, {"logits": theirs})


def test_another_shape_is_an_error(comparison: OutputComparison, pair) -> None:
    ours, theirs = pair
    with pytest.raises(CheckError, match=r"has the shape \[3, 7\], the program's \[3, 7, 5\]"):
        comparison.add({"logits": torch.from_numpy(ours)}, {"logits": theirs[..., 0]})

"""The sums over outputs against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitlower.backends.artifact import outputs as sums
from bitlower.backends.checkpoint.verify.outputs import OutputComparison
from bitlower.ir import CheckError


def outputs(*seeds: int, spread: float = 1e-3) -> list[dict[str, torch.Tensor]]:
    """A tensor, and one near it for each further seed."""
    base = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0)) + 2
    noise = [torch.randn(base.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return [{"logits": base}, *({"logits": base + spread * part} for part in noise)]


def test_figures_are_numpys(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sums, "_PART", 16)
    comparison = OutputComparison(["logits", "present.0.key"])
    ours, kept, other = outputs(1, 2)
    comparison.add(ours, kept, kept)
    comparison.add(ours, other, other)
    (row,) = comparison.rows()
    a = np.concatenate([ours["logits"].double().numpy().ravel()] * 2)
    b = np.concatenate([part["logits"].double().numpy().ravel() for part in (kept, other)])
    assert row.worst == pytest.approx(np.abs(a - b).max())
    assert row.mean == pytest.approx(np.abs(a - b).mean())
    assert row.relative == pytest.approx(np.abs(a - b).max() / a.std())
    assert row.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert (row.name, row.given_weights) == ("logits", 0)


def test_another_model_is_an_error():
    ours, kept, other = outputs(1, 2, spread=0.01)
    comparison = OutputComparison(["logits"])
    comparison.add(ours, kept, other)
    with pytest.raises(CheckError, match=r"a logits that is .* standard deviations off"):
        comparison.rows()


def test_noise_is_an_error():
    ours, kept = outputs(1, spread=30)
    comparison = OutputComparison(["logits"])
    comparison.add(ours, kept, kept)
    with pytest.raises(CheckError, match=r"the output logits has the cosine"):
        comparison.rows()


@pytest.mark.parametrize("which", [1, 2])
def test_what_is_not_a_number_is_an_error(which: int):
    parts = outputs(1, 1)
    parts[which]["logits"][0, 0, 0] = torch.nan
    comparison = OutputComparison(["logits"])
    comparison.add(*parts)
    with pytest.raises(CheckError, match="inf standard deviations off"):
        comparison.rows()


def test_outputs_must_be_the_same_ones():
    ours, kept = outputs(1)
    with pytest.raises(CheckError, match="gives none of logits"):
        OutputComparison(["logits"]).add(ours, kept, {"hidden": kept["logits"]})
    with pytest.raises(CheckError, match=r"the output logits of Hugging Face's model is \[3, 7\]"):
        OutputComparison(["logits"]).add(ours, kept, {"logits": kept["logits"][..., 0]})


def test_the_rounding_of_a_constant_output_is_no_spread() -> None:
    """0.1 is no float32: its sums leave a variance of rounding errors, which nothing may be measured by."""
    constant = torch.full((1000,), 0.1)
    comparison = OutputComparison(["y"])
    comparison.add({"y": constant}, {"y": constant}, {"y": constant * (1 + 1e-6)})
    (row,) = comparison.rows()
    assert abs(row.given_weights - 1e-6) < 2e-7

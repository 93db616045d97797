"""Measures of outputs against scipy and numpy in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import torch

from bitlower.ir import BitlowerError, Program
from bitlower.passes.precision._measures import Measure, decibels


def outputs(seed: int, shape: tuple[int, ...] = (3, 5, 7)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batch() -> dict[str, torch.Tensor]:
    mask = torch.ones(3, 5, dtype=torch.int64)
    mask[1, 3:] = 0
    return {"input_ids": mask, "attention_mask": mask}


def test_divergence_is_that_of_scipy() -> None:
    a, b = outputs(0), outputs(1)
    keep = batch()["attention_mask"].bool().numpy()
    p, q = (scipy.special.softmax(t.double().numpy()[keep], axis=-1) for t in (a, b))
    expected = scipy.special.rel_entr(p, q).sum() / keep.sum()
    measure = Measure("kl", ("logits",))
    assert measure.total([measure.compare([a], [b], batch())]) == pytest.approx(expected, rel=1e-12)
    assert measure.total([measure.compare([a], [a + 3], batch())]) < 1e-6


def test_noise_adds_up_over_batches_and_is_averaged_over_outputs() -> None:
    measure = Measure("sqnr", ("a", "b"))
    values = [outputs(seed).double().numpy() for seed in range(8)]
    parts = [
        measure.compare(
            [torch.from_numpy(values[i]) for i in (0, 1)], [torch.from_numpy(values[i]) for i in (2, 3)], {}
        ),
        measure.compare(
            [torch.from_numpy(values[i]) for i in (4, 5)], [torch.from_numpy(values[i]) for i in (6, 7)], {}
        ),
    ]
    ratios = [
        sum(((values[i + 2] - values[i]) ** 2).sum() for i in pair) / sum((values[i] ** 2).sum() for i in pair)
        for pair in ((0, 4), (1, 5))
    ]
    assert measure.total(parts) == pytest.approx(np.mean(ratios), rel=1e-12)
    assert decibels(measure.total(parts)) == pytest.approx(-10 * math.log10(np.mean(ratios)))


@pytest.mark.parametrize(("above", "ratio"), [(0.0, 0.0), (0.25, 1.0)])
def test_an_error_over_nothing_counts_as_much_as_all_of_it(above: float, ratio: float) -> None:
    assert Measure.total([((above, 0.0), (1.0, 2.0))]) == (ratio + 0.5) / 2


def test_disagreement_counts_vectors_without_padding() -> None:
    a = torch.eye(5).expand(3, 5, 5).clone()
    b = a.clone()
    b[0, 0], b[1, 4] = torch.tensor([0.0, 1, 0, 0, 0]), torch.tensor([1.0, 0, 0, 0, 0])  # the second is padding
    measure = Measure("disagreement", ("logits",))
    assert measure.total([measure.compare([a], [b], batch())]) == 1 / 13


def test_what_is_not_finite_costs_everything() -> None:
    measure = Measure("kl", ("logits",))
    assert measure.total([measure.compare([outputs(0)], [outputs(0) * math.nan], {})]) == math.inf
    assert (decibels(0.0), decibels(math.inf)) == (math.inf, -math.inf)


def test_the_measure_goes_by_the_outputs(tiny_program: Program) -> None:
    assert Measure.choose(tiny_program, "auto") == Measure("kl", ("logits",))
    assert Measure.choose(tiny_program, "sqnr") == Measure("sqnr", ("hidden", "logits"))
    assert Measure.choose(tiny_program, "auto", ("hidden",)) == Measure("sqnr", ("hidden",))
    with pytest.raises(BitlowerError, match="no output 'logit'"):
        Measure.choose(tiny_program, "auto", ("logit",))
    tiny_program.outputs = tiny_program.outputs[:1]
    with pytest.raises(BitlowerError, match="needs logits"):
        Measure.choose(tiny_program, "disagreement")

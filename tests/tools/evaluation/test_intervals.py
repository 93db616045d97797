"""Intervals against scipy's bootstrap, closed forms, and the packages' own corpus figures on resampled rows."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score, matthews_corrcoef

from bitlower.ir import BitlowerError
from bitlower.tools.evaluation import metrics
from bitlower.tools.evaluation.compare import compare
from bitlower.tools.evaluation.figures import (
    Figure,
    Figures,
    accuracy_of,
    exponential,
    label_figures,
    mean,
    pearson_of,
    point,
    ratio,
    spearman_of,
)
from bitlower.tools.evaluation.intervals import cautions, differences, intervals
from bitlower.tools.evaluation.results import Evaluation
from bitlower.tools.evaluation.tags import _entity_figures
from bitlower.tools.evaluation.written import METRICS, written_figures

Floats = np.ndarray[Any, Any]


def interval(figure: Figure, units: int) -> tuple[float, float]:
    return intervals(Figures(units, "rows", {"figure": figure}))["figure"]


def scipys(statistic: Callable[..., float], *columns: Floats) -> tuple[float, float]:
    """The percentile interval of scipy, from draws of its own."""
    result = stats.bootstrap(
        columns, statistic, paired=True, vectorized=False, method="percentile", n_resamples=800,
        rng=np.random.default_rng(1),
    )  # fmt: skip
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def close(ours: tuple[float, float], theirs: tuple[float, float]) -> None:
    """Both ends within a tenth of the width."""
    assert ours == pytest.approx(theirs, abs=0.1 * (theirs[1] - theirs[0]))


@pytest.fixture(scope="module")
def pairs() -> tuple[Floats, Floats]:
    """Correlated scores with many ties."""
    generator = np.random.default_rng(0)
    expected = generator.integers(0, 6, 150).astype(float)
    return expected + 1.5 * generator.normal(size=150).round(1), expected


@pytest.fixture(scope="module")
def labels() -> tuple[Floats, Floats]:
    generator = np.random.default_rng(0)
    expected = generator.integers(0, 3, 200)
    return np.where(generator.random(200) < 0.7, expected, generator.integers(0, 3, 200)), expected


def test_correlations_are_those_of_scipy(pairs: tuple[Floats, Floats]) -> None:
    for figure, statistic in ((pearson_of, stats.pearsonr), (spearman_of, stats.spearmanr)):
        assert point(figure(*pairs), 150) == pytest.approx(100 * statistic(*pairs).statistic)
        close(interval(figure(*pairs), 150), scipys(lambda a, b, s=statistic: 100 * s(a, b).statistic, *pairs))


def test_a_resample_is_measured_as_the_rows_that_it_draws(pairs: tuple[Floats, Floats]) -> None:
    drawn = np.random.default_rng(2).integers(0, 150, (3, 150))
    counts = np.stack([np.bincount(row, minlength=150) for row in drawn]).astype(float)
    for figure, measure in ((pearson_of, metrics.pearson), (spearman_of, metrics.spearman)):
        by_rows = [100 * measure(pairs[0][row], pairs[1][row]) for row in drawn]
        assert figure(*pairs)(counts) == pytest.approx(by_rows)


def test_figures_of_labels_are_those_of_sklearn(labels: tuple[Floats, Floats]) -> None:
    predicted, expected = labels
    figures = label_figures(predicted, expected)
    references = {
        "accuracy": lambda a, b: 100 * np.mean(a == b),
        "f1": lambda a, b: 100 * f1_score(b, a, average="macro"),
        "matthews": lambda a, b: 100 * matthews_corrcoef(b, a),
    }
    assert figures.keys() == references.keys()
    for name, reference in references.items():
        assert point(figures[name], 200) == pytest.approx(reference(predicted, expected))
        close(interval(figures[name], 200), scipys(reference, predicted, expected))
    two = label_figures(predicted > 0, expected > 0)
    assert point(two["f1"], 200) == pytest.approx(100 * f1_score(expected > 0, predicted > 0))


def test_a_share_has_the_interval_of_the_normal_distribution() -> None:
    hits = np.arange(2000) % 5 == 0
    width = 1.96 * 100 * math.sqrt(0.2 * 0.8 / 2000)
    close(interval(accuracy_of(hits, np.ones(2000)), 2000), (20 - width, 20 + width))


def test_a_perplexity_is_resampled_by_window() -> None:
    losses = np.random.default_rng(0).normal(60.0, 6.0, 40)
    figure = exponential(ratio(losses, np.full(40, 20), scale=1.0))
    assert point(figure, 40) == pytest.approx(math.exp(losses.sum() / 800))
    close(interval(figure, 40), scipys(lambda x: math.exp(x.mean() / 20), losses))
    assert point(exponential(mean([1e4], scale=1.0)), 1) == math.inf


WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "Dogs.", "it"]


def sentences(count: int) -> tuple[list[str], list[str]]:
    """References, and the same with some words changed or left out; one is empty."""
    draw = random.Random(0)
    references = [" ".join(draw.choices(WORDS, k=draw.randint(2, 12))) for _ in range(count)]
    written = [
        " ".join(draw.choice(WORDS) if draw.random() < 0.2 else word for word in text.split() if draw.random() < 0.9)
        for text in references
    ]
    return ["", *written[1:]], references


@pytest.mark.parametrize("task", METRICS)
def test_figures_of_texts_are_the_packages_own_on_any_resample(task: str) -> None:
    written, references = sentences(24)
    figures, drawn = written_figures(task, written, references), random.Random(1).choices(range(24), k=24)
    counts = np.bincount(drawn, minlength=24)[None].astype(float)
    whole = METRICS[task](written, references)
    part = METRICS[task]([written[i] for i in drawn], [references[i] for i in drawn])
    assert figures.by_name.keys() == whole.keys()
    for name, figure in figures.by_name.items():
        assert point(figure, 24) == pytest.approx(whole[name]), name
        assert figure(counts)[0] == pytest.approx(part[name]), name


def test_entities_are_counted_as_seqeval_counts_them() -> None:
    from seqeval import metrics as seqeval

    draw, tags = random.Random(0), ["O", "O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    gold = [draw.choices(tags, k=draw.randint(1, 9)) for _ in range(30)]
    guessed = [[tag if draw.random() < 0.8 else draw.choice(tags) for tag in row] for row in gold]
    drawn = draw.choices(range(30), k=30)
    counts = np.bincount(drawn, minlength=30)[None].astype(float)
    figures = _entity_figures(gold, guessed)
    for name in ("f1", "precision", "recall"):
        expected = getattr(seqeval, f"{name}_score")([gold[i] for i in drawn], [guessed[i] for i in drawn])
        assert figures[name](counts)[0] == pytest.approx(100 * expected)
    assert point(_entity_figures([["O"]], [["O"]])["f1"], 1) == 0


def evaluation(**values: Floats) -> Evaluation:
    figures = Figures(len(next(iter(values.values()))), "rows", {name: mean(value) for name, value in values.items()})
    points = {name: point(figure, figures.units) for name, figure in figures.by_name.items()}
    return Evaluation("model", "task", "data", figures.units, points, figures=figures)


def test_the_difference_of_two_models_is_paired() -> None:
    """Rows vary far more than the models differ: apart their intervals overlap, paired the difference is clear."""
    generator = np.random.default_rng(0)
    hard = generator.random(400)
    first, second = hard + 0.02, hard + 0.01 * generator.normal(size=400)
    apart = [evaluation(wer=values).with_intervals(seed=0).intervals["wer"] for values in (first, second)]
    assert apart[0][0] < apart[1][1]
    [pair] = compare(evaluation(wer=first), evaluation(wer=second)).values()
    close(pair.interval, scipys(lambda a, b: 100 * (a - b).mean(), first, second))
    assert pair.above_noise
    assert pair.verdict == "worse"  # more errors
    [pair] = compare(evaluation(f1=second), evaluation(f1=first)).values()
    assert pair.verdict == "worse"
    [pair] = compare(evaluation(f1=first), evaluation(f1=second)).values()
    assert pair.verdict == "better"


def test_what_is_chance_is_called_so() -> None:
    generator = np.random.default_rng(0)
    first, second = (generator.random(100) < 0.8 for _ in range(2))
    [pair] = compare(evaluation(accuracy=first), evaluation(accuracy=second)).values()
    assert (pair.above_noise, pair.verdict) == (False, "within noise")
    [same] = compare(evaluation(accuracy=first), evaluation(accuracy=first)).values()
    assert same.to_dict() == {"difference": 0.0, "interval": [0.0, 0.0], "above_noise": False, "verdict": "equal"}


def test_models_that_read_other_units_are_not_compared() -> None:
    one, other = (Figures(3, "windows", {"x": mean([1, 2, 3])}, name) for name in ("a", "b"))
    with pytest.raises(BitlowerError, match="read the data as different windows"):
        differences(one, other)
    with pytest.raises(BitlowerError, match="no figure to compare"):
        compare(Evaluation("", "", "", 1, {}), evaluation(x=np.ones(2)))


def test_the_seed_alone_chooses_the_resamples() -> None:
    figures = Figures(50, "rows", {"x": mean(np.arange(50.0))})
    assert intervals(figures, seed=3) == intervals(figures, seed=3) != intervals(figures, seed=4)


def test_intervals_that_are_too_narrow_are_said() -> None:
    assert cautions(Figures(100, "rows", {}), {"a": (1.0, 2.0)}) == ()
    few, alike = cautions(Figures(10, "windows", {}), {"a": (1.0, 1.0)})
    assert few == "10 windows are few: the true intervals are wider than these"
    assert "a: no width, since all 10 windows" in alike
    assert "up to 30 %" in alike
    assert intervals(Figures(5, "rows", {"constant": pearson_of(np.ones(5), np.arange(5))})) == {}

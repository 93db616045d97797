from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from bitlower.ir import Batch, BitlowerError, Program, get_tensor
from bitlower.passes import Context, PassManager, make_pass, parse_pipeline
from bitlower.passes.quantizers._embedding_report import BINS, EmbeddingReport
from bitlower.passes.quantizers.analyze_embeddings import similarity

TABLE = "embeddings.word_embeddings.weight"


def report(program: Program, data: list[Batch], pipeline: str) -> tuple[Program, EmbeddingReport]:
    context = Context(calibration=data)
    placed = PassManager(parse_pipeline(pipeline), verify=False).run(program, context)
    return placed, context[EmbeddingReport]


def reference_cosine(table: np.ndarray, ids: list[int]) -> float:
    """Pair by pair."""
    rows = [table[i].astype(np.float64) for i in ids]
    found = [a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in itertools.combinations(rows, 2)]
    return float(np.mean(found))


@pytest.fixture
def words(bert: Any, batches: Any) -> tuple[Program, list[Batch], list[int]]:
    """A BERT without a head, three batches, and the ten ids that are most frequent in them."""
    program, data = bert(layers=2, labels=0)[1], batches(count=3, rows=5, length=9, padding=3)
    counts = Counter(
        int(token)
        for batch in data
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        for token, there in zip(ids, mask, strict=True)
        if there
    )
    return program, data, sorted(counts, key=lambda token: (-counts[token], token))[:10]


@pytest.mark.parametrize("scheme", ["2-2-8-static", "W4A16-e4"])
def test_cosines_are_those_of_the_most_frequent_tokens(words: Any, scheme: str) -> None:
    program, data, ids = words
    pipeline = f"quantize{{scheme={scheme}}},calibrate{{weights=minmax}},analyze-embeddings{{tokens=10}}"
    _, found = report(program, data, pipeline)
    table = get_tensor(program.module, TABLE).detach().numpy()
    assert (found.embeddings, found.tokens) == (TABLE, 10)
    assert found.in_float.mean == pytest.approx(reference_cosine(table, ids), abs=1e-6)
    levels = 1 if scheme.startswith("2") else 7
    scale = np.abs(table).max(1, keepdims=True) / levels  # one scale a row, and 1 for the row of the padding
    scale[scale == 0] = 1
    rounded = np.round(table / scale) * scale
    assert found.rounded is not None
    assert found.rounded.mean == pytest.approx(reference_cosine(rounded, ids), abs=1e-5)
    assert sum(found.in_float.shares) == pytest.approx(1)
    assert len(found.in_float.shares) == BINS


def test_float_is_the_model_before_it_was_trained(words: Any) -> None:
    """Weights that a later pass has changed are not what is called float."""
    program, data, ids = words
    context = Context(calibration=data)
    placed = PassManager(parse_pipeline("quantize{scheme=W8A16-e8},calibrate"), verify=False).run(program, context)
    changed = placed.clone()
    table = get_tensor(changed.module, TABLE).detach().clone()
    generator = torch.Generator().manual_seed(1)
    new = torch.nn.Parameter(table + 3.0 + torch.randn(table.shape, generator=generator))
    parent, _, leaf = TABLE.rpartition(".")
    setattr(changed.module.get_submodule(parent), leaf, new)
    make_pass("analyze-embeddings", {"tokens": 10}).run(changed, context)
    found = context[EmbeddingReport]
    assert found.in_float.mean == pytest.approx(reference_cosine(table.numpy(), ids), abs=1e-6)
    alone = Context(calibration=data)
    make_pass("analyze-embeddings", {"tokens": 10}).run(changed, alone)
    expected = reference_cosine(new.detach().numpy(), ids)
    assert alone[EmbeddingReport].in_float.mean == pytest.approx(expected, abs=1e-6)


def test_how_each_weight_is_clipped(words: Any) -> None:
    program, data, _ = words
    placed, found = report(program, data, "quantize{scheme=2-2-8-static},calibrate,analyze-embeddings")
    by_name = {module.tensor: module for module in found.modules}
    expected = {q.tensor for node, q in placed.quantizers() if node.args[0].op == "get_attr"}
    assert set(by_name) == expected
    for node, quantizer in placed.quantizers():
        if quantizer.tensor not in by_name:
            continue
        module = by_name[quantizer.tensor]
        weight = get_tensor(placed.module, node.args[0].target).detach().double().numpy()
        scale = get_tensor(placed.module, node.args[1].target).double().numpy()
        largest = np.abs(weight).max(keepdims=True) if scale.ndim == 0 else np.abs(weight).max(1, keepdims=True)
        assert (module.bits, module.scales) == (2, scale.size)
        shares = np.broadcast_to(scale, largest.shape)[largest > 0] / largest[largest > 0]  # the largest code is 1
        assert module.covered == pytest.approx(np.mean(shares), rel=1e-5)
        assert module.kurtosis == pytest.approx(stats.kurtosis(weight.ravel(), fisher=False), rel=1e-6)


def test_a_range_that_is_not_clipped_covers_all(words: Any) -> None:
    program, data, _ = words
    for scheme in ("W4A16-asym", "W4A16-g8", "W8A16-tensor"):
        _, found = report(program, data, f"quantize{{scheme={scheme}}},calibrate{{weights=minmax}},analyze-embeddings")
        assert [module.covered for module in found.modules] == pytest.approx([1.0] * len(found.modules), rel=1e-5)


def test_a_table_in_float_has_no_rounded_cosine(words: Any) -> None:
    program, data, _ = words
    _, found = report(program, data, "quantize{scheme=W8A16-e16},calibrate,analyze-embeddings")
    assert found.rounded is None
    assert "the table has no quantizer" in found.summary()
    assert list(next(iter(found.charts())).lines) == ["float"]


def test_rows_of_zeros_are_no_directions() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, -2.0]])
    found = similarity(rows)
    assert found.mean == pytest.approx((0.5**0.5 + 0 - 0.5**0.5) / 3)
    assert np.isnan(similarity(rows[:2]).mean)


def test_people_can_read_it(words: Any) -> None:
    program, data, _ = words
    _, found = report(program, data, "quantize{scheme=2-2-8-static},calibrate,analyze-embeddings{tokens=10}")
    assert found.rounded is not None
    first, second = found.text().splitlines()
    assert first == (
        f"the 10 most frequent tokens have a mean cosine of {found.in_float.mean:.3f}, {found.rounded.mean:.3f} rounded"
    )
    covered = [module.covered for module in found.modules]
    assert f"clipped at {min(covered):.2f} to {max(covered):.2f} of their largest value" in second
    headers, table = found.table()
    assert len(table) == len(found.modules)
    assert all(len(row) == len(headers) for row in table)


def test_its_charts_are_histograms_and_clipping(words: Any) -> None:
    program, data, _ = words
    _, found = report(program, data, "quantize{scheme=2-2-8-static},calibrate,analyze-embeddings{tokens=10}")
    cosines, clipping = found.charts()
    assert list(cosines.lines) == ["float", "rounded"]
    for points, alike in zip(cosines.lines.values(), (found.in_float, found.rounded), strict=True):
        assert alike is not None
        assert [x for x, _ in points] == pytest.approx(np.linspace(-0.975, 0.975, 40))
        assert sum(x * share for x, share in points) == pytest.approx(alike.mean, abs=0.025)  # half a bin
    assert clipping.names == tuple(module.tensor for module in found.modules)
    assert clipping.bars == {"α / max|w|": tuple(module.covered for module in found.modules)}


@pytest.mark.parametrize("tokens", [1, 10_001])
def test_a_number_of_tokens_out_of_range_is_refused(tokens: int) -> None:
    with pytest.raises(BitlowerError, match=f"'tokens' takes int from 2 to 10000, not {tokens}"):
        make_pass("analyze-embeddings", {"tokens": tokens})


def test_it_needs_data_ranges_and_a_table(words: Any, tiny_program: Program) -> None:
    program, data, _ = words
    with pytest.raises(BitlowerError, match="compared for tokens of calibration data; give calibration batches"):
        report(program, [], "quantize{scheme=W8A16-e8},calibrate,analyze-embeddings")
    with pytest.raises(BitlowerError, match=r"has no range; run `calibrate` first"):
        report(program, data, "quantize{scheme=W8A16-e8},analyze-embeddings")
    with pytest.raises(BitlowerError, match="no stored table is indexed by token ids"):
        report(tiny_program, data, "quantize{scheme=W8A16},calibrate,analyze-embeddings")

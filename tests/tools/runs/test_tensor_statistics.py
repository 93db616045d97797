"""Statistics of tensors and samples against numpy: histograms that grow, losses of samples, texts of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitlower.frontends import batches, load
from bitlower.ir import Program, TensorType, get_tensor
from bitlower.ir.quantizer_node import QuantizerNode
from bitlower.passes import Context, PassManager, make_pass
from bitlower.tools.runs.histogram import FINE, SHOWN, GrowingHistogram
from bitlower.tools.runs.samples import SampleLosses, judged_output, sample_texts
from bitlower.tools.runs.spread import PLACES, spread
from bitlower.tools.runs.tensor_statistics import measure
from bitlower.tools.runs.token_norms import TokenNorms

ENDS = (-8, 7)
"""Codes of 4 bits."""
PARTS = st.lists(
    st.lists(st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False), min_size=1, max_size=20),
    min_size=1,
    max_size=5,
)


@given(PARTS)
def test_a_histogram_has_every_value_in_its_bin(parts: list[list[float]]) -> None:
    histogram = GrowingHistogram()
    for part in parts:
        histogram.add(torch.tensor(part))
    values = np.array([value for part in parts for value in part], dtype=np.float32).astype(np.float64)
    form = histogram.to_dict()
    assert sum(form["counts"]) == len(values)
    assert 1 <= len(form["counts"]) <= SHOWN
    assert (histogram.minimum, histogram.maximum) == (values.min(), values.max())
    fine = np.linspace(-histogram.reach, histogram.reach, FINE + 1)
    assert np.array_equal(histogram.counts, np.histogram(values, fine)[0])
    assert form["counts"][0]
    assert form["start"] <= values.min() <= form["start"] + form["step"]


def test_what_is_not_finite_is_left_out() -> None:
    histogram = GrowingHistogram()
    histogram.add(torch.tensor([float("nan"), float("inf"), 1.0, -3.0]))
    assert (histogram.minimum, histogram.maximum, int(histogram.counts.sum())) == (-3.0, 1.0, 2)
    assert GrowingHistogram().to_dict() == {"start": 0.0, "step": 0.0, "counts": []}


def test_samples_have_the_losses_of_their_own_tokens() -> None:
    generator = np.random.default_rng(0)
    expected = generator.normal(size=(3, 5, 7))
    actual = expected + 0.3 * generator.normal(size=expected.shape)
    actual[1] = expected[1]
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    actual[2, :2] += 100  # padding
    losses = SampleLosses("logits")
    node = SimpleNamespace(meta={"type": TensorType(torch.float32, ("batch", "sequence", 7))})
    batch = {"input_ids": torch.zeros(3, 5, dtype=torch.int64), "attention_mask": torch.tensor(mask)}
    losses.add(node, torch.tensor(expected), torch.tensor(actual), batch)  # type: ignore[arg-type]
    for index, row in enumerate(losses.rows):
        a, b = (value[index][mask[index] == 1] for value in (expected, actual))
        p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a, b))
        assert row["tokens"] == len(a)
        assert row["kl_divergence"] == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-5, abs=1e-12)
        assert row["relative_error"] == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-5)
        other = np.flatnonzero(a.argmax(-1) != b.argmax(-1))
        first = int(np.flatnonzero(mask[index])[other[0]]) if len(other) else None
        assert row["differs_at"] == first
        if first is not None:
            assert (row["expected"], row["actual"]) == (expected[index, first].argmax(), actual[index, first].argmax())
    assert [row["sample"] for row in losses.worst()][-1] == 1


def test_texts_end_where_another_token_becomes_likeliest(llama: Path, llama_program: Program) -> None:
    made = batches(llama_program, ["the cat sings near the old house , and the dog sleeps"] * 2, max_length=8)
    row = {"sample": 0, "differs_at": 2, "expected": 5, "actual": 6}
    tokens = made[0]["input_ids"][0].tolist()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama)
    [text] = sample_texts(llama_program, made, [row])
    assert text.text == tokenizer.decode(tokens[:3], skip_special_tokens=True)
    assert (text.expected, text.actual) == (tokenizer.decode([5]), tokenizer.decode([6]))
    assert judged_output(llama_program)[0] == "logits"


def test_weights_in_groups_have_a_range_for_each_group(llama_program: Program) -> None:
    """Of 4-bit weights in groups: the noise is that of rounding each group on its own grid, in numpy."""
    manager = PassManager(
        [make_pass(n, p) for n, p in (("clean", {}), ("quantize", {"scheme": "W4A16-g16"}), ("rtn", {}))]
    )
    program = manager.run(llama_program.clone(), Context())
    form = measure(llama_program, program, Context())
    rows = {row["tensor"]: row for row in form["tensors"]}
    name = next(name for name in rows if name.endswith("up_proj.weight"))
    weight = get_tensor(llama_program.module, name).detach().double().numpy()
    rounded = get_tensor(program.module, name).detach().double().numpy()
    assert rows[name]["values"] == weight.size
    assert rows[name]["sqnr_db"] is None or rows[name]["sqnr_db"] > 60 or np.allclose(weight, rounded)
    assert rows[name]["codes"] <= 16
    assert 8 <= rows[name]["codes_used"] <= 16
    assert (form["channels"], form["samples"]) == ([], [])


def test_the_float_model_is_its_own_best_copy(bert: Path) -> None:
    """A program beside itself: no sample differs, and the maps are equal."""
    program = PassManager([make_pass("clean")]).run(load(str(bert)), Context())
    made = batches(program, ["the cat sings", "the old dog sleeps near the house"])
    form = measure(program, program, Context(evaluation=made))
    assert [row["relative_error"] for row in form["samples"]] == [0.0, 0.0]
    assert all(row["before"] == row["after"] for row in form["channels"])
    assert len(form["channels"]) == 4


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=200))
def test_a_spread_is_the_sorted_values_at_even_distances(values: list[float]) -> None:
    form = spread(torch.tensor(values))
    ordered = np.sort(np.array(values, dtype=np.float32).astype(np.float64))
    places = np.rint(np.linspace(0, len(values) - 1, min(len(values), PLACES))).astype(int)
    assert form["count"] == len(values)
    assert len(form["sorted"]) == len(places)
    assert form["sorted"][0] == pytest.approx(ordered[0], rel=1e-3)
    assert form["sorted"][-1] == pytest.approx(ordered[-1], rel=1e-3)
    if len(values) <= PLACES:
        assert form["sorted"] == pytest.approx(list(ordered), rel=1e-3)


def test_norms_are_those_of_tokens_without_padding() -> None:
    generator = np.random.default_rng(0)
    value = generator.normal(size=(3, 20, 7)).astype(np.float32)
    mask = np.ones((3, 20), dtype=np.int64)
    mask[1, :5], mask[2, 9:] = 0, 0  # padding on the left, and on the right
    value[0, 0] *= 50  # a sink
    norms = TokenNorms()
    batch = {"input_ids": torch.zeros(3, 20, dtype=torch.int64), "attention_mask": torch.tensor(mask)}
    norms.add(torch.tensor(value), ("batch", "sequence", 7), batch)
    norms.add(torch.tensor(value), ("batch", 7), batch)  # not laid out by tokens
    norms.add(torch.tensor(value), ("batch", "sequence", "sequence"), batch)
    form = norms.to_dict()
    assert form is not None
    expected = np.linalg.norm(value.astype(np.float64), axis=-1)
    seen = np.sort(expected[mask == 1])
    assert form["count"] == len(seen) == 44
    assert form["sorted"] == pytest.approx(list(seen), rel=1e-3)
    texts = [row[one == 1] for row, one in zip(expected, mask, strict=True)]
    assert form["first"] == pytest.approx(
        [np.mean([text[place] for text in texts if len(text) > place]) for place in range(16)], rel=1e-3
    )
    assert TokenNorms().to_dict() is None


def test_what_gptq_rewrote_is_counted(llama_program: Program) -> None:
    """Codes and distances against numpy: `rtn` leaves the nearest codes, `gptq` others."""
    data = batches(llama_program, ["the cat sings near the old house , and the dog sleeps"] * 4, max_length=12)
    for solver in ("rtn", "gptq"):
        manager = PassManager([make_pass("clean"), make_pass("quantize", {"scheme": "W4A16-g16"}), make_pass(solver)])
        program = manager.run(llama_program.clone(), Context(data))
        rows = {row["tensor"]: row for row in measure(llama_program, program, Context())["tensors"]}
        name = next(name for name in rows if name.endswith("up_proj.weight"))
        node = next(node for node, q in program.quantizers() if q.tensor == name)
        first, last = (get_tensor(made.module, name).detach().double().numpy() for made in (llama_program, program))
        scale, zero = (part.double().numpy() for part in QuantizerNode(node).range(program.module))
        blocks = [weight.reshape(*scale.shape, -1) for weight in (first, last)]
        codes = [np.clip(np.rint(block / scale[..., None]) + zero[..., None], *ENDS) for block in blocks]
        found = rows[name]["rewritten"]
        assert found["codes"] == pytest.approx(np.mean(codes[0] != codes[1]), abs=1e-3)
        assert found["distance"] == pytest.approx(np.linalg.norm(last - first) / np.linalg.norm(first), rel=1e-4)
        assert (found["codes"] > 0.02) == (solver == "gptq")
        assert rows[name]["scales"]["count"] == scale.size
        assert rows[name]["scales"]["sorted"][-1] == pytest.approx(scale.max(), rel=1e-3)

"""The time of a linear by hand, the targets that are known, and mappings that are none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitlower.ir import BitlowerError
from bitlower.passes.precision._roofline import FLOAT, INTEGER, PRODUCTS, TARGETS, Linear, Roofline, stored_bits, widest
from bitlower.passes.precision.assign_precision import AssignPrecision

HOST = {"name": "host", "bandwidth": 2e10, "float-bytes": 4, "rates": {"W8A8": 2e11, "W4A8": 1e11, "W16A16": 7e10}}


def microseconds(target: str, rows: int, weight: int | None, activation: int | None) -> float:
    """Of a layer of BERT-base, a scale for each output."""
    return TARGETS[target].picoseconds(Linear(768, 3072, scales=3072), rows, weight, activation) / 1e6


def test_many_rows_are_bound_by_the_rate() -> None:
    work = 2 * 16384 * 768 * 3072
    assert microseconds("a100", 16384, 8, 8) == pytest.approx(1e6 * work / 624e12)
    assert microseconds("a100", 16384, 4, 8) == pytest.approx(1e6 * work / 624e12)
    assert microseconds("h100", 16384, 8, 16) == pytest.approx(1e6 * work / 989e12)
    assert microseconds("h100", 16384, 4, None) == pytest.approx(1e6 * work / 989e12)
    assert microseconds("h100", 16384, None, None) == pytest.approx(1e6 * work / 989e12)


def test_codes_take_whole_bytes_where_nothing_packs_them() -> None:
    assert [stored_bits(bits) for bits in (2, 3, 4, 5, 7, 8, 9, 12, 16)] == [2, 3, 4, 8, 8, 8, 16, 16, 16]


def test_one_row_is_bound_by_the_bytes() -> None:
    size, scales, output = 768 * 3072, 4 * 3072, 2 * 3072
    for weight, codes in ((None, 2 * size), (16, 2 * size), (8, size), (6, size), (4, size / 2), (3, size * 3 / 8)):
        for activation, row in ((None, 2 * 768), (16, 2 * 768), (8, 768), (4, 768)):
            moved = codes + (scales if weight else 0) + row + output
            assert microseconds("a100", 1, weight, activation) == pytest.approx(1e6 * moved / 2.039e12, rel=1e-5)


def test_which_product_it_is() -> None:
    linear, zeros = Linear(8, 8, 8), Linear(8, 8, 8, symmetric=False)
    assert [linear.product(w, 8) for w in (2, 3, 4, 5, 6, 8, 16, None)] == [
        "W2A8", "W3A8", "W4A8", INTEGER, INTEGER, INTEGER, FLOAT, FLOAT,
    ]  # fmt: skip
    assert {linear.product(4, a) for a in (9, 16, None)} == {"W4A16"}
    assert (zeros.product(4, 8), zeros.product(8, 8), zeros.product(6, 8)) == ("W4A8", "W8A16", "W8A16")
    assert (linear.product(None, 8), linear.product(8, None)) == (FLOAT, "W8A16")
    assert zeros.weight_bytes(4, 4) == 8 * 8 // 2 + 8 * 4 + 8 * 4 // 8


def test_rates_that_are_not_given() -> None:
    host = Roofline.from_dict(HOST)
    assert {product: host.rate(product) for product in PRODUCTS} == {
        "W8A8": 2e11, "W4A8": 1e11, "W3A8": 2e11, "W2A8": 2e11, **dict.fromkeys(PRODUCTS[4:], 7e10),
    }  # fmt: skip
    assert Roofline.from_dict(host.to_dict()) == host


@given(st.sets(st.integers(2, 16), min_size=1), st.integers(1, 4096), st.sampled_from(sorted(TARGETS)))
def test_narrower_widths_that_are_left_out_save_nothing(bits: set[int], rows: int, target: str) -> None:
    linear, known = Linear(64, 96, 96), TARGETS[target]
    for weights in (True, False):
        kept = widest(tuple(bits), weights=weights)
        assert set(kept) <= bits
        for width in bits:
            wider = min(k for k in kept if k >= width)
            pairs = [(width, 8), (wider, 8)] if weights else [(8, width), (8, wider)]
            first, second = (known.picoseconds(linear, rows, *pair) for pair in pairs)
            assert first == second


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bandwidth": 0}, "bandwidth must be a number above 0"),
        ({"bandwidth": "fast"}, "bandwidth must be a number above 0"),
        ({"rates": {"W8A8": 1e9}}, "has no rate for W16A16"),
        ({"rates": {"W8A8": 1e9, "W16A16": 1e9, "W5A8": 1e9}}, "unknown product 'W5A8'"),
        ({"rates": {"W8A8": float("inf"), "W16A16": 1e9}}, "W8A8 must be a number above 0"),
        ({"rates": [1, 2]}, "rates of a target are a mapping"),
        ({"float-bytes": 3}, "float-bytes is 3"),
        ({"cores": 2}, "unknown key 'cores'"),
    ],
)
def test_wrong_mappings(change: dict[str, object], message: str) -> None:
    with pytest.raises(BitlowerError, match=message):
        Roofline.from_dict(HOST | change)


def test_what_is_missing_or_unknown_is_named() -> None:
    with pytest.raises(BitlowerError, match="needs the key 'rates'"):
        Roofline.from_dict({key: value for key, value in HOST.items() if key != "rates"})
    with pytest.raises(BitlowerError, match="unknown target 'a10'") as caught:
        Roofline.parse("a10")
    assert "a100" in caught.value.hint


def test_it_is_a_parameter_in_text_and_in_recipes() -> None:
    from bitlower.passes import format_pipeline, make_pass, parse_pipeline

    for target in ("h100", HOST):
        made = make_pass("assign-precision", {"time": 0.9, "target": target, "rows": 16})
        assert isinstance(made, AssignPrecision)
        assert parse_pipeline(format_pipeline([made])) == (made,)
    [named] = parse_pipeline("assign-precision{time=0.9 target=h100}")
    assert isinstance(named, AssignPrecision)
    assert named.target == TARGETS["h100"]
    assert format_pipeline([named]) == "assign-precision{time=0.9 target=h100}"

import pytest
from pydantic import TypeAdapter

from bitlower.passes.outliers._report import (
    ClampRate,
    DimensionCount,
    FeedForwardOutliers,
    HeadAttention,
    OutlierReport,
    PositionCount,
    TensorRange,
    TokenCount,
)


def tensor(node: str, low: float, high: float, std: float) -> TensorRange:
    dimensions = tuple(DimensionCount(index, 9 - index, 0.5) for index in range(5))
    tokens = (TokenCount(102, "[SEP]", True, 7), TokenCount(9, "", False, 2))
    positions = (PositionCount(0, 4),)
    roles = ("linear-input", "norm")
    counted = (dimensions, positions, tokens)
    return TensorRange(node, f"layer.{node}", roles, 100, low, high, 0.0, std, 3.0, 9, 20, *counted)


@pytest.fixture
def report() -> OutlierReport:
    return OutlierReport(
        6.0,
        8,
        90,
        (tensor("x", -1.0, 2.0, 1.0), tensor("h", -50.0, 2.0, 1.0), tensor("y", -20.0, 4.0, 1.0)),
        (
            FeedForwardOutliers("layer.0", "x", "h", "y", 52 / 3, 8.0),
            FeedForwardOutliers("layer.1", "x", "y", "h", 8.0, 99.0),
        ),
        (HeadAttention("sdpa", "layer.0", 0, 0.2, 1.0), HeadAttention("sdpa", "layer.0", 1, 0.95, 0.01)),
        (ClampRate("q", "layer.0", "norm", "x", 0.001), ClampRate("r", "layer.1", "residual", "y", 0.25)),
    )


def test_it_is_plain_data_that_goes_through_json(report):
    adapter = TypeAdapter(OutlierReport)
    assert adapter.validate_json(adapter.dump_json(report)) == report


def test_tensors_are_found_by_node(report):
    assert report["h"].absmax == 50.0
    assert report["h"].max_over_std == 50.0
    assert report["h"].width == 52.0
    with pytest.raises(KeyError):
        report["z"]


def test_a_constant_tensor_has_no_spread():
    assert tensor("c", 3.0, 3.0, 0.0).max_over_std == 0.0


def test_the_worst_tensor_comes_first(report):
    headers, rows = report.table()
    assert [row[1] for row in rows] == ["h", "y", "x"]
    assert all(len(row) == len(headers) for row in rows)
    assert headers[8] == ">6σ"
    assert rows[0] == (
        "layer.h", "h", "linear-input, norm", "-50", "2", "1", "50", "3", "9",
        "0 (50%), 1 (50%), 2 (50%), 17 more", "[SEP] ×7, 9 ×2",
    )  # fmt: skip


def test_feed_forwards_are_ordered_by_their_ratio(report):
    headers, rows = report.feed_forward_table()
    assert [row[0] for row in rows] == ["layer.1", "layer.0"]
    assert rows[1] == ("layer.0", "[-1, 2]", "[-50, 2]", "[-20, 4]", "17.3", "8")
    assert all(len(row) == len(headers) for row in rows)


def test_heads_on_the_separator_come_first(report):
    headers, rows = report.head_table()
    assert rows == [
        ("layer.0", "1", "0.950", "0.01", "no-op"),
        ("layer.0", "0", "0.200", "1", ""),
    ]
    assert all(len(row) == len(headers) for row in rows)


def test_quantizers_that_clamp_most_come_first(report):
    headers, rows = report.clamp_table()
    assert rows == [("layer.1", "y", "residual", "25.000%"), ("layer.0", "x", "norm", "0.100%")]
    assert all(len(row) == len(headers) for row in rows)

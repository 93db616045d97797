"""Granularities against explicit loops over the elements that share a scale."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitlower.ir import BitlowerError, Granularity, Grid
from bitlower.ir.quantization import numerics
from bitlower.ir.quantization.granularity import KINDS, block

GRID = Grid(4)


def _fake(x, granularity):
    scale, zero = GRID.qparams(*granularity.range_of(x))
    return numerics.fake(x, scale, zero, GRID.quant_min, GRID.quant_max)


def _loop(x, pieces):
    """Quantize each piece (an index of ``x``) by itself, in numpy."""
    out = np.full(x.shape, np.nan, np.float32)
    for piece in pieces:
        values = x[piece]
        scale = np.float32(np.abs(values).max()) / np.float32(7)
        out[piece] = np.clip(np.round(values / scale), -8, 7) * scale
    return out


def _pieces(granularity, shape):
    rows, columns = shape
    match granularity.kind:
        case "tensor":
            return [np.s_[:, :]]
        case "channel" if granularity.axis == 0:
            return [np.s_[i, :] for i in range(rows)]
        case "channel" | "embedding" | "embedding-parts":
            return [np.s_[:, j] for j in range(columns)]
        case "group":
            size = granularity.group_size
            return [np.s_[i, j : j + size] for i in range(rows) for j in range(0, columns, size)]
        case "row-group":
            height = rows // granularity.num_groups
            return [np.s_[i : i + height, :] for i in range(0, rows, height)]
        case "token":
            return [np.s_[i, :] for i in range(rows)]
        case "embedding-group":
            width = columns // granularity.num_groups
            return [np.s_[:, j : j + width] for j in range(0, columns, width)]


ALL = [
    Granularity.per_tensor(),
    Granularity.per_channel(0),
    Granularity.per_channel(1),
    Granularity.per_group(4),
    Granularity.per_group(12),
    Granularity.row_group(2),
    Granularity.per_token(),
    Granularity.per_embedding(),
    Granularity.per_embedding_group(3),
    Granularity.per_embedding_parts(3),
]


@pytest.mark.parametrize("granularity", ALL, ids=str)
def test_each_set_of_elements_is_quantized_by_itself(granularity):
    x = torch.randn(6, 12, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 72).reshape(6, 12)
    np.testing.assert_array_equal(_fake(x, granularity).numpy(), _loop(x.numpy(), _pieces(granularity, x.shape)))


@pytest.mark.parametrize("granularity", ALL, ids=str)
def test_ranges_cover_each_set(granularity):
    x = torch.randn(6, 12, generator=torch.Generator().manual_seed(1))
    low, high = granularity.range_of(x)
    pieces = _pieces(granularity, x.shape)
    assert low.flatten().tolist() == [float(x.numpy()[p].min()) for p in pieces]
    assert high.flatten().tolist() == [float(x.numpy()[p].max()) for p in pieces]
    if not granularity.dynamic:
        assert low.shape == high.shape == granularity.scale_shape(x.shape)


def test_scale_shapes():
    assert Granularity.per_tensor().scale_shape((4, 6)) == ()
    assert Granularity.per_channel(0).scale_shape((4, 6)) == (4, 1)
    assert Granularity.per_channel(1).scale_shape((4, 6)) == (1, 6)
    assert Granularity.per_channel(-1).scale_shape((4, 6)) == (1, 6)
    assert Granularity.per_group(3).scale_shape((4, 6)) == (4, 2)
    assert Granularity.per_group(2, axis=0).scale_shape((4, 6)) == (2, 6)
    assert Granularity.row_group(2).scale_shape((4, 6)) == (2, 1)
    assert Granularity.per_embedding().scale_shape(("batch", "sequence", 6)) == (1, 1, 6)
    assert Granularity.per_embedding_group(2).scale_shape(("batch", "sequence", 6)) == (1, 1, 2)
    assert Granularity.per_embedding_parts(2).scale_shape(("batch", "sequence", 6)) == (1, 1, 6)
    assert Granularity.per_embedding_parts(9).scale_shape(("batch", "sequence", 6)) == (1, 1, 6)


activations = st.integers(0, 2**31).map(lambda s: torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(s)))
weights = activations.map(lambda x: x[0, :4].contiguous())


@given(activations)
def test_one_embedding_group_is_per_tensor_and_one_an_index_per_embedding(x):
    assert torch.equal(_fake(x, Granularity.per_embedding_group(1)), _fake(x, Granularity.per_tensor()))
    assert torch.equal(_fake(x, Granularity.per_embedding_group(12)), _fake(x, Granularity.per_embedding()))


@given(weights)
def test_row_groups_run_from_per_tensor_to_per_channel(w):
    assert torch.equal(_fake(w, Granularity.row_group(1)), _fake(w, Granularity.per_tensor()))
    assert torch.equal(_fake(w, Granularity.row_group(4)), _fake(w, Granularity.per_channel(0)))


@given(weights)
def test_a_group_as_wide_as_the_row_is_per_channel(w):
    assert torch.equal(_fake(w, Granularity.per_group(12)), _fake(w, Granularity.per_channel(0)))


@given(activations, st.lists(st.integers(-20, 20), min_size=10, max_size=10))
def test_powers_of_two_leave_a_tokens_codes_alone(x, exponents):
    factor = torch.tensor(exponents, dtype=torch.float32).exp2().reshape(2, 5, 1)

    def codes(value):
        return numerics.codes(value, *GRID.qparams(*Granularity.per_token().range_of(value)), -8, 7)

    assert torch.equal(codes(factor * x), codes(x))


@given(activations)
def test_a_tokens_codes_do_not_depend_on_other_tokens(x):
    alone = torch.stack([_fake(x[:, i], Granularity.per_token()) for i in range(5)], dim=1)
    assert torch.equal(_fake(x, Granularity.per_token()), alone)


@pytest.mark.parametrize(
    ("granularity", "shape", "words"),
    [
        (Granularity.per_group(5), (4, 6), r"per-group\(5\) and an axis of 6 have only blocks of 1 in common"),
        (Granularity.per_group(128), (4, 132), r"per-group\(128\) and an axis of 132 have only blocks of 4 in common"),
        (Granularity.row_group(3), (4, 6), "does not divide an axis of 4"),
        (Granularity.per_embedding_group(4), ("batch", "sequence", 6), "does not divide an axis of 6"),
        (Granularity.per_embedding_group(8), ("batch", "sequence", 4), "does not divide an axis of 4"),
        (Granularity.per_channel(2), (4, 6), "needs axis 2"),
        (Granularity.per_channel(0), (), "needs axis 0"),
        (Granularity.per_channel(0), ("batch", 6), "symbolic size 'batch'"),
        (Granularity.per_group(2), ("batch", 6), "symbolic dimension 'batch'"),
        (Granularity.per_token(), (4, 6), "at run time"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_said(granularity, shape, words):
    with pytest.raises(BitlowerError, match=words):
        granularity.scale_shape(shape)


@pytest.mark.parametrize(
    "arguments", [("tokens",), ("group", -1, 0), ("row-group", 0, -2), ("embedding-group", -1), ("embedding-parts",)]
)
def test_granularities_that_do_not_exist(arguments):
    with pytest.raises(BitlowerError, match="granularity"):
        Granularity(*arguments)


def test_block_splits_every_axis():
    x = torch.arange(24).reshape(4, 6)
    blocked, inner = block(x, (2, 3))
    assert blocked.shape == (2, 2, 3, 2)
    assert inner == [1, 3]
    assert torch.equal(blocked[1, :, 2, :], x[2:4, 4:6])


@pytest.mark.parametrize("shape", [(4,), (3, 1), (1, 4), (0, 1), (4, 6, 1)])
def test_a_scale_that_does_not_fit_is_an_error(shape):
    with pytest.raises(BitlowerError, match="does not fit a tensor of shape"):
        block(torch.zeros(4, 6), shape)


def test_no_tokens_have_no_scales() -> None:
    low, high = Granularity.per_token().range_of(torch.zeros(2, 0, 6))
    assert low.shape == high.shape == (2, 0, 1)
    with pytest.raises(BitlowerError, match="does not fit"):
        block(torch.zeros(2, 3, 6), (2, 0, 1))


@st.composite
def granularities(draw):
    kind, axis, size = draw(st.sampled_from(KINDS)), draw(st.integers(-3, 3)), draw(st.integers(1, 512))
    makers = {
        "tensor": Granularity.per_tensor,
        "channel": lambda: Granularity.per_channel(axis),
        "group": lambda: Granularity.per_group(size, axis),
        "row-group": lambda: Granularity.row_group(size),
        "token": Granularity.per_token,
        "embedding": Granularity.per_embedding,
        "embedding-group": lambda: Granularity.per_embedding_group(size),
        "embedding-parts": lambda: Granularity.per_embedding_parts(size),
    }
    return makers[kind]()


@given(granularities())
def test_text_round_trip(granularity):
    assert Granularity.parse(str(granularity)) == granularity


def test_text_forms():
    assert [str(g) for g in ALL] == [
        "per-tensor",
        "per-channel(0)",
        "per-channel(1)",
        "per-group(4)",
        "per-group(12)",
        "row-group(2)",
        "per-token",
        "per-embedding",
        "per-embedding-group(3)",
        "per-embedding-parts(3)",
    ]
    assert str(Granularity.per_group(8, axis=0)) == "per-group(8, axis=0)"


@pytest.mark.parametrize(
    "text", ["", "per", "per-tensr", "per-tensor(3)", "per-group", "per-group(0)", "per-channel(1, axis=2)", "8", "(4)"]
)
def test_other_text_is_an_error(text):
    with pytest.raises(BitlowerError, match="granularity"):
        Granularity.parse(text)


@given(st.text(max_size=20))
def test_parse_fails_only_with_its_own_error(text):
    try:
        granularity = Granularity.parse(text)
    except BitlowerError:
        return
    assert Granularity.parse(str(granularity)) == granularity


@pytest.mark.parametrize(("size", "extent"), [(128, 576), (64, 96), (16, 48), (128, 96), (32, 32)])
def test_the_last_group_of_an_axis_may_be_shorter(size: int, extent: int) -> None:
    x = torch.randn(3, extent, generator=torch.Generator().manual_seed(0))
    granularity = Granularity.per_group(size)
    shape = granularity.scale_shape((3, extent))
    assert extent % shape[1] == 0
    low, high = granularity.range_of(x)
    assert low.shape == high.shape == shape
    block = extent // shape[1]
    for start in range(0, extent, size):
        group = x[:, start : start + size]
        blocks = slice(start // block, -(-min(start + size, extent) // block))
        if group.shape[1] == size:
            assert torch.equal(low[:, blocks], group.amin(1, keepdim=True).expand_as(low[:, blocks]))
        assert torch.equal(high[:, blocks], group.amax(1, keepdim=True).clamp(min=0).expand_as(high[:, blocks]))

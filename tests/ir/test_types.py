import pytest
import torch

from bitlower.ir import Level, TensorType


def test_a_type_prints_dtype_and_dimensions():
    kind = TensorType(torch.float32, ("batch", "sequence", 384))
    assert str(kind) == "float32[batch, sequence, 384]"
    assert kind.rank == 3
    assert kind.is_float
    assert str(TensorType(torch.int64, ())) == "int64[]"


def test_with_dtype_keeps_the_shape():
    kind = TensorType(torch.float32, ("batch", 4)).with_dtype(torch.uint8)
    assert kind == TensorType(torch.uint8, ("batch", 4))
    assert not kind.is_float


def test_levels_are_their_names():
    assert [str(level) for level in Level] == ["float", "simulated", "integer", "fused"]
    assert Level("integer") is Level.INTEGER
    with pytest.raises(ValueError, match="fused-twice"):
        Level("fused-twice")

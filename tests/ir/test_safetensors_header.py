import json
import os
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from bitlower.ir import BitlowerError
from bitlower.ir.safetensors_header import read_header
from bitlower.ir.storage import map_safetensors


def written(path, header, data=b"\0" * 64):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype="F32", shape=(2, 2), first=0, last=16):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


@given(
    st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=4),
    st.sampled_from([torch.float32, torch.int8, torch.bool, torch.bfloat16]),
)
def test_the_header_says_where_each_tensor_lies(tmp_path_factory, shapes, dtype):
    tensors = {f"t{n}": torch.ones(shape).to(dtype) for n, shape in enumerate(shapes)}
    path = tmp_path_factory.getbasetemp() / "a.safetensors"
    path.write_bytes(save(tensors, metadata={"format": "pt"}))
    header = read_header(path)
    assert {name: tensor.shape for name, tensor in header.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    data = path.read_bytes()
    for name, tensor in tensors.items():
        stored = header[name]
        assert stored.elements == tensor.numel()
        assert data[stored.first : stored.last] == tensor.view(torch.uint8).numpy().tobytes() if tensor.dim() else True


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"a": entry(last=12)}, "has 12 bytes, which are not F32"),
        ({"a": entry(shape=[10**30])}, "which are not F32"),
        ({"a": entry(first=16, last=0)}, "which are not F32"),
        ({"a": entry(), "b": entry(first=8, last=24)}, "'b' lies over another"),
        ({"a": entry(shape=[100], last=400)}, "end at byte"),
        ({"a": entry(dtype="F99")}, "the unknown dtype 'F99'"),
        ({"a": entry(dtype=["F32"])}, "no dtype, shape and two offsets"),
        ({"a": entry(shape=[-2, -2])}, "no dtype, shape and two offsets"),
        ({"a": entry(shape=[True])}, "no dtype, shape and two offsets"),
        ({"a": 5}, "no dtype, shape and two offsets"),
        ({"a" * 10**6: 5}, "aaa … aaa"),
        ([], "not a JSON object"),
        (b'{"a": ', "Expecting value"),
        (b'{"a":' * 5000, "nested deeper"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header, reason):
    path = written(tmp_path / "a.safetensors", header)
    with pytest.raises(ValueError, match=reason):
        read_header(path)
    with pytest.raises(BitlowerError, match=rf"a\.safetensors is damaged: .*{reason}"):
        map_safetensors(path)


@pytest.mark.parametrize("data", [b"", b"\0" * 7, struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 99) + b"{}"])
def test_a_size_of_the_header_beyond_the_file_is_refused(tmp_path, data):
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="its header has"):
        read_header(path)


def test_a_dtype_that_torch_lacks_is_named(tmp_path):
    path = written(tmp_path / "a.safetensors", {"a": entry(dtype="F4", shape=[32])})
    with pytest.raises(BitlowerError, match="the dtype F4, which torch lacks"):
        map_safetensors(path)


def test_a_named_pipe_holds_no_weights(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(BitlowerError, match="it is a named pipe, not a file"):
        map_safetensors(tmp_path / "a.safetensors")

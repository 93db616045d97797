"""The writer against the library that reads its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from bitlower.backends.checkpoint.container import Entry
from bitlower.backends.checkpoint.safetensors import INDEX, TensorFolder, write_tensors
from bitlower.ir import CheckError

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)


def entry(name: str, tensor: torch.Tensor) -> Entry:
    return Entry(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


def sample() -> dict[str, torch.Tensor]:
    """A tensor of every type, of odd sizes, one that is not contiguous, one empty, one without axes."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t.{i}": torch.randint(0, 2, (3, 5), generator=generator).to(dtype) for i, dtype in enumerate(DTYPES)}
    return tensors | {"turned": torch.randn(4, 3).T, "empty": torch.zeros(0, 7), "number": torch.tensor(2.5)}


def test_the_library_reads_what_is_written(tmp_path: Path):
    tensors = sample()
    names = write_tensors([entry(*item) for item in tensors.items()], tmp_path, max_shard_size=10**9)
    assert names == ["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == names
    read = load_file(tmp_path / "model.safetensors")
    assert set(read) == set(tensors)
    folder = TensorFolder(tmp_path)
    for name, tensor in tensors.items():
        for found in (read[name], folder.tensor(name)):
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)


def test_every_tensor_is_aligned(tmp_path: Path):
    write_tensors([entry(*item) for item in sample().items()], tmp_path, max_shard_size=10**9)
    data = (tmp_path / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert header.pop("__metadata__") == {"format": "pt"}
    tensors = sample()
    for name, form in header.items():
        assert (8 + size + form["data_offsets"][0]) % tensors[name].element_size() == 0


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 60))
def test_shards_hold_everything_within_the_limit(tmp_path_factory, sizes: list[int], limit: int):
    folder = tmp_path_factory.mktemp("shards")
    tensors = {f"w{i}": torch.full((size,), i, dtype=torch.uint8) for i, size in enumerate(sizes)}
    names = write_tensors([entry(*item) for item in tensors.items()], folder, max_shard_size=limit)
    shards = [load_file(folder / name) for name in names if name != INDEX]
    for shard in shards:
        assert len(shard) == 1 or sum(tensor.numel() for tensor in shard.values()) <= limit
    assert {name: tensor.tolist() for shard in shards for name, tensor in shard.items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }
    assert (INDEX in names) is (len(shards) > 1)
    read = TensorFolder(folder)
    assert read.names == set(tensors)
    assert all(torch.equal(read.tensor(name), tensor) for name, tensor in tensors.items())


def test_one_tensor_at_a_time_is_made_and_a_failure_leaves_nothing(tmp_path: Path):
    made = []

    def make(name: str) -> torch.Tensor:
        made.append(name)
        if name == "c":
            raise OSError("the disk is full")
        return torch.zeros(2)

    entries = [Entry(name, torch.float32, (2,), lambda name=name: make(name)) for name in "abcd"]
    with pytest.raises(OSError, match="full"):
        write_tensors(entries, tmp_path, max_shard_size=8)
    assert made == ["a", "b", "c"]
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_is_not_as_announced_is_an_error(tmp_path: Path):
    with pytest.raises(CheckError, match=r"x is torch.float32\[2\], not torch.float32\[3\]"):
        write_tensors([Entry("x", torch.float32, (3,), lambda: torch.zeros(2))], tmp_path, max_shard_size=10)


def test_damage_is_named(tmp_path: Path):
    write_tensors([entry("x", torch.zeros(3))], tmp_path, max_shard_size=100)
    with pytest.raises(CheckError, match="the tensor y is missing"):
        TensorFolder(tmp_path).tensor("y")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckError, match=r"model\.safetensors is damaged"):
        TensorFolder(tmp_path)
    path.unlink()
    with pytest.raises(CheckError, match=r"model\.safetensors is damaged"):
        TensorFolder(tmp_path)
    for form in ("[]", '{"weight_map": {"x": "../x.safetensors"}}', '{"weight_map": 3}'):
        (tmp_path / INDEX).write_text(form)
        with pytest.raises(CheckError, match=f"{INDEX} in .* is damaged"):
            TensorFolder(tmp_path)

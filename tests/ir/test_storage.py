import ctypes
import gc
import math
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from bitlower.ir import BitlowerError, storage
from bitlower.ir.storage import (
    ALIGNMENT,
    StoredTensors,
    is_mapped,
    like,
    map_safetensors,
    release,
    settle,
    spill,
    to_safetensors,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool)
MEGABYTE = 1 << 20


def resident() -> int:
    return psutil.Process(os.getpid()).memory_info().rss


@pytest.fixture
def file(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {str(t): torch.randint(0, 2, (3, 5), generator=generator).to(t) for t in DTYPES}
    tensors |= {"odd": torch.ones(3, dtype=torch.int8), "empty": torch.zeros(0, 4), "scalar": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    return tmp_path / "x.safetensors"


def test_mapped_tensors_equal_those_in_the_file(file: Path) -> None:
    from safetensors.torch import load_file

    expected, found = load_file(file), map_safetensors(file)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype is tensor.dtype
        assert torch.equal(found[name], tensor)
    assert is_mapped(found["torch.float32"])


def test_a_damaged_file_is_named(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BitlowerError, match=r"x\.safetensors is damaged"):
        map_safetensors(file)
    with pytest.raises(BitlowerError, match="is damaged"):
        map_safetensors(file.with_name("none.safetensors"))


@given(st.lists(st.integers(0, 7), max_size=3), st.sampled_from(DTYPES), st.booleans())
def test_a_spilled_tensor_equals_its_original(shape: list[int], dtype: torch.dtype, turned: bool) -> None:
    tensor = torch.randint(0, 2, shape).to(dtype)
    tensor = tensor.transpose(0, -1) if turned and shape else tensor
    copy = spill(tensor)
    release(copy)
    assert torch.equal(copy, tensor)
    assert copy.dtype is dtype
    assert is_mapped(copy) == bool(tensor.numel())


def test_spilling_converts() -> None:
    tensor = torch.randn(1000).bfloat16()
    assert torch.equal(spill(tensor, torch.float32), tensor.float())


def test_memory_is_given_back_and_values_stay(tmp_path: Path) -> None:
    save_file({"x": torch.ones(16 * MEGABYTE)}, tmp_path / "x.safetensors")
    gc.collect()
    mapped = map_safetensors(tmp_path / "x.safetensors")["x"]
    spilled = spill(mapped)
    before = resident()
    assert float(mapped.sum()) == float(spilled.sum()) == 16 * MEGABYTE
    assert resident() - before > 100 * MEGABYTE
    release(mapped.reshape(4, -1))
    release(spilled)
    assert resident() - before < 20 * MEGABYTE
    assert float(mapped.sum()) == float(spilled.sum()) == 16 * MEGABYTE


def test_what_was_written_survives_release(file: Path) -> None:
    mapped, spilled = map_safetensors(file)["torch.float32"], spill(torch.zeros(4))
    mapped.fill_(7)
    spilled.fill_(7)
    release(mapped)
    release(spilled)
    assert bool((mapped == 7).all())
    assert bool((spilled == 7).all())
    assert not bool((map_safetensors(file)["torch.float32"] == 7).any())


def test_a_map_lives_as_long_as_its_tensors(file: Path) -> None:
    gc.collect()
    before = len(storage._MAPS)
    part = map_safetensors(file)["torch.float32"][1:2]
    gc.collect()
    assert len(storage._MAPS) == before + 1
    assert is_mapped(torch.nn.Parameter(part))
    del part
    gc.collect()
    assert len(storage._MAPS) == before


def test_plain_tensors_are_left_alone() -> None:
    tensor = torch.ones(3)
    release(tensor)
    assert not is_mapped(tensor)
    assert like(tensor, torch.zeros(2)) is tensor
    assert is_mapped(like(tensor, spill(torch.zeros(2))))
    assert not is_mapped(torch.empty(3, device="meta"))


SMALL = """
import os, psutil, torch
from bitlower.ir.storage import trim
blocks = [torch.ones(1 << 12) for _ in range(8000)]
keep = blocks[-1]
held = psutil.Process(os.getpid()).memory_info().rss
del blocks
trim()
print(held - psutil.Process(os.getpid()).memory_info().rss)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_trim_gives_freed_memory_back() -> None:
    freed = int(subprocess.run([sys.executable, "-c", SMALL], check=True, capture_output=True).stdout)
    assert freed > 100 * MEGABYTE


@given(st.lists(st.integers(0, 7), max_size=3), st.integers(1, 9), st.booleans())
def test_parts_are_the_entries_in_order(shape: list[int], size: int, mapped: bool) -> None:
    tensor = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "_CHUNK", size)
        found = [part.tolist() for part in storage.parts(spill(tensor) if mapped else tensor)]
    assert [entry for part in found for entry in part] == tensor.flatten().tolist()
    assert max(map(len, found), default=0) <= size


BLOCKS = """
import os, psutil, torch
from bitlower.ir.storage import bound_heap
if {bound}:
    bound_heap()
torch.ones(7 << 20)  # freeing 28 MB raises the bound by which the C library keeps what is freed
held = [torch.ones(1 << 20) for _ in range(40)]
before = psutil.Process(os.getpid()).memory_info().rss
del held[:-1]  # the last block keeps the heap from shrinking
print(before - psutil.Process(os.getpid()).memory_info().rss)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_a_bound_heap_gives_freed_blocks_back() -> None:
    freed = [
        int(subprocess.run([sys.executable, "-c", BLOCKS.format(bound=bound)], check=True, capture_output=True).stdout)
        for bound in (False, True)
    ]
    assert freed[0] < 80 * MEGABYTE < 150 * MEGABYTE < freed[1]


RESULTS = """
import resource, torch
from bitlower.ir.storage import bound_heap
bound_heap()
operand = torch.ones(1 << 19)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(100):
    result = operand * 2
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_a_bound_heap_keeps_what_small_tensors_need() -> None:
    """A result of 2 MB is not fetched from the system page by page each time: that would be 512 faults for each."""
    command = [sys.executable, "-c", RESULTS]
    assert int(subprocess.run(command, check=True, capture_output=True).stdout) < 100 * 512 / 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (0, 4), (), (2, 3, 7)])
@pytest.mark.parametrize("name", ["x", "a longer name than that"])
def test_a_file_in_pieces_is_what_safetensors_reads(
    dtype: torch.dtype, shape: tuple[int, ...], name: str, tmp_path: Path
) -> None:
    """The numbers begin at a multiple of 64 bytes, so that a mapped tensor lies as one that torch allocated."""
    from safetensors.torch import load

    tensor = torch.randint(0, 2, shape).to(dtype)
    data = b"".join(to_safetensors(name, tensor.transpose(0, -1) if shape else tensor))
    assert torch.equal(load(data)[name], tensor.transpose(0, -1) if shape else tensor)
    assert (8 + int.from_bytes(data[:8], "little")) % ALIGNMENT == 0
    (tmp_path / "x.safetensors").write_bytes(data)
    mapped = map_safetensors(tmp_path / "x.safetensors")[name]
    assert not tensor.numel() or (is_mapped(mapped) and mapped.data_ptr() % ALIGNMENT == 0)


def test_one_tensor_is_mapped_by_itself(file: Path) -> None:
    """A map of its own, with the header read once."""
    stored, expected = StoredTensors(file), map_safetensors(file)
    assert stored.names == tuple(expected)
    for name, tensor in expected.items():
        assert torch.equal(stored.map(name), tensor)
    one, other = (stored.map("torch.float32") for _ in range(2))
    one.fill_(7)
    assert torch.equal(other, expected["torch.float32"])
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BitlowerError, match=r"is damaged: it is shorter than it was"):
        stored.map("torch.float32")
    file.unlink()
    with pytest.raises(BitlowerError, match=r"is damaged: "):
        stored.map_all()


def test_weights_settle_in_a_file_or_at_an_address_of_torch() -> None:
    odd = torch.arange(40.0)[1:]
    assert odd.data_ptr() % ALIGNMENT
    placed, mapped = settle(odd, mapped=False), settle(odd, mapped=True)
    assert placed.data_ptr() % ALIGNMENT == mapped.data_ptr() % ALIGNMENT == 0
    assert is_mapped(mapped)
    assert not is_mapped(placed)
    assert torch.equal(placed, odd)
    assert torch.equal(mapped, odd)
    assert settle(placed, mapped=False) is placed

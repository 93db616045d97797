"""Tensors of results that come back: shared with a program at hand, apart where they were apart, in files or not."""

from __future__ import annotations

from pathlib import Path

import torch

from bitlower.ir import Program, get_tensor, set_tensor
from bitlower.ir.storage import is_mapped, spill
from bitlower.passes import Cache
from bitlower.passes._machinery.cache import Entry, aligned


def test_what_comes_back_beside_a_program_shares_its_tensors(tmp_path: Path, tiny_program: Program) -> None:
    """By name: two tensors that are merely equal stay two, for one may be changed without the other."""
    module, cache = tiny_program.module, Cache(tmp_path)
    names = [name.removeprefix("model/") for name, _ in tiny_program.tensors()]
    cache.put("key", Entry(True, tiny_program))
    other = tiny_program.clone()
    set_tensor(other.module, names[0], get_tensor(module, names[0]) + 1)
    entry = cache.get("key", other)
    assert entry is not None
    assert entry.program is not None
    assert entry.program.digest() == tiny_program.digest()
    shared = {name: get_tensor(entry.program.module, name).data_ptr() for name in names}
    assert [name for name in names if shared[name] != get_tensor(module, name).data_ptr()] == names[:1]


def test_equal_tensors_of_a_program_stay_apart(tmp_path: Path, tiny_program: Program) -> None:
    module, cache = tiny_program.module, Cache(tmp_path)
    first, second = [name.removeprefix("model/") for name, t in tiny_program.tensors() if t.shape == (16,)][:2]
    for name in (first, second):
        set_tensor(module, name, torch.nn.Parameter(torch.ones(16)))
    cache.put("key", Entry(True, tiny_program))
    for beside in (None, tiny_program):
        entry = cache.get("key", beside)
        assert entry is not None
        assert entry.program is not None
        one, other = (get_tensor(entry.program.module, name) for name in (first, second))
        assert one.data_ptr() != other.data_ptr()


def test_results_of_a_model_in_files_stay_in_files(tmp_path: Path, tiny_program: Program) -> None:
    cache = Cache(tmp_path)
    cache.put("key", Entry(True, tiny_program))
    mapped = tiny_program.clone()
    for name, tensor in tiny_program.tensors():
        set_tensor(mapped.module, name.removeprefix("model/"), torch.nn.Parameter(spill(tensor.detach() + 1)))
    entry = cache.get("key", mapped)
    assert entry is not None
    assert entry.program is not None
    assert entry.program.digest() == tiny_program.digest()
    assert all(is_mapped(tensor) for _, tensor in entry.program.tensors())
    assert aligned(entry.program) is entry.program

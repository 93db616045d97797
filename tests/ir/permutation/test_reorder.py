"""Any permutation of any domain leaves the function as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitlower.ir import Program, get_tensor, set_tensor
from bitlower.ir.permutation.domains import Domain, domains
from bitlower.ir.permutation.reorder import gathers, reorder
from bitlower.ir.storage import is_mapped, spill
from bitlower.ir.verifier import verify

LINEAR = torch.ops.aten.linear.default
FAMILIES = ["bert", "llama", "gemma", "gpt2", "opt", "opt-post-norm", "gpt-neox", "phi"]
Family = Callable[[str], Program]
TOLERANCE = 1e-10


def shuffled(program: Program, generator: torch.Generator, chosen: Callable[[Domain], bool]) -> int:
    """Reorder the chosen domains at random; the gathers that are left."""
    found = domains(program.module)
    free = [domain for domain in found if not domain.frozen and chosen(domain)]
    count = reorder(program.module, found, {d: torch.randperm(d.size, generator=generator) for d in free})
    program.recompile()
    return count


def assert_equal(before: Program, after: Program, feed: Callable, tolerance: float = TOLERANCE) -> None:
    pasts = (0, 3) if len(before.inputs) > 3 else (0,)
    with torch.no_grad():
        for past in pasts:
            inputs = feed(before, past=past, seed=past, dtype=torch.float64)
            expected, found = before(**inputs), after(**inputs)
            for name, value in expected.items():
                if value.numel():
                    assert float((value - found[name]).abs().max()) <= tolerance * float(value.std()), name


@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**31), share=st.sampled_from([0.2, 0.6, 1.0]))
@pytest.mark.parametrize("name", FAMILIES)
def test_any_permutation_of_any_domain_keeps_the_function(
    name: str, family: Family, in_float64: Callable, feed: Callable, seed: int, share: float
) -> None:
    before = in_float64(family(name))
    after, generator = before.clone(), torch.Generator().manual_seed(seed)
    shuffled(after, generator, lambda domain: float(torch.rand(1, generator=generator)) <= share)
    assert_equal(before, after, feed)


@pytest.mark.parametrize("name", FAMILIES)
def test_gathers_stand_only_where_values_come_in_or_go_out(name: str, family: Family, feed: Callable) -> None:
    program = family(name)
    generator = torch.Generator().manual_seed(0)
    count = shuffled(program, generator, lambda d: not d.inputs and not d.outputs)
    assert count == 0
    verify(program)
    assert shuffled(program, generator, lambda domain: domain.residual) == (1 if name == "bert" else 0)
    for gather in gathers(program.graph):
        assert [user.op for user in gather.users] == ["output"]


def test_gathers_follow_later_permutations(family: Family, in_float64: Callable, feed: Callable) -> None:
    """A second permutation, also of what the first one's gathers read, needs no second gather at an output."""
    before = in_float64(family("bert"))
    after, generator = before.clone(), torch.Generator().manual_seed(0)
    assert shuffled(after, generator, lambda domain: True) == 2
    assert shuffled(after, generator, lambda domain: True) == 2
    assert_equal(before, after, feed)
    caches = in_float64(family("llama"))
    after = caches.clone()
    for _ in range(2):
        shuffled(after, generator, lambda domain: True)
        assert_equal(caches, after, feed)


def test_the_way_back_removes_every_gather(family: Family) -> None:
    program = family("bert")
    original = {name: tensor for name, tensor in program.tensors()}
    for way in range(2):
        found = domains(program.module)
        [stream] = [domain for domain in found if domain.residual]
        order = torch.randperm(32, generator=torch.Generator().manual_seed(5))
        count = reorder(program.module, found, {stream: order if way == 0 else order.argsort()})
        program.recompile()
        assert count == 1 - way
    assert all(torch.equal(tensor, original[name]) for name, tensor in program.tensors())


def test_a_tied_weight_stays_one(family: Family) -> None:
    program = family("llama")
    names = [name for name, _ in program.tensors()]
    shuffled(program, torch.Generator().manual_seed(0), lambda domain: domain.residual)
    assert [name for name, _ in program.tensors()] == names
    table = get_tensor(program.module, "model.embed_tokens.weight")
    assert isinstance(table, torch.nn.Parameter)
    assert table.is_contiguous()


def test_two_names_of_one_weight_stay_one(family: Family, in_float64: Callable, feed: Callable) -> None:
    before = in_float64(family("llama"))
    after = before.clone()
    table, head = "model.embed_tokens.weight", next(reversed(after.graph.find_nodes(op="call_function", target=LINEAR)))
    set_tensor(after.module, "lm_head.weight", get_tensor(after.module, table))
    with after.graph.inserting_before(head):
        second = after.graph.get_attr("lm_head.weight")
    second.meta = dict(head.args[1].meta)
    head.args = (head.args[0], second)
    shuffled(after, torch.Generator().manual_seed(0), lambda domain: domain.residual)
    assert get_tensor(after.module, table).data_ptr() == get_tensor(after.module, "lm_head.weight").data_ptr()
    assert not torch.equal(get_tensor(after.module, table), get_tensor(before.module, table))
    assert_equal(before, after, feed)


def test_the_weights_of_other_programs_are_not_written_to(family: Family) -> None:
    program = family("gpt2")
    kept = {name: tensor.clone() for name, tensor in program.tensors()}
    shuffled(program.clone(), torch.Generator().manual_seed(0), lambda domain: True)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in program.tensors())


def test_mapped_weights_stay_in_files(family: Family) -> None:
    program = family("llama")
    name = "model.layers.0.mlp.down_proj.weight"
    holder = program.module.get_submodule(name.rpartition(".")[0])
    expected = get_tensor(program.module, name).detach().clone()
    holder.weight = torch.nn.Parameter(spill(expected))
    found = domains(program.module)
    inner = found.at(name, 1)[0]
    reorder(program.module, found, {inner: torch.arange(48).flip(0)})
    moved = get_tensor(program.module, name)
    assert is_mapped(moved)
    assert torch.equal(moved, expected.flip(1))


def test_a_frozen_domain_is_refused(family: Family) -> None:
    program = family("llama")
    found = domains(program.module)
    frozen = next(domain for domain in found if domain.frozen)
    with pytest.raises(AssertionError, match="frozen"):
        reorder(program.module, found, {frozen: torch.arange(frozen.size).flip(0)})

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from bitlower.frontends import load
from bitlower.ir import BitlowerError, Program, get_tensor, lockstep, set_tensor
from bitlower.ir.dataflow import linears
from bitlower.ir.lockstep import steps, walk
from bitlower.ir.observe import observe
from bitlower.ir.operators import LinearNode
from bitlower.ir.storage import spill


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=50, max_position_embeddings=32,
    )  # fmt: skip
    return load(AutoModelForCausalLM.from_config(config))


@pytest.fixture(scope="module")
def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(0, 50, (2, length), generator=generator),
            "attention_mask": torch.ones(2, length, dtype=torch.int64),
            "position_ids": torch.arange(length).expand(2, -1),
        }
        for length in (5, 7, 3)
    ]


def operands(program: Program, batches: list[dict[str, torch.Tensor]], **options: object) -> dict[str, list]:
    seen: dict[str, list] = {}

    def visit(node, read) -> None:
        seen[node.name] = [value.clone() for value, _ in read(LinearNode(node).x)]

    walk(program, linears(program.graph), batches, visit, **options)
    return seen


def test_operands_are_those_of_batchwise_runs(program: Program, batches) -> None:
    expected: dict[str, list] = {}
    nodes = linears(program.graph)

    def keep(node, value, batch) -> None:
        for linear in nodes:
            if LinearNode(linear).x is node:
                expected.setdefault(linear.name, []).append(value.clone())

    observe(program, {LinearNode(node).x for node in nodes}, batches, keep)
    found = operands(program, batches)
    assert list(found) == [node.name for node in nodes]
    for name, values in found.items():
        assert all(torch.equal(a, b) for a, b in zip(values, expected[name], strict=True)), name


def test_later_nodes_see_what_a_visit_writes(program: Program, batches) -> None:
    changed = program.clone()
    first = linears(changed.graph)[0]
    seen: dict[str, torch.Tensor] = {}

    def visit(node, read) -> None:
        seen[node.name] = next(read(LinearNode(node).x))[0].clone()
        if node is first:
            target = str(LinearNode(node).weight.target)
            set_tensor(changed.module, target, torch.nn.Parameter(get_tensor(changed.module, target) * 3))

    walk(changed, linears(changed.graph), batches, visit)
    changed.recompile()
    expected = operands(changed, batches[:1])
    assert all(torch.equal(value, expected[name][0]) for name, value in seen.items())
    original = operands(program, batches[:1])
    assert not torch.equal(seen["linear_3"], original["linear_3"][0])


def test_two_programs_are_walked_side_by_side(program: Program, batches) -> None:
    """What is written to one does not reach the other, and the caller's gradients stay on."""
    changed = program.clone()
    expected = operands(program, batches)
    seen: dict[str, list] = {}
    pairs = zip(
        steps(changed, linears(changed.graph), batches), steps(program, linears(program.graph), batches), strict=True
    )
    for (node, read), (other, read_other) in pairs:
        assert torch.is_grad_enabled()
        assert node.name == other.name
        sides = ((read, node), (read_other, other))
        values = [[value.clone() for value, _ in each(LinearNode(linear).x)] for each, linear in sides]
        assert all(torch.equal(a, b) for a, b in zip(values[1], expected[node.name], strict=True)), node.name
        seen[node.name] = values[0]
        target = str(LinearNode(node).weight.target)
        set_tensor(changed.module, target, torch.nn.Parameter(get_tensor(changed.module, target).detach() * 2))
    changed.recompile()
    doubled = operands(changed, batches)
    for name, values in seen.items():
        assert all(torch.equal(a, b) for a, b in zip(values, doubled[name], strict=True)), name


def test_values_beyond_the_budget_go_to_disk_and_stay_the_same(program: Program, batches, monkeypatch) -> None:
    expected = operands(program, batches)
    spilled: list[torch.Tensor] = []

    def count(value: torch.Tensor, folder: object) -> torch.Tensor:
        spilled.append(spill(value, folder=folder))
        return spilled[-1]

    monkeypatch.setattr(lockstep, "spill", count)
    found = operands(program, batches, budget=2000)
    assert len(spilled) > 50
    for name, values in found.items():
        assert all(torch.equal(a, b) for a, b in zip(values, expected[name], strict=True)), name


def test_what_nobody_reads_any_more_is_freed(program: Program, batches, monkeypatch) -> None:
    """At the last linear of the second block no value of the first block is held."""
    alive: list[int] = []
    held = lockstep._Walker._held
    monkeypatch.setattr(lockstep._Walker, "_held", lambda self: alive.append(held(self)) or alive[-1])
    operands(program, batches)
    first, second = alive[: len(alive) // 2], alive[len(alive) // 2 :]
    assert max(second) <= max(first) + 4 * 2 * 15 * 16 * 4  # the rotary tables and one more value


def test_nothing_is_computed_that_no_visit_depends_on(program: Program, batches, monkeypatch) -> None:
    ran: list[str] = []
    run = lockstep._Walker.run
    monkeypatch.setattr(lockstep._Walker, "run", lambda self, node: ran.append(node.name) or run(self, node))
    first = linears(program.graph)[0]
    walk(program, [first], batches, lambda node, read: None)
    assert first.name not in ran
    assert not any(name.startswith("scaled_dot_product") for name in ran)


def test_a_batch_with_an_unknown_input_is_refused(program: Program) -> None:
    with pytest.raises(BitlowerError, match="no input 'ids'"):
        walk(program, linears(program.graph), [{"ids": torch.zeros(1)}], lambda node, read: None)

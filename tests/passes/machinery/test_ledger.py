from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from bitlower.ir import Level, Program, TensorType, ValueSpec, get_tensor, set_tensor
from bitlower.ir.observe import stream
from bitlower.passes import Context, Contract, Ledger, Pass, PassManager, parse_pipeline
from bitlower.passes._machinery import ledger as module


@dataclass(frozen=True)
class Round(Pass):
    """Round the weight of the second linear to multiples of ``step``."""

    name: ClassVar[str] = "round"
    step: float = 0.1

    def run(self, program: Program, context: Context) -> bool:
        weight = get_tensor(program.module, "down.weight").detach()
        set_tensor(program.module, "down.weight", torch.nn.Parameter((weight / self.step).round() * self.step))
        return True


@dataclass(frozen=True)
class Same(Round):
    name: ClassVar[str] = "same"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, program: Program, context: Context) -> bool:
        return True


@pytest.fixture
def context() -> Context:
    generator = torch.Generator().manual_seed(3)
    return Context(evaluation=[{"x": torch.randn(n, 16, generator=generator)} for n in (5, 3)])


def linear(program: Program, name: str, x: np.ndarray) -> np.ndarray:
    weight, bias = (
        get_tensor(program.module, f"{name}.{part}").detach().double().numpy() for part in ("weight", "bias")
    )
    return x @ weight.T + bias


@pytest.mark.parametrize("part", [1 << 20, 40])
def test_losses_agree_with_numpy(
    tiny_program: Program, context: Context, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PART", part)
    ledger = Ledger()
    result = PassManager([Same(), Round()], [ledger]).run(tiny_program, context)
    (row,) = ledger.to_dict()["rows"]
    assert row["pass"] == "round"
    assert row["bytes"] == sum(t.numel() * 4 for _, t in tiny_program.tensors())
    batches = [batch["x"] for batch in context.evaluation]
    expected, found = (
        {
            name: np.concatenate([p(x=x)[name].detach().double().numpy() for x in batches])
            for name in ("hidden", "logits")
        }
        for p in (tiny_program, result)
    )
    for name in ("hidden", "logits"):
        y, z = expected[name], found[name]
        error = np.linalg.norm(z - y) / np.linalg.norm(y)
        cosine = ((y * z).sum(1) / np.linalg.norm(y, axis=1) / np.linalg.norm(z, axis=1)).mean()
        assert row["outputs"][name]["relative_error"] == pytest.approx(error, rel=1e-4)
        assert row["outputs"][name]["cosine"] == pytest.approx(cosine, rel=1e-5)
    p, q = (log_softmax(values["logits"], axis=1) for values in (expected, found))
    assert row["outputs"]["logits"]["kl_divergence"] == pytest.approx((np.exp(p) * (p - q)).sum(1).mean(), rel=1e-4)
    same = (p.argmax(1) == q.argmax(1)).mean()
    assert 0 < same < 1
    assert row["outputs"]["logits"]["top1_agreement"] == pytest.approx(same)
    assert not {"kl_divergence", "top1_agreement"} & set(row["outputs"]["hidden"])
    assert not any("perplexity" in row["outputs"][name] for name in ("hidden", "logits"))


@pytest.mark.parametrize("part", [1 << 20, 640])
@pytest.mark.parametrize("padded", [False, True])
def test_the_perplexity_of_a_decoder_is_that_of_its_next_tokens(
    family: Callable[[str], Program], part: int, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PART", part)
    program = family("llama")
    rounded = program.clone()
    name, weight = next((name, t) for name, t in rounded.module.named_parameters() if t.dim() == 2)
    set_tensor(rounded.module, name, torch.nn.Parameter(weight + 0.05 * torch.randn_like(weight)))
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :3] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    batch = {spec.name: batch[spec.name] for spec in program.inputs if spec.name in batch}
    row = module.compare(program, rounded, Context(evaluation=[batch]))["outputs"]["logits"]
    for key, model in (("reference_perplexity", program), ("perplexity", rounded)):
        logits = model(**batch)["logits"].detach().double().numpy()
        losses = [
            -log_softmax(logits[text, place])[ids[text, place + 1]]
            for text in range(2)
            for place in range(8)
            if mask[text, place]
        ]
        assert row[key] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert row["perplexity"] != row["reference_perplexity"]
    for name in [name for name, tensor in rounded.module.named_parameters() if tensor.dim() == 1]:
        set_tensor(rounded.module, name, torch.nn.Parameter(1e6 * get_tensor(rounded.module, name).detach()))
    wrecked = module.compare(program, rounded, Context(evaluation=[batch]))["outputs"]["logits"]
    assert wrecked["perplexity"] is None  # larger than any number


def test_layers_are_linears_and_residual_sums_in_order(tiny_program: Program, context: Context) -> None:
    ledger = Ledger()
    result = PassManager([Round()], [ledger]).run(tiny_program, context)
    layers = ledger.to_dict()["rows"][0]["layers"]
    named = [(layer["node"], layer["path"]) for layer in layers]
    assert named == [("linear", "up"), ("linear_1", "down"), ("add", ""), ("linear_2", "head")]
    assert layers[0]["sqnr_db"] is None  # before the change: bit for bit the same
    x = torch.cat([batch["x"] for batch in context.evaluation])
    with torch.no_grad():
        inner = torch.nn.functional.gelu(torch.from_numpy(linear(tiny_program, "up", x.double().numpy()))).numpy()
    signal, noisy = linear(tiny_program, "down", inner), linear(result, "down", inner)
    ratio = 10 * math.log10((signal**2).sum() / ((noisy - signal) ** 2).sum())
    assert layers[1]["sqnr_db"] == pytest.approx(ratio, rel=1e-4)
    residual = signal + x.double().numpy()
    ratio = 10 * math.log10((residual**2).sum() / ((noisy - signal) ** 2).sum())
    assert layers[2]["sqnr_db"] == pytest.approx(ratio, rel=1e-4)


def test_every_row_compares_with_the_first_program(tiny_program: Program, context: Context) -> None:
    ledger = Ledger()
    PassManager([Round(0.2), Round(0.01)], [ledger]).run(tiny_program, context)
    errors = [row["outputs"]["logits"]["relative_error"] for row in ledger.to_dict()["rows"]]
    assert errors[0] > 0.01
    assert errors[1] == pytest.approx(errors[0])  # multiples of 0.2 are multiples of 0.01


def test_the_form_is_deterministic_json_with_six_digits(tiny_program: Program, context: Context) -> None:
    forms = []
    for _ in range(2):
        ledger = Ledger()
        PassManager([Round()], [ledger]).run(tiny_program, context)
        forms.append(json.dumps(ledger.to_dict(), allow_nan=False))
    assert forms[0] == forms[1]
    row = json.loads(forms[0])["rows"][0]
    values = [*row["outputs"]["logits"].values(), *(layer["sqnr_db"] for layer in row["layers"][1:])]
    assert all(value == float(f"{value:.6g}") for value in values)


def test_without_evaluation_batches_there_are_sizes_only(tiny_program: Program) -> None:
    ledger = Ledger()
    PassManager([Round()], [ledger]).run(tiny_program, Context())
    assert ledger.to_dict()["rows"] == [{"pass": "round", "bytes": tiny_program.size_bytes()}]


@dataclass(frozen=True)
class Spoil(Pass):
    """Add 1 to the third position of the sequence."""

    name: ClassVar[str] = "spoil"

    def run(self, program: Program, context: Context) -> bool:
        set_tensor(program.module, "offset", torch.tensor([0.0, 0.0, 1.0]).reshape(1, 3, 1))
        return True


def test_padded_positions_do_not_count() -> None:
    graph = torch.fx.Graph()
    value_type, mask_type = (
        TensorType(t, ("batch", "sequence", *rest)) for t, rest in ((torch.float32, (4,)), (torch.int64, ()))
    )
    x, mask = graph.placeholder("x"), graph.placeholder("attention_mask")
    offset = graph.get_attr("offset")
    total = graph.call_function(torch.ops.aten.add.Tensor, (x, offset))
    graph.output((total,))
    for node, kind in (
        (x, value_type),
        (mask, mask_type),
        (offset, TensorType(torch.float32, (1, 3, 1))),
        (total, value_type),
    ):
        node.meta = {"type": kind}
    module = torch.nn.Module()
    module.register_buffer("offset", torch.zeros(1, 3, 1))
    program = Program(
        {"model": torch.fx.GraphModule(module, graph)},
        Level.FLOAT,
        "feature-extraction",
        (ValueSpec("x", value_type), ValueSpec("attention_mask", mask_type)),
        (ValueSpec("last_hidden_state", value_type),),
    )
    errors = []
    for last in (0, 1):
        batch = {"x": torch.ones(2, 3, 4), "attention_mask": torch.tensor([[1, 1, last]] * 2)}
        ledger = Ledger()
        PassManager([Spoil()], [ledger], verify=False).run(program, Context(evaluation=[batch]))
        errors.append(ledger.rows[0]["outputs"]["last_hidden_state"]["relative_error"])
    assert errors == [0.0, pytest.approx(math.sqrt(1 / 3), rel=1e-5)]


def test_programs_run_side_by_side(tiny_program: Program, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two programs with the same layers, no value is held while another layer is computed."""
    seen: dict[int, list[str]] = {}

    def logged(program: Program, nodes, batch):
        names = seen.setdefault(id(program), [])
        for node, value in stream(program, nodes, batch):
            names.append(node.name)
            assert max(map(len, seen.values())) - min(map(len, seen.values())) <= 1 or len(seen) == 1
            yield node, value

    monkeypatch.setattr(module, "stream", logged)
    PassManager([Round()], [Ledger()]).run(tiny_program, context)
    first, second = seen.values()
    assert first == second
    assert len(first) > 2 * len(context.evaluation)


@dataclass(frozen=True)
class Reverse(Same):
    """Turn the order of the channels between the first two linears around: the same function, other values inside."""

    name: ClassVar[str] = "reverse"

    def run(self, program: Program, context: Context) -> bool:
        for name, axis in (("up.weight", 0), ("up.bias", 0), ("down.weight", 1)):
            turned = get_tensor(program.module, name).detach().flip(axis)
            set_tensor(program.module, name, torch.nn.Parameter(turned))
        return True


def noise(passes: list[Pass], program: Program, context: Context) -> list[dict[str, float | None]]:
    """Of each row, the decibels of the layers by node."""
    ledger = Ledger()
    PassManager(passes, [ledger]).run(program, context)
    return [{layer["node"]: layer["sqnr_db"] for layer in row["layers"]} for row in ledger.rows]


def test_channels_that_an_exact_pass_moved_are_no_noise(tiny_program: Program, context: Context) -> None:
    plain = noise([Round()], tiny_program, context)
    moved = noise([Reverse(), Round()], tiny_program, context)
    assert moved[0].pop("linear") is plain[0].pop("linear") is None
    assert moved[0] == pytest.approx(plain[0], rel=1e-5)


def test_channels_may_move_after_a_lossy_pass(tiny_program: Program, context: Context) -> None:
    """What the first pass cost stands in its row; the second one is compared with what it got."""
    first, second = noise([Round(0.2), Reverse(), Round(0.15)], tiny_program, context)
    assert first["linear_1"] is not None
    between = PassManager([Round(0.2), Reverse()]).run(tiny_program, context)
    [alone] = noise([Round(0.15)], between, context)
    assert second == alone
    ledger = Ledger()
    PassManager([Round(0.2), Reverse(), Round(0.15)], [ledger]).run(tiny_program, context)
    rounded = PassManager([Round(0.2), Reverse(), Round(0.15)]).run(tiny_program, context)
    errors = ledger.rows[1]["outputs"]["logits"]["relative_error"]
    assert errors == module.compare(tiny_program, rounded, context)["outputs"]["logits"]["relative_error"]


@pytest.mark.parametrize("mover", ["peg-permute", "rotate"])
def test_noise_by_layer_is_that_of_the_same_layer(
    mover: str, family: Callable[[str], Program], feed: Callable[..., dict[str, torch.Tensor]]
) -> None:
    """One scale for all activations and one for each output does not depend on the order of channels."""
    program = family("llama")
    data = [feed(program, past=0, seed=seed) for seed in (0, 1)]
    ending = parse_pipeline("quantize{scheme=W8A8},calibrate{weights=minmax activations=minmax}")
    context = Context(data, data)
    plain = noise(list(ending), program, context)[-1]
    moved = noise([*parse_pipeline(mover), *ending], program, context)[-1]
    assert set(moved) == set(plain)
    if mover == "peg-permute":
        assert moved == pytest.approx(plain, abs=0.01)
    assert min(value for value in moved.values() if value is not None) > 20

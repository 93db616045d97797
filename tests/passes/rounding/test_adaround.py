from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bitlower.frontends import load
from bitlower.ir import BitlowerError, Program, Scheme, get_tensor, ops, set_tensor
from bitlower.ir.dataflow import ACTIVATION, linears, parameter_of
from bitlower.ir.observe import observe
from bitlower.ir.operators import LinearNode
from bitlower.ir.quantization import numerics
from bitlower.ir.storage import is_mapped, spill
from bitlower.passes import Context
from bitlower.passes.canonical.clean import Clean
from bitlower.passes.lowering.lower_integer import LowerInteger
from bitlower.passes.quantizers.calibrate import Calibrate
from bitlower.passes.quantizers.quantize import Quantize
from bitlower.passes.rounding import adaround as module
from bitlower.passes.rounding.adaround import Adaround, AdaroundReport, following_activation
from bitlower.passes.rounding.rtn import Rtn

SHORT = Adaround(iterations=20, learning_rate=0.1, batch=32)
SCHEMES = ("W4A16", "W4A16-tensor", "W3A16-g16-asym", "W4A8-e4", "W4A8-token")


def weights_of(program: Program) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in program.tensors() if name.endswith("weight") and tensor.dim() == 2}


def values_at(program: Program, path: str, data) -> torch.Tensor:
    """What the linear at ``path`` reads, without padding, as :mod:`bitlower.ir.observe` sees it."""
    source = LinearNode(next(n for n in linears(program.graph) if n.meta["path"] == path)).x
    found: list[torch.Tensor] = []
    observe(program, [source], data, lambda _, value, batch: found.append(value[batch["attention_mask"].bool()]))
    return torch.cat(found)


@pytest.fixture(scope="module")
def decoder() -> tuple[Program, list[dict[str, torch.Tensor]]]:
    """A tiny Llama with grouped queries and a tied head, and four batches of whole windows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    program = load(LlamaForCausalLM(config).eval(), task="text-generation")
    ids = [torch.randint(0, 60, (4, 16), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    data = [
        {"input_ids": i, "attention_mask": torch.ones_like(i), "position_ids": torch.arange(16).expand(4, 16)}
        for i in ids
    ]
    return program, data


@pytest.mark.parametrize("scheme", ["W4A16-g16", "W3A16-asym", "W4A8-token-e16", "W4A8-e16"])
def test_the_error_of_each_layer_of_a_decoder_falls(decoder, run, scheme: str) -> None:
    """Computed again in float64: from what layers read in the finished program, and what the float model gives."""
    program, data = decoder
    context, clean = Context(data), run(program, Clean())
    placed = run(clean, Quantize(Scheme.parse(scheme)))
    learner = Adaround(iterations=150, learning_rate=0.03, batch=64, weighting="none", activation=False)
    result = run(placed, learner, context=context)
    rows = {row.weight: row for row in context[AdaroundReport].rows}
    assert len(rows) == 14
    sums = {"learned": 0.0, "nearest": 0.0}
    for linear in linears(result.graph):
        name = str(parameter_of(LinearNode(linear).weight).target)
        if name not in rows:  # the head
            continue
        path = linear.meta["path"]
        twin = next(n for n in linears(clean.graph) if n.meta["path"] == path)
        before = get_tensor(clean.module, str(twin.args[1].target)).detach()
        after, scale, zero = (get_tensor(result.module, str(a.target)).detach() for a in linear.args[1].args[:3])
        nearest = numerics.fake(before, scale, zero, *linear.args[1].args[3:])
        expected = values_at(clean, path, data).double() @ before.double().T
        inputs = values_at(result, path, data).double()
        errors = {
            name: float((inputs @ weight.double().T - expected).square().sum()) / len(inputs)
            for name, weight in (("learned", after), ("nearest", nearest))
        }
        assert errors["learned"] == pytest.approx(rows[name].loss, rel=1e-3)
        assert errors["nearest"] == pytest.approx(rows[name].nearest_loss, rel=1e-3)
        assert errors["learned"] <= errors["nearest"]
        sums = {key: sums[key] + errors[key] / errors["nearest"] for key in sums}
    assert sums["learned"] < 0.8 * sums["nearest"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_lie_on_their_grids_and_lowering_keeps_the_numbers(bert, batches, run, scheme: str) -> None:
    data = batches(3)
    placed = run(bert()[1], Clean(), Quantize(Scheme.parse(scheme)))
    simulated = run(placed, SHORT, Calibrate(), context=Context(data))
    for node in simulated.graph.find_nodes(op="call_function", target=ops.fake_quantize):
        if node.args[0].op == "get_attr" and node.meta["quantizer"].role == "linear-weight":
            source, scale, zero = (get_tensor(simulated.module, str(a.target)) for a in node.args[:3])
            assert torch.equal(ops.fake_quantize(source, scale, zero, *node.args[3:]), source)
    integer = run(simulated, LowerInteger())
    with torch.no_grad():
        assert torch.equal(simulated(**data[0])["logits"], integer(**data[0])["logits"])


def test_inputs_are_quantized_and_targets_are_those_of_the_float_model(bert, batches, run, monkeypatch) -> None:
    """At the last feed-forward layer, behind rewritten layers and calibrated activations."""
    data, seen = batches(3), []
    original = module.solve
    monkeypatch.setattr(module, "solve", lambda layer, *rest: seen.append(layer) or original(layer, *rest))
    clean = run(bert()[1], Clean())
    calibrated = run(clean, Quantize(Scheme.parse("W16A8")), Calibrate(), context=Context(data))
    result = run(calibrated, Quantize(Scheme.parse("W4A16")), SHORT, context=Context(data))
    path = "bert.encoder.layer.1.intermediate.dense"
    place = [n.meta["path"] for n in linears(result.graph)].index(path)
    torch.testing.assert_close(seen[place].inputs, values_at(result, path, data), rtol=0, atol=0)
    linear = next(n for n in linears(clean.graph) if n.meta["path"] == path)
    weight, bias = (get_tensor(clean.module, str(linear.args[i].target)).detach() for i in (1, 2))
    expected = torch.nn.functional.gelu(torch.nn.functional.linear(values_at(clean, path, data), weight, bias))
    torch.testing.assert_close(seen[place].targets, expected)
    assert torch.equal(seen[place].weight, weight)
    expected_weights = 1 / expected.square().sum(1)
    torch.testing.assert_close(seen[place].weights, expected_weights / expected_weights.mean())


def test_outputs_are_closer_than_with_round_to_nearest(bert, batches, run) -> None:
    data = batches(8, rows=4, length=12)
    clean = run(bert()[1], Clean())
    placed = run(clean, Quantize(Scheme.parse("W3A16")))
    held_out = batches(4, rows=4, length=12, seed=9)
    passes = {"nearest": Rtn(ranges="mse-golden"), "learned": Adaround(iterations=300)}
    errors = {}
    for name, pass_ in passes.items():
        result = run(placed, pass_, context=Context(data))
        with torch.no_grad():
            errors[name] = sum(float((result(**b)["logits"] - clean(**b)["logits"]).square().sum()) for b in held_out)
    assert errors["learned"] < 0.8 * errors["nearest"]


def test_the_report_is_of_what_was_written(bert, batches, run) -> None:
    context = Context(batches(3))
    placed = run(bert()[1], Clean(), Quantize(Scheme.parse("W4A16")))
    result = run(placed, SHORT, context=context)
    rows = {row.weight: row for row in context[AdaroundReport].rows}
    assert len(rows) == len(linears(result.graph))
    for linear in linears(result.graph):
        quantizer = LinearNode(linear).weight
        row = rows[str(quantizer.args[0].target)]
        assert row.loss <= row.nearest_loss
        before = get_tensor(placed.module, row.weight).detach()
        after, scale, zero = (get_tensor(result.module, str(a.target)).detach() for a in quantizer.args[:3])
        codes = [numerics.codes(each, scale, zero, *quantizer.args[3:]) for each in (before, after)]
        assert row.flipped == pytest.approx(float((codes[0] != codes[1]).float().mean()))
        assert row.kept_rows == int((codes[0] == codes[1]).all(1).sum())
    assert (
        rows["bert.encoder.layer.0.output.dense.weight"]
        .notes[0]
        .endswith("54 calibration tokens are few for 64 columns")
    )
    assert rows["classifier.weight"].tokens == 9


def test_only_an_activation_function_that_alone_reads_is_looked_through(bert) -> None:
    _, program = bert()
    x = torch.randn(3, 4)
    for linear in linears(program.graph):
        users = list(linear.users)
        through = len(users) == 1 and users[0].target in ACTIVATION
        assert through == ("intermediate" in linear.meta["path"] or "pooler" in linear.meta["path"])
        expected = users[0].target(x) if through else x
        assert torch.equal(following_activation(linear)(x), expected)


def test_tables_are_rounded_to_nearest(bert, batches, run) -> None:
    placed = run(bert()[1], Clean(), Quantize(Scheme.parse("W4A8-e2")))
    result = run(placed, SHORT, context=Context(batches()))
    expected = run(placed, Rtn(ranges="mse-golden"))
    name = "bert.embeddings.word_embeddings.weight"
    [scale, other] = [
        next(get_tensor(p.module, str(n.args[1].target)) for n, q in p.quantizers() if q.tensor == name)
        for p in (result, expected)
    ]
    assert torch.equal(scale, other)
    assert torch.equal(get_tensor(result.module, name), get_tensor(placed.module, name))


def test_equal_seeds_give_equal_weights_and_others_do_not(bert, batches, run) -> None:
    placed = run(bert()[1], Clean(), Quantize(Scheme.parse("W3A16")))
    first, again, other = (weights_of(run(placed, SHORT, context=Context(batches(), seed=s))) for s in (1, 1, 2))
    assert all(torch.equal(again[name], weight) for name, weight in first.items())
    assert any(not torch.equal(other[name], weight) for name, weight in first.items())


def test_padding_counts_for_nothing(bert, batches, run) -> None:
    placed = run(bert()[1], Clean(), Quantize(Scheme.parse("W4A16")))
    data = batches(2, padding=0)
    padded = [{name: torch.nn.functional.pad(value, (0, 3)) for name, value in batch.items()} for batch in data]
    reports = []
    for each in (data, padded):
        context = Context(each)
        run(placed, SHORT, context=context)
        reports.append(context[AdaroundReport].rows)
    assert [row.tokens for row in reports[0]] == [row.tokens for row in reports[1]]
    assert [row.loss for row in reports[0]] == pytest.approx([row.loss for row in reports[1]], rel=0.05)


def test_a_killed_run_goes_on_and_gives_the_same(bert, batches, run, tmp_path: Path, monkeypatch) -> None:
    placed = run(bert()[1], Clean(), Quantize(Scheme.parse("W4A16")))
    expected = weights_of(run(placed, SHORT, context=Context(batches())))
    original, solved = module.solve, []

    def solve(*arguments):
        if len(solved) == 5:
            raise KeyboardInterrupt
        solved.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(module, "solve", solve)
    with pytest.raises(KeyboardInterrupt):
        run(placed, SHORT, context=Context(batches(), work=tmp_path))
    solved.clear()
    monkeypatch.setattr(module, "solve", lambda *arguments: solved.append(arguments) or original(*arguments))
    found = weights_of(run(placed, SHORT, context=Context(batches(), work=tmp_path)))
    assert len(solved) == len(linears(placed.graph)) - 5
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_weights_in_files_stay_in_files(bert, batches, run) -> None:
    placed = run(bert()[1], Clean(), Quantize(Scheme.parse("W4A16")))
    expected = weights_of(run(placed, SHORT, context=Context(batches())))
    name = "bert.encoder.layer.0.output.dense.weight"
    set_tensor(placed.module, name, torch.nn.Parameter(spill(get_tensor(placed.module, name))))
    found = run(placed, SHORT, context=Context(batches()))
    assert is_mapped(get_tensor(found.module, name))
    assert torch.equal(get_tensor(found.module, name), expected[f"model/{name}"])


def test_no_data_is_refused(bert, run) -> None:
    with pytest.raises(BitlowerError, match="adaround needs calibration data"):
        run(bert()[1], Clean(), Quantize(Scheme.parse("W4A16")), SHORT)


def test_values_that_are_not_finite_are_named(bert, batches, run) -> None:
    placed = run(bert()[1], Clean(), Quantize(Scheme.parse("W4A16"), targets=("bert.encoder.layer.1",)))
    name = "bert.encoder.layer.0.output.dense.weight"
    broken = get_tensor(placed.module, name).detach().clone()
    broken[0, 0] = torch.nan
    set_tensor(placed.module, name, torch.nn.Parameter(broken))
    with pytest.raises(
        BitlowerError, match=r"layer\.1\.attention\.self\.query\.weight: its calibration inputs hold NaN"
    ):
        run(placed, SHORT, context=Context(batches()))


@pytest.mark.parametrize(
    ("field", "value"),
    [("iterations", 0), ("batch", 0), ("tokens", 0), ("learning_rate", 0.0), ("regularization", -1.0), ("warmup", 1.0)],
)
def test_parameters_out_of_range_are_named(bert, run, field: str, value: float) -> None:
    with pytest.raises(BitlowerError, match=f"adaround: {field.replace('_', '-')} is {value}"):
        run(bert()[1], Clean(), Quantize(Scheme.parse("W4A16")), Adaround(**{field: value}))

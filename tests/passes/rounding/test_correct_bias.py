from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from bitlower.frontends import load
from bitlower.ir import BitlowerError, Program, Scheme, get_tensor
from bitlower.ir.dataflow import linears
from bitlower.ir.observe import observe
from bitlower.ir.operators import LinearNode, operand
from bitlower.passes import Context
from bitlower.passes.canonical.clean import Clean
from bitlower.passes.lowering.lower_integer import LowerInteger
from bitlower.passes.quantizers.calibrate import Calibrate
from bitlower.passes.quantizers.quantize import Quantize
from bitlower.passes.rounding.correct_bias import BiasReport, CorrectBias
from bitlower.passes.rounding.rtn import Rtn


def means(program: Program, batches, *, operands: bool = False) -> dict[str, np.ndarray]:
    """The mean output of each linear (or the mean of what it reads) over the tokens, float64, by path."""
    return {path: rows.mean(0) for path, rows in outputs(program, batches, operands=operands).items()}


def outputs(program: Program, batches, *, operands: bool = False) -> dict[str, np.ndarray]:
    """The outputs of each linear (or what it reads) for all tokens, ``[tokens, channels]`` float64, by path."""
    nodes: dict[object, list[str]] = {}
    for n in linears(program.graph):
        nodes.setdefault(LinearNode(n).x if operands else n, []).append(n.meta["path"])
    found: dict[str, list[np.ndarray]] = {}

    def add(node, value, batch) -> None:
        rows = value[batch["attention_mask"].bool()] if value.dim() == 3 else value
        for path in nodes[node]:
            found.setdefault(path, []).append(rows.double().numpy())

    observe(program, list(nodes), batches, add)
    return {path: np.concatenate(parts) for path, parts in found.items()}


def biases(program: Program) -> dict[str, np.ndarray]:
    return {
        n.meta["path"]: get_tensor(program.module, str(n.args[2].target)).detach().double().numpy()
        for n in linears(program.graph)
    }


@pytest.mark.parametrize("scheme", ["W2A16", "W3A4", "W4A8-token"])
def test_the_mean_output_of_every_linear_is_the_float_model_s(bert, batches, run, scheme: str) -> None:
    data = batches(4)
    clean = run(bert()[1], Clean())
    simulated = run(clean, Quantize(Scheme.parse(scheme)), Calibrate(), context=Context(data))
    corrected = run(simulated, CorrectBias(weighting="none"), context=Context(data))
    wanted, before, after = (means(program, data) for program in (clean, simulated, corrected))
    for path, expected in wanted.items():
        np.testing.assert_allclose(after[path], expected, atol=2e-6 * max(1, np.abs(expected).max()), err_msg=path)
    assert np.mean([np.abs(before[path] - expected).max() for path, expected in wanted.items()]) > 1e-2


def test_a_bias_is_the_paper_s_formula_in_float64(bert, batches, run) -> None:
    """``b − (E[Ŵ x̂] − E[W x])``, x̂ from layers that are corrected already."""
    data = batches(4)
    clean = run(bert()[1], Clean())
    simulated = run(clean, Quantize(Scheme.parse("W3A4")), Calibrate(), context=Context(data))
    context = Context(data)
    corrected = run(simulated, CorrectBias(weighting="none"), context=context)
    exact, quantized = means(clean, data, operands=True), means(corrected, data, operands=True)
    rows = {row.layer: row for row in context[BiasReport].rows}
    for linear in linears(corrected.graph):
        path = linear.meta["path"]
        weight, scale, zero = (get_tensor(corrected.module, str(a.target)) for a in LinearNode(linear).weight.args[:3])
        weight, scale, zero = (part.detach().double().numpy() for part in (weight, scale, zero))
        low, high = LinearNode(linear).weight.args[3:]
        rounded = (np.clip(np.rint(weight / scale) + zero, low, high) - zero) * scale
        error = rounded @ quantized[path] - weight @ exact[path]
        np.testing.assert_allclose(biases(corrected)[path], biases(clean)[path] - error, atol=5e-6)
        assert rows[path].error == pytest.approx(float(np.sqrt((error**2).mean())), rel=1e-3)
        assert rows[path].tokens == (12 if "pooler" in path or path == "classifier" else 72)


@pytest.mark.parametrize("weighting", ["unit-norm", "root-norm"])
def test_means_are_weighted_by_the_float_output_s_norm(bert, batches, run, weighting: str) -> None:
    """The weighted mean error of every output is zero afterwards, in float64."""
    data = batches(4)
    clean = run(bert()[1], Clean())
    simulated = run(clean, Quantize(Scheme.parse("W3A4")), Calibrate(), context=Context(data))
    corrected = run(simulated, CorrectBias(weighting=weighting), context=Context(data))
    wanted, found = (outputs(program, data) for program in (clean, corrected))
    for path, exact in wanted.items():
        norms = (exact**2).sum(1)
        weights = 1 / norms if weighting == "unit-norm" else 1 / np.sqrt(norms)
        error = weights @ (found[path] - exact) / weights.sum()
        np.testing.assert_allclose(error, 0, atol=2e-6 * max(1, np.abs(exact).max()), err_msg=path)


def test_only_biases_change_and_it_lowers(bert, batches, run) -> None:
    data = batches()
    simulated = run(bert()[1], Clean(), Quantize(Scheme.parse("W4A8")), Calibrate(), context=Context(data))
    corrected = run(simulated, CorrectBias(weighting="none"), context=Context(data))
    before, after = dict(simulated.tensors()), dict(corrected.tensors())
    assert before.keys() == after.keys()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {f"model/{n.args[2].target}" for n in linears(corrected.graph)}
    with torch.no_grad():
        integer = run(corrected, LowerInteger())
        assert torch.equal(integer(**data[0])["logits"], corrected(**data[0])["logits"])


def test_layers_that_stay_float_keep_their_bias(bert, batches, run) -> None:
    data = batches()
    scheme = Quantize(Scheme.parse("W4A16"), targets=("bert.encoder.layer.0",))
    simulated = run(bert()[1], Clean(), scheme, Calibrate(), context=Context(data))
    context = Context(data)
    corrected = run(simulated, CorrectBias(weighting="none"), context=context)
    assert {row.layer.startswith("bert.encoder.layer.0") for row in context[BiasReport].rows} == {True}
    name = "model/bert.encoder.layer.1.output.dense.bias"
    assert torch.equal(dict(simulated.tensors())[name], dict(corrected.tensors())[name])


def test_linears_without_a_bias_get_one_if_asked_for(run) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    program = load(AutoModelForCausalLM.from_config(config).eval())
    ids = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(12).expand(2, -1)}]
    clean = run(program, Clean())
    simulated = run(clean, Quantize(Scheme.parse("W2A16")), Rtn())
    context = Context(data)
    plain = run(simulated, CorrectBias(weighting="none"), context=context)
    assert all(row.skipped == "it has no bias" for row in context[BiasReport].rows)
    assert dict(plain.tensors()).keys() == dict(simulated.tensors()).keys()
    added = run(simulated, CorrectBias(weighting="none", add=True), context=context)
    assert not any(row.skipped for row in context[BiasReport].rows)
    wanted, found = means(clean, data), means(added, data)
    for path in (row.layer for row in context[BiasReport].rows):
        np.testing.assert_allclose(found[path], wanted[path], atol=1e-5, err_msg=path)


def test_a_bias_that_two_layers_share_stays(bert, batches, run) -> None:
    data = batches()
    simulated = run(bert()[1], Clean(), Quantize(Scheme.parse("W4A16")), Calibrate(), context=Context(data))
    first, second = linears(simulated.graph)[:2]
    second.replace_input_with(operand(second, "bias"), operand(first, "bias"))
    simulated.recompile()
    context = Context(data)
    run(simulated, CorrectBias(weighting="none"), context=context)
    skipped = [row.layer for row in context[BiasReport].rows if row.skipped]
    assert skipped == [first.meta["path"], second.meta["path"]]


def test_open_quantizers_and_missing_data_are_refused(bert, batches, run) -> None:
    placed = run(bert()[1], Clean(), Quantize(Scheme.parse("W4A8")))
    with pytest.raises(BitlowerError, match="has no range"):
        run(placed, CorrectBias(weighting="none"), context=Context(batches()))
    with pytest.raises(BitlowerError, match="correct-bias needs calibration data"):
        run(run(placed, Calibrate(), context=Context(batches())), CorrectBias(weighting="none"))


def test_a_layer_that_no_token_reaches_is_named(bert, batches, run) -> None:
    data = batches(1)
    simulated = run(bert()[1], Clean(), Quantize(Scheme.parse("W4A8")), Calibrate(), context=Context(data))
    nothing = [{**data[0], "attention_mask": torch.zeros_like(data[0]["attention_mask"])}]
    with pytest.raises(BitlowerError, match=r"layer\.0\.attention\.self\.query was never reached"):
        run(simulated, CorrectBias(weighting="none"), context=Context(nothing))

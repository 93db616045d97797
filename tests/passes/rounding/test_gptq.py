from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from bitlower.frontends import load
from bitlower.ir import BitlowerError, Program, Scheme, get_tensor, ops, set_tensor
from bitlower.ir.dataflow import linears
from bitlower.ir.observe import observe
from bitlower.ir.operators import LinearNode
from bitlower.ir.storage import is_mapped, spill
from bitlower.passes import Context
from bitlower.passes.canonical.clean import Clean
from bitlower.passes.lowering.lower_integer import LowerInteger
from bitlower.passes.quantizers.calibrate import Calibrate
from bitlower.passes.quantizers.quantize import Quantize
from bitlower.passes.rounding import gptq as module
from bitlower.passes.rounding.gptq import Gptq, GptqReport
from bitlower.passes.rounding.rtn import Rtn

W4 = Quantize(Scheme.parse("W4A16-g16-asym"), ignore=("lm_head",))


@pytest.fixture(scope="module")
def llama() -> tuple[torch.nn.Module, Program]:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    return model, load(model)


def tokens(count: int = 4, rows: int = 2, length: int = 24, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    positions = torch.arange(length).expand(rows, -1)
    return [
        {
            "input_ids": torch.randint(0, 96, (rows, length), generator=generator),
            "attention_mask": torch.ones(rows, length, dtype=torch.int64),
            "position_ids": positions,
        }
        for _ in range(count)
    ]


def weights_of(program: Program) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in program.tensors() if "proj" in name and name.endswith("weight")}


def published(weight: np.ndarray, hessian: np.ndarray, group: int, bits: int, damping: float) -> np.ndarray:
    """Frantar et al. 2022, algorithm 1, column by column in float64, with a fresh grid at the begin of each group."""
    weight, columns = weight.copy(), weight.shape[1]
    hessian = hessian + damping * hessian.diagonal().mean() * np.eye(columns)
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    result = np.zeros_like(weight)
    for j in range(columns):
        if j % group == 0:
            part = weight[:, j : j + group]
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scale = ((high - low) / (2**bits - 1)).astype(np.float32).astype(np.float64)
            zero = np.round(-low / scale)
        code = np.clip(np.round(weight[:, j] / scale) + zero, 0, 2**bits - 1)
        result[:, j] = scale * (code - zero)
        error = (weight[:, j] - result[:, j]) / upper[j, j]
        weight[:, j:] -= error[:, None] * upper[j, j:][None]
    return result


def test_the_first_layer_is_what_the_paper_s_algorithm_gives(llama, run) -> None:
    """Inputs from transformers, the algorithm in float64; float32 may flip a tie, so nearly all weights are equal."""
    model, program = llama
    batches, inputs = tokens(), []
    hook = model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda module, args: inputs.append(args[0].detach().double().reshape(-1, 32).numpy())
    )
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    x = np.concatenate(inputs)
    plain = Gptq(weighting="none", damping=0.01, order="none", ranges="minmax", guard=False, precision="float32")
    result = run(
        program, Clean(), W4, plain, context=Context(batches)
    )  # fmt: skip
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = getattr(model.model.layers[0].self_attn, name).weight.detach().double().numpy()
        expected = published(weight, x.T @ x / len(x), 16, 4, 0.01)
        found = get_tensor(result.module, f"model.layers.0.self_attn.{name}.weight").detach().double().numpy()
        equal = np.isclose(found, expected, rtol=1e-5, atol=1e-7)
        assert equal.mean() > 0.97, name
        assert ((found - weight) @ x.T).std() < 1.02 * ((expected - weight) @ x.T).std()


def test_weights_lie_on_their_grids_and_lowering_keeps_the_numbers(llama, run) -> None:
    _, program = llama
    batches = tokens()
    simulated = run(program, Clean(), W4, Gptq(), context=Context(batches))
    for node in simulated.graph.find_nodes(op="call_function", target=ops.fake_quantize):
        source, scale, zero = (get_tensor(simulated.module, str(a.target)) for a in node.args[:3])
        assert torch.equal(ops.fake_quantize(source, scale, zero, *node.args[3:]), source)
    integer = run(simulated, LowerInteger())
    with torch.no_grad():
        expected, found = simulated(**batches[0]), integer(**batches[0])
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_later_layers_see_rewritten_predecessors(llama, run, monkeypatch) -> None:
    """What enters the Hessian of the last layer is what the finished program computes there."""
    _, program = llama
    batches, seen = tokens(), {}
    original = module.Hessian.add

    def add(self, x, weights=None):
        seen.setdefault(self.name, []).append(x.clone())
        original(self, x, weights)

    monkeypatch.setattr(module.Hessian, "add", add)
    result = run(program, Clean(), W4, Gptq(precision="float32"), context=Context(batches))
    last = next(n for n in linears(result.graph) if n.meta["path"] == "model.layers.1.mlp.down_proj")
    expected: list[torch.Tensor] = []
    observe(result, [LinearNode(last).x], batches, lambda node, value, batch: expected.append(value.clone()))
    found = torch.cat(seen["model.layers.1.mlp.down_proj.weight"])
    assert torch.equal(found, torch.cat([value.reshape(-1, 48) for value in expected]))
    assert len(seen) == 8  # two blocks: q/k/v, o, gate/up, down share one Hessian each


def inputs_of(program: Program, linear, batches) -> np.ndarray:
    """What ``linear`` reads, ``[tokens, columns]`` float64."""
    parts: list[np.ndarray] = []
    observe(program, [LinearNode(linear).x], batches, lambda _, value, batch: parts.append(value.numpy()))
    return np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts]).astype(np.float64)


@pytest.mark.parametrize("inputs", ["quantized", "float"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_hessians_are_of_the_inputs_that_were_asked_for(llama, run, monkeypatch, inputs: str, calibrated: bool) -> None:
    """Of every group, in float64: inputs of the finished program, or of the model before anything was quantized."""
    _, program = llama
    batches, seen = tokens(), {}
    original = module.Hessian.matrix

    def matrix(self):
        seen[self.name] = original(self).clone()
        return original(self)

    monkeypatch.setattr(module.Hessian, "matrix", matrix)
    clean = run(program, Clean())
    placed = clean
    if calibrated:
        placed = run(clean, Quantize(Scheme.parse("W16A4")), Calibrate(), context=Context(batches))
    pass_ = Gptq(inputs=inputs, weighting="none", precision="float32")
    result = run(placed, W4, pass_, context=Context(batches))
    source = clean if inputs == "float" else result
    assert len(seen) == 8
    for linear in linears(source.graph):
        name = f"{linear.meta['path']}.weight"
        if name in seen:
            x = inputs_of(source, linear, batches)
            np.testing.assert_allclose(seen[name], x.T @ x / len(x), rtol=1e-3, atol=1e-5)


def test_it_does_better_than_round_to_nearest(llama, run) -> None:
    _, program = llama
    batches = tokens(8)
    clean = run(program, Clean())
    with torch.no_grad():
        expected = clean(**batches[0])["logits"]
        errors = {
            name: float((run(clean, W4, pass_, context=Context(batches))(**batches[0])["logits"] - expected).norm())
            for name, pass_ in {"rtn": Rtn(), "gptq": Gptq()}.items()
        }
    assert errors["gptq"] < 0.9 * errors["rtn"]


def test_the_report_names_every_weight_and_its_error(llama, run) -> None:
    _, program = llama
    context = Context(tokens())
    result = run(program, Clean(), W4, Gptq(), context=context)
    rows = context[GptqReport].rows
    assert {f"model/{row.weight}" for row in rows} == set(weights_of(result))
    for row in rows:
        assert row.tokens == 4 * 2 * 24
        assert row.rtn_loss is not None
        assert 0 < row.loss <= row.rtn_loss


def test_tokens_are_weighted_by_the_loss_s_gradient(llama, run, monkeypatch) -> None:
    """What enters the Hessian of gate and up is the square root of both gradients' squared norms, summed."""
    _, program = llama
    batches, seen = tokens(2), {}
    original = module.Hessian.add

    def add(self, x, weights=None):
        seen.setdefault(self.name, []).append(weights)
        original(self, x, weights)

    monkeypatch.setattr(module.Hessian, "add", add)
    placed = run(program, Clean(), W4)
    run(placed, Gptq(gradient=0.5), context=Context(batches))
    nodes = [n for n in linears(placed.graph) if n.meta["path"].endswith(("0.mlp.gate_proj", "0.mlp.up_proj"))]
    gradients = module.token_gradients(placed, nodes, Context(batches))
    expected = torch.cat([sum(gradients[node][index] for node in nodes).sqrt().reshape(-1) for index in range(2)])
    torch.testing.assert_close(torch.cat(seen["model.layers.0.mlp.gate_proj.weight"]), expected)
    assert float(expected.std()) > 0


@pytest.mark.parametrize("zero", [(), (5, 17, 60)])
def test_tokens_are_weighted_by_their_outputs(llama, run, zero: tuple[int, ...]) -> None:
    """Query, key and value share the Hessian Σ x xᵀ / ‖[Wq; Wk; Wv] x‖², whose solution float64 gives again.

    Tokens whose embedding is zero, and so x and all outputs, add nothing to it.
    """
    model, program = llama
    batches, layer, program = tokens(), model.model.layers[0], program.clone()
    [table] = [node.args[0] for node in program.graph.nodes if node.target is torch.ops.aten.embedding.default]
    embedding = get_tensor(program.module, str(table.target)).detach().clone()
    embedding[list(zero)] = 0
    set_tensor(program.module, str(table.target), torch.nn.Parameter(embedding))
    with torch.no_grad():
        ids = torch.cat([batch["input_ids"] for batch in batches])
        x = layer.input_layernorm(embedding[ids]).reshape(-1, 32).double().numpy()
    x = x[np.abs(x).max(1) > 0]
    assert (len(x) < ids.numel()) is bool(zero)
    names = ("q_proj", "k_proj", "v_proj")
    weights = {name: getattr(layer.self_attn, name).weight.detach().double().numpy() for name in names}
    scaled = x / np.linalg.norm(x @ np.concatenate(list(weights.values())).T, axis=1, keepdims=True)
    plain = Gptq(weighting="unit-output", order="none", ranges="minmax", guard=False, precision="float32")
    result = run(program, Clean(), W4, plain, context=Context(batches))
    for name, weight in weights.items():
        found = get_tensor(result.module, f"model.layers.0.self_attn.{name}.weight").detach().double().numpy()
        expected = published(weight, scaled.T @ scaled / len(x), 16, 4, plain.damping)
        unscaled = published(weight, x.T @ x / len(x), 16, 4, plain.damping)
        equal = np.isclose(found, expected, rtol=1e-5, atol=1e-7).mean()
        assert equal > 0.97, name
        assert equal > np.isclose(found, unscaled, rtol=1e-5, atol=1e-7).mean(), name


def test_padding_counts_for_nothing(llama, run) -> None:
    _, program = llama
    plain = tokens(2)
    padded = [
        {
            "input_ids": torch.cat([batch["input_ids"], torch.full((2, 5), 7)], 1),
            "attention_mask": torch.cat([batch["attention_mask"], torch.zeros(2, 5, dtype=torch.int64)], 1),
            "position_ids": torch.cat([batch["position_ids"], torch.zeros(2, 5, dtype=torch.int64)], 1),
        }
        for batch in plain
    ]
    first = weights_of(run(program, Clean(), W4, Gptq(), context=Context(plain)))
    second = weights_of(run(program, Clean(), W4, Gptq(), context=Context(padded)))
    for name, weight in first.items():
        assert float(torch.isclose(weight, second[name], atol=1e-6).float().mean()) > 0.98, name


def test_a_killed_run_goes_on_and_gives_the_same(llama, run, tmp_path: Path, monkeypatch) -> None:
    _, program = llama
    expected = weights_of(run(program, Clean(), W4, Gptq(), context=Context(tokens())))
    solved: list[str] = []
    original = module.solve

    def solve(*args, name, **kwargs):
        if len(solved) == 5:
            raise KeyboardInterrupt
        solved.append(name)
        return original(*args, name=name, **kwargs)

    monkeypatch.setattr(module, "solve", solve)
    with pytest.raises(KeyboardInterrupt):
        run(program, Clean(), W4, Gptq(), context=Context(tokens(), work=tmp_path))
    first, solved[:] = list(solved), []
    found = weights_of(run(program, Clean(), W4, Gptq(), context=Context(tokens(), work=tmp_path)))
    assert len(first) == 5
    assert len(solved) == 3
    assert not set(first) & set(solved)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_weights_in_files_stay_in_files(llama, run) -> None:
    _, program = llama
    mapped = run(program, Clean(), W4)
    for name, tensor in list(weights_of(mapped).items()):
        set_tensor(mapped.module, name.removeprefix("model/"), torch.nn.Parameter(spill(tensor)))
    found = weights_of(run(mapped, Gptq(), context=Context(tokens())))
    expected = weights_of(run(program, Clean(), W4, Gptq(), context=Context(tokens())))
    assert all(is_mapped(tensor) for tensor in found.values())
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_groups_that_do_not_divide_the_columns_end_in_a_shorter_one(llama, run) -> None:
    """48 columns in groups of 32: the last has 16 and a scale of its own; other layers have one whole group."""
    _, program = llama
    placed = run(program, Clean(), Quantize(Scheme.parse("W4A16-g32")))
    for pass_ in (Gptq(), Gptq(order="full"), Rtn(), Rtn(ranges="mse")):
        result = run(placed, pass_, LowerInteger(), context=Context(tokens()))
        for node, quantizer in result.quantizers():
            scale = get_tensor(result.module, str(node.args[1].target))
            if "down_proj" not in quantizer.tensor:
                assert scale.shape[1] == 1
                continue
            assert scale.shape == (32, 3)
            assert torch.equal(scale[:, 0], scale[:, 1])
            assert not torch.equal(scale[:, 1], scale[:, 2])


def test_activations_are_left_to_calibrate(llama, run) -> None:
    _, program = llama
    placed = run(program, Clean(), Quantize(Scheme.parse("W4A8-g16"), ignore=("lm_head",)))
    context = Context(tokens())
    result = run(placed, Gptq(), Calibrate(), LowerInteger(), context=context)
    assert {quantizer.role for _, quantizer in result.quantizers()} > {"linear-weight", "linear-input"}


def test_conv1d_weights_are_rewritten_by_output_channel(run) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=96, n_positions=64, bos_token_id=1, eos_token_id=2)
    program = load(AutoModelForCausalLM.from_config(config))
    context = Context(tokens())
    result = run(program, Clean(), replace(W4, scheme=Scheme.parse("W4A16")), Gptq(), context=context)
    shapes = {q.tensor: tuple(get_tensor(result.module, str(n.args[1].target)).shape) for n, q in result.quantizers()}
    assert shapes["transformer.h.0.attn.c_attn.weight"] == (96, 1)
    assert len(context[GptqReport].rows) == 4


def test_no_data_is_refused(llama, run) -> None:
    with pytest.raises(BitlowerError, match="needs calibration data"):
        run(llama[1], Clean(), W4, Gptq())


def test_a_layer_that_no_token_reaches_is_named(llama, run) -> None:
    _, program = llama
    batches = tokens(1)
    batches[0]["attention_mask"] = torch.zeros_like(batches[0]["attention_mask"])
    with pytest.raises(BitlowerError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight was never reached"):
        run(program, Clean(), W4, Gptq(), context=Context(batches))


def test_values_that_are_not_finite_are_named(llama, run) -> None:
    _, program = llama
    broken = run(program, Clean(), W4)
    name = "model.layers.1.mlp.up_proj.weight"
    weight = get_tensor(broken.module, name).detach().clone()
    weight[3, 4] = torch.nan
    set_tensor(broken.module, name, torch.nn.Parameter(weight))
    with pytest.raises(BitlowerError, match=r"model\.layers\.1\.mlp\.gate_proj\.weight.*NaN"):
        run(broken, Gptq(), context=Context(tokens()))


def test_few_tokens_end_in_a_result_that_says_so(llama, run) -> None:
    context = Context(tokens(1, rows=1, length=6))
    result = run(llama[1], Clean(), W4, Gptq(), context=context)
    assert all(bool(torch.isfinite(weight).all()) for weight in weights_of(result).values())
    assert any(
        "6 calibration tokens are few for 32 columns" in note for r in context[GptqReport].rows for note in r.notes
    )

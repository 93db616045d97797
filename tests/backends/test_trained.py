"""What was trained is what runs: the module, the simulated and the integer Program, and each artifact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from bitlower.backends import checkpoint, onnx_qdq, tvm_kernels
from bitlower.ir import Batch, Program, get_tensor
from bitlower.ir.quantization.numerics import values
from bitlower.passes import Context, PassManager, make_pass, parse_pipeline
from bitlower.passes.training._report import TrainReport

Lowered = Callable[..., Program]
RATES = {"weights": 3e-3, "embeddings": 3e-3, "norms": 3e-3, "biases": 3e-3, "scales": 1e-2, "zero-points": 0.5}


def trained(program: Program, scheme: str, batches: list[Batch], **options: object) -> Program:
    """``program`` after a few steps whose last state counts, so that weights, scales and zero points have moved."""
    context = Context(batches)
    placed = PassManager(parse_pipeline(f"quantize{{scheme={scheme}}},calibrate")).run(program, context)
    form = {"steps": 6, "evaluate-every": 6, "keep": "last", "freeze-ranges": 1.0, "learning-rate": RATES, **options}
    result = PassManager([make_pass("qat", form)]).run(placed, context)
    rows = context[TrainReport].quantizers
    assert all(row.drift > 0 for row in rows), "every range has moved"
    assert any(row.changed for row in rows if row.changed is not None)
    return result


def lower(program: Program, batches: list[Batch], passes: str = "lower-integer") -> Program:
    return PassManager(parse_pipeline(passes)).run(program, Context(batches))


@pytest.mark.parametrize("scheme", ["W4A8-full", "W8A8-peg4-full", "W4A8-asym-g16-e4", "W2A8-token-e2"])
def test_onnxruntime_computes_what_was_trained(lowered: Lowered, prompts: list[Batch], tmp_path: Path, scheme: str):
    """The export compares codes with the Program by itself; outputs are compared here, with the simulated one."""
    simulated = trained(lowered("gpt2"), scheme, prompts)
    onnx_qdq.export(lower(simulated, prompts), tmp_path, batches=prompts)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    wanted = [value.name for value in session.get_inputs()]
    for batch in prompts:
        full = simulated.complete(batch)
        found = session.run(["logits"], {name: full[name].numpy() for name in wanted})[0]
        expected = simulated(**batch)["logits"].detach().numpy()
        mask = batch["attention_mask"].bool().numpy()
        error = np.linalg.norm(found[mask] - expected[mask]) / np.linalg.norm(expected[mask])
        assert error < 0.05, (
            "a code of an activation that ties may differ; a scale that was estimated anew would be far off"
        )


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq-v2"])
def test_a_checkpoint_holds_the_scales_that_were_learned(lowered: Lowered, prompts, tmp_path: Path, form: str):
    from safetensors.torch import load_file

    simulated = trained(lowered("llama"), "W4A16-g32-e16", prompts, products="float32")
    report = checkpoint.export(lower(simulated, prompts), tmp_path, batches=prompts, format=form, dtype="float32")
    assert report.verification.client in ("transformers", "not run: gptqmodel is not installed")
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    [node] = [n for n, q in simulated.quantizers() if q.tensor == f"{name}.weight"]
    scale = get_tensor(simulated.module, str(node.args[1].target)).detach()  # type: ignore[union-attr]
    key, turned = (f"{name}.weight_scale", scale) if form == "compressed-tensors" else (f"{name}.scales", scale.T)
    torch.testing.assert_close(stored[key].float(), turned, rtol=1e-3, atol=0)


def test_a_library_computes_what_was_trained(lowered: Lowered, prompts: list[Batch], tmp_path: Path):
    simulated = trained(lowered("llama-tied"), "W4A16-g16-e8", prompts)
    fused = lower(simulated, prompts, "lower-integer,fuse")
    report = tvm_kernels.export(fused, tmp_path, batches=prompts).to_dict()
    assert report["verification"]["summary"]["output_relative_error"] < 1e-4
    for batch in prompts:
        expected, found = simulated(**batch)["logits"], fused(**batch)["logits"]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_integer_program_dequantizes_to_the_trained_weights(lowered: Lowered, prompts: list[Batch]):
    """Bit for bit: what `lower-integer` stores stands for what the fake quantizers made in the last forward pass."""
    simulated = trained(lowered("gpt2"), "W4A8-asym-g16-e4", prompts)
    module = simulated.trainable_module()
    rounded = {
        module.weights[name]: quantizer(module.weight_of(name))
        for name, quantizer in module.quantizers().items()
        if name in module.weights
    }
    integer, seen = lower(simulated, prompts), set()
    for node, quantizer in integer.quantizers():
        if quantizer.tensor in rounded and node.target is torch.ops.bitlower.dequantize.default:
            parts = [get_tensor(integer.module, str(n.target)) for n in node.args[:3]]  # type: ignore[union-attr]
            assert torch.equal(values(*parts), rounded[quantizer.tensor].detach()), quantizer.tensor
            seen.add(quantizer.tensor)
    assert seen == set(rounded)

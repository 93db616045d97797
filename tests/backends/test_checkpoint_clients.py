"""transformers with compressed-tensors loads what is exported, and computes what the Program does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from bitlower.backends.checkpoint import Checkpoint, export, verify
from bitlower.backends.checkpoint.formats.compressed_tensors import CompressedTensors
from bitlower.frontends import load
from bitlower.frontends.tokenize import random_windows
from bitlower.ir import BitlowerError, CheckError, Program, get_tensor, ops, set_tensor
from bitlower.ir.observe import run
from bitlower.ir.quiet import quiet
from bitlower.passes import Context, PassManager, parse_pipeline

pytest.importorskip("compressed_tensors")
pytest.importorskip("accelerate")

Lowered = Callable[..., Program]


def load_client(folder: Path, **arguments: Any) -> torch.nn.Module:
    """The model as its users load it, all of whose weights are in the files and all of the files' are in it."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **arguments)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def logits_of(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits.float()


def rounded(program: Program, dtype: torch.dtype) -> Program:
    """The Program with its scales and float weights rounded as they are in the files."""
    copy = program.clone()
    scales = {str(node.args[1].target) for node, _ in copy.quantizers() if node.target is ops.dequantize}
    for name, tensor in program.tensors():
        target = name.removeprefix("model/")
        if target in scales or isinstance(tensor, torch.nn.Parameter):
            set_tensor(copy.module, target, get_tensor(program.module, target).detach().to(dtype).float())
    return copy


CASES = [("llama", "W4A16-g32", ""), ("llama", "W2A16-g16", ""), ("llama-tied", "W3A16", ""),
    ("llama", "W8A16-g32-e4", "model.embed_tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "scheme", "ignore"), CASES)
def test_logits_are_the_programs(lowered: Lowered, prompts, tmp_path: Path, kind: str, scheme: str, ignore: str):
    program = lowered(kind, scheme, ignore)
    export(program, tmp_path, batches=prompts)
    model = load_client(tmp_path, dtype=torch.float32)
    expected = rounded(program, torch.float16)
    for batch in prompts:
        ours = expected(**batch)["logits"].detach()
        torch.testing.assert_close(logits_of(model, batch), ours, rtol=0, atol=1e-5 * float(ours.std()))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is (kind == "llama-tied")


@pytest.mark.parametrize(("kind", "scheme"), [("llama", "W4A16-g32-asym"), ("llama-tied", "W3A16-asym")])
def test_zero_points_are_loaded(lowered: Lowered, prompts, tmp_path: Path, kind: str, scheme: str):
    program = lowered(kind, scheme)
    export(program, tmp_path, batches=prompts, dtype="float32")
    model = load_client(tmp_path)
    for batch in prompts:
        ours = program(**batch)["logits"].detach()
        torch.testing.assert_close(logits_of(model, batch), ours, rtol=0, atol=1e-5 * float(ours.std()))


def test_weights_can_be_dequantized_while_they_load(lowered: Lowered, prompts, tmp_path: Path):
    from transformers import CompressedTensorsConfig

    program = lowered("llama-tied", "W4A16-g32")
    export(program, tmp_path, batches=prompts)
    config = CompressedTensorsConfig(dequantize=True)
    model = load_client(tmp_path, dtype=torch.float32, quantization_config=config)
    ours = program(**prompts[0])["logits"].detach()
    assert float((logits_of(model, prompts[0]) - ours).abs().max()) < 0.02 * float(ours.std())


def test_half_precision_is_as_near_as_it_can_be(lowered: Lowered, prompts, tmp_path: Path):
    program = lowered("llama", "W4A16-g32")
    export(program, tmp_path, batches=prompts)
    model = load_client(tmp_path)
    assert model.dtype == torch.float16
    ours = program(**prompts[0])["logits"].detach()
    assert float((logits_of(model, prompts[0]) - ours).abs().max()) < 0.02 * float(ours.std())


def test_a_quantized_head_of_a_tied_model_is_untied(lowered: Lowered, prompts, tmp_path: Path):
    program = lowered("llama-tied", "W4A16-g32-e8", "model.embed_tokens")
    export(program, tmp_path, batches=prompts, dtype="float32")
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    model = load_client(tmp_path)
    ours = program(**prompts[0])["logits"].detach()
    torch.testing.assert_close(logits_of(model, prompts[0]), ours, rtol=0, atol=1e-5 * float(ours.std()))


def test_shards_are_found(lowered: Lowered, prompts, tmp_path: Path):
    program = lowered("llama", "W4A16-g32")
    report = export(program, tmp_path, batches=prompts, dtype="float32", max_shard_size=30_000)
    shards = sorted(path for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.packed_bytes + report.float_bytes
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    ours = program(**prompts[0])["logits"].detach()
    logits = logits_of(load_client(tmp_path), prompts[0])
    torch.testing.assert_close(logits, ours, rtol=0, atol=1e-5 * float(ours.std()))
    assert verify(tmp_path).layers == 14


@pytest.fixture(scope="module")
def float_falcon() -> Program:
    """Its linear layers are of a class of its own, which multiplies with the weight itself."""
    from transformers import FalconConfig, FalconForCausalLM

    torch.manual_seed(0)
    config = FalconConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=96, multi_query=False, alibi=False,
        new_decoder_architecture=False, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = FalconForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return PassManager(parse_pipeline("clean")).run(load(model, task="text-generation"), Context())


@pytest.fixture(scope="module")
def falcon(float_falcon: Program) -> Program:
    """In 4 bits."""
    return PassManager(parse_pipeline("quantize{scheme=W4A16-g32},rtn,lower-integer")).run(float_falcon, Context())


def test_a_linear_layer_of_a_class_of_its_own_is_unfolded_as_it_loads(falcon: Program, prompts, tmp_path: Path):
    report = export(falcon, tmp_path, batches=prompts, dtype="float32")
    assert report.packed == 4
    assert report.verification.client == "transformers"
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["dequantize"] is True
    ours = falcon(**prompts[1])["logits"].detach()
    logits = logits_of(load_client(tmp_path), prompts[1])
    torch.testing.assert_close(logits, ours, rtol=0, atol=1e-5 * float(ours.std()))


def test_a_checkpoint_that_its_client_cannot_run_is_no_artifact(
    falcon: Program, prompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = CompressedTensors.config

    def packed(self: CompressedTensors, *arguments: Any) -> dict[str, Any]:
        return config(self, *arguments) | {"dequantize": False}

    monkeypatch.setattr(CompressedTensors, "config", packed)
    with pytest.raises(
        CheckError, match=r"transformers cannot (load|run) this checkpoint: AttributeError: .* 'weight'"
    ):
        export(falcon, tmp_path, batches=prompts)
    assert not (tmp_path / "verification.json").exists()


def test_a_client_that_gives_something_else_is_noticed(
    lowered: Lowered, prompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from transformers import AutoModelForCausalLM

    load_it = AutoModelForCausalLM.from_pretrained

    def other(*arguments: Any, **options: Any) -> Any:
        model, info = load_it(*arguments, **options)
        with torch.no_grad():
            model.model.norm.weight[0] += 1
        return model, info

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", other)
    with pytest.raises(CheckError, match=r"gives a logits that is .* standard deviations off the program's"):
        export(lowered("llama", "W4A16-g32"), tmp_path, batches=prompts)


def test_a_client_that_is_not_installed_is_said(lowered: Lowered, prompts, tmp_path: Path):
    report = export(lowered("llama", "W4A16-g32"), tmp_path, batches=prompts, format="gptq-v2")
    assert report.verification.client == "not run: gptqmodel is not installed"
    assert report.verification.summary()["client"] == report.verification.client


def test_layers_of_an_own_class_are_quantized_alike_or_refused(float_falcon: Program, prompts, tmp_path: Path):
    passes = "quantize{scheme=W8A16 targets=[*dense]},quantize{scheme=W4A16-g32},rtn,lower-integer"
    program = PassManager(parse_pipeline(passes)).run(float_falcon, Context())
    with pytest.raises(BitlowerError, match=r"are quantized in different ways, and .* is a FalconLinear: transformers"):
        export(program, tmp_path, batches=prompts)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module", params=["mixtral", "qwen3-moe"])
def experts(request: pytest.FixtureRequest) -> Program:
    """A mixture of experts in 4 bits; one family's files call the layers w1, w2, w3, the other's gate, up and down."""
    from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 96, "num_experts_per_tok": 2,
    }  # fmt: skip
    config = (
        MixtralConfig(**sizes, num_local_experts=3)
        if request.param == "mixtral"
        else Qwen3MoeConfig(**sizes, num_experts=3, moe_intermediate_size=32, head_dim=16)
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.2)
    passes = parse_pipeline("clean,quantize{scheme=W4A16-g32},rtn,lower-integer")
    return PassManager(passes).run(load(model, task="text-generation"), Context())


def test_experts_are_loaded_one_by_one(experts: Program, prompts, tmp_path: Path):
    report = export(experts, tmp_path, batches=prompts, dtype="float32")
    assert report.packed == 4 + 3 * 3  # attention, and three layers of each of three experts
    assert report.verification.client == "transformers"
    ours = experts(**prompts[1])["logits"].detach()
    logits = logits_of(load_client(tmp_path), prompts[1])
    torch.testing.assert_close(logits, ours, rtol=0, atol=1e-5 * float(ours.std()))
    assert verify(tmp_path).layers == report.packed
    with pytest.raises(BitlowerError, match=r"gptq-v2 cannot hold .*experts"):
        export(experts, tmp_path, batches=prompts, format="gptq-v2")


def test_layers_that_a_module_initializes_are_unfolded_as_they_are_loaded(
    tmp_path: Path, caption_models: Callable[[str], Path]
) -> None:
    """transformers calls what initializes such a module while it loads: packed, its layers would have no weight."""
    program = load(caption_models("Siglip"))
    data = random_windows(program, count=2, length=8, seed=0)
    pipeline = "clean,quantize{scheme=W4A16},rtn,lower-integer"
    program = PassManager(parse_pipeline(pipeline)).run(program, Context(data, data[:1]))
    report = Checkpoint(dtype="float32").export(program, tmp_path, data)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["dequantize"]
    assert report.packed > 8
    attention = "vision_model.head.attention"
    assert {name for name in report.float_tables if "attention" in name} == {
        f"{attention}.in_proj_weight", f"{attention}.out_proj.weight"
    }  # fmt: skip
    assert "is a MultiheadAttention" in report.float_tables[f"{attention}.in_proj_weight"]
    with quiet(), torch.no_grad():
        outputs = AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()(**data[0])
    for name, value in run(program, data[0]).items():
        assert torch.allclose(outputs[name], value, atol=1e-4 * float(value.abs().max())), name

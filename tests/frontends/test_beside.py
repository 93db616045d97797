"""What lies beside the weights: it goes along, nested folders too, and its tokens are the model's own."""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

from bitlower.backends import onnx_qdq
from bitlower.frontends import batches, load
from bitlower.frontends._beside import collect
from bitlower.frontends._tokenizer import leading_tokens
from bitlower.frontends.locate import locate
from bitlower.frontends.tokenize import check_tokenizer, windows
from bitlower.ir import BitlowerError, CheckError, Program
from bitlower.ir.assets import is_inside, is_tokenizer, left_behind, read_assets

Copy = Callable[..., Path]
TEXTS = ["the cat sings near the river", "a small dog", "never"]


def beside(folder: Path) -> tuple[dict[str, bytes], list[str]]:
    """What goes along with the encoder in ``folder``, and the notes; without tracing it."""
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
    return collect(folder, model, "feature-extraction", "the model")


def test_the_files_of_every_tokenizer_of_transformers_are_known() -> None:
    """Their names, read from the sources of transformers."""
    names = set()
    for path in (Path(transformers.__file__).parent / "models").glob("*/tokenization_*.py"):
        for found in re.findall(r"^VOCAB_FILES_NAMES = (\{.*?\})", path.read_text(encoding="utf-8"), re.S | re.M):
            names |= {name for name in ast.literal_eval(found).values() if "." in name}
    assert len(names) > 15
    assert {name for name in names if not is_tokenizer(name)} == set()


KEPT = [
    "tokenizer.model", "tokenizer.model.v3", "spm.model", "spm_char.model", "sentencepiece.model", "source.spm",
    "bpe.codes", "dict.txt", "tiktoken.model", "qwen.tiktoken", "tekken.json", "emoji.json", "vocab.bpe",
    "chat_template.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "README.md", "LICENSE",
    "LICENCE.txt", "license.md", "NOTICE", "USE_POLICY.md",
]  # fmt: skip
STAY = [
    "README.txt",
    "onnx/LICENSE",
    "onnx/README.md",
    ".gitattributes",
    "pytorch_model.bin",
    "onnx/model.onnx",
    "model.gguf",
]


def test_all_that_a_tokenizer_or_processor_reads_goes_along_and_the_rest_is_named(tmp_path: Path) -> None:
    for name in [*KEPT, *STAY, "config.json", "model.safetensors", "dictionary.bin2", "custom_generate/generate.py"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "vocab.txt").symlink_to(tmp_path / "nowhere")
    assets = read_assets(tmp_path)
    assert assets == {name: name.encode() for name in sorted(KEPT)}
    assert left_behind(tmp_path, assets) == ["custom_generate", "dictionary.bin2"]


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/x", "a/../b", "a//b", "./a", "a\\b", "a/", "a\0"])
def test_a_path_out_of_the_folder_is_not_inside(name: str) -> None:
    assert not is_inside(name)
    assert is_inside("1_Pooling/config.json")


def test_files_on_no_list_are_carried_if_the_tokenizer_names_them(copy: Copy, monkeypatch) -> None:
    from transformers import BertTokenizerFast

    folder = copy()
    (folder / "lexicon.bin2").write_bytes(b"words")
    monkeypatch.setattr(
        BertTokenizerFast, "vocab_files_names", {**BertTokenizerFast.vocab_files_names, "lexicon": "lexicon.bin2"}
    )
    assert beside(folder)[0]["lexicon.bin2"] == b"words"


def test_a_tokenizer_that_reads_what_stays_behind_is_an_error(copy: Copy, monkeypatch) -> None:
    folder = copy()
    monkeypatch.setattr("bitlower.ir.assets.TOKENIZERS", ("vocab.txt", "special_tokens_map.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "other"]))
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "do_lower_case": False}))
    with pytest.raises(CheckError, match="without the files that stay behind gives other tokens"):
        beside(folder)


def test_what_stays_behind_is_noted(copy: Copy) -> None:
    folder = copy()
    assert beside(folder)[1] == []
    (folder / "adapter_config.json").write_text("{}")
    assert load(folder).notes == ("beside the model and left behind: adapter_config.json",)


def test_a_tokenizer_that_cannot_be_loaded_goes_along_with_a_note(copy: Copy) -> None:
    folder = copy()
    (folder / "tokenizer.json").write_text("{")
    assets, (note,) = beside(folder)
    assert assets["tokenizer.json"] == b"{"
    assert "cannot be loaded" in note
    assert note.endswith("its files go along, its tokens were not checked")


def test_a_slow_tokenizer_of_two_files_gives_the_same_tokens(copy: Copy, tmp_path: Path) -> None:
    folder = copy()
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (folder / name).unlink(missing_ok=True)
    (folder / "vocab.txt").write_text("the 9\ncat 8\nsin@@ 7\ngs 6\n")
    (folder / "bpe.codes").write_text("t h 9\nth e</w> 8\nc a 7\nca t</w> 6\ns i 5\nsi n 4\ng s</w> 3\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PhobertTokenizer"}))
    program = load(folder)
    assert set(program.assets) == {"vocab.txt", "bpe.codes", "tokenizer_config.json"}
    expected = AutoTokenizer.from_pretrained(folder)(["the cat sings"])["input_ids"]
    (batch,) = batches(program, ["the cat sings"])
    assert batch["input_ids"].tolist() == expected
    assert batch["input_ids"].tolist() == [[0, 4, 5, 6, 7, 2]]


def sentence_model(folder: Path, transformer: str = "") -> np.ndarray:
    """Make ``folder`` a sentence-transformers model: mean pooling, a dense module, whose weight it gives, and norms."""
    kinds = [(transformer, "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"), ("3_Normalize", "Normalize")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "config_sentence_transformers.json").write_text("{}")
    (folder / transformer / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    for name, form in {"1_Pooling": {"pooling_mode_mean_tokens": True}, "2_Dense": {"out_features": 8}}.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(form))
    weight = np.random.default_rng(0).normal(size=(8, 32)).astype(np.float32)
    save_file({"linear.weight": weight}, folder / "2_Dense" / "model.safetensors")
    return weight


def embedding_of(folder: Path) -> np.ndarray:
    """The sentence embeddings of ``TEXTS`` as sentence-transformers computes them from an ONNX artifact's files."""
    import onnxruntime

    assert [m["path"] for m in json.loads((folder / "modules.json").read_text())] == [
        "", "1_Pooling", "2_Dense", "3_Normalize"
    ]  # fmt: skip
    assert json.loads((folder / "1_Pooling" / "config.json").read_text()) == {"pooling_mode_mean_tokens": True}
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    batch = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="np")
    given = {spec.name: batch[spec.name].astype(np.int64) for spec in session.get_inputs()}
    hidden, mask = session.run(None, given)[0], batch["attention_mask"][..., None]
    dense = load_file(folder / "2_Dense" / "model.safetensors")["linear.weight"]
    pooled = np.tanh((hidden * mask).sum(1) / mask.sum(1) @ dense.T)
    return np.asarray(pooled / np.linalg.norm(pooled, axis=1, keepdims=True))


def test_a_sentence_transformers_folder_stays_one(saved, tmp_path: Path) -> None:
    root = tmp_path / "model"
    shutil.copytree(saved["encoder"], root)
    dense = sentence_model(root)
    program = load(root)
    assert program.notes == ()
    out = tmp_path / "out"
    out.mkdir()
    onnx_qdq.export(program, out, batches=batches(program, TEXTS))
    files = json.loads((out / "manifest.json").read_text())["files"]
    assert {"1_Pooling/config.json", "2_Dense/model.safetensors", "sentence_bert_config.json"} <= set(files)
    with torch.no_grad():
        model = transformers.AutoModel.from_pretrained(saved["encoder"])
        batch = AutoTokenizer.from_pretrained(saved["encoder"])(TEXTS, padding=True, return_tensors="pt")
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        pooled = torch.tanh((hidden * mask).sum(1) / mask.sum(1) @ torch.from_numpy(dense).T)
    expected = torch.nn.functional.normalize(pooled, dim=1).numpy()
    np.testing.assert_allclose(embedding_of(out), expected, atol=1e-5)
    assert program.assets == {name: data for name, data in read_assets(out).items() if name != "README.md"}


def test_a_transformer_in_a_folder_of_its_own_comes_to_lie_beside_its_modules(saved, tmp_path: Path) -> None:
    flat, nested = tmp_path / "flat", tmp_path / "nested"
    shutil.copytree(saved["encoder"], flat)
    shutil.copytree(saved["encoder"], nested / "0_Transformer")
    sentence_model(flat)
    sentence_model(nested, "0_Transformer")
    assert locate(nested) == nested / "0_Transformer"
    found, expected = read_assets(locate(nested)), read_assets(flat)
    paths = [[m.pop("path") for m in json.loads(assets.pop("modules.json"))] for assets in (found, expected)]
    assert paths[0] == paths[1]
    assert found == expected


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([{"path": "../other", "type": "x.Pooling"}], "names a folder outside of the model's: '../other'"),
        ([{"path": "/etc", "type": "x.Pooling"}], "names a folder outside"),
        ([{"path": "1_Pooling", "type": "x.Pooling"}], "names the folder '1_Pooling', which is missing"),
        ([{"type": "x.Pooling"}], "a module has no path or no type"),
        ([1], "must hold a list of modules"),
        ({"a": 1}, "must hold a list of modules"),
    ],
)
def test_damaged_modules_are_an_error(copy: Copy, modules: Any, message: str) -> None:
    folder = copy()
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(BitlowerError, match=message):
        read_assets(folder)


def test_pickled_modules_go_along_unread_with_a_note(copy: Copy) -> None:
    folder = copy()
    sentence_model(folder)
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")
    assert beside(folder)[1] == ["pickled files go along unread: 2_Dense/pytorch_model.bin"]


def with_token(folder: Path, number: int, *, special: bool) -> None:
    """Add the token ``<new>`` with ``number`` to the tokenizer in ``folder``, and all that lack before it."""
    form = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = form["model"]["vocab"]
    vocabulary |= {f"[unused{i}]": i for i in range(len(vocabulary), number)}
    if special:
        settings = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        form["added_tokens"].append({"id": number, "content": "<new>", **settings})
    else:
        vocabulary["<new>"] = number
    (folder / "tokenizer.json").write_text(json.dumps(form))


def test_a_tokenizer_of_another_model_is_found_when_the_model_is_loaded(copy: Copy) -> None:
    folder = copy()
    with_token(folder, 60, special=False)
    with pytest.raises(BitlowerError, match=r"gives tokens up to 60 \('<new>'\), the embedding has 60 rows \(0 to 59"):
        beside(folder)


@pytest.mark.parametrize("method", ["compressed-tensors", "gptq", "awq", "bitsandbytes", "fp8", "bitlower"])
def test_a_model_that_is_quantized_already_is_named_as_such(copy: Copy, method: str) -> None:
    folder = copy(quantization_config={"quant_method": method})
    with pytest.raises(BitlowerError, match=rf"is quantized already \({method}\); give the float model"):
        load(folder)


def test_the_last_row_of_the_embedding_is_a_token_too(copy: Copy) -> None:
    folder = copy()
    with_token(folder, 59, special=False)
    assert beside(folder)[1] == []


def test_a_padding_token_beyond_the_embedding_is_an_error(copy: Copy) -> None:
    folder = copy()
    with_token(folder, 60, special=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "<new>"}))
    with pytest.raises(BitlowerError, match=r"the padding token '<new>' of .* has the number 60, the embedding has 60"):
        beside(folder)


def test_the_padding_token_of_the_configuration_is_checked_before_the_weights(copy: Copy) -> None:
    folder = copy(pad_token_id=60)
    (folder / "model.safetensors").unlink()
    with pytest.raises(BitlowerError, match=r"names the padding token 60, and has tokens from 0 to 59 \(vocab_size\)"):
        load(folder)


def test_other_special_tokens_beyond_the_embedding_are_noted_and_refused_in_texts(copy: Copy) -> None:
    folder = copy()
    with_token(folder, 60, special=True)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 64], "bos_token_id": None}))
    program = load(folder)
    assert program.notes == (
        "special tokens beyond the 60 rows of the embedding, which no input may hold: '<new>' (60)",
        "generation_config.json names tokens beyond the 60 rows of the embedding: eos_token_id 64",
    )
    with pytest.raises(BitlowerError, match=r"the texts hold the token '<new>' \(60\), .* has 60 tokens \(0 to 59\)"):
        batches(program, ["the <new> cat"])
    with pytest.raises(BitlowerError, match=r"the texts hold the token '<new>' \(60\)"):
        windows(program, torch.tensor([[5, 60, 6]]))
    assert batches(program, ["the cat"])


def test_an_artifact_whose_tokenizer_gives_other_tokens_is_found(saved, tmp_path: Path) -> None:
    program: Program = load(saved["encoder"])
    (tmp_path / "config.json").write_text(json.dumps(program.config))
    for name, data in program.assets.items():
        (tmp_path / name).write_bytes(data)
    check_tokenizer(program, tmp_path)
    form = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = form["model"]["vocab"]
    vocabulary["quick"], vocabulary["over"] = vocabulary["the"], vocabulary["quick"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(form))
    with pytest.raises(CheckError, match='the tokenizer of the artifact gives other tokens for "The quick'):
        check_tokenizer(program, tmp_path)


def test_leading_tokens_are_those_in_front_of_a_text(saved) -> None:
    assert leading_tokens(AutoTokenizer.from_pretrained(saved["encoder"])) == [2]

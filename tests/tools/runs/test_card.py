"""Model cards of artifacts: what the hub reads of them, what they say, and that their code runs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

import bitlower
from bitlower.backends.artifact.manifest import read_manifest
from bitlower.backends.checkpoint import Checkpoint
from bitlower.backends.onnx_qdq import OnnxQdq
from bitlower.frontends import batches
from bitlower.frontends.tokenize import random_windows
from bitlower.ir import Program
from bitlower.ir.assets import read_assets
from bitlower.ir.model_card import front_matter
from bitlower.tools.runs.flow import quantize

CARD = "---\nlicense: mit\nlanguage: [en, de]\nbase_model: other/base\ntags: [x]\n---\n# Tiny\n"


def code_of(card: str) -> str:
    [block] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return block


def executed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the card's own code leaves, run where the card lies."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(code_of((folder / "README.md").read_text()), names)
    return names


def test_a_run_writes_a_card_that_the_hub_reads(own_bert: Path, texts: Path, tmp_path: Path, traced: None) -> None:
    (own_bert / "README.md").write_text(CARD)
    (own_bert / "LICENSE.txt").write_text("Do what you like.")
    first, second = tmp_path / "a", tmp_path / "b"
    for output in (first, second):
        program = quantize(str(own_bert), calibration=str(texts), output=output).program
    assert (first / "README.md").read_bytes() == (second / "README.md").read_bytes()
    assert (first / "LICENSE.txt").read_text() == "Do what you like."
    assert {"README.md", "LICENSE.txt"} <= read_manifest(first).files.keys()
    card = ModelCard.load(first / "README.md")
    assert (card.data.license, card.data.language) == ("mit", ["en", "de"])
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "feature-extraction")
    assert card.data.base_model is None  # a folder is no model of the hub
    assert card.data.tags == ["bitlower", "quantized", "onnx", "onnxruntime", "8-bit"]
    assert str(tmp_path) not in card.content
    ledger = json.loads((first / "ledger.json").read_text())["rows"][-1]["outputs"]["last_hidden_state"]
    assert f"| last_hidden_state | {ledger['cosine']:g} | {ledger['relative_error']:g} |" in card.text
    stored = sum(path.stat().st_size for path in first.rglob("*") if path.is_file())
    sizes = re.search(r"\| size \| ([\d.]+) MB in float32, ([\d.]+) MB here", card.text)
    manifest = read_manifest(first)
    own = sum((first / name).stat().st_size for name in ("README.md", "manifest.json"))
    assert float(sizes[1]) == pytest.approx(manifest.float_bytes / 1e6, abs=0.051)
    assert float(sizes[2]) == pytest.approx((stored - own) / 1e6, abs=0.051)
    roles = {quantizer.role for _, quantizer in program.quantizers()}
    assert all(f"| {role} | " in card.text for role in roles)
    assert "bitlower run recipe.yaml -o DIR" in card.text


@pytest.mark.parametrize(
    ("source", "base"),
    [
        ("hf:org/name@main", "org/name"),
        ("/home/x/.cache/huggingface/hub/models--org--a-name/snapshots/0123", "org/a-name"),
        ("package:some-package", None),
        ("models/name", None),
    ],
)
def test_the_base_model_is_one_of_the_hub(source: str, base: str | None, bert_program: Program, tmp_path: Path) -> None:
    program = replace(bert_program, source=source, assets={})
    OnnxQdq().export(program, tmp_path, random_windows(program))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == base
    assert card.data.to_dict().get("base_model_relation") == ("quantized" if base else None)
    assert card.text.strip().startswith(f"# {base or source.removeprefix('package:').rpartition('/')[2]}, quantized")
    assert "There is no ledger.json" in card.text
    assert card.data.library_name == "onnxruntime"


def test_the_code_for_an_encoder_runs(bert_program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    OnnxQdq().export(bert_program, tmp_path, batches(bert_program, ["the cat sings"]))
    names = executed(tmp_path, monkeypatch)
    [batch] = batches(bert_program, ["A text."])
    expected = bert_program(**batch)["last_hidden_state"].detach()
    assert torch.tensor(names["outputs"]["last_hidden_state"]) == pytest.approx(expected, abs=1e-4)


def test_the_code_for_a_language_model_runs(
    llama_program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    OnnxQdq().export(llama_program, tmp_path, random_windows(llama_program))
    names = executed(tmp_path, monkeypatch)
    prompt = names["tokenizer"]("Once upon a time", return_tensors="pt")["input_ids"]
    expected = bitlower.load(tmp_path).generate(prompt, max_new_tokens=32)
    assert capsys.readouterr().out.strip() == names["tokenizer"].decode(expected[0]).strip()


def test_the_code_for_a_checkpoint_runs(
    llama_program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Checkpoint().export(llama_program, tmp_path, random_windows(llama_program))
    card = ModelCard.load(tmp_path / "README.md")
    assert "pip install transformers compressed-tensors" in card.text
    assert type(executed(tmp_path, monkeypatch)["model"]).__name__ == "LlamaForCausalLM"


def test_a_folder_of_sentence_transformers_says_so(own_bert: Path, bert_program: Program, tmp_path: Path) -> None:
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    (own_bert / "modules.json").write_text(json.dumps(modules))
    program = replace(bert_program, assets=read_assets(own_bert))
    OnnxQdq().export(program, tmp_path, batches(program, ["the cat sings"]))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "sentence-transformers"
    assert 'SentenceTransformer(folder, backend="onnx"' in code_of(card.content)


@pytest.mark.parametrize(
    "card", ["", "no fence", "---\nlicense: mit\n", "---\n: [\n---\n", "---\n- a\n---\n", "\xff\xfe"]
)
def test_a_card_without_front_matter_says_nothing(card: str) -> None:
    assert front_matter(card.encode("latin-1")) == {}
    assert front_matter(CARD.encode())["license"] == "mit"

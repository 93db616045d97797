"""Artifacts in sentence-transformers and optimum, whose releases for ONNX need an older transformers than bitlower.

They run in an interpreter of their own, which ``BITLOWER_OPTIMUM_PYTHON`` names; without it these tests are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bitlower
from bitlower.backends.onnx_qdq import OnnxQdq
from bitlower.frontends import batches, load
from bitlower.tools.runs.flow import quantize

PYTHON = os.environ.get("BITLOWER_OPTIMUM_PYTHON", "")
TEXTS = ["the cat sings", "a small dog sleeps near the old river"]
pytestmark = pytest.mark.skipif(not PYTHON, reason="BITLOWER_OPTIMUM_PYTHON names no interpreter with optimum-onnx")

SENTENCES = """
import json, sys
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], backend="onnx", model_kwargs={"file_name": "model.onnx"})
print(json.dumps(model.encode(json.loads(sys.argv[2])).tolist()))
"""
CLASSES = """
import json, sys
from optimum.onnxruntime import ORTModelForSequenceClassification
from transformers import AutoTokenizer
model, tokenizer = (cls.from_pretrained(sys.argv[1]) for cls in (ORTModelForSequenceClassification, AutoTokenizer))
tokens = tokenizer(json.loads(sys.argv[2]), padding=True, return_tensors="pt")
print(json.dumps(model(**tokens).logits.tolist()))
"""


WRITTEN = """
import json, sys, torch
from optimum.onnxruntime import ORTModelForSeq2SeqLM
model = ORTModelForSeq2SeqLM.from_pretrained(sys.argv[1])
ids, mask = (torch.tensor(rows) for rows in json.loads(sys.argv[2]))
settings = {"max_new_tokens": 8, "no_repeat_ngram_size": 2, "do_sample": False}
print(json.dumps([
    model.generate(input_ids=ids, attention_mask=mask, num_beams=beams, min_new_tokens=8, **settings).tolist()
    for beams in (1, 3)
]))
"""


def said(code: str, folder: Path, read: Any = TEXTS) -> Any:
    """What ``code`` prints in the other interpreter."""
    command = [PYTHON, "-c", code, str(folder), json.dumps(read)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return np.array(json.loads(done.stdout.splitlines()[-1]))


def plain(folder: Path) -> Path:
    """The folder with a tokenizer of a class that older releases load without a normalizer."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def test_sentence_transformers_loads_an_artifact_of_its_folder(own_bert: Path, texts: Path, tmp_path: Path) -> None:
    folder, modules = plain(own_bert), []
    for place, name in enumerate(("Transformer", "Pooling", "Normalize")):
        path = f"{place}_{name}" if place else ""
        modules.append({"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{name}"})
        (folder / path).mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(
        '{"word_embedding_dimension": 32, "pooling_mode_mean_tokens": true}'
    )
    (folder / "modules.json").write_text(json.dumps(modules))
    quantize(str(folder), calibration=str(texts), output=tmp_path / "artifact")
    model = bitlower.load(tmp_path / "artifact")
    expected = []
    for text in TEXTS:
        [batch] = batches(model.program, [text])
        row = model(**batch)["last_hidden_state"][0].numpy().mean(0)
        expected.append(row / np.linalg.norm(row))
    assert said(SENTENCES, tmp_path / "artifact") == pytest.approx(np.array(expected), abs=1e-5)


def test_optimum_loads_an_artifact_of_a_classifier(save_head: Callable[..., Path], texts: Path, tmp_path: Path) -> None:
    import shutil

    folder = plain(shutil.copytree(save_head("SequenceClassification", num_labels=3), tmp_path / "model"))
    quantize(str(folder), calibration=str(texts), output=tmp_path / "artifact")
    model = bitlower.load(tmp_path / "artifact")
    [batch] = batches(model.program, TEXTS)
    assert said(CLASSES, tmp_path / "artifact") == pytest.approx(model(**batch)["logits"].numpy(), abs=1e-5)


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_optimum_writes_with_an_encoder_decoder_in_its_layout(kind: str, tmp_path: Path, seq2seq: Any) -> None:
    OnnxQdq(layout="optimum").export(load(seq2seq.model_of(kind)), tmp_path, seq2seq.batches(kind, 1))
    read = seq2seq.source(kind)
    settings = {"max_new_tokens": 8, "no_repeat_ngram_size": 2, "min_new_tokens": 8}
    expected = [bitlower.load(tmp_path).generate(**read, num_beams=beams, **settings).tolist() for beams in (1, 3)]
    assert said(WRITTEN, tmp_path, [rows.tolist() for rows in read.values()]).tolist() == expected

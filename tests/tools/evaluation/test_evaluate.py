"""Evaluation of a float model and of an ONNX artifact, against transformers and the definitions."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from bitlower.ir import BitlowerError
from bitlower.tools.evaluation.evaluate import cosine, evaluate, mean_pool


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """24 scored pairs as the STS benchmark has them: no header, seven columns."""
    generator = random.Random(0)
    words = ["cat", "dog", "bird", "house", "tree", "river", "sings", "runs", "sleeps"]
    rows = []
    for i in range(24):
        first = generator.choices(words, k=3 + i % 7)
        second = [w if generator.random() < 0.5 else generator.choice(words) for w in first]
        score = 5 * np.mean([a == b for a, b in zip(first, second, strict=True)])
        rows.append(f"g\tf\ty\t{i}\t{score:.3f}\t{' '.join(first)}\t{' '.join(second)}\n")
    path = tmp_path / "sts.tsv"
    path.write_text("".join(rows))
    return path


def embeddings(folder: Path, texts: list[str]) -> np.ndarray[Any, Any]:
    """One text at a time through transformers: no batching, no padding."""
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        hidden = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in texts]
    return np.stack([h.double().mean(0).numpy() for h in hidden])


def test_sts_b_against_transformers(bert: Path, pairs: Path) -> None:
    rows = [line.split("\t") for line in pairs.read_text().splitlines()]
    first, second = (embeddings(bert, [row[column] for row in rows]) for column in (5, 6))
    similarity = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in zip(first, second, strict=True)]
    scores = [float(row[4]) for row in rows]
    result = evaluate(bert, "sts-b", pairs, batch_size=5)
    assert result.samples == 24
    assert result.metrics["spearman"] == pytest.approx(100 * stats.spearmanr(similarity, scores).statistic, abs=0.3)
    assert result.metrics["pearson"] == pytest.approx(100 * stats.pearsonr(similarity, scores).statistic, abs=0.01)


def test_classification_against_transformers(classifier: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    texts = ["the cat sings", "rain falls and the old dog never runs", "snow", "a small bird goes", "the river , ?"]
    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    with torch.no_grad():
        expected = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts]
    labels = [expected[0], 1 - expected[1], *expected[2:]]  # one row is labelled against the model
    data = tmp_path / "data.csv"
    data.write_text("label,sentence\n" + "".join(f'{y},"{t}"\n' for y, t in zip(labels, texts, strict=True)))
    result = evaluate(classifier, "classification", data, batch_size=2)
    assert result.metrics["accuracy"] == pytest.approx(80.0)
    named = tmp_path / "named.tsv"
    named.write_text("".join(f"{t}\tLABEL_{y}\n" for y, t in zip(labels, texts, strict=True)))
    assert evaluate(classifier, "classification", named, columns=("0", "1")).metrics == result.metrics


def test_a_regression_against_transformers(save_head: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = save_head("SequenceClassification", num_labels=1)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pairs = [("the cat sings", "rain"), ("snow", "a small bird goes"), ("the river", "old dogs"), ("wind", "wind")]
    with torch.no_grad():
        values = [float(model(**tokenizer(*pair, return_tensors="pt")).logits) for pair in pairs]
    labels = [2.5, 0.0, 4.0, 1.25]
    data = tmp_path / "data.tsv"
    rows = (f"{a}\t{b}\t{label}\n" for (a, b), label in zip(pairs, labels, strict=True))
    data.write_text("sentence1\tsentence2\tscore\n" + "".join(rows))
    result = evaluate(folder, "classification", data, columns=["sentence1", "sentence2", "score"], batch_size=3)
    assert result.metrics == pytest.approx(
        {"pearson": 100 * stats.pearsonr(values, labels)[0], "spearman": 100 * stats.spearmanr(values, labels)[0]},
        abs=1e-3,
    )


def save_lookup(folder: Path, table: np.ndarray[Any, Any]) -> None:
    """An ONNX model that gives each token its row of ``table``."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"])
        for name in ("input_ids", "attention_mask")
    ]
    output = helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["batch", "sequence", 8])
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["last_hidden_state"])]
    graph = helper.make_graph(nodes, "lookup", inputs, [output], [numpy_helper.from_array(table, "table")])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), folder / "model.onnx"
    )


def test_an_artifact_is_run_in_onnxruntime(bert: Path, pairs: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "artifact"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bert / name, folder / name)
    table = np.random.default_rng(0).normal(size=(128, 8)).astype(np.float32)
    save_lookup(folder, table)
    rows = [line.split("\t") for line in pairs.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(bert)
    first, second = ([table[tokenizer(row[column])["input_ids"]].mean(0) for row in rows] for column in (5, 6))
    similarity = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in zip(first, second, strict=True)]
    expected = 100 * stats.pearsonr(similarity, [float(row[4]) for row in rows]).statistic
    assert evaluate(folder, "sts-b", pairs, batch_size=5).metrics["pearson"] == pytest.approx(expected, abs=1e-3)
    (folder / "model.onnx").write_bytes(b"broken")
    with pytest.raises(BitlowerError, match=r"model.onnx cannot be loaded"):
        evaluate(folder, "sts-b", pairs)


def test_padding_does_not_count() -> None:
    hidden, mask = np.random.default_rng(0).normal(size=(2, 4, 3)), np.array([[1, 1, 0, 0], [1, 1, 1, 1]])
    assert mean_pool(hidden, mask)[0] == pytest.approx(hidden[0, :2].mean(0))
    assert mean_pool(hidden, mask)[1] == pytest.approx(hidden[1].mean(0))
    assert cosine(np.array([[1.0, 0.0]]), np.array([[3.0, 4.0]])) == pytest.approx([0.6])


@pytest.mark.parametrize(
    ("task", "columns", "content", "message"),
    [
        ("stsb", (), "x", "unknown evaluation 'stsb'; did you mean 'sts-b'"),
        ("sts-b", ("0", "1"), "1\ta\n", "sts-b takes three columns"),
        ("sts-b", ("0", "1", "2"), "x\ta\tb\n1\ta\tb\n", "line 1: 'x' is not a finite number"),
        ("sts-b", ("0", "1", "2"), "", "holds no rows"),
        ("classification", (), "sentense\tlabel\na\t1\n", "no column 'sentence'; did you mean 'sentense'"),
        ("classification", ("0",), "a\t1\n", "two or three columns"),
    ],
)
def test_mistakes_are_found_before_the_model_is_run(
    bert: Path, tmp_path: Path, task: str, columns: tuple[str, ...], content: str, message: str
) -> None:
    data = tmp_path / "data.tsv"
    data.write_text(content)
    with pytest.raises(BitlowerError) as caught:
        evaluate(bert, task, data, columns=columns)
    assert message in str(caught.value)


def test_the_model_must_fit_the_task(bert: Path, classifier: Path, pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(BitlowerError, match="sts-b needs token embeddings, the model gives 'logits'"):
        evaluate(classifier, "sts-b", pairs)
    data = tmp_path / "data.tsv"
    data.write_text("sentence\tlabel\nthe cat\t7\n")
    with pytest.raises(BitlowerError, match="classification needs logits"):
        evaluate(bert, "classification", data)
    with pytest.raises(BitlowerError, match="line 2: '7' is no label"):
        evaluate(classifier, "classification", data)


def test_results_are_plain_data(classifier: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.tsv"
    data.write_text("sentence\tlabel\nthe cat\t1\nrain\t0\n")
    form = evaluate(classifier, "classification", data).to_dict()
    assert json.loads(json.dumps(form)) == form
    assert form.keys() == {"target", "task", "data", "samples", "accuracy", "f1", "matthews", "intervals", "notes"}

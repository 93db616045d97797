"""The adapter for MTEB: a task of one's own, against sentence-transformers on the same float model."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from bitlower.backends.onnx_qdq import OnnxQdq
from bitlower.frontends import batches
from bitlower.ir import BitlowerError, Program
from bitlower.tools.harness.tasks import Request, run_harness

pytest.importorskip("mteb")

TASK = """
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata


class OwnPairs(AbsTaskSTS):
    metadata = TaskMetadata(
        name="OwnPairs", description="Pairs.", type="STS", main_score="cosine_spearman", eval_langs=["eng-Latn"],
        dataset={"path": %r, "revision": "1"},
    )
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    draw, words = random.Random(0), ["cat", "dog", "bird", "house", "tree", "river", "sings", "runs", "sleeps"]
    rows = []
    for _ in range(20):
        first = draw.choices(words, k=draw.randint(3, 8))
        second = [word if draw.random() < 0.5 else draw.choice(words) for word in first]
        rows.append({"sentence1": " ".join(first), "sentence2": " ".join(second), "score": 5 * draw.random()})
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.py").write_text(TASK % str(tmp_path / "rows"))
    return tmp_path / "own.py"


@pytest.mark.parametrize("way", ["mean", "cls"])
def test_a_task_of_ones_own_is_measured_as_sentence_transformers_does(
    own_bert: Path, task: Path, way: str, tmp_path: Path
) -> None:
    import mteb
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    from bitlower.tools.harness.embeddings import read_tasks

    network = Transformer(str(own_bert), max_seq_length=64)
    saved = tmp_path / "sentences"
    model = SentenceTransformer(modules=[network, Pooling(32, pooling_mode=way)], device="cpu")
    model.save(str(saved))
    [own] = read_tasks(["OwnPairs"], task)
    [reference] = mteb.evaluate(model, [own], cache=None, show_progress_bar=False).task_results
    wanted = reference.scores["test"][0]
    result = run_harness("mteb", saved, Request(("OwnPairs",), include=task, batch_size=3))["OwnPairs"].evaluation
    for name in ("cosine_spearman", "cosine_pearson"):
        assert result.metrics[name] == pytest.approx(wanted[name], abs=2e-3), name
    assert result.intervals == {}
    assert "no intervals" in result.notes[0]


def test_an_artifact_is_measured_in_its_runtime(
    bert: Path, bert_program: Program, task: Path, tmp_path: Path, traced: None
) -> None:
    output = tmp_path / "artifact"
    output.mkdir()
    OnnxQdq().export(bert_program, output, batches(bert_program, ["the cat sings"]))
    of_artifact, of_float = (
        run_harness("mteb", target, Request(("OwnPairs",), include=task))["OwnPairs"].evaluation.metrics
        for target in (output, bert)
    )
    assert of_artifact["cosine_pearson"] == pytest.approx(of_float["cosine_pearson"], abs=1e-3)


def test_what_is_wrong_is_named(bert: Path, classifier: Path, task: Path, traced: None) -> None:
    from bitlower.tools.harness.embeddings import pooling

    for request, message in (
        (Request(("OwnPairs",), include=task.parent / "gone.py"), "there is no file"),
        (Request(("OwnPairs",), include=task, limit=3), "mteb runs all rows, without examples"),
        (Request(("OwnPear",), include=task), "mteb has no task 'OwnPear'"),
    ):
        with pytest.raises(BitlowerError) as caught:
            run_harness("mteb", bert, request)
        assert message in str(caught.value)
    with pytest.raises(BitlowerError, match="mteb needs token embeddings, the model gives 'logits'"):
        run_harness("mteb", classifier, Request(("OwnPairs",), include=task))
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}, {"path": "2", "type": "x.Dense"}]
    with pytest.raises(BitlowerError, match="go through a module 'Dense'"):
        pooling({"modules.json": json.dumps(modules).encode()})
    pooled = {
        "modules.json": b'[{"path": "1", "type": "x.Pooling"}]',
        "1/config.json": b'{"pooling_mode_max_tokens": true}',
    }
    with pytest.raises(BitlowerError, match="pooled by max_tokens"):
        pooling(pooled)

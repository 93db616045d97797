"""What encoder-decoders write, against references: figures by hand, and the same ones of a Program and an artifact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bitlower.backends.onnx_qdq import OnnxQdq
from bitlower.ir import BitlowerError, Program
from bitlower.ir.assets import read_assets
from bitlower.ir.generation import program_stages, write_targets
from bitlower.tools.evaluation import targets
from bitlower.tools.evaluation.evaluate import evaluate
from bitlower.tools.evaluation.written import METRICS

SOURCES = ["the cat sings", "a small dog sleeps near the old river", "bird runs"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, seq2seq: Any) -> Path:
    return seq2seq.save("bart", tmp_path_factory.mktemp("bart"))


@pytest.fixture(scope="module")
def program(folder: Path, seq2seq: Any) -> Program:
    return replace(seq2seq.traced("bart"), assets=read_assets(folder))


def written(program: Program, length: int, beams: int = 1) -> list[str]:
    from bitlower.frontends import batches
    from bitlower.frontends.tokenize import decode

    (batch,) = batches(program, SOURCES, pairs=SOURCES, batch_size=3)
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}
    ids = write_targets(
        program, *program_stages(program), source, stops=[2], max_new_tokens=length, pad=2, num_beams=beams
    )
    return [decode(program, row[1:]) for row in ids.tolist()]


@pytest.mark.parametrize("beams", [1, 4])
def test_what_the_model_writes_itself_is_right(
    program: Program, tmp_path: Path, beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, asked = written(program, 12, beams), []

    def watched(*inputs: Any, **options: Any) -> Any:
        asked.append(options["num_beams"])
        return write_targets(*inputs, **options)

    monkeypatch.setattr(targets, "write_targets", watched)
    path = tmp_path / "data.tsv"
    path.write_text("source\ttarget\n" + "".join(f"{s}\t{t or 'x'}\n" for s, t in zip(SOURCES, texts, strict=True)))
    result = evaluate(program, "summarization", f"{path}:source,target", max_length=12, beams=beams)
    right = 100 * sum(bool(text.split()) for text in texts) / 3
    assert (result.samples, set(asked)) == (3, {beams})
    assert result.metrics["rougeL"] == pytest.approx(right)


def test_an_artifact_writes_what_its_program_does(program: Program, tmp_path: Path, seq2seq: Any) -> None:
    path, output = tmp_path / "data.tsv", tmp_path / "artifact"
    path.write_text("source\ttarget\n" + "".join(f"{source}\tthe dog sings\n" for source in SOURCES))
    output.mkdir()
    OnnxQdq().export(program, output, seq2seq.batches("bart", 1))
    of_program = evaluate(program, "translation", path, columns=["source", "target"], max_length=12)
    of_artifact = evaluate(output, "translation", path, columns=["source", "target"], max_length=12)
    assert of_artifact.metrics == pytest.approx(of_program.metrics)
    assert set(of_artifact.metrics) == {"bleu", "chrf"}


def test_figures_by_hand() -> None:
    heard = ["the cat sat", "hello there"]
    spoken = ["The cat sat.", "hello dear world"]
    assert METRICS["speech-recognition"](heard, spoken)["wer"] == pytest.approx(100 * 2 / 6)
    rouge = METRICS["summarization"](["the cat"], ["the cat sat down"])
    assert rouge["rouge1"] == pytest.approx(100 * 2 * 1.0 * 0.5 / 1.5)
    assert METRICS["translation"](["the cat sat on the mat"], ["the cat sat on the mat"])["bleu"] == pytest.approx(100)


def test_bad_input_is_named_before_any_work(program: Program, tiny_program: Program, tmp_path: Path) -> None:
    path = tmp_path / "data.tsv"
    path.write_text("source\ttarget\nthe cat\t\n")
    with pytest.raises(BitlowerError, match="line 2: the text is empty"):
        evaluate(program, "summarization", f"{path}:source,target")
    with pytest.raises(BitlowerError, match="no column 'summary'"):
        evaluate(program, "summarization", f"{path}:source,summary")
    with pytest.raises(BitlowerError, match="needs a column of sources and one of references"):
        evaluate(program, "summarization", path)
    path.write_text("source\ttarget\nthe cat\tcat\n")
    with pytest.raises(BitlowerError, match="is no encoder with a decoder"):
        evaluate(tiny_program, "summarization", f"{path}:source,target")


def test_a_package_that_is_missing_is_named(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    path = tmp_path / "data.tsv"
    path.write_text("source\ttarget\nthe cat\tcat\n")
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(BitlowerError, match="needs the package jiwer; install it"):
        evaluate(program, "speech-recognition", f"{path}:source,target")

"""Longformer, traced without steps that depend on values, against transformers: padding, windows, global tokens."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers

from bitlower import Context, PassManager, parse_pipeline
from bitlower.backends import onnx_qdq
from bitlower.frontends import load
from bitlower.ir import Batch, Program
from bitlower.ir.verifier import verify

PAD, SEPARATOR, WORDS = 1, 2, 60
HEADS = ("Model", "ForMaskedLM", "ForTokenClassification", "ForSequenceClassification", "ForQuestionAnswering")
CASES = [
    pytest.param(h, marks=[pytest.mark.nightly] if h in ("ForMaskedLM", "ForTokenClassification") else [])
    for h in HEADS
]
"""Heads that read every token are like the model itself; the other two choose tokens with global attention."""
OF_ALL_PAIRS = "any token may have global attention, which is computed over all pairs of tokens"


def build(head: str, window: int | list[int] = 8, layers: int = 2) -> Any:
    """A model with weights large enough that it matters who attends to whom."""
    config = transformers.LongformerConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2, vocab_size=WORDS,
        max_position_embeddings=120, attention_window=window, num_labels=2, type_vocab_size=1, pad_token_id=PAD,
        sep_token_id=SEPARATOR, eos_token_id=SEPARATOR, bos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = getattr(transformers, f"Longformer{head}")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    return model.eval()


def texts(rows: int, length: int, *, padding: int = 3, left: bool = False) -> dict[str, torch.Tensor]:
    """Pairs of texts, the first ``1 + row`` tokens long; the last row has ``padding``."""
    generator = torch.Generator().manual_seed(100 * rows + length)
    ids = torch.randint(3, WORDS, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, slice(0, padding) if left else slice(length - padding, length)] = 0
    for row in range(rows):
        kept = mask[row].nonzero()[:, 0]
        ids[row, kept[[1 + row, 2 + row, -1]]] = SEPARATOR
    ids[mask == 0] = PAD
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def agrees(program: Program, model: Any, batch: Batch) -> None:
    with torch.no_grad():
        expected, found = model(**batch), program(**batch)
    assert found
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], atol=2e-5, rtol=1e-5)


@functools.cache
def traced(head: str) -> tuple[Any, Program]:
    """A model and its Program, neither to be changed."""
    model = build(head)
    return model, load(model)


@pytest.mark.parametrize("head", CASES)
def test_every_head_gives_the_outputs_of_transformers_at_any_length(head: str) -> None:
    model, program = traced(head)
    verify(program)
    assert program.lengths == {}
    assert program.context_length == 118
    for batch in (
        texts(1, 9, padding=0),
        texts(3, 22),
        texts(2, 24),
        texts(2, 61, padding=20),
        texts(3, 19, left=True),
    ):
        agrees(program, model, batch)


def test_a_trace_within_one_window_holds_beyond_it() -> None:
    model = build("ForSequenceClassification", window=32)
    program = load(model)
    agrees(program, model, texts(2, 100))
    agrees(program, model, texts(1, 33, padding=0))


def test_layers_have_windows_of_their_own() -> None:
    model = build("Model", window=[4, 12])
    agrees(load(model), model, texts(3, 36, padding=5))


def test_a_text_of_one_token() -> None:
    model, program = traced("ForSequenceClassification")
    batch = {"input_ids": torch.tensor([[7]]), "attention_mask": torch.tensor([[1]])}
    agrees(program, model, {**batch, "token_type_ids": torch.tensor([[0]])})


@pytest.mark.parametrize("head", CASES)
def test_memory_grows_with_the_length_unless_a_note_says_otherwise(head: str) -> None:
    _, program = traced(head)
    shapes = [node.meta["type"].shape for node in program.graph.nodes if "type" in node.meta]
    square = any(sum("sequence" in str(size) for size in shape) > 1 for shape in shapes)
    assert square == (head == "ForQuestionAnswering") == any(OF_ALL_PAIRS in note for note in program.notes)
    assert ("before the first separator" in " ".join(program.notes)) == (head == "ForQuestionAnswering")


def test_a_mask_of_global_attention_may_be_an_input() -> None:
    model = build("Model", layers=1)

    def batch(rows: int, length: int) -> dict[str, torch.Tensor]:
        given = texts(rows, length)
        return {**given, "global_attention_mask": (given["input_ids"] % 5 == 0).long()}

    program = load(model, example_inputs=batch(2, 21))
    assert any(OF_ALL_PAIRS in note for note in program.notes)
    agrees(program, model, batch(3, 42))
    agrees(program, model, {**texts(2, 30), "global_attention_mask": torch.zeros(2, 30, dtype=torch.int64)})


def test_the_model_is_left_as_it_was() -> None:
    model = build("ForSequenceClassification", layers=1)
    batch = texts(2, 22)
    with torch.no_grad():
        before = model(**batch).logits
        load(model)
        torch.testing.assert_close(model(**batch).logits, before, atol=0, rtol=0)
    module = transformers.models.longformer.modeling_longformer
    for kind in (module.LongformerForSequenceClassification, module.LongformerModel, module.LongformerSelfAttention):
        assert kind.forward.__module__ != "bitlower.frontends._longformer"


def session_gives(folder: Path, batch: Batch) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["logits"], {name: value.numpy() for name, value in batch.items()})[0])


@pytest.mark.parametrize("scheme", ["float", "W8A8"])
def test_onnx_gives_the_logits_of_transformers(scheme: str, tmp_path: Path) -> None:
    model, data = build("ForSequenceClassification", layers=1), [texts(2, 22)]
    program = load(model)
    if scheme != "float":
        steps = parse_pipeline(f"clean,quantize{{scheme={scheme}}},calibrate,lower-integer")
        program = PassManager(steps).run(program, Context(calibration=data))
    onnx_qdq.export(program, tmp_path, batches=data)
    batch = texts(3, 45, padding=9)
    with torch.no_grad():
        expected = model(**batch).logits.numpy()
    found = session_gives(tmp_path, batch)
    if scheme == "float":
        np.testing.assert_allclose(found, expected, atol=2e-5)
    else:
        assert np.sum(found * expected) > 0.99 * np.linalg.norm(found) * np.linalg.norm(expected)

"""What the verification of an ONNX file holds: outputs go before the next comparison needs as much again."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from bitlower.backends.onnx_qdq.runtime.session import Session
from bitlower.backends.onnx_qdq.verify import compare
from bitlower.backends.onnx_qdq.verify.codes import CodeComparison
from bitlower.backends.onnx_qdq.verify.compare import compare_export, verify_export
from bitlower.ir import Batch


def test_outputs_are_gone_when_the_runtimes_floats_are_read(
    handmade: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs: list[weakref.ref[Any]] = []
    alive: list[int] = []
    run, exactly = Session.run, CodeComparison.compare_exactly

    def noted(session: Session, batch: Batch, names: Iterable[str] | None = None) -> dict[str, Any]:
        values = run(session, batch, names)
        outputs.extend(map(weakref.ref, values.values()))
        return values

    def looked(comparison: CodeComparison, batch: Batch) -> None:
        alive.append(sum(output() is not None for output in outputs))
        exactly(comparison, batch)
        outputs.clear()

    monkeypatch.setattr(Session, "run", noted)
    monkeypatch.setattr(CodeComparison, "compare_exactly", looked)
    folder = handmade.write(tmp_path)
    compare_export(handmade.program, folder, handmade.batches, tested=True)
    assert len(alive) > 2
    assert not any(alive)


def test_the_floats_are_read_without_the_outputs(
    handmade: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[set[str]] = []
    run = Session.run

    def noted(session: Session, batch: Batch, names: Iterable[str] | None = None) -> dict[str, Any]:
        values = run(session, batch, names)
        read.append(set(values))
        return values

    monkeypatch.setattr(Session, "run", noted)
    folder = handmade.write(tmp_path)
    compare_export(handmade.program, folder, handmade.batches[:1])
    assert read[0] == {"y"}
    assert {"y", "x_codes", "act_codes"} <= read[1]
    assert "y" not in read[2]
    assert {"x_codes", "act_codes"} < read[2]


def test_outputs_that_are_not_remembered_are_computed_again(
    handmade: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = handmade.write(tmp_path)
    whole = verify_export(handmade.program, folder, handmade.batches)
    monkeypatch.setattr(compare, "REMEMBERED_BYTES", 0)
    assert verify_export(handmade.program, folder, handmade.batches) == whole

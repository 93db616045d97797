from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bitlower.backends.onnx_qdq import OnnxQdq, export
from bitlower.backends.onnx_qdq.write.files import write_assets
from bitlower.frontends import load
from bitlower.ir import BitlowerError, Level, Program
from bitlower.passes import Context, PassManager
from bitlower.passes.quantizers.quantize import Quantize


def test_tokenizer_files_are_copied_and_stay_inside(tiny_program: Program, tmp_path: Path) -> None:
    program = tiny_program.clone()
    program.assets = {"tokenizer.json": b"{}", "vocab.txt": b"a\n"}
    assert write_assets(program, tmp_path) == ["tokenizer.json", "vocab.txt"]
    assert (tmp_path / "vocab.txt").read_bytes() == b"a\n"
    for name in ("../vocab.txt", "/tmp/vocab.txt", "model.onnx", ".."):
        program.assets = {name: b""}
        with pytest.raises(BitlowerError, match="cannot lie in an artifact"):
            write_assets(program, tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OnnxQdq(opset=20), "opset is 20; it takes int from 21 to 25"),
        (lambda: OnnxQdq(opset=True), "opset is True; it takes int from 21"),
        (lambda: OnnxQdq(form="qdp"), "form is qdp; it takes one of qdq, onnxruntime"),  # type: ignore[arg-type]
        (lambda: OnnxQdq(weight_signs="sign"), "weight-signs is sign; it takes one of"),  # type: ignore[arg-type]
        (lambda: OnnxQdq(external_data_threshold=-1), "external-data-threshold is -1; it takes int from 0"),
    ],
)
def test_options_out_of_range_are_named(make: Callable[[], OnnxQdq], message: str) -> None:
    with pytest.raises(BitlowerError, match=message):
        make()


def test_a_simulated_program_is_refused(tiny_program: Program, tmp_path: Path) -> None:
    program = PassManager([Quantize()]).run(tiny_program, Context())
    assert program.level is Level.SIMULATED
    with pytest.raises(BitlowerError, match="lower-integer"):
        export(program, tmp_path, batches=[])
    assert not list(tmp_path.iterdir())


def test_a_fused_program_is_refused(tiny_program: Program, tmp_path: Path) -> None:
    program = tiny_program.clone()
    program.level = Level.FUSED
    with pytest.raises(BitlowerError, match="leave out the pass `fuse`"):
        export(program, tmp_path, batches=[])
    assert not list(tmp_path.iterdir())


class Untranslatable(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)


def test_an_operator_without_onnx_form_is_named(tmp_path: Path) -> None:
    program = load(Untranslatable(), example_inputs={"x": torch.randn(3, 4)})
    with pytest.raises(BitlowerError, match="bessel_j0"):
        export(program, tmp_path, batches=[{"x": torch.randn(2, 4)}])

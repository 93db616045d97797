"""What became of a Program's operators: kernels that are really called, and float32 with its reason."""

from __future__ import annotations

import json
import runpy
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("tvm", reason="the extra tvm is not installed")

from bitlower.backends.tvm_kernels import compile_program, export, verify
from bitlower.backends.tvm_kernels.spec.operators import OperatorLog, families
from bitlower.backends.tvm_kernels.verify.calls import compared_calls
from bitlower.ir import CheckError, Program, kernels

_HELPERS = runpy.run_path(str(Path(__file__).with_name("programs.py")))
fused, tokens, worst = _HELPERS["fused"], _HELPERS["tokens"], _HELPERS["worst"]


def count(program: Program, kind: str) -> int:
    return sum(kernels.is_kernel(node) and kernels.kind(node) == kind for node in program.graph.nodes)


@pytest.fixture(scope="module")
def program() -> Program:
    """One layer; its weights have 8 bits and zero points, which no kernel multiplies as integers."""
    made: Program = fused("bert", "W8A8-asym", layers=1)
    return made


def test_every_kernel_operator_is_compiled_and_called() -> None:
    program = fused("bert", "W8A8", layers=1)
    code = compile_program(program).code
    for kind in ("fused_linear", "fused_norm", "fused_attention"):
        assert code.operators.compiled[kind] == count(program, kind) > 0
    calls = compared_calls(code)
    assert calls["found"] == calls["expected"]
    assert calls["found"]["linear"] == count(program, "fused_linear")
    assert not code.operators.floating


def test_a_linear_without_a_kernel_says_why(program: Program, tmp_path: Path) -> None:
    """In the report, in the manifest and beside the library; and the library still computes what the Program does."""
    report = export(program, tmp_path, batches=[tokens(program, 3, 9)])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    library = json.loads((tmp_path / "library.json").read_text())
    assert report.to_dict()["operators"] == manifest["operators"] == library["operators"]
    [(reason, names)] = manifest["operators"]["float"].items()
    assert reason.startswith("kernels have no integer product for weights in u8")
    assert len(names) == count(program, "fused_linear")
    assert any("encoder.layer.0.intermediate.dense" in name for name in names)
    assert "fused_linear" not in manifest["operators"]["compiled"]
    [note] = report.notes
    assert note.startswith(f"{len(names)} operators run in float, the first of them %")
    assert reason in note
    assert verify(tmp_path).calls["found"] == manifest["operators"]["calls"]


def test_floats_that_no_quantizer_touches_are_named() -> None:
    operators = compile_program(fused("llama", "W4A16-g16", layers=1)).code.operators
    [(reason, names)] = operators.floating.items()
    assert reason == "no quantizer touches it"
    assert [name.split(" in ")[1] for name in names] == ["lm_head"]


def test_kernels_that_are_missing_in_the_code_are_found() -> None:
    code = compile_program(fused("bert", "W8A8", layers=1)).code
    more = replace(code, operators=OperatorLog(code.operators.calls + Counter(linear=1)))
    with pytest.raises(CheckError, match=r"calls the kernels .*linear x 5.* needs .*linear x 6"):
        compared_calls(more)


def test_a_log_comes_back_from_plain_data() -> None:
    log = OperatorLog(Counter(linear=2), Counter(fused_linear=1), {"no reason": ["%linear in head"]})
    assert OperatorLog.from_dict(json.loads(json.dumps(log.to_dict()))) == log


def test_other_functions_are_no_kernels() -> None:
    assert families(["bitlower_norm_rms_8_f32_0", "gather", "vm.builtin.reshape", "my_bitlower_x_1"]) == Counter(norm=1)

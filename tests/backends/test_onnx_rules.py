"""A rule of a third party that writes an operator which bitlower does not know: one file, exported and verified."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitlower.backends.onnx_qdq import CodeOperator, Reading, Rule, add_rule
from bitlower.backends.onnx_qdq.graph.code_operators import add_operator, code_operator
from bitlower.ir import BitlowerError

RULE = '''
"""Products of matrices of codes by com.microsoft.QGemm."""

import numpy as np

from bitlower.backends.onnx_qdq import APPLIED, CodeOperator, Reading, Rule, add_rule
from bitlower.backends.onnx_qdq.graph.nodes import marker, source
from bitlower.backends.onnx_qdq.rewrite.find_linear import find_linear
from bitlower.backends.onnx_qdq.rewrite.linear import finish_linear, product_operands, weight_reason, weight_scales
from bitlower.backends.onnx_qdq.rewrite.quantizers import per_tensor, stored


def q_gemm(editor, node):
    linear = find_linear(editor, node)
    quantized = marker(linear.x, "Dequantize") if linear is not None else None
    if quantized is None:
        return None
    if not per_tensor(editor, quantized):
        return "the activation has more than one scale"
    if reason := weight_reason(linear.weight):
        return reason
    code = source(quantized)
    scale, zero = stored(editor, quantized, code.dtype)
    codes, zeros = product_operands(editor, node, linear.weight, like_scales=True)
    scales = weight_scales(editor, linear.weight)
    if zeros is None:
        zeros = editor.constant("q_gemm_zero", np.zeros(linear.weight.columns(linear.weight.scale).shape, np.int8))
    operands = [code, scale, zero, codes, scales, zeros]
    finish_linear(editor, linear, editor.emit(node, "QGemm", operands, domain="com.microsoft", like=node.outputs[0]))
    return APPLIED


QGEMM = CodeOperator(name="QGemm", reads=(Reading(0, 1, 2), Reading(3, 4, 5)), integer=True)
add_rule(Rule("q-gemm", q_gemm, (QGEMM,)))
'''
SCRIPT = """
import json, pathlib, sys
import torch
import bitlower
from bitlower.backends.onnx_qdq import export, verify
from bitlower.backends.onnx_qdq.graph import code_operators
from bitlower.ir import CheckError
from bitlower.passes import Context, PassManager, parse_pipeline
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.Tanh(), torch.nn.Linear(24, 8)).eval()
batches = [{"input": torch.randn(5, 16)}, {"input": torch.randn(3, 16)}]
program = bitlower.load(model, example_inputs=batches[0])
passes = "clean,quantize{scheme=W8A8},calibrate,lower-integer"
program = PassManager(parse_pipeline(passes)).run(program, Context(calibration=batches))
folder = pathlib.Path(sys.argv[2])
sys.path.insert(0, sys.argv[1])
import q_gemm
report, checked = export(program, folder, batches=batches), bool(verify(folder))
del code_operators._OPERATORS["QGemm"]
try:
    export(program, folder, batches=batches)
except CheckError as error:
    unknown = str(error)
print(json.dumps({"operators": report.operators, "rules": report.rules, "found": report.verification.kernels.found,
                  "expected": report.verification.kernels.expected, "checked": checked,
                  "unknown": unknown}))
"""


def test_a_rule_and_its_operator_are_one_file(run_script: Callable[..., Any], tmp_path: Path) -> None:
    """Codes, scales and zero points at the new operator are compared with the Program's, and its kernels counted.

    What an operator that is in no table makes of codes is not known: the weight counts as one that nothing reads.
    """
    folder = tmp_path / "out"
    folder.mkdir()
    (tmp_path / "q_gemm.py").write_text(RULE)
    done = run_script(SCRIPT, tmp_path, folder)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["operators"]["com.microsoft.QGemm"] == 2
    assert "MatMul" not in figures["operators"]
    assert figures["rules"]["q-gemm"] == {"applied": 2, "refused": {}}
    assert figures["found"] == figures["expected"] == 2
    assert figures["checked"]
    assert "nothing dequantizes the codes of" in figures["unknown"]


def test_names_that_are_known_are_refused() -> None:
    with pytest.raises(BitlowerError, match="a rule 'float-linear' already"):
        add_rule(Rule("float-linear", lambda editor, node: None))
    with pytest.raises(BitlowerError, match="the operator Sub is known already"):
        add_operator(CodeOperator(name="Sub", reads=(Reading(0),)))
    add_operator(code_operator("Sub"))
    assert code_operator("NoSuchOperator").passes_on == ""

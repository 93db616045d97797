"""From a Program to the finished ONNX model: translation, then the rewrites in their order."""

from __future__ import annotations

import onnx_ir as ir

from bitlower.backends.onnx_qdq._attention import flatten_attention, widen_mask
from bitlower.backends.onnx_qdq._rewrite import Editor, Rule, RuleLog, apply_rules
from bitlower.backends.onnx_qdq._rewrite_graph import residual_sum, strip, widen_bias
from bitlower.backends.onnx_qdq._rewrite_linear import Form, gather_codes, linear_rules
from bitlower.backends.onnx_qdq._rewrite_quantizers import (
    lower_dequantize,
    lower_qparams,
    lower_quantize,
    sink_dequantize,
)
from bitlower.backends.onnx_qdq._translate import translate
from bitlower.ir import Program
from bitlower.ir.version import __version__

ATTENTION_OPSET = 23
"""The first opset with an Attention operator."""


def lower(program: Program, *, opset: int, form: Form) -> tuple[ir.Model, RuleLog]:
    """The ONNX model of ``program``, and what the rules did.

    Raises:
        BitlowerError: the program has an operator that ONNX cannot express.
    """
    return rewrite(translate(program, opset), form)


def rewrite(model: ir.Model, form: Form) -> tuple[ir.Model, RuleLog]:
    """Apply all rules to a translated model, in place, and give everything its final name."""
    editor = Editor(model)
    log = apply_rules(editor, rules(form))
    editor.finish()
    strip(model)
    model.producer_name, model.producer_version = "bitlower", __version__
    model.graph.name = "model"
    return model, log


def rules(form: Form) -> tuple[Rule, ...]:
    """All rules, in order: those that need the low-bit operators whole come before those that lower them."""
    return (
        Rule("flatten-attention", flatten_attention),
        Rule("widen-attention-mask", widen_mask),
        Rule("gather-codes", gather_codes),
        Rule("sink-dequantize", sink_dequantize),
        *linear_rules(form),
        Rule("lower-qparams", lower_qparams),
        Rule("lower-quantize", lower_quantize),
        Rule("lower-dequantize", lower_dequantize),
        Rule("widen-bias", widen_bias),
        Rule("residual-sum", residual_sum),
    )

"""From a Program to the finished ONNX model: translation, then the rewrites in their order."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import get_args

import onnx_ir as ir

from bitlower.backends.onnx_qdq.encoding.nbits import FLOAT_ACTIVATIONS
from bitlower.backends.onnx_qdq.graph.code_operators import add_operator
from bitlower.backends.onnx_qdq.rewrite.attention import flatten_attention, widen_mask, widen_rotary
from bitlower.backends.onnx_qdq.rewrite.editor import Editor
from bitlower.backends.onnx_qdq.rewrite.float_ops import (
    free_product,
    keep_apart,
    matrix_sum,
    residual_sum,
    strip,
    widen_bias,
)
from bitlower.backends.onnx_qdq.rewrite.heads import split_head_rule
from bitlower.backends.onnx_qdq.rewrite.kv_cache import keep_cache
from bitlower.backends.onnx_qdq.rewrite.linear import Form, linear_rules, transpose_weight
from bitlower.backends.onnx_qdq.rewrite.low_bit import low_bit_rules
from bitlower.backends.onnx_qdq.rewrite.quantizers import (
    lower_dequantize,
    lower_qparams,
    lower_quantize,
    raise_quantize,
    sink_dequantize,
)
from bitlower.backends.onnx_qdq.rewrite.rule import Rule, RuleLog, apply_rules
from bitlower.backends.onnx_qdq.rewrite.tables import table_rules
from bitlower.backends.onnx_qdq.runtime.products import Signs, chosen_signs
from bitlower.backends.onnx_qdq.translate.translator import translate
from bitlower.backends.onnx_qdq.translate.unfold import unfold_convolutions
from bitlower.ir import BitlowerError, Program, QuantSpec, ops
from bitlower.ir.quantizer_node import QuantizerNode
from bitlower.ir.version import __version__


def lower(
    program: Program,
    *,
    opset: int,
    form: Form,
    accuracy_level: int = FLOAT_ACTIVATIONS,
    weight_signs: Signs = "auto",
) -> tuple[ir.Model, RuleLog]:
    """The ONNX model of ``program``, and what the rules did.

    Raises:
        BitlowerError: the program has an operator that ONNX cannot express.
    """
    model = translate(unfold_convolutions(program), opset)
    heads = head_codes(program)
    return rewrite(
        model,
        form,
        specs=weight_specs(program),
        heads=heads,
        accuracy_level=accuracy_level,
        weight_signs=weight_signs,
    )


def rewrite(
    model: ir.Model,
    form: Form,
    *,
    specs: Mapping[str, QuantSpec] | None = None,
    heads: Collection[str] = (),
    accuracy_level: int = FLOAT_ACTIVATIONS,
    weight_signs: Signs = "auto",
) -> tuple[ir.Model, RuleLog]:
    """Apply all rules to a translated model, in place, and give everything its final name.

    Args:
        model: of :func:`~bitlower.backends.onnx_qdq.translate.translator.translate`.
        form: see :class:`~bitlower.backends.onnx_qdq.backend.OnnxQdq`.
        specs: of stored codes, by the codes' names; those that are left out get no low-bit kernel.
        heads: the names of the codes of output heads.
        accuracy_level: of MatMulNBits.
        weight_signs: see :class:`~bitlower.backends.onnx_qdq.backend.OnnxQdq`.
    """
    editor = Editor(model, specs, unsigned=chosen_signs(weight_signs) == "unsigned")
    log = apply_rules(editor, rules(form, accuracy_level, heads))
    editor.finish()
    strip(model)
    model.producer_name, model.producer_version = "bitlower", __version__
    model.graph.name = "model"
    return model, log


def weight_specs(program: Program) -> dict[str, QuantSpec]:
    """The spec of each quantized weight, by the name of its codes."""
    return {
        QuantizerNode(node).parameter: quantizer.spec
        for node, quantizer in program.quantizers()
        if node.target is ops.dequantize and QuantizerNode(node).rounds_parameter
    }


def head_codes(program: Program) -> set[str]:
    """The names of the codes that an output head may multiply with: those of embedding tables, by their role."""
    return {
        QuantizerNode(node).parameter
        for node, quantizer in program.quantizers()
        if quantizer.role == "embedding-table" and QuantizerNode(node).rounds_parameter
    }


_ADDED: dict[str, Rule] = {}
"""Rules of third parties, by name."""


def add_rule(rule: Rule) -> None:
    """Offer linears to ``rule`` before the rules for linears have them, in every export of this process from now on.

    The verifier then knows the operators that it writes.

    Raises:
        BitlowerError: there is another rule of that name, or the table says something else of an operator.
    """
    own = {known.name for form in get_args(Form) for known in rules(form)} - {*_ADDED}
    if rule.name in own or _ADDED.get(rule.name, rule) != rule:
        raise BitlowerError(f"there is a rule {rule.name!r} already", hint="give the rule another name")
    for operator in rule.operators:
        add_operator(operator)
    _ADDED[rule.name] = rule


def rules(form: Form, accuracy_level: int = FLOAT_ACTIVATIONS, heads: Collection[str] = ()) -> tuple[Rule, ...]:
    """All rules, in order: those that need the low-bit operators whole come before those that lower them."""
    return (
        Rule("keep-cache", keep_cache),
        Rule("flatten-attention", flatten_attention),
        Rule("widen-attention-mask", widen_mask),
        Rule("widen-rotary-table", widen_rotary),
        *table_rules(form),
        Rule("raise-quantize", raise_quantize),
        Rule("sink-dequantize", sink_dequantize),
        split_head_rule(form, heads),
        *_ADDED.values(),
        *low_bit_rules(form, accuracy_level),
        *linear_rules(form),
        Rule("lower-qparams", lower_qparams),
        Rule("lower-quantize", lower_quantize),
        Rule("lower-dequantize", lower_dequantize),
        Rule("keep-apart", keep_apart),
        Rule("free-product", free_product),
        Rule("transpose-weight", transpose_weight),
        Rule("widen-bias", widen_bias),
        Rule("residual-sum", residual_sum),
        Rule("matrix-sum", matrix_sum),
    )

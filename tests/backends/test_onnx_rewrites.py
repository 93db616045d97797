from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from bitlower.backends.onnx_qdq.graph.nodes import only_user, spread
from bitlower.backends.onnx_qdq.rewrite.attention import flatten_attention, widen_mask
from bitlower.backends.onnx_qdq.rewrite.editor import Editor
from bitlower.backends.onnx_qdq.rewrite.float_ops import residual_sum, strip, widen_bias
from bitlower.backends.onnx_qdq.rewrite.linear import linear_rules
from bitlower.backends.onnx_qdq.rewrite.low_bit import tied_linear
from bitlower.backends.onnx_qdq.rewrite.quantizers import (
    lower_dequantize,
    lower_quantize,
    raise_quantize,
    sink_dequantize,
)
from bitlower.backends.onnx_qdq.rewrite.rule import APPLIED, Rule, apply_rules
from bitlower.backends.onnx_qdq.rewrite.tables import gather_codes
from bitlower.ir import BitlowerError

Feed = dict[str, np.ndarray]
RANDOM = np.random.default_rng(0)


def parse(text: str) -> ir.Model:
    """A model from ONNX's own text form; shapes of inner values are inferred."""
    head = '<ir_version: 10, opset_import: ["" : 23, "bitlower" : 1]>\n'
    return ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(head + text)))


def rewrite(model: ir.Model, *rules: Rule) -> dict[str, dict[str, object]]:
    editor = Editor(model)
    log = apply_rules(editor, rules)
    editor.finish()
    strip(model)
    return log.to_dict()


def run(model: ir.Model, feed: Feed) -> np.ndarray:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, feed)[0]
    return result


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def refused(log: dict[str, dict[str, object]], rule: str) -> list[str]:
    reasons = log[rule]["refused"]
    assert isinstance(reasons, dict)
    return list(reasons)


ATTENTION = """
attention (float[B,S,8] q, float[B,S,8] k, float[B,S,8] v, bool[B,1,{rows},S] mask) => (float[B,S,8] y)
<int64[4] split = {{0, 0, 2, 4}}, int64[3] join = {{0, 0, 8}}> {{
  q4 = Reshape(q, split)
  k4 = Reshape(k, split)
  v4 = Reshape(v, split)
  qt = Transpose<perm: ints = [0, {perm}, 3]>(q4)
  kt = Transpose<perm: ints = [0, 2, 1, 3]>(k4)
  vt = Transpose<perm: ints = [0, 2, 1, 3]>(v4)
  c = Attention<scale: float = 0.5>(qt, kt, vt, mask)
  ct = Transpose<perm: ints = [0, 2, 1, 3]>(c)
  y = Reshape(ct, join)
}}
"""


def attention_reference(feed: Feed) -> np.ndarray:
    q, k, v = (feed[n].reshape(2, 5, 2, 4).transpose(0, 2, 1, 3).astype(np.float64) for n in "qkv")
    scores = np.where(feed["mask"], 0.5 * q @ k.transpose(0, 1, 3, 2), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    context = weights / weights.sum(-1, keepdims=True) @ v
    return context.transpose(0, 2, 1, 3).reshape(2, 5, 8)


def attention_model(rows: str) -> ir.Model:
    model = parse(ATTENTION.format(rows=rows, perm="2, 1"))
    for node in model.graph:  # shape inference keeps no names of dimensions through Reshape
        if node.op_type == "Transpose":
            node.outputs[0].shape = ir.Shape(["B", 2, "S", 4] if node.outputs[0].name != "ct" else ["B", "S", 2, 4])
        if node.op_type == "Attention":
            node.outputs[0].shape = ir.Shape(["B", 2, "S", 4])
    return model


@pytest.mark.parametrize("rows", ["S", "1"])
def test_attention_takes_linears_as_they_are_whatever_the_mask(rows: str) -> None:
    model = attention_model(rows)
    log = rewrite(model, Rule("attention", flatten_attention), Rule("mask", widen_mask))
    assert log["attention"]["applied"] == 1
    assert operators(model)["Reshape"] == operators(model)["Transpose"] == 0
    mask = RANDOM.random((2, 1, 5 if rows == "S" else 1, 5)) < 0.6
    mask[..., 0] = True
    feed = {name: RANDOM.standard_normal((2, 5, 8)).astype(np.float32) for name in "qkv"} | {"mask": mask}
    np.testing.assert_allclose(run(model, feed), attention_reference(feed), rtol=2e-5, atol=1e-6)


def test_attention_over_other_axes_is_left_and_the_reason_given() -> None:
    model = parse(ATTENTION.format(rows="S", perm="1, 2"))
    log = rewrite(model, Rule("attention", flatten_attention))
    assert refused(log, "attention") == ["its operands are not reshaped and transposed linears"]
    assert operators(model)["Transpose"] == 4


SPLIT_ROWS = """
attention (float[2,6,8] q, float[4,3,8] k, float[4,3,8] v) => (float[4,3,8] y)
<int64[4] split = {4, 3, 2, 4}, int64[3] join = {4, 3, 8}> {
  q4 = Reshape(q, split)
  k4 = Reshape(k, split)
  v4 = Reshape(v, split)
  qt = Transpose<perm: ints = [0, 2, 1, 3]>(q4)
  kt = Transpose<perm: ints = [0, 2, 1, 3]>(k4)
  vt = Transpose<perm: ints = [0, 2, 1, 3]>(v4)
  c = Attention(qt, kt, vt)
  ct = Transpose<perm: ints = [0, 2, 1, 3]>(c)
  y = Reshape(ct, join)
}
"""


def test_attention_whose_operands_are_reshaped_to_another_sequence_is_left() -> None:
    # the heads fit, but each row of q becomes two: flat, every token would see the other half too
    log = rewrite(model := parse(SPLIT_ROWS), Rule("attention", flatten_attention))
    assert refused(log, "attention") == ["its operands are not reshaped and transposed linears"]
    assert operators(model)["Transpose"] == 4


RESIDUAL = """
residual (float[B,S,8] x, float[B,S,8] y) => (float[B,S,8] z)
<float[8] weight = {{1, 1, 1, 1, 1, 1, 1, 1}}> {{
  s = Add(x, {other})
  z = LayerNormalization(s, weight)
}}
"""


def test_a_residual_becomes_a_sum_and_a_constant_shift_does_not() -> None:
    model = parse(RESIDUAL.format(other="y"))
    feed = {name: RANDOM.standard_normal((2, 3, 8)).astype(np.float32) for name in "xy"}
    expected = run(model, feed)
    assert rewrite(model, Rule("sum", residual_sum))["sum"]["applied"] == 1
    assert operators(model) == {"Sum": 1, "LayerNormalization": 1}
    np.testing.assert_allclose(run(model, feed), expected, rtol=1e-5, atol=1e-6)
    log = rewrite(parse(RESIDUAL.format(other="weight")), Rule("sum", residual_sum))
    assert refused(log, "sum") == ["one operand is a constant"]


LINEAR = """
linear (float[B,S,4] x) => (float[B,S,3] y)
<float s = {{0.1}}, float z = {{7.0}}, int8[3,4] w_codes = {{1,-2,3,-4,5,-6,7,-8,9,-10,11,-12}},
 float[3,1] w_scale = {{0.5, 0.25, 0.125}}, float[3,1] w_zero = {{0,0,0}}, float[3] bias = {{1, 2, 3}}> {{
  q = bitlower.Quantize<quant_min: int = 0, quant_max: int = 255, dtype: string = "uint8",
                        name: string = "codes">(x, s, z)
  a = bitlower.Dequantize(q, s, z)
  w = bitlower.Dequantize(w_codes, w_scale, w_zero)
  wt = Transpose<perm: ints = [1, 0]>(w)
  p = MatMul({left}, wt)
  y = Add(p, bias)
}}
"""
LOWER = (Rule("quantize", lower_quantize), Rule("dequantize", lower_dequantize), Rule("bias", widen_bias))


def linear_model(left: str) -> ir.Model:
    model = parse(LINEAR.format(left=left))
    types = {"q": ir.DataType.UINT8, "a": ir.DataType.FLOAT, "w": ir.DataType.FLOAT}
    for node in model.graph:
        value = node.outputs[0]
        if value.name in types:
            value.dtype = types[value.name]
            value.shape = ir.Shape([3, 4] if value.name == "w" else ["B", "S", 4])
        elif value.name in ("p", "y"):
            value.shape, value.dtype = ir.Shape(["B", "S", 3]), ir.DataType.FLOAT
    return model


def linear_reference(x: np.ndarray, *, rounded: bool) -> np.ndarray:
    codes = np.clip(np.rint(x / np.float32(0.1)) + 7, 0, 255)
    weight = np.arange(1, 13).reshape(3, 4) * np.tile([1, -1], 6).reshape(3, 4) * np.array([[0.5], [0.25], [0.125]])
    return ((codes - 7) * 0.1 if rounded else x) @ weight.T + [1.0, 2.0, 3.0]


@pytest.mark.parametrize("form", ["qdq", "onnxruntime"])
@pytest.mark.parametrize("left", ["a", "x"])
def test_linears_multiply_integers_where_the_activation_is_quantized(left: str, form: str) -> None:
    model = linear_model(left)
    log = rewrite(model, *linear_rules(form), *LOWER)  # type: ignore[arg-type]
    if left == "a":
        assert log["integer-linear"]["applied"] == 1
        assert operators(model)["MatMulIntegerToFloat"] == (form == "onnxruntime")
        assert "codes" in {value.name for node in model.graph for value in node.outputs}
    else:
        assert refused(log, "integer-linear") == ["the activation is not quantized"]
        assert log["float-linear"]["applied"] == 1
        assert operators(model)["DequantizeLinear"] == 0
    assert operators(model)["Transpose"] == 0
    assert model.graph.initializers["w_codes"].shape == (4, 3)
    x = RANDOM.standard_normal((2, 5, 4)).astype(np.float32)
    np.testing.assert_allclose(run(model, {"x": x}), linear_reference(x, rounded=left == "a"), rtol=1e-5, atol=1e-5)


VIEW = """
view (uint8[B,4] q) => (float[4,B] y)
<float[1,{size}] s = {{{scale}}}, float z = {{3.0}}> {{
  a = bitlower.Dequantize(q, s, z)
  y = Transpose<perm: ints = [1, 0]>(a)
}}
"""


@pytest.mark.parametrize(("scale", "moved"), [("0.5", True), ("0.5, 1, 2, 4", False)])
def test_dequantization_sinks_below_a_view_only_with_one_scale(scale: str, moved: bool) -> None:
    model = parse(VIEW.format(scale=scale, size=scale.count(",") + 1))
    node = next(iter(model.graph))
    node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT, ir.Shape(["B", 4])
    log = rewrite(model, Rule("sink", sink_dequantize), *LOWER)
    first = next(iter(model.graph)).op_type
    assert (first == "Transpose") == moved
    if not moved:
        assert refused(log, "sink") == ["its scales differ from element to element"]
    codes = RANDOM.integers(0, 256, (3, 4), dtype=np.uint8)
    scales = np.array([float(part) for part in scale.split(",")])
    np.testing.assert_array_equal(run(model, {"q": codes}), ((codes.astype(np.float32) - 3) * scales).T)


SEEN = """
seen (float[B,S,4] x, float[4] g) => (float[B,S,4] h, float[S,B,4] y)
<float s = {0.5}, float z = {3}> {
  h = LayerNormalization(x, g)
  t = Transpose<perm: ints = [1, 0, 2]>(h)
  q = bitlower.Quantize<quant_min: int = 0, quant_max: int = 255, dtype: string = "uint8", name: string = "codes">(
    t, s, z
  )
  y = bitlower.Dequantize(q, s, z)
}
"""


def test_an_output_that_is_quantized_in_another_layout_stays_as_it_is() -> None:
    """Without the rule onnxruntime rounds ``h`` itself."""
    model = parse(SEEN)
    transpose, quantize = (node for node in model.graph if node.op_type in ("Transpose", "Quantize"))
    transpose.outputs[0].dtype, transpose.outputs[0].shape = ir.DataType.FLOAT, ir.Shape(["S", "B", 4])
    quantize.outputs[0].dtype, quantize.outputs[0].shape = ir.DataType.UINT8, ir.Shape(["S", "B", 4])
    log = rewrite(model, Rule("raise", raise_quantize), *LOWER)
    assert log["raise"]["applied"] == 1
    assert [node.op_type for node in model.graph][1:3] == ["QuantizeLinear", "Transpose"]
    assert next(node.outputs[0].name for node in model.graph if node.op_type == "Transpose") == "codes"
    x = RANDOM.standard_normal((2, 3, 4)).astype(np.float32)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    seen, rounded = session.run(None, {"x": x, "g": np.ones(4, np.float32)})
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(seen, expected, atol=1e-5)
    np.testing.assert_allclose(rounded, np.round(seen / 0.5).transpose(1, 0, 2) * 0.5)


TABLE = """
table (int64[B] i) => (float[B,2] y)
<uint8[3,2] t_codes = {{1,2,3,4,5,6}}, float[{rows}] s = {{{scale}}}, float[{rows}] z = {{{zero}}}> {{
  t = bitlower.Dequantize(t_codes, s, z)
  y = Gather<axis: int = 0>(t, i)
}}
"""


@pytest.mark.parametrize(
    ("rows", "scale", "zero", "applied"),
    [("1", "0.5", "2", 1), ("3,1", "0.5, 1, 2", "2, 0, 1", 1), ("3,2", "1,2,3,4,5,6", "1,1,1,1,1,1", 0)],
)
def test_only_the_rows_that_are_read_are_dequantized(rows: str, scale: str, zero: str, applied: int) -> None:
    model = parse(TABLE.format(rows=rows, scale=scale, zero=zero))
    table = next(iter(model.graph)).outputs[0]
    table.dtype, table.shape = ir.DataType.FLOAT, ir.Shape([3, 2])
    log = rewrite(model, Rule("gather", gather_codes), *LOWER)
    assert log["gather"]["applied"] == applied
    codes = np.arange(1, 7).reshape(3, 2)
    shape = [int(n) for n in rows.split(",")]
    scales, zeros = (np.array([float(v) for v in text.split(",")]).reshape(shape) for text in (scale, zero))
    rows_read = np.array([2, 0, 2, 1])
    np.testing.assert_array_equal(run(model, {"i": rows_read}), ((codes - zeros) * scales)[rows_read])


TIED = """
tied (float[B,4] x) => (float[B,4] y, float[4,4] z)
<float[4,4] table = {{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}}> {{
  turned = Transpose<perm: ints = {perm}>(table)
  y = MatMul(x, turned)
  z = Neg(table)
}}
"""


@pytest.mark.parametrize(("perm", "applied"), [("[1, 0]", 1), ("[0, 1]", 0)])
def test_a_table_that_is_read_as_it_lies_and_turned_is_stored_once(perm: str, applied: int) -> None:
    model = parse(TIED.format(perm=perm))
    log = rewrite(model, Rule("tied", tied_linear))
    assert log["tied"]["applied"] == operators(model)["FusedMatMul"] == applied
    assert refused(log, "tied") == ([] if applied else ["the weight is not a transposed matrix"])
    assert len(model.graph.initializers) == 1
    x = RANDOM.standard_normal((3, 4)).astype(np.float32)
    table = np.arange(1.0, 17).reshape(4, 4)
    expected = x.astype(np.float64) @ (table.T if applied else table)
    np.testing.assert_allclose(run(model, {"x": x}), expected, rtol=1e-5, atol=1e-6)


def test_a_value_that_is_also_an_output_has_more_than_one_reader() -> None:
    model = parse(
        "g (float[4] x) => (float[4] inner, float[4] y) { inner = Neg(x)\n hidden = Abs(x)\n y = Add(inner, hidden) }"
    )
    values = {value.name: value for node in model.graph for value in node.outputs}
    assert only_user(values["inner"]) is None
    assert only_user(values["hidden"]) is values["y"].producer()
    assert only_user(values["y"]) is None


def test_nothing_of_the_exporter_s_notes_stays_in_the_file() -> None:
    model = parse("g (float[4] x) => (float[4] y) <float[4] w = {1, 2, 3, 4}> { inner = Neg(x)\n y = Add(inner, w) }")
    values = [*model.graph.inputs, *model.graph.initializers.values(), *(v for n in model.graph for v in n.outputs)]
    for noted in (model, model.graph, *model.graph, *values):
        noted.metadata_props["source"] = noted.doc_string = "/home/me/model.py"
    strip(model)
    assert b"/home/me" not in ir.to_proto(model).SerializeToString()


def test_constants_share_a_name_only_if_they_are_equal() -> None:
    model = parse(RESIDUAL.format(other="y"))
    editor = Editor(model)
    first = editor.constant("scale", np.float32(1))
    assert editor.constant("scale", np.float32(1)) is first
    second = editor.constant("scale", np.float32(2))
    node = next(iter(model.graph))
    editor.replace(node.outputs[0], editor.emit(node, "Sum", [*node.inputs, first, second]))
    editor.finish()
    values = {name: value.const_value.numpy().item() for name, value in model.graph.initializers.items() if "s" in name}
    assert values == {"scale": 1.0, "scale_1": 2.0}


def test_scales_are_spread_over_their_blocks_but_not_over_a_dynamic_axis() -> None:
    scale = np.array([[1.0, 2.0, 3.0]])
    np.testing.assert_array_equal(spread(scale, ("batch", 6)), [[1, 1, 2, 2, 3, 3]])
    assert spread(np.array([[4.0]]), ("batch", 6)).shape == ()
    with pytest.raises(BitlowerError, match="dynamic axis 'batch'"):
        spread(scale.T, ("batch", 6))


def test_a_rule_that_applies_says_so() -> None:
    model = parse(RESIDUAL.format(other="y"))
    outcomes = [residual_sum(Editor(model), node) for node in list(model.graph)]
    assert outcomes == [APPLIED, None]

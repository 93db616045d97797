"""Each check holds on a right model and fails on a wrong one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

from bitlower.backends.onnx_qdq import export
from bitlower.backends.onnx_qdq.rewrite.pipeline import lower
from bitlower.backends.onnx_qdq.verify import codes as code_comparison
from bitlower.backends.onnx_qdq.verify import compare
from bitlower.backends.onnx_qdq.verify.codes import CodeComparison
from bitlower.backends.onnx_qdq.verify.compare import verify_export
from bitlower.backends.onnx_qdq.verify.record import Verification
from bitlower.backends.onnx_qdq.verify.runtime_kernels import optimized_model
from bitlower.backends.onnx_qdq.verify.tally import Tally
from bitlower.frontends.tokenize import windows
from bitlower.ir import BitlowerError, CheckError, Program, Scheme
from bitlower.passes import Context
from bitlower.passes.lowering.lower_integer import LowerInteger
from bitlower.passes.quantizers.calibrate import Calibrate
from bitlower.passes.quantizers.quantize import Quantize


def tensor(name, change):
    """An edit that replaces an initializer by ``change`` of it."""

    def edit(model: onnx.ModelProto) -> None:
        found = next(t for t in model.graph.initializer if t.name == name)
        old = numpy_helper.to_array(found)
        found.CopyFrom(numpy_helper.from_array(np.asarray(change(old.copy()), old.dtype), name))

    return edit


def node(name, change):
    """An edit that calls ``change`` on a node."""
    return lambda model: change(next(n for n in model.graph.node if n.name == name))


def own_parameter(name, index, value):
    """An edit that gives one node a constant of its own in place of a shared one."""

    def edit(model: onnx.ModelProto) -> None:
        found = next(n for n in model.graph.node if n.name == name)
        old = next(t for t in model.graph.initializer if t.name == found.input[index])
        array = np.asarray(value, numpy_helper.to_array(old).dtype)
        model.graph.initializer.append(numpy_helper.from_array(array, f"{name}_own"))
        found.input[index] = f"{name}_own"

    return edit


def narrow_clip(model: onnx.ModelProto) -> None:
    """Codes of x end at 150."""
    index, found = next((i, n) for i, n in enumerate(model.graph.node) if n.name == "Q_x_codes")
    found.output[0] = "x_wide"
    model.graph.initializer.append(numpy_helper.from_array(np.array(0, np.uint8), "low"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(150, np.uint8), "high"))
    model.graph.node.insert(index + 1, helper.make_node("Clip", ["x_wide", "low", "high"], ["x_codes"], name="Clip"))


def swapped(array):
    array[0, 0], array[1, 0] = array[1, 0], array[0, 0]
    return array


def flipped(array):
    array[3, 2] ^= 1
    return array


def reading(index, name):
    return lambda n: n.input.__setitem__(index, name)


def approximate(n):
    n.attribute.append(helper.make_attribute("approximate", "tanh"))


def renamed(n):
    n.output[0] = "other"


def drop_quantizer(model: onnx.ModelProto) -> None:
    """The second linear reads the float value; its quantizer is gone."""
    keep = [n for n in model.graph.node if n.name not in ("Q_act_codes", "DQ_act_codes")]
    for n in keep:
        n.input[:] = ["gelu" if i == "act_codes_real" else i for i in n.input]
    del model.graph.node[:]
    model.graph.node.extend(keep)


BROKEN = {
    "activation scale": (tensor("act_codes.scale", lambda a: a * 1.001), "scale of act_codes is not the program's"),
    "scale where codes are read": (own_parameter("DQ_act_codes", 1, 0.0174), "scale of act_codes at DequantizeLinear"),
    "zero point": (tensor("act_codes.zero_point", lambda a: a + 1), "zero point of act_codes"),
    "zero point where codes are read": (own_parameter("DQ_x_codes", 2, 121), "zero point of x_codes at Deq"),
    "weight scale": (tensor("up.weight_scale", lambda a: np.nextafter(a, np.inf)), "scale of up.weight_codes"),
    "swapped codes": (tensor("up.weight_codes", swapped), "2 of the 128 codes of up.weight_codes"),
    "one code": (tensor("down.weight_codes", flipped), "1 of the 128 codes of down.weight_codes"),
    "weights of another layer": (node("DQ_up", reading(1, "x_codes.scale")), "scale of up.weight_codes"),
    "bias": (tensor("up.bias", lambda a: a + 0.001), r"%act_codes \(linear-input of %gelu.*steps from its value"),
    "last bias": (tensor("down.bias", lambda a: a + 0.001), "the output y is .* standard deviations off"),
    "approximate gelu": (node("Gelu", approximate), r"%act_codes .*steps from its value"),
    "narrow clip": (narrow_clip, r"%x_codes .*round\(x / scale\)"),
    "dropped quantizer": (drop_quantizer, r"quantizer %act_codes \(linear-input of %gelu in act\) is not in the model"),
    "bypassed quantizer": (node("MatMul_down", reading(0, "gelu")), "a MatMulNBits that rounds its float activations"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_is_refused_and_the_tensor_named(handmade, tmp_path: Path, name: str):
    edit, message = BROKEN[name]
    with pytest.raises(CheckError, match=message):
        verify_export(handmade.program, handmade.write(tmp_path, edit), handmade.batches)


def test_a_bypassed_quantizer_shows_in_the_output_too(handmade, tmp_path: Path):
    folder = handmade.write(tmp_path, node("MatMul_down", reading(0, "gelu")))
    config = {"session.qdq_matmulnbits_accuracy_level": "0"}
    with pytest.raises(CheckError, match=r"the output y is .* standard deviations off"):
        verify_export(handmade.program, folder, handmade.batches, session_config=config)


def test_a_code_may_lie_as_far_off_as_float_arithmetic_moves_its_value(handmade, tmp_path: Path, monkeypatch):
    """The bias that is refused above passes where linears that round otherwise move the value by as much."""
    folder = handmade.write(tmp_path, BROKEN["bias"][0])
    monkeypatch.setattr(code_comparison, "ROUNDING", 2e-3)
    row = next(row for row in verify_export(handmade.program, folder, handmade.batches).quantized if row.excess > 0)
    assert row.name == "act_codes"
    assert 255 * 2e-5 < row.excess <= row.tie <= 0.25


def test_a_right_model_passes_with_all_figures(handmade, tmp_path: Path):
    result = verify_export(handmade.program, handmade.write(tmp_path), handmade.batches)
    assert [row.name for row in result.quantized] == ["x_codes", "act_codes"]
    first, second = result.quantized
    assert (first.tensor, first.role, first.codes) == ("x", "linear-input", (2 + 7 + 64 + 5 + 3) * 8)
    assert (first.equal, first.off_by_one, first.worst, first.exact) == (1.0, 0.0, 0, 1.0)
    assert second.exact == 1.0
    assert second.excess <= second.tie == pytest.approx(2e-5 * 255)
    assert (result.batches, result.tokens) == (5, (2 + 7 + 64 + 5 + 3) * 8)
    assert result.summary()["unseen_sizes"] == "batch 3"
    assert result.constants == {"tensors": 2, "codes": 256}
    assert result.exposing == 0
    assert (result.kernels.expected, result.kernels.found) == (2, 2)
    assert result.runtime["provider"] == "CPUExecutionProvider"


def test_float_weights_may_lie_in_files(handmade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = verify_export(handmade.program, handmade.write(tmp_path), handmade.batches)
    spilled, with_float_weights = [], compare.with_float_weights

    def noted(program: Program, *, mapped: bool) -> Program:
        spilled.append(mapped)
        return with_float_weights(program, mapped=mapped)

    monkeypatch.setattr(compare, "with_float_weights", noted)
    monkeypatch.setattr(compare, "HELD_BYTES", 1)
    assert verify_export(handmade.program, tmp_path, handmade.batches) == whole
    assert spilled == [True]


def test_values_are_read_for_so_many_tokens_as_fit(lowered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All tokens of a small batch, the first 16 of a long one; the comparisons of codes see all."""
    program = lowered("llama", "W8A8-token")
    ids = torch.randint(0, 96, (1, 40), generator=torch.Generator().manual_seed(0))
    lengths, compare = [], code_comparison.within
    monkeypatch.setattr(code_comparison, "LARGEST_VALUES", 1)

    def noted(*arguments):
        part = compare(*arguments)
        lengths.append((arguments[1]["input_ids"].shape[1], part["input_ids"].shape[1]))
        return part

    monkeypatch.setattr(code_comparison, "within", noted)
    export(program, tmp_path, batches=windows(program, ids))
    assert (40, 16) in lengths
    assert all(read == min(length, 16) for length, read in lengths)


def test_figures_are_those_of_numpy(handmade, tmp_path: Path):
    """Errors of outputs against float64 formulas; the bias is off by an amount that the thresholds let through."""
    edit = tensor("down.bias", lambda a: a + np.float32(2e-5))
    [row] = verify_export(handmade.program, handmade.write(tmp_path, edit), handmade.batches[1:2]).outputs
    small = handmade.batches[1]["x"][:2]
    ours = (
        handmade.program(x=torch.cat([small, handmade.batches[1]["x"], handmade.batches[1]["x"][:3]]))["y"]
        .detach()
        .double()
        .numpy()
    )
    assert row.mean == pytest.approx(2e-5, rel=0.05)
    assert row.relative == pytest.approx(row.worst / ours.std(), rel=1e-6)
    assert row.given_codes == pytest.approx(row.relative, rel=1e-6)
    assert row.cosine == pytest.approx(1, abs=1e-6)


def test_batches_are_limited_and_read_one_at_a_time(handmade, tmp_path: Path):
    def given():
        yield handmade.batches[0]
        yield handmade.batches[2]
        pytest.fail("a batch too many was read")

    assert verify_export(handmade.program, handmade.write(tmp_path), given(), limit=2).batches == 4


def test_a_model_that_has_the_sizes_of_its_batches_baked_in_is_refused(handmade, tmp_path: Path):
    """All batches have two rows, and so has the part of the first that is kept."""

    def edit(model: onnx.ModelProto) -> None:
        next(n for n in model.graph.node if n.name == "Bias_down").output[0] = "y_before"
        model.graph.initializer.append(numpy_helper.from_array(np.array([2, 8], np.int64), "rows"))
        model.graph.node.append(helper.make_node("Reshape", ["y_before", "rows"], ["y"], name="Baked"))

    two = [{"x": batch["x"][:2]} for batch in handmade.batches]
    assert verify_export(handmade.program, handmade.write(tmp_path / "right"), two).batches == 5
    with pytest.raises(CheckError, match=r"at batch 3, which tracing and calibration did not have: .*(Baked|Reshape)"):
        verify_export(handmade.program, handmade.write(tmp_path / "wrong", edit), two)


def test_a_constant_that_was_a_size_is_found_where_every_shape_is_right(handmade, tmp_path: Path):
    def edit(model: onnx.ModelProto) -> None:
        """The result times 2 over the number of rows."""
        next(n for n in model.graph.node if n.name == "Bias_down").output[0] = "y_before"
        model.graph.initializer.append(numpy_helper.from_array(np.array(2, np.float32), "two"))
        model.graph.node.extend(
            [
                helper.make_node("Shape", ["y_before"], ["rows"], start=0, end=1),
                helper.make_node("Cast", ["rows"], ["rows_float"], to=onnx.TensorProto.FLOAT),
                helper.make_node("Div", ["two", "rows_float"], ["factor"]),
                helper.make_node("Mul", ["y_before", "factor"], ["y"]),
            ]
        )

    two = [{"x": batch["x"][:2]} for batch in handmade.batches]
    message = (
        r"^at batch 3, which tracing and calibration did not have: the exported model is not its program: the outp"
    )
    with pytest.raises(CheckError, match=message):
        verify_export(handmade.program, handmade.write(tmp_path, edit), two)


def test_no_batch_is_bad_input(handmade, tmp_path: Path):
    with pytest.raises(BitlowerError, match="without a batch") as caught:
        verify_export(handmade.program, handmade.write(tmp_path), [])
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("share", [0.0, 0.4, 0.99])
def test_a_truncated_or_empty_file_is_refused(handmade, tmp_path: Path, share: float):
    path = handmade.write(tmp_path) / "model.onnx"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckError, match="model"):
        verify_export(handmade.program, tmp_path, handmade.batches)


def test_a_missing_file_is_refused(handmade, tmp_path: Path):
    with pytest.raises(CheckError, match=r"model\.onnx"):
        verify_export(handmade.program, tmp_path, handmade.batches)


def test_an_output_of_another_name_is_refused(handmade, tmp_path: Path):
    def edit(model: onnx.ModelProto) -> None:
        node("Bias_down", renamed)(model)
        model.graph.output[0].name = "other"

    with pytest.raises(CheckError, match="no output 'y'"):
        verify_export(handmade.program, handmade.write(tmp_path, edit), handmade.batches)


def test_the_file_is_deterministic_and_reads_back(handmade, tmp_path: Path):
    texts = []
    for name in ("a", "b"):
        folder = handmade.write(tmp_path / name)
        result = verify_export(handmade.program, folder, handmade.batches)
        result.write(folder)
        texts.append((folder / "verification.json").read_bytes())
        assert Verification.read(folder).to_dict() == result.to_dict()
    assert texts[0] == texts[1]
    assert str(tmp_path).encode() not in texts[0]
    form = json.loads(texts[0])
    assert list(form) == sorted(form)
    assert form["summary"]["codes_equal_given_codes"] <= 1
    for value in (form["outputs"][0]["mean"], form["quantized"][1]["equal"]):
        assert value == float(f"{value:.6g}")


def test_a_damaged_file_is_refused(handmade, tmp_path: Path):
    result = verify_export(handmade.program, handmade.write(tmp_path), handmade.batches[:1]).to_dict()
    for key in ("outputs", "kernels", "selftest"):
        with pytest.raises(CheckError, match="damaged"):
            Verification.from_dict({k: v for k, v in result.items() if k != key})
    (tmp_path / "verification.json").write_text("{")
    with pytest.raises(CheckError, match="damaged"):
        Verification.read(tmp_path)


def lowered(program: Program, scheme: str, batches) -> Program:
    context = Context(calibration=batches)
    for step in (Quantize(scheme=Scheme.parse(scheme)), Calibrate(), LowerInteger()):
        step.run(program, context)
        program.recompile()
    return program


@pytest.mark.parametrize(
    ("scheme", "kernels"),
    [("W8A8", 3), ("W8A8-full", 2), ("W8A8-token", 3), ("W8A8-peg4", 0), ("W4A16-g8", 0), ("W8A12", 0)],
)
def test_real_exports_of_every_kind_hold(tiny_program: Program, tmp_path: Path, scheme: str, kernels: int):
    """Static, dynamic, grouped and weight-only quantizers: codes are right but for ties, in every case."""
    import onnx_ir

    batches = [{"x": torch.randn(40, 16, generator=torch.Generator().manual_seed(seed))} for seed in range(3)]
    program = lowered(tiny_program, scheme, batches)
    onnx_ir.save(lower(program, opset=23, form="qdq")[0], tmp_path / "model.onnx")
    result = verify_export(program, tmp_path, batches)
    assert result.constants["tensors"] >= 3
    assert (result.kernels.expected, result.kernels.found) == (kernels, kernels)
    assert all(row.exact == 1.0 for row in result.quantized)
    assert all(row.given_codes < 2e-5 for row in result.outputs)
    assert bool(result.quantized) == (scheme != "W4A16-g8")


def test_a_float_program_is_compared_by_its_outputs(tiny_program: Program, tmp_path: Path):
    import onnx_ir

    batches = [{"x": torch.randn(6, 16)}]
    onnx_ir.save(lower(tiny_program, opset=23, form="qdq")[0], tmp_path / "model.onnx")
    result = verify_export(tiny_program, tmp_path, batches)
    assert [row.name for row in result.outputs] == ["hidden", "logits"]
    assert result.quantized == ()
    assert result.constants == {"tensors": 0, "codes": 0}
    assert result.kernels.float_reasons == {"the weight is float": 3} or result.kernels.expected == 0
    with torch.no_grad():
        tiny_program.module.get_parameter("head.bias").add_(0.01)
    with pytest.raises(CheckError, match="the output logits"):
        verify_export(tiny_program, tmp_path, batches)


def test_tallies_are_shares_over_all_batches(handmade):
    tally = Tally()
    tally.add_alone(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 3, 3, 7]))
    tally.add_alone(torch.tensor([5, 6], dtype=torch.uint8), torch.tensor([6, 6], dtype=torch.uint8))
    tally.add_exact(torch.tensor([1.0, 2.0]), torch.tensor([1, 3]))
    quantizer = next(q for _, q in handmade.program.quantizers())
    row = tally.row("q", quantizer, "layer")
    assert (row.codes, row.worst, row.exact) == (6, 3, 0.5)
    assert math.isclose(row.equal, 3 / 6)
    assert math.isclose(row.off_by_one, 2 / 6)


def test_the_program_is_run_on_the_codes_that_the_runtime_gave(handmade, tmp_path: Path):
    """A bias that is off by two steps moves codes of the second quantizer; what follows them is numpy's."""

    def read_codes(model: onnx.ModelProto) -> None:
        model.graph.output.append(helper.make_tensor_value_info("act_codes", onnx.TensorProto.UINT8, ["batch", 16]))

    other_bias = tensor("up.bias", lambda a: a + np.float32(0.04))
    batch, folder = handmade.batches[1], handmade.write(tmp_path, other_bias)
    with optimized_model(folder / "model.onnx", {}) as optimized:
        comparison = CodeComparison(handmade.program, folder / "model.onnx", optimized.path, {})
    read, _ = comparison.read(batch)
    alone, given = comparison.compare_alone(batch, read), comparison.compare_given_codes(batch, read)

    session = onnxruntime.InferenceSession(handmade.write(tmp_path / "codes", other_bias, read_codes) / "model.onnx")
    [codes] = session.run(["act_codes"], {"x": batch["x"].numpy()})
    arrays = {name: array.astype(np.float64) for name, array in handmade.tensors.items()}
    weight = arrays["down.weight_codes"] * arrays["down.weight_scale"]
    expected = (codes.astype(np.float64) - 10) * arrays["act_codes.scale"] @ weight + arrays["down.bias"]
    np.testing.assert_allclose(given["y"].detach().numpy(), expected, rtol=0, atol=2e-5)
    assert np.abs(alone["y"].detach().numpy() - expected).max() > 1e-2

    first, second = comparison.rows()
    assert (first.excess, first.equal) == (0, 1)
    # beyond rounding, codes of what is off by 0.04 / 0.0173 = 2.3 steps are off by so much at most
    assert second.excess == pytest.approx(0.04 / 0.0173, abs=0.3)
    assert second.equal < 0.5

"""What a scheme and an algorithm stand for."""

from __future__ import annotations

import pytest

from bitlower.backends.registry import make_backend
from bitlower.ir import BitlowerError
from bitlower.tools.runs.standard import default_algorithm, standard_exports, standard_passes


@pytest.mark.parametrize(
    ("scheme", "calibrated", "algorithm"),
    [
        ("W4A16-g128", True, "gptq"),
        ("W4A16-g128", False, "rtn"),
        ("W2A16", True, "gptq"),
        ("W8A16", True, "calibrate"),
        ("W8A8", True, "calibrate"),
        ("W4A8", True, "calibrate"),
        ("W16A8", True, "calibrate"),
    ],
)
def test_the_algorithm_follows_from_the_scheme(scheme: str, calibrated: bool, algorithm: str) -> None:
    assert default_algorithm(scheme, calibrated=calibrated) == algorithm


@pytest.mark.parametrize(
    ("scheme", "algorithm", "names"),
    [
        ("W8A8", None, "clean quantize smooth calibrate lower-integer"),
        ("W8A8", "gptq", "clean quantize smooth gptq calibrate lower-integer"),
        ("W4A8", "adaround", "clean quantize smooth adaround calibrate lower-integer"),
        ("W4A16", "adaround", "clean quantize adaround lower-integer"),
        ("W4A16-g128", None, "clean quantize gptq lower-integer"),
        ("W4A16-g128", "rtn", "clean quantize rtn lower-integer"),
        ("W4A16-g128", "calibrate", "clean quantize calibrate lower-integer"),
    ],
)
def test_pipelines(scheme: str, algorithm: str | None, names: str) -> None:
    passes = standard_passes(scheme, ["lm_head"], algorithm=algorithm)
    assert [pass_.name for pass_ in passes] == names.split()
    assert passes[1].parameters()["ignore"] == ("lm_head",)


@pytest.mark.parametrize(
    ("scheme", "algorithm", "names"),
    [
        ("W4A16-g128", None, "clean quantize rtn lower-integer"),
        ("W8A16", None, "clean quantize calibrate lower-integer"),
        ("W8A8-token", None, "clean quantize calibrate lower-integer"),
        ("W4A8-token", "rtn", "clean quantize rtn calibrate lower-integer"),
    ],
)
def test_pipelines_without_data(scheme: str, algorithm: str | None, names: str) -> None:
    passes = standard_passes(scheme, algorithm=algorithm, calibrated=False)
    assert [pass_.name for pass_ in passes] == names.split()


@pytest.mark.parametrize(
    ("scheme", "algorithm", "message"),
    [
        ("W8A8", None, "W8A8 has static activations, whose ranges need calibration data"),
        ("W8A8-full", None, "static activations"),
        ("W4A16-g128", "gptq", "gptq needs calibration data"),
        ("W8A8-token", "gptq", "gptq needs calibration data"),
        ("W4A16", "adaround", "adaround needs calibration data"),
    ],
)
def test_what_needs_data_is_refused_without(scheme: str, algorithm: str | None, message: str) -> None:
    with pytest.raises(BitlowerError, match=message):
        standard_passes(scheme, algorithm=algorithm, calibrated=False)


def test_checkpoints_alone_leave_heads_in_float() -> None:
    def scheme(name: str, *formats: str) -> str:
        return str(standard_passes(name, formats=formats)[1].scheme)  # type: ignore[attr-defined]

    assert scheme("W4A16-g128", "checkpoint") == scheme("W4A16-g128", "gptq-v2") == "W4A16-g128-e16"
    assert scheme("W4A16-g128", "checkpoint", "onnx-qdq") == scheme("W4A16-g128") == "W4A16-g128"
    assert scheme("W4A16-g128", "tvm-kernels") == "W4A16-g128"
    assert scheme("W4A16-g128-e8", "checkpoint") == "W4A16-g128-e8"


def test_formats() -> None:
    assert standard_exports("W8A8") == (make_backend("onnx-qdq"),)
    assert standard_exports("W4A16-g128") == (make_backend("onnx-qdq", {"form": "onnxruntime"}),)
    assert standard_exports("W4A16-g128", ["onnx-qdq", "gptq-v2"]) == (
        make_backend("onnx-qdq", {"form": "onnxruntime"}),
        make_backend("checkpoint", {"format": "gptq-v2"}),
    )
    with pytest.raises(BitlowerError, match="unknown format 'checkpint'; did you mean 'checkpoint'"):
        standard_exports("W8A8", ["checkpint"])
    with pytest.raises(BitlowerError, match="unknown algorithm"):
        standard_passes("W8A8", algorithm="awq")

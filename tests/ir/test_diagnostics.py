import doctest

import torch
from torch import fx

from bitlower.ir import BitlowerError, CheckError, describe, diagnostics, nearest


def test_exit_codes_tell_bad_input_from_failed_checks():
    assert BitlowerError("x").exit_code == 2
    assert CheckError("x").exit_code == 1
    assert isinstance(CheckError("x"), BitlowerError)


def test_the_hint_follows_the_message():
    error = BitlowerError("no pass 'quantise'", hint="did you mean 'quantize'?")
    assert str(error) == "no pass 'quantise'; did you mean 'quantize'?"
    assert (error.message, error.hint) == ("no pass 'quantise'", "did you mean 'quantize'?")
    assert str(BitlowerError("alone")) == "alone"


def test_nearest_names_the_closest_and_then_all():
    assert nearest("calibarte", ["quantize", "calibrate"]) == "did you mean 'calibrate'? known: calibrate, quantize"
    assert nearest("xyz", ["quantize"]) == "known: quantize"
    assert nearest("xyz", []) == "none is known"
    assert doctest.testmod(diagnostics).failed == 0


def test_describe_names_node_path_and_source():
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(torch.ops.aten.relu.default, (x,))
    assert describe(node) == "%relu_default (call_function relu.default)"
    node.meta = {"path": "encoder.layer.0", "source": "model.py:7: y = relu(x)"}
    assert describe(node) == "%relu_default (call_function relu.default) in encoder.layer.0 at model.py:7: y = relu(x)"
    assert describe(x) == "%x (placeholder x)"

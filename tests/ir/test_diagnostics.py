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


def _longest(text):
    return len(text) <= 2000 and len(text.splitlines()) <= 25


def test_no_message_is_longer_than_a_screen():
    for message in ("x" * 10**6, "line\n" * 10**5, "\n" * 10**5, "\0" * 10**5, "\n".join(["y" * 5000] * 30)):
        error = BitlowerError(message, hint=message)
        assert _longest(str(error)), message[:10]
        assert _longest(BitlowerError(f"place: {error.message}", hint=error.hint).message)


def test_a_cut_message_keeps_its_beginning_and_its_hint():
    text = str(BitlowerError("the value " + "9" * 10**6 + " is wrong", hint="take another"))
    assert text.startswith("the value 999")
    assert " … " in text
    assert text.endswith("9 is wrong; take another")
    lines = str(BitlowerError("\n".join(map(str, range(100))))).splitlines()
    assert lines == [*map(str, range(19)), "… and 81 more lines"]


def test_what_a_terminal_would_obey_or_cannot_show_is_escaped():
    assert str(BitlowerError("a\x1b[31mb\ud800c\u202ed\te\u00a0f ä 😀")) == (
        "a\\x1b[31mb\\ud800c\\u202ed\te\u00a0f ä 😀"
    )


def test_nearest_takes_any_name_and_any_number_of_known_ones():
    assert nearest("x" * 10**6, ["quantize"]) == "known: quantize"
    many = nearest("name7x", [f"name{n}" for n in range(30_000)])
    assert many.startswith("did you mean 'name")
    assert many.endswith(", … (30000 in all)")
    assert len(many) < 1000

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitlower.ir import BitlowerError
from bitlower.passes._machinery.patterns import Patterns

NAMES = ["encoder.layer.1.output.dense", "encoder.layer.11.output.dense", "pooler.dense", "pooler.dense.weight"]


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("pooler.dense", [2, 3]),
        ("pooler", [2, 3]),
        ("encoder.layer.1", [0]),
        ("encoder.layer.1*", [0, 1]),
        ("*.dense", [0, 1, 2, 3]),
        ("*.output", [0, 1]),
        ("encoder.layer.*1", [0, 1]),
        ("*.outpu", []),
        ("*.layer.?.*", [0]),
        ("encoder.layer.[02].*", []),
        ("re:.*dense", [0, 1, 2]),
        ("re:encoder\\.layer\\.1\\.output\\.dense", [0]),
        ("re:dense", []),
        ("POOLER", []),
        ("dense", []),
    ],
)
def test_what_a_pattern_matches(pattern: str, matched: list[int]) -> None:
    assert [i for i, name in enumerate(NAMES) if Patterns([pattern]).match(name)] == matched


@given(st.text("ab.", min_size=1, max_size=8), st.text("ab.", max_size=4))
def test_a_plain_path_matches_itself_and_what_lies_below(path: str, rest: str) -> None:
    name = path + rest
    assert Patterns([path]).match(name) == (name == path or name.startswith(path + "."))


@given(st.from_regex(r"[ab.]*(\[ab\])?b?\*?", fullmatch=True), st.text("ab.", max_size=6))
def test_a_regular_expression_has_to_match_the_whole_path(expression: str, name: str) -> None:
    try:
        expected = re.match(rf"(?:{expression})\Z", name) is not None
    except re.error:
        return
    assert Patterns([f"re:{expression}"]).match(name) == expected


def test_one_of_several_names_is_enough() -> None:
    assert Patterns(["a.weight"]).match("a", "a.weight")
    assert not Patterns([]).match("a")


def test_unused_patterns_are_errors_with_the_nearest_name() -> None:
    patterns = Patterns(["pooler", "encoder.layer.1.output.dens"])
    patterns.match("pooler.dense")
    with pytest.raises(
        BitlowerError, match=r"the ignore pattern 'encoder\.layer\.1\.output\.dens' matches nothing"
    ) as e:
        patterns.require_used("ignore", NAMES)
    assert e.value.hint == "did you mean 'encoder.layer.1.output.dense'?"


def test_a_pattern_near_nothing_points_at_the_plan() -> None:
    with pytest.raises(BitlowerError, match="see `bitlower plan`"):
        Patterns(["re:zzzzzz"]).require_used("targets", ["a.b"])


def test_every_pattern_that_matches_counts_as_used() -> None:
    patterns = Patterns(["pooler", "*.dense"])
    assert patterns.match("pooler.dense")
    patterns.require_used("ignore", NAMES)


def test_a_malformed_expression_is_an_error() -> None:
    with pytest.raises(BitlowerError, match=r"'re:\(' is no regular expression"):
        Patterns(["re:("])

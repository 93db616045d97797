"""Conditions of ``--fail-if``."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitlower.ir import BitlowerError
from bitlower.tools.verdict.conditions import Condition, judge, parse_conditions

NUMBERS = st.floats(-1e6, 1e6, allow_nan=False)


@given(st.sampled_from(["<", "<=", ">", ">="]), NUMBERS, NUMBERS, st.sampled_from(["", " ", "  "]))
def test_conditions_hold_as_python_compares(operator: str, limit: float, value: float, space: str) -> None:
    (condition,) = parse_conditions([f"kl{space}{operator}{space}{limit!r}"])
    assert condition == Condition("kl", operator, limit)
    assert condition.holds(value) is eval(f"{value!r} {operator} {limit!r}")


@pytest.mark.parametrize("text", ["", "kl", "kl = 3", "kl >", "> 3", "kl > a", "kl > 1.2.3", "kl > 3 nats", "3 < kl"])
def test_what_is_no_condition_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(BitlowerError, match="is no condition") as error:
        parse_conditions([text])
    assert '--fail-if "kl > 0.05"' in str(error.value)


def test_an_unknown_figure_is_refused_before_work() -> None:
    with pytest.raises(BitlowerError, match="did you mean 'cosine'"):
        parse_conditions(["cosin < 1"], ["cosine", "kl"])
    assert parse_conditions(["top-1 < 1"], ["top_1"]) == (Condition("top_1", "<", 1.0),)


def test_every_condition_that_holds_is_named() -> None:
    conditions = parse_conditions(["kl > 0.05", "cosine < 0.9", "top1 < 80"])
    judged = judge(conditions, {"kl": 0.06, "cosine": 0.95, "top1": 70.0})
    assert not judged.accepted
    assert judged.text == "REGRESSION: kl is 0.06 and fails if > 0.05; top1 is 70 and fails if < 80"
    judged = judge(conditions, {"kl": 0.05, "cosine": 0.9, "top1": 80.0})
    assert judged.accepted
    assert judged.text.startswith("ACCEPT: kl is 0.05 and fails if > 0.05; ")


def test_a_figure_that_is_no_number_fails() -> None:
    assert not judge(parse_conditions(["kl > 1"]), {"kl": math.nan}).accepted


def test_a_figure_that_was_not_measured_is_an_error() -> None:
    with pytest.raises(BitlowerError, match="perplexity was not measured") as error:
        judge(parse_conditions(["perplexity > 20"]), {"cosine": 1.0})
    assert "measured were cosine" in str(error.value)

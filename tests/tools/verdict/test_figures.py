"""Figures: what a ledger and a backend say, with ranges."""

from __future__ import annotations

import pytest

from bitlower.tools.verdict.figures import MEANINGS, Figure, headline_figures, ledger_figures, ordered


def ledger(**outputs: dict[str, float | None]) -> dict[str, object]:
    return {"rows": [{"outputs": {"old": {"cosine": 0.1}}}, {"outputs": outputs}, {"bytes": 3}]}


def test_the_output_with_logits_is_judged_after_the_last_pass() -> None:
    logits = {"relative_error": 0.2, "cosine": 0.95, "kl_divergence": 0.03, "top1_agreement": 0.875}
    name, figures = ledger_figures(ledger(hidden={"relative_error": 0.5, "cosine": 0.5}, logits=logits))
    assert name == "logits"
    assert {figure.name: figure.value for figure in figures} == {
        "top1": 87.5, "kl": 0.03, "cosine": 0.95, "relative_error": 0.2,
    }  # fmt: skip


def test_the_first_output_is_judged_where_there_are_no_logits() -> None:
    name, figures = ledger_figures(ledger(hidden={"relative_error": 0.5, "cosine": None}, pooled={"cosine": 1.0}))
    assert name == "hidden"
    assert [(figure.name, figure.value) for figure in figures] == [("relative_error", 0.5)]


def test_a_decoder_is_judged_by_perplexity() -> None:
    row = {"cosine": 0.9, "kl_divergence": 0.1, "perplexity": 22.0, "reference_perplexity": 20.0}
    values = {figure.name: figure.value for figure in ledger_figures(ledger(logits=row))[1]}
    assert values["perplexity_increase"] == pytest.approx(10)
    assert (values["perplexity"], values["perplexity_float"]) == (22.0, 20.0)


@pytest.mark.parametrize("form", [{}, {"rows": []}, {"rows": [{"bytes": 1}]}])
def test_nothing_measured_gives_no_figures(form: dict[str, object]) -> None:
    assert ledger_figures(form) == ("", ())


@pytest.mark.parametrize(
    ("figure", "normal", "text"),
    [
        (Figure("cosine", 0.985), True, "0.985"),
        (Figure("cosine", 0.9849), False, "0.9849"),
        (Figure("kl", 0.11), False, "0.11 nats"),
        (Figure("kl", 0.11, few_bits=True), True, "0.11 nats"),
        (Figure("cosine", 0.94, few_bits=True), False, "0.94"),
        (Figure("perplexity_increase", 11.0, few_bits=True), False, "11 %"),
        (Figure("integer_products", 36, 37), False, "36 of 37"),
        (Figure("integer_products", 37, 37), True, "37 of 37"),
        (Figure("size_ratio", 3.76812), None, "3.768"),
        (Figure("a_backends_own", 12), None, "12"),
    ],
)
def test_ranges(figure: Figure, normal: bool | None, text: str) -> None:
    assert figure.is_normal is normal
    assert figure.text == text
    assert figure.row()[2].startswith("outside: ") is (normal is False)


def test_a_backends_words_and_lists_are_no_figures() -> None:
    headline = {"runtime": "x 1.0", "runtime_cosine": 0.5, "kernel_calls": [3, 4], "names": ["a", "b", "c"]}
    assert list(headline_figures(headline)) == [Figure("runtime_cosine", 0.5), Figure("kernel_calls", 3, 4)]


def test_figures_stand_in_the_order_of_the_table_and_unknown_ones_last() -> None:
    names = ["own", *reversed(MEANINGS)]
    assert [figure.name for figure in ordered(Figure(name, 0) for name in names)] == [*MEANINGS, "own"]


def test_ranges_in_words() -> None:
    assert MEANINGS["kl"].normal() == "≤ 0.1 nats"
    assert MEANINGS["kl"].normal(few_bits=True) == "≤ 0.2 nats"
    assert MEANINGS["top1"].normal(few_bits=True) == "≥ 75 %"
    assert MEANINGS["perplexity_increase"].normal(few_bits=True) == MEANINGS["perplexity_increase"].normal() == "≤ 10 %"
    assert MEANINGS["size_ratio"].normal() == ""

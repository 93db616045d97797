"""What schemes with float activations make of output heads and the tables that go with them."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch

from bitlower.frontends import load
from bitlower.ir import Program, Scheme
from bitlower.passes import Context, PassManager
from bitlower.passes.quantizers import quantize
from bitlower.passes.quantizers.quantize import PlacementReport, Quantize
from bitlower.tools.runs.heads import head_notes

WIDTH, LARGE, SMALL = 32, (1 << 20) // 32, 100
EIGHT, FOUR = "s8 per-channel(0)", "s4 per-group(16)"


class Writer(torch.nn.Module):
    """A token table, positions, a linear, and a head: the table itself if ``tied``, none if None."""

    def __init__(self, vocabulary: int, tied: bool | None) -> None:
        super().__init__()
        self.words, self.places = torch.nn.Embedding(vocabulary, WIDTH), torch.nn.Embedding(LARGE, WIDTH)
        self.inner = torch.nn.Linear(WIDTH, WIDTH)
        self.head = torch.nn.Linear(WIDTH, vocabulary, bias=False) if tied is not None else None
        if tied:
            self.head.weight = self.words.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.inner(self.words(input_ids) + self.places(torch.zeros_like(input_ids)))
        return hidden if self.head is None else self.head(torch.relu(hidden))


@cache
def program(vocabulary: int, tied: bool | None) -> Program:
    return load(Writer(vocabulary, tied).eval(), example_inputs={"input_ids": torch.ones(2, 3, dtype=torch.int64)})


def place(scheme: Scheme | str, vocabulary: int, tied: bool | None) -> tuple[Program, dict[str, str], dict[str, str]]:
    """The program with quantizers; by parameter its spec, and why it has none."""
    context = Context()
    made = scheme if isinstance(scheme, Scheme) else Scheme.parse(scheme)
    placed = PassManager([Quantize(made)]).run(program(vocabulary, tied), context)
    rows = [row for row in context[PlacementReport].rows if row.tensor.endswith("weight")]
    return placed, {row.tensor: row.spec for row in rows}, {row.tensor: row.reason for row in rows}


@pytest.mark.parametrize(
    ("scheme", "vocabulary", "tied", "words", "head", "places"),
    [
        ("W4A16-g16", LARGE, True, EIGHT, None, ""),
        ("W4A16-g16", LARGE, False, EIGHT, EIGHT, ""),
        ("W4A16-g16", SMALL, True, "", None, ""),
        ("W4A16-g16", SMALL, False, "", "", ""),
        ("W4A16-g16", LARGE, None, "", None, ""),
        ("W4A16-g16-e16", LARGE, False, "", "", ""),
        ("W4A16-g16-e8", SMALL, False, EIGHT, EIGHT, EIGHT),
    ],
)
def test_large_heads_and_their_tables_have_8_bits(
    scheme: str, vocabulary: int, tied: bool | None, words: str, head: str | None, places: str
) -> None:
    _, specs, _ = place(scheme, vocabulary, tied)
    expected = {"words.weight": words, "places.weight": places, "inner.weight": FOUR}
    assert specs == expected | ({"head.weight": head} if head is not None else {})


def test_the_report_says_why_a_head_stays_float(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place("W4A16-g16", SMALL, False)[2]["head.weight"] == "an output head of 3,200 weights is small"
    assert place("W4A16-g16-e16", LARGE, True)[2]["words.weight"] == "the scheme leaves embedding-table in float"
    monkeypatch.setattr(quantize, "LARGE_SHARE", 0.6)  # the table is half of the model, and the positions the other
    assert place("W4A16-g16", LARGE, True)[2]["words.weight"] == "an output head of 1,048,576 weights is small"


def test_other_bits_for_heads_alone_have_a_long_form() -> None:
    form = Scheme.parse("W4A16-g16").to_dict()
    six = Scheme.from_dict(form | {"heads": form["heads"] | {"num_bits": 6}})
    assert place(six, LARGE, True)[1]["words.weight"] == "s6 per-channel(0)"
    assert place(dataclasses.replace(six, heads=None), LARGE, True)[1]["words.weight"] == ""


def test_people_are_told_which_heads_have_codes() -> None:
    placed = place("W4A16-g16", LARGE, True)[0]
    assert list(head_notes(placed)) == [
        "the output head head has 8 bits, as the table words.weight that it shares; suffix e16 keeps it float"
    ]
    assert list(head_notes(place("W4A16-g16", LARGE, False)[0])) == [
        "the output head head has 8 bits; suffix e16 keeps it float"
    ]
    assert list(head_notes(place("W4A16-g16-e16", LARGE, True)[0])) == []
    assert list(head_notes(place("W8A8-token", LARGE, True)[0])) == []

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitlower.ir import BitlowerError, Granularity, Grid, QuantSpec, Scheme
from bitlower.passes import Pass, find_pass, format_pipeline, load_plugin, make_pass, parse_pipeline
from bitlower.passes._machinery import registry

TEXT = '''
import enum
from dataclasses import dataclass, field
from typing import Literal
from bitlower.ir import Granularity, Scheme
from bitlower.passes import Pass

class Colour(enum.StrEnum):
    RED = "deep-red"
    BLUE = "blue"

@dataclass(frozen=True)
class Everything(Pass):
    """A parameter of every kind."""
    name = "everything"
    flag: bool = False
    group_size: int = 128
    ratio: float = 0.5
    text: str = "plain"
    colour: Colour = Colour.RED
    pair: tuple[int, float] = (1, 2.0)
    words: tuple[str, ...] = ()
    nested: tuple[tuple[int, ...], ...] = ()
    limit: int | None = 3
    mode: Literal["a", "b", 3] = "a"
    scheme: Scheme = field(default_factory=Scheme)
    either: str | Scheme = "W8A8"
    layout: Granularity = Granularity("tensor")

    def __post_init__(self):
        if self.group_size < 0:
            raise ValueError("group-size is negative")

    def run(self, program):
        return False

@dataclass(frozen=True)
class Needy(Pass):
    name = "needy"
    must: int

    def run(self, program):
        return False
'''


@pytest.fixture(scope="module", autouse=True)
def _plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry.PASSES, "loose", {})
        path: Path = tmp_path_factory.mktemp("plugin") / "everything.py"
        path.write_text(TEXT)
        load_plugin(path)
        yield


def schemes() -> st.SearchStrategy[Scheme]:
    names = st.sampled_from(["W8A8", "W4A16-g128", "W8A8-full", "W4A8-token", "W8A8-peg6"]).map(Scheme.parse)
    custom = QuantSpec(Grid(3), Granularity.per_group(7))
    return names | names.map(lambda scheme: replace(scheme, overrides=(("logits", custom), ("norm", None))))


def everything(**fields: Any) -> Pass:
    return find_pass("everything")(**fields)


INTEGERS = st.integers(-(2**63), 2**63 - 1)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "flag": st.booleans(),
    "group_size": st.integers(0, 2**63 - 1),
    "ratio": st.floats(allow_nan=False),
    "text": st.text() | st.sampled_from(["true", "none", "12", "1e3", "inf", "", "a b", "re:.*x", '"', "\\", "-"]),
    "pair": st.tuples(INTEGERS, st.floats(allow_nan=False)),
    "words": st.lists(st.text(max_size=5), max_size=3).map(tuple),
    "nested": st.lists(st.lists(INTEGERS, max_size=3).map(tuple), max_size=3).map(tuple),
    "limit": st.none() | INTEGERS,
    "mode": st.sampled_from(["a", "b", 3]),
    "scheme": schemes(),
    "either": st.sampled_from(["W8A8", "W4A4"]) | schemes(),
    "layout": st.sampled_from([Granularity.per_token(), Granularity.per_group(32, 1), Granularity.per_channel(1)]),
}


@given(st.lists(st.fixed_dictionaries({}, optional=FIELDS), max_size=3))
def test_text_round_trips(choices: list[dict[str, Any]]) -> None:
    passes = tuple(everything(**fields) for fields in choices)
    text = format_pipeline(passes)
    assert parse_pipeline(text) == passes
    assert format_pipeline(parse_pipeline(text)) == text


@given(st.text(alphabet='ab1 -,{}[]="\\\n', max_size=30))
def test_any_text_parses_or_is_refused_with_a_caret(text: str) -> None:
    outcome: object
    try:
        outcome = parse_pipeline(text)
    except BitlowerError as error:
        outcome = str(error).splitlines()[-1].strip()
    assert outcome == "^" or bool(outcome) == bool(text.strip())


def test_defaults_are_left_out_and_names_are_kebab_case() -> None:
    assert format_pipeline([everything()]) == "everything"
    assert format_pipeline([everything(group_size=64, words=("a", "b c"))]) == (
        'everything{group-size=64 words=[a "b c"]}'
    )
    assert format_pipeline([everything(scheme=Scheme.parse("W4A16-g128"), limit=None, flag=True)]) == (
        "everything{flag=true limit=none scheme=W4A16-g128}"
    )
    assert format_pipeline([]) == ""
    assert parse_pipeline("  ") == ()


def test_white_space_is_free() -> None:
    parsed = parse_pipeline(" everything { ratio = 1e-3\n words=[ a   b ] } , everything ")
    assert parsed == (everything(ratio=0.001, words=("a", "b")), everything())


def test_bare_values_have_the_types_they_look_like() -> None:
    cls: Any = find_pass("everything")
    (parsed,) = parse_pipeline('everything{flag=true ratio=2 text="2" limit=-5 mode=3 layout=per-group(32)}')
    assert parsed == cls(flag=True, ratio=2.0, text="2", limit=-5, mode=3, layout=Granularity.per_group(32))
    assert type(vars(parsed)["ratio"]) is float
    assert vars(parse_pipeline("everything{ratio=inf}")[0])["ratio"] == math.inf


@pytest.mark.parametrize(
    ("text", "problem", "column"),
    [
        ("everything{group-size 4}", "expected '=' after 'group-size', found '4'", 22),
        ("everything{flag=true", "expected a parameter (they are separated by spaces) or '}'", 20),
        ("everything{flag=true, limit=2}", "expected a parameter (they are separated by spaces) or '}', found ','", 20),
        ("everything,,everything", "expected the name of a pass, found ','", 11),
        ("everything everything", "expected ',' between passes, found 'everything'", 11),
        ('everything{text="abc}', "the quote is not closed", 16),
        (r'everything{text="\x"}', "a broken string: Invalid \\escape", 16),
        ("everything{words=[a b}", "expected a value, found '}'", 21),
        ("everything{flag=true flag=false}", "the parameter 'flag' is given twice", 21),
        ("evrything", "unknown pass 'evrything'; did you mean 'everything'?", 0),
        ("everything{limt=2}", "pass 'everything' has no parameter 'limt'; did you mean 'limit'?", 11),
        ("everything{flag=1}", "pass 'everything': parameter 'flag' takes bool, not 1", 11),
        ("everything{flag=true limit=2.0}", "parameter 'limit' takes int or none, not 2.0", 21),
        ("everything{ratio=nan}", "parameter 'ratio' takes float, not \"nan\"", 11),
        ("everything{text=4}", "parameter 'text' takes str, not 4; quote it: \"4\"", 11),
        ("everything{colour=green}", "takes one of deep-red, blue, not \"green\"", 11),
        ("everything{pair=[1]}", "takes a list of 2 (int, float), not 1 values", 11),
        ("everything{words=a}", "takes a list of str, not \"a\"", 11),
        ("everything{mode=c}", "takes one of a, b, 3, not \"c\"", 11),
        ("everything{scheme=W8}", "parameter 'scheme': 'W8' is not a scheme", 11),
        ("everything{group-size=-1}", "pass 'everything': group-size is negative", 0),
        ("needy", "pass 'needy' needs the parameter 'must'", 0),
    ],
)  # fmt: skip
def test_a_mistake_is_shown_with_a_caret(text: str, problem: str, column: int) -> None:
    with pytest.raises(BitlowerError) as info:
        parse_pipeline(text)
    first, shown, caret = str(info.value).splitlines()
    assert problem in first
    assert shown == f"  {text}"
    assert caret.index("^") - 2 == column


def test_a_mistake_on_a_later_line_shows_that_line() -> None:
    with pytest.raises(BitlowerError) as info:
        parse_pipeline("everything,\neverything{x=1}")
    assert str(info.value).splitlines()[1:] == ["  everything{x=1}", "             ^"]


def test_plain_data_from_yaml_fits_the_same_way() -> None:
    scheme = {"weights": {"num_bits": 4, "strategy": "group", "group_size": 32}}
    made = make_pass("everything", {"group-size": 4, "colour": "blue", "pair": [3, 4], "scheme": scheme, "ratio": 1})
    cls: Any = find_pass("everything")
    colour = type(cls().colour)
    assert made == cls(group_size=4, colour=colour("blue"), pair=(3, 4.0), scheme=Scheme.from_dict(scheme), ratio=1.0)
    assert make_pass("everything", {"group_size": 4}) == cls(group_size=4)
    with pytest.raises(BitlowerError, match="'group-size' is given twice"):
        make_pass("everything", {"group_size": 4, "group-size": 4})
    with pytest.raises(BitlowerError, match=r"'scheme': unknown scheme key 'weight'; did you mean 'weights'"):
        make_pass("everything", {"scheme": {"weight": None}})


def test_the_bare_word_none_is_a_choice_where_it_is_one() -> None:
    (gptq,) = parse_pipeline("gptq{weighting=none order=none}")
    assert gptq.parameters() == {"weighting": "none", "order": "none"}
    assert parse_pipeline(format_pipeline([gptq])) == (gptq,)
    with pytest.raises(BitlowerError, match="takes one of minmax"):
        parse_pipeline("gptq{ranges=none}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clean" + " " * 180_000 + "x", "expected ',' between passes, found 'x'"),
        ("clean," * 300, "a pipeline has at most 200 passes"),
        ("x" * 180_000, "unknown pass 'xxx"),
        ("x" * 200_001, "the pipeline has 200001 characters; 200000 are read at most"),
        ("quantize{ignore=" + "[" * 90_000, "lists are nested deeper than 30 levels"),
        ('quantize{scheme="' + "\\" * 180_000 + "}", "the quote is not closed"),
        ("quantize{" + " ".join(f"a{n}=1" for n in range(20_000)) + "}", "has no parameter 'a0'"),
        ('quantize{scheme="{\\"a\\":' + "[" * 1000 + '"}', "nested deeper than 100 levels"),
        ("gptq{damping=" + "9" * 4000 + "}", "a number has 4000 digits"),
        ("gptq{damping=" + "9" * 101 + ".0}", "a number has 103 digits"),
        ("adaround{iterations=" + "9" * 90 + "}", "takes int of 64 bits, not 999"),
        ("\n" * 100_000 + "quantize{a=1}", "has no parameter 'a'"),
    ],
)  # fmt: skip
def test_hostile_text_gets_a_short_message(text, message):
    with pytest.raises(BitlowerError) as refusal:
        parse_pipeline(text)
    assert message in str(refusal.value)
    assert len(str(refusal.value)) <= 2000


def test_a_caret_shows_the_place_in_a_long_line():
    with pytest.raises(BitlowerError) as refusal:
        parse_pipeline("clean" + ",clean" * 100 + ",!," + "clean," * 90 + "clean")
    _, shown, caret = str(refusal.value).split("\n")
    assert shown[caret.index("^")] == "!"
    assert shown[2] == shown[-1] == "…"
    assert len(shown) < 130

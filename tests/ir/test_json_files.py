import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitlower.ir.json_files import DEPTH, DIGITS, object_of, parse_json, read_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@given(VALUES, st.booleans())
def test_what_json_writes_is_read_back(value, escaped):
    assert parse_json(json.dumps(value, ensure_ascii=escaped)) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "deeper than 100"),
        ('{"a":' * 100_000, "deeper than 100"),
        ("[" * (DEPTH + 1) + "]" * (DEPTH + 1), "deeper than 100"),
        ("9" * 5000, "a number has 5000 digits"),
        ('{"a": [{"b": 1, "b": 2}]}', "the key 'b' is given twice"),
        (f'{{"{"k" * 10**6}": 1, "{"k" * 10**6}": 1}}', "kkk … kkk"),
        ("[NaN]", "it holds NaN"),
        ("[-Infinity]", "it holds -Infinity"),
        ("1e999", "the number 1e999 is too large"),
        (r'["\ud800"]', "half of a surrogate pair"),
        (r'{"a": {"\udc00b": 1}}', "half of a surrogate pair"),
        ("\ufeff{}", "begins with a byte-order mark"),
        (b"\xef\xbb\xbf{}", "begins with a byte-order mark"),
        (b'{"\xff": 1}', "byte 2 is not UTF-8"),
        ('"a\0b"', "control character"),
        ("", "Expecting value"),
        ("{} {}", "Extra data"),
    ],
)
def test_what_is_no_json_for_every_reader_is_refused_in_a_few_words(text, reason):
    with pytest.raises(ValueError, match=reason) as refusal:
        parse_json(text)
    assert len(str(refusal.value)) < 300


def test_what_is_just_within_the_bounds_is_read():
    assert parse_json("[" * DEPTH + "]" * DEPTH)
    assert math.isfinite(float(parse_json("9" * DIGITS)))
    assert parse_json(r'"\ud83d\ude00"') == "😀"
    assert parse_json("[NaN, Infinity, 1e999]", finite=False)[1:] == [math.inf, math.inf]


def test_a_file_of_settings_holds_an_object(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}
    with pytest.raises(ValueError, match="more than 7 bytes"):
        read_json(path, limit=7)
    for text, kind in [("[]", "list"), ("null", "NoneType"), ("3", "int")]:
        with pytest.raises(ValueError, match=f"a {kind}, not a JSON object"):
            object_of(json.loads(text))

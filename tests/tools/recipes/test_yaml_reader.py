from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitlower.ir import BitlowerError
from bitlower.tools.recipes.recipe import load_recipe
from bitlower.tools.recipes.yaml_reader import DEPTH, LIMIT, read_yaml

LAUGHS = "a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)
MERGES = "m0: &m0 {a: 1}\n" + "".join(f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}\n" for n in range(1, 10))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.text(st.characters(categories=["L", "N", "P"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc", max_size=4), inner, max_size=4),
    max_leaves=20,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "recipe.yaml"


@given(VALUES)
def test_json_is_yaml(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.getbasetemp() / "value.yaml"
    path.write_text(json.dumps(value, ensure_ascii=False))
    assert read_yaml(path)[1] == value


def test_aliases_stand_for_what_they_name(path: Path) -> None:
    path.write_text("a: &x [1, 2]\nb: *x\nc: {<<: {d: 3}}\n")
    assert read_yaml(path)[1] == {"a": [1, 2], "b": [1, 2], "c": {"d": 3}}
    path.write_text("")
    assert read_yaml(path) == (None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "recipe.yaml:5: aliases make more than 20000 values"),
        (MERGES, "aliases make more than 20000 values"),
        ("a: &a [*a]", "recipe.yaml:1: a value holds itself"),
        ("a: &a\n  b: {c: *a}", "a value holds itself"),
        ("[" * 10_000, f"nested deeper than {DEPTH} levels"),
        ("- " * 300 + "a", f"recipe.yaml:1: values are nested deeper than {DEPTH} levels"),
        ("a: 1\nb: " + "9" * 5000, "recipe.yaml:2: a number has 5000 digits"),
        ("a: 1\n" * 2, 'recipe.yaml:2: the key "a" is given twice'),
        ('a: "\\ud800"', "half of a surrogate pair"),
        ("a: !!binary AAAA", "recipe.yaml:1: a value has the tag 'binary'"),
        ("a: !!python/object/apply:os.system [ls]", "has the tag 'python/object/apply:os.system'"),
        ("a: !!int ''", "recipe.yaml:1: a value is not of the kind"),
        ("a: !!bool maybe", "a value is not of the kind"),
        ("a: 2001-99-99", "a value is not of the kind"),
        ("x" * (LIMIT + 1), f"it has more than {LIMIT} bytes"),
        ("a: \x00", "is not YAML"),
        ("a: [", "recipe.yaml:1: "),
        ("--- a\n--- b\n", "recipe.yaml:2: "),
    ],
)
def test_what_is_no_plain_data_is_refused_with_its_place(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    with pytest.raises(BitlowerError) as refusal:
        read_yaml(path)
    assert message in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


def test_only_regular_files_are_recipes(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(BitlowerError, match="it is a named pipe, not a file"):
        load_recipe(path)


@pytest.mark.parametrize(
    "text",
    [
        "".join(f"k{n}: 1\n" for n in range(9000)),
        f"model: {{path: package:x}}\nexport: [onnx-qdq]\npasses: [{'5,' * 5000}]",
        f"model: {{path: package:x}}\nexport: [onnx-qdq]\npasses: [{'clean,' * 5000}]",
        f"model: {{path: {'x' * 50_000}, {'y' * 900}: 1}}\nexport: [{'z' * 40_000}]\npasses: 1",
        f"model: {{path: a}}\ncalibration: {{data: a, samples: {'8' * 99}}}\nexport: [a]\npasses: [a]",
    ],
)
def test_a_hostile_recipe_gets_no_more_than_a_screen(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(BitlowerError) as refusal:
        load_recipe(path)
    assert len(str(refusal.value)) <= 2000
    assert len(str(refusal.value).splitlines()) <= 20

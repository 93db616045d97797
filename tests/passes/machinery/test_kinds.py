"""Types and bounds of parameters: beside pydantic, which reads the same annotations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import hypothesis.strategies as st
import pytest
from annotated_types import Ge, Gt, Interval, Le, Len, Lt, MinLen, Predicate
from hypothesis import given
from pydantic import TypeAdapter, ValidationError

from bitlower.ir import BitlowerError
from bitlower.ir.plugins.kinds import split_bounds, supported
from bitlower.ir.plugins.parameters import MismatchError, coerce
from bitlower.passes import Pass, describe_type, known_passes, make_pass, parameter_types
from bitlower.passes._machinery import registry
from bitlower.tools.recipes.recipe import load_recipe
from bitlower.tools.recipes.schema import type_schema

KINDS: dict[Any, str] = {
    Annotated[int, Ge(1)]: "int of 1 or more",
    Annotated[int, Gt(-2)]: "int above -2",
    Annotated[float, Lt(3)]: "float below 3",
    Annotated[float, Le(0.5)]: "float of 0.5 or less",
    Annotated[float, Interval(gt=0, le=1)]: "float from above 0 to 1",
    Annotated[int, Interval(ge=2, lt=16)] | None: "int from 2 to below 16 or none",
    Annotated[tuple[Annotated[int, Ge(0)], ...], MinLen(1)]: "list of int of 0 or more of 1 items or more",
    Annotated[tuple[int, ...], Len(1, 3)]: "list of int of 1 items or more of 3 items or fewer",
    Annotated[float, Ge(0)] | Literal["auto"]: "float of 0 or more or one of auto",
}
VALUES = st.one_of(
    st.integers(-5, 20), st.floats(-3, 4), st.none(), st.just("auto"), st.lists(st.integers(-1, 3), max_size=4)
)


@pytest.mark.parametrize(("kind", "words"), KINDS.items(), ids=KINDS.values())
def test_bounds_in_words(kind: Any, words: str) -> None:
    assert supported(kind)
    assert describe_type(kind) == words


@pytest.mark.parametrize("kind", KINDS, ids=KINDS.values())
@given(value=VALUES)
def test_values_are_accepted_as_pydantic_accepts_them(kind: Any, value: Any) -> None:
    try:
        expected = TypeAdapter(kind).validate_python(tuple(value) if isinstance(value, list) else value, strict=True)
    except ValidationError:
        with pytest.raises(MismatchError, match="takes"):
            coerce(kind, value)
    else:
        assert coerce(kind, value) == expected


@pytest.mark.parametrize("kind", KINDS, ids=KINDS.values())
def test_the_schema_is_that_of_pydantic(kind: Any) -> None:
    """Pydantic writes a choice of one as a constant."""
    theirs = TypeAdapter(kind).json_schema()
    ours = type_schema(kind)
    if "auto" in describe_type(kind):
        theirs["anyOf"][1] = {"enum": ["auto"]}
    assert ours == theirs


def test_what_is_no_bound_is_not_supported() -> None:
    assert not supported(Annotated[int, "a comment"])
    assert not supported(Annotated[int, Predicate(lambda value: value > 0)])
    assert not supported(Annotated[list[int], Ge(1)])


@dataclass(frozen=True)
class Bounded(Pass):
    """A pass with bounds."""

    name = "bounded"
    share: Annotated[float, Interval(ge=0, le=1)] = 0.5
    """How much."""
    counts: tuple[Annotated[int, Ge(1)], ...] = (1,)
    most: Annotated[int, Ge(1)] | None = None

    def run(self, program: Any, context: Any) -> bool:
        """Nothing."""
        return False


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": 1.5}, "share is 1.5; it takes float from 0 to 1"),
        ({"share": float("nan")}, "share is nan"),
        ({"counts": (1, 0)}, r"counts is \(1, 0\); it takes list of int of 1 or more"),
        ({"most": 0}, "most is 0; it takes int of 1 or more or none"),
    ],
)
def test_a_pass_made_in_python_keeps_its_bounds_too(values: dict[str, Any], message: str) -> None:
    Bounded(share=1, counts=(), most=None)
    with pytest.raises(BitlowerError, match=f"bounded: {message}"):
        Bounded(**values)


def test_a_recipe_is_refused_with_the_line_and_the_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.PASSES, "loose", {"bounded": (tmp_path, Bounded)})
    text = "model: {path: nowhere}\npasses:\n  - clean\n  - bounded: {share: 2}\nexport: [onnx-qdq]\n"
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(BitlowerError, match=r"recipe.yaml:4: .*'share' takes float from 0 to 1, not 2"):
        load_recipe(tmp_path / "recipe.yaml").build_passes()


def _numbers() -> list[tuple[str, str]]:
    """Every number among the parameters of every pass that has no bound."""
    found = []
    for name, cls in known_passes().items():
        for parameter, kind in parameter_types(cls).items():
            members = [kind, *getattr(kind, "__args__", ())] if not split_bounds(kind)[1] else []
            found += [(name, parameter) for member in members if member in (int, float)]
    return found


def test_every_number_has_bounds() -> None:
    assert _numbers() == []


def test_every_default_lies_within() -> None:
    for name in known_passes():
        make_pass(name, {"set": "paper"} if name == "assign-precision" else {})

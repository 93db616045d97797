"""The examples do what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from bitlower.frontends import load
from bitlower.ir import Level
from bitlower.passes import Context, PassManager, check_levels, load_plugin, make_pass
from bitlower.passes._machinery.losses import LOSSES, make_loss
from bitlower.passes.training import Step, Values
from bitlower.tools.data.texts import read_texts
from bitlower.tools.recipes.recipe import load_recipe, validate_recipe

EXAMPLES = Path(__file__).parents[3] / "examples"


def test_the_sentences_are_many_different_and_of_all_lengths() -> None:
    texts = read_texts(EXAMPLES / "sentences.txt")
    lengths = [len(text.split()) for text in texts]
    assert len(texts) == len(set(texts)) >= 160
    assert (min(lengths), max(lengths)) == (5, 40)
    assert len(set(lengths)) > 20


def test_the_recipe_is_valid() -> None:
    recipe = load_recipe(EXAMPLES / "minilm-w8a8.yaml")
    assert [pass_.name for pass_ in validate_recipe(recipe)][-1] == "lower-integer"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_has_passes_that_go_together_and_is_in_the_table(path: Path) -> None:
    recipe = load_recipe(path)
    assert check_levels(recipe.build_passes(), Level.FLOAT)
    assert f"[{path.name}]({path.name})" in (EXAMPLES / "README.md").read_text()


class Scaled(torch.nn.Module):
    """Three linears that read a product with 0.5, with 100, and of two values."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        small, large, other = self.layers
        return other(large(small(x * 0.5) * 100.0) * x)


def test_the_loss_is_the_angle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors in a plane, 90 and 60 degrees apart; padding holds garbage."""
    monkeypatch.setattr(LOSSES, "loose", {})
    load_plugin(EXAMPLES / "hidden_angle.py")
    student = torch.tensor([[[2.0, 0.0], [3.0, 0.0], [torch.nan, 0.0]]])
    teacher = torch.tensor([[[0.0, 5.0], [1.0, 3.0**0.5], [torch.inf, 1.0]]])
    mask = torch.tensor([[True, True, False]])
    values = Values((torch.zeros_like(student), student)), Values((teacher, teacher))
    step = Step(*values, {}, mask, None, True, torch.Generator())
    assert float(make_loss("hidden-angle", {"weight": 0.5}).value(step, {})) == pytest.approx(0.75)


@pytest.mark.filterwarnings("ignore")
def test_the_plugin_folds_what_it_should() -> None:
    load_plugin(EXAMPLES / "fold_scales.py")
    example = {"x": torch.randn(3, 4)}
    program = load(Scaled().eval(), example_inputs=example)
    folded = PassManager([make_pass("clean"), make_pass("fold-scales")]).run(program, Context(evaluation=[example]))
    assert folded.passes[-1] == "fold-scales"
    products = re.findall(r"= mul.Tensor\(([^)]*)\)", str(folded))
    assert [text.split(", ")[1] for text in products if "%" not in text.split(", ")[1]] == ["100.0"]
    torch.testing.assert_close(folded(**example), program(**example))

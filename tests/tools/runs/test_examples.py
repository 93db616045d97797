"""The examples do what they say."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from bitlower.frontends import load
from bitlower.ir import Level, Program
from bitlower.passes import Context, PassManager, check_levels, load_plugin, make_pass
from bitlower.passes._machinery.losses import LOSSES, make_loss
from bitlower.passes.quantizers.quantize import PlacementReport
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


@pytest.fixture(scope="module")
def small() -> Callable[[str], Program]:
    """``small("smollm2")``: the architecture that recipes of this name are for, with one layer of 128 channels."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    llama = LlamaConfig(**sizes, vocab_size=60, num_key_value_heads=2, tie_word_embeddings=True)
    gpt2 = GPT2Config(n_embd=128, n_layer=1, n_head=4, vocab_size=60, n_positions=40, bos_token_id=1, eos_token_id=2)
    models = {
        "smollm2": (LlamaForCausalLM(llama), "text-generation"),
        "gpt2": (GPT2LMHeadModel(gpt2), "text-generation"),
        "minilm": (BertModel(BertConfig(**sizes, vocab_size=60)), "feature-extraction"),
    }

    @cache
    def cleaned(name: str) -> Program:
        model, task = models[name]
        return PassManager([make_pass("clean")]).run(load(model.eval(), task=task), Context())

    return cleaned


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_each_scheme_of_a_recipe_quantizes_weights_of_its_model(path: Path, small: Callable[[str], Program]) -> None:
    program, weights = small(path.name.partition("-")[0]), {"linear-weight", "embedding-table"}
    quantizes = [pass_ for pass_ in load_recipe(path).build_passes() if pass_.name == "quantize"]
    assert quantizes
    for pass_ in quantizes:
        context = Context()
        program = PassManager([pass_]).run(program, context)
        assert weights & {row.role for row in context[PlacementReport].rows if row.spec}, pass_


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

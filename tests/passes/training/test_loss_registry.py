from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import bitlower.passes.training._losses
from bitlower.ir import BitlowerError, Program
from bitlower.ir.plugins.parameters import coerce, plain
from bitlower.passes import Context, Pass, PassManager, format_pipeline, load_plugin, make_pass, parse_pipeline
from bitlower.passes._machinery import registry
from bitlower.passes._machinery.losses import LOSSES, Losses, find_loss, known_losses, make_loss
from bitlower.passes.training._losses.logits import Logits

ROOT = Path(__file__).parents[3]
GOOD = """
from dataclasses import dataclass
from bitlower.passes.training import Loss

@dataclass(frozen=True)
class Half(Loss):
    name = "half"
    needs = frozenset({"hidden"})
    times: int = 1

    def value(self, step, memory):
        return step.student.hidden[-1].sum()
"""
PASS = """
from dataclasses import dataclass
from bitlower.passes import Pass

@dataclass(frozen=True)
class Halve(Pass):
    name = "halve"

    def run(self, program):
        return False
"""
TRAINS = """
from dataclasses import dataclass
from bitlower.passes import Pass
from bitlower.passes._machinery.losses import Losses

@dataclass(frozen=True)
class Learn(Pass):
    name = "learn"
    losses: Losses = Losses.from_list(["logits"])

    def run(self, program):
        raise RuntimeError(str(self.losses.to_list()))
"""


@pytest.fixture(autouse=True)
def own_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test starts without loaded plugins."""
    for catalog in (registry.PASSES, LOSSES):
        monkeypatch.setattr(catalog, "loose", {})


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_every_own_file_holds_the_loss_of_its_name() -> None:
    files = {p.stem for p in Path(bitlower.passes.training._losses.__file__).parent.glob("[a-z]*.py")}
    assert {cls.__module__.rpartition(".")[2] for cls in known_losses().values()} == files
    assert {name.replace("-", "_") for name in known_losses()} == files


def test_naming_one_loss_imports_no_other() -> None:
    code = (
        "import sys; from bitlower.passes._machinery.losses import Losses; Losses.from_list(['task']);"
        "print(*sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    own = {f"bitlower.passes.training._losses.{p.stem}" for p in LOSSES.folder.glob("[a-z]*.py")}
    assert own & set(done.stdout.split()) == {"bitlower.passes.training._losses.task"}


def test_a_loose_file_may_hold_passes_losses_or_both(tmp_path: Path) -> None:
    (loss,) = load_plugin(write(tmp_path / "a.py", GOOD))
    assert find_loss("half") is known_losses()["half"] is loss
    assert make_loss("half", {"times": 3}).times == 3  # type: ignore[attr-defined]
    both = load_plugin(write(tmp_path / "b.py", PASS + GOOD.replace('"half"', '"other"')))
    assert [cls.name for cls in both] == ["halve", "other"]
    assert make_pass("halve").name == "halve"
    load_plugin(write(tmp_path / "a.py", GOOD.replace("times: int = 1", "times: int = 7")))
    assert make_loss("half").times == 7  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("def value", "def worth"), r"p.py: the loss class Half defines no `value`"),
        (GOOD.replace("(Loss)", "(LogitsLoss)").replace("import Loss", "import LogitsLoss"), r"Half defines no `rows`"),
        (GOOD.replace('{"hidden"}', '{"hiden"}'), r"needs frozenset\({'hiden'}\); `needs` is a frozenset of attention"),
        (GOOD.replace('frozenset({"hidden"})', '"hidden"'), r"the loss class Half needs 'hidden'"),
        (GOOD.replace('"half"', '"HalfIt"'), r"the name 'HalfIt', which is not kebab-case; for example 'half-it'"),
        (GOOD.replace('name = "half"', ""), r"the loss class Half has no name; set `name = \"my-loss\"`"),
        (GOOD.replace("@dataclass(frozen=True)", ""), r"the loss class Half is not a frozen dataclass; decorate it"),
        (GOOD.replace("times: int = 1", "times: dict = None"), r"the parameter 'times' of the unsupported type dict"),
        (
            GOOD.replace('"half"', '"task"'),
            r"the loss 'task' is offered by the file .*p.py and by bitlower \(task.py\)",
        ),
        (PASS + GOOD.replace("def value", "def worth"), r"p.py: the loss class Half defines no `value`"),
        (GOOD + PASS.replace("def run", "def walk"), r"p.py: the pass class Halve defines no `run`"),
    ],
)
def test_a_bad_plugin_is_refused_as_a_whole(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(BitlowerError, match=message) as info:
        load_plugin(write(tmp_path / "p.py", text))
    assert "\n" not in str(info.value)
    assert registry.PASSES.loose == LOSSES.loose == {}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A distribution that offers a loss, as an installer leaves it."""
    (tmp_path / "half_loss.py").write_text(GOOD)
    info = tmp_path / "half_loss-1.2.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: half-loss\nVersion: 1.2.3\n")
    (info / "entry_points.txt").write_text("[bitlower.losses]\nhalf = half_loss:Half\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("half_loss", None)


def test_an_installed_loss_is_loaded_when_it_is_named(installed: Path) -> None:
    assert "half" not in known_losses()
    assert "half_loss" not in sys.modules
    assert make_loss("half").name == "half"
    with pytest.raises(
        BitlowerError, match=r"'half' is offered by .* and by the distribution half-loss 1.2.3 \(half_l"
    ):
        load_plugin(write(installed / "p.py", GOOD))


def test_an_installed_class_that_is_no_loss_is_named(installed: Path) -> None:
    (installed / "half_loss.py").write_text("Half = 3\n")
    with pytest.raises(
        BitlowerError, match=r"Half is no loss class; point at a subclass of bitlower.passes.training.L"
    ):
        find_loss("half")


DEFAULT = Losses((Logits(),))


@dataclass(frozen=True)
class Learn(Pass):
    name = "learn"
    losses: Losses = DEFAULT

    def run(self, program: Program, context: Context) -> bool:
        return False


FORMS: list[list[Any]] = [
    ["logits"],
    ["logits", {"hidden": {"weight": 0.1}}],
    [{"logits": {"temperature": 2.0}}, {"token-contrast": {"negatives": "vocabulary", "count": 3}}, "attention"],
    ["task", {"hidden": {"tokens": "unit-norm", "layers": "last"}}],
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_losses_go_through_text_and_recipes_and_back(
    form: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitlower.tools.recipes.recipe import Recipe, dump_recipe, load_recipe, steps_of

    monkeypatch.setattr(registry.PASSES, "loose", {"learn": (tmp_path, Learn)})
    losses = coerce(Losses, form)
    assert plain(Losses, losses) == form
    assert coerce(Losses, losses) is losses
    assert [loss.name for loss in losses.losses] == [
        item if isinstance(item, str) else next(iter(item)) for item in form
    ]
    pass_ = make_pass("learn", {"losses": form})
    assert pass_ == Learn(losses)
    assert parse_pipeline(format_pipeline([pass_])) == (pass_,)
    recipe = Recipe.model_validate({"model": {"path": "m"}, "passes": [], "export": ["onnx-qdq"]})
    recipe = recipe.model_copy(update={"passes": steps_of([pass_])})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "recipe.yaml").build_passes() == (pass_,)


def test_the_text_is_what_one_would_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.PASSES, "loose", {"learn": (tmp_path, Learn)})
    (pass_,) = parse_pipeline("learn{losses=[task hidden]}")
    assert pass_ == Learn(Losses((make_loss("task"), make_loss("hidden"))))
    assert format_pipeline([pass_]) == "learn{losses=[task hidden]}"
    assert format_pipeline([Learn()]) == "learn"


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("logits", r"parameter 'losses' takes list of losses, not \"logits\""),
        ({"logits": {}}, r"takes list of losses"),
        ([], r"parameter 'losses': no loss is given; for example \[logits\]"),
        ([3], r"parameter 'losses': 3 is no loss; write a name"),
        ([{"logits": {}, "hidden": {}}], r"is no loss; write a name, or one name with its parameters"),
        ([{"logits": 3}], r"{'logits': 3} is no loss"),
        (["{broken"], r"takes list of losses; its JSON is broken"),
        (["logitz"], r"parameter 'losses': unknown loss 'logitz'; did you mean 'logits'\?"),
        (["logits", "logits"], r"the loss 'logits' is given twice; keep one of them and set its weight"),
        ([{"hidden": {"tokns": 1}}], r"loss 'hidden' has no parameter 'tokns'; did you mean 'tokens'\?"),
        ([{"hidden": {"tokens": 1}}], r"loss 'hidden': parameter 'tokens' takes one of mean, unit-norm, not 1"),
        ([{"hidden": {"weight": -1.0}}], r"loss 'hidden': parameter 'weight' takes float from 0 to 1000000.0, not -1"),
        ([{"hidden": {"weight": float("inf")}}], r"loss 'hidden': parameter 'weight' takes float from 0"),
        ([{"hidden": {"weight": float("nan")}}], r"loss 'hidden': parameter 'weight' takes float"),
        ([{"logits": {"temperature": 0}}], r"loss 'logits': parameter 'temperature' takes float from above 0"),
    ],
)
def test_what_is_no_list_of_losses_is_refused(
    form: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry.PASSES, "loose", {"learn": (tmp_path, Learn)})
    with pytest.raises(BitlowerError, match=rf"^pass 'learn'.*{message}") as info:
        make_pass("learn", {"losses": form})
    assert "\n" not in str(info.value)


def test_a_recipe_says_in_which_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitlower.tools.recipes.recipe import load_recipe

    monkeypatch.setattr(registry.PASSES, "loose", {"learn": (tmp_path, Learn)})
    text = "model: {path: m}\npasses:\n  - learn:\n      losses: [logitz]\nexport: [onnx-qdq]\n"
    with pytest.raises(BitlowerError, match=r"recipe.yaml:4: pass 'learn': parameter 'losses': unknown loss 'logitz'"):
        load_recipe(write(tmp_path / "recipe.yaml", text)).build_passes()


def test_editors_know_the_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitlower.tools.recipes.recipe import recipe_schema

    monkeypatch.setattr(registry.PASSES, "loose", {"learn": (tmp_path, Learn)})
    _, with_parameters = recipe_schema()["properties"]["passes"]["items"]["anyOf"]
    schema = with_parameters["properties"]["learn"]["properties"]["losses"]
    assert schema["default"] == ["logits"]
    named, parameters = schema["items"]["anyOf"]
    assert set(named["examples"]) == set(parameters["properties"]) == set(known_losses())
    hidden = parameters["properties"]["hidden"]["properties"]
    assert hidden["tokens"]["enum"] == ["mean", "unit-norm"]
    assert hidden["tokens"]["default"] == "mean"
    assert hidden["tokens"]["description"].startswith("mean: the mean over all values.")
    assert (hidden["weight"]["minimum"], hidden["weight"]["maximum"]) == (0, 1e6)


def test_a_failing_pass_replays_with_its_losses(tiny_program: Program, tmp_path: Path) -> None:
    from bitlower.passes import Reproducer, replay

    for name, text in (("one/plugin.py", TRAINS), ("two/plugin.py", GOOD)):
        (tmp_path / name).parent.mkdir()
        load_plugin(write(tmp_path / name, text))
    data = [{"x": torch.randn(2, 16)}]
    with pytest.raises(BitlowerError, match="half") as info:
        PassManager([make_pass("learn", {"losses": ["half"]})], [Reproducer(tmp_path / "r")]).run(
            tiny_program, Context(evaluation=data)
        )
    registry.PASSES.loose.clear()
    LOSSES.loose.clear()
    with pytest.raises(BitlowerError, match="half") as again:
        replay(tmp_path / "r")
    assert str(again.value) == str(info.value)


def test_a_changed_loss_is_another_key_in_the_cache(tiny_program: Program, tmp_path: Path) -> None:
    from bitlower.passes import Cache

    text = TRAINS.replace("raise RuntimeError(str(self.losses.to_list()))", 'print("ran"); return True')
    load_plugin(write(tmp_path / "learn.py", text))
    cache, ran = Cache(tmp_path / "cache"), []
    for body in (GOOD, GOOD, GOOD.replace("sum()", "mean()")):
        load_plugin(write(tmp_path / "half.py", body))
        manager = PassManager([make_pass("learn", {"losses": ["half"]})], cache=cache)
        before = len(list((tmp_path / "cache").rglob("*.json")))
        manager.run(tiny_program, Context())
        ran.append(len(list((tmp_path / "cache").rglob("*.json"))) > before)
    assert ran == [True, False, True]

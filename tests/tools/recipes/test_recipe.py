from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from bitlower.ir import BitlowerError, Scheme
from bitlower.passes import known_passes, make_pass
from bitlower.passes._machinery import registry
from bitlower.passes._machinery.declared import needs_calibration
from bitlower.tools.recipes.recipe import (
    PassStep,
    Recipe,
    dump_recipe,
    load_recipe,
    recipe_schema,
    starter_recipe,
    steps_of,
    validate_recipe,
)
from bitlower.tools.recipes.yaml_writer import yaml_text

GOOD = """\
model: {path: package:some-model, task: feature-extraction}
calibration:
  data: texts/sentences.txt
  samples: 12
evaluation: {data: texts/held.tsv, column: sentence}
passes:
  - clean
  - quantize:
      scheme: {weights: {num_bits: 4, strategy: group, group_size: 32}}
      ignore: ["re:.*pooler.*"]
  - calibrate: {weights: mse, activations: running-minmax}
  - lower-integer:
export:
  - onnx-qdq: {opset: 21}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    for name in ("sentences.txt", "held.tsv"):
        (tmp_path / "texts" / name).write_text("sentence\na text\n")
    return tmp_path


def load(folder: Path, text: str) -> Recipe:
    (folder / "recipe.yaml").write_text(text)
    return load_recipe(folder / "recipe.yaml")


def test_a_recipe_has_typed_sections_and_defaults(folder: Path) -> None:
    recipe = load(folder, GOOD)
    assert recipe.model_source == "package:some-model"
    assert recipe.calibration.model_dump() == {
        "data": "texts/sentences.txt", "column": None, "samples": 12, "max_length": None, "batch_size": None, "seed": 0
    }  # fmt: skip
    assert recipe.evaluation is not None
    assert (recipe.evaluation.samples, recipe.evaluation.column) == (None, "sentence")
    assert recipe.export == [PassStep(name="onnx-qdq", params={"opset": 21})]
    assert recipe.resolve(recipe.calibration.data).read_text() == "sentence\na text\n"


def test_the_passes_are_built_and_checked(folder: Path) -> None:
    passes = validate_recipe(load(folder, GOOD))
    scheme = Scheme.from_dict({"weights": {"num_bits": 4, "strategy": "group", "group_size": 32}})
    assert passes == (
        make_pass("clean"),
        make_pass("quantize", {"scheme": scheme, "ignore": ["re:.*pooler.*"]}),
        make_pass("calibrate", {"weights": "mse", "activations": "running-minmax"}),
        make_pass("lower-integer"),
    )


def test_a_recipe_survives_the_way_to_yaml_and_back(folder: Path) -> None:
    recipe = load(folder, GOOD)
    text = dump_recipe(recipe)
    assert load(folder, text) == recipe
    assert dump_recipe(load(folder, text)) == text
    assert "  - clean\n" in text
    assert "max_length" not in text
    built = recipe.model_copy(update={"passes": steps_of(validate_recipe(recipe))})
    assert validate_recipe(load(folder, dump_recipe(built))) == validate_recipe(recipe)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
    | st.sampled_from(["yes", "null", "1e5", "a: b", "- x", "#", "~", "on", "0x1", "{", "re:.*", "1_0", "2024-01-01"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(["a", "b", "on"]), VALUES, min_size=1))
def test_any_plain_data_survive_the_way_to_yaml(data: dict[str, Any]) -> None:
    assert YAML(typ="safe", pure=True).load(yaml_text(data)) == data


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("task:", "tsk:", 1, "unknown key 'tsk' in model; did you mean 'task'? known: bos, path, task"),
        ("samples: 12", "sampels: 12", 4, "unknown key 'sampels' in calibration; did you mean 'samples'?"),
        ("samples: 12", "samples: '12'", 4, 'calibration.samples should be a valid integer, not "12"'),
        ("samples: 12", "samples: 0", 4, "calibration.samples should be greater than or equal to 1, not 0"),
        ("samples: 12", "samples: 12\n  samples: 13", 5, 'the key "samples" is given twice'),
        ("samples: 12", "samples: [12", 5, "expected ',' or ']'"),
        ("samples: 12", "samples: !!python/object:os.system 12", 4, "a value has the tag"),
        ("  data: texts/sentences.txt\n", "", 2, "calibration needs the key 'data'"),
        ("export:", "exports:", 1, "the recipe needs the key 'export'"),
        ("export:", "exports:", 13, "unknown key 'exports'; did you mean 'export'?"),
        ("  - clean", "  - {clean: {}, calibrate: {}}", 7, "passes.0: write a name, or one name with its parameters"),
        ("  - clean", "  - 7", 7, "passes.0: write a name, or one name with its parameters"),
        ("  - onnx-qdq: {opset: 21}", "  []", 13, "export List should have at least 1 item"),
        ("model: {path: package:some-model, task: feature-extraction}", "model: x", 1, "model must be a mapping"),
    ],
)
def test_a_wrong_form_is_named_with_its_line(folder: Path, old: str, new: str, line: int, message: str) -> None:
    assert old in GOOD
    with pytest.raises(BitlowerError) as info:
        load(folder, GOOD.replace(old, new))
    assert f"{folder / 'recipe.yaml'}:{line}: {message}" in str(info.value)


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("- clean", "- clan", 7, "unknown pass 'clan'; did you mean 'clean'?"),
        ("weights: mse", "weigts: mse", 11, "pass 'calibrate' has no parameter 'weigts'; did you mean 'weights'?"),
        ("weights: mse", "weights: 3", 11, "pass 'calibrate': parameter 'weights' takes one of"),
        ("ignore: [", "ignor: [", 10, "pass 'quantize' has no parameter 'ignor'; did you mean 'ignore'?"),
        (
            "group_size: 32",
            "group_siz: 32",
            9,
            "pass 'quantize': parameter 'scheme': unknown quantization argument 'group_siz'",
        ),
        ("- clean", "- lower-integer", 7, "pass 1, 'lower-integer', takes a program at level simulated; here it is"),
        ("sentences.txt", "nowhere.txt", 3, "the calibration data "),
        ("held.tsv", "nowhere.txt", 5, "the evaluation data "),
        ("package:some-model", "no-folder", 1, "no model folder at "),
        ("passes:", "plugins: [nothing.py]\npasses:", 6, "no plugin file "),
    ],
)
def test_a_wrong_content_is_named_with_its_line(folder: Path, old: str, new: str, line: int, message: str) -> None:
    assert old in GOOD
    recipe = load(folder, GOOD.replace(old, new))
    with pytest.raises(BitlowerError) as info:
        validate_recipe(recipe)
    assert str(info.value).startswith(f"{folder / 'recipe.yaml'}:{line}: {message}")
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "recipe.yaml:1: the recipe must be a mapping"),
        (b"- a\n- b\n", "recipe.yaml:1: the recipe must be a mapping"),
        (b"model: \xff\n", "recipe.yaml is not a text file (byte 7 is not UTF-8)"),
        (b"model: \x00\n", "recipe.yaml is not YAML"),
        (b"model: *nothing\n", "recipe.yaml:1: found undefined alias"),
        (b"[" * 3000, "recipe.yaml"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, raw: bytes, message: str) -> None:
    (tmp_path / "recipe.yaml").write_bytes(raw)
    with pytest.raises(BitlowerError) as info:
        load_recipe(tmp_path / "recipe.yaml")
    assert message in str(info.value)
    assert "\n" not in str(info.value)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(BitlowerError, match=r"cannot read the recipe .*nowhere.yaml \(No such file or directory\)"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_plugins_lie_beside_the_recipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.PASSES, "loose", {})
    source = Path(__file__).parents[2] / "plugin_package" / "fold_scales.py"
    (folder / "mine.py").write_text(source.read_text())
    text = GOOD.replace("passes:\n", "plugins: [mine.py]\npasses:\n  - fold-scales: {max-ratio: 2}\n")
    assert validate_recipe(load(folder, text))[0] == make_pass("fold-scales", {"max_ratio": 2.0})


def test_the_starter_recipe_is_valid_once_its_data_are_there(tmp_path: Path) -> None:
    recipe = load(tmp_path, starter_recipe("package:some-model"))
    assert recipe.model.path == "package:some-model"
    (tmp_path / "calibration.txt").write_text("a\n")
    assert [pass_.name for pass_ in validate_recipe(recipe)] == ["clean", "quantize", "calibrate", "lower-integer"]
    assert load(tmp_path, starter_recipe('C:\\a "b": #c')).model.path == 'C:\\a "b": #c'


def test_the_schema_knows_every_pass_and_its_parameters() -> None:
    schema = recipe_schema()
    json.dumps(schema)
    assert schema["required"] == ["model", "passes", "export"]
    assert schema["additionalProperties"] is False
    named, with_parameters = schema["properties"]["passes"]["items"]["anyOf"]
    assert set(with_parameters["properties"]) == set(named["examples"]) == set(known_passes())
    calibrate = with_parameters["properties"]["calibrate"]
    assert calibrate["additionalProperties"] is False
    assert "mse" in calibrate["properties"]["weights"]["enum"]
    quantize = with_parameters["properties"]["quantize"]["properties"]
    assert quantize["scheme"]["anyOf"] == [{"type": "string"}, {"type": "object"}]
    assert quantize["scheme"]["default"] == "W8A8"
    assert quantize["ignore"] == {
        "type": "array", "items": {"type": "string"}, "default": [],
        "description": "Patterns of module paths whose tensors stay float.",
    }  # fmt: skip
    gptq = with_parameters["properties"]["gptq"]["properties"]
    assert (gptq["damping"]["minimum"], gptq["damping"]["maximum"]) == (0, 1)
    batches = with_parameters["properties"]["analyze-outliers"]["properties"]["batches"]
    assert batches["anyOf"] == [{"type": "integer", "minimum": 1}, {"type": "null"}]


NEEDING = (
    "adaround", "analyze-embeddings", "analyze-outliers", "analyze-sensitivity", "assign-precision", "correct-bias",
    "gptq", "peg-permute", "smooth",
)  # fmt: skip


def test_a_pass_that_needs_calibration_data_is_refused_without(folder: Path) -> None:
    """Before anything is loaded; its line is named."""
    steps = "".join(f"  - {name}\n" for name in ("clean", "quantize", "gptq", "lower-integer"))
    text = f"model: {{path: package:some-model}}\npasses:\n{steps}export:\n  - onnx-qdq\n"
    with pytest.raises(BitlowerError) as caught:
        validate_recipe(load(folder, text))
    expected = "pass 'gptq' needs calibration data, and there are none; add a section `calibration`"
    assert str(caught.value) == f"{folder / 'recipe.yaml'}:5: {expected}"
    validate_recipe(load(folder, text.replace("gptq", "rtn")))
    validate_recipe(load(folder, text + "calibration: {data: texts/sentences.txt}\n"))


def test_which_passes_need_calibration_data() -> None:
    made = {name: make_pass(name, {"share-16": 0.5} if name == "assign-precision" else {}) for name in known_passes()}
    assert {name for name, pass_ in made.items() if needs_calibration(pass_)} == {*NEEDING}
    assert not needs_calibration(make_pass("assign-precision", {"set": "paper"}))

"""What the documents list is what the code has: keys, options, choices, fields, limits."""

from __future__ import annotations

import json
import re
import runpy
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest

from bitlower.backends.base import Backend
from bitlower.backends.registry import find_backend, known_backends
from bitlower.ir.plugins.parameters import kebab
from bitlower.passes import describe_type, find_pass, parameter_types
from bitlower.passes._machinery.losses import known_losses
from bitlower.tools.data import sources, texts, training
from bitlower.tools.runs import standard

_READ = runpy.run_path(str(Path(__file__).with_name("docs_pages.py")))
ROOT, TEXT, section, rows, names = (_READ[name] for name in ("ROOT", "TEXT", "section", "rows", "names"))


def test_recipe_keys_are_documented() -> None:
    from bitlower.tools.recipes.recipe import DataSection, ModelSection, Recipe, TrainingSection

    headings = re.findall(r"^## `(\w+)`$", TEXT[ROOT / "docs" / "recipes.md"], re.MULTILINE)
    assert set(headings) == set(Recipe.model_fields)
    for heading, keys in (
        ("`model`", ModelSection),
        ("`calibration`", DataSection),
        ("`training`", TrainingSection),
    ):
        assert names(rows(section("recipes.md", heading), "key")) == list(keys.model_fields)


def test_defaults_by_task_are_those_of_the_code() -> None:

    text = section("recipes.md", "`calibration`")
    found = [[re.findall(r"\d+", cell) for cell in row[1:]] for row in rows(text, "left out")]
    wanted = [
        [[texts.SAMPLES, texts.FEWEST], [sources.WINDOWS]],
        [[sources.TEXT_LENGTH], [sources.WINDOW_LENGTH]],
        [[sources.TEXT_BATCH], [sources.WINDOW_BATCH]],
        [[texts.HELD_OUT], [sources.HELD_OUT_WINDOWS]],
        [[sources.HELD_OUT_TEXTS], [sources.HELD_OUT_WINDOWS]],
    ]
    assert found == [[list(map(str, cell)) for cell in row] for row in wanted]
    assert sources.TEXTS == texts.SAMPLES
    assert f"first {sources.LONGEST_TEXT} characters" in text


def test_defaults_of_training_are_those_of_the_code() -> None:

    table = {row[0].strip("`"): row[2] for row in rows(section("recipes.md", "`training`"), "key")}
    found = {key: re.findall(r"\d+", table[key]) for key in ("held_out", "batch_size", "seed")}
    most, sizes = (training.MOST_TEXTS, training.MOST_WINDOWS), (training.TEXT_BATCH, sources.WINDOW_BATCH)
    assert found == {"held_out": [*map(str, most)], "batch_size": [*map(str, sizes)], "seed": ["0"]}
    assert ("a tenth" in table["held_out"]) == (training.SHARE == 0.1)


def test_backends_are_documented() -> None:
    text = section("recipes.md", "`export`")
    assert sorted(re.findall(r"^### `([\w-]+)`$", text, re.MULTILINE)) == known_backends()


@pytest.mark.parametrize("backend", known_backends())
def test_options_of_backends_are_as_documented(backend: str) -> None:
    table = rows(section("recipes.md", "`export`", f"`{backend}`"), "option")
    documented = {row[0].strip("`"): (row[1], row[2].strip("`")) for row in table}
    cls = find_backend(backend)
    kinds, defaults = parameter_types(cls), {field.name: field.default for field in fields(cls)}
    as_yaml = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in defaults.items()}
    assert documented == {name: (describe_type(kinds[kebab(name)]), value) for name, value in as_yaml.items()}


def test_what_checkpoint_formats_hold_is_as_documented() -> None:
    from bitlower.backends.checkpoint.format import known_formats
    from bitlower.backends.checkpoint.formats.gptq_v2 import GptqV2

    text = section("recipes.md", "`export`", "`checkpoint`")
    assert all(f"`{name}`" in text for name in known_formats())
    table = {row[0]: row[2] for row in rows(text, "")}
    assert table["bits"] == ", ".join(map(str, GptqV2.bits))
    assert table["groups"] == f"{', '.join(map(str, GptqV2.group_sizes[1:]))}, or whole rows"


def test_the_interface_of_backends_is_documented() -> None:
    cells = [row[0] for row in rows(section("plugins.md", "Backends"), "member")]
    listed = {name for cell in cells for name in re.findall(r"`(\w+)", cell)}
    own = {name for name in vars(Backend) if not name.startswith("_")}
    assert listed == own - {"check_fits", "options"}


def test_choices_of_gptq_are_documented() -> None:
    types = parameter_types(find_pass("gptq"))
    for parameter in ("weighting", "order", "ranges"):
        choices = describe_type(types[parameter]).removeprefix("one of ").split(", ")
        assert names(rows(section("passes.md", "`gptq`"), f"`{parameter}`")) == choices


def test_losses_are_documented() -> None:
    found: dict[str, dict[str, str]] = {}
    entry: dict[str, str] = {}
    for name, parameter, default, _ in rows(section("passes.md", "Losses"), "loss"):
        entry = found.setdefault(name.strip("`"), {}) if name else entry
        if parameter:
            entry[parameter.strip("`")] = default.strip("`")
    wanted = {}
    for name, cls in known_losses().items():
        defaults = {kebab(field.name): json.dumps(field.default) for field in fields(cls)}
        wanted[name] = {key: value for key, value in defaults.items() if (key, value) != ("weight", "1.0")}
    assert found == wanted


def test_figures_of_the_verdict_are_documented() -> None:
    from bitlower.tools.verdict.figures import MEANINGS

    table = rows(section("artifact.md", "The verdict"), "figure")
    assert names(table) == list(MEANINGS)
    for (_, text, normal), meaning in zip(table, MEANINGS.values(), strict=True):
        unit = f" ({meaning.unit})" if meaning.unit else ""
        assert text == meaning.text + unit
        few = f"; fewer than 8 bits: {meaning.normal(few_bits=True)}" if meaning.few is not None else ""
        assert normal in (meaning.normal() + few, "all")


def test_reports_and_rules_are_documented() -> None:
    from bitlower.backends.onnx_qdq.encoding.narrow import SMALL
    from bitlower.ir.token_weights import CLIP
    from bitlower.passes.canonical._rules import RULES
    from bitlower.passes.rounding.adaround import AdaroundRow
    from bitlower.passes.rounding.gptq import GptqRow
    from bitlower.passes.training._block_loop import TrainedBlockRow

    assert set(names(rows(section("passes.md", "`gptq`"), "field"))) == {field.name for field in fields(GptqRow)}
    assert set(names(rows(section("passes.md", "`adaround`"), "field"))) == {
        field.name for field in fields(AdaroundRow)
    }
    assert set(names(rows(section("passes.md", "`autoround`", "The error of a block"), "field"))) == {
        field.name for field in fields(TrainedBlockRow)
    }
    assert f"fewer than {SMALL:,} codes" in section("onnx.md", "Few bits beside quantized activations")
    assert sorted(names(rows(section("passes.md", "`clean`"), "rule"))) == sorted(rule.name for rule in RULES)
    assert f"min(1, {CLIP:g} · median" in section("passes.md", "`gptq`")


def test_algorithms_formats_and_tasks_are_documented() -> None:
    from bitlower.ir.tasks import TASKS
    from bitlower.tools.cli.eval import GENERATION
    from bitlower.tools.evaluation import evaluate

    table = {row[0]: row[1] for row in rows(section("cli.md", "`bitlower quantize MODEL`"))}
    for option, known in (
        ("`--algorithm`", standard.ALGORITHMS),
        ("`--format`", standard.known_formats()),
        ("`--task`", TASKS),
    ):
        assert set(known) == set(re.findall(r"`([\w-]+)`", table[option])), option
    tasks = next(row[1] for row in rows(section("cli.md", "`bitlower eval DIR|MODEL`")) if row[0] == "`--task`")
    assert re.findall(r"`([\w-]+)`:", tasks) == [*evaluate.TASKS, GENERATION]


def test_the_json_of_a_text_evaluation_is_documented() -> None:
    from bitlower.tools.evaluation.generation import Sample
    from bitlower.tools.evaluation.perplexity import Perplexity, TextEvaluation

    table = rows(section("cli.md", "`bitlower eval DIR|MODEL`"), "key")
    empty = TextEvaluation("", "", "", None, Perplexity(1.0, 1, 2, 2, 1, 2))
    assert set(names(table)) == set(empty.to_dict())
    entry = next(row[1] for row in table if row[0] == "`samples`")
    assert re.findall(r"`(\w+)`", entry) == [field.name for field in fields(Sample)]


def test_the_placement_table_adds_up() -> None:
    cells = [row for row in rows(section("schemes.md", "Roles and placement")) if len(row) == 3]
    total, sums = 0, []
    for name, _, count in cells:
        if name.startswith("**"):
            sums.append((total, count))
            total = 0
        else:
            total += int(count)
    assert sums == [(102, "**102**"), (161, "**161**")]


def test_roles_and_conventions_are_documented() -> None:
    from bitlower.ir import ScaleConvention
    from bitlower.ir.quantization.scheme import ACTIVATION_ROLES, WEIGHT_ROLES
    from bitlower.passes.quantizers.calibrate import Estimator

    text = TEXT[ROOT / "docs" / "schemes.md"]
    for name in (*WEIGHT_ROLES, *ACTIVATION_ROLES, *map(str, ScaleConvention), *Estimator.__args__):
        assert f"| `{name}` |" in text, name


def test_thresholds_are_those_of_the_code() -> None:
    from bitlower.backends.artifact import rounding, selftest
    from bitlower.backends.onnx_qdq.verify import codes, compare

    text = TEXT[ROOT / "docs" / "artifact.md"]
    assert f"off it by {rounding.TIE:.0e}".replace("e-0", "e-") in text
    assert f"at most {compare.OUTPUT_GIVEN_CODES:.0e} of".replace("e-0", "e-") in text
    assert f"output is {compare.OUTPUT_COSINE} at least" in text
    assert f"cosine of {selftest.LEAST} at least" in text.replace("\n", " ")
    assert f"within {codes.SCALE:.0e}".replace("e-0", "e-") in text
    assert compare.CODES_EQUAL == 0.5


@pytest.mark.parametrize(
    ("backend", "heading"), [("onnx-qdq", "Verification"), ("checkpoint", "Checkpoints"), ("tvm-kernels", "Libraries")]
)
def test_the_fields_of_a_verification_are_documented(backend: str, heading: str) -> None:
    text = section("artifact.md", heading)
    for field in fields(import_module(f"bitlower.backends.{backend.replace('-', '_')}").Verification):
        assert f"`{field.name}`" in text, field.name


def test_the_figures_of_kernels_and_layers_are_documented() -> None:
    from bitlower.backends.checkpoint.verify.record import LayerCheck, OutputCheck
    from bitlower.backends.onnx_qdq.verify.runtime_kernels import KernelReport

    text = TEXT[ROOT / "docs" / "artifact.md"]
    for field in [*fields(KernelReport), *fields(LayerCheck), *fields(OutputCheck)]:
        assert f"`{field.name}`" in text or field.name == "name", field.name


def test_the_limits_of_checkpoints_are_those_of_the_code() -> None:
    from bitlower.backends.checkpoint.verify import outputs

    text = section("artifact.md", "Checkpoints")
    assert f"at most {outputs.GIVEN_WEIGHTS:.0e} standard".replace("e-0", "e-") in text
    assert f"Program's is {outputs.OUTPUT_COSINE} at least" in text


def test_the_limits_of_libraries_are_those_of_the_code() -> None:
    from bitlower.backends.artifact import rounding
    from bitlower.backends.tvm_kernels.verify import agreement, record

    text = section("artifact.md", "Libraries")
    assert f"off it by {rounding.TIE:.0e} of".replace("e-0", "e-") in text
    assert f"at most {agreement.VALUE:.0e} of the root".replace("e-0", "e-") in text
    assert f"within {agreement.QPARAM:.0e}, relatively".replace("e-0", "e-") in text
    assert f"{100 * agreement.TURNED:g} % may be turned over" in text
    half = agreement.FLOAT16
    value, qparam, tie = (f"{limit:.0e}".replace("e-0", "e-") for limit in (half.value, half.qparam, half.tie))
    assert f"may be {value} of the root mean square" in text
    assert f"chosen scales {qparam}, codes {tie} of the range" in text
    for field in fields(record.KernelError):
        assert f"`{field.name}`" in text, field.name


def test_the_signature_of_decoders_is_as_documented() -> None:
    from bitlower.frontends._states import State
    from bitlower.frontends.decoder import Signature

    signature = Signature(True, ((State("key", (2, None, 4)), State("value", (2, None, 4))),))
    text = section("concepts.md", "Decoders")
    inputs = {name: row[1] for row in rows(text, "input") for name in names([row])}
    for name, shape in signature.inputs().items():
        wanted = [
            str(dim) if isinstance(dim, str) else {1: "heads", 3: "width"}[axis] for axis, dim in enumerate(shape)
        ]
        assert inputs[name].partition("[")[2] == f"{', '.join(wanted)}]"
    assert names(rows(text, "output")) == signature.outputs()


def test_kernels_for_low_bits_are_as_documented() -> None:
    from bitlower.backends.onnx_qdq.encoding.nbits import Container, container
    from bitlower.ir import Granularity, Grid, QuantSpec

    stored = {}
    for bits in range(2, 9):
        spec = QuantSpec(Grid(bits), Granularity.per_group(64))
        kinds = (container(spec, (8, 256), (8, 4), level) for level in (1, 4))
        stored[bits] = [kind.bits if isinstance(kind, Container) else None for kind in kinds]
    assert stored == {2: [4, 2], 3: [4, 4], 4: [4, 4], 5: [None, 8], 6: [None, 8], 7: [None, 8], 8: [None, 8]}
    table = [row[0] for row in rows(section("onnx.md", "Weights alone: MatMulNBits"), "bits")]
    assert table == ["2", "3, 4", "5 to 8"]


@pytest.mark.parametrize("file", sorted((ROOT / "tests" / "passes").glob("*/golden/*.txt")), ids=lambda file: file.stem)
def test_what_a_pass_does_is_shown_before_and_after(file: Path) -> None:
    assert f"```text golden\n{file.read_text(encoding='utf-8')}```" in section("passes.md", f"`{file.stem}`")

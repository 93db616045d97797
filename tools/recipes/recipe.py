"""Recipes: a YAML file that says which model, which data, which passes and which artifacts.

Paths are relative to the recipe file's folder (to the working directory for a recipe made in Python); ``package:NAME``
names weights inside an installed package, ``hf:ORG/NAME`` those of the Hugging Face hub. Every mistake is reported with
file and line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_serializer,
    model_validator,
)

from bitlower.backends.base import Backend
from bitlower.backends.registry import make_backend
from bitlower.frontends.locate import is_named, missing
from bitlower.ir import BitlowerError, Level, nearest, shorten
from bitlower.ir.files import check_name
from bitlower.passes import (
    PASSES,
    Pass,
    check_levels,
    load_plugin,
    make_pass,
    needs_calibration,
    plain_parameters,
    trains,
)
from bitlower.tools.recipes.places import RecipeSource, with_place
from bitlower.tools.recipes.schema import passes_schema
from bitlower.tools.recipes.yaml_reader import read_yaml
from bitlower.tools.recipes.yaml_writer import yaml_text

_MISTAKES = 15
"""Shown of one recipe."""


class Section(BaseModel):
    """A part of a recipe: frozen, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelSection(Section):
    """The model: a Hugging Face folder, ``package:NAME`` or ``hf:ORG/NAME``; ``task`` as it says itself if left out.

    ``bos`` says what the windows of a language model begin with: what its tokenizer puts first (``auto``), its token
    for the beginning even where the tokenizer does not add it (``always``), or nothing (``never``).
    """

    path: str = Field(min_length=1)
    task: str | None = None
    bos: Literal["auto", "always", "never"] = "auto"


Count = Annotated[int, Field(ge=1, lt=1 << 31)]
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]


def _columns(form: object) -> object:
    if form is None or isinstance(form, str) or (isinstance(form, list) and len(form) == 2):
        return form
    raise ValueError("write a column, or a list of two for pairs of texts")


class DataSection(Section):
    """Texts: one a line, or the column ``column`` of a table; ``samples`` of them drawn with ``seed``.

    For pairs of texts, and for the sources and targets of an encoder-decoder, ``column`` is a list of two.

    For a language model (task text-generation) the file is one long text, and a sample is a window of ``max_length``
    tokens of it. What is left out takes the defaults of the task (:mod:`bitlower.tools.data.sources`).
    """

    data: str = Field(min_length=1)
    column: Annotated[str | list[str] | None, BeforeValidator(_columns)] = None
    samples: Count | None = None
    max_length: Count | None = None
    batch_size: Count | None = None
    seed: Seed = 0


class EvaluationSection(DataSection):
    """Held-out texts for the ledger and for checks."""


def _held_out(form: object) -> object:
    if form is None or (isinstance(form, str) and form) or (isinstance(form, float) and 0 < form < 1):
        return form
    raise ValueError("write a share of the rows, more than 0 and less than 1, or a file")


class TrainingSection(Section):
    """Texts, pairs of texts or windows to train on, with labels if ``label`` names their column.

    ``held_out`` is the share of the rows, or another file with the same columns, by which the best step is chosen.
    What is left out takes the defaults of the task (:mod:`bitlower.tools.data.training`).
    """

    data: str = Field(min_length=1)
    column: Annotated[str | list[str] | None, BeforeValidator(_columns)] = None
    label: str | None = None
    samples: Count | None = None
    held_out: Annotated[float | str | None, BeforeValidator(_held_out)] = None
    max_length: Count | None = None
    batch_size: Count | None = None
    seed: Seed = 0


class PassStep(Section):
    """A pass or an export: a name, or a name with parameters; in YAML ``name`` or ``name: {parameters}``."""

    name: str
    params: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, form: Any) -> Any:
        if isinstance(form, str):
            return {"name": form}
        if isinstance(form, Mapping) and len(form) == 1:
            ((name, params),) = form.items()
            if isinstance(name, str) and (params is None or isinstance(params, Mapping)):
                return {"name": name, "params": {str(key): value for key, value in (params or {}).items()}}
        if isinstance(form, Mapping) and form.keys() == {"name", "params"}:
            return form
        raise ValueError("write a name, or one name with its parameters: `- name: {parameter: value}`")

    @model_serializer
    def _to_yaml(self) -> str | dict[str, Any]:
        return {self.name: self.params} if self.params else self.name


class Recipe(Section):
    """A whole recipe; with ``report`` an artifact has a report that also knows what the run took."""

    model: ModelSection
    calibration: DataSection | None = None
    evaluation: EvaluationSection | None = None
    training: TrainingSection | None = None
    plugins: list[str] = Field(default_factory=list, max_length=PASSES)
    passes: list[PassStep] = Field(max_length=PASSES)
    export: list[PassStep] = Field(min_length=1, max_length=PASSES)
    report: bool = False

    _source: RecipeSource | None = PrivateAttr(None)

    def __eq__(self, other: object) -> bool:
        """Equal contents, from whatever file."""
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    def resolve(self, path: str) -> Path:
        """``path`` as seen from the recipe file's folder."""
        return (self._source.path.parent if self._source else Path()) / path

    @property
    def model_source(self) -> str:
        """The model, ready for ``frontends.load``: ``package:NAME``, ``hf:ORG/NAME``, or the path of a folder."""
        return self.model.path if is_named(self.model.path) else str(self.resolve(self.model.path))

    @property
    def seed(self) -> int:
        """The root of all randomness: that of the calibration data, else of the training data, 0 without either."""
        section = self.calibration or self.training
        return section.seed if section else 0

    def build_passes(self) -> tuple[Pass, ...]:
        """The passes, after loading the plugins.

        Raises:
            BitlowerError: a plugin fails, or a pass or parameter is wrong; names file and line.
        """
        for index, plugin in enumerate(self.plugins):
            with_place(self._source, ("plugins", index), load_plugin, self.resolve(plugin))
        return tuple(
            with_place(self._source, ("passes", index, step.name), make_pass, step.name, step.params)
            for index, step in enumerate(self.passes)
        )

    def build_exports(self) -> tuple[Backend, ...]:
        """The backends of ``export``.

        Raises:
            BitlowerError: a backend or an option is wrong; names file and line.
        """
        return tuple(
            with_place(self._source, ("export", index, step.name), make_backend, step.name, step.params)
            for index, step in enumerate(self.export)
        )


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe and check its form; passes are looked up by :func:`validate_recipe`.

    Raises:
        BitlowerError: no such file, not YAML, or not a recipe: one line a mistake, each with file and line.
    """
    path = Path(path)
    root, data = read_yaml(path)
    source = RecipeSource(path, root)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise BitlowerError(_problems(source, error.errors(include_url=False))) from None
    recipe._source = source
    return recipe


def validate_recipe(recipe: Recipe) -> tuple[Pass, ...]:
    """Check what can be checked before the model is loaded, and return the passes.

    Raises:
        BitlowerError: a pass or a parameter is unknown or wrong, the levels of the passes do not go together, a pass
            trains or needs calibration data and there are none, or a data file or model folder does not exist.
    """
    passes = recipe.build_passes()
    level = Level.FLOAT
    for index, pass_ in enumerate(passes):
        level = with_place(recipe._source, ("passes", index), check_levels, [pass_], level, index + 1)
    _check_training(recipe, passes)
    _check_calibration(recipe, passes)
    for name in ("calibration", "evaluation", "training"):
        section: DataSection | TrainingSection | None = getattr(recipe, name)
        if section is not None:
            with_place(recipe._source, (name, "data"), _require, recipe.resolve(section.data), f"the {name} data")
    if recipe.training and isinstance(held_out := recipe.training.held_out, str):
        place = ("training", "held_out")
        with_place(recipe._source, place, _require, recipe.resolve(held_out), "the held-out data")
    if not is_named(recipe.model.path):
        with_place(recipe._source, ("model", "path"), _require_model, recipe)
    return passes


def _check_training(recipe: Recipe, passes: Sequence[Pass]) -> None:
    """See that a pass that trains has data, and that data to train on have such a pass."""
    data = recipe.training or recipe.calibration
    for index, pass_ in enumerate(passes):
        if with_place(recipe._source, ("passes", index), trains, pass_) and not data:
            message = f"pass {pass_.name!r} trains, and there are no data to train on"
            with_place(recipe._source, ("passes", index), _refuse, message, "add a section `training`")
    if recipe.training and not any(map(trains, passes)):
        hint = "add a pass that trains, or leave the section out"
        with_place(recipe._source, ("training",), _refuse, "no pass trains on the training data", hint)


def _check_calibration(recipe: Recipe, passes: Sequence[Pass]) -> None:
    """See that a pass that cannot do without calibration data has some."""
    for index, pass_ in enumerate(passes):
        if with_place(recipe._source, ("passes", index), needs_calibration, pass_) and not recipe.calibration:
            message = f"pass {pass_.name!r} needs calibration data, and there are none"
            with_place(recipe._source, ("passes", index), _refuse, message, "add a section `calibration`")


def _refuse(message: str, hint: str) -> None:
    raise BitlowerError(message, hint=hint)


def _require(path: Path, what: str) -> None:
    if not check_name(path).exists():
        raise BitlowerError(f"{what} {path} does not exist", hint="paths are relative to the recipe's folder")


def _require_model(recipe: Recipe) -> None:
    if not check_name(recipe.model_source).exists():
        error = missing(recipe.model.path)
        raise BitlowerError(error.message, hint=f"{error.hint}; paths are relative to the recipe's folder")


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, defaults left out: loading it returns an equal recipe."""
    return yaml_text(recipe.model_dump(exclude_defaults=True))


def step_of(pass_: Pass) -> PassStep:
    """The recipe's form of a pass."""
    return PassStep(name=pass_.name, params=plain_parameters(pass_))


def steps_of(passes: Iterable[Pass]) -> list[PassStep]:
    """The recipe's form of a pipeline."""
    return [step_of(pass_) for pass_ in passes]


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of recipes, with the parameters of all own passes, for editors."""
    schema = Recipe.model_json_schema(mode="validation")
    step = {"anyOf": [{"type": "string"}, {"type": "object", "maxProperties": 1, "minProperties": 1}]}
    schema["$defs"]["Step"] = {"description": (PassStep.__doc__ or "").strip(), **step}
    schema["properties"]["passes"]["items"] = passes_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def starter_recipe(model: str) -> str:
    """A recipe to begin with, for ``model`` (a folder or a name), as commented YAML."""
    return f"""\
# Run it: bitlower run recipe.yaml -o artifact
model:
  path: {json.dumps(model)}  # a Hugging Face folder, package:NAME or hf:ORG/NAME
calibration:  # ranges are estimated on these texts
  data: calibration.txt  # one text a line; for a TSV or JSONL file add `column: NAME`
  samples: 128
  max_length: 128
# evaluation:  # other texts, for the ledger and for checks
#   data: held_out.txt
passes:
  - clean
  - quantize: {{scheme: W8A8}}  # or W8A8-full, W8A8-token, W4A16-g128, ...
  - calibrate
  - lower-integer
export:
  - onnx-qdq
"""


def _problems(source: RecipeSource, details: Sequence[Any]) -> str:
    """A line for each mistake, as far as they fit on a screen."""
    lines = [_problem(source, detail) for detail in details[:_MISTAKES]]
    more = [f"… and {len(details) - _MISTAKES} more mistakes"] if len(details) > _MISTAKES else []
    return "\n".join([*lines, *more])


def _problem(source: RecipeSource, detail: Any) -> str:
    """One mistake that pydantic found, in our words."""
    place = tuple(part for part in detail["loc"] if not (isinstance(part, str) and part.startswith("function-")))
    where, name = source.locate(place), ".".join(map(str, place))
    match detail["type"]:
        case "extra_forbidden":
            section = f" in {'.'.join(map(str, place[:-1]))}" if len(place) > 1 else ""
            hint = nearest(str(place[-1]), _known_keys(place[:-1]))
            return f"{where}: unknown key {str(place[-1])!r}{section}; {hint}"
        case "missing":
            section = ".".join(map(str, place[:-1])) or "the recipe"
            return f"{where}: {section} needs the key {str(place[-1])!r}"
        case "model_type" | "model_attributes_type":
            return f"{where}: {name or 'the recipe'} must be a mapping of keys to values"
        case "value_error":
            return f"{where}: {name}: {detail['ctx']['error']}"
        case _:
            message = str(detail["msg"]).removeprefix("Input ")
            return f"{where}: {name} {message}, not {shorten(json.dumps(detail['input'], default=str))}"


def _known_keys(place: Sequence[str | int]) -> list[str]:
    sections: dict[str, type[Section]] = {
        "model": ModelSection,
        "calibration": DataSection,
        "evaluation": EvaluationSection,
        "training": TrainingSection,
    }
    return list((sections.get(str(place[0]), Recipe) if place else Recipe).model_fields)

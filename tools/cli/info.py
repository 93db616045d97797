"""The commands that inform: ``passes list|show|schema`` and ``recipe init|validate|schema``."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitlower.tools.cli.settings import Settings, settings_of

if TYPE_CHECKING:
    from bitlower.passes import Pass

passes_app = typer.Typer(help="What passes there are and what they take.", no_args_is_help=True)
recipe_app = typer.Typer(help="Write and check recipes.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add these commands to ``app``."""
    app.add_typer(passes_app, name="passes")
    app.add_typer(recipe_app, name="recipe")


@passes_app.command("list")
def passes_list(context: typer.Context) -> None:
    """List every pass: the contract on the numbers, the levels, and what it does."""
    from bitlower.tools.cli.pass_table import PassRow, own_passes
    from bitlower.tools.render import make_table

    settings = settings_of(context)
    forms = [] if _static(settings) else [_describe(cls) for cls in _all_passes().values()]
    rows = [PassRow(f["name"], f["contract"], f["requires"], f["ensures"] or "same", f["summary"]) for f in forms]
    cells = [(row.name, row.contract, f"{row.requires} → {row.ensures}", row.summary) for row in rows or own_passes()]
    columns = ("pass", "contract", "levels", "what it does")
    settings.display().result({"passes": forms}, make_table("passes", columns, cells))


@passes_app.command("show")
def passes_show(context: typer.Context, name: Annotated[str, typer.Argument(metavar="PASS", help="A pass.")]) -> None:
    """Show one pass: its documentation and its parameters with types and defaults."""
    from bitlower.passes import find_pass
    from bitlower.tools.render import make_table

    settings = settings_of(context)
    form = _describe(find_pass(name))
    rows = [(p["name"], p["type"], _default(p), p["doc"]) for p in form["parameters"]]
    title = f"{name} ({form['contract']}, {form['requires']} → {form['ensures'] or 'same'})\n{form['doc']}"
    settings.display().result(form, make_table(title, ("parameter", "type", "default", "meaning"), rows))


@passes_app.command("schema")
def passes_schema(context: typer.Context) -> None:
    """Print every pass and its parameters as JSON."""
    import json

    form = {"passes": [_describe(cls) for cls in _all_passes().values()]}
    settings_of(context).display().text(form, json.dumps(form, indent=2, ensure_ascii=False))


@recipe_app.command("init")
def recipe_init(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, or package:NAME.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="A new file; standard output if none.")] = None,
) -> None:
    """Write a recipe to begin with, for you to edit."""
    from bitlower.ir import BitlowerError
    from bitlower.tools.recipes.recipe import starter_recipe

    display = settings_of(context).display()
    text = starter_recipe(model)
    if output is None:
        display.text({"recipe": text}, text.rstrip("\n"))
        return
    try:
        with output.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise BitlowerError(f"{output} exists already", hint="choose another name") from None
    except OSError as error:
        raise BitlowerError(f"cannot write {output}: {error.strerror}") from None
    display.text({"recipe": str(output)}, f"wrote {output}")


@recipe_app.command("validate")
def recipe_validate(
    context: typer.Context, recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file.")]
) -> None:
    """Check a recipe: keys, passes, parameters, and that its data file can be read."""
    from bitlower.passes import format_pipeline
    from bitlower.tools.recipes.recipe import load_recipe
    from bitlower.tools.runs.flow import recipe_job

    display = settings_of(context).display()
    job = recipe_job(load_recipe(recipe))
    job.check()
    text = format_pipeline(job.passes)
    display.text({"recipe": str(recipe), "valid": True, "pipeline": text}, f"{recipe} is valid: {text}")


@recipe_app.command("schema")
def recipe_schema(context: typer.Context) -> None:
    """Print the JSON schema of recipes, for editors."""
    import json

    from bitlower.tools.recipes.recipe import recipe_schema

    form = recipe_schema()
    settings_of(context).display().text(form, json.dumps(form, indent=2))


def _static(settings: Settings) -> bool:
    """Whether the source says what a table of passes has: JSON has parameters too, and plugins are run anyway."""
    from bitlower.tools.cli.pass_table import UnreadableError, own_passes

    if settings.machine or settings.plugins:
        return False
    try:
        return bool(own_passes())
    except (UnreadableError, KeyError, OSError, SyntaxError):
        return False


def _default(parameter: dict[str, Any]) -> str:
    import json

    return json.dumps(parameter["default"], ensure_ascii=False) if "default" in parameter else "(needed)"


def _all_passes() -> dict[str, type[Pass]]:
    from bitlower.passes import known_passes

    return known_passes()


def _describe(cls: type[Pass]) -> dict[str, Any]:
    """A pass as plain data."""
    from bitlower.ir import Level
    from bitlower.ir.plugins.field_docs import without_markup

    doc = without_markup(inspect.cleandoc(cls.__doc__ or ""))
    return {
        "name": cls.name,
        "summary": doc.partition("\n")[0],
        "doc": doc,
        "contract": str(cls.contract),
        "requires": "any" if set(cls.requires) == set(Level) else "|".join(sorted(cls.requires)),
        "ensures": str(cls.ensures) if cls.ensures else None,
        "parameters": _parameters(cls),
    }


def _parameters(cls: type[Pass]) -> list[dict[str, Any]]:
    """Name, type, default (absent where one must be given) and documentation of each parameter."""
    from bitlower.ir.plugins.field_docs import field_docs
    from bitlower.ir.plugins.kinds import kebab
    from bitlower.ir.plugins.parameters import plain
    from bitlower.passes import describe_type, parameter_types

    kinds, documentation = parameter_types(cls), field_docs(cls)
    forms = []
    for field in dataclasses.fields(cls):
        kind = kinds[kebab(field.name)]
        form = {"name": kebab(field.name), "type": describe_type(kind), "doc": documentation.get(field.name, "")}
        if field.default is not dataclasses.MISSING:
            form["default"] = plain(kind, field.default)
        elif field.default_factory is not dataclasses.MISSING:
            form["default"] = plain(kind, field.default_factory())
        forms.append(form)
    return forms

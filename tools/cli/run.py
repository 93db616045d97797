"""The commands that work on models: ``run``, ``quantize``, ``analyze``, ``plan``, ``verify``, ``replay``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitlower.tools.cli.conditions import FailIf, finish, verdict_conditions
from bitlower.tools.cli.eval import evaluate
from bitlower.tools.cli.eval_options import Bos
from bitlower.tools.cli.explain import explain
from bitlower.tools.cli.report import report
from bitlower.tools.cli.settings import Settings, settings_of

if TYPE_CHECKING:
    from rich.table import Table

    from bitlower.tools.recipes.recipe import Recipe
    from bitlower.tools.runs.flow import RunOptions

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A Hugging Face folder, a GGUF file, package:NAME, or hf:ORG/NAME.")
]
Output = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        help="The artifact's folder, which must not exist yet; if not given, one in the working folder that is called "
        "after the model and the scheme, or after the recipe.",
    ),
]
Scheme = Annotated[str, typer.Option(help="For example W8A8, W8A8-full, W8A8-token, W4A16-g128.")]
Algorithm = Annotated[
    str | None,
    typer.Option(
        help="What chooses the weights' codes: gptq, adaround, rtn or calibrate. gptq if not given, for weights of "
        "fewer than 8 bits beside float activations; else calibrate."
    ),
]
Formats = Annotated[
    list[str] | None,
    typer.Option(
        "--format",
        help="onnx-qdq (if not given), checkpoint (which is compressed-tensors), gptq-v2, or tvm-kernels; may be "
        "repeated.",
    ),
]
_TEXTS = (
    "Texts: one a line, or FILE.tsv:COLUMN (also .csv, .jsonl; columns by name or from 0). For a language model the "
    "file is one long text; for an encoder-decoder FILE.tsv:SOURCE,TARGET; for a model of pictures a folder of them, "
    "or a file of their paths."
)
Calibration = Annotated[str, typer.Option(help=_TEXTS)]
OptionalCalibration = Annotated[
    str | None,
    typer.Option(
        "--calibration", help=f"{_TEXTS} Not needed for schemes without static activations, by round-to-nearest."
    ),
]
Training = Annotated[
    str | None,
    typer.Option(help="Texts as for --calibration, to train the quantized program on against the float model (qat)."),
]
Task = Annotated[
    str | None,
    typer.Option(
        help="feature-extraction, text-classification, token-classification, question-answering, fill-mask, "
        "pre-training, text-generation, text2text-generation, automatic-speech-recognition, image-classification or "
        "image-feature-extraction; as the model says if not given."
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(help="Texts to calibrate on, up to 128 if not given; for a language model windows, 32 if not given."),
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        help="Texts are cut to this many tokens, 128 if not given; a language model's windows have so many, 512 if not "
        "given."
    ),
]
Seed = Annotated[int, typer.Option(help="The root of all randomness.")]
Ignore = Annotated[list[str] | None, typer.Option(help="Modules that stay float: a path, a glob, or re:EXPRESSION.")]
CacheFolder = Annotated[Path | None, typer.Option("--cache", help="Where finished passes are kept, to go on from.")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Keep nothing, and start from the beginning.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an artifact that is there already.")]
Rehearse = Annotated[
    bool,
    typer.Option(
        "--rehearse",
        help="Run all of it on the first layers of each kind, with few data and steps, and write nothing.",
    ),
]
COMMANDS = ("run", "quantize", "analyze", "plan", "verify", "explain", "eval", "report", "replay")
_OF_ANY_PLAN = ("target", "output", "cache", "no_cache", "overwrite", "fail_if")
"""Parameters of ``plan`` that count for a recipe too."""
EPILOG = "Options of every command (--json, --quiet, --plugin FILE, ...): bitlower --help"


def register(app: typer.Typer) -> None:
    """Add these commands to ``app``."""
    commands: tuple[Callable[..., None], ...] = (
        run, quantize, analyze, plan, verify, explain, evaluate, report, replay,
    )  # fmt: skip
    for name, command in zip(COMMANDS, commands, strict=True):
        app.command(name, epilog=EPILOG)(command)


def run(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file (YAML).")],
    output: Output = None,
    cache: CacheFolder = None,
    no_cache: NoCache = False,
    overwrite: Overwrite = False,
    fail_if: FailIf = None,
    rehearse: Rehearse = False,
) -> None:
    """Run a recipe. Killed at any moment, the same command goes on where it was."""
    settings = settings_of(context)
    from bitlower.tools.recipes.recipe import load_recipe

    options = _options(settings, cache, no_cache, overwrite)
    if rehearse:
        _rehearse(load_recipe(recipe), output, options, fail_if)
    else:
        _run(load_recipe(recipe), output, str(recipe), "", options, fail_if)


def quantize(
    context: typer.Context,
    model: Model,
    output: Output = None,
    calibration: OptionalCalibration = None,
    training: Training = None,
    scheme: Scheme = "W8A8",
    algorithm: Algorithm = None,
    formats: Formats = None,
    task: Task = None,
    samples: Samples = None,
    max_length: MaxLength = None,
    seed: Seed = 0,
    bos: Bos = "auto",
    ignore: Ignore = None,
    cache: CacheFolder = None,
    no_cache: NoCache = False,
    overwrite: Overwrite = False,
    fail_if: FailIf = None,
    rehearse: Rehearse = False,
) -> None:
    """Quantize a model in one line, to verified ONNX, a checkpoint or a library."""
    settings = settings_of(context)
    from bitlower.passes import format_pipeline
    from bitlower.tools.runs.flow import standard_recipe

    recipe = standard_recipe(
        model, scheme, calibration, algorithm=algorithm, formats=formats or (), task=task, samples=samples,
        max_length=max_length, seed=seed, ignore=ignore or (), bos=bos, training=training,
    )  # fmt: skip
    options = _options(settings, cache, no_cache, overwrite)
    options.display.note(f"passes: {format_pipeline(recipe.build_passes())}")
    if rehearse:
        _rehearse(recipe, output, options, fail_if)
    else:
        _run(recipe, output, model, scheme, options, fail_if)


def analyze(
    context: typer.Context,
    model: Model,
    calibration: Calibration,
    task: Task = None,
    samples: Samples = None,
    max_length: MaxLength = None,
    seed: Seed = 0,
    bos: Bos = "auto",
    sigma: Annotated[float, typer.Option(help="An outlier is this many standard deviations off.")] = 6.0,
    rows: Annotated[int, typer.Option(help="Rows to print of each table.")] = 20,
) -> None:
    """Show which tensors are hard to quantize, where, and why."""
    import dataclasses

    settings = settings_of(context)
    from bitlower.tools.render import make_table
    from bitlower.tools.runs.flow import analyze_model

    display = settings.display()
    outliers = analyze_model(
        model,
        calibration,
        task=task,
        samples=samples,
        max_length=max_length,
        seed=seed,
        bos=bos,
        sigma=sigma,
        display=display,
    )
    named = {
        "tensors": outliers.table(),
        "feed-forward networks": outliers.feed_forward_table(),
        "attention heads": outliers.head_table(),
    }
    tables = [make_table(title, headers, body[:rows]) for title, (headers, body) in named.items() if body]
    display.result(dataclasses.asdict(outliers), *tables)


def plan(
    context: typer.Context,
    target: Annotated[
        str, typer.Argument(metavar="RECIPE|MODEL", help="A recipe file, or a model as `quantize` takes it.")
    ],
    output: Output = None,
    calibration: OptionalCalibration = None,
    training: Training = None,
    scheme: Scheme = "W8A8",
    algorithm: Algorithm = None,
    formats: Formats = None,
    task: Task = None,
    samples: Samples = None,
    max_length: MaxLength = None,
    seed: Seed = 0,
    bos: Bos = "auto",
    ignore: Ignore = None,
    cache: CacheFolder = None,
    no_cache: NoCache = False,
    overwrite: Overwrite = False,
    fail_if: FailIf = None,
) -> None:
    """Predict size, memory and time, and show the bits of every tensor, before any work.

    It takes what `quantize` takes; what cannot be predicted (the seed, conditions) is checked.
    """
    settings = settings_of(context)
    from bitlower.tools.planning.plan import plan_model, plan_recipe
    from bitlower.tools.recipes.recipe import load_recipe
    from bitlower.tools.runs.output import check_output
    from bitlower.tools.runs.standard import standard_recipe

    verdict_conditions(fail_if)
    options = _options(settings, cache, no_cache, overwrite)
    if output is not None:
        check_output(output, overwrite=overwrite)
    how: dict[str, Any] = {"algorithm": algorithm, "formats": formats or (), "task": task, "ignore": ignore or ()}
    how |= {"samples": samples, "max_length": max_length}
    if Path(target).suffix in (".yaml", ".yml"):
        _refuse_for_recipe(context)
        made = plan_recipe(load_recipe(target), options)
    elif calibration is None and training is None:
        made = plan_model(target, scheme, options=options, **how)
    else:
        recipe = standard_recipe(target, scheme, calibration, seed=seed, bos=bos, training=training, **how)
        made = plan_recipe(recipe, options)
    settings.display().result(made.to_dict(), *made.tables())


def _refuse_for_recipe(context: typer.Context) -> None:
    """See that nothing was asked for that a recipe says itself.

    Raises:
        BitlowerError: something was.
    """
    from bitlower.ir import BitlowerError

    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE" and parameter.name not in _OF_ANY_PLAN:
            raise BitlowerError(
                f"{parameter.opts[0]} is for a model; a recipe says it itself", hint="leave it out, or edit the recipe"
            )


def verify(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An artifact's folder.")],
    fail_if: FailIf = None,
) -> None:
    """Check an artifact again: its files against the manifest, and the model in its runtime."""
    settings = settings_of(context)
    from bitlower.backends.registry import verify_artifact
    from bitlower.tools.render import make_table
    from bitlower.tools.runs.summary import flatten
    from bitlower.tools.verdict.figures import headline_figures
    from bitlower.tools.verdict.verdict import checked_verdict

    conditions = verdict_conditions(fail_if)
    record = verify_artifact(folder)
    verdict = checked_verdict(folder, record.get("headline", {}))
    if verdict is None:
        figures = {figure.name: figure.value for figure in headline_figures(record.get("headline", {}))}
        parts: tuple[Table | str, ...] = (make_table(f"{folder} is sound", ("", ""), flatten(record)),)
    else:
        parts = (f"{folder} is sound: {verdict.line}", verdict.table(), *_beside(record.get("unlisted", ())))
        figures = verdict.values()
        record |= {"verdict": verdict.to_dict()}
    finish(settings.display(), record, parts, conditions, figures)


def replay(
    context: typer.Context, folder: Annotated[Path, typer.Argument(metavar="DIR", help="A reproducer's folder.")]
) -> None:
    """Run a failed pass again from the reproducer that it left."""
    settings = settings_of(context)
    from bitlower.passes import replay as again

    program = again(folder)
    done = {"folder": str(folder), "failed": False, "passes": program.passes}
    settings.display().text(done, f"{program.passes[-1] if program.passes else folder}: this time it did not fail")


def _options(settings: Settings, cache: Path | None, no_cache: bool, overwrite: bool) -> RunOptions:
    from bitlower.ir import BitlowerError
    from bitlower.tools.runs.flow import RunOptions

    if cache and no_cache:
        raise BitlowerError("--cache and --no-cache exclude each other")
    options: dict[str, Any] = {"cache": None} if no_cache else {"cache": cache} if cache else {}
    return RunOptions(
        overwrite=overwrite,
        verify=settings.verify,
        print_after_change=settings.print_after_change,
        display=settings.display(),
        **options,
    )


def _rehearse(recipe: Recipe, output: Path | None, options: RunOptions, fail_if: Sequence[str] | None) -> None:
    from bitlower.tools.runs.output import check_output
    from bitlower.tools.runs.rehearsal import rehearse

    verdict_conditions(fail_if)
    if output is not None:
        check_output(output, overwrite=options.overwrite)
    rehearsal = rehearse(recipe, options)
    options.display.result(rehearsal.to_dict(), rehearsal.text())


def _run(
    recipe: Recipe, output: Path | None, name: str, scheme: str, options: RunOptions, fail_if: Sequence[str] | None
) -> None:
    from bitlower.tools.runs.flow import run_recipe
    from bitlower.tools.runs.output import default_output

    conditions = verdict_conditions(fail_if)
    if output is None:
        output = default_output(name, scheme)
        options.display.note(f"the artifact goes to {output}")
    summary = run_recipe(recipe, output, options)
    figures = [verdict.values() for verdict in summary.verdicts.values()]
    finish(options.display, summary.to_dict(), summary.text(), conditions, *figures)


def _beside(unlisted: Sequence[str]) -> tuple[str, ...]:
    return (f"files that the manifest does not list: {', '.join(unlisted)}",) if unlisted else ()

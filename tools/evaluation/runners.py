"""Models that run on input batches: an artifact in its runtime, a float model as a Program."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bitlower.backends.base import Model
from bitlower.frontends import load
from bitlower.frontends.locate import locate
from bitlower.frontends.token_rows import T, TokenRow, padded_rows
from bitlower.ir import Batch, BitlowerError, CheckError, Program, shorten
from bitlower.ir.files import check_name
from bitlower.ir.json_files import read_json
from bitlower.tools.evaluation.artifacts import load_artifact

Array = NDArray[Any]
Track = Callable[[Iterable[Any], str], Iterator[Any]]


@dataclass(frozen=True)
class Runner:
    """A model that can be run on texts: ``run`` takes an input batch and gives outputs by name."""

    program: Program
    run: Callable[[Batch], dict[str, Array]]


def open_runner(target: str | os.PathLike[str] | Program) -> Runner:
    """A model to run: a Program, an artifact in its runtime, or the float model.

    Raises:
        BitlowerError: there is no such model, or an artifact is not as it was written.
    """
    return runner_of(open_model(target))


def open_model(target: str | os.PathLike[str] | Program) -> Model | Program:
    """A Program as it is, an artifact in its runtime, or the float model as a Program.

    Raises:
        BitlowerError: as :func:`open_runner`.
    """
    return target if isinstance(target, Program) else load_artifact(check_name(target)) or load(target)


def runner_of(model: Model | Program) -> Runner:
    """What :func:`open_model` gives, to run on texts."""
    return _of_program(model) if isinstance(model, Program) else _of_model(model)


def _of_model(model: Model) -> Runner:
    """An artifact; it runs on the least sizes that its program takes, and what was added is cut off again."""
    program = model.program

    def run(batch: Batch) -> dict[str, Array]:
        outputs = model(**program.fitted(batch))
        return {name: value.numpy() for name, value in program.cropped(outputs, batch).items()}

    return Runner(program, run)


def _of_program(program: Program) -> Runner:
    def run(batch: Batch) -> dict[str, Array]:
        with torch.no_grad():
            return {name: value.numpy() for name, value in program(**batch).items()}

    return Runner(program, run)


def configuration(target: str | os.PathLike[str] | Program) -> Mapping[str, Any]:
    """The Hugging Face configuration of a model or an artifact; of a folder nothing else is read.

    Raises:
        BitlowerError: there is no such model, or it cannot be loaded.
    """
    if isinstance(target, Program):
        return target.config
    try:
        return read_json(locate(target) / "config.json", finite=False)
    except (OSError, ValueError):
        return open_runner(target).program.config  # a GGUF file; of a damaged one the frontend says what is wrong


def check_output(runner: Runner, task: str, name: str, shape: Sequence[str | int | None]) -> None:
    """See that the model has an output ``name`` of so many dimensions, of sizes ``shape`` as far as both are known.

    Raises:
        BitlowerError: it has not, so that it is no model for ``task``.
    """
    types = {spec.name: spec.type for spec in runner.program.outputs}
    has = types[name].shape if name in types else ()
    fits = len(has) == len(shape) and all(
        size == wanted for size, wanted in zip(has, shape, strict=True) if isinstance(size, int) and wanted is not None
    )
    if not fits:
        source, listed = runner.program.source or "the model", ", ".join(f"{n}: {t}" for n, t in types.items())
        sizes = ", ".join("…" if size is None else str(size) for size in shape)
        raise BitlowerError(
            f"{task} needs {name} [{sizes}], and {source} gives {shorten(listed)}", hint="is the task right?"
        )


def run_rows(
    runner: Runner, rows: Sequence[TokenRow[T]], batch_size: int, track: Track
) -> Iterator[tuple[int, dict[str, Array]]]:
    """The place of each row and what the model gives for its tokens, ``[tokens, …]`` by name; short rows come first.

    Raises:
        BitlowerError: the tokenizer has no padding token, or the model does not know a token.
        CheckError: the model gives NaN.
    """
    for batch in track(padded_rows(runner.program, rows, batch_size=batch_size), "evaluating"):
        outputs = runner.run(batch.inputs)
        for line, place in enumerate(batch.places):
            own = {name: value[line, : len(rows[place].ids)] for name, value in outputs.items()}
            for name, value in own.items():
                if np.isnan(value).any():
                    raise CheckError(f"the model gives NaN in {name}, for text {rows[place].text + 1} of the data")
            yield place, own

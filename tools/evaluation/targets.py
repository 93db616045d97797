"""What encoder-decoders write against references: ROUGE, BLEU and word error rates, by the field's own packages.

Targets are written greedily or with beams, by an artifact in its runtime or by a float model as a Program.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bitlower.backends.base import Model
from bitlower.backends.running import StagedModel
from bitlower.frontends import batches
from bitlower.frontends.sound import LANGUAGE, reads_sound, sound_batches, speech_prompt, stop_token
from bitlower.frontends.tokenize import decode
from bitlower.frontends.waveforms import reads_waveforms
from bitlower.ir import Batch, BitlowerError, Program
from bitlower.ir.generation import before_stop, program_stages, stop_tokens, target_prompt, write_targets
from bitlower.ir.stages import encoder_batch, is_encoder_decoder
from bitlower.tools.data.named_rows import SOUNDS, NamedRows
from bitlower.tools.data.texts import Row, read_examples, split_column
from bitlower.tools.evaluation.ctc import heard
from bitlower.tools.evaluation.results import Evaluation
from bitlower.tools.evaluation.runners import Track, open_model, runner_of
from bitlower.tools.evaluation.written import METRICS, SPEECH, written_figures

Write = Callable[[Batch], list[str]]
"""From a batch of sources to the texts that a model writes."""


def evaluate_targets(
    target: str | os.PathLike[str] | Program,
    task: str,
    data: str | os.PathLike[str],
    *,
    columns: Sequence[str] = (),
    batch_size: int = 8,
    max_length: int = 128,
    language: str = LANGUAGE,
    beams: int = 1,
    track: Track = lambda items, label: iter(items),
) -> Evaluation:
    """Let ``target`` write what belongs to each source of ``data``, and compare it with the reference.

    Args:
        target: an ONNX artifact's folder, a model as the frontends take it, or a Program.
        task: one of :data:`~bitlower.tools.evaluation.written.METRICS`.
        data: a .tsv, .csv or .jsonl file; ``FILE:SOURCE,TARGET`` names the columns too.
        columns: of the source (a text, or the path of a sound file, relative to ``data``) and of the reference.
        batch_size: sources in a batch.
        max_length: tokens of a source and of a target at most.
        language: of sound.
        beams: of beam search (``num_beams``); 1 searches greedily.
        track: wraps the batches with a progress display.

    Raises:
        BitlowerError: a column or a file is missing, a text is empty, the model is no encoder-decoder, or the package
            of the metric is not installed.
    """
    path, named = split_column(data)
    column = list(columns) or named
    rows = list(read_examples(path, column, None)) if column else []
    if not rows or len(rows[0].values) != 2:
        raise BitlowerError(
            f"{task} needs a column of sources and one of references", hint=f"name them: {path}:SOURCE,TARGET"
        )
    if beams < 1:
        raise BitlowerError(f"{beams} beams make no sense", hint="ask for at least 1")
    METRICS[task]([rows[0].values[1]], [rows[0].values[1]])  # a package that is missing is named before the work
    if task == SPEECH:
        NamedRows(path, lambda: rows).check(SOUNDS)
    model, limits = open_model(target), _Limits(max_length, language, beams)
    if task == SPEECH and reads_waveforms(model if isinstance(model, Program) else model.program):
        if beams != 1:
            raise BitlowerError("a model of frames searches for nothing, and has no beams", hint="leave out --beams")
        files = [path.parent / row.values[0] for row in rows]
        written = [*heard(runner_of(model), files, batch_size=batch_size, track=track)]
    else:
        writer = _Writer.open(model, limits)
        written = [t for batch in track(writer.batches(path, rows, batch_size), "evaluating") for t in writer(batch)]
    name = target.source if isinstance(target, Program) else os.fspath(target)
    references = [row.values[1] for row in rows]
    metrics, figures = METRICS[task](written, references), written_figures(task, written, references)
    return Evaluation(name, task, str(path), len(rows), metrics, figures=figures)


@dataclass(frozen=True)
class _Limits:
    """How targets are written."""

    max_length: int
    language: str
    beams: int


@dataclass(frozen=True)
class _Writer:
    """A model that writes targets."""

    program: Program
    write: Callable[..., torch.Tensor]
    limits: _Limits

    @classmethod
    def open(cls, model: Model | Program, limits: _Limits) -> _Writer:
        """A Program, or an artifact in its runtime.

        Raises:
            BitlowerError: it is no encoder-decoder.
        """
        if isinstance(model, StagedModel):
            staged = model
            return cls(staged.program, lambda source, **options: staged.generate(**source, **options), limits)
        program = model if isinstance(model, Program) else model.program
        if not isinstance(model, Program) or not is_encoder_decoder(program):
            raise BitlowerError(
                f"{program.source or 'the model'} is no encoder with a decoder, and writes no targets",
                hint="text-generation measures language models",
            )
        return cls(program, partial(write_targets, program, *program_stages(program)), limits)

    def batches(self, path: Path, rows: Sequence[Row], size: int) -> list[Batch]:
        """The sources; their references go along as targets, and are not read."""
        sources, references = ([row.values[place] for row in rows] for place in (0, 1))
        longest, language = self.limits.max_length, self.limits.language
        if not reads_sound(self.program):
            return [*batches(self.program, sources, pairs=references, max_length=longest, batch_size=size)]
        files = [path.parent / source for source in sources]
        made = sound_batches(self.program, files, references, max_length=longest, batch_size=size, language=language)
        return [*made.batches]

    def __call__(self, batch: Batch) -> list[str]:
        """The texts that the model writes for the sources of ``batch``."""
        source = encoder_batch(batch)
        prompt, stops = self._prompt()
        written = self.write(
            source,
            start=torch.tensor([prompt] * len(next(iter(source.values()))), dtype=torch.int64),
            stops=stops,
            max_new_tokens=self.limits.max_length,
            pad=stops[0] if stops else 0,
            num_beams=self.limits.beams,
        )
        return [decode(self.program, before_stop(row[len(prompt) :], stops)).strip() for row in written.tolist()]

    def _prompt(self) -> tuple[list[int], tuple[int, ...]]:
        """What targets begin with, and what ends them."""
        if reads_sound(self.program):
            return speech_prompt(self.program, self.limits.language), (stop_token(self.program),)
        return target_prompt(self.program)[:1], stop_tokens(self.program)

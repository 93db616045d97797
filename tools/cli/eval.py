"""The command ``eval``: accuracy on labelled data, perplexity and samples of language models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitlower.tools.cli.settings import Settings, settings_of

if TYPE_CHECKING:
    from bitlower.tools.evaluation.generation import Sample

GENERATION = "text-generation"
Bos = Annotated[
    str,
    typer.Option(
        help="text-generation: what windows and prompts begin with. auto: what the tokenizer puts first; always: its "
        "token for the beginning, even so; never: nothing."
    ),
]
Task = Annotated[
    str,
    typer.Option(
        help="sts-b, classification, token-classification (F1 by entity), question-answering (SQuAD's F1), "
        "fill-mask (accuracy of masked tokens), image-classification, zero-shot-image-classification (classes by their "
        "names), audio-classification or text-generation; of encoder-decoders "
        "summarization (ROUGE), translation (BLEU) or speech-recognition (word error rate; also of ctc)."
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="A .tsv, .csv or .jsonl file; for token-classification a CoNLL or .jsonl file; for question-answering "
        "SQuAD's .json or a .jsonl file; for fill-mask texts, for text-generation a text, or FILE.jsonl:COLUMN."
    ),
]
Columns = Annotated[
    str,
    typer.Option(
        help="sts-b: score,sentence1,sentence2 (4,5,6 if not given: the benchmark's own files). "
        "classification: text[,text2],label (sentence,label if not given). token-classification: words,tags (of a "
        "CoNLL file the first and the last if not given). question-answering: question,context,answers. "
        "image-classification, zero-shot-image-classification and audio-classification: path,label. "
        "Encoder-decoders: source,reference."
    ),
]
Beams = Annotated[
    int,
    typer.Option(help="Encoder-decoders: of beam search, which writes what is compared; 1 searches greedily.", min=1),
]


def evaluate(
    context: typer.Context,
    target: Annotated[
        str,
        typer.Argument(metavar="DIR|MODEL", help="An artifact's folder, or a float model: a folder or package:NAME."),
    ],
    task: Task,
    data: Data = None,
    columns: Columns = "",
    batch_size: Annotated[int, typer.Option(help="Texts or pictures in a batch.", min=1)] = 32,
    max_length: Annotated[
        int | None, typer.Option(help="Longer texts are cut to this many tokens; 128, for question-answering 384.")
    ] = None,
    seed: Annotated[int, typer.Option(help="fill-mask: of the masks.")] = 0,
    joiner: Annotated[
        str | None,
        typer.Option(
            help=r"text-generation: what stands between the lines or rows of the file, \n for a line break; if not "
            "given, a text file is taken as it is and rows get an empty line between them."
        ),
    ] = None,
    window: Annotated[int, typer.Option(help="text-generation: tokens of a window.")] = 512,
    stride: Annotated[
        int | None, typer.Option(help="text-generation: tokens from window to window; the window if not given.")
    ] = None,
    windows: Annotated[int | None, typer.Option(help="text-generation: the first so many; all if not given.")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="text-generation: a text to continue greedily; may be repeated.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="text-generation: tokens of a sample at most.", min=1)] = 64,
    bos: Bos = "auto",
    beams: Beams = 1,
) -> None:
    """Measure accuracy on labelled data, or perplexity, samples and speed of a language model."""
    from bitlower.ir import BitlowerError

    settings = settings_of(context)
    if task == GENERATION:
        unescaped = None if joiner is None else joiner.replace(r"\n", "\n").replace(r"\t", "\t")
        if beams != 1:
            raise BitlowerError("text-generation continues prompts greedily", hint="leave out --beams")
        _evaluate_text(settings, target, data, unescaped, (window, stride, windows), prompt or (), new_tokens, bos)
        return
    if data is None:
        raise BitlowerError("there is nothing to evaluate on", hint="give --data")
    _evaluate_rows(
        settings, target, task, data, columns,
        batch_size=batch_size, max_length=max_length, seed=seed, beams=beams,
    )  # fmt: skip


def _evaluate_rows(settings: Settings, target: str, task: str, data: str, columns: str, **options: Any) -> None:
    """Measure on the rows of a file, and show what comes out."""
    from bitlower.tools.evaluation.evaluate import evaluate as measure
    from bitlower.tools.render import make_table

    display = settings.display()
    names = [name.strip() for name in columns.split(",")] if columns else []
    result = measure(target, task, data, columns=names, track=display.track, **options)
    title = f"{target} on {result.samples} rows of {result.data}"
    rows = [(name, round(value, 2), result.units.get(name, "%")) for name, value in result.metrics.items()]
    for note in result.notes:
        display.note(note)
    display.result(result.to_dict(), make_table(title, (task, "", "unit"), rows))


def _evaluate_text(
    settings: Settings,
    target: str,
    data: str | None,
    joiner: str | None,
    numbers: tuple[int, int | None, int | None],
    prompts: Sequence[str],
    new_tokens: int,
    bos: str,
) -> None:
    from bitlower.tools.evaluation.perplexity import evaluate_text
    from bitlower.tools.render import make_table

    display = settings.display()
    window, stride, windows = numbers
    result = evaluate_text(
        target, data, joiner=joiner, window=window, stride=stride, windows=windows, prompts=prompts,
        new_tokens=new_tokens, bos=bos, track=display.track,
    )  # fmt: skip
    tables = []
    if perplexity := result.perplexity:
        variant = f"{perplexity.windows} windows of {perplexity.window} tokens, stride {perplexity.stride}"
        rows = [
            ("perplexity", f"{perplexity.perplexity:.2f}"),
            ("variant", f"{variant}, {perplexity.tokens_scored} tokens scored of {perplexity.tokens}"),
            ("windows begin with", f"{result.begins or 'nothing'} (bos: {bos})"),
            ("lines", "as they are" if joiner is None else f"joined by {joiner!r}"),
        ]
        tables.append(make_table(f"{target} on {Path(data or '').name}, in {result.runtime}", ("", ""), rows))
    tables += [make_table(f"sample in {result.runtime}", ("", ""), _sample_rows(sample)) for sample in result.samples]
    display.result(result.to_dict(), *tables)


def _sample_rows(sample: Sample) -> list[tuple[str, str]]:
    decode = sample.decode_tokens_per_second
    return [
        ("prompt", sample.prompt),
        ("continuation", sample.text),
        ("prompt, tokens a second", f"{sample.prefill_tokens_per_second:.1f} ({sample.prompt_tokens} tokens)"),
        ("then, tokens a second", f"{decode:.1f} ({sample.new_tokens} tokens)" if decode else "one token only"),
    ]

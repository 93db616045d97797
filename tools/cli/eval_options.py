"""The options of the command ``eval``: what each takes, and what its help says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Bos = Annotated[
    str,
    typer.Option(
        help="text-generation: what windows and prompts begin with. auto: what the tokenizer puts first; always: its "
        "token for the beginning, even so; never: nothing."
    ),
]
Task = Annotated[
    str | None,
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
Target = Annotated[
    str,
    typer.Argument(metavar="DIR|MODEL", help="An artifact's folder, or a float model: a folder or package:NAME."),
]
Compare = Annotated[
    str | None,
    typer.Option(
        metavar="DIR|MODEL",
        help="Another artifact, or the float model, on the same data: both figures, the difference, its interval.",
    ),
]
BatchSize = Annotated[int, typer.Option(help="Texts or pictures in a batch.", min=1)]
MaxLength = Annotated[
    int | None, typer.Option(help="Longer texts are cut to this many tokens; 128, for question-answering 384.")
]
Seed = Annotated[int, typer.Option(help="Of the resamples that intervals come from, and of the masks of fill-mask.")]
Joiner = Annotated[
    str | None,
    typer.Option(
        help=r"text-generation: what stands between the lines or rows of the file, \n for a line break; if not "
        "given, a text file is taken as it is and rows get an empty line between them."
    ),
]
Window = Annotated[int, typer.Option(help="text-generation: tokens of a window.")]
Stride = Annotated[
    int | None, typer.Option(help="text-generation: tokens from window to window; the window if not given.")
]
Windows = Annotated[int | None, typer.Option(help="text-generation: the first so many; all if not given.")]
Prompt = Annotated[
    list[str] | None, typer.Option(help="text-generation: a text to continue greedily; may be repeated.")
]
NewTokens = Annotated[int, typer.Option(help="text-generation: tokens of a sample at most.", min=1)]
Harness = Annotated[
    str | None, typer.Option(help="lm-eval or mteb: tasks of that harness, in place of --task and --data.")
]
Tasks = Annotated[str, typer.Option(help="--harness: names of its tasks, with commas between them.")]
IncludePath = Annotated[
    Path | None,
    typer.Option(help="--harness: tasks of yours; for lm-eval a folder with YAML files, for mteb a Python file."),
]
Shots = Annotated[
    int | None,
    typer.Option("--num-fewshot", min=0, help="lm-eval: examples before each question; as the task says if not given."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="lm-eval: the first so many rows of each task.")]

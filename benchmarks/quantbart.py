"""A small BART in few bits: what it writes, with and without the contrast in distillation (QuantGPT's second half).

    python benchmarks/quantbart.py --data DIR [--schemes 2-2-8 ...] [--methods NAME ...] [--seeds 0 ...] [--folder DIR]

A BART of two and two layers of 256 channels with a vocabulary of 2048 is trained first, tokenizer and all, on text
infilling (Lewis et al. 2020, section 2.2: spans of Poisson length, each replaced by one mask) of WikiText-2 valid,
whose last part of 5 % is left out; ``--folder`` keeps it. Every method starts from one calibration (scales by least
squared error) and takes as many steps of AdamW on as many pairs, at the rate of the preset ``quantgpt`` and with
`logits` distillation from the float model; the state of the least held-out loss is judged. Figures: ROUGE-L of what
is written greedily for masked passages of WikiText-2 test against the passages, as ``bitlower eval --task
summarization`` gives it. ``first`` is before training. Rows are written to ``results/quantbart.json`` as they come;
those that are there are kept, unless ``--fresh``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import data_folder, measured, show_table
from quantgpt import METHODS, learn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from bitlower import Context, PassManager, Program, load, parse_pipeline
from bitlower.frontends import batches
from bitlower.tools.data.texts import read_text
from bitlower.tools.evaluation.targets import evaluate_targets

COMMAND = "python benchmarks/quantbart.py --data DIR"
SCHEMES = ("8-8-8", "4-4-8", "2-2-8")
JUDGE, COLUMNS, SCORE = "summarization", ("source", "target"), "rougeL"
WORDS, MASKED, SPAN = 20, 0.3, 3.0
"""Words of a passage, the share of them that is masked, and the mean length of a span."""
LENGTH = 96
"""The most tokens of a side."""
HELD_OUT, CALIBRATION, JUDGED = 64, 64, 64
WIDTH, LAYERS, HEADS, VOCABULARY = 256, 2, 4, 2048
STEPS, ROWS, RATE = 4000, 16, 1e-3
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def passages(text: str) -> list[list[str]]:
    """Passages of ``WORDS`` words, none over the end of a paragraph, without the headings."""
    paragraphs = [line.split() for line in text.splitlines() if not line.strip().startswith("=")]
    return [words[start : start + WORDS] for words in paragraphs for start in range(0, len(words) - WORDS + 1, WORDS)]


def masked(words: list[str], generator: np.random.Generator) -> str:
    """``words`` with spans replaced by one mask each, until ``MASKED`` of them are gone; spans do not touch."""
    gone = np.zeros(len(words), bool)
    while gone.sum() < MASKED * len(words):
        size = max(1, min(int(generator.poisson(SPAN)), int(MASKED * len(words) + 1 - gone.sum())))
        start = int(generator.integers(0, len(words) - size + 1))
        if not gone[max(0, start - 1) : start + size + 1].any():
            gone[start : start + size] = True
    written = [
        "<mask>" if hidden else word
        for place, (word, hidden) in enumerate(zip(words, gone, strict=True))
        if not (hidden and place and gone[place - 1])
    ]
    return " ".join(written)


def pairs(chosen: list[list[str]], seed: int) -> tuple[list[str], list[str]]:
    """Masked passages, and the passages."""
    generator = np.random.default_rng(seed)
    return [masked(words, generator) for words in chosen], [" ".join(words) for words in chosen]


def make_tokenizer(folder: Path, text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts ``<s>`` and ``</s>`` around a text, as BART's does."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, mask_token="<mask>")
    fast.save_pretrained(folder)
    return fast


def make_bart(folder: Path, text: str) -> None:
    """Train a small BART on infilling ``text``, and write it with its tokenizer."""
    torch.manual_seed(0)
    tokenizer, chosen = make_tokenizer(folder, text), passages(text)
    sides = ("encoder", "decoder")
    sizes = {
        f"{side}_{name}": size for side in sides for name, size in (("layers", LAYERS), ("attention_heads", HEADS))
    }
    config = BartConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, max_position_embeddings=LENGTH + 2, dropout=0.0, **sizes,
        **{f"{side}_ffn_dim": 4 * WIDTH for side in sides},
    )  # fmt: skip
    model = BartForConditionalGeneration(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, STEPS // 10, STEPS)
    generator = np.random.default_rng(0)
    for step in range(STEPS):
        drawn = [chosen[place] for place in generator.integers(0, len(chosen), ROWS)]
        sources, targets = pairs(drawn, step)
        batch = tokenizer(
            sources, text_target=targets, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        labels = batch["labels"].masked_fill(batch["labels"] == tokenizer.pad_token_id, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"BART: step {step} of {STEPS}, loss {loss.item():.3f}", flush=True)
    model.eval().save_pretrained(folder)


def score(program: Program, table: Path) -> float:
    """ROUGE-L in percent of what ``program`` writes for the rows of ``table``."""
    measured = evaluate_targets(program, JUDGE, table, columns=COLUMNS, batch_size=16, max_length=LENGTH)
    return round(measured.metrics[SCORE], 2)


def measure(
    program: Program, table: Path, text: list[list[str]], case: dict[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    """A row of the results."""
    seed, rows = case["seed"], arguments.rows
    order = np.random.default_rng(seed).permutation(len(text))[: HELD_OUT + arguments.steps * rows]
    parts = [[text[place] for place in part] for part in (order[:HELD_OUT], order[HELD_OUT:])]
    held_out, learned = (pairs(part, seed) for part in parts)
    made = [
        batches(program, sources, pairs=targets, max_length=LENGTH, batch_size=rows)
        for sources, targets in (held_out, learned)
    ]
    context = Context(made[1][: CALIBRATION // rows], training=made[1], held_out=made[0], seed=seed)
    placed, trained, trained_in = learn(program, context, case)
    scores = {f"rouge_{name}": score(one, table) for name, one in (("first", placed), ("after", trained))}
    return case | scores | trained_in


def cases(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What the command line asks for."""
    for scheme in arguments.schemes:
        for method in arguments.methods:
            for seed in arguments.seeds:
                sizes = {"steps": arguments.steps, "pairs_a_step": arguments.rows}
                yield {"scheme": scheme, "method": method, "seed": seed, **sizes}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="the folder with wikitext-2 in it; default: $BITLOWER_DATA")
    parser.add_argument("--folder", help="where the small BART is kept; default: nowhere")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["module-wise", "module-wise, contrast"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the pairs and of learning")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rows", type=int, default=16, help="pairs a step")
    parser.add_argument("--fresh", action="store_true", help="measure rows again that are in the results file")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    texts = {name: read_text(data_folder(arguments.data) / "wikitext-2" / f"{name}.txt") for name in ("valid", "test")}
    text = texts["valid"][: int(0.95 * len(texts["valid"]))]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(arguments.folder or scratch)
        if not (folder / "config.json").is_file():
            make_bart(folder, text)
        table = Path(scratch) / "judged.tsv"
        every = passages(texts["test"])
        judged = pairs(every[:: len(every) // JUDGED][:JUDGED], 0)
        lines = ["\t".join(pair) for pair in zip(*judged, strict=True)]
        table.write_text("\n".join(["\t".join(COLUMNS), *lines]) + "\n")
        program = PassManager(parse_pipeline("clean"), verify=False).run(load(folder), Context())
        float_score = score(program, table)
        print(f"float: ROUGE-L {float_score}", flush=True)

        def row(case: dict[str, Any]) -> dict[str, Any]:
            return measure(program, table, passages(text), case, arguments) | {"rouge_float": float_score}

        shown = measured("quantbart", COMMAND, cases(arguments), row, fresh=arguments.fresh)
    columns = ("scheme", "method", "seed", "rouge_float", "rouge_first", "rouge_after", "seconds")
    show_table(columns, [[row[key] for key in columns] for row in shown])


if __name__ == "__main__":
    main()

"""QuantGPT's parts taken one by one, at equal steps: which parametrization of ranges, with and without the contrast.

    python benchmarks/quantgpt.py --data DIR [--model PATH] [--schemes 2-2-8 ...] [--methods NAME ...] [--seeds 0 ...]

Without ``--model``, a GPT-2 of 4 blocks of 256 channels with a vocabulary of 2048 is trained first, tokenizer and all,
on WikiText-2 valid, whose last part of 5 % is left out; ``--folder`` keeps it. Every method starts from one calibration
(scales by least squared error), takes as many steps of AdamW on as many tokens, at the rate of the preset ``quantgpt``
and with `logits` distillation from the float model, and its state of the least held-out loss is judged. Figures:
perplexity on the first windows of WikiText-2 test, and the mean KL divergence from the float model there, in nats.
``first`` is before training. Rows are written to ``results/quantgpt.json`` as they come; those that are there are kept,
unless ``--fresh``.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _common import data_folder, measured, show_table
from _decoders import divergence
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

from bitlower import Context, PassManager, Program, load, parse_pipeline
from bitlower.frontends.tokenize import token_ids, windows
from bitlower.passes import make_pass
from bitlower.passes.training._report import TrainReport
from bitlower.tools.data.texts import read_text, split_windows
from bitlower.tools.evaluation.perplexity import perplexity

COMMAND = "python benchmarks/quantgpt.py --data DIR"
SCHEMES = ("8-8-8", "4-4-8", "2-2-8")
RANGES: dict[str, dict[str, Any]] = {
    "pact": {"parametrization": "pact"},
    "lsq": {"parametrization": "scale", "gradient-scale": "lsq"},
    "laq": {"parametrization": "laq"},
    "module-wise": {"parametrization": "gamma"},
}
NEGATIVES = ("positions", "quantized", "vocabulary")
METHODS: dict[str, dict[str, Any]] = {
    **{name: {**options, "losses": ["logits"]} for name, options in RANGES.items()},
    **{
        f"{name}, contrast": {**options, "losses": ["logits", {"token-contrast": {"weight": 0.1}}]}
        for name, options in RANGES.items()
    },
    **{
        f"module-wise, contrast, {kind}": {
            **RANGES["module-wise"],
            "losses": ["logits", {"token-contrast": {"weight": 0.1, "negatives": kind}}],
        }
        for kind in NEGATIVES[1:]
    },
}
"""What `qat` gets beside the preset; the contrast has negatives of the kind ``positions`` where none is named."""
HELD_OUT, CALIBRATION, JUDGED = 16, 32, 64
WIDTH, BLOCKS, HEADS, VOCABULARY, POSITIONS = 256, 4, 4, 2048, 256
EPOCHS, ROWS, RATE = 5, 16, 1e-3


def make_gpt2(folder: Path, text: str) -> None:
    """Train a small GPT-2 on ``text``, and write it with its tokenizer."""
    torch.manual_seed(0)
    random.seed(0)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([text], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[0]).save_pretrained(
        folder
    )
    tokens = torch.tensor(tokenizer.encode(text).ids)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=BLOCKS, n_head=HEADS, n_positions=POSITIONS, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).train()
    steps = EPOCHS * len(tokens) // (ROWS * POSITIONS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    for step in range(steps):
        starts = torch.randint(0, len(tokens) - POSITIONS, (ROWS,)).tolist()
        rows = torch.stack([tokens[start : start + POSITIONS] for start in starts])
        loss = model(rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"GPT-2: step {step} of {steps}, loss {loss.item():.3f}", flush=True)
    model.eval().save_pretrained(folder)


def learn(program: Program, context: Context, case: dict[str, Any]) -> tuple[Program, Program, dict[str, Any]]:
    """``program`` calibrated in the scheme of ``case``, the same after ``qat``, and what that took, for a row."""
    passes = parse_pipeline(f"quantize{{scheme={case['scheme']}}},calibrate{{weights=mse-golden}}")
    placed = PassManager(passes, verify=False).run(program, context)
    options = {"preset": "quantgpt", "steps": case["steps"], "evaluate-every": max(1, case["steps"] // 10)}
    start = time.perf_counter()
    learned = PassManager([make_pass("qat", {**options, **METHODS[case["method"]]})], verify=False).run(placed, context)
    seconds, report = time.perf_counter() - start, context[TrainReport]
    curve = [round(point.held_out or math.nan, 5) for point in report.curve]
    return placed, learned, {"best_step": report.best_step, "seconds": round(seconds), "curve": curve}


def measure(
    program: Program, tokens: dict[str, torch.Tensor], case: dict[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    """A row of the results."""
    size, seed, count = arguments.length, case["seed"], arguments.steps * arguments.rows
    rows = tokens["learned"].numel() // size
    trained, held_out = split_windows(
        tokens["learned"], size, min(count, rows - HELD_OUT), held_out=HELD_OUT, seed=seed
    )
    context = Context(
        windows(program, trained[:CALIBRATION]), training=windows(program, trained, batch_size=arguments.rows),
        held_out=windows(program, held_out), seed=seed,
    )  # fmt: skip
    placed, learned, trained_in = learn(program, context, case)
    found = {}
    for name, made in (("first", placed), ("after", learned)):
        found[f"ppl_{name}"] = round(perplexity(made, tokens["test"], window=size, windows=JUDGED).perplexity, 2)
        found[f"kl_{name}"] = round(divergence(made, program, tokens["test"][: JUDGED * size].reshape(-1, size)), 4)
    return case | found | trained_in


def cases(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What the command line asks for."""
    for scheme in arguments.schemes:
        for method in arguments.methods:
            for seed in arguments.seeds:
                model = "small GPT-2" if arguments.model is None else Path(arguments.model).name
                sizes = {"steps": arguments.steps, "tokens_a_step": arguments.rows * arguments.length}
                yield {"model": model, "scheme": scheme, "method": method, "seed": seed, **sizes}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="the folder with wikitext-2 in it; default: $BITLOWER_DATA")
    parser.add_argument("--model", help="a decoder to take in place of the small GPT-2")
    parser.add_argument("--folder", help="where the small GPT-2 is kept; default: nowhere")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the windows and of learning")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=8, help="windows a step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a window")
    parser.add_argument("--fresh", action="store_true", help="measure rows again that are in the results file")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    texts = {name: read_text(data_folder(arguments.data) / "wikitext-2" / f"{name}.txt") for name in ("valid", "test")}
    kept = texts["valid"][: int(0.95 * len(texts["valid"]))]
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(arguments.folder or scratch)
        if arguments.model is None and not (place / "config.json").is_file():
            make_gpt2(place, kept)
        loaded = load(arguments.model or place, task="text-generation")
        program = PassManager(parse_pipeline("clean"), verify=False).run(loaded, Context())
        tokens = {"learned": token_ids(program, kept), "test": token_ids(program, texts["test"])}
        floats = perplexity(program, tokens["test"], window=arguments.length, windows=JUDGED).perplexity
        print(f"float: perplexity {floats:.3f}", flush=True)

        def row(case: dict[str, Any]) -> dict[str, Any]:
            return measure(program, tokens, case, arguments) | {"ppl_float": round(floats, 2)}

        shown = measured("quantgpt", COMMAND, cases(arguments), row, fresh=arguments.fresh)
    columns = ("model", "scheme", "method", "seed", "ppl_float", "ppl_first", "ppl_after", "kl_after", "seconds")
    show_table(columns, [[row[key] for key in columns] for row in shown])


if __name__ == "__main__":
    main()

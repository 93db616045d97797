"""Fine-tune all-MiniLM-L6-v2 as a classifier on a GLUE task: what the accuracy benchmarks of classifiers start from.

    python benchmarks/finetune.py TASK --data DIR --output FOLDER [--seeds 0 1 2]

TASK is sst-2, mrpc or cola; DIR holds SST-2/, MRPC/ and CoLA/ as they are distributed. AdamW with a linear schedule and
a tenth of the steps as warm-up, products in bfloat16 where the CPU has them. FOLDER/TASK-SEED gets a Hugging Face
folder each; those there are kept. The accuracy on the development set is printed, and written to ``training.json``
beside the weights.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from _common import MODEL, data_folder
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

from bitlower.frontends.locate import locate
from bitlower.ir.quantization.numerics import bfloat16_products
from bitlower.tools.data.texts import Row, read_rows
from bitlower.tools.evaluation.evaluate import evaluate


@dataclass(frozen=True)
class Task:
    """A data set and how it is learnt; ``columns`` are text, second text if any, label, as ``bitlower eval`` has them.

    ``metric`` is the one that GLUE names first.
    """

    train: str
    dev: str
    columns: tuple[str, ...]
    metric: str
    epochs: int
    batch: int
    tokens: int
    rate: float = 1e-4


TASKS = {
    "sst-2": Task("SST-2/train.tsv", "SST-2/dev.tsv", ("sentence", "label"), "accuracy", 1, 32, 64),
    "mrpc": Task(
        "MRPC/msr-para-train.tsv", "MRPC/msr-para-val.tsv", ("#1 String", "#2 String", "Quality"), "f1", 4, 32, 128
    ),
    "cola": Task("CoLA/train.tsv", "CoLA/dev.tsv", ("3", "1"), "matthews", 4, 32, 64),
}


def train(task: Task, data: Path, seed: int, folder: Path) -> None:
    """One model, written to ``folder`` whole or not at all."""
    start = time.perf_counter()
    random.seed(seed)
    torch.manual_seed(seed)
    place = locate(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(place)
    model = AutoModelForSequenceClassification.from_pretrained(place, num_labels=2, dtype=torch.float32).train()
    rows = list(read_rows(data / task.train, task.columns))
    steps = task.epochs * -(-len(rows) // task.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.rate, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    done = 0
    for _ in range(task.epochs):
        random.shuffle(rows)
        for first in range(0, len(rows), task.batch):
            loss = step(model, tokenizer, rows[first : first + task.batch], task.tokens)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            done += 1
            if done % 50 == 0:
                print(f"step {done} of {steps}: loss {loss:.3f}", flush=True)
    scratch = folder.with_name(f".{folder.name}")
    model.eval().save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    metrics = evaluate(scratch, "classification", data / task.dev, columns=task.columns).metrics
    facts = {"seed": seed, "seconds": round(time.perf_counter() - start), "metrics": metrics, **vars(task)}
    (scratch / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    scratch.rename(folder)
    print(folder.name, {name: round(value, 2) for name, value in metrics.items()}, f"{facts['seconds']} s", flush=True)


def step(model: torch.nn.Module, tokenizer: object, rows: list[Row], tokens: int) -> float:
    """Gradients of one batch, clipped to norm 1; the loss."""
    texts = list(zip(*(row.values[:-1] for row in rows), strict=True))
    inputs = tokenizer(  # type: ignore[operator]
        *map(list, texts), padding=True, truncation=True, max_length=tokens, return_tensors="pt"
    )
    labels = torch.tensor([int(row.values[-1]) for row in rows])
    with bfloat16_products():
        loss = model(**inputs, labels=labels).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return float(loss.detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", help="the folder with the data sets; default: $BITLOWER_DATA")
    parser.add_argument("--output", type=Path, required=True, help="gets a folder for each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    data = data_folder(arguments.data)
    for seed in arguments.seeds:
        folder = arguments.output / f"{arguments.task}-{seed}"
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            train(TASKS[arguments.task], data, seed, folder)


if __name__ == "__main__":
    main()

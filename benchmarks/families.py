"""Every model of a folder through ``quantize`` to ONNX, and the artifact against transformers on texts it never saw.

    python benchmarks/families.py MODELS_DIR --texts FILE --text FILE [--only NAME …] [--write]

``MODELS_DIR`` holds Hugging Face folders. Encoders run W8A8 on ``--texts`` (one a line), decoders W8A8 and W4A16-g32 by
gptq on windows of ``--text``, encoder-decoders both on ``--texts``, whose targets they write themselves, models of
pictures and of sound on noise. Torch and the rest are imported once; each run is a fork of its own with a limit of time
and memory, so that one that hangs, grows or dies is a row of the table like any other.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from _common import RESULTS, show_table, write_result

import bitlower
from bitlower.backends.onnx_qdq import OnnxQdq
from bitlower.frontends import batches, load
from bitlower.frontends._encoder import plain_outputs
from bitlower.frontends.captions import reads_captions
from bitlower.frontends.pairs import random_pairs
from bitlower.frontends.pictures import random_pictures, reads_pictures
from bitlower.frontends.sound import reads_sound
from bitlower.frontends.task import is_caption_model, is_picture_model, is_sound_model, is_speech_reader
from bitlower.frontends.tokenize import random_windows, token_ids, windows
from bitlower.frontends.waveforms import reads_waveforms
from bitlower.ir import Batch, BitlowerError, Program
from bitlower.ir.quantization.scheme import WEIGHT_ROLES
from bitlower.ir.quiet import quiet
from bitlower.ir.tasks import auto_class
from bitlower.ir.tokens import TARGET_MASK, token_mask

SAMPLES, LENGTH, HELD_OUT = 16, 64, 4
ENCODERS = (("W8A8", None),)
DECODERS = (("W8A8", None), ("W4A16-g32", "gptq"))
GENERATIVE = ("ForCausalLM", "LMHeadModel")
PAIRED = ("ForConditionalGeneration", "MTModel")
"""Encoder-decoders, which write the targets of the texts themselves."""


@dataclass(frozen=True)
class Row:
    """One run: what came of it, the share of the model's parameters in few bits, and the cosine of its main output."""

    model: str
    scheme: str
    result: str
    share: float | None = None
    cosine: float | None = None
    seconds: float = 0.0


def is_decoder(folder: Path) -> bool:
    """Whether the architecture is one that goes on writing a text."""
    return architecture(folder).endswith(GENERATIVE)


def architecture(folder: Path) -> str:
    """The first that the configuration names."""
    named = json.loads((folder / "config.json").read_text()).get("architectures") or [""]
    return str(named[0])


def run(folder: Path, scheme: str, algorithm: str | None, texts: Path, text: Path) -> tuple[float, float]:
    """Quantize the model in ``folder``, and give share and cosine."""
    data = text if is_decoder(folder) else texts
    how: dict[str, Any] = {"calibration": str(data), "samples": SAMPLES, "max_length": LENGTH}
    if is_picture_model(folder):
        how = {"calibration": random_pictures(load(folder), count=SAMPLES, seed=0)}
    if is_caption_model(folder) or is_sound_model(folder):
        how = {"calibration": random_windows(load(folder), count=SAMPLES, length=LENGTH, seed=0)}
    if is_speech_reader(folder):
        how = {"calibration": random_pairs(load(folder), count=SAMPLES, length=LENGTH, seed=0)}
    with tempfile.TemporaryDirectory() as place:
        output = Path(place) / "artifact"
        done = bitlower.quantize(str(folder), scheme=scheme, algorithm=algorithm, output=output, **how)
        with quiet(), torch.no_grad():
            named = done.program.config.get("architectures") or []
            loader = getattr(transformers, auto_class(done.program.task, named))
            model = loader.from_pretrained(folder, dtype=torch.float32).eval()
            with plain_outputs(model):
                return share(done.program, model), cosine(done.program, output, model, data)


def share(program: Program, model: torch.nn.Module) -> float:
    """The part of the model's parameters that the program holds in few bits."""
    seen = {}
    for node, quantizer in program.quantizers():
        if quantizer.role in WEIGHT_ROLES and "type" in node.meta:
            seen[quantizer.tensor] = int(np.prod(node.meta["type"].shape))
    return sum(seen.values()) / sum(parameter.numel() for parameter in model.parameters())


def cosine(program: Program, artifact: Path, model: torch.nn.Module, data: Path) -> float:
    """The cosine of the artifact's first output, in onnxruntime, with transformers', on held-out texts."""
    deployed, name = OnnxQdq.load(artifact), program.outputs[0].name
    ours, theirs = [], []
    for batch in held_out(program, data):
        given = program.fitted({key: value for key, value in batch.items() if key != TARGET_MASK})
        found = program.cropped({name: deployed(**given)[name]}, batch)[name]
        expected = model(**batch)[name]
        mask = token_mask(batch)
        keep = mask if mask is not None and expected.shape[:2] == mask.shape and expected.dim() > 2 else ...
        ours.append(found[keep].double().flatten())
        theirs.append(expected[keep].double().flatten())
    a, b = torch.cat(ours), torch.cat(theirs)
    return float(a @ b / (a.norm() * b.norm()))


def held_out(program: Program, data: Path) -> list[Batch]:
    """Texts from the end of the file: batches of one and of several rows, of other lengths than in calibration.

    For a model of pictures or of sound noise of another seed.
    """
    if reads_pictures(program):
        drawn = [batch["pixel_values"] for batch in random_pictures(program, count=HELD_OUT, seed=1)]
        return [{"pixel_values": drawn[0]}, {"pixel_values": torch.cat(drawn[1:])}]
    if reads_captions(program) or reads_waveforms(program):
        first, *others = random_windows(program, count=HELD_OUT, length=LENGTH - 7, seed=1)
        more = {name: torch.cat([batch[name] for batch in others]) for name in first}
        fewer = {"pixel_values": more["pixel_values"][1:]} if reads_captions(program) else {}
        return [first, {**more, **fewer}]
    if reads_sound(program):
        return random_pairs(program, count=HELD_OUT, length=LENGTH - 7, seed=1)
    lines = [line for line in data.read_text().splitlines() if line.strip()]
    if program.task == "text-generation":
        length = min(LENGTH - 7, program.context_length or LENGTH)
        ids = token_ids(program, "\n".join(lines[-400:]))
        rows = ids[: HELD_OUT * length].view(HELD_OUT, length)
        return [*windows(program, rows[:1]), *windows(program, rows[1:], batch_size=HELD_OUT)]
    tail = lines[-HELD_OUT:]
    return [*batches(program, tail[:1], max_length=LENGTH), *batches(program, tail[1:], max_length=LENGTH)]


def attempt(sender: Connection, memory: int, arguments: tuple[Any, ...]) -> None:
    """In the fork: run, and send what came of it; nothing is printed."""
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        sender.send(("ok", *run(*arguments)))
    except BitlowerError as error:
        reason = str(error).replace(f"{arguments[0].parent}/", "")
        sender.send((("refused: " if error.exit_code == 2 else "FAILED: ") + reason, None, None))
    except BaseException as error:  # whatever it is, it is a row of the table
        reason = (str(error).splitlines() or [""])[0]
        sender.send((f"FAILED: {type(error).__name__}: {reason}", None, None))


def measure(name: str, arguments: tuple[Any, ...], timeout: float, memory: int) -> Row:
    """One run in a fork."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    start = time.perf_counter()
    process = context.Process(target=attempt, args=(sender, memory, arguments))
    process.start()
    sender.close()
    outcome: tuple[str, float | None, float | None]
    try:
        outcome = receiver.recv() if receiver.poll(timeout) else (f"FAILED: not done in {timeout:g} s", None, None)
    except EOFError:
        outcome = ("FAILED: the process died", None, None)
    process.kill()
    process.join()
    return Row(name, arguments[1], *outcome, round(time.perf_counter() - start, 1))


def cases(folder: Path, only: list[str]) -> Iterator[tuple[Path, str, str | None]]:
    """Every model with every scheme that it runs."""
    found = sorted(path.parent for path in folder.glob("*/config.json"))
    for model in found:
        if not only or model.name in only:
            generates = is_decoder(model) or architecture(model).endswith(PAIRED)
            for scheme, algorithm in DECODERS if generates else ENCODERS:
                yield model, scheme, algorithm


def earlier_rows() -> list[dict[str, Any]]:
    """The rows of the table that was kept."""
    kept = RESULTS / "families.json"
    rows: list[dict[str, Any]] = json.loads(kept.read_text())["rows"] if kept.exists() else []
    return rows


def summary(rows: list[dict[str, Any]]) -> str:
    """How many models of the table go through, and the cosines of each scheme."""
    through = [row for row in rows if row["result"] == "ok"]
    models, refused = ({row["model"] for row in side} for side in (through, [r for r in rows if r["result"] != "ok"]))
    lines = [f"{len(models | refused)} models: {len(models)} go through in {len(through)} runs, {len(refused)} do not"]
    for scheme in sorted({row["scheme"] for row in through}):
        cosines = [row["cosine"] for row in through if row["scheme"] == scheme]
        spread = f"cosine {min(cosines):.4f} to {max(cosines):.4f}, median {np.median(cosines):.4f}"
        lines.append(f"{scheme}: {len(cosines)} models, {spread}")
    return "\n".join(lines)


def main() -> None:
    """Run all cases; the table is printed as it comes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", type=Path)
    parser.add_argument("--texts", type=Path, required=True, help="one text a line, for encoders")
    parser.add_argument("--text", type=Path, required=True, help="a long text, for decoders")
    parser.add_argument("--only", nargs="+", default=[], help="these models alone")
    parser.add_argument("--timeout", type=float, default=300, help="seconds of one run")
    parser.add_argument("--memory", type=float, default=6, help="GiB of one run")
    parser.add_argument(
        "--write", action="store_true", help="write results/families.json; with --only, their rows alone change"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for model, scheme, algorithm in cases(options.models, options.only):
        arguments = (model, scheme, algorithm, options.texts, options.text)
        row = measure(model.name, arguments, options.timeout, int(options.memory * 2**30))
        rows.append(row)
        print(f"{row.model:24} {row.scheme:10} {row.seconds:6.1f} s  {row.result}", file=sys.stderr, flush=True)
    show_table(
        ("model", "scheme", "result", "parameters quantized", "cosine", "seconds"),
        [
            (
                row.model, row.scheme, row.result.replace("|", "\\|"), "" if row.share is None else f"{row.share:.1%}",
                "" if row.cosine is None else f"{row.cosine:.5f}", row.seconds,
            )
            for row in rows
        ],
    )  # fmt: skip
    kept = earlier_rows()
    if options.write:
        command = "python benchmarks/families.py MODELS_DIR --texts FILE --text FILE --write"
        found = [asdict(row) for row in rows]
        others = [row for row in kept if row["model"] not in options.only] if options.only else []
        kept = sorted(others + found, key=lambda row: str(row["model"]))
        write_result("families", command, {"rows": kept})
    print(summary(kept))


if __name__ == "__main__":
    main()

"""Whisper in few bits: word error rates on synthetic speech, sizes, and how fast sound is transcribed.

    python benchmarks/whisper.py FOLDER --data DIR [--sentences 40] [--cases NAME ...] [--speed [--ctranslate2 FOLDER]]

FOLDER is a Whisper model as a Hugging Face folder. Sentences of STS-B dev, and 16 others of STS-B train to calibrate
on, are spoken by espeak-ng in four voices: this is synthetic speech, and word error rates of people are others. Each
case is exported to ONNX and verified, and its word error rate is that of the file in onnxruntime, greedy, after
Whisper's normalization, as ``bitlower eval --task speech-recognition`` gives it. ``--speed`` times the transcription of
the same sentences one by one, without the features, each side in a process of its own and all in turn; with
``--ctranslate2`` the int8 model of CTranslate2 in that folder is one more side (``pip install ctranslate2``). Rows are
written to ``results/whisper.json`` as they come.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _common import RESULTS, data_folder, show_table, write_result

VOICES = ("en-us", "en-gb", "en-us+f2", "en-gb+m3")
CALIBRATION, WORDS, NEW = 16, 6, 64
"""Sentences to calibrate on, the fewest words of a sentence, the most new tokens."""
CASES = {
    "float": "",
    "W8A8, static per tensor": "quantize{scheme=W8A8},calibrate,lower-integer",
    "W8A8, unequal groups behind GELU": (
        'quantize{scheme=W8A8-upeg6 targets=["*.fc2"]},quantize{scheme=W8A8},smooth,calibrate,legalize,lower-integer'
    ),
    "W8A8, per token": "quantize{scheme=W8A8-token},calibrate,lower-integer",
    "W4, groups of 64": "quantize{scheme=W4A16-g64},gptq,lower-integer",
}
"""The passes behind ``clean``."""
COMMAND = "python benchmarks/whisper.py FOLDER --data DIR --speed --ctranslate2 FOLDER"
PEER = "CTranslate2, int8"


def sentences(data: Path, file: str, count: int) -> list[str]:
    """``count`` sentences in ASCII of ``WORDS`` words at least, evenly drawn from a file of STS-B."""
    rows = [line.split("\t")[5] for line in (data / "STS-B" / file).read_text().splitlines()]
    fitting = [row for row in rows if len(row.split()) >= WORDS and row.isascii()]
    return [fitting[place * len(fitting) // count] for place in range(count)]


def speak(texts: list[str], folder: Path) -> list[Path]:
    """A sound file for each text."""
    if not shutil.which("espeak-ng"):
        raise SystemExit("install espeak-ng, which speaks the sentences")
    folder.mkdir()
    files = [folder / f"{number}.wav" for number in range(len(texts))]
    for number, (text, file) in enumerate(zip(texts, files, strict=True)):
        voice = VOICES[number % len(VOICES)]
        subprocess.run(["espeak-ng", "-v", voice, "-s", "150", "-w", str(file), text], check=True)
    return files


def build(model: Path, data: Path, count: int, cases: list[str], root: Path) -> list[dict[str, Any]]:
    """Write the artifact of each case below ``root``; its word error rate and size."""
    from bitlower import Context, PassManager, parse_pipeline
    from bitlower.backends import onnx_qdq
    from bitlower.frontends import load
    from bitlower.frontends.sound import sound_batches
    from bitlower.tools.evaluation.targets import evaluate_targets

    said, heard = sentences(data, "sts-dev.tsv", count), sentences(data, "sts-train.tsv", CALIBRATION)
    table = root / "test" / "sentences.tsv"
    files = speak(said, table.parent)
    rows = [f"{file.name}\t{text}" for file, text in zip(files, said, strict=True)]
    table.write_text("\n".join(["path\ttext", *rows]) + "\n")
    program = load(model)
    batches = sound_batches(program, speak(heard, root / "heard"), heard, max_length=NEW, batch_size=4).batches
    np.savez(root / "features.npz", *(features(program, file) for file in files), seconds=sum(map(seconds, files)))
    results = []
    for case in cases:
        made = PassManager(parse_pipeline(f"clean,{CASES[case]}".rstrip(","))).run(program, Context(batches))
        folder = root / case
        folder.mkdir()
        onnx_qdq.export(made, folder, batches=batches[:1], form="onnxruntime")
        del made
        metrics = evaluate_targets(
            folder, "speech-recognition", table, columns=("path", "text"), max_length=NEW
        ).metrics
        size = sum(file.stat().st_size for file in folder.glob("*.onnx*"))
        errors = {name: round(metrics[name], 2) for name in ("wer", "cer")}
        words = sum(len(text.split()) for text in said)
        results.append({"case": case, "sentences": count, "words": words, **errors, "mb": round(size / 1e6, 1)})
        print(json.dumps(results[-1]), flush=True)
    return results


def features(program: Any, file: Path) -> np.ndarray:
    """``[1, bins, frames]`` float32."""
    from bitlower.frontends import sound

    extractor = sound.feature_extractor(program)
    return sound.features(extractor, [sound.read_sound(file, extractor.sampling_rate)]).numpy()


def seconds(file: Path) -> float:
    """The length of a sound file."""
    import soundfile

    return float(soundfile.info(file).duration)


def transcribe(kind: str, folder: Path, root: Path) -> None:
    """Transcribe all sentences once to warm up and once to be timed; print seconds of sound a second."""
    stored = np.load(root / "features.npz")
    sounds = [stored[name] for name in stored.files if name != "seconds"]
    run = peer(folder) if kind == PEER else ours(folder)
    for sound in sounds[:2]:
        run(sound)
    start = time.perf_counter()
    for sound in sounds:
        run(sound)
    print(float(stored["seconds"]) / (time.perf_counter() - start))


def ours(folder: Path) -> Any:
    """From features to tokens, by the artifact in ``folder``."""
    import torch

    import bitlower
    from bitlower.frontends.sound import LANGUAGE, speech_prompt, stop_token

    model = bitlower.load(folder)
    prompt = torch.tensor([speech_prompt(model.program, LANGUAGE)])
    stops = (stop_token(model.program),)
    return lambda sound: model.generate(
        input_features=torch.from_numpy(sound), start=prompt, stops=stops, pad=stops[0], max_new_tokens=NEW
    )


def peer(folder: Path) -> Any:
    """The same by CTranslate2."""
    import ctranslate2

    model = ctranslate2.models.Whisper(str(folder), compute_type="int8", intra_threads=2)
    prompt = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]

    def run(sound: np.ndarray) -> object:
        view = ctranslate2.StorageView.from_array(np.ascontiguousarray(sound))
        return model.generate(view, [prompt], beam_size=1, max_length=NEW + len(prompt))

    return run


def speeds(sides: dict[str, Path], root: Path, rounds: int) -> list[dict[str, Any]]:
    """The median over the rounds, and the ratio to the float model of the same round."""
    measured: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, folder in sides.items():
            command = [sys.executable, __file__, str(folder), "--time", side, str(root)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            measured[side].append(float(done.stdout.split()[-1]))
    rows = []
    for side, values in measured.items():
        ratios = [value / base for value, base in zip(values, measured["float"], strict=True)]
        rows.append({"side": side, "x_sound": round(np.median(values), 2), "x_float": round(np.median(ratios), 2)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="FOLDER")
    parser.add_argument("--data", help="folder with STS-B/")
    parser.add_argument("--sentences", type=int, default=40)
    parser.add_argument("--cases", nargs="+", choices=[*CASES], default=[*CASES])
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--ctranslate2", type=Path, metavar="FOLDER")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--time", nargs=2, metavar=("SIDE", "ROOT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.time:
        transcribe(arguments.time[0], arguments.model, Path(arguments.time[1]))
        return
    if arguments.speed and "float" not in arguments.cases:
        parser.error("--speed compares with the case float")
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        rows = build(arguments.model, data_folder(arguments.data), arguments.sentences, arguments.cases, root)
        sides = {case: root / case for case in arguments.cases}
        if arguments.ctranslate2:
            sides[PEER] = arguments.ctranslate2
        timed = speeds(sides, root, arguments.rounds) if arguments.speed else []
    path = RESULTS / "whisper.json"
    before = json.loads(path.read_text()) if path.is_file() else {"rows": [], "speed": []}
    fresh = {row["case"] for row in rows}
    rows = [*(row for row in before["rows"] if row["case"] not in fresh), *rows]
    write_result("whisper", COMMAND, {"rows": rows, "speed": timed or before["speed"]})
    show_table(("case", "WER", "CER", "MB"), [[r["case"], r["wer"], r["cer"], r["mb"]] for r in rows])
    show_table(("side", "sound a second", "x float"), [list(row.values()) for row in timed])


if __name__ == "__main__":
    main()

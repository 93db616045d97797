"""Kill a run at random moments and start it again: the artifact must be that of an undisturbed run, to the byte.

    python benchmarks/resume.py

A run with an empty cache is the reference; a second undisturbed run, with another empty cache, must give the same
bytes. Then three times: a run with an empty cache is killed with SIGKILL at a random moment within the time the first
one took (an earlier one if it was done before that), and started again with the same command.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import write_result

RECIPE = Path(__file__).parents[1] / "examples" / "minilm-w8a8.yaml"


def run(output: Path, cache: Path, kill_after: float | None = None) -> float | None:
    """Run the recipe; the seconds it took, or None if it was killed on the way."""
    command = [sys.executable, "-m", "bitlower.tools.cli", "--quiet", "run", str(RECIPE), "-o", str(output)]
    start = time.perf_counter()
    process = subprocess.Popen([*command, "--cache", str(cache)], stdout=subprocess.DEVNULL)
    try:
        if process.wait(kill_after):
            raise SystemExit("the run failed")
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return None
    return time.perf_counter() - start


def disturbed(folder: Path, moment: float) -> dict[str, object]:
    """Kill a run after ``moment`` seconds and run it again; what came of it."""
    output, cache = folder / "artifact", folder / "cache"
    while run(output, cache, moment) is not None:
        moment *= 0.8
        shutil.rmtree(folder)
    left = output.exists()
    seconds = run(output, cache)
    stray = sorted(path.name for path in folder.iterdir() if path not in (output, cache))
    return {
        "killed_after_seconds": round(moment, 1),
        "left_an_artifact": left,
        "seconds_again": round(seconds or 0, 1),
        "left_behind": stray,
        "files": digests(output),
    }


def digests(folder: Path) -> dict[str, str]:
    """Every file of an artifact and its hash."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="for the moments of the kills")
    seed = parser.parse_args().seed
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        seconds = run(folder / "first", folder / "cache1") or 0
        run(folder / "second", folder / "cache2")
        reference = digests(folder / "first")
        generator = random.Random(seed)
        rows = [disturbed(folder / str(i), generator.uniform(0.05, 0.95) * seconds) for i in range(3)]
        result = {
            "undisturbed_seconds": round(seconds, 1),
            "two_runs_identical": digests(folder / "second") == reference,
            "killed_runs_identical": all(row.pop("files") == reference for row in rows),
            "runs": rows,
            "files": reference,
        }
    write_result("resume", "python benchmarks/resume.py", result)
    print({key: value for key, value in result.items() if key != "files"})
    if not (result["two_runs_identical"] and result["killed_runs_identical"]):
        raise SystemExit("the artifacts differ")


if __name__ == "__main__":
    main()

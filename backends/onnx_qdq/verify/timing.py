"""How long each kernel of an artifact takes in onnxruntime, by the runtime's own profiler."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from bitlower.backends.base import RUNS, WARM, KernelTime
from bitlower.backends.onnx_qdq.runtime.session import Session
from bitlower.backends.onnx_qdq.verify.record import Verification
from bitlower.backends.onnx_qdq.verify.stages import StageSessions
from bitlower.backends.onnx_qdq.write.files import files_in
from bitlower.ir.scratch import scratch_folder

_TIME = "_kernel_time"
"""What the profiler's name of a node's run ends with."""


def kernel_times(folder: Path) -> tuple[KernelTime, ...]:
    """What each kind of kernel takes on the inputs of the self-test, the longest first.

    Args:
        folder: the artifact's; an encoder-decoder's stages run one after the other.

    Raises:
        CheckError: a file is missing or damaged, or the model does not run.
    """
    recorded, names = Verification.read(folder), files_in(folder).values()
    batch = recorded.selftest.batch()
    with scratch_folder() as place:
        sessions = [Session(folder / name, config=recorded.session_config, profile=place / name) for name in names]
        run = sessions[0].run if len(sessions) == 1 else StageSessions(*sessions).run
        for _ in range(WARM + RUNS):
            run(batch)
        nodes = [node for session in sessions for node in _nodes(session.end_profile())]
    calls: dict[str, list[float]] = defaultdict(list)
    for kernel, durations in nodes:
        calls[kernel].append(statistics.median(durations[WARM:]))
    times = (KernelTime(kernel, len(medians), sum(medians)) for kernel, medians in calls.items())
    return tuple(sorted(times, key=lambda time: -time.microseconds))


def _nodes(profile: Path) -> Iterator[tuple[str, list[float]]]:
    """Of each node its operator and the microseconds of its runs, in order."""
    runs: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in json.loads(profile.read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith(_TIME):
            runs[event["name"], event["args"]["op_name"]].append(float(event["dur"]))
    for (_, kernel), durations in runs.items():
        yield kernel, durations

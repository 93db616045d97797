"""Training elsewhere: the same bytes in one process under accelerate, the mean of gradients in two, other devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bitlower.ir import BitlowerError, serialize
from bitlower.passes import Context, PassManager, make_pass, parse_pipeline
from bitlower.passes.training import _devices
from bitlower.passes.training._devices import move

OPTIONS = {"steps": 3, "evaluate-every": 3, "keep": "last"}
SCRIPT = """
import sys
from pathlib import Path

import torch
from bitlower.ir import serialize
from bitlower.passes import Context, PassManager, make_pass
from accelerate import PartialState

program, batches = serialize.load(Path(sys.argv[1])), torch.load(sys.argv[2])
pass_ = make_pass("qat", {"steps": 3, "evaluate-every": 3, "keep": "last", "device": "accelerate"})
trained = PassManager([pass_]).run(program, Context(training=batches, held_out=batches[:1]))
state = PartialState()
assert state.num_processes == 2
serialize.save(trained, Path(f"{sys.argv[3]}-{state.process_index}"))
"""


@pytest.fixture(scope="module")
def simulated(bert, batches):
    context = Context(batches(2))
    program = PassManager(parse_pipeline("clean,quantize{scheme=W3A8-full},calibrate")).run(bert()[1], context)
    return program, batches(6, seed=3)


def trained(program, batches, **options):
    context = Context(training=batches, held_out=batches[:1])
    return PassManager([make_pass("qat", {**OPTIONS, **options})]).run(program, context)


def test_one_process_under_accelerate_gives_the_same_bytes(simulated):
    plain, accelerated = trained(*simulated), trained(*simulated, device="accelerate")
    for (name, mine), (_, theirs) in zip(accelerated.tensors(), plain.tensors(), strict=True):
        assert torch.equal(mine, theirs), name


def test_two_processes_take_the_step_of_two_batches(simulated, tmp_path: Path):
    program, batches = simulated
    serialize.save(program, tmp_path / "program")
    torch.save(batches, tmp_path / "batches.pt")
    (tmp_path / "run.py").write_text(SCRIPT)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *(tmp_path / "run.py", tmp_path / "program", tmp_path / "batches.pt", tmp_path / "trained"),
    ]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (serialize.load(tmp_path / f"trained-{rank}") for rank in (0, 1))
    expected = trained(program, batches, accumulate=2)
    for (name, mine), (_, other), (_, theirs) in zip(
        first.tensors(), second.tensors(), expected.tensors(), strict=True
    ):
        assert torch.equal(mine, other), name
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5, msg=name)


def test_a_graph_moves_with_the_tensors_that_it_makes(family, feed):
    program = family("llama")
    module = program.trainable_module()
    move(module.model, torch.device("meta"))
    outputs = module.model(*(value.to("meta") for value in program.arguments(feed(program))))
    assert {value.device.type for value in outputs} == {"meta"}
    assert {tensor.device.type for _, tensor in program.tensors()} == {"cpu"}


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"ranges": "observed"}, "observed ranges follow the batches of one process"),
        ({"losses": ["token-contrast"]}, "the loss 'token-contrast' keeps values of the batches of one process"),
    ],
)
def test_what_several_processes_cannot_share_is_refused(simulated, monkeypatch, options, what):
    monkeypatch.setattr(_devices.Devices, "processes", 2)
    with pytest.raises(BitlowerError, match=what):
        trained(*simulated, **options)


def test_without_accelerate_it_says_what_to_install(simulated, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(BitlowerError, match=r"needs the package accelerate; pip install 'bitlower\[train\]'"):
        _devices.make_devices("accelerate")

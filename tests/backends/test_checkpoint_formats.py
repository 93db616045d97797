"""A format of a third party with a kind of file of its own: one module, exported, verified bit for bit and foreseen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bitlower.backends.checkpoint.format import find_format, known_formats
from bitlower.ir import BitlowerError

TOY = '''
"""Codes of a byte each, beside scales and zero points; all in one file of numpy's, under names of its own."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from bitlower.backends.checkpoint import Container, Entry, Format, Packed, Weight
from bitlower.ir import CheckError


class Arrays:
    def __init__(self, path):
        if not path.is_file():
            raise CheckError(f"{path.name} is missing")
        self.arrays = np.load(path)
        self.names = {name.replace("/", ".") for name in self.arrays.files}

    def tensor(self, name):
        if name not in self.names:
            raise CheckError(f"the tensor {name} is missing")
        return torch.from_numpy(self.arrays[name.replace(".", "/")])


class Npz(Container):
    files: ClassVar[tuple[str, ...]] = ("weights.npz",)
    readers: ClassVar[tuple[str, ...]] = ("no_such_container",)

    def write(self, entries, folder, *, max_shard_size):
        np.savez(folder / "weights.npz", **{entry.name.replace(".", "/"): entry.make().numpy() for entry in entries})
        return ["weights.npz"]

    def open(self, folder):
        return Arrays(folder / "weights.npz")


@dataclass(frozen=True)
class Bytes(Format):
    name: ClassVar[str] = "plain-bytes"
    readers: ClassVar[tuple[str, ...]] = ("no_such_reader",)
    container: ClassVar[Container] = Npz()

    def scale_dtype(self, dtype):
        return torch.float32

    def refusal(self, packed, shape, kind):
        return "" if packed.bits == 4 else f"it holds codes of 4 bits, not of {packed.bits}"

    def entries(self, layer, dtype):
        grid = layer.shape[0], layer.groups
        yield Entry(f"{layer.path}.codes", torch.uint8, layer.shape, layer.codes)
        yield Entry(f"{layer.path}.scales", torch.float32, grid, lambda: layer.scales().contiguous())
        yield Entry(f"{layer.path}.zeros", torch.uint8, grid, lambda: layer.zeros().contiguous())

    def stored_bytes(self, packed, shape, scales, width):
        return shape[0] * shape[1] + 5 * scales[0]

    def config(self, layers, skeleton):
        sizes = {layer.path: [layer.group_size, layer.symmetric] for layer in layers}
        return {"quant_method": "plain-bytes", "sizes": sizes}

    def layers(self, config, folder):
        return {path: Packed(4, size, symmetric) for path, (size, symmetric) in config["sizes"].items()}

    def read(self, folder, path, packed):
        return Weight(*(folder.tensor(f"{path}.{part}") for part in ("codes", "scales", "zeros")))
'''
SCRIPT = """
import json, pathlib, sys
import numpy as np
import torch, transformers
import bitlower
from bitlower.backends.checkpoint import Checkpoint
from bitlower.backends.registry import verify_artifact
from bitlower.ir import CheckError
from bitlower.passes import Context, PassManager, parse_pipeline

sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=32)
model = transformers.LlamaForCausalLM(config).eval()
passes = "clean,quantize{scheme=W4A16-g16-e16},rtn,lower-integer"
program = PassManager(parse_pipeline(passes)).run(bitlower.load(model, task="text-generation"), Context())
ids = torch.randint(0, 50, (2, 7))
folder = pathlib.Path(sys.argv[1])
backend = Checkpoint(format="plain-bytes")
places = torch.arange(7).expand(2, 7)
batch = program.complete({"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": places})
report = backend.export(program, folder, [batch])
weights = [q for n, q in program.quantizers()]
foreseen = sum(backend.sizes(program).quantized(q, (64, 32) if "up" in q.tensor else (32, 64) if "down" in q.tensor
               else (64, 32) if "gate" in q.tensor else (32, 32)) for q in weights)
print(json.dumps({"packed": report.packed, "bytes": report.packed_bytes, "foreseen": foreseen,
                  "verified": verify_artifact(folder)["files"], "client": report.verification.client,
                  "files": sorted(report.files)}))
weights = np.load(folder / "weights.npz")
damaged = {name: weights[name] for name in weights.files}
damaged["model/layers/0/mlp/up_proj/codes"][3, 5] ^= 1
np.savez(folder / "weights.npz", **damaged)
try:
    verify_artifact(folder)
except CheckError as error:
    print(error)
"""


def test_a_format_and_its_container_are_one_file_with_an_entry_point(tmp_path: Path) -> None:
    site, folder = tmp_path / "site", tmp_path / "out"
    info = site / "plain_bytes-1.0.dist-info"
    info.mkdir(parents=True)
    folder.mkdir()
    (site / "plain_bytes.py").write_text(TOY)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plain-bytes\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[bitlower.checkpoint_formats]\nplain-bytes = plain_bytes:Bytes\n")
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    [said, refused] = done.stdout.splitlines()[-2:]
    figures = json.loads(said)
    assert figures["packed"] == 7
    assert figures["bytes"] == figures["foreseen"] == 4 * (32 * 32 + 5 * 64) + 3 * (32 * 64 + 5 * 128)
    assert figures["verified"] > 3
    assert "weights.npz" in figures["files"]
    assert not [name for name in figures["files"] if "safetensors" in name]
    assert "no_such_container" in figures["client"]
    assert "weights.npz" in refused
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "plain-bytes"


def test_formats_are_files_of_their_names() -> None:
    assert known_formats() == ("compressed-tensors", "gptq-v2")
    assert [find_format(name).name for name in known_formats()] == list(known_formats())
    with pytest.raises(BitlowerError, match=r"unknown checkpoint format 'gptq'.*'gptq-v2'"):
        find_format("gptq")

"""Headers of GGUF files: as the gguf package writes them, and such as no package should walk through."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from bitlower.frontends._gguf_header import read_gguf_header
from bitlower.frontends.gguf import load_gguf
from bitlower.ir import BitlowerError

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")


@pytest.fixture(params=["LITTLE", "BIG"])
def sound(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file of either byte order."""
    path = tmp_path / "sound.gguf"
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian[request.param])
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 0.25)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "ä"])
    writer.add_array("tokenizer.ggml.scores", [1.0, 2.0])
    writer.add_bool("some.flag", True)
    writer.add_tensor("token_embd.weight", np.zeros((3, 32), np.float32))
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((4, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_the_package_writes_is_read(sound: Path) -> None:
    header = read_gguf_header(sound)
    assert header.values["llama.block_count"] == 2
    assert header.values["llama.attention.layer_norm_rms_epsilon"] == 0.25
    assert header.values["some.flag"] is True
    entries = {key: list(array.entries) for key, array in header.arrays.items()}
    assert entries == {
        "tokenizer.ggml.tokens": [b"a", b"bc", "ä".encode()],
        "tokenizer.ggml.scores": [1.0, 2.0],
    }
    assert header.shapes == {"token_embd.weight": (3, 32), "blk.0.attn_q.weight": (4, 32)}


def test_every_cut_of_a_file_is_refused(sound: Path, tmp_path: Path) -> None:
    whole = sound.read_bytes()
    for size in [*range(0, len(whole) - 64, 7), len(whole) - 64]:
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r".+"):
            read_gguf_header(tmp_path / "cut.gguf")


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (struct.pack("<QQ", 2**60, 0), "it counts 1152921504606846976 entries"),
        (struct.pack("<QQ", 0, 2**60), "it counts 1152921504606846976 entries"),
        (struct.pack("<QQ", 0, 1) + struct.pack("<Q", 2**60), "it counts"),
        (struct.pack("<QQ", 0, 1) + text(b"k") + struct.pack("<IIQ", 9, 0, 2**60), "it counts"),
        (struct.pack("<QQ", 0, 1) + text(b"k") + struct.pack("<IIQ", 9, 12, 30), "runs past its end"),
        (struct.pack("<QQ", 0, 1) + text(b"k") + struct.pack("<IIQ", 9, 9, 1), "entries of the unknown type 9"),
        (struct.pack("<QQ", 0, 1) + text(b"k") + struct.pack("<I", 77), "the unknown type 77"),
        (struct.pack("<QQ", 0, 1) + text(b"general.alignment") + struct.pack("<II", 4, 3), "its alignment is 3"),
        (struct.pack("<QQ", 0, 2) + 2 * (text(b"k") + struct.pack("<IIQ", 9, 0, 0)), "it has the key 'k' twice"),
        (struct.pack("<QQ", 0, 1) + text(b"k") + struct.pack("<IIQQ", 9, 8, 1, 41), "a text of 41 bytes at byte"),
        (struct.pack("<QQ", 1, 0) + text(b"t") + struct.pack("<I", 9), "'t' has 9 dimensions"),
        (struct.pack("<QQ", 1, 0) + text(b"t") + struct.pack("<IQIQ", 1, 4, 999, 0), "the unknown type 999"),
        (struct.pack("<QQ", 1, 0) + text(b"t") + struct.pack("<IQIQ", 1, 2**62, 0, 0), "'t' runs past the end"),
        (struct.pack("<QQ", 1, 0) + text(b"t") + struct.pack("<IQIQ", 1, 4, 0, 2**62), "'t' runs past the end"),
    ],
)
def test_counts_and_places_beyond_the_file_are_refused(tmp_path: Path, body: bytes, reason: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + body + b"\0" * 40)
    with pytest.raises(BitlowerError, match=rf"model\.gguf cannot be read: .*{reason}.*; fetch the file again"):
        load_gguf(path)


def test_a_named_pipe_is_no_model(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(BitlowerError, match="it is a named pipe"):
        load_gguf(tmp_path / "model.gguf")

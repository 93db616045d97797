"""Models of the hub, from a local stand-in of its API."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from bitlower.frontends import load
from bitlower.frontends.hub import _download, hub_folder, pinned
from bitlower.frontends.task import is_decoder
from bitlower.ir import BitlowerError
from bitlower.tools.recipes.recipe import Recipe
from bitlower.tools.runs.flow import recipe_job

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Answers what a download asks for: which files a revision has, and these."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.asked: list[str] = []
        self.gated = False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        if self.server.gated:
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"}, body)
        elif path in ("/api/models/org/tiny", f"/api/models/org/tiny/revision/{COMMIT}") or path.endswith(
            ("/org/tiny/revision/main", "/org/tiny/revision/v1")
        ):
            listing = {"id": "org/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.server.files]}
            self._send(200, json.dumps(listing).encode(), {}, body)
        elif path == f"/api/models/org/tiny/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.server.files.items()
            ]
            self._send(200, json.dumps(tree).encode(), {}, body)
        elif path.startswith("/api/models/org/tiny/revision/"):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
        elif path.startswith(f"/org/tiny/resolve/{COMMIT}/"):
            content = self.server.files[path.removeprefix(f"/org/tiny/resolve/{COMMIT}/")]
            tag = hashlib.sha256(content).hexdigest()
            self._send(200, content, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}, body)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)

    def _send(self, code: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(code)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], Hub]]:
    """``serve(folder)`` is a hub with that folder as ``org/tiny``, and an empty cache."""
    from huggingface_hub import constants

    hubs: list[Hub] = []

    def start(folder: Path) -> Hub:
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        hub = Hub(files | {"pytorch_model.bin": b"pickled", "onnx/model.onnx": b"graph", "README.md": b"card"})
        hubs.append(hub)
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        template = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        return hub

    _download.cache_clear()
    yield start
    _download.cache_clear()
    for hub in hubs:
        hub.shutdown()
        hub.server_close()


def test_a_model_of_the_hub_is_the_folder_that_lies_there(
    serve: Callable[[Path], Hub], bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = serve(bert)
    program = load("hf:org/tiny")
    assert program.source == f"hf:org/tiny@{COMMIT}"
    ids = torch.tensor([[2, 5, 6, 3]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    expected = load(bert)(**batch)
    assert torch.equal(program(**batch)["last_hidden_state"], expected["last_hidden_state"])
    assert set(program.assets) == {*load(bert).assets, "README.md"}
    assert not [path for path in hub.asked if path.endswith((".bin", ".onnx"))]
    asked = len(hub.asked)
    hub_folder("hf:org/tiny")
    assert len(hub.asked) == asked  # once a process
    _download.cache_clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub_folder("hf:org/tiny").name == COMMIT  # offline the cache answers
    assert len(hub.asked) == asked


def test_the_recipe_in_the_artifact_names_the_commit(serve: Callable[[Path], Hub], bert: Path, texts: Path) -> None:
    serve(bert)
    form = {
        "model": {"path": "hf:org/tiny@v1"},
        "calibration": {"data": str(texts)},
        "passes": ["clean", {"quantize": {"scheme": "W8A8"}}, "calibrate", "lower-integer"],
        "export": ["onnx-qdq"],
    }
    assert f"hf:org/tiny@{COMMIT}" in recipe_job(Recipe.model_validate(form)).recipe
    assert pinned(f"hf:org/tiny@{COMMIT}") == f"hf:org/tiny@{COMMIT}"


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("hf:org/none", "the hub has no model org/none", "HF_TOKEN"),
        ("hf:org/tiny@v9", "org/tiny has no revision 'v9'", "a branch, a tag or a commit"),
        ("hf:", "names no model of the hub", "hf:ORG/NAME"),
        ("hf:org/tiny@", "names no model of the hub", "hf:ORG/NAME@REVISION"),
        ("hf:a/b/c", "is no name of the hub", "hf:ORG/NAME"),
    ],
)
def test_bad_names(serve: Callable[[Path], Hub], tmp_path: Path, name: str, message: str, hint: str) -> None:
    serve(tmp_path)
    with pytest.raises(BitlowerError) as error:
        load(name)
    assert message in error.value.message
    assert hint in error.value.hint


def test_gated_and_unreached(serve: Callable[[Path], Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = serve(tmp_path)
    hub.gated = True
    with pytest.raises(BitlowerError, match="org/tiny is gated"):
        load("hf:org/tiny")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BitlowerError, match="not in the cache, and the hub is not reached"):
        load("hf:org/tiny")


def test_what_looks_like_a_name_of_the_hub_is_taken_for_one(tmp_path: Path) -> None:
    with pytest.raises(BitlowerError) as error:
        load("bert-base-uncased")
    assert "write hf:bert-base-uncased" in error.value.hint
    with pytest.raises(BitlowerError) as error:
        load(tmp_path / "none" / "there")
    assert "hf:ORG/NAME" in error.value.hint
    assert "write hf:" not in error.value.hint


def test_the_task_of_a_model_is_known_before_its_weights_are_there(serve: Callable[[Path], Hub], llama: Path) -> None:
    hub = serve(llama)
    assert is_decoder("hf:org/tiny")
    assert any(path.endswith("/config.json") for path in hub.asked)
    assert not [path for path in hub.asked if path.endswith(".safetensors")]
    assert any(path.suffix == ".safetensors" for path in hub_folder("hf:org/tiny").iterdir())

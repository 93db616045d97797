"""Artifacts go to a stand-in of the hub whole, and only when they are as they were written."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bitlower.backends.artifact.manifest import check_artifact
from bitlower.backends.onnx_qdq import OnnxQdq
from bitlower.frontends import batches
from bitlower.ir import Program


class Hub(ThreadingHTTPServer):
    """The part of the hub's API that an upload needs; ONNX files are large ones to it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def answer(self, form: Any, status: int = 200, **headers: str) -> None:
        body = json.dumps(form).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def allowed(self) -> bool:
        if self.headers.get("Authorization") == "Bearer hf_right":
            return True
        self.answer({"error": "Invalid credentials"}, 401)
        return False

    def do_GET(self) -> None:
        if not self.allowed():
            return
        parts = self.path.split("?")[0].strip("/").split("/")
        repository, revision = "/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main"
        files = self.server.repositories[repository][revision]
        if parts[4:5] == ["tree"]:
            self.answer([{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files.items()])
        else:
            self.answer({"id": repository, "sha": "1" * 40, "siblings": [{"rfilename": name} for name in files]})

    def do_PUT(self) -> None:
        data = self.body()
        assert hashlib.sha256(data).hexdigest() == self.path.rpartition("/")[2]
        self.server.objects[self.path.rpartition("/")[2]] = data
        self.answer({})

    def do_POST(self) -> None:
        data = self.body()
        if not self.allowed():
            return
        parts = self.path.strip("/").split("/")
        if self.path == "/api/repos/create":
            self.create(json.loads(data))
        elif self.path.endswith("/info/lfs/objects/batch"):
            self.batch(json.loads(data)["objects"])
        elif self.path == "/api/validate-yaml":
            assert json.loads(data)["content"].startswith("---")
            self.answer({"errors": [], "warnings": []})
        elif parts[4] == "branch":
            branches = self.server.repositories["/".join(parts[2:4])]
            taken = parts[5] in branches
            branches.setdefault(parts[5], dict(branches["main"]))
            self.answer({}, 409 if taken else 200)
        elif parts[4] == "preupload":
            names = [entry["path"] for entry in json.loads(data)["files"]]
            modes = {name: "lfs" if name.endswith(".onnx") else "regular" for name in names}
            self.answer(
                {"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]}
            )
        else:
            assert parts[4] == "commit"
            self.commit("/".join(parts[2:4]), parts[5], [json.loads(line) for line in data.splitlines()])

    def create(self, form: dict[str, Any]) -> None:
        name = f"{form['organization']}/{form['name']}"
        there = name in self.server.repositories
        self.server.repositories.setdefault(name, {"main": {".gitattributes": b""}})
        self.server.private.setdefault(name, form.get("visibility") == "private" or bool(form.get("private")))
        self.answer({"url": f"{self.server.url}/{name}", "error": "exists"}, 409 if there else 200)

    def batch(self, objects: list[dict[str, Any]]) -> None:
        upload = [{**each, "actions": {"upload": {"href": f"{self.server.url}/put/{each['oid']}"}}} for each in objects]
        self.answer({"transfer": "basic", "objects": upload})

    def commit(self, repository: str, revision: str, lines: list[dict[str, Any]]) -> None:
        files = self.server.repositories[repository][revision]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        self.answer({"commitUrl": f"{self.server.url}/{repository}/commit/{'1' * 40}", "commitOid": "1" * 40})


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def artifact(bert_program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    OnnxQdq().export(bert_program, folder, batches(bert_program, ["the cat sings"]))
    return folder


def pushed(hub: Hub, *arguments: str | Path, token: str = "hf_right") -> tuple[int, dict[str, Any]]:
    """``bitlower push`` in a process of its own, which is not told to stay offline."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-m", "bitlower.tools.cli", "push", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    return done.returncode, json.loads(done.stdout)


def test_what_arrives_is_the_artifact(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    (artifact / "notes.txt").write_text("mine")
    code, form = pushed(hub, artifact, "org/tiny", "--private")
    assert code == 0, form
    (artifact / "notes.txt").unlink()
    files = hub.repositories["org/tiny"]["main"]
    assert hub.private == {"org/tiny": True}
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert check_artifact(tmp_path).unlisted == (".gitattributes",)
    assert {"model.onnx", "manifest.json", "README.md", "tokenizer.json"} <= files.keys()
    assert (form["repository"], form["revision"], form["files"]) == ("org/tiny", "main", len(files) - 1)
    assert form["bytes"] == sum(map(len, files.values()))
    code, form = pushed(hub, artifact, "org/tiny", "--revision", "w8")
    assert (code, form["revision"]) == (0, "w8")
    assert hub.repositories["org/tiny"]["w8"] == files
    hub.repositories["org/tiny"]["main"]["model.onnx.data"] = b"old"
    code, form = pushed(hub, artifact, "org/tiny")
    assert (code, "org/tiny at main holds model.onnx.data, which the artifact has not" in form["error"]) == (2, True)


def test_nothing_is_uploaded_that_is_not_as_it_was_written(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    code, form = pushed(hub, tmp_path, "org/tiny")
    assert (code, "is no artifact" in form["error"]) == (2, True)
    whole = (artifact / "config.json").read_bytes()
    (artifact / "config.json").write_bytes(whole + b" ")
    code, form = pushed(hub, artifact, "org/tiny")
    (artifact / "config.json").write_bytes(whole)
    assert (code, "config.json" in form["error"]) == (1, True)
    assert hub.repositories == {}


def test_who_may_not_write_is_told_what_to_do(hub: Hub, artifact: Path) -> None:
    code, form = pushed(hub, artifact, "org/tiny", token="hf_wrong")
    assert (code, "hf auth login" in form["error"]) == (2, True), form
    code, form = pushed(hub, artifact, "a/b/c")
    assert (code, form["error"]) == (2, "'a/b/c' is no name of a repository; it is ORG/NAME")

"""A model from a repository of the hub, over real HTTP from a stand-in hub on loopback (the real one is not reachable here)."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from paris_ray.inference.hub import open_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"num_experts": 2}',
    "expert_0/diffusion_pytorch_model.safetensors": b"weights of expert 0",
    "tokenizer/merges.txt": b"a b",
    "README.md": b"card",
    "pytorch_model.bin": b"a pickle",
    "modeling.py": b"raise SystemExit('code of a repository ran')",
}


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks for: a revision's commit, the tree of it, and files with their checksums."""

    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        path = self.path.split("?")[0]
        self.asked.append(f"{self.command} {path}")
        if re.match(r"/(api/models/)?some/gated", path):
            return self._answer(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this repository is restricted"}, body)
        if path in ("/api/models/some/paris/revision/main", "/api/models/some/paris", "/api/models/some/paris/revision/v2"):
            siblings = [{"rfilename": name} for name in FILES]
            return self._json({"id": "some/paris", "sha": COMMIT, "siblings": siblings}, body)
        if path == f"/api/models/some/paris/tree/{COMMIT}":
            entries = [{"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for n, c in FILES.items()]
            return self._json(entries, body)
        prefix = f"/some/paris/resolve/{COMMIT}/"
        if path.startswith(prefix) and path.removeprefix(prefix) in FILES:
            content = FILES[path.removeprefix(prefix)]
            return self._answer(200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}, body)
        return self._answer(404, b"", {"X-Error-Code": "RepoNotFound"}, body)

    def _json(self, value: object, body: bool) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, body)

    def _answer(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.asked = []
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    yield {**clean, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    server.shutdown()


def opened(name: str, env: dict[str, str], cwd: Path) -> str:
    """In a process of its own: the hub's address is read when its library is imported."""
    code = f"from paris_ray.inference.hub import open_model\ntry: print(open_model({name!r}).uri)\nexcept FileNotFoundError as e: print(e)"
    env = {**env, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=cwd, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.strip().splitlines()[-1]


def test_a_repository_is_fetched_once_and_only_what_a_model_is_made_of(hub: dict[str, str], tmp_path: Path) -> None:
    folder = Path(opened("some/paris", hub, tmp_path))
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {name: content for name, content in FILES.items() if name not in ("pytorch_model.bin", "modeling.py")}
    # As a model's folder lists it, through the links of the hub's cache.
    assert {entry.name for entry in open_model(folder).files(recursive=True)} == set(found)

    before = [line for line in Hub.asked if line.startswith("GET /some")]
    assert opened("some/paris@v2", hub, tmp_path) == str(folder)
    assert [line for line in Hub.asked if line.startswith("GET /some")] == before  # nothing is fetched twice
    assert opened("some/paris", {**hub, "HF_HUB_OFFLINE": "1"}, tmp_path) == str(folder)


def test_what_cannot_be_had_is_said_with_the_remedy(hub: dict[str, str], tmp_path: Path) -> None:
    assert "accept its terms on its page, then log in" in opened("some/gated", hub, tmp_path)
    assert "no such repository, or it is private" in opened("some/other", hub, tmp_path)
    offline = opened("some/paris", {**hub, "HF_HUB_OFFLINE": "1"}, tmp_path)
    assert offline.startswith("model: some/paris is no folder here")
    unreachable = opened("some/paris", {**hub, "HF_ENDPOINT": "http://127.0.0.1:9"}, tmp_path)
    assert unreachable.startswith("model: some/paris is no folder here")


def test_a_folder_goes_before_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some/paris").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert open_model("some/paris").uri == str(tmp_path / "some/paris")
    # What cannot be a repository's name stays a path.
    assert open_model("a/b/c").uri == str(tmp_path / "a/b/c")
    assert open_model("nowhere").uri == str(tmp_path / "nowhere")

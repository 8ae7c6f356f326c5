"""A model from a repository of the hub, over real HTTP from a stand-in hub on loopback (the real one is not reachable here)."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import tiny_model

from paris_ray.hub import Snapshot, address, open_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"num_experts": 2}',
    "router/pytorch_model.safetensors": b"weights of the router",
    "expert_0/config.json": b'{"expert_id": 0}',
    "expert_0/diffusion_pytorch_model.safetensors": b"weights of expert 0",
    "expert_1/config.json": b'{"expert_id": 1}',
    "expert_1/diffusion_pytorch_model.safetensors": b"weights of expert 1",
    "expert_1/pytorch_model.bin": b"a pickle",
    "tokenizer/merges.txt": b"a b",
    "README.md": b"card",
    "pytorch_model.bin": b"a pickle",
    "modeling.py": b"raise SystemExit('code of a repository ran')",
}


EXPERT_WEIGHTS = {name for name in FILES if name.startswith("expert") and name.endswith("safetensors")}
REFUSED = {name for name in FILES if name.endswith((".bin", ".py"))}


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks for: a revision's commit, the tree of it, and files with their checksums."""

    asked: ClassVar[list[str]] = []
    files: ClassVar[dict[str, bytes]] = FILES

    @classmethod
    def fetched(cls) -> set[str]:
        """The files asked for since the last time."""
        found = {line.partition(COMMIT + "/")[2] for line in cls.asked if line.startswith("GET /some/paris/resolve/")}
        cls.asked.clear()
        return found

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        path = self.path.split("?")[0]
        self.asked.append(f"{self.command} {path}")
        if re.match(r"/(api/models/)?some/gated", path):
            return self._answer(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this repository is restricted"}, body)
        if path in ("/api/models/some/paris/revision/main", "/api/models/some/paris", "/api/models/some/paris/revision/v2"):
            siblings = [{"rfilename": name} for name in self.files]
            return self._json({"id": "some/paris", "sha": COMMIT, "siblings": siblings}, body)
        if path == f"/api/models/some/paris/tree/{COMMIT}":
            entries = [{"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for n, c in self.files.items()]
            return self._json(entries, body)
        prefix = f"/some/paris/resolve/{COMMIT}/"
        if path.startswith(prefix) and path.removeprefix(prefix) in self.files:
            content = self.files[path.removeprefix(prefix)]
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
    Hub.asked, Hub.files = [], FILES
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    yield {**clean, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    server.shutdown()


def answered(expression: str, env: dict[str, str], cwd: Path, module: str = "paris_ray.hub") -> str:
    """In a process of its own: the hub's address is read when its library is imported."""
    code = f"""
from {module} import *
try:
    print(({expression}))
except FileNotFoundError as error:
    print(error)
"""
    env = {**env, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=cwd, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.strip().splitlines()[-1]


def opened(name: str, env: dict[str, str], cwd: Path) -> str:
    return answered(f"open_model({name!r}).uri", env, cwd)


def test_a_repository_is_fetched_once_and_only_what_a_model_is_made_of(hub: dict[str, str], tmp_path: Path) -> None:
    folder = Path(opened("some/paris", hub, tmp_path))
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {name: content for name, content in FILES.items() if name not in REFUSED | EXPERT_WEIGHTS}
    # As a model's folder lists it, through the links of the hub's cache.
    assert {entry.name for entry in open_model(folder).files(recursive=True)} == set(found)

    assert Hub.fetched() == set(found)
    assert opened("some/paris@v2", hub, tmp_path) == str(folder)
    assert Hub.fetched() == set()  # nothing is fetched twice
    assert opened("some/paris", {**hub, "HF_HUB_OFFLINE": "1"}, tmp_path) == str(folder)


def test_the_weights_of_an_expert_are_fetched_when_they_are_read(hub: dict[str, str], tmp_path: Path) -> None:
    configs = {name for name in FILES if name.endswith((".json", ".txt", ".md"))}
    assert answered("address(open_model('some/paris', configs_only=True))", hub, tmp_path) == f"some/paris@{COMMIT}"
    assert Hub.fetched() == configs
    read = f"(open_model('some/paris@{COMMIT}') / 'expert_1').read_bytes('diffusion_pytorch_model.safetensors')"
    assert answered(read, hub, tmp_path) == "b'weights of expert 1'"
    # The router's are everybody's; of the experts only the one that was read, and of it no pickle.
    assert Hub.fetched() == {"router/pytorch_model.safetensors", "expert_1/diffusion_pytorch_model.safetensors"}
    # Again, it is there, and nobody is asked.
    assert answered(read, {**hub, "HF_HUB_OFFLINE": "1"}, tmp_path) == "b'weights of expert 1'"
    absent = answered(read.replace("expert_1", "expert_0"), {**hub, "HF_HUB_OFFLINE": "1"}, tmp_path)
    assert absent.startswith(f"model: some/paris@{COMMIT} is no folder here, and as a repository of the Hugging Face hub: the hub could not be asked")


def test_a_process_with_one_expert_fetches_one(hub: dict[str, str], tmp_path: Path) -> None:
    """As a process of serving does that holds some of the experts: a model of four, one of which is not trained yet."""
    info = tiny_model.write_model(tmp_path / "model")
    (tmp_path / "model/paris.json").write_text(json.dumps({**info, "text": {"kind": "stand-in", "width": tiny_model.WIDTH}}))
    shutil.rmtree(tmp_path / "model/expert_2")
    Hub.files = {str(path.relative_to(tmp_path / "model")): path.read_bytes() for path in (tmp_path / "model").rglob("*") if path.is_file()}
    names = set(Hub.files)
    present, total = answered(
        "(files := open_experts('some/paris')).present, sum(float(p.double().sum()) for p in files.load_expert(1)[0].parameters())",
        hub, tmp_path, module="paris_ray.inference.weights",
    ).strip("()").rsplit(", ", 1)  # fmt: skip
    assert present == "[True, True, False, True]"
    assert float(total) == pytest.approx(sum(float(p.detach().double().sum()) for p in tiny_model.dit(tiny_model.SHAPES[1], 11).parameters()))
    # Not the router's weights either, which it does not run.
    assert Hub.fetched() == {*(name for name in names if name.endswith(".json")), "expert_1/diffusion_pytorch_model.safetensors"}


def test_a_snapshot_goes_to_another_process_by_its_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    (tmp_path / COMMIT).mkdir()
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *names, **options: asked.append((*names, options)) or str(tmp_path / COMMIT))
    folder = open_model("some/paris", token="secret")
    assert isinstance(folder, Snapshot)
    assert address(folder) == f"some/paris@{COMMIT}"
    assert b"secret" not in pickle.dumps(folder)
    assert address(pickle.loads(pickle.dumps(folder))) == address(folder)
    assert pickle.loads(pickle.dumps(folder / "expert_1")).uri == str(tmp_path / COMMIT / "expert_1")
    assert [(one[0], one[1]["revision"]) for one in asked] == [("some/paris", None), ("some/paris", COMMIT), ("some/paris", COMMIT)]
    assert open_model(folder) is folder
    # What is in the cache is read from there, however often an expert comes and goes.
    (tmp_path / COMMIT / "expert_3").mkdir()
    (tmp_path / COMMIT / "expert_3/diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    asked.clear()
    for part, name in ((folder / "expert_3", ""), (folder, "expert_3/")):
        assert part.read_bytes(f"{name}diffusion_pytorch_model.safetensors") == b"weights"
        assert part.exists(f"{name}config.json") is False
    assert not asked
    # Of what is not, the first to read it does, from the same commit, and from no other expert.
    for part, name in ((folder / "expert_4", ""), (folder, "expert_4/")):
        assert not part.exists(f"{name}diffusion_pytorch_model.safetensors")
    assert [one[1]["revision"] for one in asked] == [COMMIT] * 2
    assert {pattern.split("/")[0] for one in asked for pattern in one[1]["allow_patterns"]} == {"expert_4"}
    with pytest.raises(ValueError, match="leaves the folder"):
        folder / "../other"
    assert address(open_model(tmp_path)) == str(tmp_path)


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

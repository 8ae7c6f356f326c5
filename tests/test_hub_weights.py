"""Weights to start from, of a repository of the hub, over real HTTP from a stand-in hub on loopback (the real one is not reachable here)."""

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
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save

from paris_ray import stages

sys.path.insert(0, str(Path(__file__).parent / "training"))
import fake_training_run as fake

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PARIS = {
    "config.json": b'{"num_experts": 2}',
    "expert_0/diffusion_pytorch_model.safetensors": b"weights of expert 0",
    "tokenizer/merges.txt": b"a b",
    "README.md": b"card",
    "pytorch_model.bin": b"a pickle",
    "modeling.py": b"raise SystemExit('code of a repository ran')",
}
PIXART = {
    "model_index.json": b"{}",
    "transformer/config.json": b'{"num_attention_heads": 2}',
    "transformer/diffusion_pytorch_model.safetensors": save({"w": torch.arange(1 << 16).float()}),
    "transformer/diffusion_pytorch_model.bin": b"a pickle",
    "transformer/old/diffusion_pytorch_model.safetensors": b"older weights",
    "text_encoder/model.safetensors": b"19 GB of text encoder",
}
REPOSITORIES = {"some/paris": PARIS, "some/pixart": PIXART}


def tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict[str, object]]:
    """Files below a folder of a repository, and where they are not asked for at any depth, the folders directly inside."""
    inside = {name: content for name, content in files.items() if name.startswith(folder + "/" if folder else "")}
    start = len(folder) + 1 if folder else 0
    direct = {name for name in inside if "/" not in name[start:]}
    found = inside if recursive else {name: inside[name] for name in direct}
    entries = [{"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for n, c in found.items()]
    folders = sorted({name[: name.index("/", start)] for name in inside.keys() - direct})
    return entries + [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in folders]


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
        for name, files in REPOSITORIES.items():
            if path in (f"/api/models/{name}/revision/main", f"/api/models/{name}", f"/api/models/{name}/revision/v2"):
                return self._json({"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}, body)
            if match := re.fullmatch(rf"/api/models/{name}/tree/({COMMIT}|main)(?:/(.*))?", path):
                return self._json(tree(files, match[2] or "", recursive="recursive=true" in self.path.lower()), body)
            if (match := re.fullmatch(rf"/{name}/resolve/({COMMIT}|main)/(.*)", path)) and match[2] in files:
                return self._file(files[match[2]], body)
        return self._answer(404, b"", {"X-Error-Code": "RepoNotFound"}, body)

    def _file(self, content: bytes, body: bool) -> None:
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        if match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or ""):
            first, last = int(match[1]), min(int(match[2]), len(content) - 1)
            return self._answer(206, content[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}, body)
        return self._answer(200, content, headers, body)

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


def run(code: str, env: dict[str, str], cwd: Path) -> str:
    """The last line that code prints in a process of its own: the hub's address is read when its library is imported."""
    env = {**env, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=cwd, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.strip().splitlines()[-1]


# -- weights to start from ----------------------------------------------------------------------------------------------

LOOK = """
import json, sys
from paris_ray import hub
found = []
for how, source in json.loads(sys.argv[1]):
    try:
        folder, names = getattr(hub, how)(source)
        found.append([folder.uri, names, [folder.sketch(name) for name in names]])
    except FileNotFoundError as error:
        found.append(str(error))
print(json.dumps(found))
"""


def looked(env: dict[str, str], cwd: Path, *calls: tuple[str, str]) -> list[Any]:
    return json.loads(run(f"import sys\nsys.argv.append({json.dumps(calls)!r})\n{LOOK}", env, cwd))


def test_weights_of_a_repository_are_told_apart_without_fetching_them_and_then_fetched(hub: dict[str, str], tmp_path: Path) -> None:
    local, name, source = tmp_path / "a" / "b", "diffusion_pytorch_model.safetensors", "some/pixart/transformer"
    local.mkdir(parents=True)
    (local / name).write_bytes(PIXART[f"transformer/{name}"])
    calls = [("weights_here", source), ("weights_there", source), ("weights_there", str(local)), ("weights_fetched", f"{source}@v2")]
    here, there, copy, fetched = looked(hub, tmp_path, *calls)
    assert here[1] == []
    assert there[:2] == [f"hf://{source}", [name]]
    # The same content is the same, wherever it lies.
    assert there[2] == copy[2] == fetched[2]
    folder = Path(fetched[0])
    assert sorted(path.name for path in folder.parent.rglob("*") if path.is_file()) == ["config.json", name]
    assert (folder / name).read_bytes() == PIXART[f"transformer/{name}"]
    # From then on, from the cache.
    asked = list(Hub.asked)
    assert looked(hub, tmp_path, ("weights_here", f"{source}@v2"), ("weights_there", f"{source}@v2")) == [fetched, fetched]
    assert Hub.asked == asked
    assert looked({**hub, "HF_HUB_OFFLINE": "1"}, tmp_path, ("weights_fetched", f"{source}@v2")) == [fetched]


def test_weights_that_cannot_be_had_are_said_with_the_remedy(hub: dict[str, str], tmp_path: Path) -> None:
    names = ("some/pixart", "some/paris/tokenizer", "some/gated", "some/other")
    messages = looked(hub, tmp_path, *[(how, name) for name in names for how in ("weights_there", "weights_fetched")])
    assert messages[::2] == messages[1::2]
    top, folder, gated, other = messages[::2]
    assert (
        "some/pixart of the Hugging Face hub has no safetensors outside its folders; name the folder that has, such as some/pixart/transformer" in top
    )
    assert "no safetensors in its folder tokenizer" in folder
    assert gated.startswith("init_from: some/gated is no folder here")
    assert "accept its terms" in gated
    assert "no such repository" in other


def test_a_stage_depends_on_the_content_of_a_repository_until_it_has_started(
    hub: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planned without fetching; once started, the hub may be gone; a copy on disk is the same."""
    source = "some/pixart/transformer"
    fake.make_run(tmp_path / "run")
    config = fake.make_config(tmp_path / "run", experts__0__init_from=source)
    code = f"""
from paris_ray import config, stages
print(stages.stage(config.load("tiny", ["run_dir={tmp_path}/run", "experts.0.init_from={source}"]), "expert-0").begin().state)
"""
    assert run(code, hub, tmp_path) == "absent"
    assert not list((tmp_path / "hf").rglob("*.safetensors"))
    monkeypatch.chdir(tmp_path)
    assert stages.status(config, "expert-0").state == "partial"  # this process has no hub
    (tmp_path / source).mkdir(parents=True)
    copy = tmp_path / source / "diffusion_pytorch_model.safetensors"
    copy.write_bytes(PIXART["transformer/diffusion_pytorch_model.safetensors"])
    assert stages.status(config, "expert-0").state == "partial"
    copy.write_bytes(PIXART["transformer/old/diffusion_pytorch_model.safetensors"])
    assert stages.status(config, "expert-0").state == "stale"

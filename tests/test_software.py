"""What results say they were made with."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import torch

from paris_ray import software as module
from paris_ray.manifest import Stage
from paris_ray.software import commit, software
from paris_ray.storage import Folder


def test_versions_and_processor_are_said() -> None:
    found = software()
    assert found["torch"] == importlib.metadata.version("torch")
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    assert not names or found["cpu"] == names[0]


def test_the_commit_of_a_checkout_is_said_and_whether_it_is_changed(tmp_path) -> None:
    package = tmp_path / "paris_ray"
    package.mkdir()
    (package / "software.py").write_text("a = 1\n")
    (tmp_path / "notes.md").write_text("of another folder\n")

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], capture_output=True, text=True, check=True).stdout.strip()

    assert commit(str(package)) == ""
    git("init", "-q")
    git("add", "notes.md")
    git("commit", "-qm", "without the package")
    assert commit(str(package)) == ""  # as one that is installed below a checkout
    git("add", ".")
    git("commit", "-qm", "with it")
    head = git("rev-parse", "HEAD")
    assert commit(str(package)) == head
    (tmp_path / "notes.md").write_text("changed\n")
    assert commit(str(package)) == head
    (package / "another.py").write_text("b = 2\n")
    assert commit(str(package)) == f"{head} with changes"


def test_the_commit_is_no_part_of_what_makes_anything_stale(tmp_path, monkeypatch) -> None:
    def published(version: str) -> dict[str, object]:
        monkeypatch.setattr(module, "_found", lambda: {"commit": version})
        stage = Stage("a", Folder(str(tmp_path / version)), {"x": 1}, {})
        stage.begin()
        stage.folder.write_bytes("file", b"the same")
        return stage.publish()

    first, second = published("one"), published("two")
    assert first["software"] != second["software"]
    assert first["fingerprint"] == second["fingerprint"]
    monkeypatch.setattr(module, "_found", lambda: {"commit": "three"})
    assert Stage("a", Folder(str(tmp_path / "one")), {"x": 1}, {}).begin().state == "valid"


def test_the_gpu_is_said_by_who_has_used_one(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert "gpu" not in software()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert software()["gpu"] == "a GPU"


def test_torch_is_not_imported_for_it() -> None:
    said = "import sys; from paris_ray.software import software; software(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True).stdout == "False\n"

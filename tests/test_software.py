"""What results say they were made with."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import torch

from paris_ray.software import software


def test_versions_and_processor_are_said() -> None:
    found = software()
    assert found["torch"] == importlib.metadata.version("torch")
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    assert not names or found["cpu"] == names[0]


def test_the_gpu_is_said_by_who_has_used_one(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert "gpu" not in software()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert software()["gpu"] == "a GPU"


def test_torch_is_not_imported_for_it() -> None:
    said = "import sys; from paris_ray.software import software; software(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True).stdout == "False\n"

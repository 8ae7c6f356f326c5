"""What a result was made with: versions and hardware that can change it. It is told, and nothing becomes stale by it."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
import sys


def software() -> dict[str, str]:
    """Versions that can change a result, and the hardware: the processor, and the GPU where this process has used one.

    Of a package that lies in a git checkout, its commit as it was when this was asked first, and whether the package differs from it.
    """
    return {**_found(), **({} if (gpu := _gpu()) is None else {"gpu": gpu})}


@functools.cache
def _found() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": platform.machine()}
    if processor := _processor():
        found["cpu"] = processor
    for package in ("paris_ray", "ray", "torch", "numpy", "pyarrow"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if said := commit(os.path.dirname(os.path.abspath(__file__))):
        found["commit"] = said
    return found


def commit(package: str) -> str:
    """The commit of the checkout that has a package's ``software.py``, and ``with changes`` where files of the package differ; empty: there is none.

    Args:
        package: its folder.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "--no-optional-locks", "-C", package, *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout

    try:
        found = git("rev-parse", "HEAD", "HEAD:./software.py").split()[0]  # a package below somebody else's checkout is not in its HEAD
        return found + (" with changes" if git("status", "--porcelain", "--", ".").strip() else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _processor() -> str:
    """The processor's name; empty where the system does not say."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def _gpu() -> str | None:
    """Torch is not imported for it: who has not imported it has used none."""
    torch = sys.modules.get("torch")
    return str(torch.cuda.get_device_name()) if torch is not None and torch.cuda.is_initialized() else None

"""What a result was made with: versions and hardware that can change it."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import sys


def software() -> dict[str, str]:
    """Versions that can change a result, and the hardware: the processor, and the GPU where this process has used one."""
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
    return found


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

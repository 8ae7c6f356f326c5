"""Checkpoints that can be trusted, and metrics without gaps or doubles.

::

    checkpoints/images-000004800/{model,ema,optimizer}.safetensors, state.json, _manifest.json (written last: size and checksum of each file)
    metrics/images-000004800.jsonl      the metrics lines between the checkpoint before and this one

A metrics part belongs to the checkpoint of its name and is written before that checkpoint's manifest. Who resumes from a checkpoint deletes
the parts after it and writes them again. So the parts in order are the metrics of one undisturbed run, even where checkpoints have been
deleted since.

Imports torch only to write and read tensors: reports read metrics without it.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paris_ray import manifest
from paris_ray.storage import Folder

if TYPE_CHECKING:
    from torch import Tensor

CHECKPOINTS, METRICS = "checkpoints", "metrics"
PROBE = "_probe.safetensors"
FORMAT = 1


def _name(images: int) -> str:
    return f"images-{images:09d}"


def _images(name: str) -> int | None:
    digits = name.removeprefix("images-").removesuffix(".jsonl")
    return int(digits) if name.startswith("images-") and digits.isdecimal() else None


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint: its folder, the images trained on, and ``state.json``."""

    folder: Folder
    images: int
    state: dict[str, Any]

    def tensors(self, part: str) -> dict[str, Tensor]:
        """The tensors of ``model``, ``ema`` or ``optimizer``, on the CPU."""
        return read_tensors(self.folder, f"{part}.safetensors")


def save(stage: Folder, images: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], metrics: list[dict[str, Any]]) -> None:
    """Write a checkpoint and the metrics part that belongs to it.

    Args:
        stage: the stage's folder (``RUN/experts/3``).
        images: images trained on.
        tensors: by part (``model``, ``ema``, ``optimizer``), tensors by name.
        state: what else a resume needs, as JSON.
        metrics: the lines since the checkpoint before.
    """
    lines = "".join(json.dumps(line, allow_nan=False) + "\n" for line in metrics)
    (stage / METRICS).write_bytes(f"{_name(images)}.jsonl", lines.encode())
    folder = stage / CHECKPOINTS / _name(images)
    folder.delete_all()  # a damaged one that was passed over, or an unfinished one
    files = []

    def write(name: str, content: bytes) -> None:
        folder.write_bytes(name, content)
        files.append({"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})

    for part, named in tensors.items():  # one after the other: together they are four times the network
        write(f"{part}.safetensors", tensor_bytes(named))
    write("state.json", json.dumps({"format": FORMAT, "images": images, **state}, indent=1, sort_keys=True, allow_nan=False).encode())
    folder.write_json(manifest.MANIFEST, {"format": FORMAT, "files": files})


def write_seconds(folder: Folder, weights: dict[str, Tensor]) -> float:
    """Measured: how long a checkpoint of a network takes, four times what its weights alone take to be serialised, summed and written."""
    began = time.monotonic()
    content = tensor_bytes(weights)
    hashlib.sha256(content).hexdigest()
    try:
        folder.write_bytes(PROBE, content)
        return 4 * (time.monotonic() - began)
    finally:
        folder.delete(PROBE)


def latest(stage: Folder) -> Checkpoint | None:
    """The newest checkpoint whose files are all there with the checksums of its manifest; ``None`` if there is none.

    One that is unfinished or damaged is passed over with a warning that names it and says why.
    """
    root = stage / CHECKPOINTS
    for _, name in sorted(((count, n) for n in root.folders() if (count := _images(n)) is not None), reverse=True):
        folder = root / name
        try:
            written = folder.read_json(manifest.MANIFEST)
            broken = manifest.damage(folder, written, verify=True)
            state = {} if broken else folder.read_json("state.json")
            if not broken and state["format"] != FORMAT:
                broken = [f"state.json has format {state['format']}, this version reads {FORMAT}"]
        except FileNotFoundError:
            broken = ["it was not finished: it has no manifest"]
        except (ValueError, KeyError, TypeError) as error:
            broken = [f"its manifest cannot be read: {error!r}"]
        if not broken:
            return Checkpoint(folder, int(state["images"]), state)
        why = "; ".join(broken)
        warnings.warn(f"checkpoint {folder.uri} is passed over: {why}. Training goes on from the one before.", RuntimeWarning, stacklevel=2)
    return None


def prune(stage: Folder, keep: int, images: int) -> None:
    """Delete all but the ``keep`` newest checkpoints up to ``images``, where training is; their metrics stay.

    Those past it are unfinished or damaged ones that were passed over: counted as the newest, they would cost a good one its place.
    """
    root = stage / CHECKPOINTS
    found = sorted((count, name) for name in root.folders() if (count := _images(name)) is not None)
    kept = [name for count, name in found if count <= images][-keep:]
    for _, name in found:
        if name not in kept:
            (root / name).delete_all()


def forget_metrics_after(stage: Folder, images: int) -> None:
    """Delete the metrics parts past a checkpoint: a run that resumes there writes them again."""
    for entry in (stage / METRICS).files():
        if (_images(entry.name) or 0) > images:
            (stage / METRICS).delete(entry.name)


def read_metrics(stage: Folder) -> list[dict[str, Any]]:
    """All metrics lines of a stage's folder (``RUN/experts/3``, ``RUN/router``), in the order of ``images``."""
    parts = sorted((count, entry.name) for entry in (stage / METRICS).files() if (count := _images(entry.name)) is not None)
    return [json.loads(line) for _, name in parts for line in (stage / METRICS).read_bytes(name).decode().splitlines()]


def tensor_bytes(tensors: dict[str, Tensor]) -> bytes:
    """Tensors as the content of a safetensors file; equal tensors give equal bytes."""
    from safetensors.torch import save

    # One key at most: safetensors writes metadata in the order of a hash map, which differs from process to process.
    return save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata={"format": "pt"})


def read_tensors(folder: Folder, name: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU."""
    from safetensors.torch import load

    return load(folder.read_bytes(name))

"""Pixels to files: PNG with its provenance inside, JPEG and WebP without."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from serve_app.cards import ModelCard
from serve_app.work import Job, Picture


def encode(picture: Picture, output_format: str, job: Job, card: ModelCard, degraded: tuple[int, ...]) -> bytes:
    """The picture as a file.

    A PNG carries two text chunks: ``parameters``, in the words that image tools read, and ``routing``, JSON that says which expert did what.
    """
    info = PngInfo()
    # A text chunk ends at a NUL.
    info.add_text("parameters", parameters(picture, job, card).replace("\0", "\ufffd"))
    info.add_text("routing", json.dumps(provenance(picture, job, card, degraded)))
    return to_file(picture.pixels, output_format, info)


def to_file(pixels: NDArray[np.uint8], output_format: str, info: PngInfo | None = None) -> bytes:
    """Pixels (H, W, 3) as a file; the text chunks go into a PNG only."""
    image = Image.fromarray(pixels)
    file = io.BytesIO()
    if output_format == "png":
        image.save(file, "PNG", pnginfo=info)
    elif output_format == "jpeg":
        # Small pictures: full colour resolution.
        image.save(file, "JPEG", quality=95, subsampling=0)
    else:
        image.save(file, "WEBP", lossless=True)
    return file.getvalue()


def parameters(picture: Picture, job: Job, card: ModelCard) -> str:
    """What the picture was made from, in the customary form of ``parameters`` chunks."""
    negative = f"\nNegative prompt: {job.negative_prompt}" if job.negative_prompt else ""
    low, high = job.guidance_interval
    interval = "" if (low, high) == (0.0, 1.0) else f"CFG interval: {low:g} to {high:g}, "
    return (
        f"{job.prompt}{negative}\nSteps: {job.steps}, Sampler: {job.solver}, CFG scale: {job.guidance_scale:g}, {interval}"
        f"Seed: {job.seed}, Index: {picture.index}, Size: {card.size}, "
        f"Routing: {job.routing}, Model hash: {card.fingerprint or 'unknown'}, Model: {card.id}"
    )


def provenance(picture: Picture, job: Job, card: ModelCard, degraded: tuple[int, ...]) -> dict[str, Any]:
    """Which expert did what, and which experts they were."""
    return {
        "model": card.id,
        "fingerprint": card.fingerprint,
        "routing": job.routing,
        "degraded": list(degraded),
        "changed": picture.changed,
        "experts": [
            {"index": e.index, "objective": e.objective, "fingerprint": ", then ".join(picture.versions.get(e.index, ())) or e.fingerprint}
            for e in card.experts
        ],
        "steps": picture.routing(),
    }

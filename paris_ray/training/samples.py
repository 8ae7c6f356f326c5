"""Grids of samples from one expert alone, so that people can look while it trains."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from paris_ray import rng
from paris_ray.diffusion.ensemble import Conditioning
from paris_ray.diffusion.path import as_velocity
from paris_ray.diffusion.sampler import guided, initial_noise, sample, time_grid

if TYPE_CHECKING:
    from paris_ray.training.expert_task import ExpertTask

COLUMNS = 8
MARGIN = 2


@torch.no_grad()
def write_grid(task: ExpertTask, images: int) -> None:
    """Write ``samples/images-….png``: above, rows of the shard as the codec returns them; below, samples from their captions.

    Rows and noises are the same every time. Guidance, steps and solver are the config's for sampling.
    """
    n = min(COLUMNS, len(task.train))
    rows = torch.arange(n) * len(task.train) // n
    codec = task.encoders.codec()
    real = codec.decode(task.train.latents[rows].float())
    made = codec.decode(_sample(task, rows).float().cpu())
    (task.folder / "samples").write_bytes(f"images-{images:09d}.png", _png([real, made]))


def _sample(task: ExpertTask, rows: Tensor) -> Tensor:
    """Latents sampled from the captions of some rows: (n, C, H, W)."""
    settings, device, n = task.config.sampling, task.device, len(rows)
    data = task.train.take(rows)
    batch = {"dropped": torch.zeros(n, dtype=torch.bool)}
    if data.text is not None:
        batch["text"] = data.text
    else:
        assert data.token_ids is not None
        batch |= {"token_ids": data.token_ids, "text_len": data.text_len}
    text = task.text({name: tensor.to(device) for name, tensor in batch.items()})
    noise = torch.stack([initial_noise(rng.key(task.config.seed, "samples"), i, task.shape) for i in range(n)]).to(device)
    guidance, expert = torch.full((n,), settings.guidance_scale), as_velocity(task.model, task.objective)
    cond = Conditioning(text, text[:, 0], task.null.expand_as(text), guidance, tuple(data.ids), ("",) * n)
    return sample(lambda x, t: guided(expert, x, t, cond), noise, time_grid(settings.steps, settings.solver), settings.solver)


def _png(rows: list[np.ndarray]) -> bytes:
    """Rows of pictures, each (n, H, W, 3) uint8, as one PNG on white."""
    from PIL import Image

    n, height, width, _ = rows[0].shape
    sheet = np.full((len(rows) * (height + MARGIN) + MARGIN, n * (width + MARGIN) + MARGIN, 3), 255, np.uint8)
    for r, pictures in enumerate(rows):
        for c, picture in enumerate(pictures):
            top, left = MARGIN + r * (height + MARGIN), MARGIN + c * (width + MARGIN)
            sheet[top : top + height, left : left + width] = picture
    out = io.BytesIO()
    Image.fromarray(sheet).save(out, "PNG")
    return out.getvalue()

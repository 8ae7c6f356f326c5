"""What serving is compared with: other ways to put the same model behind Ray Serve. Not a benchmark itself.

``PlainLoop`` is what public ports of Paris do: one request at a time, and for each of its steps the router, the two best experts one after the other,
each with both branches of guidance in one call; texts are projected anew at every step. ``BatchedPipeline`` is a diffusers pipeline behind
``@serve.batch``: what waits together, with the same number of steps, is drawn together to its end.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from fastapi import FastAPI
from numpy.typing import NDArray
from pydantic import BaseModel
from ray import serve

from serve_app.pictures import to_file


class Asked(BaseModel):
    """The part of a request that matters here."""

    prompt: str
    seed: int
    num_inference_steps: int


class Loop:
    """One picture after another, in plain torch."""

    def __init__(self, path: str, threads: int):
        import torch

        from paris_ray.diffusion.path import as_velocity
        from paris_ray.inference.weights import load_model

        torch.set_num_threads(threads)
        self.model = load_model(path)
        self.experts = [as_velocity(*self.model.load_expert(k)) for k in range(self.model.num_experts)]

    def draw(self, prompt: str, seed: int, steps: int) -> NDArray[np.uint8]:
        """A picture (H, W, 3) by Euler steps, with the model's guidance and the two best experts of each."""
        import torch

        from paris_ray.diffusion.sampler import initial_noise, time_grid

        model, scale = self.model, float(self.model.defaults["guidance_scale"])
        with torch.inference_mode():
            ids, lengths = (torch.as_tensor(array) for array in model.text_encoder.tokenize([prompt]))
            states = model.text_encoder.encode(ids, lengths).float()
            pooled = model.text_encoder.pool(states, lengths).float()
            texts = torch.cat([states, model.null_text[None]])
            x = initial_noise(seed, 0, model.latent_shape)[None]
            for now, after in itertools.pairwise(time_grid(steps, "euler")):
                t = torch.tensor([now])
                p = model.router(x, t, pooled if model.router_reads_text else None).softmax(1)[0]
                best, chosen = p.topk(2)
                v = torch.zeros_like(x)
                for weight, k in zip(best / best.sum(), chosen.tolist(), strict=True):
                    with_text, without = self.experts[k](torch.cat([x, x]), torch.cat([t, t]), texts).split(1)
                    v += weight * (without + scale * (with_text - without))
                x = x + (after - now) * v
            image: NDArray[np.uint8] = model.codec.decode(x)[0]
            return image


def _application(draw: Callable[[Asked], Awaitable[NDArray[np.uint8]]]) -> FastAPI:
    app = FastAPI()

    @app.post("/v1/images/generations")
    async def generate(asked: Asked) -> dict[str, Any]:
        image = await draw(asked)
        return {"data": [{"b64_json": base64.b64encode(to_file(image, "png")).decode()}]}

    return app


@serve.deployment(max_ongoing_requests=256)
@serve.ingress()
class PlainLoop:
    """:class:`Loop` behind HTTP, one request at a time."""

    def __init__(self, path: str, threads: int):
        self.loop, self.turn = Loop(path, threads), threading.Lock()

    def _draw(self, asked: Asked) -> NDArray[np.uint8]:
        with self.turn:
            return self.loop.draw(asked.prompt, asked.seed, asked.num_inference_steps)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls this once in the replica."""
        return _application(lambda asked: asyncio.to_thread(self._draw, asked))


@serve.deployment(max_ongoing_requests=256)
@serve.ingress()
class BatchedPipeline:
    """:class:`ParisPipeline`, a diffusers pipeline, behind ``@serve.batch``."""

    def __init__(self, path: str, threads: int):
        from paris_ray.inference.pipeline import ParisPipeline

        self.pipeline = ParisPipeline.from_pretrained(path, threads=threads)

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.02)
    async def draw(self, asked: list[Asked]) -> list[NDArray[np.uint8]]:
        """Pictures; a call of the pipeline has one number of steps."""
        import torch

        images: dict[int, NDArray[np.uint8]] = {}
        for steps in sorted({one.num_inference_steps for one in asked}):
            rows = [n for n, one in enumerate(asked) if one.num_inference_steps == steps]
            generators = [torch.Generator().manual_seed(asked[n].seed) for n in rows]
            call = [asked[n].prompt for n in rows]
            answer = await asyncio.to_thread(
                self.pipeline, call, num_inference_steps=steps, generator=generators, routing="top-2", solver="euler", output_type="np"
            )
            images |= {n: (image * 255).round().astype(np.uint8) for n, image in zip(rows, answer.images, strict=True)}
        return [images[n] for n in range(len(asked))]

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls this once in the replica."""
        return _application(self.draw)

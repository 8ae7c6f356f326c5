"""The diffusers face of a model: ``ParisPipeline.from_pretrained(path)("a caption").images``. A thin adapter over the sampling engine."""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput

from paris_ray.diffusion.sampler import WHOLE_RANGE, evaluations
from paris_ray.inference.engine import Engine, ImageRequest, ImageResult
from paris_ray.inference.experts import LocalExperts
from paris_ray.inference.save import save_model
from paris_ray.inference.weights import ParisModel, load_model

PRECISION_OF = {None: "fp32", torch.float32: "fp32", torch.bfloat16: "bf16"}
OUTPUTS = ("pil", "np", "pt", "latent")


@dataclass
class ParisPipelineOutput(BaseOutput):
    """What a call returns; ``return_dict=False`` gives the same as a tuple.

    Attributes:
        images: PIL images; or (N, H, W, 3) float32 in [0, 1] (``np``); or a tensor (N, 3, H, W) in [0, 1] (``pt``) or of latents (N, C, h, w).
        routing: of each picture, per evaluation ``{"t": float, "weights": [K floats]}``.
        seeds: of each picture; with its place in the call they give it again.
        degraded: experts that were masked because they have no files.
    """

    images: Any
    routing: list[list[dict[str, Any]]]
    seeds: list[int]
    degraded: list[int]


class ParisPipeline(DiffusionPipeline):
    """Text to image with a Paris model, released or our own.

    Args:
        model: see :func:`paris_ray.inference.weights.load_model`.
        max_resident: experts in memory at once; ``None`` is as many as fit.
    """

    def __init__(self, model: ParisModel, max_resident: int | None = None):
        super().__init__()
        self.register_to_config(max_resident=max_resident)
        self._use(model, max_resident)

    def _use(self, model: ParisModel, max_resident: int | None) -> None:
        self.model, self.max_resident = model, max_resident
        self.engine = Engine(model, LocalExperts(model, lazy=True, max_resident=max_resident), max_queue=1 << 20)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        torch_dtype: torch.dtype | None = None,
        *,
        device: str = "cpu",
        precision: str | None = None,
        max_resident: int | None = None,
        ignore_tensors: Collection[str] = (),
        ignore_settings: Collection[str] = (),
        norm_eps: float | None = None,
    ) -> ParisPipeline:
        """Load a model; experts follow when they are first needed.

        Args:
            pretrained_model_name_or_path: folder, URI or repository of the hub (``owner/name``, ``owner/name@revision``), in the released layout.
            torch_dtype: float32 or bfloat16.
            device: torch device.
            precision: instead of ``torch_dtype``: ``fp32``, ``bf16`` or ``int8``.
            max_resident: experts in memory at once; ``None`` is as many as fit.
            ignore_tensors, ignore_settings, norm_eps: as of :func:`paris_ray.inference.weights.load_model`.

        Raises:
            FileNotFoundError, ValueError: as :func:`paris_ray.inference.weights.load_model`.
        """
        if torch_dtype not in PRECISION_OF:
            raise ValueError(f"torch_dtype: {torch_dtype} is not one of torch.float32, torch.bfloat16; for int8 pass precision='int8'")
        precision = precision or PRECISION_OF[torch_dtype]
        return cls(load_model(pretrained_model_name_or_path, device, precision, ignore_tensors, ignore_settings, norm_eps), max_resident)

    def save_pretrained(self, save_directory: str | os.PathLike[str], safe_serialization: bool = True, overwrite: bool = False) -> None:  # type: ignore[override]
        """Write the model in the released layout; see :func:`paris_ray.inference.save.save_model`."""
        if not safe_serialization:
            raise ValueError("safe_serialization: False is not supported; weights are written as safetensors only")
        save_model(self.model, save_directory, overwrite)

    # -- what diffusers asks of its modules ---------------------------------------------------------------------------------

    @property
    def components(self) -> dict[str, Any]:
        """The model, as ``ParisPipeline(**components)`` takes it."""
        return {"model": self.model, "max_resident": self.max_resident}

    @property
    def device(self) -> torch.device:
        """Where sampling runs."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the experts' weights, those that are not int8."""
        return torch.float32 if self.model.precision == "fp32" or (self.device.type == "cpu" and self.model.precision == "int8") else torch.bfloat16

    def to(self, *args: Any, **kwargs: Any) -> ParisPipeline:
        """Move to a device, change to float32 or bfloat16, or both; the model is read from its folder again.

        Raises:
            ValueError: another type.
        """
        given = [*args, *kwargs.values()]
        dtypes = [value for value in given if isinstance(value, torch.dtype)]
        devices = [value for value in given if isinstance(value, str | torch.device | int) and not isinstance(value, bool)]
        if any(dtype not in PRECISION_OF for dtype in dtypes):
            raise ValueError(f"dtype: {dtypes[0]} is not one of torch.float32, torch.bfloat16")
        precision = PRECISION_OF[dtypes[0]] if dtypes else self.model.precision
        device = torch.device(devices[0]) if devices else self.device
        if (device, precision) != (self.device, self.model.precision):
            old = self.model
            model = load_model(old.folder.uri, str(device), precision, old.ignore_tensors, old.ignore_settings, old.norm_eps)
            self._use(model, self.max_resident)
        return self

    def enable_model_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Keep one expert in memory at a time; the others are read when they are needed. Pictures stay the same."""
        self._use(self.model, 1)

    enable_sequential_cpu_offload = enable_model_cpu_offload

    # -- the call -----------------------------------------------------------------------------------------------------------

    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] = "",
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        seed: int | None = None,
        routing: str | None = None,
        solver: str | None = None,
        guidance_interval: tuple[float, float] = WHOLE_RANGE,
    ) -> ParisPipelineOutput | tuple[Any, ...]:
        """Draw pictures. What is ``None`` takes the model's default.

        Args:
            prompt: a caption, or several.
            height: the model's size in pixels, or ``None``; other sizes are refused.
            width: as ``height``.
            num_inference_steps: solver steps.
            guidance_scale: 1 (off) … 50.
            negative_prompt: what guidance leads away from; one for all prompts, or one each.
            num_images_per_prompt: pictures of each prompt.
            generator: seeds are drawn from it, so that it moves on from call to call; or one generator for each picture.
            output_type: ``pil``, ``np``, ``pt`` or ``latent``.
            return_dict: a :class:`ParisPipelineOutput`; otherwise a tuple of its fields.
            seed: instead of ``generator``: picture i of the call (prompt by prompt) is the engine's picture ``ImageRequest(seed, index=i)``.
            routing: ``top-k``, ``threshold``, ``full``, ``caption`` or ``expert-k``.
            solver: name of the solver.
            guidance_interval: lowest and highest time with guidance; see :class:`ImageRequest`.

        Raises:
            ValueError: an argument is not valid; names it.
        """
        requests = self._requests(prompt, negative_prompt, num_images_per_prompt, generator, seed)
        settings: dict[str, Any] = {
            "steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "routing": routing,
            "solver": solver,
            "guidance_interval": guidance_interval,
        }
        if output_type not in OUTPUTS:
            raise ValueError(f"output_type: {output_type!r} is not one of {', '.join(OUTPUTS)}")
        for name, value in (("height", height), ("width", width)):
            if value not in (None, self.model.image_size):
                raise ValueError(f"{name}: {value} is not served; this model makes pictures of {self.model.image_size} pixels only")
        valid = [self.engine.validate(ImageRequest(**request, **settings)) for request in requests]
        results = self._draw(valid)
        degraded = sorted({k for result in results for k in result.degraded})
        output = ParisPipelineOutput(_as(output_type, results), [r.routing for r in results], [r.seed for r in results], degraded)
        return output if return_dict else (output.images, output.routing, output.seeds, output.degraded)

    def _requests(self, prompt: Any, negative: Any, n: int, generator: Any, seed: int | None) -> list[dict[str, Any]]:
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        if not prompts or len(negatives) != len(prompts):
            raise ValueError(f"negative_prompt: {len(negatives)} for {len(prompts)} prompts; give one for all, or one for each")
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"num_images_per_prompt: {n!r} must be at least 1")
        count = len(prompts) * n
        if seed is not None and generator is not None:
            raise ValueError("seed and generator: give one of them")
        if generator is None or isinstance(generator, torch.Generator):
            first = seed if seed is not None else secrets.randbelow(2**48) if generator is None else _seed_from(generator)
            places = [(first, i) for i in range(count)]
        else:
            generators = list(generator)
            if len(generators) != count:
                raise ValueError(f"generator: {len(generators)} of them for {count} pictures; give one, or one for each picture")
            places = [(_seed_from(one), 0) for one in generators]
        return [
            {"prompt": prompts[i // n], "negative_prompt": negatives[i // n], "seed": picture_seed, "index": index}
            for i, (picture_seed, index) in enumerate(places)
        ]

    def _draw(self, requests: Sequence[ImageRequest]) -> list[ImageResult]:
        futures: list[Future[ImageResult]] = [self.engine.submit(request) for request in requests]
        total = sum(evaluations(str(request.solver), int(request.steps or 0)) for request in requests)
        before = seen = self.engine.metrics["evaluations"]
        with self.progress_bar(total=total) as bar:
            try:
                more = True
                while more:
                    more = self.engine.tick()
                    now = self.engine.metrics["evaluations"]
                    bar.update(min(now - before, total) - min(seen - before, total))
                    seen = now
            finally:
                for future in futures:
                    future.cancel()  # of an interrupted call, so that the next one does not draw them
        return [future.result() for future in futures]


def _seed_from(generator: torch.Generator) -> int:
    return int(torch.randint(2**48, (1,), generator=generator, device=generator.device))


def _as(output_type: str, results: Sequence[ImageResult]) -> Any:
    if output_type == "latent":
        return torch.stack([torch.from_numpy(result.latent) for result in results])
    pixels = np.stack([result.image for result in results])  # (N, H, W, 3)
    if output_type == "pil":
        from PIL import Image

        return [Image.fromarray(one) for one in pixels]
    scaled = pixels.astype(np.float32) / 255
    return scaled if output_type == "np" else torch.from_numpy(scaled).permute(0, 3, 1, 2)

"""The diffusers face of a model: ``ParisPipeline.from_pretrained(path)("a caption").images``. A thin adapter over the sampling engine."""

from __future__ import annotations

import os
import secrets
import threading
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor

from paris_ray.diffusion.sampler import WHOLE_RANGE, evaluations, time_grid
from paris_ray.hub import open_model
from paris_ray.inference.engine import ANY_NUMBER, Engine, ImageRequest, ImageResult
from paris_ray.inference.experts import LocalExperts
from paris_ray.inference.save import save_model
from paris_ray.inference.weights import ParisModel, load_model

PRECISION_OF = {None: "fp32", torch.float32: "fp32", torch.bfloat16: "bf16"}
OUTPUTS = ("pil", "np", "pt", "latent")

StepEnd = Callable[["ParisPipeline", int, float, dict[str, Any]], "dict[str, Any] | None"]
"""``callback_on_step_end``: the pipeline, the number of the step, its time and the tensors asked for → those to go on from."""


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
        threads: CPU threads of this process; ``None`` leaves them as they are.
        max_rows: pictures stepped at once.
    """

    _callback_tensor_inputs = ("latents",)

    def __init__(self, model: ParisModel, max_resident: int | None = None, threads: int | None = None, max_rows: int = 64):
        super().__init__()
        self.register_to_config(max_resident=max_resident, threads=threads, max_rows=max_rows)
        self.model, self.max_resident, self.threads, self.max_rows = model, max_resident, threads, max_rows
        self._engine: Engine | None = None
        self._interrupt = False
        self._drawing: int | None = None  # the thread whose call is at hand
        _ = self.engine  # says now what cannot be

    @property
    def engine(self) -> Engine:
        """What draws; after a move, one whose experts are yet to be loaded."""
        if self._engine is None:
            experts = LocalExperts(self.model, threads=self.threads, lazy=True, max_resident=self.max_resident)
            self._engine = Engine(self.model, experts, self.max_rows, ANY_NUMBER)
        return self._engine

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        torch_dtype: torch.dtype | None = None,
        *,
        device: str = "cpu",
        precision: str | None = None,
        max_resident: int | None = None,
        threads: int | None = None,
        max_rows: int = 64,
        ignore_tensors: Collection[str] = (),
        ignore_settings: Collection[str] = (),
        norm_eps: float | None = None,
        compile: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> ParisPipeline:
        """Load a model; experts follow when they are first needed.

        Args:
            pretrained_model_name_or_path: folder, URI or repository of the hub (``owner/name``, ``owner/name@revision``), in the released layout.
            torch_dtype: float32 or bfloat16.
            device: torch device.
            precision: instead of ``torch_dtype``: ``fp32``, ``bf16`` or ``int8``.
            max_resident: experts in memory at once; ``None`` is as many as fit.
            threads: CPU threads of this process; ``None`` leaves them as they are.
            max_rows: pictures stepped at once.
            ignore_tensors, ignore_settings, norm_eps, compile: as of :func:`paris_ray.inference.weights.load_model`.
            revision: of a repository of the hub; see :func:`paris_ray.hub.open_model`, also for the other three.
            token: for the hub.
            cache_dir: where what the hub sends is kept.
            local_files_only: ask no network.

        Raises:
            FileNotFoundError, ValueError: as :func:`paris_ray.inference.weights.load_model`.
        """
        if precision is not None and torch_dtype is not None:
            raise ValueError("precision and torch_dtype: give one of them")
        precision = precision or _precision_of("torch_dtype", torch_dtype)
        folder = open_model(pretrained_model_name_or_path, revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        return cls(load_model(folder, device, precision, ignore_tensors, ignore_settings, norm_eps, compile), max_resident, threads, max_rows)

    def save_pretrained(self, save_directory: str | os.PathLike[str], safe_serialization: bool = True, overwrite: bool = False) -> None:  # type: ignore[override]
        """Write the model in the released layout, weights as their files have them, whatever the precision; see ``save_model``."""
        if not safe_serialization:
            raise ValueError("safe_serialization: False is not supported; weights are written as safetensors only")
        save_model(self.model, save_directory, overwrite)

    # -- what diffusers asks of its modules ---------------------------------------------------------------------------------

    @property
    def components(self) -> dict[str, Any]:
        """The model, as ``ParisPipeline(**components)`` takes it."""
        return {"model": self.model, "max_resident": self.max_resident, "threads": self.threads, "max_rows": self.max_rows}

    @property
    def vae(self) -> Any:
        """The VAE; ``None`` if latents are another codec's."""
        return getattr(self.model.codec, "model", None)

    @property
    def text_encoder(self) -> Any:
        """The text tower."""
        return getattr(self.model.text_encoder, "model", None)

    @property
    def tokenizer(self) -> Any:
        """The text tower's tokenizer."""
        return getattr(self.model.text_encoder, "tokenizer", None)

    @property
    def interrupt(self) -> bool:
        """Set it, from a callback or another thread, and the call at hand ends after the step at hand with the pictures as they are then."""
        return self._interrupt

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        self._interrupt = value

    @property
    def device(self) -> torch.device:
        """Where sampling runs."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the experts' weights, those that are not int8."""
        return torch.float32 if self.model.precision == "fp32" or (self.device.type == "cpu" and self.model.precision == "int8") else torch.bfloat16

    def to(self, *args: Any, **kwargs: Any) -> ParisPipeline:
        """Move to a device, change to float32 or bfloat16, or both.

        Router, codec and text encoder are moved as they are; experts are read from their files again when they are next asked.

        Raises:
            ValueError: another type.
        """
        given = [*args, *kwargs.values()]
        dtypes = [value for value in given if isinstance(value, torch.dtype)]
        devices = [value for value in given if isinstance(value, str | torch.device | int) and not isinstance(value, bool)]
        model = self.model
        precision = _precision_of("dtype", dtypes[0]) if dtypes else model.precision
        device = _normal(devices[0] if devices else model.device)
        moves = device != _normal(model.device)
        if moves:
            self._engine = None  # experts make room first
            for part in (model.router, model.codec, model.text_encoder):
                part.to(str(device))
            model.null_text, model.device = model.null_text.to(device), device
        if moves or precision != model.precision:
            self._engine, model.precision = None, precision
        return self

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Compute on a GPU and keep one expert in its memory at a time; the others are read when they are needed. Pictures stay the same.

        Args:
            gpu_id: number of the GPU.
            device: where to compute; ``None`` is the GPU if there is one. Without one sampling stays on the CPU, and a warning says so.

        Raises:
            ValueError: two numbers of a GPU.
        """
        here = self.device if self.device.type != "cpu" or not torch.cuda.is_available() else "cuda"
        target = torch.device(here if device is None else device)
        if gpu_id is not None and target.index is not None and target.index != gpu_id:
            raise ValueError(f"gpu_id: {gpu_id} beside device {str(target)!r}; give one of them")
        if device is None and target.type == "cpu":
            warnings.warn("enable_model_cpu_offload: no GPU here; sampling stays on the CPU, with one expert in memory at a time", stacklevel=2)
        self._engine, self.max_resident = None, 1
        self.to(target if gpu_id is None or target.type == "cpu" else torch.device(target.type, gpu_id))

    enable_sequential_cpu_offload = enable_model_cpu_offload

    # -- the call -----------------------------------------------------------------------------------------------------------

    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
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
            latents: noise to start from instead of the seeds', (N, C, h, w), one for each picture.
            output_type: ``pil``; ``np`` or ``pt``, the same 8-bit pictures as float32 in [0, 1]; or ``latent``.
            return_dict: a :class:`ParisPipelineOutput`; otherwise a tuple of its fields.
            callback_on_step_end: called after each step with the pipeline, the step's number, its time in [0, 1] (1 is noise) and
                ``{"latents": (N, C, h, w)}``. What it returns as ``latents`` is gone on from; it may set :attr:`interrupt`. More than ``max_rows``
                pictures are drawn in turns of so many, each with all its steps.
            callback_on_step_end_tensor_inputs: what of ``latents`` the callback is given.
            seed: instead of ``generator``: picture i of the call (prompt by prompt) is the engine's picture ``ImageRequest(seed, index=i)``.
            routing: ``top-k``, ``threshold``, ``full``, ``caption`` or ``expert-k``.
            solver: name of the solver.
            guidance_interval: lowest and highest time with guidance; see :class:`ImageRequest`.

        Calls from several threads take turns.

        Raises:
            ValueError: an argument is not valid; names it.
            RuntimeError: a callback calls the pipeline that it is called by.
        """
        if unknown := sorted(set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)):
            raise ValueError(f"callback_on_step_end_tensor_inputs: {', '.join(unknown)} cannot be had; there is 'latents'")
        requests = self._requests(prompt, negative_prompt, num_images_per_prompt, generator, seed)
        shape = (len(requests), *self.model.latent_shape)
        if latents is not None and (not isinstance(latents, Tensor) or tuple(latents.shape) != shape):
            given = f"a tensor {tuple(latents.shape)}" if isinstance(latents, Tensor) else type(latents).__name__
            raise ValueError(f"latents: {given} must be a tensor (N, C, h, w) = {shape}, a start for each picture")
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
        step_end = None
        if callback_on_step_end is not None:
            call, wanted = callback_on_step_end, tuple(callback_on_step_end_tensor_inputs)

            def step_end(step: int, t: float, latents: Tensor) -> Tensor:
                answer = call(self, step, t, {"latents": latents} if wanted else {})
                return _latents_of(answer, latents)

        results = self._draw(valid, latents, step_end)
        degraded = sorted({k for result in results for k in result.degraded})
        images = _as(output_type, results, self.device)
        output = ParisPipelineOutput(images, [r.routing for r in results], [r.seed for r in results], degraded)
        return output if return_dict else (output.images, output.routing, output.seeds, output.degraded)

    def _requests(self, prompt: Any, negative: Any, n: int, generator: Any, seed: int | None) -> list[dict[str, Any]]:
        if not isinstance(prompt, str) and (not isinstance(prompt, Sequence) or not prompt):
            raise ValueError(f"prompt: {prompt!r:.80} must be a caption, or a list with at least one")
        if not isinstance(negative, str | None) and not isinstance(negative, Sequence):
            raise ValueError(f"negative_prompt: {negative!r:.80} must be a caption, or a list with one for each prompt")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = [negative or ""] * len(prompts) if negative is None or isinstance(negative, str) else list(negative)
        if len(negatives) != len(prompts):
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

    def _draw(
        self, requests: Sequence[ImageRequest], noise: Tensor | None, step_end: Callable[[int, float, Tensor], Tensor] | None
    ) -> list[ImageResult]:
        """The pictures, in order; after an interrupt those that were begun.

        All have the same solver and steps. So those that are stepped at once begin, step and end together.
        """
        engine, steps = self.engine, int(requests[0].steps or 0)
        if self._drawing == threading.get_ident():
            raise RuntimeError("a callback called the pipeline that it is called by; draw with another one, or after the call")
        with engine.driving:  # calls of several threads take turns
            self._drawing = threading.get_ident()
            try:
                return self._drawn(engine, requests, noise, step_end, steps)
            finally:
                self._drawing = None

    def _drawn(
        self,
        engine: Engine,
        requests: Sequence[ImageRequest],
        noise: Tensor | None,
        step_end: Callable[[int, float, Tensor], Tensor] | None,
        steps: int,
    ) -> list[ImageResult]:
        each = evaluations(str(requests[0].solver), steps)
        times, per_step = time_grid(steps, str(requests[0].solver)), -(-each // steps)  # Heun's last step has one evaluation less
        self._interrupt, done = False, 0  # evaluations of the pictures at hand
        futures: list[Future[ImageResult]] = []

        def after(latents: Tensor) -> Tensor:
            nonlocal done
            done = done % each + 1
            bar.update(len(latents))
            if step_end is None or not at_end():
                return latents
            with torch.inference_mode(False), torch.no_grad():
                step = -(-done // per_step) - 1
                return step_end(step, times[step], latents.clone())  # an ordinary tensor, to be kept and changed

        def at_end() -> bool:
            return done % per_step == 0 or done == each

        with self.progress_bar(total=each * len(requests)) as bar:
            try:
                for i, request in enumerate(requests):
                    futures.append(engine.submit(request, noise=None if noise is None else noise[i]))
                while engine.tick(after):
                    for future in futures:
                        if future.done():
                            future.result()  # raises for one that failed
                    if self._interrupt and at_end():
                        engine.finish()
                        break
            finally:
                for future in futures:
                    future.cancel()  # of an interrupted call, so that the next one does not draw them
        return [future.result() for future in futures if not future.cancelled()]


def _latents_of(answer: Any, given: Tensor) -> Tensor:
    """What a callback wants to be gone on from."""
    if answer is None:
        return given
    if not isinstance(answer, Mapping) or answer.keys() - {"latents"}:
        raise ValueError(f"callback_on_step_end returned {answer!r:.80}; it may return nothing, or a dictionary with 'latents'")
    found = answer.get("latents", given)
    if not isinstance(found, Tensor) or found.shape != given.shape:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"callback_on_step_end returned latents of shape {shape}; they must be {tuple(given.shape)}, as it was given")
    return found


def _seed_from(generator: torch.Generator) -> int:
    return int(torch.randint(2**48, (1,), generator=generator, device=generator.device))


def _precision_of(name: str, dtype: torch.dtype | None) -> str:
    if dtype is torch.float16:
        raise ValueError(
            f"{name}: torch.float16 ends at 65504, and nothing keeps the experts' activations and velocities below that; "
            "use torch.bfloat16, which takes as little room and has the range of float32"
        )
    if dtype not in PRECISION_OF:
        raise ValueError(f"{name}: {dtype} is not one of torch.float32, torch.bfloat16; for int8 load with precision='int8'")
    return PRECISION_OF[dtype]


def _normal(device: str | int | torch.device) -> torch.device:
    """A device so written that equal ones compare so: 0, ``cuda`` (unless another GPU is the current one) and ``cuda:0``."""
    found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if found.type == "cpu":
        return torch.device("cpu")
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)
    return found


def _as(output_type: str, results: Sequence[ImageResult], device: torch.device) -> Any:
    if output_type == "latent":
        return torch.stack([torch.from_numpy(result.latent) for result in results]).to(device)
    pixels = np.stack([result.image for result in results])  # (N, H, W, 3)
    if output_type == "pil":
        from PIL import Image

        return [Image.fromarray(one) for one in pixels]
    scaled = pixels.astype(np.float32) / 255
    return scaled if output_type == "np" else torch.from_numpy(scaled).permute(0, 3, 1, 2).to(device)

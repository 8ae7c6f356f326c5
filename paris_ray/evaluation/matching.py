"""What "matched" means: what a run costs to train and a picture costs to draw, in operations, from the config alone. Imports nothing heavy.

An operation is a multiplication or an addition of a matrix product, convolution or attention (:mod:`paris_ray.training.budget`). Training is three
forward passes an image, and of a student those of its teacher. Frozen encoders, the codec and validation are the same for all rows, and not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from paris_ray.config import ClipText, ModelConfig, PatchPcaCodec, RunConfig, VaeCodec
from paris_ray.diffusion.routing import Routing
from paris_ray.training.budget import RAMP, Inputs, expert_flops, router_flops, text_flops

_TEXT_WIDTH = {"clip": 768, "minilm": 384}
_VAE = (4, 8)
"""Channels and downsampling of the paper's VAE; what another one has, only its own config says."""


def inputs_of(config: RunConfig) -> Inputs:
    """What the networks read, before any encoder is loaded; of a VAE and a CLIP, what the paper's have."""
    codec: PatchPcaCodec | VaeCodec = config.data.codec
    text = config.data.text
    channels, down = (codec.channels, codec.downsampling) if isinstance(codec, PatchPcaCodec) else _VAE
    length = text.max_length
    return Inputs(channels, config.data.image_size // down, length, _TEXT_WIDTH["clip" if isinstance(text, ClipText) else "minilm"])


def expert_training_flops(model: ModelConfig, inputs: Inputs) -> int:
    """Of an expert, for one image."""
    return 3 * expert_flops(model, inputs)


def router_pass_flops(config: RunConfig, inputs: Inputs) -> int:
    """Of one pass of the router over one state."""
    return router_flops(config.router.model, inputs if config.router.text == "pooled" else replace(inputs, text_width=0), config.num_experts)


def router_training_flops(config: RunConfig, inputs: Inputs) -> int:
    """Of the router's whole training."""
    assert config.router.train.images is not None
    return 3 * config.router.train.images * router_pass_flops(config, inputs)


def teacher_flops(config: RunConfig, inputs: Inputs, routing: str) -> float:
    """Of the mixture that a student asks for one image: a pass of the router, and one of each expert that the routing names, text included."""
    of_experts = [expert_flops(spec.model, inputs) for spec in config.experts]
    return router_pass_flops(config, inputs) + _asked(Routing.parse(routing, config.num_experts), config) * sum(of_experts) / len(of_experts)


def picture_flops(
    config: RunConfig,
    inputs: Inputs,
    routing: str,
    steps: int | None = None,
    guidance: float | None = None,
    asked: float | None = None,
    visited: float | None = None,
) -> float:
    """What one picture costs: experts, and the router where the routing asks it.

    A caption's keys and values are made once in each expert that the picture visits, those of the empty caption are kept from picture to picture.

    Args:
        config: of the run; steps and guidance are its sampling's where not given.
        inputs: of the networks.
        routing: as :class:`paris_ray.diffusion.routing.Routing` has it, or ``oracle``.
        steps: of the solver.
        guidance: 1 is off and costs one pass.
        asked: experts asked at each velocity, on average, where it was counted; ``None``: what the routing says, for ``threshold`` as for top-1.
        visited: different experts that a picture asks, on average; ``None``: as few as there can be.
    """
    how = Routing("oracle") if routing == "oracle" else Routing.parse(routing, config.num_experts)
    times = evaluations(config.sampling.solver, steps or config.sampling.steps)
    guidance = config.sampling.guidance_scale if guidance is None else guidance
    planned = _asked(how, config)
    asked, visited = planned if asked is None else asked, planned if visited is None else visited
    models = [spec.model for spec in config.experts]
    of_text = sum(text_flops(model, inputs) for model in models) / len(models)
    of_state = sum(expert_flops(model, inputs) for model in models) / len(models) - of_text
    router_passes = {"caption": 1, "expert": 0, "oracle": 0}.get(how.kind, times)
    return times * asked * (1 if guidance == 1 else 2) * of_state + visited * of_text + router_passes * router_pass_flops(config, inputs)


def _asked(how: Routing, config: RunConfig) -> int:
    """Experts at each velocity, as the routing says; of ``threshold`` as few as there can be."""
    return {"top": how.k, "full": config.num_experts}.get(how.kind, 1)


def evaluations(solver: str, steps: int) -> int:
    """As :func:`paris_ray.diffusion.solvers.evaluations`, which imports torch."""
    return {"heun": 2, "midpoint": 2}.get(solver, 1) * steps - (solver == "heun")


@dataclass(frozen=True)
class Matched:
    """What of a run is to be equal between rows, from its config.

    Attributes:
        images: of all experts together.
        expert_flops: of their training.
        router_flops: of the router's.
        teacher_flops: of the forward passes of a student's teacher; what the teacher itself took to train is not in it.
        batch: of all experts together, in images a step.
        steps: of the experts that have least and most, as are the next two.
        warmup_share: warm-up as a share of an expert's training.
        ema_share: half-life of the averaged weights at its end, likewise.
        learning_rate: of the experts.
        shape: experts × width × depth.
        picture_flops: of one picture with the row's own routing.
    """

    images: int
    expert_flops: float
    router_flops: float
    teacher_flops: float
    batch: int
    steps: tuple[int, int]
    warmup_share: tuple[float, float]
    ema_share: tuple[float, float]
    learning_rate: float
    shape: str
    picture_flops: float

    @property
    def training_flops(self) -> float:
        """Of experts and router, and of asking a teacher."""
        return self.expert_flops + self.router_flops + self.teacher_flops


def matched(config: RunConfig, routing: str, teacher: float = 0.0) -> Matched:
    """Of a run whose budgets are in images.

    Args:
        config: of the run.
        routing: that it is drawn with.
        teacher: operations of its teacher for one image.
    """
    inputs, first = inputs_of(config), config.experts[0]
    images = [spec.train.images or 0 for spec in config.experts]
    trained = [(n, spec.train) for n, spec in zip(images, config.experts, strict=True)]
    steps = [n // train.batch_size for n, train in trained]
    warmups, half_lives = [train.warmup_images / n for n, train in trained], [min(train.ema_half_life_images / n, RAMP) for n, train in trained]
    of_experts = sum(n * expert_training_flops(spec.model, inputs) for n, spec in zip(images, config.experts, strict=True))
    return Matched(
        sum(images),
        of_experts,
        0.0 if config.num_experts == 1 else router_training_flops(config, inputs),
        sum(images) * teacher,
        sum(spec.train.batch_size for spec in config.experts),
        (min(steps), max(steps)),
        (min(warmups), max(warmups)),
        (min(half_lives), max(half_lives)),
        first.train.learning_rate,
        f"{config.num_experts} × {first.model.hidden_size} × {first.model.num_layers}",
        picture_flops(config, inputs, routing),
    )

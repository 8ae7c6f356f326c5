"""The part of the config that says what is trained and how: models, the loop's settings, experts and router. Imports nothing heavy."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from paris_ray.resources import HERE, Resources
from paris_ray.strict import ConfigError, Place, Strict

SIZES: dict[str, dict[str, int]] = {
    "XL/2": {"hidden_size": 1152, "num_layers": 28, "num_heads": 16, "patch_size": 2},
    "L/2": {"hidden_size": 1024, "num_layers": 24, "num_heads": 16, "patch_size": 2},
    "B/2": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "patch_size": 2},
    "S/2": {"hidden_size": 384, "num_layers": 12, "num_heads": 6, "patch_size": 2},
}
"""Named sizes of DiT (Peebles & Xie, table 1) at patch size 2."""


class ModelConfig(Strict):
    """Shape of a transformer: a named size, or all four numbers."""

    size: str | None = None
    hidden_size: Annotated[int, Field(ge=8)]
    num_layers: Annotated[int, Field(ge=1)]
    num_heads: Annotated[int, Field(ge=1)]
    patch_size: Annotated[int, Field(ge=1)] = 2
    mlp_ratio: float = 4.0
    # LayerNorm epsilon; DiT and PixArt use 1e-6.
    norm_eps: float = 1e-6

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("size") is not None:
            if not isinstance(value["size"], str) or value["size"] not in SIZES:
                raise ValueError(f"{value['size']!r} is not a size; known are {', '.join(SIZES)}, or give hidden_size, num_layers and num_heads")
            named = SIZES[value["size"]]
            other = [key for key in named if value.get(key, named[key]) != named[key]]
            if other:
                raise ValueError(f"size {value['size']} fixes {', '.join(other)}; leave out size (size: null) to choose your own")
            return {**named, **value}
        return value

    @model_validator(mode="after")
    def _heads(self) -> ModelConfig:
        if self.hidden_size % self.num_heads or self.hidden_size % 2:
            raise ValueError(f"hidden_size {self.hidden_size} must be even and a multiple of num_heads {self.num_heads}")
        return self


class TrainConfig(Strict):
    """One optimisation loop; progress is counted in images."""

    # Images to train on. null: passes × rows of the shard, at least min_images.
    images: Annotated[int, Field(ge=1)] | None = None
    passes: Annotated[float, Field(gt=0)] = 100.0
    min_images: Annotated[int, Field(ge=1)] = 1
    batch_size: Annotated[int, Field(ge=1)] = 256
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_images: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    # Gradient norm limit; null leaves gradients alone.
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    # Images after which a weight's share in the average has halved; capped early by warm-up (see training/ema.py).
    ema_half_life_images: Annotated[int, Field(ge=1)] = 1_700_000
    timesteps: Literal["uniform", "logit_normal"] = "uniform"
    # Location of the normal whose sigmoid is a logit-normal time; above 0 leans towards noise, where a picture's layout is decided.
    timestep_mean: float = 0.0
    precision: Literal["fp32", "bf16"] = "fp32"
    # Compile the network's blocks: a minute or two at the start, faster steps from then on.
    compile: bool = False
    # Compute the blocks' activations again for the backward pass instead of keeping them: a third more work, far less memory.
    gradient_checkpointing: bool = False
    # Rows in one forward and backward pass of one worker, whose gradients add up to the batch's; null: its whole share of batch_size; auto: as many
    # as the memory takes where training first starts, kept from then on.
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    # null: one checkpoint at the end only.
    checkpoint_images: Annotated[int, Field(ge=1)] | None = None
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    log_images: Annotated[int, Field(ge=1)] = 10_000
    # Held-out loss and sample grids; null: at the end only.
    sample_images: Annotated[int, Field(ge=1)] | None = None

    def check_slices(self, num_workers: int) -> None:
        """Raise ConfigError unless the workers' shares of a batch, and the micro-batches of a share, are equal."""
        if self.batch_size % num_workers:
            raise ConfigError(
                f"train.batch_size {self.batch_size} must be a multiple of resources.num_workers {num_workers}: each worker takes an equal share"
            )
        share = self.batch_size // num_workers
        if isinstance(self.micro_batch, int) and share % self.micro_batch:
            raise ConfigError(
                f"train.micro_batch {self.micro_batch} must divide the {share} rows of a worker's share (train.batch_size {self.batch_size} over "
                f"resources.num_workers {num_workers}); set it to a divisor, to null for the whole share, or to auto"
            )


class TrainedConfig(Strict):
    """What experts and the router have in common: a model, its training, its machine."""

    model: ModelConfig
    # Share of captions replaced by the empty one: experts learn guidance by it, and a router meets it when a prompt is empty.
    caption_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    train: TrainConfig = TrainConfig()
    resources: Resources = Resources()

    @model_validator(mode="after")
    def _slices(self) -> TrainedConfig:
        self.train.check_slices(self.resources.num_workers)
        return self


class ExpertConfig(TrainedConfig):
    """One expert. Experts may differ in anything."""

    objective: Literal["flow", "ddpm"] = "flow"
    # Noise schedule of a ddpm expert.
    noise_schedule: Literal["cosine", "linear"] = "cosine"
    # Weights to start from: a safetensors file or a folder with one, of a DiT, PixArt-α or another expert; null: start anew.
    init_from: Place | None = None
    # Which of `clusters` trains it; here: the one where the other stages run.
    cluster: str = HERE


class RouterConfig(TrainedConfig):
    """The router p(cluster | x_t, t[, caption])."""

    # pooled: reads the caption's pooled text. none: the paper's and its released weights.
    text: Literal["pooled", "none"] = "pooled"
    # A router to start from, a folder with its config and weights; it may know fewer experts, the first ones of these. null: start anew.
    init_from: Place | None = None

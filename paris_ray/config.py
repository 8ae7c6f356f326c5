"""The one schema of a run and its errors. Imports nothing heavy.

A run is a :class:`RunConfig`. It is made from a preset (:mod:`paris_ray.presets`), a YAML overlay and ``--set a.b=c``, in that order, and
written in full to ``RUN/config.yaml``, which every job then reads. Each stage depends on a part of it (:mod:`paris_ray.stages`).
"""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import yaml
from pydantic import BaseModel, Field, model_validator

from paris_ray.presets import PRESETS
from paris_ray.resources import HERE, SECRET, ClusterConfig, Resources
from paris_ray.strict import ConfigError, Strict

# -- data ---------------------------------------------------------------------------------------------------------------


class OpenMojiSource(Strict):
    """The embedded corpus: OpenMoji pictures (CC BY-SA 4.0) on coloured grounds, captioned with their Unicode names."""

    kind: Literal["openmoji"] = "openmoji"
    # How many base emoji, taken in the order of a hash of their code point; null takes all.
    emoji: Annotated[int, Field(ge=8)] | None = None
    # Names of the grounds; the first one is not named in captions.
    grounds: tuple[str, ...] = ("white", "blue", "yellow")


class FolderSource(Strict):
    """A folder of images: ``name.jpg`` with its caption in ``name.txt`` or ``name.json``, or all captions in ``captions.csv``/``captions.jsonl``."""

    kind: Literal["folder"] = "folder"
    uri: str


class _Columns(Strict):
    """Which column of a table holds what."""

    # A folder with the files, or one of them.
    uri: str
    caption: str = "caption"
    # Bytes of an image file, a struct with these bytes (as Hugging Face datasets have it), or a name below the folder `images`.
    image: str = "image"
    images: str | None = None
    # What identifies a row; null: the image's bytes and the caption.
    key: str | None = None


class ParquetSource(_Columns):
    """Parquet files: a row is an image and its caption."""

    kind: Literal["parquet"] = "parquet"


class HfDatasetSource(_Columns):
    """A Hugging Face dataset as ``save_to_disk`` writes it, one split."""

    kind: Literal["hf_dataset"] = "hf_dataset"


class WebdatasetSource(Strict):
    """Webdataset tars as img2dataset writes them: ``KEY.jpg`` with its caption in ``KEY.txt``, or as ``caption`` in ``KEY.json``."""

    kind: Literal["webdataset"] = "webdataset"
    # A folder with the tars, or one of them.
    uri: str
    # Field of KEY.json that identifies a row; null: the image's bytes and the caption.
    key: str | None = None


Source = Annotated[OpenMojiSource | FolderSource | ParquetSource | WebdatasetSource | HfDatasetSource, Field(discriminator="kind")]


class FilterConfig(Strict):
    """Which rows are refused although they could be used; each is a reject with its reason."""

    # Short side of the image in pixels.
    min_side: Annotated[int, Field(ge=1)] = 1
    # Long side over short side; null leaves it free.
    max_aspect: Annotated[float, Field(ge=1)] | None = None
    min_caption_chars: Annotated[int, Field(ge=1)] = 1
    max_caption_chars: Annotated[int, Field(ge=1)] = 4000
    # A column of numbers, or a field of an image's .json, such as an aesthetic score; rows below min_score are refused.
    score_column: str | None = None
    min_score: float | None = None

    @model_validator(mode="after")
    def _consistent(self) -> FilterConfig:
        if (self.score_column is None) != (self.min_score is None):
            raise ValueError(f"score_column is {self.score_column!r} and min_score is {self.min_score}; give both, or neither")
        if self.min_caption_chars > self.max_caption_chars:
            raise ValueError(f"min_caption_chars {self.min_caption_chars} is above max_caption_chars {self.max_caption_chars}; no caption is both")
        return self


class TimmEmbedding(Strict):
    """A frozen timm backbone as semantic embedding; the paper's is DINOv2 ViT-L/14."""

    kind: Literal["timm"] = "timm"
    model: str = "vit_large_patch14_dinov2.lvd142m"
    # A local safetensors file, or null for timm's own weights from the hub.
    weights: str | None = None
    # Side of the square the backbone sees, in pixels; the paper states none, 224 costs a sixth of timm's 518.
    image_size: Annotated[int, Field(ge=14)] = 224


class OpenClipEmbedding(Strict):
    """The image tower of a CLIP that open_clip can build, at its own image size; the embedding is that which it compares with captions."""

    kind: Literal["open_clip"] = "open_clip"
    # hf-hub:OWNER/NAME or local-dir:PATH with open_clip_config.json and safetensors, or an architecture's name with `weights`.
    model: str = "hf-hub:laion/CLIP-ViT-L-14-laion2B-s32B-b82K"
    # A local safetensors file; null where the model brings its own.
    weights: str | None = None


class PackagedEmbedding(Strict):
    """EfficientNet-Lite0 with the ImageNet weights of a Python package; needs no network."""

    kind: Literal["efficientnet_lite0"] = "efficientnet_lite0"
    image_size: Annotated[int, Field(ge=32)] = 96


Embedding = Annotated[TimmEmbedding | OpenClipEmbedding | PackagedEmbedding, Field(discriminator="kind")]


class VaeCodec(Strict):
    """A diffusers ``AutoencoderKL``; latents are the posterior's mean times its scaling factor."""

    kind: Literal["vae"] = "vae"
    # Hub id or local folder.
    source: str = "stabilityai/sd-vae-ft-mse"
    # null takes the factor in the VAE's own config.
    scaling_factor: float | None = None


class PatchPcaCodec(Strict):
    """PCA of square patches, fitted on the training split: a latent codec that needs no weights from elsewhere."""

    kind: Literal["patch_pca"] = "patch_pca"
    downsampling: Annotated[int, Field(ge=1)] = 4
    channels: Annotated[int, Field(ge=1)] = 12


Codec = Annotated[VaeCodec | PatchPcaCodec, Field(discriminator="kind")]


class ClipText(Strict):
    """A CLIP text tower: all states after the final norm, padded to ``max_length``, no mask."""

    kind: Literal["clip"] = "clip"
    # Hub id, or a local folder that holds text_encoder/ (a transformers CLIPTextModel) as the released checkpoint does.
    source: str = "openai/clip-vit-large-patch14"
    max_length: Annotated[int, Field(ge=4, le=77)] = 77


class MiniLmText(Strict):
    """MiniLM-L6 (384 wide) with the weights of a Python package; needs no network."""

    kind: Literal["minilm"] = "minilm"
    max_length: Annotated[int, Field(ge=4, le=256)] = 16


Text = Annotated[ClipText | MiniLmText, Field(discriminator="kind")]


class SplitConfig(Strict):
    """Shares kept from training, drawn by hash of the near-duplicate group before anything is fitted."""

    # Share of groups (for OpenMoji: base emoji) that training never sees at all.
    held_out_groups: Annotated[float, Field(ge=0, lt=0.5)] = 0.04
    # Share of rows of the other groups kept out (for OpenMoji: emoji × ground combinations).
    held_out_rows: Annotated[float, Field(ge=0, lt=0.5)] = 0.06
    # Share of rows of the other groups on which losses are watched.
    validation_rows: Annotated[float, Field(ge=0, lt=0.5)] = 0.04


class DataConfig(Strict):
    """From images and captions to the corpus."""

    source: Source
    # Side of the square picture in pixels: short side resized, centre cropped.
    image_size: Annotated[int, Field(ge=8, le=4096)] = 256
    # Refuse an image whose header claims more pixels than this.
    max_pixels: Annotated[int, Field(ge=1)] = 64_000_000
    filter: FilterConfig = FilterConfig()
    split: SplitConfig = SplitConfig()
    embedding: Embedding = TimmEmbedding()
    codec: Codec = VaeCodec()
    text: Text = ClipText()
    # For 11 M captions of 77 tokens: states (77 × 768 in float16, 118 kB each) are 1.3 TB and ready to use, token ids (int32, 308 bytes each) are
    # 3.4 GB before compression and are encoded again in training, about 1.5 % of a step of the paper's expert.
    store_text: Literal["states", "token_ids"] = "token_ids"
    # Rows in one corpus file: the unit of work and of resumption. Of tars and Hugging Face datasets it is one of their files instead.
    rows_per_part: Annotated[int, Field(ge=1)] = 2048
    # Bounds of the encoder actor pool and what each actor takes.
    min_encoders: Annotated[int, Field(ge=1)] = 1
    max_encoders: Annotated[int, Field(ge=1)] = 4
    encoder_cpus: float = 1.0
    encoder_gpus: float = 0.0
    encoder_batch: Annotated[int, Field(ge=1)] = 64

    @model_validator(mode="after")
    def _scored(self) -> DataConfig:
        if self.filter.score_column is not None and isinstance(self.source, OpenMojiSource):
            raise ValueError(f"filter.score_column is {self.filter.score_column!r}, but the openmoji source has no scores; leave it out")
        return self


class PartitionConfig(Strict):
    """Two-level k-means over the semantic embeddings; the number of coarse clusters is the number of experts."""

    # random: experts by hash of a row's group, the control that papers compare with; it uses none of the keys below.
    method: Literal["kmeans", "random"] = "kmeans"
    fine: Annotated[int, Field(ge=2)] = 1024
    metric: Literal["cosine", "euclidean"] = "cosine"
    # What multiplies matrices; the result is the same. torch uses GPUs where the cluster has them, faiss must be installed.
    backend: Literal["numpy", "torch", "faiss"] = "numpy"
    # Whether a fine centroid counts in the coarse level as often as it has rows; the papers count each once.
    weighted: bool = False
    max_iterations: Annotated[int, Field(ge=1)] = 100
    # Largest share of the corpus one expert may get, as a multiple of an equal share; null leaves sizes free.
    max_share: Annotated[float, Field(gt=1.0)] | None = None
    contact_sheet: Annotated[int, Field(ge=1, le=400)] = 48
    # The last so many experts were added later, each with the rows of a source of its own (jobs.append --new-expert); no cluster was fitted for them.
    added: Annotated[int, Field(ge=0)] = 0


# -- models and training ------------------------------------------------------------------------------------------------

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
    init_from: str | None = None
    # Which of `clusters` trains it; here: the one where the other stages run.
    cluster: str = HERE


class RouterConfig(TrainedConfig):
    """The router p(cluster | x_t, t[, caption])."""

    # pooled: reads the caption's pooled text. none: the paper's and its released weights.
    text: Literal["pooled", "none"] = "pooled"
    # A router to start from, a folder with its config and weights; it may know fewer experts, the first ones of these. null: start anew.
    init_from: str | None = None


# -- sampling, serving, evaluation --------------------------------------------------------------------------------------


class SamplingConfig(Strict):
    """What a request gets when it does not say."""

    steps: Annotated[int, Field(ge=1, le=1000)] = 50
    guidance_scale: Annotated[float, Field(ge=1, le=50)] = 7.5
    routing: str = "top-2"
    solver: Literal["euler", "heun", "midpoint", "dpmpp_2m"] = "euler"


class ServeConfig(Strict):
    """How the Serve application is laid out."""

    # together: all experts in the sampler's process. apart: one replica per expert. Or groups such as [[0, 1], [2, 3]].
    placement: Literal["together", "apart"] | tuple[tuple[int, ...], ...] = "together"
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    cpus: float = 1.0
    gpus: float = 0.0
    threads: Annotated[int, Field(ge=1)] = 1
    # Rows (images in flight) the sampler steps at once.
    max_rows: Annotated[int, Field(ge=1)] = 64
    max_images_per_request: Annotated[int, Field(ge=1)] = 10
    max_steps: Annotated[int, Field(ge=1)] = 200
    max_prompt_chars: Annotated[int, Field(ge=1)] = 4000
    # Requests that may wait; past it 429.
    max_queue: Annotated[int, Field(ge=1)] = 256
    # Of each API key, or of each address where there are no keys; past them 429. null: no limit.
    images_per_minute: Annotated[int, Field(ge=1)] | None = None
    requests_at_once: Annotated[int, Field(ge=1)] | None = None
    # 503 with fewer experts than so many, and for a picture of which the router gives missing ones more than so much.
    min_experts: Annotated[int, Field(ge=1)] = 1
    max_masked_probability: Annotated[float, Field(ge=0, le=1)] = 1.0


class EvaluationConfig(Strict):
    """The retrieval table over HTTP."""

    captions_per_cluster: Annotated[int, Field(ge=1)] = 8
    held_out_captions: Annotated[int, Field(ge=0)] = 64
    # Also train the paper's text-blind router, as a row of the table.
    control_router: bool = True


class RunConfig(Strict):
    """All of a run."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,40}$")]
    # Local folder or URI; every stage's files go below it.
    run_dir: str
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: DataConfig
    partition: PartitionConfig = PartitionConfig()
    # Defaults of the experts below.
    expert: ExpertConfig
    # One spec per expert; each says only where it differs from `expert`. A number makes that many alike.
    experts: Annotated[tuple[ExpertConfig, ...], Field(min_length=2)]
    router: RouterConfig
    sampling: SamplingConfig = SamplingConfig()
    serve: ServeConfig = ServeConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    # Where the metrics of trainings go beside their files.
    tracking: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()
    # Training jobs (experts and routers) at once in one cluster; the others wait.
    max_parallel: Annotated[int, Field(ge=1)] = 8
    # Other clusters, by names that experts give as their `cluster`.
    clusters: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,40}$")], ClusterConfig] = Field(default={})

    @property
    def num_experts(self) -> int:
        return len(self.experts)

    @property
    def num_clusters(self) -> int:
        """Experts that clusters were fitted for."""
        return self.num_experts - self.partition.added

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        if not isinstance(value, dict) or "expert" not in value:
            return value
        specs = value.get("experts", 8)
        if isinstance(specs, bool) or not isinstance(specs, int | list | tuple):
            raise ValueError("experts must be a number of experts or a list of specs (each saying where it differs from expert)")
        specs = [{}] * specs if isinstance(specs, int) else specs
        default = _plain(value["expert"])
        return {**value, "experts": [merge(default, _resize(default, _plain(spec))) for spec in specs]}

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.partition.fine < self.num_clusters:
            raise ValueError(f"partition.fine is {self.partition.fine}, below the {self.num_clusters} experts that have clusters; raise it")
        if self.num_clusters < 2:
            raise ValueError(f"partition.added is {self.partition.added} of {self.num_experts} experts; at least two have clusters: lower it")
        codec = self.data.codec
        if self.serve.min_experts > self.num_experts:
            raise ValueError(f"serve.min_experts is {self.serve.min_experts}, above the number of experts {self.num_experts}; lower it")
        if (minute := self.serve.images_per_minute) is not None and minute < self.serve.max_images_per_request:
            raise ValueError(
                f"serve.images_per_minute is {minute}, below serve.max_images_per_request {self.serve.max_images_per_request}, so that some requests "
                "would never be let through; raise the one or lower the other"
            )
        if self.sampling.steps > self.serve.max_steps:
            raise ValueError(f"sampling.steps is {self.sampling.steps}, above serve.max_steps {self.serve.max_steps}; raise serve.max_steps")
        if self.data.filter.max_caption_chars > self.serve.max_prompt_chars:
            raise ValueError(
                f"data.filter.max_caption_chars is {self.data.filter.max_caption_chars}, above serve.max_prompt_chars {self.serve.max_prompt_chars}; "
                "such a caption could be trained on and not be asked for: raise serve.max_prompt_chars"
            )
        if isinstance(codec, PatchPcaCodec):  # a VAE says so only once it is loaded
            self.check_downsampling(codec.downsampling)
        if self.sampling.routing == "caption" and self.router.text == "none":
            raise ValueError("sampling.routing is caption, but router.text is none, which reads no caption; change one")
        self._check_clusters()
        if isinstance(self.serve.placement, tuple):
            flat = sorted(k for group in self.serve.placement for k in group)
            if flat != list(range(self.num_experts)):
                raise ValueError(f"serve.placement {self.serve.placement} must name each expert 0…{self.num_experts - 1} once")
        return self

    def _check_clusters(self) -> None:
        if HERE in self.clusters:
            raise ValueError(f"clusters.{HERE}: that name is taken by the cluster where the other stages run; choose another")
        known = [HERE, *self.clusters]
        for k, expert in enumerate(self.experts):
            if expert.cluster not in known:
                raise ValueError(
                    f"experts.{k}.cluster is {expert.cluster!r}, which is not under clusters.{_nearest(expert.cluster, known)} Known: "
                    f"{', '.join(known)}"
                )

    def cluster_of(self, stage: str) -> str:
        """The name of the cluster where a stage runs."""
        return self.experts[int(stage.removeprefix("expert-"))].cluster if stage.startswith("expert-") else HERE

    def on_fallback(self, stage: str) -> RunConfig:
        """The config with a training stage's ``resources.fallback`` in the place of its machine. Raises ConfigError when there is none."""
        expert = int(stage.removeprefix("expert-")) if stage.startswith("expert-") else None
        part: TrainedConfig = self.router if expert is None else self.experts[expert]
        try:
            part = part.model_copy(update={"resources": part.resources.on_fallback()})
        except ValueError as error:
            raise ConfigError(f"{stage}: {error}") from None
        if expert is None:
            return self.model_copy(update={"router": part})
        return self.model_copy(update={"experts": (*self.experts[:expert], part, *self.experts[expert + 1 :])})

    def without_clusters(self) -> RunConfig:
        """The config for somebody else, who has one cluster and need not know ours."""
        experts = tuple(one.model_copy(update={"cluster": HERE}) for one in self.experts)
        return self.model_copy(update={"clusters": {}, "expert": self.expert.model_copy(update={"cluster": HERE}), "experts": experts})

    def check_downsampling(self, down: int) -> None:
        """Raise ConfigError unless the codec's latents, ``down`` times smaller than the images, divide into every model's patches."""
        for where, model in [(f"experts[{k}]", e.model) for k, e in enumerate(self.experts)] + [("router", self.router.model)]:
            if self.data.image_size % (down * model.patch_size):
                raise ConfigError(
                    f"data.image_size {self.data.image_size} must be a multiple of {down * model.patch_size} "
                    f"(codec downsampling {down} × {where}.model.patch_size {model.patch_size})"
                )


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _resize(default: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    """A spec that names another size drops the default's numbers; one that gives numbers drops the default's size."""
    model = spec.get("model") if isinstance(spec, dict) else None
    if not isinstance(model, dict):
        return spec  # what is wrong with it, if anything, is validation's to say
    shape = SIZES["S/2"].keys()
    if model.get("size") is not None:
        return {**spec, "model": {**SIZES.get(str(model["size"]), {}), **model}}
    if any(key in model for key in shape) and "size" not in model:
        return {**spec, "model": {"size": None, **model}}
    return spec


def merge(base: Any, overlay: Any) -> Any:
    """Overlay one JSON-like tree on another; dicts merge, unless their ``kind`` differs; all else replaces."""
    if not (isinstance(base, dict) and isinstance(overlay, dict)):
        return overlay
    if "kind" in overlay and overlay["kind"] != base.get("kind"):
        return overlay
    return {**base, **{key: merge(base[key], value) if key in base else value for key, value in overlay.items()}}


# -- loading ------------------------------------------------------------------------------------------------------------


def load(source: str, sets: Iterable[str] = ()) -> RunConfig:
    """A run's config from a preset's name or a YAML file, overlaid with ``a.b=c`` settings.

    Args:
        source: a preset (``demo``, ``tiny``, ``paris_b2``, ``paris_xl2``), or a path or URI of a YAML file. The file may say ``preset: NAME``
            to overlay that preset, else it must be whole, as ``RUN/config.yaml`` is.
        sets: settings such as ``experts=4`` or ``expert.train.batch_size=32``; values are YAML.

    Raises:
        ConfigError: with the key, the value, the rule and the remedy.
    """
    if source in PRESETS:
        tree = PRESETS[source]()
    else:
        tree = _read_yaml(source)
        if (preset := tree.pop("preset", None)) is not None:
            if preset not in PRESETS:
                raise ConfigError(f"{source}: preset {preset!r} does not exist.{_nearest(str(preset), PRESETS)} Known: {', '.join(PRESETS)}")
            tree = _overlay(PRESETS[preset](), tree)
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text!r} has no '='; write --set a.b=value")
        try:
            leaf: Any = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {text!r}: the value is not valid YAML ({str(error).splitlines()[0]}); quote it as YAML does") from None
        for part in reversed(key.strip().split(".")):
            leaf = {part: leaf}
        tree = _overlay(tree, leaf)
    return build(tree)


def build(tree: dict[str, Any]) -> RunConfig:
    """Validate a tree. Raises ConfigError."""
    try:
        return RunConfig.model_validate(tree)
    except pydantic.ValidationError as error:
        raise ConfigError(_explain(error)) from None


T = TypeVar("T", bound=BaseModel)


def read(schema: type[T], source: str) -> T:
    """A YAML file with another schema than a run's. Raises ConfigError as :func:`load` does."""
    try:
        return schema.model_validate(_read_yaml(source))
    except pydantic.ValidationError as error:
        raise ConfigError(_explain(error, schema, source)) from None


def dump(config: RunConfig) -> str:
    """The resolved config as YAML; :func:`load` reads it back to the same config.

    Of each expert it holds what differs from ``expert``, so that a change of ``expert`` reaches those that did not say otherwise.
    """
    tree = config.model_dump(mode="json")
    tree["experts"] = [_difference(tree["expert"], spec) for spec in tree["experts"]]
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120)


def _difference(default: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    """What has to be merged into the default to get the spec."""
    return {
        key: _difference(default[key], value) if isinstance(value, dict) and isinstance(default.get(key), dict) else value
        for key, value in spec.items()
        if key not in default or default[key] != value
    }


def _overlay(base: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """Overlay a whole run: a changed default shape (size or numbers) follows the same rule as an expert's spec."""
    for section in ("expert", "router"):
        if isinstance(overlay.get(section), dict):
            overlay = {**overlay, section: _resize({}, overlay[section])}
    experts = overlay.get("experts")
    if isinstance(experts, dict):  # --set experts.3.objective=ddpm
        old = base.get("experts", 8)
        specs: list[Any] = [{}] * old if isinstance(old, int) else list(old)
        for index, spec in experts.items():
            if not str(index).isdigit() or int(index) >= len(specs):
                raise ConfigError(f"experts.{index}: there are experts 0…{len(specs) - 1}; write experts.K.key=value with one of these")
            specs[int(index)] = merge(specs[int(index)], _resize({}, spec))
        overlay = {**overlay, "experts": specs}
    merged: dict[str, Any] = merge(base, overlay)
    return merged


def _read_yaml(source: str) -> dict[str, Any]:
    from paris_ray.storage import Folder

    parent, name = os.path.split(source)
    try:
        text = Folder(parent or ".").read_bytes(name)
    except (FileNotFoundError, IsADirectoryError, OSError) as error:
        hint = _nearest(source, PRESETS) if not parent else ""
        raise ConfigError(f"config: {source!r} is neither a preset ({', '.join(PRESETS)}) nor a readable file.{hint}") from error
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"config: {source} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"config: {source} must hold keys and values, not {type(tree).__name__}")
    return tree


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _known_keys(schema: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Keys of the model at a location of a schema (list indices and union tags are passed over)."""
    kinds: list[type[BaseModel]] = [schema]
    for part in location:
        inner: list[type[BaseModel]] = []
        for kind in kinds:
            if part in kind.model_fields:
                inner += _models_in(kind.model_fields[part].annotation)
        kinds = inner or kinds
    return [key for kind in kinds for key in kind.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in _models_in(inner)]


_UNIONS = ("source", "embedding", "codec", "text")
_TAGS = ("openmoji", "folder", "parquet", "webdataset", "hf_dataset", "timm", "open_clip", "efficientnet_lite0", "vae", "patch_pca", "clip", "minilm")


def _is_type(part: Any) -> bool:
    """Whether a part of a location names a type of a union: ``int``, ``constrained-int``, ``literal['auto']``."""
    return isinstance(part, str) and (part == "int" or any(mark in part for mark in "-[<"))


def _explain(error: pydantic.ValidationError, schema: type[BaseModel] = RunConfig, source: str = "config") -> str:
    lines = []
    for item in error.errors():
        location = item["loc"]
        # A union's tag is pydantic's, not a key that anybody writes.
        tags = [bool(i) and ((location[i - 1] in _UNIONS and part in _TAGS) or _is_type(part)) for i, part in enumerate(location)]
        key = ".".join(str(part) for part, tag in zip(location, tags, strict=True) if not tag) or "config"
        if item["type"] == "extra_forbidden":
            known = _known_keys(schema, location[:-1])
            hint = _nearest(str(location[-1]), known) or f" Known here: {', '.join(known)}."
            lines.append(f"{key}: no such key.{hint}")
        elif item["type"] == "missing":
            lines.append(f"{key}: required and not given.")
        elif item["type"] == "too_short" and len(item["input"]) >= item["ctx"]["min_length"]:
            continue  # pydantic counts the valid items only; what is wrong with the others has lines of its own
        elif item["type"] == SECRET:
            lines.append(f"{key}: {item['msg']}")
        else:
            value = repr(item["input"])
            shown = value if len(value) < 80 else value[:77] + "…"
            lines.append(f"{key}: {item['msg'].removeprefix('Value error, ')} (got {shown})")
    # A wrong default is reported once, not again for each expert that inherits it.
    own = {line.split(": ", 1)[0].split(".", 1)[-1] for line in lines if line.startswith("expert.")}
    kept = [line for line in lines if not (line.startswith("experts.") and line.split(": ", 1)[0].split(".", 2)[-1] in own)]
    return f"{source}: " + "\n        ".join(dict.fromkeys(kept))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that every job has."""
    parser.add_argument("--config", required=True, metavar="YAML|PRESET", help="RUN/config.yaml, a YAML overlay, or a preset: " + ", ".join(PRESETS))
    parser.add_argument(
        "--set", action="append", default=[], dest="sets", metavar="KEY=VALUE", help="change one setting, e.g. expert.train.batch_size=32"
    )
    parser.add_argument(
        "--rebuild", action="append", default=[], metavar="STAGE", help="delete what this stage made from other inputs and make it anew"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and what would be run, resumed or skipped; do nothing")

"""What a comparison trains, draws and measures: one config over one base run. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import Field, model_validator

from paris_ray import config as configs
from paris_ray.config import ConfigError, OpenClipEmbedding, PackagedEmbedding, RunConfig, ScenesSource, TimmEmbedding
from paris_ray.config_errors import explain, nearest
from paris_ray.diffusion.routing import Routing
from paris_ray.evaluation.compare_rows import BLIND, MAIN, ROWS
from paris_ray.presets import demo, paris_b2
from paris_ray.strict import Strict

ROUTINGS = ("top-1", "full", "caption", "oracle")
"""What the main row is drawn with beside its own routing: what pairs name."""

ALL_ROUTINGS = (*ROUTINGS, "top-3", "threshold", "experts")
"""``experts`` is every single expert, under the first seed."""

FID_PICTURES = 2048
"""A covariance of Inception's features is singular with so few pictures."""


class InceptionJudge(Strict):
    """Inception-v3 as torch-fidelity has it: distances in all of its features are FID and KID."""

    kind: Literal["inception"] = "inception"
    # A local .pth of torch-fidelity's weights; null: as torch-fidelity fetches them.
    weights: str | None = None


Judge = Annotated[TimmEmbedding | OpenClipEmbedding | PackagedEmbedding | InceptionJudge, Field(discriminator="kind")]


class CompareConfig(Strict):
    """All of a comparison."""

    # Where it writes: a local folder, or a URI that all of its processes see.
    folder: str
    # The run that the rows are variations of: its corpus, its experts (all alike), its router, its sampling.
    base: RunConfig
    rows: tuple[str, ...] = (MAIN, "monolith", "monolith-steps", BLIND)
    # Images that the experts of the main row are trained on, all together; the other rows take what costs as many operations.
    images: Annotated[int, Field(ge=1)]
    # Of training and of pictures; the first one chooses learning rate and guidance.
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0, 1, 2)
    learning_rates: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)]
    guidance_scales: Annotated[tuple[Annotated[float, Field(ge=1, le=50)], ...], Field(min_length=1)]
    routings: tuple[str, ...] = ROUTINGS
    # Captions of validation rows with which guidance is chosen; of other validation rows, by which claims are judged; of held-out rows, a question
    # of their own, or 0.
    validation_captions: Annotated[int, Field(ge=2)] = 144
    seen_captions: Annotated[int, Field(ge=4)] = 256
    held_out_captions: Annotated[int, Field(ge=0)] = 256
    # Validation rows on which losses choose the learning rate; as many others on which losses are reported.
    loss_rows: Annotated[int, Field(ge=2)] = 480
    # In whose features distances are measured; null: the encoder that made the clusters, which is no independent judge.
    judge: Judge | None = None
    # Processes at once; null: one for each GPU, or one for each core, with one thread.
    workers: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _base(cls, value: Any) -> Any:
        """``base: {preset: demo, …}``."""
        if not isinstance(value, dict) or not isinstance(value.get("base"), dict) or "preset" not in value["base"]:
            return value
        overlay = dict(value["base"])
        name = overlay.pop("preset")
        if name not in configs.PRESETS:
            raise ValueError(f"base.preset: {name!r} does not exist.{nearest(str(name), configs.PRESETS)} Known: {', '.join(configs.PRESETS)}")
        return {**value, "base": configs.overlay(configs.PRESETS[name](), overlay)}

    @model_validator(mode="after")
    def _consistent(self) -> CompareConfig:
        for name in self.rows:
            if name not in ROWS:
                raise ValueError(f"rows: {name!r} is not a row.{nearest(name, ROWS)} Known: {', '.join(ROWS)}")
        for key in ("rows", "seeds", "learning_rates", "guidance_scales", "routings"):
            if len(set(values := getattr(self, key))) != len(values):
                raise ValueError(f"{key}: {list(values)} names something twice; leave one out")
        base = self.base
        if MAIN not in self.rows:
            raise ValueError(f"rows: {list(self.rows)} are compared with {MAIN}, which is missing; add it")
        if any(spec != base.expert for spec in base.experts) or base.num_experts < 2 or base.partition.method != "kmeans":
            raise ValueError("base.experts: the base has at least two experts, all alike, of k-means clusters; the rows say what differs")
        if base.router.train.images is None:
            raise ValueError("base.router.train.images is null; say how many, so that what the router costs is known before anything is trained")
        if isinstance(self.judge, InceptionJudge) and self.seen_captions <= FID_PICTURES:
            raise ValueError(
                f"seen_captions is {self.seen_captions}; FID needs more pictures than there are features, {FID_PICTURES}, and is published of 50,000"
            )
        scenes = isinstance(base.data.source, ScenesSource)
        if isinstance(self.judge, InceptionJudge) and not scenes and self.validation_captions <= FID_PICTURES:
            raise ValueError(
                f"validation_captions is {self.validation_captions}, by whose FID guidance is chosen; more than {FID_PICTURES} pictures are needed"
            )
        for name in self.rows:
            k, batch = ROWS[name].experts or base.num_experts, self.batch_size
            if batch % k:
                raise ValueError(
                    f"rows: {name} has {k} experts, which must divide the batch of all experts together, {batch} ({base.num_experts} × "
                    f"base.expert.train.batch_size {base.expert.train.batch_size}); change that, or leave the row out"
                )
        for text in self.routings:
            if text not in ("oracle", "experts"):
                try:
                    Routing.parse(text, base.num_experts)
                except ValueError as error:
                    raise ValueError(f"routings: {list(self.routings)} with {base.num_experts} experts: {error}; leave it out") from None
        return self

    @property
    def encoder(self) -> Judge:
        """In whose features distances are measured."""
        return self.judge or self.base.data.embedding

    @property
    def choice_rows(self) -> int:
        """Validation rows, the first by hash, by which anything is chosen."""
        return max(self.loss_rows, self.validation_captions)

    def asked(self, part: str) -> int:
        """Rows of a part of :data:`paris_ray.evaluation.compare_captions.PARTS` that are asked for."""
        return {"validation": self.choice_rows, "losses": self.loss_rows, "seen": self.seen_captions, "held_out": self.held_out_captions}[part]

    @property
    def batch_size(self) -> int:
        """Of all experts together: what a monolith's step takes."""
        return self.base.num_experts * self.base.expert.train.batch_size


def load(source: str, sets: Iterable[str] = ()) -> CompareConfig:
    """A comparison's config from a preset of :data:`PRESETS` or a YAML file, overlaid with ``a.b=c`` settings, as :func:`paris_ray.config.load` does.

    Raises:
        ConfigError: with the key, the value, the rule and the remedy.
    """
    return build(configs.tree(source, sets, PRESETS, _overlaid))


def build(tree: dict[str, Any]) -> CompareConfig:
    """Validate a tree. Raises ConfigError."""
    try:
        return CompareConfig.model_validate(tree)
    except pydantic.ValidationError as error:
        raise ConfigError(explain(error, CompareConfig)) from None


def dump(config: CompareConfig) -> str:
    """The resolved config as YAML, which :func:`load` reads back."""
    tree = {**config.model_dump(mode="json"), "base": yaml.safe_load(configs.dump(config.base))}
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120)


def _overlaid(base: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    merged: dict[str, Any] = configs.merge({**base, "base": None}, {**overlay, "base": None})
    mine = overlay.get("base") or {}
    return {**merged, "base": mine if "preset" in mine else configs.overlay(base.get("base", {}), mine)}


# -- presets ------------------------------------------------------------------------------------------------------------


def compare_tiny() -> dict[str, Any]:
    """Four experts on plain scenes of 32 pixels beside monoliths of equal cost, three seeds, faults planted that need no training of their own.

    Sized for 90 minutes on two idle CPU cores by counted operations.
    """
    base = demo()
    train = {**base["expert"]["train"], "passes": 100.0, "min_images": 1, "warmup_images": 1600, "ema_half_life_images": 2000, "keep_checkpoints": 1}
    scenes = {"kind": "scenes", "seen": 14_000, "unseen": 900, "objects": 8, "things": 2}
    return {
        "folder": "runs/compare_tiny",
        "base": {
            **base,
            "name": "compare_tiny",
            "run_dir": "runs/compare_tiny/base",
            "data": {
                **base["data"],
                "source": {**scenes, "colours": ["white", "blue", "yellow", "green"], "textures": ["plain"]},
                "embedding": {"kind": "efficientnet_lite0", "image_size": 96},
                "codec": {"kind": "patch_pca", "downsampling": 4, "channels": 16},
                "text": {"kind": "minilm", "max_length": 32},
                "split": {"validation_rows": 0.08},
                "rows_per_part": 500,
            },
            "partition": {"fine": 64, "max_share": 1.3},
            "expert": {**base["expert"], "train": train},
            "experts": 4,
            "router": {**base["router"], "train": {**train, "images": 16_000, "learning_rate": 2e-3, "timesteps": "uniform"}},
            "sampling": {"steps": 25, "guidance_scale": 2.0},
        },
        "rows": [MAIN, "monolith", "monolith-steps", BLIND, "fault-swapped", "fault-raw"],
        "images": 122_880,
        "learning_rates": [3e-3, 6e-3],
        "guidance_scales": [1.0, 1.5, 2.0, 2.5, 4.0, 6.0],
        "routings": ALL_ROUTINGS,
    }


def compare_gpu() -> dict[str, Any]:
    """Eight experts on plain scenes of 64 pixels, five seeds, faults planted; sized for 25 minutes on one H100 by counted kernels, not measured.

    More rows, such as distilled, experts-4, experts-16 and mixed, take 3 to 5 minutes each.
    """
    tiny = compare_tiny()
    base = tiny["base"]
    gpu = {"cpus": 1.0, "gpus": 0.125}
    train = {
        **base["expert"]["train"], "batch_size": 64, "warmup_images": 6400, "ema_half_life_images": 8000, "checkpoint_images": 32_000,
        "log_images": 6400, "precision": "bf16",
    }  # fmt: skip
    return {
        **tiny,
        "folder": "runs/compare_gpu",
        "base": {
            **base,
            "name": "compare_gpu",
            "run_dir": "runs/compare_gpu/base",
            "data": {
                **base["data"],
                "source": {**base["data"]["source"], "seen": 40_000, "unseen": 2000, "objects": 16},
                "image_size": 64,
                "rows_per_part": 1000,
                "max_encoders": 12,
                "encoder_gpus": 0.08,
            },
            "expert": {"model": {"hidden_size": 192, "num_layers": 4, "num_heads": 4}, "train": train, "resources": gpu},
            "experts": 8,
            "router": {
                "model": {"hidden_size": 192, "num_layers": 2, "num_heads": 4},
                "train": {**train, "batch_size": 256, "images": 128_000, "learning_rate": 1e-3, "timesteps": "uniform"},
                "resources": gpu,
            },
        },
        "rows": [MAIN, "monolith", "monolith-steps", BLIND, "random", "fault-router", "fault-swapped", "fault-raw"],
        "images": 983_040,
        "seeds": [0, 1, 2, 3, 4],
        "learning_rates": [2e-3, 4e-3],
        "validation_captions": 192,
        "seen_captions": 512,
        "held_out_captions": 512,
        "loss_rows": 1024,
        "workers": 8,
    }


def compare_paper() -> dict[str, Any]:
    """The paper's scale, DiT-B/2 at 256 pixels, on PD12M, whose pictures are public domain and whose licence (CDLA-Permissive-2.0) allows it.

    To be planned (``--dry-run``) before it is paid for. Fetch PD12M's pictures into Parquet files with the columns ``image`` and ``caption`` first:
    its own tables hold addresses only.
    """
    base = paris_b2()
    small = {"images": None, "batch_size": 32, "micro_batch": None, "ema_half_life_images": 320_000}
    expert = {**base["expert"], "train": {**base["expert"]["train"], **small}}
    router = {**base["router"], "train": {**base["router"]["train"], "images": 6_000_000, "batch_size": 256}}
    return {
        "folder": "runs/compare_paper",
        "base": {
            **base,
            "name": "compare_paper",
            "run_dir": "runs/compare_paper/base",
            "data": {**base["data"], "source": {"kind": "parquet", "uri": "pd12m"}},
            "expert": expert,
            "router": router,
        },
        "rows": [name for name, row in ROWS.items() if not row.fault],
        "images": 100_000_000,
        "judge": {"kind": "inception"},
        "learning_rates": [5e-5, 1e-4, 2e-4],
        "guidance_scales": [1.0, 1.5, 2.0, 3.0, 5.0, 7.5],
        "routings": ALL_ROUTINGS,
        "validation_captions": 4096,
        "seen_captions": 10_000,
        "held_out_captions": 0,
        "loss_rows": 8192,
    }


PRESETS: dict[str, Callable[[], dict[str, Any]]] = {f.__name__: f for f in (compare_tiny, compare_gpu, compare_paper)}

"""The one schema of a run and its errors. Imports nothing heavy.

A run is a :class:`RunConfig`. It is made from a preset (:mod:`paris_ray.presets`), a YAML overlay and ``--set a.b=c``, in that order, and
written in full to ``RUN/config.yaml``, which every job then reads. Each stage depends on a part of it (:mod:`paris_ray.stages`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import yaml
from pydantic import BaseModel, Field, model_validator

from paris_ray.config_errors import explain, nearest
from paris_ray.data_config import (  # noqa: F401, the whole schema can be had from here
    ClipText,
    Codec,
    DataConfig,
    Embedding,
    FilterConfig,
    FolderSource,
    HfDatasetSource,
    MiniLmText,
    OpenClipEmbedding,
    OpenMojiSource,
    PackagedEmbedding,
    ParquetSource,
    PartitionConfig,
    PatchPcaCodec,
    ScenesSource,
    Source,
    SplitConfig,
    Text,
    TimmEmbedding,
    VaeCodec,
    WebdatasetSource,
)
from paris_ray.opening import read_yaml
from paris_ray.placement import Placement, serve_groups
from paris_ray.presets import PRESETS
from paris_ray.resources import HERE, ClusterConfig, Resources  # noqa: F401
from paris_ray.strict import ConfigError, Place, Strict
from paris_ray.training_config import SIZES, ExpertConfig, ModelConfig, RouterConfig, TrainConfig, TrainedConfig  # noqa: F401

# -- sampling, serving, evaluation --------------------------------------------------------------------------------------


class SamplingConfig(Strict):
    """What a request gets when it does not say."""

    steps: Annotated[int, Field(ge=1, le=1000)] = 50
    guidance_scale: Annotated[float, Field(ge=1, le=50)] = 7.5
    routing: str = "top-2"
    solver: Literal["euler", "heun", "midpoint", "dpmpp_2m"] = "euler"


class ServeConfig(Strict):
    """How the Serve application is laid out."""

    # together: all experts in the sampler's process. apart: one process per expert. Or groups: [[0, 1], {experts: [2], replicas: [1, 4], gpus: 1}].
    placement: Placement = "together"
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
    # Show each expert's contact sheet, which has training pictures, to whoever may ask for pictures.
    contact_sheets: bool = False


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
    run_dir: Place
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: DataConfig
    partition: PartitionConfig = PartitionConfig()
    # Defaults of the experts below.
    expert: ExpertConfig
    # One spec per expert; each says only where it differs from `expert`. A number makes that many alike. One alone is a monolith.
    experts: Annotated[tuple[ExpertConfig, ...], Field(min_length=1)]
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
        if self.num_experts == 1 and self.partition.method != "random":
            raise ValueError(
                f"experts: there must be at least 2, and there are 1; raise it, or set partition.method=random (now {self.partition.method}): one "
                "expert, the whole corpus"
            )
        if self.num_clusters < min(2, self.num_experts):
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
            flat = sorted(k for group in serve_groups(self.serve.placement, self.num_experts) for k in group.experts)
            if flat != list(range(self.num_experts)):
                raise ValueError(f"serve.placement: groups of experts {flat} must name each expert 0…{self.num_experts - 1} once")
        return self

    def _check_clusters(self) -> None:
        if HERE in self.clusters:
            raise ValueError(f"clusters.{HERE}: that name is taken by the cluster where the other stages run; choose another")
        known = [HERE, *self.clusters]
        for k, expert in enumerate(self.experts):
            if expert.cluster not in known:
                raise ValueError(
                    f"experts.{k}.cluster is {expert.cluster!r}, which is not under clusters.{nearest(expert.cluster, known)} Known: "
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

    def check_train_rows(self, total: int) -> None:
        """Raise ConfigError unless a corpus with so many training rows can be divided into the clusters."""
        clusters = self.partition.fine if self.partition.method == "kmeans" else self.num_experts
        if total < clusters:
            raise ConfigError(
                f"partition.fine: {clusters} fine clusters need at least as many training rows, and the corpus has {total}; "
                f"lower it (--set partition.fine={max(self.num_experts, total // 8)}) or embed more pictures"
            )

    def check_none_added(self) -> None:
        """Raise ConfigError when experts were added later: clusters made anew would not know what these learn."""
        if self.partition.added:
            raise ConfigError(
                f"partition.added is {self.partition.added}: what these experts learn is of no cluster but of sources that were appended, which "
                "would be lost; to make clusters for all experts anew, set partition.added=0 and pass --rebuild partition"
            )

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
    return build(tree(source, sets, PRESETS, overlay))


def tree(
    source: str,
    sets: Iterable[str],
    presets: Mapping[str, Callable[[], dict[str, Any]]],
    overlaid: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]],
) -> dict[str, Any]:
    """What :func:`load` validates, of any schema that has presets.

    Args:
        source: a preset's name, or a path or URI of a YAML file, which may say ``preset``.
        sets: settings ``a.b=c``.
        presets: by name.
        overlaid: (base, overlay) → both as one.

    Raises:
        ConfigError: nothing is there, or it cannot be read.
    """
    if source in presets:
        found = presets[source]()
    else:
        found = read_yaml(source, "config", presets)
        if (preset := found.pop("preset", None)) is not None:
            if preset not in presets:
                raise ConfigError(f"{source}: preset {preset!r} does not exist.{nearest(str(preset), presets)} Known: {', '.join(presets)}")
            found = overlaid(presets[preset](), found)
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
        found = overlaid(found, leaf)
    return found


def build(tree: dict[str, Any]) -> RunConfig:
    """Validate a tree. Raises ConfigError."""
    try:
        return RunConfig.model_validate(tree)
    except pydantic.ValidationError as error:
        raise ConfigError(explain(error, RunConfig)) from None


T = TypeVar("T", bound=BaseModel)


def read(schema: type[T], source: str, key: str) -> T:
    """A YAML file with another schema than a run's, which an argument ``key`` names. Raises ConfigError as :func:`load` does."""
    try:
        return schema.model_validate(read_yaml(source, key))
    except pydantic.ValidationError as error:
        raise ConfigError(explain(error, schema, source)) from None


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


def overlay(base: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
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


def add_arguments(parser: argparse.ArgumentParser, works: bool = True, required: bool = True) -> None:
    """The arguments that every job has; a job that only looks (``works`` off) deletes nothing and runs nothing."""
    parser.add_argument(
        "--config", required=required, metavar="YAML|PRESET", help="RUN/config.yaml, a YAML overlay, or a preset: " + ", ".join(PRESETS)
    )
    parser.add_argument(
        "--set", action="append", default=[], dest="sets", metavar="KEY=VALUE", help="change one setting, e.g. expert.train.batch_size=32"
    )
    if not works:
        parser.set_defaults(rebuild=[])
        return
    parser.add_argument(
        "--rebuild", action="append", default=[], metavar="STAGE", help="delete what this stage made from other inputs and make it anew"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and what would be run, resumed or skipped; do nothing")

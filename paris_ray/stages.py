"""The stages of a run: where each writes, what it depends on, in which order they go. Imports nothing heavy."""

from __future__ import annotations

import re
from typing import Any

from paris_ray import hub
from paris_ray.config import RunConfig
from paris_ray.manifest import Stage, Status, fingerprint, previous, published, recorded, require
from paris_ray.storage import Folder

CONTROL_ROUTER = "control_router"


def expert_name(k: int) -> str:
    """The stage that trains expert ``k``."""
    return f"expert-{k}"


def trains(name: str) -> bool:
    """Whether a stage trains an expert or a router."""
    return name.startswith("expert-") or name in ("router", CONTROL_ROUTER)


def names(config: RunConfig) -> list[str]:
    """All stages of a run, parents first."""
    experts = [expert_name(k) for k in range(config.num_experts)]
    control = [CONTROL_ROUTER] if config.evaluation.control_router else []
    return ["embed", "partition", *experts, "router", *control, "assemble"]


def parents(config: RunConfig, name: str) -> list[str]:
    """The stages that must be done before ``name`` can start."""
    if name == "embed":
        return []
    if name == "partition":
        return ["embed"]
    if trains(name):
        return ["partition"]
    if name == "assemble":
        return [expert_name(k) for k in range(config.num_experts)] + ["router"]
    if name == "evaluate":
        return ["assemble", "partition"] + ([CONTROL_ROUTER] if config.evaluation.control_router else [])
    raise ValueError(f"{name!r} is not a stage; known are {', '.join([*names(config), 'evaluate'])}")


def folder(config: RunConfig, name: str) -> Folder:
    """Where a stage writes its manifest (design: the run directory)."""
    run = Folder(config.run_dir)
    if name.startswith("expert-"):
        return run / "experts" / name.removeprefix("expert-")
    if name.startswith("shard-"):
        return run / "shards" / f"expert={name.removeprefix('shard-')}"
    return run / {"embed": "corpus", "partition": "clusters", "assemble": "model", "evaluate": "eval"}.get(name, name)


def _without(tree: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if key not in keys}


def _weights_part(spec: dict[str, Any]) -> dict[str, Any]:
    """What of a training spec decides the weights: neither cluster and machine (but for its threads) nor how often the run is looked at and saved.

    Compiled code and micro-batches add in another order, so they count. Gradient checkpointing does the same sums twice, to the same bits.
    """
    train = _without(spec["train"], "log_images", "checkpoint_images", "keep_checkpoints", "sample_images", "gradient_checkpointing")
    return {**_without(spec, "resources", "cluster"), "train": train, "threads": spec["resources"]["threads"]}


def config_part(config: RunConfig, name: str) -> dict[str, Any]:
    """What of the config decides a stage's result. Where and on how much it runs is left out, unless it changes the bits."""
    tree = config.model_dump(mode="json")
    data = tree["data"]
    if name == "encoders":
        return {
            "seed": config.seed,
            **{key: data[key] for key in ("source", "image_size", "split", "embedding", "codec", "text", "max_pixels", "filter")},
        }
    if name == "embed":
        # Encoders on a GPU round otherwise than on a CPU; on how many, or on what share of one, they run changes nothing.
        rest = _without(data, "min_encoders", "max_encoders", "encoder_cpus", "encoder_gpus")
        return {"seed": config.seed, "encoder_device": "cuda" if data["encoder_gpus"] > 0 else "cpu", **rest}
    if name == "partition":
        return {"seed": config.seed, "num_experts": config.num_clusters, **_without(tree["partition"], "backend", "added")}
    if name.startswith("shard-"):
        return {"seed": config.seed, "num_experts": config.num_clusters, **_without(tree["partition"], "backend", "contact_sheet", "added")}
    if name.startswith("expert-"):
        k = int(name.removeprefix("expert-"))
        if not 0 <= k < config.num_experts:
            raise ValueError(f"expert {k}: there are experts 0…{config.num_experts - 1}")
        spec = _without(tree["experts"][k], "init_from")  # what it holds counts, not where it lies: a parent of the stage
        return {"seed": config.seed, "expert": k, **_weights_part(spec)}
    if name in ("router", CONTROL_ROUTER):
        spec = _without(tree["router"], "init_from") | ({"text": "none"} if name == CONTROL_ROUTER else {})
        return {"seed": config.seed, "num_experts": config.num_experts, **_weights_part(spec)}
    if name == "assemble":
        return {"name": config.name, "sampling": tree["sampling"], "text": data["text"], "image_size": config.data.image_size}
    if name == "evaluate":
        return {"seed": config.seed, **tree["evaluation"]}
    raise ValueError(f"{name!r} is not a stage")


def _source_print(source: str, made: Folder) -> str:
    """Fingerprint of the weights that a network starts from. One that has started has them in its checkpoints: then they may be gone."""
    found, names = hub.weights_here(source)
    if not names:
        if (then := recorded(made)) is not None and "init_from" in then["parents"]:
            return str(then["parents"]["init_from"])
        found, names = hub.weights_there(source)
    if not names:
        raise FileNotFoundError(f"init_from: {source} holds no safetensors file; give a file, a folder with one, or a repository of the hub")
    return fingerprint({name: found.sketch(name) for name in names})


def stage(config: RunConfig, name: str) -> Stage:
    """A stage with its parents' fingerprints.

    Raises:
        FileNotFoundError: a parent has not been published; the message names the job to run first.
    """
    run = Folder(config.run_dir)
    prints: dict[str, str] = {}
    earlier: dict[str, list[str]] = {}

    def parent(label: str, where: Folder, made_by: str) -> None:
        found = require(where, made_by)
        prints[label], earlier[label] = found["fingerprint"], previous(found)

    if name == "embed":
        parent("encoders", run / "encoders", "embed")
    elif name == "partition" or name.startswith("shard-"):
        parent("corpus", run / "corpus", "embed")
    elif name.startswith("expert-"):
        parent("encoders", run / "encoders", "embed")
        parent("shard", folder(config, name.replace("expert", "shard")), "partition")
        if (source := config.experts[int(name.removeprefix("expert-"))].init_from) is not None:
            prints["init_from"] = _source_print(source, folder(config, name))
    elif name in ("router", CONTROL_ROUTER):
        parent("encoders", run / "encoders", "embed")
        for k in range(config.num_experts):
            parent(f"shard-{k}", folder(config, f"shard-{k}"), "partition")
        if name == "router" and config.router.init_from is not None:
            prints["init_from"] = _source_print(config.router.init_from, folder(config, name))
    elif name == "assemble":
        parent("encoders", run / "encoders", "embed")
        parent("clusters", run / "clusters", "partition")
        for k in range(config.num_experts):
            parent(expert_name(k), folder(config, expert_name(k)), f"train_expert --expert {k}")
        parent("router", run / "router", "train_router")
    elif name == "evaluate":
        parent("model", run / "model", "assemble")
        parent("clusters", run / "clusters", "partition")
        if config.evaluation.control_router:
            parent(CONTROL_ROUTER, run / CONTROL_ROUTER, "train_router --control")
    return Stage(name, folder(config, name), config_part(config, name), prints, earlier)


def unknown_experts(config: RunConfig) -> list[str]:
    """Why the run's shards are not those of this config: one was published for an expert that it does not have."""
    shards = Folder(config.run_dir) / "shards"
    numbers = [int(name.removeprefix("expert=")) for name in shards.folders() if re.fullmatch(r"expert=\d+", name)]
    unknown = [k for k in sorted(numbers) if k >= config.num_experts and published(shards / f"expert={k}") is not None]
    return [
        f"shards/expert={k} is of an expert that this config, with {config.num_experts}, does not have; jobs.append --new-expert adds one to "
        f"{config.run_dir}/config.yaml: use that config, and if it has no more experts, repeat that command first"
        for k in unknown
    ]


def status(config: RunConfig, name: str) -> Status:
    """What would happen to a stage now: its own state, or ``waiting`` when a parent is not there yet."""
    try:
        found = stage(config, name).status()
        if name == "partition" and (unknown := unknown_experts(config)):
            return Status("stale", (*unknown, *found.reasons), found.manifest)
        return found
    except FileNotFoundError as error:
        if name == "embed":  # it makes its own parent
            return stage(config, "encoders").status()
        begun = published(folder(config, name))
        return Status("waiting", (str(error),), begun)


def cluster_sizes(config: RunConfig) -> list[int]:
    """Train rows of each expert, appended ones too. Raises FileNotFoundError before the clusters are published."""
    return [int(size) for size in require(folder(config, "partition"), "partition")["counts"]["sizes"]]

"""The stage ``assemble``: the products of a run, put together as one model in the released layout."""

from __future__ import annotations

import time
from typing import Any

from paris_ray import stages
from paris_ray.config import RunConfig
from paris_ray.data.encoders import NULL_TEXT
from paris_ray.layout import EXPERT_FILE, INFO, ROUTER_FILE, model_index, released_config
from paris_ray.manifest import fingerprint, published
from paris_ray.progress import Progress
from paris_ray.storage import Folder, copy_file

EXPERT_FILES = ("config.json", EXPERT_FILE)
ROUTER_FILES = ("config.json", ROUTER_FILE)
ENCODER_PARTS = ("codec/", "vae/", "text_encoder/", "tokenizer/")

OPENMOJI = (
    "Trained on pictures made from OpenMoji (https://openmoji.org), the open-source emoji and icon project, licensed CC BY-SA 4.0 "
    "(https://creativecommons.org/licenses/by-sa/4.0/)."
)


def assemble(config: RunConfig, rebuild: bool = False) -> dict[str, Any]:
    """Put ``RUN/experts/*/export``, ``RUN/router/export`` and ``RUN/encoders`` together as ``RUN/model``.

    Args:
        config: the run.
        rebuild: delete a model that was made from other inputs first.

    Returns:
        the stage's manifest.

    Raises:
        FileNotFoundError: an expert, the router or the encoders are not there yet; names the job to run.
        ValueError: a part does not fit the others, or has changed since it was published.
        StaleError: the model there was made from other inputs.
    """
    stage = stages.stage(config, "assemble")
    status = stage.begin(rebuild)
    if status.state == "valid" and status.manifest is not None:
        return status.manifest
    began = time.monotonic()
    run, model = Folder(config.run_dir), stage.folder
    encoders = run / "encoders"
    sources = _sources(config, encoders)
    progress = Progress(run / "events", "assemble", len(sources), "files")
    try:
        for done, (name, (folder, source, _)) in enumerate(sources.items()):
            progress.update(done, message=name)
            copy_file(folder, source, model, name)
        info = _info(config, model, {name: checksum for name, (_, _, checksum) in sources.items()})
        model.write_json(INFO, info)
        model.write_json("config.json", released_config(info, **_names(config)))
        model.write_json("model_index.json", model_index(info))
        model.write_bytes("README.md", _card(info).encode())
        named = {*sources, INFO, "config.json", "model_index.json", "README.md"}
        for entry in model.files(recursive=True):
            if entry.name not in named and not entry.name.startswith("_"):
                model.delete(entry.name)  # left by an assembly that did not end
        _check(model, info)
        manifest = stage.publish({"experts": config.num_experts, "model_fingerprint": info["model_fingerprint"]}, time.monotonic() - began)
    except Exception as error:
        progress.fail(str(error))
        raise
    progress.finish()
    return manifest


def _sources(config: RunConfig, encoders: Folder) -> dict[str, tuple[Folder, str, str]]:
    """What the model's files are copies of: name in the model → (folder, name there, checksum)."""
    sources = {}
    for k in range(config.num_experts):
        folder = stages.folder(config, stages.expert_name(k))
        for name in EXPERT_FILES:
            sources[f"expert_{k}/{name}"] = (folder, f"export/{name}", _published(folder, f"export/{name}", stages.expert_name(k)))
    folder = stages.folder(config, "router")
    for name in ROUTER_FILES:
        sources[f"router/{name}"] = (folder, f"export/{name}", _published(folder, f"export/{name}", "router"))
    for entry in encoders.files(recursive=True):
        if entry.name == NULL_TEXT or entry.name.startswith(ENCODER_PARTS):
            sources[entry.name] = (encoders, entry.name, _published(encoders, entry.name, "embed"))
    return sources


def _published(folder: Folder, name: str, stage: str) -> str:
    """Checksum of a file, after comparing it with what its stage published."""
    listed = {entry["name"]: entry["sha256"] for entry in (published(folder) or {"files": []})["files"]}
    if name not in listed:
        raise ValueError(f"{folder.uri}/{name} is not in the manifest of {stage}; run it again with --rebuild {stage}")
    if not folder.exists(name) or folder.sha256(name) != listed[name]:
        raise ValueError(f"{folder.uri}/{name} is missing or has changed since {stage} published it; put it back, or run it with --rebuild {stage}")
    return str(listed[name])


def _info(config: RunConfig, model: Folder, checksums: dict[str, str]) -> dict[str, Any]:
    run = Folder(config.run_dir)
    encoders, sizes = (run / "encoders").read_json("encoders.json"), stages.cluster_sizes(config)
    experts = []
    for k in range(config.num_experts):
        own = model.read_json(f"expert_{k}/config.json")
        manifest = published(stages.folder(config, stages.expert_name(k))) or {}
        experts.append(
            {
                "index": k,
                "objective": own["objective"],
                "noise_schedule": own["noise_schedule"],
                "cluster_size": sizes[k],
                "fingerprint": fingerprint({name: checksums[f"expert_{k}/{name}"] for name in EXPERT_FILES}),
                "manifest": manifest["fingerprint"],
                "images": int(manifest["counts"].get("images", 0)),
            }
        )
    codec, text = encoders["codec"], encoders["text"]
    router = model.read_json("router/config.json")
    return {
        "format": 1,
        "name": config.name,
        "num_experts": config.num_experts,
        "image_size": encoders["image_size"],
        "latent": {"channels": codec["channels"], "size": encoders["image_size"] // codec["downsampling"]},
        "codec": codec,
        "text": text,
        "router": {"text": "none" if router.get("text_embed_dim") is None else "pooled"},
        "sampling": config.sampling.model_dump(mode="json"),
        "experts": experts,
        "attribution": OPENMOJI if config.data.of_openmoji else None,
        "model_fingerprint": fingerprint(checksums),
    }


def _names(config: RunConfig) -> dict[str, str]:
    """What the run was made from, for the released config."""
    codec, text = config.data.codec, config.data.text
    return {
        "dataset_name": config.data.source.kind,
        "vae_name": codec.source if codec.kind == "vae" else codec.kind,
        "text_encoder_name": text.source if text.kind == "clip" else text.kind,
    }


def _card(info: dict[str, Any]) -> str:
    sampling = info["sampling"]
    rows = "\n".join(f"| {e['index']} | {e['objective']} | {e['cluster_size']} | {e['images']} |" for e in info["experts"])
    reads = "the noisy latent, its time and the caption" if info["router"]["text"] == "pooled" else "the noisy latent and its time"
    return (
        f"""# {info["name"]}

{info["num_experts"]} diffusion experts, each trained alone on one cluster of the data, and a router that mixes them (decentralized diffusion,
arXiv 2510.03434). Text to image, {info["image_size"]}×{info["image_size"]} pixels. The router reads {reads}.

| expert | objective | pictures in its cluster | images trained on |
|---|---|---|---|
{rows}

Sampling by default: {sampling["steps"]} {sampling["solver"]} steps, guidance {sampling["guidance_scale"]}, routing {sampling["routing"]}.

```python
from paris_ray.inference.pipeline import ParisPipeline

picture = ParisPipeline.from_pretrained("path/to/this/folder")("a caption", seed=1).images[0]
```

The model draws what its training data shows, and has what biases and gaps they have. {info["attribution"] or ""}
""".rstrip()
        + "\n"
    )


def _check(model: Folder, info: dict[str, Any]) -> None:
    """Load every network strictly, so that a model that cannot be served is not published."""
    from paris_ray.inference.strict import load_expert, load_router

    size = info["latent"]["size"]
    for k in range(info["num_experts"]):
        load_expert(model / f"expert_{k}", size)
    router = load_router(model / "router", size)
    if router.num_clusters != info["num_experts"]:
        raise ValueError(f"{model.uri}/router: it knows {router.num_clusters} experts, the run has {info['num_experts']}; train the router again")

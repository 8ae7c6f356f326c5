"""A run directory with what training reads, written by the contract: encoders and shards of separable clusters."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save_file

from paris_ray import config as configs
from paris_ray.config import RunConfig
from paris_ray.data import schema
from paris_ray.manifest import Stage
from paris_ray.stages import config_part
from paris_ray.storage import Folder

T, WIDTH, CHANNELS, SIDE = 6, 16, 12, 8
EXPERTS, ROWS = 3, 40


def encoders() -> dict:
    return {
        "image_size": 32,
        "embedding": {"kind": "efficientnet_lite0", "width": 8, "fingerprint": "e"},
        "codec": {"kind": "patch_pca", "channels": CHANNELS, "downsampling": 4, "latent_size": SIDE, "fingerprint": "c"},
        "text": {"kind": "minilm", "width": WIDTH, "max_length": T, "pooling": "mean", "fingerprint": "t"},
    }


def rows_of(k: int, n: int = ROWS) -> dict:
    """Rows of cluster k: latents and text around the cluster's own means; the last tenth is for validation."""
    g = np.random.default_rng(k)
    latent = 1.2 * np.cos(np.arange(CHANNELS) * (k + 1))[None, :, None, None] + 0.5 * g.standard_normal((n, CHANNELS, SIDE, SIDE))
    length = g.integers(2, T + 1, n).astype(np.int32)
    text = np.sin(np.arange(WIDTH) * (k + 1)) + 0.3 * g.standard_normal((n, T, WIDTH))
    text *= np.arange(T)[None, :, None] < length[:, None, None]
    return {
        "id": [f"{k}-{(7 * i) % n:04d}" for i in range(n)],  # not in the order of the file
        "text": text.astype(np.float16),
        "text_len": length,
        "latent": latent.astype(np.float16),
        "fine": np.full(n, k, np.int32),
        "split": ["validation" if i % 10 == 9 else "train" for i in range(n)],
    }


def write_shard(run: Folder, k: int, rows: dict, cuts: tuple[int, ...] = (), kind: pa.Schema | None = None, config: RunConfig | None = None) -> None:
    """One shard's Parquet files, cut after the given rows, and its manifest."""
    shard = run / "shards" / f"expert={k}"
    edges = [0, *cuts, len(rows["id"])]
    for part, (a, b) in enumerate(itertools.pairwise(edges)):
        table = schema.table(kind or schema.shard_schema(encoders(), "states"), {name: column[a:b] for name, column in rows.items()})
        schema.write_table(shard, schema.part_name(part), table)
    name = f"shard-{k}"
    Stage(name, shard, config_part(config, name) if config else {}, {}).publish({"rows": len(rows["id"])})


def make_config(path, **sets) -> RunConfig:
    return configs.load("tiny", [f"run_dir={path}", *(f"{key.replace('__', '.')}={value}" for key, value in sets.items())])


def make_run(path, experts=range(EXPERTS), **sets) -> RunConfig:
    """Encoders and some experts' shards below ``path``, published; returns the config."""
    config = make_config(path, **sets)
    run = Folder(config.run_dir)
    meta = encoders()
    meta["codec"]["fingerprint"] = write_codec(run / "encoders")
    (run / "encoders").write_json("encoders.json", meta)
    g = torch.Generator().manual_seed(0)
    null = {
        "states": 0.1 * torch.randn(T, WIDTH, generator=g),
        "token_ids": torch.zeros(T, dtype=torch.int32),
        "length": torch.tensor([2], dtype=torch.int32),
    }
    save_file(null, (run / "encoders").local_copy("null_text.safetensors"))
    Stage("encoders", run / "encoders", config_part(config, "encoders"), {}).publish()
    for k in experts:
        write_shard(run, k, rows_of(k), config=config)
    return config


def write_codec(where: Folder) -> str:
    """A patch-PCA codec fitted on noise: real files, meaningless pictures; returns its fingerprint."""
    from paris_ray import config
    from paris_ray.data.codec import PatchPcaCodec, PatchSums

    sums = PatchSums.zero(4)
    sums.add(np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), np.uint8), 4)
    codec = PatchPcaCodec.fit(config.PatchPcaCodec(downsampling=4, channels=CHANNELS), sums)
    codec.save(where.path)
    return codec.fingerprint

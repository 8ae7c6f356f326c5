"""Planted faults show, at a size that learns: trained by the comparison's own work, read back and judged in plain torch."""

from __future__ import annotations

import itertools
import json

import fake_training_run as fake
import numpy as np
import pytest
import torch
from planted import publish
from safetensors.torch import load_file

from paris_ray import stages
from paris_ray.evaluation import compare_config, compare_rows, compare_work
from paris_ray.evaluation.compare_plan import Plan
from paris_ray.evaluation.compare_report import verdict_of_fault
from paris_ray.evaluation.compare_results import Results
from paris_ray.evaluation.compare_rows import Run
from paris_ray.evaluation.times import TIMES
from paris_ray.models import Router
from paris_ray.models.dit import DiT
from paris_ray.storage import Folder
from paris_ray.training import checkpoint

K, RATE, IMAGES, HELD_OUT = 3, 0.02, 960, 12

FAULTS = ("fault-router", "fault-swapped", "fault-raw")


def settings(folder):
    shape = {"hidden_size": 16, "num_layers": 1, "num_heads": 2}
    train = {
        "batch_size": 16, "learning_rate": RATE, "schedule": "constant", "warmup_images": 80, "ema_half_life_images": 96, "timesteps": "uniform",
        "checkpoint_images": IMAGES, "log_images": IMAGES,
    }  # fmt: skip
    return [
        f"folder={folder}",
        f"rows=[experts, {', '.join(FAULTS)}]",
        f"images={K * IMAGES}",
        f"learning_rates=[{RATE}]",
        "guidance_scales=[1.0]",
        "loss_rows=2",
        f"base.experts={K}",
        f"base.expert.model={shape}",
        f"base.expert.train={train}",
        f"base.router.model={shape}",
        f"base.router.train={ ({**train, 'learning_rate': 3e-3, 'images': IMAGES}) }",
        "base.data.codec={kind: patch_pca, channels: 12}",
    ]


def partition(config, shuffled):
    """Encoders and shards of three separable clusters, or the same rows dealt out in turn."""
    run, rows = Folder(config.run_dir), [fake.rows_of(k) for k in range(K)]
    fake.make_run(config.run_dir, experts=[])
    (run / "corpus").write_json("_manifest.json", {"fingerprint": "c", "files": [], "counts": {}, "parents": {}})
    for k in range(K):
        own = rows[k] if not shuffled else {name: _dealt([one[name] for one in rows], k) for name in rows[0]}
        fake.write_shard(run, k, own)
    (run / "clusters").write_json("_manifest.json", {"fingerprint": "p", "files": [], "counts": {"sizes": [36] * K}})


def _dealt(columns, k):
    pieces = [one[k::K] for one in columns]
    return list(itertools.chain(*pieces)) if isinstance(columns[0], list) else np.concatenate(pieces)


def make_noisy(folder):
    """Leave a last checkpoint whose raw weights are as noisy as those of many steps at a high rate; what was exported is their average."""
    found, g = checkpoint.latest(folder), torch.Generator().manual_seed(0)
    weights = {name: w + 0.3 * (w.std() if w.numel() > 1 else 0) * torch.randn(w.shape, generator=g) for name, w in found.tensors("model").items()}
    checkpoint.save(folder, found.images + 16, {"model": weights}, found.state, [])


def network(kind, folder, name, **more):
    said = json.loads((folder / "export").read_bytes("config.json"))
    keys = ("image_size", "in_channels", "hidden_size", "num_layers", "num_heads", "patch_size", "text_embed_dim")
    model = kind(**{key: said[key] for key in keys}, **more)
    model.load_state_dict(load_file((folder / "export").local_copy(name)))
    return model.eval()


@torch.no_grad()
def mixture_loss(config, seed):
    """Of top-2 on fresh rows of all clusters, (T, N): the mean square of its velocity minus (noise − data)."""
    folders = [stages.folder(config, f"expert-{k}") for k in range(K)]
    experts = [network(DiT, folder, "diffusion_pytorch_model.safetensors", out_channels=fake.CHANNELS) for folder in folders]
    router = network(Router, stages.folder(config, "router"), "pytorch_model.safetensors", num_clusters=K)
    g = torch.Generator().manual_seed(seed)
    rows = [fake.rows_of(k, 60) for k in range(K)]
    clean = torch.from_numpy(np.concatenate([one["latent"][-HELD_OUT:] for one in rows])).float()
    text = torch.from_numpy(np.concatenate([one["text"][-HELD_OUT:] for one in rows])).float()
    length = torch.from_numpy(np.concatenate([one["text_len"][-HELD_OUT:] for one in rows]))
    pooled = text.sum(1) / length[:, None]
    noise = torch.randn(clean.shape, generator=g)
    found = []
    for time in TIMES:
        t = torch.full((len(clean),), time)
        x = (1 - time) * clean + time * noise
        said = torch.stack([expert(x, t, text) for expert in experts], 1)
        p = router(x, t, pooled).softmax(1)
        least = p.argmin(1)
        p[torch.arange(len(p)), least] = 0
        mixed = (said * (p / p.sum(1, keepdim=True))[:, :, None, None, None]).sum(1)
        found.append((mixed - (noise - clean)).square().flatten(1).mean(1).numpy())
    return np.stack(found)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The comparison's results, with losses of the main row and of all faults under three seeds."""
    compare = compare_config.load("compare_tiny", settings(tmp_path_factory.mktemp("faults")))
    for name, shuffled in (("experts", False), ("random", True)):
        partition(compare_rows.partition_config(compare, name), shuffled)
    plan = Plan(compare)
    for row in ("experts", *FAULTS):
        for seed in compare.seeds:
            run, source = Run(row, seed, RATE), None if row == "experts" else Run("experts", seed, RATE)
            for stage in (*(f"expert-{k}" for k in range(K)), "router"):
                compare_work.train(compare, run, stage, source)
                if row == "experts" and stage != "router":
                    make_noisy(stages.folder(compare_work.run_config(compare, run), stage))
            folder = Folder(run.folder(compare))
            losses = mixture_loss(compare_work.run_config(compare, run), seed)
            publish(folder / "losses/seen", routed=losses)
            if row == "experts" and seed == compare.seeds[0]:
                publish(folder / "losses/validation", routed=losses)
    assert plan.rate("experts") == RATE
    return Results(compare)


def test_each_fault_moves_the_loss_by_more_than_its_interval(measured):
    found = {row: loss for row, _, loss in measured.faults()}
    assert set(found) == {*FAULTS}
    for row, loss in found.items():
        assert loss.seeds == 3, row
        assert loss.low > 0, (row, loss)
        assert verdict_of_fault(loss) == "yes", row
    assert measured.loss("experts") < 1.4  # zero would have 2: the mean square of noise and of data

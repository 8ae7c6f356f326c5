"""Training the router in this process."""

from __future__ import annotations

import json
from collections import Counter

import fake_training_run as fake
import pytest
import torch
from safetensors.torch import load_file

from paris_ray.models.router import Router
from paris_ray.storage import Folder
from paris_ray.training import checkpoint, worker
from paris_ray.training.draws import Draws
from paris_ray.training.loop import Place
from paris_ray.training.router_task import RouterTask

CPU = torch.device("cpu")
KEYS = (
    "num_clusters",
    "image_size",
    "patch_size",
    "in_channels",
    "hidden_size",
    "num_layers",
    "num_heads",
    "mlp_ratio",
    "text_embed_dim",
    "norm_eps",
)


@pytest.mark.parametrize("stage", ["router", "control_router"])
def test_learns_separable_clusters_and_hands_over(tmp_path, stage):
    config = fake.make_run(tmp_path, router__train__images=2400, router__train__learning_rate=3e-3, router__train__checkpoint_images="null")
    counts = worker.run(config, stage, Place(CPU))
    folder = Folder(config.run_dir) / stage
    prior = max(Counter(RouterTask(config, CPU).validation.labels.tolist()).values()) / 12
    last = checkpoint.read_metrics(folder)[-1]
    # Near the data both must know; near the noise only the one that reads the caption can.
    assert last["accuracy_by_time"][0] > 0.9
    if stage == "router":
        assert last["accuracy_by_time"][3] > prior + 0.3
    assert counts["accuracy"] == last["accuracy"] > prior
    exported = load_file((folder / "export").local_copy("pytorch_model.safetensors"))
    said = json.loads((folder / "export").read_bytes("config.json"))
    assert said["text_embed_dim"] == (fake.WIDTH if stage == "router" else None)
    Router(**{key: said[key] for key in KEYS}).load_state_dict(exported, strict=True)


def test_loss_is_cross_entropy_on_the_linear_path_with_pooled_text(tmp_path):
    config = fake.make_run(tmp_path, router__caption_dropout=0.5)
    task = RouterTask(config, CPU)
    with torch.no_grad():  # adaLN-Zero would hide the text
        for layer in task.model.layers:
            layer.adaLN_modulation[1].weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    draw = Draws(0, "router", task.rows, task.shape, task.dropout)(0, 16)
    losses, times = task.losses(task.model, task.batch(draw))
    assert 2 <= draw.dropped.sum() <= 14
    for i, row in enumerate(draw.rows):
        t = times[i]
        x = (1 - t) * task.train.latents[row].float() + t * torch.from_numpy(draw.noise[i])
        length = int(task.train.text_len[row])
        pooled = task.encoders.null_states[:2].mean(0) if draw.dropped[i] else task.train.text[row, :length].float().mean(0)
        with torch.no_grad():
            p = task.model(x[None], t[None], pooled[None]).softmax(-1)[0, int(task.train.labels[row])]
        torch.testing.assert_close(losses[i].detach(), -p.log(), rtol=1e-4, atol=1e-5)

"""Training the router in this process."""

from __future__ import annotations

import json
import math
from collections import Counter

import fake_training_run as fake
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from paris_ray import rng
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
    assert counts["ece"] == last["ece"] == pytest.approx(sum(last["ece_by_time"]) / 4)
    if stage == "router":  # knowing less near the noise without its caption
        assert last["without_text"]["accuracy_by_time"][3] < last["accuracy_by_time"][3]
    else:
        assert "without_text" not in last
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


def test_validation_is_what_a_loop_over_rows_finds(tmp_path):
    """Loss, first choices and calibration, with the captions and without, and the prior."""
    config = fake.make_run(tmp_path)
    task = RouterTask(config, CPU)
    with torch.no_grad():  # unlike outputs for unlike inputs
        for parameter in task.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    line = task.evaluate(0)
    rows = task.validation
    assert len(rows) == 12
    noise = torch.from_numpy(rng.normal(config.seed, "router/validation", np.arange(12), task.shape))
    null = task.encoders.null_states[:2].mean(0)
    for found, with_text in ((line, True), (line["without_text"], False)):
        for b, t in enumerate((0.125, 0.375, 0.625, 0.875)):
            right, confidence = [], []
            for i in range(12):
                pooled = rows.text[i, : int(rows.text_len[i])].float().mean(0) if with_text else null
                x = (1 - t) * rows.latents[i].float() + t * noise[i]
                with torch.no_grad():
                    p = task.model(x[None], torch.tensor([t]), pooled[None]).softmax(-1)[0]
                right.append(int(p.argmax()) == int(rows.labels[i]))
                confidence.append(float(p.max()))
            bins = {math.ceil(15 * c) for c in confidence}
            gaps = [[right[i] - confidence[i] for i in range(12) if math.ceil(15 * confidence[i]) == one] for one in bins]
            assert found["accuracy_by_time"][b] == sum(right) / 12
            assert found["ece_by_time"][b] == pytest.approx(sum(abs(sum(gap)) for gap in gaps) / 12, abs=1e-5)
    largest = Counter(task.train.labels.tolist()).most_common(1)[0][0]
    assert line["prior"] == rows.labels.tolist().count(largest) / 12
    assert line["accuracy"] == pytest.approx(sum(line["accuracy_by_time"]) / 4)

"""Training the router in this process."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter

import fake_training_run as fake
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from paris_ray import config as configs
from paris_ray import rng
from paris_ray.config import ConfigError
from paris_ray.models.router import Router
from paris_ray.storage import Folder
from paris_ray.training import checkpoint, router_task, worker
from paris_ray.training.draws import Draws
from paris_ray.training.loop import Place
from paris_ray.training.router_task import RouterTask, start_from
from paris_ray.training.trackers import figures

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


def test_validation_takes_a_micro_batch_at_once_and_the_prior_is_of_the_same_rows(tmp_path, monkeypatch):
    config = fake.make_run(tmp_path)
    whole = RouterTask(config, CPU).evaluate(0)
    task = RouterTask(config.model_copy(update={"router": fake.make_config(tmp_path, router__train__micro_batch=2).router}), CPU)
    sizes, logits = [], task._logits
    monkeypatch.setattr(task, "_logits", lambda model, batch: sizes.append(len(batch["label"])) or logits(model, batch))
    assert dict(figures(task.evaluate(0))) == pytest.approx(dict(figures(whole)), rel=1e-5)
    assert set(sizes) == {2}
    monkeypatch.setattr(router_task, "VALIDATION_ROWS", 4)  # the first ones, all of cluster 0
    assert task.evaluate(0)["prior"] == 1
    task.train.labels[:] = 2
    assert task.evaluate(0)["prior"] == 0


SETTINGS = ("router.train.images=2400", "router.train.learning_rate=0.003", "router.train.checkpoint_images=null")


def of_two(path, *sets, confused=0):
    """The router of the first two clusters, trained and handed over; and its config. So many rows of each of these may be the other's."""
    config = fake.make_run(path)
    if confused:
        rows = [fake.rows_of(k, 800) for k in range(3)]
        for column in ("latent", "text", "text_len"):
            own, other = (rows[k][column][:confused].copy() for k in (0, 1))
            rows[0][column][:confused], rows[1][column][:confused] = other, own
        for k in range(3):
            rows[k]["split"] = ["validation" if i % 4 == 3 else "train" for i in range(800)]
            fake.write_shard(Folder(path), k, rows[k], config=config)
    two = configs.load("tiny", [f"run_dir={path}", "experts=[{}, {}]", *SETTINGS, *sets])
    worker.run(two, "router", Place(CPU))
    shutil.copytree(path / "router" / "export", path / "routers" / "2")
    return two


def of_three(path, *sets):
    grown = ("experts=[{}, {}, {}]", "partition.added=1", f"router.init_from={path}/routers/2")
    return configs.load("tiny", [f"run_dir={path}", *grown, *SETTINGS, *sets])


def test_a_grown_router_says_of_the_old_clusters_what_it_said(tmp_path):
    two = of_two(tmp_path)
    before = RouterTask(two, CPU)
    weights = load_file(str(tmp_path / "routers" / "2" / "pytorch_model.safetensors"))
    before.model.load_state_dict(weights)
    shutil.rmtree(tmp_path / "router")
    grown = RouterTask(of_three(tmp_path), CPU)
    draw = Draws(0, "router", before.rows, before.shape, before.dropout)(0, 32)
    batch = before.batch(draw)
    with torch.no_grad():
        p, q = before._logits(before.model, batch).double().softmax(1), grown._logits(grown.model, batch).double().softmax(1)
    torch.testing.assert_close(q[:, 0] / q[:, 1], p[:, 0] / p[:, 1], rtol=1e-4, atol=0)
    assert 0 < q[:, 2].max() <= 0.01 + 1e-9


def test_a_new_cluster_is_learnt_and_the_old_ones_are_not_forgotten(tmp_path):
    """Of the old ones, one row in six is the other's in truth, so that there is a loss to compare: 0.45 nats at best."""
    two = of_two(tmp_path, confused=133)
    before = checkpoint.read_metrics(Folder(tmp_path) / "router")[-1]
    assert 0.4 < before["validation_loss"] < 0.6
    shutil.rmtree(tmp_path / "router")
    three = of_three(tmp_path)
    worker.run(three, "router", Place(CPU))
    task = RouterTask(three, CPU)
    task.model.load_state_dict(load_file(str(tmp_path / "router" / "export" / "pytorch_model.safetensors")))
    rows = task.validation
    assert rows.labels.tolist() == 200 * [0] + 200 * [1] + 200 * [2]  # the first 400 are those of before, with the same noises
    task.validation = rows.take(torch.arange(400))
    assert len(RouterTask(two, CPU).validation) == 400
    assert task.evaluate(0)["validation_loss"] <= 1.01 * before["validation_loss"]
    task.validation = rows.take(torch.arange(400, 600))
    assert task.evaluate(0)["accuracy"] > 0.95


def test_a_router_that_is_gone_is_not_needed_once_training_has_begun(tmp_path):
    of_two(tmp_path, "router.train.images=16")
    shutil.rmtree(tmp_path / "router")
    worker.run(of_three(tmp_path, "router.train.images=16"), "router", Place(CPU))
    shutil.rmtree(tmp_path / "routers")
    assert worker.run(of_three(tmp_path, "router.train.images=16"), "router", Place(CPU))["images"] == 16


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["router.model.hidden_size=48"], r"routers/2 has another shape than router.model and router.text \(cls_token"),
        (["router.text=none"], "has another shape"),
        (["router.init_from=nowhere"], "router.init_from: "),
    ],
)
def test_a_router_that_does_not_fit_is_refused(tmp_path, sets, said):
    of_two(tmp_path, "router.train.images=16")
    shutil.rmtree(tmp_path / "router")
    with pytest.raises(ConfigError, match=said):
        RouterTask(of_three(tmp_path, *sets), CPU)
    with pytest.raises(ConfigError, match=r"knows 2 experts, the run has 1"):
        start_from(Router(1, fake.SIDE), str(tmp_path / "routers" / "2"), fake.SIDE)

"""Training an expert in this process: objectives, text, validation, samples, export."""

from __future__ import annotations

import json

import fake_training_run as fake
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from paris_ray.diffusion.path import CosineSchedule
from paris_ray.models.dit import DiT
from paris_ray.storage import Folder
from paris_ray.training import checkpoint, worker
from paris_ray.training.draws import Draws
from paris_ray.training.expert_task import ExpertTask
from paris_ray.training.loop import Place

CPU = torch.device("cpu")


def draw_of(task, n=12):
    return Draws(0, task.stage, task.rows, task.shape, task.dropout)(0, n)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return fake.make_run(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("k", [0, 1])  # flow, ddpm
def test_loss_is_the_objective_written_out(config, k):
    task = ExpertTask(config, k, CPU)
    with torch.no_grad():
        task.model.final_layer.linear.weight.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    draw = draw_of(task)
    losses, times = task.losses(task.model, task.batch(draw))
    sigmoid_of_normal = torch.sigmoid(torch.distributions.Normal(0, 1).icdf(torch.from_numpy(draw.u).double())).float()
    expected = sigmoid_of_normal if config.experts[k].train.timesteps == "logit_normal" else torch.from_numpy(draw.u)
    torch.testing.assert_close(times, expected, rtol=1e-4, atol=1e-6)
    for i in range(len(draw.rows)):
        x0, noise, t = task.train.latents[draw.rows[i]].float(), torch.from_numpy(draw.noise[i]), times[i]
        if k == 0:
            x, target = (1 - t) * x0 + t * noise, noise - x0
        else:
            alpha, sigma = CosineSchedule().alpha_sigma(t)
            x, target = alpha * x0 + sigma * noise, noise
        text = task.encoders.null_states if draw.dropped[i] else task.train.text[draw.rows[i]].float()
        with torch.no_grad():
            output = task.model(x[None], t[None], text[None])[0]
        torch.testing.assert_close(losses[i].detach(), (output - target).square().mean(), rtol=1e-4, atol=1e-5)


def test_some_captions_are_dropped_and_only_some(config):
    task = ExpertTask(config, 0, CPU)
    draw = draw_of(task, 400)
    text = task.text(task.batch(draw))
    dropped = np.array([torch.equal(states, task.encoders.null_states) for states in text])
    assert np.array_equal(dropped, draw.dropped)
    assert 20 <= dropped.sum() <= 60


def test_token_ids_are_encoded_as_they_come(config, monkeypatch):
    """The same losses whether states were stored or come from the encoder."""
    task = ExpertTask(config, 0, CPU)
    draw = draw_of(task)
    stored = task.losses(task.model, task.batch(draw))[0]
    table = task.train.text.float()

    class Encoder:
        def encode(self, ids, lengths):
            return table[ids[:, 0].long()]

    rows = task.train
    ids = torch.arange(len(rows), dtype=torch.int32)[:, None].expand(-1, fake.T)
    task.train = type(rows)(rows.ids, rows.latents, None, ids, rows.text_len, rows.labels)
    task.text_encoder = Encoder()
    assert torch.equal(task.losses(task.model, task.batch(draw))[0], stored)


def test_initial_weights_are_the_experts_own_and_leave_torchs_generator_alone(config):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one, again = (ExpertTask(config, 0, CPU).model.state_dict() for _ in range(2))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(one[name], again[name]) for name in one)
    other = ExpertTask(config, 1, CPU).model.state_dict()
    assert not torch.equal(one["t_block.1.weight"], other["t_block.1.weight"])


@pytest.mark.parametrize("k", [0, 1])
def test_learns_and_hands_over(tmp_path, k):
    config = fake.make_run(
        tmp_path,
        expert__train__images=1280,
        expert__train__learning_rate=3e-3,
        expert__train__sample_images=640,
        expert__train__checkpoint_images=640,
    )
    counts = worker.run(config, f"expert-{k}", Place(CPU))
    folder = Folder(config.run_dir) / "experts" / str(k)
    lines = checkpoint.read_metrics(folder)
    watched = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert len(watched) == 2
    # Predicting zero costs Var(ε) + E[x_0²] for flow, Var(ε) for noise prediction.
    rows = fake.rows_of(k)
    zero = 1 + (np.square(rows["latent"].astype(np.float64)).mean() if k == 0 else 0)
    assert watched[-1] < watched[0] < zero
    assert watched[-1] < 0.75 * zero
    assert counts["images"] == 1280
    assert counts["rows"] == 36
    assert counts["restarts"] == 0
    assert counts["validation_loss"] == watched[-1]
    assert [entry.name for entry in (folder / "samples").files()] == ["images-000000640.png", "images-000001280.png"]
    exported = load_file((folder / "export").local_copy("diffusion_pytorch_model.safetensors"))
    ema = checkpoint.latest(folder).tensors("ema")
    assert exported.keys() == ema.keys()
    assert all(torch.equal(exported[name], ema[name]) for name in ema)
    said = json.loads((folder / "export").read_bytes("config.json"))
    keys = (
        "image_size",
        "patch_size",
        "in_channels",
        "out_channels",
        "hidden_size",
        "num_layers",
        "num_heads",
        "mlp_ratio",
        "text_embed_dim",
        "norm_eps",
    )
    DiT(**{key: said[key] for key in keys}).load_state_dict(exported, strict=True)
    assert (said["objective"], said["expert_id"]) == (["flow", "ddpm"][k], k)


def test_validation_takes_a_micro_batch_at_once(config, monkeypatch):
    task = ExpertTask(config, 0, CPU)
    whole = task.validate()
    few = ExpertTask(fake.make_config(config.run_dir, expert__train__micro_batch=2), 0, CPU)
    sizes, losses = [], few.losses
    monkeypatch.setattr(few, "losses", lambda model, batch: sizes.append(len(batch["latent"])) or losses(model, batch))
    found = few.validate()
    assert found["validation_loss_by_time"] == pytest.approx(whole["validation_loss_by_time"], rel=1e-5)
    assert set(sizes) == {2}


def test_samples_are_the_same_every_time(tmp_path):
    from paris_ray.training.samples import write_grid

    config = fake.make_run(tmp_path)
    task = ExpertTask(config, 1, CPU)
    pictures = []
    for _ in range(2):
        write_grid(task, 8)
        pictures.append((task.folder / "samples").read_bytes("images-000000008.png"))
    assert pictures[0] == pictures[1]


def test_a_shard_without_validation_rows_trains(tmp_path):
    config = fake.make_run(tmp_path, experts=())
    rows = fake.rows_of(0)
    fake.write_shard(Folder(config.run_dir), 0, {**rows, "split": ["train"] * fake.ROWS})
    counts = worker.run(config, "expert-0", Place(CPU))
    assert counts["validation_loss"] is None
    assert counts["rows"] == 40

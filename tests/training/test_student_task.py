"""A student against a teacher written out by hand, against itself, and killed; and what makes it stale."""

from __future__ import annotations

import fake_training_run as fake
import pytest
import torch
from safetensors.torch import save_file

from paris_ray import stages
from paris_ray.config import ConfigError
from paris_ray.layout import router_config
from paris_ray.manifest import Stage, StaleError
from paris_ray.models import DiT, Router
from paris_ray.storage import Folder
from paris_ray.training import checkpoint, worker
from paris_ray.training.draws import Draws
from paris_ray.training.expert_task import ExpertTask
from paris_ray.training.loop import Loop, Place
from paris_ray.training.saver import Saver
from paris_ray.training.student_task import StudentTask, Teacher, student_stage

CPU = torch.device("cpu")
SHAPE = {"image_size": fake.SIDE, "in_channels": fake.CHANNELS, "text_embed_dim": fake.WIDTH}
SMALL = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "patch_size": 2}
BUDGET = {"images": 96, "batch_size": 8, "checkpoint_images": 32, "log_images": 16, "warmup_images": 16, "ema_half_life_images": 40}


def run(path, **sets):
    """One expert of the whole corpus, of captions that are often dropped."""
    of_one = {"experts": 1, "partition__method": "random", "expert__caption_dropout": 0.4, "expert__train__timesteps": "uniform"}
    budget = {f"expert__train__{key}": value for key, value in BUDGET.items()}
    shape = {f"expert__model__{key}": value for key, value in SMALL.items()}
    fake.make_run(path, (0,))
    return fake.make_config(path, **of_one, **budget, **shape, **sets)


def random_weights(module, seed, scale=0.3):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=g))
    return module


def network(folder: Folder, module, name, config):
    folder.write_json("config.json", config)
    save_file({key: value.contiguous() for key, value in module.state_dict().items()}, folder.local_copy(name))


def write_teacher(config, folder: Folder, experts, router, objective="flow"):
    """A model that assemble would have made of these networks, with the run's own encoders."""
    meta = (Folder(config.run_dir) / "encoders").read_json("encoders.json")
    for k, module in enumerate(experts):
        shape = {"hidden_size": module.patch_embed.weight.shape[0], "num_layers": len(module.layers), "num_heads": 2, "patch_size": 2}
        said = {"model_type": "dit_expert", "architecture": "dit", **SHAPE, **shape, "out_channels": fake.CHANNELS, "mlp_ratio": 4.0}
        network(folder / f"expert_{k}", module, "diffusion_pytorch_model.safetensors", {**said, "objective": objective, "noise_schedule": "cosine"})
    network(folder / "router", router, "pytorch_model.safetensors", router_config(router))
    info = {
        "format": 1, "name": "teacher", "num_experts": len(experts), "image_size": 32, "latent": {"channels": fake.CHANNELS, "size": fake.SIDE},
        "codec": meta["codec"], "text": meta["text"], "router": {"text": "none" if router.text_embed_dim is None else "pooled"},
        "sampling": {"steps": 2, "guidance_scale": 7.5, "routing": "top-2", "solver": "euler"}, "experts": [{"objective": objective}] * len(experts),
    }  # fmt: skip
    folder.write_json("paris.json", info)
    Stage("assemble", folder, {}, {}).publish()
    return folder


def dit(seed):
    return random_weights(DiT(out_channels=fake.CHANNELS, **SHAPE, **SMALL), seed)


def some_router(experts=3, text=True, seed=0):
    shape = {**SHAPE, **SMALL, "text_embed_dim": fake.WIDTH if text else None}
    return random_weights(Router(experts, **shape), seed, 0.4)


def draw_of(task, n=12):
    return Draws(0, task.stage, task.rows, task.shape, task.dropout)(0, n)


@pytest.mark.parametrize(("text", "seed"), [(True, 0), (False, 2)])  # of routers whose second and third choice are well apart
def test_one_step_is_the_distance_to_the_mixture_written_out(tmp_path, text, seed):
    """Row by row: the router's two most probable experts, their probabilities renormalised, no guidance; then the loss and its gradient."""
    config = run(tmp_path / "run")
    networks, router = [dit(k) for k in range(3)], some_router(text=text, seed=seed)
    task = StudentTask(config, 0, CPU, 0, write_teacher(config, Folder(tmp_path / "teacher"), networks, router))
    random_weights(task.model, 11, 0.1)
    draw = draw_of(task)
    assert 2 <= draw.dropped.sum() <= 10
    losses, times = task.losses(task.model, task.batch(draw))
    losses.mean().backward()
    learnt = {name: p for name, p in task.model.named_parameters() if p.grad is not None}
    ours = {name: p.grad.clone() for name, p in learnt.items()}
    task.model.zero_grad()
    expected, pairs = [], set()
    for i, row in enumerate(draw.rows):
        t = torch.tensor(draw.u[i])
        x = ((1 - t) * task.train.latents[row].float() + t * torch.from_numpy(draw.noise[i]))[None]
        states = task.encoders.null_states if draw.dropped[i] else task.train.text[row].float()
        pooled = states[: 2 if draw.dropped[i] else int(task.train.text_len[row])].mean(0)  # the empty caption has two tokens here
        with torch.no_grad():
            p = (router(x, t[None], pooled[None]) if text else router(x, t[None]))[0].softmax(0)
            first, second = p.argsort(descending=True)[:2].tolist()
            target = sum(p[k] * networks[k](x, t[None], states[None])[0] for k in (first, second)) / (p[first] + p[second])
        pairs.add(frozenset((first, second)))
        expected.append((task.model(x, t[None], states[None])[0] - target).square().mean())
    assert len(pairs) > 1
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert torch.equal(times, torch.from_numpy(draw.u))
    torch.stack(expected).mean().backward()
    assert learnt.keys() > {"patch_embed.weight", "text_proj.weight", "final_layer.linear.bias"}
    for name, p in learnt.items():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_a_teacher_with_the_students_weights_leaves_nothing_to_learn(tmp_path):
    """And the flow's own target is far from it, on the rows of validation as well."""
    config = run(tmp_path / "run")
    own = dit(5)
    teacher = write_teacher(config, Folder(tmp_path / "teacher"), [own, own], some_router(2))
    task, plain = StudentTask(config, 0, CPU, 0, teacher), ExpertTask(config, 0, CPU)
    for one in (task, plain):
        one.model.load_state_dict(own.state_dict())
    draw = draw_of(task)
    losses, _ = task.losses(task.model, task.batch(draw))
    assert losses.max() < 1e-9 < 0.1 < plain.losses(plain.model, plain.batch(draw))[0].min()
    assert task.validate()["validation_loss"] < 1e-9
    losses.sum().backward()
    assert max(p.grad.abs().max() for p in task.model.parameters() if p.grad is not None) < 1e-3


def test_it_draws_what_ordinary_training_draws(tmp_path):
    config = run(tmp_path / "run")
    task, plain = (
        StudentTask(config, 0, CPU, 0, write_teacher(config, Folder(tmp_path / "teacher"), [dit(0), dit(1)], some_router(2))),
        ExpertTask(config, 0, CPU),
    )
    assert all(torch.equal(a, b) for a, b in zip(task.model.state_dict().values(), plain.model.state_dict().values(), strict=True))
    draw = draw_of(task)
    one, other = task.batch(draw), plain.batch(draw)
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_captions_that_are_encoded_as_they_come_give_the_same_losses(tmp_path):
    config = run(tmp_path / "run")
    task = StudentTask(config, 0, CPU, 0, write_teacher(config, Folder(tmp_path / "teacher"), [dit(0), dit(1), dit(2)], some_router()))
    draw = draw_of(task)
    stored, rows = task.losses(task.model, task.batch(draw))[0], task.train

    class Encoder:
        def encode(self, ids, lengths):
            return rows.text.float()[ids[:, 0].long()]

    ids = torch.arange(len(rows), dtype=torch.int32)[:, None].expand(-1, fake.T)
    task.train, task.text_encoder = type(rows)(rows.ids, rows.latents, None, ids, rows.text_len, rows.labels), Encoder()
    assert torch.equal(task.losses(task.model, task.batch(draw))[0], stored)


@pytest.mark.parametrize("objective", ["flow", "ddpm"])
def test_in_bfloat16_noise_is_predicted_in_float32_all_the_same(tmp_path, objective):
    """Near t = 1 an error of it is a hundred times as large in the velocity."""
    config = run(tmp_path / "run")
    teacher = Teacher(write_teacher(config, Folder(tmp_path / "teacher"), [dit(0)] * 2, some_router(2), objective), CPU)
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(4, fake.CHANNELS, fake.SIDE, fake.SIDE, generator=g), torch.randn(4, fake.T, fake.WIDTH, generator=g)
    given = x, torch.tensor([0.1, 0.5, 0.9, 0.99]), text, text.mean(1)
    exact = teacher(*given)
    with torch.autocast("cpu", torch.bfloat16):
        found = teacher(*given)
    error = (found - exact).abs().max() / exact.abs().max()
    assert error < 1e-5 if objective == "ddpm" else 1e-4 < error < 0.1


class Killed(Exception):
    pass


def kill(monkeypatch, at, config, teacher):
    """Train until a step."""
    step = Loop._step

    def or_die(self, batch):
        if self.images == at:
            raise Killed
        step(self, batch)

    with monkeypatch.context() as changed:
        changed.setattr(Loop, "_step", or_die)
        with pytest.raises(Killed):
            worker.run(config, "expert-0", Place(CPU), teacher=teacher)


def test_killed_it_goes_on_as_if_nothing_had_been(tmp_path, monkeypatch):
    """To the bit; and what it hands over is not what the data alone would have taught."""
    monkeypatch.setattr(Saver, "ready", lambda self: self.wait() is None)
    configs = {name: run(tmp_path / name) for name in ("straight", "killed", "untaught")}
    straight, killed, untaught = (Folder(config.run_dir) / "experts/0" for config in configs.values())
    teacher = write_teacher(configs["straight"], Folder(tmp_path / "teacher"), [dit(k) for k in range(3)], some_router())
    kill(monkeypatch, 56, configs["killed"], teacher)
    assert checkpoint.latest(killed).images == 32
    for name, config in configs.items():
        worker.run(config, "expert-0", Place(CPU), teacher=None if name == "untaught" else teacher)
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        assert checkpoint.latest(killed).folder.read_bytes(name) == checkpoint.latest(straight).folder.read_bytes(name), name
    handed = [(one / "export").read_bytes("diffusion_pytorch_model.safetensors") for one in (straight, killed, untaught)]
    assert handed[0] == handed[1] != handed[2]
    losses = [[line["loss"] for line in checkpoint.read_metrics(one)] for one in (straight, killed)]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


def test_another_teacher_makes_it_stale(tmp_path):
    config = run(tmp_path / "run")
    teacher = write_teacher(config, Folder(tmp_path / "teacher"), [dit(0), dit(1)], some_router(2))
    stage = student_stage(config, "expert-0", teacher)
    stage.begin()
    stage.publish(worker.run(config, "expert-0", Place(CPU), teacher=teacher), result="export/")
    assert student_stage(config, "expert-0", teacher).begin().state == "valid"
    moved = dit(0)
    moved.final_layer.linear.bias.data[0] += 1e-3
    write_teacher(config, teacher, [moved, dit(1)], some_router(2))
    with pytest.raises(StaleError, match=r"parents\.teacher: "):
        student_stage(config, "expert-0", teacher).begin()
    assert stages.stage(config, "expert-0").status().state == "stale"  # nor is it what the data taught


def test_what_no_student_can_learn_from_is_refused(tmp_path):
    config = run(tmp_path / "run")
    folder = write_teacher(config, Folder(tmp_path / "teacher"), [dit(0), dit(1)], some_router(2))
    said = folder.read_json("paris.json")
    folder.write_json("paris.json", {**said, "sampling": {**said["sampling"], "routing": "caption"}})
    with pytest.raises(ConfigError, match="draws an expert for a whole picture"):
        Teacher(folder, CPU)
    folder.write_json("paris.json", {**said, "codec": {**said["codec"], "fingerprint": "another"}})
    with pytest.raises(ConfigError, match="has another codec than"):
        StudentTask(config, 0, CPU, 0, folder)
    folder.write_json("paris.json", said)
    with pytest.raises(ConfigError, match="objective is ddpm; a student learns a velocity"):
        StudentTask(fake.make_config(config.run_dir, experts=1, partition__method="random", expert__objective="ddpm"), 0, CPU, 0, folder)

"""The loop against closed forms, torch's own optimiser and schedule, and itself after interruptions."""

from __future__ import annotations

import math
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn

from paris_ray.config import ConfigError, TrainConfig
from paris_ray.diffusion.path import Flow
from paris_ray.storage import Folder
from paris_ray.training import checkpoint, saver
from paris_ray.training.draws import Draws
from paris_ray.training.loop import BrokenRowsError, Loop, NonFiniteError, Place, learning_rate, optimizer_for
from paris_ray.training.saver import CheckpointError, Saver
from paris_ray.training.termination import TerminatedError

CPU = torch.device("cpu")
READY = Saver.ready


@pytest.fixture(autouse=True)
def every_checkpoint(monkeypatch):
    """These networks train faster than a disk writes: no checkpoint is left out for that."""
    monkeypatch.setattr(Saver, "ready", lambda self: self.wait() is None)


class GaussianTask:
    """Flow matching on rows of a two-dimensional normal distribution, with a small MLP."""

    stage, shape, dropout, flops = "expert-0", (2,), 0.25, 6000

    def __init__(self, rows: int = 50, width: int = 16, init: int = 0):
        g = torch.Generator().manual_seed(0)
        self.data = torch.tensor([1.0, -0.5]) + 0.7 * torch.randn(rows, 2, generator=g)
        self.rows, self.ids = rows, [f"row {i}" for i in range(rows)]
        torch.manual_seed(init)
        self.model: nn.Module = nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))
        self.seen: list[dict[str, torch.Tensor]] = []
        self.poison_at: int | None = None
        self.evaluated: list[int] = []

    def batch(self, draw):
        rows = torch.from_numpy(draw.rows)
        return {"x0": self.data[rows], "noise": torch.from_numpy(draw.noise), "u": torch.from_numpy(draw.u), "rows": rows}

    def losses(self, model, batch):
        self.seen.append(batch)
        x, t, target = Flow().training_pair(batch["x0"], batch["noise"], batch["u"])
        loss = (model(torch.cat([x, t[:, None]], 1)) - target).square().mean(1)
        if self.poison_at is not None and len(self.seen) == self.poison_at:
            loss = loss * torch.nan
        return loss, t

    def evaluate(self, images):
        self.evaluated.append(images)
        return {"validation_loss": 1.0}


def config(**changes) -> TrainConfig:
    settings = {
        "images": 160, "batch_size": 8, "learning_rate": 1e-2, "schedule": "cosine", "warmup_images": 24, "weight_decay": 0.1,
        "ema_half_life_images": 40, "checkpoint_images": 40, "log_images": 16,
    }  # fmt: skip
    return TrainConfig(**{**settings, **changes})


def weights(loop: Loop) -> dict[str, torch.Tensor]:
    return {**{f"m.{k}": v.clone() for k, v in loop.task.model.state_dict().items()}, **{f"e.{k}": v.clone() for k, v in loop.ema.weights.items()}}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Killed(Exception):
    pass


def killed_at(images: int):
    def on_step(now, line):
        if now == images:
            raise Killed

    return on_step


def without_clocks(lines):
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second", "data_wait")} for line in lines]


def test_learning_rate_follows_torch_schedulers():
    settings = config(images=800, warmup_images=80)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=settings.learning_rate)
    warm, steps = 10, 100
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps - warm)
    for step in range(steps):
        ours = learning_rate(settings, (step + 1) * 8, 800)
        if step < warm:
            assert ours == pytest.approx(settings.learning_rate * (step + 1) / warm)
        else:
            assert ours == pytest.approx(cosine.get_last_lr()[0], rel=1e-6)
            optimizer.step()
            cosine.step()
    assert learning_rate(settings.model_copy(update={"schedule": "constant"}), 800, 800) == settings.learning_rate


def test_loop_is_adamw_with_clipping_and_average(tmp_path):
    """The whole loop against a plain one with torch's unfused AdamW, its clipping, and averages by their definition."""
    settings = config(clip_norm=0.5)
    loop = Loop(GaussianTask(), settings, seed=3, folder=Folder(tmp_path))
    loop.run()
    task = GaussianTask()
    draws = Draws(3, "expert-0", task.rows, (2,), task.dropout)
    matrices = [p for p in task.model.parameters() if p.ndim == 2]
    biases = [p for p in task.model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.999), foreach=False, fused=False)
    average = [p.detach().double() for p in task.model.parameters()]
    for images in range(8, 161, 8):
        losses, _ = task.losses(task.model, task.batch(draws(images - 8, images)))
        optimizer.zero_grad()
        losses.mean().backward()
        nn.utils.clip_grad_norm_(task.model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, images, 160)
        optimizer.step()
        kept = 0.5 ** (8 / min(40, 0.1 * images))
        average = [kept * a + (1 - kept) * p.detach().double() for a, p in zip(average, task.model.parameters(), strict=True)]
    for ours, theirs in zip(loop.task.model.parameters(), task.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)
    for ours, theirs in zip(loop.ema.weights.values(), average, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-4, atol=2e-5)


def test_gradients_below_the_limit_are_left_alone_to_the_bits_of_torchs_clipping(tmp_path, monkeypatch):
    ours = Loop(GaussianTask(), config(clip_norm=1.0), 3, Folder(tmp_path / "ours"))
    asked, clips = [], ours._clips
    ours._clips = lambda *given: asked.append(clips(*given)) or asked[-1]
    ours.run()
    assert {True, False} == set(asked)
    always = Loop(GaussianTask(), config(clip_norm=1.0), 3, Folder(tmp_path / "always"))
    always._clips = lambda *_: True
    always.run()
    assert same(weights(ours), weights(always))


def test_decay_only_pulls_on_matrices():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    model.register_parameter("scale_shift_table", nn.Parameter(torch.zeros(6, 2)))
    optimizer = optimizer_for(model, config(weight_decay=0.3))
    decayed = [p for group in optimizer.param_groups if group["weight_decay"] == 0.3 for p in group["params"]]
    assert [id(p) for p in decayed] == [id(model[0].weight)]


@pytest.mark.parametrize("stop", [8, 39 + 1, 48, 120, 152])
def test_resume_is_bit_equal_and_metrics_have_neither_gaps_nor_doubles(tmp_path, stop):
    straight = Loop(GaussianTask(), config(), seed=1, folder=Folder(tmp_path / "straight"))
    straight.run()
    folder = Folder(tmp_path / "killed")
    with pytest.raises(Killed):
        Loop(GaussianTask(), config(), 1, folder, on_step=killed_at(stop)).run()
    # Where there is a checkpoint, other initial weights do not matter.
    again = Loop(GaussianTask(init=99 if stop > 40 else 0), config(), 1, folder)
    assert again.images == (stop - 1) // 40 * 40
    again.run()
    assert same(weights(straight), weights(again))
    lines = checkpoint.read_metrics(folder)
    assert [line["images"] for line in lines] == [16, 32, 40, 48, 64, 80, 96, 112, 120, 128, 144, 160]
    assert without_clocks(lines) == without_clocks(checkpoint.read_metrics(Folder(tmp_path / "straight")))


@pytest.mark.parametrize("stop", [8, 24, 32, 40, 88, 152])
def test_asked_to_go_it_leaves_a_checkpoint_where_it_is_and_goes_on_as_if_nothing_had_been(tmp_path, stop):
    straight = Loop(GaussianTask(), config(), seed=1, folder=Folder(tmp_path / "straight"))
    straight.run()
    folder, at = Folder(tmp_path / "asked"), []
    first = Loop(GaussianTask(), config(), 1, folder, on_step=lambda images, line: at.append(images), asked_to_go=lambda: at[-1:] == [stop])
    with pytest.raises(TerminatedError, match=f"a checkpoint at image {stop} is written"):
        first.run()
    again = Loop(GaussianTask(init=99), config(), 1, folder)
    assert again.images == stop
    again.run()
    assert same(weights(straight), weights(again))
    assert without_clocks(checkpoint.read_metrics(folder)) == without_clocks(checkpoint.read_metrics(Folder(tmp_path / "straight")))
    # Asked with the last step: there is nothing more to do than to end.
    last = Loop(GaussianTask(), config(), 1, Folder(tmp_path / "last"), asked_to_go=lambda: last.images == 160)
    assert last.run()["images"] == 160


def lose_saves(monkeypatch, count):
    """The first so many checkpoints are not written; the images of each try, as they come."""
    save, tries = checkpoint.save, []

    def lost(stage, images, *rest):
        tries.append(images)
        if len(tries) <= count:
            raise ConnectionResetError("lost")
        save(stage, images, *rest)

    monkeypatch.setattr(checkpoint, "save", lost)
    return tries


def test_asked_to_go_while_the_store_fails_it_tries_once_and_goes(tmp_path, monkeypatch):
    """Not waiting out a pause of up to a minute, of which a cloud gives half."""
    tries = lose_saves(monkeypatch, 2)
    monkeypatch.setattr(saver, "FIRST_PAUSE_S", 60.0)
    monkeypatch.setattr(Saver, "ready", READY)
    began = time.monotonic()
    settings = config(checkpoint_images=40, log_images=200)
    loop = Loop(GaussianTask(), settings, 1, Folder(tmp_path), asked_to_go=lambda: loop.images >= 48 and bool(tries))
    # The second try, at once, fails as well; that is the end, and nothing hides it.
    with pytest.raises(CheckpointError, match="image 40 cannot be written"):
        loop.run()
    assert tries == [40, 40]
    assert time.monotonic() - began < 20


def test_asked_to_go_with_time_left_it_outlasts_a_store_that_is_away(tmp_path, monkeypatch):
    tries = lose_saves(monkeypatch, 3)
    monkeypatch.setattr(saver, "FIRST_PAUSE_S", 0.01)
    loop = Loop(GaussianTask(), config(), 1, Folder(tmp_path), asked_to_go=lambda: loop.images == 24, seconds_left=lambda: 60.0)
    with pytest.raises(TerminatedError, match="a checkpoint at image 24 is written"):
        loop.run()
    assert tries == [24] * 4
    assert checkpoint.latest(Folder(tmp_path)).images == 24


def test_a_checkpoint_that_fails_at_the_end_does_not_hide_what_ended_training(tmp_path, monkeypatch, capsys):
    def lost(stage, images, *rest):
        raise ConnectionResetError("lost")

    monkeypatch.setattr(checkpoint, "save", lost)
    monkeypatch.setattr(saver, "FIRST_PAUSE_S", 60.0)
    monkeypatch.setattr(Saver, "ready", READY)
    task = GaussianTask()
    task.poison_at = 7
    with pytest.raises(NonFiniteError, match="at image 56"):
        Loop(task, config(), 1, Folder(tmp_path)).run()
    assert "expert-0: checkpoint at image 40 cannot be written to" in capsys.readouterr().out


def test_a_value_that_is_not_finite_is_not_saved_when_asked_to_go(tmp_path):
    """As on a GPU, where it was not seen yet."""
    task = GaussianTask()
    task.poison_at = 4
    loop = Loop(task, config(log_images=40), 1, Folder(tmp_path), check_each_step=False, asked_to_go=lambda: loop.images == 32)
    with pytest.raises(NonFiniteError, match="at image 32 "):
        loop.run()
    assert checkpoint.latest(Folder(tmp_path)) is None


def test_finished_run_has_nothing_to_do(tmp_path):
    first = Loop(GaussianTask(), config(), 1, Folder(tmp_path))
    line = first.run()
    second = Loop(GaussianTask(init=5), config(), 1, Folder(tmp_path))
    assert second.run() == line
    assert second.task.seen == []
    assert same(weights(first), weights(second))


def test_damaged_checkpoint_is_trained_again_from_the_one_before(tmp_path):
    straight = Loop(GaussianTask(), config(), 1, Folder(tmp_path / "a"))
    straight.run()
    with pytest.raises(Killed):
        Loop(GaussianTask(), config(), 1, Folder(tmp_path / "b"), on_step=killed_at(136)).run()
    newest = tmp_path / "b" / "checkpoints" / "images-000000120" / "ema.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"\xff")
    with pytest.warns(RuntimeWarning, match="images-000000120 is passed over: ema.safetensors has another checksum"):
        again = Loop(GaussianTask(), config(), 1, Folder(tmp_path / "b"))
    assert again.images == 80
    again.run()
    assert same(weights(straight), weights(again))
    assert without_clocks(checkpoint.read_metrics(Folder(tmp_path / "b"))) == without_clocks(checkpoint.read_metrics(Folder(tmp_path / "a")))


def test_two_ranks_draw_what_one_draws(tmp_path):
    one = GaussianTask()
    Loop(one, config(), 1, Folder(tmp_path / "one")).run()
    ranks = []
    for rank in (0, 1):
        task = GaussianTask()
        loop = Loop(task, config(), 1, Folder(tmp_path / f"rank{rank}"), Place(CPU, rank, 2))
        ranks.append([loop._prepare(start) for start in range(0, 160, 8)])
    for whole, first, second in zip(one.seen, *ranks, strict=True):
        for name, value in whole.items():
            assert torch.equal(value, torch.cat([first[name], second[name]]))


def test_batch_must_divide_by_the_workers(tmp_path):
    with pytest.raises(ConfigError, match=r"train.batch_size 8 must be a multiple of resources.num_workers 3"):
        Loop(GaussianTask(), config(), 1, Folder(tmp_path), Place(CPU, 0, 3))


def test_an_epoch_visits_each_row_once_and_draws_are_those_of_the_index():
    draws = Draws(5, "expert-1", rows=30, shape=(3,), dropout=0.25)
    draw = draws(0, 90)
    for epoch in range(3):
        assert sorted(draw.rows[30 * epoch : 30 * epoch + 30]) == list(range(30))
    assert not np.array_equal(draw.rows[:30], draw.rows[30:60])
    later = Draws(5, "expert-1", rows=30, shape=(3,), dropout=0.25)(57, 64)
    for name in ("rows", "u", "dropped", "noise"):
        assert np.array_equal(getattr(later, name), getattr(draw, name)[57:64])
    sibling = Draws(5, "expert-2", rows=30, shape=(3,), dropout=0.25)(0, 90)
    assert not np.array_equal(sibling.noise, draw.noise)
    assert not np.array_equal(sibling.rows, draw.rows)


def test_draws_are_distributed_as_they_should_be():
    from scipy import stats

    draw = Draws(11, "router", rows=100, shape=(2,), dropout=0.1)(0, 20_000)
    assert stats.kstest(draw.noise.ravel(), "norm").pvalue > 1e-3
    assert stats.kstest(draw.u, "uniform").pvalue > 1e-3
    assert draw.dropped.mean() == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / 20_000))
    assert abs(np.corrcoef(draw.u, draw.noise[:, 0])[0, 1]) < 0.03


def test_non_finite_loss_stops_before_the_update(tmp_path):
    task = GaussianTask()
    task.poison_at = 7
    loop = Loop(task, config(), 1, Folder(tmp_path))
    before = {}
    loop.on_step = lambda images, line: before.update({images: weights(loop)})
    with pytest.raises(NonFiniteError, match=r"expert-0: not a finite number at image 56 .*learning_rate \(now 0.01\).*warmup_images") as caught:
        loop.run()
    assert not isinstance(caught.value, BrokenRowsError)
    assert same(weights(loop), before[48])
    assert checkpoint.latest(Folder(tmp_path)).images == 40


@pytest.mark.parametrize("check_each_step", [True, False])
def test_a_row_that_is_no_number_is_named_with_the_step_that_read_it(tmp_path, check_each_step):
    """Of several it is the first in the order of the draws; other rows of the step are not named."""
    task = GaussianTask()
    task.data[[13, 31]] = torch.tensor([[torch.nan, 0.0], [0.0, torch.inf]])
    order = Draws(1, task.stage, task.rows, task.shape, task.dropout)(0, task.rows).rows.tolist()
    first = min(order.index(13), order.index(31)) // 8 * 8  # the step's first sample
    named = ", ".join(f"row {row}" for row in sorted(set(order[first : first + 8]) & {13, 31}))
    with pytest.raises(BrokenRowsError, match=rf"at image {first + 8} .*no number either, in the rows {named}: copy their shard anew") as caught:
        Loop(task, config(), 1, Folder(tmp_path), check_each_step=check_each_step).run()
    assert "learning_rate" not in str(caught.value)


def test_non_finite_found_later_was_not_learned_from(tmp_path):
    """As on a GPU: nothing waits for the device at each step, and still no weight moves after the first bad value."""
    task = GaussianTask()
    task.poison_at = 4
    loop = Loop(task, config(log_images=40), 1, Folder(tmp_path), check_each_step=False)
    before = {}
    loop.on_step = lambda images, line: before.update({images: {k: v.clone() for k, v in task.model.state_dict().items()}})
    with pytest.raises(NonFiniteError, match="at image 32 "):
        loop.run()
    assert len(task.seen) == 5
    assert same(dict(task.model.state_dict()), before[24])
    assert checkpoint.latest(Folder(tmp_path)) is None


def test_delayed_check_changes_no_bit(tmp_path):
    eager, delayed = (Loop(GaussianTask(), config(), 1, Folder(tmp_path / str(c)), check_each_step=c) for c in (True, False))
    eager.run()
    delayed.run()
    assert same(weights(eager), weights(delayed))


def test_evaluates_when_asked_and_at_the_end_with_the_averages(tmp_path):
    task = GaussianTask()
    loop = Loop(task, config(sample_images=64), 1, Folder(tmp_path))
    held = []
    task.evaluate = lambda images: held.append((images, same(dict(task.model.state_dict()), loop.ema.weights))) or {"validation_loss": 2.0}
    loop.run()
    assert held == [(64, True), (128, True), (160, True)]
    assert not same(dict(task.model.state_dict()), loop.ema.weights)
    assert [line["images"] for line in checkpoint.read_metrics(Folder(tmp_path)) if "validation_loss" in line] == [64, 128, 160]


def test_metrics_are_the_means_of_their_interval(tmp_path):
    task = GaussianTask()
    Loop(task, config(), 1, Folder(tmp_path)).run()
    lines = checkpoint.read_metrics(Folder(tmp_path))
    replay, task = GaussianTask(), GaussianTask()
    loop = Loop(replay, config(images=16, checkpoint_images=None), 1, Folder(tmp_path / "replay"))
    first, second = loop._prepare(0), loop._prepare(8)
    a, ta = task.losses(task.model, first)
    loop._step(first)
    b, tb = task.losses(replay.model, second)
    losses, times = torch.cat([a, b]).detach(), torch.cat([ta, tb])
    assert lines[0]["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    for k in range(4):
        inside = (times >= k / 4) & (times < (k + 1) / 4)
        expected = losses[inside].mean().item() if inside.any() else None
        assert lines[0]["loss_by_time"][k] == (pytest.approx(expected, rel=1e-5) if expected is not None else None)


def test_utilisation_is_operations_over_what_the_devices_can_do(tmp_path):
    loop = Loop(GaussianTask(), config(), 1, Folder(tmp_path))
    assert "mfu" not in loop.run()  # nobody knows what this processor can do
    loop = Loop(GaussianTask(), config(), 1, Folder(tmp_path / "known"))
    loop._peak = 1e9
    line = loop.run()
    assert line["mfu"] == pytest.approx(6000 * line["images_per_second"] / 1e9)


def test_learned_velocity_is_the_closed_form_of_a_gaussian(tmp_path):
    """v(x, t) = (t − (1−t)s²)/((1−t)²s² + t²) · (x − (1−t)μ) − μ for data from N(μ, s²I)."""
    task = GaussianTask(rows=8192, width=64)
    mean, spread = task.data.mean(0), task.data.std(0)
    settings = config(images=192_000, batch_size=128, learning_rate=4e-3, warmup_images=6400, weight_decay=0.0, ema_half_life_images=20_000,
                      checkpoint_images=None, log_images=50_000)  # fmt: skip
    loop = Loop(task, settings, 0, Folder(tmp_path))
    loop.run()
    g = torch.Generator().manual_seed(7)
    t = torch.rand(4000, 1, generator=g)
    x = (1 - t) * (mean + spread * torch.randn(4000, 2, generator=g)) + t * torch.randn(4000, 2, generator=g)
    exact = (t - (1 - t) * spread**2) / ((1 - t) ** 2 * spread**2 + t**2) * (x - (1 - t) * mean) - mean
    with loop.ema.applied(), torch.no_grad():
        learned = task.model(torch.cat([x, t], 1))
    assert ((learned - exact).square().mean() / exact.square().mean()).sqrt() < 0.1


def test_bf16_keeps_weights_and_losses_in_float32(tmp_path):
    task = GaussianTask()
    loop = Loop(task, config(precision="bf16"), 1, Folder(tmp_path))
    plain = Loop(GaussianTask(), config(), 1, Folder(tmp_path / "plain"))
    a, b = loop.run()["loss"], plain.run()["loss"]
    assert a != b
    assert a == pytest.approx(b, rel=0.05)
    assert all(p.dtype == torch.float32 for p in task.model.parameters())


# -- micro-batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_micro_batches_see_the_same_samples_and_add_up_to_the_gradient_of_the_whole(tmp_path, micro_batch):
    def gradients(name, **changes):
        task = GaussianTask()
        loop = Loop(task, config(**changes), 1, Folder(tmp_path / name))
        losses, times = loop._gradients(loop._prepare(40))
        return losses, times, {name: p.grad for name, p in task.model.named_parameters()}, task.seen

    losses, times, whole, (all_at_once,) = gradients("whole")
    parts_losses, parts_times, parts, seen = gradients("parts", micro_batch=micro_batch)
    assert [len(batch["rows"]) for batch in seen] == [micro_batch] * (8 // micro_batch)
    for name, value in all_at_once.items():
        assert torch.equal(torch.cat([batch[name] for batch in seen]), value)
    assert torch.equal(parts_times, times)
    torch.testing.assert_close(parts_losses, losses, rtol=1e-6, atol=0)
    # By torch's own gradient of the mean over the batch.
    task = GaussianTask()
    task.losses(task.model, all_at_once)[0].mean().backward()
    for name, p in task.model.named_parameters():
        for found in (whole[name], parts[name]):
            assert (found - p.grad).norm() < 1e-6 * p.grad.norm()


def test_training_in_micro_batches_is_training(tmp_path):
    """One update, one metrics count and one average a batch, whatever it is made of; a micro-batch of the whole share changes no bit."""
    whole, parts, same_size = (Loop(GaussianTask(), config(micro_batch=m), 1, Folder(tmp_path / str(m))) for m in (None, 2, 8))
    for loop in (whole, parts, same_size):
        loop.run()
    assert same(weights(whole), weights(same_size))
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-3, atol=1e-5)
    for one, other in zip(checkpoint.read_metrics(Folder(tmp_path / "2")), checkpoint.read_metrics(Folder(tmp_path / "None")), strict=True):
        assert one["images"] == other["images"]
        assert (one["loss"], one["grad_norm"]) == pytest.approx((other["loss"], other["grad_norm"]), rel=1e-4)


@pytest.mark.parametrize("check_each_step", [True, False])
def test_a_non_finite_micro_batch_spoils_its_step_and_no_weight(tmp_path, check_each_step):
    task = GaussianTask()
    task.poison_at = 4 * 6 + 2  # the second of four micro-batches of the seventh step
    loop = Loop(task, config(micro_batch=2), 1, Folder(tmp_path), check_each_step=check_each_step)
    before = {}
    loop.on_step = lambda images, line: before.update({images: {k: v.clone() for k, v in task.model.state_dict().items()}})
    with pytest.raises(NonFiniteError, match="at image 56 "):
        loop.run()
    assert same(dict(task.model.state_dict()), before[48])


def test_workers_average_their_gradients_once_a_step(tmp_path):
    """DistributedDataParallel in a group of one, counting what it sends; DDP's gradients with micro-batches are the loop's without it."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        task, sent = GaussianTask(), []
        wrapped = nn.parallel.DistributedDataParallel(task.model)

        def count(_, bucket):
            sent.append(bucket.index())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        wrapped.register_comm_hook(None, count)
        loop = Loop(task, config(micro_batch=2), 1, Folder(tmp_path / "ddp"), wrapped=wrapped)
        loop.run()
    finally:
        torch.distributed.destroy_process_group()
    assert sent == [0] * 20  # 160 images in batches of 8
    plain = Loop(GaussianTask(), config(micro_batch=2), 1, Folder(tmp_path / "plain"))
    plain.run()
    torch.testing.assert_close(weights(loop), weights(plain), rtol=1e-5, atol=1e-6)


def test_a_micro_batch_must_divide_a_workers_share(tmp_path):
    with pytest.raises(ConfigError, match=r"train.micro_batch 3 must divide the 8 rows of a worker's share .*set it to a divisor, to null"):
        Loop(GaussianTask(), config(micro_batch=3), 1, Folder(tmp_path))
    with pytest.raises(ConfigError, match=r"train.micro_batch 8 must divide the 4 rows"):
        Loop(GaussianTask(), config(micro_batch=8), 1, Folder(tmp_path), Place(CPU, 0, 2))


def test_a_slow_store_makes_checkpoints_rarer_and_loses_no_metrics(tmp_path, monkeypatch):
    go, save = threading.Event(), checkpoint.save
    monkeypatch.undo()  # checkpoints may be left out
    monkeypatch.setattr(checkpoint, "save", lambda *a: go.wait(20) and save(*a))
    folder = Folder(tmp_path / "slow")
    # The store answers when training is past the checkpoints of 80 and 120.
    loop = Loop(GaussianTask(), config(), 1, folder, on_step=lambda images, line: go.set() if images == 152 else None)
    loop.run()
    assert (folder / "checkpoints").folders() == ["images-000000040", "images-000000160"]
    Loop(GaussianTask(), config(), 1, Folder(tmp_path / "straight")).run()
    assert without_clocks(checkpoint.read_metrics(folder)) == without_clocks(checkpoint.read_metrics(Folder(tmp_path / "straight")))

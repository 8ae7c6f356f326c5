"""Two workers of one expert, in a real process group, against one."""

from __future__ import annotations

import sys
import time

import fake_training_run as fake
import pytest
import torch
import torch.multiprocessing
from safetensors.torch import save_file

from paris_ray.storage import Folder
from paris_ray.training import checkpoint, termination, worker
from paris_ray.training.expert_task import ExpertTask
from paris_ray.training.loop import Place


def short(path) -> dict:
    return {
        "expert__train__images": 80,
        "expert__train__checkpoint_images": 40,
        "expert__train__log_images": 8,
        "experts__0__init_from": f"{path}/start.safetensors",
    }


def train(rank: int, path: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=2)
    # One of them in micro-batches: memory is each machine's own.
    sets = {**short(path), "expert__train__micro_batch": (2, "null")[rank]}
    worker.run(fake.make_config(f"{path}/two", **sets), "expert-0", Place(torch.device("cpu"), rank, 2))
    torch.distributed.destroy_process_group()


def test_two_workers_learn_what_one_learns(tmp_path, capfd):
    """From given weights, which both take and one reports."""
    for name in ("one", "two"):
        fake.make_run(tmp_path / name, experts=[0])
    source = ExpertTask(fake.make_config(tmp_path / "one"), 0, torch.device("cpu")).model
    save_file(source.state_dict(), tmp_path / "start.safetensors")
    worker.run(fake.make_config(tmp_path / "one", **short(tmp_path)), "expert-0", Place(torch.device("cpu")))
    assert capfd.readouterr().out.count("expert-0: initialised from") == 1
    torch.multiprocessing.start_processes(train, (str(tmp_path),), nprocs=2, start_method="fork" if sys.platform == "linux" else "spawn")
    assert capfd.readouterr().out.count("expert-0: initialised from") == 1
    one, two = (Folder(tmp_path / name / "experts" / "0") for name in ("one", "two"))
    a, b = checkpoint.latest(one), checkpoint.latest(two)
    assert a.images == b.images == 80
    for part in ("model", "ema"):
        for name, expected in a.tensors(part).items():
            # Gradients are summed in another order; Adam can turn a tiny difference into a small one.
            torch.testing.assert_close(b.tensors(part)[name], expected, rtol=1e-2, atol=2e-4)
    for step, (first, second) in enumerate(zip(checkpoint.read_metrics(one), checkpoint.read_metrics(two), strict=True)):
        assert first["images"] == second["images"]
        for key in ("loss", "grad_norm"):
            # From the same weights all but equal; after updates, as far as Adam has taken the rounding.
            assert abs(first[key] - second[key]) < (1e-5 if step == 0 else 1e-3) * abs(first[key])


def asked_to_go(rank: int, path: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=2)
    save = checkpoint.save

    def slow(*arguments):
        time.sleep(1)
        save(*arguments)

    checkpoint.save = slow
    if rank == 1:
        termination.ask()
    with pytest.raises(termination.TerminatedError):
        worker.run(fake.make_config(f"{path}/run", expert__train__checkpoint_images=160), "expert-0", Place(torch.device("cpu"), rank, 2))
    # Who goes first takes the other along, so neither may before this is there.
    assert checkpoint.latest(Folder(f"{path}/run/experts/0")) is not None
    torch.distributed.destroy_process_group()


def test_no_worker_goes_before_the_last_checkpoint_is_written(tmp_path):
    fake.make_run(tmp_path / "run", experts=[0])
    torch.multiprocessing.start_processes(asked_to_go, (str(tmp_path),), nprocs=2, start_method="fork" if sys.platform == "linux" else "spawn")


def half(rank: int, path: str) -> None:
    """Train with another worker until the checkpoint at image 40, then be gone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=2)

    def gone(line):
        raise InterruptedError(line["images"])

    with pytest.raises(InterruptedError):
        worker.run(fake.make_config(f"{path}/two", **short(path)), "expert-0", Place(torch.device("cpu"), rank, 2), gone)
    torch.distributed.destroy_process_group()


def test_one_worker_goes_on_where_two_left_off(tmp_path, monkeypatch):
    """With the same rows in the same order, and losses to which the other order of sums makes no difference."""
    for name in ("one", "two"):
        fake.make_run(tmp_path / name, experts=[0])
    source = ExpertTask(fake.make_config(tmp_path / "one"), 0, torch.device("cpu")).model
    save_file(source.state_dict(), tmp_path / "start.safetensors")
    torch.multiprocessing.start_processes(half, (str(tmp_path),), nprocs=2, start_method="fork" if sys.platform == "linux" else "spawn")
    one, two = (Folder(tmp_path / name / "experts" / "0") for name in ("one", "two"))
    assert checkpoint.latest(two).images == 40
    rows, batch = [], ExpertTask.batch
    monkeypatch.setattr(ExpertTask, "batch", lambda task, draw: rows.extend(draw.rows.tolist()) or batch(task, draw))
    seen = {}
    for name in ("one", "two"):
        rows.clear()
        worker.run(fake.make_config(tmp_path / name, **short(tmp_path)), "expert-0", Place(torch.device("cpu")))
        seen[name] = list(rows)
    # 36 rows: a whole pass and 44 of the next ones, of which it saw the second half.
    assert sorted(seen["one"][:36]) == list(range(36))
    assert seen["two"] == seen["one"][40:]
    assert [line["images"] for line in checkpoint.read_metrics(two)] == list(range(8, 81, 8))
    for first, second in zip(checkpoint.read_metrics(one), checkpoint.read_metrics(two), strict=True):
        assert abs(first["loss"] - second["loss"]) < 1e-3 * abs(first["loss"])
    for name, expected in checkpoint.latest(one).tensors("model").items():
        torch.testing.assert_close(checkpoint.latest(two).tensors("model")[name], expected, rtol=1e-2, atol=2e-4)

"""As many rows at once as the memory takes, found once."""

from __future__ import annotations

import json

import fake_training_run as fake
import pytest
import torch

from paris_ray.config import ConfigError
from paris_ray.storage import Folder
from paris_ray.training import checkpoint, micro_batch, worker
from paris_ray.training.draws import Draws
from paris_ray.training.expert_task import ExpertTask
from paris_ray.training.loop import Place

CPU = Place(torch.device("cpu"))
AUTO = {"expert__train__micro_batch": "auto", "expert__train__images": 24, "expert__train__checkpoint_images": 8}


@pytest.fixture
def free(monkeypatch):
    """Sets the rows that a CPU has memory for, by the bound, and something."""
    monkeypatch.setattr(micro_batch, "_node_share", lambda asked: 1.0)

    def rows(config, rows: float) -> None:
        task = ExpertTask(config, 0, CPU.device)
        # To come for each weight, in float32: gradient, two moments, average, and of a checkpoint's copy four.
        need = 4 * (4 + 4) * sum(p.numel() for p in task.model.parameters()) + rows * micro_batch.image_bytes(task, task.spec.train)
        monkeypatch.setattr(micro_batch, "free_memory", lambda device: need / micro_batch.USABLE)

    return rows


def frozen(path) -> dict:
    return json.loads((path / "experts" / "0" / micro_batch.FILE).read_text())


@pytest.mark.parametrize(("fits", "rows"), [(1.5, 1), (3.9, 2), (5, 4), (7.9, 4), (100, 8)])
def test_the_largest_divisor_that_fits_is_taken_and_trained_with(tmp_path, monkeypatch, free, fits, rows):
    """Of eight rows in a batch."""
    config = fake.make_run(tmp_path, **AUTO)
    free(config, fits)
    seen = set()
    losses = ExpertTask.losses
    monkeypatch.setattr(ExpertTask, "losses", lambda self, model, batch: seen.add(len(batch["latent"])) or losses(self, model, batch))
    monkeypatch.setattr(ExpertTask, "evaluate", lambda self, images: seen.add(self.rows_at_once) or {})
    worker.run(config, "expert-0", CPU)
    assert seen == {rows}
    assert frozen(tmp_path)["micro_batch"] == rows


def test_a_resume_takes_what_was_found_first_and_goes_on_to_the_same_bits(tmp_path, free):
    straight, broken = (fake.make_run(tmp_path / name, **AUTO) for name in ("straight", "broken"))
    free(straight, 2.5)
    worker.run(straight, "expert-0", CPU)
    free(broken, 2.5)
    worker.run(broken, "expert-0", CPU)
    folder = Folder(broken.run_dir) / "experts" / "0"
    (folder / "checkpoints" / "images-000000024").delete_all()  # as if it had died there
    free(broken, 100)  # a larger machine
    worker.run(broken, "expert-0", CPU)
    assert frozen(tmp_path / "broken")["micro_batch"] == 2
    weights = [checkpoint.latest(Folder(tmp_path / name) / "experts" / "0").tensors("model") for name in ("straight", "broken")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_not_one_row(tmp_path, free):
    config = fake.make_run(tmp_path, **AUTO)
    free(config, 0.1)
    with pytest.raises(ConfigError, match=r"expert-0: not even one row fits the 0.0 GiB .*gradient_checkpointing, or train it on"):
        worker.run(config, "expert-0", CPU)


def test_a_number_that_does_not_divide_another_share(tmp_path, free, monkeypatch):
    config = fake.make_run(tmp_path, **AUTO)
    free(config, 100)
    task = ExpertTask(config, 0, CPU.device)
    assert micro_batch.settle(task, CPU).micro_batch == 8
    monkeypatch.setattr(micro_batch, "_agreed", lambda place, number, how: number)
    with pytest.raises(ConfigError, match=r"is 8, which does not divide the 4 rows.*\(it was 1\).*--rebuild expert-0"):
        micro_batch.settle(task, Place(CPU.device, 0, 2))


def test_code_is_compiled_for_the_rows_that_are_trained_with(tmp_path, monkeypatch):
    """Not for any number of rows, which trials of several sizes lead to: a resume makes none."""
    config = fake.make_run(tmp_path, **AUTO, expert__train__compile=True)
    task = ExpertTask(config, 0, CPU.device)
    dynamic: list[bool] = []

    def backend(graph, inputs):
        dynamic.append(any(isinstance(one, torch.SymInt) for one in inputs))
        return graph

    torch._dynamo.reset()
    task.model.compile_blocks(backend=backend)

    def step(rows):
        return task.losses(task.model, task.batch(Draws(0, task.stage, task.rows, task.shape, task.dropout)(0, rows)))[0].sum()

    monkeypatch.setattr(micro_batch, "_tried", lambda task, train, rows, device: step(rows).item())
    monkeypatch.setattr(micro_batch, "free_memory", lambda device: 2**40)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    task.spec = task.spec.model_copy(update={"resources": task.spec.resources.model_copy(update={"gpus": 1.0})})
    assert micro_batch.largest(task, task.spec.train, 8, Place(torch.device("cuda", 0))) == 8
    assert any(dynamic)
    dynamic.clear()
    step(8)
    assert dynamic == [False]


def test_several_workers_need_room_for_their_buckets(tmp_path, free):
    """Of four bytes for each weight."""
    config = fake.make_run(tmp_path, **AUTO, expert__resources__num_workers=2)
    free(config, 4.5)
    task = ExpertTask(config, 0, CPU.device)
    rows = 4 * sum(p.numel() for p in task.model.parameters()) / micro_batch.image_bytes(task, task.spec.train)
    assert 1 < rows < 4  # which have to be left out
    assert micro_batch.largest(task, task.spec.train, 4, CPU) == max(n for n in (1, 2, 4) if n <= 4.5 - rows)


def test_tries_go_up_until_memory_runs_out():
    tried = []

    def needs(rows):
        tried.append(rows)
        if rows > 32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rows

    assert micro_batch._largest("expert-0", 96, 1000, needs) == 32
    assert tried == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48]
    assert micro_batch._largest("expert-0", 96, 20, needs) == 16


def test_memory_that_runs_out_later_says_what_to_do(tmp_path, monkeypatch, free):
    config = fake.make_run(tmp_path, **AUTO)
    free(config, 4.5)
    task = ExpertTask(config, 0, CPU.device)
    train = micro_batch.settle(task, CPU)

    def short(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("paris_ray.training.loop.Loop._gradients", short)
    with pytest.raises(micro_batch.MemoryShortError) as caught:
        worker.run(config, "expert-0", CPU)
    said = str(caught.value)
    assert "expert-0: memory ran out on cpu" in said
    assert "at 4 rows at once (train.micro_batch). It was found at the first start, on cpu with" in said
    assert "train.gradient_checkpointing" in said
    assert "--rebuild expert-0 and train.micro_batch=2" in said
    with pytest.raises(RuntimeError, match="another"), micro_batch.out_of_memory_explained(task, train, CPU):
        raise RuntimeError("another")
    with pytest.raises(micro_batch.MemoryShortError), micro_batch.out_of_memory_explained(task, train, CPU):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_is_tried(tmp_path):
    config = fake.make_run(tmp_path, **AUTO, expert__resources__gpus=1)
    place = Place(torch.device("cuda", 0))
    task = ExpertTask(config, 0, place.device)
    before = torch.cuda.memory_allocated()
    assert micro_batch.settle(task, place).micro_batch == 8
    assert torch.cuda.memory_allocated() == before
    assert all(p.grad is None for p in task.model.parameters())

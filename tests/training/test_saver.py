"""Checkpoints written beside the training: slow stores, lost stores, full disks."""

from __future__ import annotations

import errno
import threading
import time

import pytest
import torch

from paris_ray.storage import Folder
from paris_ray.training import checkpoint, saver
from paris_ray.training.saver import CheckpointError, Saver


def tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"a": torch.full((3, 2), value), "b": torch.full((4,), -value)}, "optimizer": {"a.step": torch.tensor(value)}}


@pytest.fixture
def store(tmp_path, monkeypatch):
    """The stage's folder, whose writing waits for ``go``, and fails as often as ``failures`` says."""
    folder = Folder(tmp_path)
    folder.go, folder.tries, folder.failures = threading.Event(), [], []
    save = checkpoint.save

    def slow(stage, images, *rest):
        folder.go.wait(20)
        folder.tries.append(images)
        if folder.failures:
            raise folder.failures.pop()
        save(stage, images, *rest)

    monkeypatch.setattr(checkpoint, "save", slow)
    return folder


def written(folder: Folder) -> list[str]:
    return (folder / "checkpoints").folders()


def test_what_is_written_is_what_it_was_when_it_was_due(store):
    one, live = Saver(store, 2), tensors(1.0)
    one.save(40, live, {"seconds": 1.5}, [{"images": 40}])
    assert not one.ready()
    for part in live.values():
        for tensor in part.values():
            tensor.zero_()  # training goes on
    store.go.set()
    one.wait()
    found = checkpoint.latest(store)
    assert (found.images, found.state["seconds"]) == (40, 1.5)
    for part, named in tensors(1.0).items():
        assert {name: t.tolist() for name, t in found.tensors(part).items()} == {name: t.tolist() for name, t in named.items()}
    assert one.ready()
    one.save(80, tensors(2.0), {}, [])  # in the memory of the one before
    one.save(120, tensors(3.0), {}, [])
    one.close()
    assert written(store) == ["images-000000080", "images-000000120"]
    assert checkpoint.latest(store).tensors("model")["b"].tolist() == [-3.0] * 4


def test_a_write_that_fails_is_tried_again(store, monkeypatch, capsys):
    monkeypatch.setattr(saver, "FIRST_PAUSE_S", 0.01)
    store.failures = [ConnectionResetError("lost"), OSError(errno.ENOSPC, "No space left on device")]
    store.go.set()
    one = Saver(store, 2)
    one.save(40, tensors(1.0), {}, [{"images": 40}])
    one.wait()
    assert store.tries == [40, 40, 40]
    assert checkpoint.latest(store).images == 40
    said = capsys.readouterr().out
    assert "checkpoint at image 40 cannot be written to" in said
    assert "No space left on device; training goes on, and it is tried again in 0.01 s" in said
    assert "ConnectionResetError: lost; training goes on, and it is tried again in 0.02 s" in said


def test_past_patience_or_at_the_end_it_is_an_error(store, monkeypatch):
    monkeypatch.setattr(saver, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(saver, "PATIENCE_S", 0.1)
    store.failures = [OSError(errno.ENOSPC, "No space left on device")] * 1000
    store.go.set()
    one = Saver(store, 2)
    one.save(40, tensors(1.0), {}, [])
    with pytest.raises(CheckpointError, match=r"image 40 cannot be written to .*No space left.*Make room, or mend the store"):
        one.wait()
    monkeypatch.setattr(saver, "PATIENCE_S", 3600.0)
    monkeypatch.setattr(saver, "FIRST_PAUSE_S", 3600.0)
    one.save(80, tensors(1.0), {}, [])
    with pytest.raises(CheckpointError, match="image 80"):
        one.close()  # does not wait for an hour
    assert checkpoint.latest(store) is None


def test_an_error_of_the_code_is_not_tried_again(store):
    store.failures = [ValueError("mine")]
    store.go.set()
    one = Saver(store, 2)
    one.save(40, tensors(1.0), {}, [])
    with pytest.raises(ValueError, match="mine"):
        one.close()
    assert store.tries == [40]


def test_in_a_hurry_it_is_tried_at_once_and_as_long_as_there_is_time(store, monkeypatch, capsys):
    """A process that has to go does not wait out the pause after a failure, here a second, then two …"""
    store.failures = [ConnectionResetError("lost")]
    store.go.set()
    one = Saver(store, 2)
    one.save(40, tensors(1.0), {}, [{"images": 40}])
    while "tried again in 1 s" not in capsys.readouterr().out:
        time.sleep(0.001)
    began = time.monotonic()
    one.hurry()
    one.save(48, tensors(2.0), {}, [{"images": 48}])
    one.close()
    assert time.monotonic() - began < 0.5
    assert store.tries == [40, 40, 48]
    assert [line["images"] for line in checkpoint.read_metrics(store)] == [40, 48]
    # With time left, it is tried again until it is written.
    monkeypatch.setattr(saver, "FIRST_PAUSE_S", 0.01)
    store.tries.clear()
    store.failures = [ConnectionResetError("lost")] * 3
    three = Saver(store, 2)
    three.hurry(60)
    three.save(52, tensors(3.0), {}, [])
    three.wait()
    assert store.tries == [52] * 4
    assert checkpoint.latest(store).images == 52
    assert "lost; it is tried again in 0.01 s" in capsys.readouterr().out
    # A store that is still lost when it is over ends it, without a second try.
    store.tries.clear()
    store.failures = [ConnectionResetError("lost")] * 9
    two = Saver(store, 2)
    two.hurry()
    two.save(56, tensors(3.0), {}, [])
    with pytest.raises(CheckpointError, match="image 56"):
        two.close()
    assert store.tries == [56]

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from paris_ray.storage import Folder
from paris_ray.training import checkpoint


def write(folder: Folder, images: int, value: float = 0.0) -> None:
    tensors = {"model": {"w": torch.full((64,), value)}, "optimizer": {"w.step": torch.tensor(1.0)}}
    checkpoint.save(folder, images, tensors, {"seconds": 1.5}, [{"images": images - 1}, {"images": images}])


@pytest.fixture
def folder(tmp_path):
    folder = Folder(tmp_path)
    for images in (80, 160, 240):
        write(folder, images, float(images))
    return folder


def newest(tmp_path):
    return tmp_path / "checkpoints" / "images-000000240"


def test_round_trip(folder):
    found = checkpoint.latest(folder)
    assert (found.images, found.state["seconds"]) == (240, 1.5)
    assert torch.equal(found.tensors("model")["w"], torch.full((64,), 240.0))
    assert checkpoint.latest(folder / "nothing") is None


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize(
    ("harm", "why"), [(truncate, "bytes, its manifest says"), (flip_a_bit, "another checksum"), (lambda p: p.unlink(), "is missing")]
)
def test_damage_is_passed_over_loudly(folder, tmp_path, name, harm, why):
    harm(newest(tmp_path) / name)
    with pytest.warns(RuntimeWarning, match=f"images-000000240 is passed over: {name} .*{why}"):
        assert checkpoint.latest(folder).images == 160


@pytest.mark.parametrize(("harm", "why"), [(truncate, "cannot be read"), (lambda p: p.unlink(), "was not finished")])
def test_damaged_manifest(folder, tmp_path, harm, why):
    harm(newest(tmp_path) / "_manifest.json")
    with pytest.warns(RuntimeWarning, match=why):
        assert checkpoint.latest(folder).images == 160


def test_a_damaged_one_is_replaced(folder, tmp_path):
    flip_a_bit(newest(tmp_path) / "model.safetensors")
    (newest(tmp_path) / "stray").write_text("left over")
    write(folder, 240, 1.0)
    assert checkpoint.latest(folder).tensors("model")["w"][0] == 1.0
    assert not (newest(tmp_path) / "stray").exists()


def test_pruning_keeps_the_newest_and_all_metrics(folder, tmp_path):
    checkpoint.prune(folder, 2, 240)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["images-000000160", "images-000000240"]
    assert [line["images"] for line in checkpoint.read_metrics(folder)] == [79, 80, 159, 160, 239, 240]


def test_pruning_does_not_give_up_a_good_one_for_a_damaged_later_one(folder, tmp_path):
    flip_a_bit(newest(tmp_path) / "model.safetensors")
    checkpoint.prune(folder, 1, 160)
    assert checkpoint.latest(folder).images == 160


def test_metrics_after_a_checkpoint_can_be_forgotten(folder):
    checkpoint.forget_metrics_after(folder, 80)
    assert [line["images"] for line in checkpoint.read_metrics(folder)] == [79, 80]


def test_equal_tensors_are_equal_bytes():
    a, b = torch.randn(3, 3), torch.zeros(2)
    assert checkpoint.tensor_bytes({"a": a, "b": b}) == checkpoint.tensor_bytes({"b": b, "a": a.t().contiguous().t()})


def test_metrics_are_read_without_torch(folder):
    code = (
        "import sys, json; from paris_ray.storage import Folder; from paris_ray.training import checkpoint;"
        f"print(json.dumps([len(checkpoint.read_metrics(Folder({folder.uri!r}))), 'torch' in sys.modules, 'ray' in sys.modules]))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == [6, False, False]

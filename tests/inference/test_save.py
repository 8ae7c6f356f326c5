"""save_model: the same pictures, the released layout, and nothing lost that was there."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import released
import torch
from safetensors.torch import load_file, save_file

from paris_ray.inference.engine import ImageRequest, generate
from paris_ray.inference.save import save_model
from paris_ray.inference.strict import load_expert, load_router
from paris_ray.inference.weights import load_model
from paris_ray.models import Router
from paris_ray.storage import Folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("released") / "model"
    released.write_checkpoint(path)
    return path


def pictures(model):
    return [result.image.tobytes() for result in generate(model, [ImageRequest("a red fox", seed=i, steps=2, routing=r) for i, r in
                                                                   enumerate(("top-2", "full", "expert-1"))])]  # fmt: skip


def test_saved_model_gives_the_same_pictures(checkpoint, tmp_path):
    model = load_model(checkpoint)
    save_model(model, tmp_path / "copy")
    again = load_model(tmp_path / "copy")
    assert pictures(again) == pictures(model)
    assert again.defaults == model.defaults
    # A copy of a copy too, and int8 of either.
    save_model(again, tmp_path / "third")
    assert pictures(load_model(tmp_path / "third", precision="int8")) == pictures(load_model(checkpoint, precision="int8"))
    ours, theirs = (json.loads((p / "paris.json").read_text())["model_fingerprint"] for p in (tmp_path / "copy", tmp_path / "third"))
    assert ours == theirs
    assert len(ours) == 32


def test_files_are_the_released_ones(checkpoint, tmp_path):
    save_model(load_model(checkpoint), tmp_path / "copy")
    names = {str(p.relative_to(tmp_path / "copy")) for p in (tmp_path / "copy").rglob("*") if p.is_file()}
    original = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()}
    assert original <= names
    assert {name.split("/")[0] for name in names - original} == {"paris.json", "null_text.safetensors", "tokenizer"}
    assert not [name for name in names if name.endswith((".bin", ".pt"))]
    # Outsiders read the weights by these names and shapes; every byte is the original's.
    for folder, file in [*((f"expert_{k}", released.EXPERT_FILE) for k in range(3)), ("router", released.ROUTER_FILE)]:
        mine, theirs = load_file(tmp_path / "copy" / folder / file), load_file(checkpoint / folder / file)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    # And with paris.json and null text gone it is a released checkpoint again.
    (tmp_path / "copy" / "paris.json").unlink()
    (tmp_path / "copy" / "null_text.safetensors").unlink()
    assert pictures(load_model(tmp_path / "copy")) == pictures(load_model(checkpoint))


def test_ignored_tensors_are_left_out(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "odd")
    file = tmp_path / "odd" / "expert_0" / released.EXPERT_FILE
    save_file({**load_file(file), "y_embedder": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match="tensor y_embedder is in the file but not in the network"):
        save_model(load_model(tmp_path / "odd"), tmp_path / "copy")
    assert not list(tmp_path.glob("copy*"))  # nothing in part
    model = load_model(tmp_path / "odd", ignore_tensors=("y_embedder",))
    save_model(model, tmp_path / "copy")
    assert pictures(load_model(tmp_path / "copy")) == pictures(load_model(checkpoint))


def test_a_model_without_all_experts(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "expert_1")
    save_model(load_model(tmp_path / "part"), tmp_path / "copy")
    assert load_model(tmp_path / "copy").present == [True, False, True]


def test_what_is_there_is_not_replaced_unasked(checkpoint, tmp_path):
    model = load_model(checkpoint)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"mine (is not empty|holds something else)"):
            save_model(model, tmp_path / "mine", overwrite)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    shutil.copytree(checkpoint, tmp_path / "other")
    (tmp_path / "other" / "expert_2" / "stale.txt").write_text("x")
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        save_model(model, tmp_path / "other")
    save_model(model, tmp_path / "other", overwrite=True)
    assert not (tmp_path / "other" / "expert_2" / "stale.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "other"]
    # Over itself.
    itself = load_model(tmp_path / "other")
    save_model(itself, tmp_path / "other", overwrite=True)
    assert pictures(load_model(tmp_path / "other")) == pictures(model)


def test_a_failure_leaves_the_old_model(checkpoint, tmp_path, monkeypatch):
    shutil.copytree(checkpoint, tmp_path / "old")
    model = load_model(checkpoint)
    monkeypatch.setattr(model.text_encoder, "save", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_model(model, tmp_path / "old", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
    assert pictures(load_model(tmp_path / "old")) == pictures(load_model(checkpoint))


def test_into_an_object_store(checkpoint):
    import fsspec

    model = load_model(checkpoint)
    fsspec.filesystem("memory").mkdirs("/models", exist_ok=True)
    save_model(model, "memory://models/paris")
    assert pictures(load_model("memory://models/paris")) == pictures(model)
    with pytest.raises(FileExistsError):
        save_model(model, "memory://models/paris")


def test_a_router_made_in_memory_is_saved_with_its_own_config(checkpoint, tmp_path):
    torch.manual_seed(3)
    model = load_model(checkpoint)
    model.router = Router(3, 8, 2, 4, 24, 1, 3, mlp_ratio=2.0, norm_eps=1e-5).eval().requires_grad_(False)
    save_model(model, tmp_path / "copy")
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.9])
    torch.testing.assert_close(load_router(Folder(tmp_path / "copy" / "router"), 8)(x, t), model.router(x, t))


@pytest.mark.parametrize(("kind", "parameters"), [("expert", 605_970_448), ("router", 129_136_904)])
def test_released_sizes_load_strictly(tmp_path, kind, parameters):
    """The published shapes at full size; the weights are a hole in the file."""
    if kind == "expert":
        table, name, config = released.expert_table(1152, 28, 32, 768), released.EXPERT_FILE, released.expert_config(0, released.XL, 768)
    else:
        table, name, config = released.router_table(768, 12, 8, 32), released.ROUTER_FILE, released.router_config(released.B, 8)
    assert sum(int(np.prod(shape)) for shape in table.values()) == parameters
    released.write_hollow(tmp_path / name, table)
    (tmp_path / "config.json").write_text(json.dumps(config))
    module = load_expert(Folder(tmp_path), 32)[0] if kind == "expert" else load_router(Folder(tmp_path), 32)
    assert sum(p.numel() for p in module.parameters()) == parameters
    changed = {**table, "layers.11.attn.in_proj_bias": (7,)}
    del changed["layers.3.mlp.2.bias"]
    released.write_hollow(tmp_path / name, {**changed, "y_embedder": (3,)})
    with pytest.raises(ValueError, match=r"layers\.3\.mlp\.2\.bias .* is missing") as caught:
        load_expert(Folder(tmp_path), 32) if kind == "expert" else load_router(Folder(tmp_path), 32)
    assert "layers.11.attn.in_proj_bias has shape (7,)" in str(caught.value)
    assert "y_embedder is in the file" in str(caught.value)

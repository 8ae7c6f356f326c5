"""save_model: the same pictures, the released layout, and nothing lost that was there."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import released
import torch
from safetensors.torch import load_file, save_file

from paris_ray import storage
from paris_ray.inference import save
from paris_ray.inference.engine import ImageRequest, generate
from paris_ray.inference.save import save_model
from paris_ray.inference.strict import load_expert, load_router
from paris_ray.inference.weights import load_model, open_experts
from paris_ray.layout import UPLOAD, router_config
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
    assert len({(tmp_path / "copy" / name).stat().st_mode for name in names}) == 1  # whoever may read one may read all
    # Outsiders read the weights by these names and shapes; every byte is the original's.
    for folder, file in [*((f"expert_{k}", released.EXPERT_FILE) for k in range(3)), ("router", released.ROUTER_FILE)]:
        mine, theirs = load_file(tmp_path / "copy" / folder / file), load_file(checkpoint / folder / file)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    for name in ("config.json", "model_index.json"):
        assert json.loads((tmp_path / "copy" / name).read_text()) == json.loads((checkpoint / name).read_text())
    # And with paris.json and null text gone it is a released checkpoint again.
    (tmp_path / "copy" / "paris.json").unlink()
    (tmp_path / "copy" / "null_text.safetensors").unlink()
    assert pictures(load_model(tmp_path / "copy")) == pictures(load_model(checkpoint))


def test_small_files_of_a_model_that_has_none(checkpoint, tmp_path):
    """As assemble writes them: the entries by which outsiders find VAE, text encoder and tokenizer."""
    shutil.copytree(checkpoint, tmp_path / "bare")
    model = load_model(tmp_path / "bare")
    for name in ("config.json", "model_index.json"):
        (tmp_path / "bare" / name).unlink()
    save_model(model, tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "model_index.json").read_text()) == {
        "_class_name": "DDMPipeline", "num_experts": 3, "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
    }  # fmt: skip
    assert json.loads((tmp_path / "copy" / "config.json").read_text()) == {
        "model_name": "Paris", "num_experts": 3, "image_size": 8, "num_channels": 4, "expert_architecture": "dit", "router_architecture": "dit",
        "use_latents": True, "vae_name": "vae", "text_encoder_name": "clip",
    }  # fmt: skip
    (tmp_path / "copy" / "paris.json").unlink()
    assert pictures(load_model(tmp_path / "copy")) == pictures(load_model(checkpoint))


def test_what_was_asked_of_loading_is_written(checkpoint, tmp_path):
    """The copy needs neither the epsilon again nor leave to hold a setting."""
    shutil.copytree(checkpoint, tmp_path / "odd")
    file = tmp_path / "odd" / "expert_1" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "ema_decay": 0.9999}))
    model = load_model(tmp_path / "odd", ignore_settings=("ema_decay", "num_layers"), norm_eps=0.01)
    save_model(model, tmp_path / "copy")
    drawn = pictures(model)
    assert pictures(load_model(tmp_path / "copy")) == drawn
    assert drawn != pictures(load_model(checkpoint))
    said = json.loads((tmp_path / "copy" / "expert_1" / "config.json").read_text())
    assert said == {**released.expert_config(1, released.TINY), "norm_eps": 0.01}


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


class CutOff(OSError):
    """The store's connection is gone."""


class Store:
    """fsspec's memory://, whose connection is lost after so many changes."""

    def __init__(self, monkeypatch):
        from fsspec.implementations.memory import MemoryFileSystem

        self.fs, self.left, self.changes = MemoryFileSystem(), None, 0
        for name in ("_open", "cp_file", "_rm", "rm_file"):
            monkeypatch.setattr(MemoryFileSystem, name, self.watched(getattr(MemoryFileSystem, name)))

    def watched(self, original):
        def change(fs, path, *args, **kwargs):
            if original.__name__ != "_open" or "w" in (args[0] if args else kwargs.get("mode", "rb")):
                self.changes += 1
                if self.left is not None and self.changes > self.left:
                    raise CutOff(path)
            return original(fs, path, *args, **kwargs)

        return change

    def write(self, where, files):
        self.left = None
        if self.fs.exists(where):
            self.fs.rm(where, recursive=True)
        for name, data in files.items():
            self.fs.pipe_file(f"{where}/{name}", data)

    def files(self, where):
        return {path.removeprefix(f"{where}/"): self.fs.cat_file(path) for path in self.fs.find(where)}


NAMES = (
    "config.json",
    "model_index.json",
    *(f"{part}/{name}" for part in ("expert_0", "expert_1", "router", "vae") for name in ("config.json", "weights")),
)


@pytest.mark.parametrize("own", [False, True], ids=["released", "ours"])
def test_an_upload_that_is_cut_off_leaves_the_old_model_or_none(tmp_path, monkeypatch, own):
    """After each single change to the store, what a loader takes for a model is the whole old one or the whole new one; and a repetition succeeds."""
    store, where = Store(monkeypatch), "/cut/model"
    monkeypatch.setattr(storage, "UPLOADS", 1)  # the connection stays cut: nothing to wait for
    old = {name: f"old {name}".encode() for name in (*NAMES, "expert_2/config.json", "expert_2/weights", *(["paris.json"] if own else []))}
    new = {name: f"new {name}".encode() for name in (*NAMES, "null_text.safetensors", "paris.json")}
    for name, data in new.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    target, last, outcomes = Folder(f"memory:/{where}"), None, []
    for left in range(200):
        store.write(where, old)
        store.left, store.changes = left, 0
        try:
            save._upload(Folder(tmp_path), target)
        except CutOff:
            last = left
        store.left = None
        found = {name: data for name, data in store.files(where).items() if not name.startswith(f"{UPLOAD}/")}
        if "paris.json" in found:
            assert {**found, "config.json": b""} in ({**old, "config.json": b""}, {**new, "config.json": b""})
        elif "config.json" in found:
            assert found == old
        outcomes.append("none" if not {"paris.json", "config.json"} & found.keys() else "old" if found["expert_0/weights"][:3] == b"old" else "new")
        if last == left:  # again, with the connection back
            save._check_target(target, overwrite=True)
            save._upload(Folder(tmp_path), target)
            assert store.files(where) == new
        else:
            break
    assert store.files(where) == new
    # The old one stays for as long as files arrive; then for a while there is none; then the new one.
    assert outcomes == sorted(outcomes, key=["old", "none", "new"].index)
    assert outcomes.count("old") >= len(new)
    assert {"none", "new"} <= set(outcomes)


def test_a_model_cut_off_in_a_store_is_refused_and_written_again(checkpoint, monkeypatch):
    store, model = Store(monkeypatch), load_model(checkpoint)
    files = {str(path.relative_to(checkpoint)): path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    store.write("/cut/whole", files)
    expected = pictures(model)
    store.left, store.changes = 5, 0  # while files arrive
    with pytest.raises(CutOff):
        save_model(model, "memory://cut/whole", overwrite=True)
    store.left = None
    assert pictures(load_model("memory://cut/whole")) == expected
    count = len([path for path in store.fs.find("/cut/whole") if UPLOAD in path])
    assert count == 5
    store.write("/cut/whole", files)
    store.left, store.changes = None, 0
    save_model(model, "memory://cut/whole", overwrite=True)
    whole = store.changes
    store.write("/cut/whole", files)
    store.left, store.changes = whole - 12, 0  # while they take their places
    with pytest.raises(CutOff):
        save_model(model, "memory://cut/whole", overwrite=True)
    store.left = None
    for load in (load_model, open_experts):
        with pytest.raises(FileNotFoundError, match=r"being written here, or its writing was cut off; write it again \(overwrite=True\)"):
            load("memory://cut/whole")
    save_model(model, "memory://cut/whole", overwrite=True)
    assert pictures(load_model("memory://cut/whole")) == expected
    # Of a new model: nothing is there that would have to be replaced.
    store.left, store.changes = 3, 0
    with pytest.raises(CutOff):
        save_model(model, "memory://cut/new")
    store.left = None
    save_model(model, "memory://cut/new")
    assert pictures(load_model("memory://cut/new")) == expected


def test_a_router_made_in_memory_is_saved_with_its_own_config(checkpoint, tmp_path):
    torch.manual_seed(3)
    model = load_model(checkpoint)
    model.router = Router(3, 8, 2, 4, 24, 1, 3, mlp_ratio=2.0, norm_eps=1e-5).eval().requires_grad_(False)
    save_model(model, tmp_path / "copy")
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.9])
    torch.testing.assert_close(load_router(Folder(tmp_path / "copy" / "router"), 8)(x, t), model.router(x, t))


def test_the_inner_width_of_a_router_survives_its_config():
    """The config names a ratio, and the network rounds down: of 22 · (15/22) it would leave 14."""
    for inner in range(1, 96):
        said = router_config(Router(3, 8, 2, 4, 22, 1, 2, mlp_ratio=(inner + 0.5) / 22))
        assert said["mlp_ratio"] == pytest.approx(inner / 22, abs=1e-12)
        assert Router(3, 8, 2, 4, 22, 1, 2, mlp_ratio=said["mlp_ratio"]).layers[0].mlp[0].weight.shape == (inner, 22)


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

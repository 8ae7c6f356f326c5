"""An expert that is trained elsewhere and handed back: whole and honest, or in one of many ways not."""

from __future__ import annotations

import json
import shutil

import fake_training_run as fake
import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs import accept as accept_job
from jobs import shard_bundle
from paris_ray import config as configs
from paris_ray import manifest, stages
from paris_ray.storage import Folder
from paris_ray.training import worker
from paris_ray.training.contribution import RefusedError, accept, bundle
from paris_ray.training.loop import Place

WEIGHTS = "export/diffusion_pytorch_model.safetensors"
SETS = {"expert__train__images": 640, "expert__train__checkpoint_images": 640, "expert__train__learning_rate": 3e-3}


def train(config, k):
    """As the job does, in this process."""
    stage = stages.stage(config, f"expert-{k}")
    stage.begin()
    stage.publish(worker.run(config, f"expert-{k}", Place(torch.device("cpu"))), 1.0, result="export/")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run without experts, and expert 1 trained from its bundle in another place."""
    path = tmp_path_factory.mktemp("contribution")
    run = fake.make_run(path / "run", **SETS)
    bundle(run, 1, Folder(path / "away"))
    away = configs.load(str(path / "away/config.yaml"), [f"run_dir={path}/away"])
    train(away, 1)
    return run, path / "away"


@pytest.fixture
def handed(trained, tmp_path):
    """A copy of what is handed back, to be spoilt; and the run."""
    run, away = trained
    shutil.copytree(away, tmp_path / "away")
    shutil.copytree(run.run_dir, tmp_path / "run")
    return run.model_copy(update={"run_dir": str(tmp_path / "run")}), tmp_path / "away"


def test_who_gets_a_shard_does_not_learn_of_our_clusters(tmp_path):
    run = fake.make_run(tmp_path / "run", **SETS)
    clusters = {"eu": {"address": "http://inside.example:8265", "token_file": "/home/me/token"}}
    tree = {**run.model_dump(mode="json"), "clusters": clusters}
    tree["experts"][1]["cluster"] = "eu"
    bundle(configs.build(tree), 1, Folder(tmp_path / "away"))
    text = (tmp_path / "away/config.yaml").read_text()
    assert "inside.example" not in text
    assert "token" not in text
    assert configs.load(str(tmp_path / "away/config.yaml")) == run


def rewrite(handed, change):
    """Change the files of the expert and make its manifest anew, as one would who wants to be believed."""
    stage = handed / "experts" / "1"
    before = json.loads((stage / "_manifest.json").read_text())
    change(stage)
    one = manifest.Stage("expert-1", Folder(stage), before["inputs"]["config"], before["inputs"]["parents"])
    counts = before["counts"]
    if (stage / "counts.json").exists():
        counts |= json.loads((stage / "counts.json").read_text())
        (stage / "counts.json").unlink()
    one.publish(counts, 1.0, result="export/")


def test_a_bundle_holds_one_shard_and_nothing_of_the_others(trained):
    _, away = trained
    assert sorted(one.name for one in (away / "shards").iterdir()) == ["expert=1"]
    assert {one.name for one in away.iterdir()} == {"config.yaml", "encoders", "events", "experts", "shards"}
    with pytest.raises(ValueError, match="is not empty; name a new folder"):
        bundle(configs.load(str(away / "config.yaml"), [f"run_dir={away}"]), 1, Folder(away))


def test_what_comes_back_is_what_the_run_would_have_made(handed, tmp_path):
    run, away = handed
    taken = accept(run, 1, Folder(away))
    assert taken["validation_loss"] < taken["nothing"]
    assert stages.stage(run, "expert-1").status(verify=True).state == "valid"
    alone = fake.make_run(tmp_path / "alone", **SETS)
    train(alone, 1)
    assert (tmp_path / "alone/experts/1" / WEIGHTS).read_bytes() == (tmp_path / "run/experts/1" / WEIGHTS).read_bytes()
    with pytest.raises(FileExistsError, match="--replace"):
        accept(run, 1, Folder(away))
    accept(run, 1, Folder(away), replace=True)


def test_to_predict_nothing_costs_the_mean_square_of_the_target(trained):
    """The target of this expert is noise."""
    from paris_ray.training.contribution import _judged, _load, _task

    run, away = trained
    task = _task(run, 1)
    _load(task, Folder(away) / "experts" / "1")
    reported = json.loads((away / "experts/1/_manifest.json").read_text())["counts"]["validation_loss"]
    assert run.experts[1].objective == "ddpm"
    assert _judged(task, reported, "expert-1")["nothing"] == pytest.approx(1.0, rel=0.02)


def scaled(factor):
    def change(stage):
        tensors = load_file(stage / WEIGHTS)
        save_file({name: factor * tensor for name, tensor in tensors.items()}, stage / WEIGHTS)

    return change


def poisoned(stage):
    tensors = load_file(stage / WEIGHTS)
    tensors["patch_embed.bias"][3] = float("nan")
    save_file(tensors, stage / WEIGHTS)


def lacking(stage):
    tensors = load_file(stage / WEIGHTS)
    del tensors["pos_embed"]
    save_file(tensors, stage / WEIGHTS)


def pickled(stage):
    (stage / WEIGHTS).unlink()
    torch.save({}, stage / "export/diffusion_pytorch_model.bin")


def other_heads(stage):
    config = json.loads((stage / "export/config.json").read_text())
    (stage / "export/config.json").write_text(json.dumps({**config, "num_heads": 1}))


def boasting(stage):
    (stage / "counts.json").write_text(json.dumps({"validation_loss": 0.001}))


def honest_but_useless(stage):
    tensors = {name: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)) for name, tensor in load_file(stage / WEIGHTS).items()}
    save_file(tensors, stage / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (scaled(1.5), r"its held-out loss is [\d.]+ here, and [\d.]+ by its own account"),
        (boasting, r"its held-out loss is [\d.]+ here, and 0.001 by its own account"),
        (poisoned, "1 tensors hold values that are not finite, patch_embed.bias for one"),
        (lacking, r"tensor pos_embed \(1, .*\) is missing from the file"),
        (pickled, "diffusion_pytorch_model.safetensors is not among its files"),
        (other_heads, "export/config.json is not this expert's: num_heads: 1 → "),
    ],
)
def test_what_is_not_what_it_says_is_refused(handed, change, message):
    run, away = handed
    rewrite(away, change)
    with pytest.raises(RefusedError, match=message):
        accept(run, 1, Folder(away))
    assert not (Folder(run.run_dir) / "experts").exists("1")


def test_weights_that_are_worse_than_nothing_are_refused_although_it_says_so(handed):
    from paris_ray.training.contribution import _load, _task

    run, away = handed
    rewrite(away, honest_but_useless)
    task = _task(run, 1)
    _load(task, Folder(away) / "experts" / "1")
    loss = task.validate()["validation_loss"]
    rewrite(away, lambda stage: (stage / "counts.json").write_text(json.dumps({"validation_loss": loss})))
    with pytest.raises(RefusedError, match="is no better than that of predicting nothing"):
        accept(run, 1, Folder(away))


def test_of_another_run_or_torn(handed):
    run, away = handed
    other = configs.load("tiny", [f"run_dir={run.run_dir}", "expert.train.images=640", "expert.train.checkpoint_images=640"])
    with pytest.raises(RefusedError, match=r"is not a finished training of this run: config.train.learning_rate: 0.003 → 0.001"):
        accept(other, 1, Folder(away))
    file = away / "experts/1" / WEIGHTS
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(RefusedError, match="has another checksum than its manifest says"):
        accept(run, 1, Folder(away))
    file.write_bytes(whole)
    (away / "experts/1/_manifest.json").write_text("[1]")
    with pytest.raises(RefusedError):
        accept(run, 1, Folder(away))


def described(handed, change):
    """Change the manifest of the expert that is handed back."""
    file = handed / "experts/1/_manifest.json"
    found = json.loads(file.read_text())
    change(found)
    file.write_text(json.dumps(found))


INVENTED = ("checkpoints/gone.safetensors", "../../../secret", "metrics/made-up.jsonl")


def test_only_weights_and_their_config_are_taken_and_ours_stays_until_they_are(handed):
    """A checkpoint that was deleted since, and names that were never files: the manifest may list them, the finished expert here survives."""
    run, away = handed
    accept(run, 1, Folder(away))
    ours = stages.stage(run, "expert-1")
    first = ours.status(verify=True).manifest
    described(away, lambda found: found["files"].extend({"name": name, "bytes": 1, "sha256": "0"} for name in INVENTED))
    lock = Folder(away) / "experts/1"
    lock.write_json("_lock.json", {"id": "another"})
    lock.write_bytes("metrics/loss.jsonl", b"<script>")
    described(away, lambda found: found["files"].append({"name": "_lock.json", "bytes": 1, "sha256": "0"}))
    ours.folder.write_json("_lock.json", {"id": "mine"})
    accept(run, 1, Folder(away), replace=True)
    found = {entry.name for entry in ours.folder.files(recursive=True)}
    assert found == {"_lock.json", "_manifest.json", "_started.json", "export/config.json", WEIGHTS}
    assert ours.folder.read_json("_lock.json") == {"id": "mine"}
    assert ours.status(verify=True).manifest["fingerprint"] == first["fingerprint"]
    (away / "experts/1" / WEIGHTS).unlink()
    with pytest.raises(RefusedError, match=r"diffusion_pytorch_model.safetensors is missing"):
        accept(run, 1, Folder(away), replace=True)
    assert ours.status(verify=True).state == "valid"
    assert Folder(run.run_dir).folders() == ["encoders", "experts", "shards"]


def test_checkpoints_may_be_as_large_as_they_are_and_weights_no_larger(handed):
    run, away = handed
    described(away, lambda found: found["files"].append({"name": "checkpoints/large.safetensors", "bytes": 1 << 33, "sha256": "0"}))
    with open(away / "experts/1/checkpoints/large.safetensors", "wb") as file:
        file.truncate(1 << 33)
    accept(run, 1, Folder(away))
    with open(away / "experts/1" / WEIGHTS, "r+b") as file:
        file.truncate(1 << 33)
    with pytest.raises(RefusedError, match=r"has 8589934592 bytes, more than the \d+ that it may have"):
        accept(run, 1, Folder(away), replace=True)
    assert stages.stage(run, "expert-1").status(verify=True).state == "valid"


@pytest.mark.parametrize("images", ["1 |\n\n<img src=x>", -1, True, 10**30, None])
def test_what_it_says_of_itself_is_a_number_in_its_range_or_refused(handed, images):
    run, away = handed
    described(away, lambda found: found.update(seconds="<b>", created=[], software="x", counts={**found["counts"], "extra": "<i>", "images": images}))
    with pytest.raises(RefusedError, match="images; this run's budget is 640"):
        accept(run, 1, Folder(away))
    described(away, lambda found: found["counts"].update(images=640))
    accept(run, 1, Folder(away))
    manifest = stages.stage(run, "expert-1").status().manifest
    assert manifest["counts"].keys() == {"images", "validation_loss", "rows"}
    assert manifest["seconds"] is None
    assert manifest["created"].startswith("20")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"files": ' + "[" * 900 + "]" * 900 + "}", "{", "null"])
def test_json_that_is_none_or_too_deep_is_refused(handed, text):
    run, away = handed
    (away / "experts/1/_manifest.json").write_text(text)
    with pytest.raises(RefusedError, match="cannot be read"):
        accept(run, 1, Folder(away))


def test_the_jobs(trained, tmp_path, capsys):
    run, _ = trained
    sets = [word for key, value in SETS.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]
    arguments = ["--config", "tiny", "--set", f"run_dir={tmp_path}/run", *sets]
    shutil.copytree(run.run_dir, tmp_path / "run")
    out = tmp_path / "bundle"
    assert shard_bundle.main([*arguments, "--expert", "1", "--out", str(out)]) == 0
    assert f"python -m jobs.train_expert --config {out}/config.yaml --set run_dir={out} --expert 1" in capsys.readouterr().out
    assert accept_job.main([*arguments, "--expert", "1", "--from", str(out)]) == 2
    assert "is not a finished training of this run: it is absent" in capsys.readouterr().err
    train(configs.load(str(out / "config.yaml"), [f"run_dir={out}"]), 1)
    assert accept_job.main([*arguments, "--expert", "1", "--from", str(out)]) == 0
    assert "expert-1 is taken" in capsys.readouterr().out
    assert shard_bundle.main([*arguments, "--expert", "9", "--out", str(tmp_path / "none")]) == 2
